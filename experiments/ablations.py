"""The experiments of docs/RESULTS.md: every seed of one, as a table, a figure and CSV files.

    python experiments/ablations.py                  lists the experiments
    python experiments/ablations.py k4 k16           stages 2 and 3 of each, where runs/ablations lacks them
    python experiments/ablations.py bowl --seeds 0   with these seeds in place of 0, 1 and 2
    python experiments/ablations.py tabletop half half_lr quarter quarter_lr     fewer groups per iteration
    python experiments/ablations.py tabletop grpo    GRPO's advantage
    python experiments/ablations.py libero_loo libero_grpo --seeds 1 2 5     the same on LIBERO-Object
    python experiments/ablations.py senses NAME      the policies of tabletop or one_scene, misled or blind
    python experiments/ablations.py imitation        other ways to spend the tabletop's time: more of stage 2
    python experiments/ablations.py offsets          how the start depends on the offset of the worn arm
    python experiments/ablations.py passes           N optimiser steps on the same rollouts: where it breaks
    python experiments/ablations.py gif              the tabletop before and after, docs/tabletop.gif

Of each run, docs/results/NAME keeps metrics_SEED.csv and evaluation_SEED.csv, every context's outcome. The
policies of `imitation` are evaluated in 200 contexts that nothing else uses, seeds 150 to 249 of each task;
the others in the usual 100, of a single task of LIBERO in its 50 stored states.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw

import ript
from experiments import tabletop_suites
from experiments.common import (ONE_START, ONE_TASK, PRETRAINED, RESULTS, ROOT, RUNS, SUCCESS, curve_of,
                                evaluated, keep_results, kept_outcomes, plot_curves, print_header, print_row,
                                read_csv, run_once, write_csv)
from policies.tiny import Tiny
from scripts import report

HOME = RUNS / "ablations"
SEEDS = (0, 1, 2)
TABLETOP_SUITES = ROOT / "experiments/tabletop_suites.py"
LIBERO_SUITES = ROOT / "experiments/libero_suites.py"
OBJECT = "--suite libero_object --task"
HALF = "--groups 8 --max_rejected 6 --minibatch 64 --iterations 12 --eval_every 4"
QUARTER = "--groups 4 --max_rejected 3 --minibatch 32 --iterations 24 --eval_every 8"
# Of each: settings of both stages, of stage 2, of stage 3, over the suite's presets.
EXPERIMENTS = dict(
    # 16 groups of 8 kept, 6 iterations, 1 demonstration per instruction
    tabletop=("", "", ""),
    long=("", "", "--iterations 15 --eval_every 3"),
    # 24 groups, of which none is replaced: as many rollouts as the preset takes with its replacements.
    # Uniform groups are dropped in both.
    no_replacement=("", "", "--groups 24 --max_rejected 0 --minibatch 192"),
    k4=("", "", "--rollouts 4 --groups 32 --max_rejected 24"),
    k16=("", "", "--rollouts 16 --groups 8 --max_rejected 6"),
    demos3=("", "--demos_per_task 3 --sft_steps 15", ""),
    demos10=("", "--demos_per_task 10 --sft_steps 50", ""),
    demos30=("", "--demos_per_task 30 --sft_steps 150", ""),
    transfer=(f"--suite {TABLETOP_SUITES}:HandOver", "", ""),
    transfer_head=(f"--suite {TABLETOP_SUITES}:HandOver --model {TABLETOP_SUITES}:HeadOnly", "", ""),
    transfer_move=(f"--suite {TABLETOP_SUITES}:Move --model {TABLETOP_SUITES}:HeadOnly", "", ""),
    # Half and a quarter of the groups for twice and four times as many iterations, with evaluations after as
    # many rollouts. The learning rate stays, or falls with the square root of the minibatch.
    half=("", "", HALF),
    half_lr=("", "", f"{HALF} --lr 1.4e-4"),
    quarter=("", "", QUARTER),
    quarter_lr=("", "", f"{QUARTER} --lr 1e-4"),
    grpo=("", "", ""),  # its script has another advantage
    # Several optimiser steps on the same rollouts, with the clip and without.
    passes4=("", "", "--ppo_epochs 4"),
    passes4_noclip=("", "", "--ppo_epochs 4 --clip_coef 1000"),
    # 4 demonstrations per instruction, 4 iterations
    libero=(f"{OBJECT} 0", ONE_START, ONE_TASK),
    libero_none=(f"{OBJECT} 0", ONE_START, f"{ONE_TASK} --max_rejected 0"),  # nothing is replaced
    libero_loo=(f"{OBJECT} 0", ONE_START, ONE_TASK),  # leave-one-out, beside GRPO's advantage
    libero_grpo=(f"{OBJECT} 0", ONE_START, ONE_TASK),
    # With four demonstrations, no rollout of 16 in training contexts succeeds in task 1 and on the bowl.
    object_1=(f"{OBJECT} 1", f"{ONE_START} --demos_per_task 10", ONE_TASK),
    object_2=(f"{OBJECT} 2", ONE_START, ONE_TASK),
    object_3=(f"{OBJECT} 3", ONE_START, ONE_TASK),
    one_scene=(f"--suite {LIBERO_SUITES}:OneScene", ONE_START, ONE_TASK),
    bowl=(f"--suite {LIBERO_SUITES}:Goal --task 6", f"{ONE_START} --demos_per_task 10", ONE_TASK),
)
# Of an experiment: the script of stage 3, where it is not ript.py itself.
SCRIPTS = dict(grpo="experiments/grpo.py", libero_grpo="experiments/grpo.py")
# Of an experiment: the one whose stage 2 it begins with, where the settings are the same.
START_OF = dict.fromkeys(("half", "half_lr", "quarter", "quarter_lr", "grpo"), "tabletop")
START_OF |= dict.fromkeys(("libero_loo", "libero_grpo"), "libero")
# Of an experiment: suites in which its policies are evaluated again, and what is different there.
SENSES = dict(
    tabletop={"as it is": "tabletop", "other instruction": f"{TABLETOP_SUITES}:Misled",
              "grey pictures": f"{TABLETOP_SUITES}:Blind"},
    one_scene={"other instruction": f"{LIBERO_SUITES}:OneSceneMisled --eval_contexts 20"},
)
# Stage 3 of the tabletop takes about as long as 500 steps of stage 2; about 900 of its rollouts succeed.
IMITATION = {
    "one demonstration, 500 steps": "--sft_steps 500",
    "one demonstration, 500 steps, larger lr": "--sft_steps 500 --sft_lr 2e-4",
    "450 demonstrations, 500 steps, larger lr": "--demos_per_task 450 --sft_steps 500 --sft_lr 2e-4",
}
# Of one update each: what differs from the preset, which has no momentum. A clip of 1e6 is none.
STEPS = (dict(lr=2e-4, clip_coef=0.1), dict(lr=2e-4, clip_coef=0.5), dict(lr=2e-4, clip_coef=1e6),
         dict(lr=5e-5, clip_coef=0.1), dict(lr=5e-5, clip_coef=1e6), dict(lr=1e-5, clip_coef=0.1),
         dict(lr=1e-5, clip_coef=1e6), dict(lr=2e-4, clip_coef=0.1, adam_beta1=0.9),
         dict(lr=2e-4, clip_coef=1e6, adam_beta1=0.9))
PASSES = (1, 2, 4, 8)

# ------------------------------------------------------------------------------- stages 2 and 3 with settings
def run(name, seed):
    """Stages 2 and 3 of one run, as far as they are missing: -> its directory. Copies its results."""
    out = HOME / f"{name}_{seed}"
    shared, stage_2, stage_3 = (settings.split() for settings in EXPERIMENTS[name])
    shared += ["--seed", seed]
    first = HOME / f"{START_OF.get(name, name)}_{seed}"
    start = run_once(start_of(first), "scripts/sft.py", *shared, *stage_2)
    run_once(out, SCRIPTS.get(name, "ript.py"), *shared, *stage_3, "--checkpoint", start)
    keep_results(out, RESULTS / name, seed)
    return out

def start_of(out):
    """The directory of the policy that a run starts from: beside the run's, which must hold no input."""
    return out.with_name(f"{out.name}_sft")

