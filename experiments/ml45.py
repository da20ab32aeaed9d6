"""MetaWorld ML45: what its scripted experts and its simulator can do.

    python experiments/ml45.py experts    all 50 tasks, ten seeds each: docs/results/metaworld/experts.csv
    python experiments/ml45.py speed      control steps, resets and pictures per second, beside LIBERO's
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import time

import numpy as np

import ript
from experiments.common import RESULTS, print_header, print_row, write_csv
from simulators import metaworld


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
        simulator.reset(context)
        still = np.zeros(4 if name == "metaworld" else 7)
        steps = per_second(lambda: simulator.step([still] * 8)) * 8  # with the pictures of a query
        looks = per_second(simulator.get_observation)
        bare = 1 / (1 / steps - 1 / looks / 8)
        simulator.reset(context)
        resets = per_second(lambda: simulator.reset(context))
        print_row(f"{name}, {tasks[name]}", *(f"{rate:.0f}" for rate in (bare, resets, looks)))
        simulator.env.close()


COMMANDS = dict(experts=experts, speed=speed)


def main(argv=None):
    """One of the commands."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("name", choices=COMMANDS)
    COMMANDS[parser.parse_args(argv).name]()


if __name__ == "__main__":
    ript.run_command(main)
