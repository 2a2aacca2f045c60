"""Candidates: the rows of a table, or the files of a folder, before any video is opened.

Tables are read row by row (CSV, JSONL) or row group by row group (parquet), so that memory does not grow with them.
What later jobs need of it goes into a parquet file of small row groups, of which each job reads its own.
"""

import csv
import json
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import chain, islice, repeat
from pathlib import Path
from string import Formatter
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vbench_i2v.files import tree
from vpae.artifacts import ArtifactError, reading
from vpae.config.clips import Clips, Columns, Filters
from vpae.data.manifest import ROWS, table_of, write_rows

SUFFIXES = (".mp4", ".m4v", ".mkv", ".mov", ".webm", ".avi")
OTHERS = (".gif", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts", ".m2ts", ".3gp", ".ogv")  # not looked for, but named
SEPARATORS = {";": "';'", "\t": "tabs", "|": "'|'"}  # of what is called CSV and has no commas
STATS_AT_ONCE = 16  # a file system over the network answers many questions as fast as one


class Candidate(NamedTuple):
    """A clip that was named: a stretch of a file, to its end where `stop` is None.

    `reason` says why it is not wanted, as far as that is known without opening the file; empty: it may be.
    """

    path: str
    caption: str
    start: float = 0.0
    stop: float | None = None
    reason: str = ""


SCHEMA = table_of(Candidate, path=pa.binary(), stop=pa.float64())  # a file name need not be text


def candidates(clips: Clips) -> Iterator[Candidate]:
    """Every clip that the folder or table names, in a fixed order.

    Raises:
        ArtifactError: no such folder or table, or a row of another form; the message names it.
    """
    if clips.source == "folder":
        yield from _of_folder(Path(clips.path))
        return
    table = Path(clips.path)
    if not table.is_file():
        raise ArtifactError(f"clips.path = {table}: no such table")
    if (kind := table.suffix.lower()) not in ROWS_OF:
        raise ArtifactError(f"clips.path = {table}: a table's suffix names its format: {', '.join(ROWS_OF)}; rename it")
    root, read = str(clips.root or table.parent), _Reader(table, clips.columns, clips.filters)
    remedy = "copy or download it again, or correct its suffix" if kind == ".parquet" else "save it as UTF-8 text"
    with reading(table, remedy):
        for number, row in enumerate(ROWS_OF[kind](table), 1):
            yield read.candidate(root, number, row)


def identity(clips: Clips) -> str:
    """Digest of all candidates and of the size and date of their files."""
    digest, named = sha256(), candidates(clips)
    with ThreadPoolExecutor(STATS_AT_ONCE) as pool:
        while some := list(islice(named, 64 * ROWS)):
            pieces = [some[start : start + ROWS] for start in range(0, len(some), ROWS)]
            for piece, stats in zip(pieces, pool.map(_sizes_and_dates, pieces), strict=True):
                digest.update(repr((piece, stats)).encode())
    return digest.hexdigest()


def write_candidates(path: Path, clips: Clips) -> int:
    """Write all candidates where `read_candidates` finds a few of them.

    Returns:
        How many of a folder's videos have their own name for a caption.
    """
    named = 0

    def rows() -> Iterator[dict]:
        nonlocal named
        for one in candidates(clips):
            named += clips.source == "folder" and not one.reason and one.caption == _told_by_name(Path(one.path))
            yield {**one._asdict(), "path": os.fsencode(one.path)}

    write_rows(path, SCHEMA, rows())
    return named


def count_candidates(path: Path) -> int:
    """How many there are."""
    return pq.read_metadata(path).num_rows


def read_candidates(path: Path, first: int, count: int) -> list[Candidate]:
    """Some of the candidates; reads only the row groups in which they are."""
    groups = range(first // ROWS, (first + count - 1) // ROWS + 1)
    with pq.ParquetFile(path) as file:
        rows = file.read_row_groups(groups).slice(first - groups[0] * ROWS, count).to_pylist()
    return [Candidate(**{**row, "path": os.fsdecode(row["path"])}) for row in rows]


def _sizes_and_dates(some: list[Candidate]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for one in some:
        try:
            stat = os.stat(one.path)
            found.append((stat.st_size, stat.st_mtime_ns))
        except (OSError, ValueError):  # not there, or no path at all: which of them, its check will say
            found.append(())
    return found


def _of_folder(root: Path) -> Iterator[Candidate]:
    """Videos with captions from X.txt beside X.mp4, else from the file's name; what is hidden is nobody's clip."""
    if not root.is_dir():
        raise ArtifactError(f"clips.path = {root}: no such folder")
    for video in tree(root):
        if video.suffix.lower() in OTHERS:
            yield Candidate(str(video), "", reason=f"a folder's videos are {', '.join(SUFFIXES)}; name it in a table")
        if video.suffix.lower() not in SUFFIXES:
            continue
        text = next((p for s in (".txt", ".TXT") if (p := video.with_suffix(s)).is_file()), None)
        try:
            caption = text.read_text(encoding="utf-8-sig").strip() if text else _told_by_name(video)
            yield Candidate(str(video), caption)
        except (OSError, UnicodeDecodeError):
            yield Candidate(str(video), "", reason=f"its caption {text.name} is not UTF-8 text that can be read")


def _told_by_name(video: Path) -> str:
    return os.fsencode(video.stem).decode(errors="replace").replace("_", " ").replace("-", " ")


def _parquet_rows(table: Path) -> Iterator[dict]:
    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches(ROWS):
            yield from batch.to_pylist()


def _json_rows(table: Path) -> Iterator[dict]:
    with table.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                with reading(table, f"correct its line {number}: JSONL has one object in each line"):
                    if not isinstance(row := json.loads(line), dict):
                        raise TypeError(f"a {type(row).__name__}")
                yield row


def _csv_rows(table: Path) -> Iterator[dict]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        lines, ended = csv.reader(file, strict=True), 0
        try:
            header = next(lines, [])
            if len(header) == 1 and (other := next((s for s in SEPARATORS if s in header[0]), "")):
                raise ArtifactError(f"{table}: its cells are separated by {SEPARATORS[other]}: save it with commas")
            ended = lines.line_num
            for line in lines:
                ended = lines.line_num
                if any(line[len(header) :]):
                    raise ArtifactError(
                        f"{table}: line {lines.line_num} has {len(line)} cells and the header {len(header)}; put texts "
                        "that hold commas in double quotes"
                    )
                if line:  # a row that is too short has nothing in its last columns
                    yield dict(zip(header, chain(line, repeat(None)), strict=False))
        except csv.Error as error:
            if "field limit" in str(error):  # as an open quote makes it, too
                raise ArtifactError(
                    f"{table}: line {ended + 1}: a cell has more than {csv.field_size_limit()} characters; shorten it, "
                    "or close the double quote that opens it"
                ) from error
            raise ArtifactError(
                f"{table}: line {lines.line_num}: {error}; within a quoted text, write each double quote twice"
            ) from error


ROWS_OF = {".csv": _csv_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}  # a few rows in memory at a time


class _Reader:
    """Makes candidates of a table's rows."""

    def __init__(self, table: Path, columns: Columns, filters: Filters):
        self.table, self.columns, self.filters = table, columns, filters
        try:
            self.path_columns = [name for _, name, *_ in Formatter().parse(columns.path) if name is not None]
        except ValueError as error:
            raise ArtifactError(f"clips.columns.path = {columns.path}: {error}") from error
        times = [name for name in (columns.start, columns.end, columns.span) if name]
        self.other_columns = {*times, *filters.at_least, *filters.at_most}

    def candidate(self, root: str, number: int, row: dict) -> Candidate:
        needed = list(dict.fromkeys([*self.path_columns, self.columns.caption]))
        if not row.keys() >= set(needed):
            raise ArtifactError(
                f"{self.table}: row {number}: needs the columns {' and '.join(needed)}; it has "
                f"{', '.join(map(str, row)) or 'none'}: set clips.columns"
            )
        if not self.other_columns <= row.keys():
            lacking = ", ".join(sorted(self.other_columns - row.keys()))
            raise ArtifactError(
                f"{self.table}: row {number}: has no column {lacking}, which clips.columns or filters name"
            )
        path, caption = self.columns.path, row[self.columns.caption]
        for name in self.path_columns:
            if not isinstance(value := row[name], str) or not value:
                found = "empty" if value in (None, "") else f"no text, but {value!r}"
                return Candidate(f"{self.table}: row {number}", "", reason=f"its {name} is {found}")
            path = path.replace(f"{{{name}}}", value)
        path = os.path.join(root, path)
        try:
            os.fsencode(path)
        except UnicodeEncodeError:
            return Candidate(f"{self.table}: row {number}", "", reason=f"its path {path!a} can be no file's name")
        if not isinstance(caption, str):
            found = "it has no caption" if caption is None else f"its caption is no text, but {caption!r}"
            return Candidate(path, "", reason=found)
        try:
            caption.encode()
            start, stop = self._span(row)
        except UnicodeEncodeError:
            return Candidate(path, "", reason=f"its caption {caption!a} is no text")
        except ValueError as error:
            return Candidate(path, caption, reason=str(error))
        return Candidate(path, caption, start, stop, self._reason(row, start, stop))

    def _span(self, row: dict) -> tuple[float, float | None]:
        columns = self.columns
        if columns.span:
            times = row[columns.span]
            if isinstance(times, str):
                times = re.findall(r"[\d:.]+", times)
            if not isinstance(times, list | tuple) or len(times) != 2:
                raise ValueError(f"{columns.span} = {row[columns.span]!r} is not a start and an end")
            start, stop = map(_seconds, times)
        else:
            start = _seconds(row[columns.start]) if columns.start else 0.0
            stop = _seconds(row[columns.end]) if columns.end else None
        if stop is not None and not 0 <= start < stop:
            raise ValueError(f"it lasts from {start:g} s to {stop:g} s")
        return start, stop

    def _reason(self, row: dict, start: float, stop: float | None) -> str:
        for name, least in self.filters.at_least.items():
            if not (value := _number(row[name])) >= least:  # so that no number is not enough either
                return f"{name} = {value:g} is less than {least:g}"
        for name, most in self.filters.at_most.items():
            if not (value := _number(row[name])) <= most:
                return f"{name} = {value:g} is more than {most:g}"
        return too_short_or_long(stop - start, self.filters) if stop is not None else ""


def too_short_or_long(seconds: float, filters: Filters) -> str:
    """The reason why a clip's length is not wanted, or an empty text."""
    if seconds < filters.min_seconds:
        return f"{seconds:g} s are less than {filters.min_seconds:g}"
    if filters.max_seconds and seconds > filters.max_seconds:
        return f"{seconds:g} s are more than {filters.max_seconds:g}"
    return ""


def _seconds(value: object) -> float:
    """From a number, or from text such as 83.5 or 0:01:23.500."""
    try:
        parts = [float(part) for part in str(value).split(":")]
        seconds = sum(part * 60**power for power, part in enumerate(reversed(parts)))
    except (ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{value!r} is no time")
    return seconds


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan
