"""`python -m vpae.bench.decoders FOLDER`: PyAV, decord and torchcodec on real videos, where they are installed.

Prints for each decoder frames per CPU-second (one thread, every frame to RGB, best of three), peak memory of a process
of its own, the greatest mean difference of a frame from PyAV's, and for files with a hole how many are refused, and how
many give other frames without an error. The default decoder of `data.video` follows from this table.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from vbench_i2v.media import VideoError, probe, pyav_frames
from vpae.data.video import decord_frames

HOLE = 333  # bytes set to zero
PLACES = 4  # of a hole, in each file


def torchcodec_frames(path: Path) -> Iterator[np.ndarray]:
    """Decode by torchcodec, one frame after the other."""
    from torchcodec.decoders import VideoDecoder

    try:
        for frame in VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC"):
            yield frame.numpy()
    except (RuntimeError, ValueError) as error:
        raise VideoError(f"torchcodec: {error}") from error


DECODERS: dict[str, Callable[[Path], Iterator[np.ndarray]]] = {
    "pyav": pyav_frames,
    "decord": decord_frames,
    "torchcodec": torchcodec_frames,
}


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="vpae.bench.decoders", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path, help="of .mp4 files with one video stream each; others are left out")
    parser.add_argument("--decoder", choices=DECODERS, help="only this one, as one line of JSON")
    arguments = parser.parse_args(argv)
    if arguments.decoder:
        paths = [path for path in sorted(arguments.folder.glob("*.mp4")) if probe(path).streams == 1]
        print(json.dumps(_measure(arguments.decoder, paths)))
        return 0
    print("| decoder | frames / CPU-s | peak MiB | difference | damaged: refused | other frames, no word |")
    print("|---|---|---|---|---|---|")
    for name in DECODERS:
        command = [sys.executable, "-m", "vpae.bench.decoders", str(arguments.folder), "--decoder", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"| {name} | not installed: {(done.stderr.splitlines() or ['no reason'])[-1][:80]} | | | | |")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {name} | {found['rate']:.0f} | {found['peak_mib']:.0f} | {found['difference']:.3f} | "
            f"{found['refused']} of {found['damaged']} | {found['silent']} |"
        )
    return 0


def _measure(name: str, paths: list[Path]) -> dict:
    decode, frames, seconds = DECODERS[name], 0, 0.0
    for path in paths:
        times = []
        for _ in range(3):
            start = time.process_time()
            count = sum(1 for _ in decode(path))
            times.append(time.process_time() - start)
        frames, seconds = frames + count, seconds + min(times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    difference = max(_difference(decode(path), pyav_frames(path)) for path in paths)
    outcomes = [one for path in paths for one in _damaged(decode, path)]
    return {
        "rate": frames / seconds,
        "peak_mib": peak,
        "difference": difference,
        "damaged": len(outcomes),
        "refused": outcomes.count("refused"),
        "silent": outcomes.count("silent"),
    }


def _difference(some: Iterator[np.ndarray], others: Iterator[np.ndarray]) -> float:
    pairs = zip(some, others, strict=True)
    return max(float(np.abs(one.astype(np.int16) - other).mean()) for one, other in pairs)


def _damaged(decode: Callable[[Path], Iterator[np.ndarray]], path: Path) -> Iterator[str]:
    """What a decoder makes of a file with a hole: "refused", "silent" (other frames), or "same"."""
    whole = path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        spoilt = Path(folder) / path.name
        first = whole.find(b"mdat") + 4
        for place in np.linspace(first, len(whole) - HOLE, PLACES + 2).astype(int)[1:-1]:
            spoilt.write_bytes(whole[:place] + bytes(HOLE) + whole[place + HOLE :])
            try:
                yield "same" if _difference(decode(spoilt), pyav_frames(path)) < 0.5 else "silent"
            except VideoError:
                yield "refused"
            except ValueError:  # fewer or more frames
                yield "silent"


if __name__ == "__main__":
    raise SystemExit(main())
