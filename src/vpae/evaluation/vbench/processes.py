"""Measuring with progress, in one process or in several of one machine: small networks use a core each better than all
cores together."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from vbench_i2v import runner
from vbench_i2v.errors import VBenchError
from vbench_i2v.parts import Part
from vbench_i2v.runner import Networks
from vbench_i2v.suite import Clip
from vpae.preemption import Interruption, Request
from vpae.progress import track

MOST = 8
_WORTH_IT = 4  # videos for each process


def how_many(clips: Sequence[Clip]) -> int:
    """How many processes share the videos on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MOST, len(clips) // _WORTH_IT))


def run(*arguments, label: str = "vbench", **options) -> runner.Outcome:
    """`runner.run` with progress, until the end is asked for.

    Raises:
        Interruption: asked to end; what was measured is kept.
    """
    with Interruption.watch() as request:
        return runner.run(*arguments, **options, track=lambda work: until_asked(work, request, label))


def until_asked(work: list, request: Request, label: str = "vbench") -> Iterator:
    """Go through work with progress; `Interruption` between two pieces when the end was asked for."""
    for piece in track(work, len(work), label):
        if request.requested:
            raise Interruption(f"{label}: the records made so far are kept")
        yield piece


def share(clips: Sequence[Clip], networks: Networks, folder: Path, processes: int) -> None:
    """Measure in forked processes, one part and one thread each.

    What goes wrong in one of them is left for the caller's own `run`, which finds their records and meets the same.
    With one process nothing is done here. The networks are on the CPU, since a GPU's context does not outlive a fork.

    Raises:
        Interruption: asked to end; what was measured is kept.
    """
    if processes < 2:
        return
    fork = multiprocessing.get_context("fork")
    parts = [Part(number, processes) for number in range(1, processes + 1)]
    children = [fork.Process(target=_measure, args=(clips, networks, folder, part), daemon=True) for part in parts]
    with Interruption.watch() as request:
        for child in children:
            child.start()
        while alive := [child for child in children if child.is_alive()]:
            alive[0].join(0.1)
            if request.requested:
                for child in alive:
                    child.terminate()
    if request.requested:
        raise Interruption(f"vbench: records are in {folder}")


def _measure(clips: Sequence[Clip], networks: Networks, folder: Path, part: Part) -> None:
    torch.set_num_threads(1)
    with suppress(Interruption, VBenchError, FileNotFoundError):
        run(clips, networks, folder, part, allow_damaged=True, allow_absent=True, label=f"vbench {part}")
