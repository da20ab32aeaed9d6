"""RIPT-VLA in one file: reinforcement post-training of vision-language-action policies (arXiv 2505.17016).

Stage 1 pretrains a policy on many demonstrations, stage 2 fine-tunes it on a few of the task (SFT). Stage 3
lets it act in a simulator: a rollout succeeds or it does not, and the policy learns from that bit alone.

    Algorithm 1   repeat M times:
      1-3           freeze the sampling policy: psi <- theta
      4-6           until B rollouts are kept: draw a context c and K rollouts from psi, each with R in {0, 1}
      7-10          A_k = R_k - mean of the other K - 1 rewards                                        (Eq. 5)
      11-14         if every A_k is zero, reject the group and draw another context; otherwise keep it
      15-17         N passes of minibatches over the kept rollouts, minimising                         (Eq. 6)
                    -min(r A, clip(r, 1 - eps, 1 + eps) A),  r = pi_theta(a | o) / pi_psi(a | o)

Departures. From the paper: contexts are drawn from the task itself, unless --demos gives demonstrations.
From the released code: an action is scored with the density it was drawn from, in float32; steps of a chunk
after success do not count; minibatch borders leave no gradient over; every episode seeds the simulator, so
that the K rollouts of a group share one scene; pictures are drawn only when the policy looks.

    python ript.py                                            the laptop: MuJoCo on two cores, no download
    python ript.py --suite libero_object --task 0             the same small policy in LIBERO
    python ript.py --eval --checkpoint runs/tabletop/best     evaluate what a run has saved
    torchrun --standalone --nproc_per_node 4 ript.py          four processes, a GPU each where there are GPUs

Shapes: B batch, C contexts, K rollouts, E episodes, S steps, H action steps per query, A action dimensions,
D width, V cameras.
"""
import os
import sys
for name, value in dict(MUJOCO_GL="egl", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0",
                        LIBERO_CONFIG_PATH=f"{sys.prefix}/.libero").items():
    os.environ.setdefault(name, value)  # mujoco, OpenMP and LIBERO read these when they are imported

import argparse
import io
import itertools
import json
import logging
import math
import multiprocessing
import resource
import signal
import threading
import time
import traceback
from collections import Counter, OrderedDict, deque
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Literal, Optional

import h5py
import imageio
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from scipy.spatial.transform import Rotation
from scipy.stats import binomtest
from torch import distributed, nn
from torch.distributed.elastic.multiprocessing import errors
from tqdm import tqdm
from transformers import ByT5Tokenizer, DynamicCache, HfArgumentParser, LlamaConfig, LlamaForCausalLM

# --------------------------------------------------------------------------------------- 1. Configuration
LIBERO = dict(libero_spatial=220, libero_object=280, libero_goal=300, libero_10=520, libero_90=400)  # steps
EXAMPLES = {name: f"{Path(__file__).parent}/examples/tabletop.py:{found}" for name, found in dict(
    tabletop="Tabletop", tabletop_pretrain="TabletopPretrain").items()}
MUJOCO = "3.3.2"  # others draw darker pictures (from 3.3.3) or break a stored state of LIBERO (from 3.4.0)
DEMO_SEEDS, TRAIN_SEEDS = 1_000_000, 10_000_000  # of contexts; evaluation has the seeds below

def option(default, text):
    """A field of Config: its default, and what --help says of it."""
    return field(default=default, metadata={"help": f"{text} [%(default)s]"})

@dataclass
class Config:
    """Every setting. A preset of (model, suite) overrides these defaults, the command line overrides both."""
    model: Literal["tiny"] = option("tiny", "the policy; tiny is an OpenVLA-OFT of laptop size")
    suite: str = option("tabletop", "the tasks: tabletop, tabletop_pretrain, libero_spatial, libero_object, "
                        "libero_goal, libero_10 or libero_long, libero_90, or any other as FILE.py:Class")
    task: int = option(-1, "only this task of the suite; -1: all of them")
    checkpoint: str = option("", "directory of the policy to start from; none: random weights")
    out: str = option("runs/latest", "directory for configuration, metrics, curve, videos and checkpoints")
    resume: str = option("", "directory of a run to continue after its last complete iteration")
    eval: bool = option(False, "evaluate --checkpoint and stop")
    demos: str = option("", "directory of LIBERO's HDF5 demonstrations, for SFT and as contexts D_context")
    seed: int = option(0, "seed of weights, demonstrations, contexts, exploration and minibatches")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "torch device of the policy")
    # Stage 2: supervision
    demos_per_task: int = option(10, "scripted demonstrations per task, where --demos gives none")
    sft_steps: int = option(0, "optimiser steps of supervised fine-tuning, L1 loss")
    sft_lr: float = option(1e-3, "learning rate of SFT, with warm-up and cosine decay")
    scale_steps: int = option(500, "optimiser steps of the scale head, Laplace NLL, everything else frozen")
    # Stage 3: RIPT
    iterations: int = option(12, "outer steps, M")
    groups: int = option(24, "groups kept per iteration, B / K")
    rollouts: int = option(8, "rollouts per context, K")
    max_rejected: int = option(48, "rejected groups per iteration after which none is replaced any more")
    passes: int = option(1, "passes over the kept rollouts, N")
    minibatch: int = option(16, "episodes per optimiser step")
    micro_batch: int = option(64, "action chunks per forward with gradient: memory, not mathematics")
    clip: float = option(0.1, "PPO's clip range, eps")
    loss_per: Literal["episode", "token"] = option("episode", "what the loss is a mean over")
    lr: float = option(5e-5, "learning rate, AdamW")
    momentum: float = option(0.9, "AdamW's beta1; 0 where an iteration is a single step")
    anneal: bool = option(False, "let the learning rate fall to zero over the iterations, linearly")
    max_grad_norm: float = option(1.0, "the gradient's norm is clipped here")
    scale_multiplier: float = option(1.0, "factor on the Laplace scale b, when sampling and when scoring")
    # Evaluation and simulation
    eval_contexts: int = option(50, "held-out contexts per task; LIBERO stores 50")
    eval_every: int = option(5, "iterations between evaluations; 0: only before and after")
    workers: int = option(min(os.cpu_count() or 1, 16), "simulator processes")
    image_size: int = option(256, "height and width of the two pictures, pixels")
    collision: bool = option(False, "draw collision meshes in plain colours: 10 times faster without a GPU")
    act_batch: int = option(0, "observations per forward when acting; 0: all; 1: --workers changes nothing")

TINY = dict(image_size=64, collision=True, act_batch=1, sft_steps=2500, minibatch=128, micro_batch=256,
            lr=2e-4, momentum=0.0, anneal=True)
PRESETS = {("tiny", suite): TINY for suite in LIBERO}  # those of other suites are in their classes

def fail(message):
    """What the user can mend: one sentence, exit status 2."""
    say(f"ript.py: {' '.join(str(message).split())[:500]}", sys.stderr)
    sys.exit(2)

def parse_config(argv) -> Config:
    """Dataclass < preset < command line; with --resume, the run's own configuration replaces the preset."""
    parser = HfArgumentParser(Config, description=__doc__, allow_abbrev=False,
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (python ript.py --help lists the settings)")
    given = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0]
    full = {"libero_long": "libero_10"}  # the paper's name
    suite = full.get(given.suite, given.suite)
    parser.set_defaults(out=f"runs/{suite.split(':')[-1]}", **PRESETS.get((given.model, suite), {})
                        | load_suite(suite).PRESET.get(given.model, {}))
    if given.resume:
        try:
            saved = Config(**json.loads((Path(given.resume) / "config.json").read_text()))
            parser.set_defaults(**asdict(saved))
        except (OSError, ValueError, TypeError) as error:
            fail(f"cannot resume {given.resume}, its config.json: {error}")
    cfg = Config(**vars(parser.parse_args(argv)))
    return replace(cfg, suite=full.get(cfg.suite, cfg.suite), out=cfg.resume or cfg.out)

