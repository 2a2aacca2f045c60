"""Work done by a thread while its caller is busy with what came before."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """`make(number)` for any number; while the caller uses one value, a thread makes that of the next number.

    What `make` raises is raised where the value is asked for, and not at all if it never is.

    Args:
        make: need not be thread-safe: two calls never overlap.
        end: the first number of which there is no value; none: there is no end.
    """

    def __init__(self, make: Callable[[int], T], end: int | None = None):
        self.make, self.end = make, end
        self.thread = ThreadPoolExecutor(1)
        self.next: tuple[int, Future[T]] | None = None

    def __call__(self, number: int) -> T:
        """The value of a number."""
        place, future = self.next or (None, None)
        if place != number:
            future = self.thread.submit(self.make, number)
        found = future.result()
        self.next = None
        if number + 1 != self.end:
            self.next = number + 1, self.thread.submit(self.make, number + 1)
        return found
