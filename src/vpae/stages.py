"""Running a stage: find its inputs, skip it if it is done, build its folder all or nothing."""

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from types import ModuleType

from vpae.artifacts import (
    PROVENANCE,
    ArtifactError,
    building,
    code_version,
    damaged,
    device_name,
    digest,
    identity,
    locked,
    package_versions,
    read_provenance,
    reading,
    recover,
    write_json,
)
from vpae.config import Experiment
from vpae.distill import METHODS
from vpae.distill.method import TEACHER
from vpae.experiment import ConfigError, Source
from vpae.graph import RESULTS, STAGES, WATCHES, stage_folder, stage_settings, stages_of, that_matter, upstream, without
from vpae.parts import Part
from vpae.standing import departures, made_from
from vpae.training.phase import Collapse

# What takes less memory, to be tried in this order. What a method can switch changes its training: see `vpae plan`.
SMALLER = {
    "latents": ("latents.batch_size=1",),
    "samples": ("samples.batch_size=1", "samples.vae_tiles=true", "samples.vae_dtype=bfloat16"),
    "evaluation": ("samples.vae_tiles=true", "samples.batch_size=1"),
}
# Ends of names in clips and latents: may be terabytes, so that each is hashed when it is read, not before the stage.
BULK = (".tar", ".mp4")


# Settings of a training that change no run: how it is shared out, watched and saved, and when it ends.
SHARES = ("accumulate", "sharding", *WATCHES)
COUNTS = ("train", "held_out")


@dataclass(frozen=True)
class _Task:
    """A stage of one experiment: its folder, what fills it, and all that determines what will be in it."""

    module: ModuleType
    run: Callable[..., dict]
    folder: Path
    settings: dict
    folders: dict[str, Path]
    digests: dict[str, str]
    began: float = field(default_factory=time.time)

    @property
    def state(self) -> Path:
        """Where it keeps what it needs to resume: outside its output, which a workflow may delete.

        The name holds a digest of settings and inputs, so that a state is never taken up under other ones.
        """
        name = self.folder.name
        settings = without(self.settings, SHARES) if name in METHODS else that_matter(self.settings)
        if name == "clips":  # what is rendered or checked already does not depend on how many clips are wanted
            kept = {key: value for key, value in settings["clips"].items() if key not in COUNTS}
            settings = {**settings, "clips": kept}
        key = digest([settings, self.digests])[:12]
        return self.folder.parent / ".state" / f"{self.folder.name}-{key}"

    def is_done(self) -> bool:
        """Whether the result stands already, undamaged; dates and whoever asks for it do not count."""
        provenance = read_provenance(self.folder)
        if provenance is None or provenance["inputs"] != self.digests:
            return False
        if that_matter(provenance["settings"]) != that_matter(self.settings):
            return False
        wrong = damaged(self.folder)
        for name in wrong:
            print(f"vpae: {self.folder / name} is damaged; {self.folder.name} is made anew", file=sys.stderr)
        if not wrong:
            print(f"{self.folder.name}: {self.folder} is up to date (to have it anew, delete it)", file=sys.stderr)
        return not wrong

    @property
    def dead_end(self) -> Path:
        """What says why a training ended that would end so again."""
        return self.state / "dead_end.json"

    @contextmanager
    def not_a_third_time(self) -> Iterator[None]:
        """Let a cluster's retry meet an end a second time, since a GPU may have been at fault, but not a third.

        Raises:
            ArtifactError: it was met twice, in the same words, with the same settings, code and device.
        """
        here = digest([self.settings, code_version(), package_versions(), device_name()])
        with reading(self.dead_end, "delete it"):
            before = json.loads(self.dead_end.read_text()) if self.dead_end.is_file() else {}
        if before.get("with") == here and before["times"] > 1:
            raise ArtifactError(
                f"{before['message']}\nSo the run ended twice, and so it would end again: change the settings, or "
                f"delete {self.dead_end} to try once more from the last state"
            )
        try:
            yield
        except (Collapse, FloatingPointError) as error:
            if os.environ.get("RANK", "0") == "0":
                found = {"message": str(error), "with": here}
                again = found.items() <= before.items()
                self.state.mkdir(parents=True, exist_ok=True)
                write_json(self.dead_end, {**found, "times": 1 + before["times"] if again else 1})
            raise

    def require_whole_inputs(self) -> None:
        """Refuse inputs that have changed since they were finished.

        Raises:
            ArtifactError: naming the first such file.
        """
        for name, folder in self.folders.items():
            if wrong := damaged(folder, partial(_is_left_out, self.folder.name, name)):
                again = f"run its stage again: `vpae {name}` makes it anew" if name in STAGES else "bring it once more"
                raise ArtifactError(f"{folder / wrong[0]} is damaged; {again}")


