"""Spatio-temporal differential R1 (Phase II, step 5): an approximated R1 with one probe in space and one in time.

Both probes start from the same noised latents at the same time as the logit they are compared with, and are added in
float32: around |x| = 1, a perturbation of 0.01 is about the spacing of bfloat16.
Axes: B batch, C channels, F latent frames, H, W.
"""

import torch
from torch import Tensor


def spatial_perturbation(x_BCFHW: Tensor, sigma: float, rng: torch.Generator) -> Tensor:
    """d_s: noise that varies over space and is the same in every frame."""
    b, c, _, h, w = x_BCFHW.shape
    return (sigma * torch.randn(b, c, 1, h, w, generator=rng, device=x_BCFHW.device)).expand(x_BCFHW.shape)


def temporal_perturbation(x_BCFHW: Tensor, sigma: float, rng: torch.Generator) -> Tensor:
    """d_t: noise that varies over frames and is the same over space."""
    b, c, f, _, _ = x_BCFHW.shape
    return (sigma * torch.randn(b, c, f, 1, 1, generator=rng, device=x_BCFHW.device)).expand(x_BCFHW.shape)


def str1_penalty(logits_B: Tensor, *perturbed_logits_B: Tensor) -> Tensor:
    """The sum over probes d of E (D(x) - D(x + d))^2, without the weight w; the paper's probes are d_s and d_t."""
    distances = ((logits_B - perturbed_B).square().mean() for perturbed_B in perturbed_logits_B)
    return sum(distances, start=logits_B.new_zeros(()))
