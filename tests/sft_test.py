"""The claims of scripts/sft.py: demonstrations, scripted or LIBERO's, and what is learned from them."""
import copy
import json
import math
import shlex
import shutil

import ript  # before torch is: it says how OpenMP's threads wait

import h5py
import numpy as np
import pytest
import torch

from policies.openvla_oft import OpenVLAOFT
from policies.tiny import Tiny
from ript import Context, load_suite
from scripts import sft
from tests.conftest import (GOLDEN, PRETRAINED, SCALE, TASKS, assert_close, demo_config, flat_state,
                            libero_or_skip, mistake_of, small_policy, trained, write_demonstration)


# ------------------------------------------------------------------------------------------ demonstrations
def test_scripted_demonstrations_are_successes_with_clean_labels_for_any_number_of_simulators(simulators):
    lonely = copy.copy(simulators)
    lonely.all = simulators.all[:1]
    seen = []
    for pool in (simulators, lonely):
        demos = sft.scripted_demonstrations(pool, demo_config("--demos_per_task", 2))
        assert [demo.context.task for demo in demos] == [0, 1, 0, 1]
        assert all(np.abs(demo.actions).max() <= 1 for demo in demos)
        pictures = [look()["agentview_image"].tobytes() for demo in demos for look in demo.looks]
        actions = [demo.actions.tobytes() for demo in demos]
        seen.append(([demo.context.seed for demo in demos], actions, pictures))
    assert seen[0] == seen[1]


def test_it_is_said_of_which_tasks_demonstrations_are_missing(simulators, capfd):
    async def run_episodes(play, episodes):
        """The expert fails wherever task 1 is asked for."""
        if not episodes[0].context.task:
            await simulators.run_episodes(play, episodes)

    pool = copy.copy(simulators)
    pool.run_episodes = run_episodes
    demos = sft.scripted_demonstrations(pool, demo_config("--demos_per_task", 1))
    assert [demo.context.task for demo in demos] == [0]
    said = capfd.readouterr().out
    assert "of task 1 there are fewer than 1 demonstrations" in said
    sft.scripted_demonstrations(simulators, demo_config("--demos_per_task", 1))
    assert "fewer" not in capfd.readouterr().out


def test_libero_demonstrations_give_observations_actions_and_contexts(tmp_path):
    suite = load_suite("libero_goal")
    path = suite.demo_file(tmp_path, 3)
    write_demonstration(path)
    cfg = demo_config("--suite", "libero_goal", "--task", 3, "--demos", tmp_path, "--collision", "false")
    demo, = sft.libero_demonstrations(None, cfg)
    with h5py.File(path) as file:
        source = file["data/demo_0"]
        assert (demo.actions == source["actions"][:]).all()
        assert (demo.context.state == source["states"][0]).all()
        observation = Tiny.preprocess(demo.looks[5]())
        assert (observation["pictures"][0] == source["obs/agentview_rgb"][5][::-1, ::-1]).all()
        turn, ours = source["obs/ee_ori"][5], observation["proprio"][3:6]
        # The same turn, with its axis the other way for more than pi.
        longer = abs(np.linalg.norm(ours) + np.linalg.norm(turn) - 2 * math.pi)
        assert_close(min(np.linalg.norm(ours - turn), longer), 0, 1e-5)
    assert (demo.context.task, demo.context.instruction) == (3, suite.INSTRUCTIONS[3])


def test_steps_in_which_nothing_moves_are_left_out_of_demonstrations():
    actions = np.zeros((7, 7))
    actions[:, 6] = [-1, -1, -1, 1, 1, 1, 1]
    actions[[1, 5], 0] = 0.5
    assert sft.moving_steps(actions) == [1, 3, 5]


