"""A whole suite of LIBERO in one policy, without a GPU: ten tasks, 50 stored states each.

    python experiments/whole_suite.py starts     stage 2 with several settings, in contexts of development
    python experiments/whole_suite.py settings   stage 3 with several settings, in contexts of development
    python experiments/whole_suite.py run        stages 2 and 3 of each seed: tables and a figure by task
    python experiments/whole_suite.py senses     these policies, told to take another thing, or blind
    python experiments/whole_suite.py arms       seed 0: tasks drawn by their signal; the 7B's adapters
    python experiments/whole_suite.py train ARM ARGUMENTS    one run of an arm, as ript.py has it

The suite is libero_object or, with `--suite libero_spatial`, that one; scripted experts demonstrate. `starts`
and `settings` are there to choose in fresh scenes, so that the stored states stay unseen; they use a seed of
their own. LIBERO-Object has two seeds and LIBERO-Spatial one, unless `--seeds` names others. Results go to
docs/results/whole_suite. So far only a part has run. Of libero_object: stage 2 in development, but for `ten`
and `ten_long`, and half of `settings`; both seeds of the arms `even` and `plain`, and `senses` of the second;
the first six of the other arms' iterations. Of libero_spatial: four starts in development, seed 0 and its
`senses`.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import os
# What is learned depends on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

import ript
from experiments.adapters import ONE_STEP
from experiments.common import (RESULTS, ROOT, RUNS, OtherScenes, collect_once, curve_of, evaluated,
                                keep_results, print_header, print_row, read_csv, run_once, write_csv)
from policies.tiny import Tiny
from scripts import report
from simulators.libero_experts import LiberoObject, LiberoSpatial

KEPT = RESULTS / "whole_suite"
TASKS = range(10)
HERE = f"{ROOT}/experiments/whole_suite.py"
# Compared in contexts of development: settings of stage 2, and of stage 3 in place of STAGE_3's.
STARTS = dict(one="--demos_per_task 1 --sft_steps 1000", two="--demos_per_task 2 --sft_steps 1000",
              short="--demos_per_task 4 --sft_steps 600", four="--demos_per_task 4 --sft_steps 1000",
              four_long="--demos_per_task 4 --sft_steps 2000", ten="--demos_per_task 10 --sft_steps 1000",
              ten_middle="--demos_per_task 10 --sft_steps 1500",
              ten_long="--demos_per_task 10 --sft_steps 2000")
# In all of these the learning rate does not fall.
SHORT = ("--iterations 4 --eval_every 0 --anneal false --adam_beta1 0 --groups 20 --max_rejected 20 "
         "--minibatch 160")
STEPS = "--minibatch 40 --clip_coef 0.9"
LARGE = "--groups 40 --max_rejected 40 --minibatch 320"
ALL = f"--model {HERE}:Everything"
SETTINGS = dict(
    head=SHORT, head_steps=f"{SHORT} {STEPS}", all=f"{SHORT} {ALL}", all_steps=f"{SHORT} {ALL} {STEPS}",
    slow=f"{SHORT} --iterations 6 --lr 5e-5 --adam_beta1 0.9",
    large=f"{SHORT} --iterations 3 {LARGE}",
    large_slow=f"{SHORT} --iterations 8 {LARGE} --lr 5e-5 --adam_beta1 0.9",
    all_large_slow=f"{SHORT} --iterations 8 {LARGE} --lr 5e-5 --adam_beta1 0.9 {ALL}")
# Of stage 2, and of stage 3 beside the suite's preset, as chosen from these. The presets say the same by now.
CHOSEN = dict(libero_object="four", libero_spatial="ten_long")
STAGE_3 = f"{LARGE} --iterations 12 --eval_every 6"
# Of each arm: what the figure calls it, and its settings beside STAGE_3. Only the first has momentum.
ARMS = dict(even=("tasks in turn, momentum", ""), plain=("tasks in turn", "--adam_beta1 0"),
            signal=("tasks drawn by their signal", "--adam_beta1 0"),
            adapters=("the 7B's adapters, one step of 5e-5",
                      f"--model {ROOT}/experiments/adapters.py:Adapted {ONE_STEP} 5e-5"))
SEEDS = dict(libero_object=(0, 1), libero_spatial=(0,))
DEVELOPMENT_SEED = 2


class Everything(Tiny):
    """The laptop's policy, of which all but the scale head learns in stage 3."""
    trained = Tiny.sft_modules
    PRESET = dict(libero_object=LiberoObject.PRESET["tiny"], libero_spatial=LiberoSpatial.PRESET["tiny"])
    PRESET |= {f"{HERE}:ObjectDevelopment": PRESET["libero_object"],
               f"{HERE}:SpatialDevelopment": PRESET["libero_spatial"]}


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


