"""Measuring that is killed, shared out and put together again; and a folder scored from the command line."""

import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import synthetic
from vbench_i2v import folder, results, runner, weights
from vbench_i2v.backbones.raft import RAFT
from vbench_i2v.base import Dimension, Item
from vbench_i2v.command import main as vbench_i2v
from vbench_i2v.errors import NotComputed, VBenchError
from vbench_i2v.runner import Networks, gather, read_records, run
from vbench_i2v.scores import COLUMNS, PAPER_NAMES, read_results, totals
from vbench_i2v.settings import Folder, Measure
from vbench_i2v.suite import Clip, Plan, Prompt, plan_suite, read_suite
from vpae.artifacts import ArtifactError
from vpae.cli import main
from vpae.data.video import read_frames, write_video
from vpae.evaluation.vbench import processes, sample, tiny
from vpae.evaluation.vbench.rows import _first_frames, rank_correlations, table
from vpae.models.wan import load_pipeline
from vpae.parts import Part
from vpae.sampling.single import animate

VIDEOS = 1000


class FakeBackbones:
    """The runner asks for no more than a name."""

    name = "fake"
    device = torch.device("cpu")


NETS = Networks(FakeBackbones())


def counting(log: Path, patience: int | None = None) -> dict[str, Dimension]:
    """Cheap dimensions that read the frames, and note every measurement in a file.

    After `patience` measurements they wait to be killed, so that who kills need not be quick.
    """
    made = itertools.count()

    def measure(video, item, _backbones) -> dict:
        if next(made) == patience:
            time.sleep(3600)
        values = [float(frame.float().mean()) for frame in video.frames()]
        with log.open("a") as file:
            file.write(f"{item.video.name}\n")
        shape = {"fps": video.fps, "frames": len(values), "height": video.height, "width": video.width}
        shape |= {"prompt_type": item.camera} if item.camera else {}
        return {"video_results": math.fsum(values) / len(values) / 255, **shape}

    def mean(records: list[dict]) -> float:
        return math.fsum(r["video_results"] for r in records) / len(records)

    return {name: Dimension(measure, mean) for name in COLUMNS}


