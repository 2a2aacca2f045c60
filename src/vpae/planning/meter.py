"""Counts what work does while it runs: bytes alive, operations of matrix products, bytes received from other processes.

It sees every operation that torch dispatches, of real tensors and of fake ones, which have shapes but no memory.
A multiply-add counts as two operations; norms, activations and softmax are not counted, as is usual for "model FLOPs".
"""

from collections import Counter

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop

from vpae.bench.live_bytes import LiveBytes

aten = torch.ops.aten


def _attention_backward(gradient, query, key, value, *rest, **options) -> int:
    """Four products for the two of the forward pass: what fused kernels compute again is not the model's."""
    return 2 * sdpa_flop(query, key, value, *rest, **options)


# torch's own formulas; they lack the CPU's fused attention, and count the scores that its backward pass recomputes.
OPERATIONS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Meter(LiveBytes):
    """Counts what runs while it is on.

    Attributes:
        counts: `model` operations; those that activation checkpointing made `recomputed`; bytes `received`.

    A condition on a tensor's value, which fake tensors do not have, is taken for true.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # a third of all that is asked
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if result is NotImplemented:
            return result
        if func.namespace == "aten":
            if (operations := OPERATIONS.get(func.overloadpacket)) is not None:
                self.counts[_kind(func.overloadpacket)] += operations(*args, **(kwargs or {}), out_val=result)
        elif func.namespace in ("c10d", "_c10d_functional"):
            self.counts["received"] += received(func, args)
        return result


def _kind(operation: torch._ops.OpOverloadPacket) -> str:
    """Inside a backward pass only what checkpointing runs again does so with gradients on.

    Attention over several processes is a function of its own, which has them off; no backward pass needs its operation.
    """
    name = operation.__name__
    attention = name.startswith("_scaled_dot_product") and not name.endswith("backward")
    again = in_backward() and (torch.is_grad_enabled() or attention)
    return "recomputed" if again else "model"


def in_backward() -> bool:
    """Whether autograd runs a backward pass now."""
    return torch._C._current_graph_task_id() != -1


def received(func: torch._ops.OpOverload, args: tuple) -> float:
    """Bytes that each of n processes receives: all but its own share of what is exchanged, as rings do it."""
    name = func.name().partition("::")[2]
    sizes = [tensor.nbytes for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)]
    if "wait" in name or not sizes:
        return 0.0
    n = _processes(args)
    if "reduce_" in name and "scatter" not in name:  # allreduce_, all_reduce: a reduction, then a gathering
        return 2 * sum(sizes) * (n - 1) / n
    if name.startswith("all_gather"):  # the functional one is given this process's share alone
        return sum(sizes) * (n - 1)
    return max(sizes) * (n - 1) / n  # of input and output the whole: gathering, reducing to shares, all to all


def _processes(args: tuple) -> int:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg).size()
    return _resolve_process_group(args[-1]).size()
