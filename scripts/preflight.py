"""Try everything that a long run needs, once and in small, in a few minutes before it starts.

    python scripts/preflight.py --nproc_per_node 4 --model openvla-oft --suite libero_long

All other options are ript.py's. It starts torchrun four times: for a look at every process (its GPU, the GPU
that draws for it, NCCL or on CPUs gloo), for one iteration between two evaluations, for --resume and one more
iteration, and for --eval of what was saved. It says what it found, what memory and disk that took, and how
long the whole run would take; the exit status is 0 where all went well, and else 2 after one sentence.

Every group is kept here, whatever its rewards, so that the update runs: what is learned in it means nothing.
Its directory, beside that of the run, is removed at the end.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import asyncio
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Optional

import psutil
import torch
from torch import distributed

import ript
from ript import require

GIB = 2 ** 30
LIMITS = dict(probe=600, train=7200)  # seconds, after which a part hangs; training may download 15 GB first


# --------------------------------------------------------------------- what runs in the processes of torchrun
class Drawer(ript.Suite):
    """Says in a simulator's process which device draws there."""

    def renderer(self) -> str:
        """The number of EGL's device, and OpenGL's name of it."""
        from simulators import environment
        environment.prepare()
        environment.init_worker()
        import mujoco
        from OpenGL import GL
        context = mujoco.GLContext(16, 16)
        context.make_current()
        name = GL.glGetString(GL.GL_RENDERER).decode()
        number = os.environ.get("MUJOCO_EGL_DEVICE_ID", "0, the default,")
        return f"{os.environ.get('MUJOCO_GL')} device {number} of {environment.egl_devices()}, {name}"


def describe_process(cfg: ript.Config) -> str:
    """This process, its device, and the device that draws for it."""
    device = f"CPU, {ript.cores()} cores for it"
    if cfg.device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(cfg.device)
        index = torch.cuda.current_device() if cfg.device == "cuda" else torch.device(cfg.device).index
        device = (f"GPU {index}, {torch.cuda.get_device_name(cfg.device)}, {free / GIB:.1f} of "
                  f"{total / GIB:.1f} GiB free")
    simulator = ript.Simulator(replace(cfg, suite=f"{__file__}:Drawer"))
    try:
        drawer = asyncio.run(simulator.call("renderer"))
    except ript.SimulatorError as error:
        drawer = f"nothing: {str(error).strip().splitlines()[-1]}"
    finally:
        simulator.close()
    return f"process {ript.RANK} on {socket.gethostname()}: {device}; pictures by {drawer}"


def probe(argv: list[str]):
    """Describe every process, and sum something over all of them as an update does."""
    cfg = ript.parse_config(argv)
    ript.check(cfg)
    ript.init_distributed(cfg.device)
    for text in ript.all_gather(describe_process(cfg)):
        print(text)
    if ript.WORLD == 1:
        return print("one process: there is nothing to exchange")
    parameter = torch.nn.Parameter(torch.zeros(2 ** 24, device=cfg.device))  # 64 MiB
    ript.reduce_gradients([parameter])  # the first one connects
    parameter.grad = torch.full_like(parameter, ript.RANK + 1)
    began = time.perf_counter()
    ript.reduce_gradients([parameter])
    total = parameter.grad[-1].item()  # which waits for the GPU
    seconds = time.perf_counter() - began
    expected = ript.WORLD * (ript.WORLD + 1) / 2
    require(total == expected, f"{distributed.get_backend()} sums to {total}, not to {expected}")
    print(f"{distributed.get_backend()} sums 64 MiB over {ript.WORLD} processes in {seconds:.3f} s")


def keep_all(rewards: torch.Tensor) -> torch.Tensor:
    """In place of ript.has_signal: every group is kept."""
    return torch.ones(len(rewards), dtype=torch.bool)


def train(argv: list[str]):
    """ript.py, which keeps every group, and goes on where all rollouts of an iteration have succeeded."""
    stats_of = ript.rollout_stats

    def unfinished(groups):
        stats = stats_of(groups)
        return stats | dict(rollout_success=min(stats["rollout_success"], 1 - 1e-6))

    ript.has_signal, ript.rollout_stats = keep_all, unfinished
    ript.main(argv)


