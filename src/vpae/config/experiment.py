"""One experiment: the tree of all sections."""

from typing import Any

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from vpae.config.clips import Clips
from vpae.config.cluster import Cluster, Jobs
from vpae.config.equilibrium import Equilibrium
from vpae.config.evaluation import Evaluation
from vpae.config.geometry import Geometry
from vpae.config.latents import Latents
from vpae.config.priming import Priming
from vpae.config.report import Report
from vpae.config.samples import Samples
from vpae.config.section import fill_defaults
from vpae.config.teacher import Teacher

LEAST_VIDEOS = 3  # of which a distance between distributions, leaving out one, still has the two that it needs


class Experiment(BaseSettings):
    """One experiment: everything that determines its results."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="VPAE_", env_nested_delimiter="__", env_file=None
    )

    extends: str = Field("", description="Name of the experiment beside this file whose keys this one overlays.")
    seed: int = Field(0, ge=0, description="Every random number follows from it.")
    geometry: Geometry = Field(Geometry(), description="The shape of every clip.")
    clips: Clips = Field(description="Which videos there are.")
    teacher: Teacher = Field(description="The model to distil.")
    latents: Latents = Field(Latents(), description="How clips are encoded and stored.")
    priming: Priming = Field(Priming(), description="Phase I.")
    equilibrium: Equilibrium = Field(Equilibrium(), description="Phase II.")
    samples: Samples = Field(Samples(), description="Whose videos are made, and how many.")
    evaluation: Evaluation = Field(Evaluation(), description="How they are measured.")
    report: Report = Field(Report(), description="What the report shows.")
    jobs: Jobs = Field(Jobs(), description="How stages are spread over a cluster.")
    cluster: Cluster = Field(Cluster(), description="What each stage's jobs ask a cluster for.")

    @model_validator(mode="before")
    @classmethod
    def _keep_other_defaults(cls, values: Any) -> Any:
        return fill_defaults(cls, values)

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        if self.samples.count > self.clips.held_out:
            raise ValueError(
                f"samples.count = {self.samples.count} is more than clips.held_out = {self.clips.held_out}; "
                "keep more clips or animate fewer"
            )
        if self.samples.count < LEAST_VIDEOS:
            raise ValueError(
                f"samples.count = {self.samples.count}: evaluation needs {LEAST_VIDEOS}, because its "
                "distances leave some out in turn; animate more"
            )
        least, why = self.training_clips_needed()
        if least > self.clips.train:
            raise ValueError(f"{why} is more than clips.train = {self.clips.train}")
        if self.equilibrium.student_lora != self.priming.student_lora:
            raise ValueError(
                "equilibrium.student_lora is not priming.student_lora: the adapter that priming trains is the one that "
                "goes on learning; set both alike, or leave both empty"
            )
        return self

    def training_clips_needed(self) -> tuple[int, str]:
        """How many clips to train on the later stages need, and the setting or stage that needs them."""
        sizes = ((phase, getattr(self, phase).training.batch_size) for phase in ("priming", "equilibrium"))
        needs = [(size, f"{phase}.training.batch_size = {size}") for phase, size in sizes]
        return max([*needs, (LEAST_VIDEOS, f"the {LEAST_VIDEOS} that evaluation compares with")])
