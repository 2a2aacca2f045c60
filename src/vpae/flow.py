"""The algebra of rectified flow. Times t are in [0, 1], 1 = pure noise; they broadcast over a batch of latents.

Axes: B batch, C channels, F latent frames, H height, W width.
"""

import torch
from torch import Tensor

from vpae.config import Times


def expand(t_B: Tensor, x: Tensor) -> Tensor:
    """Shape t (B,) so that it broadcasts over x (B, ...)."""
    return t_B.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def add_noise(x_BCFHW: Tensor, noise_BCFHW: Tensor, t_B: Tensor) -> Tensor:
    """x_t = (1 - t) x + t eps."""
    t = expand(t_B, x_BCFHW)
    return (1 - t) * x_BCFHW + t * noise_BCFHW


def velocity_target(x_BCFHW: Tensor, noise_BCFHW: Tensor) -> Tensor:
    """What the network learns to predict: v = eps - x."""
    return noise_BCFHW - x_BCFHW


def x0_from_velocity(xt_BCFHW: Tensor, v_BCFHW: Tensor, t_B: Tensor) -> Tensor:
    """The one-step prediction f(x_t, t, c) = x_t - t v."""
    return xt_BCFHW - expand(t_B, xt_BCFHW) * v_BCFHW


def shift(u: Tensor | float, s: float) -> Tensor | float:
    """Timestep shift t = s u / (1 + (s - 1) u): s > 1 spends more of the schedule near noise."""
    return s * u / (1 + (s - 1) * u)


def unshift(t: Tensor | float, s: float) -> Tensor | float:
    """Inverse of `shift`: u = t / (s - (s - 1) t)."""
    return t / (s - (s - 1) * t)


def schedule(steps: int, s: float, device: torch.device | str = "cpu") -> Tensor:
    """The sampler's times: steps + 1 shifted values from 1 down to 0, float64."""
    return shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device), s)


def sample_times(times: Times, s: float, progress: float, batch: int, rng: torch.Generator) -> Tensor:
    """Draw t for each clip.

    Args:
        times: the interval, its space (before or after the shift) and the distribution.
        s: timestep shift.
        progress: how much of the phase is done, in [0, 1]; moves a scheduled interval.
        batch: number of draws B.
        rng: source of randomness; its device is the result's.

    Returns:
        float32 (B,), after the shift.
    """
    last_low, last_high = times.last_bounds
    # Plain numbers: a tensor of them would have to be copied to the device, which waits for it.
    bounds = [times.low + progress * (last_low - times.low), times.high + progress * (last_high - times.high)]
    u = torch.rand(batch, generator=rng, device=rng.device, dtype=torch.float64)
    shifted_uniform = times.distribution == "shifted_uniform"
    # Put the bounds into the space in which the draw is uniform.
    if shifted_uniform and times.t_space == "post_shift":
        bounds = [unshift(t, s) for t in bounds]
    elif not shifted_uniform and times.t_space == "pre_shift":
        bounds = [shift(t, s) for t in bounds]
    t = bounds[0] + u * (bounds[1] - bounds[0])
    return (shift(t, s) if shifted_uniform else t).float()
