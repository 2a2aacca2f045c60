"""Latency: seconds per video at batch size 1, of the network evaluations alone and from image and prompt to frames."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vpae.artifacts import device_name, is_kept, kept
from vpae.config import Evaluation, Experiment, Sampler
from vpae.data.latents import LatentDataset
from vpae.models.formats import formats
from vpae.models.wan import load_pipeline
from vpae.placement import COMPILED_FROM, compiling_pays
from vpae.sampling import draw, model_folder, row_shift
from vpae.sampling.single import animate
from vpae.sampling.stage import load_vae, small_decoder

PASSES = 3  # over the rows, so that a machine that is busy for a while slows all of them
LONG = 50  # network evaluations from which on a video is its own average
METRICS = ("latency_diffusion_s", "latency_total_s")
KEPT = "latencies.json"  # of the models that were timed before the stage was interrupted
SHARED = ("vae", "text_encoder", "image_encoder")  # a student's are the teacher's own


@dataclass(frozen=True)
class Runs:
    """How often a row is run in a pass.

    Attributes:
        network: timed runs of the network evaluations alone.
        whole: timed runs from image to frames.
        warmup: untimed runs before each of the two.
        warm: what an untimed run draws.
    """

    network: int
    whole: int
    warmup: int
    warm: Sampler


def runs_of(row: Sampler, config: Evaluation) -> Runs:
    """A row of many network evaluations is timed once a pass, and one of its steps is warm-up enough."""
    if row.nfe >= LONG:
        return Runs(1, 1, config.latency_warmup, row.model_copy(update={"steps": 1}))
    return Runs(5 * config.latency_repeats, config.latency_repeats, config.latency_warmup, row)


@torch.no_grad()
def measure(settings: Experiment, inputs: dict[str, Path], state: Path) -> dict[str, dict]:
    """Row -> metric -> the median run, with the fastest and slowest one as bounds.

    What was timed on the same device before an interruption is not timed again.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = LatentDataset(inputs["latents"], "held_out")
    _, condition = dataset.batch([0], device)
    picture: Image.Image = dataset.first_frame(0)
    prompt, geometry, config = dataset.entries[0].caption, settings.geometry, settings.evaluation
    shape = (16, *geometry.latent_shape)
    seconds = _kept(state)
    if small := small_decoder(settings.samples):
        small.to(device)
    vae = load_vae(inputs["teacher"], settings.samples)
    parts = load_pipeline(inputs["teacher"], transformer=None, vae=vae).to(device)
    shared = {name: getattr(parts, name) for name in SHARED}
    for models in _timed_together(settings, inputs):
        rows = {name: row for name, row in settings.samples.rows.items() if row.model in models}
        if rows.keys() <= seconds.keys():
            continue
        pipelines = {model: load_pipeline(model_folder(inputs, model), **shared).to(device) for model in models}
        for pipeline in pipelines.values():
            if settings.samples.compile and compiling_pays(pipeline.transformer, device, COMPILED_FROM):
                pipeline.transformer.compile_repeated_blocks()
        found: dict[str, dict[str, list[float]]] = {name: {metric: [] for metric in METRICS} for name in rows}
        for name, row in [*rows.items()] * PASSES:
            pipeline, runs = pipelines[row.model], runs_of(row, config)

            def diffuse(row: Sampler, pipeline=pipeline) -> None:
                draw(pipeline.transformer, row, row_shift(settings, inputs, row), condition, shape, [0])

            def everything(row: Sampler, pipeline=pipeline) -> None:
                animate(pipeline, picture, prompt, row.steps, row.guidance_scale, 0, geometry.frames, small)

            for metric, work, repeats in zip(METRICS, (diffuse, everything), (runs.network, runs.whole), strict=True):
                for _ in range(runs.warmup):
                    work(runs.warm)
                found[name][metric] += time_runs(lambda work=work, row=row: work(row), repeats)
        del pipeline, pipelines, diffuse, everything, work  # before the next model is loaded
        seconds |= found
        state.mkdir(parents=True, exist_ok=True)
        with kept(state / KEPT) as temporary:
            temporary.write_text(json.dumps({"device": device_name(), "rows": seconds}))
    return {name: {metric: summary(runs) for metric, runs in seconds[name].items()} for name in settings.samples.rows}


def _kept(state: Path) -> dict[str, dict[str, list[float]]]:
    path = state / KEPT
    found = json.loads(path.read_text()) if is_kept(path) else {}
    return found["rows"] if found.get("device") == device_name() else {}


def time_runs(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of so many runs."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = []
    for _ in range(repeats):
        synchronise()
        start = time.perf_counter()
        work()
        synchronise()
        seconds.append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """The median, with the fastest and slowest run as bounds."""
    return {"mean": float(np.median(seconds)), "low": min(seconds), "high": max(seconds)}


def _timed_together(settings: Experiment, inputs: dict[str, Path]) -> list[list[str]]:
    """The rows' models, in groups that are on the device together: all of them; of large ones, one at a time."""
    models = list(dict.fromkeys(row.model for row in settings.samples.rows.values()))
    large = formats(inputs["teacher"])["transformer"] != torch.float32
    return [[model] for model in models] if large else [models]
