"""Work cut into parts, which may run side by side on many machines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

Work = TypeVar("Work")


@dataclass(frozen=True)
class Part:
    """One of `of` shares, counted from 1, as one says "part 3 of 16"."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
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
