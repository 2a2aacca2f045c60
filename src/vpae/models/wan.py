"""Wan image-to-video models: loading, conditioning, velocity, and features of inner blocks.

Nothing of Wan is rewritten: `WanTransformer3DModel`, `AutoencoderKLWan` and the pipeline are diffusers'.
Axes: B batch, C channels, F latent frames, H/W latent height and width, T frames, N tokens, L text tokens, D width.
"""

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from diffusers.utils.logging import disable_progress_bar
from diffusers.utils.torch_utils import get_module_execution_device
from einops import rearrange
from torch import Tensor, nn

from vpae.artifacts import write_json
from vpae.flow import x0_from_velocity
from vpae.models.formats import formats
from vpae.models.small_decoder import SmallDecoder
from vpae.models.still import can_encode_still, encode_still
from vpae.teacher.folder import variant_of

GEOMETRY = "geometry.json"  # beside model_index.json: frames, height, width and fps a model was made for
TEXT_TOKENS = 512  # Wan's cross-attention finds the image tokens by counting 512 from the end
SHORT_TEXT_TOKENS = 32  # what captions of fewer tokens are padded to, see `ShortTextAttention`


@dataclass(frozen=True)
class Condition:
    """What the network knows of a clip besides its noise.

    Attributes:
        frame_BCFHW: 20 channels: 4 of mask (1 on the first latent frame), 16 of the VAE's encoding of "first frame,
            then grey", normalised.
        image_BND: CLIP's last but one hidden states of the first frame.
        text_BLD: UMT5 embeddings, zeros after the caption's end, L = 512; or fewer, if the last is such a zero, which
            then stands for all the rest.
        empty_text_LD: the same of the negative prompt; guidance drops only the text.
    """

    frame_BCFHW: Tensor
    image_BND: Tensor
    text_BLD: Tensor
    empty_text_LD: Tensor

    def without_text(self) -> "Condition":
        """The unconditional branch of guidance: first frame, mask and image embeddings stay."""
        return replace(self, text_BLD=self.empty_text_LD.expand_as(self.text_BLD))

    def repeated(self, times: int) -> "Condition":
        """That of the same clips in the same order, several times in one batch."""
        again = {name: torch.cat([getattr(self, name)] * times) for name in ("frame_BCFHW", "image_BND", "text_BLD")}
        return replace(self, **again)


def text_tokens_for(longest: int) -> int:
    """How many tokens L to pad captions to, given the longest one's tokens."""
    return SHORT_TEXT_TOKENS if longest < SHORT_TEXT_TOKENS else TEXT_TOKENS


class ShortTextAttention(WanAttnProcessor):
    """Wan's cross-attention for captions padded to L < 512 tokens: the same result, without the other 512 - L.

    Padding is zeros, so that all of it has one key and one value: the last token stands for it all, and log(513 - L) on
    its logit counts it as often. In a small model the 512 text tokens would be most of the work.
    """

    def __init__(self, text_tokens: int):
        super().__init__()
        self.text_tokens = text_tokens

    def __call__(self, attn: WanAttention, hidden_states, encoder_hidden_states, attention_mask=None, rotary_emb=None):
        """Attention of video tokens (B, N, D) to image and text tokens (B, M + L, D); returns (B, N, D)."""
        image = encoder_hidden_states[:, : -self.text_tokens]
        text = encoder_hidden_states[:, -self.text_tokens :]
        heads = lambda x: rearrange(x, "b n (h d) -> b h n d", h=attn.heads)  # noqa: E731
        query = heads(attn.norm_q(attn.to_q(hidden_states)))
        weight = query.new_zeros(self.text_tokens)
        weight[-1:].fill_(math.log(TEXT_TOKENS - self.text_tokens + 1))  # on the device: nothing waits for a copy
        key, value = heads(attn.norm_k(attn.to_k(text))), heads(attn.to_v(text))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=weight.expand(1, 1, 1, -1))
        key, value = heads(attn.norm_added_k(attn.add_k_proj(image))), heads(attn.add_v_proj(image))
        attended = attended + F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[1](attn.to_out[0](rearrange(attended, "b h n d -> b n (h d)")))


