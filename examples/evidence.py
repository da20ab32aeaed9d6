"""The experiments of docs/RESULTS.md: every seed of one, as a table, a figure and CSV files.

    python examples/evidence.py                   lists the experiments
    python examples/evidence.py k4 k16            stages 2 and 3 of each, where runs/evidence lacks them
    python examples/evidence.py bowl --seeds 0    with these seeds in place of 0, 1 and 2
    python examples/evidence.py senses NAME       tabletop's policies misled and blind, or one_scene's misled
    python examples/evidence.py gif               the tabletop before and after, assets/tabletop.gif

Of each run, assets/evidence keeps metrics.csv and evaluation.csv, every context's outcome.
"""
import argparse
import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import ript
from examples import headless, laptop, report

ASSETS = ROOT / "assets/evidence"
LIBERO_SUITES = ROOT / "examples/libero_suites.py"
SEEDS = (0, 1, 2)
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
    transfer=(f"--suite {__file__}:HandOver", "", ""),
    transfer_head=(f"--suite {__file__}:HandOver --model {__file__}:HeadOnly", "", ""),
    transfer_move=(f"--suite {__file__}:Move --model {__file__}:HeadOnly", "", ""),
    # Several optimiser steps on the same rollouts, with the clip and without.
    passes4=("", "", "--passes 4"),
    passes4_noclip=("", "", "--passes 4 --clip 1000"),
    # 4 demonstrations per instruction, 4 iterations
    libero=("--suite libero_object --task 0", "", ""),
    libero_none=("--suite libero_object --task 0", "", "--max_rejected 0"),  # nothing is replaced
    # With four demonstrations, no rollout of 16 in training contexts succeeds in task 1 and on the bowl.
    object_1=("--suite libero_object --task 1", "--demos_per_task 10", ""),
    object_2=("--suite libero_object --task 2", "", ""),
    object_3=("--suite libero_object --task 3", "", ""),
    one_scene=(f"--suite {LIBERO_SUITES}:OneScene", "", ""),
    bowl=(f"--suite {LIBERO_SUITES}:Goal --task 6", "--demos_per_task 10", ""),
)
TABLETOP = ript.load_suite("tabletop")


def read(path):
    """The rows of a CSV file, without their empty cells."""
    with open(path, newline="") as file:
        return [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]


def run(name, seed):
    """Stages 2 and 3 and the report of one run; its two CSV files go to assets/evidence."""
    out = ROOT / f"runs/evidence/{name}_{seed}"
    shared, stage_2, stage_3 = (settings.split() for settings in EXPERIMENTS[name])
    shared += ["--seed", str(seed)]
    start = out / "sft"
    # This is the last file that stage 2 writes.
    if not (start / "model.safetensors").exists():
        call("examples/imitation.py", *shared, *stage_2, "--out", start)
    if not (out / "evaluation.csv").exists():
        call("ript.py", *shared, *stage_3, "--checkpoint", start, "--out", out)
        call("examples/report.py", out)
    for file in ("metrics", "evaluation"):
        shutil.copyfile(out / f"{file}.csv", ASSETS / f"{name}_{seed}_{file}.csv")


def call(script, *arguments, stdout=None):
    """Run a script of this repository, and stop if it fails."""
    subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], check=True, cwd=ROOT, stdout=stdout)


def row(name, seed):
    """A run as a line of the table."""
    contexts = read(ASSETS / f"{name}_{seed}_evaluation.csv")
    metrics = read(ASSETS / f"{name}_{seed}_metrics.csv")
    before = [bool(int(context["SFT"])) for context in contexts]
    after = [bool(int(context["RIPT"])) for context in contexts]
    gained, lost, p = report.mcnemar(before, after)
    sums = dict.fromkeys(("rollouts", "kept", "solved", "failed", "seconds_rollouts", "seconds_update"), 0.0)
    for m in metrics:
        for key in sums:
            sums[key] += float(m.get(key, 0))
    uniform = 1 - sums["kept"] / (sums["kept"] + sums["solved"] + sums["failed"])
    shares = " | ".join(report.interval(sum(won), len(won)) for won in (before, after))
    return (f"| {name} | {seed} | {shares} | {gained}, {lost}, {p:.1g} | {sums['rollouts']:.0f} | "
            f"{uniform:.0%} | {sums['seconds_rollouts'] + sums['seconds_update']:.0f} |")


def figure(names, seeds):
    """Success on the held-out contexts against rollouts, a line per experiment and seed."""
    from matplotlib.figure import Figure
    drawing = Figure(figsize=(7, 4))
    axes = drawing.subplots()
    for number, name in enumerate(names):
        for seed in seeds:
            colour, label = seed, f"seed {seed}"
            if len(names) > 1:
                colour, label = number, "" if seed != seeds[0] else name
            done = 0
            points = []
            for m in read(ASSETS / f"{name}_{seed}_metrics.csv"):
                done += int(m.get("rollouts", 0))
                points += [(done, 100 * float(m["eval_success"]))] if "eval_success" in m else []
            axes.plot(*zip(*points), "o-", color=f"C{colour}", label=label)
    axes.set(xlabel="rollouts", ylabel="success on held-out contexts, %", ylim=(0, 103))
    axes.legend()
    path = ASSETS / f"{'_'.join(names)}.png"
    drawing.savefig(path, bbox_inches="tight", dpi=120)
    return path


