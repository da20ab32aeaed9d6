"""The claims of policies/openvla_oft.py and tiny.py: the released form against the original's outputs."""
import dataclasses
import json
import math
from fnmatch import fnmatch

import ript  # before torch is: it says how OpenMP's threads wait

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from policies import checkpoints
from policies.openvla_oft import OpenVLAOFT
from policies.tiny import Tiny
from policies.vision import openvla_picture
from ript import Context, Episode
from tests.conftest import (GOLDEN, LORA, PRETRAINED, ROOT, SCALE, TASKS, assert_close, config, golden,
                            original_observations, pretrained, random_observations, small_policy, trained)


# -------------------------------------------------------------------------------------------- the small form
EVERYTHING = Tiny.sft_modules
# As the 7B's: two passes, the second through the last positions only.
DECODER = ("language_model.model.layers", "action_head")


def test_the_scale_head_starts_at_b_of_a_twentieth_whatever_the_features_are():
    head = ript.ScaleHead(nn.Linear(5, 6), 6, 7)
    scale = head(torch.randn(3, 8, 5)).exp()
    assert scale.shape == (3, 8, 7) and 0.04 < scale.min() and scale.max() < 0.06


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
    policy = small_policy()
    x, mask, positions = policy.embed(random_observations(1), ["lift"])

    def first_output(x):
        llama = policy.language_model.model
        return llama(inputs_embeds=x, attention_mask=mask, position_ids=positions).last_hidden_state[:, 0]

    changed = x.clone()
    changed[:, -3] += 1
    assert (first_output(x) - first_output(changed)).abs().max() > 1e-4


def test_a_transformers_that_ignores_the_mask_is_noticed_when_a_policy_is_loaded(monkeypatch):
    from transformers import LlamaModel
    forward = LlamaModel.forward

    def causal(self, attention_mask=None, **rest):
        return forward(self, **rest)

    monkeypatch.setattr(LlamaModel, "forward", causal)
    with pytest.raises(ript.UserError, match="attention is causal"):
        pretrained()


def test_a_batch_of_mixed_instructions_equals_them_one_by_one():
    policy, observations = small_policy(), random_observations(3)
    texts = ["lift the green cube", "push", "lift the red cube"]
    together = policy.predict(observations, texts)
    for i in range(3):
        for a, b in zip(together, policy.predict(observations[i:i + 1], texts[i:i + 1])):
            assert_close(a[i], b[0], 1e-5)
    other = policy.predict(observations, texts[::-1])[0]
    assert (other[0] - together[0][0]).abs().max() > 1e-5  # the words reach the heads


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


def test_a_policy_that_is_saved_and_loaded_acts_to_the_same_bits(tmp_path):
    """Matrix products differ in the last bit with the place of weights in memory, odd in a mapped file."""
    policy, texts = small_policy(), [TASKS[0]]
    policy.save(tmp_path)
    again = Tiny.from_pretrained(tmp_path)
    for observation in random_observations(20):
        ours, theirs = (p.act([observation], texts, [None])[0]["actions"] for p in (policy, again))
        assert (ours == theirs).all()


def test_the_laptops_bounds_of_b_move_with_the_multiplier():
    cfg = config("--checkpoint", PRETRAINED, "--scale_multiplier", 0.5)
    half, whole = Tiny.load(cfg), Tiny.load(dataclasses.replace(cfg, scale_multiplier=1.0))
    with torch.no_grad():
        scales = [policy.density(random_observations(2), TASKS)[1].exp() for policy in (half, whole)]
    assert_close(scales[0], scales[1] / 2)


# ------------------------------------------------------------------ the released form: from pixels to actions
def raw_observation(g, i):
    raw = {f"robot0_{name}": g[f"raw_{name}"][i].numpy() for name in ("eef_pos", "eef_quat", "gripper_qpos")}
    return raw | dict(agentview_image=g["raw_agentview"][i].numpy(),
                      robot0_eye_in_hand_image=g["raw_wrist"][i].numpy())


