"""RIPT-VLA in one file: reinforcement post-training of vision-language-action policies (arXiv 2505.17016).

Stage 1 pretrains a policy on many demonstrations and stage 2 fine-tunes it on a few of the task (SFT). Stage 3,
implemented here, lets it act: a rollout succeeds or it does not, and the policy learns from that bit alone.

    Algorithm 1   repeat M times:
      1-3           freeze the sampling policy: psi <- theta
      4-6           until B rollouts are kept: draw a context c, draw K rollouts from psi, reward each with R in {0, 1}
      7-10          A_k = R_k - mean of the other K - 1 rewards                                             (Eq. 5)
      11-14         if every A_k is zero, reject the group and draw another context; otherwise keep it
      15-17         N passes of minibatches over the kept rollouts, minimising                              (Eq. 6)
                    -min(r A, clip(r, 1 - eps, 1 + eps) A),  r = pi_theta(a | o) / pi_psi(a | o)

Departures. From the paper: initial states are drawn from the task itself unless --demos gives the demonstrations'.
From the released code: an action is scored with the very density it was drawn from, in float32; the steps of a chunk
that came after success do not count; minibatch borders leave no gradient over; the K rollouts of a group share one
scene, because the simulator is seeded anew at every episode; pictures are drawn only when the policy looks.

    python ript.py                                             the laptop: MuJoCo, two cores, ten minutes, no download
    python ript.py --suite libero_object --task 0              the same small policy in LIBERO
    python ript.py --eval --checkpoint runs/X/best             evaluate what a run has saved
    python ript.py --help                                      every setting

Shapes: B batch, C contexts, K rollouts, E episodes, S steps, H action steps per query, A action dimensions, D width.
"""
import os
for _name, _value in dict(MUJOCO_GL="egl", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0").items():
    os.environ.setdefault(_name, _value)  # before the first import of mujoco and of OpenMP; children inherit them

import csv
import dataclasses
import io
import json
import logging
import math
import multiprocessing
import sys
import time
import traceback
from collections import deque
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache, HfArgumentParser, LlamaConfig, LlamaForCausalLM


# ------------------------------------------------------------------------------------------- 1. Configuration
def option(default, text):
    """A field of Config: its default, and the line that --help prints."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Every setting. A preset of (model, suite) overrides the dataclass, the command line overrides both."""
    model: str = option("tiny", "policy: tiny (OpenVLA-OFT at laptop size)")
    suite: str = option("tabletop", "tabletop, tabletop_pretrain, libero_{spatial,object,goal,10,long,90}")
    task: int = option(-1, "train and evaluate this task of the suite alone; -1: all of them")
    checkpoint: str = option("", "directory of the policy to start from; empty: random weights")
    out: str = option("runs/latest", "output directory: config, metrics, curve, videos, checkpoints")
    resume: str = option("", "output directory of a run to continue after its last complete iteration")
    eval: bool = option(False, "evaluate --checkpoint and stop")
    demos: str = option("", "directory of LIBERO's HDF5 demonstrations: for SFT, and as the contexts D_context")
    seed: int = option(0, "seed of demonstrations, contexts, exploration and minibatches")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "torch device of the policy")
    # Stage 2: supervision
    demos_per_task: int = option(10, "demonstrations per task; scripted unless --demos is given")
    demo_noise: float = option(0.3, "noise on a scripted demonstration's motion (labels stay clean), in action units")
    sft_steps: int = option(0, "steps of supervised fine-tuning (L1 loss); 0: none")
    sft_lr: float = option(1e-3, "learning rate of SFT, with warm-up and cosine decay")
    sft_batch: int = option(64, "action chunks per step of SFT and of the scale head's fit")
    scale_steps: int = option(500, "steps of the Laplace scale head's fit (NLL, everything else frozen); 0: none")
    # Stage 3: RIPT
    iterations: int = option(12, "outer steps, M")
    groups: int = option(24, "contexts whose rollouts are kept per iteration, B / K")
    rollouts: int = option(8, "rollouts per context, K")
    max_rejected: int = option(48, "rejected groups after which an iteration goes on with what it has")
    passes: int = option(1, "passes over the kept rollouts, N")
    minibatch: int = option(16, "episodes per optimiser step, over all processes")
    micro_batch: int = option(64, "action chunks per forward and backward pass: memory, not mathematics")
    clip: float = option(0.1, "PPO's clip range, eps")
    loss_per: str = option("episode", "normaliser of the loss: episode or token")
    lr: float = option(5e-5, "learning rate (AdamW)")
    warmup: int = option(0, "optimiser steps over which the learning rate rises")
    weight_decay: float = option(1e-4, "weight decay (AdamW)")
    max_grad_norm: float = option(1.0, "gradient norm is clipped here")
    target_kl: float = option(math.inf, "no further pass once approx_kl has passed this")
    scale_multiplier: float = option(1.0, "exploration: factor on the Laplace scale b, in the density throughout")
    # Evaluation
    eval_contexts: int = option(50, "held-out contexts per task (LIBERO: its stored states, at most 50)")
    eval_every: int = option(5, "iterations between evaluations; 0: only before and after")
    # Simulation
    workers: int = option(min(os.cpu_count() or 1, 16), "simulator processes")
    image_size: int = option(256, "height and width of the two pictures, pixels")
    collision: bool = option(False, "draw collision meshes in plain colours: fast without a GPU")
    act_batch: int = option(0, "observations per forward when acting; 1: results do not depend on workers; 0: all")


TINY = dict(image_size=64, collision=True, act_batch=1)
TABLETOP = dict(TINY, demo_noise=0.3)
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("tiny", "tabletop_pretrain"): dict(TABLETOP, demos_per_task=150, sft_steps=2000, iterations=0, scale_steps=0),
    ("tiny", "tabletop"): dict(TABLETOP, checkpoint=str(Path(__file__).parent / "assets" / "tabletop"),
                               demos_per_task=3, sft_steps=100, sft_lr=1e-4, iterations=15, groups=16, passes=3,
                               minibatch=64, micro_batch=256, clip=0.2, lr=1.5e-4, warmup=12, target_kl=0.1),
}
LIBERO = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
HORIZON = dict(zip(LIBERO, (220, 280, 300, 520, 400)), tabletop=40, tabletop_pretrain=40)  # control steps
SETTLE = 10  # control steps that LIBERO's objects get to come to rest
MUJOCO = "3.3.2"  # another one draws darker pictures (3.3.3) or breaks a stored initial state (3.4.0)


class UserError(Exception):
    """A mistake that its message explains: printed as one sentence, exit status 2."""


