"""The approximated R1 of APT (arXiv 2501.08316): no gradient of a gradient.

To first order in sigma it is sigma^2 E |grad D|^2, so weight times sigma^2 says how strong it is.
"""

import torch
from torch import Tensor


def isotropic_perturbation(x_BCFHW: Tensor, sigma: float, rng: torch.Generator) -> Tensor:
    """Independent noise on every value, in float32: around |x| = 1 a sigma of 0.01 is about bfloat16's spacing."""
    return sigma * torch.randn(x_BCFHW.shape, generator=rng, device=x_BCFHW.device)


def r1_penalty(logits_B: Tensor, perturbed_logits_B: Tensor) -> Tensor:
    """E (D(x) - D(x + d))^2, without the weight; both logits are taken at the same time and condition."""
    return (logits_B - perturbed_logits_B).square().mean()
