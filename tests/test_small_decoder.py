"""taew2.1 in the VAE's place: the published names and shapes, causal frames, and the way through sampling."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conftest import CAPTIONS, FRAMES, HEIGHT, SHIFT, WIDTH, build_transformer, picture, seeded
from vpae.artifacts import ArtifactError, write_json
from vpae.cli import main
from vpae.distill.student import save_student
from vpae.experiment import load
from vpae.graph import fingerprint
from vpae.models.small_decoder import SmallDecoder, load_small_decoder
from vpae.models.wan import GEOMETRY, decode_latents, load_pipeline
from vpae.planning.presence import missing
from vpae.sampling.single import animate
from vpae.stages import run_stage
from vpae.standing import standing

ROOT = Path(__file__).parents[1]


def published(rows_of_first_growth: int = 256) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the decoder's weights in taew2_1.pth, as its source builds them (layers by number)."""
    found = {"decoder.1.weight": (256, 16, 3, 3), "decoder.1.bias": (256,)}
    for first, width in ((3, 256), (9, 128), (15, 64)):
        for layer in range(first, first + 3):
            for number, fan in ((0, 2 * width), (2, width), (4, width)):
                found[f"decoder.{layer}.conv.{number}.weight"] = (width, fan, 3, 3)
                found[f"decoder.{layer}.conv.{number}.bias"] = (width,)
    for layer, rows, width in ((7, rows_of_first_growth, 256), (13, 256, 128), (19, 128, 64)):
        found[f"decoder.{layer}.conv.weight"] = (rows, width, 1, 1)
    for layer, width, after in ((8, 256, 128), (14, 128, 64), (20, 64, 64)):
        found[f"decoder.{layer}.weight"] = (after, width, 3, 3)
    return found | {"decoder.22.weight": (3, 64, 3, 3), "decoder.22.bias": (3,)}


def weights(**other: int) -> dict[str, Tensor]:
    """Random ones under the published names, and some of the encoder's, which the file has too."""

    def draw() -> dict[str, Tensor]:
        def one(shape: tuple[int, ...]) -> Tensor:
            fan = shape[1:].numel() if isinstance(shape, torch.Size) else int(np.prod(shape[1:]))
            return torch.randn(shape) / max(1, fan) ** 0.5

        found = {name: one(shape) for name, shape in published(**other).items()}
        return found | {"encoder.0.weight": torch.randn(64, 3, 3, 3), "encoder.0.bias": torch.zeros(64)}

    return seeded(0, draw)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder") / "taew2_1.safetensors"
    save_file(weights(), path)
    return path


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return seeded(1, lambda: torch.randn(2, 16, 3, 4, 4))


