"""What ript.py refuses, each by a sentence, and odd numbers that must do no harm."""
import asyncio
import importlib.util
import json
import math
import os
import resource
import shutil
import sys
from pathlib import Path

import ript  # before torch is: it says how OpenMP's threads wait

import numpy as np
import pytest
import torch
from torch import nn

from experiments import bandit
from ript import Episode
from ript_test import (FILE, TOY, ToyPolicy, ToySuite, assert_close, collected, finished,  # noqa: F401
                       simulators, toy_config, toy_context)
from simulators import environment


WRONG = dict(  # of ppo_clip_loss for 3 episodes of 5 steps: what each would make of other numbers, in silence
    a_column=dict(advantage=torch.ones(3, 1)), advantage_per_step=dict(advantage=torch.ones(3, 5)),
    advantage_of_others=dict(advantage=torch.ones(5)), one_advantage=dict(advantage=torch.tensor(1.0)),
    weight_per_episode=dict(weight=torch.ones(3, 1)), weight_of_others=dict(weight=torch.ones(5)),
    mask=dict(weight=torch.ones(3, 5).bool()), counts=dict(weight=torch.ones(3, 5).long()),
    old_per_episode=dict(old_log_prob=torch.zeros(3, 1)), flat=dict(log_prob=torch.zeros(15)),
    per_dimension=dict(log_prob=torch.zeros(3, 5, 7)), three_clips=dict(clip=(0.1, 0.2, 0.3)),
    clip_per_step=dict(clip=torch.full((5,), 0.2)))


@pytest.mark.parametrize("wrong", WRONG)
def test_shapes_that_would_broadcast_to_other_numbers_are_refused(wrong):
    right = dict(log_prob=torch.zeros(3, 5), old_log_prob=torch.zeros(3, 5), advantage=torch.ones(3),
                 weight=torch.full((3, 5), 1 / 15))
    ript.ppo_clip_loss(**right)
    with pytest.raises(ValueError, match=r"\(.*,.*\)|shape"):
        ript.ppo_clip_loss(**right | WRONG[wrong])


def test_columns_that_are_all_of_one_axis_are_refused_too():
    """(E,) each: an advantage beside it would make (E, E) of it."""
    one = torch.ones(4)
    with pytest.raises(ValueError, match=r"must be \(E, S\)"):
        ript.ppo_clip_loss(one, one, one, one)


@pytest.mark.parametrize("mask", [torch.ones(5).bool(), torch.ones(3, 5), torch.ones(2, 3, 5).bool()])
def test_a_mask_is_bool_for_episodes_and_steps(mask):
    with pytest.raises(ValueError, match=r"must be \(E, S\) bool, got \("):
        ript.loss_weight(mask)


class Here:
    """A simulator in this process, as a rollout calls it."""
    def __init__(self, suite):
        self.suite, self.task = suite, None

    async def call(self, method, *arguments):
        result = getattr(self.suite, method)(*arguments)
        seen = result.observation and ToyPolicy.preprocess(result.observation)
        return result._replace(observation=seen)


@pytest.mark.parametrize("reward", [0.5, 2, None, math.nan, "no", np.float64(0.99)])
def test_a_reward_that_is_neither_true_nor_false_is_refused(reward):
    class Rewarded(ToySuite):
        def success(self):
            return reward

    rollout = ript.rollout(Here(Rewarded()), Episode(toy_context(0)), ript.Actor(ToyPolicy(), 1), 12)
    with pytest.raises(ript.UserError, match="success must be True or False, got "):
        asyncio.run(rollout)


def change_chunk(**changes):
    """A policy whose action chunks have other entries; an entry that is None is missing."""
    class Changed(ToyPolicy):
        def act(self, *arguments):
            chunks = super().act(*arguments)
            for chunk in chunks:
                chunk.update({name: value(chunk) for name, value in changes.items()})
                for name in [name for name in changes if chunk[name] is None]:
                    del chunk[name]
            return chunks

    return Changed()


def change_log_prob(change):
    """A policy whose log_prob is changed."""
    class Changed(ToyPolicy):
        def log_prob(self, chunks):
            return change(super().log_prob(chunks))

    return Changed()


