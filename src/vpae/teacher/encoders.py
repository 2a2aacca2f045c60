"""Training of the tiny UMT5 and CLIP encoders: each caption must find its clip's first and last frame, and the reverse.

The last frame is what makes the words of motion mean something; at inference only the first is seen. A caption must
also be readable from its embedding: a contrastive loss alone leaves a text encoder nearly blind to the order of words
(Yuksekgonul et al., ICLR 2023), and with it to which of two sprites it is that moves.
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
from vpae.models.wan import TEXT_TOKENS
from vpae.training.ema import make_ema
from vpae.training.phase import Phase, Role


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


class Reader(nn.Module):
    """A text encoder, with what reads a caption back from the mean of its token embeddings."""

    def __init__(self, text: UMT5EncoderModel):
        super().__init__()
        width = text.config.d_model
        self.text = text
        self.place = nn.Embedding(TEXT_TOKENS, width)
        self.words = nn.Sequential(
            nn.Linear(2 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, text.config.vocab_size)
        )

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Token embeddings (B, L, D), and their mean (B, D), which by itself has no order."""
        hidden = self.text(ids_BL, attention_mask=mask_BL).last_hidden_state
        return hidden, (hidden * mask_BL.unsqueeze(-1)).sum(1) / mask_BL.sum(1, keepdim=True)

    def loss(self, mean_BD: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the token at each place, and the share of the tokens that are read right."""
        batch, length = ids_BL.shape
        places = self.place.weight[:length].expand(batch, -1, -1)
        logits = self.words(torch.cat([mean_BD[:, None].expand(-1, length, -1), places], dim=-1))[mask_BL.bool()]
        wanted = ids_BL[mask_BL.bool()]
        return F.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted).float().mean()


class Towers(nn.Module):
    """Both encoders with the projections that only their training needs."""

    def __init__(self, text: UMT5EncoderModel, image: CLIPVisionModel):
        super().__init__()
        text_dim, image_dim, shared = text.config.d_model, image.config.hidden_size, 64
        self.reader, self.image = Reader(text), image
        self.text_head = nn.Linear(text_dim, shared)
        self.image_head = nn.Sequential(
            nn.Linear(2 * image_dim, 2 * image_dim), nn.GELU(), nn.Linear(2 * image_dim, shared)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def clip_embedding(self, first_B3HW: Tensor, last_B3HW: Tensor) -> Tensor:
        """Unit vectors (B, 64) of pairs of frames, from the features that Wan uses (the last layer but one)."""
        hidden = self.image(torch.cat([first_B3HW, last_B3HW]), output_hidden_states=True).hidden_states[-2].mean(1)
        return F.normalize(self.image_head(torch.cat(hidden.chunk(2), dim=-1)), dim=-1)


class EncoderPhase(Phase):
    """Symmetric InfoNCE, in which clips with the same caption are all right answers, and reading captions back."""

    name = "teacher/encoders"
    main = "towers"

    def __init__(self, config: TinyEncoders, towers: Towers):
        self.roles = {"towers": Role(towers, config.optimizer)}
        self.ema = make_ema(towers)

    def loss(self, turn: str, batch: dict[str, Tensor], rng: torch.Generator, step: int) -> tuple[Tensor, dict]:
        """Contrastive and reading loss of a batch with keys ids, mask (B, L), first, last (B, 3, H, W)."""
        towers, ids, mask = self.roles["towers"].module, batch["ids"], batch["mask"]
        _, mean = towers.reader(ids, mask)
        text = F.normalize(towers.text_head(mean), dim=-1)
        clip = towers.clip_embedding(batch["first"], batch["last"])
        logits = towers.log_scale.exp() * text @ clip.T
        same = (ids[:, None] == ids[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        contrastive = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
        reading, read = towers.reader.loss(mean, ids, mask)
        hit = same.gather(1, logits.argmax(1, keepdim=True)).mean()
        return contrastive + reading, {"retrieval": hit, "read": read}


class TextPhase(Phase):
    """A finished text encoder learns the order of words: captions are read back, its embeddings stay near the old."""

    name = "teacher/text"
    main = "reader"

    def __init__(self, config: TinyEncoders, reader: Reader):
        self.config = config
        self.old = make_ema(reader.text)
        self.roles = {"reader": Role(reader, config.optimizer)}
        self.ema = make_ema(reader)

    def loss(self, turn: str, batch: dict[str, Tensor], rng: torch.Generator, step: int) -> tuple[Tensor, dict]:
        """Reading loss of a batch with keys ids, mask (B, L), and relative squared distance from the old encoder."""
        reader, ids, mask = self.roles["reader"].module, batch["ids"], batch["mask"]
        hidden, mean = reader(ids, mask)
        with torch.no_grad():
            old = self.old(ids, attention_mask=mask).last_hidden_state
        reading, read = reader.loss(mean, ids, mask)
        moved = ((hidden - old)[mask.bool()] ** 2).mean() / (old[mask.bool()] ** 2).mean()
        return reading + self.config.stay_weight * moved, {"read": read, "moved": moved}
