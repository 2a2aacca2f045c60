"""Whether a finished result is what its experiment would make now: settings and hashes count, never dates or notes."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from vbench_i2v.files import tree
from vpae.artifacts import PROVENANCE, identity, read_provenance, recover
from vpae.config import Experiment
from vpae.distill.method import TEACHER
from vpae.experiment import Source
from vpae.graph import RESULTS, stage_folder, stage_settings, stages_of, that_matter, upstream
from vpae.teacher.folder import decoder_inputs, external_inputs

NOTED_WITHIN = 120.0  # seconds after its end Snakemake has noted the end of a job
SHOWN = 3  # of many keys that differ
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
    they must not be newer than their catalogue.
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
                or (stage == "clips" and outside and _is_newer(Path(settings.clips.path), folder, provenance))
            )
    return {stage: stands for stage, stands in found.items() if stage not in settings.students}


def _is_newer(path: Path, folder: Path, provenance: dict) -> bool:
    """Whether a file or anything in a folder is newer than the beginning of the run that read it.

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
    return any(p.exists() and p.stat().st_mtime > seen for p in [path, *(tree(path) if path.is_dir() else ())])


def _differences(was: dict, wanted: dict) -> Iterator[tuple[str, tuple]]:
    """Dotted key -> the two values, for the first few keys that differ."""
    old, new = _flat(that_matter(was)), _flat(that_matter(wanted))
    differ = [key for key in sorted(old.keys() | new.keys()) if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
    for key in differ[:SHOWN]:
        yield key, (old.get(key, "nothing"), new.get(key, "nothing"))


def _flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found
