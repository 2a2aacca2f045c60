"""A student's low-rank adapter as a file that other tools load onto the teacher.

An adapter adds scale B A to a weight, and tools differ in where they look for the scale. It is multiplied into B, so
that every one of them comes to the same weights without being told.
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vpae.artifacts import ArtifactError, reading
from vpae.export.keys import from_underscores, to_diffusers
from vpae.teacher.folder import header

ALPHA = "lora_alpha"  # in the metadata of an adapter's file: alpha of the scale alpha / rank
FACTOR = re.compile(
    r"(?P<prefix>(?:base_model\.model\.|model\.|transformer\.|diffusion_model\.)*)(?P<module>.+)"
    r"\.(?P<part>lora_[AB](?:\.\w+)?\.weight|lora_(?:down|up)\.weight|alpha)"
)
PARTS = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", "alpha": "alpha"}
OTHER_KINDS = {
    "magnitude_vector": "of a DoRA adapter",
    "dora_scale": "of a DoRA adapter",
    "hada_": "of a LoHa adapter",
    "lokr_": "of a LoKr adapter",
    ".diff": "a whole difference of weights",
}
KOHYA = ("lora_unet_", "lora_transformer_")  # before a module's name, whose dots are then underscores
PREFIXES = {"lora": "transformer.", "lora-wan": "diffusion_model."}


def read_adapter(path: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """An adapter's factors, `MODULE.lora_A.weight` (rank, in) and `MODULE.lora_B.weight` (out, rank) at scale 1.

    Takes the files of this project, diffusers and PEFT (`lora_A`, `lora_B`; alpha and patterns in the metadata or in
    adapter_config.json beside), and of ComfyUI and kohya (`lora_down`, `lora_up`, `alpha`), under diffusers' or Wan's
    names, also with underscores for dots (`lora_unet_blocks_0_self_attn_q`). Where a file says nothing of alpha, tools
    that write `transformer.`, `diffusion_model.` or `lora_down` mean scale 1.

    Args:
        path: the file.
        dtype: number format of the factors, in which the scale is multiplied in; as stored if not given.

    Raises:
        FileNotFoundError: no such file.
        ArtifactError: it is a folder, damaged, no adapter of this kind, or one whose scale is unknown.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such adapter; only a student trained as a LoRA has one")
    header(path)  # refuses a folder, and what is not whole
    with reading(path, "download it again"), safe_open(path, framework="pt") as file:
        alone = any(map(_scale_is_one, file.keys()))
        settings = _settings(path, file.metadata() or {}, beside=not alone)
        tensors = {key: file.get_tensor(key).to(dtype) for key in file.keys()}  # noqa: SIM118, it is no dict
    return unscaled(tensors, settings, str(path))


def _scale_is_one(key: str) -> bool:
    """Whether who writes such keys means scale 1 where the file says nothing, and reads no file beside it."""
    match = FACTOR.fullmatch(key)
    return "lora_down" in key or bool(match and match["prefix"].endswith(tuple(PREFIXES.values())))


def _settings(path: Path, metadata: Mapping[str, str], beside: bool) -> dict:
    """What is said of an adapter's scale, by the names of PEFT's `LoraConfig`; empty where nothing is."""
    config = path.with_name("adapter_config.json")
    with reading(path, "what it says of its scale is damaged; download it again"):
        if ALPHA in metadata:
            return _plain({ALPHA: metadata[ALPHA]})
        if "lora_adapter_metadata" in metadata:
            found = json.loads(metadata["lora_adapter_metadata"])
            return _plain({key.removeprefix("transformer."): value for key, value in found.items()})
    with reading(config, f"it has to say of what scale {path.name} is; download it again"):
        return _plain(json.loads(config.read_text())) if beside and config.is_file() else {}


def _plain(found: dict) -> dict:
    """What of a `LoraConfig` says something of the scale, if it is as it should be; else any exception."""
    plain: dict = {key: bool(found.get(key)) for key in ("use_rslora", "use_dora")}
    plain["alpha_pattern"] = {str(k): float(v) for k, v in (found.get("alpha_pattern") or {}).items()}
    if ALPHA in found:
        plain[ALPHA] = float(found[ALPHA])
    if not all(map(math.isfinite, [plain.get(ALPHA, 0.0), *plain["alpha_pattern"].values()])):
        raise ValueError("an alpha that is no finite number")
    for pattern in plain["alpha_pattern"]:
        re.compile(pattern)
    return plain


def unscaled(tensors: Mapping[str, Tensor], settings: Mapping, name: str = "adapter") -> dict[str, Tensor]:
    """The factors under diffusers' module names, with their scale multiplied into B.

    Args:
        tensors: by the keys of a file.
        settings: `lora_alpha`, `alpha_pattern` and `use_rslora` as in PEFT's `LoraConfig`; a file's own `alpha` of a
            module goes before them.
        name: how to call it in errors.

    Raises:
        ArtifactError: a key is not an adapter's, a factor lacks or does not fit its partner, or the scale is unknown.
    """
    if settings.get("use_dora"):
        raise ArtifactError(f"{name}: a DoRA adapter (use_dora), which no low-rank file can hold; merge it first")
    factors: dict[str, dict[str, Tensor]] = {}
    scale_is_one = False
    for key, tensor in tensors.items():
        match = FACTOR.fullmatch(key)
        kind = next((text for part, text in OTHER_KINDS.items() if part in key), "")
        if match is None or kind:
            kind = kind or "not a weight of a LoRA adapter"
            raise ArtifactError(f"{name}: {key} is {kind}; name the file of a LoRA adapter")
        module = match["module"]
        if prefix := next((start for start in KOHYA if module.startswith(start)), ""):
            try:
                module = from_underscores(module.removeprefix(prefix))
            except ArtifactError as error:
                raise ArtifactError(f"{name}: {key}: {error}: it was made for another model") from error
        with suppress(ArtifactError):  # diffusers' own names stay
            module = to_diffusers(module)
        factors.setdefault(module, {})[PARTS[match["part"].partition(".")[0]]] = tensor
        scale_is_one |= _scale_is_one(key)
    found = {}
    for module, parts in factors.items():
        if not parts.keys() >= {"A", "B"}:
            raise ArtifactError(f"{name}: {module} has only one of its two factors; the file is incomplete")
        down, up = parts["A"], parts["B"]
        if down.ndim != 2 or up.ndim != 2 or up.shape[1] != len(down) or not len(down):
            shapes = f"{tuple(up.shape)} and {tuple(down.shape)}"
            raise ArtifactError(f"{name}: the factors of {module}, {shapes}, do not make a product of matrices")
        rank = len(down)
        if "alpha" in parts and parts["alpha"].numel() != 1:
            raise ArtifactError(f"{name}: the alpha of {module} is not one number; download it again")
        alpha = (
            float(parts["alpha"]) if "alpha" in parts else _alpha_of(module, settings, rank if scale_is_one else None)
        )
        if alpha is None:
            raise ArtifactError(
                f"{name}: has no {ALPHA}, so that its scale is unknown; keep its adapter_config.json beside it"
            )
        scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        found[f"{module}.lora_A.weight"] = down.contiguous()
        found[f"{module}.lora_B.weight"] = (up * scale).contiguous()
    if not found:
        raise ArtifactError(f"{name}: holds no weights")
    return found


def _alpha_of(module: str, settings: Mapping, otherwise: float | None) -> float | None:
    """A module's alpha: PEFT matches a pattern with the end of its name."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(alpha)
    return float(settings[ALPHA]) if ALPHA in settings else otherwise
