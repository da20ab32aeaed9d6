"""Tests of experiments/critic.py, at toy size: python -m pytest -q tests/critic_test.py"""
import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import ript  # before torch is: it says how OpenMP's threads wait

import numpy as np
import pytest
import torch

from experiments import critic
from policies.tiny import Tiny
from simulators.tabletop import PRETRAINED

TASK = "lift the red cube"


def config(out, *more):
    """Two groups of four rollouts, from the tabletop's pretrained policy."""
    given = ["--model", f"{critic.__file__}:Critic", "--checkpoint", PRETRAINED, "--groups", 2,
             "--rollouts", 4, "--max_rejected", 0, "--minibatch", 8, "--workers", 1, "--device", "cpu",
             "--out", out, *more]
    return ript.parse_config([str(word) for word in given])


def look(seed):
    """A raw observation of noise."""
    rng = np.random.default_rng(seed)
    pictures = {name: rng.integers(0, 255, (64, 64, 3), np.uint8) for name in Tiny.PICTURES}
    return pictures | dict(robot0_eef_pos=rng.standard_normal(3), robot0_eef_quat=np.array([0, 0, 0, 1.0]),
                           robot0_gripper_qpos=rng.standard_normal(2))


class ToySimulators(ript.Simulators):
    """Simulators of a few lines of Python: success(episode) is decided at the end of the second chunk."""
    def __init__(self, success):
        self.all = []
        self.success = success

    async def run_episode(self, run_episode, episode, *arguments):
        async def call(method, argument):
            made = len(episode.chunks)
            if method == "reset":
                return ript.StepResult(0, False, Tiny.preprocess(look(0)))
            if made == 1 and self.success(episode):
                return ript.StepResult(3, True, None)
            return ript.StepResult(len(argument), False, Tiny.preprocess(look(made + 1)))

        await run_episode(SimpleNamespace(call=call), episode, *arguments, 32)


def mixed(episode):
    """Group 0 is solved always, the other groups every other time."""
    return episode.group == 0 or episode.seed_key[3] % 2 == 0


def one_then_three(episode):
    """Group 0 is solved once, group 1 all but once: four different advantages."""
    return (episode.seed_key[3] == 1) == (episode.group == 0)


def collect(policy, success, cfg, function=critic.collect):
    """A collect with toy simulators: -> episodes and statistics."""
    return function(policy, ToySimulators(success), partial(ript.Context, 0, TASK), ript.TrainState(), cfg)


def optimizer_of(policy, lr=1e-4):
    return torch.optim.AdamW(policy.parameter_groups(), lr)


def planted(policy, seed, iteration, number=120):
    """Episodes of four queries whose outcome follows from the first feature of the chunks."""
    rng = np.random.default_rng(seed)
    width = policy.LLM["hidden_size"]
    episodes = []
    for e in range(number):
        skill = rng.standard_normal()
        chunks = [dict(features=np.append(skill, rng.standard_normal(width - 1))) for _ in range(4)]
        success = bool(rng.random() < 1 / (1 + math.exp(-4 * skill)))
        episodes.append(ript.Episode(ript.Context(0, TASK, 0), e // 4, (0, iteration, e // 4, e % 4), chunks,
                                     [8, 8, 8, 8], success))
    return episodes


@pytest.mark.parametrize("lam", [0, 0.3, 0.95, 1])
def test_gae_is_the_sum_of_discounted_temporal_differences(lam):
    rng = np.random.default_rng(0)
    for queries in (1, 2, 5):
        for outcome in (0, 1):
            value = rng.random(queries)
            expected = []
            for q in range(queries):
                total = 0.0
                for t in range(q, queries):
                    last = t == queries - 1
                    reward = outcome if last else 0
                    following = 0 if last else value[t + 1]
                    total += lam ** (t - q) * (reward + following - value[t])
                expected.append(total)
            np.testing.assert_allclose(critic.gae(value, outcome, lam), expected, atol=1e-12)


def test_gae_has_the_right_limits():
    value = np.array([0.2, 0.5, 0.9])
    np.testing.assert_allclose(critic.gae(value, 1, 0), [0.3, 0.4, 0.1])
    np.testing.assert_allclose(critic.gae(value, 0, 1), [-0.2, -0.5, -0.9])
    np.testing.assert_allclose(critic.gae(value, 1), [0.3 + 0.95 * (0.4 + 0.95 * 0.1), 0.4 + 0.95 * 0.1, 0.1])


def test_explained_variance_is_one_for_the_truth_and_zero_for_a_constant():
    outcome = torch.tensor([0.0, 1, 1, 0])
    assert critic.explained_variance(outcome, outcome) == 1
    assert critic.explained_variance(outcome, torch.full((4,), 0.3)) == pytest.approx(0)
    assert critic.explained_variance(outcome, 1 - outcome) < -1
    assert critic.explained_variance(torch.ones(4), outcome) == 0


def test_the_critic_learns_a_planted_signal_and_none_where_there_is_none(tmp_path):
    """All is measured on episodes that it has not learned from."""
    explained = {}
    for name in ("signal", "noise"):
        torch.manual_seed(0)
        policy = critic.Critic.load(config(tmp_path / name))
        (tmp_path / name).mkdir()
        for i in range(3):
            episodes = planted(policy, i, i, 300)
            if name == "noise":
                won = np.random.default_rng(i).permutation([episode.success for episode in episodes])
                for episode, success in zip(episodes, won):
                    episode.success = bool(success)
            policy.advantages(episodes)
        log = [json.loads(line) for line in (tmp_path / name / "critic.jsonl").read_text().splitlines()]
        assert [row["iteration"] for row in log] == [1, 2, 3]
        assert log[0]["bce"] == pytest.approx(math.log(2), abs=0.01)
        assert log[0]["explained_variance"] == pytest.approx(0, abs=1e-3)
        assert all(row["bce_after"] < row["bce"] for row in log)
        explained[name] = log[-1]["explained_variance"]
        if name == "signal":
            assert log[-1]["bce"] < 0.8 * log[0]["bce"]
    assert explained["signal"] > 0.25 > 0.0 > explained["noise"]


