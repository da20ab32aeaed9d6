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

Shapes: B batch, C contexts, K rollouts per context, E episodes, Q queries per episode, N chunks of several
episodes, H action steps per query, S action steps per episode, A action dimensions, F features.
"""
import os
import sys
# OpenMP reads it when torch is imported. Threads that wait would take the simulators' cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import math
import multiprocessing.resource_tracker
import pkgutil
import runpy
import signal
import threading
import time
import traceback
import zipfile
from collections import Counter, OrderedDict, deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import numpy as np
import torch
from torch import distributed, nn

# Policies and suites say `import ript`. They must get this module, and not a second copy of it.
sys.modules.setdefault("ript", sys.modules[__name__])

# --------------------------------------------------------------------------------------- 1. Configuration
POLICIES = {"tiny": "examples.laptop:Tiny", "openvla-oft": "policies.openvla_oft:OpenVLAOFT",
            "quest": "policies.quest:QueST", "pi0": "policies.pi0:Pi0"}
# The suites of LIBERO, with the control steps of their longest demonstrations.
LIBERO = dict(libero_spatial=220, libero_object=280, libero_goal=300, libero_10=520, libero_90=400)
SUITES = dict.fromkeys(LIBERO, "examples.laptop:Laptop") | {"libero_object": "examples.laptop:LiberoObject",
    "tabletop": "examples.laptop:Tabletop", "tabletop_pretrain": "examples.laptop:TabletopPretrain"}
ALIASES = dict(libero_long="libero_10")
# What --resume may change, because no result depends on it.
CHANGEABLE = "resume", "iterations", "workers", "device", "eval_every", "micro_batch"
LOGGED = "scale", "at_low", "at_high"  # what an iteration reports the mean of, over all of act's records
TRAIN_SEEDS = 10_000_000  # training contexts have seeds from here on, and evaluation has 0, 1, 2, ...
# The number of this process, of all processes, and of those on this machine, as torchrun sets them.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
# How many cores a process may use. macOS does not say, and has no limits either.
CORES = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)) // LOCAL_WORLD

def option(default, text):
    """A field of Config: its default, and what --help says of it."""
    return field(default=default, metadata={"help": text})

@dataclass(frozen=True)
class Config:
    """Every setting. Presets of policy and suite override the defaults, the command line overrides both."""
    model: str = option("tiny", f"the policy: {', '.join(POLICIES)} or FILE.py:Class")
    suite: str = option("tabletop", f"the tasks: {', '.join(SUITES | ALIASES)} or FILE.py:Class")
    task: int = option(-1, "only this task of the suite; -1: all of them")
    checkpoint: str = option("", "directory or hub id of the policy to start from")
    adapter: str = option("", "directory of LoRA weights and heads to start from (openvla-oft)")
    scale_head: str = option("", "scale_header.pth to start from (openvla-oft)")
    prefix: Literal["exact", "prompt"] = option("exact", "OpenVLA-OFT's forward pass, or RIPT's release's")
    out: str = option("runs/latest", "directory for the configuration, the metrics and the checkpoints")
    resume: str = option("", "directory of a run to continue after its last complete iteration")
    eval: bool = option(False, "evaluate the policy and stop")
    demos: str = option("", "directory of LIBERO's HDF5 demonstrations, whose first states become D_context")
    seed: int = option(0, "seed of adapters, contexts, exploration and minibatches")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "torch device of the policy")
    # The algorithm. The defaults are the paper's for OpenVLA-OFT, with the released learning rate.
    iterations: int = option(12, "outer steps, M")
    groups: int = option(24, "groups kept per iteration, B / K, over all processes")
    rollouts: int = option(8, "rollouts per context, K")
    max_rejected: int = option(48, "rejected groups per iteration, over all processes, that are replaced")
    passes: int = option(1, "passes over the kept rollouts, N")
    minibatch: int = option(16, "episodes per optimiser step, over all processes")
    micro_batch: int = option(0, "chunks per forward with gradient, for memory alone; 0: the policy's")
    clip: float = option(0.1, "PPO's clip range, eps")
    loss_per: Literal["episode", "token"] = option("episode", "what the loss is a mean over")
    lr: float = option(5e-5, "learning rate of AdamW")
    momentum: float = option(0.9, "AdamW's beta1; 0 suits iterations of a single step")
    anneal: bool = option(False, "let the learning rate fall linearly to zero over the iterations")
    max_grad_norm: float = option(1.0, "the norm that the gradient is clipped to")
    scale_multiplier: float = option(1.0, "factor on the Laplace scale b, when sampling and when scoring")
    eval_contexts: int = option(50, "held-out contexts per task; LIBERO stores 50")
    eval_every: int = option(5, "iterations between evaluations; 0: only before and after")
    workers: int = option(max(1, min(16, CORES)), "simulators of each process")
    image_size: int = option(256, "height and width of the two pictures, pixels")
    collision: bool = option(False, "draw collision meshes, which takes a tenth of the time without a GPU")
    act_batch: int = option(0, "observations per forward; 0: all that wait; 1: --workers changes no result")

class UserError(ValueError):
    """An error that the user can mend. Its text is one sentence that says how."""

def require(condition, message):
    """Raise UserError unless the condition holds."""
    if not condition:
        raise UserError(message)

def parse_config(argv, settings=Config, stage="PRESET"):
    """Fill the dataclass settings: defaults < presets, which policies and suites have under stage < argv."""
    from transformers import HfArgumentParser
    parser = HfArgumentParser(settings, usage=sys.modules[settings.__module__].__doc__, allow_abbrev=False)
    # argparse's complaints become UserErrors.
    parser.error = partial(require, False)
    given = parser.parse_known_args(argv)[0]
    suite = ALIASES.get(given.suite, given.suite)
    # A suite knows better than a policy what suits it.
    preset = getattr(load_policy(given.model), stage, {}).get(suite, {})
    preset = preset | getattr(load_suite(suite), stage, {}).get(given.model, {})
    require(preset or ":" in suite + given.model, f"--model {given.model} is not made for --suite {suite}")
    # An evaluation and stage 2 do not write over the files of a run.
    names = [name.split(":")[-1] for name in (given.model, suite) if name != "tiny"]
    ending = "_sft" if stage == "IMITATION" else "_eval" if given.eval else ""
    parser.set_defaults(out="runs/" + "_".join(names) + ending, **preset)
    saved = {}
    # With --resume the run's own settings are the defaults.
    if given.resume:
        saved = read(Path(given.resume, "config.json"), lambda p: vars(settings(**json.loads(p.read_text()))))
        parser.set_defaults(**saved)
    cfg = settings(**vars(parser.parse_args(argv)))
    cfg = replace(cfg, suite=ALIASES.get(cfg.suite, cfg.suite))
    # A run that goes on stays what it is.
    for name, value in saved.items():
        same = name in CHANGEABLE or getattr(cfg, name) == value
        require(same, f"--resume goes on with the run's own settings, of which --{name} is {value}")
    return replace(cfg, out=cfg.resume or cfg.out)

# --------------------------------------------------------------------------------------- 2. The algorithm
def leave_one_out_advantage(rewards):
    """A_k = R_k - mean of the other K - 1 rewards of the context (Eq. 5): (C, K) -> (C, K) float.

    Raises ValueError for K < 2: a single rollout has no baseline.
    """
    K = rewards.shape[-1]
    if K < 2:
        raise ValueError(f"leave_one_out_advantage needs K >= 2 rollouts per context, got {K}")
    rewards = rewards * 1.0  # bool and int become float
    others = rewards.sum(-1, keepdim=True) - rewards
    return rewards - others / (K - 1)

def has_signal(rewards):
    """The rejection rule (Algorithm 1, lines 11-14): (C, K) -> (C,) bool, False where all K are equal."""
    return (rewards != rewards[:, :1]).any(-1)

def laplace_log_prob(action, mean, log_scale):
    """Log-density of a factorised Laplace, (..., A) each -> (...), summed over A, in float32.

    log p = sum over A of -|action - mean| / b - log(2 b) with b = exp(log_scale), in normalised action units.
    """
    log_scale = log_scale.float()
    distance = (action.float() - mean.float()).abs()
    return (-distance * torch.exp(-log_scale) - log_scale - math.log(2)).sum(-1)

def loss_weight(mask, per="episode"):
    """What each action step counts in the loss: mask (E, S) bool -> (E, S) float, which sums to 1.

    mask is False where no action ran. per="episode": a mean over each episode's steps, then over episodes;
    per="token": a mean over all steps, in which long episodes weigh more. Raises ValueError for another per.
    """
    if per not in ("episode", "token"):
        raise ValueError(f"per must be 'episode' or 'token', got {per!r}")
    if per == "token":
        return mask / mask.sum().clamp(min=1)
    return mask / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask)

def ppo_clip_loss(log_prob, old_log_prob, advantage, weight, clip=0.2):
    """PPO's clipped objective, negated (Eq. 6), with one ratio per action step.

    log_prob, old_log_prob (E, S); advantage (E,); weight (E, S) from loss_weight, 0 where no action ran;
    clip: eps, or a pair for [1 - low, 1 + high]. Returns the sum over weighted steps, a scalar, and such sums
    of ratio, clip_frac (where the clip cuts the gradient), approx_kl. Parts of a minibatch add up to its own.
    """
    low, high = clip if isinstance(clip, (tuple, list)) else (clip, clip)
    # What was not executed may be anything, NaN too, and must not reach the gradient.
    log_ratio = torch.where(weight > 0, log_prob - old_log_prob, 0.0)  # E S
    ratio = log_ratio.exp()
    plain = ratio * advantage[:, None]
    clipped = ratio.clamp(1 - low, 1 + high) * advantage[:, None]
    loss = -(torch.minimum(plain, clipped) * weight).sum()
    with torch.no_grad():
        # approx_kl is Schulman's estimator k3: unbiased, and never negative.
        stats = dict(ratio=(ratio * weight).sum(), clip_frac=((clipped < plain) * weight).sum(),
                     approx_kl=((ratio - 1 - log_ratio) * weight).sum())
    return loss, stats

@dataclass
class Episode:
    """One rollout: everything that passes between the simulator and the optimiser."""
    context: "Context"
    group: int = 0  # the number of its group in the stream of contexts
    noise: Optional[tuple] = None  # seed, iteration, group, k of the exploration; None acts with the mean
    records: list = field(default_factory=list)  # the policy's, one per query
    executed: list = field(default_factory=list)  # how many of each query's H action steps ran
    success: bool = False  # the reward

    def __str__(self):
        return f"iteration {self.noise[1] + 1 if self.noise else 0}, group {self.group}, {self.context}"

def rollout(worker, episode, actor, horizon):
    """Run an episode in a worker's simulator: reset, then look, act and step until success or the horizon."""
    answer = worker.call("reset", episode.context)
    left = horizon
    while left > 0 and not answer.success:
        record = actor.act(answer.observation, episode)
        actions = record.pop("actions")[:left]
        if not np.isfinite(actions).all():
            raise RuntimeError(f"an action is not finite in {episode}")
        answer = worker.call("step", actions)
        left -= answer.ran
        episode.records.append(record)
        episode.executed.append(answer.ran)
    episode.success = bool(answer.success)