def _expect_text(model: nn.Module, tokens: int) -> None:
    """Give the cross-attention the processor for so many text tokens, if it has another."""
    for block in model.blocks:
        if getattr(block.attn2.processor, "text_tokens", TEXT_TOKENS) != tokens:
            block.attn2.set_processor(WanAttnProcessor() if tokens == TEXT_TOKENS else ShortTextAttention(tokens))


def velocity(model: nn.Module, xt_BCFHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
    """The network's velocity v(x_t, t, c), (B, 16, F, H, W) in the dtype of x_t."""
    _expect_text(model, condition.text_BLD.shape[1])
    return model(
        hidden_states=torch.cat([xt_BCFHW, condition.frame_BCFHW], dim=1),
        timestep=1000 * t_B,
        encoder_hidden_states=condition.text_BLD,
        encoder_hidden_states_image=condition.image_BND,
        return_dict=False,
    )[0].to(xt_BCFHW.dtype)


def guided_velocity(model: nn.Module, xt_BCFHW: Tensor, t_B: Tensor, condition: Condition, w: float) -> Tensor:
    """Velocity with classifier-free guidance in the standard form u + w (c - u); w = 1 needs one pass only."""
    v_cond = velocity(model, xt_BCFHW, t_B, condition)
    if w == 1.0:
        return v_cond
    v_uncond = velocity(model, xt_BCFHW, t_B, condition.without_text())
    return v_uncond + w * (v_cond - v_uncond)


def predict_x0(model: nn.Module, xt_BCFHW: Tensor, t_B: Tensor, condition: Condition, w: float = 1.0) -> Tensor:
    """The one-step prediction f(x_t, t, c) = x_t - t v, with guidance w."""
    return x0_from_velocity(xt_BCFHW, guided_velocity(model, xt_BCFHW, t_B, condition, w), t_B)


def default_taps(layers: int) -> tuple[int, ...]:
    """Blocks whose outputs are features [choice]: what peers take at 30 and 40 blocks; else half, 3/4 and the end."""
    return {40: (13, 26, 39)}.get(layers, (layers // 2, 3 * layers // 4, layers - 1))


@contextmanager
def tapped_blocks(model: WanTransformer3DModel, taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs (B, N, D) of the named transformer blocks of every forward pass inside the block."""
    found: dict[int, Tensor] = {}
    handles = [
        model.blocks[i].register_forward_hook(lambda _block, _inputs, output, i=i: found.update({i: output}))
        for i in taps
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def features(
    model: WanTransformer3DModel, xt_BCFHW: Tensor, t_B: Tensor, condition: Condition, taps: Sequence[int]
) -> list[Tensor]:
    """Outputs (B, N, D) of the tapped blocks, in the order of `taps`."""
    with tapped_blocks(model, taps) as found, _without_blocks_after(model, max(taps)):
        velocity(model, xt_BCFHW, t_B, condition)
    return [found[i] for i in taps]


@contextmanager
def _without_blocks_after(model: nn.Module, last: int) -> Iterator[None]:
    """Let a network, or the base of an adapted one, run no block after this one: nothing would see what it makes."""
    network = getattr(model, "base", model)
    whole = network.blocks
    network.blocks = whole[: last + 1]
    try:
        yield
    finally:
        network.blocks = whole


def first_frame_mask(batch: int, frames: int, height: int, width: int) -> Tensor:
    """The condition's mask channels (B, 4, F, H, W): 1 on the first latent frame."""
    mask = torch.zeros(batch, 4, frames, height, width)
    mask[:, :, 0] = 1
    return mask


def _latent_statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (like.new_tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return mean, std


def encode_video(vae: AutoencoderKLWan, video_B3THW: Tensor) -> Tensor:
    """Encode pixels in [-1, 1] to normalised latents (B, 16, F, H, W), float32: the mode of the posterior."""
    return _normalised(vae, vae.encode(_placed(vae, video_B3THW)).latent_dist.mode())


def _placed(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    return x.to(get_module_execution_device(vae), vae.dtype)


def _normalised(vae: AutoencoderKLWan, z_BCFHW: Tensor) -> Tensor:
    z = z_BCFHW.float()
    mean, std = _latent_statistics(vae, z)
    return (z - mean) * (1.0 / std)


def encode_condition(vae: AutoencoderKLWan, first_B3HW: Tensor, frames: int) -> Tensor:
    """Encode "first frame, then grey" together, as Wan-I2V's condition needs it.

    Args:
        vae: the teacher's VAE.
        first_B3HW: first frames in [-1, 1].
        frames: frames T of the video to come.

    Returns:
        normalised latents (B, 16, F, H, W); those after the first are not zero, since the VAE looks back.
    """
    still = can_encode_still(vae, frames)
    grey = first_B3HW.new_zeros(*first_B3HW.shape[:2], 1 if still else frames - 1, *first_B3HW.shape[2:])
    video = torch.cat([first_B3HW.unsqueeze(2), grey], dim=2)
    if not still:
        return encode_video(vae, video)
    return _normalised(vae, encode_still(vae, _placed(vae, video), frames).chunk(2, dim=1)[0])  # the mode


def decode_latents(vae: AutoencoderKLWan | SmallDecoder, x_BCFHW: Tensor) -> Tensor:
    """Decode normalised latents to uint8 frames (B, T, H, W, 3), as the pipeline does, or by a small decoder."""
    if isinstance(vae, SmallDecoder):
        return _bytes(vae.decode(x_BCFHW).float())
    mean, std = _latent_statistics(vae, x_BCFHW)
    z = _placed(vae, x_BCFHW / (1.0 / std) + mean)
    video = vae.decode(z, return_dict=False)[0]
    return _bytes((video.float() * 0.5 + 0.5).clamp(0, 1))


def _bytes(video_B3THW: Tensor) -> Tensor:
    return rearrange((video_B3THW * 255).round().to(torch.uint8), "b c t h w -> b t h w c")


def load_pipeline(
    folder: Path | str, dtype: torch.dtype | dict[str, torch.dtype] | None = None, **components
) -> WanImageToVideoPipeline:
    """Load a pipeline folder to sample from or to encode with.

    Args:
        folder: the pipeline.
        dtype: one number format, or one for each network; None: those of `formats`.
        components: replace parts of the pipeline; None omits one.

    Raises:
        FileNotFoundError: the folder is not a pipeline.
    """
    if not (Path(folder) / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model_index.json: it is not a diffusers pipeline folder")
    disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = WanImageToVideoPipeline.from_pretrained(
            str(folder), torch_dtype=dtype or formats(folder), variant=variant_of(Path(folder)), **components
        )
    pipeline.set_progress_bar_config(disable=True)
    if components.get("transformer", pipeline.transformer) is not None:
        take_any_inputs(pipeline.transformer)
    return pipeline


def take_any_inputs(transformer: nn.Module) -> None:
    """Have a transformer cast its inputs as the pipeline does: all but the time to the format of its weights."""

    # The network is the hook's own argument: one that its hook refers to would be in memory until a garbage collection,
    # beside the next large one.
    def in_its_own_dtype(network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        dtype = network.dtype  # diffusers looks through all weights for it

        def cast(name: str, value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating and name != "timestep" else value

        return args, {name: cast(name, value) for name, value in kwargs.items()}

    transformer.register_forward_pre_hook(in_its_own_dtype, with_kwargs=True)


def load_sampler(folder: Path | str) -> WanTransformer3DModel:
    """Load only the transformer of a pipeline folder, in the number format of `formats`, to sample from."""
    transformer = load_transformer(folder, formats(folder)["transformer"]).requires_grad_(False).eval()
    take_any_inputs(transformer)
    return transformer


def forget_origin(folder: Path) -> None:
    """Take out of the configurations that were just written in a folder from where their networks were loaded.

    Equal networks then give equal files wherever they were made, and nobody's paths are shared.
    """
    for path in (*folder.rglob("config.json"), *folder.glob("model_index.json")):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            write_json(path, config)


def load_transformer(folder: Path | str, dtype: torch.dtype) -> WanTransformer3DModel:
    """Load only the transformer of a pipeline folder, to train or to convert it."""
    if not (Path(folder) / "transformer" / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no transformer/config.json: it is not a Wan pipeline folder")
    variant = variant_of(Path(folder), ("transformer",))  # a student's is plain, whatever its teacher's is
    return WanTransformer3DModel.from_pretrained(
        str(folder), subfolder="transformer", torch_dtype=dtype, variant=variant
    )
