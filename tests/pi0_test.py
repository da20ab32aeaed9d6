"""The claims of policies/pi0.py, each a test that fails when the claim does, with a small, random pi0.

Run: python -m pytest -q tests/pi0_test.py
"""
import json
import re
from pathlib import Path

import ript  # before torch is: it says how OpenMP's threads wait

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributions import Normal
from transformers import PI0Config, PI0ForConditionalGeneration

from policies.pi0 import Pi0, gaussian_log_prob
from tests.conftest import libero_or_skip

FILE = Path(__file__).resolve().parents[1] / "policies/pi0.py"
TEXTS = ript.load_suite("libero_object").INSTRUCTIONS
MAPPING = dict(VISUAL="IDENTITY", STATE="MEAN_STD", ACTION="MEAN_STD")
LEROBOT = dict(type="pi0", paligemma_variant="gemma_2b", action_expert_variant="gemma_300m", chunk_size=10,
               max_state_dim=32, max_action_dim=32, normalization_mapping=MAPPING)
STATE = dict(mean=[-0.05, 0.03, 0.76, 2.97, -0.2, -0.1, 0.03, -0.03],
             std=[0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.01, 0.02])
ACTION = dict(mean=[0.06, 0.09, -0.1, 0.0, 0.01, 0.0, -0.05], std=[0.3, 0.4, 0.5, 0.04, 0.06, 0.08, 0.99])

def parts():
    """The sizes of a small VLM and its expert, as in a config.json."""
    sizes = dict(num_hidden_layers=2, num_attention_heads=2)
    gemma = dict(model_type="gemma", num_key_value_heads=1, head_dim=16, vocab_size=300, **sizes)
    vision = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, patch_size=14,
                  image_size=28, vision_use_head=False, **sizes)
    text = dict(gemma, hidden_size=32, intermediate_size=64)
    return dict(vlm_config=dict(model_type="paligemma", text_config=text, vision_config=vision,
                                projection_dim=32, image_token_id=299),
                dit_config=dict(gemma, hidden_size=24, intermediate_size=48))

def small_pi0():
    torch.manual_seed(0)
    pi0 = PI0ForConditionalGeneration(PI0Config(**parts(), chunk_size=10))
    with torch.no_grad():
        for p in pi0.parameters():  # so large that each input makes a difference
            p.add_(0.1 * torch.randn_like(p))
    return pi0

def foreign(name, prefix):
    """transformers' name of a weight -> openpi's, and with the prefix "model." LeRobot's."""
    name = re.sub("^embed_action_time.", "", name)
    name = name.replace("model.vlm.language_model.embed_tokens", "paligemma_with_expert.paligemma.lm_head")
    name = name.replace("model.dit.embed_tokens", "paligemma_with_expert.gemma_expert.lm_head")
    name = name.replace("model.vlm.vision_tower", "model.vlm.vision_tower.vision_model")
    name = re.sub("^model.vlm", "paligemma_with_expert.paligemma.model", name)
    return prefix + re.sub("^model.dit", "paligemma_with_expert.gemma_expert.model", name)

def prompts():
    return {text: [2, *(110 + ord(c) % 180 for c in text[:i + 20]), 108] for i, text in enumerate(TEXTS)}

def lerobot_statistics(folder, **changes):
    found = {f"observation.state.{field}": torch.tensor(values) for field, values in STATE.items()}
    found |= {f"action.{field}": torch.tensor(values) for field, values in ACTION.items()}
    found |= {name.replace("__", "."): value for name, value in changes.items()}
    save_file(found, folder / "policy_preprocessor_step_5_normalizer_processor.safetensors")

def checkpoint(folder, kind="lerobot"):
    """A folder as LeRobot, openpi or transformers writes one."""
    folder.mkdir()
    pi0 = small_pi0()
    (folder / "prompts.json").write_text(json.dumps(prompts()))
    if kind == "transformers":
        pi0.save_pretrained(folder)
        lerobot_statistics(folder)
        return folder
    prefix = "model." if kind == "lerobot" else ""
    weights = {foreign(name, prefix): value for name, value in pi0.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    if kind == "lerobot":
        (folder / "config.json").write_text(json.dumps(LEROBOT | parts()))
        lerobot_statistics(folder)
    else:
        (folder / "config.json").write_text(json.dumps(dict(action_dim=32, action_horizon=10, **parts())))
        file = folder / "assets/physical-intelligence/libero/norm_stats.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(dict(norm_stats=dict(state=STATE, actions=ACTION))))
    return folder

@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("pi0") / "released")