def noise(path: Path, seed: int, frames: int = 2) -> None:
    write_video(path, np.random.default_rng(seed).integers(0, 255, (frames, 16, 16, 3), dtype=np.uint8), 8, 30, False)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A suite of 200 prompts with five videos each, all different."""
    folder = tmp_path_factory.mktemp("thousand")
    suite = synthetic.records(104, 12)
    (folder / "suite.json").write_text(json.dumps(suite))
    (folder / "videos").mkdir()
    for number in range(VIDEOS):
        noise(folder / "videos" / f"{suite[number // 5]['prompt_en']}-{number % 5}.mp4", number)
    plan = plan_suite(
        read_suite(folder / "suite.json"), folder / "videos", None, {*COLUMNS} - {"i2v_subject", "i2v_background"}
    )
    assert len(plan.clips) == VIDEOS
    # Two dimensions a video at most keep the test short.
    clips = tuple(Clip(c.item, c.dimensions[:2], c.prompt) for c in plan.clips)
    return Plan(clips, {name: sum(name in c.dimensions for c in clips) for name in COLUMNS})


def export(plan: Plan, records: Path, out: Path, log: Path) -> dict[str, bytes]:
    """The files of results, as bytes."""
    found = results.score(plan, gather(plan.clips, NETS, records), dimensions=counting(log))
    found.write(out, "r", found.account("fake", {}, comparable=True))
    return {path.name: path.read_bytes() for path in out.iterdir()}


def lines_in(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_as_an_uninterrupted_one(thousand: Plan, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(thousand.clips, NETS, whole, dimensions=counting(tmp_path / "whole.log"))
    wanted = export(thousand, whole, tmp_path / "a", tmp_path / "whole.log")
    measurements = sum(thousand.expected.values())

    fork = multiprocessing.get_context("fork")
    log = tmp_path / "killed.log"
    for moment in sorted(np.random.default_rng(time.time_ns()).integers(1, measurements - 100, 3)):
        dimensions = counting(log, patience=moment - lines_in(killed) + 50)
        process = fork.Process(target=run, args=(thousand.clips, NETS, killed), kwargs={"dimensions": dimensions})
        process.start()
        while process.is_alive() and lines_in(killed) < moment:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert lines_in(killed) < measurements, "it was killed too late"
    outcome = run(thousand.clips, NETS, killed, dimensions=counting(log))
    assert outcome.found + outcome.computed == measurements and outcome.found >= 1
    assert export(thousand, killed, tmp_path / "b", log) == wanted
    # What was under way when a process was killed is all that was done twice.
    assert measurements <= len(log.read_text().splitlines()) <= measurements + 3


def test_shards_in_any_order_give_the_same_bytes(thousand: Plan, tmp_path: Path) -> None:
    part = Plan(thousand.clips[300:340], {n: sum(n in c.dimensions for c in thousand.clips[300:340]) for n in COLUMNS})
    log = tmp_path / "log"
    found = []
    for name, shards in {"one": [(1, 1)], "three": [(3, 3), (1, 3), (2, 3)], "mixed": [(2, 2), (1, 5), (1, 1)]}.items():
        for index, count in shards:
            run(part.clips, NETS, tmp_path / name, Part(index, count), dimensions=counting(log))
        found.append(export(part, tmp_path / name, tmp_path / f"{name}-out", log))
    assert found[0] == found[1] == found[2]
    # Shards do not overlap; of the mixed ones, the later took over what was there.
    assert len(log.read_text().splitlines()) == 3 * sum(part.expected.values())


def test_a_torn_last_line_is_computed_again_and_a_damaged_one_is_named(thousand: Plan, tmp_path: Path) -> None:
    clips, log = thousand.clips[:4], tmp_path / "log"
    run(clips, NETS, tmp_path / "records", dimensions=counting(log))
    before = read_records(tmp_path / "records")
    path = next((tmp_path / "records").glob("*.jsonl"))
    path.write_bytes(path.read_bytes()[:-20])
    assert run(clips, NETS, tmp_path / "records", dimensions=counting(log)).computed == 1
    assert read_records(tmp_path / "records") == before
    path.write_bytes(b"{not json\n" + path.read_bytes())
    with pytest.raises(VBenchError, match=rf"{path.name}: line 1 is damaged"):
        read_records(tmp_path / "records")


def test_a_record_is_of_the_content_and_not_of_the_name(thousand: Plan, tmp_path: Path) -> None:
    video = tmp_path / "videos" / "a-0.mp4"
    video.parent.mkdir()
    noise(video, 1)
    clip = thousand.clips[0]

    def outcome(networks: Networks = NETS) -> tuple[int, int]:
        item = Clip(type(clip.item)(video, None, "pan_left"), ("camera_motion", "imaging_quality"), clip.prompt)
        found = run([item], networks, tmp_path / "records", dimensions=counting(tmp_path / "log"))
        return found.computed, found.found

    assert outcome() == (2, 0)
    assert outcome() == (0, 2)
    video = video.rename(video.with_name("b-0.mp4"))
    assert outcome() == (0, 2)
    noise(video, 2)
    assert outcome() == (2, 0)
    assert outcome(Networks(FakeBackbones(), {"imaging_quality": {"weights": "other"}})) == (1, 1)


def test_a_record_is_of_an_image_a_movement_and_a_format_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video, image = tmp_path / "a-0.mp4", tmp_path / "a.png"
    noise(video, 1)
    Image.new("RGB", (16, 16), "red").save(image)

    def keys(camera: str = "pan_left") -> dict[str, str]:
        clip = Clip(Item(video, image, camera), tuple(COLUMNS), Prompt("a", (), "other", image.name))
        return {name: runner.record_key(clip, name, NETS) for name in COLUMNS}

    def changed(now: dict[str, str]) -> set[str]:
        return {name for name in COLUMNS if now[name] != before[name]}

    before = keys()
    assert changed(keys()) == set() and changed(keys("pan_right")) == {"camera_motion"}
    Image.new("RGB", (16, 16), "green").save(image)
    assert changed(keys()) == {"i2v_subject", "i2v_background"}
    monkeypatch.setattr(runner, "FORMAT", runner.FORMAT + 1)
    assert changed(keys()) == set(COLUMNS)


def test_processes_at_the_same_videos_do_not_write_one_file_and_need_no_lock(tmp_path: Path, monkeypatch) -> None:
    def without_locks(*_) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", without_locks)
    both = [runner.Appender(tmp_path) for _ in range(2)]
    for number, file in enumerate(both * 2):
        file.append({"key": str(number)})
    for file in both:
        file.close()
    assert len(list(tmp_path.glob("*.jsonl"))) == 2 and set(read_records(tmp_path)) == set("0123")


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "-1/4"])
def test_a_shard_that_is_none(text: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluation", "run", "--videos", "v", "--out", "o", f"--shard={text}"]) == 2
    assert "is no part; write number/of" in capsys.readouterr().err


def clips_of(folder: Path, names: Sequence[str], prompt) -> list[Clip]:
    folder.mkdir()
    for number, name in enumerate(names):
        noise(folder / name, number)
    return [Clip(type(prompt.item)(folder / name, None), ("imaging_quality",), prompt.prompt) for name in names]


def test_a_truncated_video_fails_or_is_left_out_by_name(thousand: Plan, tmp_path: Path) -> None:
    clips = clips_of(tmp_path / "videos", ["a-0.mp4", "b-0.mp4", "c-0.mp4"], thousand.clips[0])
    bad = clips[1].item.video
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    records, dimensions = tmp_path / "records", counting(tmp_path / "log")
    with pytest.raises(VBenchError, match=r"b-0\.mp4.*--allow-incomplete"):
        run(clips, NETS, records, dimensions=dimensions)
    assert len(read_records(records)) == 1  # what came before is kept
    outcome = run(clips, NETS, records, allow_damaged=True, dimensions=dimensions)
    assert (outcome.computed, outcome.found, list(outcome.damaged)) == (1, 1, [(bad, "")])
    plan, gathered = Plan(tuple(clips), {"imaging_quality": 3}), gather(clips, NETS, records)
    with pytest.raises(VBenchError, match="imaging_quality: 2 of 3 videos have a record"):
        results.score(plan, gathered, dimensions=dimensions)
    found = results.score(plan, gathered, allow_incomplete=True, dimensions=dimensions)
    assert found.counts["imaging_quality"] == 2 and found.values["imaging_quality"] is not None
    assert "2/3  incomplete" in found.table()
    account = found.account("official", outcome.damaged_of(clips), comparable=True)
    assert not account["complete"] and not account["comparable_with_published_scores"]
    assert list(account["damaged_videos"]) == ["b-0.mp4"]


def test_a_damaged_video_takes_none_of_the_same_name_from_another_folder(thousand: Plan, tmp_path: Path) -> None:
    names = ["a-0.mp4", "b-0.mp4"]
    rows = {row: clips_of(tmp_path / row, names, thousand.clips[0]) for row in ("one", "other")}
    bad = rows["one"][0].item.video
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    noise(rows["other"][0].item.video, 7)
    noise(rows["other"][1].item.video, 8)
    both, dimensions = [*rows["one"], *rows["other"]], counting(tmp_path / "log")
    outcome = run(both, NETS, tmp_path / "records", allow_damaged=True, dimensions=dimensions)
    assert outcome.computed == 3
    assert [list(outcome.damaged_of(clips)) for clips in rows.values()] == [["a-0.mp4"], []]
    assert len(gather(rows["other"], NETS, tmp_path / "records")["imaging_quality"]) == 2


def test_an_image_or_a_video_that_is_gone_is_left_out_by_name(thousand: Plan, tmp_path: Path) -> None:
    clips = clips_of(tmp_path / "videos", ["a-0.mp4", "b-0.mp4", "c-0.mp4"], thousand.clips[0])
    gone = tmp_path / "gone.png"
    item = clips[0].item
    clips[0] = Clip(type(item)(item.video, gone), ("i2v_subject", "imaging_quality"), clips[0].prompt)
    clips[1].item.video.unlink()
    records, dimensions = tmp_path / "records", counting(tmp_path / "log")
    with pytest.raises(FileNotFoundError, match=r"gone\.png.*--allow-incomplete"):
        run(clips, NETS, records, dimensions=dimensions)
    outcome = run(clips, NETS, records, allow_damaged=True, dimensions=dimensions)
    assert outcome.computed == 2 and list(outcome.damaged_of(clips)) == [
        "a-0.mp4, i2v_subject",
        "b-0.mp4, imaging_quality",
    ]


def test_a_video_too_small_for_a_network_is_named_and_leaves_the_dimension_to_others(thousand, tmp_path) -> None:
    clips = clips_of(tmp_path / "videos", ["a-0.mp4", "b-0.mp4"], thousand.clips[0])
    counted = counting(tmp_path / "log")["imaging_quality"]

    def measure(video, item, _backbones) -> dict:
        if item.video.name == "a-0.mp4":
            RAFT(widths=(8, 8, 8), features=8, hidden=8)(torch.zeros(1, 3, 64, 128), torch.zeros(1, 3, 64, 128))
        return counted.measure(video, item, _backbones)

    dimensions = {"imaging_quality": Dimension(measure, np.mean)}
    with pytest.raises(VBenchError, match=r"a-0\.mp4: RAFT needs frames of 128 x 128"):
        run(clips, NETS, tmp_path / "records", dimensions=dimensions)
    outcome = run(clips, NETS, tmp_path / "records", allow_damaged=True, allow_absent=True, dimensions=dimensions)
    assert outcome.computed == 1 and not outcome.not_computed


def test_a_network_that_is_absent_is_a_reason_and_no_score(thousand: Plan, tmp_path: Path) -> None:
    clips = clips_of(tmp_path / "videos", ["a-0.mp4"], thousand.clips[0])

    def absent(*_) -> dict:
        raise NotComputed("pip install the-network")

    dimensions = counting(tmp_path / "log") | {"imaging_quality": Dimension(absent, np.mean)}
    with pytest.raises(VBenchError, match="imaging_quality is not computed: pip install the-network"):
        run(clips, NETS, tmp_path / "records", dimensions=dimensions)
    outcome = run(clips, NETS, tmp_path / "records", allow_absent=True, dimensions=dimensions)
    plan = Plan(tuple(clips), {"imaging_quality": 1})
    found = results.score(plan, gather(clips, NETS, tmp_path / "records"), outcome.not_computed, dimensions=dimensions)
    assert found.values["imaging_quality"] is None
    assert found.gaps["imaging_quality"] == "not computed: pip install the-network"
    assert found.eval_results() == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_measurement_that_is_no_number_is_refused(value: float, thousand: Plan, tmp_path: Path) -> None:
    clips = clips_of(tmp_path / "videos", ["a-0.mp4"], thousand.clips[0])
    dimensions = {"imaging_quality": Dimension(lambda *_: {"video_results": value}, np.mean)}
    with pytest.raises(VBenchError, match=rf"a-0\.mp4: imaging_quality is {value}"):
        run(clips, NETS, tmp_path / "records", dimensions=dimensions)


# From the command line, with the tiny backbones


@pytest.fixture(scope="module")
def scored(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A suite, and what scoring it with nothing but a settings file made."""
    folder = tmp_path_factory.mktemp("scored")
    synthetic.write(folder, subjects=1, backgrounds=1, samples=1, frames=5, height=32, width=32)
    config = folder / "mine.yaml"
    config.write_text(
        f"videos: {folder}/videos\nimages: {folder}/crop\nsuite: {folder}/{synthetic.SUITE}\nout: {folder}/out\n"
        f"backbones: tiny\nteacher: {teacher}\nsamples_per_prompt: 1\nsampling: {{model: mine, steps: 4}}\n"
    )
    assert main(["evaluation", "run", "--config", str(config)]) == 0
    return folder, config


