"""MetaWorld ML45: what its scripted experts and its simulator can do, and whether RIPT learns there.

    python experiments/ml45.py experts        all 50 tasks, ten seeds each: docs/results/metaworld/experts.csv
    python experiments/ml45.py speed          control steps, resets and pictures per second, beside LIBERO's
    python experiments/ml45.py settings       settings of both stages, four tasks, contexts of development
    python experiments/ml45.py scenes         what their policies after stage 2 make of scenes not seen before
    python experiments/ml45.py starts 2 14    these tasks after stage 2, in contexts of development
    python experiments/ml45.py tasks 2 14     stages 2 and 3 of these tasks, two seeds, held-out contexts
    python experiments/ml45.py heads 2 14     stage 3 of the same starts, seed 0, with the action head alone
    python experiments/ml45.py places 2 14    what pictures and features of these starts know of a scene
    python experiments/ml45.py horizon 2 14   the policies of these tasks, seed 0, with 496 control steps
    python experiments/ml45.py few_shot       one policy for five tasks, five demonstrations each, three seeds
    python experiments/ml45.py train ARGUMENTS    ript.py with these, and with noise_success in its rows

Settings are chosen in Development's contexts, so that the held-out ones stay unseen. Results go to
docs/results/metaworld.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import os
# What is learned depends on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from functools import partial

import numpy as np
import torch

import ript
from experiments.common import (RESULTS, ROOT, RUNS, SUCCESS, OtherScenes, add_noise_success, curve_of,
                                evaluated, keep_results, kept_outcomes, plot_curves, print_header, print_row,
                                read_csv, run_once, write_csv)
from policies.tiny import Tiny
from scripts import report
from simulators import metaworld

KEPT = RESULTS / "metaworld"
HERE = f"{ROOT}/experiments/ml45.py"
DEVELOPMENT = "--suite", f"{HERE}:Development", "--eval_contexts", 40
# What is compared in contexts of development. Settings of stage 2, beside the suite's own, which has ten
# demonstrations and 1200 steps; the first was its own until then. The last begin with a policy that has had
# a stage 1 on other tasks, with STAGE_1.
STARTS = dict(three="--demos_per_task 3 --sft_steps 600", three_long="--demos_per_task 3", ten="",
              pretrained="--sft_steps 400 --sft_lr 3e-4")
STAGE_1 = "--demos_per_task 8 --sft_steps 4000"
# Which of these, or the policy that `tasks` begins with; settings of stage 3 beside the suite's own; and the
# tasks in which this was tried.
LARGE = "--groups 16 --max_rejected 40 --iterations 4 --eval_every 2"
HEAD = f"{LARGE} --model {HERE}:HeadOnly --lr 3e-4"
ONE_STEP = f"{HEAD} --minibatch 128 --clip_coef 0.1"
GENTLE = f"{HEAD} --lr 1e-4 --adam_beta1 0.9 --iterations 8"
HAMMER, SLIDE, LEVER, DIAL = 17, 27, 22, 9  # the tasks hammer, plate-slide, lever-pull and dial-turn
# What stage 1 must not see: these four, and the list of tasks from which the six of RESULTS were taken.
ALONE = HAMMER, SLIDE, LEVER, DIAL, 39, 37, 32, 21, 41, 36, 38, 16, 42, 8
SETTINGS = dict(
    three_half=("three", f"{ONE_STEP} --scale_multiplier 0.5", (HAMMER,)),
    three_full=("three", ONE_STEP, (HAMMER, SLIDE)),
    three_steps=("three", f"{HEAD} --clip_coef 0.1", (HAMMER, SLIDE)),
    three_all=("three", f"{LARGE} --clip_coef 0.1", (HAMMER,)),
    three=("three", HEAD, (HAMMER, SLIDE)),
    three_gentle=("three", GENTLE, (SLIDE,)),
    three_many=("three", f"{HEAD} --minibatch 128 --groups 48 --max_rejected 120", (SLIDE,)),
    three_long=("three_long", HEAD, (HAMMER,)),
    ten=("ten", HEAD, (HAMMER, SLIDE)),
    ten_half=("ten", f"{HEAD} --scale_multiplier 0.5", (SLIDE,)),
    ten_gentle=("ten", GENTLE, (SLIDE,)),
    ten_all=("ten", LARGE, (HAMMER, SLIDE)),
    ten_small=("ten", "", (HAMMER, SLIDE)),
    own=("own", HEAD, (LEVER, DIAL)),
    own_upstream=("own", f"{LARGE} --model {HERE}:Upstream", (LEVER,)),
    own_all=("own", LARGE, (LEVER, DIAL)),
    own_small=("own", "", (LEVER, DIAL)),
    own_small_momentum=("own", "--adam_beta1 0.9 --lr 2e-4", (LEVER, DIAL)),
    pretrained_small=("pretrained", "", (SLIDE,)))
# Of stage 3 for the five tasks of `few_shot`: a guess, which nothing has been compared with.
FIVE_TASKS = "--groups 16 --max_rejected 24 --minibatch 64 --eval_every 8"


class HeadOnly(Tiny):
    """The laptop's policy, of which the action head alone learns in stage 3."""
    PARTS = ("action_head",)
    PRESET = dict.fromkeys(("metaworld", f"{HERE}:Development"), metaworld.ML45.PRESET["tiny"])

    @classmethod
    def load(cls, cfg):
        """The usual policy; PARTS of it learn."""
        policy = super().load(cfg)
        policy.train_only(cls.PARTS)
        return policy


