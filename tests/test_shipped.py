"""What `dvc pull` brings works at once, and has the scores that are committed."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from test_dvc import REAL, Clone
from vpae.data.video import read_frames

ROOT = Path(__file__).parents[1]
BROUGHT = ("data/teachers/tiny.dvc", "data/students/tiny.dvc")


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    clone = Clone(tmp_path_factory.mktemp("shipped") / "project", REAL)
    shutil.copytree(ROOT / "store", clone.folder / "store")
    for name in BROUGHT:
        (clone.folder / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, clone.folder / name)
    clone("dvc", "pull", "--quiet", *BROUGHT)
    return clone


@pytest.mark.slow
def test_the_shipped_student_makes_a_video(pulled: Clone) -> None:
    Image.new("RGB", (64, 64), "white").save(pulled.folder / "first.png")
    arguments = ("--model", "data/students/tiny/student", "--image", "first.png", "--out", "clip.mp4", "--steps", "1")
    pulled("vpae", "sample", *arguments, "--prompt", "a large red circle moves left")
    assert read_frames(pulled.folder / "clip.mp4")[0].shape == (17, 64, 64, 3)


@pytest.mark.slow
def test_the_shipped_student_has_the_scores_that_are_committed(pulled: Clone) -> None:
    pulled("snakemake", "--cores", "2", "--config", "experiment=tiny-shipped", "--", "results/tiny-shipped/report")
    found = json.loads((pulled.folder / "results/tiny-shipped/evaluation/scores.json").read_text())["rows"]
    committed = json.loads((ROOT / "metrics/tiny/scores.json").read_text())
    compared = {
        (row, metric): (value["low"], committed[row][metric], value["high"])
        for row, metrics in found.items()
        for metric, value in metrics.items()
        if row != "real" and not metric.startswith("latency")  # reality is compared with fewer clips there
    }
    assert len(compared) >= 4 * 6
    assert {key: v for key, v in compared.items() if not v[0] <= v[1] <= v[2]} == {}
    page = (pulled.folder / "results/tiny-shipped/report/index.html").read_text()
    assert "vpae sample --model data/students/tiny/student --image" in page
    assert "made before it, in <code>data/students/tiny</code>" in page and "<h2>Training</h2>" not in page
