"""LIBERO's control step at the speed of its physics.

In each of the 25 physics steps of a control step robosuite 1.4 computes everything three times, and most of
its controller in Python. Here that is once, as in robosuite 1.5, and compiled: three to four times as fast.
Results differ by rounding and by what MuJoCo's contact solver starts from (docs/CONTROL_STEP.md).

FastStep, mixed into a suite of robosuite, gives the suite this step.
"""
from functools import cache

import numpy as np

BLOCKS = np.kron(np.eye(2), np.ones((3, 3)))  # 6 6: which pairs are both of force, or both of torque


def osc_torques(mass, jacobian, place, axes, angles, speeds, bias, law):
    """robosuite's controller OSC_POSE: the torques (7,) that take the hand to its goal.

    mass (V, V), jacobian (6, V), speeds (V,) and bias (V,) are over the scene's V degrees of freedom, place
    (3,) and axes (3, 3) are the hand's. law: which of V and of angles are the arm's; goal, rest and gains.
    """
    arm, joints, goal, goal_axes, rest, stiffness, damping = law
    mass, jacobian, speeds = mass[arm][:, arm], jacobian[:, arm], speeds[arm]
    turn = goal_axes @ axes.T
    twist = [turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]
    error = np.append(goal - place, np.array(twist) / 2)
    wrench = stiffness * error - damping * (jacobian @ speeds)
    mobility = jacobian @ np.linalg.inv(mass) @ jacobian.T  # 6 6, the inverse of the hand's inertia
    # robosuite finds the force as if the hand turned freely, and the torque as if it moved freely.
    uncoupled = mobility * BLOCKS
    # The joints are pulled to rest, too, but for the part of that which the hand would feel.
    pull = 10 * (rest - angles[joints]) - 2 * np.sqrt(10) * speeds
    wrench = np.linalg.inv(uncoupled) @ wrench - np.linalg.inv(mobility) @ (jacobian @ pull)
    return jacobian.T @ wrench + mass @ pull + bias[arm]


@cache
def compiled_torques():
    """osc_torques, five times as fast: compiled by numba, as robosuite has its own, and kept on disk."""
    from robosuite.utils.numba import jit_decorator
    return jit_decorator(osc_torques)


def grips(gripper, action, number):
    """The positions, -1 to 1, that the fingers are sent to in each of a number of physics steps."""
    # A closing hand closes bit by bit. Once it stands still it goes on to.
    positions = [gripper.format_action(action), gripper.format_action(action)]
    while len(positions) < number and not np.array_equal(positions[-1], positions[-2]):
        positions.append(gripper.format_action(action))
    return positions + [positions[-1]] * (number - len(positions))


def control_step(env, action):
    """What robosuite's env.step(action) does, but for observables and the robot's chunk of recent values.

    It leaves environments with another controller, several robots or an interpolator to env.step.
    """
    import mujoco
    from robosuite.controllers.osc import OperationalSpaceController
    robot = env.robots[0]
    law = robot.controller
    known = (len(env.robots) == 1 and type(law) is OperationalSpaceController and law.use_ori
             and law.uncoupling and not law.interpolator_pos and robot.gripper.dof)
    # After a reset the controller still sees the arm as it was then: the first step is robosuite's own.
    if not known or not law.new_update:
        return env.step(action)
    env.timestep += 1
    law.set_goal(action[:law.control_dim])
    law.new_update = True  # the next goal starts from where the hand is then
    model, data, site = env.sim.model._model, env.sim.data._data, robot.eef_site_id
    mass, jacobian = np.empty((model.nv, model.nv)), np.empty((6, model.nv))
    place, axes = data.site_xpos[site], data.site_xmat[site].reshape(3, 3)
    state = (mass, jacobian, place, axes, data.qpos, data.qvel, data.qfrc_bias)  # views of MuJoCo's
    goal = (np.array(law.qvel_index), np.array(law.qpos_index), law.goal_pos, law.goal_ori,
            law.initial_joint, law.kp, law.kd)
    motors = np.array(robot._ref_joint_actuator_indexes)
    fingers = np.array(robot._ref_joint_gripper_actuator_indexes)
    low, high = model.actuator_ctrlrange[fingers].T
    number = int(env.control_timestep / env.model_timestep)
    positions = grips(robot.gripper, action[law.control_dim:], number)
    commands = (low + high) / 2 + (high - low) / 2 * np.array(positions)
    torques, ctrl = compiled_torques(), data.ctrl
    for step in range(number):
        if step:  # set_goal has done that for the first
            mujoco.mj_step1(model, data)
        mujoco.mj_fullM(model, mass, data.qM)
        mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], site)
        ctrl[motors] = torques(*state, goal)  # MuJoCo clips them to the motors' range
        ctrl[fingers] = commands[step]
        mujoco.mj_step2(model, data)
    env.cur_time += env.control_timestep
    env._post_action(action)  # the reward, and what LIBERO's fixtures do: a stove that turns on


class FastStep:
    """A suite of robosuite whose control steps are computed here."""
    CONTROL_STEP = "fast"

    def control_step(self, action):
        """Run one action (A,) for 50 ms: what self.env.step(action) does, three to four times as fast."""
        control_step(self.env, action)