def test_pictures_are_tensorflows_within_a_few_values():
    g = golden("golden_preprocess")
    for name in ("gradient256", "noise128", "scene256", "scene128"):
        upright = np.ascontiguousarray(g[f"{name}/input"].numpy()[::-1, ::-1])
        off = (torch.tensor(openvla_picture(upright)).int() - g[f"{name}/cropped224"].int()).abs()
        # Of 150,528 values; round(x * 255) would be off in a fourth.
        assert off.max() <= 1 and (off > 0).float().mean() < 1e-4
    g = golden("golden_oft")
    for i, original in enumerate(original_observations(g)):
        observation = OpenVLAOFT.preprocess(raw_observation(g, i))
        off = np.abs(observation["pictures"].astype(int) - original["pictures"])
        assert off.max() <= 1 and (off > 0).mean() < 1e-4
        assert_close(observation["proprio"], original["proprio"], 1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_vision_towers_and_projectors_agree_with_the_original(oft, lora):
    policy, g, _ = oft
    policy, prefix = policy("exact", lora), "lora" if lora else "base"
    pixels = g["pixel_values"].unflatten(1, (2, 2, 3))  # observation, camera, tower's normalisation, channel
    with torch.no_grad():
        backbone = enumerate(policy.vision_backbone.values())
        towers = [tower(pixels[:, :, i].flatten(0, 1)) for i, tower in backbone]
        for ours, name in zip(towers, ("dino", "siglip")):
            # Every fifth patch, as tests/golden has no others.
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


# --------------------------------------------------------------------- the released form: gradient and update
def our_name(path):
    """Our name of an original's parameter."""
    return path.removeprefix("model.").removeprefix("base_model.model.")


@pytest.mark.parametrize("clip", [False, True])
def test_gradients_agree_with_the_original_and_reach_the_decoders_adapters_and_the_heads_alone(oft, clip):
    policy, g, texts = oft
    names = [our_name(name) for name in np.load(GOLDEN / "golden_oft.npz")["grad_names"]]
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
                ours, expected = grads[our_name(key.removeprefix("grad/"))], g[key]
                assert (ours - expected).norm() <= 1e-4 * expected.norm() + 1e-6, key
        model.zero_grad()
    base = policy("exact", False)
    sum(part.sum() for part in base.predict(original_observations(g), texts)).backward()
    reached = {name.split(".")[0] for name, p in base.named_parameters() if p.grad is not None}
    assert reached == {"action_head", "scale_head"}
    base.zero_grad()


@pytest.mark.parametrize("prefix", ["prompt", "exact"])
def test_adapters_compute_in_the_decoders_precision_and_their_gradient_is_that_of_float32(oft, prefix):
    policy, g, texts = oft
    low = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", GOLDEN / LORA, prefix=prefix,
                                     dtype=torch.bfloat16)
    dtypes = []
    for name, module in low.language_model.model.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            module.register_forward_hook(lambda module, x, y: dtypes.append((x[0].dtype, y.dtype)))
    gradients = []
    for model in (low, policy(prefix, True)):
        model.zero_grad()
        mean, log_scale = model.predict(original_observations(g), texts)
        ript.laplace_log_prob(g["fixed_action"], mean, log_scale).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    adapters = sum("lora_" in name for name in gradients[0])
    # Both passes ask each adapter, and only the second has gradient.
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)} and len(dtypes) == 2 * adapters > 0
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.dtype == torch.float32
        # With random weights, a base in bfloat16 turns them by this much, also where adapters are precise.
        cosine = nn.functional.cosine_similarity(gradient.flatten(), gradients[1][name].flatten(), 0)
        assert cosine > 0.8, (name, cosine)


def recorded_episodes(g, observation, text):
    """The original's episodes, with its own samples and old log-probabilities."""
    old = g["ref_log_prob"].sum(-1).numpy()
    rows = iter(zip(g["obs_index"].tolist(), g["actions_normalized"].numpy(), old))
    episodes = []
    for length, reward in zip(g["episode_len"].tolist(), g["reward"].tolist()):
        chunks = []
        for _ in range(length):
            i, sample, log_prob = next(rows)
            chunk = dict(observation=observation[i], instruction=text, sample=sample, log_prob=log_prob)
            chunks.append(chunk)
        executed = [8] * length
        episodes.append(Episode(Context(0, text, 0), 0, (), chunks, executed, bool(reward)))
    return episodes


