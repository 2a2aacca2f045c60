"""The sections of the stages `latents`, `samples`, `evaluation` (with VBench-I2V) and `report`."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from vbench_i2v.settings import Folder, Measure
from vpae.config.section import Positive, Section, without_nulls


class Latents(Section):
    """Stage `latents`: clips encoded once by the teacher's VAE, text and image encoders."""

    shard_size: Positive = Field(128, description="Clips per WebDataset shard.")
    batch_size: Positive = Field(8, description="Clips encoded together.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Stored floating-point type.")
    negative_prompt: str = Field("", description="What guidance puts in the caption's place.")


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


LONGEST_NAME = 200  # of a row: its folder's, with room for what is put before or behind it


class Samples(Section):
    """Stage `samples`: the held-out first frames and captions, animated by every row's model."""

    rows: Annotated[
        dict[str, Sampler], BeforeValidator(without_nulls, json_schema_input_type=dict[str, Sampler | None])
    ] = Field(
        {},
        description="Name of the row -> how its videos are made. A name ending in -Nnfe must have the right N. Empty: "
        "the teacher's rows and those of each method.",
    )
    count: Positive = Field(256, description="Held-out clips to animate.")
    decode: Positive = Field(64, description="How many of them are decoded to mp4.")
    batch_size: Positive = Field(16, description="Clips sampled together; the result does not depend on it.")
    compile: bool = Field(
        True,
        description="true: on a GPU, compile a large model's blocks if enough evaluations follow; false: never.",
    )
    vae_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Number format in which the VAE decodes.")
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
        folded: dict[str, str] = {}
        for name, row in self.rows.items():
            if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
                raise ValueError(f"row {name!r} names a folder: letters, digits, '-', '_' and '.' only")
            if len(name) > LONGEST_NAME:
                raise ValueError(f"row {name[:20]}... has {len(name)} letters; a folder's name may have {LONGEST_NAME}")
            if name.casefold() == "real":
                raise ValueError(f"row {name}: the clips themselves have this name; choose another")
            if name.casefold().endswith((".json", ".jsonl", ".png")):
                raise ValueError(f"row {name}: the stage's own files have such names; leave out what follows the dot")
            if name.casefold() in folded:
                raise ValueError(f"rows {folded[name.casefold()]} and {name} differ in case alone: rename one of them")
            folded[name.casefold()] = name
            if name.endswith("nfe") and not name.endswith(f"-{row.nfe}nfe"):
                raise ValueError(f"row {name} takes {row.nfe} NFE; name it {name.rsplit('-', 1)[0]}-{row.nfe}nfe")
        if self.decode > self.count:
            raise ValueError(f"decode = {self.decode} is more than count = {self.count}")
        return self


def _off_is_a_word(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads a bare off as False


class VBench(Section, Measure):
    """VBench-I2V's nine dimensions, measured on decoded videos."""

    backbones: Annotated[Literal["official", "tiny", "off"], BeforeValidator(_off_is_a_word)] = Field(
        "official",
        description="The benchmark's networks; small stand-ins, not comparable with published scores; or no VBench.",
    )


class VBenchRows(VBench):
    """VBench-I2V of an experiment's own rows, each video against the first frame that it was made from."""

    videos_per_row: int = Field(0, ge=0, description="How many of a row's decoded videos are measured; 0: all of them.")


class VBenchFolder(VBench, Folder):
    """A folder of videos to score with VBench-I2V, outside of any experiment: `vpae evaluation run --config`."""

    teacher: str = Field("", description="Pipeline folder whose image encoder the tiny backbones use.")


def _two_halves(clips: int) -> int:
    if clips == 1:
        raise ValueError("a classifier learns from pairs of clips: take 2 or more, or 0 for no such test")
    return clips


class C2st(Section):
    """The classifier two-sample test: can a small network tell a row's latents from real ones?"""

    clips: Annotated[int, AfterValidator(_two_halves)] = Field(
        0, ge=0, description="Training clips to learn from, each beside the row's own video of it; 0: no such test."
    )
    steps: Positive = Field(400, description="Its training steps.")
    seeds: Positive = Field(3, description="Classifiers, each with a seed of its own; their mean counts.")
    most_nfe: Positive = Field(8, description="Rows with more network evaluations a video are left out.")


class Evaluation(Section):
    """Stage `evaluation`: truth metrics, Frechet distance, motion, C2ST, VBench-I2V, latency."""

    c2st: C2st = Field(C2st(), description="The classifier two-sample test of latents.")
    vbench: VBenchRows = Field(VBenchRows(), description="VBench-I2V on the decoded videos.")
    bootstrap: int = Field(500, ge=20, description="Resamples for the 95% confidence intervals.")
    latency_repeats: Positive = Field(
        2,
        description="Timed runs per row in each of three passes; the median counts. A row of 50 or more network "
        "evaluations is run once a pass.",
    )
    latency_warmup: int = Field(1, ge=0, description="Untimed runs before the timed ones.")


class Report(Section):
    """Stage `report`: one HTML page."""

    clips: Positive = Field(6, description="First frames shown side by side.")
