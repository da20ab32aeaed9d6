"""OpenVLA-OFT (arXiv 2502.19645), a 7B policy that regresses action chunks, from its released files.

Two vision towers (DINOv2 and SigLIP) look at two pictures, a projector makes tokens of their patches, and a
Llama that attends both ways reads these, the robot's state and the instruction. From its hidden states at A H
empty positions the action head predicts a chunk of H actions, the mean of ript.LaplacePolicy's density.

Every module has the name that it has in the released checkpoints. Nothing that was downloaded is executed.
Source files named below are those of the released code, ript-vla and the openvla-oft that it contains.
"""
import json
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from policies.checkpoints import (check_trained_with, checksums, fetch, fill, read_base, read_json,
                                  read_origin, read_statistics, read_tokenizer, weights_of)
from policies.vision import Tower, mlp, openvla_picture
from ript import LaplacePolicy, ScaleHead, reading, require, writing

# transformers, PEFT and the hub are imported where they are used: simulators, which import this file for
# preprocess, would spend 3 seconds and 150 MB on them.

# ------------------------------------------------------------------------------------------------- Modules
class MLPResNet(nn.Module):
    """The body of the heads (prismatic/models/action_heads.py): (B, H, wide) -> (B, H, out)."""
    def __init__(self, wide, hidden, out):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(wide)
        self.fc1 = nn.Linear(wide, hidden)
        self.mlp_resnet_blocks = nn.ModuleList()
        for _ in range(2):
            ffn = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.ReLU())
            self.mlp_resnet_blocks.append(nn.ModuleDict(dict(ffn=ffn)))
        self.layer_norm2 = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x):
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = x + block["ffn"](x)  # the residual joins after the ReLU
        return self.fc2(self.layer_norm2(x))

# ------------------------------------------------------------------------------------------------- Settings
def is_adapter_or_head(name) -> bool:
    """Whether a parameter is kept in float32 and saved with the adapters."""
    return "lora_" in name or name.startswith(("action_head", "scale_head"))

def released(suite, scale_head, scale_multiplier, **settings):
    """The settings of a suite: the checkpoint of OpenVLA-OFT's authors and the scale head of RIPT's."""
    return dict(checkpoint=f"moojink/openvla-7b-oft-finetuned-{suite}", act_batch=8,
                scale_head=f"tanshh97/RIPT_VLA/openvla_oft/scale_header/{scale_head}_scale_header.pth",
                scale_multiplier=scale_multiplier, **settings)

def chunks_that_fit(device) -> int:
    """How many chunks a forward with gradient may have in a GPU's memory; more make an update faster."""
    if not str(device).startswith("cuda"):
        return OpenVLAOFT.micro_batch
    return chunks_in(torch.cuda.get_device_properties(device).total_memory / 2 ** 30)

def chunks_in(memory: float) -> int:
    """The same by the memory of a GPU in GiB."""
    # Measured on an H100: 18.7 GiB and 0.7 for each chunk. 3 are left for CUDA and the simulators' pictures.
    room = memory - 3 - 18.7
    return next((chunks for chunks in (16, 8, 4, 2) if 0.7 * chunks <= room), 1)

