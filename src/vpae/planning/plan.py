"""The plan of an experiment on a cluster: all figures as one JSON-able dict."""

from dataclasses import dataclass

from vpae.config import Experiment, Geometry
from vpae.experiment import ConfigError, Source
from vpae.models.wan import SHORT_TEXT_TOKENS, TEXT_TOKENS
from vpae.planning.counting import Sequence, sequence_of, transformer_flops
from vpae.planning.footprint import (
    ADAM_BYTES,
    Footprint,
    footprint,
    parameters_of,
    remedies,
    smallest_cluster,
)
from vpae.planning.memory import BF16, FP32
from vpae.planning.network import Network, Pipeline, build_encoders, count, pipeline_of
from vpae.planning.presence import missing
from vpae.planning.workload import PHASES, adapter_of, step_flops, turns_of, warmup_flops
from vpae.training.checkpoint import KEEP

H200_PEAK = 989e12  # dense bf16 operations per second of an H100 or H200 SXM [vendor's figure]


@dataclass(frozen=True)
class Cluster:
    """What the experiment is to run on, and what is assumed of it.

    Attributes:
        gpus: how many.
        memory: bytes of each.
        interconnect: bytes per second that each GPU sends and receives at once between nodes; none: not counted.
        peak: operations per second of each GPU in matrix products.
        utilisation: share of the peak that a step's operations reach, recomputed ones included [assumption].
        overhead: bytes on each GPU for driver, libraries and fragmentation [assumption].
    """

    gpus: int
    memory: float
    interconnect: float | None = None
    peak: float = H200_PEAK
    utilisation: float = 0.4
    overhead: float = 4e9


def make_plan(source: Source, cluster: Cluster) -> dict:
    """Everything `vpae plan` says.

    Raises:
        ConfigError: the networks' shapes are unknown, or processes cannot be shared out as configured.
    """
    settings = source.settings
    pipeline = pipeline_of(source)
    network = pipeline.transformer
    tokens = tokens_of(settings, pipeline)
    for phase in PHASES:
        _check_division(source, phase, network, tokens, cluster.gpus)
    stages = {phase: _stage(settings, phase, network, tokens, cluster) for phase in PHASES}
    binding = max(PHASES, key=lambda phase: stages[phase]["bytes_per_gpu"]["total"])
    forward = transformer_flops(network, tokens).forward
    samples = _samples(settings, forward, cluster)
    return {
        "experiment": source.name,
        "cluster": {
            "gpus": cluster.gpus,
            "gpu_memory_bytes": cluster.memory,
            "interconnect_bytes_per_second": cluster.interconnect,
            "peak_flops": cluster.peak,
        },
        "assumptions": {"utilisation": cluster.utilisation, "overhead_bytes": cluster.overhead},
        "parameters": parameters(settings, pipeline),
        "tokens": tokens.video,
        "condition_tokens": {"text": tokens.text, "image": tokens.image},
        "flops_per_nfe": forward,
        "flops_per_step": {phase: stages[phase]["flops_per_step"] for phase in PHASES},
        "steps": {phase: stages[phase]["steps"] for phase in PHASES},
        "bytes_per_gpu": stages[binding]["bytes_per_gpu"],
        "binding_stage": binding,
        "fits": all(stages[phase]["fits"] for phase in PHASES),
        "gpu_hours": sum(stages[phase]["gpu_hours"] for phase in PHASES) + samples["gpu_hours"],
        "stages": stages,
        "samples": samples,
        "disk_bytes": disk(settings, pipeline, tokens),
        "missing": missing(source),
    }


def tokens_of(settings: Experiment, pipeline: Pipeline) -> Sequence:
    """Tokens of one clip; captions are padded to 32 tokens if all are shorter, as the procedural world's are."""
    text = SHORT_TEXT_TOKENS if settings.clips.source == "world" else TEXT_TOKENS
    return sequence_of(settings.geometry, pipeline.transformer, text, pipeline.image_tokens)


def parameters(settings: Experiment, pipeline: Pipeline) -> dict[str, int]:
    """Parameters by role. `generator` and `ema` are what is trained: an adapter's where the student is one."""
    network = pipeline.transformer
    priming, equilibrium = (parameters_of(settings, phase, network) for phase in PHASES)
    fake = "fake_lora" if adapter_of(settings, "priming", "fake") else "fake_copy"
    found = {
        "generator": priming.held["generator"],
        "ema": priming.held["ema"],
        "teacher": priming.held["teacher"],
        fake: priming.held["fake"],
        "head": equilibrium.held["head"],
    }
    if "backbone" in equilibrium.held:
        found["discriminator_copy"] = equilibrium.held["backbone"]
    return found | {name: count(module) for name, module in build_encoders(pipeline).items()}


def _check_division(source: Source, phase: str, network: Network, tokens: Sequence, gpus: int) -> None:
    size = getattr(source.settings, phase).training.sharding.context_parallel
    key = f"{source.path}: {phase}.training.sharding.context_parallel = {size}"
    for number, what in ((gpus, "GPUs"), (network.heads, "attention heads"), (tokens.video, "tokens")):
        if number % size and gpus > 1:
            raise ConfigError(f"{key} does not divide the {number} {what}; choose another")


