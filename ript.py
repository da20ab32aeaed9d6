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
after success do not count; minibatch borders leave no gradient over; the K rollouts of a group share a scene.

    python ript.py                                            the laptop: MuJoCo on two cores, no download
    python ript.py --suite libero_object --task 0             the same small policy in LIBERO
    python ript.py --eval --checkpoint runs/tabletop/best     evaluate what a run has saved
    torchrun --standalone --nproc_per_node 4 ript.py --model openvla-oft --suite libero_long   the 7B, 4 GPUs

Shapes: B batch, C contexts, K rollouts, E episodes, S steps, H action steps per query, A action dimensions,
D width, V cameras.
"""
import os
import sys
for name, value in dict(MUJOCO_GL="egl", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0",
                        LIBERO_CONFIG_PATH=f"{sys.prefix}/.libero").items():
    os.environ.setdefault(name, value)  # mujoco, OpenMP and LIBERO read these when they are imported

import csv
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
import zipfile
from collections import Counter, OrderedDict, deque
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Literal, Optional

import h5py
import imageio
import mujoco
import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from matplotlib.figure import Figure
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.spatial.transform import Rotation
from scipy.stats import binomtest
from torch import distributed, nn
from torch.distributed.elastic.multiprocessing import errors
from tqdm import tqdm
from transformers import (ByT5Tokenizer, DynamicCache, HfArgumentParser, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)

# --------------------------------------------------------------------------------------- 1. Configuration
LIBERO = dict(libero_spatial=220, libero_object=280, libero_goal=300, libero_10=520, libero_90=400)  # steps
EXAMPLES = dict(tabletop="laptop.py:Tabletop", tabletop_pretrain="laptop.py:TabletopPretrain",
                libero_object="laptop.py:LiberoObject", quest="quest.py:QueST")
LONG = dict(libero_long="libero_10")  # the paper's name
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks on this machine, as torchrun sets it
MUJOCO = "3.3.2"  # others draw darker pictures (from 3.3.3) or break a stored state of LIBERO (from 3.4.0)
DEMO_SEEDS, TRAIN_SEEDS = 1_000_000, 10_000_000  # of contexts; evaluation has the seeds below

def option(default, text):
    """A field of Config: its default, and what --help says of it."""
    return field(default=default, metadata={"help": text})

@dataclass
class Config:
    """Every setting. A preset of (model, suite) overrides these defaults, the command line overrides both."""
    model: str = option("tiny", "the policy: tiny (an openvla-oft for laptops), openvla-oft, quest, or any "
                        "other as FILE.py:Class")
    suite: str = option("tabletop", "the tasks: tabletop, tabletop_pretrain, libero_spatial, libero_object, "
                        "libero_goal, libero_10 or libero_long, libero_90, or any other as FILE.py:Class")
    task: int = option(-1, "only this task of the suite; -1: all of them")
    checkpoint: str = option("", "directory or hub id of the policy to start from; none: random weights")
    adapter: str = option("", "directory of LoRA weights and heads to start from (openvla-oft)")
    scale_head: str = option("", "scale_header.pth to start from (openvla-oft)")
    prefix: Literal["exact", "prompt"] = option("exact", "OpenVLA-OFT's forward pass, or RIPT's release's")
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
    fit_scale_head: bool = option(False, "fit the scale head, save OUT/sft/scale_header.pth and stop")
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
    workers: int = option(max(1, min(16, os.cpu_count() // LOCAL_WORLD)), "simulator processes of each rank")
    image_size: int = option(256, "height and width of the two pictures, pixels")
    collision: bool = option(False, "draw collision meshes in plain colours: 10 times faster without a GPU")
    act_batch: int = option(0, "observations per forward when acting; 0: all; 1: --workers changes nothing")

TINY = dict(image_size=64, collision=True, act_batch=1, sft_steps=2500, minibatch=128, micro_batch=256,
            lr=2e-4, momentum=0.0, anneal=True)
# For the models and suites of this file; others bring theirs. OpenVLA-OFT was not released for LIBERO-90.
PRESETS = {("tiny", suite): TINY for suite in LIBERO} | {("openvla-oft", suite): dict(
    checkpoint=f"moojink/openvla-7b-oft-finetuned-{suite.replace('_', '-')}", scale_multiplier=5.0,
    scale_head=f"tanshh97/RIPT_VLA/openvla_oft/scale_header/{name}_scale_header.pth",
    act_batch=8, micro_batch=4)
    for suite, name in zip(LIBERO, ("LIBERO_SPATIAL", "LIBERO_OBJECT", "LIBERO_GOAL", "LIBERO_LONG"))}
PRESETS["openvla-oft", "libero_spatial"] |= dict(scale_multiplier=2.0)
PRESETS["openvla-oft", "libero_goal"] |= dict(lr=1e-5)

def fail(message):
    """What the user can mend: one sentence, exit status 2."""
    time.sleep(2 * (RANK > 0))  # where rank 0 fails alike, torchrun ends this one before it says so too
    who = f"ript.py, rank {RANK}" if RANK else "ript.py"
    print(f"{who}: {' '.join(str(message).split())[:500]}", file=sys.stderr, flush=True)
    sys.unraisablehook = lambda _: None  # what is half made would complain when it is deleted
    sys.exit(2)

def require(condition, message):
    """Fail unless the condition holds."""
    if not condition:
        fail(message)

@contextmanager
def or_fail(what):
    """Any error inside is for the user to mend: what cannot be done, and the error's own words."""
    try:
        yield
    except Exception as error:  # each library has its own for a damaged file or a full disk
        fail(f"{what}: {error or type(error).__name__}")

