"""Bytes of activations of a Wan image-to-video transformer and of the discriminator's head, by formula.

The formulas follow what autograd keeps in diffusers' `WanTransformerBlock`; `tests/test_plan.py` holds them against
counted bytes. Letters: N video tokens, C tokens of text and image, D width, F feed-forward width, d the head's width.
All for one clip; `share` is the part of the video tokens that one GPU has under context parallelism.
"""

from dataclasses import dataclass

from vpae.config import Head
from vpae.planning.counting import Gradient, Sequence
from vpae.planning.network import Network

FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Precision:
    """How a forward pass computes.

    Attributes:
        compute: bytes of a value in matrix products: 4 in float32, 2 under bfloat16 autocast. What the blocks add to,
            norms and modulation are float32 either way, see `training.precision`.
        fused_norm: whether RMSNorm is one kernel, as on a GPU; on a CPU it keeps its parts.
    """

    compute: int = BF16
    fused_norm: bool = True


@dataclass(frozen=True)
class Activations:
    """Bytes of one forward pass that a backward pass will follow.

    Attributes:
        held: alive from the forward pass until its backward pass begins.
        working: needed besides, at the worst moment of the backward pass.
        transient: needed besides, at the worst moment of the forward pass.
    """

    held: float = 0.0
    working: float = 0.0
    transient: float = 0.0


def block_bytes(
    network: Network, tokens: Sequence, gradient: Gradient, precision: Precision, rank: int, share: float
) -> float:
    """What autograd keeps of one transformer block, its input included."""
    n, context = tokens.video * share, tokens.text + tokens.image
    d, f, s = network.width, network.ffn, precision.compute
    weights, adapter = gradient == "weights", gradient in ("weights", "adapter")
    scaled = FP32 if weights and not precision.fused_norm else 0  # a norm's output before its weight
    # Inputs of the layers: q, k, v; of the cross-attention; of its output; of feed-forward. In float32 q, k and v share
    # theirs; autocast makes a copy for each, and for an adapter one more, of the first attention's output.
    inputs = 4 if s == FP32 else 7 if gradient == "adapter" else 6
    # Rotated q, k; v; q of the cross-attention (cast for text and for image); outputs of the three attentions.
    attention = 7 if s == FP32 else 8
    video = d * (
        3 * FP32  # inputs of the three layer norms
        + 3 * (FP32 + scaled)  # q, k, and q of the cross-attention before their norms
        + attention * s
        + (inputs * s if adapter else 0)
        + (3 * FP32 + s if weights else 0)  # what modulation multiplies: two norms, feed-forward, attention
    )
    video += f * s * (2 if adapter else 1) + (8 * rank * s if gradient == "adapter" else 0)
    condition = d * ((2 * s + FP32 + scaled) if adapter else 2 * s)  # keys and values
    return n * video + context * condition + 3 * n * network.heads * FP32


def transformer_activations(
    network: Network,
    tokens: Sequence,
    gradient: Gradient,
    precision: Precision,
    checkpointing: bool,
    rank: int = 0,
    share: float = 1.0,
) -> Activations:
    """Activations of one pass; without a gradient, only what the forward pass needs at its worst moment."""
    n, d, f, s = tokens.video * share, network.width, network.ffn, precision.compute
    context = (tokens.text + tokens.image) * d * s
    # The narrow tensors of a block while queries are rotated, or fewer of them beside feed-forward's wide ones.
    wide = 3 if rank else 2
    tables = n * 8 * network.head_dim  # of the rotary embedding: there from first to last
    transient = n * max((28 if s == BF16 else 30) * d, 16 * d + wide * s * f) + context + tables
    if share < 1:
        transient += 4 * n * d * s  # queries, keys, values and outputs on their way between GPUs
    if gradient == "none":
        return Activations(transient=transient)
    weights = gradient == "weights"
    block = block_bytes(network, tokens, gradient, precision, rank, share)
    # The last norm, its modulation and projection, and the output: gone when the backward pass comes to the blocks.
    ends = n * d * (FP32 + (FP32 + s if weights else 0)) + n * 4 * network.out_channels * s
    whole = context + tables
    if weights:
        whole += n * 4 * network.in_channels * FP32 + 5 * context
    # Gradients of the residual stream, and of feed-forward's wide tensors, of which one has been kept till then.
    working = n * (8 * d + (1 if weights else 2) * s * f) - ends
    if not checkpointing:
        return Activations(network.layers * block + ends + whole, max(0.0, working), transient)
    inputs = n * d * FP32  # of a block, which its first norm shares
    return Activations(network.layers * inputs + ends + whole, block - inputs + working, transient)


def head_activations(config: Head, network: Network, tokens: Sequence, taps: int) -> Activations:
    """Activations of one logit of the head, which computes in float32 and always sees all tokens of a clip."""
    n, d, width = tokens.video, config.dim, network.width
    condition = tokens.text + tokens.image
    semantics = tokens.text * network.text_dim + tokens.image * network.image_dim + 4 * condition * d
    # Of each tapped layer: features, the norm's output; projected tokens, keys and values.
    held = FP32 * (taps * n * (2 * width + 3 * d) + (2 * semantics if config.semantics else 0))
    return Activations(held, FP32 * n * (width + 2 * d), FP32 * n * (width + 4 * d))
