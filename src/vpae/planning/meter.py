"""Counts what work does while it runs: bytes alive, operations of matrix products, bytes received from other processes.

It sees every operation that torch dispatches, of real tensors and of fake ones, which have shapes but no memory: so the
memory of a large model can be counted without having it. On a CPU there is no allocator to ask, and the process's size
says little; these counts are exact and the same on every run.
A multiply-add counts as two operations; norms, activations and softmax are not counted, as is usual for "model FLOPs".
"""

import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop

aten = torch.ops.aten
WRAPPERS = (DTensor, AsyncCollectiveTensor)  # tensors that have no memory of their own


class LiveBytes(TorchDispatchMode):
    """Counts the storages made while it is on; only one may be on at a time.

    Attributes:
        now: bytes of those that are still alive.
        peaks: the most there were at once while each label was set.
        label: what the work that runs now is called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.label: Hashable = None
        self.peaks: dict[Hashable, int] = {}
        self._counted: dict[int, tuple[weakref.ref, int]] = {}

    @property
    def peak(self) -> int:
        """The most bytes there were at once."""
        return max(self.peaks.values(), default=0)

    def mark(self, label: Hashable) -> None:
        """What runs from here on has this label."""
        self.label = label
        self._note()

    def __enter__(self) -> "LiveBytes":
        # FSDP takes and gives back the memory of gathered weights through their storages, which is no operation.
        resize = self._resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = resize(storage, size)
            self._recount(storage)
            return result

        torch.UntypedStorage.resize_ = counted
        return super().__enter__()

    def __exit__(self, *error) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "prim":
            return func(*args)  # questions about a tensor, of which there are very many
        if any(issubclass(kind, WRAPPERS) for kind in types):
            return NotImplemented  # what they do with the tensor inside comes by here again
        result = func(*args, **(kwargs or {}))
        new = [storage for storage in _storages(result) if id(storage) not in self._counted]
        if new:
            # A view of, or an operation in place on, what was there before makes no new memory.
            given = {id(s) for s in _storages((args, kwargs))}
            for storage in new:
                if id(storage) not in given and id(storage) not in self._counted:
                    self._count(storage)
        self._note()
        return result

    def _note(self) -> None:
        if self.now > self.peaks.get(self.label, -1):
            self.peaks[self.label] = self.now

    def _recount(self, storage: torch.UntypedStorage) -> None:
        """Take note of another size; a storage that was there before is counted from its first growth on."""
        key = id(storage)
        if key not in self._counted:
            self._count(storage)
        else:
            reference, before = self._counted[key]
            self._counted[key] = reference, storage.nbytes()
            self.now += storage.nbytes() - before
        self._note()

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_reference: weakref.ref) -> None:
            self.now -= self._counted.pop(key)[1]

        self._counted[key] = weakref.ref(storage, gone), size
        self.now += size


def stored_bytes(values: Iterable[object]) -> int:
    """Bytes of the tensors among some values, each storage once; of a sharded tensor, this process's shard."""
    here = [t.to_local() if isinstance(t, DTensor) else t for t in values if isinstance(t, Tensor)]
    return sum({id(s): s.nbytes() for s in _storages(here)}.values())


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    if isinstance(tree, Tensor):
        yield tree.untyped_storage()
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from _storages(branch)
    elif isinstance(tree, dict):
        yield from _storages(list(tree.values()))


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
    sizes = [tensor.nbytes for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
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
