"""`index.json` of a latents folder: where each clip's bytes lie; written and read piece by piece, held as a table."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from textwrap import indent
from typing import TextIO

import pyarrow as pa

from vpae.artifacts import written
from vpae.data.manifest import ROWS, table_of

INDEX = "index.json"
PIECE = 1 << 16  # characters of the file that are parsed at a time
LONGEST = 1 << 24  # an entry that has no end within so many characters is damaged
ENTRIES = '"entries": ['


@dataclass(frozen=True)
class Entry:
    """Where one clip's safetensors lie, and their sha256; empty: it was not kept yet when they were made."""

    key: str
    split: str
    caption: str
    clip_sha256: str
    shard: str
    offset: int
    size: int
    sha256: str = ""


FEW = pa.dictionary(pa.int32(), pa.string())  # texts that many rows share
SCHEMA = table_of(Entry, split=FEW, shard=FEW)


class Entries(Sequence[Entry]):
    """Entries as an Arrow table: a row becomes a Python object when it is asked for, and only then."""

    def __init__(self, entries: Iterator[Entry]):
        pieces = []
        while some := [vars(entry) for entry in islice(entries, ROWS)]:
            pieces.append(pa.Table.from_pylist(some, SCHEMA))
        whole = pa.concat_tables(pieces) if pieces else SCHEMA.empty_table()
        self.table = whole.unify_dictionaries().combine_chunks()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Entry:
        place = range(len(self))[number]  # raises IndexError, and counts from the end
        return Entry(**self.table.slice(place, 1).to_pylist()[0])


def write_index(path: Path, head: dict, entries: Iterable[Entry]) -> None:
    """As `write_json` would write {**head, "entries": [...]}, with one entry in memory at a time."""
    with written(path) as temporary, temporary.open("w") as file:
        file.write(json.dumps(head, indent=2).removesuffix("\n}") + f",\n  {ENTRIES}")
        for number, entry in enumerate(entries):
            file.write(",\n" if number else "\n")
            file.write(indent(json.dumps(asdict(entry), indent=2), "    "))
        file.write("\n  ]\n}\n")


def read_index(path: Path, split: str) -> tuple[dict, Entries]:
    """What `write_index` wrote: the head, and the entries of one split.

    Raises:
        Exception: of any kind, where the file is missing or damaged.
    """
    with path.open() as file:
        text = file.read(PIECE)
        start = text.index(ENTRIES)
        head = json.loads(text[:start].rstrip().removesuffix(",") + "}")
        every = (Entry(**found) for found in _objects(text[start + len(ENTRIES) :], file))
        return head, Entries(entry for entry in every if entry.split == split)


def _objects(text: str, file: TextIO) -> Iterator[dict]:
    """The objects of a list in JSON whose beginning has been read, up to its closing bracket."""
    decoder, place = json.JSONDecoder(), 0
    while True:
        while text[place : place + 1] in (" ", "\n", ","):
            place += 1
        if text[place : place + 1] == "]":
            return
        try:
            found, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            more = file.read(PIECE)
            if not more or len(text) - place > LONGEST:
                raise
            text, place = text[place:] + more, 0
            continue
        yield found
