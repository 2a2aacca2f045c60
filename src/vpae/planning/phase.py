"""What the updates of a training phase take, by running them: the phase's own losses, networks and optimisers.

Everything runs on fake tensors, which have shapes and no memory, in the only process that there really is of a job of
as many as wanted. Networks of a few blocks are run, and the figures extrapolated: they are linear in the number of
blocks before the last one whose features are taken, and in that after it.
"""

import warnings
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from vpae.bench.networks import build_phase, random_condition, random_latents
from vpae.config import Experiment, Section
from vpae.models.heads import taps_of
from vpae.planning.meter import Meter, in_backward, stored_bytes
from vpae.planning.network import Network, Sequence, count, fill
from vpae.training.loop import update
from vpae.training.precision import autocast_caches
from vpae.training.sharding import spread

FEWEST = 3  # blocks before the last features, so that one is neither the first nor the last
Figures = dict[Hashable, float]


@dataclass(frozen=True)
class Turn:
    """One update of one role in this process.

    Attributes:
        count: how often it is made in the whole run.
        model: operations, without what activation checkpointing computes again.
        recomputed: operations of that.
        received: bytes from other processes.
        peak: most bytes at once, with all that the phase holds.
    """

    count: int
    model: float
    recomputed: float
    received: float
    peak: float

    @property
    def executed(self) -> float:
        """All operations."""
        return self.model + self.recomputed


@dataclass(frozen=True)
class Execution:
    """A phase in this process: parameters by role, bytes by kind that it always holds, and its turns."""

    parameters: dict[str, int]
    held: dict[str, float]
    turns: dict[str, Turn]

    @property
    def peak(self) -> float:
        """Most bytes at once."""
        return max(turn.peak for turn in self.turns.values())


@dataclass(frozen=True)
class Process:
    """The first process of a job, as training asks accelerate for it."""

    num_processes: int
    mixed_precision: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    process_index: int = 0
    is_main_process: bool = True
    caches: bool = True

    def autocast(self) -> torch.autocast:
        """Of forward passes."""
        bf16 = self.mixed_precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16, cache_enabled=self.caches)

    def reduce(self, tensor: Tensor, _how: str) -> Tensor:
        """Over all processes."""
        dist.all_reduce(tensor)
        return tensor


def execute(
    settings: Experiment, name: str, network: Network, tokens: Sequence, processes: int, gpu: bool = True
) -> Execution:
    """Figures of a phase in each of so many processes.

    Args:
        settings: the experiment.
        name: the phase.
        network: shape of its transformers.
        tokens: of one clip.
        processes: how many there are.
        gpu: whether optimisers move all weights at once, as they do on GPUs, where torch has room for it.
    """
    taps = _taps(getattr(settings, name), network.layers)
    last = max(taps) + 1 if taps else network.layers
    before, after = max(FEWEST, len(taps)), network.layers - last

    def figures(before: int, after: int) -> Figures:
        tapped = tuple(range(before - len(taps), before))
        section = _with_taps(getattr(settings, name), tapped)
        shallow = replace(network, layers=before + after)
        return _figures(settings.model_copy(update={name: section}), name, shallow, tokens, processes, gpu)

    few = min(after, 1)
    if last <= before + 1 and after <= 2:
        found = _figures(settings, name, network, tokens, processes, gpu)
    else:
        found = start = figures(before, few)
        found = _along(found, start, figures(before + 1, few), last - before)
        if after > 1:
            found = _along(found, start, figures(before, few + 1), after - few)
    return _gather(found, getattr(settings, name).training.accumulate)


def _along(found: Figures, start: Figures, next_: Figures, blocks: int) -> Figures:
    """Add what so many further blocks add, of which one makes the difference between two runs."""
    if start.keys() != next_.keys():
        raise RuntimeError(f"another block changes what runs: {start.keys() ^ next_.keys()}")
    return {key: found[key] + blocks * (next_[key] - start[key]) for key in found}


def _taps(section: Section, layers: int) -> tuple[int, ...]:
    """The blocks whose features a phase's head takes; none if it has no head."""
    head = getattr(section, "head", None)
    return () if head is None else taps_of(head.taps, layers)


def _with_taps(section: Section, taps: tuple[int, ...]) -> Section:
    head = getattr(section, "head", None)
    return section if head is None else section.model_copy(update={"head": head.model_copy(update={"taps": taps})})


def _gather(found: Figures, accumulate: int) -> Execution:
    turns = {}
    for name in [key[1] for key in found if key[0] == "count"]:
        # The first micro-batch, and the last: the others are like the first.
        parts = {
            what: (accumulate - 1) * found.get((what, name, 0), 0.0) + found[what, name, "last"]
            for what in ("model", "recomputed", "received")
        }
        peak = max(value for key, value in found.items() if key[:2] == ("peak", name))
        turns[name] = Turn(count=int(found["count", name]), peak=peak, **parts)
    kinds = {kind: {key[1]: v for key, v in found.items() if key[0] == kind} for kind in ("parameters", "held")}
    return Execution({role: int(n) for role, n in kinds["parameters"].items()}, kinds["held"], turns)


