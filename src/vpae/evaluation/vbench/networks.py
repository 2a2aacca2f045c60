"""Which networks a score uses, from its settings, and what tells their results from others'."""

from collections.abc import Collection
from pathlib import Path

import torch

from vpae.artifacts import ArtifactError, digest, file_hashes
from vpae.config import VBench
from vpae.evaluation.vbench import weights
from vpae.evaluation.vbench.backbones import official
from vpae.evaluation.vbench.backbones.quality import RECIPE
from vpae.evaluation.vbench.backbones.tiny import tiny
from vpae.evaluation.vbench.runner import Networks
from vpae.evaluation.vbench.scores import COLUMNS

CLIP_DIMENSIONS = ("background_consistency", "aesthetic_quality")


def wanted(settings: VBench) -> tuple[str, ...]:
    """The dimensions asked for, in the leaderboard's order."""
    return tuple(name for name in COLUMNS if name in (settings.dimensions or COLUMNS))


def weights_root(settings: VBench) -> Path:
    """The folder of weight files."""
    return Path(settings.weights).expanduser()


def official_networks(settings: VBench, allow_incomplete: bool) -> tuple[Networks, dict[str, str]]:
    """The benchmark's own networks; none is loaded yet.

    Returns:
        the networks, and dimension -> why it cannot be computed, for those whose weight files are missing or wrong.

    Raises:
        ArtifactError: weight files are missing or wrong, and all or nothing was asked for.
    """
    root, dimensions = weights_root(settings), wanted(settings)
    why = weights.absent(root, dimensions)
    if why and not allow_incomplete:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in why.items())
        raise ArtifactError(f"{len(why)} of {len(dimensions)} dimensions cannot be computed:\n{listed}\n{_CHOICE}")
    files = weights.identities(root, [name for name in dimensions if name not in why])
    identity: dict[str, object] = {
        name: {"weights": found} | ({"clip_dtype": settings.clip_dtype} if name in CLIP_DIMENSIONS else {})
        for name, found in files.items()
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Networks(official(root, device, settings.clip_dtype), identity), why


_CHOICE = "Or leave them out: name others with --dimensions, or allow n of N with --allow-incomplete"


def tiny_networks(teacher: Path, state: Path, dimensions: Collection[str] = tuple(COLUMNS)) -> Networks:
    """The small stand-ins, which see through the image encoder of a pipeline folder.

    Args:
        teacher: the pipeline folder.
        state: folder for what they keep between runs.
        dimensions: which are wanted.

    Raises:
        FileNotFoundError: no image encoder there.
    """
    parts = [teacher / name for name in ("image_encoder", "image_processor")]
    for part in parts:
        if not part.is_dir():
            raise FileNotFoundError(f"{part}: no such folder; the tiny backbones need a pipeline's image encoder")
    encoder = [digest(file_hashes(part)) for part in parts]
    identity = {name: RECIPE if name == "imaging_quality" else {"image_encoder": encoder} for name in dimensions}
    return Networks(tiny(teacher, state), identity)


def load(networks: Networks, dimensions: Collection[str]) -> None:
    """Load what the tiny backbones load or train, so that processes forked afterwards share it."""
    networks.backbones.dino()
    if "imaging_quality" in dimensions:
        networks.backbones.musiq()
