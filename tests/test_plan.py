"""What `vpae plan` says is held against what real phases take: operations, bytes; and an H200's. Scripts that run."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from planned import ROOT, SMALL, TOKENS, at_tiny_size, on_larger_clips, variant
from test_workflow import Clone
from vpae.bench.networks import random_condition, random_latents
from vpae.bench.training import Workbench, held_by
from vpae.cli import main
from vpae.config import Experiment, Lora
from vpae.distill import METHODS
from vpae.experiment import ConfigError, Source, load, shipped
from vpae.models.adapters import TARGETS, SharedBase
from vpae.models.wan import velocity
from vpae.planning import inference
from vpae.planning import phase as phase_module
from vpae.planning import plan as plan_module
from vpae.planning import remedies as remedies_module
from vpae.planning.command import as_text, parse_bytes
from vpae.planning.complaints import complaints
from vpae.planning.inference import network_use
from vpae.planning.meter import LiveBytes, Meter
from vpae.planning.network import Network, Sequence, count, parameters_of, pipeline_of, tokens_of
from vpae.planning.phase import Execution
from vpae.planning.plan import Cluster, _phase, make_plan
from vpae.planning.presence import incomplete, missing_teacher
from vpae.planning.remedies import _more_gpus, remedies, switches, with_switches
from vpae.teacher.vae import build as build_vae

FULL_SCALE = [path for path in shipped(ROOT / "configs") if path.stem.startswith("wan")]
CONFIG = ROOT / "configs" / "wan2.1-i2v-14b-480p.yaml"
LORA = ROOT / "configs" / "wan2.1-i2v-14b-480p-lora.yaml"
I2V_14B = Network()
SHALLOW = replace(SMALL, layers=3)  # run once, with nothing to extrapolate
CPU = torch.device("cpu")
PAPER = ("priming", "equilibrium")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def shapes(values: object) -> object:
    """Settings without what changes no tensor's shape: rates, weights and times are on, off, or something between."""
    if isinstance(values, dict):
        return {key: shapes(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [shapes(value) for value in values]
    return 0.5 if isinstance(values, float) and values not in (0, 1) else values


def remembered(work: Callable, read: Callable[[Experiment, tuple], object]) -> Callable:
    """The same function; what is asked again of all that it reads is not run again."""
    found: dict[str, object] = {}

    def call(settings: Experiment, *others: object, **options: object) -> object:
        key = repr((shapes(read(settings, others)), others, options, phase_module.FEWEST))
        if key not in found:
            found[key] = work(settings, *others, **options)
        return found[key]

    return call


def _read_by_a_phase(settings: Experiment, others: tuple) -> dict:
    sections = dict.fromkeys(("seed", "geometry", "methods", *settings.chain(others[0])), True)
    return settings.model_dump(include=sections | {"teacher": {"shift"}})


def _read_by_uses(settings: Experiment, _others: tuple) -> dict:
    samples = {"batch_size", "vae_dtype", "vae_tiles", "decoder"}
    return settings.model_dump(include={"geometry": True, "latents": {"batch_size"}, "samples": samples})


execute = remembered(phase_module.execute, _read_by_a_phase)
uses = remembered(inference.uses, _read_by_uses)


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests have in common is run once, and in this process."""
    monkeypatch.setattr(plan_module, "_at_once", lambda work: {name: do(*of) for name, (do, *of) in work.items()})
    for module in (plan_module, remedies_module):
        monkeypatch.setattr(module, "execute", execute)
    monkeypatch.setattr(plan_module, "uses", uses)


@pytest.fixture
def full() -> dict:
    """The plan of the paper's experiment, on what its file asks for."""
    return make_plan(load(CONFIG, environment=False), Cluster(None, 80e9))


# Parameters and tokens


@pytest.mark.slow
def test_the_plan_of_the_full_experiment_has_the_known_numbers(full: dict) -> None:
    priming, equilibrium = full["parameters"]["priming"], full["parameters"]["equilibrium"]
    assert priming["generator"] == priming["ema"] == equilibrium["teacher"] == 16_394_878_784
    assert priming["fake"] == pytest.approx(359.1e6, rel=1e-3)
    pipeline = full["parameters"]["pipeline"]
    assert pipeline["transformer"] == 16_394_878_784
    assert pipeline["text_encoder"] == pytest.approx(5.68e9, rel=1e-2)
    assert pipeline["vae"] == pytest.approx(127e6, rel=1e-2)
    assert pipeline["image_encoder"] == pytest.approx(631e6, rel=1e-2)
    assert equilibrium["head"] > 0
    assert full["tokens"] == 32_760
    assert full["flops_per_nfe"] == pytest.approx(1.7e15, rel=0.02)
    assert full["gpu_hours"] > 100
    for stage in full["stages"].values():
        parts = dict(stage["bytes_per_gpu"])
        assert parts.pop("total") == pytest.approx(sum(parts.values()))
        assert min(parts.values()) > 0
        assert stage["gpu_hours"] > 0
    totals = {name: stage["bytes_per_gpu"]["total"] for name, stage in full["stages"].items()}
    assert max(totals.values()) == totals[full["binding_stage"]]
    assert "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers" in full["missing"][-1]


@pytest.mark.slow
def test_the_plan_covers_every_stage_that_asks_for_a_gpu(full: dict) -> None:
    cluster = load(CONFIG, environment=False).settings.cluster
    methods = load(CONFIG, environment=False).settings.methods
    others = [name for name in ("latents", "samples", "evaluation") if getattr(cluster, name).gpus]
    assert set(full["stages"]) == {*methods, *others}
    assert full["stages"]["priming"]["gpus"] == 16
    for name, stage in full["stages"].items():
        assert stage["fits"] and not stage["complaints"], name
        assert 0 < stage["host_bytes"] <= getattr(cluster, name).memory_gb * 1e9


@pytest.mark.parametrize(("name", "tokens"), [("wan2.1-i2v-14b-480p", 32_760), ("wan2.1-i2v-14b-720p", 75_600)])
def test_tokens_are_those_of_wan(name: str, tokens: int) -> None:
    source = load(ROOT / "configs" / f"{name}.yaml", environment=False)
    assert tokens_of(source.settings, pipeline_of(source)) == Sequence(tokens, 512, 257)


def test_adapters_of_known_ranks_have_the_known_sizes() -> None:
    # r (in + out) over every adapted layer of a block: six of D x D on the video, four on text and image, two of F.
    d, f = I2V_14B.width, I2V_14B.ffn
    expected = 40 * 64 * (10 * 2 * d + 2 * (d + f))
    assert len(TARGETS) == 8  # of which q, k, v, out are there twice: self- and cross-attention
    for rank in (64, 128):
        with torch.device("meta"):
            assert count(SharedBase(I2V_14B.build()).add("student", Lora(rank=rank))) == rank / 64 * expected


def test_a_teacher_that_is_trained_is_planned_as_it_will_be_built() -> None:
    source = load(ROOT / "configs" / "micro.yaml", environment=False)
    with torch.device("meta"):
        built = build_vae(source.settings.teacher.vae)
    assert parameters_of(pipeline_of(source))["vae"] == count(built)


# What is counted


def evaluation(network: Network, latents: tuple[int, int, int], gradient: str) -> tuple[nn.Module, tuple]:
    """A network on a CPU, and what `velocity` wants."""
    geometry = {"frames": 4 * latents[0] - 3, "height": 8 * latents[1], "width": 8 * latents[2]}
    settings = load(ROOT / "configs" / "micro.yaml", [f"geometry={geometry}"], environment=False).settings
    model: nn.Module = network.build("cpu").requires_grad_(gradient == "weights")
    if gradient == "adapter":
        model = SharedBase(model).add("student", Lora(rank=4, alpha=4))
    x = random_latents(settings, 1, CPU).requires_grad_(gradient == "input")
    condition = random_condition(settings, network, Sequence(0, 512, 257), 1, CPU)
    return model, (x, torch.full((1,), 0.5), condition)


@pytest.mark.parametrize("gradient", ["weights", "adapter", "input"])
def test_operations_and_bytes_are_those_that_torch_counts(gradient: str) -> None:
    model, inputs = evaluation(SMALL, (5, 16, 16), gradient)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        velocity(model, *inputs).sum().backward()
    model.zero_grad()
    with Meter() as meter:
        velocity(model, *inputs).sum().backward()
    # Fused attention always computes the gradients of keys and values; those of text and image lead nowhere here.
    needless = 8 * 2 * 2 * (5 * 8 * 8) * (512 + 257) * SMALL.width if gradient == "input" else 0
    assert meter.counts["model"] == counter.get_total_flops() + needless
    assert meter.counts["recomputed"] == 0
    with LiveBytes() as live:
        velocity(model, *inputs).sum().backward()
    assert 0 < live.peak == pytest.approx(meter.peak, rel=0.05)


def test_what_is_computed_again_is_the_forward_pass_of_the_blocks() -> None:
    """Checkpointing runs each block once more, but for what comes after the last tensor that it needs."""
    model, inputs = evaluation(SMALL, (5, 16, 16), "weights")
    counts = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        with Meter() as forward:
            loss = velocity(model, *inputs).sum()
        with Meter() as backward:
            loss.backward()
        counts.append((forward.counts, backward.counts))
    (forward, backward), (forward_again, backward_again) = counts
    assert forward == forward_again and backward["model"] == backward_again["model"]
    assert 0.8 * forward["model"] < backward_again["recomputed"] < forward["model"]


def test_a_network_evaluation_of_14b_has_the_known_operations() -> None:
    """By hand: N tokens, width D, F of feed-forward, S of text and image: 2 (N (6 D^2 + 2 D F) + 2 N^2 D + ...)."""
    settings = load(CONFIG, environment=False).settings
    tokens, d, f = Sequence(32_760, 512, 257), 5120, 13824
    n, context = tokens.video, tokens.text + tokens.image
    block = n * (6 * d * d + 2 * d * f) + 2 * n * n * d + 2 * n * context * d + 2 * context * d * d
    ends = n * d * 4 * 52
    found = network_use(settings, I2V_14B, tokens, 1)
    assert found.operations == pytest.approx(2 * (40 * block + ends), rel=1e-3)
    assert found.weights == pytest.approx(2 * 16_394_878_784, rel=5e-3)
    assert not found.float32


CASES = [("micro", phase, False) for phase in PAPER]
CASES += [(name, phase, True) for name in ("micro", "lora", "copies") for phase in PAPER]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "phase", "checkpointing"), CASES + [("micro", method, True) for method in METHODS if method not in PAPER]
)
def test_a_phase_takes_the_operations_and_bytes_that_are_planned(name: str, phase: str, checkpointing: bool) -> None:
    """Planned from three and four blocks without memory, held against eight of real ones."""
    settings = on_larger_clips(variant(name, phase, activation_checkpointing=checkpointing))
    planned = execute(settings, phase, SMALL, TOKENS, 1, gpu=False)
    bench = Workbench(settings, phase, SMALL, TOKENS, CPU)
    for turn, plan in planned.turns.items():  # the first time optimisers make their state
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            bench.update(turn)
        assert plan.executed == pytest.approx(counter.get_total_flops(), rel=0.01), turn
    for turn, plan in planned.turns.items():
        with LiveBytes() as live:
            bench.update(turn)
        assert plan.peak == pytest.approx(held_by(bench.phase) + live.peak, rel=0.03), turn
        assert checkpointing or plan.recomputed == 0


