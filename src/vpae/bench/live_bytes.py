"""How many bytes of tensors are alive, counted at each operation.

On the CPU there is no allocator to ask, and the process's size says little. This count is exact and the same on every
run; it works on fake tensors too, so that the memory of a large model can be counted without having it.
"""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WRAPPERS = (DTensor, AsyncCollectiveTensor)  # tensors that have no memory of their own


class LiveBytes(TorchDispatchMode):
    """Counts the storages made while it is on; one at a time may be.

    Attributes:
        now: bytes of those that are still alive.
        peak: the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: dict[int, tuple[weakref.ref, int]] = {}

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
        if any(issubclass(kind, WRAPPERS) for kind in types):
            return NotImplemented  # what they do with the tensor inside comes by here again
        given = {id(s) for s in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            # A view of, or an operation in place on, what was there before makes no new memory.
            if id(storage) not in given and id(storage) not in self._counted:
                self._count(storage)
        self.peak = max(self.peak, self.now)
        return result

    def _recount(self, storage: torch.UntypedStorage) -> None:
        """Take note of another size; a storage that was there before is counted from its first growth on."""
        key = id(storage)
        if key not in self._counted:
            self._count(storage)
        else:
            reference, before = self._counted[key]
            self._counted[key] = reference, storage.nbytes()
            self.now += storage.nbytes() - before
        self.peak = max(self.peak, self.now)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_reference: weakref.ref) -> None:
            self.now -= self._counted.pop(key)[1]

        self._counted[key] = weakref.ref(storage, gone), size
        self.now += size


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()
