# What the rules share: experiments by name, what a stage reads, the settings it depends on, what it needs.
import json
import sys
from functools import cache
from math import prod
from pathlib import Path

from vpae.config import PATCH
from vpae.experiment import STAGES, ConfigError, load, owner, stage_folder, stage_settings, upstream

# A stage that is told to end (TERM, USR1) saves its state first; shell and tee must live on until it has.
shell.prefix("set -euo pipefail; trap : TERM USR1; tee() {{ trap '' INT TERM USR1; command tee \"$@\"; }}; ")


wildcard_constraints:
    experiment="[^/]+",


def stop(message):
    """End with a message for people: an exception of Snakemake's would surround it with the lines that raised it."""
    sys.exit(f"vpae: {message}")


@cache
def experiment(name):
    """The experiment in configs/NAME.yaml."""
    try:
        return load(Path("configs") / f"{name}.yaml")
    except ConfigError as error:
        stop(error)


def all_folders(wildcards):
    """Input function: every stage of the experiments asked for; what an overlay leaves alone is its base's."""
    names = config.get("experiment", "tiny")
    names = names.split(",") if isinstance(names, str) else names
    return sorted({str(stage_folder(experiment(name), stage)) for name in names for stage in STAGES})


def folders_read_by(stage):
    """Input function: the results that a stage reads."""

    def folders(wildcards):
        source = experiment(wildcards.experiment)
        if owner(source, stage) is not source:
            stop(f"{source.path} leaves {stage} as it is in its base; ask for {stage_folder(source, stage)}")
        return [str(stage_folder(source, name)) for name in upstream(source.settings, stage)]

    return folders


def videos(wildcards):
    """Input function: the folder or table of videos; nothing for the procedural world."""
    source = experiment(wildcards.experiment)
    clips = source.settings.clips
    return [] if clips.source == "world" else [existing(clips.path, source, "clips.path")]


def teacher_files(wildcards):
    """Input function: index and weights of a teacher taken from a folder."""
    source = experiment(wildcards.experiment)
    teacher = source.settings.teacher
    if teacher.source != "folder":
        return []
    index = existing(Path(teacher.path) / "model_index.json", source, "teacher.path")
    return [index, *map(str, sorted(Path(teacher.path).glob("*/*.safetensors")))]


def existing(path, source, key):
    """The path, if there is something."""
    if not Path(path).exists():
        stop(f"{source.path}: {key}: {path} does not exist; correct the key, or `dvc pull` what DVC versions")
    return str(path)


def settings_of(stage):
    """Params function: just the settings a stage depends on, so that a change re-runs what it concerns and no more.

    As text with sorted keys, because Snakemake, unlike vpae, would take another order for another value.
    """

    def settings(wildcards):
        return json.dumps(stage_settings(experiment(wildcards.experiment).settings, stage), sort_keys=True)

    return settings


def scaled(small, large):
    """Resource function: one value for experiments like `tiny`, another from about 480p on [estimates]."""

    def value(wildcards):
        tokens = prod(experiment(wildcards.experiment).settings.geometry.latent_shape) // prod(PATCH)
        return small if tokens < 2000 else large

    return value
