"""The claims of ript.py, each as a test that fails when the claim does. Run: bash run_libero.sh test"""
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import ript
from ript import Architecture, Config, Context, Episode, OpenVLAOFT, Simulator, UserError, Worker

HERE = Path(__file__).parent
GOLDEN = Path(os.environ.get("RIPT_GOLDEN", HERE / ".." / "shared" / "golden"))
TASKS = ript.instructions_of("tabletop")


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
    policy = OpenVLAOFT(dataclasses.replace(Architecture(), **changes))
    policy.fit_statistics(np.random.default_rng(seed).standard_normal((100, 8)))
    return policy


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
def test_short_gradient_computes_the_whole_forward_and_trains_decoder_and_action_head_alone():
    observations, texts = random_observations(3), ["lift the red cube", "lift the green cube", "lift it"]
    whole, short = small_policy(), small_policy(whole_gradient=False)
    short.arch.statistics = whole.arch.statistics
    for a, b in zip(whole.predict(observations, texts), short.predict(observations, texts)):
        assert_close(a, b, 1e-5)
    short.predict(observations, texts)[0].sum().backward()
    reached = {name.split(".")[0] for name, p in short.named_parameters() if p.grad is not None}
    assert reached == {"language_model", "action_head"}
    assert short.language_model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0
    whole.predict(observations, texts)[0].sum().backward()
    reached = {name.split(".")[0] for name, p in whole.named_parameters() if p.grad is not None}
    assert reached == {"language_model", "action_head", "vision_backbone", "projector", "proprio_projector"}


def test_attention_is_bidirectional():
    policy, observations = small_policy(), random_observations(1)
    x, mask, positions = policy._embed(observations, ["lift"])
    run = lambda x: policy.language_model.model(inputs_embeds=x, attention_mask=mask, position_ids=positions)
    changed = x.clone()
    changed[:, -3] += 1
    assert (run(x).last_hidden_state[:, 0] - run(changed).last_hidden_state[:, 0]).abs().max() > 1e-4


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


@pytest.fixture(scope="module")
def tiny_oft():
    """OpenVLAOFT at the sizes of the original's tiny checkpoint, filled by name; and the original's outputs."""
    g, directory = golden("golden_oft"), GOLDEN / "tiny_oft"
    from safetensors.torch import load_file
    weights = {}
    for shard in sorted(directory.glob("model-*.safetensors")):
        weights |= {name: value.float() for name, value in load_file(shard).items()}
    text = json.loads((directory / "config.json").read_text())["text_config"]
    llm = {key: text[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                      "num_attention_heads", "num_key_value_heads") if key in text} | dict(rms_norm_eps=1e-6)
    towers = (dict(dim=32, depth=4, heads=4, prefix=5, layer_scale=True), dict(dim=48, depth=3, heads=4, mlp_ratio=3.7362))
    policy = OpenVLAOFT(Architecture(towers=towers, llm=llm))
    heads = {f"action_head.{name.removeprefix('module.')}": value for name, value in
             torch.load(next(directory.glob("action_head*")), weights_only=True).items()}
    heads |= {f"proprio_projector.{name.removeprefix('module.')}": value for name, value in
              torch.load(next(directory.glob("proprio_projector*")), weights_only=True).items()}
    scale = torch.load(directory / "scale_header.pth", weights_only=True)
    heads |= {f"scale_head.trunk.{name}": value for name, value in scale["scale_trunk"].items()}
    heads |= {f"scale_head.log_b_head.{name}": value for name, value in scale["log_b_head"].items()}
    own = policy.state_dict()
    unused = [name for name in weights if name not in own]
    assert all(any(part in name for part in (".norm.", "attn_pool", "lm_head", "blocks.3.", "blocks.2.")) for name in unused)
    policy.load_state_dict({name: value for name, value in (weights | heads).items() if name in own})  # strict
    return policy, g


def test_vision_towers_and_projectors_agree_with_the_original(tiny_oft):
    policy, g = tiny_oft
    pixels = g["pixel_values"].unflatten(1, (2, 2, 3))  # observation, camera, tower's normalisation, channel
    with torch.no_grad():
        towers = [tower(pixels[:, :, i].flatten(0, 1)) for i, tower in enumerate(policy.vision_backbone.values())]
        for ours, name in zip(towers, ("base_dino", "base_siglip")):
            assert_close(ours, g[name].flatten(0, 1), 1e-5)
        assert_close(policy.projector(torch.cat(towers, -1)).unflatten(0, (3, 2)).flatten(1, 2), g["base_projected"], 1e-5)
        assert_close(policy.proprio_projector(g["proprio_norm"]), g["proprio_token"], 1e-5)


def test_decoder_and_heads_agree_with_the_original(tiny_oft):
    policy, g = tiny_oft
    x = g["base_a_inputs_embeds_obs0"][None]
    mask = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool)
    with torch.no_grad():
        hidden = policy.language_model.model(inputs_embeds=x, attention_mask=mask).last_hidden_state[:, -58:-2]
        assert_close(hidden, g["base_a_action_hidden"][:1], 1e-5)
        mean, log_scale = policy._heads(g["base_a_action_hidden"])
    assert_close(mean, g["base_a_mean"], 1e-5)
    assert_close(log_scale, g["base_a_logscale"], 1e-5)


def test_preprocess_gives_the_original_proprio():
    g = golden("golden_oft")
    for i in range(3):
        raw = {f"robot0_{name}": g[f"raw_{name}"][i].numpy() for name in ("eef_pos", "eef_quat", "gripper_qpos")}
        raw |= {"agentview_image": g["raw_agentview"][i].numpy(), "robot0_eye_in_hand_image": g["raw_wrist"][i].numpy()}
        observation = small_policy().preprocess(raw)
        assert_close(observation["proprio"], g["state"][i], 1e-6)
        assert (observation["pictures"][0] == raw["agentview_image"][::-1, ::-1]).all()  # turned by 180 degrees
