"""The claims of ript.py, each as a test that fails when the claim does. Run: bash run_libero.sh test"""
import dataclasses
import json
import math
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ript
from ript import Architecture, Config, Context, Episode, Libero, OpenVLAOFT, Worker, load_suite

HERE = Path(__file__).parent
GOLDEN = Path(os.environ.get("RIPT_GOLDEN", HERE / ".." / "shared" / "golden"))
TASKS = ["lift the red cube", "lift the green cube"]


def golden(name):
    """Arrays of the original code's outputs; skips where they are not at hand."""
    path = GOLDEN / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there: set RIPT_GOLDEN to the directory of golden arrays")
    return {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(path).items() if value.dtype.kind != "U"}


def config(*argv):
    return ript.parse_config([str(word) for word in argv])


def small_policy(seed=0, **changes):
    torch.manual_seed(seed)
    return OpenVLAOFT(dataclasses.replace(Architecture(), **changes))


def trained(policy, stage="ript"):
    """Names and parameters that a stage trains."""
    policy.trainable(stage)
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def random_observations(n, seed=0):
    rng = np.random.default_rng(seed)
    return [dict(pictures=rng.integers(0, 255, (2, 64, 64, 3), dtype=np.uint8), proprio=rng.standard_normal(8))
            for _ in range(n)]


def assert_close(a, b, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(a).float(), torch.as_tensor(b).float(), atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------------------------- the algorithm
def test_leave_one_out_advantage_agrees_with_the_original_and_with_the_definition():
    g = golden("golden_math")
    for case in ("binary_3x8", "float_2x4"):
        assert_close(ript.leave_one_out_advantage(g[f"rloo_{case}_reward"]).flatten(), g[f"rloo_{case}_adv_group"])
    rewards = torch.rand(5, 6)
    for c in range(5):
        for k in range(6):
            others = [rewards[c, j] for j in range(6) if j != k]
            assert_close(ript.leave_one_out_advantage(rewards)[c, k], rewards[c, k] - sum(others) / 5)
    with pytest.raises(ValueError, match="K >= 2"):
        ript.leave_one_out_advantage(torch.ones(3, 1))


def test_has_signal_is_false_exactly_where_every_advantage_is_zero():
    rewards = torch.tensor([[0., 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1], [1, 1, 0]])
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
    loss, stats = ript.ppo_clip_loss(log_prob, old, torch.tensor([advantage]), torch.ones_like(old, dtype=torch.bool),
                                     (low, high))
    # The original divides by all steps of the episode and by the accumulation; here is a part of the steps.
    loss = loss * old.shape[1] / (g["ppo_num_valid_step"].item() * tokens) / accumulation
    loss.backward()
    prefix = f"ppo_sum_on_action_dim_fp32_{sign}"
    assert_close(loss, g[f"{prefix}_loss"])
    assert_close(stats["ratio"], g[f"{prefix}_ratio"].mean(), 1e-5)
    assert_close(stats["clip_frac"], g[f"{prefix}_clipfrac"])
    assert_close(mean.grad, g[f"{prefix}_dmean"])
    assert_close(log_scale.grad, g[f"{prefix}_dlogscale"])


def test_ppo_clip_loss_is_a_mean_over_masked_steps_then_over_episodes_or_over_tokens():
    torch.manual_seed(0)
    new, old, advantage = torch.randn(3, 5) * 0.3, torch.randn(3, 5) * 0.3, torch.tensor([1., -0.5, 0.25])
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 0]]).bool()
    low, high = 0.1, 0.3

    def term(e, s):
        r = math.exp(new[e, s] - old[e, s])
        return -min(r * advantage[e].item(), min(max(r, 1 - low), 1 + high) * advantage[e].item())

    terms = [[term(e, s) for s in range(5) if mask[e, s]] for e in range(3)]
    assert_close(ript.ppo_clip_loss(new, old, advantage, mask, (low, high))[0], np.mean([np.mean(t) for t in terms]))
    assert_close(ript.ppo_clip_loss(new, old, advantage, mask, (low, high), "token")[0], np.mean(sum(terms, [])))
    poisoned = torch.where(mask, new, float("nan")).requires_grad_()
    loss, stats = ript.ppo_clip_loss(poisoned, old, advantage, mask, (low, high))
    loss.backward()
    assert (poisoned.grad[~mask] == 0).all() and torch.isfinite(poisoned.grad).all()
    assert all(torch.isfinite(value) for value in stats.values()) and stats["approx_kl"] >= 0
    with pytest.raises(ValueError, match="episode"):
        ript.ppo_clip_loss(new, old, advantage, mask, per="step")


def test_the_four_formulas_solve_a_bandit():
    """40 steps of RIPT with a Laplace policy find an interval of actions that it first hits one time in ten."""
    torch.manual_seed(0)
    mean, log_scale = torch.zeros(1, requires_grad=True), torch.tensor([math.log(0.3)])
    optimizer, share = torch.optim.Adam([mean], 0.05), []
    for _ in range(40):
        action = mean.detach() + torch.distributions.Laplace(0., 0.3).sample((16, 8, 1))
        rewards = ((action > 0.5) & (action < 1.0)).float()[..., 0]
        share.append(rewards.mean().item())
        kept = ript.has_signal(rewards)
        advantage, action = ript.leave_one_out_advantage(rewards)[kept].flatten(), action[kept].flatten(0, 1)[:, None]
        old = ript.laplace_log_prob(action, mean.detach(), log_scale)
        for _ in range(2):
            loss, _ = ript.ppo_clip_loss(ript.laplace_log_prob(action, mean, log_scale), old, advantage,
                                         torch.ones_like(old, dtype=torch.bool))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert share[0] < 0.15 and np.mean(share[-5:]) > 0.5


# ------------------------------------------------------------------------------------------------- the policy
def test_gradient_reaches_what_a_stage_trains_and_the_output_is_the_same_whatever_it_trains():
    observations, texts = random_observations(3), ["lift the red cube", "lift the green cube", "lift it"]
    everything = {"language_model", "action_head", "vision_backbone", "projector", "proprio_projector"}
    decoder = ("language_model.model.layers", "action_head")  # as the 7B: two passes, through the last positions only
    for stage, parts, expected in (("sft", (), everything), ("ript", ("action_head",), {"action_head"}),
                                     ("ript", decoder, {"language_model", "action_head"}), ("scale", (), {"scale_head"})):
        policy = small_policy(trained=parts)
        with torch.no_grad():
            reference = policy.predict(observations, texts)
        parameters = trained(policy, stage)
        mean, log_scale = policy.predict(observations, texts)
        assert_close(mean, reference[0], 1e-5)
        assert_close(log_scale, reference[1], 1e-5)
        (log_scale if stage == "scale" else mean).sum().backward()
        reached = {name for name, p in policy.named_parameters() if p.grad is not None}
        assert {name.split(".")[0] for name in reached} == expected and reached <= set(parameters)
        if parts == decoder:
            assert policy.language_model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0


def test_attention_is_bidirectional():
    policy, observations = small_policy(), random_observations(1)
    x, mask, positions = policy._embed(observations, ["lift"])
    run = lambda x: policy.language_model.model(inputs_embeds=x, attention_mask=mask, position_ids=positions)
    changed = x.clone()
    changed[:, -3] += 1
    assert (run(x).last_hidden_state[:, 0] - run(changed).last_hidden_state[:, 0]).abs().max() > 1e-4


def test_a_transformers_that_ignores_the_mask_is_noticed_when_a_policy_is_loaded(monkeypatch, capsys):
    from transformers import LlamaModel
    forward = LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", lambda self, attention_mask=None, **rest: forward(self, **rest))
    with pytest.raises(SystemExit):
        pretrained()
    assert "attention is causal" in capsys.readouterr().err


def test_a_batch_of_mixed_instructions_equals_them_one_by_one():
    policy, observations = small_policy(), random_observations(3)
    texts = ["lift the green cube", "push", "lift the red cube"]
    together = policy.predict(observations, texts)
    for i in range(3):
        for a, b in zip(together, policy.predict(observations[i:i + 1], texts[i:i + 1])):
            assert_close(a[i], b[0], 1e-5)
    other = policy.predict(observations, texts[::-1])[0]
    assert (other[0] - together[0][0]).abs().max() > 1e-5  # the words reach the heads


def test_act_scores_a_sample_with_the_density_that_drew_it_and_repeats_with_its_generator():
    policy, observations, texts = small_policy(), random_observations(2), ["lift the red cube"] * 2
    policy.scale_multiplier = 2.0
    rngs = lambda: [np.random.default_rng([0, i]) for i in range(2)]
    records = policy.act(observations, texts, rngs())
    assert (policy.act(observations, texts, rngs())[1]["sample"] == records[1]["sample"]).all()
    with torch.no_grad():
        assert_close(policy.log_prob(records), np.stack([r["log_prob"] for r in records]), 1e-5)
        mean, log_scale = policy._density(observations, texts)
    expected = torch.distributions.Laplace(mean, log_scale.exp()).log_prob(
        torch.tensor(np.stack([r["sample"] for r in records]))).sum(-1)
    assert_close(np.stack([r["log_prob"] for r in records]), expected, 1e-4)
    draws = np.stack([policy.act(observations[:1], texts[:1], [np.random.default_rng(i)])[0]["sample"] for i in range(200)])
    assert_close(np.abs(draws - mean[0].numpy()).mean((0, 1)), log_scale[0].exp().mean(0), 0.03)  # E|noise| = b
    assert (policy.act(observations, texts)[0]["sample"] == mean[0].numpy()).all()


def test_actions_survive_the_way_to_head_units_and_back():
    policy = small_policy()
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 8, 7))
    actions[..., 6] = np.sign(actions[..., 6])
    assert_close(policy.to_env_actions(policy.from_env_actions(actions)), actions, 1e-6)
    assert policy.to_env_actions(np.array([0, 0, 0, 0, 0, 0, 0.9]))[6] == -1  # the head's 1 is open


def test_labels_are_clipped_to_the_bounds_and_what_never_moved_stays_still():
    policy = small_policy()
    policy.arch.statistics["action"] = dict(q01=[-1, -1, -1, 0, 0, 0, -1], q99=[1, 1, 1, 0, 0, 0, 1])
    labels = policy.from_env_actions(np.array([[2, -2, 0.5, 0, 0.3, -0.3, 1.0]]))
    assert_close(labels, [[1, -1, 0.5, -1, 1, -1, 0]], 1e-6)
    noise = np.random.default_rng(0).laplace(size=(100, 7))
    assert np.abs(policy.to_env_actions(noise)[:, 3:6]).max() < 1e-6  # exploration does not turn the hand


# ---------------------------------------------------------------------------- the released checkpoints' form
LORA, SCALE = "tiny_oft/ript_lora", "tiny_oft/scale_header.pth"


@pytest.fixture(scope="module")
def oft():
    """(prefix, with adapter) -> the original's tiny checkpoint; the original's outputs and its instructions."""
    g, loaded = golden("golden_oft"), {}

    def policy(prefix="exact", lora=False):
        if (prefix, lora) not in loaded:
            source = dict(adapter=GOLDEN / LORA) if lora else dict(scale_head=GOLDEN / SCALE)
            loaded[prefix, lora] = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", prefix=prefix, **source)
        return loaded[prefix, lora]
    return policy, g, json.loads((GOLDEN / "golden_oft.json").read_text())["_instructions"]


def raw_observation(g, i):
    raw = {f"robot0_{name}": g[f"raw_{name}"][i].numpy() for name in ("eef_pos", "eef_quat", "gripper_qpos")}
    return raw | {"agentview_image": g["raw_agentview"][i].numpy(), "robot0_eye_in_hand_image": g["raw_wrist"][i].numpy()}


