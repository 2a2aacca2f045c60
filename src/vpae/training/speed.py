"""How fast a run is: seconds a step, tokens a second, shares of the device's peak and of waiting, the time left."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from vpae.training.phase import Batch

# Dense bf16 operations per second, by a part of the device's name [the makers' data sheets].
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}
NOTABLE_WAIT = 0.03  # share of the time above which a log's line speaks of it


@dataclass(frozen=True)
class Cost:
    """What a step takes.

    Attributes:
        tokens: of the videos of the main role's update, in all processes; 0: unknown.
        operations: of matrix products in one process, without recomputed ones; 0: unknown.
        peak: operations per second of its device; 0: unknown.
    """

    tokens: int = 0
    operations: float = 0.0
    peak: float = 0.0


def peak_of(device: torch.device, precision: str) -> float:
    """Operations per second of a known GPU in bf16 matrix products; 0 for other devices and precisions."""
    if device.type != "cuda" or precision != "bf16":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), 0.0)


class Speed:
    """Measures between logs, when the device has done all that was asked of it.

    Lines go to a file of their own: they differ from run to run, and metrics.jsonl does not.

    Args:
        file: gets a line for each log.
        total, done: steps of the whole run, and of those already made.
        cost: of a step.
        clock: seconds.
    """

    def __init__(self, file: Path, total: int, done: int, cost: Cost, clock: Callable[[], float] = time.monotonic):
        self.file, self.total, self.cost, self.clock = file, total, cost, clock
        self._last = self._steady = done, clock()
        self._warm, self._waited = False, 0.0

    def noting_waits(self, batches: Callable[[int], Batch]) -> Callable[[int], Batch]:
        """The same batches; the time they take counts as waiting for data (on a GPU more than it stands still)."""

        def batch(drawn: int) -> Batch:
            start = self.clock()
            found = batches(drawn)
            self._waited += self.clock() - start
            return found

        return batch

    def lap(self, done: int) -> str:
        """Note the speed since the last log, after so many steps; returns it in words."""
        now = self.clock()
        seconds = self._per_step(self._last, done, now)
        waiting = self._waited / max(now - self._last[1], 1e-9)
        # The first lap compiles and warms up: it does not foretell the others, unless there is no other.
        left = (self.total - done) * self._per_step(self._steady, done, now)
        if not self._warm:
            self._steady, self._warm = (done, now), True
        self._last, self._waited = (done, now), 0.0
        found = {"step": done, "seconds_per_step": seconds, "seconds_left": left, "waiting_for_data": waiting}
        words = [f"{seconds:.3g} s/step"]
        if self.cost.tokens:
            found["tokens_per_second"] = self.cost.tokens / seconds
            words.append(f"{found['tokens_per_second']:,.0f} tokens/s")
        if self.cost.operations and self.cost.peak:
            found["utilisation"] = self.cost.operations / (seconds * self.cost.peak)
            words.append(f"{found['utilisation']:.0%} of the peak")
        if waiting >= NOTABLE_WAIT:
            words.append(f"{waiting:.0%} waiting for data")
        with self.file.open("a") as file:
            file.write(json.dumps({key: float(f"{value:.6g}") for key, value in found.items()}) + "\n")
        return ", ".join(words)

    @staticmethod
    def _per_step(since: tuple[int, float], done: int, now: float) -> float:
        step, then = since
        return max(now - then, 1e-9) / max(1, done - step)


def summary(file: Path) -> dict[str, float]:
    """The median of each figure over a run's logs, but for the time left, and `training_seconds`, those of all steps.

    Empty where there are no logs. Of a step that was made again after an interruption the last time counts.
    """
    if not file.is_file():
        return {}
    lines = []
    for line in file.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # cut off by a kill
            print(f"vpae: {file} has a damaged line; it is left out", file=sys.stderr)
    if not lines:
        return {}
    keys = dict.fromkeys(key for line in lines for key in line if key not in ("step", "seconds_left"))
    laps = {int(line["step"]): line["seconds_per_step"] for line in lines}
    steps = [0, *sorted(laps)]
    total = sum((done - before) * laps[done] for before, done in pairwise(steps))
    medians = {key: median(line[key] for line in lines if key in line) for key in keys}
    return {**medians, "training_seconds": total}
