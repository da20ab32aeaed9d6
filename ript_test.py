"""The claims of ript.py in the order of Algorithm 1, each as a test that fails when the claim does.

    python -m pytest -q ript_test.py        these alone: a minute
    bash run_libero.sh test                 these and tests/, which has one file per subject

The file runs beside ript.py alone, with a simulator and a policy that are a few lines of Python each. Tests
that need another part of the repository, or LIBERO, are skipped where it is missing, and say so.
"""
import asyncio
import contextlib
import copy
import json
import math
import os
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import ript  # before torch is: it says how OpenMP's threads wait

import numpy as np
import pytest
import torch
from torch import nn

from ript import Context, Episode

FILE = Path(__file__).resolve()


class ToySuite(ript.Suite):
    """A point in the plane that starts at 0 and must come close to a goal, on the left or on the right.

    A context's state, where it has one, says how close (metres) and how many seconds a reset takes.
    """
    INSTRUCTIONS = ("go left", "go right")
    HORIZON = 12
    CLOSE = 0.4

    def reset(self, context):
        self.close, seconds = (self.CLOSE, 0) if context.state is None else context.state
        time.sleep(seconds)
        x, y = np.random.default_rng(context.seed).uniform((0.8, -0.4), (1.2, 0.4))
        self.goal = np.array([(-x, x)[context.task], y])
        self.place = np.zeros(2)
        return ript.StepResult(0, False, self.get_observation())

    def control_step(self, action):
        self.place = self.place + action

    def success(self):
        return np.linalg.norm(self.place - self.goal) < self.close

    def get_observation(self):
        return dict(way=self.goal - self.place)


class EndingSuite(ToySuite):
    """The toy in which the first task always succeeds and the second from group 6 on, and never before."""
    def success(self):
        return self.context.task == 0 or self.context.seed >= ript.TRAIN_SEEDS + 6

    def reset(self, context):
        self.context = context
        return super().reset(context)


class ToyPolicy(ript.LaplacePolicy):
    """A linear map of the way to the goal: 0 at first, so that only exploration moves the point."""
    chunk = 4  # H
    scale_range = ((0.05, 0.05), (1.0, 1.0))

    def __init__(self):
        super().__init__()
        self.action_head = nn.Linear(4, 2, bias=False)  # (B, H, 4) -> (B, H, 2)
        self.scale_head = nn.Linear(4, 2).requires_grad_(False)
        nn.init.zeros_(self.action_head.weight)
        nn.init.zeros_(self.scale_head.weight)
        nn.init.constant_(self.scale_head.bias, math.log(0.2))

    @classmethod
    def load(cls, cfg):
        policy = cls()
        if cfg.checkpoint:
            policy.load_state_dict(torch.load(Path(cfg.checkpoint, "policy.pt"), weights_only=True))
        return policy

    @classmethod
    def preprocess(cls, raw):
        return raw["way"].astype(np.float32)

    def features(self, observations, instructions):
        way = torch.tensor(np.stack(observations))[:, None].expand(-1, self.chunk, -1)  # B H 2
        return torch.cat([way, way * torch.linspace(0, 1, self.chunk)[:, None]], -1)  # B H 4

    def to_env_actions(self, normalised):
        return normalised.clamp(-1, 1).double().numpy()

    def save(self, directory):
        with ript.writing(Path(directory, "policy.pt")) as path:
            torch.save(self.state_dict(), path)


# A forward has one observation, so that no timing changes a bit, and an iteration is one optimiser step.
TOY = dict(model=f"{FILE}:ToyPolicy", suite=f"{FILE}:ToySuite", device="cpu", groups=8, rollouts=4,
           max_rejected=8, minibatch=32, lr=0.05, adam_beta1=0, iterations=4, eval_contexts=10, eval_every=2,
           workers=2, act_batch=1)


def arguments(**changes):
    """The toy's command line."""
    return [word for name, value in (TOY | changes).items() for word in (f"--{name}", str(value))]


def toy_config(**changes):
    return ript.parse_config(arguments(**changes))


@pytest.fixture(scope="module")
def simulators():
    """Three of them, each a process."""
    with ript.open_simulators(toy_config(workers=3)) as simulators:
        yield simulators


@pytest.fixture(scope="module")
def lonely(simulators):
    """One of them."""
    lonely = copy.copy(simulators)
    lonely.all = simulators.all[:1]
    return lonely


def room(name):
    """A module of another part of the repository. Without it the test that asks for it is skipped."""
    return pytest.importorskip(name, reason=f"{name} is not beside ript.py")


def golden(name):
    """Arrays that the original code has computed."""
    return room("tests.conftest").golden(name)


def assert_close(a, b, tolerance=1e-6):
    a, b = torch.as_tensor(a).float(), torch.as_tensor(b).float()
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --------------------------------------------------------------------- Eq. 5 and the rejection, lines 7-14
def test_the_advantage_is_the_reward_minus_the_mean_of_the_others():
    rewards = torch.rand(5, 6)
    for c in range(5):
        for k in range(6):
            others = [rewards[c, j] for j in range(6) if j != k]
            assert_close(ript.leave_one_out_advantage(rewards)[c, k], rewards[c, k] - sum(others) / 5)


@pytest.mark.parametrize("shape", [(3, 1), (8,), (2, 3, 8)])
def test_a_single_rollout_has_no_baseline_and_rewards_are_groups_of_rollouts(shape):
    with pytest.raises(ValueError, match="K >= 2"):
        ript.leave_one_out_advantage(torch.ones(shape))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float64])
def test_rewards_may_be_of_any_type(kind):
    rewards = torch.tensor([[1, 0, 0], [1, 1, 1]]).to(kind)
    assert_close(ript.leave_one_out_advantage(rewards), [[1, -0.5, -0.5], [0, 0, 0]])
    assert ript.has_signal(rewards).tolist() == [True, False]


