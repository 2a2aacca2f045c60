"""How many bytes of tensors are alive, counted at each operation.

On the CPU there is no allocator to ask, and the process's size says little. This count is exact and the same on every
run; it works on fake tensors too, so that the memory of a large model can be counted without having it.
"""

import weakref
from collections.abc import Hashable, Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

WRAPPERS = (DTensor, AsyncCollectiveTensor)  # tensors that have no memory of their own


class LiveBytes(TorchDispatchMode):
    """Counts the storages made while it is on; one at a time may be.

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
