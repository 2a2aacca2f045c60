"""The weight files of the official backbones: one folder, one manifest, a check that needs no network.

Nothing is fetched inside a job: `vbench-i2v weights --fetch` runs where there is internet, the rest reads the
folder.
"""

import importlib.util
import json
import shutil
import sys
import urllib.request
import zipfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path

from vbench_i2v.errors import NotComputed, VBenchError
from vbench_i2v.files import content, folder_digest
from vbench_i2v.packages import imported, version_of

_TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True)
class Weight:
    """One file of the manifest.

    Attributes:
        file: its name in the folder.
        dimensions: which dimensions read it; none: the prompt suite.
        url: where it, or the archive that holds it, is published.
        size: in bytes; None: not known to us.
        sha256: hex digest, or the leading digits of it that its publisher states; None: not known to us.
        licence: of the file.
        member: its path in the archive; empty: the URL is the file itself.
        contains: what has to be in it, where it is a folder that its own package fills.
        module: what reads it, of a package that the user installs; empty: this package does.
    """

    file: str
    dimensions: tuple[str, ...]
    url: str
    size: int | None
    sha256: str | None
    licence: str
    member: str = ""
    contains: tuple[str, ...] = ()
    module: str = ""

    def problem(self, root: Path) -> str:
        """What is wrong with the file in `root`; empty: nothing that we can see."""
        path = root / self.file
        if self.contains:
            lacking = [name for name in self.contains if not (path / name).exists()]
            return f"{', '.join(lacking)} missing" if lacking else ""
        if not path.is_file():
            return "missing"
        if self.size is not None and path.stat().st_size != self.size:
            return f"{path.stat().st_size:,} bytes instead of {self.size:,}"
        if self.sha256 is None and not _is_checkpoint(path):
            return "is no checkpoint of PyTorch's, or not whole"
        if self.sha256 is not None and not (found := content(path)).startswith(self.sha256):
            return f"sha256 {found} instead of {self.sha256}{'...' if len(self.sha256) < 64 else ''}"
        return ""


@cache
def manifest() -> tuple[Weight, ...]:
    """The files that the official backbones read, and the prompt suite."""
    entries = json.loads((files("vbench_i2v") / "manifest.json").read_text(encoding="utf-8"))
    lists = ("dimensions", "contains")
    return tuple(Weight(**{k: tuple(v) if k in lists else v for k, v in entry.items()}) for entry in entries)


def needed(dimensions: Iterable[str]) -> list[Weight]:
    """The files that some dimensions read."""
    wanted = set(dimensions)
    return [weight for weight in manifest() if wanted & set(weight.dimensions)]


def problems(root: Path, weights: Iterable[Weight]) -> dict[str, str]:
    """File -> what is wrong with it, for those that cannot be used; reads the files, and no network."""
    found = {weight.file: weight.problem(root) for weight in weights}
    return {name: problem for name, problem in found.items() if problem}


def absent(root: Path, dimensions: Iterable[str]) -> dict[str, str]:
    """Dimension -> why its weight files cannot be used, with the remedy; empty: all are there and as published."""
    found = problems(root, needed(dimensions))
    why = {}
    for dimension in dimensions:
        bad = [f"{w.file} ({found[w.file]})" for w in needed([dimension]) if w.file in found]
        if bad:
            why[dimension] = (
                f"weights in {root}: {', '.join(bad)}; run `vbench-i2v weights --fetch --root {root}` "
                "where there is internet, or copy the file there"
            )
    return why


def identities(root: Path, dimensions: Iterable[str]) -> dict[str, dict[str, str]]:
    """Dimension -> {file: sha256} of the weights that are there; part of what a record depends on."""
    there = {w.file: root / w.file for w in needed(dimensions) if (root / w.file).exists()}
    digests = {name: folder_digest(path) if path.is_dir() else content(path) for name, path in there.items()}
    return {name: {w.file: digests[w.file] for w in needed([name]) if w.file in digests} for name in dimensions}