class Obeyed:
    """Before a misled suite among the bases of a class: success is what the policy is told to do."""
    def make_env(self, task):
        """The usual environment with another goal, which is no part of a state."""
        super().make_env(task)
        (relation, _, place), = self.env.parsed_problem["goal_state"]
        _, target = self.env.obj_of_interest
        self.env.parsed_problem["goal_state"] = [[relation, self.told(task), place]]
        self.env.obj_of_interest = [self.told(task), target]  # for the expert


class Blind:
    """A suite whose cameras see grey."""
    def render(self, camera, size, collision):
        """A grey picture."""
        return np.full((size, size, 3), 128, np.uint8)


class ObjectMisled(Misled, LiberoObject):
    """LIBERO-Object: the first of each scene's other things, in the order of LIBERO's file of the task."""
    OTHER = (2, 0, 4, 8, 3, 7, 5, 1, 9, 6)

    def told(self, task):
        """The name of that thing in the scene."""
        thing, _ = self.INSTRUCTIONS[task].removeprefix("pick up the ").split(" and place it ")
        return f"{thing.replace(' ', '_')}_1"


class ObjectObeyed(Obeyed, ObjectMisled):
    """LIBERO-Object: success is the other thing in the basket."""


class ObjectBlind(Blind, LiberoObject):
    """LIBERO-Object without pictures."""


class SpatialMisled(Misled, LiberoSpatial):
    """LIBERO-Spatial: the other bowl."""
    OTHER = (1, 6, 8, 9, 9, 3, 7, 9, 1, 7)

    def told(self, task):
        """The other bowl's name, which is the same in every scene."""
        return "akita_black_bowl_2"


class SpatialObeyed(Obeyed, SpatialMisled):
    """LIBERO-Spatial: success is the other bowl on the plate."""


class SpatialBlind(Blind, LiberoSpatial):
    """LIBERO-Spatial without pictures."""


class Variants(NamedTuple):
    """A suite as it is, for choosing settings, and for the controls."""
    usual: type
    development: type
    misled: type
    obeyed: type
    blind: type


SUITES = dict(
    libero_object=Variants(LiberoObject, ObjectDevelopment, ObjectMisled, ObjectObeyed, ObjectBlind),
    libero_spatial=Variants(LiberoSpatial, SpatialDevelopment, SpatialMisled, SpatialObeyed, SpatialBlind))


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
    that of each task N as eval_N and the evaluation's seconds."""
    rollout_stats, evaluate, save_run, found = ript.rollout_stats, ript.evaluate, ript.save_run, {}

    def stats_by_task(groups):
        return rollout_stats(groups) | numbers_by_task(groups)

    def evaluate_tasks(policy, simulators, contexts, cfg, name):
        began = time.time()
        success = evaluate(policy, simulators, contexts, cfg, name)
        found["seconds_evaluation"] = time.time() - began
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
    """From now on the task of each training context of this process is drawn by the last iteration's row."""
    collect = ript.collect

    def collect_drawn(policy, simulators, context_of, state, cfg):
        drawn = partial(context_by_signal, row=state.history[-1], cfg=cfg)
        return collect(policy, simulators, drawn, state, cfg)

    ript.collect = collect_drawn