class Upstream(HeadOnly):
    """The laptop's policy, of which all but its two heads learns in stage 3."""
    PARTS = tuple(name for name in Tiny.sft_modules if name != "action_head")


class Development(OtherScenes, metaworld.ML45):
    """The tasks to train on, in other scenes."""


class Stage1(OtherScenes, metaworld.ML45):
    """The tasks to train on that are neither in ALONE nor in FewShot, in other scenes."""
    NAMES = tuple(name for task, name in enumerate(metaworld.ML45.NAMES)
                  if task not in ALONE and name not in metaworld.FewShot.NAMES)


class Longer(metaworld.ML45):
    """The tasks to train on, with MetaWorld's own limit in place of a multiple of the expert's steps."""

Longer.HORIZON = (496,) * len(Longer.NAMES)


class Unseen(metaworld.MetaWorld):
    """All 50 tasks, without pictures and without pushes."""
    NAMES = tuple(metaworld.EXPERT_STEPS)

    def get_observation(self) -> dict:
        """Nothing: the experts know where things are."""
        return {}

    def disturb(self, action, context, t):
        """The expert's own action."""
        return action


def experts() -> None:
    """How often each task's expert succeeds within MetaWorld's own limit, and in how many control steps."""
    simulator = Unseen()
    simulator.HORIZON = 499
    rows = []
    for task, text in enumerate(simulator.INSTRUCTIONS):
        episodes = [simulator.demonstrate(ript.Context(task, text, seed)) for seed in range(10)]
        steps = [len(episode.actions) for episode in episodes if episode.success]
        within = sum(number <= Unseen.HORIZON[task] for number in steps)
        rows.append(dict(task=text, successes=len(steps), median_steps=int(np.median(steps)),
                         most_steps=max(steps), horizon=Unseen.HORIZON[task], within_horizon=within))
        print_row(*rows[-1].values())
    for name in ("successes", "within_horizon"):
        print(f"{name}: {sum(row[name] for row in rows)} of {10 * len(rows)}")
    write_csv(KEPT / "experts.csv", rows)


def per_second(call, seconds: float = 3.0) -> float:
    """How often a call can be made in a second."""
    began, number = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        call()
        number += 1
    return number / (time.perf_counter() - began)


def speed() -> None:
    """One process each: two suites after one another, and again in the other order."""
    print_header("suite, task", "control steps/s", "resets/s", "two 64-pixel pictures/s")
    tasks = dict(metaworld=14, libero_object=0)
    for name in (*tasks, *reversed(tasks)):
        simulator = ript.load_suite(name)(64, True)
        context = ript.Context(tasks[name], "", 0)
        simulator.reset(context)  # which makes the environment
        chunk = np.zeros((8, 4 if name == "metaworld" else 7))

        def episode():
            simulator.reset(context)
            for _ in range(20):
                simulator.step(chunk)

        resets = per_second(lambda: simulator.reset(context))
        looks = per_second(simulator.get_observation)
        # What is left of an episode without its reset and its pictures.
        bare = 160 / (1 / per_second(episode, 6) - 1 / resets - 20 / looks)
        print_row(f"{name}, {tasks[name]}", *(f"{rate:.0f}" for rate in (bare, resets, looks)))
        simulator.env.close()


