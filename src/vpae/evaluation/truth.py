"""Truth metrics: what the pixels of one generated video say, held against what its clip's truth fixes.

The future of a clip is ambiguous, so only what the first frame and the caption tell is used of the `Truth`: the
sprite's shape, colour, first radius and centre, the kind of motion, the direction if told, and the background.

Everything rests on a soft *coverage*: the share of a pixel that the sprite's colour makes up. Backgrounds are nearly
grey and sprites saturated, so it is read off the colour with its brightness removed; a sprite faded to half has
coverage one half, whatever lies behind it. A sprite's mass (sum of coverage), its centroid and the moments that name
its shape are linear in coverage and do not change under an isotropic blur, which is what a VAE and H.264 add.

Axes: T frames, H height, W width, C colour; 2 is (x, y) in pixels, pixel centres at half-integers.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from vpae.data.world import COLOURS, DIRECTIONS, GROWTH, SHAPES, Truth, render_background

METRICS = ("single_sprite", "caption_following", "identity", "path_smoothness")

# Coverage. Solid lies above one half, so that neither a half-faded sprite nor either half of a 50/50 blend of two
# futures is solid, and as little above as that allows: blur shrinks the area above a higher level more.
# The ghost level is twice the coverage (0.1) by which drifting backgrounds and light temporal blur may err.
SOLID, GHOST = 0.6, 0.2
HUE_SLACK = 0.25  # tangent of the hue error (14 degrees) that costs no coverage; at 45 degrees nothing is left
# Areas, as shares of the area in the first frame.
AREA = (0.6, 1.4)  # plausible solid area: a small triangle, blurred and compressed, has 0.7, two sprites have 2
GHOST_AREA = 0.1  # largest mass outside the sprite
SEEN_AREA = 0.25  # a smaller solid component is no sprite to track
# Rims around the solid component, as shares of the height. Within the inner one (2 pixels at least) is the sprite's own
# soft edge, which is no ghost; mass and moments reach to the outer one, since cutting a soft edge off makes them noisy.
EDGE, REACH = 1 / 32, 1 / 16
# Motion. The least world travel before a bounce is 0.4 * 0.19 = 0.076 heights, the least growth in area 1.39, the least
# turn 60 degrees; the thresholds are about half of each, many times the error of a measured track.
MOVED = 0.04  # heights between centroids
GREW = 1.2  # last area / first area
TURNED = np.deg2rad(30)
ONE_AXIS = 0.5  # largest extent across / extent along the axis of motion
MISSING = 0.25  # share of frames without a sprite above which there is no track to judge
# Identity.
COLOUR_ERROR = 60.0  # in RGB; half the least distance between two colours of the world
ELONGATION = 0.25  # |second harmonic|; an ellipse with axes 1.62 : 1
_FOLD = {"square": 4, "triangle": 3}  # rotational symmetry; a circle's rotation cannot be seen
# |mean of z^n|, z = x + iy, over the square (n = 4) and the triangle (n = 3) with the area of the unit disc. The mean
# is 0 for the other shapes, and an isotropic blur leaves it as it is, because z^n is harmonic.
_HARMONIC = {4: np.pi**2 / 60, 3: (4 * np.pi / (3 * np.sqrt(3))) ** 1.5 / 10}


@dataclass(frozen=True)
class Track:
    """The sprite as found in each frame.

    Attributes:
        seen_T: bool, whether there is a solid component of the sprite's colour; where not, the other values are 0.
        centre_T2: centroid in pixels.
        area_T: mass in square pixels: the area of a sharp sprite, also where it is blurred.
        solid_T: pixels of the component, all of coverage SOLID at least.
        ghost_T: mass in square pixels of the largest other component of the colour, however faint.
        harmonics_TN: complex mean of (z / radius)^n for n = 2, 3, 4, z from the centroid, radius that of the disc of
            equal area.
        colour_TC: median RGB of the component's inner pixels.
    """

    seen_T: np.ndarray
    centre_T2: np.ndarray
    area_T: np.ndarray
    solid_T: np.ndarray
    ghost_T: np.ndarray
    harmonics_TN: np.ndarray
    colour_TC: np.ndarray


def coverage(frames_THWC: np.ndarray, truth: Truth) -> np.ndarray:
    """Share of each pixel that the sprite's colour makes up, (T, H, W) in [0, 1]; 0 for other hues."""
    height, width = frames_THWC.shape[1:3]
    background = _chroma(render_background(truth.texture, height, width))
    full = _chroma(np.array(COLOURS[truth.sprite.colour], dtype=float)) - background
    seen = _chroma(frames_THWC.astype(float)) - background
    along = (seen * full).sum(-1) / (full**2).sum(-1)
    across = np.sqrt(((seen - along[..., None] * full) ** 2).sum(-1) / (full**2).sum(-1))
    return np.clip(np.minimum(along, (along - across) / (1 - HUE_SLACK)), 0.0, 1.0)


