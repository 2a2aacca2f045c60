"""The manifest, `manifest.parquet`: one row a clip, in the order of their keys; read and written piece by piece."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vpae.artifacts import ArtifactError, content, reading
from vpae.config import Geometry
from vpae.data.video import read_clip

MANIFEST = "manifest.parquet"
ROWS = 1024  # of a row group: what is in memory at a time


def table_of(row: type, **others: pa.DataType) -> pa.Schema:
    """The columns of a table whose rows are such objects; `others` are those of a type of their own."""
    usual = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    return pa.schema([(name, others.get(name) or usual[kind]) for name, kind in get_type_hints(row).items()])


@dataclass(frozen=True, slots=True)
class Clip:
    """One row of the manifest: a usable clip.

    Attributes:
        key: its name; the same content always has the same.
        path: of the file; relative ones start at the manifest's folder, or where a link to it stands.
        split: "train" or "held_out".
        caption: as it was given.
        width: pixels of the file, upright.
        height: pixels of the file, upright.
        fps: frames per second of the file.
        sha256: of the file.
        start: seconds after the file's beginning at which the clip begins.
        motion: mean change of a pixel (0 to 1) from frame to frame.
        jump: greatest mean change of a pixel (0 to 1) between two neighbouring frames.
    """

    key: str
    path: str
    split: str
    caption: str
    width: int
    height: int
    fps: float
    sha256: str
    start: float = 0.0
    motion: float = 0.0
    jump: float = 0.0

    def frames(self, geometry: Geometry, folder: Path) -> np.ndarray:
        """Decode in the experiment's geometry, uint8 (T, H, W, 3).

        Raises:
            ArtifactError: the file is not the one that was catalogued.
        """
        path = Path(os.path.normpath(folder / self.path))  # the folder may be a link to somewhere else
        if not path.is_file() or content(path) != self.sha256:
            raise ArtifactError(
                f"{path} is missing or has changed since it was catalogued; run the clips stage again (if that says "
                f"it is up to date, delete {folder})"
            )
        return read_clip(path, geometry.frames, geometry.height, geometry.width, geometry.fps, self.start)


SCHEMA = table_of(Clip, path=pa.binary(), width=pa.int32(), height=pa.int32())  # a file name need not be text


def write_manifest(folder: Path, clips: Iterable[Clip]) -> None:
    """Write the manifest without holding more than a row group."""
    write_rows(folder / MANIFEST, SCHEMA, ({**asdict(clip), "path": os.fsencode(clip.path)} for clip in clips))


def write_rows(path: Path, schema: pa.Schema, rows: Iterator[dict]) -> None:
    """Write a parquet table row group by row group."""
    with pq.ParquetWriter(path, schema) as writer:
        while piece := list(islice(rows, ROWS)):
            writer.write_table(pa.Table.from_pylist(piece, schema))


def iterate_manifest(folder: Path, split: str | None = None) -> Iterator[Clip]:
    """The clips of a finished clips folder, in the order of their keys, a row group in memory at a time.

    Raises:
        ArtifactError: it is no manifest.
    """
    path = folder / MANIFEST
    with reading(path, "run the clips stage again"), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS):
            for row in (batch.filter(pc.equal(batch["split"], split)) if split else batch).to_pylist():
                yield Clip(**{**row, "path": os.fsdecode(row["path"])})


def count_clips(folder: Path) -> int:
    """How many clips a manifest has."""
    with reading(folder / MANIFEST, "run the clips stage again"):
        return pq.read_metadata(folder / MANIFEST).num_rows


def read_manifest(folder: Path, split: str | None = None) -> list[Clip]:
    """All clips of a finished clips folder at once."""
    return list(iterate_manifest(folder, split))
