"""The few videos that the collapse monitor kept while a student trained, decoded."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vpae.config import Samples
from vpae.models.wan import decode_latents
from vpae.report.plots import Clips
from vpae.sampling.stage import load_vae


def decoded(folders: dict[str, Path], teacher: Path, config: Samples) -> dict[str, dict[int, Clips]]:
    """Method -> step -> videos in the order of the steps, decoded by the teacher's VAE when they are looked at.

    `folders`: method -> `looks` of its stage.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = load_vae(teacher, config).to(device)

    @torch.no_grad()
    def decode(x0: Tensor) -> np.ndarray:
        return decode_latents(vae, x0[None].to(device))[0].cpu().numpy()

    return {
        name: {int(file.stem): Clips(decode, load_file(file)["x0"]) for file in sorted(folder.glob("*.safetensors"))}
        for name, folder in folders.items()
    }
