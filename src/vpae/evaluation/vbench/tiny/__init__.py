"""The embedded default's networks: the same nine dimensions at 64 x 64 pixels, not comparable with published scores.

Features come from the tiny teacher's own CLIP, motion from a classical method, quality from a small network trained on
distorted frames of the procedural world. Nothing rates beauty at that size, so aesthetic_quality is not computed. All
constants of the dimensions stay VBench's.
Axes: N frames, H height, W width, D feature width, 3 colours.
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vbench_i2v import transforms
from vbench_i2v.base import Backbones
from vbench_i2v.errors import NotComputed
from vbench_i2v.runner import Networks
from vbench_i2v.scores import COLUMNS
from vbench_i2v.video import Video
from vpae.artifacts import digest, file_hashes
from vpae.evaluation.vbench.tiny import classical, quality

TINY = "tiny (not comparable with published scores)"


def networks(teacher: Path, state: Path, dimensions: Collection[str] = tuple(COLUMNS)) -> Networks:
    """The small stand-ins, which see through the image encoder of a pipeline folder, and what identifies them.

    Args:
        teacher: the pipeline folder.
        state: folder for what they keep between runs.
        dimensions: which are wanted.

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
    return Networks(tiny(teacher, state), identity)


def load(networks: Networks, dimensions: Collection[str]) -> None:
    """Load what the tiny backbones load or train, so that processes forked afterwards share it."""
    networks.backbones.dino()
    if "imaging_quality" in dimensions:
        networks.backbones.musiq()


def tiny(teacher: Path, state: Path, device: str | torch.device = "cpu") -> Backbones:
    """The stand-ins.

    Args:
        teacher: a pipeline folder with `image_encoder` and `image_processor`.
        state: where the quality network is kept once it is trained.
        device: where the networks run.
    """
    return Tiny(teacher, state, torch.device(device))


class Tiny:
    """Loads or trains each stand-in when it is first asked for."""

    name = TINY

    def __init__(self, teacher: Path, state: Path, device: torch.device):
        self.teacher, self.state, self.device = teacher, state, device
        self._loaded: dict[str, Callable] = {}

    def dino(self) -> Callable[[Tensor], Tensor]:
        """The tiny CLIP's features, of ImageNet-normalised frames."""
        return self._features(transforms.IMAGENET)

    def clip_b32(self) -> Callable[[Tensor], Tensor]:
        """The tiny CLIP's features, of CLIP-normalised frames."""
        return self._features(transforms.CLIP)

    def clip_l14(self) -> Callable[[Tensor], Tensor]:
        """The same as `clip_b32`."""
        return self.clip_b32()

    def dreamsim(self) -> Callable[[Tensor], Tensor]:
        """The tiny CLIP's features less their mean over the feature axis, as DreamSim's are, of frames in [0, 1]."""
        encode = self._features(((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))

        def embed(frames_N3HW: Tensor) -> Tensor:
            features_ND = encode(frames_N3HW)
            return features_ND - features_ND.mean(-1, keepdim=True)

        return embed

    def aesthetic_head(self) -> Callable[[Tensor], Tensor]:
        """There is none."""
        raise NotComputed("aesthetic_quality has no meaning for the tiny experiment: nobody rated frames of 64 pixels")

    def raft(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Lucas and Kanade's flow."""
        return lambda first, second: classical.flow(first / 255, second / 255)

    def interpolate(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Halfway along Lucas and Kanade's flow."""
        return classical.middle

    def musiq(self) -> Callable[[Tensor], Tensor]:
        """The quality network."""
        return self._once("quality", lambda: quality.quality(self.state).to(self.device))

    def tracks(self) -> Callable[[Video], Tensor]:
        """Points carried along Lucas and Kanade's flow."""
        return classical.tracks

    def _features(self, statistics: tuple[tuple, tuple]) -> Callable[[Tensor], Tensor]:
        """The encoder behind frames that were normalised with `statistics`."""
        encode = self._once("image_encoder", lambda: image_encoder(self.teacher, self.device))
        return lambda frames: encode(_denormalise(frames, statistics))

    def _once(self, name: str, build: Callable[[], Callable]) -> Callable:
        if name not in self._loaded:
            self._loaded[name] = build()
        return self._loaded[name]


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
        first = str(error).strip().splitlines()[0]
        raise NotComputed(f"{teacher} has no CLIP image encoder ({first}); run the stage `teacher`") from error
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