def test_the_advantage_agrees_with_the_original():
    g = golden("golden_math")
    for case in ("binary_3x8", "float_2x4"):
        ours = ript.leave_one_out_advantage(g[f"rloo_{case}_reward"])
        assert_close(ours.flatten(), g[f"rloo_{case}_adv_group"])


def test_a_group_is_rejected_exactly_where_every_advantage_is_zero():
    rewards = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1], [1, 1, 0], [0, 0, 1]])
    assert ript.has_signal(rewards).tolist() == [False, False, True, True, True, True]
    assert ript.has_signal(rewards).tolist() == (ript.leave_one_out_advantage(rewards) != 0).any(-1).tolist()


# ------------------------------------------------------------------------------------------- the density
def test_log_prob_is_the_density_of_a_laplace_in_float32_whatever_comes_in():
    action, mean, log_scale = torch.randn(4, 7), torch.randn(4, 7), torch.randn(4, 7)
    expected = torch.distributions.Laplace(mean, log_scale.exp()).log_prob(action).sum(-1)
    assert_close(ript.laplace_log_prob(action, mean, log_scale), expected, 1e-5)
    half = [x.bfloat16() for x in (action, mean, log_scale)]
    assert ript.laplace_log_prob(*half).dtype == torch.float32
    assert_close(ript.laplace_log_prob(*half), ript.laplace_log_prob(*[x.float() for x in half]), 0)


@pytest.mark.parametrize("clip", [False, True])
def test_log_prob_and_its_gradients_agree_with_the_original(clip):
    g, name = golden("golden_math"), "clip" if clip else "noclip"
    mean, log_scale = (g[f"laplace_{key}"].clone().requires_grad_() for key in ("mean", "log_scale"))
    b = log_scale.clamp(-2, 0.5) if clip else log_scale
    per_dim = ript.laplace_log_prob(g["laplace_action"][..., None], mean[..., None], b[..., None])
    assert_close(per_dim, g[f"laplace_logp_{name}"])
    assert_close(ript.laplace_log_prob(g["laplace_action"], mean, b), g[f"laplace_logp_{name}"].sum(-1), 2e-6)
    (per_dim * g["laplace_weight"]).sum().backward()
    assert_close(mean.grad, g[f"laplace_dmean_{name}"])
    assert_close(log_scale.grad, g[f"laplace_dlogscale_{name}"])


# --------------------------------------------------------------------------- weights, mask and Eq. 6, line 16
def made_up_loss():
    """Log-probabilities, advantages and a mask of three episodes, with steps on both sides of a clip."""
    change = torch.tensor([[0.4, -0.4, 2, 2, 2], [0.05, 0.4, -0.4, -0.05, 0.2], [-0.4, 2, 0.4, 2, 2]])
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 0]]).bool()
    old = torch.linspace(-3, 3, 15).view(3, 5)
    return old + change, old, torch.tensor([1.0, -0.5, 0.25]), mask


def test_weights_sum_to_one_and_make_a_mean_over_episodes_or_over_tokens():
    mask = made_up_loss()[3]
    assert_close(ript.loss_weight(mask)[0], [1 / 6, 1 / 6, 0, 0, 0])
    assert_close(ript.loss_weight(mask)[1], [1 / 15] * 5)
    assert_close(ript.loss_weight(mask, "token"), mask / 9)
    for per in ("episode", "token"):
        assert_close(ript.loss_weight(mask, per).sum(), 1)
        assert ript.loss_weight(torch.zeros(2, 3).bool(), per).sum() == 0
    # An episode that was solved at its reset has no steps: its share is missing.
    assert_close(ript.loss_weight(torch.tensor([[True, True], [False, False]])).sum(), 0.5)
    with pytest.raises(ValueError, match="episode"):
        ript.loss_weight(mask, "step")


@pytest.mark.parametrize("per", ["episode", "token"])
@pytest.mark.parametrize("clip", [0.2, (0.1, 0.3)])
def test_the_loss_is_the_weighted_sum_of_the_clipped_terms(per, clip):
    new, old, advantage, mask = made_up_loss()
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    weight = ript.loss_weight(mask, per)
    terms = dict(loss=0.0, ratio=0.0, clip_frac=0.0, outside_clip=0.0, approx_kl=0.0)
    for e, s in mask.nonzero().tolist():
        a, w = advantage[e].item(), weight[e, s].item()
        r = math.exp(new[e, s] - old[e, s])
        clipped = min(max(r, 1 - low), 1 + high)
        terms["loss"] -= min(r * a, clipped * a) * w
        terms["ratio"] += r * w
        terms["clip_frac"] += (clipped * a < r * a) * w
        terms["outside_clip"] += (clipped != r) * w
        terms["approx_kl"] += (r - 1 - math.log(r)) * w
    loss, stats = ript.ppo_clip_loss(new, old, advantage, weight, clip)
    assert_close(loss, terms.pop("loss"))
    assert terms["outside_clip"] > terms["clip_frac"] > 0
    for name, value in terms.items():
        assert_close(stats[name], value)


@pytest.mark.parametrize("ratio,advantage,moves", [(1.3, 1.0, False), (0.7, 1.0, True), (1.1, 1.0, True),
                                                   (1.3, -1.0, True), (0.7, -1.0, False), (0.9, -1.0, True)])
def test_the_clip_cuts_the_gradient_only_where_a_step_has_gone_far_enough(ratio, advantage, moves):
    log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    loss, _ = ript.ppo_clip_loss(log_prob, 0 * one, torch.tensor([advantage]), one, clip=0.2)
    loss.backward()
    assert_close(log_prob.grad, [[-ratio * advantage * moves]])


@pytest.mark.parametrize("ratio,advantage,moves", [(1.25, 1.0, True), (1.35, 1.0, False),
                                                   (0.85, -1.0, False)])
