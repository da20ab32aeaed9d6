"""RIPT-VLA in one file: reinforcement post-training of vision-language-action policies (arXiv 2505.17016).

Stage 1 pretrains a policy on many demonstrations, stage 2 fine-tunes it on a few of the task (SFT). In stage
3, which this file is about, it acts in a simulator and learns from nothing but whether its rollouts succeed.

    Algorithm 1   repeat M times:
      1-3           freeze the sampling policy: psi <- theta
      4-6           until B rollouts are kept: draw a context c and K rollouts from psi, each with R in {0, 1}
      7-10          A_k = R_k - mean of the other K - 1 rewards                                        (Eq. 5)
      11-14         if every A_k is zero, reject the group and draw another context; otherwise keep it
      15-17         N passes of minibatches over the kept rollouts, minimising                         (Eq. 6)
                    -min(r A, clip(r, 1 - eps, 1 + eps) A),  r = pi_theta(a | o) / pi_psi(a | o)

Departures from the paper: contexts are fresh scenes unless --demos gives demonstrations; there is one ratio
per action step, as in the released code. Departures from that: an action is scored with the density that it
was drawn from; action steps after success do not count; the K rollouts of a group share a scene.

    bash run_libero.sh                                        the laptop: stages 2 and 3 and the report
    torchrun --standalone --nproc_per_node 4 ript.py --model openvla-oft --suite libero_long   the 7B, 4 GPUs

This file imports no other file of its repository: POLICIES, SUITES and log_iteration reach some by name.
Shapes, with other B and N than above: B batch, C contexts, K rollouts per context, E episodes, Q queries per
episode, N chunks, H action steps per query, S action steps per episode, A action dimensions, F features."""
import os
# OpenMP reads it when torch is imported. Threads that wait would take the simulators' cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import asyncio
import fcntl
import hashlib
import inspect
import json
import math
import pickle
import pkgutil
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from contextlib import closing, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, partial
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from torch import distributed, nn

# --------------------------------------------------------------------------------------- 1. Configuration
HERE = Path(__file__).resolve().parent
POLICIES = {"tiny": "policies.tiny:Tiny", "openvla-oft": "policies.openvla_oft:OpenVLAOFT",
            "quest": "policies.quest:QueST", "pi0": "policies.pi0:Pi0"}
# The suites of LIBERO, with the control steps of their longest demonstrations.
LIBERO = dict(libero_spatial=220, libero_object=280, libero_goal=300, libero_10=520, libero_90=400)
SUITES = dict.fromkeys(LIBERO, "simulators.libero:FastLibero") | {
    "libero_object": "simulators.libero_experts:LiberoObject",
    "libero_spatial": "simulators.libero_experts:LiberoSpatial",
    "tabletop": "simulators.tabletop:Tabletop", "tabletop_pretrain": "simulators.tabletop:TabletopPretrain",
    "metaworld": "simulators.metaworld:ML45", "metaworld_test": "simulators.metaworld:ML45Test",
    "metaworld_few_shot": "simulators.metaworld:FewShot"}
ALIASES = dict(libero_long="libero_10")
RENAMED = dict(passes="ppo_epochs", momentum="adam_beta1", clip="clip_coef", prefix="attention_mode")
# What --resume may change. With --anneal, the learning rate follows the new number of iterations.
CHANGEABLE = "resume", "iterations", "workers", "device", "eval_every", "micro_batch"
LOGGED = "scale", "at_low", "at_high"  # of the action chunks, as means over all queries
TRAIN_SEEDS = 10_000_000  # training contexts have seeds from here on, and evaluation has 0, 1, 2, ...
# What torchrun sets: the number of this process and of all, and the same within its machine.
LAUNCH = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")  # where nothing is set
LAUNCHED = [os.environ.get(name, alone) for name, alone in LAUNCH.items()]
RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = [int(text) if text.isdecimal() else -1 for text in LAUNCHED]

def cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """How many cores a process may use. macOS does not say, and has no limits either."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with suppress(OSError, ValueError):  # a container's quota, or "max"
        microseconds, period = map(int, quota.read_text().split())
        allowed = min(allowed, math.ceil(microseconds / period))
    return allowed // max(1, LOCAL_WORLD)

def option(default: object, text: str, least: int = 1, choices: Optional[tuple] = None):
    """A field of Config: its default, what argparse is told, and the least value of a whole number."""
    words = dict(type=type(default), choices=choices, help=f"{text} (default: {default!r}, or a preset's)")
    if default is False:
        words = dict(type=json.loads, choices=(True, False), nargs="?", const=True, help=text)
    return field(default=default, metadata=dict(words=words, least=least))

class UserError(ValueError):
    """Invalid input, shown without a traceback: its text is one sentence that says what to do."""

def require(condition: object, message: str, error: type[Exception] = UserError):
    """Raise an error unless the condition holds."""
    if not condition:
        raise error(message)

@dataclass(frozen=True)
class Config:
    """Every setting. Presets of policy and suite override the defaults, the command line overrides both."""
    model: str = option("tiny", f"the policy: {', '.join(POLICIES)} or FILE.py:Class")
    suite: str = option("tabletop", f"the tasks: {', '.join(SUITES | ALIASES)} or FILE.py:Class")
    task: int = option(-1, "only this task of the suite; -1: all of them", least=-1)
    checkpoint: str = option("", "directory or hub id of the policy to start from")
    adapter: str = option("", "directory of LoRA weights and heads to start from (openvla-oft)")
    scale_head: str = option("", "scale_header.pth to start from (openvla-oft)")
    attention_mode: str = option("exact", "prompt: the release's (openvla-oft)", choices=("exact", "prompt"))
    out: str = option("", "directory of the run; without it one in runs/, named after policy and suite")
    resume: str = option("", "directory of a run to continue after its last complete iteration")
    eval: bool = option(False, "evaluate the policy and stop")
    demos: str = option("", "directory of LIBERO's HDF5 demonstrations, whose first states are the contexts")
    seed: int = option(0, "seed of adapters, contexts, exploration and minibatches", least=0)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "torch device of the policy")
    # The algorithm. The defaults are the paper's for OpenVLA-OFT, with the released learning rate.
    iterations: int = option(12, "outer steps, M", least=0)
    groups: int = option(24, "groups kept per iteration, B / K, over all processes")
    rollouts: int = option(8, "rollouts per context, K", least=2)
    max_rejected: int = option(48, "rejected groups per iteration that are replaced, all processes", least=0)
    ppo_epochs: int = option(1, "passes over the kept rollouts, N")
    minibatch: int = option(16, "episodes per optimiser step, over all processes")
    micro_batch: int = option(0, "chunks per forward with gradient, for memory; 0: the policy's", least=0)
    clip_coef: float = option(0.1, "PPO's clip range, eps")
    loss_per: str = option("episode", "what the loss is a mean over", choices=("episode", "token"))
    lr: float = option(5e-5, "learning rate of AdamW")
    adam_beta1: float = option(0.9, "AdamW's beta1; 0 suits iterations of a single step", least=0)
    anneal: bool = option(False, "let the learning rate fall linearly to zero over the iterations")
    max_grad_norm: float = option(1.0, "the norm that the gradient is clipped to")
    scale_multiplier: float = option(1.0, "factor on the Laplace scale b, when sampling and when scoring")
    eval_contexts: int = option(50, "held-out contexts per task; LIBERO stores 50")
    eval_every: int = option(5, "iterations between evaluations; 0: only before and after", least=0)
    workers: int = option(max(1, min(16, cores())), "simulators of each process")
    image_size: int = option(256, "height and width of the two pictures, pixels", least=16)
    collision: bool = option(False, "draw collision meshes, which takes a tenth of the time without a GPU")
    act_batch: int = option(0, "observations per forward; 0: all that wait; 1: each by itself", least=0)
    control_step: str = option("", "the control step that the suite must have, fast or robosuite")

    def __post_init__(self):
        """Refuse numbers that no policy and no suite could use."""
        for option in fields(self):
            value, least = getattr(self, option.name), option.metadata["least"]
            if option.type is int:
                fits = least <= value < 2 ** 31
                require(fits, f"--{option.name} must be at least {least} and below 2 ** 31, got {value}")
            elif option.type is float:
                fits = 0 < value < math.inf or value == least
                require(fits, f"--{option.name} must be a number above 0, got {value}")
        require(self.adam_beta1 < 1, f"--adam_beta1 must be below 1, got {self.adam_beta1}")

def parse_config(argv: list[str], settings: type[Config] = Config, stage: str = "PRESET") -> Config:
    """Fill the dataclass settings: defaults < policy's preset < suite's < a resumed run's settings < argv."""
    parser = argparse.ArgumentParser(usage=sys.modules[settings.__module__].__doc__, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)  # what argv leaves out, presets fill
    parser.error = partial(require, False)  # argparse's complaints become UserErrors
    for option in fields(settings):
        parser.add_argument("--" + option.name, **option.metadata["words"])
    for old, new in RENAMED.items():
        require(f"--{old}" not in [word.split("=")[0] for word in argv], f"--{old} is called --{new} now")
    given = vars(parser.parse_args(argv))
    saved = vars(load_config(given["resume"], settings)) if given.get("resume") else {}
    chosen = dict(model=settings.model, suite=settings.suite) | saved | given
    model, suite = chosen["model"], ALIASES.get(chosen["suite"], chosen["suite"])
    preset = getattr(load_policy(model), stage, {}).get(suite, {})
    preset = preset | getattr(load_suite(suite), stage, {}).get(model, {})
    require(preset or ":" in suite + model, f"--model {model} is not made for --suite {suite}")
    # An evaluation and stage 2 do not write over the files of a run.
    names = [name.split(":")[-1] for name in (model, suite) if name != "tiny"]
    ending = "_eval" if given.get("eval") else dict(PRESET="", IMITATION="_sft")[stage]
    control_step = load_suite(suite).CONTROL_STEP
    usual = dict(out="runs/" + "_".join(names) + ending, control_step=control_step)
    cfg = settings(**usual | preset | chosen | dict(suite=suite))
    for name, value in saved.items():
        same = name in CHANGEABLE or getattr(cfg, name) == value
        require(same, f"--resume keeps the run's settings, and its --{name} is {value}")
    require(cfg.control_step == control_step, f"--control_step is {cfg.control_step}, but here {suite} has "
            f"{control_step}: simulators/libero.py beside ript.py has the fast one")
    return replace(cfg, out=cfg.resume or cfg.out)

