"""Names of the files that are made from prompts: short enough, no two alike, and the same whoever asks."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from vpae.artifacts import ArtifactError, digest

NAME_BYTES = 255 - len(".01234567.")  # what most file systems take, less the prefix of `artifacts.written`
STEM_BYTES = 200  # of them; the rest is for the index, and for what a reader puts before or behind


def file_names(prompts: Sequence[str]) -> list[str]:
    """For each of these prompts the name of its video, `{prompt}-{index among equal prompts}.mp4`.

    Of a prompt that is too long, or holds what a file name cannot, stands there what can, and a digest; so with prompts
    that would give one name, also where upper and lower case are the same.
    """
    alike, seen, names = Counter(map(_folded, set(prompts))), Counter[str](), []
    for prompt in prompts:
        fits = alike[_folded(prompt)] == 1 and _safe(prompt) == prompt and len(prompt.encode()) <= STEM_BYTES
        names.append(f"{prompt if fits else _with_digest(prompt)}-{seen[prompt]}.mp4")
        seen[prompt] += 1
    return names


def check_names(folder: Path, names: Iterable[str]) -> None:
    """See that the file system of a folder takes the longest of these names.

    Raises:
        ArtifactError: naming it.
    """
    longest = max(names, key=lambda name: len(name.encode()))
    trial = folder / f".01234567.{longest}"
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ArtifactError(
            f"{folder}: its file system takes no name of {len(trial.name.encode())} bytes ({error.strerror}), which "
            f"{longest!r} will need; put the results elsewhere, or shorten the captions"
        ) from error


def _folded(prompt: str) -> str:
    """Equal for prompts whose names some file system takes for one."""
    return unicodedata.normalize("NFC", _safe(prompt)).casefold()


def _safe(prompt: str) -> str:
    """What file systems refuse, or hide, replaced."""
    return re.sub(r'^\.|[/\\:*?"<>|\x00-\x1f\x7f]', "_", prompt)


def _with_digest(prompt: str) -> str:
    mark = f"~{digest(prompt)[:12]}"
    return _safe(prompt).encode()[: STEM_BYTES - len(mark)].decode(errors="ignore") + mark
