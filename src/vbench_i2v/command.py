"""The words `score`, `run` and `weights`, of `vbench-i2v` and of `vpae evaluation`."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import ValidationError

from vbench_i2v import scores
from vbench_i2v.errors import VBenchError
from vbench_i2v.files import read_yaml, user_path
from vbench_i2v.parts import Part
from vbench_i2v.settings import Folder, Measure

CACHE = Measure().weights
DIMENSIONS = tuple(scores.COLUMNS)
Settings = TypeVar("Settings", bound=Folder)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (2: bad input)."""
    parser = argparse.ArgumentParser(prog="vbench-i2v", description="VBench-I2V's nine dimensions and their totals.")
    words = parser.add_subparsers(required=True, metavar="WORD")
    add_words(words)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (VBenchError, OSError) as error:
        print(f"vbench-i2v: {error}", file=sys.stderr)
        return 2


def add_words(words) -> argparse.ArgumentParser:
    """Add the words to a parser's sub-commands; returns `run`, to which others may add options."""
    score = words.add_parser("score", help="totals of VBench's result files")
    score.add_argument("files", nargs="+", type=Path, metavar="RESULTS_eval_results.json")
    score.add_argument("--json", action="store_true", help="the four totals in points, for programs")
    score.add_argument("--suite", type=Path, help="prompt suite whose videos are counted (default: the official one)")
    score.set_defaults(run=_score)

    run = words.add_parser("run", help="measure a folder of videos")
    run.add_argument("--config", dest="folder_config", type=Path, help="YAML file with these settings; see docs")
    run.add_argument("--videos", help="folder of videos, {prompt}-{0..4}.mp4")
    run.add_argument("--images", help="folder of input images, or of VBench's crops")
    run.add_argument("--suite", help="VBench's vbench2_i2v_full_info.json; without it, all videos of the folder")
    run.add_argument("--out", help="folder of records and results")
    run.add_argument("--name", help="results are NAME_eval_results.json and so on")
    add_dimensions(run)
    run.add_argument("--weights", help=f"folder of weight files (default: {CACHE})")
    run.add_argument(
        "--clip-dtype", choices=("float16", "float32"), help="of CLIP; default: float16, as published scores had"
    )
    run.add_argument("--ratio", help="of VBench's crops, e.g. 16-9 (default: nearest to the videos' size)")
    run.add_argument("--samples-per-prompt", type=int, help="default: 5")
    add_part(run, "measure one part of the videos; without it, gather all")
    run.add_argument("--allow-incomplete", action="store_true", default=None, help="score what is there, and say n/N")
    run.set_defaults(run=_run)

    weights = words.add_parser("weights", help="check or fetch the weight files of the official networks")
    weights.add_argument("files", nargs="*", metavar="FILE", help="only these, and those of --dimensions")
    what = weights.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="say what is missing, without network (default)")
    what.add_argument("--fetch", action="store_true", help="download what is missing, and verify it")
    weights.add_argument("--mirror", default="", help="address of a folder to fetch all files from, by their names")
    add_dimensions(weights)
    weights.add_argument("--root", type=Path, default=Path(CACHE), help=f"folder of weight files (default: {CACHE})")
    weights.set_defaults(run=_weights)
    return run


def add_dimensions(command: argparse.ArgumentParser) -> None:
    """The option that names some of the nine."""
    command.add_argument("--dimensions", nargs="+", choices=DIMENSIONS, metavar="DIMENSION", help="default: all nine")


def add_part(command: argparse.ArgumentParser, text: str) -> None:
    """The option that shares work among jobs; `--shard` is its older name."""
    command.add_argument("--part", "--shard", dest="part", metavar="N/OF", help=text)


def part_of(arguments: argparse.Namespace) -> Part | None:
    """The part asked for.

    Raises:
        VBenchError: it is none.
    """
    try:
        return Part.parse(arguments.part) if arguments.part else None
    except ValueError as error:
        raise VBenchError(f"--part {error}") from error


