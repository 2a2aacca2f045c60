"""The one training loop: exact resume, signals, accumulation, clipping, learning rates, and the order of clips."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Container, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from conftest import SHIFT, build_batch, build_equilibrium, build_priming, build_transformer
from vpae.artifacts import ArtifactError
from vpae.config import Head, Optimizer, TinyTransformer, Training
from vpae.preemption import SIGNALS, Interruption
from vpae.randomness import Shuffled, derived_seed, generator_for
from vpae.teacher.flow_matching import FlowMatchingPhase
from vpae.training import checkpoint
from vpae.training.ema import make_ema, update_ema
from vpae.training.loop import learning_rate, progress_at, train
from vpae.training.phase import Phase, Role

BUILD = {"priming": build_priming, "equilibrium": build_equilibrium}
STEPS = 3
phases = pytest.mark.parametrize("name", BUILD)


class Crash(Exception):
    """The process dies here."""


def crash() -> None:
    raise Crash


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fit(phase, folder: Path, accelerator, **training) -> Path:
    settings = phase.config.training.model_copy(update=training)
    return train(phase, lambda drawn: build_batch(1, seed=drawn), settings, 0, folder, accelerator)


def at(phase, step: int, call: int, action: Callable[[], None]):
    """Do something in the `call`-th loss of a step."""
    loss, seen = phase.loss, []

    def watched(turn, batch, rng, now):
        seen.append(now)
        if now == step and seen.count(step) == call + 1:
            action()
        return loss(turn, batch, rng, now)

    phase.loss = watched
    return phase


def everything(phase) -> dict[str, Tensor]:
    """All that a run changes: weights, optimisers, EMA."""
    found = {f"ema.{name}": value for name, value in phase.ema.state_dict().items()}
    for role, owner in phase.roles.items():
        found |= {f"{role}.{name}": value for name, value in owner.module.state_dict().items()}
        for number, p in enumerate(owner.parameters()):
            found |= {f"{role}.{number}.{k}": v for k, v in owner.optimizer.state[p].items()}
    return {name: value.clone() for name, value in found.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not found[name].equal(value)] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Callable[[str], tuple[dict[str, Tensor], str]]:
    """Name of a phase -> all it ends with, and its metrics, when nothing happens to it."""
    results = {}

    def result(name: str) -> tuple[dict[str, Tensor], str]:
        if name not in results:
            phase = BUILD[name]()
            metrics = fit(phase, tmp_path_factory.mktemp(name), Accelerator(cpu=True))
            results[name] = everything(phase), metrics.read_text()
        return results[name]

    return result


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".jsonl")


def test_ctrl_c_pressed_twice_while_torch_writes_is_no_failure_of_the_disk(tmp_path, monkeypatch):
    def save(*_args, **_options) -> None:
        raise checkpoint.CheckpointException("write", {0: (KeyboardInterrupt(), [])})

    monkeypatch.setattr(checkpoint.dcp, "save", save)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, build_priming(), {"step": 1})
    assert states(tmp_path) == []


# Resuming.


@pytest.mark.slow
@phases
@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_dies_anywhere_resumes_bit_for_bit(name, step, call, uninterrupted, tmp_path, accelerator):
    with pytest.raises(Crash):
        fit(at(BUILD[name](), step, call, crash), tmp_path, accelerator)
    assert states(tmp_path) == [f"step-{k:08d}" for k in range(1, step + 1)]
    # Nothing of what the phase is built with may survive where there is a state: build it with other weights.
    phase = BUILD[name](seed=7 if step else 0)
    metrics = fit(phase, tmp_path, accelerator)
    weights, lines = uninterrupted(name)
    assert_equal(everything(phase), weights)
    assert metrics.read_text() == lines and len(lines.splitlines()) == STEPS


@phases
@pytest.mark.parametrize(
    ("step", "left"),  # updates of the step that are still to be made
    [(1, 1), *(pytest.param(step, left, marks=pytest.mark.slow) for step, left in ((0, 1), (0, 0), (1, 0), (2, 1)))],
)
def test_a_signal_ends_the_run_after_the_update_it_falls_in_with_a_state(
    name, step, left, uninterrupted, tmp_path, accelerator
):
    handlers = [signal.getsignal(number) for number in SIGNALS]
    phase = BUILD[name]()
    turns = len(list(phase.turns(step)))
    made = turns - left
    said, state = f"step {step} and {made} of the {turns} updates", f"step-{step:08d}-{made:04d}"
    if not left:
        said, state = f"step {step + 1};", f"step-{step + 1:08d}"
    with pytest.raises(Interruption, match=rf"{name}.* after {said}.*{re.escape(str(tmp_path))}"):
        fit(at(phase, step, made - 1, terminate), tmp_path, accelerator, checkpoint_every=100)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert states(tmp_path) == [state]
    phase = BUILD[name](seed=7)
    metrics = fit(phase, tmp_path, accelerator)
    weights, lines = uninterrupted(name)
    assert_equal(everything(phase), weights)
    assert metrics.read_text() == lines


def test_a_signal_in_the_last_update_comes_too_late_to_interrupt(uninterrupted, tmp_path, accelerator):
    phase = build_priming()
    fit(at(phase, STEPS - 1, len(list(phase.turns(STEPS - 1))) - 1, terminate), tmp_path, accelerator)
    assert_equal(everything(phase), uninterrupted("priming")[0])


def test_a_finished_run_is_not_trained_further(uninterrupted, tmp_path, accelerator):
    fit(build_priming(), tmp_path, accelerator)
    phase = at(build_priming(seed=7), STEPS, 0, crash)
    metrics = fit(phase, tmp_path, accelerator)
    weights, lines = uninterrupted("priming")
    assert_equal(everything(phase), weights)
    assert metrics.read_text() == lines


@pytest.mark.slow
@phases
def test_a_half_written_state_is_ignored_and_metrics_of_lost_steps_are_written_anew(
    name, uninterrupted, tmp_path, accelerator
):
    with pytest.raises(Crash):
        fit(at(BUILD[name](), 2, 1, crash), tmp_path, accelerator)
    half = tmp_path / ".step-00000003.tmp"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half of it")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "generator_loss": 1.0}\n{"step": 4, "gener')
    phase = BUILD[name](seed=7)
    metrics = fit(phase, tmp_path, accelerator)
    weights, lines = uninterrupted(name)
    assert_equal(everything(phase), weights)
    assert metrics.read_text() == lines
    assert states(tmp_path) == ["step-00000002", "step-00000003"]  # the newest two, and nothing temporary


def test_saves_that_were_cut_off_leave_nothing_and_a_damaged_line_stops_nothing(tmp_path, accelerator):
    for step in (1, 3):
        (tmp_path / f".step-{step:08d}.tmp").mkdir()
    metrics = fit(build_priming(), tmp_path, accelerator, steps=1)
    assert not list(tmp_path.glob(".step-*"))
    with metrics.open("ab") as file:
        file.write(b'{"step": 1, "x\xff\n{"step"}\n')
    fit(build_priming(), tmp_path, accelerator, steps=2)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("content", ["[]", "7", "{}", "{"])
def test_a_state_whose_position_is_none_is_damaged(content, tmp_path):
    checkpoint.save(tmp_path, build_priming(), {"step": 1, "drawn": 0})
    (tmp_path / "step-00000001" / checkpoint.POSITION).write_text(content)
    with pytest.raises(ArtifactError, match="no state in it is whole"):
        checkpoint.load_latest(tmp_path, build_priming())


def test_a_position_of_which_one_number_has_changed_is_damaged(tmp_path):
    checkpoint.save(tmp_path, build_priming(), {"step": 1, "drawn": 3})
    path = tmp_path / "step-00000001" / checkpoint.POSITION
    position = path.read_text()
    assert '"drawn": 3' in position and checkpoint._damaged(path.parent) is None
    path.write_text(position.replace('"drawn": 3', '"drawn": 4'))
    assert checkpoint._damaged(path.parent) == path


def test_a_state_holds_no_frozen_weights(tmp_path):
    phase = build_priming()
    frozen = {name for name, p in phase.networks["base"].named_parameters() if not p.requires_grad}
    checkpoint.save(tmp_path, phase, {"step": 1, "drawn": 0})
    metadata = checkpoint.dcp.FileSystemReader(tmp_path / "step-00000001").read_metadata()
    assert frozen and not [key for key in metadata.state_dict_metadata if key.removeprefix("fake.model.") in frozen]


@pytest.mark.slow
def test_a_head_without_semantics_resumes_although_some_of_its_weights_never_get_a_gradient(tmp_path, accelerator):
    def build():
        return build_equilibrium(head=Head(semantics=False))

    whole, resumed = build(), build()
    fit(whole, tmp_path / "a", accelerator, steps=2)
    with pytest.raises(Crash):
        fit(at(build(), 1, 0, crash), tmp_path / "b", accelerator, steps=2)
    fit(resumed, tmp_path / "b", accelerator, steps=2)
    assert_equal(everything(resumed), everything(whole))


@pytest.mark.slow
def test_rmsprop_resumes_bit_for_bit_with_its_averages(tmp_path, accelerator):
    def build(seed: int = 0):
        rmsprop = Optimizer(algorithm="rmsprop", learning_rate=1e-4)
        return build_equilibrium(seed, generator=rmsprop, discriminator=rmsprop)

    whole, resumed = build(), build(seed=7)
    fit(whole, tmp_path / "a", accelerator)
    with pytest.raises(Crash):
        fit(at(build(), 1, 0, crash), tmp_path / "b", accelerator)
    fit(resumed, tmp_path / "b", accelerator)
    found = everything(resumed)
    assert_equal(found, everything(whole))
    averages = [value for name, value in found.items() if name.endswith("square_avg")]
    assert sum(value.sum() for value in averages) > 0


# One update, on a phase that is small enough to do by hand.


class Line(Phase):
    """A line fitted to noise; `poison` holds the steps whose loss is spoilt, with `with_`."""

    name, main = "line", "line"

    def __init__(self, optimizer: Optimizer, poison: Container[int] = (), with_: float = float("nan")):
        self.module = nn.Linear(3, 1)
        nn.init.ones_(self.module.weight), nn.init.zeros_(self.module.bias)
        self.roles, self.poison, self.with_ = {"line": Role(self.module, optimizer)}, poison, with_
        self.ema = make_ema(self.module)
        self.rates: list[float] = []

    def turns(self, step: int) -> list[str]:
        return ["line"]

    def loss(self, turn, batch, rng, step):
        self.rates.append(self.roles["line"].optimizer.param_groups[0]["lr"])
        spoiled = torch.tensor(self.with_ if step in self.poison else 1.0)
        loss = (self.module(batch) - torch.randn(batch.shape[0], 1, generator=rng)).square().mean()
        return spoiled * loss, {"number": batch[0, 0]}

    def first_moment(self) -> Tensor:
        """Adam's average of gradients; after one step (1 - beta1) times the gradient that was applied."""
        return torch.cat([self.roles["line"].optimizer.state[p]["exp_avg"].flatten() for p in self.module.parameters()])