def parse_config(argv) -> Config:
    """Dataclass < preset < command line."""
    class Parser(HfArgumentParser):
        def error(self, message):
            raise UserError(f"{message} (see python ript.py --help)")

    parser = Parser(Config, description=__doc__, allow_abbrev=False)
    names, _ = parser.parse_known_args(argv)
    suite = "libero_10" if names.suite == "libero_long" else names.suite
    if suite not in HORIZON:
        raise UserError(f"unknown suite {suite!r}: choose from {', '.join(HORIZON)}, libero_long")
    if names.model not in ("tiny",):
        raise UserError(f"unknown model {names.model!r}: choose from tiny")
    parser.set_defaults(**PRESETS.get((names.model, suite), TINY))
    return dataclasses.replace(Config(**vars(parser.parse_args(argv))), suite=suite)


# -------------------------------------------------------------------------------------------- 2. The algorithm
def leave_one_out_advantage(rewards):
    """A_k = R_k - mean of the other K - 1 rewards of the same context (Eq. 5): (C, K) -> (C, K).

    Raises ValueError for K < 2: a rollout alone has no baseline.
    """
    K = rewards.shape[-1]
    if K < 2:
        raise ValueError(f"leave_one_out_advantage needs K >= 2 rollouts per context, got {K}")
    return rewards - (rewards.sum(-1, keepdim=True) - rewards) / (K - 1)


def has_signal(rewards):
    """The rejection rule (Algorithm 1, lines 11-14): (C, K) -> (C,) bool, False where all K rewards are equal."""
    return (rewards != rewards[:, :1]).any(-1)


def laplace_log_prob(action, mean, log_scale):
    """Log-density of a factorised Laplace: (..., A) each -> (...), summed over A, in float32 whatever comes in.

    log p = sum over A of -|action - mean| / b - log(2 b),  b = exp(log_scale). All in normalised action units.
    """
    action, mean, log_scale = action.float(), mean.float(), log_scale.float()
    return (-(action - mean).abs() * torch.exp(-log_scale) - log_scale - math.log(2)).sum(-1)


def ppo_clip_loss(log_prob, old_log_prob, advantage, mask, clip=0.2, per="episode"):
    """PPO's clipped objective, negated (Eq. 6), one ratio per executed action step (Eq. 8 sums their logs).

    log_prob, old_log_prob (E, S); advantage (E,); mask (E, S) bool, False where no action was executed; clip: eps, or
    a pair (low, high) for [1 - low, 1 + high]. per="episode": mean over the steps of an episode, then over episodes;
    per="token": mean over all steps. Returns the loss (scalar) and dict(ratio, clip_frac, approx_kl), means over steps.
    """
    if per not in ("episode", "token"):
        raise ValueError(f"per must be 'episode' or 'token', got {per!r}")
    low, high = clip if isinstance(clip, (tuple, list)) else (clip, clip)
    log_ratio = torch.where(mask, log_prob - old_log_prob, 0.0)  # E S: a step that is masked out has ratio 1
    ratio, gain = log_ratio.exp(), advantage[:, None]
    objective = torch.minimum(ratio * gain, ratio.clamp(1 - low, 1 + high) * gain)  # E S
    steps = mask.sum(-1, keepdim=True) if per == "episode" else mask.sum()
    weight = mask / steps.clamp(min=1) / (len(mask) if per == "episode" else 1)  # E S, sums to one
    with torch.no_grad():
        mean = lambda x: (x * mask).sum() / mask.sum().clamp(min=1)
        stats = dict(ratio=mean(ratio), clip_frac=mean(((ratio < 1 - low) | (ratio > 1 + high)).float()),
                     approx_kl=mean(ratio - 1 - log_ratio))  # Schulman's k3: unbiased, never negative
    return -(objective * weight).sum(), stats


# ------------------------------------------------------------------------------------------------ 3. Policies
# A policy is any class with preprocess, act, log_prob, sft_loss, scale_loss, trainable, save and load as below.
class Tower(nn.Module):
    """A vision transformer with timm's names (DINOv2 and SigLIP): pictures (B, 3, h, w) -> patches (B, P, dim).

    Reads block depth - 2 without the final norm, as OpenVLA does: the last block and norm are never built.
    """
    def __init__(self, dim, depth, heads, mlp_ratio=4.0, prefix=0, layer_scale=False, image_size=224, patch=14):
        super().__init__()
        self.prefix, patches = prefix, (image_size // patch) ** 2
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, dim, patch, patch)))
        self.pos_embed = nn.Parameter(torch.randn(1, patches, dim) * 0.02)
        if prefix:  # one class token and register tokens, which get no position
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.reg_token = nn.Parameter(torch.zeros(1, prefix - 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, layer_scale) for _ in range(depth - 1))

    def forward(self, pictures):
        x = self.patch_embed["proj"](pictures).flatten(2).mT + self.pos_embed  # B P D
        if self.prefix:
            x = torch.cat([t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token)] + [x], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, self.prefix:]


class Block(nn.Module):
    """A pre-norm transformer block of timm: LayerNorm eps 1e-6, exact GELU, optional LayerScale."""
    def __init__(self, dim, heads, mlp_ratio, layer_scale):
        super().__init__()
        self.heads, hidden = heads, int(dim * mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, hidden), fc2=nn.Linear(hidden, dim)))
        for name in ("ls1", "ls2") if layer_scale else ():
            self.add_module(name, nn.ParameterDict(dict(scale_factor=nn.Parameter(torch.ones(dim)))))
        self.layer_scale = layer_scale

    def forward(self, x):
        B, P, D = x.shape
        q, k, v = self.attn["qkv"](self.norm1(x)).view(B, P, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, P, D))
        x = x + (y * self.ls1["scale_factor"] if self.layer_scale else y)
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + (y * self.ls2["scale_factor"] if self.layer_scale else y)


class Keypoints(nn.Module):
    """A stem that learns to see in minutes: convolutions, then where each channel looks: (B, 3, h, w) -> (B, 1, dim)."""
    def __init__(self, dim, keypoints=16):
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
                                          nn.Conv2d(32, keypoints, 1))
        self.read = nn.Linear(2 * keypoints, dim)

    def forward(self, pictures):
        heat = self.convolutions(pictures)
        h, w = heat.shape[-2:]
        rows, columns = torch.linspace(-1, 1, h, device=heat.device), torch.linspace(-1, 1, w, device=heat.device)
        grid = torch.cartesian_prod(rows, columns).to(heat.dtype)  # hw 2
        return self.read((heat.flatten(2).softmax(-1) @ grid).flatten(1))[:, None]  # spatial softmax: expected positions


