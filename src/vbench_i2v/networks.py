"""The benchmark's own networks, from settings, and what tells their results from others'."""

import torch

from vbench_i2v import weights
from vbench_i2v.backbones import Official
from vbench_i2v.errors import VBenchError
from vbench_i2v.files import user_path
from vbench_i2v.runner import Networks
from vbench_i2v.settings import Measure

CLIP_DIMENSIONS = ("background_consistency", "aesthetic_quality")
_CHOICE = "Or leave them out: name others with --dimensions, or allow n of N with --allow-incomplete"


def official_networks(settings: Measure, allow_incomplete: bool) -> tuple[Networks, dict[str, str]]:
    """The benchmark's own networks; none is loaded yet.

    Returns:
        the networks, and dimension -> why it cannot be computed, for those whose weight files are missing or wrong.

    Raises:
        VBenchError: weight files are missing or wrong, and all or nothing was asked for.
    """
    root, dimensions = user_path(settings.weights), settings.wanted()
    why = weights.absent(root, dimensions)
    if why and not allow_incomplete:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in why.items())
        raise VBenchError(f"{len(why)} of {len(dimensions)} dimensions cannot be computed:\n{listed}\n{_CHOICE}")
    files = weights.identities(root, [name for name in dimensions if name not in why])
    identity: dict[str, object] = {
        name: {"weights": found}
        | ({"clip_dtype": settings.clip_dtype} if name in CLIP_DIMENSIONS else {})
        | ({"packages": used} if (used := weights.package_versions(name)) else {})
        for name, found in files.items()
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Networks(Official(root, device, settings.clip_dtype), identity), why
