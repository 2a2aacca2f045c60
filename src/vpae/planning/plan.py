"""The plan of an experiment on a cluster: all figures as one JSON-able dict."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from vpae.config import Experiment, Geometry, Needs, Training
from vpae.distill import METHODS
from vpae.experiment import ConfigError, Source
from vpae.planning.complaints import complaints
from vpae.planning.inference import Use, uses
from vpae.planning.network import Network, Pipeline, Sequence, count, parameters_of, pipeline_of, tokens_of
from vpae.planning.phase import Execution, Turn, execute
from vpae.planning.presence import missing
from vpae.planning.remedies import remedies
from vpae.training.checkpoint import KEEP

H200_PEAK = 989e12  # dense bf16 operations per second of an H100 or H200 SXM [vendor's figure]
FLOAT32_SHARE = 0.1  # of that peak, in float32 networks [measured: Wan2.1's VAE decodes at 96e12 on an H200]
HOST_BYTES = {"gpu": 5e9, "cpu": 1.5e9}  # of a process that has loaded nothing yet [assumption]
FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Cluster:
    """What the experiment is to run on, and what is assumed of it.

    Attributes:
        gpus: how many a phase has; none: as many as the experiment's `cluster` section asks for.
        memory: bytes of each.
        interconnect: bytes per second that each GPU sends and receives at once between nodes; none: not counted.
        peak: operations per second of each GPU in matrix products.
        utilisation: share of the peak that a step's operations reach, recomputed ones included [assumption].
        overhead: bytes on each GPU for driver, libraries and fragmentation [assumption].
    """

    gpus: int | None
    memory: float
    interconnect: float | None = None
    peak: float = H200_PEAK
    utilisation: float = 0.4
    overhead: float = 4e9

    def seconds(self, operations: float, float32: bool) -> float:
        """Of one GPU, for operations of a network that computes in bfloat16, or in float32."""
        return operations / (self.peak * (FLOAT32_SHARE if float32 else self.utilisation))


def make_plan(source: Source, cluster: Cluster) -> dict:
    """Everything `vpae plan` says.

    Raises:
        ConfigError: the networks' shapes are unknown, or processes cannot be shared out as configured.
    """
    settings, pipeline = source.settings, pipeline_of(source)
    network, tokens = pipeline.transformer, tokens_of(source.settings, pipeline)
    methods = sorted(settings.methods, key=lambda name: len(settings.chain(name)))
    for phase in methods:
        _check_division(source, phase, network, tokens, gpus_of(settings, phase, cluster))
    work = {phase: (_phase, settings, phase, network, tokens, cluster) for phase in methods}
    found = _at_once({**work, "uses": (uses, settings, pipeline, tokens)})
    stages, used = {phase: found[phase] for phase in methods}, found["uses"]
    for name, plan_of in AROUND.items():
        stages[name] = plan_of(settings, used, cluster)
        if not stages[name]["fits"]:
            stages[name]["remedies"] = _switches_around(name, settings, pipeline, tokens, cluster)
    sizes = parameters_of(pipeline)
    space = disk(settings, network, tokens, sizes, stages)
    stages["latents"]["result_bytes"] = space["latents"]
    for name, stage in stages.items():
        stage["complaints"] = complaints(name, stage, settings)
    return {
        "experiment": source.name,
        "cluster": {
            "gpus": cluster.gpus,
            "gpu_memory_bytes": cluster.memory,
            "interconnect_bytes_per_second": cluster.interconnect,
            "peak_flops": cluster.peak,
        },
        "assumptions": {
            "utilisation": cluster.utilisation,
            "float32_share": FLOAT32_SHARE,
            "overhead_bytes": cluster.overhead,
        },
        "parameters": {**{phase: stages[phase]["parameters"] for phase in methods}, "pipeline": sizes},
        "tokens": tokens.video,
        "condition_tokens": {"text": tokens.text, "image": tokens.image},
        "flops_per_nfe": used["network_alone"].operations,
        "binding_stage": max(stages, key=lambda name: stages[name]["bytes_per_gpu"]["total"]),
        "fits": all(stage["fits"] for stage in stages.values()),
        "gpu_hours": sum(stage["gpu_hours"] for stage in stages.values()),
        "stages": stages,
        "disk_bytes": space,
        "missing": missing(source),
    }


def _at_once(work: dict[str, tuple]) -> dict[str, Any]:
    """Results of independent calls (function, arguments ...), each in a process of its own."""
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        begun = {name: pool.submit(*call) for name, call in work.items()}
        return {name: result.result() for name, result in begun.items()}


def gpus_of(settings: Experiment, phase: str, cluster: Cluster) -> int:
    """How many processes a phase has."""
    needs: Needs = getattr(settings.cluster, phase)
    return cluster.gpus or needs.nodes * max(1, needs.gpus)


def _check_division(source: Source, phase: str, network: Network, tokens: Sequence, gpus: int) -> None:
    size = getattr(source.settings, phase).training.sharding.context_parallel
    key = f"{source.path}: {phase}.training.sharding.context_parallel = {size}"
    for number, what in ((gpus, "GPUs"), (network.heads, "attention heads"), (tokens.video, "tokens")):
        if number % size and gpus > 1:
            raise ConfigError(f"{key} does not divide the {number} {what}; choose another")


def _phase(settings: Experiment, phase: str, network: Network, tokens: Sequence, cluster: Cluster) -> dict:
    training, gpus = getattr(settings, phase).training, gpus_of(settings, phase, cluster)
    found = execute(settings, phase, network, tokens, gpus)
    room, steps = cluster.memory - cluster.overhead, training.steps
    fits = found.peak <= room
    advice = [] if fits else remedies(settings, phase, network, tokens, gpus, found.peak, room)
    groups = max(1, gpus // training.sharding.context_parallel)  # of GPUs that share a clip

    def per_step(value: Callable) -> float:
        return sum(turn.count * value(turn) for turn in found.turns.values()) / steps

    def traffic(received: float) -> float:
        return received / cluster.interconnect if cluster.interconnect else 0.0

    def seconds(turn: Turn) -> float:
        float32 = training.mixed_precision == "no"
        return max(cluster.seconds(turn.executed, float32), traffic(turn.received))

    a_step = per_step(seconds)
    return {
        "gpus": gpus,
        "parameters": found.parameters,
        "bytes_per_gpu": {
            **found.held,
            "step": found.peak - sum(found.held.values()),
            "overhead": cluster.overhead,
            "total": found.peak + cluster.overhead,
        },
        "fits": fits,
        "remedies": [{**remedy, "total": remedy["total"] + cluster.overhead} for remedy in advice],
        "host_bytes": _host_bytes(settings, phase, found, gpus, FP32 * count(network.build())),
        "turns": {
            name: {
                "per_step": turn.count / steps,
                "model_flops": turn.model,
                "flops": turn.executed,
                "peak_bytes": turn.peak,
                "seconds": seconds(turn),
            }
            for name, turn in found.turns.items()
        },
        "steps": steps,
        "clips_per_step": training.batch_size * training.accumulate * groups,
        "flops_per_step": gpus * per_step(lambda turn: turn.executed),
        "model_flops_per_step": gpus * per_step(lambda turn: turn.model),
        "traffic_bytes_per_gpu_and_step": per_step(lambda turn: turn.received),
        "seconds_per_step": a_step,
        "gpu_hours": steps * a_step * gpus / 3600,
        "state_bytes": _state_bytes(training, found, gpus),
        "checkpoint_every": training.checkpoint_every,
    }


def _state_bytes(training: Training, found: Execution, gpus: int) -> float:
    """Of a resumable state: what is trained, its averages and the EMA, which of shards are those of all GPUs."""
    trained = FP32 * sum(found.parameters[role] for role in found.turns)
    shards = gpus if training.sharding.strategy == "full" else 1
    return trained + shards * (found.held["optimizer"] + found.held["ema"])


def _host_bytes(settings: Experiment, phase: str, found: Execution, gpus: int, whole: float) -> float:
    """Bytes of memory of a node at most.

    The first process makes all networks whole before it shards them; at the end it merges a student's adapter into a
    teacher in float32, of `whole` bytes.
    """
    merged = whole if getattr(settings, phase).student_lora is not None else 0.0
    needs: Needs = getattr(settings.cluster, phase)
    full = getattr(settings, phase).training.sharding.strategy == "full" and gpus > 1
    here = max(1, needs.gpus)
    networks = found.held["weights"] + found.held["ema"]
    if not needs.gpus:
        return here * HOST_BYTES["cpu"] + max(here * found.peak, here * sum(found.held.values()) + merged)
    return here * HOST_BYTES["gpu"] + max(networks * (gpus if full else here), merged)


# The stages around the phases: one GPU a job, and networks that are not trained.


def _latents(settings: Experiment, used: dict[str, Use], cluster: Cluster) -> dict:
    """VAE and encoders are loaded together; each clip is encoded twice, with all its frames and with the first."""
    clips, batch = settings.clips.train + settings.clips.held_out, settings.latents.batch_size
    float32 = clips * sum(used[name].operations for name in ("encode", "condition", "image")) / batch
    seconds = cluster.seconds(clips * used["text"].operations, False) + cluster.seconds(float32, True)
    return _stage(settings, "latents", used, ("encode", "image", "text"), ("condition",), seconds, cluster)


def _samples(settings: Experiment, used: dict[str, Use], cluster: Cluster) -> dict:
    """One row's transformer and the VAE at a time."""
    config = settings.samples
    evaluations = config.count * sum(row.nfe for row in config.rows.values())
    decoded = config.decode * (len(config.rows) + 1)  # and the clips themselves
    operations = evaluations * used["network"].operations / config.batch_size
    seconds = cluster.seconds(operations, used["network"].float32)
    seconds += cluster.seconds(decoded * used["decode"].operations, used["decode"].float32)
    found = _stage(settings, "samples", used, ("network", "decode"), (), seconds, cluster)
    return {"network_evaluations": evaluations, **found}