class MLP(nn.Module):
    """Linear layers fc1, fc2, ... with exact GELU between them: the projectors of OpenVLA-OFT."""
    def __init__(self, *widths):
        super().__init__()
        for i, (wide, next_wide) in enumerate(zip(widths, widths[1:]), 1):
            self.add_module(f"fc{i}", nn.Linear(wide, next_wide))

    def forward(self, x):
        for i, layer in enumerate(self.children()):
            x = layer(F.gelu(x) if i else x)
        return x


class MLPResNet(nn.Module):
    """OpenVLA-OFT's head: LayerNorm, Linear, ReLU, two residual blocks, LayerNorm, Linear: (B, H, A * D) -> (B, H, out)."""
    def __init__(self, wide, hidden, out):
        super().__init__()
        self.layer_norm1, self.fc1 = nn.LayerNorm(wide), nn.Linear(wide, hidden)
        self.mlp_resnet_blocks = nn.ModuleList(
            nn.ModuleDict(dict(ffn=nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.ReLU())))
            for _ in range(2))
        self.layer_norm2, self.fc2 = nn.LayerNorm(hidden), nn.Linear(hidden, out)

    def forward(self, x):
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = x + block["ffn"](x)
        return self.fc2(self.layer_norm2(x))


@dataclass
class Architecture:
    """The sizes of an OpenVLAOFT, kept in its config.json. The defaults are the laptop's: 0.35M parameters."""
    towers: tuple = (dict(dim=48), dict(dim=48))  # arguments of Keypoints, or of Tower where depth is among them
    llm: dict = field(default_factory=lambda: dict(
        vocab_size=259, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4))
    prompt: str = "{}"  # the instruction goes in the braces
    whole_gradient: bool = True  # False: gradient through the last positions only, as the 7B trains
    log_scale_range: tuple = (math.log(0.1), math.log(0.2))  # clamp of log b, normalised action units
    actions: int = 8  # action steps per query, H
    statistics: dict = field(default_factory=dict)  # q01 and q99 of action and proprio, as in dataset_statistics.json


