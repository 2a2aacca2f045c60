"""The networks that are measured: a teacher's own, or ones of the same shapes with random weights, made on the device.

How long a network takes does not depend on its weights' values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn

from vpae.config import Experiment
from vpae.distill import METHODS
from vpae.distill.method import Method
from vpae.experiment import Source
from vpae.graph import stage_folder
from vpae.models.adapters import STUDENT
from vpae.models.formats import formats
from vpae.models.wan import Condition, first_frame_mask, load_pipeline
from vpae.planning.network import Network, Pipeline, Sequence, build_encoder


@dataclass
class Components:
    """A pipeline's networks on a device."""

    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan
    text_encoder: nn.Module
    image_encoder: nn.Module


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    """What is built inside the block has this number format."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_transformer(network: Network, device: torch.device, dtype: torch.dtype) -> WanTransformer3DModel:
    """A transformer with random weights that are drawn on the device; norms, modulation and time stay float32.

    Nothing passes through the machine's own memory, and no second copy is made: 16.4B weights take 33 GB in bfloat16.
    """
    with by_default(dtype):
        model = network.build(device)
    exact = WanTransformer3DModel._keep_in_fp32_modules
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name.split(".") for part in exact):
                parameter.data = parameter.data.float()
            elif parameter.dim() > 1:
                # Small enough that forty residual blocks do not overflow.
                parameter.normal_(std=0.02)
    return model


def random_components(pipeline: Pipeline, device: torch.device, dtype: torch.dtype) -> Components:
    """All networks of a pipeline with random weights, in the formats of sampling."""
    encoders = random_encoders(pipeline, device, dtype)
    return Components(_at_rest(random_transformer(pipeline.transformer, device, dtype)), **encoders)


def random_encoders(pipeline: Pipeline, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The text encoder in one format, VAE and image encoder in float32, by their names in `Components`."""
    with by_default(dtype):
        found = {"text_encoder": build_encoder(pipeline, "text_encoder", device)}
    found |= {name: build_encoder(pipeline, name, device) for name in ("vae", "image_encoder")}
    return {name: _at_rest(module) for name, module in found.items()}


def found_components(source: Source, results: Path, device: torch.device, dtype: torch.dtype) -> Components:
    """The networks of the experiment's teacher, as the stage `teacher` made or fetched it.

    Raises:
        FileNotFoundError: there is none; the message names the two remedies.
    """
    folder = stage_folder(source, "teacher", results)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no pipeline: run `vpae teacher --config {source.path}`, or measure with --random-weights"
        )
    pipeline = load_pipeline(folder, formats(folder, dtype)).to(device)
    return Components(**{part.name: _at_rest(getattr(pipeline, part.name)) for part in fields(Components)})


def _at_rest(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


def random_condition(
    settings: Experiment, network: Network, tokens: Sequence, batch: int, device: torch.device
) -> Condition:
    """A condition of the right shapes; the captions' ends are zeros, as padding is."""
    frames, height, width = settings.geometry.latent_shape
    rng = torch.Generator(device).manual_seed(settings.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device)

    text = draw(batch, tokens.text, network.text_dim)
    text[:, tokens.text // 2 :] = 0
    mask = first_frame_mask(batch, frames, height, width).to(device)
    return Condition(
        frame_BCFHW=torch.cat([mask, draw(batch, 16, frames, height, width)], dim=1),
        image_BND=draw(batch, tokens.image, network.image_dim),
        text_BLD=text,
        empty_text_LD=torch.cat([text[0, :1], torch.zeros_like(text[0, 1:])]),
    )


def random_latents(settings: Experiment, batch: int, device: torch.device) -> Tensor:
    """Latents (B, 16, F, H, W) of the right shape."""
    rng = torch.Generator(device).manual_seed(settings.seed + 1)
    return torch.randn((batch, 16, *settings.geometry.latent_shape), generator=rng, device=device)


@dataclass
class RandomNetworks:
    """Networks of the teacher's shape with random weights, for any method."""

    network: Network
    device: torch.device
    frozen: torch.dtype

    def transformer(self, model: str, trained: bool) -> WanTransformer3DModel:
        """One of any model: they all have one shape."""
        return random_transformer(self.network, self.device, torch.float32 if trained else self.frozen)

    def adapter(self, model: str, name: str = STUDENT) -> dict[str, torch.Tensor]:
        """None: a new adapter's weights are as good."""
        return {}


def build_phase(settings: Experiment, name: str, network: Network, device: torch.device) -> Method:
    """A phase of the real class on networks with random weights."""
    bf16 = getattr(settings, name).training.mixed_precision == "bf16"
    frozen = torch.bfloat16 if bf16 else torch.float32
    return METHODS[name].build(settings, RandomNetworks(network, device, frozen))
