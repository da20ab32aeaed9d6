"""How to add a simulator to ript.py: suites for a laptop, with scripted demonstrations.

A suite is a class, which `--suite FILE.py:Class` loads. It derives from ript.Libero and overrides what
differs. ript.py asks the class for the tasks and the settings; in a process of its own it makes an instance,
which simulates: reset, step, look and draw. Two suites are a table on which a Panda arm lifts one of two
cubes (robosuite's Stack, which comes with pip); the third is LIBERO-Object.

    python ript.py --suite tabletop_pretrain    learn to lift from 300 demonstrations, with a new arm
    python ript.py --suite tabletop             the arm is worn by now: RIPT makes up for it
    python ript.py --suite libero_object --task 0    from nothing to a task of LIBERO
"""
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ript import DEMO_SEEDS, TINY, Context, Episode, Libero, interval, say, simulate, tasks_of

class Scripted(Libero):
    """A suite with an expert, which knows where things are: expert(closing) -> its next action (7,), closing
    being the control steps since the hand began to close."""

    @classmethod
    def scripted(cls, workers, cfg):
        """Episodes in which the expert succeeds, cfg.demos_per_task of every task."""
        seeds = range(DEMO_SEEDS * (1 + cfg.seed), DEMO_SEEDS * (1 + cfg.seed) + cfg.demos_per_task)
        contexts = [Context(task, text, seed) for seed in seeds for task, text in tasks_of(cfg).items()]
        queue, demos, attempts = deque(Episode(c, number) for number, c in enumerate(contexts)), [], 0
        episodes = simulate(None, workers, queue, cfg, method="demonstrate")
        for episode in tqdm(episodes, "demonstrations", leave=False, disable=None):
            attempts += 1
            if episode.success:
                records = [dict(look=partial(dict, raw), label=action) for raw, action in episode.frames]
                demos.append(replace(episode, records=records, frames=[]))
            elif attempts < 50 + 3 * len(contexts):  # another scene instead
                context = replace(episode.context, seed=episode.context.seed + 1000)
                queue.append(Episode(context, episode.group))
        say(f"scripted expert: success in {interval(len(demos), attempts)} of attempts")
        return sorted(demos, key=lambda demo: demo.group)

    def demonstrate(self, context):
        """An episode of the expert: -> an answer like step's, with pairs (observation, action) for frames.

        Pushes move the hand but not the actions on record, so that demonstrations show how to recover: it
        trembles, and drifts during the first four steps.
        """
        draws = lambda step: np.random.default_rng([context.seed, context.task, step])
        drift, closing, pairs = draws(1000).uniform(-0.9, 0.9, 3), 0, []
        _, success, observation, _ = self.reset(context)
        while not success and len(pairs) < self.HORIZON:
            push = 0.3 * draws(len(pairs)).standard_normal(3) + (drift if len(pairs) < 4 else 0)
            action = self.expert(closing)
            pairs.append((observation, action))
            closing = closing + 1 if action[6] > 0 else 0
            _, success, observation, _ = self.step([action + np.append(push, [0] * 4)])
        return len(pairs), success, None, pairs

    def toward(self, place, z, grip):
        """The action of a hand on its way to a place, at the height z; grip: -1 open, 1 closed."""
        return np.array([*np.clip(15 * ([*place[:2], z] - self.env._eef_xpos), -1, 1), 0, 0, 0, grip])

