"""The laptop's suites, and an example of how to add a simulator to ript.py.

A suite is a class, which `--suite FILE.py:Class` loads. It derives from ript.Suite, or where the simulator is
robosuite from ript.Robosuite. ript.py asks the class for the tasks and the settings; in a process of its own
it makes an instance, which simulates: reset, step and get_observation. The two suites here are a table on
which a Panda arm lifts one of two cubes (robosuite's Stack, which comes with pip).

    python scripts/sft.py --suite tabletop_pretrain    stage 1: learn to lift from 300 demonstrations
    bash run_libero.sh                                 the arm is worn by now: stages 2 and 3
"""
from pathlib import Path

import numpy as np

import ript
from simulators import environment
from simulators.control_step import FastStep
from simulators.scripted import TINY, TINY_IMITATION, Painted, Scripted

environment.prepare()

PRETRAINED = Path(__file__).resolve().parents[1] / "policies/tabletop"  # what stage 1 has made


class TabletopPretrain(FastStep, Painted, Scripted, ript.Robosuite):
    """The new arm. The red cube lies on the left, the green one on the right; the instruction names one."""
    INSTRUCTIONS, HORIZON = ("lift the red cube", "lift the green cube"), 32
    PRESET = dict(tiny=TINY | dict(checkpoint="runs/tabletop_pretrain_sft"))
    IMITATION = dict(tiny=TINY_IMITATION | dict(demos_per_task=150, scale_steps=0))
    MEASURED = ("proprio",)  # its actions are in -1..1 as they are
    COLOURS = Painted.COLOURS | dict(cubeA=(0.9, 0.1, 0.1), cubeB=(0.1, 0.8, 0.1))

    def make_env(self, task: int):
        """One scene serves both tasks: a stiff arm, the hand 15 cm above the table."""
        self.task = task
        if self.env:
            return
        environment.init_worker()
        import robosuite  # here, since only the simulator's process needs it
        controller = robosuite.load_controller_config(default_controller="OSC_POSE")
        controller["kp"] = 300  # twice the default stiffness: 22 control steps for an episode, not 30
        for bound in ("output_max", "output_min"):  # 0.05 rad a step, not 0.5: there is nothing to turn
            controller[bound][3:] = [x / 10 for x in controller[bound][3:]]
        self.env = robosuite.make("Stack", controller_configs=controller, initialization_noise=None,
                                  **self.ROBOT)
        # robosuite's own reward is not used, and would take a tenth of a control step.
        self.env.reward = lambda action=None: 0.0
        self.env.robots[0].init_qpos = np.array([0, 0.548, 0, -2.235, 0, 2.910, 0.785])
        model = self.env.sim.model
        model.cam_fovy[model.camera_name2id("agentview")] = 35  # degrees; 45 shows more floor than table
        self.paint()

    def reset(self, context: ript.Context) -> ript.StepResult:
        """Seed, reset, and put each cube into a square of 12 cm; nothing falls, so nothing has to settle."""
        self.make_env(context.task)
        np.random.seed(context.seed % 2 ** 32)
        self.env.reset()
        for cube, side in ((self.env.cubeA, -1), (self.env.cubeB, 1)):
            x = np.random.uniform(-0.06, 0.06)
            y = side * np.random.uniform(0.04, 0.16)
            place = self.env.table_offset + (x, y, cube.size[2])
            self.env.sim.data.set_joint_qpos(cube.joints[0], [*place, 1, 0, 0, 0])
        self.env.sim.forward()
        return ript.StepResult(0, False, self.get_observation())

    def cube(self):
        """Where the centre of the cube is that the task is about, (3,) metres."""
        return self.env.sim.data.body_xpos[(self.env.cubeA_body_id, self.env.cubeB_body_id)[self.task]]

    def success(self) -> bool:
        """The reward: the cube's centre, 2 cm high at rest, is 4 cm above the table, which is at 80 cm."""
        return bool(self.cube()[2] > 0.84)

    def expert(self, closing: int) -> np.ndarray:
        """The next action (7,): above the cube, down, close, up."""
        cube = self.cube()
        hand = self.env._eef_xpos
        low = 0.815
        off = np.abs(cube[:2] - hand[:2]).max()  # metres
        if closing >= 6:
            return self.toward(hand, 1, 1)
        if closing or off < 0.012 and hand[2] < low + 0.012:
            return self.toward(hand, low, 1)
        return self.toward(cube, low if off < 0.02 else 0.88, -1)


class Tabletop(TabletopPretrain):
    """The arm, worn since pretraining, adds SLIP to every action."""
    PRESET = dict(tiny=TINY | dict(checkpoint="runs/tabletop_sft", iterations=6, groups=16, max_rejected=12,
                                   eval_every=2))
    IMITATION = dict(tiny=TINY_IMITATION | dict(checkpoint=str(PRETRAINED), demos_per_task=1,
                                                sft_steps=5, sft_lr=6e-6))
    SLIP = (0.14, 0.14, 0, 0, 0, 0, 0)

    def step(self, actions):
        """As on the new arm, but the arm slips."""
        return super().step(np.asarray(actions) + self.SLIP)
