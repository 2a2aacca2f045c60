"""A lock on a name that ends with its process, also on file systems that have no flock.

Some parallel file systems are mounted without flock (ENOSYS), and some NFS servers run no lock daemon (ENOLCK). There
each holder leaves a file that says who it is, and looks at the files of all others.
"""

import errno
import fcntl
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def lock(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold a lock while the context lasts; whatever ends the process ends the lock.

    Args:
        path: of the lock's file, which is made if need be and stays.
        shared: let others in who share it, too, but nobody who wants it alone.

    Raises:
        BlockingIOError: somebody else holds it; the text says who, if that is known.
    """
    with path.open("a+") as file:  # NFS shares a lock only if it may read, too
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
        else:
            yield
            return
    with _registered(path.with_name(f"{path.name}.holders"), shared):
        yield


@contextmanager
def _registered(folder: Path, shared: bool) -> Iterator[None]:
    """Hold the lock by a file `MODE HOST PID START TOKEN`.

    It is written before the others are looked at, so that of two who come at the same time at least one sees the other.
    """
    folder.mkdir(exist_ok=True)
    me = (socket.gethostname(), *_process(os.getpid()), secrets.token_hex(4))
    mine = folder / " ".join(["shared" if shared else "alone", *me])
    mine.touch()
    try:
        for other in sorted(folder.iterdir()):
            mode, host, pid, start, _ = other.name.split(" ")
            if other == mine or (shared and mode == "shared"):
                continue
            if host == socket.gethostname() and _process(int(pid)) != (pid, start):
                other.unlink(missing_ok=True)  # it died without a chance to clear up
                continue
            raise BlockingIOError(
                errno.EAGAIN,
                f"process {pid} on {host} has it, and this file system has no locks that end by themselves: if that "
                f"process is no more, delete '{other}'",
            )
        yield
    finally:
        mine.unlink(missing_ok=True)


def _process(pid: int) -> tuple[str, str] | None:
    """A process by its number and the time it began, since numbers are used again; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return None
    return str(pid), stat.rpartition(")")[2].split()[19]