def use_recorded_log_probs(monkeypatch, policy):
    """Let update take act's log-probabilities for old, so that ratios are the original's. -> a list, to which
    every micro-batch of four chunks adds its mean ratio, as the original logs it."""
    recorded, ratios = [], []
    log_prob, formula = policy.log_prob, ript.ppo_clip_loss

    def log_prob_and_keep(chunks):
        recorded.append(torch.tensor(np.stack([chunk["log_prob"] for chunk in chunks])))
        return log_prob(chunks)

    def formula_with_recorded(log_prob, old_log_prob, advantage, weight, clip):
        token = ript.loss_weight(weight > 0, "token")
        ratios.append(formula(log_prob, recorded[-1], advantage, token, clip)[1]["ratio"].item())
        return formula(log_prob, recorded[-1], advantage, weight, clip)

    monkeypatch.setattr(policy, "log_prob", log_prob_and_keep)
    monkeypatch.setattr(ript, "ppo_clip_loss", formula_with_recorded)
    return ratios


def test_an_optimiser_step_equals_the_originals_where_its_rule_is_the_intended_one(oft, monkeypatch):
    """Differences on purpose: the gradient's norm is clipped jointly, not for adapters and heads apart;
    ratios are of whole action steps in float32 (the golden run is float32 too); an episode's last step is
    always trained on."""
    g = golden("golden_ppo_step")
    names = [our_name(name) for name in np.load(GOLDEN / "golden_ppo_step.npz")["param_names"]]
    policy = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", GOLDEN / LORA, prefix="prompt")
    episodes = recorded_episodes(g, original_observations(oft[1]), oft[2][0])
    policy.train_only(OpenVLAOFT.trained + ("scale_head",))
    before = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    ratios = use_recorded_log_probs(monkeypatch, policy)
    cfg = config("--model", "openvla-oft", "--suite", "libero_10", "--minibatch", 4, "--rollouts", 4,
                 "--max_grad_norm", 1e9)
    parameters = policy.parameter_groups()[0]["params"]
    stats = ript.update(policy, torch.optim.SGD(parameters, lr=1.0), episodes, cfg, ript.TrainState())
    named = dict(policy.named_parameters())
    grads = {name: before[name] - named[name].detach() for name in before}  # of a step of length one
    lora, heads = ([grads[name] for name in before if ("lora_" in name) == which] for which in (True, False))
    norms = [torch.cat([grad.flatten() for grad in part]).norm().item() for part in (lora, heads)]
    assert norms[0] == pytest.approx(g["mb1_gradient_norm_model_stats"].item(), rel=1e-4)
    assert norms[1] == pytest.approx(g["mb1_gradient_norm_header_stats"].item(), rel=1e-4)
    # The original's mean is over 10 chunks.
    assert stats["loss"] / 10 == pytest.approx(g["mb1_pg_loss_stats"].item(), rel=1e-3)
    assert np.average(ratios, weights=[4, 4, 2]) == pytest.approx(g["mb1_pg_ratio_stats"].item(), rel=1e-4)
    assert stats["grad_norm"] == pytest.approx(math.hypot(*norms), rel=1e-5)
    for name, value in before.items():  # once more, with the original's clipping and optimiser
        named[name].data = value.clone()
        named[name].grad = grads[name] * min(1, 1 / norms["lora_" not in name])
    torch.optim.AdamW(policy.parameter_groups(), 5e-5).step()
    for name, norm, delta in zip(names, g["mb1_grad_norm_after_clip"].tolist(), g["mb1_delta_norm"].tolist()):
        assert (name in before) == (norm >= 0), name
        if name in before:
            assert named[name].grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name
            assert (named[name] - before[name]).norm().item() == pytest.approx(delta, rel=2e-3), name


