"""What every run of the training loop shares: optimiser, precision, sharding, times and adapters."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from vpae.config.section import NonNegative, Positive, Section, Share

Average = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """AdamW or RMSProp, and its learning rate."""

    algorithm: Literal["adamw", "rmsprop"] = Field("adamw", description="AdamW, or RMSProp (APT's).")
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate.")
    alpha: Average = Field(0.9, description="RMSProp's average of the squared gradient (APT: 0.9).")
    betas: tuple[Average, Average] = Field(
        (0.9, 0.999), description="Adam's averages of gradient and squared gradient."
    )
    weight_decay: NonNegative = Field(0.0, description="Decoupled weight decay.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    cosine: bool = Field(False, description="After the warm-up, fall to 2% along half a cosine; otherwise constant.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this total norm.")

    @model_validator(mode="after")
    def _no_decay_in_the_gradient(self) -> "Optimizer":
        if self.algorithm == "rmsprop" and self.weight_decay:
            raise ValueError(
                f"weight_decay = {self.weight_decay}: RMSProp would add it to the gradient, unlike AdamW; "
                "leave it 0, or take algorithm = adamw"
            )
        if self.algorithm == "rmsprop" and self.betas != (0.9, 0.999):
            raise ValueError("betas are Adam's: RMSProp has alpha; set betas = [0.9, 0.999], or algorithm = adamw")
        return self


def _no_is_a_word(value: Any) -> Any:
    return "no" if value is False else value  # YAML reads a bare no as False


class Sharding(Section):
    """How the networks of a phase are spread over processes; one process alone keeps them whole."""

    strategy: Literal["none", "full"] = Field(
        "none", description="Whole networks in every process, or FSDP2 shards of all of them, frozen ones and EMA too."
    )
    activation_checkpointing: bool | Literal["attention"] = Field(
        False,
        description="Keep only the input of each transformer block and run the block again going backward; attention: "
        "keep the outputs of its self-attention too, which take longest to compute.",
    )
    context_parallel: Positive = Field(
        1, description="Processes that share each clip's tokens (Ulysses); must divide processes, heads and tokens."
    )
    reduce_every_micro_batch: bool = Field(
        False,
        description="Reduce gradients in every micro-batch, not only in an update's last: more communication, but no "
        "whole gradient in any process (at 14B: 65 GB). Only with accumulate > 1 and strategy = full.",
    )


class Monitor(Section):
    """Watches for collapse: one-step videos of fixed held-out clips, compared with real ones and with the start."""

    every: int = Field(0, ge=0, description="Steps between two looks; 0: never.")
    clips: int = Field(16, ge=2, description="Held-out clips of which the student makes videos, two of each.")
    stop: bool = Field(True, description="End a run that collapses, its last healthy state kept; otherwise only warn.")
    videos: int = Field(
        0, ge=0, description="Clips, from the first on, whose videos are kept at each look, to be seen."
    )

    @model_validator(mode="after")
    def _videos_are_among_the_clips(self) -> "Monitor":
        if self.videos and not self.every:
            raise ValueError(
                f"videos = {self.videos} are kept at each look, but every = 0 never looks; raise every, or set "
                "videos to 0"
            )
        if self.videos > self.clips:
            raise ValueError(f"videos = {self.videos} are more than the clips = {self.clips} that are drawn")
        return self


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
    compile: bool = Field(
        False,
        description="Compile the transformer's blocks: faster on a GPU after the first steps; last bits differ.",
    )
    ema_decay: Average = Field(0.995, description="EMA of the main role after each step (paper: 0.995).")
    checkpoint_every: Positive = Field(100, description="Steps between resumable states.")
    log_every: Positive = Field(
        1, description="Steps between lines of metrics.jsonl; the monitor's looks have their own."
    )
    stop_after_skipped: Positive = Field(
        3, description="End a run once so many updates of one role in a row were skipped for a NaN or Inf gradient."
    )
    monitor: Monitor = Field(Monitor(), description="Watches a student for collapse.")
    sharding: Sharding = Field(Sharding(), description="How its networks are spread over processes.")

    @model_validator(mode="after")
    def _possible(self) -> "Training":
        if 0 < self.schedule_steps < self.steps:
            raise ValueError(
                f"schedule_steps = {self.schedule_steps} end before steps = {self.steps}, so that a falling learning "
                "rate would rise again; raise it, or set it to 0"
            )
        if self.compile and self.sharding.activation_checkpointing == "attention":
            raise ValueError(
                "compile = true hides a block's attention from sharding.activation_checkpointing = attention; set "
                "compile to false, or activation_checkpointing to true or false"
            )
        return self


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


class Lora(Section):
    """A low-rank adapter on every linear layer of attention and feed-forward."""

    rank: Positive = Field(64, description="Rank r.")
    alpha: float = Field(64.0, gt=0, description="The update is scaled by alpha / r.")