def test_a_pair_clips_below_by_its_first_and_above_by_its_second(ratio, advantage, moves):
    log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    ript.ppo_clip_loss(log_prob, 0 * one, torch.tensor([advantage]), one, clip=(0.1, 0.3))[0].backward()
    assert (log_prob.grad != 0).item() == moves


@pytest.mark.parametrize("sign,advantage", [("advpos", 0.625), ("advneg", -0.375)])
def test_the_loss_and_its_gradients_agree_with_the_original(sign, advantage):
    g = golden("golden_math")
    mean, log_scale = (g[f"ppo_{key}"].clone().requires_grad_() for key in ("mean", "log_scale"))
    low, high, accumulation, tokens = g["ppo_constants"].tolist()
    log_prob = ript.laplace_log_prob(g["ppo_action"], mean, log_scale.clamp(-2, 0.5)).flatten()[None]
    old = g["ppo_ref_logprob"].sum(-1).flatten()[None]
    weight = ript.loss_weight(torch.ones_like(old, dtype=torch.bool))
    loss, stats = ript.ppo_clip_loss(log_prob, old, torch.tensor([advantage]), weight, (low, high))
    # The original divides by all steps of the episode and by the accumulation; here is a part of the steps.
    loss = loss * old.shape[1] / (g["ppo_num_valid_step"].item() * tokens) / accumulation
    loss.backward()
    prefix = f"ppo_sum_on_action_dim_fp32_{sign}"
    assert_close(loss, g[f"{prefix}_loss"])
    assert_close(stats["ratio"], g[f"{prefix}_ratio"].mean(), 1e-5)
    assert_close(stats["clip_frac"], g[f"{prefix}_clipfrac"])
    assert_close(mean.grad, g[f"{prefix}_dmean"])
    assert_close(log_scale.grad, g[f"{prefix}_dlogscale"])


def test_what_was_not_executed_reaches_neither_the_loss_nor_the_gradient():
    new, old, advantage, mask = made_up_loss()
    weight = ript.loss_weight(mask)
    poisoned = torch.where(mask, new, float("nan")).requires_grad_()
    loss, stats = ript.ppo_clip_loss(poisoned, old, advantage, weight)
    loss.backward()
    assert (poisoned.grad[~mask] == 0).all() and torch.isfinite(poisoned.grad).all()
    assert (poisoned.grad[mask] != 0).any() and stats["approx_kl"] > 0
    assert_close(loss.detach(), ript.ppo_clip_loss(new, old, advantage, weight)[0])


FORMULAS_ALONE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in "mujoco robosuite h5py matplotlib transformers peft libero tqdm".split():
            raise ImportError(name)

