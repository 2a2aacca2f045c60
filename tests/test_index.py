"""The index of a latents folder: read as it was written, and held without a Python object for each clip."""

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vpae.artifacts import ArtifactError
from vpae.data import index
from vpae.data.index import Entries, Entry, read_index, write_index
from vpae.data.latents import LatentDataset

HEAD = {"encoders": "0123", "text_tokens": 64}
ODD = ('"entries": [', "]}", '{"a": [1]}, ', "a\n\tb", 'quo"ted\\', "人工 é", "", "x" * 1000)


def made(count: int) -> Iterator[Entry]:
    for n in range(count):
        key, split = f"{n:040x}", "held_out" if n % 4 == 0 else "train"
        caption = f"a caption of common length, as corpora have: clip {n}"
        yield Entry(key, split, caption, key, f"s{n // 64}", n * 9, n, sha256=key)


@pytest.mark.parametrize("piece", [80, 203, 1 << 16])
def test_what_is_read_is_what_was_written(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "PIECE", piece)
    monkeypatch.setattr(index, "ROWS", 3)
    odd = [Entry(f"odd-{n}", "train", caption, "", "s", n, 2**40, "") for n, caption in enumerate(ODD)]
    entries = [*made(50), *odd]
    write_index(tmp_path / "index.json", HEAD, iter(entries))
    assert json.loads((tmp_path / "index.json").read_text()) == {**HEAD, "entries": [vars(e) for e in entries]}
    for split in ("train", "held_out", "none"):
        head, found = read_index(tmp_path / "index.json", split)
        wanted = [e for e in entries if e.split == split]
        assert head == HEAD and list(found) == wanted and len(found) == len(wanted)
        assert [found[n] for n in range(-len(wanted), 0)] == wanted
        with pytest.raises(IndexError):
            found[len(wanted)]


@pytest.mark.parametrize("damage", ["cut", "no key", "text for a number", "no list"])
def test_a_damaged_index_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    write_index(path, HEAD, made(20))
    text = path.read_text()
    changed = {
        "cut": text[:-200],
        "no key": text.replace('"offset": 81', '"offzet": 81'),
        "text for a number": text.replace('"offset": 81', '"offset": "x"'),
        "no list": text.replace("entries", "entrails"),
    }[damage]
    assert changed != text
    path.write_text(changed)
    with pytest.raises(ArtifactError, match=r"index\.json.*vpae latents"):
        LatentDataset(tmp_path, "train")


def per_clip(hold: Callable[[Iterator[Entry]], object], count: int) -> float:
    """Bytes a clip of what holds its entry, of Python and of Arrow."""
    tracemalloc.start()
    try:
        kept = hold(made(count))
        arrow = kept.table.nbytes if isinstance(kept, Entries) else 0
        return (tracemalloc.get_traced_memory()[0] + arrow) / count
    finally:
        tracemalloc.stop()


def test_a_clip_takes_its_texts_in_memory_and_no_python_object() -> None:
    """The texts of these entries have 170 bytes."""
    Entries(made(1))  # what Arrow imports at first is no entry's
    few, many = per_clip(Entries, 2048), per_clip(Entries, 65536)
    assert few < 230 and many < 220, (few, many)
    assert per_clip(list, 2048) > 2 * few, "what one Python object an entry takes"
