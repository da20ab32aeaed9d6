"""RIPT for a flow-matching policy: the laptop's arm, with the kind of head that pi0 and SmolVLA have.

    python experiments/flow.py     what runs/flow lacks, a table, and docs/results/flow
    python scripts/sft.py --model experiments/flow.py:Flow --suite tabletop_pretrain    stage 1 alone,
    python scripts/sft.py --model experiments/flow.py:Flow --suite tabletop             stage 2,
    python ript.py --model experiments/flow.py:Flow --suite tabletop                    stage 3

Such a policy makes a chunk of noise into a chunk of actions, x_0 -> x_1 -> ... -> x_T, in T Euler steps of
length d = 1 / T, while the time t falls from 1 to 0. It learns the velocity v(x, t), the mean of noise minus
action where x = (1 - t) action + t noise. What it does with a given noise is certain, and the density of its
actions is unknown: there is no log-probability to make a ratio of.

Flow-SDE (Flow-GRPO, arXiv 2505.05470; pi_RL, arXiv 2510.25889) adds noise to a step and corrects its mean, so
that x has the same distribution as before, up to terms that vanish with d. The step is then a Gaussian:

    clean = x - t v,  noise = x + (1 - t) v           what the velocity says of both ends of the path
    mean  = (1 - t + d) clean + (t - d - s^2 d / 2t) noise
    std   = s sqrt(d),  s = a sqrt(t / (1 - t))

Noise in the last step only (Flow) leaves a policy for which all of ript.py holds as it is: given x_{T-1}, the
action steps of a chunk are independent, so each has its own log-probability, and those after success are
masked. Noise in every step (FlowAll) reaches all action steps through the steps to come: none may be masked.
Evaluation adds none, and starts from noise that the observation decides.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
import math
import zlib

import numpy as np
import torch
from torch import nn

import ript
from experiments.common import (PRETRAINED, RESULTS, RUNS, SUCCESS, curve_of, plot_curves, print_header,
                                print_row, run_once, write_csv)
from policies.pi0 import gaussian_log_prob, sde_step
from policies.tiny import Tiny
from scripts import report
from simulators.tabletop import Tabletop, TabletopPretrain

class FlowHead(nn.Module):
    """The velocity: features (B, H, F), noisy chunks (B, H, A) and their times (B,) -> (B, H, A)."""
    COSINES = 8  # of the time

    def __init__(self, features, chunk, actions, width=192):
        super().__init__()
        # The features alone are normalised: with them, the noisy actions would lose their scale.
        self.norm = nn.LayerNorm(features)
        self.read = nn.Linear(features + chunk * actions + self.COSINES, width)
        self.think = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, actions))

    def forward(self, features, chunk, time):
        waves = torch.cos(math.pi * time[:, None] * torch.arange(self.COSINES).to(time))  # B cosines
        beside = torch.cat([chunk.flatten(1), waves], -1)[:, None]
        seen = torch.cat([self.norm(features), beside.expand(-1, features.shape[1], -1)], -1)
        # It guesses the clean action, which is easier to learn: a narrow policy's velocity is steep in x.
        clean = self.think(self.read(seen))
        return (chunk - clean) / time[:, None, None]

class Flow(Tiny):
    """The laptop's policy with a flow-matching head, and with noise in the last denoising step."""
    STEPS = 4  # denoising steps, T
    NOISY = (3,)  # those of them with noise
    # a for each action dimension. Rotation matters little here; with 0.5 for it one seed learned as fast.
    LEVEL = (0.5, 0.5, 0.5, 1.5, 1.5, 1.5, 0.5)
    DRAWS = 8  # noises and times per demonstrated chunk
    FIRST, SECOND = "runs/Flow_tabletop_pretrain_sft", "runs/Flow_tabletop_sft"  # what stages 1 and 2 make
    PRESET = dict(
        tabletop_pretrain=TabletopPretrain.PRESET["tiny"] | dict(checkpoint=FIRST),
        tabletop=Tabletop.PRESET["tiny"] | dict(checkpoint=SECOND, iterations=12, eval_every=3))
    # Stage 1 starts from the laptop's own policy, which can see and read, with a head that is new.
    IMITATION = dict(
        tabletop_pretrain=TabletopPretrain.IMITATION["tiny"]
        | dict(checkpoint=str(PRETRAINED), sft_steps=1000),
        tabletop=Tabletop.IMITATION["tiny"] | dict(checkpoint=FIRST, scale_steps=0))

    def __init__(self, statistics=None):
        super().__init__(statistics)
        self.action_head = FlowHead(self.A * self.LLM["hidden_size"], self.chunk, self.A)
        del self.scale_head  # the level of the noise is fixed
        self.train_only(self.trained)

    def load_state_dict(self, weights, **settings):
        """Of the laptop's policy all but the heads: the new one stays as it is."""
        if any(name.startswith("scale_head") for name in weights):
            heads = "action_head", "scale_head"
            others = {name: value for name, value in weights.items() if not name.startswith(heads)}
            weights = self.state_dict() | others
        return super().load_state_dict(weights, **settings)

    def imitation_loss(self, observations, instructions, actions):
        """The flow-matching loss of demonstrated chunks (B, H, 7), in the environment's units."""
        features = self.features(observations, instructions).float().repeat(self.DRAWS, 1, 1)
        clean = self.from_env_actions(actions).to(features).repeat(self.DRAWS, 1, 1)
        noise = torch.randn_like(clean)
        # Steps start at no time below d.
        time = 1 - (1 - 1 / self.STEPS) * torch.rand(len(clean)).to(clean)
        noisy = clean + time[:, None, None] * (noise - clean)
        return nn.functional.mse_loss(self.action_head(features, noisy, time), noise - clean)

    def step(self, features, x, number, a):
        """Denoising step `number` of chunks (B, H, A): -> mean and std of what follows."""
        t = 1 - number / self.STEPS
        velocity = self.action_head(features, x, x.new_full((len(x),), t))
        return sde_step(x, velocity, t, 1 / self.STEPS, a.to(x))

    def level(self):
        """The level of the noise, (A,)."""
        return self.scale_multiplier * torch.tensor(self.LEVEL)

    def chain_log_prob(self, features, chain):
        """Of chains (B, T + 1, H, A), a column per noisy step and action step: -> (B, columns)."""
        columns = []
        for number in self.NOISY:
            mean, std = self.step(features, chain[:, number], number, self.level())
            columns.append(gaussian_log_prob(chain[:, number + 1], mean, std))  # B H
        return torch.cat(columns, 1)

    @torch.no_grad()
    def act(self, observations, instructions, generators):
        """Records, as of LaplacePolicy, with a chain (T + 1, H, A). "scale" is the std of the last step."""
        features = self.features(observations, instructions).float()
        size = self.STEPS + 1, self.chunk, self.A
        explores = torch.tensor([g is not None for g in generators]).float()[:, None, None]
        noise = []
        for g, seen in zip(generators, observations):
            g = g or np.random.default_rng(zlib.crc32(seen["pictures"].tobytes()))
            noise.append(g.standard_normal(size))
        noise = torch.tensor(np.stack(noise)).to(features)  # B T+1 H A
        chain = [noise[:, 0]]
        for number in range(self.STEPS):
            a = explores * self.level() * (number in self.NOISY)
            mean, std = self.step(features, chain[-1], number, a)
            chain.append(mean + std * noise[:, number + 1])
        chain = torch.stack(chain, 1)  # B T+1 H A
        log_prob = self.chain_log_prob(features, chain)
        return [dict(observation=observations[b], instruction=instructions[b], chain=chain[b].cpu().numpy(),
                     log_prob=log_prob[b].cpu().numpy(), actions=self.to_env_actions(chain[b, -1]),
                     scale=std[b].mean().item()) for b in range(len(observations))]

    def log_prob(self, chunks):
        """Log-probabilities with gradient: of action steps, (B, H); of FlowAll's noisy steps, (B, T H)."""
        observations = [chunk["observation"] for chunk in chunks]
        instructions = [chunk["instruction"] for chunk in chunks]
        features = self.features(observations, instructions).float()
        chain = torch.tensor(np.stack([chunk["chain"] for chunk in chunks])).to(features)
        return self.chain_log_prob(features, chain)