# --------------------------------------------------------------------------------------- 2. The algorithm
def leave_one_out_advantage(rewards):
    """A_k = R_k - mean of the other K - 1 rewards of the context (Eq. 5): (C, K) -> (C, K).

    Raises ValueError for K < 2: a single rollout has no baseline.
    """
    K = rewards.shape[-1]
    if K < 2:
        raise ValueError(f"leave_one_out_advantage needs K >= 2 rollouts per context, got {K}")
    return rewards - (rewards.sum(-1, keepdim=True) - rewards) / (K - 1)

def has_signal(rewards):
    """The rejection rule (Algorithm 1, lines 11-14): (C, K) -> (C,) bool, False where all K are equal."""
    return (rewards != rewards[:, :1]).any(-1)

def laplace_log_prob(action, mean, log_scale):
    """Log-density of a factorised Laplace, (..., A) each -> (...), summed over A; float32 whatever comes in.

    log p = sum over A of -|action - mean| / b - log(2 b) with b = exp(log_scale); normalised action units.
    """
    action, mean, log_scale = action.float(), mean.float(), log_scale.float()
    return (-(action - mean).abs() * torch.exp(-log_scale) - log_scale - math.log(2)).sum(-1)

def ppo_clip_loss(log_prob, old_log_prob, advantage, mask, clip=0.2, per="episode"):
    """PPO's clipped objective, negated (Eq. 6), with one ratio per executed action step.

    log_prob, old_log_prob (E, S), advantage (E,), mask (E, S) bool: False where no action was executed.
    clip: eps, or a pair (low, high) for [1 - low, 1 + high]. per="episode": mean over its steps, then
    over episodes; per="token": mean over all steps. Returns the loss, a scalar, and the means over all steps
    of ratio, clip_frac (where the clip cuts the gradient) and approx_kl. ValueError for another per.
    """
    if per not in ("episode", "token"):
        raise ValueError(f"per must be 'episode' or 'token', got {per!r}")
    low, high = clip if isinstance(clip, (tuple, list)) else (clip, clip)
    log_ratio = torch.where(mask, log_prob - old_log_prob, 0.0)  # E S
    ratio, gain = log_ratio.exp(), advantage[:, None]
    plain, clipped = ratio * gain, ratio.clamp(1 - low, 1 + high) * gain  # E S
    token_weight = mask / mask.sum().clamp(min=1)  # E S
    weight = mask / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask) if per == "episode" else token_weight
    with torch.no_grad():
        stats = dict(ratio=ratio, clip_frac=clipped < plain, approx_kl=ratio - 1 - log_ratio)  # Schulman's k3
        stats = {name: (value * token_weight).sum() for name, value in stats.items()}
    return -(torch.minimum(plain, clipped) * weight).sum(), stats

# --------------------------------------------------------------------------------------- 3. Distribution
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
STORE = None  # torchrun's key-value store, which has atomic counters

def join(device):
    """Make the processes that torchrun started one group: NCCL on GPUs, gloo on CPU.

    A rank may be minutes behind the others, hence the timeout; torchrun ends the job when a rank dies.
    """
    global STORE
    if device == "cuda":  # a GPU for each, for the simulator's pictures too
        torch.cuda.set_device(local := int(os.environ.get("LOCAL_RANK", 0)))
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", seen.split(",")[local] if seen else str(local))
    if WORLD > 1:
        STORE, rank, world = next(distributed.rendezvous("env://"))
        backend = "nccl" if device.startswith("cuda") else "gloo"
        distributed.init_process_group(backend, store=STORE, rank=rank, world_size=world,
                                       timeout=timedelta(hours=12))

def say(text, file=None):
    """Print on rank 0."""
    if RANK == 0:
        print(text, file=file, flush=True)

def gather(value) -> list:
    """The value of every rank."""
    values = [value] * WORLD
    if WORLD > 1:
        distributed.all_gather_object(values, value)
    return values

def reduce_gradients(parameters):
    """Sum gradients over the ranks, in one all-reduce of one flat tensor."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if WORLD > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])
        distributed.all_reduce(flat)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = part.view_as(p)

# ------------------------------------------------------------------------------------------- 4. Policies
def mlp(*widths):
    """Linear layers fc1, fc2, ... with exact GELU between them."""
    layers = OrderedDict()
    for i in range(1, len(widths)):
        layers |= {f"fc{i}": nn.Linear(widths[i - 1], widths[i]), f"gelu{i}": nn.GELU()}
    layers.popitem()
    return nn.Sequential(layers)

class Block(nn.Module):
    """A pre-norm transformer block with timm's names: LayerNorm eps 1e-6, exact GELU, maybe LayerScale."""
    def __init__(self, dim, heads, mlp_ratio, layer_scale):
        super().__init__()
        self.heads, self.layer_scale = heads, layer_scale
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)))
        self.mlp = mlp(dim, int(dim * mlp_ratio), dim)
        for name in ("ls1", "ls2") if layer_scale else ():
            self.add_module(name, nn.ParameterDict(dict(scale_factor=torch.ones(dim))))

    def forward(self, x):
        B, P, D = x.shape
        scale1, scale2 = (ls["scale_factor"] for ls in (self.ls1, self.ls2)) if self.layer_scale else (1, 1)
        q, k, v = self.attn["qkv"](self.norm1(x)).view(B, P, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, P, D)
        x = x + self.attn["proj"](seen) * scale1
        return x + self.mlp(self.norm2(x)) * scale2

class Tower(nn.Module):
    """A vision transformer with timm's names (DINOv2, SigLIP): pictures (B, 3, h, w) -> patches (B, P, dim).

    OpenVLA reads block depth - 2, without the final norm: the last block and the norm are not built.
    """
    def __init__(self, dim, depth, heads, mlp_ratio=4., prefix=0, layer_scale=False, size=224, patch=14):
        super().__init__()
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, dim, patch, patch)))
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2, dim) * 0.02)
        self.prefix = prefix  # a class token and registers, which get no position
        if prefix:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.reg_token = nn.Parameter(torch.zeros(1, prefix - 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio, layer_scale) for _ in range(depth - 1)))

    def forward(self, pictures):
        x = self.patch_embed["proj"](pictures).flatten(2).mT + self.pos_embed  # B P D
        if self.prefix:
            extra = torch.cat([self.cls_token, self.reg_token], 1)
            x = torch.cat([extra.expand(len(x), -1, -1), x], 1)
        return self.blocks(x)[:, self.prefix:]

class Keypoints(nn.Module):
    """A tower that learns to see in minutes, by where its channels look: (B, 3, h, w) -> (B, 1, dim)."""
    def __init__(self, dim, keypoints=16):
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
                                  nn.Conv2d(32, keypoints, 1))
        self.read = nn.Linear(2 * keypoints, dim)

    def forward(self, pictures):
        heat = self.look(pictures)  # B keypoints h w
        grid = torch.cartesian_prod(*(torch.linspace(-1, 1, n).to(heat) for n in heat.shape[-2:]))  # hw 2
        return self.read((heat.flatten(2).softmax(-1) @ grid).flatten(1))[:, None]  # spatial softmax

class MLPResNet(nn.Module):
    """The body of OpenVLA-OFT's heads: (B, H, wide) -> (B, H, out). The residual joins after the ReLU."""
    def __init__(self, wide, hidden, out):
        super().__init__()
        self.layer_norm1, self.fc1 = nn.LayerNorm(wide), nn.Linear(wide, hidden)
        ffn = lambda: nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.ReLU())
        self.mlp_resnet_blocks = nn.ModuleList(nn.ModuleDict(dict(ffn=ffn())) for _ in range(2))
        self.layer_norm2, self.fc2 = nn.LayerNorm(hidden), nn.Linear(hidden, out)

    def forward(self, x):
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = x + block["ffn"](x)
        return self.fc2(self.layer_norm2(x))