def test_demonstrations_are_drawn_again_as_rollouts_will_show_them(tmp_path):
    libero_or_skip()
    suite = load_suite("libero_goal")
    simulator = suite(64, True)
    path = suite.demo_file(tmp_path, 3)
    write_demonstration(path, steps=4, size=128)
    with h5py.File(path, "a") as file:
        seen = [simulator.reset(Context(3, "", 0, suite.eval_init_states(3, 1)[0])).observation]
        states = []
        for t in range(4):
            states.append(flat_state(simulator))
            seen.append(simulator.step(file["data/demo_0/actions"][t:t + 1]).observation)
        del file["data/demo_0/states"]
        file["data/demo_0/states"] = states
    simulator.env.close()
    cfg = demo_config("--suite", "libero_goal", "--task", 3, "--demos", tmp_path, "--workers", 1)
    with ript.open_simulators(cfg) as simulators:
        demo, = sft.libero_demonstrations(simulators, cfg)
        # In any order: a state is drawn as it is.
        for t in (2, 0, 3):
            again = demo.looks[t]()
            # After a step, MuJoCo's places are those of 2 ms before.
            assert_close(again["robot0_eef_pos"], seen[t]["robot0_eef_pos"], 2e-3)
            assert again["agentview_image"].shape == (64, 64, 3)
            apart = np.abs(again["agentview_image"].astype(int) - seen[t]["agentview_image"]).mean()
            assert apart < (0.1 if t == 0 else 5), (t, apart)


# ------------------------------------------------------------------------------------------------ learning
def test_sft_learns_and_the_scale_head_is_fitted_alone(simulators):
    policy = small_policy()
    cfg = demo_config("--sft_steps", 25, "--scale_steps", 15, "--sft_lr", 1e-3, "--demos_per_task", 1)
    demos = sft.scripted_demonstrations(simulators, cfg)
    observations = [policy.preprocess(look()) for look in demos[0].looks[:4]]
    batch = (observations, [TASKS[0]] * 4, np.array([demos[0].actions[i:i + 8] for i in range(4)]))
    before = sft.imitation_loss(policy, "sft", *batch).item()
    sft.sft(policy, demos, cfg)
    assert sft.imitation_loss(policy, "sft", *batch).item() < 0.7 * before
    frozen = {name: p.clone() for name, p in trained(policy, Tiny.sft_modules).items()}
    before = sft.imitation_loss(policy, "scale", *batch).item()
    sft.fit_scale_head(policy, demos, cfg)
    assert sft.imitation_loss(policy, "scale", *batch).item() < before
    assert all((p == frozen[name]).all() for name, p in trained(policy, Tiny.sft_modules).items())


def test_stage_2_writes_the_policy_that_stage_3_starts_from(tmp_path):
    """The laptop's command, with the bounds of a policy from scratch taken from its demonstrations."""
    sft.main(["--suite", "tabletop", "--checkpoint=", "--demos_per_task", "1", "--sft_steps", "3",
              "--scale_steps", "2", "--workers", "1", "--out", str(tmp_path / "sft")])
    statistics = Tiny.from_pretrained(tmp_path / "sft").statistics
    assert statistics["action"] == Tiny.STATISTICS["action"]  # its actions are in -1..1 as they are
    low, high = (statistics["proprio"][bound][2] for bound in ("q01", "q99"))
    assert 0.8 < low < high < 1.2  # the hand's height, metres


def test_the_command_that_stage_2_prints_is_one_that_stage_3_takes(tmp_path):
    words = "--suite", "libero_goal", "--task", 3, "--demos", tmp_path, "--collision", "false", "--out", "sft"
    printed = shlex.split(sft.next_command(demo_config(*words)))
    assert printed[:2] == ["python", "ript.py"]
    cfg = ript.parse_config(printed[2:])
    assert (cfg.task, cfg.collision, cfg.demos, cfg.checkpoint) == (3, False, str(tmp_path), "sft")


