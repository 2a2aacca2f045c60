"""Watch a method while choosing its settings: train it, and print the Frechet distance of its single step now and then.

    python -m vpae.evaluation.probe METHOD --config configs/tiny.yaml --every 10 --set METHOD.guidance_scale=1

Reads the finished stages before the phase and leaves nothing behind.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from vpae.artifacts import ArtifactError
from vpae.config import Experiment, Sampler
from vpae.data.latents import LatentDataset
from vpae.distill import METHODS
from vpae.distill.run import accelerator_for, at_start, batches_of
from vpae.evaluation.frechet import RandomFeatures, frechet
from vpae.evaluation.latents import drawn_beside
from vpae.experiment import ConfigError, load
from vpae.graph import RESULTS, stage_folder, upstream
from vpae.training.loop import train


def one_step_distance(model: nn.Module, dataset: LatentDataset, count: int, settings: Experiment, device) -> float:
    """Frechet distance of the model's single steps on the first `count` held-out clips."""
    row, features = Sampler(model="student", steps=1), RandomFeatures().to(device)
    seeds = {i: i for i in range(count)}
    pairs = drawn_beside(dataset, seeds, model, row, settings.teacher.shift)
    real, made = zip(*((features(x), features(y)) for x, y in pairs), strict=True)
    return frechet(torch.cat(made).cpu().numpy(), torch.cat(real).cpu().numpy())


def main(argv: list[str] | None = None) -> int:
    """Run the probe; prints one JSON line per measurement, the first one before any training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", choices=tuple(METHODS))
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--every", type=int, default=10, help="steps between measurements")
    parser.add_argument("--clips", type=int, default=256, help="held-out clips to measure on")
    arguments = parser.parse_args(argv)
    if arguments.every < 1 or arguments.clips < 2:
        parser.error("--every is at least 1, --clips at least 2")
    try:
        _probe(arguments)
    except (ConfigError, ArtifactError, FileNotFoundError) as error:
        print(f"probe: {error}", file=sys.stderr)
        return 2
    return 0


def _probe(arguments: argparse.Namespace) -> None:
    # The stages before it are the experiment's own: overrides are the probe's alone.
    source, settings = load(arguments.config), load(arguments.config, arguments.set).settings
    names = upstream(source.settings, arguments.phase)
    inputs = {name: stage_folder(source, name, arguments.results) for name in names}
    training = getattr(settings, arguments.phase).training
    accelerator = accelerator_for(training)
    phase = at_start(settings, arguments.phase, inputs, accelerator)
    batches = batches_of(inputs["latents"], training, settings.seed, arguments.phase, accelerator)
    dataset = LatentDataset(inputs["latents"], "held_out")
    count = min(arguments.clips, len(dataset))

    def measure(step: int, **values: float) -> None:
        ema, raw = (
            one_step_distance(m, dataset, count, settings, accelerator.device) for m in (phase.ema, phase.generator)
        )
        print(json.dumps({"step": step, "frechet_ema": ema, "frechet_raw": raw, **values}), flush=True)

    measure(0)
    with tempfile.TemporaryDirectory() as state:
        for done in sorted({*range(arguments.every, training.steps, arguments.every), training.steps}):
            total = training.schedule_steps or training.steps
            part = training.model_copy(update={"steps": done, "schedule_steps": total})
            metrics = train(phase, batches, part, settings.seed, Path(state), accelerator)
            last = json.loads(metrics.read_text().splitlines()[-1])
            measure(last.pop("step"), **last)


if __name__ == "__main__":
    sys.exit(main())
