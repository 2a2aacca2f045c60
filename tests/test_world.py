"""The procedural world: repeatable, inside its frame, and ambiguous given first frame and caption."""

import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from vpae.data.video import read_frames, write_video
from vpae.data.world import (
    COLOURS,
    DIRECTIONS,
    GROWTH,
    MARGIN,
    MOTIONS,
    RADII,
    SHAPES,
    TRAVEL,
    Sprite,
    Truth,
    draw_truth,
    render,
    sprite_alpha,
)

T = 17
GEOMETRIES = [(17, 64, 64), (5, 32, 32), (9, 48, 96), (9, 96, 48), (9, 112, 64), (1, 64, 64)]
HIDDEN, BYSTANDERS = 0.4, 0.25


def draw(
    index: int, frames: int = T, aspect: float = 1.0, hidden: float = HIDDEN, bystanders: float = BYSTANDERS
) -> Truth:
    return draw_truth((3, 0, index), frames, aspect, hidden, bystanders)


@pytest.fixture(scope="module")
def many() -> list[Truth]:
    return [draw(i) for i in range(6000)]


@pytest.fixture(scope="module")
def moving(many: list[Truth]) -> list[Truth]:
    return [t for t in many if t.motion == "moves"]


def path_length(truth: Truth) -> float:
    """Length of the path over the clip, from the fastest frame: a bounce shortens the frame it falls in."""
    steps = np.hypot(*np.diff(np.array(truth.sprite.centres_T2), axis=0).T)
    return float(steps.max() * (len(truth.sprite.radii_T) - 1))


def coverage(sprite: Sprite, height: int, width: int) -> np.ndarray:
    return np.stack([sprite_alpha(sprite, t, height, width) for t in range(len(sprite.radii_T))])


# Repeatable


def test_equal_keys_give_equal_clips_whatever_was_drawn_before() -> None:
    first = draw(7)
    np.random.seed(0)
    draw(8)
    assert draw(7) == first
    assert np.array_equal(render(draw(7), 64, 64), render(first, 64, 64))


def test_seed_split_and_index_each_give_another_clip() -> None:
    keys = [(s, p, i) for s in (0, 1) for p in (0, 1) for i in (0, 1)]
    clips = [draw_truth(key, T, 1.0, HIDDEN, BYSTANDERS).sprite.centres_T2[0] for key in keys]
    assert len({tuple(c) for c in clips}) == len(keys)


def test_a_truth_survives_json(many: list[Truth]) -> None:
    for truth in many[:200]:
        assert Truth.from_json(json.loads(json.dumps(asdict(truth)))) == truth


@pytest.mark.parametrize("fps", [8, 16.0, 12.5, 29.97])
def test_equal_frames_give_byte_equal_files_at_the_right_rate(fps: float, tmp_path: Path) -> None:
    frames = render(draw(3), 64, 64)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, fps, crf=12)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    decoded, rate = read_frames(tmp_path / "a.mp4")
    assert rate == pytest.approx(fps, rel=1e-4)
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(float) - frames).mean() < 4


# Ambiguous


def test_captions_tell_what_stands_still_and_never_how_fast(many: list[Truth]) -> None:
    """Every caption consists of size, colour, shape and motion, sometimes a direction and a bystander, and no more."""
    thing = f"a ({'|'.join(RADII)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    pattern = re.compile(f"{thing} (moves|grows|spins)( ({'|'.join(DIRECTIONS)}))?( beside {thing})?")
    assert [t.caption for t in many if not pattern.fullmatch(t.caption)] == []


def test_captions_are_true(many: list[Truth]) -> None:
    for t in many:
        s = t.sprite
        assert t.caption.startswith(f"a {s.size} {s.colour} {s.shape} {t.motion}")
        assert t.direction_told == any(re.search(rf"\b{d}\b", t.caption) for d in DIRECTIONS)
        if t.direction_told:
            assert f" {t.direction}" in t.caption
        assert (" beside " in t.caption) == (t.bystander is not None)
        assert (t.direction is None) == (t.motion != "moves")
        if t.bystander:
            assert t.bystander.colour != s.colour


def test_the_direction_is_hidden_in_the_wanted_share_of_moving_clips(moving: list[Truth]) -> None:
    assert np.mean([not t.direction_told for t in moving]) == pytest.approx(HIDDEN, abs=0.03)
    for hidden in (0.0, 1.0):
        drawn = [t for t in (draw(i, hidden=hidden) for i in range(200)) if t.motion == "moves"]
        assert {t.direction_told for t in drawn} == {hidden == 0.0}


