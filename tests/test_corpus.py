"""Tables of public corpora: their columns, stretches of films, filters, and a million rows in little memory."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from test_inputs import moving, write_clip
from vpae.artifacts import ArtifactError, file_hashes
from vpae.config.clips import Clips
from vpae.data import corpus
from vpae.data.corpus import Candidate, candidates, read_candidates, write_candidates
from vpae.data.manifest import MANIFEST, read_manifest
from vpae.experiment import ConfigError, Source, load
from vpae.parts import Part
from vpae.stages import run_part, run_stage

OPENVID = {
    "columns": {"path": "{video}"},
    "filters": {"at_least": {"aesthetic score": 5}, "at_most": {"motion score": 20}},
}
KOALA = {"columns": {"path": "{videoID}.mp4", "span": "timestamp"}, "filters": {"min_seconds": 1, "max_seconds": 10}}


def write_table(path: Path, rows: list[dict]) -> Path:
    """CSV, JSONL or parquet, as the suffix says."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def clips(path: Path, **settings: object) -> Clips:
    return Clips(source="table", path=str(path), **settings)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_openvids_columns_and_scores(suffix: str, tmp_path: Path) -> None:
    rows = [
        {"video": f"{n}.mp4", "caption": f"clip {n}", "aesthetic score": score, "motion score": motion, "seconds": 4.0}
        for n, (score, motion) in enumerate([(5.5, 1.0), (4.5, 1.0), (5.0, 21.0), (5.0, 20.0)])
    ]
    found = list(candidates(clips(write_table(tmp_path / f"t{suffix}", rows), root="/corpus", **OPENVID)))
    assert [one.path for one in found] == [f"/corpus/{n}.mp4" for n in range(4)]
    assert [one.reason for one in found] == [
        "",
        "aesthetic score = 4.5 is less than 5",
        "motion score = 21 is more than 20",
        "",
    ]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_koalas_timestamps(suffix: str, tmp_path: Path) -> None:
    spans = [
        "['0:00:06.840', '0:00:11.880']",
        "['0:01:00.000', '0:01:00.500']",
        "['1:00:00', '1:00:30']",
        "nothing",
        "['9', '3']",
    ]
    rows = [{"videoID": f"v_{n}", "caption": "x", "timestamp": span} for n, span in enumerate(spans)]
    found = list(candidates(clips(write_table(tmp_path / f"t{suffix}", rows), **KOALA)))
    assert found[0] == Candidate(str(tmp_path / "v_0.mp4"), "x", 6.84, 11.88)
    assert [one.reason for one in found[1:]] == [
        "0.5 s are less than 1",
        "30 s are more than 10",
        "timestamp = 'nothing' is not a start and an end",
        "it lasts from 9 s to 3 s",
    ]


@pytest.mark.parametrize("value", ["", "n/a", None, float("nan")])
def test_a_score_that_is_no_number_is_not_enough(value: object, tmp_path: Path) -> None:
    rows = [{"path": "a.mp4", "caption": "x", "score": value}, {"path": "b.mp4", "caption": "x", "score": "7"}]
    found = list(candidates(clips(write_table(tmp_path / "t.jsonl", rows), filters={"at_least": {"score": 1}})))
    assert [one.reason for one in found] == ["score = nan is less than 1", ""]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_row_without_a_path_or_a_caption_goes_to_quarantine(suffix: str, tmp_path: Path) -> None:
    rows = [{"path": "a.mp4", "caption": None}, {"path": None, "caption": "x"}, {"path": "b.mp4", "caption": "x"}]
    table = write_table(tmp_path / f"t{suffix}", rows)
    assert list(candidates(clips(table))) == [
        Candidate(f"{tmp_path}/a.mp4", "", reason="it has no caption"),
        Candidate(f"{table}: row 2", "", reason="its path is empty"),
        Candidate(f"{tmp_path}/b.mp4", "x"),
    ]