sys.meta_path.insert(0, Block())
import torch, ript
weight = ript.loss_weight(torch.ones(2, 3).bool())
advantage = ript.leave_one_out_advantage(torch.eye(2))[0]
print(ript.ppo_clip_loss(torch.zeros(2, 3), torch.zeros(2, 3), advantage, weight)[0])
"""


def test_the_formulas_need_nothing_but_torch_and_numpy():
    command = [sys.executable, "-c", FORMULAS_ALONE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FILE.parent)
    assert done.returncode == 0 and "tensor(" in done.stdout, done.stderr


# --------------------------------------------------------------------------------- the Laplace policy, line 5
def observations_of(n, seed=0):
    return list(np.random.default_rng(seed).standard_normal((n, 2)).astype(np.float32))


def explore(policy, n, seed=0):
    """n chunks of a policy that explores, each with a generator of its own."""
    generators = [np.random.default_rng([seed, i]) for i in range(n)]
    return policy.act(observations_of(n, seed), ["go left"] * n, generators)


def column(chunks, name):
    return np.stack([chunk[name] for chunk in chunks])


def test_the_multiplier_comes_before_the_clamp_so_that_the_scale_head_decides():
    policy = ToyPolicy()
    policy.scale_head.requires_grad_(True)
    policy.scale_multiplier = 5.0
    seen = []
    for b in (0.005, 0.03, 0.05, 0.5):
        with torch.no_grad():
            policy.scale_head.bias.fill_(math.log(b))
        chunk, = policy.act(observations_of(1), ["go left"], [None])
        seen.append((round(chunk["scale"], 5), chunk["at_low"], chunk["at_high"]))
        policy.zero_grad()
        policy.density(observations_of(1), ["go left"])[1].sum().backward()
        assert (policy.scale_head.bias.grad.abs().max() > 0) == (0.05 < 5 * b < 1)
    assert seen == [(0.05, 1, 0), (0.15, 0, 0), (0.25, 0, 0), (1.0, 0, 1)]


def test_an_action_is_scored_with_the_density_that_drew_it():
    policy = ToyPolicy()
    policy.scale_multiplier = 2.0
    nn.init.normal_(policy.action_head.weight)
    chunks = explore(policy, 3)
    with torch.no_grad():
        mean, log_scale = policy.density(observations_of(3), ["go left"] * 3)
        assert_close(policy.log_prob(chunks), column(chunks, "log_prob"), 1e-5)
    sample = torch.tensor(column(chunks, "sample"))
    expected = torch.distributions.Laplace(mean, log_scale.exp()).log_prob(sample).sum(-1)
    assert_close(column(chunks, "log_prob"), expected, 1e-4)
    assert_close(log_scale.exp(), torch.full((3, 4, 2), 0.4), 1e-6)


def test_exploration_is_laplace_noise_around_the_mean_and_without_a_generator_there_is_none():
    policy = ToyPolicy()
    nn.init.normal_(policy.action_head.weight)
    with torch.no_grad():
        mean, log_scale = policy.density(observations_of(1), ["go left"])
    generators = [np.random.default_rng(i) for i in range(2000)]
    chunks = policy.act(observations_of(1) * 2000, ["go left"] * 2000, generators)
    noise = (column(chunks, "sample") - mean[0].numpy()) / log_scale[0].exp().numpy()
    assert abs(noise.mean()) < 0.03 and abs(np.abs(noise).mean() - 1) < 0.03  # E|x| = b,
    assert abs((noise ** 2).mean() - 2) < 0.1  # and E x^2 = 2 b^2
    chunk, = policy.act(observations_of(1), ["go left"], [None])
    assert (chunk["sample"] == mean[0].numpy()).all()


def test_an_action_is_a_function_of_its_observation_and_its_generator():
    policy = ToyPolicy()
    chunks = explore(policy, 5)
    for i in range(5):
        again, = policy.act(observations_of(5)[i:i + 1], ["go left"], [np.random.default_rng([0, i])])
        assert (again["sample"] == chunks[i]["sample"]).all()
    assert (column(chunks, "sample")[0] != column(chunks, "sample")[1]).all()


# --------------------------------------------------------------------------------- contexts and rollouts, 4-6
def toy_context(number, close=ToySuite.CLOSE, seconds=0.0):
    task = number % 2
    return Context(task, ToySuite.INSTRUCTIONS[task], number, np.array([close, seconds]))


def collected(simulators, contexts=toy_context, policy=None, state=None, **settings):
    """The kept episodes, the statistics, and the state afterwards."""
    state = state or ript.TrainState()
    episodes, stats = ript.collect(policy or ToyPolicy(), simulators, contexts, state, toy_config(**settings))
    return episodes, stats, state


def fingerprint(episodes):
    """All that a rollout has done, bit by bit."""
    samples = [chunk["sample"].tobytes() for episode in episodes for chunk in episode.chunks]
    return [(e.group, e.context.seed, tuple(e.num_executed), e.success) for e in episodes], samples


def scene(raw):
    return np.concatenate([np.asarray(raw[name], dtype=float).flatten() for name in sorted(raw)])


@pytest.mark.parametrize("name", ["toy", "tabletop", "libero_object"])
def test_resets_to_a_context_give_one_scene_and_other_seeds_give_others(name):
    if name == "libero_object":
        libero = pytest.importorskip("libero.libero", reason="LIBERO is not installed")
        if not Path(libero.get_libero_path("assets")).is_dir():
            pytest.skip("LIBERO's meshes are not there: run libero-download-assets")
    if name == "tabletop":
        room("simulators.tabletop")
    simulator = ript.load_suite(f"{FILE}:ToySuite" if name == "toy" else name)(64, True)
    wide = 2 if name == "toy" else 7

    def run(seed):
        """The first observation of an episode of random actions, and the last."""
        first = simulator.reset(Context(0, "", seed)).observation
        actions = np.random.default_rng(1).uniform(-0.3, 0.3, (8, wide))
        return scene(first), scene(simulator.step(actions).observation)

    first, last = run(5)
    other, _ = run(6)
    again = run(5)
    assert (first == again[0]).all() and (last == again[1]).all()
    assert np.abs(first - other).max() > 1e-3 and np.abs(first - last).max() > 1e-3
    if name != "toy":
        simulator.env.close()


def test_the_rollouts_of_a_group_share_their_scene_and_nothing_else(simulators):
    episodes, _, _ = collected(simulators, groups=2, rollouts=4)
    groups = [episodes[:4], episodes[4:]]
    starts = [{tuple(episode.chunks[0]["observation"]) for episode in group} for group in groups]
    assert [len(start) for start in starts] == [1, 1] and starts[0] != starts[1]
    for group in groups:
        assert len({episode.chunks[0]["sample"].tobytes() for episode in group}) == 4


def test_no_two_rollouts_of_a_run_explore_alike(simulators):
    first = []
    for iteration, seed in ((0, 0), (1, 0), (0, 1)):
        episodes, _, _ = collected(simulators, state=ript.TrainState(iteration), groups=2, seed=seed)
        first += [chunk["sample"].tobytes() for episode in episodes for chunk in episode.chunks]
    assert len(first) > 24 and len(set(first)) == len(first)


def test_training_contexts_take_the_tasks_in_turn_and_no_seed_of_another_run_or_of_evaluation():
    contexts = [ript.training_context(n, toy_config(seed=s)) for s in (0, 1) for n in (0, 1, 7)]
    assert [context.task for context in contexts] == [0, 1, 1] * 2
    held_out = ript.evaluation_contexts(toy_config())
    assert [(c.task, c.seed) for c in held_out] == [(task, seed) for task in (0, 1) for seed in range(10)]
    assert len({c.seed for c in contexts} | {c.seed for c in held_out}) == 6 + 10


def test_a_chunk_ends_at_the_step_that_succeeds_and_an_episode_at_the_horizon(simulators):
    def contexts(number):
        return toy_context(number, close=[0.4, 0.6][number % 2])

    episodes, stats, _ = collected(simulators, contexts, groups=4)
    lengths = [(episode.success, tuple(episode.num_executed)) for episode in episodes]
    assert all(ran == (4, 4, 4) for success, ran in lengths if not success)  # 12 control steps
    assert all(set(ran[:-1]) <= {4} and 1 <= ran[-1] <= 4 for success, ran in lengths if success)
    assert any(ran[-1] < 4 for success, ran in lengths if success)
    for episode in episodes:
        simulator = ToySuite()
        simulator.reset(episode.context)
        for chunk, ran in zip(episode.chunks, episode.num_executed):
            answer = simulator.step(chunk["sample"].clip(-1, 1))
            assert answer.num_executed == ran
        assert answer.success == episode.success


def test_a_chunk_is_cut_where_the_horizon_is_no_multiple_of_it(simulators, monkeypatch):
    monkeypatch.setattr(ript.load_suite(TOY["suite"]), "HORIZON", 10)
    episodes, _, _ = collected(simulators, groups=2)
    assert {tuple(episode.num_executed) for episode in episodes if not episode.success} == {(4, 4, 2)}


def test_a_reward_is_a_bool_whatever_the_simulator_answers(simulators):
    episodes, _, _ = collected(simulators, groups=1)
    assert {type(episode.success) for episode in episodes} == {bool}  # the simulator answers numpy's


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_rollouts_that_wait_at_the_same_time_share_a_forward(simulators, batch):
    sizes = []

    class Slow(ToyPolicy):
        def act(self, observations, *rest):
            sizes.append(len(observations))
            time.sleep(0.05)
            return super().act(observations, *rest)

    collected(simulators, policy=Slow(), groups=2, act_batch=batch)
    assert max(sizes) in {0: (2, 3), 1: (1,), 2: (2,)}[batch]


def test_a_forward_that_fails_ends_the_run_with_its_error(simulators):
    class Broken(ToyPolicy):
        def act(self, *_):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        collected(simulators, policy=Broken())


def break_policy(policy):
    with torch.no_grad():
        policy.action_head.weight[1] = math.nan


def test_an_action_that_is_not_finite_stops_the_run_and_the_episode_is_named(simulators):
    policy = ToyPolicy()
    break_policy(policy)
    with pytest.raises(RuntimeError, match="action is not finite in Episode.context=Context.task="):
        collected(simulators, policy=policy)


# ---------------------------------------------------------------------------- what is kept, lines 10-14
@pytest.mark.parametrize("even,odd,solved,failed", [(0, 0, 0, 5), (9, 9, 5, 0), (0, 9, 2, 3)])
def test_groups_without_signal_are_replaced_up_to_the_cap(simulators, even, odd, solved, failed):
    def contexts(number):
        return toy_context(number, close=(even, odd)[number % 2])

    episodes, stats, state = collected(simulators, contexts, groups=2, rollouts=2, max_rejected=3)
    assert episodes == [] and (stats["kept"], stats["all_success"], stats["all_fail"]) == (0, solved, failed)
    assert state.group == 5 and stats["rollouts"] == 10  # 2 groups, and one more for each of 3 rejections


def sometimes(number):
    """Contexts of which every third cannot be solved."""
    return toy_context(number, ToySuite.CLOSE * (number % 3 > 0))


@pytest.fixture(scope="module")
def stream(simulators):
    """Which of the first 20 groups have signal, and their episodes."""
    episodes, _, _ = collected(simulators, sometimes, groups=20, max_rejected=0)
    groups = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode)
    assert len(groups) > 5 and all(len({e.success for e in group}) == 2 for group in groups.values())
    return groups


@pytest.mark.parametrize("workers", ["lonely", "simulators"])
@pytest.mark.parametrize("slow", [1, -1])
def test_what_is_kept_is_the_first_groups_with_signal_whatever_the_timing(request, stream, workers, slow):
    def contexts(number):
        context = sometimes(number)
        context.state[1] = 0.03 * (slow * number % 4)  # seconds of a reset
        return context

    simulators = request.getfixturevalue(workers)
    episodes, stats, state = collected(simulators, contexts, groups=4, max_rejected=16)
    first = list(stream)[:4]
    assert fingerprint(episodes) == fingerprint([episode for number in first for episode in stream[number]])
    assert stats["kept"] == 4 and state.group == first[-1] + 1 == stats["rollouts"] / 4


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_takes_every_second_group_and_keeps_its_share(simulators, stream, monkeypatch, rank):
    monkeypatch.setattr(ript, "WORLD", 2)
    monkeypatch.setattr(ript, "RANK", rank)
    monkeypatch.setattr(ript, "all_gather", lambda value: [value, value + 3 if type(value) is int else value])
    episodes, _, state = collected(simulators, sometimes, groups=4, max_rejected=16)
    mine = [number for number in stream if number % 2 == rank][:2]
    assert [episode.group for episode in episodes[::4]] == mine
    assert state.group == mine[-1] - rank + 2 + 2 * 3  # all go on beyond the one that drew three groups more


# ----------------------------------------------------------------------------------- update, lines 15-17
def made_up_episodes(policy, n=6):
    """Three groups of two episodes of two or three queries, the policy's own, the last chunk cut short."""
    episodes = []
    for i in range(n):
        chunks = explore(policy, 2 + i % 2, seed=i)
        executed = [4] * (len(chunks) - 1) + [3]
        episodes.append(Episode(Context(0, "go left", 0), i // 2, (0, 0, i // 2, i % 2), chunks, executed,
                                i % 2 == 0))
    return episodes


