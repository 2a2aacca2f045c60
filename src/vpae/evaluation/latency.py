"""Latency of a sampler: diffusion alone, and end to end from an image and a prompt to decoded frames."""

import time
from collections.abc import Callable

import numpy as np
import torch


def time_runs(work: Callable[[], object], repeats: int, warmup: int) -> list[float]:
    """Seconds of each of `repeats` runs after `warmup` untimed ones."""
    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(repeats):
        _synchronise()
        start = time.perf_counter()
        work()
        _synchronise()
        seconds.append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """The median, with the fastest and slowest run as bounds."""
    return {"mean": float(np.median(seconds)), "low": min(seconds), "high": max(seconds)}


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
