"""Exponential moving average of weights."""

import copy

import torch
from torch import nn

from vpae.models.adapters import Adapted


def make_ema(module: nn.Module) -> nn.Module:
    """A frozen copy that will follow `module`; of an adapted network only the adapter is copied."""
    if isinstance(module, Adapted):
        return module.follower().eval()
    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(ema: nn.Module, module: nn.Module, decay: float) -> None:
    """theta- <- decay theta- + (1 - decay) theta, on each process's own shard, without communication."""
    torch._foreach_lerp_(_local(ema), _local(module), 1.0 - decay)


def _local(module: nn.Module) -> list[torch.Tensor]:
    return [p.to_local() if hasattr(p, "to_local") else p.detach() for p in module.parameters()]
