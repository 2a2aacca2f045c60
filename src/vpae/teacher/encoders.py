"""Training of the tiny UMT5 and CLIP encoders: each caption must find its clip's first and last frame, and the reverse.

The last frame is what makes the words of motion mean something; at inference only the first is seen.
Axes: B batch, L text tokens, N image tokens, D width, H/W height and width.
"""

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from vpae.config import TinyEncoders
from vpae.training.ema import make_ema
from vpae.training.loop import Role


def build_tokenizer(captions: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE fitted to the captions; any text can be encoded, and each ends in </s> as UMT5's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(captions), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def build_text_encoder(config: TinyEncoders, tokens: int) -> UMT5EncoderModel:
    """A small UMT5 encoder."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=tokens,
            d_model=config.text_dim,
            d_kv=config.text_dim // 4,
            num_heads=4,
            d_ff=2 * config.text_dim,
            num_layers=config.text_layers,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_image_encoder(config: TinyEncoders, height: int) -> tuple[CLIPVisionModel, CLIPImageProcessor]:
    """A small CLIP vision model, and the processor that brings images to its size."""
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.image_dim,
            intermediate_size=2 * config.image_dim,
            num_hidden_layers=config.image_layers,
            num_attention_heads=4,
            image_size=height,
            patch_size=config.image_patch,
        )
    )
    size = {"height": height, "width": height}
    return model, CLIPImageProcessor(size={"shortest_edge": height}, crop_size=size)


class Towers(nn.Module):
    """Both encoders with the projections that only their training needs."""

    def __init__(self, text: UMT5EncoderModel, image: CLIPVisionModel):
        super().__init__()
        text_dim, image_dim, shared = text.config.d_model, image.config.hidden_size, 64
        self.text, self.image = text, image
        self.text_head = nn.Linear(text_dim, shared)
        self.image_head = nn.Sequential(
            nn.Linear(2 * image_dim, 2 * image_dim), nn.GELU(), nn.Linear(2 * image_dim, shared)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def text_embedding(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Unit vectors (B, 64) of captions: the mean over their tokens, projected."""
        hidden = self.text(ids_BL, attention_mask=mask_BL).last_hidden_state
        mean = (hidden * mask_BL.unsqueeze(-1)).sum(1) / mask_BL.sum(1, keepdim=True)
        return F.normalize(self.text_head(mean), dim=-1)

    def clip_embedding(self, first_B3HW: Tensor, last_B3HW: Tensor) -> Tensor:
        """Unit vectors (B, 64) of pairs of frames, from the features that Wan uses (the last layer but one)."""
        hidden = self.image(torch.cat([first_B3HW, last_B3HW]), output_hidden_states=True).hidden_states[-2].mean(1)
        return F.normalize(self.image_head(torch.cat(hidden.chunk(2), dim=-1)), dim=-1)


class EncoderPhase:
    """Symmetric InfoNCE; clips with the same caption are all right answers."""

    name = "teacher/encoders"
    main = "towers"

    def __init__(self, config: TinyEncoders, towers: Towers):
        self.roles = {"towers": Role(towers, config.optimizer)}
        self.ema = make_ema(towers)

    def turns(self, step: int) -> list[str]:
        return ["towers"]

    def loss(self, turn: str, batch: dict[str, Tensor], rng: torch.Generator, step: int) -> tuple[Tensor, dict]:
        """Contrastive loss of a batch with keys ids, mask (B, L), first, last (B, 3, H, W)."""
        towers = self.roles["towers"].module
        text = towers.text_embedding(batch["ids"], batch["mask"])
        clip = towers.clip_embedding(batch["first"], batch["last"])
        logits = towers.log_scale.exp() * text @ clip.T
        same = (batch["ids"][:, None] == batch["ids"][None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        loss = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
        hit = same.gather(1, logits.argmax(1, keepdim=True)).mean()
        return loss, {"retrieval": hit}
