"""pi0 (arXiv 2410.24164), as transformers has it, through the policy protocol of ript.py.

PaliGemma, the VLM, reads two pictures and the instruction. An action expert, a small Gemma that attends to
its keys and values, makes a chunk of noise into a chunk of actions in T Euler steps. Noise in the last step
gives each action step a Gaussian log-probability (examples/flow.py). The expert trains; the VLM is frozen.

A checkpoint has config.json; model.safetensors with LeRobot's, openpi's or transformers' names; statistics,
LeRobot's policy_preprocessor*normalizer_processor.safetensors or openpi's norm_stats.json; and PaliGemma's
tokenizer.json or, as that is gated, prompts.json: {instruction: [2, ids of the text, 108]}. The variable
PI0_TOKENS may name either. No released checkpoint has been read yet, and success is not measured.

By count, the VLM's 2,923M parameters are 5.8 GB in bfloat16, and the 315M that train 5.0 GB, in float32 with
gradient and AdamW's moments. A 24 GB card has 13 GB left for activations and the simulators."""
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import PI0Config, PI0ForConditionalGeneration

import ript
from examples.flow import gaussian_log_prob, sde_step
from policies.openvla_oft import OpenVLAOFT, fetch, read_json

BOS, NEWLINE, WORDS = 2, 108, 48  # PaliGemma's ids of a prompt's ends; ids of a prompt, with padding

def read_config(path):
    """The config.json of transformers, LeRobot or openpi -> PI0Config."""
    found = read_json(path)
    modes = {found.get("normalization_mapping", {}).get(name, "MEAN_STD") for name in ("STATE", "ACTION")}
    if found.get("type", found.get("model_type", "pi0")) != "pi0" or modes != {"MEAN_STD"}:
        raise ValueError("it must be a pi0's, with MEAN_STD in its normalization_mapping")
    settings = {name: found[name] for name in ("vlm_config", "dit_config") if name in found}
    for name, least in dict(chunk_size=Pi0.chunk, max_action_dim=7, max_state_dim=8).items():
        settings[name] = found.get(name, found.get("action_horizon" if "chunk" in name else "action_dim"))
        if type(settings[name]) is not int or settings[name] < least:
            raise ValueError(f"{name} must be {least} at least, it is {settings[name]}")
    return PI0Config(**settings)

def read_statistics(path):
    """-> offset and factor of states, (8,) each, and of actions, (7,) each: value = offset + factor x."""
    if path.suffix == ".json":
        names, saved = ("state", "actions"), read_json(path)["norm_stats"]
        found = {f"{name}.{field}": saved[name][field] for name in saved for field in saved[name]}
    else:
        names, found = ("observation.state", "action"), load_file(path)
    statistics = []
    for name, size in zip(names, (8, 7)):
        fields = ("mean", "std") if f"{name}.mean" in found else ("q01", "q99")  # as openpi chooses for pi0
        low, high = (np.array(found.get(f"{name}.{field}", ()), float)[:size] for field in fields)
        right = low.shape == high.shape == (size,) and np.isfinite(low + high).all()
        if not (right and (high >= low * ("q01" in fields)).all()):
            raise ValueError(f"{' and '.join(fields)} of {name} must be {size} numbers each, and in order")
        if "q01" in fields:
            low, high = (low + high) / 2, (high - low) / 2
        statistics.append((low, high + 1e-8))
    return statistics

def read_prompts(path):
    """A tokenizer.json or a prompts.json -> a function, instruction -> ids."""
    found = read_json(path)
    if "model" not in found:
        return found.get
    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: [BOS, *tokenizer.encode(text + "\n", add_special_tokens=False).ids]

