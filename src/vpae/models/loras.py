"""LoRAs that users bring: checked against the network they are meant for, and merged into its weights."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from vpae.artifacts import ArtifactError, reading
from vpae.config.teacher import file_and_strength
from vpae.export.lora import ALPHA, read_adapter, unscaled
from vpae.models.adapters import products
from vpae.teacher.folder import header, headers

SHOWN = 3  # layers that an error names
Loras = list[tuple[dict[str, Tensor], float]]  # float32 factors by the names of `read_adapter`, and a strength


def require_fit(file: Path, model: Path, factors: dict[str, Tensor] | None = None) -> None:
    """Refuse a LoRA with layers that a pipeline's transformer lacks, or has in another width.

    Args:
        file: the LoRA's; only its header is read, and not even that if `factors` are given.
        model: the pipeline's folder, of which only headers are read.
        factors: from `read_adapter`.

    Raises:
        ArtifactError: naming the layers.
    """
    if factors is None:
        shapes = {name: shape for name, shape in header(file).items() if not name.endswith(".alpha")}
        with reading(file, "download it again"):
            empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        factors = unscaled(empty, {ALPHA: 1}, str(file))
    there, wrong = headers(model / "transformer"), []
    for layer, up, down in products(factors):
        made, wanted = (len(up), down.shape[1]), there.get(f"{layer}.weight")
        if wanted is None:
            wrong.append(f"{layer}, which the model does not have")
        elif made != wanted:
            wrong.append(f"{layer} of {made[0]} x {made[1]}, which the model has as {' x '.join(map(str, wanted))}")
    if wrong:
        more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ArtifactError(
            f"{file}: changes {'; '.join(wrong[:SHOWN])}{more}: it was made for another model than {model}"
        )


def read_loras(named: Iterable[str], model: Path) -> Loras:
    """The factors and strength of each `FILE[:STRENGTH]`, all of which fit a pipeline's transformer.

    Raises:
        ValueError: a strength is no finite number.
        ArtifactError: a file is no whole LoRA, does not fit, or holds what is no number.
    """
    asked = [file_and_strength(name) for name in named]
    for file, _ in asked:
        require_fit(file, model)
    found = []
    for file, strength in asked:
        factors = read_adapter(file, torch.float32)
        if bad := next((name for name, factor in factors.items() if not factor.isfinite().all()), ""):
            raise ArtifactError(f"{file}: {bad}, at its scale, holds values that are not finite; download it again")
        found.append((factors, strength))
    return found


@torch.no_grad()
def merge_loras(transformer: nn.Module, loras: Loras) -> None:
    """Add strength x alpha / rank x B A, in float32, to each weight that a LoRA changes, in place."""
    for factors, strength in loras:
        if strength == 0:  # not even the sign of a zero changes
            continue
        for layer, up, down in products(factors):
            weight = transformer.get_parameter(f"{layer}.weight")
            weight.copy_(weight.float() + strength * (up @ down))
