"""The condition's grey frames are encoded once, and the result is what diffusers makes of all of them."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

from conftest import seeded
from vpae.models import wan
from vpae.models.still import can_encode_still, encode_still
from vpae.models.wan import encode_condition, encode_video


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    """Wan2.1's layers, at small widths."""
    return seeded(0, lambda: AutoencoderKLWan(base_dim=4, dim_mult=[1, 2, 4, 4])).eval()


def first_frames(batch: int = 1, height: int = 32, width: int = 48) -> torch.Tensor:
    return seeded(1, lambda: torch.rand(batch, 3, height, width) * 2 - 1)


def whole(first: torch.Tensor, frames: int) -> torch.Tensor:
    return torch.cat([first[:, :, None], first.new_zeros(len(first), 3, frames - 1, *first.shape[2:])], dim=2)


@torch.no_grad()
@pytest.mark.parametrize(("frames", "batch"), [(21, 2), (25, 1), (81, 1), (121, 1)])
def test_the_condition_is_diffusers_own(vae, frames, batch):
    first = first_frames(batch)
    theirs = encode_video(vae, whole(first, frames))
    ours = encode_condition(vae, first, frames)
    assert ours.shape == theirs.shape == (batch, 16, (frames + 3) // 4, 4, 6)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (theirs[:, :, 5] - theirs[:, :, 1]).abs().max() > 1e-3  # it has not stood still from the start


@torch.no_grad()
def test_a_quarter_of_the_operations_at_81_frames(vae):
    counts = []
    for work in (
        lambda: encode_video(vae, whole(first_frames(), 81)),
        lambda: encode_condition(vae, first_frames(), 81),
    ):
        with FlopCounterMode(display=False) as counter:
            work()
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.3 * counts[0]


@torch.no_grad()
def test_a_layer_that_is_given_too_few_frames_is_found(vae, monkeypatch):
    monkeypatch.setattr("vpae.models.still.LOOKS_BACK", 1)
    first = first_frames()
    error = (encode_condition(vae, first, 81) - encode_video(vae, whole(first, 81))).abs().max()
    assert error > 1e-4


@torch.no_grad()
def test_any_video_that_stands_still_is_encoded_so(vae):
    moving = seeded(2, lambda: torch.rand(1, 3, 7, 32, 48) * 2 - 1)
    all_of_it = torch.cat([moving, moving[:, :, -1:].expand(-1, -1, 42, -1, -1)], dim=2)
    theirs = vae.encode(all_of_it).latent_dist.parameters
    torch.testing.assert_close(encode_still(vae, moving, 49), theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_short_clips_and_tiles_go_diffusers_way(vae, monkeypatch):
    assert can_encode_still(vae, 21) and not can_encode_still(vae, 17)
    monkeypatch.setattr(vae, "use_tiling", True)
    assert not can_encode_still(vae, 81)
    monkeypatch.undo()
    monkeypatch.setattr(wan, "encode_still", lambda *_: pytest.fail("nothing to gain"))
    assert encode_condition(vae, first_frames(), 17).equal(encode_video(vae, whole(first_frames(), 17)))


def test_residual_vaes_of_later_models_go_diffusers_way():
    later = AutoencoderKLWan(base_dim=4, decoder_base_dim=4, dim_mult=[1, 2, 4, 4], is_residual=True)
    assert not can_encode_still(later, 81)
