"""Regularisation of a discriminator by probes: R1 to first order, without the gradient of a gradient.

APT (arXiv 2501.08316) has one probe, independent noise on every value. The spatio-temporal differential R1 (Phase II,
step 5) has two, one in space and one in time. A probe of deviation sigma measures sigma^2 E |grad D|^2 along its
directions, so that weight times sigma^2 says how strong it is. All start from the same latents at the same time as the
logit that they are compared with, and are added in float32: around |x| = 1, a perturbation of 0.01 is about the spacing
of bfloat16.
Axes: B batch, C channels, F latent frames, H, W.
"""

import torch
from torch import Tensor


def _noise(like: Tensor, shape: tuple[int, ...], sigma: float, rng: torch.Generator) -> Tensor:
    return (sigma * torch.randn(shape, generator=rng, device=like.device)).expand(like.shape)


def plain_perturbation(x_BCFHW: Tensor, sigma: float, rng: torch.Generator) -> Tensor:
    """Independent noise on every value."""
    return _noise(x_BCFHW, x_BCFHW.shape, sigma, rng)


def spatial_perturbation(x_BCFHW: Tensor, sigma: float, rng: torch.Generator) -> Tensor:
    """d_s: noise that varies over space and is the same in every frame."""
    b, c, _, h, w = x_BCFHW.shape
    return _noise(x_BCFHW, (b, c, 1, h, w), sigma, rng)


def temporal_perturbation(x_BCFHW: Tensor, sigma: float, rng: torch.Generator) -> Tensor:
    """d_t: noise that varies over frames and is the same over space."""
    b, c, f, _, _ = x_BCFHW.shape
    return _noise(x_BCFHW, (b, c, f, 1, 1), sigma, rng)


def probe_penalty(logits_B: Tensor, *perturbed_logits_B: Tensor) -> Tensor:
    """The sum over probes d of E (D(x) - D(x + d))^2, without the weight; L_STR1 where the probes are d_s and d_t."""
    distances = ((logits_B - perturbed_B).square().mean() for perturbed_B in perturbed_logits_B)
    return sum(distances, start=logits_B.new_zeros(()))
