"""Teacher folders as people have them: taken where diffusers can load them, refused by name before any job."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import SHIFT, build_transformer
from vbench_i2v.files import tree
from vpae.artifacts import ArtifactError, building
from vpae.cli import main
from vpae.distill.student import save_student
from vpae.experiment import ConfigError, load
from vpae.export.command import export
from vpae.models.formats import stored_dtype, stored_weights
from vpae.models.wan import load_pipeline, load_sampler, load_transformer
from vpae.teacher import stage
from vpae.teacher.folder import checked, faults, header, require_whole, variant_of

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def configured(file: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 65583000000\n")


def halved(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def emptied(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "transformer/diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def other_shape(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    name = "blocks.1.attn2.to_q.weight"
    save_file({**weights, name: weights[name][:, :5].contiguous()}, folder / WEIGHTS)


def without_a_block(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in weights.items() if not k.startswith("blocks.3.")}, folder / WEIGHTS)


def half_a_text_encoder(folder: Path) -> None:
    path = folder / "text_encoder/model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def without_image_encoder(spoil: Callable[[Path], None], **index: object) -> Callable[[Path], None]:
    """As the models that look at no image's embedding are published."""

    def change(folder: Path) -> None:
        spoil(folder)
        configured("model_index.json", image_encoder=[None, None], image_processor=[None, None], **index)(folder)
        for name in ("image_encoder", "image_processor"):
            shutil.rmtree(folder / name)

    return change


def without_transformer(folder: Path) -> None:
    configured("model_index.json", _class_name="WanPipeline")(folder)
    shutil.rmtree(folder / "transformer")


