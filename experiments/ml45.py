"""MetaWorld ML45: what its scripted experts and its simulator can do.

    python experiments/ml45.py experts        all 50 tasks, ten seeds each: docs/results/metaworld/experts.csv
    python experiments/ml45.py speed          control steps, resets and pictures per second, beside LIBERO's
    python experiments/ml45.py starts 2 14    these tasks after stage 2, in contexts of development
    python experiments/ml45.py train ARGUMENTS    ript.py with these, and with noise_success in its rows

Settings are chosen in Development's contexts, so that the held-out ones stay unseen.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import time
from dataclasses import replace
from functools import partial

import numpy as np

import ript
from experiments.common import (RESULTS, RUNS, add_noise_success, print_header, print_row, read_csv, run_once,
                                write_csv)
from scripts import report
from simulators import metaworld


class Development(metaworld.ML45):
    """The tasks to train on, in contexts that are neither held out nor any run's: settings are chosen here."""
    def reset(self, context):
        """As ever, in another scene."""
        return super().reset(replace(context, seed=context.seed + 500_000))


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
    write_csv(RESULTS / "metaworld/experts.csv", rows)


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


def starts(tasks: list[int]) -> None:
    """Success after stage 2, seed 0, in 40 contexts of Development: docs/results/metaworld/starts.csv."""
    path = RESULTS / "metaworld/starts.csv"
    rows = {int(row["task"]): row for row in read_csv(path)} if path.exists() else {}
    for task in tasks:
        words = "--seed", 0, "--task", task
        start = run_once(RUNS / f"ml45/{task}_0_sft", "scripts/sft.py", "--suite", "metaworld", *words)
        out = run_once(RUNS / f"ml45/{task}_0_eval", "ript.py", "--eval", "--suite", f"{__file__}:Development",
                       *words, "--checkpoint", start, "--eval_contexts", 40)
        outcomes, _ = report.read_outcomes(out / "evaluation_success.json", ript.load_config(out))
        share = report.interval(sum(outcomes.values()), len(outcomes))
        rows[task] = dict(task=task, name=tuple(metaworld.EXPERT_STEPS)[task], start=share)
        print_row(*rows[task].values())
        write_csv(path, [rows[task] for task in sorted(rows)])


COMMANDS = dict(experts=experts, speed=speed, starts=starts)


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
    COMMANDS[given.name](*[given.tasks] if given.name == "starts" else [])


if __name__ == "__main__":
    ript.run_command(main)