def by_definition(w: dict[str, Tensor], x_CFHW: Tensor) -> Tensor:
    """The published network's arithmetic written out, all times of one video at once: (T, 3, 8 H, 8 W) in [0, 1]."""

    def convolve(x: Tensor, name: str) -> Tensor:
        weight = w[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, w.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    x = F.relu(convolve(torch.tanh(x_CFHW.transpose(0, 1) / 3) * 3, "1"))  # times are the batch
    for first in (3, 9, 15):
        for layer in range(first, first + 3):
            past = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            inner = F.relu(convolve(torch.cat([x, past], dim=1), f"{layer}.conv.0"))
            inner = convolve(F.relu(convolve(inner, f"{layer}.conv.2")), f"{layer}.conv.4")
            x = F.relu(inner + x)
        channels = x.shape[1]
        x = convolve(F.interpolate(x, scale_factor=2), f"{first + 4}.conv")
        x = convolve(x.reshape(-1, channels, *x.shape[2:]), f"{first + 5}")
    return convolve(F.relu(x), "22")[3:].clamp(0, 1)


def test_names_and_shapes_are_the_published_file_s():
    assert {name: tuple(value.shape) for name, value in SmallDecoder().state_dict().items()} == published()


def test_it_computes_what_the_published_network_does_a_latent_frame_at_a_time(file, latents):
    decoded = load_small_decoder(file).decode(latents)
    assert decoded.shape == (2, 3, 9, 32, 32)
    for video, x in zip(decoded, latents, strict=True):
        expected = by_definition(weights(), x)
        assert expected.std() > 0.05 and torch.allclose(video.transpose(0, 1), expected, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_f_latent_frames_make_four_f_less_three(file, frames):
    assert load_small_decoder(file).decode(torch.zeros(1, 16, frames, 2, 2)).shape == (1, 3, 4 * frames - 3, 16, 16)


def test_no_frame_sees_a_later_latent(file, latents):
    decoder, other = load_small_decoder(file), latents.clone()
    other[:, :, 2] += 1
    one, two = decoder.decode(latents), decoder.decode(other)
    assert torch.equal(one[:, :, :5], two[:, :, :5]) and not torch.equal(one[:, :, 5], two[:, :, 5])
    assert torch.equal(decoder.decode(latents[:, :, :1]), one[:, :, :1])  # nothing is remembered from call to call


def test_pickled_weights_load_and_of_several_frames_the_last_is_taken(tmp_path, latents):
    several = weights(rows_of_first_growth=512)
    torch.save(several, tmp_path / "taew2_1.pth")
    found = load_small_decoder(tmp_path / "taew2_1.pth").state_dict()
    assert torch.equal(found["decoder.7.conv.weight"], several["decoder.7.conv.weight"][256:])


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("sprung"),))