def cut_off(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text((folder / file).read_text()[:-20])


EXPERTS = configured("model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
NO_FRAME = configured("transformer/config.json", in_channels=16, image_dim=None)
WRONG = {
    "LFS pointer": (pointer, "Git LFS pointer.*git lfs pull"),
    "cut in half": (halved, "cut off or damaged"),
    "empty": (emptied, "no whole safetensors file"),
    "pickled": (pickled, "pickled weights.*safe_serialization=True"),
    "text encoder cut off": (half_a_text_encoder, "text_encoder/model.safetensors: cut off"),
    "scheduler cut off": (cut_off("scheduler/scheduler_config.json"), r"scheduler_config\.json.*download it again"),
    "tokenizer cut off": (cut_off("tokenizer/tokenizer.json"), r"tokenizer\.json.*download it again"),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer/tokenizer.json").unlink(),
        r"neither tokenizer\.json nor spiece",
    ),
    "other shape": (other_shape, r"blocks\.1\.attn2\.to_q\.weight is \(24, 5\)"),
    "a block is missing": (without_a_block, r"blocks\.3.*missing"),
    "FLF2V": (configured("transformer/config.json", pos_embed_seq_len=514), "FLF2V"),
    "Fun-Control": (configured("transformer/config.json", in_channels=52), "Fun-Control"),
    "Wan2.2-A14B": (EXPERTS, "two experts"),
    "Wan2.2-A14B as published": (without_image_encoder(EXPERTS), "two experts"),
    "Wan2.2-TI2V-5B": (configured("model_index.json", expand_timesteps=True), "Wan2.2-TI2V-5B"),
    "Wan2.2, one expert": (configured("transformer/config.json", image_dim=None), "image's embedding"),
    "T2V": (NO_FRAME, "text-to-video"),
    "T2V as published": (without_image_encoder(NO_FRAME, _class_name="WanPipeline"), "text-to-video"),
    "T2V in part": (without_transformer, "it is a WanPipeline, not a WanImageToVideoPipeline"),
    "48 latent channels": (configured("transformer/config.json", out_channels=48), "out_channels"),
    "another pipeline": (configured("model_index.json", _class_name="WanVACEPipeline"), "WanVACEPipeline"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_folder_that_cannot_be_distilled_is_refused_by_name_before_any_job(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    spoil, said = WRONG[name]
    shutil.copytree(teacher, tmp_path / "copy")
    spoil(tmp_path / "copy")
    with pytest.raises(ArtifactError, match=said):
        checked(tmp_path / "copy")
    text = f"extends: {Path('configs/micro').absolute()}\nteacher: {{source: folder, path: {tmp_path / 'copy'}}}\n"
    (tmp_path / "mine.yaml").write_text(text)
    assert main(["config", "check", "--strict", str(tmp_path / "mine.yaml")]) == 2
    refused = capsys.readouterr().err
    assert "mine.yaml: teacher.path: " in refused and re.search(said, refused)
    command = ["sample", "--model", str(tmp_path / "copy"), "--image", "x.png", "--prompt", "x", "--out", "x.mp4"]
    assert main(command) == 2 and re.search(said, capsys.readouterr().err)


def test_a_whole_folder_is_taken(teacher: Path) -> None:
    assert faults(teacher) == []
    assert variant_of(teacher) is None


def test_what_is_there_as_fp16_only_is_loaded_as_diffusers_loads_it(teacher: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    (copy / WEIGHTS).rename(copy / WEIGHTS.replace(".safetensors", ".fp16.safetensors"))
    assert checked(copy) == copy
    wanted = load_transformer(teacher, torch.float32).state_dict()
    for found in (load_transformer(copy, torch.float32), load_pipeline(copy, torch.float32).transformer):
        assert all(torch.equal(value, wanted[key]) for key, value in found.state_dict().items())
    # Beside the plain weights, a variant is not read.
    save_file({k: torch.zeros_like(v) for k, v in wanted.items()}, copy / WEIGHTS.replace(".saf", ".bf16.saf"))
    with pytest.raises(ArtifactError, match="several variants"):
        variant_of(copy)
    shutil.copy(teacher / WEIGHTS, copy / WEIGHTS)
    assert variant_of(copy) is None


def test_a_student_of_a_teacher_that_is_there_as_fp16_only_is_loaded(teacher: Path, tmp_path: Path) -> None:
    """Its transformer is plain, and all else is the teacher's."""
    half, student = tmp_path / "half", tmp_path / "student"
    shutil.copytree(teacher, half)
    for path in half.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    transformer = load_transformer(half, torch.float32)
    save_student(half, transformer, SHIFT, student)
    for found in (load_sampler(student), load_transformer(student, torch.float32), load_pipeline(student).transformer):
        assert all(value.equal(transformer.state_dict()[key]) for key, value in found.state_dict().items())


def test_what_stands_in_hidden_folders_of_a_teacher_counts_as_it_always_did(teacher: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    (copy / ".cache" / "huggingface" / "x.metadata").write_text("a commit")
    (copy / ".hidden").write_text("nobody's")
    shown = {path.relative_to(copy).as_posix() for path in tree(copy, hidden_folders=True) if path.is_file()}
    assert ".cache/huggingface/x.metadata" in shown and ".hidden" not in shown


def test_equal_students_are_equal_files_wherever_their_start_stood(teacher: Path, tmp_path: Path) -> None:
    found = []
    for place in ("here", "somewhere/else"):
        start = tmp_path / place
        shutil.copytree(teacher, start)
        save_student(start, load_transformer(start, torch.float32), SHIFT, start / "student")
        found.append((start / "student/transformer/config.json").read_bytes())
    assert found[0] == found[1] and str(tmp_path).encode() not in found[0]


def test_what_is_exported_for_another_server_is_sampled(teacher: Path, tmp_path: Path, capsys) -> None:
    student = tmp_path / "student"
    save_student(teacher, load_transformer(teacher, torch.float32), SHIFT, student)
    export(student, "vllm-omni", tmp_path / "served")
    assert faults(tmp_path / "served") == []


DAMAGED = ("transformer/config.json", "model_index.json", WEIGHTS, "vae/config.json", "scheduler/scheduler_config.json")


@pytest.mark.parametrize("file", DAMAGED)
@pytest.mark.parametrize("name", ["sample", "export", "evaluation sample"])
def test_a_damaged_model_is_refused_by_name(name: str, file: str, teacher: Path, tmp_path: Path, capsys) -> None:
    student = tmp_path / "student"
    save_student(teacher, load_transformer(teacher, torch.float32), SHIFT, student)
    content = (student / file).read_bytes()
    (student / file).unlink()  # the teacher has a link to it
    (student / file).write_bytes(content[: len(content) // 2])
    Image.new("RGB", (32, 32)).save(tmp_path / "first.png")
    more = {
        "sample": ["--image", f"{tmp_path}/first.png", "--prompt=x", "--num-frames=5", f"--out={tmp_path}/c.mp4"],
        "export": ["--format", "wan", f"--out={tmp_path}/e"],
        "evaluation sample": ["--suite=x.json", "--images", f"{tmp_path}/images", f"--out={tmp_path}/e"],
    }[name]
    assert main([*name.split(), "--model", str(student), *more]) == 2
    assert file.rpartition("/")[2] in capsys.readouterr().err
    assert not list(tmp_path.glob("c.mp4")) and not list(tmp_path.glob("e"))


def test_the_number_format_is_that_of_the_files_that_are_loaded(teacher: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    half = {key: value.half() for key, value in load_file(copy / WEIGHTS).items()}
    save_file(half, copy / WEIGHTS.replace(".safetensors", ".fp16.safetensors"))
    (copy / "transformer" / "._diffusion_pytorch_model.safetensors").write_bytes(b"of a Mac")
    assert stored_dtype(stored_weights(copy / "transformer")) == torch.float32
    (copy / WEIGHTS).rename(copy / "transformer" / "wan_i2v.safetensors")
    (copy / WEIGHTS.replace(".safetensors", ".fp16.safetensors")).unlink()
    with pytest.raises(
        ArtifactError, match=r"wan_i2v\.safetensors: diffusers loads diffusion_pytorch_model\.safetensors"
    ):
        checked(copy)


def test_a_header_says_what_safetensors_says(teacher: Path) -> None:
    assert header(teacher / WEIGHTS) == {k: tuple(v.shape) for k, v in load_file(teacher / WEIGHTS).items()}


@pytest.mark.parametrize("name", ["my exp", "a&b", "a;b", "$(x)", "a,b", "'q'", "-rf", "a{b}"])
def test_a_name_that_a_shell_would_take_apart_is_refused_when_loaded(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_text(Path("configs/micro.yaml").read_text())
    with pytest.raises(ConfigError, match="letters, digits"):
        load(path)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("sample", WEIGHTS),
        ("sample", "vae/config.json"),
        ("export", WEIGHTS),
        ("export", "student_lora.safetensors"),
    ],
)
def test_a_model_of_a_stage_whose_bytes_have_changed_is_refused_by_name_at_its_next_use(
    command: str, name: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stage = tmp_path / "results/own/equilibrium"
    with building(stage, {}, {}) as (out, _):
        save_student(teacher, build_transformer(), SHIFT, out / "student")
        (out / "student/README.md").write_text("a card")
        save_file({"x": torch.ones(1)}, out / "student_lora.safetensors")
    Image.new("RGB", (32, 32)).save(tmp_path / "first.png")
    form = "lora" if name == "student_lora.safetensors" else "wan"
    more = {
        "sample": ["--image", f"{tmp_path}/first.png", "--prompt=x", "--num-frames=5", f"--out={tmp_path}/c.mp4"],
        "export": ["--format", form, f"--out={tmp_path}/e"],
    }[command]
    (stage / "student/README.md").write_text("another card")  # whoever publishes a model writes on it
    path = next(p for p in (stage / name, stage / "student" / name) if p.is_file())
    require_whole(stage / "student")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.unlink()  # the teacher has a link to it
    path.write_bytes(data)
    code = main([command, "--model", str(stage / "student"), *more])
    said = capsys.readouterr().err
    assert code == 2 and f"{path} is damaged or was changed; run `vpae equilibrium`, which" in said
    assert not list(tmp_path.glob("c.mp4")) and not list(tmp_path.glob("e"))
    shutil.copytree(stage / "student", tmp_path / "mine")
    require_whole(tmp_path / "mine")  # nobody's but the user's


@pytest.mark.parametrize(
    ("has", "said"), [({"shift": SHIFT}, False), ({"flow_shift": 5.0, "shift": SHIFT}, True), ({"shift": 5}, True)]
)
def test_a_shift_other_than_that_of_the_folder_s_scheduler_is_said(has, said, teacher, tmp_path, capsys):
    shutil.copytree(teacher, tmp_path / "copy")
    configured("scheduler/scheduler_config.json", **has)(tmp_path / "copy")
    overrides = ["teacher.source=folder", f"teacher.path={tmp_path / 'copy'}", f"teacher.shift={SHIFT}"]
    settings = load(Path("configs/micro.yaml"), overrides).settings
    (tmp_path / "out").mkdir()
    stage.run(settings, {}, tmp_path / "out", tmp_path / "state")
    assert ("and the scheduler of" in capsys.readouterr().err) == said