@pytest.fixture(autouse=True)
def no_setting_of_the_users(monkeypatch):
    monkeypatch.delenv("PI0_TOKENS", raising=False)

@pytest.fixture
def policy(released):
    return Pi0.from_pretrained(released)

def raw_observation(seed=0, size=32):
    """What the simulator hands over, random."""
    rng = np.random.default_rng(seed)
    quaternion = rng.standard_normal(4)
    raw = dict(robot0_eef_pos=rng.standard_normal(3), robot0_gripper_qpos=rng.standard_normal(2),
               robot0_eef_quat=quaternion / np.linalg.norm(quaternion))
    for camera in ("agentview", "robot0_eye_in_hand"):
        raw[f"{camera}_image"] = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return raw

def observations(policy, n=3):
    return [policy.preprocess(raw_observation(seed)) for seed in range(n)]

def act(policy, n=3, explore=True):
    generators = [np.random.default_rng(seed) if explore else None for seed in range(n)]
    return policy.act(observations(policy, n), TEXTS[:n], generators)

def near(a, b, tolerance=1e-5):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0, check_dtype=False)

def inputs_of(policy, n):
    """sample_actions' arguments for the first n observations, put together without the policy's prefix."""
    pixels, ids, states = [], [], []
    for seed, text in zip(range(n), TEXTS):
        raw = raw_observation(seed)
        views = []
        for camera in ("agentview", "robot0_eye_in_hand"):
            upright = torch.tensor(raw[f"{camera}_image"][::-1, ::-1].copy()).permute(2, 0, 1)[None] / 255
            views.append(2 * torch.nn.functional.interpolate(upright, (28, 28), mode="bilinear")[0] - 1)
        pixels.append(torch.stack(views))
        words = prompts()[text]
        ids.append(torch.tensor([299] * 8 + words + [0] * (48 - len(words))))
        state = (policy.preprocess(raw)["proprio"] - np.array(STATE["mean"])) / np.array(STATE["std"])
        states.append(torch.tensor([*state, *[0.0] * 24]).float())
    ids = torch.stack(ids)
    return dict(state=torch.stack(states), input_ids=ids, pixel_values=torch.stack(pixels),
                attention_mask=(ids != 0).long(), pixel_attention_mask=torch.ones(n, 2, dtype=torch.bool))

# ------------------------------------------------------------------------------ the function is transformers'
def test_without_noise_the_actions_are_those_of_transformers_sample_actions(policy):
    chunks = act(policy, explore=False)
    noise = []
    for seen in observations(policy):
        noise.append(np.random.default_rng(int(seen["pictures"].sum())).standard_normal((15, 32))[:10])
    expected = policy.pi0.sample_actions(**inputs_of(policy, 3), noise=torch.tensor(np.stack(noise)).float(),
                                         num_steps=policy.STEPS)[:, :5, :7]
    assert expected.abs().max() > 0.5
    near(np.stack([r["sample"] for r in chunks]), expected)
    near(np.stack([r["actions"] for r in chunks]), expected * torch.tensor(ACTION["std"])
         + torch.tensor(ACTION["mean"]))
    again = act(policy, explore=False)
    assert all((a["actions"] == b["actions"]).all() for a, b in zip(chunks, again))
    # Each input counts.
    for name in ("pictures", "proprio"):
        seen = observations(policy)
        seen[0][name] = seen[1][name]
        other = policy.act(seen[:1], TEXTS[:1], [np.random.default_rng(0)])
        assert np.abs(other[0]["actions"] - act(policy)[0]["actions"]).max() > 1e-4

def test_noise_in_the_last_step_alone_has_the_published_mean_and_std_and_is_scored_with_its_density(policy):
    policy.scale_multiplier = 1.2
    chunks = act(policy)
    noise = [np.random.default_rng(seed).standard_normal((15, 32)) for seed in range(3)]
    noise = torch.tensor(np.stack(noise)).float()
    inputs = inputs_of(policy, 3)
    chunk = noise[:, :10]
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            velocity = policy.pi0(noise=chunk, timestep=torch.full((3,), t), **inputs).logits
            if t > 0.25:
                chunk = chunk - velocity / 4
    near(np.stack([r["x"] for r in chunks]), chunk)
    x, v, t = chunk[:, :5, :7], velocity[:, :5, :7], 0.25
    s = 1.2 * 0.5 * np.sqrt(t / (1 - t))
    # The form of Flow-GRPO, equation 9: the Euler step, and a correction by the score.
    mean = x - t * (v + s ** 2 / (2 * t) * (x + (1 - t) * v))
    std = torch.tensor(s * np.sqrt(t)).float()
    sample = torch.tensor(np.stack([r["sample"] for r in chunks]))
    near(sample, mean + std * noise[:, 10:, :7])
    expected = Normal(mean, std).log_prob(sample).sum(-1)
    near(np.stack([r["log_prob"] for r in chunks]), expected, 1e-4)
    assert chunks[0]["scale"] == pytest.approx(std.item())

