"""What several processes must agree on: two real ones, joined by gloo, against one."""
import json
from dataclasses import replace

import ript  # before torch is: it says how OpenMP's threads wait

import torch
from torch import nn

from ript_test import ToyPolicy, arguments, launch, made_up_episodes, toy_config
from tests.conftest import ROOT

TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"

# Of each case: how many of the six episodes the first process has, and settings. The others are the second's.
CASES = dict(unequal=(4, dict(minibatch=16)), unequal_tokens=(4, dict(minibatch=16, loss_per="token")),
             none=(6, dict(minibatch=4)), none_tokens=(6, dict(minibatch=4, loss_per="token")))


class Random(ToyPolicy):
    """The toy with random weights, which say whether they are those of the other processes."""
    def __init__(self):
        super().__init__()
        nn.init.normal_(self.action_head.weight, std=0.3)

    def parameter_groups(self):
        found = ript.all_gather(ript.fingerprint(self))
        print(f"{len(found)} processes have {len(set(found))} policies")
        return super().parameter_groups()


def updated(episodes, **settings):
    """The statistics and the weights after an update of a policy that every process makes alike."""
    torch.manual_seed(0)
    policy = Random()
    cfg = replace(toy_config(rollouts=2), **settings)
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    stats = ript.update(policy, optimizer, episodes, cfg, ript.TrainState())
    return dict(updates=stats["updates"], loss=stats["loss"], weight=policy.action_head.weight.tolist())


def episodes_of_all():
    """Six episodes, the same in every process. The first four have over two thirds of the action steps."""
    torch.manual_seed(0)
    episodes = made_up_episodes(Random())
    episodes[4].num_executed = [1, 1]
    return episodes


def of_this_process():
    """Print the result of each case; a process of torchrun runs this."""
    ript.init_distributed("cpu")
    episodes = episodes_of_all()
    results = {}
    for name, (first, settings) in CASES.items():
        mine = episodes[:first] if ript.RANK == 0 else episodes[first:]
        results[name] = updated(mine, **settings)
    print(json.dumps(results))


def test_an_update_of_unequal_shares_is_that_of_one_process(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # this file is not in it
    results = json.loads(launch(*TORCHRUN, __file__).splitlines()[-1])
    for name, (first, settings) in CASES.items():
        # A process that has all of the episodes makes the same minibatches alone, of its share.
        share = settings["minibatch"] if first < 6 else settings["minibatch"] // 2
        alone = updated(episodes_of_all(), **settings | dict(minibatch=share))
        assert results[name]["updates"] == alone["updates"] == (1 if first < 6 else 3), name
        torch.testing.assert_close(torch.tensor(results[name]["weight"]), torch.tensor(alone["weight"]))
        assert abs(results[name]["loss"] - alone["loss"]) < 1e-5, name
    assert results["unequal"]["weight"] != results["unequal_tokens"]["weight"]


def test_every_process_begins_with_the_same_random_weights(tmp_path):
    words = arguments(model=f"{__file__}:Random", out=tmp_path / "run", iterations=0, eval_contexts=1,
                      workers=1)
    assert "2 processes have 1 policies" in launch(*TORCHRUN, ript.__file__, *words)


if __name__ == "__main__":
    ript.run_command(of_this_process)  # which leaves the group of processes at the end
