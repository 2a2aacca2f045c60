"""Which experiments can be compared, and which results a comparison is of; the workflow asks it before any job."""

import json
from collections.abc import Sequence
from pathlib import Path

from vpae.artifacts import identity, read_provenance
from vpae.config import Experiment
from vpae.experiment import ConfigError, Source
from vpae.graph import RESULTS, stage_folder


def require_alike(sources: Sequence[Source]) -> None:
    """Refuse experiments that do not measure the same things in the same way; nothing of them need be finished.

    Raises:
        ConfigError: naming the first key in which two of them differ.
    """
    measures = [(source.name, _measure(source.settings)) for source in sources]
    name, wanted = measures[0]
    for other, measure in measures[1:]:
        for key in dict.fromkeys((*wanted, *measure)):
            here, there = wanted.get(key, "nothing"), measure.get(key, "nothing")
            if here != there:
                raise ConfigError(
                    f"{key} is {here} in {name} and {there} in {other}, so that their scores cannot be compared: "
                    "evaluate both alike"
                )


def _measure(settings: Experiment) -> dict[str, object]:
    """Settings by key of which the scores depend beside the methods; rows may differ, and what changes no score."""
    samples = settings.samples.model_dump(mode="json", exclude={"rows", "batch_size", "compile"})
    evaluation = settings.evaluation.model_dump(mode="json")
    evaluation["vbench"].pop("weights")
    clips = settings.clips.model_dump(mode="json", exclude={"train", "workers"})
    parts = {"samples": samples, "evaluation": evaluation, "clips": clips, "geometry": settings.geometry.model_dump()}
    found = {f"{section}.{key}": value for section, values in parts.items() for key, value in values.items()}
    if settings.evaluation.c2st.clips:
        found["clips.train, up to evaluation.c2st.clips"] = min(settings.clips.train, settings.evaluation.c2st.clips)
    # Latents, and what is decoded of them, are those of its VAE.
    names = ("source", "vae") if settings.teacher.source == "train" else ("source", "path", "revision")
    return found | {f"teacher.{name}": settings.teacher.model_dump(mode="json")[name] for name in names}


def made_of(sources: Sequence[Source], results: Path = RESULTS) -> dict[str, str]:
    """Folder -> what is in it, of the evaluations that are compared, as far as they are finished."""
    folders = [stage_folder(source, "evaluation", results) for source in sources]
    return {str(folder): identity(folder) for folder in folders if read_provenance(folder) is not None}


def is_of(table: Path, sources: Sequence[Source]) -> bool:
    """Whether a comparison's JSON file holds what is in the results of these experiments now."""
    try:
        return json.loads(table.read_text())["made_of"] == made_of(sources)
    except (OSError, ValueError, KeyError, TypeError):
        return False
