"""The claims of ript.py, each as a test that fails when the claim does. Run: bash run_libero.sh test"""

import atexit
import dataclasses
import json
import lzma
import math
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import ript  # before torch is: it says how OpenMP's threads wait

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from examples import bandit, control_step, headless, imitation, report
from examples.laptop import Tiny
from policies import openvla_oft
from policies.openvla_oft import OpenVLAOFT
from ript import Config, Context, Episode, Worker, load_suite

HERE = Path(__file__).parent
TASKS = ["lift the red cube", "lift the green cube"]
PRETRAINED = HERE / "assets/tabletop"


def find_golden():
    """The directory of the original code's outputs: RIPT_GOLDEN, ../shared/golden, or assets/golden, whose
    README.md says what they are. If it has .xz files, a temporary copy where they are unpacked."""
    folder = HERE / ".." / "shared" / "golden"
    if not folder.exists():
        folder = HERE / "assets/golden"
    folder = Path(os.environ.get("RIPT_GOLDEN", folder))
    packed = [path.relative_to(folder) for path in folder.rglob("*.xz")]
    if not packed:
        return folder
    copy = Path(tempfile.mkdtemp(prefix="ript_golden_"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.xz"), dirs_exist_ok=True)
    for path in packed:
        (copy / path.with_suffix("")).write_bytes(lzma.decompress((folder / path).read_bytes()))
    return copy


GOLDEN = find_golden()


def golden(name):
    """Arrays of the original code's outputs."""
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    if "pixel_bytes" in arrays:  # pixel_values, packed: bytes, and what a tower makes of each of 256 values
        tower, channel, _, _ = np.ogrid[:2, :3, :1, :1]
        pixels = arrays["pixel_levels"][tower, channel, arrays["pixel_bytes"][:, :, None]]
        arrays["pixel_values"] = pixels.reshape(3, 12, 224, 224)  # camera, tower, colour
    return {key: torch.from_numpy(value) for key, value in arrays.items() if value.dtype.kind != "U"}


def config(*argv):
    return ript.parse_config([str(word) for word in argv])


def demo_config(*argv):
    return ript.parse_config([str(word) for word in argv], imitation.ImitationConfig, "IMITATION")


def small_policy(seed=0, trained=("action_head",)):
    torch.manual_seed(seed)
    policy = Tiny()
    policy.train_only(trained)
    return policy


def trained(policy, parts):
    """Names and parameters that train, after train_only(parts)."""
    policy.train_only(parts)
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def random_observations(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        dict(pictures=rng.integers(0, 255, (2, 64, 64, 3), dtype=np.uint8), proprio=rng.standard_normal(8))
        for _ in range(n)
    ]


def assert_close(a, b, tolerance=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(a).float(), torch.as_tensor(b).float(), atol=tolerance, rtol=tolerance
    )


# ---------------------------------------------------------------------------------------------- the algorithm
def test_leave_one_out_advantage_is_the_reward_minus_the_mean_of_the_others():
    rewards = torch.rand(5, 6)
    for c in range(5):
        for k in range(6):
            others = [rewards[c, j] for j in range(6) if j != k]
            assert_close(ript.leave_one_out_advantage(rewards)[c, k], rewards[c, k] - sum(others) / 5)
    with pytest.raises(ValueError, match="K >= 2"):
        ript.leave_one_out_advantage(torch.ones(3, 1))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float64])
def test_rewards_may_be_of_any_type(kind):
    rewards = torch.tensor([[1, 0, 0], [1, 1, 1]]).to(kind)
    assert_close(ript.leave_one_out_advantage(rewards), [[1, -0.5, -0.5], [0, 0, 0]])
    assert ript.has_signal(rewards).tolist() == [True, False]


def test_leave_one_out_advantage_agrees_with_the_original():
    g = golden("golden_math")
    for case in ("binary_3x8", "float_2x4"):
        ours = ript.leave_one_out_advantage(g[f"rloo_{case}_reward"])
        assert_close(ours.flatten(), g[f"rloo_{case}_adv_group"])


def test_has_signal_is_false_exactly_where_every_advantage_is_zero():
    rewards = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1], [1, 1, 0]])
    assert ript.has_signal(rewards).tolist() == [False, False, True, True, True]
    assert ript.has_signal(rewards).tolist() == (ript.leave_one_out_advantage(rewards) != 0).any(-1).tolist()


@pytest.mark.parametrize("clip", [False, True])
def test_laplace_log_prob_and_gradients_agree_with_the_original(clip):
    g, name = golden("golden_math"), "clip" if clip else "noclip"
    mean, log_scale = (g[f"laplace_{key}"].clone().requires_grad_() for key in ("mean", "log_scale"))
    b = log_scale.clamp(-2, 0.5) if clip else log_scale
    per_dim = ript.laplace_log_prob(g["laplace_action"][..., None], mean[..., None], b[..., None])
    assert_close(per_dim, g[f"laplace_logp_{name}"])
    assert_close(ript.laplace_log_prob(g["laplace_action"], mean, b), g[f"laplace_logp_{name}"].sum(-1), 2e-6)
    (per_dim * g["laplace_weight"]).sum().backward()
    assert_close(mean.grad, g[f"laplace_dmean_{name}"])
    assert_close(log_scale.grad, g[f"laplace_dlogscale_{name}"])


def test_laplace_log_prob_is_the_density_of_the_noise_and_float32_whatever_comes_in():
    action, mean, log_scale = torch.randn(4, 7), torch.randn(4, 7), torch.randn(4, 7)
    expected = torch.distributions.Laplace(mean, log_scale.exp()).log_prob(action).sum(-1)
    assert_close(ript.laplace_log_prob(action, mean, log_scale), expected, 1e-5)
    half = [x.bfloat16() for x in (action, mean, log_scale)]
    assert ript.laplace_log_prob(*half).dtype == torch.float32
    assert_close(ript.laplace_log_prob(*half), ript.laplace_log_prob(*[x.float() for x in half]), 0)


@pytest.mark.parametrize("sign,advantage", [("advpos", 0.625), ("advneg", -0.375)])
def test_ppo_clip_loss_and_gradients_agree_with_the_original(sign, advantage):
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


def made_up_loss():
    """Log-probabilities, advantages and a mask of three episodes of up to five steps, one not executed."""
    torch.manual_seed(0)
    new = torch.randn(3, 5) * 0.3
    old = torch.randn(3, 5) * 0.3
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 0]]).bool()
    return new, old, torch.tensor([1.0, -0.5, 0.25]), mask


def test_loss_weight_sums_to_one_and_is_a_mean_over_episodes_or_over_tokens():
    mask = made_up_loss()[3]
    assert_close(ript.loss_weight(mask)[0], [1 / 6, 1 / 6, 0, 0, 0])
    assert_close(ript.loss_weight(mask)[1], [1 / 15] * 5)
    assert_close(ript.loss_weight(mask, "token"), mask / 9)
    for per in ("episode", "token"):
        assert_close(ript.loss_weight(mask, per).sum(), 1)
        assert ript.loss_weight(torch.zeros(2, 3).bool(), per).sum() == 0
    with pytest.raises(ValueError, match="episode"):
        ript.loss_weight(mask, "step")


@pytest.mark.parametrize("per", ["episode", "token"])
def test_ppo_clip_loss_is_the_weighted_sum_of_the_clipped_terms(per):
    new, old, advantage, mask = made_up_loss()
    low, high = 0.1, 0.3
    weight = ript.loss_weight(mask, per)
    terms = dict(loss=0.0, ratio=0.0, clip_frac=0.0, approx_kl=0.0)
    for e in range(3):
        for s in range(5):
            if mask[e, s]:
                a, w = advantage[e].item(), weight[e, s].item()
                r = math.exp(new[e, s] - old[e, s])
                clipped = min(max(r, 1 - low), 1 + high)
                terms["loss"] -= min(r * a, clipped * a) * w
                terms["ratio"] += r * w
                terms["clip_frac"] += (clipped * a < r * a) * w
                terms["approx_kl"] += (r - 1 - math.log(r)) * w
    loss, stats = ript.ppo_clip_loss(new, old, advantage, weight, (low, high))
    assert_close(loss, terms.pop("loss"))
    for name, value in terms.items():
        assert_close(stats[name], value)


def test_what_was_not_executed_reaches_neither_the_loss_nor_the_gradient():
    new, old, advantage, mask = made_up_loss()
    weight = ript.loss_weight(mask)
    poisoned = torch.where(mask, new, float("nan")).requires_grad_()
    loss, stats = ript.ppo_clip_loss(poisoned, old, advantage, weight)
    loss.backward()
    assert (poisoned.grad[~mask] == 0).all() and torch.isfinite(poisoned.grad).all()
    assert (poisoned.grad[mask] != 0).any() and stats["approx_kl"] > 0
    assert_close(loss.detach(), ript.ppo_clip_loss(new, old, advantage, weight)[0])


def test_parts_of_a_minibatch_add_up_to_it():
    new, old, advantage, mask = made_up_loss()
    weight = ript.loss_weight(mask)
    whole, _ = ript.ppo_clip_loss(new, old, advantage, weight)
    parts = [
        ript.ppo_clip_loss(new[e : e + 1], old[e : e + 1], advantage[e : e + 1], weight[e : e + 1])[0]
        for e in range(3)
    ]
    assert_close(sum(parts), whole)


def test_the_formulas_solve_a_bandit():
    """40 steps of RIPT with a Laplace policy find an interval that it first hits one time in ten."""
    torch.manual_seed(0)
    mean, log_scale = torch.zeros(1, requires_grad=True), torch.tensor([math.log(0.3)])
    optimizer, share = torch.optim.Adam([mean], 0.05), []
    for _ in range(40):
        action = mean.detach() + torch.distributions.Laplace(0.0, 0.3).sample((16, 8, 1))
        rewards = ((action > 0.5) & (action < 1.0)).float()[..., 0]
        share.append(rewards.mean().item())
        kept = ript.has_signal(rewards)
        advantage, action = (
            ript.leave_one_out_advantage(rewards)[kept].flatten(),
            action[kept].flatten(0, 1)[:, None],
        )
        old = ript.laplace_log_prob(action, mean.detach(), log_scale)
        for _ in range(2):
            weight = ript.loss_weight(torch.ones_like(old, dtype=torch.bool))
            log_prob = ript.laplace_log_prob(action, mean, log_scale)
            loss, _ = ript.ppo_clip_loss(log_prob, old, advantage, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert share[0] < 0.15 and np.mean(share[-5:]) > 0.5


def test_the_bandit_learns_and_with_the_sign_flipped_it_does_not():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    levels = {1: [], -1: []}
    for sign, found in levels.items():
        for seed in range(3):
            end = bandit.learn(seed, sign=sign)[-3:]
            found.append(np.mean([row["success"] for row in end]))
    torch.set_num_threads(threads)
    assert min(levels[1]) > 0.70 and max(levels[-1]) < 0.35


# ------------------------------------------------------------------------------------------------- the policy
EVERYTHING = ("vision_backbone", "projector", "proprio_projector", "language_model", "action_head")
DECODER = (
    "language_model.model.layers",
    "action_head",
)  # as the 7B: two passes, through the last positions only


@pytest.mark.parametrize("parts", [EVERYTHING, ("action_head",), DECODER, ("scale_head",)])
def test_gradient_reaches_what_trains_and_the_output_is_the_same_whatever_trains(parts):
    observations, texts = random_observations(3), ["lift the red cube", "lift the green cube", "lift it"]
    policy = small_policy()
    with torch.no_grad():
        reference = policy.predict(observations, texts)
    parameters = trained(policy, parts)
    mean, log_scale = policy.predict(observations, texts)
    assert_close(mean, reference[0], 1e-5)
    assert_close(log_scale, reference[1], 1e-5)
    (log_scale if parts == ("scale_head",) else mean).sum().backward()
    reached = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in reached} == {part.split(".")[0] for part in parts}
    assert reached <= set(parameters)
    if parts == DECODER:
        assert policy.language_model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0


def test_attention_is_bidirectional():
    policy, observations = small_policy(), random_observations(1)
    x, mask, positions = policy.embed(observations, ["lift"])
    run = lambda x: policy.language_model.model(inputs_embeds=x, attention_mask=mask, position_ids=positions)
    changed = x.clone()
    changed[:, -3] += 1
    assert (run(x).last_hidden_state[:, 0] - run(changed).last_hidden_state[:, 0]).abs().max() > 1e-4


def test_a_transformers_that_ignores_the_mask_is_noticed_when_a_policy_is_loaded(monkeypatch):
    from transformers import LlamaModel

    forward = LlamaModel.forward
    monkeypatch.setattr(
        LlamaModel, "forward", lambda self, attention_mask=None, **rest: forward(self, **rest)
    )
    with pytest.raises(ript.UserError, match="attention is causal"):
        pretrained()


def test_the_multiplier_comes_before_the_clamp_so_that_the_scale_head_decides():
    policy, observations = small_policy(trained=("scale_head",)), random_observations(1)
    policy.scale_range = OpenVLAOFT.scale_range
    policy.scale_multiplier = 5.0
    scales = []
    shares = []
    for b in (0.01, 0.03, 0.05, 0.5):
        with torch.no_grad():
            policy.scale_head.log_b_head.weight.zero_()
            policy.scale_head.log_b_head.bias.fill_(math.log(b))
        log_scale = policy.density(observations, ["lift"])[1]
        scales.append(log_scale.exp().mean().item())
        record = policy.act(observations, ["lift"], [None])[0]
        assert_close(record["scale"], scales[-1])
        shares.append((record["at_low"], record["at_high"]))
        policy.zero_grad()
        log_scale.sum().backward()
        inside = math.exp(-2) < 5 * b < math.exp(0.5)
        assert (policy.scale_head.log_b_head.bias.grad.abs().max() > 0) == inside
    assert_close(scales, [math.exp(-2), 0.15, 0.25, math.exp(0.5)], 1e-5)
    assert shares == [(1, 0), (0, 0), (0, 0), (0, 1)]


def test_a_batch_of_mixed_instructions_equals_them_one_by_one():
    policy, observations = small_policy(), random_observations(3)
    texts = ["lift the green cube", "push", "lift the red cube"]
    together = policy.predict(observations, texts)
    for i in range(3):
        for a, b in zip(together, policy.predict(observations[i : i + 1], texts[i : i + 1])):
            assert_close(a[i], b[0], 1e-5)
    other = policy.predict(observations, texts[::-1])[0]
    assert (other[0] - together[0][0]).abs().max() > 1e-5  # the words reach the heads


