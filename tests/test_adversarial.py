"""Hinge and relativistic losses, the two probes of ST-R1, and conditional score distillation."""

import math

import pytest
import torch
from torch import Tensor

from vpae.distill.losses.adversarial import (
    discriminator_hinge,
    discriminator_relativistic,
    generator_adversarial,
    generator_relativistic,
)
from vpae.distill.losses.probes import perturbation, probe_penalty
from vpae.distill.losses.vsd import csds_loss

SHAPE = (4096, 2, 3, 4, 5)  # B C F H W
PROBES = {"spatial": (2,), "temporal": (3, 4)}  # axes on which each is constant
probes = pytest.mark.parametrize("name", PROBES)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("real", "fake", "expected"),
    [
        ([2.0], [-2.0], 0.0),
        ([1.0], [-1.0], 0.0),
        ([0.0], [0.0], 2.0),
        ([-1.0], [3.0], 6.0),
        ([2.0, 0.5, -1.0], [-2.0, -0.5, 1.0], 2.5 / 3 + 2.5 / 3),
        ([5.0, 0.0], [0.0], 1.5),
    ],
)
def test_the_discriminator_s_hinge(real, fake, expected):
    assert discriminator_hinge(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(expected)


def test_the_hinge_ignores_logits_beyond_the_margin():
    real, fake = torch.tensor([1.5, 0.5], requires_grad=True), torch.tensor([-1.5, 0.5], requires_grad=True)
    discriminator_hinge(real, fake).backward()
    assert real.grad.tolist() == [0, -0.5] and fake.grad.tolist() == [0, 0.5]


@pytest.mark.parametrize(
    ("form", "logits", "expected", "gradient"),
    [
        ("hinge_linear", [0.5, -1.0], 0.25, [-0.5, -0.5]),
        ("hinge_linear", [3.0], -3.0, [-1.0]),
        ("hinge_clipped", [0.5, -1.0], 1.25, [-0.5, -0.5]),
        ("hinge_clipped", [3.0], 0.0, [0.0]),
    ],
)
def test_the_generator_s_two_forms(form, logits, expected, gradient):
    logits = torch.tensor(logits, requires_grad=True)
    loss = generator_adversarial(logits, form)
    loss.backward()
    assert loss.item() == pytest.approx(expected) and logits.grad.tolist() == gradient


def test_relativistic_losses_are_of_each_pair_and_opposed():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -1.0], requires_grad=True)
    pairs = [(2.0, 0.5), (-1.0, -1.0)]
    told = sum(math.log1p(math.exp(f - r)) for r, f in pairs) / 2
    fooled = sum(math.log1p(math.exp(r - f)) for r, f in pairs) / 2
    assert discriminator_relativistic(real, fake).item() == pytest.approx(told)
    assert generator_relativistic(real, fake).item() == pytest.approx(fooled)
    # What is common to the two logits of a pair, as all that the first frame says, counts for nothing.
    offset = torch.tensor([5.0, -3.0])
    torch.testing.assert_close(discriminator_relativistic(real + offset, fake + offset).item(), told, rtol=1e-5, atol=0)
    (of_one,) = torch.autograd.grad(discriminator_relativistic(real, fake), fake)
    (of_other,) = torch.autograd.grad(generator_relativistic(real, fake), fake)
    assert of_one[1] == -of_other[1] and (of_one > 0).all() and (of_other < 0).all()


def test_the_penalty_is_the_sum_of_both_mean_squares():
    logits, spatial, temporal = (torch.tensor(v) for v in ([1.0, 2.0], [1.5, 2.0], [0.0, 4.0]))
    assert probe_penalty(logits, spatial, temporal) == 0.25 / 2 + (1 + 4) / 2


@probes
def test_a_linear_discriminator_is_penalised_as_the_closed_form_says(name):
    constant_axes = PROBES[name]
    w = torch.randn(SHAPE[1:], generator=rng(1), dtype=torch.float64)
    x = torch.randn(SHAPE, generator=rng(2), dtype=torch.float64)

    def d(x: Tensor) -> Tensor:
        return (w * x).sum(dim=(1, 2, 3, 4))

    logits, probed = d(x), d(x + perturbation(name, x, 0.1, rng()))
    probed = (probed, logits) if name == "spatial" else (logits, probed)
    # sigma^2 times the sum of squares of w, added up over the axes on which the probe is constant.
    expected = 0.1**2 * w.sum(dim=[axis - 1 for axis in constant_axes]).square().sum()
    torch.testing.assert_close(probe_penalty(logits, *probed), expected, rtol=0.09, atol=0)  # four standard errors


def test_a_discriminator_of_movement_alone_feels_only_the_temporal_probe():
    x = torch.randn(8, 16, 3, 4, 4, generator=rng())

    def movement(x: Tensor) -> Tensor:
        return x.diff(dim=2).square().mean(dim=(1, 2, 3, 4))

    logits = movement(x)
    torch.testing.assert_close(movement(x + perturbation("spatial", x, 0.1, rng())), logits, atol=1e-6, rtol=0)
    assert (movement(x + perturbation("temporal", x, 0.1, rng())) - logits).abs().min() > 1e-4


def test_a_discriminator_of_spatial_structure_alone_feels_only_the_spatial_probe():
    x = torch.randn(8, 16, 3, 4, 4, generator=rng())

    def structure(x: Tensor) -> Tensor:
        return (x.diff(dim=3).square().mean(dim=(1, 2, 3, 4)) + x.diff(dim=4).square().mean(dim=(1, 2, 3, 4))).sqrt()

    logits = structure(x)
    torch.testing.assert_close(structure(x + perturbation("temporal", x, 0.1, rng())), logits, atol=1e-6, rtol=0)
    assert (structure(x + perturbation("spatial", x, 0.1, rng())) - logits).abs().min() > 1e-4


def test_a_discriminator_that_reads_one_frame_feels_the_spatial_probe():
    x = torch.randn(8, 16, 3, 4, 4, generator=rng())
    assert (x + perturbation("spatial", x, 0.01, rng()) - x)[:, :, 1].abs().mean() > 0.005


@probes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_probe_is_float32_noise_of_the_promised_width_that_is_constant_on_the_other_axis(name, dtype):
    constant_axes = PROBES[name]
    x = torch.randn(64, 16, 3, 4, 5, generator=rng(1)).to(dtype)
    d = perturbation(name, x, 0.01, rng())
    assert d.shape == x.shape and d.dtype == (x + d).dtype == torch.float32
    for axis in range(5):
        values = d.diff(dim=axis)
        assert (values == 0).all() if axis in constant_axes else (values != 0).float().mean() > 0.99
    assert d.std().item() == pytest.approx(0.01, rel=0.05) and abs(d.mean().item()) < 0.001


def test_conditional_score_distillation_pulls_the_video_to_the_teacher_and_not_the_reverse():
    xh, target = (torch.randn(2, 16, 2, 4, 4, generator=rng(i)).requires_grad_() for i in range(2))
    loss = csds_loss(xh, target)
    loss.backward()
    assert loss.item() == pytest.approx((xh - target).square().mean().item())
    torch.testing.assert_close(xh.grad, 2 * (xh - target).detach() / xh.numel())
    assert target.grad is None
