"""The command line: one sub-command a stage, and `sample`, `config`. It parses and delegates."""

import argparse
import json
import os
import sys
from pathlib import Path

from vpae import __version__
from vpae.experiment import STAGES, ConfigError, load, schema, shipped

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (2: bad input, 3: interrupted and resumable)."""
    arguments = _parser().parse_args(argv)
    # What other libraries say while they load weights would bury our own progress. Set before they are imported.
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from vpae.artifacts import ArtifactError
    from vpae.training.preemption import EXIT_CODE, Interruption

    try:
        return arguments.run(arguments) or 0
    except (ConfigError, ArtifactError, FileNotFoundError) as error:
        print(f"vpae: {error}", file=sys.stderr)
        return 2
    except Interruption as interruption:
        print(f"vpae: {interruption}; run the same command again to go on", file=sys.stderr)
        return EXIT_CODE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vpae", description="One-step video diffusion by V-PAE.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for stage in STAGES:
        command = commands.add_parser(stage, help=f"run the stage `{stage}` of an experiment")
        _experiment_arguments(command)
        command.add_argument("--results", type=Path, default=Path("results"), help="folder of all results")
        command.set_defaults(run=_stage, stage=stage)

    sample = commands.add_parser("sample", help="animate one image")
    sample.add_argument("--model", type=Path, required=True, help="pipeline folder, e.g. .../equilibrium/student")
    sample.add_argument("--image", type=Path, required=True, help="first frame")
    sample.add_argument("--prompt", required=True)
    sample.add_argument("--steps", type=int, default=1)
    sample.add_argument("--guidance", type=float, default=1.0, help="w in u + w (c - u); 1 = off")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--num-frames", type=int, help="default: what the model was distilled at")
    sample.add_argument("--out", type=Path, required=True, help="the mp4 to write")
    sample.add_argument("--frames", type=Path, help="also write the exact uint8 frames (T, H, W, 3) as .npy")
    sample.set_defaults(run=_sample)

    config = commands.add_parser("config", help="check, show or describe configurations")
    config_commands = config.add_subparsers(required=True, metavar="ACTION")
    check = config_commands.add_parser("check", help="validate files (default: all shipped ones)")
    check.add_argument("paths", nargs="*", type=Path)
    check.set_defaults(run=_config_check)
    show = config_commands.add_parser("show", help="print the resolved experiment")
    _experiment_arguments(show)
    show.set_defaults(run=_config_show)
    describe = config_commands.add_parser("schema", help="print the JSON schema")
    describe.set_defaults(run=_config_schema)
    return parser


def _experiment_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, default=Path("configs/tiny.yaml"), help="an experiment's YAML file")
    command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")


def _stage(arguments: argparse.Namespace) -> None:
    from vpae.stages import run_stage

    print(run_stage(load(arguments.config, arguments.set), arguments.stage, arguments.results))


def _sample(arguments: argparse.Namespace) -> None:
    from vpae.sampling import sample_one

    sample_one(
        arguments.model,
        arguments.image,
        arguments.prompt,
        steps=arguments.steps,
        guidance_scale=arguments.guidance,
        seed=arguments.seed,
        num_frames=arguments.num_frames,
        out=arguments.out,
        frames_out=arguments.frames,
    )
    print(arguments.out)


def _config_check(arguments: argparse.Namespace) -> int:
    paths, failed = arguments.paths or list(shipped()), False
    if not paths:
        raise ConfigError("configs/*.yaml: no experiments here; name files, or change to the project's root")
    for path in paths:
        try:
            load(path)
            print(f"{path}: ok")
        except ConfigError as error:
            print(f"vpae: {error}", file=sys.stderr)
            failed = True
    return 2 if failed else 0


def _config_show(arguments: argparse.Namespace) -> None:
    import yaml

    source = load(arguments.config, arguments.set)
    print(yaml.safe_dump(source.settings.model_dump(mode="json"), sort_keys=False), end="")


def _config_schema(_arguments: argparse.Namespace) -> None:
    print(json.dumps(schema(), indent=2))


if __name__ == "__main__":
    sys.exit(main())