def test_the_7bs_scale_head_is_fitted_alone_and_saved_in_the_released_form(no_simulators, tmp_path):
    suite = load_suite("libero_10")
    (tmp_path / "demos").mkdir()
    write_demonstration(suite.demo_file(tmp_path / "demos", 2), size=128, state_size=47)
    # Pictures of this size are read from the file. Its states, which are none of the task's, are not drawn.
    arguments = ["--model", "openvla-oft", "--suite", "libero_10", "--task", "2", "--demos",
                 str(tmp_path / "demos"), "--image_size", "128", "--workers", "1"]
    sft.main([*arguments, "--checkpoint", str(GOLDEN / "tiny_oft"), "--scale_steps", "10",
              "--out", str(tmp_path / "sft")])
    fitted = torch.load(tmp_path / "sft/scale_header.pth", weights_only=True)
    released = torch.load(GOLDEN / SCALE, weights_only=True)
    shapes = [[(part, name, p.shape) for part in head for name, p in head[part].items()]
              for head in (released, fitted)]
    assert shapes[0] == shapes[1]
    start = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10")
    end = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10",
                                     scale_head=tmp_path / "sft/scale_header.pth")
    demo, = sft.libero_demonstrations(None, demo_config(*arguments))
    seen = [start.preprocess(look()) for look in demo.looks[:4]]
    labels = np.array([demo.actions[t:t + 8] for t in range(4)])
    texts = [suite.INSTRUCTIONS[2]] * 4
    losses = [sft.imitation_loss(policy, "scale", seen, texts, labels).item() for policy in (start, end)]
    assert losses[1] < losses[0] - 1
    with torch.no_grad():
        assert (start.predict(seen, texts)[0] == end.predict(seen, texts)[0]).all()  # the mean is as it was


# ----------------------------------------------------------------------------------- what must not be learned
def spoil(path, change):
    """Change a file of demonstrations."""
    with h5py.File(path, "a") as file:
        change(file["data"])


def put(name, place, value):
    """A change of a demonstration: a value at a place of an array."""
    def change(data):
        data[f"demo_0/{name}"][place] = value
    return change


def replaced(name, make):
    """A change of a demonstration: another array."""
    def change(data):
        array = make(data[f"demo_0/{name}"][:])
        del data[f"demo_0/{name}"]
        data[f"demo_0/{name}"] = array
    return change


def named(**attributes):
    """A change of a file: what it says of its task."""
    return lambda data: data.attrs.update(attributes)


def instruction(text):
    return json.dumps(dict(problem_name="x", language_instruction=text))


# Of task 3 of LIBERO-Goal, "open the top drawer and put the bowl inside"; what the sentence says.
SPOILED = dict(
    nan_in_a_motion=(put("actions", (4, 2), np.nan), "actions of /data/demo_0 must be 12 rows of finite"),
    nan_in_the_gripper=(put("actions", (4, 6), np.nan), "actions of /data/demo_0 must be 12 rows of finite"),
    infinite_action=(put("actions", (0, 0), np.inf), "actions of /data/demo_0 must be 12 rows of finite"),
    nan_in_the_hand=(put("obs/ee_pos", (4, 2), np.nan), "obs/ee_pos of /data/demo_0 must be 12 rows"),
    nan_in_the_fingers=(put("obs/gripper_states", (0, 0), np.nan), "obs/gripper_states of /data/demo_0"),
    short_hand=(replaced("obs/ee_ori", lambda rows: rows[:5]), "obs/ee_ori of /data/demo_0 must be 12 rows"),
    nothing_moves=(put("actions", slice(None), 0.0), "nothing moves in /data/demo_0"),
    nan_in_a_state=(put("states", (7, 3), np.nan), "states of /data/demo_0 are not finite"),
    five_more=(replaced("states", lambda rows: np.pad(rows, ((0, 0), (0, 5)))), "task's have 79 numbers"),
    five_fewer=(replaced("states", lambda rows: rows[:, 5:]), "are (12, 74), and the task's have 79 numbers"),
    no_states=(replaced("states", lambda rows: rows[:0]), "states of /data/demo_0 are (0, 79)"),
    another_file=(named(bddl_file_name="x/put_the_bowl_on_the_stove.bddl"), "of another task: put_the_bowl"),
    another_text=(named(problem_info=instruction("turn on the stove")), "of another task: turn on the stove"),
    another_suite=(named(problem_info=instruction(["pick", "up", "the", "book"])), "another task: pickup"),
    no_demonstrations=(lambda data: data.clear(), "it has no demonstrations"))


