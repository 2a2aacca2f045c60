"""Packages that the user installs, since their licences or dependencies are not for everybody."""

import importlib
import importlib.metadata
import importlib.util
import json
import re
import types

from vbench_i2v.errors import NotComputed

ENVIRONMENT = "pip install -c constraints.txt -e '.[vbench]' && pip install --no-deps -r workflow/envs/vbench.txt"


def imported(module: str) -> types.ModuleType:
    """Import a module of such a package.

    Raises:
        NotComputed: it is not installed or cannot be imported, whatever it raises; names package, version and remedy.
    """
    package = module.partition(".")[0]
    remedy = f"the versions that work together: {ENVIRONMENT}"
    try:
        return importlib.import_module(module)
    except Exception as error:  # old packages beside new ones raise anything, AttributeError for one
        if importlib.util.find_spec(package) is None:
            raise NotComputed(f"{package} is not installed; {remedy}") from error
        reason = f"{package} {version_of(package)} cannot be imported ({type(error).__name__}: {error})"
        if (mismatch := _torchvision()) is not None:
            reason = f"{mismatch}, and so {reason}"
        raise NotComputed(f"{reason}; {remedy}") from error


def _torchvision() -> str | None:
    """What is wrong with torchvision beside this torch, if it cannot be imported."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        return "torchvision is not installed" if error.name == "torchvision" else None
    except Exception:  # its operators are built for one torch: RuntimeError, OSError or AttributeError beside another
        needed = importlib.metadata.requires("torchvision") or ()  # "torch (==2.13.0)" or "torch==2.13.0"
        needs = [re.sub("[ ()]", "", text) for text in needed if re.match("torch[ (=]", text)]
        return (
            f"torchvision {version_of('torchvision')} does not match torch {version_of('torch')}: it needs "
            f"{needs[0] if needs else 'the torch it was built for'} of the same build (CPU or CUDA)"
        )
    return None


def version_of(package: str) -> str:
    """Its version, and the commit if it was installed from a repository."""
    names = importlib.metadata.packages_distributions().get(package, [package])
    try:
        found = importlib.metadata.distribution(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
    origin = json.loads(found.read_text("direct_url.json") or "{}").get("vcs_info", {})
    return f"{found.version}+{origin['commit_id'][:12]}" if "commit_id" in origin else found.version
