"""Ending a long job in good order: SLURM warns with SIGTERM or SIGUSR1 before it kills; Ctrl-C is SIGINT."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 3  # "saved, not finished": a workflow may run the same command again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interruption(Exception):
    """A run that stopped because it was asked to; its state is saved."""

    @staticmethod
    @contextmanager
    def watch() -> Iterator["Request"]:
        """Turn the signals into a flag while the block runs."""
        request = Request()
        # Whoever starts a job in the background may have had Ctrl-C ignored: then it stays so.
        heeded = [n for n in SIGNALS if n != signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
        old = {number: signal.signal(number, request.note) for number in heeded}
        try:
            yield request
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


class Request:
    """Whether an end was asked for."""

    requested = False
    pressed = False

    def note(self, number, _frame) -> None:
        if number == signal.SIGINT and self.pressed:
            raise KeyboardInterrupt  # who presses it twice does not want to wait
        self.pressed |= number == signal.SIGINT
        self.requested = True
