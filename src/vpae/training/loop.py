"""The one training loop.

A phase owns its roles and says what one update of each costs (`loss`); the loop owns steps, accumulation, precision,
clipping, EMA, metrics, checkpoints and signals. Between two logs it reads from the device only whether each update's
gradient is finite (and, of several processes, whether one was told to end). Nothing random is carried along: the noise
of a micro-batch and the clips in it follow from (seed, step, turn, micro-batch), so a resumed run continues bit for bit
from the last state, whichever update that was. Micro-batches are numbered over all processes: two processes do what one
with twice the accumulation does.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from vpae.artifacts import written
from vpae.config import Optimizer, Training
from vpae.experiment import ConfigError
from vpae.preemption import Interruption
from vpae.progress import Progress
from vpae.randomness import generator_for
from vpae.training import checkpoint, sharding
from vpae.training.ema import update_ema
from vpae.training.monitor import Watch
from vpae.training.phase import Batch, Phase
from vpae.training.skipping import Skipped
from vpae.training.speed import Cost, Speed

SPEED = "speed.jsonl"  # beside metrics.jsonl; differs from run to run


def progress_at(step: int, training: Training) -> float:
    """How far a run is, for what changes linearly over it: 0 at the first step, 1 at the last."""
    return step / max(1, training.steps - 1)


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Linear warm-up, then constant or half a cosine down to 2%."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if not settings.cosine:
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class _Begun:
    """A step some of whose updates a state holds: how many, which roles moved, and what was logged of them."""

    turns: int = 0
    moved: dict[str, bool] = field(default_factory=dict)
    logs: dict[str, float] = field(default_factory=dict)


def train(
    phase: Phase,
    batches: Callable[[int], Batch],
    training: Training,
    seed: int,
    state: Path,
    accelerator: Accelerator,
    watch: Watch | None = None,
    keys: Callable[[int], Sequence[str]] | None = None,
    cost: Cost | None = None,
) -> Path:
    """Run a phase to its end, from the last saved state if there is one.

    Args:
        phase: roles and losses; its modules are on the accelerator's device already.
        batches: number of a micro-batch -> this process's batch, on the device.
        training: steps, accumulation, EMA, how often to save and log.
        seed: of all randomness.
        state: folder for resumable states, metrics.jsonl and speed.jsonl; outside every declared output.
        accelerator: device, precision and processes.
        watch: looks for collapse.
        keys: number of a micro-batch -> the keys of this process's clips in it, for messages.
        cost: of a step, for tokens per second and utilisation.

    Returns:
        the path of metrics.jsonl.

    Raises:
        Collapse: the videos collapse; the last state before is kept.
        FloatingPointError: `stop_after_skipped` updates of a role in a row had a gradient that is not finite.
        Interruption: a signal asked for an end; the update is finished and the state saved.
        ConfigError: the state was saved by processes that made their updates of another number of micro-batches.
    """
    state.mkdir(parents=True, exist_ok=True)
    metrics = state / "metrics.jsonl"
    if watch:  # before a state is taken up: the weights are those of the start
        watch.begin(state, accelerator.is_main_process)
    position = checkpoint.load_latest(state, phase)
    _, ranks = sharding.data_rank(training.sharding, accelerator)
    per_update = training.accumulate * ranks
    if position:
        _require_the_same(per_update, position["micro_batches_per_update"], ranks, phase.name, state)
    skipped = Skipped(training.stop_after_skipped, keys, position and position["skipped"])
    start, drawn = (position["step"], position["drawn"] // ranks) if position else (0, 0)
    begun = _Begun(**(position or {}).get("begun", {}))
    if accelerator.is_main_process:
        _keep_lines_before(metrics, start)
    if position and accelerator.is_main_process:
        print(f"{phase.name}: goes on after step {start} of {training.steps}", file=sys.stderr)
    progress = Progress(training.steps, phase.name, initial=start) if accelerator.is_main_process else None
    speed, text = Speed(state / SPEED, training.steps, start, cost or Cost()), ""
    batches = speed.noting_waits(batches)

    def save(done: int, **more: object) -> None:
        position = {"step": done, "drawn": drawn * ranks, "micro_batches_per_update": per_update}
        checkpoint.save(state, phase, {**position, "skipped": skipped.state, **more})

    with Interruption.watch() as interruption:
        for step in range(start, training.steps):
            logs: dict[str, Tensor] = {}
            turns = list(phase.turns(step))
            for number, turn in enumerate(turns[begun.turns :], begun.turns):
                found = update(phase, turn, number, batches, drawn, training, seed, step, accelerator, skipped)
                drawn += training.accumulate
                begun.moved[turn] = begun.moved.get(turn, False) or bool(found)
                logs.update(found)
                # At 14B a step takes ten minutes, and a cluster does not wait for its end.
                if (made := number + 1) < len(turns) and _anywhere(interruption.requested, accelerator):
                    begun = replace(begun, turns=made, logs=begun.logs | _averaged(logs, accelerator))
                    save(step, begun=asdict(begun))
                    raise Interruption(
                        f"{phase.name}: stopped by a signal after step {step} and {made} of the {len(turns)} updates "
                        f"of the next; the state is in {state}"
                    )
            if begun.moved.get(phase.main, True):
                update_ema(phase.ema, phase.roles[phase.main].module, training.ema_decay)
            done = step + 1
            looked = bool(watch) and watch.wants(done)
            logged = done % training.log_every == 0 or done == training.steps or looked
            values = begun.logs | _averaged(logs, accelerator) if logged else {}
            begun = _Begun()
            if skipped.total:
                values["skipped"] = skipped.total
            if looked:
                values |= watch.look(done, phase.name)
            if accelerator.is_main_process and logged:
                with metrics.open("a") as file:
                    file.write(json.dumps({"step": done, **values}) + "\n")
                text = f"{_brief(values)}  {speed.lap(done)}"
            if progress:
                progress.update(text=text)
            wanted = _anywhere(interruption.requested, accelerator)
            if done % training.checkpoint_every == 0 or done == training.steps or wanted:
                save(done)
            if wanted and done < training.steps:
                raise Interruption(f"{phase.name}: stopped by a signal after step {done}; the state is in {state}")
    if progress:
        progress.close()
    return metrics


def update(
    phase: Phase,
    turn: str,
    number: int,
    batches: Callable[[int], Batch],
    drawn: int,
    training: Training,
    seed: int,
    step: int,
    accelerator: Accelerator,
    skipped: Skipped | None = None,
) -> dict[str, Tensor]:
    """One optimiser step of one role; returns its logs, none if it was skipped because a gradient is not finite."""
    skipped = skipped or Skipped(1, None)  # an update by itself may not be skipped
    role = phase.roles[turn]
    rank, ranks = sharding.data_rank(training.sharding, accelerator)
    for name, other in phase.roles.items():
        other.require_gradients(name == turn)
    logs: dict[str, Tensor] = {}
    losses: dict[int, Tensor] = {}
    for micro in range(training.accumulate):
        last = micro == training.accumulate - 1
        sharding.reduce_gradients_in_backward(phase, last or training.sharding.reduce_every_micro_batch)
        place = micro * ranks + rank  # among the micro-batches of all processes
        rng = generator_for(accelerator.device, seed, phase.name, step, number, place, 0)  # 0 keeps earlier runs' noise
        with accelerator.autocast():
            loss, values = phase.loss(turn, batches(drawn + micro), rng, step)
        (loss / training.accumulate).backward()
        losses[drawn + micro] = loss.detach()
        for key, value in {f"{turn}_loss": loss, **values}.items():
            logs[key] = logs.get(key, 0) + value.detach().float() / training.accumulate
    parameters = role.parameters()
    sharding.average_whole_gradients(parameters, accelerator)
    norm = sharding.clip_gradients(parameters, role.settings.max_grad_norm)
    finite = bool(torch.isfinite(norm))  # alike in all processes, because the norm is that of all
    logs = {**logs, f"{turn}_grad_norm": norm} if finite else {}
    if finite:
        for group in role.optimizer.param_groups:
            group["lr"] = learning_rate(role.settings, step, training.schedule_steps or training.steps)
        role.optimizer.step()
    for other in phase.roles.values():
        other.optimizer.zero_grad(set_to_none=True)
        other.require_gradients(True)
    sharding.release_gathered(phase)
    if finite:
        skipped.made(turn)
    else:
        skipped.note(f"{phase.name}, step {step + 1}", turn, norm, losses, accelerator)
    return logs


def _averaged(logs: dict[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
    """The means over all processes."""
    if accelerator.num_processes == 1 or not logs:
        return {key: float(value) for key, value in logs.items()}
    means = accelerator.reduce(torch.stack([v.to(accelerator.device) for v in logs.values()]), "mean")
    return dict(zip(logs, means.tolist(), strict=True))


def _anywhere(wanted: bool, accelerator: Accelerator) -> bool:
    """Whether any process wants it: a signal need not reach all within the same step, but they must save together."""
    if accelerator.num_processes == 1:
        return wanted
    return bool(accelerator.reduce(torch.tensor(float(wanted), device=accelerator.device), "sum") > 0)


def _require_the_same(now: int, saved: int, ranks: int, name: str, state: Path) -> None:
    """Whoever takes up a state with more or fewer processes has to share the same micro-batches out among them."""
    if now == saved:
        return
    remedy = f"set {name}.training.accumulate={saved // ranks}" if saved % ranks == 0 else "take other numbers of both"
    raise ConfigError(
        f"{state} holds updates of {saved} micro-batches, but {ranks} processes (groups, if they share clips) that "
        f"accumulate {now // ranks} each make {now}: {remedy}, or delete that folder to begin anew"
    )


def _keep_lines_before(metrics: Path, step: int) -> None:
    """Drop the lines of steps that will be done again."""
    if metrics.exists():
        lines = [line for line in metrics.read_text(errors="replace").splitlines(keepends=True) if line.endswith("\n")]
        with written(metrics) as temporary:  # a full disk must not empty it
            temporary.write_text("".join(line for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    """Of a line of metrics.jsonl; one that is damaged is of no step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def _brief(values: dict[str, float]) -> str:
    return " ".join(f"{key} {value:.3g}" for key, value in values.items() if key.endswith("loss"))
