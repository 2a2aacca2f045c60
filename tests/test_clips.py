"""Stage `clips`: the rendered world, anyone's videos from a folder or a table, and what is put in quarantine."""

import csv
import errno
import json
import os
import signal
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from PIL import Image

from vbench_i2v.media import reading
from vpae import cli
from vpae.artifacts import PROVENANCE, ArtifactError, building, file_hashes, read_provenance, sha256
from vpae.data import catalog, video
from vpae.data.catalog import read_truth
from vpae.data.corpus import candidates
from vpae.data.manifest import Clip, read_manifest
from vpae.data.video import VideoError, probe, read_clip, read_frames, resample_indices, resize_and_crop, write_video
from vpae.data.world import render
from vpae.experiment import ConfigError, Source, load
from vpae.parts import Part
from vpae.stages import run_part, run_stage
from vpae.standing import problems, standing

REAL = Path(__file__).parents[2] / "shared" / "clips"
REAL_CLIPS = {  # width, height, fps and frames of the first video stream
    "bigbuckbunny.mp4": (1280, 720, 25.0, 132),
    "bird_clock_832x480_81f.mp4": (832, 480, 16.0, 81),
    "bt709_full_range.mp4": (1280, 720, 30.0, 30),
    "hiker.mp4": (720, 480, 8.0, 49),
    "hiker_tiny.mp4": (368, 240, 8.0, 49),
    "nasa_13013.mp4": (320, 180, 25.0, 325),
}
needs_real_clips = pytest.mark.skipif(not REAL.is_dir(), reason="real test clips are not present (../shared/clips)")
GEOMETRY = {"frames": 5, "height": 32, "width": 32, "fps": 8}
BITS = 8


