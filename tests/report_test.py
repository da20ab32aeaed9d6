"""The claims of scripts/report.py: the table, the paper's number, the page, and what it makes of a run."""
import base64
import json
import os
import re
import shutil
import sys
import threading
import time
from dataclasses import asdict, replace
from html.parser import HTMLParser
from importlib import metadata

import pytest
import torch
from scipy.stats import hypergeom

import ript
from ript import Context
from scripts import report
from tests.conftest import GOLDEN, LORA, PRETRAINED, SCALE, TASKS, config, mistake_of


def test_the_table_has_wilson_intervals_per_task_and_the_exact_test_of_pairs():
    contexts = [Context(task, TASKS[task], seed) for task in (0, 1) for seed in range(10)]
    before, after = [True] + [False] * 19, [False] + [True] * 7 + [False] * 12
    lines = report.table(contexts, dict(SFT=before, RIPT=after)).splitlines()
    assert lines[1].split() == "lift the red cube 1/10 10% [2%, 40%] 7/10 70% [40%, 89%]".split()
    assert lines[3].split()[:4] == "all tasks 1/20 5%".split()
    assert lines[4] == "paired: 7 contexts gained, 1 lost, exact McNemar p = 0.07"  # 2 (1 + 8) / 2^8
    assert "p = 1" in report.table(contexts, dict(SFT=before, RIPT=before))
    assert "paired" not in report.table(contexts, dict(SFT=before))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a run that has ended."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    return run


def test_a_report_has_the_table_the_curve_and_a_video_of_every_task(run, capsys):
    report.main([str(run)])
    said = capsys.readouterr().out
    assert "exact McNemar p" in said and "the paper" not in said
    assert f"torch {metadata.version('torch')}" in said and "mujoco 3.3.2" in said
    assert "another policy" not in said
    # Before, then after: in the other order the paired test would count what RIPT has lost as gained.
    assert (run / "evaluation.csv").read_text().splitlines()[0] == "task,instruction,context,SFT,RIPT"
    assert (run / "metrics.csv").read_text().count("\n") == 3
    videos = "task0.mp4", "task1.mp4", "task0_before.mp4", "task1_before.mp4"
    for name in ("curve.png", *videos):
        assert (run / name).stat().st_size > 1000, name
    page = (run / "report.html").read_text()
    embedded = re.findall('src="data:video/mp4;base64,([^"]*)"', page)
    assert {base64.b64decode(data) for data in embedded} == {(run / name).read_bytes() for name in videos}
    # The run goes on to another evaluation: the old videos of the policy after stage 3 are not of that one.
    os.utime(run / "evaluation_RIPT.json")
    report.main([str(run), "--no_video"])
    embedded = re.findall('src="data:video/mp4;base64,([^"]*)"', (run / "report.html").read_text())
    assert {base64.b64decode(data) for data in embedded} == {(run / name).read_bytes() for name in videos[2:]}


# ----------------------------------------------------------------------------------------- the paper's number
def evaluated(folder, won, *words):
    """The directory of a made-up evaluation of the 7B on LIBERO-Long in which so many contexts succeed."""
    cfg = config("--model", "openvla-oft", "--suite", "libero_10", "--eval", "--out", folder, *words)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(cfg)))
    names = [f"libero_10 {c.task} {c.seed}" for c in ript.evaluation_contexts(cfg)]
    outcomes = {name: int(i < won) for i, name in enumerate(names)}
    (folder / "evaluation_success.json").write_text(json.dumps(outcomes))
    return folder