@pytest.mark.parametrize("which", range(3))
def test_a_step_that_is_not_finite_has_no_density_and_no_gradient(which):
    numbers = [torch.rand(2, 3, 7) + 0.5 for _ in range(3)]
    numbers[which][0, 1, 2] = np.nan
    numbers = [number.requires_grad_() for number in numbers]
    log_prob = gaussian_log_prob(*numbers)
    assert log_prob.isnan().tolist() == [[False, True, False], [False] * 3]
    log_prob.nan_to_num().sum().backward()
    for number in numbers:
        assert number.grad.isfinite().all() and (number.grad[0, 1] == 0).all() and (number.grad[1] != 0).all()


def test_log_prob_is_what_act_recorded_whatever_the_batch(policy):
    chunks = act(policy)
    recorded = np.stack([r["log_prob"] for r in chunks])
    assert recorded.shape == (3, policy.chunk) and chunks[0]["actions"].shape == (5, 7)
    near(policy.log_prob(chunks).detach(), recorded, 1e-4)
    near(policy.log_prob(chunks[1:2]).detach(), recorded[1:2], 1e-4)
    # Given x, a column is of its own action step alone: those after success can be masked.
    chunks[0]["sample"] = chunks[0]["sample"].copy()
    chunks[0]["sample"][3] += 0.1
    moved = (policy.log_prob(chunks).detach() - torch.tensor(recorded)).abs() > 1e-3
    assert moved.nonzero().tolist() == [[0, 3]]

def test_a_chunk_depends_on_its_own_generator_and_instruction_and_not_on_the_batch(policy):
    alone = policy.act(observations(policy)[1:2], TEXTS[1:2], [np.random.default_rng(1)])[0]
    near(alone["actions"], act(policy)[1]["actions"])
    other = policy.act(observations(policy)[1:2], TEXTS[2:3], [np.random.default_rng(1)])[0]
    assert np.abs(other["actions"] - alone["actions"]).max() > 1e-4

def test_gradients_reach_the_expert_and_its_projections_and_nothing_else(policy):
    policy.log_prob(act(policy)).sum().backward()
    named = dict(policy.pi0.named_parameters())
    reached = {name for name, p in named.items() if p.grad is not None and p.grad.abs().sum() > 0}
    expert = ("model.dit.layers.", "model.dit.norm.", "embed_action_time.", "action_out_proj.")
    assert reached == {name for name in named if name.startswith(expert)}
    assert len(reached) == 2 * 9 + 1 + 8 + 2
    (group,) = policy.parameter_groups()
    assert {id(p) for p in group["params"]} == {id(p) for p in policy.parameters() if p.grad is not None}

def test_with_the_vlm_in_bfloat16_the_expert_stays_in_float32(released, policy):
    half = Pi0.from_pretrained(released, dtype=torch.bfloat16)
    assert {p.dtype for p in half.pi0.model.vlm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.parameter_groups()[0]["params"]} == {torch.float32}
    chunks = act(half)
    near(half.log_prob(chunks).detach(), np.stack([r["log_prob"] for r in chunks]), 1e-3)
    near(act(half)[0]["sample"], act(policy)[0]["sample"], 0.1)