class Actor:
    """Asks the policy for actions. Rollouts that wait at the same time, each in a thread, share a forward."""
    def __init__(self, policy, batch):
        self.policy, self.batch = policy, batch or None  # observations per forward; None: all that wait
        self.waiting, self.lock = [], threading.Lock()

    def act(self, raw, episode):
        """-> the record of an episode's next action chunk, from a raw observation."""
        query = Future()
        self.waiting.append((query, self.policy.preprocess(raw), episode))
        with self.lock:
            # Whoever has the lock answers all that have come meanwhile, in their order.
            while not query.done():
                queries, observations, episodes = zip(*self.waiting[:self.batch])
                instructions = [episode.context.instruction for episode in episodes]
                # Each query has a generator of its own, so that a rollout is a function of its numbers.
                generators = [episode.noise and np.random.default_rng((*episode.noise, len(episode.records)))
                              for episode in episodes]
                records = self.policy.act(observations, instructions, generators)
                del self.waiting[:len(queries)]
                for answered, record in zip(queries, records):
                    answered.set_result(record)
        return query.result()

def collect(policy, workers, context_of, run, cfg):
    """Algorithm 1, lines 4-14: -> the kept episodes of this process's share, K after K, and statistics.
    context_of(number) is the context of a group; run["group"], the next number, advances."""
    began = time.time()
    groups, queue, ended = {}, deque(), Counter()

    def launch():
        # Process r of W takes the groups r, r + W, r + 2 W, ...
        number = run["group"] + RANK + WORLD * len(groups)
        noise = cfg.seed, run["iteration"], number
        groups[number] = [Episode(context_of(number), number, (*noise, k)) for k in range(cfg.rollouts)]
        queue.extend(groups[number])

    def rejected(group):
        # A critic learns from groups without signal too (examples/critic.py).
        return not (hasattr(policy, "advantages") or has_signal(rewards_of([group])))

    for _ in range(cfg.groups // WORLD):
        launch()
    play = partial(rollout, actor=Actor(policy, cfg.act_batch), horizon=load_suite(cfg.suite).HORIZON)
    for episode in simulate(play, workers, queue):
        ended[episode.group] += 1
        if ended[episode.group] == cfg.rollouts and rejected(groups[episode.group]):
            for record in sum([e.records for e in groups[episode.group]], []):
                record.pop("observation", None)  # its pictures take memory and are of no more use
            if len(groups) < (cfg.groups + cfg.max_rejected) // WORLD:
                launch()
    # Every process goes on at the same number, beyond all that any of them has used.
    run["group"] += WORLD * max(gather(len(groups)))
    # All that was launched has ended, so timing does not decide what is kept: quick groups are not favoured.
    kept = [episode for group in groups.values() if not rejected(group) for episode in group]
    return kept, summary(list(groups.values()), time.time() - began)

def rewards_of(groups):
    """The rewards of C groups of K episodes: (C, K) bool."""
    return torch.tensor([[episode.success for episode in group] for group in groups])

def micro_batches(episodes, chosen, size):
    """The chunks of the chosen episodes, numbers (e, q) of episode and query, in lists of at most size."""
    chunks = [(e, q) for e in chosen for q in range(len(episodes[e].records))]
    return [chunks[start:start + size] for start in range(0, len(chunks), size)]

def score(policy, episodes, parts):
    """-> (E, Q, H) each: what counts, bool; the old log_prob; and log_prob as act has recorded it."""
    queries = max((len(episode.records) for episode in episodes), default=0)
    mask = torch.zeros(len(episodes), queries, policy.TOKENS or policy.chunk, dtype=torch.bool)
    old, recorded = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for part in parts:
        log_prob = policy.log_prob([episodes[e].records[q] for e, q in part]).detach().cpu()  # N H
        for (e, q), row in zip(part, log_prob):
            if not row.isfinite().all():
                raise RuntimeError(f"log_prob is not finite in {episodes[e]}")
            # Action steps after success did not run. Of tokens all count, since each decides every step.
            mask[e, q, :policy.TOKENS or episodes[e].executed[q]] = True
            old[e, q] = row
            recorded[e, q] = torch.as_tensor(episodes[e].records[q]["log_prob"])
    return mask, old, recorded

def update(policy, optimizer, episodes, cfg, run):
    """Algorithm 1, lines 15-17: N passes of minibatches over the kept episodes: -> mean diagnostics."""
    began = time.time()
    rewards = rewards_of([episodes]).view(-1, cfg.rollouts)  # C K
    split = partial(micro_batches, episodes, size=cfg.micro_batch or getattr(policy, "micro_batch", 64))
    rng = np.random.default_rng([cfg.seed, run["iteration"]])
    # A minibatch is cfg.minibatch episodes of all processes. Each takes as many steps as the others.
    steps = max(gather(math.ceil(len(episodes) * WORLD / cfg.minibatch)))
    passes = [np.array_split(rng.permutation(len(episodes)), steps) for _ in range(cfg.passes)]
    # In bfloat16 other batches move a log_prob by 0.4. So old ones are of the first pass's micro-batches.
    mask, old, recorded = score(policy, episodes, sum(map(split, passes[0]), []))  # E Q H each
    advantage = leave_one_out_advantage(rewards).view(-1, 1).expand(mask.shape[:2])  # E Q
    if hasattr(policy, "advantages"):
        advantage = policy.advantages(episodes)  # E Q, of a policy with a critic
    # How far off the log-probabilities are that act has recorded: with its batches it runs other kernels.
    gap = (recorded - old)[mask] if episodes else torch.zeros(1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    logs = []
    for minibatch in sum(passes, []):
        m = mask[minibatch]
        weight = torch.zeros(mask.shape)
        weight[minibatch] = loss_weight(m.flatten(1), cfg.loss_per).view(m.shape)
        # The loss is a mean over the episodes, or steps, of all processes: their weights sum to 1.
        mine = len(minibatch) if cfg.loss_per == "episode" else int(m.sum())
        weight *= mine / sum(gather(mine))
        log = Counter()
        for part in split(minibatch):
            log_prob = policy.log_prob([episodes[e].records[q] for e, q in part]).cpu()  # N H
            e, q = torch.tensor(np.array(part)).T  # N each
            loss, stats = ppo_clip_loss(log_prob, old[e, q], advantage[e, q], weight[e, q], cfg.clip)
            loss.backward()
            log.update(loss=loss.item(), **{name: value.item() for name, value in stats.items()})
        reduce_gradients(parameters)
        log = total(log)
        log["grad_norm"] = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).item()
        if not math.isfinite(log["grad_norm"]):
            raise RuntimeError(f"the gradient is not finite in iteration {run['iteration'] + 1}")
        optimizer.step()
        optimizer.zero_grad()  # now, so that gradients take no memory during the next rollouts
        logs.append(log)
    means = {name: float(np.mean([log[name] for log in logs])) for name in logs[0]}
    return means | dict(ratio_error=max(gather((gap.exp() - 1).abs().max().item())), updates=len(logs),
                        act_std=max(gather(gap.std(correction=0).item())), seconds_update=time.time() - began)

# ------------------------------------------------------------------------------------ 3. The policy wrapper
class ScaleHead(nn.Sequential):
    """The head that RIPT adds (section 4.2 of the paper): (B, H, F) -> log b of every action, (B, H, A)."""
    # Its trunk, (B, H, F) -> (B, H, width), is like the action head's. It is fitted by maximum likelihood
    # before stage 3 and frozen in it. Its modules have the names of the released scale_header.pth.
    def __init__(self, trunk, width, A):
        super().__init__(OrderedDict(trunk=trunk, log_b_head=nn.Linear(width, A)))
        # It starts at b = 0.05 whatever the features are.
        nn.init.xavier_uniform_(self.log_b_head.weight, gain=0.01)
        nn.init.constant_(self.log_b_head.bias, -3.0)

class LaplacePolicy(nn.Module):
    """What makes a distribution of a VLA that regresses action chunks: a Laplace around its prediction.

    A subclass has action_head and scale_head, modules (B, H, F) -> (B, H, A), and these methods:
      load(cfg)                               a classmethod: the policy that a run starts from
      preprocess(raw)                         the simulator's arrays -> the observation that an episode stores
      features(observations, instructions)    lists of length B -> (B, H, F), with gradient
      to_env_actions(normalised)              (..., A) in head units -> numpy (..., A) in the environment's
      save(directory)                         write what load reads
    """
    # A policy that chooses tokens needs none of this class (policies/quest.py): it has load, preprocess, act,
    # log_prob, parameter_groups and save as they are here, chunk and TOKENS.
    PRESET = {}  # settings by suite, which replace the defaults of Config
    TOKENS = 0  # tokens per query; 0 where log_prob has a column for each action step
    chunk = 8  # action steps per query, H
    scale_range = ((math.exp(-2),) * 7, (math.exp(0.5),) * 7)  # bounds of b, normalised action units
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
        -> B records: "actions" (H, A) for the environment, what log_prob needs, and for the log the mean
        b as "scale" and the shares of b "at_low" and "at_high", the bounds."""
        mean, log_scale = self.density(observations, instructions)
        size = mean.shape[1:]
        noise = np.stack([np.zeros(size) if g is None else g.laplace(size=size) for g in generators])
        sample = mean + log_scale.exp() * torch.as_tensor(noise).to(mean)  # B H A
        log_prob = laplace_log_prob(sample, mean, log_scale)  # B H
        actions = self.to_env_actions(sample)
        lo, hi = torch.tensor(self.scale_range).log().to(mean)
        return [dict(observation=observations[b], instruction=instructions[b], sample=sample[b].cpu().numpy(),
                     log_prob=log_prob[b].cpu().numpy(), scale=log_scale[b].exp().mean().item(),
                     actions=actions[b], at_low=(log_scale[b] <= lo).float().mean().item(),
                     at_high=(log_scale[b] >= hi).float().mean().item()) for b in range(len(observations))]

    def log_prob(self, records):
        """Log-probability of each action step of B records' chunks, with gradient: (B, H)."""
        observations = [record["observation"] for record in records]
        instructions = [record["instruction"] for record in records]
        sample = torch.tensor(np.stack([record["sample"] for record in records]))  # B H A
        mean, log_scale = self.density(observations, instructions)
        return laplace_log_prob(sample.to(mean), mean, log_scale)

    def parameter_groups(self):
        """AdamW's parameter groups: everything that requires gradient."""
        return [dict(params=[p for p in self.parameters() if p.requires_grad], weight_decay=1e-4)]

# ----------------------------------------------------------------------------------------------- 4. LIBERO
@dataclass
class Context:
    """What an episode starts from: a task, and how to reset to one scene of it."""
    task: int
    instruction: str
    seed: int  # of numpy's global generator, from which a reset draws where things stand
    state: Optional[np.ndarray] = field(default=None, repr=False)  # flattened, to set after the reset

class Answer(NamedTuple):
    """What a simulator answers to reset and step."""
    ran: int  # action steps that were executed
    success: bool
    observation: Optional[dict]  # raw, by robosuite's names; None after success, when nobody looks any more

class Libero:
    """A suite of LIBERO. The class knows the tasks; an instance, in a process of its own, simulates them."""
    # Also the protocol of suites: others derive from it and override what differs (examples/laptop.py).
    INSTRUCTIONS = ()  # a text per task
    HORIZON = 0  # control steps of 50 ms that an episode may take
    PRESET = {}  # settings by model, which replace the defaults of Config and the policy's own
    BENCHMARK = None  # LIBERO's object of the suite
    CAMERAS = ("agentview", "robot0_eye_in_hand")
    ROBOT = dict(robots=["Panda"], use_camera_obs=False, has_renderer=False, has_offscreen_renderer=True,
                 ignore_done=True, control_freq=20, hard_reset=False)

    def __init__(self, image_size=256, collision=False):
        self.image_size, self.collision = image_size, collision  # pixels; whether collision meshes are drawn
        self.env, self.task = None, None  # robosuite's environment, and the task that it is for

    @classmethod
    def held_out(cls, task, number):
        """Simulator states of a task's held-out contexts; None where their seeds, 0, 1, ..., are enough."""
        states = cls.BENCHMARK.get_task_init_states(task)
        require(number <= len(states), f"--eval_contexts must be at most {len(states)}, got {number}")
        return states[:number]

    def build(self, task):
        """Make the task's environment, unless it is there."""
        if task == self.task:
            return
        if self.env:
            self.env.close()  # EGL wants that before the next one
        from libero.libero.envs.env_wrapper import ControlEnv
        bddl_file = self.BENCHMARK.get_task_bddl_file_path(task)
        self.env = ControlEnv(bddl_file_name=bddl_file, **self.ROBOT).env
        self.task = task

    def reset(self, context) -> Answer:
        """Seed, reset, set the state and let things settle."""
        from examples.control_step import control_step
        # In this order at every episode: LIBERO's fixtures are placed by the seed and are no part of the
        # state, and all K rollouts of a group must share their scene, or their baseline is wrong.
        self.build(context.task)
        np.random.seed(context.seed % 2 ** 32)
        self.env.reset()
        if context.state is not None:
            self.env.sim.set_state_from_flattened(context.state)
        else:
            # In stored states the arm's joints are off by this, in radians. A fresh reset leaves them alone.
            joints = self.env.robots[0]._ref_joint_pos_indexes
            self.env.sim.data.qpos[joints] += np.random.normal(0, 0.02, len(joints))
        self.env.sim.forward()
        for _ in range(10):
            control_step(self.env, np.array([0, 0, 0, 0, 0, 0, -1.0]))
        return Answer(0, False, self.look())

    def step(self, actions) -> Answer:
        """Run actions (H, 7), one after another, until success."""
        # It is self.env.step(action) with one pass in each of 25 physics steps, where robosuite makes three.
        from examples.control_step import control_step
        for ran, action in enumerate(actions, 1):
            control_step(self.env, action)
            if self.success():
                return Answer(ran, True, None)
        return Answer(len(actions), False, self.look())

    def success(self) -> bool:
        """The reward: whether the task's goal holds."""
        return self.env._check_success()

    def look(self) -> dict:
        """The raw observation."""
        # Pictures are drawn once in H control steps, which is five times faster than in each.
        observation = self.env._get_observations(force_update=True)
        for camera in self.CAMERAS:
            observation[f"{camera}_image"] = self.draw(camera, self.image_size, self.collision)
        return observation

    def draw(self, camera, size, collision):
        """One picture (size, size, 3) uint8, upside down as OpenGL has it."""
        self.env.sim._render_context_offscreen.vopt.geomgroup[:2] = (collision, not collision)
        return self.env.sim.render(camera_name=camera, width=size, height=size)

def load_class(known, base, name):
    """The class that a name in known, or FILE.py:Class, stands for. Raises UserError where there is none."""
    path = known.get(name, name)
    file, _, attribute = path.rpartition(":")
    require(file, f"{name} is none of {', '.join(known | ALIASES)}, FILE.py:Class")
    if file.endswith(".py"):
        found = read(file, runpy.run_path).get(attribute)
    else:
        found = read(path, pkgutil.resolve_name)
    require(isinstance(found, type) and issubclass(found, base), f"{name} is no subclass of {base.__name__}")
    return found

load_policy = cache(partial(load_class, POLICIES, nn.Module))  # -> a policy's class, by name or FILE.py:Class

@cache
def load_suite(name):
    """The class of a suite, by its name or FILE.py:Class."""
    name = ALIASES.get(name, name)
    base = load_class(SUITES, Libero, name)
    if name not in LIBERO:
        return base
    with redirect_stdout(None):  # the first import prints where it keeps its settings
        from libero.libero import benchmark
        tasks = benchmark.get_benchmark(name)()
    texts = [task.language for task in tasks.tasks]
    return type(name, (base,), dict(BENCHMARK=tasks, HORIZON=LIBERO[name], INSTRUCTIONS=texts))

def tasks_of(cfg) -> dict[int, str]:
    """Numbers and instructions of the tasks that a run is about."""
    texts = dict(enumerate(load_suite(cfg.suite).INSTRUCTIONS))
    require(cfg.task < len(texts), f"--task must be below {len(texts)} for {cfg.suite}, got {cfg.task}")
    return texts if cfg.task < 0 else {cfg.task: texts[cfg.task]}

def serve(pipe, suite, image_size, collision):
    """A simulator's process: answers the trainer's calls until the trainer is gone, even if it was killed."""
    from examples.headless import begin
    begin()
    simulator = None
    with suppress(EOFError, OSError):
        while True:
            method, arguments = pipe.recv()
            try:
                simulator = simulator or load_suite(suite)(image_size, collision)
                answer = getattr(simulator, method)(*arguments)
            except Exception:
                answer = SimulatorError(traceback.format_exc())
            pipe.send(answer)
    # At exit robosuite's destructors would free what is freed already.
    os._exit(0)

class SimulatorError(RuntimeError):
    """A simulator died, was silent for too long, or raised."""

class Worker:
    """A simulator in a process of its own."""
    PATIENCE, TRIES = 300, 3  # seconds for an answer; processes for an episode

    def __init__(self, cfg, task):
        self.settings = cfg.suite, cfg.image_size, cfg.collision
        self.task = task  # of the episode that it has had last
        self.start()

    def start(self):
        """Start the process."""
        spawn = multiprocessing.get_context("spawn")  # OpenGL and CUDA do not survive a fork
        self.pipe, end = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(end, *self.settings), daemon=True)
        # The child inherits that Ctrl-C is for the trainer alone.
        multiprocessing.resource_tracker.ensure_running()  # here, because it would unblock the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        self.process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        # Without this end here, the pipe says when the process is dead.
        end.close()

    def close(self):
        """End the process at once, whatever it is doing."""
        self.process.kill()
        self.process.join()

    def call(self, method, *arguments):
        """-> what a method of the simulator returns. Raises SimulatorError."""
        try:
            self.pipe.send((method, arguments))
            if not self.pipe.poll(self.PATIENCE):
                raise TimeoutError(f"no answer in {self.PATIENCE} seconds")
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise SimulatorError(f"{method}: {type(error).__name__}: {error}") from error
        if isinstance(answer, SimulatorError):
            raise answer
        return answer

    def play(self, play, episode):
        """-> this worker and the episode, after play(worker, episode)."""
        # A new process starts the episode again. A rollout is a function of its numbers: no result changes.
        self.task = episode.context.task
        for _ in range(self.TRIES):
            episode.records, episode.executed = [], []
            try:
                play(self, episode)
                return self, episode
            except SimulatorError as error:
                failure = error
                self.close()
                self.start()
        raise RuntimeError(f"the simulator failed {self.TRIES} times at {episode}") from failure

