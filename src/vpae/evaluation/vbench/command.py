"""The words after `vpae evaluation`: `score`, `run`, `sample` and `weights`. Without one, it is the stage."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import yaml
from pydantic import ValidationError

from vpae.artifacts import ArtifactError, sha256
from vpae.config import VBench, VBenchDimension, VBenchFolder
from vpae.evaluation.vbench import scores
from vpae.experiment import RESULTS, ConfigError, load
from vpae.parts import Part

CACHE = VBench().weights
DIMENSIONS = get_args(VBenchDimension)
TINY_STATE = "tiny"  # folder for what the tiny backbones keep


def add_commands(evaluation: argparse.ArgumentParser) -> None:
    """Add the words to the parser of the stage."""
    words = evaluation.add_subparsers(metavar="WORD", title="VBench-I2V for any folder (instead of the stage)")

    score = words.add_parser("score", help="totals of VBench's result files")
    score.add_argument("files", nargs="+", type=Path, metavar="RESULTS_eval_results.json")
    score.add_argument("--json", action="store_true", help="the four totals in points, for programs")
    score.add_argument("--suite", type=Path, help="prompt suite whose videos are counted (default: the official one)")
    score.set_defaults(run=_score)

    run = words.add_parser("run", help="measure a folder of videos")
    run.add_argument("--config", dest="folder_config", type=Path, help="YAML file with these settings; see docs")
    run.add_argument("--experiment", type=Path, help="an experiment's YAML file: its samples, for its evaluation stage")
    run.add_argument("--results", type=Path, default=RESULTS, help="folder of all results, with --experiment")
    run.add_argument("--videos", help="folder of videos, {prompt}-{0..4}.mp4")
    run.add_argument("--images", help="folder of input images, or of VBench's crops")
    run.add_argument("--suite", help="VBench's vbench2_i2v_full_info.json; without it, all videos of the folder")
    run.add_argument("--out", help="folder of records and results")
    run.add_argument("--name", help="results are NAME_eval_results.json and so on")
    run.add_argument("--dimensions", nargs="+", choices=DIMENSIONS, metavar="DIMENSION", help="default: all nine")
    run.add_argument("--weights", help=f"folder of weight files (default: {CACHE})")
    run.add_argument("--backbones", choices=("official", "tiny"))
    run.add_argument("--teacher", help="pipeline folder whose image encoder the tiny backbones use")
    run.add_argument("--clip-dtype", choices=("float16", "float32"))
    run.add_argument("--ratio", help="of VBench's crops, e.g. 16-9 (default: nearest to the videos' size)")
    run.add_argument("--samples-per-prompt", type=int, help="default: 5")
    run.add_argument("--shard", metavar="I/N", help="measure every N-th video from the I-th; without it, gather all")
    run.add_argument("--allow-incomplete", action="store_true", default=None, help="score what is there, and say n/N")
    run.set_defaults(run=_run)

    sample = words.add_parser("sample", help="animate the images of a prompt suite")
    sample.add_argument("--model", type=Path, required=True, help="pipeline folder, e.g. .../equilibrium/student")
    sample.add_argument("--suite", type=Path, required=True, help="VBench's vbench2_i2v_full_info.json")
    sample.add_argument("--images", type=Path, required=True, help="folder of VBench's crops, or of the images")
    sample.add_argument("--out", type=Path, required=True, help="folder of the videos")
    sample.add_argument("--dimensions", nargs="+", choices=DIMENSIONS, metavar="DIMENSION", default=DIMENSIONS)
    sample.add_argument("--steps", type=int, default=1)
    sample.add_argument("--guidance", type=float, default=1.0, help="w in u + w (c - u); 1 = off")
    sample.add_argument("--ratio", default="auto", help="of VBench's crops (default: nearest to the model's size)")
    sample.add_argument("--samples-per-prompt", type=int, default=5)
    sample.add_argument("--shard", metavar="I/N", default="1/1", help="make every N-th video from the I-th")
    sample.set_defaults(run=_sample)

    weights = words.add_parser("weights", help="check or fetch the weight files of the official backbones")
    what = weights.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="say what is missing, without network (default)")
    what.add_argument("--fetch", action="store_true", help="download what is missing, and verify it")
    weights.add_argument("--root", type=Path, default=Path(CACHE), help=f"folder of weight files (default: {CACHE})")
    weights.set_defaults(run=_weights)


def _score(arguments: argparse.Namespace) -> None:
    found = scores.read_results(arguments.files)
    if arguments.json:
        print(json.dumps(scores.summary(found.values)))
        return
    expected, gaps, source = dict(scores.OFFICIAL_COUNTS), {}, "the official suite"
    if arguments.suite:
        from vpae.evaluation.vbench.suite import counts, read_suite

        expected, source = counts(read_suite(arguments.suite)), str(arguments.suite)
    elif (own := _account_beside(arguments.files[0])) is not None:
        expected = {name: entry["expected"] for name, entry in own["dimensions"].items()}
        gaps = {name: entry["reason"] for name, entry in own["dimensions"].items() if "reason" in entry}
        source = f"what was to be scored; networks: {own['backbones']}"
    print(scores.table(found.values, found.counts, expected, gaps))
    print(f"\nvideos: measured / {source}")


def _account_beside(results: Path) -> dict | None:
    """What `vpae evaluation run` wrote beside VBench's file, if it did."""
    path = results.with_name(results.name.replace("_eval_results", "_scores"))
    return json.loads(path.read_text()) if path != results and path.is_file() else None


