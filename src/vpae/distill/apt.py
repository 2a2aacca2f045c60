"""Adversarial post-training against real data alone (APT, arXiv 2501.08316).

It starts from the student of consistency distillation. The discriminator is a full copy of the teacher that learns,
with cross-attention heads at three depths; its input is not noised. Beside the student it writes
`discriminator_head.safetensors`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from vpae.config.discriminator import Head
from vpae.config.section import NonNegative, Positive
from vpae.config.training import Optimizer, Times, Training
from vpae.distill.method import MOTION, TEACHER, Clips, Loss, Method, MethodSettings, Panel, judged, motion_monitors
from vpae.lazy import lazy
from vpae.training.phase import Role

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vpae.config import Experiment
    from vpae.distill.networks import Networks
    from vpae.models.wan import Condition
else:
    torch = lazy("torch")

adapters, flow, wan = lazy("vpae.models.adapters"), lazy("vpae.flow"), lazy("vpae.models.wan")
student, heads = lazy("vpae.distill.student"), lazy("vpae.models.heads")
gan, probes = lazy("vpae.distill.losses.adversarial"), lazy("vpae.distill.losses.probes")


class Settings(MethodSettings):
    """Stage `apt`: adversarial post-training against real data."""

    training: Training = Field(
        Training(steps=300, ema_decay=0.995), description="Its run of the training loop [choice: steps]."
    )
    generator: Optimizer = Field(
        Optimizer(algorithm="rmsprop", learning_rate=3e-6), description="Of the generator (APT: 3e-6 for video)."
    )
    discriminator: Optimizer = Field(
        Optimizer(algorithm="rmsprop", learning_rate=3e-6), description="Of the discriminator's backbone and head."
    )
    discriminator_steps_per_generator_step: Positive = Field(
        1, description="Discriminator updates per generator update."
    )
    head: Head = Field(
        Head(queries=1, semantics=False), description="One query attends to the tokens of each of three depths."
    )
    discriminator_times: Times = Field(
        Times(low=0.0, high=1.0), description="Times t that the discriminator is told; its input is never noised."
    )
    discriminator_shift: float = Field(12.0, gt=0, description="Timestep shift of these times (APT: 12 for video).")
    ensemble: Positive = Field(1, description="How many times t the logits are averaged over [choice: 1].")
    r1_weight: NonNegative = Field(100.0, description="Weight of the approximated R1 (APT: 100); 0 = off.")
    r1_sigma: float = Field(0.1, gt=0, description="sigma of its perturbation (APT: 0.1 for video).")


class Apt(Method):
    """Roles: generator (trained; has the EMA) and discriminator (trained: backbone and head).

    Args:
        config, shift: settings.
        generator: a whole network, or an adapter on the teacher's weights.
        backbone: of the discriminator: a copy of the teacher that will be trained.
        head: the discriminator's, and `taps`, the blocks whose outputs it sees.
    """

    name = "apt"
    title = "Adversarial post-training"
    label = "APT"
    about = "adversarial post-training against real data"
    caption = "ln 4 is the loss of a discriminator that cannot tell. R1 is that of the probes, without its weight."
    panels = (
        Panel("Discriminator's loss", {"told_apart": ""}, 1.386, "ln 4: cannot tell"),
        Panel("Mean logits", {"logit_real": "real", "logit_fake": "generated"}),
        Panel("Approximated R1", {"r1": ""}),
        Panel("Generator's loss", {"generator_loss": ""}),
        MOTION,
    )
    Settings = Settings

    def __init__(
        self,
        config: Settings,
        shift: float,
        generator: nn.Module,
        backbone: nn.Module,
        head: nn.Module,
        taps: tuple[int, ...],
    ):
        super().__init__(config, shift, generator)
        self.backbone, self.head, self.taps = backbone.requires_grad_(True), head, taps
        self.hold(backbone=backbone)
        discriminator = torch.nn.ModuleDict({"backbone": backbone, "head": head})
        self.roles = {
            "generator": Role(generator, config.generator),
            "discriminator": Role(discriminator, config.discriminator),
        }

    @classmethod
    def build(cls, settings: Experiment, networks: Networks) -> Apt:
        """The generator at its start, and a discriminator that starts as the teacher with an untrained head."""
        config = getattr(settings, cls.name)
        backbone = networks.transformer(TEACHER, trained=True)
        lora = config.student_lora is not None
        shared = adapters.SharedBase(networks.transformer(TEACHER, trained=False)) if lora else None
        with cls.seeded(settings, "student"):
            generator = cls.generator_at_start(settings, networks, shared)
        with cls.seeded(settings, "head"):
            head, taps = heads.head_on(backbone, config.head)
        return cls(config, settings.teacher.shift, generator, backbone, head.to(networks.device), taps)

    def turns(self, step: int) -> list[str]:
        """The discriminator learns first; then the generator moves once."""
        return ["discriminator"] * self.config.discriminator_steps_per_generator_step + ["generator"]

    def ensemble(self, clips: Clips) -> list[Tensor]:
        """The times (B,) whose logits are averaged."""
        config = self.config
        draw = (config.discriminator_times, config.discriminator_shift, clips.progress, len(clips.x), clips.rng)
        return [flow.sample_times(*draw) for _ in range(config.ensemble)]

    def logits(self, x_BCFHW: Tensor, times: list[Tensor], c: Condition) -> Tensor:
        """D(x) = mean over t of D(x, t), (B,)."""
        seen = (wan.features(self.backbone, x_BCFHW, t, c, self.taps) for t in times)
        return torch.stack([judged(self.head, self.backbone, layers, c) for layers in seen]).mean(dim=0)

    def discriminator_loss(self, clips: Clips) -> Loss:
        """-E log sigmoid(D(x)) - E log(1 - sigmoid(D(xh))) + weight E (D(x) - D(x + d))^2, all at the same times."""
        config, x, c = self.config, clips.x, clips.c
        with torch.no_grad():
            xh = self.generate(clips)
        times = self.ensemble(clips)
        real, fake = self.logits(x, times, c), self.logits(xh, times, c)
        loss = told_apart = gan.discriminator_non_saturating(real, fake)
        logs = {"told_apart": told_apart, "logit_real": real.mean(), "logit_fake": fake.mean()}
        if config.r1_weight:
            perturbed = self.logits(x + probes.perturbation("plain", x, config.r1_sigma, clips.rng), times, c)
            logs["r1"] = probes.probe_penalty(real, perturbed)
            loss = loss + config.r1_weight * logs["r1"]
        return loss, logs

    def generator_loss(self, clips: Clips) -> Loss:
        """-E log sigmoid(D(xh))."""
        xh = self.generate(clips)
        loss = gan.generator_non_saturating(self.logits(xh, self.ensemble(clips), clips.c))
        return loss, motion_monitors(xh, clips.x)

    def save(self, out: Path) -> None:
        """The discriminator's head."""
        student.save_weights(self.head, out / "discriminator_head.safetensors")
