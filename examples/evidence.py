"""The README's experiments: every seed of one, as a table, a figure and CSV files.

    python examples/evidence.py              lists the experiments
    python examples/evidence.py k4 k16       runs ript.py for each seed, as far as runs/evidence lacks it
    python examples/evidence.py senses       the tabletop's policies, misled and blind

Of each run, assets/evidence keeps metrics.csv and evaluation.csv, every context's outcome.
"""
import csv
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binomtest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import ript

ASSETS, SEEDS = ROOT / "assets/evidence", (0, 1, 2)
EXPERIMENTS = dict(  # settings over the suite's preset, the laptop's where none is named
    tabletop="",  # 16 groups of 8 kept, 6 iterations, 1 demonstration per instruction
    long="--iterations 15 --eval_every 3",
    # 24 groups, none replaced: as many rollouts as the preset takes with its replacements
    no_rejection="--groups 24 --max_rejected 0 --minibatch 192",
    k4="--rollouts 4 --groups 32 --max_rejected 24",
    k16="--rollouts 16 --groups 8 --max_rejected 6",
    demos3="--demos_per_task 3 --sft_steps 15",
    demos10="--demos_per_task 10 --sft_steps 50",
    demos30="--demos_per_task 30 --sft_steps 150",
    transfer=f"--suite {__file__}:HandOver",
    transfer_head=f"--suite {__file__}:HandOver --model {__file__}:HeadOnly",
    transfer_move=f"--suite {__file__}:Move --model {__file__}:HeadOnly",
    libero="--suite libero_object --task 0",  # 4 demonstrations, 4 iterations
)
TABLETOP = ript.load_suite("tabletop")


def read(path):
    """The rows of a CSV file, without their empty cells."""
    with open(path, newline="") as file:
        return [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]


def run(name, seed):
    """One run of ript.py; its two CSV files go to assets/evidence."""
    out = ROOT / f"runs/evidence/{name}_{seed}"
    if not (out / "evaluation.csv").exists():
        arguments = EXPERIMENTS[name].split() + ["--seed", str(seed), "--out", str(out)]
        subprocess.run([sys.executable, ROOT / "ript.py", *arguments], check=True, cwd=ROOT)
    for file in ("metrics", "evaluation"):
        shutil.copyfile(out / f"{file}.csv", ASSETS / f"{name}_{seed}_{file}.csv")


def row(name, seed):
    """A run as a line of the README's table."""
    contexts, metrics = (read(ASSETS / f"{name}_{seed}_{file}.csv") for file in ("evaluation", "metrics"))
    before, after = ([int(c[stage]) for c in contexts] for stage in ("SFT", "RIPT"))
    gained, lost = (sum(b == x and a == 1 - x for b, a in zip(before, after)) for x in (0, 1))
    p = binomtest(gained, max(gained + lost, 1)).pvalue
    rollouts = [m for m in metrics if "rollouts" in m]
    total = lambda key: sum(float(m[key]) for m in rollouts)
    uniform = 1 - total("kept") / (total("kept") + total("solved") + total("failed"))
    shares = " | ".join(ript.interval(sum(won), len(won)) for won in (before, after))
    return (f"| {name} | {seed} | {shares} | {gained}, {lost}, {p:.1g} | {total('rollouts'):.0f} | "
            f"{uniform:.0%} | {total('seconds_rollouts') + total('seconds_update'):.0f} |")


def figure(names):
    """Success on the held-out contexts against rollouts, a line per seed."""
    drawing = Figure(figsize=(7, 4))
    axes = drawing.subplots()
    for number, name in enumerate(names):
        for seed in SEEDS:
            colour, label = (number, "" if seed else name) if len(names) > 1 else (seed, f"seed {seed}")
            done, points = 0, []
            for m in read(ASSETS / f"{name}_{seed}_metrics.csv"):
                done += int(m.get("rollouts", 0))
                points += [(done, 100 * float(m["eval_success"]))] if "eval_success" in m else []
            axes.plot(*zip(*points), "o-", color=f"C{colour}", label=label)
    axes.set(xlabel="rollouts", ylabel="success on held-out contexts, %", ylim=(0, 103))
    axes.legend()
    path = ASSETS / f"{'_'.join(names)}.png"
    drawing.savefig(path, bbox_inches="tight", dpi=120)
    return path