class OpenVLAOFT(nn.Module):
    """OpenVLA-OFT with a Laplace scale head: two vision towers, Llama with bidirectional attention, L1 head.

    One class for the 7B and for the laptop; its module names are those of the released checkpoints. Sequence:
    BOS | patches of each camera | proprio | padding, prompt, space | 7 H zeros | stop. Heads read the final hidden
    state of the space and of the first 7 H - 1 zeros (each predicts its successor).
    """
    ACTION_DIM, BOS, STOP = 7, 1, 2

    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch, D = arch, arch.llm["hidden_size"]
        build = lambda tower: Tower(**tower) if "depth" in tower else Keypoints(**tower)
        self.vision_backbone = nn.ModuleDict(dict(zip(("featurizer", "fused_featurizer"), map(build, arch.towers))))
        wide = sum(tower["dim"] for tower in arch.towers)
        self.projector = MLP(wide, 4 * wide, D, D)
        self.proprio_projector = MLP(8, D, D)
        self.language_model = LlamaForCausalLM(LlamaConfig(**arch.llm, tie_word_embeddings=False))
        self.language_model.lm_head = nn.Identity()  # actions do not come from the vocabulary
        self.action_head = nn.ModuleDict(dict(model=MLPResNet(self.ACTION_DIM * D, D, self.ACTION_DIM)))
        self.scale_head = nn.ModuleDict(dict(trunk=MLPResNet(self.ACTION_DIM * D, D, D),
                                             log_b_head=nn.Linear(D, self.ACTION_DIM)))
        nn.init.xavier_uniform_(self.scale_head["log_b_head"].weight, gain=0.01)
        nn.init.constant_(self.scale_head["log_b_head"].bias, -3.0)
        self.scale_multiplier = 1.0
        self.eval()  # for good: rollouts, old and new log-probabilities must come from one function

    # -- observations and actions
    def preprocess(self, raw):
        """The simulator's arrays -> the compact observation that an episode stores: pictures (V, h, w, 3), proprio (8,)."""
        pictures = np.stack([raw[f"{camera}_image"][::-1, ::-1] for camera in ("agentview", "robot0_eye_in_hand")])
        x, y, z, w = raw["robot0_eef_quat"]
        w = np.clip(w, -1.0, 1.0)
        norm = math.sqrt(1 - w * w)
        axis_angle = np.array([x, y, z]) * (2 * math.acos(w) / norm if norm > 1e-8 else 0.0)
        proprio = np.concatenate([raw["robot0_eef_pos"], axis_angle, raw["robot0_gripper_qpos"]])
        return dict(pictures=pictures, proprio=proprio)

    def fit_statistics(self, proprio):
        """Bounds of proprio (N, 8) from demonstrations; actions keep the controller's own [-1, 1]."""
        ones = np.ones(self.ACTION_DIM)
        self.arch.statistics = dict(action=dict(q01=(-ones).tolist(), q99=ones.tolist()), proprio=dict(
            q01=np.quantile(proprio, 0.01, 0).tolist(), q99=np.quantile(proprio, 0.99, 0).tolist()))

    def _bounds(self, kind):
        low, high = (np.asarray(self.arch.statistics[kind][q]) for q in ("q01", "q99"))
        return low, high - low + 1e-8

    def to_env_actions(self, normalised):
        """(..., 7) in the head's units -> the environment's: un-normalised motion, gripper -1 open or +1 closed."""
        low, width = self._bounds("action")
        actions = 0.5 * (np.asarray(normalised, np.float64) + 1) * width + low
        actions[..., 6] = -np.sign(2 * np.asarray(normalised, np.float64)[..., 6] - 1)
        return actions

    def from_env_actions(self, actions):
        """The inverse of to_env_actions, for the labels of imitation."""
        low, width = self._bounds("action")
        normalised = 2 * (np.asarray(actions, np.float64) - low) / width - 1
        normalised[..., 6] = (1 - np.sign(actions[..., 6])) / 2
        return normalised

    # -- the forward pass
    def _embed(self, observations, instructions):
        """-> embeddings (B, S, D), mask (B, 1, S, S) and position ids (B, S) of the whole sequence."""
        model, device = self.language_model.model, self.action_head["model"].fc1.weight.device
        dtype = model.embed_tokens.weight.dtype
        pictures = torch.as_tensor(np.stack([o["pictures"] for o in observations]), device=device)  # B V h w 3
        B, V = pictures.shape[:2]
        pixels = (pictures.flatten(0, 1).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1)  # BV 3 h w
        towers = [self.vision_backbone[name](pixels) for name in ("featurizer", "fused_featurizer")]
        patches = self.projector(torch.cat(towers, -1)).unflatten(0, (B, V)).flatten(1, 2)  # B VP D
        low, width = self._bounds("proprio")
        proprio = np.clip(2 * (np.stack([o["proprio"] for o in observations]) - low) / width - 1, -1, 1)
        proprio = self.proprio_projector(torch.as_tensor(proprio, device=device).to(dtype))[:, None]
        prompts = [[byte + 3 for byte in self.arch.prompt.format(i.lower()).encode()] + [35] for i in instructions]
        longest = max(map(len, prompts))
        ids = torch.tensor([[self.BOS] + [0] * (longest - len(p)) + p + [self.STOP] for p in prompts], device=device)
        words = model.embed_tokens(ids)
        zeros = words.new_zeros(B, self.ACTION_DIM * self.arch.actions, words.shape[-1])
        x = torch.cat([words[:, :1], patches, proprio, words[:, 1:-1], zeros, words[:, -1:]], 1)  # B S D
        before = 1 + patches.shape[1] + 1 + longest - torch.tensor([len(p) for p in prompts], device=device)[:, None]
        index = torch.arange(x.shape[1], device=device)
        real = (index < 2 + patches.shape[1]) | (index >= before)  # B S: False for the padding before a short prompt
        return x, real[:, None, None].expand(-1, 1, x.shape[1], -1), real.cumsum(-1) - 1

    def _hidden(self, observations, instructions):
        """Final hidden states that the heads read: (B, 7 H, D). With a short gradient, the prefix comes from a cache."""
        last = self.ACTION_DIM * self.arch.actions + 2  # the space, the zeros, the stop token
        llama, short = self.language_model.model, torch.is_grad_enabled() and not self.arch.whole_gradient
        with torch.set_grad_enabled(torch.is_grad_enabled() and not short):
            x, mask, positions = self._embed(observations, instructions)
            cache = DynamicCache(config=llama.config) if short else None
            hidden = llama(inputs_embeds=x, attention_mask=mask, position_ids=positions, past_key_values=cache,
                           use_cache=short).last_hidden_state
        if short:  # keys and values of the prefix, which has seen the zeros, stay; the last positions run again
            cache.crop(-last)
            hidden = llama(inputs_embeds=x[:, -last:], attention_mask=mask[:, :, -last:], use_cache=True,
                           position_ids=positions[:, -last:], past_key_values=cache).last_hidden_state
        return hidden[:, -last:-2]

    def _heads(self, hidden):
        B, H = len(hidden), self.arch.actions
        rows = hidden.reshape(B, H, -1)  # B H 7D
        return self.action_head["model"](rows).float(), self.scale_head["log_b_head"](self.scale_head["trunk"](rows)).float()

    def predict(self, observations, instructions):
        """-> mean and log_scale, (B, H, 7) each, normalised, float32."""
        return self._heads(self._hidden(observations, instructions))

    def _density(self, observations, instructions):
        """Mean and log b of the density that actions are drawn from and scored with."""
        mean, log_scale = self.predict(observations, instructions)
        return mean, log_scale.clamp(*self.arch.log_scale_range) + math.log(self.scale_multiplier)

    # -- the protocol
    @torch.no_grad()
    def act(self, observations, instructions, explore=None):
        """One record per observation: its actions (H, 7) for the environment and what log_prob needs.

        explore: a numpy Generator per observation that draws from the policy's density; None takes the mean.
        """
        mean, log_scale = self._density(observations, instructions)
        noise = torch.zeros_like(mean)
        if explore is not None:
            noise = torch.as_tensor(np.stack([g.laplace(size=mean.shape[1:]) for g in explore])).to(mean)
        sample = mean + noise * log_scale.exp()
        log_prob = laplace_log_prob(sample, mean, log_scale)  # B H
        return [dict(observation=o, instruction=i, sample=s, log_prob=p, scale=b, actions=self.to_env_actions(s))
                for o, i, s, p, b in zip(observations, instructions, sample.cpu().numpy(), log_prob.cpu().numpy(),
                                         log_scale.exp().mean((1, 2)).tolist())]

    def log_prob(self, records):
        """Log-probability of every action step of the records' chunks, with gradient: (B, H)."""
        mean, log_scale = self._density(*([r[key] for r in records] for key in ("observation", "instruction")))
        return laplace_log_prob(torch.as_tensor(np.stack([r["sample"] for r in records])).to(mean), mean, log_scale)

    def sft_loss(self, observations, instructions, actions):
        """L1 between the mean and demonstrated chunks (B, H, 7) in environment units."""
        mean, _ = self.predict(observations, instructions)
        return F.l1_loss(mean, torch.as_tensor(self.from_env_actions(actions)).to(mean))

    def scale_loss(self, observations, instructions, actions):
        """Negative log-likelihood of demonstrated chunks under the Laplace, with gradient for the scale head alone."""
        with torch.no_grad():
            hidden = self._hidden(observations, instructions)
        mean, log_scale = self._heads(hidden)
        return -laplace_log_prob(torch.as_tensor(self.from_env_actions(actions)).to(mean), mean.detach(), log_scale).mean()

    def trainable(self):
        """Named parameters of stage 3: all but the scale head, which keeps the exploration it was fitted to."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("scale_head")}

    def save(self, directory):
        """Write config.json and model.safetensors, each under a temporary name first."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach().cpu().contiguous() for name, p in self.state_dict().items()}
        write(Path(directory) / "model.safetensors", lambda path: save_file(weights, path))
        write(Path(directory) / "config.json", lambda path: path.write_text(json.dumps(dataclasses.asdict(self.arch))))

    @classmethod
    def load(cls, directory):
        """Read what save wrote, strictly. Raises UserError for a directory that does not hold it."""
        try:
            policy = cls(Architecture(**json.loads((Path(directory) / "config.json").read_text())))
            policy.load_state_dict(load_file(Path(directory) / "model.safetensors"))
        except Exception as error:  # whatever a damaged file makes json, safetensors or torch say
            raise UserError(f"cannot load a policy from {directory}: {str(error).splitlines()[0]}") from error
        return policy


# ----------------------------------------------------------------------------------------------- 4. Simulator
@dataclass
class Context:
    """What fixes the start of an episode: the task, and how to reset to one scene of it."""
    task: int
    instruction: str
    seed: int  # of numpy's global generator, from which reset() places objects and fixtures
    state: Optional[np.ndarray] = None  # flattened simulator state to set after the reset; None: the seed's placement


def instructions_of(suite) -> list[str]:
    """The instructions of a suite, in task order."""
    if suite.startswith("tabletop"):
        return ["lift the red cube", "lift the green cube"]
    with redirect_stdout(io.StringIO()):  # LIBERO tells where it keeps its settings
        from libero.libero.benchmark import task_maps
    return [task.language for task in task_maps[suite].values()]


