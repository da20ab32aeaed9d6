"""How fast rollouts are, and what an iteration costs.

    python examples/benchmark.py speed     collect() against the released way of stepping and the limit
    python examples/benchmark.py growth    seconds of an iteration against contexts, K, horizon and workers

Speed is measured on one task of LIBERO-Object with the same actions from the same stored states, in turns:

    released   LIBERO's SubprocVectorEnv of OffScreenRenderEnv: two pictures of 256x256 pixels at every step,
               a hard reset for each episode, in lock step
    collect    ript.collect, with pictures of the same kind when the policy looks
    limit      each worker for itself: the same physics, the pictures that a policy looks at, but no policy,
               no messages, nobody to wait for
"""
import sys
import time
from contextlib import redirect_stdout
from os import devnull
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import ript

ASSETS = Path(__file__).parents[1] / "assets/evidence"
EPISODES, ROUNDS = 4, 3  # of 280 steps each; a multiple of the workers


class Replay:
    """A policy that takes no time: it shakes the hand, with the noise that exploration would have."""
    chunk, TOKENS = 8, 0

    def preprocess(self, raw):
        return None

    def act(self, observations, instructions, explore):
        return [dict(actions=shake(g), scale=0.0, log_prob=np.zeros(8)) for g in explore]


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

    def step(self, actions, film=False):
        began = time.perf_counter()
        answer = super().step(actions, film)
        self.seconds += time.perf_counter() - began
        return answer

    def busy(self):
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def alone(self, episodes):
        """Run (context, chunks of actions) without the trainer: -> seconds."""
        began = time.perf_counter()
        for context, chunks in episodes:
            self.reset(context)
            for actions in chunks:
                self.step(actions)
        return time.perf_counter() - began


def ask(workers, method, arguments):
    """The answers of all workers to a method of the suite."""
    for worker, argument in zip(workers, arguments):
        worker.send(method, *argument)
    return [worker.receive() for worker in workers]


def speed():
    """Environment steps per second of the three ways, in turns."""
    from libero.libero.envs import OffScreenRenderEnv, SubprocVectorEnv
    settings = "--suite libero_object --task 0 --image_size 256 --rollouts 2"
    settings += " --collision false --max_rejected 0"
    cfg = ript.parse_config([*settings.split(), "--groups", str(EPISODES // 2), *sys.argv[2:]])
    suite = ript.load_suite(cfg.suite)
    states, horizon, bench = suite.held_out(0, EPISODES // 2), suite.HORIZON, suite.BENCHMARK
    contexts = [ript.Context(0, suite.INSTRUCTIONS[0], 0, state) for state in states]
    cfg.suite = f"{__file__}:Timed"
    workers = [ript.Worker(cfg, 0) for _ in range(cfg.workers)]
    noise = lambda group, k, query: np.random.default_rng((cfg.seed, 0, group, k, query))
    chunks = lambda group, k: [shake(noise(group, k, q)) for q in range(horizon // 8)]
    numbers = [(group, k) for group in range(EPISODES // 2) for k in range(2)]

    def released():
        make = lambda: OffScreenRenderEnv(bddl_file_name=bench.get_task_bddl_file_path(0), camera_heights=256,
                                          camera_widths=256)
        env = SubprocVectorEnv([make] * cfg.workers)
        env.get_sim_state()  # which waits until they are built: that is left out, here as everywhere
        began = time.perf_counter()
        for start in range(0, EPISODES, cfg.workers):
            part = numbers[start:start + cfg.workers]
            env.reset()
            env.set_init_state([states[group] for group, _ in part])
            for _ in range(10):
                env.step(np.array([[0, 0, 0, 0, 0, 0, -1.0]] * len(part)))
            for actions in zip(*(np.concatenate(chunks(*number)) for number in part)):
                env.step(np.array(actions))
        seconds = time.perf_counter() - began
        env.close()
        return EPISODES * horizon / seconds, None

    def collect():
        ask(workers, "build", [[0]] * cfg.workers)
        ask(workers, "busy", [[]] * cfg.workers)
        run = dict(iteration=0, group=0, skip=[])
        began = time.perf_counter()
        with open(devnull, "w") as file, redirect_stdout(file):  # no group has signal, and it says so
            _, _, stats = ript.collect(Replay(), workers, contexts.__getitem__, run, cfg)
        seconds = time.perf_counter() - began
        idle = 1 - sum(ask(workers, "busy", [[]] * cfg.workers)) / cfg.workers / seconds
        return stats["env_steps"] / seconds, idle

    def limit():
        ask(workers, "build", [[0]] * cfg.workers)
        shares = [[[(contexts[group], chunks(group, k)) for group, k in numbers[i::cfg.workers]]]
                  for i in range(cfg.workers)]
        return EPISODES * horizon / max(ask(workers, "alone", shares)), None

    rows = []
    for _ in range(ROUNDS):
        row = {}
        for way in (released, collect, limit):
            row[way.__name__], idle = way()
            row |= dict(idle=idle) if idle is not None else {}
        row |= dict(to_released=row["collect"] / row["released"], to_limit=row["collect"] / row["limit"])
        print("  ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
        rows.append(row)
    ript.write_csv(ASSETS / "speed.csv", rows)
    print("median  " + "  ".join(f"{name} {median(row[name] for row in rows):.3g}" for name in rows[0]))


class Coin(ript.load_class("tabletop_pretrain", ript.Libero)):
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
    cases = [("", base, "Coin")]
    cases += [(f"{name} {n}", base | {name: n}, "Coin") for name, numbers in
              dict(groups=(8, 32), rollouts=(4, 16), workers=(1, 3)).items() for n in numbers]
    cases += [("horizon 16", base, "Coin16"), ("horizon 64", base, "Coin64")]
    rows = []
    for name, settings, suite in cases:
        cfg = ript.parse_config(["--max_rejected", "0", "--minibatch", "4096"] +
                                [str(x) for key, n in settings.items() for x in (f"--{key}", n)])
        cfg.suite = f"{__file__}:{suite}"
        torch.manual_seed(0)
        policy = ript.OpenVLAOFT.load(cfg)
        optimizer = torch.optim.AdamW(policy.trainable("ript"), 0.0)
        workers = [ript.Worker(cfg, i % 2) for i in range(cfg.workers)]
        ask(workers, "build", [[i % 2] for i in range(cfg.workers)])
        tasks, run = list(ript.tasks_of(cfg).items()), dict(iteration=0, group=0, skip=[], history=[])
        context_of = lambda number: ript.training_context(number, tasks, [], cfg)
        with open(devnull, "w") as file, redirect_stdout(file):
            episodes, rewards, stats = ript.collect(policy, workers, context_of, run, cfg)
            stats |= ript.update(policy, optimizer, episodes, rewards, cfg, run)
        for worker in workers:
            worker.process.kill()
        rows.append(dict(case=name or "16 groups of 8, 32 steps, 2 workers", rollouts=stats["rollouts"],
                         env_steps=stats["env_steps"], kept=stats["kept"],
                         rollout_seconds=round(stats["seconds_rollouts"], 2),
                         update_seconds=round(stats["seconds_update"], 2)))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    ript.write_csv(ASSETS / "growth.csv", rows)


if __name__ == "__main__":
    commands = dict(speed=speed, growth=growth)
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(f"benchmark.py: say which, {' or '.join(commands)}")
    commands[sys.argv[1]]()
