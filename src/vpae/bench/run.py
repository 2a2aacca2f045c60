"""Runs the parts of `vpae bench` that are asked for."""

from dataclasses import dataclass
from pathlib import Path

import torch

from vpae.bench import encoding, sampling, training
from vpae.bench.measure import free_memory, matmul_peak
from vpae.bench.networks import found_components, random_components, sampling_dtype
from vpae.experiment import RESULTS, ConfigError, Source
from vpae.planning.network import pipeline_of, transformer_parameters
from vpae.planning.plan import tokens_of


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
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"--device {self.device}: no GPU is visible; leave the option out to measure the CPU")
        return device


def run(source: Source, options: Options) -> dict:
    """All parts, in the order in which they are listed."""
    settings, device = source.settings, options.place
    pipeline = pipeline_of(source)
    network, tokens = pipeline.transformer, tokens_of(settings, pipeline)
    dtype = sampling_dtype(network, transformer_parameters(network)[0], device)
    found: dict = {
        "network": {"parameters": transformer_parameters(network)[0], "tokens": tokens.video, "dtype": str(dtype)},
        "matmul_flops_per_second": matmul_peak(device, dtype),
    }
    if {"sampling", "vae"} & set(options.parts):
        parts = (
            random_components(pipeline, device, dtype)
            if options.random_weights
            else found_components(source, options.results, device, dtype)
        )
        if "sampling" in options.parts:
            bench = sampling.Bench(settings, parts, network, tokens, device, options.repeats)
            found["sampling"] = {
                "flops_per_nfe": bench.flops,
                "evaluations": bench.evaluations(options.batch_sizes, options.attention, options.compiled),
                "videos": (videos := bench.videos(options.steps, options.guidance)),
                "ratios": sampling.ratios(videos),
            }
            del bench
        if "vae" in options.parts:
            found["vae"] = encoding.measure_vae(settings, parts, device, options.batch_sizes[0], options.repeats)
        del parts
        free_memory(device)
    for name in ("priming", "equilibrium"):
        if name in options.parts:
            found[name] = training.measure_phase(settings, name, network, tokens, device, options.repeats)
    if "discriminator" in options.parts:
        found["discriminator"] = training.compare_discriminators(settings, network, tokens, device, options.repeats)
    if "fake" in options.parts:
        found["fake"] = training.compare_fakes(settings, network, tokens, device, options.repeats)
    return found
