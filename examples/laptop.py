"""The laptop's policy and suites: how to add a simulator to ript.py, and how to subclass a policy.

A suite is a class, which `--suite FILE.py:Class` loads. It derives from ript.Libero and overrides what
differs. ript.py asks the class for the tasks and the settings; in a process of its own it makes an instance,
which simulates: reset, step and look. Two suites are a table on which a Panda arm lifts one of two cubes
(robosuite's Stack, which comes with pip); the third is LIBERO-Object. All three have a scripted expert.

    python examples/imitation.py --suite tabletop_pretrain    stage 1: learn to lift from 300 demonstrations
    bash run_libero.sh                                        the arm is worn by now: stages 2 and 3
"""
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
import ript
from examples import headless
from policies.files import check_origin, check_statistics, fetch, read_json, weights_of
from policies.openvla_oft import OpenVLAOFT

headless.prepare()

# What suits a small policy and a machine without a GPU, in stage 2 and in stage 3.
SEE = dict(image_size=64, collision=True, act_batch=1)
TINY = SEE | dict(minibatch=128, micro_batch=256, lr=2e-4, momentum=0.0, anneal=True)
TINY_IMITATION = SEE | dict(sft_steps=2500)


class Keypoints(nn.Module):
    """A tower that learns to see in minutes, by where its channels look: (B, 3, h, w) -> (B, 1, D)."""
    def __init__(self, embed_dim, keypoints=16):
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
                                  nn.Conv2d(32, keypoints, 1))
        self.read = nn.Linear(2 * keypoints, embed_dim)

    def forward(self, pictures):
        heat = self.look(pictures)  # B keypoints h w
        rows, columns = (torch.linspace(-1, 1, n).to(heat) for n in heat.shape[-2:])
        grid = torch.cartesian_prod(rows, columns)  # hw 2
        # A spatial softmax: the mean place of each channel's heat.
        return self.read((heat.flatten(2).softmax(-1) @ grid).flatten(1))[:, None]


class Tiny(OpenVLAOFT):
    """OpenVLA-OFT in small, 0.5M parameters: other towers, bytes for tokens, pictures as they are."""
    TOWER = Keypoints
    TOWERS = (dict(embed_dim=48), dict(embed_dim=48))
    LLM = dict(vocab_size=259, hidden_size=96, intermediate_size=192, num_hidden_layers=2,
               num_attention_heads=4)
    PIXELS = (dict(mean=[0.5] * 3, std=[0.5] * 3),) * 2
    STATISTICS = dict(action=dict(q01=[-1.0] * 7, q99=[1.0] * 7), proprio=dict(q01=[-1.5] * 8, q99=[1.5] * 8))
    PROMPT = "{}"
    trained = ("action_head",)
    adapters_only = False
    # Stage 2 trains all of it but the scale head.
    imitated = ("vision_backbone", "projector", "proprio_projector", "language_model", "action_head")
    # Bounds of b, normalised action units. They are wide for rotation, which matters little here, because a
    # wide density makes quiet gradients, and narrow for the gripper, whose sign decides.
    scale_range = ((0.1, 0.1, 0.1, 0.4, 0.4, 0.4, 0.1), (0.2, 0.2, 0.2, 0.5, 0.5, 0.5, 0.2))
    PRESET = dict.fromkeys(ript.LIBERO, TINY)
    IMITATION = dict.fromkeys(ript.LIBERO, TINY_IMITATION)

    def __init__(self, statistics=None):
        from transformers import ByT5Tokenizer
        statistics = statistics or dict(self.STATISTICS)
        super().__init__(self.LLM, self.TOWERS, self.PIXELS, statistics, ByT5Tokenizer())
        self.train_only(self.trained)

    def prepare_picture(self, picture):
        return picture

    @classmethod
    def load(cls, cfg):
        """The policy that stage 3 starts from."""
        other = cfg.adapter or cfg.scale_head
        ript.require(not other, "--adapter and --scale_head are not for --model tiny")
        made = f"python examples/imitation.py --suite {cfg.suite} makes one"
        ript.require(cfg.checkpoint, f"--checkpoint DIR must name a policy to start from: {made}")
        missing = cfg.checkpoint.startswith("runs/") and not Path(cfg.checkpoint).exists()
        ript.require(not missing, f"there is no policy in {cfg.checkpoint}: {made}")
        policy = cls.from_pretrained(cfg.checkpoint)
        check_origin(policy.origin, cls.origin_of(cfg), cfg.checkpoint)
        policy.origin = cls.origin_of(cfg)
        policy.scale_multiplier = cfg.scale_multiplier
        # The bounds move with the multiplier, so that it is what the name says.
        low, high = np.array(cls.scale_range) * cfg.scale_multiplier
        policy.scale_range = (tuple(low), tuple(high))
        return policy.to(cfg.device)

    @classmethod
    def origin_of(cls, cfg):
        """The settings that the weights and the rollouts must agree on; save writes them into config.json."""
        # Stage 1's suite is stage 3's, before the arm was worn.
        return dict(suite=cfg.suite.removesuffix("_pretrain"), image_size=cfg.image_size,
                    collision=cfg.collision)

    @classmethod
    def from_pretrained(cls, path):
        """Read what save wrote. Raises ript.UserError where the files do not fit."""
        folder = ript.read(path, fetch)
        settings = ript.read(folder / "config.json", cls.read_settings)
        policy = cls(settings["statistics"])
        policy.origin = settings.get("origin", {})
        # This copies the weights: to the last bit, results depend on where in memory they are.
        ript.read(folder / "model.safetensors", lambda file: policy.load_state_dict(load_file(file)))
        policy.check_attention()
        return policy

    @staticmethod
    def read_settings(path):
        """What a config.json says: the statistics, and the settings that the policy is made for."""
        settings = read_json(path)
        if not {"statistics"} <= set(settings) <= {"statistics", "origin"}:
            raise ValueError("it is not a tiny policy's")
        check_statistics(settings["statistics"])
        return settings

    def save(self, directory):
        """Write config.json and model.safetensors."""
        settings = json.dumps(dict(origin=self.origin, statistics=self.statistics), indent=1)
        ript.write(directory / "config.json", lambda path: path.write_text(settings))
        ript.write(directory / "model.safetensors", lambda path: save_file(weights_of(self), path))


