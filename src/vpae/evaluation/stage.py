"""Stage `evaluation`: one record per video and row, `scores.json` with means and confidence intervals, `table.md`, and
VBench-I2V in `vbench.json`."""

import json
from pathlib import Path

import numpy as np

from vpae.artifacts import write_json
from vpae.config import Experiment
from vpae.data.catalog import read_truth
from vpae.data.video import read_frames
from vpae.evaluation import latency, latents, truth
from vpae.evaluation.statistics import cell, markdown, of_mean
from vpae.evaluation.vbench import rows as vbench
from vpae.parts import Part
from vpae.progress import track

METRICS = ("c2st", "frechet", "motion", *truth.METRICS, *latency.METRICS)


def external_inputs(settings: Experiment) -> dict[str, str]:
    """What VBench's official networks read from outside the experiment."""
    return vbench.external_inputs(settings.evaluation.vbench)


def run(settings: Experiment, inputs: dict[str, Path], out: Path, state: Path) -> dict:
    """Score every row of the samples stage; returns the number of rows and scored videos."""
    rows = ["real", *settings.samples.rows]
    suite = _suite(inputs)
    scores: dict[str, dict] = latents.measure(settings, inputs)
    records = _measured(rows, suite[: settings.samples.decode], inputs)
    for row in rows:
        scores[row] |= _means([record for record in records if record["row"] == row], settings)
    if settings.evaluation.vbench.backbones != "off":
        means = {row: {metric: value["mean"] for metric, value in found.items()} for row, found in scores.items()}
        vbench.measure(settings, inputs, suite, means, records, out, state)
    for row, timing in latency.measure(settings, inputs, state).items():
        scores[row] |= timing
    (out / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    nfe, decoded = {name: row.nfe for name, row in settings.samples.rows.items()}, settings.samples.decode
    write_json(out / "scores.json", {"rows": scores, "nfe": nfe, "videos": len(suite), "decoded": decoded})
    (out / "table.md").write_text(table(scores, nfe))
    return {"rows": len(rows), "videos_scored": len(records)}


def _measured(rows: list[str], suite: list[dict], inputs: dict[str, Path]) -> list[dict]:
    """A record of the truth metrics for each decoded video; none where the truth is not known."""
    truths = read_truth(inputs["clips"])
    records = []
    for row in track(rows, len(rows), "evaluation"):
        for item in suite if truths else ():
            frames, _ = read_frames(inputs["samples"] / row / item["file"])
            found = truth.measure(frames, truths[item["key"]])
            records.append({"row": row, "key": item["key"], "file": item["file"], **found})
    return records


def _means(records: list[dict], settings: Experiment) -> dict[str, dict[str, float]]:
    """Mean and interval of each truth metric over the records of a row."""
    values = {metric: np.array([record[metric] for record in records]) for metric in truth.METRICS if records}
    return {metric: of_mean(one, settings.evaluation.bootstrap, settings.seed) for metric, one in values.items()}


def part(settings: Experiment, inputs: dict[str, Path], state: Path, part: Part) -> None:
    """A job's share of measuring videos by VBench-I2V; all else is quick, and done by `run`."""
    if settings.evaluation.vbench.backbones != "off":
        vbench.measure_part(settings, inputs, _suite(inputs), state, part)


def _suite(inputs: dict[str, Path]) -> list[dict]:
    """What was animated."""
    return [json.loads(line) for line in (inputs["samples"] / "suite.jsonl").read_text().splitlines()]


def table(scores: dict[str, dict], nfe: dict[str, int]) -> str:
    """The scores as a Markdown table, with half-widths of the 95% intervals."""
    present = [metric for metric in METRICS if any(metric in metrics for metrics in scores.values())]
    rows = [
        [row, str(nfe.get(row, "")), *(cell(metrics.get(metric), metric) for metric in present)]
        for row, metrics in scores.items()
    ]
    return markdown(["row", "NFE", *present], rows) + "\n"
