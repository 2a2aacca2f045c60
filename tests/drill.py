"""`make drill`: kills, hostile inputs, flipped bytes, fuzzing and a full disk, on micro; it ends with a table.

Every stage is run once undisturbed, and once more in another folder, killed at random instants and only ever run again:
what both folders hold must be equal to the last bit, but for what shows measured seconds.
"""

import argparse
import contextlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from conftest import STAGES
from started import Started
from test_fuzz import EXAMPLES
from test_inputs import WRONG, cut_out, experiment, moving, write_clip, zeros
from vpae.artifacts import file_hashes, read_provenance
from vpae.cli import main as vpae
from vpae.data.latents import LatentDataset
from vpae.experiment import load
from vpae.graph import upstream

MICRO = Path(__file__).parents[1] / "configs" / "micro.yaml"
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
ENDS = {-signal.SIGKILL, -signal.SIGTERM, 0, 3}  # 3: interrupted, the state is saved
PATIENCE = 900  # seconds that a stage may take
CHAIN = 3  # so many kills of a stage; then it is left to end, compared, and begun anew
SECONDS = ("scores.json", "table.md")  # hold measured seconds; so does the report's page
Row = tuple[str, int, int, str]  # what was tried, how often, how often with a defined outcome, and a remark


def start(stage: str, place: Path, **options: int) -> Started:
    """Begin a stage as a user does; results are in `place`/results."""
    return Started([stage, "--config", str(MICRO)], place, **options)


def content(folder: Path) -> dict[str, str]:
    """Hashes of all that a finished stage holds and that has no measured seconds in it."""
    recorded = read_provenance(folder)["outputs"]
    if recorded != file_hashes(folder):
        raise RuntimeError(f"{folder} is not what its provenance says")
    timed = SECONDS if folder.name == "evaluation" else ("index.html",) if folder.name == "report" else ()
    return {name: "" if name in timed else value for name, value in recorded.items()}


def undisturbed(place: Path, stages: list[str]) -> dict[str, float]:
    """Run the stages; returns the seconds that each took."""
    took = {}
    for stage in stages:
        begun = time.monotonic()
        code, said = start(stage, place).finish(PATIENCE)
        if code:
            raise RuntimeError(f"{stage} fails without any disturbance:\n{said}")
        took[stage] = time.monotonic() - begun
    return took


def kills(place: Path, whole: Path, took: dict[str, float], plan: list[tuple[str, float, int]]) -> list[Row]:
    """Kill, run again, compare; a plan's entries are a stage, which share of its seconds to wait, and a signal."""
    done, differences, repairs, within = 0, [], 0, 0
    for stage, seconds in took.items():
        mine, folder = [kill for kill in plan if kill[0] == stage], place / "results/micro" / stage
        for first in range(0, max(len(mine), 1), CHAIN):
            shutil.rmtree(folder, ignore_errors=True)
            for _, share, number in mine[first : first + CHAIN]:
                process = start(stage, place)
                within += not process.ends_within(share * seconds)
                process.kill(number)
                code, said = process.finish(PATIENCE)
                done += code in ENDS
                repairs += "damaged" in said
                print(f"  {stage}: {signal.Signals(number).name} after {share * seconds:.1f} s: {code}", flush=True)
                if code not in ENDS:
                    print(said)
            code, said = start(stage, place).finish(PATIENCE)
            repairs += "damaged" in said
            if code:
                raise RuntimeError(f"{stage} does not go on after it was killed:\n{said}")
            found, wanted = content(folder), content(whole / "results/micro" / stage)
            differences += [f"{stage}/{n}" for n in sorted(found | wanted) if found.get(n) != wanted.get(n)]
    names = ", ".join(dict.fromkeys(differences)) or "equal hashes of all stages"
    return [
        ("kills", len(plan), done, f"{within} before the stage's end, {repairs} repairs"),
        ("stages' results", len(took), len(took) - len({d.split("/")[0] for d in differences}), names),
    ]


