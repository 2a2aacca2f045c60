"""Every dimension equals a naive recomputation of its formula, with random networks; and behaves with the tiny ones."""

import itertools
import math
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from conftest import seeded
from synthetic import video_of
from vbench_i2v import camera, dimensions, transforms, video
from vbench_i2v.backbones.dino import DinoViT
from vbench_i2v.base import Item
from vbench_i2v.dimensions import DIMENSIONS
from vbench_i2v.errors import NotComputed, VBenchError
from vbench_i2v.video import Video, open_video
from vpae.config import TinyEncoders
from vpae.data.video import read_frames, write_video
from vpae.data.world import draw_truth, render
from vpae.evaluation.vbench.tiny import TINY, Tiny
from vpae.evaluation.vbench.tiny.quality import as_bytes, blur
from vpae.teacher.encoders import build_image_encoder

EXACT = 1e-5
IMAGENET = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
CLIP = (np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711]))


class Patches(nn.Module):
    """A random stand-in for an encoder of 224 x 224 images."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 16, 16), nn.Tanh(), nn.Flatten(), nn.Linear(14 * 14 * width, 8))

    def forward(self, frames: Tensor) -> Tensor:
        assert frames.shape[-2:] == (224, 224)
        return self.layers(frames)


def between(first: Tensor, second: Tensor) -> Tensor:
    """Some frame that both others and their neighbourhoods determine; now and then outside [0, 1]."""
    assert all(side % 16 == 0 for side in first.shape[-2:])
    return 1.2 * (0.7 * first.roll(1, -1) + 0.3 * second.roll(1, -2)) - 0.1


def speeds(first: Tensor, second: Tensor) -> Tensor:
    """Some flow with large and small motion."""
    assert all(side % 8 == 0 for side in first.shape[-2:])
    change = (second - first).mean(1, keepdim=True)
    return torch.cat([change / 4, change.roll(3, -1) / 9], 1)


@dataclass
class Random:
    """Backbones of random weights, each callable on its own."""

    name: str = "random"
    networks: dict = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda: self.networks[name]


@pytest.fixture(scope="module")
def networks() -> Random:
    dino = seeded(0, lambda: DinoViT(width=32, depth=2, heads=4)).eval().requires_grad_(False)
    seeded(1, lambda: [nn.init.normal_(p, std=0.2) for p in (dino.pos_embed, dino.cls_token)])
    quality = seeded(2, lambda: nn.Conv2d(3, 1, 5)).requires_grad_(False)
    return Random(
        networks={
            "dino": dino,
            "clip_b32": seeded(3, Patches).requires_grad_(False),
            "clip_l14": seeded(4, Patches).requires_grad_(False),
            "dreamsim": seeded(5, Patches).requires_grad_(False),
            "aesthetic_head": seeded(6, lambda: nn.Linear(8, 1)).requires_grad_(False),
            "musiq": lambda frames: 60 + 40 * quality(frames).square().mean((1, 2, 3)),
            "interpolate": between,
            "raft": speeds,
        }
    )


def clip(height: int, width: int, frames: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise, which change from frame to frame."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (2, 5, 7, 3)).astype(np.uint8)
    ends = [np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC), float) for c in coarse]
    clips = [ends[0] + (ends[1] - ends[0]) * t / frames + rng.normal(0, 6, ends[0].shape) for t in range(frames)]
    return np.rint(clips).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module", params=[(48, 80, 6), (300, 260, 5)], ids=["wide", "high"])
def case(request, tmp_path_factory) -> tuple[np.ndarray, Item]:
    """Frames, and an item whose input image has another size; one that is enlarged and one that is reduced."""
    height, width, frames = request.param
    folder = tmp_path_factory.mktemp("case")
    picture = clip(height + 31, width + 70, 1, seed=1)[0]
    Image.fromarray(picture).save(folder / "image.png")
    return clip(height, width, frames), Item(folder / "video.mp4", folder / "image.png", "pan_left")


# The naive recomputation: per-pixel weights, loops over frames, double precision.


def weight(distance: float, kernel: str) -> float:
    x, a = abs(distance), -0.75
    if kernel == "bilinear":
        return max(0.0, 1 - x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resampling(old: int, new: int, kernel: str) -> np.ndarray:
    """(new, old) weights of resampling one axis without antialiasing; beyond the border, the border's pixel."""
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[i, min(max(tap, 0), old - 1)] += weight(centre - tap, kernel)
    return weights


