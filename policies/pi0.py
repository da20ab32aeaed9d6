"""pi0 (arXiv 2410.24164), as transformers has it, with the protocol of ript.py.

PaliGemma, the VLM, reads two pictures and the instruction. An action expert, a small Gemma that attends to
its keys and values, makes a chunk of noise into a chunk of actions in T Euler steps, while the time t falls
from 1 to 0. It predicts the velocity v(x, t), the mean of noise minus action where x = (1 - t) action + t
noise. Actions that follow from noise like this have no density that is known. Noise in the last step
(sde_step) gives each action step a Gaussian one. The expert trains; the VLM is frozen.

A checkpoint has config.json; model.safetensors with LeRobot's, openpi's or transformers' names; statistics,
LeRobot's policy_preprocessor*normalizer_processor.safetensors or openpi's norm_stats.json; and PaliGemma's
tokenizer.json or, as that is gated, prompts.json: {instruction: [2, ids of the text, 108]}. The environment
variable PI0_TOKENS may name either.

No released checkpoint has been read yet, and success is not measured. By count, the VLM's 2,923M parameters
are 5.8 GB in bfloat16, and the 315M that train 5.0 GB, in float32 with gradient and AdamW's moments. A 24 GB
card has 13 GB left for activations and the simulators.

Shapes: B batch, L tokens of pictures and prompt, F their width, M predicted action steps, H of them that run,
A action dimensions, D with padding.
"""
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ript
from policies.checkpoints import checksums, fetch, read_json, read_origin, refuse

# transformers is imported where it is used: simulators, which import this file, have no use for it.

BOS = 2  # the id that begins a prompt, PaliGemma's
NEWLINE = 108  # the id that ends it
WORDS = 48  # ids of a prompt, with padding

# -------------------------------------------------------------------------------------------- The density
def sde_step(x, velocity, t, d, a):
    """One step of Flow-SDE from time t to t - d: -> mean and std of what follows x (..., A).

    velocity (..., A); a, the level of the noise: a number or (..., A). a = 0 is the Euler step of the ODE.
    The mean is corrected so that x keeps the distribution that it has without noise, up to terms that vanish
    with d (Flow-GRPO, arXiv 2505.05470; pi_RL, arXiv 2510.25889):

        clean = x - t v,  noise = x + (1 - t) v           what the velocity says of both ends of the path
        mean  = (1 - t + d) clean + (t - d - s^2 d / 2t) noise
        std   = s sqrt(d),  s = a sqrt(t / (1 - t))"""
    # At t = 1, s would be infinite. The time after this step stands in.
    before = min(t, 1 - d)
    s = a * math.sqrt(before / (1 - before))
    clean = x - t * velocity
    noise = x + (1 - t) * velocity
    return (1 - t + d) * clean + (t - d - s ** 2 * d / (2 * t)) * noise, s * math.sqrt(d)

def gaussian_log_prob(x, mean, std):
    """Log-density of independent Gaussians, (..., A) each -> (...), summed over A. Where a number is not
    finite it is NaN and without gradient, as in ript.laplace_log_prob."""
    known = (x + mean + std).isfinite().all(-1, keepdim=True)  # ... 1
    x, mean, std = (torch.where(known, number, 1.0) for number in (x, mean, std))
    log_prob = -((x - mean) / std) ** 2 / 2 - torch.log(std) - math.log(2 * math.pi) / 2
    return torch.where(known, log_prob, math.nan).sum(-1)