class HeadOnly(laptop.Tiny):
    """The laptop's policy, whose stage 2 trains the action head alone: it sees as it has learned to."""
    imitated = ("action_head",)


class HandOver(ript.load_suite("tabletop_pretrain")):
    """A goal that pretraining did not have (the paper's section 5.4): lift the cube, take it 6 cm forward."""
    INSTRUCTIONS, HORIZON = ("hand me the red cube", "hand me the green cube"), 36
    # The tabletop's checkpoint is for another goal, so --checkpoint must name one.
    TINY = TABLETOP.PRESET["tiny"] | dict(checkpoint="", iterations=15, eval_every=5)
    PRESET = {"tiny": TINY, f"{__file__}:HeadOnly": TINY | dict(max_rejected=24, lr=6e-4)}
    IMITATION = {"tiny": TABLETOP.IMITATION["tiny"] | dict(sft_steps=60, sft_lr=1.5e-4),
                 f"{__file__}:HeadOnly": TABLETOP.IMITATION["tiny"] | dict(sft_steps=45, sft_lr=2e-4)}

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
    IMITATION = {model: preset | dict(sft_steps=37) for model, preset in HandOver.IMITATION.items()}


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


# Of an experiment: suites in which its policies are evaluated again, and what is different there.
SENSES = dict(
    tabletop={"as it is": "tabletop", "other instruction": f"{__file__}:Misled",
              "grey pictures": f"{__file__}:Blind"},
    one_scene={"other instruction": f"{LIBERO_SUITES}:Misled --eval_contexts 20"},
)


def senses(name, seeds):
    """Success of an experiment's policies in each of its SENSES."""
    print(f"| seed | | {' | '.join(SENSES[name])} |\n|---|---|{'---|' * len(SENSES[name])}")
    rows = []
    for seed in seeds:
        for stage, policy in dict(SFT="sft", RIPT="last").items():
            cells = {}
            for title, suite in SENSES[name].items():
                out = ROOT / "runs/evidence/senses"
                run = ROOT / f"runs/evidence/{name}_{seed}"
                # What they print would interrupt the table.
                call("ript.py", "--eval", "--suite", *suite.split(), "--checkpoint", run / policy,
                     "--out", out, stdout=subprocess.DEVNULL)
                call("examples/report.py", out, "--no_video", stdout=subprocess.DEVNULL)
                won = [int(row["success"]) for row in read(out / "evaluation.csv")]
                cells[title] = report.interval(sum(won), len(won))
            print(f"| {seed} | {stage} | " + " | ".join(cells.values()) + " |", flush=True)
            rows.append(dict(seed=seed, stage=stage, **cells))
    report.write_csv(ASSETS / f"senses_{name}.csv", rows)


def gif():
    """assets/tabletop.gif: of each task, the first held-out context in which SFT's policy of seed 0 fails."""
    run = ROOT / "runs/evidence/tabletop_0"
    cfg = ript.Config(**json.loads((run / "config.json").read_text()))
    before = json.loads((run / "evaluation_SFT.json").read_text())
    headless.begin()
    simulator = TABLETOP(cfg.image_size, cfg.collision)
    pictures = []
    for task in (0, 1):
        context = next(context for context in ript.evaluation_contexts(cfg)
                       if context.task == task and not before[f"tabletop {task} {context.seed}"])
        clips = []
        for title, folder in {"SFT, one demonstration": "sft", "after RIPT": "last"}.items():
            policy = laptop.Tiny.load(replace(cfg, checkpoint=str(run / folder)))
            clips.append([titled(frame, title) for frame in report.film(policy, simulator, context)])
        number = max(len(clip) for clip in clips)
        for t in range(0, number, 2):
            pictures.append(np.concatenate([clip[min(t, len(clip) - 1)] for clip in clips], 1))
        # The end stays a while.
        pictures += 6 * pictures[-1:]
    simulator.env.close()
    images = [Image.fromarray(picture).quantize(96) for picture in pictures]
    images[0].save(ROOT / "assets/tabletop.gif", save_all=True, append_images=images[1:], duration=110,
                   loop=0)


def titled(frame, title):
    """A picture of 208 x 208 pixels with a title."""
    image = Image.fromarray(frame).resize((208, 208))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 208, 14), fill=(0, 0, 0))
    draw.text((4, 2), title, fill=(255, 255, 255))
    return np.asarray(image)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    given = parser.parse_args()
    names = given.names
    if names[:1] == ["senses"]:
        if len(names) != 2 or names[1] not in SENSES:
            sys.exit("senses of one of these: " + ", ".join(SENSES))
        sys.exit(senses(names[1], given.seeds))
    if names == ["gif"]:
        sys.exit(gif())
    if not names or set(names) - set(EXPERIMENTS):
        sys.exit("the experiments: " + ", ".join(EXPERIMENTS))
    for name in names:
        for seed in given.seeds:
            run(name, seed)
    print("| | seed | SFT | RIPT | gained, lost, p | rollouts | uniform groups | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        print("\n".join(row(name, seed) for seed in given.seeds))
    print(figure(names, given.seeds))
