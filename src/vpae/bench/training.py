"""What a training step of each phase takes: seconds, tokens per second, utilisation, memory; and two comparisons.

The phases are the real ones, on networks of the teacher's shape with random weights: neither teacher nor latents need
be there. One process; what several do together is for `vpae plan`.
"""

from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from diffusers import WanTransformer3DModel
from pydantic import ValidationError

from vpae.bench.measure import free_memory, held_bytes, if_it_fits, matmul_peak, peak_of, seconds_of
from vpae.bench.networks import random_condition, random_latents, random_transformer
from vpae.config import Experiment
from vpae.distill import METHODS
from vpae.distill.method import Method
from vpae.models.adapters import STUDENT
from vpae.planning.counting import Sequence
from vpae.planning.footprint import footprint, with_switches
from vpae.planning.network import Network
from vpae.planning.workload import turn_flops, turns_of
from vpae.training.compiled import compile_blocks, run_eagerly
from vpae.training.ema import update_ema
from vpae.training.randomness import generator_for
from vpae.training.sharding import clip_gradients, run_again


@dataclass
class Workbench:
    """One phase on one device, and a batch of random latents for it."""

    settings: Experiment
    phase: Method
    network: Network
    tokens: Sequence
    device: torch.device

    def __post_init__(self) -> None:
        self.training = getattr(self.settings, self.phase.name).training
        size = self.training.batch_size
        condition = random_condition(self.settings, self.network, self.tokens, size, self.device)
        self.batch = random_latents(self.settings, size, self.device), condition
        if self.training.sharding.activation_checkpointing:
            for network in self.phase.networks.values():
                network.enable_gradient_checkpointing(run_again)
        self.compile(self.training.compile)

    def compile(self, wanted: bool, backend: str = "inductor") -> None:
        """Have the networks' blocks compiled, or not."""
        for network in self.phase.networks.values():
            if wanted:
                compile_blocks(network, backend)
            else:
                run_eagerly(network)

    def update(self, turn: str) -> None:
        """One optimiser step of one role, as the training loop makes it, of one micro-batch."""
        role = self.phase.roles[turn]
        for name, other in self.phase.roles.items():
            other.require_gradients(name == turn)
        rng = generator_for(self.device, self.settings.seed, "bench", turn)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.mixed_precision == "bf16"):
            loss, _ = self.phase.loss(turn, self.batch, rng, 0)
        loss.backward()
        clip_gradients(role.parameters(), role.settings.max_grad_norm)
        role.optimizer.step()
        for other in self.phase.roles.values():
            other.optimizer.zero_grad(set_to_none=True)
            other.require_gradients(True)
        if turn == self.phase.main:
            update_ema(self.phase.ema, role.module, self.training.ema_decay)


def held_by(phase: Method) -> int:
    """Bytes of all networks and optimisers of a phase in this process."""
    modules = [phase.ema, *phase.networks.values(), *(role.module for role in phase.roles.values())]
    return held_bytes(modules, [role.optimizer for role in phase.roles.values()])


@dataclass
class RandomNetworks:
    """Networks of the teacher's shape with random weights, for any method."""

    network: Network
    device: torch.device
    frozen: torch.dtype

    def transformer(self, model: str, trained: bool) -> WanTransformer3DModel:
        """One of any model: they all have one shape."""
        return random_transformer(self.network, self.device, torch.float32 if trained else self.frozen)

    def adapter(self, model: str, name: str = STUDENT) -> dict[str, torch.Tensor]:
        """None: a new adapter's weights are as good."""
        return {}


def build_phase(settings: Experiment, name: str, network: Network, device: torch.device) -> Method:
    """A phase of the real class on networks with random weights."""
    bf16 = getattr(settings, name).training.mixed_precision == "bf16"
    frozen = torch.bfloat16 if bf16 else torch.float32
    return METHODS[name].build(settings, RandomNetworks(network, device, frozen))


def measure_phase(
    settings: Experiment, name: str, network: Network, tokens: Sequence, device: torch.device, repeats: int
) -> dict:
    """Seconds and memory of each turn of a phase, and of a whole step made of them."""
    if reason := _too_large(settings, name, network, tokens, device):
        return {"skipped": reason}
    found = if_it_fits(lambda: _measure(settings, name, network, tokens, device, repeats), device)
    free_memory(device)
    return found


