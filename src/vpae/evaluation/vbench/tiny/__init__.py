"""The embedded default's networks: the same nine dimensions at 64 x 64 pixels, not comparable with published scores.

Features come from the tiny teacher's own CLIP, motion from a classical method, quality from a small network trained on
distorted frames of the procedural world. Nothing rates beauty at that size, so aesthetic_quality is not computed. All
constants of the dimensions stay VBench's.
Axes: N frames, H height, W width, D feature width, 3 colours.
"""

import json
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vbench_i2v import transforms
from vbench_i2v.base import Backbones
from vbench_i2v.errors import NotComputed, first_line
from vbench_i2v.runner import Networks
from vbench_i2v.scores import COLUMNS
from vpae.artifacts import digest, file_hashes
from vpae.evaluation.vbench.tiny import classical, quality

TINY = "tiny (not comparable with published scores)"


def networks(teacher: Path, state: Path, dimensions: Collection[str] = tuple(COLUMNS)) -> Networks:
    """The small stand-ins for some dimensions (see `Tiny`), and what identifies them.

    Raises:
        FileNotFoundError: no image encoder there.
    """
    parts = [teacher / name for name in ("image_encoder", "image_processor")]
    for part in parts:
        if not part.is_dir():
            raise FileNotFoundError(f"{part}: no such folder; the tiny backbones need a pipeline's image encoder")
    encoder = [digest(file_hashes(part)) for part in parts]
    identity = {
        name: quality.RECIPE if name == "imaging_quality" else {"image_encoder": encoder} for name in dimensions
    }
    return Networks(Tiny(teacher, state), identity)


def load(networks: Networks, dimensions: Collection[str]) -> None:
    """Load what the tiny backbones load or train, so that processes forked afterwards share it."""
    networks.backbones.dino()
    if "imaging_quality" in dimensions:
        networks.backbones.musiq()


class Tiny(Backbones):
    """Loads or trains each stand-in when it is first asked for.

    Args:
        teacher: a pipeline folder with `image_encoder` and `image_processor`, through which they see.
        state: where the quality network is kept once it is trained.
    """

    name = TINY

    def __init__(self, teacher: Path, state: Path):
        super().__init__(torch.device("cpu"))
        self.teacher, self.state = teacher, state

    def load(self, network: str) -> Callable:
        match network:
            case "dino":
                return self._features(transforms.IMAGENET)
            case "clip_b32" | "clip_l14":
                return self._features(transforms.CLIP)
            case "dreamsim":
                encode = self._features(((0.0,) * 3, (1.0,) * 3))
                return lambda frames: _centred(encode(frames))
            case "musiq":
                return quality.quality(self.state)
            case "raft":
                return lambda first, second: classical.flow(first / 255, second / 255)
            case "interpolate":
                return classical.middle
            case "tracks":
                return classical.tracks
        raise NotComputed("aesthetic_quality has no meaning for the tiny experiment: nobody rated frames of 64 pixels")

    def _features(self, statistics: tuple[tuple, tuple]) -> Callable[[Tensor], Tensor]:
        """The encoder behind frames that were normalised with `statistics`."""
        encode = self._encoder
        return lambda frames: encode(_denormalise(frames, statistics))

    @cached_property
    def _encoder(self) -> Callable[[Tensor], Tensor]:
        return image_encoder(self.teacher, self.device)


def _centred(features_ND: Tensor) -> Tensor:
    """Less their mean over the feature axis, as DreamSim's are."""
    return features_ND - features_ND.mean(-1, keepdim=True)


def image_encoder(teacher: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The features that the tiny teacher sees of an image, the mean of CLIP's last but one hidden states over the
    tokens: (N, 3, H, W) in [0, 1] -> (N, D). Frames of any size are stretched to the encoder's.

    Raises:
        NotComputed: the folder holds no such encoder.
    """
    from transformers import CLIPVisionModel

    try:
        model = CLIPVisionModel.from_pretrained(teacher / "image_encoder", dtype=torch.float32, local_files_only=True)
        processor = json.loads((teacher / "image_processor" / "preprocessor_config.json").read_text())
    except (OSError, ValueError) as error:
        raise NotComputed(
            f"{teacher} has no CLIP image encoder ({first_line(error)}); run the stage `teacher`"
        ) from error
    model = model.eval().requires_grad_(False).to(device)
    statistics = (tuple(processor["image_mean"]), tuple(processor["image_std"]))
    side = model.config.image_size

    def encode(frames_N3HW: Tensor) -> Tensor:
        small = F.interpolate(frames_N3HW, (side, side), mode="bicubic", align_corners=False, antialias=True)
        pixels = transforms.normalise(small.clamp(0, 1), statistics)
        return model(pixels, output_hidden_states=True).hidden_states[-2].mean(1)

    return encode


def _denormalise(frames_N3HW: Tensor, statistics: tuple[tuple, tuple]) -> Tensor:
    """Undo `transforms.normalise`."""
    mean, std = (frames_N3HW.new_tensor(values)[:, None, None] for values in statistics)
    return frames_N3HW * std + mean
