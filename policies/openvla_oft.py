"""OpenVLA-OFT (arXiv 2502.19645), a 7B policy that regresses action chunks, from its released files.

Two vision towers (DINOv2 and SigLIP) see two pictures, a projector makes tokens of their patches, and a Llama that
attends both ways reads these, the robot's state and the instruction. Its hidden states at A H empty positions go to
the action head, whose chunk of H actions is the mean of ript.LaplacePolicy's distribution. Every module has the
name that it has in the released checkpoints. Nothing that was downloaded is executed.
"""
import io
import json
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ript
from ript import LaplacePolicy, ScaleHead, UserError, read, require

def mlp(*widths):
    """Linear layers fc1, fc2, ... with exact GELU between them."""
    layers = OrderedDict()
    for i in range(1, len(widths)):
        layers |= {f"fc{i}": nn.Linear(widths[i - 1], widths[i]), f"gelu{i}": nn.GELU()}
    layers.popitem()
    return nn.Sequential(layers)

class Block(nn.Module):
    """A pre-norm transformer block with timm's names: LayerNorm eps 1e-6, exact GELU, maybe LayerScale."""
    def __init__(self, dim, heads, mlp_ratio, layer_scale):
        super().__init__()
        self.heads = heads
        self.layer_scale = layer_scale
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)))
        self.mlp = mlp(dim, int(dim * mlp_ratio), dim)
        if layer_scale:
            self.ls1 = nn.ParameterDict(dict(scale_factor=torch.ones(dim)))
            self.ls2 = nn.ParameterDict(dict(scale_factor=torch.ones(dim)))

    def forward(self, x):
        B, P, D = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(B, P, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # B heads P width, each
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, P, D)
        if not self.layer_scale:
            x = x + self.attn["proj"](seen)
            return x + self.mlp(self.norm2(x))
        x = x + self.attn["proj"](seen) * self.ls1["scale_factor"]
        return x + self.mlp(self.norm2(x)) * self.ls2["scale_factor"]

class Tower(nn.Module):
    """A vision transformer with timm's names (DINOv2, SigLIP): pictures (B, 3, h, w) -> patches (B, P, D).

    OpenVLA reads block depth - 2 and no norm. What comes after it is in the released checkpoints and has
    adapters there, so it is built too: the last block, norm and attn_pool are never run.
    """
    def __init__(self, embed_dim, depth, num_heads, mlp_ratio=4., prefix=0, layer_scale=False, pool=False):
        super().__init__()
        D = embed_dim
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, D, 14, 14)))  # 224 / 14 = 16 patches a side
        self.pos_embed = nn.Parameter(torch.randn(1, 16 ** 2, D) * 0.02)
        self.prefix = prefix  # a class token and registers, which get no position
        if prefix:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
            self.reg_token = nn.Parameter(torch.zeros(1, prefix - 1, D))
        self.blocks = nn.Sequential(*(Block(D, num_heads, mlp_ratio, layer_scale) for _ in range(depth)))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        if pool:
            self.attn_pool = nn.ModuleDict(dict(
                q=nn.Linear(D, D), kv=nn.Linear(D, 2 * D), proj=nn.Linear(D, D), norm=nn.LayerNorm(D),
                mlp=mlp(D, int(D * mlp_ratio), D)))
            self.attn_pool.latent = nn.Parameter(torch.zeros(1, 1, D))

    def forward(self, pictures):
        x = self.patch_embed["proj"](pictures).flatten(2).mT + self.pos_embed  # B P D
        if self.prefix:
            extra = torch.cat([self.cls_token, self.reg_token], 1)
            x = torch.cat([extra.expand(len(x), -1, -1), x], 1)
        return self.blocks[:-1](x)[:, self.prefix:]

class MLPResNet(nn.Module):
    """The body of OpenVLA-OFT's heads: (B, H, wide) -> (B, H, out). The residual joins after the ReLU."""
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
            x = x + block["ffn"](x)
        return self.fc2(self.layer_norm2(x))

class ActionHead(nn.Module):
    """The L1 head: (B, H, A D) -> (B, H, A), normalised actions."""
    def __init__(self, wide, hidden, A):
        super().__init__()
        self.model = MLPResNet(wide, hidden, A)

    def forward(self, features):
        return self.model(features)

