"""The words after `vpae evaluation`: VBench-I2V's own, and `sample`. Without one, it is the stage."""

import argparse
from pathlib import Path

from vbench_i2v import command as benchmark
from vpae.config import VBenchFolder
from vpae.experiment import ConfigError

TINY_STATE = "tiny"  # folder for what the tiny backbones keep


def add_commands(evaluation: argparse.ArgumentParser) -> None:
    """Add the words to the parser of the stage."""
    words = evaluation.add_subparsers(metavar="WORD", title="VBench-I2V for any folder (instead of the stage)")
    run = benchmark.add_words(words)
    run.add_argument("--backbones", choices=("official", "tiny"), help="VBench's own networks (default), or small ones")
    run.add_argument("--teacher", help="pipeline folder whose image encoder the tiny backbones use")
    run.set_defaults(run=_run)

    sample = words.add_parser("sample", help="animate the images of a prompt suite")
    sample.add_argument("--model", type=Path, required=True, help="pipeline folder, e.g. results/NAME/METHOD/student")
    sample.add_argument("--suite", type=Path, required=True, help="VBench's vbench2_i2v_full_info.json")
    sample.add_argument("--images", type=Path, required=True, help="folder of VBench's crops, or of the images")
    sample.add_argument("--out", type=Path, required=True, help="folder of the videos")
    benchmark.add_dimensions(sample)
    sample.add_argument("--steps", type=int, default=1, help="network steps")
    sample.add_argument("--guidance", type=float, default=1.0, help="w in u + w (c - u); 1 = off")
    sample.add_argument("--ratio", default="auto", help="of VBench's crops (default: nearest to the model's size)")
    sample.add_argument("--samples-per-prompt", type=int, default=5, help="videos of each image")
    benchmark.add_part(sample, "make one part of the videos")
    sample.set_defaults(run=_sample)


def _run(arguments: argparse.Namespace) -> None:
    settings = benchmark.folder_settings(arguments, VBenchFolder)
    from vbench_i2v.folder import score_folder
    from vpae.evaluation.vbench.processes import until_asked
    from vpae.evaluation.vbench.tiny import networks
    from vpae.preemption import Interruption

    if settings.backbones == "off":
        raise ConfigError("--backbones: off measures nothing; choose official or tiny")
    nets = None
    if settings.backbones == "tiny":
        if not settings.teacher:
            raise ConfigError("--teacher: is required with --backbones tiny: a pipeline folder")
        nets = networks(Path(settings.teacher).expanduser(), Path(settings.out).expanduser() / TINY_STATE)
    with Interruption.watch() as request:
        print(score_folder(settings, nets, benchmark.part_of(arguments), lambda work: until_asked(work, request)))


def _sample(arguments: argparse.Namespace) -> None:
    from vpae.evaluation.vbench.sample import sample_suite

    made = sample_suite(
        arguments.model,
        arguments.suite,
        arguments.images,
        arguments.out,
        dimensions=arguments.dimensions or benchmark.DIMENSIONS,
        steps=arguments.steps,
        guidance_scale=arguments.guidance,
        ratio=arguments.ratio,
        samples=arguments.samples_per_prompt,
        part=benchmark.part_of(arguments),
    )
    print(f"{arguments.out}: {made} new videos")
