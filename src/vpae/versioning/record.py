"""Recording in dvc.lock what Snakemake made, and restoring it such that Snakemake takes it for its own."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from vpae.artifacts import ArtifactError, reading
from vpae.experiment import Source
from vpae.graph import owner, stage_folder, stages_of
from vpae.versioning import engines
from vpae.versioning.tables import metrics_folder, settings_file, write_metrics, write_settings
from vpae.versioning.verify import require_true


def record(source: Source, stages: Sequence[str] = ()) -> list[str]:
    """Commit an experiment's results to DVC's cache and dvc.lock, if they are all true.

    `dvc commit` alone records whatever is on disk as the result of the present settings. So it comes last: first the
    content of every stage is checked against its provenance, then Snakemake must have nothing to do and know why.

    Args:
        source: the experiment; stages that an overlay leaves alone are its base's.
        stages: which of them to commit, if not all; all are checked.

    Returns:
        the names of the committed stages of dvc.yaml.

    Raises:
        ArtifactError: something is missing, stale or damaged; nothing was recorded.
    """
    targets = _targets(source, stages)
    require_true(source)
    engines.require_nothing_to_do(source.name)
    for experiment in _owners(source):
        write_settings(experiment, settings_file(experiment))
    write_metrics(source, metrics_folder(source))
    engines.must("dvc", "commit", "--force", *targets)
    return targets


def restore(source: Source, pull: bool = True, remote: str | None = None) -> list[str]:
    """Bring an experiment's recorded results here and make Snakemake take them for up to date: pull, check, touch.

    In this order, because a touch makes stale results look fresh.

    Args:
        source: the experiment.
        pull: get them from a remote; else what is here, say after `dvc checkout`, is checked and touched.
        remote: which one; default: DVC's own.

    Returns:
        the folders.

    Raises:
        ArtifactError: what is in the remote, or here, is not what it says.
    """
    folders = sorted({str(stage_folder(source, stage)) for stage in stages_of(source.settings)})
    if pull:
        given = _given_files(source)
        targets = [*_recorded(_targets(source)), *given]
        engines.pull(remote, targets, [*folders, *(file.removesuffix(".dvc") for file in given)])
        code, _ = engines.run("dvc", "status", "--quiet", *targets)
        if code:
            _, changes = engines.run("dvc", "status", *targets)
            raise ArtifactError(
                "dvc.lock was recorded for other settings or inputs than the present ones; `git checkout` those that "
                f"belong to it:\n{changes.strip()}"
            )
    require_true(source)
    engines.touch(source.name)
    return folders


def _owners(source: Source) -> list[Source]:
    """The experiment and those of its bases in whose folders its results stand."""
    found = {owner(source, stage).name: owner(source, stage) for stage in stages_of(source.settings)}
    return list(({source.name: source} | found).values())


def _targets(source: Source, stages: Sequence[str] = ()) -> list[str]:
    """The experiment's stages in dvc.yaml.

    Raises:
        ArtifactError: dvc.yaml does not have them.
    """
    with reading(Path("dvc.yaml"), "`git checkout dvc.yaml`, or write it anew with `vpae dvc`"):
        versioned = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]["settings"]["foreach"]
    if lacking := [experiment.name for experiment in _owners(source) if experiment.name not in versioned]:
        names = " ".join(dict.fromkeys([*versioned, *lacking]))
        raise ArtifactError(
            f"dvc.yaml: there is no {', '.join(lacking)}; write it anew with `vpae dvc {names} --out dvc.yaml`"
        )
    targets = [
        f"{stage}@{owner(source, stage).name}" for stage in stages_of(source.settings) if stage in stages or not stages
    ]
    return [*targets, *(f"settings@{experiment.name}" for experiment in _owners(source)), f"metrics@{source.name}"]


def _recorded(targets: list[str]) -> list[str]:
    """The same, if dvc.lock has them all.

    Raises:
        ArtifactError: it does not.
    """
    lock = Path("dvc.lock")
    known = yaml.safe_load(lock.read_text())["stages"] if lock.is_file() else {}
    if unknown := [name for name in targets if name not in known]:
        whole = ", ".join(sorted(name.partition("@")[2] for name in known if name.startswith("metrics@"))) or "none"
        raise ArtifactError(
            f"dvc.lock: {', '.join(unknown)} were never recorded (it has results of: {whole}); make them by `snakemake "
            "all --config experiment=NAME`, then `vpae record`"
        )
    return targets


def _given_files(source: Source) -> list[str]:
    """The DVC files of the teacher and students that are not made here, as far as there are any."""
    teacher = source.settings.teacher
    folders = [*source.settings.students.values(), *([teacher.path] if teacher.source == "folder" else [])]
    return [file for folder in folders if Path(file := f"{folder}.dvc").is_file()]
