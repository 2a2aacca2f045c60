"""Consistency distillation (LCM, arXiv 2310.04378): along the teacher's trajectory all predictions of x0 agree.

Axes: B batch, C channels, F latent frames, H, W.
"""

import torch
from torch import Tensor

from vpae.flow import expand, schedule


def neighbouring_times(intervals: int, shift: float, batch: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a step of the teacher's sampler for each clip.

    Args:
        intervals: steps N from t = 1 to 0, evenly spaced before the shift.
        shift: timestep shift of the schedule.
        batch: number of draws B.
        rng: source of randomness; its device is the result's.

    Returns:
        t (B,) and the next smaller time s (B,), float32.
    """
    times = schedule(intervals, shift, rng.device)  # made there: a copy would wait for the device
    step = torch.randint(intervals, (batch,), generator=rng, device=rng.device)
    return times[step].float(), times[step + 1].float()


def ode_step(xt_BCFHW: Tensor, v_BCFHW: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
    """One Euler step of dx/dt = v from t to s: x_s = x_t + (s - t) v."""
    return xt_BCFHW + expand(s_B - t_B, xt_BCFHW) * v_BCFHW


def consistency_loss(x0_BCFHW: Tensor, target_BCFHW: Tensor, huber: float | None = None) -> Tensor:
    """d(f_theta(x_t, t, c), sg(f_theta-(x_s, s, c))), the mean over all axes.

    Args:
        x0_BCFHW: the student's prediction at t.
        target_BCFHW: its EMA's at s, one step of the teacher's ODE further; no gradient flows through it.
        huber: c of the pseudo-Huber distance sqrt(d^2 + c^2) - c; none: the squared distance d^2.
    """
    square = (x0_BCFHW.float() - target_BCFHW.detach().float()).square()
    return square.mean() if huber is None else ((square + huber**2).sqrt() - huber).mean()
