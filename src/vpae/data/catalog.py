"""Stage `clips`: which videos there are, each one checked by decoding it.

Writes `manifest.jsonl` (one row a clip), `quarantine.jsonl` (one row, with its reason, for each clip left out),
`names.json` (which file name stands for which held-out caption wherever videos are named by their prompts) and, for the
procedural world, `videos/*.mp4` and `truth.jsonl`. Videos of your own stay where they are: the manifest points
to them, and names the sha256 that later stages check.
"""

import csv
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from vpae.artifacts import ArtifactError, digest, link, sha256, write_json, written
from vpae.config import Experiment, Geometry
from vpae.data.names import check_names, file_names
from vpae.data.video import VideoError, probe, read_clip, write_video
from vpae.data.world import Truth, draw_truth, render
from vpae.parts import Part
from vpae.progress import Progress, track
from vpae.training.preemption import SIGNALS, Interruption

SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi")
SPLITS = ("train", "held_out")
STRETCH = 32


@dataclass(frozen=True)
class Clip:
    """One row of the manifest: a usable clip. `width`, `height` and `fps` are the file's own."""

    key: str
    path: str
    split: str
    caption: str
    width: int
    height: int
    fps: float
    sha256: str

    def frames(self, geometry: Geometry, folder: Path) -> np.ndarray:
        """Decode in the experiment's geometry, uint8 (T, H, W, 3); relative paths start at the manifest's folder.

        Raises:
            ArtifactError: the file is not the one that was catalogued.
        """
        path = folder / self.path
        if not path.is_file() or sha256(path) != self.sha256:
            raise ArtifactError(f"{path} is missing or has changed since it was catalogued; run the clips stage again")
        return read_clip(path, geometry.frames, geometry.height, geometry.width, geometry.fps)


