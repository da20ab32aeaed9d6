"""OpenVLA-OFT (arXiv 2502.19645), a 7B policy that regresses action chunks, from its released files.

Two vision towers (DINOv2 and SigLIP) look at two pictures, a projector makes tokens of their patches, and a
Llama that attends both ways reads these, the robot's state and the instruction. From its hidden states at A H
empty positions the action head predicts a chunk of H actions, the mean of ript.LaplacePolicy's density.

Every module has the name that it has in the released checkpoints. Nothing that was downloaded is executed.
Source files named below are those of the released code, ript-vla and the openvla-oft that it contains.
"""
import io
import json
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from policies.files import (check_origin, fetch, fill, read_base, read_json, read_statistics, read_tokenizer,
                            weights_of)
from ript import LaplacePolicy, ScaleHead, read, require, write

# transformers, PEFT and the hub are imported where they are used: simulators, which import examples/laptop.py
# and so this file, would spend 3 seconds and 150 MB on them.

# ------------------------------------------------------------------------------------------------- Modules
def mlp(*widths):
    """Linear layers fc1, fc2, ... with exact GELU between them."""
    layers = OrderedDict(fc1=nn.Linear(*widths[:2]))
    for i in range(2, len(widths)):
        layers[f"gelu{i - 1}"] = nn.GELU()
        layers[f"fc{i}"] = nn.Linear(widths[i - 1], widths[i])
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
        seen = self.attn["proj"](seen)
        x = x + (seen * self.ls1["scale_factor"] if self.layer_scale else seen)
        thought = self.mlp(self.norm2(x))
        return x + (thought * self.ls2["scale_factor"] if self.layer_scale else thought)

class Tower(nn.Module):
    """A vision transformer with timm's names (DINOv2, SigLIP): pictures (B, 3, 224, 224) -> (B, P, D).

    It gives the output of block depth - 2. The last block, norm and attn_pool are never run, but the released
    checkpoints have them, and adapters of them."""
    def __init__(self, embed_dim, depth, num_heads, mlp_ratio=4., prefix=0, layer_scale=False, pool=False):
        super().__init__()
        D = embed_dim
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, D, 14, 14)))  # 224 / 14 = 16 patches a side
        self.pos_embed = nn.Parameter(torch.randn(1, 16 ** 2, D) * 0.02)
        self.prefix = prefix  # a class token and registers, which get no position
        if prefix:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
            self.reg_token = nn.Parameter(torch.zeros(1, prefix - 1, D))
        self.blocks = nn.Sequential(*[Block(D, num_heads, mlp_ratio, layer_scale) for _ in range(depth)])
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

