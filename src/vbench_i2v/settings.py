"""What is measured and by which networks; and a folder of videos to score."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from vbench_i2v.scores import COLUMNS

DimensionName = Literal[tuple(COLUMNS)]


class Measure(BaseModel):
    """VBench-I2V's nine dimensions, measured on decoded videos."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dimensions: tuple[DimensionName, ...] = Field((), description="Which of the nine; empty: all.")
    weights: str = Field("~/.cache/vpae/vbench", description="Folder of the official networks' weight files.")
    clip_dtype: Literal["float16", "float32"] = Field(
        "float16", description="CLIP's weights; published scores had float16, float32 is more exact."
    )
    allow_incomplete: bool = Field(
        False, description="Score the videos there are, and say n of N, instead of refusing when some are missing."
    )

    def wanted(self) -> tuple[str, ...]:
        """The dimensions asked for, in the leaderboard's order."""
        return tuple(name for name in COLUMNS if name in (self.dimensions or COLUMNS))


class Folder(Measure):
    """A folder of videos to score with VBench-I2V."""

    videos: str = Field(description="Folder of the videos: {prompt}-{0..4}.mp4 with a suite, X-{number}.mp4 without.")
    images: str = Field("", description="Folder of the input images: the suite's crops, or X.png (.jpg, .jpeg, .webp).")
    ratio: Literal["auto", "none", "1-1", "3-2", "8-5", "7-4", "16-9"] = Field(
        "auto",
        description="Which of the suite's crops the videos start from; auto: nearest to their size; none: no crops.",
    )
    suite: str = Field("", description="VBench's vbench2_i2v_full_info.json; empty: the videos of the folder.")
    out: str = Field(description="Folder of records and results.")
    name: str = Field("results", pattern=r"^[^/]+$", description="Results are NAME_eval_results.json and so on.")
    samples_per_prompt: int = Field(5, gt=0, description="Videos per prompt of the suite.")
    sampling: dict[str, JsonValue] = Field(
        {}, description="How the videos were made (model, steps, guidance, seeds ...): copied into the results."
    )
