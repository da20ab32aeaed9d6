"""What fits a card and what it costs: the table of docs/DETAILS.md, from what gpu.py has measured.

    python experiments/cards.py                    the table, from docs/results/gpu/measured.csv
    python experiments/cards.py --read FILE        first take the numbers from what gpu.py has printed

A run is the 7B on LIBERO-Long with ript.py's settings. A number that was measured is marked m; one that is
computed from measurements, and from the assumptions below, is marked e for estimated. The time of a forward
is a constant and a part for each chunk, fitted to what was measured; on another card the second part follows
the ratio of the cards' rates. docs/results/gpu/cards.csv keeps the table.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import re
from functools import partial
from typing import NamedTuple

import numpy as np

import ript
from experiments.common import RESULTS, print_header, print_row, read_csv, write_csv
from policies.openvla_oft import OpenVLAOFT, chunks_in

MEASURED = RESULTS / "gpu/measured.csv"
# What gpu.py prints: the name of a measurement, and where in a line its batch and its value are.
LINES = dict(
    peak_gib=r"limit None, micro_batch (\d+): [\d.]+ s .* reserved ([\d.]+) GiB",
    act=r"act_batch (\d+): ([\d.]+) chunks/s",
    gradient=r"micro_batch (\d+): ([\d.]+) chunks/s",
    peak_of_24_gib=r"limit 24, micro_batch (\d+): [\d.]+ s .* reserved ([\d.]+) GiB")

class Card(NamedTuple):
    """A GPU, and its dense bfloat16 rate in teraflops as its maker gives it."""
    name: str
    gib: int
    teraflops: float

CARDS = (Card("24 GB (RTX 4090)", 24, 165), Card("40 GB (A100)", 40, 312), Card("48 GB (L40S)", 48, 362),
         Card("80 GB (H100)", 80, 989))
GPUS = (1, 4, 8)
H100 = 989  # teraflops of the card that was measured

# Assumptions.
QUERIES = 40  # action chunks of a rollout: a success takes about 270 of the 520 control steps, a failure all
EPISODES = 500  # of an evaluation
EVALUATIONS = 4  # before, after 5 and 10 iterations, and at the end
WORKERS = 16  # simulators of each process, as many as ript.py takes by default where there are cores
SIMULATOR_GB = 1.2  # of host memory: what one of LIBERO-Long has of its own, measured with software OpenGL
TRAINER_GB = 8  # of host memory for each process, while it reads the weights and afterwards
PICTURES_MB = 0.3  # of the two pictures of a chunk, 224 x 224 x 3 each

def read_printed(path: Path) -> list[dict]:
    """The measurements in what gpu.py has printed."""
    with ript.reading(path):
        text = path.read_text()
    rows = [dict(measure=name, batch=int(batch), value=float(value), file=path.name)
            for name, pattern in LINES.items()
            for batch, value in re.findall(rf"^ *{pattern}", text, re.MULTILINE)]
    ript.require("H100" in text.split("\n")[0], f"{path} is not of an H100, which the other cards follow")
    missing = LINES.keys() - {row["measure"] for row in rows}
    ript.require(not missing, f"{path} has no line of gpu.py for {', '.join(sorted(missing))}")
    return rows

def seconds_per_chunk(speeds: dict[int, float], batch: int, slower: float) -> float:
    """The time of a chunk in forwards of so many, on a card whose rate is so many times lower.

    speeds: chunks per second by batch size, as they were measured."""
    sizes = np.array(list(speeds))
    for_one_more, constant = np.polyfit(sizes, sizes / np.array(list(speeds.values())), 1)
    return (constant + for_one_more * slower * batch) / batch

def hours_of(card: Card, number: int, groups: int, measured: dict) -> tuple[float, float]:
    """Minutes of an iteration that draws so many groups, and hours of a run of such ones."""
    cfg = ript.Config()
    slower = H100 / card.teraflops
    act_batch = OpenVLAOFT.PRESET["libero_10"]["act_batch"]
    micro_batch = chunks_in(card.gib)
    chunks = cfg.rollouts * QUERIES  # of a group
    acting = seconds_per_chunk(measured["act"], act_batch, slower)
    # The kept chunks are scored once, a forward as acting is, and then have their gradient.
    update = seconds_per_chunk(measured["act"], micro_batch, slower)
    update += seconds_per_chunk(measured["gradient"], micro_batch, slower)
    iteration = chunks * (groups * acting + cfg.groups * update) / number
    evaluation = EPISODES * QUERIES * acting / number
    return iteration / 60, (cfg.iterations * iteration + EVALUATIONS * evaluation) / 3600

def row_of(card: Card, number: int, measured: dict) -> dict:
    """The table's row of so many cards."""
    cfg = ript.Config()
    micro_batch = chunks_in(card.gib)
    peak = measured["peak_of_24_gib" if card.gib == 24 else "peak_gib"][micro_batch]
    times = [hours_of(card, number, groups, measured)
             for groups in (cfg.groups, cfg.groups + cfg.max_rejected)]
    minutes, hours = zip(*times)
    pictures = cfg.groups * cfg.rollouts * QUERIES * PICTURES_MB / 1000  # GB
    host = number * (TRAINER_GB + WORKERS * SIMULATOR_GB) + pictures
    return dict(card=card.name, gpus=number, micro_batch=f"{micro_batch} m", gpu_gib=f"{peak:.1f} m",
                workers=f"{number} x {WORKERS} e", host_gb=f"{host:.0f} e",
                minutes=f"{short(minutes[0])} to {short(minutes[1])} e",
                hours=f"{short(hours[0])} to {short(hours[1])} e")

def short(number: float) -> str:
    """A number with as many digits as an estimate has."""
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"

def main(argv: list[str] | None = None) -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.error = partial(ript.require, False)
    parser.add_argument("--read", type=Path)
    given = parser.parse_args(argv)
    rows = read_printed(given.read) if given.read else read_csv(MEASURED)
    measured = {}
    for row in rows:
        measured.setdefault(row["measure"], {})[int(row["batch"])] = float(row["value"])
    print_header("card", "GPUs", "micro-batch", "GPU, GiB", "workers", "host, GB", "minutes an iteration",
                 "hours a run")
    with ript.trying(f"the measurements in {given.read or MEASURED}, of which some are missing", "use"):
        table = [row_of(card, number, measured) for card in CARDS for number in GPUS]
    for row in table:
        print_row(*row.values())
    if given.read:
        write_csv(MEASURED, rows)
    write_csv(RESULTS / "gpu/cards.csv", table)

if __name__ == "__main__":
    ript.run_command(main)