class TabletopPretrain(Scripted):
    """The new arm. The red cube lies on the left, the green one on the right; the instruction names one."""
    INSTRUCTIONS, HORIZON = ("lift the red cube", "lift the green cube"), 32
    PRESET = dict(tiny=TINY | dict(demos_per_task=150, scale_steps=0, iterations=0))
    MEASURED = ("proprio",)  # its actions are in -1..1 as they are
    COLOURS = Libero.COLOURS | dict(cubeA=(0.9, 0.1, 0.1), cubeB=(0.1, 0.8, 0.1))

    @classmethod
    def held_out(cls, task, number):
        """Seeds that nothing else uses are enough: no states."""
        return [None] * number

    def build(self, task):
        """One scene serves both tasks: a stiff arm, the hand 15 cm above the table."""
        self.task = task
        if self.env:
            return
        import robosuite  # here, since only the simulator's process needs it
        controller = robosuite.load_controller_config(default_controller="OSC_POSE")
        controller["kp"] = 300  # twice the default stiffness: 22 control steps for an episode, not 30
        for bound in ("output_max", "output_min"):  # 0.05 rad a step, not 0.5: there is nothing to turn
            controller[bound][3:] = [x / 10 for x in controller[bound][3:]]
        self.env = robosuite.make("Stack", controller_configs=controller, initialization_noise=None,
                                  **self.ROBOT)
        self.env.robots[0].init_qpos = np.array([0, 0.548, 0, -2.235, 0, 2.910, 0.785])
        model = self.env.sim.model
        model.cam_fovy[model.camera_name2id("agentview")] = 35  # degrees; 45 shows more floor than table
        self.paint()

    def reset(self, context):
        """Seed, reset, and put each cube into a square of 12 cm; nothing falls, so nothing has to settle."""
        self.build(context.task)
        np.random.seed(context.seed % 2 ** 32)
        self.env.reset()
        for cube, side in ((self.env.cubeA, -1), (self.env.cubeB, 1)):
            x, y = np.random.uniform(-0.06, 0.06), side * np.random.uniform(0.04, 0.16)
            place = self.env.table_offset + (x, y, cube.size[2])
            self.env.sim.data.set_joint_qpos(cube.joints[0], [*place, 1, 0, 0, 0])
        self.env.sim.forward()
        return 0, False, self.look(), []

    def cube(self):
        """Where the centre of the cube is that the task is about, (3,) metres."""
        return self.env.sim.data.body_xpos[(self.env.cubeA_body_id, self.env.cubeB_body_id)[self.task]]

    def success(self):
        """The reward: the cube's centre, 2 cm high at rest, is 4 cm above the table, which is at 80 cm."""
        return bool(self.cube()[2] > 0.84)

    def expert(self, closing):
        """The next action (7,): above the cube, down, close, up."""
        cube, hand, low = self.cube(), self.env._eef_xpos, 0.815
        off = np.abs(cube[:2] - hand[:2]).max()  # metres
        if closing >= 6:
            return self.toward(hand, 1, 1)
        if closing or off < 0.012 and hand[2] < low + 0.012:
            return self.toward(hand, low, 1)
        return self.toward(cube, low if off < 0.02 else 0.88, -1)

class Tabletop(TabletopPretrain):
    """The arm, worn since pretraining, adds SLIP to every action."""
    PRESET = dict(tiny=TINY | dict(
        checkpoint=str(Path(__file__).parents[1] / "assets/tabletop"), demos_per_task=1, sft_steps=5,
        sft_lr=6e-6, iterations=6, groups=16, max_rejected=12, eval_every=2))
    SLIP = (0.14, 0.14, 0, 0, 0, 0, 0)

    def step(self, actions, film=False):
        """As ever, but the arm slips."""
        return super().step(np.asarray(actions) + self.SLIP, film)

class LiberoObject(Scripted):
    """LIBERO-Object: an expert for ten things to be put into a basket."""
    # Few demonstrations, well learned, make a start that fails often and never always: four, here.
    PRESET = dict(tiny=TINY | dict(demos_per_task=4, sft_steps=600, iterations=4, eval_every=2, groups=16,
                                   max_rejected=16, lr=1e-4, scale_multiplier=0.5))

    def expert(self, closing):
        """The next action (7,): above the thing, down, close, up, to the basket, open."""
        model, data, hand = self.env.sim.model, self.env.sim.data, self.env._eef_xpos
        numbers = self.env.obj_body_id  # by name; a place in the basket, also of interest, has none
        bodies = [numbers[name] for name in self.env.obj_of_interest if name in numbers]
        thing, basket = data.body_xpos[bodies]
        boxes = np.flatnonzero((model.geom_bodyid == bodies[0]) & (model.geom_group == 0))
        tops = data.geom_xpos[boxes, 2] + (np.abs(data.geom_xmat[boxes, 6:]) * model.geom_size[boxes]).sum(-1)
        low = max(thing[2] + 0.004, tops.max() - 0.028)  # the palm is 3 cm above the fingertips' middle
        off, height = lambda place: np.abs(place[:2] - hand[:2]).max(), basket[2] + 0.3  # metres
        if off(basket) < 0.03 or closing >= 8:
            way = basket if hand[2] > height - 0.04 else hand
            return self.toward(way, height, -1 if off(basket) < 0.03 else 1)
        if closing or off(thing) < 0.012 and hand[2] < low + 0.012:
            return self.toward(hand, low, 1)
        return self.toward(thing, low if off(thing) < 0.02 else tops.max() + 0.1, -1)