# -------------------------------------------------------------------------------------------------- Policy
class OpenVLAOFT(LaplacePolicy):
    """OpenVLA-OFT with a Laplace scale head.

    The sequence is BOS | patches of each camera | proprio | padding, prompt, space | A H zeros | stop. As a
    language model predicts the next token, the heads read the space and the first A H - 1 zeros.

    prefix="exact" is the function that OpenVLA-OFT was trained with
    (prismatic/extern/hf/modeling_prismatic.py). With "prompt", as the released RIPT adapters were trained
    (ript/algos/rl_optimizers/openvla_oft_interface.py), what precedes the space does not see what follows it.
    """
    BOS, STOP = 1, 2  # Llama's tokens
    micro_batch = 4  # chunks per forward with gradient; on a GPU its memory decides
    PICTURES = ("agentview_image", "robot0_eye_in_hand_image")
    PROMPT = "In: What action should the robot take to {}?\nOut:"
    TOWER = Tower
    TOWERS = (dict(embed_dim=1024, depth=24, num_heads=16, prefix=5, layer_scale=True),  # DINOv2
              dict(embed_dim=1152, depth=27, num_heads=16, mlp_ratio=3.7362, pool=True))  # SigLIP
    LORA = dict(r=32, lora_alpha=16, lora_dropout=0.0, bias="none", init_lora_weights="gaussian",
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
                                "lm_head", "qkv", "q", "kv", "proj", "fc1", "fc2", "fc3"])
    # What may differ from LORA in an adapter_config.json: what add_lora uses, and what changes no output.
    FREE = ("r", "lora_alpha", "lora_dropout", "target_modules", "peft_version", "auto_mapping",
            "base_model_name_or_path", "inference_mode", "revision", "task_type")
    trained = ("language_model.model.layers", "action_head")  # stage 3 trains the names that begin so,
    adapters_only = True  # and of these only adapters and heads
    sft_modules = ("action_head",)  # what stage 2 could train
    PRESET = dict(
        libero_spatial=released("libero-spatial", "LIBERO_SPATIAL", 2.0),
        libero_object=released("libero-object", "LIBERO_OBJECT", 5.0),
        libero_goal=released("libero-goal", "LIBERO_GOAL", 5.0, lr=1e-5),
        libero_10=released("libero-10", "LIBERO_LONG", 5.0))
    # Success in % before stage 3 and after it, of 50 held-out contexts per task (arXiv 2505.17016).
    PUBLISHED = dict(
        SFT=dict(libero_goal=97.9, libero_spatial=97.6, libero_object=98.4, libero_10=92.9),
        RIPT=dict(libero_goal=99.0, libero_spatial=98.6, libero_object=98.6, libero_10=93.8))
    # Stage 2 is the fit of the scale head alone.
    IMITATION = {suite: dict(checkpoint=preset["checkpoint"], sft_steps=0)
                 for suite, preset in PRESET.items()}

    def __init__(self, llm, towers, pixels, statistics, tokenizer, prefix="exact"):
        """llm: arguments of LlamaConfig. towers: of both towers. pixels: for each tower mean and std of 0..1.
        statistics: the bounds q01 and q99 of "action" and "proprio", which become -1 and 1."""
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM
        llama = LlamaConfig(**llm)
        D = llama.hidden_size
        wide = sum(sizes["embed_dim"] for sizes in towers)
        first, second = [self.TOWER(**sizes) for sizes in towers]
        self.vision_backbone = nn.ModuleDict(dict(featurizer=first, fused_featurizer=second))
        self.projector = mlp(wide, 4 * wide, D, D)
        self.proprio_projector = mlp(len(statistics["proprio"]["q01"]), D, D)
        self.language_model = LlamaForCausalLM(llama)
        self.A = len(statistics["action"]["q01"])  # action dimensions
        # (B, H, A D) -> normalised actions (B, H, A)
        self.action_head = nn.Sequential(OrderedDict(model=MLPResNet(self.A * D, D, self.A)))
        # On the CPU even if the rest has no memory yet, because no released checkpoint has this head.
        with torch.device("cpu"):
            self.scale_head = ScaleHead(MLPResNet(self.A * D, D, D), D, self.A)
        self.pixels = pixels
        self.statistics = statistics
        self.tokenizer = tokenizer
        self.prefix = prefix
        self.lora = None  # the settings of the adapters, where there are any
        self.trained_with = {}  # the settings that it is made for, where they are known
        # For good: old and new log-probabilities must come from one function.
        self.eval()

    # -- reading
    @classmethod
    def load(cls, cfg):
        """The policy that a run starts from. Without an adapter it gets new ones, and needs a scale head."""
        usual = cls.PRESET.get(cfg.suite, {}).get("scale_head", "")
        twice = cfg.adapter and cfg.scale_head not in ("", usual)
        require(not twice, "--adapter brings a scale head of its own: leave --scale_head out")
        scale_head = "" if cfg.adapter or cfg.eval else cfg.scale_head
        require(cfg.adapter or scale_head or cfg.eval,
                "openvla-oft explores with a scale head: --scale_head FILE or --adapter DIR has one, "
                "python scripts/sft.py --demos DIR fits one")
        if cfg.adapter or scale_head:
            folder = Path(cfg.adapter or Path(scale_head).parent)
            check_trained_with(read_origin(folder), cls.settings_of(cfg), folder)
        policy = cls.from_pretrained(cfg.checkpoint, cfg.suite, cfg.adapter, scale_head, cfg.attention_mode,
                                     cfg.device)
        policy.trained_with = cls.settings_of(cfg)
        if not (cfg.adapter or cfg.eval):
            policy.add_lora()
        # The scale head stays as it is in stage 3.
        policy.train_only(cls.trained)
        policy.scale_multiplier = cfg.scale_multiplier
        policy.micro_batch = chunks_that_fit(cfg.device)
        return policy.to(cfg.device)

    @classmethod
    def settings_of(cls, cfg):
        """The settings that the weights and the rollouts must agree on; save writes them into ript.json."""
        return dict(suite=cfg.suite, checkpoint=Path(cfg.checkpoint).name, prefix=cfg.attention_mode,
                    image_size=cfg.image_size, collision=cfg.collision)

    @classmethod
    def describe(cls, folder, suite):
        """The constructor's arguments for the release in a directory, and the dtype of its weights."""
        with reading(folder / "config.json"):
            llm, towers, dtype = cls.read_config(folder / "config.json")
        with reading(folder / "preprocessor_config.json"):
            pixels = read_json(folder / "preprocessor_config.json")["tvf_normalize_params"]
        with reading(folder / "dataset_statistics.json"):
            statistics = read_statistics(folder / "dataset_statistics.json", suite)
        with reading(folder / "tokenizer.json"):
            tokenizer = read_tokenizer(folder / "tokenizer.json")
        return dict(llm=llm, towers=towers, pixels=pixels, statistics=statistics, tokenizer=tokenizer), dtype

    @classmethod
    def read_config(cls, path):
        """From a config.json the arguments of LlamaConfig and of both towers, and the dtype."""
        config = read_json(path)
        if config.get("model_type") != "openvla":
            raise ValueError("it is not an OpenVLA-OFT's")
        dtypes = dict(bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32)
        dtype = dtypes[config.get("dtype") or config["torch_dtype"]]
        first, second = config.get("timm_model_kwargs", ({}, {}))  # which only tests change
        return config["text_config"], [cls.TOWERS[0] | first, cls.TOWERS[1] | second], dtype

    @classmethod
    def from_pretrained(cls, path, suite="", adapter=None, scale_head=None, prefix="exact", device="cpu",
                        dtype=None):
        """Read a released checkpoint; each path may be local or OWNER/NAME[/PATH] in the Hugging Face hub.

        suite picks the statistics of actions and proprio. adapter is a directory of LoRA weights and heads,
        scale_head a scale_header.pth. Weights are in dtype (None: that of config.json), adapters and heads in
        float32. Raises ript.UserError, which names the file, where a tensor is unknown, missing or of another
        shape, and where anything else does not fit."""
        require(prefix in ("exact", "prompt"), f"prefix must be 'exact' or 'prompt', got {prefix!r}")
        with reading(path):
            folder = fetch(path)
        arguments, stored = cls.describe(folder, suite)
        with reading(folder / "config.json"), torch.device("meta"):  # shapes without memory
            policy = cls(**arguments, prefix=prefix)
        # First what takes no minutes, as reading the base may.
        if adapter:
            with reading(adapter):
                adapter = fetch(adapter)
        if scale_head:
            with reading(scale_head):
                scale_head = fetch(scale_head)
            with reading(scale_head):
                fill(scale_head, **policy.scale_parts())
        weights = {f"scale_head.{name}": value for name, value in policy.scale_head.state_dict().items()}
        for name, value in read_base(folder):
            kept = torch.float32 if is_adapter_or_head(name) else dtype or stored
            # A copy, which torch aligns: to the last bit, results depend on where in memory weights are.
            weights[name] = value.to(device, kept, copy=True)
        with reading(folder):
            policy.load_state_dict(weights, assign=True)
        del weights
        policy.drop_unused()
        # The rotary embedding is in no file.
        llama = policy.language_model.model
        llama.rotary_emb = type(llama.rotary_emb)(llama.config)
        policy.to(device)
        policy.check_attention()
        if adapter:
            policy.read_adapter_folder(adapter)
        policy.train_only((*cls.trained, "scale_head"))
        return policy

    @torch.no_grad()
    def check_attention(self):
        """Raise UserError if a later word does not change an earlier output: LlamaModel takes a 4-D mask as
        it is, which another version of transformers may not do."""
        embed = self.language_model.model.embed_tokens
        words = torch.tensor([[1, 2, 3], [1, 2, 4]])  # two sequences that differ in their last word
        x = embed(words.to(embed.weight.device))
        mask = torch.ones(2, 1, 3, 3, dtype=torch.bool, device=x.device)
        one, other = self.decode(x, attention_mask=mask)[:, 0]
        require(not torch.equal(one, other),
                "attention is causal with this transformers, install requirements.txt's")

    def drop_unused(self):
        """Free the weight of lm_head, 0.25 GiB, which no action needs. Saved adapters have one of it, which
        stays, so the layer stays too."""
        layer = self.language_model.lm_head
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)

    # -- adapters and heads
    def scale_parts(self):
        """The modules in a scale_header.pth, by their names there."""
        return dict(scale_trunk=self.scale_head.trunk, log_b_head=self.scale_head.log_b_head)

    def heads(self):
        """The modules in an openvla_headers.pt, by their names there."""
        return dict(action_header=self.action_head, scale_header=self.scale_head)

    def add_lora(self, settings=LORA):
        """Add adapters (PEFT), in float32, to every linear layer outside the heads. settings: as in an
        adapter_config.json. Raises ValueError for those that are not PEFT's defaults, LORA's or FREE."""
        from peft import LoraConfig, inject_adapter_in_model
        usual = vars(LoraConfig())
        for name, value in settings.items():
            if value and name not in self.FREE and value not in (usual.get(name), self.LORA.get(name)):
                raise ValueError(f"adapters with {name} = {value!r} are not supported")
        self.lora = {name: settings[name] for name in self.LORA}
        heads = r"(action_head|scale_head|proprio_projector)\..*"
        inject_adapter_in_model(LoraConfig(**self.lora, exclude_modules=heads), self)
        for name, p in self.named_parameters():
            if "lora_" in name:
                p.data = p.data.float()
        for module in self.language_model.modules():
            module.cast_input_dtype_enabled = False  # PEFT's cast to float32, in place of which decode casts

    def read_adapter_folder(self, folder):
        """Add the adapters of a directory, which also has both heads."""
        with reading(folder / "adapter_config.json"):
            self.add_lora(read_json(folder / "adapter_config.json"))
        with reading(folder / "adapter_model.safetensors"):
            self.read_adapter(folder / "adapter_model.safetensors")
        with reading(folder / "openvla_headers.pt"):
            fill(folder / "openvla_headers.pt", **self.heads())
        read_origin(folder)  # complains of files that were not written together

    def read_adapter(self, path):
        """Fill the adapters from an adapter_model.safetensors of PEFT's."""
        saved = load_file(path)
        # The released files have a copy of this weight of the base.
        saved.pop("base_model.model.language_model.lm_head.base_layer.weight", None)
        weights = {name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): value
                   for name, value in saved.items()}
        wrong = weights.keys() ^ {name for name in self.state_dict() if "lora_" in name}
        if wrong:
            raise ValueError(f"{len(wrong)} weights are missing or of no adapter, among them {min(wrong)}")
        self.load_state_dict(weights, strict=False)

    def train_only(self, parts):
        """Require gradient of the parameters whose names begin with one of parts, and of no others."""
        for name, p in self.named_parameters():
            chosen = name.startswith(tuple(parts))
            p.requires_grad_(chosen and (is_adapter_or_head(name) or not self.adapters_only))

    def save(self, directory):
        """Write all that --adapter takes, or else scale_header.pth; the base stays where it is."""
        directory = Path(directory)
        names = self.save_adapters(directory) if self.lora else self.save_scale_head(directory)
        settings = self.trained_with | dict(files=checksums(directory, *names))
        with writing(directory / "ript.json") as file:
            file.write_text(json.dumps(settings, indent=1))

    def save_scale_head(self, directory):
        """Write scale_header.pth: -> the names of the files."""
        header = {name: weights_of(module) for name, module in self.scale_parts().items()}
        with writing(directory / "scale_header.pth") as file:
            torch.save(header, file)
        return ["scale_header.pth"]

    def save_adapters(self, directory):
        """Write both heads and the adapters: -> the names of the files."""
        heads = {name: weights_of(module) for name, module in self.heads().items()}
        with writing(directory / "openvla_headers.pt") as file:
            torch.save(heads, file)
        with writing(directory / "adapter_config.json") as file:
            file.write_text(json.dumps(dict(self.lora, peft_type="LORA"), indent=1))
        adapters = {"base_model.model." + name.replace(".default", ""): value.detach().cpu().contiguous()
                    for name, value in self.state_dict().items() if "lora_" in name}
        with writing(directory / "adapter_model.safetensors") as file:
            save_file(adapters, file)
        return ["openvla_headers.pt", "adapter_config.json", "adapter_model.safetensors"]

    @property
    def constants(self):
        """What actions depend on beside weights, for ript.fingerprint: bounds, pictures' norms, adapters'
        settings, and how words become tokens."""
        words = self.tokenizer(["lift the 3 red cubes, then stop."], add_special_tokens=False).input_ids
        return self.statistics, self.pixels, self.lora, words

    # -- observations and actions
    @classmethod
    def preprocess(cls, raw):
        """The simulator's arrays -> what an episode stores: pictures (V, h, w, 3) uint8 and proprio (8,), the
        hand's place in metres, axis times angle in radians, the finger joints in metres
        (experiments/robot/libero/libero_utils.py). A suite may give "proprio" itself."""
        proprio = raw.get("proprio")
        if proprio is None:
            x, y, z, w = np.clip(raw["robot0_eef_quat"], -1, 1)
            sine = math.sqrt(1 - w * w)  # of half the angle
            axis_angle = np.array([x, y, z]) * (2 * math.acos(w) / sine if sine > 1e-8 else 0)
            proprio = np.concatenate([raw["robot0_eef_pos"], axis_angle, raw["robot0_gripper_qpos"]])
        # Turned by 180 degrees, as in OpenVLA-OFT's training.
        pictures = [cls.prepare_picture(raw[name][::-1, ::-1]) for name in cls.PICTURES]
        return dict(pictures=np.stack(pictures), proprio=proprio)

    @staticmethod
    def prepare_picture(picture):
        """A camera's picture, upright, (h, w, 3) uint8 -> what the towers look at, (224, 224, 3) uint8."""
        return openvla_picture(picture)

    def bounds(self, kind):
        """The lower bound of "action" (A,) or "proprio" (P,), and the width of its range, numpy."""
        low = np.array(self.statistics[kind]["q01"])
        high = np.array(self.statistics[kind]["q99"])
        return low, high - low + 1e-8

    def continuous_gripper(self) -> bool:
        """Whether the gripper is a number, as the last entry of "mask" in the actions' statistics says: the
        dimensions that are normalised, in a dataset_statistics.json. LIBERO's gripper is a sign."""
        return bool(self.statistics["action"].get("mask", [False])[-1])

    def to_env_actions(self, normalised):
        """Head units -> the environment's (..., A): motion within its bounds; the gripper, which is the last
        dimension, -1 open or +1 closed, or where it is continuous a number within its bounds too."""
        low, width = self.bounds("action")
        normalised = torch.as_tensor(normalised).detach().cpu().double().numpy()
        actions = (normalised + 1) / 2 * width + low
        if not self.continuous_gripper():
            actions[..., -1] = np.sign(1 - 2 * normalised[..., -1])
        return actions

    def from_env_actions(self, actions):
        """The inverse of to_env_actions, numpy (..., A) -> a float32 tensor (..., A): labels, clipped to the
        bounds as in OpenVLA-OFT's training."""
        low, width = self.bounds("action")
        normalised = np.clip(2 * (actions - low) / width - 1, -1, 1)
        if not self.continuous_gripper():
            normalised[..., -1] = (1 - np.sign(actions[..., -1])) / 2
        return torch.tensor(normalised, dtype=torch.float32)

    # -- the forward pass
    def embed(self, observations, instructions):
        """-> the sequence's embeddings (B, L, D), its mask (B, 1, L, L) and its position ids (B, L)."""
        words = self.language_model.model.embed_tokens
        device = words.weight.device
        pictures = np.stack([observation["pictures"] for observation in observations])
        pictures = torch.as_tensor(pictures, dtype=torch.float32, device=device) / 255
        pictures = pictures.permute(0, 1, 4, 2, 3)  # B V 3 h w
        seen = []
        for tower, norm in zip(self.vision_backbone.values(), self.pixels):
            mean = torch.tensor(norm["mean"], device=device)[:, None, None]
            std = torch.tensor(norm["std"], device=device)[:, None, None]
            seen.append(tower(((pictures - mean) / std).flatten(0, 1).to(words.weight)))  # BV P width
        patches = self.projector(torch.cat(seen, -1)).unflatten(0, pictures.shape[:2]).flatten(1, 2)  # B VP D
        low, width = self.bounds("proprio")
        proprio = np.stack([observation["proprio"] for observation in observations])
        proprio = torch.as_tensor(np.clip(2 * (proprio - low) / width - 1, -1, 1), dtype=torch.float32)
        proprio = self.proprio_projector(proprio.to(words.weight))[:, None]  # B 1 D
        texts = [self.PROMPT.format(text.lower()) + " " for text in instructions]
        tokens = self.tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left",
                                return_tensors="pt").to(device)
        B = len(texts)
        zeros = self.A * self.chunk
        ends = words(torch.tensor([self.BOS, self.STOP], device=device))
        first, stop = ends.expand(B, -1, -1).split(1, 1)  # B 1 D each
        blank = patches.new_zeros(B, zeros, patches.shape[-1])
        x = torch.cat([first, patches, proprio, words(tokens.input_ids), blank, stop], 1)  # B L D
        real = F.pad(tokens.attention_mask, (patches.shape[1] + 2, zeros + 1), value=1).bool()  # B L
        mask = real[:, None, None].expand(-1, 1, x.shape[1], -1)  # all see all, but no padding
        return x, mask, real.cumsum(-1) - 1

    def decode(self, x, **inputs):
        """The decoder's last hidden states, (B, L, D). Adapters, kept in float32, compute as the rest."""
        # A context of its own for each call: autocast's copies of weights, made without gradient in the first
        # pass, would have none in the second.
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            return self.language_model.model(inputs_embeds=x, **inputs).last_hidden_state

    def trains(self, *parts):
        """Whether gradient is wanted of any of these modules."""
        return torch.is_grad_enabled() and any(p.requires_grad for part in parts for p in part.parameters())

    def features(self, observations, instructions):
        """What the heads read, (B, H, A D): the final hidden states of each action step's A positions, with
        gradient as far back as any part trains.

        Where the decoder trains and what feeds it does not, one pass without gradient fills a cache, which is
        cropped to what precedes the space; the last A H + 2 positions run again, with gradient. In exact mode
        the first pass has seen them too, so that the result is that of one pass over the whole sequence.
        """
        from transformers import DynamicCache
        last = self.A * self.chunk + 2  # the space, the zeros, the stop
        whole = self.trains(self.vision_backbone, self.projector, self.proprio_projector)
        once = self.prefix == "exact" and (whole or not self.trains(self.language_model))
        end = -last if self.prefix == "prompt" else None
        cache = None if once else DynamicCache()
        with torch.set_grad_enabled(whole):
            x, mask, positions = self.embed(observations, instructions)
            hidden = self.decode(x[:, :end], attention_mask=mask[:, :, :end, :end],
                                 position_ids=positions[:, :end], past_key_values=cache, use_cache=not once)
        if not once:
            if self.prefix == "exact":
                cache.crop(-last)
            hidden = self.decode(x[:, -last:], attention_mask=mask[:, :, -last:],
                                 position_ids=positions[:, -last:], past_key_values=cache)
        hidden = hidden[:, -last:-2]  # B AH D
        return hidden.unflatten(1, (self.chunk, self.A)).flatten(2)