def track(frames_THWC: np.ndarray, truth: Truth) -> Track:
    """Find the sprite in each frame of a video.

    Of the motion of the clip's truth only the first frame is used.

    Raises:
        ValueError: the frames are not uint8 of shape (T >= 3, H, W, 3).
    """
    if frames_THWC.ndim != 4 or frames_THWC.shape[3] != 3 or len(frames_THWC) < 3 or frames_THWC.dtype != np.uint8:
        raise ValueError(f"need uint8 frames (T >= 3, H, W, 3), got {frames_THWC.dtype} {frames_THWC.shape}")
    frames, height = len(frames_THWC), frames_THWC.shape[1]
    soft_THW = coverage(frames_THWC, truth)
    seen_T = np.zeros(frames, bool)
    area_T, solid_T, ghost_T = np.zeros((3, frames))
    centre_T2, harmonics_TN, colour_TC = np.zeros((frames, 2)), np.zeros((frames, 3), complex), np.zeros((frames, 3))
    last = np.array(truth.sprite.centres_T2[0]) * height
    for t, soft in enumerate(soft_THW):
        mask = _component(soft, last, SEEN_AREA * _first_area(truth, height))
        ghost_T[t] = _largest_mass(np.where(_grown(mask, EDGE), 0.0, soft))
        if not mask.any():
            continue
        seen_T[t], solid_T[t] = True, mask.sum()
        y, x = np.nonzero(_grown(mask, REACH))
        weight, z = soft[y, x], (x + 0.5) + 1j * (y + 0.5)
        area = weight.sum()
        centre = (weight * z).sum() / area
        area_T[t] = area
        centre_T2[t] = last = np.array([centre.real, centre.imag])
        unit = (z - centre) / np.sqrt(area / np.pi)
        harmonics_TN[t] = [(weight * unit**n).sum() / area for n in (2, 3, 4)]
        inner = ndimage.binary_erosion(mask)
        colour_TC[t] = np.median(frames_THWC[t][inner if inner.any() else mask], axis=0)
    return Track(seen_T, centre_T2, area_T, solid_T, ghost_T, harmonics_TN, colour_TC)


def measure(frames_THWC: np.ndarray, truth: Truth) -> dict[str, float]:
    """Measure one generated video (see `track`) against the truth of the clip that it was made from.

    Returns:
        METRICS, each in [0, 1], more is better. `single_sprite`: share of frames with one whole sprite of the right
        colour and no ghost. `caption_following`: 1 if the motion is what the caption says, else 0. `identity`: share
        of frames after the first with the right shape and colour. `path_smoothness`: 1 / (1 + median length of the
        centroid's second difference, in pixels of a 64-pixel-high frame). The two about motion are 0 where the sprite
        is missing in more than a quarter of the frames.
    """
    found, height = track(frames_THWC, truth), frames_THWC.shape[1]
    first = _first_area(truth, height)
    largest = AREA[1] * (GROWTH[1] ** 2 if truth.motion == "grows" else 1.0)
    whole_T = found.seen_T & (found.solid_T >= AREA[0] * first) & (found.solid_T <= largest * first)
    tracked = np.mean(~found.seen_T) <= MISSING
    return {
        "single_sprite": float(np.mean(whole_T & (found.ghost_T <= GHOST_AREA * first))),
        "caption_following": float(tracked and _follows(found, truth, height)),
        "identity": float(np.mean(_same(found, truth)[1:])),
        "path_smoothness": _smoothness(found, height) if tracked else 0.0,
    }