def openvla_picture(picture):
    """A camera's picture as OpenVLA-OFT was trained with it: (h, w, 3) uint8 -> (224, 224, 3) uint8.

    TensorFlow's JPEG round trip (quality 95, fast integer DCT), Lanczos to 224 pixels, and the central 90% of
    the area, bilinearly at 224 pixels again (experiments/robot/openvla_utils.py)."""
    import simplejpeg  # here, because a GPU is measured without cameras and without it (examples/gpu.py)
    jpeg = io.BytesIO()
    Image.fromarray(picture).save(jpeg, "JPEG", quality=95)
    picture = simplejpeg.decode_jpeg(jpeg.getvalue(), fastdct=True, fastupsample=False)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, size=(224, 224), mode="lanczos", antialias=True).round().clamp(0, 255) / 255
    side = np.float32(0.9) ** np.float32(0.5)
    at = (1 - side) / 2 * 223 + torch.arange(224) * side  # the rows and columns to sample, in pixels
    first, share = at.long(), at.frac()
    left, right = x.index_select(-1, first), x.index_select(-1, first + 1)
    x = left + (right - left) * share
    above, below = x.index_select(-2, first), x.index_select(-2, first + 1)
    x = above + (below - above) * share[:, None]
    return (x * 255.5).floor().byte()[0].permute(1, 2, 0).numpy()

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
    # Measured on an H100: 18.7 GiB and 0.7 for each chunk. 3 are left for CUDA and the simulators' pictures.
    room = torch.cuda.get_device_properties(device).total_memory / 2 ** 30 - 3 - 18.7
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
    A, BOS, STOP = 7, 1, 2  # action dimensions; Llama's tokens
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
    imitated = ("action_head",)  # what stage 2 could train
    PRESET = dict(
        libero_spatial=released("libero-spatial", "LIBERO_SPATIAL", 2.0),
        libero_object=released("libero-object", "LIBERO_OBJECT", 5.0),
        libero_goal=released("libero-goal", "LIBERO_GOAL", 5.0, lr=1e-5),
        libero_10=released("libero-10", "LIBERO_LONG", 5.0))
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
        self.proprio_projector = mlp(8, D, D)
        self.language_model = LlamaForCausalLM(llama)
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
        self.origin = {}  # the settings that it is made for, where they are known
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
                "python examples/imitation.py --demos DIR fits one")
        if cfg.adapter or scale_head:
            folder = Path(cfg.adapter or Path(scale_head).parent)
            if (folder / "ript.json").exists():
                check_origin(read(folder / "ript.json", read_json), cls.origin_of(cfg), folder)
        policy = cls.from_pretrained(cfg.checkpoint, cfg.suite, cfg.adapter, scale_head, cfg.prefix,
                                     cfg.device)
        policy.origin = cls.origin_of(cfg)
        if not (cfg.adapter or cfg.eval):
            policy.add_lora()
        # The scale head stays as it is in stage 3.
        policy.train_only(cls.trained)
        policy.scale_multiplier = cfg.scale_multiplier
        policy.micro_batch = chunks_that_fit(cfg.device)
        return policy.to(cfg.device)

    @classmethod
    def origin_of(cls, cfg):
        """The settings that the weights and the rollouts must agree on; save writes them into ript.json."""
        return dict(suite=cfg.suite, checkpoint=Path(cfg.checkpoint).name, prefix=cfg.prefix,
                    image_size=cfg.image_size, collision=cfg.collision)

    @classmethod
    def describe(cls, folder, suite):
        """The constructor's arguments for the release in a directory, and the dtype of its weights."""
        llm, towers, dtype = read(folder / "config.json", cls.read_config)
        pixels = read(folder / "preprocessor_config.json",
                      lambda path: read_json(path)["tvf_normalize_params"])
        statistics = read(folder / "dataset_statistics.json", lambda path: read_statistics(path, suite))
        tokenizer = read(folder / "tokenizer.json", read_tokenizer)
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
        folder = read(path, fetch)
        arguments, stored = cls.describe(folder, suite)
        with torch.device("meta"):  # shapes without memory
            policy = read(folder / "config.json", lambda _: cls(**arguments, prefix=prefix))
        # First what takes no minutes, as reading the base may.
        adapter_folder = adapter and read(adapter, fetch)
        if scale_head:
            read(read(scale_head, fetch), lambda file: fill(file, **policy.scale_parts()))
        weights = {f"scale_head.{name}": value for name, value in policy.scale_head.state_dict().items()}
        for name, value in read_base(folder):
            kept = torch.float32 if is_adapter_or_head(name) else dtype or stored
            # A copy, which torch aligns: to the last bit, results depend on where in memory weights are.
            weights[name] = value.to(device, kept, copy=True)
        read(folder, lambda _: policy.load_state_dict(weights, assign=True))
        del weights
        policy.drop_unused()
        # The rotary embedding is in no file.
        llama = policy.language_model.model
        llama.rotary_emb = type(llama.rotary_emb)(llama.config)
        policy.to(device)
        policy.check_attention()
        if adapter:
            read(adapter_folder / "adapter_config.json", lambda file: policy.add_lora(read_json(file)))
            read(adapter_folder / "adapter_model.safetensors", policy.read_adapter)
            read(adapter_folder / "openvla_headers.pt", lambda file: fill(file, **policy.heads()))
        policy.train_only((*cls.trained, "scale_head"))
        return policy

    @torch.no_grad()
    def check_attention(self):
        """Raise UserError if a later word does not change an earlier output: LlamaModel takes a 4-D mask as
        it is, which another version of transformers may not do."""
        llama = self.language_model.model
        words = torch.tensor([[1, 2, 3], [1, 2, 4]])  # two sequences that differ in their last word
        x = llama.embed_tokens(words.to(llama.embed_tokens.weight.device))
        mask = torch.ones(2, 1, 3, 3, dtype=torch.bool, device=x.device)
        one, other = llama(inputs_embeds=x, attention_mask=mask).last_hidden_state[:, 0]
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
        origin = json.dumps(self.origin, indent=1)
        write(directory / "ript.json", lambda path: path.write_text(origin))
        if not self.lora:
            header = {name: weights_of(module) for name, module in self.scale_parts().items()}
            write(directory / "scale_header.pth", lambda path: torch.save(header, path))
            return
        heads = {name: weights_of(module) for name, module in self.heads().items()}
        write(directory / "openvla_headers.pt", lambda path: torch.save(heads, path))
        settings = json.dumps(dict(self.lora, peft_type="LORA"), indent=1)
        write(directory / "adapter_config.json", lambda path: path.write_text(settings))
        adapters = {"base_model.model." + name.replace(".default", ""): value.detach().cpu().contiguous()
                    for name, value in self.state_dict().items() if "lora_" in name}
        write(directory / "adapter_model.safetensors", lambda path: save_file(adapters, path))

    # -- observations and actions
    def preprocess(self, raw):
        """The simulator's arrays -> what an episode stores: pictures (V, h, w, 3) uint8 and proprio (8,), the
        hand's place in metres, axis times angle in radians, the finger joints in metres
        (experiments/robot/libero/libero_utils.py)."""
        x, y, z, w = np.clip(raw["robot0_eef_quat"], -1, 1)
        sine = math.sqrt(1 - w * w)  # of half the angle
        axis_angle = np.array([x, y, z]) * (2 * math.acos(w) / sine if sine > 1e-8 else 0)
        proprio = np.concatenate([raw["robot0_eef_pos"], axis_angle, raw["robot0_gripper_qpos"]])
        # Turned by 180 degrees, as in OpenVLA-OFT's training.
        pictures = [self.prepare_picture(raw[name][::-1, ::-1]) for name in self.PICTURES]
        return dict(pictures=np.stack(pictures), proprio=proprio)

    def prepare_picture(self, picture):
        """A camera's picture, upright, (h, w, 3) uint8 -> what the towers look at, (224, 224, 3) uint8."""
        return openvla_picture(picture)

    def bounds(self, kind):
        """The lower bound of "action" (7,) or "proprio" (8,), and the width of its range, numpy."""
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
        """The inverse of to_env_actions, numpy (..., 7) -> a float32 tensor (..., 7): labels, clipped to the
        bounds as in OpenVLA-OFT's training."""
        low, width = self.bounds("action")
        normalised = np.clip(2 * (actions - low) / width - 1, -1, 1)
        normalised[..., 6] = (1 - np.sign(actions[..., 6])) / 2
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
        llama = self.language_model.model
        last = self.A * self.chunk + 2  # the space, the zeros, the stop
        whole = self.trains(self.vision_backbone, self.projector, self.proprio_projector)
        once = self.prefix == "exact" and (whole or not self.trains(self.language_model))
        end = -last if self.prefix == "prompt" else None
        cache = None if once else DynamicCache()
        with torch.set_grad_enabled(whole):
            x, mask, positions = self.embed(observations, instructions)
            output = llama(inputs_embeds=x[:, :end], attention_mask=mask[:, :, :end, :end],
                           position_ids=positions[:, :end], past_key_values=cache, use_cache=not once)
        if not once:
            if self.prefix == "exact":
                cache.crop(-last)
            output = llama(inputs_embeds=x[:, -last:], attention_mask=mask[:, :, -last:],
                           position_ids=positions[:, -last:], past_key_values=cache)
        hidden = output.last_hidden_state[:, -last:-2]  # B AH D
        return hidden.unflatten(1, (self.chunk, self.A)).flatten(2)
