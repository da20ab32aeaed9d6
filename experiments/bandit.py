"""RIPT in ten seconds, and what each of its parts is for: an arm learns to throw darts.

    python experiments/bandit.py    prints a table and draws docs/results/bandit/bandit.png

A context is a board on a wall. An episode is four throws, and an action is the place where a throw lands. The
first hit ends the episode with reward 1, so the throws after it do not run. One hit in twenty falls off, with
reward 0. At first the policy aims all throws at the middle of the wall. Half of the boards hang there and are
hit nearly always; the others hang farther and farther away, and the last one is hit nearly never.

The formulas are ript.py's. Each part of the method is switched off in turn, with five seeds.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import NamedTuple

import numpy as np
import torch
from torch.distributions import Laplace

import ript

FIGURE = Path(__file__).resolve().parents[1] / "docs/results/bandit/bandit.png"
BOARDS, THROWS, RADIUS, SCALE = 16, 4, 0.2, 0.1  # contexts, C; action steps, S; size of a board; Laplace b
ROLLOUTS, GROUPS, PASSES, CLIP, LR = 8, 8, 8, 0.2, 0.5  # K; groups per update, B / K; N; eps; step size
NOISE = Laplace(0.0, SCALE)
ANGLE = 2.4 * torch.arange(BOARDS)
DISTANCE = torch.linspace(-0.5, 0.5, BOARDS).clamp(min=0)
PLACE = DISTANCE[:, None] * torch.stack([ANGLE.cos(), ANGLE.sin()], -1)  # C 2
SWITCHES = {"RIPT": {}, "no leave-one-out": dict(baseline=False), "no rejection": dict(reject=False),
            "no clip": dict(clip=np.inf), "no mask": dict(mask=False), "sign flipped": dict(sign=-1)}

class Rollouts(NamedTuple):
    """What E episodes leave behind."""
    board: torch.Tensor  # (E,) the context
    action: torch.Tensor  # (E, S, 2) where the throws landed; 0 for a throw that did not run
    ran: torch.Tensor  # (E, S) bool, the mask
    reward: torch.Tensor  # (E,) bool

def throw(aim, board):
    """One episode at each of the boards (E,). The policy's means are aim (C, S, 2)."""
    action = aim[board] + NOISE.sample((len(board), THROWS, 2))
    hit = (action - PLACE[board][:, None]).norm(dim=-1) < RADIUS  # E S
    ran = hit.cumsum(-1) - hit.long() == 0  # there was no hit before
    reward = hit.any(-1) & (torch.rand(len(board)) < 0.95)
    return Rollouts(board, action * ran[..., None], ran, reward)

def collect(aim, reject):
    """Algorithm 1, lines 4-14: -> the kept rollouts, and how many groups were drawn for them."""
    kept = []
    drawn = 0
    while len(kept) < GROUPS and drawn < 10 * GROUPS:
        group = throw(aim, torch.randint(BOARDS, (1,)).repeat(ROLLOUTS))
        drawn += 1
        if ript.has_signal(group.reward[None]) or not reject:
            kept.append(group)
    return Rollouts(*map(torch.cat, zip(*kept))), drawn

def learn(seed, baseline=True, reject=True, clip=CLIP, mask=True, sign=1, budget=3600):
    """RIPT, or what is left of it: -> a dict before each update, with sums so far, and success at the boards
    that do not hang in the middle. useless: rollouts of the updates in whose group all rewards were equal."""
    torch.manual_seed(seed)
    aim = torch.zeros(BOARDS, THROWS, 2, requires_grad=True)  # the policy
    log_scale = torch.tensor(SCALE).log().repeat(2)  # stays as it is, as in stage 3
    optimizer = torch.optim.SGD([aim], LR)
    history = []
    rollouts = kl = useless = 0
    while rollouts < budget:
        with torch.no_grad():
            test = throw(aim, torch.arange(BOARDS // 2, BOARDS).repeat(200))
            history.append(dict(rollouts=rollouts, updates=len(history), kl=kl, useless=useless,
                                success=test.reward.float().mean().item()))
            batch, groups = collect(aim, reject)
            old = ript.laplace_log_prob(batch.action, aim[batch.board], log_scale)  # E S
        reward = batch.reward.view(-1, ROLLOUTS)  # groups, K
        advantage = ript.leave_one_out_advantage(reward) if baseline else reward.float()
        weight = ript.loss_weight(batch.ran if mask else torch.ones_like(batch.ran))
        for _ in range(PASSES):
            log_prob = ript.laplace_log_prob(batch.action, aim[batch.board], log_scale)
            loss, stats = ript.ppo_clip_loss(log_prob, old, sign * advantage.flatten(), weight, clip)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rollouts += groups * ROLLOUTS
        kl += stats["approx_kl"].item()
        useless += ROLLOUTS * (~ript.has_signal(reward)).sum().item()
    return history

def curve(runs, x, y, at):
    """The mean over runs, and the standard deviation, of y where x is at, a number or an array."""
    values = [np.interp(at, [row[x] for row in run], [row[y] for row in run]) for run in runs]
    return np.mean(values, 0), np.std(values, 0)

def main():
    """Print the table, and draw the figure. Its bands are one standard deviation to each side."""
    ript.require(len(sys.argv) == 1, "bandit.py has one experiment and takes no name")
    from matplotlib.figure import Figure
    drawing = Figure(figsize=(11, 7), layout="constrained")
    readings = ("rollouts", "success"), ("updates", "success"), ("rollouts", "kl"), ("rollouts", "useless")
    where = dict(rollouts=3000, updates=15)
    panels = drawing.subplots(2, 2).flatten()
    print("| | " + " | ".join(f"{y} after {where[x]} {x}" for x, y in readings) + " |\n" + "|---" * 5 + "|")
    for name, switch in SWITCHES.items():
        runs = [learn(seed, **switch) for seed in range(5)]
        cells = [name]
        for axes, (x, y) in zip(panels, readings):
            grid = np.linspace(0, 1.2 * where[x], 40)
            mean, spread = curve(runs, x, y, grid)
            axes.plot(grid, mean, label=name)
            axes.fill_between(grid, mean - spread, mean + spread, alpha=0.2)
            axes.set(xlabel=x, ylabel=y)
            cells.append("{:.2f} +- {:.2f}".format(*curve(runs, x, y, where[x])))
        print("| " + " | ".join(cells) + " |", flush=True)
    panels[2].set(yscale="log", ylim=(0.3, 300))
    panels[3].legend()
    with ript.writing(FIGURE) as file:
        drawing.savefig(file, dpi=90)

if __name__ == "__main__":
    torch.set_num_threads(1)
    ript.run_command(main)
