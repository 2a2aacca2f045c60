"""Hinge losses (Phase II, step 4)."""

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
