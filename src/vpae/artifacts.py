"""Folders that are either complete or absent, and the provenance that stands in each of them.

A stage writes into a temporary sibling, `provenance.json` goes in last, and one rename makes the folder appear. A
finished folder is recognised by its settings and by the hashes of its inputs, never by its date.
"""

import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import resource
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import vpae
from vbench_i2v.files import content, digest, sha256, tree
from vpae.locks import lock

PROVENANCE = "provenance.json"
FICLONE = 0x40049409  # ioctl: let a file share another's blocks until one of the two is written to
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "decord", "av")


class ArtifactError(RuntimeError):
    """An input that is missing or is not what it says; the message names the path and the remedy."""


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Whatever a file's bytes make its parser raise becomes an ArtifactError that names the file.

    Parsers raise more than they say: JSON a RecursionError, parquet an OSError, text a UnicodeDecodeError.
    """
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{path}: cannot be read ({type(error).__name__}: {error}); {remedy}") from error


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to, which takes the file's name at the end; if that fails, there is no file.

    Several processes, on several machines, may write the same file: it is always one of theirs, and whole.
    """
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        yield temporary
        flush_entry(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def kept(path: Path) -> Iterator[Path]:
    """As `written`, for what a state folder keeps for later: its hash, in a hidden file beside it, is there first."""
    with written(path) as temporary:
        yield temporary
        with written(_seal(path)) as seal:
            seal.write_text(sha256(temporary))


def is_kept(path: Path) -> bool:
    """Whether a state folder has this file as it was kept; says so where its bytes have changed."""
    if not path.is_file():
        return False
    whole = not _seal(path).is_file() or _seal(path).read_bytes() == content(path).encode()
    if not whole:
        print(f"vpae: {path} is damaged; it is made again", file=sys.stderr)
    return whole


def _seal(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def write_json(path: Path, value: object) -> None:
    """Write JSON by way of a temporary file and a rename."""
    with written(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def file_hashes(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file of a folder, without what is hidden and the provenance itself.

    Raises:
        OSError: a folder in it, or a file, cannot be read.
    """
    names = files_of(folder)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: content(folder / name), names), strict=True))


def files_of(folder: Path) -> list[str]:
    """The relative paths of these files."""
    files = (p for p in tree(folder) if p.is_file() and p.name != PROVENANCE)
    return sorted(p.relative_to(folder).as_posix() for p in files)


def read_provenance(folder: Path) -> dict | None:
    """The provenance of a finished folder; None where there is no finished folder.

    Raises:
        ArtifactError: the provenance cannot be read, or lacks what every one has.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if lacking := [key for key in ("settings", "inputs", "outputs") if not isinstance(content[key], dict)]:
            raise ValueError(f"{lacking[0]} is no table")
    except OSError:  # it cannot be read by this user, or now: nothing says that it is damaged
        raise
    except Exception as error:
        raise ArtifactError(f"{path} is damaged ({error!r}); delete {folder} and run its stage again") from error
    return content


def identity(folder: Path) -> str:
    """What a finished folder holds, as one digest: that of all its files' hashes.

    Raises:
        ArtifactError: the folder is not a finished artefact.
    """
    provenance = read_provenance(folder)
    if provenance is None:
        raise ArtifactError(f"{folder} is missing or unfinished; run its stage ({folder.name}) first")
    return digest(provenance["outputs"])


@contextmanager
def building(
    folder: Path, settings: dict, inputs: dict[str, str], spent: Sequence[Path] = (), began: float | None = None
) -> Iterator[tuple[Path, dict]]:
    """Build a folder all or nothing.

    Args:
        folder: where the result will stand; an older result there is replaced at the end, once this one is on disk.
        settings: the resolved sections that determine the result.
        inputs: name -> digest of everything read.
        spent: folders of no use once the result stands, which are then removed.
        began: when the inputs were looked at, in seconds of `time.time()`; None: now.

    Yields:
        a temporary folder to write into, and a dict of counts to fill in.

    Raises:
        ArtifactError: another process is building the same folder.
    """
    began = time.time() if began is None else began
    with locked(folder):
        temporary, old = _beside(folder)
        _remove(temporary)
        temporary.mkdir(parents=True)
        counts: dict = {}
        start = time.monotonic()
        try:
            yield temporary, counts
            provenance = {
                "settings": settings,
                "inputs": inputs,
                "outputs": file_hashes(temporary),
                "counts": counts,
                "code": code_version(),
                "packages": package_versions(),
                "python": platform.python_version(),
                "command": " ".join(["vpae", *sys.argv[1:]]),
                "host": {"name": socket.gethostname(), "cpus": os.cpu_count(), "device": device_name()},
                "began": datetime.fromtimestamp(began, UTC).isoformat(),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - start, 3),
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            flush(temporary)
            write_json(temporary / PROVENANCE, provenance)  # last and durably: who finds it may rely on all the rest
        except BaseException:
            if not (temporary / PROVENANCE).is_file():
                _remove(temporary)  # half a result fills the disk for others
            raise
        _remove(old)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        flush_entry(folder.parent)
        _remove(old)
        for path in spent:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process.

    Args:
        folder: what is to be built; it need not exist.
        shared: let others in who share it, too, but nobody who wants it alone.

    Raises:
        ArtifactError: another process holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(lock(folder.with_name(f".{folder.name}.lock"), shared))
        except BlockingIOError as error:
            who = f" ({error.strerror})" if "process" in error.strerror else ""
            raise ArtifactError(f"{folder} is being built by another process; wait for it, or end it{who}") from error
        yield


def _remove(folder: Path) -> None:
    """Remove a folder, or the link to one that somebody has moved elsewhere; what it leads to is theirs."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def recover(folder: Path) -> None:
    """Where a result was cut off while it took its predecessor's place, end the exchange.

    Raises:
        ArtifactError: another process holds the folder for seconds.
    """
    temporary, old = _beside(folder)
    for last in [False] * 50 + [True]:
        if folder.exists() or not ((temporary / PROVENANCE).is_file() or old.is_dir()):
            return
        try:
            with locked(folder):
                if not folder.exists():
                    (temporary if (temporary / PROVENANCE).is_file() else old).rename(folder)
        except ArtifactError:  # the exchange itself, or another process that ends it
            if last:
                raise
            time.sleep(0.1)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where a folder's successor and its predecessor stand while they change places."""
    return folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")


def flush(folder: Path) -> None:
    """Have the disk hold every file of a folder, and the folders' entries, before this returns."""
    paths = [folder, *folder.rglob("*")]
    _readable(paths)
    with ThreadPoolExecutor() as pool:
        list(pool.map(flush_entry, paths))


def _readable(paths: Sequence[Path]) -> None:
    """Let others read what the umask lets them: safetensors makes files that their owner alone may read."""
    os.umask(mask := os.umask(0))
    for path in paths:
        state = path.lstat()
        if stat.S_ISREG(state.st_mode) and stat.S_IMODE(state.st_mode) == 0o600 and state.st_nlink == 1:
            path.chmod(0o666 & ~mask)


def flush_entry(path: Path) -> None:
    """Have the disk hold one file, or the names in one folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def damaged(folder: Path, unread: Callable[[str], bool] = lambda name: False) -> list[str]:
    """The files of a finished folder that are missing, or whose content is not what its provenance says.

    Args:
        folder: of a stage.
        unread: whether a file of this name is left out.
    """
    recorded = (read_provenance(folder) or {"outputs": {}})["outputs"]
    names = sorted(name for name in recorded if not unread(name))
    present = lambda name: content(folder / name) if (folder / name).is_file() else None  # noqa: E731
    with ThreadPoolExecutor() as pool:
        return [n for n, found in zip(names, pool.map(present, names), strict=True) if found != recorded[n]]


def package_versions() -> dict[str, str]:
    """Versions of the libraries on which results depend, of those that are installed; decord is not everywhere."""
    found = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def code_version() -> dict:
    """Version of the package, commit of its repository, and whether tracked files were changed."""
    root = Path(vpae.__file__).parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        except OSError:  # not on every compute node
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():  # an environment may lie in somebody else's repository
        return {"version": vpae.__version__, "commit": None, "dirty": None}
    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "version": vpae.__version__,
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def device_name() -> str:
    """The accelerator, or the processor where there is none."""
    import torch  # here, because the workflow's planning needs this module and should not wait for torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({torch.get_num_threads()} threads)" if names else platform.machine()


def link_tree(source: Path, target: Path, skip: tuple[str, ...] = (), foreign: bool = False) -> None:
    """Copy a folder without copying bytes where that is safe.

    Args:
        source: the folder.
        target: where its files go.
        skip: top-level entries to leave out.
        foreign: the files are somebody's who may edit them in place, see `take`; otherwise they are hard-linked.
    """
    for path in (p for p in tree(source, hidden_folders=True) if p.is_file()):
        relative = path.relative_to(source)
        if relative.parts[0] in skip or path.name == PROVENANCE or path.name.startswith("."):
            continue
        destination = target / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        (take if foreign else link)(path.resolve(), destination)


def link(source: Path, target: Path) -> None:
    """Hard link a file, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def take(source: Path, target: Path) -> None:
    """Take over a file such that no later change of it, not even in place, changes ours.

    One that nobody may write to is hard-linked; others are cloned where the file system can (Btrfs, XFS and others:
    the bytes are shared until one side is written to), and copied elsewhere.
    """
    if not source.stat().st_mode & 0o222:
        link(source, target)
    elif not _clone(source, target):
        shutil.copy2(source, target)


def _clone(source: Path, target: Path) -> bool:
    """Whether the file system could do it; if not, `target` is an empty file."""
    with source.open("rb") as original, target.open("wb") as copy:
        try:
            fcntl.ioctl(copy.fileno(), FICLONE, original.fileno())
        except OSError:
            return False
    return True
