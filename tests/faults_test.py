"""Whatever happens to a run: simulators that die, signals, dead processes, damaged files, and locks."""
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import ript
from ript_test import arguments, collected, fingerprint, rows_of, toy_config, toy_context
from tests.conftest import ROOT, children_of, mistake_of, wait_for_the_end_of

# The toy of ript_test.py, whose resets take time, and which fails once in the way that a file names.
FAULTY = """
import os
import signal
import time
from collections import Counter
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from ript_test import ToyPolicy, ToySuite

PLAN = Path(__file__).with_name("plan")
COUNT = Counter()


def strike(place):
    with suppress(FileNotFoundError):
        kind, planned, n = PLAN.read_text().split()
        COUNT[place] += place == planned
        if place != planned or COUNT[place] != int(n):
            return
        PLAN.rename(PLAN.with_name("struck"))  # by one process alone
        if kind == "raise":
            raise ValueError("this was planned")
        number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
        if place == "answer":  # in the middle of it
            Connection._send = lambda self, data: (os.write(self.fileno(), data[:len(data) // 2]),
                                                   os.kill(os.getpid(), number))
        else:
            os.kill(os.getpid(), number)


class Suite(ToySuite):
    def reset(self, context):
        time.sleep(0.05)
        strike("reset")
        return super().reset(context)

    def step(self, actions):
        strike("step")
        return super().step(actions)


class Policy(ToyPolicy):
    @classmethod
    def preprocess(cls, raw):
        strike("answer")
        return super().preprocess(raw)
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """The settings of the suite and the policy above. The plan lies beside their file."""
    file = tmp_path_factory.mktemp("faulty") / "faulty.py"
    file.write_text(FAULTY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # where they find ript_test.py
        yield dict(suite=f"{file}:Suite", model=f"{file}:Policy"), file.with_name("plan")


# ------------------------------------------------------------------------------------------------- simulators
@pytest.fixture(scope="module")
def faulty_simulators(faulty):
    with ript.open_simulators(toy_config(**faulty[0], workers=2)) as simulators:
        yield simulators


@pytest.fixture(scope="module")
def undisturbed(faulty_simulators):
    return fingerprint(collected(faulty_simulators, groups=3)[0])


PLANS = "kill reset 2", "kill step 3", "kill answer 2", "stop step 3", "stop answer 2", "raise step 2"


@pytest.mark.parametrize("plan", PLANS)
def test_a_simulator_that_dies_stops_or_raises_changes_nothing(monkeypatch, faulty, faulty_simulators,
                                                               undisturbed, plan):
    # Those that are up answer at once; those that replace them have to import first.
    monkeypatch.setattr(ript.Simulator, "PATIENCE", 3)
    start = ript.Simulator.start

    def patient_start(simulator):
        start(simulator)
        simulator.PATIENCE = 200

    monkeypatch.setattr(ript.Simulator, "start", patient_start)
    before = set(children_of(os.getpid()))
    faulty[1].write_text(plan)
    assert fingerprint(collected(faulty_simulators, groups=3)[0]) == undisturbed
    assert not faulty[1].exists() and len(before - set(children_of(os.getpid()))) == 1
    for simulator in faulty_simulators.all:
        vars(simulator).pop("PATIENCE", None)


def test_a_simulator_that_always_fails_ends_the_run_with_its_own_traceback():
    def impossible(number):
        context = toy_context(number)
        context.seed = "not a seed"
        return context

    with ript.open_simulators(toy_config(workers=1)) as simulators:
        with pytest.raises(RuntimeError, match="failed 3 times at (.|\n)*Context.task=0") as caught:
            collected(simulators, impossible, groups=1)
    causes, error = [], caught.value
    while error:
        causes.append(str(error))
        error = error.__cause__
    assert "Traceback" in causes[-1] and "default_rng(context.seed)" in causes[-1]  # of the other process


# ------------------------------------------------------------------------------------------ a run and its end
def command(*words):
    return [sys.executable, str(ROOT / "ript.py"), *map(str, words)]


def wait_for(run, condition):
    while not condition():
        assert run.poll() is None
        time.sleep(0.02)


def lines_of(out):
    metrics = out / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.fixture(scope="module")
def finished(faulty, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    ript.main(arguments(**faulty[0], out=out, eval_contexts=2))
    return out


def assert_same_run(run, other):
    assert rows_of(run) == rows_of(other)
    for name in ("last/policy.pt", "evaluation_SFT.json", "evaluation_RIPT.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
    assert not list(run.rglob("*.tmp*"))


def test_a_killed_run_is_resumed_paused_and_ends_with_the_same_bits(faulty, finished, tmp_path):
    words = arguments(**faulty[0], out=tmp_path, eval_contexts=2)
    trainer = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL)
    wait_for(trainer, lambda: lines_of(tmp_path) >= 2)
    children = children_of(trainer.pid)
    trainer.kill()
    trainer.wait()
    assert len(children) >= 2  # the simulators, which have to notice
    wait_for_the_end_of(children)
    assert lines_of(tmp_path) < 5
    words = command("--resume", tmp_path)
    resumed = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(resumed, lambda: len(children_of(resumed.pid)) >= 2)
    for _ in range(3):  # as Ctrl-Z does: while it starts, and while it acts
        os.killpg(resumed.pid, signal.SIGSTOP)
        time.sleep(0.3)
        os.killpg(resumed.pid, signal.SIGCONT)
        time.sleep(1)
    assert resumed.wait(300) == 0
    assert_same_run(tmp_path, finished)


def test_a_run_that_ends_between_evaluations_is_evaluated(finished, tmp_path):
    """--resume with a smaller --iterations: last/ may be newer than the last evaluation."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    saved = torch.load(run / "run.pt", weights_only=True)
    del saved["history"][-1]["eval_success"]
    torch.save(saved, run / "run.pt")
    (run / "evaluation_RIPT.json").write_text("{}")  # as if it were of an earlier iteration
    ript.main(["--resume", str(run)])
    assert_same_run(run, finished)


