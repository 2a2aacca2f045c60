"""The commands `verify`, `record`, `restore`, and `settings`, `metrics`, which dvc.yaml calls."""

import argparse
from pathlib import Path

from vpae.arguments import TINY
from vpae.artifacts import written
from vpae.experiment import ConfigError, Source, load
from vpae.graph import RESULTS, STAGES, stage_folder, stages_of
from vpae.standing import require_true
from vpae.versioning.pipeline import metrics_folder, pipeline, settings_file, write_metrics, write_settings
from vpae.versioning.record import record, restore


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add them to `vpae`."""
    command = _command(commands, "verify", "check finished results against configuration, inputs and hashes", _verify)
    command.add_argument("stages", nargs="*", metavar="STAGE", help="default: all")
    command.add_argument("--results", type=Path, default=RESULTS, help="folder of all results")

    command = _command(commands, "record", "commit what Snakemake made to DVC, if all of it is up to date", _record)
    command.add_argument(
        "--stages", nargs="+", choices=tuple(STAGES), default=(), help="commit only these; all are checked"
    )

    command = _command(commands, "restore", "pull recorded results, check them, make them known to Snakemake", _restore)
    command.add_argument("--remote", help="a remote of DVC's; default: its default")
    command.add_argument("--no-pull", action="store_true", help="check and make known what is here")

    command = _command(commands, "settings", "write the settings on which each stage depends", _settings)
    command.add_argument("--out", type=Path, help="default: results/EXPERIMENT/settings.json")
    command = commands.add_parser("dvc", help="print dvc.yaml for the experiments to be versioned")
    command.add_argument("names", nargs="+", metavar="EXPERIMENT", help="of configs/EXPERIMENT.yaml")
    command.add_argument("--out", type=Path, help="write it there, whole or not at all; default: print it")
    command.set_defaults(run=_dvc)
    command = _command(commands, "metrics", "write scores and losses as small tables", _metrics)
    command.add_argument("--out", type=Path, help="default: the folder metrics/EXPERIMENT")


def _command(commands: argparse._SubParsersAction, name: str, text: str, run) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("--config", type=Path, default=TINY, help="an experiment's YAML file")
    command.set_defaults(run=lambda arguments: run(arguments, _committed(arguments.config)))
    return command


def _committed(path: Path) -> Source:
    """The experiment as its file alone says: what is versioned must not hang on somebody's environment."""
    return load(path, environment=False)


def _verify(arguments: argparse.Namespace, source: Source) -> None:
    known = stages_of(source.settings)
    if unknown := [stage for stage in arguments.stages if stage not in known]:
        raise ConfigError(f"verify: {', '.join(unknown)}: no stage; stages are {', '.join(known)}")
    require_true(source, arguments.stages, arguments.results)


def _record(arguments: argparse.Namespace, source: Source) -> None:
    print("\n".join(record(source, arguments.stages)))
    files = " ".join(str(one.path) for one in (*source.ancestors(), source))
    print(f"Recorded. To keep it: `git add {files} dvc.yaml dvc.lock metrics`, `git commit`, `dvc push`.")


def _restore(arguments: argparse.Namespace, source: Source) -> None:
    print("\n".join(restore(source, not arguments.no_pull, arguments.remote)))


def _settings(arguments: argparse.Namespace, source: Source) -> None:
    print(write_settings(source, arguments.out or settings_file(source)))


def _metrics(arguments: argparse.Namespace, source: Source) -> None:
    print(write_metrics(source, arguments.out or metrics_folder(source)))


def _dvc(arguments: argparse.Namespace) -> None:
    for name in arguments.names:
        if "@" in name:
            raise ConfigError(f"vpae dvc {name}: {_instead_of_a_seed(name)}")
    text = pipeline([_committed(Path("configs") / f"{name}.yaml") for name in arguments.names])
    if arguments.out is None:
        print(text, end="")
        return
    with written(arguments.out) as temporary:
        temporary.write_text(text)
    print(arguments.out)


def _instead_of_a_seed(name: str) -> str:
    """What to version in place of NAME@SEED."""
    source = _committed(Path("configs") / f"{name}.yaml")
    base, _, seed = source.name.partition("@")
    if not seed:
        return f"this is {base}, whose own seed it names; name {base}"
    text = (
        f"DVC versions experiments with a file of their own; write configs/{base}-{seed}.yaml with the lines "
        f"`extends: {base}` and `seed: {seed}`, and name {base}-{seed}"
    )
    if all(stage_folder(source, stage).parent == RESULTS / source.name for stage in stages_of(source.settings)):
        text += f"; to keep what is finished: `mv results/{source.name} results/{base}-{seed}`"
    return text
