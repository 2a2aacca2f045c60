"""Stage `clips`: which videos there are, each one checked by decoding it.

Writes `manifest.parquet` (one row a clip), `quarantine.jsonl` (one row, with its reason, for each clip left out),
`names.json` (which file name stands for which held-out caption wherever videos are named by their prompts) and, for the
procedural world, `videos/*.mp4` and `truth.jsonl`. Videos of your own stay where they are: the manifest points to them,
and names the sha256 that later stages check.

Nothing here holds more of a large table than a few row groups.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

from vbench_i2v.media import PASSING, length
from vpae.artifacts import ArtifactError, content, is_kept, kept, link, reading, write_json
from vpae.config import Experiment
from vpae.config.clips import Filters
from vpae.data import corpus
from vpae.data.corpus import Candidate
from vpae.data.manifest import Clip, write_manifest
from vpae.data.names import check_names, file_names
from vpae.data.video import VideoError, probe, read_clip, write_video
from vpae.data.world import Truth, draw_truth, render
from vpae.parts import Part
from vpae.preemption import SIGNALS, Interruption
from vpae.progress import Progress, track

SPLITS = ("train", "held_out")
STRETCH = 32
BUCKETS = 64  # of usable clips, by content: one of them is sorted in memory at a time
CANDIDATES = "candidates.parquet"


def read_truth(folder: Path) -> dict[str, Truth]:
    """Key -> truth of the procedural world's clips; empty for other corpora."""
    path = folder / "truth.jsonl"
    if not path.is_file():
        return {}
    with reading(path, "run the clips stage again"):
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
        return
    work = stretches(_candidates(settings, state))
    for _ in _checked(part.stretch(work, [len(one) for one in work]), settings, state, f"clips {part}"):
        pass


def external_inputs(settings: Experiment) -> dict[str, str]:
    """Digest of what lies outside the experiment: each video's name, caption, size and date."""
    return {} if settings.clips.source == "world" else {settings.clips.path: corpus.identity(settings.clips)}


def _render_world(settings: Experiment, out: Path, state: Path) -> dict:
    rendered = _rendered(_world(settings), settings, state, "clips")
    (out / "videos").mkdir()
    for clip, _ in rendered:
        link(state / clip.path, out / clip.path)
    lines = (json.dumps({"key": clip.key, **asdict(truth)}) + "\n" for clip, truth in rendered)
    (out / "truth.jsonl").write_text("".join(lines))
    (out / "quarantine.jsonl").touch()
    return {**_write_tables(out, (clip for clip, _ in rendered)), "quarantine": 0}


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
        **world.model_dump(exclude={"crf"}),
    )
    key = f"{split}-{index:06d}"
    path = Path("videos") / f"{key}.mp4"
    if not is_kept(out / path):
        with kept(out / path) as temporary:
            write_video(temporary, render(truth, geometry.height, geometry.width), geometry.fps, world.crf)
    size = (geometry.width, geometry.height, geometry.fps)
    return Clip(key, str(path), split, truth.caption, *size, content(out / path)), truth


