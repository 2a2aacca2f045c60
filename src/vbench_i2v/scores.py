"""From nine dimensions to VBench-I2V's totals, and the reading of its result files.

The constants are those of VBench's `scripts/constant.py`, the formulas those of its `cal_i2v_final_score.py`:
n = (x - minimum) / (maximum - minimum), not clipped; a group's score is the weighted mean of its n; Total is the mean
of both groups. V-PAE's paper names three of the numbers SA (I2V Score), TC (Quality Score) and FQ (Imaging Quality).

An absent dimension stays absent: what needs it has no value, and a reason. VBench puts 0 in its place.
"""

import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vbench_i2v.errors import VBenchError
from vbench_i2v.files import read_json


@dataclass(frozen=True)
class Column:
    """A dimension as the leaderboard has it: its title, the range it is normalised by, its weight and its group.

    `videos`: how many the official suite has for it, at five a prompt.
    """

    title: str
    minimum: float
    maximum: float
    weight: float
    group: str
    videos: int


COLUMNS = {
    "camera_motion": Column("Video-Text Camera Motion", 0.0, 1.0, 0.1, "i2v_score", 3815),
    "i2v_subject": Column("Video-Image Subject Consistency", 0.1462, 1.0, 1.0, "i2v_score", 1230),
    "i2v_background": Column("Video-Image Background Consistency", 0.2615, 1.0, 1.0, "i2v_score", 545),
    "subject_consistency": Column("Subject Consistency", 0.1462, 1.0, 1.0, "quality_score", 1230),
    "background_consistency": Column("Background Consistency", 0.2615, 1.0, 1.0, "quality_score", 545),
    "motion_smoothness": Column("Motion Smoothness", 0.7060, 0.9975, 1.0, "quality_score", 1230),
    "dynamic_degree": Column("Dynamic Degree", 0.0, 1.0, 0.5, "quality_score", 1230),
    "aesthetic_quality": Column("Aesthetic Quality", 0.0, 1.0, 1.0, "quality_score", 1775),
    "imaging_quality": Column("Imaging Quality", 0.0, 1.0, 1.0, "quality_score", 1775),
}
UNSCORED = "temporal_flickering"  # in the suite and in some result files, but no part of the I2V totals
# What each total is made of.
PARTS = {
    "i2v_score": tuple(name for name, column in COLUMNS.items() if column.group == "i2v_score"),
    "quality_score": tuple(name for name, column in COLUMNS.items() if column.group == "quality_score"),
    "imaging_quality": ("imaging_quality",),
    "total": tuple(COLUMNS),
}
PAPER_NAMES = {"i2v_score": "SA", "quality_score": "TC", "imaging_quality": "FQ", "total": "Total"}
OFFICIAL_COUNTS = {name: column.videos for name, column in COLUMNS.items()}
_POINTS = 2.0  # a value above this is no share of 1; CLIP's rating / 10, the only unbounded one, stays far below


def normalised(name: str, value: float) -> float:
    """A dimension's value on the scale on which the totals average; not clipped."""
    column = COLUMNS[name]
    return (value - column.minimum) / (column.maximum - column.minimum)