def _evaluation(settings: Experiment, used: dict[str, Use], cluster: Cluster) -> dict:
    """The latency of each row, for which a whole pipeline is loaded, and C2ST; VBench's networks are not counted."""
    from vpae.evaluation.latency import PASSES, runs_of

    config, seconds = settings.evaluation, 0.0
    for row in settings.samples.rows.values():
        runs = runs_of(row, config)
        whole = runs.whole + runs.warmup
        evaluations = (runs.network + runs.whole) * row.nfe + 2 * runs.warmup * runs.warm.nfe
        around = used["condition_alone"].operations + used["image"].operations / settings.latents.batch_size
        seconds += PASSES * (
            cluster.seconds(evaluations * used["network_alone"].operations, used["network"].float32)
            + cluster.seconds(whole * 2 * used["text"].operations, used["text"].float32)
            + cluster.seconds(whole * used["decode"].operations, used["decode"].float32)
            + cluster.seconds(whole * around, True)
        )
    networks, others = ("network_alone", "decode", "text", "image"), ("condition_alone",)
    found = _stage(settings, "evaluation", used, networks, others, seconds, cluster)
    if not config.c2st.clips:
        return found
    # Each row that is not too dear draws training clips anew, in batches; no other network is loaded then.
    rows = [row.nfe for row in settings.samples.rows.values() if row.nfe <= config.c2st.most_nfe]
    operations = min(config.c2st.clips, settings.clips.train) * sum(rows) * used["network"].operations
    again = cluster.seconds(operations / settings.samples.batch_size, used["network"].float32)
    drawn = _stage(settings, "evaluation", used, ("network",), (), seconds + again, cluster)
    dearer = max(found, drawn, key=lambda stage: stage["bytes_per_gpu"]["total"])
    host = max(found["host_bytes"], drawn["host_bytes"])
    return {**dearer, "host_bytes": host, "gpu_hours": drawn["gpu_hours"]}


