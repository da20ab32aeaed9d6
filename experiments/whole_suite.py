"""A whole suite of LIBERO in one policy, without a GPU: ten tasks, 50 stored states each.

    python experiments/whole_suite.py starts     stage 2 with several policies, in contexts of development
    python experiments/whole_suite.py run        stages 2 and 3, two seeds: tables and a figure by task
    python experiments/whole_suite.py misled     these policies, told to take another thing of the same scene
    python experiments/whole_suite.py arms       seed 0: tasks drawn by their signal; the 7B's adapters
    python experiments/whole_suite.py train ARM ARGUMENTS    one run of an arm, as ript.py has it

The suite is libero_object or, with `--suite libero_spatial`, that one; scripted experts demonstrate. `starts`
is there to choose settings in fresh scenes, so that the stored states stay unseen. `--seeds 0` is for one
seed. Results go to docs/results/whole_suite. None of this has run to its end yet.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

import ript
from experiments.adapters import ONE_STEP
from experiments.common import (RESULTS, ROOT, RUNS, OtherScenes, curve_of, evaluated, keep_results,
                                print_header, print_row, read_csv, run_once, write_csv)
from policies.tiny import Tiny
from scripts import report
from simulators.libero_experts import LiberoObject, LiberoSpatial

KEPT = RESULTS / "whole_suite"
TASKS = range(10)
HERE = f"{ROOT}/experiments/whole_suite.py"
# Settings of stage 2 that are compared in contexts of development.
WIDE = f"--model {HERE}:Small --image_size 64 --collision --act_batch 1"
STARTS = dict(short=("", "--demos_per_task 4 --sft_steps 600"),
              long=("", "--demos_per_task 4 --sft_steps 2000"),
              small=(WIDE, "--demos_per_task 4 --sft_steps 2000"))
# Of stage 2, and of stage 3 beside the suite's preset: a first guess, which nothing has been compared with.
STAGE_2 = "--demos_per_task 4 --sft_steps 2000"
STAGE_3 = "--groups 40 --max_rejected 40 --minibatch 320 --iterations 10 --eval_every 5"
# Of each arm: what the figure calls it, and its settings beside STAGE_3.
ARMS = dict(even=("tasks in turn", ""), signal=("tasks drawn by their signal", ""),
            adapters=("the 7B's adapters, one step of 5e-5",
                      f"--model {ROOT}/experiments/adapters.py:Adapted {ONE_STEP} 5e-5"))
SEEDS = 0, 1


class Small(Tiny):
    """The laptop's policy with wider towers and a larger decoder: 2.3 million parameters."""
    TOWERS = (dict(embed_dim=96, keypoints=32),) * 2
    LLM = dict(vocab_size=259, hidden_size=192, intermediate_size=384, num_hidden_layers=3,
               num_attention_heads=6)


class ObjectDevelopment(OtherScenes, LiberoObject):
    """LIBERO-Object in other scenes."""


class SpatialDevelopment(OtherScenes, LiberoSpatial):
    """LIBERO-Spatial in other scenes."""


class Misled:
    """A suite in which the policy is told to take another thing of the same scene. OTHER has, of each task,
    the one that is about that thing."""
    def __init__(self, name="", image_size=256, collision=False):
        super().__init__(name, image_size, collision)
        texts = [task.language for task in self.benchmark.tasks]
        self.INSTRUCTIONS = [texts[other] for other in self.OTHER]


class ObjectMisled(Misled, LiberoObject):
    """LIBERO-Object: the first of each scene's other things, in the order of LIBERO's file of the task."""
    OTHER = (2, 0, 4, 8, 3, 7, 5, 1, 9, 6)


class SpatialMisled(Misled, LiberoSpatial):
    """LIBERO-Spatial: the other bowl."""
    OTHER = (1, 6, 8, 9, 9, 3, 7, 9, 1, 7)


class Variants(NamedTuple):
    """A suite as it is, for choosing settings, and for the control."""
    usual: type
    development: type
    misled: type


SUITES = dict(libero_object=Variants(LiberoObject, ObjectDevelopment, ObjectMisled),
              libero_spatial=Variants(LiberoSpatial, SpatialDevelopment, SpatialMisled))


# ---------------------------------------------------------------------------------------------- one run
def numbers_by_task(groups: list[list[ript.Episode]]) -> dict:
    """Of each task N: its groups, those of them with signal, and its rollouts' success."""
    found = {}
    for task in TASKS:
        of_task = [group for group in groups if group[0].context.task == task]
        if of_task:
            rewards = ript.rewards_of(of_task)
            found |= {f"groups_{task}": len(of_task), f"kept_{task}": int(ript.has_signal(rewards).sum()),
                      f"success_{task}": rewards.double().mean().item()}
    return found


