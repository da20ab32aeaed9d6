"""Stages 1 and 2, before reinforcement: a policy learns from demonstrations, scripted or LIBERO's.

    python scripts/sft.py --suite tabletop             the laptop's stage 2, into runs/tabletop_sft
    python scripts/sft.py --suite tabletop_pretrain    its stage 1: policies/tabletop was made so
    python scripts/sft.py --model openvla-oft --suite libero_10 --demos DIR    fits the 7B's scale head

Stage 2 (SFT) minimises the L1 distance of the mean action to the demonstrated one. Then the scale head is
fitted by the Laplace likelihood, all else frozen (section 4.2 of the paper). ript.py starts from the result.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncio
import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import ript
from policies.checkpoints import check_trained_with
from ript import option

STATES = "ee_pos", "ee_ori", "joint_states", "gripper_states"  # of the robot, in LIBERO's files
DEMO_SEEDS = 1_000_000  # scripted demonstrations have seeds from here on, and training from ript.TRAIN_SEEDS


@dataclass(frozen=True)
class ImitationConfig(ript.Config):
    """The settings of stages 1 and 2, beside those that they share with stage 3."""
    demos_per_task: int = option(10, "scripted demonstrations per task, where --demos gives none")
    sft_steps: int = option(0, "optimiser steps of supervised fine-tuning, L1 loss", least=0)
    sft_lr: float = option(1e-3, "learning rate of SFT, with warm-up and cosine decay")
    scale_steps: int = option(500, "optimiser steps of the scale head, Laplace NLL", least=0)


@dataclass
class Demo:
    """A demonstration of T steps. Raises ValueError where there is none or an action is not finite."""
    context: ript.Context
    looks: list[Callable]  # of each step, a function that gives the raw observation
    actions: np.ndarray  # (T, A), the environment's units

    def __post_init__(self):
        if not len(self.actions) or not np.isfinite(self.actions).all():
            raise ValueError("nothing moves in a demonstration, or an action is not finite")


# ------------------------------------------------------------------------------------------ demonstrations
async def run_expert(simulator, episode, horizon):
    """An episode of a suite's expert. Its chunk is the suite's Demonstration."""
    demonstration = await simulator.call("demonstrate", episode.context)
    episode.success = bool(demonstration.success)
    episode.chunks = [demonstration]


def scripted_demonstrations(simulators, cfg):
    """Demos in which the suite's expert succeeds, cfg.demos_per_task of every task."""
    # The scenes of --seed 9 are again those of 0: beyond lie those of training.
    first = DEMO_SEEDS * (1 + cfg.seed % 9)
    contexts = []
    for seed in range(first, first + cfg.demos_per_task):
        for task, text in ript.tasks_of(cfg).items():
            contexts.append(ript.Context(task, text, seed))
    at_most = 50 + 3 * len(contexts)
    attempts = []
    found = {}

    async def demonstrate(number):
        context = contexts[number]
        while True:
            episode = ript.Episode(context, number)
            attempts.append([episode])
            await simulators.run_episodes(run_expert, [episode])
            if episode.success:
                found[number] = episode
            if episode.success or len(attempts) >= at_most:
                break
            context = replace(context, seed=context.seed + 1000)  # another scene takes its place

    asyncio.run(simulators.run(map(demonstrate, range(len(contexts))), "demonstrations"))
    print(f"scripted expert: success in {len(found)} of {len(attempts)} attempts", flush=True)
    short = sorted({context.task for number, context in enumerate(contexts) if number not in found})
    if short:
        print(f"the expert failed too often: of task {', '.join(map(str, short))} there are fewer than "
              f"{cfg.demos_per_task} demonstrations", flush=True)
    demos = []
    for number in sorted(found):
        demonstration, = found[number].chunks
        looks = [partial(dict, raw) for raw in demonstration.observations]
        with ript.trying(f"the expert of {cfg.suite}", "use"):
            demos.append(Demo(found[number].context, looks, demonstration.actions))
    return demos