AROUND = {"latents": _latents, "samples": _samples, "evaluation": _evaluation}
_OF_SAMPLES = {"samples.batch_size": 1, "samples.vae_tiles": True, "samples.vae_dtype": "bfloat16"}
# The gentlest first.
SWITCHES = {"latents": {"latents.batch_size": 1}, "samples": _OF_SAMPLES, "evaluation": _OF_SAMPLES}


def _switches_around(
    name: str, settings: Experiment, pipeline: Pipeline, tokens: Sequence, cluster: Cluster
) -> list[dict]:
    """The settings with which one of these stages fits: one after the other is switched on until it does."""
    words = []
    for key, value in SWITCHES[name].items():
        section, field = key.split(".")
        if getattr(getattr(settings, section), field) == value:
            continue
        changed = getattr(settings, section).model_copy(update={field: value})
        settings = settings.model_copy(update={section: changed})
        words.append(f"{key}={str(value).lower()}")
        found = AROUND[name](settings, uses(settings, pipeline, tokens), cluster)
        if found["fits"]:
            return [{"set": words, "total": found["bytes_per_gpu"]["total"]}]
    return []


def _stage(
    settings: Experiment,
    name: str,
    used: dict[str, Use],
    loaded: tuple[str, ...],
    others: tuple[str, ...],
    seconds: float,
    cluster: Cluster,
) -> dict:
    """A stage that has some networks loaded and uses them one after the other; `others` are further uses of them."""
    needs: Needs = getattr(settings.cluster, name)
    weights = sum(used[use].weights for use in loaded)
    work = max(used[use].peak for use in (*loaded, *others))
    overhead = cluster.overhead if needs.gpus else 0.0
    total = weights + work + overhead
    # A network is read into the node's memory before it goes to the GPU; on a CPU it stays there.
    host = HOST_BYTES["gpu"] + max(used[use].weights for use in loaded) if needs.gpus else HOST_BYTES["cpu"] + total
    return {
        "gpus": 1,
        "bytes_per_gpu": {"weights": weights, "step": work, "overhead": overhead, "total": total},
        "fits": total <= cluster.memory or not needs.gpus,
        "remedies": [],
        "host_bytes": host,
        "gpu_hours": seconds / 3600,
    }