def stored_states(suite, task) -> np.ndarray:
    """The 50 initial states on which LIBERO evaluates a task: (50, S)."""
    from libero.libero import benchmark, __file__ as package
    chosen = list(benchmark.task_maps[suite].values())[task]
    arrays = [np.core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.float64))]
    with torch.serialization.safe_globals(arrays):
        return torch.load(Path(package).parent / "init_files" / chosen.problem_folder / chosen.init_states_file)


class Simulator:
    """One environment, in a worker process: reset to a context, run a chunk of actions, look."""
    CAMERAS = ("agentview", "robot0_eye_in_hand")
    REST = np.array([0, 0, 0, 0, 0, 0, -1.0])  # the action that does nothing
    # Where the cubes stand, metres from the table's centre; red on the left (y < 0), green on the right
    PLACEMENT = dict(tabletop_pretrain=((-0.06, 0.06), (0.04, 0.16)), tabletop=((0.0, 0.12), (0.04, 0.16)))

    def __init__(self, suite, image_size, collision):
        self.suite, self.image_size, self.collision = suite, image_size, collision
        self.tabletop, self.env, self.task = suite.startswith("tabletop"), None, None

    def build(self, task):
        """Make the environment of a task, unless it is there already (one scene serves both tabletop tasks)."""
        if self.env is not None and (self.tabletop or self.task == task):
            self.task = task
            return
        if self.env is not None:
            self.env.close()  # before the next one exists: EGL contexts do not mind their successors otherwise
        flags = dict(robots=["Panda"], use_camera_obs=False, has_renderer=False, has_offscreen_renderer=True,
                     control_freq=20, ignore_done=True, hard_reset=False, initialization_noise=None,
                     render_collision_mesh=self.collision, render_visual_mesh=not self.collision)
        if self.tabletop:
            import robosuite
            flags["controller_configs"] = robosuite.load_controller_config(default_controller="OSC_POSE")
            self.env = robosuite.make("Stack", **flags)
            self.env.robots[0].init_qpos = np.array([0, 0.548, 0, -2.235, 0, 2.910, 0.785])  # hand 15 cm above
        else:
            with redirect_stdout(io.StringIO()):
                from libero.libero import benchmark, __file__ as package
                from libero.libero.envs.env_wrapper import ControlEnv
            chosen = list(benchmark.task_maps[self.suite].values())[task]
            bddl = Path(package).parent / "bddl_files" / chosen.problem_folder / chosen.bddl_file
            self.env = ControlEnv(bddl_file_name=str(bddl), **flags)
        self.task = task
        if self.collision:
            self.paint()

    def paint(self):
        """Collision meshes have no material: give every object a colour of its own, the cubes the one they are called."""
        model = self.env.sim.model
        colours = dict(cubeA=(0.9, 0.1, 0.1), cubeB=(0.1, 0.8, 0.1), table=(0.45, 0.45, 0.45), floor=(0.45, 0.45, 0.45),
                       gripper0=(0.15, 0.15, 0.2), robot0=(0.75, 0.75, 0.8), mount0=(0.75, 0.75, 0.8))
        for geom in np.flatnonzero(np.asarray(model.geom_group) == 0):
            name = (model.geom_id2name(geom) or "").split("_")[0]
            hue = np.random.default_rng(list(name.encode())).uniform(0.1, 0.9, 3)
            model.geom_rgba[geom] = (*colours.get(name, hue), 1)
        if self.tabletop:
            model.cam_fovy[model.camera_name2id("agentview")] = 35  # degrees: the table fills the picture

    def reset(self, context):
        """Seed, reset, set the state, let it settle, look. In this order at every episode (LIBERO places fixtures by seed)."""
        self.build(context.task)
        np.random.seed(context.seed)
        self.env.reset()
        sim = self.env.sim
        if self.tabletop:
            (x, y), offset = self.PLACEMENT[self.suite], self.env.table_offset
            for cube, side in ((self.env.cubeA, -1), (self.env.cubeB, 1)):
                place = offset + [np.random.uniform(*x), side * np.random.uniform(*y), cube.size[2]]
                sim.data.set_joint_qpos(cube.joints[0], np.concatenate([place, [1, 0, 0, 0]]))
        if context.state is not None:
            sim.set_state_from_flattened(context.state)
        sim.forward()
        for _ in range(0 if self.tabletop else SETTLE):
            self.env.step(self.REST)
        return self.look()

    def look(self):
        """Draw both cameras and read proprioception: the raw observation, by robosuite's names."""
        raw = {f"{camera}_image": self.draw(camera, self.image_size, self.collision) for camera in self.CAMERAS}
        observed = (self.env if self.tabletop else self.env.env)._get_observations(force_update=True)
        return raw | {key: observed[key] for key in ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")}

    def draw(self, camera, size, collision):
        groups = self.env.sim._render_context_offscreen.vopt.geomgroup
        groups[0], groups[1] = collision, not collision
        return self.env.sim.render(camera_name=camera, width=size, height=size)  # upside down, as OpenGL has it

    def success(self):
        """The binary reward: the cube named is 4 cm up (its centre), or LIBERO's goal holds."""
        if self.tabletop:
            body = (self.env.cubeA_body_id, self.env.cubeB_body_id)[self.task]
            return bool(self.env.sim.data.body_xpos[body][2] > self.env.table_offset[2] + 0.04)
        return bool(self.env.check_success())

    def step(self, actions, film=False):
        """Execute actions (n, 7) until success: -> how many were executed, success, observation, pictures of a film."""
        frames = []
        for n, action in enumerate(actions, 1):
            self.env.step(action)
            if film:
                frames.append(self.draw("agentview", 256, False)[::-1])
            if self.success():
                return n, True, None, frames
        return n, False, self.look(), frames

    # -- scripted demonstrations, from privileged object positions
    def expert(self):
        """Actions of a hand that knows where things are: above, down, close, up; in LIBERO on to the basket, and open."""
        sim = self.env.sim
        if self.tabletop:
            body, rest, hover, lift = (self.env.cubeA_body_id, self.env.cubeB_body_id)[self.task], 0.815, 0.89, 0.95
        else:
            body = self.env.env.obj_body_id[self.env.obj_of_interest[0]]
            basket = self.env.env.obj_body_id[self.env.obj_of_interest[1]]
            rest, hover, lift = sim.data.body_xpos[body][2] + 0.01, sim.data.body_xpos[body][2] + 0.12, 0.35
        hand = lambda: sim.data.site_xpos[(self.env if self.tabletop else self.env.env).robots[0].eef_site_id]
        there = lambda x, y, z: np.array([x, y, z])

        def towards(target, gripper):
            return np.concatenate([np.clip(15 * (target - hand()), -1, 1), [0, 0, 0, gripper]])

        above = lambda: np.abs(sim.data.body_xpos[body][:2] - hand()[:2]).max()
        while above() > 0.012 or hand()[2] > rest + 0.012:
            yield towards(there(*sim.data.body_xpos[body][:2], rest if above() < 0.02 else hover), -1)
        grasp = hand().copy()
        for _ in range(5):
            yield towards(grasp, 1)
        while self.tabletop or hand()[2] < lift - 0.02:
            yield towards(there(*grasp[:2], lift), 1)
        goal = sim.data.body_xpos[basket]
        while np.abs(goal[:2] - hand()[:2]).max() > 0.02:
            yield towards(there(*goal[:2], lift), 1)
        while True:
            yield towards(there(*goal[:2], lift), -1)

    def demonstrate(self, context, horizon, noise):
        """One scripted episode: -> raw observations and actions of every step, and whether it succeeded.

        The hand drifts at first and trembles throughout, so that demonstrations show recoveries; labels stay clean.
        """
        rng, observations, actions = np.random.default_rng(context.seed), [self.reset(context)], []
        drift, expert = rng.uniform(-1, 1, 3), self.expert()
        for t in range(horizon):
            actions.append(next(expert))
            moved = actions[-1].copy()
            moved[:3] += noise * rng.standard_normal(3) + (3 * noise * drift if t < 4 else 0)
            _, success, observation, _ = self.step([moved])
            if success:
                return observations, np.array(actions), True
            observations.append(observation)
        return observations[:-1], np.array(actions), False


def worker_main(connection, arguments):
    """A simulator process: answers (method, arguments) with ("ok", result) or ("error", traceback) until told to stop."""
    logging.disable(logging.WARNING)  # robosuite's remarks about its macros
    torch.set_num_threads(1)
    simulator = Simulator(*arguments)
    try:
        while (message := connection.recv()) is not None:
            try:
                connection.send(("ok", getattr(simulator, message[0])(*message[1:])))
            except Exception:
                connection.send(("error", traceback.format_exc()))
    except (EOFError, KeyboardInterrupt):
        pass  # the trainer is gone
    if simulator.env is not None:
        simulator.env.close()  # EGL wants its contexts closed before the interpreter ends


class Worker:
    """The trainer's end of a simulator process."""
    def __init__(self, *arguments):
        context = multiprocessing.get_context("spawn")  # OpenGL and CUDA do not survive a fork
        self.connection, child = context.Pipe()
        self.process = context.Process(target=worker_main, args=(child, arguments), daemon=True)
        self.process.start()
        child.close()
        self.episode = None

    def send(self, method, *arguments):
        self.connection.send((method, *arguments))

    def receive(self):
        status, result = self.connection.recv()
        if status == "error":
            raise RuntimeError(f"a simulator process failed:\n{result}")
        return result

    def close(self):
        self.connection.send(None)
        self.process.join(10)


# ------------------------------------------------------------------------------------------------ 5. Rollouts
@dataclass
class Episode:
    """One rollout: all that the optimiser needs to know of the simulator."""
    context: Context
    group: int = 0
    k: int = 0  # which of the group's K rollouts
    records: list = field(default_factory=list)  # the policy's record of every query
    executed: list = field(default_factory=list)  # how many actions of each record's chunk were executed
    success: bool = False
    frames: list = field(default_factory=list)


def simulate(policy, workers, queue, horizon, explore=None, film=False, act_batch=0):
    """Roll out every Episode of the queue (a deque; the caller may extend it meanwhile), yielding each when it ends.

    Half of the workers simulate while the policy answers the other half; a free worker takes the next of the queue in
    the same round. explore(episode) gives the Generator of the coming query; None acts with the mean.
    """
    while queue or any(w.episode for w in workers):
        for half in (workers[::2], workers[1::2]):
            for w in half:
                if w.episode is not None:
                    n, success, w.observation, frames = w.receive()
                    w.episode.executed.append(n)
                    w.episode.frames += frames
                    if success or sum(w.episode.executed) >= horizon:
                        w.episode.success, done, w.episode = success, w.episode, None
                        yield done
            started = [w for w in half if w.episode is None and queue]
            for w in started:  # prefer an episode of the task whose environment the worker already has
                if not queue:
                    break
                task = getattr(w, "task", None)
                w.episode = next((e for e in queue if e.context.task == task), queue[0])
                w.task = w.episode.context.task
                queue.remove(w.episode)
                w.send("reset", w.episode.context)
            for w in started:
                if w.episode is not None:
                    w.observation = w.receive()
            busy = [w for w in half if w.episode is not None]
            for i in range(0, len(busy), act_batch or len(busy) or 1):
                batch = busy[i:i + (act_batch or len(busy))]
                records = policy.act([policy.preprocess(w.observation) for w in batch],
                                     [w.episode.context.instruction for w in batch],
                                     explore and [explore(w.episode) for w in batch])
                for w, record in zip(batch, records):
                    w.episode.records.append(record)
                    w.send("step", record.pop("actions")[:horizon - sum(w.episode.executed)], film)


def collect(policy, workers, context_of, first, cfg, iteration):
    """Algorithm 1, lines 4-14: -> kept episodes, rewards (C, K) of the kept groups, the next group's number, statistics.

    Groups are numbered. cfg.groups are launched and every rejected one launches the next number, so the kept set is a
    prefix of the numbered stream whatever the timing: quick episodes are not favoured and nothing running is thrown away.
    """
    start, queue, groups, launched = time.time(), deque(), {}, 0

    def launch():
        nonlocal launched
        number = first + launched
        launched += 1
        context = context_of(number)
        queue.extend(Episode(context, number, k) for k in range(cfg.rollouts))

    def explore(episode):
        return np.random.default_rng([cfg.seed, iteration, episode.group, episode.k, len(episode.records)])

    for _ in range(cfg.groups):
        launch()
    kept, rejected = {}, {"solved": 0, "failed": 0}
    bar = tqdm(total=cfg.groups, desc=f"iteration {iteration}", unit="group", leave=False, disable=None)
    for episode in simulate(policy, workers, queue, HORIZON[cfg.suite], explore, act_batch=cfg.act_batch):
        group = groups.setdefault(episode.group, [])
        group.append(episode)
        if len(group) == cfg.rollouts:
            rewards = torch.tensor([[float(e.success) for e in sorted(group, key=lambda e: e.k)]])
            if has_signal(rewards):
                kept[episode.group] = rewards
                bar.update()
            else:
                rejected["solved" if rewards[0, 0] else "failed"] += 1
                if sum(rejected.values()) <= cfg.max_rejected:
                    launch()
    bar.close()
    episodes = [e for number in sorted(kept) for e in sorted(groups[number], key=lambda e: e.k)]
    rewards = torch.cat([kept[n] for n in sorted(kept)]) if kept else torch.zeros(0, cfg.rollouts)
    everything = [e for group in groups.values() for e in group]
    steps = sum(sum(e.executed) for e in everything)
    seconds = time.time() - start
    stats = dict(rollout_success=float(np.mean([e.success for e in everything])), rollouts=len(everything),
                 groups_kept=len(kept), groups_solved=rejected["solved"], groups_failed=rejected["failed"],
                 scale=float(np.mean([r["scale"] for e in everything for r in e.records])), env_steps=steps,
                 seconds_rollouts=seconds, steps_per_second=steps / seconds)
    return episodes, rewards, first + launched, stats


# --------------------------------------------------------------------------------------------- 6. Supervision
@dataclass
class Demonstration:
    """An expert's episode: compact observations and actions (T, 7) of every step."""
    context: Context
    observations: list
    actions: np.ndarray


def scripted_demonstrations(policy, workers, contexts, cfg):
    """Run the scripted expert in every context: -> the successful demonstrations, and their share."""
    demos, pending, contexts = [], deque(), deque(contexts)
    total, bar = len(contexts), tqdm(total=len(contexts), desc="demonstrations", leave=False, disable=None)
    for w in workers:
        w.task = None  # whichever environment comes first
    while contexts or pending:
        for w in workers:
            if contexts and w not in pending:
                w.send("demonstrate", contexts[0], HORIZON[cfg.suite], cfg.demo_noise)
                w.context = contexts.popleft()
                pending.append(w)
        w = pending.popleft()  # answers are taken in order, so the list does not depend on timing
        observations, actions, success = w.receive()
        if success:
            demos.append(Demonstration(w.context, [policy.preprocess(o) for o in observations], actions))
        bar.update()
    bar.close()
    return demos, len(demos) / total


def libero_demonstrations(policy, directory, suite, tasks):
    """LIBERO's HDF5 files (<task>_demo.hdf5) of a directory: -> Demonstrations, whose contexts are row 0 of their states."""
    demos, instructions = [], instructions_of(suite)
    from libero.libero.benchmark import task_maps
    for task in tasks:
        path = Path(directory) / f"{list(task_maps[suite])[task]}_demo.hdf5"
        try:
            with h5py.File(path) as file:
                for name in sorted(file["data"], key=lambda n: int(n.split("_")[1])):
                    demo = file["data"][name]
                    obs, actions, states = demo["obs"], demo["actions"][:], demo["states"][:]
                    columns = [obs[key][:] for key in ("agentview_rgb", "eye_in_hand_rgb", "ee_pos", "ee_ori",
                                                       "gripper_states")]
                    if actions.ndim != 2 or actions.shape[1] != 7 or any(len(c) != len(actions) for c in columns):
                        raise ValueError(f"{name} has actions {actions.shape}")
                    context = Context(task, instructions[task], 0, states[0])
                    raws = [dict(zip(("agentview_image", "robot0_eye_in_hand_image", "robot0_eef_pos", "axis_angle",
                                      "robot0_gripper_qpos"), row)) for row in zip(*columns)]
                    demos.append(Demonstration(context, [policy.preprocess(raw) for raw in raws], actions))
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"cannot read demonstrations from {path}: {error}") from error
    return demos


