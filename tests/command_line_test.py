"""The claims of the command line: settings, presets, and a sentence for every mistake."""
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ript
from ript import load_suite
from scripts import report, sft
from tests.conftest import (PRETRAINED, config, demo_config, launch, mistake_of, other_sentences,
                            small_policy, write_demonstration)


# ------------------------------------------------------------------------------------------------- settings
def test_presets_yield_to_the_command_line_and_libero_long_is_libero_10():
    assert config("--suite", "libero_long").suite == "libero_10"
    assert config().iterations == 6 and config("--iterations", 3).iterations == 3
    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_long")
    oft = [config("--model", "openvla-oft", "--suite", suite) for suite in suites]
    assert [cfg.scale_multiplier for cfg in oft] == [2, 5, 5, 5]
    assert [cfg.lr for cfg in oft] == [5e-5, 5e-5, 1e-5, 5e-5]
    paper = dict(rollouts=8, groups=24, ppo_epochs=1, clip_coef=0.1, iterations=12, eval_contexts=50)
    assert all(vars(cfg).items() >= paper.items() for cfg in oft)


def test_an_evaluation_and_stage_2_have_directories_of_their_own():
    assert config("--eval", "--checkpoint", "x").out == "runs/tabletop_eval" != config().out
    assert demo_config().out == config().checkpoint == "runs/tabletop_sft"


def test_a_class_in_a_file_has_its_own_settings(tmp_path):
    (tmp_path / "own.py").write_text("""
from policies.tiny import Tiny
from simulators.tabletop import Tabletop

class Policy(Tiny):
    PRESET = dict(tabletop=dict(lr=0.125, groups=5))

class Suite(Tabletop):
    PRESET = dict(tiny=dict(lr=0.25))
""")
    assert config("--model", f"{tmp_path}/own.py:Policy").lr == 0.125
    assert config("--suite", f"{tmp_path}/own.py:Suite").lr == 0.25
    cfg = config("--model", f"{tmp_path}/own.py:Policy", "--suite", f"{tmp_path}/own.py:Suite")
    assert (cfg.lr, cfg.groups) == (ript.Config.lr, ript.Config.groups)  # neither knows the other


@pytest.mark.parametrize("program", ["ript.py", "scripts/sft.py"])
def test_help_is_the_documentation_of_every_setting(program):
    done = launch("--help", program=program)
    assert done.returncode == 0 and not done.stderr
    settings = ript.Config if program == "ript.py" else sft.ImitationConfig
    shown = " ".join(done.stdout.split())
    for field in dataclasses.fields(settings):
        assert f" --{field.name} " in shown and repr(field.default) in shown


