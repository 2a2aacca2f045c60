"""Phases at tiny size whose operations and memory are counted and held against what is planned for them."""

from dataclasses import replace
from pathlib import Path

from vpae.config import Experiment, Lora
from vpae.experiment import load
from vpae.planning.network import Network, Sequence

ROOT = Path(__file__).parents[1]
SMALL = Network(layers=8, heads=2, head_dim=32, ffn=160, text_dim=16, image_dim=16, freq_dim=16)
FOUR = replace(SMALL, layers=4)  # run whole by a plan, with nothing to extrapolate
RANK = 4
TOKENS = Sequence(5 * 8 * 8, 32, 5)  # of `on_larger_clips`

# What several processes are measured with: name -> (variant, phase, training.accumulate, training.sharding).
SEVERAL = {
    "priming": ("micro", "priming", 1, {}),
    "equilibrium-again": ("micro", "equilibrium", 1, {"activation_checkpointing": True}),
    "equilibrium-whole": ("micro", "equilibrium", 1, {"strategy": "none", "activation_checkpointing": True}),
    "priming-whole-gradients": ("micro", "priming", 2, {"activation_checkpointing": True}),
    "priming-reduced": ("micro", "priming", 2, {"activation_checkpointing": True, "reduce_every_micro_batch": True}),
    "priming-lora": ("lora", "priming", 2, {"activation_checkpointing": True}),
    "priming-context": ("micro", "priming", 1, {"context_parallel": 2}),
    "equilibrium-context": ("micro", "equilibrium", 1, {"context_parallel": 2, "activation_checkpointing": True}),
}


def at_tiny_size(settings: Experiment, phase: str, taps: tuple[int, ...] = (), **training) -> Experiment:
    """An experiment's phase on short, small clips."""
    geometry = settings.geometry.model_copy(update={"frames": 17, "height": 64, "width": 64})
    config = getattr(settings, phase)
    changed = {"training": config.training.model_copy(update=training)}
    if phase == "equilibrium":
        changed["head"] = config.head.model_copy(update={"dim": 32, "heads": 2, "taps": taps or config.head.taps})
    return settings.model_copy(update={"geometry": geometry, phase: config.model_copy(update=changed)})


def variant(name: str, phase: str, accumulate: int = 1, taps: tuple[int, ...] = (3, 5, 7), **sharding) -> Experiment:
    """The micro experiment with small clips: as it is, with a student that is an adapter, or with full copies."""
    settings = load(ROOT / "configs" / "micro.yaml", environment=False).settings
    shared = settings.priming.training.sharding.model_copy(update=sharding)
    settings = at_tiny_size(settings, phase, taps, batch_size=1, accumulate=accumulate, sharding=shared)
    changes = {
        "micro": {},
        "lora": {"student_lora": Lora(rank=RANK, alpha=RANK)},
        "copies": {"fake_form": "copy"} if phase == "priming" else {"backbone": "copy"},
    }[name]
    return settings.model_copy(update={phase: getattr(settings, phase).model_copy(update=changes)})


def on_larger_clips(settings: Experiment) -> Experiment:
    """The same with so many tokens that the tensors which the formulas leave out weigh little."""
    return settings.model_copy(update={"geometry": settings.geometry.model_copy(update={"height": 128, "width": 128})})


def several(name: str) -> tuple[Experiment, str, Network]:
    """Settings, phase and network of a case of `SEVERAL`; where it has many blocks, its plan is extrapolated."""
    kind, phase, accumulate, sharding = SEVERAL[name]
    few = phase == "priming" and kind == "micro"  # adapters, heads and taps weigh too much in a small one
    network, taps = (FOUR, (1, 2, 3)) if few else (SMALL, (3, 5, 7))
    return on_larger_clips(variant(kind, phase, accumulate, taps, **{"strategy": "full", **sharding})), phase, network