def parse_config(argv) -> Config:
    """Dataclass < preset < command line; with --resume, the run's own configuration replaces the preset."""
    parser = HfArgumentParser(Config, usage=__doc__, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (python ript.py --help lists the settings)")
    given = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0]
    suite = LONG.get(given.suite, given.suite)
    preset = PRESETS.get((given.model, suite), {}) | load_suite(suite).PRESET.get(given.model, {})
    preset |= getattr(load_model(given.model), "PRESET", {}).get(suite, {})
    require(preset or ":" in suite + given.model, f"--model {given.model} is not made for --suite {suite}")
    names = [name.split(":")[-1] for name in (given.model, suite) if name != "tiny"]
    names += ["eval"] * given.eval  # not over the run's own files
    parser.set_defaults(out="runs/" + "_".join(names), **preset)
    if given.resume:
        with or_fail(f"cannot resume {given.resume}, its config.json"):
            saved = Config(**json.loads((Path(given.resume) / "config.json").read_text()))
            parser.set_defaults(**asdict(saved))
    cfg = Config(**vars(parser.parse_args(argv)))
    return replace(cfg, suite=LONG.get(cfg.suite, cfg.suite), out=cfg.resume or cfg.out)

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
    """Make the processes that torchrun started one group: NCCL on GPUs, gloo on CPU."""
    global STORE
    if device == "cuda":  # a GPU for each, for the simulator's pictures too
        torch.cuda.set_device(local := int(os.environ.get("LOCAL_RANK", 0)))
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", seen.split(",")[local] if seen else str(local))
    if WORLD > 1:
        STORE = next(distributed.rendezvous("env://"))[0]
        distributed.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo", store=STORE, rank=RANK, world_size=WORLD,
            timeout=timedelta(hours=12))  # a rank may be far behind: pulse says whether it lives
        threading.Thread(target=pulse, args=(STORE.clone(), RANK, WORLD), daemon=True).start()

def pulse(store, rank, world, patience=45):
    """A rank's sign of life, in a thread: end this process once another rank is silent for patience seconds.

    torchrun ends the ranks of its own machine where one of them dies; those of other machines, and a rank
    that hangs, are noticed here.
    """
    heard = {}  # (rank, its count) -> when that was new
    try:
        while True:
            store.add(f"pulse {rank}", 1)
            counts, now = [store.add(f"pulse {other}", 0) for other in range(world)], time.monotonic()
            heard = {key: heard.get(key, now) for key in enumerate(counts)}
            for (other, count), since in heard.items():
                if count and now - since > patience:
                    raise TimeoutError(f"rank {other} is dead or hangs: silent for {patience} s")
            time.sleep(patience / 9)
    except Exception as error:  # or the store is gone, with the machine that has it
        print(f"ript.py, rank {rank}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may be waiting for ever

def say(text):
    """Print on rank 0."""
    if RANK == 0:
        print(text, flush=True)

def gather(value) -> list:
    """The value of every rank."""
    values = [value] * WORLD
    if WORLD > 1:
        distributed.all_gather_object(values, value)
    return values

def share(policy):
    """Give every rank the policy of rank 0."""
    policy.arch = gather(getattr(policy, "arch", None))[0]  # what it knows besides parameters
    for value in policy.state_dict().values() if WORLD > 1 else ():
        distributed.broadcast(value, 0)

def reduce_gradients(parameters):
    """Sum gradients over the ranks in one flat all-reduce; a rank without episodes adds zeros."""
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
    """A vision transformer with timm's names (DINOv2, SigLIP): pictures (B, 3, h, w) -> patches (B, P, D).

    OpenVLA reads block depth - 2 and no norm. What comes after it is in the released checkpoints and has
    adapters there, so it is built too: the last block, norm and attn_pool are never run.
    """
    def __init__(self, embed_dim, depth, num_heads, mlp_ratio=4., prefix=0, layer_scale=False, pool=False):
        super().__init__()
        D = embed_dim
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, D, 14, 14)))  # 224 / 14 = 16 patches a side
        self.pos_embed = nn.Parameter(torch.randn(1, 16 ** 2, D) * 0.02)
        self.prefix = prefix  # a class token and registers, which get no position
        if prefix:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
            self.reg_token = nn.Parameter(torch.zeros(1, prefix - 1, D))
        self.blocks = nn.Sequential(*(Block(D, num_heads, mlp_ratio, layer_scale) for _ in range(depth)))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        if pool:
            self.attn_pool = nn.ModuleDict(dict(
                q=nn.Linear(D, D), kv=nn.Linear(D, 2 * D), proj=nn.Linear(D, D), norm=nn.LayerNorm(D),
                mlp=mlp(D, int(D * mlp_ratio), D)))
            self.attn_pool.latent = nn.Parameter(torch.zeros(1, 1, D))

    def forward(self, pictures):
        x = self.patch_embed["proj"](pictures).flatten(2).mT + self.pos_embed  # B P D
        if self.prefix:
            extra = torch.cat([self.cls_token, self.reg_token], 1)
            x = torch.cat([extra.expand(len(x), -1, -1), x], 1)
        return self.blocks[:-1](x)[:, self.prefix:]

class Keypoints(nn.Module):
    """A tower that learns to see in minutes, by where its channels look: (B, 3, h, w) -> (B, 1, D)."""
    def __init__(self, embed_dim, keypoints=16):
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
                                  nn.Conv2d(32, keypoints, 1))
        self.read = nn.Linear(2 * keypoints, embed_dim)

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

def openvla_picture(picture):
    """A camera's picture as OpenVLA-OFT was trained with it: (h, w, 3) uint8 -> (224, 224, 3) uint8.

    TensorFlow's JPEG round trip (quality 95, fast integer DCT), Lanczos to 224 pixels, and the central 90% of
    the area, bilinearly at 224 pixels again.
    """
    jpeg = io.BytesIO()
    Image.fromarray(picture).save(jpeg, "JPEG", quality=95)
    picture = simplejpeg.decode_jpeg(jpeg.getvalue(), fastdct=True, fastupsample=False)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, size=(224, 224), mode="lanczos", antialias=True).round().clamp(0, 255) / 255
    side = np.float32(0.9) ** np.float32(0.5)
    at = (1 - side) / 2 * 223 + torch.arange(224) * side  # the rows and columns to sample, in pixels
    left, share = at.long(), at.frac()
    for _ in range(2):  # columns, then rows
        x = (x[..., left] + (x[..., left + 1] - x[..., left]) * share).mT
    return (x * 255.5).floor().byte()[0].permute(1, 2, 0).numpy()