def add_tasks() -> None:
    """From now on ript.main's rows in this process have numbers_by_task and, where they have eval_success,
    that of each task N as eval_N."""
    rollout_stats, evaluate, save_run, found = ript.rollout_stats, ript.evaluate, ript.save_run, {}

    def stats_by_task(groups):
        return rollout_stats(groups) | numbers_by_task(groups)

    def evaluate_tasks(policy, simulators, contexts, cfg, name):
        success = evaluate(policy, simulators, contexts, cfg, name)
        outcomes, _ = report.read_outcomes(Path(cfg.out, f"evaluation_{name}.json"), cfg)
        for task, won in by_task(outcomes).items():
            found[f"eval_{task}"] = sum(won) / len(won)
        return success

    def save_tasks(out, policy, optimizer, state):
        state.history[-1] |= found
        found.clear()
        save_run(out, policy, optimizer, state)

    ript.rollout_stats, ript.evaluate, ript.save_run = stats_by_task, evaluate_tasks, save_tasks


def by_task(outcomes: dict) -> dict[int, list[bool]]:
    """The outcomes of an evaluation, by their contexts' names, in lists for each task."""
    found = {}
    for name, won in outcomes.items():
        _, task, _ = name.rsplit(" ", 2)
        found.setdefault(int(task), []).append(bool(won))
    return dict(sorted(found.items()))


def draw_by_signal() -> None:
    """From now on the task of each training context of this process is drawn. A task's weight is its share of
    groups with signal in the last iteration, (kept + 1) / (groups + 2), so that no task is left out."""
    training_context = ript.training_context

    def drawn(number, cfg):
        tasks = ript.tasks_of(cfg)
        metrics = Path(cfg.out, "metrics.jsonl")
        rows = metrics.read_text().splitlines() if metrics.exists() else ["{}"]
        last = json.loads(rows[-1])
        shares = [(1 + last.get(f"kept_{task}", 0)) / (2 + last.get(f"groups_{task}", 0)) for task in tasks]
        rng = np.random.default_rng([cfg.seed, number, 1])
        task = int(rng.choice([*tasks], p=np.array(shares) / sum(shares)))
        return replace(training_context(number, cfg), task=task, instruction=tasks[task])

    ript.training_context = drawn


def train(arm: str, argv: list[str]) -> None:
    """ript.py's main() for an arm, with the tasks' numbers in its rows."""
    ript.require(arm in ARMS, f"an arm is one of {', '.join(ARMS)}")
    add_tasks()
    if arm == "signal":
        draw_by_signal()
    ript.main(argv)


# ------------------------------------------------------------------------------------- tables and figure
def share(won: list[bool]) -> str:
    """Successes, with their interval."""
    return report.interval(sum(won), len(won))


def total(outcomes: dict[int, list[bool]]) -> list[bool]:
    """All tasks' outcomes."""
    return [won for of_task in outcomes.values() for won in of_task]


def starts(suite: str, seeds: tuple[int, ...]) -> None:
    """STARTS in fresh scenes of development, a line for each."""
    print_header("", "all tasks", *TASKS)
    development = "--suite", f"{HERE}:{SUITES[suite].development.__name__}", "--eval_contexts", 10
    for name, (model, settings) in STARTS.items():
        words = *model.split(), *development, "--seed", seeds[0]
        out = RUNS / f"whole_suite/{suite}_{name}_start"
        start = run_once(out, "scripts/sft.py", *words, *settings.split())
        found = by_task(evaluated(out.with_name(f"{out.name}_eval"), *words, "--checkpoint", start))
        print_row(name, share(total(found)), *(sum(won) for won in found.values()))


def start_of(suite: str, seed: int) -> Path:
    """The policy after stage 2 that all arms of a seed start from."""
    out = RUNS / f"whole_suite/{suite}_{seed}_sft"
    return run_once(out, "scripts/sft.py", "--suite", suite, "--seed", seed, *STAGE_2.split())


def learn(suite: str, arm: str, seed: int) -> Path:
    """One run of stage 3, as far as it is missing: -> its directory. Its results are kept."""
    _, settings = ARMS[arm]
    name = f"{suite}_{arm}_{seed}"
    out = run_once(RUNS / f"whole_suite/{name}", "experiments/whole_suite.py", "train", arm, "--suite", suite,
                   "--seed", seed, *STAGE_3.split(), *settings.split(), "--checkpoint", start_of(suite, seed))
    keep_results(out, KEPT, name)
    return out


def outcomes_of(name: str, stage: str) -> dict[int, list[bool]]:
    """What keep_results has kept of a run, by task; stage: SFT or RIPT."""
    found = {}
    for row in read_csv(KEPT / f"evaluation_{name}.csv"):
        found.setdefault(int(row["task"]), []).append(bool(int(row[stage])))
    return found


