"""Reading and writing video files: decord decodes, PyAV encodes and decodes what decord cannot.

Axes: T frames, H height, W width, 3 colours (RGB, uint8).
"""

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image


class VideoError(ValueError):
    """A video that cannot be used; the message says why, for the quarantine table."""


@dataclass(frozen=True)
class VideoInfo:
    """The first video stream of a file: width and height in pixels, frames per second, number of video streams."""

    width: int
    height: int
    fps: float
    streams: int


def probe(path: Path) -> VideoInfo:
    """Read the header of a file's first video stream.

    Raises:
        VideoError: the file is missing, unreadable or holds no video.
    """
    if not path.is_file():
        raise VideoError("no such file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError("no video stream")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            if not rate or not stream.width or not stream.height:
                raise VideoError("the header gives no size or frame rate")
            return VideoInfo(stream.width, stream.height, float(rate), len(container.streams.video))
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"unreadable header: {error}") from error


def read_frames(path: Path, decoder: str = "auto") -> tuple[np.ndarray, float]:
    """Decode every frame of the first video stream at its own size.

    decord is used where it can be trusted to take the first stream: it picks the "best" one of several, and offers no
    choice. PyAV takes over then, and where decord fails.

    Args:
        path: a video file.
        decoder: "auto", "decord" or "pyav".

    Returns:
        uint8 frames (T, H, W, 3) and the frame rate in frames per second.

    Raises:
        VideoError: nothing could be decoded.
    """
    info = probe(path)
    if decoder == "decord" or (decoder == "auto" and info.streams == 1):
        try:
            return _read_decord(path), info.fps
        except VideoError:
            if decoder == "decord":
                raise
    return _read_pyav(path), info.fps


def _read_decord(path: Path) -> np.ndarray:
    import decord  # slow to import, and absent on platforms without a wheel

    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        frames = reader.get_batch(range(len(reader))).asnumpy()
    except (decord.DECORDError, RuntimeError) as error:
        raise VideoError(f"decord: {str(error).strip().splitlines()[0]}") from error
    if len(frames) == 0:
        raise VideoError("decord: no frames")
    return frames


def _read_pyav(path: Path) -> np.ndarray:
    try:
        with av.open(str(path)) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"PyAV: {error}") from error
    if not frames:
        raise VideoError("PyAV: no frames")
    if len({f.shape for f in frames}) > 1:
        raise VideoError("the frame size changes within the clip")
    return np.stack(frames)


def resample_indices(available: int, fps_in: float, frames: int, fps_out: float) -> np.ndarray:
    """Indices of the nearest source frames at times 0, 1/fps_out, 2/fps_out, ...

    Raises:
        VideoError: the source ends before the last wanted time.
    """
    indices = np.rint(np.arange(frames) * fps_in / fps_out).astype(int)
    if indices[-1] >= available:
        raise VideoError(
            f"too short: {available} frames at {fps_in:g} fps, but {frames} frames at {fps_out:g} fps need {indices[-1] + 1}"
        )
    return indices


def resize_and_crop(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale uint8 frames (T, H, W, 3) to cover (height, width), keeping the aspect ratio, and crop the centre."""
    if frames.shape[1:3] == (height, width):
        return frames
    scale = max(height / frames.shape[1], width / frames.shape[2])
    size = (max(width, round(frames.shape[2] * scale)), max(height, round(frames.shape[1] * scale)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    resized = [np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in frames]
    return np.stack(resized)[:, top : top + height, left : left + width]


def read_clip(path: Path, frames: int, height: int, width: int, fps: float) -> np.ndarray:
    """Decode a clip in an experiment's geometry: resampled in time, scaled and cropped, uint8 (T, H, W, 3).

    Raises:
        VideoError: unreadable, or too short.
    """
    source, fps_in = read_frames(path)
    return resize_and_crop(source[resample_indices(len(source), fps_in, frames, fps)], height, width)


def write_video(path: Path, frames: np.ndarray, fps: float, crf: int) -> None:
    """Write uint8 frames (T, H, W, 3) as H.264 (yuv420p); one thread, so that equal frames give equal files.

    Args:
        path: an .mp4 file; replaced if it exists.
        frames: uint8, even height and width.
        fps: frames per second.
        crf: x264's constant rate factor, 0 (lossless) to 51; VBench-I2V uses 10.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(fps))
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