def test_a_wrong_file_is_refused_by_what_is_missing_and_too_many(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = weights()
    wrong["decoder.23.weight"] = wrong.pop("decoder.22.weight")
    wrong["decoder.1.weight"] = torch.zeros(256, 48, 3, 3)  # taew2.2's
    save_file(wrong, "wrong.safetensors")
    torch.save({**weights(), "decoder.trap": Trap()}, "trap.pth")
    save_file({"a": torch.zeros(1)}, "another.safetensors")
    Path("cut.safetensors").write_bytes(b"short")
    Path("other.bin").write_bytes(b"")
    for name, said in {
        "wrong.safetensors": (
            'Missing key(s) in state_dict: "decoder.22.weight"',
            '"decoder.23.weight"',
            "[256, 48, 3, 3]",
        ),
        "another.safetensors": ("It holds a, which are none of its weights", "Missing key(s)"),
        "trap.pth": ("damaged, or no file of weights",),
        "cut.safetensors": ("damaged, or no file of weights",),
        "other.bin": (".safetensors or .pth",),
        "none.safetensors": ("there is no such file",),
    }.items():
        with pytest.raises(ArtifactError, match=name) as caught:
            load_small_decoder(name)
        assert all(words in str(caught.value) for words in said), caught.value
    assert not Path("sprung").exists()


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "student"
    save_student(teacher, build_transformer(5), SHIFT, folder)
    write_json(folder / GEOMETRY, {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": 8.0})
    return folder


def test_sample_decodes_the_same_latents_by_it(student, file, tmp_path, capsys):
    picture().save(tmp_path / "first.png")
    command = ["sample", "--model", str(student), "--image", str(tmp_path / "first.png"), "--prompt", CAPTIONS[0]]
    command += ["--out", str(tmp_path / "clip.mp4"), "--frames", str(tmp_path / "clip.npy")]
    assert main([*command, "--decoder", str(file)]) == 0
    frames = np.load(tmp_path / "clip.npy")
    pipeline = load_pipeline(student)
    assert (frames == animate(pipeline, picture(), CAPTIONS[0], 1, 1.0, 0, FRAMES, load_small_decoder(file))).all()
    assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3) and frames.std() > 10
    (tmp_path / "clip.mp4").unlink()
    assert main([*command, "--decoder", str(tmp_path / "none.pth"), "--steps", "0"]) == 2
    assert not (tmp_path / "clip.mp4").exists()
    printed = capsys.readouterr().err
    assert "--decoder" in printed and "--steps 0" in printed


@pytest.fixture(scope="module")
def experiment(teacher: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    tree = {
        "geometry": {"frames": 5, "height": 32, "width": 32, "fps": 8},
        "clips": {"source": "world", "train": 4, "held_out": 4, "workers": 1},
        "teacher": {"source": "folder", "path": str(teacher)},
        "methods": [],
        "samples": {"rows": {"teacher-1nfe": {"model": "teacher", "steps": 1}}, "count": 4, "decode": 2},
        "evaluation": {"bootstrap": 20, "latency_repeats": 1, "vbench": {"backbones": "off"}},
    }
    (folder / "plain.yaml").write_text(yaml.safe_dump(tree))
    own = folder / "small.safetensors"
    own.write_bytes(file.read_bytes())
    (folder / "small.yaml").write_text(yaml.safe_dump({"extends": "plain", "samples": {"decoder": str(own)}}))
    return folder


@pytest.mark.slow
def test_the_stage_decodes_every_row_by_it_and_is_stale_when_the_file_changes(experiment, file):
    results, source = experiment / "results", load(experiment / "small.yaml")
    for stage in ("clips", "teacher", "latents", "samples", "evaluation"):
        run_stage(source, stage, results)
    assert not (results / "plain" / "samples").exists() and (results / "plain" / "latents").exists()
    plain = load(experiment / "plain.yaml")
    run_stage(plain, "samples", results)
    for row in ("real", "teacher-1nfe"):
        one, other = (results / name / "samples" / row for name in ("small", "plain"))
        name = min(other.glob("*.mp4")).name
        assert (one / name).read_bytes() != (other / name).read_bytes()
        assert (one / "latents.safetensors").read_bytes() == (other / "latents.safetensors").read_bytes()
    assert standing(source, results)["samples"]
    changed = weights()
    changed["decoder.22.bias"] += 1
    save_file(changed, source.settings.samples.decoder)
    assert not standing(source, results)["samples"] and standing(source, results)["latents"]


def test_without_it_nothing_changes_and_a_missing_file_is_named_before_any_job(experiment, tmp_path):
    plain = load(experiment / "plain.yaml").settings
    assert "decoder" not in str(fingerprint(plain, "samples"))
    overrides = [f"samples.decoder={tmp_path}/none.pth"]
    problems = missing(load(experiment / "plain.yaml", overrides))
    assert len(problems) == 1 and "samples.decoder" in problems[0] and "no such file" in problems[0]


@pytest.mark.slow
def test_it_takes_a_twentieth_of_the_operations():
    """The figures of docs/export.md: 81 frames of 832 x 480 pixels, on tensors without memory.

    Each latent frame after the second takes what the one before it takes.
    """
    with torch.device("meta"):
        networks = {"small": SmallDecoder(), "VAE": AutoencoderKLWan()}

    def operations(network: torch.nn.Module, frames: int) -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.decode(torch.empty(1, 16, frames, 60, 104, device="meta"))
        return counter.get_total_flops() / 1e12

    found = {}
    for name, network in networks.items():
        two, three, four = (operations(network, frames) for frames in (2, 3, 4))
        assert four - three == pytest.approx(three - two, rel=1e-6)
        found[name] = two + 19 * (three - two)
    assert found == pytest.approx({"small": 11.43, "VAE": 275.4}, rel=1e-3)


@pytest.mark.slow
def test_a_decoder_follows_the_video_s_own_device_and_format(file, latents):
    half = decode_latents(load_small_decoder(file, torch.bfloat16), latents).int()
    whole = decode_latents(load_small_decoder(file), latents).int()
    assert half.shape == (2, 9, 32, 32, 3) and 0 < (half - whole).abs().float().mean() < 3
