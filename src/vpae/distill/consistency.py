"""Consistency distillation along the teacher's guided trajectory (LCM, arXiv 2310.04378).

A rival, and the paper's alternative to phase I: in a chain, phase II can start from its student.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from vpae.config.section import Positive
from vpae.config.training import Optimizer, Training
from vpae.distill.method import TEACHER, Clips, Loss, Method, MethodSettings, Panel
from vpae.lazy import lazy
from vpae.training.phase import Role

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vpae.config import Experiment
    from vpae.distill.networks import Networks
else:
    torch = lazy("torch")

adapters, flow, wan = lazy("vpae.models.adapters"), lazy("vpae.flow"), lazy("vpae.models.wan")
losses = lazy("vpae.distill.losses.consistency")


class Settings(MethodSettings):
    """Stage `consistency`: the student at t matches its EMA at the next t along the teacher's trajectory."""

    training: Training = Field(
        Training(steps=1000, ema_decay=0.95), description="Its run of the training loop; the EMA is the target network."
    )
    generator: Optimizer = Field(Optimizer(learning_rate=1e-6), description="Of the generator.")
    guidance_scale: float = Field(
        5.0, description="Guidance w of the teacher's step in u + w (c - u), one for all clips [choice]; 1 = off."
    )
    intervals: Positive = Field(
        50, description="Steps of the teacher's trajectory from t = 1 to 0 (LCM: every 20th of 1,000 times)."
    )
    huber: float | None = Field(
        None, gt=0, description="c of a pseudo-Huber distance of the predictions; empty: the squared distance [choice]."
    )


class Consistency(Method):
    """Roles: generator (trained; has the EMA, which is the target network); the teacher is frozen.

    Args:
        config, shift: settings.
        generator, teacher: whole networks, or an adapter and the base it is on.
    """

    name = "consistency"
    title = "Consistency distillation"
    label = "LCM"
    about = "consistency distillation along the teacher's guided trajectory"
    caption = "The loss compares predictions one step of the teacher apart: it shows consistency, not quality."
    panels = (Panel("Generator: consistency loss", {"generator_loss": ""}),)
    row = "lcm"
    steps = (1, 4)
    Settings = Settings

    def __init__(self, config: Settings, shift: float, generator: nn.Module, teacher: nn.Module):
        super().__init__(config, shift, generator)
        self.teacher = teacher.requires_grad_(False)
        self.hold(teacher=teacher)
        self.roles = {"generator": Role(generator, config.generator)}

    @classmethod
    def build(cls, settings: Experiment, networks: Networks) -> Consistency:
        """The generator at its start, and the teacher."""
        config = getattr(settings, cls.name)
        teacher = networks.transformer(TEACHER, trained=False)
        shared = None if config.student_lora is None else adapters.SharedBase(teacher)
        with cls.seeded(settings, "student"):
            generator = cls.generator_at_start(settings, networks, shared)
        return cls(config, settings.teacher.shift, generator, teacher if shared is None else shared.network(None))

    def generator_loss(self, clips: Clips) -> Loss:
        """d(f_theta(x_t, t, c), sg f_theta-(x_s, s, c)), where one guided step of the teacher leads from x_t to x_s."""
        config, c = self.config, clips.c
        t, s = losses.neighbouring_times(config.intervals, self.shift, len(clips.x), clips.rng)
        x_t = flow.add_noise(clips.x, clips.noise(), t)
        with torch.no_grad():
            x_s = losses.ode_step(x_t, wan.guided_velocity(self.teacher, x_t, t, c, config.guidance_scale), t, s)
            target = wan.predict_x0(self.ema, x_s, s, c)
        return losses.consistency_loss(wan.predict_x0(self.generator, x_t, t, c), target, config.huber), {}
