"""The same work in several processes of one machine: small networks use a core each better than all cores together."""

import multiprocessing
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from vpae.artifacts import ArtifactError
from vpae.evaluation.vbench.runner import Networks, run
from vpae.evaluation.vbench.suite import Clip
from vpae.parts import Part
from vpae.training.preemption import Interruption

MOST = 8
_WORTH_IT = 4  # videos for each process


def how_many(clips: Sequence[Clip]) -> int:
    """How many processes share the videos on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MOST, len(clips) // _WORTH_IT))


def share(clips: Sequence[Clip], networks: Networks, folder: Path, processes: int) -> None:
    """Measure in forked processes, one part and one thread each.

    What goes wrong in one of them is left for the caller's own `run`, which finds their records and meets the same.

    Args:
        clips: all videos.
        networks: on the CPU, since a GPU's context does not outlive a fork.
        folder: of files of records.
        processes: how many; with 1, nothing is done here.

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
    with suppress(Interruption, ArtifactError, FileNotFoundError):
        run(clips, networks, folder, part, allow_damaged=True, allow_absent=True, label=f"vbench {part}")
