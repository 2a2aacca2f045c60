"""Still images at the size of an experiment: for `vpae sample` and for prompt suites.

An image is brought to a size by the rule that clips follow (`data.video.resize_and_crop`).
"""

from pathlib import Path

import numpy as np
from PIL import Image

from vbench_i2v.images import ImageError, read_image
from vpae.data.video import resize_and_crop

__all__ = ["ImageError", "read_image", "read_image_at"]


def read_image_at(path: Path, height: int, width: int) -> Image.Image:
    """`read_image`, scaled to cover height and width and cropped at its centre; nothing is distorted."""
    frame_HW3 = np.asarray(read_image(path))
    return Image.fromarray(resize_and_crop(frame_HW3[None], height, width)[0])