def _score(arguments: argparse.Namespace) -> None:
    found = scores.read_results(arguments.files)
    if arguments.json:
        print(json.dumps(scores.summary(found.values)))
        return
    expected, gaps, source = dict(scores.OFFICIAL_COUNTS), {}, "the official suite"
    accounts = [(own, scores.read_results([file]).values) for file in arguments.files if (own := _account_beside(file))]
    if arguments.suite:
        from vbench_i2v.suite import SAMPLES, counts, read_suite

        samples = accounts[0][0].samples if accounts else None
        expected, source = counts(read_suite(arguments.suite), samples or SAMPLES), str(arguments.suite)
    else:
        for own, _ in accounts:
            expected, gaps = expected | own.expected, gaps | own.gaps
            source = f"what was to be scored; networks: {own.of}"
        for own, held in accounts:  # of several files, each knows its own dimensions best
            expected |= {name: own.expected[name] for name in held}
    print(scores.table(found.values, found.counts, expected, gaps))
    print(f"\nvideos: measured / {source}")


class _Account(NamedTuple):
    """What `run` wrote beside VBench's file: videos of each dimension, reasons of those left out, networks, and videos
    of a prompt."""

    expected: dict[str, int]
    gaps: dict[str, str]
    of: str
    samples: int | None


def _account_beside(results: Path) -> _Account | None:
    """The account beside a file; none of a file that others have written.

    Raises:
        VBenchError: it cannot be read.
    """
    path = results.with_name(results.name.replace("_eval_results", "_scores"))
    if path == results or not path.is_file():
        return None
    try:
        own = json.loads(path.read_text(encoding="utf-8-sig"))
        dimensions = own["dimensions"].items()
        expected = {name: int(entry["expected"]) for name, entry in dimensions}
        gaps = {name: str(entry["reason"]) for name, entry in dimensions if "reason" in entry}
        return _Account(expected, gaps, str(own["backbones"]), own.get("settings", {}).get("samples_per_prompt"))
    except Exception as error:
        raise VBenchError(f"{path}: cannot be read ({error!r}); score the videos again, or delete it") from error


def folder_settings(arguments: argparse.Namespace, kind: type[Settings] = Folder) -> Settings:
    """The settings of `run`: the file's, overlaid by what stands on the command line.

    Raises:
        VBenchError: naming the file or the option, the key and the remedy.
    """
    path, tree = arguments.folder_config, {}
    if path:
        if not path.is_file():
            raise VBenchError(f"{path} does not exist; docs/vbench.md shows one")
        try:
            tree = read_yaml(path.read_text(encoding="utf-8-sig"))
        except Exception as error:  # a date that is none is a ValueError, deep nesting a RecursionError
            raise VBenchError(f"{path}: not valid YAML: {error}") from error
        if not isinstance(tree, dict):
            raise VBenchError(f"{path}: the file must hold settings (key: value)")
    given = {key: getattr(arguments, key) for key in kind.model_fields if hasattr(arguments, key)}
    tree |= {key: value for key, value in given.items() if value is not None}
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        said = (_explain(None if given.get(p["loc"][0]) is not None else path, p, kind) for p in error.errors())
        raise VBenchError("\n".join(said)) from error


def _explain(path: Path | None, problem: Mapping, kind: type[Folder]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    where = f"{path}: {key}" if path else f"--{key.replace('_', '-')}"
    if problem["type"] == "missing":
        return f"{where}: is required"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key; there are {', '.join(kind.model_fields)}"
    return f"{where}: {problem['msg']} (got {problem['input']!r})"


def _run(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from vbench_i2v.folder import score_folder

    print(score_folder(folder_settings(arguments), part=part_of(arguments), track=tqdm))


def _weights(arguments: argparse.Namespace) -> int:
    from vbench_i2v import weights

    root, failed = user_path(arguments.root), []
    chosen = weights.chosen(arguments.files, arguments.dimensions or ())
    if arguments.fetch:
        try:
            _, failed = weights.fetch(root, chosen, arguments.mirror)
        except OSError as error:
            raise VBenchError(f"{root}: {error}") from error
    text, complete = weights.report(root, chosen)
    print("\n".join([text, *(f"not fetched: {why}" for why in failed)]))
    return 0 if complete else 2
