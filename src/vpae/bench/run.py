"""Runs the parts of `vpae bench` that are asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from vpae.bench import COMPARISONS, sampling, training
from vpae.bench.data import measure_data
from vpae.bench.measure import free_memory, if_it_fits, matmul_peak
from vpae.bench.networks import found_components, random_components
from vpae.distill import METHODS
from vpae.experiment import ConfigError, Source
from vpae.graph import RESULTS
from vpae.planning.inference import by_size
from vpae.planning.network import count, pipeline_of, tokens_of


@dataclass(frozen=True)
class Options:
    """What to measure, and how."""

    parts: tuple[str, ...]
    device: str = ""
    steps: tuple[int, ...] = (1, 50)
    guidance: float = 5.0
    batch_sizes: tuple[int, ...] = (1,)
    attention: tuple[str, ...] = ("native",)
    compiled: bool = False
    repeats: int = 3
    random_weights: bool = False
    results: Path = RESULTS

    @property
    def place(self) -> torch.device:
        """The device.

        Raises:
            ConfigError: there is no such device.
        """
        try:
            device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise ConfigError(f"--device {self.device}: write cuda, cuda:1 or cpu") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"--device {self.device}: no GPU is visible; leave the option out to measure the CPU")
        return device


def run(source: Source, options: Options, keep: Callable[[dict], None] = lambda found: None) -> dict:
    """All parts, in the order in which they are listed.

    Args:
        source: the experiment.
        options: what to measure.
        keep: is given all that has been found whenever there is more of it, since the time on a machine may end.
            `unfinished` names the parts that are still to come.
    """
    settings, device = source.settings, options.place
    pipeline = pipeline_of(source)
    network, tokens = pipeline.transformer, tokens_of(settings, pipeline)
    dtype = by_size(network.build()) if device.type == "cuda" else torch.float32
    found: dict = {
        "network": {"parameters": count(network.build()), "tokens": tokens.video, "dtype": str(dtype)},
        "matmul_flops_per_second": matmul_peak(device, dtype),
        "unfinished": list(options.parts),
    }

    def done(part: str) -> None:
        found["unfinished"].remove(part)
        keep(found)

    if {"sampling", "vae"} & set(options.parts):
        parts = (
            random_components(pipeline, device, dtype)
            if options.random_weights
            else found_components(source, options.results, device, dtype)
        )
        if "sampling" in options.parts:
            bench = sampling.Bench(settings, parts, network, tokens, device, options.repeats)
            _sample(bench, options, found, keep)
            done("sampling")
            del bench
        if "vae" in options.parts:
            measure = partial(sampling.measure_vae, settings, parts, device, options.batch_sizes[0], options.repeats)
            found["vae"] = if_it_fits(measure, device)
            done("vae")
            del measure
        del parts
        free_memory(device)
    work = {
        **{name: partial(training.measure_phase, settings, name) for name in METHODS},
        **{part: partial(training.compare, settings, *compared) for part, compared in COMPARISONS.items()},
    }
    for name, measure in work.items():
        if name in options.parts:
            found[name] = measure(network, tokens, device, options.repeats)
            done(name)
    if "data" in options.parts:
        found["data"] = measure_data(source, options.results, device, options.repeats)
        done("data")
    return found


def _sample(bench: sampling.Bench, options: Options, found: dict, keep: Callable[[dict], None]) -> None:
    """Whole videos come after single evaluations, in the mode and with the backend that were fastest there."""
    place = found["sampling"] = {"flops_per_nfe": bench.flops, "evaluations": [], "videos": [], "ratios": {}}
    for row in bench.evaluations(options.batch_sizes, options.attention, options.compiled):
        place["evaluations"].append(row)
        keep(found)
    mode, backend = sampling.fastest(place["evaluations"])
    for row in bench.videos(options.steps, options.guidance, mode, backend):
        place["videos"].append(row)
        keep(found)
    place["ratios"] = sampling.ratios(place["videos"])
