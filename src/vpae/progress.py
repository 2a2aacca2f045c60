"""Progress for people: a bar with an estimate on a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
LINE_EVERY_SECONDS = 20.0


class Progress:
    """Counts work done; `update` may carry a short text such as the current losses."""

    def __init__(self, total: int, label: str, initial: int = 0):
        self.total, self.label, self.initial, self.done = total, label, initial, initial
        self._start = self._last = time.monotonic()
        self._bar = tqdm(total=total, desc=label, initial=initial) if sys.stderr.isatty() else None

    def update(self, n: int = 1, text: str = "") -> None:
        """Say that n more units are done."""
        self.done += n
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(n)
            return
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_SECONDS or self.done >= self.total:
            self._last = now
            rate = (self.done - self.initial) / max(now - self._start, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            line = f"{self.label}: {self.done}/{self.total}, {rate:.2g}/s, {left:.0f} s left  {text}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def track(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Iterate with progress."""
    progress = Progress(total, label)
    for item in items:
        yield item
        progress.update()
    progress.close()
