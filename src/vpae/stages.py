"""Running a stage: find its inputs, skip it if it is done, build its folder all or nothing."""

import importlib
import os
import shutil
import sys
from pathlib import Path

from vpae.artifacts import ArtifactError, building, digest, identity, is_finished
from vpae.experiment import RESULTS, Source, stage_folder, stage_settings, upstream

FUNCTIONS = {
    "clips": "vpae.data.catalog",
    "teacher": "vpae.teacher.stage",
    "latents": "vpae.data.latents",
    "priming": "vpae.distill.priming",
    "equilibrium": "vpae.distill.equilibrium",
    "samples": "vpae.sampling",
    "evaluation": "vpae.evaluation.stage",
    "report": "vpae.report.page",
}


def state_folder(folder: Path, settings: dict, inputs: dict[str, str]) -> Path:
    """Where a stage keeps what it needs to resume: outside its output, which a workflow may delete.

    The name holds a digest of settings and inputs, so that a state is never taken up under other ones.
    """
    return folder.parent / ".state" / f"{folder.name}-{digest([settings, inputs])[:12]}"


def run_stage(source: Source, stage: str, results: Path = RESULTS) -> Path:
    """Run one stage unless it is done.

    Each stage's module has `run(settings, inputs, out, state) -> counts`: a function of the experiment, the folders of
    the stages it reads, the folder to fill and a folder for resumable state.

    Returns:
        the stage's folder.

    Raises:
        ArtifactError: an input is missing.
    """
    folder = stage_folder(source, stage, results)
    settings = stage_settings(source.settings, stage)
    folders = {name: stage_folder(source, name, results) for name in upstream(source.settings, stage)}
    digests = {name: identity(path) for name, path in folders.items()}
    module = importlib.import_module(FUNCTIONS[stage])
    if hasattr(module, "external_inputs"):
        digests |= module.external_inputs(source.settings)
    if is_finished(folder, settings, digests):
        print(f"{stage}: {folder} is up to date", file=sys.stderr)
        return folder
    state = state_folder(folder, settings, digests)
    with building(folder, settings, digests) as (out, counts):
        counts.update(module.run(source.settings, folders, out, state) or {})
    for old in state.parent.glob(f"{stage}-*"):
        shutil.rmtree(old)
    return folder


def require_free_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        ArtifactError: naming the folder and the space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < needed_bytes:
        raise ArtifactError(f"{folder}: needs {needed_bytes / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free")
