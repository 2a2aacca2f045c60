"""Measuring: one JSON line per (dimension, video), from which a killed run goes on and parts are put together.

A record's key is a digest of all that it depends on: the contents of video and image, the dimension, the networks and
their settings; not of paths, dates or the part of the work. So a record is right wherever it is found, and gathering
is looking up. Each process appends to a file of its own; a line that it left unfinished when it was killed is not read.
"""

import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from vbench_i2v.base import Backbones, Dimension
from vbench_i2v.dimensions import DIMENSIONS
from vbench_i2v.errors import NotComputed, VBenchError
from vbench_i2v.files import content, digest
from vbench_i2v.parts import Part
from vbench_i2v.suite import IMAGE_DIMENSIONS, Clip
from vbench_i2v.video import Video, open_video

FORMAT = 3  # of a record and of what `dimensions` computes: raise it when either changes, and no old record is used
_LEAVE_OUT = "leave it out with --allow-incomplete"
_KEPT_BYTES = 128 << 20  # decoded bytes of a clip that may stay in memory for the next dimension


@dataclass(frozen=True)
class Networks:
    """Backbones, and what is known of them before they are loaded.

    Attributes:
        backbones: the networks.
        identity: what else besides their name tells two results apart: dimension -> its settings and weights.
        lacking: dimension -> why it cannot be computed, where that is known already.
    """

    backbones: Backbones
    identity: Mapping[str, object] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a run ended: records made now, records that were there, and what could not be measured, with the reason.

    A video is damaged as a whole or, where a dimension is named, only for that dimension.
    """

    computed: int = 0
    found: int = 0
    not_computed: dict[str, str] = field(default_factory=dict)
    damaged: dict[tuple[Path, str], str] = field(default_factory=dict)

    def damaged_of(self, clips: Iterable[Clip]) -> dict[str, str]:
        """Video, or "video, dimension" -> reason, for some of the videos."""
        paths = {clip.item.video for clip in clips}
        found = {place: why for place, why in self.damaged.items() if place[0] in paths}
        return {", ".join(filter(None, [path.name, name])): why for (path, name), why in found.items()}


def record_key(clip: Clip, dimension: str, networks: Networks) -> str:
    """What a record depends on, as one digest; FileNotFoundError if a file is gone."""
    with_image = dimension in IMAGE_DIMENSIONS and clip.item.image is not None
    return digest(
        {
            "format": FORMAT,
            "dimension": dimension,
            "video": content(clip.item.video),
            "image": content(clip.item.image) if with_image else None,
            "camera": clip.item.camera if dimension == "camera_motion" else None,
            "backbones": networks.backbones.name,
            "identity": networks.identity.get(dimension),
        }
    )


def read_records(folder: Path) -> dict[str, dict]:
    """Key -> record of every file of records in a folder; what a killed run left unfinished does not count.

    Raises:
        VBenchError: a damaged line that is not the last one.
    """
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        whole = path.read_bytes().rpartition(b"\n")[0]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                found[record["key"]] = record
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise VBenchError(
                    f"{path}: line {number} is damaged ({error}); delete the line, what it held is computed again"
                ) from error
    return found


class Appender:
    """A file of records in a folder, which no other process writes to; it is made with the first of them."""

    def __init__(self, folder: Path):
        self._folder, self._file = folder, None

    def append(self, record: dict) -> None:
        """Add one line in one write: a killed process leaves it whole, or cut short at the end of the file."""
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{secrets.token_hex(8)}.jsonl"
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        line = json.dumps(record, sort_keys=True, allow_nan=False).encode() + b"\n"
        if os.write(self._file, line) != len(line):
            raise VBenchError("a record could not be written as a whole; is the disk full?")

    def close(self) -> None:
        """Hand the file to the disk and let go of it."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)


def _opened(path: Path) -> Video:
    """A video as the dimensions see it: decoded once for all of them if it is small, and each time if it is not."""
    streamed = open_video(path)
    if streamed.count * streamed.height * streamed.width * 3 > _KEPT_BYTES:
        return streamed
    frames = list(streamed.source())
    return replace(streamed, source=lambda: iter(frames))


def run(
    clips: Sequence[Clip],
    networks: Networks,
    folder: Path,
    part: Part | None = None,
    allow_damaged: bool = False,
    allow_absent: bool = False,
    dimensions: Mapping[str, Dimension] = DIMENSIONS,
    track: Callable[[list], Iterable] = iter,
) -> Outcome:
    """Measure what no record is there for; what was measured is kept, however a run ends.

    Args:
        clips: all videos, in the same order for every part.
        networks: the backbones.
        folder: of files of records, to which other processes may be adding theirs.
        part: which of the videos; None: all.
        allow_damaged: note videos that cannot be used, and go on.
        allow_absent: note networks that cannot be had, and go on.
        dimensions: what measures.
        track: goes through the list of work, one piece a measurement: it may show progress, or raise to end the run.

    Raises:
        VBenchError: a video is damaged or a network absent.
    """
    outcome, known = Outcome(not_computed=dict(networks.lacking)), set(read_records(folder))
    current = video = None
    with closing(Appender(folder)) as file:
        for clip, name in track([(each, name) for each in (part or Part()).share(clips) for name in each.dimensions]):
            if clip is not current:
                current, video = clip, None
            item = clip.item
            if name in outcome.not_computed or (item.video, "") in outcome.damaged:
                continue  # said once
            damaged = item.video, name
            try:
                key = record_key(clip, name, networks)
                if key in known:
                    outcome.found += 1
                    continue
                damaged = item.video, ""
                video = video or _opened(item.video)
                damaged = item.video, name
                measured = dimensions[name].measure(video, item, networks.backbones)
                if not math.isfinite(value := measured["video_results"]):
                    raise VBenchError(f"{item.video}: {name} is {value}; look at the video, it has no usable frames")
            except NotComputed as error:
                if not allow_absent:
                    raise VBenchError(f"{name} is not computed: {error}. Or {_LEAVE_OUT}") from error
                outcome.not_computed[name] = str(error)
            except (VBenchError, FileNotFoundError) as error:
                said = str(error) if item.video.name in str(error) else f"{item.video}: {error}"
                if not allow_damaged:
                    raise type(error)(f"{said}. Or {_LEAVE_OUT}") from error
                outcome.damaged[damaged] = said
            else:
                file.append({"key": key, "dimension": name, "video": item.video.name, **measured})
                known.add(key)
                outcome.computed += 1
    return outcome


def gather(clips: Iterable[Clip], networks: Networks, folder: Path) -> dict[str, list[tuple[Clip, dict]]]:
    """Look up the records of videos: dimension -> (video, record) in the order of the videos, whoever made them."""
    known = read_records(folder)
    found: dict[str, list[tuple[Clip, dict]]] = {}
    for clip in clips:
        for name in clip.dimensions:
            with suppress(FileNotFoundError):  # `run` has said what is not there, or may be left out
                if (record := known.get(record_key(clip, name, networks))) is not None:
                    found.setdefault(name, []).append((clip, record))
    return found