def _is_left_out(stage: str, name: str, file: str) -> bool:
    """Whether a stage never opens a file of one of its inputs, or hashes it when it does: at 14B it reads 300 GB."""
    if name in ("clips", "latents"):
        return file.endswith(BULK)
    if stage == "latents":
        return file.startswith("transformer/")
    if stage == "report":
        return file.endswith(".safetensors") and not file.startswith(("vae/", "looks/"))
    student = name in METHODS or name not in STAGES
    return stage in ("samples", "evaluation") and student and not file.startswith("student/")


def missing_students(source: Source) -> list[str]:
    """Which students that were trained before are not there, or not this experiment's, each with its remedy."""
    found, shift = [], source.settings.teacher.shift
    for name, folder in source.settings.students.items():
        if not all((Path(folder) / file).is_file() for file in (PROVENANCE, "student/model_index.json")):
            found.append(
                f"{source.path}: students.{name}: {folder} is no finished folder of a method's stage; correct the key, "
                "or `dvc pull` what DVC versions"
            )
        elif (other := read_provenance(Path(folder))["settings"].get("teacher", {}).get("shift", shift)) != shift:
            found.append(
                f"{source.path}: students.{name}: {folder} was trained with teacher.shift = {other:g}, and here it is "
                f"{shift:g}; set it to {other:g}"
            )
    return found


def _require_own_teacher(source: Source, teacher: Path) -> None:
    """Refuse students that were trained before with other encoders: text, image and latents are other ones to them."""
    wanted = _encoder_weights(teacher, "")
    for name, folder in source.settings.students.items():
        if _encoder_weights(Path(folder), "student/") != wanted:
            raise ConfigError(
                f"{source.path}: students.{name}: {folder} was trained with another VAE, text or image encoder than "
                "this experiment's teacher has; set `teacher` as it was there"
            )


def _require_unseen(source: Source, held_out: set[str], results: Path) -> None:
    """Refuse students that were trained on clips held out here: their scores would be those of what they know.

    A clip of the procedural world belongs to one split of one seed, and can be in no other.
    """
    for name, folder in source.settings.students.items():
        trained_on = read_provenance(Path(folder))["inputs"].get("latents")
        places = {*results.glob("*/latents"), *Path(folder).parent.parent.glob("*/latents")}
        place = next((p for p in sorted(places) if _is(p, trained_on)), None)
        if place is None:
            print(
                f"vpae: students.{name}: the latents that {folder} was trained on are not here: it cannot be checked "
                "that none of them is held out in this experiment",
                file=sys.stderr,
            )
        elif known := held_out & _hashes(place, "train"):
            raise ConfigError(
                f"{source.path}: students.{name}: {len(known)} of the {len(held_out)} held-out clips are among those "
                f"that {folder} was trained on ({place}), and their scores would flatter it; hold out as many clips of "
                "the same videos as that training did, or other clips"
            )


def _hashes(folder: Path, split: str) -> set[str]:
    """Of the files of a split's clips, as a finished folder of clips or latents has them."""
    from vpae.data.index import INDEX, read_index  # brings pyarrow, of which the workflow's planning has no need
    from vpae.data.manifest import MANIFEST, iterate_manifest

    if (folder / MANIFEST).is_file():
        return {clip.sha256 for clip in iterate_manifest(folder, split)}
    with reading(folder / INDEX, "run the stage latents again"):
        return {*read_index(folder / INDEX, split)[1].table["clip_sha256"].to_pylist()}


def _is(folder: Path, wanted: str | None) -> bool:
    """Whether a folder is a finished one of this identity; of other experiments' some may be damaged or locked away."""
    try:
        return identity(folder) == wanted
    except (ArtifactError, OSError):
        return False


def _encoder_weights(folder: Path, prefix: str) -> set[str]:
    """Hashes of the weights around the transformer, from a finished folder's provenance."""
    places = tuple(f"{prefix}{network}/" for network in ("vae", "text_encoder", "image_encoder"))
    outputs = read_provenance(folder)["outputs"].items()
    return {value for file, value in outputs if file.startswith(places) and file.endswith(".safetensors")}