@dataclass
class Architecture:
    """The sizes of an OpenVLAOFT and the bounds of its inputs, as in config.json. Defaults: the laptop's."""
    towers: tuple = (dict(dim=48), dict(dim=48))  # arguments of Tower if they name a depth, else of Keypoints
    llm: dict = field(default_factory=lambda: dict(vocab_size=259, hidden_size=96, intermediate_size=192,
                                                   num_hidden_layers=2, num_attention_heads=4))
    prompt: str = "{}"  # around the instruction
    trained: tuple = ("action_head",)  # what stage 3 trains, the first parts of names
    # Bounds of b, normalised action units: wide for rotation, which matters little here, since a wide density
    # makes for quiet gradients; narrow for the gripper, whose sign decides.
    scale_range: tuple = ((0.1, 0.1, 0.1, 0.4, 0.4, 0.4, 0.1), (0.2, 0.2, 0.2, 0.5, 0.5, 0.5, 0.2))
    chunk: int = 8  # action steps per query, H
    statistics: dict = field(default_factory=lambda: dict(  # the bounds that become -1 and 1
        action=dict(q01=[-1.0] * 7, q99=[1.0] * 7), proprio=dict(q01=[-1.5] * 8, q99=[1.5] * 8)))

class OpenVLAOFT(nn.Module):
    """OpenVLA-OFT with a Laplace scale head: two vision towers, Llama attending both ways, an L1 head.

    One class for the 7B and the laptop, with the module names of the released checkpoints. The sequence is
    BOS | patches of each camera | proprio | padding, prompt, space | A H zeros | stop. As a language model
    predicts the next token, the heads read the final hidden states of the space and the first A H - 1 zeros.

    The policy protocol is preprocess, act, log_prob, imitation_loss, trainable, save and load.
    """
    A, BOS, STOP = 7, 1, 2

    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch, D, wide = arch, arch.llm["hidden_size"], sum(tower["dim"] for tower in arch.towers)
        towers = [Tower(**tower) if "depth" in tower else Keypoints(**tower) for tower in arch.towers]
        self.vision_backbone = nn.ModuleDict(dict(featurizer=towers[0], fused_featurizer=towers[1]))
        self.projector, self.proprio_projector = mlp(wide, 4 * wide, D, D), mlp(8, D, D)
        self.language_model = LlamaForCausalLM(LlamaConfig(**arch.llm))
        self.language_model.lm_head = nn.Identity()  # actions do not come from the vocabulary
        self.action_head = nn.ModuleDict(dict(model=MLPResNet(self.A * D, D, self.A)))
        trunk, log_b_head = MLPResNet(self.A * D, D, D), nn.Linear(D, self.A)
        self.scale_head = nn.ModuleDict(dict(trunk=trunk, log_b_head=log_b_head))
        nn.init.xavier_uniform_(log_b_head.weight, gain=0.01)
        nn.init.constant_(log_b_head.bias, -3.0)
        self.tokenizer, self.scale_multiplier = ByT5Tokenizer(), 1.0
        self.eval()  # for good: old and new log-probabilities must come from one function

    # -- observations and actions
    def preprocess(self, raw):
        """The simulator's arrays -> what an episode stores: pictures (V, h, w, 3) uint8, proprio (8,)."""
        x, y, z, w = np.clip(raw["robot0_eef_quat"], -1, 1)
        sine = math.sqrt(1 - w * w)  # of half the angle
        axis_angle = np.array([x, y, z]) * (2 * math.acos(w) / sine if sine > 1e-8 else 0)
        proprio = np.concatenate([raw["robot0_eef_pos"], axis_angle, raw["robot0_gripper_qpos"]])
        pictures = np.stack([raw[f"{name}_image"][::-1, ::-1] for name in Libero.CAMERAS])
        return dict(pictures=pictures, proprio=proprio)

    def _bounds(self, kind):
        low, high = (np.array(self.arch.statistics[kind][name]) for name in ("q01", "q99"))
        return low, high - low + 1e-8

    def to_env_actions(self, normalised):
        """Head units -> the environment's (..., 7): motion within its bounds, gripper -1 open, +1 closed."""
        low, width = self._bounds("action")
        actions = (np.asarray(normalised, np.float64) + 1) / 2 * width + low
        actions[..., 6] = np.sign(1 - 2 * np.asarray(normalised)[..., 6])
        return actions

    def from_env_actions(self, actions):
        """The inverse of to_env_actions: labels of imitation, as a tensor."""
        low, width = self._bounds("action")
        normalised = 2 * (actions - low) / width - 1
        normalised[..., 6] = (1 - np.sign(actions[..., 6])) / 2
        return torch.tensor(normalised, dtype=torch.float32)

    # -- the forward pass
    def _embed(self, observations, instructions):
        """-> the sequence's embeddings (B, S, D), its mask (B, 1, S, S) and its position ids (B, S)."""
        words, zeros = self.language_model.model.embed_tokens, self.A * self.arch.chunk
        to = lambda rows: torch.as_tensor(np.stack(rows)).to(words.weight)
        pictures = to([o["pictures"] for o in observations]).permute(0, 1, 4, 2, 3) / 127.5 - 1  # B V 3 h w
        seen = torch.cat([tower(pictures.flatten(0, 1)) for tower in self.vision_backbone.values()], -1)
        patches = self.projector(seen).unflatten(0, pictures.shape[:2]).flatten(1, 2)  # B VP D
        low, width = self._bounds("proprio")
        proprio = to([np.clip(2 * (o["proprio"] - low) / width - 1, -1, 1) for o in observations])
        texts = [self.arch.prompt.format(text.lower()) + " " for text in instructions]
        tokens = self.tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left",
                                return_tensors="pt").to(words.weight.device)
        B, D = len(texts), patches.shape[-1]
        first, stop = (words(tokens.input_ids.new_full((B, 1), token)) for token in (self.BOS, self.STOP))
        x = torch.cat([first, patches, self.proprio_projector(proprio)[:, None], words(tokens.input_ids),
                       patches.new_zeros(B, zeros, D), stop], 1)
        real = F.pad(tokens.attention_mask, (patches.shape[1] + 2, zeros + 1), value=1).bool()  # B S
        return x, real[:, None, None].expand(-1, 1, x.shape[1], -1), real.cumsum(-1) - 1

    def _hidden(self, observations, instructions):
        """The final hidden states that the heads read, (B, A H, D), with gradient as far back as any trains.

        Where the decoder trains and what feeds it does not, one pass without gradient over the sequence fills
        the cache, which is cropped to the prompt; the last A H + 2 positions run again, with gradient.
        """
        trains = lambda part: torch.is_grad_enabled() and any(p.requires_grad for p in part.parameters())
        whole = any(map(trains, (self.vision_backbone, self.projector, self.proprio_projector)))
        last = self.A * self.arch.chunk + 2  # the space, the zeros, the stop
        short = trains(self.language_model) and not whole
        cache, llama = DynamicCache() if short else None, self.language_model.model
        with torch.set_grad_enabled(whole):
            x, mask, positions = self._embed(observations, instructions)
            hidden = llama(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=short,
                           past_key_values=cache).last_hidden_state
        if short:
            cache.crop(-last)
            hidden = llama(inputs_embeds=x[:, -last:], attention_mask=mask[:, :, -last:],
                           position_ids=positions[:, -last:], past_key_values=cache).last_hidden_state
        return hidden[:, -last:-2]

    def _heads(self, hidden):
        rows = hidden.unflatten(1, (self.arch.chunk, self.A)).flatten(2)  # B H AD
        log_scale = self.scale_head["log_b_head"](self.scale_head["trunk"](rows))
        return self.action_head["model"](rows).float(), log_scale.float()

    def predict(self, observations, instructions):
        """-> mean and log_scale, (B, H, A) each, normalised, float32."""
        return self._heads(self._hidden(observations, instructions))

    def _density(self, observations, instructions):
        """The mean and the log of the scale b that actions are both drawn from and scored with."""
        mean, log_scale = self.predict(observations, instructions)
        low, high = (torch.tensor(bound).log().to(mean) for bound in self.arch.scale_range)
        return mean, log_scale.clamp(low, high) + math.log(self.scale_multiplier)

    # -- the rest of the protocol
    @torch.no_grad()
    def act(self, observations, instructions, explore=None):
        """A record per observation: "actions" (H, 7) for the environment and what log_prob needs.

        explore: a numpy Generator per observation, to draw from the policy's density; None takes the mean.
        """
        mean, log_scale = self._density(observations, instructions)
        noise = [g.laplace(size=mean.shape[1:]) for g in explore] if explore else np.zeros(mean.shape)
        sample = mean + log_scale.exp() * torch.as_tensor(np.stack(noise)).to(mean)  # B H A
        log_prob = laplace_log_prob(sample, mean, log_scale)  # B H
        columns = dict(observation=observations, instruction=instructions, sample=sample.cpu().numpy(),
                       log_prob=log_prob.cpu().numpy(), actions=self.to_env_actions(sample.cpu()),
                       scale=log_scale.exp().mean((1, 2)).tolist())
        return [dict(zip(columns, row)) for row in zip(*columns.values())]

    def log_prob(self, records):
        """Log-probability of each action step of the records' chunks, with gradient: (B, H)."""
        observations, instructions, sample = zip(*(
            (record["observation"], record["instruction"], record["sample"]) for record in records))
        mean, log_scale = self._density(observations, instructions)
        return laplace_log_prob(torch.tensor(np.stack(sample)).to(mean), mean, log_scale)

    def imitation_loss(self, stage, observations, instructions, actions):
        """Of demonstrated actions (B, H, 7), environment units: L1 for "sft", Laplace NLL for "scale"."""
        mean, log_scale = self.predict(observations, instructions)
        target = self.from_env_actions(actions).to(mean)
        if stage == "sft":
            return F.l1_loss(mean, target)
        return -laplace_log_prob(target, mean, log_scale).mean()

    def trainable(self, stage):
        """Named parameters of a stage, the only ones with gradient from now on: "sft", "scale" or "ript"."""
        parts = dict(sft=[name for name, _ in self.named_children() if name != "scale_head"],
                     scale=["scale_head"], ript=self.arch.trained)[stage]
        chosen = {name: p for name, p in self.named_parameters() if name.startswith(tuple(parts))}
        self.requires_grad_(False)
        for p in chosen.values():
            p.requires_grad_(True)
        return chosen

    def save(self, directory):
        """Write model.safetensors and config.json."""
        arch = json.dumps(asdict(self.arch), indent=1)
        write(directory / "config.json", lambda path: path.write_text(arch))
        weights = {name: p.detach().cpu().contiguous() for name, p in self.state_dict().items()}
        write(directory / "model.safetensors", lambda path: save_file(weights, path))

    @classmethod
    def load(cls, directory):
        """Read what save wrote, strictly."""
        try:
            policy = cls(Architecture(**json.loads((Path(directory) / "config.json").read_text())))
            policy.load_state_dict(load_file(Path(directory) / "model.safetensors"))
        except Exception as error:  # whatever json, safetensors and torch say of a damaged file
            fail(f"cannot load a policy from {directory}: {error or type(error).__name__}")
        return policy

