"""Two processes over gloo against one: both phases sharded, context parallel, resumed by another number of processes.

One pair of processes does everything once (`distributed/worker.py`); each test looks at what it wrote down.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from conftest import build_batch, build_transformer
from distributed.cases import CASES, EXPORTED, Case, accelerator_for, build, fit, losses, reference, result
from planned import SEVERAL, TOKENS, several
from vpae.models.wan import load_pipeline, velocity
from vpae.planning.phase import execute
from vpae.training.monitor import LOOKS

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WORKER = Path(__file__).parent / "distributed" / "worker.py"
TIMEOUT = 1200  # seconds; two processes may share one busy core


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module", autouse=True)
def _forget_precision():
    """Other tests' accelerators have their own."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="module")
def two(tmp_path_factory, teacher) -> Path:
    """The folder into which two processes have written all they did."""
    folder, codes = _in_two_processes(tmp_path_factory.mktemp("two"), teacher)
    # Seen now and then: torch's gloo thread (pt_gloo_runloop) spoilt malloc's lists, which ends either way.
    for _ in range(3):
        if not {-signal.SIGSEGV, -signal.SIGABRT} & {*codes}:
            break
        warnings.warn(f"a process crashed and both start again, see {folder / 'log'}", stacklevel=1)
        folder, codes = _in_two_processes(tmp_path_factory.mktemp("two"), teacher)
    assert codes == [0, 0], (folder / "log").read_text()[-5000:]
    return folder


def _in_two_processes(folder: Path, teacher: Path) -> tuple[Path, list[int]]:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    for name in ("priming", "equilibrium"):
        one = accelerator_for("no")
        fit(build(Case(name, steps=3), one), folder / f"grow-{name}", one, steps=1)
    command = [sys.executable, str(WORKER), str(folder), str(teacher)]
    with (folder / "log").open("w") as log:
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **address, "RANK": rank, "LOCAL_RANK": rank},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank in ("0", "1")
        ]
        try:
            return folder, [process.wait(TIMEOUT) for process in processes]
        finally:
            for process in processes:
                process.kill()


def facts(two: Path, job: str, rank: int = 0) -> dict:
    """What a process found out in a job."""
    found = json.loads((two / f"{job}-{rank}.json").read_text())
    assert "error" not in found, found["error"]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A case -> lines of metrics, weights, phase and folder of one process that accumulates in the others' stead."""
    done = {}

    def run(case: Case, name: str):
        if name not in done:
            accelerator = accelerator_for(case.precision)
            phase = build(case, accelerator)
            metrics = fit(phase, tmp_path_factory.mktemp(name), accelerator)
            done[name] = losses(metrics), result(phase), phase, metrics.parent
        return done[name]

    return run


def assert_alike(found: list[dict], expected: list[dict], tolerance: float) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            # The score's pull is the norm of a small difference of two predictions, in which rounding weighs more.
            close = 10 * tolerance if key == "pull_score" else tolerance
            assert mine[key] == pytest.approx(value, rel=close, abs=close), key


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((defined(found, name) - defined(expected, name)).abs().max().item() for name in expected)


def defined(weights: dict[str, Tensor], name: str) -> Tensor:
    """A weight without the key biases of the head's attention.

    Softmax takes no notice of them: their gradient is zero but for rounding, of which Adam makes whole steps.
    """
    value = weights[name].float()
    if not name.endswith("in_proj_bias"):
        return value
    query, _, values = value.chunk(3)
    return torch.cat([query, values])


def moved(weights: dict[str, Tensor], role: str, start: dict[str, Tensor]) -> float:
    return max((weights[f"{role}.{name}"] - value).abs().max().item() for name, value in start.items())


# Parity.


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.precision == "no"])
def test_two_processes_do_what_one_does_that_accumulates_twice_as_often(name, two, alone):
    facts(two, name), facts(two, name, 1)
    lines, weights, *_ = alone(CASES[name], name)
    assert_alike(losses(two / name / "metrics.jsonl"), lines, 1e-5)
    assert furthest(load_file(two / name / "weights.safetensors"), weights) < 1e-4


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.watched])
def test_two_processes_keep_the_videos_that_one_keeps(name, two, alone):
    facts(two, name), facts(two, name, 1)
    *_, mine = alone(CASES[name], name)
    kept = sorted(path.name for path in (mine / LOOKS).iterdir())
    assert len(kept) == 3 and kept == sorted(path.name for path in (two / name / LOOKS).iterdir())
    for file in kept:
        one, theirs = (load_file(folder / LOOKS / file)["x0"] for folder in (mine, two / name))
        torch.testing.assert_close(one, theirs, rtol=0, atol=1e-3)  # Adam's first steps make rounding larger


@pytest.mark.parametrize("name", ["priming-bf16", "equilibrium-bf16"])
def test_under_bf16_two_processes_agree_with_one_to_its_precision(name, two, alone):
    facts(two, name), facts(two, name, 1)
    lines, *_ = alone(CASES[name], name)
    assert_alike(losses(two / name / "metrics.jsonl")[:1], lines[:1], 0.05)


@pytest.mark.parametrize("name", ["priming", "equilibrium"])
@pytest.mark.parametrize("processes", ["two to one", "two to two", "one to two"])
def test_a_state_is_taken_up_by_any_number_of_processes(name, processes, two, alone, tmp_path):
    job = "grow" if processes == "one to two" else "resume"
    facts(two, job), facts(two, job, 1)
    case = Case(name, steps=3)
    lines, weights, *_ = alone(case, f"{name}-whole")
    if processes != "two to one":
        found = load_file(two / f"{job}-{name}" / "weights.safetensors")
        metrics = two / f"{job}-{name}" / "metrics.jsonl"
    else:
        shutil.copytree(two / f"state-{name}", tmp_path / "state")
        accelerator = accelerator_for("no")
        phase = build(case, accelerator)
        metrics = fit(phase, tmp_path / "state", accelerator)
        found = result(phase)
    assert_alike(losses(metrics), lines, 1e-5)
    assert furthest(found, weights) < 1e-4


