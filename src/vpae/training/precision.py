"""What is finer than bf16 under bf16 autocast.

Around |x| = 1 bf16's spacing is 2^-7: as large as the perturbations of the discriminator's regularisation. So latents
and times enter the network in float32. The residual stream then stays float32 as well, because Wan's blocks return the
dtype they are given; only their matrix products are bf16. And where no gradient can underflow, they are float16: as
fast, with an eighth of the spacing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn

from vpae.config import Training

INPUTS = ("patch_embedding", "condition_embedder.time_embedder")


class Exact:
    """Mixed into a module's class: computes in float32, whatever autocast says."""

    def forward(self, x: torch.Tensor, *args, **kwargs):
        """As the module's own."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float(), *args, **kwargs)


class Fused:
    """Mixed into an RMSNorm's class: torch's one kernel also where input and weight have two number formats."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the module's own: computed in float32, returned in the input's number format."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def fuse_norms(network: WanTransformer3DModel) -> None:
    """Have all RMSNorms of a network compute in one kernel each, which torch does not do for mixed number formats."""
    for module in network.modules():
        if isinstance(module, nn.RMSNorm):
            _mix_in(Fused, module)


def take_exact_inputs(network: WanTransformer3DModel) -> None:
    """Let latents and times enter a network in float32; changes nothing where all is float32."""
    for name in INPUTS:
        _mix_in(Exact, network.get_submodule(name).float())


def _mix_in(mixin: type, module: nn.Module) -> None:
    """Give a module a class of its own, so that copies compute as it does too, each with its own weights."""
    if not isinstance(module, mixin):
        module.__class__ = type(f"{mixin.__name__}{type(module).__name__}", (mixin, type(module)), {})


def autocast_caches(training: Training) -> bool:
    """Whether autocast keeps the weights that it has cast within a forward pass.

    Not where a block's attention is kept and the rest is run again: the second run would find casts that the first one
    made, and selective checkpointing wants both to be alike.
    """
    return training.sharding.activation_checkpointing != "attention"


@contextmanager
def finer_autocast(device_type: str) -> Iterator[None]:
    """Make autocast's matrix products float16; nothing where there is no autocast. Not for passes that are trained."""
    if not torch.is_autocast_enabled(device_type):
        yield
        return
    with torch.autocast(device_type, torch.float16, cache_enabled=False):  # the cache has bf16
        yield
