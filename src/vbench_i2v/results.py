"""What is written of a score: VBench's own two files, and one that says what they leave out.

`{name}_eval_results.json` is what VBench's `cal_i2v_final_score.py` and the leaderboard read, `{name}_full_info.json`
the prompts with the videos found; `{name}_scores.json` has totals, completeness, settings and sizes.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vbench_i2v import __version__, camera, scores
from vbench_i2v.base import Dimension
from vbench_i2v.dimensions import DIMENSIONS
from vbench_i2v.errors import VBenchError
from vbench_i2v.files import write_json
from vbench_i2v.scores import COLUMNS
from vbench_i2v.suite import IMAGE_DIMENSIONS, Clip, Plan

GEOMETRY = ("frames", "height", "width", "fps")
_OURS = {"key", "dimension", "video", *GEOMETRY}  # of a record; the rest is what VBench's file has
Gathered = Mapping[str, list[tuple[Clip, dict]]]


@dataclass(frozen=True)
class Score:
    """Dimension -> value (0 to 1; None: not computed), videos measured, videos expected, and why a value is absent."""

    values: dict[str, float | None]
    counts: dict[str, int]
    expected: dict[str, int]
    gaps: dict[str, str]

    def table(self) -> str:
        """For people."""
        return scores.table(self.values, self.counts, self.expected, self.gaps)


def score(
    plan: Plan,
    gathered: Gathered,
    not_computed: Mapping[str, str] | None = None,
    allow_incomplete: bool = False,
    dimensions: Mapping[str, Dimension] = DIMENSIONS,
) -> Score:
    """Aggregate what was gathered.

    Args:
        plan: what there should be.
        gathered: the records there are.
        not_computed: dimension -> why its network is absent.
        allow_incomplete: take the mean of the videos there are, and say how many; otherwise all or nothing.
        dimensions: what aggregates.

    Raises:
        VBenchError: records are missing.
    """
    reasons = dict(not_computed or {})
    values: dict[str, float | None] = {}
    counts = {name: len(gathered.get(name, ())) for name in COLUMNS}
    expected = {name: plan.expected.get(name, 0) for name in COLUMNS}
    gaps = {}
    for name in COLUMNS:
        n, of = counts[name], expected[name]
        if not of:
            gaps[name] = "not asked for" if name not in plan.expected else "no video asks for it"
        elif name in reasons:
            gaps[name] = f"not computed: {reasons[name]}"
        elif n < of and not allow_incomplete:
            raise VBenchError(
                f"{name}: {n} of {of} videos have a record; run the parts that are left, or --allow-incomplete"
            )
        elif not n:
            gaps[name] = "no video could be measured"
        # A network that fails half-way leaves some records: no value, as for those that fail at once.
        values[name] = None if name in gaps else dimensions[name].aggregate([record for _, record in gathered[name]])
    return Score(values, counts, expected, gaps)


def eval_results(found: Score, gathered: Gathered, whole_paths: bool = True) -> dict[str, list]:
    """The content of `_eval_results.json`; absent dimensions are absent, for VBench's reader to see."""
    tree: dict[str, list] = {}
    for name in COLUMNS:
        if found.values[name] is None:
            continue
        videos = [_entry(name, clip, record, whole_paths) for clip, record in gathered[name]]
        between = [camera.by_type(videos)] if name == "camera_motion" else []
        tree[name] = [found.values[name], *between, videos]
    return tree


def _entry(name: str, clip: Clip, record: dict, whole_paths: bool) -> dict:
    image = {"image_path": _said(clip.item.image, whole_paths)} if name in IMAGE_DIMENSIONS else {}
    measured = {key: value for key, value in record.items() if key not in _OURS}
    return {**image, "video_path": _said(clip.item.video, whole_paths), **measured}


def _said(path: Path, whole: bool) -> str:
    """A path as given, or only its last folder and name, which stay true when results are moved."""
    return str(path) if whole else f"{path.parent.name}/{path.name}"


def full_info(plan: Plan, whole_paths: bool = True) -> list[dict]:
    """The content of `_full_info.json`: the suite's records with the videos found."""
    found: dict[str, dict] = {}
    for clip in plan.clips:
        entry = found.setdefault(clip.prompt.text, {**clip.prompt.record(), "video_list": []})
        entry["video_list"].append(_said(clip.item.video, whole_paths))
    return list(found.values())


def account(
    found: Score,
    plan: Plan,
    gathered: Gathered,
    backbones: str,
    damaged: Mapping[str, str],
    comparable: bool,
    **more: object,
) -> dict:
    """The content of `_scores.json`: totals, completeness, and `more` as it is.

    Args:
        found: the values.
        plan: the videos.
        gathered: their records.
        backbones: name of the networks.
        damaged: video -> why it could not be measured.
        comparable: whether suite and networks are those of published scores.
        more: settings and the like.
    """
    of_video = {clip.item.video: record for pairs in gathered.values() for clip, record in pairs}
    sizes = Counter(tuple(record[key] for key in GEOMETRY) for record in of_video.values())
    complete = not found.gaps and found.counts == found.expected
    return {
        "backbones": backbones,
        "complete": complete,
        "comparable_with_published_scores": comparable and complete,
        **scores.summary(found.values),
        "dimensions": {
            name: {
                "value": found.values[name],
                "videos": found.counts[name],
                "expected": found.expected[name],
                **({"reason": found.gaps[name]} if name in found.gaps else {}),
            }
            for name in COLUMNS
        },
        "missing_videos": list(plan.missing),
        "extra_videos": list(plan.extra),
        "damaged_videos": dict(damaged),
        "sizes": [dict(zip(GEOMETRY, size, strict=True)) | {"videos": n} for size, n in sorted(sizes.items())],
        "ratio": plan.ratio,
        **more,
        "version": __version__,
    }


def write(
    folder: Path,
    name: str,
    plan: Plan,
    gathered: Gathered,
    found: Score,
    accounted: dict,
    whole_paths: bool = True,
) -> Path:
    """Write the three files; returns the path of VBench's results."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}_full_info.json", full_info(plan, whole_paths))
    write_json(folder / f"{name}_scores.json", accounted)
    results = folder / f"{name}_eval_results.json"
    write_json(results, eval_results(found, gathered, whole_paths))
    return results
