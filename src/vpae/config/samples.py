"""Stage `samples`."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from vpae.config.section import Positive, Section


class Sampler(Section):
    """How one row of the tables makes its videos."""

    model: str = Field(description="Whose weights: teacher, or one of the experiment's methods or students.")
    steps: Positive = Field(description="Network steps; guidance doubles the NFE.")
    guidance_scale: float = Field(1.0, description="w in u + w (c - u); 1 = off.")
    shift: float | None = Field(
        None, gt=0, description="Timestep shift of the times of its steps; empty: teacher.shift, or the student's own."
    )

    @property
    def nfe(self) -> int:
        """Network evaluations per video; guidance counts twice."""
        return self.steps * (1 if self.guidance_scale == 1.0 else 2)


def _without_nulls(rows: Any) -> Any:
    """An overlay takes a row of its base away by setting it to null."""
    return {name: row for name, row in rows.items() if row is not None} if isinstance(rows, dict) else rows


class Samples(Section):
    """Stage `samples`: the held-out first frames and captions, animated by every row's model."""

    rows: Annotated[
        dict[str, Sampler], BeforeValidator(_without_nulls, json_schema_input_type=dict[str, Sampler | None])
    ] = Field(
        {},
        description="Name of the row -> how its videos are made. A name ending in -Nnfe must tell the truth. Empty: "
        "the teacher's rows and those of each method.",
    )
    count: Positive = Field(256, description="Held-out clips to animate.")
    decode: Positive = Field(64, description="How many of them are decoded to mp4.")
    batch_size: Positive = Field(16, description="Clips sampled together; the result does not depend on it.")
    compile: bool = Field(
        True, description="On a GPU, compile a large model's blocks where there is enough to draw; else, never."
    )
    vae_dtype: Literal["float32", "bfloat16"] = Field("float32", description="What the VAE decodes in.")
    vae_channels_last: bool = Field(False, description="The VAE's memory layout for a GPU's tensor cores.")
    vae_tiles: bool = Field(
        False,
        description="The VAE works on tiles of 256 x 256 pixels in `samples` and `evaluation`, for a GPU whose memory "
        "does not suffice otherwise.",
    )
    decoder: str = Field(
        "",
        description="File of a small decoder (taew2_1.safetensors) that decodes in the VAE's place, for all rows and "
        "the real clips; empty: the VAE.",
    )
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
