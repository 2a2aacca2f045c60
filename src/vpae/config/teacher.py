"""Stage `teacher`, and the small networks that it can train."""

import math
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from vpae.config.clips import VAE_STRIDE
from vpae.config.section import NonNegative, Positive, Section, Share
from vpae.config.training import Optimizer, Times, Training


class TinyVae(Section):
    """A small `AutoencoderKLWan` with Wan2.1's geometry (16 channels, 4x8x8) and its training."""

    base_dim: Positive = Field(16, description="Channels at full resolution.")
    dim_mult: tuple[int, int, int, int] = Field((1, 1, 2, 4), description="Channel multiples at the four resolutions.")
    crop: Positive = Field(32, multiple_of=8, description="Training crops, pixels; a multiple of 8.")
    crop_frames: Positive = Field(5, description="Training crops, frames; 4k + 1.")
    image_steps: int = Field(
        3000, ge=0, description="How many of the first steps are on single frames, which cost far less."
    )
    kl_weight: NonNegative = Field(1e-6, description="Weight of the KL term, summed per latent value.")
    training: Training = Field(
        Training(steps=4500, batch_size=16, ema_decay=0.99), description="The first run of the training loop."
    )
    optimizer: Optimizer = Field(
        Optimizer(learning_rate=1e-3, warmup_steps=50, cosine=True), description="Of the first run."
    )
    whole_training: Training = Field(
        Training(steps=600, batch_size=8, ema_decay=0.99),
        description="A second run on crops as long as the clips: the causal VAE does not extrapolate in time.",
    )
    whole_optimizer: Optimizer = Field(
        Optimizer(learning_rate=5e-4, warmup_steps=20, cosine=True), description="Of the second run."
    )
    decoder_training: Training = Field(
        Training(steps=1200, batch_size=8, ema_decay=0.99),
        description="A third run for the decoder alone, which leaves the latents as they are.",
    )
    decoder_optimizer: Optimizer = Field(
        Optimizer(learning_rate=1e-3, warmup_steps=20, cosine=True), description="Of the third run."
    )

    @model_validator(mode="after")
    def _possible(self) -> "TinyVae":
        if self.crop_frames % VAE_STRIDE[0] != 1:
            raise ValueError(f"crop_frames = {self.crop_frames} is not 4k + 1")
        return self


class TinyEncoders(Section):
    """Small UMT5 and CLIP encoders: a caption finds its first and last frame, and can be read from its embedding."""

    text_dim: Positive = Field(64, multiple_of=4, description="Width of the UMT5 encoder, which has four heads.")
    text_layers: Positive = Field(2, description="Layers of the UMT5 encoder.")
    vocabulary: Positive = Field(384, description="Byte-level BPE tokens, so that any prompt can be encoded.")
    image_dim: Positive = Field(64, multiple_of=4, description="Width of the CLIP encoder, which has four heads.")
    image_layers: int = Field(3, ge=2, description="Layers of the CLIP encoder; the last but one gives the features.")
    image_patch: Positive = Field(16, description="Pixels per patch of the CLIP encoder.")
    training: Training = Field(
        Training(steps=600, batch_size=64, ema_decay=0.99), description="Their run of the training loop."
    )
    optimizer: Optimizer = Field(
        Optimizer(learning_rate=1e-3, warmup_steps=50, cosine=True), description="Of both encoders together."
    )
    stay_weight: NonNegative = Field(
        0.3,
        description="Weight of a text encoder's distance from where it started, when it is trained further [choice].",
    )


class TinyTransformer(Section):
    """A small `WanTransformer3DModel` and its training by flow matching."""

    heads: Positive = Field(5, description="Attention heads.")
    head_dim: Positive = Field(
        32, multiple_of=2, description="Width of a head, even; the model's width is heads x head_dim."
    )
    ffn_multiple: Positive = Field(4, description="Feed-forward width / model width.")
    layers: Positive = Field(6, description="Transformer blocks.")
    freq_dim: Positive = Field(128, description="Sinusoidal timestep features.")
    drop_text: Share = Field(0.1, description="Share of captions replaced by the empty one, for guidance.")
    compile: bool = Field(False, description="Train with compiled blocks: faster, but the last bits differ.")
    times: Times = Field(Times(low=0.0, high=1.0), description="t of the noised latents.")
    training: Training = Field(
        Training(steps=4000, batch_size=32, ema_decay=0.998), description="Its run of the training loop."
    )
    optimizer: Optimizer = Field(
        Optimizer(learning_rate=1e-3, warmup_steps=200, cosine=True), description="Of the transformer."
    )


