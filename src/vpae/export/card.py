"""The model card: README.md beside a student's weights, and card.json, from which it is written.

The stage writes what it knows (settings, inputs, licence); `vpae export` adds scores and how to load the form at hand.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
import yaml

import vpae
from vpae.artifacts import (
    PROVENANCE,
    ArtifactError,
    identity,
    package_versions,
    read_provenance,
    reading,
    sha256,
    write_json,
    written,
)
from vpae.config.teacher import file_and_strength
from vpae.distill import METHODS
from vpae.evaluation.statistics import cell, markdown
from vpae.models.wan import GEOMETRY

CARD = "README.md"
FACTS = "card.json"
OWN_LICENCE = "apache-2.0"  # see LICENSE; also that of Wan2.1's weights
PAPER = "https://arxiv.org/abs/2508.21019"
STATED = ("code", "inputs", "packages")  # of a provenance; the rest is about the machine it was made on
TRAINED_AS = ("seed", "geometry", *METHODS)  # of the settings
RELEASED = {"frames": 81, "height": 480, "width": 832, "fps": 16}  # what Wan2.1-I2V-14B-480P was made for


def stage_provenance(inputs: Mapping[str, Path]) -> dict[str, Any]:
    """What a stage knows of a student before its folder is finished: code, packages, and a digest of each input.

    The commit is left to provenance.json, so that the same training gives the same files at every commit.
    """
    return {
        "code": {"version": vpae.__version__},
        "inputs": {name: identity(folder) for name, folder in inputs.items()},
        "packages": package_versions(),
    }


def write_card(
    folder: Path,
    provenance: Mapping[str, Any],
    settings: Mapping[str, Any],
    scores: Mapping[str, Any] | None = None,
    form: str = "diffusers",
    licence: Mapping[str, str] | None = None,
    steps: int = 1,
) -> None:
    """Write README.md and card.json into a folder whose weights are complete.

    Args:
        folder: where the weights are.
        provenance: `code`, `inputs` and `packages`, as `stage_provenance` or a provenance.json gives them.
        settings: resolved sections of the experiment, as plain values.
        scores: content of the evaluation stage's scores.json, and what `measured` adds to it.
        form: which kind of files the folder holds, one of those of `vpae export --format`.
        licence: front matter (`license`, ...); found out from folder and settings if not given.
        steps: network evaluations of each video; more than one only where the form says so to its reader.
    """
    licence = dict(licence or licence_of(folder, settings))
    facts, settings = stated(provenance), _public(settings)
    weights = {p.relative_to(folder).as_posix(): sha256(p) for p in _weights(folder)}
    write_json(
        folder / FACTS,
        {"licence": licence, "provenance": facts, "settings": settings, "scores": scores, "weights": weights},
    )
    text = _template().render(
        front=yaml.safe_dump(_front(settings, form, licence, steps), sort_keys=False),
        base=base_model(settings),
        loras=_merged(settings),
        form=form,
        steps=steps,
        paper=PAPER,
        geometry={**RELEASED, **_geometry(folder, settings)},
        known_geometry=bool(_geometry(folder, settings)),
        shift=_shift(settings),
        trained=yaml.safe_dump(settings, sort_keys=False) if METHODS.keys() & settings.keys() else "",
        methods=[METHODS[name].described(settings[name]) for name in settings if name in METHODS],
        table=_table(scores),
        conditions=_conditions(scores),
        weights=weights,
        licence=licence,
        **{"code": {}, "inputs": {}, "packages": {}, **facts},
    )
    # Not into the old file: a student's folder is made of hard links, and that README is the teacher's as well.
    with written(folder / CARD) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_facts(model: Path) -> dict[str, Any]:
    """What is known of a model: its card.json, or else the provenance of the stage in whose folder it stands.

    Returns:
        `provenance`, `settings`, `scores` and perhaps `licence`, each empty where nothing is known.
    """
    if (model / FACTS).is_file():
        with reading(model / FACTS, "copy the model again, or delete this file"):
            facts = json.loads((model / FACTS).read_text())
            return {**facts, "provenance": {**facts["provenance"]}, "settings": {**facts["settings"]}}
    for folder in (model, model.parent):
        if (folder / PROVENANCE).is_file():
            known = read_provenance(folder)
            return {"provenance": stated(known), "settings": known.get("settings", {}), "scores": None}
    return {"provenance": {}, "settings": {}, "scores": None}


def stated(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a provenance that a card states."""
    return {key: provenance[key] for key in STATED if key in provenance}


def read_scores(path: Path) -> dict[str, Any]:
    """The content of a scores.json.

    Raises:
        FileNotFoundError: no such file.
        ArtifactError: it holds no rows of scores.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `vpae evaluation` writes it to results/EXPERIMENT/evaluation/")
    with reading(path, "it is no scores.json of the evaluation stage: name one"):
        scores = json.loads(path.read_text())
        if not isinstance(scores, dict) or not isinstance(scores.get("rows"), dict):
            raise ArtifactError(f'{path} has no "rows" of scores; name a scores.json of the evaluation stage')
        _table(scores), _conditions(scores)
    return scores


def measured(scores: Path, model: Path) -> dict[str, Any]:
    """What the folder of a scores.json says of how it was measured, where it says so; empty for any other place.

    Args:
        scores: the file.
        model: a student's pipeline folder.

    Returns:
        `device`, the machine on which latencies were measured, and `student`, the names of the student's rows.
    """
    found: dict[str, Any] = {}
    with suppress(ArtifactError, AttributeError, KeyError, TypeError):  # somebody else's files may lie there
        evaluation, stage = scores.resolve().parent, model.resolve().parent
        if (made := read_provenance(evaluation)) is None:
            return found
        if device := made.get("host", {}).get("device"):
            found["device"] = device
        student = identity(stage)
        names = [name for name, value in made["inputs"].items() if value == student]
        samples = evaluation.parent / "samples"
        if names and made["inputs"]["samples"] == identity(samples):
            rows = read_provenance(samples)["settings"]["samples"]["rows"]
            found["student"] = [name for name, row in rows.items() if row["model"] in names]
    return found


def licence_of(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The licence of a model's weights, as a card's front matter names it: the base model's, where it is known.

    What was trained here, from nothing, has this project's own.
    """
    front = _front_matter(folder / CARD)
    stated = {key: str(front[key]) for key in ("license", "license_name", "license_link") if key in front}
    if "license" in stated:
        return stated
    teacher = _origin(settings.get("teacher", {}))
    if teacher.get("source") == "train" or str(teacher.get("path", "")).startswith("Wan-AI/"):
        return {"license": OWN_LICENCE}
    return {"license": "other", "license_name": "that-of-the-base-model"}


