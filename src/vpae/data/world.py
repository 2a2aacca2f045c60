"""The procedural world: sprites on textured backgrounds whose truth is known exactly.

A clip is drawn from `(seed, split, index)` alone. Its first frame and caption never determine what follows: speed,
growth and rotation are always hidden, the direction of motion in a settable share of the captions. Without that
ambiguity the mean of all futures would be a sharp video, and there would be nothing to distil.

Lengths are fractions of the frame's height, or of what fits where it is narrower than high; motion is given over the
whole clip, so that a world looks alike at every geometry. Axes: T frames, H height, W width, C colour.
"""

from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (224, 40, 40),
    "green": (32, 176, 64),
    "blue": (48, 80, 232),
    "yellow": (236, 208, 32),
    "magenta": (216, 48, 200),
    "cyan": (40, 204, 220),
}
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
MOTIONS = ("moves", "grows", "spins")
TEXTURES = ("gradient", "stripes", "checks", "waves")

# A sprite's radius is that of the disc of equal area, so that one number compares all shapes.
RADII = {"small": (0.105, 0.135), "large": (0.165, 0.205)}
TRAVEL = (0.19, 0.75)  # path length over the clip: speeds within a factor of four
GROWTH = (1.3, 1.8)  # last radius / first radius
TURN_DEGREES = (60.0, 170.0)  # rotation over the clip
UNTIL_BOUNCE = 0.4  # share of the path before the first bounce, at least
MARGIN = 0.02  # a sprite keeps this far from the border
_HALF_SIDE = np.sqrt(np.pi) / 2  # of a square with the area of the unit disc
_CIRCUMRADIUS = np.sqrt(4 * np.pi / (3 * np.sqrt(3)))  # of an equilateral triangle with the area of the unit disc
# Largest distance from the centre to the border, in radii.
_REACH = {"circle": 1.0, "square": _HALF_SIDE * np.sqrt(2), "triangle": _CIRCUMRADIUS}


@dataclass(frozen=True)
class Sprite:
    """What one sprite is and where it is in each frame (fractions of the frame height; angles in radians)."""

    shape: str
    colour: str
    size: str
    centres_T2: list[list[float]]
    radii_T: list[float]
    angles_T: list[float]