@dataclass
class Architecture:
    """The sizes of an OpenVLAOFT and the bounds of its inputs, as in config.json. Defaults: the laptop's."""
    towers: tuple = (dict(embed_dim=48),) * 2  # arguments of Tower if they name a depth, else of Keypoints
    llm: dict = field(default_factory=lambda: dict(vocab_size=259, hidden_size=96, intermediate_size=192,
                                                   num_hidden_layers=2, num_attention_heads=4))
    prompt: str = "{}"  # around the instruction
    pixels: tuple = (dict(mean=(0.5,) * 3, std=(0.5,) * 3),) * 2  # each tower's normalisation of 0..1
    released: bool = False  # OpenVLA-OFT's own: pictures as in its training, adapters train and not layers
    dtype: str = "float32"  # of the weights
    trained: tuple = ("action_head",)  # what stage 3 trains, the first parts of names
    # Bounds of b, normalised action units: wide for rotation, which matters little here, since a wide density
    # makes for quiet gradients; narrow for the gripper, whose sign decides.
    scale_range: tuple = ((0.1, 0.1, 0.1, 0.4, 0.4, 0.4, 0.1), (0.2, 0.2, 0.2, 0.5, 0.5, 0.5, 0.2))
    chunk: int = 8  # action steps per query, H
    statistics: dict = field(default_factory=lambda: dict(  # the bounds that become -1 and 1
        action=dict(q01=[-1.0] * 7, q99=[1.0] * 7), proprio=dict(q01=[-1.5] * 8, q99=[1.5] * 8)))

    @classmethod
    def read(cls, directory, suite):
        """From config.json, as OpenVLAOFT.save or OpenVLA-OFT's release wrote it."""
        content = lambda name: json.loads((directory / name).read_text())
        config = content("config.json")
        if "text_config" not in config:
            return cls(**config)
        towers = (dict(embed_dim=1024, depth=24, num_heads=16, prefix=5, layer_scale=True),
                  dict(embed_dim=1152, depth=27, num_heads=16, mlp_ratio=3.7362, pool=True))
        towers = tuple(a | b for a, b in zip(towers, config.get("timm_model_kwargs", ({}, {}))))
        pixels = [{key: norm[key] for key in ("mean", "std")}
                  for norm in content("preprocessor_config.json")["tvf_normalize_params"]]
        statistics = content("dataset_statistics.json")
        name = suite if suite in statistics else f"{suite}_no_noops"
        if name not in statistics:
            raise ValueError(f"its dataset_statistics.json is for {', '.join(statistics)}, not {suite!r}")
        prompt = "In: What action should the robot take to {}?\nOut:"
        return cls(towers, config["text_config"], prompt, pixels, True, config["torch_dtype"],
                   ("language_model.model.layers", "action_head"),
                   ((math.exp(-2),) * 7, (math.exp(0.5),) * 7), statistics=statistics[name])

def fetch(path) -> Path:
    """A local path as it is; OWNER/NAME or OWNER/NAME/PATH in the Hugging Face hub, downloaded."""
    path = Path(path)
    if path.exists():
        return path
    if path.is_absolute() or len(path.parts) < 2:
        raise FileNotFoundError("no such file or directory")
    inside = "/".join(path.parts[2:])
    wanted = [inside, f"{inside}/*"] if inside else ["*.json", "*.safetensors", "*_checkpoint.pt"]
    try:
        root = snapshot_download("/".join(path.parts[:2]), allow_patterns=wanted,
                                 ignore_patterns="lora_adapter/*")
    except Exception as error:  # the hub has many
        raise FileNotFoundError(f"no such file or directory, and nothing from the hub: {error}")
    return Path(root, inside)

def adapts(name) -> bool:
    """Whether a parameter is an adapter's or a head's: in float32, and all that a run with adapters saves."""
    return "lora_" in name or name.startswith(("action_head", "scale_head"))