def verdicts(folder, capsys):
    report.main([str(folder), "--no_video"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "in the paper" in line]
    assert all(line in (folder / "report.html").read_text() for line in lines)
    return lines


def test_fishers_exact_test_sums_what_is_no_likelier_than_what_was_seen():
    for won, number in ((446, 500), (98, 100), (500, 500)):
        chances = hypergeom(500 + number, 465 + won, number).pmf(range(number + 1))
        expected = chances[chances <= chances[won] * (1 + 1e-7)].sum()
        assert report.p_of_equal_rates(won, number, 93.0, 500) == pytest.approx(expected)


@pytest.mark.parametrize("won,sft,ript_", [
    (445, False, False), (446, True, False), (451, True, False), (452, True, True), (479, True, True),
    (480, False, True), (483, False, True), (484, False, False)])
def test_an_evaluation_of_the_7b_stands_beside_the_papers_numbers(tmp_path, capsys, won, sft, ript_):
    """92.9% before stage 3 and 93.8% after it: at 446 to 479, and 452 to 483, of 500 p is 5% or more."""
    lines = verdicts(evaluated(tmp_path / "run", won), capsys)
    for line, stage, percent, fits in zip(lines, ("SFT", "RIPT"), (92.9, 93.8), (sft, ript_), strict=True):
        said = f"{stage} in the paper {percent}% of 500: {'' if fits else 'not '}compatible (p = "
        assert line.startswith(f"success {won}/500 {won / 500:.0%} [") and said in line
        assert "interim" not in line


def test_a_hundred_episodes_are_an_interim_answer_and_a_task_alone_none(tmp_path, capsys):
    lines = verdicts(evaluated(tmp_path / "ten", 87, "--eval_contexts", 10), capsys)
    assert "92.9% of 500: compatible" in lines[0] and "93.8% of 500: not compatible" in lines[1]
    assert all(line.endswith("; 100 episodes are an interim answer") for line in lines)
    assert not verdicts(evaluated(tmp_path / "alone", 9, "--eval_contexts", 10, "--task", 3), capsys)


def test_a_run_is_compared_stage_by_stage():
    cfg = config("--model", "quest", "--suite", "libero_10")
    contexts = [Context(task, "", seed) for task in range(10) for seed in range(50)]
    results = dict(SFT=[True] * 344 + [False] * 156, RIPT=[True] * 344 + [False] * 156)
    before, after = report.beside_the_paper(cfg, contexts, results)
    assert before.startswith("SFT ") and "SFT in the paper 68.8% of 500: compatible (p = 1)" in before
    assert after.startswith("RIPT ") and "RIPT in the paper 87.5% of 500: not compatible" in after
    contexts = [Context(task, "", seed) for task in range(90) for seed in range(50)]
    [line] = report.beside_the_paper(replace(cfg, suite="libero_90"), contexts, dict(SFT=[True] * 4500))
    assert "SFT in the paper 88.6% of 4500: not compatible" in line


# --------------------------------------------------------------------------------------------------- the page
class Tags(HTMLParser):
    """Every tag that a page has, and that is not closed where it must be."""
    def __init__(self, text):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_closes_what_it_opens(run):
    other = run.with_name("<b>&run")  # what a run is called is no part of the markup
    run.rename(other)
    report.main([str(other), "--no_video"])
    page = (other / "report.html").read_text()
    assert "&lt;b&gt;&amp;run" in page
    tags = Tags(page)
    assert not tags.open and {"svg", "table"} <= {tag for tag, _ in tags.seen}
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in tags.seen}
    for tag, attributes in tags.seen:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, name)


def test_the_page_follows_a_run_until_it_ends(run):
    """The run's files are put there as a run does: its lock, the first row, and later the second row."""
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    after = (run / "evaluation_RIPT.json").read_text()
    (run / "metrics.jsonl").unlink()
    (run / "evaluation_RIPT.json").unlink()
    page = report.Page(run)
    assert not report.is_running(run)
    # A lock of this process is as that of another, since it is of another open file.
    with ript.lock_run_dir(run):
        assert report.is_running(run)
        thread = threading.Thread(target=report.follow, args=(run, page, None, 0.02), daemon=True)
        thread.start()

        def put(name, text):
            with ript.writing(run / name) as file:
                file.write_text(text)

        def wait_for(*words):
            deadline = time.time() + 30
            while not (run / "report.html").exists() or \
                    not all(word in (run / "report.html").read_text() for word in words):
                assert time.time() < deadline and thread.is_alive(), words
                time.sleep(0.01)

        put("metrics.jsonl", rows[0])
        wait_for("iteration 0 of 1, still going on", "<th>SFT</th>", 'http-equiv="refresh"')
        assert "<svg" not in (run / "report.html").read_text()
        put("evaluation_RIPT.json", after)
        put("metrics.jsonl", "".join(rows))
        wait_for("iteration 1 of 1, still going on", "<th>SFT</th><th>iteration 1</th>", "<svg")
        assert thread.is_alive()
    thread.join(30)
    assert not thread.is_alive()
    page.write(report.is_running(run))
    assert "still going on" not in (run / "report.html").read_text()
    assert "refresh" not in (run / "report.html").read_text()


