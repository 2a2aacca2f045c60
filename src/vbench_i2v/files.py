"""Digests of files and values, and files that are written whole or not at all."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import yaml

from vbench_i2v.errors import VBenchError


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_HASHES: dict[tuple[int, int, int, int], str] = {}


def content(path: Path) -> str:
    """`sha256`, of files of gigabytes too: read once in a process, whatever names it has, while size and date stay.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file, or only a link to one that is gone")
    stat = path.stat()
    state = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
    if state not in _HASHES:
        _HASHES[state] = sha256(path)
    return _HASHES[state]


def digest(value: object) -> str:
    """Hex digest of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tree(folder: Path, above: frozenset[str] = frozenset(), hidden_folders: bool = False) -> Iterator[Path]:
    """Everything in a folder and in those below it, in the order of the names, but for what is hidden.

    Links to folders are followed, unless they lead back to one of those in which they stand (`above`). `lost+found`,
    which only root may read, counts as hidden. With `hidden_folders` these are entered; hidden files never count.

    Raises:
        OSError: a folder cannot be read; names it.
    """
    above |= {os.path.realpath(folder)}
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".") or (hidden_folders and entry.is_dir())]
    for entry in sorted(shown, key=lambda entry: entry.name):
        if entry.name == "lost+found":
            continue
        yield folder / entry.name
        if entry.is_dir() and os.path.realpath(entry.path) not in above:
            yield from tree(folder / entry.name, above, hidden_folders)


def read_yaml(text: str) -> object:
    """The content of a YAML text.

    Raises:
        Exception: of any kind, where it is none, or has a key twice, of which YAML's readers silently drop the first.
    """
    seen: set[int] = set()  # an anchored part stands in several places

    def look(node: yaml.Node | None) -> None:
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            return
        seen.add(id(node))
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(part,) for part in node.value]
        keys = [pair[0].value for pair in pairs if len(pair) == 2 and isinstance(pair[0], yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1 and key != "<<"]:
            raise ValueError(f"the key {twice[0]} stands twice, from line {node.start_mark.line + 1} on")
        for pair in pairs:
            for part in pair:
                look(part)

    loader = yaml.SafeLoader(text)  # libyaml's is quicker, and ends the process at a hundred thousand brackets
    try:
        look(node := loader.get_single_node())
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def user_path(text: str | Path) -> Path:
    """A path as a user writes it.

    Raises:
        VBenchError: it begins with ~, and there is no such home.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise VBenchError(f"{text}: {error}; name the folder without ~") from error


def folder_digest(folder: Path) -> str:
    """One digest of all files of a folder, of their names and contents.

    What is hidden does not count, nor what Python and torch's hub write into a folder of code when they load it.
    """
    files = [path for path in tree(folder) if not {"__pycache__", "trusted_list"} & set(path.parts)]
    files = [path for path in files if path.is_file()]
    return digest({path.relative_to(folder).as_posix(): sha256(path) for path in files})


def read_json(path: Path, remedy: str = "is the file complete?") -> object:
    """The content of a JSON file.

    Raises:
        VBenchError: it is none; ends with the remedy.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        raise VBenchError(f"{path}: not JSON ({error}); {remedy}") from error


def write_json(path: Path, value: object) -> None:
    """Write JSON by way of a temporary file and a rename."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.{path.name}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
