"""Does a critic beat leave-one-out? RIPT's advantages against PPO's with a learned value function.

    python examples/critic.py                 tabletop, both arms, three seeds
    python examples/critic.py critic_small    with a quarter of the rollouts per update
    python examples/critic.py critic_libero   LIBERO-Object's task 0, an hour and a half

Both arms begin with the same stage 2 and take as many rollouts: no group is replaced. Leave-one-out drops the
groups whose rewards are all equal; the critic learns from these too, and gives each query its own advantage.
"""
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ript
from examples import laptop, report

ARMS = {"leave-one-out": "tiny", "critic": f"{__file__}:Critic"}
# Of each experiment: settings of both stages, and of stage 3, over the suite's presets.
EXPERIMENTS = dict(
    critic=("--suite tabletop", "--groups 24 --minibatch 192 --eval_every 1"),
    critic_small=("--suite tabletop", "--groups 6 --minibatch 48 --iterations 8 --eval_every 4"),
    critic_libero=("--suite libero_object --task 0", "--eval_every 2"))

def gae(value, outcome, lam=0.95):
    """Generalised advantage estimation over an episode's queries with gamma = 1: (Q,), number -> (Q,).

    The only reward is the outcome, and what follows the end is worth nothing. So the temporal differences are
    those of V_0, ..., V_{Q-1}, outcome, and A_q is the sum over l of lam ** l times difference q + l.
    """
    difference = np.diff(np.append(value, outcome))
    q = np.arange(len(value))
    return np.triu(lam ** np.abs(q - q[:, None])) @ difference

def explained_variance(outcome, prediction) -> float:
    """1 - Var(outcome - prediction) / Var(outcome) of two tensors (N,); 0 where all outcomes are equal."""
    return (1 - (outcome - prediction).var() / outcome.var()).item() if outcome.var() > 0 else 0.0

def fit(net, optimizer, x, outcome, steps=300):
    """Steps of binary cross-entropy: x (N, F) -> outcome (N,). -> the loss before each."""
    losses = []
    for _ in range(steps):
        loss = nn.functional.binary_cross_entropy_with_logits(net(x), outcome)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