def context_by_signal(number: int, row: dict, cfg: ript.Config) -> ript.Context:
    """The usual training context with a task that is drawn. A task's weight is the share of its groups with
    signal in a row of metrics, (kept + 1) / (groups + 2), so that no task is left out."""
    tasks = ript.tasks_of(cfg)
    shares = [(1 + row.get(f"kept_{task}", 0)) / (2 + row.get(f"groups_{task}", 0)) for task in tasks]
    rng = np.random.default_rng([cfg.seed, number, 1])
    task = int(rng.choice([*tasks], p=np.array(shares) / sum(shares)))
    return replace(ript.training_context(number, cfg), task=task, instruction=tasks[task])


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


def words_of(suite: str, kind: str, seed: int) -> list:
    """The arguments that choose one of a suite's Variants, with ten contexts of each task unless it is the
    usual one, and a seed."""
    if kind == "usual":
        return ["--suite", suite, "--seed", seed]
    name = getattr(SUITES[suite], kind).__name__
    return ["--suite", f"{HERE}:{name}", "--eval_contexts", 10, "--seed", seed]


def development_start(suite: str, name: str) -> Path:
    """The policy after stage 2 with one of STARTS, in development."""
    words = words_of(suite, "development", DEVELOPMENT_SEED)
    out = RUNS / f"whole_suite/{suite}_{name}_start"
    return run_once(out, "scripts/sft.py", *words, *STARTS[name].split())


def starts(suite: str, seeds: tuple[int, ...]) -> None:
    """STARTS in contexts of development: success with the mean, and of three groups of each task with noise
    their success and how many have signal. Then the starts of seeds themselves."""
    policies = {name: (development_start(suite, name), DEVELOPMENT_SEED) for name in STARTS}
    policies |= {f"seed {seed}": (start_of(suite, seed), seed) for seed in seeds}
    add_tasks()
    print_header("", "", "all tasks", *TASKS)
    rows = []
    for name, (policy, seed) in policies.items():
        words = *words_of(suite, "development", seed), "--checkpoint", policy
        found = by_task(evaluated(policy.with_name(f"{policy.name}_eval"), *words))
        rows.append([name, "mean", share(total(found)), *(sum(won) for won in found.values())])
        print_row(*rows[-1])
        words = *words, "--groups", 3 * len(TASKS), "--max_rejected", 0
        *_, stats = collect_once(ript.parse_config([str(word) for word in words]))
        rows.append([name, "noise", f"{stats['rollout_success']:.0%}",
                     *(f"{stats[f'success_{task}']:.0%}, {stats[f'kept_{task}']}" for task in TASKS)])
        print_row(*rows[-1])
    names = "start", "with", "all", *(f"task_{task}" for task in TASKS)
    write_csv(KEPT / f"{suite}_starts.csv", [dict(zip(names, row)) for row in rows])


def start_of(suite: str, seed: int) -> Path:
    """The policy after stage 2 that all arms of a seed start from."""
    words = *words_of(suite, "usual", seed), *STARTS[CHOSEN[suite]].split()
    return run_once(RUNS / f"whole_suite/{suite}_{seed}_sft", "scripts/sft.py", *words)


def learn(name: str, arm: str, start: Path, *words) -> Path:
    """One run of stage 3, as far as it is missing: -> its directory. Its results are kept."""
    _, settings = ARMS[arm]
    out = run_once(RUNS / f"whole_suite/{name}", "experiments/whole_suite.py", "train", arm,
                   *STAGE_3.split(), *settings.split(), *words, "--checkpoint", start)
    keep_results(out, KEPT, name)
    return out


def learned(suite: str, arm: str, seed: int) -> Path:
    """The run of an arm: -> its directory."""
    return learn(f"{suite}_{arm}_{seed}", arm, start_of(suite, seed), *words_of(suite, "usual", seed))