def updated(policy, episodes, optimizer=None, **settings):
    """The statistics of an update: by default a step of gradient descent over all episodes, unclipped."""
    optimizer = optimizer or torch.optim.SGD(policy.parameter_groups(), lr=1.0)
    settings = dict(minibatch=6, rollouts=2, max_grad_norm=1e9) | settings
    return ript.update(policy, optimizer, episodes, toy_config(**settings), ript.TrainState())


def weights_of(policy):
    return torch.cat([p.detach().flatten() for p in policy.action_head.parameters()])


def trained_policy():
    """A policy that has learned something, so that its gradients are none of a special case."""
    torch.manual_seed(0)
    policy = ToyPolicy()
    nn.init.normal_(policy.action_head.weight, std=0.3)
    return policy


def plainly_updated(policy, episodes, per, epochs, clip):
    """What update does with one minibatch, written out: one episode after another, no padding, no parts."""
    old = [policy.log_prob(episode.chunks).detach() for episode in episodes]
    steps = sum(sum(episode.num_executed) for episode in episodes)
    for _ in range(epochs):
        loss = 0.0
        for i, episode in enumerate(episodes):
            advantage = 1.0 if episode.success else -1.0  # of two, of which one succeeded
            ratio = (policy.log_prob(episode.chunks) - old[i]).exp()  # Q H
            for q, ran in enumerate(episode.num_executed):
                term = torch.minimum(ratio[q] * advantage, ratio[q].clamp(1 - clip, 1 + clip) * advantage)
                part = 1 / steps if per == "token" else 1 / len(episodes) / sum(episode.num_executed)
                loss = loss - term[:ran].sum() * part
        gradient = torch.autograd.grad(loss, policy.parameter_groups()[0]["params"])
        with torch.no_grad():
            for p, g in zip(policy.parameter_groups()[0]["params"], gradient):
                p -= 0.1 * g
    return weights_of(policy)