def _is_checkpoint(path: Path) -> bool:
    """Whether a file is a whole zip archive or, as before PyTorch 1.6, pickled."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80" or zipfile.is_zipfile(path)


def lacking_packages(dimension: str) -> list[str]:
    """Packages that the user has to install for a dimension and has not; nothing is imported."""
    return [name for name in _packages(dimension) if importlib.util.find_spec(name) is None]


def package_versions(dimension: str) -> dict[str, str]:
    """Package -> version, of those that the user installs for a dimension: they compute, as the weights do."""
    return {name: version_of(name) for name in _packages(dimension)}


def _packages(dimension: str) -> list[str]:
    return sorted({weight.module.partition(".")[0] for weight in needed([dimension]) if weight.module})


def chosen(names: Collection[str], dimensions: Collection[str]) -> list[Weight]:
    """The files of some names and those of some dimensions; without either, all.

    Raises:
        VBenchError: a name that is none.
    """
    known = {weight.file: weight for weight in manifest()}
    if unknown := [name for name in names if name not in known]:
        raise VBenchError(f"{', '.join(unknown)}: no such weight file; there are {', '.join(known)}")
    read = {weight.file for weight in needed(dimensions)}
    everything = not names and not dimensions
    return [weight for weight in manifest() if everything or weight.file in names or weight.file in read]


def report(root: Path, weights: Sequence[Weight]) -> tuple[str, bool]:
    """A table of files for people, and whether all can be used: the files, and the packages that read them, which are
    imported."""
    found = problems(root, weights)
    unusable = {}
    lines = [f"weights in {root}"]
    for weight in weights:
        unknown = " (no published digest to compare with)" if weight.sha256 is None else ""
        lines.append(f"{weight.file}: {found.get(weight.file) or f'ok{unknown}'}")
        lines.append(f"    for {', '.join(weight.dimensions) or 'the prompt suite'}; {weight.licence}")
        if weight.file in found:
            place = f"{weight.url} ({weight.member} in it)" if weight.member else weight.url
            lines += [f"    from {place}", f"    to   {root / weight.file}"]
            if weight.contains:
                lines.append(f"    by   {filling(root / weight.file)}")
        if weight.module:
            try:
                imported(weight.module)
            except NotComputed as error:
                unusable[weight.file] = error
                lines.append(f"    {error}")
    if found:
        lines.append(f"{len(found)} of {len(weights)} are missing or wrong")
    if unusable:
        lines.append(f"the packages that read {', '.join(unusable)} cannot be used; their dimensions are not computed")
    return "\n".join(lines), not found and not unusable


def filling(folder: Path) -> str:
    """The command by which DreamSim's package fills its own folder."""
    call = f"dreamsim(pretrained=True, device='cpu', cache_dir='{folder}')"
    return f'python -c "from dreamsim import dreamsim; {call}"'


def fetch(root: Path, weights: Iterable[Weight], mirror: str = "") -> tuple[list[str], list[str]]:
    """Download what is missing or wrong, and verify it. What cannot be had does not keep the rest from coming.

    Files come from where they are published, or by their names from the folder at the address `mirror`.

    Returns:
        the names of the files that were fetched, and what went wrong with others; what was there before stays.
    """
    root.mkdir(parents=True, exist_ok=True)
    fetched, failed = [], []
    for weight in weights:
        if not weight.problem(root):
            continue
        if weight.contains:
            print(f"{weight.file}: its own package fetches it: {filling(root / weight.file)}", file=sys.stderr)
            continue
        try:
            _fetch(root, weight, mirror)
            fetched.append(weight.file)
        except VBenchError as error:
            failed.append(str(error))
    return fetched, failed


def _fetch(root: Path, weight: Weight, mirror: str) -> None:
    url = f"{mirror.rstrip('/')}/{weight.file}" if mirror else weight.url
    member = "" if mirror else weight.member
    print(f"fetching {url}", file=sys.stderr)
    staging = root / f".{weight.file}.part"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        _download(url, staging / (f"{weight.file}.zip" if member else weight.file))
        if member:
            _extract(staging / f"{weight.file}.zip", member, staging / weight.file)
        if wrong := weight.problem(staging):
            raise VBenchError(f"{url}: {wrong}; nothing was installed. Has it been replaced at its source?")
        (staging / weight.file).replace(root / weight.file)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download(url: str, target: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, target.open("wb") as file:
            shutil.copyfileobj(response, file, 1 << 20)
            promised = response.headers.get("Content-Length")  # urllib does not compare
            if promised is not None and file.tell() != int(promised):
                raise OSError(f"the connection broke off after {file.tell():,} of {int(promised):,} bytes")
    except (OSError, ValueError, HTTPException) as error:  # the last is of a connection that breaks off
        reason = getattr(error, "reason", error)
        raise VBenchError(f"{url}: {reason}; try --mirror, or fetch it by other means and put it there") from None


def _extract(archive: Path, member: str, target: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as content, content.open(member) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise VBenchError(f"{archive.name}: no {member} in it ({error})") from None
