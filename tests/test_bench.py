"""`vpae bench` at tiny size: what it writes, and that its ratios say what the method is for. No absolute seconds."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
import torch._dynamo.exc
import torch._inductor.exc

from vpae import artifacts
from vpae.bench import COMPARISONS, sampling, training
from vpae.bench.measure import matmul_peak
from vpae.bench.networks import Components, random_components, random_transformer
from vpae.bench.run import Options
from vpae.bench.training import Workbench, _too_large
from vpae.cli import INTERRUPTED, main
from vpae.experiment import load
from vpae.planning.meter import LiveBytes, stored_bytes
from vpae.planning.network import Network, Sequence, pipeline_of, tokens_of
from vpae.planning.phase import Execution, Turn
from vpae.training import loop

ROOT = Path(__file__).parents[1]
MICRO = ROOT / "configs" / "micro.yaml"
CPU = torch.device("cpu")
# Wide enough that the networks' work is what takes the time; so few blocks that plans extrapolate nothing.
SIZES = [
    "teacher.transformer={heads: 2, head_dim: 64, layers: 4}",
    "geometry={frames: 17, height: 64, width: 64}",
    "samples.crf=20",
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One run of all parts but the rivals; a method is planned once, although it is one side of a comparison too."""
    out = tmp_path_factory.mktemp("bench") / "tiny.json"
    arguments = ["bench", "--config", str(MICRO), "--random-weights", "--device", "cpu", "--steps", "1,50"]
    arguments += ["--attention", "native,flash", "--batch-sizes", "1,2", "--repeats", "2", "--out", str(out)]
    arguments += ["--parts", "sampling,vae,priming,equilibrium,discriminator,fake"]
    for size in SIZES:
        arguments += ["--set", size]
    executed, plan = {}, training.execute

    def once(settings, *others):
        key = repr((settings.model_dump(), others))
        if key not in executed:
            executed[key] = plan(settings, *others)
        return executed[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "execute", once)
        assert main(arguments) == 0
    return json.loads(out.read_text())


def test_a_measurement_says_how_it_was_made(measured: dict) -> None:
    assert measured["device"]["type"] == "cpu"
    assert measured["device"]["name"]
    assert measured["packages"]["torch"] == torch.__version__
    assert measured["command"].split()[0] == "vpae"
    assert set(measured["code"]) >= {"commit", "dirty"}
    assert measured["options"]["random_weights"] is True


def test_a_package_that_is_not_there_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "PACKAGES", ("torch", "no-such-package"))
    assert artifacts.package_versions() == {"torch": torch.__version__}


def test_a_hundred_evaluations_take_many_times_as_long_as_one(measured: dict) -> None:
    ratios, videos = measured["sampling"]["ratios"], measured["sampling"]["videos"]
    assert [row["nfe"] for row in videos] == [1, 100]
    assert ratios["nfe"] == 100
    assert ratios["diffusion"] > 20  # a hundred, but for what a busy machine does
    assert 1 < ratios["end_to_end"] < ratios["diffusion"]


def test_the_parts_of_a_video_make_its_whole(measured: dict) -> None:
    for row in measured["sampling"]["videos"]:
        assert set(row["seconds"]) == {"text", "image", "condition", "diffusion", "decode", "mp4"}
        assert row["total_seconds"] == pytest.approx(sum(row["seconds"].values()))
        assert all(seconds > 0 for seconds in row["seconds"].values())


def test_every_combination_is_measured_or_says_why_not(measured: dict) -> None:
    rows = measured["sampling"]["evaluations"]
    assert [(r["attention"], r["batch"]) for r in rows] == [("native", 1), ("native", 2), ("flash", 1), ("flash", 2)]
    for row in rows:
        assert row.get("skipped") or 0 < row["share_of_peak"] < 1.5
    assert all("skipped" not in row for row in rows[:2])
    assert all("flash-attn" in row["skipped"] for row in rows[2:])
    assert measured["unfinished"] == []


MODES = (sampling.EAGER, sampling.COMPILED)


class Stub:
    """A transformer that only lets itself be prepared."""

    dtype = torch.float32

    def __init__(self, refuses: Exception | None = None):
        self.refuses, self.compiled = refuses, 0

    def register_forward_pre_hook(self, hook, with_kwargs: bool) -> None:
        pass

    def modules(self) -> list:
        return []

    def set_attention_backend(self, backend: str) -> None:
        if self.refuses and backend != "native":
            raise self.refuses

    def compile_repeated_blocks(self) -> None:
        self.compiled += 1