def test_an_evaluation_without_rows_and_a_run_without_versions_have_a_page(tmp_path, capsys):
    run = evaluated(tmp_path / "run", 50, "--eval_contexts", 10)
    report.main([str(run), "--no_video", "--follow"])
    assert "versions of mujoco, robosuite, torch, transformers were not kept" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "<b>an evaluation</b>" in page
    assert '<td style="background: hsl(30 55% 78%)" title="50 of 100">50%</td>' in page


def test_a_second_evaluation_is_followed_from_its_start(tmp_path):
    """Its settings are there, and the outcomes are still the first one's."""
    run = evaluated(tmp_path / "run", 50, "--eval_contexts", 10)
    settings = json.loads((run / "config.json").read_text())
    outcomes = json.loads((run / "evaluation_success.json").read_text())
    first = dict(outcomes=outcomes, policy="", settings=settings)
    (run / "evaluation_success.json").write_text(json.dumps(first))
    page = report.Page(run)
    page.write(True)
    text = (run / "report.html").read_text()
    assert "an evaluation, still going on" in text and "<table>" not in text
    # An evaluation writes its settings when its policy is loaded, after the page has begun.
    (run / "config.json").write_text(json.dumps(settings | dict(adapter="elsewhere")))
    with pytest.raises(ript.UserError, match="is of another --adapter than config.json says"):
        page.write(False)


def test_the_page_of_a_run_that_dies_early_says_that_it_has_ended(run):
    for name in ("metrics.jsonl", "evaluation_SFT.json", "evaluation_RIPT.json"):
        (run / name).unlink()
    page = report.Page(run)
    page.write(True)
    assert "still going on" in (run / "report.html").read_text()
    report.follow(run, page)
    assert "still going on" not in (run / "report.html").read_text()


def test_a_7b_run_is_filmed_with_the_heads_that_its_adapters_bring(tmp_path):
    shutil.copytree(GOLDEN / LORA, tmp_path / "last", copy_function=shutil.copyfile)
    cfg = config("--model", "openvla-oft", "--suite", "libero_10", "--checkpoint", GOLDEN / "tiny_oft",
                 "--scale_head", GOLDEN / SCALE, "--device", "cpu")
    policy = report.policy_of(tmp_path, cfg)
    header = torch.load(GOLDEN / LORA / "openvla_headers.pt", weights_only=True)["action_header"]
    head = policy.action_head.state_dict()
    for name, value in header.items():
        assert torch.equal(head[name.removeprefix("module.")], value.float())


# ------------------------------------------------------------------------------------------------ TensorBoard
def test_tensorboard_reads_the_same_numbers_in_cleanrls_groups(run):
    loaded = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):  # another report does not double them
        report.main([str(run), "--no_video", "--tensorboard"])
    assert len(os.listdir(run / "tensorboard")) == 1
    events = loaded.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    expected = {}
    for row in report.read_history(run):
        for name, value in row.items():
            group = "losses" if name in report.LOSSES else "charts"
            if not isinstance(value, list):
                expected.setdefault(f"{group}/{name}", []).append((row["iteration"], pytest.approx(value)))
    assert {"losses/approx_kl", "charts/eval_success", "charts/kept"} < expected.keys()
    assert set(events.Tags()["scalars"]) == expected.keys()
    for tag, points in expected.items():
        assert [(event.step, event.value) for event in events.Scalars(tag)] == points, tag


def test_without_the_package_one_sentence_names_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = mistake_of(report, f"{run} --tensorboard")
    assert said == "--tensorboard needs one more package: pip install tensorboard"


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
