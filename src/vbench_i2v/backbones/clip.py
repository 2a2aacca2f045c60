"""OpenAI's CLIP image towers from their original archives (`ViT-B-32.pt`, `ViT-L-14.pt`), as transformers' model."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vbench_i2v.backbones.checkpoints import require
from vbench_i2v.errors import NotComputed, first_line

HEAD = 64  # width of one attention head in all of OpenAI's towers

# Parts of names within the archive -> in transformers.
_NAMES = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "conv1": "vision_model.embeddings.patch_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "ln_pre": "vision_model.pre_layrnorm",
    "ln_post": "vision_model.post_layernorm",
    "transformer.resblocks": "vision_model.encoder.layers",
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def load(path: Path, dtype: torch.dtype = torch.float32) -> CLIPVisionModelWithProjection:
    """Read an archive (a TorchScript module of text and image tower) and keep its image tower.

    Raises:
        NotComputed: the file is missing, or no such archive.
    """
    require(path)
    try:
        state = torch.jit.load(str(path), map_location="cpu").state_dict()
        return in_dtype(from_openai(state), dtype)
    except (RuntimeError, KeyError, ValueError) as error:  # of a folder the last
        raise NotComputed(f"{path} is no CLIP archive of OpenAI's ({first_line(error)}); fetch it again") from error


def from_openai(state: dict[str, Tensor], head: int = HEAD) -> CLIPVisionModelWithProjection:
    """The image tower of a state dict in OpenAI's naming, float32, in evaluation mode; `head` is a head's width."""
    visual = {name.removeprefix("visual."): t.float() for name, t in state.items() if name.startswith("visual.")}
    width, _, patch, _ = visual["conv1.weight"].shape
    side = math.isqrt(len(visual["positional_embedding"]) - 1)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=visual["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=sum(name.endswith("attn.in_proj_weight") for name in visual),
        num_attention_heads=width // head,
        projection_dim=visual["proj"].shape[1],
        image_size=side * patch,
        patch_size=patch,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    model = CLIPVisionModelWithProjection(config)
    model.load_state_dict(dict(_renamed(visual)))
    return model.eval().requires_grad_(False)


class Float32LayerNorm(nn.LayerNorm):
    """OpenAI's: weights and arithmetic in float32, whatever the dtype of the network."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.float()).to(hidden.dtype)


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network with its weights in `dtype`, except its layer norms, as OpenAI's `convert_weights` has it."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = Float32LayerNorm
        else:
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.to(dtype)
    return model


def _renamed(visual: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in visual.items():
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        if name == "proj":
            yield "visual_projection.weight", tensor.T
        elif "attn.in_proj_" in name:
            for part, share in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace("attn.in_proj_", f"self_attn.{part}_proj."), share
        else:
            yield name, tensor
