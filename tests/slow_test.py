"""What takes minutes. Run: bash run_libero.sh test --run-slow"""
import json

import pytest

from tests.conftest import launch


@pytest.mark.slow
def test_the_laptop_learns_its_headline(tmp_path):
    done = launch("--suite", "tabletop", "--out", tmp_path / "sft", program="scripts/sft.py")
    assert done.returncode == 0, done.stderr
    done = launch("--checkpoint", tmp_path / "sft", "--out", tmp_path / "run", timeout=3000)
    assert done.returncode == 0, done.stderr
    won = {}
    for stage in ("SFT", "RIPT"):
        outcomes = json.loads((tmp_path / f"run/evaluation_{stage}.json").read_text())["outcomes"]
        assert len(outcomes) == 100
        won[stage] = sum(outcomes.values())
    # Three seeds had 15 to 29, and 99 or 100. Another processor has other bits.
    assert 5 <= won["SFT"] <= 45 and won["RIPT"] >= 95