def folder_settings(arguments: argparse.Namespace) -> VBenchFolder:
    """The settings of `run`: the file's, overlaid by what stands on the command line.

    Raises:
        ConfigError: naming the file or the option, the key and the remedy.
    """
    path, tree = arguments.folder_config, {}
    if path:
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; docs/vbench.md shows one")
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: the file must hold settings (key: value)")
    given = {key: getattr(arguments, key) for key in VBenchFolder.model_fields if hasattr(arguments, key)}
    tree |= {key: value for key, value in given.items() if value is not None}
    try:
        return VBenchFolder.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, problem) for problem in error.errors())) from error


def _explain(path: Path | None, problem: Mapping) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    where = f"{path}: {key}" if path else f"--{key.replace('_', '-')}"
    if problem["type"] == "missing":
        return f"{where}: is required"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key; there are {', '.join(VBenchFolder.model_fields)}"
    return f"{where}: {problem['msg']} (got {problem['input']!r})"


def _run(arguments: argparse.Namespace) -> None:
    shard = _shard(arguments.shard) if arguments.shard else None
    if arguments.experiment:
        from vpae.evaluation.vbench.rows import run_part

        print(run_part(load(arguments.experiment), arguments.results, arguments.dimensions or (), shard))
        return
    settings = folder_settings(arguments)
    from vpae.evaluation.vbench import networks, results, runner

    plan = make_plan(settings)
    out, tolerant = _path(settings.out), settings.allow_incomplete
    why: dict[str, str] = {}
    if settings.backbones == "official":
        nets, why = networks.official_networks(settings, tolerant)
    elif settings.backbones == "tiny":
        if not settings.teacher:
            raise ConfigError("--teacher: is required with --backbones tiny: a pipeline folder")
        nets = networks.tiny_networks(_path(settings.teacher), out / TINY_STATE)
    else:
        raise ConfigError("--backbones: off measures nothing; choose official or tiny")
    records = out / "records"
    # What the tiny backbones lack is no gap that could be filled.
    absent = tolerant or settings.backbones == "tiny"
    outcome = runner.run(plan.clips, nets, records, shard, tolerant, absent, not_computed=why)
    if shard:
        print(f"{records}: {outcome.computed} new records; when all shards are done, run this without --shard")
        return
    gathered = runner.gather(plan.clips, nets, records)
    found = results.score(plan, gathered, outcome.not_computed, tolerant)
    accounted = results.account(
        found,
        plan,
        gathered,
        nets.backbones.name,
        outcome.damaged,
        comparable=_as_published(settings),
        settings=settings.model_dump(mode="json", exclude={"sampling", "videos", "out", "weights"}),
        suite_sha256=sha256(_path(settings.suite)) if settings.suite else None,
        sampling=_sampling(settings),
    )
    written = results.write(out, settings.name, plan, gathered, found, accounted)
    print(found.table())
    print(f"\nnetworks: {nets.backbones.name}\n{written}")


def _path(text: str) -> Path:
    return Path(text).expanduser()


def make_plan(settings: VBenchFolder):
    """The videos to score, of a suite or of a folder."""
    from vpae.evaluation.vbench.networks import wanted
    from vpae.evaluation.vbench.suite import plan_folder, plan_suite, read_suite

    videos, images = _path(settings.videos), _path(settings.images) if settings.images else None
    if not settings.suite:
        return plan_folder(videos, images, wanted(settings))
    return plan_suite(
        read_suite(_path(settings.suite)),
        videos,
        images,
        wanted(settings),
        settings.ratio,
        settings.samples_per_prompt,
        settings.allow_incomplete,
    )


def _as_published(settings: VBenchFolder) -> bool:
    """Whether these are the suite, the number of videos and the networks of the leaderboard."""
    from vpae.evaluation.vbench.suite import SAMPLES
    from vpae.evaluation.vbench.weights import manifest

    if settings.backbones != "official" or settings.samples_per_prompt != SAMPLES or not settings.suite:
        return False
    official = next(weight for weight in manifest() if not weight.dimensions)
    return sha256(_path(settings.suite)) == official.sha256


def _sampling(settings: VBenchFolder) -> dict:
    """How the videos were made: what `sample` noted beside them, and what the settings add."""
    from vpae.evaluation.vbench.sample import NOTE

    noted = _path(settings.videos) / NOTE
    return (json.loads(noted.read_text()) if noted.is_file() else {}) | settings.sampling


def _shard(text: str) -> Part:
    try:
        return Part.parse(text)
    except ValueError as error:
        raise ConfigError(f"--shard {error}") from error


def _sample(arguments: argparse.Namespace) -> None:
    from vpae.evaluation.vbench.sample import sample_suite

    made = sample_suite(
        arguments.model,
        arguments.suite,
        arguments.images,
        arguments.out,
        dimensions=arguments.dimensions,
        steps=arguments.steps,
        guidance_scale=arguments.guidance,
        ratio=arguments.ratio,
        samples=arguments.samples_per_prompt,
        part=_shard(arguments.shard),
    )
    print(f"{arguments.out}: {made} new videos")


def _weights(arguments: argparse.Namespace) -> int:
    from vpae.evaluation.vbench import weights

    root = arguments.root.expanduser()
    if arguments.fetch:
        try:
            weights.fetch(root)
        except OSError as error:
            raise ArtifactError(f"{root}: {error}") from error
    text, complete = weights.report(root)
    print(text)
    return 0 if complete else 2