def test_advantages_are_normalised_per_query_and_zero_where_there_is_none(tmp_path):
    policy = critic.Critic.load(config(tmp_path))
    episodes = planted(policy, 0, 0)
    for episode in episodes[::2]:
        del episode.chunks[2:], episode.num_executed[2:]
    policy.advantages(episodes)
    advantage = policy.advantages(episodes)
    made = torch.tensor([[q < len(episode.chunks) for q in range(4)] for episode in episodes])
    assert advantage.shape == (120, 4) and advantage.dtype == torch.float32
    assert (advantage[~made] == 0).all()
    assert advantage[made].mean().abs() < 1e-5 and abs(advantage[made].std() - 1) < 1e-5
    # Success is better than expected and failure worse, and what is expected differs by query.
    won = torch.tensor([episode.success for episode in episodes])
    assert advantage[won].mean() > 0.3 and advantage[~won].mean() < -0.3
    assert (advantage[1::2].std(1) > 0.01).all()


def test_groups_without_signal_stay_with_a_critic_alone(tmp_path):
    cfg = config(tmp_path)
    policy = critic.Critic.load(cfg)
    for function, kept in ((critic.collect, [0] * 4 + [1] * 4), (ript.collect, [1] * 4)):
        episodes, stats = collect(policy, mixed, cfg, function)
        assert [episode.group for episode in episodes] == kept
        assert stats["kept"] == 1 and stats["rollouts"] == 8


def test_an_iteration_trains_the_policy_and_the_critic_apart_from_each_other(tmp_path):
    cfg = config(tmp_path)
    policy = critic.Critic.load(cfg)
    optimizer = optimizer_of(policy)
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    net = policy.critic[0]
    assert not mine & {id(p) for p in net.parameters()}
    assert policy.state_dict().keys() == Tiny.load(cfg).state_dict().keys()
    head, value = ([p.clone() for p in module.parameters()] for module in (policy.action_head, net))
    episodes, _ = collect(policy, mixed, cfg)
    assert episodes[0].chunks[0]["features"].shape == (policy.LLM["hidden_size"],)
    stats = critic.update(policy, optimizer, episodes, cfg, ript.TrainState())
    assert stats["updates"] == 1 and stats["grad_norm"] > 0 and stats["ratio_error"] < 1e-4
    assert any((a != b).any() for a, b in zip(head, policy.action_head.parameters()))
    assert any((a != b).any() for a, b in zip(value, net.parameters()))
    row, = (json.loads(line) for line in (tmp_path / "critic.jsonl").read_text().splitlines())
    assert row["iteration"] == 1 and row["bce_after"] < row["bce"]


def test_update_gives_each_query_its_own_advantage(tmp_path):
    """One query of each episode is called good and the other bad, and the other way round in the next one."""
    cfg = config(tmp_path, "--micro_batch", 3)
    policy = critic.Critic.load(cfg)
    episodes, _ = collect(policy, mixed, cfg)
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]] * 4)
    signs = torch.cat([signs, torch.zeros(8, max(len(e.chunks) for e in episodes) - 2)], 1)
    policy.advantages = lambda episodes: signs
    before = [policy.log_prob(episode.chunks[:2]).sum(1).detach() for episode in episodes]
    critic.update(policy, optimizer_of(policy, 1e-5), episodes, cfg, ript.TrainState())
    after = [policy.log_prob(episode.chunks[:2]).sum(1).detach() for episode in episodes]
    change = torch.stack([b - a for a, b in zip(before, after)])
    assert ((change * signs[:, :2]).mean(0) > 0).all()


def test_with_leave_one_out_as_its_advantage_the_update_is_that_of_ript_to_the_last_bit(tmp_path):
    cfg = config(tmp_path, "--ppo_epochs", 2, "--minibatch", 3, "--micro_batch", 4)
    ours, theirs = critic.Critic.load(cfg), Tiny.load(cfg)
    episodes, _ = collect(ours, one_then_three, cfg)
    assert len(episodes) == 8 and len({len(episode.chunks) for episode in episodes}) == 2
    rewards = ript.rewards_of([episodes]).view(-1, 4)
    advantage = ript.leave_one_out_advantage(rewards).view(-1, 1)
    ours.advantages = lambda episodes: advantage.expand(-1, max(len(e.chunks) for e in episodes))
    state = ript.TrainState(iteration=5)
    one = critic.update(ours, optimizer_of(ours), episodes, cfg, state)
    other = ript.update(theirs, optimizer_of(theirs), episodes, cfg, state)
    assert one | dict(seconds_update=0) == other | dict(seconds_update=0)
    start = Tiny.load(cfg).state_dict()
    weights = [policy.state_dict() for policy in (ours, theirs)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in start)
    assert any(not torch.equal(start[name], weights[0][name]) for name in start)


def test_replacement_resume_and_several_processes_are_refused(tmp_path, monkeypatch):
    cfg = config(tmp_path)
    with pytest.raises(ript.UserError, match="needs --max_rejected 0"):
        critic.Critic.load(replace(cfg, max_rejected=2))
    with pytest.raises(ript.UserError, match="without --resume"):
        critic.Critic.load(replace(cfg, resume="runs/critic"))
    critic.Critic.load(cfg)
    monkeypatch.setattr(ript, "WORLD", 2)
    with pytest.raises(ript.UserError, match="one process"):
        critic.Critic.load(cfg)
