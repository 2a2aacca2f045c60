"""The discriminator's heads (Phase II, step 3): tokens of several blocks and the condition -> one logit.

One logit for the whole video, because frame-wise logits reward still videos.
Axes: B batch, N video tokens, M image tokens, L text tokens, Q queries, D width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vpae.config import Head
from vpae.experiment import ConfigError
from vpae.models.wan import Condition, default_taps


def _projection(width: int, d: int) -> nn.Module:
    """Wan's residual stream has a few very large channels; without a norm they would be all the head sees."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, d))


class SemanticHead(nn.Module):
    """Learnable queries, informed by image and text, that look at each tapped layer.

    Args:
        config: width, attention heads, queries, and whether semantics are joined in.
        feature_dim: width of the backbone's tokens.
        taps: number of tapped layers.
        text_dim, image_dim: widths of the condition's embeddings.
    """

    def __init__(self, config: Head, feature_dim: int, taps: int, text_dim: int, image_dim: int):
        super().__init__()
        d = config.dim
        self.semantics = config.semantics
        self.queries_QD = nn.Parameter(torch.randn(config.queries, d) * d**-0.5)
        self.text_in, self.image_in = _projection(text_dim, d), _projection(image_dim, d)
        self.self_norm = nn.LayerNorm(d)
        self.self_attention = nn.MultiheadAttention(d, config.heads, batch_first=True)
        self.layer_in = nn.ModuleList(_projection(feature_dim, d) for _ in range(taps))
        self.query_norm = nn.LayerNorm(d)
        self.cross_attention = nn.ModuleList(
            nn.MultiheadAttention(d, config.heads, batch_first=True) for _ in range(taps)
        )
        joined = taps * config.queries * d
        self.to_logit = nn.Sequential(nn.LayerNorm(joined), nn.Linear(joined, d), nn.SiLU(), nn.Linear(d, 1))

    def forward(self, layers_BND: list[Tensor], condition: Condition) -> Tensor:
        """Logits (B,), high for real; the same dtype as the head's weights."""
        dtype = self.queries_QD.dtype
        queries = self.queries_QD.expand(len(condition.text_BLD), -1, -1)
        tokens, padding = queries, None
        if self.semantics:
            image = self.image_in(condition.image_BND.to(dtype))
            text = self.text_in(condition.text_BLD.to(dtype))
            tokens = torch.cat([queries, image, text], dim=1)
            # The caption's end is followed by zeros, which say nothing.
            empty = (condition.text_BLD == 0).all(dim=-1)
            padding = torch.cat([empty.new_zeros(empty.shape[0], queries.shape[1] + image.shape[1]), empty], dim=1)
        normed = self.self_norm(tokens)
        q = queries.shape[1]
        attended, _ = self.self_attention(normed[:, :q], normed, normed, key_padding_mask=padding, need_weights=False)
        queries = queries + attended
        seen = []
        for project, attention, layer in zip(self.layer_in, self.cross_attention, layers_BND, strict=True):
            keys = project(layer.to(dtype))
            seen.append(attention(self.query_norm(queries), keys, keys, need_weights=False)[0])
        return self.to_logit(torch.cat(seen, dim=1).flatten(1)).squeeze(-1)


class ConvolutionHead(nn.Module):
    """3-D convolutions over the tapped layers, put back on their grid: the paper's ablation of the semantic head.

    Args:
        config: width.
        feature_dim: width of the backbone's tokens.
        taps: number of tapped layers.
        patch: video latents a token stands for, in frames, height and width.
    """

    def __init__(self, config: Head, feature_dim: int, taps: int, patch: tuple[int, int, int]):
        super().__init__()
        d, self.patch = config.dim, patch
        self.layer_in = nn.ModuleList(_projection(feature_dim, d) for _ in range(taps))
        self.near = nn.Conv3d(taps * d, d, 3, padding=1)
        self.far = nn.Conv3d(d, 2 * d, 3, padding=1, stride=(1, 2, 2))
        self.to_logit = nn.Linear(4 * d, 1)

    def forward(self, layers_BND: list[Tensor], condition: Condition) -> Tensor:
        """Logits (B,), high for real; the same dtype as the head's weights."""
        sizes = condition.frame_BCFHW.shape[2:]
        frames, height, _ = (size // patch for size, patch in zip(sizes, self.patch, strict=True))
        dtype = self.to_logit.weight.dtype
        tokens = torch.cat([f(layer.to(dtype)) for f, layer in zip(self.layer_in, layers_BND, strict=True)], dim=-1)
        grid = rearrange(tokens, "b (f h w) d -> b d f h w", f=frames, h=height)
        seen = rearrange(F.silu(self.far(F.silu(self.near(grid)))), "b d f h w -> b d (f h w)")
        return self.to_logit(torch.cat([seen.mean(-1), seen.std(-1)], dim=1)).squeeze(-1)


def taps_of(taps: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """The blocks whose outputs a head sees; the default where none are named.

    Raises:
        ConfigError: the network has fewer blocks.
    """
    taps = taps or default_taps(layers)
    if max(taps) >= layers:
        raise ConfigError(
            f"head.taps = {list(taps)}: the network has {layers} blocks, 0 to {layers - 1}; name some of "
            "these, or leave taps out"
        )
    return taps


def head_on(network: nn.Module, config: Head) -> tuple[nn.Module, tuple[int, ...]]:
    """An untrained head for the features of a Wan transformer, and the blocks whose outputs it is to see."""
    wan = network.config
    taps = taps_of(config.taps, wan.num_layers)
    width = wan.num_attention_heads * wan.attention_head_dim
    if config.form == "convolutions":
        return ConvolutionHead(config, width, len(taps), wan.patch_size), taps
    return SemanticHead(config, width, len(taps), wan.text_dim, wan.image_dim), taps
