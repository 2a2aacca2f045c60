"""Stage `evaluation`: one record per video and row, `scores.json` with means and confidence intervals, `table.md`, and
VBench-I2V in `vbench.json`."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vpae.artifacts import write_json
from vpae.config import Experiment, Sampler
from vpae.data.catalog import read_truth
from vpae.data.latents import LatentDataset
from vpae.data.video import read_frames
from vpae.evaluation import latents, truth
from vpae.evaluation.statistics import half_width, markdown, of_mean
from vpae.evaluation.vbench import rows as vbench
from vpae.models.formats import formats
from vpae.models.wan import load_pipeline
from vpae.parts import Part
from vpae.placement import COMPILED_FROM, compiling_pays
from vpae.progress import track
from vpae.sampling import draw, model_folder, row_shift
from vpae.sampling.single import animate
from vpae.sampling.stage import load_vae, small_decoder

LATENCY_PASSES = 3
SHARED = ("vae", "text_encoder", "image_encoder")  # a student's are the teacher's own
METRICS = ("c2st", "frechet", "motion", *truth.METRICS, "latency_diffusion_s", "latency_total_s")


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
    for row, timing in _latencies(settings, inputs).items():
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


@torch.no_grad()
def _latencies(settings: Experiment, inputs: dict[str, Path]) -> dict[str, dict]:
    """Seconds per video at batch size 1: the network steps alone, and from image and prompt to frames."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = LatentDataset(inputs["latents"], "held_out")
    _, condition = dataset.batch([0], device)
    picture: Image.Image = dataset.first_frame(0)
    prompt, geometry, config = dataset.entries[0].caption, settings.geometry, settings.evaluation
    shape = (16, *geometry.latent_shape)
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"latency_diffusion_s": [], "latency_total_s": []} for name in settings.samples.rows
    }
    if small := small_decoder(settings.samples):
        small.to(device)
    vae = load_vae(inputs["teacher"], settings.samples)
    parts = load_pipeline(inputs["teacher"], transformer=None, vae=vae).to(device)
    shared = {name: getattr(parts, name) for name in SHARED}
    for models in _timed_together(settings, inputs):
        pipelines = {model: load_pipeline(model_folder(inputs, model), **shared).to(device) for model in models}
        for pipeline in pipelines.values():
            if settings.samples.compile and compiling_pays(pipeline.transformer, device, COMPILED_FROM):
                pipeline.transformer.compile_repeated_blocks()
        rows = {name: row for name, row in settings.samples.rows.items() if row.model in models}
        # Several passes over the rows, so that a machine that is busy for a while slows all of them.
        for name, row in [*rows.items()] * LATENCY_PASSES:
            pipeline = pipelines[row.model]

            def diffuse(pipeline=pipeline, row: Sampler = row) -> None:
                draw(pipeline.transformer, row, row_shift(settings, inputs, row), condition, shape, [0])

            def everything(pipeline=pipeline, row: Sampler = row) -> None:
                animate(pipeline, picture, prompt, row.steps, row.guidance_scale, 0, geometry.frames, small)

            # A hundred network evaluations are their own average; a single one is not.
            repeats = config.latency_repeats * (1 if row.nfe >= 50 else 5)
            seconds[name]["latency_diffusion_s"] += time_runs(diffuse, repeats, config.latency_warmup)
            seconds[name]["latency_total_s"] += time_runs(everything, config.latency_repeats, config.latency_warmup)
        del pipeline, pipelines, diffuse, everything  # before the next model is loaded
    return {name: {metric: summary(runs) for metric, runs in metrics.items()} for name, metrics in seconds.items()}


def time_runs(work: Callable[[], object], repeats: int, warmup: int) -> list[float]:
    """Seconds of each of `repeats` runs after `warmup` untimed ones."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(repeats):
        synchronise()
        start = time.perf_counter()
        work()
        synchronise()
        seconds.append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """The median, with the fastest and slowest run as bounds."""
    return {"mean": float(np.median(seconds)), "low": min(seconds), "high": max(seconds)}


def _timed_together(settings: Experiment, inputs: dict[str, Path]) -> list[list[str]]:
    """The rows' models, in groups that are on the device together: all of them; of large ones, one at a time."""
    models = list(dict.fromkeys(row.model for row in settings.samples.rows.values()))
    large = formats(inputs["teacher"])["transformer"] != torch.float32
    return [[model] for model in models] if large else [models]


def table(scores: dict[str, dict], nfe: dict[str, int]) -> str:
    """The scores as a Markdown table, with half-widths of the 95% intervals."""
    present = [metric for metric in METRICS if any(metric in metrics for metrics in scores.values())]
    rows = [
        [row, str(nfe.get(row, "")), *(_cell(metrics.get(metric), metric) for metric in present)]
        for row, metrics in scores.items()
    ]
    return markdown(["row", "NFE", *present], rows) + "\n"


def _cell(value: dict[str, float] | None, metric: str) -> str:
    if value is None:
        return ""
    if metric.startswith("latency"):
        return f"{value['mean']:.3f}"
    return f"{value['mean']:.3f} ± {half_width(value['mean'], value['low'], value['high']):.3f}"
