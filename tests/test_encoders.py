"""The tiny encoders' training: the order of words must not get lost."""

import copy
from types import SimpleNamespace

import pytest
import torch

from conftest import MICRO
from vpae.config import TinyEncoders
from vpae.data.world import draw_truth
from vpae.experiment import load
from vpae.models.wan import TEXT_TOKENS
from vpae.teacher.encoders import Reader, TextPhase, build_text_encoder, build_tokenizer
from vpae.teacher.stage import _captions

SWAPPED = (
    "a small magenta circle moves up beside a small red square",
    "a small red square moves up beside a small magenta circle",
)


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """Captions in which nothing but the order of words tells which sprite moves."""
    truths = [draw_truth((1, 0, i), 5, 1.0, 0.4, 1.0) for i in range(3000)]
    return [t.caption for t in truths if t.bystander and t.sprite.size == "small"]


def start(captions, **settings):
    config = TinyEncoders(text_dim=32, **settings)
    tokenizer = build_tokenizer(captions, config.vocabulary)
    torch.manual_seed(0)
    reader = Reader(build_text_encoder(config, len(tokenizer)))
    return tokenizer, TextPhase(config, reader)


def train(tokenizer, phase, captions, steps):
    reader = phase.roles["reader"].module
    optimizer = torch.optim.AdamW([p for p in reader.parameters() if p.requires_grad], 3e-3)
    for step in range(steps):
        chosen = torch.randint(len(captions), (32,), generator=torch.Generator().manual_seed(step)).tolist()
        text = tokenizer([captions[i] for i in chosen], padding=True, return_tensors="pt")
        loss, logs = phase.loss("reader", {"ids": text.input_ids, "mask": text.attention_mask}, torch.Generator(), step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
    return logs


@torch.no_grad()
def order(tokenizer, encoder) -> float:
    """How far a token's embedding moves when the two sprites of its caption change places, relative to its length."""
    text = tokenizer(list(SWAPPED), return_tensors="pt")
    one, other = encoder(text.input_ids, attention_mask=text.attention_mask).last_hidden_state
    place = [text.input_ids[1].tolist().index(token) for token in text.input_ids[0].tolist()]
    same_words = {k: v for k, v in enumerate(place) if text.input_ids[0].tolist().count(text.input_ids[0, k]) == 1}
    moved = [(one[k] - other[v]).norm() / one[k].norm() for k, v in same_words.items()]
    return float(torch.stack(moved).mean())


def test_captions_longer_than_the_text_encoder_reads_are_cut_off(captions):
    tokenizer, phase = start(captions)
    clips = [SimpleNamespace(caption=text) for text in (captions[0], "red " * 2000)]
    settings = load(MICRO, ["teacher.encoders.training.batch_size=2"]).settings
    batch = _captions(clips, tokenizer, settings)(0)
    assert batch["ids"].shape == batch["mask"].shape == (2, TEXT_TOKENS)
    loss, _ = phase.loss("reader", batch, torch.Generator(), 0)
    assert loss.isfinite()


def test_the_two_captions_hold_the_same_words(captions):
    tokenizer, _ = start(captions)
    assert sorted(tokenizer(SWAPPED[0]).input_ids) == sorted(tokenizer(SWAPPED[1]).input_ids)


def test_without_the_places_of_words_both_captions_are_one_and_half_of_what_differs_is_read_wrong(captions):
    tokenizer, phase = start(captions)
    reader = phase.roles["reader"].module
    text = tokenizer(list(SWAPPED), return_tensors="pt")
    _, (one, other) = reader(text.input_ids, text.attention_mask)
    assert (one - other).norm() > 1e-3 * one.norm()
    with torch.no_grad():
        for name, parameter in reader.text.named_parameters():
            if "relative_attention_bias" in name:
                parameter.zero_()
    _, (one, other) = reader(text.input_ids, text.attention_mask)
    torch.testing.assert_close(one, other)
    differing = (text.input_ids[0] != text.input_ids[1]).sum() / text.attention_mask[0].sum()
    assert differing > 0.3
    _, read = reader.loss(torch.stack([one, one]), text.input_ids, text.attention_mask)
    assert read <= 1 - differing / 2


@pytest.mark.slow
def test_reading_teaches_the_encoder_the_places_of_words(captions):
    tokenizer, phase = start(captions, stay_weight=0.0)
    before = train(tokenizer, phase, captions, 1)["read"]
    encoder = phase.roles["reader"].module.text
    grown = {name: p.abs().max().item() for name, p in encoder.named_parameters() if "relative_attention_bias" in name}
    assert train(tokenizer, phase, captions, 150)["read"] > before + 0.3
    for name, parameter in encoder.named_parameters():
        if name in grown:
            assert parameter.grad.abs().max() > 0 and parameter.abs().max() > grown[name]


def test_it_stays_where_it_was_when_staying_is_all_that_counts(captions):
    tokenizer, phase = start(captions, stay_weight=1e4)
    old = copy.deepcopy(phase.old.state_dict())
    before = order(tokenizer, phase.old)
    logs = train(tokenizer, phase, captions, 60)
    assert 0 < logs["moved"] < 1e-2
    assert all(torch.equal(value, phase.old.state_dict()[key]) for key, value in old.items())
    assert order(tokenizer, phase.roles["reader"].module.text) == pytest.approx(before, abs=0.1)
