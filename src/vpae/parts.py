"""A stage's work cut into parts, which may run side by side on many machines.

A part leaves what it made in the stage's state folder, where the stage's own run finds it and has only to gather. It is
the state folder alone that is believed: what is not there, the stage makes itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from vpae.config import Jobs

Work = TypeVar("Work")
DIVISIBLE = tuple(Jobs.model_fields)  # stages that can be cut


@dataclass(frozen=True)
class Part:
    """One of `of` shares, counted from 1, as one says "part 3 of 16"."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """From "3/16"; ValueError if it is no part."""
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise ValueError(f"{text!r} is no part; write number/of, from 1/16 to 16/16 for sixteen of them")
        return cls(int(number), int(of))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def share(self, work: Sequence[Work]) -> list[Work]:
        """Every `of`-th piece of work."""
        return list(work[self.number - 1 :: self.of])

    def stretch(self, work: Sequence[Work], costs: Sequence[float]) -> list[Work]:
        """Neighbouring pieces of work, so cut that each part costs about the same."""
        total, before, found = sum(costs), 0.0, []
        for piece, cost in zip(work, costs, strict=True):
            # A piece goes to the part in which its middle lies.
            if int(self.of * (before + cost / 2) / total) == self.number - 1:
                found.append(piece)
            before += cost
        return found