class Pi0(nn.Module):
    """L tokens of pictures and prompt; M action steps are predicted and H run; padded, actions have D, 32."""
    chunk, TOKENS, A = 5, 0, 7  # H, as openpi runs LIBERO; log_prob has a column for each action step
    STEPS, LEVEL, scale_multiplier, micro_batch = 4, 0.5, 1.0, 8  # T and the noise's level a are RLinf's
    # lr and clip are not tuned. The checkpoint's data are of these four suites.
    PRESET = dict.fromkeys(("libero_spatial", "libero_object", "libero_goal", "libero_10"), dict(
        checkpoint="lerobot/pi0_libero_finetuned_v044", lr=5e-6, clip=0.2))
    preprocess = OpenVLAOFT.preprocess  # pictures turned by 180 degrees; proprio: place, axis-angle, fingers
    PICTURES, prepare_picture = OpenVLAOFT.PICTURES, staticmethod(np.asarray)  # pixels resizes them

    def __init__(self, model, statistics, prompts, base=""):
        """model: PI0ForConditionalGeneration; statistics, prompts: as read; base: where they are from."""
        super().__init__()
        self.pi0, (self.state, self.action), self.prompts, self.base = model, statistics, prompts, base
        # openpi's pi0 for LIBERO predicts actions minus the state, gripper excepted; LeRobot's, actions.
        # These are within -1 and 1, and the hand points down, 3 radians about x: the mean tells which it is.
        self.minus_state = bool(abs(self.action[0][3]) > 1.5)
        model.model.dit.embed_tokens = None  # 1 GB without use: the expert reads no words
        model.model.vlm.requires_grad_(False)
        self.eval()  # for good: old and new log-probabilities must come from one function

    def tokens(self, instruction):
        """The ids of a prompt, a list, padded with zeros."""
        ids = self.prompts(instruction)
        ript.require(isinstance(ids, list) and all(type(number) is int and number > 0 for number in ids)
                     and 2 < len(ids) <= WORDS and (ids[0], ids[-1]) == (BOS, NEWLINE),
                     f"{instruction!r} must be {BOS}, its ids and {NEWLINE}, {WORDS} at most, it is {ids}")
        return ids + [0] * (WORDS - len(ids))

    def pixels(self, pictures):
        """uint8 (B, 2, h, w, 3) -> (B, 2, 3, side, side) in [-1, 1] with black margins, as in LeRobot."""
        side = self.pi0.config.vlm_config.vision_config.image_size
        x = torch.as_tensor(pictures).to(self.pi0.device).flatten(0, 1).permute(0, 3, 1, 2) / 255
        h, w = (length * side // max(x.shape[2:]) for length in x.shape[2:])
        x = nn.functional.interpolate(x, (h, w), mode="bilinear") * 2 - 1
        margins = (side - w) // 2, (side - w + 1) // 2, (side - h) // 2, (side - h + 1) // 2
        return nn.functional.pad(x, margins, value=-1).unflatten(0, pictures.shape[:2])

    @torch.no_grad()
    def prefix(self, observations, instructions):
        """-> the VLM's keys and values, the mask (B, L) of tokens that are no padding, and states (B, D)."""
        config, vlm = self.pi0.config, self.pi0.model.vlm
        pixels = self.pixels(np.stack([seen["pictures"] for seen in observations]))
        patches = 2 * (pixels.shape[-1] // config.vlm_config.vision_config.patch_size) ** 2
        ids = [[config.vlm_config.image_token_id] * patches + self.tokens(text) for text in instructions]
        ids = torch.tensor(ids).to(pixels.device)  # B L
        mask = (ids > 0).long()
        cameras = torch.ones(pixels.shape[:2], dtype=torch.bool, device=pixels.device)  # none is missing
        x = self.pi0.model.embed_prefix(ids, pixels.to(vlm.dtype), cameras)  # B L F
        cache = vlm(inputs_embeds=x, attention_mask=mask, position_ids=mask.cumsum(-1) - 1, use_cache=True,
                    token_type_ids=torch.zeros_like(mask)).past_key_values  # zeros: all tokens see all
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.float(), layer.values.float()  # as the expert's
        states = (np.stack([seen["proprio"] for seen in observations]) - self.state[0]) / self.state[1]  # B 8
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
        x, velocity = (y[:, :self.chunk, :self.A] for y in (x, self.velocity(prefix, x, d)))
        level = torch.full_like(x, self.LEVEL * self.scale_multiplier)
        return x - d * velocity, *sde_step(x, velocity, d, d, level)

    @torch.no_grad()
    def act(self, observations, instructions, generators):
        """Records: "actions" (H, 7), "x" (M, D) before the last step, "sample" (H, A) after it, "scale", std.
        generators: of numpy, one each; None, to evaluate: the pictures seed x_0, and no noise follows."""
        prefix, noise = self.prefix(observations, instructions), []
        M, D = self.pi0.config.chunk_size, self.pi0.config.max_action_dim
        for g, seen in zip(generators, observations):
            g = g or np.random.default_rng(int(seen["pictures"].sum()))
            noise.append(g.standard_normal((M + self.chunk, D)))
        x, last = torch.tensor(np.stack(noise)).to(prefix[2]).split((M, self.chunk), 1)
        for number in range(self.STEPS - 1):
            x = x - self.velocity(prefix, x, 1 - number / self.STEPS) / self.STEPS
        clean, mean, std = self.last_step(prefix, x)
        explores = torch.tensor([g is not None for g in generators]).to(x.device)[:, None, None]
        sample = torch.where(explores, mean + std * last[..., :self.A], clean)  # B H A
        columns = [y.cpu().numpy() for y in (x, sample, gaussian_log_prob(sample, mean, std), std[:, 0, 0])]
        return [dict(observation=seen, instruction=text, x=x, sample=sample, log_prob=log_prob,
                     scale=float(scale), actions=self.to_env_actions(sample, seen["proprio"]))
                for seen, text, x, sample, log_prob, scale in zip(observations, instructions, *columns)]

    def to_env_actions(self, sample, proprio):
        """(H, 7) in pi0's units -> in LIBERO's, whose gripper opens at -1 and closes at 1, as in its data."""
        state = self.minus_state * np.append(proprio[:6], 0)
        return self.action[0] + self.action[1] * sample.astype(float) + state

    def log_prob(self, records):
        """Log-probability of each action step, (B, H), with gradient of the last Euler step alone."""
        column = lambda name: [record[name] for record in records]
        prefix = self.prefix(column("observation"), column("instruction"))
        x, sample = (torch.tensor(np.stack(column(name))).to(prefix[2]) for name in ("x", "sample"))
        return gaussian_log_prob(sample, *self.last_step(prefix, x)[1:])

    def parameter_groups(self):
        """AdamW's group: the expert and its projections."""
        return [dict(params=[p for p in self.parameters() if p.requires_grad], weight_decay=1e-4)]

    def save(self, folder):
        """Write what trains, 1.3 GB, and the name of the checkpoint that has the rest."""
        weights = {name: p.detach().cpu() for name, p in self.pi0.named_parameters() if p.requires_grad}
        ript.write(Path(folder, "pi0_expert.safetensors"), lambda path: save_file(weights, path))
        ript.write(Path(folder, "ript.json"), lambda path: path.write_text(json.dumps(dict(base=self.base))))

    @classmethod
    def load(cls, cfg):
        """The policy that a run starts from."""
        policy = cls.from_pretrained(cfg.checkpoint, cfg.device)
        policy.scale_multiplier = cfg.scale_multiplier
        for text in ript.tasks_of(cfg).values():
            policy.tokens(text)  # complains now, and not in a rollout
        return policy

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None):
        """Of a checkpoint or save's directory, here or on the hub. dtype: the VLM's, on a GPU bfloat16."""
        folder = ript.read(path, fetch)
        if (folder / "ript.json").exists():
            base = ript.read(folder / "ript.json", lambda file: read_json(file)["base"])
            policy = cls.from_pretrained(base, device, dtype)
            ript.read(folder / "pi0_expert.safetensors", lambda file: policy.pi0.load_state_dict(
                policy.pi0.state_dict() | load_file(file)))
            return policy
        config = ript.read(folder / "config.json", read_config)
        files = [*folder.rglob("norm_stats.json"), *folder.glob("policy_preprocessor*normalizer_*")]
        ript.require(len(files) == 1, f"{folder} must have one norm_stats.json or one policy_preprocessor*"
                                      f"normalizer_processor.safetensors, it has {len(files)}")
        statistics = ript.read(files[0], read_statistics)
        named = os.environ.get("PI0_TOKENS")
        files = [named] if named else [*folder.glob("tokenizer.json"), *folder.glob("prompts.json")]
        ript.require(files, f"{folder} has no tokenizer.json and no prompts.json: set PI0_TOKENS (pi0.py)")
        prompts = ript.read(Path(files[0]), read_prompts)
        model, report = ript.read(folder, lambda file: PI0ForConditionalGeneration.from_pretrained(
            file, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True))
        wrong = [name for names in report.values() for name in names if "dit.embed_tokens" not in str(name)]
        ript.require(not wrong, f"weights in {folder} are missing, unknown or of other shapes: {wrong[:3]}")
        for p in model.model.vlm.parameters():  # and not its buffers: positions would lose precision
            p.data = p.data.to(dtype or (torch.bfloat16 if "cuda" in str(device) else torch.float32))
        base = str(folder.resolve() if Path(path).exists() else path)
        return cls(model, statistics, prompts, base).to(device)
