"""Products of bfloat16 matrices on CPUs that have no instructions for them: in float32, and rounded to bfloat16.

So do GPUs and those CPUs that have them. Without, torch takes 8 times as long as in float32, and to pass gradients on
100 times. Weights, activations and whatever else is stored keep their number format.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

COLUMNS = 256  # of the second matrix, converted at once: they stay in the cache


def _mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    whole, out = a.float(), a.new_empty(len(a), b.shape[1])
    for start in range(0, b.shape[1], COLUMNS):
        some = slice(start, start + COLUMNS)
        product = whole @ b[:, some].float()
        out[:, some] = product if bias is None else product + bias[..., some]
    return out


def _addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _mm(a, b, bias)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()).to(a.dtype)


TAKEN = {torch.ops.aten.mm.default: _mm, torch.ops.aten.addmm.default: _addmm, torch.ops.aten.bmm.default: _bmm}


class _InFloat32(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does inside comes by here again
        mine = not kwargs and func in TAKEN and all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in args)
        return TAKEN[func](*args) if mine else func(*args, **(kwargs or {}))


def quick_bfloat16() -> AbstractContextManager:
    """In it, products of bfloat16 matrices on the CPU do not take longer than those in float32."""
    return nullcontext() if torch.ops.mkldnn._is_mkldnn_bf16_supported() else _InFloat32()
