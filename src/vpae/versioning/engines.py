"""Calling Snakemake and DVC, as their users do."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence

from vpae.artifacts import ArtifactError

NOTHING = "Nothing to be done"
NO_METADATA = "provenance/metadata"  # "... jobs have missing provenance/metadata so that ..."


def run(*command: str) -> tuple[int, str]:
    """Run `snakemake ...` or `dvc ...` of this environment; returns the exit code and all it printed.

    The local machine does the work, whatever profile the user has chosen for jobs; VPAE_ variables do not count.
    """
    dropped = ("SNAKEMAKE_PROFILE", "VPAE_")
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(dropped)}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def must(*command: str) -> str:
    """Run a command that has to succeed; returns what it printed.

    Raises:
        ArtifactError: with the command and what it printed.
    """
    code, printed = run(*command)
    if code:
        raise ArtifactError(f"`{' '.join(command)}` failed:\n{printed.strip()}")
    return printed


def pull(remote: str | None, targets: Sequence[str], folders: Sequence[str]) -> None:
    """Get recorded results: what DVC calls `targets`, most of which stands in `folders`.

    Raises:
        ArtifactError: naming the files that the remote lacks, or has in another form; DVC itself only names folders.
    """
    code, printed = run("dvc", "pull", *(["--remote", remote] if remote else []), *targets)
    if not code:
        return
    listed = must("dvc", "data", "status", "--granular", "--json", *folders).splitlines()
    status = next(json.loads(line) for line in listed if line.startswith("{"))
    if files := status.get("not_in_cache"):
        raise ArtifactError("\n  ".join(["these are missing in the remote, or damaged there:", *files]))
    here = "\nwhat stands here was never recorded: `vpae record` it, or move it away" if "--force" in printed else ""
    raise ArtifactError(f"`dvc pull` failed:\n{printed.strip()}{here}")


def require_nothing_to_do(experiment: str) -> None:
    """Refuse while Snakemake would run something, or does not know how something was made.

    Where it has no notes on a result, it cannot see that settings have changed, and says "Nothing to be done" of stale
    results as of others.

    Raises:
        ArtifactError: with Snakemake's plan.
    """
    printed = must("snakemake", "--dry-run", "--cores", "1", "--config", f"experiment={experiment}", "--", "all")
    if NOTHING not in printed:
        remedy = f"run `snakemake all --config experiment={experiment}` first"
        raise ArtifactError(f"Snakemake has something to do; {remedy}:\n{printed.strip()}")
    rules = re.search(r"^Rules with missing metadata: (.*)$", printed, re.MULTILINE)
    # Marks of shares of a stage's work are temporary: their number changes no result.
    if rules and not all(name.endswith("_part") for name in rules[1].split()):
        remedy = f"`vpae restore --no-pull --config configs/{experiment}.yaml` checks them and makes them known"
        raise ArtifactError(f"Snakemake does not know how all of these results were made; {remedy}:\n{printed.strip()}")


def touch(experiment: str) -> None:
    """Make Snakemake take the present results for made from the present settings: to be used on verified ones only."""
    must("snakemake", "--touch", "--forceall", "--cores", "1", "--config", f"experiment={experiment}", "--", "all")
    require_nothing_to_do(experiment)
