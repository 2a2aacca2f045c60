"""Exports: names and weights as other tools read them, the same video from each, and a card whose code runs."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file

from conftest import FRAMES, HEIGHT, SHIFT, WIDTH, build_transformer, one_step_by_diffusers, picture, seeded
from vpae.artifacts import ArtifactError, identity, write_json
from vpae.cli import main
from vpae.data.video import read_image_at
from vpae.distill import METHODS
from vpae.distill.student import save_student
from vpae.export import command
from vpae.export.card import licence_of, write_card
from vpae.export.command import export
from vpae.export.keys import to_diffusers, to_original
from vpae.export.lora import read_adapter
from vpae.flow import schedule
from vpae.models.adapters import TARGETS
from vpae.models.loras import require_fit
from vpae.models.wan import GEOMETRY

SEED = 11
SIZES = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": 8.0}
SETTINGS = {
    "seed": 3,
    "teacher": {"source": "hub", "path": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "revision": "0" * 40, "shift": SHIFT},
    "clips": {"path": "/home/someone/clips"},
    "equilibrium": {"csds_weight": 10.0},
}
PROVENANCE = {
    "code": {"version": "0.1.0", "commit": "abc", "dirty": False},
    "inputs": {"teacher": "1234", "priming": "5678"},
    "packages": {"torch": "2.13.0"},
    "host": {"name": "private-machine"},
}
INTERVAL = {"mean": 0.5, "low": 0.4, "high": 0.7}
SCORES = {"rows": {"real": {"frechet": INTERVAL}, "vpae-1nfe": {"single_sprite": INTERVAL}}, "nfe": {"vpae-1nfe": 1}}


def video(pipeline: WanImageToVideoPipeline) -> np.ndarray:
    """One step of plain diffusers from the same noise: float frames (T, H, W, 3) in [0, 1]."""
    return one_step_by_diffusers(pipeline, SEED)


def with_one_step_scheduler(pipeline: WanImageToVideoPipeline) -> WanImageToVideoPipeline:
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT, stochastic_sampling=True)
    return pipeline


@pytest.fixture(scope="module")
def adapted() -> WanTransformer3DModel:
    """The teacher with a trained-looking adapter, at a scale that is neither 1 nor a power of 2."""
    transformer = build_transformer()
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS), adapter_name="student")

    def train() -> None:
        for name, weight in transformer.named_parameters():
            if ".lora_" in name:
                weight.data = 0.3 * torch.randn(weight.shape)

    seeded(9, train)
    return transformer


@pytest.fixture(scope="module")
def student(teacher: Path, adapted: WanTransformer3DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student trained as a LoRA: a stage's folder with the adapter, and in it the merged pipeline and its card."""
    stage = tmp_path_factory.mktemp("results") / "equilibrium"
    stage.mkdir()
    tensors = {k: v.contiguous() for k, v in adapted.state_dict().items() if ".lora_" in k}
    save_file(tensors, stage / command.ADAPTER, metadata={"lora_alpha": "6"})
    merged = build_transformer()
    merged.load_state_dict(
        {
            name: _merged(name, weight, tensors) if name.endswith(".weight") else weight
            for name, weight in merged.state_dict().items()
        }
    )
    save_student(teacher, merged, SHIFT, stage / "student")
    write_json(stage / "student" / GEOMETRY, SIZES)
    write_card(stage / "student", PROVENANCE, SETTINGS)
    return stage / "student"


def _merged(name: str, weight: torch.Tensor, adapter: dict[str, torch.Tensor]) -> torch.Tensor:
    """W + alpha / r B A by hand."""
    module = name.removesuffix(".weight")
    down, up = (adapter.get(f"{module}.lora_{factor}.student.weight") for factor in "AB")
    return weight if down is None else weight + 6 / 4 * up @ down


@pytest.fixture(scope="module")
def expected(student: Path) -> np.ndarray:
    """The student's video, by plain diffusers."""
    found = video(WanImageToVideoPipeline.from_pretrained(student))
    assert found.std() > 0.05
    return found


# Key names.