# ------------------------------------------------------------------------- the released form: names and files
def test_the_seven_billion_are_those_of_the_real_checkpoint_and_take_439_adapters():
    directory = ROOT / ".." / "shared" / "openvla-7b-oft-finetuned-libero-10"
    if not directory.exists():
        directory = ROOT / "tests/golden/openvla-7b"  # its names and sizes
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    with torch.device("meta"):
        policy = OpenVLAOFT(**OpenVLAOFT.describe(directory, "libero_10")[0])
        heads = ("action_head", "scale_head", "proprio_projector")
        own = {name: value for name, value in policy.state_dict().items() if not name.startswith(heads)}
        assert own.keys() == index["weight_map"].keys()
        assert sum(value.numel() * 2 for value in own.values()) == index["metadata"]["total_size"]  # bfloat16
        assert sum(p.numel() for p in policy.action_head.parameters()) == 151_117_831
        assert sum(p.numel() for p in policy.scale_head.parameters()) == 167_899_143
        policy.add_lora()
    adapters = {name: p for name, p in policy.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 439 and sum(p.numel() for p in adapters.values()) == 110_828_288
    policy.train_only(OpenVLAOFT.trained)
    train = sum(p.numel() for p in policy.parameter_groups()[0]["params"])
    assert train == 79_953_920 + 151_117_831  # the decoder's adapters and the action head


def test_adapters_are_saved_as_the_authors_save_them(oft, tmp_path):
    policy, g, texts = oft
    policy = policy("prompt", True)
    policy.save(tmp_path)
    folders = GOLDEN / LORA, tmp_path
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    # One tensor of theirs is needed by nothing.
    assert theirs.keys() - ours.keys() == {"base_model.model.language_model.lm_head.base_layer.weight"}
    assert all((theirs[name].float() == ours[name]).all() for name in ours)
    theirs, ours = (torch.load(folder / "openvla_headers.pt", weights_only=True) for folder in folders)
    names = [{part: list(head) for part, head in heads.items()} for heads in (theirs, ours)]
    assert names[0] == names[1]
    theirs, ours = (json.loads((folder / "adapter_config.json").read_text()) for folder in folders)
    assert set(theirs.pop("target_modules")) == set(ours.pop("target_modules"))
    assert {name: theirs[name] for name in ours} == ours
    again = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", tmp_path, prefix="prompt")
    assert not (tmp_path / "scale_header.pth").exists()  # openvla_headers.pt has it
    observations = original_observations(g)
    with torch.no_grad():
        for a, b in zip(again.predict(observations, texts), policy.predict(observations, texts)):
            assert (a == b).all()


def test_a_scale_head_without_adapters_is_saved_as_the_authors_save_it(oft, tmp_path):
    policy = oft[0]()
    policy.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"ript.json", "scale_header.pth"}
    saved = tmp_path / "scale_header.pth"
    again = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", scale_head=saved)
    named = dict(policy.named_parameters())
    assert all((p == named[name]).all() for name, p in again.named_parameters() if "scale_head" in name)


def test_the_seven_billions_command_asks_the_hub_for_the_released_files(monkeypatch):
    """torchrun ript.py --model openvla-oft --suite libero_long, with a tiny checkpoint in the hub's place."""
    asked = []

    def download(repository, allow_patterns, ignore_patterns):
        asked.append((repository, allow_patterns))
        return str(GOLDEN / "tiny_oft")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    cfg = config("--model", "openvla-oft", "--suite", "libero_long", "--device", "cpu")
    header = "openvla_oft/scale_header/LIBERO_LONG_scale_header.pth"
    assert cfg.scale_head == f"tanshh97/RIPT_VLA/{header}"
    policy = OpenVLAOFT.load(dataclasses.replace(cfg, scale_head=str(GOLDEN / SCALE)))
    (repository, released), = asked
    assert repository == "moojink/openvla-7b-oft-finetuned-libero-10"
    # What acts, and what export.py copies for openvla-oft's own loader; no weights in other formats.
    needed = ("model-00001-of-00004.safetensors", "action_head--150000_checkpoint.pt", "config.json",
              "tokenizer.model", "processing_prismatic.py")
    assert all(any(fnmatch(name, pattern) for pattern in released) for name in needed)
    assert not any(fnmatch("pytorch_model-00001-of-00003.bin", pattern) for pattern in released)
    assert policy.lora and policy.scale_multiplier == 5
    assert checkpoints.fetch(cfg.scale_head) == GOLDEN / "tiny_oft" / header
    assert asked[1] == ("tanshh97/RIPT_VLA", [header, f"{header}/*"])
