"""Stage `priming`."""

from typing import Literal

from pydantic import Field

from vpae.config.section import Positive, Section
from vpae.config.training import Lora, Optimizer, Times, Training


class Priming(Section):
    """Stage `priming`: phase I, stability priming by variational score distillation."""

    training: Training = Field(Training(steps=500), description="Its run of the training loop.")
    generator: Optimizer = Field(Optimizer(learning_rate=1e-6), description="Of the generator.")
    student_lora: Lora | None = Field(
        None, description="Train the generator as an adapter on the teacher's own weights; empty: all its weights."
    )
    fake: Optimizer = Field(Optimizer(learning_rate=1e-5), description="Of the fake model.")
    fake_form: Literal["lora", "copy"] = Field(
        "lora", description="The fake model: an adapter on the teacher's own weights (the paper), or a full copy of it."
    )
    fake_lora: Lora = Field(Lora(), description="The adapter of fake_form = lora.")
    fake_steps_per_generator_step: Positive = Field(
        5, description="Fake-model updates for each generator update [choice: DMD2's 5]."
    )
    guidance_scale: float = Field(5.0, description="Teacher's guidance w in u + w (c - u); 1 = off.")
    generator_times: Times = Field(
        Times(low=0.9, high=1.0, distribution="uniform"), description="t of the generator's input (paper: [0.9T, T])."
    )
    score_times: Times = Field(Times(), description="t' at which the scores are compared [choice].")