@pytest.mark.slow
def test_more_micro_batches_take_as_many_times_the_operations() -> None:
    one, five = (execute(variant("micro", "priming", n), "priming", SHALLOW, TOKENS, 1) for n in (1, 5))
    for turn, plan in five.turns.items():
        assert plan.executed == pytest.approx(5 * one.turns[turn].executed)
        assert plan.peak > one.turns[turn].peak  # gradients are there while the next micro-batch runs


@pytest.mark.slow
def test_turns_are_counted_as_a_run_makes_them() -> None:
    settings = variant("micro", "equilibrium")
    head = settings.equilibrium.head.model_copy(update={"taps": (0, 1, 2)})
    changed = settings.equilibrium.model_copy(
        update={"head": head, "discriminator_warmup_steps": 3, "discriminator_steps_per_generator_step": 2}
    )
    planned = execute(settings.model_copy(update={"equilibrium": changed}), "equilibrium", SHALLOW, TOKENS, 1)
    steps = changed.training.steps
    assert {name: turn.count for name, turn in planned.turns.items()} == {"head": 2 * steps + 3, "generator": steps}


@pytest.mark.slow
def test_features_between_and_after_the_last_are_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same network run whole."""
    settings = variant("micro", "equilibrium", activation_checkpointing=True)
    head = settings.equilibrium.head.model_copy(update={"taps": (1, 5)})
    changed = settings.equilibrium.model_copy(update={"head": head})
    settings = settings.model_copy(update={"equilibrium": changed})
    short = execute(settings, "equilibrium", SMALL, TOKENS, 1)
    monkeypatch.setattr("vpae.planning.phase.FEWEST", SMALL.layers)
    whole = execute(settings, "equilibrium", SMALL, TOKENS, 1)
    for turn, plan in whole.turns.items():
        assert short.turns[turn].executed == pytest.approx(plan.executed, rel=1e-6)
        assert short.turns[turn].peak == pytest.approx(plan.peak, rel=0.01)
    assert short.parameters == whole.parameters


# Measured on an H200 with the networks of `LORA` and random weights: one clip, one process, torch 2.11.
# (phase, turn): (model operations, peak bytes, whether the generator's optimiser had its averages already).
H200 = {
    ("equilibrium", "head"): (8.5231e15, 57.774e9, False),
    ("equilibrium", "generator"): (10.2892e15, 106.058e9, True),
    ("priming", "fake"): (6.0226e15, 81.392e9, False),
    ("priming", "generator"): (9.3954e15, 84.256e9, True),
}
AVERAGES = 2 * 4 * 359_137_280


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["priming", "equilibrium"])
def test_what_is_planned_at_14b_is_what_an_h200_took(phase: str) -> None:
    once = [f"{phase}.training.accumulate=1"]
    planned = execute(load(LORA, once, environment=False).settings, phase, I2V_14B, Sequence(32_760, 512, 257), 1)
    for turn, plan in planned.turns.items():
        operations, peak, steady = H200[phase, turn]
        assert plan.model == pytest.approx(operations, rel=0.01), turn
        assert plan.peak == pytest.approx(peak, rel=0.05), turn
        assert plan.peak == pytest.approx(peak + (0 if steady else AVERAGES), rel=0.02), turn


# Advice


def wide(tmp_path: Path, *overrides: str) -> Source:
    """Few wide blocks: run once, with nothing to extrapolate, and with weights and activations that matter."""
    shape = ["teacher.transformer={heads: 8, head_dim: 64, layers: 3}", "equilibrium.head.taps=[0, 1, 2]"]
    clips = "geometry={frames: 33, height: 256, width: 256}"
    return load(ROOT / "configs" / "micro.yaml", [*shape, clips, *overrides], environment=False)


def plan_of(tmp_path: Path, gpus: int | None, *overrides: str, memory: float = 80e9, **cluster) -> dict:
    return make_plan(wide(tmp_path, *overrides), Cluster(gpus, memory, overhead=0.0, **cluster))


@pytest.mark.slow
def test_what_would_make_it_fit_makes_it_fit(tmp_path: Path) -> None:
    full = [f"{phase}.training.sharding.strategy=full" for phase in PAPER]
    largest = max(stage["bytes_per_gpu"]["total"] for stage in plan_of(tmp_path, 2, *full)["stages"].values())
    plan = plan_of(tmp_path, 2, *full, memory=0.9 * largest)
    assert not plan["fits"]
    lacking = {name: stage for name, stage in plan["stages"].items() if not stage["fits"]}
    for phase, stage in lacking.items():
        assert {"set", "gpus"} >= {key for remedy in stage["remedies"] for key in remedy} - {"total"}
        assert any("set" in remedy for remedy in stage["remedies"])
        for remedy in stage["remedies"]:
            again = plan_of(tmp_path, remedy.get("gpus", 2), *full, *remedy.get("set", []), memory=0.9 * largest)
            assert again["stages"][phase]["fits"]
            assert again["stages"][phase]["bytes_per_gpu"]["total"] == pytest.approx(remedy["total"])
    assert "would fit with --set" in as_text(plan)


@pytest.mark.slow
def test_more_gpus_take_less_memory_each_and_the_same_hours_for_the_same_clips(tmp_path: Path) -> None:
    # Twice the GPUs see twice the clips a step; half the accumulation brings that back.
    full = [f"{phase}.training.sharding.strategy=full" for phase in PAPER]
    few, many = (
        plan_of(tmp_path, gpus, *full, *(f"{phase}.training.accumulate={8 // gpus}" for phase in PAPER))["stages"]
        for gpus in (2, 4)
    )
    for phase in PAPER:
        assert many[phase]["bytes_per_gpu"]["total"] < few[phase]["bytes_per_gpu"]["total"]
        assert many[phase]["flops_per_step"] == pytest.approx(few[phase]["flops_per_step"])
        assert many[phase]["gpu_hours"] == pytest.approx(few[phase]["gpu_hours"])
        assert many[phase]["clips_per_step"] == few[phase]["clips_per_step"]


@pytest.mark.slow
def test_a_slow_interconnect_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = variant("micro", "priming", strategy="full")
    executed = execute(settings, "priming", SHALLOW, TOKENS, 2)
    monkeypatch.setattr("vpae.planning.plan.execute", lambda *_: executed)
    clusters = [Cluster(2, 80e9, interconnect=speed) for speed in (None, 1e15, 1e9)]
    seconds = [_phase(settings, "priming", SHALLOW, TOKENS, one)["seconds_per_step"] for one in clusters]
    assert seconds[0] == seconds[1] < seconds[2]


@pytest.mark.slow
def test_traffic_is_that_of_shards_and_of_shared_clips() -> None:
    """In one micro-batch each GPU of n gets the others' (n - 1) / n of all weights, for each direction of a pass."""
    n = 4
    whole, shards = (
        execute(on_larger_clips(variant("micro", "equilibrium", strategy=s)), "equilibrium", SMALL, TOKENS, n)
        for s in ("none", "full")
    )
    size = 4 * count(SMALL.build()) * (n - 1) / n
    # Without shards only the gradients travel, in an all-reduce: there and back.
    assert whole.turns["generator"].received == pytest.approx(2 * size, rel=0.01)
    # Generator forward and backward, teacher forward, EMA forward and backward; and the gradients, once.
    assert shards.turns["generator"].received == pytest.approx(6 * size, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gpus"),
    [("i2v-14b-480p-lora", 8), ("i2v-14b-480p-kept-score", 16), ("i2v-14b-720p", 32), ("fun-1.3b-480p", 8)],
    ids=lambda value: str(value),
)
def test_the_shipped_experiments_fit_the_clusters_they_ask_for(name: str, gpus: int) -> None:
    plan = make_plan(load(ROOT / "configs" / f"wan2.1-{name}.yaml", environment=False), Cluster(None, 80e9))
    assert plan["fits"], {stage: found["bytes_per_gpu"] for stage, found in plan["stages"].items()}
    assert not [complaint for stage in plan["stages"].values() for complaint in stage["complaints"]]
    for phase in PAPER:
        assert plan["stages"][phase]["gpus"] == gpus
        assert plan["stages"][phase]["clips_per_step"] == 64


