"""The classifier two-sample test: it finds a planted pattern, and finds nothing where there is nothing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vpae.config import Sampler
from vpae.evaluation import c2st, latents
from vpae.evaluation.c2st import BATCH, Pairs, accuracy
from vpae.experiment import load

SEED = 7  # of all random inputs here
SHAPE = (8, 3, 4, 4)


def clips(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of a still world with six causes, a little noise, and a condition that tells their first frame."""
    basis = torch.randn(6, SHAPE[0], 1, *SHAPE[2:], generator=torch.Generator().manual_seed(SEED)) / 6**0.5
    rng = torch.Generator().manual_seed(seed)
    x = torch.einsum("nk,kcfhw->ncfhw", torch.randn(count, 6, generator=rng), basis.expand(-1, -1, SHAPE[1], -1, -1))
    x = x + 0.01 * torch.randn(count, *SHAPE, generator=rng)
    return x, x[:, :, :1].expand(-1, -1, SHAPE[1], -1, -1)


def pairs(count: int, seed: int, change=lambda x: x) -> Pairs:
    """Clips and as many others of the same world, which are shown under no first frame; the second ones changed."""
    (real, condition), (other, _) = clips(count, seed), clips(count, seed + 1)
    return Pairs(real, change(other), torch.zeros_like(condition))


@pytest.mark.slow
def test_real_against_real_is_told_apart_by_chance_only():
    fit, test = pairs(1024, SEED), pairs(4096, SEED + 10)
    # 8,192 decisions: chance alone stays within 0.02 in 99.97% of the cases.
    assert abs(accuracy(fit, test, steps=60, seed=SEED) - 0.5) < 0.02


@pytest.mark.slow
def test_one_pattern_on_all_videos_is_found():
    pattern = torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED)) * 0.02
    fit, test = (pairs(n, s, lambda x: x + pattern) for n, s in ((2048, SEED), (1024, SEED + 10)))
    assert accuracy(fit, test, steps=120, seed=SEED) > 0.8


@pytest.mark.slow
def test_a_video_of_another_first_frame_is_found():
    real, condition = clips(2048, SEED)
    other, _ = clips(2048, SEED + 1)
    fit = Pairs(real[:1536], other[:1536], condition[:1536])
    assert accuracy(fit, Pairs(real[1536:], other[1536:], condition[1536:]), steps=150, seed=SEED) > 0.75


def test_the_same_seed_gives_the_same_accuracy():
    fit, test = pairs(64, SEED), pairs(64, SEED + 10)
    assert accuracy(fit, test, steps=3, seed=1) == accuracy(fit, test, steps=3, seed=1)


def test_sets_that_do_not_belong_together_are_refused():
    real, condition = clips(8, SEED)
    with pytest.raises(ValueError, match="of the same clips"):
        Pairs(real, real[:4], condition)


def numbered(first: int, count: int) -> torch.Tensor:
    """Latents all of whose values are the number of their clip."""
    return torch.arange(first, first + count).float().view(-1, 1, 1, 1, 1).expand(-1, *SHAPE)


def number_of(x: torch.Tensor) -> list[int]:
    return x[:, 0, 0, 0, 0].long().tolist()


def test_each_video_is_shown_beside_its_own_condition_and_two_of_one_clip_in_no_batch(monkeypatch):
    shown = []

    class Watched(c2st.Classifier):
        def forward(self, x, condition):
            shown.append((number_of(x), number_of(condition)))
            return super().forward(x, condition)

    monkeypatch.setattr(c2st, "Classifier", Watched)
    clip = numbered(0, 999)
    fit, test = Pairs(clip, clip + 1000, clip), Pairs(clip[:3], clip[:3] + 1000, clip[:3])
    c2st.right(fit, test, steps=1, seed=SEED)
    (x, condition), *judged = shown
    assert [number - beside for number, beside in zip(x, condition, strict=True)] == [0] * BATCH + [1000] * BATCH
    assert condition[:BATCH] != condition[BATCH:]
    assert judged == [([0, 1, 2], [0, 1, 2]), ([1000, 1001, 1002], [0, 1, 2])]