@pytest.mark.parametrize("kind", SPOILED)
def test_demonstrations_that_do_not_fit_are_refused(no_simulators, tmp_path, kind):
    change, sentence = SPOILED[kind]
    path = load_suite("libero_goal").demo_file(tmp_path, 3)
    write_demonstration(path)
    task = (f"--suite libero_goal --task 3 --demos {tmp_path} --collision false --checkpoint= "
            f"--out {tmp_path}_out")
    sft.libero_demonstrations(None, demo_config(*task.split()))
    spoil(path, change)
    said = mistake_of(sft, task)
    assert said.startswith(f"cannot read {path}: ValueError: ") and sentence in said
    if "state" in kind or "five" in kind or "another" in kind or "no_demo" in kind:
        load_suite("libero_goal").demo_init_states.cache_clear()
        assert sentence in mistake_of(ript, task)  # contexts are first states


def test_a_file_of_its_task_is_accepted_whatever_name_it_has_of_it(tmp_path):
    path = load_suite("libero_goal").demo_file(tmp_path, 3)
    write_demonstration(path)
    name = path.stem.removesuffix("_demo")
    for said in (named(bddl_file_name=f"a/{name}.bddl"),
                 named(problem_info=instruction("Open the top layer of the drawer and put the bowl inside"))):
        spoil(path, lambda data: data.attrs.clear())
        spoil(path, said)
        load_suite("libero_goal").demo_init_states.cache_clear()
        assert len(load_suite("libero_goal").demo_init_states(tmp_path, 3)) == 1


@pytest.mark.parametrize("change", ["label", "weight", "rate"])
def test_stage_2_ends_where_what_it_fits_is_not_finite(change):
    policy = small_policy()
    raw = dict(agentview_image=np.zeros((64, 64, 3), np.uint8), proprio=np.zeros(8),
               robot0_eye_in_hand_image=np.zeros((64, 64, 3), np.uint8))
    demo = sft.Demo(Context(0, TASKS[0], 0), [lambda: raw] * 9, np.zeros((9, 7)))
    if change == "label":
        with pytest.raises(ValueError, match="an action is not finite"):
            sft.Demo(demo.context, demo.looks, np.full((9, 7), np.nan))
        demo.actions[3, 1] = np.nan
    if change == "weight":
        policy.proprio_projector.fc1.bias.data[0] = np.nan
    with pytest.raises(ript.UserError, match="the loss of step . of sft is nan|cannot take step 0"):
        sft.fit(policy, "sft", [demo], 4, 1e38 if change == "rate" else 1e-3, 0, 4)


def test_stage_2_has_a_directory_of_its_own_and_keeps_others_out(no_simulators, finished, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(PRETRAINED, policy)
    before = {path: path.read_bytes() for path in policy.iterdir()}
    places = {policy: "is, holds or lies in --checkpoint", policy / "in": "is, holds or lies in --checkpoint",
              tmp_path: "is, holds or lies in --checkpoint", finished[0]: "has a run: go on with --resume"}
    for out, sentence in places.items():
        assert sentence in mistake_of(sft, f"--checkpoint {policy} --out {out}")
    assert "must name a new directory" in mistake_of(sft, f"--checkpoint {PRETRAINED} --out {policy}")
    assert before == {path: path.read_bytes() for path in policy.iterdir()}
    with ript.lock_run_dir(tmp_path / "busy"):
        said = mistake_of(sft, f"--checkpoint {PRETRAINED} --out {tmp_path}/busy")
    assert said == f"another run is using {tmp_path}/busy: choose another --out"