def test_act_scores_a_sample_with_the_density_that_drew_it_and_repeats_with_its_generator():
    policy, observations, texts = small_policy(), random_observations(2), ["lift the red cube"] * 2
    policy.scale_multiplier = 2.0
    policy.scale_range = OpenVLAOFT.scale_range
    seeded = lambda: [np.random.default_rng([0, i]) for i in range(2)]
    records = policy.act(observations, texts, seeded())
    assert (policy.act(observations, texts, seeded())[1]["sample"] == records[1]["sample"]).all()
    with torch.no_grad():
        assert_close(policy.log_prob(records), np.stack([r["log_prob"] for r in records]), 1e-5)
        mean, log_scale = policy.density(observations, texts)
    expected = (
        torch.distributions.Laplace(mean, log_scale.exp())
        .log_prob(torch.tensor(np.stack([r["sample"] for r in records])))
        .sum(-1)
    )
    assert_close(np.stack([r["log_prob"] for r in records]), expected, 1e-4)
    draws = np.stack(
        [policy.act(observations[:1], texts[:1], [np.random.default_rng(i)])[0]["sample"] for i in range(200)]
    )
    assert_close(
        np.abs(draws - mean[0].numpy()).mean((0, 1)), log_scale[0].exp().mean(0), 0.03
    )  # E|noise| = b
    assert (policy.act(observations, texts, [None, None])[0]["sample"] == mean[0].numpy()).all()


def test_actions_survive_the_way_to_head_units_and_back():
    policy = small_policy()
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 8, 7))
    actions[..., 6] = np.sign(actions[..., 6])
    assert_close(policy.to_env_actions(policy.from_env_actions(actions)), actions, 1e-6)
    assert policy.to_env_actions(np.array([0, 0, 0, 0, 0, 0, 0.9]))[6] == -1  # the head's 1 is open


def test_labels_are_clipped_to_the_bounds_and_what_never_moved_stays_still():
    policy = small_policy()
    policy.statistics["action"] = dict(q01=[-1, -1, -1, 0, 0, 0, -1], q99=[1, 1, 1, 0, 0, 0, 1])
    labels = policy.from_env_actions(np.array([[2, -2, 0.5, 0, 0.3, -0.3, 1.0]]))
    assert_close(labels, [[1, -1, 0.5, -1, 1, -1, 0]], 1e-6)
    noise = np.random.default_rng(0).laplace(size=(100, 7))
    assert np.abs(policy.to_env_actions(noise)[:, 3:6]).max() < 1e-6  # exploration does not turn the hand


# ----------------------------------------------------------------------------- the released checkpoints' form
LORA, SCALE = "tiny_oft/ript_lora", "tiny_oft/scale_header.pth"


@pytest.fixture(scope="module")
def oft():
    """(prefix, with adapter) -> the original's tiny checkpoint, its outputs and its instructions."""
    g, loaded = golden("golden_oft"), {}

    def policy(prefix="exact", lora=False):
        if (prefix, lora) not in loaded:
            source = dict(adapter=GOLDEN / LORA) if lora else dict(scale_head=GOLDEN / SCALE)
            folder = GOLDEN / "tiny_oft"
            loaded[prefix, lora] = OpenVLAOFT.from_pretrained(folder, "libero_10", prefix=prefix, **source)
        return loaded[prefix, lora]

    return policy, g, json.loads((GOLDEN / "golden_oft.json").read_text())["_instructions"]


def raw_observation(g, i):
    raw = {f"robot0_{name}": g[f"raw_{name}"][i].numpy() for name in ("eef_pos", "eef_quat", "gripper_qpos")}
    pictures = dict(
        agentview_image=g["raw_agentview"][i].numpy(), robot0_eye_in_hand_image=g["raw_wrist"][i].numpy()
    )
    return raw | pictures


def original_observations(g):
    """The original's own pictures, read back from SigLIP's normalisation, and proprio."""
    pictures = (g["pixel_values"].unflatten(1, (2, 2, 3))[:, :, 1] * 0.5 + 0.5).mul(255).round().byte()
    return [
        dict(pictures=pictures[i].permute(0, 2, 3, 1).numpy(), proprio=g["state"][i].numpy())
        for i in range(3)
    ]


def test_pictures_are_tensorflows_within_a_few_values():
    g = golden("golden_preprocess")
    for name in ("gradient256", "noise128", "scene256", "scene128"):
        ours = torch.tensor(
            openvla_oft.openvla_picture(np.ascontiguousarray(g[f"{name}/input"].numpy()[::-1, ::-1]))
        )
        off = (ours.int() - g[f"{name}/cropped224"].int()).abs()
        # of 150,528 values; round(x * 255) would be off in a fourth
        assert off.max() <= 1 and (off > 0).float().mean() < 1e-4
    g = golden("golden_oft")
    policy = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10")
    for i, original in enumerate(original_observations(g)):
        observation = policy.preprocess(raw_observation(g, i))
        off = np.abs(observation["pictures"].astype(int) - original["pictures"])
        assert off.max() <= 1 and (off > 0).mean() < 1e-4
        assert_close(observation["proprio"], original["proprio"], 1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_vision_towers_and_projectors_agree_with_the_original(oft, lora):
    policy, g, _ = oft
    policy, prefix = policy("exact", lora), "lora" if lora else "base"
    pixels = g["pixel_values"].unflatten(1, (2, 2, 3))  # observation, camera, tower's normalisation, channel
    with torch.no_grad():
        towers = [
            tower(pixels[:, :, i].flatten(0, 1)) for i, tower in enumerate(policy.vision_backbone.values())
        ]
        for ours, name in zip(towers, ("dino", "siglip")):
            # Every fifth patch, as assets/golden has no others.
            assert_close(ours[:, ::5], g[f"{prefix}_{name}"].flatten(0, 1)[:, ::5], 1e-5)
        projected = policy.projector(torch.cat(towers, -1)).unflatten(0, (3, 2)).flatten(1, 2)
        assert_close(projected[:, ::5], g[f"{prefix}_projected"][:, ::5], 1e-5)
        assert_close(policy.proprio_projector(g["proprio_norm"]), g["proprio_token"], 1e-5)


def test_the_sequence_of_embeddings_is_the_originals(oft):
    policy, g, texts = oft
    with torch.no_grad():
        x, mask, positions = policy().embed(original_observations(g)[:1], texts[:1])
    assert_close(x[0], g["base_a_inputs_embeds_obs0"], 1e-5)
    assert mask.all() and (positions == torch.arange(x.shape[1])).all()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("prefix,variant", [("exact", "a"), ("prompt", "b")])
@pytest.mark.parametrize("gradient", [False, True])
def test_predictions_and_actions_agree_with_the_original(oft, lora, prefix, variant, gradient):
    policy, g, texts = oft
    policy, name = policy(prefix, lora), f"{'lora' if lora else 'base'}_{variant}"
    with torch.set_grad_enabled(gradient):  # mixed instructions in one batch, of which one is shorter
        mean, log_scale = policy.predict(original_observations(g), texts)
        raw_mean, _ = policy.predict([policy.preprocess(raw_observation(g, i)) for i in range(3)], texts)
    assert mean.shape == (3, 8, 7) and mean.dtype == torch.float32
    assert_close(mean.detach(), g[f"{name}_mean"], 1e-5)
    assert_close(log_scale.detach(), g[f"{name}_logscale"], 1e-5)
    assert_close(raw_mean.detach(), g[f"{name}_mean"], 3e-4)  # of 150,528 pixel values up to 5 differ by 1
    assert_close(policy.to_env_actions(mean.detach()), g[f"{name}_env_actions"], 1e-5)
    if variant == "b" and not gradient:
        assert_close(ript.laplace_log_prob(mean, mean, log_scale), g[f"{name}_logp_at_mean"].sum(-1), 1e-4)


def keep_what_act_recorded(monkeypatch):
    """Let update take the recorded log-probabilities for old, so that ratios other than one can be tried."""
    score = ript.score

    def recorded_for_old(*arguments):
        mask, _, recorded = score(*arguments)
        return mask, recorded, recorded

    monkeypatch.setattr(ript, "score", recorded_for_old)


def keep_token_ratios(monkeypatch):
    """A list of each micro-batch's ratios as a mean over its steps, as the original logs them."""
    seen, ppo_clip_loss = [], ript.ppo_clip_loss

    def spy(log_prob, old_log_prob, advantage, weight, clip):
        token = ript.loss_weight(weight > 0, "token")
        seen.append(ppo_clip_loss(log_prob, old_log_prob, advantage, token, clip)[1]["ratio"].item())
        return ppo_clip_loss(log_prob, old_log_prob, advantage, weight, clip)

    monkeypatch.setattr(ript, "ppo_clip_loss", spy)
    return seen


def keep_gradients(monkeypatch):
    """A list to which each optimiser step adds its gradients, as they are after the sum over processes."""
    seen, reduce_gradients = [], ript.reduce_gradients

    def spy(parameters):
        reduce_gradients(parameters)
        seen.append([p.grad.clone() for p in parameters])

    monkeypatch.setattr(ript, "reduce_gradients", spy)
    return seen


def names_of(path):
    """Our name of an original's parameter."""
    return path.removeprefix("model.").removeprefix("base_model.model.")


@pytest.mark.parametrize("clip", [False, True])
def test_gradients_agree_with_the_original_and_reach_the_decoders_adapters_and_the_heads_alone(oft, clip):
    policy, g, texts = oft
    names = [names_of(name) for name in np.load(GOLDEN / "golden_oft.npz")["grad_names"]]
    for prefix in ("prompt", "exact"):
        model = policy(prefix, True)
        model.zero_grad()
        mean, log_scale = model.predict(original_observations(g), texts)
        log_scale = log_scale.clamp(-2, 0.5) if clip else log_scale
        ript.laplace_log_prob(g["fixed_action"], mean, log_scale).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for name, norm in zip(names, g["grad_norm_clip" if clip else "grad_norm_noclip"].tolist()):
            assert (name in grads) == (norm >= 0), name
            if prefix == "prompt" and norm >= 0:
                assert grads[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), name
        assert grads.keys() <= set(names)
        if prefix == "prompt" and clip:
            for key in (key for key in g if key.startswith("grad/")):
                expected = g[key]
                ours = grads[names_of(key.removeprefix("grad/"))]
                assert (ours - expected).norm() <= 1e-4 * expected.norm() + 1e-6, key
        model.zero_grad()
    base = policy("exact", False)
    sum(part.sum() for part in base.predict(original_observations(g), texts)).backward()
    reached = {name.split(".")[0] for name, p in base.named_parameters() if p.grad is not None}
    assert reached == {"action_head", "scale_head"}
    base.zero_grad()


def test_an_optimiser_step_equals_the_originals_where_its_rule_is_the_intended_one(oft, monkeypatch):
    """Differences on purpose: the gradient's norm is clipped jointly, not for adapters and heads apart;
    ratios are of whole action steps in float32 (the golden run is float32 too); an episode's last step is
    always trained on."""
    g = golden("golden_ppo_step")
    names = [names_of(name) for name in np.load(GOLDEN / "golden_ppo_step.npz")["param_names"]]
    policy = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", GOLDEN / LORA, prefix="prompt")
    observations, text = original_observations(oft[1]), oft[2][0]
    policy.train_only(OpenVLAOFT.trained + ("scale_head",))
    optimizer = torch.optim.AdamW(policy.parameter_groups(), 5e-5)
    before = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    rows = iter(
        zip(g["obs_index"].tolist(), g["actions_normalized"].numpy(), g["ref_log_prob"].sum(-1).numpy())
    )
    episodes = []
    for length in g["episode_len"].tolist():
        records = [
            dict(observation=observations[i], instruction=text, sample=sample, log_prob=log_prob)
            for i, sample, log_prob in (next(rows) for _ in range(length))
        ]
        episodes.append(Episode(Context(0, text, 0), records=records, executed=[8] * length))
    for episode, reward in zip(episodes, g["reward"].tolist()):
        episode.success = bool(reward)
    cfg = config(
        "--model",
        "openvla-oft",
        "--suite",
        "libero_10",
        "--minibatch",
        4,
        "--rollouts",
        4,
        "--max_grad_norm",
        1e9,
    )
    keep_what_act_recorded(monkeypatch)
    gradients = keep_gradients(monkeypatch)
    token_ratio = keep_token_ratios(monkeypatch)
    stats = ript.update(policy, optimizer, episodes, cfg, run_of())
    named = dict(policy.named_parameters())
    grads = dict(zip(before, gradients[0]))
    lora, heads = ([grads[name] for name in before if ("lora_" in name) == which] for which in (True, False))
    norms = [torch.cat([grad.flatten() for grad in part]).norm().item() for part in (lora, heads)]
    assert norms[0] == pytest.approx(g["mb1_gradient_norm_model_stats"].item(), rel=1e-4)
    assert norms[1] == pytest.approx(g["mb1_gradient_norm_header_stats"].item(), rel=1e-4)
    # The original's mean is over 10 chunks.
    assert stats["loss"] / 10 == pytest.approx(g["mb1_pg_loss_stats"].item(), rel=1e-3)
    chunk_ratio = np.average(token_ratio, weights=[4, 4, 2])  # of micro-batches of 4 chunks
    assert chunk_ratio == pytest.approx(g["mb1_pg_ratio_stats"].item(), rel=1e-4)
    assert stats["grad_norm"] == pytest.approx(math.hypot(*norms), rel=1e-5)
    for name, value in before.items():  # once more, with the original's clipping
        named[name].data = value.clone()
        named[name].grad = grads[name] * min(1, 1 / norms["lora_" not in name])
    torch.optim.AdamW(policy.parameter_groups(), 5e-5).step()
    for name, norm, delta in zip(names, g["mb1_grad_norm_after_clip"].tolist(), g["mb1_delta_norm"].tolist()):
        assert (name in before) == (norm >= 0), name
        if name in before:
            assert named[name].grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name
            assert (named[name] - before[name]).norm().item() == pytest.approx(delta, rel=2e-3), name


def test_the_seven_billion_are_those_of_the_real_checkpoint_and_take_439_adapters():
    directory = HERE / ".." / "shared" / "openvla-7b-oft-finetuned-libero-10"
    if not directory.exists():
        directory = HERE / "assets/golden/openvla-7b"  # its names and sizes
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    with torch.device("meta"):
        policy = OpenVLAOFT(**OpenVLAOFT.describe(directory, "libero_10")[0])
        own = {
            name: value
            for name, value in policy.state_dict().items()
            if not name.startswith(("action_head", "scale_head", "proprio_projector"))
        }
        assert own.keys() == index["weight_map"].keys()
        assert sum(value.numel() * 2 for value in own.values()) == index["metadata"]["total_size"]  # bfloat16
        assert sum(p.numel() for p in policy.action_head.parameters()) == 151_117_831
        assert sum(p.numel() for p in policy.scale_head.parameters()) == 167_899_143
        policy.add_lora()
    adapters = {name: p for name, p in policy.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 439 and sum(p.numel() for p in adapters.values()) == 110_828_288
    policy.train_only(OpenVLAOFT.trained)
    trained = sum(p.numel() for p in policy.parameter_groups()[0]["params"])
    assert trained == 79_953_920 + 151_117_831  # the decoder's adapters and the action head


def test_a_policy_that_is_saved_and_loaded_acts_to_the_same_bits(tmp_path):
    """Matrix products differ in the last bit with the place of weights in memory, odd in a mapped file."""
    policy, texts = small_policy(), [TASKS[0]]
    policy.save(tmp_path)
    again = Tiny.from_pretrained(tmp_path)
    for observation in random_observations(20):
        ours, theirs = (p.act([observation], texts, [None])[0]["actions"] for p in (policy, again))
        assert (ours == theirs).all()


def test_adapters_are_saved_as_the_authors_save_them(oft, tmp_path):
    policy, g, texts = oft
    policy = policy("prompt", True)
    policy.save(tmp_path)
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (GOLDEN / LORA, tmp_path))
    # One tensor of theirs nobody needs.
    assert theirs.keys() - ours.keys() == {"base_model.model.language_model.lm_head.base_layer.weight"}
    assert all((theirs[name].float() == ours[name]).all() for name in ours)
    both = (GOLDEN / LORA, tmp_path)
    theirs, ours = (torch.load(folder / "openvla_headers.pt", weights_only=True) for folder in both)
    assert {part: list(head) for part, head in theirs.items()} == {
        part: list(head) for part, head in ours.items()
    }
    theirs, ours = (json.loads((folder / "adapter_config.json").read_text()) for folder in both)
    assert set(theirs.pop("target_modules")) == set(ours.pop("target_modules"))
    assert {name: theirs[name] for name in ours} == ours
    again = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", tmp_path, prefix="prompt")
    assert not (tmp_path / "scale_header.pth").exists()  # openvla_headers.pt has it
    with torch.no_grad():
        for a, b in zip(
            again.predict(original_observations(g), texts), policy.predict(original_observations(g), texts)
        ):
            assert (a == b).all()


def test_a_scale_head_without_adapters_is_saved_as_the_authors_save_it(oft, tmp_path):
    policy = oft[0]()
    policy.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"ript.json", "scale_header.pth"}
    again = OpenVLAOFT.from_pretrained(
        GOLDEN / "tiny_oft", "libero_10", scale_head=tmp_path / "scale_header.pth"
    )
    named = dict(policy.named_parameters())
    assert all((p == named[name]).all() for name, p in again.named_parameters() if "scale_head" in name)


