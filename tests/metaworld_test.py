"""The claims of simulators/metaworld.py: its tasks, determinism, experts, and a policy of four actions."""
from functools import partial

import ript  # before torch is: it says how OpenMP's threads wait

import numpy as np
import pytest
import torch

pytest.importorskip("metaworld", reason="pip install -c requirements.txt metaworld==3.0.0")

from metaworld.env_dict import ML45_V3

from experiments import common, ml45
from policies.tiny import Tiny
from ript import Context
from scripts import sft
from simulators.metaworld import EXPERT_STEPS, ML45
from tests.conftest import config

SUITES = "metaworld", "metaworld_test", "metaworld_few_shot"
TASKS = [ML45.NAMES.index(name) for name in ("drawer-open", "peg-insert-side", "stick-pull")]


def test_the_suites_have_the_tasks_of_ml45_and_of_quests_authors():
    names = [[f"{name}-v3" for name in ript.load_suite(suite).NAMES] for suite in SUITES]
    assert names[0] == list(ML45_V3["train"]) and names[1] == list(ML45_V3["test"])
    assert len(names[2]) == 5 and set(names[2]) <= {*names[0], *names[1]}
    for suite in map(ript.load_suite, SUITES):
        assert len(suite.INSTRUCTIONS) == len(suite.HORIZON) == len(suite.NAMES)
        for name, text, horizon in zip(suite.NAMES, suite.INSTRUCTIONS, suite.HORIZON):
            assert text.split() == name.split("-")
            assert 2 * EXPERT_STEPS[name] <= horizon < 500 and horizon % 8 == 0


@pytest.fixture(scope="module")
def used():
    """A simulator that keeps one environment, and has run an episode of each of TASKS."""
    simulator = ript.load_suite("metaworld")(32, True)
    simulator.KEPT = 1
    for task in TASKS:
        simulator.reset(Context(task, "", 1))
        simulator.step(np.random.default_rng(task).uniform(-1, 1, (16, 4)))
    assert list(simulator.kept) == TASKS[-1:] and {key[0] for key in simulator.renderers} == set(TASKS[-1:])
    return simulator


@pytest.mark.parametrize("task", TASKS[::-1])
def test_an_episode_is_a_function_of_its_context_whatever_the_environment_did_before(used, task):
    fresh = ript.load_suite("metaworld")(32, True)
    actions = np.random.default_rng(7).uniform(-1, 1, (24, 4))
    records = []
    for simulator in (fresh, used):
        first = simulator.reset(Context(task, "", 12345)).observation
        last = simulator.step(actions).observation
        state = dict(seen=simulator.seen, qpos=simulator.env.data.qpos.copy(),
                     places=simulator.env.model.body_pos.copy())
        records.append((first, last, state))
    for one, other in zip(*records):
        assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    used.reset(Context(task, "", 12346))
    scene = used.seen
    used.reset(Context(task, "", 12345))
    assert (used.seen != scene).any()  # another seed is another scene


def test_experts_succeed_though_their_hand_is_pushed_and_their_gripper_is_no_sign():
    simulator = ript.load_suite("metaworld")(16, True)
    for name in ("assembly", "reach"):
        task = simulator.NAMES.index(name)
        found = [simulator.demonstrate(Context(task, "", 1000 + seed)) for seed in range(3)]
        assert sum(demonstration.success for demonstration in found) >= 2
        for demonstration in found:
            assert len(demonstration.observations) == len(demonstration.actions) <= simulator.HORIZON[task]
            assert demonstration.actions.shape[1] == 4
        assert name == "reach" or len(set(np.abs(found[0].actions[:, 3]))) > 1


@pytest.mark.parametrize("name", ["reach", "dial-turn", "plate-slide"])
def test_the_first_observation_is_of_the_scene_in_which_the_episode_runs(name):
    import mujoco
    simulator = ript.load_suite("metaworld")(64, True)
    for seed in (1, 2):
        first = simulator.reset(Context(simulator.NAMES.index(name), "", seed)).observation
        seen = simulator.seen
        mujoco.mj_forward(simulator.env.model, simulator.env.data)
        again = simulator.get_observation()
        assert first.keys() == again.keys() and all((first[key] == again[key]).all() for key in first)
        assert (seen[:18] == simulator.env._get_curr_obs_combined_no_goal()).all()
        assert (seen[18:36] == seen[:18]).all() and (seen[36:] == simulator.env._get_pos_goal()).all()


