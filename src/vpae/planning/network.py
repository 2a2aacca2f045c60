"""The networks of a teacher that need not be there: their shapes, built on the meta device, where weights cost nothing.

Shapes come from the teacher's own files where they are, else from `teacher.architecture`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vpae.config import Experiment
from vpae.experiment import ConfigError, Source
from vpae.models.wan import SHORT_TEXT_TOKENS, TEXT_TOKENS


@dataclass(frozen=True)
class Network:
    """Shape of a Wan image-to-video transformer; the defaults are those of Wan2.1-I2V-14B."""

    layers: int = 40
    heads: int = 40
    head_dim: int = 128
    ffn: int = 13824
    in_channels: int = 36
    out_channels: int = 16
    text_dim: int = 4096
    image_dim: int = 1280
    freq_dim: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return self.heads * self.head_dim

    @classmethod
    def of_config(cls, config: Mapping) -> "Network":
        """The shape in a `WanTransformer3DModel`'s config.json."""
        found = {field: config[key] for field, key in CONFIG_KEYS.items()}
        return cls(**found | {"patch": tuple(found["patch"])})

    def build(self, device: torch.device | str = "meta") -> nn.Module:
        """The real `WanTransformer3DModel` of this shape; on the meta device it takes no memory."""
        from diffusers import WanTransformer3DModel

        with torch.device(device):
            values = {key: getattr(self, field) for field, key in CONFIG_KEYS.items()}
            return WanTransformer3DModel(**values, added_kv_proj_dim=self.width)


# Field of a `Network` -> argument of `WanTransformer3DModel`.
CONFIG_KEYS = {
    "layers": "num_layers",
    "heads": "num_attention_heads",
    "head_dim": "attention_head_dim",
    "ffn": "ffn_dim",
    "patch": "patch_size",
    **{name: name for name in ("in_channels", "out_channels", "text_dim", "image_dim", "freq_dim")},
}


@dataclass(frozen=True)
class Sequence:
    """How many tokens of each kind one clip has."""

    video: int
    text: int
    image: int


