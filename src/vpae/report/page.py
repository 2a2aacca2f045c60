"""Stage `report`: `index.html`, one self-contained page about an experiment, and `strip.png`, a picture of its videos.

Every number is read from the results of other stages; nothing is computed here but ratios. The page needs no
JavaScript and requests nothing: style, curves and videos are inside it.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml

from vbench_i2v.scores import COLUMNS, PAPER_NAMES
from vpae import __version__
from vpae.artifacts import identity, read_provenance
from vpae.config import Experiment, Sampler
from vpae.data.video import read_frames
from vpae.distill import METHODS
from vpae.graph import stages_of
from vpae.lazy import lazy
from vpae.report import plots

looks = lazy("vpae.report.looks")  # torch and a VAE are for those who kept videos
REAL = "real"
PAPER = "https://arxiv.org/abs/2508.21019"


@dataclass(frozen=True)
class Metric:
    """A column of the table: its heading, which way is better, and what it says."""

    title: str
    better: str
    meaning: str


METRICS = {
    "c2st": Metric(
        "Told apart",
        "½",
        "C2ST: how often a small network is right that a video's latents are real, or that they are generated, given "
        "the first frame; ½ is the goal. The first row has real clips on both sides.",
    ),
    "frechet": Metric(
        "Fréchet distance",
        "↓",
        "between the latents of generated and of held-out real clips, in the features of a fixed random network. The "
        "first row holds training clips against held-out ones: the floor. Small samples raise this distance: "
        "compare it among rows of as many videos alone. Its interval is a jackknife's, of the raised distance.",
    ),
    "motion": Metric("Motion", "1", "mean change between latent frames, in units of the held-out clips'; 1 is theirs."),
    "single_sprite": Metric(
        "Single sprite", "↑", "share of frames with one whole sprite of the right colour, no ghost."
    ),
    "caption_following": Metric(
        "Caption followed", "↑", "share of videos that move, grow or turn as the caption says."
    ),
    "identity": Metric("Identity", "↑", "share of later frames whose sprite has the first one's shape and colour."),
    "path_smoothness": Metric("Smooth path", "↑", "1 / (1 + median second difference of the path, in 1/64 heights)."),
    "latency_diffusion_s": Metric(
        "Network time", "↓", "per video, of the network evaluations alone; median run, batch 1."
    ),
    "latency_total_s": Metric("End to end", "↓", "the same from an image and a prompt to decoded frames."),
}
DISTURBED = 1.5  # times the fastest run
HEADLINES = ("frechet", "single_sprite", "caption_following")


def run(settings: Experiment, inputs: dict[str, Path], out: Path, state: Path) -> dict:
    """Write the page and the strip; returns the number of rows and clips shown, and the size of the page."""
    scores = json.loads((inputs["evaluation"] / "scores.json").read_text())
    lines = (inputs["samples"] / "suite.jsonl").read_text().splitlines()
    # The first ones, whatever they look like: nothing is picked.
    suite = [json.loads(line) for line in lines[: min(settings.report.clips, settings.samples.decode)]]
    notes = {name: describe(name, settings.samples.rows.get(name)) for name in scores["rows"]}
    student = settings.student or next(iter(settings.students), "")
    parts = named_rows(settings.samples.rows, student)
    files = {name: [inputs["samples"] / name / item["file"] for item in suite] for name in notes}
    videos = {
        name: plots.Clips(lambda file: read_frames(file)[0], files[name])
        for name in notes
        if (inputs["samples"] / name).is_dir()
    }
    prompts = [item["prompt"] for item in suite]
    methods = [name for name in stages_of(settings) if name in METHODS]
    kept = {name: inputs[name] / "looks" for name in methods if (inputs[name] / "looks").is_dir()}
    seen = looks.decoded(kept, inputs["teacher"], settings.samples) if kept else {}
    shown = [name for name in (REAL, *parts.values()) if name in videos]
    strip = plots.strip({name: (videos[name], notes[name]) for name in shown}, prompts)
    strip.quantize(256).save(out / "strip.png", optimize=True)
    experiment = out.parent.name  # a stage's folder stands in its experiment's
    page = render(
        experiment=experiment,
        settings=settings,
        version=__version__,
        paper=PAPER,
        headlines=headlines(scores["rows"], parts),
        parts=parts,
        table=table(scores, notes, parts),
        disturbed=disturbed(scores["rows"]),
        counts={"scored": scores["videos"], "measured": scores["decoded"]},
        vbench=vbench(inputs["evaluation"] / "vbench.json"),
        notes=notes,
        reel=plots.reel(videos, settings.geometry.fps),
        prompts=prompts,
        methods=[METHODS[name] for name in settings.chain(settings.student)] if settings.student else [],
        training=[training(name, inputs[name], seen.get(name, {}), lines) for name in methods],
        provenance=[provenance(name, inputs[name]) for name in stages_of(settings) if name in inputs],
        student=_folder_of(student, settings, inputs),
        quoted=[shlex.quote(prompt) for prompt in prompts],
        stages=stages_of(settings),
        resolved=as_yaml(settings.model_dump(mode="json", exclude={"extends"})),
    )
    (out / "index.html").write_text(page, encoding="utf-8")
    return {"rows": len(notes), "clips": len(suite), "bytes": len(page.encode())}


def _folder_of(student: str, settings: Experiment, inputs: dict[str, Path]) -> str:
    """Where a reader of the page finds the student: a stage's folder, or the one that the experiment names."""
    if student in settings.students:
        return str(settings.students[student])
    return f"results/{inputs[student].parent.name}/{student}" if student else ""


