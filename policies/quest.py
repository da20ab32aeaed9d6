"""QueST (arXiv 2407.15840), 20M parameters that choose tokens, through the policy protocol of ript.py.

Pictures, robot state and instruction become 2 context tokens; SkillGPT draws 8 tokens, which decode to 32
action steps; 8 of these run. Modules have the names of the released files. In the environment, QUEST_CLIP is
CLIP's name on the hub, a directory that has it, or, where neither can be had, an .npz file of its features,
np.savez(path, **{instruction: 512 numbers}); QUEST_FULL_SOFTMAX=1 draws from all tokens, not the top 5."""
import functools
import os
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

import ript

torch.backends.mha.set_fastpath_enabled(False)  # it rounds in its own way: old log_prob would not equal new
CODES, STATES = 1000, dict(joint_states=7, ee_pos=3, gripper_states=2)
PRE_NORM = dict(activation="gelu", batch_first=True, norm_first=True)
causal_mask = nn.Transformer.generate_square_subsequent_mask

class Positions(nn.Module):
    """Sinusoidal positions 0 to number - 1, sine and cosine interleaved: (number, D)."""
    def __init__(self, width):
        super().__init__()
        self.register_buffer("inv_freq", 10000 ** (-torch.arange(0, width, 2) / width))

    def forward(self, number):
        angles = torch.arange(number, device=self.inv_freq.device)[:, None] * self.inv_freq
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)

class ResidualBlock(nn.Module):
    """ResNet-18's block with torchvision's names: (B, C, h, w) -> (B, C', h / stride, w / stride)."""
    def __init__(self, channels, out, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        shortcut = [nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)]
        self.downsample = nn.Sequential(*shortcut if stride > 1 else [])  # empty, it does nothing

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))

class Keypoints(nn.Module):
    """Half a ResNet-18, and where its 128 channels look: pictures (B, 3, 128, 128) in [0, 1] -> (B, 256)."""
    def __init__(self):
        super().__init__()
        stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.resnet18_base = nn.Sequential(stem, nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.block_1, self.block_2 = ResidualBlock(64, 64), ResidualBlock(64, 64)
        self.block_3, self.block_4 = ResidualBlock(64, 128, stride=2), ResidualBlock(128, 128)
        softmax, line = nn.Module(), torch.linspace(-1, 1, 16)
        softmax.register_buffer("pos_x", line.repeat_interleave(16)[None])  # of rows, whatever the name
        softmax.register_buffer("pos_y", line.repeat(16)[None])
        softmax._spatial_conv = nn.Conv2d(128, 128, 1)  # in the files, but without use
        self.projection_layer = nn.ModuleDict(dict(spatial_softmax=softmax, projection=nn.Linear(256, 256)))

    def forward(self, pictures):
        x = self.block_2(self.block_1(self.resnet18_base(pictures)))
        heat = self.block_4(self.block_3(x)).flatten(2).softmax(-1)  # B 128 256
        axes = self.projection_layer.spatial_softmax.buffers(recurse=False)
        return self.projection_layer.projection(torch.cat([(heat * axis).sum(-1) for axis in axes], -1))

def skill_vae(width):
    """What lies between actions and tokens; QueST.decode_actions has use for the way back alone."""
    conv = lambda size: nn.ModuleDict(dict(conv=nn.Conv1d(width, width, size)))
    block = lambda size: nn.Sequential(conv(size), nn.Identity(), nn.GroupNorm(8, width))
    blocks = nn.ModuleList(nn.ModuleDict(dict(block=block(size))) for size in (5, 3, 3))
    encoder = nn.TransformerEncoderLayer(width, 4, 4 * width, **PRE_NORM)
    return nn.ModuleDict(dict(
        vq=nn.ModuleDict(dict(project_in=nn.Linear(width, 4), project_out=nn.Linear(4, width))),
        action_proj=nn.Linear(7, width), action_head=nn.Linear(width, 7),
        conv_block=nn.ModuleDict(dict(blocks=blocks)),
        encoder=nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False),
        decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(width, 4, 4 * width, **PRE_NORM), 4),
        add_positional_emb=nn.ModuleDict(dict(penc=Positions(width))), fixed_positional_emb=Positions(width)))