def totals(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """I2V Score, Quality Score, Imaging Quality and Total in points, 0 to 100.

    Args:
        values: dimension -> value as in index [0] of VBench's file, 0 to 1; None or absent: not computed.

    Returns:
        the four totals; None where a part is missing.
    """
    return {name: None if _missing(name, values) else _points(name, values) for name in PARTS}


def reasons(values: Mapping[str, float | None]) -> dict[str, str]:
    """Which totals have no value, and why: "without camera_motion"."""
    missing = {name: _missing(name, values) for name in PARTS}
    return {name: f"without {', '.join(parts)}" for name, parts in missing.items() if parts}


def partial(values: Mapping[str, float | None]) -> dict[str, float]:
    """What the dimensions that are there give, under a name of its own: "i2v_score without camera_motion"."""
    found = {}
    for name, reason in reasons(values).items():
        present = [part for part in PARTS[name] if values.get(part) is not None]
        # A total needs something of both groups, or it would be the one under the other's name.
        if present and len({COLUMNS[part].group for part in present}) == len({COLUMNS[p].group for p in PARTS[name]}):
            found[f"{name} {reason}"] = _points(name, values)
    return found


def _missing(total: str, values: Mapping[str, float | None]) -> list[str]:
    return [part for part in PARTS[total] if values.get(part) is None]


def _points(total: str, values: Mapping[str, float | None]) -> float:
    if total == "imaging_quality":
        return 100 * values["imaging_quality"]
    if total == "total":
        return (_points("i2v_score", values) + _points("quality_score", values)) / 2
    present = [part for part in PARTS[total] if values.get(part) is not None]
    weighted = sum(COLUMNS[part].weight * normalised(part, values[part]) for part in present)
    return 100 * weighted / sum(COLUMNS[part].weight for part in present)


@dataclass(frozen=True)
class Results:
    """What result files hold: dimension -> value in 0 to 1, and dimension -> number of videos where they are listed."""

    values: dict[str, float]
    counts: dict[str, int | None]


def read_results(paths: Sequence[Path]) -> Results:
    """Read one or several of VBench's `_eval_results.json`, each with other dimensions.

    Raises:
        FileNotFoundError: no such file.
        VBenchError: not of VBench's format, a dimension in two files, or a value that is no share of 1.
    """
    values: dict[str, float] = {}
    counts: dict[str, int | None] = {}
    for path in paths:
        for name, entry in _read_dict(path).items():
            if name == UNSCORED:
                continue
            if name not in COLUMNS:
                near = difflib.get_close_matches(name, COLUMNS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"VBench-I2V has {', '.join(COLUMNS)}"
                raise VBenchError(f"{path}: {name}: unknown dimension; {hint}")
            if name in values:
                raise VBenchError(f"{path}: {name} is in another of the files, too; name each dimension once")
            values[name] = _value(path, name, entry)
            counts[name] = len(entry[-1]) if isinstance(entry[-1], list) else None
    return Results(values, counts)


def _read_dict(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a file that VBench or `vbench-i2v run` has written")
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise VBenchError(f"{path}: holds a {type(tree).__name__}, not VBench's {{dimension: [value, ...]}}")
    return tree


def _value(path: Path, name: str, entry: object) -> float:
    if not isinstance(entry, list) or not entry or isinstance(entry[0], bool) or not isinstance(entry[0], int | float):
        raise VBenchError(f"{path}: {name}: index [0] must be the dimension's value, as in VBench's own files")
    value = math.inf if abs(entry[0]) > sys.float_info.max else float(entry[0])
    if not math.isfinite(value):
        raise VBenchError(f"{path}: {name} is {value}; a video that could not be measured spoils the mean")
    if abs(value) > _POINTS:
        raise VBenchError(f"{path}: {name} is {value:g}; VBench's files hold scores from 0 to 1, not points")
    return value


def summary(values: Mapping[str, float | None]) -> dict:
    """The four totals; where some are missing also why, and what the rest gives under its own name."""
    found: dict = dict(totals(values))
    if why := reasons(values):
        found |= {"reasons": why, "partial": partial(values)}
    return found


def table(
    values: Mapping[str, float | None],
    counts: Mapping[str, int | None],
    expected: Mapping[str, int],
    gaps: Mapping[str, str] | None = None,
) -> str:
    """All nine dimensions and the totals, for people.

    Args:
        values: dimension -> value, 0 to 1; None or absent: not computed.
        counts: dimension -> videos measured, as far as known.
        expected: dimension -> videos there should be.
        gaps: dimension -> why it is absent.
    """
    lines = [f"{'dimension':<24}{'points':>8}  {'videos':>11}"]
    for name in COLUMNS:
        value, n, of = values.get(name), counts.get(name), expected.get(name, 0)
        if value is None:
            of_all, note = f"{n or 0}/{of}", (gaps or {}).get(name, "not in the results")
            lines.append(f"{name:<24}{'-':>8}  {of_all:>11}  {note}")
            continue
        of_all = f"{'?' if n is None else n}/{of}"
        note = "" if n in (None, of) else "  incomplete" if n < of else "  more than the suite has"
        lines.append(f"{name:<24}{100 * value:8.2f}  {of_all:>11}{note}")
    lines.append("")
    why, rest = reasons(values), partial(values)
    for name, value in totals(values).items():
        short = PAPER_NAMES[name]
        label = short if short.lower() == name else f"{short} ({name})"
        if value is not None:
            lines.append(f"{label:<24}{value:8.2f}")
            continue
        lines.append(f"{label:<24}{'-':>8}  {why[name]}")
        if (key := f"{name} {why[name]}") in rest:
            lines.append(f"  {short} {why[name]}: {rest[key]:.2f}")
    return "\n".join(lines)