def demonstration_files(cfg):
    """Triples of a task's number, its instruction and its HDF5 file in cfg.demos."""
    for task, text in ript.tasks_of(cfg).items():
        yield task, text, ript.load_suite(cfg.suite).demo_file(cfg.demos, task)


def libero_row(demo, t):
    """Step t of one of LIBERO's demonstrations, by the names that robosuite gives what it observes."""
    from scipy.spatial.transform import Rotation
    return dict(agentview_image=demo["obs/agentview_rgb"][t],
                robot0_eye_in_hand_image=demo["obs/eye_in_hand_rgb"][t],
                robot0_eef_pos=demo["obs/ee_pos"][t], robot0_joint_pos=demo["obs/joint_states"][t],
                robot0_gripper_qpos=demo["obs/gripper_states"][t],
                robot0_eef_quat=Rotation.from_rotvec(demo["obs/ee_ori"][t]).as_quat())


def moving_steps(actions):
    """The steps of (T, A) actions in which the hand moves or the gripper, the last dimension, changes.

    OpenVLA was trained without the others (regenerate_libero_dataset.py in its release).
    """
    steps = []
    for t, action in enumerate(actions):
        if np.linalg.norm(action[:-1]) > 1e-4 or steps and action[-1] != actions[steps[-1]][-1]:
            steps.append(t)
    return steps


async def render_state(simulator, episode, horizon):
    """Draw the state of an episode's context. The chunk is the raw observation."""
    episode.chunks = [await simulator.call("get_observation_at", episode.context)]
    episode.success = True


def rendered(simulators, context):
    """The raw observation of a state of a demonstration, drawn as rollouts will show it."""
    episode = ript.Episode(context)
    asyncio.run(simulators.run([simulators.run_episodes(render_state, [episode])], "drawing"))
    return episode.chunks[0]


def libero_demonstrations(simulators, cfg):
    """Demos from LIBERO's HDF5 files in cfg.demos. Pictures are read, or drawn, when they are asked for."""
    from simulators.libero import demos_in  # here, since other suites need no LIBERO
    demos = []
    for task, text, path in demonstration_files(cfg):
        with ript.reading(path):
            demos += [checked_demo(demo, task, text, simulators, cfg) for demo in demos_in(path)]
    return demos


def checked_demo(demo, task, text, simulators, cfg):
    """A Demo of one HDF5 group. Raises an error now, and not in an hour, where something does not fit."""
    actions = demo["actions"][:]
    pictures = demo["obs/agentview_rgb"].shape
    libero_row(demo, -1)
    if actions.shape != (pictures[0], 7):
        raise ValueError(f"{demo.name} has actions {actions.shape} for {pictures[0]} pictures")
    for name in ("actions", *(f"obs/{name}" for name in STATES), "states"):
        numbers = demo[name]
        if len(numbers) != pictures[0] or not np.isfinite(numbers[:]).all():
            raise ValueError(f"{name} of {demo.name} must be {pictures[0]} rows of finite numbers")
    steps = moving_steps(actions)
    if not steps:
        raise ValueError(f"nothing moves in {demo.name}")
    looks = []
    for t in steps:
        if pictures[1] == cfg.image_size and not cfg.collision:
            looks.append(partial(libero_row, demo, t))
        else:
            # The file's pictures are not what rollouts will show. So its states are drawn again.
            context = ript.Context(task, text, 0, demo["states"][t])
            looks.append(partial(rendered, simulators, context))
    return Demo(ript.Context(task, text, 0, demo["states"][0]), looks, actions[steps])


# ------------------------------------------------------------------------------------------------ learning
def imitation_loss(policy, stage, observations, instructions, actions):
    """Of demonstrated actions (B, H, A) in the environment's units: L1 for "sft", Laplace NLL for "scale"."""
    if hasattr(policy, "imitation_loss"):
        return policy.imitation_loss(observations, instructions, actions)  # its own (experiments/flow.py)
    mean, log_scale = policy.predict(observations, instructions)
    target = policy.from_env_actions(actions).to(mean)  # B H A
    if stage == "sft":
        return nn.functional.l1_loss(mean, target)
    return -ript.laplace_log_prob(target, mean, log_scale).mean()