def start_of(name: str, *arguments) -> Path:
    """A policy after stage 2."""
    return run_once(RUNS / f"ml45/{name}_sft", "scripts/sft.py", *arguments)


def learn(name: str, start: Path, *arguments) -> None:
    """One run of stage 3, as far as it is missing. Its results are kept."""
    out = run_once(RUNS / f"ml45/{name}", "experiments/ml45.py", "train", *arguments, "--checkpoint", start)
    keep_results(out, KEPT, name)


def cells_of(name: str) -> list:
    """What the tables say of a run: success, and what decides it."""
    before, after = kept_outcomes(KEPT, name)
    gained, lost, p = report.mcnemar(before, after)
    rows = read_csv(KEPT / f"metrics_{name}.csv")
    evaluated = [row for row in rows if "noise_success" in row]
    updates = [row for row in rows if "rollouts" in row]
    groups = {kind: sum(int(row[kind]) for row in updates) for kind in ("kept", "all_success", "all_fail")}
    shares = [f"{number / sum(groups.values()):.0%}" for number in groups.values()]
    return [report.interval(sum(before), len(before)), report.interval(sum(after), len(after)),
            f"{gained}, {lost}, {p:.1g}",
            " ".join(f"{float(row['eval_success']):.0%}" for row in evaluated),
            " ".join(f"{float(row['noise_success']):.0%}" for row in evaluated),
            " ".join(f"{float(row['rollout_success']):.0%}" for row in updates), *shares,
            sum(int(row["rollouts"]) for row in updates)]


def table(names: list[str]) -> None:
    """Print a line for each run."""
    print_header("", "start", "end", "gained, lost, p", "evaluations", "with noise", "rollouts' success",
                 "groups with signal", "all succeed", "all fail", "rollouts")
    for name in names:
        print_row(name, *cells_of(name))


def stage_1() -> Path:
    """A policy after a stage 1 on other tasks."""
    return start_of("stage_1", "--suite", f"{HERE}:Stage1", *STAGE_1.split())


def begin_of(begin: str, task: int) -> Path:
    """The policy that an arm of SETTINGS begins with."""
    if begin == "own":
        return start_of(f"task{task}_0", "--suite", "metaworld", "--seed", 0, "--task", task)
    words = [*DEVELOPMENT, "--task", task, *STARTS[begin].split()]
    if begin == "pretrained":
        words += ["--checkpoint", stage_1()]
    return start_of(f"{begin}_{task}", *words)


def starts_of_settings() -> list[tuple[str, int]]:
    """The policies that SETTINGS begin with: what they are called there, and their tasks."""
    return [*dict.fromkeys((begin, task) for begin, _, tasks in SETTINGS.values() for task in tasks)]


def settings() -> None:
    """SETTINGS, in contexts of Development."""
    names = []
    for name, (begin, stage_3, tasks) in SETTINGS.items():
        for task in tasks:
            words = *DEVELOPMENT, "--task", task
            names.append(f"{name}_{task}")
            start = begin_of(begin, task)
            learn(names[-1], start, *words, *stage_3.split())
    table(names)


def scenes(number: int = 50) -> None:
    """What the policies after stage 2 of `settings` make of scenes that they have not seen: how far their
    actions are from the expert's, and how much the first eight differ from scene to scene, beside the
    expert's. In normalised units; the noise's b is 0.1. Writes docs/results/metaworld/scenes.csv."""
    simulator = Development(64, True)
    shown = {}
    rows = []
    for begin, task in starts_of_settings():
        text = Development.INSTRUCTIONS[task]
        if task not in shown:
            contexts = [ript.Context(task, text, 1_000 + seed) for seed in range(number)]
            shown[task] = [simulator.demonstrate(context) for context in contexts]
        policy = Tiny.from_pretrained(begin_of(begin, task))
        errors, firsts, experts = [], [], []
        for episode in shown[task]:
            begins = range(0, len(episode.actions) - policy.chunk + 1, policy.chunk)
            seen = [policy.preprocess(episode.observations[t]) for t in begins]
            with torch.no_grad():
                mean, _ = policy.predict(seen, [text] * len(seen))
            wanted = np.stack([episode.actions[t:t + policy.chunk] for t in begins])
            errors.append(np.abs(mean.numpy() - wanted).mean())
            firsts.append(mean[0].numpy())
            experts.append(wanted[0])
        differ = [np.std(chunks, axis=0).mean() for chunks in (firsts, experts)]
        rows.append(dict(start=begin, task=task, error=f"{np.mean(errors):.3f}",
                         policy_differs=f"{differ[0]:.3f}", expert_differs=f"{differ[1]:.3f}"))
        print_row(*rows[-1].values())
    write_csv(KEPT / "scenes.csv", rows)


