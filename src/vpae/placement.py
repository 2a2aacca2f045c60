"""How a pipeline is brought onto a device for sampling: number format, 8-bit weights, offloading, tiles, compilation.

The means are diffusers' own, and torchao's for int8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline
from diffusers.hooks import apply_group_offloading
from torch import nn

from vpae.experiment import ConfigError
from vpae.models.formats import formats
from vpae.models.wan import load_pipeline

OFFLOADS = {
    "none": "every network stays on the GPU",
    "model": "one network at a time is there",
    "group": "one transformer block at a time",
}
QUANTISED = {
    "none": "weights as --dtype says",
    "int8": "the transformer's blocks in int8, one scale a row (torchao)",
    "fp8": "the transformer's blocks stored in float8 and computed in --dtype",
}
_INSTALL = "`pip install -c constraints.txt -e '.[quantize]'`, or take --quantize fp8"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Placement:
    """How to bring a pipeline onto a device.

    Attributes:
        offload: one of `OFFLOADS`.
        quantize: one of `QUANTISED`.
        tile: encode and decode in overlapping tiles of 256 x 256 pixels.
        compile: compile the transformer's blocks with torch.compile.
        dtype: one of `DTYPES`, of transformer and text encoder; None: by their sizes, see `formats`.

    Raises:
        ConfigError: two of them exclude each other.
    """

    offload: str = "none"
    quantize: str = "none"
    tile: bool = False
    compile: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.offload == "group" and self.quantize == "int8":
            raise ConfigError(
                "--offload group with --quantize int8: int8 weights cannot be moved block by block; "
                "take --quantize fp8, or --offload model"
            )
        if self.compile and self.offload == "group":
            raise ConfigError(
                "--compile with --offload group: compiled blocks cannot have their weights moved away; "
                "leave one of them out, or take --offload model"
            )
        if self.compile and self.quantize == "fp8":
            raise ConfigError(
                "--compile with --quantize fp8: weights that change their format at every use cannot be compiled; take "
                "--quantize int8, or leave --compile out"
            )

    def formats(self, model: Path) -> dict[str, torch.dtype]:
        """Network -> number format in which it computes."""
        return formats(model, DTYPES[self.dtype] if self.dtype else None)


def load_placed(
    model: Path, placement: Placement, device: torch.device | str, backend: str = "inductor"
) -> WanImageToVideoPipeline:
    """Load a pipeline folder and bring it onto a device.

    Args:
        model: the folder.
        placement: how.
        device: where the networks compute.
        backend: of torch.compile.

    Raises:
        FileNotFoundError: the folder is not a pipeline.
        ConfigError: int8 is wanted, and torchao is not installed.
    """
    device, dtypes = torch.device(device), placement.formats(model)
    to_int8 = _int8() if placement.quantize == "int8" else None  # whether it can be done, before minutes of loading
    pipeline = load_pipeline(model, dtypes)
    transformer = pipeline.transformer
    if to_int8 is not None:
        to_int8(transformer.blocks)
    elif placement.quantize == "fp8":
        transformer.enable_layerwise_casting(torch.float8_e4m3fn, dtypes["transformer"])
    if placement.tile:
        pipeline.vae.enable_tiling()
    if placement.compile:
        transformer.compile_repeated_blocks(backend=backend)
    _offload(pipeline, placement.offload, device)
    return pipeline


def _offload(pipeline: WanImageToVideoPipeline, offload: str, device: torch.device) -> None:
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "group":
        pipeline.transformer.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1)
        for encoder in (pipeline.text_encoder, pipeline.image_encoder):
            apply_group_offloading(encoder, onload_device=device, offload_type="leaf_level")
        pipeline.vae.to(device)
    else:
        pipeline.to(device)


def compute_in_fp8(transformer: nn.Module) -> None:
    """Have the blocks' matrices multiplied in float8, weights and activations with a scale a row (torchao).

    Raises:
        ConfigError: torchao is not installed, or the GPU has no float8 products.
    """
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise ConfigError(f"--quantize fp8-compute needs torchao: {_INSTALL} ({error})") from error
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise ConfigError("--quantize fp8-compute needs a GPU of compute capability 8.9 or more; take --quantize fp8")
    # Inductor's settings stay as they are: torchao's take minutes, and round what else is computed in float32.
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(transformer.blocks, config)


def _int8() -> Callable[[nn.Module], None]:
    """What stores a module's matrices in int8.

    Raises:
        ConfigError: torchao is not installed, or not for this torch.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ConfigError(f"--quantize int8 needs torchao: {_INSTALL} ({error})") from error
    return partial(quantize_, config=Int8WeightOnlyConfig())
