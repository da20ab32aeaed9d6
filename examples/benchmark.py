"""How fast rollouts are, and what an iteration costs.

    python examples/benchmark.py speed     collect() against the released way of stepping and the limit
    python examples/benchmark.py growth    seconds of an iteration against contexts, K, horizon and workers
    python examples/benchmark.py collect   how long a collection takes with simulators that only sleep
    python examples/benchmark.py noise     how often LIBERO-Object's expert succeeds under exploration's noise
    python examples/benchmark.py gpu       the 7B on a GPU, in eleven rows: examples/gpu.py

Speed is measured on one task of LIBERO-Object with the same actions from the same stored states, in turns:

    released   LIBERO's SubprocVectorEnv of OffScreenRenderEnv: two pictures of 256x256 pixels at every step,
               a hard reset for each episode, in lock step
    robosuite  each worker for itself, with robosuite's control step and the pictures that a policy looks at
    collect    ript.collect, with pictures of the same kind when the policy looks
    limit      each worker for itself, as ript steps: no policy, no messages, nobody to wait for
    physics    each worker for itself: mj_step with the same torques, and the pictures, and nothing else
"""
import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from os import devnull, execv
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
if __name__ == "__main__" and sys.argv[1:2] == ["gpu"]:
    # Another process, because it runs where what follows cannot be imported.
    gpu = str(Path(__file__).with_name("gpu.py"))
    execv(sys.executable, [sys.executable, gpu, *sys.argv[2:]])
import ript
from examples import control_step, laptop, report
from examples.gpu import ACTION

ASSETS = Path(__file__).parents[1] / "assets/evidence"
PRETRAINED = Path(__file__).parents[1] / "assets/tabletop"
EPISODES = 4  # of 280 steps each; a multiple of the workers
ROUNDS = 3


class Replay:
    """A policy that shakes the hand, with the noise that exploration would have, in no time or some."""
    chunk, TOKENS = 8, 0

    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def preprocess(self, raw):
        return None

    def act(self, observations, instructions, generators):
        time.sleep(self.seconds)
        return [dict(actions=shake(g), scale=0.0, log_prob=np.zeros(8)) for g in generators]


def shake(generator):
    """A chunk of actions (8, 7), from the generator of an episode's query."""
    return generator.uniform(-0.3, 0.3, (8, 7))


class Timed(ript.load_suite("libero_object")):
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
            self.reset(context)
            for actions in chunks:
                self.step(actions)
        return time.perf_counter() - began

    def robosuite(self, episodes):
        """The same with robosuite's own control step."""
        ours = control_step.control_step
        control_step.control_step = lambda env, action: env.step(action)
        seconds = self.alone(episodes)
        control_step.control_step = ours
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
            self.reset(context)
            torques.clear()
            for actions in chunks:
                self.step(actions)
            mujoco.mj_step2 = step
            self.reset(context)
            model = self.env.sim.model._model
            data = self.env.sim.data._data
            began = time.perf_counter()
            for place in range(0, len(torques), 8 * 25):
                for torque in torques[place:place + 8 * 25]:
                    data.ctrl[:] = torque
                    mujoco.mj_step(model, data)
                self.look()
            seconds += time.perf_counter() - began
        return seconds


def ask(workers, method, arguments):
    """The answers of all workers to a method of the suite."""
    with ThreadPoolExecutor(len(workers)) as threads:
        return list(threads.map(lambda worker, a: worker.call(method, *a), workers, arguments))


def quietly(function, *arguments):
    """Call a function whose messages nobody needs."""
    with open(devnull, "w") as file, redirect_stdout(file):
        return function(*arguments)