def test_a_run_stopped_before_its_first_checkpoint_starts_again(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/run.pt").unlink()
    ript.main(["--resume", str(tmp_path / "run")])
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_run_is_not_resumed_and_one_sentence_says_so(no_simulators, finished, tmp_path, damage):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run/run.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    else:
        torch.save(dict(policy={}), path)
    assert mistake_of(ript, f"--resume {tmp_path}/run").startswith(f"cannot read {path}: ")


def test_a_signal_ends_a_run_and_its_simulators_without_a_traceback(faulty, tmp_path):
    """Two runs get theirs after an evaluation. The last gets Ctrl-C, as its simulators do, during imports."""
    cases = [(signal.SIGINT, "metrics"), (signal.SIGTERM, "metrics"), (signal.SIGINT, "imports")]
    runs = []
    for i in range(3):
        words = command(*arguments(**faulty[0], out=tmp_path / str(i), iterations=1000, eval_every=0))
        runs.append(subprocess.Popen(words, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                     start_new_session=True))
    try:
        for i, (number, moment) in reversed(list(enumerate(cases))):
            if moment == "imports":
                wait_for(runs[i], lambda: len(children_of(runs[i].pid)) >= 2)
            else:
                wait_for(runs[i], lambda: lines_of(tmp_path / str(i)) > 0)
            time.sleep(0.5)  # simulators have to be told what to import
            children = children_of(runs[i].pid)
            (os.killpg if moment == "imports" else os.kill)(runs[i].pid, number)
            said = runs[i].communicate(timeout=60)[1]
            assert "Traceback" not in said and "KeyboardInterrupt" not in said
            assert runs[i].returncode == -number and len(children) >= 2  # a shell shows 130 and 143
            wait_for_the_end_of(children)
    finally:
        for run in runs:
            run.kill()


def test_a_dead_process_ends_the_job_and_is_named(faulty, tmp_path):
    words = arguments(**faulty[0], out=tmp_path, workers=1, iterations=1000, eval_contexts=1, eval_every=0)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*torchrun, *command(*words)[1:]]
    job = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(job, lambda: lines_of(tmp_path) > 0)
    ranks = children_of(job.pid)
    others = [pid for rank in ranks for pid in children_of(rank)]
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, error = job.communicate(timeout=120)
    assert job.returncode != 0 and "local_rank: 1" in error and "SIGKILL" in error
    wait_for_the_end_of([*ranks, *others])


@pytest.mark.parametrize("rank,name", [(0, "ript.py"), (3, "ript.py, process 3")])
def test_the_process_that_fails_says_so(monkeypatch, capsys, rank, name):
    def fail():
        raise ript.UserError("no such\nthing")

    monkeypatch.setattr(ript, "RANK", rank)
    monkeypatch.setattr(sys, "argv", ["/somewhere/ript.py"])
    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        ript.run_command(fail)
    signal.signal(signal.SIGINT, usual)
    assert ended.value.code == 2 and capsys.readouterr().err == f"{name}: no such thing\n"


# ----------------------------------------------------------------------------------------------------- locks
def test_two_runs_never_share_a_directory(tmp_path):
    program = "import sys, time, ript; from pathlib import Path\n"
    program += "lock = ript.lock_run_dir(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    words = [sys.executable, "-c", program, tmp_path]
    first = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    said = mistake_of(ript, " ".join(arguments(out=tmp_path)))
    assert said == f"another run is using {tmp_path}: choose another --out"
    assert not list(tmp_path.glob("[!.]*"))
    first.kill()
    first.wait()
    # It ends with the process, even with one that was killed.
    ript.lock_run_dir(tmp_path).close()