@contextmanager
def open_workers(cfg):
    """The simulators of this process, within a with statement. Raises UserError if they do not start."""
    tasks = list(tasks_of(cfg))
    workers = [Worker(cfg, tasks[i % len(tasks)]) for i in range(cfg.workers)]
    try:
        workers[0].call("build", tasks[0])
        yield workers
    except SimulatorError as error:
        raise UserError("the simulator does not start (it needs libegl1 and libgl1-mesa-dri on Debian, and "
                        f"for LIBERO the meshes of libero-download-assets): {str(error).splitlines()[-1]}")
    finally:
        for worker in workers:
            worker.close()

def simulate(play, workers, queue):
    """Run play(worker, episode) for every Episode of a deque, each in a thread; yield each as it ends."""
    # The caller may extend the queue meanwhile. A worker that is free takes the next episode at once.
    idle, running = list(workers), set()
    # For the policy, torch has one core in these threads. The simulators need the others.
    with ThreadPoolExecutor(len(workers), initializer=torch.set_num_threads, initargs=(1,)) as threads:
        while queue or running:
            while queue and idle:
                worker = idle.pop(0)
                # An episode of the worker's own task first, because its environment is there.
                episode = next((e for e in queue if e.context.task == worker.task), queue[0])
                queue.remove(episode)
                running.add(threads.submit(worker.play, play, episode))
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                worker, episode = future.result()
                idle.append(worker)
                yield episode