def disk(
    settings: Experiment, network: Network, tokens: Sequence, sizes: dict[str, int], stages: dict[str, dict]
) -> dict[str, float]:
    """Bytes on disk: latents at most (captions of full length, first frames uncompressed), one teacher, the states.

    `sizes` are the parameters of the pipeline's networks.
    """
    clips = settings.clips.train + settings.clips.held_out
    found = {"latents": clips * clip_bytes(settings.geometry, network, tokens, settings.latents.dtype)}
    found["teacher"] = FP32 * sum(sizes.values())
    for phase in settings.methods:
        parameters = stages[phase]["parameters"]
        # The next one is written before the oldest goes.
        found[f"{phase}_states"] = (KEEP + 1) * stages[phase]["state_bytes"]
        beside = sum(parameters.get(role, 0) for role in METHODS[phase].leaves)
        if getattr(settings, phase).student_lora is not None:
            beside += parameters["ema"]  # the adapter as it was trained, beside the merged weights
        found[f"{phase}_student"] = FP32 * (sizes["transformer"] + beside)
    return found


def clip_bytes(geometry: Geometry, network: Network, tokens: Sequence, dtype: str) -> int:
    """Bytes of one clip's record in the stage `latents`, at most."""
    frames, height, width = geometry.latent_shape
    latents = 2 * network.out_channels * frames * height * width  # the clip and its condition
    embeddings = tokens.image * network.image_dim + tokens.text * network.text_dim
    return (BF16 if dtype == "bfloat16" else FP32) * (latents + embeddings) + 3 * geometry.height * geometry.width
