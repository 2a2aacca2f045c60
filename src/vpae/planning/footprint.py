"""Bytes on one GPU while a phase trains: what its roles keep, what a step needs besides, and what would make it fit."""

from dataclasses import dataclass, field
from itertools import combinations

from vpae.config import Experiment, Lora
from vpae.models.wan import default_taps
from vpae.planning.counting import Sequence
from vpae.planning.memory import (
    BF16,
    FP32,
    Activations,
    Precision,
    head_activations,
    transformer_activations,
)
from vpae.planning.network import Network, adapter_parameters, head_parameters, transformer_parameters
from vpae.planning.workload import Turn, adapter_of, turns_of

ADAM_BYTES = 2 * FP32  # averages of gradient and squared gradient
LATENT_TENSORS = 12  # latents, noise, predictions and their differences that a loss has in hand, in float32


@dataclass(frozen=True)
class Footprint:
    """Bytes on one GPU at a phase's worst moment; the parts make the total.

    `working_weights` are weights gathered from other GPUs, or cast to the precision of computing. `never_together`
    (negative) is the smaller of activations and gradients where gradients come only as activations go.
    """

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Parameters:
    """How many a phase's roles have; `trained` has those that an optimiser moves."""

    transformer: int
    block: int
    held: dict[str, int]
    trained: dict[str, int]


def parameters_of(settings: Experiment, phase: str, network: Network) -> Parameters:
    """Count them on the real networks, which stand on the meta device."""
    config = getattr(settings, phase)
    whole, block = transformer_parameters(network)
    student = adapter_of(settings, phase, "generator")
    generator = whole if student is None else adapter_parameters(network, student)
    held, trained = {"generator": generator, "ema": generator, "teacher": whole}, {"generator": generator}
    if phase == "priming":
        lora = adapter_of(settings, phase, "fake")
        held["fake"] = trained["fake"] = whole if lora is None else adapter_parameters(network, lora)
    else:
        taps = len(config.head.taps or default_taps(network.layers))
        held["head"] = trained["head"] = head_parameters(config.head, network, taps)
        if config.backbone == "copy":
            held["backbone"] = trained["backbone"] = whole
    return Parameters(whole, block, held, trained)


def footprint(
    settings: Experiment,
    phase: str,
    network: Network,
    tokens: Sequence,
    gpus: int,
    overhead: float = 0.0,
    fused_norm: bool = True,
) -> Footprint:
    """Bytes on each GPU while a phase trains.

    Args:
        settings: the experiment.
        phase: priming or equilibrium.
        network: shape of the transformer.
        tokens: of one clip.
        gpus: how many there are.
        overhead: bytes that the driver, the libraries and fragmentation take.
        fused_norm: whether RMSNorm is one kernel, as on GPUs.
    """
    training = getattr(settings, phase).training
    sharding = training.sharding
    bf16 = training.mixed_precision == "bf16"
    precision = Precision(BF16 if bf16 else FP32, fused_norm)
    full = sharding.strategy == "full" and gpus > 1
    shards = gpus if full else 1
    share = 1 / sharding.context_parallel if gpus > 1 else 1.0
    sizes = parameters_of(settings, phase, network)
    frozen = BF16 if bf16 else FP32
    whole_anyway = sizes.held.get("head", 0)  # in every process
    weights = sum(n * (frozen if role == "teacher" else FP32) for role, n in sizes.held.items() if role != "ema")
    activations = gradients = never_together = 0.0
    for turn in turns_of(settings, phase):
        needed = turn_activations(settings, phase, turn, network, tokens, precision, share) * training.batch_size
        trained = {run.role for run in turn.passes if run.gradient in ("weights", "adapter")}
        whole = full and training.accumulate > 1 and not sharding.reduce_every_micro_batch
        kept = FP32 * sum(sizes.trained.get(role, 0) for role in trained) / (1 if whole else shards)
        together = min(needed, kept) if training.accumulate == 1 else 0.0
        if needed + kept - together > activations + gradients + never_together:
            activations, gradients, never_together = needed, kept, -together
    return Footprint(
        {
            "weights": (weights - FP32 * whole_anyway) / shards + FP32 * whole_anyway,
            "gradients": gradients,
            "optimizer": ADAM_BYTES * ((sum(sizes.trained.values()) - whole_anyway) / shards + whole_anyway),
            "ema": FP32 * sizes.held["ema"] / shards,
            "activations": activations,
            "working_weights": _working_weights(settings, phase, sizes, precision, full),
            "never_together": never_together,
            "overhead": overhead,
        }
    )


def _working_weights(settings: Experiment, phase: str, sizes: Parameters, precision: Precision, full: bool) -> float:
    trains_whole = adapter_of(settings, phase, "generator") is None
    if full:
        # The block at work and the next one; what is outside the blocks; and the block's gradients, before and after
        # the cast to float32 in which they are reduced.
        outside = sizes.transformer - _layers(sizes) * sizes.block
        reduced = sizes.block * (precision.compute + FP32) if trains_whole else 0
        return precision.compute * (2 * sizes.block + outside) + reduced
    # Autocast keeps the casts of float32 weights that a backward pass needs: the generator's, and the features' EMA's.
    own_features = phase == "equilibrium" and settings.equilibrium.backbone == "ema"
    casts = (1 + own_features) * sizes.transformer if trains_whole else 0
    return precision.compute * casts if precision.compute < FP32 else 0.0


