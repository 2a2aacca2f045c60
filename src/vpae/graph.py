"""The stages of an experiment: the one table of them, what each reads, and in whose folder its result stands.

A stage whose settings, and whose upstream's settings, equal a base experiment's is the base's stage: an overlay re-runs
only what it changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vpae.artifacts import digest
from vpae.config import Experiment
from vpae.distill import METHODS
from vpae.distill.method import TEACHER
from vpae.experiment import Source

RESULTS = Path("results")
# Settings by which a training is only watched and saved: its student is the same.
WATCHES = ("checkpoint_every", "stop_after_skipped", "log_every", "monitor")
# Keys that change nothing where they are empty or off: results from before there were these keys stay what they are.
NEWER = {
    "loras",
    "logits_at_once",
    "decoder",
    "few_step",
    "few_step_shift",
    "shift",
    "relativistic",
    "videos",
    "vae_tiles",
    "own",
}


@dataclass(frozen=True)
class Stage:
    """What the command line, the workflow and DVC know of a stage.

    Attributes:
        about: what it does, for people.
        module: has `run(settings, inputs, out, state)`; that of the methods takes the method's name before these.
        reads: the stages whose folders it reads, in an experiment.
        sections: the settings that determine its result, beside the seed.
        unused: keys of these sections that change no result, as pydantic's `exclude` has them.
        shift: whether the teacher's timestep shift counts.
        divisible: its work can be cut into parts; its module has `part`.
    """

    about: str
    module: str
    reads: Callable[[Experiment], tuple[str, ...]]
    sections: tuple[str, ...]
    unused: dict | None = None
    shift: bool = False
    divisible: bool = False


def _models(settings: Experiment) -> list[str]:
    return sorted({TEACHER, *(row.model for row in settings.samples.rows.values())})


def _method(name: str) -> Stage:
    def reads(settings: Experiment) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("latents", TEACHER, METHODS[name].start_of(settings))))

    return Stage(f"train a student: {METHODS[name].about}", "vpae.distill.run", reads, (name,), shift=True)


STAGES: dict[str, Stage] = {
    "clips": Stage(
        "gather videos and captions, checked and at one size",
        "vpae.data.catalog",
        lambda s: (),
        ("geometry", "clips"),
        unused={"clips": {"workers"}},
        divisible=True,
    ),
    "teacher": Stage(
        "fetch, link or train the model that is distilled",
        "vpae.teacher.stage",
        lambda s: ("clips",) if s.teacher.source == "train" else (),
        ("geometry", "teacher"),
        unused={"teacher": {"architecture"}},  # for planning only
    ),
    "latents": Stage(
        "encode clips, first frames and captions",
        "vpae.data.latents",
        lambda s: ("clips", TEACHER),
        ("geometry", "latents"),
        divisible=True,
    ),
    **{name: _method(name) for name in METHODS},
    "samples": Stage(
        "make the videos of every row of the tables",
        "vpae.sampling.stage",
        lambda s: ("latents", *_models(s)),
        ("samples", "geometry"),
        shift=True,
        divisible=True,
    ),
    "evaluation": Stage(
        "score these videos; with a WORD: VBench-I2V for any folder",
        "vpae.evaluation.stage",
        lambda s: ("clips", "latents", *_models(s), "samples"),
        ("evaluation",),
        unused={"evaluation": {"vbench": {"weights"}}},
        shift=True,
        divisible=True,
    ),
    "report": Stage("write one page with all of it", "vpae.report.page", lambda s: stages_of(s)[:-1], ("report",)),
}


def stages_of(settings: Experiment) -> tuple[str, ...]:
    """The stages of an experiment, in an order in which they can run; methods come in the order of their chains."""
    methods = sorted(settings.methods, key=lambda name: len(settings.chain(name)))
    before = ("clips", TEACHER, "latents")
    return (*before, *methods, *(stage for stage in STAGES if stage not in before and stage not in METHODS))


def upstream(settings: Experiment, stage: str) -> tuple[str, ...]:
    """The stages and given students whose folders a stage reads."""
    return STAGES[stage].reads(settings)


def stage_settings(settings: Experiment, stage: str) -> dict:
    """Plain values of the sections a stage reads, and the seed."""
    unused = STAGES[stage].unused
    if stage == TEACHER and settings.teacher.source != "train":
        # The sizes of a network that is not trained here change nothing.
        unused = {"teacher": {"architecture", "vae", "encoders", "transformer"}}
    included = {"seed", *STAGES[stage].sections}
    values = _without_newer(settings.model_dump(mode="json", include=included, exclude=unused))
    if STAGES[stage].shift:
        values["teacher"] = {"shift": settings.teacher.shift}
    return values


def that_matter(settings: dict) -> dict:
    """A stage's settings without `WATCHES`."""
    return without(settings, WATCHES)


def without(settings: dict, keys: Sequence[str]) -> dict:
    """A stage's settings without some keys of its trainings, a method's or the several of a teacher."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            dropped = keys if name.endswith("training") else ()
            value = without({key: inner for key, inner in value.items() if key not in dropped}, keys)
        found[name] = value
    return found


def _without_newer(values: dict) -> dict:
    """Settings without the newer keys that are off, however deep they stand."""
    parts = {key: _without_newer(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in parts.items() if value or key not in NEWER}


def fingerprint(settings: Experiment, stage: str) -> str:
    """Digest of everything in the configuration that determines a stage's result; of a given student, its folder."""
    return _fingerprints(settings)[stage]


def _fingerprints(settings: Experiment) -> dict[str, str]:
    found = {name: digest(["student", folder]) for name, folder in settings.students.items()}
    for stage in stages_of(settings):
        above = {name: found[name] for name in upstream(settings, stage)}
        found[stage] = digest([stage, stage_settings(settings, stage), above])
    return found


def owner(source: Source, stage: str) -> Source:
    """The experiment in whose folder a stage's result stands: the furthest base that has it, of the same settings."""
    return _owners(source)[stage]


@cache
def _owners(source: Source) -> dict[str, Source]:
    """Stage -> its owner.

    A base's result is taken only with all that it was made from: of two bases beside each other, each may have made
    what a third needs, from an equal training of its own. Which base has the most in common comes first.
    """
    wanted = _fingerprints(source.settings)
    bases = [(_owners(base), _fingerprints(base.settings)) for base in source.ancestors()]
    bases.sort(key=lambda base: -sum(base[1].get(stage) == wanted[stage] for stage in wanted))
    found: dict[str, Source] = {}
    for stage in stages_of(source.settings):
        above = [name for name in upstream(source.settings, stage) if name in found]
        found[stage] = source
        for theirs, has in bases:
            if has.get(stage) == wanted[stage] and all(theirs[name].name == found[name].name for name in above):
                found[stage] = theirs[stage]
                break
    return found


def stage_folder(source: Source, stage: str, results: Path = RESULTS) -> Path:
    """Where the result of a stage, or a student that was trained before, stands."""
    if stage in source.settings.students:
        return Path(source.settings.students[stage])
    return results / owner(source, stage).name / stage
