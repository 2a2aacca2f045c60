"""Seconds, peaks of memory, and the speed of matrix products, on a GPU or a CPU."""

import gc
import time
from collections.abc import Callable
from statistics import median

import torch

from vpae.out_of_memory import exhausted_memory
from vpae.planning.meter import LiveBytes

MATRIX = {"cuda": 8192, "cpu": 1024}  # side of the matrices whose product is timed


def synchronise(device: torch.device) -> None:
    """Wait for all that was begun on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, from an idle device to an idle device."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def timed(work: Callable[[], object], device: torch.device, repeats: int, warmup: int = 1) -> dict[str, float]:
    """The median of several runs after untimed ones, with the fastest and the slowest."""
    for _ in range(warmup):
        work()
    runs = [seconds_of(work, device) for _ in range(repeats)]
    return {"seconds": median(runs), "low": min(runs), "high": max(runs), "runs": len(runs)}


def if_it_fits(measure: Callable[[], dict], device: torch.device) -> dict:
    """What `measure` returns; or, where memory does not suffice for it, {"skipped": why}. Other errors pass."""
    try:
        return measure()
    except (RuntimeError, MemoryError) as error:
        if exhausted_memory(error) is None:
            raise
        reason = first_line(error)
    # Here, where the error no longer holds the frames that hold the tensors.
    free_memory(device)
    return {"skipped": f"out of memory: {reason}"}


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of several large matrix products: what utilisation is measured against."""
    n = MATRIX.get(device.type, 1024)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    inner = 10 if device.type == "cuda" else 1  # one product is too short for a GPU's clock

    def products() -> None:
        for _ in range(inner):
            a @ b

    products()
    return 2.0 * n**3 * inner / min(seconds_of(products, device) for _ in range(5))


def peak_of(work: Callable[[], object], device: torch.device, held: int) -> int:
    """Most bytes at once while some work runs: the GPU's allocator says it; on a CPU live tensors are counted.

    Args:
        work: what to run.
        device: where.
        held: bytes that are there before, which only the count on a CPU has to be told.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device)
    with LiveBytes() as live:
        work()
    return held + live.peak


def free_memory(device: torch.device) -> None:
    """Give back what is no longer used, before the next networks are made."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
