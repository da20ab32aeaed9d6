"""What the suites for small policies share: their presets, painted collision meshes and scripted experts."""
from typing import NamedTuple

import numpy as np

import ript

# Settings for a small policy on a machine without a GPU, in stage 3 and in stage 2.
SEE = dict(image_size=64, collision=True, act_batch=1)
TINY = SEE | dict(minibatch=128, micro_batch=256, lr=2e-4, adam_beta1=0.0, anneal=True)
TINY_IMITATION = SEE | dict(sft_steps=2500)


class Painted:
    """A suite of robosuite whose collision meshes have plain colours, where the policy sees them."""
    # Collision meshes have no material: a colour for each object.
    COLOURS = dict(table=(0.45, 0.45, 0.45), floor=(0.45, 0.45, 0.45), mount0=(0.45, 0.45, 0.45),
                   gripper0=(0.15, 0.15, 0.2), robot0=(0.75, 0.75, 0.8))

    def paint(self):
        """Give every collision mesh its object's colour: that of COLOURS, or one that its name decides."""
        if not self.collision:
            return
        model = self.env.sim.model
        for geom in np.flatnonzero(np.asarray(model.geom_group) == 0):
            name = (model.geom_id2name(geom) or "").split("_")[0]
            other = np.random.default_rng(list(name.encode())).uniform(0.1, 0.9, 3)
            model.geom_rgba[geom] = (*self.COLOURS.get(name, other), 1)


class Demonstration(NamedTuple):
    """What an expert did in one episode."""
    success: bool
    observations: list[dict]  # of each of T steps, raw
    actions: np.ndarray  # (T, A), the environment's units


class Scripted:
    """A suite with an expert, which knows where things are: expert(closing) -> its next action (A,), the
    hand's motion first and the gripper last; closing: control steps since the hand began to close."""
    MEASURED = ("proprio", "action")  # what takes its bounds from demonstrations, for a policy from scratch
    AFTER = 0  # control steps of a demonstration after its success

    def demonstrate(self, context: ript.Context) -> Demonstration:
        """An episode of the expert, whose hand is pushed. The pushes are not among the recorded actions, so
        that demonstrations show how to recover."""
        answer = self.reset(context)
        observations = []
        actions = []
        closing = 0
        success = answer.success
        after = int(success)
        while after <= self.AFTER and len(actions) < ript.horizon_of(self, context.task):
            action = self.expert(closing)
            seen = answer.observation
            observations.append(self.get_observation() if seen is None else seen)  # None after success
            actions.append(action)
            closing = closing + 1 if action[-1] > 0 else 0
            answer = self.step([self.disturb(action, context, len(actions) - 1)])
            success = success or answer.success
            after += success
        return Demonstration(success, observations, np.array(actions))

    def disturb(self, action, context, t):
        """What is run in place of the expert's action of step t: the hand trembles, and drifts at first."""
        push = 0.3 * np.random.default_rng([context.seed, context.task, t]).standard_normal(3)
        if t < 4:
            drift = np.random.default_rng([context.seed, context.task, 1000]).uniform(-0.9, 0.9, 3)
            push = push + drift
        return action + np.append(push, np.zeros(len(action) - 3))

    def toward(self, place, z, grip, speed=1):
        """The action of a hand on its way to a place, at the height z; grip: -1 open, 1 closed; speed: 1 is
        as fast as actions go."""
        motion = np.clip(15 * ([*place[:2], z] - self.env._eef_xpos), -speed, speed)
        return np.array([*motion, 0, 0, 0, grip])
