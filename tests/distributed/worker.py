"""One of two processes that talk over gloo: runs all that `test_distributed.py` looks at, and writes it down.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python tests/distributed/worker.py FOLDER PIPELINE
"""

import json
import shutil
import sys
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))


from conftest import SHIFT, build_batch, build_transformer
from distributed.cases import CASES, EXPORTED, Case, accelerator_for, build, fit, result
from planned import SEVERAL, TOKENS, several
from vpae.bench.networks import build_phase, random_condition, random_latents
from vpae.bench.training import held_by
from vpae.distill import run
from vpae.distill.student import save_ema
from vpae.models.wan import velocity
from vpae.planning.meter import LiveBytes
from vpae.training import loop
from vpae.training.ema import update_ema
from vpae.training.precision import INPUTS
from vpae.training.sharding import spread


class Collectives(TorchDispatchMode):
    """Counts what processes say to each other."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does inside comes by here again
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def run_case(name: str, folder: Path, accelerator: Accelerator) -> dict:
    """Train a case; metrics, weights and what each process exports stay in its folder."""
    phase = build(CASES[name], accelerator)
    fit(phase, folder / name, accelerator)
    weights = result(phase)
    if weights:
        save_file(weights, folder / name / "weights.safetensors")
    if name in EXPORTED:
        out = folder / name / f"export-{accelerator.process_index}"
        out.mkdir()
        save_ema(out, Path(sys.argv[2]), phase.ema, SHIFT)
    return {}


def resume(folder: Path, accelerator: Accelerator) -> dict:
    """Stop after a step and go on from the state; the state stays for one process to do the same."""
    for name in ("priming", "equilibrium"):
        state = folder / f"resume-{name}"
        fit(build(Case(name, steps=3), accelerator), state, accelerator, steps=1)
        if accelerator.is_main_process:
            shutil.copytree(state, folder / f"state-{name}")
        phase = build(Case(name, steps=3), accelerator)
        fit(phase, state, accelerator)
        weights = result(phase)
        if weights:
            save_file(weights, state / "weights.safetensors")
    return {}


def grow(folder: Path, accelerator: Accelerator) -> dict:
    """Go on from the state of one process."""
    for name in ("priming", "equilibrium"):
        phase = build(Case(name, steps=3), accelerator)
        fit(phase, folder / f"grow-{name}", accelerator)
        weights = result(phase)
        if weights:
            save_file(weights, folder / f"grow-{name}" / "weights.safetensors")
    return {}


def start(folder: Path, accelerator: Accelerator) -> dict:
    """What each process has after a start in which only the first one had weights."""
    phase = build(Case("priming"), accelerator)
    network, reference = phase.generator, build_transformer(0)
    parameters = list(network.parameters())
    return {
        "processes": run.accelerator_for(phase.config.training).num_processes,
        "tables": all(network.get_buffer(n).equal(b) for n, b in reference.named_buffers()),
        "meta": [n for n, p in network.named_parameters() if p.is_meta],
        "whole": [n for n, p in network.named_parameters() if not isinstance(p, DTensor)],
        "here": sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor)),
        "shared": sum(p.numel() for p in parameters if isinstance(p, DTensor)),
        "followers": [
            n
            for n, p in phase.ema.named_parameters()
            if isinstance(p, DTensor) != isinstance(network.get_parameter(n), DTensor)
        ],
    }


def communication(folder: Path, accelerator: Accelerator) -> dict:
    """How often processes talk, by what they do."""
    phase = build(Case("priming"), accelerator)

    def counted(action) -> dict[str, int]:
        with Collectives() as seen:
            action()
        return dict(seen.counts)

    def update(accumulate: int, **sharding):
        training = phase.config.training.model_copy(
            update={
                "accumulate": accumulate,
                "sharding": phase.config.training.sharding.model_copy(update=sharding),
            }
        )
        return counted(
            lambda: loop.update(
                phase, "generator", 0, lambda drawn: build_batch(1, seed=drawn), 0, training, 0, 0, accelerator
            )
        )

    update(1)
    return {
        "update": update(1),
        "accumulating": update(3),
        "eager": update(3, reduce_every_micro_batch=True),
        "ema": counted(lambda: update_ema(phase.ema, phase.generator, 0.5)),
    }


def precision(folder: Path, accelerator: Accelerator) -> dict:
    """Types of weights while a network runs, and of the shards its optimiser moves."""
    phase = build(Case("priming", precision="bf16"), accelerator)
    seen, masters = {}, sorted({str(p.dtype) for p in phase.generator.parameters()})

    def note(name):
        return lambda module, _: seen.update(
            {f"{name}.{n}": str(p.dtype) for n, p in module.named_parameters(recurse=False)}
        )

    for name, module in phase.generator.named_modules():
        module.register_forward_pre_hook(note(name))
    given: dict[str, str] = {}
    for name in (*INPUTS, "blocks.0"):
        module = phase.generator.get_submodule(name)
        module.register_forward_pre_hook(lambda _, inputs, name=name: given.update({name: str(inputs[0].dtype)}))
    with torch.no_grad(), accelerator.autocast():
        phase.loss("generator", build_batch(1), torch.Generator().manual_seed(0), 0)
    frozen = {n: str(p.dtype) for n, p in phase.networks["base"].named_parameters() if not p.requires_grad}
    adapters = sorted({str(p.dtype) for p in phase.fake.parameters()})
    return {"seen": seen, "masters": masters, "given": given, "frozen": frozen, "adapters": adapters}


def swap(folder: Path, accelerator: Accelerator) -> dict:
    """Move weights between a forward pass and its backward pass."""
    phase = build(Case("priming", sharding={"activation_checkpointing": True}), accelerator)
    x, c = build_batch(1)
    loss = velocity(phase.generator, x, torch.tensor([0.5]), c).square().mean()
    with torch.no_grad():
        phase.generator.blocks[1].ffn.net[2].weight.to_local().mul_(1.5)
    try:
        loss.backward()
    except RuntimeError as error:
        return {"said": str(error)}
    return {"said": ""}


def memory(folder: Path, accelerator: Accelerator) -> dict:
    """The most bytes in this process at once while both roles of a phase are updated."""
    return {name: _peak(name, accelerator) for name in SEVERAL}


def _peak(name: str, accelerator: Accelerator) -> int:
    settings, phase_name, network = several(name)
    training = getattr(settings, phase_name).training
    phase = build_phase(settings, phase_name, network, accelerator.device)
    spread(phase, training, accelerator)
    latents = random_latents(settings, 1, accelerator.device)
    condition = random_condition(settings, network, TOKENS, 1, accelerator.device)

    def update(turn: str) -> None:
        loop.update(phase, turn, 0, lambda drawn: (latents, condition), 0, training, 0, 0, accelerator)

    peaks = []
    for turn in phase.roles:  # the first time optimisers make their state
        update(turn)
    for turn in phase.roles:
        with LiveBytes() as live:
            update(turn)
        peaks.append(live.peak)
    return held_by(phase) + max(peaks)


def refused(folder: Path, accelerator: Accelerator) -> dict:
    """What context parallelism says to what it cannot split."""
    said = []
    for size in (3, 2):
        case = Case("priming", sharding={"context_parallel": size})
        try:
            build(case, accelerator)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return {"said": said}


def main() -> int:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=10))])
    jobs = {name: lambda f, a, name=name: run_case(name, f, a) for name in CASES}
    jobs |= {f.__name__: f for f in (resume, grow, start, communication, precision, refused, swap, memory)}
    chosen = sys.argv[3:] or list(jobs)
    for name in chosen:
        accelerator = accelerator_for("bf16" if "bf16" in name or name == "precision" else "no")
        try:
            found = jobs[name](folder, accelerator)
        except Exception:
            found = {"error": traceback.format_exc()}
        (folder / f"{name}-{accelerator.process_index}.json").write_text(json.dumps(found))
        print(name, found.get("error", "done"), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