def test_names_are_those_of_wan_s_own_repository():
    outside = """patch_embedding.weight text_embedding.0.weight text_embedding.2.bias time_embedding.0.weight
        time_embedding.2.bias time_projection.1.weight head.head.weight head.modulation img_emb.proj.0.weight
        img_emb.proj.1.weight img_emb.proj.3.bias img_emb.proj.4.bias"""
    block = """modulation norm3.weight norm3.bias self_attn.q.weight self_attn.k.bias self_attn.v.weight
        self_attn.o.weight self_attn.norm_q.weight self_attn.norm_k.weight cross_attn.q.weight cross_attn.k.weight
        cross_attn.v.bias cross_attn.o.bias cross_attn.norm_q.weight cross_attn.k_img.weight cross_attn.v_img.bias
        cross_attn.norm_k_img.weight ffn.0.weight ffn.2.bias"""
    found = {to_original(key) for key in build_transformer().state_dict()}
    assert {*outside.split(), *(f"blocks.3.{name}" for name in block.split())} <= found
    assert not [key for key in found if re.search(r"attn[12]|to_[qkv]|condition_embedder|scale_shift|proj_out", key)]


def test_every_name_has_its_own_and_leads_back():
    keys = list(build_transformer().state_dict())
    assert len({to_original(key) for key in keys}) == len(keys)
    assert [to_diffusers(to_original(key)) for key in keys] == keys
    assert to_original("blocks.11.attn2.to_out.0.lora_A.weight") == "blocks.11.cross_attn.o.lora_A.weight"


@pytest.mark.parametrize("key", ["blocks.0.attn3.to_q.weight", "motion_encoder.weight", "blocks.0.norm1.weight"])
def test_what_is_no_weight_of_wan_is_refused(key):
    with pytest.raises(ArtifactError, match=re.escape(key)):
        to_original(key)


def test_diffusers_own_converter_leads_back_to_the_same_tensors(student, tmp_path):
    export(student, "wan", tmp_path / "student.safetensors")
    theirs = convert_wan_transformer_to_diffusers(load_file(tmp_path / "student.safetensors"))
    ours = load_file(student / "transformer" / "diffusion_pytorch_model.safetensors")
    assert set(theirs) == set(ours)
    assert all(theirs[key].equal(ours[key]) for key in ours)


# Same noise, same video.


def test_a_wan_file_gives_the_same_video(student, teacher, expected, tmp_path):
    export(student, "wan", tmp_path / "out")
    file = tmp_path / "out" / "diffusion_pytorch_model.safetensors"
    transformer = WanTransformer3DModel.from_single_file(str(file), config=str(teacher), subfolder="transformer")
    pipeline = with_one_step_scheduler(WanImageToVideoPipeline.from_pretrained(teacher, transformer=transformer))
    np.testing.assert_allclose(video(pipeline), expected, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["_class_name"], config["model_type"]) == ("WanModel", "i2v")
    assert (config["dim"], config["num_heads"], config["num_layers"], config["in_dim"]) == (24, 2, 4, 36)


def test_a_diffusers_folder_gives_the_same_video_and_shares_no_file_with_the_student(student, expected, tmp_path):
    export(student, "diffusers", tmp_path / "out")
    np.testing.assert_allclose(video(WanImageToVideoPipeline.from_pretrained(tmp_path / "out")), expected, atol=1e-5)
    ours, theirs = ({p.relative_to(f) for p in f.rglob("*") if p.is_file()} for f in (student, tmp_path / "out"))
    assert ours == theirs
    assert not {(student / p).stat().st_ino for p in ours} & {(tmp_path / "out" / p).stat().st_ino for p in ours}


@pytest.mark.parametrize("form", ["diffusers", "wan"])
def test_bfloat16_halves_the_weights_and_keeps_norms_and_modulation(student, expected, tmp_path, form):
    export(student, form, tmp_path / "out", dtype="bfloat16")
    folder = tmp_path / "out" / "transformer" if form == "diffusers" else tmp_path / "out"
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    fine = {key for key, weight in weights.items() if weight.dtype == torch.float32}
    assert fine and all(re.search(r"norm|scale_shift|modulation|time_embed|img_emb.proj.[04]", key) for key in fine)
    assert {weight.dtype for key, weight in weights.items() if key not in fine} == {torch.bfloat16}
    if form == "diffusers":
        frames = video(WanImageToVideoPipeline.from_pretrained(tmp_path / "out"))
        assert 0 < np.abs(frames - expected).mean() < 0.01