def table(names: list[str]) -> None:
    """Print a line for each task and run, and of each run all tasks."""
    print_header("", "task", "SFT", "RIPT", "gained, lost, p", "groups", "with signal")
    for name in names:
        before, after = (outcomes_of(name, stage) for stage in ("SFT", "RIPT"))
        rows = [row for row in read_csv(KEPT / f"metrics_{name}.csv") if "rollouts" in row]
        for task in (*TASKS, "all"):
            pair = [total(won) if task == "all" else won[task] for won in (before, after)]
            gained, lost, p = report.mcnemar(*pair)
            tasks = TASKS if task == "all" else [task]
            groups, kept = (sum(int(row.get(f"{kind}_{number}", 0)) for row in rows for number in tasks)
                            for kind in ("groups", "kept"))
            print_row(name, task, *map(share, pair), f"{gained}, {lost}, {p:.1g}", groups,
                      f"{kept / groups:.0%}" if groups else "")  # a drawn task may have none
        sums = {kind: sum(float(row.get(kind, 0)) for row in rows)
                for kind in ("rollouts", "seconds_rollouts", "seconds_update")}
        print(", ".join(f"{kind} {number:.0f}" for kind, number in sums.items()))


def figure(path: Path, suite: str, runs: dict[str, str]) -> None:
    """Draw a panel for each task: success on its stored states, and of its rollouts, against all rollouts.
    runs: what the legend calls each run, by the run's name."""
    from matplotlib.figure import Figure
    drawing = Figure(figsize=(13, 5.5), layout="constrained")
    panels = drawing.subplots(2, 5, sharex=True, sharey=True).flat
    for task, axes in zip(TASKS, panels):
        for number, (name, title) in enumerate(runs.items()):
            metrics = read_csv(KEPT / f"metrics_{name}.csv")
            held_out = curve_of(title, f"o-C{number}", metrics, f"eval_{task}")
            noisy = curve_of("its rollouts", f":C{number}", metrics, f"success_{task}")
            for curve in (held_out, noisy):
                rollouts, success = zip(*curve.points) if curve.points else ([], [])
                axes.plot(rollouts, success, curve.style, label=curve.label)
        text = SUITES[suite].usual().INSTRUCTIONS[task]
        for words in ("pick up the ", " and place it in the basket", " and place it on the plate"):
            text = text.replace(words, "")
        axes.set(ylim=(0, 103))
        axes.set_title(text, fontsize="small", wrap=True)
    drawing.supxlabel("rollouts of all tasks")
    drawing.supylabel("success, %")
    drawing.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2 * len(runs))
    with ript.writing(path) as temporary:
        drawing.savefig(temporary, dpi=110)


def run(suite: str, seeds: tuple[int, ...]) -> None:
    """Stages 2 and 3 of each seed."""
    names = {f"{suite}_even_{seed}": f"seed {seed}" for seed in seeds}
    for seed in seeds:
        learn(suite, "even", seed)
    table([*names])
    figure(KEPT / f"{suite}.png", suite, names)


def arms(suite: str, seeds: tuple[int, ...]) -> None:
    """Every arm of the first seed."""
    names = {f"{suite}_{arm}_{seeds[0]}": title for arm, (title, _) in ARMS.items()}
    for arm in ARMS:
        learn(suite, arm, seeds[0])
    table([*names])
    figure(KEPT / f"{suite}_arms.png", suite, names)


def misled(suite: str, seeds: tuple[int, ...]) -> None:
    """Success at the scene's own goal of policies that are told to take another thing."""
    print_header("seed", "stage", "all tasks", *TASKS)
    rows = []
    for seed in seeds:
        policies = dict(SFT=start_of(suite, seed), RIPT=learn(suite, "even", seed) / "last")
        for stage, policy in policies.items():
            out = RUNS / f"whole_suite/{suite}_misled_{seed}_{stage}"
            found = by_task(evaluated(out, "--suite", f"{HERE}:{SUITES[suite].misled.__name__}",
                                      "--eval_contexts", 10, "--checkpoint", policy))
            cells = {f"task {task}": sum(won) for task, won in found.items()}
            rows.append(dict(seed=seed, stage=stage, all=share(total(found)), **cells))
            print_row(*rows[-1].values())
    write_csv(KEPT / f"{suite}_misled.csv", rows)


COMMANDS = dict(starts=starts, run=run, misled=misled, arms=arms)


def main(argv=None):
    """One of the commands."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"] and len(argv) > 1:
        return train(argv[1], argv[2:])
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.error = partial(ript.require, False)
    parser.add_argument("name", choices=COMMANDS)
    parser.add_argument("--suite", choices=SUITES, default="libero_object")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    given = parser.parse_args(argv)
    COMMANDS[given.name](given.suite, given.seeds)


if __name__ == "__main__":
    ript.run_command(main)
