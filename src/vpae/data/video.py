"""Reading and writing video files by PyAV, which finds damage; decord gives the same bytes, but does not find damage.

Axes: T frames, H height, W width, 3 colours (RGB, uint8).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from vbench_i2v.images import read_image
from vbench_i2v.media import VideoError, decoded, open_container, probe, pyav_frames, reading, upright_rgb


def read_frames(path: Path, decoder: str = "pyav") -> tuple[np.ndarray, float]:
    """Decode every frame of the first video stream, upright and at its own size.

    Args:
        path: a video file.
        decoder: "pyav", or "decord", which finds no damage and takes the "best" of several streams.

    Returns:
        uint8 frames (T, H, W, 3) and the frame rate in frames per second.

    Raises:
        VideoError: nothing could be decoded, or something is damaged.
    """
    return _stacked(list({"pyav": pyav_frames, "decord": decord_frames}[decoder](path))), probe(path).fps


def _stacked(frames: list[np.ndarray]) -> np.ndarray:
    if not frames:
        raise VideoError("no frames")
    if len({f.shape for f in frames}) > 1:
        raise VideoError("the frame size changes within the clip")
    return np.stack(frames)


def decord_frames(path: Path) -> Iterator[np.ndarray]:
    """Decode by decord, one frame after the other: its seeking is fast, but not exact in every file."""
    try:
        import decord  # slow to import
    except ImportError as error:  # there are no wheels for some platforms
        raise VideoError("decord is not installed") from error
    try:
        reader = decord.VideoReader(f"file:{path}", num_threads=1)
        for _ in range(len(reader)):
            frame = reader.next().asnumpy()
            if frame.shape[2] != 3:  # it takes the padding of some narrow frames for more channels
                raise VideoError(f"decord: {frame.shape[2]} channels")
            yield frame
    except (decord.DECORDError, RuntimeError, AssertionError, UnicodeError) as error:
        raise VideoError(f"decord: {str(error).strip().splitlines()[0]}") from error


def resample_indices(fps_in: float, frames: int, fps_out: float) -> np.ndarray:
    """Indices of the nearest source frames at times 0, 1/fps_out, 2/fps_out, ...; the earlier of two equally near."""
    return np.ceil(np.arange(frames) * fps_in / fps_out - 0.5).astype(int)


def _varying_times(path: Path, fps: float, seconds: float) -> np.ndarray | None:
    """When the frames are shown, in seconds after the first, as far as needed; None if the frame rate is constant.

    Read from the packets, without decoding. Where the container gives no times the rate is taken for constant.
    """
    with open_container(path) as container:
        stamps, stream = [], container.streams.video[0]
        for packet in container.demux(stream):
            shown = packet.size and not packet.is_discard  # others stand before a cut that left the file's bytes alone
            if shown and packet.pts is None:
                return None
            if shown:
                stamps.append(float(packet.pts * stream.time_base))
                # Packets come in the order of decoding; what is shown earlier comes a few packets later at most.
                if min(stamps[-32:]) - stamps[0] > seconds and len(stamps) > 32:
                    break
    times = np.sort(stamps) - min(stamps, default=0.0)
    steady = np.abs(times - np.arange(len(times)) / fps).max(initial=0.0) <= 0.5 / fps
    return None if steady else times


def _nearest(times: np.ndarray, wanted: np.ndarray, step: float) -> np.ndarray:
    """Index of the time nearest to each wanted one; one `step` past the last, one that does not exist."""
    after = np.searchsorted(times, wanted)
    before = np.maximum(after - 1, 0)
    later = np.where(after < len(times), times[np.minimum(after, len(times) - 1)], np.inf)
    ended = wanted > times[-1] + step
    return np.where(ended, len(times), np.where(later - wanted < wanted - times[before], after, before))


Fit = Callable[[av.VideoFrame], np.ndarray]


def _fit(height: int, width: int, pixel_aspect: float) -> Fit:
    """What brings each frame of a clip to its size, one at a time: a stack of whole frames would take gigabytes."""
    shapes = set()

    def fit(frame: av.VideoFrame) -> np.ndarray:
        picture = upright_rgb(frame)
        shapes.add(picture.shape)
        if len(shapes) > 1:
            raise VideoError("the frame size changes within the clip")
        return resize_and_crop(picture[None], height, width, pixel_aspect)[0]

    return fit


def _pick(frames: Iterator[av.VideoFrame], indices: np.ndarray, fit: Fit) -> list[np.ndarray]:
    """Frames at rising indices, as far as there are any; decodes no further than the last of them."""
    repeats, found = Counter(indices.tolist()), []
    for number, frame in enumerate(frames):
        if repeats[number]:
            found += [fit(frame)] * repeats[number]
        if number == indices[-1]:
            break
    return found


def _pick_times(frames: Iterator[av.VideoFrame], wanted: np.ndarray, step: float, fit: Fit) -> list[np.ndarray]:
    """Frames shown nearest to rising times, the earlier of two; the last one also stands for one `step` after it."""
    found: list[np.ndarray] = []
    before = None
    for frame in frames:
        while len(found) < len(wanted) and wanted[len(found)] <= frame.time:
            time = wanted[len(found)]
            found.append(fit(before if before and time - before.time <= frame.time - time else frame))
        before = frame
        if len(found) == len(wanted):
            return found
    ended = before.time + step if before else 0.0
    return found + [fit(before) for time in wanted[len(found) :] if time < ended]


def resize_and_crop(frames: np.ndarray, height: int, width: int, pixel_aspect: float = 1.0) -> np.ndarray:
    """Scale uint8 frames (T, H, W, 3) to cover (height, width) with square pixels, and crop the centre.

    What is shown keeps its aspect ratio; `pixel_aspect` is width / height of the given pixels.
    """
    if frames.shape[1:3] == (height, width) and pixel_aspect == 1.0:
        return frames
    shown = (frames.shape[2] * pixel_aspect, frames.shape[1])
    scale = max(width / shown[0], height / shown[1])
    size = (max(width, round(shown[0] * scale)), max(height, round(shown[1] * scale)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    resized = [np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in frames]
    return np.stack(resized)[:, top : top + height, left : left + width]


def read_image_at(path: Path, height: int, width: int) -> Image.Image:
    """A still image at the size of an experiment, which it is brought to as clips are; errors are `read_image`'s."""
    return Image.fromarray(resize_and_crop(np.asarray(read_image(path))[None], height, width)[0])