# ------------------------------------------------------------------------------------------ 5. Simulator
@dataclass
class Context:
    """What an episode starts from: a task, and how to reset to one scene of it."""
    task: int
    instruction: str
    seed: int  # of numpy's global generator, from which a reset draws where things stand
    state: Optional[np.ndarray] = None  # flattened simulator state to set after the reset
    index: int = -1  # place in a finite set of contexts; -1: drawn anew

@cache
def load_class(spec, base=object):
    """The class that FILE.py:Class names; `import ript` in the file gives this module, not a second copy."""
    sys.modules.setdefault("ript", sys.modules[__name__])
    file, _, name = spec.rpartition(":")
    try:
        source = spec_from_loader(file, SourceFileLoader(file, file))
        module = sys.modules[file] = module_from_spec(source)
        source.loader.exec_module(module)
        if not issubclass(getattr(module, name), base):
            raise TypeError(f"{name} is no subclass of ript.{base.__name__}")
    except Exception as error:  # whatever the file raises
        fail(f"cannot load {spec}: {type(error).__name__}: {error}")
    return getattr(module, name)

@cache
def load_suite(name):
    """The class of a suite: LIBERO's and the examples' go by their names, others are FILE.py:Class."""
    if name in LIBERO:
        with redirect_stdout(io.StringIO()):  # the first import says where it keeps its settings
            from libero.libero import benchmark
            suite = benchmark.get_benchmark(name)()
        return type(name, (Libero,), dict(
            BENCHMARK=suite, HORIZON=LIBERO[name], SCRIPTED=name == "libero_object",
            INSTRUCTIONS=[task.language for task in suite.tasks]))
    if name not in EXAMPLES and ":" not in name:
        fail(f"--suite {name} is none of {', '.join([*EXAMPLES, *LIBERO])}, libero_long, FILE.py:Class")
    return load_class(EXAMPLES.get(name, name), Libero)

def tasks_of(cfg) -> dict[int, str]:
    """Numbers and instructions of the tasks that a run is about."""
    texts = load_suite(cfg.suite).INSTRUCTIONS
    if cfg.task >= len(texts):
        fail(f"--task must be below {len(texts)} for {cfg.suite}, got {cfg.task}")
    return {task: text for task, text in enumerate(texts) if cfg.task in (task, -1)}

class Libero:
    """A suite of LIBERO: its tasks and, in a process of its own, one environment that simulates them.

    It is also the protocol of a suite: others derive from it and override what differs.
    """
    INSTRUCTIONS, HORIZON = (), 0  # a text per task; the control steps of 50 ms that an episode may take
    PRESET, BENCHMARK = {}, None  # settings per model, which override PRESETS; LIBERO's object of the suite
    SCRIPTED = False  # whether expert can do the tasks
    CAMERAS = ("agentview", "robot0_eye_in_hand")
    ROBOT = dict(robots=["Panda"], use_camera_obs=False, has_renderer=False, has_offscreen_renderer=True,
                 ignore_done=True, control_freq=20, hard_reset=False)
    COLOURS = dict(table=(0.45, 0.45, 0.45), floor=(0.45, 0.45, 0.45), mount0=(0.45, 0.45, 0.45),
                   gripper0=(0.15, 0.15, 0.2), robot0=(0.75, 0.75, 0.8))

    def __init__(self, image_size, collision):
        self.image_size, self.collision, self.env, self.task = image_size, collision, None, None

    @classmethod
    def held_out(cls, task, number):
        """Simulator states of a task's held-out contexts; None where their seeds, 0, 1, ..., are enough."""
        return cls.BENCHMARK.get_task_init_states(task)[:number]

    def build(self, task):
        """Make the task's environment, unless it is there."""
        if task == self.task:
            return
        if self.env:
            self.env.close()  # EGL wants that before the next one
        from libero.libero.envs.env_wrapper import ControlEnv
        bddl_file = self.BENCHMARK.get_task_bddl_file_path(task)
        self.env = ControlEnv(bddl_file_name=bddl_file, **self.ROBOT).env  # without its wrapper
        self.task = task
        self.paint()

    def paint(self):
        """Collision meshes have no material: a colour for each object."""
        model = self.env.sim.model
        for geom in np.flatnonzero(np.asarray(model.geom_group) == 0) if self.collision else ():
            name = (model.geom_id2name(geom) or "").split("_")[0]
            other = np.random.default_rng(list(name.encode())).uniform(0.1, 0.9, 3)
            model.geom_rgba[geom] = (*self.COLOURS.get(name, other), 1)

    def reset(self, context):
        """Seed, reset, set the state, settle; in this order at every episode, since LIBERO's fixtures are
        placed by the seed and are no part of the state. -> an answer like step's."""
        self.build(context.task)
        np.random.seed(context.seed % 2 ** 32)
        self.env.reset()
        if context.state is not None:
            self.env.sim.set_state_from_flattened(context.state)
        self.env.sim.forward()
        for _ in range(10):
            self.env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
        return 0, False, self.look(), []

    def success(self):
        """The reward: whether the task's goal holds."""
        return self.env._check_success()

    def step(self, actions, film=False):
        """Run actions (n, 7) until success: -> how many ran, success, the observation, a film's frames."""
        frames = []
        for ran, action in enumerate(actions, 1):
            self.env.step(action)
            if film:
                frames.append(self.draw("agentview", 256, False)[::-1])
            if self.success():
                return ran, True, None, frames
        return ran, False, self.look(), frames

    def look(self):
        """The raw observation, by robosuite's names."""
        pictures = {f"{camera}_image": self.draw(camera, self.image_size, self.collision)
                    for camera in self.CAMERAS}
        return self.env._get_observations(force_update=True) | pictures

    def draw(self, camera, size, collision):
        """One picture (size, size, 3) uint8, upside down as OpenGL has it."""
        self.env.sim._render_context_offscreen.vopt.geomgroup[:2] = (collision, not collision)
        return self.env.sim.render(camera_name=camera, width=size, height=size)

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

    def expert(self, closing):
        """The next action (7,) in LIBERO-Object: above the thing, down, close, up, to the basket, open.

        closing: control steps since the hand began to close.
        """
        data, bodies, hand = self.env.sim.data, self.env.obj_body_id, self.env._eef_xpos
        thing, basket = (data.body_xpos[bodies[name]] for name in self.env.obj_of_interest if name in bodies)
        off = lambda place: np.abs(place[:2] - hand[:2]).max()  # metres
        low, height = thing[2] + 0.01, basket[2] + 0.3
        if off(basket) < 0.03 or closing >= 8:
            way = basket if hand[2] > height - 0.04 else hand
            return self.toward(way, height, -1 if off(basket) < 0.03 else 1)
        if closing or off(thing) < 0.012 and hand[2] < low + 0.012:
            return self.toward(hand, low, 1)
        return self.toward(thing, low if off(thing) < 0.02 else thing[2] + 0.12, -1)

    def toward(self, place, z, grip):
        """The action of a hand on its way to a place, at the height z; grip: -1 open, 1 closed."""
        return np.array([*np.clip(15 * ([*place[:2], z] - self.env._eef_xpos), -1, 1), 0, 0, 0, grip])