class HeadOnly(ript.OpenVLAOFT):
    """The laptop's policy, whose stage 2 trains the action head alone: it sees as it has learned to."""
    @classmethod
    def load(cls, cfg, saved=""):
        """As the laptop's policy is loaded."""
        return super().load(replace(cfg, model="tiny"), saved)

    def trainable(self, stage):
        """In stage 2 what stage 3 trains."""
        return super().trainable("ript" if stage == "sft" else stage)


class HandOver(ript.load_suite("tabletop_pretrain")):
    """A goal that pretraining did not have (the paper's section 5.4): lift the cube, take it 6 cm forward."""
    INSTRUCTIONS, HORIZON = ("hand me the red cube", "hand me the green cube"), 36
    TINY = TABLETOP.PRESET["tiny"] | dict(iterations=15, eval_every=5)
    PRESET = {"tiny": TINY | dict(sft_steps=60, sft_lr=1.5e-4),
              f"{__file__}:HeadOnly": TINY | dict(sft_steps=45, sft_lr=2e-4, max_rejected=24, lr=6e-4)}

    def reset(self, context):
        """As ever, and where the cube is."""
        answer = super().reset(context)
        self.start = self.cube()[0]
        return answer

    def success(self):
        """The reward: the cube is lifted, and 6 cm further from the robot than it was."""
        return super().success() and bool(self.cube()[0] > self.start + 0.06)

    def expert(self, closing):
        """The next action (7,): as before, but forward while up."""
        if closing >= 6:
            return self.toward(self.env._eef_xpos + [0.1, 0, 0], 1, 1)
        return super().expert(closing)


class Move(HandOver):
    """The same goal in other words, by which the pretrained policy still finds and lifts the cube."""
    INSTRUCTIONS = ("move the red cube", "move the green cube")
    PRESET = {model: preset | dict(sft_steps=37) for model, preset in HandOver.PRESET.items()}


class ToldHandOver(ript.load_suite("tabletop_pretrain")):
    """What pretraining was about, lifting, in HandOver's words."""
    INSTRUCTIONS = HandOver.INSTRUCTIONS


class ToldMove(ToldHandOver):
    """The same in Move's."""
    INSTRUCTIONS = Move.INSTRUCTIONS


class Misled(TABLETOP):
    """The laptop's suite, in which the policy is told to lift the other cube."""
    INSTRUCTIONS = TABLETOP.INSTRUCTIONS[::-1]


class Blind(TABLETOP):
    """The laptop's suite, in which the cameras see grey."""
    def draw(self, camera, size, collision):
        return np.full((size, size, 3), 128, np.uint8)


def senses():
    """Success of the tabletop's policies as they are, with the other instruction, and with grey pictures."""
    print("| seed | | as it is | other instruction | grey pictures |\n|---|---|---|---|---|")
    rows = []
    for seed in SEEDS:
        for stage, policy in dict(SFT="sft", RIPT="last").items():
            cells = []
            for suite in ("tabletop", f"{__file__}:Misled", f"{__file__}:Blind"):
                out = ROOT / "runs/evidence/senses"
                run = ROOT / f"runs/evidence/tabletop_{seed}"
                subprocess.run([sys.executable, ROOT / "ript.py", "--eval", "--suite", suite, "--checkpoint",
                                run / policy, "--out", out], check=True, stdout=subprocess.DEVNULL)
                won = [int(row["success"]) for row in read(out / "evaluation.csv")]
                cells.append(ript.interval(sum(won), len(won)))
            print(f"| {seed} | {stage} | " + " | ".join(cells) + " |", flush=True)
            rows.append(dict(zip(("seed", "stage", "as it is", "other instruction", "grey pictures"),
                                 (seed, stage, *cells))))
    ript.write_csv(ASSETS / "senses.csv", rows)


if __name__ == "__main__":
    names = sys.argv[1:]
    if names == ["senses"]:
        sys.exit(senses())
    if not names or set(names) - set(EXPERIMENTS):
        sys.exit("the experiments: " + ", ".join(EXPERIMENTS))
    for name in names:
        for seed in SEEDS:
            run(name, seed)
    print("| | seed | SFT | RIPT | gained, lost, p | rollouts | uniform groups | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        print("\n".join(row(name, seed) for seed in SEEDS))
    print(figure(names))