ODD = dict(
    twice_as_many_actions=change_chunk(actions=lambda chunk: np.repeat(chunk["actions"], 2, 0)),
    too_few_actions=change_chunk(actions=lambda chunk: chunk["actions"][:3]),
    no_log_prob=change_chunk(log_prob=lambda chunk: None),
    log_prob_per_dimension=change_chunk(log_prob=lambda chunk: np.zeros((4, 2))),
    a_tensor_to_log=change_chunk(scale=lambda chunk: torch.ones(2)),
    a_text_to_log=change_chunk(at_low=lambda chunk: "all"),
    nan_to_log=change_chunk(scale=lambda chunk: math.nan),
    no_sample=change_chunk(sample=lambda chunk: None),
    no_gradient=change_log_prob(torch.Tensor.detach),
    a_log_prob_per_chunk=change_log_prob(lambda log_prob: log_prob.sum(-1)),
    more_columns=change_log_prob(lambda log_prob: log_prob.repeat(1, 2)))


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_action_chunk_is_refused_at_the_first_query(simulators, odd):
    queries = []
    act = ODD[odd].act
    ODD[odd].act = lambda *arguments: (queries.append(1), act(*arguments))[1]
    with pytest.raises(ript.UserError, match="chunk|log_prob"):
        collected(simulators, policy=ODD[odd], groups=2)
    assert len(queries) <= 8  # the rollouts that wait when the run ends have one each
    assert collected(simulators, policy=ToyPolicy(), groups=1)[0]  # one that is as it must be is not


def test_a_policy_that_lacks_a_method_is_refused_before_anything_starts(monkeypatch):
    for name in ("load", "preprocess", "act", "log_prob", "parameter_groups", "save"):
        methods = {method: classmethod(lambda cls: None) for method in
                   ("load", "preprocess", "act", "log_prob", "parameter_groups", "save") if method != name}
        monkeypatch.setattr(ript, "load_policy", lambda model: type("Lacking", (nn.Module,), methods))
        with pytest.raises(ript.UserError, match=name):
            ript.check(ript.Config(**TOY, out="nowhere"))
    # Simulators' processes call preprocess, and have no policy.
    unbound = type("Unbound", (ToyPolicy,), dict(preprocess=lambda self, raw: raw))
    monkeypatch.setattr(ript, "load_policy", lambda model: unbound)
    with pytest.raises(ript.UserError, match="preprocess is a class method"):
        ript.check(ript.Config(**TOY, out="nowhere"))


TASKLESS = dict(no_instructions=dict(INSTRUCTIONS=()), one_text=dict(INSTRUCTIONS="go left"),
                horizon_0=dict(HORIZON=0), a_horizon_of_0=dict(HORIZON=(12, 0)), too_few=dict(HORIZON=(12,)),
                no_whole_number=dict(HORIZON=12.5), negative=dict(HORIZON=-12))


@pytest.mark.parametrize("attributes", TASKLESS)
def test_a_suite_needs_a_text_and_a_horizon_for_each_task(monkeypatch, attributes):
    cfg = toy_config(out="nowhere")
    ript.check(cfg)
    suite = type("Odd", (ToySuite,), TASKLESS[attributes])
    monkeypatch.setattr(ript, "load_suite", lambda name: suite)
    with pytest.raises(ript.UserError, match="INSTRUCTIONS|HORIZON"):
        ript.check(cfg)


def test_a_suite_that_is_solved_at_its_resets_is_told_and_a_group_of_such_a_context_is_rejected(monkeypatch):
    class Solved(Here):
        async def call(self, method, *arguments):
            assert method == "reset"
            return ript.StepResult(0, True, None)

    monkeypatch.setattr(ript, "Simulator", lambda cfg: Solved(ToySuite()))
    solved = ript.Simulators(toy_config())
    episodes, stats, _ = collected(solved, groups=2)
    assert not episodes and stats["all_success"] == 10 and stats["scale"] == 0
    with pytest.raises(ript.UserError, match="every held-out context of .* is solved at its reset"):
        ript.evaluate(ToyPolicy(), solved, ript.evaluation_contexts(toy_config()), toy_config(), "never")


def test_a_class_in_a_file_can_import_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "goals_of_mine.py").write_text("TEXTS = 'go up', 'go down'")
    (tmp_path / "ript_test.py").write_text("raise ImportError('ript.py has one of this name beside it')")
    (tmp_path / "mine.py").write_text("from goals_of_mine import TEXTS\nfrom ript_test import ToySuite\n"
                                      "class Mine(ToySuite):\n    INSTRUCTIONS = TEXTS\n")
    assert ript.load_suite(f"{tmp_path}/mine.py:Mine").INSTRUCTIONS == ("go up", "go down")
    with ript.open_simulators(toy_config(suite=f"{tmp_path}/mine.py:Mine", workers=1)) as simulators:
        assert simulators.suite.__name__ == "Mine"  # and its process could import them, too


