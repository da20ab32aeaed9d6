"""The 7B's own path on the laptop: how its optimiser settings learn with adapters on a bfloat16 base.

    python experiments/adapters.py            tabletop: six arms, three seeds, a table and a figure
    python experiments/adapters.py libero     LIBERO-Object's task 0: three arms, two seeds
    python experiments/adapters.py steps      within one update: how far each optimiser step moves the policy
    python experiments/adapters.py --seeds 0  with these seeds in place of the usual ones
    python experiments/adapters.py train ARM --checkpoint DIR ARGUMENTS    one run, as ript.py has it

The policy is the laptop's as ript.py has the 7B: its base in bfloat16, adapters of rank 32 and both heads in
float32, two passes of which the second has gradient, and the decoder's adapters and the action head train.
All arms of a seed begin with the same policy, which one of them rounds; the first rollouts of the others are
the same.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import copy
from dataclasses import replace
from functools import partial

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import ript
from experiments.common import (ONE_START, RESULTS, RUNS, SUCCESS, add_noise_success, curve_of, keep_results,
                                kept_outcomes, plot_curves, print_header, print_row, read_csv, run_once,
                                write_csv)
from policies.openvla_oft import OpenVLAOFT, is_adapter_or_head
from policies.tiny import Tiny
from scripts import report
from simulators.scripted import SEE

SHARED = SEE | dict(iterations=4, eval_every=2, micro_batch=256)  # the others are ript.py's, the release's

class Adapted(Tiny):
    """The laptop's policy on the 7B's path: it trains as OpenVLAOFT does, not as Tiny does."""
    PRESET = dict(tabletop=SHARED | dict(max_rejected=24),
                  libero_object=SHARED | dict(groups=16, max_rejected=16, scale_multiplier=0.5))
    trained = OpenVLAOFT.trained
    adapters_only = OpenVLAOFT.adapters_only
    save = OpenVLAOFT.save

    @classmethod
    def load(cls, cfg):
        """The policy of cfg.checkpoint, its base in bfloat16, with adapters: those of cfg.adapter, or new."""
        policy = super().load(replace(cfg, adapter=""))
        for name, p in policy.named_parameters():
            if not is_adapter_or_head(name):
                p.data = p.data.bfloat16()
        if cfg.adapter:
            policy.read_adapter_folder(Path(cfg.adapter))
        else:
            policy.add_lora()
        policy.train_only(cls.trained)
        return policy

class Paper(Adapted):
    """With the paper's learning rates, which differ between adapters and head."""
    def parameter_groups(self):
        """AdamW's parameter groups."""
        adapters = [p for name, p in self.named_parameters() if "lora_" in name and p.requires_grad]
        head = list(self.action_head.parameters())
        return [dict(params=adapters, lr=1e-4, weight_decay=1e-4),
                dict(params=head, lr=1e-5, weight_decay=1e-4)]

class Rounded(Adapted):
    """With trained weights that are rounded to bfloat16 after each step, as the release keeps them."""
    @classmethod
    def load(cls, cfg):
        """The same policy. From now on this process rounds what it trains."""
        policy = super().load(cfg)
        trained = [p for p in policy.parameters() if p.requires_grad]

        @torch.no_grad()
        def round_trained(*arguments):
            for p in trained:
                p.copy_(p.bfloat16())

        round_trained()
        register_optimizer_step_post_hook(round_trained)
        return policy

# Of each arm: what the figure calls it, its policy, and its settings beside the release's.
ONE_STEP = "--minibatch 1000 --adam_beta1 0 --lr"
ARMS = dict(
    release=("the release's: 5e-5, clip 0.1", Adapted, ""),
    paper=("the paper's: 1e-4, head 1e-5", Paper, ""),
    slow=("lr 1e-5", Adapted, "--lr 1e-5"),
    rounded=("release's, weights rounded to bfloat16", Rounded, ""),
    wide=("clip 0.9", Adapted, "--clip_coef 0.9"),
    step=("one step of 2e-4", Adapted, f"{ONE_STEP} 2e-4"),
    step_slow=("one step of 5e-5", Adapted, f"{ONE_STEP} 5e-5"))
