"""The claims of policies/quest.py, each a test that fails when the claim does.

Run: python -m pytest -q tests/quest_test.py
"""
import json
from pathlib import Path

import ript  # before torch is: it says how OpenMP's threads wait

import numpy as np
import pytest
import torch

from policies import quest
from policies.quest import QueST
from tests.conftest import GOLDEN, assert_close, golden, libero_or_skip

SFT_FILE = GOLDEN / "tiny_quest.pth"  # of the original code, narrower than the released

def assert_near(a, b, tolerance=1e-4):
    assert_close(a, b, tolerance)

def tiny_quest():
    return QueST.from_pretrained(SFT_FILE)

def inputs_of(g):
    """context's arguments, from the original's."""
    names = dict(agentview="agentview_rgb", eye_in_hand="eye_in_hand_rgb", joint_states="joint_states",
                 ee_pos="ee_pos", gripper_states="gripper_states", task_embedding="task_emb")
    return {name: g[f"in.{key}"] for name, key in names.items()}

def random_raw(seed=0):
    """What the simulator hands over, random."""
    rng = np.random.default_rng(seed)
    shapes = dict(robot0_joint_pos=7, robot0_eef_pos=3, robot0_eef_quat=4, robot0_gripper_qpos=2)
    raw = {name: rng.standard_normal(size) for name, size in shapes.items()}
    for camera in ("agentview", "robot0_eye_in_hand"):
        raw[f"{camera}_image"] = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
    return raw

@pytest.fixture
def features(tmp_path, monkeypatch):
    """A file of CLIP features of some instructions, random."""
    rng = np.random.default_rng(0)
    texts = "open the drawer", "close it", *ript.load_suite("libero_10").INSTRUCTIONS
    path = tmp_path / "clip.npz"
    np.savez(path, **{text: rng.standard_normal(512).astype(np.float32) for text in texts})
    monkeypatch.setattr(QueST, "CLIP", str(path))
    return path

# ------------------------------------------------------------------------- the model agrees with the original
def test_quest_encoders_agree_with_the_original():
    g, policy = golden("golden_quest"), tiny_quest()
    seen = {}
    for camera in ("agentview_rgb", "eye_in_hand_rgb"):
        encoder = policy.image_encoders[camera]
        encoder.block_4.register_forward_hook(lambda _, __, out: seen.update(trunk=out))
        projection = encoder.projection_layer.projection
        projection.register_forward_hook(lambda _, given, out: seen.update(kp=given[0]))
        encoder.register_forward_hook(lambda _, given, out: seen.update(img=given[0], enc=out))
        with torch.no_grad():
            encoder(g[f"in.{camera}"].permute(0, 3, 1, 2) / 255)
        # Every fifth column, as tests/golden has no others.
        assert_near(seen["img"][..., ::5], g[f"img.{camera}"][..., ::5], 1e-6)
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
        more = policy.token_log_prob(context[[0, 1, 2, 0]], indices[[0, 1, 2, 0]])
        assert_near(policy.token_log_prob(context, indices), more[:3], 1e-5)
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
    project_out = policy.autoencoder.vq.project_out
    project_out.register_forward_hook(lambda _, given, out: seen.update(codes=given[0], out=out))
    policy.decode_actions(torch.arange(1000).view(125, 8))
    assert torch.equal(seen["codes"].flatten(0, 1), g["fsq.codes"])
    assert_near(seen["out"].flatten(0, 1)[::3], g["fsq.codes_out"][::3])  # tests/golden has no others
    policy.decode_actions(g["fsq.z_indices"].long().view(50, 8))
    assert torch.equal(seen["codes"].flatten(0, 1), g["fsq.z_codes"])
    actions = policy.decode_actions(g["in.action_indices"])
    assert_near(actions, g["ae.actions"])
    assert_near(actions[:, :8].transpose(0, 1), g["ae.actions_horizon"])
    permuted = g["in.action_indices"][:, [3, 0, 7, 1, 6, 2, 5, 4]]
    assert_near(policy.decode_actions(permuted), g["ae.actions_perm"])
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
    reached = [name for name, p in policy.named_parameters() if p.grad is not None]
    assert all(name.startswith("policy_prior.") for name in reached)