def resized(frame: np.ndarray, height: int, width: int, kernel: str) -> np.ndarray:
    rows = np.tensordot(resampling(frame.shape[0], height, kernel), frame.astype(float), 1)
    return np.einsum("wx,hxc->hwc", resampling(frame.shape[1], width, kernel), rows)


def shorter(frame: np.ndarray, side: int) -> tuple[int, int]:
    height, width = frame.shape[:2]
    return (side, int(side * width / height)) if height < width else (int(side * height / width), side)


def cropped(frame: np.ndarray) -> np.ndarray:
    top, left = round((frame.shape[0] - 224) / 2), round((frame.shape[1] - 224) / 2)
    return frame[top : top + 224, left : left + 224]


def features(network, frame: np.ndarray, statistics=None) -> np.ndarray:
    if statistics is not None:
        frame = (frame - statistics[0]) / statistics[1]
    with torch.no_grad():
        return network(torch.from_numpy(frame).permute(2, 0, 1)[None].float())[0].double().numpy()


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    return max(0.0, float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))


def of_image(conformity: list[float], consistency: list[float]) -> float:
    return 0.4 * max(conformity) + 0.3 * sum(consistency) / len(consistency) + 0.3 * min(consistency)


def i2v_subject(frames, item, networks):
    picture = Image.open(item.image)
    high, wide = shorter(np.asarray(picture), 256)
    picture = cropped(np.asarray(picture.resize((wide, high), Image.Resampling.BICUBIC))) / 255
    wanted, former = features(networks.dino(), picture, IMAGENET), None
    conformity, consistency = [], []
    for frame in frames:
        prepared = cropped(resized(frame, *shorter(frame, 256), "bicubic")) / 255
        found = features(networks.dino(), prepared, IMAGENET)
        conformity.append(likeness(wanted, found))
        if former is not None:
            consistency.append(likeness(former, found))
        former = found
    return {"video_results": of_image(conformity, consistency)}


def i2v_background(frames, item, networks):
    picture = np.asarray(Image.open(item.image).resize((224, 224), Image.Resampling.BICUBIC)) / 255
    wanted, former = features(networks.dreamsim(), picture), None
    conformity, consistency = [], []
    for frame in frames:
        found = features(networks.dreamsim(), resized(frame, 224, 224, "bicubic") / 255)
        conformity.append(likeness(wanted, found))
        if former is not None:
            consistency.append(likeness(former, found))
        former = found
    return {"video_results": of_image(conformity, consistency)}


def consistency_of(found: list[np.ndarray]) -> dict:
    total = 0.0
    for i in range(1, len(found)):
        total += (likeness(found[i - 1], found[i]) + likeness(found[0], found[i])) / 2
    return {"video_results": total / (len(found) - 1), "video_sim": total, "cnt_per_video": len(found) - 1}


def subject_consistency(frames, _item, networks):
    prepared = [resized(frame, *shorter(frame, 224), "bilinear") / 255 for frame in frames]
    return consistency_of([features(networks.dino(), frame, IMAGENET) for frame in prepared])


def background_consistency(frames, _item, networks):
    prepared = [cropped(resized(frame, *shorter(frame, 224), "bicubic")) / 255 for frame in frames]
    return consistency_of([features(networks.clip_b32(), frame, CLIP) for frame in prepared])


def padded(frame: np.ndarray, unit: int) -> tuple[np.ndarray, int, int]:
    high, wide = (unit - frame.shape[0] % unit) % unit, (unit - frame.shape[1] % unit) % unit
    top, left = high // 2, wide // 2
    return np.pad(frame, ((top, high - top), (left, wide - left), (0, 0)), "edge"), top, left


def tensor(frame: np.ndarray) -> Tensor:
    return torch.from_numpy(frame).permute(2, 0, 1)[None].float()


