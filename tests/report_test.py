"""The claims of scripts/report.py: the table, and what it makes of a run."""
import json
import shutil

import pytest

import ript
from ript import Context
from scripts import report
from tests.conftest import PRETRAINED, TASKS, mistake_of


def test_the_table_has_wilson_intervals_per_task_and_the_exact_test_of_pairs():
    contexts = [Context(task, TASKS[task], seed) for task in (0, 1) for seed in range(10)]
    before, after = [True] + [False] * 19, [False] + [True] * 7 + [False] * 12
    lines = report.table(contexts, dict(SFT=before, RIPT=after)).splitlines()
    assert lines[1].split() == "lift the red cube 1/10 10% [2%, 40%] 7/10 70% [40%, 89%]".split()
    assert lines[3].split()[:4] == "all tasks 1/20 5%".split()
    assert lines[4] == "paired: 7 contexts gained, 1 lost, exact McNemar p = 0.07"  # 2 (1 + 8) / 2^8
    assert "p = 1" in report.table(contexts, dict(SFT=before, RIPT=before))
    assert "paired" not in report.table(contexts, dict(SFT=before))


def test_a_report_has_the_table_the_curve_and_a_video_of_every_task(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    report.main([str(run)])
    said = capsys.readouterr().out
    assert "exact McNemar p" in said and "another policy" not in said
    # Before, then after: in the other order the paired test would count what RIPT has lost as gained.
    assert (run / "evaluation.csv").read_text().splitlines()[0] == "task,instruction,context,SFT,RIPT"
    assert (run / "metrics.csv").read_text().count("\n") == 3
    for name in ("curve.png", "task0.mp4", "task1.mp4"):
        assert (run / name).stat().st_size > 1000, name


def test_outcomes_are_not_shown_under_the_settings_of_another_evaluation(finished, tmp_path, capsys):
    """As when a second evaluation into the same directory is killed after its config.json."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    settings = json.loads((run / "config.json").read_text())
    for name, value in (("checkpoint", "elsewhere"), ("seed", 7), ("scale_multiplier", 2.0)):
        (run / "config.json").write_text(json.dumps(settings | {name: value}))
        said = mistake_of(report, f"{run} --no_video")
        assert said.startswith(f"{run}/evaluation_SFT.json is of another --{name} than config.json says")
    # What --resume may change, and where the run lies, change no outcome.
    (run / "config.json").write_text(json.dumps(settings | dict(workers=9, out="moved", iterations=50)))
    report.main([str(run), "--no_video"])
    # Files of earlier versions have outcomes alone.
    found = json.loads((run / "evaluation_RIPT.json").read_text())
    (run / "evaluation_RIPT.json").write_text(json.dumps(found["outcomes"]))
    report.main([str(run), "--no_video"])
    assert capsys.readouterr().out.count("exact McNemar p") == 2


def test_a_video_of_another_policy_than_the_outcomes_are_of_is_told(finished, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    cfg = ript.load_config(run)
    outcomes, evaluated = report.read_outcomes(run / "evaluation_RIPT.json", cfg)
    assert set(outcomes.values()) <= {0, 1}
    for place, other in (("last", False), (PRETRAINED, True)):
        if other:
            shutil.rmtree(run / "last")
            shutil.copytree(place, run / "last")
        report.write_videos(run, cfg, [], evaluated)
        assert ("the videos show another policy" in capsys.readouterr().out) == other


@pytest.mark.parametrize("place", ["last", PRETRAINED])
def test_a_policys_directory_is_told_from_a_runs(finished, place):
    folder = finished[0] / place
    assert mistake_of(report, str(folder)).startswith(f"{folder} is not the directory of a run: ")
