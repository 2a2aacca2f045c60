"""The stage of any method: train it, and write its student."""

import os
import shutil
import sys
from collections.abc import Iterator
from datetime import timedelta
from math import prod
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs
from torch import Tensor

from vpae.ahead import Ahead
from vpae.artifacts import link_tree
from vpae.config import Experiment, Training
from vpae.data.latents import LatentDataset
from vpae.distill import METHODS
from vpae.distill.method import TEACHER, Method
from vpae.distill.networks import Stored
from vpae.distill.student import save_ema
from vpae.experiment import ConfigError
from vpae.export.card import stage_provenance, write_card
from vpae.lazy import lazy
from vpae.models.wan import Condition, predict_x0
from vpae.planning.network import Network, Sequence
from vpae.randomness import Shuffled, generator_for
from vpae.training.loop import SPEED, train
from vpae.training.monitor import LOOKS, Watch
from vpae.training.precision import autocast_caches
from vpae.training.sharding import data_rank, spread
from vpae.training.speed import Cost, peak_of, summary

plans = lazy("vpae.planning.phase")
# The others wait for the first process while it reads or writes a network; NCCL's own ten minutes are few for 66 GB.
WAIT_FOR_THE_FIRST = timedelta(hours=2)


def accelerator_for(training: Training, device: torch.device | None = None) -> Accelerator:
    """Device (a GPU if there is one, unless another is named), precision and processes of a run.

    Raises:
        ConfigError: several processes were started that do not see each other, and would each train alone.
    """
    caches = AutocastKwargs(cache_enabled=autocast_caches(training))
    patience = InitProcessGroupKwargs(timeout=WAIT_FOR_THE_FIRST)
    if device is not None and device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    on_cpu = device is not None and device.type == "cpu"
    accelerator = Accelerator(mixed_precision=training.mixed_precision, cpu=on_cpu, kwargs_handlers=[caches, patience])
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise ConfigError(
            f"WORLD_SIZE = {started} processes were started, but this one sees {accelerator.num_processes}: each would "
            "train alone. To train on CPUs set ACCELERATE_USE_CPU=true; on GPUs see that every process has one "
            "(`nvidia-smi`, CUDA_VISIBLE_DEVICES) and that a launcher set LOCAL_RANK; or unset WORLD_SIZE"
        )
    return accelerator


class Batches:
    """Number of a micro-batch -> this process's latents and condition; every pass is shuffled anew.

    While one is trained on, the next is read.
    """

    def __init__(self, dataset: LatentDataset, training: Training, seed: int, name: str, accelerator: Accelerator):
        self.dataset, self.size = dataset, training.batch_size
        self.read = Ahead(lambda drawn: dataset.batch(self.numbers(drawn), accelerator.device))
        self.order, self.share = Shuffled(len(dataset), seed, name), data_rank(training.sharding, accelerator)

    def numbers(self, drawn: int) -> list[int]:
        """The clips' places in the split."""
        rank, ranks = self.share
        return [self.order((drawn * ranks + rank) * self.size + i) for i in range(self.size)]

    def __call__(self, drawn: int) -> tuple[Tensor, Condition]:
        return self.read(drawn)

    def keys(self, drawn: int) -> list[str]:
        """The clips' keys."""
        return [self.dataset.entries[number].key for number in self.numbers(drawn)]


def batches_of(latents: Path, training: Training, seed: int, name: str, accelerator: Accelerator) -> Batches:
    """What a method trains on."""
    return Batches(LatentDataset(latents, "train"), training, seed, name, accelerator)


def watch_of(phase: Method, dataset: LatentDataset, seed: int, accelerator: Accelerator) -> Watch | None:
    """A collapse monitor of the EMA's single steps on the first clips of a dataset; none where it never looks."""
    training = phase.config.training
    if training.monitor.every == 0:
        return None
    batches = torch.arange(min(training.monitor.clips, len(dataset))).split(training.batch_size)
    clips = [dataset.batch(numbers.tolist(), accelerator.device) for numbers in batches]

    def draw(number: int) -> Tensor:
        videos = []
        for i, (x, condition) in enumerate(clips):
            rng = generator_for(accelerator.device, seed, phase.name, "monitor", number, i)
            noise = torch.randn(x.shape, generator=rng, device=x.device)
            with accelerator.autocast():
                videos.append(predict_x0(phase.ema, noise, torch.ones(len(x), device=x.device), condition))
        return torch.cat(videos).float()

    return Watch(training.monitor, draw, torch.cat([x for x, _ in clips]))