def _stage(settings: Experiment, phase: str, network: Network, tokens: Sequence, cluster: Cluster) -> dict:
    training = getattr(settings, phase).training
    taken = footprint(settings, phase, network, tokens, cluster.gpus, cluster.overhead)
    groups = max(1, cluster.gpus // training.sharding.context_parallel)  # of GPUs that share a clip
    clips = training.batch_size * training.accumulate * groups
    step, first = (f(settings, phase, network, tokens) for f in (step_flops, warmup_flops))
    compute = clips * step.executed / (cluster.gpus * cluster.peak * cluster.utilisation)
    moved = step_traffic(settings, phase, network, tokens, cluster.gpus)
    traffic = moved / cluster.interconnect if cluster.interconnect else 0.0
    seconds = max(compute, traffic)
    once = clips * first.executed / (cluster.gpus * cluster.peak * cluster.utilisation)
    return {
        "bytes_per_gpu": {**taken.parts, "total": taken.total},
        "fits": taken.total <= cluster.memory,
        "remedies": _remedies(settings, phase, network, tokens, cluster, taken),
        "steps": training.steps,
        "clips_per_step": clips,
        "flops_per_step": clips * step.executed,
        "model_flops_per_step": clips * step.model,
        "traffic_bytes_per_gpu_and_step": moved,
        "compute_seconds_per_step": compute,
        "traffic_seconds_per_step": traffic,
        "seconds_per_step": seconds,
        "gpu_hours": (training.steps * seconds + once) * cluster.gpus / 3600,
    }


def _remedies(settings, phase, network, tokens, cluster: Cluster, taken: Footprint) -> list[dict]:
    if taken.total <= cluster.memory:
        return []
    found = [
        {"set": list(switches), "total": total}
        for switches, total in remedies(
            settings, phase, network, tokens, cluster.gpus, cluster.memory, cluster.overhead
        )
    ]
    gpus = smallest_cluster(settings, phase, network, tokens, cluster.memory, cluster.overhead)
    if gpus is not None and gpus > cluster.gpus:
        found.append({"gpus": gpus, "total": footprint(settings, phase, network, tokens, gpus, cluster.overhead).total})
    return found


def step_traffic(settings: Experiment, phase: str, network: Network, tokens: Sequence, gpus: int) -> float:
    """Bytes that each GPU receives in one step: gathered weights, reduced gradients, tokens of shared clips."""
    training = getattr(settings, phase).training
    sharding = training.sharding
    if gpus == 1:
        return 0.0
    bf16 = training.mixed_precision == "bf16"
    s, others = BF16 if bf16 else FP32, (gpus - 1) / gpus
    sizes = parameters_of(settings, phase, network)
    size = sharding.context_parallel
    exchanged = 4 * s * network.layers * tokens.video / size * network.width * (size - 1) / size * training.batch_size
    total = 0.0
    for turn in turns_of(settings, phase):
        micro = update = 0.0
        for run in turn.passes:
            if run.role == "head":
                continue
            directions = run.forwards * (1 if run.gradient == "none" else 2)
            micro += directions * exchanged
            if sharding.strategy == "full":
                micro += directions * s * sizes.transformer * others
        trained = FP32 * sum(sizes.trained.get(r, 0) for r in {p.role for p in turn.passes if p.gradient in TRAINS})
        reduced = trained * others * (1 if sharding.strategy == "full" else 2)
        if sharding.strategy == "full" and sharding.reduce_every_micro_batch:
            micro += reduced
        else:
            update += reduced
        total += turn.per_step * (training.accumulate * micro + update)
    return total


TRAINS = ("adapter", "weights")


def _samples(settings: Experiment, forward: float, cluster: Cluster) -> dict:
    """Network time of the stage `samples`; encoding and decoding are not counted."""
    evaluations = settings.samples.count * sum(row.nfe for row in settings.samples.rows.values())
    return {
        "network_evaluations": evaluations,
        "gpu_hours": evaluations * forward / (cluster.peak * cluster.utilisation) / 3600,
    }


def disk(settings: Experiment, pipeline: Pipeline, tokens: Sequence) -> dict[str, float]:
    """Bytes on disk: latents at most (captions of full length, first frames uncompressed), one teacher, the states."""
    clips = settings.clips.train + settings.clips.held_out
    network = pipeline.transformer
    found = {"latents": clips * clip_bytes(settings.geometry, network, tokens, settings.latents.dtype)}
    found["teacher"] = FP32 * (count_encoders(pipeline) + parameters_of(settings, "priming", network).transformer)
    for phase in PHASES:
        sizes = parameters_of(settings, phase, network)
        state = (FP32 + ADAM_BYTES) * sum(sizes.trained.values()) + FP32 * sizes.held["ema"]
        found[f"{phase}_states"] = (KEEP + 1) * state  # the next one is written before the oldest goes
        found[f"{phase}_student"] = FP32 * sizes.transformer
    return found


def count_encoders(pipeline: Pipeline) -> int:
    """Parameters of VAE, text and image encoder."""
    return sum(count(module) for module in build_encoders(pipeline).values())


def clip_bytes(geometry: Geometry, network: Network, tokens: Sequence, dtype: str) -> int:
    """Bytes of one clip's record in the stage `latents`, at most."""
    frames, height, width = geometry.latent_shape
    latents = 2 * network.out_channels * frames * height * width  # the clip and its condition
    embeddings = tokens.image * network.image_dim + tokens.text * network.text_dim
    return (BF16 if dtype == "bfloat16" else FP32) * (latents + embeddings) + 3 * geometry.height * geometry.width
