"""Frechet distance, confidence intervals, latency, and the table."""

import numpy as np
import pytest
import torch

from vpae.config import Evaluation, Sampler
from vpae.evaluation import latency, latents
from vpae.evaluation.frechet import FEATURES, RandomFeatures, frechet
from vpae.evaluation.latency import summary, time_runs
from vpae.evaluation.stage import METRICS, table
from vpae.evaluation.statistics import bootstrap, half_width, jackknife
from vpae.experiment import load


def test_frechet_of_gaussians_in_closed_form():
    rng = np.random.default_rng(0)
    a = rng.normal(0, 1, (200_000, 3)) * [1, 2, 3]
    b = rng.normal(0, 1, (200_000, 3)) * [2, 2, 1] + [1, 0, 0]
    # |mu|^2 + sum of (sigma_a - sigma_b)^2 for commuting covariances
    assert frechet(a, b) == pytest.approx(1 + 1 + 0 + 4, rel=0.02)


def test_frechet_of_correlated_gaussians_equals_the_matrix_square_root():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) for _ in range(2))
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-6)


def test_frechet_is_zero_for_equal_sets_and_symmetric():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(100, 5)), rng.normal(size=(100, 5)) + 1
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, b) == pytest.approx(frechet(b, a))


def test_frechet_refuses_a_single_video():
    with pytest.raises(ValueError, match="at least two"):
        frechet(np.zeros((1, 3)), np.zeros((5, 3)))


def test_features_are_the_same_network_everywhere_and_see_motion():
    x = torch.randn(4, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    one, two = RandomFeatures()(x), RandomFeatures()(x)
    assert one.equal(two) and one.shape == (4, FEATURES)
    still = x[:, :, :1].expand_as(x)
    assert (RandomFeatures()(still) - one).abs().mean() > 0.01


def test_features_are_means_and_deviations_over_space_and_time():
    x = torch.randn(2, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    made = RandomFeatures()
    h = torch.nn.functional.leaky_relu(torch.nn.functional.conv3d(x, made.first, padding=1), 0.2)
    h = torch.nn.functional.leaky_relu(
        torch.nn.functional.conv3d(h, made.second, padding=1, stride=(1, 2, 2)), 0.2
    ).flatten(2)
    mean, deviation = made(x).chunk(2, dim=1)
    torch.testing.assert_close(mean, h.mean(-1))
    torch.testing.assert_close(deviation, (h - h.mean(-1, keepdim=True)).square().sum(-1).div(h.shape[-1] - 1).sqrt())


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    covered = 0
    for trial in range(100):
        values = np.random.default_rng(trial).normal(3.0, 1.0, 50)
        found = bootstrap(50, lambda i, v=values: v[i].mean(), 200, seed=trial)
        assert found["mean"] == pytest.approx(values.mean())
        covered += found["low"] <= 3.0 <= found["high"]
    assert 86 <= covered <= 99


def test_jackknife_of_a_mean_is_its_standard_error_and_a_distance_lies_inside_its_interval():
    values = np.random.default_rng(0).normal(5.0, 1.0, 400)
    found = jackknife(400, lambda i: values[i].mean(), 400, seed=0)
    assert found["high"] - found["mean"] == pytest.approx(1.96 * values.std(ddof=1) / 20, rel=0.01)
    a, b = (np.random.default_rng(s).normal(size=(256, 20)) for s in (1, 2))
    found = jackknife(256, lambda i: frechet(a[i], b[i]), 20, seed=0)
    assert found["low"] < found["mean"] < found["high"] < 2 * found["mean"]


def test_latency_is_the_median_run():
    calls = []
    assert len(time_runs(lambda: calls.append(1), repeats=5)) == 5 == len(calls)
    assert summary([3.0, 1.0, 10.0]) == {"mean": 3.0, "low": 1.0, "high": 10.0}


def test_many_network_evaluations_are_timed_once_a_pass_and_warmed_up_by_one_step():
    config = Evaluation(latency_repeats=2, latency_warmup=1)
    long, short = (Sampler(model="teacher", steps=steps, guidance_scale=5.0) for steps in (25, 24))
    assert latency.runs_of(long, config) == latency.Runs(1, 1, 1, long.model_copy(update={"steps": 1}))
    assert latency.runs_of(short, config) == latency.Runs(10, 2, 1, short)


@pytest.mark.slow
def test_models_that_were_timed_before_an_interruption_are_not_timed_again(finished_micro, tmp_path, monkeypatch):
    settings = load("configs/micro.yaml", environment=False).settings
    inputs = {stage.name: stage for stage in (finished_micro / "micro").iterdir() if stage.is_dir()}
    state = tmp_path / "state"
    models, asked = [["teacher"], ["priming"], ["equilibrium"]], []
    monkeypatch.setattr(latency, "_timed_together", lambda *_: models)
    monkeypatch.setattr(latency, "draw", lambda _model, row, *_: asked.append(row.model))
    monkeypatch.setattr(latency, "animate", lambda *_: None)
    whole = latency.measure(settings, inputs, state)
    assert whole.keys() == settings.samples.rows.keys() and {*asked} == {"teacher", "priming", "equilibrium"}
    (state / latency.KEPT).unlink()

    def die(_model, row, *_) -> None:
        asked.append(row.model)
        if row.model == "priming":
            raise KeyboardInterrupt

    for begun_with, device in (("teacher", "one"), ("priming", "one"), ("teacher", "another")):
        monkeypatch.setattr(latency, "draw", die)
        monkeypatch.setattr(latency, "device_name", lambda device=device: device)
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            latency.measure(settings, inputs, state)
        assert asked[0] == begun_with and asked[-1] == "priming"


def test_the_table_shows_every_row_and_leaves_unmeasured_cells_empty():
    value = {"mean": 0.5, "low": 0.4, "high": 0.7}
    text = table({"real": {"frechet": value}, "vpae-1nfe": {m: value for m in METRICS}}, {"vpae-1nfe": 1})
    lines = text.splitlines()
    assert len(lines) == 4
    assert "| real |  |  | 0.500 ± 0.150 |  |" in lines[2]
    assert "c2st" not in table({"real": {"frechet": value}}, {})  # what no row has needs no column
    assert lines[3].startswith("| vpae-1nfe | 1 |") and lines[3].count("|") == lines[0].count("|")


def test_a_still_copy_of_reality_has_no_motion_and_reality_s_own_is_one():
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(64, 16, 3, 4, 4, generator=rng)
    settings = load("configs/micro.yaml").settings
    assert latents._motion(real, real, settings)["mean"] == pytest.approx(1)
    assert latents._motion(real[:, :, :1].expand_as(real), real, settings)["mean"] == 0
    half = latents._motion(0.5 * real, real, settings)
    assert half["mean"] == pytest.approx(0.5) and half["low"] <= half["mean"] + 1e-6 and half["high"] >= 0.5 - 1e-6


def test_an_interval_that_is_cut_off_at_zero_shows_its_upper_half():
    assert half_width(0.5, 0.4, 0.7) == pytest.approx(0.15)
    assert half_width(0.01, 0.0, 0.05) == pytest.approx(0.04)
