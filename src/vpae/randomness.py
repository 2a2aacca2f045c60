"""Random numbers that depend on where they are used, not on what ran before."""

import zlib

import numpy as np
import torch


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed from integers and names."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def generator_for(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A fresh generator for one use."""
    return torch.Generator(device).manual_seed(derived_seed(*key))


class Shuffled:
    """Endless shuffled passes over n items, addressable at any position."""

    def __init__(self, n: int, seed: int, name: str):
        self.n, self._key = n, (seed, name)
        self._epoch, self._order = -1, np.arange(0)

    def __call__(self, position: int) -> int:
        """The item at a position; each n positions hold every item once."""
        epoch, offset = divmod(position, self.n)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng(derived_seed(*self._key, epoch)).permutation(self.n)
        return int(self._order[offset])
