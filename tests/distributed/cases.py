"""What two processes and one are both asked to do: a phase, its settings, and what it ends with."""

import copy
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import WanTransformer3DModel
from torch import Tensor

from conftest import SHIFT, build_batch, build_head, build_transformer, seeded
from vpae.config import Lora, Optimizer, Sharding, Training
from vpae.config.discriminator import R1
from vpae.config.training import Monitor
from vpae.distill import METHODS, equilibrium, priming
from vpae.distill.equilibrium import Equilibrium
from vpae.distill.priming import Priming
from vpae.distill.run import watch_of
from vpae.experiment import load
from vpae.models.adapters import FAKE, STUDENT, SharedBase
from vpae.models.wan import default_taps
from vpae.training.loop import train
from vpae.training.sharding import data_rank, empty_transformer, full_state, spread

CONFIGS = Path(__file__).parents[2] / "configs"
LORA = Lora(rank=4, alpha=4)
# Where processes share a clip, sums are taken in another order. Probes of 0.01, and Adam's whole steps where a gradient
# is nearly zero, would show that on some processors: wider probes and smaller steps do not.
PROBES, SMALL_STEPS = R1(sigma_spatial=0.1), Optimizer(learning_rate=1e-4)


@dataclass(frozen=True)
class Case:
    """A run of a phase; with context parallelism two processes work on one clip, otherwise on one each."""

    phase: str
    settings: dict = field(default_factory=dict)
    sharding: dict = field(default_factory=dict)
    accumulate: int = 1
    steps: int = 2
    precision: str = "no"
    watched: bool = False


CASES = {
    "priming": Case("priming"),
    "equilibrium": Case("equilibrium", watched=True),
    "replicated": Case("equilibrium", sharding={"strategy": "none"}),
    "priming-again": Case("priming", {"student_lora": LORA}, {"activation_checkpointing": True}, accumulate=2),
    "equilibrium-again": Case("equilibrium", {}, {"activation_checkpointing": True}, accumulate=2),
    "priming-copy": Case("priming", {"fake_form": "copy"}),
    "equilibrium-copy": Case("equilibrium", {"backbone": "copy"}, {"activation_checkpointing": True}),
    "equilibrium-lora": Case("equilibrium", {"student_lora": LORA}, {"activation_checkpointing": True}),
    "priming-context": Case("priming", {}, {"context_parallel": 2, "activation_checkpointing": True}, watched=True),
    "equilibrium-context": Case(
        "equilibrium",
        {"logits_at_once": True, "r1": PROBES},
        {"context_parallel": 2, "activation_checkpointing": "attention"},
    ),
    "equilibrium-context-lora": Case(
        "equilibrium",
        {
            "student_lora": LORA,
            "score": equilibrium.Score(weight=1.0, fake=SMALL_STEPS),
            "generator": SMALL_STEPS,
            "r1": PROBES,
        },
        {"context_parallel": 2},
    ),
    "equilibrium-context-copy": Case("equilibrium", {"backbone": "copy"}, {"context_parallel": 2}),
    "priming-bf16": Case("priming", precision="bf16"),
    "equilibrium-bf16": Case("equilibrium", precision="bf16"),
    "consistency": Case("consistency", {"student_lora": LORA}),
    "dmd2": Case("dmd2"),
    "dmd2-lora": Case(
        "dmd2", {"fake_form": "lora", "real_share": 0.5}, {"activation_checkpointing": True}, accumulate=2
    ),
    "dmd2-context": Case("dmd2", {"generator": SMALL_STEPS, "fake": SMALL_STEPS}, {"context_parallel": 2}),
    "apt": Case("apt", {"ensemble": 2}, {"activation_checkpointing": True}),
    "magic": Case("magic", {"student_lora": LORA}, {"activation_checkpointing": True}),
}
EXPORTED = ("equilibrium", "equilibrium-lora")  # of these, each process's pipeline folder is looked at, too


def accelerator_for(precision: str) -> Accelerator:
    """accelerate keeps one precision for all of a process, unless told to forget it."""
    AcceleratorState._reset_state()
    return Accelerator(cpu=True, mixed_precision=precision)