def test_a_path_that_can_be_no_file_s_name_is_that_row_s_reason(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text('{"path": "a\\ud800.mp4", "caption": "x"}\n{"path": "b.mp4", "caption": "x"}\n')
    write_candidates(tmp_path / "plan.parquet", clips(table))
    bad, good = read_candidates(tmp_path / "plan.parquet", 0, 2)
    assert "can be no file's name" in bad.reason and bad.path == f"{table}: row 1" and not good.reason


def test_values_that_are_no_text_and_rows_that_are_too_short_are_that_row_s_reason(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.jsonl", [{"path": 5, "caption": "x"}, {"path": "a.mp4", "caption": 5}])
    reasons = [one.reason for one in candidates(clips(table))]
    assert reasons == ["its path is no text, but 5", "its caption is no text, but 5"]
    (tmp_path / "t.csv").write_text("path,caption,score\na.mp4\n,x,1\nb.mp4,x\nc.mp4,x,1\n")
    found = candidates(clips(tmp_path / "t.csv", filters={"at_least": {"score": 1}}))
    reasons = ["it has no caption", "its path is empty", "score = nan is less than 1", ""]
    assert [one.reason for one in found] == reasons


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [{"path": "a.mp4", "caption": "x"}])
    with pytest.raises(
        ArtifactError, match=r"t\.csv: row 1: has no column beauty, which clips\.columns or filters name"
    ):
        list(candidates(clips(table, filters={"at_least": {"beauty": 1}})))
    with pytest.raises(ArtifactError, match=r"row 1: needs the columns video and caption"):
        list(candidates(clips(table, columns={"path": "{video}"})))
    with pytest.raises(ArtifactError, match=r"t\.parquet: .*copy or download it again, or correct its suffix"):
        (tmp_path / "t.parquet").write_text("path,caption\n")
        list(candidates(clips(tmp_path / "t.parquet")))


def experiment(folder: Path, **settings: object) -> Source:
    tree = {
        "geometry": {"frames": 5, "height": 32, "width": 32, "fps": 8},
        "clips": {"held_out": 3, "workers": 1, "source": "table", **settings},
        "teacher": {"source": "train"},
        "samples": {"count": 3, "decode": 1},
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(tree))
    return load(folder / "own.yaml")


def test_clips_are_cut_out_of_films_and_a_film_is_not_on_both_sides(tmp_path: Path) -> None:
    rows = []
    for film in range(3):
        frames = np.concatenate([np.roll(moving(count=8), 40 * film + 9 * part, 2) for part in range(4)])
        write_clip(tmp_path / f"film {film}.mp4", frames)
        rows += [
            {"videoID": f"film {film}", "caption": f"{film} {n}", "timestamp": [f"0:00:0{n}", f"{n + 1}"]}
            for n in range(4)
        ]
    rows += [rows[5], {**rows[6], "timestamp": ["0:00:02.0004", "3"]}]  # keys say milliseconds
    table = write_table(tmp_path / "t.parquet", rows)
    columns = {"path": "{videoID}.mp4", "span": "timestamp"}
    source = experiment(tmp_path, path=str(table), columns=columns)
    folder = run_stage(source, "clips", tmp_path / "results")
    found = read_manifest(folder)
    files = {split: {clip.sha256 for clip in found if clip.split == split} for split in ("train", "held_out")}
    assert not files["train"] & files["held_out"]
    assert [clip.split for clip in found].count("held_out") == 3 and [clip.split for clip in found].count("train") == 8
    assert len({clip.key for clip in found}) == 11
    reasons = [json.loads(line)["reason"] for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(reason.partition(" /")[0] for reason in reasons) == [
        "another clip of this file is held out",
        "same content as",
        "same content as",
    ]
    for clip in found:
        film, part = map(int, clip.caption.split())
        whole = np.roll(moving(count=8), 40 * film + 9 * part, 2)[:5].astype(int)
        assert clip.start == part
        assert np.abs(clip.frames(source.settings.geometry, folder) - whole).mean() < 20


@pytest.mark.parametrize("filters", [{}, {"min_seconds": 2.0}])
def test_a_clip_that_begins_later_and_lasts_to_the_end_is_taken(filters: dict, tmp_path: Path) -> None:
    rows = []
    for film in range(7):
        write_clip(tmp_path / f"{film}.mp4", np.roll(moving(count=32), 5 * film, 2))
        rows.append({"path": f"{film}.mp4", "caption": "x", "from": 1.5})
    table = write_table(tmp_path / "t.csv", rows)
    source = experiment(tmp_path, path=str(table), columns={"start": "from"}, filters=filters)
    folder = run_stage(source, "clips", tmp_path / "results")
    assert [clip.start for clip in read_manifest(folder)] == [1.5] * 7


def still(count: int = 12) -> np.ndarray:
    return np.repeat(moving(count=1), count, 0)


@pytest.mark.parametrize(
    ("filters", "left_out"),
    [
        ({"min_motion": 0.002}, {"still.mp4": "nearly still: motion 0.0"}),
        ({"max_jump": 0.2}, {"cut.mp4": "a scene cut: a jump of 0."}),
        ({"min_width": 48}, {"narrow.mp4": "32 x 64 pixels are less than 48 x 0"}),
        ({"min_seconds": 1.4}, {"short.mkv": "1.25 s are less than 1.4"}),
        ({"max_seconds": 1.6}, {"long.mkv": "1.75 s are more than 1.6"}),
        ({}, {}),
    ],
    ids=["motion", "jump", "width", "short", "long", "none"],
)
def test_filters_leave_out_just_what_they_say(filters: dict, left_out: dict, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    for n in range(6):
        write_clip(videos / f"{n}.mp4", np.roll(moving(64, 64), 5 * n, 2))
    write_clip(videos / "still.mp4", np.repeat(moving(64, 64, 1), 12, 0))
    write_clip(videos / "cut.mp4", np.concatenate([moving(64, 64, 3), 255 - moving(64, 64, 9)]))
    write_clip(videos / "narrow.mp4", moving(64, 32))
    write_clip(videos / "short.mkv", moving(64, 64, 10))
    write_clip(videos / "long.mkv", moving(64, 64, 14))
    folder = run_stage(
        experiment(tmp_path, source="folder", path=str(videos), filters=filters), "clips", tmp_path / "results"
    )
    found = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert {Path(row["path"]).name for row in found} == set(left_out)
    for row in found:
        assert row["reason"].startswith(left_out[Path(row["path"]).name])


def test_a_job_reads_only_the_rows_of_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_table(tmp_path / "t.csv", [{"path": f"{n}.mp4", "caption": "x"} for n in range(5000)])
    monkeypatch.setattr("vpae.data.catalog.STRETCH", 500)
    read: list[int] = []
    groups = pq.ParquetFile.read_row_groups

    def counting(file: pq.ParquetFile, wanted: range) -> pa.Table:
        read.extend(wanted)
        return groups(file, wanted)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counting)
    run_part(experiment(tmp_path, path=str(table)), "clips", Part(2, 5), tmp_path / "results")
    assert set(read) <= {0, 1}  # rows 1000 to 1999 of groups of 1024


def test_any_rows_can_be_read_back(tmp_path: Path) -> None:
    rows = [{"path": f"{n}.mp4", "caption": f"caption {n}"} for n in range(3000)]
    settings = clips(write_table(tmp_path / "t.parquet", rows))
    write_candidates(tmp_path / "plan.parquet", settings)
    whole = list(candidates(settings))
    assert corpus.count_candidates(tmp_path / "plan.parquet") == 3000
    for first, count in ((0, 1), (1000, 50), (1024, 1024), (2990, 10), (0, 3000)):
        assert read_candidates(tmp_path / "plan.parquet", first, count) == whole[first : first + count]


def test_parts_give_the_manifest_of_one_job(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    for n in range(8):
        write_clip(videos / f"{n}.mp4", np.roll(moving(), 3 * n, 2))
    source = experiment(tmp_path, source="folder", path=str(videos))
    one = run_stage(source, "clips", tmp_path / "one")
    for number in (2, 1):
        run_part(source, "clips", Part(number, 2), tmp_path / "two")
    two = run_stage(source, "clips", tmp_path / "two")
    assert file_hashes(one) == file_hashes(two)
    assert pq.read_table(one / MANIFEST).num_rows == 8


def test_two_ways_to_say_where_a_clip_lies_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="span holds start and end"):
        experiment(tmp_path, path="t.csv", columns={"span": "a", "start": "b"})
    with pytest.raises(ConfigError, match="names no column in braces"):
        experiment(tmp_path, path="t.csv", columns={"path": "video"})


@pytest.mark.slow
def test_a_million_rows_are_planned_and_shared_within_a_minute_and_two_gibibytes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vpae.bench.ingest", "--rows", "1000000"], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cpu_seconds"] < 60 and found["peak_gib"] < 2
