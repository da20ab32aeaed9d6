"""ript.py with GRPO's advantage in place of leave-one-out: each group's is divided by its standard deviation.

    python experiments/grpo.py ARGUMENTS                 one run, with ript.py's arguments
    python experiments/ablations.py tabletop grpo             both advantages, three seeds
    python experiments/ablations.py libero_loo libero_grpo    the same on LIBERO-Object's task 0

Leave-one-out is K / (K - 1) times the reward minus the group's mean. The division gives the rewards of every
group one variance. So a group in which one rollout of eight succeeds, or one fails, counts 1.5 times as much,
against leave-one-out, as one in which half of them do.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import ript

def grpo_advantage(rewards: torch.Tensor) -> torch.Tensor:
    """(R_k - mean of the group) / its standard deviation (arXiv 2402.03300): (C, K) -> (C, K) float.

    The standard deviation is the sample's, and 1e-4 is added to it, as in TRL. Equal rewards give zeros.
    """
    rewards = rewards * 1.0
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)

def main(argv: list[str] | None = None) -> None:
    """ript.py's main with the other advantage, in this process."""
    ript.leave_one_out_advantage = grpo_advantage
    ript.main(argv)

if __name__ == "__main__":
    ript.run_command(main)
