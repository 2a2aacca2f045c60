"""A generated video as a stream of frames: no measure holds a whole clip as floating point at full size.

Axes: N frames of a chunk, T frames of the video, H height, W width, 3 colours (RGB).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vbench_i2v.errors import VBenchError
from vbench_i2v.media import VideoError, VideoInfo, open_container, probe, pyav_frames, reading

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
        return self._pieces(size, 0, 1)

    def runs(self, size: int = CHUNK, every: int = 1) -> Iterator[Tensor]:
        """Frames 0, `every`, 2 `every`, ... as uint8 (N, 3, H, W), N from 2 to `size` + 1; each run starts with the
        last frame of the one before, so that every two neighbours meet in one. None of a single frame."""
        return self._pieces(size, 1, every)

    def _pieces(self, size: int, shared: int, every: int) -> Iterator[Tensor]:
        """`size` new frames at a time, after the last `shared` ones of the piece before."""
        kept: list[Tensor] = []
        for frame in self.frames(every):
            kept.append(frame)
            if len(kept) == size + shared:
                piece, kept = torch.stack(kept), kept[size:]
                yield piece
        if len(kept) > shared:
            yield torch.stack(kept)


def open_video(path: Path) -> Video:
    """A video file, checked to be whole as far as its index tells; decoded when its frames are asked for.

    Raises:
        FileNotFoundError: there is no such file.
        VBenchError: unreadable or truncated; also raised by the streams, when frames are damaged or fewer than listed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such video; generate it, or leave it out of the suite")
    info = shape(path)
    with _named(path), reading(), open_container(path) as container:
        stream = container.streams.video[0]
        shown = [not packet.is_discard for packet in container.demux(stream) if packet.size]
        count = sum(shown)
        if stream.frames and len(shown) < stream.frames:
            raise VideoError(f"truncated, {count} of {stream.frames - (len(shown) - count)} frames")

    def decode() -> Iterator[np.ndarray]:
        decoded = 0
        with _named(path):
            for frame in pyav_frames(path):
                decoded += 1
                yield frame
            if decoded != count:
                raise VideoError(f"damaged, only {decoded} of {count} frames decode")

    return Video(info.fps, count, info.height, info.width, decode)


def shape(path: Path) -> VideoInfo:
    """Size and frame rate of a video, from its header and its first frame.

    Raises:
        VBenchError: the file cannot be read.
    """
    with _named(path):
        return probe(path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except VideoError as error:
        raise VBenchError(f"{path}: {error}; truncated or damaged? Generate it again") from error