def numbered(drawn: int) -> Tensor:
    return torch.tensor([[drawn, 1.0, 2.0]])


def run_line(phase: Line, folder: Path, accelerator, **training) -> list[dict]:
    metrics = train(phase, numbered, Training(**{"steps": 1, **training}), 0, folder, accelerator)
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def gradient_by_hand(number: int, micro: int, step: int = 0) -> tuple[Tensor, float]:
    phase = Line(Optimizer())
    loss, _ = phase.loss("line", numbered(number), generator_for("cpu", 0, "line", step, 0, micro, 0), step)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in phase.module.parameters()]), loss.item()


def test_accumulation_applies_the_mean_gradient_of_micro_batches_that_each_have_their_own_clips_and_noise(
    tmp_path, accelerator
):
    phase = Line(Optimizer(max_grad_norm=1e6))
    [line] = run_line(phase, tmp_path, accelerator, accumulate=2)
    (first, loss), (second, other) = gradient_by_hand(0, 0), gradient_by_hand(1, 1)
    assert not first.allclose(second)
    torch.testing.assert_close(phase.first_moment(), 0.1 * (first + second) / 2)
    assert line["line_loss"] == pytest.approx((loss + other) / 2)
    assert line["line_grad_norm"] == pytest.approx(((first + second) / 2).norm().item())
    assert line["number"] == 0.5


