"""What OpenVLA-OFT sees with: its two vision towers, with timm's names, and its way to prepare a picture."""
import io
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

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

def openvla_picture(picture):
    """A camera's picture as OpenVLA-OFT was trained with it: (h, w, 3) uint8 -> (224, 224, 3) uint8.

    TensorFlow's JPEG round trip (quality 95, fast integer DCT), Lanczos to 224 pixels, and the central 90% of
    the area, bilinearly at 224 pixels again (experiments/robot/openvla_utils.py)."""
    import simplejpeg  # here, because a GPU is measured without cameras and without it (experiments/gpu.py)
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
