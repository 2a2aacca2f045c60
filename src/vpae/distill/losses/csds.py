"""Conditional score distillation (Phase II, step 6): the teacher, which knows the first frame, ties the video to it."""

import torch.nn.functional as F
from torch import Tensor


def csds_loss(xh_BCFHW: Tensor, teacher_x0_BCFHW: Tensor) -> Tensor:
    """L_CSDS = mean (xh - sg(f_teacher(sg(xh_t'), t', c)))^2; the mean keeps lambda independent of the size."""
    return F.mse_loss(xh_BCFHW.float(), teacher_x0_BCFHW.detach().float())