def read_manifest(folder: Path, split: str | None = None) -> list[Clip]:
    """The clips of a finished clips folder, in the order of their keys."""
    clips = [Clip(**json.loads(line)) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return [clip for clip in clips if split in (None, clip.split)]


def read_truth(folder: Path) -> dict[str, Truth]:
    """Key -> truth of the procedural world's clips; empty for other corpora."""
    path = folder / "truth.jsonl"
    if not path.is_file():
        return {}
    records = (json.loads(line) for line in path.read_text().splitlines())
    return {record.pop("key"): Truth.from_json(record) for record in records}


def run(settings: Experiment, inputs: dict[str, Path], out: Path, state: Path) -> dict:
    """Build the catalogue; returns the number of clips per split and in quarantine."""
    if settings.clips.source == "world":
        return _render_world(settings, out, state)
    return _catalogue(settings, out, state)


def part(settings: Experiment, inputs: dict[str, Path], state: Path, part: Part) -> None:
    """Render or check one part's share of the clips, into the state folder."""
    if settings.clips.source == "world":
        _rendered(part.share(_world(settings)), settings, state, f"clips {part}")
    else:
        _checked(part.share(_stretches(_candidates(settings))), settings, state, f"clips {part}")


def external_inputs(settings: Experiment) -> dict[str, str]:
    """Digest of what lies outside the experiment: each video's name, caption, size and date."""
    if settings.clips.source == "world":
        return {}
    listing = []
    for row in _candidates(settings):
        try:
            stat = os.stat(row["path"])
        except (OSError, ValueError):  # not there, or no path at all: which of them, its check will say
            stat = None
        listing.append([row["path"], row["caption"], *((stat.st_size, stat.st_mtime_ns) if stat else ())])
    return {settings.clips.path: digest(listing)}


def _render_world(settings: Experiment, out: Path, state: Path) -> dict:
    rendered = _rendered(_world(settings), settings, state, "clips")
    (out / "videos").mkdir()
    for clip, _ in rendered:
        link(state / clip.path, out / clip.path)
    _write_lines(out / "truth.jsonl", ({"key": clip.key, **truth.to_json()} for clip, truth in rendered))
    return _write_tables(out, [clip for clip, _ in rendered], [])


def _world(settings: Experiment) -> list[tuple[str, int]]:
    """Split and index of every clip of the procedural world."""
    return [(split, index) for split in SPLITS for index in range(getattr(settings.clips, split))]


def _rendered(jobs: list[tuple[str, int]], settings: Experiment, state: Path, label: str) -> list[tuple[Clip, Truth]]:
    """These clips, whose videos are then in the state folder."""
    (state / "videos").mkdir(parents=True, exist_ok=True)
    work = partial(_render_one, settings=settings, out=state)
    return list(track(_in_processes(work, jobs, settings.clips.workers), len(jobs), label))


def _render_one(job: tuple[str, int], settings: Experiment, out: Path) -> tuple[Clip, Truth]:
    """A clip, rendered unless its video is there, and its truth."""
    split, index = job
    geometry, world = settings.geometry, settings.clips.world
    truth = draw_truth(
        (settings.seed, SPLITS.index(split), index),
        geometry.frames,
        geometry.width / geometry.height,
        world.hidden_direction,
        world.bystander_share,
        world.grows_share,
        world.spins_share,
    )
    key = f"{split}-{index:06d}"
    path = Path("videos") / f"{key}.mp4"
    if not (out / path).is_file():
        with written(out / path) as temporary:
            write_video(temporary, render(truth, geometry.height, geometry.width), geometry.fps, world.crf)
    size = (geometry.width, geometry.height, geometry.fps)
    return Clip(key, str(path), split, truth.caption, *size, sha256(out / path)), truth


def _catalogue(settings: Experiment, out: Path, state: Path) -> dict:
    rows = _candidates(settings)
    if not rows:
        raise ArtifactError(f"clips.path = {settings.clips.path}: no videos there ({', '.join(SUFFIXES)})")
    good, bad, seen = [], [], {}
    for row, found in zip(rows, _checked(_stretches(rows), settings, state, "clips"), strict=True):
        if isinstance(found, str):
            bad.append({"path": row["path"], "reason": found})
        elif found["sha256"] in seen:
            bad.append({"path": row["path"], "reason": f"same content as {seen[found['sha256']]}"})
        else:
            seen[found["sha256"]] = row["path"]
            good.append({"path": str(Path(row["path"]).resolve()), "caption": row["caption"], **found})
    wanted, (needed, why) = settings.clips.held_out, settings.training_clips_needed()
    if len(good) - wanted < needed:
        reasons = "; ".join(f"{b['path']}: {b['reason']}" for b in bad[:5])
        raise ArtifactError(
            f"clips.path = {settings.clips.path}: {len(good)} usable clips cannot give clips.held_out = {wanted} and "
            f"{needed} to train on ({why}); add videos or hold out fewer. Left out: {len(bad)}"
            f"{': ' + reasons if bad else ''}"
        )
    # By content, so that adding or renaming files moves no clip from one split to the other by its place in a list.
    good.sort(key=lambda record: record["sha256"])
    splits = ["held_out"] * wanted + ["train"] * (len(good) - wanted)
    clips = [Clip(key=f"{split}-{g['sha256'][:16]}", split=split, **g) for split, g in zip(splits, good, strict=True)]
    train = [c for c in clips if c.split == "train"]
    bad += [
        {"path": c.path, "reason": f"beyond clips.train = {settings.clips.train}"}
        for c in train[settings.clips.train :]
    ]
    return _write_tables(out, [c for c in clips if c.split == "held_out"] + train[: settings.clips.train], bad)


def _candidates(settings: Experiment) -> list[dict]:
    """Rows {path, caption} of a folder (captions from X.txt beside X.mp4, else the file's name) or a table."""
    root = Path(settings.clips.path)
    if settings.clips.source == "folder":
        if not root.is_dir():
            raise ArtifactError(f"clips.path = {root}: no such folder")
        videos = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        return [{"path": str(p), "caption": _caption_beside(p)} for p in videos]
    if not root.is_file():
        raise ArtifactError(f"clips.path = {root}: no such table")
    try:
        if root.suffix == ".jsonl":
            rows = [json.loads(line) for line in _text(root).split("\n") if line.strip()]
        else:
            rows = list(csv.DictReader(io.StringIO(_text(root), newline="")))
    except (json.JSONDecodeError, csv.Error) as error:
        raise ArtifactError(f"{root}: not a CSV or JSONL table: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.get("path") or not isinstance(row.get("caption"), str):
            raise ArtifactError(f"{root}: row {number}: needs the columns path and caption, both text")
    return [{"path": str(root.parent / row["path"]), "caption": row["caption"]} for row in rows]


def _caption_beside(video: Path) -> str | None:
    """From the text beside a video, else from its name; None where that text cannot be read."""
    text = video.with_suffix(".txt")
    if not text.is_file():
        return os.fsencode(video.stem).decode(errors="replace").replace("_", " ").replace("-", " ")
    try:
        return text.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: not UTF-8 text ({error}); convert it") from error


def _stretches(rows: list[dict]) -> list[tuple[int, list[dict]]]:
    """Rows that are checked together, with the number of the first one: the unit of resuming."""
    return [(start, rows[start : start + STRETCH]) for start in range(0, len(rows), STRETCH)]


def _checked(
    stretches: list[tuple[int, list[dict]]], settings: Experiment, state: Path, label: str
) -> list[dict | str]:
    """What `_check_one` found of each row of these stretches, which is then in the state folder."""
    state.mkdir(parents=True, exist_ok=True)
    work = partial(_check_stretch, geometry=settings.geometry, state=state)
    progress, found = Progress(sum(len(rows) for _, rows in stretches), label), []
    for checked in _in_processes(work, stretches, settings.clips.workers):
        found += checked
        progress.update(len(checked))
    progress.close()
    return found


def _check_stretch(stretch: tuple[int, list[dict]], geometry: Geometry, state: Path) -> list[dict | str]:
    """Check rows, unless the state folder tells what was found; its name says from which videos and captions."""
    start, rows = stretch
    record = state / f"{start:08d}.json"
    if not record.is_file():
        write_json(record, [_check_one(row, geometry) for row in rows])
    return json.loads(record.read_text())


def _check_one(row: dict, geometry: Geometry) -> dict | str:
    """Decode a clip in the experiment's geometry: its measures, or the reason why it cannot be used."""
    path = Path(row["path"])
    try:
        if row["caption"] is None:
            raise VideoError(f"its caption {path.with_suffix('.txt').name} is not UTF-8 text that can be read")
        row["caption"].encode()
        info = probe(path)
        read_clip(path, geometry.frames, geometry.height, geometry.width, geometry.fps)
        return {"width": info.width, "height": info.height, "fps": info.fps, "sha256": sha256(path)}
    except VideoError as error:
        return str(error)
    except Exception as error:  # one file's fault must not end the others'
        return f"unusable: {type(error).__name__}: {error}"


def _in_processes(work: Callable, jobs: Sequence, workers: int) -> Iterator:
    """Map in order over processes; spawned, because forking a process with threads can deadlock.

    Raises:
        Interruption: asked to end; what is finished is kept.
    """
    spawn = multiprocessing.get_context("spawn")
    with Interruption.watch() as request:
        pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_leave_signals) if workers > 1 else None
        try:
            for done in pool.map(work, jobs) if pool else map(work, jobs):
                yield done
                if request.requested:
                    raise Interruption("clips: finished ones are kept")
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)


def _leave_signals() -> None:
    """In a worker: a cluster signals every process of a job, and the one that started the workers ends them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _write_tables(out: Path, clips: list[Clip], bad: list[dict]) -> dict:
    captions = [clip.caption for clip in clips if clip.split == "held_out"]
    names = file_names(captions)
    check_names(out, names)
    write_json(out / "names.json", dict(zip(names, captions, strict=True)))
    _write_lines(out / "manifest.jsonl", (asdict(c) for c in clips))
    _write_lines(out / "quarantine.jsonl", bad)
    return {**{split: sum(c.split == split for c in clips) for split in SPLITS}, "quarantine": len(bad)}


def _write_lines(path: Path, records: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
