"""The memory layout of a VAE's weights: with channels last, convolutions on a GPU's tensor cores need no copies."""

import torch
from torch import nn


def channels_last(vae: nn.Module) -> nn.Module:
    """Lay the weights of all convolutions out with the channels last; values and results stay what they are."""
    formats = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
    for module in vae.modules():
        for kind, layout in formats.items():
            if isinstance(module, kind):
                module.weight.data = module.weight.data.contiguous(memory_format=layout)
    return vae
