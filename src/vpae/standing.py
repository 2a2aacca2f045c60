"""Whether a finished result is what its experiment would make now: settings and hashes count, never dates or notes."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from itertools import chain, islice
from pathlib import Path

from vbench_i2v.files import sha256, tree
from vpae.artifacts import PROVENANCE, ArtifactError, damaged, files_of, identity, read_provenance, recover
from vpae.config import Experiment
from vpae.distill.method import TEACHER
from vpae.experiment import Source
from vpae.graph import RESULTS, stage_folder, stage_settings, stages_of, that_matter, upstream
from vpae.teacher.folder import decoder_inputs, external_inputs

NOTED_WITHIN = 120.0  # seconds after its end Snakemake has noted the end of a job
STATS_AT_ONCE = 16  # a file system over the network answers many questions as fast as one
SHOWN = 3  # of many keys or files that differ: one damaged file says as much as a thousand
FOREIGN = "not of this result: delete it, or move it out of the folder"
_ABSENT = object()


def _vbench_weights(settings: Experiment) -> dict[str, str]:
    if settings.evaluation.vbench.backbones != "official":
        return {}
    from vpae.evaluation.stage import external_inputs  # brings torch

    return external_inputs(settings)


# What stages read beside the results of others and that is small enough to be hashed before any job.
OUTSIDE = {TEACHER: external_inputs, "samples": decoder_inputs, "evaluation": _vbench_weights}


def departures(source: Source, stage: str, results: Path = RESULTS) -> Iterator[str]:
    """What tells a finished result from what it would be now: other settings, or other results that it was made from.

    What is missing tells nothing: a student that was pulled alone is as good as one with all that it was made from.
    """
    folder = stage_folder(source, stage, results)
    if (provenance := read_provenance(folder)) is None:
        return
    for key, (was, wanted) in _differences(provenance["settings"], stage_settings(source.settings, stage)):
        yield f"{folder}: made with {key} = {was}, but the configuration says {wanted}"
    for name in upstream(source.settings, stage):
        above = stage_folder(source, name, results)
        if read_provenance(above) is not None and provenance["inputs"].get(name) != identity(above):
            yield f"{folder}: made from another {above} than the present one"


def made_from(settings: Experiment, stage: str) -> list[str]:
    """All stages from which a stage is made, not only those that it reads itself, the first ones first."""
    found, new = set(), {stage}
    while new := {above for name in new - settings.students.keys() for above in upstream(settings, name)}:
        found |= new
    return [name for name in stages_of(settings) if name in found]


def standing(source: Source, results: Path = RESULTS) -> dict[str, bool]:
    """Stage -> whether its result is what it would make now; only of results of which that can be told.

    A copy, a checkout or a `touch` makes no difference. Of videos, whose content takes hours to read, the date counts:
    they must not be newer than their catalogue. What was brought with old dates, only the stage `clips` itself sees.
    """
    settings = source.settings
    found = dict.fromkeys(settings.students, True)
    for stage in stages_of(settings):  # each stands behind those that it reads
        folder, above = stage_folder(source, stage, results), upstream(settings, stage)
        recover(folder)
        if (provenance := read_provenance(folder)) is None:
            continue
        outside = {name: value for name, value in provenance["inputs"].items() if name not in above}
        if any(departures(source, stage, results)):
            found[stage] = False
        elif all(found.get(name) for name in above):
            found[stage] = not (
                (stage in OUTSIDE and outside != OUTSIDE[stage](settings))
                or (stage == "clips" and outside and _newer(Path(settings.clips.path), folder, provenance))
            )
    return {stage: stands for stage, stands in found.items() if stage not in settings.students}


def _newer(path: Path, folder: Path, provenance: dict) -> Path | None:
    """A file, or the first of a folder, that is newer than the beginning of the run that read it.

    Snakemake notes in the result's folder when a job on it ended: at once after that run, or later, when it was found
    to be up to date.
    """
    finished = datetime.fromisoformat(provenance["finished"]).timestamp()
    began = provenance.get("began")
    seen = datetime.fromisoformat(began).timestamp() if began else finished - provenance["seconds"]
    if (date := (folder / PROVENANCE).stat().st_mtime) - finished > NOTED_WITHIN:
        seen = date  # a copy of the results and of the videos renews both dates
    noted = folder / ".snakemake_timestamp"
    if noted.exists() and noted.stat().st_mtime > finished + NOTED_WITHIN:
        seen = noted.stat().st_mtime

    def date(path: Path) -> float:
        with suppress(FileNotFoundError):  # a link to nowhere, or gone meanwhile
            return path.stat().st_mtime
        return 0.0

    every = chain([path], tree(path) if path.is_dir() else ())
    with ThreadPoolExecutor(STATS_AT_ONCE) as pool:
        while some := list(islice(every, 64 * STATS_AT_ONCE)):
            for one, when in zip(some, pool.map(date, some), strict=True):
                if when > seen:
                    return one
    return None


def require_true(source: Source, stages: Sequence[str] = (), results: Path = RESULTS) -> None:
    """Refuse results of these stages, or else of all, that are missing, stale or damaged.

    Raises:
        ArtifactError: naming every such folder, what is wrong with it, and the remedy.
    """
    wanted = [stage for stage in stages_of(source.settings) if stage in stages or not stages]
    stands = standing(source, results)
    found = [problem for stage in wanted for problem in problems(source, stage, results, stands)]
    if found and all(problem.endswith(FOREIGN) for problem in found):
        raise ArtifactError("\n  ".join(["these files stand where only results belong:", *found]))
    if found:
        remedy = f"run `snakemake all --config experiment={source.name}`; if it sees nothing to do, force these stages:"
        force = f"`snakemake --forcerun STAGE -- results/{source.name}/STAGE`"
        head = "these results are missing, or cannot be relied on:"
        raise ArtifactError("\n  ".join([head, *found, f"{remedy} {force}"]))


def problems(
    source: Source, stage: str, results: Path = RESULTS, stands: dict[str, bool] | None = None
) -> Iterator[str]:
    """What is wrong with the result of one stage; nothing if it is complete, current and undamaged.

    `stands` is what `standing` says, if that is known.

    A teacher that was taken from a folder is compared with that folder, if it is here. Videos are not read again: of
    them, the dates count.
    """
    folder = stage_folder(source, stage, results)
    provenance = read_provenance(folder)
    if provenance is None:
        yield f"{folder}: missing or unfinished"
        return
    found = list(departures(source, stage, results))
    yield from found
    stands = standing(source, results) if stands is None else stands
    if not found and stands.get(stage) is False and (other := _reads_elsewhere(source, stage, folder, provenance)):
        yield f"{folder}: {other}"
    for name in upstream(source.settings, stage):
        if read_provenance(above := stage_folder(source, name, results)) is None:
            yield f"{folder}: made from {above}, which is missing or unfinished"
    recorded = provenance["outputs"]
    for name in islice(damaged(folder), SHOWN):
        yield f"{folder / name}: {'damaged' if (folder / name).is_file() else 'missing'}"
    for name in _few(lambda name: name not in recorded, files_of(folder)):
        yield f"{folder / name}: {FOREIGN}"
    if stage == "teacher" and source.settings.teacher.source == "folder":
        origin = Path(source.settings.teacher.path)
        merged = bool(source.settings.teacher.loras)  # then the transformer is not the origin's
        taken = [name for name in recorded if not (merged and name.startswith("transformer/"))]
        for name in _few(lambda n: _is_other(origin / n, recorded[n]), taken):
            yield f"{folder}: made from another {origin / name} than the present one"


def _reads_elsewhere(source: Source, stage: str, folder: Path, provenance: dict) -> str:
    """What is wrong where settings and other stages' results are not: something that a stage reads beside them."""
    settings = source.settings
    if stage == "clips" and (newer := _newer(Path(settings.clips.path), folder, provenance)):
        ahead = newer.stat().st_mtime > time.time()
        return f"{newer} is " + ("dated in the future: `touch` it, and run the stage again" if ahead else "newer")
    return {
        "teacher": settings.teacher.loras
        and f"made with other teacher.loras than the present {', '.join(settings.teacher.loras)}",
        "samples": f"made with another samples.decoder than the present {settings.samples.decoder}",
        "evaluation": "VBench's weights or packages have changed",
    }.get(stage, "")


def _is_other(path: Path, recorded: str) -> bool:
    # The geometry is the experiment's own.
    return path.name != "geometry.json" and path.is_file() and sha256(path) != recorded


def _differences(was: dict, wanted: dict) -> Iterator[tuple[str, tuple]]:
    """Dotted key -> the two values, for the first few keys that differ."""
    old, new = _flat(that_matter(was)), _flat(that_matter(wanted))
    for key in _few(lambda k: old.get(k, _ABSENT) != new.get(k, _ABSENT), sorted(old.keys() | new.keys())):
        yield key, (old.get(key, "nothing"), new.get(key, "nothing"))


def _flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found


def _few(is_wrong: Callable[[str], bool], names: Iterable[str]) -> Iterator[str]:
    """The first few of the wrong ones."""
    return islice(filter(is_wrong, names), SHOWN)
