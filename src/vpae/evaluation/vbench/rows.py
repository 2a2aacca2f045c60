"""VBench-I2V of an experiment's own rows, and how its ranks agree with those of the truth metrics.

It measures the decoded videos of the held-out clips, each against the first frame that it was made from.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from vbench_i2v import camera, results, runner, scores, weights
from vbench_i2v.base import Item
from vbench_i2v.files import user_path
from vbench_i2v.folder import official_networks
from vbench_i2v.packages import version_of
from vbench_i2v.scores import COLUMNS
from vbench_i2v.suite import Clip, Plan, Prompt
from vpae.artifacts import write_json, written
from vpae.config import Experiment, VBench
from vpae.data.latents import LatentDataset
from vpae.evaluation.statistics import markdown
from vpae.evaluation.vbench import processes, tiny
from vpae.parts import Part

FILE, FOLDER = "vbench.json", "vbench"
NOTE = "tiny backbones, not comparable with published scores"
REAL = "real"


def make_plans(
    settings: Experiment, inputs: Mapping[str, Path], suite: Sequence[dict], frames: Path
) -> dict[str, Plan]:
    """Row -> its videos of a suite, with the first frames that they were made from, which are kept in `frames`."""
    config = settings.evaluation.vbench
    wanted = config.wanted()
    decoded = suite[: settings.samples.decode]
    decoded = decoded[: config.videos_per_row or len(decoded)]
    images = _first_frames(LatentDataset(inputs["latents"], "held_out"), decoded, frames)
    plans = {}
    for row in (REAL, *settings.samples.rows):
        clips = []
        for item in decoded:
            movement = camera.asked(item["prompt"])
            names = tuple(name for name in wanted if name != "camera_motion" or movement)
            prompt = Prompt(item["prompt"], names, "held_out", images[item["key"]].name)
            video = Item(inputs["samples"] / row / item["file"], images[item["key"]], movement)
            clips.append(Clip(video, names, prompt))
        expected = {name: sum(name in clip.dimensions for clip in clips) for name in wanted}
        plans[row] = Plan(tuple(clips), expected)
    return plans


def _first_frames(dataset: LatentDataset, suite: Sequence[dict], folder: Path) -> dict[str, Path]:
    """Key -> PNG of the first frame; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {entry.key: number for number, entry in enumerate(dataset.entries)}
    paths = {item["key"]: folder / f"{item['key']}.png" for item in suite}
    for key, path in paths.items():
        if not path.is_file():
            with written(path) as temporary:
                dataset.first_frame(numbers[key]).save(temporary, "PNG")
    return paths


def measure(
    settings: Experiment,
    inputs: Mapping[str, Path],
    suite: Sequence[dict],
    truth: Mapping[str, Mapping[str, float]],
    truth_of_videos: Sequence[dict],
    out: Path,
    state: Path,
) -> None:
    """Score every row and write `vbench.json`, its table `vbench.md`, and VBench's own files of each row in `vbench/`.

    Args:
        settings, inputs, out, state: see `stages`.
        suite: what was animated.
        truth: row -> truth metric -> its value.
        truth_of_videos: one record per row and video with the truth metrics.

    Raises:
        VBenchError: a video cannot be used.
        Interruption: asked to end; what was measured is kept.
    """
    config = settings.evaluation.vbench
    plans, nets, outcome, records = _measured(settings, inputs, suite, state)
    rows, of_videos = {}, {}
    for row, plan in plans.items():
        gathered = runner.gather(plan.clips, nets, records)
        found = results.score(plan, gathered, outcome.not_computed, config.allow_incomplete)
        rows[row] = found.account(nets.backbones.name, outcome.damaged_of(plan.clips), comparable=False)
        found.write(out / FOLDER, row, rows[row], whole_paths=False)
        of_videos[row] = {
            name: {clip.item.video.name: float(record["video_results"]) for clip, record in pairs}
            for name, pairs in gathered.items()
            if found.values[name] is not None
        }
    values = {row: {name: entry["value"] for name, entry in found["dimensions"].items()} for row, found in rows.items()}
    content = {
        "backbones": nets.backbones.name,
        "note": NOTE if config.backbones == "tiny" else "",
        "videos_per_row": len(next(iter(plans.values())).clips),
        "rows": rows,
        "rank_correlation": rank_correlations(values, truth, of_videos, truth_of_videos),
    }
    write_json(out / FILE, content)
    (out / "vbench.md").write_text(table(content))