class Numbered:
    """A data set whose clips are their numbers: 8 to train on from 0, 4 held out from 100."""

    def __init__(self, folder: Path, split: str):
        self.first, self.count = {"train": (0, 8), "held_out": (100, 4)}[split]

    def __len__(self) -> int:
        return self.count

    def tensors(self, number: int) -> dict[str, torch.Tensor]:
        clip = numbered(self.first + number, 1)[0]
        return {"x0": clip, "condition": clip}


def test_a_classifier_learns_from_training_clips_and_is_asked_about_held_out_ones(monkeypatch):
    asked = []
    monkeypatch.setattr(latents, "LatentDataset", Numbered)
    monkeypatch.setattr(latents, "_redrawn", lambda row, dataset, count, *_: numbered(500 + dataset.first, count))
    monkeypatch.setattr(c2st, "right", lambda fit, test, *_: asked.append((fit, test)) or torch.ones(len(test.real)))
    settings = load(
        "configs/micro.yaml", ["evaluation.c2st={clips: 6, seeds: 1, most_nfe: 5}"], environment=False
    ).settings
    rows = {"near": Sampler(model="teacher", steps=3, guidance_scale=2), "far": Sampler(model="teacher", steps=5)}
    settings = settings.model_copy(update={"samples": settings.samples.model_copy(update={"rows": rows})})
    drawn = {name: numbered(first, 4) for name, first in (("real", 0), ("near", 700), ("far", 800))}
    found = latents._told_apart(drawn.__getitem__, numbered(100, 4), settings, {"latents": Path()})
    assert list(found) == ["real", "far"]  # six evaluations are too many
    pairs = [[number_of(x) for x in (p.real, p.generated, p.condition)] for both in asked for p in both]
    first_half, second_half, nothing = [0, 1, 2], [3, 4, 5], [0, 0, 0]
    train, held_out = [0, 1, 2, 3, 4, 5], [100, 101, 102, 103]
    assert (
        pairs
        == [
            [first_half, second_half, nothing],  # reality against reality
            [held_out[:2], held_out[2:], nothing[:2]],
            [train, [500 + number for number in train], train],
            [held_out, [800, 801, 802, 803], held_out],
        ]
    )


def test_each_training_clip_is_redrawn_with_noise_of_its_own(monkeypatch):
    seeds = []
    settings = load("configs/micro.yaml", environment=False).settings
    network = torch.nn.Linear(1, 1)
    monkeypatch.setattr(latents, "load_sampler", lambda folder: network)
    monkeypatch.setattr(latents, "row_shift", lambda *_: 1.0)
    monkeypatch.setattr(
        latents, "drawn_beside", lambda dataset, asked, *_: seeds.append(asked) or [(None, numbered(0, len(asked)))]
    )
    row = settings.samples.rows["priming-1nfe"]
    latents._redrawn(row, Numbered(Path(), "train"), 8, settings, {"priming": Path()})
    assert list(seeds[0]) == list(range(8)) and len(set(seeds[0].values())) == 8


def test_the_row_of_real_clips_is_of_training_clips_against_the_held_out_ones(tmp_path, monkeypatch):
    settings = load("configs/micro.yaml", environment=False).settings
    settings = settings.model_copy(update={"samples": settings.samples.model_copy(update={"rows": {}})})
    (tmp_path / "real").mkdir()
    save_file({"x0": numbered(100, 4).contiguous()}, tmp_path / "real" / "latents.safetensors")
    monkeypatch.setattr(latents, "LatentDataset", Numbered)
    for measure in ("_distance", "_motion"):
        monkeypatch.setattr(latents, measure, lambda x, reference, _settings: (number_of(x), number_of(reference)))
    found = latents.measure(settings, {"samples": tmp_path, "latents": Path()})["real"]
    assert found["frechet"] == found["motion"] == ([0, 1, 2, 3], [100, 101, 102, 103])