class OpenVLAOFT(nn.Module):
    """OpenVLA-OFT with a Laplace scale head: two vision towers, Llama attending both ways, an L1 head.

    One class for the 7B and the laptop, with the module names of the released checkpoints. The sequence is
    BOS | patches of each camera | proprio | padding, prompt, space | A H zeros | stop. As a language model
    predicts the next token, the heads read the final hidden states of the space and the first A H - 1 zeros.

    prefix="exact" is the function that OpenVLA-OFT was trained with; with "prompt", as the released RIPT
    adapters were trained, what precedes the space does not see what follows it.

    The policy protocol is load, chunk, TOKENS, preprocess, act, log_prob, imitation_loss, trainable and save.
    """
    A, BOS, STOP = 7, 1, 2
    TOKENS = 0  # per query; 0: log_prob has a column per action step, not per token
    LORA = dict(r=32, lora_alpha=16, lora_dropout=0.0, bias="none", init_lora_weights="gaussian",
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
                                "lm_head", "qkv", "q", "kv", "proj", "fc1", "fc2", "fc3"])

    def __init__(self, arch: Architecture, tokenizer=None, prefix="exact"):
        super().__init__()
        llama, wide = LlamaConfig(**arch.llm), sum(tower["embed_dim"] for tower in arch.towers)
        D = llama.hidden_size
        towers = [Tower(**tower) if "depth" in tower else Keypoints(**tower) for tower in arch.towers]
        self.vision_backbone = nn.ModuleDict(dict(featurizer=towers[0], fused_featurizer=towers[1]))
        self.projector, self.proprio_projector = mlp(wide, 4 * wide, D, D), mlp(8, D, D)
        self.language_model = LlamaForCausalLM(llama)
        self.action_head = nn.ModuleDict(dict(model=MLPResNet(self.A * D, D, self.A)))
        with torch.device("cpu"):  # even if the rest has no memory yet: a checkpoint may lack this head
            trunk, log_b_head = MLPResNet(self.A * D, D, D), nn.Linear(D, self.A)
        nn.init.xavier_uniform_(log_b_head.weight, gain=0.01)
        nn.init.constant_(log_b_head.bias, -3.0)
        self.scale_head = nn.ModuleDict(dict(trunk=trunk, log_b_head=log_b_head))
        self.arch, self.tokenizer, self.prefix = arch, tokenizer or ByT5Tokenizer(), prefix
        self.chunk, self.lora, self.scale_multiplier = arch.chunk, None, 1.0
        self.eval()  # for good: old and new log-probabilities must come from one function

    # -- checkpoints
    @classmethod
    def load(cls, cfg, saved=""):
        """The policy that a run starts from or, with saved, as save wrote it into that directory."""
        if cfg.model == "tiny":
            source = saved or cfg.checkpoint
            policy = cls.from_pretrained(source) if source else cls(Architecture())
        else:
            adapter = saved or cfg.adapter  # with heads of its own
            scale_head = "" if adapter or cfg.eval or cfg.fit_scale_head else cfg.scale_head
            require(adapter or scale_head or cfg.eval or cfg.demos, "openvla-oft explores with a scale head: "
                    "--scale_head FILE or --adapter DIR has one, --demos DIR fits one")
            policy = cls.from_pretrained(cfg.checkpoint, cfg.suite, adapter, scale_head, cfg.prefix,
                                         cfg.device)
            if not (adapter or cfg.eval):
                policy.add_lora()
        policy.scale_multiplier = cfg.scale_multiplier
        return policy.to(cfg.device)

    @classmethod
    def from_pretrained(cls, path, suite="", adapter=None, scale_head=None, prefix="exact", device="cpu",
                        dtype=None):
        """Read OpenVLA-OFT's release or what save wrote, each from a path that fetch understands.

        suite picks the statistics of actions and proprio; adapter is a directory of LoRA weights and heads,
        scale_head a scale_header.pth. Weights go to the device file by file, in dtype (None: config.json's),
        the heads in float32. Every tensor must be known, every parameter given, and nothing that was
        downloaded is executed. What cannot be read ends the program with one sentence.
        """
        unpickle = partial(torch.load, map_location="cpu", weights_only=True)
        weights, at = {}, path  # what is being read

        def take(part, named):  # a whole part of the model, or what belongs to several
            for name in [name for name in weights if part and name.startswith(part)]:
                del weights[name]
            for name, value in named.items():
                name = part + name.removeprefix("module.")  # which DistributedDataParallel puts before it
                # A copy, which torch aligns: to the last bit, results depend on where in memory weights are.
                weights[name] = value.to(device, torch.float32 if adapts(name) else dtype, copy=True)
        try:
            path, tokenizer = fetch(path), None
            arch, vocabulary = Architecture.read(path, suite), path / "tokenizer.json"
            if vocabulary.exists():
                tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(vocabulary), pad_token="<PAD>")
            with torch.device("meta"):  # shapes without memory
                policy = cls(arch, tokenizer, prefix)
            dtype, llama = dtype or getattr(torch, arch.dtype), policy.language_model.model
            llama.rotary_emb = type(llama.rotary_emb)(llama.config)  # is in no file
            take("scale_head.", policy.scale_head.state_dict())  # a release has none
            for at in sorted(path.glob("model*.safetensors")):
                take("", load_file(at))
            for at in sorted(path.glob("*--*_checkpoint.pt")):
                take(at.name.split("--")[0] + ".", unpickle(at))
            if scale_head and (at := scale_head):
                header = unpickle(fetch(at))
                take("scale_head.trunk.", header["scale_trunk"])
                take("scale_head.log_b_head.", header["log_b_head"])
            if adapter and (at := adapter):
                folder = fetch(at)
                policy.add_lora(json.loads((folder / "adapter_config.json").read_text()))
                take("", {name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): p
                          for name, p in load_file(folder / "adapter_model.safetensors").items()
                          if "lora_" in name})  # the authors' files also have a copy of lm_head
                heads = unpickle(folder / "openvla_headers.pt")
                take("action_head.", heads["action_header"])
                take("scale_head.", heads["scale_header"])
            at = " and ".join(str(part) for part in (path, scale_head, adapter) if part)
            known = policy.state_dict()  # PEFT moves what it adapts into a base_layer
            policy.load_state_dict({name if name in known else ".base_layer.".join(name.rsplit(".", 1)): p
                                    for name, p in weights.items()}, assign=True)  # strict
            policy.to(device)._check_attention()
        except Exception as error:  # whatever json, safetensors, torch, PEFT and the hub say
            fail(f"cannot read a policy from {at}: {error or type(error).__name__}")
        policy.trainable("ript")
        policy.scale_head.requires_grad_(True)
        return policy

    @torch.no_grad()
    def _check_attention(self):
        """Raise ValueError if a later word does not change an earlier output: LlamaModel takes a 4-D mask as
        it is, which another version of transformers may not do."""
        llama, words = self.language_model.model, torch.tensor([[1, 2, 3], [1, 2, 4]])
        x = llama.embed_tokens(words.to(llama.embed_tokens.weight.device))  # two sequences
        mask = torch.ones(2, 1, 3, 3, dtype=torch.bool, device=x.device)
        one, other = llama(inputs_embeds=x, attention_mask=mask).last_hidden_state[:, 0]
        if torch.equal(one, other):
            raise ValueError("attention is causal with this transformers, install requirements.txt's")

    def add_lora(self, settings=LORA):
        """Add adapters (PEFT), in float32, to every linear layer but the heads'."""
        self.lora = {name: settings[name] for name in self.LORA}
        inject_adapter_in_model(LoraConfig(
            **self.lora, exclude_modules=r"(action_head|scale_head|proprio_projector)\..*"), self)
        for name, p in self.named_parameters():
            p.data = p.data.float() if "lora_" in name else p.data

    # -- observations and actions
    def preprocess(self, raw):
        """The simulator's arrays -> what an episode stores: pictures (V, h, w, 3) uint8, proprio (8,)."""
        x, y, z, w = np.clip(raw["robot0_eef_quat"], -1, 1)
        sine = math.sqrt(1 - w * w)  # of half the angle
        axis_angle = np.array([x, y, z]) * (2 * math.acos(w) / sine if sine > 1e-8 else 0)
        proprio = np.concatenate([raw["robot0_eef_pos"], axis_angle, raw["robot0_gripper_qpos"]])
        pictures = [raw[f"{camera}_image"][::-1, ::-1] for camera in Libero.CAMERAS]  # turned by 180 degrees
        if self.arch.released:
            pictures = [openvla_picture(picture) for picture in pictures]
        return dict(pictures=np.stack(pictures), proprio=proprio)

    def _bounds(self, kind):
        low, high = (np.array(self.arch.statistics[kind][name]) for name in ("q01", "q99"))
        return low, high - low + 1e-8

    def to_env_actions(self, normalised):
        """Head units -> the environment's (..., 7): motion within its bounds, gripper -1 open, +1 closed."""
        low, width = self._bounds("action")
        normalised = torch.as_tensor(normalised).detach().cpu().double().numpy()
        actions = (normalised + 1) / 2 * width + low
        actions[..., 6] = np.sign(1 - 2 * normalised[..., 6])
        return actions

    def from_env_actions(self, actions):
        """The inverse of to_env_actions, within the bounds as in OpenVLA-OFT's training: labels, a tensor."""
        low, width = self._bounds("action")
        normalised = np.clip(2 * (actions - low) / width - 1, -1, 1)
        normalised[..., 6] = (1 - np.sign(actions[..., 6])) / 2
        return torch.tensor(normalised, dtype=torch.float32)

    # -- the forward pass
    def _embed(self, observations, instructions):
        """-> the sequence's embeddings (B, S, D), its mask (B, 1, S, S) and its position ids (B, S)."""
        words, zeros = self.language_model.model.embed_tokens, self.A * self.chunk
        to = lambda value: torch.as_tensor(value, dtype=torch.float32, device=words.weight.device)
        pictures = to(np.stack([o["pictures"] for o in observations])).permute(0, 1, 4, 2, 3) / 255
        seen = []
        for tower, norm in zip(self.vision_backbone.values(), self.arch.pixels):
            mean, std = (to(norm[name])[:, None, None] for name in ("mean", "std"))
            seen.append(tower(((pictures - mean) / std).flatten(0, 1).to(words.weight)))  # BV P width
        patches = self.projector(torch.cat(seen, -1)).unflatten(0, pictures.shape[:2])  # B V P D
        patches = patches.flatten(1, 2)
        low, width = self._bounds("proprio")
        proprio = to(np.stack([np.clip(2 * (o["proprio"] - low) / width - 1, -1, 1) for o in observations]))
        proprio = self.proprio_projector(proprio.to(words.weight))[:, None]  # B 1 D
        texts = [self.arch.prompt.format(text.lower()) + " " for text in instructions]
        tokens = self.tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left",
                                return_tensors="pt").to(words.weight.device)
        B, D = len(texts), patches.shape[-1]
        first, stop = (words(tokens.input_ids.new_full((B, 1), token)) for token in (self.BOS, self.STOP))
        blank = patches.new_zeros(B, zeros, D)
        x = torch.cat([first, patches, proprio, words(tokens.input_ids), blank, stop], 1)
        real = F.pad(tokens.attention_mask, (patches.shape[1] + 2, zeros + 1), value=1).bool()  # B S
        return x, real[:, None, None].expand(-1, 1, x.shape[1], -1), real.cumsum(-1) - 1

    def _hidden(self, observations, instructions):
        """The final hidden states that the heads read, (B, A H, D), with gradient as far back as any trains.

        Where the decoder trains and what feeds it does not, one pass without gradient fills a cache, which is
        cropped to what precedes the space; the last A H + 2 positions run again, with gradient. In exact mode
        the first pass has seen them too, so that the result is that of one pass over the whole sequence.
        """
        trains = lambda part: torch.is_grad_enabled() and any(p.requires_grad for p in part.parameters())
        whole = any(map(trains, (self.vision_backbone, self.projector, self.proprio_projector)))
        last = self.A * self.chunk + 2  # the space, the zeros, the stop
        llama, cache = self.language_model.model, None
        if self.prefix == "prompt" or trains(self.language_model) and not whole:
            cache = DynamicCache()
        with torch.set_grad_enabled(whole):
            x, mask, positions = self._embed(observations, instructions)
            end = -last if self.prefix == "prompt" else None
            hidden = llama(inputs_embeds=x[:, :end], attention_mask=mask[:, :, :end, :end],
                           position_ids=positions[:, :end], past_key_values=cache,
                           use_cache=cache is not None).last_hidden_state
        if cache:
            if end is None:
                cache.crop(-last)
            hidden = llama(inputs_embeds=x[:, -last:], attention_mask=mask[:, :, -last:],
                           position_ids=positions[:, -last:], past_key_values=cache).last_hidden_state
        return hidden[:, -last:-2]

    def predict(self, observations, instructions):
        """-> mean and log_scale, (B, H, A) each, normalised, float32."""
        hidden = self._hidden(observations, instructions).float()
        rows = hidden.unflatten(1, (self.chunk, self.A)).flatten(2)  # B H AD
        log_scale = self.scale_head["log_b_head"](self.scale_head["trunk"](rows))
        return self.action_head["model"](rows), log_scale

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
                       log_prob=log_prob.cpu().numpy(), actions=self.to_env_actions(sample),
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
        """AdamW's parameter groups of a stage: "sft", "scale" or "ript"; nothing else has gradient then."""
        parts = dict(sft=[name for name, _ in self.named_children() if name != "scale_head"],
                     scale=["scale_head"], ript=self.arch.trained)[stage]
        for name, p in self.named_parameters():
            p.requires_grad_(name.startswith(tuple(parts)) and (adapts(name) or not self.arch.released))
        return [dict(params=[p for p in self.parameters() if p.requires_grad], weight_decay=1e-4)]

    def save(self, directory):
        """Write config.json and model.safetensors or, with adapters, the authors' files."""
        weights = {name: p.detach().cpu().contiguous() for name, p in self.state_dict().items()
                   if adapts(name) or not self.lora}
        kind, settings = "", asdict(self.arch)
        if self.lora:
            part = lambda of: {name.removeprefix(of): p for name, p in weights.items() if name.startswith(of)}
            heads = dict(action_header=part("action_head."), scale_header=part("scale_head."))
            scale = dict(scale_trunk=part("scale_head.trunk."), log_b_head=part("scale_head.log_b_head."))
            write(directory / "openvla_headers.pt", lambda path: torch.save(heads, path))
            write(directory / "scale_header.pth", lambda path: torch.save(scale, path))
            kind, settings = "adapter_", dict(self.lora, peft_type="LORA")
            weights = {"base_model.model." + name.replace(".default", ""): p
                       for name, p in weights.items() if "lora_" in name}
        write(directory / f"{kind}config.json", lambda path: path.write_text(json.dumps(settings, indent=1)))
        write(directory / f"{kind}model.safetensors", lambda path: save_file(weights, path))