@pytest.mark.parametrize("per", ["episode", "token"])
@pytest.mark.parametrize("micro_batch", [1, 4, 1000])
def test_micro_batches_add_up_to_the_whole_minibatch(per, micro_batch):
    policy = trained_policy()
    episodes = made_up_episodes(policy)
    optimizer = torch.optim.SGD(policy.parameter_groups(), lr=0.1)
    stats = updated(policy, episodes, optimizer, loss_per=per, micro_batch=micro_batch, ppo_epochs=2)
    expected = plainly_updated(trained_policy(), episodes, per, 2, clip=0.1)
    assert_close(weights_of(policy), expected, 1e-5)
    assert (expected - weights_of(trained_policy())).norm() > 0.05 and stats["clip_frac"] > 0.05


def test_action_steps_after_success_do_not_count():
    moved = []
    for change in (0.0, 3.0):
        policy = trained_policy()
        episodes = made_up_episodes(policy)
        for episode in episodes:
            episode.chunks[-1]["sample"][3] += change  # the last chunk's fourth step, which did not run
        updated(policy, episodes)
        moved.append(weights_of(policy))
    assert (moved[0] == moved[1]).all()


def test_a_step_that_did_not_run_may_be_anything():
    moved = []
    for value in (0.0, math.nan, math.inf):
        policy = trained_policy()
        policy.scale_head.requires_grad_(True)
        episodes = made_up_episodes(policy)
        for episode in episodes:
            episode.chunks[-1]["sample"][3] = value
        assert math.isfinite(updated(policy, episodes)["loss"])
        moved.append(torch.cat([weights_of(policy), policy.scale_head.bias.detach()]))
    assert (moved[0] == moved[1]).all() and (moved[0] == moved[2]).all()


def test_an_update_starts_at_ratio_one_and_makes_rewarded_actions_likelier():
    policy = trained_policy()
    episodes = made_up_episodes(policy)
    before = [policy.log_prob(episode.chunks).mean().item() for episode in episodes]
    scale_head = [p.clone() for p in policy.scale_head.parameters()]
    stats = updated(policy, episodes, torch.optim.SGD(policy.parameter_groups(), lr=1e-3))
    assert stats["updates"] == 1 and abs(stats["ratio"] - 1) < 1e-6 and stats["ratio_error"] < 1e-4
    change = [policy.log_prob(e.chunks).mean().item() - b for e, b in zip(episodes, before)]
    assert sum(change[::2]) > 0 > sum(change[1::2])  # the first of each group was rewarded
    assert all((a == b).all() for a, b in zip(scale_head, policy.scale_head.parameters()))


def test_old_log_probabilities_come_from_the_updates_own_computation():
    policy = trained_policy()
    episodes = made_up_episodes(policy)
    for episode in episodes:
        for chunk in episode.chunks:
            chunk["log_prob"] = chunk["log_prob"] + np.float32(0.1)  # as another kernel might have it
    stats = updated(policy, episodes)
    assert abs(stats["ratio"] - 1) < 1e-5 and stats["act_std"] < 1e-4
    assert stats["ratio_error"] == pytest.approx(math.exp(0.1) - 1, rel=1e-3)


class FarFromExact(ToyPolicy):
    """A policy whose log-probabilities depend on what else is in the batch, as in bfloat16 on a GPU."""

    def log_prob(self, chunks):
        beside = sum(float(chunk["sample"].sum()) for chunk in chunks)
        return super().log_prob(chunks) + math.sin(1000 * beside)


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("micro_batch", [2, 3])
def test_without_steps_every_ratio_is_exactly_one_whatever_the_batches(micro_batch, epochs):
    policy = FarFromExact()
    stats = updated(policy, made_up_episodes(policy), torch.optim.SGD(policy.parameter_groups(), lr=0.0),
                    minibatch=4, micro_batch=micro_batch, ppo_epochs=epochs)
    # Minibatches are drawn, and their last micro-batches are smaller ones.
    assert stats["updates"] == 2 * epochs
    assert stats["ratio"] == pytest.approx(1, abs=1e-6) and stats["approx_kl"] == 0