def motion_smoothness(frames, _item, networks):
    distances = []
    for k in range(1, len(frames) - 1, 2):
        (before, top, left), (after, _, _) = padded(frames[k - 1], 16), padded(frames[k + 1], 16)
        guess = networks.interpolate()(tensor(before) / 255, tensor(after) / 255)[0].permute(1, 2, 0).numpy()
        guess = guess[top : top + frames.shape[1], left : left + frames.shape[2]]
        as_stored = (np.clip(guess, 0, 1) * 255).clip(0, 255).astype(np.uint8)
        distances.append(np.abs(frames[k].astype(int) - as_stored.astype(int)).mean())
    return {"video_results": (255 - sum(distances) / len(distances)) / 255}


def dynamic_degree(frames, _item, networks):
    kept = frames[:: max(1, round(FPS / 8))]
    threshold, needed = 6.0 * min(frames.shape[1:3]) / 256, round(4 * len(kept) / 16)
    scores = []
    for a, b in itertools.pairwise(kept):
        moved = networks.raft()(tensor(padded(a, 8)[0]), tensor(padded(b, 8)[0]))[0].double().numpy()
        length = np.sort(np.sqrt((moved**2).sum(0)).flatten())[::-1]
        scores.append(length[: int(length.size * 0.05)].mean())
    moving, found = 0, False
    for score in scores:
        moving += score > threshold
        found = found or moving >= needed
    return {"video_results": found, "pair_speeds": scores, "threshold": threshold, "pairs_needed": needed}


def aesthetic_quality(frames, _item, networks):
    head, ratings = networks.aesthetic_head(), []
    for frame in frames:
        prepared = cropped(resized(frame, *shorter(frame, 224), "bicubic")) / 255
        found = features(networks.clip_l14(), prepared, CLIP)
        found = found / math.sqrt(float(found @ found))
        ratings.append((float(head.weight[0].double().numpy() @ found) + float(head.bias)) / 10)
    return {"video_results": sum(ratings) / len(ratings)}


def imaging_quality(frames, _item, networks):
    scores = []
    for frame in frames:
        height, width = frame.shape[:2]
        if max(height, width) > 512:
            scale = 512 / max(height, width)
            frame = resized(frame, int(scale * height), int(scale * width), "bilinear")
        scores.append(float(networks.musiq()(tensor(frame / 255))))
    return {"video_results": sum(scores) / len(scores)}


FPS = 16.0
NAIVE = (
    i2v_subject,
    i2v_background,
    subject_consistency,
    background_consistency,
    motion_smoothness,
    dynamic_degree,
    aesthetic_quality,
    imaging_quality,
)


@pytest.mark.parametrize("naive", NAIVE, ids=lambda f: f.__name__)
def test_a_dimension_is_its_naive_recomputation(naive, case, networks):
    frames, item = case
    record = DIMENSIONS[naive.__name__].measure(video_of(frames, FPS), item, networks)
    expected = naive(frames, item, networks)
    for key, value in expected.items():
        assert record[key] == pytest.approx(value, abs=EXACT, rel=EXACT), key
    geometry = {"fps": FPS, "frames": len(frames), "height": frames.shape[1], "width": frames.shape[2]}
    assert geometry.items() <= record.items()
    assert isinstance(record["video_results"], bool if naive is dynamic_degree else float)


def test_imaging_quality_reduces_large_frames_to_512(networks):
    frames = clip(24, 600, 2)
    record = DIMENSIONS["imaging_quality"].measure(video_of(frames, FPS), Item(Path("wide.mp4")), networks)
    assert record["video_results"] == pytest.approx(imaging_quality(frames, None, networks)["video_results"], abs=EXACT)
    shapes = {(480, 832): (295, 512), (720, 1280): (288, 512), (480, 512): (480, 512)}
    for (height, width), expected in shapes.items():
        small = transforms.musiq_frames(torch.zeros(1, 3, height, width, dtype=torch.uint8))
        assert small.shape[-2:] == expected