def chunk_batches(demos, steps, batch, horizon, seed):
    """Yield `steps` random batches: observations, instructions and the next `horizon` actions (B, H, 7), the last repeated."""
    rng = np.random.default_rng([seed, 2])
    index = [(d, t) for d in demos for t in range(len(d.actions))]
    for _ in range(steps):
        picked = [index[i] for i in rng.integers(len(index), size=batch)]
        yield ([d.observations[t] for d, t in picked], [d.context.instruction for d, _ in picked],
               np.stack([d.actions[np.minimum(t + np.arange(horizon), len(d.actions) - 1)] for d, t in picked]))


def fit(loss_of, parameters, batches, steps, lr, title):
    """AdamW on loss_of(batch), with warm-up over a twentieth of the steps and cosine decay: -> mean loss of the last tenth."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / (steps / 20)) * (
        0.5 + 0.5 * math.cos(math.pi * i / steps)))
    losses = []
    for batch in tqdm(batches, total=steps, desc=title, leave=False, disable=None):
        loss = loss_of(*batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    optimizer.zero_grad()
    return float(np.mean(losses[-max(1, steps // 10):]))


def sft(policy, demos, cfg):
    """Stage 2: every weight but the scale head follows the demonstrations' actions (L1 loss)."""
    batches = chunk_batches(demos, cfg.sft_steps, cfg.sft_batch, policy.arch.actions, cfg.seed)
    return fit(policy.sft_loss, list(policy.trainable().values()), batches, cfg.sft_steps, cfg.sft_lr, "SFT")