def table(names, seeds):
    """Print a line for each run."""
    print_header("", "seed", "SFT", "RIPT", "gained, lost, p", "rollouts", "uniform groups", "seconds")
    for name in names:
        for seed in seeds:
            print_row(name, seed, *cells_of(name, seed))

def cells_of(name, seed):
    """What the table says of a run: success before and after, and what it took."""
    before, after = kept_outcomes(RESULTS / name, seed)
    gained, lost, p = report.mcnemar(before, after)
    names = "rollouts", "kept", "all_success", "all_fail", "seconds_rollouts", "seconds_update"
    sums = dict.fromkeys(names, 0.0)
    for row in read_csv(RESULTS / name / f"metrics_{seed}.csv"):
        for key in sums:
            sums[key] += float(row.get(key, 0))
    uniform = 1 - sums["kept"] / (sums["kept"] + sums["all_success"] + sums["all_fail"])
    shares = [report.interval(sum(won), len(won)) for won in (before, after)]
    seconds = sums["seconds_rollouts"] + sums["seconds_update"]
    return [*shares, f"{gained}, {lost}, {p:.1g}", f"{sums['rollouts']:.0f}", f"{uniform:.0%}",
            f"{seconds:.0f}"]

def figure(names, seeds):
    """Success on the held-out contexts against rollouts, a line per experiment and seed: -> the file."""
    curves = []
    for number, name in enumerate(names):
        for seed in seeds:
            colour, label = seed, f"seed {seed}"
            if len(names) > 1:
                colour, label = number, "" if seed != seeds[0] else name
            metrics = read_csv(RESULTS / name / f"metrics_{seed}.csv")
            curves.append(curve_of(label, f"o-C{colour}", metrics))
    path = RESULTS / names[0] / f"{'_'.join(['curve', *names[1:]])}.png"
    plot_curves(path, {SUCCESS: curves})
    return path