def test_a_file_can_import_its_neighbours_and_in_a_package_they_hide_no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("colorsys", "neighbour"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    (tmp_path / "neighbour.py").write_text("")
    (tmp_path / "alone.py").write_text("import neighbour\nfrom ript import Suite\n")
    inner = tmp_path / "outer/inner"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").write_text("")
    (inner / "colorsys.py").write_text("from ript import Suite\n")  # named as a module that Python has
    lines = "from colorsys import rgb_to_hsv", "from outer.inner.colorsys import Suite"
    (inner / "suite.py").write_text("\n".join(lines))
    for file in (tmp_path / "alone.py", inner / "suite.py"):
        assert load_suite(f"{file}:Suite") is ript.Suite


# ------------------------------------------------------------------------------------------------- mistakes
MISTAKES = [  # arguments, and what the one sentence says; {tmp} is prepared below
    ("--rollout 8", "unrecognized arguments: --rollout"),
    ("--suite libero", "libero_spatial, libero_object"),
    ("--suite {tmp}/none.py:Suite", "cannot read {tmp}/none.py: FileNotFoundError"),
    ("--suite {tmp}/suite.py:Kitchen", "{tmp}/suite.py:Kitchen is no subclass of Suite"),
    ("--suite {tmp}/suite.py:here", "{tmp}/suite.py:here is no subclass of Suite"),
    ("--suite {tmp}/half.py:Suite", "cannot read {tmp}/half.py: SyntaxError"),
    ("--model gpt", "gpt: use FILE.py:Class or tiny, openvla-oft, quest, pi0"),
    ("--model openvla-oft --suite libero_90", "--model openvla-oft is not made for --suite libero_90"),
    ("--lr fast", "--lr"),
    ("--rollouts 1", "--rollouts must be at least 2"),
    ("--groups 0", "--groups must be at least 1"),
    ("--seed 9223372036854775808", "--seed must be at least 0 and below 2 ** 31"),
    ("--task 2", "--task must be below 2"),
    ("--loss_per step", "'token'"),
    ("--image_size 8", "--image_size must be at least 16"),
    ("--clip_coef nan", "--clip_coef must be a number above 0"),
    ("--adam_beta1 1", "--adam_beta1 must be below 1"),
    ("--collision maybe", "--collision"),
    ("--control_step quick", "--control_step is quick"),
    ("--device tpu9", "--device tpu9"),
    ("--demos {tmp}/wrong", "--demos is for suites of LIBERO"),
    ("--suite libero_object --task 0 --eval_contexts 51", "--eval_contexts must be at most 50, got 51"),
    ("--checkpoint=", "python scripts/sft.py --suite tabletop makes one"),
    ("--checkpoint runs/nowhere", "there is no policy in runs/nowhere: python scripts/sft.py"),
    ("--adapter {tmp}/other", "--adapter is not for --model tiny"),
    ("--checkpoint nowhere", "cannot read nowhere: FileNotFoundError: no such file or directory"),
    ("--checkpoint no/such/run", "no such file or directory, and nothing from the hub"),
    ("--checkpoint {tmp}/none", "cannot read {tmp}/none"),
    ("--checkpoint {tmp}/corrupt", "cannot read {tmp}/corrupt/model.safetensors"),
    ("--checkpoint {tmp}/a_run", "cannot read {tmp}/a_run: ValueError: it is a run, its policy is"),
    ("--checkpoint {tmp}/other", "{tmp}/other/config.json: ValueError: it is not a tiny policy's"),
    ("--checkpoint {tmp}/smaller", "cannot read {tmp}/smaller/model.safetensors: RuntimeError"),
    ("--checkpoint {tmp}/bounds", "{tmp}/bounds/config.json: ValueError: q99 of action must be"),
    ("--resume {tmp}/none", "cannot read {tmp}/none/config.json"),
    ("--resume {tmp}/unknown", "{tmp}/unknown/config.json has settings that are not of this version"),
    ("--passes 2", "--passes is called --ppo_epochs now"),
    ("--clip=0.3", "--clip is called --clip_coef now"),
    ("--resume {tmp}/list", "cannot read {tmp}/list/config.json"),
    ("--out {tmp}/file/run", "cannot write {tmp}/file/run"),
    ("--suite libero_goal --task 0 --demos {tmp}/broken", "cannot read {tmp}/broken"),
    ("--suite libero_goal --task 0 --demos {tmp}/none", "cannot read {tmp}/none")]
MISTAKES_OF_STAGE_2 = [
    ("--suite libero_goal --task 0", "libero_goal has no scripted expert: --demos DIR"),
    ("--suite libero_goal --task 0 --demos {tmp}/wrong", "(12, 6)"),
    ("--suite libero_goal --task 0 --demos {tmp}/broken", "cannot read {tmp}/broken"),
    ("--model quest --suite libero_goal --task 0 --demos {tmp}/wrong", "--model quest is not made for"),
    ("--sft_lr 0", "--sft_lr must be a number above 0"),
    ("--sft_steps 0 --scale_steps 0", "nothing to do"),
    ("--resume {tmp}/none", "{tmp}/none"),
    ("--adapter {tmp}/file", "--adapter is for ript.py: stages 1 and 2 have no use for it"),
    ("--eval", "--eval is for ript.py: stages 1 and 2 have no use for it"),
    ("--model openvla-oft --suite libero_goal --sft_steps 5", "--sft_steps must be 0 for openvla-oft"),
    ("--sft_step 3", "unrecognized arguments")]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("mistakes")
    (tmp / "file").write_text("")
    (tmp / "a_run").mkdir()
    (tmp / "a_run/run.pt").write_text("")
    (tmp / "suite.py").write_text("from pathlib import Path\nhere = Path()\n")
    (tmp / "half.py").write_text("class Suite(")
    for name in ("corrupt", "other", "smaller", "bounds"):
        small_policy().save(tmp / name)
    (tmp / "corrupt/model.safetensors").write_bytes((tmp / "other/model.safetensors").read_bytes()[:1000])
    settings = json.loads((tmp / "other/config.json").read_text())
    (tmp / "other/config.json").write_text(json.dumps(settings | dict(chunk=4)))
    settings["statistics"]["action"]["q99"] = [1.0] * 6
    (tmp / "bounds/config.json").write_text(json.dumps(settings))
    save_file({"projector.fc1.bias": torch.zeros(3)}, tmp / "smaller/model.safetensors")
    for name, content in (("unknown", dict(learning_rate=1)), ("list", [1])):
        (tmp / name).mkdir()
        (tmp / name / "config.json").write_text(json.dumps(content))
    for folder in ("broken", "wrong"):
        (tmp / folder).mkdir()
        file = load_suite("libero_goal").demo_file(tmp / folder, 0)
        write_demonstration(file, actions=np.zeros((12, 6)))
    broken = load_suite("libero_goal").demo_file(tmp / "broken", 0)
    broken.write_bytes(broken.read_bytes()[:2000])
    return tmp


def with_out(mistakes):
    """The mistakes with an --out, and the laptop's policy where nothing else is said about that."""
    complete = []
    for arguments, sentence in mistakes:
        if "--checkpoint" not in arguments and "--resume" not in arguments:
            arguments += f" --checkpoint {PRETRAINED}"
        if "--out" not in arguments and "--resume" not in arguments:
            arguments += " --out {tmp}/out"
        complete.append((arguments, sentence))
    return complete


def test_each_mistake_gets_a_sentence_before_any_file_is_written(no_simulators, tmp):
    assert not other_sentences(ript, with_out(MISTAKES), tmp=tmp)
    assert not list(tmp.glob("out/[!.]*"))


def test_each_mistake_in_stage_2_gets_a_sentence(no_simulators, tmp):
    assert not other_sentences(sft, with_out(MISTAKES_OF_STAGE_2), tmp=tmp)
    assert not list(tmp.glob("out/[!.]*"))


def test_each_mistake_in_a_report_gets_a_sentence(tmp):
    assert "takes a run's directory" in mistake_of(report, "")
    assert "takes a run's directory" in mistake_of(report, f"{tmp} --movie")
    assert f"cannot read {tmp}/none/config.json" in mistake_of(report, f"{tmp}/none")


@pytest.mark.parametrize("program", ["ript.py", "scripts/sft.py"])
def test_a_mistake_leaves_one_line_and_status_2_at_the_command_line(program):
    done = launch("--rollouts", 1, program=program)
    assert done.returncode == 2 and not done.stdout
    said = "--rollouts must be at least 2 and below 2 ** 31, got 1"
    assert done.stderr == f"{Path(program).name}: {said}\n"


IDENTITY = [  # what would make another run of one that is there
    ("--resume {run} --eval", "its --eval is False"),
    ("--resume {run} --task 1", "its --task is -1"),
    ("--resume {run} --seed 3", "its --seed is 0"),
    ("--resume {run} --suite tabletop_pretrain", "its --suite is tabletop"),
    ("--resume {run} --eval_contexts 1", "its --eval_contexts is 2"),
    ("--resume {run} --out elsewhere", "its --out is"),
    ("--resume {run} --checkpoint {run}/last", "its --checkpoint is"),
    ("--out {run}", "has a run: go on with --resume"),
    ("--out {run} --eval", "has a run: go on with --resume")]


def test_a_run_stays_what_it_is(no_simulators, finished):
    run = finished[0]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert not other_sentences(ript, IDENTITY, run=run)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_run_goes_on_with_its_own_control_step(no_simulators, finished, tmp_path):
    settings = json.loads((finished[0] / "config.json").read_text())
    assert settings["control_step"] == "fast"
    (tmp_path / "config.json").write_text(json.dumps(settings | dict(control_step="robosuite")))
    assert "--control_step is robosuite" in mistake_of(ript, f"--resume {tmp_path}")