# Of each experiment: its suite, its arms and its seeds.
EXPERIMENTS = dict(
    adapters=("--suite tabletop", ("release", "paper", "slow", "rounded", "wide", "step"), (0, 1, 2)),
    # Of LIBERO's with seed 0 the start solves 2 of 50 states, and 4 of the first 256 rollouts succeed.
    adapters_libero=("--suite libero_object --task 0", ("release", "wide", "step_slow"), (1, 2)))
STEPS = "release", "paper", "slow", "wide", "step"

# -------------------------------------------------------------------------------------------------- one run
def train(arm, argv):
    """ript.py's main() for an arm, with success with noise in its rows."""
    _, model, settings = ARMS[arm]
    add_noise_success()
    ript.main(["--model", f"{__file__}:{model.__name__}", *settings.split(), *argv])

def start_of(name, seed):
    """The policy after stage 2 that all arms of a seed start from. It is that of ablations.py."""
    suite, _, _ = EXPERIMENTS[name]
    ablation, stage_2 = dict(adapters=("tabletop", ""), adapters_libero=("libero", ONE_START))[name]
    out = RUNS / f"ablations/{ablation}_{seed}_sft"
    return run_once(out, "scripts/sft.py", *suite.split(), "--seed", seed, *stage_2.split())

def run(name, arm, seed):
    """One run, as far as it is missing. Its results go to docs/results."""
    suite, _, _ = EXPERIMENTS[name]
    out = RUNS / f"{name}/{arm}_{seed}"
    run_once(out, "experiments/adapters.py", "train", arm, *suite.split(), "--seed", seed,
             "--checkpoint", start_of(name, seed))
    keep_results(out, RESULTS / name, f"{arm}_{seed}")

# ---------------------------------------------------------------------------------------- table and figure
def cells_of(name, arm, seed):
    """What the table says of a run."""
    rows = read_csv(RESULTS / name / f"metrics_{arm}_{seed}.csv")
    before, after = kept_outcomes(RESULTS / name, f"{arm}_{seed}")
    _, of_release = kept_outcomes(RESULTS / name, f"release_{seed}")
    start = report.mcnemar(before, after)
    release = report.mcnemar(of_release, after)
    middle = next(row for row in rows if row["iteration"] == "2")
    updates = [row for row in rows if "updates" in row]

    def mean(metric):
        return sum(float(row[metric]) for row in updates) / len(updates)

    return [report.interval(sum(before), len(before)), f"{float(middle['eval_success']):.0%}",
            report.interval(sum(after), len(after)), f"{float(rows[-1]['noise_success']):.0%}",
            *("{}, {}, {:.1g}".format(*test) for test in (start, release)),
            " ".join(f"{float(row['rollout_success']):.2f}" for row in updates),
            sum(int(row["rollouts"]) for row in updates), f"{mean('clip_frac'):.2f}",
            f"{mean('outside_clip'):.2f}", f"{mean('approx_kl'):.4f}"]

def figure(name, seeds):
    """Success on the held-out contexts against rollouts: with the mean, and with noise."""
    _, arms, _ = EXPERIMENTS[name]
    panels = {SUCCESS: [], "the same, with exploration noise, %": []}
    for number, arm in enumerate(arms):
        for seed in seeds:
            label = ARMS[arm][0] if seed == seeds[0] else ""
            metrics = read_csv(RESULTS / name / f"metrics_{arm}_{seed}.csv")
            for curves, metric in zip(panels.values(), ("eval_success", "noise_success")):
                curves.append(curve_of(label, f"o-C{number}", metrics, metric))
    plot_curves(RESULTS / name / "curve.png", panels)

def experiment(name, seeds):
    """Run what is missing of an experiment; print its table and, with the usual seeds, draw its figure."""
    _, arms, _ = EXPERIMENTS[name]
    for seed in seeds:
        for arm in arms:
            run(name, arm, seed)
    print_header("", "seed", "start", "after 2", "after 4", "with noise", "gained, lost, p against the start",
                 "against the release's", "success of the rollouts", "rollouts", "clip_frac", "outside_clip",
                 "KL")
    for arm in arms:
        for seed in seeds:
            print_row(ARMS[arm][0], seed, *cells_of(name, arm, seed))
    if seeds == EXPERIMENTS[name][-1]:
        figure(name, seeds)

