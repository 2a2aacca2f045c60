"""Adversarial losses: Phase II's hinge (step 4), the relativistic pair that can replace it, and the rivals' own."""

import torch.nn.functional as F
from torch import Tensor


def discriminator_hinge(real_logits_B: Tensor, fake_logits_B: Tensor) -> Tensor:
    """E relu(1 - D(x_t')) + E relu(1 + D(xh_t'))."""
    return F.relu(1 - real_logits_B).mean() + F.relu(1 + fake_logits_B).mean()


def generator_adversarial(fake_logits_B: Tensor, form: str) -> Tensor:
    """The generator's adversarial loss.

    Args:
        fake_logits_B: D(xh_t').
        form: "hinge_linear", -E D; or "hinge_clipped", E relu(1 - D).
    """
    if form == "hinge_linear":
        return -fake_logits_B.mean()
    return F.relu(1 - fake_logits_B).mean()


def discriminator_relativistic(real_logits_B: Tensor, fake_logits_B: Tensor) -> Tensor:
    """E softplus(D(xh_t') - D(x_t')), each video against the real clip of its own first frame.

    Source: Jolicoeur-Martineau, 2018, paired as by Huang et al. (R3GAN), 2024.
    """
    return F.softplus(fake_logits_B - real_logits_B).mean()


def generator_relativistic(real_logits_B: Tensor, fake_logits_B: Tensor) -> Tensor:
    """E softplus(D(x_t') - D(xh_t')), the opposite of the discriminator's."""
    return F.softplus(real_logits_B - fake_logits_B).mean()


def discriminator_non_saturating(real_logits_B: Tensor, fake_logits_B: Tensor) -> Tensor:
    """-E log sigmoid(D(x)) - E log(1 - sigmoid(D(xh))), of DMD2 (arXiv 2405.14867) and APT (arXiv 2501.08316)."""
    return F.softplus(-real_logits_B).mean() + F.softplus(fake_logits_B).mean()


def generator_non_saturating(fake_logits_B: Tensor) -> Tensor:
    """-E log sigmoid(D(xh))."""
    return F.softplus(-fake_logits_B).mean()