def test_pictures_show_what_the_seed_decides_and_leave_the_arm_out_where_that_is_asked_for():
    simulator = ript.load_suite("metaworld")(64, True)
    pictures = [simulator.reset(Context(14, "", seed)).observation["agentview_image"] for seed in (0, 1, 0)]
    assert (pictures[0] == pictures[2]).all() and (pictures[0] != pictures[1]).any()
    assert pictures[0].shape == (64, 64, 3) and pictures[0].std() > 20
    red = [(p[..., 0].astype(int) - p[..., 1] > 80).mean()
           for p in (simulator.render("agentview", 64, hidden) for hidden in (True, False))]
    assert red[0] < 0.01 < red[1]  # the arm is red


def test_a_policy_from_scratch_has_four_actions_and_a_gripper_that_is_a_number():
    suite = ript.load_suite("metaworld")
    proprio = np.random.default_rng(0).uniform(-1, 1, (50, 8))
    picture = np.zeros((16, 16, 3), np.uint8)
    pictures = dict(agentview_image=picture, robot0_eye_in_hand_image=picture)
    looks = [partial(dict, pictures, proprio=row) for row in proprio]
    demo = sft.Demo(Context(0, "reach", 0), looks, np.zeros((50, 4)))
    policy = Tiny(sft.measure_statistics(Tiny, suite, [demo]))
    assert policy.A == 4 and policy.continuous_gripper()
    assert np.allclose(policy.statistics["proprio"]["q01"], np.quantile(proprio, 0.01, 0))
    actions = np.random.default_rng(1).uniform(-1, 1, (3, 8, 4))
    assert np.abs(policy.to_env_actions(policy.from_env_actions(actions)) - actions).max() < 1e-5
    chunk, = policy.act([policy.preprocess(looks[0]())], ["reach"], [np.random.default_rng(0)])
    assert chunk["actions"].shape == (8, 4) and len(set(np.abs(chunk["actions"][:, 3]))) > 1
    # LIBERO's is a sign, as ever.
    assert not Tiny().continuous_gripper()


def test_contexts_of_development_are_other_scenes_and_experts_need_no_pictures():
    task = ML45.NAMES.index("reach")
    places = []
    for suite, seed in ((ml45.Development, 3), (ML45, 500_003), (ML45, 3)):
        simulator = suite(16, True)
        simulator.reset(Context(task, "", seed))
        places.append(simulator.env._target_pos.copy())
    assert (places[0] == places[1]).all() and (places[0] != places[2]).any()
    demonstration = ml45.Unseen().demonstrate(Context(task, "", 3))
    assert demonstration.success and demonstration.observations[0] == {}
    for words, said in {"nothing": "invalid choice: 'nothing'", "speed 3": "the others have none",
                        "tasks": "starts, tasks, heads, places, horizon need numbers of tasks"}.items():
        with pytest.raises(ript.UserError, match=said):
            ml45.main(words.split())


def test_the_table_says_what_decides_whether_a_run_learns(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ml45, "KEPT", tmp_path)
    contexts = [dict(task=0, SFT=one, RIPT=other) for one, other in zip([1, 0, 0, 0], [1, 1, 1, 0])]
    common.write_csv(tmp_path / "evaluation_a.csv", contexts)
    rows = [dict(iteration=0, eval_success=0.25),
            dict(iteration=1, rollouts=80, kept=2, all_success=1, all_fail=7, rollout_success=0.2),
            dict(iteration=2, rollouts=80, kept=4, all_success=3, all_fail=3, rollout_success=0.5,
                 eval_success=0.75, noise_success=0.5)]
    common.write_csv(tmp_path / "metrics_a.csv", rows)
    ml45.table(["a"])
    *_, row = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "a" and cells[1].startswith("1/4") and cells[2].startswith("3/4")
    assert cells[3:] == ["2, 0, 0.5", "75%", "50%", "20% 50%", "30%", "20%", "50%", "160"]