@pytest.mark.slow
def test_a_vae_that_works_on_tiles_is_planned_so() -> None:
    whole, tiled = (
        load(ROOT / "configs" / "micro.yaml", ["geometry.height=512", f"samples.vae_tiles={tiles}"], environment=False)
        for tiles in ("false", "true")
    )
    pipeline = pipeline_of(whole)
    tokens = tokens_of(whole.settings, pipeline)
    without, within = (uses(one.settings, pipeline, tokens) for one in (whole, tiled))
    for work in ("decode", "condition_alone"):
        assert within[work].peak < without[work].peak
        assert within[work].operations > without[work].operations  # tiles overlap
    assert within["condition"] == without["condition"]  # that of `latents`


def test_clips_are_shared_by_as_many_gpus_as_divide_their_tokens() -> None:
    settings = variant("micro", "priming", strategy="full")
    for video, sizes in ((12, [2, 4]), (33_390, [2]), (32_760, [2, 4, 8])):
        offered = switches(settings, "priming", replace(SMALL, heads=8), Sequence(video, 32, 17), 8)
        assert [values["context_parallel"] for values in offered if "context_parallel" in values] == sizes


def test_more_gpus_are_whole_nodes_and_whole_groups_that_share_a_clip() -> None:
    asked = []

    def peak(gpus: int) -> float:
        asked.append(gpus)
        return 10 + 1000 / gpus

    assert _more_gpus(peak, 6, 3, peak(6), 40) == (48, 10 + 1000 / 48)
    assert all(gpus % 3 == 0 for gpus in asked)