def rows_of(monkeypatch, error: Exception | None, refuses: Exception | None = None, modes=MODES) -> list[dict]:
    """What is said of each evaluation, where a prediction raises an error."""
    settings = load(MICRO, environment=False).settings
    parts = Components(Stub(refuses), None, None, None)
    bench = sampling.Bench(settings, parts, Network(), Sequence(80, 512, 257), CPU, 1)

    def predict(batch: int):
        def work() -> None:
            if error:
                raise error

        return work

    monkeypatch.setattr(bench, "_prediction", predict)
    rows = [{"mode": mode, "attention": name} for mode in modes for name in ("native", "other")]
    return [row | bench._evaluation(row["mode"], row["attention"], 1) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "words", "modes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "out of memory: CUDA", MODES),
        (RuntimeError("No available kernel. Aborting execution."), "the backend cannot do this here: No", MODES),
        (torch._dynamo.exc.Unsupported("no such thing"), "cannot be compiled: no such thing", MODES[1:]),
        (torch._inductor.exc.InductorError(RuntimeError("no g++"), None), "cannot be compiled: no g++", MODES[1:]),
    ],
)
def test_what_a_machine_cannot_do_is_left_out_with_its_reason(monkeypatch, error, words, modes) -> None:
    if modes != MODES:
        with pytest.raises(type(error)):
            rows_of(monkeypatch, error)
    assert all(words in row["skipped"] for row in rows_of(monkeypatch, error, modes=modes))


@pytest.mark.parametrize("refuses", [ValueError("must be one of"), RuntimeError("not usable"), ImportError("none")])
def test_a_backend_that_is_not_there_is_left_out_with_its_reason(monkeypatch, refuses) -> None:
    rows = rows_of(monkeypatch, None, refuses)
    assert [(row["mode"], row["attention"], "skipped" in row) for row in rows] == [
        ("eager", "native", False),
        ("eager", "other", True),
        ("compiled", "native", False),
        ("compiled", "other", True),
    ]
    assert all(row["skipped"] == f"the backend is not to be had: {refuses}" for row in rows[1::2])


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("wrong"), TypeError("wrong")])
def test_mistakes_end_a_measurement(monkeypatch, error) -> None:
    with pytest.raises(type(error), match=str(error)):
        rows_of(monkeypatch, error)


def test_videos_are_made_in_the_fastest_way_that_was_measured() -> None:
    rows = [
        {"mode": "eager", "attention": "a", "batch": 1, "seconds_per_nfe_and_video": 3.0},
        {"mode": "eager", "attention": "b", "batch": 1, "skipped": "not there"},
        {"mode": "compiled", "attention": "c", "batch": 1, "seconds_per_nfe_and_video": 2.0},
        {"mode": "compiled", "attention": "d", "batch": 2, "seconds_per_nfe_and_video": 1.0},
    ]
    assert sampling.fastest(rows) == ("compiled", "c")
    assert sampling.fastest(rows[1:2]) == ("eager", "native")


def test_what_is_found_is_kept_although_the_machine_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_arguments) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "compare", gone)
    arguments = ["bench", "--config", str(MICRO), "--random-weights", "--device", "cpu", "--repeats", "1"]
    assert main([*arguments, "--parts", "vae,fake", "--out", str(tmp_path / "found.json")]) == INTERRUPTED
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["vae"]["encode"]["seconds"] > 0 and found["command"] and found["unfinished"] == ["fake"]