def experiments(names, seeds):
    """Run what is missing of some experiments; print their table and draw their figure."""
    for name in names:
        for seed in seeds:
            run(name, seed)
    table(names, seeds)
    print(figure(names, seeds))

# -------------------------------------------------------------------------------- other evaluations, controls
def outcomes(policy, suite, out, *arguments):
    """The outcomes, bool, of a saved policy in the held-out contexts of a suite, in order."""
    # What ript.py prints would interrupt the table.
    found = evaluated(out, "--suite", suite, "--checkpoint", policy, *arguments, quiet=True)
    return [bool(won) for _, won in sorted(found.items())]

def share_of(won):
    """The share of successes, with its interval."""
    return report.interval(sum(won), len(won))

def keep_table(path, rows, seeds):
    """Write a table of the usual seeds; one of others is printed only, and takes no other's place."""
    if tuple(seeds) == SEEDS:
        write_csv(path, rows)

def senses(name, seeds):
    """Success of an experiment's policies in each of its SENSES."""
    runs = {seed: run(name, seed) for seed in seeds}
    print_header("seed", "", *SENSES[name])
    rows = []
    for seed in seeds:
        for stage, start in dict(SFT=start_of(runs[seed]), RIPT=runs[seed] / "last").items():
            cells = {}
            for number, (title, words) in enumerate(SENSES[name].items()):
                suite, *more = words.split()
                out = HOME / f"senses/{name}_{seed}_{stage}_{number}"
                cells[title] = share_of(outcomes(start, suite, out, *more))
            rows.append(dict(seed=seed, stage=stage, **cells))
            print_row(*rows[-1].values())
    keep_table(RESULTS / f"senses/{name}.csv", rows, seeds)

def imitation(seeds):
    """The start, RIPT, and three kinds of more imitation, in fresh contexts."""
    rows = []
    for seed in seeds:
        base = run("tabletop", seed)
        policies = {"start (SFT)": start_of(base), "RIPT": base / "last"}
        for number, (name, settings) in enumerate(IMITATION.items()):
            out = HOME / f"imitation/{number}_{seed}"
            policies[name] = run_once(out, "scripts/sft.py", "--seed", seed, *settings.split())
        won = {}
        for number, (name, policy) in enumerate(policies.items()):
            out = HOME / f"imitation/eval_{number}_{seed}"
            won[name] = outcomes(policy, f"{TABLETOP_SUITES}:Fresh", out, "--eval_contexts", 100)
        for name, found in won.items():
            gained, lost, p = report.mcnemar(found, won["RIPT"])
            rows.append(dict(seed=seed, policy=name, success=share_of(found), ript_gains=gained,
                             ript_loses=lost, p=f"{p:.1g}"))
            print_row(*rows[-1].values())
    keep_table(RESULTS / "imitation/table.csv", rows, seeds)

def offsets(seeds):
    """The pretrained policy and the start of the first seed under each offset."""
    rows = []
    for kind in tabletop_suites.OFFSETS:
        name = kind.__name__
        suite = f"{TABLETOP_SUITES}:{name}"
        start = run_once(HOME / f"offsets/{name}", "scripts/sft.py", "--suite", suite, "--seed", seeds[0])
        cells = {}
        for title, policy in {"pretrained": PRETRAINED, "start (SFT)": start}.items():
            out = HOME / f"offsets/{name}_{title.split()[0]}"
            cells[title] = share_of(outcomes(policy, suite, out))
        x, y = kind.SLIP[:2]
        rows.append(dict(x=x, y=y, **cells))
        print_row(*rows[-1].values())
    keep_table(RESULTS / "offsets/table.csv", rows, seeds)

# ------------------------------------------------------------------------- several steps on the same rollouts
def passes(seeds):
    """One update of N passes from the start, on the same rollouts: how far the policy moves."""
    rows = []
    for seed in seeds:
        start = start_of(run("tabletop", seed))
        words = ["--seed", seed, "--checkpoint", start, "--out", HOME / "ppo_epochs"]
        cfg = ript.parse_config([str(word) for word in words])
        rows += passes_of(cfg)
    keep_table(RESULTS / "passes/table.csv", rows, seeds)