def test_micro_batches_are_numbered_on_through_the_steps(tmp_path, accelerator):
    lines = run_line(Line(Optimizer()), tmp_path, accelerator, steps=3, accumulate=2)
    assert [line["number"] for line in lines] == [0.5, 2.5, 4.5]


def test_every_micro_batch_of_every_turn_and_step_has_noise_of_its_own(tmp_path, accelerator):
    phase, noise = Line(Optimizer()), []
    loss = phase.loss
    phase.turns = lambda step: ["line", "line"]

    def watched(turn, batch, rng, step):
        noise.append(torch.rand((), generator=rng).item())
        return loss(turn, batch, rng, step)

    phase.loss = watched
    run_line(phase, tmp_path, accelerator, steps=3, accumulate=2)
    assert len(noise) == len(set(noise)) == 3 * 2 * 2


def test_the_first_update_of_rmsprop_is_the_gradient_over_the_root_of_its_averaged_square(tmp_path, accelerator):
    rate, alpha = 1e-3, 0.9
    phase = Line(Optimizer(algorithm="rmsprop", learning_rate=rate, alpha=alpha, max_grad_norm=1e6))
    before = torch.cat([p.detach().flatten() for p in phase.module.parameters()])
    run_line(phase, tmp_path, accelerator)
    after = torch.cat([p.detach().flatten() for p in phase.module.parameters()])
    gradient, _ = gradient_by_hand(0, 0)
    expected = -rate * gradient.sign() / (1 - alpha) ** 0.5  # of one step: g / sqrt((1 - alpha) g^2)
    torch.testing.assert_close(after - before, expected, rtol=1e-3, atol=0)