def test_the_frames_are_not_antialiased_and_the_image_is():
    stripes = np.tile(np.array([0, 255], np.uint8)[None, :, None], (512, 256, 3))
    frame, image = transforms.background_frames(tensor(stripes)), transforms.background_image(Image.fromarray(stripes))
    assert frame.std() > 5 * image.std()
    edge = np.repeat((np.arange(512) // 256 * 255).astype(np.uint8)[None, :, None], 512, axis=0).repeat(3, axis=2)
    assert transforms.background_frames(tensor(edge)).max() > 1.01, "bicubic overshoots, and nothing clamps it"


@pytest.mark.parametrize(
    ("fps", "frames", "moving", "expected"),
    [
        (8, 17, 4, True),  # interval 1, 17 kept: round(4.25) = 4 pairs are needed
        (8, 17, 3, False),
        (16, 81, 10, True),  # interval 2, 41 kept: round(10.25) = 10
        (16, 81, 9, False),
        (8, 6, 1, False),  # round(1.5) = 2, to even
        (8, 10, 2, True),  # round(2.5) = 2, to even
        (8, 2, 0, True),  # none is needed, and there is a pair
        (24, 3, 0, False),  # one frame kept, no pair
        (4, 17, 4, True),  # interval 0.5 -> 1
    ],
)
def test_dynamic_degree_counts_pairs(fps, frames, moving, expected):
    pairs = iter([1.0] * moving + [0.0] * frames)

    def flow(first: Tensor, _second: Tensor) -> Tensor:
        limit = 6.0 * 16 / 256
        lengths = torch.tensor([limit + 0.01 if next(pairs) else limit - 0.01 for _ in first])
        return (lengths / math.sqrt(2)).reshape(-1, 1, 1, 1).expand(-1, 2, *first.shape[-2:])

    still = video_of(np.zeros((frames, 16, 24, 3), np.uint8), fps)
    record = DIMENSIONS["dynamic_degree"].measure(still, Item(Path("a.mp4")), Random(networks={"raft": flow}))
    assert record["video_results"] is expected


def tracks_of(top, down, left, right) -> Tensor:
    """Tracks in which only the four edge points move."""
    start = camera.grid(480, 832)
    end = start.clone()
    for place, way in (((0, 5), top), ((9, 5), down), ((5, 0), left), ((5, 9), right)):
        end[place] += torch.tensor(way, dtype=torch.float32)
    return torch.stack([start, end])


FAR, STAY = 30.0, (0.0, 0.0)
LEFT, RIGHT, UP, DOWN = (-FAR, 0.0), (FAR, 0.0), (0.0, -FAR), (0.0, FAR)


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        ((LEFT, LEFT, LEFT, LEFT), ["pan_right"]),
        ((RIGHT, RIGHT, RIGHT, RIGHT), ["pan_left"]),
        ((DOWN, DOWN, DOWN, DOWN), ["tilt_up"]),
        ((UP, UP, UP, UP), ["tilt_down"]),
        ((UP, DOWN, LEFT, RIGHT), ["zoom_in"]),
        ((DOWN, UP, RIGHT, LEFT), ["zoom_out"]),
        ((STAY, STAY, STAY, STAY), ["static"]),
        ((STAY, STAY, LEFT, LEFT), ["pan_right"]),  # static gives way to anything else
        ((STAY, STAY, LEFT, UP), ["None"]),  # to "None", too
        ((LEFT, LEFT, LEFT, UP), ["pan_right"]),  # which itself gives way
        ((LEFT, RIGHT, UP, DOWN), ["None"]),  # a rotation
        ((LEFT, LEFT, UP, UP), ["pan_right", "tilt_down"]),
        (((FAR, FAR),) * 4, ["pan_left", "tilt_up"]),  # a side may go two ways
        (((-FAR, -FAR), (-FAR, FAR), STAY, STAY), ["pan_right", "zoom_in"]),
        ((LEFT, STAY, STAY, LEFT), ["None"]),
    ],
)
def test_camera_labels(ways, expected):
    assert camera.movements(tracks_of(*ways), 480, 832) == expected


def test_camera_threshold_is_strict_and_fractions_are_cut_off():
    whole = torch.zeros(2, 10, 10, 2)
    whole[1, ..., 0] = 3
    assert camera.movements(whole, 480, 832) == ["pan_left"], "3 px > 2.4 px"
    assert camera.movements(whole, 600, 832) == ["static"], "3 px is not more than 3 px"
    ends = torch.zeros(2, 10, 10, 2)
    ends[0, ..., 0], ends[1, ..., 0] = 10.9, 13.1
    assert camera.movements(ends, 480, 832) == ["pan_left"], "2.2 px, but 13 - 10 after the cut"