# ------------------------------------------------------------------------------------------ 5. Simulator
@dataclass
class Context:
    """What an episode starts from: a task, and how to reset to one scene of it."""
    task: int
    instruction: str
    seed: int  # of numpy's global generator, from which a reset draws where things stand
    state: Optional[np.ndarray] = field(default=None, repr=False)  # flattened, to set after the reset
    index: int = -1  # place in a finite set of contexts; -1: drawn anew

@cache
def load_class(spec, base):
    """The class that FILE.py:Class names, or an example; `import ript` in the file gives this module."""
    sys.modules.setdefault("ript", sys.modules[__name__])  # and not a second copy
    if spec in EXAMPLES:
        spec = str(Path(__file__).parent / "examples" / EXAMPLES[spec])
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
        base = load_class(name, Libero) if name in EXAMPLES else Libero
        return type(name, (base,), dict(BENCHMARK=suite, HORIZON=LIBERO[name],
                                        INSTRUCTIONS=[task.language for task in suite.tasks]))
    known = ("tabletop", "tabletop_pretrain", *LIBERO, *LONG)
    require(name in known or ":" in name, f"--suite {name} is none of {', '.join(known)}, FILE.py:Class")
    return load_class(name, Libero)

def load_model(name):
    """The class of a policy, by its name or FILE.py:Class."""
    known = ("tiny", "openvla-oft", "quest")
    require(name in known or ":" in name, f"--model {name} is none of {', '.join(known)}, FILE.py:Class")
    return OpenVLAOFT if name in known[:2] else load_class(name, nn.Module)