def test_rmsprop_refuses_the_weight_decay_that_it_would_put_into_the_gradient():
    with pytest.raises(ValidationError, match=r"weight_decay = 0\.1: RMSProp"):
        Optimizer(algorithm="rmsprop", weight_decay=0.1)


@pytest.mark.parametrize(("limit", "factor"), [(0.5, None), (1e6, 1.0)])
def test_gradients_are_clipped_to_their_limit_and_logged_as_they_were(limit, factor, tmp_path, accelerator):
    phase = Line(Optimizer(max_grad_norm=limit))
    [line] = run_line(phase, tmp_path, accelerator)
    gradient, _ = gradient_by_hand(0, 0)
    norm = gradient.norm().item()
    assert norm > 0.5 and line["line_grad_norm"] == pytest.approx(norm)
    factor = factor or limit / norm
    torch.testing.assert_close(phase.first_moment(), 0.1 * factor * gradient, rtol=1e-4, atol=0)


def all_of(phase: Line) -> dict[str, Tensor]:
    """Weights, averages and EMA."""
    weights = dict(phase.module.named_parameters()) | {f"ema.{k}": v for k, v in phase.ema.named_parameters()}
    moments = phase.roles["line"].optimizer.state_dict()["state"]
    return weights | {f"{i}.{k}": v for i, slots in moments.items() for k, v in slots.items()}


