"""Does a critic beat leave-one-out? RIPT's advantages against PPO's with a learned value function.

    python experiments/critic.py                   tabletop, both arms, three seeds
    python experiments/critic.py critic_small      with a quarter of the rollouts per update
    python experiments/critic.py critic_libero     LIBERO-Object's task 0, an hour and a half
    python experiments/critic.py train --max_rejected 0 ARGUMENTS    one run with a critic, as ript.py has it

Both arms begin with the same stage 2 and take as many rollouts: no group is replaced. Leave-one-out drops the
groups whose rewards are all equal; the critic learns from these too, and gives each query its own advantage.
Leave-one-out is ript.py as it is; the critic's arm has a `collect` and an `update` of its own.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncio
import json
import math
import time
from collections import Counter, defaultdict

import numpy as np
import torch
from torch import nn

import ript
from experiments.common import (ONE_START, ONE_TASK, RESULTS, RUNS, SUCCESS, curve_of, memory_gb, plot_curves,
                                run_once, write_csv)
from policies.tiny import Tiny
from simulators.libero_experts import LiberoObject
from simulators.tabletop import Tabletop

ARMS = "leave-one-out", "critic"
# Of each experiment: settings of both stages, of stage 2, of stage 3, over the suite's presets.
EXPERIMENTS = dict(
    critic=("--suite tabletop", "", "--groups 24 --minibatch 192 --eval_every 1"),
    critic_small=("--suite tabletop", "", "--groups 6 --minibatch 48 --iterations 8 --eval_every 4"),
    critic_libero=("--suite libero_object --task 0", ONE_START, ONE_TASK))

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

class Critic(Tiny):
    """The laptop's policy with a critic, V(decoder features, share of the horizon elapsed)."""
    PRESET = dict(tabletop=Tabletop.PRESET["tiny"], libero_object=LiberoObject.PRESET["tiny"])

    @classmethod
    def load(cls, cfg):
        """Load the policy, and give it a new critic."""
        fits = ript.WORLD == 1 and not cfg.resume and (cfg.eval or not cfg.max_rejected)
        ript.require(fits, "a critic needs --max_rejected 0, one process and, without --resume, a new --out")
        policy = super().load(cfg)
        size = policy.LLM["hidden_size"] + 1
        net = nn.Sequential(nn.Linear(size, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(0))  # -> logits (N,)
        nn.init.zeros_(net[2].weight)  # V is the same everywhere at first
        # In a tuple, because the policy's own optimiser and checkpoints would have a module of the policy.
        policy.critic = net, torch.optim.Adam(net.parameters(), 1e-3)
        policy.cfg = cfg
        return policy

    def features(self, observations, instructions):
        """The policy's features. Their mean over the H A positions of a chunk, numpy (B, D), is kept."""
        features = super().features(observations, instructions)  # B H AD
        self.seen = features.detach().unflatten(-1, (self.A, -1)).mean((1, 2)).cpu().numpy()
        return features

    def act(self, observations, instructions, generators):
        """The policy's chunks, which have these means beside."""
        chunks = super().act(observations, instructions, generators)
        return [chunk | dict(features=seen) for chunk, seen in zip(chunks, self.seen)]

    def advantages(self, episodes):
        """The advantage of every query, (E, Q), normalised over all. The critic learns after it was asked."""
        queries = torch.tensor([len(episode.chunks) for episode in episodes])  # E
        rewards = ript.rewards_of([episodes]).view(-1, self.cfg.rollouts).float()  # C K
        outcome = rewards.flatten().repeat_interleave(queries)  # N
        # What leave-one-out has in V's place: the mean of the group's other rewards.
        others = (rewards - ript.leave_one_out_advantage(rewards)).flatten().repeat_interleave(queries)  # N
        suite = ript.load_suite(self.cfg.suite)
        elapsed = []
        for episode in episodes:
            before = np.cumsum([0, *episode.num_executed[:-1]])  # control steps
            elapsed.append(before / ript.horizon_of(suite, episode.context.task))
        features = [chunk["features"] for episode in episodes for chunk in episode.chunks]
        x = torch.tensor(np.column_stack([features, np.concatenate(elapsed)])).float()  # N F
        value = self.critic[0](x).detach().sigmoid()  # N
        log = dict(iteration=episodes[0].seed_key[1] + 1,
                   explained_variance=explained_variance(outcome, value),
                   explained_by_others=explained_variance(outcome, others))
        rows = [torch.tensor(gae(v, e.success)) for v, e in zip(value.split(queries.tolist()), episodes)]
        mean, std = torch.cat(rows).mean(), torch.cat(rows).std()
        log["bce"], *_, log["bce_after"] = fit(*self.critic, x, outcome)
        with open(Path(self.cfg.out, "critic.jsonl"), "a") as file:
            file.write(json.dumps(log) + "\n")
        return nn.utils.rnn.pad_sequence([(row - mean) / (std + 1e-8) for row in rows], True).float()

def collect(policy, simulators, context_of, state, cfg):
    """In place of ript.collect, in one process: no group is replaced, and all of them are kept."""
    began = time.time()
    numbers = range(state.group, state.group + cfg.groups)
    groups = [ript.new_group(number, context_of, state, cfg) for number in numbers]
    state.group += cfg.groups
    episodes = [episode for group in groups for episode in group]
    rollouts = simulators.run_episodes(ript.rollout, episodes, ript.Actor(policy, cfg.act_batch))
    asyncio.run(simulators.run([rollouts], f"rollouts of iteration {state.iteration + 1}"))
    return episodes, ript.rollout_stats(groups) | dict(seconds_rollouts=time.time() - began)

def update(policy, optimizer, episodes, cfg, state):
    """In place of ript.update, in one process: the same objective with the critic's advantages."""
    began = time.time()
    rng = np.random.default_rng([cfg.seed, state.iteration])
    steps = math.ceil(len(episodes) / cfg.minibatch)
    minibatches = np.array_split(rng.permutation(len(episodes)), steps)
    parts = [ript.make_micro_batches(episodes, m, cfg.micro_batch or policy.micro_batch) for m in minibatches]
    order = list(range(steps))
    for _ in range(1, cfg.ppo_epochs):
        order += rng.permutation(steps).tolist()
    mask, old, recorded = ript.compute_old_log_probs(policy, episodes, sum(parts, []))  # E Q H each
    advantage = policy.advantages(episodes)  # E Q
    gap = (recorded - old)[mask]
    parameters = optimizer.param_groups[0]["params"]
    logs = []
    for minibatch, its_parts in [(minibatches[i], parts[i]) for i in order]:
        counted = mask[minibatch]
        weight = torch.zeros(mask.shape)  # E Q H
        weight[minibatch] = ript.loss_weight(counted.flatten(1), cfg.loss_per).view(counted.shape)
        log = Counter()
        for part in its_parts:
            log_prob = policy.log_prob([episodes[e].chunks[q] for e, q in part])  # N H
            e, q = torch.tensor(np.array(part)).T  # N each
            loss, stats = ript.ppo_clip_loss(log_prob, old[e, q], advantage[e, q], weight[e, q],
                                             cfg.clip_coef)
            loss.backward()
            log.update(loss=loss.item(), **{name: value.item() for name, value in stats.items()})
        log["grad_norm"] = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad()
        logs.append(log)
    means = {name: float(np.mean([log[name] for log in logs])) for name in logs[0]}
    return means | dict(ratio_error=(gap.exp() - 1).abs().max().item(), updates=len(logs),
                        act_std=gap.std(correction=0).item(), seconds_update=time.time() - began)

def rows_of(name, arm, seed):
    """What is missing of stage 2 and of an arm's stage 3: -> a row per iteration."""
    suite, stage_2, settings = (words.split() for words in EXPERIMENTS[name])
    start = run_once(RUNS / f"critic/{name}_{seed}_sft", "scripts/sft.py", *suite, "--seed", seed, *stage_2)
    script = ["experiments/critic.py", "train"] if arm == "critic" else ["ript.py"]
    settings += ["--seed", seed, "--max_rejected", 0, "--checkpoint", start]
    out = run_once(RUNS / f"critic/{name}_{seed}_{arm}", *script, *suite, *settings)
    rows = defaultdict(dict)
    for file in sorted(out.glob("*.jsonl"), reverse=True):  # metrics.jsonl, and critic.jsonl if there is one
        for row in map(json.loads, file.read_text().splitlines()):
            rows[row["iteration"]] |= row
    shared = dict(arm=arm, seed=seed, memory_gb=memory_gb(out))
    return [shared | rows[i] for i in sorted(rows)]

def experiment(name):
    """Run what an experiment lacks; write its CSV file and its figure."""
    runs = {(arm, seed): rows_of(name, arm, seed) for seed in range(3) for arm in ARMS}
    write_csv(RESULTS / name / "metrics.csv", [row for rows in runs.values() for row in rows])

    def curves(arm, metric, label, style, scale):
        return [curve_of("" if seed else label, style, runs[arm, seed], metric, scale) for seed in range(3)]

    success = [curves(arm, "eval_success", arm, f"o-C{i}", 100) for i, arm in enumerate(ARMS)]
    others = curves("critic", "explained_by_others", "by the group's other rewards", "o-C0", 1)
    value = curves("critic", "explained_variance", "by V, before it learns from them", "o-C1", 1)
    panels = {SUCCESS: sum(success, []), "explained variance of the outcomes": others + value}
    plot_curves(RESULTS / name / "curve.png", panels)

def main(argv=None):
    """An experiment by its name, or one run."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        # This is ript.py's main, with what is here in place of what is there.
        ript.collect, ript.update = collect, update
        return ript.main(["--model", f"{__file__}:Critic", *argv[1:]])
    name = argv[0] if argv else "critic"
    ript.require(name in EXPERIMENTS and len(argv) < 2,
                 f"say which experiment, of {', '.join(EXPERIMENTS)}, or train")
    experiment(name)

if __name__ == "__main__":
    ript.run_command(main)
