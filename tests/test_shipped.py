"""What `dvc pull` brings works at once, and has the scores that are committed."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from test_dvc import Clone
from vpae.cli import main
from vpae.data.video import read_frames
from vpae.experiment import load
from vpae.graph import stages_of

ROOT = Path(__file__).parents[1]
BROUGHT = ("data/teachers/tiny.dvc", "data/students/tiny.dvc")


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    clone = Clone(tmp_path_factory.mktemp("shipped") / "project")
    shutil.copytree(ROOT / "store", clone.folder / "store")
    for name in BROUGHT:
        (clone.folder / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, clone.folder / name)
    clone("dvc", "pull", "--quiet", *BROUGHT)
    return clone


@pytest.mark.slow
def test_the_shipped_student_makes_a_video(pulled: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pulled.folder)
    Image.new("RGB", (64, 64), "white").save("first.png")
    arguments = ["--model", "data/students/tiny/student", "--image", "first.png", "--out", "clip.mp4", "--steps", "1"]
    assert main(["sample", *arguments, "--prompt", "a large red circle moves left"]) == 0
    assert read_frames(Path("clip.mp4"))[0].shape == (17, 64, 64, 3)


@pytest.mark.slow
def test_the_shipped_student_has_the_scores_that_are_committed(pulled: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pulled.folder)
    pulled.set(
        "evaluation", {"vbench": {"backbones": "off"}, "latency_warmup": 0, "latency_repeats": 1}, "tiny-shipped"
    )
    config = "configs/tiny-shipped.yaml"
    assert pulled.snakemake_plan("tiny-shipped") == {*stages_of(load(Path(config)).settings)}
    for stage in stages_of(load(Path(config)).settings):
        assert main([stage, "--config", config]) == 0
    found = json.loads(Path("results/tiny-shipped/evaluation/scores.json").read_text())["rows"]
    committed = json.loads((ROOT / "metrics/tiny/scores.json").read_text())
    compared = {
        (row, metric): (value["low"], committed[row][metric], value["high"])
        for row, metrics in found.items()
        for metric, value in metrics.items()
        if row != "real" and not metric.startswith("latency")  # reality is compared with fewer clips there
    }
    assert len(compared) >= 4 * 6
    assert {key: v for key, v in compared.items() if not v[0] <= v[1] <= v[2]} == {}
    page = Path("results/tiny-shipped/report/index.html").read_text()
    assert "vpae sample --model data/students/tiny/student --image" in page
    assert "made before it, in <code>data/students/tiny</code>" in page and "<h2>Training</h2>" not in page