def starts(tasks: list[int]) -> None:
    """Success after stage 2, seed 0, in 40 contexts of Development: docs/results/metaworld/starts.csv."""
    path = KEPT / "starts.csv"
    rows = {int(row["task"]): row for row in read_csv(path)} if path.exists() else {}
    for task in tasks:
        start = begin_of("own", task)
        out = RUNS / f"ml45/task{task}_0_eval"
        outcomes = evaluated(out, *DEVELOPMENT, "--task", task, "--checkpoint", start)
        share = report.interval(sum(outcomes.values()), len(outcomes))
        rows[task] = dict(task=task, name=tuple(metaworld.EXPERT_STEPS)[task], start=share)
        print_row(*rows[task].values())
        write_csv(path, [rows[task] for task in sorted(rows)])


def tasks(numbers: list[int], seeds=(0, 1)) -> None:
    """Single tasks: each seed's stages 2 and 3, 100 held-out contexts; a table and a figure."""
    names = {f"task{task}_{seed}": (task, seed) for task in numbers for seed in seeds}
    for name, (task, seed) in names.items():
        words = "--suite", "metaworld", "--seed", seed, "--task", task
        learn(name, start_of(name, *words), *words, "--eval_contexts", 100)
    table([*names])
    curves = []
    for number, task in enumerate(numbers):
        for seed in seeds:
            label = metaworld.ML45.INSTRUCTIONS[task] if seed == seeds[0] else ""
            metrics = read_csv(KEPT / f"metrics_task{task}_{seed}.csv")
            curves.append(curve_of(label, f"o-C{number}", metrics))
    plot_curves(KEPT / "tasks.png", {SUCCESS: curves})


def heads(numbers: list[int]) -> None:
    """What the action head alone learns of tasks, seed 0, from the starts of `tasks`."""
    names = {f"head{task}_0": task for task in numbers}
    for name, task in names.items():
        words = "--suite", "metaworld", "--seed", 0, "--task", task
        learn(name, begin_of("own", task), *words, "--eval_contexts", 100, *HEAD.split())
    table([*names])


