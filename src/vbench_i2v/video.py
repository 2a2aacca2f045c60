"""A generated video as a stream of frames: no measure holds a whole clip as floating point at full size.

Axes: N frames of a chunk, T frames of the video, H height, W width, 3 colours (RGB).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from vbench_i2v.errors import VBenchError

CHUNK = 8  # frames, of which 8 x 720p are 88 MB as float32


@dataclass(frozen=True)
class Video:
    """What VBench reads of a video: every frame, at its own size.

    Attributes:
        fps: frames per second.
        count: frames T.
        height: pixels, upright.
        width: pixels, upright.
        source: starts to decode from the first frame at each call; yields uint8 (H, W, 3).
    """

    fps: float
    count: int
    height: int
    width: int
    source: Callable[[], Iterator[np.ndarray]]

    def frames(self, every: int = 1) -> Iterator[Tensor]:
        """Frames 0, `every`, 2 `every`, ... as uint8 (3, H, W)."""
        for number, frame in enumerate(self.source()):
            if number % every == 0:
                yield torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)

    def chunks(self, size: int = CHUNK) -> Iterator[Tensor]:
        """All frames, `size` at a time (the last chunk may be shorter), as uint8 (N, 3, H, W)."""
        kept: list[Tensor] = []
        for frame in self.frames():
            kept.append(frame)
            if len(kept) == size:
                chunk, kept = torch.stack(kept), []
                yield chunk
        if kept:
            yield torch.stack(kept)

    def runs(self, size: int = CHUNK, every: int = 1) -> Iterator[Tensor]:
        """Frames 0, `every`, 2 `every`, ... as uint8 (N, 3, H, W), N from 2 to `size` + 1; each run starts with the
        last frame of the one before, so that every two neighbours meet in one. None of a single frame."""
        kept: list[Tensor] = []
        for frame in self.frames(every):
            kept.append(frame)
            if len(kept) > size:
                run, kept = torch.stack(kept), kept[-1:]
                yield run
        if len(kept) > 1:
            yield torch.stack(kept)


def open_video(path: Path) -> Video:
    """A video file, checked to be whole as far as its index tells; decoded by PyAV when its frames are asked for.

    Raises:
        FileNotFoundError: there is no such file.
        VBenchError: unreadable or truncated; also raised by the streams, when frames are damaged or fewer than listed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such video; generate it, or leave it out of the suite")
    fps, height, width = shape(path)
    with _stream(path) as stream:
        shown = [not packet.is_discard for packet in stream.container.demux(stream) if packet.size]
        count = sum(shown)
        listed = stream.frames - (len(shown) - count) if stream.frames else count
    if count < listed:
        raise VBenchError(f"{path}: truncated, {count} of {listed} frames; generate it again")

    def decode() -> Iterator[np.ndarray]:
        decoded = 0
        with _stream(path) as stream:
            for frame in stream.container.decode(stream):
                if frame.is_corrupt:
                    raise VBenchError(f"{path}: frame {decoded} of {count} is damaged; generate it again")
                decoded += 1
                yield np.rot90(frame.reformat(format="rgb24", threads=1).to_ndarray(), -_turns(frame))
        if decoded != count:
            raise VBenchError(f"{path}: damaged, only {decoded} of {count} frames decode; generate it again")

    return Video(fps, count, height, width, decode)


def shape(path: Path) -> tuple[float, int, int]:
    """Frames per second, height and width of a video as shown upright, from its header and its first frame.

    Raises:
        VBenchError: the file cannot be read.
    """
    with _stream(path) as stream:
        rate = stream.average_rate or stream.guessed_rate
        first = next(stream.container.decode(stream), None)
        if first is None or not rate:
            raise VBenchError(f"{path}: no frames, or no frame rate; generate it again")
        sides = (first.height, first.width)
        return float(rate), *(sides if _turns(first) % 2 == 0 else sides[::-1])


@contextmanager
def _stream(path: Path) -> Iterator[av.VideoStream]:
    """A file's first video stream. FFmpeg is given an open file: it would take a name with a colon for a protocol."""
    try:
        with path.open("rb") as file, av.open(file, metadata_errors="replace") as container:
            if not container.streams.video:
                raise VBenchError(f"{path}: no video in it; generate it again")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # videos are decoded by several processes
            yield stream
    except (VBenchError, MemoryError):
        raise
    except Exception as error:  # one file's content must not end the measuring of all others, whatever it is
        reason = getattr(error, "strerror", None) or str(error)
        raise VBenchError(f"{path}: unreadable: {reason}; truncated or no video? Generate it again") from error


def _turns(frame: av.VideoFrame) -> int:
    """Clockwise quarter turns, 0 to 3, that a phone's display matrix asks for; FFmpeg counts against the clock."""
    return round(-frame.rotation / 90) % 4


def video_of(frames_THW3: np.ndarray, fps: float) -> Video:
    """A video from uint8 frames in memory."""
    count, height, width, _ = frames_THW3.shape
    return Video(fps, count, height, width, lambda: iter(frames_THW3))
