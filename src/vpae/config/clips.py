"""The shape of every clip, and the section of the stage `clips`."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from vpae.config.section import NonNegative, Positive, Section, Share, without_nulls

VAE_STRIDE = (4, 8, 8)  # Wan2.1: 4x in time, 8x in height and width
PATCH = (1, 2, 2)  # of WanTransformer3DModel


class Geometry(Section):
    """The shape of every clip."""

    frames: Positive = Field(81, description="Frames per clip; 4k + 1, because the VAE encodes the first frame alone.")
    height: Positive = Field(480, description="Pixels; a multiple of 16 (VAE stride 8 x patch 2).")
    width: Positive = Field(832, description="Pixels; a multiple of 16 (VAE stride 8 x patch 2).")
    fps: float = Field(16.0, gt=0, description="Frames per second; Wan2.1 was trained at 16.")

    @model_validator(mode="after")
    def _possible(self) -> "Geometry":
        if self.frames % VAE_STRIDE[0] != 1:
            below = max(5, (self.frames - 1) // 4 * 4 + 1)
            raise ValueError(f"frames = {self.frames} is not 4k + 1; the nearest are {below} and {below + 4}")
        if self.frames < 5:
            raise ValueError(f"frames = {self.frames} is no video; the fewest are 5")
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
            raise ValueError(
                f"grows_share = {self.grows_share} and spins_share = {self.spins_share} add up to more than 1"
            )
        return self


class Columns(Section):
    """What the columns of a table of clips are called."""

    path: str = Field(
        "{path}",
        description="The file, with columns in braces: {video} (OpenVid-1M), {videoID}.mp4 (Koala-36M).",
    )
    caption: str = Field("caption", description="The caption.")
    start: str = Field("", description="Where in the file the clip begins, in seconds or as H:MM:SS.mmm; empty: at 0.")
    end: str = Field("", description="Where the clip ends; empty: with the file.")
    span: str = Field(
        "", description="Start and end in one column, as Koala-36M's timestamp; start and end stay empty."
    )

    @model_validator(mode="after")
    def _one_form(self) -> "Columns":
        if not re.search(r"{[^{}]+}", self.path):
            raise ValueError(f"path = {self.path} names no column in braces, such as {{video}}: all clips would be one")
        if self.span and (self.start or self.end):
            raise ValueError("span holds start and end: leave those two empty, or span")
        return self


Limits = Annotated[dict[str, float], BeforeValidator(without_nulls, json_schema_input_type=dict[str, float | None])]


class Filters(Section):
    """Which clips of a folder or table are wanted; the others go to quarantine with the reason."""

    min_seconds: NonNegative = Field(0.0, description="Shortest clip.")
    max_seconds: NonNegative = Field(0.0, description="Longest clip; 0: of any length.")
    min_width: int = Field(0, ge=0, description="Least width in pixels, of the upright video.")
    min_height: int = Field(0, ge=0, description="Least height in pixels, of the upright video.")
    at_least: Limits = Field({}, description="Column of the table -> least value, such as a score; null: no limit.")
    at_most: Limits = Field({}, description="Column of the table -> greatest value; null: no limit.")
    min_motion: Share = Field(
        0.0,
        description="Least mean change of a pixel (0 to 1) between frames; below about 0.002 a clip is nearly still.",
    )
    max_jump: Share = Field(
        1.0,
        description="Greatest mean change of a pixel (0 to 1) between two neighbouring frames; a cut has about 0.2.",
    )


class Clips(Section):
    """Stage `clips`: which videos there are."""

    source: Literal["world", "folder", "table"] = Field(
        "folder",
        description="The procedural world; a folder of videos with captions; or a table (CSV, JSONL, parquet).",
    )
    path: str = Field("", description="The folder, or the table (see columns). Unused by the world.")
    root: str = Field("", description="Folder from which a table's relative paths start; empty: the table's own.")
    columns: Columns = Field(Columns(), description="What a table's columns are called.")
    filters: Filters = Field(Filters(), description="Which clips of a folder or table are wanted.")
    train: Positive = Field(1024, description="Clips to train on; of a folder or a table, at most so many.")
    held_out: Positive = Field(256, description="Clips kept for evaluation, never trained on.")
    workers: int = Field(2, ge=1, description="Processes that decode or render.")
    world: World = Field(World(), description="What the procedural world shows.")

    @model_validator(mode="after")
    def _has_path(self) -> "Clips":
        if self.source != "world" and not self.path:
            raise ValueError(f"source = {self.source} needs path: name the {self.source} of videos")
        unread = [f"filters.{name}" for name in ("at_least", "at_most") if getattr(self.filters, name)]
        if self.source == "folder" and unread:
            raise ValueError(
                f"source = folder has no columns for {' and '.join(unread)}: set each column there to null, or take "
                "source: table"
            )
        return self
