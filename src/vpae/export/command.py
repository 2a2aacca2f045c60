"""`vpae export`: a student in the form another tool reads; the result appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vpae.artifacts import ArtifactError, identity, read_provenance
from vpae.data.names import NAME_BYTES
from vpae.export.card import licence_of, measured, read_facts, read_scores, write_card
from vpae.export.files import write_lora, write_original, write_original_config, write_pipeline, write_served_index
from vpae.models.formats import stored_dtype, stored_weights
from vpae.models.wan import GEOMETRY
from vpae.teacher.folder import faults, read_table, require_whole

FOLDERS = ("diffusers", "vllm-omni")  # the forms that are whole pipelines; the others are one file of weights
ADAPTER = "student_lora.safetensors"  # in a stage's folder, or in the student's


def export(
    model: Path,
    form: str,
    out: Path,
    dtype: str | None = None,
    scores: Path | None = None,
    adapter: Path | None = None,
    steps: int = 1,
) -> Path:
    """Write a model in another form, with its model card.

    Args:
        model: the student's pipeline folder.
        form: one of those of `vpae export --format`.
        out: a folder to make, or, where the form is no pipeline folder, a .safetensors file to make without a card.
        dtype: number format of the trained weights, as torch calls it; as they are stored if not given.
        scores: a scores.json of the evaluation stage, for the card.
        adapter: the adapter's weights; found beside the student if not given.
        steps: network steps of each video, for "vllm-omni".

    Returns:
        `out`.

    Raises:
        FileNotFoundError: there is no such model, adapter or scores file.
        ArtifactError: the result exists, the disk is too small, the model is no student or was changed since its stage
            finished, or the adapter is not its.
    """
    if steps < 1 or (steps > 1 and form != "vllm-omni"):
        raise ArtifactError(f"--steps {steps}: at least 1, and only --format vllm-omni takes more")
    _check(model, form, out)
    facts = _facts(model)
    if scores := scores or find_scores(model):
        facts["scores"] = read_scores(scores) | measured(scores, model)
    source = adapter or find_adapter(model) if form.startswith("lora") else model
    if source != model:
        require_whole(source)
    number_format = getattr(torch, dtype) if dtype else None
    if facts["scores"] and number_format not in (None, stored_dtype(stored_weights(model / "transformer"))):
        facts["scores"]["converted"] = dtype
    require_free_space(out.absolute().parent, needed_bytes(source, form, number_format))
    with appearing(out) as place:
        if form in FOLDERS:
            write_pipeline(model, place, number_format)
            if form == "vllm-omni":
                write_served_index(place, steps)
        else:
            file = place
            if out.suffix != ".safetensors":
                place.mkdir()
                file = place / f"{'diffusion_pytorch_model' if form == 'wan' else 'pytorch_lora_weights'}.safetensors"
            if form == "wan":
                write_original(model, file, number_format, facts)
            else:
                write_lora(source, model, file, form, number_format, facts)
            if form == "wan" and file != place:
                write_original_config(model, place / "config.json")
        if place.is_dir():
            known = (facts[key] for key in ("provenance", "settings", "scores"))
            write_card(place, *known, form, facts["licence"], steps)
    return out


def find_adapter(model: Path) -> Path:
    """The adapter's file of a student trained as a LoRA.

    Raises:
        FileNotFoundError: there is none.
    """
    for folder in (model, model.parent):
        if (folder / ADAPTER).is_file():
            return folder / ADAPTER
    raise FileNotFoundError(
        f"{model}: no {ADAPTER} there or beside it; only a student trained as a LoRA has one: name it with --adapter, "
        "or export with --format diffusers or wan"
    )


def find_scores(model: Path) -> Path | None:
    """scores.json of the evaluation beside a student's stage, if it is this very student that was evaluated."""
    stage = model.resolve().parent
    evaluation = stage.parent / "evaluation"
    made, measured = read_provenance(stage), read_provenance(evaluation)
    if made is None or measured is None or measured["inputs"].get(stage.name) != identity(stage):
        return None
    return evaluation / "scores.json"


def needed_bytes(source: Path, form: str, dtype: torch.dtype | None) -> int:
    """What an export will take on disk, within some kilobytes."""
    if form.startswith("lora"):
        return source.stat().st_size if source.is_file() else 0
    weights = stored_weights(source / "transformer")
    trained = sum(w.values * (dtype or w.dtype).itemsize for w in weights.values())
    if form == "wan":
        return trained
    others = (p for p in source.rglob("*") if p.is_file() and p.relative_to(source).parts[0] != "transformer")
    return trained + sum(p.stat().st_size for p in others)


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling, which becomes `out` if all goes well and vanishes otherwise.

    Raises:
        ArtifactError: `out` exists.
    """
    place = out.with_name(f".{out.name}.tmp")
    _remove(place)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield place
        _refuse_existing(out)
        place.rename(out)
    finally:
        _remove(place)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ArtifactError(f"{out} exists, and export overwrites nothing; choose another --out, or remove it first")


def _check(model: Path, form: str, out: Path) -> None:
    if not (model / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{model} holds no model_index.json: name a pipeline folder, e.g. results/NAME/METHOD/student"
        )
    require_whole(model)
    if found := faults(model):
        raise ArtifactError("\n".join(found))
    _refuse_existing(out)
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ArtifactError(f"--out {out}: {above} is a file; name a place in a folder")
    if len(os.fsencode(out.name)) > NAME_BYTES:
        raise ArtifactError(f"--out {out}: its name is longer than {NAME_BYTES} bytes; choose a shorter one")
    if out.resolve().is_relative_to(model.resolve()):
        raise ArtifactError(f"{out} lies inside the model's own folder {model}; choose an --out elsewhere")
    if form in FOLDERS and out.suffix == ".safetensors":
        raise ArtifactError(f"{out}: --format {form} makes a folder; name one without .safetensors")


def _facts(model: Path) -> dict[str, Any]:
    """What the card can say of a student; its sizes and shift stand in its own files."""
    facts = read_facts(model)
    settings = dict(facts["settings"])
    if (model / GEOMETRY).is_file():
        settings["geometry"] = read_table(model / GEOMETRY)
    scheduler = read_table(model / "scheduler" / "scheduler_config.json")
    if not scheduler.get("stochastic_sampling"):
        raise ArtifactError(
            f"{model} is no student: its scheduler takes many steps; name e.g. results/NAME/METHOD/student"
        )
    settings["teacher"] = {"shift": scheduler["shift"], **settings.get("teacher", {})}
    return {**facts, "settings": settings, "licence": facts.get("licence") or licence_of(model, settings)}


def require_free_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        ArtifactError: naming the folder and the space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < needed_bytes:
        raise ArtifactError(f"{folder}: needs {needed_bytes / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free")
