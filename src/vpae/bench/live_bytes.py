"""How many bytes of tensors are alive, counted at each operation.

On the CPU there is no allocator to ask, and the process's size says little. This count is exact and the same on every
run; it works on fake tensors too, so that the memory of a large model can be counted without having it.
"""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages made while it is on.

    Attributes:
        now: bytes of those that are still alive.
        peak: the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(s) for s in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            # A view of, or an operation in place on, what was there before makes no new memory.
            if id(storage) not in given and id(storage) not in self._counted:
                self._count(storage)
        self.peak = max(self.peak, self.now)
        return result

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