def quietly(*words: object) -> tuple[int | str, str]:
    """Exit code of a command, or the exception that a user would see as a traceback; and what was said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            return vpae([str(word) for word in words]), said.getvalue()
        except SystemExit as error:
            return error.code, said.getvalue()
        except BaseException as error:
            return f"{type(error).__name__}: {error}", said.getvalue()


def hostile(place: Path, teacher: Path, rng: random.Random, count: int) -> list[Row]:
    """Options, images, clips, tables and settings that are not what they should be.

    A clip goes to quarantine by name, and the rest is used; all others end with code 2 and the culprit's name.
    """
    place.mkdir()
    Image.fromarray(moving(32, 32, 1)[0]).save(place / "first.png")
    clips = [write_clip(place / f"{i}.mp4", np.roll(moving(), i, 2)).read_bytes() for i in range(8)]
    png, settings = (place / "first.png").read_bytes(), MICRO.read_bytes()
    table = b"path,caption\n" + b"".join(b"%d.mp4,a caption\n" % i for i in range(8))
    good = {"model": teacher, "image": place / "first.png", "prompt": "x", "out": place / "clip.mp4"}
    rows: dict[str, list[bool]] = {}
    for number in range(count):
        kind = ("option", "image", "clip", "table", "settings")[number % 5]
        mine = place / f"bad-{number}"
        mine.mkdir()
        name, wanted, options = mine.name, 2, good
        if kind == "option":
            option, value, name = WRONG[number // 5 % len(WRONG)]
            options = good | {option: value}
        elif kind == "image":
            (mine / "first.png").write_bytes(png[: rng.randrange(len(png) - 100)])
            options = good | {"image": mine / "first.png"}
        elif kind == "settings":
            at, junk = rng.randrange(len(settings)), rng.choice([b"\xff\0", b"\n}{: x\n", b"\n- [\n"])
            (mine / "x.yaml").write_bytes(settings[:at] + junk + settings[at:])
            command = ["config", "check", mine / "x.yaml"]
        elif kind == "table":
            spoilt = [table[:8], b"\xff" + table, table.replace(b"path", b"p"), b"", table.replace(b".mp4", b".txt")]
            (mine / "t.csv").write_bytes(rng.choice(spoilt))
            config = experiment(mine, source="table", path=str(mine / "t.csv")).path
            command = ["clips", "--config", config, "--results", mine / "results"]
        else:
            wanted, name = 0, f"{number % 8}.mp4"
            (mine / "videos").mkdir()
            for i, data in enumerate(clips):
                (mine / f"videos/{i}.mp4").write_bytes(data)
            at, data = rng.randrange(200, len(clips[0]) - 900), clips[number % 8]
            (mine / "videos" / name).write_bytes(rng.choice([zeros(data, at), cut_out(data, at), data[:at]]))
            config = experiment(mine, source="folder", path=str(mine / "videos")).path
            command = ["clips", "--config", config, "--results", mine / "results"]
        if kind in ("option", "image"):
            command = ["sample", *(f"--{k.replace('_', '-')}={v}" for k, v in options.items())]
        code, said = quietly(*command)
        if kind == "clip" and code == 0:
            [quarantine] = mine.glob("results/*/clips/quarantine.jsonl")
            said = quarantine.read_text()
        rows.setdefault(kind, []).append(code == wanted and name in said)
        if not rows[kind][-1]:
            print(f"  {kind} {number}: {code}: {said.strip()[:400]}", flush=True)
    meant = {"clip": "in quarantine by name, the others are used"}
    return [
        (f"hostile {k}", len(v), sum(v), meant.get(k, "code 2 and a message that names it")) for k, v in rows.items()
    ]


def flips(whole: Path, place: Path, stages: list[str], rng: random.Random) -> list[Row]:
    """Change one byte of a file of each finished stage, and use it: by its own stage, and by those that read it.

    The first stage that reads the byte has to name the file; stages that do not may end, but one of all has to.
    """
    config, rows = load(MICRO).settings, []
    for use in ("its own stage", "the stages that read it"):
        found, missed = 0, []
        for stage in stages[:-1]:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(whole / "results", place)
            folder = place / "micro" / stage
            name = rng.choice([n for n, _ in sorted(read_provenance(folder)["outputs"].items())])
            start, size = 0, (folder / name).stat().st_size
            if name.endswith(".tar"):  # of a shard, what nobody reads harms nobody: a clip that all are sampled on
                first = LatentDataset(folder, "held_out").entries[0]
                name, start, size = first.shard, first.offset, first.size
            data = bytearray((folder / name).read_bytes())
            data[start + rng.randrange(size)] ^= 1 << rng.randrange(8)
            (folder / name).unlink()  # a hard link would change the other copy, too
            (folder / name).write_bytes(data)
            if use == "its own stage":
                said = quietly("verify", stage, "--config", MICRO, "--results", place)
            else:
                for reader in (name for name in stages if stage in upstream(config, name)):
                    shutil.rmtree(place / "micro" / reader)
                    said = quietly(reader, "--config", MICRO, "--results", place)
                    if said[0] != 0:
                        break
            named = said[0] == 2 and name in said[1]
            found += named
            missed += [] if named else [f"{stage}/{name}"]
        rows.append((f"flipped byte, {use}", len(stages) - 1, found, "not found: " + (", ".join(missed) or "none")))
    return rows


def fuzz(seed: int, examples: int) -> list[Row]:
    """Any bytes, changed bytes and odd values for every reader: `tests/test_fuzz.py` with other and more examples."""
    file = Path(__file__).with_name("test_fuzz.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}", str(file)]
    environment = {**os.environ, EXAMPLES: str(examples)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    if done.returncode:
        print(done.stdout[-4000:])
    tried = sum(counts.values())
    return [("fuzzed readers", tried, counts.get("passed", 0), f"{examples} examples each: read, or refused by name")]


def full_disk(whole: Path, place: Path, stages: list[str]) -> list[Row]:
    """No file may grow beyond some kilobytes while each stage runs: as on a full disk, the calls fail midway."""
    good, bad = 0, []
    for stage in stages:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole / "results", place / "results")
        folder = place / "results/micro" / stage
        largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder)
        code, said = start(stage, place, largest_file=largest // 2).finish(PATIENCE)
        fine = code == 2 and "make room" in said and not folder.exists()
        good += fine
        if not fine:
            bad.append(stage)
            print(f"  full disk, {stage}: {code}: {said[-400:]}")
    return [("full disk", len(stages), good, "code 2, no half result; not so: " + (", ".join(bad) or "none"))]


def main(words: list[str] | None = None) -> int:
    """Run the drill; the exit code is 0 if every outcome was the defined one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--inputs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=40, help="leave out kills that this time has no room for")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage")
    given = parser.parse_args(words)
    print(f"seed {given.seed}", flush=True)
    rng, stages = random.Random(given.seed), list(STAGES[: STAGES.index(given.until) + 1])
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        place = Path(folder)
        for name in ("whole", "killed"):
            (place / name).mkdir()
        took = undisturbed(place / "whole", stages)
        plan = [(stages[i % len(stages)], rng.uniform(0, 1), rng.choice(SIGNALS)) for i in range(given.kills)]
        mean = sum(took.values()) / len(took)  # a kill costs half a stage, and a third of the run that goes on
        room = int(max(0, 60 * given.minutes - 6 * sum(took.values())) / mean)
        rows = kills(place / "killed", place / "whole", took, plan[:room])
        rows += hostile(place / "hostile", place / "whole/results/micro/teacher", rng, given.inputs)
        rows += flips(place / "whole", place / "flipped", stages, rng)
        rows += fuzz(given.seed, given.inputs)
        rows += full_disk(place / "whole", place / "full", stages)
    print(f"\n| seed {given.seed} | tried | as defined | |\n|---|---|---|---|")
    for what, tried, good, remark in rows:
        print(f"| {what} | {tried} | {good} | {remark} |")
    return int(any(good < tried for _, tried, good, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