def read_clip(
    path: Path, frames: int, height: int, width: int, fps: float, start: float = 0.0, stop: float | None = None
) -> np.ndarray:
    """Decode a stretch of a video in an experiment's geometry: resampled in time, scaled and cropped.

    Frames are chosen by the time at which they are shown, so that a varying frame rate changes no speeds.

    Args:
        path: a video file.
        frames: frames T.
        height: pixels.
        width: pixels.
        fps: frames per second.
        start: seconds after the video's beginning.
        stop: seconds at which the stretch ends; None: with the video.

    Returns:
        uint8 frames (T, H, W, 3).

    Raises:
        VideoError: unreadable, damaged, HDR, or too short.
    """
    info = probe(path)
    fit = _fit(height, width, info.pixel_aspect)
    if info.hdr:
        raise VideoError(
            f"HDR ({info.hdr}), whose colours would be washed out: convert it to SDR (BT.709) with tone mapping"
        )
    if stop is not None and start + (frames - 1) / fps >= stop:
        raise VideoError(f"too short: {frames} frames at {fps:g} fps do not fit between {start:g} s and {stop:g} s")
    if start > 0:
        wanted = info.begin + start + np.arange(frames) / fps
        found = _pick_times(decoded(path, start), wanted, 1 / info.fps, fit)
        if len(found) < frames:
            raise VideoError(f"too short: {len(found)} of {frames} frames at {fps:g} fps from {start:g} s on")
        return _stacked(found)
    with reading():
        times = _varying_times(path, info.fps, frames / fps)
    if times is None:
        indices = resample_indices(info.fps, frames, fps)
    else:
        indices = _nearest(times, np.arange(frames) / fps, 1 / info.fps)
    found = _stacked(_pick(decoded(path), indices, fit))
    if len(found) < frames:
        raise VideoError(
            f"too short: it gives {len(found)} of {frames} frames at {fps:g} fps, for which it needs {indices[-1] + 1} "
            f"at its own {info.fps:g} fps"
        )
    return found


def write_video(path: Path, frames: np.ndarray, fps: float, crf: int, reproducible: bool = True) -> None:
    """Write uint8 frames (T, H, W, 3) as H.264 (yuv420p).

    Args:
        path: an .mp4 file; replaced if it exists.
        frames: uint8, even height and width.
        fps: frames per second.
        crf: x264's constant rate factor, 0 (lossless) to 51; VBench-I2V uses 10.
        reproducible: give equal bytes for equal frames, with one thread and at several times the cost; otherwise with
            as many threads as there are.
    """
    with open_container(path, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "threads": "1" if reproducible else "0"}
        if reproducible:
            # With assembly, the same frames have been seen to give unequal files; without it, never. See docs/log.md.
            stream.options |= {"x264-params": "no-asm=1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
