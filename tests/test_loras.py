"""LoRAs of users: merged at their true strength, into a student or a teacher, or refused by the layer's name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import FRAMES, HEIGHT, SHIFT, WIDTH, picture
from vpae import placement
from vpae.artifacts import ArtifactError, read_provenance
from vpae.cli import main
from vpae.config.teacher import file_and_strength
from vpae.experiment import ConfigError, load
from vpae.export.keys import to_original
from vpae.graph import stage_settings
from vpae.models.loras import merge_loras, read_loras, require_fit
from vpae.models.wan import load_pipeline, load_sampler, load_transformer
from vpae.planning.presence import missing_teacher
from vpae.stages import run_stage
from vpae.standing import problems, standing

MODULE, WAN = "blocks.1.attn1.to_q", "blocks.1.self_attn.q"
RANK, ALPHA, STRENGTH = 4, 3.0, 0.7


def shape_of(teacher: Path, name: str = MODULE) -> tuple[int, ...]:
    return tuple(load_transformer(teacher, torch.float32).state_dict()[f"{name}.weight"].shape)


def write_lora(
    path: Path, shape: tuple[int, ...], module: str = WAN, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A LoRA as ComfyUI's trainers write it, with alpha of its own; returns B and A."""
    rng = torch.Generator().manual_seed(seed)
    up, down = torch.randn(shape[0], RANK, generator=rng), torch.randn(RANK, shape[1], generator=rng)
    up, down = up.to(dtype), down.to(dtype)
    name = f"diffusion_model.{module}"
    parts = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(ALPHA)}
    save_file(parts, path)
    return up, down


@pytest.mark.parametrize(
    ("named", "file", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        ("C: my:lora.safetensors", "C: my:lora.safetensors", 1.0),
        ("C: my:2:lora.safetensors:2", "C: my:2:lora.safetensors", 2.0),
        ("a.safetensors:nan", "a.safetensors:nan", 1.0),
    ],
)
def test_only_a_number_after_the_last_colon_is_a_strength(named: str, file: str, strength: float) -> None:
    assert file_and_strength(named) == (Path(file), strength)


@pytest.mark.parametrize(("strength", "dtype"), [(STRENGTH, torch.float32), (-1.0, torch.bfloat16)])
def test_a_merged_weight_is_w_plus_strength_times_alpha_by_rank_times_b_a(
    teacher: Path, tmp_path: Path, strength: float, dtype: torch.dtype
) -> None:
    up, down = write_lora(tmp_path / "my:lora.safetensors", shape_of(teacher), dtype=dtype)
    network = load_transformer(teacher, torch.float32)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    merge_loras(network, read_loras([f"{tmp_path}/my:lora.safetensors:{strength}"], teacher))
    after = network.state_dict()
    change = strength * ALPHA / RANK * up.double() @ down.double()
    assert (after[f"{MODULE}.weight"] - (before[f"{MODULE}.weight"].double() + change)).abs().max() < 1e-6
    assert all(torch.equal(after[name], before[name]) for name in before if name != f"{MODULE}.weight")


@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_names_with_underscores_for_dots_are_resolved_by_the_models_own_modules(
    teacher: Path, tmp_path: Path, names: str
) -> None:
    """kohya's form, of every linear layer at once: each weight becomes W + strength x alpha / rank x B A, by itself."""
    network, tensors, wanted = load_transformer(teacher, torch.float32), {}, {}
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert {"blocks.0.attn2.add_k_proj", "condition_embedder.time_proj", "blocks.3.ffn.net.0.proj"} <= linear.keys()
    for seed, (name, module) in enumerate(linear.items()):
        rng, (out, into) = torch.Generator().manual_seed(seed), module.weight.shape
        up, down = torch.randn(out, RANK, generator=rng), torch.randn(RANK, into, generator=rng)
        key = f"lora_unet_{(to_original(name) if names == 'original' else name).replace('.', '_')}"
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(ALPHA)}
        change = STRENGTH * ALPHA / RANK * up.double() @ down.double()
        wanted[f"{name}.weight"] = module.weight.double() + change
    assert len(tensors) == 3 * len(linear), "no two modules have one name"
    save_file(tensors, tmp_path / "kohya.safetensors")
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    merge_loras(network, read_loras([f"{tmp_path}/kohya.safetensors:{STRENGTH}"], teacher))
    for name, weight in network.state_dict().items():
        if name in wanted:
            assert (weight - wanted[name]).abs().max() < 1e-5, name
        else:
            assert torch.equal(weight, before[name]), name