# ---------------------------------------------------------------------- 5. Ranks, evaluation, files and main
def join(device):
    """Make the processes that torchrun started one group: NCCL on GPUs, gloo on CPUs."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")  # rank 0 speaks for all
        # When a process dies, torchrun ends those of its machine; those of other machines wait for an hour.
        backend = "nccl" if device.startswith("cuda") else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(hours=1))

def gather(value) -> list:
    """The value of every process."""
    values = [value] * WORLD
    if WORLD > 1:
        distributed.all_gather_object(values, value)
    return values

def total(numbers) -> dict:
    """A dict of numbers, summed over the processes."""
    sums = Counter()
    for others in gather(dict(numbers)):
        sums.update(others)
    return dict(sums)

def reduce_gradients(parameters):
    """Sum gradients over the processes in one flat all-reduce. A process without episodes adds zeros."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if WORLD > 1:
        gradients = [p.grad for p in parameters]
        flat = nn.utils.parameters_to_vector(gradients)
        distributed.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, gradients)

def summary(groups, seconds):
    """Statistics of an iteration's groups over all processes."""
    rewards = rewards_of(groups)  # C K
    episodes = sum(groups, [])
    records = [record for episode in episodes for record in episode.records]
    stats = total(dict(
        kept=has_signal(rewards).sum().item(), solved=rewards.all(-1).sum().item(),
        failed=(~rewards).all(-1).sum().item(), rollouts=len(episodes), successes=rewards.sum().item(),
        queries=len(records), env_steps=sum(sum(episode.executed) for episode in episodes),
        **{name: sum(record.get(name, 0.0) for record in records) for name in LOGGED}))
    stats |= {name: stats[name] / stats["queries"] for name in LOGGED}
    return stats | dict(rollout_success=stats["successes"] / stats["rollouts"], seconds_rollouts=seconds)

