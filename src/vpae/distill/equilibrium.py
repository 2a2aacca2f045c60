"""Phase II, unified adversarial equilibrium.

The one-step generator against a discriminator whose backbone is the generator's own EMA. The score loss of phase I can
be kept on beside the adversary. Beside the student it writes `head.safetensors`, and `fake_lora.safetensors` if it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from vpae.config.discriminator import R1, Head
from vpae.config.section import NonNegative, Positive, Section
from vpae.config.training import Lora, Optimizer, Times, Training
from vpae.distill import score
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
precision = lazy("vpae.training.precision")
adversarial, probing = lazy("vpae.distill.losses.adversarial"), lazy("vpae.distill.losses.probes")
vsd = lazy("vpae.distill.losses.vsd")


class Score(Section):
    """The score loss of phase I, kept on beside the adversary [choice]: the paper drops it, public successes do not."""

    weight: NonNegative = Field(0.0, description="Weight of L_VSD in the generator's loss; 0 = off (the paper).")
    fake: Optimizer = Field(Optimizer(learning_rate=1e-5), description="Of the fake model.")
    fake_lora: Lora = Field(
        Lora(), description="The fake model's adapter, if the method that this one starts from leaves none."
    )
    fake_steps_per_generator_step: Positive = Field(5, description="Fake-model updates for each generator update.")
    guidance_scale: float = Field(5.0, description="Teacher's guidance w in u + w (c - u); 1 = off.")
    times: Times = Field(Times(), description="t' at which the scores are compared.")


class FewStep(Section):
    """Learning of the later times of few-step sampling beside t = 1."""

    share: float = Field(0.25, gt=0, le=1, description="Share of the clips that are at a later time.")
    steps: int = Field(
        4,
        ge=2,
        description="Steps of the sampler whose later times are learnt; a sampler of half as many shares some of them.",
    )
    own: bool = Field(
        False,
        description="Noise the student's own one-step videos, as sampling does, instead of real clips (DMD2's backward "
        "simulation, one step deep); one more network evaluation.",
    )


class Settings(MethodSettings):
    """Stage `equilibrium`: phase II, unified adversarial equilibrium."""

    training: Training = Field(Training(steps=1000), description="Its run of the training loop.")
    generator: Optimizer = Field(Optimizer(learning_rate=2e-6), description="Of the generator.")
    student_lora: Lora | None = Field(
        None, description="Train the generator as an adapter; must be that of the method that it starts from."
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
    logits_at_once: bool = Field(
        False,
        description="In the head's turn, take all logits (of clips, videos and probes) in one pass: fewer exchanges of "
        "shards, more memory, different last bits.",
    )
    r1: R1 = Field(R1(), description="The discriminator's regularisation.")
    g_loss: Literal["hinge_linear", "hinge_clipped"] = Field(
        "hinge_linear", description="-D(xh), or relu(1 - D(xh)) [choice]."
    )
    relativistic: bool = Field(
        False,
        description="Instead of the hinge, compare each video's logit with that of the real clip of its first "
        "frame: what both owe to the first frame then cancels [choice; R3GAN's loss].",
    )
    adversarial_weight: NonNegative = Field(1.0, description="Weight of the generator's adversarial term; 0 = off.")
    csds_weight: NonNegative = Field(10.0, description="lambda of the conditional SDS term (paper: 10).")
    csds_guidance_scale: float = Field(1.0, description="Guidance of the teacher in C-SDS; 1 = off [choice].")
    discriminator_times: Times = Field(Times(), description="t' at which the discriminator looks [choice].")
    csds_times: Times = Field(Times(), description="t' of the conditional SDS term [choice].")
    same_noise: bool = Field(
        False, description="Noise a real clip and its generated one alike, so that their logits differ less by chance."
    )
    few_step: FewStep | None = Field(None, description="Train for more than one step, too [choice]; empty: one step.")
    score: Score = Field(Score(), description="The score loss of phase I, kept on.")

    @model_validator(mode="after")
    def _possible(self) -> Settings:
        if self.adversarial_weight == 0 and self.csds_weight == 0 and self.score.weight == 0:
            raise ValueError("adversarial_weight, csds_weight and score.weight are all 0: nothing would be learnt")
        if self.discriminator_warmup_steps and self.discriminator.warmup_steps:
            raise ValueError(
                f"discriminator_warmup_steps = {self.discriminator_warmup_steps} are all in the first step, when "
                f"the rate of discriminator.warmup_steps = {self.discriminator.warmup_steps} is lowest; set one of "
                "them to 0"
            )
        if self.relativistic and self.g_loss != "hinge_linear":
            raise ValueError(
                f"relativistic takes the place of the hinge: leave out g_loss = {self.g_loss}, or relativistic"
            )
        if self.adversarial_weight == 0 and self.backbone == "copy":
            raise ValueError("adversarial_weight = 0 trains no discriminator: leave out backbone = copy")
        if self.backbone == "copy" and self.student_lora is not None:
            raise ValueError("backbone = copy trains a whole second network, which student_lora avoids: choose one")
        return self


class Equilibrium(Method):
    """Roles: generator (trained; has the EMA), head (trained); EMA = discriminator's backbone; the teacher is frozen.

    Where the score loss is kept on, there is a fake model (trained) too.

    Args:
        config, shift: settings.
        generator, teacher: whole networks, or an adapter and the base it is on.
        head: the discriminator's.
        taps: blocks whose outputs it sees.
        fake: the fake model, an adapter on the teacher's weights; none where the score loss is off.
        backbone: the discriminator's own copy of the teacher; none unless `backbone = copy`.
    """

    name = "equilibrium"
    title = "Phase II: adversarial equilibrium"
    label = "V-PAE"
    about = "an adversarial equilibrium against its own EMA"
    caption = (
        "Points: single steps; lines: running mean. The discriminator separates real from generated where the gap of "
        "its logits is above 0 and its hinge loss below 2. C-SDS is the mean square distance of one-step videos from "
        "the teacher's prediction."
    )
    panels = (
        Panel("Discriminator: hinge loss", {"hinge": ""}, 2.0, "2: cannot tell"),
        Panel("Discriminator: relativistic loss", {"relativistic": ""}, math.log(2), "ln 2: cannot tell"),
        Panel("Mean logits", {"logit_real": "real", "logit_fake": "generated"}),
        Panel("Logit gap, real − generated", {"logit_gap": ""}, 0.0, "0: cannot tell"),
        Panel("Discriminator's accuracy", {"accuracy": ""}, 0.5, "½: chance"),
        Panel("Generator: C-SDS loss", {"csds": ""}),
        Panel("Gradients at the video", {"pull_adversarial": "adversary", "pull_csds": "C-SDS", "pull_score": "score"}),
        MOTION,
    )
    row = "vpae"
    steps = (1, 2, 4)
    compared = ("discriminator", "backbone", ("ema", "copy"))
    leaves = ("head", "fake")
    Settings = Settings

    def __init__(
        self,
        config: Settings,
        shift: float,
        generator: nn.Module,
        teacher: nn.Module,
        head: nn.Module,
        taps: tuple[int, ...],
        fake: nn.Module | None = None,
        backbone: nn.Module | None = None,
    ):
        super().__init__(config, shift, generator)
        self.taps, self.teacher, self.head = taps, teacher.requires_grad_(False), head
        if config.backbone == "copy":
            self.backbone = backbone.requires_grad_(True)
            self.hold(teacher=teacher, backbone=backbone)
            discriminator = torch.nn.ModuleDict({"head": head, "backbone": backbone})
        else:
            self.backbone = self.ema if config.backbone == "ema" else teacher
            self.hold(teacher=teacher)
            discriminator = head
        self.roles = {"generator": Role(generator, config.generator), "head": Role(discriminator, config.discriminator)}
        self.fake = fake
        if fake is not None:
            self.roles["fake"] = Role(fake, config.score.fake)

    @classmethod
    def build(cls, settings: Experiment, networks: Networks) -> Equilibrium:
        """The generator where its start left it (its EMA weights), the teacher, and an untrained head."""
        config = getattr(settings, cls.name)
        teacher = networks.transformer(TEACHER, trained=False)
        lora, fake = cls.fake_left(settings), None  # of the score loss, if it is kept on
        shared = adapters.SharedBase(teacher) if lora or config.student_lora is not None else None
        with cls.seeded(settings, "student"):
            generator = cls.generator_at_start(settings, networks, shared)
        with cls.seeded(settings, "head"):
            head, taps = heads.head_on(generator, config.head)
        if lora:
            with cls.seeded(settings, "fake"):
                fake = shared.add(adapters.FAKE, lora)
            cls.take_over(fake, lora, settings, networks)
        teacher = teacher if shared is None else shared.network(None)
        backbone = networks.transformer(TEACHER, trained=True) if config.backbone == "copy" else None
        return cls(config, settings.teacher.shift, generator, teacher, head.to(networks.device), taps, fake, backbone)

    @classmethod
    def described(cls, section: Mapping[str, Any]) -> str:
        """As `Method`: which terms are on, and what the discriminator looks through."""
        through = {"teacher": "the frozen teacher", "copy": "a trained copy of the teacher"}
        adversary = f"an adversarial equilibrium against {through.get(section.get('backbone'), 'its own EMA')}"
        terms = {
            adversary: section.get("adversarial_weight", 1),
            "score distillation": section.get("score", {}).get("weight", 0),
            "conditional SDS": section.get("csds_weight", 1),
        }
        first, *others = (name for name, weight in terms.items() if weight)
        return f"{first} with {' and '.join(others)}" if others else first

    @classmethod
    def as_published(cls, settings: Experiment) -> bool:
        """As `Method`: the paper's ablations are other methods; what is kept on beside its losses does not count."""
        from vpae.distill import CHAIN

        section = getattr(settings, cls.name)
        terms = (section.adversarial_weight, section.csds_weight, section.r1.weight)
        discriminator = section.backbone == "ema" and section.head.form == "attention" and section.head.semantics
        return min(terms) > 0 and discriminator and cls.start_of(settings) == CHAIN[0].name

    @classmethod
    def fake_left(cls, settings: Experiment) -> Lora | None:
        """As `Method`."""
        kept = getattr(settings, cls.name).score
        return (cls.fake_at_start(settings) or kept.fake_lora) if kept.weight > 0 else None

    def turns(self, step: int) -> list[str]:
        """The head learns first, then the fake model, if there is one; then the generator moves once."""
        config = self.config
        head = config.discriminator_steps_per_generator_step if config.adversarial_weight > 0 else 0
        warmup = config.discriminator_warmup_steps if head and step == 0 else 0
        fake = config.score.fake_steps_per_generator_step if self.fake is not None else 0
        return ["head"] * (warmup + head) + ["fake"] * fake + ["generator"]

    def generate(self, clips: Clips) -> Tensor:
        """Step 1: xh = f_theta(eps, 1, c), one step from pure noise; a share from clips or videos noised less."""
        t, x, few = clips.ones(), clips.x, self.config.few_step
        if few is not None:
            if few.own:
                with torch.no_grad():
                    x = wan.predict_x0(self.generator, clips.noise(), t, clips.c)
            t = clips.sometimes_later(t, few.share, few.steps)
        return wan.predict_x0(self.generator, flow.add_noise(x, clips.noise(), t), t, clips.c)

    def logits(self, xt_BCFHW: Tensor, t_B: Tensor, c: Condition) -> Tensor:
        """Steps 2 and 3: D(x_t), (B,).

        A backbone that is no copy of its own gets no gradient for its weights; its input may.
        """
        return judged(self.head, self.backbone, wan.features(self.backbone, xt_BCFHW, t_B, c, self.taps), c)

    def logits_of(self, seen: list[Tensor], t_B: Tensor, c: Condition) -> list[Tensor]:
        """D of several noised latents at the same times: one pass after the other, or one of them all."""
        if not self.config.logits_at_once:
            return [self.logits(xt, t_B, c) for xt in seen]
        n = len(seen)
        return list(self.logits(torch.cat(seen), t_B.repeat(n), c.repeated(n)).chunk(n))

    def head_loss(self, clips: Clips) -> Loss:
        """Steps 4 and 5: loss of clips and videos noised at the same t', and the probes of the regularisation."""
        with torch.no_grad():
            xh = self.generate(clips)
        xh_t, t, noise = clips.noised(xh, self.config.discriminator_times)
        x_t = flow.add_noise(clips.x, noise if self.config.same_noise else clips.noise(), t)
        c, settings = clips.c, self.config.r1
        sigmas = {probe: getattr(settings, f"sigma_{probe}") for probe in settings.probes}

        def probed(xt: Tensor) -> list[Tensor]:
            return [xt + probing.perturbation(probe, xt, sigma, clips.rng) for probe, sigma in sigmas.items()]

        # The penalty is to measure the probes and not the rounding of the backbone's activations.
        with nullcontext() if self.config.backbone == "copy" else precision.finer_autocast(x_t.device.type):
            seen = [x_t, xh_t, *probed(x_t), *(probed(xh_t) if settings.generated_weight > 0 else [])]
            real, fake, *others = self.logits_of(seen, t, c)
            probes, r2 = dict(zip(sigmas, others, strict=False)), others[len(sigmas) :]
        if self.config.relativistic:
            name, opposed, right = "relativistic", adversarial.discriminator_relativistic(real, fake), [real > fake]
        else:
            name, opposed, right = "hinge", adversarial.discriminator_hinge(real, fake), [real > 0, fake < 0]
        penalty = probing.probe_penalty(real, *probes.values())
        logs = {
            name: opposed,
            "str1": penalty,
            "logit_real": real.mean(),
            "logit_fake": fake.mean(),
            "logit_gap": real.mean() - fake.mean(),
            "accuracy": torch.stack(right).float().mean(),
        }
        # |grad D| along each kind of probe, to first order.
        slopes = {f"slope_{k}": (real - d).square().mean().sqrt() / sigmas[k] for k, d in probes.items()}
        of_generated = settings.generated_weight * probing.probe_penalty(fake, *r2)
        return opposed + settings.weight * penalty + of_generated, logs | slopes

    def fake_loss(self, clips: Clips) -> Loss:
        """The fake model follows the one-step videos, as in phase I."""
        with torch.no_grad():
            xh = self.generate(clips)
        return score.following(self.fake, xh, clips, self.config.score.times), {}

    def generator_loss(self, clips: Clips) -> Loss:
        """Steps 4 and 6: L_G = -E D(xh_t') + lambda L_CSDS, and the score loss where it is kept on."""
        config, xh, logs = self.config, self.generate(clips), {}
        loss = xh.new_zeros(())
        if config.adversarial_weight > 0:
            xh_t, t, noise = clips.noised(self.pulled(xh, "adversarial", logs), config.discriminator_times)
            fake = self.logits(xh_t, t, clips.c)
            if config.relativistic:
                with torch.no_grad():
                    x_t = flow.add_noise(clips.x, noise if config.same_noise else clips.noise(), t)
                    real = self.logits(x_t, t, clips.c)
                opposed = adversarial.generator_relativistic(real, fake)
            else:
                opposed = adversarial.generator_adversarial(fake, config.g_loss)
            loss = loss + config.adversarial_weight * opposed
            logs["adversarial"] = opposed
        if config.csds_weight > 0:
            distance = vsd.csds_loss(self.pulled(xh, "csds", logs), self.teacher_s_prediction(xh, clips))
            loss = loss + config.csds_weight * distance
            logs["csds"] = distance
        if self.fake is not None:
            loss = loss + config.score.weight * self.score_loss(self.pulled(xh, "score", logs), clips)
        return loss, logs | motion_monitors(xh, clips.x)

    def score_loss(self, xh: Tensor, clips: Clips) -> Tensor:
        """Phase I's steps 3 to 5 on the videos of this phase."""
        config = self.config.score
        towards = score.direction(xh, clips, config.times, self.teacher, config.guidance_scale, self.fake)
        return vsd.vsd_loss(xh, towards)

    def teacher_s_prediction(self, xh: Tensor, clips: Clips) -> Tensor:
        """Step 6: f_teacher(sg(xh_t''), t'', c), at a time of its own."""
        with torch.no_grad():
            xh_t, t, _ = clips.noised(xh, self.config.csds_times)
            return wan.predict_x0(self.teacher, xh_t, t, clips.c, self.config.csds_guidance_scale)

    def save(self, out: Path) -> None:
        """The discriminator's head, and the fake model as it is after the last step."""
        student.save_weights(self.head, out / "head.safetensors")
        if self.fake is not None:
            student.save_weights(self.fake, out / "fake_lora.safetensors")
