"""The few videos that the collapse monitor kept while a student trained, decoded."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from vpae.config import Samples
from vpae.models.wan import decode_latents
from vpae.sampling.stage import load_vae


@torch.no_grad()
def decoded(folders: dict[str, Path], teacher: Path, config: Samples) -> dict[str, dict[int, list[np.ndarray]]]:
    """Method -> step -> videos, uint8 (T, H, W, 3), in the order of the steps, decoded by the teacher's VAE.

    `folders`: method -> `looks` of its stage.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = load_vae(teacher, config).to(device)

    def videos(file: Path) -> list[np.ndarray]:
        return [decode_latents(vae, x0[None].to(device))[0].cpu().numpy() for x0 in load_file(file)["x0"]]

    return {
        name: {int(file.stem): videos(file) for file in sorted(folder.glob("*.safetensors"))}
        for name, folder in folders.items()
    }