# --------------------------------------------------------------------------------- what goes in and comes out
def test_pictures_are_turned_resized_and_padded_with_black(policy):
    raw = raw_observation(size=56)
    seen = policy.preprocess(raw)
    assert (seen["pictures"][1] == raw["robot0_eye_in_hand_image"][::-1, ::-1]).all()
    # Halving an even size, bilinear takes the mean of 2 x 2.
    mean = seen["pictures"].reshape(2, 28, 2, 28, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    near(policy.pixels(seen["pictures"][None])[0], mean / 127.5 - 1)
    wide = policy.pixels(seen["pictures"][None, :, :28])
    near(wide[..., 7:21, :][0], mean[:, :, :14] / 127.5 - 1)
    assert (wide[..., :7, :] == -1).all() and (wide[..., 21:, :] == -1).all()

def test_actions_get_the_state_back_where_the_statistics_say_that_it_was_taken_off(policy):
    assert not policy.minus_state
    relative = [*(np.array(ACTION["mean"])[:6] - np.array(STATE["mean"])[:6]), -0.05]
    statistics = (STATE["mean"], STATE["std"]), (relative, ACTION["std"])
    openpi = Pi0(small_pi0(), [np.array(pair) for pair in statistics], prompts().get)
    assert openpi.minus_state
    sample, proprio = np.ones((5, 7)), np.arange(8.0)
    actions = openpi.to_env_actions(sample, proprio)
    near(actions, np.tile(np.array(relative) + ACTION["std"] + [0, 1, 2, 3, 4, 5, 0], (5, 1)))

def test_statistics_are_read_from_lerobot_and_openpi_and_mean_and_std_go_before_quantiles(tmp_path, policy):
    file = checkpoint(tmp_path / "openpi", "openpi") / "assets/physical-intelligence/libero/norm_stats.json"
    low, high = [0.0] * 32, [2.0] * 8 + [0.0] * 24
    for state, offset, factor in ((STATE | dict(q01=low, q99=high), STATE["mean"], STATE["std"]),
                                  (dict(q01=low, q99=high), [1.0] * 8, [1.0] * 8)):
        file.write_text(json.dumps(dict(norm_stats=dict(state=state, actions=ACTION))))
        other = Pi0.from_pretrained(tmp_path / "openpi")
        near(other.state[0], offset)
        near(other.state[1], factor)
        near(other.action[1], ACTION["std"])
    near(policy.action[0], ACTION["mean"])

def test_a_tokenizer_gives_the_ids_and_its_environment_variable_goes_first(released, tmp_path, monkeypatch):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {"<pad>": 0, "<bos>": 2, "\n": 108, **{word: 120 + i for i, word in enumerate(words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"),
                                                       pre_tokenizers.Split(Regex(" +"), "removed")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setenv("PI0_TOKENS", str(tmp_path / "tokenizer.json"))
    policy = Pi0.from_pretrained(released)
    expected = [2, *(vocabulary[word] for word in TEXTS[0].split()), 108]
    assert policy.tokens(TEXTS[0]) == expected + [0] * (48 - len(expected))
    with pytest.raises(ript.UserError, match="dance.*must be 2, its ids and 108"):
        policy.tokens("dance")

# ------------------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize("kind", ["openpi", "transformers"])
def test_weights_load_under_the_names_of_lerobot_openpi_and_transformers(kind, tmp_path, policy):
    other = Pi0.from_pretrained(checkpoint(tmp_path / kind, kind))
    expected = small_pi0().state_dict()
    del expected["model.dit.embed_tokens.weight"]
    for pi0 in (policy.pi0, other.pi0):
        weights = pi0.state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert (act(other)[0]["sample"] == act(policy)[0]["sample"]).all()

def test_what_is_saved_loads_to_the_same_actions_and_is_the_expert_alone(released, tmp_path, monkeypatch):
    monkeypatch.chdir(released.parent)
    policy = Pi0.from_pretrained(released.name)
    start = act(policy)
    with torch.no_grad():
        for p in policy.parameter_groups()[0]["params"]:
            p.add_(0.01 * torch.randn_like(p))
    policy.save(tmp_path / "run/last")
    # Relative paths are of the directory that they were given in.
    monkeypatch.chdir(tmp_path)
    again = Pi0.from_pretrained("run/last")
    assert all((a["actions"] == b["actions"]).all() for a, b in zip(act(policy), act(again)))
    assert np.abs(act(again)[0]["sample"] - start[0]["sample"]).max() > 1e-4
    names = load_file("run/last/pi0_expert.safetensors")
    assert not any("vlm" in name for name in names) and len(names) == 29
    again.save(tmp_path / "second")
    settings = json.loads((tmp_path / "second/ript.json").read_text())
    assert settings["base"] == str(released) and list(settings["files"]) == ["pi0_expert.safetensors"]

def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")

def damage(kind, folder):
    """Do one of the kinds of harm to a checkpoint."""
    config, prompt_file = folder / "config.json", folder / "prompts.json"
    if kind.startswith("no file "):
        next(folder.glob(kind.removeprefix("no file "))).unlink()
    elif kind == "pi05":
        change_json(config, type="pi05")
    elif kind == "quantiles":
        change_json(config, normalization_mapping=dict(STATE="QUANTILES"))
    elif kind == "no chunk":
        config.write_text(json.dumps(dict(type="pi0")))
    elif kind == "chunk in words":
        change_json(config, chunk_size="ten")
    elif kind == "short chunk":
        change_json(config, chunk_size=4)
    elif kind == "no weights":
        (folder / "model.safetensors").write_text("no weights")
    elif kind == "a weight less":
        change_weights(folder, lambda weights: weights.pop("model.action_out_proj.bias"))
    elif kind == "a weight more":
        change_weights(folder, lambda weights: weights.update(more=torch.zeros(1)))
    elif kind == "a shape":
        change_weights(folder, lambda weights: weights.update({"model.state_proj.bias": torch.zeros(3)}))
    elif kind == "two statistics":
        (folder / "norm_stats.json").write_text("{}")
    elif kind == "no std":
        lerobot_statistics(folder, action__std=torch.zeros(0))
    elif kind == "nan":
        lerobot_statistics(folder, action__std=torch.full((7,), torch.nan))
    elif kind == "negative std":
        lerobot_statistics(folder, action__std=-torch.ones(7))
    elif kind == "six of eight":
        lerobot_statistics(folder, observation__state__mean=torch.zeros(6))
    elif kind == "no json":
        prompt_file.write_text("pick")
    elif kind == "a list":
        prompt_file.write_text("[]")
    elif kind == "no such prompt":
        prompt_file.write_text("{}")
    elif kind == "no newline":
        change_json(prompt_file, **{TEXTS[0]: [2, 120, 121]})
    elif kind == "too long":
        change_json(prompt_file, **{TEXTS[0]: [2, *[120] * 50, 108]})
    elif kind == "no base":
        (folder / "ript.json").write_text("{}")
    elif kind == "base gone":
        (folder / "ript.json").write_text('{"base": "/nowhere"}')

@pytest.mark.parametrize("kind,words", [
    ("no file config.json", "config.json"),
    ("pi05", "it must be a pi0's"),
    ("quantiles", "MEAN_STD"),
    ("no chunk", "chunk_size must be 5 at least, it is None"),
    ("chunk in words", "chunk_size must be 5 at least, it is ten"),
    ("short chunk", "chunk_size must be 5 at least, it is 4"),
    ("no file model.safetensors", "cannot read"),
    ("no weights", "cannot read"),
    ("a weight less", "action_out_proj.bias"),
    ("a weight more", "more"),
    ("a shape", "state_proj.bias"),
    ("no file policy*", "one norm_stats.json or one policy_preprocessor.*it has 0"),
    ("two statistics", "it has 2"),
    ("no std", "mean and std of action must be 7 numbers"),
    ("nan", "mean and std of action must be 7 numbers"),
    ("negative std", "mean and std of action must be 7 numbers each, and in order"),
    ("six of eight", "mean and std of observation.state must be 8 numbers"),
    ("no file prompts.json", "no tokenizer.json and no prompts.json: set PI0_TOKENS"),
    ("no json", "prompts.json"),
    ("a list", "prompts.json"),
    ("no such prompt", "pick up the alphabet soup.*it is None"),
    ("no newline", "its ids and 108"),
    ("too long", "48 at most"),
    ("no base", "ript.json.*base"),
    ("base gone", "/nowhere")])
def test_a_wrong_checkpoint_is_told_in_a_sentence(kind, words, tmp_path):
    damage(kind, checkpoint(tmp_path / "pi0"))
    with pytest.raises(ript.UserError, match=f"(?s){words}") as error:
        Pi0.load(ript.Config(suite="libero_object", task=0, device="cpu", checkpoint=str(tmp_path / "pi0")))
    assert len(str(error.value)) < 1000

def test_pi0_refuses_settings_that_it_would_ignore():
    for name, value in dict(adapter="runs/pi0/last", scale_head="head.pth", attention_mode="prompt").items():
        with pytest.raises(ript.UserError, match=f"--{name} is not for --model pi0"):
            Pi0.load(ript.Config(model="pi0", suite="libero_object", device="cpu", **{name: value}))

def test_wrong_paths_and_a_wrong_expert_are_told_in_a_sentence(released, policy, tmp_path):
    with pytest.raises(ript.UserError, match="nowhere"):
        Pi0.from_pretrained(tmp_path / "nowhere")
    policy.save(tmp_path / "run")
    save_file(dict(weight=torch.zeros(1)), tmp_path / "run/pi0_expert.safetensors")
    with pytest.raises(ript.UserError, match="pi0_expert.safetensors"):
        Pi0.from_pretrained(tmp_path / "run")

def test_the_presets_are_settings_of_the_suites():
    for preset in Pi0.PRESET.values():
        ript.Config(**preset)
    assert Pi0.PRESET.keys() < ript.LIBERO.keys()

# ------------------------------------------------------------------------------------------------- iterations
class Pretended:
    """A simulator that is not there: an episode succeeds in its second chunk if that begins to the left."""
    task = 0

    async def call(self, method, *arguments):
        if method == "reset":
            self.steps, self.seed = 0, arguments[0].seed
            return ript.StepResult(0, False, Pi0.preprocess(raw_observation(self.seed)))
        (actions,) = arguments
        self.steps += len(actions)
        if self.steps == 10 and actions[0, 0] < 0.06:
            return ript.StepResult(2, True, None)
        return ript.StepResult(len(actions), False, Pi0.preprocess(raw_observation(self.seed + self.steps)))

def test_an_iteration_raises_log_probabilities_where_the_advantage_is_positive(policy, monkeypatch):
    monkeypatch.setattr(ript.load_suite("libero_object"), "HORIZON", 15)
    cfg = ript.Config(model=f"{FILE}:Pi0", suite="libero_object", task=0, device="cpu", groups=2, rollouts=4,
                      max_rejected=8, minibatch=8, lr=1e-3, loss_per="token")
    state = ript.TrainState()
    monkeypatch.setattr(ript, "Simulator", lambda cfg: Pretended())
    simulators = ript.Simulators(cfg)
    episodes, stats = ript.collect(policy, simulators, lambda n: ript.training_context(n, cfg), state, cfg)
    assert stats["kept"] >= 2 and stats["scale"] == pytest.approx(0.5 * np.sqrt(1 / 3) / 2)
    won, lost = (next(e for e in episodes if e.success is success) for success in (True, False))
    assert won.num_executed == [5, 2] and lost.num_executed == [5, 5, 5]
    parts = ript.make_micro_batches(episodes, range(len(episodes)), 8)
    mask, before, recorded = ript.compute_old_log_probs(policy, episodes, parts)
    near(before[mask], recorded[mask], 1e-4)
    assert mask[episodes.index(won)].sum() == 7 and not mask[episodes.index(won), 1, 2:].any()
    optimizer = torch.optim.AdamW(policy.parameter_groups(), cfg.lr)
    row = ript.update(policy, optimizer, episodes, cfg, state)
    assert row["ratio_error"] < 1e-3 and row["grad_norm"] > 0 and row["ratio"] == pytest.approx(1, abs=1e-3)
    after = ript.compute_old_log_probs(policy, episodes, parts)[1]
    advantage = ript.leave_one_out_advantage(ript.rewards_of([episodes]).view(-1, 4)).flatten()
    gain = ((after - before) * mask).sum((1, 2)) @ advantage
    assert gain > 0

def test_an_iteration_of_pi0_in_libero(released, tmp_path, monkeypatch):
    """From the command line, with pretended rewards and 10 steps an episode; then evaluate what it saved."""
    libero_or_skip()
    monkeypatch.setattr(ript.load_suite("libero_object"), "HORIZON", 10)
    monkeypatch.setattr(ript, "has_signal", lambda rewards: torch.ones(len(rewards), dtype=torch.bool))
    monkeypatch.setattr(ript, "leave_one_out_advantage", lambda rewards: rewards + torch.tensor([1.0, -1.0]))
    always = (f"--model {FILE}:Pi0 --suite libero_object --task 0 --eval_contexts 1 --workers 2 "
              "--collision true --image_size 64 --device cpu --checkpoint").split()
    last = tmp_path / "run/last"
    ript.main([*always, str(released), *"--rollouts 2 --groups 1 --lr 1e-3 --iterations 1 --out".split(),
               str(tmp_path / "run")])
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[1])
    assert (row["kept"], row["env_steps"], row["updates"]) == (1, 20, 1) and row["ratio_error"] < 1e-3
    start, end = (Pi0.from_pretrained(folder).pi0.state_dict() for folder in (released, last))
    moved = {name for name in start if (start[name] != end[name]).any()}
    assert moved and not any("vlm" in name for name in moved)
    ript.main([*always, str(last), "--eval", "--out", str(tmp_path / "eval")])
    assert len(json.loads((tmp_path / "eval/evaluation_success.json").read_text())["outcomes"]) == 1
