"""Regularisation of a discriminator by probes: R1 to first order, without the gradient of a gradient.

APT (arXiv 2501.08316) has one probe, independent noise on every value. The spatio-temporal differential R1 (Phase II,
step 5) has two, one in space and one in time. A probe of deviation sigma measures sigma^2 E |grad D|^2 along its
directions, so that weight times sigma^2 says how strong it is. All are added, in float32, to the noised latents of the
logit that they are compared with, at the same timestep: around |x| = 1, a perturbation of 0.01 is about the spacing of
bfloat16.
Axes: B batch, C channels, F latent frames, H, W.
"""

import torch
from torch import Tensor


def perturbation(probe: str, x_BCFHW: Tensor, sigma: float, rng: torch.Generator) -> Tensor:
    """Gaussian noise of deviation sigma, in the shape of x.

    Args:
        probe: "plain", independent noise on every value; "spatial", d_s, which varies over space and is the same in
            every frame; or "temporal", d_t, which varies over frames and is the same over space.
        x_BCFHW: what it will be added to.
        sigma: its deviation.
        rng: source of randomness.
    """
    b, c, f, h, w = x_BCFHW.shape
    shape = {"plain": (b, c, f, h, w), "spatial": (b, c, 1, h, w), "temporal": (b, c, f, 1, 1)}[probe]
    return (sigma * torch.randn(shape, generator=rng, device=x_BCFHW.device)).expand(x_BCFHW.shape)


def probe_penalty(logits_B: Tensor, *perturbed_logits_B: Tensor) -> Tensor:
    """The sum over probes d of E (D(x) - D(x + d))^2, without the weight; L_STR1 where the probes are d_s and d_t."""
    distances = ((logits_B - perturbed_B).square().mean() for perturbed_B in perturbed_logits_B)
    return sum(distances, start=logits_B.new_zeros(()))
