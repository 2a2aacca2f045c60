"""camera_motion: which way the frame's four edges moved, and which camera movement that is.

Axes: a grid of 10 x 10 points as [row, column, x/y], in pixels of the video.
"""

import itertools
import math

import torch
from torch import Tensor

GRID = 10
EDGE = math.ceil(GRID // 2 - 0.5)  # the one point of each side that is looked at: 5 of 0..9
THRESHOLD = 0.005  # of the shorter side

SUFFIXES = {
    "camera pans left": "pan_left",
    "camera pans right": "pan_right",
    "camera tilts up": "tilt_up",
    "camera tilts down": "tilt_down",
    "camera zooms in": "zoom_in",
    "camera zooms out": "zoom_out",
    "camera static": "static",
}
TYPES = tuple(SUFFIXES.values())

# Ways of two opposite sides -> movement: what is seen moves against the camera.
ALIKE = {
    ("left", "left"): "pan_right",
    ("right", "right"): "pan_left",
    ("down", "down"): "tilt_up",
    ("up", "up"): "tilt_down",
    ("static", "static"): "static",
}
TOP_DOWN = ALIKE | {("up", "down"): "zoom_in", ("down", "up"): "zoom_out"}
LEFT_RIGHT = ALIKE | {("left", "right"): "zoom_in", ("right", "left"): "zoom_out"}


def asked(name: str) -> str | None:
    """The movement that a prompt or a file name asks for, one of `TYPES`; None where it names no camera."""
    return next((kind for suffix, kind in SUFFIXES.items() if suffix in name), None)


def grid(height: int, width: int) -> Tensor:
    """CoTracker's points on the first frame, (10, 10, 2): evenly spaced in its 384 x 512 frame with a margin of
    512 / 64 pixels on all sides, then brought to the video's pixels."""
    rows, columns = torch.linspace(8, 384 - 8, GRID), torch.linspace(8, 512 - 8, GRID)
    y, x = torch.meshgrid(rows * (height - 1) / 383, columns * (width - 1) / 511, indexing="ij")
    return torch.stack([x, y], dim=-1)


def movements(tracks: Tensor, height: int, width: int) -> list[str]:
    """The camera movements that tracks (2, 10, 10, 2) speak for, in the order of `TYPES`; ["None"] if there is none."""
    first, last = tracks.long()  # VBench cuts off the fractions before it subtracts
    way = last - first
    limit = THRESHOLD * min(height, width)
    top, down = directions(way[0, EDGE], limit), directions(way[GRID - 1, EDGE], limit)
    left, right = directions(way[EDGE, 0], limit), directions(way[EDGE, GRID - 1], limit)
    found = _spoken_for(TOP_DOWN, top, down) | _spoken_for(LEFT_RIGHT, left, right)
    if len(found) > 1:
        found -= {"static"}  # also beside "None", which then is all that is left
    return [kind for kind in TYPES if kind in found] or ["None"]


def _spoken_for(ways: dict[tuple[str, str], str], one: list[str], other: list[str]) -> set[str]:
    """The movements that two opposite sides agree on; {"None"} if there is none."""
    return {ways[pair] for pair in itertools.product(one, other) if pair in ways} or {"None"}


def directions(way: Tensor, limit: float) -> list[str]:
    """Where one point went: one or two of left, right, up and down, or static."""
    x, y = way.tolist()
    named = {"right": x > limit, "left": x < -limit, "down": y > limit, "up": y < -limit}
    return [name for name, true in named.items() if true] or ["static"]


def by_type(records: list[dict]) -> dict[str, float]:
    """The mean score of each movement asked for; movements that no video asks for are absent."""
    asked_for = {kind: [r["video_results"] for r in records if r["prompt_type"] == kind] for kind in TYPES}
    return {kind: math.fsum(scores) / len(scores) for kind, scores in asked_for.items() if scores}