# -------------------------------------------------------------------------------------------------- Policy
class Pi0(nn.Module):
    """The policy. pi0 is transformers' model; state and action are what read_statistics gives."""
    chunk = 5  # action steps that run per query, H, as openpi runs LIBERO
    tokens_per_query = 0  # log_prob has a column for each action step
    A = 7
    STEPS = 4  # denoising steps, T; this and the level are RLinf's
    LEVEL = 0.5  # of the noise in the last step, a
    scale_multiplier = 1.0  # a factor on it
    micro_batch = 8
    PICTURES = "agentview_image", "robot0_eye_in_hand_image"
    # lr and clip are not tuned. The checkpoint's data are of these four suites.
    PRESET = dict.fromkeys(("libero_spatial", "libero_object", "libero_goal", "libero_10"), dict(
        checkpoint="lerobot/pi0_libero_finetuned_v044", lr=5e-6, clip_coef=0.2))

    def __init__(self, model, statistics, prompts, base=""):
        """model: PI0ForConditionalGeneration; statistics, prompts: as read below; base: their place."""
        super().__init__()
        self.pi0 = model
        self.state, self.action = statistics
        self.prompts = prompts
        self.base = base
        # openpi's pi0 for LIBERO predicts actions minus the state, gripper excepted; LeRobot's, actions.
        # These are within -1 and 1, and the hand points down, 3 radians about x: the mean tells which it is.
        self.minus_state = bool(abs(self.action[0][3]) > 1.5)
        model.model.dit.embed_tokens = None  # 1 GB without use: the expert reads no words
        model.model.vlm.requires_grad_(False)
        self.eval()  # for good: old and new log-probabilities must come from one function

    # -- weights
    @classmethod
    def load(cls, cfg):
        """The policy that a run starts from."""
        refuse(cfg, "adapter", "scale_head", "attention_mode")
        policy = cls.from_pretrained(cfg.checkpoint, cfg.device)
        policy.scale_multiplier = cfg.scale_multiplier
        # It complains now, and not in a rollout.
        tokens = [policy.tokens(text) for text in ript.tasks_of(cfg).values()]
        numbers = [array.tolist() for array in (*policy.state, *policy.action)]
        policy.constants = numbers, tokens  # what actions depend on beside weights, for ript.fingerprint
        return policy

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None):
        """Read a checkpoint or save's directory, here or on the hub. dtype: the VLM's; None is bfloat16 on a
        GPU and float32 elsewhere. Raises ript.UserError where anything is missing or does not fit."""
        with ript.reading(path):
            folder = fetch(path)
        if (folder / "ript.json").exists():
            return cls.read_saved(folder, device, dtype)
        with ript.reading(folder / "config.json"):
            config = read_config(folder / "config.json")
        statistics = read_statistics(folder)
        prompts = read_prompts(folder)
        model = read_model(folder, config)
        dtype = dtype or (torch.bfloat16 if "cuda" in str(device) else torch.float32)
        for p in model.model.vlm.parameters():  # and not its buffers: positions would lose precision
            p.data = p.data.to(dtype)
        base = folder.resolve() if Path(path).exists() else path
        return cls(model, statistics, prompts, str(base)).to(device)

    @classmethod
    def read_saved(cls, folder, device, dtype):
        """What save wrote: the checkpoint that it names, with an expert of its own."""
        settings = read_origin(folder)
        with ript.reading(folder / "ript.json"):
            base = settings["base"]
        policy = cls.from_pretrained(base, device, dtype)
        with ript.reading(folder / "pi0_expert.safetensors"):
            expert = load_file(folder / "pi0_expert.safetensors")
            policy.pi0.load_state_dict(policy.pi0.state_dict() | expert)
        return policy

    def parameter_groups(self):
        """AdamW's group: the expert and its projections."""
        return [dict(params=[p for p in self.parameters() if p.requires_grad], weight_decay=1e-4)]

    def save(self, directory):
        """Write what trains, 1.3 GB, and the name of the checkpoint that has the rest."""
        weights = {name: p.detach().cpu() for name, p in self.pi0.named_parameters() if p.requires_grad}
        with ript.writing(Path(directory, "pi0_expert.safetensors")) as temporary:
            save_file(weights, temporary)
        files = checksums(Path(directory), "pi0_expert.safetensors")
        with ript.writing(Path(directory, "ript.json")) as temporary:
            temporary.write_text(json.dumps(dict(base=self.base, files=files)))

    # -- observations and actions
    @classmethod
    def preprocess(cls, raw):
        """The simulator's arrays -> what an episode stores: pictures (2, h, w, 3) uint8 and proprio (8,), the
        hand's place in metres, axis times angle in radians, the finger joints in metres."""
        # Turned by 180 degrees, as in the checkpoint's data; pixels resizes them.
        pictures = np.stack([raw[name][::-1, ::-1] for name in cls.PICTURES])
        x, y, z, w = np.clip(raw["robot0_eef_quat"], -1, 1)
        sine = math.sqrt(1 - w * w)  # of half the angle
        axis_angle = np.array([x, y, z]) * (2 * math.acos(w) / sine if sine > 1e-8 else 0)
        proprio = np.concatenate([raw["robot0_eef_pos"], axis_angle, raw["robot0_gripper_qpos"]])
        return dict(pictures=pictures, proprio=proprio)

    def tokens(self, instruction):
        """The ids of a prompt, a list, padded with zeros."""
        ids = self.prompts(instruction)
        right = isinstance(ids, list) and all(type(number) is int and number > 0 for number in ids)
        right = right and 2 < len(ids) <= WORDS and (ids[0], ids[-1]) == (BOS, NEWLINE)
        ript.require(right, f"{instruction!r} must be {BOS}, its ids and {NEWLINE}, {WORDS} at most, "
                            f"it is {ids}")
        return ids + [0] * (WORDS - len(ids))

    def pixels(self, pictures):
        """uint8 (B, 2, h, w, 3) -> (B, 2, 3, side, side) in [-1, 1] with black margins, as in LeRobot."""
        side = self.pi0.config.vlm_config.vision_config.image_size
        x = torch.as_tensor(pictures).to(self.pi0.device).flatten(0, 1).permute(0, 3, 1, 2) / 255  # 2B 3 h w
        longer = max(x.shape[2:])
        h = x.shape[2] * side // longer
        w = x.shape[3] * side // longer
        x = nn.functional.interpolate(x, (h, w), mode="bilinear") * 2 - 1
        margins = (side - w) // 2, (side - w + 1) // 2, (side - h) // 2, (side - h + 1) // 2
        return nn.functional.pad(x, margins, value=-1).unflatten(0, pictures.shape[:2])

    def to_env_actions(self, sample, proprio):
        """(H, 7) in pi0's units -> in LIBERO's, whose gripper opens at -1 and closes at 1, as in its data."""
        offset, factor = self.action
        state = self.minus_state * np.append(proprio[:6], 0)
        return offset + factor * sample.astype(float) + state

    # -- the forward pass
    @torch.no_grad()
    def prefix(self, observations, instructions):
        """-> the VLM's keys and values, the mask (B, L) of tokens that are no padding, and states (B, D)."""
        config = self.pi0.config
        vlm = self.pi0.model.vlm
        pixels = self.pixels(np.stack([seen["pictures"] for seen in observations]))
        patches = 2 * (pixels.shape[-1] // config.vlm_config.vision_config.patch_size) ** 2
        ids = [[config.vlm_config.image_token_id] * patches + self.tokens(text) for text in instructions]
        ids = torch.tensor(ids).to(pixels.device)  # B L
        mask = (ids > 0).long()
        cameras = torch.ones(pixels.shape[:2], dtype=torch.bool, device=pixels.device)  # none is missing
        x = self.pi0.model.embed_prefix(ids, pixels.to(vlm.dtype), cameras)  # B L F
        cache = vlm(inputs_embeds=x, attention_mask=mask, position_ids=mask.cumsum(-1) - 1, use_cache=True,
                    token_type_ids=torch.zeros_like(mask)).past_key_values  # zeros: all tokens see all
        for layer in cache.layers:  # in float32, as the expert's
            layer.keys = layer.keys.float()
            layer.values = layer.values.float()
        offset, factor = self.state
        states = (np.stack([seen["proprio"] for seen in observations]) - offset) / factor  # B 8
        states = nn.functional.pad(torch.tensor(states).float(), (0, config.max_state_dim - 8))
        return cache, mask, states.to(pixels.device)

    def velocity(self, prefix, x, time):
        """The expert's velocity of noisy chunks, (B, M, D) each, at a time, a number."""
        cache, mask, states = prefix
        velocity = self.pi0(state=states, noise=x, timestep=x.new_full((len(x),), time), attention_mask=mask,
                            past_key_values=cache).logits
        cache.crop(-1 - x.shape[1])  # the next step must not see this one's state and actions
        return velocity

    def last_step(self, prefix, x):
        """From x_{T-1} (B, M, D): actions without noise; mean and std of those with it. (B, H, A) each."""
        d = 1 / self.STEPS
        velocity = self.velocity(prefix, x, d)[:, :self.chunk, :self.A]
        x = x[:, :self.chunk, :self.A]
        level = torch.full_like(x, self.LEVEL * self.scale_multiplier)
        mean, std = sde_step(x, velocity, d, d, level)
        return x - d * velocity, mean, std

    # -- the protocol of ript.py
    @torch.no_grad()
    def act(self, observations, instructions, generators):
        """Draw a chunk for each of B observations: -> B chunks, with "actions" (H, 7), "x" (M, D) before the
        last step, "sample" (H, A) after it, and for the log "scale", the std of the last step.

        generators: of numpy, one each; where it is None, in evaluation, the pictures seed x_0, and no noise
        follows."""
        prefix = self.prefix(observations, instructions)
        M = self.pi0.config.chunk_size
        noise = []
        for generator, seen in zip(generators, observations):
            generator = generator or np.random.default_rng(int(seen["pictures"].sum()))
            noise.append(generator.standard_normal((M + self.chunk, self.pi0.config.max_action_dim)))
        x, last = torch.tensor(np.stack(noise)).to(prefix[2]).split((M, self.chunk), 1)  # B M D, B H D
        for number in range(self.STEPS - 1):
            x = x - self.velocity(prefix, x, 1 - number / self.STEPS) / self.STEPS
        clean, mean, std = self.last_step(prefix, x)
        explores = torch.tensor([generator is not None for generator in generators])
        noisy = mean + std * last[..., :self.A]
        sample = torch.where(explores.to(x.device)[:, None, None], noisy, clean)  # B H A
        columns = x, sample, gaussian_log_prob(sample, mean, std), std[:, 0, 0]
        x, sample, log_prob, scale = [column.cpu().numpy() for column in columns]
        chunks = []
        for b, seen in enumerate(observations):
            actions = self.to_env_actions(sample[b], seen["proprio"])
            chunks.append(dict(observation=seen, instruction=instructions[b], x=x[b], sample=sample[b],
                                log_prob=log_prob[b], scale=float(scale[b]), actions=actions))
        return chunks

    def log_prob(self, chunks):
        """Log-probability of each action step, (B, H), with gradient of the last Euler step alone."""
        observations = [chunk["observation"] for chunk in chunks]
        instructions = [chunk["instruction"] for chunk in chunks]
        prefix = self.prefix(observations, instructions)
        x = torch.tensor(np.stack([chunk["x"] for chunk in chunks])).to(prefix[2])  # B M D
        sample = torch.tensor(np.stack([chunk["sample"] for chunk in chunks])).to(prefix[2])  # B H A
        _, mean, std = self.last_step(prefix, x)
        return gaussian_log_prob(sample, mean, std)

# --------------------------------------------------------------------------------------------------- Files
def read_config(path):
    """The config.json of transformers, LeRobot or openpi -> PI0Config."""
    from transformers import PI0Config
    found = read_json(path)
    modes = {found.get("normalization_mapping", {}).get(name, "MEAN_STD") for name in ("STATE", "ACTION")}
    if found.get("type", found.get("model_type", "pi0")) != "pi0" or modes != {"MEAN_STD"}:
        raise ValueError("it must be a pi0's, with MEAN_STD in its normalization_mapping")
    settings = {name: found[name] for name in ("vlm_config", "dit_config") if name in found}
    # The first name is transformers' and LeRobot's, the second openpi's.
    sizes = (("chunk_size", "action_horizon", Pi0.chunk), ("max_action_dim", "action_dim", 7),
             ("max_state_dim", "action_dim", 8))
    for name, openpi, least in sizes:
        size = found.get(name, found.get(openpi))
        if type(size) is not int or size < least:
            raise ValueError(f"{name} must be {least} at least, it is {size}")
        settings[name] = size
    return PI0Config(**settings)

def read_statistics(folder):
    """-> offset and factor of states, (8,) each, and of actions, (7,) each: value = offset + factor x."""
    files = [*folder.rglob("norm_stats.json"), *folder.glob("policy_preprocessor*normalizer_*")]
    ript.require(len(files) == 1, f"{folder} must have one norm_stats.json or one policy_preprocessor*"
                                  f"normalizer_processor.safetensors, it has {len(files)}")
    with ript.reading(files[0]):
        if files[0].suffix == ".json":
            names = "state", "actions"
            found = {}
            for name, fields in read_json(files[0])["norm_stats"].items():
                found |= {f"{name}.{field}": numbers for field, numbers in fields.items()}
        else:
            names = "observation.state", "action"
            found = load_file(files[0])
        return [offset_and_factor(found, name, size) for name, size in zip(names, (8, 7))]

def offset_and_factor(found, name, size):
    """Those of state or action, from arrays by "name.field". Quantiles count only where there is no mean, as
    openpi chooses for pi0."""
    quantiles = f"{name}.mean" not in found
    fields = ("q01", "q99") if quantiles else ("mean", "std")
    first, second = (np.array(found.get(f"{name}.{field}", ()), float)[:size] for field in fields)
    right = first.shape == second.shape == (size,) and np.isfinite(first + second).all()
    # A standard deviation is 0 at least, an upper bound the lower one.
    if not right or (second < (first if quantiles else 0)).any():
        raise ValueError(f"{' and '.join(fields)} of {name} must be {size} numbers each, and in order")
    if quantiles:
        return (first + second) / 2, (second - first) / 2 + 1e-8
    return first, second + 1e-8

def read_prompts(folder):
    """-> a function, instruction -> ids, from the file that PI0_TOKENS names, or a checkpoint's own."""
    from tokenizers import Tokenizer
    named = os.environ.get("PI0_TOKENS")
    files = [Path(named)] if named else [*folder.glob("tokenizer.json"), *folder.glob("prompts.json")]
    ript.require(files, f"{folder} has no tokenizer.json and no prompts.json: set PI0_TOKENS (pi0.py)")
    with ript.reading(files[0]):
        found = read_json(files[0])
        if "model" not in found:
            return found.get
        tokenizer = Tokenizer.from_file(str(files[0]))

    def encode(text):
        return [BOS, *tokenizer.encode(text + "\n", add_special_tokens=False).ids]
    return encode

def read_model(folder, config):
    """transformers' model with the weights of a checkpoint, of which every one must fit, in float32."""
    from transformers import PI0ForConditionalGeneration
    with ript.reading(folder):
        model, report = PI0ForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True)  # they are in the report
    wrong = [name for names in report.values() for name in names if "dit.embed_tokens" not in str(name)]
    ript.require(not wrong, f"weights in {folder} are missing, unknown or of other shapes: {wrong[:3]}")
    return model
