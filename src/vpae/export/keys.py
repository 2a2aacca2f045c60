"""Names of a Wan transformer's weights, both ways: diffusers' and those of Wan's own repository.

Wan2.1's code, ComfyUI and LightX2V read the original names. Names are mapped by module, so that whatever hangs on a
module (`weight`, `bias`, `lora_A.weight`) goes with it.
"""

import re
from collections.abc import Mapping

from vpae.artifacts import ArtifactError

ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_added_k": "norm_k_img",
}
OF_A_BLOCK = {
    **{f"attn1.{name}": f"self_attn.{original}" for name, original in ATTENTION.items()},
    **{f"attn2.{name}": f"cross_attn.{original}" for name, original in ATTENTION.items()},
    "norm2": "norm3",  # the only norm of a block that has weights
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}


def to_original(key: str) -> str:
    """The name in Wan's own repository of a diffusers weight, e.g. `blocks.0.self_attn.q.weight`.

    Raises:
        ArtifactError: `WanTransformer3DModel` has no such weight.
    """
    return _renamed(key, OUTSIDE, OF_A_BLOCK)


def to_diffusers(key: str) -> str:
    """The name in diffusers of an original weight, e.g. `blocks.0.attn1.to_q.weight`.

    Raises:
        ArtifactError: Wan's own model has no such weight.
    """
    return _renamed(key, _inverse(OUTSIDE), _inverse(OF_A_BLOCK))


def from_underscores(name: str) -> str:
    """The name in diffusers of a module that kohya's tools call `blocks_0_self_attn_q`, e.g. `blocks.0.attn1.to_q`.

    Modules have underscores of their own (`norm_q`, `k_img`), so that the name is looked up among those of the model,
    diffusers' and the original ones.

    Raises:
        ArtifactError: no module is called so.
    """
    block = re.fullmatch(r"blocks_(\d+)_(.+)", name)
    prefix, rest, names = (f"blocks.{block[1]}.", block[2], OF_A_BLOCK) if block else ("", name, OUTSIDE)
    for pair in names.items():
        if rest in [module.replace(".", "_") for module in pair]:
            return prefix + pair[0]
    raise ArtifactError(f"{name}: no module of a Wan image-to-video transformer has this name")


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


def _renamed(key: str, outside: Mapping[str, str], of_a_block: Mapping[str, str]) -> str:
    if key.startswith("blocks."):
        number, _, rest = key.removeprefix("blocks.").partition(".")
        prefix, names = f"blocks.{number}.", of_a_block
    else:
        prefix, rest, names = "", key, outside
    for old, new in names.items():
        if rest == old or rest.startswith(f"{old}."):
            return f"{prefix}{new}{rest[len(old) :]}"
    raise ArtifactError(f"{key}: no weight of a Wan image-to-video transformer; export a student of this project")