@pytest.mark.parametrize("with_", [float("nan"), float("inf")])
def test_an_update_whose_gradient_is_not_finite_is_skipped_and_moves_nothing(with_, tmp_path, accelerator, capsys):
    whole, spoilt = Line(Optimizer()), Line(Optimizer(), {1}, with_)
    run_line(whole, tmp_path / "whole", accelerator, steps=1, ema_decay=0.5)
    run_line(spoilt, tmp_path / "spoilt", accelerator, steps=2, ema_decay=0.5)
    assert_equal(all_of(spoilt), all_of(whole))
    assert "line, step 2: the gradient of line is " in capsys.readouterr().err
    lines = run_line(spoilt, tmp_path / "spoilt", accelerator, steps=3, ema_decay=0.5)
    assert [line.get("number") for line in lines] == [0, None, 2] and not torch.equal(*ema_and_weights(spoilt))
    assert [line.get("skipped") for line in lines] == [None, 1, 1]
    assert not any("loss" in key for key in lines[1])


class TwiceAStep(Line):
    """The second update of step 1 is spoilt; `stops` has a signal fall in the first one of it."""

    def __init__(self, stops: bool = False):
        super().__init__(Optimizer(learning_rate=1e-2))
        self.stops = stops

    def turns(self, step: int) -> list[str]:
        return ["line", "line"]

    def loss(self, turn, batch, rng, step):
        number = int(batch[0, 0])
        if number == 2 and self.stops:
            terminate()
        loss, logs = super().loss(turn, batch, rng, step)
        return (loss * float("inf"), logs) if number == 3 else (loss, {**logs, f"update_{number % 2}": loss.detach()})


def test_a_state_in_the_middle_of_a_step_knows_what_that_step_moved_and_logged(tmp_path, accelerator):
    whole, stopped, again = TwiceAStep(), TwiceAStep(stops=True), TwiceAStep()
    lines = run_line(whole, tmp_path / "whole", accelerator, steps=2, ema_decay=0.5)
    with pytest.raises(Interruption, match="after step 1 and 1 of the 2 updates of the next"):
        run_line(stopped, tmp_path / "stopped", accelerator, steps=2, ema_decay=0.5)
    assert run_line(again, tmp_path / "stopped", accelerator, steps=2, ema_decay=0.5) == lines
    assert "update_0" in lines[1] and "update_1" not in lines[1] and lines[1]["skipped"] == 1
    assert_equal(all_of(again), all_of(whole))
    assert not again.ema.weight.equal(stopped.ema.weight)  # one of the two updates moved the line, so that it follows


@pytest.mark.parametrize("resumed", [False, True])
def test_a_state_that_is_saved_before_the_first_update_of_a_role_changes_nothing(resumed, tmp_path, accelerator):
    """torch makes an optimiser's averages by a step of its own, which would count."""
    settings = Optimizer(learning_rate=1e-2)
    whole, saved = Line(settings, {0}), Line(settings, {0})
    run_line(whole, tmp_path / "whole", accelerator, steps=3, checkpoint_every=100)
    if resumed:
        with pytest.raises(Crash):
            run_line(at(saved, 1, 0, crash), tmp_path / "saved", accelerator, steps=3, checkpoint_every=1)
        saved = Line(settings)
    run_line(saved, tmp_path / "saved", accelerator, steps=3, checkpoint_every=1)
    assert_equal(all_of(saved), all_of(whole))


def ema_and_weights(phase: Line) -> tuple[Tensor, Tensor]:
    return phase.ema.weight, phase.module.weight


@pytest.mark.parametrize("limit", [1, 3])
def test_so_many_skipped_updates_in_a_row_end_the_run_and_name_the_clips(limit, tmp_path, accelerator):
    """Two, one that is made, and then no more: the count survives a stop, and starts anew after each one made."""
    phase = Line(Optimizer(), {*range(1, limit), *range(limit + 1, 99)})
    training = Training(steps=99, accumulate=2, checkpoint_every=1, stop_after_skipped=limit)
    arguments = (training, 0, tmp_path, accelerator, None, lambda drawn: [f"clip-{drawn}"])
    with pytest.raises(Crash):
        train(at(phase, 2 * limit - 1, 0, crash), numbered, *arguments)
    last = 2 * limit  # steps count from 1 in messages
    clips = f"clip-{2 * last}, clip-{2 * last + 1}"
    with pytest.raises(FloatingPointError, match=rf"line, step {last + 1}: .* nan, .*; clips: {clips}\..*metrics"):
        train(Line(Optimizer(), phase.poison), numbered, *arguments)
    assert states(tmp_path)[-1] == f"step-{last:08d}"


