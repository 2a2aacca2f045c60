"""The rivals' own losses against closed forms: consistency along an ODE, the non-saturating GAN, approximated R1."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vpae.distill.losses.adversarial import discriminator_non_saturating, generator_non_saturating
from vpae.distill.losses.consistency import consistency_loss, neighbouring_times, ode_step
from vpae.distill.losses.probes import perturbation, probe_penalty
from vpae.flow import add_noise, expand, schedule, x0_from_velocity

SHAPE = (512, 2, 2, 3, 3)  # B C F H W


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Consistency: data whose flow is known.


def velocity_of_gaussian(x: Tensor, t: Tensor, width: float) -> Tensor:
    """E[eps - x0 | x_t] for data N(0, width^2)."""
    t = expand(t, x)
    return (t - (1 - t) * width**2) / ((1 - t) ** 2 * width**2 + t**2) * x


def solution_of_gaussian(x: Tensor, t: Tensor, width: float) -> Tensor:
    """Where the ODE ends that begins at x_t: the flow scales x_t by its standard deviation."""
    t = expand(t, x)
    return width * x / ((1 - t) ** 2 * width**2 + t**2).sqrt()


def gaussian_consistency(intervals: int, width: float = 0.5, scale: float = 1.0) -> float:
    """The loss of the exact solution (times `scale` at t alone) with the teacher's Euler step."""
    x, noise = (torch.randn(SHAPE, generator=rng(i), dtype=torch.float64) for i in (1, 2))
    t, s = (v.double() for v in neighbouring_times(intervals, 3.0, SHAPE[0], rng()))
    x_t = add_noise(width * x, noise, t)
    x_s = ode_step(x_t, velocity_of_gaussian(x_t, t, width), t, s)
    student, target = solution_of_gaussian(x_t, t, width), solution_of_gaussian(x_s, s, width)
    return consistency_loss(scale * student, target).item()


def test_a_flow_of_straight_lines_makes_the_exact_student_s_loss_zero():
    mu, noise = (torch.randn(SHAPE, generator=rng(i)) for i in (3, 4))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (x - mu) / expand(t, x).clamp_min(1e-9)  # of data that is mu alone

    t, s = neighbouring_times(8, 3.0, SHAPE[0], rng())
    x_t = add_noise(mu, noise, t)
    x_s = ode_step(x_t, velocity(x_t, t), t, s)
    student, target = (x0_from_velocity(x, velocity(x, at), at) for x, at in ((x_t, t), (x_s, s)))
    assert consistency_loss(student, target) < 1e-10 < consistency_loss(student, x_s)


def test_the_exact_solution_s_loss_is_the_error_of_the_euler_step_and_falls_with_its_fourth_power():
    coarse, fine = gaussian_consistency(50), gaussian_consistency(200)
    assert coarse < 1e-4 and coarse / fine == pytest.approx(4**4, rel=0.35)
    assert gaussian_consistency(200, scale=1.1) > 1000 * fine  # what is no solution is seen


def test_the_teacher_s_steps_joined_are_its_sampler():
    width, steps = 0.5, 8
    x = start = torch.randn(4, 1, 1, 1, 2, generator=rng(), dtype=torch.float64)
    times = schedule(steps, 3.0)
    for t, s in pairwise(times):
        t_B, s_B = t.expand(4), s.expand(4)
        x = ode_step(x, velocity_of_gaussian(x, t_B, width), t_B, s_B)
    factor = 1.0
    for t, s in pairwise(times.tolist()):
        factor *= 1 + (s - t) * (t - (1 - t) * width**2) / ((1 - t) ** 2 * width**2 + t**2)
    torch.testing.assert_close(x, factor * start)


def test_times_are_neighbours_of_the_shifted_schedule_and_all_are_drawn():
    times = schedule(5, 3.0).float()
    t, s = neighbouring_times(5, 3.0, 1000, rng())
    place = (t[:, None] == times).int().argmax(dim=1)
    assert t.equal(times[place]) and s.equal(times[place + 1])
    counts = torch.bincount(place, minlength=6)
    assert counts[5] == 0 and counts[:5].min() > 150


def test_only_the_student_is_moved_towards_the_target():
    student, target = (torch.randn(2, 4, generator=rng(i)).requires_grad_() for i in (1, 2))
    consistency_loss(student, target).backward()
    torch.testing.assert_close(student.grad, 2 * (student - target).detach() / student.numel())
    assert target.grad is None


@pytest.mark.parametrize("c", [0.001, 1.0])
def test_the_pseudo_huber_distance(c):
    student, target = torch.tensor([[3.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    assert consistency_loss(student, target, c).item() == pytest.approx((math.sqrt(16 + c * c) - c) / 2)


# The non-saturating GAN.


def test_the_non_saturating_losses_are_the_logarithms_of_the_sigmoid():
    real, fake = torch.tensor([0.5, -1.0]), torch.tensor([2.0])
    sigmoid = torch.sigmoid
    expected = -sigmoid(real).log().mean() - (1 - sigmoid(fake)).log().mean()
    torch.testing.assert_close(discriminator_non_saturating(real, fake), expected)
    torch.testing.assert_close(generator_non_saturating(fake), -sigmoid(fake).log().mean())
    assert discriminator_non_saturating(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("logit", [-100.0, 100.0])
def test_a_logit_far_out_has_a_finite_loss_and_the_generator_s_gradient_does_not_vanish_where_it_fails(logit):
    fake = torch.tensor([logit], requires_grad=True)
    loss = generator_non_saturating(fake)
    loss.backward()
    assert loss.item() == pytest.approx(max(0.0, -logit))
    assert fake.grad.item() == pytest.approx(-1 if logit < 0 else 0)


# Approximated R1.


def test_the_penalty_of_a_linear_discriminator_is_sigma_squared_times_its_squared_gradient():
    shape, sigma = (4096, 2, 2, 3, 3), 0.1
    w = torch.randn(shape[1:], generator=rng(1), dtype=torch.float64)
    x = torch.randn(shape, generator=rng(2), dtype=torch.float64)

    def d(x: Tensor) -> Tensor:
        return (w * x).sum(dim=(1, 2, 3, 4))

    penalty = probe_penalty(d(x), d(x + perturbation("plain", x, sigma, rng())))
    torch.testing.assert_close(penalty, sigma**2 * w.square().sum(), rtol=0.09, atol=0)  # four standard errors


def test_the_perturbation_is_independent_float32_noise_of_the_promised_width():
    d = perturbation("plain", torch.randn(SHAPE, dtype=torch.bfloat16), 0.1, rng())
    assert d.shape == SHAPE and d.dtype == torch.float32
    assert d.std().item() == pytest.approx(0.1, rel=0.05) and abs(d.mean().item()) < 0.005
    assert all((d.diff(dim=axis) != 0).float().mean() > 0.99 for axis in range(5))