def render(**content: object) -> str:
    """Fill the template; a name it does not know is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vpae.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(**content)


def training(name: str, folder: Path, seen: dict[int, plots.Clips], suite: list[str]) -> dict[str, object]:
    """What the page shows of a method's training: its class, its curves, its speed, and the videos of its looks.

    `seen` has step -> videos of the first held-out clips, empty if none were kept; `suite` has their captions.
    """
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curves = plots.curves(METHODS[name].panels, logged)
    one = {"method": METHODS[name], "curves": curves, "speed": speed(folder), "looks": "", "steps": list(seen)}
    if seen:
        clips = min(map(len, seen.values()))  # a run that goes on may keep more of them than it did before
        prompts = [json.loads(line)["prompt"] for line in suite[:clips]]
        prompts += [f"held-out clip {number + 1}" for number in range(len(prompts), clips)]
        rows = {f"step {step}": (videos, "") for step, videos in seen.items()}
        one["looks"] = plots.picture(plots.strip(rows, prompts))
    return one


def speed(folder: Path) -> str:
    """Seconds a step, tokens a second, utilisation and waiting of a training, as far as its provenance has them."""
    counts = (read_provenance(folder) or {}).get("counts", {})
    forms = {"seconds_per_step": "{:.3g} s a step", "tokens_per_second": "{:,.0f} tokens a second"}
    forms |= {"utilisation": "{:.0%} of the device's peak", "waiting_for_data": "{:.1%} of it waiting for data"}
    return ", ".join(form.format(counts[key]) for key, form in forms.items() if key in counts)


def named_rows(rows: dict[str, Sampler], student: str) -> dict[str, str]:
    """Which rows play the parts of the comparison, as far as they exist.

    Returns:
        teacher -> the teacher's row with most network evaluations, naive -> the teacher in one, student -> that of the
        method `student` in fewest.
    """
    by_cost = sorted(rows, key=lambda name: rows[name].nfe)
    teachers = [name for name in by_cost if rows[name].model == "teacher"]
    students = [name for name in by_cost if rows[name].model == student]
    parts = {
        "teacher": [name for name in teachers[-1:] if rows[name].nfe > 1],
        "naive": [name for name in teachers[:1] if rows[name].nfe == 1],
        "student": students[:1],
    }
    return {part: names[0] for part, names in parts.items() if names}


def describe(name: str, row: Sampler | None) -> str:
    """A few words on how a row's videos were made."""
    if row is None:
        return "held-out clips through the VAE" if name == REAL else ""
    if row.model == "teacher" and row.nfe == 1:
        return "naive: the teacher in one step"
    steps = "1 step" if row.steps == 1 else f"{row.steps} steps"
    guidance = "" if row.guidance_scale == 1.0 else f", guidance {row.guidance_scale:g}"
    label = METHODS[row.model].label if row.model in METHODS else row.model
    shift = "" if row.shift is None else f", shift {row.shift:g}"
    return f"{label}, {steps}{guidance}{shift}"


def headlines(rows: dict[str, dict], parts: dict[str, str]) -> list[dict]:
    """The student's main numbers beside those of the teacher and the naive step; empty without a row of it."""
    if parts.get("student") not in rows:
        return []
    ours = rows[parts["student"]]
    others = [name for name in (parts.get("teacher"), parts.get("naive")) if name in rows]
    found = [
        {
            "title": f"{METRICS[metric].title} {METRICS[metric].better}",
            **cell(metric, ours[metric]),
            "others": [(name, cell(metric, rows[name][metric])["value"]) for name in others if metric in rows[name]],
        }
        for metric in HEADLINES
        if metric in ours
    ]
    reference, key = rows.get(parts.get("teacher", ""), {}), "latency_diffusion_s"
    if faster := ratio(reference.get(key), ours.get(key)):
        whole = ratio(reference.get("latency_total_s"), ours.get("latency_total_s"))
        times = [(name, cell(key, rows[name][key])["value"]) for name in (parts["student"], parts["teacher"])]
        found.append(
            {"title": "Speed-up", "value": faster, "interval": f"end to end {whole}" if whole else "", "others": times}
        )
    return found


def disturbed(rows: dict[str, dict]) -> list[str]:
    """Rows whose median network time is far from the fastest run: other work ran while they were measured."""
    times = {name: row["latency_diffusion_s"] for name, row in rows.items() if "latency_diffusion_s" in row}
    return [name for name, time in times.items() if time["mean"] > DISTURBED * time["low"]]