def worker_main(connection, cfg):
    """A simulator process: answers (method, *arguments) with (result, None) or (None, traceback)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer; this process ends after it
    logging.disable(logging.WARNING)  # robosuite's remarks about its macros
    torch.set_num_threads(1)
    simulator = load_suite(cfg.suite)(cfg.image_size, cfg.collision)
    try:
        while True:
            method, *arguments = connection.recv()
            try:
                connection.send((getattr(simulator, method)(*arguments), None))
            except Exception:
                connection.send((None, traceback.format_exc()))
    except (EOFError, OSError):
        os._exit(0)  # the trainer is gone; robosuite's destructors would free what is already freed

class Worker:
    """The trainer's end of a simulator process, and the episode it is running."""
    PATIENCE, TRIES = 300, 3  # seconds for an answer; processes for an episode

    def __init__(self, cfg, task):
        self.cfg, self.task = cfg, task
        self.episode, self.observation, self.process = None, None, None
        self.spawn()

    def spawn(self):
        """Start the process, in place of one that failed."""
        if self.process:
            self.process.kill()
        context = multiprocessing.get_context("spawn")  # OpenGL and CUDA do not survive a fork
        self.connection, child = context.Pipe()
        self.process = context.Process(target=worker_main, args=(child, self.cfg), daemon=True)
        self.process.start()
        child.close()

    def begin(self, episode, method="reset", tries=TRIES):
        """Start an episode; a rollout is a function of its numbers, so starting again changes nothing."""
        episode.records, episode.executed, episode.frames = [], [], []
        self.episode, self.method, self.tries = episode, method, tries
        self.task, self.observation = episode.context.task, None
        self.send(method, episode.context)

    def send(self, method, *arguments):
        """Ask for a method of the simulator; if the process is dead, receive notices."""
        with suppress(OSError):
            self.connection.send((method, *arguments))

    def receive(self):
        """The answer to the last send; where it fails, the episode's beginning in a new process."""
        watchdog = threading.Timer(self.PATIENCE, self.process.kill)  # recv itself waits for ever
        watchdog.start()
        try:
            result, error = self.connection.recv()
        except (EOFError, OSError):
            error = f"it died, or was silent for {self.PATIENCE} s"
        finally:
            watchdog.cancel()
        if not error:
            return result
        if self.tries == 1:
            raise RuntimeError(f"the simulator failed {self.TRIES} times at {self.episode.context}: {error}")
        self.spawn()
        self.begin(self.episode, self.method, self.tries - 1)
        return self.receive()

# ------------------------------------------------------------------------------------------- 6. Rollouts
@dataclass
class Episode:
    """One rollout: the whole interface between simulator and optimiser."""
    context: Context
    group: int = 0
    k: int = 0  # which of the group's K rollouts
    records: list = field(default_factory=list)  # of the policy, one per query
    executed: list = field(default_factory=list)  # action steps executed of each query's H
    success: bool = False
    frames: list = field(default_factory=list)  # of a film; of a demonstration (raw observation, action)

def simulate(policy, workers, queue, cfg, explore=None, film=False, method="reset"):
    """Roll out every Episode of a deque, which the caller may extend meanwhile; yield each as it ends.

    Half of the workers simulate while the policy answers the other half; a worker that is free takes the next
    of the queue in the same round. explore(episode) is the Generator of its next query; None takes the mean.
    The method "demonstrate" leaves whole episodes to the suite's expert.
    """
    horizon, threads = load_suite(cfg.suite).HORIZON, torch.get_num_threads()
    torch.set_num_threads(1)  # the workers want the other cores
    while queue or any(worker.episode for worker in workers):
        for half in (workers[::2], workers[1::2]):
            for worker in half:
                if episode := worker.episode:
                    ran, episode.success, worker.observation, frames = worker.receive()
                    episode.executed += [ran] if ran else []  # a reset runs none
                    episode.frames += frames
                    if episode.success or sum(episode.executed) == horizon:
                        worker.episode, worker.observation = None, None
                        yield episode
                if queue and not worker.episode:  # the worker's own task first: its environment is there
                    episode = next((e for e in queue if e.context.task == worker.task), queue[0])
                    queue.remove(episode)
                    worker.begin(episode, method)
            ready, size = [worker for worker in half if worker.observation], cfg.act_batch or len(workers)
            for start in range(0, len(ready), size):
                respond(policy, ready[start:start + size], horizon, explore, film)
    torch.set_num_threads(threads)

def respond(policy, workers, horizon, explore, film):
    """From what some workers see to the actions that they run next, in one batch."""
    began, episodes = time.time(), [worker.episode for worker in workers]
    records = policy.act([policy.preprocess(worker.observation) for worker in workers],
                         [episode.context.instruction for episode in episodes],
                         explore and [explore(episode) for episode in episodes])
    for worker, episode, record in zip(workers, episodes, records):
        actions = record.pop("actions")[:horizon - sum(episode.executed)]
        if not np.isfinite(actions).all():
            raise RuntimeError(f"action not finite in group {episode.group}, {episode.context}")
        worker.send("step", actions, film)
        episode.records.append(dict(record, seconds=(time.time() - began) / len(workers)))

def fate(group) -> str:
    """Of K episodes: "kept" if their rewards differ; else "solved" or "failed", which is to be rejected."""
    successes = [episode.success for episode in group]
    return "kept" if has_signal(torch.tensor([successes])) else "solved" if successes[0] else "failed"

