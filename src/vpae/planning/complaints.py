"""What a stage needs and does not ask the cluster for, each with the key to change."""

from collections.abc import Iterator

from vpae.config import Experiment, Needs
from vpae.distill import METHODS

STORED_PER_SECOND = 1e9  # bytes of a resumable state that are written and hashed, or read [assumption]


def complaints(name: str, stage: dict, settings: Experiment) -> list[str]:
    """Of one stage of a plan. Times are those of GPUs: of a stage without any they say nothing."""
    needs: Needs = getattr(settings.cluster, name)
    found = [*_of_memory(name, stage, needs)]
    if not needs.gpus:
        return found
    return [*found, *(_of_training if name in METHODS else _of_jobs)(name, stage, settings)]


def _of_memory(name: str, stage: dict, needs: Needs) -> Iterator[str]:
    if (wanted := stage["host_bytes"]) > 1e9 * needs.memory_gb:
        yield f"cluster.{name}.memory_gb = {needs.memory_gb}, but a node needs about {wanted / 1e9:.0f} GB; raise it"


def _of_training(name: str, stage: dict, settings: Experiment) -> Iterator[str]:
    """Whether a job that is warned of its end can finish an update and save, and whether it gets on at all."""
    needs: Needs = getattr(settings.cluster, name)
    update = max(turn["seconds"] for turn in stage["turns"].values())
    saving = stage["state_bytes"] / STORED_PER_SECOND
    if (wanted := update + saving) > needs.warning_seconds:
        yield (
            f"cluster.{name}.warning_seconds = {needs.warning_seconds}, but an update takes about {update:.0f} s and "
            f"its state about {saving:.0f} s to be saved; raise it to {60 * -(-wanted // 60):.0f}"
        )
    if (least := 2 * (wanted + saving)) > 60 * needs.minutes:  # reading the state, an update, saving; and as much again
        yield f"cluster.{name}.minutes = {needs.minutes} are few for its updates; raise it to {-(-least // 60):.0f}"


def _of_jobs(name: str, stage: dict, settings: Experiment) -> Iterator[str]:
    """Whether a job ends in time. The latencies that are the hours of `evaluation` are all measured in one.

    What gathers the work of several jobs reads all of it once more.
    """
    needs: Needs = getattr(settings.cluster, name)
    jobs = getattr(settings.jobs, name) if name != "evaluation" else 1
    gathering = stage.get("result_bytes", 0.0) / STORED_PER_SECOND / 3600
    if jobs > 1 and gathering > needs.minutes / 60:
        yield (
            f"cluster.{name}.minutes = {needs.minutes}, but its last job takes about {gathering:.1f} hours to hash "
            "what the others made; raise it"
        )
    if (hours := stage["gpu_hours"] / jobs) > needs.minutes / 60:
        more = f" or jobs.{name}" if name != "evaluation" else ""
        yield f"cluster.{name}.minutes = {needs.minutes}, but a job takes about {hours:.1f} hours; raise it{more}"
