"""VBench-I2V: of an experiment's rows, and of any folder of videos."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vbench_i2v.settings import DimensionName as VBenchDimension
from vbench_i2v.settings import Folder, Measure
from vpae.config.section import Section

__all__ = ["VBench", "VBenchDimension", "VBenchFolder", "VBenchRows"]


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

    videos_per_row: int = Field(0, ge=0, description="Of each row's decoded videos the first so many; 0: all of them.")


class VBenchFolder(VBench, Folder):
    """A folder of videos to score with VBench-I2V, outside of any experiment: `vpae evaluation run --config`."""

    teacher: str = Field("", description="Pipeline folder whose image encoder the tiny backbones use.")
