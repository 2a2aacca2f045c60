"""The algebra of rectified flow, and where times are drawn from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vpae.config import Times
from vpae.flow import (
    add_noise,
    sample_times,
    schedule,
    shift,
    unshift,
    velocity_target,
    x0_from_velocity,
)

unit = st.floats(0, 1)
shifts = st.floats(0.2, 12)
SPACES = [
    (space, distribution) for space in ("pre_shift", "post_shift") for distribution in ("uniform", "shifted_uniform")
]


def draw(times: Times, s: float, n: int = 20_000, progress: float = 0.0, seed: int = 0) -> torch.Tensor:
    return sample_times(times, s, progress, n, torch.Generator().manual_seed(seed)).double()


@given(t=st.lists(unit, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_the_true_velocity_leads_from_a_noised_clip_back_to_the_clip_and_on_to_the_noise(t, seed):
    rng = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(len(t), 3, 2, 4, 5, generator=rng, dtype=torch.float64) for _ in range(2))
    t_B = torch.tensor(t, dtype=torch.float64)
    x_t, v = add_noise(x, noise, t_B), velocity_target(x, noise)
    torch.testing.assert_close(x0_from_velocity(x_t, v, t_B), x, atol=1e-12, rtol=0)
    torch.testing.assert_close(x0_from_velocity(x_t, v, t_B - 1), noise, atol=1e-12, rtol=0)


def test_each_clip_is_noised_at_its_own_time():
    x, noise = torch.full((3, 16, 2, 4, 4), 2.0), torch.full((3, 16, 2, 4, 4), -4.0)
    x_t = add_noise(x, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert [x_t[i].unique().tolist() for i in range(3)] == [[2.0], [0.5], [-4.0]]


@given(u=unit, s=shifts)
def test_unshift_is_the_inverse_of_shift(u, s):
    u = torch.tensor(u, dtype=torch.float64)
    torch.testing.assert_close(unshift(shift(u, s), s), u, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(shift(unshift(u, s), s), u, atol=1e-12, rtol=1e-9)


@given(s=shifts)
def test_shift_keeps_the_ends_and_the_order_of_times(s):
    t = shift(torch.linspace(0, 1, 11, dtype=torch.float64), s)
    assert t[0] == 0 and t[-1] == pytest.approx(1, abs=1e-15)
    assert (t.diff() > 0).all()


@given(u=unit)
def test_a_shift_of_one_changes_nothing(u):
    u = torch.tensor(u, dtype=torch.float64)
    assert shift(u, 1.0) == u


@pytest.mark.parametrize("s", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_the_schedule_falls_from_one_to_zero(steps, s):
    times = schedule(steps, s)
    assert times.dtype == torch.float64 and len(times) == steps + 1
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()


def test_the_four_step_schedule_at_shift_five_is_the_known_one():
    assert (1000 * schedule(4, 5.0)).tolist() == pytest.approx([1000, 937.5, 833.3333, 625, 0], abs=1e-3)


@given(
    bounds=st.tuples(unit, unit).map(sorted),
    last=st.tuples(unit, unit).map(sorted),
    space=st.sampled_from(SPACES),
    s=st.floats(1, 12),
    progress=unit,
)
def test_drawn_times_stay_in_the_interval(bounds, last, space, s, progress):
    t_space, distribution = space
    times = Times(
        low=bounds[0],
        high=bounds[1],
        last_low=last[0],
        last_high=last[1],
        t_space=t_space,
        distribution=distribution,
    )
    low, high = (torch.tensor(a + progress * (b - a)).double() for a, b in zip(bounds, last, strict=True))
    if t_space == "pre_shift":
        low, high = shift(low, s), shift(high, s)
    t = draw(times, s, n=200, progress=progress)
    assert t.min() >= low - 1e-6 and t.max() <= high + 1e-6


@pytest.mark.parametrize(("t_space", "distribution"), SPACES)
def test_times_are_uniform_in_the_space_the_distribution_names(t_space, distribution):
    s, low, high = 5.0, 0.2, 0.9
    t = draw(Times(low=low, high=high, t_space=t_space, distribution=distribution), s)
    uniform, ends = t, torch.tensor([low, high], dtype=torch.float64)
    if t_space == "pre_shift":
        ends = shift(ends, s)
    if distribution == "shifted_uniform":
        uniform, ends = unshift(t, s), unshift(ends, s)
    u = ((uniform - ends[0]) / (ends[1] - ends[0])).sort().values
    kolmogorov_smirnov = (u - torch.linspace(0, 1, len(u), dtype=torch.float64)).abs().max()
    assert kolmogorov_smirnov < 1.63 / len(u) ** 0.5  # 1% level


@pytest.mark.parametrize(("s", "share"), [(3.0, 0.25), (5.0, 5 / 14), (8.0, 8 / 17)])
def test_the_share_of_shifted_uniform_times_near_noise_is_the_closed_form(s, share):
    t = draw(Times(low=0.0, high=1.0), s, n=100_000)
    assert (t > 0.9).double().mean().item() == pytest.approx(share, abs=0.006)  # four standard errors


@pytest.mark.parametrize("distribution", ["uniform", "shifted_uniform"])
def test_a_scheduled_interval_moves_from_the_first_to_the_last(distribution):
    times = Times(low=0.9, high=1.0, last_low=0.1, last_high=0.4, distribution=distribution)
    for progress, (low, high) in {0.0: (0.9, 1.0), 0.5: (0.5, 0.7), 1.0: (0.1, 0.4)}.items():
        t = draw(times, 3.0, n=2000, progress=progress)
        assert low - 1e-6 <= t.min() < low + 0.01 and high - 0.01 < t.max() <= high + 1e-6


def test_equal_generators_draw_equal_float32_times():
    rngs = [torch.Generator().manual_seed(4) for _ in range(2)]
    first, second = (sample_times(Times(), 3.0, 0.0, 6, rng) for rng in rngs)
    assert first.dtype == torch.float32 and first.equal(second) and len(first.unique()) == 6
