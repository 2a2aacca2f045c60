"""Training of the tiny `WanTransformer3DModel` by flow matching."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

from vpae.config import TinyTransformer
from vpae.flow import add_noise, sample_times, velocity_target
from vpae.models.wan import Condition, velocity
from vpae.training.ema import make_ema
from vpae.training.loop import progress_at
from vpae.training.phase import Phase, Role


def build(config: TinyTransformer, text_dim: int, image_dim: int) -> WanTransformer3DModel:
    """A small Wan-I2V transformer: 16 + 20 input channels, 16 output channels, patches of (1, 2, 2)."""
    width = config.heads * config.head_dim
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=36,
        out_channels=16,
        text_dim=text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_multiple * width,
        num_layers=config.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        image_dim=image_dim,
        added_kv_proj_dim=width,
        rope_max_seq_len=64,
    )


class FlowMatchingPhase(Phase):
    """|| v(x_t, t, c) - (eps - x) ||^2 with captions dropped now and then, so that guidance has its empty branch."""

    name = "teacher/transformer"
    main = "transformer"

    def __init__(self, config: TinyTransformer, shift: float, transformer: WanTransformer3DModel):
        self.config, self.shift = config, shift
        self.roles = {"transformer": Role(transformer, config.optimizer)}
        self.ema = make_ema(transformer)
        if config.compile:
            for block in transformer.blocks:
                block.compile()

    def loss(
        self, turn: str, batch: tuple[Tensor, Condition], rng: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow matching on latents x (B, 16, F, H, W)."""
        x, condition = batch
        noise = torch.randn(x.shape, generator=rng, device=x.device)
        t = sample_times(self.config.times, self.shift, progress_at(step, self.config.training), len(x), rng)
        dropped = torch.rand(len(x), generator=rng, device=x.device) < self.config.drop_text
        text = torch.where(dropped[:, None, None], condition.without_text().text_BLD, condition.text_BLD)
        v = velocity(self.roles["transformer"].module, add_noise(x, noise, t), t, replace(condition, text_BLD=text))
        return F.mse_loss(v, velocity_target(x, noise)), {}
