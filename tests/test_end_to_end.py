"""The micro experiment through every stage, as a user runs it; what others rely on by name; and being killed."""

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file

from conftest import STAGES
from started import Started
from vpae.artifacts import ArtifactError, file_hashes, read_provenance, write_json
from vpae.cli import main
from vpae.data.catalog import read_truth
from vpae.data.encoding import Encoders
from vpae.data.latents import LatentDataset
from vpae.data.manifest import read_manifest
from vpae.evaluation import motions
from vpae.evaluation.probe import main as probe
from vpae.evaluation.stage import METRICS
from vpae.experiment import ConfigError, load
from vpae.graph import stages_of
from vpae.models.wan import load_pipeline
from vpae.planning.presence import missing
from vpae.preemption import Interruption
from vpae.stages import run_stage
from vpae.teacher.stage import _encoded

CONFIG = Path(__file__).parents[1] / "configs" / "micro.yaml"
PATIENCE = 900  # seconds that a stage may take
ROWS = {"real", "teacher-100nfe", "teacher-1nfe", "priming-1nfe", "vpae-1nfe", "vpae-2nfe", "vpae-4nfe"}


@pytest.fixture(scope="module")
def results(finished_micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro experiment with all its stages."""
    return shutil.copytree(finished_micro, tmp_path_factory.mktemp("micro") / "results") / "micro"


def test_scores_have_the_promised_rows_and_metrics(results):
    rows = json.loads((results / "evaluation/scores.json").read_text())["rows"]
    assert set(rows) == ROWS
    for name, metrics in rows.items():
        wanted = set(METRICS) - {"c2st"} - ({"latency_diffusion_s", "latency_total_s"} if name == "real" else set())
        assert set(metrics) == wanted
        for value in metrics.values():
            assert set(value) == {"mean", "low", "high"}
            assert np.isfinite(list(value.values())).all()


def test_a_teacher_is_trained_further_on_other_clips(results, tmp_path):
    """Only what is named changes, the transformer by next to nothing when the rate is next to nothing."""
    start = results / "teacher"
    settings = {
        "seed": 9,
        "clips": {"source": "world", "train": 4, "held_out": 8, "workers": 1},
        "teacher": {
            "source": "train",
            "start": str(start),
            "transformer": {
                "training": {"steps": 1, "batch_size": 2},
                "optimizer": {"learning_rate": 1e-6, "warmup_steps": 0},
            },
        },
    }
    config = tmp_path / "further.yaml"
    config.write_text(yaml.safe_dump({"extends": str(CONFIG.with_suffix("")), **settings}))
    for stage in ("clips", "teacher"):
        run_stage(load(config), stage, tmp_path)
    made = tmp_path / "further/teacher"
    before, after = (load_file(p / "transformer/diffusion_pytorch_model.safetensors") for p in (start, made))
    assert not all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6)
    for part in ("vae", "text_encoder", "image_encoder", "tokenizer"):
        assert file_hashes(made / part) == file_hashes(start / part)

    settings["teacher"]["further"] = ["transformer", "text_encoder"]
    config.write_text(yaml.safe_dump({"extends": str(CONFIG.with_suffix("")), **settings}))
    run_stage(load(config), "teacher", tmp_path)
    before, after = (load_file(p / "text_encoder/model.safetensors") for p in (start, made))
    assert not all(torch.equal(before[name], after[name]) for name in before)
    for part in ("vae", "image_encoder", "tokenizer"):
        assert file_hashes(made / part) == file_hashes(start / part)

    other = {"shift": 8.0, "transformer": {"layers": 7}}
    for key, value in other.items():
        wrong = {**settings, "teacher": {**settings["teacher"], key: value}}
        config.write_text(yaml.safe_dump({"extends": str(CONFIG.with_suffix("")), **wrong}))
        with pytest.raises(ConfigError, match=f"teacher.{key}.*train anew without teacher.start"):
            run_stage(load(config), "teacher", tmp_path)


def test_a_signal_while_the_teacher_encodes_its_clips_is_heeded_at_once(results, tmp_path, monkeypatch):
    """The encoding is the loop's first batch: the loop itself would see the signal only after it, minutes later."""
    encoded = []

    def first_then_signal(self, frames):
        encoded.append(len(frames))
        signal.raise_signal(signal.SIGTERM)
        return videos(self, frames)

    videos = Encoders.videos
    monkeypatch.setattr(Encoders, "videos", first_then_signal)
    settings = {
        "clips": {"source": "world", "train": 33, "held_out": 8, "workers": 1},
        "teacher": {"source": "train", "start": str(results / "teacher")},
    }
    config = tmp_path / "asked.yaml"
    config.write_text(yaml.safe_dump({"extends": str(CONFIG.with_suffix("")), **settings}))
    run_stage(load(config), "clips", tmp_path)
    with pytest.raises(Interruption, match="teacher/encode"):
        run_stage(load(config), "teacher", tmp_path)
    assert len(encoded) == 1


def test_clips_that_were_encoded_for_the_teacher_are_not_encoded_again(results, tmp_path, monkeypatch):
    settings = load(CONFIG, ["teacher.transformer.training.batch_size=3"]).settings
    folder = results / "clips"
    clips, encoders = read_manifest(folder, "train")[:4], Encoders(load_pipeline(results / "teacher"))
    frames = np.stack([clip.frames(settings.geometry, folder) for clip in clips])
    x0, condition = _encoded(frames, clips, encoders, settings, tmp_path)(0)
    monkeypatch.setattr(Encoders, "videos", None)
    again, condition_again = _encoded(frames, clips, encoders, settings, tmp_path)(0)
    assert again.equal(x0) and condition_again.text_BLD.equal(condition.text_BLD)


def test_vbench_is_measured_for_every_row_and_shown(results):
    content = json.loads((results / "evaluation/vbench.json").read_text())
    decoded = load(CONFIG).settings.samples.decode
    assert set(content["rows"]) == ROWS and content["note"].endswith("not comparable with published scores")
    for name, row in content["rows"].items():
        for dimension, found in row["dimensions"].items():
            if dimension == "aesthetic_quality":
                assert found["value"] is None and found["reason"].startswith("not computed: ")
            elif dimension == "camera_motion":  # the world's captions ask for no movement of the camera
                assert found["value"] is None and found["reason"]
            else:
                assert 0 <= found["value"] <= 1 + 1e-6 and found["videos"] == found["expected"] == decoded
        tree = json.loads((results / f"evaluation/vbench/{name}_eval_results.json").read_text())
        assert tree["i2v_subject"][0] == row["dimensions"]["i2v_subject"]["value"]
    ranks = content["rank_correlation"]["imaging_quality"]
    assert set(ranks) == {"frechet", "motion", "single_sprite", "caption_following", "identity", "path_smoothness"}
    assert all(value is None or -1 <= value <= 1 for found in ranks.values() for value in found.values())
    page = (results / "report/index.html").read_text()
    assert 'id="vbench"' in page and "Tiny backbones, not comparable with published scores." in page


def test_a_hundred_evaluations_take_many_times_as_long_as_one(results):
    rows = json.loads((results / "evaluation/scores.json").read_text())["rows"]
    ratio = rows["teacher-100nfe"]["latency_diffusion_s"]["mean"] / rows["vpae-1nfe"]["latency_diffusion_s"]["mean"]
    assert ratio > 30  # about 100; a shared machine is noisy


def test_every_stage_has_its_provenance(results):
    for stage in STAGES:
        provenance = read_provenance(results / stage)
        assert provenance["outputs"] == file_hashes(results / stage)
        assert provenance["settings"]["seed"] == 0


def test_samples_are_named_by_prompt_and_index_and_do_not_depend_on_the_batch_size(results, tmp_path):
    suite = [json.loads(line) for line in (results / "samples/suite.jsonl").read_text().splitlines()]
    assert suite[0]["file"] == f"{suite[0]['prompt']}-{suite[0]['index']}.mp4"
    assert (results / "samples/vpae-1nfe" / suite[0]["file"]).is_file()
    assert len({item["file"] for item in suite}) == len(suite)
    other = tmp_path / "micro"
    other.mkdir()
    for stage in ("clips", "teacher", "latents", "priming", "equilibrium"):
        (other / stage).symlink_to(results / stage)
    run_stage(load(CONFIG, ["samples.batch_size=3"]), "samples", tmp_path)
    for row in ("teacher-1nfe", "vpae-4nfe"):
        from safetensors.torch import load_file

        one, two = (load_file(f / "samples" / row / "latents.safetensors")["x0"] for f in (results, other))
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_running_a_finished_stage_again_does_nothing(results):
    before = (results / "priming/provenance.json").stat().st_mtime_ns
    run_stage(load(CONFIG), "priming", results.parent)
    assert (results / "priming/provenance.json").stat().st_mtime_ns == before


def test_the_student_is_a_pipeline_and_vpae_sample_is_its_single_step(results, tmp_path):
    student = results / "equilibrium/student"
    image = tmp_path / "first.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(image)
    arguments = [
        "--model",
        student,
        "--image",
        image,
        "--prompt",
        "a small red circle moves",
        "--steps",
        1,
        "--seed",
        7,
    ]
    outputs = ["--out", tmp_path / "clip.mp4", "--frames", tmp_path / "frames.npy"]
    assert main(["sample", *map(str, [*arguments, *outputs])]) == 0
    frames = np.load(tmp_path / "frames.npy")
    assert frames.dtype == np.uint8 and frames.shape == (5, 32, 32, 3)
    assert (tmp_path / "clip.mp4").stat().st_size > 0

    pipeline = WanImageToVideoPipeline.from_pretrained(student)
    video = pipeline(
        image=Image.open(image),
        prompt="a small red circle moves",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
    ).frames[0]
    assert np.abs(np.rint(video * 255).astype(int) - frames).max() <= 1


def test_the_probe_trains_as_the_stage_does_and_measures_on_the_way(results, capsys):
    arguments = ["priming", "--config", str(CONFIG), "--results", str(results.parent), "--every", "1", "--clips", "4"]
    assert probe(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["frechet_ema"] == lines[0]["frechet_raw"] != lines[2]["frechet_raw"]
    logged = [json.loads(line) for line in (results / "priming/metrics.jsonl").read_text().splitlines()]
    assert [line["generator_loss"] for line in lines[1:]] == [line["generator_loss"] for line in logged]


def test_captions_by_motion_are_parts_of_the_score(results, capsys):
    assert motions.main(["--config", str(CONFIG), "--results", str(results.parent)]) == 0
    head, _, *lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    rows = json.loads((results / "evaluation/scores.json").read_text())["rows"]
    assert [line[0] for line in lines] == list(rows)
    for line in lines:
        cells = dict(zip(head, line, strict=True))
        parts = [[float(v) for v in cells[kind].split(" of ")] for kind in motions.KINDS if " of " in cells[kind]]
        followed, videos = sum(share * n for share, n in parts), sum(n for _, n in parts)
        assert followed / videos == pytest.approx(rows[cells["row"]]["caption_following"]["mean"], abs=1e-3)
        assert float(cells["identity"]) == pytest.approx(rows[cells["row"]]["identity"]["mean"], abs=1e-3)


def test_a_redrawn_video_depends_on_its_clip_and_noise_alone(results):
    dataset, truths = LatentDataset(results / "latents", "held_out"), read_truth(results / "clips")
    student = results / "priming/student"
    twice = motions.redraw(student, dataset, truths, motions.KINDS, 2, 3.0)
    assert len(twice) == 2 * len(dataset)
    for kind in {motions.kind_of(truth) for truth, _ in twice}:
        alone = motions.redraw(student, dataset, truths, (kind,), 2, 3.0)
        among = [video for truth, video in twice if motions.kind_of(truth) == kind]
        assert len(alone) == len(among) < len(twice)
        for (_, video), other in zip(alone, among, strict=True):
            torch.testing.assert_close(video, other)
    first, second = twice[0][1], twice[len(dataset)][1]
    assert twice[0][0] == twice[len(dataset)][0]
    assert (first - second).abs().max() > 1e-3


def test_students_are_drawn_anew(results, capsys):
    student = str(results / "priming/student")
    arguments = [student, "--config", str(CONFIG), "--results", str(results.parent), "--noises", "2", "--kinds"]
    assert motions.main([*arguments, *motions.KINDS]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert student in line
    videos = [int(cell.split(" of ")[1]) for cell in line.split("|") if " of " in cell]
    assert sum(videos) == 2 * len(LatentDataset(results / "latents", "held_out"))


def test_captions_by_motion_need_an_evaluation(tmp_path, capsys):
    assert motions.main(["--config", str(CONFIG), "--results", str(tmp_path)]) == 2
    assert "run its stage" in capsys.readouterr().err


def test_sample_says_what_is_missing(tmp_path, capsys):
    arguments = ["sample", "--model", str(tmp_path), "--image", "no.png", "--prompt", "x", "--out", "o.mp4"]
    assert main(arguments) == 2
    assert "no.png" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(results, tmp_path):
    folder = tmp_path / "micro"
    folder.mkdir()
    for stage in ("clips", "teacher", "latents"):
        (folder / stage).symlink_to(results / stage)
    words = ["priming", "--config", str(CONFIG), "--results", str(tmp_path)]
    process = Started(words, tmp_path)
    while not process.ends_within(0.02) and not list(folder.glob(".state/priming-*/step-00000001")):
        pass
    process.kill(signal.SIGKILL)
    killed = process.finish(PATIENCE)[0] == -signal.SIGKILL
    code, said = Started(words, tmp_path).finish(PATIENCE)
    assert code == 0, said
    assert not killed or re.search(r"priming: goes on after step \d of", said)
    weights = "student/transformer/diffusion_pytorch_model.safetensors"
    again, uninterrupted = (file_hashes(f / "priming") for f in (folder, results))
    assert again[weights] == uninterrupted[weights]
    assert again["fake_lora.safetensors"] == uninterrupted["fake_lora.safetensors"]
    assert not list(folder.glob(".priming.tmp")) and not list(folder.glob(".state/priming-*"))


def test_a_student_from_elsewhere_makes_the_videos_that_it_made_where_it_was_trained(results, tmp_path):
    shutil.copytree(results / "equilibrium", tmp_path / "students/found")
    content = {
        "extends": "micro",
        "methods": [],
        "students": {"found": str(tmp_path / "students/found")},
        "samples": {"rows": dict.fromkeys(ROWS - {"real"}) | {"found-1nfe": {"model": "found", "steps": 1}}},
    }
    (tmp_path / "micro.yaml").write_text(CONFIG.read_text())
    (tmp_path / "shipped.yaml").write_text(yaml.safe_dump(content))
    source = load(tmp_path / "shipped.yaml")
    for stage in stages_of(source.settings):
        run_stage(source, stage, results.parent)
    made = load_file(results.parent / "shipped/samples/found-1nfe/latents.safetensors")["x0"]
    assert made.equal(load_file(results / "samples/vpae-1nfe/latents.safetensors")["x0"])
    own = {p.name for p in (results.parent / "shipped").iterdir() if not p.name.startswith(".")}
    assert own == {"samples", "evaluation", "report"}  # what stands before them is micro's
    assert "found" in (results.parent / "shipped/report/index.html").read_text()

    note = tmp_path / "students/found/provenance.json"
    known = json.loads(note.read_text())
    shutil.rmtree(results.parent / "shipped/samples")
    encoders = {name: "another" for name in known["outputs"] if name.startswith("student/vae/")}
    write_json(note, {**known, "outputs": {**known["outputs"], **encoders}})
    with pytest.raises(ConfigError, match=r"students\.found: .*/found was trained with another VAE"):
        run_stage(source, "samples", results.parent)
    write_json(note, {**known, "settings": {**known["settings"], "teacher": {"shift": 7.0}}})
    assert "trained with teacher.shift = 7" in missing(source)[0]
    write_json(note, known)
    weights = tmp_path / "students/found/student/transformer/diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"students/found/student/.*safetensors is damaged; bring it once more"):
        run_stage(source, "samples", results.parent)
    shutil.rmtree(tmp_path / "students")
    assert "students.found: " in missing(source)[0]
    with pytest.raises(ConfigError, match=r"students\.found: .*/found is no finished folder .* `dvc pull`"):
        run_stage(source, "samples", results.parent)


@pytest.mark.parametrize("name", ["teacher", "equilibrium", "dmd2", "latents", "samples"])
def test_a_student_from_elsewhere_has_a_name_of_its_own(name):
    with pytest.raises(ConfigError, match=rf"students\.{name}: "):
        load(CONFIG, [f"students.{name}=data/students/micro"])