# ----------------------------------------------------------------------------- what starts them and watches
@dataclass
class Peaks:
    """The largest memory that was seen, in GiB: of any simulator, any process of the policy, all of them, and
    each GPU, where used and total are nvidia-smi's."""
    simulator: float = 0.0
    policy: float = 0.0
    together: float = 0.0
    gpus: dict[str, tuple[float, float]] = field(default_factory=dict)

    def look(self, pid: int):
        """Look at the descendants of a process, and at the GPUs."""
        together = 0.0
        for process in psutil.Process(pid).children(recursive=True):
            try:
                command = " ".join(process.cmdline())
                # What processes share is divided among them.
                size = process.memory_full_info().pss / GIB
            except psutil.Error:  # it has ended
                continue
            together += size
            if "ript.worker_main" in command:
                self.simulator = max(self.simulator, size)
            elif "preflight.py" in command:
                self.policy = max(self.policy, size)
        self.together = max(self.together, together)
        for index, (used, total) in gpu_memory().items():
            self.gpus[index] = max(self.gpus.get(index, (0, 0)), (used, total))


def gpu_memory() -> dict[str, tuple[float, float]]:
    """Of each GPU the used and the whole memory, GiB; nothing without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return {}
    query = ["nvidia-smi", "--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        rows = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
    except subprocess.TimeoutExpired:  # as where a GPU is broken
        return {}
    found = re.findall(r"^(\d+), (\d+), (\d+)$", rows, re.MULTILINE)
    return {index: (int(used) / 1024, int(total) / 1024) for index, used, total in found}


def run_part(title: str, number: int, part: str, argv: list[str], peaks: Peaks, logs: Path) -> str:
    """Run a part of this script in so many processes: -> what it printed. Raises UserError if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}",
               __file__, part, *argv]
    print(f"{title} ...", flush=True)
    began = time.time()
    with open(logs / "out", "w+") as out, open(logs / "err", "w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL)
        try:
            while process.poll() is None and time.time() - began < LIMITS[part]:
                peaks.look(process.pid)
                time.sleep(1)
        finally:
            hangs = process.poll() is None
            if hangs:
                process.terminate()  # torchrun ends its own processes
                process.wait()
    said, errors = (logs / "out").read_text(), (logs / "err").read_text()
    require(not hangs, f"{title}: no end after {LIMITS[part]} s, do processes wait for each other? "
            "NCCL_DEBUG=INFO says more")
    if process.returncode:
        reason = re.search(r"^preflight\.py[^:]*: (.+)$", errors, re.MULTILINE)
        if not reason:
            print("\n".join(errors.splitlines()[-60:]), file=sys.stderr)
        raise ript.UserError(f"{title}: {reason[1] if reason else 'failed, as is said above'}")
    print("".join(f"    {line}\n" for line in said.splitlines()) + f"    took {time.time() - began:.0f} s")
    return said


def read_rows(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_resumed(before: list[dict], after: list[dict]):
    """Raise UserError unless a run of one iteration has gone on with the second."""
    numbers = [row["iteration"] for row in after]
    require(after[:2] == before and numbers == [0, 1, 2], "--resume did not go on after the first iteration: "
            f"metrics.jsonl has iterations {numbers}")


def evaluations_of(cfg: ript.Config) -> int:
    """How many evaluations a run has: before, every eval_every iterations, and after."""
    every = cfg.eval_every or math.inf
    return 1 + sum(i % every == 0 or i == cfg.iterations for i in range(1, cfg.iterations + 1))


def duration(minutes: float) -> str:
    """Minutes as a text."""
    return f"{minutes:.1f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def estimate(cfg: ript.Config, rows: list[dict], contexts: int) -> str:
    """How long the run of cfg takes, by the rows of small iterations that kept every rollout."""
    rows = [row for row in rows if row["iteration"]]
    each = min(row["seconds_rollouts"] / row["rollouts"] for row in rows) / 60  # minutes
    update = cfg.groups * cfg.rollouts * min(row["seconds_update"] / row["rollouts"] for row in rows) / 60
    evaluations = evaluations_of(cfg)
    texts = []
    for groups in (cfg.groups, cfg.groups + cfg.max_rejected):
        rollouts = groups * cfg.rollouts * each
        whole = cfg.iterations * (rollouts + update) + evaluations * contexts * each
        texts.append(f"{duration(whole)} if {groups - cfg.groups} groups are replaced in each iteration, "
                     f"whose rollouts take {duration(rollouts)} then")
    return (f"A run of {cfg.iterations} iterations and {evaluations} evaluations takes "
            f"{', and '.join(texts)}. An update takes {duration(update)}, an evaluation in {contexts} "
            f"contexts {duration(contexts * each)}: all by what this small run took, its start included.")


def say_sizes(run: Path, peaks: Peaks, rows: list[dict]):
    """What the small run took, and what is free."""
    sizes = [path.stat().st_size for path in run.rglob("*") if path.is_file()]
    free = shutil.disk_usage(run).free
    require(free > max(sizes), f"the disk has {free / 1e9:.2f} GB left, too little to save a run again")
    print(f"Disk: a run takes {sum(sizes) / 1e9:.2f} GB, however long it is, and {free / 1e9:.1f} are free.")
    memory = psutil.virtual_memory().total / GIB
    print(f"Host memory: at most {peaks.simulator:.2f} GiB for a simulator, {peaks.policy:.2f} for a process "
          f"of the policy, {peaks.together:.1f} of {memory:.1f} for all. The observations of kept rollouts, "
          "of which a long run has more, come on top.")
    for index, (used, total) in sorted(peaks.gpus.items()):
        print(f"GPU {index}: at most {used:.1f} of {total:.1f} GiB were used, by whatever runs there.")
    if peaks.gpus:
        print(f"The first process had {max(row['gpu_gb'] for row in rows):.1f} GiB of tensors on its GPU.")


def preflight(number: int, words: list[str], logs: Path):
    """Try ript.py with these words in so many processes, in the directory logs."""
    cfg = ript.parse_config(words)
    own = any(word.split("=")[0] == "--workers" for word in words)
    workers = cfg.workers if own else max(1, min(16, ript.cores() // number))  # as under torchrun
    # As many rollouts as there are simulators, and a held-out context for every process.
    groups = number * math.ceil(workers / cfg.rollouts)
    contexts = math.ceil(number / len(ript.tasks_of(cfg)))
    run = logs / "run"
    small = [*words, "--workers", workers, "--groups", groups, "--max_rejected", 0, "--iterations", 1,
             "--eval_contexts", contexts, "--eval_every", 0, "--out", run]
    peaks = Peaks()

    def part(title, name, *argv):
        run_part(title, number, name, [str(word) for word in argv], peaks, logs)

    part(f"1 of 4: {number} processes and their devices", "probe", *small)
    part(f"2 of 4: an iteration of {groups} groups between evaluations", "train", *small)
    before = read_rows(run)
    part("3 of 4: --resume for a second iteration", "train", "--resume", run, "--iterations", 2)
    rows = read_rows(run)
    check_resumed(before, rows)
    last = run / "last"
    saved = ("--adapter", last, "--scale_head=") if (last / "adapter_config.json").exists() else (
        "--checkpoint", last)
    evaluation = logs / "evaluation"
    part("4 of 4: --eval of what was saved", "train", *small, "--eval", *saved, "--out", evaluation)
    files = run / "evaluation_RIPT.json", evaluation / "evaluation_success.json"
    outcomes = [json.loads(path.read_text())["outcomes"] for path in files]
    require(outcomes[0].keys() == outcomes[1].keys(), "--eval had other contexts than the run")
    same = sum(outcomes[1][name] == success for name, success in outcomes[0].items())
    print(f"The resumed run went on after its first iteration. What it saved ends in {same} of "
          f"{len(outcomes[0])} contexts as it did in the run.")
    say_sizes(run, peaks, rows)
    print(estimate(cfg, rows, len(ript.evaluation_contexts(cfg))))


@contextmanager
def stopping_cleanly():
    """Within it, Ctrl-C and SIGTERM raise UserError: what was started ends, and the directory is removed."""
    def interrupt(number, frame):
        raise ript.UserError("interrupted, and nothing is left behind")

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Optional[list[str]] = None):
    """Parse the number of processes, and leave the rest to ript.py."""
    argv = sys.argv[1:] if argv is None else argv
    parts = dict(probe=probe, train=train)
    if argv and argv[0] in parts:  # in a process of torchrun
        return parts[argv[0]](argv[1:])
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.error = partial(require, False)
    parser.add_argument("--nproc_per_node", type=int, default=max(1, torch.cuda.device_count()))
    options, words = parser.parse_known_args(argv)
    number = options.nproc_per_node
    require(number >= 1, f"--nproc_per_node must be at least 1, got {number}")
    other = [word for word in words if word.split("=")[0] in ("--resume", "--eval")]
    require(not other, "preflight.py tries a new run: leave --resume and --eval out")
    cfg = ript.parse_config(words)
    require(cfg.iterations, "--iterations must be at least 1 for a run to be tried")
    require(cfg.groups % number == 0, f"--groups must be a multiple of the {number} processes")
    ript.check_out(cfg)  # the small run has a directory of its own
    place = Path(cfg.out).absolute().parent
    began = time.time()
    try:
        place.mkdir(parents=True, exist_ok=True)
        prefix = "preflight.tmp."
        with stopping_cleanly(), tempfile.TemporaryDirectory(dir=place, prefix=prefix) as folder:
            preflight(number, words, Path(folder))
    except OSError as error:
        raise ript.UserError(f"cannot write into {place}: {error}") from error
    print(f"Everything that a long run needs works; this took {(time.time() - began) / 60:.1f} minutes.")


if __name__ == "__main__":
    ript.run_command(main)
