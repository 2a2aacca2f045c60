"""The non-saturating GAN losses of DMD2 (arXiv 2405.14867) and APT (arXiv 2501.08316)."""

import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real_logits_B: Tensor, fake_logits_B: Tensor) -> Tensor:
    """-E log sigmoid(D(x)) - E log(1 - sigmoid(D(xh)))."""
    return F.softplus(-real_logits_B).mean() + F.softplus(fake_logits_B).mean()


def generator_loss(fake_logits_B: Tensor) -> Tensor:
    """-E log sigmoid(D(xh))."""
    return F.softplus(-fake_logits_B).mean()
