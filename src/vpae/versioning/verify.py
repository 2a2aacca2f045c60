"""Whether finished results are what the experiment's file, read today, would make.

Neither dates nor any engine's notes count, only content: each folder's provenance says with which settings and from
which inputs it was made and what each of its files hashed to, and all three are compared with what is here now.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from vpae.artifacts import ArtifactError, file_hashes, read_provenance, sha256
from vpae.experiment import Source, load
from vpae.graph import RESULTS, stage_folder, stages_of, upstream
from vpae.standing import SHOWN, departures, standing


def committed(path: Path) -> Source:
    """The experiment as its file alone says: what is versioned must not hang on somebody's environment."""
    return load(path, environment=False)


def require_true(source: Source, stages: Sequence[str] = (), results: Path = RESULTS) -> None:
    """Refuse results of these stages, or else of all, that are missing, stale or damaged.

    Raises:
        ArtifactError: naming every such folder, what is wrong with it, and the remedy.
    """
    wanted = [stage for stage in stages_of(source.settings) if stage in stages or not stages]
    found = [problem for stage in wanted for problem in problems(source, stage, results)]
    if found:
        remedy = f"run `snakemake all --config experiment={source.name}`; if it sees nothing to do, force these stages:"
        force = f"`snakemake --forcerun STAGE -- results/{source.name}/STAGE`"
        raise ArtifactError("\n  ".join(["these results are not to be relied on:", *found, f"{remedy} {force}"]))


def problems(source: Source, stage: str, results: Path = RESULTS) -> Iterator[str]:
    """What is wrong with the result of one stage; nothing if it is complete, current and undamaged.

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
    if not found and standing(source, results).get(stage) is False and (other := _reads_elsewhere(source, stage)):
        yield f"{folder}: {other}"
    for name in upstream(source.settings, stage):
        if read_provenance(above := stage_folder(source, name, results)) is None:
            yield f"{folder}: made from {above}, which is missing or unfinished"
    recorded, present = provenance["outputs"], file_hashes(folder)
    for name in _first(sorted(recorded.keys() | present.keys()), lambda n: recorded.get(n) != present.get(n)):
        what = "missing" if name not in present else "not of this result" if name not in recorded else "damaged"
        yield f"{folder / name}: {what}"
    if stage == "teacher" and source.settings.teacher.source == "folder":
        origin = Path(source.settings.teacher.path)
        merged = bool(source.settings.teacher.loras)  # then the transformer is not the origin's
        taken = [name for name in recorded if not (merged and name.startswith("transformer/"))]
        for name in _first(taken, lambda n: _is_other(origin / n, recorded[n])):
            yield f"{folder}: made from another {origin / name} than the present one"


def _reads_elsewhere(source: Source, stage: str) -> str:
    """What is wrong where settings and other stages' results are not: something that a stage reads beside them."""
    settings = source.settings
    return {
        "clips": f"videos or captions of {settings.clips.path} are newer",
        "teacher": settings.teacher.loras
        and f"made with other teacher.loras than the present {', '.join(settings.teacher.loras)}",
        "samples": f"made with another samples.decoder than the present {settings.samples.decoder}",
        "evaluation": "VBench's weights or packages have changed",
    }.get(stage, "")


def _is_other(path: Path, recorded: str) -> bool:
    # The geometry is the experiment's own.
    return path.name != "geometry.json" and path.is_file() and sha256(path) != recorded


def _first(names, is_wrong) -> Iterator[str]:
    """The first few of the wrong ones: one damaged file says as much as a thousand."""
    shown = 0
    for name in names:
        if shown < SHOWN and is_wrong(name):
            shown += 1
            yield name
