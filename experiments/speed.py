"""How fast rollouts are, and what an iteration costs.

    python experiments/speed.py speed     collect() against the released way of stepping and the limit
    python experiments/speed.py growth    seconds of an iteration against contexts, K, horizon and workers
    python experiments/speed.py collect   how long a collection takes with simulators that only sleep
    python experiments/speed.py noise     how often LIBERO-Object's expert succeeds under exploration's noise

Speed is measured on one task of LIBERO-Object with the same actions from the same stored states, in turns:

    released   LIBERO's SubprocVectorEnv of OffScreenRenderEnv: two pictures of 256x256 pixels at every step,
               a hard reset for each episode, in lock step
    robosuite  each worker for itself, with robosuite's control step and the pictures that a policy looks at
    collect    ript.collect, with pictures of the same kind when the policy looks
    limit      each worker for itself, as ript steps: no policy, no messages, no waiting for others
    physics    each worker for itself: mj_step with the same torques, and the pictures, and nothing else
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncio
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from os import devnull
from statistics import median

import numpy as np
import torch

import ript
from experiments.common import PRETRAINED, RESULTS, ask, write_csv
from experiments.gpu import ACTION
from policies.tiny import Tiny
from simulators.libero_experts import LiberoObject
from simulators.tabletop import TabletopPretrain

EPISODES = 4  # of 280 steps each; a multiple of the workers, which are 2
ROUNDS = 3

class Replay(torch.nn.Module):
    """A policy that shakes the hand, with the noise that exploration would have, in no time or some."""
    chunk = 8
    tokens_per_query = 0

    def __init__(self, seconds=0.0):
        super().__init__()
        self.seconds = seconds

    @classmethod
    def preprocess(cls, raw):
        return None

    def act(self, observations, instructions, generators):
        time.sleep(self.seconds)
        return [dict(actions=shake(g), scale=0.0, log_prob=np.zeros(8)) for g in generators]

def shake(generator):
    """A chunk of actions (8, 7), from the generator of an episode's query."""
    return generator.uniform(-0.3, 0.3, (8, 7))

class Recorded:
    """An actor that has the chunks of its episode already."""
    def __init__(self, chunks):
        self.chunks = chunks

    async def act(self, observation, episode):
        return dict(actions=self.chunks[len(episode.chunks)])

class Timed(LiberoObject):
    """LIBERO-Object, and how long it worked since it was last asked."""
    seconds = 0.0

    def reset(self, context):
        began = time.perf_counter()
        answer = super().reset(context)
        self.seconds += time.perf_counter() - began
        return answer

    def step(self, actions):
        began = time.perf_counter()
        answer = super().step(actions)
        self.seconds += time.perf_counter() - began
        return answer

    def busy(self):
        seconds = self.seconds
        self.seconds = 0.0
        return seconds

    def alone(self, episodes):
        """Run (context, chunks of actions) without the trainer: -> seconds."""
        began = time.perf_counter()
        for context, chunks in episodes:
            self.play(context, chunks)
        return time.perf_counter() - began

    def play(self, context, chunks):
        """An episode in this process."""
        asyncio.run(ript.rollout(self, ript.Episode(context), Recorded(chunks), self.HORIZON))

    async def call(self, method, *arguments):
        """What ript.rollout asks of a simulator."""
        return getattr(self, method)(*arguments)

    def robosuite(self, episodes):
        """The same with robosuite's own control step."""
        self.control_step = partial(ript.Robosuite.control_step, self)
        seconds = self.alone(episodes)
        del self.control_step
        return seconds

    def physics(self, episodes):
        """The same torques once more, with nothing but mj_step and the pictures: -> seconds."""
        import mujoco
        step = mujoco.mj_step2
        torques = []

        def recorded(model, data):
            torques.append(data.ctrl.copy())
            step(model, data)

        seconds = 0.0
        for context, chunks in episodes:
            mujoco.mj_step2 = recorded
            self.play(context, chunks)
            mujoco.mj_step2 = step
            del torques[:-25 * self.HORIZON]  # not those of the reset, which lets things settle
            self.reset(context)
            model = self.env.sim.model._model
            data = self.env.sim.data._data
            began = time.perf_counter()
            for place in range(0, len(torques), 8 * 25):
                for torque in torques[place:place + 8 * 25]:
                    data.ctrl[:] = torque
                    mujoco.mj_step(model, data)
                self.get_observation()
            seconds += time.perf_counter() - began
        return seconds

