"""Recording in dvc.lock what Snakemake made, and restoring it such that Snakemake takes it for its own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from vpae.artifacts import ArtifactError, reading
from vpae.experiment import Source
from vpae.graph import owner, stage_folder, stages_of
from vpae.standing import require_true
from vpae.versioning.pipeline import metrics_folder, owners, settings_file, write_metrics, write_settings


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
    _require_inside(source)
    require_true(source)
    _require_nothing_to_do(source.name)
    for experiment in owners(source).values():
        write_settings(experiment, settings_file(experiment))
    write_metrics(source, metrics_folder(source))
    _must("dvc", "commit", "--force", *targets)
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
        _pull(remote, targets, [*folders, *(file.removesuffix(".dvc") for file in given)])
        code, _ = _run("dvc", "status", "--quiet", *targets)
        if code:
            _, changes = _run("dvc", "status", *targets)
            raise ArtifactError(
                "dvc.lock was recorded for other settings or inputs than the present ones; `git checkout` those that "
                f"belong to it, or, where the present ones are meant (two people's work was merged, say), run "
                f"`snakemake all --config experiment={source.name}` and record that:\n{changes.strip()}"
            )
    require_true(source)
    # Only now: Snakemake takes whatever is there for made from the present settings.
    _must("snakemake", "--touch", "--forceall", *_all_of(source.name))
    _require_nothing_to_do(source.name)
    return folders


def _require_inside(source: Source) -> None:
    """DVC versions what lies in the repository, and follows no link out of it."""
    for stage in stages_of(source.settings):
        folder = stage_folder(source, stage)
        if not (place := folder.resolve()).is_relative_to(Path.cwd().resolve()):
            raise ArtifactError(
                f"{folder} is a link, or lies behind one, to {place}, outside of the repository, where DVC records "
                "nothing; keep results/ in the repository: clone it to where there is room, or mount that place there"
            )


def _targets(source: Source, stages: Sequence[str] = ()) -> list[str]:
    """The experiment's stages in dvc.yaml.

    Raises:
        ArtifactError: dvc.yaml does not have them, or is not here.
    """
    if not Path("dvc.yaml").exists() and not Path("Snakefile").exists():
        raise ArtifactError(f"dvc.yaml is not in {Path.cwd()}: change to the project's root")
    with reading(Path("dvc.yaml"), "`git checkout dvc.yaml`, or write it anew with `vpae dvc`"):
        versioned = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]["settings"]["foreach"]
    if lacking := [name for name in owners(source) if name not in versioned]:
        names = " ".join(dict.fromkeys([*versioned, *lacking]))
        raise ArtifactError(
            f"dvc.yaml: there is no {', '.join(lacking)}; write it anew with `vpae dvc {names} --out dvc.yaml`"
        )
    targets = [
        f"{stage}@{owner(source, stage).name}" for stage in stages_of(source.settings) if stage in stages or not stages
    ]
    return [*targets, *(f"settings@{name}" for name in owners(source)), f"metrics@{source.name}"]


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


def _run(*command: str) -> tuple[int, str]:
    """Run `snakemake ...` or `dvc ...` of this environment; returns the exit code and all it printed.

    The local machine does the work, whatever profile the user has chosen for jobs; VPAE_ variables do not count.
    """
    dropped = ("SNAKEMAKE_PROFILE", "VPAE_")
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(dropped)}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def _must(*command: str) -> str:
    """Run a command that has to succeed; returns what it printed.

    Raises:
        ArtifactError: with the command and what it printed.
    """
    code, printed = _run(*command)
    if code:
        raise ArtifactError(f"`{' '.join(command)}` failed:\n{printed.strip()}")
    return printed


def _pull(remote: str | None, targets: Sequence[str], folders: Sequence[str]) -> None:
    """Get recorded results: what DVC calls `targets`, most of which stands in `folders`.

    Raises:
        ArtifactError: naming the files that the remote lacks, or has in another form; DVC itself only names folders.
    """
    code, printed = _run("dvc", "pull", *(["--remote", remote] if remote else []), *targets)
    if not code:
        return
    listed = _must("dvc", "data", "status", "--granular", "--json", *folders).splitlines()
    status = next(json.loads(line) for line in listed if line.startswith("{"))
    if files := status.get("not_in_cache"):
        raise ArtifactError("\n  ".join(["these are missing in the remote, or damaged there:", *files]))
    here = "\nwhat stands here was never recorded: `vpae record` it, or move it away" if "--force" in printed else ""
    raise ArtifactError(f"`dvc pull` failed:\n{printed.strip()}{here}")


def _all_of(experiment: str) -> tuple[str, ...]:
    return "--cores", "1", "--config", f"experiment=[{experiment}]", "--", "all"


def _require_nothing_to_do(experiment: str) -> None:
    """Refuse while Snakemake would run something, or does not know how something was made.

    Where it has no notes on a result, it cannot see that settings have changed, and says "Nothing to be done" of stale
    results as of others.

    Raises:
        ArtifactError: with Snakemake's plan.
    """
    printed = _must("snakemake", "--dry-run", *_all_of(experiment))
    if "Nothing to be done" not in printed:
        remedy = f"run `snakemake all --config experiment={experiment}` first"
        raise ArtifactError(f"Snakemake has something to do; {remedy}:\n{printed.strip()}")
    rules = re.search(r"^Rules with missing metadata: (.*)$", printed, re.MULTILINE)
    # Marks of shares of a stage's work are temporary: their number changes no result.
    if rules and not all(name.endswith("_part") for name in rules[1].split()):
        remedy = f"`vpae restore --no-pull --config configs/{experiment}.yaml` checks them and makes them known"
        raise ArtifactError(f"Snakemake does not know how all of these results were made; {remedy}:\n{printed.strip()}")