def collect(policy, workers, context_of, run, cfg):
    """Algorithm 1, lines 4-14: -> the kept episodes, their rewards (C, K), statistics; advances run["group"].

    Groups are numbered, by a counter that all ranks share. cfg.groups of them are launched and every rejected
    one launches the next number, so the kept set is a prefix of the numbered stream whatever the timing:
    quick episodes are not favoured, and nothing that runs is thrown away. A context of a finite set, once
    solved K of K, is skipped 3 times. Of other ranks' episodes all is known but the records.
    """
    began, queue, groups, ended, ticket = time.time(), deque(), {}, Counter(), None
    stream = (number for number in itertools.count(run["group"]) if number not in run["skip"])
    numbers = list(itertools.islice(stream, cfg.groups + cfg.max_rejected))
    explore = lambda e: np.random.default_rng((cfg.seed, run["iteration"], e.group, e.k, len(e.records)))
    store = STORE or distributed.HashStore()
    count = lambda what, more=0: store.add(f"{run['iteration']} {what}", more)
    allowed = lambda: cfg.groups + min(count("rejected"), cfg.max_rejected)

    def launch():  # this rank's share at first, then whatever is allowed when workers run out of episodes
        nonlocal ticket
        while len(groups) < cfg.groups / WORLD or len(queue) <= len(workers):
            ticket = count("taken", 1) - 1 if ticket is None else ticket
            if ticket >= allowed():
                return
            number, ticket = numbers[ticket], None
            groups[number] = [Episode(context_of(number), number, k) for k in range(cfg.rollouts)]
            queue.extend(groups[number])

    while count("ended") < allowed():
        launch()
        episodes = simulate(policy, workers, queue, cfg, explore)
        for episode in tqdm(episodes, f"iteration {run['iteration'] + 1}", leave=False, disable=None):
            ended[episode.group] += 1
            if ended[episode.group] == cfg.rollouts:
                count("rejected", int(fate(groups[episode.group]) != "kept"))
                count("ended", 1)
            launch()
        time.sleep(0.05 * (WORLD > 1))  # another rank may still reject a group
    totals = [(r["scale"], r["seconds"], 1) for group in groups.values() for e in group for r in e.records]
    scale, seconds_policy, queries = sum(gather(np.sum(totals or [(0, 0, 0)], 0)))
    for others in gather({n: [replace(e, records=[]) for e in group] for n, group in groups.items()}):
        groups = others | groups
    groups = dict(sorted(groups.items()))
    run["group"] = numbers[len(groups) - 1] + 1
    for solved in (group[0].context.index for group in groups.values() if fate(group) == "solved"):
        again = (n for n in itertools.count(run["group"]) if context_of(n).index == solved)
        run["skip"] += itertools.islice(again, 3 if solved >= 0 else 0)
    kept = [group for group in groups.values() if fate(group) == "kept"]
    stats = summary(list(groups.values()), time.time() - began, cfg)
    stats |= dict(scale=scale / queries, seconds_policy=seconds_policy / WORLD)
    return sum(kept, []), torch.tensor([[float(e.success) for e in group] for group in kept]), stats

def summary(groups, seconds, cfg):
    """Statistics of an iteration's groups; says why, where the cap on rejections ended it."""
    episodes, fates = sum(groups, []), Counter(map(fate, groups))
    kept, solved, failed = (fates[end] for end in ("kept", "solved", "failed"))
    if kept < cfg.groups:
        cause = ("too hard: start from a better policy or easier tasks" if not solved else
                 "too easy: little is left to learn" if not failed else
                 "too deterministic: contexts decide, not exploration; raise --scale_multiplier")
        say(f"only {kept} of {cfg.groups} groups have signal, {solved} succeeded K of K, "
            f"{failed} failed K of K; {cause}")
    steps = sum(sum(episode.executed) for episode in episodes)
    return dict(rollout_success=np.mean([episode.success for episode in episodes]), rollouts=len(episodes),
                kept=kept, solved=solved, failed=failed, rejected=1 - kept / len(groups), env_steps=steps,
                seconds_rollouts=seconds, steps_per_second=steps / seconds)

# ---------------------------------------------------------------------------------------- 7. Supervision
def labelled(policy, pairs):
    """Records to imitate, of pairs (raw observation, action (7,))."""
    return [dict(observation=policy.preprocess(raw), label=action) for raw, action in pairs]

def scripted_demonstrations(policy, workers, cfg):
    """Episodes in which the suite's expert succeeds, cfg.demos_per_task of every task."""
    seeds = range(DEMO_SEEDS * (1 + cfg.seed), DEMO_SEEDS * (1 + cfg.seed) + cfg.demos_per_task)
    contexts = [Context(task, text, seed) for seed in seeds for task, text in tasks_of(cfg).items()]
    queue, demos, attempts = deque(Episode(c, number) for number, c in enumerate(contexts)), [], 0
    episodes = simulate(policy, workers, queue, cfg, method="demonstrate")
    for episode in tqdm(episodes, "demonstrations", leave=False, disable=None):
        attempts += 1
        if episode.success:
            demos.append(replace(episode, records=labelled(policy, episode.frames), frames=[]))
        elif attempts < 50 + 3 * len(contexts):  # another scene instead
            queue.append(Episode(replace(episode.context, seed=episode.context.seed + 1000), episode.group))
    say(f"scripted expert: success in {interval(len(demos), attempts)} of attempts")
    return sorted(demos, key=lambda demo: demo.group)

def libero_demonstrations(policy, cfg):
    """Episodes from LIBERO's HDF5 files in cfg.demos; row 0 of their states is their context."""
    demos, names = [], dict(
        agentview_image="agentview_rgb", robot0_eye_in_hand_image="eye_in_hand_rgb", robot0_eef_pos="ee_pos",
        robot0_gripper_qpos="gripper_states", robot0_eef_quat="ee_ori")  # by robosuite's names
    for task, instruction in tasks_of(cfg).items():
        path = Path(cfg.demos) / f"{load_suite(cfg.suite).BENCHMARK.tasks[task].name}_demo.hdf5"
        try:
            with h5py.File(path) as file:
                for key in sorted(file["data"], key=lambda key: int(key.split("_")[1])):
                    demo, actions = file["data"][key], file["data"][key]["actions"][:]
                    columns = {name: demo["obs"][theirs][:] for name, theirs in names.items()}
                    columns["robot0_eef_quat"] = Rotation.from_rotvec(columns["robot0_eef_quat"]).as_quat()
                    shape = columns["agentview_image"].shape
                    if actions.shape != (shape[0], 7) or shape[1] != cfg.image_size:
                        raise ValueError(f"{key} has actions {actions.shape}, pictures {shape}: "
                                         "set --image_size to theirs, with --collision false")
                    rows = (dict(zip(columns, row)) for row in zip(*columns.values()))
                    context = Context(task, instruction, 0, demo["states"][0], len(demos))
                    demos.append(Episode(context, records=labelled(policy, zip(rows, actions))))
        except (OSError, KeyError, ValueError) as error:
            fail(f"cannot read the demonstrations in {path}: {error}")
    return demos

def fit(policy, stage, demos, steps, lr, seed, batch):
    """AdamW on policy.imitation_loss at random steps of demonstrations: -> the mean loss of the last tenth.

    stage "sft": L1, all but the scale head. "scale": the scale head alone, by Laplace NLL. Warm-up and cosine
    decay. A chunk that outlasts its demonstration repeats the last action.
    """
    rng, losses, samples = np.random.default_rng([seed, 0]), [], []
    optimizer = torch.optim.AdamW(policy.trainable(stage).values(), weight_decay=1e-4)
    for demo in demos:
        labels = np.array([record["label"] for record in demo.records])
        for t, record in enumerate(demo.records):
            ahead = np.arange(t, t + policy.arch.chunk).clip(max=len(labels) - 1)
            samples.append((record["observation"], demo.context.instruction, labels[ahead]))
    for step in tqdm(range(steps), stage, leave=False, disable=None):
        rise, fall = min(1, (step + 1) * 20 / steps), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        picked = [samples[i] for i in rng.integers(len(samples), size=batch)]
        observations, instructions, chunks = zip(*picked)
        loss = policy.imitation_loss(stage, observations, instructions, np.array(chunks))
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * rise * fall
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        losses.append(loss.item())
    return np.mean(losses[-math.ceil(steps / 10):])

