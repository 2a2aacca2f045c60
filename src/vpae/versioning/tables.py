"""Small files for DVC: the settings each stage depends on, and the figures worth comparing between versions."""

import csv
import json
from pathlib import Path

from vpae.artifacts import write_json, written
from vpae.experiment import Source
from vpae.graph import RESULTS, stage_folder, stage_settings, stages_of


def settings_file(source: Source, results: Path = RESULTS) -> Path:
    """Where `write_settings` writes."""
    return results / source.name / "settings.json"


def write_settings(source: Source, path: Path) -> Path:
    """Stage -> the resolved settings it depends on: defaults and bases included, all that changes nothing left out.

    DVC's stages depend on this file, so that it takes for a change just what Snakemake and the stages take for one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {stage: stage_settings(source.settings, stage) for stage in stages_of(source.settings)})
    return path


def metrics_folder(source: Source) -> Path:
    """Where `write_metrics` writes; git holds it, so that a fresh clone has the figures before any data."""
    return Path("metrics") / source.name


def write_metrics(source: Source, folder: Path, results: Path = RESULTS) -> Path:
    """`scores.json`: row -> metric -> mean. `losses/METHOD.csv`: what each method logged, a line a step."""
    (folder / "losses").mkdir(parents=True, exist_ok=True)
    for file in (folder / "losses").iterdir():
        if file.stem not in source.settings.methods:
            file.unlink()
    if not source.settings.methods:
        (folder / "losses" / ".gitkeep").touch()  # git holds no empty folder, and DVC would find it deleted
    scores = json.loads((stage_folder(source, "evaluation", results) / "scores.json").read_text())["rows"]
    means = {row: {metric: value["mean"] for metric, value in found.items()} for row, found in scores.items()}
    write_json(folder / "scores.json", means)
    for method in source.settings.methods:
        logged = (stage_folder(source, method, results) / "metrics.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in logged]
        columns = list(dict.fromkeys(key for line in lines for key in line))  # a warm-up logs less
        with written(folder / "losses" / f"{method}.csv") as temporary, temporary.open("w", newline="") as file:
            table = csv.DictWriter(file, columns, lineterminator="\n")
            table.writeheader()
            table.writerows(lines)
    return folder