@pytest.mark.slow
def test_a_large_pipeline_is_sampled_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done on a GPU from a billion parameters on; compiled as well, but without a compiler."""
    source = load(MICRO, environment=False)
    pipeline = pipeline_of(source)
    parts = random_components(pipeline, CPU, torch.bfloat16)
    tokens = tokens_of(source.settings, pipeline)
    bench = sampling.Bench(source.settings, parts, pipeline.transformer, tokens, CPU, 1)
    seen, compile_blocks = [], parts.transformer.compile_repeated_blocks
    parts.transformer.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    monkeypatch.setattr(parts.transformer, "compile_repeated_blocks", lambda: compile_blocks(backend="eager"))
    rows = list(bench.evaluations((1,), ("native",), compiled=True))
    assert [row["mode"] for row in rows] == ["eager", "compiled"] and all(row["seconds"] > 0 for row in rows)
    [video] = bench.videos((2,), 5.0, "eager", "native")
    assert video["nfe"] == 4 and all(seconds > 0 for seconds in video["seconds"].values())
    assert set(seen) == {torch.bfloat16}
    assert not any(module._compiled_call_impl for module in parts.transformer.modules())


@pytest.mark.parametrize("phase", ["priming", "equilibrium"])
def test_a_step_is_the_sum_of_its_turns(phase: str, measured: dict) -> None:
    found = measured[phase]
    assert found["seconds_per_step"] == pytest.approx(
        sum(row["per_step"] * row["seconds"] for row in found["turns"].values())
    )
    assert found["peak_bytes"] == max(row["peak_bytes"] for row in found["turns"].values()) > found["held_bytes"] > 0
    assert 0 < found["utilisation"] < 1.5
    assert found["planned_bytes"] == pytest.approx(found["peak_bytes"], rel=0.05)


def test_a_trained_copy_as_discriminator_costs_time_and_memory(measured: dict) -> None:
    ratio = measured["discriminator"]["ratio"]
    assert measured["discriminator"]["setting"] == "equilibrium.backbone"
    assert ratio["held_bytes"] > 1.3  # the copy with Adam's averages: 3 more networks on 3 + 2
    assert ratio["peak_bytes"] > 1.3
    flops = {form: measured["discriminator"][form]["model_flops_per_step"] for form in ("ema", "copy")}
    assert flops["copy"] > flops["ema"]  # seconds of so small a step depend on what else the machine does


def test_a_full_copy_as_fake_model_costs_memory(measured: dict) -> None:
    ratio = measured["fake"]["ratio"]
    assert measured["fake"]["setting"] == "priming.fake_form"
    assert ratio["held_bytes"] > 1.3
    assert ratio["peak_bytes"] > 1


def test_the_table_names_every_part(measured: dict) -> None:
    from vpae.bench.report import as_text

    text = as_text(measured)
    for word in ("one network evaluation", "NFE", "VAE", "priming", "equilibrium", "fake_form", "backbone", "skipped"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "everything"], "--parts everything"),
        (["--steps", "many"], "--steps many"),
        (["--batch-sizes", "0"], "at least 1"),
        (["--device", "cuda"], "no GPU is visible"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "--config", str(MICRO), "--random-weights", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_without_a_teacher_the_two_remedies_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["bench", "--config", str(MICRO), "--device", "cpu", "--parts", "vae", "--results", str(tmp_path)]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "vpae teacher" in message
    assert "--random-weights" in message


def test_live_bytes_counts_storages_once_and_forgets_the_dead() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as live:
        a = torch.zeros(1000)
        assert live.now == 4000
        views = [a[10:], a.view(10, 100), before[5:], before.add_(1)]
        assert live.now == 4000
        b = a + before
        assert (live.now, live.peak) == (8000, 8000)
        del a, b, views
        assert live.now == 0
        torch.zeros(500)
        assert (live.now, live.peak) == (0, 8000)


def test_live_bytes_follows_storages_that_change_their_size() -> None:
    """As FSDP's do, when it gathers a block's weights and lets go of them."""
    before = torch.zeros(1000)
    with LiveBytes() as live:
        a = torch.zeros(1000)
        a.untyped_storage().resize_(0)
        assert (live.now, live.peak) == (0, 4000)
        a.untyped_storage().resize_(8000)
        before.untyped_storage().resize_(12000)  # one that was there before
        assert (live.now, live.peak) == (20000, 20000)
        del a
        assert live.now == 12000
    before.untyped_storage().resize_(0)
    assert live.now == 12000


def test_stored_bytes_counts_shared_weights_once() -> None:
    a, b = torch.nn.Linear(10, 10), torch.nn.Linear(10, 10)
    b.weight = a.weight
    optimizer = torch.optim.AdamW(a.parameters())
    assert stored_bytes([*a.parameters(), *b.parameters()]) == 4 * (100 + 10 + 10)
    a(torch.randn(2, 10)).sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert stored_bytes(states) == 4 * (2 * 110 + 2)  # Adam's averages, and a step count for each weight


def test_random_weights_keep_norms_and_time_in_float32() -> None:
    network = Network(layers=2, heads=2, head_dim=12, ffn=32, text_dim=16, image_dim=16, freq_dim=16)
    model = random_transformer(network, CPU, torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes["blocks.0.ffn.net.2.weight"] == torch.bfloat16
    for name in ("blocks.0.norm2.weight", "scale_shift_table", "condition_embedder.time_embedder.linear_1.weight"):
        assert dtypes[name] == torch.float32
    assert model.rope.freqs_cos.dtype == torch.float32
    assert torch.equal(model.rope.freqs_cos, network.build("cpu").rope.freqs_cos)


@pytest.mark.parametrize("name", ["priming", "equilibrium"])
def test_what_is_timed_is_the_update_of_the_training_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    update = training.update
    monkeypatch.setattr(training, "update", lambda *given: called.append(given[1]) or update(*given))
    network = Network(layers=4, heads=2, head_dim=12, ffn=96, text_dim=16, image_dim=16, freq_dim=16)
    bench = Workbench(load(MICRO, environment=False).settings, name, network, Sequence(8, 32, 5), CPU)
    before = {turn: [p.clone() for p in role.parameters()] for turn, role in bench.phase.roles.items()}
    for turn in bench.phase.roles:
        bench.update(turn)
    assert called == list(bench.phase.roles) and update is loop.update
    for turn, role in bench.phase.roles.items():
        assert all(p.grad is None for p in role.parameters())
        assert any(not torch.equal(p, q) for p, q in zip(role.parameters(), before[turn], strict=True))


def test_the_peak_of_matrix_products_is_a_speed() -> None:
    assert 1e8 < matmul_peak(CPU, torch.float32) < 1e15


def planned(peak: float) -> Execution:
    return Execution({}, {}, {"generator": Turn(1, 1.0, 0.0, 0.0, peak)})


def test_what_does_not_fit_a_gpu_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type("Properties", (), {"total_memory": 80 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert "about 106 GB, and the GPU has 80 GB" in _too_large(planned(106e9), torch.device("cuda"))
    assert _too_large(planned(79e9), torch.device("cuda")) == _too_large(planned(106e9), CPU) == ""


def test_neither_of_two_is_measured_where_one_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "measure_phase", lambda *_, **__: pytest.fail("minutes for nothing"))
    monkeypatch.setattr(training, "execute", lambda *arguments: planned(1e9))
    monkeypatch.setattr(training, "_too_large", lambda *rest: "too large")
    source = load(ROOT / "configs" / "wan2.1-i2v-14b-480p-lora.yaml", environment=False)
    arguments = (Network(), Sequence(32760, 512, 257), CPU, 1)
    found = training.compare(source.settings, *COMPARISONS["fake"], *arguments)
    assert found["lora"]["skipped"] == found["copy"]["skipped"] == "too large"
    monkeypatch.setattr(training, "_too_large", lambda *rest: "")
    found = training.compare(source.settings, *COMPARISONS["discriminator"], *arguments)
    assert "student_lora avoids" in found["copy"]["skipped"] and "other" in found["ema"]["skipped"]
    assert "ratio" not in found


def test_a_phase_that_runs_out_of_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(training, "build_phase", exhausted)
    monkeypatch.setattr(training, "execute", lambda *arguments: planned(1e9))
    settings = load(MICRO, environment=False).settings
    found = training.measure_phase(settings, "priming", Network(), Sequence(80, 32, 5), CPU, 1)
    assert found == {"skipped": "out of memory: CUDA out of memory."}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: what is planned against what it takes there")
@pytest.mark.parametrize("phase", ["priming", "equilibrium"])
def test_on_a_gpu_a_phase_takes_the_memory_that_is_planned(phase: str) -> None:
    source = load(ROOT / "configs" / "wan2.1-i2v-14b-480p-lora.yaml", environment=False)
    network = replace(Network(), layers=8)  # of the real width, with clips of a quarter of the pixels
    geometry = source.settings.geometry.model_copy(update={"height": 240, "width": 416})
    settings = source.settings.model_copy(update={"geometry": geometry})
    config = settings.equilibrium.model_copy(update={"head": settings.equilibrium.head.model_copy(update={"taps": ()})})
    settings = settings.model_copy(update={"equilibrium": config})
    tokens = Sequence(prod(geometry.latent_shape) // 4, 512, 257)
    found = training.measure_phase(settings, phase, network, tokens, torch.device("cuda"), 1)
    assert found["planned_bytes"] == pytest.approx(found["peak_bytes"], rel=0.15)


def test_the_device_is_a_gpu_where_there_is_one() -> None:
    assert Options(("vae",)).place.type == ("cuda" if torch.cuda.is_available() else "cpu")