def evaluation_contexts(cfg):
    """The held-out contexts of the suite. Nothing else uses their seeds."""
    return [Context(task, text, seed, state) for task, text in tasks_of(cfg).items()
            for seed, state in enumerate(load_suite(cfg.suite).held_out(task, cfg.eval_contexts))]

def training_context(number, cfg):
    """The context of a group: a demonstrated one, or without --demos a fresh one of the tasks in turn."""
    if cfg.demos:
        from examples.imitation import demonstrated_context  # which reads LIBERO's HDF5 files
        return demonstrated_context(number, cfg)  # of the paper's D_context
    tasks = list(tasks_of(cfg).items())
    return Context(*tasks[number % len(tasks)], TRAIN_SEEDS * (cfg.seed + 1) + number)

def evaluate(policy, workers, contexts, cfg, name) -> float:
    """Act with the mean in every context: -> the share of successes. Writes evaluation_NAME.json."""
    play = partial(rollout, actor=Actor(policy, cfg.act_batch), horizon=load_suite(cfg.suite).HORIZON)
    ended = simulate(play, workers, deque(map(Episode, contexts[RANK::WORLD])))
    mine = {f"{cfg.suite} {e.context.task} {e.context.seed}": e.success for e in ended}
    outcomes = dict(sorted(total(mine).items()))  # 1 for a success
    write(Path(cfg.out, f"evaluation_{name}.json"), lambda path: path.write_text(json.dumps(outcomes)))
    print(f"{name}: {sum(outcomes.values())} of {len(outcomes)} held-out contexts", flush=True)
    return sum(outcomes.values()) / len(outcomes)

