"""What would make a phase fit: switches of its settings, and more GPUs, each tried by running the phase."""

from collections.abc import Callable
from math import lcm

from pydantic import ValidationError

from vpae.config import Experiment, Lora
from vpae.planning.network import Network, Sequence
from vpae.planning.phase import execute

MOST_GPUS = 512


def remedies(
    settings: Experiment, phase: str, network: Network, tokens: Sequence, gpus: int, needed: float, room: float
) -> list[dict]:
    """Sets of switches, and numbers of GPUs, with which a phase that needs too many bytes has room."""

    def peak(values: dict, gpus: int = gpus) -> float:
        return execute(with_switches(settings, phase, values), phase, network, tokens, gpus).peak

    found = []
    if enough := _enough(switches(settings, phase, network, tokens, gpus), peak, room):
        values, total = enough
        found.append({"set": _words(settings, phase, values), "total": total})
    sharding = getattr(settings, phase).training.sharding
    shards = {} if sharding.strategy == "full" else {"strategy": "full"}
    if shards and gpus > 1:
        needed = peak(shards)  # already shared among these
    if more := _more_gpus(lambda number: peak(shards, number), gpus, sharding.context_parallel, needed, room):
        found.append({"set": _words(settings, phase, shards), "gpus": more[0], "total": more[1]})
    return found


def switches(settings: Experiment, phase: str, network: Network, tokens: Sequence, gpus: int) -> list[dict]:
    """What could be switched on for a phase, the gentlest first."""
    config = getattr(settings, phase)
    training, sharding = config.training, config.training.sharding
    reduces = training.accumulate > 1 and not sharding.reduce_every_micro_batch and gpus > 1
    larger = [size for size in (2, 4, 8) if size > sharding.context_parallel]
    dividing = [size for size in larger if gpus % size == network.heads % size == tokens.video % size == 0]
    found = [
        (sharding.strategy == "none" and gpus > 1, {"strategy": "full"}),
        (sharding.activation_checkpointing is not True, {"activation_checkpointing": True}),
        (reduces, {"reduce_every_micro_batch": True}),
        (training.batch_size > 1, {"batch_size": 1}),
        *((True, {"context_parallel": size}) for size in dividing),
        (config.student_lora is None, {"student_lora": Lora()}),
    ]
    return [values for useful, values in found if useful and _is_allowed(settings, phase, values)]


def _is_allowed(settings: Experiment, phase: str, values: dict) -> bool:
    """Whether the settings take these values; an adapter is switched on in all methods at once."""
    try:
        for method in settings.methods if "student_lora" in values else (phase,):
            changed = getattr(with_switches(settings, method, values), method)
            type(changed).model_validate(changed.model_dump())
    except ValidationError:
        return False
    return True


def with_switches(settings: Experiment, phase: str, values: dict) -> Experiment:
    """The same experiment with some switches of one phase set."""
    config = getattr(settings, phase)
    of = lambda section: {key: value for key, value in values.items() if key in type(section).model_fields}  # noqa: E731
    sharding = config.training.sharding.model_copy(update=of(config.training.sharding))
    training = config.training.model_copy(update={**of(config.training), "sharding": sharding})
    return settings.model_copy(update={phase: config.model_copy(update={**of(config), "training": training})})


def _enough(available: list[dict], peak: Callable[[dict], float], room: float) -> tuple[dict, float] | None:
    """As few switches as will do, and the bytes with them: one after the other, then without those not needed."""
    values: dict = {}
    for switch in available:
        values |= switch
        if (total := peak(values)) <= room:
            break
    else:
        return None
    for key in list(values)[:-1]:
        fewer = {k: v for k, v in values.items() if k != key}
        if (less := peak(fewer)) <= room:
            values, total = fewer, less
    return values, total


def _more_gpus(
    peak: Callable[[int], float], gpus: int, together: int, needed: float, room: float
) -> tuple[int, float] | None:
    """The smallest number of GPUs that suffices, in whole nodes of eight and whole groups that work on a clip together.

    Of shards each GPU has its part, so the number is solved for, and doubled where that was too few.
    """
    whole = lcm(8, together)
    most = whole * (MOST_GPUS // whole)
    many = peak(most)
    if many > room or gpus >= most:
        return None
    shared = (needed - many) / (1 / gpus - 1 / most)
    enough = whole
    while enough <= gpus or many + shared / enough > room:
        enough *= 2
    total = peak(enough)
    return (enough, total) if total <= room else None


def _words(settings: Experiment, phase: str, values: dict) -> list[str]:
    """What to give `--set`; an adapter is the same in all methods, of which one starts from the other."""
    found = []
    for key, value in values.items():
        if isinstance(value, Lora):
            text = f"student_lora={{rank: {value.rank}, alpha: {value.alpha:g}}}"
            found += [f"{method}.{text}" for method in settings.methods]
        else:
            place = "training" if key == "batch_size" else "training.sharding"
            found.append(f"{phase}.{place}.{key}={str(value).lower()}")
    return found
