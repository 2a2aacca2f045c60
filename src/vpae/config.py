"""Every setting of an experiment: one tree of validated sections, one section a stage.

The tree is the source of the JSON schema in `configs/schema.json`. How a YAML file becomes a tree (`extends:`,
`--set`, environment) is in `experiment.py`. Paper numbers are the defaults where the paper gives them; what it leaves
open is marked [choice].
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]

VBenchDimension = Literal[
    "camera_motion",
    "i2v_subject",
    "i2v_background",
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
]

VAE_STRIDE = (4, 8, 8)  # Wan2.1: 4x in time, 8x in height and width
PATCH = (1, 2, 2)  # of WanTransformer3DModel


class Section(BaseModel):
    """A part of the tree; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_other_defaults(cls, values: Any) -> Any:
        """Who sets `fake.weight_decay` keeps the learning rate that `fake` has by default."""
        return fill_defaults(cls, values)


def fill_defaults(model: type[BaseModel], values: Any) -> Any:
    """Complete the given parts of a section from the defaults of that section, not from those of its class."""
    if not isinstance(values, dict):
        return values
    defaults = {name: field.default for name, field in model.model_fields.items()}
    return {name: _completed(defaults.get(name), value) for name, value in values.items()}


def _completed(default: Any, given: Any) -> Any:
    if not (isinstance(default, Section) and isinstance(given, dict)):
        return given
    values = dict(default)
    return values | {name: _completed(values.get(name), value) for name, value in given.items()}


