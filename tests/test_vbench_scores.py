"""VBench-I2V's totals: five published rows, files of VBench's format, and what is said of what is missing."""

import json
import math
from pathlib import Path

import pytest

from vbench_i2v.errors import VBenchError
from vbench_i2v.scores import COLUMNS, OFFICIAL_COUNTS, partial, read_results, reasons, totals
from vpae.cli import main

# Leaderboard rows, in percent: camera_motion, i2v_subject, i2v_background, subject_consistency, background_consistency,
# motion_smoothness, dynamic_degree, aesthetic_quality, imaging_quality; then I2V Score, Quality Score and Total.
PUBLISHED = {
    "Wan2.1-I2V-14B-720P": ((34.76, 96.95, 96.44, 94.86, 97.07, 97.90, 51.38, 64.75, 70.44), (92.90, 80.82, 86.86)),
    "MAGI-1": ((50.85, 98.39, 99.00, 93.96, 96.74, 98.68, 68.21, 64.74, 69.71), (96.12, 82.44, 89.28)),
    "CogVideoX-5b-I2V": ((67.68, 97.19, 96.74, 94.34, 96.42, 98.40, 33.17, 61.87, 70.01), (94.79, 78.61, 86.70)),
    "Step-Video-TI2V": ((49.23, 97.86, 98.63, 96.02, 97.06, 99.24, 48.78, 62.29, 70.44), (95.50, 81.22, 88.36)),
    "HunyuanVideo-I2V": ((49.91, 98.53, 97.37, 95.26, 96.70, 99.23, 22.20, 62.55, 70.14), (95.10, 78.54, 86.82)),
}
# Inputs and totals are rounded to 0.01 where they are published.
ROUNDED = 0.01


def row(name: str) -> dict[str, float]:
    return {key: value / 100 for key, value in zip(COLUMNS, PUBLISHED[name][0], strict=True)}


