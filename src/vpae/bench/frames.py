"""Frames like a camera's, for what depends on the content of a video: how long an mp4 takes, and how large it is."""

import numpy as np

from vpae.config import Experiment
from vpae.data.world import draw_truth, render

GRAIN = 1.3  # standard deviation of the noise, of 255: files are then about as large as of camera clips


def realistic(settings: Experiment) -> np.ndarray:
    """uint8 frames (T, H, W, 3) of the procedural world, with a sensor's grain on them."""
    g = settings.geometry
    rng = np.random.default_rng(settings.seed)
    clean = render(draw_truth((settings.seed, 0), g.frames, g.width / g.height, 0.0, 0.0), g.height, g.width)
    grain = rng.normal(0, GRAIN, (4, *clean.shape[1:]))  # four of them in turn: drawing one for each takes longer
    return np.stack([np.clip(frame + grain[i % 4], 0, 255) for i, frame in enumerate(clean)]).astype(np.uint8)