def chunks_of(demos, H):
    """Of every step of every Demo: its look, its instruction, and the H actions from there on, (H, A)."""
    samples = []
    for demo in demos:
        T = len(demo.actions)
        for t, look in enumerate(demo.looks):
            # A chunk that outlasts its demonstration repeats the last action.
            ahead = np.arange(t, t + H).clip(max=T - 1)
            samples.append((look, demo.context.instruction, demo.actions[ahead]))
    return samples


def fit(policy, stage, demos, steps, lr, seed, batch):
    """AdamW on imitation_loss at random steps of demonstrations: -> the mean loss of the last tenth.

    stage "sft": all but the scale head. "scale": the scale head alone. Warm-up and cosine decay.
    """
    rng = np.random.default_rng([seed, 0])
    samples = chunks_of(demos, policy.chunk)
    policy.train_only(policy.sft_modules if stage == "sft" else ("scale_head",))
    optimizer = torch.optim.AdamW(policy.parameter_groups())
    losses = []
    for step in tqdm(range(steps), stage, leave=False, disable=None):
        picked = [samples[i] for i in rng.integers(len(samples), size=batch)]
        observations = [policy.preprocess(look()) for look, _, _ in picked]
        instructions = [instruction for _, instruction, _ in picked]
        actions = np.array([chunk for _, _, chunk in picked])
        loss = imitation_loss(policy, stage, observations, instructions, actions)
        ript.require(loss.isfinite(), f"the loss of step {step} of {stage} is {loss.item()}: is a picture or "
                     "weight not finite, or the learning rate too large?")
        optimizer.zero_grad()
        loss.backward()
        rise = min(1, (step + 1) * 20 / steps)
        fall = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        with ript.trying(f"step {step} of {stage}", "take"):
            for group in optimizer.param_groups:
                group["lr"] = lr * rise * fall
                nn.utils.clip_grad_norm_(group["params"], 1.0, error_if_nonfinite=True)
            optimizer.step()
        losses.append(loss.item())
    return np.mean(losses[-math.ceil(steps / 10):])


def sft(policy, demos, cfg):
    """Stage 2: -> the final L1 loss."""
    return fit(policy, "sft", demos, cfg.sft_steps, cfg.sft_lr, cfg.seed, batch=64)


def fit_scale_head(policy, demos, cfg):
    """The Laplace scale head, everything else frozen: -> the final NLL per action step."""
    return fit(policy, "scale", demos, cfg.scale_steps, 1e-3, cfg.seed, batch=16)


def measure_statistics(model, suite, demos):
    """The statistics of a policy from scratch. Their bounds become -1 and 1, and their lengths are its sizes.
    suite.MEASURED says which are measured in the demonstrations, of "proprio" and "action"; suite.STATISTICS
    or the model has the others."""
    proprio = []
    actions = []
    for demo in demos:
        proprio += [model.preprocess(look())["proprio"] for look in demo.looks]
        actions += list(demo.actions)
    found = dict(proprio=proprio, action=actions)
    statistics = model.STATISTICS | getattr(suite, "STATISTICS", {})
    for kind in getattr(suite, "MEASURED", ("proprio", "action")):
        low, high = np.quantile(found[kind], (0.01, 0.99), 0).tolist()
        statistics[kind] = statistics[kind] | dict(q01=low, q99=high)
    return statistics


def read_policy(cfg):
    """The policy of cfg.checkpoint, from which stage 2 starts."""
    model = ript.load_policy(cfg.model)
    if issubclass(model, ript.load_policy("tiny")):
        policy = model.from_pretrained(cfg.checkpoint)
        check_trained_with(policy.trained_with, model.settings_of(cfg), cfg.checkpoint)
        return policy
    return model.from_pretrained(cfg.checkpoint, cfg.suite, prefix=cfg.attention_mode, device=cfg.device)


