"""How a pipeline is brought onto a device for sampling: number format, 8-bit weights, offloading, tiles, compilation.

The means are diffusers' own, and torchao's for int8.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline
from diffusers.hooks import apply_group_offloading
from torch import nn

from vpae.experiment import ConfigError
from vpae.models.formats import LARGE, channels_last, formats
from vpae.models.loras import merge_loras, read_loras
from vpae.models.wan import load_pipeline
from vpae.teacher.folder import require_whole

BY_TORCHAO = ("int8", "fp8-compute")  # of `Placement.quantize`
# Network evaluations from which on compiling pays: at 14B it takes some 15 s and saves half a second an evaluation.
COMPILED_FROM = 30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Placement:
    """How to bring a pipeline onto a device.

    Attributes:
        offload: none; model: one network at a time is on the GPU; group: one transformer block at a time.
        quantize: none; int8: the transformer's blocks, with a scale a row; fp8: stored in float8, computed in `dtype`;
            fp8-compute: products in float8 too, with a scale a row (Hopper and later, best compiled).
        tile: encode and decode in overlapping tiles of 256 x 256 pixels; None: where memory does not suffice without.
        compile: compile the transformer's blocks with torch.compile; None: where it pays, see `compiling_pays`.
        vae_dtype: one of `DTYPES`, of the VAE.
        channels_last: the VAE's memory layout on a GPU's tensor cores.
        dtype: one of `DTYPES`, of transformer and text encoder; None: by their sizes, see `formats`.

    Raises:
        ConfigError: two of them exclude each other.
    """

    offload: str = "none"
    quantize: str = "none"
    tile: bool | None = None
    compile: bool | None = None
    dtype: str | None = None
    vae_dtype: str = "float32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.offload == "group" and self.quantize in BY_TORCHAO:
            raise ConfigError(
                f"--offload group with --quantize {self.quantize}: these weights cannot be moved block by block; "
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
        return formats(model, DTYPES[self.dtype] if self.dtype else None, DTYPES[self.vae_dtype])


def compiling_pays(transformer: nn.Module, device: torch.device | str, evaluations: int) -> bool:
    """Whether so many evaluations of a network are worth compiling its blocks: on a GPU, of a large one."""
    large = sum(parameter.numel() for parameter in transformer.parameters()) >= LARGE
    return torch.device(device).type == "cuda" and large and evaluations >= COMPILED_FROM


def load_placed(
    model: Path,
    placement: Placement,
    device: torch.device | str,
    backend: str = "inductor",
    evaluations: int = 1,
    loras: Sequence[str] = (),
) -> WanImageToVideoPipeline:
    """Load a pipeline folder and bring it onto a device.

    Args:
        model, placement, device: which folder is brought onto which device, and how.
        backend: of torch.compile.
        evaluations: how often the transformer will be run.
        loras: each FILE or FILE:STRENGTH, to be merged into the transformer.

    Raises:
        FileNotFoundError: the folder is not a pipeline.
        ConfigError: int8 or products in float8 are wanted, and torchao is not installed, or the device has none.
        ArtifactError: the model is a stage's and was changed since, or a LoRA does not fit the transformer.
    """
    device = torch.device(device)
    # Whether it can be done, before minutes of loading.
    quantise = by_torchao(placement.quantize) if placement.quantize in BY_TORCHAO else None
    require_whole(model)
    dtypes = placement.formats(model)
    factors = read_loras(loras, model)
    pipeline = load_pipeline(model, dtypes)
    transformer = pipeline.transformer
    merge_loras(transformer, factors)
    if quantise is not None:
        quantise(transformer.blocks)
    elif placement.quantize == "fp8":
        transformer.enable_layerwise_casting(torch.float8_e4m3fn, dtypes["transformer"])
    if placement.tile:
        pipeline.vae.enable_tiling()
    if placement.channels_last:
        channels_last(pipeline.vae)
    compiles = placement.compile
    if compiles is None and placement.offload != "group" and placement.quantize != "fp8":
        compiles = compiling_pays(transformer, device, evaluations)
    if compiles:
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


def by_torchao(quantize: str) -> Callable[[nn.Module], None]:
    """What stores a module's matrices in int8, or has them and activations multiplied in float8, a scale a row.

    Raises:
        ConfigError: torchao is not installed, or not for this torch; or the GPU has no float8 products.
    """
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8WeightOnlyConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        raise ConfigError(
            f"--quantize {quantize} needs torchao: `pip install -c constraints.txt -e '.[quantize]'`, or take "
            f"--quantize fp8 ({error})"
        ) from error
    if quantize == "int8":
        return partial(quantize_, config=Int8WeightOnlyConfig())
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise ConfigError("--quantize fp8-compute needs a GPU of compute capability 8.9 or more; take --quantize fp8")
    # Inductor's settings stay as they are: torchao's take minutes, and round what else is computed in float32.
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    return partial(quantize_, config=config)
