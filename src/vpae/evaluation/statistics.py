"""Confidence intervals, bootstrap for means and jackknife for distances between distributions, and tables of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np


def bootstrap(n: int, statistic: Callable[[np.ndarray], float], resamples: int, seed: int) -> dict[str, float]:
    """Point value and 95% percentile interval of a statistic of n videos (their indices, with repetitions -> value).

    Returns:
        mean (the statistic of all videos), low, high.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, n, n)) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return {"mean": float(statistic(np.arange(n))), "low": float(low), "high": float(high)}


def of_mean(values: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    """`bootstrap` of the mean of one value a video."""
    return bootstrap(len(values), lambda i: values[i].mean(), resamples, seed)


def jackknife(n: int, statistic: Callable[[np.ndarray], float], groups: int, seed: int) -> dict[str, float]:
    """Point value and normal 95% interval of a statistic of n videos, leaving out one group at a time.

    For a distance between distributions the bootstrap is no use: repeated videos look like a narrower distribution,
    and the whole interval can lie above the value. The interval is that of the value for n videos: a Frechet distance
    falls with n, and that of many more can lie below it.

    Returns:
        mean (the statistic of all videos, which is not negative), low (0 at least), high.
    """
    parts = np.array_split(np.random.default_rng(seed).permutation(n), min(groups, n))
    everything = np.arange(n)
    values = np.array([statistic(np.setdiff1d(everything, part)) for part in parts])
    error = np.sqrt((len(parts) - 1) / len(parts) * np.square(values - values.mean()).sum())
    value = float(statistic(everything))
    return {"mean": value, "low": max(0.0, value - 1.96 * float(error)), "high": value + 1.96 * float(error)}


def half_width(mean: float, low: float, high: float) -> float:
    """What stands behind ±: half of an interval; of one that is cut off at 0, its upper half."""
    return (high - low) / 2 if low > 0 else high - mean


def cell(value: Mapping[str, float] | None, metric: str) -> str:
    """A score in a table, with half of its 95% interval; a latency without, since its bounds are the extreme runs."""
    if value is None:
        return ""
    if metric.startswith("latency"):
        return f"{value['mean']:.3f}"
    return f"{value['mean']:.3f} ± {half_width(value['mean'], value['low'], value['high']):.3f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
