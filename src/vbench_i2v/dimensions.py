"""VBench-I2V's nine dimensions: from one video's frames to a record, and from all records to the dimension's value.

clamp(x) = max(0, x); cos is the cosine of features, which are normalised first, in the network's own dtype.
Axes: N frames of a chunk, T frames, D feature width, H height, W width, 3 colours (RGB).
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vbench_i2v import camera, transforms
from vbench_i2v.base import Backbones, Dimension, Item
from vbench_i2v.errors import VBenchError
from vbench_i2v.images import read_image
from vbench_i2v.video import Video

RAFT_FPS = 8  # dynamic_degree looks at about so many frames a second
FASTEST = 0.05  # share of the pixels whose mean speed counts
PAIRS, SMALL = 8, 128 * 128  # pairs of frames that are measured at once, where frames have so many pixels at most


def camera_motion(video: Video, item: Item, backbones: Backbones) -> dict:
    """1 if the movement asked for is among those that the tracks of four points speak for."""
    if item.camera not in camera.TYPES:
        raise VBenchError(f"{item.video}: camera_motion needs a prompt that asks for one; found {item.camera!r}")
    found = camera.movements(backbones.tracks()(video), video.height, video.width)
    score = 1.0 if item.camera in found else 0.0
    return {"video_results": score, "prompt_type": item.camera, "predict_type": found}


def i2v_subject(video: Video, item: Item, backbones: Backbones) -> dict:
    """DINO's likeness of the frames to the input image and to each other."""
    image = transforms.subject_image(read_image(_image(item)))
    return _likeness(video, item, image, transforms.subject_frames, backbones.dino(), backbones.device)


def i2v_background(video: Video, item: Item, backbones: Backbones) -> dict:
    """DreamSim's likeness of the frames to the input image and to each other."""
    image = transforms.background_image(read_image(_image(item)))
    return _likeness(video, item, image, transforms.background_frames, backbones.dreamsim(), backbones.device)


def _image(item: Item) -> Path:
    if item.image is None:
        raise VBenchError(f"{item.video}: the i2v dimensions need its input image, and none is given")
    return item.image


def _likeness(
    video: Video,
    item: Item,
    image_13HW: Tensor,
    transform: transforms.Frames,
    network: Callable[[Tensor], Tensor],
    device: torch.device,
) -> dict:
    """0.4 max conf + 0.3 mean cons + 0.3 min cons; conf_i = clamp(cos(image, i)), cons_i = clamp(cos(i - 1, i))."""
    features_TD = _features(video, transform, network, device)
    _at_least(2, len(features_TD), item)
    image_1D = F.normalize(network(image_13HW.to(device)), dim=-1)
    conformity = _cosines(image_1D, features_TD)
    consistency = _cosines(features_TD[:-1], features_TD[1:])
    parts = {
        "conformity_max": max(conformity),
        "consistency_mean": _mean(consistency),
        "consistency_min": min(consistency),
    }
    weights = (0.4, 0.3, 0.3)
    return {"video_results": sum(w * part for w, part in zip(weights, parts.values(), strict=True)), **parts}


def subject_consistency(video: Video, item: Item, backbones: Backbones) -> dict:
    """DINO's likeness of each frame to the first and to the one before."""
    return _consistency(item, _features(video, transforms.dino_frames, backbones.dino(), backbones.device))


def background_consistency(video: Video, item: Item, backbones: Backbones) -> dict:
    """CLIP ViT-B/32's likeness of each frame to the first and to the one before."""
    return _consistency(item, _features(video, transforms.clip_frames, backbones.clip_b32(), backbones.device))


def _consistency(item: Item, features_TD: Tensor) -> dict:
    """cur_i = (clamp(cos(i - 1, i)) + clamp(cos(0, i))) / 2 for i >= 1, and their mean."""
    _at_least(2, len(features_TD), item)
    former = _cosines(features_TD[:-1], features_TD[1:])
    first = _cosines(features_TD[:1], features_TD[1:])
    current = [(a + b) / 2 for a, b in zip(former, first, strict=True)]
    return {"video_results": _mean(current), "video_sim": math.fsum(current), "cnt_per_video": len(current)}


def motion_smoothness(video: Video, item: Item, backbones: Backbones) -> dict:
    """(255 - mean distance of the odd frames from what interpolates the even ones) / 255."""
    _at_least(3, video.count, item)
    interpolate = backbones.interpolate()
    border = transforms.pad_to_multiple(video.height, video.width, 16)
    distances = []
    for run in video.runs(2 * _pairs_at_once(video)):
        even = transforms.pad(run[::2].to(backbones.device).float() / 255, border)
        if len(even) < 2:
            continue  # a last frame that nothing follows
        middle = transforms.unpad(interpolate(even[:-1], even[1:]).clamp(0, 1), border)
        # VBench cuts off the fractions of the predicted bytes.
        difference = run[1::2][: len(middle)].to(backbones.device).int() - (middle * 255).to(torch.uint8).int()
        distances += difference.abs().double().mean((1, 2, 3)).tolist()
    return {"video_results": (255 - _mean(distances)) / 255}


