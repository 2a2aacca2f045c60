"""`vpae compare`: finished experiments in one table, one line per method, with its scores over seeds and its cost.

A method is a row's sampler and all that its model was trained with, but for the seed: rows of experiments that differ
in the seed alone are one line, and an ablation's row is a different line from its base's, though both have the same
name.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from vbench_i2v.scores import PAPER_NAMES
from vpae.artifacts import ArtifactError, digest, read_provenance, write_json, written
from vpae.config import Experiment
from vpae.distill import CHAIN, METHODS
from vpae.distill.budget import network_evaluations
from vpae.evaluation import truth
from vpae.evaluation.statistics import half_width, markdown, of_mean
from vpae.experiment import ConfigError, Source, load
from vpae.graph import RESULTS, fingerprint, stage_folder
from vpae.report.alike import made_of, require_alike
from vpae.standing import departures, made_from, standing

Interval = dict[str, float | None]  # mean, low, high; both ends None: not known
SCORE = "mean_score"
OF_TRUTH, OF_VBENCH = f"the truth metrics {', '.join(truth.METRICS)}", "SA, TC and FQ of VBench-I2V"
# SA, TC and FQ of VBench-I2V that the paper reports on Wan2.1-I2V-14B, in percent: arXiv 2508.21019.
PAPER = {
    "teacher-100nfe": (92.90, 80.82, 70.44),
    "apt": (84.87, 75.21, 64.69),
    "dmd2": (83.15, 71.67, 62.47),
    "magic": (84.02, 74.25, 64.76),
    CHAIN[0].name: (84.92, 72.34, 59.75),
    "vpae": (91.54, 79.56, 68.66),
    "vpae-4nfe": (94.93, 82.24, 70.76),
}
VBENCH = [name for name, short in PAPER_NAMES.items() if short != "Total"]


@dataclass(frozen=True)
class Run:
    """One row of one experiment.

    Attributes:
        method: digest of what makes the method, without the seed.
        scores: metric -> its interval over videos; the mean score among them.
        score_of: what the mean score is the mean of.
        cost: of training, from the teacher to the row's model: sums, and of the memory the most.
        depth: of how many other files the experiment is an overlay.
        papers: whether what led to the row is what the paper reports, and no ablation of it.
    """

    row: str
    experiment: str
    method: str
    seed: int
    nfe: int
    scores: dict[str, Interval]
    score_of: str
    cost: dict[str, float]
    commit: str
    depth: int = 0
    papers: bool = True


def runs_of(source: Source, results: Path = RESULTS) -> list[Run]:
    """Every row of a finished experiment.

    Raises:
        ArtifactError: it is not evaluated, or was with other settings.
    """
    folder = stage_folder(source, "evaluation", results)
    provenance = read_provenance(folder)
    stages, stands = [*made_from(source.settings, "evaluation"), "evaluation"], standing(source, results)
    if provenance is None or any(stands.get(stage) is False for stage in stages):
        problems = [one for stage in stages for one in departures(source, stage, results)]
        state = "is not there" if provenance is None else "was made with other settings or of other results"
        remedy = f"run `snakemake all --config experiment={source.name}` first"
        raise ArtifactError("\n  ".join([f"{folder} {state}: {remedy}", *problems]))
    scores = json.loads((folder / "scores.json").read_text())["rows"]
    official = _official_scores(folder)
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    unseeded = source.settings.model_copy(update={"seed": 0})
    found = []
    for row, sampler in source.settings.samples.rows.items():
        stages = source.settings.chain(sampler.model) if sampler.model in METHODS else []
        trained = {stage: _provenance(stage_folder(source, stage, results)) for stage in stages}
        maker = provenance
        if sampler.model in METHODS:
            maker = trained[sampler.model]
        elif sampler.model in source.settings.students:  # which need not be here any more
            maker = read_provenance(stage_folder(source, sampler.model, results)) or {"code": {"commit": ""}}
        videos = np.array([np.mean([record[m] for m in truth.METRICS]) for record in records if record["row"] == row])
        score = (official or {}).get(row)
        if official is None and len(videos):
            score = of_mean(videos, source.settings.evaluation.bootstrap, source.settings.seed)
        found.append(
            Run(
                row=row,
                experiment=source.name,
                method=digest([sampler.model_dump(), *(fingerprint(unseeded, s) for s in ("latents", sampler.model))]),
                seed=source.settings.seed,
                nfe=sampler.nfe,
                scores=({SCORE: score} if score else {}) | scores[row],
                score_of=OF_TRUTH if official is None else OF_VBENCH,
                cost=_cost(source.settings, trained),
                commit=maker["code"]["commit"] or "",
                depth=len([*source.ancestors()]),
                papers=sampler.model not in source.settings.students  # of which nothing is known
                and all(METHODS[stage].as_published(source.settings) for stage in stages),
            )
        )
    return found


def _provenance(folder: Path) -> dict:
    found = read_provenance(folder)
    if found is None:
        raise ArtifactError(f"{folder} is missing, but videos of its model are evaluated; run its stage again")
    return found


def _official_scores(folder: Path) -> dict[str, Interval] | None:
    """Row -> the mean of SA, TC and FQ, of rows of which they were all measured; None: not by VBench's own networks."""
    file = folder / "vbench.json"
    content = json.loads(file.read_text()) if file.is_file() else {"backbones": "off"}
    if content["backbones"] != "official":
        return None
    totals = {row: [entry[name] for name in VBENCH] for row, entry in content["rows"].items()}
    means = {row: float(np.mean(values)) for row, values in totals.items() if None not in values}
    return {row: {"mean": mean, "low": None, "high": None} for row, mean in means.items()}