def new_policy(cfg, demos):
    """A policy with random weights, whose statistics are those of the demonstrations."""
    model = ript.load_policy(cfg.model)
    return model(measure_statistics(model, ript.load_suite(cfg.suite), demos))


def check(cfg):
    """Raise UserError for what can be known to go wrong before any long work starts."""
    ript.check(cfg)  # it reads the demonstrations' first states, where --demos names some
    model = ript.load_policy(cfg.model)
    suite = ript.load_suite(cfg.suite)
    ript.require(hasattr(model, "sft_modules"),
                 f"--model {cfg.model} has no stage 2 here: start from its checkpoint")
    for name in ("adapter", "scale_head", "resume", "eval"):
        ript.require(not getattr(cfg, name), f"--{name} is for ript.py: stages 1 and 2 have no use for it")
    ript.require(ript.WORLD == 1, "stages 1 and 2 run in one process: start them without torchrun")
    ript.require(cfg.sft_steps or cfg.scale_steps, "nothing to do: --sft_steps and --scale_steps are both 0")
    # A policy that trains by adapters has none yet, so what else it learned would not be saved.
    ript.require(not (cfg.sft_steps and getattr(model, "adapters_only", False)),
                 f"--sft_steps must be 0 for {cfg.model}: only its scale head is fitted here")
    ript.require(cfg.demos or hasattr(suite, "demonstrate"), f"{cfg.suite} has no scripted expert: --demos "
                 "DIR names a directory of LIBERO's HDF5 demonstrations")


def next_command(cfg):
    """The command that starts stage 3 from what this has written."""
    words = ["--model", cfg.model, "--suite", cfg.suite]
    usual = ript.parse_config(words)
    settings = dict(checkpoint=cfg.out)
    if getattr(ript.load_policy(cfg.model), "adapters_only", False):
        settings = dict(checkpoint=cfg.checkpoint, scale_head=str(Path(cfg.out) / "scale_header.pth"))
    # What the policy sees, and the contexts, are to be in stage 3 as they were here.
    for name in ("task", "seed", "image_size", "collision", "attention_mode", "demos"):
        settings[name] = getattr(cfg, name)
    for name, value in settings.items():
        if value != getattr(usual, name):
            words += [f"--{name}", json.dumps(value) if isinstance(value, bool) else str(value)]
    return shlex.join(["python", "ript.py", *words])


def main(argv=None):
    """Gather demonstrations, fit the policy, then its scale head, and write both."""
    argv = sys.argv[1:] if argv is None else argv
    cfg = ript.parse_config(argv, ImitationConfig, "IMITATION")
    check(cfg)
    ript.init_distributed(cfg.device)
    torch.manual_seed(cfg.seed)
    out = Path(cfg.out)
    policy = read_policy(cfg) if cfg.checkpoint else None
    with ript.lock_run_dir(out), ript.open_simulators(cfg) as simulators:
        demos = (libero_demonstrations if cfg.demos else scripted_demonstrations)(simulators, cfg)
        ript.require(demos, f"there is not one demonstration of {cfg.suite}")
        policy = (policy or new_policy(cfg, demos)).to(cfg.device)
        policy.trained_with = policy.settings_of(cfg)
        if cfg.sft_steps:
            print(f"SFT on {len(demos)} demonstrations: loss {sft(policy, demos, cfg):.4f}", flush=True)
        if cfg.scale_steps:
            print(f"scale head: NLL {fit_scale_head(policy, demos, cfg):.2f} per action step", flush=True)
        finite = all(p.isfinite().all() for p in policy.parameters())
        ript.require(finite, "a weight is not finite after the last step: is the learning rate too large?")
        policy.save(out)
    print(f"wrote {out}, from which stage 3 starts: {next_command(cfg)}")


if __name__ == "__main__":
    ript.run_command(main)