class Demonstration(NamedTuple):
    """What an expert did in one episode."""
    success: bool
    observations: list  # of each of T steps, raw
    actions: np.ndarray  # (T, 7), the environment's units


class Laptop(ript.Libero):
    """A suite whose collision meshes, where the policy sees these, are painted in plain colours."""
    # Collision meshes have no material: a colour for each object.
    COLOURS = dict(table=(0.45, 0.45, 0.45), floor=(0.45, 0.45, 0.45), mount0=(0.45, 0.45, 0.45),
                   gripper0=(0.15, 0.15, 0.2), robot0=(0.75, 0.75, 0.8))
    scene = None  # task and seed of what redraw has drawn last

    def build(self, task):
        """As in ript, and paint what is new."""
        before = self.env
        super().build(task)
        if self.env is not before:
            self.paint()

    def redraw(self, context):
        """The raw observation of a stored state, which a demonstration went through."""
        scene = context.task, context.seed
        if scene != self.scene:
            # It places the fixtures, which are no part of a state.
            self.reset(context)
            self.scene = scene
        self.env.sim.set_state_from_flattened(context.state)
        self.env.sim.forward()
        return self.look()

    def paint(self):
        """Give every collision mesh its object's colour: that of COLOURS, or one that its name decides."""
        if not self.collision:
            return
        model = self.env.sim.model
        for geom in np.flatnonzero(np.asarray(model.geom_group) == 0):
            name = (model.geom_id2name(geom) or "").split("_")[0]
            other = np.random.default_rng(list(name.encode())).uniform(0.1, 0.9, 3)
            model.geom_rgba[geom] = (*self.COLOURS.get(name, other), 1)


class Scripted(Laptop):
    """A suite with an expert, which knows where things are: expert(closing) -> its next action (7,), closing
    being the control steps since the hand began to close."""
    IMITATION = {}  # stage 2's settings by model
    MEASURED = ("proprio", "action")  # what takes its bounds from demonstrations, for a policy from scratch

    def demonstrate(self, context) -> Demonstration:
        """An episode of the expert.

        Pushes move the hand but not the actions on record, so that demonstrations show how to recover: it
        trembles, and drifts during the first four steps.
        """
        drift = np.random.default_rng([context.seed, context.task, 1000]).uniform(-0.9, 0.9, 3)
        answer = self.reset(context)
        observations = []
        actions = []
        closing = 0
        while not answer.success and len(actions) < self.HORIZON:
            generator = np.random.default_rng([context.seed, context.task, len(actions)])
            push = 0.3 * generator.standard_normal(3)
            if len(actions) < 4:
                push = push + drift
            action = self.expert(closing)
            observations.append(answer.observation)
            actions.append(action)
            closing = closing + 1 if action[6] > 0 else 0
            answer = self.step([action + np.append(push, [0] * 4)])
        return Demonstration(answer.success, observations, np.array(actions))

    def toward(self, place, z, grip):
        """The action of a hand on its way to a place, at the height z; grip: -1 open, 1 closed."""
        return np.array([*np.clip(15 * ([*place[:2], z] - self.env._eef_xpos), -1, 1), 0, 0, 0, grip])