def test_the_base_is_bfloat16_where_the_checkpoint_says_so_and_what_trains_is_float32(oft):
    _, g, texts = oft
    policy = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", GOLDEN / LORA, dtype=torch.bfloat16)
    types = {name: p.dtype for name, p in policy.named_parameters()}
    precise = {name for name in types if "lora_" in name or name.startswith(("action_head", "scale_head"))}
    assert all((types[name] == torch.float32) == (name in precise) for name in types)
    with torch.no_grad():
        mean, _ = policy.predict(original_observations(g), texts)
    # The original's own bfloat16 is off by 0.007.
    assert mean.dtype == torch.float32 and (mean - g["lora_a_mean"]).abs().mean() < 0.02


# ----------------------------------------------------------------------- the simulator, rollouts, supervision
def libero_or_skip():
    from libero.libero import get_libero_path

    if not Path(get_libero_path("assets")).is_dir():
        pytest.skip("LIBERO's meshes are not there: run libero-download-assets")


@pytest.fixture(scope="module")
def simulator():
    simulator = load_suite("tabletop_pretrain")(64, True)
    yield simulator
    simulator.env.close()


@pytest.fixture(scope="module")
def workers():
    workers = [Worker(config(), 0) for _ in range(3)]
    yield workers
    for worker in workers:
        worker.close()


def call(worker, method, *arguments):
    """The answer of a worker's simulator."""
    return worker.call(method, *arguments)


def flat_state(simulator):
    return simulator.env.sim.get_state().flatten()


def test_k_resets_to_a_context_are_one_scene_and_other_seeds_are_others(simulator):
    def start(seed, task=0):
        raw = simulator.reset(Context(task, TASKS[task], seed)).observation
        return flat_state(simulator), raw

    (state, raw), (other, _) = start(5), start(6)
    simulator.step(np.random.default_rng(0).uniform(-1, 1, (16, 7)))  # an episode in between leaves no trace
    again, raw_again = start(5)
    assert (state == again).all() and (raw["agentview_image"] == raw_again["agentview_image"]).all()
    assert (raw["robot0_eye_in_hand_image"] == raw_again["robot0_eye_in_hand_image"]).all()
    assert np.abs(state - other).max() > 1e-3
    assert (start(5 + 2**32)[0] == state).all()  # any number will do, also of --seed 1234
    ends = []
    for _ in range(2):
        start(5)
        simulator.step(np.random.default_rng(1).uniform(-1, 1, (8, 7)))
        ends.append(flat_state(simulator))
    assert (ends[0] == ends[1]).all()  # and the same actions lead to the same state


def test_the_cubes_have_the_colours_that_the_instructions_name(simulator):
    picture = simulator.reset(Context(0, TASKS[0], 1)).observation["agentview_image"].astype(int)
    red = (picture[..., 0] > 2 * picture[..., 1]) & (picture[..., 0] > 2 * picture[..., 2])
    green = (picture[..., 1] > 2 * picture[..., 0]) & (picture[..., 1] > 2 * picture[..., 2])
    assert red.sum() > 5 and green.sum() > 5


@pytest.mark.parametrize("task", [0, 1])
def test_success_is_the_named_cube_lifted_and_the_expert_lifts_it(simulator, task):
    demonstration = simulator.demonstrate(Context(task, TASKS[task], 1_000_000))
    bodies = (simulator.env.cubeA_body_id, simulator.env.cubeB_body_id)
    height = [simulator.env.sim.data.body_xpos[body][2] for body in bodies]
    assert demonstration.success and 15 < len(demonstration.actions) == len(demonstration.observations) <= 32
    assert (
        height[task] > 0.84 > height[1 - task]
    )  # 4 cm above the table; a cube's centre rests at 2 or 2.5 cm


def test_the_expert_of_libero_object_puts_a_tall_thing_into_the_basket():
    libero_or_skip()
    # Ketchup: the palm would rest on it, were it grasped in the middle.
    suite = load_suite("libero_object")(64, True)
    demonstration = suite.demonstrate(Context(4, suite.INSTRUCTIONS[4], 1_000_004))
    suite.env.close()
    assert demonstration.success and len(demonstration.actions) < 200


def test_scripted_demonstrations_are_successes_with_clean_labels_whatever_the_number_of_workers(workers):
    seen = []
    for n in (1, 3):
        demos = imitation.scripted_demonstrations(workers[:n], demo_config("--demos_per_task", 2))
        assert [demo.context.task for demo in demos] == [0, 1, 0, 1]
        assert all(np.abs(demo.actions).max() <= 1 for demo in demos)
        pictures = [look()["agentview_image"].tobytes() for demo in demos for look in demo.looks]
        seen.append(
            ([demo.context.seed for demo in demos], [demo.actions.tobytes() for demo in demos], pictures)
        )
    assert seen[0] == seen[1]


def test_the_arm_of_the_tabletop_suite_is_worn(simulator):
    worn, hands = load_suite("tabletop")(64, True), []
    for arm in (simulator, worn):
        arm.reset(Context(0, TASKS[0], 3))
        hands.append(arm.step(np.zeros((8, 7))).observation["robot0_eef_pos"])
    worn.env.close()
    assert (hands[1] - hands[0])[:2].min() > 0.01 > abs((hands[1] - hands[0])[2])  # metres, in x and y


def test_a_chunk_stops_at_the_step_that_succeeds_and_then_nothing_is_drawn(simulator, monkeypatch):
    simulator.reset(Context(1, TASKS[1], 1_000_000))
    executed, drawn = [], []
    step, draw = control_step.control_step, simulator.draw
    monkeypatch.setattr(
        control_step, "control_step", lambda env, action: executed.append(action) or step(env, action)
    )
    monkeypatch.setattr(simulator, "draw", lambda *a: drawn.append(a) or draw(*a))
    monkeypatch.setattr(simulator, "success", lambda: len(executed) == 3)
    answer = simulator.step(np.zeros((8, 7)))
    assert (answer.ran, answer.success, answer.observation) == (3, True, None)
    assert len(executed) == 3 and not drawn


def test_pictures_are_drawn_once_for_a_chunk(simulator, monkeypatch):
    simulator.reset(Context(1, TASKS[1], 1_000_000))
    drawn, draw = [], simulator.draw
    monkeypatch.setattr(simulator, "draw", lambda *a: drawn.append(a) or draw(*a))
    answer = simulator.step(np.zeros((8, 7)))
    assert (answer.ran, answer.success, len(drawn)) == (8, False, 2)
    assert answer.observation["agentview_image"].shape == (64, 64, 3)


def shaken(simulator, step, number=40):
    """Positions of all joints after each of some random actions from one scene, by a way to step."""
    simulator.reset(Context(0, TASKS[0], 7))
    generator = np.random.default_rng(0)
    positions = []
    for _ in range(number):
        step(simulator.env, generator.uniform(-1, 1, 7))
        positions.append(simulator.env.sim.data.qpos.copy())
    return np.array(positions)


def robosuite_step(env, action):
    env.step(action)


def test_a_control_step_gives_the_states_of_robosuites_own(simulator):
    theirs = shaken(simulator, robosuite_step)
    ours = shaken(simulator, control_step.control_step)
    assert np.abs(ours - theirs).max() < 1e-6 < np.abs(ours[-1] - ours[0]).max()


def test_the_torques_are_those_of_robosuites_controller(simulator, monkeypatch):
    torques = control_step.compiled_torques()
    differences = []

    def compared(*arguments):
        ours = torques(*arguments)
        controller = simulator.env.robots[0].controller  # another one after each reset
        controller.update(force=True)
        differences.append(np.abs(ours - controller.run_controller()).max())
        return ours

    monkeypatch.setattr(control_step, "compiled_torques", lambda: compared)
    shaken(simulator, control_step.control_step, 20)
    # After a reset the first step is robosuite's own.
    assert len(differences) == 19 * 25 and max(differences) < 1e-6  # newton metres, of 300


def test_with_all_of_robosuites_passes_a_control_step_is_robosuites_to_the_bit(simulator, monkeypatch):
    import mujoco

    # Three passes: one before the controller, which makes the second, and that of mj_step.
    forward, step = mujoco.mj_forward, mujoco.mj_step

    def with_every_pass(env, action):
        robot = env.robots[0]
        controller = robot.controller
        calls = []

        def own_controller(*_):
            controller.new_update = bool(calls)  # set_goal has just brought it up to date
            calls.append(1)
            return np.clip(controller.run_controller(), *robot.torque_limits)

        if controller.new_update:
            env.sim.forward()
        with monkeypatch.context() as patch:
            patch.setattr(mujoco, "mj_step1", forward)
            patch.setattr(mujoco, "mj_step2", step)
            patch.setattr(control_step, "compiled_torques", lambda: own_controller)
            control_step.control_step(env, action)

    assert (shaken(simulator, with_every_pass) == shaken(simulator, robosuite_step)).all()


def successes(simulator, contexts, step, monkeypatch):
    """At which steps an expert's episodes end, and whether with success, by a way to step."""
    with monkeypatch.context() as patch:
        patch.setattr(control_step, "control_step", step)
        demonstrations = [simulator.demonstrate(context) for context in contexts]
    return [(demonstration.success, len(demonstration.actions)) for demonstration in demonstrations]


def test_experts_succeed_at_the_same_steps_as_with_robosuites_control_step(simulator, monkeypatch):
    contexts = [Context(task, TASKS[task], seed) for task in (0, 1) for seed in range(3)]
    ours = successes(simulator, contexts, control_step.control_step, monkeypatch)
    assert ours == successes(simulator, contexts, robosuite_step, monkeypatch)
    assert sum(success for success, _ in ours) >= 5


def test_the_expert_of_libero_object_succeeds_at_the_same_step_as_with_robosuites(monkeypatch):
    libero_or_skip()
    simulator = load_suite("libero_object")(64, True)
    contexts = [Context(0, "", 0, load_suite("libero_object").held_out(0, 1)[0])]
    ours = successes(simulator, contexts, control_step.control_step, monkeypatch)
    assert ours == successes(simulator, contexts, robosuite_step, monkeypatch) and ours[0][0]
    simulator.env.close()


def test_a_stove_turns_on_and_a_drawer_closes_as_with_robosuites_control_step(monkeypatch):
    libero_or_skip()
    simulator = load_suite("libero_goal")(64, True)
    seen = []
    for step in (robosuite_step, control_step.control_step):
        monkeypatch.setattr(control_step, "control_step", step)
        simulator.reset(Context(7, "", 0, load_suite("libero_goal").held_out(7, 1)[0]))  # turn on the stove
        data = simulator.env.sim.data
        answers = []
        for angle in (0.0, 0.8, 0.0):
            data.set_joint_qpos("flat_stove_1_button", angle)
            data.set_joint_qpos("wooden_cabinet_1_top_level", -0.1 * angle)
            answers.append(simulator.step(np.zeros((2, 7))).success)
        seen.append((answers, data.qpos.copy()))
    simulator.env.close()
    assert seen[0][0] == seen[1][0] == [False, True, False]
    assert np.abs(seen[0][1] - seen[1][1]).max() < 1e-4


@pytest.mark.parametrize("change", [dict(type="JOINT_POSITION"), dict(interpolation="linear")])
def test_an_environment_with_another_controller_keeps_robosuites_control_step(monkeypatch, change):
    import robosuite

    name = change.get("type", "OSC_POSE")
    controller = robosuite.load_controller_config(default_controller=name) | change
    env = robosuite.make(
        "Lift",
        robots="Panda",
        controller_configs=controller,
        has_renderer=False,
        has_offscreen_renderer=False,
        use_camera_obs=False,
    )
    env.reset()
    asked = []
    step = env.step
    monkeypatch.setattr(env, "step", lambda action: asked.append(action) or step(action))
    for _ in range(3):
        control_step.control_step(env, np.zeros(env.action_dim))
    assert len(asked) == 3
    env.close()


NUDGE = """
import ript

class Nudge(ript.load_suite("tabletop")):
    INSTRUCTIONS = ["raise the green cube"]
    PRESET = {}

    def build(self, task):
        assert isinstance(self, ript.Libero) and ript.Worker is not None
        super().build(1)

    def success(self):
        return bool(self.cube()[2] > 0.82 and self.task == 1)
"""