def _task(source: Source, stage: str, results: Path) -> _Task:
    if stage not in stages_of(source.settings):
        raise ConfigError(
            f"{source.path}: methods: {stage} is not among {', '.join(source.settings.methods)}; add it, for instance "
            f"`--set methods.{stage}={TEACHER}`"
        )
    if problems := missing_students(source):
        raise ConfigError("\n".join(problems))
    above = made_from(source.settings, stage)
    if problems := [one for name in above for one in departures(source, name, results)]:
        raise ArtifactError(
            "\n  ".join([f"{stage} would be made from results that are not what {source.path} says:", *problems])
            + "\nrun their stages again, in this order, or set these keys as they were"
        )
    folder, began = stage_folder(source, stage, results), time.time()
    recover(folder)
    settings = stage_settings(source.settings, stage)
    folders = {name: stage_folder(source, name, results) for name in upstream(source.settings, stage)}
    digests = {name: identity(path) for name, path in folders.items()}
    if TEACHER in folders and folders.keys() & source.settings.students.keys():
        _require_own_teacher(source, folders[TEACHER])
    clips = folders.get("clips", folders.get("latents"))  # clips are there before they are encoded
    if clips and source.settings.students and source.settings.clips.source != "world":
        _require_unseen(source, _hashes(clips, "held_out"), results)
    module = importlib.import_module(STAGES[stage].module)
    if hasattr(module, "external_inputs"):
        digests |= module.external_inputs(source.settings)
    run = partial(module.run, stage) if stage in METHODS else module.run
    return _Task(module, run, folder, settings, folders, digests, began)


@contextmanager
def _with_advice(source: Source, stage: str) -> Iterator[None]:
    """Say which settings take less memory where it is exhausted.

    Raises:
        ConfigError: in place of the allocator's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        from vpae.out_of_memory import exhausted_memory  # brings torch

        if (whose := exhausted_memory(error)) is None:
            raise
        place = "the GPU" if whose == "gpu" else "this machine"
        ways = " or ".join(way for way in SMALLER.get(stage, ()) if not _is_set(source.settings, way))
        raise ConfigError(
            f"{source.path}: the stage {stage} ran out of the memory of {place}. {f'Set {ways}; ' if ways else ''}"
            f"`vpae plan --config {source.path}` says what each stage takes, and what makes a method fit\n"
            f"({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from error


def _is_set(settings: Experiment, way: str) -> bool:
    key, _, value = way.partition("=")
    return str(reduce(getattr, key.split("."), settings)).lower() == value


def run_stage(source: Source, stage: str, results: Path = RESULTS) -> Path:
    """Run one stage unless it is done.

    Each stage's module has `run(settings, inputs, out, state) -> counts`: a function of the experiment, the folders of
    the stages it reads, the folder to fill and a folder for resumable state.

    Returns:
        the stage's folder.

    Raises:
        ArtifactError: an input is missing or damaged, or another process, perhaps one that runs a part, is at work on
            the stage; or it is a training that ended twice in the same way.
        ConfigError: memory is exhausted; names the settings that take less.
    """
    task = _task(source, stage, results)
    if task.is_done():
        return task.folder
    rank = int(os.environ.get("RANK", "0"))  # of several processes of torchrun
    if rank and (stage not in METHODS or int(os.environ.get("WORLD_SIZE", "1")) < 2):
        raise ConfigError(
            f"RANK = {rank} is set, as in one of several processes that train together, but {stage} runs in one "
            "process: unset RANK"
        )
    trains = stage in METHODS or (stage == TEACHER and source.settings.teacher.source == "train")
    with task.not_a_third_time() if trains else nullcontext():
        _run(source, stage, task, trains, rank)
    return task.folder


def _run(source: Source, stage: str, task: _Task, trains: bool, rank: int) -> None:
    if rank:  # the first process writes the folder
        with tempfile.TemporaryDirectory() as nowhere, _with_advice(source, stage):
            task.run(source.settings, task.folders, Path(nowhere), task.state)
        return
    task.require_whole_inputs()
    # An unfinished training may hold weeks of GPUs, which are nobody's but the user's to throw away.
    others = sorted(set(task.state.parent.glob(f"{stage}-*")) - {task.state})
    spent = [task.state] if trains else [task.state, *others]
    for other in filter(Path.is_dir, others if trains else ()):
        print(f"vpae: {other}: an unfinished run under other settings; delete it once it is of no use", file=sys.stderr)
    built = building(task.folder, task.settings, task.digests, spent=spent, began=task.began)
    with _with_advice(source, stage), built as (out, counts):
        counts.update(task.run(source.settings, task.folders, out, task.state) or {})


def run_part(source: Source, stage: str, part: Part, results: Path = RESULTS) -> None:
    """Do one part of a stage's work and leave it in the state folder, unless the stage is done.

    Parts may run at the same time, but not beside `run_stage`. The modules of stages that can be cut have
    `part(settings, inputs, state, part)`: it fills the state folder of `run` with its share of the work. What others
    write there, perhaps the same things, they write at the same time.

    Raises:
        ArtifactError: an input is missing or damaged, or another process is at work on the whole stage.
    """
    task = _task(source, stage, results)
    with locked(task.folder, shared=True):
        if not task.is_done():
            task.require_whole_inputs()
            task.state.mkdir(parents=True, exist_ok=True)
            with _with_advice(source, stage):
                task.module.part(source.settings, task.folders, task.state, part)
