"""MetaWorld ML45, the paper's second benchmark: a Sawyer arm, 45 tasks to train on and 5 to test on.

    python scripts/sft.py --suite metaworld --task 14    stage 2, from scripted demonstrations: open a drawer
    python ript.py --suite metaworld --task 14           stage 3

It is also an example of a suite that is not in robosuite: four actions (the hand's motion, at most 1 cm a
step, and the gripper, which is a number and not a sign), proprio that the suite itself gives, a horizon for
each task. Two cameras look: corner2 from where QueST's authors put it, and the one in the hand.
"""
import importlib.util
import warnings
from collections import OrderedDict

import numpy as np

import ript
from simulators import environment
from simulators.scripted import TINY, TINY_IMITATION, Scripted

environment.prepare()
if importlib.util.find_spec("metaworld") is None:
    raise ImportError("MetaWorld is missing: pip install -c requirements.txt metaworld==3.0.0")

# Control steps that the expert takes, the median of seeds 0 to 9; the last five are the test tasks.
EXPERT_STEPS = {
    "assembly": 89, "basketball": 93, "button-press-topdown": 67, "button-press-topdown-wall": 58,
    "button-press": 60, "button-press-wall": 65, "coffee-button": 38, "coffee-pull": 78, "coffee-push": 55,
    "dial-turn": 73, "disassemble": 114, "door-close": 62, "door-open": 83, "drawer-close": 78,
    "drawer-open": 89, "faucet-open": 59, "faucet-close": 66, "hammer": 70, "handle-press-side": 45,
    "handle-press": 35, "handle-pull-side": 84, "handle-pull": 104, "lever-pull": 79, "pick-place-wall": 90,
    "pick-out-of-hole": 112, "push-back": 184, "pick-place": 52, "plate-slide": 51, "plate-slide-side": 47,
    "plate-slide-back": 56, "plate-slide-back-side": 45, "peg-insert-side": 93, "peg-unplug-side": 122,
    "soccer": 84, "stick-push": 73, "stick-pull": 119, "push-wall": 80, "push": 60, "reach-wall": 46,
    "reach": 44, "shelf-place": 93, "sweep-into": 52, "sweep": 86, "window-open": 89, "window-close": 81,
    "bin-picking": 110, "box-close": 103, "hand-insert": 60, "door-lock": 63, "door-unlock": 43,
}


