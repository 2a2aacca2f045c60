"""What a method leaves: the student, again a pipeline folder that anyone can load, and weights beside it."""

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn

from vpae.artifacts import link_tree, write_json
from vpae.distill.networks import STUDENT_LORA
from vpae.models.adapters import Adapted, lora_names, merge
from vpae.models.wan import forget_origin, load_transformer
from vpae.training.sharding import full_state, unsharded


def student_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """One step goes from pure noise (t = 1) straight to x0; with more steps, noise is added again in between.

    By itself diffusers ends n > 1 steps near t = 0; its times are ours with `scheduler.sigma_min = 1 / n`.
    """
    return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)


def save_student(teacher: Path, transformer: WanTransformer3DModel, shift: float, folder: Path) -> None:
    """Write a pipeline folder: the teacher's, with another transformer and the one-step scheduler."""
    link_tree(teacher, folder, skip=("transformer", "scheduler", "model_index.json"))
    transformer.save_pretrained(folder / "transformer")
    forget_origin(folder / "transformer")
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


def save_ema(out: Path, teacher: Path, ema: WanTransformer3DModel | Adapted, shift: float) -> bool:
    """Write `student/` with the EMA weights; all processes must call it, the first one writes and returns True.

    An adapted student is merged into whole weights, and its adapter stands beside them.
    """
    if isinstance(ema, Adapted):
        save_weights(ema, out / STUDENT_LORA)
        lora = out / STUDENT_LORA  # there only in the first process
        whole = merge(load_transformer(teacher, torch.float32), load_file(lora), ema.alpha) if lora.exists() else None
    else:
        whole = unsharded(ema)
    if whole is None:
        return False
    save_student(teacher, whole, shift, out / "student")
    return True