# --------------------------------------------------------------------------------------------- 8. Update
def update(policy, optimizer, episodes, rewards, cfg, run):
    """Algorithm 1, lines 15-17: N passes of minibatches over the kept episodes: -> mean diagnostics."""
    began, logs, H = time.time(), [], policy.arch.chunk
    advantages, parameters = leave_one_out_advantage(rewards).flatten(), optimizer.param_groups[0]["params"]
    rng = np.random.default_rng([cfg.seed, run["iteration"]])
    batches = math.ceil(len(episodes) / cfg.minibatch)
    for _ in range(cfg.passes):
        for minibatch in np.array_split(rng.permutation(len(episodes)), batches):
            rows = [(i, q) for i in minibatch for q in range(len(episodes[i].records))]
            records = [episodes[i].records[q] for i, q in rows]
            old = torch.tensor(np.array([record["log_prob"] for record in records]))  # B H
            mask = torch.tensor([[h < episodes[i].executed[q] for h in range(H)] for i, q in rows])  # B H
            # A step's weight in the loss goes on its advantage, in which the loss is linear: so micro-batches
            # of chunks, whichever episodes and ranks they come from, add up to the minibatch's gradient.
            total = sum(sum(episodes[i].executed) for i in minibatch)  # of all ranks
            steps = torch.tensor([sum(episodes[i].executed) * len(minibatch) for i, _ in rows])
            gain = advantages[[i for i, _ in rows]] / (steps if cfg.loss_per == "episode" else total)
            optimizer.zero_grad()
            log = dict.fromkeys(("loss", "ratio", "clip_frac", "approx_kl", "ratio_error"), 0.0)
            for start in range(0, len(rows), cfg.micro_batch):
                part = slice(start, start + cfg.micro_batch)
                log_prob, m = policy.log_prob(records[part]).cpu(), mask[part]
                loss, stats = ppo_clip_loss(log_prob, old[part], gain[part], m, cfg.clip, "token")
                (loss * m.sum()).backward()
                log["loss"] += (loss * m.sum()).item()
                for name, value in stats.items():
                    log[name] += (value * m.sum() / total).item()
                if not logs:  # psi is still theta: what the ratio is off by is rounding
                    off = ((log_prob.detach() - old[part]).exp() - 1)[m].abs().max().item()
                    log["ratio_error"] = max(off, log["ratio_error"])
            reduce_gradients(parameters)
            ranks = gather(log)
            log = {name: (max if name == "ratio_error" else sum)(r[name] for r in ranks) for name in log}
            log["grad_norm"] = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).item()
            if not math.isfinite(log["grad_norm"]):
                raise RuntimeError(f"the gradient is not finite in iteration {run['iteration'] + 1}")
            optimizer.step()
            logs.append(log)
    stats = {name: np.mean([log[name] for log in logs]) for name in logs[0]}
    stats["ratio_error"], checksum = logs[0]["ratio_error"], sum(p.double().sum().item() for p in parameters)
    if len(set(gather(checksum))) > 1:
        raise RuntimeError(f"the ranks' parameters differ after iteration {run['iteration'] + 1}")
    return stats | dict(checksum=checksum, updates=len(logs), seconds_update=time.time() - began)

# ----------------------------------------------------------------------------------------- 9. Evaluation
def evaluation_contexts(cfg):
    """The held-out contexts of the suite; nothing else uses their seeds."""
    suite = load_suite(cfg.suite)
    return [Context(task, instruction, i, state) for task, instruction in tasks_of(cfg).items()
            for i, state in enumerate(suite.held_out(task, cfg.eval_contexts))]

def evaluate(policy, workers, contexts, cfg, film=False):
    """Act with the mean in every context: -> the Episodes in the contexts' order, without their records."""
    queue = deque([Episode(context, number) for number, context in enumerate(contexts)][RANK::WORLD])
    episodes = simulate(policy, workers, queue, cfg, film=film)
    episodes = tqdm(episodes, "evaluation", len(queue), leave=False, disable=None)
    episodes = sum(gather([replace(episode, records=[]) for episode in episodes]), [])
    return sorted(episodes, key=lambda episode: episode.group)

def interval(won, number) -> str:
    """'won/number share [low, high]', with Wilson's 95% interval."""
    low, high = binomtest(int(won), number).proportion_ci(method="wilson")
    return f"{won}/{number} {won / number:.0%} [{low:.0%}, {high:.0%}]"

def table(contexts, results) -> str:
    """Success per task of each column {name: list of bool}; of two columns, their exact McNemar test."""
    lines = [" " * 40 + "".join(f"{name:>30}" for name in results)]
    for row in [*dict.fromkeys(context.instruction for context in contexts), "all tasks"]:
        chosen = [i for i, context in enumerate(contexts) if row in (context.instruction, "all tasks")]
        cells = [interval(sum(column[i] for i in chosen), len(chosen)) for column in results.values()]
        lines.append(f"{row[:39]:<40}" + "".join(f"{cell:>30}" for cell in cells))
    if len(results) == 2:
        pairs = Counter(zip(*results.values()))
        gained, lost = pairs[False, True], pairs[True, False]
        p = binomtest(gained, gained + lost).pvalue if gained + lost else 1
        lines.append(f"paired: {gained} contexts gained, {lost} lost, exact McNemar p = {p:.2g}")
    return "\n".join(lines)

def report(out, contexts, results, policy, workers, cfg):
    """Print the table; write evaluation.csv, every context's outcome, and a video per task."""
    say(table(contexts, results))
    lines = ["task,instruction,context," + ",".join(results)]
    for c, *won in zip(contexts, *results.values()):
        lines.append(",".join(map(str, (c.task, c.instruction, c.seed, *map(int, won)))))
    write(out / "evaluation.csv", lambda path: path.write_text("\n".join(lines) + "\n"))
    firsts = {context.task: context for context in reversed(contexts)}
    for episode in evaluate(policy, workers, list(firsts.values()), cfg, film=True):
        video = out / f"task{episode.context.task}.mp4"
        write(video, lambda path: imageio.mimwrite(path, episode.frames, fps=20))

# --------------------------------------------------------------------------------------- 10. Bookkeeping
def write(path, writer):
    """Write a file on rank 0, whole or not at all: writer(temporary path), then rename."""
    if RANK:
        return
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error}")

def write_metrics(out, history):
    """metrics.jsonl, metrics.csv and curve.png of all iterations so far."""
    keys = list(dict.fromkeys(key for row in history for key in row))
    lines = [",".join(keys)] + [",".join(str(row.get(key, "")) for key in keys) for row in history]
    write(out / "metrics.csv", lambda path: path.write_text("\n".join(lines) + "\n"))
    lines_of_json = "".join(json.dumps(row) + "\n" for row in history)
    write(out / "metrics.jsonl", lambda path: path.write_text(lines_of_json))
    figure = Figure(figsize=(7, 7))
    success, rejected, seconds = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    for axes, key, style in ((success, "eval_success", "o-"), (success, "rollout_success", ".:"),
                             (rejected, "rejected", ".-"), (seconds, "seconds_rollouts", ".-"),
                             (seconds, "seconds_update", ".-")):
        rows = [row for row in history if key in row]
        axes.plot([row["iteration"] for row in rows], [row[key] for row in rows], style, label=key)
        axes.set_ylim(0, None if axes is seconds else 1.02)
        axes.legend()
    seconds.set_xlabel("iteration")
    write(out / "curve.png", lambda path: figure.savefig(path, bbox_inches="tight"))

