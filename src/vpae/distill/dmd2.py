"""DMD2 (arXiv 2405.14867), and Data-Forcing (DFD, arXiv 2606.18478), which is DMD2 with real data in its score.

Score distillation and a GAN at once: the head sits on the fake model's features, and both learn together. Beside the
student DMD2 writes `fake.safetensors` (`fake_lora.safetensors` of an adapter).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from vpae.config.discriminator import Head
from vpae.config.section import NonNegative, Share
from vpae.config.training import Times
from vpae.distill import score
from vpae.distill.method import MOTION, Clips, Loss, Panel, judged, motion_monitors
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

flow, wan, heads = lazy("vpae.flow"), lazy("vpae.models.wan"), lazy("vpae.models.heads")
gan, vsd = lazy("vpae.distill.losses.adversarial"), lazy("vpae.distill.losses.vsd")


class Settings(score.Settings):
    """Stage `dmd2`: score distillation and a GAN on the fake model's features."""

    fake_form: Literal["lora", "copy"] = Field(
        "copy", description="The fake model: a full copy of the teacher (DMD2), or an adapter on its weights."
    )
    generator_times: Times = Field(
        Times(low=1.0, high=1.0, distribution="uniform"), description="t of the generator's input; 1: pure noise."
    )
    adversarial_weight: NonNegative = Field(
        3e-3, description="Weight of the generator's adversarial term (DMD2: 1e-3 to 3e-3); 0 = off."
    )
    head_weight: NonNegative = Field(
        1e-2, description="Weight of the discriminator's loss beside the fake model's (DMD2: 1e-2); 0: no head."
    )
    head: Head = Field(Head(form="convolutions"), description="On the fake model's features (DMD2: convolutions).")
    real_share: Share = Field(
        0.0, description="Share of the teacher's scores taken at noised real clips: 0 is DMD2, 0.5 Data-Forcing."
    )

    @model_validator(mode="after")
    def _head_learns(self) -> Settings:
        if self.adversarial_weight and not self.head_weight:
            raise ValueError(
                f"adversarial_weight = {self.adversarial_weight} needs a head that learns; set head_weight too"
            )
        return self


