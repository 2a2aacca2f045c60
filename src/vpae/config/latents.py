"""Stage `latents`."""

from typing import Literal

from pydantic import Field

from vpae.config.section import Positive, Section


class Latents(Section):
    """Stage `latents`: clips encoded once by the teacher's VAE, text and image encoders."""

    shard_size: Positive = Field(128, description="Clips per WebDataset shard.")
    batch_size: Positive = Field(8, description="Clips encoded together.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Stored floating-point type.")
    negative_prompt: str = Field("", description="What guidance puts in the caption's place.")