def test_several_loras_add_up_and_strength_zero_changes_no_bit(teacher: Path, tmp_path: Path) -> None:
    made = [write_lora(tmp_path / f"{n}.safetensors", shape_of(teacher), seed=n) for n in range(3)]
    network = load_transformer(teacher, torch.float32)
    network.get_parameter(f"{MODULE}.weight").data[0, 0] = -0.0
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    merge_loras(network, read_loras([f"{tmp_path}/0.safetensors:0"], teacher))
    bits = lambda weight: weight.view(torch.int32)  # noqa: E731, -0.0 == 0.0
    assert all(torch.equal(bits(weight), bits(before[name])) for name, weight in network.state_dict().items())
    merge_loras(network, read_loras([f"{tmp_path}/1.safetensors:0.5", f"{tmp_path}/2.safetensors"], teacher))
    change = ALPHA / RANK * (0.5 * made[1][0] @ made[1][1] + made[2][0] @ made[2][1])
    assert torch.allclose(network.get_parameter(f"{MODULE}.weight"), before[f"{MODULE}.weight"] + change, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "diffusers", "said"),
    [
        ("blocks.77.self_attn.q", "", r"blocks\.77\.attn1\.to_q, which the model does not have"),
        ("blocks.1.self_attn.nothing", "", r"self_attn\.nothing, which the model does not have"),
        (WAN, "wider", r"blocks\.1\.attn1\.to_q of \d+ x \d+, which the model has as"),
        ("patch_embedding", "wider", r"patch_embedding of .* which the model has as"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1", ""),
        ("head.head", "proj_out", ""),
    ],
)
def test_layers_that_the_model_does_not_have_are_refused_by_name_from_headers(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, diffusers: str, said: str
) -> None:
    square = shape_of(teacher)
    shape = shape_of(teacher, diffusers) if diffusers and not said else (square[0] + (diffusers == "wider"), square[1])
    write_lora(tmp_path / "lora.safetensors", shape, module)
    monkeypatch.setattr("vpae.export.lora.safe_open", None)  # no weight is read
    if not said:
        require_fit(tmp_path / "lora.safetensors", teacher)
        return
    with pytest.raises(ArtifactError, match=said):
        require_fit(tmp_path / "lora.safetensors", teacher)


def test_a_lora_with_values_that_are_no_numbers_is_refused(teacher: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "lora.safetensors", shape_of(teacher))
    tensors = load_file(tmp_path / "lora.safetensors")
    tensors[f"diffusion_model.{WAN}.lora_down.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ArtifactError, match="not finite"):
        read_loras([str(tmp_path / "lora.safetensors")], teacher)


def sampled(model: Path, folder: Path, *more: str) -> np.ndarray:
    picture().save(folder / "first.png")
    command = ["sample", "--model", model, "--image", folder / "first.png", "--prompt", "x", "--num-frames", FRAMES]
    found = folder / "frames.npy"
    assert main([str(word) for word in [*command, "--out", folder / "x.mp4", "--frames", found, *more]]) == 0
    return np.load(found)


def test_a_sample_with_a_lora_is_the_merged_folder_s(teacher: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    up, down = write_lora(lora, shape_of(teacher))
    shutil.copytree(teacher, tmp_path / "merged")
    weights = tmp_path / "merged" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors[f"{MODULE}.weight"] += STRENGTH * ALPHA / RANK * up @ down
    save_file(tensors, weights, {"format": "pt"})
    with_lora = sampled(teacher, tmp_path, "--lora", f"{lora}:{STRENGTH}")
    expected = sampled(tmp_path / "merged", tmp_path)
    assert np.abs(with_lora.astype(int) - expected).max() <= 1  # a last digit may round a colour the other way
    assert np.abs(with_lora.astype(int) - sampled(teacher, tmp_path)).max() > 1


def test_sample_refuses_every_lora_that_does_not_fit_before_it_loads(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(placement, "load_pipeline", lambda *_, **__: pytest.fail("a network was loaded"))
    write_lora(tmp_path / "other.safetensors", (8, 8), "blocks.77.ffn.0")
    picture().save(tmp_path / "first.png")
    command = ["sample", "--model", teacher, "--image", tmp_path / "first.png", "--prompt", "x", "--num-frames", FRAMES]
    loras = ["--lora", tmp_path / "other.safetensors", "--lora", "none.safetensors:0.5", "--lora", "x:1e999"]
    assert main([str(word) for word in [*command, *loras, "--out", tmp_path / "x.mp4"]]) == 2
    said = capsys.readouterr().err
    assert "blocks.77.ffn.net.0.proj" in said and "none.safetensors: missing" in said and "x:1e999" in said


def test_export_refuses_an_adapter_of_another_model(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    student = shutil.copytree(teacher, tmp_path / "student")
    scheduler = student / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"stochastic_sampling": True}))
    write_lora(tmp_path / "other.safetensors", (8, 8), "blocks.77.self_attn.q")
    command = ["export", "--model", student, "--format", "lora", "--adapter", tmp_path / "other.safetensors"]
    assert main([str(word) for word in [*command, "--out", tmp_path / "out"]]) == 2
    assert "blocks.77.attn1.to_q" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def experiment(teacher: Path, tmp_path: Path) -> Callable:
    def make(*loras: str, **more: object):
        tree = {
            "geometry": {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": 8.0},
            "clips": {"source": "world"},
            "teacher": {"source": "folder", "path": str(teacher), "shift": SHIFT, "loras": list(loras), **more},
        }
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree))
        return load(tmp_path / "own.yaml")

    return make