class FlowAll(Flow):
    """The same with noise in every step."""
    NOISY = range(Flow.STEPS)
    tokens_per_query = Flow.STEPS * Flow.chunk  # all columns count

# ------------------------------------------------------------------------------------------ the experiment
EXPERIMENTS = (("Flow", 0), ("Flow", 1), ("Flow", 2), ("FlowAll", 0))

def stage(script, kind, suite, out, *arguments):
    """One stage of a policy of this file, unless it is there: -> its directory."""
    settings = "--model", f"{__file__}:{kind}", "--suite", suite
    return run_once(RUNS / "flow" / out, script, *settings, *arguments)

def outcomes(out, name):
    """The list of bool in an evaluation_NAME.json, and its share in words."""
    found, _ = report.read_outcomes(out / f"evaluation_{name}.json", ript.load_config(out))
    won = list(found.values())
    return won, report.interval(sum(won), len(won))

def main(argv=None):
    """All stages, as far as they are missing; then the table and the figure."""
    ript.require(not (sys.argv[1:] if argv is None else argv), "flow.py has one experiment and takes no name")
    start = stage("scripts/sft.py", "Flow", "tabletop_pretrain", "sft")
    new = stage("ript.py", "Flow", "tabletop_pretrain", "new_arm", "--eval", "--checkpoint", start)
    won, share = outcomes(new, "success")
    table = [("new arm", 0, share, "", "")]
    rows = [dict(run="new arm", seed=0, eval_success=np.mean(won))]
    curves = []
    for kind, seed in EXPERIMENTS:
        settings = "--seed", seed, "--checkpoint"
        sft = stage("scripts/sft.py", "Flow", "tabletop", f"sft_{seed}", *settings, start)
        out = stage("ript.py", kind, "tabletop", f"{kind}_{seed}", *settings, sft)
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        rows += [dict(run=kind, seed=seed) | row for row in metrics]
        curves.append(curve_of(f"{kind}, seed {seed}", "o-" if kind == "Flow" else "s--", metrics))
        before, share = outcomes(out, "SFT")
        after, later = outcomes(out, "RIPT")
        gained, lost, p = report.mcnemar(before, after)
        table.append((kind, seed, share, later, f"{gained}, {lost}, {p:.1g}"))
    write_csv(RESULTS / "flow/metrics.csv", rows)
    plot_curves(RESULTS / "flow/curve.png", {SUCCESS: curves})
    print_header("", "seed", "SFT", "RIPT", "gained, lost, p")
    for cells in table:
        print_row(*cells)

if __name__ == "__main__":
    ript.run_command(main)
