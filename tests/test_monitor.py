"""The collapse monitor finds each way in which a student collapses, and keeps silent on a healthy one."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from conftest import SHIFT, build_batch, build_equilibrium, build_priming, build_transformer
from vpae.config import Optimizer, Training
from vpae.config.training import Monitor
from vpae.distill.equilibrium import Equilibrium
from vpae.distill.run import too_late
from vpae.models.wan import predict_x0
from vpae.training.loop import train
from vpae.training.monitor import BOUNDS, LOOKS, Watch, outside, signs
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


def test_a_run_from_the_teacher_whose_single_step_hardly_heeds_its_noise_is_healthy_when_it_has_learnt_to():
    x, draw = world()["x"], torch.Generator().manual_seed(5)
    start = [x + 0.1 * torch.randn(x.shape, generator=draw) for _ in range(2)]
    now = [x + 0.4 * torch.randn(x.shape, generator=draw) for _ in range(2)]
    found = signs(*now, *start, x)
    assert found["diversity"] == pytest.approx(4, rel=0.1) and not outside({"diversity": found["diversity"]}, 0)


def test_not_a_number_is_a_collapse():
    assert outside(now(lambda x: x * float("nan")), 1)


def test_the_common_pattern_is_measured_in_its_own_size():
    w, size = world(), 0.05
    pattern = size * torch.sign(torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)))
    found = signs(healthy(w["start"]) + pattern, w["other_start"], w["start"], w["other_start"], w["x"])
    assert found["common_pattern"] == pytest.approx(size / float(w["x"].std()), rel=0.2)


def test_what_chance_adds_to_a_few_videos_is_no_common_pattern():
    start, change, x = torch.randn(3, 4, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert signs(start + 0.2 * change, x, start, x, x)["common_pattern"] < 0.02  # of 0.2 / sqrt(4)


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


# Videos that are kept.


class Crash(Exception):
    """The process dies here."""


class Fixed:
    """One step of a phase's EMA from fixed noise, as a run draws it; notes what the EMA was, and may die at a look."""

    def __init__(self, phase, dies_at: int = 0):
        self.phase, self.dies_at, self.seen = phase, dies_at, []
        self.x, self.condition = build_batch(4)

    def __call__(self, number: int) -> torch.Tensor:
        if number == 0:
            self.seen.append(copy.deepcopy(self.phase.ema.state_dict()))
        if len(self.seen) - 1 == self.dies_at > 0 and number == 1:  # the look of the start is the first
            raise Crash
        noise = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(number))
        return predict_x0(self.phase.ema, noise, torch.ones(len(self.x)), self.condition)


def watched(folder: Path, accelerator, monitor: Monitor, dies_at: int = 0, seed: int = 0) -> Fixed:
    """Four steps of phase I under a monitor, from the last state if there is one."""
    training = Training(steps=4, batch_size=2, ema_decay=0.5, checkpoint_every=3, monitor=monitor)
    phase = build_priming(seed, training=training)
    draw = Fixed(phase, dies_at)
    watch = Watch(monitor, draw, draw.x) if monitor.every else None
    train(phase, lambda drawn: build_batch(2, seed=drawn), training, 0, folder, accelerator, watch)
    return draw


KEEPS = Monitor(every=2, clips=4, videos=3, stop=False)


def kept(folder: Path) -> dict[str, torch.Tensor]:
    return {path.name: load_file(path)["x0"] for path in sorted((folder / LOOKS).iterdir())}


def test_what_is_kept_is_what_the_ema_of_that_step_makes_of_the_fixed_noise_and_condition(tmp_path, accelerator):
    draw = watched(tmp_path, accelerator, KEEPS)
    found = kept(tmp_path)
    assert list(found) == ["00000000.safetensors", "00000002.safetensors", "00000004.safetensors"]
    x, condition = build_batch(4)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    student = build_transformer()
    for weights, videos in zip(draw.seen, found.values(), strict=True):
        student.load_state_dict(weights)
        with torch.no_grad():
            assert videos.equal(predict_x0(student, noise, torch.ones(4), condition)[:3])
    start, middle, end = found.values()
    assert not start.equal(middle) and not middle.equal(end)
    assert all(path.stat().st_size < 1.2 * 3 * x[0].nbytes for path in (tmp_path / LOOKS).iterdir())  # no fourth video