def _measure(settings, name, network, tokens, device, repeats) -> dict:
    bench = Workbench(settings, build_phase(settings, name, network, device), network, tokens, device)
    training = bench.training
    peak_rate = matmul_peak(device, torch.bfloat16 if training.mixed_precision == "bf16" else torch.float32)
    turns = {}
    for turn in turns_of(settings, name):
        bench.update(turn.role)  # makes the optimiser's state, and warms up
        runs = [seconds_of(partial(bench.update, turn.role), device) for _ in range(repeats)]
        flops = training.batch_size * turn_flops(settings, name, turn, network, tokens).model
        turns[turn.role] = {
            "per_step": turn.per_step,
            "seconds": median(runs),
            "model_flops": flops,
            "utilisation": flops / median(runs) / peak_rate,
        }
    held = held_by(bench.phase)
    for role, row in turns.items():
        row["peak_bytes"] = peak_of(partial(bench.update, role), device, held)
    seconds = sum(row["per_step"] * row["seconds"] for row in turns.values())
    flops = sum(row["per_step"] * row["model_flops"] for row in turns.values())
    planned = footprint(_alone(settings, name), name, network, tokens, 1, fused_norm=device.type == "cuda").total
    return {
        "turns": turns,
        "batch_size": training.batch_size,
        "seconds_per_step": seconds,
        "tokens_per_second": training.batch_size * tokens.video / seconds,
        "model_flops_per_step": flops,
        "utilisation": flops / seconds / peak_rate,
        "matmul_flops_per_second": peak_rate,
        "held_bytes": held,
        "peak_bytes": max(row["peak_bytes"] for row in turns.values()),
        "planned_bytes": planned,
    }


def _alone(settings: Experiment, name: str) -> Experiment:
    """The settings with which a phase is measured: without accumulation, of which every micro-batch takes the same."""
    return with_switches(settings, name, {"accumulate": 1})


def _too_large(settings: Experiment, name: str, network: Network, tokens: Sequence, device: torch.device) -> str:
    """Why a phase is not measured on this GPU; empty if it is."""
    if device.type != "cuda":
        return ""
    needed = footprint(_alone(settings, name), name, network, tokens, 1).total
    there = torch.cuda.get_device_properties(device).total_memory
    if needed <= there:
        return ""
    return f"needs about {needed / 1e9:.0f} GB, and the GPU has {there / 1e9:.0f} GB; see `vpae plan`"


def compare_discriminators(
    settings: Experiment, network: Network, tokens: Sequence, device: torch.device, repeats: int
) -> dict:
    """Equilibrium with the generator's EMA as the discriminator's backbone, against a fully trained copy."""
    return _compare(settings, "equilibrium", "backbone", ("ema", "copy"), network, tokens, device, repeats)


def compare_fakes(settings: Experiment, network: Network, tokens: Sequence, device: torch.device, repeats: int) -> dict:
    """Priming with the fake model as an adapter on the teacher's weights, against a full copy of it."""
    return _compare(settings, "priming", "fake_form", ("lora", "copy"), network, tokens, device, repeats)


def _compare(settings, name, key, values, network, tokens, device, repeats) -> dict:
    """Both or neither: on a rented GPU, one of the two alone would be minutes for nothing."""
    variants, reasons = {}, {}
    for value in values:
        section = getattr(settings, name)
        variants[value] = settings.model_copy(update={name: section.model_copy(update={key: value})})
        try:
            type(section).model_validate({**section.model_dump(), key: value})
            reasons[value] = _too_large(variants[value], name, network, tokens, device)
        except ValidationError as error:
            reasons[value] = error.errors()[0]["msg"].removeprefix("Value error, ")
    if any(reasons.values()):
        other = "the other cannot be measured"
        return {"setting": f"{name}.{key}", **{v: {"skipped": reason or other} for v, reason in reasons.items()}}
    found = {value: measure_phase(variants[value], name, network, tokens, device, repeats) for value in values}
    ours, other = (found[value] for value in values)
    if not any("skipped" in row for row in found.values()):
        found["ratio"] = {what: other[what] / ours[what] for what in ("seconds_per_step", "held_bytes", "peak_bytes")}
    return {"setting": f"{name}.{key}", **found}