def test_a_teacher_s_loras_are_merged_and_a_changed_file_makes_a_new_teacher(
    teacher: Path, tmp_path: Path, experiment: Callable
) -> None:
    lora, results = tmp_path / "lora.safetensors", tmp_path / "results"
    weights = "transformer/diffusion_pytorch_model.safetensors"
    base = load_file(teacher / weights)
    source = experiment(f"{lora}:{STRENGTH}")
    for seed in (0, 1):
        up, down = write_lora(lora, shape_of(teacher), seed=seed)
        if seed:
            assert not standing(source, results)["teacher"]
        folder = run_stage(source, "teacher", results)
        made = load_file(folder / weights)
        change = STRENGTH * ALPHA / RANK * up @ down
        assert (made[f"{MODULE}.weight"] - base[f"{MODULE}.weight"] - change).abs().max() < 1e-5
        assert all(torch.equal(made[name], base[name]) for name in base if name != f"{MODULE}.weight")
        assert made.keys() == base.keys() and standing(source, results)["teacher"]
    assert str(lora) in read_provenance(folder)["inputs"]
    assert not list(problems(source, "teacher", results))  # a merged transformer is not its origin's, and is none
    assert not standing(experiment(f"{lora}:1"), results)["teacher"]


def test_a_merged_teacher_keeps_its_number_format_and_its_files_variant(
    teacher: Path, tmp_path: Path, experiment: Callable
) -> None:
    half = tmp_path / "half"
    load_pipeline(teacher, torch.bfloat16).save_pretrained(half, variant="bf16")
    up, down = write_lora(tmp_path / "lora.safetensors", shape_of(teacher))
    source = experiment(str(tmp_path / "lora.safetensors"), path=str(half))
    folder = run_stage(source, "teacher", tmp_path / "results")
    (weights,) = (folder / "transformer").glob("*.bf16.safetensors")
    before, made = load_file(half / "transformer" / weights.name), load_file(weights)
    assert {name: w.dtype for name, w in made.items()} == {name: w.dtype for name, w in before.items()}
    exact = before[f"{MODULE}.weight"].float() + ALPHA / RANK * up @ down
    assert torch.equal(made[f"{MODULE}.weight"], exact.bfloat16())  # rounded once
    assert load_sampler(folder).get_parameter(f"{MODULE}.weight").isfinite().all()


def test_a_teacher_without_loras_has_the_settings_it_always_had(experiment: Callable) -> None:
    assert "loras" not in stage_settings(experiment().settings, "teacher")["teacher"]


def test_loras_of_a_teacher_are_checked_with_the_configuration(tmp_path: Path, experiment: Callable) -> None:
    write_lora(tmp_path / "other.safetensors", (8, 8), "blocks.77.self_attn.q")
    (found,) = missing_teacher(experiment(str(tmp_path / "other.safetensors")))
    assert "teacher.loras" in found and "blocks.77.attn1.to_q" in found
    with pytest.raises(ConfigError, match="finite"):
        experiment("x:1e999")
    with pytest.raises(ConfigError, match="loras are merged into"):
        experiment("x", source="train", path="")
