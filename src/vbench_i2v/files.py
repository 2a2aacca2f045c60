"""Digests of files and values, and files that are written whole or not at all."""

import hashlib
import json
import secrets
from pathlib import Path


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: object) -> str:
    """Hex digest of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def folder_digest(folder: Path) -> str:
    """One digest of all files of a folder, of their names and contents; hidden files do not count."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return digest({path.relative_to(folder).as_posix(): sha256(path) for path in files})


def write_json(path: Path, value: object) -> None:
    """Write JSON by way of a temporary file and a rename."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.{path.name}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
