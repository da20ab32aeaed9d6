"""QueST (arXiv 2407.15840), a policy of 20M parameters that chooses tokens, with the protocol of ript.py.

The pictures, the robot's state and the instruction become two context tokens. A GPT draws 8 skill tokens,
which a decoder turns into 32 action steps, of which the first 8 run before the next query.

Every module has the name that it has in the released files. Two environment variables are settings:

    QUEST_CLIP              CLIP's name on the hub, or a directory that has it, or, where neither is at hand,
                            an .npz of its features: np.savez(path, **{instruction: 512 numbers})
    QUEST_FULL_SOFTMAX=1    draw from all tokens and not, as released, from the five likeliest

Shapes: B batch, D width, T tokens per query (8), H action steps that run (8).
"""
import functools
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import ript
from policies.checkpoints import read_weights, refuse

# transformers is imported where it is used: simulators, which import this file, have no use for it.

# PyTorch's fast path runs without gradient only and rounds differently: old log_prob would not equal new.
torch.backends.mha.set_fastpath_enabled(False)

CODES = 1000  # tokens of the vocabulary, the product of LEVELS
LEVELS = 8, 5, 5, 5  # of each digit of a token, finite scalar quantisation
PLACES = 1, 8, 40, 200  # the place values of these digits
STEPS = 32  # action steps that 8 tokens decode to
STATES = dict(joint_states=7, ee_pos=3, gripper_states=2)  # sizes of the robot's state
HUB = "tanshh97/RIPT_VLA"  # where the released files are
PRE_NORM = dict(activation="gelu", batch_first=True, norm_first=True)
causal_mask = nn.Transformer.generate_square_subsequent_mask  # (length, device) -> (length, length)

# ------------------------------------------------------------------------------------------------- Modules
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
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = nn.Sequential()  # empty, it returns its input
        if stride > 1:
            self.downsample.append(nn.Conv2d(channels, out, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(out))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))

class SpatialSoftmax(nn.Module):
    """Where each channel looks: (B, C, 16, 16) -> (B, 2 C), in [-1, 1], all rows before all columns."""
    def __init__(self):
        super().__init__()
        line = torch.linspace(-1, 1, 16)
        self.register_buffer("pos_x", line.repeat_interleave(16)[None])  # of rows, whatever the name says
        self.register_buffer("pos_y", line.repeat(16)[None])
        self._spatial_conv = nn.Conv2d(128, 128, 1)  # in the released files, but not used

    def forward(self, x):
        heat = x.flatten(2).softmax(-1)  # B C 256
        return torch.cat([(heat * self.pos_x).sum(-1), (heat * self.pos_y).sum(-1)], -1)