def tasks_of(cfg) -> dict[int, str]:
    """Numbers and instructions of the tasks that a run is about."""
    texts = load_suite(cfg.suite).INSTRUCTIONS
    require(cfg.task < len(texts), f"--task must be below {len(texts)} for {cfg.suite}, got {cfg.task}")
    return {task: text for task, text in enumerate(texts) if cfg.task in (task, -1)}

class Libero:
    """A suite of LIBERO: its tasks and, in a process of its own, one environment that simulates them.

    It is also the protocol of a suite: others derive from it and override what differs.
    """
    INSTRUCTIONS, HORIZON = (), 0  # a text per task; the control steps of 50 ms that an episode may take
    PRESET, BENCHMARK = {}, None  # settings per model, which override PRESETS; LIBERO's object of the suite
    MEASURED = ("proprio", "action")  # what takes its bounds from demonstrations, for a policy from scratch
    scripted = None  # or a classmethod (workers, cfg) -> Episodes: demonstrations that an expert makes
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
        observe = self.env._update_observables  # 25 times an action; look() asks for one
        self.env._update_observables = lambda force=False: force and observe(force=True)
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
        else:  # stored states have the arm's joints off by this, radians; ControlEnv's fresh ones do not
            joints = self.env.robots[0]._ref_joint_pos_indexes
            self.env.sim.data.qpos[joints] += np.random.normal(0, 0.02, len(joints))
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

def worker_main(connection, cfg):
    """A simulator process: answers (method, *arguments) with (result, None) or (None, traceback)."""
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
            self.process.join()
        context = multiprocessing.get_context("spawn")  # OpenGL and CUDA do not survive a fork
        self.connection, child = context.Pipe()
        self.process = context.Process(target=worker_main, args=(child, self.cfg), daemon=True)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the trainer alone
        self.process.start()
        signal.signal(signal.SIGINT, handler)
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
    iteration: int = -1  # from 0; -1: of an evaluation or a demonstration

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
            raise RuntimeError(f"action is not finite in iteration {episode.iteration + 1}, "
                               f"group {episode.group}, {episode.context}")
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
    explore = lambda e: np.random.default_rng((cfg.seed, e.iteration, e.group, e.k, len(e.records)))
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
            groups[number] = [Episode(context_of(number), number, k, iteration=run["iteration"])
                              for k in range(cfg.rollouts)]
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
def libero_row(demo, t):
    """Step t of a demonstration in LIBERO's HDF5 files, as the simulator's arrays."""
    names = dict(agentview_image="agentview_rgb", robot0_eye_in_hand_image="eye_in_hand_rgb",
                 robot0_eef_pos="ee_pos", robot0_joint_pos="joint_states",
                 robot0_gripper_qpos="gripper_states")
    turn = Rotation.from_rotvec(demo["obs/ee_ori"][t]).as_quat()
    return {name: demo[f"obs/{theirs}"][t] for name, theirs in names.items()} | dict(robot0_eef_quat=turn)

def libero_demonstrations(cfg):
    """Episodes from LIBERO's HDF5 files in cfg.demos; row 0 of their states is their context."""
    demos = []
    for task, instruction in tasks_of(cfg).items():
        path = Path(cfg.demos) / f"{load_suite(cfg.suite).BENCHMARK.tasks[task].name}_demo.hdf5"
        with or_fail(f"cannot read the demonstrations in {path}"):
            data = h5py.File(path)["data"]  # stays open: what is looked at is read when it is
            for key in sorted(data, key=lambda key: int(key.split("_")[1])):
                demo, actions = data[key], data[key]["actions"][:]
                pictures = demo["obs/agentview_rgb"].shape
                libero_row(demo, -1)  # an error now and not in an hour
                if actions.shape != (pictures[0], 7) or cfg.model == "tiny" and pictures[1] != cfg.image_size:
                    raise ValueError(f"{key} has actions {actions.shape}, pictures {pictures}: "
                                     "set --image_size to theirs, with --collision false")
                context = Context(task, instruction, 0, demo["states"][0], len(demos))
                looks = [partial(libero_row, demo, t) for t in range(len(actions))]
                records = [dict(look=look, label=action) for look, action in zip(looks, actions)]
                demos.append(Episode(context, records=records))
    return demos

def fit(policy, stage, demos, steps, lr, seed, batch):
    """AdamW on policy.imitation_loss at random steps of demonstrations: -> the mean loss of the last tenth.

    stage "sft": L1, all but the scale head. "scale": the scale head alone, by Laplace NLL. Warm-up and cosine
    decay. A chunk that outlasts its demonstration repeats the last action.
    """
    rng, losses, samples, groups = np.random.default_rng([seed, 0]), [], [], policy.trainable(stage)
    optimizer = torch.optim.AdamW(groups)
    for demo in demos:
        labels = np.array([record["label"] for record in demo.records])
        for t, record in enumerate(demo.records):
            ahead = np.arange(t, t + policy.chunk).clip(max=len(labels) - 1)
            samples.append((record["look"], demo.context.instruction, labels[ahead]))
    for step in tqdm(range(steps), stage, leave=False, disable=None):
        rise, fall = min(1, (step + 1) * 20 / steps), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        picked = [samples[i] for i in rng.integers(len(samples), size=batch)]
        looks, instructions, chunks = zip(*picked)
        observations = [policy.preprocess(look()) for look in looks]
        loss = policy.imitation_loss(stage, observations, instructions, np.array(chunks))
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * rise * fall
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        losses.append(loss.item())
    return np.mean(losses[-math.ceil(steps / 10):])

def sft(policy, demos, cfg):
    """Stage 2: L1 loss on demonstrations, for all but the scale head: -> the final loss."""
    return fit(policy, "sft", demos, cfg.sft_steps, cfg.sft_lr, cfg.seed, batch=64)

def fit_scale_head(policy, demos, cfg):
    """The Laplace scale head by NLL on demonstrations, everything else frozen: -> the final NLL."""
    return fit(policy, "scale", demos, cfg.scale_steps, 1e-3, cfg.seed, batch=16)

