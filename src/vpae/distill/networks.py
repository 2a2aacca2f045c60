"""Where the networks of a method come from."""

from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from vpae.config import Training
from vpae.distill.method import TEACHER
from vpae.models.adapters import STUDENT, Adapted
from vpae.models.wan import load_transformer
from vpae.training.precision import fuse_norms, take_exact_inputs
from vpae.training.sharding import empty_transformer, is_sharded


def lora_file(name: str) -> str:
    """The file of an adapter in a method's folder; a student's is its EMA."""
    return f"{name}_lora.safetensors"


STUDENT_LORA = lora_file(STUDENT)


class Networks(Protocol):
    """Networks by the model they belong to: the teacher, or the student of a method.

    Those of a finished stage's folder are `Stored`; benchmarks and plans have others of the same shapes.
    """

    device: torch.device

    def transformer(self, model: str, trained: bool) -> WanTransformer3DModel:
        """A new copy of a model's transformer; float32 if its weights will be moved."""

    def adapter(self, model: str, name: str = STUDENT) -> dict[str, Tensor]:
        """An adapter that a method has left: of a student that was trained as one, or of a fake model."""


class Stored:
    """The networks in the folders of finished stages.

    Args:
        inputs: stage -> folder.
        training: its precision: under bf16, frozen weights are held as bf16 (norms and modulation as float32).
        device: where they will run. If they are to be sharded they stay on the CPU, and only the first process loads
            them.
    """

    def __init__(self, inputs: dict[str, Path], training: Training, device: torch.device):
        self.inputs, self.training, self.device = inputs, training, device

    def transformer(self, model: str, trained: bool) -> WanTransformer3DModel:
        """As `Networks`."""
        folder = self.inputs[model] if model == TEACHER else self.inputs[model] / "student"
        dtype = torch.float32 if trained or self.training.mixed_precision == "no" else torch.bfloat16
        if not is_sharded(self.training.sharding):
            return load_transformer(folder, dtype).to(self.device)
        if dist.get_rank() == 0:
            return load_transformer(folder, dtype)
        return empty_transformer(WanTransformer3DModel.load_config(str(folder), subfolder="transformer"))

    def adapter(self, model: str, name: str = STUDENT) -> dict[str, Tensor]:
        """As `Networks`."""
        return load_file(self.inputs[model] / lora_file(name))


def networks_of(**roles: nn.Module) -> dict[str, WanTransformer3DModel]:
    """The transformers behind a phase's roles, each once: those of adapted networks are all the one base.

    Their inputs are made exact, see `training.precision`.
    """
    networks = {}
    for name, module in roles.items():
        name, network = ("base", module.base) if isinstance(module, Adapted) else (name, module)
        networks[name] = network
        take_exact_inputs(network)
        fuse_norms(network)
    return networks
