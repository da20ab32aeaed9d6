"""The claims of simulators/control_step.py: its step is robosuite's, by the states and by who succeeds."""
import ript  # before torch is: it says how OpenMP's threads wait

import numpy as np
import pytest

from ript import Context, load_suite
from simulators import control_step
from tests.conftest import TASKS, libero_or_skip


def slow_step(simulator):
    """robosuite's own control step, for a simulator that has the fast one."""
    return lambda action: ript.Robosuite.control_step(simulator, action)


def shaken(simulator, step, number=40):
    """Positions of all joints after each of some random actions from one scene, by a way to step."""
    simulator.reset(Context(0, TASKS[0], 7))
    generator = np.random.default_rng(0)
    positions = []
    for _ in range(number):
        step(generator.uniform(-1, 1, 7))
        positions.append(simulator.env.sim.data.qpos.copy())
    return np.array(positions)


def test_a_control_step_gives_the_states_of_robosuites_own(simulator):
    theirs = shaken(simulator, slow_step(simulator))
    ours = shaken(simulator, simulator.control_step)
    assert 0 < np.abs(ours - theirs).max() < 1e-6 < np.abs(ours[-1] - ours[0]).max()


def test_the_torques_are_those_of_robosuites_controller(simulator, monkeypatch):
    torques = control_step.compiled_torques()
    differences = []

    def compared(*arguments):
        ours = torques(*arguments)
        controller = simulator.env.robots[0].controller  # another one after each reset
        controller.update(force=True)
        differences.append(np.abs(ours - controller.run_controller()).max())
        return ours

    monkeypatch.setattr(control_step, "compiled_torques", lambda: compared)
    shaken(simulator, simulator.control_step, 20)
    # After a reset the first step is robosuite's own.
    assert len(differences) == 19 * 25 and max(differences) < 1e-6  # newton metres, of 300


def test_with_all_of_robosuites_passes_a_control_step_is_robosuites_to_the_bit(simulator, monkeypatch):
    import mujoco
    # Three passes: one before the controller, which makes the second, and that of mj_step.
    forward, step = mujoco.mj_forward, mujoco.mj_step

    def with_every_pass(action):
        robot = simulator.env.robots[0]
        controller = robot.controller
        calls = []

        def own_controller(*_):
            controller.new_update = bool(calls)  # set_goal has just brought it up to date
            calls.append(1)
            return np.clip(controller.run_controller(), *robot.torque_limits)

        if controller.new_update:
            simulator.env.sim.forward()
        with monkeypatch.context() as patch:
            patch.setattr(mujoco, "mj_step1", forward)
            patch.setattr(mujoco, "mj_step2", step)
            patch.setattr(control_step, "compiled_torques", lambda: own_controller)
            simulator.control_step(action)

    assert (shaken(simulator, with_every_pass) == shaken(simulator, slow_step(simulator))).all()


def ends_of_experts(simulator, contexts, step, monkeypatch):
    """At which steps an expert's episodes end, and whether with success, by a way to step."""
    with monkeypatch.context() as patch:
        patch.setattr(simulator, "control_step", step)
        demonstrations = [simulator.demonstrate(context) for context in contexts]
    return [(demonstration.success, len(demonstration.actions)) for demonstration in demonstrations]


def test_experts_succeed_at_the_same_steps_as_with_robosuites_control_step(simulator, monkeypatch):
    contexts = [Context(task, TASKS[task], seed) for task in (0, 1) for seed in range(3)]
    ours = ends_of_experts(simulator, contexts, simulator.control_step, monkeypatch)
    assert ours == ends_of_experts(simulator, contexts, slow_step(simulator), monkeypatch)
    assert sum(success for success, _ in ours) >= 5


def test_the_expert_of_libero_object_succeeds_at_the_same_step_as_with_robosuites(monkeypatch):
    libero_or_skip()
    suite = load_suite("libero_object")
    simulator = suite(64, True)
    contexts = [Context(0, "", 0, suite.eval_init_states(0, 1)[0])]
    ours = ends_of_experts(simulator, contexts, simulator.control_step, monkeypatch)
    assert ours[0][0] and ours == ends_of_experts(simulator, contexts, slow_step(simulator), monkeypatch)
    simulator.env.close()


def test_a_stove_turns_on_and_a_drawer_closes_as_with_robosuites_control_step():
    libero_or_skip()
    suite = load_suite("libero_goal")
    simulator, plain = suite(64, True), ript.Libero("libero_goal", 64, True)
    seen = []
    for one in (simulator, plain):
        one.reset(Context(7, "", 0, suite.eval_init_states(7, 1)[0]))  # turn on the stove
        data = one.env.sim.data
        succeeded = []
        for angle in (0.0, 0.8, 0.0):
            data.set_joint_qpos("flat_stove_1_button", angle)
            data.set_joint_qpos("wooden_cabinet_1_top_level", -0.1 * angle)
            succeeded.append(one.step(np.zeros((2, 7))).success)
        seen.append((succeeded, data.qpos.copy()))
        one.env.close()
    assert seen[0][0] == seen[1][0] == [False, True, False]
    assert np.abs(seen[0][1] - seen[1][1]).max() < 1e-4
    assert (simulator.CONTROL_STEP, plain.CONTROL_STEP) == ("fast", "robosuite")


@pytest.mark.parametrize("change", [dict(type="JOINT_POSITION"), dict(interpolation="linear")])
def test_an_environment_with_another_controller_keeps_robosuites_control_step(monkeypatch, change):
    import robosuite
    name = change.get("type", "OSC_POSE")
    controller = robosuite.load_controller_config(default_controller=name) | change
    env = robosuite.make("Lift", robots="Panda", controller_configs=controller, has_renderer=False,
                         has_offscreen_renderer=False, use_camera_obs=False)
    env.reset()
    asked, step = [], env.step
    monkeypatch.setattr(env, "step", lambda action: asked.append(action) or step(action))
    for _ in range(3):
        control_step.control_step(env, np.zeros(env.action_dim))
    assert len(asked) == 3
    env.close()