def passes_of(cfg):
    """The rows of one seed: one for each of STEPS and each number of passes."""
    contexts = ript.evaluation_contexts(cfg)
    rows = []
    with ript.open_simulators(cfg) as simulators:
        start = Tiny.load(cfg)
        context_of = partial(ript.training_context, cfg=cfg)
        episodes, _ = ript.collect(start, simulators, context_of, ript.TrainState(), cfg)
        for change in STEPS:
            for number in PASSES:
                changed = replace(cfg, **change, ppo_epochs=number)
                policy = updated(episodes, changed)
                success = ript.evaluate(policy, simulators, contexts, changed, "ppo_epochs")
                share = report.interval(round(success * len(contexts)), len(contexts))
                row = dict(seed=cfg.seed, lr=changed.lr, clip_coef=changed.clip_coef,
                           adam_beta1=changed.adam_beta1, ppo_epochs=number, success=share)
                rows.append(row | moved(start, policy, episodes))
                print_row(*rows[-1].values())
    return rows

def updated(episodes, cfg):
    """The policy of cfg.checkpoint after an update."""
    policy = Tiny.load(cfg)
    optimizer = torch.optim.AdamW(policy.parameter_groups(), cfg.lr, (cfg.adam_beta1, 0.999))
    ript.update(policy, optimizer, episodes, cfg, ript.TrainState())
    return policy

def moved(start, policy, episodes):
    """How far a policy is from start on recorded rollouts: KL, and the share of ratios off 1 by over 0.1."""
    chunks = ript.make_micro_batches(episodes, range(len(episodes)), 256)
    mask, old, _ = ript.compute_old_log_probs(start, episodes, chunks)
    _, new, _ = ript.compute_old_log_probs(policy, episodes, chunks)
    log_ratio = (new - old)[mask]
    ratio = log_ratio.exp()
    kl = (ratio - 1 - log_ratio).mean().item()
    outside = ((ratio - 1).abs() > 0.1).float().mean().item()
    return dict(approx_kl=round(kl, 4), outside_the_clip=round(outside, 2))

# ---------------------------------------------------------------------------------------------------- the GIF
def gif(seeds):
    """docs/tabletop.gif: of each task, the first context in which the first seed's SFT policy fails."""
    base = run("tabletop", seeds[0])
    cfg = ript.load_config(base)
    before, _ = report.read_outcomes(base / "evaluation_SFT.json", cfg)
    simulator = ript.load_suite(cfg.suite)(cfg.image_size, cfg.collision)
    pictures = []
    for task in (0, 1):
        context = next(context for context in ript.evaluation_contexts(cfg)
                       if context.task == task and not before[f"tabletop {task} {context.seed}"])
        clips = []
        for title, place in {"SFT, one demonstration": start_of(base), "after RIPT": base / "last"}.items():
            policy = Tiny.load(replace(cfg, checkpoint=str(place)))
            clips.append([titled(frame, title) for frame in report.film(policy, simulator, context)])
        number = max(len(clip) for clip in clips)
        for t in range(0, number, 2):
            pictures.append(np.concatenate([clip[min(t, len(clip) - 1)] for clip in clips], 1))
        # The end stays a while.
        pictures += 6 * pictures[-1:]
    simulator.env.close()
    images = [Image.fromarray(picture).quantize(96) for picture in pictures]
    images[0].save(ROOT / "docs/tabletop.gif", save_all=True, append_images=images[1:], duration=110, loop=0)

def titled(frame, title):
    """A picture of 208 x 208 pixels with a title."""
    image = Image.fromarray(frame).resize((208, 208))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 208, 14), fill=(0, 0, 0))
    draw.text((4, 2), title, fill=(255, 255, 255))
    return np.asarray(image)

COMMANDS = dict(imitation=imitation, offsets=offsets, passes=passes, gif=gif)

def main(argv=None):
    """Run experiments, or one of the further commands."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.error = partial(ript.require, False)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    given = parser.parse_args(argv)
    names = given.names
    if names[:1] == ["senses"]:
        ript.require(len(names) == 2 and names[1] in SENSES, f"senses is of one of {', '.join(SENSES)}")
        return senses(names[1], given.seeds)
    if len(names) == 1 and names[0] in COMMANDS:
        return COMMANDS[names[0]](given.seeds)
    known = bool(names) and set(names) <= set(EXPERIMENTS)
    ript.require(known, f"say which experiments, of {', '.join(EXPERIMENTS)}; or one of senses NAME, "
                 f"{', '.join(COMMANDS)}")
    experiments(names, given.seeds)

if __name__ == "__main__":
    ript.run_command(main)
