"""What the weights of a pipeline folder weigh, read from the headers of its files without loading any."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from vpae.teacher.folder import header, weight_files

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
