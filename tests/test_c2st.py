"""The classifier two-sample test: it finds a planted pattern, and finds nothing where there is nothing."""

import pytest
import torch

from vpae.evaluation.c2st import Pairs, accuracy

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
