"""The shape of every clip."""

from pydantic import Field, model_validator

from vpae.config.section import Positive, Section

VAE_STRIDE = (4, 8, 8)  # Wan2.1: 4x in time, 8x in height and width
PATCH = (1, 2, 2)  # of WanTransformer3DModel


class Geometry(Section):
    """The shape of every clip."""

    frames: Positive = Field(81, description="Frames per clip; 4k + 1, because the VAE keeps the first frame apart.")
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