class MetaWorld(Scripted, ript.Suite):
    """What the suites below share. NAME is the suite's, and NAMES are those of its tasks."""
    NAME = "metaworld"
    MEASURED = ("proprio",)  # its actions are in -1..1 as they are
    STATISTICS = dict(action=dict(q01=[-1.0] * 4, q99=[1.0] * 4, mask=[True] * 4))
    IMITATION = dict(tiny=TINY_IMITATION | dict(demos_per_task=10, sft_steps=1200))
    CAMERAS = dict(agentview="corner2", robot0_eye_in_hand="gripperPOV")
    # Of the arm's bodies, whose meshes have 67,000 triangles.
    ARM = ("right_l", "right_arm", "head", "pedestal", "screen", "torso", "right_hand", "controller")
    TRAIN_ALL = True  # in stage 3: its head alone learns some of these tasks and others not
    KEPT = 4  # environments per process, of 95 MB each; making one takes two seconds

    def __init_subclass__(cls):
        """Instructions, horizons and settings for these names."""
        cls.INSTRUCTIONS = tuple(name.replace("-", " ") for name in cls.NAMES)
        # Two and a half times the expert's, in whole queries of eight; MetaWorld allows 500.
        cls.HORIZON = tuple(min(496, 8 * round(2.5 * EXPERT_STEPS[name] / 8)) for name in cls.NAMES)
        settings = dict(iterations=8, eval_every=4, groups=8, max_rejected=20, minibatch=32, lr=1e-4,
                        clip_coef=0.9)
        cls.PRESET = dict(tiny=TINY | settings | dict(checkpoint=f"runs/{cls.NAME}_sft"))

    def __init__(self, image_size=256, collision=False):
        super().__init__(image_size, collision)
        self.kept = OrderedDict()  # environments by task, that of the last episode last
        self.renderers = {}  # by task and size

    def make_env(self, task: int):
        """Make the task's environment, unless it is one of the last few."""
        if task not in self.kept:
            environment.init_worker()
            warnings.filterwarnings("ignore", module="metaworld|gymnasium")
            if len(self.kept) == self.KEPT:
                oldest, _ = self.kept.popitem(last=False)
                for key in [key for key in self.renderers if key[0] == oldest]:
                    self.renderers.pop(key).close()
            self.kept[task] = self.new_env(task)
        self.kept.move_to_end(task)
        self.env, self.task = self.kept[task], task

    def new_env(self, task):
        """An environment whose reset is a function of the seed, and whose pictures are cheap."""
        import mujoco  # here, as what follows, since only the simulator's process needs it
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        env = ALL_V3_ENVIRONMENTS[f"{self.NAMES[task]}-v3"]()
        env._partially_observable = env._freeze_rand_vec = False
        env.seeded_rand_vec = env._set_task_called = True
        env.__dict__.pop("sawyer_observation_space", None)  # its bounds would clip the experts' goal to zero
        model = env.model
        model.cam_pos[model.camera("corner2").id] = 0.75, 0.075, 0.7
        # As they come, shadows of 4096 pixels take a tenth of a second a picture.
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
        for geom in range(model.ngeom):
            name = model.body(model.geom_bodyid[geom]).name
            if name == "tablelink":  # lies within the table, and flickers there
                model.geom_group[geom] = 5
            elif model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH and name.startswith(self.ARM):
                model.geom_group[geom] = 4
        return env

    def reset(self, context: ript.Context) -> ript.StepResult:
        """Seed and reset."""
        self.make_env(context.task)
        self.env.seed(context.seed % 2 ** 32)
        self.env.reset()
        # Many tasks place things at their reset's end. MuJoCo must know it before the first picture.
        self.env.set_state(self.env.data.qpos, self.env.data.qvel)
        self.env._prev_obs = self.env._get_curr_obs_combined_no_goal()
        self.seen, self.solved = self.env._get_obs(), False
        return ript.StepResult(0, False, self.get_observation())

    def control_step(self, action):
        """Run one action (4,), for a sixteenth of a second."""
        self.seen, *_, info = self.env.step(np.clip(action, -1, 1))
        self.solved = bool(info["success"])

    def success(self) -> bool:
        """The reward: MetaWorld's own success at the last control step."""
        return self.solved

    def get_observation(self) -> dict:
        """Two pictures, and proprio (8,): the hand's place in metres and how far the gripper is open, 0 to 1,
        now and one control step ago, as QueST's authors have it."""
        pictures = {f"{camera}_image": self.render(camera, self.image_size, self.collision)
                    for camera in self.CAMERAS}
        return pictures | dict(proprio=np.concatenate([self.seen[:4], self.seen[18:22]]))

    def render(self, camera, size, collision):
        """One picture (size, size, 3) uint8, upside down as OpenGL has it; collision: without the arm."""
        import mujoco
        if (self.task, size) not in self.renderers:
            self.renderers[self.task, size] = mujoco.Renderer(self.env.model, size, size)
        renderer = self.renderers[self.task, size]
        option = mujoco.MjvOption()
        option.geomgroup[4] = not collision
        renderer.update_scene(self.env.data, self.CAMERAS[camera], option)
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        return renderer.render()[::-1]

    def expert(self, closing: int) -> np.ndarray:
        """The next action (4,) of MetaWorld's scripted policy, which knows where things are."""
        from metaworld.policies import ENV_POLICY_MAP
        return np.clip(ENV_POLICY_MAP[f"{self.NAMES[self.task]}-v3"]().get_action(self.seen), -1, 1)


class ML45(MetaWorld):
    """The tasks to train on."""
    NAMES = tuple(EXPERT_STEPS)[:45]


class ML45Test(MetaWorld):
    """The tasks to test on."""
    NAME, NAMES = "metaworld_test", tuple(EXPERT_STEPS)[45:]


class FewShot(MetaWorld):
    """The tasks of which QueST's authors give few demonstrations."""
    NAME = "metaworld_few_shot"
    NAMES = ("box-close", "disassemble", "hand-insert", "pick-place-wall", "stick-pull")