# --------------------------------------------------------------------------------------------- 8. Update
def update(policy, optimizer, episodes, rewards, cfg, run):
    """Algorithm 1, lines 15-17: N passes of minibatches over the kept episodes: -> mean diagnostics."""
    began, logs, where = time.time(), [], f"iteration {run['iteration'] + 1}"
    advantages = leave_one_out_advantage(rewards).flatten()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rng = np.random.default_rng([cfg.seed, run["iteration"]])
    batches, width = math.ceil(len(episodes) / cfg.minibatch), policy.TOKENS or policy.chunk
    # What counts of a query: the steps that were executed, or all tokens, since a token decides all steps.
    counted = [[policy.TOKENS or ran for ran in episode.executed] for episode in episodes]
    for _ in range(cfg.passes):
        for minibatch in np.array_split(rng.permutation(len(episodes)), batches):
            rows = [(i, q) for i in minibatch for q in range(len(episodes[i].records))]
            records = [episodes[i].records[q] for i, q in rows]
            old = torch.tensor(np.array([record["log_prob"] for record in records]))  # B H
            mask = torch.tensor([[h < counted[i][q] for h in range(width)] for i, q in rows])  # B H
            # A step's weight in the loss goes on its advantage, in which the loss is linear: so micro-batches
            # of chunks, whichever episodes and ranks they come from, add up to the minibatch's gradient.
            total = sum(sum(counted[i]) for i in minibatch)  # of all ranks
            steps = torch.tensor([sum(counted[i]) * len(minibatch) for i, _ in rows])
            gain = advantages[[i for i, _ in rows]] / (steps if cfg.loss_per == "episode" else total)
            optimizer.zero_grad()
            log = dict.fromkeys(("loss", "ratio", "clip_frac", "approx_kl", "ratio_error"), 0.0)
            for start in range(0, len(rows), cfg.micro_batch):
                part = slice(start, start + cfg.micro_batch)
                log_prob, m = policy.log_prob(records[part]).cpu(), mask[part]
                finite = log_prob.isfinite().all(1)
                if not finite.all():
                    bad = episodes[rows[part][finite.int().argmin()][0]]
                    raise RuntimeError(f"log_prob is not finite in {where}, group {bad.group}, {bad.context}")
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
                raise RuntimeError(f"the gradient is not finite in {where}")
            optimizer.step()
            logs.append(log)
    stats = {name: np.mean([log[name] for log in logs]) for name in logs[0]}
    stats["ratio_error"], checksum = logs[0]["ratio_error"], sum(p.double().sum().item() for p in parameters)
    if len(set(gather(checksum))) > 1:
        raise RuntimeError(f"the ranks' parameters differ after {where}")
    return stats | dict(checksum=checksum, updates=len(logs), seconds_update=time.time() - began)

# ----------------------------------------------------------------------------------------- 9. Evaluation
def evaluation_contexts(cfg):
    """The held-out contexts of the suite; nothing else uses their seeds."""
    suite = load_suite(cfg.suite)
    return [Context(task, instruction, i, state) for task, instruction in tasks_of(cfg).items()
            for i, state in enumerate(suite.held_out(task, cfg.eval_contexts))]

