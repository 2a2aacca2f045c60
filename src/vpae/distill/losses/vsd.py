"""Score distillation: variational (Phase I, steps 3 to 6; the DMD loss) and conditional (Phase II, step 6)."""

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_NORMALISER = 1e-5


def vsd_direction(xh_BCFHW: Tensor, mu_real_BCFHW: Tensor, mu_fake_BCFHW: Tensor) -> Tensor:
    """g = (mu_fake - mu_real) / mean|xh - mu_real|, the mean over all axes but the batch.

    Args:
        xh_BCFHW: the generator's one-step videos.
        mu_real_BCFHW: the teacher's guided prediction of x0 from noised xh.
        mu_fake_BCFHW: the fake model's, without guidance.

    Returns:
        float32 like xh; no gradient flows through it.
    """
    with torch.no_grad():
        xh, real, fake = (v.float() for v in (xh_BCFHW, mu_real_BCFHW, mu_fake_BCFHW))
        normaliser = (xh - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp_min(SMALLEST_NORMALISER)
        return (fake - real) / normaliser


def vsd_loss(xh_BCFHW: Tensor, g_BCFHW: Tensor) -> Tensor:
    """L_VSD = 1/2 mean (xh - sg(xh - g))^2; its gradient with respect to xh is g / numel."""
    xh = xh_BCFHW.float()
    return 0.5 * F.mse_loss(xh, (xh - g_BCFHW).detach())


def flow_matching_loss(v_BCFHW: Tensor, x_BCFHW: Tensor, noise_BCFHW: Tensor) -> Tensor:
    """mean (v - (eps - sg(x)))^2: how the fake model learns the generator's distribution."""
    return F.mse_loss(v_BCFHW.float(), (noise_BCFHW - x_BCFHW.detach()).float())


def csds_loss(xh_BCFHW: Tensor, teacher_x0_BCFHW: Tensor) -> Tensor:
    """L_CSDS = mean (xh - sg(f_teacher(sg(xh_t'), t', c)))^2; the mean keeps lambda independent of the size.

    The teacher knows the first frame, and ties the video to it.
    """
    return F.mse_loss(xh_BCFHW.float(), teacher_x0_BCFHW.detach().float())