def quietly(function, *arguments):
    """Call a function whose messages nobody needs."""
    with open(devnull, "w") as file, redirect_stdout(file):
        return function(*arguments)

class Speed:
    """The five ways, on the same episodes."""
    def __init__(self, cfg, simulators):
        suite = ript.load_suite("libero_object")
        self.cfg = cfg
        self.simulators = simulators
        self.suite = suite
        self.states = suite.eval_init_states(0, EPISODES // 2)
        self.contexts = [ript.Context(0, suite.INSTRUCTIONS[0], 0, state) for state in self.states]
        self.numbers = [(group, k) for group in range(EPISODES // 2) for k in range(2)]

    def chunks(self, group, k):
        """The action chunks of an episode, as collect draws them."""
        queries = range(self.suite.HORIZON // 8)
        return [shake(np.random.default_rng((self.cfg.seed, 0, group, k, query))) for query in queries]

    def released(self):
        from libero.libero.envs import OffScreenRenderEnv, SubprocVectorEnv
        number = len(self.simulators.all)
        bddl_file = self.suite.benchmark.get_task_bddl_file_path(0)
        make = partial(OffScreenRenderEnv, bddl_file_name=bddl_file, camera_heights=256, camera_widths=256)
        env = SubprocVectorEnv([make] * number)
        # This waits until they are built, which is left out of the time, here as everywhere.
        env.get_sim_state()
        began = time.perf_counter()
        for start in range(0, EPISODES, number):
            part = self.numbers[start:start + number]
            env.reset()
            env.set_init_state([self.states[group] for group, _ in part])
            for _ in range(10):
                env.step(np.array([[0, 0, 0, 0, 0, 0, -1.0]] * len(part)))
            for actions in zip(*(np.concatenate(self.chunks(*numbers)) for numbers in part)):
                env.step(np.array(actions))
        seconds = time.perf_counter() - began
        env.close()
        return dict(released=EPISODES * self.suite.HORIZON / seconds)

    def collect(self):
        number = len(self.simulators.all)
        ask(self.simulators.all, "make_env", [[0]] * number)
        ask(self.simulators.all, "busy", [[]] * number)
        began = time.perf_counter()
        _, stats = quietly(ript.collect, Replay(), self.simulators, self.contexts.__getitem__,
                           ript.TrainState(), self.cfg)
        seconds = time.perf_counter() - began
        idle = 1 - sum(ask(self.simulators.all, "busy", [[]] * number)) / number / seconds
        return dict(collect=stats["env_steps"] / seconds, idle=idle)

    def alone(self, method):
        """Steps per second of simulators that each work alone, by a method of Timed."""
        number = len(self.simulators.all)
        ask(self.simulators.all, "make_env", [[0]] * number)
        shares = []
        for i in range(number):
            mine = self.numbers[i::number]
            shares.append([[(self.contexts[group], self.chunks(group, k)) for group, k in mine]])
        return EPISODES * self.suite.HORIZON / max(ask(self.simulators.all, method, shares))

def speed(*more):
    """Environment steps per second of the five ways, in turns. More settings are ript.py's."""
    settings = ("--suite libero_object --task 0 --image_size 256 --rollouts 2 --collision false "
                "--max_rejected 0 --workers 2")
    cfg = ript.parse_config([*settings.split(), "--groups", str(EPISODES // 2), *more])
    cfg = replace(cfg, suite=f"{__file__}:Timed", model=f"{__file__}:Replay")
    rows = []
    with ript.open_simulators(cfg) as simulators:
        ways = Speed(cfg, simulators)
        for _ in range(ROUNDS):
            row = ways.released() | ways.collect()
            row |= dict(robosuite=ways.alone("robosuite"), limit=ways.alone("alone"),
                        physics=ways.alone("physics"))
            for other in ("released", "robosuite", "limit", "physics"):
                row[f"to_{other}"] = row["collect"] / row[other]
            print("  ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
            rows.append(row)
    write_csv(RESULTS / "speed/table.csv", rows)
    print("median  " + "  ".join(f"{name} {median(row[name] for row in rows):.3g}" for name in rows[0]))

class Coin(TabletopPretrain):
    """The laptop's scene, in which an episode runs to the horizon and then chance decides on success."""
    ran = 0

    def reset(self, context):
        self.num_executed = 0
        return super().reset(context)

    def success(self):
        self.num_executed += 1
        return self.num_executed == self.HORIZON and int(self.env._eef_xpos[0] * 1e6) % 2 == 0

class Coin16(Coin):
    HORIZON = 16

class Coin64(Coin):
    HORIZON = 64

def growth():
    """Seconds of collect and update, for one thing at a time that is halved and doubled."""
    base = dict(groups=16, rollouts=8, workers=2)
    cases = [("16 groups of 8, 32 steps, 2 workers", base, "Coin")]
    for name, numbers in dict(groups=(8, 32), rollouts=(4, 16), workers=(1, 3)).items():
        for number in numbers:
            cases.append((f"{name} {number}", base | {name: number}, "Coin"))
    cases += [("horizon 16", base, "Coin16"), ("horizon 64", base, "Coin64")]
    rows = []
    for name, settings, suite in cases:
        cfg = ript.parse_config(["--max_rejected", "0", "--minibatch", "4096",
                                 "--checkpoint", str(PRETRAINED)])
        cfg = replace(cfg, suite=f"{__file__}:{suite}", **settings)
        policy = Tiny.load(cfg)
        optimizer = torch.optim.AdamW(policy.parameter_groups(), 0.0)
        state = ript.TrainState()
        context_of = partial(ript.training_context, cfg=cfg)
        with ript.open_simulators(cfg) as simulators:
            ask(simulators.all, "make_env", [[i % 2] for i in range(cfg.workers)])
            episodes, stats = quietly(ript.collect, policy, simulators, context_of, state, cfg)
            stats |= quietly(ript.update, policy, optimizer, episodes, cfg, state)
        rows.append(dict(case=name, rollouts=stats["rollouts"], env_steps=stats["env_steps"],
                         kept=stats["kept"],
                         rollout_seconds=round(stats["seconds_rollouts"], 2),
                         update_seconds=round(stats["seconds_update"], 2)))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    write_csv(RESULTS / "growth/table.csv", rows)

class Asleep(ript.Suite):
    """Episodes of libero_10's lengths in which every control step is half a millisecond of sleep."""
    INSTRUCTIONS = ("sleep",)
    HORIZON = 520
    STEP = 0.0005  # seconds

    def reset(self, context):
        time.sleep(10 * self.STEP)
        self.context = context
        self.num_executed = 0
        self.end = None
        return ript.StepResult(0, False, {})

    def step(self, actions):
        if self.end is None:
            # The first action decides whether and when the episode succeeds, the context how likely it is.
            rng = np.random.default_rng(int(abs(actions[0, 0]) * 1e9))
            chance = np.random.default_rng(self.context.seed).choice([0.0, 0.3, 0.7, 1.0])
            self.end = rng.integers(200, 400) if rng.random() < chance else self.HORIZON + 1
        ran = min(len(actions), self.end - self.num_executed)
        time.sleep(ran * self.STEP)
        self.num_executed += ran
        if self.num_executed == self.end:
            return ript.StepResult(ran, True, None)
        return ript.StepResult(ran, False, {})

def collect():
    """Seconds of collect() with 16 sleeping workers, 24 groups of 8, and a policy of 0 or 20 ms a forward."""
    cfg = ript.Config(model=f"{__file__}:Replay", suite=f"{__file__}:Asleep", workers=16, device="cpu")
    with ript.open_simulators(cfg) as simulators:
        ask(simulators.all, "reset", [[ript.Context(0, "sleep", 0)]] * cfg.workers)
        for seconds in (0.0, 0.02):
            for seed in range(ROUNDS):
                seeded = replace(cfg, seed=seed)
                context_of = partial(ript.training_context, cfg=seeded)
                began = time.perf_counter()
                _, stats = quietly(ript.collect, Replay(seconds), simulators, context_of,
                                   ript.TrainState(), seeded)
                print(f"policy {seconds * 1000:.0f} ms  seed {seed}  rollouts {stats['rollouts']}  "
                      f"kept {stats['kept']}  seconds {time.perf_counter() - began:.1f}", flush=True)
    left = sum(simulator.process.poll() is None for simulator in simulators.all)
    print(f"simulators left behind: {left}")

class Noisy(LiberoObject):
    """LIBERO-Object without pictures, whose expert acts under the noise of exploration."""
    WIDTH = (np.array(ACTION["q99"]) - ACTION["q01"])[:6] / 2  # of the units of LIBERO-Long's policy

    def get_observation(self):
        return {}

    def disturb(self, action, context, t):
        """The action with Laplace noise of scale self.scale, in the policy's units."""
        if t == 0:
            self.rng = np.random.default_rng(context.seed)
        noise = self.rng.laplace(size=7) * self.scale
        # The policy's gripper is 0 closed and 1 open, and its sign at a half decides.
        opened = float(action[6] < 0)
        flips = bool(opened + noise[6] > 0.5) != (opened > 0.5)
        self.flips += flips
        return np.append(action[:6] + noise[:6] * self.WIDTH, -action[6] if flips else action[6])

    def attempt(self, context, scale):
        """An episode of the expert with noise of a scale b: success, steps, flips of the gripper."""
        self.scale = scale
        self.flips = 0
        demonstration = self.demonstrate(context)
        return demonstration.success, len(demonstration.actions), self.flips

def noise():
    """How often the expert succeeds from four stored states of each task, for scales b of the noise."""
    cfg = ript.Config(suite=f"{__file__}:Noisy", workers=2, device="cpu")
    suite = ript.load_suite("libero_object")
    contexts = []
    for task, text in enumerate(suite.INSTRUCTIONS):
        for number, state in enumerate(suite.eval_init_states(task, 4)):
            contexts.append(ript.Context(task, text, number, state))
    # 0.135 is exp(-2), our least; 0.677 is five times that, as if the multiplier came after the clamp.
    scales = (0.0, 0.135, 0.25, 0.677)
    outcomes = {scale: [] for scale in scales}
    with ript.open_simulators(cfg) as simulators:
        for start in range(0, len(contexts), 2):
            pair = contexts[start:start + 2]
            for scale in scales:
                outcomes[scale] += ask(simulators.all, "attempt", [(context, scale) for context in pair])
            print(contexts[start].instruction, [sum(o[0] for o in outcomes[scale][-2:]) for scale in scales],
                  flush=True)
    for scale, episodes in outcomes.items():
        won = sum(success for success, _, _ in episodes)
        steps = sum(steps for _, steps, _ in episodes)
        flips = sum(flips for _, _, flips in episodes)
        print(f"b {scale}: {won} of {len(episodes)} succeed in {steps / len(episodes):.0f} steps, "
              f"the gripper flips in {flips / steps:.1%} of these")

COMMANDS = dict(speed=speed, growth=growth, collect=collect, noise=noise)

def main(argv=None):
    """Run one of the measurements."""
    argv = sys.argv[1:] if argv is None else argv
    known = argv and argv[0] in COMMANDS and (argv[0] == "speed" or len(argv) == 1)
    ript.require(known, f"say which: {', '.join(COMMANDS)}")
    COMMANDS[argv[0]](*argv[1:])

if __name__ == "__main__":
    ript.run_command(main)