def test_a_finite_loss_is_no_reason_to_name_its_clip(tmp_path, accelerator):
    phase, drawn = Line(Optimizer()), []

    def second(turn, batch, rng, step, whole=phase.loss):
        drawn.append(batch)
        loss, values = whole(turn, batch, rng, step)
        return loss * (float("inf") if len(drawn) == 2 else 1), values

    phase.loss = second
    training = Training(steps=1, accumulate=3, stop_after_skipped=1)
    with pytest.raises(FloatingPointError, match=r"clips: clip-1\."):
        train(phase, numbered, training, 0, tmp_path, accelerator, None, lambda drawn: [f"clip-{drawn}"])


@pytest.mark.slow
def test_two_processes_skip_alike_and_name_the_clip_of_whichever_met_it(tmp_path):
    script = Path(__file__).parent / "distributed/skipping.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, tmp_path]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    assert re.findall(r"step (\d): the gradient.*clips: (.*)", said) == [("2", "clip-3"), ("5", "clip-8")]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_equal(first, second)
    assert all(value.isfinite().all() for value in first.values())


@pytest.fixture(params=["limit", "tmpfs"])
def full(request, tmp_path) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """A folder, what fills its disk, and what makes room again."""
    if request.param == "limit":  # on the size of a file: the same calls fail, without root
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        bound = lambda size: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # noqa: E731
        yield tmp_path, bound(1500), bound(soft)
        bound(soft)()
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("a disk of its own is for root to mount")
    filler = tmp_path / "filler"
    yield tmp_path, lambda: filler.write_bytes(bytes(shutil.disk_usage(tmp_path).free - 4096)), filler.unlink
    subprocess.run(["umount", tmp_path], check=True)


def test_a_disk_that_is_full_behind_another_error_is_said_to_be_and_half_a_state_is_nowhere(tmp_path, monkeypatch):
    def of_zip(temporary: Path, *_) -> None:
        temporary.mkdir()
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # noqa: B904

    monkeypatch.setattr(checkpoint, "_save", of_zip)
    with pytest.raises(ArtifactError, match=r"step 3 could not be saved .*No space left on device.*state: none"):
        checkpoint.save(tmp_path, build_priming(), {"step": 3})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_state_before_whole_and_the_run_goes_on_from_it(full, tmp_path_factory, accelerator):
    folder, fill, make_room = full
    state, training = folder / "state", Training(steps=4, checkpoint_every=1)
    phase, whole = at(Line(Optimizer()), 2, 0, fill), Line(Optimizer())
    with pytest.raises(ArtifactError, match=r"step 3 .*(No space left|File too large).*make room.*step-00000002"):
        train(phase, numbered, training, 0, state, accelerator)
    assert sorted(p.name for p in state.iterdir() if p.is_dir()) == ["step-00000001", "step-00000002"]
    make_room()
    again = Line(Optimizer())
    metrics = train(again, numbered, training, 0, state, accelerator)
    expected = train(whole, numbered, training, 0, tmp_path_factory.mktemp("whole"), accelerator)
    assert_equal(all_of(again), all_of(whole))
    assert metrics.read_text() == expected.read_text()


def test_metrics_are_logged_every_so_often_and_at_the_end(tmp_path, accelerator):
    lines = run_line(Line(Optimizer()), tmp_path, accelerator, steps=5, log_every=2)
    assert [line["step"] for line in lines] == [2, 4, 5]


# Schedules and averages.


