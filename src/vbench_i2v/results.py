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
    """What was gathered of a plan, aggregated.

    Attributes:
        plan: what there should be.
        gathered: the records there are.
        values: dimension -> value, 0 to 1; None: not computed.
        gaps: dimension -> why it has no value.
    """

    plan: Plan
    gathered: Gathered
    values: dict[str, float | None]
    gaps: dict[str, str]

    @property
    def counts(self) -> dict[str, int]:
        """Dimension -> videos measured."""
        return {name: len(self.gathered.get(name, ())) for name in COLUMNS}

    @property
    def expected(self) -> dict[str, int]:
        """Dimension -> videos there should be."""
        return {name: self.plan.expected.get(name, 0) for name in COLUMNS}

    def table(self) -> str:
        """For people."""
        return scores.table(self.values, self.counts, self.expected, self.gaps)

    def eval_results(self, whole_paths: bool = True) -> dict[str, list]:
        """The content of `_eval_results.json`; absent dimensions are absent, for VBench's reader to see."""
        tree: dict[str, list] = {}
        for name, value in self.values.items():
            if value is not None:
                videos = [_entry(name, clip, record, whole_paths) for clip, record in self.gathered[name]]
                tree[name] = [value, *([camera.by_type(videos)] if name == "camera_motion" else []), videos]
        return tree

    def full_info(self, whole_paths: bool = True) -> list[dict]:
        """The content of `_full_info.json`: the suite's records with the videos found."""
        found: dict[str, dict] = {}
        for clip in self.plan.clips:
            entry = found.setdefault(clip.prompt.text, {**clip.prompt.record(), "video_list": []})
            entry["video_list"].append(_said(clip.item.video, whole_paths))
        return list(found.values())

    def account(self, backbones: str, damaged: Mapping[str, str], comparable: bool, **more: object) -> dict:
        """The content of `_scores.json`: totals, completeness, and `more` as it is.

        Args:
            backbones: name of the networks.
            damaged: video -> why it could not be measured.
            comparable: whether suite and networks are those of published scores.
            more: settings and the like.
        """
        of_video = {clip.item.video: record for pairs in self.gathered.values() for clip, record in pairs}
        sizes = Counter(tuple(record[key] for key in GEOMETRY) for record in of_video.values())
        complete = not self.gaps and self.counts == self.expected
        return {
            "backbones": backbones,
            "complete": complete,
            "comparable_with_published_scores": comparable and complete,
            **scores.summary(self.values),
            "dimensions": {
                name: {
                    "value": value,
                    "videos": self.counts[name],
                    "expected": self.expected[name],
                    **({"reason": self.gaps[name]} if name in self.gaps else {}),
                }
                for name, value in self.values.items()
            },
            "missing_videos": list(self.plan.missing),
            "extra_videos": list(self.plan.extra),
            "damaged_videos": dict(damaged),
            "sizes": [dict(zip(GEOMETRY, size, strict=True)) | {"videos": n} for size, n in sorted(sizes.items())],
            "ratio": self.plan.ratio,
            **more,
            "version": __version__,
        }

    def write(self, folder: Path, name: str, accounted: dict, whole_paths: bool = True) -> Path:
        """Write the three files; returns the path of VBench's results."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}_full_info.json", self.full_info(whole_paths))
        write_json(folder / f"{name}_scores.json", accounted)
        results = folder / f"{name}_eval_results.json"
        write_json(results, self.eval_results(whole_paths))
        return results


def score(
    plan: Plan,
    gathered: Gathered,
    not_computed: Mapping[str, str] | None = None,
    allow_incomplete: bool = False,
    dimensions: Mapping[str, Dimension] = DIMENSIONS,
) -> Score:
    """Aggregate what was gathered.

    Args:
        plan, gathered: see `Score`.
        not_computed: dimension -> why its network is absent.
        allow_incomplete: take the mean of the videos there are, and say how many; otherwise all or nothing.
        dimensions: what aggregates.

    Raises:
        VBenchError: records are missing.
    """
    reasons, found = not_computed or {}, Score(plan, gathered, {}, {})
    for name, of in found.expected.items():
        n, why = found.counts[name], None
        if not of:
            why = "not asked for" if name not in plan.expected else "no video asks for it"
        elif name in reasons:
            # A network that fails half-way leaves some records: no value, as for those that fail at once.
            why = f"not computed: {reasons[name]}"
        elif n < of and not allow_incomplete:
            raise VBenchError(
                f"{name}: {n} of {of} videos have a record; run the parts that are left, or give --allow-incomplete"
            )
        elif not n:
            why = "no video could be measured"
        if why:
            found.gaps[name] = why
        found.values[name] = None if why else dimensions[name].aggregate([record for _, record in gathered[name]])
    return found


def _entry(name: str, clip: Clip, record: dict, whole_paths: bool) -> dict:
    image = {"image_path": _said(clip.item.image, whole_paths)} if name in IMAGE_DIMENSIONS else {}
    measured = {key: value for key, value in record.items() if key not in _OURS}
    return {**image, "video_path": _said(clip.item.video, whole_paths), **measured}


def _said(path: Path, whole: bool) -> str:
    """A path as given, or only its last folder and name, which stay true when results are moved."""
    return str(path) if whole else f"{path.parent.name}/{path.name}"