def test_a_folder_is_scored_with_nothing_but_a_settings_file(scored: tuple[Path, Path]) -> None:
    folder, _ = scored
    tree = json.loads((folder / "out/results_eval_results.json").read_text())
    assert set(tree) == set(COLUMNS) - {"aesthetic_quality"}
    for name, entry in tree.items():
        assert 0 <= entry[0] <= 1 + 1e-6 and len(entry) == (3 if name == "camera_motion" else 2)
        assert len(entry[-1]) == {"camera_motion": 7, "imaging_quality": 2}.get(name, 1)
        for video in entry[-1]:
            assert Path(video["video_path"]).is_file() and "video_results" in video
            assert ("image_path" in video) == name.startswith("i2v_")
            assert not {"key", "fps", "frames"} & set(video)
    assert isinstance(tree["dynamic_degree"][1][0]["video_results"], bool)
    assert set(tree["camera_motion"][1]) == {
        "pan_left",
        "pan_right",
        "tilt_up",
        "tilt_down",
        "zoom_in",
        "zoom_out",
        "static",
    }
    info = json.loads((folder / "out/results_full_info.json").read_text())
    assert len(info) == 9 and all(len(record["video_list"]) == 1 for record in info)
    account = json.loads((folder / "out/results_scores.json").read_text())
    assert account["comparable_with_published_scores"] is False and "not comparable" in account["backbones"]
    assert account["quality_score"] is None and account["reasons"]["quality_score"] == "without aesthetic_quality"
    assert account["i2v_score"] == totals(read_results([folder / "out/results_eval_results.json"]).values)["i2v_score"]
    assert account["sampling"] == {"model": "mine", "steps": 4}
    assert account["sizes"] == [{"frames": 5, "height": 32, "width": 32, "fps": 8.0, "videos": 9}]