def build(case: Case, accelerator: Accelerator, **training):
    """The phase of a case, spread over the processes there are; only the first one starts with weights."""
    first, alone = accelerator.process_index == 0, accelerator.num_processes == 1
    sharding = Sharding(**{"strategy": "full", **case.sharding})
    clips = max(1, accelerator.num_processes // (1 if alone else sharding.context_parallel))
    per_step = case.accumulate * max(1, 2 // sharding.context_parallel) // clips
    settings = {
        "training": Training(
            steps=case.steps,
            accumulate=per_step,
            ema_decay=0.5,
            mixed_precision=case.precision,
            sharding=Sharding() if alone else sharding,
            monitor=Monitor(every=1, clips=2, videos=2, stop=False) if case.watched else Monitor(),
            **training,
        ),
        "generator": Optimizer(learning_rate=1e-3),
        **case.settings,
    }

    def network(seed: int, trained: bool = True) -> WanTransformer3DModel:
        whole = build_transformer(seed)
        if case.precision == "bf16" and not trained:
            whole = halved(whole)
        return whole if first or sharding.strategy == "none" else empty_transformer(dict(whole.config))

    with torch.random.fork_rng():
        torch.manual_seed(5)
        if case.phase == "priming":
            config = priming.Settings(
                fake=Optimizer(learning_rate=1e-3),
                fake_lora=LORA,
                fake_steps_per_generator_step=2,
                guidance_scale=3.0,
                **settings,
            )
            shared = SharedBase(network(0, trained=False))
            lora = config.fake_form == "lora"
            fake = shared.add(FAKE, config.fake_lora) if lora else copy.deepcopy(shared.transformer).float()
            generator = network(0) if config.student_lora is None else shared.add(STUDENT, config.student_lora)
            fake.requires_grad_(True)
            phase = Priming(config, SHIFT, generator, shared.network(None), fake)
        elif case.phase != "equilibrium":
            whole = load(CONFIGS / "micro-rivals.yaml", [f"methods.{case.phase}=teacher"]).settings
            section = getattr(whole, case.phase)
            config = type(section).model_validate({**dict(section), **settings})
            stored = SimpleNamespace(device=accelerator.device, transformer=lambda model, trained: network(0, trained))
            phase = METHODS[case.phase].build(whole.model_copy(update={case.phase: config}), stored)
        else:
            config = equilibrium.Settings(discriminator=Optimizer(learning_rate=1e-3), **settings)
            generator, teacher, fake = network(1), network(0, trained=False), None
            if config.student_lora is not None:
                shared = SharedBase(teacher)
                generator, teacher = shared.add(STUDENT, config.student_lora), shared.network(None)
                fake = shared.add(FAKE, LORA) if config.score.weight else None
            backbone = network(0) if config.backbone == "copy" else None
            phase = Equilibrium(config, SHIFT, generator, teacher, build_head(), default_taps(4), fake, backbone)
    spread(phase, config.training, accelerator)
    return phase


def halved(network: WanTransformer3DModel) -> WanTransformer3DModel:
    """As a frozen network is loaded under bf16: all but norms and modulation in that format."""
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        return WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


def fit(phase, folder: Path, accelerator: Accelerator, steps: int | None = None) -> Path:
    """Train on random clips, which follow from their places among all micro-batches."""
    training = phase.config.training.model_copy(update={"steps": steps} if steps else {})
    rank, ranks = data_rank(training.sharding, accelerator)
    watch = watch_of(phase, HeldOut(), 0, accelerator)
    return train(
        phase, lambda drawn: build_batch(1, seed=drawn * ranks + rank), training, 0, folder, accelerator, watch
    )


class HeldOut:
    """Clips to watch, where a stage has stored ones."""

    def __len__(self) -> int:
        return 2

    def batch(self, numbers: list[int], _device):
        """Latents and condition."""
        return build_batch(len(numbers), seed=900 + numbers[0])


def result(phase) -> dict[str, Tensor]:
    """All weights of a phase, whole, in the first process."""
    found = {f"ema.{name}": value for name, value in full_state(phase.ema).items()}
    for role, owner in phase.roles.items():
        found |= {f"{role}.{name}": value for name, value in full_state(owner.module).items()}
    for name, network in phase.networks.items():
        found |= {f"network.{name}.{key}": value for key, value in full_state(network).items()}
    return {name: value.clone().contiguous() for name, value in found.items()}


def losses(metrics: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def reference(name: str) -> WanTransformer3DModel:
    """A network before any training, by its name in `phase.networks`."""
    return seeded(0, lambda: build_transformer(1 if name == "generator" else 0))
