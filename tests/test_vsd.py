"""Variational score distillation: its gradient, its normaliser, and what it does to Gaussians."""

import pytest
import torch
from torch import Tensor

from vpae.distill.losses.vsd import SMALLEST_NORMALISER, flow_matching_loss, vsd_direction, vsd_loss

SHAPE = (3, 16, 2, 4, 4)


@pytest.fixture
def videos() -> tuple[Tensor, Tensor, Tensor]:
    """xh, mu_real, mu_fake."""
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(SHAPE, generator=rng) for _ in range(3))


def test_the_gradient_of_the_loss_is_the_direction_over_the_number_of_values(videos):
    xh, real, fake = videos
    xh.requires_grad_()
    g = vsd_direction(xh, real, fake)
    vsd_loss(xh, g).backward()
    torch.testing.assert_close(xh.grad, g / xh.numel(), atol=1e-9, rtol=1e-5)


def test_the_direction_is_the_difference_of_predictions_over_the_mean_distance_to_the_real_one(videos):
    xh, real, fake = videos
    for one, x, r, f in zip(vsd_direction(xh, real, fake), xh, real, fake, strict=True):
        torch.testing.assert_close(one, (f - r) / (x - r).abs().mean())


def test_one_video_s_distance_does_not_touch_the_others(videos):
    xh, real, fake = videos
    before = vsd_direction(xh, real, fake)
    further = xh.clone()
    further[0] = real[0] + 10 * (xh[0] - real[0])
    after = vsd_direction(further, real, fake)
    assert after[1:].equal(before[1:])
    torch.testing.assert_close(after[0], before[0] / 10)


def test_the_order_of_the_batch_does_not_matter(videos):
    order = torch.tensor([2, 0, 1])
    assert vsd_direction(*(v[order] for v in videos)).equal(vsd_direction(*videos)[order])


def test_no_gradient_reaches_the_predictions(videos):
    xh, real, fake = (v.requires_grad_() for v in videos)
    vsd_loss(xh, vsd_direction(xh, real, fake)).backward()
    assert xh.grad is not None and real.grad is None and fake.grad is None


@pytest.mark.parametrize("gap", [0.0, 1.0])
def test_nothing_is_nan_where_the_video_equals_the_real_prediction(videos, gap):
    xh = videos[0].requires_grad_()
    g = vsd_direction(xh, xh, xh + gap)
    vsd_loss(xh, g).backward()
    assert xh.grad.isfinite().all()
    torch.testing.assert_close(g, torch.full(SHAPE, gap / SMALLEST_NORMALISER), rtol=1e-2, atol=0)


def test_half_precision_predictions_are_compared_in_float32(videos):
    xh, real, fake = (v.bfloat16() for v in videos)
    g = vsd_direction(xh, real, fake)
    assert g.dtype == torch.float32
    assert g.equal(vsd_direction(xh.float(), real.float(), fake.float()))


def posterior_mean(x_t: Tensor, t: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """E[x0 | x_t] for x0 ~ N(mean, std^2) and x_t = (1 - t) x0 + t eps."""
    gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
    return mean + gain * (x_t - (1 - t) * mean)


def test_two_gaussians_of_equal_width_give_the_closed_form():
    rng = torch.Generator().manual_seed(0)
    t, std, real_mean, fake_mean = (torch.tensor(v) for v in (0.7, 0.5, 2.0, -1.0))
    xh = fake_mean + std * torch.randn(SHAPE, generator=rng)
    x_t = (1 - t) * xh + t * torch.randn(SHAPE, generator=rng)
    real, fake = (posterior_mean(x_t, t, m, std) for m in (real_mean, fake_mean))
    # The predictions differ by (m_fake - m_real) t^2 / ((1 - t)^2 s^2 + t^2), whatever x_t is.
    difference = -3.0 * 0.49 / (0.09 * 0.25 + 0.49)
    expected = difference / (xh - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(vsd_direction(xh, real, fake), expected.expand(SHAPE))


def test_descent_brings_a_gaussian_generator_to_the_real_distribution_and_stops_there():
    rng = torch.Generator().manual_seed(0)
    real_mean, real_std = torch.tensor(2.0), torch.tensor(0.5)
    mean, std = torch.tensor(-1.0, requires_grad=True), torch.tensor(1.5, requires_grad=True)

    def gradient() -> tuple[Tensor, Tensor]:
        z, noise = (torch.randn(8, *SHAPE[1:], generator=rng) for _ in range(2))
        t = (0.02 + 0.96 * torch.rand(8, 1, 1, 1, 1, generator=rng)).expand_as(z)
        xh = mean + std * z
        x_t = ((1 - t) * xh + t * noise).detach()
        real = posterior_mean(x_t, t, real_mean, real_std)
        fake = posterior_mean(x_t, t, mean.detach(), std.detach())  # a fake model that knows the generator exactly
        return torch.autograd.grad(vsd_loss(xh, vsd_direction(xh, real, fake)), [mean, std])

    assert gradient()[0] < 0  # the first step goes up, towards the real mean
    for _ in range(300):
        for parameter, slope in zip((mean, std), gradient(), strict=True):
            parameter.data -= 0.2 * slope
    assert mean.item() == pytest.approx(2.0, abs=0.01) and std.item() == pytest.approx(0.5, abs=0.01)
    mean.data, std.data = real_mean.clone(), real_std.clone()
    assert gradient() == (0, 0)


def test_the_fake_model_s_loss_is_zero_at_the_velocity_alone_and_does_not_move_the_generator(videos):
    x, noise, v = videos
    x.requires_grad_(), v.requires_grad_()
    assert flow_matching_loss(noise - x, x, noise) == 0
    flow_matching_loss(v, x, noise).backward()
    torch.testing.assert_close(v.grad, 2 * (v - (noise - x)).detach() / v.numel())
    assert x.grad is None