def taken(tmp_path, monkeypatch, out, **settings):
    """What a command says of its --out, relative to tmp_path; None where it is accepted."""
    monkeypatch.chdir(tmp_path)
    try:
        ript.check(toy_config(out=out, **settings))
    except ript.UserError as error:
        return str(error)


@pytest.mark.parametrize("out", ["policy", "policy/in", ".", "link", "link/in", "policy/../policy", "runs"])
@pytest.mark.parametrize("setting", ["checkpoint", "adapter", "scale_head", "demos"])
@pytest.mark.parametrize("evaluates,way", [(True, "policy"), (False, "link")])
def test_an_output_apart_from_every_input_is_needed(tmp_path, monkeypatch, out, setting, evaluates, way):
    for folder in ("policy", "runs/of_mine"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "policy")
    place = "runs/of_mine" if out == "runs" else way
    before = sorted(tmp_path.rglob("*"))
    settings = {setting: tmp_path / place, "eval": json.dumps(evaluates)}
    said = taken(tmp_path, monkeypatch, out, **settings)
    assert f"--out {out} is, holds or lies in --{setting}" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_directory_is_new_or_was_begun_by_a_run_of_its_kind(finished, tmp_path, monkeypatch):
    def say(out, **settings):
        return taken(tmp_path, monkeypatch, out, **settings)

    assert say("new") is None and say("a/new/one") is None
    (tmp_path / "policy").mkdir()
    assert say("policy") is None  # it is empty
    (tmp_path / "policy/config.json.tmp").mkdir()
    assert say("policy") is None  # and so it is where a run was killed at its first file
    (tmp_path / "policy/config.json.tmp").rmdir()
    (tmp_path / "policy/model.safetensors").write_text("")
    assert "must name a new directory: 'policy' has ['model.safetensors']" in say("policy")
    assert "must name a new directory: ''" in say("")
    (tmp_path / "policy/config.json").write_text("{\"model_type\": \"llama\"}")
    assert "config.json has settings that are not of this version" in say("policy")
    (tmp_path / "begun").mkdir()
    shutil.copy(finished[0] / "config.json", tmp_path / "begun")
    (tmp_path / "begun/.lock").write_text("")
    assert say("begun") is None  # it was stopped before it kept anything
    assert "must name a new directory: 'begun' has ['config.json']" in say("begun", eval="true")
    (tmp_path / "begun/last").mkdir()
    assert "begun has a run: go on with --resume begun" in say("begun")


@pytest.mark.parametrize("change", [dict(), dict(bias=0.01), dict(constants=(1, 2)), dict(shape=True)])
def test_a_run_goes_on_from_its_own_base_alone(finished, change):
    policy = ToyPolicy()
    if "bias" in change:
        policy.scale_head.bias.data[1] += change["bias"]
    if "constants" in change:
        policy.constants = change["constants"]
    if "shape" in change:
        policy.register_buffer("more", torch.zeros(3))
    optimizer = torch.optim.AdamW(policy.parameter_groups())
    if not change:
        assert ript.load_run(finished[0] / "run.pt", policy, optimizer).iteration == 4
        return
    with pytest.raises(ript.UserError, match="cannot read .*run.pt: it was trained on another base"):
        ript.load_run(finished[0] / "run.pt", policy, optimizer)


@pytest.mark.parametrize("wrong", ["more", "less", "other"])
def test_a_run_and_its_policy_train_the_same(finished, tmp_path, wrong):
    saved = torch.load(finished[0] / "run.pt", weights_only=True)
    weight = saved["policy"]["action_head.weight"]
    saved["policy"] = dict(more={"action_head.weight": weight, "action_head.bias": torch.zeros(2)}, less={},
                           other={"head.weight": weight})[wrong]
    torch.save(saved, tmp_path / "run.pt")
    policy = ToyPolicy()
    with pytest.raises(ript.UserError, match="cannot read .*run.pt: the policy trains other weights, as "):
        ript.load_run(tmp_path / "run.pt", policy, torch.optim.AdamW(policy.parameter_groups()))
    assert (policy.action_head.weight == 0).all()


def test_a_fingerprint_sees_each_weight_of_a_small_policy_and_whatever_its_precision():
    class Half(ToyPolicy):
        def __init__(self, change=0.0):
            super().__init__()
            self.table = nn.Embedding(300, 300, dtype=torch.bfloat16)  # more numbers than are looked at
            nn.init.constant_(self.table.weight, 0.5)
            self.table.weight.data[:, 7] += change

    prints = [ript.fingerprint(Half()), ript.fingerprint(Half()), ript.fingerprint(Half(1e-2)),
              ript.fingerprint(Half(), False), ript.fingerprint(ToyPolicy())]
    assert prints[0] == prints[1] and len(set(prints)) == 4


