"""What a method of distillation is: a phase with a section of settings, a place in a chain, and curves for the report.

A method's file is read wherever an experiment is, so it imports torch and networks lazily (`vpae.lazy`).
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from vpae.config.section import Section
from vpae.config.training import Lora, Optimizer, Times, Training
from vpae.lazy import lazy
from vpae.training.phase import Phase

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vpae.config import Experiment
    from vpae.distill.networks import Networks
    from vpae.models.adapters import SharedBase
    from vpae.models.wan import Condition
else:
    torch = lazy("torch")

adapters, ema, flow = lazy("vpae.models.adapters"), lazy("vpae.training.ema"), lazy("vpae.flow")
loop, randomness = lazy("vpae.training.loop"), lazy("vpae.randomness")
sharding, stored, wan = lazy("vpae.training.sharding"), lazy("vpae.distill.networks"), lazy("vpae.models.wan")

TEACHER = "teacher"  # what a chain of methods begins with


class MethodSettings(Section):
    """What the section of every method has."""

    training: Training = Field(Training(), description="Its run of the training loop.")
    generator: Optimizer = Field(Optimizer(), description="Of the generator.")
    student_lora: Lora | None = Field(
        None, description="Train the generator as an adapter on the teacher's own weights; empty: all its weights."
    )
    few_step_shift: float | None = Field(
        None,
        gt=0,
        description="Timestep shift of the student's sampler, which sets the times of its steps after the first; below "
        "1 these refine a video instead of deciding it anew; empty: teacher.shift [choice].",
    )

    def later_shift(self, shift: float) -> float:
        """`few_step_shift`, or the teacher's."""
        return shift if self.few_step_shift is None else self.few_step_shift


@dataclass(frozen=True)
class Panel:
    """One diagram: what it shows (key in metrics.jsonl -> label) and a value to compare with, and what that means."""

    title: str
    curves: dict[str, str]
    reference: float | None = None
    meaning: str = ""


MOTION = Panel("Motion, generated / real", {"motion_ratio": ""}, 1.0, "1: as much as real")


@dataclass(frozen=True)
class Clips:
    """The real clips of a micro-batch, and what is drawn at random for them.

    Attributes:
        x: latents (B, 16, F, H, W).
        c: their condition.
        rng: source of all randomness of this micro-batch; the order of the draws is part of a method.
        shift: timestep shift.
        later_shift: that of the student's sampler.
        progress: how much of the run is done, in [0, 1].
    """

    x: Tensor
    c: Condition
    rng: torch.Generator
    shift: float
    later_shift: float
    progress: float

    def noise(self) -> Tensor:
        """Gaussian noise like x, float32."""
        return torch.randn(self.x.shape, generator=self.rng, device=self.x.device)

    def times(self, times: Times) -> Tensor:
        """A time t (B,) for each clip, see `flow.sample_times`."""
        return flow.sample_times(times, self.shift, self.progress, len(self.x), self.rng)

    def sometimes_later(self, t_B: Tensor, share: float, steps: int) -> Tensor:
        """t, but for a share of the clips a time at which a sampler of so many steps goes on: not 1, not 0."""
        if share == 0:
            return t_B
        later = flow.schedule(steps, self.later_shift, t_B.device)[1:-1].to(t_B.dtype)
        chosen = later[torch.randint(len(later), t_B.shape, generator=self.rng, device=t_B.device)]
        return torch.where(torch.rand(t_B.shape, generator=self.rng, device=t_B.device) < share, chosen, t_B)

    def ones(self) -> Tensor:
        """t = 1 (B,), pure noise."""
        return torch.ones(len(self.x), device=self.x.device)

    def noised(self, x: Tensor, times: Times) -> tuple[Tensor, Tensor, Tensor]:
        """x_t at a drawn time, the time t (B,), and the noise, which is drawn after it."""
        t, noise = self.times(times), self.noise()
        return flow.add_noise(x, noise, t), t, noise


Loss = tuple["Tensor", dict[str, "Tensor"]]  # of one micro-batch, and named values to log


