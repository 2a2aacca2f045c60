"""What a training step of each phase takes: seconds, tokens per second, utilisation, memory; and two comparisons.

The phases and their updates are the real ones, on networks of the teacher's shape with random weights: neither teacher
nor latents need be there. One process; what several do together is for `vpae plan`.
"""

from functools import partial
from statistics import median

import torch
from pydantic import ValidationError

from vpae.bench.measure import free_memory, if_it_fits, matmul_peak, peak_of, seconds_of
from vpae.bench.networks import build_phase, random_condition, random_latents
from vpae.config import Experiment
from vpae.planning.network import Network, Sequence
from vpae.planning.phase import Execution, Process, execute, held
from vpae.planning.remedies import with_switches
from vpae.training.ema import update_ema
from vpae.training.loop import update
from vpae.training.phase import Phase
from vpae.training.precision import autocast_caches
from vpae.training.sharding import compile_blocks, run_eagerly, spread


class Workbench:
    """One phase on one device, and a batch of random latents for it, of which each update is made."""

    def __init__(self, settings: Experiment, name: str, network: Network, tokens: Sequence, device: torch.device):
        self.training = getattr(settings, name).training.model_copy(update={"accumulate": 1})
        self.seed, self.device = settings.seed, device
        self.accelerator = Process(1, self.training.mixed_precision, device, caches=autocast_caches(self.training))
        self.phase = build_phase(settings, name, network, device)
        spread(self.phase, self.training, self.accelerator)
        size = self.training.batch_size
        condition = random_condition(settings, network, tokens, size, device)
        self.batch = random_latents(settings, size, device), condition

    def compile(self, wanted: bool, backend: str = "inductor") -> None:
        """Have the networks' blocks compiled, or not."""
        for network in self.phase.networks.values():
            if wanted:
                compile_blocks(network, backend)
            else:
                run_eagerly(network)

    def update(self, turn: str) -> None:
        """One optimiser step of one role, of one micro-batch, and the EMA's that belongs to it."""
        phase, batches = self.phase, lambda drawn: self.batch
        update(phase, turn, 0, batches, 0, self.training, self.seed, 0, self.accelerator)
        if turn == phase.main:
            update_ema(phase.ema, phase.roles[turn].module, self.training.ema_decay)


def held_by(phase: Phase) -> int:
    """Bytes of all networks and optimisers of a phase in this process."""
    return sum(held(phase).values())


def measure_phase(
    settings: Experiment,
    name: str,
    network: Network,
    tokens: Sequence,
    device: torch.device,
    repeats: int,
    planned: Execution | None = None,
) -> dict:
    """Seconds and memory of each turn of a phase, and of a whole step made of them; `planned` if that is known."""
    settings = alone(settings, name)
    planned = planned or execute(settings, name, network, tokens, 1)
    if reason := _too_large(planned, device):
        return {"skipped": reason}
    found = if_it_fits(lambda: _measure(settings, name, network, tokens, device, repeats, planned), device)
    free_memory(device)
    return found


def _measure(settings, name, network, tokens, device, repeats, planned: Execution) -> dict:
    bench = Workbench(settings, name, network, tokens, device)
    training = bench.training
    peak_rate = matmul_peak(device, torch.bfloat16 if training.mixed_precision == "bf16" else torch.float32)
    turns = {}
    for turn, plan in planned.turns.items():
        bench.update(turn)  # makes the optimiser's state, and warms up
        runs = [seconds_of(partial(bench.update, turn), device) for _ in range(repeats)]
        turns[turn] = {
            "per_step": plan.count / training.steps,
            "seconds": median(runs),
            "model_flops": plan.model,
            "utilisation": plan.model / median(runs) / peak_rate,
            "planned_bytes": plan.peak,
        }
    for turn, row in turns.items():
        row["peak_bytes"] = peak_of(partial(bench.update, turn), device, held_by(bench.phase))
    seconds = sum(row["per_step"] * row["seconds"] for row in turns.values())
    flops = sum(row["per_step"] * row["model_flops"] for row in turns.values())
    return {
        "turns": turns,
        "batch_size": training.batch_size,
        "seconds_per_step": seconds,
        "tokens_per_second": training.batch_size * tokens.video / seconds,
        "model_flops_per_step": flops,
        "utilisation": flops / seconds / peak_rate,
        "matmul_flops_per_second": peak_rate,
        "held_bytes": held_by(bench.phase),
        "peak_bytes": max(row["peak_bytes"] for row in turns.values()),
        "planned_bytes": planned.peak,
    }


def alone(settings: Experiment, name: str) -> Experiment:
    """The settings with which a phase is measured: without accumulation, of which every micro-batch takes the same."""
    return with_switches(settings, name, {"accumulate": 1})


def _too_large(planned: Execution, device: torch.device) -> str:
    """Why a phase is not measured on this GPU; empty if it is."""
    if device.type != "cuda":
        return ""
    there = torch.cuda.get_device_properties(device).total_memory
    if planned.peak <= there:
        return ""
    return f"needs about {planned.peak / 1e9:.0f} GB, and the GPU has {there / 1e9:.0f} GB; see `vpae plan`"


def compare(
    settings: Experiment,
    name: str,
    key: str,
    values: tuple[str, str],
    network: Network,
    tokens: Sequence,
    device: torch.device,
    repeats: int,
) -> dict:
    """A method with two values of a setting: both or neither, since on a rented GPU one alone would be for nothing."""
    variants, planned, reasons = {}, {}, {}
    for value in values:
        section = getattr(settings, name)
        variants[value] = settings.model_copy(update={name: section.model_copy(update={key: value})})
        try:
            type(section).model_validate({**section.model_dump(), key: value})
            planned[value] = execute(alone(variants[value], name), name, network, tokens, 1)
            reasons[value] = _too_large(planned[value], device)
        except ValidationError as error:
            reasons[value] = error.errors()[0]["msg"].removeprefix("Value error, ")
    if any(reasons.values()):
        other = "the other cannot be measured"
        return {"setting": f"{name}.{key}", **{v: {"skipped": reason or other} for v, reason in reasons.items()}}
    measure = partial(measure_phase, name=name, network=network, tokens=tokens, device=device, repeats=repeats)
    found = {value: measure(variants[value], planned=planned[value]) for value in values}
    ours, other = (found[value] for value in values)
    if not any("skipped" in row for row in found.values()):
        found["ratio"] = {what: other[what] / ours[what] for what in ("seconds_per_step", "held_bytes", "peak_bytes")}
    return {"setting": f"{name}.{key}", **found}
