"""The command in processes of their own that begin with its libraries loaded, which is most of a short stage.

Kills then fall into a stage's work, and seldom into its start.
"""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

LOADED = ["vpae.data.corpus", "vpae.distill.run", "vpae.evaluation.stage", "vpae.report.page", "vpae.teacher.stage"]
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(LOADED)


def _command(words: Sequence[str], place: Path, said: str, largest_file: int | None) -> None:
    os.setsid()
    os.chdir(place)
    for stream, name in ((1, os.devnull), (2, said)):
        opened = os.open(name, os.O_WRONLY)
        os.dup2(opened, stream)
        os.close(opened)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    from vpae.cli import main

    sys.exit(main(list(words)))


class Started:
    """A command that runs in a process group of its own.

    Args:
        words: the command's arguments.
        place: its working directory.
        largest_file: bytes beyond which it can write no file.
    """

    def __init__(self, words: Sequence[str], place: Path, largest_file: int | None = None):
        self._said = tempfile.NamedTemporaryFile("r")  # noqa: SIM115, closed when it is finished
        self._process = _processes.Process(target=_command, args=(words, place, self._said.name, largest_file))
        self._process.start()

    def ends_within(self, seconds: float) -> bool:
        """Whether it ends by itself in this time."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def kill(self, number: int) -> None:
        """Send a signal to the group, or to the process where it has none yet."""
        with suppress(ProcessLookupError):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                os.kill(self._process.pid, number)

    def finish(self, patience: float) -> tuple[int, str]:
        """Exit code and what was said.

        Raises:
            TimeoutError: it does not end in these seconds; it is killed.
        """
        if not self.ends_within(patience):
            self.kill(signal.SIGKILL)
            raise TimeoutError(f"no end after {patience} s")
        with self._said as file:
            return self._process.exitcode, file.read()