@pytest.mark.parametrize(
    "name",
    ["priming", "priming-again", "priming-context", "equilibrium", "equilibrium-lora", "consistency", "dmd2", "magic"],
)
def test_the_frozen_teacher_stays_bit_for_bit(name, two):
    weights = load_file(two / name / "weights.safetensors")
    place = "network.teacher." if name == "equilibrium" else "network.base."
    found = {
        key.removeprefix(place).replace(".base_layer", ""): v for key, v in weights.items() if key.startswith(place)
    }
    before = reference("teacher").state_dict()
    assert before.keys() <= found.keys()
    assert [key for key, value in before.items() if not found[key].equal(value)] == []


def test_both_phases_move_what_they_train(two):
    primed, ended = (load_file(two / name / "weights.safetensors") for name in ("priming", "equilibrium"))
    assert moved(primed, "generator", reference("teacher").state_dict()) > 1e-3
    assert moved(ended, "generator", reference("generator").state_dict()) > 1e-3
    assert moved(ended, "ema", reference("generator").state_dict()) > 1e-4


# The start.


@pytest.mark.parametrize("rank", [0, 1])
def test_after_a_start_on_the_meta_device_every_process_has_its_half_and_whole_tables(rank, two):
    found = facts(two, "start", rank)
    assert found["tables"] and not found["meta"] and not found["followers"] and found["processes"] == 2
    assert 0.4 < found["here"] / found["shared"] < 0.6
    assert found["whole"] and all("norm" in name or "scale_shift_table" in name for name in found["whole"])


def test_matrices_travel_as_bf16_and_what_has_to_be_exact_does_not(two):
    found = facts(two, "precision")
    exact = [n for n in found["seen"] if any(s in n for s in ("norm", "table", "patch_embedding", "time_embedder"))]
    assert len(exact) > 20 and all(found["seen"][name] == "torch.float32" for name in exact)
    rest = {dtype for name, dtype in found["seen"].items() if name not in exact}
    assert rest == {"torch.bfloat16"} and found["masters"] == ["torch.float32"]


def test_latents_and_times_enter_in_float32_and_so_does_what_the_blocks_add_to(two):
    given = facts(two, "precision")["given"]
    assert len(given) == 3 and set(given.values()) == {"torch.float32"}


def test_frozen_weights_are_bf16_shards_and_the_adapters_on_them_float32(two):
    found = facts(two, "precision")
    kept = ("norm1.", "norm2.", "norm3.", "table", "patch_embedding", "time_embedder")  # diffusers', and the inputs
    exact = {name for name in found["frozen"] if any(part in name for part in kept)}
    assert {dtype for name, dtype in found["frozen"].items() if name not in exact} == {"torch.bfloat16"}
    assert {found["frozen"][name] for name in exact} == {"torch.float32"}
    assert found["adapters"] == ["torch.float32"]


# Communication.


def test_the_ema_follows_without_communication(two):
    found = facts(two, "communication")
    assert sum(found["update"].values()) > 0 and sum(found["ema"].values()) == 0


def test_gradients_are_reduced_only_in_the_last_micro_batch_unless_memory_is_dearer(two):
    found = facts(two, "communication")

    def reductions(name: str) -> int:
        return sum(n for op, n in found[name].items() if "reduce_scatter" in op)

    assert reductions("update") > 0
    assert reductions("accumulating") == reductions("update")
    assert reductions("eager") == 3 * reductions("update")


# Memory.


@pytest.mark.parametrize("name", SEVERAL)
def test_each_process_takes_the_memory_that_is_planned(name, two):
    settings, phase, network = several(name)
    planned = execute(settings, phase, network, TOKENS, 2, gpu=False)
    assert [planned.peak] * 2 == pytest.approx([facts(two, "memory", rank)[name] for rank in (0, 1)], rel=0.05)


def test_shards_and_shared_clips_take_less_memory(two):
    found = facts(two, "memory")
    assert found["equilibrium-again"] < 0.75 * found["equilibrium-whole"]
    assert found["priming-context"] < 0.75 * found["priming"]
    assert found["priming-reduced"] < found["priming-whole-gradients"]


# Refusals.


def test_context_parallelism_refuses_what_it_cannot_split(two):
    three, two_ = facts(two, "refused")["said"]
    assert "context_parallel = 3 does not divide the number of processes, 2" in three and not two_


@pytest.mark.parametrize("rank", [0, 1])
def test_shards_may_not_change_between_a_differentiated_pass_and_its_backward_pass(rank, two):
    assert "weights were changed between" in facts(two, "swap", rank)["said"]


# The result.


@pytest.mark.parametrize("name", EXPORTED)
def test_the_first_process_writes_a_pipeline_that_diffusers_loads(name, two, alone):
    facts(two, name), facts(two, name, 1)
    assert not list((two / name / "export-1").iterdir())
    student = load_pipeline(two / name / "export-0" / "student").transformer
    *_, phase, _ = alone(CASES[name], name)
    (x, c), t = build_batch(2), torch.tensor([0.3, 1.0])
    with torch.no_grad():
        expected = velocity(phase.ema, x, t, c)
        torch.testing.assert_close(velocity(student, x, t, c), expected, atol=1e-4, rtol=1e-3)
        assert (velocity(build_transformer(1 if name == "equilibrium" else 0), x, t, c) - expected).abs().max() > 1e-3
