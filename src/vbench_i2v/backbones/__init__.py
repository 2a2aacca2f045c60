"""The networks behind the dimensions that the published scores were made with."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from vbench_i2v.backbones import plugins, raft
from vbench_i2v.backbones.checkpoints import fill
from vbench_i2v.backbones.dino import DinoViT
from vbench_i2v.base import OFFICIAL, Backbones

DINO = "dino_vitbase16_pretrain.pth"
CLIP_B32 = "ViT-B-32.pt"
CLIP_L14 = "ViT-L-14.pt"
AESTHETIC = "sa_0_4_vit_l_14_linear.pth"
RAFT_THINGS = "raft-things.pth"
AMT_S = "amt-s.pth"
MUSIQ_SPAQ = "musiq_spaq_ckpt-358bb6af.pth"
COTRACKER2 = "cotracker2.pth"
DREAMSIM = "dreamsim"  # a folder that the package of that name fills


class Official(Backbones):
    """Loads each network from its original file.

    Args:
        weights: the folder of all weight files, under the names above.
        device: where the networks run.
        clip_dtype: of both CLIP towers; the published scores had float16, and float32 is more exact.
    """

    name = OFFICIAL

    def __init__(
        self,
        weights: Path,
        device: str | torch.device = "cpu",
        clip_dtype: Literal["float32", "float16"] = "float32",
    ):
        super().__init__(torch.device(device))
        self.weights, self.clip_dtype = weights, getattr(torch, clip_dtype)

    def load(self, network: str) -> Callable:
        file, build = {
            "dino": (DINO, lambda path, device: fill(DinoViT(), path, device)),
            "clip_b32": (CLIP_B32, self._clip),
            "clip_l14": (CLIP_L14, self._clip),
            "aesthetic_head": (AESTHETIC, lambda path, device: fill(nn.Linear(768, 1), path, device)),
            "raft": (RAFT_THINGS, lambda path, device: fill(raft.RAFT(), path, device, raft.renamed)),
            "dreamsim": (DREAMSIM, plugins.dreamsim),
            "interpolate": (AMT_S, plugins.amt_s),
            "musiq": (MUSIQ_SPAQ, plugins.musiq),
            "tracks": (COTRACKER2, plugins.cotracker2),
        }[network]
        return build(self.weights / file, self.device)

    def _clip(self, path: Path, device: torch.device) -> Callable:
        from vbench_i2v.backbones import clip  # transformers is slow to import

        model = clip.load(path, self.clip_dtype).to(device)
        return lambda frames: model(frames.to(self.clip_dtype)).image_embeds
