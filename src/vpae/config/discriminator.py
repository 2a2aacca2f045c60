"""The discriminator's head and its regularisation."""

from typing import Literal

from pydantic import Field, model_validator

from vpae.config.section import NonNegative, Positive, Section


class Head(Section):
    """The part of the discriminator that learns."""

    form: Literal["attention", "convolutions"] = Field(
        "attention",
        description="Queries that look at each tapped layer (the paper), or 3-D convolutions over the tapped layers "
        "(the paper's ablation; of the other keys only dim and taps then have an effect).",
    )
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
        if min(self.taps, default=0) < 0 or len(set(self.taps)) < len(self.taps):
            raise ValueError(f"taps = {list(self.taps)}: blocks are counted from 0, and each is named once")
        return self


class R1(Section):
    """Spatio-temporal differential R1.

    To first order a probe of deviation sigma measures sigma^2 |grad D|^2: what counts is weight x sigma^2.
    """

    weight: NonNegative = Field(100.0, description="Weight w [choice; APT's 100].")
    generated_weight: NonNegative = Field(
        0.0, description="The same on generated clips (R2), with the same probes [choice]."
    )
    probes: tuple[Literal["spatial", "temporal", "plain"], ...] = Field(
        ("spatial", "temporal"), description="Which perturbations; plain varies over space and frames alike (APT's)."
    )
    sigma_spatial: float = Field(0.01, gt=0, description="sigma_s: varies over space, equal in every frame (paper).")
    sigma_temporal: float = Field(0.1, gt=0, description="sigma_t: varies over frames, equal over space (paper).")
    sigma_plain: float = Field(0.1, gt=0, description="sigma of the plain probe (APT: 0.1).")

    @model_validator(mode="after")
    def _probes_are_there_and_differ(self) -> "R1":
        if len(set(self.probes)) < len(self.probes):
            raise ValueError(f"probes = {list(self.probes)} names one twice, which would count once; leave it out")
        if not self.probes and (self.weight or self.generated_weight):
            raise ValueError(
                f"weight = {self.weight:g} and generated_weight = {self.generated_weight:g} weigh nothing where probes "
                "is empty; set both to 0, or name probes"
            )
        return self