def openvla_picture(picture):
    """A camera's picture as OpenVLA-OFT was trained with it: (h, w, 3) uint8 -> (224, 224, 3) uint8.

    TensorFlow's JPEG round trip (quality 95, fast integer DCT), Lanczos to 224 pixels, and the central 90% of the
    area, bilinearly at 224 pixels again (experiments/robot/openvla_utils.py in the release).
    """
    jpeg = io.BytesIO()
    Image.fromarray(picture).save(jpeg, "JPEG", quality=95)
    picture = simplejpeg.decode_jpeg(jpeg.getvalue(), fastdct=True, fastupsample=False)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, size=(224, 224), mode="lanczos", antialias=True).round().clamp(0, 255) / 255
    side = np.float32(0.9) ** np.float32(0.5)
    at = (1 - side) / 2 * 223 + torch.arange(224) * side  # the rows and columns to sample, in pixels
    first = at.long()
    share = at.frac()
    for axis in (-1, -2):
        left = x.index_select(axis, first)
        right = x.index_select(axis, first + 1)
        weight = share if axis == -1 else share[:, None]
        x = left + (right - left) * weight
    return (x * 255.5).floor().byte()[0].permute(1, 2, 0).numpy()

def fetch(path) -> Path:
    """A local path as it is; OWNER/NAME or OWNER/NAME/PATH in the Hugging Face hub, downloaded."""
    path = Path(path)
    if path.exists():
        return path
    if path.is_absolute() or len(path.parts) < 2:
        raise FileNotFoundError("no such file or directory")
    inside = "/".join(path.parts[2:])
    wanted = ["*.json", "*.safetensors", "*_checkpoint.pt"]
    if inside:
        wanted = [inside, f"{inside}/*"]
    try:
        root = snapshot_download("/".join(path.parts[:2]), allow_patterns=wanted, ignore_patterns="lora_adapter/*")
    except Exception as error:  # the hub has many
        raise FileNotFoundError(f"no such file or directory, and nothing from the hub: {error}")
    return Path(root, inside)

def read_json(path):
    """The content of a file of JSON."""
    return read(path, lambda path: json.loads(path.read_text()))

def unpickle(path):
    """The tensors in a file of torch's; nothing in it is executed."""
    return read(path, lambda path: torch.load(path, map_location="cpu", weights_only=True))

def named(part, weights):
    """Weights of a part of the model under their names in the whole."""
    return {part + name.removeprefix("module."): value for name, value in weights.items()}

def read_base(path):
    """The released weights: safetensors of the model, and a file for each of the parts that OFT adds."""
    from safetensors.torch import load_file
    weights = {}
    for file in sorted(path.glob("model*.safetensors")):
        weights.update(read(file, load_file))
    for file in sorted(path.glob("*--*_checkpoint.pt")):
        weights.update(named(file.name.split("--")[0] + ".", unpickle(file)))
    return weights

def read_scale_head(path):
    """A released scale_header.pth."""
    header = unpickle(fetch_or_fail(path))
    weights = {}
    for key, part in (("scale_trunk", "scale_head.trunk."), ("log_b_head", "scale_head.log_b_head.")):
        require(key in header, f"cannot read {path}: it has no {key!r}")
        weights.update(named(part, header[key]))
    return weights

