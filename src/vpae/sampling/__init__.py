"""Sampling.

Teachers integrate the flow by Euler steps with guidance; students jump to x0 and, with more steps, add noise again at
the next smaller time. With one step and no guidance the two are the same.
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from vpae.config import Experiment, Sampler
from vpae.flow import add_noise, schedule
from vpae.models.wan import Condition, guided_velocity, predict_x0
from vpae.teacher.folder import shift_of


def euler(
    model: nn.Module, noise_BCFHW: Tensor, condition: Condition, steps: int, shift: float, guidance_scale: float = 1.0
) -> Tensor:
    """Integrate dx/dt = v from t = 1 to 0 over the shifted schedule; returns x0 like `noise_BCFHW`."""
    x, times = noise_BCFHW, schedule(steps, shift).tolist()
    for t, t_next in pairwise(times):
        v = guided_velocity(model, x, x.new_full((len(x),), t), condition, guidance_scale)
        x = x + (t_next - t) * v
    return x


def few_step(
    model: nn.Module,
    noise_BCFHW: Tensor,
    condition: Condition,
    steps: int,
    shift: float,
    rngs: list[torch.Generator],
    guidance_scale: float = 1.0,
) -> Tensor:
    """Predict x0, add fresh noise at the next smaller time, predict again; returns x0 like `noise_BCFHW`.

    `rngs` holds one generator per video, so that a video does not depend on its batch.
    """
    x, times = noise_BCFHW, schedule(steps, shift).tolist()
    for t, t_next in pairwise(times):
        x = predict_x0(model, x, x.new_full((len(x),), t), condition, guidance_scale)
        if t_next > 0:
            x = add_noise(x, noise_of(rngs, x.shape[1:], x.device), x.new_full((len(x),), t_next))
    return x


def noise_of(rngs: list[torch.Generator], shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """One draw (B, *shape) from each video's own CPU generator: the noise `WanImageToVideoPipeline` would draw."""
    return torch.cat([torch.randn((1, *shape), generator=rng) for rng in rngs]).to(device)


def draw(model: nn.Module, row: Sampler, shift: float, condition: Condition, shape: tuple, seeds: list[int]) -> Tensor:
    """Sample latents (B, *shape) as one row of the tables does, one seed a video."""
    rngs = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = noise_of(rngs, shape, condition.text_BLD.device)
    if row.model == "teacher":
        return euler(model, noise, condition, row.steps, shift, row.guidance_scale)
    return few_step(model, noise, condition, row.steps, shift, rngs, row.guidance_scale)


def model_folder(inputs: dict[str, Path], model: str) -> Path:
    """The pipeline folder of a row's model."""
    return inputs["teacher"] if model == "teacher" else inputs[model] / "student"


def row_shift(settings: Experiment, inputs: dict[str, Path], row: Sampler) -> float:
    """Timestep shift of a row's sampler: its own, or else `teacher.shift` or what a student's scheduler says."""
    if row.shift is not None:
        return row.shift
    own = None if row.model == "teacher" else shift_of(model_folder(inputs, row.model))
    return settings.teacher.shift if own is None else own