def read(path, reader):
    """reader(path). Whatever it raises becomes a UserError with the file's name."""
    try:
        return reader(path)
    except Exception as error:  # each library has its own for a damaged file
        raise UserError(f"cannot read {path}: {type(error).__name__}: {error}")

def write(path, writer):
    """Write a file on rank 0, whole or not at all: writer(temporary path), then a rename."""
    if RANK > 0:
        return
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer(temporary)
        os.replace(temporary, path)
    except Exception as error:  # each library has its own for a full disk
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {type(error).__name__}: {error}")

def save_run(out, policy, optimizer, run, stats):
    """End an iteration: print a line, write metrics.jsonl, last/, best/ and, for --resume, run.pt."""
    row = dict(iteration=run["iteration"]) | stats | dict(gpu_gb=torch.cuda.max_memory_allocated() / 2 ** 30)
    run["history"].append(row)
    shown = "iteration", "rollout_success", "kept", "solved", "failed", "approx_kl", "eval_success"
    print("  ".join(f"{name} {row[name]:.3g}" for name in shown if name in row), flush=True)
    policy.save(out / "last")
    if row.get("eval_success", -1.0) > run["best"]:
        run["best"] = row["eval_success"]
        policy.save(out / "best")
    lines = "".join(json.dumps(row) + "\n" for row in run["history"])
    write(out / "metrics.jsonl", lambda path: path.write_text(lines))
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    write(out / "run.pt", partial(torch.save, dict(run, policy=trained, optimizer=optimizer.state_dict())))

