"""Tokens and FLOPs of a Wan image-to-video transformer, by formula.

A multiply-add counts as two operations; norms, activations and softmax are not counted, as is usual for "model FLOPs".
`tests/test_plan.py` holds the formulas against torch's own counter, at small size and at 14B.
Letters: N video tokens, L text tokens, M image tokens, D width, F feed-forward width.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from vpae.config import Geometry, Head, Lora
from vpae.planning.network import Network

Gradient = Literal["none", "input", "adapter", "weights"]
"""What a backward pass is for: nothing, the input of a frozen network, an adapter, or all weights."""

# Products of matrices in the backward pass for one in the forward pass, of linear layers and of attention (recomputing
# the attention's scores, as fused kernels do, is not counted). A frozen layer has no gradient of its weights.
BACKWARD_LINEAR = {"none": 0, "input": 1, "adapter": 1, "weights": 2}
BACKWARD_ATTENTION = {"none": 0, "input": 2, "adapter": 2, "weights": 2}
BACKWARD_CROSS = {"none": 0, "input": 1, "adapter": 2, "weights": 2}  # keys and values need no gradient on the way to x


@dataclass(frozen=True)
class Sequence:
    """How many tokens of each kind one clip has."""

    video: int
    text: int
    image: int


def sequence_of(geometry: Geometry, network: Network, text: int, image: int) -> Sequence:
    """The tokens of one clip: Wan2.1 has 32,760 at 81 x 832 x 480 and 75,600 at 81 x 1280 x 720."""
    return Sequence(prod(geometry.latent_shape) // prod(network.patch), text, image)


@dataclass(frozen=True)
class Flops:
    """Operations of one forward pass over one clip, by kind."""

    linear: float  # layers on the video tokens
    attention: float  # of video tokens among themselves
    cross: float  # of video tokens to text and image
    condition: float  # layers on text, image and time: they come before anything that depends on the video

    @property
    def forward(self) -> float:
        """Operations of a forward pass."""
        return self.linear + self.attention + self.cross + self.condition

    def backward(self, gradient: Gradient) -> float:
        """Operations of a backward pass, without what activation checkpointing computes again."""
        # No gradient goes through the condition to anywhere but its own layers' weights.
        condition = BACKWARD_LINEAR[gradient] if gradient == "weights" else 0
        return (
            self.linear * BACKWARD_LINEAR[gradient]
            + self.attention * BACKWARD_ATTENTION[gradient]
            + self.cross * BACKWARD_CROSS[gradient]
            + self.condition * condition
        )


def transformer_flops(network: Network, tokens: Sequence) -> Flops:
    """One forward pass over one clip."""
    n, text, image, d, f = tokens.video, tokens.text, tokens.image, network.width, network.ffn
    patch = prod(network.patch)
    block_linear = n * (6 * d * d + 2 * d * f)  # q, k, v, out; q, out of the cross-attention; feed-forward
    block_attention, block_cross = 2 * n * n * d, 2 * n * (text + image) * d
    block_condition = 2 * (text + image) * d * d  # keys and values of the cross-attention
    ends = n * d * patch * (network.in_channels + network.out_channels)
    embedders = (
        network.freq_dim * d
        + 7 * d * d  # time: one more layer, and six modulations
        + text * (network.text_dim * d + d * d)
        + image * (network.image_dim**2 + network.image_dim * d)
    )
    layers = network.layers
    return Flops(
        linear=2.0 * (layers * block_linear + ends),
        attention=2.0 * layers * block_attention,
        cross=2.0 * layers * block_cross,
        condition=2.0 * (layers * block_condition + embedders),
    )


def adapter_flops(network: Network, tokens: Sequence, lora: Lora) -> Flops:
    """What a low-rank adapter adds to a forward pass."""
    n, context, d, f, r = tokens.video, tokens.text + tokens.image, network.width, network.ffn, lora.rank
    block_video = n * r * (6 * 2 * d + 2 * (d + f))
    block_context = context * r * 2 * 2 * d
    return Flops(2.0 * network.layers * block_video, 0.0, 0.0, 2.0 * network.layers * block_context)


def head_flops(config: Head, network: Network, tokens: Sequence, taps: int) -> Flops:
    """One logit of the discriminator's head from features that are there already."""
    d, q, n = config.dim, config.queries, tokens.video
    semantics = tokens.text + tokens.image if config.semantics else 0
    condition = (tokens.text * network.text_dim + tokens.image * network.image_dim) * d if config.semantics else 0
    # Self-attention of the queries over themselves and the condition; then each tapped layer: in, keys, values.
    own = 2 * q * d * d + 2 * (q + semantics) * d * d
    tapped = taps * (n * (network.width * d + 2 * d * d) + 2 * q * d * d)
    joined = taps * q * d * d + d
    attention = 2 * q * (q + semantics) * d + taps * 2 * q * n * d
    return Flops(2.0 * (tapped + joined), 2.0 * attention, 0.0, 2.0 * (condition + own))