def experiment(folder: Path, name: str = "own", geometry: dict | None = None, seed: int = 0, **clips: object) -> Source:
    tree = {
        "seed": seed,
        "geometry": geometry or GEOMETRY,
        "clips": {"source": "world", "train": 6, "held_out": 3, "workers": 1, **clips},
        "teacher": {"source": "train"},
        "samples": {"count": 3, "decode": 1},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load(path)


def coded(numbers: Sequence[int], height: int = 32, width: int = 64) -> np.ndarray:
    """Frames that show their number as eight vertical bars, black or white."""
    bits = (np.array(numbers)[:, None] >> np.arange(BITS)) & 1
    bars = np.repeat(bits * 255, width // BITS, axis=1).astype(np.uint8)
    return np.broadcast_to(bars[:, None, :, None], (len(numbers), height, width, 3)).copy()


def decoded(frames: np.ndarray) -> list[int]:
    bars = frames.astype(float).reshape(len(frames), frames.shape[1], BITS, -1).mean((1, 3)) > 127
    return (bars @ (1 << np.arange(BITS))).tolist()


def write_coded(path: Path, count: int, fps: float = 8, start: int = 0) -> Path:
    """A video whose frames show the numbers from `start` on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, coded(range(start, start + count)), fps, crf=10)
    return path


def write_streams(
    path: Path, streams: Sequence[tuple[int, int, int]], rotation: int = 0, fast_start: bool = False
) -> Path:
    """A video with several streams (first number, height, width) of ten frames each, perhaps to be shown turned."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if fast_start else {}) as container:
        made = []
        for _, height, width in streams:
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt, stream.options = width, height, "yuv420p", {"crf": "10"}
            if rotation:
                stream.set_display_rotation(rotation)
            made.append(stream)
        for stream, (start, height, width) in zip(made, streams, strict=True):
            for frame in coded(range(start, start + 10), height, width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return path


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def quarantine(folder: Path) -> dict[str, str]:
    """File name -> reason."""
    return {Path(r["path"]).name: r["reason"] for r in records(folder / "quarantine.jsonl")}


def splits(folder: Path) -> dict[str, str]:
    """sha256 -> split."""
    return {clip.sha256: clip.split for clip in read_manifest(folder)}


def snapshot(folder: Path) -> dict:
    return {"files": file_hashes(folder), "date": (folder / PROVENANCE).stat().st_mtime_ns}


# The procedural world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Path]:
    folder = tmp_path_factory.mktemp("world")
    source = experiment(folder)
    return source, run_stage(source, "clips", folder / "results")


def test_the_world_becomes_real_videos_with_captions_and_truth(world: tuple[Source, Path]) -> None:
    source, folder = world
    clips, truths = read_manifest(folder), read_truth(folder)
    assert [c.split for c in clips].count("train") == 6 and [c.split for c in clips].count("held_out") == 3
    assert len({c.key for c in clips}) == len({c.sha256 for c in clips}) == 9
    assert set(truths) == {c.key for c in clips}
    for clip in clips:
        with av.open(str(folder / clip.path)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
        assert (clip.width, clip.height, clip.fps) == (32, 32, 8.0)
        assert clip.sha256 == sha256(folder / clip.path)
        assert clip.caption == truths[clip.key].caption
        frames = clip.frames(source.settings.geometry, folder)
        assert frames.shape == (5, 32, 32, 3) and frames.dtype == np.uint8
        assert np.abs(frames.astype(float) - render(truths[clip.key], 32, 32)).mean() < 6
    assert quarantine(folder) == {}


def test_provenance_tells_settings_counts_and_hashes(world: tuple[Source, Path]) -> None:
    source, folder = world
    provenance = read_provenance(folder)
    assert provenance["counts"] == {"train": 6, "held_out": 3, "quarantine": 0}
    assert provenance["outputs"] == file_hashes(folder)
    assert provenance["settings"]["geometry"] == source.settings.geometry.model_dump()
    assert provenance["settings"]["seed"] == 0 and "workers" not in provenance["settings"]["clips"]


def test_running_a_finished_stage_again_does_nothing(world: tuple[Source, Path], capsys: pytest.CaptureFixture) -> None:
    source, folder = world
    before = snapshot(folder)
    assert run_stage(source, "clips", folder.parents[1]) == folder
    assert snapshot(folder) == before
    assert "up to date" in capsys.readouterr().err


def test_several_processes_write_the_same_bytes_and_report_progress(
    world: tuple[Source, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    parallel = run_stage(experiment(tmp_path, workers=2), "clips", tmp_path / "results")
    assert file_hashes(parallel) == file_hashes(world[1])
    assert "clips: 9/9" in capsys.readouterr().err


def test_more_clips_leave_the_first_ones_as_they_are_and_a_seed_changes_all(
    world: tuple[Source, Path], tmp_path: Path
) -> None:
    before = {c.key: c.sha256 for c in read_manifest(world[1])}
    more = run_stage(experiment(tmp_path, train=8), "clips", tmp_path / "more")
    other = run_stage(experiment(tmp_path, seed=1), "clips", tmp_path / "other")
    assert before.items() < {c.key: c.sha256 for c in read_manifest(more)}.items()
    assert not set(before.values()) & {c.sha256 for c in read_manifest(other)}


# All or nothing


class Stop(BaseException):
    """Stands for whatever ends a process in the middle."""


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, error: type[BaseException]) -> None:
    calls: list[Path] = []

    def stopping(path: Path, *arguments: object) -> None:
        calls.append(path)
        if len(calls) == number:
            raise error("stopped")
        write_video(path, *arguments)

    monkeypatch.setattr(catalog, "write_video", stopping)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
def test_an_interrupted_stage_leaves_no_folder(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = experiment(tmp_path), tmp_path / "results" / "own" / "clips"
    with monkeypatch.context() as patch:
        stop_at(patch, 4, error)
        with pytest.raises(error, match="stopped"):
            run_stage(source, "clips", tmp_path / "results")
        assert not folder.exists()
        assert read_provenance(folder) is None
    assert run_stage(source, "clips", tmp_path / "results") == folder
    assert len(list((folder / "videos").iterdir())) == 9


def test_an_interrupted_stage_leaves_the_old_result_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_stage(experiment(tmp_path), "clips", tmp_path / "results")
    before = snapshot(folder)
    with monkeypatch.context() as patch:
        stop_at(patch, 4, Stop)
        with pytest.raises(Stop):
            run_stage(experiment(tmp_path, seed=1), "clips", tmp_path / "results")
    assert snapshot(folder) == before
    run_stage(experiment(tmp_path, seed=1), "clips", tmp_path / "results")
    assert not set(before["files"].values()) & {c.sha256 for c in read_manifest(folder)}


def test_what_a_killed_run_left_behind_is_not_taken_up(tmp_path: Path) -> None:
    left = tmp_path / "results" / "own" / ".clips.tmp" / "videos"
    left.mkdir(parents=True)
    (left / "half.mp4").write_bytes(b"half")
    folder = run_stage(experiment(tmp_path), "clips", tmp_path / "results")
    assert not (folder / "videos" / "half.mp4").exists()
    assert {p.name for p in folder.parent.iterdir()} == {"clips", ".clips.lock", ".state"}
    assert list((folder.parent / ".state").iterdir()) == []


def test_two_processes_cannot_build_one_folder(tmp_path: Path) -> None:
    x = tmp_path / "x"
    with building(x, {}, {}), pytest.raises(ArtifactError, match="another process"), building(x, {}, {}):
        pass
    assert read_provenance(tmp_path / "x") is not None


# Anyone's videos: a folder


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Seven usable videos, one of them nested."""
    folder = tmp_path / "videos"
    for number in range(6):
        write_coded(folder / f"clip_no-{number}.mp4", 6, start=number)
    write_coded(folder / "deeper" / "seventh.MP4", 6, start=6)
    return folder


def test_a_folder_becomes_a_manifest_that_points_to_the_videos(videos: Path, tmp_path: Path) -> None:
    (videos / "clip_no-0.txt").write_text("ein Käfer läuft\n", encoding="utf-8")
    (videos / "notes.md").write_text("not a video")
    source = experiment(tmp_path, source="folder", path=str(videos), train=3, held_out=3)
    folder = run_stage(source, "clips", tmp_path / "results")
    clips = read_manifest(folder)
    assert {c.split: [d.split for d in clips].count(c.split) for c in clips} == {"held_out": 3, "train": 3}
    assert list(quarantine(folder).values()) == ["beyond clips.train = 3"]
    captions = {Path(c.path).name: c.caption for c in clips}
    expected = {f"clip_no-{n}.mp4": f"clip no {n}" for n in range(6)}
    expected |= {"clip_no-0.mp4": "ein Käfer läuft", "seventh.MP4": "seventh"}
    assert captions.items() <= expected.items()
    for clip in clips:
        assert Path(clip.path).is_absolute() and clip.sha256 == sha256(Path(clip.path))
        assert (clip.width, clip.height, clip.fps) == (64, 32, 8.0)
        assert clip.frames(source.settings.geometry, folder).shape == (5, 32, 32, 3)
    assert not (folder / "videos").exists() and read_truth(folder) == {}


def test_folders_that_are_linked_are_read_and_hidden_ones_and_circles_are_not(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "eighth.mp4").write_bytes((videos / "deeper" / "seventh.MP4").read_bytes())
    (videos / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(videos)
    (videos / ".trash").mkdir()
    (videos / "lost+found").mkdir()
    (videos / "lost+found" / "nobody-s.mp4").touch()
    (videos / "clip_no-0.mp4").rename(videos / ".trash" / "gone.mp4")
    source = experiment(tmp_path, source="folder", path=str(videos), train=100, held_out=3)
    found = [Path(one.path).relative_to(videos).as_posix() for one in candidates(source.settings.clips)]
    assert found == [*(f"clip_no-{n}.mp4" for n in range(1, 6)), "deeper/seventh.MP4", "more/deep/eighth.mp4"]


def test_the_stage_says_how_many_captions_are_file_names(videos: Path, tmp_path: Path, capsys) -> None:
    (videos / "clip_no-0.txt").write_text("a red disc moves to the left")
    run_stage(experiment(tmp_path, source="folder", path=str(videos), train=3, held_out=3), "clips", tmp_path / "some")
    assert f"clips: no NAME.txt beside 6 of the videos in {videos}: there the video's name" in capsys.readouterr().err
    for file in (*videos.glob("*.mp4"), videos / "deeper" / "seventh.MP4"):
        file.with_suffix(".txt").write_text("a red disc moves to the left")
    run_stage(experiment(tmp_path, source="folder", path=str(videos), train=3, held_out=3), "clips", tmp_path / "none")
    assert "NAME.txt" not in capsys.readouterr().err


def test_a_folder_that_may_not_be_read_ends_the_stage(videos: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    whole = os.scandir

    def denied(path):
        if Path(path).name == "deeper":  # root, who may run this test, may read everything
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    source = experiment(tmp_path, source="folder", path=str(videos), train=100, held_out=3)
    monkeypatch.setattr(os, "scandir", denied)
    assert cli.main(["clips", "--config", str(source.path), "--results", str(tmp_path / "results")]) == 2
    assert "deeper: Permission denied; correct the path" in capsys.readouterr().err
    assert not (tmp_path / "results" / source.name / "clips").exists()


def test_a_worker_that_is_killed_is_said_with_the_setting_that_helps(videos, tmp_path, monkeypatch) -> None:
    source = experiment(tmp_path, source="folder", path=str(videos), train=100, held_out=3, workers=2)
    monkeypatch.setattr(catalog, "_check_stretch", _killed)
    with pytest.raises(ArtifactError, match=r"one of clips\.workers = 2 processes was killed"):
        run_stage(source, "clips", tmp_path / "results")


def _killed(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_relative_path_is_found_again_from_elsewhere(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = experiment(tmp_path, source="folder", path="videos", held_out=3)
    folder = run_stage(source, "clips", tmp_path / "results")
    monkeypatch.chdir("/")
    assert read_manifest(folder)[0].frames(source.settings.geometry, folder).shape == (5, 32, 32, 3)


def test_unusable_videos_go_to_quarantine_with_the_reason(videos: Path, tmp_path: Path) -> None:
    whole = write_streams(tmp_path / "whole.mp4", [(20, 32, 64)], fast_start=True).read_bytes()
    write_coded(videos / "short.mp4", 4)
    (videos / "cut_in_the_middle.mp4").write_bytes(whole[:-120])
    (videos / "cut_in_the_header.mp4").write_bytes(whole[:200])
    (videos / "text.mp4").write_text("this is no video\n" * 100)
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "twin.mp4").write_bytes((videos / "clip_no-0.mp4").read_bytes())
    (videos / "folder.mp4").mkdir()
    (videos / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    with av.open(str(videos / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    expected = {
        "short.mp4": ("too short: it gives ", " of 5 frames at 8 fps, for which it needs 5 at its own 8 fps"),
        "cut_in_the_middle.mp4": "damaged after 3 frames: a packet is corrupt or cut off",
        "cut_in_the_header.mp4": ("unreadable", "no video stream"),  # as much of it as FFmpeg can make out
        "text.mp4": "unreadable",
        "empty.mp4": "unreadable",
        "twin.mp4": f"same content as {videos / 'clip_no-0.mp4'}",
        "folder.mp4": "no such file",
        "gone.mp4": "no such file",
        "sound.mp4": "no video stream",
    }
    found = {}
    for workers in (1, 2):
        settings = experiment(tmp_path, source="folder", path=str(videos), train=100, held_out=3, workers=workers)
        folder = run_stage(settings, "clips", tmp_path / f"results{workers}")
        assert len(read_manifest(folder)) == 7
        assert read_provenance(folder)["counts"] == {"train": 4, "held_out": 3, "quarantine": len(expected)}
        found[workers] = quarantine(folder)
    assert found[1] == found[2]
    assert set(found[1]) == set(expected)
    for name, reason in expected.items():
        assert found[1][name].startswith(reason), (name, found[1][name])


def test_too_few_usable_videos_are_an_error_that_says_why(tmp_path: Path) -> None:
    write_coded(tmp_path / "videos" / "good.mp4", 6)
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"")
    source = experiment(tmp_path, source="folder", path=str(tmp_path / "videos"), held_out=3)
    with pytest.raises(ArtifactError, match=r"1 usable clips cannot give clips\.held_out = 3.*bad\.mp4: unreadable"):
        run_stage(source, "clips", tmp_path / "results")
    assert not (tmp_path / "results" / "own" / "clips").exists()


@pytest.mark.parametrize(("kind", "words"), [("folder", "no such folder"), ("table", "no such table")])
def test_a_missing_source_is_an_error_that_names_it(kind: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"clips\.path = .*nowhere: {words}"):
        run_stage(experiment(tmp_path, source=kind, path=str(tmp_path / "nowhere")), "clips", tmp_path / "results")


def test_a_folder_without_videos_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ArtifactError, match=r"none: no videos there \(\.mp4, "):
        run_stage(experiment(tmp_path, source="folder", path=str(tmp_path / "none")), "clips", tmp_path / "results")


def test_a_repository_can_be_moved_with_its_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    (before / "videos").mkdir(parents=True)
    for number in range(6):
        write_coded(before / "videos" / f"{number}.mp4", 6, start=number)
    (before / "scratch/results").mkdir(parents=True)
    (before / "results").symlink_to("scratch/results")  # where there is more room
    found = []
    for place in (before, after):
        if place == after:
            before.rename(after)
        monkeypatch.chdir(place)
        source = experiment(place, source="folder", path="videos", train=3, held_out=3)
        run_stage(source, "clips", Path("results"))
        clips = read_manifest(folder := Path("results/own/clips"))
        assert len([clip.frames(source.settings.geometry, folder) for clip in clips]) == 6
        assert all("before" not in clip.path for clip in clips)
        found.append(clips)
    assert found[0] == found[1]


def test_a_video_that_changes_after_cataloguing_is_an_error_that_names_it(videos: Path, tmp_path: Path) -> None:
    source = experiment(tmp_path, source="folder", path=str(videos), held_out=3)
    folder = run_stage(source, "clips", tmp_path / "results")
    clip = next(c for c in read_manifest(folder) if c.path.endswith("clip_no-3.mp4"))
    write_coded(videos / "clip_no-3.mp4", 6, start=40)
    with pytest.raises(ArtifactError, match=r"clip_no-3\.mp4 is missing or has changed.*clips stage again"):
        clip.frames(source.settings.geometry, folder)
    (videos / "clip_no-3.mp4").unlink()
    with pytest.raises(ArtifactError, match=r"clip_no-3\.mp4 is missing"):
        clip.frames(source.settings.geometry, folder)


def test_the_stage_runs_again_exactly_when_videos_or_captions_change(videos: Path, tmp_path: Path) -> None:
    source = experiment(tmp_path, source="folder", path=str(videos), train=100, held_out=3)
    folder = run_stage(source, "clips", tmp_path / "results")

    def ran() -> bool:
        before = (folder / PROVENANCE).stat().st_mtime_ns
        run_stage(source, "clips", tmp_path / "results")
        return (folder / PROVENANCE).stat().st_mtime_ns != before

    assert not ran()
    (videos / "notes.txt").write_text("belongs to no video")
    assert not ran()
    (videos / "clip_no-1.txt").write_text("a caption")
    assert ran() and "a caption" in {c.caption for c in read_manifest(folder)}
    write_coded(videos / "clip_no-1.mp4", 6, start=50)
    assert ran() and sha256(videos / "clip_no-1.mp4") in splits(folder)
    write_coded(videos / "new.mp4", 6, start=60)
    assert ran() and len(read_manifest(folder)) == 8
    (videos / "new.mp4").unlink()
    assert ran() and len(read_manifest(folder)) == 7
    assert not ran()


def test_the_workflow_sees_a_caption_and_a_video_that_were_replaced_in_a_subfolder(
    videos: Path, tmp_path: Path
) -> None:
    source = experiment(tmp_path, source="folder", path=str(videos), train=100, held_out=3)
    for change in (
        lambda: write_coded(videos / "deeper" / "seventh.MP4", 6, start=80),
        lambda: (videos / "clip_no-1.txt").write_text("another caption"),
    ):
        folder = run_stage(source, "clips", tmp_path / "results")
        assert standing(source, tmp_path / "results")["clips"]
        note = json.loads((folder / PROVENANCE).read_text())
        ago = datetime.now(UTC) - timedelta(seconds=10)
        (folder / PROVENANCE).write_text(json.dumps({**note, "began": ago.isoformat()}))
        for path in [videos, *videos.rglob("*")]:
            os.utime(path, (time.time() - 20,) * 2)
        assert standing(source, tmp_path / "results")["clips"]
        change()
        os.utime(videos, (time.time() - 20,) * 2)  # a file that is written over leaves its folder's date
        assert not standing(source, tmp_path / "results")["clips"]
        assert list(problems(source, "clips", tmp_path / "results"))


def test_videos_brought_with_old_dates_are_seen_by_the_stage_or_after_a_touch(videos: Path, tmp_path: Path) -> None:
    source = experiment(tmp_path, source="folder", path=str(videos), train=100, held_out=3)
    run_stage(source, "clips", tmp_path / "results")
    write_coded(videos / "new.mp4", 6, start=60)
    for path in (videos, videos / "new.mp4"):
        os.utime(path, (time.time() - 1000,) * 2)
    assert standing(source, tmp_path / "results")["clips"]  # as docs/data.md says
    os.utime(videos)
    assert not standing(source, tmp_path / "results")["clips"]
    assert len(read_manifest(run_stage(source, "clips", tmp_path / "results"))) == 8


def test_a_video_dated_in_the_future_is_named_with_what_helps(videos: Path, tmp_path: Path) -> None:
    """As a camera's clock or an archive's time zone dates them: no run of the stage can be younger."""
    source, results = (
        experiment(tmp_path, source="folder", path=str(videos), train=100, held_out=3),
        tmp_path / "results",
    )
    late = videos / "clip_no-1.mp4"
    os.utime(late, (time.time() + 1e5,) * 2)
    folder = run_stage(source, "clips", results)
    assert [*problems(source, "clips", results)] == [
        f"{folder}: {late} is dated in the future: `touch` it, and run the stage again"
    ]
    os.utime(late)
    run_stage(source, "clips", results)
    assert standing(source, results)["clips"] and not list(problems(source, "clips", results))


def test_a_copy_of_results_and_videos_has_nothing_to_do(videos: Path, tmp_path: Path) -> None:
    source = experiment(tmp_path, source="folder", path=str(videos), train=100, held_out=3)
    folder = run_stage(source, "clips", tmp_path / "results")
    later = time.time() + 1000
    for path in [folder / PROVENANCE, videos, *videos.rglob("*")]:
        os.utime(path, (later, later))
    assert standing(source, tmp_path / "results")["clips"]
    assert not list(problems(source, "clips", tmp_path / "results"))
    (videos / "clip_no-1.txt").write_text("another caption")
    os.utime(videos / "clip_no-1.txt", (later + 1000, later + 1000))
    assert not standing(source, tmp_path / "results")["clips"]


def test_what_changes_while_the_stage_is_at_work_is_seen(videos: Path, tmp_path: Path, monkeypatch) -> None:
    source, whole = (
        experiment(tmp_path, source="folder", path=str(videos), train=100, held_out=3),
        catalog.write_manifest,
    )

    def meanwhile(*given: object) -> None:
        (videos / "clip_no-1.txt").write_text("another caption")
        whole(*given)

    for path in [videos, *videos.rglob("*")]:
        os.utime(path, (time.time() - 20,) * 2)
    monkeypatch.setattr(catalog, "write_manifest", meanwhile)
    run_stage(source, "clips", tmp_path / "results")
    (tmp_path / "results/own/clips/.snakemake_timestamp").touch()  # as Snakemake does at the end of the job
    assert not standing(source, tmp_path / "results")["clips"]


def test_the_stage_says_what_it_left_out(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (videos / "broken.mp4").write_bytes(b"x")
    source = experiment(tmp_path, source="folder", path=str(videos), train=9, held_out=3)
    run_stage(source, "clips", tmp_path / "results")
    said = capsys.readouterr().err
    assert "clips: 4 to train on, for clips.train = 9, 3 held out, 1 left out, such as " in said
    assert "broken.mp4: unreadable" in said and "quarantine.jsonl has all" in said


def test_keys_of_tables_are_refused_of_folders(tmp_path: Path) -> None:
    limits = {"at_least": {"aesthetic": 5}}
    with pytest.raises(ConfigError, match=r"source = folder has no columns for filters\.at_least: set each"):
        experiment(tmp_path, source="folder", path=str(tmp_path), filters=limits)
    experiment(tmp_path, "table", source="table", path="t.csv", filters=limits, columns={"path": "{video}"})
    for source in ("folder", "world"):
        (tmp_path / "overlay.yaml").write_text(
            f"extends: table\nclips: {{source: {source}, filters: {{at_least: {{aesthetic: null}}}}}}\n"
        )
        assert load(tmp_path / "overlay.yaml").settings.clips.filters.at_least == {}


def test_renaming_moves_no_clip_between_splits_and_adding_moves_none_into_the_held_out_ones(
    videos: Path, tmp_path: Path
) -> None:
    """Held out are the lowest content hashes; so many clips as come in below them can leave, and none of the old
    training clips can be evaluated on."""
    source = experiment(tmp_path, source="folder", path=str(videos), train=100, held_out=3)
    before = splits(run_stage(source, "clips", tmp_path / "results"))
    for number, path in enumerate(sorted(videos.rglob("*.mp4"))):
        path.rename(path.with_name(f"{9 - number}.mp4"))
    assert splits(run_stage(source, "clips", tmp_path / "results")) == before
    added = [sha256(write_coded(videos / f"added-{n}.mp4", 6, start=70 + n)) for n in range(5)]
    after = splits(run_stage(source, "clips", tmp_path / "results"))
    assert not [key for key in before if before[key] == "train" and after[key] == "held_out"]
    moved = [key for key in before if before[key] == "held_out" and after[key] == "train"]
    assert len(moved) == sum(after[key] == "held_out" for key in added)


# Anyone's videos: a table


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_table_gives_paths_beside_itself_and_captions_of_any_text(suffix: str, videos: Path, tmp_path: Path) -> None:
    captions = ['commas, and "quotes"', "Zwei Zeilen,\nÜmläute", " separated", "{braces}", "", "6", "plain"]
    names = [str(p.relative_to(tmp_path)) for p in sorted(videos.rglob("*.[mM][pP]4"))]
    rows = [{"path": n, "caption": c, "more": "x"} for n, c in zip(names, captions, strict=True)]
    table = tmp_path / f"table.{suffix}"
    if suffix == "csv":
        with table.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["path", "caption", "more"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        table.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n", encoding="utf-8")
    folder = run_stage(experiment(tmp_path, source="table", path=str(table), train=9), "clips", tmp_path / "results")
    found = {str(Path(c.path).relative_to(tmp_path)): c.caption for c in read_manifest(folder)}
    assert found == dict(zip(names, captions, strict=True))


def test_work_that_other_videos_make_useless_is_told_of(videos: Path, tmp_path: Path, capsys) -> None:
    source = experiment(tmp_path, source="folder", path=str(videos), train=100, held_out=3)
    run_part(source, "clips", Part(1, 2), tmp_path / "results")
    assert "checked anew" not in capsys.readouterr().err
    [begun] = tmp_path.glob("results/*/.state/clips-*")
    write_coded(videos / "new.mp4", 6, start=60)
    run_part(source, "clips", Part(2, 2), tmp_path / "results")
    assert f"clips: {begun} was begun with other videos" in capsys.readouterr().err


def test_a_video_that_a_table_names_but_is_not_there_goes_to_quarantine(videos: Path, tmp_path: Path) -> None:
    names = [*sorted(str(p) for p in videos.glob("*.mp4")), "missing.mp4"]
    (tmp_path / "t.csv").write_text("path,caption\n" + "".join(f"{n},x\n" for n in names))
    source = experiment(tmp_path, source="table", path=str(tmp_path / "t.csv"))
    assert quarantine(run_stage(source, "clips", tmp_path / "results")) == {"missing.mp4": "no such file"}


def test_where_the_paths_of_a_table_count_from_is_said_where_no_video_is_found(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,caption\nelsewhere/a.mp4,x\n")
    with pytest.raises(ArtifactError, match=r"no such file\. The paths of a table start from clips\.root"):
        run_stage(experiment(tmp_path, source="table", path=str(tmp_path / "t.csv")), "clips", tmp_path / "results")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.csv", "path,text\na.mp4,x\n", "row 1: needs the columns path and caption"),
        ("t.jsonl", '{"path": "a.mp4", "caption": "x"}\n{"path": "b.mp4"}\n', "row 2: needs the columns"),
        ("t.jsonl", '["a.mp4", "x"]\n', "correct its line 1: JSONL has one object in each"),
        ("t.jsonl", '[\n{"path": "a.mp4", "caption": "x"}\n]', "correct its line 1: JSONL has one object in each line"),
        ("t.jsonl", '{"path": "a.mp4", "caption": "x"\n', "correct its line 1"),
        ("t.csv", "path;caption\na.mp4;red, round\n", "its cells are separated by ';': save it with commas"),
        ("t.csv", "path\tcaption\na.mp4\tred, round\n", "its cells are separated by tabs: save it with commas"),
        ("t.csv", f"path,caption\na.mp4,{'x' * 2**18}\n", "line 2: a cell has more than 131072 characters; shorten"),
        ("t.csv", 'path,caption\na.mp4,"open\n' + "b.mp4,x\n" * 2**15, "line 2: .* close the double quote that"),
        ("t.csv", b"path,caption\na.mp4,K\xe4fer\n", "UnicodeDecodeError.*; save it as UTF-8 text"),
        ("t.csv", "path,caption\n", "no videos there"),
        ("t.csv", "path,caption\na.mp4,a red, round ball\n", "line 2 has 3 cells and the header 2; put texts"),
        ("t.csv", 'path,caption\na.mp4,"open\nb.mp4,next\n', "line 3: unexpected end of data; within a quoted text"),
        ("t.jsonl", '{"path": "a.mp4", "caption": "x"}\n{"path":\n', "correct its line 2"),
        ("t.json", '[{"path": "a.mp4", "caption": "x"}]', "a table's suffix names its format: .csv, .jsonl, .parquet"),
    ],
)
def test_a_table_with_a_fault_is_an_error_that_names_file_and_row(
    name: str, text: str | bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    source = experiment(tmp_path, source="table", path=str(tmp_path / name))
    with pytest.raises(ArtifactError, match=words) as caught:
        run_stage(source, "clips", tmp_path / "results")
    assert name in str(caught.value)


def test_a_caption_that_changes_in_the_table_counts(videos: Path, tmp_path: Path) -> None:
    names = sorted(str(p) for p in videos.glob("*.mp4"))
    source = experiment(tmp_path, source="table", path=str(tmp_path / "t.csv"))
    for caption in ("before", "after"):
        (tmp_path / "t.csv").write_text("path,caption\n" + "".join(f"{n},{caption}\n" for n in names))
        folder = run_stage(source, "clips", tmp_path / "results")
        assert {c.caption for c in read_manifest(folder)} == {caption}


# Time and space


@pytest.mark.parametrize(
    ("fps_in", "fps_out", "expected"),
    [
        (8, 8, [0, 1, 2, 3, 4]),
        (16, 8, [0, 2, 4, 6, 8]),
        (24, 8, [0, 3, 6, 9, 12]),
        (25, 8, [0, 3, 6, 9, 12]),  # 3.125, 6.25, 9.375, 12.5
        (30, 8, [0, 4, 7, 11, 15]),  # 3.75, 7.5, 11.25
        (12, 8, [0, 1, 3, 4, 6]),  # 1.5, 4.5: the earlier one
        (29.97, 8, [0, 4, 7, 11, 15]),
        (8, 16, [0, 0, 1, 1, 2]),
        (4, 16, [0, 0, 0, 1, 1]),
    ],
)
def test_frames_are_the_nearest_in_time(fps_in: float, fps_out: float, expected: list[int], tmp_path: Path) -> None:
    path = write_coded(tmp_path / "clip.mp4", 20, fps_in)
    assert decoded(read_clip(path, 5, 32, 64, fps_out)) == expected
    times, wanted = np.array(expected) / fps_in, np.arange(5) / fps_out
    assert np.abs(times - wanted).max() <= 0.5 / fps_in + 1e-9


def test_upsampling_repeats_evenly() -> None:
    """Halves rounded to even numbers would show one frame three times and the next one once."""
    assert np.bincount(resample_indices(8, 41, 16)).tolist() == [2] * 20 + [1]
    assert set(np.diff(resample_indices(24, 41, 16))) == {1, 2}
    assert (np.diff(resample_indices(24, 41, 16), 2) != 0).all(), "one, two, one, two"


def test_a_clip_is_too_short_exactly_when_its_last_frame_is_missing(tmp_path: Path) -> None:
    write_coded(tmp_path / "enough.mp4", 9, 16)
    write_coded(tmp_path / "short.mp4", 8, 16)
    assert decoded(read_clip(tmp_path / "enough.mp4", 5, 32, 64, 8)) == [0, 2, 4, 6, 8]
    with pytest.raises(
        VideoError, match="too short: it gives 4 of 5 frames at 8 fps, for which it needs 9 at its own 16 fps"
    ):
        read_clip(tmp_path / "short.mp4", 5, 32, 64, 8)


def test_no_frame_after_the_last_wanted_one_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise an hour of film would have to fit the memory for the sake of its first seconds."""
    path = write_coded(tmp_path / "clip.mp4", 20)
    taken, whole = [], video.decoded

    def counting(path: Path) -> Iterator[av.VideoFrame]:
        for number, frame in enumerate(whole(path)):
            taken.append(number)
            yield frame

    monkeypatch.setattr(video, "decoded", counting)
    assert decoded(read_clip(path, 3, 32, 64, 4)) == [0, 2, 4]
    assert taken == [0, 1, 2, 3, 4]


def write_timed(path: Path, ticks: Sequence[int], rate: int) -> Path:
    """A video whose frames show 0, 1, 2, ... and are shown at the given ticks of 1/rate seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 32, "yuv420p", {"crf": "10"}
        for tick, picture in zip(ticks, coded(range(len(ticks))), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_varying_frame_rate_changes_no_speeds(suffix: str, tmp_path: Path) -> None:
    """Ten frames at 24 fps, then ten at 8, as a phone does when it gets dark."""
    ticks = [*range(10), *range(10, 40, 3)]
    path = write_timed(tmp_path / f"phone.{suffix}", ticks, 24)
    wanted = np.arange(10) * 3  # at 8 fps
    found = decoded(read_clip(path, 10, 32, 64, 8))
    assert found == [int(np.abs(np.array(ticks) - tick).argmin()) for tick in wanted]
    with pytest.raises(VideoError, match="too short"):
        read_clip(path, 17, 32, 64, 8)


def test_a_recording_that_was_trimmed_without_encoding_it_anew_keeps_its_speeds(tmp_path: Path) -> None:
    """The file still holds what stands before the cut; its edit list says that it is not shown."""
    ticks = [*range(30), *range(30, 90, 3)]
    write_timed(tmp_path / "whole.mp4", ticks, 30)
    with (
        av.open(str(tmp_path / "whole.mp4")) as whole,
        av.open(str(tmp_path / "cut.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as cut,
    ):
        copy = cut.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                half_a_second = int(0.5 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - half_a_second, packet.dts - half_a_second, copy
                cut.mux(packet)
    shown = 0.5 + np.arange(17) / 8
    nearest = [int(np.abs(np.array(ticks) / 30 - time).argmin()) for time in shown]
    assert decoded(read_clip(tmp_path / "cut.mp4", 17, 32, 64, 8)) == nearest


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG"), (1, "")])
def test_a_video_in_hdr_is_left_out_with_the_reason(transfer: int, name: str, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.color_trc = transfer
        for picture in coded(range(6)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    if not name:
        assert len(read_clip(tmp_path / "phone.mp4", 5, 32, 64, 8)) == 5
        return
    with pytest.raises(VideoError, match=rf"HDR \({name}\)"):
        read_clip(tmp_path / "phone.mp4", 5, 32, 64, 8)


def test_a_long_gap_in_a_recording_does_not_make_its_last_frame_stand(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "gap.mp4", [*range(10), *range(40, 50)], 10)
    assert len(read_clip(path, 49, 32, 64, 10)) == 49
    with pytest.raises(VideoError, match="too short"):
        read_clip(path, 57, 32, 64, 10)


def test_a_clip_of_large_frames_takes_the_memory_of_a_few(tmp_path: Path) -> None:
    write_video(tmp_path / "large.mp4", coded(range(24), 720, 1280), 8, crf=10)
    tracemalloc.start()
    try:
        assert read_clip(tmp_path / "large.mp4", 24, 32, 64, 8).shape == (24, 32, 64, 3)
        assert tracemalloc.get_traced_memory()[1] < 4 * 720 * 1280 * 3
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "fault", [MemoryError(), OSError(errno.ESTALE, "Stale file handle")], ids=["memory", "network"]
)
def test_a_fault_of_the_machine_leaves_no_file_out(fault: Exception, videos: Path, tmp_path: Path, monkeypatch) -> None:
    source, whole = experiment(tmp_path, source="folder", path=str(videos), train=100, held_out=3), catalog.read_clip

    def failing(path: Path, *given: object) -> np.ndarray:
        if path.name == "clip_no-3.mp4":
            with reading():
                raise fault
        return whole(path, *given)

    monkeypatch.setattr(catalog, "read_clip", failing)
    with pytest.raises(ArtifactError, match=r"clip_no-3\.mp4: .* this machine's fault"):
        run_stage(source, "clips", tmp_path / "results")
    monkeypatch.setattr(catalog, "read_clip", whole)
    assert len(read_manifest(run_stage(source, "clips", tmp_path / "results"))) == 7


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("start", [0.5, 1.0, 1.25, 2.0, 2.9])
def test_a_stretch_begins_where_the_table_says(start: float, suffix: str, tmp_path: Path) -> None:
    path = write_timed(tmp_path / f"film.{suffix}", range(40), 8)
    first = round(start * 8)
    assert decoded(read_clip(path, 5, 32, 64, 4, start)) == list(range(first, first + 10, 2))[:5]
    assert decoded(read_clip(path, 5, 32, 64, 8, start, start + 0.625)) == list(range(first, first + 5))
    with pytest.raises(VideoError, match=r"too short: 5 frames at 8 fps do not fit between"):
        read_clip(path, 5, 32, 64, 8, start, start + 0.5)
    with pytest.raises(VideoError, match=r"too short: \d+ of 40 frames at 8 fps"):
        read_clip(path, 40, 32, 64, 8, start)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_stretch_is_counted_from_the_beginning_of_a_film_cut_off_another(suffix: str, tmp_path: Path) -> None:
    """Its first time stamp is then not 0."""
    path = write_timed(tmp_path / f"cut.{suffix}", range(16, 76), 8)
    assert decoded(read_clip(path, 9, 32, 64, 8, 3.5)) == list(range(28, 37))


def test_a_stretch_of_a_long_film_is_read_from_the_key_frame_before_it(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.options = {"crf": "10", "g": "8", "x264-params": "open-gop=1:scenecut=0"}
        for picture in coded(range(200)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    assert decoded(read_clip(path, 5, 32, 64, 8, 20.0)) == list(range(160, 165))
    assert len(list(video.decoded(path, 20.0))) <= 48


def test_frames_that_are_shown_at_a_steady_rate_are_counted_not_timed(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "steady.mkv", range(0, 40, 2), 48)  # Matroska rounds to milliseconds
    assert decoded(read_clip(path, 7, 32, 64, 8)) == [0, 3, 6, 9, 12, 15, 18]


def test_pixels_that_are_not_square_are_made_so(tmp_path: Path) -> None:
    path = tmp_path / "anamorphic.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.options = 48, 32, "yuv420p", {"crf": "1"}
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for picture in stripes(32, 48, 1):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    assert probe(path).pixel_aspect == 2.0
    found = read_clip(path, 5, 32, 32, 8).astype(float)[:, 4:-4, 4:-4]
    assert found[..., 1].min() > 200 and found[..., (0, 2)].max() < 40, "only the green middle third is left"


def stripes(height: int, width: int, axis: int) -> np.ndarray:
    """Red, green and blue thirds along an axis (0: from top to bottom)."""
    thirds = np.minimum(3 * np.arange((height, width)[axis]) // (height, width)[axis], 2)
    colours = (np.eye(3) * 255).astype(np.uint8)[thirds]
    frame = colours[:, None] if axis == 0 else colours[None]
    return np.broadcast_to(frame, (6, height, width, 3)).copy()


@pytest.mark.parametrize(
    ("size", "axis"), [((32, 96), 1), ((96, 32), 0), ((64, 192), 1), ((192, 64), 0), ((16, 48), 1)]
)
def test_the_centre_is_cropped_and_nothing_is_distorted(size: tuple[int, int], axis: int, tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", stripes(*size, axis), 8, crf=1)
    found = read_clip(tmp_path / "clip.mp4", 5, 32, 32, 8).astype(float)
    assert found.shape == (5, 32, 32, 3)
    inner = found[:, 4:-4, 4:-4]
    assert inner[..., 1].min() > 200 and inner[..., (0, 2)].max() < 40, "only the green middle third is left"
    wide = read_clip(tmp_path / "clip.mp4", 5, *((32, 96) if axis else (96, 32)), 8)
    assert np.abs(wide.astype(float) - stripes(*((32, 96) if axis else (96, 32)), axis)[:5]).mean() < 8


@pytest.mark.parametrize("shape", [(45, 70), (32, 33), (33, 32), (31, 90), (480, 832)])
def test_any_size_covers_the_frame_with_less_than_a_pixel_of_distortion(shape: tuple[int, int]) -> None:
    height, width = shape
    y, x = np.mgrid[0:height, 0:width] + 0.5
    frame = np.stack([255 * x / width, 255 * y / height, 0 * x], -1).astype(np.uint8)
    found = resize_and_crop(frame[None], 32, 48)[0].astype(float)
    assert found.shape == (32, 48, 3)
    scale = max(32 / height, 48 / width)
    along_x = width / 2 + (np.arange(48) + 0.5 - 24) / scale
    along_y = height / 2 + (np.arange(32) + 0.5 - 16) / scale
    assert np.abs(found[16, :, 0] - 255 * along_x / width)[2:-2].max() < 1.5 + 255 / (scale * width)
    assert np.abs(found[:, 24, 1] - 255 * along_y / height)[2:-2].max() < 1.5 + 255 / (scale * height)


def test_frames_of_the_right_size_are_not_touched() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    assert np.array_equal(resize_and_crop(frames, 32, 48), frames)
    half = resize_and_crop(frames, 16, 24)
    assert np.array_equal(half[1], np.asarray(Image.fromarray(frames[1]).resize((24, 16), Image.Resampling.BICUBIC)))


# Decoders


@pytest.mark.parametrize("size", [(32, 64), (50, 66), (64, 40), (98, 136)])
def test_decord_and_pyav_give_the_same_frames(size: tuple[int, int], tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (7, *size, 3), dtype=np.uint8)
    write_video(tmp_path / "clip.mp4", frames, 8, crf=20)
    first, second = (read_frames(tmp_path / "clip.mp4", decoder)[0] for decoder in ("decord", "pyav"))
    assert first.shape == (7, *size, 3)
    assert np.array_equal(first, second)


@pytest.mark.parametrize("width", [16, 24, 48, 72])
def test_frames_so_narrow_that_decord_breaks_them_are_read(width: int, tmp_path: Path) -> None:
    frames = np.repeat(np.random.default_rng(0).integers(0, 256, (5, 32, width, 1), dtype=np.uint8), 3, 3)
    write_video(tmp_path / "clip.mp4", frames, 8, crf=20)
    with pytest.raises(VideoError, match=r"decord: [456] channels"):
        read_frames(tmp_path / "clip.mp4", "decord")
    assert np.abs(read_frames(tmp_path / "clip.mp4")[0].astype(int) - frames).mean() < 8


MATRICES = {
    1: (0.2126, 0.0722),
    6: (0.299, 0.114),
    9: (0.2627, 0.0593),
}  # BT.709, BT.601, BT.2020: red and blue weights


def to_yuv(rgb_HW3: np.ndarray, matrix: int, full: bool) -> np.ndarray:
    """8-bit Y, U and V (3, H, W) by the standard's formula."""
    red, blue = MATRICES[matrix]
    r, g, b = rgb_HW3.transpose(2, 0, 1) / 255
    y = red * r + (1 - red - blue) * g + blue * b
    u, v = (b - y) / 2 / (1 - blue), (r - y) / 2 / (1 - red)
    if full:
        return np.rint([255 * y, 255 * u + 128, 255 * v + 128]).clip(0, 255).astype(np.uint8)
    return np.rint([219 * y + 16, 224 * u + 128, 224 * v + 128]).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_colours_are_right_in_every_matrix_and_range(matrix: int, full: bool, tmp_path: Path) -> None:
    rgb = np.kron(np.random.default_rng(0).integers(30, 226, (4, 4, 3)), np.ones((16, 16, 1)))
    planes, kind = to_yuv(rgb, matrix, full), "yuvj420p" if full else "yuv420p"
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.options = kind, {"crf": "1"}
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        for _ in range(3):
            frame = av.VideoFrame(64, 64, kind)
            frame.colorspace, frame.color_range = matrix, 2 if full else 1
            for number, plane in enumerate(frame.planes):
                buffer = np.zeros((plane.height, plane.line_size), np.uint8)
                buffer[:, : plane.width] = planes[number, :: 2 if number else 1, :: 2 if number else 1]
                plane.update(buffer.tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for decoder in ("decord", "pyav"):
        found = read_frames(tmp_path / "clip.mp4", decoder)[0]
        assert np.abs(found - rgb).mean() < 2, decoder


def test_of_several_streams_the_first_is_taken(tmp_path: Path) -> None:
    """decord would take the larger one."""
    path = write_streams(tmp_path / "two.mp4", [(0, 32, 64), (100, 64, 128)])
    assert probe(path).streams == 2
    assert decoded(read_frames(path)[0]) == list(range(10))
    assert decoded(read_frames(path, "decord")[0]) == list(range(100, 110))


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_turned_phone_video_is_shown_upright(rotation: int, tmp_path: Path) -> None:
    path = write_streams(tmp_path / "turned.mp4", [(1, 64, 128)], rotation)
    stored = read_frames(write_streams(tmp_path / "plain.mp4", [(1, 64, 128)]))[0]
    for decoder in ("decord", "pyav"):
        frames, info = read_frames(path, decoder)[0], probe(path)
        assert np.array_equal(frames, np.rot90(stored, rotation // 90, axes=(1, 2))), decoder
        assert (info.height, info.width) == frames.shape[1:3]


def test_a_file_that_may_not_be_read_goes_to_quarantine(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "secret.mp4", 6)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(VideoError, match="unreadable: Permission denied"):
        probe(path)


# Real clips


@needs_real_clips
@pytest.mark.parametrize("name", REAL_CLIPS)
def test_real_clips_decode_to_their_first_video_stream(name: str) -> None:
    width, height, fps, _ = REAL_CLIPS[name]
    info = probe(REAL / name)
    assert (info.width, info.height, info.fps, info.streams) == (
        width,
        height,
        fps,
        2 if name.startswith("nasa") else 1,
    )
    assert read_clip(REAL / name, 5, 64, 96, 8).shape == (5, 64, 96, 3)


def first_stream(source: Path, target: Path) -> Path:
    """Copy a file's first video stream, undecoded, into a file of its own."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return target


@needs_real_clips
@pytest.mark.parametrize("name", REAL_CLIPS)
def test_decord_and_pyav_agree_on_real_clips(name: str, tmp_path: Path) -> None:
    """Mean absolute difference at most 2/255; measured: 0 in all six, bit for bit."""
    path = REAL / name
    if probe(path).streams > 1:
        path = first_stream(path, tmp_path / name)
    pairs = zip(video.decord_frames(path), video.pyav_frames(REAL / name), strict=True)
    differences = [np.abs(a.astype(np.int16) - b).mean() for a, b in pairs]
    assert len(differences) == REAL_CLIPS[name][3]
    assert max(differences) <= 2


@needs_real_clips
def test_a_real_clip_in_full_range_bt709_has_the_standards_colours() -> None:
    with av.open(str(REAL / "bt709_full_range.mp4")) as container:
        frame = next(container.decode(video=0))
    y, u, v = (
        np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[: p.height, : p.width].astype(float) for p in frame.planes
    )
    u, v = (np.kron(c - 128, np.ones((2, 2))) for c in (u, v))
    red, blue = MATRICES[1]
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    expected = np.stack([r, g, b], -1).clip(0, 255)
    assert np.abs(next(video.decord_frames(REAL / "bt709_full_range.mp4")) - expected).mean() < 2


@needs_real_clips
def test_the_stage_catalogues_all_real_clips(tmp_path: Path) -> None:
    geometry = {"frames": 9, "height": 64, "width": 96, "fps": 16}
    source = experiment(tmp_path, geometry=geometry, source="folder", path=str(REAL), held_out=3)
    folder = run_stage(source, "clips", tmp_path / "results")
    assert {Path(c.path).name for c in read_manifest(folder)} == set(REAL_CLIPS)
    assert quarantine(folder) == {}
    nasa: Clip = next(c for c in read_manifest(folder) if c.path.endswith("nasa_13013.mp4"))
    assert (nasa.width, nasa.height, nasa.fps) == (320, 180, 25.0)
