"""Whether what an experiment takes from outside is there, asked before any job is queued."""

import json
import os
from pathlib import Path

from vpae.artifacts import ArtifactError
from vpae.config.teacher import file_and_strength
from vpae.experiment import Source
from vpae.graph import RESULTS, stage_folder
from vpae.stages import missing_students
from vpae.teacher.folder import faults, header, unsupported

PARTS = ("transformer", "vae", "text_encoder", "image_encoder")
OTHERS = ("model_index.json", "tokenizer", "image_processor", "scheduler")


def missing(source: Source, results: Path = RESULTS) -> list[str]:
    """What is not there, each with its remedy; empty if all is."""
    clips = source.settings.clips
    found = []
    if clips.source != "world" and not Path(clips.path).exists():
        found.append(f"{source.path}: clips.path: {clips.path} does not exist; correct the key, or bring the videos")
    return found + missing_students(source) + missing_teacher(source, results) + _missing_decoder(source)


def _missing_decoder(source: Source) -> list[str]:
    if not (file := source.settings.samples.decoder):
        return []
    from vpae.models.small_decoder import load_small_decoder  # brings torch, which few need here

    try:
        load_small_decoder(file)
    except ArtifactError as error:
        return [f"{source.path}: samples.decoder: {error}"]
    return []


def missing_teacher(source: Source, results: Path = RESULTS) -> list[str]:
    """What is not there of a teacher that is not trained here, each with its remedy."""
    teacher = source.settings.teacher
    if teacher.source == "folder" and (wrong := unsupported(Path(teacher.path))):
        return [f"{source.path}: teacher.path: {problem}" for problem in wrong]
    if teacher.source == "folder" and (lacks := incomplete(Path(teacher.path))):
        return [
            f"{source.path}: teacher.path: {teacher.path} lacks {', '.join(lacks)}; correct the key, `dvc pull` what "
            "DVC versions, or download the model in diffusers format into this folder"
        ]
    if teacher.source == "folder" and (wrong := faults(Path(teacher.path))):
        return [f"{source.path}: teacher.path: {problem}" for problem in wrong]
    if teacher.source == "hub" and not (stage_folder(source, "teacher", results) / "provenance.json").is_file():
        return [f"{source.path}: teacher.path: {problem}" for problem in _hub(teacher.path, teacher.revision)]
    return _taps_beyond(source) + _missing_loras(source)


def _taps_beyond(source: Source) -> list[str]:
    """Which methods' heads look at blocks that the teacher does not have, as far as its size is known."""
    teacher = source.settings.teacher
    layers = teacher.transformer.layers
    if teacher.source == "folder":
        layers = json.loads((Path(teacher.path) / "transformer" / "config.json").read_text())["num_layers"]
    elif teacher.source == "hub":
        return []
    heads = {name: getattr(getattr(source.settings, name), "head", None) for name in source.settings.methods}
    return [
        f"{source.path}: {name}.head.taps = {list(head.taps)}: the teacher has {layers} blocks, 0 to {layers - 1}"
        for name, head in heads.items()
        if head is not None and max(getattr(head, "taps", ()), default=0) >= layers
    ]


def _missing_loras(source: Source) -> list[str]:
    teacher, found = source.settings.teacher, []
    if not teacher.loras:
        return []
    from vpae.models.loras import require_fit  # brings torch, which few need here

    for file, _ in map(file_and_strength, teacher.loras):
        try:
            require_fit(file, Path(teacher.path)) if teacher.source == "folder" else header(file)
        except ArtifactError as error:
            found.append(f"{source.path}: teacher.loras: {error}")
    return found


def incomplete(folder: Path) -> list[str]:
    """Which parts of a `WanImageToVideoPipeline` folder are not there; weights count, shards of an index each."""
    lacks = [name for name in OTHERS if not (folder / name).exists()]
    for part in PARTS:
        here = folder / part
        indices = list(here.glob("*.safetensors.index.json"))
        weights = indices or any(list(here.glob(kind)) for kind in ("*.safetensors", "*.bin"))  # `faults` looks closer
        if not (here / "config.json").is_file() or not weights:
            lacks.append(part)
            continue
        for index in indices:
            try:
                files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):  # cut off, or the pointer of a large file
                lacks.append(f"{part}/{index.name} (this one is damaged)")
                continue
            lacks += [f"{part}/{name}" for name in files if not (here / name).exists()]
    return lacks


def _hub(hub_id: str, revision: str) -> list[str]:
    """A hub repository is there if its snapshot is whole in the local cache, or if the hub answers for that commit."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    remedy = f"run `hf download {hub_id} --revision {revision}` where there is network and the same cache"
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
        if wrong := unsupported(folder):
            return [f"{hub_id}: {problem}" for problem in wrong]
        if not (lacks := incomplete(folder)):
            return []
        state = f"the local cache lacks {', '.join(lacks)}"
    except LocalEntryNotFoundError:
        state = "it is not in the local cache"
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE"):
        return [f"{hub_id}: {state}, and the hub is switched off (HF_HUB_OFFLINE); {remedy}"]
    try:
        files = {sibling.rfilename for sibling in HfApi().model_info(hub_id, revision=revision, timeout=10).siblings}
    except HfHubHTTPError as error:
        return [f"{hub_id}: {state}, and the hub refuses revision {revision} ({_brief(error)}); correct the two keys"]
    except Exception as error:  # every client library below has its own kinds for "no network"
        return [f"{hub_id}: {state}, and the hub does not answer ({_brief(error)}); {remedy}"]
    lacks = [part for part in (*OTHERS, *PARTS) if not any(f == part or f.startswith(f"{part}/") for f in files)]
    if lacks:
        return [f"{hub_id}: no WanImageToVideoPipeline, it lacks {', '.join(lacks)}; name the diffusers form of one"]
    return []


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