def fit_scale_head(policy, demos, cfg):
    """The Laplace scale head by NLL on the demonstrations, everything else frozen."""
    batches = chunk_batches(demos, cfg.scale_steps, cfg.sft_batch // 4, policy.arch.actions, cfg.seed)
    return fit(policy.scale_loss, list(policy.scale_head.parameters()), batches, cfg.scale_steps, 1e-3, "scale head")


# -------------------------------------------------------------------------------------------------- 7. Update
def update(policy, optimizer, episodes, rewards, cfg, iteration, steps_done):
    """Algorithm 1, lines 15-17: N passes of minibatches over the kept episodes: -> diagnostics."""
    start, params = time.time(), [p for group in optimizer.param_groups for p in group["params"]]
    advantages = leave_one_out_advantage(rewards).flatten().tolist()
    rng, logs, H = np.random.default_rng([cfg.seed, iteration]), [], policy.arch.actions
    largest, torch_threads = 0.0, torch.get_num_threads()
    for n in range(cfg.passes):
        order = rng.permutation(len(episodes))
        for minibatch in np.array_split(order, math.ceil(len(order) / cfg.minibatch)):
            chunks = [(e, q, i) for i in minibatch for e in [episodes[i]] for q in range(len(e.records))]
            mask = torch.zeros(len(chunks), H, dtype=torch.bool)  # B H
            for row, (e, q, _) in enumerate(chunks):
                mask[row, :e.executed[q]] = True
            # Mean over an episode's steps, then over episodes: the weight of each step, as a factor on its advantage.
            # The loss is linear in the advantage, so micro-batches of chunks add up to the minibatch's gradient.
            total = mask.sum().item()
            weight = torch.tensor([1 / (sum(e.executed) * len(minibatch)) if cfg.loss_per == "episode" else 1 / total
                                   for e, *_ in chunks])
            gain = weight * torch.tensor([advantages[i] for *_, i in chunks])
            old = torch.tensor(np.stack([e.records[q]["log_prob"] for e, q, _ in chunks]))
            for p in params:
                p.grad = None
            log = dict(loss=0.0, ratio=0.0, clip_frac=0.0, approx_kl=0.0)
            for part in torch.arange(len(chunks)).split(cfg.micro_batch):
                records = [chunks[i][0].records[chunks[i][1]] for i in part]
                device = params[0].device
                log_prob, m = policy.log_prob(records), mask[part].to(device)
                loss, stats = ppo_clip_loss(log_prob, old[part].to(device), gain[part].to(device), m, cfg.clip, "token")
                (loss * m.sum()).backward()
                share = m.sum().item() / total
                log["loss"] += (loss * m.sum()).item()
                for key, value in stats.items():
                    log[key] += value.item() * share
                if not logs:  # before the first step the policies are one: any deviation is rounding
                    largest = max(largest, ((log_prob.detach() - old[part].to(device)).exp() - 1)[m].abs().max().item())
            log["grad_norm"] = nn.utils.clip_grad_norm_(params, cfg.max_grad_norm).item()
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1.0, (steps_done + 1) / max(1, cfg.warmup))
            optimizer.step()
            steps_done += 1
            logs.append(log)
        if np.mean([log["approx_kl"] for log in logs[-math.ceil(len(order) / cfg.minibatch):]]) > cfg.target_kl:
            break
    stats = {key: float(np.mean([log[key] for log in logs])) for key in logs[0]}
    return stats | dict(ratio_error=largest, updates=len(logs), seconds_update=time.time() - start), steps_done


