"""dvc.yaml, written from the experiments that are versioned, and the small files that it names.

DVC can loop over experiments but not over the folders that a stage reads. So each stage lists as many folders as any of
its experiments needs; the others name their last one again, which DVC counts once.
"""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from vpae.artifacts import write_json, written
from vpae.config.teacher import file_and_strength
from vpae.experiment import Source
from vpae.graph import RESULTS, STAGES, owner, stage_folder, stage_settings, stages_of, upstream

HEAD = """\
# Which results are versioned, with what they come from; written by `vpae dvc {names} --out dvc.yaml`.
# Snakemake alone decides and runs: each command asks it to bring one folder up to date, on the machine or cluster that
# SNAKEMAKE_PROFILE names (`SNAKEMAKE_PROFILE=slurm dvc repro report@micro`), and lets nothing stale or damaged be
# recorded. See docs/data.md.
#
# A plain `dvc pull` fails while an experiment stands here that is not in dvc.lock and in the remote.
#
# `persist` keeps DVC from deleting what is up to date before Snakemake has been asked, and from taking a result out of
# its own run cache, of which Snakemake would know nothing.
"""


def pipeline(sources: Sequence[Source]) -> str:
    """The text of dvc.yaml for these experiments and those that they extend where a result stands there."""
    shown = {name: one for source in sources for name, one in owners(source).items()}
    tree = {
        "stages": {
            "settings": _loop(
                {name: _files(source) for name, source in shown.items()},
                lambda files: {
                    "cmd": "vpae settings --config configs/${key}.yaml --out results/${key}/settings.json",
                    "params": [{file: None} for file in files],
                    "outs": ["results/${key}/settings.json"],
                },
            ),
            **{stage: block for stage in STAGES if (block := _stage(stage, list(shown.values())))},
            "metrics": _loop(
                {source.name: _measured(source) for source in sources},
                lambda folders: {
                    "cmd": "vpae metrics --config configs/${key}.yaml --out metrics/${key}",
                    "deps": folders,
                    "metrics": [{"metrics/${key}/scores.json": {"cache": False}}],
                    "outs": [{"metrics/${key}/losses": {"cache": False}}],
                },
            ),
        },
        "metrics": _recorded_by_hand(sources),
        "plots": [plot for source in sources for plot in _plots(source)],
    }
    text = yaml.safe_dump(tree, sort_keys=False, width=1000)
    return HEAD.format(names=" ".join(source.name for source in sources)) + text


def _recorded_by_hand(sources: Sequence[Source]) -> list[str]:
    """Scores of other experiments, which git holds without their results."""
    names = {source.name for source in sources}
    return [path.as_posix() for path in sorted(Path("metrics").glob("*/scores.json")) if path.parent.name not in names]


def owners(source: Source) -> dict[str, Source]:
    """Name -> the experiment itself, and those of its bases in whose folders its results stand."""
    found = [source, *(owner(source, stage) for stage in stages_of(source.settings))]
    return {one.name: one for one in found}


def _files(source: Source) -> list[str]:
    """The files that say what an experiment is."""
    return list(dict.fromkeys(str(one.path) for one in (*source.ancestors(), source)))


def _measured(source: Source) -> list[str]:
    return [str(stage_folder(source, stage)) for stage in (*source.settings.methods, "evaluation")]


def _stage(stage: str, sources: list[Source]) -> dict | None:
    """The block of one stage; None if none of the experiments makes it anew."""
    own = [s for s in sources if stage in stages_of(s.settings) and owner(s, stage) is s]
    if not own:
        return None
    return _loop(
        {source.name: _read(source, stage) for source in own},
        lambda folders: {
            "cmd": f"workflow/stage.sh {stage} ${{key}}",
            "deps": folders,
            "params": [{"results/${key}/settings.json": [stage]}],
            "outs": [{f"results/${{key}}/{stage}": {"persist": True}}],
        },
    )


def _read(source: Source, stage: str) -> list[str]:
    teacher = source.settings.teacher
    given = [teacher.path] if stage == "teacher" and teacher.source == "folder" else []
    if stage == "teacher":
        given += [str(file_and_strength(named)[0]) for named in teacher.loras]
    if stage == "samples" and source.settings.samples.decoder:
        given.append(source.settings.samples.decoder)
    return [*(str(stage_folder(source, above)) for above in upstream(source.settings, stage)), *given]


def _loop(items: dict[str, list[str]], body: Callable[[list[str]], dict]) -> dict:
    """A block for all experiments; `body` is given what stands for the items of their lists. Empty values go."""
    if any(items.values()):  # DVC has no lists of another length: who reads nothing, for one a teacher from the hub,
        items = {name: found or [f"configs/{name}.yaml"] for name, found in items.items()}  # depends on its own file
    longest = max(len(found) for found in items.values())
    padded = {name: [*found, *found[-1:] * (longest - len(found))] for name, found in items.items()}
    entries = [f"${{item[{number}]}}" for number in range(longest)]
    return {"foreach": padded, "do": {key: value for key, value in body(entries).items() if value}}


def _plots(source: Source) -> list[dict | str]:
    """What `dvc plots` shows: the first curve of each panel of each method, and the contact sheets."""
    folder = metrics_folder(source) / "losses"
    curves = [
        {f"{source.name}, {method}": {"x": "step", "y": {str(folder / f"{method}.csv"): ["generator_loss"]}}}
        for method in source.settings.methods
    ]
    samples = stage_folder(source, "samples")
    rows = ("real", *source.settings.samples.rows)
    return [*curves, *(str(Path(samples) / f"{row}.png") for row in rows)]


def settings_file(source: Source) -> Path:
    """Where `write_settings` writes."""
    return RESULTS / source.name / "settings.json"


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
