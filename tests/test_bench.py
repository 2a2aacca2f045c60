"""`vpae bench` at tiny size: what it writes, and that its ratios say what the method is for. No absolute seconds."""

import json
from pathlib import Path

import pytest
import torch

from vpae.bench.live_bytes import LiveBytes
from vpae.bench.measure import held_bytes, matmul_peak
from vpae.bench.networks import random_transformer
from vpae.bench.run import Options
from vpae.bench.training import Workbench, _too_large, build_phase
from vpae.cli import main
from vpae.config import Training
from vpae.experiment import load
from vpae.planning.counting import Sequence
from vpae.planning.network import Network

ROOT = Path(__file__).parents[1]
MICRO = ROOT / "configs" / "micro.yaml"
CPU = torch.device("cpu")
# Wide and deep enough that the networks' work is what takes the time, small enough for seconds.
SIZES = [
    "teacher.transformer={heads: 2, head_dim: 48, layers: 8}",
    "geometry={frames: 17, height: 64, width: 64}",
    "samples.crf=20",
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One run of everything."""
    out = tmp_path_factory.mktemp("bench") / "tiny.json"
    arguments = ["bench", "--config", str(MICRO), "--random-weights", "--device", "cpu", "--steps", "1,50"]
    arguments += ["--attention", "native,flash", "--batch-sizes", "1,2", "--repeats", "2", "--out", str(out)]
    for size in SIZES:
        arguments += ["--set", size]
    assert main(arguments) == 0
    return json.loads(out.read_text())


def test_a_measurement_says_how_it_was_made(measured: dict) -> None:
    assert measured["device"]["type"] == "cpu"
    assert measured["device"]["name"]
    assert measured["packages"]["torch"] == torch.__version__
    assert measured["command"].split()[0] == "vpae"
    assert set(measured["code"]) >= {"commit", "dirty"}
    assert measured["options"]["random_weights"] is True


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


@pytest.mark.parametrize("phase", ["priming", "equilibrium"])
def test_a_step_is_the_sum_of_its_turns(phase: str, measured: dict) -> None:
    found = measured[phase]
    assert found["seconds_per_step"] == pytest.approx(
        sum(row["per_step"] * row["seconds"] for row in found["turns"].values())
    )
    assert found["peak_bytes"] == max(row["peak_bytes"] for row in found["turns"].values()) > found["held_bytes"] > 0
    assert 0 < found["utilisation"] < 1.5
    assert found["planned_bytes"] == pytest.approx(found["peak_bytes"], rel=0.25)  # few tokens: see test_plan


def test_a_trained_copy_as_discriminator_costs_time_and_memory(measured: dict) -> None:
    ratio = measured["discriminator"]["ratio"]
    assert measured["discriminator"]["setting"] == "equilibrium.backbone"
    assert ratio["held_bytes"] > 1.3  # the copy with Adam's averages: 3 more networks on 3 + 2
    assert ratio["peak_bytes"] > 1.3
    assert ratio["seconds_per_step"] > 1


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


def test_held_bytes_counts_shared_weights_once() -> None:
    a, b = torch.nn.Linear(10, 10), torch.nn.Linear(10, 10)
    b.weight = a.weight
    optimizer = torch.optim.AdamW(a.parameters())
    assert held_bytes([a, b]) == 4 * (100 + 10 + 10)
    a(torch.randn(2, 10)).sum().backward()
    optimizer.step()
    assert held_bytes([a], [optimizer]) == 4 * (3 * 110 + 2)  # Adam's averages, and a step count for each weight


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


def test_updates_do_what_the_training_loop_does(tmp_path: Path, accelerator) -> None:
    """The same losses move the same weights: what is timed is what trains."""
    from vpae.training import loop

    settings = load(MICRO, environment=False).settings
    network = Network(layers=4, heads=2, head_dim=12, ffn=96, text_dim=16, image_dim=16, freq_dim=16)
    tokens = Sequence(8, 32, 5)

    def phase():
        torch.manual_seed(0)
        return build_phase(settings, "priming", network, CPU)

    bench = Workbench(settings, phase(), network, tokens, CPU)
    bench.update("fake")
    bench.update("generator")
    assert all(p.grad is None for role in bench.phase.roles.values() for p in role.parameters())
    trained = phase()
    trained.turns = lambda step: ["fake", "generator"]
    loop.train(trained, lambda drawn: bench.batch, Training(steps=1, ema_decay=0.5), 0, tmp_path, accelerator)
    for name, role in trained.roles.items():
        start = dict(phase().roles[name].module.named_parameters())
        for (key, a), b in zip(
            role.module.named_parameters(), bench.phase.roles[name].module.parameters(), strict=True
        ):
            if ".attn2." in key and ("_q" in key or "_k" in key):
                continue  # with random weights captions are attended to evenly: these gradients may vanish by chance
            # Other noise, so other weights; but the same ones moved, and as far: Adam's first step is a full one.
            assert torch.equal(a, start[key]) == torch.equal(b, start[key]), key


def test_the_peak_of_matrix_products_is_a_speed() -> None:
    assert 1e8 < matmul_peak(CPU, torch.float32) < 1e15


def test_what_does_not_fit_a_gpu_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type("Properties", (), {"total_memory": 80 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    settings = load(ROOT / "configs" / "wan2.1-i2v-14b-480p.yaml", environment=False).settings
    reason = _too_large(settings, "equilibrium", Network(), Sequence(32760, 512, 257), torch.device("cuda"))
    assert "80 GB" in reason
    assert _too_large(settings, "equilibrium", Network(), Sequence(32760, 512, 257), CPU) == ""


def test_the_device_is_a_gpu_where_there_is_one() -> None:
    assert Options(("vae",)).place.type == ("cuda" if torch.cuda.is_available() else "cpu")
