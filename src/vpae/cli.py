"""The command line: one sub-command a stage, and `sample`, `config`. It parses and delegates."""

import argparse
import errno
import json
import os
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from vpae import __version__
from vpae.arguments import Parser, experiment_arguments
from vpae.bench import command as bench
from vpae.evaluation.vbench import command as vbench
from vpae.experiment import ConfigError, load, schema, shipped
from vpae.graph import STAGES
from vpae.parts import Part
from vpae.planning import command as planning
from vpae.planning.presence import missing
from vpae.versioning import command as versioning

INTERRUPTED = 130  # as shells say of SIGINT
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OF_A_PATH = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
# What other libraries say while they load weights would bury our own progress. And OpenMP's threads spin for
# milliseconds when they are idle: where others want the cores, small networks then take several times as long.
VARIABLES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "GOMP_SPINCOUNT": "10000",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (2: bad input, 3: interrupted and resumable, 130: Ctrl-C elsewhere)."""
    arguments = _parser().parse_args(argv)
    for name, value in VARIABLES.items():  # before torch and the others are imported
        os.environ.setdefault(name, value)
    from vbench_i2v.errors import VBenchError
    from vpae.artifacts import ArtifactError
    from vpae.preemption import EXIT_CODE, Interruption
    from vpae.training.phase import Collapse

    try:
        code = arguments.run(arguments) or 0
        if sys.stdout:  # a service may close it
            sys.stdout.flush()
        return code
    except (ConfigError, ArtifactError, VBenchError, Collapse, FloatingPointError, FileNotFoundError) as error:
        print(f"vpae: {_with_path(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vpae: interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads is gone, as `head` is: no traceback, but a stage is not done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Interruption as interruption:
        print(f"vpae: {interruption}; run the same command again to go on", file=sys.stderr)
        return EXIT_CODE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_A_PATH and error.filename is not None:
            print(f"vpae: {error.filename}: {error.strerror}; correct the path, or its permissions", file=sys.stderr)
            return 2
        # safetensors has the number only in its text.
        if getattr(error, "errno", None) not in FULL and not any(f"(os error {n})" in str(error) for n in FULL):
            raise
        named = getattr(error, "filename", None) or not hasattr(arguments, "results")
        place = "" if named else f" in {arguments.results} or {tempfile.gettempdir()}"
        print(f"vpae: {error}: make room{place}, run the same command again; what is finished stands", file=sys.stderr)
        return 2


def _with_path(error: Exception) -> str:
    """An error's message, after the path that it is about where it does not name it: not every library's does."""
    said, path = str(error), getattr(error, "filename", None)
    return said if path is None or str(path) in said or repr(path) in said else f"{path}: {said}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vpae", description="One-step video diffusion by V-PAE.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for stage, kind in STAGES.items():
        about = f"{kind.about[0].upper()}{kind.about[1:]}."
        command = commands.add_parser(stage, help=f"stage: {kind.about}", description=about)
        experiment_arguments(command)
        command.add_argument("--results", type=Path, default=Path("results"), help="folder of all results")
        command.set_defaults(run=_stage, stage=stage, part=None)
        if kind.divisible:
            command.add_argument("--part", metavar="N/OF", help="do one part of the work; the stage itself gathers")
        if stage == "evaluation":
            vbench.add_commands(command)

    sample = commands.add_parser("sample", help="animate one image by any model (no stage)")
    sample.add_argument("--model", type=Path, required=True, help="pipeline folder, e.g. results/NAME/METHOD/student")
    sample.add_argument("--image", type=Path, required=True, help="first frame")
    sample.add_argument("--prompt", required=True, help="what happens in the video")
    sample.add_argument("--steps", type=int, default=1, help="network steps")
    sample.add_argument("--guidance", type=float, default=1.0, help="w in u + w (c - u); 1 = off")
    sample.add_argument("--negative-prompt", default="", help="of u; experiments have latents.negative_prompt")
    sample.add_argument("--seed", type=int, default=0, help="of the noise")
    sample.add_argument("--num-frames", type=int, help="default: what the model was distilled at")
    sample.add_argument("--out", type=Path, required=True, help="the mp4 to write, or to write anew")
    sample.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="merge a LoRA; may be repeated"
    )
    sample.add_argument("--decoder", type=Path, metavar="FILE", help="decode by taew2.1, from its file")
    sample.add_argument("--frames", type=Path, help="also write the exact uint8 frames (T, H, W, 3) as .npy")
    _placement_arguments(sample)
    sample.set_defaults(run=_sample)

    export = commands.add_parser("export", help="write a student in the form another tool reads")
    export.add_argument("--model", type=Path, required=True, help="pipeline folder, e.g. results/NAME/METHOD/student")
    export.add_argument(
        "--format",
        choices=("diffusers", "vllm-omni", "wan", "lora", "lora-wan"),
        required=True,
        help="diffusers' folder, which `vpae sample` reads, or vLLM-Omni's; Wan's own key names; the adapter of a LoRA "
        "student under either's names",
    )
    export.add_argument("--out", type=Path, required=True, help="folder to make, or a .safetensors file")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as they are stored")
    export.add_argument("--scores", type=Path, help="for the model card; default: the evaluation's beside it")
    export.add_argument("--adapter", type=Path, help="the adapter of a LoRA student; default: the one beside it")
    export.add_argument("--steps", type=int, default=1, help="of --format vllm-omni, whose requests cannot choose")
    export.set_defaults(run=_export)

    compare = commands.add_parser("compare", help="one table of several finished experiments, over their seeds")
    compare.add_argument("experiments", nargs="+", metavar="EXPERIMENT", help="NAME of configs/NAME.yaml, or NAME@SEED")
    compare.add_argument("--out", type=Path, default=Path("results/comparison"), help="of OUT.json, OUT.csv and OUT.md")
    compare.add_argument("--results", type=Path, default=Path("results"), help="folder of all results")
    compare.set_defaults(run=_compare)

    planning.add_plan(commands)
    bench.add_bench(commands)
    versioning.add_commands(commands)

    config = commands.add_parser("config", help="check, show or describe configurations")
    config_commands = config.add_subparsers(required=True, metavar="ACTION")
    check = config_commands.add_parser("check", help="validate files (default: all shipped ones)")
    check.add_argument("paths", nargs="*", type=Path, help="or --config FILE")
    check.add_argument("--config", action="append", default=[], type=Path, help=argparse.SUPPRESS)
    check.add_argument("--strict", action="store_true", help="also ask whether videos and weights are there")
    check.set_defaults(run=_config_check)
    show = config_commands.add_parser("show", help="print the resolved experiment")
    experiment_arguments(show)
    show.add_argument("path", nargs="?", type=Path, metavar="FILE", help="the same as --config FILE")
    show.set_defaults(run=_config_show)
    describe = config_commands.add_parser("schema", help="print the JSON schema")
    describe.set_defaults(run=lambda _: print(json.dumps(schema(), indent=2)))
    return parser


def _placement_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("where memory is short")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 from 1B parameters on")
    group.add_argument(
        "--tile",
        action=argparse.BooleanOptionalAction,
        help="encode and decode in tiles of 256 x 256 pixels; default: where a GPU's memory does not suffice without",
    )
    group.add_argument(
        "--offload",
        choices=("none", "model", "group"),
        default="none",
        help="keep on the GPU: everything, one network, or one transformer block at a time",
    )
    group.add_argument(
        "--quantize",
        choices=("none", "int8", "fp8", "fp8-compute"),
        default="none",
        help="store the transformer's blocks in 8 bits; fp8-compute: multiply them so, too (Hopper and later)",
    )
    group = command.add_argument_group("speed")
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile; default: large models on a GPU, from 30 network evaluations on",
    )
    group.add_argument("--vae-dtype", choices=("float32", "bfloat16"), default="float32", help="of the VAE")
    group.add_argument("--channels-last", action="store_true", help="the VAE's memory layout for tensor cores")


def _stage(arguments: argparse.Namespace) -> None:
    from vpae.stages import run_part, run_stage

    source = load(arguments.config, arguments.set)
    if arguments.part is None:
        print(run_stage(source, arguments.stage, arguments.results))
        return
    try:
        part = Part.parse(arguments.part)
    except ValueError as error:
        raise ConfigError(f"--part: {error}") from error
    run_part(source, arguments.stage, part, arguments.results)


def _sample(arguments: argparse.Namespace) -> None:
    from vpae.placement import Placement
    from vpae.sampling.single import sample_one

    sample_one(
        arguments.model,
        arguments.image,
        arguments.prompt,
        steps=arguments.steps,
        guidance_scale=arguments.guidance,
        negative_prompt=arguments.negative_prompt,
        seed=arguments.seed,
        num_frames=arguments.num_frames,
        out=arguments.out,
        frames_out=arguments.frames,
        placement=Placement(**{field.name: getattr(arguments, field.name) for field in fields(Placement)}),
        loras=arguments.lora,
        decoder=arguments.decoder,
    )
    print(arguments.out)


def _export(arguments: argparse.Namespace) -> None:
    from vpae.export.command import export

    export(
        arguments.model,
        arguments.format,
        arguments.out,
        dtype=arguments.dtype,
        scores=arguments.scores,
        adapter=arguments.adapter,
        steps=arguments.steps,
    )
    print(arguments.out)


def _compare(arguments: argparse.Namespace) -> None:
    from vpae.report.comparison import run

    for path in run(arguments.experiments, arguments.out, results=arguments.results):
        print(path)


def _config_check(arguments: argparse.Namespace) -> int:
    paths, failed = [*arguments.paths, *arguments.config] or list(shipped()), False
    if not paths:
        raise ConfigError("configs/*.yaml: no experiments here; name files, or change to the project's root")
    for path in paths:
        try:
            source = load(path)
            if arguments.strict and (problems := missing(source)):
                raise ConfigError("\n".join(problems))
            print(f"{path}: ok")
        except ConfigError as error:
            print(f"vpae: {error}", file=sys.stderr)
            failed = True
    return 2 if failed else 0


def _config_show(arguments: argparse.Namespace) -> None:
    import yaml

    source = load(arguments.path or arguments.config, arguments.set)
    print(yaml.safe_dump(source.settings.model_dump(mode="json"), sort_keys=False), end="")


if __name__ == "__main__":
    sys.exit(main())
