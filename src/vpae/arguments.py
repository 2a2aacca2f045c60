"""Arguments that several commands take, and how help is printed."""

import argparse
from pathlib import Path

TINY = Path("configs/tiny.yaml")


class Help(argparse.HelpFormatter):
    """Says the default of each option that does not say it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        named = action.help or ""
        unsaid = any(action.default is none for none in (None, False, argparse.SUPPRESS))
        if unsaid or action.default in ("", []) or "default" in named or action.required:
            return action.help
        return f"{named}; default: %(default)s".removeprefix("; ")


class Parser(argparse.ArgumentParser):
    """One whose commands all print help so."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{"formatter_class": Help, **options})


def experiment_arguments(command: argparse.ArgumentParser, default: Path = TINY) -> None:
    """Which experiment, and what of it is to be different this time."""
    command.add_argument("--config", type=Path, default=default, help="an experiment's YAML file")
    command.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key; may be repeated"
    )
