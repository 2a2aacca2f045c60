"""The collapse monitor finds each way in which a student collapses, and keeps silent on a healthy one."""

import json
import re
from pathlib import Path

import pytest
import torch

from conftest import SHIFT, build_batch, build_equilibrium
from vpae.config import Optimizer, Training
from vpae.config.training import Monitor
from vpae.distill.equilibrium import Equilibrium
from vpae.models.wan import predict_x0
from vpae.training.loop import train
from vpae.training.monitor import BOUNDS, Watch, outside, signs
from vpae.training.phase import Collapse

SEED = 3  # of all random inputs here
N, SHAPE = 16, (4, 5, 6, 6)


def world() -> dict[str, torch.Tensor]:
    """Real clips that move, and a student whose two draws of noise differ as much as two futures do."""
    rng = torch.Generator().manual_seed(SEED)
    still = torch.randn(N, SHAPE[0], 1, *SHAPE[2:], generator=rng)
    future = lambda: 0.4 * torch.randn(N, *SHAPE, generator=rng)  # noqa: E731
    return {"x": still + future(), "start": still + future(), "other_start": still + future()}


def now(change) -> dict[str, float]:
    """The signs after a change of the student's videos."""
    w = world()
    return signs(change(w["start"]), change(w["other_start"]), w["start"], w["other_start"], w["x"])


def healthy(x: torch.Tensor) -> torch.Tensor:
    """Every video changes a little, each in its own way."""
    return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED + 1))


COLLAPSES = {
    "motion": lambda x: x.mean(dim=2, keepdim=True) + 0.1 * (x - x.mean(dim=2, keepdim=True)),
    "deviation": lambda x: 2.0 * x,
    "colour_drift": lambda x: x + 0.5,
    "common_pattern": lambda x: x + 0.4 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)),
    "diversity": lambda x: world()["x"],  # whatever the noise
}


def test_every_sign_has_a_collapse_here():
    assert COLLAPSES.keys() == BOUNDS.keys()


def test_a_healthy_student_raises_nothing():
    assert outside(now(healthy), 0) == []


@pytest.mark.parametrize("sign", COLLAPSES)
def test_each_collapse_is_found_by_its_sign(sign):
    assert any(text.startswith(f"{sign} =") for text in outside(now(COLLAPSES[sign]), 1))


def test_not_a_number_is_a_collapse():
    assert outside(now(lambda x: x * float("nan")), 1)


def test_the_common_pattern_is_measured_in_its_own_size():
    w, size = world(), 0.05
    pattern = size * torch.sign(torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)))
    found = signs(healthy(w["start"]) + pattern, w["other_start"], w["start"], w["other_start"], w["x"])
    assert found["common_pattern"] == pytest.approx(size / float(w["x"].std()), rel=0.2)


def test_a_collapse_stops_the_run_unless_told_otherwise(capsys, tmp_path):
    w = world()
    videos = [w["start"], w["other_start"]]
    watch = Watch(Monitor(every=1), lambda number: videos[number], w["x"])
    watch.begin(tmp_path, first=True)
    videos[:] = [COLLAPSES["motion"](video) for video in videos]
    with pytest.raises(Collapse, match=r"equilibrium collapses at step 7: motion.*training\.monitor\.stop=false"):
        watch.look(7, "equilibrium")
    watch.config = Monitor(every=1, stop=False)
    assert watch.look(7, "equilibrium")["motion"] < 0.5
    assert "collapses at step 7" in capsys.readouterr().err


def test_a_resumed_run_compares_with_the_start_of_the_first(tmp_path):
    w = world()
    Watch(Monitor(every=1), lambda number: w["start"].clone(), w["x"]).begin(tmp_path, first=True)
    resumed = Watch(Monitor(every=1), lambda number: w["x"], w["x"])
    resumed.begin(tmp_path, first=True)
    assert all(video.equal(w["start"]) for video in resumed.start)


# Runs that are made to collapse.


class Driven(Equilibrium):
    """Phase II whose generator is driven somewhere, each time in another way."""

    goal: staticmethod

    def turns(self, step: int) -> list[str]:
        return ["generator"]

    def generator_loss(self, clips):
        xh = self.generate(clips)
        return (xh - self.goal(xh.detach())).square().mean(), {}


PATTERN = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(SEED))
GOALS = {
    "still": lambda xh: xh.mean(dim=2, keepdim=True).expand_as(xh),
    "tinted": lambda xh: xh + 1.0,
    "patterned": lambda xh: xh + PATTERN[:, : xh.shape[2], : xh.shape[3], : xh.shape[4]],
}


def driven(goal, tmp_path, accelerator, rate: float, steps: int) -> Path:
    base = build_equilibrium(
        generator=Optimizer(learning_rate=rate),
        training=Training(steps=steps, batch_size=4, ema_decay=0.0, checkpoint_every=1, monitor=Monitor(every=1)),
    )
    phase = Driven(base.config, SHIFT, base.generator, base.teacher, base.head, base.taps)
    phase.goal = goal
    x, c = build_batch(8)

    def draw(number: int) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(number))
        return predict_x0(phase.ema, noise, torch.ones(len(x)), c)

    with torch.no_grad():  # the real clips are nearly what the student makes at its start
        real = draw(0) + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED))
    watch = Watch(base.config.training.monitor, draw, real)
    return train(phase, lambda drawn: build_batch(4, seed=drawn), base.config.training, 0, tmp_path, accelerator, watch)


@pytest.mark.slow
@pytest.mark.parametrize("goal", GOALS)
def test_a_run_that_collapses_is_stopped_and_its_last_healthy_state_kept(goal, tmp_path, accelerator):
    with pytest.raises(Collapse) as caught:
        driven(GOALS[goal], tmp_path, accelerator, rate=5e-3 if goal == "still" else 1e-3, steps=60)
    step = int(re.search(r"at step (\d+)", str(caught.value))[1])
    kept = sorted(int(path.name.removeprefix("step-")) for path in tmp_path.glob("step-*"))
    assert kept and kept[-1] == step - 1


@pytest.mark.slow
def test_a_healthy_run_is_left_alone(tmp_path, accelerator, capsys):
    metrics = driven(lambda xh: xh + 0.05 * torch.randn_like(xh), tmp_path, accelerator, rate=1e-4, steps=6)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert all(BOUNDS.keys() <= line.keys() for line in lines) and "collapse" not in capsys.readouterr().err