def settings(suite: str, seeds: tuple[int, ...]) -> None:
    """SETTINGS in contexts of development, all from one start: success by task before and after."""
    words = words_of(suite, "development", DEVELOPMENT_SEED)
    start = development_start(suite, CHOSEN[suite])
    print_header("", "SFT", "RIPT", "gained, lost, p", "rollouts", "with signal", *TASKS)
    for name, settings in SETTINGS.items():
        name = f"{suite}_settings_{name}"
        learn(name, "even", start, *words, *settings.split())
        before, after = (outcomes_of(name, stage) for stage in ("SFT", "RIPT"))
        gained, lost, p = report.mcnemar(total(before), total(after))
        rows = [row for row in read_csv(KEPT / f"metrics_{name}.csv") if "rollouts" in row]
        rollouts, kept = (sum(int(row[column]) for row in rows) for column in ("rollouts", "kept"))
        print_row(name, share(total(before)), share(total(after)), f"{gained}, {lost}, {p:.1g}", rollouts,
                  f"{kept * ript.Config.rollouts / rollouts:.0%}",
                  *(f"{sum(before[task])} -> {sum(after[task])}" for task in TASKS))


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
        rows = read_csv(KEPT / f"metrics_{name}.csv")
        for task in (*TASKS, "all"):
            pair = [total(won) if task == "all" else won[task] for won in (before, after)]
            gained, lost, p = report.mcnemar(*pair)
            tasks = TASKS if task == "all" else [task]
            groups, kept = (sum(int(row.get(f"{kind}_{number}", 0)) for row in rows for number in tasks)
                            for kind in ("groups", "kept"))
            print_row(name, task, *map(share, pair), f"{gained}, {lost}, {p:.1g}", groups,
                      f"{kept / groups:.0%}" if groups else "")  # a drawn task may have none
        sums = {kind: sum(float(row.get(kind, 0)) for row in rows)
                for kind in ("rollouts", "seconds_rollouts", "seconds_update", "seconds_evaluation")}
        print(", ".join(f"{kind} {number:.0f}" for kind, number in sums.items()))


def names_of_tasks(suite: str) -> list[str]:
    """Of each task, what its instruction has and the others do not."""
    texts = SUITES[suite].usual().INSTRUCTIONS
    for words in ("pick up the ", " and place it in the basket", " and place it on the plate"):
        texts = [text.replace(words, "") for text in texts]
    return texts


def figure(path: Path, suite: str, runs: dict[str, str]) -> None:
    """Draw a panel for each task: success on its stored states, and of its rollouts, against all rollouts.
    runs: what the legend calls each run, by the run's name."""
    from matplotlib.figure import Figure
    drawing = Figure(figsize=(13, 5.5), layout="constrained")
    panels = drawing.subplots(2, 5, sharex=True, sharey=True).flat
    for task, title, axes in zip(TASKS, names_of_tasks(suite), panels):
        axes.set(ylim=(0, 103))
        axes.set_title(title, fontsize="small", wrap=True)
        for number, (name, label) in enumerate(runs.items()):
            metrics = read_csv(KEPT / f"metrics_{name}.csv")
            held_out = curve_of(label, f"o-C{number}", metrics, f"eval_{task}")
            noisy = curve_of("its rollouts", f":C{number}", metrics, f"success_{task}")
            for curve in (held_out, noisy):
                rollouts, success = zip(*curve.points) if curve.points else ([], [])
                axes.plot(rollouts, success, curve.style, label=curve.label)
    drawing.supxlabel("rollouts of all tasks")
    drawing.supylabel("success, %")
    drawing.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2 * len(runs))
    with ript.writing(path) as temporary:
        drawing.savefig(temporary, dpi=110)


