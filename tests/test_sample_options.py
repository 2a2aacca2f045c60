"""Sampling where memory is short: every placement makes the same video, or nearly, and says what it saves."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from conftest import CAPTIONS, FRAMES, HEIGHT, SHIFT, WIDTH, build_transformer, one_step_by_diffusers, picture
from vpae import placement as placement_module
from vpae.artifacts import write_json
from vpae.cli import main
from vpae.config import Samples
from vpae.data.video import probe
from vpae.distill.student import save_student
from vpae.experiment import ConfigError
from vpae.models import formats as formats_module
from vpae.models.formats import Weight
from vpae.models.wan import GEOMETRY, decode_latents, load_pipeline
from vpae.out_of_memory import Sizes, advice, exhausted_memory
from vpae.placement import Placement, load_placed
from vpae.sampling import single
from vpae.sampling.single import animate
from vpae.sampling.stage import load_vae

NETWORKS = ("transformer", "text_encoder", "image_encoder", "vae")
ROOT = Path(__file__).parents[1]
SEED = 11


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's folder as the stage writes it, with its geometry."""
    folder = tmp_path_factory.mktemp("student") / "student"
    save_student(teacher, build_transformer(5), SHIFT, folder)
    write_json(folder / GEOMETRY, {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": 8.0})
    return folder


def video(pipeline: WanImageToVideoPipeline, image: Image.Image | None = None, steps: int = 1, seed: int = SEED):
    return animate(pipeline, image or picture(), CAPTIONS[0], steps, 1.0, seed, FRAMES).astype(int)


@pytest.fixture(scope="module")
def plain(student: Path) -> np.ndarray:
    """The student's video without any of the options."""
    return video(load_pipeline(student))


def weight_bytes(pipeline: WanImageToVideoPipeline) -> int:
    """What the weights really take; an int8 weight is a wrapper, which names the format that it computes in."""
    total = 0
    for network in NETWORKS:
        for weight in getattr(pipeline, network).parameters():
            parts = (weight.qdata, weight.scale) if hasattr(weight, "qdata") else (weight,)
            total += sum(part.numel() * part.element_size() for part in parts)
    return total


def assert_same(one: np.ndarray, other: np.ndarray) -> None:
    """The same video; weights at other addresses may round the last bit otherwise."""
    assert np.abs(one - other).max() <= 1 and (one == other).mean() > 0.99


# The same video.


def test_without_options_nothing_changes(student, plain):
    assert (video(load_placed(student, Placement(), "cpu")) == plain).all()


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_gives_the_same_video(student, plain, offload):
    pipeline = load_placed(student, Placement(offload=offload), "cpu")
    if offload == "model":
        assert len(pipeline._all_hooks) == len(NETWORKS)
    else:
        assert all(_is_group_offload_enabled(block) for block in pipeline.transformer.blocks)
    assert_same(video(pipeline), plain)
    assert_same(video(pipeline), plain)  # and once more, after everything was moved away


def test_bfloat16_is_what_plain_diffusers_makes_of_it(student, plain, monkeypatch):
    """All is the same to the last bit but one cast: diffusers rounds what its scheduler returns to bfloat16."""
    drawn = []
    monkeypatch.setattr(single, "decode_latents", lambda vae, x: drawn.append(x) or decode_latents(vae, x))
    pipeline = load_placed(student, Placement(dtype="bfloat16"), "cpu")
    frames = video(pipeline)
    precision = {"default": torch.bfloat16, "vae": torch.float32, "image_encoder": torch.float32}
    theirs = WanImageToVideoPipeline.from_pretrained(student, torch_dtype=precision)
    latents = one_step_by_diffusers(theirs, SEED, output_type="latent")
    assert drawn[0].dtype == torch.float32 and latents.dtype == torch.bfloat16
    spacing = torch.finfo(torch.bfloat16).eps * torch.exp2(latents.float().abs().log2().floor())
    assert ((drawn[0][0] - latents.float()).abs() <= spacing / 2).all()
    decoded = decode_latents(pipeline.vae, latents[None].float())[0].numpy().astype(int)
    assert_same(decoded, np.rint(one_step_by_diffusers(theirs, SEED) * 255))
    assert 0 < np.abs(frames - plain).mean() < 2


@pytest.fixture(scope="module")
def another(student: Path, plain: np.ndarray) -> float:
    """How far apart two different videos are: mean absolute difference of their pixels."""
    return float(np.abs(video(load_pipeline(student), seed=SEED + 1) - plain).mean())


@pytest.mark.parametrize(
    ("quantize", "offload"), [("int8", "none"), ("int8", "model"), ("fp8", "none"), ("fp8", "model"), ("fp8", "group")]
)
def test_eight_bits_give_nearly_the_same_video_in_the_memory_that_is_promised(
    student, plain, another, quantize, offload
):
    if quantize == "int8":
        pytest.importorskip("torchao")
    pipeline = load_placed(student, Placement(offload=offload, quantize=quantize), "cpu")
    assert weight_bytes(pipeline) == Sizes.of(student).resident_bytes(Placement(quantize=quantize))
    error = np.abs(video(pipeline) - plain).mean()
    assert 0 < error < (0.05 if quantize == "int8" else 0.2) * another


def test_eight_bits_without_their_library_say_what_to_install(student, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    monkeypatch.setattr(placement_module, "load_pipeline", lambda *_: pytest.fail("that takes minutes at 14B"))
    with pytest.raises(ConfigError, match=r"pip install.*quantize.*or take --quantize fp8"):
        load_placed(student, Placement(quantize="int8"), "cpu")


def test_tiles_give_nearly_the_same_video(teacher):
    image = picture(2, 18).resize((288, 32), Image.Resampling.BICUBIC)
    whole, tiled = (video(load_placed(teacher, Placement(tile=tile), "cpu"), image) for tile in (False, True))
    assert whole.shape == tiled.shape == (FRAMES, 32, 288, 3)
    difference = np.abs(whole - tiled).mean()
    assert 0 < difference < 0.1 * np.abs(whole - whole.mean()).mean()


class SmallGpu:
    """Has a VAE's encoder or decoder run out of memory on anything larger than a tile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, part: str):
        self.refused, original = 0, getattr(AutoencoderKLWan, part)

        def limited(vae: AutoencoderKLWan, *arguments, **options):
            if not vae.use_tiling:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(vae, *arguments, **options)

        monkeypatch.setattr(AutoencoderKLWan, part, limited)


@pytest.mark.parametrize("part", ["_encode", "_decode"])
def test_where_memory_is_short_the_vae_goes_on_in_tiles(teacher, tmp_path, monkeypatch, capsys, part):
    frames = tmp_path / "frames.npy"
    command = arguments(teacher, tmp_path, "--num-frames", str(FRAMES), "--frames", str(frames))
    picture(2, 18).resize((288, 32), Image.Resampling.BICUBIC).save(tmp_path / "first.png")
    assert main([*command, "--no-tile"]) == 0
    whole = np.load(frames).astype(int)
    gpu = SmallGpu(monkeypatch, part)
    assert main(command) == 0 and gpu.refused == 1
    assert "goes on in tiles" in capsys.readouterr().err
    assert 0 < np.abs(np.load(frames) - whole).mean() < 0.1 * np.abs(whole - whole.mean()).mean()


def test_the_stages_decode_in_tiles_only_if_their_settings_say_so(teacher):
    assert not load_vae(teacher, Samples()).use_tiling and load_vae(teacher, Samples(vae_tiles=True)).use_tiling


def test_tiles_that_are_refused_are_advised(teacher, tmp_path, monkeypatch, capsys):
    gpu, command = SmallGpu(monkeypatch, "_decode"), arguments(teacher, tmp_path, "--num-frames", str(FRAMES))
    picture(2, 18).resize((288, 32), Image.Resampling.BICUBIC).save(tmp_path / "first.png")
    assert main([*command, "--no-tile"]) == 2 and gpu.refused == 1
    assert "--tile " in capsys.readouterr().err
    assert not (tmp_path / "clip.mp4").exists()


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_compiled_blocks_give_the_same_video(student, quantize):
    if quantize == "int8":
        pytest.importorskip("torchao")
    expected = video(load_placed(student, Placement(quantize=quantize), "cpu"), steps=2)
    compiled = load_placed(student, Placement(quantize=quantize, compile=True), "cpu", backend="eager")
    assert all(block._compiled_call_impl is not None for block in compiled.transformer.blocks)
    assert_same(video(compiled, steps=2), expected)


def test_large_models_are_sampled_in_bfloat16_unless_told_otherwise(student, monkeypatch):
    assert Placement().formats(student)["transformer"] == torch.float32
    monkeypatch.setattr(formats_module, "LARGE", 1000)
    assert Placement().formats(student)["transformer"] == torch.bfloat16
    assert Placement(dtype="float32").formats(student)["transformer"] == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        {"offload": "group", "quantize": "int8"},
        {"offload": "group", "quantize": "fp8-compute"},
        {"offload": "group", "compile": True},
        {"quantize": "fp8", "compile": True},
    ],
)
def test_options_that_exclude_each_other_are_refused(options):
    with pytest.raises(ConfigError, match=r"take|leave"):
        Placement(**options)


@pytest.mark.parametrize("channels", [False, True])
def test_a_vae_in_bfloat16_and_another_layout_gives_nearly_the_same_video(student, plain, another, channels):
    placed = load_placed(student, Placement(vae_dtype="bfloat16", channels_last=channels), "cpu")
    assert placed.vae.dtype == torch.bfloat16 and placed.transformer.dtype == torch.float32
    assert 0 < np.abs(video(placed) - plain).mean() < 0.2 * another
    assert weight_bytes(placed) == Sizes.of(student).resident_bytes(Placement(vae_dtype="bfloat16"))


def test_another_memory_layout_alone_changes_no_result(student, plain):
    placed = load_placed(student, Placement(channels_last=True), "cpu")
    assert placed.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert_same(video(placed), plain)


def test_products_in_float8_say_what_they_need_before_anything_is_loaded(student, monkeypatch):
    monkeypatch.setattr(placement_module, "load_pipeline", lambda *_: pytest.fail("that takes minutes at 14B"))
    with pytest.raises(ConfigError, match=r"--quantize fp8-compute needs .*take --quantize fp8"):
        load_placed(student, Placement(quantize="fp8-compute"), "cpu")


def test_blocks_are_compiled_where_it_pays_unless_told_otherwise(student, monkeypatch):
    compiled = []
    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", lambda *_, **__: compiled.append(1))
    monkeypatch.setattr(placement_module, "compiling_pays", lambda _model, _device, evaluations: evaluations >= 30)
    for placement, evaluations, expected in (
        (Placement(), 1, 0),
        (Placement(), 100, 1),
        (Placement(compile=False), 100, 0),
        (Placement(quantize="fp8"), 100, 0),
        (Placement(compile=True), 1, 1),
    ):
        compiled.clear()
        load_placed(student, placement, "cpu", evaluations=evaluations)
        assert len(compiled) == expected, placement
    monkeypatch.undo()
    large = torch.nn.Linear(2, 2)
    monkeypatch.setattr(placement_module, "LARGE", 6)
    assert placement_module.compiling_pays(large, "cuda", 30)
    assert not placement_module.compiling_pays(large, "cuda", 29)
    assert not placement_module.compiling_pays(large, "cpu", 1000)
    assert not placement_module.compiling_pays(torch.nn.Linear(1, 1), "cuda", 1000)


# Out of memory.


def arguments(student: Path, folder: Path, *more: str) -> list[str]:
    picture().save(folder / "first.png")
    found = ["sample", "--model", student, "--image", folder / "first.png", "--prompt", "x", "--seed", SEED]
    return [str(a) for a in [*found, "--out", folder / "clip.mp4", *more]]


def exhausted_gpu(*_args, **_kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.25 GiB.\nmore")


def exhausted_machine(*_args, **_kwargs):
    torch.empty(2**60)


def test_a_gpu_out_of_memory_gets_advice_in_order_with_estimates(student, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vpae.models.wan.velocity", exhausted_gpu)
    assert main(arguments(student, tmp_path)) == 2
    text = capsys.readouterr().err
    switches = [line.split("  ")[1] for line in text.splitlines() if line.startswith("  --")]
    assert switches == [
        "--dtype bfloat16",
        "--offload model",
        "--quantize fp8",
        "--offload group",
        "--num-frames",
    ]
    assert "CUDA out of memory. Tried to allocate 1.25 GiB." in text and "more" not in text
    assert not (tmp_path / "clip.mp4").exists()


def test_a_machine_out_of_memory_is_not_told_to_offload(student, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vpae.models.wan.velocity", exhausted_machine)
    assert main(arguments(student, tmp_path, "--offload", "model")) == 2
    text = capsys.readouterr().err
    assert "--dtype bfloat16" in text and "--num-frames" in text
    assert "--offload" not in text and "--quantize" not in text


def test_other_errors_pass(student, tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("vpae.models.wan.velocity", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        main(arguments(student, tmp_path))


def test_what_each_offloading_keeps_is_counted_from_the_networks_themselves(student):
    pipeline, sizes = load_pipeline(student), Sizes.of(student)

    def weigh(module: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    whole = {name: weigh(getattr(pipeline, name)) for name in NETWORKS}
    blocks = [weigh(block) for block in pipeline.transformer.blocks]
    layers = {
        name: max(sum(p.numel() * p.element_size() for p in m.parameters(recurse=False)) for m in network.modules())
        for name, network in pipeline.components.items()
        if name in NETWORKS
    }
    assert sizes.resident_bytes(Placement()) == sum(whole.values())
    assert sizes.resident_bytes(Placement(offload="model")) == max(whole.values())
    transformer = whole["transformer"] - sum(blocks) + max(blocks)
    expected = whole["vae"] + max(transformer, layers["text_encoder"], layers["image_encoder"])
    assert sizes.resident_bytes(Placement(offload="group")) == expected
    assert sizes.resident_bytes(Placement(dtype="bfloat16")) == sum(
        size // (2 if name in ("transformer", "text_encoder") else 1) for name, size in whole.items()
    )


@pytest.fixture(scope="module")
def sizes_14b() -> Sizes:
    """Wan2.1-I2V-14B, by its networks' shapes."""
    with torch.device("meta"):
        networks = {
            "transformer": WanTransformer3DModel(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
            "text_encoder": UMT5EncoderModel(
                UMT5Config(
                    vocab_size=256384,
                    d_model=4096,
                    d_ff=10240,
                    num_layers=24,
                    num_heads=64,
                    feed_forward_proj="gated-gelu",
                )
            ),
            "image_encoder": CLIPVisionModel(
                CLIPVisionConfig(
                    hidden_size=1280,
                    intermediate_size=5120,
                    num_hidden_layers=32,
                    num_attention_heads=16,
                    patch_size=14,
                )
            ),
            "vae": AutoencoderKLWan(),
        }
    shapes = {
        network: {
            name: Weight(tuple(p.shape), torch.float32)
            for name, p in module.named_parameters()
            if not name.endswith("embed_tokens.weight")  # the text encoder's, which is stored once, as `shared`
        }
        for network, module in networks.items()
    }
    large = dict.fromkeys(("transformer", "text_encoder"), torch.bfloat16)
    return Sizes(shapes, large | dict.fromkeys(("image_encoder", "vae"), torch.float32))


def test_the_documented_sizes_of_the_14b_model_are_those_of_its_networks(sizes_14b):
    table = (ROOT / "docs" / "export.md").read_text()
    for name, placement in (
        ("`--dtype float32`", Placement(dtype="float32")),
        ("`--dtype bfloat16`", Placement(dtype="bfloat16")),
        ("with `--quantize int8`", Placement(quantize="int8")),
        ("with `--quantize fp8`", Placement(quantize="fp8")),
    ):
        kinds = ("none", "model") if placement.quantize == "int8" else ("none", "model", "group")
        cells = [f"{sizes_14b.resident_bytes(replace(placement, offload=kind)) / 1e9:.1f}" for kind in kinds]
        assert f"| {' | '.join([name, *cells])} |" in table


def test_advice_leaves_out_what_is_on_already_and_counts_tiles(student):
    sizes = Sizes.of(student)
    whole = Placement(dtype="bfloat16", offload="group", quantize="fp8", tile=False)
    text = advice(sizes, whole, "a GPU", True, 81, 480, 832)
    assert "6.1 times smaller" in text  # 480 x 832 / 256²
    assert "--dtype" not in text
    assert "--offload" not in text and "--quantize" not in text
    everything = Placement("group", "fp8", tile=None, dtype="bfloat16")
    assert "every switch is on already" in advice(sizes, everything, "a GPU", True, 81, 480, 832)
    # Only where a GPU's memory ends are tiles tried by default.
    assert "--tile" in advice(sizes, Placement(), "this machine", False, 81, 480, 832)


def test_advice_names_what_group_offloading_excludes(sizes_14b):
    placement = Placement("model", "int8", tile=True, compile=True)
    text = advice(sizes_14b, placement, "a GPU", True, 81, 480, 832)
    assert "--offload group without --compile without --quantize saves 14.0 GB" in text


def test_libraries_of_the_gpu_have_their_own_words_for_it():
    failed = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert exhausted_memory(failed) == "gpu"
    assert exhausted_memory(MemoryError()) == "machine" and exhausted_memory(RuntimeError("shapes")) is None


# The command.


def test_the_command_takes_the_options(student, tmp_path, plain):
    options = ["--offload", "group", "--quantize", "fp8", "--tile", "--dtype", "bfloat16"]
    assert main(arguments(student, tmp_path, *options, "--frames", str(tmp_path / "frames.npy"))) == 0
    assert probe(tmp_path / "clip.mp4").fps == 8  # what the model was made for
    assert np.load(tmp_path / "frames.npy").shape == plain.shape
    more = ["--frames", str(tmp_path / "o" / "frames.NPY"), "--guidance", "3"]
    assert main(arguments(student, tmp_path, *more)) == 0
    empty = np.load(tmp_path / "o" / "frames.NPY")
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["frames.NPY"]
    assert main(arguments(student, tmp_path, *more, "--negative-prompt", "a large red circle")) == 0
    assert (np.load(tmp_path / "o" / "frames.NPY") != empty).any()


@pytest.mark.parametrize("options", [("--num-frames", "4097"), ("--negative-prompt", "blurred")])
def test_options_that_would_do_nothing_or_nothing_good_are_refused(student, tmp_path, capsys, options):
    assert main(arguments(student, tmp_path, *options)) == 2
    assert options[0] in capsys.readouterr().err and not (tmp_path / "clip.mp4").exists()


def test_a_size_that_the_model_cannot_take_is_refused_before_it_is_loaded(teacher, tmp_path, capsys):
    command = arguments(teacher, tmp_path)
    picture(40, 33).save(tmp_path / "first.png")
    assert main(command) == 2
    assert "33 x 40 pixels" in capsys.readouterr().err
