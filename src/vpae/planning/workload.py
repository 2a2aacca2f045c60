"""What a step of each phase consists of: which networks run forward, and through which a backward pass goes.

This is `vpae.distill` read as arithmetic; `tests/test_plan.py` counts the operations of the real phases.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vpae.config import Experiment, Lora
from vpae.distill.equilibrium import Settings as Equilibrium
from vpae.distill.priming import Settings as Priming
from vpae.models.wan import default_taps
from vpae.planning.counting import (
    Flops,
    Gradient,
    Sequence,
    adapter_flops,
    head_flops,
    transformer_flops,
)
from vpae.planning.network import Network

PHASES = ("priming", "equilibrium")


@dataclass(frozen=True)
class Pass:
    """Forward passes of one role, and what their backward pass is for."""

    role: str
    forwards: int = 1
    gradient: Gradient = "none"


@dataclass(frozen=True)
class Turn:
    """One update of one role: its passes in order; the backward pass goes through them in reverse."""

    role: str
    passes: tuple[Pass, ...]
    per_step: int = 1
    once: int = 0  # further repetitions in the first step


def turns_of(settings: Experiment, phase: str) -> tuple[Turn, ...]:
    """The turns of one step of a phase."""
    return {"priming": _priming, "equilibrium": _equilibrium}[phase](getattr(settings, phase))


def _priming(config: Priming) -> tuple[Turn, ...]:
    student, fake = _student(config.student_lora), "adapter" if config.fake_form == "lora" else "weights"
    return (
        Turn("fake", (Pass("generator"), Pass("fake", gradient=fake)), config.fake_steps_per_generator_step),
        Turn(
            "generator",
            (Pass("generator", gradient=student), Pass("teacher", _guided(config.guidance_scale)), Pass("fake")),
        ),
    )


def _equilibrium(config: Equilibrium) -> tuple[Turn, ...]:
    student = _student(config.student_lora)
    trained: Gradient = "weights" if config.backbone == "copy" else "none"
    # Four logits: real, generated, and the two probes of the regularisation.
    discriminator = (Pass("generator"), *4 * (Pass("backbone", 1, trained), Pass("head", 1, "weights")))
    # In the generator's turn the discriminator passes gradients on, and gets none itself.
    adversary = (Pass("backbone", 1, "input"), Pass("head", 1, "input")) if config.adversarial_weight > 0 else ()
    return (
        Turn(
            "head",
            discriminator,
            config.discriminator_steps_per_generator_step,
            config.discriminator_warmup_steps,
        ),
        Turn(
            "generator",
            (Pass("generator", 1, student), Pass("teacher", _guided(config.csds_guidance_scale)), *adversary),
        ),
    )


def _student(lora: Lora | None) -> Gradient:
    return "weights" if lora is None else "adapter"


def _guided(scale: float) -> int:
    """Guidance needs the teacher twice."""
    return 1 if scale == 1.0 else 2


def adapter_of(settings: Experiment, phase: str, role: str) -> Lora | None:
    """The adapter with which a role runs, if it does."""
    config = getattr(settings, phase)
    if role in ("generator", "ema"):
        return config.student_lora
    if role == "backbone" and config.backbone == "ema":
        return config.student_lora
    if role == "fake" and config.fake_form == "lora":
        return config.fake_lora
    return None


@dataclass(frozen=True)
class StepFlops:
    """Operations of one step over one clip.

    Attributes:
        model: what the passes themselves need (the usual count for "model FLOP utilisation").
        recomputed: what activation checkpointing computes a second time.
    """

    model: float
    recomputed: float

    @property
    def executed(self) -> float:
        """All operations."""
        return self.model + self.recomputed


def turn_flops(settings: Experiment, phase: str, turn: Turn, network: Network, tokens: Sequence) -> StepFlops:
    """Operations of one turn over one clip."""
    config = getattr(settings, phase)
    model = recomputed = 0.0
    for run in turn.passes:
        if run.role == "head":
            taps = len(config.head.taps or default_taps(network.layers))
            forward = head_flops(config.head, network, tokens, taps)
        else:
            forward = transformer_flops(network, tokens)
        lora = None if run.role == "head" else adapter_of(settings, phase, run.role)
        added = adapter_flops(network, tokens, lora) if lora else Flops(0.0, 0.0, 0.0, 0.0)
        # An adapter that is trained has the gradients of its weights besides.
        added_backward = added.backward("weights" if run.gradient == "adapter" else run.gradient)
        model += run.forwards * (
            forward.forward + added.forward + forward.backward(run.gradient) + (added_backward if lora else 0.0)
        )
        if run.gradient != "none" and run.role != "head" and config.training.sharding.activation_checkpointing:
            again = forward.linear + forward.attention + forward.cross + added.forward
            if run.gradient == "input":
                # Running a block again ends with the last tensor that is needed: before feed-forward's second layer.
                again -= 2.0 * network.layers * tokens.video * network.width * network.ffn
            recomputed += run.forwards * again
    return StepFlops(model, recomputed)


def step_flops(settings: Experiment, phase: str, network: Network, tokens: Sequence) -> StepFlops:
    """Operations of one step over one clip, without what the first step does besides."""
    return _sum(settings, phase, network, tokens, lambda turn: turn.per_step)


def warmup_flops(settings: Experiment, phase: str, network: Network, tokens: Sequence) -> StepFlops:
    """Operations that the first step does besides, over one clip."""
    return _sum(settings, phase, network, tokens, lambda turn: turn.once)


def _sum(settings: Experiment, phase: str, network: Network, tokens: Sequence, times: Callable[[Turn], int]):
    found = [(turn_flops(settings, phase, turn, network, tokens), times(turn)) for turn in turns_of(settings, phase)]
    return StepFlops(sum(f.model * n for f, n in found), sum(f.recomputed * n for f, n in found))