# What VBench's `cal_i2v_final_score.py` knows: key of its files -> minimum, maximum, weight; the first three are I2V's.
LEADERBOARD = {
    "camera_motion": (0.0, 1.0, 0.1),
    "i2v_subject": (0.1462, 1.0, 1),
    "i2v_background": (0.2615, 1.0, 1),
    "subject_consistency": (0.1462, 1.0, 1),
    "background_consistency": (0.2615, 1.0, 1),
    "motion_smoothness": (0.7060, 0.9975, 1),
    "dynamic_degree": (0.0, 1.0, 0.5),
    "aesthetic_quality": (0.0, 1.0, 1),
    "imaging_quality": (0.0, 1.0, 1),
}


def leaderboard(archive: Path, folder: Path) -> tuple[float, float, float]:
    """Quality, I2V and Total of a submission, as VBench's script finds them.

    Of every JSON file in the archive, or one folder down, that holds a dictionary, each key has to be known; its value
    is at index 0, and 0 where there is none.
    """
    zipfile.ZipFile(archive).extractall(folder)
    values = dict.fromkeys(LEADERBOARD, 0.0)
    for path in [*folder.glob("*json"), *folder.glob("*/*.json")]:
        tree = json.loads(path.read_text())
        for key in tree if isinstance(tree, dict) else ():
            LEADERBOARD[key]  # KeyError, as in the script
            values[key] = tree[key][0]
    parts = [((values[key] - low) / (high - low) * weight, weight) for key, (low, high, weight) in LEADERBOARD.items()]
    i2v, quality = (sum(x for x, _ in group) / sum(w for _, w in group) for group in (parts[:3], parts[3:]))
    return quality, i2v, (quality + i2v) / 2