def test_camera_motion_asks_for_one_and_counts_by_type(networks):
    networks = Random(networks={"tracks": lambda video: tracks_of(LEFT, LEFT, UP, UP)})
    video, measure = video_of(np.zeros((2, 480, 832, 3), np.uint8), 16), DIMENSIONS["camera_motion"].measure
    kinds = ("pan_right", "tilt_down", "zoom_in", "zoom_in")
    records = [measure(video, Item(Path("a.mp4"), camera=kind), networks) for kind in kinds]
    assert [r["video_results"] for r in records] == [1.0, 1.0, 0.0, 0.0]
    assert (records[0]["prompt_type"], records[0]["predict_type"]) == ("pan_right", ["pan_right", "tilt_down"])
    assert camera.by_type(records) == {"pan_right": 1.0, "tilt_down": 1.0, "zoom_in": 0.0}
    assert DIMENSIONS["camera_motion"].aggregate(records) == 0.5
    with pytest.raises(VBenchError, match=r"a\.mp4.*camera_motion"):
        measure(video, Item(Path("a.mp4")), networks)


def test_camera_prompts():
    assert camera.asked("a house, camera pans left-0.mp4") == "pan_left"
    assert camera.asked("a house, camera static") == "static"
    assert camera.asked("a house with a camera") is None
    assert len(camera.TYPES) == 7


def test_camera_grid_is_cotrackers():
    points = camera.grid(384, 512)
    assert points[0, 0].tolist() == [8, 8] and points[9, 9].tolist() == [504, 376]
    assert points[0, 1].tolist() == pytest.approx([8 + 496 / 9, 8]), "row-major: along a row, x changes"
    assert camera.grid(767, 1023)[9, 9].tolist() == pytest.approx([1008, 752]), "corners stay corners"


def test_longer_videos_weigh_more_in_consistency():
    records = [
        {"video_results": 0.5, "video_sim": 1.0, "cnt_per_video": 2},
        {"video_results": 0.9, "video_sim": 7.2, "cnt_per_video": 8},
    ]
    for name in ("subject_consistency", "background_consistency"):
        assert DIMENSIONS[name].aggregate(records) == pytest.approx(8.2 / 10)
    for name in ("i2v_subject", "i2v_background", "motion_smoothness", "aesthetic_quality"):
        assert DIMENSIONS[name].aggregate(records) == pytest.approx(0.7)
    assert DIMENSIONS["imaging_quality"].aggregate(records) == pytest.approx(0.007)
    moves = [{"video_results": moving} for moving in (True, False, True, True)]
    assert DIMENSIONS["dynamic_degree"].aggregate(moves) == 0.75


def test_aggregates_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    records = [
        {"video_results": float(v), "video_sim": float(v) * 16, "cnt_per_video": 16, "prompt_type": "static"}
        for v in rng.random(500)
    ]
    turned = [records[i] for i in rng.permutation(500)]
    for dimension in DIMENSIONS.values():
        assert dimension.aggregate(records) == dimension.aggregate(turned)


def test_the_dimensions_are_vbenchs_nine():
    assert list(DIMENSIONS) == ["camera_motion", *(naive.__name__ for naive in NAIVE)]


# Video files


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    write_video(path, clip(48, 80, 19), 8, 12, reproducible=False)
    return path


def test_a_video_streams_the_frames_of_its_file(mp4):
    video, (frames, _) = open_video(mp4), read_frames(mp4, "pyav")
    assert (video.count, video.height, video.width, video.fps) == (19, 48, 80, 8)
    chunks = list(video.chunks(8))
    assert [len(chunk) for chunk in chunks] == [8, 8, 3]
    streamed = torch.cat(chunks).permute(0, 2, 3, 1).numpy()
    assert streamed.dtype == np.uint8 and np.array_equal(streamed, frames)
    every = torch.stack(list(video.frames(every=3))).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(every, frames[::3])


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 9])
@pytest.mark.parametrize("every", [1, 3])
def test_runs_hold_every_pair_of_neighbours_once(count, every):
    frames = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    runs = [run[:, 0, 0, 0].tolist() for run in video_of(frames, 8).runs(4, every)]
    assert all(2 <= len(run) <= 5 for run in runs)
    pairs = [pair for run in runs for pair in itertools.pairwise(run)]
    assert pairs == list(itertools.pairwise(range(0, count, every)))


