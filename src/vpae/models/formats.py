"""In which number formats the networks of a pipeline folder compute: the one rule for all stages and commands.

Large transformers and text encoders compute in bfloat16, small ones in float32, whatever they are stored in. VAE and
image encoder compute in float32: they are small, and lose most by few digits.
"""

from pathlib import Path

import torch

from vpae.models.sizes import stored_weights

LARGE = 1_000_000_000  # parameters from which on a network is large
RESIZABLE = ("transformer", "text_encoder")  # the others keep float32 unless they are named


def formats(
    folder: Path | str, dtype: torch.dtype | None = None, vae: torch.dtype = torch.float32
) -> dict[str, torch.dtype]:
    """Network -> number format, with diffusers' `default` for whatever else a folder holds.

    Args:
        folder: the pipeline; only the headers of its files are read.
        dtype: of transformer and text encoder; None: by their size.
        vae: of the VAE.
    """
    found = {"default": torch.float32, "vae": vae, "image_encoder": torch.float32}
    return found | {name: dtype or _by_size(Path(folder) / name) for name in RESIZABLE}


def _by_size(network: Path) -> torch.dtype:
    large = sum(weight.values for weight in stored_weights(network).values()) >= LARGE
    return torch.bfloat16 if large else torch.float32