@pytest.mark.parametrize("form", ["lora", "lora-wan"])
def test_the_teacher_with_the_loaded_lora_gives_the_student_s_video(student, teacher, expected, tmp_path, form):
    export(student, form, tmp_path / "out")
    prefix = {"lora": "transformer.blocks.0.attn1.to_q", "lora-wan": "diffusion_model.blocks.0.self_attn.q"}[form]
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    assert {f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"} <= set(load_file(file))
    pipeline = with_one_step_scheduler(WanImageToVideoPipeline.from_pretrained(teacher))
    without = video(pipeline)
    pipeline.load_lora_weights(tmp_path / "out", weight_name=file.name)
    assert np.abs(without - expected).mean() > 0.01
    np.testing.assert_allclose(video(pipeline), expected, atol=1e-4)


def test_diffusers_own_lora_file_is_taken_as_an_adapter(student, adapted, tmp_path):
    WanImageToVideoPipeline.save_lora_weights(
        tmp_path / "theirs",
        transformer_lora_layers=get_peft_model_state_dict(adapted, adapter_name="student"),
        transformer_lora_adapter_metadata=adapted.peft_config["student"].to_dict(),
    )
    found = []
    for name, adapter in (("a", None), ("b", tmp_path / "theirs" / "pytorch_lora_weights.safetensors")):
        export(student, "lora", tmp_path / f"{name}.safetensors", adapter=adapter)
        found.append(load_file(tmp_path / f"{name}.safetensors"))
    assert set(found[0]) == set(found[1])
    assert all(found[0][key].equal(found[1][key]) for key in found[0])


def test_a_fully_trained_student_has_no_lora_to_export(teacher, tmp_path, capsys):
    save_student(teacher, build_transformer(5), SHIFT, tmp_path / "student")
    arguments = ["export", "--model", tmp_path / "student", "--format", "lora", "--out", tmp_path / "out"]
    assert main([str(a) for a in arguments]) == 2
    assert "--adapter" in capsys.readouterr().err


def test_a_teacher_is_not_taken_for_a_student(teacher, tmp_path, capsys):
    arguments = ["export", "--model", teacher, "--format", "wan", "--out", tmp_path / "out"]
    assert main([str(a) for a in arguments]) == 2
    assert "no student" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)}, {}, "lora_alpha"),
        ({"a.lora_A.weight": torch.ones(2, 3)}, {"lora_alpha": "2"}, "one of its two"),
        ({"a.weight": torch.ones(2, 3)}, {"lora_alpha": "2"}, "not a weight of a LoRA"),
    ],
)
def test_a_file_that_is_no_complete_adapter_is_refused(student, tmp_path, tensors, metadata, message):
    save_file(tensors, tmp_path / "bad.safetensors", metadata={"format": "pt", **metadata})
    with pytest.raises(ArtifactError, match=message):
        export(student, "lora", tmp_path / "out", adapter=tmp_path / "bad.safetensors")


# Whole or not at all.


@pytest.mark.parametrize("form", ["diffusers", "wan", "lora"])
def test_nothing_is_overwritten(student, tmp_path, form):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(ArtifactError, match="overwrites nothing"):
        export(student, form, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "precious"]


def test_a_failed_export_leaves_nothing_behind(student, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "write_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(student, "diffusers", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_anything_is_written(student, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(command, "require_free_space", lambda folder, size: needed.append((folder, size)))
    for form in ("diffusers", "wan", "lora"):
        export(student, form, tmp_path / form)
        written = sum(p.stat().st_size for p in (tmp_path / form).rglob("*") if p.is_file())
        assert needed[-1][0] == tmp_path
        assert needed[-1][1] == pytest.approx(written, abs=60_000)  # headers, card


def test_an_export_into_the_model_s_own_folder_is_refused(student):
    with pytest.raises(ArtifactError, match="inside"):
        export(student, "diffusers", student / "copy")


@pytest.mark.parametrize("steps", [1, 4])
def test_vllm_omni_samples_at_the_times_of_our_own_sampler(student, tmp_path, steps):
    export(student, "vllm-omni", tmp_path / "out", steps=steps)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "WanI2VDMD2Pipeline" and index["transformer"][1] == "WanTransformer3DModel"
    asked = index["dmd2_config"]
    assert (asked["num_inference_steps"], asked["guidance_scale"], asked["solver"]) == (steps, 1.0, "sde")
    # What it does with these fields: a scheduler without a shift of its own, at just these times.
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, stochastic_sampling=True)
    theirs.set_timesteps(timesteps=asked["denoising_timesteps"])
    front, text = front_and_text(tmp_path / "out" / "README.md")
    assert ("few-step" in front["tags"], "in one network evaluation." in text) == (steps > 1, steps == 1)
    assert ("in 4 network evaluations." in text and "holds the 4 steps and their times" in text) == (steps == 4)
    assert theirs.sigmas.tolist() == pytest.approx(schedule(steps, SHIFT).tolist(), abs=5e-4)  # whole numbers of 1,000


