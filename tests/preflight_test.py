"""The claims of scripts/preflight.py: it goes through a run, its resume and its evaluation, and says so."""
import os
import re
import subprocess

import ript  # before torch is: it says how OpenMP's threads wait

import pytest

from scripts import preflight
from tests.conftest import PRETRAINED, ROOT, children_of, config, launch, other_sentences

TABLETOP = ["--device", "cpu", "--workers", "1", "--checkpoint", str(PRETRAINED)]
TOY = ["--model", f"{ROOT}/ript_test.py:ToyPolicy", "--suite", f"{ROOT}/ript_test.py:ToySuite",
       "--device", "cpu", "--workers", "1", "--rollouts", "2"]


EASY = """
from ript_test import ToySuite
class Easy(ToySuite):
    def success(self):
        return True
"""


@pytest.fixture
def in_this_process(monkeypatch):
    """Parts of preflight.py run here in place of torchrun's processes: -> their names and arguments."""
    parts = []

    def run_part(title, number, part, argv, peaks, logs):
        parts.append((part, argv))
        getattr(preflight, part)(argv)
        # Each starts with what a new process would have.
        monkeypatch.setattr(ript, "has_signal", has_signal)
        monkeypatch.setattr(ript, "rollout_stats", rollout_stats)

    has_signal, rollout_stats = ript.has_signal, ript.rollout_stats
    monkeypatch.setattr(preflight, "run_part", run_part)
    return parts


def test_it_tries_a_run_its_resume_and_its_evaluation_and_leaves_nothing(in_this_process, tmp_path, capsys):
    preflight.main(["--nproc_per_node", "1", *TOY, "--out", str(tmp_path / "run")])
    assert [part for part, _ in in_this_process] == ["probe", "train", "train", "train"]
    said = capsys.readouterr().out
    assert re.search(r"process 0 on .*: CPU, \d+ cores.*; pictures by egl device 0.* of \d+, .", said)
    assert "iteration 1  success" in said and "iteration 2  success" in said and "kept 1" in said
    assert re.search("Everything that a long run needs works; this took .* minutes", said)
    # The run that it speaks of is the one that was asked for.
    assert "A run of 12 iterations and 4 evaluations" in said and "an evaluation in 100 contexts" in said
    assert re.search("What it saved ends in [012] of 2 contexts as it did in the run", said)
    assert not list(tmp_path.iterdir())


