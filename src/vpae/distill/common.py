"""What the phases share: data, noise, and the student's pipeline folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor

from vpae.artifacts import link_tree, write_json
from vpae.config import Training
from vpae.data.latents import LatentDataset
from vpae.models.wan import Condition
from vpae.training.randomness import Shuffled


def accelerator_for(training: Training) -> Accelerator:
    """Device, precision and processes of a run."""
    return Accelerator(mixed_precision=training.mixed_precision)


def batches_of(
    latents: Path, training: Training, seed: int, name: str, accelerator: Accelerator
) -> Callable[[int], tuple[Tensor, Condition]]:
    """Number of a micro-batch -> this process's latents and condition; every pass is shuffled anew."""
    dataset = LatentDataset(latents, "train")
    order = Shuffled(len(dataset), seed, name)
    size, rank, ranks = training.batch_size, accelerator.process_index, accelerator.num_processes

    def batch(drawn: int) -> tuple[Tensor, Condition]:
        first = (drawn * ranks + rank) * size
        return dataset.batch([order(first + i) for i in range(size)], accelerator.device)

    return batch


def noise_like(x: Tensor, rng: torch.Generator) -> Tensor:
    """Gaussian noise in float32 from the given generator."""
    return torch.randn(x.shape, generator=rng, device=x.device)


def student_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """One step goes from pure noise (t = 1) straight to x0; with more steps, noise is added again in between."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)


def save_student(teacher: Path, transformer: WanTransformer3DModel, shift: float, folder: Path) -> None:
    """Write a pipeline folder: the teacher's, with another transformer and the one-step scheduler."""
    link_tree(teacher, folder, skip=("transformer", "scheduler", "model_index.json"))
    transformer.save_pretrained(folder / "transformer")
    scheduler = student_scheduler(shift)
    scheduler.save_pretrained(folder / "scheduler")
    # The index names the scheduler's class, and released Wan pipelines have another one.
    index = json.loads((teacher / "model_index.json").read_text())
    write_json(folder / "model_index.json", {**index, "scheduler": ["diffusers", type(scheduler).__name__]})


def finish(
    out: Path, teacher: Path, ema: WanTransformer3DModel, shift: float, metrics: Path, training: Training
) -> dict:
    """Write the student with EMA weights and the metrics; returns counts."""
    save_student(teacher, ema, shift, out / "student")
    shutil.copy(metrics, out / "metrics.jsonl")
    return {"steps": training.steps, "parameters": sum(p.numel() for p in ema.parameters())}