class Critic(laptop.Tiny):
    """The laptop's policy with a critic, V(decoder features, share of the horizon elapsed)."""
    PRESET = dict(tabletop=laptop.Tabletop.PRESET["tiny"], libero_object=laptop.LiberoObject.PRESET["tiny"])

    @classmethod
    def load(cls, cfg):
        """As ever, with a new critic. ript.py keeps every group, so none can be replaced."""
        fits = ript.WORLD == 1 and not cfg.resume and (cfg.eval or not cfg.max_rejected)
        ript.require(fits, "a critic needs --max_rejected 0 and one process, and has no --resume")
        policy = super().load(cfg)
        size = policy.LLM["hidden_size"] + 1
        net = nn.Sequential(nn.Linear(size, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(0))  # -> logits (N,)
        nn.init.zeros_(net[2].weight)  # V is the same everywhere at first
        # In a tuple, because the policy's own optimiser and checkpoints would have a module of the policy.
        policy.critic = net, torch.optim.Adam(net.parameters(), 1e-3)
        policy.cfg, policy.horizon = cfg, ript.load_suite(cfg.suite).HORIZON  # control steps
        return policy

    def features(self, observations, instructions):
        """As ever. Keeps their mean over the H A positions of a chunk, numpy (B, D)."""
        features = super().features(observations, instructions)  # B H AD
        self.seen = features.detach().unflatten(-1, (self.A, -1)).mean((1, 2)).cpu().numpy()
        return features

    def act(self, observations, instructions, generators):
        """As ever. The records have these means."""
        records = super().act(observations, instructions, generators)
        return [record | dict(features=seen) for record, seen in zip(records, self.seen)]

    def advantages(self, episodes):
        """For ript.update: (E, Q), normalised over all queries. The critic learns after it was asked."""
        queries = torch.tensor([len(episode.records) for episode in episodes])  # E
        rewards = ript.rewards_of([episodes]).view(-1, self.cfg.rollouts).float()  # C K
        outcome = rewards.flatten().repeat_interleave(queries)  # N
        # What leave-one-out has in V's place: the mean of the group's other rewards.
        others = (rewards - ript.leave_one_out_advantage(rewards)).flatten().repeat_interleave(queries)  # N
        elapsed = [np.cumsum([0, *episode.executed[:-1]]) / self.horizon for episode in episodes]
        features = [record["features"] for episode in episodes for record in episode.records]
        x = torch.tensor(np.column_stack([features, np.concatenate(elapsed)])).float()  # N F
        value = self.critic[0](x).detach().sigmoid()  # N
        log = dict(iteration=episodes[0].noise[1] + 1, explained_variance=explained_variance(outcome, value),
                   explained_by_others=explained_variance(outcome, others))
        rows = [torch.tensor(gae(v, e.success)) for v, e in zip(value.split(queries.tolist()), episodes)]
        mean, std = torch.cat(rows).mean(), torch.cat(rows).std()
        log["bce"], *_, log["bce_after"] = fit(*self.critic, x, outcome)
        with open(Path(self.cfg.out, "critic.jsonl"), "a") as file:
            file.write(json.dumps(log) + "\n")
        return nn.utils.rnn.pad_sequence([(row - mean) / (std + 1e-8) for row in rows], True).float()

def train(name, arm, seed):
    """What is missing of stage 2 and of an arm's stage 3: -> a row per iteration."""
    suite, settings = EXPERIMENTS[name]
    start = ROOT / f"runs/{name}_{seed}_sft"
    out = ROOT / f"runs/{name}_{seed}_{arm}"
    stage_2 = f"examples/imitation.py {suite} --seed {seed} --out {start}"
    stage_3 = (f"ript.py {suite} --seed {seed} {settings} --max_rejected 0 --model {ARMS[arm]} "
               f"--checkpoint {start} --out {out}")
    for command, folder in ((stage_2, start), (stage_3, out)):
        if not (folder / "memory_gb").exists():
            process = subprocess.Popen([sys.executable, *command.split()], cwd=ROOT)
            _, status, usage = os.wait4(process.pid, 0)
            ript.require(status == 0, f"this failed: {command}")
            (folder / "memory_gb").write_text(f"{usage.ru_maxrss / 2 ** 20:.3f}")  # Linux counts in KiB
    rows = defaultdict(dict)
    for file in out.glob("*.jsonl"):  # metrics.jsonl, and critic.jsonl if there is one
        for row in map(json.loads, file.read_text().splitlines()):
            rows[row["iteration"]] |= row
    shared = dict(arm=arm, seed=seed, memory_gb=(out / "memory_gb").read_text())
    return [shared | rows[i] for i in sorted(rows)]

def main(name="critic"):
    """Run what an experiment lacks; write its CSV file and its figure."""
    from matplotlib.figure import Figure
    rows = [row for seed in range(3) for arm in ARMS for row in train(name, arm, seed)]
    report.write_csv(ROOT / f"assets/evidence/{name}.csv", rows)
    drawing = Figure(figsize=(11, 4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    curves = ((left, "leave-one-out", "eval_success", "leave-one-out", "C0"),
              (left, "critic", "eval_success", "critic", "C1"),
              (right, "critic", "explained_by_others", "by the group's other rewards", "C0"),
              (right, "critic", "explained_variance", "by V, before it learns from them", "C1"))
    for axes, arm, key, label, colour in curves:
        for seed in range(3):
            run = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed) and key in row]
            rollouts = [row["iteration"] * rows[1]["rollouts"] for row in run]  # all iterations take as many
            axes.plot(rollouts, [row[key] for row in run], "o-", color=colour, label=None if seed else label)
        axes.legend()
    left.set(xlabel="rollouts", ylabel="success on held-out contexts", ylim=(0, 1.03))
    right.set(xlabel="rollouts", ylabel="explained variance of the outcomes")
    drawing.savefig(ROOT / f"assets/evidence/{name}.png", dpi=100)

if __name__ == "__main__":
    main(*sys.argv[1:])
