"""The words shared by VBench-I2V's dimensions, by what runs them, and by the networks they need.

A dimension is two functions, `measure` (one video to one record) and `aggregate` (all records to the dimension's
value). The networks are handed in as a `Backbones`: the official ones (`backbones.official`), or any stand-ins
of the same interface.

Axes: N images or frames, T frames of a video, H height, W width, D feature width, 3 colours (RGB).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vbench_i2v.video import Video

OFFICIAL = "official"


@dataclass(frozen=True)
class Item:
    """One generated video of a suite.

    Attributes:
        video: the generated video's file.
        image: the input image it starts from; the two i2v dimensions need it.
        prompt: the prompt with its camera suffix, if it has one.
        camera: the camera movement asked for, one of `camera.TYPES`; only camera_motion needs it.
    """

    video: Path
    image: Path | None = None
    prompt: str = ""
    camera: str | None = None


class Backbones(Protocol):
    """The networks, each loaded at the first call of its method and kept.

    Every method raises `NotComputed` when its network cannot be had. The callables take and return tensors on `device`
    and neither train nor keep gradients.
    """

    name: str
    """`OFFICIAL`, or what tells these from the official ones."""
    device: torch.device

    def dino(self) -> Callable[[Tensor], Tensor]:
        """DINO ViT-B/16's class token: (N, 3, H, W), ImageNet-normalised -> (N, D)."""
        ...

    def clip_b32(self) -> Callable[[Tensor], Tensor]:
        """CLIP ViT-B/32's image embedding: (N, 3, 224, 224), CLIP-normalised -> (N, D), in the network's dtype."""
        ...

    def clip_l14(self) -> Callable[[Tensor], Tensor]:
        """CLIP ViT-L/14's image embedding: (N, 3, 224, 224), CLIP-normalised -> (N, D), in the network's dtype."""
        ...

    def aesthetic_head(self) -> Callable[[Tensor], Tensor]:
        """LAION's linear head: unit-length ViT-L/14 embeddings (N, D) -> ratings (N, 1), about 1 to 10."""
        ...

    def dreamsim(self) -> Callable[[Tensor], Tensor]:
        """DreamSim's embedding: (N, 3, 224, 224) in [0, 1] -> (N, D)."""
        ...

    def raft(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Optical flow in pixels (x, y) from the first frames to the second: twice (N, 3, H, W) in [0, 255], H and W
        multiples of 8 -> (N, 2, H, W)."""
        ...

    def interpolate(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The frame halfway between two: twice (N, 3, H, W) in [0, 1], H and W multiples of 16 -> (N, 3, H, W)."""
        ...

    def musiq(self) -> Callable[[Tensor], Tensor]:
        """MUSIQ-SPAQ's quality: (N, 3, H, W) in [0, 1] -> (N,), about 0 to 100."""
        ...

    def tracks(self) -> Callable[[Video], Tensor]:
        """Where the points of a 10 x 10 grid on a video's first frame are in the first and the last frame: pixels
        (x, y) of the video, (2, 10, 10, 2) as [first/last, row, column, x/y]."""
        ...


@dataclass(frozen=True)
class Dimension:
    """One of VBench-I2V's nine.

    Attributes:
        name: VBench's own.
        measure: the record of one video, JSON-able: "video_results" (a number or a bool, as VBench stores it) and
            whatever else VBench's file carries for this dimension, then "fps", "frames", "height" and "width".
            Raises `NotComputed` when a network is absent, and `VBenchError` or `FileNotFoundError`, naming the file,
            when the video or the image cannot be used.
        aggregate: the dimension's value from all records, in any order, as VBench computes it on one GPU: about 0 to 1.
    """

    name: str
    measure: Callable[[Video, Item, Backbones], dict]
    aggregate: Callable[[list[dict]], float]