def _origin(teacher: Mapping[str, Any]) -> Mapping[str, Any]:
    """A teacher's settings; of a folder that a stage `teacher` made, those that it was made with."""
    with suppress(Exception):  # somebody else's provenance, for instance
        if teacher.get("source") == "folder" and (made := read_provenance(Path(teacher["path"]))):
            return _origin({**made["settings"]["teacher"]})
    return teacher


def _front_matter(card: Path) -> dict[str, Any]:
    """The front matter of somebody's README; empty where there is none that can be read."""
    try:
        found = yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1])
    except Exception:  # whatever people write there, it is not worth a training
        return {}
    return found if isinstance(found, dict) else {}


def base_model(settings: Mapping[str, Any]) -> str:
    """The hub id of the distilled teacher; empty for a teacher that is not on the hub."""
    teacher = settings.get("teacher", {})
    return teacher.get("path", "") if teacher.get("source") == "hub" else ""


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vpae.export", "."),
        autoescape=False,  # Markdown, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("card.md.j2")


def _front(settings: Mapping[str, Any], form: str, licence: Mapping[str, str], steps: int) -> dict[str, Any]:
    base, kind = base_model(settings), "few-step" if steps > 1 else "one-step"
    is_lora = "lora" in form
    return {
        **licence,
        **({"base_model": base, "base_model_relation": "adapter" if is_lora else "finetune"} if base else {}),
        "pipeline_tag": "image-to-video",
        "library_name": "diffusers",
        "tags": ["v-pae", kind, "distillation", "wan2.1", *(["lora"] if is_lora else [])],
    }


def _geometry(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    if (folder / GEOMETRY).is_file():
        return json.loads((folder / GEOMETRY).read_text())
    return settings.get("geometry", {})


def _shift(settings: Mapping[str, Any]) -> float | None:
    """That of the sampler of the last method's student, which is the teacher's where it has none of its own."""
    last = [settings[name] for name in settings if name in METHODS][-1:]
    own = last[0].get("few_step_shift") if last else None
    return settings.get("teacher", {}).get("shift") if own is None else own


def _public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a card needs; paths on the machine it was made on are not among them, nor is a LoRA's folder.

    Gives the same for what it has given.
    """
    teacher = settings.get("teacher", {})
    names = ("source", "path", "revision", "shift") if teacher.get("source") == "hub" else ("source", "shift")
    kept = {name: value for name, value in settings.items() if name in TRAINED_AS}
    public = {name: teacher[name] for name in names if name in teacher}
    if teacher.get("loras"):
        merged = map(file_and_strength, teacher["loras"])
        public["loras"] = [f"{file.name}:{strength}" for file, strength in merged]
    return {"teacher": public, **kept}


def _merged(settings: Mapping[str, Any]) -> str:
    """The LoRAs in the teacher's transformer, of public settings, as a sentence has them; empty without any."""
    loras = map(file_and_strength, settings.get("teacher", {}).get("loras", ()))
    return ", ".join(f"`{file}` at strength {strength:g}" for file, strength in loras)


def _table(scores: Mapping[str, Any] | None) -> str:
    """One line a row, as the evaluation's own table has it; whatever was measured, in its own order."""
    rows = (scores or {}).get("rows", {})
    if not rows:
        return ""
    metrics = list(dict.fromkeys(metric for values in rows.values() for metric in values))
    nfe = (scores or {}).get("nfe", {})
    return markdown(
        ["row", "NFE", *metrics],
        (
            [name, str(nfe.get(name, "")), *(cell(values.get(metric), metric) for metric in metrics)]
            for name, values in rows.items()
        ),
    )


def _conditions(scores: Mapping[str, Any] | None) -> str:
    """How a table's figures came about, as far as it is known, as sentences."""
    known, said = scores or {}, []
    if videos := known.get("videos"):
        decoded = min(known.get("decoded", videos), videos)
        said.append(f"Each row has {videos} videos, {decoded} of them decoded for what is measured on frames.")
    timed = any(metric.startswith("latency") for values in known.get("rows", {}).values() for metric in values)
    if (device := known.get("device")) and timed:
        said.append(f"Latencies were measured on {device}.")
    if rows := known.get("student"):
        said.append(f"This student's: {', '.join(rows)}.")
    if dtype := known.get("converted"):
        said.append(f"It was measured before its weights became {dtype}.")
    return " ".join(said)


def _weights(folder: Path) -> list[Path]:
    """The files that hold what was trained: the transformer's, or an exported file's."""
    trained = folder / "transformer"
    return sorted((trained if trained.is_dir() else folder).glob("*.safetensors"))