def test_the_bystanders_share_is_near_the_wanted_one(many: list[Truth]) -> None:
    assert np.mean([t.bystander is not None for t in many]) == pytest.approx(BYSTANDERS, abs=0.04)
    assert all(draw(i, bystanders=0.0).bystander is None for i in range(100))


def test_motions_have_the_wanted_shares(many: list[Truth]) -> None:
    assert {m: Counter(t.motion for t in many)[m] / len(many) for m in MOTIONS} == pytest.approx(
        {"moves": 0.7, "grows": 0.15, "spins": 0.15}, abs=0.03
    )
    for grows, spins, only in ((1.0, 0.0, "grows"), (0.0, 1.0, "spins"), (0.0, 0.0, "moves")):
        drawn = {draw_truth((3, 0, i), 5, 1.0, HIDDEN, BYSTANDERS, grows, spins).motion for i in range(50)}
        assert drawn == {only}
    drawn = {draw_truth((3, 0, i), 5, 1.0, HIDDEN, BYSTANDERS, 0.8, 0.2).motion for i in range(50)}
    assert drawn == {"grows", "spins"}, "0.8 and 0.2 are 1, whatever floating point makes of it"


def test_speeds_span_a_factor_of_four_evenly_on_a_logarithmic_scale(moving: list[Truth]) -> None:
    assert TRAVEL[1] / TRAVEL[0] == pytest.approx(4, abs=0.1)
    lengths = np.array([path_length(t) for t in moving])
    assert lengths.min() >= TRAVEL[0] * 0.99 and lengths.max() <= TRAVEL[1] * 1.01
    low, middle, high = np.quantile(np.log(lengths), (0.05, 0.5, 0.95))
    assert np.exp(high - low) > 3.3
    assert np.exp(middle) == pytest.approx(np.sqrt(TRAVEL[0] * TRAVEL[1]), rel=0.05)


def test_one_caption_has_many_speeds(moving: list[Truth]) -> None:
    by_caption: dict[str, list[float]] = {}
    for t in moving:
        by_caption.setdefault(t.caption, []).append(path_length(t))
    common = [lengths for lengths in by_caption.values() if len(lengths) >= 20]
    assert len(common) > 20
    assert all(max(lengths) / min(lengths) > 2.5 for lengths in common)


@pytest.mark.slow
def test_one_first_frame_and_caption_have_many_futures() -> None:
    """Where sprites that begin in the same small cell, described alike, go: everywhere, at every speed."""
    same = [t for t in (draw(i, hidden=1.0, bystanders=0.0) for i in range(12000)) if t.motion == "moves"]
    centre = [t for t in same if np.abs(np.array(t.sprite.centres_T2[0]) - 0.5).max() < 0.08]
    assert len(centre) > 300
    ways = Counter(t.direction for t in centre)
    assert all(0.15 < ways[d] / len(centre) < 0.35 for d in DIRECTIONS), ways
    for direction in DIRECTIONS:
        lengths = [path_length(t) for t in centre if t.direction == direction]
        assert max(lengths) / min(lengths) > 3
    corner = [t for t in same if np.array(t.sprite.centres_T2[0]).max() < 0.35]
    ways = Counter(t.direction for t in corner)
    assert sum(count > 0.02 * len(corner) for count in ways.values()) >= 2, "even in a corner there is a choice"


def test_the_first_frame_does_not_tell_the_speed() -> None:
    """Fast sprites need room and start a little further back; the place alone must not give the speed away."""
    drawn = [t for t in (draw(i, hidden=0.0, bystanders=0.0) for i in range(8000)) if t.direction == "right"]
    starts = np.array([t.sprite.centres_T2[0][0] for t in drawn])
    speeds = np.log([path_length(t) for t in drawn])
    assert abs(np.corrcoef(starts, speeds)[0, 1]) < 0.5


def test_growth_and_turn_are_hidden_and_vary(many: list[Truth]) -> None:
    growth = [t.sprite.radii_T[-1] / t.sprite.radii_T[0] for t in many if t.motion == "grows"]
    assert min(growth) > 1.15 and max(growth) <= GROWTH[1] + 1e-9 and np.ptp(growth) > 0.5
    turns = np.rad2deg([t.sprite.angles_T[-1] for t in many if t.motion == "spins"])
    assert np.mean(turns > 0) == pytest.approx(0.5, abs=0.06)
    assert np.abs(turns).min() >= 60 and np.abs(turns).max() <= 170