class Speed:
    """The five ways, on the same episodes."""
    def __init__(self, cfg, workers):
        suite = ript.load_suite("libero_object")
        self.cfg = cfg
        self.workers = workers
        self.suite = suite
        self.states = suite.held_out(0, EPISODES // 2)
        self.contexts = [ript.Context(0, suite.INSTRUCTIONS[0], 0, state) for state in self.states]
        self.numbers = [(group, k) for group in range(EPISODES // 2) for k in range(2)]

    def chunks(self, group, k):
        """The action chunks of an episode, as collect draws them."""
        queries = range(self.suite.HORIZON // 8)
        return [shake(np.random.default_rng((self.cfg.seed, 0, group, k, query))) for query in queries]

    def released(self):
        from libero.libero.envs import OffScreenRenderEnv, SubprocVectorEnv
        number = len(self.workers)
        bddl_file = self.suite.BENCHMARK.get_task_bddl_file_path(0)
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
        number = len(self.workers)
        ask(self.workers, "build", [[0]] * number)
        ask(self.workers, "busy", [[]] * number)
        run = dict(iteration=0, group=0)
        began = time.perf_counter()
        _, stats = quietly(ript.collect, Replay(), self.workers, self.contexts.__getitem__, run, self.cfg)
        seconds = time.perf_counter() - began
        idle = 1 - sum(ask(self.workers, "busy", [[]] * number)) / number / seconds
        return dict(collect=stats["env_steps"] / seconds, idle=idle)

    def alone(self, method):
        """Steps per second of workers that wait for nobody, by a method of Timed."""
        number = len(self.workers)
        ask(self.workers, "build", [[0]] * number)
        shares = []
        for i in range(number):
            mine = self.numbers[i::number]
            shares.append([[(self.contexts[group], self.chunks(group, k)) for group, k in mine]])
        return EPISODES * self.suite.HORIZON / max(ask(self.workers, method, shares))


def speed():
    """Environment steps per second of the five ways, in turns."""
    settings = ("--suite libero_object --task 0 --image_size 256 --rollouts 2 --collision false "
                "--max_rejected 0")
    cfg = ript.parse_config([*settings.split(), "--groups", str(EPISODES // 2), *sys.argv[2:]])
    cfg = replace(cfg, suite=f"{__file__}:Timed")
    rows = []
    with ript.open_workers(cfg) as workers:
        ways = Speed(cfg, workers)
        for _ in range(ROUNDS):
            row = ways.released() | ways.collect()
            row |= dict(robosuite=ways.alone("robosuite"), limit=ways.alone("alone"),
                        physics=ways.alone("physics"))
            for other in ("released", "robosuite", "limit", "physics"):
                row[f"to_{other}"] = row["collect"] / row[other]
            print("  ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
            rows.append(row)
    report.write_csv(ASSETS / "speed.csv", rows)
    print("median  " + "  ".join(f"{name} {median(row[name] for row in rows):.3g}" for name in rows[0]))


class Coin(laptop.TabletopPretrain):
    """The laptop's scene, in which an episode runs to the horizon and then chance decides on success."""
    ran = 0

    def reset(self, context):
        self.ran = 0
        return super().reset(context)

    def success(self):
        self.ran += 1
        return self.ran == self.HORIZON and int(self.env._eef_xpos[0] * 1e6) % 2 == 0


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
        policy = laptop.Tiny.load(cfg)
        optimizer = torch.optim.AdamW(policy.parameter_groups(), 0.0)
        run = dict(iteration=0, group=0)
        context_of = partial(ript.training_context, cfg=cfg)
        with ript.open_workers(cfg) as workers:
            ask(workers, "build", [[i % 2] for i in range(cfg.workers)])
            episodes, stats = quietly(ript.collect, policy, workers, context_of, run, cfg)
            stats |= quietly(ript.update, policy, optimizer, episodes, cfg, run)
        rows.append(dict(case=name, rollouts=stats["rollouts"], env_steps=stats["env_steps"],
                         kept=stats["kept"],
                         rollout_seconds=round(stats["seconds_rollouts"], 2),
                         update_seconds=round(stats["seconds_update"], 2)))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    report.write_csv(ASSETS / "growth.csv", rows)


class Asleep(ript.Libero):
    """Episodes of libero_10's lengths in which every control step is half a millisecond of sleep."""
    INSTRUCTIONS, HORIZON, STEP = ("sleep",), 520, 0.0005

    def build(self, task):
        """Nothing has to be built."""

    def reset(self, context):
        time.sleep(10 * self.STEP)
        self.context = context
        self.ran = 0
        self.end = None
        return ript.Answer(0, False, {})

    def step(self, actions):
        if self.end is None:
            # The first action decides whether and when the episode succeeds, the context how likely it is.
            rng = np.random.default_rng(int(abs(actions[0, 0]) * 1e9))
            chance = np.random.default_rng(self.context.seed).choice([0.0, 0.3, 0.7, 1.0])
            self.end = rng.integers(200, 400) if rng.random() < chance else self.HORIZON + 1
        ran = min(len(actions), self.end - self.ran)
        time.sleep(ran * self.STEP)
        self.ran += ran
        if self.ran == self.end:
            return ript.Answer(ran, True, None)
        return ript.Answer(ran, False, {})


def collect():
    """Seconds of collect() with 16 sleeping workers, 24 groups of 8, and a policy of 0 or 20 ms a forward."""
    cfg = ript.Config(suite=f"{__file__}:Asleep", workers=16, device="cpu")
    with ript.open_workers(cfg) as workers:
        ask(workers, "reset", [[ript.Context(0, "sleep", 0)]] * cfg.workers)
        for seconds in (0.0, 0.02):
            for seed in range(ROUNDS):
                seeded = replace(cfg, seed=seed)
                context_of = partial(ript.training_context, cfg=seeded)
                run = dict(iteration=0, group=0)
                began = time.perf_counter()
                _, stats = quietly(ript.collect, Replay(seconds), workers, context_of, run, seeded)
                print(f"policy {seconds * 1000:.0f} ms  seed {seed}  rollouts {stats['rollouts']}  "
                      f"kept {stats['kept']}  seconds {time.perf_counter() - began:.1f}", flush=True)
    print(f"simulators left behind: {len(multiprocessing.active_children())}")


class Noisy(ript.load_suite("libero_object")):
    """LIBERO-Object without pictures, and its expert under the noise of exploration."""
    def look(self):
        return {}

    def attempt(self, context, scale):
        """An episode with Laplace noise in the units of LIBERO-Long's policy: success, steps, flips."""
        rng = np.random.default_rng(context.seed)
        width = (np.array(ACTION["q99"]) - ACTION["q01"])[:6] / 2
        answer = self.reset(context)
        steps = 0
        closing = 0
        flips = 0
        while not answer.success and steps < self.HORIZON:
            action = self.expert(closing)
            closing = closing + 1 if action[6] > 0 else 0
            noise = rng.laplace(size=7) * scale
            action[:6] += noise[:6] * width
            # The policy's gripper is 0 closed and 1 open, and its sign at a half decides.
            opened = float(action[6] < 0)
            if (opened + noise[6] > 0.5) != (opened > 0.5):
                action[6] = -action[6]
                flips += 1
            answer = self.step([action])
            steps += 1
        return answer.success, steps, flips


def noise():
    """How often the expert succeeds from four stored states of each task, for scales b of the noise."""
    cfg = ript.Config(suite=f"{__file__}:Noisy", workers=2, device="cpu")
    suite = ript.load_suite("libero_object")
    contexts = []
    for task, text in enumerate(suite.INSTRUCTIONS):
        for number, state in enumerate(suite.held_out(task, 4)):
            contexts.append(ript.Context(task, text, number, state))
    # 0.135 is exp(-2), our least; 0.677 is five times that, as if the multiplier came after the clamp.
    scales = (0.0, 0.135, 0.25, 0.677)
    outcomes = {scale: [] for scale in scales}
    with ript.open_workers(cfg) as workers:
        for start in range(0, len(contexts), 2):
            for scale in scales:
                outcomes[scale] += ask(workers, "attempt", [(c, scale) for c in contexts[start:start + 2]])
            print(contexts[start].instruction, [sum(o[0] for o in outcomes[scale][-2:]) for scale in scales],
                  flush=True)
    for scale, episodes in outcomes.items():
        won = sum(success for success, _, _ in episodes)
        steps = sum(steps for _, steps, _ in episodes)
        flips = sum(flips for _, _, flips in episodes)
        print(f"b {scale}: {won} of {len(episodes)} succeed in {steps / len(episodes):.0f} steps, "
              f"the gripper flips in {flips / steps:.1%} of these")


if __name__ == "__main__":
    commands = dict(speed=speed, growth=growth, collect=collect, noise=noise)
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(f"benchmark.py: say which, {', '.join(commands)}")
    commands[sys.argv[1]]()
