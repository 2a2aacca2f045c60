"""Stage `equilibrium`."""

from typing import Literal

from pydantic import Field, model_validator

from vpae.config.discriminator import R1, Head
from vpae.config.section import NonNegative, Positive, Section
from vpae.config.training import Lora, Optimizer, Times, Training


class Equilibrium(Section):
    """Stage `equilibrium`: phase II, unified adversarial equilibrium."""

    training: Training = Field(Training(steps=1000), description="Its run of the training loop.")
    generator: Optimizer = Field(Optimizer(learning_rate=2e-6), description="Of the generator.")
    student_lora: Lora | None = Field(
        None, description="Train the generator as an adapter; must be what priming.student_lora is."
    )
    discriminator: Optimizer = Field(
        Optimizer(learning_rate=2e-5), description="Of the discriminator: its head, and the backbone if it is a copy."
    )
    discriminator_steps_per_generator_step: Positive = Field(1, description="Head updates per generator update.")
    discriminator_warmup_steps: int = Field(0, ge=0, description="Head updates before the first generator update.")
    backbone: Literal["ema", "teacher", "copy"] = Field(
        "ema",
        description="Features from the generator's EMA (the paper), the frozen teacher, or a copy of the teacher that "
        "is trained with the head (the paper's ablations).",
    )
    head: Head = Field(Head(), description="The part of the discriminator that learns.")
    r1: R1 = Field(R1(), description="Its regularisation.")
    g_loss: Literal["hinge_linear", "hinge_clipped"] = Field(
        "hinge_linear", description="-D(xh), or relu(1 - D(xh)) [choice]."
    )
    adversarial_weight: NonNegative = Field(1.0, description="Weight of the generator's adversarial term; 0 = off.")
    csds_weight: NonNegative = Field(10.0, description="lambda of the conditional SDS term (paper: 10).")
    csds_guidance_scale: float = Field(1.0, description="Guidance of the teacher in C-SDS; 1 = off [choice].")
    discriminator_times: Times = Field(Times(), description="t' at which the discriminator looks [choice].")
    csds_times: Times = Field(Times(), description="t' of the conditional SDS term [choice].")

    @model_validator(mode="after")
    def _possible(self) -> "Equilibrium":
        if self.backbone == "copy" and self.student_lora is not None:
            raise ValueError("backbone = copy trains a whole second network, which student_lora avoids: choose one")
        return self