def signal_figure(path: Path, suite: str, runs: dict[str, str]) -> None:
    """Draw a panel for each run: the share of each task's groups that have signal, in every iteration, and
    the number of its groups. runs: what the titles call each run, by the run's name."""
    from matplotlib.figure import Figure
    drawing = Figure(figsize=(2.2 + 5.4 * len(runs), 4.2), layout="constrained")
    panels = drawing.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, (name, title) in zip(panels, runs.items()):
        rows = [row for row in read_csv(KEPT / f"metrics_{name}.csv") if "rollouts" in row]
        groups, kept = (np.array([[int(row.get(f"{kind}_{task}", 0)) for row in rows] for task in TASKS])
                        for kind in ("groups", "kept"))  # task, iteration
        shares = 100 * np.divide(kept, groups, where=groups > 0, out=np.full(groups.shape, np.nan))
        colours = axes.imshow(shares, vmin=0, vmax=100, aspect="auto")
        for (task, iteration), number in np.ndenumerate(groups):
            bright = shares[task, iteration] > 60
            axes.text(iteration, task, number, ha="center", va="center", fontsize="small",
                      color="black" if bright else "white")
        axes.set(xlabel="iteration", title=title, xticks=range(len(rows)),
                 xticklabels=range(1, len(rows) + 1), yticks=TASKS, yticklabels=names_of_tasks(suite))
    drawing.colorbar(colours, ax=panels, label="groups with signal, %")
    with ript.writing(path) as temporary:
        drawing.savefig(temporary, dpi=110)


def run(suite: str, seeds: tuple[int, ...]) -> None:
    """Stages 2 and 3 of each seed."""
    names = {f"{suite}_even_{seed}": f"seed {seed}" for seed in seeds}
    for seed in seeds:
        learned(suite, "even", seed)
    table([*names])
    if tuple(seeds) == SEEDS[suite]:
        figure(KEPT / f"{suite}.png", suite, names)


def arms(suite: str, seeds: tuple[int, ...]) -> None:
    """Every arm of the first seed."""
    names = {f"{suite}_{arm}_{seeds[0]}": title for arm, (title, _) in ARMS.items()}
    for arm in ARMS:
        learned(suite, arm, seeds[0])
    table([*names])
    figure(KEPT / f"{suite}_arms.png", suite, names)
    signal_figure(KEPT / f"{suite}_signal.png", suite, names)


def senses(suite: str, seeds: tuple[int, ...]) -> None:
    """Success in ten contexts of each task, before and after stage 3: as it is, blind, and where the policy
    is told to take another thing, at the scene's own goal and at what it is told."""
    rows = []
    print_header("seed", "stage", "", "all tasks", *TASKS)
    for seed in seeds:
        policies = dict(SFT=start_of(suite, seed), RIPT=learned(suite, "even", seed) / "last")
        for stage, policy in policies.items():
            outcomes = outcomes_of(f"{suite}_even_{seed}", stage)
            found = dict(usual={task: won[:10] for task, won in outcomes.items()})
            for kind in ("blind", "misled", "obeyed"):
                out = RUNS / f"whole_suite/{suite}_{kind}_{seed}_{stage}"
                found[kind] = by_task(evaluated(out, *words_of(suite, kind, seed), "--checkpoint", policy))
            for kind, won in found.items():
                cells = {f"task_{task}": sum(of_task) for task, of_task in won.items()}
                rows.append(dict(seed=seed, stage=stage, kind=kind, all=share(total(won))) | cells)
                print_row(*rows[-1].values())
    if tuple(seeds) == SEEDS[suite]:
        write_csv(KEPT / f"{suite}_senses.csv", rows)


COMMANDS = dict(starts=starts, settings=settings, run=run, senses=senses, arms=arms)


def main(argv=None):
    """One of the commands."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"] and len(argv) > 1:
        return train(argv[1], argv[2:])
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.error = partial(ript.require, False)
    parser.add_argument("name", choices=COMMANDS)
    parser.add_argument("--suite", choices=SUITES, default="libero_object")
    parser.add_argument("--seeds", nargs="+", type=int)
    given = parser.parse_args(argv)
    COMMANDS[given.name](given.suite, given.seeds or SEEDS[given.suite])


if __name__ == "__main__":
    ript.run_command(main)