@pytest.mark.parametrize("name", ["motion_smoothness", "dynamic_degree"])
def test_pairs_measured_together_are_those_measured_alone(name, networks, monkeypatch):
    for count in (18, 19):
        video = video_of(clip(48, 80, count), 8)
        together = DIMENSIONS[name].measure(video, Item(Path("a.mp4")), networks)
        with monkeypatch.context() as alone:
            alone.setattr(dimensions, "SMALL", 0)
            expected = DIMENSIONS[name].measure(video, Item(Path("a.mp4")), networks)
        for key, value in expected.items():
            assert together[key] == pytest.approx(value, abs=1e-6), key


def test_missing_truncated_and_foreign_files_are_named(mp4, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.mp4.*no such video"):
        open_video(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VBenchError, match=r"text\.mp4"):
        open_video(tmp_path / "text.mp4")
    content = mp4.read_bytes()
    for share in (0.2, 0.6, 0.95):
        cut = tmp_path / "cut.mp4"
        cut.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(VBenchError, match=r"cut\.mp4.*truncated"):
            open_video(cut)


def test_a_file_cut_after_its_index_is_truncated(mp4, tmp_path):
    """The index may stand at the start of a file; then its header can be read, and promises more than there is."""
    import av

    whole = tmp_path / "whole.mp4"
    with av.open(str(mp4)) as source, av.open(str(whole), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert open_video(whole).count == 19
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.7)])
    with pytest.raises(VBenchError, match=r"cut\.mp4.*truncated"):
        list(open_video(cut).frames())


def test_one_frame_that_does_not_decode_is_missed(mp4, monkeypatch):
    monkeypatch.setattr(video, "pyav_frames", lambda path: iter(list(read_frames(path, "pyav")[0])[:-1]))
    with pytest.raises(VBenchError, match=r"only 18 of 19 frames decode"):
        list(open_video(mp4).frames())


def test_the_odd_pixel_of_a_border_goes_right_and_below():
    assert transforms.pad_to_multiple(29, 43, 8) == (2, 3, 1, 2)
    frames = torch.arange(29 * 43.0).view(1, 1, 29, 43)
    padded = transforms.pad(frames, (2, 3, 1, 2))
    assert padded.shape[-2:] == (32, 48) and padded[0, 0, 1, 2] == frames[0, 0, 0, 0]
    assert transforms.unpad(padded, (2, 3, 1, 2)).equal(frames)


def test_too_few_frames_are_an_error_not_a_number(networks, tmp_path):
    Image.fromarray(clip(48, 80, 1)[0]).save(tmp_path / "image.png")
    item, short = Item(tmp_path / "short.mp4", tmp_path / "image.png"), video_of(clip(48, 80, 1), 8)
    for name in ("i2v_subject", "i2v_background", "subject_consistency", "background_consistency", "motion_smoothness"):
        with pytest.raises(VBenchError, match=r"short\.mp4: 1 frames"):
            DIMENSIONS[name].measure(short, item, networks)
    with pytest.raises(VBenchError, match=r"short\.mp4.*input image"):
        DIMENSIONS["i2v_subject"].measure(short, Item(item.video), networks)
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        DIMENSIONS["i2v_subject"].measure(short, Item(item.video, tmp_path / "gone.png"), networks)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(VBenchError, match=r"text\.png"):
        DIMENSIONS["i2v_subject"].measure(short, Item(item.video, tmp_path / "text.png"), networks)