class SkillGPT(nn.Module):
    """Context (B, 2, D) and the first n tokens (B, n) -> logits of tokens 0 to n, (B, n + 1, 1000)."""
    def __init__(self, width):
        super().__init__()
        self.tok_emb = nn.Embedding(CODES + 1, width)  # the last one starts the sequence
        self.add_positional_emb = nn.ModuleDict(dict(penc=Positions(width)))
        layer = nn.TransformerEncoderLayer(width, 6, 4 * width, **PRE_NORM)
        self.decoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head, self.lnf = nn.Linear(width, CODES), nn.LayerNorm(width)

    def forward(self, context, tokens):
        words = self.tok_emb(nn.functional.pad(tokens, (1, 0), value=CODES))
        x = torch.cat([context, words + self.add_positional_emb.penc(words.shape[1])], 1)
        x = self.decoder(x, mask=causal_mask(x.shape[1], x.device))
        return self.head(self.lnf(x[:, context.shape[1]:]))

class QueST(nn.Module):
    """The policy. As released, a token is drawn from the top 5 but scored with the softmax over all 1000: the
    ratio is not that of the density drawn from. With top_k = 0 it is drawn from the full softmax as well."""
    CLIP = os.environ.get("QUEST_CLIP", "openai/clip-vit-base-patch32")
    top_k = 0 if os.environ.get("QUEST_FULL_SOFTMAX") else 5
    chunk, TOKENS = 8, 8  # steps and tokens per query
    PRESET = dict.fromkeys(ript.LIBERO, dict(
        image_size=128, iterations=30, groups=180, max_rejected=360, passes=20,
        minibatch=6, micro_batch=512, clip=0.2, loss_per="token", lr=1e-6, eval_every=1))
    PRESET["libero_90"] = dict(PRESET["libero_90"], iterations=15, eval_every=3)

    def __init__(self, width=384, state_width=128, skill_width=256):
        super().__init__()
        state = lambda size: nn.ModuleDict(dict(projection=nn.Sequential(nn.Linear(size, state_width))))
        self.image_encoders = nn.ModuleDict(dict(agentview_rgb=Keypoints(), eye_in_hand_rgb=Keypoints()))
        self.lowdim_encoders = nn.ModuleDict({name: state(size) for name, size in STATES.items()})
        self.obs_proj, self.task_encoder = nn.Linear(512 + 3 * state_width, width), nn.Linear(512, width)
        self.autoencoder, self.policy_prior = skill_vae(skill_width), SkillGPT(width)
        self.eval()  # for good: old and new log-probabilities must come from one function

    def context(self, agentview, eye_in_hand, joint_states, ee_pos, gripper_states, task_embedding):
        """uint8 pictures (B, h, w, 3), upside down; floats (B, 7), (B, 3), (B, 2), (B, 512) -> (B, 2, D)."""
        to = lambda array: torch.as_tensor(array).to(self.obs_proj.weight)
        pictures = [to(picture).permute(0, 3, 1, 2) / 255 for picture in (agentview, eye_in_hand)]
        pictures = [nn.functional.interpolate(picture, (128, 128), mode="bilinear") for picture in pictures]
        states = [to(state) for state in (joint_states, ee_pos, gripper_states)]
        seen = [encode(picture) for encode, picture in zip(self.image_encoders.values(), pictures)]
        seen += [encode.projection(state) for encode, state in zip(self.lowdim_encoders.values(), states)]
        return torch.stack([self.task_encoder(to(task_embedding)), self.obs_proj(torch.cat(seen, -1))], 1)

    def token_log_prob(self, context, indices):
        """Of each token given those before it, with gradient: (B, 2, D) and (B, 8) -> (B, 8)."""
        log_probs = self.policy_prior(context, indices[:, :-1]).log_softmax(-1)
        return log_probs.gather(-1, indices[..., None]).squeeze(-1)

    def decode_actions(self, indices):
        """Tokens (B, 8) -> action steps (B, 32, 7) in the environment's units, not clipped."""
        levels, place = torch.tensor([[8, 5, 5, 5], [1, 8, 40, 200]], device=indices.device)
        digits = indices[..., None] // place % levels  # finite scalar quantisation: B 8 4
        vae, codes = self.autoencoder, (digits - levels // 2) / (levels // 2)  # in [-1, 1]
        skill = vae.vq.project_out(codes)  # B 8 D, a set: nothing tells where a token stood
        steps = vae.fixed_positional_emb(32).expand(len(indices), -1, -1)  # B 32 D
        return vae.action_head(vae.decoder(steps, skill, tgt_mask=causal_mask(32, indices.device)))

    def sample(self, context, generators):
        """Draw the tokens one by one, with a numpy Generator per row: (B, 2, D) -> (B, 8)."""
        indices = torch.zeros(len(context), 0, dtype=torch.long, device=context.device)
        noise = np.stack([g.gumbel(size=(8, self.top_k or CODES)) for g in generators])
        for gumbel in torch.tensor(noise).to(context).unbind(1):
            logits, tokens = self.policy_prior(context, indices)[:, -1].topk(gumbel.shape[-1])
            choice = (logits + gumbel).argmax(-1, keepdim=True)  # a draw from softmax(logits)
            indices = torch.cat([indices, tokens.gather(-1, choice)], 1)
        return indices

    def preprocess(self, raw):
        """The simulator's arrays under the names of context's arguments."""
        return dict(agentview=raw["agentview_image"], eye_in_hand=raw["robot0_eye_in_hand_image"],
                    joint_states=raw["robot0_joint_pos"], ee_pos=raw["robot0_eef_pos"],
                    gripper_states=raw["robot0_gripper_qpos"])

    @torch.no_grad()
    def act(self, observations, instructions, generators):
        """Records: "actions" (8, 7), "scale", the tokens' perplexity, and what log_prob needs, no pictures.
        generators: of numpy, one each; None, to evaluate, draws too, as released, seeded by the picture."""
        inputs = {name: np.stack([seen[name] for seen in observations]) for name in observations[0]}
        features = np.stack([text_feature(text, self.CLIP) for text in instructions])
        context = self.context(**inputs, task_embedding=features)
        seeded = []
        for generator, picture in zip(generators, inputs["agentview"]):
            seeded.append(generator or np.random.default_rng(int(picture.sum())))
        indices = self.sample(context, seeded)
        log_prob = self.token_log_prob(context, indices)
        columns = dict(context=context, indices=indices, log_prob=log_prob, scale=(-log_prob.mean(-1)).exp(),
                       actions=self.decode_actions(indices)[:, :self.chunk].clamp(-1, 1))
        return [dict(zip(columns, row)) for row in zip(*(x.cpu().numpy() for x in columns.values()))]

    def log_prob(self, records):
        """Log-probability of each token of the records, with gradient: (B, 8)."""
        column = lambda name: torch.tensor(np.stack([r[name] for r in records])).to(self.obs_proj.bias.device)
        return self.token_log_prob(column("context"), column("indices"))

    def parameter_groups(self):
        """AdamW's groups: SkillGPT alone trains; its matrices decay, not its embeddings, biases and norms."""
        gpt = self.requires_grad_(False).policy_prior.requires_grad_(True)
        matrices = [p for p in gpt.parameters() if p.ndim == 2 and p is not gpt.tok_emb.weight]
        others = [gpt.tok_emb.weight, *(p for p in gpt.parameters() if p.ndim == 1)]
        return [dict(params=matrices, weight_decay=1e-4), dict(params=others, weight_decay=0.0)]

    def save(self, directory):
        """Write quest.pth, in the form of the authors' SFT files."""
        ript.write(Path(directory) / "quest.pth", lambda path: torch.save({"model": self.state_dict()}, path))

    @classmethod
    def load(cls, cfg):
        """The policy that a run starts from."""
        released = f"quest/{cfg.suite.upper().replace('_10', '_LONG')}_sft.pth"
        return cls.from_pretrained(cfg.checkpoint or released, cfg.device)

    @classmethod
    def from_pretrained(cls, path, device="cpu"):
        """Of save's directory or an SFT or RIPT file of the authors, here or quest/... on the hub; strict."""
        try:
            path = str(Path(path) / "quest.pth" if Path(path).is_dir() else path)
            file = transformers.utils.cached_file("tanshh97/RIPT_VLA", path) if path[:6] == "quest/" else path
            read = torch.load(file, map_location="cpu", weights_only=True)
            weights = {name.removeprefix("module."): x for name, x in read.get("model", read).items()}
            policy = cls(*(len(weights[f"{name}.bias"]) for name in (
                "policy_prior.lnf", "lowdim_encoders.ee_pos.projection.0", "autoencoder.action_proj")))
            policy.load_state_dict(weights)
        except Exception as error:  # whatever torch and the hub say of a damaged, foreign or missing file
            what = f"{type(error).__name__}: {str(error).split('. ')[0]}"
            raise ript.UserError(f"cannot read a QueST from {path}, {what}")
        return policy.to(device)

@functools.cache
def text_feature(instruction, source):
    """CLIP's feature of an instruction, (512,), not normalised, from what QUEST_CLIP may be."""
    try:
        if source.endswith(".npz"):
            return np.load(source)[instruction]
        words = transformers.AutoTokenizer.from_pretrained(source)(instruction, return_tensors="pt")
        clip = transformers.CLIPModel.from_pretrained(source)
        return clip.get_text_features(**words).pooler_output[0].detach().numpy()
    except Exception as error:  # likewise
        raise ript.UserError(f"no feature of {instruction!r}: set QUEST_CLIP (policies/quest.py): {error}")
