"""What makes training faster changes no loss: compiled blocks, fused norms, features without the blocks after them.

And what the loop says of its speed, and how seldom it waits for the device.
"""

import json
import warnings
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from conftest import build_batch, build_equilibrium, build_priming, build_transformer, seeded
from planned import SMALL, TOKENS, variant
from vpae.bench.networks import build_phase, random_condition, random_latents
from vpae.distill import run
from vpae.distill.run import Batches
from vpae.models.wan import features, velocity
from vpae.planning.meter import Meter
from vpae.randomness import generator_for
from vpae.training.loop import SPEED, train
from vpae.training.precision import fuse_norms
from vpae.training.sharding import compile_blocks, run_eagerly, spread
from vpae.training.speed import Cost, Speed, peak_of, summary

CPU = torch.device("cpu")
BUILD = {"priming": build_priming, "equilibrium": build_equilibrium}


def losses(phase, autocast: bool = False) -> list[float]:
    """Loss of every turn, and the norm of its gradient."""
    found = []
    for turn in phase.roles:
        for name, role in phase.roles.items():
            role.require_gradients(name == turn)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = phase.loss(turn, build_batch(), generator_for(CPU, 0, turn), 0)
        loss.backward()
        gradients = [p.grad for p in phase.roles[turn].parameters() if p.grad is not None]
        found += [loss.item(), nn.utils.get_total_norm(gradients).item()]
        for role in phase.roles.values():
            role.optimizer.zero_grad(set_to_none=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_compiled_blocks_have_the_losses_and_gradients_of_eager_ones(name):
    phase = BUILD[name]()
    expected = losses(phase)
    for network in phase.networks.values():
        compile_blocks(network, "eager")
    assert losses(phase) == pytest.approx(expected, rel=1e-5)
    assert all(block._compiled_call_impl for network in phase.networks.values() for block in network.blocks)
    for network in phase.networks.values():
        run_eagerly(network)
    assert losses(phase) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fused_norm_is_torch_s_own(dtype):
    theirs = nn.RMSNorm(24, eps=1e-6)
    with torch.no_grad():
        theirs.weight.copy_(seeded(0, lambda: torch.rand(24) + 0.5))
    x = seeded(1, lambda: torch.randn(3, 7, 24)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(x)
    holder = nn.ModuleDict({"norm": theirs})
    fuse_norms(holder)
    found = holder["norm"](x)
    assert found.dtype == expected.dtype
    spacing = torch.finfo(dtype).eps * expected.abs().float()
    assert ((found.float() - expected.float()).abs() <= spacing).all()


@pytest.mark.parametrize("name", BUILD)
def test_no_norm_of_a_phase_falls_back_to_the_slow_way(name):
    called = []

    def note(norm: nn.Module, inputs: tuple, _output) -> None:
        called.append(type(norm).__name__)

    phase = BUILD[name]()
    handles = [
        module.register_forward_hook(note)
        for network in phase.networks.values()
        for module in network.modules()
        if isinstance(module, nn.RMSNorm)
    ]
    assert all(torch.isfinite(torch.tensor(losses(phase, autocast=True))))
    assert set(called) == {"FusedRMSNorm"} and handles


@torch.no_grad()
def test_features_run_no_block_after_the_last_tap():
    model, (x, c) = build_transformer(), build_batch()
    t = torch.full((len(x),), 0.4)
    whole = features(model, x, t, c, (0, 1, 3))
    counts, velocities = [], [velocity(model, x, t, c)]
    for taps in ((0, 1, 3), (0, 1)):
        with FlopCounterMode(display=False) as counter:
            found = features(model, x, t, c, taps)
        counts.append(counter.get_total_flops())
        assert all(one.equal(other) for one, other in zip(found, whole, strict=False))
    assert counts[1] < 0.6 * counts[0]  # two of four blocks
    assert len(model.blocks) == 4 and velocity(model, x, t, c).equal(velocities[0])
    with pytest.raises(RuntimeError):
        features(model, x[:, :3], t, c, (0,))
    assert len(model.blocks) == 4, "also after an error"


# Speed in the log.


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_falls_and_the_first_steps_do_not_foretell_the_others(tmp_path):
    clock = Clock()
    speed = Speed(tmp_path / SPEED, 10, 0, Cost(tokens=300, operations=2e12, peak=4e12), clock)
    words = []
    for done, seconds in ((2, 60.0), (4, 2.0), (6, 2.0), (8, 4.0), (10, 2.0)):  # compiles, then a step a second
        clock.now += seconds
        words.append(speed.lap(done))
    lines = [json.loads(line) for line in (tmp_path / SPEED).read_text().splitlines()]
    assert [line["seconds_per_step"] for line in lines] == [30.0, 1.0, 1.0, 2.0, 1.0]
    assert [line["seconds_left"] for line in lines] == [240.0, 6.0, 4.0, pytest.approx(8 / 3, rel=1e-5), 0.0]
    assert [line["tokens_per_second"] for line in lines] == [10.0, 300.0, 300.0, 150.0, 300.0]
    assert lines[1]["utilisation"] == 0.5 and words[1] == "1 s/step, 300 tokens/s, 50% of the peak"
    (tmp_path / SPEED).open("a").write('{"step": 11, "sec')  # a kill
    speeds = {"seconds_per_step": 1.0, "tokens_per_second": 300.0, "utilisation": 0.5}
    assert summary(tmp_path / SPEED) == {**speeds, "waiting_for_data": 0.0, "training_seconds": 70.0}


def test_a_resumed_run_tells_its_own_speed(tmp_path):
    clock = Clock()
    speed = Speed(tmp_path / SPEED, 10, 6, Cost(), clock)
    clock.now = 3.0
    assert speed.lap(7) == "3 s/step"
    wanted = {"step": 7, "seconds_per_step": 3.0, "seconds_left": 9.0, "waiting_for_data": 0.0}
    assert json.loads((tmp_path / SPEED).read_text()) == wanted
    assert summary(tmp_path / "none.jsonl") == {}


def test_seconds_of_all_steps_are_those_that_count(tmp_path):
    """Of 10 steps 4 to 6 were made twice; their lines stand there twice."""
    clock, words = Clock(), tmp_path / SPEED
    for begun, laps in ((0, ((3, 30.0), (6, 3.0))), (3, ((6, 6.0), (10, 4.0)))):
        speed = Speed(words, 10, begun, Cost(), clock)
        for done, seconds in laps:
            clock.now += seconds
            speed.lap(done)
    assert summary(words)["training_seconds"] == 30 + 6 + 4


def test_the_time_that_batches_take_is_told_apart(tmp_path):
    clock = Clock()
    speed = Speed(tmp_path / SPEED, 4, 0, Cost(), clock)

    def slow(drawn: int) -> int:
        clock.now += drawn
        return drawn

    batches, words = speed.noting_waits(slow), []
    for done, (first, second) in ((1, (0, 0)), (2, (1, 2)), (3, (0, 0))):
        assert (batches(first), batches(second)) == (first, second)
        clock.now += 9
        words.append(speed.lap(done))
    assert words == ["9 s/step", "12 s/step, 25% waiting for data", "9 s/step"]
    lines = [json.loads(line) for line in (tmp_path / SPEED).read_text().splitlines()]
    assert [line["waiting_for_data"] for line in lines] == [0.0, 0.25, 0.0]


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: values that it reads, and shapes that depend on values."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count, self.paused = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not self.paused and func.overloadpacket._qualified_op_name.rpartition("::")[2] in self.READS
        return func(*args, **(kwargs or {}))

    def pause(self, *_) -> None:
        """Optimisers keep their numbers of steps on the CPU, whatever the device, and read them there."""
        self.paused = True

    def resume(self, *_) -> None:
        self.paused = False


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_between_logs_the_loop_reads_one_number_an_update(name, tmp_path):
    phase, waits, counts, made = BUILD[name](), Waits(), [0], []
    for role in phase.roles.values():
        role.optimizer.register_step_pre_hook(waits.pause)
        role.optimizer.register_step_post_hook(waits.resume)
    turns = phase.turns

    def noted(step: int) -> list[str]:
        counts.append(waits.count)
        made.append(len(turns(step)))
        return turns(step)

    phase.turns = noted
    training = phase.config.training.model_copy(update={"steps": 6, "log_every": 3, "checkpoint_every": 100})
    batch = build_batch()
    with waits:
        metrics = train(phase, lambda drawn: batch, training, 0, tmp_path, Accelerator(cpu=True))
    spent = [after - before for before, after in pairwise([*counts[1:], waits.count])]
    quiet = [0, 1, 3, 4]
    assert [spent[step] for step in quiet] == [made[step] for step in quiet]  # whether the gradient is finite
    assert spent[2] > made[2] + len(phase.roles)  # a log reads every value
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    speeds = [json.loads(line) for line in (tmp_path / SPEED).read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in speeds] == [3, 6]
    assert not {key for line in lines for key in line} & {"seconds_per_step", "seconds_left", "tokens_per_second"}


@pytest.mark.slow
def test_the_cost_of_a_step_is_what_the_run_takes(tmp_path, monkeypatch):
    accumulate = 2
    settings = variant("micro", "equilibrium", accumulate, activation_checkpointing=True)
    phase, accelerator = build_phase(settings, "equilibrium", SMALL, CPU), Accelerator(cpu=True)
    training = phase.config.training
    spread(phase, training, accelerator)
    x = random_latents(settings, 1, CPU)
    condition = random_condition(settings, SMALL, TOKENS, 1, CPU)
    monkeypatch.setattr(Batches, "__init__", lambda self: None)
    monkeypatch.setattr(Batches, "__call__", lambda self, drawn: (x, condition))
    batches = Batches()
    batches.share = 0, 1
    assert run.cost_of(settings, "equilibrium", phase, batches, accelerator) == Cost(accumulate * 5 * 4 * 4)
    monkeypatch.setattr(run, "peak_of", lambda device, precision: 1e12)
    cost = run.cost_of(settings, "equilibrium", phase, batches, accelerator)
    with Meter() as meter:
        train(phase, batches, training, 0, tmp_path, accelerator, cost=cost)
    assert cost.peak == 1e12 and cost.operations == pytest.approx(meter.counts["model"] / training.steps, rel=1e-6)
    assert summary(tmp_path / SPEED)["utilisation"] > 0
    monkeypatch.setattr(run.plans, "execute", lambda *_: 1 / 0)
    assert run.cost_of(settings, "equilibrium", phase, batches, accelerator) == Cost(accumulate * 5 * 4 * 4)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("GeForce RTX 9999", 0.0)]
)
def test_a_device_s_peak_is_known_by_its_name_or_not_at_all(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_of(torch.device("cuda"), "bf16") == peak and peak_of(torch.device("cuda"), "no") == 0.0
    assert peak_of(CPU, "bf16") == 0.0