def load_run(path, policy, optimizer):
    """Fill policy and optimizer from what save_run wrote: -> the run."""
    if zipfile.ZipFile(path).testzip():  # torch does not look at the checksums
        raise ValueError("a checksum is wrong")
    run = torch.load(path, map_location="cpu", weights_only=True)
    policy.load_state_dict(run.pop("policy"), strict=False)
    optimizer.load_state_dict(run.pop("optimizer"))
    return run

def check(cfg):
    """Raise UserError for what can be known to go wrong before any long work starts."""
    least = dict(rollouts=2, image_size=16, task=-1, seed=0, iterations=0, max_rejected=0, act_batch=0,
                 eval_every=0, momentum=0, micro_batch=0, sft_steps=0, scale_steps=0)
    for name, value in vars(cfg).items():
        if name in least:
            fits = least[name] <= value < 2 ** 31
            require(fits, f"--{name} must be at least {least[name]} and below 2 ** 31, got {value}")
        elif type(value) in (int, float):
            require(0 < value < math.inf, f"--{name} must be a number above 0, got {value}")
    taken = not cfg.resume and (Path(cfg.out) / "run.pt").exists()
    require(not taken, f"{cfg.out} has a run: go on with --resume {cfg.out}, or choose another --out")
    require(cfg.momentum < 1, f"--momentum must be below 1, got {cfg.momentum}")
    require(cfg.groups % WORLD == 0, f"--groups must be a multiple of the {WORLD} processes")
    require(not cfg.demos or cfg.suite in LIBERO, f"--demos is for suites of LIBERO, {cfg.suite} is none")
    training_context(0, cfg)
    read(f"--device {cfg.device}", lambda _: torch.empty(0, device=cfg.device))

