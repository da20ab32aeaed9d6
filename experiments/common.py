"""What the experiments share: running a script once, CSV files, and curves against rollouts."""
import asyncio
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ript
from scripts import report

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs"
RESULTS = ROOT / "docs/results"  # what a run leaves for the repository: a folder for each experiment
PRETRAINED = ROOT / "policies/tabletop"  # the laptop's policy after stage 1
write_csv = report.write_csv
SUCCESS = "success on held-out contexts, %"

# LIBERO-Object's presets are for its ten tasks. These are for one of them: stage 2 and stage 3.
ONE_START = "--sft_steps 600"
ONE_TASK = "--groups 16 --max_rejected 16 --minibatch 128 --adam_beta1 0 --iterations 4 --eval_every 2"

# Scripts whose runs cannot be resumed.
BEGIN_AGAIN = "scripts/sft.py", "experiments/critic.py"

def run_once(out: Path, script: str, *arguments, quiet: bool = False) -> Path:
    """Run a script of this repository with `--out out`, unless it has finished there before: -> out.

    The file out/done is the mark of that. It has the words of the command, the seconds of the last process,
    and its peak memory in GB. Raises UserError where out was made with other words."""
    words = [str(word).replace(f"{ROOT}/", "") for word in (script, *arguments)]
    if (out / "done").exists():
        made = json.loads((out / "done").read_text())
        same = isinstance(made, dict) and made["words"] == words  # earlier versions have left a number
        ript.require(same, f"{out} was made with other settings or by an earlier version: delete it to make "
                     "it again, or move it away")
        return out
    place = "--out"
    ript.require(not report.is_running(out), f"another run is using {out}: wait for its end")
    if script in BEGIN_AGAIN:
        shutil.rmtree(out, ignore_errors=True)
    elif (out / "config.json").exists() or (out / "run.pt").exists():
        place = "--resume"  # a run that was interrupted goes on after its last complete iteration
    command = [str(word) for word in (sys.executable, ROOT / script, *arguments, place, out)]
    began = time.time()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL if quiet else None)
    _, status, usage = os.wait4(process.pid, 0)
    ript.require(status == 0, f"this failed: {' '.join(command)}")
    memory_gb = usage.ru_maxrss / 2 ** 20  # Linux counts in KiB
    done = dict(words=words, seconds=round(time.time() - began), memory_gb=round(memory_gb, 3))
    (out / "done").write_text(json.dumps(done))
    return out

def evaluated(out: Path, *arguments, quiet: bool = False) -> dict[str, int]:
    """The outcomes, 1 or 0 by context, of an evaluation with these arguments, run where it is missing."""
    run_once(out, "ript.py", "--eval", *arguments, quiet=quiet)
    outcomes, _ = report.read_outcomes(out / "evaluation_success.json", ript.load_config(out))
    return outcomes

class OtherScenes:
    """Before a suite among the bases of a class: its scenes are neither held out nor those of any run, so
    that settings can be chosen in them."""
    @classmethod
    def eval_init_states(cls, task, number):
        """None are stored: the seeds are enough."""
        return [None] * number

    def reset(self, context):
        """As ever, in another scene."""
        return super().reset(replace(context, seed=context.seed + 500_000))

def memory_gb(out: Path) -> float:
    """The peak memory of the process that run_once ran for this directory."""
    return json.loads((out / "done").read_text())["memory_gb"]

def keep_results(out: Path, folder: Path, ending: str) -> None:
    """Write metrics.csv and evaluation.csv of a run, and copy them, as metrics_ENDING.csv, to folder."""
    report.main([str(out), "--no_video"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics", "evaluation"):
        shutil.copyfile(out / f"{name}.csv", folder / f"{name}_{ending}.csv")

def kept_outcomes(folder: Path, ending: str) -> tuple[list[bool], list[bool]]:
    """Of a run that keep_results has kept: every held-out context's outcome before (SFT) and after (RIPT)."""
    rows = read_csv(folder / f"evaluation_{ending}.csv")
    before, after = ([bool(int(row[stage])) for row in rows] for stage in ("SFT", "RIPT"))
    return before, after

def add_noise_success() -> None:
    """From now on ript.main's rows in this process have noise_success, too, where they have eval_success: the
    success of the policy in the held-out contexts when it explores there."""
    evaluate, save_run, found = ript.evaluate, ript.save_run, {}

    def evaluate_both(policy, simulators, contexts, cfg, name):
        success = evaluate(policy, simulators, contexts, cfg, name)
        if name != "SFT":  # the first rollouts have that
            # No rollout of training has such seeds.
            episodes = [ript.Episode(context, number, (cfg.seed, 10 ** 6, number, 0))
                        for number, context in enumerate(contexts)]
            rollouts = simulators.run_episodes(ript.rollout, episodes, ript.Actor(policy, cfg.act_batch))
            asyncio.run(simulators.run([rollouts], f"evaluation {name} with noise"))
            found["noise_success"] = sum(episode.success for episode in episodes) / len(episodes)
        return success

    def save_both(out, policy, optimizer, state):
        state.history[-1] |= found
        found.clear()
        save_run(out, policy, optimizer, state)

    ript.evaluate, ript.save_run = evaluate_both, save_both

def collect_once(cfg: ript.Config) -> tuple:
    """The rollouts of a run's first iteration: -> the policy, its kept episodes, and statistics."""
    with ript.open_simulators(cfg) as simulators:
        policy = ript.load_policy(cfg.model).load(cfg)
        context_of = partial(ript.training_context, cfg=cfg)
        return policy, *ript.collect(policy, simulators, context_of, ript.TrainState(), cfg)

def ask(simulators: list[ript.Simulator], method: str, arguments: list[tuple]) -> list:
    """The answers of simulators to a method of the suite, which all of them work on at once."""
    async def answers():
        calls = [simulator.call(method, *words) for simulator, words in zip(simulators, arguments)]
        return await asyncio.gather(*calls)
    return asyncio.run(answers())

def read_csv(path: Path) -> list[dict]:
    """The rows of a CSV file, without their empty cells."""
    with open(path, newline="") as file:
        return [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]

def print_row(*cells) -> None:
    """Print a line of a table in Markdown."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)

def print_header(*names) -> None:
    """Print the first two lines of a table in Markdown."""
    print_row(*names)
    print("|---" * len(names) + "|", flush=True)

class Curve(NamedTuple):
    """One line of a figure."""
    label: str  # in the legend; an empty one is left out
    style: str  # of matplotlib: marker, line and colour, as in "o-C0"
    points: list[tuple[float, float]]  # rollouts so far, and what the panel shows

def curve_of(label: str, style: str, metrics: list[dict], name: str = "eval_success", scale: float = 100):
    """The Curve of a run from its metrics, a row per iteration: one of them against the rollouts so far."""
    rollouts = 0
    points = []
    for row in metrics:
        rollouts += int(row.get("rollouts", 0))
        if name in row:
            points.append((rollouts, scale * float(row[name])))
    return Curve(label, style, points)

def plot_curves(path: Path, panels: dict[str, list[Curve]]) -> None:
    """Draw panels beside each other, each a list of curves against rollouts, by what they show."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7 * len(panels), 4), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for curve in curves:
            axes.plot(*zip(*curve.points), curve.style, label=curve.label or None)
        axes.set(xlabel="rollouts", ylabel=title)
        if title == SUCCESS:
            axes.set_ylim(0, 103)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves, which it would cover
    with ript.writing(path) as temporary:
        figure.savefig(temporary, dpi=110)
