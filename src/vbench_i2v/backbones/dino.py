"""DINO's vision transformer, with the names of `dino_vitbase16_pretrain.pth` and DINO's way of stretching positions.

Written here because other loaders of that file stretch the positions otherwise, which moves subject_consistency on
frames that are not square. Architecture: Caron et al. 2021 (ViT-B/16: pre-norm, eps 1e-6, exact GELU).
Axes: N images, H/W height and width, h/w patches, L tokens, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_NLD: Tensor) -> Tensor:
        query, key, value = self.qkv(x_NLD).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then two linear layers; each on normalised tokens and added to them."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x_NLD: Tensor) -> Tensor:
        x_NLD = x_NLD + self.attn(self.norm1(x_NLD))
        return x_NLD + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x_NLD))))


class DinoViT(nn.Module):
    """The class token after the final norm: (N, 3, H, W), ImageNet-normalised -> (N, D).

    Args:
        width, depth, heads: ViT-B by default.
        patch: side of a patch, pixels; what does not fill a patch at the right and below is left out.
        image: side of the square images it was trained on, pixels.
    """

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12, patch: int = 16, image: int = 224):
        super().__init__()
        self.patch = patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images_N3HW: Tensor) -> Tensor:
        patches_NLD = self.patch_embed["proj"](images_N3HW).flatten(2).transpose(1, 2)
        tokens_NLD = torch.cat([self.cls_token.expand(len(images_N3HW), -1, -1), patches_NLD], dim=1)
        tokens_NLD = tokens_NLD + self._positions(*images_N3HW.shape[-2:])
        for block in self.blocks:
            tokens_NLD = block(tokens_NLD)
        return self.norm(tokens_NLD)[:, 0]

    def _positions(self, height: int, width: int) -> Tensor:
        """The learnt positions, stretched to other shapes by the factor (h + 0.1) / 14, not to the size h."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        h, w = height // self.patch, width // self.patch
        if (h, w) == (side, side) and height == width:
            return self.pos_embed
        grid_1Dhw = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        factor = ((h + 0.1) / side, (w + 0.1) / side)
        grid_1Dhw = F.interpolate(grid_1Dhw, scale_factor=factor, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid_1Dhw.flatten(2).transpose(1, 2)], dim=1)
