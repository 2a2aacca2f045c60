"""Confidence intervals by bootstrap."""

from collections.abc import Callable

import numpy as np


def bootstrap(n: int, statistic: Callable[[np.ndarray], float], resamples: int, seed: int) -> dict[str, float]:
    """Point value and 95% percentile interval of a statistic of n videos.

    Args:
        n: number of videos.
        statistic: indices of videos, with repetitions -> value.
        resamples: how many.
        seed: of the resampling.

    Returns:
        mean (the statistic of all videos), low, high.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, n, n)) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return {"mean": float(statistic(np.arange(n))), "low": float(low), "high": float(high)}
