"""What the weights of a pipeline folder weigh, and in which number formats its networks compute.

The one rule for all stages and commands: large transformers and text encoders compute in bfloat16, small ones in
float32, whatever they are stored in. VAE and image encoder compute in float32: they are small, and lose most from low
precision.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from vpae.teacher.folder import header, weight_files

LARGE = 1_000_000_000  # parameters from which on a network is large
RESIZABLE = ("transformer", "text_encoder")  # the others keep float32 unless they are named
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def formats(
    folder: Path | str, dtype: torch.dtype | None = None, vae: torch.dtype = torch.float32
) -> dict[str, torch.dtype]:
    """Network -> number format, with diffusers' `default` for whatever else a folder holds.

    Args:
        folder: the pipeline; only the headers of its files are read.
        dtype: of transformer and text encoder; None: by their size.
        vae: of the VAE.
    """
    found = {"default": torch.float32, "vae": vae, "image_encoder": torch.float32}
    return found | {name: dtype or _by_size(Path(folder) / name) for name in RESIZABLE}


def _by_size(network: Path) -> torch.dtype:
    large = sum(weight.values for weight in stored_weights(network).values()) >= LARGE
    return torch.bfloat16 if large else torch.float32


@dataclass(frozen=True)
class Weight:
    """One stored tensor: its shape and number format."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def values(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


def stored_weights(folder: Path) -> dict[str, Weight]:
    """Name -> weight of a network's folder, of the files that diffusers would load; empty where there are none.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    found = {}
    if not any(folder.glob("[!.]*.safetensors*")):
        return found
    for path in weight_files(folder):
        header(path)  # refuses what is not whole
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                stored = file.get_slice(name)
                found[name] = Weight(tuple(stored.get_shape()), DTYPES.get(stored.get_dtype(), torch.float32))
    return found


def stored_dtype(weights: dict[str, Weight]) -> torch.dtype:
    """The number format of most of the values; float32 where there are none."""
    counted: dict[torch.dtype, int] = {}
    for weight in weights.values():
        counted[weight.dtype] = counted.get(weight.dtype, 0) + weight.values
    return max(counted, key=counted.__getitem__, default=torch.float32)


def channels_last(vae: nn.Module) -> nn.Module:
    """Lay a VAE's convolutions out with the channels last, for a GPU's tensor cores to need no copies; values stay."""
    formats = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
    for module in vae.modules():
        for kind, layout in formats.items():
            if isinstance(module, kind):
                module.weight.data = module.weight.data.contiguous(memory_format=layout)
    return vae