def file_and_strength(named: str) -> tuple[Path, float]:
    """The two parts of `FILE[:STRENGTH]`; a file's name may have colons, only a number after the last is a strength.

    Raises:
        ValueError: the strength is too large a number.
    """
    match = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", named, re.DOTALL)
    file, strength = (match[1], float(match[2])) if match else (named, 1.0)
    if not math.isfinite(strength):
        raise ValueError(f"{named}: the strength must be a finite number")
    return Path(file), strength


class Teacher(Section):
    """Stage `teacher`: the model to distil, a diffusers `WanImageToVideoPipeline` folder."""

    source: Literal["train", "folder", "hub"] = Field(
        "hub", description="Train a tiny one, take a local folder, or fetch a hub id at a pinned revision."
    )
    path: str = Field("", description="The folder, or the hub id.")
    start: str = Field(
        "",
        description="With source = train: a teacher's folder that is trained further.",
    )
    further: tuple[Literal["transformer", "text_encoder"], ...] = Field(
        ("transformer",), description="Which parts of start are trained further; the others are kept."
    )
    revision: str = Field("", description="Commit of the hub repository; a branch name is refused.")
    loras: tuple[str, ...] = Field(
        (),
        description="LoRA files, each FILE or FILE:STRENGTH, that are merged into the transformer before distilling.",
    )
    architecture: Literal["", "wan2.1-i2v-14b", "wan2.1-i2v-1.3b"] = Field(
        "", description="Shape that `vpae plan` assumes while the weights are not there; checked once they are."
    )
    shift: float = Field(3.0, gt=0, description="Timestep shift s; Wan2.1: 3 at 480p, 5 at 720p.")
    vae: TinyVae = Field(TinyVae(), description="The VAE to train; only with source = train.")
    encoders: TinyEncoders = Field(TinyEncoders(), description="The encoders to train; only with source = train.")
    transformer: TinyTransformer = Field(
        TinyTransformer(), description="The transformer to train; only with source = train."
    )

    @model_validator(mode="after")
    def _named(self) -> "Teacher":
        if self.source != "train" and not self.path:
            raise ValueError(f"source = {self.source} needs path: name the folder or the hub id")
        if self.source != "train" and self.start:
            raise ValueError(f"start works with source = train only, not with source = {self.source}; remove it")
        if self.source == "train" and self.loras:
            raise ValueError(
                "loras are merged into a teacher of source = folder or hub; remove them, or take one of these sources"
            )
        for named in self.loras:
            file_and_strength(named)
        if "transformer" not in self.further:
            raise ValueError("further lacks transformer, which must follow whatever else is trained further")
        runs = (self.vae.training, self.vae.whole_training, self.vae.decoder_training, self.encoders.training)
        if {run.mixed_precision for run in runs} != {self.transformer.training.mixed_precision}:
            raise ValueError("vae, encoders and transformer train in one process: give all the same mixed_precision")
        parts = {"vae": self.vae, "encoders": self.encoders, "transformer": self.transformer}
        for place, run in ((f"{name}.{key}", run) for name, part in parts.items() for key, run in part):
            for key in ("compile", "monitor", "sharding") if isinstance(run, Training) else ():
                if getattr(run, key) != Training.model_fields[key].default:
                    raise ValueError(
                        f"{place}.{key} has no effect: a teacher is trained by one process, and transformer.compile "
                        "compiles its blocks; remove it"
                    )
        if self.source == "hub" and not (len(self.revision) == 40 and set(self.revision) <= set("0123456789abcdef")):
            raise ValueError("source = hub needs revision: the 40 hex digits of a commit, so that weights cannot move")
        return self