class Method(Phase):
    """Distils a generator; a subclass and the settings beside it are all there is to a method.

    The turn NAME is computed by the method `NAME_loss(clips)` of the subclass. The subclass's initialiser fills `roles`
    and calls `hold`.

    Attributes:
        name: of the method, its section, stage, folder and command.
        title: heading in the report.
        label: what its student is called in tables.
        about: what it does, to follow "by" in a sentence of the model card.
        caption: how to read its curves.
        panels: its curves.
        row, steps: where an experiment names no rows of its own, its tables have ROW-Nnfe for each number of steps N;
            an empty row stands for the method's name.
        compared: a part of `vpae bench`, and the setting and two values of it that it compares; of this class alone.
        leaves: the roles whose weights `save` writes beside the student.
        Settings: its section.
    """

    title: ClassVar[str]
    label: ClassVar[str]
    about: ClassVar[str]
    caption: ClassVar[str] = ""
    panels: ClassVar[tuple[Panel, ...]] = (Panel("Generator's loss", {"generator_loss": ""}), MOTION)
    row: ClassVar[str] = ""
    steps: ClassVar[tuple[int, ...]] = (1,)
    compared: ClassVar[tuple[str, str, tuple[str, str]] | None] = None
    leaves: ClassVar[tuple[str, ...]] = ()
    Settings: ClassVar[type[MethodSettings]]
    main = "generator"

    def __init__(self, config: MethodSettings, shift: float, generator: nn.Module):
        self.config, self.shift, self.generator = config, shift, generator
        self.ema = ema.make_ema(generator)

    def hold(self, **others: nn.Module) -> None:
        """Say which networks there are beside generator and EMA; adapted ones count as the one base they share."""
        self.networks = stored.networks_of(generator=self.generator, ema=self.ema, **others)

    @classmethod
    @abstractmethod
    def build(cls, settings: Experiment, networks: Networks) -> Method:
        """The phase at its start.

        Args:
            settings: the experiment.
            networks: where its networks come from.
        """

    def loss(self, turn: str, batch: tuple[Tensor, Condition], rng: torch.Generator, step: int) -> Loss:
        """The loss of one turn on latents x (B, 16, F, H, W) and their condition."""
        x, c = batch
        progress = loop.progress_at(step, self.config.training)
        clips = Clips(x, c, rng, self.shift, self.config.later_shift(self.shift), progress)
        return getattr(self, f"{turn}_loss")(clips)

    def generate(self, clips: Clips) -> Tensor:
        """xh = f_theta(eps, 1, c), one step from pure noise (step 1 of Phase II)."""
        return wan.predict_x0(self.generator, clips.noise(), clips.ones(), clips.c)

    def pulled(self, xh: Tensor, name: str, logs: dict[str, Tensor]) -> Tensor:
        """xh for one term of a loss; the norm of that term's gradient at xh is logged as `pull_NAME` once it is known.

        It is that of the micro-batch alone, so that it does not depend on how many are accumulated.
        """
        if not xh.requires_grad:
            return xh
        view, norm, micro_batches = xh.view_as(xh), torch.zeros((), device=xh.device), self.config.training.accumulate

        def note(gradient: Tensor) -> None:
            norm.copy_(micro_batches * sharding.norm_at_video(self.generator, gradient))

        view.register_hook(note)
        logs[f"pull_{name}"] = norm
        return view

    def save(self, out: Path) -> None:
        """Write what the method leaves beside the student; every process calls it, see `student.save_weights`."""

    @classmethod
    def start_of(cls, settings: Experiment) -> str:
        """What the generator starts as: the teacher, or another method's student."""
        return settings.methods.get(cls.name, TEACHER)

    @classmethod
    def described(cls, section: Mapping[str, Any]) -> str:
        """`about`, as far as the plain values of its section leave it true."""
        return cls.about

    @classmethod
    def as_published(cls, settings: Experiment) -> bool:
        """Whether a paper's figure of the method can stand beside that of these settings."""
        return True

    @classmethod
    def fake_left(cls, settings: Experiment) -> Lora | None:
        """The adapter of the fake model that it leaves to a method that starts from it; none where it leaves none."""
        return None

    @classmethod
    def fake_at_start(cls, settings: Experiment) -> Lora | None:
        """The adapter of the fake model that the method it starts from leaves."""
        from vpae.distill import METHODS

        start = cls.start_of(settings)
        return METHODS[start].fake_left(settings) if start in METHODS else None

    @classmethod
    def take_over(cls, fake: nn.Module, lora: Lora | None, settings: Experiment, networks: Networks) -> None:
        """Let a fake model go on from that of the start, which knows the student already; or say that it cannot.

        Args:
            fake: the fake model as it begins.
            lora: its adapter; none of a whole copy.
            settings: the experiment.
            networks: has the adapter that the start leaves.
        """
        start, left = cls.start_of(settings), cls.fake_at_start(settings)
        copied = getattr(getattr(settings, start, None), "fake_form", "") == "copy"
        if lora is not None and lora == left:
            fake.start_from(networks.adapter(start, adapters.FAKE))
        elif copied or left is not None:
            whole = f"it is a whole copy; set {start}.fake_form=lora"
            why = whole if copied else "only adapters of equal fake_lora are"
            print(
                f"vpae: {cls.name}: the fake model that {start} leaves is not taken over ({why}): it begins as the "
                "teacher and has to catch up with the student",
                file=sys.stderr,
            )

    @classmethod
    def generator_at_start(cls, settings: Experiment, networks: Networks, shared: SharedBase) -> nn.Module:
        """The generator: whole, or an adapter on the teacher's weights; with the weights of what it starts from."""
        lora, start = getattr(settings, cls.name).student_lora, cls.start_of(settings)
        if lora is None:
            return networks.transformer(start, trained=True)
        generator = shared.add(adapters.STUDENT, lora)
        if start != TEACHER:
            generator.start_from(networks.adapter(start))
        return generator

    @classmethod
    @contextmanager
    def seeded(cls, settings: Experiment, what: str) -> Iterator[None]:
        """Weights that are drawn inside the block follow from the experiment's seed, the method and `what`."""
        with torch.random.fork_rng():
            torch.manual_seed(randomness.derived_seed(settings.seed, cls.name, what))
            yield


def judged(head: nn.Module, network: nn.Module, layers_BND: list[Tensor], c: Condition) -> Tensor:
    """A head's logits (B,) of a network's tapped layers, of which processes that share clips have a part each.

    Logits are compared with those of tiny perturbations, so that no autocast may round them.
    """
    layers_BND = sharding.whole_sequence(network, layers_BND)
    with torch.autocast(c.text_BLD.device.type, enabled=False):
        return head(layers_BND, c)


def motion_monitors(xh_BCFHW: Tensor, x_BCFHW: Tensor) -> dict[str, Tensor]:
    """Early signs of collapse: movement and mean of generated latents relative to real ones (1 and 0 are healthy)."""
    with torch.no_grad():
        moves, real_moves = (v.diff(dim=2).abs().mean() for v in (xh_BCFHW, x_BCFHW))
        drift = (xh_BCFHW.mean(dim=(0, 2, 3, 4)) - x_BCFHW.mean(dim=(0, 2, 3, 4))).abs().mean()
        return {"motion_ratio": moves / real_moves.clamp_min(1e-8), "colour_drift": drift}