def save_run(out, policy, optimizer, run):
    """last/ and best/ for the policy's users; run.pt, one file, has all that --resume needs."""
    policy.save(out / "last")
    if run["history"][-1].get("eval_success", -1) > run["best"]:
        run["best"] = run["history"][-1]["eval_success"]
        policy.save(out / "best")
    state = dict(run, policy=policy.trainable("ript"), optimizer=optimizer.state_dict())
    write(out / "run.pt", lambda path: torch.save(state, path))
    write_metrics(out, run["history"])

def load_run(out, policy, optimizer):
    """What save_run wrote: fills policy and optimizer, -> the run; None if no iteration was completed."""
    if not (out / "run.pt").exists():
        return None
    try:
        run = torch.load(out / "run.pt", map_location="cpu", weights_only=True)
        policy.load_state_dict(run.pop("policy"), strict=False)
        optimizer.load_state_dict(run.pop("optimizer"))
    except Exception as error:  # whatever torch says of a damaged file
        fail(f"cannot resume from {out / 'run.pt'}: {error}")
    return run

# --------------------------------------------------------------------------------------------- 11. Main
def check(cfg):
    """Fail for whatever can be known to go wrong, before any long work starts."""
    least = dict(rollouts=2, groups=1, passes=1, minibatch=1, micro_batch=1, workers=1, eval_contexts=1,
                 demos_per_task=1, image_size=16, iterations=0, sft_steps=0, scale_steps=0, max_rejected=0,
                 act_batch=0, eval_every=0, task=-1, seed=0)
    for name, bound in least.items():
        if getattr(cfg, name) < bound:
            fail(f"--{name} must be at least {bound}, got {getattr(cfg, name)}")
    for name in ("sft_lr", "lr", "clip", "max_grad_norm", "scale_multiplier"):
        if not 0 < getattr(cfg, name) < math.inf:
            fail(f"--{name} must be a number above 0, got {getattr(cfg, name)}")
    if not 0 <= cfg.momentum < 1:
        fail(f"--momentum must be at least 0 and below 1, got {cfg.momentum}")
    try:
        torch.empty(0, device=cfg.device)
    except (RuntimeError, AssertionError) as error:  # no such device, or a torch without CUDA
        fail(f"--device {cfg.device} cannot be used: {str(error).splitlines()[0]}")
    if cfg.demos and cfg.suite not in LIBERO:
        fail(f"--demos is for the suites of LIBERO, {cfg.suite} makes its own demonstrations")
    if cfg.eval and not cfg.checkpoint:
        fail("--eval needs --checkpoint DIR, the directory of a saved policy")
    if mujoco.__version__ != MUJOCO:
        fail(f"MuJoCo {mujoco.__version__} changes the results: pip install mujoco=={MUJOCO}")
    try:
        mujoco.GLContext(16, 16).free()
    except Exception as error:  # each backend has its own
        sys.unraisablehook = lambda _: None  # a half-made context complains again when it is deleted
        fail(f"no headless OpenGL with MUJOCO_GL={os.environ['MUJOCO_GL']}, {error}: on Debian, apt-get "
             "install libegl1 libgl1-mesa-dri")
    if cfg.suite in LIBERO:
        from libero.libero import get_libero_path
        if not Path(get_libero_path("assets")).is_dir():
            fail("LIBERO's meshes are missing: run libero-download-assets (about 400 MB, once)")

def supervise(policy, workers, demos, cfg):
    """Stage 2 on LIBERO's demonstrations or the scripted expert's: SFT, then the scale head."""
    if not demos and load_suite(cfg.suite).SCRIPTED:
        demos = scripted_demonstrations(policy, workers, cfg)
    if not demos:
        return say(f"no stage 2: no demonstrations of {cfg.suite}, --demos DIR gives LIBERO's HDF5 files")
    if not cfg.checkpoint:
        proprio = [record["observation"]["proprio"] for demo in demos for record in demo.records]
        bounds = np.quantile(proprio, (0.01, 0.99), 0).tolist()
        policy.arch.statistics["proprio"] = dict(zip(("q01", "q99"), bounds))
    if cfg.sft_steps:
        loss = fit(policy, "sft", demos, cfg.sft_steps, cfg.sft_lr, cfg.seed, batch=64)
        say(f"SFT on {len(demos)} demonstrations: L1 {loss:.4f}")
    if cfg.scale_steps:
        loss = fit(policy, "scale", demos, cfg.scale_steps, 1e-3, cfg.seed, batch=16)
        say(f"scale head: NLL {loss:.2f} per action step")

@errors.record  # so that torchrun's last words are the traceback of the rank that failed
def main(argv=None):
    """Stage 2, then Algorithm 1 with a line per iteration, between two evaluations on the same contexts."""
    cfg = parse_config(sys.argv[1:] if argv is None else argv)
    check(cfg)
    out, tasks = Path(cfg.out), list(tasks_of(cfg).items())
    join(cfg.device)
    torch.manual_seed(cfg.seed)
    tuned = cfg.resume and (out / "sft/model.safetensors").exists()
    source = out / "sft" if tuned else cfg.checkpoint
    policy = (OpenVLAOFT.load(source) if source else OpenVLAOFT(Architecture())).to(cfg.device)
    policy.scale_multiplier = cfg.scale_multiplier
    demos = libero_demonstrations(policy, cfg) if cfg.demos else []
    write(out / "config.json", lambda path: path.write_text(json.dumps(asdict(cfg), indent=1)))
    workers = [Worker(cfg, tasks[i % len(tasks)][0]) for i in range(cfg.workers)]
    held_out = evaluation_contexts(cfg)
    success = lambda: [episode.success for episode in evaluate(policy, workers, held_out, cfg)]
    if cfg.eval:
        return report(out, held_out, dict(success=success()), policy, workers, cfg)
    if not tuned:
        if RANK == 0:
            supervise(policy, workers, demos, cfg)
            policy.save(out / "sft")
        policy.arch.statistics = gather(policy.arch.statistics)[0]
        for value in policy.state_dict().values() if WORLD > 1 else ():
            distributed.broadcast(value, 0)

    def context_of(number):  # the stream of training contexts; a finite set in a new order at each pass
        if demos:
            order = np.random.default_rng([cfg.seed, number // len(demos)]).permutation(len(demos))
            return demos[order[number % len(demos)]].context
        return Context(*tasks[number % len(tasks)], TRAIN_SEEDS * (cfg.seed + 1) + number)

    optimizer = torch.optim.AdamW(policy.trainable("ript").values(), cfg.lr, (cfg.momentum, 0.99),
                                  weight_decay=1e-4)
    run = load_run(out, policy, optimizer) if cfg.resume else None
    if run is None:
        before = success()
        first = dict(iteration=0, eval_success=sum(before) / len(before))
        run = dict(iteration=0, group=0, skip=[], best=-1.0, before=before, after=before, history=[first])
    say(table(held_out, dict(SFT=run["before"])))
    while run["iteration"] < cfg.iterations:
        episodes, rewards, stats = collect(policy, workers, context_of, run, cfg)  # lines 4-14
        if cfg.anneal:
            optimizer.param_groups[0]["lr"] = cfg.lr * (1 - run["iteration"] / cfg.iterations)
        if episodes:
            stats |= update(policy, optimizer, episodes, rewards, cfg, run)  # lines 15-17
        run["iteration"] += 1
        if run["iteration"] == cfg.iterations or cfg.eval_every and run["iteration"] % cfg.eval_every == 0:
            run["after"] = success()
            stats["eval_success"] = np.mean(run["after"])
        stats = {name: value if isinstance(value, int) else float(value) for name, value in stats.items()}
        run["history"].append(dict(iteration=run["iteration"]) | stats)
        save_run(out, policy, optimizer, run)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
        say("  ".join(f"{name} {value:.4g}" for name, value in run["history"][-1].items())
            + f"  memory {memory:.2g} GB")
    results = dict(SFT=run["before"]) | (dict(RIPT=run["after"]) if cfg.iterations else {})
    report(out, held_out, results, policy, workers, cfg)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    if WORLD > 1:  # not after an error, when the other ranks may never answer
        distributed.destroy_process_group()
