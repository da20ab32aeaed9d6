"""Controls for the laptop's headline: what does reinforcement give that imitation does not?

    python examples/evidence.py tabletop       first: the runs that the controls are compared with
    python examples/controls.py imitation      other ways to spend the time: more of stage 2
    python examples/controls.py offsets        how the start depends on the offset of the worn arm
    python examples/controls.py passes         N optimiser steps on the same rollouts: where it breaks

The policies of the first are evaluated in 200 contexts that nothing else uses, seeds 150 to 249 of each task;
the others in the usual 100. Tables go to assets/evidence.
"""
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import ript
from examples import laptop, report
from examples.evidence import ASSETS, SEEDS, call

TABLETOP = ript.load_suite("tabletop")
RUNS = ROOT / "runs/evidence"
# Stage 3 of the tabletop takes about as long as 500 steps of stage 2; about 900 of its rollouts succeed.
IMITATION = {
    "one demonstration, 500 steps": "--sft_steps 500",
    "one demonstration, 500 steps, larger lr": "--sft_steps 500 --sft_lr 2e-4",
    "450 demonstrations, 500 steps, larger lr": "--demos_per_task 450 --sft_steps 500 --sft_lr 2e-4",
}
# Of one update each: what differs from the preset, which has no momentum. A clip of 1e6 is none.
STEPS = (dict(lr=2e-4, clip=0.1), dict(lr=2e-4, clip=0.5), dict(lr=2e-4, clip=1e6), dict(lr=5e-5, clip=0.1),
         dict(lr=5e-5, clip=1e6), dict(lr=1e-5, clip=0.1), dict(lr=1e-5, clip=1e6),
         dict(lr=2e-4, clip=0.1, momentum=0.9), dict(lr=2e-4, clip=1e6, momentum=0.9))
PASSES = (1, 2, 4, 8)
# In place of (0.14, 0.14): of the commands along x and y, in units of the largest.
OFFSETS = ((0, 0), (0.07, 0.07), (0.1, 0.1), (0.14, 0.14), (0.2, 0.2), (0.14, -0.14), (-0.14, 0.14),
           (-0.14, -0.14))


class Fresh(TABLETOP):
    """The tabletop with other held-out contexts, seeds 150 to 249."""
    def reset(self, context):
        return super().reset(replace(context, seed=context.seed + 150))


def name_of(offset):
    """The name of the suite with an offset, which is a word."""
    return "Slip" + "_".join(f"{round(100 * x)}" for x in offset).replace("-", "m")


# Suites are chosen by the name of a class.
for slip in OFFSETS:
    settings = dict(SLIP=(*slip, 0, 0, 0, 0, 0))
    globals()[name_of(slip)] = type(name_of(slip), (TABLETOP,), settings)


def succeeds(policy, suite, contexts, out):
    """The outcomes, bool, of a saved policy in the held-out contexts of a suite, in order."""
    file = out / "evaluation_success.json"
    if not file.exists():
        call("ript.py", "--eval", "--suite", suite, "--checkpoint", policy, "--eval_contexts", contexts,
             "--out", out, stdout=subprocess.DEVNULL)
    return [bool(won) for _, won in sorted(json.loads(file.read_text()).items())]


def imitate(out, *arguments):
    """Stage 2 with other settings, unless it is there."""
    if not (out / "model.safetensors").exists():
        call("examples/imitation.py", *arguments, "--out", out)