def test_it_goes_on_where_every_rollout_succeeds(in_this_process, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(preflight, "say_sizes", lambda *arguments: None)
    (tmp_path / "easy.py").write_text(EASY)
    toy = [*TOY[:3], f"{tmp_path}/easy.py:Easy", *TOY[4:]]
    preflight.main(["--nproc_per_node", "1", *toy, "--out", str(tmp_path / "runs/run")])
    said = capsys.readouterr().out
    assert "iteration 2  success 1 " in said and "2 of 2 contexts as it did" in said


def test_it_takes_as_many_simulators_as_the_run_will(monkeypatch, tmp_path):
    """Of 64 cores, four processes have 16 each, and sixteen have 4."""
    monkeypatch.setattr(ript, "cores", lambda: 64)
    taken = []

    def run_part(title, number, part, argv, peaks, logs):
        taken.append(argv[argv.index("--workers") + 1])
        raise ript.UserError("enough")

    monkeypatch.setattr(preflight, "run_part", run_part)
    words = [word for word in TOY if word not in ("--workers", "1")]
    for number, words in ((4, words), (8, [*words, "--groups", "32"]), (4, TOY)):
        with pytest.raises(ript.UserError, match="enough"):
            preflight.main(["--nproc_per_node", str(number), *words, "--out", str(tmp_path / "run")])
    assert taken == ["16", "8", "1"]


def test_a_part_that_fails_gives_its_own_sentence(tmp_path):
    peaks = preflight.Peaks()
    with pytest.raises(ript.UserError, match="the title: --task must be below 2 for .*, got 7"):
        preflight.run_part("the title", 1, "probe", [*TOY, "--task", "7"], peaks, tmp_path)
    assert peaks.policy > 0.05 < peaks.together


def test_a_part_that_hangs_is_ended_and_said(tmp_path, monkeypatch):
    monkeypatch.setitem(preflight.LIMITS, "probe", 1)  # it takes longer to start
    before = children_of(os.getpid())
    with pytest.raises(ript.UserError, match="the title: no end after 1 s, do processes wait for each other"):
        preflight.run_part("the title", 1, "probe", TOY, preflight.Peaks(), tmp_path)
    assert set(children_of(os.getpid())) <= set(before)


def rows(*numbers):
    return [dict(iteration=number, rollouts=16, seconds_rollouts=32, seconds_update=8) if number else
            dict(iteration=0, eval_success=0.5) for number in numbers]


def test_a_resume_that_begins_again_or_loses_an_iteration_is_noticed():
    preflight.check_resumed(rows(0, 1), rows(0, 1, 2))
    changed = [dict(row, rollouts=8) for row in rows(0, 1, 2)]
    for after in (rows(0, 1), rows(0, 2), rows(0, 1, 1), rows(0, 1, 2, 3), changed):
        with pytest.raises(ript.UserError, match="--resume did not go on"):
            preflight.check_resumed(rows(0, 1), after)


def test_the_estimate_is_of_the_run_that_was_asked_for():
    # 2 s a rollout and 0.5 s of update for each, 24 groups of 8 and at most 48 more.
    cfg = config("--model", "openvla-oft", "--suite", "libero_goal", "--iterations", 12)
    text = preflight.estimate(cfg, rows(0, 1, 2), 500)
    evaluations = 4  # before, after 5, 10 and 12
    for replaced, rollouts in ((0, 6.4), (48, 19.2)):
        hours = (12 * (rollouts + 1.6) + evaluations * 500 / 30) / 60
        assert f"{hours:.1f} hours if {replaced} groups" in text
        assert f"rollouts take {rollouts} minutes" in text
    assert "An update takes 1.6 minutes, an evaluation in 500 contexts 16.7 minutes" in text
    counts = [preflight.evaluations_of(config("--iterations", i, "--eval_every", e))
              for i, e in ((12, 0), (12, 5), (10, 5), (1, 1))]
    assert counts == [2, 4, 3, 2]


def test_the_memory_of_gpus_is_what_nvidia_smi_says(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, 2048, 81920'\necho '1, 1024, 81920'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert preflight.gpu_memory() == {"0": (2, 80), "1": (1, 80)}
    program.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert preflight.gpu_memory() == {}

    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert preflight.gpu_memory() == {}


MISTAKES = [("--nproc_per_node 5", "--groups must be a multiple of the 5 processes"),
            ("--nproc_per_node 0", "--nproc_per_node must be at least 1"),
            ("--nproc_per_node many", "invalid int value"),
            ("--lrr 1", "unrecognized arguments"),
            ("--resume runs/none", "leave --resume and --eval out"),
            ("--eval", "leave --resume and --eval out"),
            ("--iterations 0", "--iterations must be at least 1"),
            ("--out {tmp}/file/run", "cannot write into {tmp}/file"),
            ("--out {tmp}", "--out must name a new directory")]


def test_each_mistake_gets_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    assert not other_sentences(preflight, MISTAKES, tmp=tmp_path)


@pytest.mark.slow
def test_two_processes_on_cpus_pass(tmp_path):
    done = launch("--nproc_per_node", 2, *TABLETOP, "--out", tmp_path / "run", program="scripts/preflight.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gloo sums 64 MiB over 2 processes" in done.stdout and "process 1 on" in done.stdout
    assert "The resumed run went on" in done.stdout and not list(tmp_path.iterdir())
