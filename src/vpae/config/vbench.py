"""VBench-I2V: of an experiment's rows, and of any folder of videos."""

from typing import Any, Literal

from pydantic import Field

from vpae.config.section import Positive, Section

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
