"""A student's low-rank adapter as a file that other tools load onto the teacher.

An adapter adds scale B A to a weight, and tools differ in where they look for the scale. It is multiplied into B, so
that every one of them comes to the same weights without being told.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from vpae.artifacts import ArtifactError
from vpae.export.keys import to_original

ALPHA = "lora_alpha"  # in the metadata of an adapter's file: alpha of the scale alpha / rank
FACTOR = re.compile(r"(?:transformer\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.(?:\w+\.)?weight")
PREFIXES = {"lora": "transformer.", "lora-wan": "diffusion_model."}


def read_adapter(path: Path) -> dict[str, Tensor]:
    """An adapter's factors, `MODULE.lora_A.weight` (rank, in) and `MODULE.lora_B.weight` (out, rank) at scale 1.

    Takes files whose metadata give `lora_alpha`, and diffusers' own LoRA files.

    Raises:
        FileNotFoundError: no such file.
        ArtifactError: it is no adapter, or one without its scale.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such adapter; only a student trained as a LoRA has one")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
    return unscaled(tensors, _alpha(path, metadata), str(path))


def _alpha(path: Path, metadata: Mapping[str, str]) -> float:
    if ALPHA in metadata:
        return float(metadata[ALPHA])
    try:
        return float(json.loads(metadata["lora_adapter_metadata"])["transformer.lora_alpha"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ArtifactError(
            f"{path}: its metadata say nothing of {ALPHA}, so that its scale is unknown; write it with the weights"
        ) from error


def unscaled(tensors: Mapping[str, Tensor], alpha: float, name: str = "adapter") -> dict[str, Tensor]:
    """The factors under diffusers' module names, with alpha / rank multiplied into B.

    Args:
        tensors: keys like `blocks.0.attn1.to_q.lora_A.weight`; an adapter's name may stand before `weight`, and
            `transformer.` before all.
        alpha: of the scale alpha / rank.
        name: how to call it in errors.

    Raises:
        ArtifactError: a key is not an adapter's, or a factor lacks its partner.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = FACTOR.fullmatch(key)
        if match is None:
            raise ArtifactError(f"{name}: {key} is not a weight of a LoRA adapter; name the adapter's file")
        factors.setdefault(match["module"], {})[match["factor"]] = tensor
    found = {}
    for module, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise ArtifactError(f"{name}: {module} has only one of its two factors; the file is incomplete")
        found[f"{module}.lora_A.weight"] = pair["A"].contiguous()
        found[f"{module}.lora_B.weight"] = (pair["B"] * (alpha / len(pair["A"]))).contiguous()
    if not found:
        raise ArtifactError(f"{name}: holds no weights")
    return found


def named_for(form: str, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors under the names that a form's readers expect.

    Args:
        form: "lora" (diffusers: `pipeline.load_lora_weights`) or "lora-wan" (ComfyUI, LightX2V; diffusers as well).
        factors: from `read_adapter`.
    """
    rename = to_original if form == "lora-wan" else lambda key: key
    return {PREFIXES[form] + rename(key): tensor for key, tensor in factors.items()}