def _figures(settings: Experiment, name: str, network: Network, tokens: Sequence, processes: int, gpu: bool) -> Figures:
    """Build a phase, spread it, and make one update of each role, in its middle step."""
    training = getattr(settings, name).training.model_copy(update={"compile": False})
    accelerator = Process(processes, training.mixed_precision, caches=autocast_caches(training))
    found: Figures = {}
    with _job(processes), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what one would do better with memory
        with torch.device("meta"):
            phase = build_phase(settings, name, network, torch.device("meta"))
        found |= {("parameters", role): count(module) for role, module in parts_of(phase).items()}
        spread(phase, training, accelerator, empty=True)
        with FakeTensorMode(), Meter() as meter:
            _fill_phase(phase, accelerator.device)
            for role in phase.roles.values():
                _make_state(role.optimizer, gpu)
            found |= {("held", kind): size for kind, size in held(phase).items()}
            condition = random_condition(settings, network, tokens, training.batch_size, accelerator.device)
            batch = random_latents(settings, training.batch_size, accelerator.device), condition
            _label_blocks(phase.networks, meter)
            steps = [Counter(phase.turns(step)) for step in range(training.steps)]
            for turn, times in sum(steps, Counter()).items():
                found |= {("count", turn): times} | _update_of(phase, turn, batch, training, accelerator, meter)
    return found


def _update_of(phase, turn: str, batch: tuple, training, accelerator: Process, meter: Meter) -> Figures:
    """One update of one role, of two micro-batches if there are several."""
    laps: list[Counter] = []
    meter.peaks.clear()

    def batches(_drawn: int) -> tuple:
        laps.append(meter.counts.copy())
        meter.mark((turn, "micro-batch", len(laps)))
        return batch

    training = training.model_copy(update={"accumulate": min(2, training.accumulate)})
    handle = phase.roles[turn].optimizer.register_step_pre_hook(lambda *_: meter.mark((turn, "optimiser")))
    update(phase, turn, 0, batches, 0, training, 0, training.steps // 2, accelerator)
    handle.remove()
    laps.append(meter.counts.copy())
    found: Figures = {("peak", turn, label): size for label, size in meter.peaks.items()}
    meter.mark(None)
    for what in ("model", "recomputed", "received"):
        spans = [after[what] - before[what] for before, after in pairwise(laps)]
        found[what, turn, "last"] = spans[-1]
        if len(spans) > 1:
            found[what, turn, 0] = spans[0]
    return found


@contextmanager
def _job(processes: int) -> Iterator[None]:
    """As the first of so many processes, of which there are no others: what they would send is never looked at."""
    if processes == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


# A phase's memory.


def parts_of(phase) -> dict[str, nn.Module]:
    """What a phase is made of: each role, the EMA, and the whole networks that none of them is."""
    found = {name: role.module for name, role in phase.roles.items()} | {"ema": phase.ema}
    known = {id(module) for part in found.values() for module in part.modules()}
    return found | {name: network for name, network in phase.networks.items() if id(network) not in known}


def _fill_phase(phase, device: torch.device) -> None:
    """`fill` a phase that was just built and spread over processes, and have FSDP and the optimisers take note."""
    fill([*phase.networks.values(), *parts_of(phase).values()], device)
    for network in phase.networks.values():
        for module in network.modules():
            if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group):
                for parameter in group.fsdp_params:
                    parameter.reset_sharded_param()
        if isinstance(network, FSDPModule):
            network._get_fsdp_state()._lazy_init()
    for role in phase.roles.values():
        role.reset_optimizer()


def _make_state(optimizer: torch.optim.Optimizer, at_once: bool) -> None:
    """Have an optimiser make its averages, which it has from its second step on.

    By a step, whose operations torch then knows: the first time it finds out on whole tensors how shards are combined,
    which would count as this process's bytes.
    """
    for group in optimizer.param_groups:
        group["foreach"] = at_once
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def held(phase) -> dict[str, int]:
    """Bytes in this process that are always there: weights, averages of optimisers, EMA."""
    ema = stored_bytes(phase.ema.parameters())
    parts = [*phase.networks.values(), *parts_of(phase).values()]
    weights = [t for part in parts for t in (*part.parameters(), *part.buffers())]
    states = [v for role in phase.roles.values() for s in role.optimizer.state.values() for v in s.values()]
    return {"weights": stored_bytes(weights) - ema, "optimizer": stored_bytes(states), "ema": ema}


def _label_blocks(networks: dict[str, nn.Module], meter: Meter) -> None:
    """Have a meter keep apart the first, the last and the other blocks of every pass, forward and backward.

    The most bytes at once of each of these grow in a straight line with the number of blocks; the most of all do not.
    """
    for name, network in networks.items():
        passes = [0]
        blocks = list(network.blocks)
        for index, block in enumerate(blocks):
            where = "first" if index == 0 else "last" if index == len(blocks) - 1 else "between"
            block.register_forward_pre_hook(partial(_enter, meter, passes, name, where), prepend=True)
            block.register_forward_hook(partial(_leave, meter, passes, name, where))


def _enter(meter: Meter, passes: list[int], name: str, where: str, *_) -> None:
    if not in_backward():
        passes[0] += where == "first"
        meter.mark((name, passes[0], where))


def _leave(meter: Meter, passes: list[int], name: str, where: str, _module, _inputs, output: Tensor) -> None:
    if not in_backward() and output.requires_grad:
        label = (name, passes[0], where, "backward")
        output.register_hook(lambda _gradient: meter.mark(label))