def test_the_leaderboards_script_reads_the_export(scored: tuple[Path, Path], tmp_path: Path) -> None:
    out, archive = scored[0] / "out", tmp_path / "submission.zip"
    # docs/vbench.md: the two files that VBench itself writes.
    files = [str(out / f"results_{kind}.json") for kind in ("eval_results", "full_info")]
    subprocess.run([sys.executable, "-m", "zipfile", "-c", archive, *files], check=True)
    found = leaderboard(archive, tmp_path / "found")
    values = read_results([out / "results_eval_results.json"]).values
    assert set(values) == {*LEADERBOARD} - {"aesthetic_quality"}
    ours = totals(values | {"aesthetic_quality": 0.0})  # which we call a gap, and the script a zero
    assert found == pytest.approx([ours[name] / 100 for name in ("quality_score", "i2v_score", "total")])
    subprocess.run([sys.executable, "-m", "zipfile", "-c", archive, str(out / "results_scores.json")], check=True)
    with pytest.raises(KeyError):  # so that one is not for the archive
        leaderboard(archive, tmp_path / "other")


def test_running_again_computes_nothing(scored: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    folder, config = scored
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*.json*")}
    assert main(["evaluation", "run", "--config", str(config)]) == 0
    assert {path: path.read_bytes() for path in (folder / "out").rglob("*.json*")} == before
    printed = capsys.readouterr().out
    assert "not comparable" in printed and "aesthetic_quality" in printed and "not computed" in printed


def test_shards_from_the_command_line_give_the_same_bytes(scored: tuple[Path, Path], tmp_path: Path) -> None:
    folder, config = scored
    shutil.copytree(folder / "out" / "tiny", tmp_path / "tiny")  # the trained quality network
    command = ["evaluation", "run", "--config", str(config), "--out", str(tmp_path)]
    assert main([*command, "--shard", "2/2", "--dimensions", "imaging_quality", "camera_motion"]) == 0
    assert main([*command, "--shard", "1/2"]) == 0
    assert main(command) == 0
    for name in ("results_eval_results.json", "results_full_info.json"):
        assert (tmp_path / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_errors_of_the_command_line(scored: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, config = scored

    def said(*arguments: str) -> str:
        assert main(["evaluation", "run", *arguments]) == 2
        return capsys.readouterr().err

    assert "--videos: is required" in said("--out", str(tmp_path))
    (tmp_path / "typo.yaml").write_text("vidoes: x\n")
    assert "typo.yaml: vidoes: unknown key" in said("--config", str(tmp_path / "typo.yaml"))
    assert "none.yaml does not exist" in said("--config", str(tmp_path / "none.yaml"))
    no_weights = ("--config", str(config), "--backbones", "official", "--weights", str(tmp_path / "empty"))
    message = said(*no_weights, "--dimensions", "dynamic_degree")
    assert "raft-things.pth (missing)" in message and "vbench-i2v weights --fetch" in message
    assert "no such folder" in said("--config", str(config), "--videos", str(folder / "nowhere"))
    assert "--samples-per-prompt: " in said("--config", str(config), "--samples-per-prompt", "0")
    assert "--name: " in said("--config", str(config), "--name", "wan/14b")
    assert "~nobody-at-all/x" in said("--config", str(config), "--videos", "~nobody-at-all/x")
    official = ("--config", str(config), "--backbones", "official")
    assert "~nobody-at-all/w" in said(*official, "--weights", "~nobody-at-all/w")
    alone = ("--videos", str(folder / "videos"), "--out", str(tmp_path / "alone"), "--dimensions", "dynamic_degree")
    assert "only a suite's crops have one" in said(*alone, "--backbones", "official", "--ratio", "16-9")
    dated = yaml.safe_load(config.read_text()) | {"sampling": {"made": date(2026, 11, 27)}}
    (tmp_path / "date.yaml").write_text(yaml.safe_dump(dated))
    assert "date.yaml: sampling.made" in said("--config", str(tmp_path / "date.yaml"))
    (tmp_path / "file").touch()
    assert vbench_i2v(["run", "--videos", "v", "--out", str(tmp_path / "file"), "--images", "~nobody-at-all"]) == 2


@pytest.mark.parametrize("suite", [True, False], ids=["suite", "folder"])
def test_whichever_video_is_damaged_the_rest_is_scored(
    suite: bool, scored: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """By a truncated file, a tag that is no UTF-8, a name that is none; beside hidden and misnamed files."""
    folder, config = scored
    shutil.copytree(folder / "videos", tmp_path / "videos")
    shutil.copytree(folder / "out" / "tiny", tmp_path / "out" / "tiny")
    bad = sorted((tmp_path / "videos").glob("texture number 0-?.mp4"))[0]
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    (tmp_path / "videos" / "._x.mp4").write_bytes(b"x")
    (tmp_path / "videos" / os.fsdecode(b"n\xe9-0.mov")).write_bytes(b"x")
    command = ["evaluation", "run", "--config", str(config), "--videos", str(tmp_path / "videos")]
    command += ["--out", str(tmp_path / "out"), "--dimensions", "imaging_quality", "i2v_background"]
    if not suite:
        images = tmp_path / "images"
        images.mkdir()
        for path in (tmp_path / "videos").glob("*.mp4"):
            Image.new("RGB", (32, 32)).save(images / f"{path.stem}.png")
        settings = "".join(line for line in config.read_text().splitlines(True) if not line.startswith("suite"))
        (tmp_path / "folder.yaml").write_text(settings)
        command[3] = str(tmp_path / "folder.yaml")
        command += ["--images", str(images), "--ratio", "none"]
        strange = tmp_path / "videos" / os.fsdecode(b"n\xe9: x-0.mp4")
        tagged = (folder / "videos" / bad.name).read_bytes()
        assert tagged.count(b"Lavf") == 1
        strange.write_bytes(tagged.replace(b"Lavf", b"\xe9avf"))
        Image.new("RGB", (32, 32)).save(images / os.fsdecode(b"n\xe9: x.png"))
    assert main(command) == 2
    assert bad.name in capsys.readouterr().err
    assert main([*command, "--allow-incomplete"]) == 0
    printed = capsys.readouterr().out
    account = json.loads((tmp_path / "out/results_scores.json").read_text())
    assert list(account["damaged_videos"]) == [bad.name] and f"videos damaged: 1 ({bad.name!r})" in printed
    assert len(account["extra_videos"]) == (8 if suite else 1) and "not scored, since nothing asks for them" in printed
    quality = account["dimensions"]["imaging_quality"]
    assert (quality["videos"], quality["expected"]) == ((1, 2) if suite else (9, 10))


def test_what_has_no_image_is_left_out_and_the_rest_is_scored(teacher: Path, tmp_path: Path, capsys) -> None:
    suite = synthetic.write(tmp_path, subjects=2, backgrounds=0, samples=1, frames=3, height=32, width=32)
    image = next((suite.parent / "crop").rglob("*.jpg"))
    image.unlink()
    command = ["evaluation", "run", "--videos", tmp_path / "videos", "--suite", suite, "--images", tmp_path / "crop"]
    command += ["--out", tmp_path / "out", "--backbones", "tiny", "--teacher", teacher, "--samples-per-prompt", "1"]
    command = [*map(str, command), "--dimensions", "i2v_subject", "subject_consistency"]
    assert main(command) == 2
    assert main([*command, "--allow-incomplete"]) == 0
    account = json.loads((tmp_path / "out/results_scores.json").read_text())
    counts = {name: found["videos"] for name, found in account["dimensions"].items() if found["expected"]}
    assert counts == {"i2v_subject": 1, "subject_consistency": 2}


def test_sampling_a_suite_by_the_seed_rule(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = shutil.copytree(teacher, tmp_path / "model")
    geometry = {"frames": 5, "height": 32, "width": 32, "fps": 8}
    (model / "geometry.json").write_text(json.dumps(geometry))
    suite = synthetic.write(tmp_path / "suite", subjects=2, backgrounds=0, samples=1, frames=2, height=32, width=32)
    videos = tmp_path / "videos"
    command = ["evaluation", "sample", "--model", model, "--suite", suite, "--images", suite.parent / "crop"]
    command = [*map(str, [*command, "--out", videos]), "--samples-per-prompt", "2"]
    assert main([*command, "--shard", "2/2"]) == 0
    assert "2 new videos" in capsys.readouterr().out
    assert main(command) == 0
    assert "2 new videos" in capsys.readouterr().out  # the other shard's two were there
    prompts = [record["prompt_en"] for record in json.loads(suite.read_text())]
    assert {p.name for p in videos.glob("*.mp4")} == {f"{prompt}-{j}.mp4" for prompt in prompts for j in (0, 1)}

    pipeline = load_pipeline(model)
    image = Image.open(next((suite.parent / "crop").rglob(f"{prompts[1]}.jpg"))).convert("RGB")
    made = read_frames(videos / f"{prompts[1]}-1.mp4")[0].astype(float)
    errors = [np.abs(animate(pipeline, image, prompts[1], 1, 1.0, s, 5) - made).mean() for s in (100_001, 100_000, 1)]
    assert errors[0] < 0.75 * min(errors[1:])  # what is left is H.264's, which noise suits badly

    for option in ("--steps", "--samples-per-prompt"):
        assert main([*command[:-2], "--out", str(tmp_path / "none"), option, "0"]) == 2
        assert option in capsys.readouterr().err and not (tmp_path / "none").exists()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "sampling.json").write_text('{"steps": 7}')  # of a run that made no video
    assert main([*command, "--out", str(tmp_path / "none"), "--shard", "1/4"]) == 0
    (tmp_path / "none" / "sampling.json").write_text("{")
    assert main([*command, "--out", str(tmp_path / "none"), "--shard", "1/4"]) == 2
    assert "none/sampling.json: cannot be read" in capsys.readouterr().err

    scheduler = model / "scheduler/scheduler_config.json"
    kept = scheduler.read_text()
    scheduler.write_text(json.dumps(json.loads(kept) | {"shift": 1.5}))
    assert main(command) == 2
    assert "made with another others_sha256" in capsys.readouterr().err
    scheduler.write_text(kept)
    (tmp_path / "foreign").mkdir()
    shutil.copy(next(videos.glob("*.mp4")), tmp_path / "foreign")
    assert main([*command, "--out", str(tmp_path / "foreign")]) == 2
    assert "holds videos, and no sampling.json" in capsys.readouterr().err

    note = json.loads((videos / "sampling.json").read_text())
    assert note["seed_rule"].startswith("100000 * i + j") and note["steps"] == 1 and note["geometry"] == geometry
    assert main([*command, "--steps", "2"]) == 2
    assert "made with another steps" in capsys.readouterr().err


def test_of_two_jobs_with_other_settings_that_begin_together_one_ends(
    teacher: Path, tmp_path: Path, monkeypatch
) -> None:
    model = shutil.copytree(teacher, tmp_path / "model")
    (model / "geometry.json").write_text(json.dumps({"frames": 5, "height": 32, "width": 32, "fps": 8}))
    suite = synthetic.write(tmp_path / "suite", subjects=1, backgrounds=0, samples=1, frames=2, height=32, width=32)
    arguments = (model, suite, suite.parent / "crop", tmp_path / "videos")
    load = sample.load_placed

    def while_another_begins(*of):
        monkeypatch.setattr(sample, "load_placed", load)
        assert sample.sample_suite(*arguments, steps=2, samples=1) == 1
        return load(*of)

    monkeypatch.setattr(sample, "load_placed", while_another_begins)
    with pytest.raises(ArtifactError, match="made with another steps"):
        sample.sample_suite(*arguments, steps=1, samples=1)
    assert [path.suffix for path in (tmp_path / "videos").iterdir()].count(".mp4") == 1


def test_processes_that_share_the_work_leave_all_records(teacher: Path, tmp_path: Path) -> None:
    synthetic.write(tmp_path, subjects=2, backgrounds=0, samples=2, frames=3, height=32, width=32)
    prompts = read_suite(tmp_path / synthetic.SUITE)
    plan = plan_suite(prompts, tmp_path / "videos", tmp_path / "crop", ["i2v_subject", "dynamic_degree"], samples=2)
    nets = tiny.networks(teacher, tmp_path / "tiny")
    tiny.load(nets, ["i2v_subject"])
    processes.share(plan.clips, nets, tmp_path / "shared", 2)
    assert run(plan.clips, nets, tmp_path / "shared").computed == 0
    run(plan.clips, nets, tmp_path / "alone")
    shared, alone = (read_records(tmp_path / name) for name in ("shared", "alone"))
    assert set(shared) == set(alone) and len(alone) == 8
    for key, record in alone.items():
        assert shared[key]["video_results"] == pytest.approx(record["video_results"], abs=1e-5)


def test_rank_correlations_over_rows_and_over_videos() -> None:
    values = {
        row: {"imaging_quality": x, "i2v_subject": 0.5} for row, x in zip("abcd", (0.1, 0.2, 0.3, 0.4), strict=True)
    }
    truth = {row: {"identity": y, "frechet": -y} for row, y in zip("abcd", (1.0, 2.0, 4.0, 3.0), strict=True)}
    of_videos = {row: {"imaging_quality": {"0.mp4": i, "1.mp4": i}} for i, row in enumerate("abcd")}
    records = [{"row": row, "file": f"{n}.mp4", "identity": -i} for i, row in enumerate("abcd") for n in (0, 1)]
    found = rank_correlations(values, truth, of_videos, records)
    assert found["imaging_quality"]["identity"] == pytest.approx({"rows": 0.8, "videos": -1.0})
    assert found["imaging_quality"]["frechet"] == {"rows": pytest.approx(-0.8), "videos": None}
    assert found["i2v_subject"]["identity"]["rows"] is None  # constant: it has no ranks
    assert "camera_motion" not in found


def test_each_video_is_compared_with_the_first_frame_of_its_own_clip(tmp_path: Path) -> None:
    dataset = SimpleNamespace(
        entries=[SimpleNamespace(key=key) for key in "abc"],
        first_frame=lambda number: Image.new("RGB", (2, 2), (number, number, number)),
    )
    paths = _first_frames(dataset, [{"key": "c"}, {"key": "a"}], tmp_path / "frames")
    assert {key: Image.open(path).getpixel((0, 0))[0] for key, path in paths.items()} == {"c": 2, "a": 0}


def test_the_table_of_rows_is_in_points() -> None:
    found = {"dimensions": {name: {"value": 0.25} for name in COLUMNS}, **dict.fromkeys(PAPER_NAMES, 61.5)}
    found["dimensions"]["camera_motion"]["value"] = None
    line = table({"rows": {"vpae-1nfe": found}}).splitlines()[-1].split(" | ")
    assert line[1:3] == ["", "25.00"] and line[-2:] == ["61.50", "61.50 |"]


@pytest.mark.parametrize(
    ("changed", "own_suite", "published"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"samples_per_prompt": 4}, False, False),
        ({"clip_dtype": "float32"}, False, False),
        ({"suite": ""}, False, False),
    ],
    ids=str,
)
def test_scores_are_comparable_as_the_leaderboard_s_are_made(
    changed: dict, own_suite: bool, published: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = tmp_path / "suite.json"
    suite.write_text("[]")
    if not own_suite:
        official = next(weight for weight in weights.manifest() if not weight.dimensions)
        monkeypatch.setattr(folder, "sha256", lambda path: official.sha256)
    settings = Folder(**{"videos": "videos", "out": "out", "suite": str(suite), **changed})
    assert folder._as_published(settings) == published


def test_records_of_clip_s_two_number_formats_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "absent", lambda root, dimensions: {})
    half, single = (
        folder.official_networks(Measure(weights=str(tmp_path), clip_dtype=dtype), False).identity
        for dtype in ("float16", "float32")
    )
    assert {name for name in COLUMNS if half[name] != single[name]} == {"background_consistency", "aesthetic_quality"}