@contextmanager
def one_sentence():
    """Print a UserError as one sentence and exit with status 2."""
    try:
        yield
    except UserError as error:
        # Where rank 0 fails alike, torchrun ends the others before they say so too.
        time.sleep(2 * (RANK > 0))
        print(f"ript.py: {' '.join(str(error).split())[:500]}", file=sys.stderr, flush=True)
        sys.exit(2)

@one_sentence()
def main(argv=None):
    """Algorithm 1 with a line per iteration, between two evaluations on the same contexts."""
    cfg = parse_config(sys.argv[1:] if argv is None else argv)
    check(cfg)
    join(cfg.device)
    torch.manual_seed(cfg.seed)
    out = Path(cfg.out)
    from examples.headless import hold
    with hold(out), open_workers(cfg) as workers:
        policy = load_policy(cfg.model).load(cfg)
        optimizer = torch.optim.AdamW(policy.parameter_groups(), cfg.lr, (cfg.momentum, 0.999),
                                      fused=cfg.device != "cpu")
        held_out = evaluation_contexts(cfg)
        write(out / "config.json", lambda path: path.write_text(json.dumps(asdict(cfg), indent=1)))
        if cfg.eval:
            return evaluate(policy, workers, held_out, cfg, "success")
        run, stats = dict(iteration=0, group=0, best=-1.0, history=[]), {}
        # A run that was stopped before it wrote run.pt starts again.
        if cfg.resume and (out / "run.pt").exists():
            run = read(out / "run.pt", partial(load_run, policy=policy, optimizer=optimizer))
            stats = run["history"].pop()
        while True:
            done = run["iteration"]
            due = done in (0, cfg.iterations) or cfg.eval_every and done % cfg.eval_every == 0
            if due and "eval_success" not in stats:
                stats["eval_success"] = evaluate(policy, workers, held_out, cfg, "RIPT" if done else "SFT")
            save_run(out, policy, optimizer, run, stats)
            if done >= cfg.iterations:
                break
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * (1 - cfg.anneal * done / cfg.iterations)
            episodes, stats = collect(policy, workers, partial(training_context, cfg=cfg), run, cfg)  # 4-14
            if stats["kept"]:
                stats |= update(policy, optimizer, episodes, cfg, run)  # 15-17
            run["iteration"] += 1
    print(f"for the table, the curve and videos: python examples/report.py {out}", flush=True)

if __name__ == "__main__":
    # End at once, as on SIGTERM: no file is ever half written.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main()
    # Not after an error, when the other processes may never answer.
    if WORLD > 1:
        distributed.destroy_process_group()