def _catalogue(settings: Experiment, out: Path, state: Path) -> dict:
    plan = _candidates(settings, state)
    work = stretches(plan)
    with tempfile.TemporaryDirectory(dir=state) as folder, (out / "quarantine.jsonl").open("w") as quarantine:
        left_out = _Quarantine(quarantine.write)
        with ExitStack() as stack:
            buckets = [stack.enter_context((Path(folder) / f"{n:02d}").open("w")) for n in range(BUCKETS)]
            for stretch, found in zip(work, _checked(work, settings, state, "clips"), strict=True):
                rows = corpus.read_candidates(plan, stretch.start, len(stretch))
                for number, row, one in zip(stretch, rows, found, strict=True):
                    if isinstance(one, str):
                        left_out(row.path, one)
                    else:
                        good = {**one, "path": row.path, "caption": row.caption, "start": row.start}
                        bucket = buckets[int(one["sha256"][:2], 16) * BUCKETS // 256]
                        bucket.write(json.dumps([one["sha256"], row.start, number, good]) + "\n")
        clips = _split(_by_content(Path(folder)), settings, left_out)
        counts = _write_tables(out, (replace(clip, path=_seen_from(out, clip.path)) for clip in clips))
    few = f", for clips.train = {settings.clips.train}" if counts["train"] < settings.clips.train else ""
    why = f", such as {'; '.join(left_out.first)}: quarantine.jsonl has all" if left_out.count else ""
    print(
        f"clips: {counts['train']} to train on{few}, {counts['held_out']} held out, {left_out.count} left out{why}",
        file=sys.stderr,
    )
    return {**counts, "quarantine": left_out.count}


def _seen_from(out: Path, path: str) -> str:
    """A video's path in the manifest: what is named relative to the repository moves with it and its results."""
    if os.path.isabs(path) or not Path(os.path.abspath(out)).is_relative_to(Path.cwd()):
        return os.path.abspath(path)
    return os.path.relpath(path, out)


def _candidates(settings: Experiment, state: Path) -> Path:
    """The parquet file of all candidates, made by the first job that needs it."""
    plan = state / CANDIDATES
    if not is_kept(plan):
        state.mkdir(parents=True, exist_ok=True)
        if others := [str(one) for one in state.parent.glob("clips-*") if one != state]:
            print(
                f"clips: {', '.join(others)} was begun with other videos, dates or settings: all are checked anew. "
                "Begin when no more videos arrive",
                file=sys.stderr,
            )
        with kept(plan) as temporary:
            if named := corpus.write_candidates(temporary, settings.clips):
                print(
                    f"clips: no NAME.txt beside {named} of the videos in {settings.clips.path}: there the video's name "
                    "is the caption",
                    file=sys.stderr,
                )
    if not corpus.count_candidates(plan):
        raise ArtifactError(f"clips.path = {settings.clips.path}: no videos there ({', '.join(corpus.SUFFIXES)})")
    return plan


def _by_content(folder: Path) -> Iterator[dict]:
    """Usable clips ordered by their file's hash, then by where in it they begin."""
    for bucket in sorted(folder.iterdir()):
        with bucket.open() as lines:
            yield from (row for *_, row in sorted((json.loads(line) for line in lines), key=lambda one: one[:3]))


class _Quarantine:
    """Writes down, counts, and remembers the first few of what is left out."""

    def __init__(self, write: Callable[[str], object]):
        self.write, self.count, self.first = write, 0, []

    def __call__(self, path: str, reason: str) -> None:
        self.write(json.dumps({"path": path, "reason": reason}) + "\n")
        self.count += 1
        if self.count <= 5:
            self.first.append(f"{path}: {reason}")


def _split(rows: Iterator[dict], settings: Experiment, left_out: _Quarantine) -> Iterator[Clip]:
    """Give each clip its split: the lowest hashes are held out.

    By content, so that adding or renaming files moves no clip from one split to the other by its place in a list.

    Raises:
        ArtifactError: at the end, if there are fewer than later stages need.
    """
    wanted, (needed, why) = settings.clips.held_out, settings.training_clips_needed()
    count, usable, first_path, content_before, held_out_file = dict.fromkeys(SPLITS, 0), 0, "", None, ""
    for row in rows:
        file, milliseconds = row["sha256"], round(1000 * row["start"])
        if (file, milliseconds) == content_before:
            left_out(row["path"], f"same content as {first_path}")
            continue
        usable, first_path, content_before = usable + 1, row["path"], (file, milliseconds)
        if count["held_out"] < wanted:
            split, held_out_file = "held_out", file
        elif file == held_out_file:
            left_out(row["path"], "another clip of this file is held out")
            continue
        elif count["train"] == settings.clips.train:
            left_out(row["path"], f"beyond clips.train = {settings.clips.train}")
            continue
        else:
            split = "train"
        count[split] += 1
        place = f"-{milliseconds:08d}" if row["start"] else ""
        yield Clip(key=f"{split}-{file[:16]}{place}", split=split, **row)
    if count["train"] < needed:
        reasons = "; ".join(left_out.first)
        rooted = settings.clips.source == "table" and "no such file" in reasons
        remedy = (
            "add videos or hold out fewer" if usable else "repair what is left out, relax clips.filters, or add videos"
        )
        raise ArtifactError(
            f"clips.path = {settings.clips.path}: {usable} usable clips cannot give clips.held_out = {wanted} and "
            f"{needed} to train on ({why}); {remedy}. Left out: {left_out.count}"
            f"{': ' + reasons if reasons else ''}"
            f"{'. The paths of a table start from clips.root, or else from its own folder' if rooted else ''}"
        )


def stretches(plan: Path) -> list[range]:
    """Numbers of candidates that are checked together: the unit of resuming."""
    count = corpus.count_candidates(plan)
    return [range(start, min(start + STRETCH, count)) for start in range(0, count, STRETCH)]


def _checked(work: list[range], settings: Experiment, state: Path, label: str) -> Iterator[list[dict | str]]:
    """What `_check_one` found of each row of these stretches, which is then in the state folder."""
    check = partial(_check_stretch, settings=settings, state=state)
    progress = Progress(sum(map(len, work)), label)
    for checked in _in_processes(check, work, settings.clips.workers):
        yield checked
        progress.update(len(checked))
    progress.close()


def _check_stretch(stretch: range, settings: Experiment, state: Path) -> list[dict | str]:
    """Check rows, unless the state folder tells what was found; its name says from which videos and captions."""
    record = state / f"{stretch.start:08d}.json"
    if not is_kept(record):
        rows = corpus.read_candidates(state / CANDIDATES, stretch.start, len(stretch))
        with kept(record) as temporary:
            temporary.write_text(json.dumps([_check_one(row, settings) for row in rows]))
    return json.loads(record.read_text())


def _check_one(row: Candidate, settings: Experiment) -> dict | str:
    """Decode a clip in the experiment's geometry: its measures, or the reason why it is left out."""
    if row.reason:
        return row.reason
    path, geometry = Path(row.path), settings.geometry
    try:
        info = probe(path)
        shape = (geometry.frames, geometry.height, geometry.width, geometry.fps)
        motion, jump = _motion(read_clip(path, *shape, row.start, row.stop))
        limits = settings.clips.filters.min_seconds or settings.clips.filters.max_seconds
        seconds = (row.stop or info.seconds or length(path)) - row.start if limits else 0.0
        found = {"width": info.width, "height": info.height, "fps": info.fps, "motion": motion, "jump": jump}
        return _unwanted(found, seconds, settings.clips.filters) or {**found, "sha256": content(path)}
    except VideoError as error:
        return str(error)
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in PASSING:
            return f"unusable: {error.strerror}"
        raise ArtifactError(
            f"{path}: {error or 'no memory'}; that is this machine's fault and not the file's: run the stage again"
        ) from error
    except Exception as error:  # one file's fault must not end the others'
        return f"unusable: {type(error).__name__}: {error}"


def _motion(frames_THW3: np.ndarray) -> tuple[float, float]:
    """Mean and greatest mean change of a pixel between two neighbouring frames, of 1."""
    changes = [
        float(np.abs(a.astype(np.int16) - b).mean() / 255) for a, b in zip(frames_THW3[1:], frames_THW3, strict=False)
    ]
    return (float(np.mean(changes)), max(changes)) if changes else (0.0, 0.0)


def _unwanted(found: dict, seconds: float, filters: Filters) -> str:
    """The first filter that a clip does not pass, or an empty text."""
    if found["width"] < filters.min_width or found["height"] < filters.min_height:
        return f"{found['width']} x {found['height']} pixels are less than {filters.min_width} x {filters.min_height}"
    if found["motion"] < filters.min_motion:
        return f"nearly still: motion {found['motion']:.4f} is less than {filters.min_motion:g}"
    if found["jump"] > filters.max_jump:
        return f"a scene cut: a jump of {found['jump']:.3f} is more than {filters.max_jump:g}"
    return corpus.too_short_or_long(seconds, filters)


def _in_processes(work: Callable, jobs: Sequence, workers: int) -> Iterator:
    """Map in order over processes; spawned, because forking a process with threads can deadlock.

    Raises:
        Interruption: asked to end; what is finished is kept.
        ArtifactError: a process was killed.
    """
    spawn = multiprocessing.get_context("spawn")
    with Interruption.watch() as request:
        pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_leave_signals) if workers > 1 else None
        try:
            for done in pool.map(work, jobs) if pool else map(work, jobs):
                yield done
                if request.requested:
                    raise Interruption("clips: finished ones are kept")
        except BrokenProcessPool as error:
            raise ArtifactError(
                f"one of clips.workers = {workers} processes was killed, as a rule because memory was exhausted; set "
                "fewer: finished clips are kept"
            ) from error
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)


def _leave_signals() -> None:
    """In a worker: a cluster signals every process of a job, and the one that started the workers ends them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _write_tables(out: Path, clips: Iterable[Clip]) -> dict[str, int]:
    """Write manifest and names; returns the number of clips per split."""
    count, captions = dict.fromkeys(SPLITS, 0), []

    def counted() -> Iterator[Clip]:
        for clip in clips:
            count[clip.split] += 1
            if clip.split == "held_out":
                captions.append(clip.caption)
            yield clip

    write_manifest(out, counted())
    names = file_names(captions)
    check_names(out, names)
    write_json(out / "names.json", dict(zip(names, captions, strict=True)))
    return count