def test_a_policy_appears_with_all_of_its_files_or_stays_as_it_was(tmp_path):
    class TwoFiles(ToyPolicy):
        def __init__(self, text, fails=False):
            super().__init__()
            self.text, self.fails = text, fails

        def save(self, directory):
            for name in ("head", "adapter"):
                with ript.writing(Path(directory, name)) as file:
                    file.write_text(self.text)
                if self.fails:
                    raise OSError("No space left on device")

    def save(policy):
        with ript.writing(tmp_path / "last") as folder:
            policy.save(folder)

    def seen():
        return {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*")
                if path.is_file()}

    for text in ("first", "second"):
        save(TwoFiles(text))
        assert seen() == {"last/head": text, "last/adapter": text}
    with pytest.raises(ript.UserError, match="cannot write .*last: .*No space left"):
        save(TwoFiles("third", fails=True))
    assert {name: text for name, text in seen().items() if name.startswith("last/")} == {
        "last/head": "second", "last/adapter": "second"}
    save(TwoFiles("fourth"))  # what the failure has left is in nobody's way
    assert seen() == {"last/head": "fourth", "last/adapter": "fourth"}


def launched_with(monkeypatch, **variables):
    """ript.py, read again in an environment with these variables of a launcher alone."""
    for name in (*ript.LAUNCH, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("ript_again", FILE.with_name("ript.py"))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ript_again", module)
    spec.loader.exec_module(module)
    return module


WHOLE = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="here",
             MASTER_PORT="1")


@pytest.mark.parametrize("variables", [
    dict(RANK="1"), dict(RANK=""), dict(RANK="x"), dict(RANK="-1"), dict(RANK="0.5"), dict(WORLD_SIZE="2"),
    dict(WORLD_SIZE="0"), dict(WORLD_SIZE=""), dict(RANK="0", WORLD_SIZE="2"), dict(LOCAL_RANK="1"),
    dict(LOCAL_RANK="gpu"), dict(LOCAL_WORLD_SIZE="0"), dict(LOCAL_WORLD_SIZE="4"), WHOLE | dict(RANK="1"),
    WHOLE | dict(WORLD_SIZE="2", LOCAL_RANK="1"),
    dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="here", MASTER_PORT="1")])
def test_a_launchers_variables_that_do_not_fit_are_refused(monkeypatch, variables):
    module = launched_with(monkeypatch, **variables)
    with pytest.raises(module.UserError, match="the environment has .* torchrun would set otherwise"):
        module.init_distributed("cpu")
    assert module.cores() >= 0  # also where torchrun's numbers are no numbers


def test_several_processes_do_not_share_a_gpu(monkeypatch):
    module = launched_with(monkeypatch, **WHOLE | dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"))
    with pytest.raises(module.UserError, match="must be cuda or cpu for several processes, .* got cuda:1"):
        module.init_distributed("cuda:1")


@pytest.mark.parametrize("variables", [dict(), WHOLE, dict(RANK="0"), dict(MASTER_ADDR="here")])
def test_a_single_process_needs_no_launcher(monkeypatch, variables):
    module = launched_with(monkeypatch, **variables)
    module.init_distributed("cpu")
    assert (module.RANK, module.WORLD) == (0, 1)


@pytest.mark.parametrize("text,expected", [("200000 100000\n", 2), ("150000 100000\n", 2), ("9 100\n", 1),
                                           ("max 100000\n", 64), ("", 64), (None, 64)])
def test_a_containers_quota_limits_the_simulators(monkeypatch, tmp_path, text, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert ript.cores(tmp_path / "cpu.max") == expected
    assert ript.cores.__defaults__ == (Path("/sys/fs/cgroup/cpu.max"),)


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    module = launched_with(monkeypatch, **WHOLE | dict(WORLD_SIZE="4", LOCAL_WORLD_SIZE="4"))
    assert module.cores(Path("nowhere")) == 16


def test_processes_have_equal_shares_of_groups_and_an_episode_each_in_a_minibatch(monkeypatch):
    monkeypatch.setattr(ript, "WORLD", 9)
    with pytest.raises(ript.UserError, match="--groups must be a multiple of the 9 processes"):
        ript.check(toy_config(groups=20, minibatch=9, out="nowhere"))
    with pytest.raises(ript.UserError, match="--minibatch must be at least the number of processes, 9"):
        ript.check(toy_config(groups=18, minibatch=6, out="nowhere"))
    ript.check(toy_config(groups=18, minibatch=9, out="nowhere"))


def test_too_few_open_files_get_a_sentence():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, hard))
    try:
        with pytest.raises(ript.UserError, match="cannot start 16 simulators, try fewer --workers: OSError"):
            with ript.open_simulators(toy_config(workers=16)):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_opengl_is_named_where_it_is_missing_and_not_where_something_else_went_wrong(tmp_path):
    def say(kind):
        with pytest.raises(ript.UserError) as error:
            with ript.open_simulators(toy_config(suite=f"{tmp_path}/kitchens.py:{kind}", workers=1)):
                pass
        return str(error.value)

    (tmp_path / "kitchens.py").write_text("""
from ript_test import ToySuite
class Burning(ToySuite):
    def make_env(self, task):
        raise ValueError("the kitchen is on fire")
class Dark(ToySuite):
    def make_env(self, task):
        raise ImportError("Cannot initialize a EGL device display")
""")
    assert say("Burning") == "the simulator does not start: ValueError: the kitchen is on fire"
    assert say("Dark").startswith("the simulator does not start (it needs libegl1 and libgl1-mesa-dri on ")