def write(path: Path, values: dict, videos: int = 2) -> Path:
    entries = [{"video_path": f"{i}.mp4", "video_results": 0.5} for i in range(videos)]
    tree = {name: [value, entries] for name, value in values.items()}
    if "camera_motion" in tree:
        tree["camera_motion"].insert(1, {"pan_left": 0.5})
    path.write_text(json.dumps(tree, indent=4))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "row_eval_results.json", row(name))
    assert main(["evaluation", "score", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"i2v_score", "quality_score", "imaging_quality", "total"}
    for key, published in zip(("i2v_score", "quality_score", "total"), PUBLISHED[name][1], strict=True):
        assert found[key] == pytest.approx(published, abs=ROUNDED)
    assert found["imaging_quality"] == pytest.approx(PUBLISHED[name][0][-1])


def test_totals_by_hand() -> None:
    """The extremes of the ranges give 0 and 100 points; weights as on the leaderboard."""
    low = {name: column.minimum for name, column in COLUMNS.items()}
    high = {name: column.maximum for name, column in COLUMNS.items()}
    assert totals(low) == pytest.approx(dict.fromkeys(totals(low), 0.0), abs=1e-12)
    assert totals(high) == pytest.approx(dict.fromkeys(totals(high), 100.0))
    assert totals(low | {"camera_motion": 1.0})["i2v_score"] == pytest.approx(100 * 0.1 / 2.1)
    assert totals(low | {"dynamic_degree": 1.0})["quality_score"] == pytest.approx(100 * 0.5 / 5.5)
    # Not clipped: VBench lets smoothness above its maximum count for more than 1.
    assert totals(high | {"motion_smoothness": 1.0})["quality_score"] > 100


def test_a_missing_dimension_is_null_with_a_reason_and_never_zero() -> None:
    values = row("MAGI-1")
    del values["camera_motion"]
    found = totals(values)
    assert found["i2v_score"] is None and found["total"] is None
    assert found["quality_score"] == totals(row("MAGI-1"))["quality_score"]
    assert reasons(values) == {"i2v_score": "without camera_motion", "total": "without camera_motion"}
    rest = partial(values)
    subject, background = ((values[k] - COLUMNS[k].minimum) / (1 - COLUMNS[k].minimum) for k in list(COLUMNS)[1:3])
    assert rest["i2v_score without camera_motion"] == pytest.approx(50 * (subject + background))
    assert rest["total without camera_motion"] == pytest.approx(
        (rest["i2v_score without camera_motion"] + found["quality_score"]) / 2
    )


def test_nothing_of_a_group_leaves_nothing_to_average() -> None:
    values = {name: 0.9 for name, column in COLUMNS.items() if column.group == "i2v_score"}
    assert totals(values)["i2v_score"] is not None
    assert totals(values)["quality_score"] is totals(values)["total"] is totals(values)["imaging_quality"] is None
    assert partial(values) == {}


def test_json_of_incomplete_results(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    values = row("MAGI-1")
    del values["imaging_quality"]
    assert main(["evaluation", "score", str(write(tmp_path / "r_eval_results.json", values)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["imaging_quality"] is None and found["quality_score"] is None and found["total"] is None
    assert found["reasons"]["quality_score"] == "without imaging_quality"
    assert 0 < found["partial"]["quality_score without imaging_quality"] < 100


def test_table_names_gaps_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    values = row("MAGI-1")
    del values["i2v_background"]
    assert main(["evaluation", "score", str(write(tmp_path / "r_eval_results.json", values, videos=1230))]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines() if line}
    assert set(COLUMNS) <= set(lines)
    assert "98.39" in lines["i2v_subject"] and "1230/1230" in lines["i2v_subject"]
    assert "incomplete" in lines["aesthetic_quality"] and "1230/1775" in lines["aesthetic_quality"]
    assert "not in the results" in lines["i2v_background"] and " - " in lines["i2v_background"]
    assert "SA without i2v_background" in printed


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"imaging_quality": [0.7]}), encoding="utf-8-sig")
    assert read_results([tmp_path / "r.json"]).values == {"imaging_quality": 0.7}


def test_several_files_and_the_unscored_dimension(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    values = row("MAGI-1")
    first = write(tmp_path / "a_eval_results.json", {"camera_motion": values.pop("camera_motion")})
    second = write(tmp_path / "b_eval_results.json", values | {"temporal_flickering": 0.97})
    found = read_results([first, second])
    assert totals(found.values) == totals(row("MAGI-1"))
    assert found.counts == dict.fromkeys(COLUMNS, 2)
    for name, measured in ({"a": ["camera_motion"], "b": list(values)}).items():
        dimensions = {
            d: {"expected": 2} if d in measured else {"expected": 0, "reason": "not asked for"} for d in COLUMNS
        }
        account = {"backbones": "official", "dimensions": dimensions}
        (tmp_path / f"{name}_scores.json").write_text(json.dumps(account))
    assert main(["evaluation", "score", str(first), str(second)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("2/2") == 9 and "more than" not in printed
    with pytest.raises(VBenchError, match=r"b_eval_results\.json: \w+ is in another of the files"):
        read_results([second, second])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "not VBench's"),
        ('{"imaging_qualty": [0.7, []]}', "did you mean imaging_quality?"),
        ('{"imaging_quality": 0.7}', r"index \[0\]"),
        ('{"imaging_quality": [null, []]}', r"index \[0\]"),
        ('{"imaging_quality": [70.44, []]}', "not points"),
        ('{"imaging_quality": [NaN, []]}', "is nan"),
    ],
)
def test_files_that_are_none(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x_eval_results.json"
    path.write_text(text)
    with pytest.raises(VBenchError, match=rf"x_eval_results\.json.*{words}"):
        read_results([path])


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluation", "score", str(tmp_path / "none.json"), "--json"]) == 2
    assert "none.json: no such file" in capsys.readouterr().err


def test_the_official_counts_are_those_of_the_suite() -> None:
    subjects, backgrounds, movements = 246, 109, 7
    per_prompt = {
        "camera_motion": backgrounds * movements,
        **dict.fromkeys(("i2v_subject", "subject_consistency", "motion_smoothness", "dynamic_degree"), subjects),
        **dict.fromkeys(("i2v_background", "background_consistency"), backgrounds),
        **dict.fromkeys(("aesthetic_quality", "imaging_quality"), subjects + backgrounds),
    }
    assert {name: 5 * n for name, n in per_prompt.items()} == OFFICIAL_COUNTS
    assert math.isclose(sum(c.weight for c in COLUMNS.values() if c.group == "quality_score"), 5.5)
