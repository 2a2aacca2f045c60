"""`python -m vpae.bench.ingest`: how long a large table of clips takes before any video is opened, and in what memory.

Writes a table like OpenVid-1M's, and then does what the first jobs of the stage `clips` do with it: digest it, plan the
candidates, share them among a hundred jobs, and read one job's share.
"""

import argparse
import csv
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from vpae.config.clips import Clips
from vpae.data import corpus
from vpae.data.catalog import CANDIDATES, stretches
from vpae.data.manifest import write_rows
from vpae.parts import Part

JOBS = 100
CAPTION = "A person in a red coat walks slowly along a beach at dusk while the camera follows from behind. " * 4
COLUMNS = ("video", "caption", "aesthetic score", "motion score", "seconds")


def main(argv: list[str] | None = None) -> int:
    """Print seconds, CPU-seconds and peak memory of each step; the last line is for programs."""
    parser = argparse.ArgumentParser(prog="vpae.bench.ingest", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--format", choices=("csv", "parquet"), default="csv")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        table, plan = Path(folder) / f"table.{arguments.format}", Path(folder) / CANDIDATES
        _write(table, arguments.rows)
        columns, filters = {"path": "{video}"}, {"at_least": {"aesthetic score": 4.5}}
        section = {"source": "table", "path": str(table), "columns": columns, "filters": filters}
        clips = Clips.model_validate(section)
        total = _timed(f"digest {arguments.rows} rows and their files", lambda: corpus.identity(clips))
        total += _timed("plan the candidates", lambda: corpus.write_candidates(plan, clips))
        total += _timed(f"share them among {JOBS} jobs and read one share", lambda: _read_share(plan))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"rows": arguments.rows, "cpu_seconds": round(total, 2), "peak_gib": round(peak, 3)}))
    return 0


def _write(table: Path, count: int) -> None:
    rows = ((f"clips/{n:08d}.mp4", f"{n} {CAPTION}", 4 + n % 30 / 10, n % 20, 4.5) for n in range(count))
    if table.suffix == ".csv":
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(rows)
        return
    kinds = (pa.string(), pa.string(), pa.float64(), pa.float64(), pa.float64())
    schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)))
    write_rows(table, schema, (dict(zip(COLUMNS, row, strict=True)) for row in rows))


def _read_share(plan: Path) -> int:
    work = stretches(plan)
    mine = Part(JOBS // 2, JOBS).stretch(work, [len(one) for one in work])
    return sum(len(corpus.read_candidates(plan, one.start, len(one))) for one in mine)


def _timed(label: str, work: Callable[[], object]) -> float:
    start, used = time.perf_counter(), time.process_time()
    work()
    seconds, used = time.perf_counter() - start, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{label:50} {seconds:7.1f} s {used:7.1f} CPU-s {peak:6.2f} GiB", flush=True)
    return used


if __name__ == "__main__":
    raise SystemExit(main())