def test_a_suite_in_a_file_of_its_own_runs_from_the_command_line(tmp_path):
    (tmp_path / "nudge.py").write_text(NUDGE)
    done = launch(
        "--suite",
        f"{tmp_path}/nudge.py:Nudge",
        *QUICK,
        "--iterations",
        1,
        "--image_size",
        64,
        "--collision",
        "true",
        "--out",
        tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    rows = rows_without_seconds(tmp_path / "run")
    assert rows[1]["rollouts"] >= 6 and rows[1]["env_steps"] > 6
    report.main([str(tmp_path / "run")])
    assert (tmp_path / "run/task0.mp4").stat().st_size > 1000
    contents = (tmp_path / "run/evaluation.csv").read_text()
    assert "0,raise the green cube,1," in contents and "red" not in contents


def run_of(iteration=0, group=0):
    return dict(iteration=iteration, group=group)


def fresh_context(number):
    return Context(number % 2, TASKS[number % 2], ript.TRAIN_SEEDS + number)


def collect_with(workers, policy, cfg, run=None):
    return ript.collect(policy, workers, fresh_context, run or run_of(), cfg)


def pretrained():
    return Tiny.from_pretrained(PRETRAINED)


def test_fresh_contexts_take_the_tasks_in_turn_and_no_seed_twice():
    contexts = [ript.training_context(n, config()) for n in (0, 1, 7)]
    assert [(c.task, c.seed - ript.TRAIN_SEEDS) for c in contexts] == [(0, 0), (1, 1), (1, 7)]
    other = ript.training_context(0, config("--seed", 1))
    assert other.seed == 2 * ript.TRAIN_SEEDS


def test_demonstrated_contexts_are_drawn_by_the_number_of_the_group(monkeypatch):
    demonstrated = [Context(0, TASKS[0], 0, np.full(3, i)) for i in range(5)]
    monkeypatch.setattr(imitation, "demonstrated_contexts", lambda cfg: demonstrated)
    cfg = dataclasses.replace(config(), demos="somewhere")
    drawn = [[ript.training_context(n, cfg).state[0] for n in range(40)] for _ in range(2)]
    assert drawn[0] == drawn[1] and set(drawn[0]) == set(range(5))
    another_seed = [ript.training_context(n, dataclasses.replace(cfg, seed=1)).state[0] for n in range(40)]
    assert another_seed != drawn[0]


def test_the_kept_set_does_not_depend_on_the_number_of_workers(workers):
    cfg = config("--groups", 3, "--rollouts", 3, "--max_rejected", 3)
    seen = []
    for n in (1, 2, 3):
        run = run_of()
        episodes, stats = collect_with(workers[:n], pretrained(), cfg, run)
        seen.append((run["group"], fingerprint(episodes)))
        assert stats["rollouts"] == 3 * run["group"]
        numbers = [episode.group for episode in episodes]
        assert len(numbers) > 0 and numbers == sorted(numbers)
        for group in range(0, len(episodes), 3):
            assert len({episode.success for episode in episodes[group : group + 3]}) == 2
    assert seen[0] == seen[1] == seen[2]


def rollouts_that_end_as(outcome, pick=0):
    """A stand-in for simulate: outcome(episode) is its success, pick the order in which they end."""

    def simulate(play, workers, queue):
        while queue:
            episode = queue[pick % len(queue)]
            queue.remove(episode)
            episode.success, episode.executed = bool(outcome(episode)), [8]
            episode.records = [dict(scale=0.1, observation="pictures")]
            yield episode

    return simulate


@pytest.mark.parametrize(
    "outcome,counts",  # solved, failed
    [
        (lambda e: False, (0, 5)),
        (lambda e: True, (5, 0)),
        (lambda e: e.group % 2, (2, 3)),
    ],
)
def test_uniform_groups_never_reach_the_optimiser_and_are_replaced_up_to_the_cap(
    monkeypatch, outcome, counts
):
    ended = []
    rollouts = rollouts_that_end_as(outcome)
    monkeypatch.setattr(ript, "simulate", lambda *args: (ended.append(e) or e for e in rollouts(*args)))
    run = run_of()
    episodes, stats = collect_with([], None, config("--groups", 2, "--rollouts", 2, "--max_rejected", 3), run)
    assert [list(episode.records[0]) for episode in ended] == [["scale"]] * 10  # no pictures are kept
    assert episodes == [] and stats["kept"] == 0 and (stats["solved"], stats["failed"]) == counts
    assert run["group"] == 5 and stats["rollouts"] == 10  # 2 groups, and one more for each of 3 rejections


def has_both_outcomes(episode):
    """Of groups 1, 4 and 5 one rollout of two succeeds; group 2 is solved, the others fail."""
    return episode.group in (1, 4, 5) and episode.noise[3] == 0 or episode.group == 2


def test_kept_groups_are_the_first_with_signal_whatever_order_they_end_in(monkeypatch):
    for pick in (0, -1, 3):
        monkeypatch.setattr(ript, "simulate", rollouts_that_end_as(has_both_outcomes, pick))
        run = run_of()
        episodes, _ = collect_with([], None, config("--groups", 3, "--rollouts", 2, "--max_rejected", 9), run)
        assert [(e.group, e.noise[3]) for e in episodes] == [(g, k) for g in (1, 4, 5) for k in (0, 1)]
        assert [e.success for e in episodes] == [True, False] * 3 and run["group"] == 6


def test_each_rank_takes_every_second_number_and_keeps_half_of_the_groups(monkeypatch):
    monkeypatch.setattr(ript, "WORLD", 2)
    monkeypatch.setattr(ript, "gather", lambda value: [value, value])
    monkeypatch.setattr(ript, "simulate", rollouts_that_end_as(lambda e: e.noise[3] == 0 and e.group != 13))
    for rank, kept, after in ((0, [10, 12], 14), (1, [11, 15], 16)):  # rank 1 replaces 13
        monkeypatch.setattr(ript, "RANK", rank)
        run = run_of(group=10)
        episodes, _ = collect_with([], None, config("--groups", 4, "--rollouts", 2), run)
        assert [e.group for e in episodes[::2]] == kept and run["group"] == after


class Echo:
    """A policy that acts at random and remembers the sizes of its batches."""

    chunk, TOKENS = 8, 0

    def __init__(self):
        self.sizes = []

    def preprocess(self, raw):
        return None

    def act(self, observations, instructions, generators):
        self.sizes.append(len(observations))
        return [dict(actions=g.uniform(-1, 1, (8, 7)), scale=0.1, log_prob=np.zeros(8)) for g in generators]


class Stub:
    """A worker whose simulator answers at once and never succeeds."""

    def call(self, method, *arguments):
        return ript.Answer(len(arguments[0]) if method == "step" else 0, False, {})


@pytest.mark.parametrize("batch,sizes", [(0, [5]), (2, [2, 2, 1]), (1, [1] * 5)])
def test_episodes_that_wait_at_the_same_time_share_a_forward(batch, sizes):
    policy = Echo()
    actor = ript.Actor(policy, batch)
    episodes = [Episode(fresh_context(0), 0, (0, 0, 0, k)) for k in range(5)]
    with ThreadPoolExecutor(5) as threads:
        with actor.lock:
            records = [threads.submit(actor.act, {}, episode) for episode in episodes]
            while len(actor.waiting) < 5:
                time.sleep(0.01)
        chunks = [record.result()["actions"] for record in records]
    assert policy.sizes == sizes
    # Each has the answer to its own question, whoever asked.
    for k, chunk in enumerate(chunks):
        assert (chunk == np.random.default_rng((0, 0, 0, k, 0)).uniform(-1, 1, (8, 7))).all()


def test_a_chunk_is_cut_at_the_horizon():
    episode = Episode(fresh_context(0), 0, (0, 0, 0, 0))
    ript.rollout(Stub(), episode, ript.Actor(Echo(), 0), 20)
    assert episode.executed == [8, 8, 4] and not episode.success


def test_a_reward_is_a_bool_whatever_the_simulator_answers():
    class Wins(Stub):
        def call(self, method, *arguments):
            return super().call(method, *arguments)._replace(success=np.bool_(method == "step"))

    episode = Episode(fresh_context(0), 0, (0, 0, 0, 0))
    ript.rollout(Wins(), episode, ript.Actor(Echo(), 0), 20)
    # run.pt and metrics.jsonl could not hold another.
    assert episode.success is True and episode.executed == [8]


def test_a_forward_that_fails_ends_every_rollout_that_waits_for_it():
    class Broken(Echo):
        def act(self, observations, instructions, generators):
            raise RuntimeError("out of memory")

    actor = ript.Actor(Broken(), 0)
    with ThreadPoolExecutor(3) as threads:
        with actor.lock:
            episodes = [Episode(fresh_context(0), 0, (0, 0, 0, k)) for k in range(3)]
            records = [threads.submit(actor.act, {}, episode) for episode in episodes]
        for record in records:
            with pytest.raises(RuntimeError, match="out of memory"):
                record.result(timeout=30)


# ------------------------------------------------------------------------------------- update and supervision
def made_up_episodes(policy, n=6, seed=0):
    """Episodes of two to three queries with samples of the policy itself, the last chunk cut short."""
    rng, episodes = np.random.default_rng(seed), []
    for i in range(n):
        queries = 2 + i % 2
        records = policy.act(random_observations(queries, i), [TASKS[i % 2]] * queries, [rng] * queries)
        executed = [8] * (queries - 1) + [3]
        episodes.append(
            Episode(Context(0, TASKS[0], 0), i // 2, (0, 0, i // 2, i % 2), records, executed, i % 2 == 0)
        )
    return episodes


def update_config(*argv):
    return config("--passes", 1, "--minibatch", 6, "--rollouts", 2, *argv)


@pytest.mark.parametrize("per,tokens", [("episode", 0), ("token", 0), ("token", 8)])
def test_micro_batches_add_up_to_the_loss_of_the_whole_minibatch(per, tokens, monkeypatch):
    """With tokens every column counts, even where a chunk was cut short."""
    monkeypatch.setattr(OpenVLAOFT, "TOKENS", tokens)
    keep_what_act_recorded(monkeypatch)
    gradients = keep_gradients(monkeypatch)
    for micro_batch in (1, 4, 1000):
        policy = small_policy(trained=DECODER)
        episodes = made_up_episodes(policy)
        for e in episodes:
            for r in e.records:
                r["log_prob"] = r["log_prob"] + np.float32(0.05)  # ratios other than one
        cfg = update_config("--micro_batch", micro_batch, "--loss_per", per)
        optimizer = torch.optim.AdamW(policy.parameter_groups(), lr=1e-9)
        ript.update(policy, optimizer, episodes, cfg, run_of())
    policy = small_policy(trained=DECODER)
    parameters = list(trained(policy, DECODER).values())
    rows = [torch.cat(list(policy.log_prob(e.records))) for e in episodes]
    pad = lambda x: torch.nn.functional.pad(x, (0, 24 - len(x)))
    old = torch.stack(
        [pad(torch.tensor(np.concatenate([r["log_prob"] for r in e.records]))) for e in episodes]
    )
    steps = [[h < (tokens or n) for n in e.executed for h in range(8)] for e in episodes]
    mask = torch.stack([pad(torch.tensor(row)) for row in steps])
    advantage = torch.tensor([1.0, -1.0] * 3)
    weight = ript.loss_weight(mask, per)
    ript.ppo_clip_loss(torch.stack([pad(r) for r in rows]), old, advantage, weight, cfg.clip)[0].backward()
    expected = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    assert len(gradients) == 3
    for gradient in gradients:
        gradient = torch.cat([part.flatten() for part in gradient])
        assert_close(gradient / expected.norm(), expected / expected.norm(), 1e-5)
    assert expected.norm() > 1e-3


def test_update_starts_at_ratio_one_and_makes_rewarded_actions_likelier():
    policy = small_policy()
    episodes = made_up_episodes(policy)
    before = [policy.log_prob(e.records)[0].sum().item() for e in episodes]
    optimizer = torch.optim.AdamW(policy.parameter_groups(), lr=1e-5)
    scale_head = [p.clone() for p in policy.scale_head.parameters()]
    stats = ript.update(policy, optimizer, episodes, update_config(), run_of())
    assert stats["ratio_error"] < 1e-4 and stats["updates"] == 1 and abs(stats["ratio"] - 1) < 1e-6
    after = [policy.log_prob(e.records)[0].sum().item() for e in episodes]
    change = [b - a for a, b in zip(before, after)]
    assert sum(change[::2]) > 0 > sum(change[1::2])  # k = 0 was rewarded, k = 1 was not
    assert all((a == b).all() for a, b in zip(scale_head, policy.scale_head.parameters()))


def test_old_log_probabilities_come_from_the_updates_own_computation():
    policy = small_policy()
    episodes = made_up_episodes(policy)
    for episode in episodes:
        for record in episode.records:
            record["log_prob"] = record["log_prob"] + np.float32(0.1)  # as another kernel might have it
    optimizer = torch.optim.AdamW(policy.parameter_groups(), lr=1e-5)
    stats = ript.update(policy, optimizer, episodes, update_config(), run_of())
    assert abs(stats["ratio"] - 1) < 1e-5 and stats["act_std"] < 1e-4
    assert stats["ratio_error"] == pytest.approx(math.exp(0.1) - 1, rel=1e-3)


class FarFromExact(Tiny):
    """A policy whose log-probabilities depend on what else is in the batch, as in bfloat16 on a GPU."""

    def log_prob(self, records):
        beside = sum(float(record["sample"].sum()) for record in records)
        return super().log_prob(records) + math.sin(1000 * beside)


@pytest.mark.parametrize("micro_batch", [2, 3])
def test_the_first_step_has_a_ratio_of_exactly_one_whatever_batches_do_to_log_probabilities(micro_batch):
    policy = small_policy()
    policy.__class__ = FarFromExact
    episodes = made_up_episodes(policy)
    optimizer = torch.optim.AdamW(policy.parameter_groups(), lr=0.0)
    cfg = update_config("--minibatch", 4, "--micro_batch", micro_batch)
    stats = ript.update(policy, optimizer, episodes, cfg, run_of())
    # Minibatches are drawn, and their last micro-batches are smaller ones.
    assert stats["updates"] > 1 and stats["ratio"] == pytest.approx(1, abs=1e-6) and stats["approx_kl"] == 0


def break_policy(policy):
    with torch.no_grad():
        policy.action_head.model.fc2.bias[2] = math.nan


def test_actions_and_log_probabilities_that_are_not_finite_stop_the_run(workers):
    policy = small_policy()
    break_policy(policy)
    with pytest.raises(RuntimeError, match="action is not finite in iteration 1, group 0, Context.task=0"):
        collect_with(workers[:1], policy, config("--groups", 1, "--rollouts", 2))
    policy = small_policy()
    episodes = made_up_episodes(policy)
    break_policy(policy)
    optimizer = torch.optim.AdamW(policy.parameter_groups())
    with pytest.raises(RuntimeError, match=r"log_prob is not finite in iteration 1, group \d, Context"):
        ript.update(policy, optimizer, episodes, update_config(), run_of())


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(monkeypatch):
    policy = small_policy()
    episodes = made_up_episodes(policy)
    before = [p.clone() for p in policy.parameters()]
    optimizer = torch.optim.AdamW(policy.parameter_groups())
    advantage = ript.leave_one_out_advantage
    monkeypatch.setattr(ript, "leave_one_out_advantage", lambda rewards: advantage(rewards) * math.nan)
    with pytest.raises(RuntimeError, match="the gradient is not finite in iteration 1"):
        ript.update(policy, optimizer, episodes, update_config(), run_of())
    assert all((a == b).all() for a, b in zip(before, policy.parameters()))


def test_sft_learns_and_the_scale_head_is_fitted_alone(workers):
    policy = small_policy()
    cfg = demo_config("--sft_steps", 40, "--scale_steps", 20, "--sft_lr", 1e-3, "--demos_per_task", 1)
    demos = imitation.scripted_demonstrations(workers, cfg)
    observations = [policy.preprocess(look()) for look in demos[0].looks[:4]]
    batch = (observations, [TASKS[0]] * 4, np.array([demos[0].actions[i : i + 8] for i in range(4)]))
    before = imitation.imitation_loss(policy, "sft", *batch).item()
    imitation.sft(policy, demos, cfg)
    assert imitation.imitation_loss(policy, "sft", *batch).item() < 0.7 * before
    frozen = {name: p.clone() for name, p in trained(policy, EVERYTHING).items()}
    before = imitation.imitation_loss(policy, "scale", *batch).item()
    imitation.fit_scale_head(policy, demos, cfg)
    assert imitation.imitation_loss(policy, "scale", *batch).item() < before
    assert all((p == frozen[name]).all() for name, p in trained(policy, EVERYTHING).items())


def test_stage_2_writes_the_policy_that_stage_3_starts_from(tmp_path):
    """The laptop's command, with the bounds of a policy from scratch taken from its demonstrations."""
    imitation.main(
        [
            "--suite",
            "tabletop",
            "--checkpoint=",
            "--demos_per_task",
            "1",
            "--sft_steps",
            "3",
            "--scale_steps",
            "2",
            "--out",
            str(tmp_path / "sft"),
        ]
    )
    statistics = Tiny.from_pretrained(tmp_path / "sft").statistics
    assert statistics["action"] == Tiny.STATISTICS["action"]  # its actions are in -1..1 as they are
    assert (
        0.8 < statistics["proprio"]["q01"][2] < statistics["proprio"]["q99"][2] < 1.2
    )  # the hand's height, metres


# ------------------------------------------------------------------------------------------------- whole runs
QUICK = [
    "--checkpoint",
    PRETRAINED,
    "--groups",
    2,
    "--rollouts",
    3,
    "--max_rejected",
    2,
    "--iterations",
    2,
    "--eval_contexts",
    2,
    "--eval_every",
    1,
    "--workers",
    2,
]


def launch(*argv, timeout=600, **environment):
    return subprocess.run(
        [sys.executable, HERE / "ript.py", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
    )


def rows_without_seconds(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if "second" not in key and "_gb" not in key} for row in rows
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing disturbed: its directory and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = launch(*QUICK, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return out, done.stdout


def test_a_run_writes_all_its_files_and_what_it_saves_is_what_it_trained(finished, tmp_path, capsys):
    out, printed = finished
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "run.pt",
        "last",
        "best",
        "evaluation_SFT.json",
        "evaluation_RIPT.json",
    }
    assert len(rows_without_seconds(out)) == 3 and "RIPT: " in printed and "SFT: " in printed
    assert all(len(line) <= 110 for line in printed.splitlines())
    run = tmp_path / "run"
    shutil.copytree(out, run)
    report.main([str(run)])
    assert "exact McNemar p" in capsys.readouterr().out
    # Before, then after: in the other order the paired test would count what RIPT has lost as gained.
    assert (run / "evaluation.csv").read_text().splitlines()[0] == "task,instruction,context,SFT,RIPT"
    assert {path.name for path in run.iterdir()} >= {
        "evaluation.csv",
        "metrics.csv",
        "curve.png",
        "task0.mp4",
        "task1.mp4",
    }
    assert (run / "task1.mp4").stat().st_size > 1000
    evaluated = launch("--eval", "--checkpoint", out / "last", "--eval_contexts", 2, "--out", tmp_path / "e")
    assert evaluated.returncode == 0, evaluated.stderr
    ours = json.loads((tmp_path / "e/evaluation_success.json").read_text())
    assert ours == json.loads((out / "evaluation_RIPT.json").read_text()) and len(ours) == 4


def wait_for_the_end_of(pids):
    """Fail if one of these processes is still there in a minute. One that nobody has waited for is not."""
    deadline = time.time() + 60
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                assert time.time() < deadline, f"process {pid} outlives the run"
                time.sleep(0.1)


def children_of(pid):
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()


def pause(run, seconds):
    """Stop all processes of a run that has a session of its own, as Ctrl-Z does, and let them go on."""
    os.killpg(run.pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.killpg(run.pid, signal.SIGCONT)


def test_a_killed_run_is_resumed_paused_and_ends_with_the_same_bits_and_no_process(finished, tmp_path):
    command = [sys.executable, HERE / "ript.py", *map(str, QUICK), "--out", tmp_path]
    trainer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert trainer.poll() is None
        time.sleep(0.02)
    children = children_of(trainer.pid)
    trainer.kill()
    trainer.wait()
    assert len(children) >= 2  # the simulators, which have to notice
    wait_for_the_end_of(children)
    command = [sys.executable, HERE / "ript.py", "--resume", tmp_path]
    resumed = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while len(children_of(resumed.pid)) < 2:
        assert resumed.poll() is None
        time.sleep(0.02)
    for _ in range(3):  # while it starts, and while it acts
        time.sleep(2)
        pause(resumed, 1)
    assert resumed.wait(600) == 0
    assert rows_without_seconds(tmp_path) == rows_without_seconds(finished[0])
    for name in (
        "last/model.safetensors",
        "best/model.safetensors",
        "evaluation_SFT.json",
        "evaluation_RIPT.json",
    ):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()
    assert not list(tmp_path.rglob("*.tmp*"))


def test_a_run_stopped_before_its_first_checkpoint_starts_again(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run/run.pt").unlink()
    done = launch("--resume", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert rows_without_seconds(tmp_path / "run") == rows_without_seconds(finished[0])


def test_the_table_of_a_run_that_ends_between_evaluations_is_of_its_last_policy(finished, tmp_path):
    """--resume with a smaller --iterations: last/ may be newer than the last evaluation."""
    shutil.copytree(finished[0], tmp_path / "run")
    run = torch.load(tmp_path / "run/run.pt", weights_only=True)
    del run["history"][-1]["eval_success"]
    torch.save(run, tmp_path / "run/run.pt")
    # As if it were of an earlier iteration.
    (tmp_path / "run/evaluation_RIPT.json").write_text("{}")
    done = launch("--resume", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    name = "evaluation_RIPT.json"
    assert (tmp_path / "run" / name).read_bytes() == (finished[0] / name).read_bytes()


def test_the_table_has_wilson_intervals_per_task_and_the_exact_test_of_pairs():
    contexts = [Context(task, TASKS[task], seed) for task in (0, 1) for seed in range(10)]
    before, after = [True] + [False] * 19, [False] + [True] * 7 + [False] * 12
    lines = report.table(contexts, dict(SFT=before, RIPT=after)).splitlines()
    assert lines[1].split() == "lift the red cube 1/10 10% [2%, 40%] 7/10 70% [40%, 89%]".split()
    assert lines[3].split()[:4] == "all tasks 1/20 5%".split()
    assert lines[4] == "paired: 7 contexts gained, 1 lost, exact McNemar p = 0.07"  # 2 (1 + 8) / 2^8
    assert "p = 1" in report.table(contexts, dict(SFT=before, RIPT=before))
    assert "paired" not in report.table(contexts, dict(SFT=before))


def test_a_signal_ends_a_run_and_its_simulators_without_a_traceback(tmp_path):
    """Two runs get theirs after an evaluation. The last gets Ctrl-C, as its simulators do, during imports."""
    cases = [(signal.SIGINT, "metrics.jsonl"), (signal.SIGTERM, "metrics.jsonl"), (signal.SIGINT, "imports")]
    folders = [tmp_path / str(i) for i in range(len(cases))]
    runs = []
    for out in folders:
        command = [sys.executable, HERE / "ript.py", *map(str, QUICK), "--iterations", "9", "--out", out]
        runs.append(
            subprocess.Popen(
                command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
            )
        )
    try:
        for run, out, (number, moment) in reversed(list(zip(runs, folders, cases))):
            # "imports" is when there are two simulators, and multiprocessing's own process.
            while not ((out / moment).exists() or moment == "imports" and len(children_of(run.pid)) > 2):
                assert run.poll() is None
                time.sleep(0.02)
            # They have to be told what to import.
            time.sleep(0.5)
            children = children_of(run.pid)
            (os.killpg if moment == "imports" else os.kill)(run.pid, number)
            # Simulators end their imports first.
            said = run.communicate(timeout=60 if moment == "imports" else 20)[1]
            assert "Traceback" not in said and "KeyboardInterrupt" not in said
            assert run.returncode == -number and len(children) >= 2  # which a shell shows as 130 and 143
            wait_for_the_end_of(children)
    finally:
        for run in runs:
            run.kill()


@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
def test_a_damaged_run_is_not_resumed_and_one_sentence_says_so(finished, tmp_path, damage):
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run/run.pt"
    content = bytearray(path.read_bytes())
    if damage == "changed":  # a few bytes of the weights
        content[len(content) // 2 : len(content) // 2 + 8] = bytes(range(8))
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    if damage == "other":
        torch.save(dict(policy={}), path)
    done = launch("--resume", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.startswith(f"ript.py: cannot read {path}: ")
    assert done.stderr.count("\n") == 1


SHARED = [
    "--checkpoint",
    PRETRAINED,
    "--groups",
    6,
    "--rollouts",
    3,
    "--max_rejected",
    0,
    "--iterations",
    2,
    "--eval_contexts",
    2,
    "--eval_every",
    1,
    "--seed",
    1,
]


def test_two_and_three_processes_give_the_gradient_of_one_on_the_same_groups(tmp_path):
    """Where nothing is replaced, the groups are the same for any number of processes."""
    alone = launch(*SHARED, "--workers", 2, "--out", tmp_path / "1")
    assert alone.returncode == 0, alone.stderr
    for n in (2, 3):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={n}",
            HERE / "ript.py",
            *map(str, SHARED),
            "--workers",
            "1",
            "--out",
            tmp_path / str(n),
        ]
        job = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert job.returncode == 0, job.stderr
        rows, expected = rows_without_seconds(tmp_path / str(n)), rows_without_seconds(tmp_path / "1")
        assert rows[1]["kept"] == expected[1]["kept"] > 1 and rows[1]["updates"] == 1
        for row, other in zip(rows, expected, strict=True):
            # The second iteration's rollouts start from parameters that differ by rounding.
            tolerance = 1e-6 if row["iteration"] < 2 else 1e-3
            for name in set(other) - {"ratio_error", "act_std"}:  # which is rounding itself
                assert row[name] == pytest.approx(other[name], rel=tolerance, abs=1e-6), name
        ours, theirs = (torch.load(tmp_path / str(m) / "run.pt", weights_only=True)["policy"] for m in (n, 1))
        ours = torch.cat([p.detach().flatten() for p in ours.values()])
        theirs = torch.cat([p.detach().flatten() for p in theirs.values()])
        assert (ours - theirs).norm() / theirs.norm() < 1e-6


def test_an_iteration_in_libero_with_the_small_policy(tmp_path, capfd):
    libero_or_skip()
    task = ["--suite", "libero_object", "--task", "0", "--workers", "2"]
    imitation.main(
        [
            *task,
            "--demos_per_task",
            "1",
            "--sft_steps",
            "4",
            "--scale_steps",
            "3",
            "--out",
            str(tmp_path / "sft"),
        ]
    )
    said = capfd.readouterr().out
    assert "SFT on 1 demonstrations" in said and "success in 1 of" in said  # the expert's, of few attempts
    bounds = json.loads((tmp_path / "sft/config.json").read_text())["statistics"]["action"]
    # The expert never turns the hand.
    assert bounds["q01"][3:6] == bounds["q99"][3:6] == [0, 0, 0] and bounds["q01"][6] == -1
    done = launch(
        *task,
        "--checkpoint",
        tmp_path / "sft",
        "--groups",
        1,
        "--rollouts",
        2,
        "--iterations",
        1,
        "--eval_contexts",
        1,
        "--max_rejected",
        0,
        "--out",
        tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    rows = rows_without_seconds(tmp_path / "run")
    assert rows[1]["env_steps"] >= 2 * 100 and rows[1]["rollouts"] == 2


def test_an_iteration_of_openvla_oft_in_libero(tmp_path, monkeypatch):
    """The released checkpoint's form, tiny and random: every group is kept, and an episode has 16 steps."""
    libero_or_skip()
    golden("golden_oft")
    monkeypatch.setattr(ript.load_suite("libero_10"), "HORIZON", 16)
    monkeypatch.setattr(ript, "has_signal", lambda rewards: torch.ones(len(rewards), dtype=torch.bool))
    monkeypatch.setattr(ript, "leave_one_out_advantage", lambda rewards: rewards + torch.tensor([1.0, -1.0]))
    run = [
        "--model",
        "openvla-oft",
        "--suite",
        "libero_long",
        "--task",
        "2",
        "--checkpoint",
        str(GOLDEN / "tiny_oft"),
        "--eval_contexts",
        "2",
        "--workers",
        "2",
        "--collision",
        "true",
        "--image_size",
        "128",
    ]
    ript.main(
        [
            *run,
            "--adapter",
            str(GOLDEN / LORA),
            "--rollouts",
            "2",
            "--groups",
            "1",
            "--iterations",
            "1",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[1]["kept"] == 1 and rows[1]["env_steps"] == 32 and rows[1]["updates"] == 1
    assert rows[1]["grad_norm"] > 0 and rows[1]["ratio_error"] < 1e-3 and rows[1]["scale"] > 0.5
    start, end = (
        OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", folder).state_dict()
        for folder in (GOLDEN / LORA, tmp_path / "run/last")
    )
    moved = {name for name in start if (start[name] != end[name]).any()}
    assert any("action_head" in name for name in moved) and any("lora_" in name for name in moved)
    for name in moved:
        assert "action_head" in name or "language_model.model.layers" in name and "lora_" in name
    ript.main([*run, "--eval", "--adapter", str(tmp_path / "run/last"), "--out", str(tmp_path / "eval")])
    report.main([str(tmp_path / "eval")])
    assert (tmp_path / "eval/evaluation.csv").read_text().count("\n") == 3 and (
        tmp_path / "eval/task2.mp4"
    ).exists()


def test_the_seven_billions_command_asks_the_hub_for_the_released_files(monkeypatch):
    """torchrun ript.py --model openvla-oft --suite libero_long, with a tiny checkpoint in the hub's place."""
    golden("golden_oft")
    asked = []

    def download(repository, allow_patterns, ignore_patterns):
        asked.append((repository, allow_patterns))
        return str(GOLDEN / "tiny_oft")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    cfg = config("--model", "openvla-oft", "--suite", "libero_long", "--device", "cpu")
    header = "openvla_oft/scale_header/LIBERO_LONG_scale_header.pth"
    assert cfg.scale_head == f"tanshh97/RIPT_VLA/{header}"
    assert (cfg.scale_multiplier, cfg.iterations, cfg.groups) == (5, 12, 24)
    policy = OpenVLAOFT.load(dataclasses.replace(cfg, scale_head=str(GOLDEN / SCALE)))
    assert asked == [
        ("moojink/openvla-7b-oft-finetuned-libero-10", ["*.json", "*.safetensors", "*_checkpoint.pt"])
    ]
    assert policy.lora and policy.scale_multiplier == 5
    assert openvla_oft.fetch(cfg.scale_head) == GOLDEN / "tiny_oft" / header
    assert asked[1] == ("tanshh97/RIPT_VLA", [header, f"{header}/*"])


def test_imitation_fits_the_7bs_scale_head_alone_and_saves_the_released_form(tmp_path):
    libero_or_skip()
    golden("golden_oft")
    task = load_suite("libero_10").BENCHMARK.tasks[2]
    write_demonstration(tmp_path / f"{task.name}_demo.hdf5", size=128)
    arguments = ["--model", "openvla-oft", "--suite", "libero_10", "--task", "2", "--demos", str(tmp_path)]
    # Its states are no states of the task's, so its pictures are looked at as they are.
    arguments += ["--image_size", "128", "--workers", "1"]
    imitation.main(
        [
            *arguments,
            "--checkpoint",
            str(GOLDEN / "tiny_oft"),
            "--scale_steps",
            "20",
            "--out",
            str(tmp_path / "sft"),
        ]
    )
    fitted = torch.load(tmp_path / "sft/scale_header.pth", weights_only=True)
    released = torch.load(GOLDEN / SCALE, weights_only=True)
    for part, head in released.items():
        assert {name: p.shape for name, p in head.items()} == {
            name: p.shape for name, p in fitted[part].items()
        }
    start = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10")
    end = OpenVLAOFT.from_pretrained(
        GOLDEN / "tiny_oft", "libero_10", scale_head=tmp_path / "sft/scale_header.pth"
    )
    (demo,) = imitation.libero_demonstrations([], demo_config(*arguments))
    seen = [start.preprocess(look()) for look in demo.looks[:4]]
    labels = np.array([demo.actions[t : t + 8] for t in range(4)])
    texts = [task.language] * 4
    before, after = (
        imitation.imitation_loss(policy, "scale", seen, texts, labels).item() for policy in (start, end)
    )
    assert after < before - 1
    with torch.no_grad():
        assert (start.predict(seen, texts)[0] == end.predict(seen, texts)[0]).all()  # the mean is as it was


@pytest.mark.parametrize("suite,task", [("libero_goal", 1), ("libero_10", 2)])
def test_libero_resets_softly_to_the_stored_state_at_every_episode(suite, task):
    libero_or_skip()
    simulator, cfg = (
        load_suite(suite)(64, True),
        config("--suite", suite, "--task", task, "--eval_contexts", 2),
    )
    contexts = ript.evaluation_contexts(cfg)
    try:
        states = []
        for context in (contexts[0], contexts[1], contexts[0]):
            simulator.reset(context)
            seen = simulator.step(np.random.default_rng(0).uniform(-1, 1, (16, 7))).observation
            states.append((flat_state(simulator), simulator.env.sim.model.body_pos.copy(), seen))
        for name, value in states[0][2].items():
            assert np.abs(value.astype(float) - states[2][2][name]).max() < 1e-6, name
        assert np.abs(states[0][0] - states[2][0]).max() < 1e-9 and (states[0][1] == states[2][1]).all()
        assert np.abs(states[0][0] - states[1][0]).max() > 1e-3
    finally:
        simulator.env.close()


def test_fresh_contexts_of_libero_differ_from_one_another_as_stored_ones_do():
    libero_or_skip()
    simulator, cfg = load_suite("libero_object")(64, True), config("--suite", "libero_object", "--task", 0)
    fresh = [ript.training_context(n, cfg) for n in range(12)]
    means, spreads = [], []
    for contexts in (ript.evaluation_contexts(cfg)[:12], fresh):
        states = []
        for context in contexts:
            simulator.reset(context)
            states.append(simulator.env.sim.data.qpos.copy())  # the arm's joints, fingers, then free bodies
        means.append(np.mean(states, 0))
        spreads.append(np.std(states, 0))
    simulator.env.close()
    arm = slice(7)
    places = [9 + 7 * body + axis for body in range((len(means[0]) - 9) // 7) for axis in (0, 1)]
    for part in (arm, places):
        stored, new = (np.sqrt(np.mean(spread[part] ** 2)) for spread in spreads)
        assert 0.6 < new / stored < 1.6 and np.abs(means[0][part] - means[1][part]).max() < 3 * stored


def write_demonstration(path, steps=12, size=64, actions=None):
    """A file as LIBERO's are: upside-down pictures, actions, simulator states."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"] = rng.uniform(-1, 1, (steps, 7)) if actions is None else actions
        demo["states"] = rng.standard_normal((steps, 50))
        for name, width in (("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2), ("joint_states", 7)):
            demo[f"obs/{name}"] = rng.standard_normal((steps, width))
        for name in ("agentview_rgb", "eye_in_hand_rgb"):
            demo[f"obs/{name}"] = rng.integers(0, 255, (steps, size, size, 3), dtype=np.uint8)


def test_libero_demonstrations_give_observations_actions_and_contexts(tmp_path):
    task = load_suite("libero_goal").BENCHMARK.tasks[3]
    write_demonstration(tmp_path / f"{task.name}_demo.hdf5")
    cfg = demo_config("--suite", "libero_goal", "--task", 3, "--demos", tmp_path, "--collision", "false")
    (demo,) = imitation.libero_demonstrations([], cfg)
    (context,) = imitation.demonstrated_contexts(cfg)
    with h5py.File(tmp_path / f"{task.name}_demo.hdf5") as file:
        source = file["data/demo_0"]
        assert (demo.actions == source["actions"][:]).all() and (context.state == source["states"][0]).all()
        observation = small_policy().preprocess(demo.looks[5]())
        assert (observation["pictures"][0] == source["obs/agentview_rgb"][5][::-1, ::-1]).all()
        turn, ours = source["obs/ee_ori"][5], observation["proprio"][3:6]
        # The same turn, with its axis the other way for more than pi.
        longer = abs(np.linalg.norm(ours) + np.linalg.norm(turn) - 2 * math.pi)
        assert_close(min(np.linalg.norm(ours - turn), longer), 0, 1e-5)
    assert (context.task, context.instruction) == (3, task.language)


def test_steps_in_which_nothing_moves_are_left_out_of_demonstrations():
    actions = np.zeros((7, 7))
    actions[:, 6] = [-1, -1, -1, 1, 1, 1, 1]
    actions[[1, 5], 0] = 0.5
    assert imitation.moving_steps(actions) == [1, 3, 5]


def test_demonstrations_are_drawn_again_as_rollouts_will_show_them(tmp_path):
    libero_or_skip()
    suite = load_suite("libero_goal")
    simulator = suite(64, True)
    context = Context(3, "", 0, suite.held_out(3, 1)[0])
    path = tmp_path / f"{suite.BENCHMARK.tasks[3].name}_demo.hdf5"
    write_demonstration(path, steps=4, size=128)
    seen = []
    with h5py.File(path, "a") as file:
        states = []
        seen.append(simulator.reset(context).observation)
        for t in range(4):
            states.append(flat_state(simulator))
            seen.append(simulator.step(file["data/demo_0/actions"][t : t + 1]).observation)
        del file["data/demo_0/states"]
        file["data/demo_0/states"] = states
    cfg = demo_config("--suite", "libero_goal", "--task", 3, "--demos", tmp_path, "--workers", 1)
    with ript.open_workers(cfg) as workers:
        (demo,) = imitation.libero_demonstrations(workers, cfg)
        # In any order: a state is drawn as it is.
        for t in (2, 0, 3):
            again = demo.looks[t]()
            # After a step, MuJoCo's places are those of 2 ms before.
            assert_close(again["robot0_eef_pos"], seen[t]["robot0_eef_pos"], 2e-3)
            apart = np.abs(again["agentview_image"].astype(int) - seen[t]["agentview_image"]).mean()
            assert again["agentview_image"].shape == (64, 64, 3)
            assert apart < (0.1 if t == 0 else 5), (t, apart)
    simulator.env.close()


# ----------------------------------------------------------------------------------- faults and interruptions
FAULTY = """
import os, signal, sys, threading
from pathlib import Path
import ript

PLAN = Path(os.environ["FAULT"])

def strike(where):
    if PLAN.exists():
        kind, place, n = PLAN.read_text().split()
        if place == where:
            COUNT[where] = COUNT.get(where, 0) + 1
            if COUNT[where] == int(n):
                COUNT.clear()
                PLAN.unlink()
                if kind == "raise":
                    raise ValueError("this was planned")
                os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)

COUNT = {}

class Half:
    # Its message is 100 MB long, and the process dies or stops before the end of it.
    def __reduce__(self):
        number = signal.SIGKILL if self.kind == "kill" else signal.SIGSTOP
        threading.Timer(0.005, os.kill, (os.getpid(), number)).start()
        return bytes, (b"x" * 100_000_000,)

class Faulty(ript.load_suite("tabletop")):
    def reset(self, context):
        strike("reset")
        return super().reset(context)

    def step(self, actions):
        strike("step")
        answer = super().step(actions)
        if PLAN.exists() and "answer" in PLAN.read_text():
            half = Half()
            half.kind = PLAN.read_text().split()[0]
            PLAN.unlink()
            return answer._replace(observation=dict(answer.observation, half=half))
        return answer

    def draw(self, *arguments):
        strike("draw")
        return super().draw(*arguments)
"""


def fingerprint(episodes):
    samples = [record["sample"].tobytes() for episode in episodes for record in episode.records]
    return [(e.group, e.noise, e.executed, e.success) for e in episodes], samples


def collect_all(monkeypatch, workers):
    """The fingerprint of one group, which is kept whatever its rewards are."""
    monkeypatch.setattr(ript, "has_signal", lambda rewards: torch.ones(len(rewards), dtype=torch.bool))
    episodes, _ = collect_with(workers, pretrained(), config("--groups", 1, "--rollouts", 3))
    assert len(episodes) == 3
    return fingerprint(episodes)


@pytest.fixture(scope="module")
def undisturbed(workers):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return collect_all(monkeypatch, workers[:2])


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Workers, and the file that tells them to fail: once, in the way and at the place that it names."""
    folder = tmp_path_factory.mktemp("fault")
    (folder / "faulty.py").write_text(FAULTY)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("FAULT", str(folder / "plan"))
        cfg = dataclasses.replace(config(), suite=f"{folder}/faulty.py:Faulty")
        workers = [Worker(cfg, 0) for _ in range(2)]
        for worker in workers:
            call(worker, "build", 0)
        yield workers, folder / "plan"
        for worker in workers:
            worker.close()


@pytest.mark.parametrize(
    "plan",
    [
        "kill reset 2",
        "kill step 3",
        "kill draw 5",
        "kill answer 1",
        "stop step 3",
        "stop answer 1",
        "raise step 2",
    ],
)
def test_a_simulator_that_dies_stops_or_raises_changes_nothing(monkeypatch, faulty, undisturbed, plan):
    workers, path = faulty
    # Those that are up answer within seconds; those that replace them have to import and build first.
    monkeypatch.setattr(Worker, "PATIENCE", 12)
    start = Worker.start

    def patient_start(worker):
        start(worker)
        worker.PATIENCE = 200

    monkeypatch.setattr(Worker, "start", patient_start)
    processes = {worker.process.pid for worker in workers}
    path.write_text(plan)
    assert collect_all(monkeypatch, workers) == undisturbed
    assert not path.exists() and len(processes - {worker.process.pid for worker in workers}) == 1
    for worker in workers:
        vars(worker).pop("PATIENCE", None)


def test_a_simulator_that_always_fails_ends_the_run_with_its_own_traceback(workers):
    queue = deque([Episode(Context(0, TASKS[0], seed="not a seed"))])
    actor = ript.Actor(pretrained(), 1)
    play = lambda worker, episode: ript.rollout(worker, episode, actor, 32)
    with pytest.raises(RuntimeError, match="failed 3 times at (.|\n)*Context.task=0") as caught:
        list(ript.simulate(play, workers[2:], queue))
    causes, error = [], caught.value
    while error:
        causes.append(str(error))
        error = error.__cause__
    assert "Traceback" in causes[-1] and "np.random.seed(context.seed" in causes[-1]  # of the other process


@pytest.mark.parametrize("rank", [0, 3])
def test_the_rank_that_fails_says_so(monkeypatch, capsys, rank):
    monkeypatch.setattr(ript, "RANK", rank)
    with pytest.raises(SystemExit) as ended:
        with ript.one_sentence():
            raise ript.UserError("no such\nthing")
    assert ended.value.code == 2 and capsys.readouterr().err == "ript.py: no such thing\n"


def test_a_dead_rank_ends_the_job_and_is_named(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        HERE / "ript.py",
        *map(str, QUICK),
        "--workers",
        "1",
        "--iterations",
        "50",
        "--eval_every",
        "0",
        "--out",
        tmp_path,
    ]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "metrics.jsonl").exists():
        assert job.poll() is None
        time.sleep(0.1)
    ranks = children_of(job.pid)
    others = [pid for rank in ranks for pid in children_of(rank)]
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, error = job.communicate(timeout=120)
    assert job.returncode != 0 and "local_rank: 1" in error and "SIGKILL" in error
    wait_for_the_end_of([*ranks, *others])


BARE = """
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
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0 and "tensor(" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------- the command line
MISTAKES = [  # arguments, and what the one sentence says; {tmp} is prepared below
    ("--rollout 8", "unrecognized arguments: --rollout"),
    ("--suite libero", "libero_spatial, libero_object"),
    ("--suite {tmp}/none.py:Suite", "cannot read {tmp}/none.py: FileNotFoundError"),
    ("--suite {tmp}/suite.py:Kitchen", "{tmp}/suite.py:Kitchen is no subclass of Libero"),
    ("--suite {tmp}/suite.py:Path", "Path is no subclass of Libero"),
    ("--suite {tmp}/suite.py:here", "{tmp}/suite.py:here is no subclass of Libero"),
    ("--suite {tmp}/half.py:Suite", "cannot read {tmp}/half.py: SyntaxError"),
    ("--model gpt", "none of tiny, openvla-oft, quest"),
    ("--lr fast", "--lr"),
    ("--rollouts 1", "--rollouts must be at least 2"),
    ("--groups 0", "--groups must be a number above 0"),
    ("--task 2", "--task must be below 2"),
    ("--loss_per step", "'token'"),
    ("--image_size 8", "--image_size must be at least 16"),
    ("--clip nan", "--clip must be a number above 0"),
    ("--momentum 1", "--momentum must be below 1"),
    ("--collision maybe", "--collision"),
    ("--device tpu9", "cannot read --device tpu9: RuntimeError"),
    ("--demos {tmp}/wrong", "--demos is for suites of LIBERO"),
    ("--checkpoint=", "python examples/imitation.py --suite tabletop makes one"),
    ("--checkpoint runs/nowhere", "there is no policy in runs/nowhere: python examples/imitation.py"),
    ("--adapter {tmp}/other", "--adapter and --scale_head are not for --model tiny"),
    ("--checkpoint nowhere", "cannot read nowhere: FileNotFoundError: no such file or directory"),
    ("--checkpoint no/such/run", "no such file or directory, and nothing from the hub"),
    ("--checkpoint {tmp}/none", "cannot read {tmp}/none"),
    ("--checkpoint {tmp}/corrupt", "cannot read {tmp}/corrupt/model.safetensors"),
    ("--checkpoint {tmp}/a_run", "cannot read {tmp}/a_run: ValueError: it is a run, its policies are"),
    (
        "--checkpoint {tmp}/other",
        "cannot read {tmp}/other/config.json: ValueError: it is not a tiny policy's",
    ),
    ("--checkpoint {tmp}/smaller", "cannot read {tmp}/smaller/model.safetensors: RuntimeError"),
    ("--checkpoint {tmp}/bounds", "{tmp}/bounds/config.json: ValueError: q99 of action must be 7 numbers"),
    ("--resume {tmp}/none", "cannot read {tmp}/none/config.json"),
    ("--resume {tmp}/unknown", "cannot read {tmp}/unknown/config.json"),
    ("--resume {tmp}/list", "cannot read {tmp}/list/config.json"),
    ("--out {tmp}/file/run", "cannot write {tmp}/file/run"),
    ("--suite libero_goal --task 0 --demos {tmp}/broken", "cannot read {tmp}/broken"),
    ("--suite libero_goal --task 0 --demos {tmp}/none", "cannot read {tmp}/none"),
]
MISTAKES_OF_STAGE_2 = [
    ("--suite libero_goal --task 0", "libero_goal has no scripted expert: --demos DIR"),
    ("--suite libero_goal --task 0 --demos {tmp}/wrong", "(12, 6)"),
    ("--suite libero_goal --task 0 --demos {tmp}/broken", "cannot read {tmp}/broken"),
    ("--model quest --suite libero_goal --task 0 --demos {tmp}/wrong", "--model quest is not made for"),
    ("--sft_lr 0", "--sft_lr must be a number above 0"),
    ("--sft_step 3", "unrecognized arguments"),
]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("mistakes")
    (tmp / "file").write_text("")
    (tmp / "a_run").mkdir()
    (tmp / "a_run/run.pt").write_text("")
    (tmp / "suite.py").write_text("from pathlib import Path\nhere = Path()\n")
    (tmp / "half.py").write_text("class Suite(")
    for name in ("corrupt", "other", "smaller", "bounds"):
        small_policy().save(tmp / name)
    (tmp / "corrupt/model.safetensors").write_bytes((tmp / "other/model.safetensors").read_bytes()[:1000])
    config = json.loads((tmp / "other/config.json").read_text())
    (tmp / "other/config.json").write_text(json.dumps(config | dict(chunk=4)))
    config["statistics"]["action"]["q99"] = [1.0] * 6
    (tmp / "bounds/config.json").write_text(json.dumps(config))
    save_file({"projector.fc1.bias": torch.zeros(3)}, tmp / "smaller/model.safetensors")
    for name, content in (("unknown", dict(learning_rate=1)), ("list", [1])):
        (tmp / name).mkdir()
        (tmp / name / "config.json").write_text(json.dumps(content))
    name = f"{load_suite('libero_goal').BENCHMARK.tasks[0].name}_demo.hdf5"
    for folder in ("broken", "wrong"):
        (tmp / folder).mkdir()
        write_demonstration(tmp / folder / name, actions=np.zeros((12, 6)))
    (tmp / "broken" / name).write_bytes((tmp / "wrong" / name).read_bytes()[:2000])
    return tmp


LONG_7B = "--model openvla-oft --suite libero_10 "
OFT = LONG_7B + "--task 2 --checkpoint {tmp}/oft "
MISTAKES_OF_CHECKPOINTS = [  # of the released form; {tmp} is prepared below
    ("--model openvla-oft --suite libero_90", "--model openvla-oft is not made for --suite libero_90"),
    (LONG_7B + "--scale_head=", "explores with a scale head"),
    (LONG_7B + "--eval --checkpoint nobody/nothing", "cannot read nobody/nothing"),
    (OFT + "--eval --suite libero_goal", "is for libero_10_no_noops, not 'libero_goal'"),
    (
        OFT + "--scale_head {tmp}/oft/action_head--1000_checkpoint.pt",
        "cannot read {tmp}/oft/action_head--1000",
    ),
    (OFT + "--scale_head {tmp}/none.pth", "cannot read {tmp}/none.pth"),
    (OFT + "--adapter nobody/nothing/inside", "cannot read nobody/nothing/inside"),
    (OFT + "--adapter {tmp}/none", "cannot read {tmp}/none"),
    (OFT + "--adapter {tmp}/rank", "{tmp}/rank/adapter_model.safetensors: RuntimeError: Error(s) in loading"),
    (OFT + "--adapter {tmp}/fewer", "2 weights are missing or of no adapter, among them"),
    (OFT + "--adapter {tmp}/base", "{tmp}/base/adapter_model.safetensors: ValueError"),
    (OFT + "--adapter {tmp}/cut", "cannot read {tmp}/cut/adapter_model.safetensors"),
    (OFT + "--adapter {tmp}/headless", "cannot read {tmp}/headless/openvla_headers.pt"),
    (OFT + "--adapter {tmp}/one_head", "{tmp}/one_head/openvla_headers.pt: KeyError: 'scale_header'"),
    (
        OFT + "--adapter {tmp}/use_dora",
        "{tmp}/use_dora/adapter_config.json: ValueError: adapters with use_dora = True",
    ),
    (OFT + "--adapter {tmp}/peft_type", "adapters with peft_type = 'IA3' are not supported"),
    (
        OFT + "--adapter {tmp}/alpha_pattern",
        "adapters with alpha_pattern = {{'q_proj': 8}} are not supported",
    ),
    (OFT + "--adapter {tmp}/target_modules", "{tmp}/target_modules/adapter_model.safetensors: ValueError"),
    (OFT + "--scale_head {tmp}/part.pth", "cannot read {tmp}/part.pth: RuntimeError"),
    (LONG_7B + "--eval --checkpoint {tmp}/half", "cannot read {tmp}/half/model-00002-of-00003.safetensors"),
    (LONG_7B + "--eval --checkpoint {tmp}/less", "cannot read {tmp}/less/model-00003-of-00003.safetensors"),
    (
        LONG_7B + "--eval --checkpoint {tmp}/unlisted",
        "{tmp}/unlisted: RuntimeError: Error(s) in loading state_dict",
    ),
    (LONG_7B + "--eval --checkpoint {tmp}/pickle", "{tmp}/pickle/action_head--1000_checkpoint.pt"),
    (
        LONG_7B + "--eval --checkpoint {tmp}/two_heads",
        "action_head--1000_checkpoint.pt, action_head--2000_checkpoint.pt",
    ),
    (
        LONG_7B + "--eval --checkpoint {tmp}/statistics",
        "{tmp}/statistics/dataset_statistics.json: ValueError: q01 of proprio must be 8 numbers",
    ),
    (LONG_7B + "--eval --checkpoint {tmp}/wordless", "cannot read {tmp}/wordless/tokenizer.json"),
    (
        LONG_7B + "--eval --checkpoint {tmp}/words",
        "{tmp}/words/tokenizer.json: ValueError: it is not Llama's",
    ),
]
BAD_ADAPTERS = dict(
    use_dora=True, peft_type="IA3", alpha_pattern=dict(q_proj=8), target_modules=["q_proj", "v_proj"]
)


@pytest.fixture(scope="module")
def broken_checkpoints(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("checkpoints")
    for name in ("oft", "half", "less", "unlisted", "pickle", "two_heads", "statistics", "wordless", "words"):
        shutil.copytree(GOLDEN / "tiny_oft", tmp / name, copy_function=shutil.copyfile)
    for name in ("rank", "fewer", "base", "cut", "headless", "one_head", *BAD_ADAPTERS):
        shutil.copytree(GOLDEN / LORA, tmp / name, copy_function=shutil.copyfile)
    for folder in tmp.iterdir():
        folder.chmod(0o755)
    shard = tmp / "half/model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    (tmp / "less/model-00003-of-00003.safetensors").unlink()
    index = json.loads((tmp / "unlisted/model.safetensors.index.json").read_text())
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if "00002" not in shard}
    (tmp / "unlisted/model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(
        {"weight": Path("a class that is not a tensor")}, tmp / "pickle/action_head--1000_checkpoint.pt"
    )
    head = tmp / "two_heads/action_head--1000_checkpoint.pt"
    shutil.copyfile(head, tmp / "two_heads/action_head--2000_checkpoint.pt")
    statistics = json.loads((tmp / "statistics/dataset_statistics.json").read_text())
    statistics["libero_10_no_noops"]["proprio"]["q01"].pop()
    (tmp / "statistics/dataset_statistics.json").write_text(json.dumps(statistics))
    (tmp / "wordless/tokenizer.json").unlink()
    tokenizer = json.loads((tmp / "words/tokenizer.json").read_text())
    tokenizer["added_tokens"] = []
    tokenizer["post_processor"] = None
    tokenizer["model"] = dict(type="WordLevel", vocab={"<unk>": 0, "lift": 1}, unk_token="<unk>")
    (tmp / "words/tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((tmp / "rank/adapter_config.json").read_text())
    (tmp / "rank/adapter_config.json").write_text(json.dumps(settings | dict(r=16)))
    for name, value in BAD_ADAPTERS.items():
        (tmp / name / "adapter_config.json").write_text(json.dumps(settings | {name: value}))
    weights = load_file(tmp / "fewer/adapter_model.safetensors")
    one = next(name for name in weights if "lora_A" in name)
    fewer = {name: p for name, p in weights.items() if name not in (one, one.replace("lora_A", "lora_B"))}
    save_file(fewer, tmp / "fewer/adapter_model.safetensors")
    renamed = {name.replace("layers.1", "layers.7"): p for name, p in weights.items()}
    save_file(renamed, tmp / "base/adapter_model.safetensors")
    cut = tmp / "cut/adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:5000])
    (tmp / "headless/openvla_headers.pt").unlink()
    heads = torch.load(tmp / "one_head/openvla_headers.pt", weights_only=True)
    torch.save(dict(action_header=heads["action_header"]), tmp / "one_head/openvla_headers.pt")
    header = torch.load(tmp / "oft/scale_header.pth", weights_only=True)
    del header["log_b_head"]["bias"]
    torch.save(header, tmp / "part.pth")
    return tmp


def one_sentence_of(program, arguments, tmp, capsys):
    """What a command prints that must end with status 2 and one sentence."""
    with pytest.raises(SystemExit) as ended:
        program.main(arguments.format(tmp=tmp).split())
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and said.err.startswith("ript.py: ")
    return said.err


@pytest.fixture
def no_simulators(monkeypatch):
    """Simulators start before a policy is read. Without them a mistake that is not noticed fails at once."""
    monkeypatch.setattr(ript, "open_workers", lambda cfg: nullcontext([]))


def other_sentences(program, mistakes, tmp, capsys):
    """The mistakes of a table for which a program says something else, with what it says."""
    other = {}
    for arguments, sentence in mistakes:
        said = one_sentence_of(program, arguments, tmp, capsys)
        if sentence.format(tmp=tmp) not in said:
            other[arguments] = said
    return other


def with_out(mistakes):
    return [(arguments + " --out {tmp}/out", sentence) for arguments, sentence in mistakes]


def test_each_mistake_gets_one_sentence_and_status_2(no_simulators, tmp, capsys):
    mistakes = []
    for arguments, sentence in MISTAKES:
        if "--checkpoint" not in arguments and "--resume" not in arguments:
            arguments += f" --checkpoint {PRETRAINED}"
        if "--out" not in arguments and "--resume" not in arguments:
            # What is wrong with the policy is seen when the directory is there already.
            arguments += " --out {tmp}/out" if "libero_goal" in arguments else " --out {tmp}/held"
        mistakes.append((arguments, sentence))
    assert not other_sentences(ript, mistakes, tmp, capsys) and not (tmp / "out").exists()


def test_each_mistake_in_stage_2_gets_one_sentence_and_status_2(no_simulators, tmp, capsys):
    assert not other_sentences(imitation, with_out(MISTAKES_OF_STAGE_2), tmp, capsys)
    assert not (tmp / "out").exists()


def test_each_checkpoint_that_does_not_fit_gets_one_sentence(no_simulators, broken_checkpoints, capsys):
    assert not other_sentences(ript, with_out(MISTAKES_OF_CHECKPOINTS), broken_checkpoints, capsys)
    assert not list((broken_checkpoints / "out").glob("*"))


def test_a_shard_that_the_index_does_not_name_is_not_read(oft, tmp_path):
    folder = tmp_path / "oft"
    shutil.copytree(GOLDEN / "tiny_oft", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    save_file({"projector.fc1.bias": torch.zeros(3)}, folder / "model-00004-of-00004.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = config.pop("torch_dtype")  # as newer versions of transformers write it
    (folder / "config.json").write_text(json.dumps(config))
    found = OpenVLAOFT.from_pretrained(folder, "libero_10", scale_head=GOLDEN / SCALE).state_dict()
    assert all((value == found[name]).all() for name, value in oft[0]().state_dict().items())


def test_simulators_import_neither_transformers_nor_peft():
    program = (
        "import sys, ript; ript.load_suite('tabletop'); print({'transformers', 'peft'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_a_bad_file_raises_an_error_that_a_caller_can_catch(tmp):
    with pytest.raises(ValueError, match="cannot read .*corrupt"):
        Tiny.from_pretrained(tmp / "corrupt")
    with pytest.raises(ValueError, match="config.json"):
        OpenVLAOFT.from_pretrained(tmp / "corrupt", "libero_10")


def test_a_mistake_leaves_no_traceback_at_the_command_line():
    done = launch("--rollouts", 1)
    assert done.returncode == 2
    assert done.stderr == "ript.py: --rollouts must be at least 2 and below 2 ** 31, got 1\n"


IDENTITY = [  # what would make another run of one that is there
    ("--resume {run} --eval", "of which --eval is False"),
    ("--resume {run} --task 1", "of which --task is -1"),
    ("--resume {run} --seed 3", "of which --seed is 0"),
    ("--resume {run} --suite tabletop_pretrain", "of which --suite is tabletop"),
    ("--resume {run} --eval_contexts 1", "of which --eval_contexts is 2"),
    ("--resume {run} --out elsewhere", "of which --out is"),
    ("--resume {run} --checkpoint {run}/last", "of which --checkpoint is"),
    ("--out {run}", "has a run: go on with --resume"),
    ("--out {run} --eval", "has a run: go on with --resume"),
    ("--seed 9223372036854775808", "--seed must be at least 0 and below 2 ** 31"),
]


def test_a_run_stays_what_it_is(no_simulators, finished, capsys):
    run = finished[0]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for arguments, sentence in IDENTITY:
        with pytest.raises(SystemExit) as ended:
            ript.main(arguments.format(run=run).split())
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1 and sentence in said, arguments
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}, arguments


ORIGIN = [  # what a saved policy is not made for
    ("--suite libero_object --task 0", "made for --suite tabletop, not libero_object"),
    ("--image_size 128", "made for --image_size 64, not 128"),
    ("--collision false", "made for --collision True, not False"),
]


def test_a_policy_is_used_for_what_it_was_made_for(no_simulators, finished, tmp, capsys):
    for arguments, sentence in ORIGIN:
        arguments += f" --checkpoint {finished[0]}/last --out {{tmp}}/out"
        for program in (ript, imitation):
            assert sentence in one_sentence_of(program, arguments, tmp, capsys)
    assert not list((tmp / "out").glob("*"))


ORIGIN_OF_ADAPTERS = [
    ("--prefix prompt", "made for --prefix exact, not prompt"),
    ("--checkpoint {tmp}/other", "made for --checkpoint oft, not other"),
    ("--image_size 128", "made for --image_size 256, not 128"),
    ("--scale_head {tmp}/oft/scale_header.pth", "--adapter brings a scale head of its own"),
]


@pytest.fixture(scope="module")
def saved_adapter(oft, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("adapter")
    for name in ("oft", "other"):
        shutil.copytree(GOLDEN / "tiny_oft", tmp / name, copy_function=shutil.copyfile)
    scale_head = tmp / "oft/scale_header.pth"
    cfg = config(*OFT.format(tmp=tmp).split(), "--scale_head", scale_head, "--device", "cpu")
    OpenVLAOFT.load(cfg).save(tmp / "adapter")
    return tmp


def test_an_adapter_is_used_for_what_it_was_made_for(saved_adapter):
    cfg = config(*OFT.format(tmp=saved_adapter).split(), "--adapter", saved_adapter / "adapter")
    assert OpenVLAOFT.load(cfg).origin["prefix"] == "exact"
    for arguments, sentence in ORIGIN_OF_ADAPTERS:
        arguments = (OFT + "--adapter {tmp}/adapter " + arguments).format(tmp=saved_adapter).split()
        with pytest.raises(ript.UserError, match=sentence):
            OpenVLAOFT.load(config(*arguments))


def test_the_memory_of_the_gpu_decides_how_many_chunks_have_gradient_at_once(monkeypatch):
    chosen = {}
    for card in (16, 22, 23.6, 39.5, 79.2):
        properties = SimpleNamespace(total_memory=card * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        chosen[card] = openvla_oft.chunks_that_fit("cuda")
        # As measured on an H100, with room for CUDA and the simulators.
        assert chosen[card] == 1 or 18.7 + 0.7 * chosen[card] + 3 <= card
    assert list(chosen.values()) == [1, 1, 2, 16, 16] and openvla_oft.chunks_that_fit("cpu") == 4


def test_no_more_held_out_contexts_are_asked_for_than_there_are(no_simulators, tmp_path, capsys):
    arguments = f"--suite libero_object --task 0 --checkpoint {PRETRAINED} --eval"
    arguments += " --eval_contexts 51 --out {tmp}"
    said = one_sentence_of(ript, arguments, tmp_path, capsys)
    assert "--eval_contexts must be at most 50, got 51" in said


def test_two_runs_never_share_a_directory(tmp_path):
    program = "import sys, time; from pathlib import Path; from examples.headless import hold\n"
    program += "with hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", program, tmp_path]
    first = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    done = launch("--eval", "--out", tmp_path)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr == f"ript.py: another run is using {tmp_path}: choose another --out\n"
    first.kill()
    first.wait()
    # It ends with the process, even with one that was killed.
    with headless.hold(tmp_path):
        pass


@pytest.mark.parametrize(
    "settings,device",
    [
        (dict(), "0"),
        (dict(LOCAL_RANK="1"), "1"),
        (dict(LOCAL_RANK="2"), None),
        (dict(CUDA_VISIBLE_DEVICES=""), "0"),
        (dict(CUDA_VISIBLE_DEVICES="1"), "1"),
        (dict(CUDA_VISIBLE_DEVICES="0, 1", LOCAL_RANK="1"), "1"),
        (dict(CUDA_VISIBLE_DEVICES="5"), None),
        (dict(CUDA_VISIBLE_DEVICES="-1"), "0"),
        (dict(CUDA_VISIBLE_DEVICES="GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", LOCAL_RANK="1"), "1"),
        (dict(CUDA_VISIBLE_DEVICES="MIG-GPU-8932f937/1/0"), "0"),
        (dict(MUJOCO_EGL_DEVICE_ID="7"), "7"),
        (dict(MUJOCO_GL="osmesa"), None),
    ],
)
def test_pictures_are_drawn_by_the_trainers_gpu_where_there_are_enough(monkeypatch, settings, device):
    monkeypatch.setattr(headless, "egl_devices", lambda: 2)
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    headless.choose_device()
    assert os.environ.get("MUJOCO_EGL_DEVICE_ID") == device
    # robosuite would take it for numbers of EGL's devices.
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(
    "config", [None, "", "[]", "assets: /elsewhere", "benchmark_root: {root}\nassets: {root}"]
)
def test_libero_gets_paths_that_fit_whatever_it_finds(monkeypatch, tmp_path, config):
    folder = tmp_path / "old"
    if config is not None:
        folder.mkdir()
        root = headless.place_of("libero") / "libero"
        (folder / "config.yaml").write_text(config.format(root=root))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(folder))
    headless.set_libero_paths(tmp_path / "private")
    program = "from libero.libero import get_libero_path; print(get_libero_path('bddl_files'))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0 and Path(done.stdout.strip()).is_dir() and done.stdout.count("\n") == 1


def test_another_libero_on_the_path_is_refused(tmp_path):
    (tmp_path / "libero/libero").mkdir(parents=True)
    for folder in ("libero", "libero/libero"):
        (tmp_path / folder / "__init__.py").write_text("input('where?')")
    done = launch("--eval", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "hides the libero of requirements.txt" in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_opengl_and_another_mujoco_get_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(headless, "version", lambda package: "3.4.0")
    with pytest.raises(ImportError, match="pip install mujoco==3.3.2"):
        headless.prepare()
    done = launch("--groups", 1, "--out", tmp_path, MUJOCO_GL="egl", MUJOCO_EGL_DEVICE_ID="99")
    assert done.returncode == 2 and done.stderr.startswith("ript.py: the simulator does not start")
    assert done.stderr.count("\n") == 1


def test_every_row_of_the_gpu_benchmark_runs_with_a_small_policy_on_a_cpu():
    command = [sys.executable, HERE / "examples/benchmark.py", "gpu", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout and done.stdout.count("\n") > 20


@pytest.mark.parametrize("arguments", [["--help"], ["-h", "--iterations", "3"]])
def test_help_reads_as_documentation(arguments):
    done = launch(*arguments)
    assert done.returncode == 0 and "Algorithm 1   repeat M times:" in done.stdout
    for field in dataclasses.fields(Config):
        assert (
            f"--{field.name}" in done.stdout and " ".join(field.metadata["help"].split()[:2]) in done.stdout
        )


@pytest.mark.parametrize("arguments", [["--suite", "nowhere"], ["--model", "nothing"], ["--resume", "none"]])
def test_help_comes_whatever_else_is_wrong(arguments):
    done = launch("-h", *arguments)
    assert done.returncode == 0 and "Algorithm 1   repeat M times:" in done.stdout and not done.stderr


def test_the_script_alone_prints_its_help_and_gives_the_formulas(tmp_path):
    shutil.copyfile(HERE / "ript.py", tmp_path / "ript.py")
    done = subprocess.run([sys.executable, "ript.py", "-h"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--groups" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, "ript.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "examples" in done.stderr


def test_presets_yield_to_the_command_line_and_libero_long_is_libero_10():
    assert config("--suite", "libero_long").suite == "libero_10"
    assert config().iterations == 6 and config("--iterations", 3).iterations == 3
    assert load_suite("libero_10").HORIZON == 520 and load_suite("libero_object").HORIZON == 280
    # Neither an evaluation nor stage 2 writes over the run's files.
    assert config("--eval", "--checkpoint", "x").out == "runs/tabletop_eval" != config().out
    assert demo_config().out == config().checkpoint == "runs/tabletop_sft"
    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_long")
    oft = [config("--model", "openvla-oft", "--suite", suite) for suite in suites]
    assert [cfg.scale_multiplier for cfg in oft] == [2, 5, 5, 5]
    assert [cfg.lr for cfg in oft] == [5e-5, 5e-5, 1e-5, 5e-5]
    paper = dict(rollouts=8, groups=24, passes=1, clip=0.1, iterations=12, eval_contexts=50)
    assert all(vars(cfg).items() >= paper.items() for cfg in oft)


def test_a_policy_is_saved_where_the_laptops_bounds_move_with_the_multiplier():
    cfg = config("--checkpoint", PRETRAINED, "--scale_multiplier", 0.5)
    half, whole = Tiny.load(cfg), Tiny.load(dataclasses.replace(cfg, scale_multiplier=1.0))
    with torch.no_grad():
        scales = [policy.density(random_observations(2), TASKS)[1].exp() for policy in (half, whole)]
    assert_close(scales[0], scales[1] / 2)


def test_every_experiment_of_the_readme_is_a_run_that_ript_accepts(tmp_path):
    evidence = runpy.run_path(str(HERE / "examples/evidence.py"))
    for name, (shared, stage_2, stage_3) in evidence["EXPERIMENTS"].items():
        if name == "libero":  # and those below it
            libero_or_skip()
        ript.check(demo_config(*shared.split(), *stage_2.split(), "--out", tmp_path))
        ript.check(config(*shared.split(), *stage_3.split(), "--out", tmp_path))


def test_the_controls_are_suites_with_the_offsets_and_seeds_that_they_say():
    file = str(HERE / "examples/controls.py")
    controls = runpy.run_path(file)
    for offset in controls["OFFSETS"]:
        suite = load_suite(f"{file}:{controls['name_of'](offset)}")
        assert suite.SLIP[:2] == offset and suite.IMITATION == load_suite("tabletop").IMITATION
    suite = load_suite(f"{file}:Fresh")
    simulator = suite(64, True)
    simulator.reset(Context(0, TASKS[0], 7))
    place = simulator.cube().copy()
    simulator.env.close()
    simulator = load_suite("tabletop")(64, True)
    simulator.reset(Context(0, TASKS[0], 157))
    assert (simulator.cube() == place).all()
    simulator.env.close()


@pytest.fixture(scope="module")
def random_episodes():
    """8 groups of 8 with a query each, whose success is chance: what they teach does not matter here."""
    generators = [np.random.default_rng(i) for i in range(64)]
    records = pretrained().act(random_observations(64), TASKS * 32, generators)
    episodes = []
    for number, record in enumerate(records):
        context = Context(number % 2, TASKS[number % 2], number)
        noise = 0, 0, number // 8, number % 8
        success = bool(np.random.default_rng(number).random() < 0.5)
        episodes.append(Episode(context, number // 8, noise, [record], [8], success))
    return episodes


def test_with_the_clip_a_second_pass_takes_back_much_of_the_first_and_without_it_adds_to_it(random_episodes):
    controls = runpy.run_path(str(HERE / "examples/controls.py"))

    def kl(passes, clip):
        cfg = config("--checkpoint", PRETRAINED, "--passes", passes, "--clip", clip)
        policy = controls["updated"](random_episodes, cfg)
        return controls["moved"](pretrained(), policy, random_episodes)["approx_kl"]

    assert kl(2, 0.1) < kl(1, 0.1) / 2 and kl(2, 1e6) > kl(1, 0.1) * 2


def test_where_a_step_leaves_the_clip_the_next_gradient_points_back(random_episodes):
    rewards = ript.rewards_of([random_episodes]).view(8, 8)
    advantage = ript.leave_one_out_advantage(rewards).flatten()
    records = [episode.records[0] for episode in random_episodes]
    start = pretrained()
    old = start.log_prob(records).detach()

    def gradient(policy, clip):
        log_prob = policy.log_prob(records)
        weight = ript.loss_weight(torch.ones(old.shape, dtype=torch.bool))
        loss, _ = ript.ppo_clip_loss(log_prob, old, advantage, weight, clip)
        policy.zero_grad()
        loss.backward()
        return torch.nn.utils.parameters_to_vector([p.grad for p in policy.parameter_groups()[0]["params"]])

    first = gradient(start, 0.1)
    for lr, with_clip, without in ((2e-4, (-1, -0.5), (0, 1)), (1e-5, (0.9, 1), (0.9, 1))):
        policy = pretrained()
        gradient(policy, 0.1)
        torch.optim.AdamW(policy.parameter_groups(), lr, (0.0, 0.999)).step()
        for clip, (low, high) in ((0.1, with_clip), (1e6, without)):
            assert low < torch.cosine_similarity(first, gradient(policy, clip), 0) < high


def test_in_one_scene_the_instruction_decides_what_succeeds():
    libero_or_skip()
    file = str(HERE / "examples/libero_suites.py")
    suite = load_suite(f"{file}:OneScene")
    assert load_suite(f"{file}:Misled").INSTRUCTIONS == suite.INSTRUCTIONS[::-1]
    assert all((a == b).all() for a, b in zip(suite.held_out(0, 50), suite.held_out(1, 50)))
    simulator = suite(64, True)
    places = []
    for task, text in enumerate(suite.INSTRUCTIONS):
        thing = suite.THINGS[task]
        assert thing.removesuffix("_1").replace("_", " ") in text
        assert simulator.demonstrate(Context(task, text, 5)).success
        data, numbers = simulator.env.sim.data, simulator.env.obj_body_id
        assert np.abs(data.body_xpos[numbers[thing]] - data.body_xpos[numbers["basket_1"]])[:2].max() < 0.1
        simulator.build(1 - task)
        assert not simulator.success()
        simulator.reset(Context(task, text, 5))
        places.append(data.qpos.copy())
    assert (places[0] == places[1]).all()
    simulator.env.close()


def test_metrics_and_checkpoints_are_written_whole_or_not_at_all(tmp_path):
    def limit(size):  # of files, as a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    big = torch.zeros(10**6)
    writers = dict(
        text=lambda p: p.write_text("x" * 10**6),
        pt=lambda p: torch.save(big, p),
        safetensors=lambda p: save_file(dict(big=big), p),
    )
    for suffix, writer in writers.items():
        path = tmp_path / f"file.{suffix}"
        ript.write(path, lambda p: p.write_text("first"))
        limit(100_000)
        try:
            with pytest.raises(ript.UserError, match=f"cannot write {path}: "):
                ript.write(path, writer)
        finally:
            limit(resource.RLIM_INFINITY)
        assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
        path.unlink()