@dataclass(frozen=True)
class Truth:
    """Everything that is true of one clip, and what its caption tells of it."""

    caption: str
    motion: str
    direction: str | None
    direction_told: bool
    sprite: Sprite
    bystander: Sprite | None
    texture: dict

    @staticmethod
    def from_json(record: dict) -> "Truth":
        """Rebuild a truth from what `asdict` made of it."""
        bystander = Sprite(**record["bystander"]) if record["bystander"] else None
        return Truth(**{**record, "sprite": Sprite(**record["sprite"]), "bystander": bystander})


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the border of a shape whose area is that of the unit disc (negative inside)."""
    if shape == "circle":
        return np.hypot(x, y) - 1.0
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - _HALF_SIDE
    if shape == "triangle":
        inradius = _CIRCUMRADIUS / 2
        edges = [np.cos(a) * x + np.sin(a) * y - inradius for a in np.pi / 2 + np.arange(3) * 2 * np.pi / 3]
        return np.maximum.reduce(edges)
    raise ValueError(f"unknown shape {shape!r}; the world has {', '.join(SHAPES)}")


def sprite_alpha(sprite: Sprite, frame: int, height: int, width: int) -> np.ndarray:
    """Coverage of each pixel by the sprite in one frame, (H, W) in [0, 1], with a one-pixel soft edge."""
    cx, cy = sprite.centres_T2[frame]
    radius, angle = sprite.radii_T[frame], sprite.angles_T[frame]
    y, x = np.mgrid[0:height, 0:width]
    dx, dy = (x + 0.5) / height - cx, (y + 0.5) / height - cy
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / radius
    v = (-np.sin(angle) * dx + np.cos(angle) * dy) / radius
    return np.clip(0.5 - shape_distance(sprite.shape, u, v) * radius * height, 0.0, 1.0)


def render_background(texture: dict, height: int, width: int) -> np.ndarray:
    """Draw a still background, (H, W, 3) float in [0, 255]."""
    y, x = (np.mgrid[0:height, 0:width] + 0.5) / height
    along = np.cos(texture["angle"]) * x + np.sin(texture["angle"]) * y
    across = -np.sin(texture["angle"]) * x + np.cos(texture["angle"]) * y
    phase = 2 * np.pi * along / texture["period"] + texture["phase"]
    if texture["kind"] == "gradient":
        mix = (along - along.min()) / (np.ptp(along) + 1e-9)
    elif texture["kind"] == "stripes":
        mix = 0.5 + 0.5 * np.clip(2.5 * np.sin(phase), -1, 1)
    elif texture["kind"] == "checks":
        other = 2 * np.pi * across / texture["period"]
        mix = 0.5 + 0.5 * np.clip(2.5 * np.sin(phase) * np.sin(other), -1, 1)
    else:
        mix = 0.5 + 0.5 * np.sin(phase + 1.5 * np.sin(2 * np.pi * across / (2 * texture["period"])))
    dark, light = np.array(texture["dark"]), np.array(texture["light"])
    return dark + mix[..., None] * (light - dark)


def render(truth: Truth, height: int, width: int) -> np.ndarray:
    """Render a clip, uint8 frames (T, H, W, 3)."""
    background = render_background(truth.texture, height, width)
    frames = []
    for t in range(len(truth.sprite.radii_T)):
        frame = background
        for sprite in filter(None, (truth.bystander, truth.sprite)):
            alpha = sprite_alpha(sprite, t, height, width)[..., None]
            frame = (1 - alpha) * frame + alpha * np.array(COLOURS[sprite.colour])
        frames.append(np.rint(frame).astype(np.uint8))
    return np.stack(frames)


def draw_truth(
    key: tuple[int, ...],
    frames: int,
    aspect: float,
    hidden_direction: float,
    bystander_share: float,
    grows_share: float = 0.15,
    spins_share: float = 0.15,
) -> Truth:
    """Draw one clip's truth.

    Args:
        key: integers that name the clip, for instance (seed, split, index); equal keys give equal clips.
        frames: number of frames T.
        aspect: width / height.
        hidden_direction, bystander_share, grows_share, spins_share: in [0, 1], see `config.clips.World`.
    """
    rng = np.random.default_rng(key)
    motion = str(rng.choice(MOTIONS, p=(max(0.0, 1 - grows_share - spins_share), grows_share, spins_share)))
    shape = str(rng.choice(SHAPES[1:] if motion == "spins" else SHAPES))
    colour, other = (str(c) for c in rng.permutation(list(COLOURS))[:2])
    size = str(rng.choice(list(RADII)))
    told = bool(rng.random() >= hidden_direction)
    direction = str(rng.choice(list(DIRECTIONS))) if motion == "moves" else None
    sprite = _draw_sprite(rng, shape, colour, size, motion, direction, frames, aspect)
    bystander = _draw_bystander(rng, other, sprite, frames, aspect) if rng.random() < bystander_share else None
    caption = f"a {size} {colour} {shape} {motion}"
    if direction and told:
        caption += f" {direction}"
    if bystander:
        caption += f" beside a {bystander.size} {bystander.colour} {bystander.shape}"
    return Truth(caption, motion, direction, told and direction is not None, sprite, bystander, _draw_texture(rng))


def _draw_sprite(rng, shape, colour, size, motion, direction, frames, aspect) -> Sprite:
    unit = min(1.0, aspect)
    radius = rng.uniform(*RADII[size]) * unit
    growth = rng.uniform(*GROWTH) if motion == "grows" else 1.0
    if growth > 1.0 and size == "large":
        growth = 1.0 + (growth - 1.0) * 0.6  # a large sprite must still fit the frame
    radii = radius * np.linspace(1.0, growth, frames)
    reach = _REACH[shape] * radii[-1] + MARGIN * unit
    low, high = np.array([reach, reach]), np.array([aspect - reach, 1.0 - reach])
    centres = np.repeat(rng.uniform(low, np.maximum(high, low))[None], frames, axis=0)
    if direction:
        travel = unit * np.exp(rng.uniform(*np.log(TRAVEL))) * np.array(DIRECTIONS[direction])
        # Room for the first steps, so that the direction can be seen before the first bounce.
        room = UNTIL_BOUNCE * travel
        centres = np.clip(centres, np.maximum(low, low - room), np.minimum(high, high - room))
        centres = low + _bounce(centres - low + travel * np.linspace(0, 1, frames)[:, None], high - low)
    # Moving and growing sprites stand upright, so that only "spins" turns.
    turn = rng.choice((-1, 1)) * np.deg2rad(rng.uniform(*TURN_DEGREES)) if motion == "spins" else 0.0
    angles = np.linspace(0.0, turn, frames)
    return Sprite(shape, colour, size, centres.tolist(), radii.tolist(), angles.tolist())


def _draw_bystander(rng, colour, sprite: Sprite, frames: int, aspect: float) -> Sprite | None:
    """Place a still sprite where the moving one never goes; None when there is no such place."""
    shape = str(rng.choice(SHAPES))
    radius = rng.uniform(*RADII["small"]) * min(1.0, aspect)
    reach = _REACH[shape] * radius + MARGIN
    path = np.array(sprite.centres_T2)
    for _ in range(50):
        centre = rng.uniform([reach, reach], [aspect - reach, 1 - reach])
        gap = np.hypot(*(path - centre).T) - _REACH[sprite.shape] * np.array(sprite.radii_T)
        if gap.min() > reach:
            return Sprite(shape, colour, "small", [centre.tolist()] * frames, [radius] * frames, [0.0] * frames)
    return None


def _draw_texture(rng) -> dict:
    dark, light = rng.uniform(60, 100), rng.uniform(130, 190)
    return {
        "kind": str(rng.choice(TEXTURES)),
        "angle": float(rng.uniform(0, np.pi)),
        "period": float(rng.uniform(0.35, 0.8)),
        "phase": float(rng.uniform(0, 2 * np.pi)),
        "dark": (dark + rng.uniform(-10, 10, 3)).tolist(),
        "light": (light + rng.uniform(-10, 10, 3)).tolist(),
    }


def _bounce(position: np.ndarray, span: np.ndarray) -> np.ndarray:
    """Reflect an unbounded path into [0, span] (a triangle wave), axis by axis."""
    span = np.maximum(span, 1e-6)
    folded = np.mod(position, 2 * span)
    return np.where(folded > span, 2 * span - folded, folded)