def test_missing_meshes_a_device_without_numbers_and_an_unknown_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr("libero.libero.get_libero_path", lambda name: tmp_path / name)
    with pytest.raises(ript.UserError, match="meshes are missing: run libero-download-assets"):
        environment.check_meshes()
    (tmp_path / "assets").mkdir()
    environment.check_meshes()
    with pytest.raises(ript.UserError, match="cannot use --device meta: .*meta"):
        ript.init_distributed("meta")
    monkeypatch.setattr(sys, "argv", ["bandit.py", "rejection"])
    with pytest.raises(ript.UserError, match="takes no name"):
        bandit.main()


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_gives_nan_and_no_gradient_to_anything(which, value):
    """So that a step which did not run, whatever its numbers are, cannot reach a parameter."""
    numbers = [torch.randn(2, 3, 7) for _ in range(3)]
    numbers[which][0, 1, 2] = value
    numbers = [number.requires_grad_() for number in numbers]
    log_prob = ript.laplace_log_prob(*numbers)
    assert log_prob.isnan().tolist() == [[False, True, False], [False] * 3]
    mask = torch.tensor([[True, False, True], [True] * 3])
    old, weight = torch.where(mask, log_prob, 0).detach(), ript.loss_weight(mask)
    ript.ppo_clip_loss(log_prob, old, torch.tensor([1.0, -1.0]), weight)[0].backward()
    for number in numbers:
        assert number.grad.isfinite().all() and (number.grad[0, 1] == 0).all() and (number.grad[1] != 0).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("far", [12, 100, math.inf, -100])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_ratio_far_off_gives_finite_numbers_and_no_gradient_where_the_clip_cuts(advantage, far, kind):
    log_prob = torch.tensor([[float(far), 0.05]], dtype=kind, requires_grad=True)
    weight = torch.full((1, 2), 0.5)
    old, advantages = torch.zeros(1, 2, dtype=kind), torch.tensor([advantage])
    loss, stats = ript.ppo_clip_loss(log_prob, old, advantages, weight)
    loss.backward()
    assert all(number.isfinite().all() for number in (loss, log_prob.grad, *stats.values()))
    assert loss.dtype == torch.float32 and (log_prob.grad[0, 1] != 0) == (advantage != 0)
    bound = 11 if kind == torch.float16 else 20
    cut = advantage == 0 or (far > 0) == (advantage > 0) or abs(far) > bound
    assert (log_prob.grad[0, 0] == 0) == cut
    if advantage > 0 and far > 0:
        assert_close(loss, -(1.2 + math.exp(0.05)) / 2, 1e-3)


@pytest.mark.parametrize("seed", [0, 427, 428, 33554431, 2 ** 31 - 1])
def test_no_seed_of_a_run_comes_back_to_the_held_out_contexts(seed):
    """A simulator's generators have 32 bits: 10^7 times 2^25 is 0 there."""
    seeds = [ript.training_context(number, toy_config(seed=seed)).seed for number in (0, 1, 10 ** 6)]
    assert all(ript.TRAIN_SEEDS <= seed < 2 ** 32 for seed in seeds) and len(set(seeds)) == 3