# UMT5-XXL's encoder, CLIP ViT-H/14's vision half and Wan2.1's VAE, as the released image-to-video pipelines have them.
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
CLIP_VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Pipeline:
    """Shapes of all networks of a `WanImageToVideoPipeline`; the plain dicts are arguments of the config classes."""

    transformer: Network = field(default_factory=Network)
    text_encoder: dict = field(default_factory=lambda: dict(UMT5_XXL))
    image_encoder: dict = field(default_factory=lambda: dict(CLIP_VIT_H))
    vae: dict = field(default_factory=dict)  # diffusers' defaults are Wan2.1's VAE

    @property
    def image_tokens(self) -> int:
        """Tokens of the image encoder: its patches and the class token; 257 for CLIP ViT-H/14."""
        return (self.image_encoder["image_size"] // self.image_encoder["patch_size"]) ** 2 + 1


ARCHITECTURES = {
    "wan2.1-i2v-14b": Pipeline(),
    # Wan2.1's 1.3B shape with the 36 input channels and the image branch of I2V (Wan2.1-Fun-1.3B-InP).
    "wan2.1-i2v-1.3b": Pipeline(Network(layers=30, heads=12, ffn=8960)),
}
RELEASED = {  # hub ids (lower case) whose shape is known without a look at their files
    "wan-ai/wan2.1-i2v-14b-480p-diffusers": "wan2.1-i2v-14b",
    "wan-ai/wan2.1-i2v-14b-720p-diffusers": "wan2.1-i2v-14b",
}


def pipeline_of(source: Source) -> Pipeline:
    """Shapes of the networks of an experiment's teacher, whether its weights are there or not.

    Raises:
        ConfigError: the weights are absent and their shape is not named; or what is named is not what is there.
    """
    teacher = source.settings.teacher
    if teacher.source == "train":
        return _tiny(source.settings)
    folder = Path(teacher.path) if teacher.source == "folder" else cached_snapshot(teacher.path, teacher.revision)
    named = teacher.architecture or (RELEASED.get(teacher.path.lower(), "") if teacher.source == "hub" else "")
    if folder is None or not (folder / "transformer" / "config.json").is_file():
        if named:
            return ARCHITECTURES[named]
        raise ConfigError(
            f"{source.path}: teacher.path: {teacher.path} is not here, and its shape is unknown; `dvc pull` it, or set "
            f"teacher.architecture to one of {', '.join(ARCHITECTURES)}"
        )
    found = _found(folder)
    if teacher.architecture and found.transformer != ARCHITECTURES[teacher.architecture].transformer:
        raise ConfigError(
            f"{source.path}: teacher.architecture = {teacher.architecture}, but {folder}/transformer/config.json has "
            f"{found.transformer.layers} layers of width {found.transformer.width}; correct one of the two"
        )
    return found


def tokens_of(settings: Experiment, pipeline: Pipeline) -> Sequence:
    """Tokens of one clip: Wan2.1 has 32,760 at 81 x 832 x 480 and 75,600 at 81 x 1280 x 720.

    Captions are padded to 32 tokens if all are shorter, as the procedural world's are.
    """
    video = prod(settings.geometry.latent_shape) // prod(pipeline.transformer.patch)
    text = SHORT_TEXT_TOKENS if settings.clips.source == "world" else TEXT_TOKENS
    return Sequence(video, text, pipeline.image_tokens)


def cached_snapshot(hub_id: str, revision: str) -> Path | None:
    """The folder of a hub repository at a commit in the local cache; None where it is not, or not whole.

    Whole: the index and a config of every network are there (weights are looked for by `planning.presence`).
    """
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(hub_id, "model_index.json", revision=revision)
    return Path(index).parent if isinstance(index, str) else None


def _found(folder: Path) -> Pipeline:
    def config(part: str) -> dict:
        path = folder / part / "config.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    image = config("image_encoder")
    return Pipeline(
        Network.of_config(config("transformer")),
        _picked(config("text_encoder"), UMT5_XXL),
        _picked(image.get("vision_config", image), CLIP_VIT_H),  # a whole CLIP's config holds its vision half's
        _arguments(config("vae")),
    )


def _arguments(config: Mapping) -> dict:
    """Of a network of diffusers, without its notes on itself."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _picked(config: Mapping, like: Mapping) -> dict:
    return {key: config.get(key, default) for key, default in like.items()}


def _tiny(settings: Experiment) -> Pipeline:
    """The shapes that `vpae.teacher` trains."""
    from vpae.teacher.encoders import build_image_encoder, build_text_encoder
    from vpae.teacher.flow_matching import build
    from vpae.teacher.vae import build as build_vae

    teacher, geometry, encoders = settings.teacher, settings.geometry, settings.teacher.encoders
    with torch.device("meta"):
        transformer = build(teacher.transformer, encoders.text_dim, encoders.image_dim)
        text_encoder = build_text_encoder(encoders, encoders.vocabulary)
        image_encoder, _ = build_image_encoder(encoders, min(geometry.height, geometry.width))
        vae = build_vae(teacher.vae)
    return Pipeline(
        Network.of_config(transformer.config),
        _picked(text_encoder.config.to_dict(), UMT5_XXL),
        _picked(image_encoder.config.to_dict(), CLIP_VIT_H),
        _arguments(vae.config),
    )


def build_encoder(pipeline: Pipeline, name: str, device: torch.device | str = "meta") -> nn.Module:
    """The `vae`, `text_encoder` or `image_encoder` of a pipeline's shapes; on the meta device without weights."""
    from diffusers import AutoencoderKLWan
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    with torch.device(device):
        if name == "vae":
            return AutoencoderKLWan(**pipeline.vae)
        if name == "text_encoder":
            return UMT5EncoderModel(UMT5Config(**pipeline.text_encoder))
        return CLIPVisionModel(CLIPVisionConfig(**pipeline.image_encoder))


def parameters_of(pipeline: Pipeline) -> dict[str, int]:
    """Parameters of each of a pipeline's networks."""
    encoders = {name: count(build_encoder(pipeline, name)) for name in ("vae", "text_encoder", "image_encoder")}
    return {"transformer": count(pipeline.transformer.build()), **encoders}


def fill(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Give weights and tables that stand on the meta device memory; of fake tensors, the semblance of it."""
    new: dict[int, nn.Parameter] = {}
    for module in nn.ModuleList(networks).modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                new.setdefault(id(p), nn.Parameter(_empty(p, device), requires_grad=p.requires_grad))
                module._parameters[name] = new[id(p)]
        for name, table in module._buffers.items():
            if table is not None:
                module._buffers[name] = _empty(table, device)


def _empty(like: Tensor, device: torch.device) -> Tensor:
    if isinstance(like, DTensor):
        return DTensor(_empty(like._local_tensor, device), like._spec, requires_grad=False)
    return torch.empty(like.shape, dtype=like.dtype, device=device)


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())