class Dmd2(score.ScoreDistillation):
    """Roles: generator (trained; has the EMA) and fake (trained, with the head); the teacher is frozen.

    Args:
        config, shift, generator, teacher, fake: as of `ScoreDistillation`.
        head: the discriminator's, and `taps`, the fake model's blocks whose outputs it sees; None: no adversary.
    """

    name = "dmd2"
    title = "DMD2"
    label = "DMD2"
    about = "score distillation and a GAN on the fake model's features"
    caption = "Score distillation's loss shows the size of its direction; ln 4 is the loss of a head that cannot tell."
    panels = (
        Panel("Generator: VSD loss", {"vsd": ""}),
        Panel("Fake model: flow-matching loss", {"flow_matching": ""}),
        Panel("Head's loss", {"told_apart": ""}, 1.386, "ln 4: cannot tell"),
        Panel("Mean logits", {"logit_real": "real", "logit_fake": "generated"}),
        MOTION,
    )
    Settings = Settings

    def __init__(
        self,
        config: Settings,
        shift: float,
        generator: nn.Module,
        teacher: nn.Module,
        fake: nn.Module,
        head: nn.Module | None = None,
        taps: tuple[int, ...] = (),
    ):
        super().__init__(config, shift, generator, teacher, fake)
        self.head, self.taps = head, taps
        if head is not None:
            self.roles["fake"] = Role(torch.nn.ModuleDict({"fake": fake, "head": head}), config.fake)

    @classmethod
    def build(cls, settings: Experiment, networks: Networks) -> Dmd2:
        """The three networks of score distillation and, if there is an adversary, an untrained head."""
        config = getattr(settings, cls.name)
        parts = cls.three_networks(settings, networks)
        if not config.head_weight:
            return cls(config, settings.teacher.shift, *parts)
        with cls.seeded(settings, "head"):
            head, taps = heads.head_on(parts[-1], config.head)
        return cls(config, settings.teacher.shift, *parts, head.to(networks.device), taps)

    def judge(self, xt_BCFHW: Tensor, t_B: Tensor, c: Condition) -> tuple[Tensor, Tensor]:
        """The fake model's velocity and, of the same pass, the head's logits (B,)."""
        with wan.tapped_blocks(self.fake, self.taps) as layers:
            v = wan.velocity(self.fake, xt_BCFHW, t_B, c)
        return v, judged(self.head, self.fake, [layers[i] for i in self.taps], c)

    def fake_loss(self, clips: Clips) -> Loss:
        """The fake model follows the generator by flow matching; with the head it tells real from generated."""
        if self.head is None:
            return super().fake_loss(clips)
        with torch.no_grad():
            xh = self.generate(clips)
        xh_t, t, noise = clips.noised(xh, self.config.score_times)
        v, fake = self.judge(xh_t, t, clips.c)
        _, real = self.judge(flow.add_noise(clips.x, clips.noise(), t), t, clips.c)
        matching = vsd.flow_matching_loss(v, xh, noise)
        told_apart = gan.discriminator_non_saturating(real, fake)
        logs = {"flow_matching": matching, "told_apart": told_apart}
        logs |= {"logit_real": real.mean(), "logit_fake": fake.mean()}
        return matching + self.config.head_weight * told_apart, logs

    def generator_loss(self, clips: Clips) -> Loss:
        """L_VSD - weight E log sigmoid(D(xh_t')); one pass of the fake model gives its score and the features."""
        config, c, xh = self.config, clips.c, self.generate(clips)
        xh_t, t, noise = clips.noised(xh, config.score_times)
        if config.adversarial_weight:
            v, logits = self.judge(xh_t, t, c)
        else:
            with torch.no_grad():
                v, logits = wan.velocity(self.fake, xh_t, t, c), None
        with torch.no_grad():
            mu_fake = flow.x0_from_velocity(xh_t, v, t)
            at = self.where_the_teacher_looks(xh_t, noise, t, clips)
            mu_real = wan.predict_x0(self.teacher, at, t, c, config.guidance_scale)
        g = vsd.vsd_direction(xh, mu_real, mu_fake)
        loss = vsd.vsd_loss(xh, g)
        logs = {"vsd": loss, "vsd_direction": g.abs().mean(), **motion_monitors(xh, clips.x)}
        if logits is not None:
            opposed = gan.generator_non_saturating(logits)
            loss, logs["adversarial"] = loss + config.adversarial_weight * opposed, opposed
        return loss, logs

    @classmethod
    def described(cls, section: Mapping[str, Any]) -> str:
        """As `Method`: without its head it is score distillation alone."""
        return cls.about if section.get("head_weight", 1) or cls is not Dmd2 else "score distillation"

    @classmethod
    def as_published(cls, settings: Experiment) -> bool:
        """As `Method`: DMD2 has its adversary, and no scores at real clips."""
        section = getattr(settings, cls.name)
        return section.adversarial_weight > 0 and section.real_share == 0

    def where_the_teacher_looks(self, xh_t: Tensor, noise: Tensor, t: Tensor, clips: Clips) -> Tensor:
        """xh_t', but for a share of the clips the real one with the same noise at the same t' (Data-Forcing)."""
        if not self.config.real_share:
            return xh_t
        of_real = torch.rand(len(t), generator=clips.rng, device=t.device) < self.config.real_share
        return torch.where(flow.expand(of_real, xh_t).bool(), flow.add_noise(clips.x, noise, t), xh_t)


class DfdSettings(Settings):
    """Stage `dfd`: score distillation with half of the teacher's scores at real clips, and no adversary."""

    fake_form: Literal["lora", "copy"] = Field(
        "lora",
        description="The fake model; an adapter goes on from the one that the method before left, if they are alike.",
    )
    adversarial_weight: NonNegative = Field(0.0, description="Weight of the generator's adversarial term; 0 = off.")
    head_weight: NonNegative = Field(0.0, description="Weight of the discriminator's loss; 0: no head.")
    real_share: Share = Field(0.5, description="Share of the teacher's scores taken at noised real clips (DFD: 0.5).")


class Dfd(Dmd2):
    """Data-Forcing: what real data gives without an adversary. It goes on from a student of score distillation."""

    name = "dfd"
    title = "Data-Forcing"
    label = "Data-Forcing"
    about = "score distillation with the teacher's scores taken at real clips half of the time"
    caption = "The loss shows the size of score distillation's direction, not a distance from the goal."
    panels = score.ScoreDistillation.panels
    Settings = DfdSettings