def training_context(number, tasks, demos, cfg):
    """Of an endless stream: the demonstrations' first scenes, in a new order at each pass, or fresh ones."""
    if demos:
        order = np.random.default_rng([cfg.seed, number // len(demos)]).permutation(len(demos))
        return demos[order[number % len(demos)]].context
    return Context(*tasks[number % len(tasks)], TRAIN_SEEDS * (cfg.seed + 1) + number)

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
        p = binomtest(gained, max(gained + lost, 1)).pvalue
        lines.append(f"paired: {gained} contexts gained, {lost} lost, exact McNemar p = {p:.2g}")
    return "\n".join(lines)

def report(out, contexts, results, policy, workers, cfg):
    """Print the table; write evaluation.csv, every context's outcome, and a video per task."""
    say(table(contexts, results))
    write_csv(out / "evaluation.csv", [
        dict(task=c.task, instruction=c.instruction, context=c.seed) | dict(zip(results, map(int, won)))
        for c, *won in zip(contexts, *results.values())])
    firsts = {context.task: context for context in reversed(contexts)}
    for episode in evaluate(policy, workers, list(firsts.values()), cfg, film=True):
        video = out / f"task{episode.context.task}.mp4"
        write(video, lambda path: imageio.mimwrite(path, episode.frames, fps=20))

# --------------------------------------------------------------------------------------- 10. Bookkeeping
def write(path, writer):
    """Write a file on rank 0, whole or not at all: writer(temporary path), then rename."""
    if RANK == 0:
        temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
        with or_fail(f"cannot write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                writer(temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

def write_csv(path, rows):
    """Dicts as a table, with a column for every key of any."""
    text, keys = io.StringIO(), list(dict.fromkeys(key for row in rows for key in row))
    table = csv.DictWriter(text, keys, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write(path, lambda temporary: temporary.write_text(text.getvalue()))

def write_metrics(out, history):
    """metrics.jsonl, metrics.csv and curve.png of all iterations so far."""
    lines = "".join(json.dumps(row) + "\n" for row in history)
    write(out / "metrics.jsonl", lambda path: path.write_text(lines))
    write_csv(out / "metrics.csv", history)
    figure = Figure(figsize=(7, 7))
    panels = ("eval_success", "rollout_success"), ("rejected",), ("seconds_rollouts", "seconds_update")
    for axes, names in zip(figure.subplots(len(panels), sharex=True), panels):
        for name in names:
            rows = [row for row in history if name in row]
            axes.plot([row["iteration"] for row in rows], [row[name] for row in rows], "o-", label=name)
        axes.set(xlabel="iteration", ylim=(0, None))
        axes.legend()
    write(out / "curve.png", lambda path: figure.savefig(path, bbox_inches="tight"))

def save_run(out, policy, optimizer, run, stats):
    """End an iteration: print and keep its numbers; last/ and best/ to use, run.pt for --resume."""
    row = dict(iteration=run["iteration"]) | stats | dict(
        memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20,
        gpu_gb=torch.cuda.max_memory_allocated() / 2 ** 30)
    row = {name: value if isinstance(value, int) else float(value) for name, value in row.items()}
    say("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    run["history"].append(row)
    policy.save(out / "last")
    if row.get("eval_success", -1) > run["best"]:
        run["best"] = row["eval_success"]
        policy.save(out / "best")
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    state = dict(run, policy=trained, optimizer=optimizer.state_dict())
    write(out / "run.pt", lambda path: torch.save(state, path))
    write_metrics(out, run["history"])

def load_run(out, policy, optimizer):
    """What save_run wrote: fills policy and optimizer, -> the run."""
    with or_fail(f"cannot resume from {out / 'run.pt'}"):
        if zipfile.ZipFile(out / "run.pt").testzip():  # torch does not look
            raise ValueError("a checksum is wrong")
        run = torch.load(out / "run.pt", map_location="cpu", weights_only=True)
        policy.load_state_dict(run.pop("policy"), strict=False)
        optimizer.load_state_dict(run.pop("optimizer"))
    return run

# --------------------------------------------------------------------------------------------- 11. Main
def check(cfg):
    """What can be known to go wrong, before any long work starts."""
    least = dict(rollouts=2, image_size=16, task=-1, seed=0, iterations=0, sft_steps=0, scale_steps=0,
                 max_rejected=0, act_batch=0, eval_every=0, momentum=0)
    for name, value in asdict(cfg).items():
        if name in least:
            require(value >= least[name], f"--{name} must be at least {least[name]}, got {value}")
        elif type(value) in (int, float):
            require(0 < value < math.inf, f"--{name} must be a number above 0, got {value}")
    require(cfg.momentum < 1, f"--momentum must be below 1, got {cfg.momentum}")
    require(cfg.model != "tiny" or not (cfg.adapter or cfg.scale_head),
            "--adapter and --scale_head are not for --model tiny")
    require(not cfg.demos or cfg.suite in LIBERO, f"{cfg.suite} has demonstrations without --demos")
    require(not cfg.eval or cfg.checkpoint or cfg.model != "tiny", "--eval needs --checkpoint DIR")
    require(not cfg.fit_scale_head or cfg.demos or load_suite(cfg.suite).scripted,
            "--fit_scale_head needs --demos DIR, LIBERO's HDF5 files")
    require(mujoco.__version__ == MUJOCO, f"MuJoCo must be {MUJOCO}: pip install mujoco=={MUJOCO}")
    with or_fail(f"--device {cfg.device} cannot be used"):
        torch.empty(0, device=cfg.device)
    with or_fail("no headless OpenGL (on Debian, apt-get install libegl1 libgl1-mesa-dri)"):
        mujoco.GLContext(16, 16).free()
    if cfg.suite in LIBERO:
        from libero.libero import get_libero_path
        require(Path(get_libero_path("assets")).is_dir(), "no meshes of LIBERO: run libero-download-assets")

def supervise(policy, workers, demos, cfg):
    """Stage 2 on LIBERO's demonstrations or the scripted expert's: SFT, then the scale head."""
    fits_scale = cfg.fit_scale_head or cfg.scale_steps and not (cfg.scale_head or cfg.adapter)
    if not (cfg.sft_steps or fits_scale):
        return
    if not demos and load_suite(cfg.suite).scripted:
        demos = load_suite(cfg.suite).scripted(workers, cfg)
    if not demos:
        return say(f"no stage 2: no demonstrations of {cfg.suite}, --demos DIR gives LIBERO's HDF5 files")
    if cfg.model == "tiny" and not cfg.checkpoint:
        records = [record for demo in demos for record in demo.records]
        found = dict(proprio=[policy.preprocess(record["look"]())["proprio"] for record in records],
                     action=[record["label"] for record in records])
        for kind in load_suite(cfg.suite).MEASURED:
            bounds = np.quantile(found[kind], (0.01, 0.99), 0).tolist()
            policy.arch.statistics[kind] = dict(zip(("q01", "q99"), bounds))
    if cfg.sft_steps:
        say(f"SFT on {len(demos)} demonstrations: L1 {sft(policy, demos, cfg):.4f}")
    if fits_scale:
        say(f"scale head: NLL {fit_scale_head(policy, demos, cfg):.2f} per action step")

@errors.record  # so that torchrun's last words are the traceback of the rank that failed
def main(argv=None):
    """Stage 2, then Algorithm 1 with a line per iteration, between two evaluations on the same contexts."""
    cfg = parse_config(sys.argv[1:] if argv is None else argv)
    check(cfg)
    out, tasks = Path(cfg.out), list(tasks_of(cfg).items())
    join(cfg.device)
    torch.manual_seed(cfg.seed)
    resumed = cfg.resume and (out / "run.pt").exists()  # a run stopped before that starts again
    policy = load_model(cfg.model).load(cfg, out / "sft" if resumed else "")
    demos = libero_demonstrations(cfg) if cfg.demos else []
    write(out / "config.json", lambda path: path.write_text(json.dumps(asdict(cfg), indent=1)))
    workers = [Worker(cfg, tasks[i % len(tasks)][0]) for i in range(cfg.workers)]
    held_out = evaluation_contexts(cfg)
    success = lambda: [episode.success for episode in evaluate(policy, workers, held_out, cfg)]
    if cfg.eval:
        return report(out, held_out, dict(success=success()), policy, workers, cfg)
    context_of = lambda number: training_context(number, tasks, demos, cfg)
    if not resumed:
        if RANK == 0:
            supervise(policy, workers, demos, cfg)
        share(policy)
        policy.save(out / "sft")
    if cfg.fit_scale_head:
        return
    optimizer = torch.optim.AdamW(policy.trainable("ript"), cfg.lr, (cfg.momentum, 0.999))
    if resumed:
        run = load_run(out, policy, optimizer)
    else:
        run = dict(iteration=0, group=0, skip=[], best=-1.0, history=[], results=dict(SFT=success()))
        save_run(out, policy, optimizer, run, dict(eval_success=np.mean(run["results"]["SFT"])))
    say(table(held_out, dict(SFT=run["results"]["SFT"])))
    while run["iteration"] < cfg.iterations:
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * (1 - cfg.anneal * run["iteration"] / cfg.iterations)
        episodes, rewards, stats = collect(policy, workers, context_of, run, cfg)  # lines 4-14
        if episodes:
            stats |= update(policy, optimizer, episodes, rewards, cfg, run)  # lines 15-17
        run["iteration"] += 1
        if run["iteration"] == cfg.iterations or cfg.eval_every and run["iteration"] % cfg.eval_every == 0:
            run["results"]["RIPT"] = success()
            stats["eval_success"] = np.mean(run["results"]["RIPT"])
        save_run(out, policy, optimizer, run, stats)
    if "eval_success" not in run["history"][-1]:  # resumed with --iterations that it has already
        run["results"]["RIPT"] = success()
    report(out, held_out, run["results"], policy, workers, cfg)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once, as on SIGTERM: no file is ever half written
    main()
    if WORLD > 1:  # not after an error, when the other ranks may never answer
        distributed.barrier()  # a rank that ends early would be taken for dead
        distributed.destroy_process_group()
