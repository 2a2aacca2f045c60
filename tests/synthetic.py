"""A small suite of VBench-I2V's schema with images and videos from the procedural world, to try the benchmark on.

Subjects are the world's clips. Backgrounds are still textures, over which a camera moves as the prompt says.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vbench_i2v import camera
from vbench_i2v.suite import SAMPLES, nearest_ratio
from vbench_i2v.video import Video
from vpae.data.video import write_video
from vpae.data.world import draw_truth, render, render_background

SUITE = "vbench2_i2v_full_info.json"
SUBJECT = ("i2v_subject", "subject_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality")
BACKGROUND = ("i2v_background", "background_consistency", "aesthetic_quality")
BOTH = ("imaging_quality", "temporal_flickering")
_TRAVEL = 0.25  # of the frame's height, over the whole video


def records(subjects: int, backgrounds: int) -> list[dict]:
    """Prompts in VBench's schema and order: each background is followed by its seven camera movements."""
    found = []
    for number in range(backgrounds):
        text = f"texture number {number}"
        found.append(_record(text, text, (*BACKGROUND, *BOTH), "abstract"))
        found += [_record(f"{text}, {movement}", text, ("camera_motion",), "abstract") for movement in camera.SUFFIXES]
    for number in range(subjects):
        text = f"{_truth(number, 2).caption}, number {number}"
        found.append(_record(text, text, (*SUBJECT, *BOTH), "other"))
    return found


def _record(text: str, image: str, dimensions: Sequence[str], kind: str) -> dict:
    return {"prompt_en": text, "dimension": list(dimensions), "image_type": kind, "image_name": f"{image}.jpg"}


def write(
    folder: Path,
    subjects: int = 2,
    backgrounds: int = 1,
    samples: int = SAMPLES,
    frames: int = 9,
    height: int = 64,
    width: int = 64,
    fps: float = 8.0,
) -> Path:
    """Write the suite, `crop/{ratio}/*.jpg` and `videos/*.mp4`; returns the path of the suite."""
    suite = records(subjects, backgrounds)
    videos, images = folder / "videos", folder / "crop" / nearest_ratio(width, height)
    for part in (videos, images):
        part.mkdir(parents=True)
    for number, record in enumerate(suite):
        moves = camera.asked(record["prompt_en"])
        for sample in range(samples):
            if record["image_type"] == "other":
                index = number - 8 * backgrounds
                clip = render(_truth(index, frames + sample), height, width)[:frames]  # a little slower each time
            else:
                clip = _filmed(_texture(number // 8, height, width), moves or "static", frames, height, width, sample)
            if not sample and moves is None:
                Image.fromarray(clip[0]).save(images / record["image_name"], quality=95)
            write_video(videos / f"{record['prompt_en']}-{sample}.mp4", clip, fps, crf=10, reproducible=False)
    path = folder / SUITE
    path.write_text(json.dumps(suite, indent=4))
    return path


def _truth(number: int, frames: int):
    return draw_truth((11, number), frames, 1.0, 0.0, 0.0)


def _texture(number: int, height: int, width: int) -> np.ndarray:
    """A still background of three times the frame's size, so that a camera has room to move: (3H, 3W, 3) uint8."""
    rng = np.random.default_rng((12, number))
    fine = rng.normal(0, 40, (3 * height // 4, 3 * width // 4, 3))
    rough = np.asarray(
        Image.fromarray(np.clip(fine + 128, 0, 255).astype(np.uint8)).resize((3 * width, 3 * height), Image.BICUBIC)
    )
    smooth = render_background(_truth(number, 2).texture, 3 * height, 3 * width)
    return np.clip(0.5 * rough + 0.5 * smooth, 0, 255).astype(np.uint8)


def _filmed(texture: np.ndarray, movement: str, frames: int, height: int, width: int, sample: int) -> np.ndarray:
    """What a camera sees that moves over a texture, (T, H, W, 3); samples differ a little in speed."""
    travel = _TRAVEL * height * (1 + 0.1 * sample)
    ways = {"pan_left": (-1, 0), "pan_right": (1, 0), "tilt_up": (0, -1), "tilt_down": (0, 1)}
    x, y = ways.get(movement, (0, 0))
    growth = {"zoom_in": -0.3, "zoom_out": 0.3}.get(movement, 0.0)
    seen = []
    for t in np.linspace(0, 1, frames):
        zoom = 1 + growth * t
        left = 1.5 * width + x * travel * t - zoom * width / 2
        top = 1.5 * height + y * travel * t - zoom * height / 2
        box = (left, top, left + zoom * width, top + zoom * height)
        seen.append(np.asarray(Image.fromarray(texture).resize((width, height), Image.BILINEAR, box=box)))
    return np.stack(seen)


def video_of(frames_THW3: np.ndarray, fps: float) -> Video:
    """A video from uint8 frames in memory."""
    count, height, width, _ = frames_THW3.shape
    return Video(fps, count, height, width, lambda: iter(frames_THW3))