@pytest.mark.slow
def test_one_gpu_without_shards_is_told_of_more_gpus_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpae.planning.remedies.MOST_GPUS", 64)  # as many as these networks have rows to share out
    settings, gpus = variant("micro", "priming"), 1
    needed = execute(settings, "priming", SHALLOW, TOKENS, gpus).peak
    sharded = execute(with_switches(settings, "priming", {"strategy": "full"}), "priming", SHALLOW, TOKENS, 64).peak
    [*_, last] = remedies(settings, "priming", SHALLOW, TOKENS, gpus, needed, (sharded + needed) / 2)
    assert last["set"] == ["priming.training.sharding.strategy=full"] and last["gpus"] >= 8


@pytest.mark.slow
def test_several_gpus_without_shards_are_told_of_as_many_as_suffice_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vpae.planning.remedies.MOST_GPUS", 64)
    source = wide(tmp_path, "priming.training.sharding.strategy=none")
    settings, network = source.settings, pipeline_of(source).transformer
    tokens = tokens_of(settings, pipeline_of(source))
    shards = with_switches(settings, "priming", {"strategy": "full"})
    needed, room = (execute(one, "priming", network, tokens, n).peak for one, n in ((settings, 8), (shards, 16)))
    [*_, last] = remedies(settings, "priming", network, tokens, 8, needed, 1.01 * room)
    assert last["gpus"] == 16 and last["total"] == room