def _layers(sizes: Parameters) -> int:
    return sizes.transformer // sizes.block


def turn_activations(
    settings: Experiment,
    phase: str,
    turn: Turn,
    network: Network,
    tokens: Sequence,
    precision: Precision,
    share: float = 1.0,
) -> float:
    """The most that one turn's passes over one clip need at once, where a GPU has this share of the clip's tokens."""
    held = peak = 0.0
    stack: list[Activations] = []
    for run in turn.passes:
        needs = _needs(settings, phase, run.role, run.gradient, network, tokens, precision, share)
        for _ in range(run.forwards):
            peak = max(peak, held + needs.transient)
            held += needs.held
            stack.append(needs)
    for needs in reversed(stack):
        peak = max(peak, held + needs.working)
        held -= needs.held
    latents = LATENT_TENSORS * FP32 * tokens.video * network.out_channels * 4
    return peak + latents * share


def _needs(settings, phase, role, gradient, network, tokens, precision, share) -> Activations:
    config = getattr(settings, phase)
    if role == "head":
        taps = len(config.head.taps or default_taps(network.layers))
        return head_activations(config.head, network, tokens, taps)
    lora, again = adapter_of(settings, phase, role), config.training.sharding.activation_checkpointing
    return transformer_activations(network, tokens, gradient, precision, again, lora.rank if lora else 0, share)


def switches(settings: Experiment, phase: str, network: Network, gpus: int) -> list[tuple[tuple[str, ...], dict]]:
    """What could be switched on for a phase: what to give `--set`, and the values by name."""
    config = getattr(settings, phase)
    training, sharding = config.training, config.training.sharding
    values: list[dict] = []
    if not sharding.activation_checkpointing:
        values.append({"activation_checkpointing": True})
    if sharding.strategy == "none" and gpus > 1:
        values.append({"strategy": "full"})
    if training.accumulate > 1 and not sharding.reduce_every_micro_batch and gpus > 1:
        values.append({"reduce_every_micro_batch": True})
    for ranks in (2, 4, 8):
        if ranks > sharding.context_parallel and gpus % ranks == 0 and network.heads % ranks == 0:
            values.append({"context_parallel": ranks})
    where = f"{phase}.training.sharding"
    found = [((f"{where}.{key}={str(value).lower()}",), {key: value}) for pair in values for key, value in pair.items()]
    if training.batch_size > 1:
        found.append(((f"{phase}.training.batch_size=1",), {"batch_size": 1}))
    if config.student_lora is None:
        lora = Lora()
        text = f"student_lora={{rank: {lora.rank}, alpha: {lora.alpha:g}}}"
        found.append(((f"priming.{text}", f"equilibrium.{text}"), {"student_lora": lora}))
    return found


def with_switches(settings: Experiment, phase: str, values: dict) -> Experiment:
    """The same experiment with some switches of one phase set."""
    config = getattr(settings, phase)
    values = dict(values)
    phase_values = {"student_lora": values.pop("student_lora")} if "student_lora" in values else {}
    training_values = {key: values.pop(key) for key in ("batch_size", "accumulate") if key in values}
    sharding = config.training.sharding.model_copy(update=values)
    training = config.training.model_copy(update={**training_values, "sharding": sharding})
    return settings.model_copy(update={phase: config.model_copy(update={**phase_values, "training": training})})


def remedies(
    settings: Experiment, phase: str, network: Network, tokens: Sequence, gpus: int, memory: float, overhead: float
) -> list[tuple[tuple[str, ...], float]]:
    """The smallest sets of switches with which a phase fits, with the bytes per GPU that it then takes, best first."""
    available = switches(settings, phase, network, gpus)
    for size in range(1, len(available) + 1):
        found = []
        for chosen in combinations(available, size):
            values: dict = {}
            for _, change in chosen:
                values |= change
            if len(values) < size:  # two values of one switch
                continue
            changed = with_switches(settings, phase, values)
            needed = footprint(changed, phase, network, tokens, gpus, overhead).total
            if needed <= memory:
                found.append((tuple(text for texts, _ in chosen for text in texts), needed))
        if found:
            return sorted(found, key=lambda item: item[1])
    return []


def smallest_cluster(
    settings: Experiment, phase: str, network: Network, tokens: Sequence, memory: float, overhead: float
) -> int | None:
    """How many GPUs, in whole nodes of eight, it would take as it is; None if 4,096 do not suffice."""
    for gpus in (8 * 2**k for k in range(10)):
        if footprint(settings, phase, network, tokens, gpus, overhead).total <= memory:
            return gpus
    return None
