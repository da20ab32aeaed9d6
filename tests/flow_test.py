"""The claims of experiments/flow.py, each a test that fails when the claim does, at toy size.

Run: python -m pytest -q tests/flow_test.py
"""
import math
from functools import partial

import ript  # before torch is: it says how OpenMP's threads wait

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from experiments import flow
from experiments.flow import Flow, FlowAll
from policies.pi0 import sde_step
from scripts import sft

FILE = flow.__file__


def policy_of(kind=Flow, seed=0):
    torch.manual_seed(seed)
    return kind()


def observations(n, seed=0):
    rng = np.random.default_rng(seed)
    return [dict(pictures=rng.integers(0, 255, (2, 64, 64, 3), dtype=np.uint8),
                 proprio=rng.standard_normal(8)) for _ in range(n)]


def records_of(policy, n=3, explore=True):
    generators = [np.random.default_rng(i) if explore else None for i in range(n)]
    return policy.act(observations(n), ["lift the red cube"] * n, generators)


def velocity_of(policy, chunk, number):
    features = policy.features([chunk["observation"]], [chunk["instruction"]]).float()
    x = torch.tensor(chunk["chain"][number])[None]
    return policy.action_head(features, x, torch.tensor([1 - number / 4]))[0].detach()


@pytest.mark.parametrize("kind", [Flow, FlowAll])
def test_a_chain_is_drawn_from_and_scored_with_the_gaussian_of_the_published_formula(kind):
    policy = policy_of(kind)
    policy.scale_multiplier = 1.2
    chunk = records_of(policy)[1]
    noise = torch.tensor(np.random.default_rng(1).standard_normal((5, 8, 7))).float()
    torch.testing.assert_close(torch.tensor(chunk["chain"][0]), noise[0])
    expected = []
    for number in ([3] if kind is Flow else [0, 1, 2, 3]):
        x, after = torch.tensor(chunk["chain"][number]), torch.tensor(chunk["chain"][number + 1])
        t, d = 1 - number / 4, 1 / 4
        level = 1.2 * torch.tensor([0.5, 0.5, 0.5, 1.5, 1.5, 1.5, 0.5])
        s = level * math.sqrt({1: 3, 0.75: 3, 0.5: 1, 0.25: 1 / 3}[t])
        v = velocity_of(policy, chunk, number)
        # The form of Flow-GRPO, equation 9: the Euler step, and a correction by the score.
        mean = x - d * (v + s ** 2 / (2 * t) * (x + (1 - t) * v))
        std = s * math.sqrt(d)
        torch.testing.assert_close((after - mean) / std, noise[number + 1], atol=1e-3, rtol=1e-3)
        expected.append(Normal(mean, std).log_prob(after).sum(-1))
    expected = torch.cat(expected)
    assert expected.shape == ((8,) if kind is Flow else (32,))
    torch.testing.assert_close(policy.log_prob([chunk])[0].detach(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", [Flow, FlowAll])
def test_the_ratio_is_1_before_the_first_step_and_not_after_it(kind):
    policy = policy_of(kind)
    chunks = records_of(policy)
    recorded = torch.tensor(np.stack([chunk["log_prob"] for chunk in chunks]))
    now = policy.log_prob(chunks)
    assert ((now - recorded).exp() - 1).abs().max() < 1e-3
    now.sum().backward()
    with torch.no_grad():
        for p in policy.parameter_groups()[0]["params"]:
            p += 1e-5 * p.grad.sign()
    later = policy.log_prob(chunks)
    assert later.sum() > now.sum() and ((later - recorded).exp() - 1).abs().max() > 0.01


def test_the_noise_of_flow_is_in_the_last_step_and_changes_each_action_step_alone():
    policy = policy_of()
    chunk = records_of(policy)[0]
    before = policy.log_prob([chunk])[0]
    for number in range(3):
        x = torch.tensor(chunk["chain"][number])
        step = x - velocity_of(policy, chunk, number) / 4
        torch.testing.assert_close(torch.tensor(chunk["chain"][number + 1]), step, atol=1e-5, rtol=1e-5)
    chunk["chain"][4, 5] += 0.1
    changed = (policy.log_prob([chunk])[0] != before).tolist()
    assert changed == [False] * 5 + [True] + [False] * 2


def test_evaluation_is_the_ode_from_noise_that_the_observation_decides():
    policy = policy_of()
    first, second = records_of(policy, 2, explore=False), records_of(policy, 2, explore=False)
    for one, other in zip(first, second):
        assert (one["chain"] == other["chain"]).all() and (one["actions"] == other["actions"]).all()
    assert (first[0]["chain"][0] != first[1]["chain"][0]).all()
    x = torch.tensor(first[0]["chain"][0])
    for number in range(4):
        x = x - velocity_of(policy, first[0], number) / 4
        torch.testing.assert_close(torch.tensor(first[0]["chain"][number + 1]), x, atol=1e-5, rtol=1e-5)


def exact_velocity(x, t, mean, std):
    """E[noise - action | x] for actions from a Gaussian, where x = (1 - t) action + t noise."""
    variance = (1 - t) ** 2 * std ** 2 + t ** 2
    return -mean + (t - (1 - t) * std ** 2) / variance * (x - (1 - t) * mean)


def denoise(a, steps, corrected=True):
    """40,000 chains with noise in all steps, for actions of mean 0.4 and std 0.3 -> their mean and std."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, dtype=torch.double, generator=generator)
    for number in range(steps):
        t = 1 - number / steps
        velocity = exact_velocity(x, t, 0.4, 0.3)
        mean, std = sde_step(x, velocity, t, 1 / steps, a)
        if not corrected:
            mean = sde_step(x, velocity, t, 1 / steps, 0)[0]
        x = mean + std * torch.randn(len(x), dtype=torch.double, generator=generator)
    return x.mean().item(), x.std().item()


def test_with_the_exact_velocity_noise_keeps_mean_and_std_because_the_mean_is_corrected():
    for a in (0, 0.5):
        mean, std = denoise(a, 200)
        assert abs(mean - 0.4) < 0.01 and abs(std - 0.3) < 0.01
    assert denoise(0.5, 200, corrected=False)[1] > 0.33


def test_the_flow_matching_loss_falls_to_what_one_chunk_leaves():
    policy = policy_of()
    policy.train_only(policy.sft_modules)
    batch = observations(1), ["lift the red cube"], np.full((1, 8, 7), 0.5)
    optimizer = torch.optim.Adam(policy.parameter_groups(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sft.imitation_loss(policy, "sft", *batch).backward()
        optimizer.step()
    chunk, = policy.act(*batch[:2], [None])
    assert np.abs(chunk["actions"][:, :6] - 0.5).max() < 0.2 and (chunk["actions"][:, 6] == 1).all()


def test_save_and_load_give_the_same_policy(tmp_path):
    policy = policy_of(seed=1)
    policy.save(tmp_path / "saved")
    cfg = ript.parse_config(["--model", f"{FILE}:Flow", "--checkpoint", str(tmp_path / "saved")])
    other = ript.load_policy(cfg.model).load(cfg)
    for one, two in zip(records_of(policy), records_of(other)):
        assert (one["chain"] == two["chain"]).all() and (one["log_prob"] == two["log_prob"]).all()
    assert {name.split(".")[0] for name, p in other.named_parameters() if p.requires_grad} == {"action_head"}


class Push(ript.Simulators):
    """A world of a few lines that rewards a chunk that moves forward on average, before four have run."""
    def __init__(self):
        self.all = []

    async def run_episode(self, run_episode, episode, *arguments):
        await run_episode(self, episode, *arguments, 32)

    async def call(self, method, argument):
        raw = {name: np.full((64, 64, 3), 99, np.uint8) for name in Flow.PICTURES}
        raw |= dict(robot0_eef_quat=np.array([0, 0, 0, 1.0]), robot0_eef_pos=np.zeros(3),
                    robot0_gripper_qpos=np.zeros(2))
        seen = Flow.preprocess(raw)
        if method == "reset":
            return ript.StepResult(0, False, seen)
        return ript.StepResult(len(argument), bool(argument[:, 0].mean() > 0.15), seen)


@pytest.mark.parametrize("kind", [Flow, FlowAll])
def test_collect_and_update_teach_it_to_push(kind):
    policy = policy_of(kind)
    cfg = ript.parse_config(["--model", f"{FILE}:Flow", "--rollouts", "4", "--groups", "4", "--lr", "2e-4",
                             "--max_rejected", "2", "--micro_batch", "64"])
    optimizer = torch.optim.AdamW(policy.parameter_groups(), cfg.lr, (0.0, 0.999))
    state = ript.TrainState()
    shares = []
    for state.iteration in range(3):
        episodes, stats = ript.collect(policy, Push(), partial(ript.Context, 0, "push"), state, cfg)
        shares.append(stats["rollout_success"])
        if episodes:
            diagnostics = ript.update(policy, optimizer, episodes, cfg, state)
            assert diagnostics["ratio_error"] < 2e-3 and diagnostics["grad_norm"] > 0
    assert shares[0] < 0.7 and shares[-1] > 0.9, shares