def test_policies_after_stage_2_are_looked_at_in_other_scenes(monkeypatch, tmp_path):
    task = ML45.NAMES.index("reach")
    settings = {name: (name, "", (task,)) for name in ("three", "ten")}
    for name, value in dict(KEPT=tmp_path, RUNS=tmp_path, SETTINGS=settings).items():
        monkeypatch.setattr(ml45, name, value)
    torch.manual_seed(0)
    policy = Tiny(Tiny.STATISTICS | ML45.STATISTICS)
    policy.trained_with = Tiny.settings_of(config(*map(str, ml45.DEVELOPMENT)))
    policy.save(tmp_path)
    monkeypatch.setattr(ml45, "begin_of", lambda begin, task: tmp_path)
    monkeypatch.setattr(ml45, "stage_1", lambda: tmp_path)
    ml45.scenes(number=3)
    ml45.places([task], scenes=12)
    row, = common.read_csv(tmp_path / "places.csv")
    assert row["name"] == "reach" and row["coordinates"] == "5"
    assert float(row["pictures_least"]) <= float(row["pictures_mean"]) <= 1
    assert row["features_mean"] == row["stage_1_mean"]  # of the same policy
    first, second = common.read_csv(tmp_path / "scenes.csv")
    assert first.pop("start") == "three" and second.pop("start") == "ten"
    assert first == second  # of the same policy
    # A policy that has learned nothing does the same everywhere, the expert does not.
    assert float(first["policy_differs"]) < 0.02 < 0.1 < float(first["expert_differs"])
    assert float(first["error"]) > 0.2


def test_a_linear_read_out_knows_what_is_in_its_inputs_and_nothing_else():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((200, 30))
    wanted = np.stack([inputs @ rng.standard_normal(30), rng.standard_normal(200)], 1)
    known, unknown = ml45.read_out(inputs, wanted)
    assert known > 0.99 and unknown < 0.1


def test_every_setting_that_is_compared_is_one_of_ript():
    for name, (begin, stage_3, tasks) in ml45.SETTINGS.items():
        words = *map(str, ml45.DEVELOPMENT), "--task", "14"
        stage_2 = ml45.STARTS.get(begin, "").split()
        stage = ript.parse_config([*words, *stage_2], sft.ImitationConfig, "IMITATION")
        assert stage.demos_per_task == (3 if name.startswith("three") else 10) and tasks
        cfg = config(*words, *stage_3.split())
        assert (cfg.eval_contexts, cfg.image_size) == (40, 64)
        assert cfg.groups == 8 if "small" in name else cfg.groups in (16, 48)
        assert ("all" in name) == (cfg.model == "tiny")
        assert ript.horizon_of(ript.load_suite(cfg.suite), 14) == 224
    assert ript.horizon_of(ript.load_suite(f"{ml45.__file__}:Longer"), 14) == 496
    assert config("--suite", "metaworld_few_shot", *ml45.FIVE_TASKS.split()).groups == 16


def test_stage_1_has_seen_no_task_that_is_learned_after_it(monkeypatch):
    made = {}

    def start_of(name, *words):
        made[name] = [str(word) for word in words]
        return made[name]

    monkeypatch.setattr(ml45, "start_of", start_of)
    begun = ml45.begin_of("pretrained", ml45.SLIDE)
    assert begun[begun.index("--checkpoint") + 1] == str(made["stage_1"]) and "--sft_steps" in begun
    stage = ript.parse_config(made["stage_1"], sft.ImitationConfig, "IMITATION")
    assert stage.demos_per_task == 8 and ript.load_suite(stage.suite).NAMES == ml45.Stage1.NAMES
    assert "--checkpoint" not in ml45.begin_of("ten", ml45.SLIDE)
    shown = {task for _, _, tasks in ml45.SETTINGS.values() for task in tasks}
    assert not {ML45.NAMES[task] for task in shown} & set(ml45.Stage1.NAMES) and len(ml45.Stage1.NAMES) == 28


def test_all_of_the_policy_but_its_scale_head_learns_there_and_arms_choose_otherwise(tmp_path):
    Tiny(Tiny.STATISTICS | ML45.STATISTICS).save(tmp_path)

    def learns(model):
        cfg = config("--suite", "metaworld", "--checkpoint", tmp_path, "--model", model)
        policy = ript.load_policy(model).load(cfg)
        return {name.split(".")[0] for name, p in policy.named_parameters() if p.requires_grad}

    everything = {name.split(".")[0] for name, _ in Tiny().named_parameters()} - {"scale_head"}
    assert learns("tiny") == everything
    assert learns(f"{ml45.__file__}:HeadOnly") == {"action_head"}
    assert learns(f"{ml45.__file__}:Upstream") == everything - {"action_head"}