def test_a_folder_for_vllm_omni_leads_back_to_one_for_diffusers(student, expected, tmp_path):
    export(student, "vllm-omni", tmp_path / "served", steps=4)
    export(tmp_path / "served", "diffusers", tmp_path / "out")
    ours, theirs = (json.loads((folder / "model_index.json").read_text()) for folder in (student, tmp_path / "out"))
    assert ours == theirs
    np.testing.assert_allclose(video(WanImageToVideoPipeline.from_pretrained(tmp_path / "out")), expected, atol=1e-5)


@pytest.mark.parametrize(("form", "steps"), [("vllm-omni", 0), ("diffusers", 4), ("wan", -1)])
def test_steps_that_a_form_cannot_hold_are_refused(student, tmp_path, form, steps):
    with pytest.raises(ArtifactError, match=f"--steps {steps}: "):
        export(student, form, tmp_path / "out", steps=steps)
    assert list(tmp_path.iterdir()) == []


# The card.


def front_and_text(card: Path) -> tuple[dict, str]:
    _, front, text = card.read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def run_snippet(card: Path, change=lambda code: code, **names) -> dict:
    [code] = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    code = change(code)
    exec(compile(code, str(card), "exec"), names)
    return names


def test_the_card_says_where_the_student_comes_from(student):
    front, text = front_and_text(student / "README.md")
    assert front["license"] == "apache-2.0" and front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "image-to-video"
    assert front["base_model"] == "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers" and front["base_model_relation"] == "finetune"
    assert "csds_weight: 10.0" in text and "commit abc" in text and "`5678`" in text
    assert f"{FRAMES} frames of {WIDTH} x {HEIGHT} pixels" in text and "Not measured" in text
    for private in ("/home/someone", "private-machine"):
        assert private not in text and private not in (student / "card.json").read_text()


MERGED = ["/home/someone/style.safetensors:0.8", "motion.safetensors"]


@pytest.mark.parametrize("source", ["hub", "folder"])
@pytest.mark.parametrize("form", ["diffusers", "wan", "lora", "lora-wan"])
def test_the_card_names_the_loras_that_were_merged_into_the_teacher(tmp_path, form, source):
    settings = {**SETTINGS, "teacher": {**SETTINGS["teacher"], "source": source, "loras": MERGED}}
    write_card(tmp_path, PROVENANCE, settings, form=form)
    stated = json.loads((tmp_path / "card.json").read_text())["settings"]
    assert stated["teacher"]["loras"] == ["style.safetensors:0.8", "motion.safetensors:1.0"]
    text = " ".join(front_and_text(tmp_path / "README.md")[1].split())
    assert "/home/someone" not in text
    assert "merged first" in text and "`style.safetensors` at strength 0.8, `motion.safetensors` at strength 1" in text
    if "lora" in form:
        assert "or its name on the hub" not in text
        assert ("as it is on the hub is not enough" in text) == (source == "hub")
    write_card(tmp_path, PROVENANCE, stated, form=form)  # an export of an export
    assert json.loads((tmp_path / "card.json").read_text())["settings"] == stated


@pytest.mark.parametrize("form", ["diffusers", "lora"])
def test_without_loras_the_hub_s_model_is_the_base(tmp_path, form):
    write_card(tmp_path, PROVENANCE, {**SETTINGS, "teacher": {**SETTINGS["teacher"], "loras": []}}, form=form)
    text = (tmp_path / "README.md").read_text()
    assert "merged" not in text and "loras" not in (tmp_path / "card.json").read_text()
    assert ("or its name on the hub" in text) == (form == "lora")


