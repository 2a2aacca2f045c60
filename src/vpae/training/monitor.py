"""Collapse monitor: what kills the distillation of image-to-video models, seen on fixed clips while there is time.

A student that collapses becomes still, drifts in colour, puts one pattern on all its videos, or forgets its noise. Each
sign is a number of one-step videos of the same held-out first frames and the same noise throughout a run.
Axes: N videos, C channels, F latent frames, H, W.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vpae.artifacts import written
from vpae.config.training import Monitor
from vpae.training.phase import Collapse

LOOKS = "looks"  # folder of what is kept for the eye: latents of a few videos at each look, STEP.safetensors

# Sign -> (healthy from, to), (tolerable from, to). Outside the first interval the monitor warns, outside the second it
# stops the run. A student after phase I lies well inside the first one: motion 0.94 to 0.99, the rest near 1 and 0. The
# teacher's own single step hardly heeds its noise: begun there, diversity ends at 4, which is good.
BOUNDS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "motion": ((0.8, 1.25), (0.5, 2.0)),
    "deviation": ((0.85, 1.18), (0.6, 1.6)),
    "colour_drift": ((0.0, 0.1), (0.0, 0.3)),
    "common_pattern": ((0.0, 0.06), (0.0, 0.2)),
    "diversity": ((0.6, math.inf), (0.3, math.inf)),
}


def signs(xh: Tensor, other: Tensor, start: Tensor, other_start: Tensor, x: Tensor) -> dict[str, float]:
    """The signs of collapse; all tensors are latents (N, C, F, H, W) of the same N first frames.

    Args:
        xh, other: one-step videos now, from two fixed draws of noise.
        start, other_start: the same when the run began.
        x: the real clips.

    Returns:
        motion: mean change between latent frames, generated / real.
        deviation: standard deviation, generated / real.
        colour_drift: largest shift of a channel's mean from the real clips', in the channel's standard deviations.
        common_pattern: size of what was added to all videos alike since the start, without the channels' means, in
            standard deviations of real clips. Chance adds the mean change / sqrt(N), which is taken off.
        diversity: distance between the videos of two noises, now / at the start.
    """
    axes = (0, 2, 3, 4)
    moves, real_moves = (v.diff(dim=2).abs().mean() for v in (xh, x))
    drift = (xh.mean(axes) - x.mean(axes)).abs() / x.std(axes).clamp_min(1e-8)
    change, n = (xh - start) - (xh - start).mean(axes, keepdim=True), len(xh)
    alike = change.mean(0).square().mean() - change.var(0).mean() / n
    spread, first_spread = ((a - b).square().mean().sqrt() for a, b in ((xh, other), (start, other_start)))
    found = {
        "motion": moves / real_moves.clamp_min(1e-8),
        "deviation": xh.std() / x.std().clamp_min(1e-8),
        "colour_drift": drift.max(),
        "common_pattern": alike.clamp_min(0).sqrt() / x.std().clamp_min(1e-8),
        "diversity": spread / first_spread.clamp_min(1e-8),
    }
    return {name: float(value) for name, value in found.items()}


def outside(found: dict[str, float], level: int) -> list[str]:
    """Which signs lie outside their interval (level 0: healthy, 1: tolerable), as text; a NaN lies outside."""
    bad = []
    for name, value in found.items():
        low, high = BOUNDS[name][level]
        if not low <= value <= high:
            bad.append(f"{name} = {value:.3g} is not within [{low:g}, {high:g}]")
    return bad


class Watch:
    """Draws fixed clips every now and then, and judges them.

    Args:
        config: how often, never 0, and whether to stop.
        draw: number of a fixed draw of noise -> one-step videos of the fixed first frames, like x. Every process calls
            it alike.
        x: the real clips.
    """

    def __init__(self, config: Monitor, draw: Callable[[int], Tensor], x: Tensor):
        self.config, self.draw, self.x = config, draw, x
        self.start: tuple[Tensor, ...] = ()
        self.looks: Path | None = None  # where this process keeps videos
        self.speaks = True  # one of several processes does

    def wants(self, step: int) -> bool:
        """Whether to look after so many steps."""
        return step % self.config.every == 0

    @torch.no_grad()
    def begin(self, state: Path, first: bool) -> None:
        """Draw the videos of the start, with the weights with which the run began; they are the look at step 0.

        Args:
            state: folder of the run's resumable states.
            first: whether this process writes.
        """
        self.speaks = first
        if first and self.config.videos:
            self.looks = state / LOOKS
        self.start = self.draw(0), self.draw(1)
        self._keep(0, self.start[0])

    @torch.no_grad()
    def look(self, step: int, name: str) -> dict[str, float]:
        """Measure after a step, and keep what is to be seen; returns the signs.

        Raises:
            Collapse: a sign left its tolerable interval, and `stop` is set.
        """
        xh = self.draw(0)
        self._keep(step, xh)
        found = signs(xh, self.draw(1), *self.start, self.x)
        if worst := outside(found, 1):
            message = f"{name} collapses at step {step}: {'; '.join(worst)}"
            if self.config.stop:
                raise Collapse(
                    f"{message}. The last state before it is kept. Lower {name}.generator.learning_rate or the weight "
                    f"of the loss that drives it, or go on in spite of it with {name}.training.monitor.stop=false"
                )
            if self.speaks:
                print(f"vpae: {message}", file=sys.stderr)
        elif self.speaks and (worst := outside(found, 0)):
            print(f"vpae: {name}, step {step}: {'; '.join(worst)}: early signs of collapse", file=sys.stderr)
        return found

    def _keep(self, step: int, xh: Tensor) -> None:
        """Keep the first videos; a step that is done again after an interruption replaces its own."""
        if self.looks is None:
            return
        self.looks.mkdir(exist_ok=True)
        with written(self.looks / f"{step:08d}.safetensors") as temporary:
            save_file({"x0": xh[: self.config.videos].contiguous().cpu()}, temporary)