def dynamic_degree(video: Video, item: Item, backbones: Backbones) -> dict:
    """Whether enough pairs of frames, 1/8 second apart, have fast pixels."""
    raft = backbones.raft()
    interval = max(1, round(video.fps / RAFT_FPS))
    border = transforms.pad_to_multiple(video.height, video.width, 8)
    scores: list[float] = []
    for run in video.runs(_pairs_at_once(video), interval):
        frames = transforms.pad(run.to(backbones.device).float(), border)
        speeds = raft(frames[:-1], frames[1:]).float().square().sum(1).sqrt().flatten(1)
        scores += speeds.topk(int(speeds.shape[1] * FASTEST)).values.mean(1).tolist()
    threshold = 6.0 * min(video.height, video.width) / 256
    needed = round(4 * (len(scores) + 1) / 16)
    moving = sum(score > threshold for score in scores)
    # Without pairs nothing moves, even where none are needed.
    moves = bool(scores) and moving >= needed
    return {"video_results": moves, "pair_speeds": scores, "threshold": threshold, "pairs_needed": needed}


def _pairs_at_once(video: Video) -> int:
    """Small frames share the cost of a call; two large ones fill a GPU, RAFT's correlations above all."""
    return PAIRS if video.height * video.width <= SMALL else 1


def aesthetic_quality(video: Video, item: Item, backbones: Backbones) -> dict:
    """Mean of the frames' ratings / 10."""
    head = backbones.aesthetic_head()
    encode = backbones.clip_l14()
    features_TD = _features(video, transforms.clip_frames, lambda frames: encode(frames).float(), backbones.device)
    return {"video_results": (head(features_TD) / 10).mean().item()}


def imaging_quality(video: Video, item: Item, backbones: Backbones) -> dict:
    """Mean of the frames' quality, about 0 to 100, as VBench stores it."""
    musiq, scores = backbones.musiq(), []
    for chunk in video.chunks():
        scores += musiq(transforms.musiq_frames(chunk.to(backbones.device))).double().flatten().tolist()
    return {"video_results": _mean(scores)}


def _features(video: Video, transform: transforms.Frames, network: Callable, device: torch.device) -> Tensor:
    """Unit-length features of all frames, (T, D)."""
    return torch.cat([F.normalize(network(transform(chunk.to(device))), dim=-1) for chunk in video.chunks()])


def _cosines(a: Tensor, b: Tensor) -> list[float]:
    """clamp(cos) row by row."""
    return F.cosine_similarity(a, b, dim=-1).clamp(min=0).tolist()


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _at_least(frames: int, found: int, item: Item) -> None:
    if found < frames:
        raise VBenchError(f"{item.video}: {found} frames, and this dimension needs {frames}; generate it again")


def mean_of_videos(records: list[dict]) -> float:
    """Mean of "video_results"; True counts as 1."""
    return _mean([float(record["video_results"]) for record in records])


def mean_of_frames(records: list[dict]) -> float:
    """Sum over all videos / number of pairs: longer videos weigh more, as on one GPU of VBench."""
    return math.fsum(r["video_sim"] for r in records) / sum(r["cnt_per_video"] for r in records)


def mean_of_hundreds(records: list[dict]) -> float:
    """Mean of "video_results" / 100."""
    return mean_of_videos(records) / 100


def _with_geometry(measure: Callable) -> Callable[[Video, Item, Backbones], dict]:
    """Every record says what was measured, and nothing keeps gradients."""

    @torch.no_grad()
    def measured(video: Video, item: Item, backbones: Backbones) -> dict:
        shape = {"fps": video.fps, "frames": video.count, "height": video.height, "width": video.width}
        return measure(video, item, backbones) | shape

    return measured


_MEASURES = {
    camera_motion: mean_of_videos,
    i2v_subject: mean_of_videos,
    i2v_background: mean_of_videos,
    subject_consistency: mean_of_frames,
    background_consistency: mean_of_frames,
    motion_smoothness: mean_of_videos,
    dynamic_degree: mean_of_videos,
    aesthetic_quality: mean_of_videos,
    imaging_quality: mean_of_hundreds,
}
DIMENSIONS = {m.__name__: Dimension(_with_geometry(m), total) for m, total in _MEASURES.items()}