# ---------------------------------------------------------------------------------------- within one update
class Watch:
    """Compares a policy after each optimiser step with what it was, and with the same in float32."""
    def __init__(self, policy, episodes):
        self.policy = policy
        self.precise = copy.deepcopy(policy).float()
        self.episodes = episodes
        self.parts = ript.make_micro_batches(episodes, range(len(episodes)), 64)[::3]  # a third of the chunks
        self.before = [self.log_probs(one) for one in (policy, self.precise)]
        self.rows = []

    @torch.no_grad()
    def log_probs(self, policy):
        """Of all action steps that ran, (N,)."""
        mask, log_prob, _ = ript.compute_old_log_probs(policy, self.episodes, self.parts)
        return log_prob[mask]

    def step(self, *arguments):
        """A row about the policy as it is now."""
        trained = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        self.precise.load_state_dict(trained, strict=False)
        policies = self.policy, self.precise
        change, truth = (self.log_probs(one) - was for one, was in zip(policies, self.before))
        ratio = change.exp()
        self.rows.append(dict(
            step=len(self.rows) + 1, outside=((ratio - 1).abs() > 0.1).float().mean().item(),
            approx_kl=(ratio - 1 - change).mean().item(), change_std=change.std().item(),
            true_std=truth.std().item(), rounding_std=(change - truth).std().item()))

def steps(seeds):
    """One update of each arm on the same rollouts, step by step; the clip of 0.1 is the yardstick of all."""
    rows = []
    for seed in seeds:
        words = ["--model", f"{__file__}:Adapted", "--suite", "tabletop", "--seed", str(seed)]
        cfg = ript.parse_config([*words, "--checkpoint", str(start_of("adapters", seed))])
        with ript.open_simulators(cfg) as simulators:
            torch.manual_seed(seed)
            context_of = partial(ript.training_context, cfg=cfg)
            episodes, _ = ript.collect(Adapted.load(cfg), simulators, context_of, ript.TrainState(), cfg)
        for arm in STEPS:
            rows += [dict(arm=arm, seed=seed) | row for row in steps_of(arm, cfg, episodes)]
    if seeds == EXPERIMENTS["adapters"][-1]:
        write_csv(RESULTS / "adapters/steps.csv", rows)
    print_header("", "step", "outside", "KL", "change, std", "true change", "rounding")
    for arm in STEPS:
        for number in sorted({row["step"] for row in rows if row["arm"] == arm}):
            chosen = [row for row in rows if (row["arm"], row["step"]) == (arm, number)]
            names = "outside", "approx_kl", "change_std", "true_std", "rounding_std"
            means = [sum(row[name] for row in chosen) / len(chosen) for name in names]
            print_row(ARMS[arm][0], number, *(f"{mean:.3f}" for mean in means))

def steps_of(arm, cfg, episodes):
    """An update of an arm: -> a row after each of its optimiser steps."""
    _, model, settings = ARMS[arm]
    words = ["--model", f"{__file__}:Adapted", "--suite", cfg.suite, *settings.split()]
    changed = replace(ript.parse_config(words), checkpoint=cfg.checkpoint, seed=cfg.seed)
    torch.manual_seed(cfg.seed)
    policy = model.load(changed)
    optimizer = torch.optim.AdamW(policy.parameter_groups(), changed.lr, (changed.adam_beta1, 0.999))
    watch = Watch(policy, episodes)
    optimizer.register_step_post_hook(watch.step)
    ript.update(policy, optimizer, episodes, changed, ript.TrainState())
    return watch.rows

def main(argv=None):
    """An experiment by its name, or one run."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        ript.require(argv[1:] and argv[1] in ARMS, f"train is of one of {', '.join(ARMS)}")
        return train(argv[1], argv[2:])
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.error = partial(ript.require, False)
    parser.add_argument("name", nargs="?", default="tabletop", choices=("tabletop", "libero", "steps"))
    parser.add_argument("--seeds", nargs="+", type=int)
    given = parser.parse_args(argv)
    name = "adapters_libero" if given.name == "libero" else "adapters"
    seeds = tuple(given.seeds or EXPERIMENTS[name][-1])
    if given.name == "steps":
        return steps(seeds)
    experiment(name, seeds)

if __name__ == "__main__":
    ript.run_command(main)