def test_quest_ript_update_agrees_with_the_original():
    """The original's two passes of three minibatches of 4; the last is padding, which counts for nothing."""
    g, policy = golden("golden_quest"), tiny_quest()
    before = {name: p.detach().clone() for name, p in policy.policy_prior.named_parameters()}
    optimizer = torch.optim.AdamW(policy.parameter_groups(), lr=2e-4)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rows, steps = g["upd.rows"], g["upd.steps"]
    tokens = (rows + torch.arange(8)[:, None]) % 3
    mask = (torch.arange(3) < steps[:, None])[..., None].expand(-1, -1, 8)  # E Q T
    advantage = ript.leave_one_out_advantage(g["upd.success"].float().view(2, 4)).flatten()
    assert_near(advantage, g["upd.advantage"][:8], 1e-6)

    def log_prob(chosen):
        context = g["context"][rows[chosen].flatten()]
        indices = g["in.action_indices"][tokens[chosen].flatten()]
        return policy.token_log_prob(context, indices).view(len(chosen), 24)

    everything = torch.arange(8)
    old = log_prob(everything).detach()
    assert_near(torch.where(mask.flatten(1), old, 1.0), g["upd.old_logprob"][:8])
    step = 0
    for _ in range(2):
        for chosen in (everything[:4], everything[4:], everything[:0]):
            m = mask[chosen].flatten(1)
            optimizer.zero_grad()
            if len(chosen):
                weight = ript.loss_weight(m, "token")
                new = log_prob(chosen)
                loss, stats = ript.ppo_clip_loss(new, old[chosen], advantage[chosen], weight, 0.2)
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
    after = dict(policy.policy_prior.named_parameters())
    names = json.loads((GOLDEN / "golden_quest.json").read_text())["gpt_param_names"]
    for name, norm, probe in zip(names, g["upd.delta_norm"], g["upd.delta_probe"]):
        if "in_proj_bias" in name:
            continue  # the gradient of its keys' part is zero, which AdamW makes steps of noise of
        change = (after[name] - before[name]).detach().double().flatten()
        assert change.norm().item() == pytest.approx(norm.item(), rel=2e-3)
        direction = torch.cos(0.7 * torch.arange(len(change), dtype=torch.float64))
        assert (change * direction).sum().item() == pytest.approx(probe.item(), abs=1e-3)
    new = torch.where(mask.flatten(1), log_prob(everything), 1.0)
    assert_near(new, g["upd.new_logprob"], 2e-3)

@pytest.mark.parametrize("case", ["plain", "ragged", "padded", "asym", "seqavg", "minibatch", "accum",
                                  "all_invalid"])
def test_token_level_loss_and_gradients_agree_with_the_original(case):
    g = golden("golden_quest_loss")
    cfg = json.loads((GOLDEN / "golden_quest_loss.json").read_text())["cases"][case]["config"]
    field = {key.split(".")[1]: value for key, value in g.items() if key.split(".")[0] == case}
    valid, mask = field["valid"].bool(), field["mask"].flatten(1).bool()
    advantage, size = field["advantage"].float(), cfg["mb"]
    per, clip = "token" if cfg["token_avg"] else "episode", (cfg["low"], cfg["high"])
    gradients = torch.zeros_like(field["new"])
    losses, steps = [], []
    for number, start in enumerate(range(0, len(mask), size)):
        part = slice(start, start + size)
        new = field["new"].clone().requires_grad_()
        m = mask[part] & valid[part][:, None]  # padding is no episode here
        weight = ript.loss_weight(m, per)
        loss, stats = ript.ppo_clip_loss(new[part], field["old"][part], advantage[part], weight, clip)
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

# -------------------------------------------------------------------------------------------------- its files
def test_quest_has_every_key_and_shape_of_the_released_files():
    real = json.loads((GOLDEN / "quest_state_dict_real.json").read_text())
    with torch.device("meta"):
        policy = QueST()
    shapes = {name: [list(x.shape), str(x.dtype).split(".")[1]] for name, x in policy.state_dict().items()}
    assert shapes == real["state_dict"] and list(shapes) == list(real["state_dict"])
    assert sum(p.numel() for p in policy.parameters()) == real["num_parameters"]

def test_quest_reads_sft_and_ript_files_and_its_own_strictly(tmp_path):
    policy = tiny_quest()
    weights = torch.load(SFT_FILE, weights_only=True)["model"]
    assert all(torch.equal(weights[name], value) for name, value in policy.state_dict().items())
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    torch.save(dict(model=wrapped), tmp_path / "ript.pth")
    torch.save(wrapped, tmp_path / "bare.pth")
    policy.save(tmp_path / "best")
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["quest.pth"]
    for name in ("ript.pth", "bare.pth", "best"):
        cfg = ript.Config(device="cpu", suite="libero_10", checkpoint=str(tmp_path / name))
        other = QueST.load(cfg).state_dict()
        assert all(torch.equal(weights[key], value) for key, value in other.items())
    with torch.no_grad():
        policy.policy_prior.head.bias += 1
    policy.save(tmp_path / "best")
    again = QueST.from_pretrained(tmp_path / "best")
    assert_near(again.policy_prior.head.bias, weights["policy_prior.head.bias"] + 1)

