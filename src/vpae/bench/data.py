"""Whether encoding and reading of data keep up: the encoding of clips, and the wait of training for its batches.

Both are measured on what the experiment's finished stages hold, by the functions that its stages run.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from vpae.bench.measure import seconds_of, synchronise
from vpae.config import Experiment
from vpae.data.encoding import Encoders
from vpae.data.latents import encode_shard
from vpae.data.manifest import read_manifest
from vpae.distill.run import accelerator_for, at_start, batches_of
from vpae.experiment import ConfigError, Source
from vpae.graph import stage_folder, upstream
from vpae.models.wan import load_pipeline
from vpae.preemption import Request
from vpae.training.loop import SPEED, update
from vpae.training.speed import Cost, Speed, summary


def measure_data(source: Source, results: Path, device: torch.device, repeats: int) -> dict:
    """Both measurements, the second with the experiment's first method.

    Raises:
        ConfigError: a stage that they read is not finished; the message names it.
    """
    settings = source.settings
    method = next(iter(settings.methods))
    inputs = {name: stage_folder(source, name, results) for name in ("clips", *upstream(settings, method))}
    for name, folder in inputs.items():
        if not folder.is_dir():
            raise ConfigError(f"--parts data reads {folder}, which is not there: `vpae {name} --config {source.path}`")
    return {
        "encoding": _encoding(settings, inputs, device, repeats),
        "training": {"method": method, **_waiting(settings, method, inputs, device, repeats)},
    }


def _encoding(settings: Experiment, inputs: dict[str, Path], device: torch.device, repeats: int) -> dict:
    """Clips per second of the stage `latents`, and of the encoders alone on the same batches, in turns.

    The share is the median over shards; that of CPU-seconds does not depend on what else the machine does.
    """
    clips, config = read_manifest(inputs["clips"], "train"), settings.latents
    shards = [clips[n * config.shard_size : (n + 1) * config.shard_size] for n in range(repeats)]
    shards = [shard for shard in shards if shard]
    encoders = Encoders(load_pipeline(inputs["teacher"], transformer=None).to(device))
    found: dict[str, list[tuple[float, float]]] = {"stage": [], "encoders": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"

        def stage(shard: list) -> None:
            encode_shard(shard, settings, inputs["clips"], encoders, path, Request())

        stage(shards[0][: config.batch_size])  # warms up
        for shard in shards:
            found["stage"].append(_spent(partial(stage, shard), device))
            batches = [shard[n : n + config.batch_size] for n in range(0, len(shard), config.batch_size)]
            decoded = [np.stack([c.frames(settings.geometry, inputs["clips"]) for c in batch]) for batch in batches]
            captions = [[clip.caption for clip in batch] for batch in batches]
            bare = [*zip(decoded, captions, strict=True)]
            found["encoders"].append(_spent(lambda bare=bare: [encoders.clips(*one) for one in bare], device))
    pairs = [*zip(found["encoders"], found["stage"], strict=True)]
    count = sum(map(len, shards))
    return {
        "clips": count,
        **{f"{name}_clips_per_second": count / sum(seconds for seconds, _ in spent) for name, spent in found.items()},
        "share": median(bare / all_ for (bare, _), (all_, _) in pairs),
        "cpu_share": median(bare / all_ for (_, bare), (_, all_) in pairs),
    }


def _spent(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds, and CPU-seconds of all threads."""
    used = time.process_time()
    return seconds_of(work, device), time.process_time() - used


def _waiting(settings: Experiment, method: str, inputs: dict[str, Path], device: torch.device, repeats: int) -> dict:
    """What the loop says of its speed: the median over `repeats` steps, and one before them."""
    training = getattr(settings, method).training
    accelerator = accelerator_for(training, device)
    phase = at_start(settings, method, inputs, accelerator)
    batches = batches_of(inputs["latents"], training, settings.seed, method, accelerator)
    drawn = 0
    with tempfile.TemporaryDirectory() as folder:
        speed = Speed(Path(folder) / SPEED, repeats + 1, 0, Cost())
        batches = speed.noting_waits(batches)
        for step in range(repeats + 1):
            for number, turn in enumerate(phase.turns(step)):
                update(phase, turn, number, batches, drawn, training, settings.seed, step, accelerator)
                drawn += training.accumulate
            synchronise(device)
            speed.lap(step + 1)
        return summary(speed.file)
