"""The claims of scripts/report.py: the table, and what it makes of a run."""
import shutil

from ript import Context
from scripts import report
from tests.conftest import TASKS


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
    assert "exact McNemar p" in capsys.readouterr().out
    # Before, then after: in the other order the paired test would count what RIPT has lost as gained.
    assert (run / "evaluation.csv").read_text().splitlines()[0] == "task,instruction,context,SFT,RIPT"
    assert (run / "metrics.csv").read_text().count("\n") == 3
    for name in ("curve.png", "task0.mp4", "task1.mp4"):
        assert (run / name).stat().st_size > 1000, name
