"""The words shared by VBench-I2V's dimensions, by what runs them, and by the networks they need.

A dimension is two functions, `measure` (one video to one record) and `aggregate` (all records to the dimension's
value). The networks are handed in as a `Backbones`: `backbones.Official`, or any stand-ins.

Axes: N images or frames, T frames of a video, H height, W width, D feature width, 3 colours (RGB).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
        camera: the camera movement asked for, one of `camera.TYPES`; only camera_motion needs it.
    """

    video: Path
    image: Path | None = None
    camera: str | None = None


class Backbones(ABC):
    """The networks, each loaded at the first call of its method and kept.

    Every method raises `NotComputed` when its network cannot be had. The callables take and return tensors on `device`
    and neither train nor keep gradients.
    """

    name: str
    """`OFFICIAL`, or what tells these from the official ones."""

    def __init__(self, device: torch.device):
        self.device = device
        self._loaded: dict[str, Callable] = {}

    @abstractmethod
    def load(self, network: str) -> Callable:
        """The network behind the method of this name."""

    def _once(self, network: str) -> Callable:
        if network not in self._loaded:
            self._loaded[network] = self.load(network)
        return self._loaded[network]

    def dino(self) -> Callable[[Tensor], Tensor]:
        """DINO ViT-B/16's class token: (N, 3, H, W), ImageNet-normalised -> (N, D)."""
        return self._once("dino")

    def clip_b32(self) -> Callable[[Tensor], Tensor]:
        """CLIP ViT-B/32's image embedding: (N, 3, 224, 224), CLIP-normalised -> (N, D), in the network's dtype."""
        return self._once("clip_b32")

    def clip_l14(self) -> Callable[[Tensor], Tensor]:
        """CLIP ViT-L/14's image embedding: (N, 3, 224, 224), CLIP-normalised -> (N, D), in the network's dtype."""
        return self._once("clip_l14")

    def aesthetic_head(self) -> Callable[[Tensor], Tensor]:
        """LAION's linear head: unit-length ViT-L/14 embeddings (N, D) -> ratings (N, 1), about 1 to 10."""
        return self._once("aesthetic_head")

    def dreamsim(self) -> Callable[[Tensor], Tensor]:
        """DreamSim's embedding: (N, 3, 224, 224) in [0, 1] -> (N, D)."""
        return self._once("dreamsim")

    def raft(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Optical flow in pixels (x, y) from the first frames to the second: twice (N, 3, H, W) in [0, 255], H and W
        multiples of 8 -> (N, 2, H, W)."""
        return self._once("raft")

    def interpolate(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The frame halfway between two: twice (N, 3, H, W) in [0, 1], H and W multiples of 16 -> (N, 3, H, W)."""
        return self._once("interpolate")

    def musiq(self) -> Callable[[Tensor], Tensor]:
        """MUSIQ-SPAQ's quality: (N, 3, H, W) in [0, 1] -> (N,), about 0 to 100."""
        return self._once("musiq")

    def tracks(self) -> Callable[[Video], Tensor]:
        """Where the points of a 10 x 10 grid on a video's first frame are in the first and the last frame: pixels
        (x, y) of the video, (2, 10, 10, 2) as [first/last, row, column, x/y]."""
        return self._once("tracks")


@dataclass(frozen=True)
class Dimension:
    """How one of VBench-I2V's nine is computed.

    Attributes:
        measure: the record of one video, JSON-able: "video_results" (a number or a bool, as VBench stores it) and
            whatever else VBench's file carries for this dimension, then "fps", "frames", "height" and "width".
            Raises `NotComputed` when a network is absent, and `VBenchError` or `FileNotFoundError`, naming the file,
            when the video or the image cannot be used.
        aggregate: the dimension's value from all records, in any order, as VBench computes it on one GPU: about 0 to 1.
    """

    measure: Callable[[Video, Item, Backbones], dict]
    aggregate: Callable[[list[dict]], float]
