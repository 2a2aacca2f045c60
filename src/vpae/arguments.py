"""Arguments that several commands take."""

import argparse
from pathlib import Path

TINY = Path("configs/tiny.yaml")


def experiment_arguments(command: argparse.ArgumentParser, default: Path = TINY) -> None:
    """Which experiment, and what of it is to be different this time."""
    command.add_argument("--config", type=Path, default=default, help="an experiment's YAML file")
    command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