def read_adapter(folder):
    """The weights in a directory of RIPT's: LoRA (PEFT's names) and the two heads."""
    from safetensors.torch import load_file
    weights = {}
    for name, value in read(folder / "adapter_model.safetensors", load_file).items():
        # The authors' files also have a copy of lm_head, which nobody needs.
        if "lora_" in name:
            weights[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")] = value
    heads = unpickle(folder / "openvla_headers.pt")
    for key, part in (("action_header", "action_head."), ("scale_header", "scale_head.")):
        require(key in heads, f"cannot read {folder / 'openvla_headers.pt'}: it has no {key!r}")
        weights.update(named(part, heads[key]))
    return weights

def fetch_or_fail(path) -> Path:
    """fetch, with a UserError that names the path."""
    return read(path, fetch)

def is_adapter_or_head(name) -> bool:
    """Whether a parameter is kept in float32 and saved with the adapters."""
    return "lora_" in name or name.startswith(("action_head", "scale_head"))

class OpenVLAOFT(LaplacePolicy):
    """OpenVLA-OFT with a Laplace scale head.

    The sequence is BOS | patches of each camera | proprio | padding, prompt, space | A H zeros | stop. As a language
    model predicts the next token, the heads read the hidden states of the space and the first A H - 1 zeros.

    prefix="exact" is the function that OpenVLA-OFT was trained with (prismatic/extern/hf/modeling_prismatic.py); with
    "prompt", as the released RIPT adapters were trained, what precedes the space does not see what follows it.
    """
    A, BOS, STOP = 7, 1, 2
    PICTURES = ("agentview_image", "robot0_eye_in_hand_image")
    PROMPT = "In: What action should the robot take to {}?\nOut:"
    TOWERS = (dict(embed_dim=1024, depth=24, num_heads=16, prefix=5, layer_scale=True),
              dict(embed_dim=1152, depth=27, num_heads=16, mlp_ratio=3.7362, pool=True))
    LORA = dict(r=32, lora_alpha=16, lora_dropout=0.0, bias="none", init_lora_weights="gaussian",
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
                                "lm_head", "qkv", "q", "kv", "proj", "fc1", "fc2", "fc3"])
    # What stage 3 trains, by the first parts of names: of these only adapters and heads.
    trained = ("language_model.model.layers", "action_head")
    adapters_only = True
    imitated = ("action_head",)  # what stage 2 could train; its preset fits the scale head alone
    PRESET = dict(
        libero_spatial=dict(
            checkpoint="moojink/openvla-7b-oft-finetuned-libero-spatial", act_batch=8, micro_batch=4,
            scale_head="tanshh97/RIPT_VLA/openvla_oft/scale_header/LIBERO_SPATIAL_scale_header.pth",
            scale_multiplier=2.0),
        libero_object=dict(
            checkpoint="moojink/openvla-7b-oft-finetuned-libero-object", act_batch=8, micro_batch=4,
            scale_head="tanshh97/RIPT_VLA/openvla_oft/scale_header/LIBERO_OBJECT_scale_header.pth",
            scale_multiplier=5.0),
        libero_goal=dict(
            checkpoint="moojink/openvla-7b-oft-finetuned-libero-goal", act_batch=8, micro_batch=4,
            scale_head="tanshh97/RIPT_VLA/openvla_oft/scale_header/LIBERO_GOAL_scale_header.pth",
            scale_multiplier=5.0, lr=1e-5),
        libero_10=dict(
            checkpoint="moojink/openvla-7b-oft-finetuned-libero-10", act_batch=8, micro_batch=4,
            scale_head="tanshh97/RIPT_VLA/openvla_oft/scale_header/LIBERO_LONG_scale_header.pth",
            scale_multiplier=5.0))
    # Stage 2 is the fit of the scale head alone.
    IMITATION = {suite: dict(checkpoint=preset["checkpoint"], sft_steps=0, image_size=128)
                 for suite, preset in PRESET.items()}

    def __init__(self, llm, towers, pixels, statistics, tokenizer=None, prefix="exact"):
        """llm: arguments of LlamaConfig; towers: of each tower; pixels: each tower's mean and std of 0..1;
        statistics: q01 and q99 of action and proprio, the bounds that become -1 and 1."""
        super().__init__()
        llama = LlamaConfig(**llm)
        D = llama.hidden_size
        wide = sum(tower["embed_dim"] for tower in towers)
        first, second = (self.make_tower(**tower) for tower in towers)
        self.vision_backbone = nn.ModuleDict(dict(featurizer=first, fused_featurizer=second))
        self.projector = mlp(wide, 4 * wide, D, D)
        self.proprio_projector = mlp(8, D, D)
        self.language_model = LlamaForCausalLM(llama)
        self.action_head = ActionHead(self.A * D, D, self.A)
        # On the CPU even if the rest has no memory yet, because a checkpoint may lack this head.
        with torch.device("cpu"):
            self.scale_head = ScaleHead(MLPResNet(self.A * D, D, D), D, self.A)
        self.pixels = pixels
        self.statistics = statistics
        self.tokenizer = tokenizer
        self.prefix = prefix
        self.lora = None  # the settings of the adapters that there are
        # For good: old and new log-probabilities must come from one function.
        self.eval()

    def make_tower(self, **sizes):
        """A vision tower: pictures (B, 3, 224, 224) -> (B, P, width)."""
        return Tower(**sizes)

    # -- files
    @classmethod
    def load(cls, cfg):
        """The policy that a run starts from. Without an adapter it gets a new one, and needs a scale head."""
        scale_head = "" if cfg.adapter or cfg.eval else cfg.scale_head
        require(cfg.adapter or scale_head or cfg.eval, "openvla-oft explores with a scale head: --scale_head FILE or "
                "--adapter DIR has one, python examples/imitation.py --demos DIR fits one")
        policy = cls.from_pretrained(cfg.checkpoint, cfg.suite, cfg.adapter, scale_head, cfg.prefix, cfg.device)
        if not cfg.adapter and not cfg.eval:
            policy.add_lora()
        # The scale head stays as it is in stage 3.
        policy.train_only(cls.trained)
        policy.scale_multiplier = cfg.scale_multiplier
        return policy.to(cfg.device)

    @classmethod
    def describe(cls, path, suite):
        """The constructor's arguments of the release in a directory, and the dtype of its weights."""
        config = read_json(path / "config.json")
        require("text_config" in config, f"cannot read {path / 'config.json'}: it is not an OpenVLA-OFT's")
        towers = [dict(sizes) for sizes in cls.TOWERS]
        for sizes, changes in zip(towers, config.get("timm_model_kwargs", ())):
            sizes.update(changes)
        pixels = []
        for norm in read_json(path / "preprocessor_config.json")["tvf_normalize_params"]:
            pixels.append(dict(mean=norm["mean"], std=norm["std"]))
        statistics = read_json(path / "dataset_statistics.json")
        name = suite if suite in statistics else f"{suite}_no_noops"
        require(name in statistics, f"{path / 'dataset_statistics.json'} is for {', '.join(statistics)}, not {suite!r}")
        tokenizer = None
        if (path / "tokenizer.json").exists():
            tokenizer = read(path / "tokenizer.json", lambda file: PreTrainedTokenizerFast(
                tokenizer_file=str(file), pad_token="<PAD>"))
        arguments = dict(llm=config["text_config"], towers=towers, pixels=pixels, statistics=statistics[name],
                         tokenizer=tokenizer)
        return arguments, getattr(torch, config["torch_dtype"])

    @classmethod
    def from_pretrained(cls, path, suite="", adapter=None, scale_head=None, prefix="exact", device="cpu",
                        dtype=None):
        """Read a released checkpoint or what save wrote, each from a path that fetch understands.

        suite picks the statistics of actions and proprio; adapter is a directory of LoRA weights and heads,
        scale_head a scale_header.pth. Weights go to the device in dtype (None: config.json's), the heads in
        float32. Raises ript.UserError, a ValueError, unless every tensor is known and every parameter given.
        """
        folder = fetch_or_fail(path)
        arguments, stored = read(path, lambda _: cls.describe(folder, suite))
        weights = read_base(folder)
        # Shapes without memory. What is in no file is made anew: the rotary embedding and the scale head.
        with torch.device("meta"):
            policy = cls(**arguments, prefix=prefix)
        llama = policy.language_model.model
        llama.rotary_emb = type(llama.rotary_emb)(llama.config)
        weights = named("scale_head.", policy.scale_head.state_dict()) | weights
        if scale_head:
            weights.update(read_scale_head(scale_head))
        if adapter:
            adapter_folder = fetch_or_fail(adapter)
            settings = read_json(adapter_folder / "adapter_config.json")
            read(adapter, lambda _: policy.add_lora(settings))
            weights.update(read_adapter(adapter_folder))
        sources = " and ".join(str(part) for part in (path, scale_head, adapter) if part)
        read(sources, lambda _: policy.fill(weights, device, dtype or stored))
        policy.train_only(cls.trained)
        policy.scale_head.requires_grad_(True)
        return policy

    def fill(self, weights, device, dtype):
        """Put weights in place, each as a copy on the device: torch aligns that, and to the last bit results
        depend on where in memory weights are. Raises RuntimeError for unknown and missing ones."""
        known = self.state_dict()
        state = {}
        for name in list(weights):
            value = weights.pop(name).to(device, torch.float32 if is_adapter_or_head(name) else dtype, copy=True)
            if name not in known:
                # PEFT moves the layers that it adapts into a base_layer.
                layer, _, kind = name.rpartition(".")
                name = f"{layer}.base_layer.{kind}"
            state[name] = value
        self.load_state_dict(state, assign=True)  # strict
        self.to(device)
        self.check_attention()

    @torch.no_grad()
    def check_attention(self):
        """Raise ValueError if a later word does not change an earlier output: LlamaModel takes a 4-D mask as
        it is, which another version of transformers may not do."""
        llama = self.language_model.model
        words = torch.tensor([[1, 2, 3], [1, 2, 4]])
        x = llama.embed_tokens(words.to(llama.embed_tokens.weight.device))  # two sequences
        mask = torch.ones(2, 1, 3, 3, dtype=torch.bool, device=x.device)
        one, other = llama(inputs_embeds=x, attention_mask=mask).last_hidden_state[:, 0]
        if torch.equal(one, other):
            raise ValueError("attention is causal with this transformers, install requirements.txt's")

    def add_lora(self, settings=None):
        """Add adapters (PEFT), in float32, to every linear layer outside the heads."""
        from peft import LoraConfig, inject_adapter_in_model
        settings = settings or self.LORA
        self.lora = {name: settings[name] for name in self.LORA}
        heads = r"(action_head|scale_head|proprio_projector)\..*"
        inject_adapter_in_model(LoraConfig(**self.lora, exclude_modules=heads), self)
        for name, p in self.named_parameters():
            if "lora_" in name:
                p.data = p.data.float()

    def train_only(self, parts):
        """Require gradient of the parameters whose names begin with one of parts, and of no others."""
        for name, p in self.named_parameters():
            chosen = name.startswith(tuple(parts))
            p.requires_grad_(chosen and (is_adapter_or_head(name) or not self.adapters_only))

    def save(self, directory):
        """Write the adapters and the two heads as the authors do; the base model stays where it is."""
        from safetensors.torch import save_file
        adapters, action_head, scale_head = {}, {}, {}
        for name, value in self.state_dict().items():
            value = value.detach().cpu().contiguous()
            if "lora_" in name:
                adapters["base_model.model." + name.replace(".default", "")] = value
            elif name.startswith("action_head."):
                action_head[name.removeprefix("action_head.")] = value
            elif name.startswith("scale_head."):
                scale_head[name.removeprefix("scale_head.")] = value
        heads = dict(action_header=action_head, scale_header=scale_head)
        header = {}
        for key, part in (("scale_trunk", "trunk."), ("log_b_head", "log_b_head.")):
            header[key] = {name.removeprefix(part): value for name, value in scale_head.items()
                           if name.startswith(part)}
        ript.write(directory / "openvla_headers.pt", lambda path: torch.save(heads, path))
        ript.write(directory / "scale_header.pth", lambda path: torch.save(header, path))
        if self.lora:
            settings = json.dumps(dict(self.lora, peft_type="LORA"), indent=1)
            ript.write(directory / "adapter_config.json", lambda path: path.write_text(settings))
            ript.write(directory / "adapter_model.safetensors", lambda path: save_file(adapters, path))

    # -- observations and actions
    def preprocess(self, raw):
        """The simulator's arrays -> what an episode stores: pictures (V, h, w, 3) uint8, proprio (8,)."""
        x, y, z, w = np.clip(raw["robot0_eef_quat"], -1, 1)
        sine = math.sqrt(1 - w * w)  # of half the angle
        axis_angle = np.array([x, y, z]) * (2 * math.acos(w) / sine if sine > 1e-8 else 0)
        proprio = np.concatenate([raw["robot0_eef_pos"], axis_angle, raw["robot0_gripper_qpos"]])
        pictures = []
        for name in self.PICTURES:
            # Turned by 180 degrees, as in OpenVLA-OFT's training.
            pictures.append(self.prepare_picture(raw[name][::-1, ::-1]))
        return dict(pictures=np.stack(pictures), proprio=proprio)

    def prepare_picture(self, picture):
        """A camera's picture (h, w, 3) uint8 -> the towers' (224, 224, 3) uint8."""
        return openvla_picture(picture)

    def bounds(self, kind):
        """The lower bound and the width of "action" (7,) or "proprio" (8,), numpy."""
        low = np.array(self.statistics[kind]["q01"])
        high = np.array(self.statistics[kind]["q99"])
        return low, high - low + 1e-8

    def to_env_actions(self, normalised):
        """Head units -> the environment's (..., 7): motion within its bounds, gripper -1 open, +1 closed."""
        low, width = self.bounds("action")
        normalised = torch.as_tensor(normalised).detach().cpu().double().numpy()
        actions = (normalised + 1) / 2 * width + low
        actions[..., 6] = np.sign(1 - 2 * normalised[..., 6])
        return actions

    def from_env_actions(self, actions):
        """The inverse of to_env_actions, within the bounds as in OpenVLA-OFT's training: labels, a tensor."""
        low, width = self.bounds("action")
        normalised = np.clip(2 * (actions - low) / width - 1, -1, 1)
        normalised[..., 6] = (1 - np.sign(actions[..., 6])) / 2
        return torch.tensor(normalised, dtype=torch.float32)

    # -- the forward pass
    def embed(self, observations, instructions):
        """-> the sequence's embeddings (B, L, D), its mask (B, 1, L, L) and its position ids (B, L)."""
        words = self.language_model.model.embed_tokens
        device = words.weight.device
        pictures = torch.as_tensor(np.stack([o["pictures"] for o in observations]), dtype=torch.float32, device=device)
        pictures = pictures.permute(0, 1, 4, 2, 3) / 255  # B V 3 h w
        seen = []
        for tower, norm in zip(self.vision_backbone.values(), self.pixels):
            mean = torch.tensor(norm["mean"], device=device)[:, None, None]
            std = torch.tensor(norm["std"], device=device)[:, None, None]
            seen.append(tower(((pictures - mean) / std).flatten(0, 1).to(words.weight)))  # BV P width
        patches = self.projector(torch.cat(seen, -1)).unflatten(0, pictures.shape[:2])  # B V P D
        patches = patches.flatten(1, 2)
        low, width = self.bounds("proprio")
        proprio = np.stack([np.clip(2 * (o["proprio"] - low) / width - 1, -1, 1) for o in observations])
        proprio = torch.as_tensor(proprio, dtype=torch.float32, device=device)
        proprio = self.proprio_projector(proprio.to(words.weight))[:, None]  # B 1 D
        texts = [self.PROMPT.format(text.lower()) + " " for text in instructions]
        tokens = self.tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left",
                                return_tensors="pt").to(device)
        B = len(texts)
        zeros = self.A * self.chunk
        first = words(tokens.input_ids.new_full((B, 1), self.BOS))
        stop = words(tokens.input_ids.new_full((B, 1), self.STOP))
        blank = patches.new_zeros(B, zeros, patches.shape[-1])
        x = torch.cat([first, patches, proprio, words(tokens.input_ids), blank, stop], 1)
        real = F.pad(tokens.attention_mask, (patches.shape[1] + 2, zeros + 1), value=1).bool()  # B L
        return x, real[:, None, None].expand(-1, 1, x.shape[1], -1), real.cumsum(-1) - 1

    def trains(self, *parts):
        """Whether gradient is wanted of any of these modules."""
        return torch.is_grad_enabled() and any(p.requires_grad for part in parts for p in part.parameters())

    def hidden(self, observations, instructions):
        """The final hidden states that the heads read, (B, A H, D), with gradient as far back as any trains."""
        last = self.A * self.chunk + 2  # the space, the zeros, the stop
        llama = self.language_model.model
        # What feeds the decoder has gradient only where it trains.
        whole = self.trains(self.vision_backbone, self.projector, self.proprio_projector)
        with torch.set_grad_enabled(whole):
            x, mask, positions = self.embed(observations, instructions)
        if self.prefix == "exact" and (whole or not self.trains(self.language_model)):
            with torch.set_grad_enabled(whole):
                hidden = llama(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False)
            return hidden.last_hidden_state[:, -last:-2]
        # One pass fills a cache, which is cropped to what precedes the space; the last positions run again, with
        # gradient. In exact mode the first pass has seen them too, so the result is that of one pass over all.
        end = None if self.prefix == "exact" else -last
        cache = DynamicCache()
        with torch.set_grad_enabled(whole):
            llama(inputs_embeds=x[:, :end], attention_mask=mask[:, :, :end, :end], position_ids=positions[:, :end],
                  past_key_values=cache, use_cache=True)
        if end is None:
            cache.crop(-last)
        hidden = llama(inputs_embeds=x[:, -last:], attention_mask=mask[:, :, -last:],
                       position_ids=positions[:, -last:], past_key_values=cache)
        return hidden.last_hidden_state[:, -last:-2]

    def features(self, observations, instructions):
        """What the heads read, (B, H, A D): the hidden states of an action step's A positions, side by side."""
        hidden = self.hidden(observations, instructions)  # B AH D
        return hidden.unflatten(1, (self.chunk, self.A)).flatten(2)
