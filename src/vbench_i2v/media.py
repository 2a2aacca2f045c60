"""Reading media files by FFmpeg (PyAV), with an eye on damage: what is read is what was written, or there is an error.

Axes: T frames, H height, W width, 3 colours (RGB, uint8).
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from vbench_i2v.damage import Watch, heard, without_past
from vbench_i2v.images import opaque


class VideoError(ValueError):
    """A video that cannot be used; the message says why, for the quarantine table."""


def open_container(path: Path, mode: str = "r"):
    """Open a media file with PyAV: a path is a path, whatever its characters, and tags may be in any encoding.

    Without the prefix FFmpeg takes `note: a.mp4` for a file of the protocol `note`.
    """
    return av.open(f"file:{path}", mode, metadata_errors="replace")


HDR = {16: "PQ", 18: "HLG"}  # transfer functions of more than a screen's range, by their numbers in ITU-T H.273
# Faults of the machine or of its network, which are gone when one tries again: no reason to leave a file out.
PASSING = {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT, errno.ESTALE, errno.ENOTCONN}
PASSING |= {errno.ECONNRESET, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}


@contextmanager
def reading(fault: str = "unreadable") -> Iterator[None]:
    """Whatever goes wrong while one file is read is a reason to leave out that file, and no more.

    Raises:
        VideoError: the file is at fault.
        MemoryError, OSError: the machine is.
    """
    try:
        yield
    except (VideoError, MemoryError):
        raise
    except av.error.FFmpegError as error:
        if error.errno in PASSING:
            raise OSError(error.errno, error.strerror, error.filename) from error
        raise VideoError(f"{fault}: {error.strerror}") from error
    except OSError as error:
        if error.errno in PASSING:
            raise
        raise VideoError(f"unreadable: {error.strerror}") from error
    except Exception as error:
        what = (str(error).splitlines() or [""])[0]
        raise VideoError(f"{fault}: {type(error).__name__}: {what}") from error


@dataclass(frozen=True)
class VideoInfo:
    """The first video stream of a file.

    Attributes:
        width, height: pixels as shown upright.
        fps: mean frames per second.
        streams: how many video streams there are.
        pixel_aspect: width / height of a pixel.
        seconds: how long it lasts; 0: the header does not say.
        begin: the time stamp in seconds at which it begins, which is not 0 where something was cut off.
        hdr: name of its HDR transfer function; empty without one.
    """

    width: int
    height: int
    fps: float
    streams: int
    pixel_aspect: float = 1.0
    seconds: float = 0.0
    begin: float = 0.0
    hdr: str = ""


def probe(path: Path) -> VideoInfo:
    """Read the header and the first frame of a file's first video stream.

    Raises:
        VideoError: the file is missing, unreadable or holds no video.
    """
    with reading():
        if not path.is_file():
            raise VideoError("no such file")
        with open_container(path) as container:
            if not container.streams.video:
                raise VideoError("no video stream")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            if not rate or not stream.width or not stream.height:
                raise VideoError("the header gives no size or frame rate")
            stream.codec_context.thread_count = 1
            first = next(container.decode(video=0), None)
            if first is None:
                raise VideoError("no frames")
            turns, aspect, size = _turns(first), float(stream.sample_aspect_ratio or 1), (stream.width, stream.height)
            if turns % 2:
                size, aspect = size[::-1], 1 / aspect
            seconds = float((stream.duration or 0) * stream.time_base)  # a container lasts as long as its sound
            begin = float((stream.start_time or 0) * stream.time_base)
            hdr = HDR.get(first.color_trc, "")
            return VideoInfo(*size, float(rate), len(container.streams.video), aspect, seconds, begin, hdr)


def length(path: Path) -> float:
    """Seconds from the first picture to the end of the last, by the time stamps of all packets; reads the whole file.

    Raises:
        VideoError: it cannot be read.
    """
    with reading(), open_container(path) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size and packet.pts is not None]
        ends = [packet.pts + (packet.duration or 0) for packet in packets]
        return float((max(ends) - min(packet.pts for packet in packets)) * stream.time_base) if ends else 0.0


def _turns(frame: av.VideoFrame) -> int:
    """Clockwise quarter turns, 0 to 3, that a phone's display matrix asks for; FFmpeg counts against the clock."""
    return round(-frame.rotation / 90) % 4


def pyav_frames(path: Path) -> Iterator[np.ndarray]:
    """Decode by PyAV to upright RGB frames, and stop at the first sign of damage.

    Raises:
        VideoError: damaged, as far as demuxer or decoder notice.
    """
    return map(upright_rgb, decoded(path))


def upright_rgb(frame: av.VideoFrame) -> np.ndarray:
    """A decoded frame as uint8 (H, W, 3), turned as its display matrix asks for, over white where it is transparent."""
    form = frame.format
    if form.has_palette or any(component.is_alpha for component in form.components):
        picture = np.asarray(opaque(Image.fromarray(frame.reformat(format="rgba", threads=1).to_ndarray())))
    else:
        picture = frame.reformat(format="rgb24", threads=1).to_ndarray()
    return np.rot90(picture, -_turns(frame))


def decoded(path: Path, start: float = 0.0) -> Iterator[av.VideoFrame]:
    """Frames in the order in which they are shown, from the last key frame before a time on; lazily.

    Raises:
        VideoError: damaged, as far as demuxer or decoder notice.
    """
    with reading("damaged"):
        with heard() as said:
            container = open_container(path)
        with container:
            stream = container.streams.video[0]
            # One thread: clips are decoded by several processes, and errors are heard in the thread that decodes.
            stream.codec_context.thread_count = 1
            watch, number, key = Watch(container, stream), 0, None
            fault = watch.complaint(said)
            if start > 0:
                container.seek(int(start / stream.time_base) + (stream.start_time or 0), stream=stream)
            packets = container.demux(stream)
            while not fault:
                with heard() as said:
                    packet = next(packets, None)
                    fault = watch.fault(packet) if packet else ""
                    frames = packet.decode() if packet and not fault else []
                if start > 0 and packet and packet.pts is not None:
                    # Pictures that are shown before the key frame may need others before it: neither read nor judged.
                    key = packet.pts if key is None else key
                    said = [] if packet.pts < key else without_past(said)
                    frames = [frame for frame in frames if frame.pts is None or frame.pts >= key]
                fault = fault or watch.complaint(said)
                for frame in frames if not fault else ():
                    if frame.is_corrupt:
                        raise VideoError(f"damaged: frame {number} is corrupt")
                    yield frame
                    number += 1
                if packet is None:
                    return
            raise VideoError(f"damaged after {number} frames: {fault}")
