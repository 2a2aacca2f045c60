"""The commands `verify`, `record`, `restore`, and `settings`, `metrics`, which dvc.yaml calls."""

import argparse
from pathlib import Path

from vpae.arguments import TINY
from vpae.graph import RESULTS, STAGES, stages_of


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add them to `vpae`."""
    verify = _command(commands, "verify", "check finished results against configuration, inputs and hashes", _verify)
    verify.add_argument("stages", nargs="*", metavar="STAGE", help="default: all")
    verify.add_argument("--results", type=Path, default=RESULTS, help="folder of all results")

    record = _command(commands, "record", "commit what Snakemake made to DVC, if all of it is up to date", _record)
    record.add_argument(
        "--stages", nargs="+", choices=tuple(STAGES), default=(), help="commit only these; all are checked"
    )

    restore = _command(commands, "restore", "pull recorded results, check them, make them known to Snakemake", _restore)
    restore.add_argument("--remote", help="a remote of DVC's; default: its default")
    restore.add_argument("--no-pull", action="store_true", help="check and make known what is here")

    settings = _command(commands, "settings", "write the settings on which each stage depends", _settings)
    settings.add_argument("--out", type=Path, help="default: results/EXPERIMENT/settings.json")
    dvc = commands.add_parser("dvc", help="print dvc.yaml for the experiments to be versioned")
    dvc.add_argument("names", nargs="+", metavar="EXPERIMENT", help="of configs/EXPERIMENT.yaml")
    dvc.add_argument("--out", type=Path, help="write it there, whole or not at all; default: print it")
    dvc.set_defaults(run=_dvc)
    metrics = _command(commands, "metrics", "write scores and losses as small tables", _metrics)
    metrics.add_argument("--out", type=Path, help="default: the folder metrics/EXPERIMENT")


def _command(commands: argparse._SubParsersAction, name: str, text: str, run) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("--config", type=Path, default=TINY, help="an experiment's YAML file")
    command.set_defaults(run=run)
    return command


def _verify(arguments: argparse.Namespace) -> None:
    from vpae.experiment import ConfigError
    from vpae.versioning.verify import committed, require_true

    source = committed(arguments.config)
    known = stages_of(source.settings)
    if unknown := [stage for stage in arguments.stages if stage not in known]:
        raise ConfigError(f"verify: {', '.join(unknown)}: no stage; stages are {', '.join(known)}")
    require_true(source, arguments.stages, arguments.results)


def _record(arguments: argparse.Namespace) -> None:
    from vpae.versioning.record import record
    from vpae.versioning.verify import committed

    source = committed(arguments.config)
    print("\n".join(record(source, arguments.stages)))
    files = " ".join(str(one.path) for one in (*source.ancestors(), source))
    print(f"Recorded. To keep it: `git add {files} dvc.yaml dvc.lock metrics`, `git commit`, `dvc push`.")


def _restore(arguments: argparse.Namespace) -> None:
    from vpae.versioning.record import restore
    from vpae.versioning.verify import committed

    print("\n".join(restore(committed(arguments.config), not arguments.no_pull, arguments.remote)))


def _settings(arguments: argparse.Namespace) -> None:
    from vpae.versioning.tables import settings_file, write_settings
    from vpae.versioning.verify import committed

    source = committed(arguments.config)
    print(write_settings(source, arguments.out or settings_file(source)))


def _metrics(arguments: argparse.Namespace) -> None:
    from vpae.versioning.tables import metrics_folder, write_metrics
    from vpae.versioning.verify import committed

    source = committed(arguments.config)
    print(write_metrics(source, arguments.out or metrics_folder(source)))


def _dvc(arguments: argparse.Namespace) -> None:
    from vpae.artifacts import written
    from vpae.experiment import ConfigError
    from vpae.versioning.pipeline import pipeline
    from vpae.versioning.verify import committed

    for name in arguments.names:
        base, at, seed = name.partition("@")
        if at:
            raise ConfigError(
                f"vpae dvc {name}: DVC versions experiments with a file of their own; write configs/{base}-{seed}.yaml "
                f"with the lines `extends: {base}` and `seed: {seed}`, and name {base}-{seed}"
            )
    text = pipeline([committed(Path("configs") / f"{name}.yaml") for name in arguments.names])
    if arguments.out is None:
        print(text, end="")
        return
    with written(arguments.out) as temporary:
        temporary.write_text(text)
    print(arguments.out)
