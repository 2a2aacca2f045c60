"""What to do when sampling runs out of memory: the VAE goes on in tiles, or a message names the switches that help."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from diffusers import AutoencoderKLWan

from vpae.experiment import ConfigError
from vpae.models.formats import RESIZABLE, Weight, stored_weights
from vpae.placement import BY_TORCHAO, DTYPES, Placement

Made = TypeVar("Made")
NETWORKS = ("transformer", "text_encoder", "image_encoder", "vae")
TILE = 256  # pixels, AutoencoderKLWan's
# What comes as a bare RuntimeError: from the machine's allocators, and from CUDA's libraries.
HOST_SIGNS = ("can't allocate memory", "not enough memory")
GPU_SIGNS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
)


@dataclass(frozen=True)
class Sizes:
    """The weights of a pipeline folder, network by network."""

    networks: dict[str, dict[str, Weight]]
    formats: dict[str, torch.dtype]  # what `Placement.dtype = None` means for each of them

    @classmethod
    def of(cls, model: Path) -> "Sizes":
        """Read a folder's headers."""
        return cls({name: stored_weights(model / name) for name in NETWORKS}, Placement().formats(model))

    def resident_bytes(self, placement: Placement) -> int:
        """The most bytes of weights that are on the device at a time."""
        bytes_of = {network: self._bytes(network, placement) for network in self.networks}
        whole = {name: sum(weights.values()) for name, weights in bytes_of.items()}
        if placement.offload == "none":
            return sum(whole.values())
        if placement.offload == "model":
            return max(whole.values())
        blocks = _summed(bytes_of["transformer"], _block)
        outside = blocks.pop("", 0)  # stays for the whole pass
        transformer = outside + max(blocks.values(), default=0)
        layers = [_summed(bytes_of[encoder], _layer).values() for encoder in ("text_encoder", "image_encoder")]
        return whole["vae"] + max(transformer, *(max(sizes, default=0) for sizes in layers))

    def _bytes(self, network: str, placement: Placement) -> dict[str, int]:
        """Name -> bytes of a network's weights once it is placed."""
        weights, dtype = self.networks[network], self.formats[network]
        if network == "vae":
            dtype = DTYPES[placement.vae_dtype]
        elif placement.dtype and network in RESIZABLE:
            dtype = DTYPES[placement.dtype]
        found = {name: weight.values * dtype.itemsize for name, weight in weights.items()}
        if network == "transformer" and placement.quantize != "none":
            for name, weight in weights.items():
                if not name.startswith("blocks.") or len(weight.shape) != 2:
                    continue
                found[name] = weight.values
                bias = f"{_layer(name)}.bias"
                if placement.quantize == "fp8":
                    found[bias] = weights[bias].values
                else:
                    found[name] += weight.shape[0] * torch.float32.itemsize  # the scale of each row
        return found


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _block(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""


def _summed(sizes: dict[str, int], group: Callable[[str], str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, size in sizes.items():
        found[group(name)] = found.get(group(name), 0) + size
    return found


def tiled_if_short(vae: AutoencoderKLWan, work: Callable[[], Made]) -> Made:
    """The result of `work`, which has the VAE compute. If a GPU's memory does not suffice, once more in tiles.

    Raises:
        RuntimeError: whatever `work` raises, if tiles are no remedy or were none.
    """
    try:
        return work()
    except RuntimeError as error:
        if vae.use_tiling or exhausted_memory(error) != "gpu":
            raise
    # Here the error is gone, and with it what its traceback held on the GPU.
    print("the GPU's memory does not suffice: the VAE goes on in tiles (--tile)", file=sys.stderr)
    vae.clear_cache()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    vae.enable_tiling()
    return work()


@contextmanager
def explained(model: Path, placement: Placement, device: str, frames: int, height: int, width: int) -> Iterator[None]:
    """Turn an exhausted memory into advice.

    Raises:
        ConfigError: in place of the allocator's error; names the switches that help, in the order to try them.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        exhausted = exhausted_memory(error)
        if exhausted is None:
            raise
        place = _gpu(device) if exhausted == "gpu" else "this machine"
        text = advice(Sizes.of(model), placement, place, exhausted == "gpu", frames, height, width)
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{text}\n({first_line})") from error


def exhausted_memory(error: BaseException) -> Literal["gpu", "machine"] | None:
    """Whose memory an error says is exhausted; None for other errors."""
    if isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in GPU_SIGNS):
        return "gpu"
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in HOST_SIGNS):
        return "machine"
    return None


def advice(sizes: Sizes, placement: Placement, place: str, on_gpu: bool, frames: int, height: int, width: int) -> str:
    """The message: what was tried, and each switch with what it saves by itself."""
    lines = [f"out of memory on {place}, sampling {frames} frames of {width} x {height}"]

    def held(placement: Placement) -> int:
        return sizes.resident_bytes(placement if on_gpu else replace(placement, offload="none"))

    now = held(placement)
    if now:
        lines[0] += f"; weights take {_gigabytes(now)} there"
    options = [
        (switch, f"saves {_gigabytes(now - after)} of weights")
        for switch, other in _switches(sizes, placement, on_gpu)
        if (after := held(other)) < now
    ]
    tried = placement.tile or (placement.tile is None and on_gpu)  # see `tiled_if_short`
    if not tried and max(height, width) > TILE:
        share = height * width / (min(height, TILE) * min(width, TILE))
        options.insert(0, ("--tile", f"the VAE works on one tile at a time, {share:.1f} times smaller"))
    options.append(("--num-frames", "fewer frames take proportionally less beside the weights"))
    if on_gpu and not options[:-1]:
        lines[0] += "; every switch is on already"
    return "\n".join([f"{lines[0]}. Try, in this order:", *(f"  {switch:22} {what}" for switch, what in options)])


def _switches(sizes: Sizes, placement: Placement, on_gpu: bool) -> list[tuple[str, Placement]]:
    """What can be changed, from the cheapest in speed and quality to the dearest."""
    found = []
    if (placement.dtype or str(sizes.formats["transformer"]).removeprefix("torch.")) == "float32":
        found.append(("--dtype bfloat16", replace(placement, dtype="bfloat16")))
    if not on_gpu:  # the machine's own memory holds every network, and holds it whole before it is quantised
        return found
    if placement.offload == "none":
        found.append(("--offload model", replace(placement, offload="model")))
    if placement.quantize == "none":
        eight_bits = "int8" if placement.compile else "fp8"
        found.append((f"--quantize {eight_bits}", replace(placement, quantize=eight_bits)))
    if placement.offload != "group":  # which excludes compilation and torchao's weights
        switch, quantize = "--offload group", placement.quantize
        if placement.compile:
            switch += " without --compile"
        if quantize in BY_TORCHAO:
            switch, quantize = f"{switch} without --quantize", "none"
        found.append((switch, replace(placement, compile=False, offload="group", quantize=quantize)))
    return found


def _gpu(device: str) -> str:
    if not torch.cuda.is_available():
        return device
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({_gigabytes(properties.total_memory)})"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"