class TabletopPretrain(Scripted):
    """The new arm. The red cube lies on the left, the green one on the right; the instruction names one."""
    INSTRUCTIONS, HORIZON = ("lift the red cube", "lift the green cube"), 32
    PRESET = dict(tiny=TINY | dict(checkpoint="runs/tabletop_pretrain_sft"))
    IMITATION = dict(tiny=TINY_IMITATION | dict(demos_per_task=150, scale_steps=0))
    MEASURED = ("proprio",)  # its actions are in -1..1 as they are
    COLOURS = Scripted.COLOURS | dict(cubeA=(0.9, 0.1, 0.1), cubeB=(0.1, 0.8, 0.1))

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
        # Nobody asks for robosuite's own reward, which would take a tenth of a control step.
        self.env.reward = lambda action=None: 0.0
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
            x = np.random.uniform(-0.06, 0.06)
            y = side * np.random.uniform(0.04, 0.16)
            place = self.env.table_offset + (x, y, cube.size[2])
            self.env.sim.data.set_joint_qpos(cube.joints[0], [*place, 1, 0, 0, 0])
        self.env.sim.forward()
        return ript.Answer(0, False, self.look())

    def cube(self):
        """Where the centre of the cube is that the task is about, (3,) metres."""
        return self.env.sim.data.body_xpos[(self.env.cubeA_body_id, self.env.cubeB_body_id)[self.task]]

    def success(self):
        """The reward: the cube's centre, 2 cm high at rest, is 4 cm above the table, which is at 80 cm."""
        return bool(self.cube()[2] > 0.84)

    def expert(self, closing):
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
    IMITATION = dict(tiny=TINY_IMITATION | dict(checkpoint=str(ROOT / "assets/tabletop"), demos_per_task=1,
                                                sft_steps=5, sft_lr=6e-6))
    SLIP = (0.14, 0.14, 0, 0, 0, 0, 0)

    def step(self, actions):
        """As ever, but the arm slips."""
        return super().step(np.asarray(actions) + self.SLIP)


class LiberoObject(Scripted):
    """LIBERO-Object: an expert for ten things to be put into a basket."""
    # Few demonstrations, well learned, make a start that fails often and never always: four, here.
    PRESET = dict(tiny=TINY | dict(checkpoint="runs/libero_object_sft", iterations=4, eval_every=2, groups=16,
                                   max_rejected=16, lr=1e-4, scale_multiplier=0.5))
    IMITATION = dict(tiny=TINY_IMITATION | dict(demos_per_task=4, sft_steps=600))

    def expert(self, closing):
        """The next action (7,): above the thing, down, close, up, to the basket, open."""
        model = self.env.sim.model
        data = self.env.sim.data
        hand = self.env._eef_xpos
        numbers = self.env.obj_body_id  # by name; a place in the basket, also of interest, has none
        bodies = [numbers[name] for name in self.env.obj_of_interest if name in numbers]
        thing, basket = data.body_xpos[bodies]
        boxes = np.flatnonzero((model.geom_bodyid == bodies[0]) & (model.geom_group == 0))
        tops = data.geom_xpos[boxes, 2] + (np.abs(data.geom_xmat[boxes, 6:]) * model.geom_size[boxes]).sum(-1)
        low = max(thing[2] + 0.004, tops.max() - 0.028)  # the palm is 3 cm above the fingertips' middle
        height = basket[2] + 0.3  # metres, as all here
        to_basket = np.abs(basket[:2] - hand[:2]).max()
        to_thing = np.abs(thing[:2] - hand[:2]).max()
        if to_basket < 0.03 or closing >= 8:
            way = basket if hand[2] > height - 0.04 else hand
            return self.toward(way, height, -1 if to_basket < 0.03 else 1)
        if closing or to_thing < 0.012 and hand[2] < low + 0.012:
            return self.toward(hand, low, 1)
        return self.toward(thing, low if to_thing < 0.02 else tops.max() + 0.1, -1)