def _chroma(colour: np.ndarray) -> np.ndarray:
    return colour - colour.mean(-1, keepdims=True)


def _first_area(truth: Truth, height: int) -> float:
    return np.pi * (truth.sprite.radii_T[0] * height) ** 2


def _grown(mask: np.ndarray, rim: float) -> np.ndarray:
    return ndimage.binary_dilation(mask, iterations=max(2, round(rim * len(mask))))


def _component(soft: np.ndarray, last: np.ndarray, least: float) -> np.ndarray:
    """Mask of the solid component to follow: of those nearly as large as the largest, the one nearest to `last`."""
    labels, count = ndimage.label(soft >= SOLID)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    if count == 0 or sizes.max() < least:
        return np.zeros(soft.shape, bool)
    candidates = 1 + np.flatnonzero(sizes >= sizes.max() / 2)
    centres_yx = np.array(ndimage.center_of_mass(labels > 0, labels, candidates)) + 0.5
    return labels == candidates[np.argmin(np.hypot(*(centres_yx[:, ::-1] - last).T))]


def _largest_mass(soft: np.ndarray) -> float:
    labels, _ = ndimage.label(soft >= GHOST)
    return np.bincount(labels.ravel(), weights=np.where(labels > 0, soft, 0.0).ravel()).max()


def _same(found: Track, truth: Truth) -> np.ndarray:
    """Whether shape and colour are the truth's, (T,) bool."""
    palette = np.array(list(COLOURS.values()), dtype=float)
    distance = np.linalg.norm(found.colour_TC[:, None] - palette, axis=-1)
    right = list(COLOURS).index(truth.sprite.colour)
    same_colour = (distance.argmin(-1) == right) & (distance[:, right] < COLOUR_ERROR)
    # A triangle has |third harmonic| 1 and fourth 0 in these units, a square the reverse, a circle neither.
    second, third, fourth = np.abs(found.harmonics_TN).T
    measured = np.stack([third / _HARMONIC[3], fourth / _HARMONIC[4]], -1)
    ideal = np.array([[_FOLD.get(shape) == n for n in (3, 4)] for shape in SHAPES], dtype=float)
    nearest = np.linalg.norm(measured[:, None] - ideal, axis=-1).argmin(-1)
    same_shape = (nearest == SHAPES.index(truth.sprite.shape)) & (second < ELONGATION)
    return found.seen_T & same_colour & same_shape


def _follows(found: Track, truth: Truth, height: int) -> bool:
    seen = np.flatnonzero(found.seen_T)
    way = (found.centre_T2[seen] - found.centre_T2[seen[0]]) / height
    gone = np.hypot(*way.T) >= MOVED
    if truth.motion == "moves":
        if truth.direction_told and gone.any():
            # The first frames that are surely away from the start lie before the first bounce.
            ahead = np.array(DIRECTIONS[truth.direction])
            start = way[np.argmax(gone)]
            return start @ ahead > np.linalg.norm(start - (start @ ahead) * ahead)
        extent = np.sort(np.ptp(way, axis=0))
        return gone.any() and extent[0] <= ONE_AXIS * extent[1]
    first, last = _trend(seen, found.area_T[seen])
    growth = last / max(first, 1e-9)
    if truth.motion == "grows":
        return not gone.any() and growth >= GREW
    if truth.sprite.shape not in _FOLD:
        return False
    fold = _FOLD[truth.sprite.shape]
    angle = np.unwrap(np.angle(found.harmonics_TN[seen, fold - 2])) / fold
    first, last = _trend(seen, angle)
    return not gone.any() and 1 / GREW < growth < GREW and abs(last - first) >= TURNED


def _trend(time: np.ndarray, value: np.ndarray) -> tuple[float, float]:
    """First and last value of the straight line through a track, so that no single frame decides."""
    slope, offset = np.polyfit(time, value, 1)
    return slope * time[0] + offset, slope * time[-1] + offset


def _smoothness(found: Track, height: int) -> float:
    whole = found.seen_T[2:] & found.seen_T[1:-1] & found.seen_T[:-2]
    if not whole.any():
        return 0.0
    bend = np.hypot(*np.diff(found.centre_T2, 2, axis=0).T)[whole] * 64 / height
    return float(1 / (1 + np.median(bend)))