def _cost(settings: Experiment, trained: dict[str, dict]) -> dict[str, float]:
    """What training took: stage -> provenance in, sums out; of memory and of the weights trained at once the most."""
    if not trained:
        return {}
    counts = [provenance["counts"] for provenance in trained.values()]
    return {
        "network_evaluations": sum(network_evaluations(settings, stage) for stage in trained),
        "seconds": sum(map(_seconds, trained.values())),
        "trained_parameters": max(count["trained_parameters"] for count in counts),
        "peak_memory_bytes": max(provenance["peak_memory_bytes"] for provenance in trained.values()),
    }


def _seconds(provenance: dict) -> float:
    """Of all steps: a stage that was resumed knows the time of its last run alone.

    Results from before the sum was kept have the larger of that time and of all steps at their median.
    """
    counts = provenance["counts"]
    if "training_seconds" in counts:
        return counts["training_seconds"]
    return max(provenance["seconds"], counts.get("steps", 0) * counts.get("seconds_per_step", 0.0))


def over_seeds(values: Sequence[Interval]) -> Interval:
    """Mean and 95% interval of a method: Student's over its seeds; of one seed, the interval over its videos."""
    if len(values) == 1:
        return values[0]
    means = np.array([value["mean"] for value in values])
    half = stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / len(means) ** 0.5
    return {"mean": float(means.mean()), "low": float(means.mean() - half), "high": float(means.mean() + half)}


def compare(runs: Sequence[Run]) -> dict[str, dict]:
    """Name of a method -> its line, in the order of the runs.

    Raises:
        ConfigError: runs measure different things.
    """
    for run in runs:
        if run.score_of != runs[0].score_of:
            raise ConfigError(
                f"the mean score is that of {runs[0].score_of} in {runs[0].experiment}, and that of {run.score_of} in "
                f"{run.experiment}: give both the same evaluation.vbench.backbones"
            )
    methods: dict[str, list[Run]] = {}
    for run in runs:
        known = methods.setdefault(run.method, [])
        if run.seed not in {other.seed for other in known}:  # two overlays of one base have its rows in common
            known.append(run)
    labels = _labels(methods)
    rows = {labels[method]: _line(found) for method, found in methods.items()}
    for method, found in methods.items():
        if (name := labels[method]) in PAPER and all(run.papers for run in found):
            rows[name]["paper_score"] = round(float(np.mean(PAPER[name])), 2)
    return rows


def _labels(methods: dict[str, list[Run]]) -> dict[str, str]:
    """The bare name is that of the experiment that is an overlay of the fewest others, and of those the first.

    A student's one step is what is compared, so it has the method's name alone; the teacher's is Euler's method.
    """
    rows = {method: found[0].row for method, found in methods.items()}
    short = {method: "euler" if row == "teacher-1nfe" else row.removesuffix("-1nfe") for method, row in rows.items()}
    owners: dict[str, str] = {}
    for method in sorted(methods, key=lambda method: min(run.depth for run in methods[method])):
        owners.setdefault(short[method], method)
    return {
        method: name if owners[name] == method else f"{name} ({methods[method][0].experiment})"
        for method, name in short.items()
    }