class Geometry(Section):
    """The shape of every clip."""

    frames: Positive = Field(81, description="Frames per clip; 4k + 1, because the VAE keeps the first frame apart.")
    height: Positive = Field(480, description="Pixels; a multiple of 16 (VAE stride 8 x patch 2).")
    width: Positive = Field(832, description="Pixels; a multiple of 16 (VAE stride 8 x patch 2).")
    fps: float = Field(16.0, gt=0, description="Frames per second; Wan2.1 was trained at 16.")

    @model_validator(mode="after")
    def _possible(self) -> "Geometry":
        if self.frames % VAE_STRIDE[0] != 1:
            below = (self.frames - 1) // 4 * 4 + 1
            raise ValueError(f"frames = {self.frames} is not 4k + 1; the nearest are {below} and {below + 4}")
        for key in ("height", "width"):
            value, unit = getattr(self, key), VAE_STRIDE[1] * PATCH[1]
            if value % unit:
                below = value // unit * unit
                raise ValueError(
                    f"{key} = {value} is not a multiple of {unit}; the nearest are {below} and {below + unit}"
                )
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Latent frames, height and width (F, h, w)."""
        return (self.frames - 1) // VAE_STRIDE[0] + 1, self.height // VAE_STRIDE[1], self.width // VAE_STRIDE[2]


class World(Section):
    """The procedural world."""

    hidden_direction: Share = Field(0.4, description="Share of moving clips whose caption hides the direction.")
    bystander_share: Share = Field(0.25, description="Share of clips with a second, still sprite.")
    grows_share: Share = Field(0.15, description="Share of clips whose sprite grows.")
    spins_share: Share = Field(0.15, description="Share of clips whose sprite spins; in the rest it moves.")
    crf: int = Field(12, ge=0, le=51, description="x264's constant rate factor of the rendered clips.")

    @model_validator(mode="after")
    def _shares(self) -> "World":
        if self.grows_share + self.spins_share > 1:
            raise ValueError(f"grows_share = {self.grows_share} and spins_share = {self.spins_share} are more than 1")
        return self


class Clips(Section):
    """Stage `clips`: which videos there are."""

    source: Literal["world", "folder", "table"] = Field(
        "folder", description="The procedural world; a folder of videos with captions; or a CSV/JSONL table."
    )
    path: str = Field("", description="The folder, or the table with columns path and caption. Unused by the world.")
    train: Positive = Field(1024, description="Clips to train on (the world), or at most so many (others).")
    held_out: Positive = Field(256, description="Clips kept for evaluation, never trained on.")
    workers: int = Field(2, ge=1, description="Processes that decode or render.")
    world: World = Field(World(), description="What the procedural world shows.")

    @model_validator(mode="after")
    def _has_path(self) -> "Clips":
        if self.source != "world" and not self.path:
            raise ValueError(f"source = {self.source} needs path: name the {self.source} of videos")
        return self


class Optimizer(Section):
    """AdamW."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate.")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="Adam's averages of gradient and squared gradient.")
    weight_decay: NonNegative = Field(0.0, description="Decoupled weight decay.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    cosine: bool = Field(False, description="After the warm-up, fall to 2% along half a cosine; otherwise constant.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this total norm.")


def _no_is_a_word(value: Any) -> Any:
    return "no" if value is False else value  # YAML reads a bare no as False


class Sharding(Section):
    """How the networks of a phase are spread over processes; one process alone keeps them whole."""

    strategy: Literal["none", "full"] = Field(
        "none", description="Whole networks in every process, or FSDP2 shards of all of them, frozen ones and EMA too."
    )
    activation_checkpointing: bool = Field(
        False, description="Keep only the input of each transformer block and run the block again going backward."
    )
    context_parallel: Positive = Field(
        1, description="Processes that share each clip's tokens (Ulysses); divides processes, heads and tokens."
    )
    reduce_every_micro_batch: bool = Field(
        False,
        description="Reduce gradients in every micro-batch, not only in an update's last: more communication, but no "
        "whole gradient in any process (at 14B: 65 GB). Only with accumulate > 1 and strategy = full.",
    )


class Training(Section):
    """One run of the training loop."""

    steps: Positive = Field(500, description="Optimiser steps of the main role.")
    schedule_steps: int = Field(
        0, ge=0, description="Steps that a falling learning rate is laid out for; 0: `steps`. A run may end before."
    )
    batch_size: Positive = Field(1, description="Clips per process and micro-batch.")
    accumulate: Positive = Field(1, description="Micro-batches per optimiser step.")
    mixed_precision: Annotated[Literal["no", "bf16"], BeforeValidator(_no_is_a_word)] = Field(
        "no", description="Autocast of the forward passes."
    )
    ema_decay: float = Field(0.995, ge=0, lt=1, description="EMA of the main role after each step (paper: 0.995).")
    checkpoint_every: Positive = Field(100, description="Steps between resumable states.")
    log_every: Positive = Field(1, description="Steps between lines of metrics.jsonl.")
    sharding: Sharding = Field(Sharding(), description="How its networks are spread over processes.")


class Times(Section):
    """From which times t in [0, 1] (1 = noise) a loss draws. Bounds are named, because [0.9T, T] is ambiguous."""

    low: Share = Field(0.02, description="Lower bound at the first step.")
    high: Share = Field(0.98, description="Upper bound at the first step.")
    last_low: Share | None = Field(None, description="Lower bound at the last step (linear in between); empty: low.")
    last_high: Share | None = Field(None, description="Upper bound at the last step; empty: high.")
    t_space: Literal["pre_shift", "post_shift"] = Field(
        "post_shift", description="Whether the bounds are meant before or after the timestep shift."
    )
    distribution: Literal["uniform", "shifted_uniform"] = Field(
        "shifted_uniform", description="Uniform in t itself, or uniform before the shift."
    )

    @model_validator(mode="after")
    def _ordered(self) -> "Times":
        for low, high in ((self.low, self.high), self.last_bounds):
            if low > high:
                raise ValueError(f"the interval [{low}, {high}] is empty; the lower bound comes first")
        return self

    @property
    def last_bounds(self) -> tuple[float, float]:
        """The interval at the last step."""
        return (
            self.low if self.last_low is None else self.last_low,
            self.high if self.last_high is None else self.last_high,
        )


class TinyVae(Section):
    """A small `AutoencoderKLWan` with Wan2.1's geometry (16 channels, 4x8x8) and its training."""

    base_dim: Positive = Field(16, description="Channels at full resolution.")
    dim_mult: tuple[int, int, int, int] = Field((1, 1, 2, 4), description="Channel multiples at the four resolutions.")
    crop: Positive = Field(32, multiple_of=8, description="Training crops, pixels; a multiple of 8.")
    crop_frames: Positive = Field(5, description="Training crops, frames; 4k + 1.")
    image_steps: int = Field(3000, ge=0, description="First so many steps on single frames, which cost far less.")
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
        0.3, description="Weight of the distance from where it was, when a text encoder is trained further [choice]."
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
    compile: bool = Field(False, description="Train with compiled blocks: faster, other last bits.")
    times: Times = Field(Times(low=0.0, high=1.0), description="t of the noised latents.")
    training: Training = Field(
        Training(steps=4000, batch_size=32, ema_decay=0.998), description="Its run of the training loop."
    )
    optimizer: Optimizer = Field(
        Optimizer(learning_rate=1e-3, warmup_steps=200, cosine=True), description="Of the transformer."
    )


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
        ("transformer",), description="What of start is trained further; the rest is kept."
    )
    revision: str = Field("", description="Commit of the hub repository; a branch name is refused.")
    architecture: Literal["", "wan2.1-i2v-14b", "wan2.1-i2v-1.3b"] = Field(
        "", description="Shape that `vpae plan` takes while the weights are not there; checked once they are."
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
            raise ValueError(f"source = {self.source} needs path")
        if self.source != "train" and self.start:
            raise ValueError(f"start is of source = train alone, not of source = {self.source}; remove it")
        if "transformer" not in self.further:
            raise ValueError("further lacks transformer, which must follow whatever else is trained further")
        runs = (self.vae.training, self.vae.whole_training, self.vae.decoder_training, self.encoders.training)
        if {run.mixed_precision for run in runs} != {self.transformer.training.mixed_precision}:
            raise ValueError("vae, encoders and transformer train in one process: give all the same mixed_precision")
        if self.source == "hub" and not (len(self.revision) == 40 and set(self.revision) <= set("0123456789abcdef")):
            raise ValueError("source = hub needs revision: the 40 hex digits of a commit, so that weights cannot move")
        return self


class Latents(Section):
    """Stage `latents`: clips encoded once by the teacher's VAE, text and image encoders."""

    shard_size: Positive = Field(128, description="Clips per WebDataset shard.")
    batch_size: Positive = Field(8, description="Clips encoded together.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Stored floating-point type.")
    negative_prompt: str = Field("", description="What guidance puts in the caption's place.")


class Lora(Section):
    """A low-rank adapter on every linear layer of attention and feed-forward."""

    rank: Positive = Field(64, description="Rank r.")
    alpha: float = Field(64.0, gt=0, description="The update is scaled by alpha / r.")


class Priming(Section):
    """Stage `priming`: phase I, stability priming by variational score distillation."""

    training: Training = Field(Training(steps=500), description="Its run of the training loop.")
    generator: Optimizer = Field(Optimizer(learning_rate=1e-6), description="Of the generator.")
    student_lora: Lora | None = Field(
        None, description="Train the generator as an adapter on the teacher's own weights; empty: all its weights."
    )
    fake: Optimizer = Field(Optimizer(learning_rate=1e-5), description="Of the fake model.")
    fake_form: Literal["lora", "copy"] = Field(
        "lora", description="The fake model: an adapter on the teacher's own weights (the paper), or a full copy of it."
    )
    fake_lora: Lora = Field(Lora(), description="The adapter of fake_form = lora.")
    fake_steps_per_generator_step: Positive = Field(
        5, description="Fake-model updates for each generator update [choice: DMD2's 5]."
    )
    guidance_scale: float = Field(5.0, description="Teacher's guidance w in u + w (c - u); 1 = off.")
    generator_times: Times = Field(
        Times(low=0.9, high=1.0, distribution="uniform"), description="t of the generator's input (paper: [0.9T, T])."
    )
    score_times: Times = Field(Times(), description="t' at which the scores are compared [choice].")


class Head(Section):
    """The discriminator's semantic head."""

    dim: Positive = Field(512, description="Width.")
    heads: Positive = Field(8, description="Attention heads.")
    queries: Positive = Field(8, description="Learnable queries.")
    semantics: bool = Field(True, description="Join image and text embeddings to the queries (ablation: False).")
    taps: tuple[int, ...] = Field(
        (),
        description="Indices of the blocks whose outputs are features; empty: see `models.wan.default_taps` [choice].",
    )

    @model_validator(mode="after")
    def _divisible(self) -> "Head":
        if self.dim % self.heads:
            raise ValueError(f"dim = {self.dim} is not a multiple of heads = {self.heads}")
        return self


class R1(Section):
    """Spatio-temporal differential R1."""

    weight: NonNegative = Field(100.0, description="Weight w [choice; APT's 100].")
    sigma_spatial: float = Field(0.01, gt=0, description="sigma_s: varies over space, equal in every frame (paper).")
    sigma_temporal: float = Field(0.1, gt=0, description="sigma_t: varies over frames, equal over space (paper).")


class Equilibrium(Section):
    """Stage `equilibrium`: phase II, unified adversarial equilibrium."""

    training: Training = Field(Training(steps=1000), description="Its run of the training loop.")
    generator: Optimizer = Field(Optimizer(learning_rate=2e-6), description="Of the generator.")
    student_lora: Lora | None = Field(
        None, description="Train the generator as an adapter; must be what priming.student_lora is."
    )
    discriminator: Optimizer = Field(
        Optimizer(learning_rate=2e-5), description="Of the discriminator: its head, and the backbone if it is a copy."
    )
    discriminator_steps_per_generator_step: Positive = Field(1, description="Head updates per generator update.")
    discriminator_warmup_steps: int = Field(0, ge=0, description="Head updates before the first generator update.")
    backbone: Literal["ema", "teacher", "copy"] = Field(
        "ema",
        description="Features from the generator's EMA (the paper), the frozen teacher, or a copy of the teacher that "
        "is trained with the head (the paper's ablations).",
    )
    head: Head = Field(Head(), description="The part of the discriminator that learns.")
    r1: R1 = Field(R1(), description="Its regularisation.")
    g_loss: Literal["hinge_linear", "hinge_clipped"] = Field(
        "hinge_linear", description="-D(xh), or relu(1 - D(xh)) [choice]."
    )
    adversarial_weight: NonNegative = Field(1.0, description="Weight of the generator's adversarial term; 0 = off.")
    csds_weight: NonNegative = Field(10.0, description="lambda of the conditional SDS term (paper: 10).")
    csds_guidance_scale: float = Field(1.0, description="Guidance of the teacher in C-SDS; 1 = off [choice].")
    discriminator_times: Times = Field(Times(), description="t' at which the discriminator looks [choice].")
    csds_times: Times = Field(Times(), description="t' of the conditional SDS term [choice].")

    @model_validator(mode="after")
    def _possible(self) -> "Equilibrium":
        if self.backbone == "copy" and self.student_lora is not None:
            raise ValueError("backbone = copy trains a whole second network, which student_lora avoids: choose one")
        return self


class Sampler(Section):
    """How one row of the tables makes its videos."""

    model: Literal["teacher", "priming", "equilibrium"] = Field(description="Whose weights.")
    steps: Positive = Field(description="Network steps; guidance doubles the NFE.")
    guidance_scale: float = Field(1.0, description="w in u + w (c - u); 1 = off.")

    @property
    def nfe(self) -> int:
        """Network evaluations per video; guidance counts twice."""
        return self.steps * (1 if self.guidance_scale == 1.0 else 2)


class Samples(Section):
    """Stage `samples`: the held-out first frames and captions, animated by every row's model."""

    rows: dict[str, Sampler] = Field(
        {
            "teacher-100nfe": Sampler(model="teacher", steps=50, guidance_scale=5.0),
            "teacher-1nfe": Sampler(model="teacher", steps=1),
            "priming-1nfe": Sampler(model="priming", steps=1),
            "vpae-1nfe": Sampler(model="equilibrium", steps=1),
            "vpae-2nfe": Sampler(model="equilibrium", steps=2),
            "vpae-4nfe": Sampler(model="equilibrium", steps=4),
        },
        description="Name of the row -> how its videos are made. A name ending in -Nnfe must tell the truth.",
    )
    count: Positive = Field(256, description="Held-out clips to animate.")
    decode: Positive = Field(64, description="How many of them are decoded to mp4.")
    batch_size: Positive = Field(16, description="Clips sampled together; the result does not depend on it.")
    crf: int = Field(10, ge=0, le=51, description="x264's constant rate factor (VBench-I2V: 10).")

    @model_validator(mode="after")
    def _honest_names(self) -> "Samples":
        for name, row in self.rows.items():
            if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
                raise ValueError(f"row {name!r} names a folder: letters, digits, '-', '_' and '.' only")
            if name == "real":
                raise ValueError("row real: the clips themselves have this name; choose another")
            if name.endswith("nfe") and not name.endswith(f"-{row.nfe}nfe"):
                raise ValueError(f"row {name} takes {row.nfe} NFE; name it {name.rsplit('-', 1)[0]}-{row.nfe}nfe")
        if self.decode > self.count:
            raise ValueError(f"decode = {self.decode} is more than count = {self.count}")
        return self


class VBench(Section):
    """VBench-I2V's nine dimensions, measured on decoded videos."""

    backbones: Literal["official", "tiny", "off"] = Field(
        "official",
        description="The benchmark's networks; small stand-ins, not comparable with published scores; or no VBench.",
    )
    dimensions: tuple[VBenchDimension, ...] = Field((), description="Which of the nine; empty: all.")
    weights: str = Field("~/.cache/vpae/vbench", description="Folder of the official networks' weight files.")
    clip_dtype: Literal["float16", "float32"] = Field(
        "float16", description="CLIP's weights; published scores had float16, float32 is more exact."
    )
    allow_incomplete: bool = Field(
        False, description="Score the videos there are, and say n of N, instead of refusing when some are missing."
    )


class VBenchRows(VBench):
    """VBench-I2V of an experiment's own rows, each video against the first frame that it was made from."""

    videos_per_row: int = Field(0, ge=0, description="Of each row's decoded videos the first so many; 0: all of them.")
    shards: Positive = Field(8, description="Jobs per dimension in the workflow; the result does not depend on it.")


class VBenchFolder(VBench):
    """A folder of videos to score with VBench-I2V, outside of any experiment: `vpae evaluation run --config`."""

    videos: str = Field(description="Folder of the videos: {prompt}-{0..4}.mp4 with a suite, X-{number}.mp4 without.")
    images: str = Field("", description="Folder of the input images: the suite's crops, or X.png (.jpg, .jpeg).")
    ratio: Literal["auto", "none", "1-1", "3-2", "8-5", "7-4", "16-9"] = Field(
        "auto",
        description="Which of the suite's crops the videos start from; auto: nearest to their size; none: no crops.",
    )
    suite: str = Field("", description="VBench's vbench2_i2v_full_info.json; empty: the videos of the folder.")
    out: str = Field(description="Folder of records and results.")
    name: str = Field("results", description="Results are NAME_eval_results.json and so on.")
    samples_per_prompt: Positive = Field(5, description="Videos per prompt of the suite (VBench-I2V: 5).")
    teacher: str = Field("", description="Pipeline folder whose image encoder the tiny backbones use.")
    sampling: dict[str, Any] = Field(
        {}, description="How the videos were made (model, steps, guidance, seeds ...): copied into the results."
    )


class Evaluation(Section):
    """Stage `evaluation`: truth metrics, Frechet distance, VBench-I2V, latency."""

    vbench: VBenchRows = Field(VBenchRows(), description="VBench-I2V on the decoded videos.")
    bootstrap: Positive = Field(500, description="Resamples for the 95% confidence intervals.")
    latency_repeats: Positive = Field(2, description="Timed runs per row in each of three passes; the median counts.")
    latency_warmup: int = Field(1, ge=0, description="Untimed runs before them.")


class Report(Section):
    """Stage `report`: one HTML page."""

    clips: Positive = Field(6, description="First frames shown side by side.")


class Jobs(Section):
    """Into how many jobs a stage is cut that can be. No result depends on it: a change runs nothing again."""

    clips: Positive = Field(1, description="Jobs that check or render clips; 1: the stage's own job does it all.")
    latents: Positive = Field(1, description="Jobs that encode shards; several shards a job, best some hours' work.")
    samples: Positive = Field(1, description="Jobs that draw and decode batches of videos, of all rows together.")


class Needs(Section):
    """What one job of a stage asks a cluster for. No result depends on it: a change runs nothing again."""

    nodes: Positive = Field(1, description="Nodes; only priming and equilibrium can use several.")
    gpus: int = Field(0, ge=0, description="GPUs per node; the phases start one process for each, others use one.")
    cpus: Positive = Field(2, description="CPU cores per node; the stage clips takes clips.workers instead.")
    memory_gb: Positive = Field(4, description="GB of memory per node.")
    minutes: Positive = Field(
        120, description="Time limit; training saves its state before it, queues again and goes on."
    )


class Cluster(Section):
    """What each stage asks a cluster for; names of accounts and partitions stand in profiles/slurm."""

    clips: Needs = Field(Needs(minutes=60), description="Each job of the stage `clips`.")
    teacher: Needs = Field(Needs(memory_gb=8, minutes=480), description="The job of the stage `teacher`.")
    latents: Needs = Field(Needs(minutes=60), description="Each job of the stage `latents`.")
    priming: Needs = Field(Needs(), description="The job of phase I.")
    equilibrium: Needs = Field(Needs(), description="The job of phase II.")
    samples: Needs = Field(Needs(), description="Each job of the stage `samples`.")
    evaluation: Needs = Field(Needs(minutes=60), description="Each job of the stage `evaluation`, VBench's too.")
    report: Needs = Field(Needs(cpus=1, minutes=15), description="The job of the stage `report`.")

    @model_validator(mode="after")
    def _only_phases_are_spread(self) -> "Cluster":
        for name in type(self).model_fields:
            needs: Needs = getattr(self, name)
            if name not in ("priming", "equilibrium") and (needs.nodes > 1 or needs.gpus > 1):
                raise ValueError(
                    f"{name} asks for {needs.nodes} nodes and {needs.gpus} GPUs on each, but only priming and "
                    "equilibrium run in several processes; the others may have one node and one GPU a job"
                )
        return self


class Experiment(BaseSettings):
    """One experiment: everything that determines its results."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="VPAE_", env_nested_delimiter="__", env_file=None
    )

    extends: str = Field("", description="Name of the experiment beside this file whose keys this one overlays.")
    seed: int = Field(0, ge=0, description="Every random number follows from it.")
    geometry: Geometry = Field(Geometry(), description="The shape of every clip.")
    clips: Clips = Field(description="Which videos there are.")
    teacher: Teacher = Field(description="The model to distil.")
    latents: Latents = Field(Latents(), description="How clips are encoded and stored.")
    priming: Priming = Field(Priming(), description="Phase I.")
    equilibrium: Equilibrium = Field(Equilibrium(), description="Phase II.")
    samples: Samples = Field(Samples(), description="Whose videos are made, and how many.")
    evaluation: Evaluation = Field(Evaluation(), description="How they are measured.")
    report: Report = Field(Report(), description="What the report shows.")
    jobs: Jobs = Field(Jobs(), description="How stages are spread over a cluster.")
    cluster: Cluster = Field(Cluster(), description="What each stage's jobs ask a cluster for.")

    @model_validator(mode="before")
    @classmethod
    def _keep_other_defaults(cls, values: Any) -> Any:
        return fill_defaults(cls, values)

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        if self.samples.count > self.clips.held_out:
            raise ValueError(
                f"samples.count = {self.samples.count} is more than clips.held_out = {self.clips.held_out}; "
                "keep more clips or animate fewer"
            )
        for phase in ("priming", "equilibrium"):
            size = getattr(self, phase).training.batch_size
            if size > self.clips.train:
                raise ValueError(f"{phase}.training.batch_size = {size} is more than clips.train = {self.clips.train}")
        if self.equilibrium.student_lora != self.priming.student_lora:
            raise ValueError(
                "equilibrium.student_lora is not priming.student_lora: the adapter that priming trains is the one that "
                "goes on learning; set both alike, or leave both empty"
            )
        return self
