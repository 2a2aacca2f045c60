"""A stage's work cut into parts, which may run side by side on many machines.

A part leaves what it made in the stage's state folder, where the stage's own run finds it and has only to gather. Only
the state folder counts: what is not there, the stage makes itself.
"""

from collections.abc import Sequence
from typing import TypeVar

from vbench_i2v.parts import Part as Share

Work = TypeVar("Work")


class Part(Share):
    """A share of a stage's work; with `stretch` also one of neighbouring pieces."""

    def stretch(self, work: Sequence[Work], costs: Sequence[float]) -> list[Work]:
        """Neighbouring pieces of work, so cut that each part costs about the same."""
        total, before, found = sum(costs), 0.0, []
        for piece, cost in zip(work, costs, strict=True):
            # A piece goes to the part in which its middle lies.
            if int(self.of * (before + cost / 2) / total) == self.number - 1:
                found.append(piece)
            before += cost
        return found
