"""`vpae bench`: parse, run the parts, write JSON, print a table."""

import argparse
import sys
from pathlib import Path

from vpae.arguments import experiment_arguments
from vpae.bench import COMPARISONS
from vpae.config import Experiment
from vpae.distill import METHODS
from vpae.experiment import ConfigError, load

PARTS = ("sampling", *METHODS, "vae", *COMPARISONS, "data")


def add_bench(commands: argparse._SubParsersAction) -> None:
    """The arguments of `vpae bench`."""
    bench = commands.add_parser("bench", help="measure sampling, training steps and encoding; write JSON")
    experiment_arguments(bench, Path("configs/micro.yaml"))
    bench.add_argument("--device", default="", help="cuda, cuda:1, cpu ...; default: a GPU if there is one")
    named = (
        f"of {', '.join(PARTS)}; separated by commas; default: sampling, vae, the experiment's methods and their "
        "comparisons; data reads finished stages"
    )
    bench.add_argument("--parts", help=named)
    bench.add_argument("--steps", default="1,50", help="sampling steps; with guidance each but 1 takes two evaluations")
    bench.add_argument("--guidance", type=float, default=5.0, help="of the rows with several steps; 1 = off")
    bench.add_argument("--batch-sizes", default="1", help="videos sampled together, separated by commas")
    bench.add_argument("--attention", default="native", help="diffusers' attention backends, separated by commas")
    bench.add_argument("--compile", action="store_true", help="also time the blocks compiled by torch.compile")
    bench.add_argument("--repeats", type=int, default=3, help="timed runs of each row; the median counts")
    bench.add_argument("--results", type=Path, default=Path("results"), help="where its teacher is looked for")
    bench.add_argument(
        "--random-weights",
        action="store_true",
        help="networks of the teacher's shape with random weights, made on the device; nothing need be there",
    )
    bench.add_argument("--out", type=Path, help="default: results/bench/EXPERIMENT.json")
    bench.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> None:
    from vpae.artifacts import write_json
    from vpae.bench.report import as_text, surroundings
    from vpae.bench.run import Options, run

    source = load(arguments.config, arguments.set)
    parts = _words(arguments.parts, "--parts") if arguments.parts is not None else parts_of(source.settings)
    if arguments.repeats < 1:
        raise ConfigError(f"--repeats {arguments.repeats}: at least 1")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ConfigError(f"--parts {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    options = Options(
        parts=tuple(parts),
        device=arguments.device,
        steps=_numbers(arguments.steps, "--steps"),
        guidance=arguments.guidance,
        batch_sizes=_numbers(arguments.batch_sizes, "--batch-sizes"),
        attention=tuple(_words(arguments.attention, "--attention")),
        compiled=arguments.compile,
        repeats=arguments.repeats,
        random_weights=arguments.random_weights,
        results=arguments.results,
    )
    around = surroundings(source, options)
    out = arguments.out or Path("results/bench") / f"{source.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    found = run(source, options, keep=lambda found: write_json(out, {**around, **found}))
    print(as_text({**around, **found}))
    print(out, file=sys.stderr)


def parts_of(settings: Experiment) -> list[str]:
    """What an experiment's own networks and methods are measured by."""
    methods = [name for name in METHODS if name in settings.methods]
    comparisons = [part for part, compared in COMPARISONS.items() if compared[0] in methods]
    return ["sampling", *methods, "vae", *comparisons]


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"{option}: nothing is named")
    return words


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in _words(text, option))
    except ValueError as error:
        raise ConfigError(f"{option} {text}: write whole numbers separated by commas, for instance 1,50") from error
    if min(numbers) < 1:
        raise ConfigError(f"{option} {text}: numbers are at least 1")
    return numbers