def load_config(directory: str | Path, settings: type[Config] = Config) -> Config:
    """The settings that a run has written into its config.json."""
    path = Path(directory, "config.json")
    with reading(path):
        saved = json.loads(path.read_text())
        unknown = saved.keys() - {option.name for option in fields(settings)}
        require(not unknown, f"{path} has settings that are not of this version of ript.py "
                f"({', '.join(sorted(unknown)[:3])}): start a new run")
        return settings(**saved)

# --------------------------------------------------------------------------------------- 2. The algorithm
def leave_one_out_advantage(rewards: torch.Tensor) -> torch.Tensor:
    """A_k = R_k - mean of the other K - 1 rewards of the context (Eq. 5): (C, K) -> (C, K) float.
    Raises ValueError for K < 2, since a single rollout has no baseline, and for another shape."""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (C, K) with K >= 2 rollouts, got {tuple(rewards.shape)}")
    rewards = rewards * 1.0  # bool and int become float
    others = rewards.sum(-1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[1] - 1)

def has_signal(rewards: torch.Tensor) -> torch.Tensor:
    """The rejection rule (Algorithm 1, lines 11-14): (C, K) -> (C,) bool, False where all K are equal."""
    return (rewards != rewards[:, :1]).any(-1)

def laplace_log_prob(action: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Log-density of a factorised Laplace, (..., A) each -> (...), summed over A, in float32:
    log p = sum over A of -|action - mean| / b - log(2 b), b = exp(log_scale), in normalised action units."""
    numbers = action.float(), mean.float(), log_scale.float()
    # Where one is not finite, the density is NaN and must not reach a gradient: 0 times NaN would be NaN.
    known = sum(numbers).isfinite().all(-1, keepdim=True)  # ... 1
    action, mean, log_scale = (torch.where(known, number, 0.0) for number in numbers)
    log_prob = -(action - mean).abs() * torch.exp(-log_scale) - log_scale - math.log(2)
    return torch.where(known, log_prob, math.nan).sum(-1)

def loss_weight(mask: torch.Tensor, per: str = "episode") -> torch.Tensor:
    """The weight of each action step in the loss: mask (E, S) bool -> (E, S) float.
    mask is False where no action ran. per="episode": a mean over each episode's steps, then over episodes, of
    which one without steps counts as 0; so the weights sum to the share of the others. per="token": a mean
    over all steps, in which long episodes weigh more. Raises ValueError for another per or mask."""
    if per not in ("episode", "token") or mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask must be (E, S) bool, got {tuple(mask.shape)} {mask.dtype}; per must be "
                         f"'episode' or 'token', got {per!r}")
    if per == "token":
        return mask / mask.sum().clamp(min=1)
    return mask / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask)

def ppo_clip_loss(log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantage: torch.Tensor,
                  weight: torch.Tensor, clip: float | tuple = 0.2) -> tuple[torch.Tensor, dict]:
    """PPO's clipped objective, negated (Eq. 6), with one ratio per action step.
    log_prob, old_log_prob (E, S); advantage (E,); weight (E, S) from loss_weight, 0 where no action ran;
    clip: eps, or a pair for [1 - low, 1 + high]. Returns the sum over weighted steps, a scalar, and such sums
    of ratio, clip_frac (where the clip cuts the gradient), outside_clip (where the ratio is out of its range)
    and approx_kl. Parts of a minibatch add up to its own. Raises ValueError for other shapes or a mask."""
    shapes = [tuple(x.shape) for x in (log_prob, old_log_prob, weight, advantage)]
    if log_prob.ndim != 2 or shapes != 3 * shapes[:1] + [shapes[0][:1]] or not weight.is_floating_point():
        raise ValueError(f"log_prob, old_log_prob, weight (floats) must be (E, S), advantage (E,): {shapes}")
    low, high = np.broadcast_to(clip, 2)  # ValueError for three
    # What did not run may be NaN, and must not reach the gradient. The bound keeps ratios finite in float16.
    bound = min(20, math.log(torch.finfo(log_prob.dtype).max))
    log_ratio = torch.where(weight > 0, log_prob.float() - old_log_prob.float(), 0.0)  # E S
    log_ratio = log_ratio.clamp(-bound, bound)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - low, 1 + high)
    plain = ratio * advantage[:, None]
    clipped = bounded * advantage[:, None]
    loss = -(torch.minimum(plain, clipped) * weight).sum()
    with torch.no_grad():
        # approx_kl is Schulman's estimator k3: unbiased, and never negative.
        stats = dict(ratio=(ratio * weight).sum(), clip_frac=((clipped < plain) * weight).sum(),
                     outside_clip=((bounded != ratio) * weight).sum(),
                     approx_kl=((ratio - 1 - log_ratio) * weight).sum())
    return loss, stats

@dataclass
class Episode:
    """One rollout: everything that passes between the simulator and the optimiser."""
    context: "Context"
    group: int = 0  # the number of its group in the stream of contexts
    seed_key: tuple = ()  # of the exploration: seed, iteration, group, k
    chunks: list[dict] = field(default_factory=list, repr=False)  # the policy's action chunks, one per query
    num_executed: list[int] = field(default_factory=list)  # how many of each chunk's H action steps ran
    success: Optional[bool] = None  # the reward; None until the episode has ended
    deterministic: bool = False  # act with the mean

async def rollout(simulator: "Simulator", episode: Episode, actor: "Actor", horizon: int):
    """Run an episode in a simulator: reset, then act and step until success or the horizon."""
    episode.chunks, episode.num_executed = [], []
    result = await simulator.call("reset", episode.context)
    while sum(episode.num_executed) < horizon and not result.success:
        chunk = await actor.act(result.observation, episode)
        actions = chunk.pop("actions")[:horizon - sum(episode.num_executed)]
        require(np.isfinite(actions).all(), f"an action is not finite in {episode}", RuntimeError)
        result = await simulator.call("step", actions)
        if episode.deterministic:
            chunk.pop("observation", None)  # nothing learns from its pictures
        episode.chunks.append(chunk)
        episode.num_executed.append(result.num_executed)
    require(result.success in (False, True), f"success must be True or False, got {result.success!r}")
    episode.success = bool(result.success)

class Actor:
    """Asks the policy for actions. Rollouts that wait at the same time share a forward."""
    def __init__(self, policy: nn.Module, batch: int):
        self.policy, self.batch = policy, batch or sys.maxsize  # observations per forward; 0: all that wait
        self.waiting = []  # an observation, its episode and a Future for each rollout
        self.checked = not hasattr(policy, "log_prob")  # which collect does not need

    async def act(self, observation, episode: Episode) -> dict:
        """An episode's next action chunk. The first rollout that waits runs the forward for all of them."""
        turn = asyncio.get_running_loop().create_future()
        self.waiting.append((observation, episode, turn))
        if self.waiting[0][-1] is not turn:
            chunk = await turn
            if chunk is not None:  # None: the rollouts before this one have their chunks, now it is the first
                return chunk
        await asyncio.sleep(0)  # every rollout that can go on by now does so first
        seen = 0
        while seen < len(self.waiting) < self.batch:
            # Observations arrive in parts. As long as each millisecond completes more, they join.
            seen = len(self.waiting)
            await asyncio.sleep(0.001)
        observations, episodes, turns = zip(*self.waiting[:self.batch])
        del self.waiting[:self.batch]
        instructions = [episode.context.instruction for episode in episodes]
        # Seeded per query, so batching does not change the noise.
        generators = [None if e.deterministic else np.random.default_rng((*e.seed_key, len(e.chunks)))
                      for e in episodes]
        chunks = self.policy.act(observations, instructions, generators)
        if not self.checked:
            self.check(chunks[0])
        for turn, chunk in zip(turns[1:], chunks[1:]):
            turn.set_result(chunk)
        if self.waiting:
            self.waiting[0][-1].set_result(None)
        return chunks[0]

    def check(self, chunk):
        """Raise UserError unless the first chunk is as it must be: an update would notice it too late."""
        self.checked = True
        policy = self.policy
        with trying("the policy's action chunks", "use"):
            T = getattr(policy, "tokens_per_query", 0) or policy.chunk
            log_prob = policy.log_prob([chunk])
            wanted = policy.chunk, (T,), (1, T)
            found = len(chunk["actions"]), np.shape(chunk["log_prob"]), tuple(log_prob.shape)
            require(found == wanted, "actions, chunk['log_prob'] and log_prob([chunk]) have the sizes "
                    f"{found}, they must be {wanted}")
            learns = log_prob.requires_grad or not any(p.requires_grad for p in policy.parameters())
            finite = math.isfinite(sum(float(chunk.get(name, 0)) for name in LOGGED))
            require(learns and finite, f"log_prob needs a gradient, {', '.join(LOGGED)} must be numbers")

def collect(policy: nn.Module, simulators: "Simulators", context_of: Callable[[int], "Context"],
            state: "TrainState", cfg: Config) -> tuple[list[Episode], dict]:
    """Algorithm 1, lines 4-14: -> the kept episodes of this process's share, K after K, and statistics.
    context_of(number) is the context of a group; state.group, the next number, advances."""
    began = time.time()
    actor, groups = Actor(policy, cfg.act_batch), []

    async def keep_one():
        while len(groups) < (cfg.groups + cfg.max_rejected) // WORLD:
            number = state.group + RANK + WORLD * len(groups)  # process r of W takes r, r + W, r + 2 W, ...
            group = new_group(number, context_of, state, cfg)
            groups.append(group)
            await simulators.run_episodes(rollout, group, actor)
            signal = has_signal(rewards_of([group])).item()
            simulators.counts["groups kept" if signal else "rejected"] += 1
            if signal:
                break
            for chunk in [chunk for episode in group for chunk in episode.chunks]:
                chunk.pop("observation", None)  # pictures, which take memory and are not used any more

    # Each of the B / K slots draws contexts until its group has signal.
    slots = [keep_one() for _ in range(cfg.groups // WORLD)]
    asyncio.run(simulators.run(slots, f"rollouts of iteration {state.iteration + 1}"))
    seconds = time.time() - began
    # Every process goes on at the same number, beyond all that any of them has used.
    state.group += WORLD * max(all_gather(len(groups)))
    waited = all_gather(time.time() - began - seconds)
    # Every started group has finished, so fast ones are not over-represented.
    kept = [episode for group in groups if has_signal(rewards_of([group])) for episode in group]
    return kept, rollout_stats(groups) | dict(seconds_rollouts=seconds, seconds_waiting=waited)

def new_group(number: int, context_of: Callable[[int], "Context"], state: "TrainState", cfg: Config):
    """The K episodes of a context, which have not begun yet."""
    key = cfg.seed, state.iteration, number
    return [Episode(context_of(number), number, (*key, k)) for k in range(cfg.rollouts)]

def rewards_of(groups: list[list[Episode]]) -> torch.Tensor:
    """The rewards of C groups of K episodes: (C, K) bool."""
    return torch.tensor([[episode.success for episode in group] for group in groups])

def make_micro_batches(episodes: list[Episode], chosen: Iterable[int], size: int) -> list[list[tuple]]:
    """The chunks of the chosen episodes, numbers (e, q) of episode and query, in lists of at most size."""
    chunks = [(e, q) for e in chosen for q in range(len(episodes[e].chunks))]
    return [chunks[start:start + size] for start in range(0, len(chunks), size)]

def compute_old_log_probs(policy: nn.Module, episodes: list[Episode], parts: list[list[tuple]]):
    """-> (E, Q, H) each: what counts, bool; the old log_prob; and log_prob as act has recorded it."""
    queries = max((len(episode.chunks) for episode in episodes), default=0)
    tokens = getattr(policy, "tokens_per_query", 0)
    mask = torch.zeros(len(episodes), queries, tokens or policy.chunk, dtype=torch.bool)
    old, recorded = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for part in parts:
        log_prob = policy.log_prob([episodes[e].chunks[q] for e, q in part]).detach().cpu()  # N H
        for (e, q), row in zip(part, log_prob):
            # Action steps after success did not run. Of tokens all count, since each decides every step.
            counted = tokens or episodes[e].num_executed[q]
            require(row[:counted].isfinite().all(), f"log_prob is not finite in {episodes[e]}", RuntimeError)
            mask[e, q, :counted] = True
            old[e, q] = row
            recorded[e, q] = torch.as_tensor(episodes[e].chunks[q]["log_prob"])
    return mask, old, recorded

def update(policy: nn.Module, optimizer: torch.optim.Optimizer, episodes: list[Episode], cfg: Config,
           state: "TrainState") -> dict:
    """Algorithm 1, lines 15-17: N passes of minibatches over the kept episodes: -> mean diagnostics."""
    began = time.time()
    size = cfg.micro_batch or getattr(policy, "micro_batch", 64)
    rng = np.random.default_rng([cfg.seed, state.iteration])
    # A minibatch is cfg.minibatch episodes of all processes. Each takes as many steps as the others.
    steps = max(all_gather(math.ceil(len(episodes) * WORLD / cfg.minibatch)))
    minibatches = np.array_split(rng.permutation(len(episodes)), steps)
    parts = [make_micro_batches(episodes, minibatch, size) for minibatch in minibatches]
    # Later passes permute the same batches: in bfloat16, others change a log_prob by 0.4 (std).
    order = list(range(steps))
    for _ in range(1, cfg.ppo_epochs):
        order += rng.permutation(steps).tolist()
    mask, old, recorded = compute_old_log_probs(policy, episodes, sum(parts, []))  # E Q H each
    advantage = leave_one_out_advantage(rewards_of([episodes]).view(-1, cfg.rollouts)).flatten()  # E
    # How far off the log-probabilities are that act has recorded: with its batches it runs other kernels.
    gap = (recorded - old)[mask] if episodes else torch.zeros(1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    logs = []
    bar = progress_bar(f"update of iteration {state.iteration + 1}", order)
    for minibatch, its_parts in ((minibatches[i], parts[i]) for i in bar):
        # The loss is a mean over the episodes, or steps, of all processes: their weights sum to 1.
        counted = mask[minibatch]
        mine = len(minibatch) if cfg.loss_per == "episode" else int(counted.sum())
        weight = torch.zeros(mask.shape)  # E Q H
        weight[minibatch] = loss_weight(counted.flatten(1), cfg.loss_per).view(counted.shape)
        weight *= mine / sum(all_gather(mine))
        log = Counter()
        for part in its_parts:
            log_prob = policy.log_prob([episodes[e].chunks[q] for e, q in part]).cpu()  # N H
            e, q = torch.tensor(np.array(part)).T  # N each
            loss, stats = ppo_clip_loss(log_prob, old[e, q], advantage[e], weight[e, q], cfg.clip_coef)
            loss.backward()
            log.update(loss=loss.item(), **{name: value.item() for name, value in stats.items()})
        reduce_gradients(parameters)
        log = all_reduce_sum(log)
        log["grad_norm"] = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).item()
        finite = math.isfinite(log["grad_norm"])
        require(finite, f"the gradient is not finite in iteration {state.iteration + 1}", RuntimeError)
        optimizer.step()
        optimizer.zero_grad()  # now, so that gradients take no memory during the next rollouts
        logs.append(log)
        bar.set_postfix_str(f"clip_frac {log['clip_frac']:.3f}, approx_kl {log['approx_kl']:.5f}", False)
    means = {name: float(np.mean([log[name] for log in logs])) for name in logs[0]}
    return means | dict(updates=len(logs), seconds_update=time.time() - began,
                        ratio_error=max(all_gather((gap.exp() - 1).abs().max().item())),
                        act_std=max(all_gather(gap.std(correction=0).item())))

# ------------------------------------------------------------------------------------ 3. The policy wrapper
class ScaleHead(nn.Sequential):
    """The head that RIPT adds (section 4.2 of the paper): (B, H, F) -> log b of every action, (B, H, A)."""
    # Its trunk, (B, H, F) -> (B, H, width), is like the action head's. It is fitted by maximum likelihood
    # before stage 3 and frozen in it. Its modules have the names of the released scale_header.pth.
    def __init__(self, trunk: nn.Module, width: int, A: int):
        super().__init__(OrderedDict(trunk=trunk, log_b_head=nn.Linear(width, A)))
        # It starts at b = 0.05 whatever the features are.
        nn.init.xavier_uniform_(self.log_b_head.weight, gain=0.01)
        nn.init.constant_(self.log_b_head.bias, -3.0)

class LaplacePolicy(nn.Module):
    """Wraps a VLA that regresses action chunks as a Laplace policy: a density around its prediction.

    A subclass has action_head and scale_head, modules (B, H, F) -> (B, H, A), and these methods:
      load(cfg)                               a classmethod: the policy that a run starts from
      preprocess(raw)                         the simulator's arrays -> the observation that an episode stores
      features(observations, instructions)    lists of length B -> (B, H, F), with gradient
      to_env_actions(normalised)              (..., A) in head units -> numpy (..., A) in the environment's
      save(directory)                         write what load reads; rank 0 alone is asked"""
    # A policy that chooses tokens needs none of this class (policies/quest.py): it has load, preprocess, act,
    # log_prob, parameter_groups and save as they are here, chunk and tokens_per_query.
    PRESET = {}  # settings by suite, which replace the defaults of Config
    tokens_per_query = 0  # the columns of log_prob; 0 where it has one for each action step
    chunk = 8  # action steps per query, H
    scale_range = (math.exp(-2), math.exp(0.5))  # bounds of b, normalised units: numbers, or (A,) each
    scale_multiplier = 1.0

    def predict(self, observations, instructions):
        """-> mean and log_scale as the two heads give them, (B, H, A) each, normalised units, float32."""
        features = self.features(observations, instructions).float()  # B H F
        return self.action_head(features), self.scale_head(features)

    def density(self, observations, instructions):
        """-> mean and log b of the density that actions are drawn from and scored with, (B, H, A) each."""
        mean, log_scale = self.predict(observations, instructions)
        low, high = torch.tensor(self.scale_range).log().to(mean)
        # The clamp comes last. Before the multiplication it would give b = 5 exp(-2) = 0.68 wherever the head
        # says b < 0.14, and few grasps survive that.
        return mean, (log_scale + math.log(self.scale_multiplier)).clamp(low, high)

    @torch.no_grad()
    def act(self, observations, instructions, generators):
        """An action chunk for each of B observations, drawn with its numpy Generator or, for None, the mean:
        -> B dicts: "actions" (H, A) for the environment, what log_prob needs, and for the log the mean
        b as "scale" and the shares of b "at_low" and "at_high", the bounds."""
        mean, log_scale = self.density(observations, instructions)
        size = mean.shape[1:]
        noise = np.stack([np.zeros(size) if g is None else g.laplace(size=size) for g in generators])
        sample = mean + log_scale.exp() * torch.as_tensor(noise).to(mean)  # B H A
        log_prob = laplace_log_prob(sample, mean, log_scale)  # B H
        low, high = torch.tensor(self.scale_range).log().to(mean)
        logged = dict(scale=log_scale.exp(), at_low=log_scale <= low, at_high=log_scale >= high)
        columns = dict(observation=observations, instruction=instructions, sample=sample.cpu().numpy(),
                       log_prob=log_prob.cpu().numpy(), actions=self.to_env_actions(sample))
        columns |= {name: value.float().mean((1, 2)).tolist() for name, value in logged.items()}
        return [dict(zip(columns, row)) for row in zip(*columns.values())]

    def log_prob(self, chunks: list[dict]) -> torch.Tensor:
        """Log-probability of each action step of B chunks that act has returned, with gradient: (B, H)."""
        observations = [chunk["observation"] for chunk in chunks]
        instructions = [chunk["instruction"] for chunk in chunks]
        sample = torch.tensor(np.stack([chunk["sample"] for chunk in chunks]))  # B H A
        mean, log_scale = self.density(observations, instructions)
        return laplace_log_prob(sample.to(mean), mean, log_scale)

    def parameter_groups(self):
        """AdamW's groups: all that requires gradient. A group's own lr, else cfg.lr, is kept and annealed."""
        return [dict(params=[p for p in self.parameters() if p.requires_grad], weight_decay=1e-4)]

# ----------------------------------------------------------------------------------------------- 4. LIBERO
@dataclass
class Context:
    """What an episode starts from: a task, and how to reset to one scene of it."""
    task: int
    instruction: str
    seed: int  # of numpy's global generator, from which a reset draws where things stand
    state: Optional[np.ndarray] = field(default=None, repr=False)  # flattened, to set after the reset

class StepResult(NamedTuple):
    """What a simulator answers to reset and step."""
    num_executed: int  # action steps
    success: bool
    observation: Optional[dict]  # raw; None after success: nothing is rendered

class Suite:
    """The protocol of suites. A class knows its tasks; an instance, in a process of its own, simulates them:
      reset(context)           start an episode, a function of the context alone -> StepResult
      control_step(action)     run one action (A,)
      success()                whether the task is solved now: the reward
      get_observation()        a dict of arrays, for the policy's preprocess
      demonstrate(context)     where it has an expert for stage 2 (scripts/sft.py): an episode of it"""
    INSTRUCTIONS = ()  # a text per task
    HORIZON = 0  # control steps that an episode may take, a number or one per task
    PRESET = {}  # settings by model, which replace the defaults of Config and the policy's own
    CONTROL_STEP = ""  # a name, where a suite can have one of several

    def __init__(self, image_size=256, collision=False):
        self.image_size, self.collision = image_size, collision  # pixels; whether collision meshes are drawn
        self.env, self.task = None, None  # the simulator's environment, and the task that it is for

    @classmethod
    def eval_init_states(cls, task, number):
        """Simulator states of a task's held-out contexts; None where their seeds, 0, 1, ..., are enough."""
        return [None] * number

    def make_env(self, task):
        """Make the task's environment, unless it is there."""

    def step(self, actions: np.ndarray) -> StepResult:
        """Run actions (H, A), one after another, until success."""
        for number, action in enumerate(actions, 1):
            self.control_step(action)
            success = self.success()
            if success:
                return StepResult(number, success, None)
        return StepResult(len(actions), success, self.get_observation())

class Robosuite(Suite):
    """What suites in robosuite share: a Panda arm and two cameras."""
    CAMERAS = ("agentview", "robot0_eye_in_hand")
    ROBOT = dict(robots=["Panda"], use_camera_obs=False, has_renderer=False, has_offscreen_renderer=True,
                 ignore_done=True, control_freq=20, hard_reset=False)
    CONTROL_STEP = "robosuite"

    def control_step(self, action):
        """Run one action (7,) for 50 ms."""
        self.env.step(action)

    def success(self) -> bool:
        """The reward: whether the task's goal holds."""
        return self.env._check_success()

    def get_observation(self) -> dict:
        """The raw observation, by robosuite's names."""
        # Pictures are drawn once in H control steps, which is five times faster than in each.
        pictures = {f"{camera}_image": self.render(camera, self.image_size, self.collision)
                    for camera in self.CAMERAS}
        return self.env._get_observations(force_update=True) | pictures

    def render(self, camera, size, collision):
        """One picture (size, size, 3) uint8, upside down as OpenGL has it."""
        self.env.sim._render_context_offscreen.vopt.geomgroup[:2] = (collision, not collision)
        return self.env.sim.render(camera_name=camera, width=size, height=size)

class Libero(Robosuite):
    """A suite of LIBERO by name. Called with picture settings, it makes one that simulates."""
    NAME = ""  # in classes that derive from it: the suite of LIBERO that they are made of

    def __init__(self, name="", image_size=256, collision=False):
        super().__init__(image_size, collision)
        self.name = self.NAME or name
        with redirect_stdout(None):  # the first import prints where it keeps its settings
            from libero.libero import benchmark
            self.benchmark = benchmark.get_benchmark(self.name)()
        self.HORIZON = self.HORIZON or LIBERO[self.name]
        self.INSTRUCTIONS = self.INSTRUCTIONS or [task.language for task in self.benchmark.tasks]

    def __call__(self, image_size=256, collision=False):
        return type(self)(self.name, image_size, collision)

    def eval_init_states(self, task, number):
        """LIBERO's stored states of a task."""
        states = self.benchmark.get_task_init_states(task)
        require(number <= len(states), f"--eval_contexts must be at most {len(states)}, got {number}")
        return states[:number]

    def make_env(self, task):
        if task == self.task:
            return
        if self.env:
            self.env.close()  # EGL wants that before the next one
        from libero.libero.envs.env_wrapper import ControlEnv
        bddl_file = self.benchmark.get_task_bddl_file_path(task)
        self.env = ControlEnv(bddl_file_name=bddl_file, **self.ROBOT).env
        self.task = task

    def reset(self, context: Context) -> StepResult:
        """Seed, reset, set the state and let things settle."""
        # The seed places LIBERO's fixtures, which are no part of the state: a group must share them.
        self.make_env(context.task)
        np.random.seed(context.seed % 2 ** 32)
        # LIBERO places what stands on a fixture as if the last reset had left the fixture at the origin.
        fixtures = [self.env.obj_body_id[name] for name in self.env.fixtures_dict]
        self.env.sim.model.body_pos[fixtures] = 0
        self.env.sim.model.body_quat[fixtures] = 1, 0, 0, 0
        self.env.reset()
        if context.state is not None:
            self.env.sim.set_state_from_flattened(context.state)
        else:
            # In stored states the arm's joints are off by this, in radians. A fresh reset leaves them alone.
            joints = self.env.robots[0]._ref_joint_pos_indexes
            self.env.sim.data.qpos[joints] += np.random.normal(0, 0.02, len(joints))
        self.env.sim.forward()
        for _ in range(10):
            self.control_step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
        return StepResult(0, False, self.get_observation())

def load_class(known: dict, base: type, name: str) -> type:
    """The class that a name in known, or FILE.py:Class, stands for. Raises UserError where there is none."""
    path = known.get(name, name)
    file, _, attribute = path.rpartition(":")
    require(file, f"{name}: use FILE.py:Class or {', '.join(known)}")
    place = file.replace(".", "/") + ".py"
    require(name not in known or (HERE / place).exists(), f"{name} is {place} of ript.py's repository, which "
            f"is not beside {HERE}/ript.py: get the whole repository, or give FILE.py:Class")
    if file.endswith(".py"):  # its neighbours, or its package, can be imported, after what is beside ript.py
        folders = Path(file).resolve().parents
        top = next(folder for folder in folders if not (folder / "__init__.py").exists())
        sys.path[1:1] = {str(top)} - set(sys.path)
    with reading(file):
        found = runpy.run_path(file).get(attribute) if file.endswith(".py") else pkgutil.resolve_name(path)
    require(isinstance(found, type) and issubclass(found, base), f"{name} is no subclass of {base.__name__}")
    return found

@cache
def load_policy(name: str) -> type[nn.Module]:
    """The class of a policy, by its name or FILE.py:Class."""
    return load_class(POLICIES, nn.Module, name)

@cache
def load_suite(name: str) -> type[Suite] | Libero:
    """A suite, by its name or FILE.py:Class: called with (image_size, collision), it makes what simulates."""
    name = ALIASES.get(name, name)
    if name in LIBERO and not (HERE / "simulators/libero.py").exists():
        return Libero(name)  # with robosuite's own control step
    suite = load_class(SUITES | ALIASES, Suite, name)
    return suite(name) if issubclass(suite, Libero) else suite

def tasks_of(cfg: Config) -> dict[int, str]:
    """Numbers and instructions of the tasks that a run is about."""
    suite = load_suite(cfg.suite)
    texts = dict(enumerate(suite.INSTRUCTIONS))
    with trying(f"the INSTRUCTIONS and the HORIZON of {cfg.suite}", "use"):
        fits = all(len(text) > 1 and range(horizon_of(suite, task)) for task, text in texts.items())
    require(texts and fits, f"{cfg.suite} needs INSTRUCTIONS, a text per task, and a HORIZON above 0")
    require(cfg.task < len(texts), f"--task must be below {len(texts)} for {cfg.suite}, got {cfg.task}")
    return texts if cfg.task < 0 else {cfg.task: texts[cfg.task]}

def horizon_of(suite: type[Suite] | Suite, task: int) -> int:
    """The control steps that an episode of a task may take."""
    return suite.HORIZON if np.ndim(suite.HORIZON) == 0 else suite.HORIZON[task]

def worker_main(socket_number: int, model: str, suite: str, image_size: int, collision: bool):
    """A simulator's process: answers the trainer's calls until the trainer is gone, even if it was killed."""
    torch.set_num_threads(1)
    pipe, simulator = Connection(socket_number), None
    with suppress(EOFError, OSError):
        for method, arguments in iter(pipe.recv, None):
            try:
                simulator = simulator or load_suite(suite)(image_size, collision)
                result = getattr(simulator, method)(*arguments)
                if isinstance(result, StepResult) and result.observation is not None:
                    result = result._replace(observation=load_policy(model).preprocess(result.observation))
            except Exception:
                result = SimulatorError(traceback.format_exc())
            pipe.send(result)
    # At exit robosuite's destructors would free what is freed already.
    os._exit(0)

class SimulatorError(RuntimeError):
    """A simulator died, was silent for too long, or raised."""

class Simulator:
    """A simulator in a process of its own."""
    PATIENCE = 300  # seconds for an answer

    def __init__(self, cfg):
        self.settings = cfg.model, cfg.suite, cfg.image_size, cfg.collision
        self.task = None  # of the episode that it has had last
        self.start()

    def start(self):
        """Start the process, in a session of its own: Ctrl-C is for the trainer alone."""
        self.socket, its = socket.socketpair()
        command = f"import ript; ript.worker_main({its.fileno()}, *{self.settings})"
        variables = os.environ | dict(PYTHONPATH=os.pathsep.join([str(HERE), *sys.path]))
        self.process = subprocess.Popen([sys.executable, "-c", command], env=variables,
                                        pass_fds=[its.fileno()], start_new_session=True)
        its.close()  # without this end here, the socket says when the process is dead
        self.failed = False

    def close(self):
        """End the process at once, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        self.socket.close()

    async def call(self, method: str, *arguments):
        """-> what a method of the simulator returns. The call after one that failed starts a new process."""
        if self.failed:
            self.close()
            self.start()
        self.failed = True
        message = pickle.dumps((method, arguments))
        try:
            async with asyncio.timeout(self.PATIENCE):  # while an answer arrives, other rollouts go on
                reader, writer = await asyncio.open_connection(sock=self.socket.dup())
                with closing(writer):
                    # The messages of a Connection begin with their length.
                    writer.write(len(message).to_bytes(4, "big") + message)
                    size = int.from_bytes(await reader.readexactly(4), "big")
                    result = pickle.loads(await reader.readexactly(size))
        except (OSError, EOFError) as error:  # TimeoutError is the one, an answer that breaks off the other
            raise SimulatorError(f"{method}: {type(error).__name__} {error}") from error
        if isinstance(result, SimulatorError):
            raise result
        self.failed = False
        return result

class Simulators:
    """The simulators of this process, and the episodes that wait for one."""
    TRIES = 3  # processes for an episode

    def __init__(self, cfg):
        self.suite = load_suite(cfg.suite)
        self.all = [Simulator(cfg) for _ in range(cfg.workers)]

    async def run(self, coroutines, title: str):
        """Run coroutines, which await run_episodes, to their ends. A bar counts episodes and outcomes."""
        self.idle, self.waiting = list(self.all), {}  # waiting: Futures of a simulator, each with a task
        self.counts = Counter(succeeded=0)  # what the bar shows beside the episodes
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for the policy: the simulators need the other cores
        try:
            with progress_bar(title, ()) as self.bar:
                await asyncio.gather(*coroutines)
        finally:
            torch.set_num_threads(threads)

    async def run_episodes(self, rollout, episodes: list[Episode], *arguments):
        """Await rollout(simulator, episode, *arguments, horizon) for each episode."""
        self.bar.total += len(episodes)
        await asyncio.gather(*(self.run_episode(rollout, episode, *arguments) for episode in episodes))

    async def run_episode(self, rollout, episode: Episode, *arguments):
        """The same for one. If its simulator fails, it begins again in a new process."""
        # A rollout depends on its context and its seeds alone, so its result does not change.
        task, turn = episode.context.task, asyncio.get_running_loop().create_future()
        self.waiting[turn] = task
        self.match()
        simulator = await turn
        for left in reversed(range(self.TRIES)):
            try:
                await rollout(simulator, episode, *arguments, horizon_of(self.suite, task))
                break
            except SimulatorError as error:
                if not left:
                    raise RuntimeError(f"the simulator failed {self.TRIES} times at {episode}") from error
        self.idle.append(simulator)
        self.match()
        self.counts["succeeded"] += episode.success
        self.bar.set_postfix(self.counts, refresh=False)
        self.bar.update()

    def match(self):
        """Give free simulators to episodes that wait, to those first whose environment they have."""
        while self.idle and self.waiting:
            pairs = ((s, turn) for s in self.idle for turn, task in self.waiting.items() if s.task == task)
            simulator, turn = next(pairs, (self.idle[0], next(iter(self.waiting))))
            self.idle.remove(simulator)
            simulator.task = self.waiting.pop(turn)
            turn.set_result(simulator)

@contextmanager
def open_simulators(cfg: Config):
    """The simulators of this process, within a with statement. Raises UserError if they do not start."""
    with trying(f"{cfg.workers} simulators, try fewer --workers", "start"):
        simulators = Simulators(cfg)
    try:
        try:
            asyncio.run(simulators.all[0].call("make_env", next(iter(tasks_of(cfg)))))
        except SimulatorError as error:
            hint = " (it needs libegl1 and libgl1-mesa-dri on Debian)" if "egl" in str(error).lower() else ""
            raise UserError(f"the simulator does not start{hint}: {str(error).splitlines()[-1]}")
        yield simulators
    finally:
        for simulator in simulators.all:
            simulator.close()

# ---------------------------------------------------------------------- 5. Ranks, evaluation, files and main
def init_distributed(device: str):
    """Choose the device, and make torchrun's processes one group: NCCL on GPUs, gloo on CPUs."""
    said = {name: os.environ[name] for name in (*LAUNCH, "MASTER_PORT") if name in os.environ}
    fits = 0 <= RANK < WORLD and 0 <= LOCAL_RANK < LOCAL_WORLD <= WORLD
    require(fits and (WORLD == 1 or len(said) > len(LAUNCH)), f"the environment has {said}, which torchrun "
            "would set otherwise: start processes with torchrun, or one without these variables")
    require(WORLD == 1 or device in ("cuda", "cpu"), "--device must be cuda or cpu for several "
            f"processes, which have a GPU each, got {device}")
    with trying(f"--device {device}", "use"):
        if device.startswith("cuda"):
            torch.cuda.set_device(LOCAL_RANK if device == "cuda" else device)
        torch.zeros(1, device=device).item()
    if WORLD > 1:
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")  # rank 0 speaks for all
        # When a process dies, torchrun ends those of its machine; those of other machines wait for an hour.
        backend = "nccl" if device.startswith("cuda") else "gloo"
        with trying("torchrun's processes", "join"):
            distributed.init_process_group(backend, timeout=timedelta(hours=1))

def all_gather(value: object) -> list:
    """The value of every process."""
    values = [value] * WORLD
    if WORLD > 1:
        distributed.all_gather_object(values, value)
    return values

def all_reduce_sum(numbers: dict) -> dict:
    """A dict of numbers, summed over the processes."""
    sums = Counter()
    for others in all_gather(dict(numbers)):
        sums.update(others)
    return dict(sums)

def reduce_gradients(parameters: list[nn.Parameter]):
    """Sum gradients over the processes in one flat all-reduce. A process without episodes adds zeros."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if WORLD > 1:
        gradients = [p.grad for p in parameters]
        flat = nn.utils.parameters_to_vector(gradients)
        distributed.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, gradients)

def progress_bar(title: str, items: Iterable):
    """tqdm's bar on a terminal, and elsewhere a line a minute. Rank 0 speaks."""
    from tqdm import tqdm
    tqdm.monitor_interval = 0  # its monitor would be a thread
    line = dict(bar_format="{desc}: {n} of {total}{postfix}\n", mininterval=60, delay=60, leave=True)
    kind = dict(leave=False) if sys.stderr.isatty() else line
    return tqdm(items, title, miniters=1, disable=RANK > 0, **kind)

def rollout_stats(groups: list[list[Episode]]) -> dict:
    """Statistics of an iteration's groups over all processes."""
    rewards = rewards_of(groups)  # C K
    episodes = [episode for group in groups for episode in group]
    chunks = [chunk for episode in episodes for chunk in episode.chunks]
    stats = all_reduce_sum(dict(
        kept=has_signal(rewards).sum().item(), all_success=rewards.all(-1).sum().item(),
        all_fail=(~rewards).all(-1).sum().item(), rollouts=len(episodes), successes=rewards.sum().item(),
        queries=len(chunks), env_steps=sum(sum(episode.num_executed) for episode in episodes),
        **{name: sum(float(chunk.get(name, 0)) for chunk in chunks) for name in LOGGED}))
    stats |= {name: stats[name] / max(stats["queries"], 1) for name in LOGGED}
    return stats | dict(rollout_success=stats["successes"] / stats["rollouts"])

def evaluation_contexts(cfg: Config) -> list[Context]:
    """The held-out contexts of the suite. Training has other seeds."""
    suite = load_suite(cfg.suite)
    return [Context(task, text, seed, state) for task, text in tasks_of(cfg).items()
            for seed, state in enumerate(suite.eval_init_states(task, cfg.eval_contexts))]

def training_context(number: int, cfg: Config) -> Context:
    """The context of a group: a demonstrated one, or without --demos a fresh one of the tasks in turn."""
    tasks = list(tasks_of(cfg).items())
    if cfg.demos:  # which makes the paper's D_context
        states_of = getattr(load_suite(cfg.suite), "demo_init_states", None)
        require(states_of, f"--demos is for suites of LIBERO (simulators/libero.py), {cfg.suite} is none")
        demos = [(*task, 0, state) for task in tasks for state in states_of(cfg.demos, task[0])]
        return Context(*demos[np.random.default_rng([cfg.seed, number]).integers(len(demos))])
    # The scenes of --seed 427 are again those of 0. Seeds beyond 2 ** 32 would be those of held-out ones.
    return Context(*tasks[number % len(tasks)], TRAIN_SEEDS * (cfg.seed % 427 + 1) + number)

def evaluate(policy: nn.Module, simulators: Simulators, contexts: list[Context], cfg: Config,
             name: str) -> float:
    """Act with the mean in every context: -> the share of successes. Writes evaluation_NAME.json."""
    episodes = [Episode(context, deterministic=True) for context in contexts[RANK::WORLD]]
    rollouts = simulators.run_episodes(rollout, episodes, Actor(policy, cfg.act_batch))
    asyncio.run(simulators.run([rollouts], f"evaluation {name}"))
    acted = any(episode.chunks for episode in episodes) or not episodes
    require(acted, f"every held-out context of {cfg.suite} is solved at its reset")
    mine = {f"{cfg.suite} {e.context.task} {e.context.seed}": int(e.success) for e in episodes}
    outcomes = dict(sorted(all_reduce_sum(mine).items()))  # 1 for a success
    if RANK == 0:
        settings = {name: value for name, value in asdict(cfg).items() if name not in ("out", *CHANGEABLE)}
        found = dict(settings=settings, policy=fingerprint(policy), outcomes=outcomes)
        with writing(Path(cfg.out, f"evaluation_{name}.json")) as file:
            file.write_text(json.dumps(found))
    print(f"{name}: {sum(outcomes.values())} of {len(outcomes)} held-out contexts", flush=True)
    return sum(outcomes.values()) / len(outcomes)

@contextmanager
def trying(what: object, verb: str = "read"):
    """Whatever goes wrong within becomes a UserError that says what could not be read, or done."""
    try:
        yield
    except UserError:  # which has its sentence already
        raise
    except Exception as error:  # each library has its own for a damaged file and for a full disk
        raise UserError(f"cannot {verb} {what}: {type(error).__name__}: {error}") from error

reading = trying  # with a path alone: "cannot read PATH: ..."

@contextmanager
def writing(path: Path):
    """Give a temporary path to write a file or a directory to, and move it to path at the end: it is written
    whole or not at all."""
    folder = path.with_name(f"{path.name}.tmp")
    with trying(path, "write"):
        try:
            shutil.rmtree(folder, ignore_errors=True)  # what a run that was killed has left
            folder.mkdir(parents=True)
            yield folder / path.name
            if path.is_dir():
                path.rename(folder / "old")
            os.replace(folder / path.name, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

def lock_run_dir(out: Path):
    """Keep the directory of a run from other runs, for as long as the file that this returns is open."""
    with trying(out, "write"):
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "w")
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        raise UserError(f"another run is using {out}: choose another --out")

@dataclass
class TrainState:
    """How far a run has come."""
    iteration: int = 0  # complete ones
    group: int = 0  # the next number in the stream of contexts
    history: list = field(default_factory=list)  # the rows of metrics.jsonl

def log_iteration(state: TrainState, stats: dict):
    """Add an iteration's row to the history, and print the most of it."""
    gpu_gb = torch.cuda.max_memory_allocated() / 2 ** 30
    state.history.append(dict(iteration=state.iteration) | stats | dict(gpu_gb=gpu_gb))
    shown = dict(success="rollout_success", kept="kept", all_success="all_success", all_fail="all_fail",
                 kl="approx_kl", eval="eval_success")
    texts = [f"{word} {stats[name]:.3g}" for word, name in shown.items() if name in stats]
    print("  ".join([f"iteration {state.iteration}", *texts]), flush=True)
    if (HERE / "scripts/symptoms.py").exists():
        pkgutil.resolve_name("scripts.symptoms:print_new")(state.history)

def fingerprint(policy: nn.Module, trained: bool = True) -> str:
    """A hash of a policy or, if not trained, of its frozen base: names, shapes and up to 2 ** 15 numbers of
    each tensor, and policy.constants, where it has any: what else its actions depend on."""
    found = [getattr(policy, "constants", None)]
    for name, p in policy.state_dict(keep_vars=True).items():
        if trained or not p.requires_grad:
            places = torch.linspace(0, p.numel() - 1, min(p.numel(), 2 ** 15), dtype=torch.float64).long()
            sample = p.detach().flatten()[places.to(p.device)].double().cpu().numpy()
            found += [name, tuple(p.shape), hashlib.sha256(sample).hexdigest()]
    return hashlib.sha256(repr(found).encode()).hexdigest()

def save_run(out: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState):
    """Write last/, metrics.jsonl and, for --resume, run.pt."""
    if RANK > 0:
        return
    with writing(out / "last") as folder:
        policy.save(folder)
    with writing(out / "metrics.jsonl") as file:
        file.write_text("".join(json.dumps(row) + "\n" for row in state.history))
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    saved = dict(base=fingerprint(policy, False), policy=trained, optimizer=optimizer.state_dict())
    with writing(out / "run.pt") as file:
        torch.save(asdict(state) | saved, file)

def load_run(path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Fill policy and optimizer from what save_run wrote."""
    with reading(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        same = saved.pop("base", None) in (None, fingerprint(policy, False))  # None: of an earlier version
        require(same, f"cannot read {path}: it was trained on another base, which has changed since")
        wrong = saved["policy"].keys() ^ {name for name, p in policy.named_parameters() if p.requires_grad}
        require(not wrong, f"cannot read {path}: the policy trains other weights, as {sorted(wrong)[:1]}")
        policy.load_state_dict(saved.pop("policy"), strict=False)
        optimizer.load_state_dict(saved.pop("optimizer"))
        return TrainState(**{option.name: saved[option.name] for option in fields(TrainState)})

def check_out(cfg: Config):
    """Raise UserError unless cfg.out is apart from what the run reads, and new or begun by a run like it."""
    out = Path(cfg.out).resolve()
    held = {path.name for path in out.glob("[!.]*")}
    for name in ("checkpoint", "adapter", "scale_head", "demos"):
        path = Path(getattr(cfg, name) or os.devnull).resolve()
        apart = not path.exists() or not (path.is_relative_to(out) or out.is_relative_to(path))
        require(apart, f"--out {cfg.out} is, holds or lies in --{name} {path}: choose another --out")
    taken = f"{cfg.out} has a run: go on with --resume {cfg.out}, or choose another --out"
    require(not {"run.pt", "last"} & held, taken)
    own = type(cfg) is Config and "config.json" in held and load_config(out).eval == cfg.eval
    free = own or all(".tmp" in name for name in held)  # which a run that was killed may leave
    require(cfg.out and free, f"--out must name a new directory: {cfg.out!r} has {sorted(held)[:3]}")

def check(cfg: Config):
    """Raise UserError for what can be known to go wrong before any long work starts."""
    if not cfg.resume:
        check_out(cfg)
    require(cfg.groups % WORLD == 0, f"--groups must be a multiple of the {WORLD} processes")
    require(cfg.minibatch >= WORLD, f"--minibatch must be at least the number of processes, {WORLD}")
    for name in ("load", "preprocess", "act", "log_prob", "parameter_groups", "save"):
        method = inspect.getattr_static(load_policy(cfg.model), name, None)
        fits = method and (name != "preprocess" or isinstance(method, (classmethod, staticmethod)))
        require(fits, f"{cfg.model} needs {name}, as docs/DETAILS.md has it (preprocess is a class method)")
    training_context(0, cfg)
    evaluation_contexts(cfg)

def run_command(main: Callable[[], object]):
    """Run a script's main(). A UserError is one sentence and exit status 2."""
    # Ctrl-C ends at once, as SIGTERM does: no file is ever half written.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        main()
    except (UserError, OSError) as error:
        name = Path(sys.argv[0]).name + (f", process {RANK}" if RANK > 0 else "")
        print(f"{name}: {' '.join(str(error).split())[:500]}", file=sys.stderr, flush=True)
        sys.exit(2)
    if WORLD > 1:  # not after an error, when the other processes may never answer
        distributed.destroy_process_group()
        sys.stdout.flush()
        # Where the interpreter ends, gloo with an optimiser aborts some processes: all has been done by then.
        os._exit(0)

def main(argv: Optional[list[str]] = None):
    """Algorithm 1 with a line per iteration, between two evaluations on the same contexts."""
    cfg = parse_config(sys.argv[1:] if argv is None else argv)
    check(cfg)
    init_distributed(cfg.device)
    torch.manual_seed(cfg.seed)
    out = Path(cfg.out)
    with lock_run_dir(out) if RANK == 0 else nullcontext(), open_simulators(cfg) as simulators:
        policy = load_policy(cfg.model).load(cfg)
        optimizer = torch.optim.AdamW(policy.parameter_groups(), cfg.lr, (cfg.adam_beta1, 0.999),
                                      fused=cfg.device != "cpu")
        rates = [group["lr"] for group in optimizer.param_groups]  # cfg.lr, where a group has none of its own
        contexts = evaluation_contexts(cfg)
        begun = cfg.resume and (out / "run.pt").exists()  # a run that was stopped before that begins again
        state = load_run(out / "run.pt", policy, optimizer) if begun else TrainState()
        if RANK == 0:
            with writing(out / "config.json") as file:
                file.write_text(json.dumps(asdict(cfg), indent=1))
            with writing(out / "versions.json") as file:
                packages = reversed([*metadata.distributions()])  # of two with a name the first is imported
                file.write_text(json.dumps({p.name: p.version for p in packages}, indent=1))
        suite = f"{cfg.suite}, with its {cfg.control_step or 'own'} control step,"
        print(f"{cfg.model} and {cfg.workers} simulators of {suite} are ready", flush=True)
        if cfg.eval:
            return evaluate(policy, simulators, contexts, cfg, "success")
        if not state.history:
            log_iteration(state, dict(eval_success=evaluate(policy, simulators, contexts, cfg, "SFT")))
            save_run(out, policy, optimizer, state)
        for iteration in range(state.iteration, cfg.iterations):
            if state.history[-1].get("rollout_success") == 1:  # the same number in every process
                print(f"the run is done: every rollout of iteration {iteration} has succeeded", flush=True)
                break
            for group, lr in zip(optimizer.param_groups, rates):
                group["lr"] = lr * (1 - cfg.anneal * iteration / cfg.iterations)
            context_of = partial(training_context, cfg=cfg)
            episodes, stats = collect(policy, simulators, context_of, state, cfg)  # lines 4-14
            if stats["kept"]:
                stats |= update(policy, optimizer, episodes, cfg, state)  # lines 15-17
            state.iteration = iteration + 1
            due = cfg.eval_every and state.iteration % cfg.eval_every == 0
            if due or state.iteration == cfg.iterations:
                stats["eval_success"] = evaluate(policy, simulators, contexts, cfg, "RIPT")
            log_iteration(state, stats)
            save_run(out, policy, optimizer, state)
        if "eval_success" not in state.history[-1]:
            state.history[-1]["eval_success"] = evaluate(policy, simulators, contexts, cfg, "RIPT")
            save_run(out, policy, optimizer, state)

if __name__ == "__main__":
    # Policies and suites say `import ript`. They must get the module whose main() runs, not a second copy.
    import ript
    ript.run_command(ript.main)