def test_later_passes_change_the_order_of_minibatches_and_nothing_else():
    seen = []

    class Seen(ToyPolicy):
        def log_prob(self, chunks):
            seen.append(tuple(chunk["sample"].tobytes() for chunk in chunks))
            return super().log_prob(chunks)

    policy = Seen()
    updated(policy, made_up_episodes(policy), minibatch=1, ppo_epochs=4)
    passes = [seen[start:start + 6] for start in range(0, len(seen), 6)][1:]  # after the old log_probs
    assert len(passes) == 4 and all(set(one) == set(passes[0]) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


@pytest.mark.parametrize("minibatch,epochs,steps", [(6, 1, 1), (4, 1, 2), (2, 3, 9)])
def test_each_pass_has_every_episode_once_in_minibatches_of_the_size(minibatch, epochs, steps):
    seen = []

    class Seen(ToyPolicy):
        def log_prob(self, chunks):
            if torch.is_grad_enabled():
                seen.extend(chunk["sample"].tobytes() for chunk in chunks)
            return super().log_prob(chunks)

    policy = Seen()
    episodes = made_up_episodes(policy)
    assert updated(policy, episodes, minibatch=minibatch, ppo_epochs=epochs)["updates"] == steps
    chunks = [chunk["sample"].tobytes() for episode in episodes for chunk in episode.chunks]
    # Old log-probabilities, once, may have been computed with gradient too.
    assert sorted(seen[-epochs * len(chunks):]) == sorted(chunks * epochs)


def test_the_norm_of_the_gradient_is_clipped():
    policy = trained_policy()
    before = weights_of(policy)
    stats = updated(policy, made_up_episodes(policy), max_grad_norm=0.01)
    assert stats["grad_norm"] > 0.1 and (weights_of(policy) - before).norm() == pytest.approx(0.01, rel=1e-3)


def test_what_is_not_finite_stops_the_run_before_the_step(monkeypatch):
    policy = trained_policy()
    episodes = made_up_episodes(policy)
    before = weights_of(policy)
    with monkeypatch.context() as patch:
        advantage = ript.leave_one_out_advantage
        patch.setattr(ript, "leave_one_out_advantage", lambda rewards: advantage(rewards) * math.nan)
        with pytest.raises(RuntimeError, match="the gradient is not finite in iteration 1"):
            updated(policy, episodes)
    assert (weights_of(policy) == before).all()
    break_policy(policy)
    with pytest.raises(RuntimeError, match="log_prob is not finite in Episode.context=Context.task=0"):
        updated(policy, episodes)


# ---------------------------------------------------------------------------------- evaluation and whole runs
def test_a_groups_own_learning_rate_is_kept_and_anneals_as_the_default_does(monkeypatch, tmp_path):
    class Grouped(ToyPolicy):
        def __init__(self):
            super().__init__()
            self.scale_head.requires_grad_(True)

        def parameter_groups(self):
            head = dict(params=list(self.scale_head.parameters()), lr=0.5)
            return [head, dict(params=list(self.action_head.parameters()))]

    rates = []

    def update(policy, optimizer, episodes, cfg, state):
        rates.append([group["lr"] for group in optimizer.param_groups])
        assert [group["betas"] for group in optimizer.param_groups] == 2 * [(0, 0.999)]
        return dict(loss=0.0)

    monkeypatch.setattr(ript, "load_policy", lambda name: Grouped)
    monkeypatch.setattr(ript, "update", update)
    monkeypatch.setattr(ript, "evaluate", lambda *arguments: 0.0)
    stats = dict(kept=1, rollout_success=0.5)
    monkeypatch.setattr(ript, "collect", lambda *arguments: ([], dict(stats)))
    monkeypatch.setattr(ript, "open_simulators", contextlib.nullcontext)
    ript.main([*arguments(out=tmp_path / "run", iterations=2), "--anneal"])
    assert rates == [[0.5, 0.05], [0.25, 0.025]]
    ript.main(["--resume", str(tmp_path / "run"), "--iterations", "4"])
    assert rates[2:] == [[0.25, 0.025], [0.125, 0.0125]]


def test_an_evaluation_acts_with_the_mean(simulators, tmp_path):
    seen = []

    class Watched(ToyPolicy):
        def act(self, observations, instructions, generators):
            seen.extend(generators)
            return super().act(observations, instructions, generators)

    cfg = toy_config(out=tmp_path, eval_contexts=2)
    ript.evaluate(Watched(), simulators, ript.evaluation_contexts(cfg), cfg, "mean")
    assert len(seen) == 4 * 3 and set(seen) == {None}
    episode = Episode(ript.evaluation_contexts(cfg)[0], deterministic=True)
    actor = ript.Actor(ToyPolicy(), 1)
    asyncio.run(simulators.run([simulators.run_episodes(ript.rollout, [episode], actor)], "one"))
    assert len(episode.chunks) == 3  # whose pictures, which nothing learns from, are not kept
    assert not any("observation" in chunk for chunk in episode.chunks)


def launch(*command, timeout=300):
    """A command, which must succeed: what it printed."""
    command = [sys.executable, *map(str, command)]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def rows_of(out):
    """The metrics of a run, without those of time and memory."""
    rows = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if "second" not in name and "_gb" not in name} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The toy's run, four iterations: its directory and what it printed."""
    out = tmp_path_factory.mktemp("toy") / "run"
    return out, launch(FILE.with_name("ript.py"), *arguments(out=out))


def test_a_policy_that_explores_learns_a_task_that_it_never_solves_at_first(finished):
    rows = rows_of(finished[0])
    assert rows[0]["eval_success"] == 0 and rows[-1]["eval_success"] > 0.9
    assert rows[1]["rollout_success"] < 0.4 < 0.6 < rows[-1]["rollout_success"]
    # Before the first update, after every second iteration, and after the last.
    assert [row["iteration"] for row in rows if "eval_success" in row] == [0, 2, 4]


def test_a_run_prints_a_line_per_iteration_and_writes_metrics_checkpoints_and_outcomes(finished):
    out, printed = finished
    files = {path.name for path in out.glob("[!.]*")}
    assert files == {"config.json", "versions.json", "metrics.jsonl", "run.pt", "last",
                     "evaluation_SFT.json", "evaluation_RIPT.json"}
    versions = json.loads((out / "versions.json").read_text())
    assert versions["torch"] == metadata.version("torch") and versions["numpy"] == np.__version__
    assert [row["iteration"] for row in rows_of(out)] == list(range(5))
    lines = [line for line in printed.splitlines() if line.startswith("iteration ")]
    assert all(any(line.startswith(f"iteration {i} ") for line in lines) for i in range(5))
    assert max(map(len, lines)) <= 100
    outcomes = json.loads((out / "evaluation_RIPT.json").read_text())["outcomes"]
    assert len(outcomes) == 20 and sum(outcomes.values()) / 20 == rows_of(out)[-1]["eval_success"]


def test_what_a_run_saves_is_what_it_has_evaluated(finished, tmp_path):
    run, out = finished[0], tmp_path / "evaluation"
    ript.main(arguments(checkpoint=run / "last", out=out, workers=1) + ["--eval"])
    evaluated, ended = out / "evaluation_success.json", run / "evaluation_RIPT.json"
    evaluated, ended = (json.loads(path.read_text()) for path in (evaluated, ended))
    # They say which policy they are of, and with which settings it was evaluated.
    assert evaluated["outcomes"] == ended["outcomes"] and evaluated["policy"] == ended["policy"]
    assert evaluated["settings"] | dict(eval=False, checkpoint="") == ended["settings"]