# Properties, with the tiny backbones


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """The tiny backbones on an encoder with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    model, processor = seeded(0, lambda: build_image_encoder(TinyEncoders(image_dim=32, image_layers=2), 64))
    model.save_pretrained(folder / "image_encoder")
    processor.save_pretrained(folder / "image_processor")
    return Tiny(folder, folder / "state")


@pytest.fixture(scope="module")
def mover() -> np.ndarray:
    """A sprite that goes more than two pixels a frame."""
    truths = (draw_truth((6, i), 17, 1.0, 0.0, 0.0) for i in range(1000))
    fast = next(
        t for t in truths if t.motion == "moves" and abs(np.diff(t.sprite.centres_T2[:2], axis=0)).sum() > 0.035
    )
    return render(fast, 64, 64)


def measured(name: str, frames: np.ndarray, networks, image: Path | None = None) -> dict:
    return DIMENSIONS[name].measure(video_of(frames, 8), Item(Path("a.mp4"), image), networks)


def test_a_still_copy_is_consistent_and_does_not_move(mover, stand_ins, tmp_path):
    Image.fromarray(mover[0]).save(tmp_path / "image.png")
    still = np.repeat(mover[:1], 17, axis=0)
    for name in ("subject_consistency", "background_consistency"):
        assert measured(name, still, stand_ins)["video_results"] == pytest.approx(1, abs=EXACT)
        assert measured(name, mover, stand_ins)["video_results"] < 1 - EXACT
    for name in ("i2v_subject", "i2v_background"):
        record = measured(name, still, stand_ins, tmp_path / "image.png")
        assert (record["consistency_mean"], record["consistency_min"]) == pytest.approx((1, 1), abs=EXACT)
        assert record["video_results"] == pytest.approx(1, abs=2e-2), "frame and image are resized in different ways"
    assert measured("motion_smoothness", still, stand_ins)["video_results"] == pytest.approx(1, abs=2 / 255)
    assert measured("dynamic_degree", still, stand_ins)["video_results"] is False
    assert measured("dynamic_degree", mover, stand_ins)["video_results"] is True


def test_shuffled_frames_are_less_smooth(mover, stand_ins):
    shuffled = mover[np.random.default_rng(0).permutation(len(mover))]
    smooth, rough = (measured("motion_smoothness", f, stand_ins)["video_results"] for f in (mover, shuffled))
    assert rough < smooth - 0.005


@pytest.mark.slow
def test_blur_lowers_imaging_quality(mover, stand_ins):
    sharp = torch.from_numpy(mover[::4]).permute(0, 3, 1, 2) / 255
    scores = []
    for strength in (0.2, 0.6, 1.0):
        soft = torch.stack([as_bytes(blur(frame, strength, None)) for frame in sharp])
        soft = (soft * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        scores.append(measured("imaging_quality", soft, stand_ins)["video_results"])
    scores.insert(0, measured("imaging_quality", mover[::4], stand_ins)["video_results"])
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1] + 30


def test_a_moving_scene_is_a_moving_camera(stand_ins):
    wide = clip(64, 192, 1)[0]
    for step, kind in ((2, "pan_right"), (-2, "pan_left"), (0, "static")):
        start = 20 if step > 0 else 60
        frames = np.stack([wide[:, start + step * t :][:, :64] for t in range(9)])
        record = DIMENSIONS["camera_motion"].measure(video_of(frames, 8), Item(Path("a.mp4"), camera=kind), stand_ins)
        assert record["video_results"] == 1.0, record


def test_tiny_names_itself_and_rates_no_beauty(mover, stand_ins):
    assert stand_ins.name == TINY == "tiny (not comparable with published scores)"
    with pytest.raises(NotComputed, match="aesthetic_quality"):
        measured("aesthetic_quality", mover, stand_ins)


@pytest.mark.parametrize(("side", "most"), [(32, 2 * 8 + 1), (144, 8 + 2)], ids=["small", "large"])
def test_decoded_frames_are_let_go(networks, side, most):
    """No more than a chunk of them is alive at any time; of small ones, eight pairs with the frames between."""
    frames, alive = [], []

    def source():
        for number in range(40):
            frame = np.full((side, side, 3), number, np.uint8)
            frames.append(weakref.ref(frame))
            alive.append(sum(one() is not None for one in frames))
            yield frame

    video = Video(8, 40, side, side, source)
    DIMENSIONS["background_consistency"].measure(video, Item(Path("a.mp4")), networks)
    DIMENSIONS["motion_smoothness"].measure(video, Item(Path("a.mp4")), networks)
    assert 1 < max(alive) <= most