def test_the_card_s_code_makes_the_video_in_plain_diffusers(student, tmp_path, monkeypatch):
    export(student, "diffusers", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    picture().save("first.png")
    names = run_snippet(Path("README.md"))
    assert len(names["frames"]) == FRAMES
    with Image.open("clip.webp") as clip:
        assert (clip.n_frames, clip.size) == (FRAMES, (WIDTH, HEIGHT))
        assert (np.asarray(clip.convert("RGB")) == np.asarray(names["frames"][0])).all()


@pytest.mark.parametrize("call", ["torch.manual_seed(0)", ""], ids=["as the card says", "without it"])
def test_several_steps_make_the_same_video_again_where_the_card_s_call_is_made(student, tmp_path, monkeypatch, call):
    def in_two_steps(code: str) -> str:
        code = code.replace("frames = pipeline(", f"pipeline.scheduler.sigma_min = 1 / 2\n{call}\nframes = pipeline(")
        return code.replace("num_inference_steps=1", "num_inference_steps=2")

    assert "call `torch.manual_seed(0)` before" in (student / "README.md").read_text()
    export(student, "diffusers", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    picture().save("first.png")
    with torch.random.fork_rng():
        videos = [np.stack(run_snippet(Path("README.md"), in_two_steps)["frames"]) for _ in range(2)]
    assert (videos[0] == videos[1]).all() == bool(call)


@pytest.mark.parametrize("size", [(48, 64), (100, 33), (33, 100), (32, 32)])  # width, height
def test_the_card_s_code_prepares_a_picture_as_sample_does(student, tmp_path, monkeypatch, size):
    monkeypatch.chdir(tmp_path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera lay on its side
    picture(*reversed(size)).save("first.png", exif=exif)
    seen = []
    pipeline = SimpleNamespace(to=lambda _: lambda image, **_: seen.append(image) or SimpleNamespace(frames=[[image]]))
    monkeypatch.setattr(WanImageToVideoPipeline, "from_pretrained", lambda *_, **__: pipeline)
    run_snippet(student / "README.md")
    assert (np.asarray(seen[0]) == np.asarray(read_image_at(Path("first.png"), HEIGHT, WIDTH))).all()


@pytest.mark.parametrize("form", ["wan", "lora", "lora-wan"])
def test_the_other_cards_code_loads_the_student(student, teacher, expected, tmp_path, monkeypatch, form):
    export(student, form, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    names = run_snippet(Path("README.md"), teacher=str(teacher))
    np.testing.assert_allclose(video(names["pipeline"]), expected, atol=1e-4)
    front, text = front_and_text(Path("README.md"))
    assert front["base_model_relation"] == ("finetune" if form == "wan" else "adapter")
    assert f"timestep shift {SHIFT}" in text


def test_scores_come_into_the_card_by_the_export_command(student, tmp_path):
    write_json(tmp_path / "scores.json", SCORES)
    arguments = ["export", "--model", student, "--format", "diffusers", "--out", tmp_path / "out"]
    assert main([str(a) for a in [*arguments, "--scores", tmp_path / "scores.json"]]) == 0
    _, text = front_and_text(tmp_path / "out" / "README.md")
    assert "| row | NFE | frechet | single_sprite |" in text
    assert "| vpae-1nfe | 1 |  | 0.500 ± 0.150 |" in text
    assert "commit abc" in text  # what the stage knew is still there
    assert json.loads((tmp_path / "out" / "card.json").read_text())["scores"] == SCORES


@pytest.mark.parametrize("evaluated", [True, False], ids=["this student", "another"])
def test_the_scores_of_the_evaluation_beside_the_student_come_by_themselves(teacher, tmp_path, evaluated):
    stage, evaluation = tmp_path / "equilibrium", tmp_path / "evaluation"
    save_student(teacher, build_transformer(5), SHIFT, stage / "student")
    evaluation.mkdir()
    write_json(evaluation / "scores.json", SCORES)
    write_json(stage / "provenance.json", {**PROVENANCE, "outputs": {"a": "1"}, "settings": {}})
    measured = identity(stage) if evaluated else "another"
    write_json(evaluation / "provenance.json", {"inputs": {"equilibrium": measured}, "outputs": {}, "settings": {}})
    export(stage / "student", "wan", tmp_path / "out")
    _, text = front_and_text(tmp_path / "out" / "README.md")
    assert ("0.500 ± 0.150" in text) == evaluated and ("Not measured" in text) != evaluated


def test_figures_stand_with_their_conditions(teacher, tmp_path):
    stage, samples, evaluation = (tmp_path / name for name in ("equilibrium", "samples", "evaluation"))
    save_student(teacher, build_transformer(5), SHIFT, stage / "student")
    for folder in (samples, evaluation):
        folder.mkdir()
    row = {"motion": INTERVAL, "latency_total_s": INTERVAL}
    write_json(evaluation / "scores.json", {"rows": {"a": row}, "nfe": {"a": 1}, "videos": 256, "decoded": 64})
    rows = {"teacher-1nfe": {"model": "teacher"}, "b": {"model": "equilibrium"}, "a": {"model": "equilibrium"}}
    known = {"inputs": {}, "outputs": {"a": "1"}, "settings": {}}
    write_json(stage / "provenance.json", known)
    write_json(samples / "provenance.json", {**known, "outputs": {"b": "2"}, "settings": {"samples": {"rows": rows}}})
    inputs = {"equilibrium": identity(stage), "samples": identity(samples)}
    host = {"name": "private-machine", "device": "NVIDIA H200"}
    write_json(evaluation / "provenance.json", {**known, "inputs": inputs, "host": host})
    export(stage / "student", "diffusers", tmp_path / "out", dtype="bfloat16")
    said = "Each row has 256 videos, 64 of them decoded for what is measured on frames. "
    said += "Latencies were measured on NVIDIA H200. "
    said += "This student's: b, a. It was measured before its weights became bfloat16."
    assert said in (tmp_path / "out" / "README.md").read_text()
    assert "private-machine" not in (tmp_path / "out" / "card.json").read_text()
    export(tmp_path / "out", "wan", tmp_path / "again")
    assert said in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("beside", [None, "[]", '{"settings": {}, "inputs": {}, "outputs": {}, "host": 1}'])
def test_scores_whose_conditions_are_not_known_are_taken_as_they_are(student, tmp_path, beside):
    write_json(tmp_path / "scores.json", SCORES)
    if beside:
        (tmp_path / "provenance.json").write_text(beside)
    export(student, "wan", tmp_path / "out", scores=tmp_path / "scores.json")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "0.500 ± 0.150" in text and "measured on" not in text and "This student's" not in text


def test_a_latency_has_no_interval(tmp_path):
    times = {"mean": 0.864, "low": 0.7, "high": 1.008}  # the median, the fastest, the slowest run
    scores = {"rows": {"vpae-1nfe": {"motion": INTERVAL, "latency_total_s": times}}, "nfe": {"vpae-1nfe": 1}}
    write_card(tmp_path, PROVENANCE, SETTINGS, scores)
    _, text = front_and_text(tmp_path / "README.md")
    assert "| vpae-1nfe | 1 | 0.500 ± 0.150 | 0.864 |" in text and "latencies are the median run's" in text


def test_what_is_not_a_scores_file_is_refused(student, tmp_path):
    (tmp_path / "scores.json").write_text("[]")
    with pytest.raises(ArtifactError, match="rows"):
        export(student, "wan", tmp_path / "out", scores=tmp_path / "scores.json")
    (tmp_path / "scores.json").write_text('{"rows": {"a": {"i2v_score": 0.9}}}')  # VBench's file has rows, too
    with pytest.raises(ArtifactError, match=r"scores\.json: cannot be read .* name one"):
        export(student, "wan", tmp_path / "out", scores=tmp_path / "scores.json")
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_are_refused_before_anything_is_written(student, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="is a file; name a place in a folder"):
        export(student, "wan", tmp_path / "file" / "out")
    with pytest.raises(ArtifactError, match="its name is longer than"):
        export(student, "wan", tmp_path / ("x" * 252))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "text", [b"---\nlicense: mit\ntitle: Wan: ours\n---\n", b"---\n\xff\n---\n", b"---\n- a\n---\n"]
)
def test_a_readme_that_is_no_card_costs_nothing(text, tmp_path):
    (tmp_path / "README.md").write_bytes(text)
    assert licence_of(tmp_path, {"teacher": {"source": "train"}}) == {"license": "apache-2.0"}
    write_card(tmp_path, {}, {"teacher": {"source": "train"}})


def test_the_licence_is_the_base_model_s_and_its_card_stays_as_it_was(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "student"
    base.mkdir()
    folder.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: theirs\n---\n# Base\n")
    (folder / "README.md").hardlink_to(base / "README.md")
    write_card(folder, {}, {"teacher": {"source": "hub", "path": "someone/model"}})
    assert (base / "README.md").read_text().endswith("# Base\n")
    front, text = front_and_text(folder / "README.md")
    assert (front["license"], front["license_name"]) == ("other", "theirs") and "theirs" in text
    assert licence_of(tmp_path, {"teacher": {"source": "hub", "path": "someone/model"}})["license"] == "other"
    assert licence_of(tmp_path, {"teacher": {"source": "train"}}) == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    ("made", "licence"),
    [
        ({"settings": {"teacher": {"source": "train", "path": ""}}}, "apache-2.0"),
        ({"settings": {"teacher": {"source": "hub", "path": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"}}}, "apache-2.0"),
        ({"settings": {"teacher": {"source": "hub", "path": "someone/model"}}}, "other"),
        ({"settings": {"teacher": "ours"}}, "other"),
        ({"settings": {}}, "other"),
        ("theirs", "other"),
        (None, "other"),
    ],
)
def test_a_teacher_that_was_trained_here_has_the_project_s_licence(tmp_path, made, licence):
    (tmp_path / "teacher").mkdir()
    if made:
        known = {"inputs": {}, "outputs": {}, **made} if isinstance(made, dict) else made
        write_json(tmp_path / "teacher" / "provenance.json", known)
    settings = {"teacher": {"source": "folder", "path": str(tmp_path / "teacher")}}
    write_card(tmp_path, PROVENANCE, settings)
    front, text = front_and_text(tmp_path / "README.md")
    assert front["license"] == licence
    assert ("Apache-2.0." in text) == (licence == "apache-2.0")
    assert str(tmp_path) not in (tmp_path / "card.json").read_text()
    (tmp_path / "linked").mkdir()  # as results/EXPERIMENT/teacher is
    write_json(tmp_path / "linked" / "provenance.json", {"inputs": {}, "outputs": {}, "settings": settings})
    assert licence_of(Path("none"), {"teacher": {"source": "folder", "path": str(tmp_path / "linked")}}) == {
        name: value for name, value in front.items() if name.startswith("license")
    }


def test_a_model_without_a_card_takes_the_provenance_beside_it(teacher, tmp_path):
    stage = tmp_path / "equilibrium"
    save_student(teacher, build_transformer(5), SHIFT, stage / "student")
    settings = {"seed": 4, "equilibrium": {"csds_weight": 7.0}}
    write_json(stage / "provenance.json", {**PROVENANCE, "outputs": {}, "settings": settings})
    export(stage / "student", "wan", tmp_path / "out")
    front, text = front_and_text(tmp_path / "out" / "README.md")
    assert "base_model" not in front and "csds_weight: 7.0" in text and "commit abc" in text
    assert "adversarial equilibrium against" in text


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, "by an adversarial equilibrium against its own EMA with conditional SDS,"),
        ({"adversarial_weight": 0.0, "score": {"weight": 1.0}}, "by score distillation with conditional SDS,"),
        (
            {"backbone": "copy", "csds_weight": 0.0},
            "by an adversarial equilibrium against a trained copy of the teacher,",
        ),
    ],
)
def test_the_card_names_the_terms_that_were_on(section, words, tmp_path):
    write_card(tmp_path, PROVENANCE, {"equilibrium": section})
    _, text = front_and_text(tmp_path / "README.md")
    assert words in " ".join(text.split())


@pytest.mark.parametrize("own", [None, 0.3])
def test_the_card_names_the_shift_of_the_student_s_own_sampler(own, tmp_path):
    settings = {"teacher": {"shift": 5.0}, "priming": {"few_step_shift": 2.0}, "equilibrium": {"few_step_shift": own}}
    write_card(tmp_path, PROVENANCE, settings, form="wan")
    _, text = front_and_text(tmp_path / "README.md")
    assert f"shift={5.0 if own is None else own}, stochastic_sampling" in text


def test_the_card_of_a_student_of_the_first_phase_does_not_claim_the_second(student, tmp_path):
    write_card(tmp_path, PROVENANCE, {"priming": {"guidance_scale": 5.0}, "teacher": {"shift": SHIFT}})
    _, text = front_and_text(tmp_path / "README.md")
    assert METHODS["priming"].about in text and "guidance_scale: 5.0" in text
    assert METHODS["equilibrium"].about not in text


MODULE, WAN = "blocks.1.attn1.to_q", "blocks.1.self_attn.q"
RSLORA = json.dumps({"transformer.lora_alpha": 8, "transformer.use_rslora": True})
PATTERNS = json.dumps({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn1.to_q": 2, "to_k": 64}})
PUBLIC = {
    "diffusers": (f"transformer.{MODULE}.lora_A.weight", f"transformer.{MODULE}.lora_B.weight", {}, None, 1.0),
    "rslora": (f"transformer.{MODULE}.lora_A.weight", f"transformer.{MODULE}.lora_B.weight", RSLORA, None, 4.0),
    "patterns": (f"transformer.{MODULE}.lora_A.weight", f"transformer.{MODULE}.lora_B.weight", PATTERNS, None, 0.5),
    "comfy": (f"diffusion_model.{WAN}.lora_A.weight", f"diffusion_model.{WAN}.lora_B.weight", {}, None, 1.0),
    "kohya": (f"diffusion_model.{WAN}.lora_down.weight", f"diffusion_model.{WAN}.lora_up.weight", {}, 2.0, 0.5),
    "kohya, underscores": ("lora_unet_blocks_1_self_attn_q.lora_down.weight", "", {}, 2.0, 0.5),
    "kohya, diffusers' names": ("lora_transformer_blocks_1_attn1_to_q.lora_down.weight", "", {}, None, 1.0),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_format_of_a_lora_is_read_at_its_true_strength(tmp_path: Path, name: str) -> None:
    down_key, up_key, said, alpha, scale = PUBLIC[name]
    down, up = torch.randn(4, 24), torch.randn(24, 4)
    tensors = {down_key: down, up_key or down_key.replace("down", "up"): up}
    if alpha is not None:
        tensors[down_key.replace("lora_down.weight", "alpha")] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": said} if said else None)
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 64}')  # of another file in this folder
    found = read_adapter(tmp_path / "lora.safetensors")
    applied = found[f"{MODULE}.lora_B.weight"] @ found[f"{MODULE}.lora_A.weight"]
    assert torch.allclose(applied, scale * up @ down, atol=1e-5)


def test_a_peft_adapter_needs_its_configuration_beside_it(tmp_path: Path) -> None:
    down, up = torch.randn(4, 24), torch.randn(24, 4)
    names = [f"base_model.model.{MODULE}.lora_{factor}.weight" for factor in "AB"]
    save_file(dict(zip(names, (down, up), strict=True)), tmp_path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=r"adapter_config\.json"):
        read_adapter(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 12}))
    found = read_adapter(tmp_path / "adapter_model.safetensors")
    assert torch.allclose(found[f"{MODULE}.lora_B.weight"], 3 * up)


@pytest.mark.parametrize("read", [read_adapter, lambda folder: require_fit(folder, Path("model"))])
@pytest.mark.parametrize(("inside", "named"), [("", "adapter_model"), ("style.safetensors", "style")])
def test_an_adapter_s_folder_is_not_said_to_be_missing(tmp_path: Path, read, inside: str, named: str) -> None:
    (tmp_path / (inside or "adapter_config.json")).touch()
    with pytest.raises(ArtifactError, match=rf"is a folder; name the file in it, e\.g\. {named}\.safetensors"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (f"transformer.{MODULE}.lora_magnitude_vector", "DoRA"),
        (f"diffusion_model.{WAN}.dora_scale", "DoRA"),
        (f"diffusion_model.{WAN}.hada_w1_a", "LoHa"),
        (f"diffusion_model.{WAN}.diff", "whole difference"),
        ("lora_unet_blocks_1_self_attn_w.lora_down.weight", "blocks_1_self_attn_w: no module"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "only one of its two factors"),
    ],
)
def test_adapters_of_other_kinds_are_refused_by_name(tmp_path: Path, key: str, said: str) -> None:
    save_file({key: torch.ones(4, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(ArtifactError, match=said):
        read_adapter(tmp_path / "lora.safetensors")


def test_a_lora_that_is_not_whole_or_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ArtifactError, match="LFS pointer"):
        read_adapter(path)
    shapes = {"A": (4, 24), "B": (24, 5)}
    save_file({f"transformer.{MODULE}.lora_{k}.weight": torch.ones(v) for k, v in shapes.items()}, path)
    with pytest.raises(ArtifactError, match="do not make a product"):
        read_adapter(path)