def _line(runs: list[Run]) -> dict:
    metrics = runs[0].scores.keys()
    for run in runs:
        if run.scores.keys() != metrics:
            raise ConfigError(
                f"{run.experiment} measures {', '.join(run.scores)} of {run.row}, {runs[0].experiment} measures "
                f"{', '.join(metrics)}: evaluate both alike"
            )
    intervals = {metric: over_seeds([run.scores[metric] for run in runs]) for metric in metrics}
    score = intervals.pop(SCORE, None)
    return {
        "nfe": runs[0].nfe,
        "seeds": [run.seed for run in runs],
        **({SCORE: score["mean"], "low": score["low"], "high": score["high"]} if score else {}),
        **{metric: value["mean"] for metric, value in intervals.items()},
        "intervals": {metric: [value["low"], value["high"]] for metric, value in intervals.items()},
        "cost": {name: float(np.mean([run.cost[name] for run in runs])) for name in runs[0].cost},
        "experiments": [run.experiment for run in runs],
        "commits": sorted({run.commit for run in runs}),
    }


def run(experiments: Sequence[str], out: Path, configs: Path = Path("configs"), results: Path = RESULTS) -> list[Path]:
    """Compare the experiments CONFIGS/NAME.yaml and write the tables; returns their paths."""
    sources = [load(configs / f"{name}.yaml") for name in experiments]
    require_alike(sources)
    runs = [run for source in sources for run in runs_of(source, results)]
    return write(compare(runs), runs[0].score_of, made_of(sources, results), out)


def write(rows: dict[str, dict], score_of: str, of: dict[str, str], out: Path) -> list[Path]:
    """Write `OUT.json`, `OUT.csv` and `OUT.md`; returns their paths. `of` says which evaluations are in them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out.with_name(f"{out.name}.{kind}") for kind in ("json", "csv", "md")]
    write_json(paths[0], {"mean_score_of": score_of, "made_of": of, "rows": rows})
    with written(paths[1]) as temporary, temporary.open("w", newline="") as file:
        lines = [{"method": name, **_flat(row)} for name, row in rows.items()]
        columns = list(dict.fromkeys(key for line in lines for key in line))
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
    with written(paths[2]) as temporary:
        temporary.write_text(text(rows, score_of))
    return paths


def _flat(row: dict) -> dict[str, object]:
    values = {key: value for key, value in row.items() if key not in ("intervals", "cost")}
    for metric, (low, high) in row["intervals"].items():
        values |= {f"{metric}_low": low, f"{metric}_high": high}
    return {key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in (values | row["cost"]).items()}


def text(rows: dict[str, dict], score_of: str) -> str:
    """The table with half-widths of the 95% intervals, and below it what they are."""
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row["intervals"]))
    head = ["method", "NFE", "seeds", "mean score", *metrics]
    head += ["evaluations", "train s", "trained", "peak GB", "commit", "paper"]
    lines = []
    for name, row in rows.items():
        ends = {SCORE: [row["low"], row["high"]] if SCORE in row else None, **row["intervals"]}
        # Of one seed, what is known of a latency is its fastest and slowest run.
        single = [m for m in metrics if m.startswith("latency") and len(row["seeds"]) == 1]
        scores = [_cell(row.get(m), None if m in single else ends.get(m)) for m in (SCORE, *metrics)]
        costs = [""] * 4
        if cost := row["cost"]:
            costs = [f"{cost['network_evaluations']:.0f}", f"{cost['seconds']:.0f}"]
            costs += [f"{cost['trained_parameters'] / 1e6:.2f}M", f"{cost['peak_memory_bytes'] / 1e9:.2f}"]
        commits = " ".join(commit[:7] for commit in row["commits"])
        paper = f"{row['paper_score']:.2f}" if "paper_score" in row else ""
        lines.append([name, str(row["nfe"]), str(len(row["seeds"])), *scores, *costs, commits, paper])
    notes = (
        f"Mean score: that of {score_of}. ± is half a 95% interval: Student's over seeds, of one seed over videos. "
        "Cost: of training a seed, from the teacher to the row's model; clips through a network (a guided step counts "
        "twice, a backward pass not), seconds of all steps on the machine at hand, weights trained and memory "
        "at most at once. "
        "Paper: the mean of SA, TC and FQ that it reports of Wan2.1-I2V-14B, in percent; of another model and other "
        "clips, so that only the order compares."
    )
    if not any(SCORE in row for row in rows.values()):
        notes += (
            " No row has a mean score, for which all of these have to be measured; SA needs camera_motion, of videos "
            "whose caption asks for a movement of the camera."
        )
    return "\n".join([markdown(head, lines), "", notes, ""])


def _cell(mean: float | None, ends: Sequence[float] | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.4f}" if ends is None or None in ends else f"{mean:.4f} ± {half_width(mean, *ends):.4f}"