def test_only_what_the_motion_says_changes(many: list[Truth]) -> None:
    for t in many:
        changes = (
            np.ptp(np.array(t.sprite.centres_T2), axis=0).max() > 1e-9,
            np.ptp(t.sprite.radii_T) > 1e-9,
            np.ptp(t.sprite.angles_T) > 1e-9,
        )
        assert changes == tuple(t.motion == m for m in ("moves", "grows", "spins"))
    assert not any("circle" in t.caption.split(" beside ")[0] for t in many if t.motion == "spins")


def test_the_first_steps_go_where_the_direction_says(moving: list[Truth]) -> None:
    for t in moving:
        path = np.array(t.sprite.centres_T2)
        step = path[T // 3] - path[0]
        way = np.array(DIRECTIONS[t.direction])
        assert step @ way > 0.9 * np.abs(step).sum()


# Inside its frame


@pytest.mark.parametrize(("frames", "height", "width"), GEOMETRIES)
def test_sprites_stay_inside_the_frame_and_clear_of_each_other(frames: int, height: int, width: int) -> None:
    """On the rendered masks: the border is never covered, no pixel belongs to both sprites in any frame."""
    seen = 0
    for i in range(120):
        truth = draw(i, frames, width / height, bystanders=1.0)
        alpha = coverage(truth.sprite, height, width)
        assert alpha.shape == (frames, height, width)
        border = np.concatenate([alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]], axis=-1)
        assert border.max() < 0.5, truth
        assert alpha.sum((1, 2)).min() > 4
        if truth.bystander:
            seen += 1
            other = coverage(truth.bystander, height, width)
            assert (other == other[0]).all(), "a bystander stands still"
            assert np.minimum(alpha, other).max() == 0, truth
    assert seen > 10


@pytest.mark.parametrize("aspect", [1.0, 832 / 480, 0.5, 3.0])
def test_sprites_keep_their_distance_from_the_border(aspect: float) -> None:
    margin = MARGIN * min(1.0, aspect)
    for i in range(400):
        truth = draw(i, 9, aspect)
        for sprite in filter(None, (truth.sprite, truth.bystander)):
            angles = np.linspace(0, 2 * np.pi, 60)
            corners = {"circle": 1.0, "square": np.sqrt(np.pi / 2), "triangle": np.sqrt(4 * np.pi / (3 * np.sqrt(3)))}
            reach = corners[sprite.shape] * np.array(sprite.radii_T)[:, None, None]
            outline = np.array(sprite.centres_T2)[:, None] + reach * np.stack([np.cos(angles), np.sin(angles)], -1)
            assert outline.min() >= margin - 1e-9
            assert (outline <= np.array([aspect, 1.0]) - margin + 1e-9).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_equal_radius_have_equal_area(shape: str) -> None:
    for angle in (0.0, 0.4, 1.1):
        sprite = Sprite(shape, "red", "large", [[0.52, 0.49]], [0.2], [angle])
        assert sprite_alpha(sprite, 0, 128, 128).sum() == pytest.approx(np.pi * (0.2 * 128) ** 2, rel=0.01)


def test_sizes_do_not_overlap_in_area(many: list[Truth]) -> None:
    first = {size: [t.sprite.radii_T[0] for t in many if t.sprite.size == size] for size in RADII}
    assert max(first["small"]) < min(first["large"])


@pytest.mark.parametrize(("frames", "height", "width"), GEOMETRIES)
def test_every_geometry_renders(frames: int, height: int, width: int) -> None:
    video = render(draw(1, frames, width / height), height, width)
    assert video.shape == (frames, height, width, 3) and video.dtype == np.uint8


def test_the_world_looks_alike_at_every_resolution() -> None:
    truth = draw(2)
    large = render(truth, 128, 128).reshape(T, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(large - render(truth, 64, 64)).mean() < 2


def test_sprites_have_their_colour_on_a_grey_background(many: list[Truth]) -> None:
    """Backgrounds stay far from every sprite's colour, so that the truth can be measured."""
    for truth in many[:60]:
        frame = render(truth, 64, 64)[0].astype(float)
        alpha = sprite_alpha(truth.sprite, 0, 64, 64)
        assert np.abs(frame[alpha == 1] - COLOURS[truth.sprite.colour]).max() <= 1
        clear = alpha == 0
        if truth.bystander:
            clear &= sprite_alpha(truth.bystander, 0, 64, 64) == 0
        assert np.ptp(frame[clear], axis=-1).max() < 45