class Intruder:
    """Unpickling it writes a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)

def damaged(kind, path):
    """Write a file that is no QueST, in one of the ways there are."""
    weights = torch.load(SFT_FILE, weights_only=True)["model"]
    if kind == "truncated":
        path.write_bytes(SFT_FILE.read_bytes()[:200_000])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "code":
        torch.save(dict(model=weights, more=Intruder(path.parent / "intruder")), path)
    elif kind == "foreign":
        torch.save(dict(model=dict(weight=torch.zeros(3))), path)
    elif kind == "bare tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "a key less":
        weights.pop("autoencoder.action_proj.weight")
        torch.save(dict(model=weights), path)
    elif kind == "a key more":
        torch.save(dict(model=weights | dict(more=torch.zeros(1))), path)
    elif kind == "a shape":
        torch.save(dict(model=weights | {"obs_proj.bias": torch.zeros(7)}), path)

@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "code", "foreign", "bare tensor",
                                  "a key less", "a key more", "a shape"])
def test_quest_says_in_a_sentence_that_a_file_is_no_checkpoint(kind, tmp_path):
    damaged(kind, tmp_path / "some.pth")
    with pytest.raises(ript.UserError, match="some.pth"):
        QueST.from_pretrained(tmp_path / "some.pth")
    assert not (tmp_path / "intruder").exists()  # what is downloaded is not executed

def test_quest_names_the_released_file_of_a_suite_and_says_when_it_cannot_be_fetched(monkeypatch, tmp_path):
    asked = []

    def cached_file(hub, name):
        asked.append((hub, name))
        return SFT_FILE

    with monkeypatch.context() as patch:
        patch.setattr("transformers.utils.cached_file", cached_file)
        for suite in ript.LIBERO:
            QueST.load(ript.Config(device="cpu", suite=suite))
        QueST.load(ript.Config(device="cpu", checkpoint="quest/LIBERO_90_ript.pth"))
    names = ("SPATIAL_sft", "OBJECT_sft", "GOAL_sft", "LONG_sft", "90_sft", "90_ript")
    assert asked == [("tanshh97/RIPT_VLA", f"quest/LIBERO_{name}.pth") for name in names]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ript.UserError, match="quest/LIBERO_90_sft.pth"):
        QueST.load(ript.Config(device="cpu", suite="libero_90"))

def test_quest_refuses_settings_that_it_would_ignore_and_a_resume_with_another_density(monkeypatch):
    for name, value in dict(adapter="runs/quest/last", scale_head="head.pth", scale_multiplier=5.0,
                            attention_mode="prompt").items():
        with pytest.raises(ript.UserError, match=f"--{name} is not for --model quest"):
            QueST.load(ript.Config(model="quest", device="cpu", checkpoint=str(SFT_FILE), **{name: value}))
    policy = tiny_quest()
    released = ript.fingerprint(policy, False)
    monkeypatch.setattr(policy, "top_k", 0)
    assert ript.fingerprint(policy, False) != released

# ----------------------------------------------------------------------------------------------- the protocol
def test_quest_acts_in_the_environments_units_and_scores_what_it_drew(features):
    policy, raw = tiny_quest(), [random_raw(seed) for seed in range(3)]
    seen = [QueST.preprocess(r) for r in raw]
    # Upside down, as QueST was trained.
    assert np.array_equal(seen[0]["agentview"], raw[0]["agentview_image"])
    texts = ["open the drawer", "close it", "open the drawer"]
    chunks = policy.act(seen, texts, [np.random.default_rng(seed) for seed in range(3)])
    for chunk in chunks:
        assert chunk["actions"].shape == (policy.chunk, 7) and np.abs(chunk["actions"]).max() <= 1
        assert chunk["indices"].shape == chunk["log_prob"].shape == (8,) and 1 <= chunk["scale"] < 1000
        assert not any(array.nbytes > 10_000 for array in chunk.values())  # no pictures
    before = [chunk["log_prob"] for chunk in chunks]
    calls = []
    for encoder in policy.image_encoders.values():
        encoder.register_forward_hook(lambda *_: calls.append(1))
    log_prob = policy.log_prob(chunks)
    assert log_prob.requires_grad and not calls
    assert np.array_equal(log_prob.detach().numpy(), np.stack(before))  # the very function that scored them
    decoded = policy.decode_actions(torch.tensor(np.stack([chunk["indices"] for chunk in chunks])))
    assert_near(decoded[:, :8].clamp(-1, 1), np.stack([chunk["actions"] for chunk in chunks]), 1e-5)

def test_quest_draws_from_each_rows_generator_whatever_the_batch(features):
    policy, seen = tiny_quest(), [QueST.preprocess(random_raw(seed)) for seed in range(3)]

    def draw(rows, explore):
        generators = [np.random.default_rng(i) if explore else None for i in rows]
        chunks = policy.act([seen[i] for i in rows], ["close it"] * len(rows), generators)
        return [chunk["indices"].tolist() for chunk in chunks]

    together = draw([0, 1, 2], True)
    assert together == [draw([i], True)[0] for i in range(3)]
    assert together == [draw([2, 0, 1], True)[place] for place in (1, 2, 0)]
    # Evaluation draws too, of each picture's own noise.
    evaluated = draw([0, 1, 2], False)
    assert evaluated != together
    assert evaluated == [draw([i], False)[0] for i in range(3)]
    noise = []

    def sample(context, generators):
        noise.extend(generator.random() for generator in generators)
        return torch.zeros(3, 8).long()

    policy.sample = sample
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
    # Scored as it is drawn.
    assert_near((shares * density.log()).sum(), (density * density.log()).sum(), 0.05)

def test_quest_trains_skillgpt_alone_with_the_released_weight_decay():
    policy = tiny_quest()
    decay, rest = policy.parameter_groups()
    assert (decay["weight_decay"], rest["weight_decay"]) == (1e-4, 0)
    names = {id(p): name for name, p in policy.named_parameters()}
    assert len(decay["params"]) == 25 and len(rest["params"]) == 52
    endings = ("in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight", "head.weight")
    assert all(names[id(p)].endswith(endings) for p in decay["params"])
    optimised = {names[id(p)] for p in decay["params"] + rest["params"]}
    assert optimised == {name for name, p in policy.named_parameters() if p.requires_grad}
    assert optimised == {name for name in names.values() if name.startswith("policy_prior.")}

def test_the_presets_are_settings():
    for preset in QueST.PRESET.values():
        ript.Config(**preset)

# -------------------------------------------------------------------------------------------- the instruction
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
    vision = dict(tower, image_size=32, patch_size=16)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=512)).eval()
    clip.save_pretrained(directory)
    CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt")).save_pretrained(directory)
    return clip

def test_quest_takes_clips_feature_of_an_instruction_once(tmp_path, monkeypatch):
    clip = small_clip(tmp_path / "clip")
    monkeypatch.setattr(QueST, "CLIP", str(tmp_path / "clip"))
    feature = quest.text_feature("open it", QueST.CLIP)
    assert feature.shape == (512,) and feature.dtype == np.float32
    letters = [ord(c) - ord("a") for c in "ope"]
    letters += [26 + ord("n") - ord("a"), ord("i") - ord("a"), 26 + ord("t") - ord("a")]
    ids = torch.tensor([[52, *letters, 53]])
    hidden = clip.text_model(ids).last_hidden_state[0, -1]  # at the end of text
    assert_near(feature, clip.text_projection(hidden).detach(), 1e-5)
    padded = torch.cat([ids, torch.full((1, 5), 53)], 1)  # the released code pads; it makes no difference
    output = clip.get_text_features(padded, attention_mask=(torch.arange(13) < 8).long()[None])
    assert_near(feature, output.pooler_output[0].detach(), 1e-5)
    monkeypatch.setattr("transformers.CLIPModel.from_pretrained", None)
    assert quest.text_feature("open it", QueST.CLIP) is feature

def test_quest_says_in_a_sentence_what_feature_is_missing(features, tmp_path):
    (tmp_path / "bad.npz").write_text("no array")
    for source in (features, tmp_path / "bad.npz", tmp_path / "none.npz", tmp_path):
        with pytest.raises(ript.UserError, match="stand on your head.*QUEST_CLIP"):
            quest.text_feature("stand on your head", str(source))

def test_an_iteration_of_quest_in_libero(features, tmp_path, monkeypatch):
    """Through the protocol alone: 20 passes over tokens, pretended rewards, 16 steps an episode."""
    libero_or_skip()
    monkeypatch.setattr(ript.load_suite("libero_10"), "HORIZON", 16)
    monkeypatch.setattr(ript, "has_signal", lambda rewards: torch.ones(len(rewards), dtype=torch.bool))
    monkeypatch.setattr(ript, "leave_one_out_advantage", lambda rewards: rewards + torch.tensor([1.0, -1.0]))
    always = ("--model quest --suite libero_long --task 2 --eval_contexts 1 --workers 2 --collision true "
              "--checkpoint").split()
    last = tmp_path / "run/last"
    ript.main([*always, str(SFT_FILE), *"--rollouts 2 --groups 2 --lr 1e-4 --iterations 1 --out".split(),
               str(tmp_path / "run")])
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[1])
    assert (row["kept"], row["env_steps"], row["updates"]) == (2, 64, 20) and row["ratio_error"] < 1e-4
    start, end = tiny_quest().state_dict(), QueST.from_pretrained(last).state_dict()
    moved = {name for name in start if (start[name] != end[name]).any()}
    assert moved and all(name.startswith("policy_prior") for name in moved)
    ript.main([*always, str(last), "--eval", "--out", str(tmp_path / "eval")])
    assert len(json.loads((tmp_path / "eval/evaluation_success.json").read_text())["outcomes"]) == 1
