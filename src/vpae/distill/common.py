"""What the phases share: data, noise, and the student's pipeline folder."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vpae.artifacts import link_tree, write_json
from vpae.config import Experiment, Training
from vpae.data.latents import LatentDataset
from vpae.experiment import ConfigError
from vpae.models.adapters import Adapted, lora_names, merge
from vpae.models.wan import Condition, load_transformer
from vpae.training.loop import train
from vpae.training.precision import take_exact_inputs
from vpae.training.randomness import Shuffled
from vpae.training.sharding import data_rank, empty_transformer, full_state, is_sharded, spread, unsharded

STUDENT_LORA = "student_lora.safetensors"  # the EMA adapter of a student trained as one


def accelerator_for(training: Training) -> Accelerator:
    """Device, precision and processes of a run.

    Raises:
        ConfigError: several processes were started that do not see each other, and would each train alone.
    """
    accelerator = Accelerator(mixed_precision=training.mixed_precision)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise ConfigError(
            f"WORLD_SIZE = {started} processes were started, but this one sees {accelerator.num_processes}: each would "
            "train alone. To train on CPUs set ACCELERATE_USE_CPU=true; on GPUs see that every process has one "
            "(`nvidia-smi`, CUDA_VISIBLE_DEVICES) and that a launcher set LOCAL_RANK; or unset WORLD_SIZE"
        )
    return accelerator


def batches_of(
    latents: Path, training: Training, seed: int, name: str, accelerator: Accelerator
) -> Callable[[int], tuple[Tensor, Condition]]:
    """Number of a micro-batch -> this process's latents and condition; every pass is shuffled anew."""
    dataset = LatentDataset(latents, "train")
    order = Shuffled(len(dataset), seed, name)
    size, (rank, ranks) = training.batch_size, data_rank(training.sharding, accelerator)

    def batch(drawn: int) -> tuple[Tensor, Condition]:
        first = (drawn * ranks + rank) * size
        return dataset.batch([order(first + i) for i in range(size)], accelerator.device)

    return batch


def train_phase(settings: Experiment, name: str, inputs: dict[str, Path], state: Path, build: Callable) -> tuple:
    """Build a phase, spread it over the processes and train it; returns it and the path of its metrics."""
    training = getattr(settings, name).training
    accelerator = accelerator_for(training)
    phase = build(settings, inputs, accelerator.device)
    spread(phase, training, accelerator)
    batches = batches_of(inputs["latents"], training, settings.seed, name, accelerator)
    return phase, train(phase, batches, training, settings.seed, state, accelerator)


def load_network(folder: Path, training: Training, device: torch.device, trained: bool) -> WanTransformer3DModel:
    """Load the transformer of a pipeline folder as a phase needs it.

    Args:
        folder: the pipeline.
        training: its precision: under bf16, frozen weights are held as bf16 (norms and modulation as float32).
        device: where it will run. If it is to be sharded it stays on the CPU, and only the first process loads it.
        trained: its weights will be moved, so they have to be float32.
    """
    dtype = torch.float32 if trained or training.mixed_precision == "no" else torch.bfloat16
    if not is_sharded(training.sharding):
        return load_transformer(folder, dtype).to(device)
    if dist.get_rank() == 0:
        return load_transformer(folder, dtype)
    return empty_transformer(WanTransformer3DModel.load_config(str(folder), subfolder="transformer"))


def networks_of(**roles: nn.Module) -> dict[str, WanTransformer3DModel]:
    """The transformers behind a phase's roles, each once: those of adapted networks are all the one base.

    Their inputs are made exact, see `training.precision`.
    """
    networks = {}
    for name, module in roles.items():
        name, network = ("base", module.base) if isinstance(module, Adapted) else (name, module)
        networks[name] = network
        take_exact_inputs(network)
    return networks


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


def save_weights(module: nn.Module, file: Path) -> None:
    """Write a module's weights, gathered if they are sharded; all processes must call it, the first one writes."""
    state = {name: value.contiguous() for name, value in full_state(module).items()}
    if not state:
        return
    if isinstance(module, Adapted):
        save_file(lora_names(state), file, metadata={"lora_alpha": str(module.alpha)})
    else:
        save_file(state, file)


def finish(
    out: Path, teacher: Path, ema: WanTransformer3DModel | Adapted, shift: float, metrics: Path, training: Training
) -> dict:
    """Write the student with EMA weights and the metrics; returns counts.

    All processes must call it; the first one writes. An adapted student is merged into whole weights, and its adapter
    stands beside them.
    """
    counts = {"steps": training.steps, "parameters": sum(p.numel() for p in ema.parameters())}
    if isinstance(ema, Adapted):
        save_weights(ema, out / STUDENT_LORA)
        lora = out / STUDENT_LORA  # there only in the first process
        whole = merge(load_transformer(teacher, torch.float32), load_file(lora), ema.alpha) if lora.exists() else None
    else:
        whole = unsharded(ema)
    if whole is not None:
        save_student(teacher, whole, shift, out / "student")
        shutil.copy(metrics, out / "metrics.jsonl")
    return counts