def cost_of(settings: Experiment, name: str, phase: Method, batches: Batches, accelerator: Accelerator) -> Cost:
    """What a step takes: its operations are those of a plan, which is made where the device's peak is known."""
    training, network = phase.config.training, Network.of_config(phase.generator.config)
    x, c = batches(0)
    tokens = Sequence(prod(x.shape[2:]) // prod(network.patch), c.text_BLD.shape[1], c.image_BND.shape[1])
    clips = training.batch_size * training.accumulate * batches.share[1]
    peak = peak_of(accelerator.device, training.mixed_precision)
    if not (peak and accelerator.is_main_process):
        return Cost(clips * tokens.video)
    try:
        turns = plans.execute(settings, name, network, tokens, 1).turns.values()
    except Exception as error:  # whatever it is, a run does not end for want of a figure
        print(f"vpae: {name} is not planned, so that its utilisation is not logged: {error}", file=sys.stderr)
        return Cost(clips * tokens.video)
    shared = training.sharding.context_parallel if accelerator.num_processes > 1 else 1
    operations = sum(turn.count * turn.model for turn in turns) / training.steps / shared
    return Cost(clips * tokens.video, operations, peak)


def at_start(settings: Experiment, name: str, inputs: dict[str, Path], accelerator: Accelerator) -> Method:
    """A method's phase before its first step, on the networks of finished stages, spread over the processes."""
    training = getattr(settings, name).training
    phase = METHODS[name].build(settings, Stored(inputs, training, accelerator.device))
    spread(phase, training, accelerator)
    return phase


def run(name: str, settings: Experiment, inputs: dict[str, Path], out: Path, state: Path) -> dict:
    """Train a method and write its result; returns counts.

    Writes `student/` (the pipeline folder of the result, with EMA weights and a model card), `metrics.jsonl`, of a
    student trained as an adapter `student_lora.safetensors`, `looks/` if the monitor keeps videos, and what the method
    itself saves.
    """
    training = getattr(settings, name).training
    accelerator = accelerator_for(training)
    phase = at_start(settings, name, inputs, accelerator)
    if accelerator.is_main_process:
        for said in too_late(phase):
            print(f"vpae: {said}", file=sys.stderr)
    batches = batches_of(inputs["latents"], training, settings.seed, name, accelerator)
    watch = watch_of(phase, LatentDataset(inputs["latents"], "held_out"), settings.seed, accelerator)
    cost = cost_of(settings, name, phase, batches, accelerator)
    metrics = train(phase, batches, training, settings.seed, state, accelerator, watch, batches.keys, cost)
    phase.save(out)
    counts = {
        "steps": training.steps,
        "processes": accelerator.num_processes,
        "clips_per_step": training.batch_size * training.accumulate * batches.share[1],
        "parameters": sum(p.numel() for p in phase.ema.parameters()),
        "trained_parameters": sum(p.numel() for role in phase.roles.values() for p in role.parameters()),
        **summary(state / SPEED),
    }
    shift = phase.config.later_shift(phase.shift)
    if save_ema(out, inputs[TEACHER], phase.ema, shift):  # in the first process
        shutil.copy(metrics, out / "metrics.jsonl")
        if (state / LOOKS).is_dir():
            link_tree(state / LOOKS, out / LOOKS)
        write_card(out / "student", stage_provenance(inputs), trained_as(settings, name))
    return counts


def too_late(phase: Method) -> Iterator[str]:
    """What is set for steps that a run does not have: so it is when it was shortened to be tried, or by mistake."""
    training = phase.config.training
    if training.monitor.every > training.steps:
        key = f"{phase.name}.training.monitor.every = {training.monitor.every}"
        yield f"{key}, but there are {training.steps} steps: nothing looks for a collapse"
    for name, role in phase.roles.items():
        if role.settings.warmup_steps > training.steps:
            yield (
                f"{phase.name}: the warm-up of {name} has {role.settings.warmup_steps} steps, but there are "
                f"{training.steps}: its learning rate stays below the one that is set"
            )


def trained_as(settings: Experiment, name: str) -> dict:
    """Plain settings, of the methods those alone that led to this student, in their order."""
    values = settings.model_dump(mode="json")
    others = {key: value for key, value in values.items() if key not in METHODS}
    return others | {method: values[method] for method in settings.chain(name)}
