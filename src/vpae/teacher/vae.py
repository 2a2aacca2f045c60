"""Training of the tiny `AutoencoderKLWan`: reconstruction of random crops and a small KL term.

Axes: B batch, T frames, H height, W width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from vpae.config import Optimizer, TinyVae
from vpae.training.ema import make_ema
from vpae.training.phase import Phase, Role

INITIAL_LOG_VARIANCE = -6.0


def build(config: TinyVae) -> AutoencoderKLWan:
    """A VAE with Wan2.1's geometry: 16 channels, 4x in time, 8x in space."""
    vae = AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=16,
        dim_mult=list(config.dim_mult),
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    with torch.no_grad():
        # Posteriors as wide as the unit Gaussian would drown the small signals of an untrained encoder.
        vae.quant_conv.weight[16:] = 0
        vae.quant_conv.bias[16:] = INITIAL_LOG_VARIANCE
    return vae


class VaePhase(Phase):
    """L1 + L2 reconstruction of crops, and KL to the unit Gaussian.

    Args:
        config: crop size and KL weight.
        vae: the network to train.
        optimizer: its settings.
        frames: step -> frames per crop.
        name: of the run.
        decoder_only: leave the encoder, and so the latents, as they are.
    """

    main = "vae"

    def __init__(
        self,
        config: TinyVae,
        vae: AutoencoderKLWan,
        optimizer: Optimizer,
        frames: Callable[[int], int],
        name: str,
        decoder_only: bool = False,
    ):
        self.config, self.frames, self.name = config, frames, name
        vae.requires_grad_(True)
        if decoder_only:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        self.roles = {"vae": Role(vae, optimizer)}
        self.ema = make_ema(vae)

    def loss(self, turn: str, video_B3THW: Tensor, rng: torch.Generator, step: int) -> tuple[Tensor, dict]:
        """Reconstruction loss of crops of `video_B3THW`, uint8 scaled to [-1, 1]."""
        vae = self.roles["vae"].module
        crop = self._crop(video_B3THW, (self.frames(step), self.config.crop, self.config.crop), rng)
        posterior = vae.encode(crop).latent_dist
        rebuilt = vae.decode(posterior.sample(rng)).sample.float()
        l1, l2 = F.l1_loss(rebuilt, crop), F.mse_loss(rebuilt, crop)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return l1 + l2 + self.config.kl_weight * kl, {"l1": l1, "kl": kl, "psnr": -10 * torch.log10(l2.detach() / 4)}

    def _crop(self, video: Tensor, sizes: tuple[int, int, int], rng: torch.Generator) -> Tensor:
        for axis, size in zip((2, 3, 4), sizes, strict=True):
            room = video.shape[axis] - size
            if room > 0:
                start = int(torch.randint(0, room + 1, (1,), generator=rng, device=rng.device))
                video = video.narrow(axis, start, size)
        return video


@torch.no_grad()
def normalise(vae: AutoencoderKLWan, videos: list[Tensor]) -> None:
    """Write the latents' mean and standard deviation per channel into the VAE's config, as Wan2.1's carries them."""
    z = torch.cat([vae.encode(v).latent_dist.mode() for v in videos])
    mean, std = z.mean(dim=(0, 2, 3, 4)), z.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
