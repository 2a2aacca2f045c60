"""The resizing, cropping and scaling in front of each network, with the antialiasing that VBench's numbers had.

Frames are tensors, which torchvision before 0.17 resized without antialiasing, whatever the mode; that is what the
published scores had. The input image is a PIL image, which is always antialiased. `F.interpolate` equals torchvision's
`Resize` on floating-point tensors. Nothing is clamped after bicubic resizing.

Axes: N frames, H height, W width, 3 colours (RGB).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
MUSIQ_LONGER_SIDE = 512

Frames = Callable[[Tensor], Tensor]
"""uint8 (N, 3, H, W) -> float32 (N, 3, H', W'), what a network takes."""


def subject_frames(frames_N3HW: Tensor) -> Tensor:
    """i2v_subject: shorter side 256 bicubic, centre 224 x 224, ImageNet statistics."""
    size = shorter_side(*frames_N3HW.shape[-2:], 256)
    return normalise(centre(resize(frames_N3HW, size, "bicubic"), 224) / 255, IMAGENET)


def subject_image(image: Image.Image) -> Tensor:
    """i2v_subject's input image, (1, 3, 224, 224)."""
    height, width = shorter_side(image.height, image.width, 256)
    return normalise(centre(_tensor(image.resize((width, height), Image.Resampling.BICUBIC)), 224), IMAGENET)


def background_frames(frames_N3HW: Tensor) -> Tensor:
    """i2v_background: 224 x 224 bicubic whatever the aspect ratio; DreamSim normalises by itself."""
    return resize(frames_N3HW, (224, 224), "bicubic") / 255


def background_image(image: Image.Image) -> Tensor:
    """i2v_background's input image, (1, 3, 224, 224)."""
    return _tensor(image.resize((224, 224), Image.Resampling.BICUBIC))


def dino_frames(frames_N3HW: Tensor) -> Tensor:
    """subject_consistency: shorter side 224 bilinear, no crop, ImageNet statistics."""
    size = shorter_side(*frames_N3HW.shape[-2:], 224)
    return normalise(resize(frames_N3HW, size, "bilinear") / 255, IMAGENET)


def clip_frames(frames_N3HW: Tensor) -> Tensor:
    """background_consistency and aesthetic_quality: shorter side 224 bicubic, centre 224 x 224, CLIP's statistics."""
    size = shorter_side(*frames_N3HW.shape[-2:], 224)
    return normalise(centre(resize(frames_N3HW, size, "bicubic"), 224) / 255, CLIP)


def musiq_frames(frames_N3HW: Tensor) -> Tensor:
    """imaging_quality, mode "longer": longer side at most 512, bilinear; both sides rounded down."""
    height, width = frames_N3HW.shape[-2:]
    if max(height, width) <= MUSIQ_LONGER_SIDE:
        return frames_N3HW.float() / 255
    scale = MUSIQ_LONGER_SIDE / max(height, width)
    return resize(frames_N3HW, (int(scale * height), int(scale * width)), "bilinear") / 255


def resize(frames_N3HW: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """To (height, width) without antialiasing, as float32."""
    return F.interpolate(frames_N3HW.float(), size, mode=mode, align_corners=False, antialias=False)


def shorter_side(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) with the shorter side `size` and the longer one rounded down."""
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


def centre(frames_N3HW: Tensor, size: int) -> Tensor:
    """The middle square; half pixels are rounded to even, as torchvision does."""
    top, left = (round((side - size) / 2) for side in frames_N3HW.shape[-2:])
    return frames_N3HW[..., top : top + size, left : left + size]


def normalise(frames_N3HW: Tensor, statistics: tuple[tuple, tuple]) -> Tensor:
    """(x - mean) / std by colour."""
    mean, std = (frames_N3HW.new_tensor(values)[:, None, None] for values in statistics)
    return (frames_N3HW - mean) / std


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def pad_to_multiple(height: int, width: int, unit: int) -> tuple[int, int, int, int]:
    """Pixels (left, right, top, bottom) to add for sides that `unit` divides; the odd one goes right and below."""
    wide, high = -width % unit, -height % unit
    return wide // 2, wide - wide // 2, high // 2, high - high // 2


def pad(frames_N3HW: Tensor, border: tuple[int, int, int, int]) -> Tensor:
    """Repeat the border pixels."""
    return F.pad(frames_N3HW, border, mode="replicate")


def unpad(frames_N3HW: Tensor, border: tuple[int, int, int, int]) -> Tensor:
    """Undo `pad`."""
    left, right, top, bottom = border
    height, width = frames_N3HW.shape[-2:]
    return frames_N3HW[..., top : height - bottom, left : width - right]