def small_plan(*overrides: str, memory: float = 80e9) -> dict:
    """Of the stages around the methods; `micro` trains none of them here."""
    rows = "samples.rows={teacher-100nfe: null, priming-1nfe: null, vpae-1nfe: null, vpae-2nfe: null, vpae-4nfe: null}"
    asks = [f"cluster.{stage}={{gpus: 1, memory_gb: 64}}" for stage in ("latents", "samples", "evaluation")]
    settings = [rows, "methods=[]", *asks, *overrides]
    source = load(ROOT / "configs" / "micro.yaml", settings, environment=False)
    return make_plan(source, Cluster(None, memory, overhead=0.0))["stages"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latents", "samples"])
def test_stages_that_no_method_is_part_of_name_what_makes_them_fit(name: str) -> None:
    batches = ["geometry={frames: 17, height: 96, width: 96}", f"{name}.batch_size=32"]
    whole, least = (small_plan(*batches, *more)[name] for more in ([], [f"{name}.batch_size=1"]))
    total, enough = (stage["bytes_per_gpu"]["total"] for stage in (whole, least))
    stage = small_plan(*batches, memory=(total + enough) / 2)[name]
    assert not stage["fits"] and [remedy["set"] for remedy in stage["remedies"]] == [[f"{name}.batch_size=1"]]
    assert stage["remedies"][0]["total"] == pytest.approx(enough)


@pytest.mark.slow
def test_the_clips_of_the_classifier_test_are_drawn_and_counted() -> None:
    without, within = small_plan(), small_plan("evaluation.c2st.clips=16", "samples.batch_size=16")
    assert within["evaluation"]["gpu_hours"] > without["evaluation"]["gpu_hours"]


@pytest.mark.slow
def test_a_small_decoder_or_a_bfloat16_vae_is_planned_so() -> None:
    whole, half, small = (
        small_plan(*overrides)["samples"]
        for overrides in ([], ["samples.vae_dtype=bfloat16"], ["samples.decoder=taew2_1.safetensors"])
    )
    assert half["bytes_per_gpu"]["weights"] < whole["bytes_per_gpu"]["weights"]
    assert len({stage["gpu_hours"] for stage in (whole, half, small)}) == 3


@pytest.mark.slow
def test_float32_takes_its_own_share_of_the_peak() -> None:
    cluster, settings = Cluster(1, 80e9, overhead=0.0), variant("micro", "priming")
    seconds = {
        precision: _phase(
            at_tiny_size(settings, "priming", mixed_precision=precision), "priming", SMALL, TOKENS, cluster
        )["seconds_per_step"]
        for precision in ("no", "bf16")
    }
    assert seconds["no"] / seconds["bf16"] == pytest.approx(4, rel=0.01)


def test_jobs_that_cannot_save_in_time_or_end_in_time_are_told_of() -> None:
    settings = load(CONFIG, environment=False).settings
    training = {"host_bytes": 0.0, "turns": {"fake": {"seconds": 80.0}, "generator": {"seconds": 500.0}}}
    assert complaints("priming", {**training, "state_bytes": 300e9}, settings) == []
    [warning] = complaints("priming", {**training, "state_bytes": 500e9}, settings)
    assert "cluster.priming.warning_seconds = 900, but an update takes about 500 s" in warning
    assert warning.endswith("500 s to be saved; raise it to 1020")
    short = load(CONFIG, ["cluster.priming.minutes=20"], environment=False).settings
    [minutes] = complaints("priming", {**training, "state_bytes": 300e9}, short)
    assert minutes.startswith("cluster.priming.minutes = 20 are few") and minutes.endswith("raise it to 37")
    found = {name: complaints(name, {"host_bytes": 0.0, "gpu_hours": 300.0}, settings) for name in plan_module.AROUND}
    assert found.pop("evaluation")[0].startswith("cluster.evaluation.minutes = 720, but a job takes about 300.0 hours")
    assert found == {"latents": [], "samples": []}  # 32 jobs of 9.4 hours
    [long] = complaints("samples", {"host_bytes": 0.0, "gpu_hours": 400.0}, settings)
    assert long.endswith("a job takes about 12.5 hours; raise it or jobs.samples")
    [gather] = complaints("latents", {"host_bytes": 0.0, "gpu_hours": 1.0, "result_bytes": 50e12}, settings)
    assert "its last job takes about 13.9 hours to hash what the others made" in gather


@pytest.mark.slow
def test_what_no_switch_makes_fit_and_too_little_memory_of_a_node_are_said(tmp_path: Path) -> None:
    alone = ["methods=[priming]", "samples.rows={vpae-1nfe: null, vpae-2nfe: null, vpae-4nfe: null}"]
    plan = plan_of(tmp_path, 1, *alone, "cluster.samples={gpus: 1, memory_gb: 4}", memory=1e6)
    [complaint] = plan["stages"]["samples"]["complaints"]
    assert "cluster.samples.memory_gb = 4" in complaint
    assert not plan["fits"]
    assert not plan["stages"]["priming"]["remedies"]
    assert "no switch makes it fit" in as_text(plan) and "does NOT fit in 1.0 MB" in as_text(plan)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in shipped(ROOT / "configs") if path not in FULL_SCALE], ids=str)