def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path):
    out = tmp_path / "run"
    ript.main(arguments(out=out, iterations=2, workers=1))
    assert len(rows_of(out)) == 3
    ript.main(["--resume", str(out), "--iterations", "4"])
    assert rows_of(out) == rows_of(finished[0])
    for name in ("last/policy.pt", "evaluation_SFT.json", "evaluation_RIPT.json"):
        assert (out / name).read_bytes() == (finished[0] / name).read_bytes()


# --------------------------------------------------------------------------------- what a run may write to


# ------------------------------------------------------------------------------------- the machine it runs on


# Where nothing is replaced, the groups are the same for any number of processes.
SHARED = dict(groups=6, max_rejected=0, iterations=3, eval_contexts=4, workers=1)


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    ript.main(arguments(out=out, **SHARED))
    return out


@pytest.mark.parametrize("parts", [[(2, 2), (1, 3)], [(1, 1), (3, 3)]])
def test_any_number_of_processes_gives_the_gradient_of_one_also_where_the_number_changes(
        of_one_process, tmp_path, parts):
    """Parts are numbers of processes, and of the iteration up to which they run: then others resume."""
    out = tmp_path / "run"
    words = arguments(out=out, **SHARED)
    for processes, iterations in parts:
        words += ["--iterations", str(iterations)]
        if processes == 1:
            ript.main(words)
        else:
            torchrun = "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"
            launch(*torchrun, FILE.with_name("ript.py"), *words)
        words = ["--resume", str(out)]
    rows, others = rows_of(out), rows_of(of_one_process)
    assert 1 < others[1]["kept"] < 6 and others[3]["eval_success"] > 0  # the shares are unequal
    for row, other in zip(rows, others, strict=True):
        # From the second iteration on rollouts start from parameters that differ by rounding.
        tolerance = 1e-5 if row["iteration"] < 2 else 1e-3
        for name in set(other) - {"ratio_error", "act_std"}:  # which are rounding itself
            assert row[name] == pytest.approx(other[name], rel=tolerance, abs=1e-6), name
    ours, theirs = (torch.load(run / "last/policy.pt", weights_only=True) for run in (out, of_one_process))
    assert_close(ours["action_head.weight"], theirs["action_head.weight"], 1e-5)
    ours, theirs = (json.loads((run / "evaluation_RIPT.json").read_text()) for run in (out, of_one_process))
    assert ours["outcomes"] == theirs["outcomes"]


def test_a_run_ends_where_every_rollout_of_every_process_has_succeeded(tmp_path, capsys):
    """In its first iteration all succeed in the first process and none in the second, and it goes on."""
    words = arguments(**SHARED | dict(iterations=9), out=tmp_path / "run", suite=f"{FILE}:EndingSuite")
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    printed = launch(*torchrun, FILE.with_name("ript.py"), *words)
    rows = rows_of(tmp_path / "run")
    assert [(row["all_success"], row["all_fail"]) for row in rows[1:]] == [(3, 3), (6, 0)]
    said = "the run is done: every rollout of iteration 2 has succeeded\n"
    assert printed.count(said) == 1 and rows[-1]["eval_success"] == 0.5
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    ript.main(["--resume", str(tmp_path / "run"), "--iterations", "20", "--workers", "1"])
    assert said in capsys.readouterr().out
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert changed == ["config.json"]  # which has the new number of iterations


def test_files_are_written_whole_or_not_at_all(tmp_path):
    def limit(size):  # of files, as a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    big = torch.zeros(10 ** 6)
    writers = dict(text=lambda path: path.write_text("x" * 10 ** 6), pt=lambda path: torch.save(big, path))
    for suffix, writer in writers.items():
        path = tmp_path / f"file.{suffix}"
        path.with_name(f"{path.name}.tmp").mkdir()  # left by a run that was killed
        with ript.writing(path) as temporary:
            temporary.write_text("first")
        limit(100_000)
        try:
            with pytest.raises(ript.UserError, match=f"cannot write {path}: "):
                with ript.writing(path) as temporary:
                    writer(temporary)
        finally:
            limit(resource.RLIM_INFINITY)
        assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
        path.unlink()


# ------------------------------------------------------------------------------ the formulas without a robot
def test_the_formulas_solve_a_bandit_and_with_the_sign_flipped_they_unlearn_it():
    """40 steps with a Laplace policy find an interval that it first hits one time in ten."""
    def learn(sign):
        torch.manual_seed(0)
        mean, log_scale = torch.zeros(1, requires_grad=True), torch.tensor([math.log(0.3)])
        optimizer, share = torch.optim.Adam([mean], 0.05), []
        for _ in range(40):
            action = mean.detach() + torch.distributions.Laplace(0.0, 0.3).sample((16, 8, 1))  # C K A
            rewards = ((action > 0.5) & (action < 1.0))[..., 0]
            share.append(rewards.float().mean().item())
            kept = ript.has_signal(rewards)
            if not kept.any():
                continue
            advantage = sign * ript.leave_one_out_advantage(rewards[kept]).flatten()
            action = action[kept].flatten(0, 1)[:, None]  # E S A, with S = 1
            old = ript.laplace_log_prob(action, mean.detach(), log_scale)
            weight = ript.loss_weight(torch.ones_like(old, dtype=torch.bool))
            for _ in range(2):
                log_prob = ript.laplace_log_prob(action, mean, log_scale)
                loss, _ = ript.ppo_clip_loss(log_prob, old, advantage, weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return share[0], np.mean(share[-5:])

    start, end = learn(1)
    assert start < 0.15 and end > 0.5 and learn(-1)[1] < 0.05
