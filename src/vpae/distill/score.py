"""Variational score distillation (VSD): what the methods that follow the difference of two scores have in common.

It brings the distribution of one-step videos to that of real ones. Steps are those of the paper's phase I. Beside the
student it writes `generator.safetensors` and `fake_lora.safetensors` (`fake.safetensors` of a full copy).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from vpae.config.section import Positive, Share
from vpae.config.training import Lora, Optimizer, Times, Training
from vpae.distill.method import MOTION, TEACHER, Clips, Loss, Method, MethodSettings, Panel, motion_monitors
from vpae.lazy import lazy
from vpae.training.phase import Role

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vpae.config import Experiment
    from vpae.distill.networks import Networks
    from vpae.models.adapters import SharedBase
else:
    torch = lazy("torch")

adapters, flow, wan = lazy("vpae.models.adapters"), lazy("vpae.flow"), lazy("vpae.models.wan")
student, vsd = lazy("vpae.distill.student"), lazy("vpae.distill.losses.vsd")


class Settings(MethodSettings):
    """Of the generator, the fake model that follows it, and the times of both."""

    training: Training = Field(Training(steps=500), description="Its run of the training loop.")
    generator: Optimizer = Field(Optimizer(learning_rate=1e-6), description="Of the generator.")
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
    few_step_share: Share = Field(
        0.0,
        description="Share of the clips on which the generator learns the later times of few-step sampling, which "
        "generator_times leaves out [choice].",
    )
    few_steps: int = Field(
        4,
        ge=2,
        description="Steps of the sampler whose later times are learnt; a sampler of half as many shares some of them.",
    )
    score_times: Times = Field(Times(), description="t' at which the scores are compared [choice].")


class ScoreDistillation(Method):
    """Roles: generator (trained; has the EMA) and fake (trained); the teacher is frozen.

    Args:
        config, shift: settings.
        generator, teacher, fake: whole networks, or adapters on the teacher's weights.
    """

    caption = (
        "The VSD loss is half the mean square of a normalised direction: it shows its size, not a distance from the "
        "goal. Motion is the mean change between latent frames; towards 0, videos freeze."
    )
    panels = (
        Panel("Generator: VSD loss", {"generator_loss": ""}),
        Panel("Fake model: flow-matching loss", {"fake_loss": ""}),
        MOTION,
    )
    leaves = ("generator", "fake")
    Settings = Settings

    def __init__(self, config: Settings, shift: float, generator: nn.Module, teacher: nn.Module, fake: nn.Module):
        super().__init__(config, shift, generator)
        self.teacher, self.fake = teacher, fake
        self.hold(teacher=teacher, fake=fake)
        self.roles = {"generator": Role(generator, config.generator), "fake": Role(fake, config.fake)}

    @classmethod
    def build(cls, settings: Experiment, networks: Networks) -> ScoreDistillation:
        """The phase at its start."""
        return cls(getattr(settings, cls.name), settings.teacher.shift, *cls.three_networks(settings, networks))

    @classmethod
    def three_networks(cls, settings: Experiment, networks: Networks) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Generator, teacher and fake model, on as few base weights as their forms allow."""
        config = getattr(settings, cls.name)
        shared = adapters.SharedBase(networks.transformer(TEACHER, trained=False))
        with cls.seeded(settings, "fake"):
            if config.fake_form == "lora":
                fake = shared.add(adapters.FAKE, config.fake_lora)
            else:
                fake = copy.deepcopy(shared.transformer).float().requires_grad_(True)
            generator = cls.generator_at_start(settings, networks, shared)
        cls.take_over(fake, cls.fake_left(settings), settings, networks)
        return generator, cls.teacher_on(shared, config), fake

    @classmethod
    def fake_left(cls, settings: Experiment) -> Lora | None:
        """As `Method`."""
        config = getattr(settings, cls.name)
        return config.fake_lora if config.fake_form == "lora" else None

    @classmethod
    def teacher_on(cls, shared: SharedBase, config: Settings) -> nn.Module:
        """The teacher whose scores are followed."""
        return shared.network(None)

    def turns(self, step: int) -> list[str]:
        """Two time scales: the fake model first follows the generator, then the generator moves once."""
        return ["fake"] * self.config.fake_steps_per_generator_step + ["generator"]

    def generate(self, clips: Clips) -> Tensor:
        """Steps 1 and 2: xh = f_theta(x_t, t, c), one-step videos from real latents noised at a low SNR."""
        t = clips.times(self.config.generator_times)
        t = clips.sometimes_later(t, self.config.few_step_share, self.config.few_steps)
        return wan.predict_x0(self.generator, flow.add_noise(clips.x, clips.noise(), t), t, clips.c)

    def fake_loss(self, clips: Clips) -> Loss:
        """Step 6, see `following`."""
        with torch.no_grad():
            xh = self.generate(clips)
        return following(self.fake, xh, clips, self.config.score_times), {}

    def generator_loss(self, clips: Clips) -> Loss:
        """Steps 3 to 5, see `direction`."""
        config, xh = self.config, self.generate(clips)
        g = direction(xh, clips, config.score_times, self.teacher, config.guidance_scale, self.fake)
        return vsd.vsd_loss(xh, g), {"vsd_direction": g.abs().mean(), **motion_monitors(xh, clips.x)}

    def save(self, out: Path) -> None:
        """The generator and the fake model as they are after the last step."""
        student.save_weights(self.generator, out / "generator.safetensors")
        form = "fake_lora" if self.config.fake_form == "lora" else "fake"
        student.save_weights(self.fake, out / f"{form}.safetensors")


def following(fake: nn.Module, xh: Tensor, clips: Clips, times: Times) -> Tensor:
    """Step 6: the loss by which the fake model learns the distribution of sg(xh), by flow matching."""
    xh_t, t, noise = clips.noised(xh, times)
    return vsd.flow_matching_loss(wan.velocity(fake, xh_t, t, clips.c), xh, noise)


def direction(xh: Tensor, clips: Clips, times: Times, teacher: nn.Module, w: float, fake: nn.Module) -> Tensor:
    """Steps 3 to 5: the difference of two scores of xh_t', the teacher's with guidance w, the fake model's without."""
    with torch.no_grad():
        xh_t, t, _ = clips.noised(xh, times)
        mu_real = wan.predict_x0(teacher, xh_t, t, clips.c, w)
        mu_fake = wan.predict_x0(fake, xh_t, t, clips.c)
    return vsd.vsd_direction(xh, mu_real, mu_fake)