def original_observations(g):
    """The original's own pictures, read back from SigLIP's normalisation, and proprio."""
    pictures = (g["pixel_values"].unflatten(1, (2, 2, 3))[:, :, 1] * 0.5 + 0.5).mul(255).round().byte()
    return [dict(pictures=pictures[i].permute(0, 2, 3, 1).numpy(), proprio=g["state"][i].numpy()) for i in range(3)]


def test_pictures_are_tensorflows_within_a_few_values():
    g = golden("golden_preprocess")
    for name in ("gradient256", "noise128", "scene256", "scene128"):
        ours = torch.tensor(ript.openvla_picture(np.ascontiguousarray(g[f"{name}/input"].numpy()[::-1, ::-1])))
        off = (ours.int() - g[f"{name}/cropped224"].int()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 1e-4  # of 150,528 values; round(x * 255) would be off in a fourth
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
        towers = [tower(pixels[:, :, i].flatten(0, 1)) for i, tower in enumerate(policy.vision_backbone.values())]
        for ours, name in zip(towers, ("dino", "siglip")):
            assert_close(ours, g[f"{prefix}_{name}"].flatten(0, 1), 1e-5)
        projected = policy.projector(torch.cat(towers, -1)).unflatten(0, (3, 2)).flatten(1, 2)
        assert_close(projected, g[f"{prefix}_projected"], 1e-5)
        assert_close(policy.proprio_projector(g["proprio_norm"]), g["proprio_token"], 1e-5)


def test_the_sequence_of_embeddings_is_the_originals(oft):
    policy, g, texts = oft
    with torch.no_grad():
        x, mask, positions = policy()._embed(original_observations(g)[:1], texts[:1])
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
                assert (grads[names_of(key.removeprefix("grad/"))] - expected).norm() <= 1e-4 * expected.norm() + 1e-6, key
        model.zero_grad()
    base = policy("exact", False)
    sum(part.sum() for part in base.predict(original_observations(g), texts)).backward()
    assert {name.split(".")[0] for name, p in base.named_parameters() if p.grad is not None} == {"action_head", "scale_head"}
    base.zero_grad()


def test_an_optimiser_step_equals_the_originals_where_its_rule_is_the_intended_one(oft):
    """Differences on purpose: the gradient's norm is clipped jointly, not for adapters and heads apart; ratios are of
    whole action steps in float32 (the golden run is float32 too); the last step of an episode is always trained on."""
    g, names = golden("golden_ppo_step"), [names_of(name) for name in np.load(GOLDEN / "golden_ppo_step.npz")["param_names"]]
    policy, observations, text = OpenVLAOFT.from_pretrained(
        GOLDEN / "tiny_oft", "libero_10", GOLDEN / LORA, prefix="prompt"), original_observations(oft[1]), oft[2][0]
    policy.arch.trained += ("scale_head",)
    optimizer = torch.optim.AdamW(policy.trainable("ript"), 5e-5)
    before = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    rows = iter(zip(g["obs_index"].tolist(), g["actions_normalized"].numpy(), g["ref_log_prob"].sum(-1).numpy()))
    episodes = []
    for length in g["episode_len"].tolist():
        records = [dict(observation=observations[i], instruction=text, sample=sample, log_prob=log_prob)
                   for i, sample, log_prob in (next(rows) for _ in range(length))]
        episodes.append(Episode(Context(0, text, 0), records=records, executed=[8] * length))
    cfg = config("--model", "openvla-oft", "--suite", "libero_10", "--minibatch", 4, "--max_grad_norm", 1e9)
    stats = ript.update(policy, optimizer, episodes, g["reward"].float()[None], cfg, run_of())
    named = dict(policy.named_parameters())
    lora, heads = ([named[name].grad for name in before if ("lora_" in name) == which] for which in (True, False))
    norms = [torch.cat([grad.flatten() for grad in part]).norm().item() for part in (lora, heads)]
    assert norms[0] == pytest.approx(g["mb1_gradient_norm_model_stats"].item(), rel=1e-4)
    assert norms[1] == pytest.approx(g["mb1_gradient_norm_header_stats"].item(), rel=1e-4)
    assert stats["loss"] / 10 == pytest.approx(g["mb1_pg_loss_stats"].item(), rel=1e-3)  # the original's mean over 10 chunks
    assert stats["ratio"] == pytest.approx(g["mb1_pg_ratio_stats"].item(), rel=1e-4)
    assert stats["grad_norm"] == pytest.approx(math.hypot(*norms), rel=1e-5)
    for name, value in before.items():  # once more, with the original's clipping
        named[name].data = value.clone()
        named[name].grad *= min(1, 1 / norms["lora_" not in name])
    torch.optim.AdamW(policy.trainable("ript"), 5e-5).step()
    for name, norm, delta in zip(names, g["mb1_grad_norm_after_clip"].tolist(), g["mb1_delta_norm"].tolist()):
        assert (name in before) == (norm >= 0), name
        if name in before:
            assert named[name].grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name
            assert (named[name] - before[name]).norm().item() == pytest.approx(delta, rel=2e-3), name


def test_the_seven_billion_are_those_of_the_real_checkpoint_and_take_439_adapters():
    directory = HERE / ".." / "shared" / "openvla-7b-oft-finetuned-libero-10"
    if not directory.exists():
        pytest.skip(f"{directory} is not there: the configuration and index of the released checkpoint")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    with torch.device("meta"):
        policy = OpenVLAOFT(Architecture.read(directory, "libero_10"))
        own = {name: value for name, value in policy.state_dict().items()
               if not name.startswith(("action_head", "scale_head", "proprio_projector"))}
        assert own.keys() == index["weight_map"].keys()
        assert sum(value.numel() * 2 for value in own.values()) == index["metadata"]["total_size"]  # bfloat16
        assert sum(p.numel() for p in policy.action_head.parameters()) == 151_117_831
        assert sum(p.numel() for p in policy.scale_head.parameters()) == 167_899_143
        policy.add_lora()
    adapters = {name: p for name, p in policy.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 439 and sum(p.numel() for p in adapters.values()) == 110_828_288
    trained = sum(p.numel() for p in policy.trainable("ript")[0]["params"])
    assert trained == 79_953_920 + 151_117_831  # the decoder's adapters and the action head


def test_a_policy_that_is_saved_and_loaded_acts_to_the_same_bits(tmp_path):
    """Matrix products differ in the last bit with the place of weights in memory, and a mapped file has odd places."""
    policy, texts = small_policy(), [TASKS[0]]
    policy.save(tmp_path)
    again = OpenVLAOFT.from_pretrained(tmp_path)
    for observation in random_observations(20):
        ours, theirs = (p.act([observation], texts)[0]["actions"] for p in (policy, again))
        assert (ours == theirs).all()


def test_adapters_are_saved_as_the_authors_save_them(oft, tmp_path):
    from safetensors.torch import load_file
    policy, g, texts = oft
    policy = policy("prompt", True)
    policy.save(tmp_path)
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (GOLDEN / LORA, tmp_path))
    assert theirs.keys() - ours.keys() == {"base_model.model.language_model.lm_head.base_layer.weight"}  # needed by nobody
    assert all((theirs[name].float() == ours[name]).all() for name in ours)
    theirs, ours = (torch.load(folder / "openvla_headers.pt", weights_only=True) for folder in (GOLDEN / LORA, tmp_path))
    assert {part: list(head) for part, head in theirs.items()} == {part: list(head) for part, head in ours.items()}
    theirs, ours = (json.loads((folder / "adapter_config.json").read_text()) for folder in (GOLDEN / LORA, tmp_path))
    assert {name: theirs[name] for name in ours if name != "target_modules"} | dict(target_modules=0) == ours | dict(target_modules=0)
    assert set(theirs["target_modules"]) == set(ours["target_modules"])
    again = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", tmp_path, prefix="prompt")
    header = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", scale_head=tmp_path / "scale_header.pth")
    with torch.no_grad():
        for a, b in zip(again.predict(original_observations(g), texts), policy.predict(original_observations(g), texts)):
            assert (a == b).all()
    assert all((p == dict(policy.named_parameters())[name]).all() for name, p in header.named_parameters() if "scale_head" in name)


def test_the_base_is_bfloat16_where_the_checkpoint_says_so_and_what_trains_is_float32(oft):
    _, g, texts = oft
    policy = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", GOLDEN / LORA, dtype=torch.bfloat16)
    types = {name: p.dtype for name, p in policy.named_parameters()}
    precise = {name for name in types if "lora_" in name or name.startswith(("action_head", "scale_head"))}
    assert all((types[name] == torch.float32) == (name in precise) for name in types)
    with torch.no_grad():
        mean, _ = policy.predict(original_observations(g), texts)
    assert mean.dtype == torch.float32 and (mean - g["lora_a_mean"]).abs().mean() < 0.02  # the original's bfloat16: 0.007


# ------------------------------------------------------------------------- the simulator, rollouts, supervision
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
    return [Worker(config(), 0) for _ in range(3)]


def flat_state(simulator):
    return simulator.env.sim.get_state().flatten()


def test_k_resets_to_a_context_are_one_scene_and_other_seeds_are_others(simulator):
    def start(seed, task=0):
        raw = simulator.reset(Context(task, TASKS[task], seed))[2]
        return flat_state(simulator), raw

    (state, raw), (other, _) = start(5), start(6)
    simulator.step(np.random.default_rng(0).uniform(-1, 1, (16, 7)))  # an episode in between leaves no trace
    again, raw_again = start(5)
    assert (state == again).all() and (raw["agentview_image"] == raw_again["agentview_image"]).all()
    assert (raw["robot0_eye_in_hand_image"] == raw_again["robot0_eye_in_hand_image"]).all()
    assert np.abs(state - other).max() > 1e-3
    assert (start(5 + 2 ** 32)[0] == state).all()  # any number will do, also of --seed 1234
    run = lambda: (start(5), simulator.step(np.random.default_rng(1).uniform(-1, 1, (8, 7))), flat_state(simulator))[-1]
    assert (run() == run()).all()  # and the same actions lead to the same state


def test_the_cubes_have_the_colours_that_the_instructions_name(simulator):
    picture = simulator.reset(Context(0, TASKS[0], 1))[2]["agentview_image"].astype(int)
    red = (picture[..., 0] > 2 * picture[..., 1]) & (picture[..., 0] > 2 * picture[..., 2])
    green = (picture[..., 1] > 2 * picture[..., 0]) & (picture[..., 1] > 2 * picture[..., 2])
    assert red.sum() > 5 and green.sum() > 5


@pytest.mark.parametrize("task", [0, 1])
def test_success_is_the_named_cube_lifted_and_the_expert_lifts_it(simulator, task):
    steps, success, _, pairs = simulator.demonstrate(Context(task, TASKS[task], 1_000_000))
    height = [simulator.env.sim.data.body_xpos[body][2] for body in (simulator.env.cubeA_body_id, simulator.env.cubeB_body_id)]
    assert success and 15 < steps == len(pairs) <= 32
    assert height[task] > 0.84 > height[1 - task]  # 4 cm above the table; a cube's centre rests at 2 or 2.5 cm


def test_the_expert_of_libero_object_puts_a_tall_thing_into_the_basket():
    libero_or_skip()
    suite = load_suite("libero_object")(64, True)  # ketchup: the palm would rest on it, were it grasped in the middle
    steps, success, _, pairs = suite.demonstrate(Context(4, suite.INSTRUCTIONS[4], 1_000_004))
    suite.env.close()
    assert success and steps == len(pairs) < 200


def test_scripted_demonstrations_are_successes_with_clean_labels_whatever_the_number_of_workers(workers):
    seen = []
    for n in (1, 3):
        demos = load_suite("tabletop").scripted(workers[:n], config("--demos_per_task", 2))
        assert [demo.context.task for demo in demos] == [0, 1, 0, 1] and all(demo.success for demo in demos)
        assert all(np.abs(r["label"]).max() <= 1 for demo in demos for r in demo.records)
        seen.append([(demo.context.seed, r["label"].tobytes(), r["look"]()["agentview_image"].tobytes())
                     for demo in demos for r in demo.records])
    assert seen[0] == seen[1]


def test_the_arm_of_the_tabletop_suite_is_worn(simulator):
    worn, hands = load_suite("tabletop")(64, True), []
    for arm in (simulator, worn):
        arm.reset(Context(0, TASKS[0], 3))
        hands.append(arm.step(np.zeros((8, 7)))[2]["robot0_eef_pos"])
    worn.env.close()
    assert (hands[1] - hands[0])[:2].min() > 0.01 > abs((hands[1] - hands[0])[2])  # metres, in x and y


def test_a_chunk_stops_at_success_and_pictures_are_drawn_only_after_it(simulator, monkeypatch):
    context, drawn = Context(1, TASKS[1], 1_000_000), []
    draw = simulator.draw
    monkeypatch.setattr(simulator, "draw", lambda *a: drawn.append(a) or draw(*a))
    simulator.reset(context)
    assert len(drawn) == 2
    ran, success, observation, _ = simulator.step(np.zeros((8, 7)))
    assert (ran, success, len(drawn)) == (8, False, 4) and observation["agentview_image"].shape == (64, 64, 3)


NUDGE = """
import ript

class Nudge(ript.load_suite("tabletop")):
    INSTRUCTIONS = ["raise the green cube"]

    def build(self, task):
        assert isinstance(self, ript.Libero) and ript.Worker is not None
        super().build(1)

    def success(self):
        return bool(self.cube()[2] > 0.82 and self.task == 1)
"""


def test_a_suite_in_a_file_of_its_own_runs_from_the_command_line(tmp_path):
    (tmp_path / "nudge.py").write_text(NUDGE)
    done = launch("--suite", f"{tmp_path}/nudge.py:Nudge", *QUICK, "--iterations", 1, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "raise the green cube" in done.stdout and (tmp_path / "run/task0.mp4").stat().st_size > 1000
    rows = rows_without_seconds(tmp_path / "run")
    assert rows[1]["rollouts"] >= 6 and rows[1]["env_steps"] > 6
    contents = (tmp_path / "run/evaluation.csv").read_text()
    assert "0,raise the green cube,1," in contents and "red" not in contents


def run_of(iteration=0, group=0):
    return dict(iteration=iteration, group=group, skip=[])


def collect_with(workers, policy, cfg, run=None):
    contexts = lambda n: Context(n % 2, TASKS[n % 2], ript.TRAIN_SEEDS + n)
    return ript.collect(policy, workers, contexts, run or run_of(), cfg)


def pretrained():
    return OpenVLAOFT.from_pretrained(config().checkpoint)


def test_the_kept_set_does_not_depend_on_the_number_of_workers(workers):
    cfg = config("--groups", 3, "--rollouts", 3, "--max_rejected", 3)
    seen = []
    for n in (1, 2, 3):
        run = run_of()
        episodes, rewards, stats = collect_with(workers[:n], pretrained(), cfg, run)
        seen.append((run["group"], rewards.tolist(), [(e.group, e.k, e.executed, e.success) for e in episodes],
                     [r["sample"].tobytes() for e in episodes for r in e.records]))
        assert stats["rollouts"] == 3 * run["group"]
    assert seen[0] == seen[1] == seen[2]
    assert sorted(e[:2] for e in seen[0][2]) == [e[:2] for e in seen[0][2]]
    assert all(ript.has_signal(torch.tensor(seen[0][1]))) and len(seen[0][1]) > 0


def rollouts_that_end_as(fate, pick=0, launched=None):
    """A stand-in for simulate, to try every outcome: fate(episode) is its success, pick the order in which they end."""
    def simulate(policy, workers, queue, cfg, explore):
        while queue:
            episode = queue[pick % len(queue)]
            queue.remove(episode)
            episode.success, episode.executed = bool(fate(episode)), [8]
            episode.records = [dict(scale=0.1, seconds=0)]
            yield episode
    return simulate


@pytest.mark.parametrize("fate,signature", [(lambda e: False, "too hard"), (lambda e: True, "too easy"),
                                            (lambda e: e.group % 2, "too deterministic")])
def test_uniform_groups_are_replaced_up_to_the_cap_and_the_message_names_the_cause(monkeypatch, capsys, fate, signature):
    monkeypatch.setattr(ript, "simulate", rollouts_that_end_as(fate))
    run = run_of()
    episodes, rewards, stats = collect_with([], None, config("--groups", 2, "--rollouts", 2, "--max_rejected", 3), run)
    assert episodes == [] and len(rewards) == 0 and stats["rejected"] == 1
    assert run["group"] == 5 and stats["rollouts"] == 10  # 2 groups, and one more for each of 3 rejections
    assert signature in capsys.readouterr().out


def test_kept_groups_are_the_first_with_signal_whatever_order_they_end_in(monkeypatch):
    results = []
    for pick in (0, -1, 3):
        monkeypatch.setattr(ript, "simulate", rollouts_that_end_as(
            lambda e: e.group in (1, 4, 5) and e.k == 0 or e.group == 2, pick))
        run = run_of()
        episodes, rewards, _ = collect_with([], None, config("--groups", 3, "--rollouts", 2), run)
        results.append(([(e.group, e.k) for e in episodes], rewards.tolist(), run["group"]))
    assert results[0] == results[1] == results[2]
    assert results[0] == ([(g, k) for g in (1, 4, 5) for k in (0, 1)], [[1, 0]] * 3, 6)


def test_a_solved_context_of_a_finite_set_is_skipped_three_times(monkeypatch):
    monkeypatch.setattr(ript, "simulate", rollouts_that_end_as(lambda e: e.context.index == 0 or e.k == 0))
    run, visited = run_of(), []
    for _ in range(6):  # contexts 0 (always solved) and 1 (has signal) come up in turn
        _, _, stats = ript.collect(None, [], lambda n: Context(0, TASKS[0], 0, None, n % 2), run,
                                   config("--groups", 1, "--rollouts", 2, "--max_rejected", 0))
        visited.append("solved" if stats["solved"] else "kept")
    assert visited == ["solved", "kept", "kept", "kept", "kept", "solved"]


# ----------------------------------------------------------------------------------------- update and supervision
def made_up_episodes(policy, n=6, seed=0):
    """Episodes of two to three queries with samples of the policy itself, the last chunk cut short."""
    rng, episodes = np.random.default_rng(seed), []
    for i in range(n):
        queries = 2 + i % 2
        records = policy.act(random_observations(queries, i), [TASKS[i % 2]] * queries, [rng] * queries)
        episodes.append(Episode(Context(0, TASKS[0], 0), i // 2, i % 2, records, [8] * (queries - 1) + [3]))
    return episodes, torch.tensor([[1., 0.]] * (n // 2))


@pytest.mark.parametrize("per,tokens", [("episode", 0), ("token", 0), ("token", 8)])
def test_micro_batches_add_up_to_the_loss_of_the_whole_minibatch(per, tokens, monkeypatch):
    """With tokens every column counts, even where a chunk was cut short."""
    gradients = []
    monkeypatch.setattr(OpenVLAOFT, "TOKENS", tokens)
    for micro_batch in (1, 4, 1000):
        policy = small_policy(trained=("language_model", "action_head"))
        episodes, rewards = made_up_episodes(policy)
        for e in episodes:
            for r in e.records:
                r["log_prob"] = r["log_prob"] + np.float32(0.05)  # ratios other than one
        cfg = config("--passes", 1, "--minibatch", 6, "--micro_batch", micro_batch, "--loss_per", per)
        parameters = list(trained(policy).values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-9)
        ript.update(policy, optimizer, episodes, rewards, cfg, run_of())
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    policy = small_policy(trained=("language_model", "action_head"))
    parameters = list(trained(policy).values())
    rows = [torch.cat(list(policy.log_prob(e.records))) for e in episodes]
    pad = lambda x: torch.nn.functional.pad(x, (0, 24 - len(x)))
    old = torch.stack([pad(torch.tensor(np.concatenate([r["log_prob"] for r in e.records]))) for e in episodes])
    mask = torch.stack([pad(torch.tensor([h < (tokens or n) for n in e.executed for h in range(8)])) for e in episodes])
    advantage = ript.leave_one_out_advantage(rewards).flatten()
    ript.ppo_clip_loss(torch.stack([pad(r) for r in rows]), old, advantage, mask, cfg.clip, per)[0].backward()
    torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
    expected = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    for gradient in gradients:
        assert_close(gradient, expected, 1e-5)
    assert expected.norm() > 1e-3


def test_update_starts_at_ratio_one_and_makes_rewarded_actions_likelier():
    policy = small_policy()
    episodes, rewards = made_up_episodes(policy)
    before = [policy.log_prob(e.records)[0].sum().item() for e in episodes]
    cfg = config("--passes", 1, "--minibatch", 6)
    optimizer = torch.optim.AdamW(policy.trainable("ript"), lr=1e-5)
    scale_head = [p.clone() for p in policy.scale_head.parameters()]
    run = run_of()
    stats = ript.update(policy, optimizer, episodes, rewards, cfg, run)
    assert stats["ratio_error"] < 1e-4 and stats["updates"] == 1
    after = [policy.log_prob(e.records)[0].sum().item() for e in episodes]
    change = [b - a for a, b in zip(before, after)]
    assert sum(change[::2]) > 0 > sum(change[1::2])  # k = 0 was rewarded, k = 1 was not
    assert all((a == b).all() for a, b in zip(scale_head, policy.scale_head.parameters()))


def test_actions_and_gradients_that_are_not_finite_stop_the_run():
    policy, worker = small_policy(), Worker(config(), 0)
    with torch.no_grad():
        policy.action_head["model"].fc2.bias[2] = math.nan
    with pytest.raises(RuntimeError, match="action is not finite in iteration 1, group 0, Context.task=0"):
        collect_with([worker], policy, config("--groups", 1, "--rollouts", 2))
    worker.process.kill()
    policy = small_policy()
    episodes, rewards = made_up_episodes(policy)
    episodes[0].records[0]["log_prob"] = np.full(8, np.nan, np.float32)
    optimizer = torch.optim.AdamW(policy.trainable("ript"))
    before = [p.clone() for p in policy.parameters()]
    with pytest.raises(RuntimeError, match="the gradient is not finite in iteration 1"):
        ript.update(policy, optimizer, episodes, rewards, config("--minibatch", 6), run_of())
    assert all((a == b).all() for a, b in zip(before, policy.parameters()))
    with torch.no_grad():
        policy.action_head["model"].fc2.bias[2] = math.nan
    with pytest.raises(RuntimeError, match="log_prob is not finite in iteration 1, group ., Context.task=0"):
        ript.update(policy, optimizer, episodes, rewards, config("--minibatch", 6), run_of())


def test_sft_learns_and_the_scale_head_is_fitted_alone(workers):
    policy, cfg = small_policy(), config("--sft_steps", 40, "--scale_steps", 20, "--sft_lr", 1e-3, "--demos_per_task", 1)
    demos = load_suite("tabletop").scripted(workers, cfg)
    records = demos[0].records
    batch = ([policy.preprocess(r["look"]()) for r in records[:4]], [TASKS[0]] * 4,
             np.array([[r["label"] for r in records[i:i + 8]] for i in range(4)]))
    before = policy.imitation_loss("sft", *batch).item()
    ript.fit(policy, "sft", demos, cfg.sft_steps, cfg.sft_lr, cfg.seed, batch=64)
    assert policy.imitation_loss("sft", *batch).item() < 0.7 * before
    frozen, before = {name: p.clone() for name, p in trained(policy, "sft").items()}, policy.imitation_loss("scale", *batch).item()
    ript.fit_scale_head(policy, demos, cfg)
    assert policy.imitation_loss("scale", *batch).item() < before
    assert all((p == frozen[name]).all() for name, p in trained(policy, "sft").items())


# -------------------------------------------------------------------------------------------------- whole runs
QUICK = ["--groups", 2, "--rollouts", 3, "--max_rejected", 2, "--iterations", 2, "--sft_steps", 4, "--scale_steps", 3,
         "--eval_contexts", 2, "--eval_every", 1, "--workers", 2]


def launch(*argv, timeout=600, **environment):
    return subprocess.run([sys.executable, HERE / "ript.py", *map(str, argv)], capture_output=True, text=True,
                          timeout=timeout, env=os.environ | environment)


def rows_without_seconds(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key and "_gb" not in key} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing disturbed: its directory and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = launch(*QUICK, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_writes_all_its_files_and_what_it_saves_is_what_it_trained(finished, tmp_path):
    out, printed = finished
    names = {"config.json", "metrics.jsonl", "metrics.csv", "curve.png", "run.pt", "evaluation.csv", "task0.mp4",
             "task1.mp4", "sft", "last", "best"}
    assert {path.name for path in out.iterdir()} == names and len(rows_without_seconds(out)) == 3
    assert "exact McNemar p" in printed and "ratio_error" in printed and "memory" in printed
    evaluated = launch("--eval", "--checkpoint", out / "last", "--eval_contexts", 2, "--out", tmp_path / "e")
    assert evaluated.returncode == 0, evaluated.stderr
    column = lambda path: [line.split(",")[-1] for line in path.read_text().splitlines()[1:]]
    assert column(tmp_path / "e/evaluation.csv") == column(out / "evaluation.csv")


def children_of(pid):
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()


def test_a_killed_run_is_resumed_to_the_same_bits_and_leaves_no_process(finished, tmp_path):
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
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        time.sleep(0.1)
    resumed = launch("--resume", tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert rows_without_seconds(tmp_path) == rows_without_seconds(finished[0])
    for name in ("last/model.safetensors", "best/model.safetensors", "evaluation.csv"):
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
    run["results"]["RIPT"] = [not won for won in run["results"]["RIPT"]]  # of an earlier iteration
    torch.save(run, tmp_path / "run/run.pt")
    done = launch("--resume", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/evaluation.csv").read_bytes() == (finished[0] / "evaluation.csv").read_bytes()


def test_the_table_has_wilson_intervals_per_task_and_the_exact_test_of_pairs():
    contexts = [Context(task, TASKS[task], seed) for task in (0, 1) for seed in range(10)]
    before, after = [True] + [False] * 19, [False] + [True] * 7 + [False] * 12
    lines = ript.table(contexts, dict(SFT=before, RIPT=after)).splitlines()
    assert lines[1].split() == "lift the red cube 1/10 10% [2%, 40%] 7/10 70% [40%, 89%]".split()
    assert lines[3].split()[:4] == "all tasks 1/20 5%".split()
    assert lines[4] == "paired: 7 contexts gained, 1 lost, exact McNemar p = 0.07"  # 2 (1 + 8) / 2^8
    assert "p = 1" in ript.table(contexts, dict(SFT=before, RIPT=before)) and "paired" not in ript.table(contexts, dict(SFT=before))


def test_a_signal_ends_a_run_and_its_simulators_without_a_traceback(tmp_path):
    """Two runs get theirs after an evaluation; the last gets Ctrl-C, which goes to all processes, in the simulators' imports."""
    cases = [(signal.SIGINT, "metrics.jsonl"), (signal.SIGTERM, "metrics.jsonl"), (signal.SIGINT, "config.json")]
    runs = [subprocess.Popen([sys.executable, HERE / "ript.py", *map(str, QUICK), "--out", tmp_path / str(i)], text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
            for i in range(len(cases))]
    for i, (number, moment) in reversed(list(enumerate(cases))):
        while not (tmp_path / str(i) / moment).exists():
            assert runs[i].poll() is None
            time.sleep(0.02)
        if moment == "config.json":
            time.sleep(3)
            assert not (tmp_path / str(i) / "sft").exists()
        children = children_of(runs[i].pid)
        (os.killpg if moment == "config.json" else os.kill)(runs[i].pid, number)
        said = runs[i].communicate(timeout=60 if moment == "config.json" else 20)[1]  # simulators end their imports first
        assert "Traceback" not in said and "KeyboardInterrupt" not in said
        assert runs[i].returncode == -number and len(children) >= 2  # which a shell shows as 130 and 143
        while any(Path(f"/proc/{pid}").exists() for pid in children):
            time.sleep(0.1)


@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
def test_a_damaged_run_is_not_resumed_and_one_sentence_says_so(finished, tmp_path, damage):
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run/run.pt"
    content = bytearray(path.read_bytes())
    if damage == "changed":  # a few bytes of the weights
        content[len(content) // 2:len(content) // 2 + 8] = bytes(range(8))
    path.write_bytes(content[:len(content) // 2] if damage == "cut" else content)
    if damage == "other":
        torch.save(dict(policy={}), path)
    done = launch("--resume", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.startswith(f"ript.py: cannot resume from {path}: ")
    assert done.stderr.count("\n") == 1


def test_two_and_three_processes_equal_one(finished, tmp_path):
    jobs = {n: subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
                                 HERE / "ript.py", *map(str, QUICK), "--workers", "1", "--out", tmp_path / str(n)],
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for n in (2, 3)}
    for n, job in jobs.items():
        error = job.communicate(timeout=600)[1]
        assert job.returncode == 0, error
        for row, expected in zip(rows_without_seconds(tmp_path / str(n)), rows_without_seconds(finished[0]), strict=True):
            for name in set(expected) - {"ratio_error"}:  # which is rounding itself
                assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
        ours, theirs = (torch.load(path / "run.pt", weights_only=True) for path in (tmp_path / str(n), finished[0]))
        ours, theirs = (torch.cat([p.detach().flatten() for p in state["policy"].values()]) for state in (ours, theirs))
        assert (ours - theirs).norm() / theirs.norm() < 1e-6


def test_an_iteration_in_libero_with_the_small_policy(tmp_path):
    libero_or_skip()
    done = launch("--suite", "libero_object", "--task", 0, *QUICK, "--groups", 1, "--rollouts", 2, "--iterations", 1,
                  "--demos_per_task", 1, "--eval_contexts", 1, "--max_rejected", 0, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_without_seconds(tmp_path)
    assert rows[1]["env_steps"] >= 2 * 100 and rows[1]["rollouts"] == 2
    assert "SFT on 1 demonstrations" in done.stdout and "success in 1/" in done.stdout  # the expert's, of few attempts
    bounds = json.loads((tmp_path / "sft/config.json").read_text())["statistics"]["action"]
    assert bounds["q01"][3:6] == bounds["q99"][3:6] == [0, 0, 0] and bounds["q01"][6] == -1  # the expert never turns the hand
    assert (tmp_path / "task0.mp4").stat().st_size > 10_000


def test_an_iteration_of_openvla_oft_in_libero(tmp_path, monkeypatch):
    """The released checkpoint's form, tiny and random: so every group is kept, and an episode has 16 steps."""
    libero_or_skip()
    golden("golden_oft")
    monkeypatch.setattr(ript.load_suite("libero_10"), "HORIZON", 16)
    monkeypatch.setattr(ript, "fate", lambda group: "kept")
    monkeypatch.setattr(ript, "leave_one_out_advantage", lambda rewards: rewards + torch.tensor([1.0, -1.0]))
    run = ["--model", "openvla-oft", "--suite", "libero_long", "--task", "2", "--checkpoint", str(GOLDEN / "tiny_oft"),
           "--eval_contexts", "2", "--workers", "2", "--collision", "true", "--image_size", "128"]
    ript.main([*run, "--adapter", str(GOLDEN / LORA), "--rollouts", "2", "--groups", "1", "--iterations", "1",
               "--out", str(tmp_path / "run")])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[1]["kept"] == 1 and rows[1]["env_steps"] == 32 and rows[1]["updates"] == 1
    assert rows[1]["grad_norm"] > 0 and rows[1]["ratio_error"] < 1e-3 and rows[1]["scale"] > 0.5
    start, end = (OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", folder).state_dict()
                  for folder in (GOLDEN / LORA, tmp_path / "run/last"))
    moved = {name for name in start if (start[name] != end[name]).any()}
    assert moved and all("language_model.model.layers" in name and "lora_" in name or "action_head" in name for name in moved)
    ript.main([*run, "--eval", "--adapter", str(tmp_path / "run/last"), "--out", str(tmp_path / "eval")])
    assert (tmp_path / "eval/evaluation.csv").read_text().count("\n") == 3 and (tmp_path / "eval/task2.mp4").exists()


def test_the_seven_billions_command_asks_the_hub_for_the_released_files(monkeypatch):
    """torchrun ript.py --model openvla-oft --suite libero_long, with the tiny checkpoint in the hub's place."""
    golden("golden_oft")
    asked = []

    def download(repository, allow_patterns, ignore_patterns):
        asked.append((repository, allow_patterns))
        return str(GOLDEN / "tiny_oft")
    monkeypatch.setattr(ript, "snapshot_download", download)
    cfg = config("--model", "openvla-oft", "--suite", "libero_long", "--device", "cpu")
    header = "openvla_oft/scale_header/LIBERO_LONG_scale_header.pth"
    assert cfg.scale_head == f"tanshh97/RIPT_VLA/{header}" and (cfg.scale_multiplier, cfg.iterations, cfg.groups) == (5, 12, 24)
    policy = OpenVLAOFT.load(dataclasses.replace(cfg, scale_head=str(GOLDEN / SCALE)))
    assert asked == [("moojink/openvla-7b-oft-finetuned-libero-10", ["*.json", "*.safetensors", "*_checkpoint.pt"])]
    assert policy.lora and policy.scale_multiplier == 5
    assert ript.fetch(cfg.scale_head) == GOLDEN / "tiny_oft" / header
    assert asked[1] == ("tanshh97/RIPT_VLA", [header, f"{header}/*"])


def test_fit_scale_head_fits_it_alone_to_liberos_files_and_saves_the_released_form(tmp_path):
    libero_or_skip()
    golden("golden_oft")
    task = load_suite("libero_10").BENCHMARK.tasks[2]
    write_demonstration(tmp_path / f"{task.name}_demo.hdf5", size=128)
    ript.main(["--model", "openvla-oft", "--suite", "libero_10", "--task", "2", "--checkpoint", str(GOLDEN / "tiny_oft"),
               "--demos", str(tmp_path), "--fit_scale_head", "--scale_steps", "20", "--workers", "1", "--out", str(tmp_path / "run")])
    fitted = torch.load(tmp_path / "run/sft/scale_header.pth", weights_only=True)
    released = torch.load(GOLDEN / SCALE, weights_only=True)
    assert {part: {name: p.shape for name, p in head.items()} for part, head in fitted.items()} == \
        {part: {name: p.shape for name, p in head.items()} for part, head in released.items()}
    start = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10")
    end = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", tmp_path / "run/sft")
    demos = ript.libero_demonstrations(config("--suite", "libero_10", "--task", 2, "--demos", tmp_path, "--image_size", 128))
    seen = [start.preprocess(record["look"]()) for record in demos[0].records[:4]]
    labels = np.array([[record["label"] for record in demos[0].records[t:t + 8]] for t in range(4)])
    losses = [policy.imitation_loss("scale", seen, [task.language] * 4, labels).item() for policy in (start, end)]
    assert losses[1] < losses[0] - 1
    with torch.no_grad():
        assert (start.predict(seen, ["do it"] * 4)[0] == end.predict(seen, ["do it"] * 4)[0]).all()  # the mean is as it was


@pytest.mark.parametrize("suite,task", [("libero_goal", 1), ("libero_10", 2)])
def test_libero_resets_softly_to_the_stored_state_at_every_episode(suite, task):
    libero_or_skip()
    simulator, cfg = load_suite(suite)(64, True), config("--suite", suite, "--task", task, "--eval_contexts", 2)
    contexts = ript.evaluation_contexts(cfg)
    try:
        states = []
        for number, context in enumerate((contexts[0], contexts[1], contexts[0])):
            if number == 2:
                del simulator.env._update_observables  # robosuite's own again, at each physics step
            simulator.reset(context)
            seen = simulator.step(np.random.default_rng(0).uniform(-1, 1, (16, 7)))[2]
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
    fresh = [ript.training_context(n, list(ript.tasks_of(cfg).items()), [], cfg) for n in range(12)]
    means, spreads = [], []
    for contexts in (ript.evaluation_contexts(cfg)[:12], fresh):
        states = []
        for context in contexts:
            simulator.reset(context)
            states.append(simulator.env.sim.data.qpos.copy())  # the arm's joints, fingers, then free bodies
        means.append(np.mean(states, 0))
        spreads.append(np.std(states, 0))
    simulator.env.close()
    arm, places = slice(7), [9 + 7 * body + axis for body in range((len(means[0]) - 9) // 7) for axis in (0, 1)]
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
    cfg = config("--suite", "libero_goal", "--task", 3, "--demos", tmp_path)
    (demo,) = ript.libero_demonstrations(cfg)
    with h5py.File(tmp_path / f"{task.name}_demo.hdf5") as file:
        source = file["data/demo_0"]
        assert (np.array([r["label"] for r in demo.records]) == source["actions"][:]).all() and (demo.context.state == source["states"][0]).all()
        assert (small_policy().preprocess(demo.records[5]["look"]())["pictures"][0] == source["obs/agentview_rgb"][5][::-1, ::-1]).all()
        angle = np.linalg.norm(source["obs/ee_ori"][5])  # the same turn, with its axis the other way for more than pi
        ours = small_policy().preprocess(demo.records[5]["look"]())["proprio"][3:6]
        assert_close(min(np.linalg.norm(ours - source["obs/ee_ori"][5]), abs(np.linalg.norm(ours) + angle - 2 * math.pi)), 0, 1e-5)
    assert (demo.context.task, demo.context.instruction, demo.context.index) == (3, task.language, 0)


# ------------------------------------------------------------------------- several processes, faults, interruptions
def faulty_worker(connection, *arguments):
    """worker_main in a process that dies or hangs at the n-th call of what the file FAULT names, and removes the file."""
    plan, calls = Path(os.environ["FAULT"]), Counter()

    def strike(original, where):
        def call(*args, **kwargs):
            with suppress(FileNotFoundError):  # or the other process was quicker
                kind, place, n = plan.read_text().split()
                calls[kind, where] += 1
                if place == where and calls[kind, where] == int(n):
                    plan.unlink()
                    os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
            return original(*args, **kwargs)
        return call

    class Faulty:
        recv, send = connection.recv, staticmethod(strike(connection.send, "send"))
    suite = load_suite("tabletop")
    for method in ("reset", "step", "draw"):
        setattr(suite, method, strike(getattr(suite, method), method))
    ript.worker_main(Faulty, *arguments)


def fingerprint(episodes, rewards):
    return (rewards.tolist(), [(e.group, e.k, e.executed, e.success) for e in episodes],
            [r["sample"].tobytes() for e in episodes for r in e.records])


def collect_all(monkeypatch, workers):
    """The fingerprint of one group, which is kept whatever its rewards are."""
    monkeypatch.setattr(ript, "fate", lambda group: "kept")
    episodes, rewards, _ = collect_with(workers, pretrained(), config("--groups", 1, "--rollouts", 3))
    assert len(episodes) == 3
    return fingerprint(episodes, rewards)


@pytest.fixture(scope="module")
def undisturbed(workers):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return collect_all(monkeypatch, workers[:2])


def sabotage(monkeypatch, main, plan):
    """Let workers run main, and wait 8 s for the processes they have, which are up, and longer for those that replace them."""
    patience = property(lambda worker: 8 if getattr(worker, "tries", 0) == Worker.TRIES else 200)
    monkeypatch.setattr(Worker, "PATIENCE", patience)
    monkeypatch.setattr(ript, "worker_main", main)
    monkeypatch.setenv("FAULT", str(plan))


def workers_that_are_up(number):
    workers = [Worker(config(), 0) for _ in range(number)]
    for worker in workers:
        worker.send("build", 0)
    assert [worker.receive() for worker in workers] == [None] * number
    return workers


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Workers and the file that tells them to fail."""
    plan = tmp_path_factory.mktemp("fault") / "plan"
    with pytest.MonkeyPatch.context() as monkeypatch:
        sabotage(monkeypatch, faulty_worker, plan)
        workers = workers_that_are_up(2)
    yield workers, plan
    for worker in workers:
        worker.process.kill()


@pytest.mark.parametrize("kind,where", [("kill", "reset"), ("kill", "step"), ("kill", "draw"), ("kill", "send"), ("hang", "step")])
def test_a_simulator_process_that_dies_or_hangs_changes_nothing(monkeypatch, faulty, undisturbed, kind, where):
    workers, plan = faulty
    sabotage(monkeypatch, faulty_worker, plan)  # also those that replace what fails
    processes = {worker.process.pid for worker in workers}
    plan.write_text(f"{kind} {where} {2 if where == 'reset' else 3}")
    assert collect_all(monkeypatch, workers) == undisturbed
    assert not plan.exists() and len(processes - {worker.process.pid for worker in workers}) == 1


class Half:
    """Its message is 100 MB long, and the process stops before the end of it."""
    def __reduce__(self):
        threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        return bytes, (b"x" * 100_000_000,)


def stopping_worker(connection, cfg):
    """worker_main in a process that stops, once, in the middle of an answer."""
    flag, look = Path(os.environ["FAULT"]), Libero.look
    if not flag.exists():
        Libero.look = lambda self: (flag.touch(), look(self) | dict(half=Half()))[1]
    ript.worker_main(connection, cfg)


def test_a_simulator_process_that_stops_in_the_middle_of_an_answer_is_replaced(tmp_path, monkeypatch):
    sabotage(monkeypatch, stopping_worker, tmp_path / "struck")
    worker, = workers_that_are_up(1)
    worker.begin(Episode(Context(0, TASKS[0], 1)))
    ran, success, raw, _ = worker.receive()
    assert (tmp_path / "struck").exists() and (ran, success, worker.tries) == (0, False, 2)
    assert raw["agentview_image"].shape == (64, 64, 3)
    worker.process.kill()


def test_a_simulator_that_always_fails_ends_the_run_with_its_own_traceback(monkeypatch):
    worker = Worker(config(), 0)
    worker.begin(Episode(Context(0, TASKS[0], seed="not a seed")))
    with pytest.raises(RuntimeError, match="failed 3 times at Context.task=0(.|\n)*Traceback(.|\n)*(Type|Value)Error"):
        worker.receive()
    worker.process.kill()


@pytest.mark.parametrize("rank,who", [(0, "ript.py"), (3, "ript.py, rank 3")])
def test_the_rank_that_fails_says_so(monkeypatch, capsys, rank, who):
    monkeypatch.setattr(ript, "RANK", rank)
    with pytest.raises(SystemExit):
        ript.fail("no such\nthing")
    assert capsys.readouterr().err == f"{who}: no such thing\n"


def test_a_rank_that_is_silent_ends_the_others_and_a_slow_one_does_not(monkeypatch, capsys):
    store, ended = torch.distributed.HashStore(), threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    threading.Thread(target=ript.pulse, args=(store, 0, 3, 1.5), daemon=True).start()
    assert not ended.wait(2.5)  # ranks that have not begun are not judged
    for _ in range(10):  # each of the two is silent for 0.4 s
        for rank in (1, 2):
            store.add(f"pulse {rank}", 1)
            assert not ended.wait(0.2)
    while not ended.wait(0.1):  # now rank 1 is silent for good
        assert store.add("pulse 2", 1) < 100
    assert capsys.readouterr().err == "ript.py, rank 0: rank 1 is dead or hangs: silent for 1.5 s\n"


def test_a_dead_rank_ends_the_job_within_a_minute_and_is_named(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / "ript.py",
               *map(str, QUICK), "--workers", "1", "--iterations", "50", "--eval_every", "0", "--out", tmp_path]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "metrics.jsonl").exists():
        assert job.poll() is None
        time.sleep(0.1)
    ranks = children_of(job.pid)
    others = [pid for rank in ranks for pid in children_of(rank)]
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, error = job.communicate(timeout=60)
    assert job.returncode != 0 and "local_rank: 1" in error and "SIGKILL" in error
    while any(Path(f"/proc/{pid}").exists() for pid in [*ranks, *others]):
        time.sleep(0.1)


# ------------------------------------------------------------------------------------------------- examples/quest.py
QueST = ript.load_class("quest", torch.nn.Module)
quest = sys.modules[QueST.__module__]


def assert_near(a, b, tolerance=1e-4):
    assert_close(a, b, tolerance)


def tiny_quest():
    path = GOLDEN / "tiny_quest.pth"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return QueST.from_pretrained(path)


def inputs_of(g):
    names = dict(agentview="agentview_rgb", eye_in_hand="eye_in_hand_rgb", joint_states="joint_states", ee_pos="ee_pos",
                 gripper_states="gripper_states", task_embedding="task_emb")
    return {name: g[f"in.{key}"] for name, key in names.items()}


def random_raw(seed=0):
    """What the simulator hands over, random."""
    rng = np.random.default_rng(seed)
    shapes = dict(robot0_joint_pos=7, robot0_eef_pos=3, robot0_eef_quat=4, robot0_gripper_qpos=2)
    return {name: rng.standard_normal(size) for name, size in shapes.items()} | {
        f"{camera}_image": rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
        for camera in ("agentview", "robot0_eye_in_hand")}


@pytest.fixture
def features(tmp_path, monkeypatch):
    """A file of CLIP features of two instructions, random."""
    rng = np.random.default_rng(0)
    path = tmp_path / "clip.npz"
    np.savez(path, **{text: rng.standard_normal(512).astype(np.float32) for text in (
        "open the drawer", "close it", *ript.load_suite("libero_10").INSTRUCTIONS)})
    monkeypatch.setattr(QueST, "CLIP", str(path))
    return path


# ------------------------------------------------------------------------------- the model agrees with the original
def test_quest_encoders_agree_with_the_original():
    g, policy, seen = golden("golden_quest"), tiny_quest(), {}
    for camera in ("agentview_rgb", "eye_in_hand_rgb"):
        encoder = policy.image_encoders[camera]
        encoder.block_4.register_forward_hook(lambda _, __, out: seen.update(trunk=out))
        encoder.projection_layer.projection.register_forward_hook(lambda _, given, out: seen.update(kp=given[0]))
        encoder.register_forward_hook(lambda _, given, out: seen.update(img=given[0], enc=out))
        with torch.no_grad():
            encoder(g[f"in.{camera}"].permute(0, 3, 1, 2) / 255)
        assert_near(seen["img"], g[f"img.{camera}"], 1e-6)
        assert_near(seen["trunk"][:, :, ::3, ::3], g[f"trunk.{camera}"])
        assert_near(seen["kp"], g[f"kp.{camera}"])
        assert_near(seen["enc"], g[f"enc.{camera}"])
    policy.obs_proj.register_forward_hook(lambda _, given, out: seen.update(cat=given[0], proj=out))
    for name in ("joint_states", "ee_pos", "gripper_states"):
        projection = policy.lowdim_encoders[name].projection
        projection.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    context = policy.context(**inputs_of(g))
    for name in ("joint_states", "ee_pos", "gripper_states"):
        assert_near(seen[name], g[f"enc.{name}"])
    assert_near(seen["cat"], g["obs.cat"])
    assert_near(seen["proj"], g["obs.proj"])
    assert_near(context[:, 0], g["task.token"])
    assert context.shape == (3, 2, 96) and context.requires_grad
    assert_near(context, g["context"])


def test_quest_logits_log_probs_and_sampling_distribution_agree_with_the_original():
    g, policy = golden("golden_quest"), tiny_quest()
    context, indices = g["context"], g["in.action_indices"]
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient):
            assert_near(policy.policy_prior(context, indices[:, :-1]), g["gpt.logits"])
            assert_near(policy.token_log_prob(context, indices), g["gpt.logprobs"])
    with torch.no_grad():
        assert torch.equal(*(policy.token_log_prob(context, indices) for _ in range(2)))
        assert_near(policy.token_log_prob(context, indices), policy.token_log_prob(context[[0, 1, 2, 0]],
                                                                                    indices[[0, 1, 2, 0]])[:3], 1e-5)
    words = policy.policy_prior.tok_emb(torch.nn.functional.pad(indices[:, :-1], (1, 0), value=1000))
    assert_near(words + policy.policy_prior.add_positional_emb.penc(8), g["gpt.tok_plus_pos"])
    for width in (256, 384):
        assert_near(quest.Positions(width)(32), g[f"pos.{width}"])
    drawn = torch.zeros(3, 0, dtype=torch.long)
    torch.manual_seed(1234)
    for step in range(8):  # as the original draws: its stream of random numbers gives its tokens
        logits = policy.policy_prior(context, drawn)[:, -1]
        top = logits.topk(5)
        assert torch.equal(top.indices, g["sampled.top5_indices"][:, step])
        assert_near(top.values.softmax(-1), g["sampled.top5_probs"][:, step])
        picked = torch.multinomial(top.values.softmax(-1), 1)
        drawn = torch.cat([drawn, top.indices.gather(-1, picked)], 1)
    assert torch.equal(drawn, g["sampled.indices"])


def test_quest_fsq_and_decoded_actions_agree_with_the_original():
    g, policy = golden("golden_quest"), tiny_quest()
    seen = {}
    policy.autoencoder.vq.project_out.register_forward_hook(lambda _, given, out: seen.update(codes=given[0], out=out))
    policy.decode_actions(torch.arange(1000).view(125, 8))
    assert torch.equal(seen["codes"].flatten(0, 1), g["fsq.codes"])
    assert_near(seen["out"].flatten(0, 1), g["fsq.codes_out"])
    policy.decode_actions(g["fsq.z_indices"].long().view(50, 8))
    assert torch.equal(seen["codes"].flatten(0, 1), g["fsq.z_codes"])
    actions = policy.decode_actions(g["in.action_indices"])
    assert_near(actions, g["ae.actions"])
    assert_near(actions[:, :8].transpose(0, 1), g["ae.actions_horizon"])
    assert_near(policy.decode_actions(g["in.action_indices"][:, [3, 0, 7, 1, 6, 2, 5, 4]]), g["ae.actions_perm"])
    assert_near(policy.decode_actions(g["sampled.indices"]), g["sampled.actions"])
    chunk = policy.decode_actions(g["sampled.indices"])[:, :8].transpose(0, 1)
    assert_near(chunk, g["sampled.queue"])
    assert_near(chunk.clamp(-1, 1), g["sampled.queue_clipped"])


def test_quest_gradients_agree_with_the_original():
    g, policy = golden("golden_quest"), tiny_quest()
    mask, rows, tokens = g["adapter.mask"], g["adapter.ctx_row"], g["adapter.idx_row"]
    log_prob = policy.token_log_prob(g["context"][rows.flatten()], g["in.action_indices"][tokens.flatten()])
    log_prob = log_prob.view(3, 3, 8)
    assert_near(torch.where(mask, log_prob, 1.0).flatten(1), g["adapter.logprobs"])
    assert mask.sum() == 8 * g["adapter.steps"].sum()
    log_prob[mask].sum().backward()
    named = dict(policy.policy_prior.named_parameters())
    names = json.loads((GOLDEN / "golden_quest.json").read_text())["gpt_param_names"]
    assert list(named) == names
    for name, norm, probe in zip(names, g["gpt.grad_norm"], g["gpt.grad_probe"]):
        gradient = named[name].grad.double().flatten()
        assert gradient.norm().item() == pytest.approx(norm.item(), rel=1e-4, abs=1e-4)
        direction = torch.cos(0.7 * torch.arange(len(gradient), dtype=torch.float64))
        assert (gradient * direction).sum().item() == pytest.approx(probe.item(), abs=1e-3)
    for name in ("lnf.weight", "head.bias", "decoder.layers.0.norm1.weight", "decoder.layers.5.linear2.bias"):
        assert_near(named[name].grad, g[f"gpt.grad.{name}"])
    assert_near(named["tok_emb.weight"].grad[1000], g["gpt.grad.tok_emb_start"])
    assert all(p.grad is None for name, p in policy.named_parameters() if not name.startswith("policy_prior."))


def test_quest_ript_update_agrees_with_the_original():
    """The original's two passes of three minibatches of 4, the last of which is padding, which counts for nothing."""
    g, policy = golden("golden_quest"), tiny_quest()
    before = {name: p.detach().clone() for name, p in policy.policy_prior.named_parameters()}
    optimizer = torch.optim.AdamW(policy.trainable("ript"), lr=2e-4)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rows, steps = g["upd.rows"], g["upd.steps"]
    tokens = (rows + torch.arange(8)[:, None]) % 3
    mask = (torch.arange(3) < steps[:, None])[..., None].expand(-1, -1, 8)  # E Q T
    advantage = ript.leave_one_out_advantage(g["upd.success"].float().view(2, 4)).flatten()
    assert_near(advantage, g["upd.advantage"][:8], 1e-6)

    def log_prob(chosen):
        flat = policy.token_log_prob(g["context"][rows[chosen].flatten()],
                                     g["in.action_indices"][tokens[chosen].flatten()])
        return flat.view(len(chosen), 24)

    everything = torch.arange(8)
    old = log_prob(everything).detach()
    assert_near(torch.where(mask.flatten(1), old, 1.0), g["upd.old_logprob"][:8])
    step = 0
    for _ in range(2):
        for chosen in (everything[:4], everything[4:], everything[:0]):
            m = mask[chosen].flatten(1)
            optimizer.zero_grad()
            if len(chosen):
                loss, stats = ript.ppo_clip_loss(log_prob(chosen), old[chosen], advantage[chosen], m, 0.2, "token")
                loss.backward()
                assert_near(loss, g["upd.pg_loss"][step])
                share = m.float().mean()  # the original's means include masked tokens, of ratio 1
                assert_near(stats["ratio"] * share + 1 - share, g["upd.ratio"][step])
                assert_near(stats["clip_frac"] * share, g["upd.clipfrac"][step])
            else:
                for p in parameters:
                    p.grad = torch.zeros_like(p)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            assert norm.item() == pytest.approx(g["upd.grad_norm"][step].item(), rel=1e-3, abs=1e-6)
            optimizer.step()
            step += 1
    names = json.loads((GOLDEN / "golden_quest.json").read_text())["gpt_param_names"]
    for name, norm, probe in zip(names, g["upd.delta_norm"], g["upd.delta_probe"]):
        if "in_proj_bias" not in name:  # the gradient of its keys' part is zero, which AdamW makes steps of noise of
            change = (dict(policy.policy_prior.named_parameters())[name] - before[name]).detach().double().flatten()
            assert change.norm().item() == pytest.approx(norm.item(), rel=2e-3)
            direction = torch.cos(0.7 * torch.arange(len(change), dtype=torch.float64))
            assert (change * direction).sum().item() == pytest.approx(probe.item(), abs=1e-3)
    after = torch.where(mask.flatten(1), log_prob(everything), 1.0)
    torch.testing.assert_close(after, g["upd.new_logprob"], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("case", ["plain", "ragged", "padded", "asym", "seqavg", "minibatch", "accum", "all_invalid"])
def test_token_level_loss_and_gradients_agree_with_the_original(case):
    g = golden("golden_quest_loss")
    cfg = json.loads((GOLDEN / "golden_quest_loss.json").read_text())["cases"][case]["config"]
    field = {key.split(".")[1]: value for key, value in g.items() if key.split(".")[0] == case}
    valid, mask = field["valid"].bool(), field["mask"].flatten(1).bool()
    advantage, size = field["advantage"].float(), cfg["mb"]
    per, clip = "token" if cfg["token_avg"] else "episode", (cfg["low"], cfg["high"])
    gradients = torch.zeros_like(field["new"])
    starts, losses, steps = range(0, len(mask), size), [], []
    for number, start in enumerate(starts):
        part = slice(start, start + size)
        new = field["new"].clone().requires_grad_()
        m = mask[part] & valid[part][:, None]  # padding is no episode here
        loss, stats = ript.ppo_clip_loss(new[part], field["old"][part], advantage[part], m, clip, per)
        losses.append(loss.item())
        loss.backward()
        gradients = gradients + new.grad
        if (number + 1) % cfg["accum"] == 0:
            if cfg["clip"]:
                gradients = gradients * min(1, cfg["clip"] / (gradients.norm().item() + 1e-6))
            steps.append(gradients)
            gradients = torch.zeros_like(field["new"])
    assert_near(torch.tensor(losses), field["loss"].flatten(), 1e-5)
    assert_near(torch.stack(steps), field["grads"], 1e-5)


# -------------------------------------------------------------------------------------------------------- its files
def test_quest_has_every_key_and_shape_of_the_released_files():
    path = GOLDEN / "quest_state_dict_real.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    real = json.loads(path.read_text())
    with torch.device("meta"):
        policy = QueST()
    shapes = {name: [list(x.shape), str(x.dtype).split(".")[1]] for name, x in policy.state_dict().items()}
    assert shapes == real["state_dict"] and list(shapes) == list(real["state_dict"])
    assert sum(p.numel() for p in policy.parameters()) == real["num_parameters"]


def test_quest_reads_sft_and_ript_files_and_its_own_strictly(tmp_path):
    policy = tiny_quest()
    weights = torch.load(GOLDEN / "tiny_quest.pth", weights_only=True)["model"]
    assert all(torch.equal(weights[name], value) for name, value in policy.state_dict().items())
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    torch.save(dict(model=wrapped), tmp_path / "ript.pth")
    torch.save(wrapped, tmp_path / "bare.pth")
    policy.save(tmp_path / "best")
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["quest.pth"]
    cfg = ript.Config(device="cpu", suite="libero_10", checkpoint=str(tmp_path / "ript.pth"))
    best = ript.Config(device="cpu", suite="libero_10", checkpoint=str(tmp_path / "best"))
    bare = QueST.from_pretrained(tmp_path / "bare.pth")
    for other in (QueST.load(cfg), QueST.load(cfg, tmp_path / "best"), QueST.load(best), bare):
        assert all(torch.equal(weights[name], value) for name, value in other.state_dict().items())
    state = policy.state_dict()
    with torch.no_grad():
        state["policy_prior.head.bias"] += 1
    policy.save(tmp_path / "best")
    assert_near(QueST.load(cfg, str(tmp_path / "best")).policy_prior.head.bias, weights["policy_prior.head.bias"] + 1)


class Intruder:
    """Unpickling it writes a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def damaged(kind, path):
    """A file that is no QueST, in one of the ways there are."""
    weights = torch.load(GOLDEN / "tiny_quest.pth", weights_only=True)["model"]
    if kind == "truncated":
        path.write_bytes((GOLDEN / "tiny_quest.pth").read_bytes()[:200_000])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "code":
        torch.save(dict(model=weights, more=Intruder(path.parent / "intruder")), path)
    elif kind == "foreign":
        torch.save(dict(model=dict(weight=torch.zeros(3))), path)
    elif kind == "bare tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "a key less":
        torch.save(dict(model={k: v for k, v in weights.items() if k != "autoencoder.action_proj.weight"}), path)
    elif kind == "a key more":
        torch.save(dict(model=weights | dict(more=torch.zeros(1))), path)
    elif kind == "a shape":
        torch.save(dict(model=weights | {"obs_proj.bias": torch.zeros(7)}), path)


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "empty", "code", "foreign", "bare tensor", "a key less",
                                  "a key more", "a shape"])
def test_quest_says_in_a_sentence_that_a_file_is_no_checkpoint(kind, tmp_path, capfd):
    tiny_quest()
    damaged(kind, tmp_path / "some.pth")
    with pytest.raises(SystemExit) as ended:
        QueST.from_pretrained(tmp_path / "some.pth")
    said = capfd.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and "some.pth" in said and "Traceback" not in said
    assert not (tmp_path / "intruder").exists()  # what is downloaded is not executed


def test_quest_names_the_released_file_of_a_suite_and_says_when_it_cannot_be_fetched(monkeypatch, tmp_path, capfd):
    asked, path = [], GOLDEN / "tiny_quest.pth"
    tiny_quest()
    with monkeypatch.context() as patch:
        patch.setattr(quest.transformers.utils, "cached_file", lambda hub, name: asked.append((hub, name)) or path)
        for suite in ript.LIBERO:
            QueST.load(ript.Config(device="cpu", suite=suite))
        QueST.load(ript.Config(device="cpu", checkpoint="quest/LIBERO_90_ript.pth"))
    names = ("SPATIAL_sft", "OBJECT_sft", "GOAL_sft", "LONG_sft", "90_sft", "90_ript")
    assert asked == [("tanshh97/RIPT_VLA", f"quest/LIBERO_{name}.pth") for name in names]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        QueST.load(ript.Config(device="cpu", suite="libero_90"))
    said = capfd.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and "quest/LIBERO_90_sft.pth" in said


# ------------------------------------------------------------------------------------------------------ the protocol
def test_quest_acts_in_the_environments_units_and_scores_what_it_drew(features):
    policy, raw = tiny_quest(), [random_raw(seed) for seed in range(3)]
    seen = [policy.preprocess(r) for r in raw]
    assert np.array_equal(seen[0]["agentview"], raw[0]["agentview_image"])  # upside down, as QueST was trained
    texts = ["open the drawer", "close it", "open the drawer"]
    records = policy.act(seen, texts, [np.random.default_rng(seed) for seed in range(3)])
    for record in records:
        assert record["actions"].shape == (policy.chunk, 7) and np.abs(record["actions"]).max() <= 1
        assert record["indices"].shape == record["log_prob"].shape == (8,) and 1 <= record["scale"] < 1000
        assert not any(array.nbytes > 10_000 for array in record.values())  # no pictures
    before = [record["log_prob"] for record in records]
    calls = []
    for encoder in policy.image_encoders.values():
        encoder.register_forward_hook(lambda *_: calls.append(1))
    log_prob = policy.log_prob(records)
    assert log_prob.requires_grad and not calls
    assert np.array_equal(log_prob.detach().numpy(), np.stack(before))  # the very function that scored them
    decoded = policy.decode_actions(torch.tensor(np.stack([record["indices"] for record in records])))
    assert_near(decoded[:, :8].clamp(-1, 1), np.stack([record["actions"] for record in records]), 1e-5)


def test_quest_draws_from_each_rows_generator_whatever_the_batch(features):
    policy, seen = tiny_quest(), [tiny_quest().preprocess(random_raw(seed)) for seed in range(3)]
    draw = lambda rows, explore: [record["indices"].tolist() for record in policy.act(
        [seen[i] for i in rows], ["close it"] * len(rows), explore and [np.random.default_rng(i) for i in rows])]
    together = draw([0, 1, 2], True)
    assert together == [draw([i], True)[0] for i in range(3)] == draw([2, 0, 1], True)[1:] + draw([2], True)
    assert together != draw([0, 1, 2], False)  # evaluation draws too, of the picture's own noise
    assert draw([0, 1, 2], False) == [draw([i], False)[0] for i in range(3)]
    noise = []
    policy.sample = lambda context, generators: noise.extend(g.random() for g in generators) or torch.zeros(3, 8).long()
    draw([0, 1, 2], False)
    assert len(set(noise)) == 3


def test_quest_samples_the_top_5_as_released_and_all_with_top_k_0():
    g, policy = golden("golden_quest"), tiny_quest()
    context = g["context"][:1].expand(2000, -1, -1)
    generators = [np.random.default_rng(i) for i in range(2000)]
    with torch.no_grad():
        first = policy.sample(context, generators)[:, 0]
        shares = torch.stack([(first == token).float().mean() for token in g["sampled.top5_indices"][0, 0]])
        assert shares.sum() == 1
        assert (shares - g["sampled.top5_probs"][0, 0]).abs().max() < 0.04  # 3.5 standard deviations
        policy.top_k = 0
        first = policy.sample(context, generators)[:, 0]
        density = policy.policy_prior(context[:1], first[:1, None][:, :0])[0, -1].softmax(-1)
    shares = torch.bincount(first, minlength=1000) / 2000
    assert (shares - density).abs().max() < 0.04 and (shares > 0).sum() > 20
    assert_near((shares * density.log()).sum(), (density * density.log()).sum(), 0.05)  # scored as it is drawn


def test_quest_trains_skillgpt_alone_with_the_released_weight_decay(capfd):
    policy = tiny_quest()
    decay, rest = policy.trainable("ript")
    assert (decay["weight_decay"], rest["weight_decay"]) == (1e-4, 0)
    names = {id(p): name for name, p in policy.named_parameters()}
    assert len(decay["params"]) == 25 and len(rest["params"]) == 52
    endings = ("in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight", "head.weight")
    assert all(names[id(p)].endswith(endings) for p in decay["params"])
    assert {names[id(p)] for p in decay["params"] + rest["params"]} == {
        name for name, p in policy.named_parameters() if p.requires_grad} == {
        name for name, _ in policy.named_parameters() if name.startswith("policy_prior.")}
    for stage in ("sft", "scale"):
        with pytest.raises(SystemExit) as ended:
            policy.trainable(stage)
        assert ended.value.code == 2 and stage in capfd.readouterr().err


def test_quest_presets_name_settings_that_there_are():
    assert set(QueST.PRESET) == set(ript.LIBERO)
    for preset in QueST.PRESET.values():
        ript.Config(**preset)
    long = ript.Config(**QueST.PRESET["libero_10"])
    assert (long.rollouts, long.groups, long.passes, long.clip, long.lr, long.loss_per) == (8, 180, 20, 0.2, 1e-6, "token")


# ------------------------------------------------------------------------------------------------ the instruction
def small_clip(directory):
    """A CLIP of two layers and letters for tokens, in the form that the hub has."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    directory.mkdir()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(tower, vocab_size=len(words), bos_token_id=len(words) - 2, eos_token_id=len(words) - 1)
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=dict(tower, image_size=32, patch_size=16),
                                projection_dim=512)).eval()
    clip.save_pretrained(directory)
    CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt")).save_pretrained(directory)
    return clip


def test_quest_takes_clips_feature_of_an_instruction_once(tmp_path, monkeypatch):
    clip = small_clip(tmp_path / "clip")
    monkeypatch.setattr(QueST, "CLIP", str(tmp_path / "clip"))
    feature = quest.text_feature("open it", QueST.CLIP)
    assert feature.shape == (512,) and feature.dtype == np.float32
    letters = [ord(c) - ord("a") for c in "ope"] + [26 + ord("n") - ord("a"), ord("i") - ord("a"), 26 + ord("t") - ord("a")]
    ids = torch.tensor([[52, *letters, 53]])
    hidden = clip.text_model(ids).last_hidden_state[0, -1]  # at the end of text
    assert_near(feature, clip.text_projection(hidden).detach(), 1e-5)
    padded = torch.cat([ids, torch.full((1, 5), 53)], 1)  # the released code pads; it makes no difference
    output = clip.get_text_features(padded, attention_mask=(torch.arange(13) < 8).long()[None])
    assert_near(feature, output.pooler_output[0].detach(), 1e-5)
    monkeypatch.setattr(quest.transformers.CLIPModel, "from_pretrained", None)
    assert quest.text_feature("open it", QueST.CLIP) is feature


def test_quest_says_in_a_sentence_what_feature_is_missing(features, tmp_path, capfd):
    (tmp_path / "bad.npz").write_text("no array")
    for source in (features, tmp_path / "bad.npz", tmp_path / "none.npz", tmp_path):
        with pytest.raises(SystemExit) as ended:
            quest.text_feature("stand on your head", str(source))
        said = capfd.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1 and "QUEST_CLIP" in said and "stand" in said


def test_an_iteration_of_quest_in_libero(features, tmp_path, monkeypatch):
    """Through the protocol alone: 20 passes over tokens; the rewards are pretended, an episode has 16 steps."""
    libero_or_skip()
    tiny_quest()
    monkeypatch.setattr(ript.load_suite("libero_10"), "HORIZON", 16)
    monkeypatch.setattr(ript, "fate", lambda group: "kept")
    monkeypatch.setattr(ript, "leave_one_out_advantage", lambda rewards: rewards + torch.tensor([1.0, -1.0]))
    run = ["--model", "quest", "--suite", "libero_long", "--task", "2", "--eval_contexts", "1", "--workers", "2",
           "--collision", "true"]
    ript.main([*run, "--checkpoint", str(GOLDEN / "tiny_quest.pth"), "--rollouts", "2", "--groups", "2", "--lr", "1e-4",
               "--iterations", "1", "--out", str(tmp_path / "run")])
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[1])
    assert (row["kept"], row["env_steps"], row["updates"]) == (2, 64, 20) and row["ratio_error"] < 1e-4
    start, end = tiny_quest().state_dict(), QueST.from_pretrained(tmp_path / "run/last").state_dict()
    moved = {name for name in start if (start[name] != end[name]).any()}
    assert moved and all(name.startswith("policy_prior") for name in moved)
    ript.main([*run, "--eval", "--checkpoint", str(tmp_path / "run/last"), "--out", str(tmp_path / "eval")])
    assert (tmp_path / "eval/evaluation.csv").read_text().count("\n") == 2


# ------------------------------------------------------------------------------------------------- the command line
MISTAKES = [  # arguments, and what the one sentence says; {tmp} is prepared below
    ("--rollout 8", "unrecognized arguments: --rollout"),
    ("--suite libero", "tabletop, tabletop_pretrain, libero_spatial, libero_object"),
    ("--suite {tmp}/none.py:Suite", "cannot load {tmp}/none.py:Suite: FileNotFoundError"),
    ("--suite {tmp}/suite.py:Kitchen", "cannot load {tmp}/suite.py:Kitchen: AttributeError"),
    ("--suite {tmp}/suite.py:Path", "Path is no subclass of ript.Libero"),
    ("--suite {tmp}/suite.py:here", "cannot load {tmp}/suite.py:here: TypeError"),
    ("--suite {tmp}/half.py:Suite", "cannot load {tmp}/half.py:Suite: SyntaxError"),
    ("--suite {tmp}/file:Suite", "cannot load {tmp}/file:Suite: AttributeError"),
    ("--model gpt", 'none of tiny, openvla-oft, quest, FILE.py:Class'),
    ("--lr fast", "--lr"),
    ("--rollouts 1", "--rollouts must be at least 2"),
    ("--groups 0", "--groups must be a number above 0"),
    ("--workers 0", "--workers must be a number above 0"),
    ("--minibatch 0", "--minibatch must be a number above 0"),
    ("--task 2", "--task must be below 2"),
    ("--loss_per step", "'token'"),
    ("--passes 0", "--passes must be a number above 0"),
    ("--image_size 8", "--image_size must be at least 16"),
    ("--iterations -1", "--iterations must be at least 0"),
    ("--lr 0", "--lr must be a number above 0"),
    ("--clip nan", "--clip must be a number above 0"),
    ("--scale_multiplier -2", "--scale_multiplier must be a number above 0"),
    ("--momentum 1", "--momentum must be below 1"),
    ("--collision maybe", "--collision"),
    ("--device tpu9", "--device tpu9 cannot be used"),
    ("--demos {tmp}/wrong", "tabletop has demonstrations without --demos"),
    ("--eval --suite libero_goal", "--eval needs --checkpoint DIR"),
    ("--adapter {tmp}/other", "--adapter and --scale_head are not for --model tiny"),
    ("--checkpoint nowhere", "cannot read a policy from nowhere: no such file or directory"),
    ("--checkpoint no/such/run", "cannot read a policy from no/such/run: no such file or directory, and nothing from the hub"),
    ("--checkpoint {tmp}/none", "cannot read a policy from {tmp}/none"),
    ("--checkpoint {tmp}/corrupt", "cannot read a policy from {tmp}/corrupt"),
    ("--checkpoint {tmp}/other", "cannot read a policy from {tmp}/other"),
    ("--checkpoint {tmp}/file", "cannot read a policy from {tmp}/file"),
    ("--resume {tmp}/none", "cannot resume {tmp}/none"),
    ("--resume {tmp}/unknown", "cannot resume {tmp}/unknown"),
    ("--resume {tmp}/list", "cannot resume {tmp}/list"),
    ("--out {tmp}/file/run", "cannot write {tmp}/file/run"),
    ("--suite libero_goal --task 0 --demos {tmp}/broken", "cannot read the demonstrations in {tmp}/broken"),
    ("--suite libero_goal --task 0 --demos {tmp}/wrong", "(12, 6)"),
    ("--suite libero_goal --task 0 --demos {tmp}/none", "cannot read the demonstrations in {tmp}/none"),
]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("mistakes")
    (tmp / "file").write_text("")
    (tmp / "suite.py").write_text("from pathlib import Path\nhere = Path()\n")
    (tmp / "half.py").write_text("class Suite(")
    for name in ("corrupt", "other"):
        small_policy().save(tmp / name)
    (tmp / "corrupt/model.safetensors").write_bytes((tmp / "other/model.safetensors").read_bytes()[:1000])
    arch = json.loads((tmp / "other/config.json").read_text())
    arch["llm"]["intermediate_size"] = 48
    (tmp / "other/config.json").write_text(json.dumps(arch))
    for name, content in (("unknown", dict(learning_rate=1)), ("list", [1])):
        (tmp / name).mkdir()
        (tmp / name / "config.json").write_text(json.dumps(content))
    name = f"{load_suite('libero_goal').BENCHMARK.tasks[0].name}_demo.hdf5"
    for folder in ("broken", "wrong"):
        (tmp / folder).mkdir()
        write_demonstration(tmp / folder / name, actions=np.zeros((12, 6)))
    (tmp / "broken" / name).write_bytes((tmp / "wrong" / name).read_bytes()[:2000])
    return tmp


OFT = "--model openvla-oft --suite libero_10 --task 2 --checkpoint {tmp}/oft "
MISTAKES_OF_CHECKPOINTS = [  # of the released form; {tmp} is prepared below
    ("--model openvla-oft --suite libero_90", "--model openvla-oft is not made for --suite libero_90"),
    ("--model openvla-oft --suite libero_10 --scale_head=", "explores with a scale head"),
    ("--model openvla-oft --suite libero_10 --eval --checkpoint nobody/nothing", "cannot read a policy from nobody/nothing"),
    (OFT + "--eval --suite libero_goal", "is for libero_10_no_noops, not 'libero_goal'"),
    (OFT + "--scale_head {tmp}/oft/action_head--1000_checkpoint.pt", "cannot read a policy from {tmp}/oft/action_head--1000"),
    (OFT + "--scale_head {tmp}/none.pth", "cannot read a policy from {tmp}/none.pth"),
    (OFT + "--fit_scale_head", "--fit_scale_head needs --demos DIR"),
    (OFT + "--adapter nobody/nothing/inside", "cannot read a policy from nobody/nothing/inside"),
    (OFT + "--adapter {tmp}/none", "cannot read a policy from {tmp}/none"),
    (OFT + "--adapter {tmp}/rank", "{tmp}/rank: Error(s) in loading state_dict"),
    (OFT + "--adapter {tmp}/fewer", "{tmp}/fewer: Error(s) in loading state_dict for OpenVLAOFT: Missing key(s)"),
    (OFT + "--adapter {tmp}/base", "{tmp}/base: Error(s) in loading state_dict"),
    (OFT + "--adapter {tmp}/cut", "cannot read a policy from {tmp}/cut"),
    (OFT + "--adapter {tmp}/headless", "cannot read a policy from {tmp}/headless"),
    (OFT + "--adapter {tmp}/one_head", "cannot read a policy from {tmp}/one_head: 'scale_header'"),
    (OFT + "--scale_head {tmp}/part.pth", "{tmp}/part.pth: Error(s) in loading state_dict for OpenVLAOFT: Missing key(s)"),
    ("--model openvla-oft --suite libero_10 --eval --checkpoint {tmp}/half", "model-00002-of-00003.safetensors"),
    ("--model openvla-oft --suite libero_10 --eval --checkpoint {tmp}/less", "Missing key(s)"),
    ("--model openvla-oft --suite libero_10 --eval --checkpoint {tmp}/pickle", "{tmp}/pickle/action_head--1000_checkpoint.pt"),
]


@pytest.fixture(scope="module")
def broken_checkpoints(tmp_path_factory):
    libero_or_skip()  # whose meshes are asked for before a checkpoint is read
    golden("golden_oft")
    from safetensors.torch import load_file, save_file
    tmp = tmp_path_factory.mktemp("checkpoints")
    for name in ("oft", "half", "less", "pickle"):
        shutil.copytree(GOLDEN / "tiny_oft", tmp / name, copy_function=shutil.copyfile)
    for name in ("rank", "fewer", "base", "cut", "headless", "one_head"):
        shutil.copytree(GOLDEN / LORA, tmp / name, copy_function=shutil.copyfile)
    for folder in tmp.iterdir():
        folder.chmod(0o755)
    shard = tmp / "half/model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    (tmp / "less/model-00003-of-00003.safetensors").unlink()
    torch.save({"weight": Path("a class that is not a tensor")}, tmp / "pickle/action_head--1000_checkpoint.pt")
    settings = json.loads((tmp / "rank/adapter_config.json").read_text())
    (tmp / "rank/adapter_config.json").write_text(json.dumps(settings | dict(r=16)))
    weights = load_file(tmp / "fewer/adapter_model.safetensors")
    one = next(name for name in weights if "lora_A" in name)
    fewer = {name: p for name, p in weights.items() if name not in (one, one.replace("lora_A", "lora_B"))}
    save_file(fewer, tmp / "fewer/adapter_model.safetensors")
    save_file({name.replace("layers.1", "layers.7"): p for name, p in weights.items()}, tmp / "base/adapter_model.safetensors")
    (tmp / "cut/adapter_model.safetensors").write_bytes((tmp / "cut/adapter_model.safetensors").read_bytes()[:5000])
    (tmp / "headless/openvla_headers.pt").unlink()
    heads = torch.load(tmp / "one_head/openvla_headers.pt", weights_only=True)
    torch.save(dict(action_header=heads["action_header"]), tmp / "one_head/openvla_headers.pt")
    header = torch.load(tmp / "oft/scale_header.pth", weights_only=True)
    del header["log_b_head"]["bias"]
    torch.save(header, tmp / "part.pth")
    return tmp


@pytest.mark.parametrize("arguments,sentence", MISTAKES_OF_CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_gets_one_sentence(broken_checkpoints, capsys, arguments, sentence):
    test_a_mistake_gets_one_sentence_and_status_2(broken_checkpoints, capsys, arguments + " --out {tmp}/out", sentence)


@pytest.mark.parametrize("arguments,sentence", MISTAKES)
def test_a_mistake_gets_one_sentence_and_status_2(tmp, capsys, arguments, sentence):
    if "--demos" in arguments:
        libero_or_skip()
    with pytest.raises(SystemExit) as exit:
        ript.main(arguments.format(tmp=tmp).split())
    said = capsys.readouterr()
    assert exit.value.code == 2 and said.out == ""
    assert sentence.format(tmp=tmp) in said.err and said.err.count("\n") == 1 and said.err.startswith("ript.py: ")


def test_a_mistake_leaves_no_traceback_at_the_command_line():
    done = launch("--rollouts", 1)
    assert done.returncode == 2 and done.stderr == "ript.py: --rollouts must be at least 2, got 1\n"


def test_no_opengl_and_another_mujoco_get_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(ript.mujoco, "__version__", "3.4.0")
    with pytest.raises(SystemExit):
        ript.check(config())
    assert "pip install mujoco==3.3.2" in capsys.readouterr().err
    done = launch("--groups", 1, MUJOCO_GL="egl", MUJOCO_EGL_DEVICE_ID="99")
    assert done.returncode == 2 and done.stderr.startswith("ript.py: no headless OpenGL")
    assert done.stderr.count("\n") == 1


def test_help_reads_as_documentation():
    done = launch("--help")
    assert done.returncode == 0 and "Algorithm 1   repeat M times:" in done.stdout
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in done.stdout and " ".join(field.metadata["help"].split()[:2]) in done.stdout


def test_presets_yield_to_the_command_line_and_libero_long_is_libero_10():
    assert config("--suite", "libero_long").suite == "libero_10"
    assert config().iterations == 6 and config("--iterations", 3).iterations == 3
    assert load_suite("libero_10").HORIZON == 520 and load_suite("libero_object").HORIZON == 280
    assert config("--eval", "--checkpoint", "x").out == "runs/tabletop_eval" != config().out  # not over the run's files
    oft = [config("--model", "openvla-oft", "--suite", suite) for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_long")]
    assert [cfg.scale_multiplier for cfg in oft] == [2, 5, 5, 5] and [cfg.lr for cfg in oft] == [5e-5, 5e-5, 1e-5, 5e-5]
    assert all((cfg.rollouts, cfg.groups, cfg.passes, cfg.clip, cfg.iterations, cfg.eval_contexts) == (8, 24, 1, 0.1, 12, 50) for cfg in oft)


def test_every_experiment_of_the_readme_is_a_run_that_ript_accepts():
    evidence = runpy.run_path(str(HERE / "examples/evidence.py"))
    cells = evidence["row"]("tabletop", 0).split(" | ")  # of the files in assets/evidence
    assert cells[2:5] == ["18/100 18% [12%, 27%]", "100/100 100% [96%, 100%]", "82, 0, 4e-25"]
    for name, arguments in evidence["EXPERIMENTS"].items():
        if name == "libero":  # the last
            libero_or_skip()
        ript.check(config(*arguments.split()))


def test_metrics_and_checkpoints_are_written_whole_or_not_at_all(tmp_path, capsys):
    def limit(size):  # of files, as a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    big = torch.zeros(10 ** 6)
    writers = dict(text=lambda p: p.write_text("x" * 10 ** 6), pt=lambda p: torch.save(big, p),
                   safetensors=lambda p: save_file(dict(big=big), p))
    for suffix, writer in writers.items():
        path = tmp_path / f"file.{suffix}"
        ript.write(path, lambda p: p.write_text("first"))
        limit(100_000)
        try:
            with pytest.raises(SystemExit) as exit:
                ript.write(path, writer)
        finally:
            limit(resource.RLIM_INFINITY)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error.startswith(f"ript.py: cannot write {path}: ") and error.count("\n") == 1
        assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
        path.unlink()
