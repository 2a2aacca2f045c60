"""What one use of each network of a pipeline takes, by running it on fake tensors.

Number formats are those of `models.formats`, which every stage follows.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vpae.bench.networks import random_condition, random_latents, random_transformer
from vpae.config import Experiment
from vpae.models.formats import LARGE, RESIZABLE, Weight, stored_dtype
from vpae.models.small_decoder import SmallDecoder
from vpae.models.wan import TEXT_TOKENS, decode_latents, encode_condition, encode_video, predict_x0, take_any_inputs
from vpae.placement import DTYPES
from vpae.planning.meter import Meter
from vpae.planning.network import Network, Pipeline, Sequence, build_encoder, count, fill

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Use:
    """One call of a network.

    Attributes:
        operations: of matrix products and convolutions.
        weights: bytes that the network holds.
        peak: most bytes besides, its results included.
        float32: whether it computes in that format.
    """

    operations: float
    weights: float
    peak: float
    float32: bool


@torch.no_grad()
def measure(module: nn.Module, work: Callable[[nn.Module], object]) -> Use:
    """Run a network that stands on the meta device on fake tensors."""
    with warnings.catch_warnings(), FakeTensorMode(), Meter() as meter:
        warnings.simplefilter("ignore")
        fill([module], CPU)
        weights = meter.now
        meter.peaks.clear()
        result = work(module.eval())  # noqa: F841, a result is alive as long as its work is looked at
        # Of most weights: diffusers keeps norms and modulation tables in float32 whatever the rest is.
        formats = stored_dtype({name: Weight(tuple(p.shape), p.dtype) for name, p in module.named_parameters()})
        operations, peak = float(meter.counts["model"]), float(meter.peak - weights)
        return Use(operations, float(weights), peak, formats is torch.float32)


def uses(settings: Experiment, pipeline: Pipeline, tokens: Sequence) -> dict[str, Use]:
    """One network evaluation of a batch of samples, of one video alone, and what the encoders and the VAE do."""
    g, batch, side = settings.geometry, settings.latents.batch_size, pipeline.image_encoder["image_size"]

    def encoder(name: str, work: Callable[[nn.Module], object]) -> Use:
        module = build_encoder(pipeline, name)
        return measure(module.to(by_size(module)) if name in RESIZABLE else module, work)

    def video(count: int, frames: int) -> Tensor:
        return torch.empty(count, 3, frames, g.height, g.width)

    def decoder() -> nn.Module:
        with torch.device("meta"):
            module = SmallDecoder() if settings.samples.decoder else build_encoder(pipeline, "vae")
        return nn.Module.to(module, DTYPES[settings.samples.vae_dtype])

    def placed(vae: nn.Module) -> nn.Module:
        if settings.samples.vae_tiles and isinstance(vae, AutoencoderKLWan):
            vae.enable_tiling()
        return vae

    def ids() -> Tensor:
        return torch.ones(1, TEXT_TOKENS, dtype=torch.long)

    return {
        "network": network_use(settings, pipeline.transformer, tokens, settings.samples.batch_size),
        "network_alone": network_use(settings, pipeline.transformer, tokens, 1),
        "text": encoder("text_encoder", lambda model: model(input_ids=ids(), attention_mask=ids())),
        "image": encoder(
            "image_encoder", lambda model: model(torch.empty(batch, 3, side, side), output_hidden_states=True)
        ),
        "encode": encoder("vae", lambda vae: encode_video(vae, video(batch, g.frames))),
        "condition": encoder("vae", lambda vae: encode_condition(vae, video(batch, 1)[:, :, 0], g.frames)),
        "condition_alone": encoder("vae", lambda vae: encode_condition(placed(vae), video(1, 1)[:, :, 0], g.frames)),
        "decode": measure(decoder(), lambda vae: decode_latents(placed(vae), random_latents(settings, 1, CPU))),
    }


def by_size(module: nn.Module) -> torch.dtype:
    """The number format of a transformer or text encoder."""
    return torch.bfloat16 if count(module) >= LARGE else torch.float32


def network_use(settings: Experiment, network: Network, tokens: Sequence, batch: int) -> Use:
    """One network evaluation of several videos: of two and three blocks, which make the line for all."""

    def predict(model: nn.Module) -> Tensor:
        take_any_inputs(model)
        condition = random_condition(settings, network, tokens, batch, CPU)
        return predict_x0(model, random_latents(settings, batch, CPU), torch.ones(batch), condition)

    dtype = by_size(network.build())

    def of(layers: int) -> Use:
        return measure(random_transformer(replace(network, layers=layers), torch.device("meta"), dtype), predict)

    two, three = of(2), of(3)
    line = {
        name: getattr(two, name) + (network.layers - 2) * (getattr(three, name) - getattr(two, name))
        for name in ("operations", "weights", "peak")
    }
    return Use(**line, float32=two.float32)