@pytest.mark.slow
def test_a_run_that_died_at_a_look_keeps_each_look_once_and_as_an_undisturbed_one(tmp_path, accelerator):
    watched(tmp_path / "whole", accelerator, KEEPS)
    with pytest.raises(Crash):  # step 3 is saved, the look at 4 is kept but not its state: it is done again
        watched(tmp_path / "died", accelerator, KEEPS, dies_at=2)
    looks = tmp_path / "died" / LOOKS
    assert len(kept(tmp_path / "died")) == 3
    save_file({"x0": torch.zeros(1)}, looks / "00000004.safetensors")  # to see that it is
    watched(tmp_path / "died", accelerator, KEEPS, seed=7)
    whole, again = kept(tmp_path / "whole"), kept(tmp_path / "died")
    assert whole.keys() == again.keys() and all(again[name].equal(videos) for name, videos in whole.items())


@pytest.mark.slow
def test_a_run_that_is_watched_from_its_middle_on_is_compared_with_its_start(tmp_path, accelerator):
    whole = watched(tmp_path / "whole", accelerator, KEEPS)
    training = Training(steps=2, batch_size=2, ema_decay=0.5)
    phase = build_priming(0, training=training)
    train(phase, lambda drawn: build_batch(2, seed=drawn), training, 0, tmp_path / "later", accelerator)
    later = watched(tmp_path / "later", accelerator, KEEPS)
    assert later.seen[0].keys() == whole.seen[0].keys()
    assert all(value.equal(whole.seen[0][name]) for name, value in later.seen[0].items())
    start = "00000000.safetensors"
    assert kept(tmp_path / "later")[start].equal(kept(tmp_path / "whole")[start])


@pytest.mark.slow
def test_looks_and_what_they_keep_change_no_loss_and_no_weight(tmp_path, accelerator):
    ends, lines = [], []
    for name, monitor in {"off": Monitor(), "looks": KEEPS.model_copy(update={"videos": 0}), "keeps": KEEPS}.items():
        ends.append(watched(tmp_path / name, accelerator, monitor).phase)
        logged = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        lines.append([{key: value for key, value in line.items() if key not in BOUNDS} for line in logged])
        assert (tmp_path / name / LOOKS).exists() == (name == "keeps")
    assert lines[0] == lines[1] == lines[2] and lines[0][-1]["step"] == 4
    for phase in ends[1:]:
        for role, owner in ends[0].roles.items():
            theirs = phase.roles[role].module.state_dict()
            assert all(theirs[name].equal(value) for name, value in owner.module.state_dict().items())


def test_signs_are_written_at_steps_that_are_not_logged_otherwise(tmp_path, accelerator):
    training = Training(steps=4, batch_size=2, ema_decay=0.5, log_every=3, monitor=KEEPS)
    draw = Fixed(build_priming(training=training), 0)
    train(draw.phase, lambda n: build_batch(2, seed=n), training, 0, tmp_path, accelerator, Watch(KEEPS, draw, draw.x))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4]
    assert [BOUNDS.keys() <= line.keys() for line in lines] == [True, False, True]


def test_only_the_first_process_keeps_videos(tmp_path):
    w = world()
    watch = Watch(Monitor(every=1, videos=1, stop=False), lambda number: w["start"], w["x"])
    watch.begin(tmp_path, first=False)
    watch.look(1, "priming")
    assert list(tmp_path.iterdir()) == []


def test_the_videos_of_a_collapse_are_there_to_be_seen(tmp_path):
    w = world()
    videos = [w["start"], w["other_start"]]
    watch = Watch(Monitor(every=1, videos=1), lambda number: videos[number], w["x"])
    watch.begin(tmp_path, first=True)
    videos[:] = [COLLAPSES["motion"](video) for video in videos]
    with pytest.raises(Collapse):
        watch.look(7, "equilibrium")
    assert kept(tmp_path)["00000007.safetensors"].equal(videos[0][:1])


@pytest.mark.parametrize(
    ("values", "message"),
    [({"videos": 1}, "videos = 1 .* every = 0"), ({"every": 5, "clips": 4, "videos": 5}, "videos = 5 .* clips = 4")],
)
def test_videos_that_nothing_would_draw_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        Monitor(**values)


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
def test_what_is_set_for_steps_that_a_run_does_not_have_is_said():
    warm = Optimizer(learning_rate=1e-3, warmup_steps=6)
    long = build_priming(training=Training(steps=6, monitor=Monitor(every=6)), generator=warm)
    assert [*too_late(long)] == []
    watch, warmup = too_late(build_priming(training=Training(steps=5, monitor=Monitor(every=6)), generator=warm))
    assert watch == "priming.training.monitor.every = 6, but there are 5 steps: nothing looks for a collapse"
    assert warmup.startswith("priming: the warm-up of generator has 6 steps, but there are 5")


def test_a_healthy_run_is_left_alone(tmp_path, accelerator, capsys):
    metrics = driven(lambda xh: xh + 0.05 * torch.randn_like(xh), tmp_path, accelerator, rate=1e-4, steps=6)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert all(BOUNDS.keys() <= line.keys() for line in lines) and "collapse" not in capsys.readouterr().err