class Keypoints(nn.Module):
    """Half a ResNet-18, and where its 128 channels look: pictures (B, 3, 128, 128) in [0, 1] -> (B, 256)."""
    def __init__(self):
        super().__init__()
        stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.resnet18_base = nn.Sequential(stem, nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.block_1 = ResidualBlock(64, 64)
        self.block_2 = ResidualBlock(64, 64)
        self.block_3 = ResidualBlock(64, 128, stride=2)
        self.block_4 = ResidualBlock(128, 128)
        self.projection_layer = nn.ModuleDict(dict(spatial_softmax=SpatialSoftmax(),
                                                   projection=nn.Linear(256, 256)))

    def forward(self, pictures):
        x = self.block_2(self.block_1(self.resnet18_base(pictures)))
        x = self.block_4(self.block_3(x))  # B 128 16 16
        return self.projection_layer.projection(self.projection_layer.spatial_softmax(x))

def conv_block(width, size):
    """The weights of a convolution in the encoder of actions, by their names."""
    conv = nn.ModuleDict(dict(conv=nn.Conv1d(width, width, size)))
    return nn.ModuleDict(dict(block=nn.Sequential(conv, nn.Identity(), nn.GroupNorm(8, width))))

class SkillVAE(nn.Module):
    """What lies between actions and tokens. Only the way back is run here; the encoder is in the files."""
    def __init__(self, width):
        super().__init__()
        blocks = nn.ModuleList(conv_block(width, size) for size in (5, 3, 3))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, **PRE_NORM)
        self.vq = nn.ModuleDict(dict(project_in=nn.Linear(width, 4), project_out=nn.Linear(4, width)))
        self.action_proj = nn.Linear(7, width)
        self.action_head = nn.Linear(width, 7)
        self.conv_block = nn.ModuleDict(dict(blocks=blocks))
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        layer = nn.TransformerDecoderLayer(width, 4, 4 * width, **PRE_NORM)
        self.decoder = nn.TransformerDecoder(layer, 4)
        self.add_positional_emb = nn.ModuleDict(dict(penc=Positions(width)))
        self.fixed_positional_emb = Positions(width)

    def decode(self, tokens):
        """Tokens (B, T) -> action steps (B, 32, 7)."""
        levels = torch.tensor(LEVELS, device=tokens.device)
        places = torch.tensor(PLACES, device=tokens.device)
        digits = tokens[..., None] // places % levels  # B T 4
        codes = (digits - levels // 2) / (levels // 2)  # in [-1, 1]
        skill = self.vq.project_out(codes)  # B T D, a set: nothing tells where a token stood
        queries = self.fixed_positional_emb(STEPS).expand(len(tokens), -1, -1)  # B 32 D
        return self.action_head(self.decoder(queries, skill, tgt_mask=causal_mask(STEPS, tokens.device)))

class SkillGPT(nn.Module):
    """Context (B, 2, D) and the first n tokens (B, n) -> logits of tokens 0 to n, (B, n + 1, 1000)."""
    def __init__(self, width):
        super().__init__()
        self.tok_emb = nn.Embedding(CODES + 1, width)  # the last one starts the sequence
        self.add_positional_emb = nn.ModuleDict(dict(penc=Positions(width)))
        layer = nn.TransformerEncoderLayer(width, 6, 4 * width, **PRE_NORM)
        self.decoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(width, CODES)
        self.lnf = nn.LayerNorm(width)

    def forward(self, context, tokens):
        words = self.tok_emb(F.pad(tokens, (1, 0), value=CODES))  # B n+1 D
        words = words + self.add_positional_emb.penc(words.shape[1])
        x = torch.cat([context, words], 1)
        x = self.decoder(x, mask=causal_mask(x.shape[1], x.device))
        return self.head(self.lnf(x[:, context.shape[1]:]))

# -------------------------------------------------------------------------------------------------- Policy
class QueST(nn.Module):
    """The policy. As released, a token is drawn from the five likeliest, but scored with the softmax over all
    1000, so that the ratio is not one of the density drawn from. With top_k = 0 both are the full softmax."""
    CLIP = os.environ.get("QUEST_CLIP", "openai/clip-vit-base-patch32")
    top_k = 5 if os.environ.get("QUEST_FULL_SOFTMAX", "0") in ("", "0") else 0
    chunk = 8  # action steps per query, H
    tokens_per_query = 8  # tokens per query, T
    # The authors' settings.
    PRESET = dict.fromkeys(ript.LIBERO, dict(
        image_size=128, iterations=30, groups=180, max_rejected=360, ppo_epochs=20, minibatch=6,
        micro_batch=512, clip_coef=0.2, loss_per="token", lr=1e-6, eval_every=1))
    PRESET["libero_90"] = PRESET["libero_90"] | dict(iterations=15, eval_every=3)
    # Success in % before stage 3 and after it, of 50 held-out contexts per task (arXiv 2505.17016).
    PUBLISHED = dict(
        SFT=dict(libero_goal=80.8, libero_spatial=87.4, libero_object=93.6, libero_10=68.8, libero_90=88.6),
        RIPT=dict(libero_goal=92.7, libero_spatial=95.6, libero_object=98.4, libero_10=87.5, libero_90=94.3))

    def __init__(self, width=384, state_width=128, skill_width=256):
        super().__init__()
        self.image_encoders = nn.ModuleDict(dict(agentview_rgb=Keypoints(), eye_in_hand_rgb=Keypoints()))
        self.lowdim_encoders = nn.ModuleDict()
        for name, size in STATES.items():
            projection = nn.Sequential(nn.Linear(size, state_width))
            self.lowdim_encoders[name] = nn.ModuleDict(dict(projection=projection))
        self.obs_proj = nn.Linear(2 * 256 + len(STATES) * state_width, width)
        self.task_encoder = nn.Linear(512, width)
        self.autoencoder = SkillVAE(skill_width)
        self.policy_prior = SkillGPT(width)
        self.texts = []  # of the run's tasks
        self.eval()  # for good: old and new log-probabilities must come from one function

    # -- weights
    @classmethod
    def load(cls, cfg):
        """The policy that a run starts from: --checkpoint, or the authors' SFT file of the suite."""
        refuse(cfg, "adapter", "scale_head", "scale_multiplier", "attention_mode")
        released = f"quest/{cfg.suite.upper().replace('_10', '_LONG')}_sft.pth"
        policy = cls.from_pretrained(cfg.checkpoint or released, cfg.device)
        policy.texts = list(ript.tasks_of(cfg).values())
        return policy

    @property
    def constants(self):
        """What actions depend on beside weights, for ript.fingerprint: CLIP's features of the texts, and
        whether tokens are drawn from all."""
        unusual = [] if self.top_k else ["all tokens"]
        return unusual + [text_feature(text, self.CLIP).tolist() for text in self.texts]

    @classmethod
    def from_pretrained(cls, path, device="cpu"):
        """Read save's directory, or an SFT or RIPT file of the authors: a path here, or quest/... on the hub.
        Raises ript.UserError unless the file has exactly the weights of a QueST."""
        if Path(path).is_dir():
            path = Path(path, "quest.pth")
        try:
            weights = quest_weights(str(path))
            policy = cls(width=len(weights["policy_prior.lnf.bias"]),
                         state_width=len(weights["lowdim_encoders.ee_pos.projection.0.bias"]),
                         skill_width=len(weights["autoencoder.action_proj.bias"]))
            policy.load_state_dict(weights)
        except Exception as error:  # torch and the hub have many kinds for a damaged, foreign or missing file
            # A message of torch's may be a page long.
            what = f"{type(error).__name__}: {str(error).split('. ')[0]}"
            raise ript.UserError(f"cannot read a QueST from {path}, {what}")
        return policy.to(device)

    def parameter_groups(self):
        """AdamW's groups: SkillGPT alone trains; its matrices decay, not its embeddings, biases and norms."""
        self.requires_grad_(False)
        self.policy_prior.requires_grad_(True)
        embeddings = self.policy_prior.tok_emb.weight
        matrices = [p for p in self.policy_prior.parameters() if p.ndim == 2 and p is not embeddings]
        vectors = [p for p in self.policy_prior.parameters() if p.ndim == 1]
        return [dict(params=matrices, weight_decay=1e-4),
                dict(params=[embeddings, *vectors], weight_decay=0.0)]

    def save(self, directory):
        """Write quest.pth, in the form of the authors' SFT files."""
        with ript.writing(Path(directory, "quest.pth")) as temporary:
            torch.save(dict(model=self.state_dict()), temporary)

    # -- the model
    def inputs(self, array):
        """An array as a tensor of the weights' precision, on their device."""
        return torch.as_tensor(array).to(self.obs_proj.weight)

    def context(self, agentview, eye_in_hand, joint_states, ee_pos, gripper_states, task_embedding):
        """The context tokens of task and observation, (B, 2, D), with gradient.

        agentview, eye_in_hand: uint8 pictures (B, h, w, 3), upside down, as robosuite renders them.
        joint_states (B, 7) in radians, ee_pos (B, 3) and gripper_states (B, 2) in metres; task_embedding
        (B, 512), CLIP's feature of the instruction."""
        seen = []
        for encode, pictures in zip(self.image_encoders.values(), (agentview, eye_in_hand)):
            pictures = self.inputs(pictures).permute(0, 3, 1, 2) / 255  # B 3 h w
            seen.append(encode(F.interpolate(pictures, (128, 128), mode="bilinear")))
        for encode, states in zip(self.lowdim_encoders.values(), (joint_states, ee_pos, gripper_states)):
            seen.append(encode.projection(self.inputs(states)))
        task = self.task_encoder(self.inputs(task_embedding))
        return torch.stack([task, self.obs_proj(torch.cat(seen, -1))], 1)

    def sample(self, context, generators):
        """Draw the tokens one by one, with a numpy Generator per row: (B, 2, D) -> (B, T)."""
        size = self.tokens_per_query, self.top_k or CODES
        noise = np.stack([generator.gumbel(size=size) for generator in generators])
        noise = torch.tensor(noise).to(context)  # B T top_k
        tokens = torch.zeros(len(context), 0, dtype=torch.long, device=context.device)
        for t in range(self.tokens_per_query):
            logits, candidates = self.policy_prior(context, tokens)[:, -1].topk(size[1])
            # With Gumbel noise, the largest is a draw from softmax(logits).
            choice = (logits + noise[:, t]).argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, candidates.gather(-1, choice)], 1)
        return tokens

    def token_log_prob(self, context, tokens):
        """Log-probability of each token given those before it, with gradient: (B, 2, D), (B, T) -> (B, T)."""
        log_probs = self.policy_prior(context, tokens[:, :-1]).log_softmax(-1)  # B T 1000
        return log_probs.gather(-1, tokens[..., None]).squeeze(-1)

    def decode_actions(self, tokens):
        """Tokens (B, T) -> action steps (B, 32, 7) in the environment's units, not clipped."""
        return self.autoencoder.decode(tokens)

    # -- the protocol of ript.py
    @classmethod
    def preprocess(cls, raw):
        """The simulator's arrays under the names of context's arguments."""
        return dict(agentview=raw["agentview_image"], eye_in_hand=raw["robot0_eye_in_hand_image"],
                    joint_states=raw["robot0_joint_pos"], ee_pos=raw["robot0_eef_pos"],
                    gripper_states=raw["robot0_gripper_qpos"])

    @torch.no_grad()
    def act(self, observations, instructions, generators):
        """Draw a chunk for each of B observations: -> B chunks, with "actions" (H, 7), "scale", which is the
        perplexity of the tokens, and what log_prob needs: tokens and context, in place of the pictures.

        generators: of numpy, one each; where it is None, in evaluation, the picture seeds one, since the
        release draws tokens there too."""
        inputs = {name: np.stack([seen[name] for seen in observations]) for name in observations[0]}
        features = np.stack([text_feature(text, self.CLIP) for text in instructions])
        context = self.context(**inputs, task_embedding=features)
        seeded = []
        for generator, picture in zip(generators, inputs["agentview"]):
            seeded.append(generator or np.random.default_rng(int(picture.sum())))
        tokens = self.sample(context, seeded)
        log_prob = self.token_log_prob(context, tokens)
        actions = self.decode_actions(tokens)[:, :self.chunk].clamp(-1, 1)
        columns = dict(context=context, indices=tokens, log_prob=log_prob, scale=(-log_prob.mean(-1)).exp(),
                       actions=actions)
        columns = {name: column.cpu().numpy() for name, column in columns.items()}
        return [{name: column[b] for name, column in columns.items()} for b in range(len(observations))]

    def log_prob(self, chunks):
        """Log-probability of each token of B chunks, with gradient: (B, T)."""
        device = self.obs_proj.weight.device
        context = torch.tensor(np.stack([chunk["context"] for chunk in chunks])).to(device)
        tokens = torch.tensor(np.stack([chunk["indices"] for chunk in chunks])).to(device)
        return self.token_log_prob(context, tokens)

# --------------------------------------------------------------------------------------------------- Files
def quest_weights(path):
    """The weights in a file of save's or the authors', by their names; quest/... is a file on the hub."""
    if path.startswith("quest/"):
        from transformers.utils import cached_file
        path = cached_file(HUB, path)
    saved = read_weights(path)
    weights = saved.get("model", saved)
    # RIPT's files were written from inside DistributedDataParallel.
    return {name.removeprefix("module."): value for name, value in weights.items()}

@functools.cache
def text_feature(instruction, source):
    """CLIP's feature of an instruction, (512,), not normalised. source: what QUEST_CLIP may be."""
    try:
        if source.endswith(".npz"):
            return np.load(source)[instruction]
        from transformers import AutoTokenizer, CLIPModel
        words = AutoTokenizer.from_pretrained(source)(instruction, return_tensors="pt")
        output = CLIPModel.from_pretrained(source).get_text_features(**words)
        return output.pooler_output[0].detach().numpy()
    except Exception as error:  # numpy, transformers and the hub have many kinds
        raise ript.UserError(f"no feature of {instruction!r}: set QUEST_CLIP (policies/quest.py): {error}")