def read_out(inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How much of each of D numbers of N scenes a linear function of P others knows: (N, P), (N, D) -> (D,),
    the share of the variance, by ridge regression in five folds with the best of its penalties."""
    inputs = (inputs - inputs.mean(0)) / (inputs.std(0) + 1e-6)
    folds = np.array_split(np.random.default_rng(0).permutation(len(inputs)), 5)
    best = np.full(wanted.shape[1], -np.inf)
    for penalty in (1, 10, 100, 1e3, 1e4):
        found = np.zeros_like(wanted)
        for fold in folds:
            others = np.setdiff1d(np.arange(len(inputs)), fold)
            known, mean = inputs[others], wanted[others].mean(0)
            products = known @ known.T + penalty * np.eye(len(others))
            found[fold] = mean + inputs[fold] @ known.T @ np.linalg.solve(products, wanted[others] - mean)
        best = np.maximum(best, 1 - ((found - wanted) ** 2).sum(0) / ((wanted - wanted.mean(0)) ** 2).sum(0))
    return best


def places(numbers: list[int], scenes: int = 400) -> None:
    """What a linear function of an episode's first pictures knows of where things are, and one of the
    features that an action head gets, in the task's start and in the policy after stage 1 on other tasks:
    the least and the mean of the coordinates that differ between scenes by more than 5 mm (std). Writes
    docs/results/metaworld/places.csv."""
    simulator = Development(64, True)
    rows = []
    for task in numbers:
        text = Development.INSTRUCTIONS[task]
        policies = dict(features=begin_of("own", task), stage_1=stage_1())
        policies = {name: Tiny.from_pretrained(path) for name, path in policies.items()}
        wanted, known = [], dict(pictures=[], features=[], stage_1=[])
        for seed in range(scenes):
            answer = simulator.reset(ript.Context(task, text, 2_000 + seed))
            wanted.append(simulator.env._last_rand_vec)
            for name, policy in policies.items():
                seen = policy.preprocess(answer.observation)
                with torch.no_grad():
                    known[name].append(policy.features([seen], [text]).numpy().ravel())
            known["pictures"].append(np.concatenate([np.ravel(picture) for picture in seen["pictures"]]))
        wanted = np.array(wanted)
        wanted = wanted[:, wanted.std(0) > 0.005]
        row = dict(task=task, name=text, coordinates=wanted.shape[1])
        for name, inputs in known.items():
            shares = read_out(np.array(inputs, float), wanted)
            row |= {f"{name}_least": f"{shares.min():.2f}", f"{name}_mean": f"{shares.mean():.2f}"}
        rows.append(row)
        print_row(*row.values())
        write_csv(KEPT / "places.csv", rows)


def horizon(numbers: list[int]) -> None:
    """The policies of tasks, seed 0, before and after stage 3: what a longer horizon would change. Writes
    docs/results/metaworld/horizon.csv."""
    rows = []
    for task in numbers:
        name = f"task{task}_0"
        policies = dict(SFT=RUNS / f"ml45/{name}_sft", RIPT=RUNS / f"ml45/{name}/last")
        for (stage, policy), usual in zip(policies.items(), kept_outcomes(KEPT, name)):
            out = RUNS / f"ml45/{name}_longer_{stage}"
            longer = evaluated(out, "--suite", f"{HERE}:Longer", "--task", task, "--eval_contexts", 100,
                               "--checkpoint", policy).values()
            shares = [report.interval(sum(won), len(won)) for won in (usual, longer)]
            steps = metaworld.ML45.HORIZON[task]
            rows.append(dict(task=task, stage=stage, horizon=steps, success=shares[0], success_496=shares[1]))
            print_row(*rows[-1].values())
    write_csv(KEPT / "horizon.csv", rows)


def few_shot(seeds=(0, 1, 2)) -> None:
    """The paper's few-shot setting in small: one policy for QueST's five tasks."""
    names = [f"few_shot_{seed}" for seed in seeds]
    for name, seed in zip(names, seeds):
        words = "--suite", "metaworld_few_shot", "--seed", seed
        start = start_of(name, *words, "--demos_per_task", 5, "--sft_steps", 2000)
        learn(name, start, *words, *FIVE_TASKS.split())
    table(names)
    print_header("seed", *metaworld.FewShot.INSTRUCTIONS)
    for name, seed in zip(names, seeds):
        rows = read_csv(KEPT / f"evaluation_{name}.csv")
        cells = []
        for task in range(len(metaworld.FewShot.NAMES)):
            of_task = [row for row in rows if int(row["task"]) == task]
            won = (sum(int(row[stage]) for row in of_task) for stage in ("SFT", "RIPT"))
            cells.append(" -> ".join(report.interval(number, len(of_task)) for number in won))
        print_row(seed, *cells)


COMMANDS = dict(experts=experts, speed=speed, settings=settings, scenes=scenes, starts=starts, tasks=tasks,
                heads=heads, places=places, horizon=horizon, few_shot=few_shot)
OF_TASKS = "starts", "tasks", "heads", "places", "horizon"


def main(argv=None):
    """One of the commands."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        add_noise_success()
        return ript.main(argv[1:])
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.error = partial(ript.require, False)
    parser.add_argument("name", choices=COMMANDS)
    parser.add_argument("tasks", nargs="*", type=int)
    given = parser.parse_args(argv)
    ript.require(bool(given.tasks) == (given.name in OF_TASKS),
                 f"{', '.join(OF_TASKS)} need numbers of tasks, the others have none")
    COMMANDS[given.name](*[given.tasks] if given.tasks else [])


if __name__ == "__main__":
    ript.run_command(main)