def test_the_learning_rate_warms_up_linearly_and_stays():
    settings = Optimizer(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(settings, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_the_learning_rate_falls_along_half_a_cosine_to_two_percent():
    settings = Optimizer(learning_rate=2.0, warmup_steps=4, cosine=True)
    rates = [learning_rate(settings, step, 14) for step in range(15)]
    assert rates[:5] == [0.5, 1, 1.5, 2, 2]
    assert rates[9] == pytest.approx(2 * 0.51) and rates[14] == pytest.approx(2 * 0.02)
    assert (np.diff(rates[4:]) < 0).all()


def test_a_schedule_may_be_longer_than_the_run(tmp_path, accelerator):
    settings = Optimizer(learning_rate=1e-2, cosine=True)
    phase = Line(settings)
    run_line(phase, tmp_path, accelerator, steps=3, schedule_steps=8)
    assert phase.roles["line"].optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(settings, 2, 8))


def test_each_update_uses_its_step_s_learning_rate_also_after_a_resume(tmp_path, accelerator):
    settings = Optimizer(learning_rate=1e-2, warmup_steps=2, cosine=True)
    with pytest.raises(Crash):
        run_line(at(Line(settings), 3, 0, crash), tmp_path, accelerator, steps=6, checkpoint_every=1)
    phase = Line(settings)
    run_line(phase, tmp_path, accelerator, steps=6, checkpoint_every=1)
    # Each loss sees the rate of the update before it.
    assert phase.rates == pytest.approx([learning_rate(settings, step, 6) for step in (2, 3, 4)])
    assert phase.roles["line"].optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(settings, 5, 6))


def test_progress_runs_from_zero_at_the_first_step_to_one_at_the_last():
    assert [progress_at(step, Training(steps=5)) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert progress_at(0, Training(steps=1)) == 0


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.995])
def test_the_ema_moves_to_the_weights_by_one_minus_its_decay(decay):
    module = nn.Linear(3, 2)
    ema = make_ema(module)
    before = [p.clone() for p in ema.parameters()]
    module.weight.data.add_(1), module.bias.data.mul_(3)
    update_ema(ema, module, decay)
    for old, p, new in zip(before, ema.parameters(), module.parameters(), strict=True):
        assert not p.requires_grad
        torch.testing.assert_close(p, decay * old + (1 - decay) * new.detach())


# Order and randomness.


@given(n=st.integers(1, 40), seed=st.integers(0, 1000), epochs=st.integers(1, 4))
def test_every_pass_visits_each_item_once_and_any_position_can_be_asked_for(n, seed, epochs):
    order, again = Shuffled(n, seed, "a"), Shuffled(n, seed, "a")
    visited = [order(i) for i in range(n * epochs)]
    for epoch in range(epochs):
        assert sorted(visited[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert [again(i) for i in reversed(range(n * epochs))] == visited[::-1]


def test_passes_names_and_seeds_have_their_own_orders():
    orders = [[Shuffled(30, seed, name)(i) for i in range(30)] for seed, name in ((0, "a"), (1, "a"), (0, "b"))]
    orders.append([Shuffled(30, 0, "a")(30 + i) for i in range(30)])
    assert len({tuple(order) for order in orders}) == 4


@given(
    keys=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 64), st.integers(0, 64)), unique=True, max_size=50)
)
def test_different_keys_have_different_seeds(keys):
    assert len({derived_seed(a, "name", b, c) for a, b, c in keys}) == len(keys)
    assert all(0 <= derived_seed(*key) < 2**63 for key in keys)


@pytest.mark.slow
def test_a_teacher_trains_alike_with_compiled_blocks() -> None:
    found = []
    for compiled in (False, True):
        transformer = build_transformer()
        phase = FlowMatchingPhase(TinyTransformer(compile=compiled), SHIFT, transformer)
        assert all((block._compiled_call_impl is not None) == compiled for block in transformer.blocks)
        assert list(phase.ema.state_dict()) == list(build_transformer().state_dict())
        loss, _ = phase.loss("transformer", build_batch(), torch.Generator().manual_seed(0), 0)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in transformer.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