def table(scores: dict, notes: dict[str, str], parts: dict[str, str]) -> dict:
    """The table of all rows: metrics this module knows first, then any others under their own names."""
    rows = scores["rows"]
    present = {metric for row in rows.values() for metric in row}
    metrics = [m for m in METRICS if m in present] + sorted(present - set(METRICS))
    columns = [METRICS.get(metric, Metric(metric, "", "")) for metric in metrics]
    reference = rows.get(parts.get("teacher", ""), {})
    body = [
        {
            "name": name,
            "note": notes[name],
            "ours": name == parts.get("student"),
            "nfe": scores["nfe"].get(name, ""),
            "cells": [cell(metric, row.get(metric)) for metric in metrics],
            "speedup": ratio(reference.get("latency_diffusion_s"), row.get("latency_diffusion_s")),
            "speedup_total": ratio(reference.get("latency_total_s"), row.get("latency_total_s")),
        }
        for name, row in rows.items()
    ]
    return {"columns": columns, "rows": body, "speedup": any(row["speedup"] for row in body)}


def vbench(path: Path) -> dict | None:
    """VBench-I2V's dimensions and totals of all rows, and their rank correlation with the truth metrics, as texts.

    None where they were not measured.
    """
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    found, correlation = content["rows"], content["rank_correlation"]
    dimensions = {name: [row["dimensions"][name] for row in found.values()] for name in COLUMNS}
    measured = [name for name, of in dimensions.items() if any(one["value"] is not None for one in of)]
    gaps = {name: of[0]["reason"] for name, of in dimensions.items() if name not in measured}
    metrics = list(dict.fromkeys(metric for of in correlation.values() for metric in of))
    return {
        "backbones": content["backbones"],
        "note": content["note"],
        "videos": content["videos_per_row"],
        "columns": [COLUMNS[name].title.removeprefix("Video-") for name in measured] + list(PAPER_NAMES.values()),
        "rows": [
            {
                "name": name,
                "cells": [
                    *(points(one["value"], 100.0) + n_of_all(one) for one in map(row["dimensions"].get, measured)),
                    *(points(row[total], 1.0) for total in PAPER_NAMES),
                ],
            }
            for name, row in found.items()
        ],
        "gaps": [{"title": COLUMNS[name].title, "reason": reason} for name, reason in gaps.items()],
        "metrics": [METRICS[metric].title if metric in METRICS else metric for metric in metrics],
        "correlation": [
            {"title": COLUMNS[name].title, "cells": [correlation[name].get(metric, {}) for metric in metrics]}
            for name in measured
            if name in correlation
        ],
    }


def n_of_all(found: dict) -> str:
    """How many of the videos that ask for a dimension were measured, if not all."""
    n, wanted = found.get("videos"), found.get("expected")
    return "" if found["value"] is None or n == wanted else f" ({n} of {wanted})"


def points(value: float | None, scale: float) -> str:
    """A share or a total in points; a dash where there is none."""
    return "–" if value is None else f"{scale * value:.2f}"


def cell(metric: str, value: dict[str, float] | None) -> dict[str, str]:
    """A value and its interval as texts, in a unit of their own for latencies."""
    if value is None:
        return {"value": "", "interval": ""}
    scale, unit, form = 1.0, "", ".3f"
    if metric.endswith("_s"):
        scale, unit = (1.0, " s") if value["mean"] >= 1 else (1e3, " ms")
        form = ".0f" if scale * value["mean"] >= 100 else ".1f" if scale * value["mean"] >= 10 else ".2f"
    mean, low, high = (format(scale * value[key], form) for key in ("mean", "low", "high"))
    return {"value": mean + unit, "interval": f"{low}–{high}"}


def ratio(reference: dict | None, value: dict | None) -> str:
    """How many times faster than the reference; empty if either is missing."""
    if not reference or not value:
        return ""
    times = reference["mean"] / value["mean"]
    return f"{times:.0f}×" if times >= 10 else f"{times:.1f}×"


def provenance(name: str, folder: Path) -> dict:
    """What a stage's folder says about how it came to be, ready to print."""
    found, outputs = read_provenance(folder), identity(folder)  # refuses a folder that is not finished
    return {
        **found,
        "stage": name,
        "folder": f"{folder.parent.name}/{folder.name}",
        "date": found["finished"].replace("T", " ").replace("+00:00", " UTC"),
        "duration": duration(found["seconds"]),
        "memory": f"{found['peak_memory_bytes'] / 1e9:.2f} GB",
        "commit": (found["code"]["commit"] or "")[:12] or "commit unknown",
        "changed": {True: "+ uncommitted changes", False: "", None: "state unknown"}[found["code"]["dirty"]],
        "identity": outputs,
        "files": len(found["outputs"]),
        "settings": as_yaml(found["settings"]),
    }


def duration(seconds: float) -> str:
    """Seconds in the two units that matter."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def as_yaml(settings: dict) -> str:
    """Settings as one would write them."""
    return yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=100)
