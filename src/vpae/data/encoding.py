"""From clips to what a network trains on: latents, condition, text and image embeddings.

Each encoder is the teacher's own, called as `WanImageToVideoPipeline` calls it.
Axes: B batch, C channels, F latent frames, H/W height and width, T frames, L text tokens, N image tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean
from einops import rearrange
from PIL import Image
from torch import Tensor

from vpae.models.wan import TEXT_TOKENS, encode_condition, encode_video

TEXTS_AT_ONCE = 32  # captions of 512 tokens whose attention weights fit beside the rest


@dataclass
class Encoders:
    """The encoding half of a pipeline (its transformer may be absent)."""

    pipeline: WanImageToVideoPipeline

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, 512 at most."""
        cleaned = [prompt_clean(caption) for caption in captions]  # as the pipeline does before it encodes
        return [*map(len, self.pipeline.tokenizer(cleaned, truncation=True, max_length=TEXT_TOKENS).input_ids)]

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> list[Tensor]:
        """UMT5 embeddings of each caption without padding, [(L_i, D)]."""
        lengths, found = self.lengths(captions), []
        for start in range(0, len(captions), TEXTS_AT_ONCE):
            some = slice(start, start + TEXTS_AT_ONCE)
            padded, _ = self.pipeline.encode_prompt(
                list(captions[some]), do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
            )
            # A clone: a view would keep the padding, which is most of it, in memory.
            found += [text[:length].clone().cpu() for text, length in zip(padded, lengths[some], strict=True)]
        return found

    @torch.no_grad()
    def images(self, first_frames: Sequence[np.ndarray]) -> Tensor:
        """CLIP's last but one hidden states of uint8 frames (H, W, 3), as (B, N, D)."""
        images = [Image.fromarray(f) for f in first_frames]
        return self.pipeline.encode_image(images, "cpu")

    def clips(self, frames_BTHW3: np.ndarray, captions: Sequence[str]) -> dict[str, Sequence[Tensor]]:
        """All that is stored of each of these clips, by its name in a shard; uint8 frames (B, T, H, W, 3)."""
        return {**self.pictures(frames_BTHW3), "text": self.texts(captions)}

    def pictures(self, frames_BTHW3: np.ndarray) -> dict[str, Tensor]:
        """The same of the clips' frames alone."""
        x0, first = self.videos(frames_BTHW3), list(frames_BTHW3[:, 0])
        return {"x0": x0, "condition": self.conditions(first, frames_BTHW3.shape[1]), "image": self.images(first)}

    @torch.no_grad()
    def videos(self, frames_BTHW3: np.ndarray) -> Tensor:
        """Normalised latents (B, 16, F, H, W) of uint8 frames (B, T, H, W, 3)."""
        return encode_video(self.pipeline.vae, to_signed(frames_BTHW3)).cpu()

    @torch.no_grad()
    def conditions(self, first_frames: Sequence[np.ndarray], frames: int) -> Tensor:
        """Normalised latents (B, 16, F, H, W) of "first frame, then grey"."""
        first = to_signed(np.stack(first_frames)[:, None])[:, :, 0]
        return encode_condition(self.pipeline.vae, first, frames).cpu()


def to_signed(frames_BTHW3: np.ndarray) -> Tensor:
    """uint8 frames (B, T, H, W, 3) -> float32 (B, 3, T, H, W) in [-1, 1], rounded as diffusers does."""
    return 2.0 * (rearrange(torch.from_numpy(frames_BTHW3.astype(np.float32) / 255.0), "b t h w c -> b c t h w")) - 1.0


def pad_text(text_LD: Tensor, tokens: int = TEXT_TOKENS) -> Tensor:
    """Zeros after the caption's end, up to Wan's 512 tokens or what `text_tokens_for` says."""
    return torch.nn.functional.pad(text_LD, (0, 0, 0, tokens - len(text_LD)))