def test_every_shipped_experiment_can_be_planned(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With as few blocks as a head has taps: how figures grow with blocks is the same for all."""

    def shallow(settings: Experiment, name: str, network: Network, *others: object) -> Execution:
        taps = len(phase_module._taps(getattr(settings, name), network.layers))
        few = replace(network, layers=max(2, taps))
        section = phase_module._with_taps(getattr(settings, name), tuple(range(taps)))
        return execute(settings.model_copy(update={name: section}), name, few, *others)

    for module in (plan_module, remedies_module):
        monkeypatch.setattr(module, "execute", shallow)
    teacher = load(path, environment=False).settings.teacher
    known = teacher.source != "folder" or teacher.architecture or (ROOT / teacher.path / "model_index.json").is_file()
    assert main(["plan", "--config", str(path), "--gpus", "8"]) == (0 if known else 2)
    printed = capsys.readouterr()
    assert ("GPU-hours in all" in printed.out) if known else ("its shape is unknown" in printed.err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu-memory", "much"], "--gpu-memory much"),
        (["--gpu-memory", "80"], "--gpu-memory 80: write a number with a unit"),
        (["--gpus", "0"], "--gpus 0"),
        (["--utilisation", "40"], "--utilisation 40: a share"),
        (["--interconnect", "0"], "--interconnect 0: must be positive"),
        (["--set", "priming.training.sharding.context_parallel=3"], "does not divide the 16 processes"),
        (["--set", "teacher.architecture=", "--set", "teacher.path=someone/else"], "teacher.architecture"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--config", str(CONFIG), *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("80GB", 80e9), ("141 GiB", 141 * 2**30), ("8e10", 8e10), ("40g", 40e9)])
def test_sizes_are_read_with_their_units(text: str, size: float) -> None:
    assert parse_bytes(text, "--gpu-memory") == size
    assert parse_bytes("0GB", "--overhead", least=0) == 0


# What has to be there


def test_missing_weights_are_named_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["config", "check", "--strict", str(CONFIG)]) == 2
    message = capsys.readouterr().err
    assert (
        "hf download Wan-AI/Wan2.1-I2V-14B-480P-Diffusers --revision b184e23a8a16b20f108f727c902e769e873ffc73"
        in message
    )
    assert "clips.path: data/clips/train.csv does not exist" in message


def test_a_folder_that_lacks_a_shard_is_incomplete(teacher: Path, tmp_path: Path) -> None:
    assert incomplete(teacher) == []
    assert "transformer" in incomplete(tmp_path)
    copy = tmp_path / "copy"
    for part in teacher.iterdir():
        (copy / part.name).parent.mkdir(exist_ok=True)
        os.symlink(part, copy / part.name)
    (copy / "transformer").unlink()
    (copy / "transformer").mkdir()
    (copy / "transformer" / "config.json").write_text((teacher / "transformer" / "config.json").read_text())
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "transformer" / "model-00001-of-00002.safetensors").touch()
    assert incomplete(copy) == ["transformer/model-00002-of-00002.safetensors"]
    for damaged in ("version https://git-lfs.github.com/spec/v1", "[]", '{"weight_map": '):
        (copy / "transformer" / "model.safetensors.index.json").write_text(damaged)
        assert incomplete(copy) == ["transformer/model.safetensors.index.json (this one is damaged)"]


def test_another_kind_of_model_in_the_hub_s_cache_is_refused_by_name(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text('{"in_channels": 16}')
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    (found,) = missing_teacher(load(CONFIG, environment=False), tmp_path)
    assert "teacher.path: Wan-AI/Wan2.1-I2V-14B-480P-Diffusers: " in found and "text-to-video" in found


def test_a_finished_teacher_needs_no_hub(tmp_path: Path) -> None:
    source = load(CONFIG, environment=False)
    assert missing_teacher(source, tmp_path)
    folder = tmp_path / source.name / "teacher"
    folder.mkdir(parents=True)
    (folder / "provenance.json").touch()
    assert missing_teacher(source, tmp_path) == []


def test_a_teacher_of_another_shape_than_planned_is_refused(teacher: Path) -> None:
    settings = load(CONFIG, environment=False).settings
    wrong = settings.teacher.model_copy(
        update={"source": "folder", "path": str(teacher), "architecture": "wan2.1-i2v-14b"}
    )
    source = Source("x", CONFIG, settings.model_copy(update={"teacher": wrong}), None)
    with pytest.raises(ConfigError, match=r"has 4 layers of width 24"):
        pipeline_of(source)


@pytest.mark.slow
def test_no_job_is_planned_before_the_weights_are_there(tmp_path: Path) -> None:
    clone, name = Clone(tmp_path), CONFIG.stem
    (tmp_path / "data" / "clips").mkdir(parents=True)
    (tmp_path / "data" / "clips" / "train.csv").touch()
    arguments = ("--dry-run", "--config", f"experiment={name}", "--", f"results/{name}/equilibrium")
    code, printed = clone.snakemake(*arguments)
    assert code != 0
    assert "hf download Wan-AI/Wan2.1-I2V-14B-480P-Diffusers" in printed
    (tmp_path / "results" / name / "teacher").mkdir(parents=True)
    (tmp_path / "results" / name / "teacher" / "provenance.json").write_text(
        json.dumps({"settings": {}, "inputs": {}, "outputs": {}})
    )
    code, printed = clone.snakemake(*arguments)
    assert code == 0, printed
    assert f"results/{name}/priming" in printed


# Full-scale settings at tiny size


@pytest.mark.slow
@pytest.mark.parametrize("path", FULL_SCALE, ids=lambda path: path.stem)
@pytest.mark.parametrize("phase", ["priming", "equilibrium"])
def test_the_settings_of_full_scale_train_at_tiny_width(path: Path, phase: str) -> None:
    """As many blocks as the real one, checkpointed, in bf16, with its adapters: one update of every role."""
    source = load(path, environment=False)
    layers = pipeline_of(source).transformer.layers
    network = Network(layers=layers, heads=2, head_dim=12, ffn=32, text_dim=16, image_dim=16, freq_dim=16)
    settings = at_tiny_size(source.settings, phase)
    bench = Workbench(settings, phase, network, Sequence(80, 512, 5), CPU)
    before = {name: [p.clone() for p in role.parameters()] for name, role in bench.phase.roles.items()}
    for turn in bench.phase.roles:
        bench.update(turn)
    for name, role in bench.phase.roles.items():
        assert all(torch.isfinite(p).all() for p in role.parameters())
        assert any(not torch.equal(p, q) for p, q in zip(role.parameters(), before[name], strict=True)), name
