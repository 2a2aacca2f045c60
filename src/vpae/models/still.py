"""The condition "first frame, then grey" through Wan's causal VAE, without encoding the same grey again and again.

Every layer of the encoder looks at a frame and at the two before it. Where those are equal, so is what the layer makes
of them: after a few frames its output repeats. So each layer is given only the frames that differ; the last of them
stands for all that follow. At 81 frames the layers of full resolution see 12 frames. It is the same arithmetic, and no
approximation.
Axes: B batch, C channels, T frames, H/W height and width.
"""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

LOOKS_BACK = 2  # frames before its own that a causal convolution sees
SHORT = 17  # frames up to which there is nothing to gain


def can_encode_still(vae: AutoencoderKLWan, frames: int) -> bool:
    """Whether `encode_still` knows a VAE's layers, takes its settings, and gains at so many frames."""
    known = (WanResidualBlock, WanResample, WanAttentionBlock)
    can = all(isinstance(layer, known) for layer in vae.encoder.down_blocks)
    return can and frames > SHORT and not vae.use_tiling and vae.config.patch_size is None


@apply_forward_hook  # brings an offloaded VAE to its device
def encode_still(vae: AutoencoderKLWan, video_BCTHW: Tensor, frames: int) -> Tensor:
    """The encoder's moments (B, 32, F, H/8, W/8) of a video that stands still from its last given frame on.

    Args:
        vae: one that `can_encode_still`.
        video_BCTHW: its first frames, the last of which is repeated.
        frames: how many there are of it in all, 4 k + 1.
    """
    encoder = vae.encoder
    x = _continued(video_BCTHW, LOOKS_BACK, frames)
    x = encoder.conv_in(x)
    for layer in encoder.down_blocks:
        if isinstance(layer, WanResidualBlock):
            x = _residual(layer, x, frames)
        elif isinstance(layer, WanAttentionBlock):
            x = layer(x)
        else:
            x = layer(x)  # in space; without a cache it leaves time alone
            if layer.mode == "downsample3d":
                x, frames = _halved(layer, x, frames), (frames + 1) // 2
    first, *others = encoder.mid_block.resnets
    x = _residual(first, x, frames)
    for attention, layer in zip(encoder.mid_block.attentions, others, strict=True):
        x = _residual(layer, attention(x), frames)
    x = encoder.nonlinearity(encoder.norm_out(x))
    x = vae.quant_conv(encoder.conv_out(_continued(x, LOOKS_BACK, frames)))
    return _continued(x, frames, frames)


def _continued(x_BCTHW: Tensor, more: int, frames: int) -> Tensor:
    """With so many more copies of the last frame, but no more than `frames` frames in all."""
    more = min(more, frames - x_BCTHW.shape[2])
    return torch.cat([x_BCTHW, x_BCTHW[:, :, -1:].expand(-1, -1, more, -1, -1)], dim=2) if more > 0 else x_BCTHW


def _residual(layer: WanResidualBlock, x_BCTHW: Tensor, frames: int) -> Tensor:
    return layer(_continued(x_BCTHW, 2 * LOOKS_BACK, frames))


def _halved(layer: WanResample, x_BCTHW: Tensor, frames: int) -> Tensor:
    """Half as many frames: the first one, and one of each three, two apart."""
    pairs = x_BCTHW.shape[2] // 2 + 1  # until all three are the last frame
    x = _continued(x_BCTHW, frames, min(2 * pairs + 1, frames))
    return torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