def imitation():
    """The start, RIPT, and three kinds of more imitation, three seeds, in fresh contexts."""
    rows = []
    for seed in SEEDS:
        run = RUNS / f"tabletop_{seed}"
        policies = {"start (SFT)": run / "sft", "RIPT": run / "last"}
        for name, settings in IMITATION.items():
            policies[name] = RUNS / f"controls/{len(policies)}_{seed}"
            imitate(policies[name], "--suite", "tabletop", "--seed", seed, *settings.split())
        won = {}
        for number, (name, policy) in enumerate(policies.items()):
            out = RUNS / f"controls/eval_{number}_{seed}"
            won[name] = succeeds(policy, f"{__file__}:Fresh", 100, out)
        for name, outcomes in won.items():
            gained, lost, p = report.mcnemar(outcomes, won["RIPT"])
            rows.append(dict(seed=seed, policy=name, success=report.interval(sum(outcomes), len(outcomes)),
                             ript_gains=gained, ript_loses=lost, p=f"{p:.1g}"))
            print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    report.write_csv(ASSETS / "controls.csv", rows)


def offsets():
    """The pretrained policy and the start of seed 0 under each offset."""
    rows = []
    for slip in OFFSETS:
        suite = f"{__file__}:{name_of(slip)}"
        start = RUNS / f"controls/{name_of(slip)}"
        # The presets of a suite that is a file are those of its class, so stage 2 is that of the tabletop.
        imitate(start, "--suite", suite, "--seed", 0)
        cells = {}
        for name, policy in {"pretrained": ROOT / "assets/tabletop", "start (SFT)": start}.items():
            won = succeeds(policy, suite, 50, RUNS / f"controls/eval_{name_of(slip)}_{policy.name}")
            cells[name] = report.interval(sum(won), len(won))
        rows.append(dict(x=slip[0], y=slip[1], **cells))
        print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    report.write_csv(ASSETS / "offsets.csv", rows)


def passes():
    """One update of N passes from the start, on the same rollouts, three seeds: how far the policy moves."""
    rows = []
    for seed in SEEDS:
        settings = dict(suite="tabletop", seed=seed, checkpoint=RUNS / f"tabletop_{seed}/sft",
                        out=RUNS / "controls/passes")
        words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        cfg = ript.parse_config(words)
        contexts = ript.evaluation_contexts(cfg)
        with ript.open_workers(cfg) as workers:
            start = laptop.Tiny.load(cfg)
            context_of = partial(ript.training_context, cfg=cfg)
            episodes, _ = ript.collect(start, workers, context_of, dict(iteration=0, group=0), cfg)
            for change in STEPS:
                for number in PASSES:
                    changed = replace(cfg, **change, passes=number)
                    policy = updated(episodes, changed)
                    success = ript.evaluate(policy, workers, contexts, changed, "passes")
                    row = dict(seed=seed, lr=changed.lr, clip=changed.clip, momentum=changed.momentum,
                               passes=number,
                               success=report.interval(round(success * len(contexts)), len(contexts)))
                    rows.append(row | moved(start, policy, episodes))
                    print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    report.write_csv(ASSETS / "passes.csv", rows)


def updated(episodes, cfg):
    """The policy of cfg.checkpoint after an update."""
    policy = laptop.Tiny.load(cfg)
    optimizer = torch.optim.AdamW(policy.parameter_groups(), cfg.lr, (cfg.momentum, 0.999))
    ript.update(policy, optimizer, episodes, cfg, dict(iteration=0))
    return policy


def moved(start, policy, episodes):
    """How far a policy is from start on recorded rollouts: KL, and the share of ratios off 1 by over 0.1."""
    chunks = ript.micro_batches(episodes, range(len(episodes)), 256)
    mask, old, _ = ript.score(start, episodes, chunks)
    _, new, _ = ript.score(policy, episodes, chunks)
    log_ratio = (new - old)[mask]
    ratio = log_ratio.exp()
    kl = (ratio - 1 - log_ratio).mean().item()
    outside = ((ratio - 1).abs() > 0.1).float().mean().item()
    return dict(approx_kl=round(kl, 4), outside_the_clip=round(outside, 2))


if __name__ == "__main__":
    commands = dict(imitation=imitation, offsets=offsets, passes=passes)
    if sys.argv[1:2] == [] or sys.argv[1] not in commands:
        sys.exit(f"controls.py: say which, {' or '.join(commands)}")
    commands[sys.argv[1]]()