# ---------------------------------------------------------------------------------------------- 8. Evaluation
def held_out(cfg, tasks) -> list[Context]:
    """The contexts of evaluation: LIBERO's stored states; for tabletop, seeds below 100,000, which nothing else uses."""
    names, contexts = instructions_of(cfg.suite), []
    for task in tasks:
        states = [None] * cfg.eval_contexts if cfg.suite.startswith("tabletop") else stored_states(cfg.suite, task)
        contexts += [Context(task, names[task], i, state) for i, state in enumerate(states[:cfg.eval_contexts])]
    return contexts


def evaluate(policy, workers, contexts, cfg, film=False):
    """Mean actions in every context: -> the Episodes in the contexts' order."""
    queue = deque(Episode(context, i) for i, context in enumerate(contexts))
    bar = tqdm(total=len(queue), desc="evaluation", leave=False, disable=None)
    done = []
    for episode in simulate(policy, workers, queue, HORIZON[cfg.suite], film=film, act_batch=cfg.act_batch):
        done.append(episode)
        bar.update()
    bar.close()
    return sorted(done, key=lambda e: e.group)


# --------------------------------------------------------------------------------------------- 9. Bookkeeping
def write(path, writer):
    """Write a file whole or not at all: writer(temporary path), then rename."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    writer(temporary)
    os.replace(temporary, path)


def table(title, results):
    """Success per task with Wilson's 95% interval; results: {column: Episodes in one order}. Returns the text."""
    lines = [f"{title:<40}" + "".join(f"{name:>24}" for name in results)]
    first = next(iter(results.values()))
    for row in [*dict.fromkeys(e.context.instruction for e in first), "all tasks"]:
        cells = []
        for episodes in results.values():
            won = [e.success for e in episodes if row in (e.context.instruction, "all tasks")]
            low, high = binomtest(sum(won), len(won)).proportion_ci(method="wilson")
            cells.append(f"{sum(won):>5}/{len(won)} {np.mean(won):5.0%} [{low:.0%}, {high:.0%}]")
        lines.append(f"{row[:40]:<40}" + "".join(f"{c:>24}" for c in cells))
    return "\n".join(lines)


def main(argv=None):
    cfg = parse_config(sys.argv[1:] if argv is None else argv)
    tasks = list(range(len(instructions_of(cfg.suite)))) if cfg.task < 0 else [cfg.task]
    names = instructions_of(cfg.suite)
    out = Path(cfg.out); out.mkdir(parents=True, exist_ok=True)
    log = lambda *a: print(*a, flush=True)
    torch.manual_seed(cfg.seed)
    cores = torch.get_num_threads()
    policy = OpenVLAOFT.load(cfg.checkpoint) if cfg.checkpoint else OpenVLAOFT(Architecture())
    policy.scale_multiplier = cfg.scale_multiplier
    log(sum(p.numel() for p in policy.parameters()), "parameters")
    workers = [Worker(cfg.suite, cfg.image_size, cfg.collision) for _ in range(cfg.workers)]
    for w in workers: w.send("build", tasks[0]); w.task = tasks[0]
    for w in workers: w.receive()
    t = time.time()
    if cfg.sft_steps:
        contexts = [Context(t, names[t], 1_000_000 + 10_000 * cfg.seed + i) for i in range(cfg.demos_per_task) for t in tasks]
        demos, share = scripted_demonstrations(policy, workers, contexts, cfg)
        log(f"demos {len(demos)} {share:.0%} {np.mean([len(d.actions) for d in demos]):.1f} steps {time.time()-t:.0f}s"); t = time.time()
        if not policy.arch.statistics: policy.fit_statistics(np.concatenate([[o["proprio"] for o in d.observations] for d in demos]))
        if cfg.eval_every and cfg.checkpoint:
            log(table("zero-shot", {"x": evaluate(policy, workers, held_out(cfg, tasks), cfg)})); t=time.time()
        log("sft loss", sft(policy, demos, cfg), f"{time.time()-t:.0f}s"); t = time.time()
        if cfg.scale_steps: log("scale nll", fit_scale_head(policy, demos, cfg), f"{time.time()-t:.0f}s"); t = time.time()
        policy.save(out / "sft")
    held = held_out(cfg, tasks)
    before = evaluate(policy, workers, held, cfg)
    log(table("SFT", {"SFT": before}), f"{time.time()-t:.0f}s")
    params = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, weight_decay=cfg.weight_decay)
    context_of = lambda g: Context(tasks[g % len(tasks)], names[tasks[g % len(tasks)]], 10_000_000 * (cfg.seed + 1) + g)
    nxt, steps_done = 0, 0
    for it in range(cfg.iterations):
        torch.set_num_threads(1)
        episodes, rewards, nxt, stats = collect(policy, workers, context_of, nxt, cfg, it)
        torch.set_num_threads(cores)
        if len(rewards):
            more, steps_done = update(policy, optimizer, episodes, rewards, cfg, it, steps_done)
            stats |= more
        log(it + 1, {k: round(v, 4) for k, v in stats.items()})
        if cfg.eval_every and (it + 1) % cfg.eval_every == 0:
            torch.set_num_threads(1)
            log(table("RIPT", {"RIPT": evaluate(policy, workers, held, cfg)}))
            torch.set_num_threads(cores)
    policy.save(out / "last")
    for w in workers: w.close()


if __name__ == "__main__":
    main()