def _measured(
    settings: Experiment, inputs: Mapping[str, Path], suite: Sequence[dict], state: Path, part: Part | None = None
) -> tuple[dict[str, Plan], runner.Networks, runner.Outcome, Path]:
    """Measure what no record is there for: the plans, the networks, what came of it, and the folder of records."""
    config = settings.evaluation.vbench
    # What the official networks find is dear, and outlives the stage: beside the samples that they measure.
    work = (state if config.backbones == "tiny" else inputs["samples"].parent) / FOLDER
    plans = make_plans(settings, inputs, suite, state / "first_frames")
    clips = [clip for plan in plans.values() for clip in plan.clips]
    records = work / "records"
    if config.backbones == "tiny":
        nets = tiny.networks(inputs["teacher"], work)
        tiny.load(nets, config.wanted())  # once, for all processes
        if part is None:
            processes.share(clips, nets, records, processes.how_many(clips))
    else:
        nets = official_networks(config, allow_incomplete=True)
    outcome = processes.run(clips, nets, records, part, config.allow_incomplete, allow_absent=True)
    return plans, nets, outcome, records


def measure_part(
    settings: Experiment, inputs: Mapping[str, Path], suite: Sequence[dict], state: Path, part: Part
) -> None:
    """One job's share of the videos; `measure` gathers all records.

    Raises:
        VBenchError: a video cannot be used.
        Interruption: asked to end; what was measured is kept.
    """
    *_, outcome, records = _measured(settings, inputs, suite, state, part)
    gaps = {f"{name}: not computed": reason for name, reason in outcome.not_computed.items()}
    gaps |= {
        f"{path.parent.name}/{path.name}{name and f', {name}'}": why for (path, name), why in outcome.damaged.items()
    }
    print(f"{records}: {outcome.computed} new records, {outcome.found} were there", file=sys.stderr)
    for what, why in gaps.items():
        print(f"{what}: {why}", file=sys.stderr)


def rank_correlations(
    values: Mapping[str, Mapping[str, float | None]],
    truth: Mapping[str, Mapping[str, float]],
    of_videos: Mapping[str, Mapping[str, Mapping[str, float]]],
    truth_of_videos: Sequence[dict],
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Spearman's correlation of each dimension with each truth metric, over rows and over all videos of all rows.

    Args:
        values: row -> dimension -> value.
        truth: row -> metric -> value.
        of_videos: row -> dimension -> file -> value.
        truth_of_videos: records with row, file and the metrics of single videos.

    Returns:
        dimension -> metric -> {"rows": ..., "videos": ...}; None where ranks cannot be compared.
    """
    metrics = list(dict.fromkeys(metric for row in truth.values() for metric in row))
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in COLUMNS:
        if all(row.get(name) is None for row in values.values()):
            continue
        found[name] = {}
        for metric in metrics:
            shared = [row for row in values if values[row].get(name) is not None and metric in truth.get(row, {})]
            over_rows = [(values[row][name], truth[row][metric]) for row in shared]
            over_videos = [
                (measured, record[metric])
                for record in truth_of_videos
                if metric in record
                if (measured := of_videos.get(record["row"], {}).get(name, {}).get(record["file"])) is not None
            ]
            found[name][metric] = {"rows": spearman(over_rows), "videos": spearman(over_videos)}
    return found


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Rank correlation, -1 to 1; None of fewer than three pairs, or where one side is constant."""
    if len(pairs) < 3:
        return None
    a, b = np.array(pairs, dtype=float).T
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(stats.spearmanr(a, b).statistic)


def external_inputs(config: VBench) -> dict[str, str]:
    """Which official backbones can be used: a stage that ran without some runs again once they are there."""
    if config.backbones != "official":
        return {}
    why = weights.absent(user_path(config.weights), config.wanted())
    usable = [name for name in config.wanted() if name not in why and not weights.lacking_packages(name)]
    # A package that is there may still not be importable beside this torch: another version of it is another input.
    packages = {name: version for one in usable for name, version in weights.package_versions(one).items()}
    with_torch = {**packages, **{name: version_of(name) for name in ("torch", "torchvision")}} if packages else {}
    versions = ", ".join(f"{name} {version}" for name, version in sorted(with_torch.items()))
    return {"vbench_weights": ", ".join(usable) or "none"} | ({"vbench_packages": versions} if versions else {})


def table(content: Mapping) -> str:
    """The rows' dimensions and totals in points as a Markdown table."""
    lines = []
    for row, found in content["rows"].items():
        shares = [entry["value"] for entry in found["dimensions"].values()]
        points = [None if share is None else 100 * share for share in shares]
        points += [found[name] for name in scores.PAPER_NAMES]
        lines.append([row, *("" if value is None else f"{value:.2f}" for value in points)])
    return markdown(["row", *COLUMNS, *scores.PAPER_NAMES.values()], lines) + "\n"
