"""Stage `clips`."""

from typing import Literal

from pydantic import Field, model_validator

from vpae.config.section import Positive, Section, Share


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
            raise ValueError(f"grows_share = {self.grows_share} and spins_share = {self.spins_share} are more than 1")
        return self


class Clips(Section):
    """Stage `clips`: which videos there are."""

    source: Literal["world", "folder", "table"] = Field(
        "folder", description="The procedural world; a folder of videos with captions; or a CSV/JSONL table."
    )
    path: str = Field("", description="The folder, or the table with columns path and caption. Unused by the world.")
    train: Positive = Field(1024, description="Clips to train on (the world), or at most so many (others).")
    held_out: Positive = Field(256, description="Clips kept for evaluation, never trained on.")
    workers: int = Field(2, ge=1, description="Processes that decode or render.")
    world: World = Field(World(), description="What the procedural world shows.")

    @model_validator(mode="after")
    def _has_path(self) -> "Clips":
        if self.source != "world" and not self.path:
            raise ValueError(f"source = {self.source} needs path: name the {self.source} of videos")
        return self
