"""The report holds everything the stages have found, needs nothing from outside, and looks like a page in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
import weakref
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conftest import STAGES, build_vae
from vpae.artifacts import building, identity, write_json
from vpae.config import Experiment
from vpae.data.video import write_video
from vpae.data.world import Truth, draw_truth, render
from vpae.distill import METHODS
from vpae.evaluation.truth import METRICS
from vpae.experiment import load
from vpae.graph import stage_settings, upstream
from vpae.models.wan import decode_latents
from vpae.report import looks, page, plots

CONFIG = Path(__file__).parents[1] / "configs" / "micro.yaml"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
T, SIZE = 9, 64
BLUR = {"real": 1, "teacher-100nfe": 1, "teacher-1nfe": 5, "priming-1nfe": 3}  # futures blended into a video


def experiment(clips: int, *overrides: str) -> Experiment:
    geometry = [f"geometry.frames={T}", f"geometry.height={SIZE}", f"geometry.width={SIZE}"]
    return load(CONFIG, [*geometry, f"report.clips={clips}", *overrides], environment=False).settings


def world(number: int) -> Truth:
    return draw_truth((7, number), T, 1.0, 0.4, 0.25)


def futures(number: int, blend: int, row: int) -> np.ndarray:
    """The mean of several futures of one first frame: what a model that regresses to the mean would make."""
    videos = []
    for drift in np.random.default_rng((number, row)).uniform(-0.2, 0.2, (blend, 2)):
        truth = world(number)
        way = np.array(truth.sprite.centres_T2) + np.linspace(0, 1, T)[:, None] * drift
        sprite = replace(truth.sprite, centres_T2=way.tolist())
        videos.append(render(replace(truth, sprite=sprite), SIZE, SIZE).astype(float))
    return np.rint(np.mean(videos, axis=0)).astype(np.uint8)


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": 0.9 * mean, "high": 1.1 * mean}


def write_samples(settings: Experiment, rows: list[str], out: Path) -> None:
    suite = []
    for i in range(settings.samples.decode):
        prompt = world(i).caption
        suite.append({"key": f"held_out-{i:06d}", "prompt": prompt, "index": i, "file": f"{prompt}-{i}.mp4", "seed": i})
        for number, row in enumerate(rows):
            (out / row).mkdir(exist_ok=True)
            write_video(out / row / suite[-1]["file"], futures(i, BLUR.get(row, 1), number), fps=8, crf=10)
    (out / "suite.jsonl").write_text("".join(json.dumps(item) + "\n" for item in suite))


def write_scores(settings: Experiment, rows: list[str], out: Path) -> None:
    rng = np.random.default_rng(1)
    nfe = {name: row.nfe for name, row in settings.samples.rows.items()}
    scores = {row: {m: interval(rng.uniform(0.02, 0.98)) for m in ("frechet", *METRICS)} for row in rows}
    for row in rows[1:]:
        scores[row] |= {"latency_diffusion_s": interval(0.021 * nfe[row])}
        scores[row] |= {"latency_total_s": interval(0.021 * nfe[row] + 0.17)}
    count = {"videos": settings.samples.count, "decoded": settings.samples.decode}
    write_json(out / "scores.json", {"rows": scores, "nfe": nfe, **count})


def write_metrics(phase: str, steps: int, out: Path) -> None:
    keys = {key for panel in METHODS[phase].panels for key in panel.curves}
    rng = np.random.default_rng(len(phase))
    lines = [{"step": s + 1} | {k: float(1 + np.exp(-s / 30) + rng.normal(0, 0.1)) for k in keys} for s in range(steps)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_stages(root: Path, settings: Experiment, steps: int = 2) -> dict[str, Path]:
    """Folders as the stages leave them, of which only what the report reads is filled."""
    rows = ["real", *settings.samples.rows]
    folders = {stage: root / "micro" / stage for stage in STAGES[:-1]}
    for stage, folder in folders.items():
        digests = {name: identity(folders[name]) for name in upstream(settings, stage)}
        with building(folder, stage_settings(settings, stage), digests) as (out, counts):
            counts["made_by"] = f"a test of {stage}"
            if stage == "samples":
                write_samples(settings, rows, out)
            elif stage == "evaluation":
                write_scores(settings, rows, out)
            elif stage in METHODS:
                write_metrics(stage, steps, out)
                if stage == "priming":
                    counts |= {"seconds_per_step": 0.25, "tokens_per_second": 1200.0}
            else:
                (out / "anything.txt").write_text(stage)
    return folders


def make_report(root: Path, settings: Experiment, steps: int = 2) -> tuple[dict[str, Path], Path]:
    folders, out = make_stages(root, settings, steps), root / "micro" / "report"
    out.mkdir()
    page.run(settings, folders, out, root / "state")
    return folders, out


class Reader(HTMLParser):
    """What a page refers to (tag, attribute, address), and which tags it uses."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[tuple[str, str, str]] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [(tag, key, value) for key, value in attrs if key in ("src", "href", "srcset", "data", "poster")]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Experiment, dict[str, Path], Path]:
    settings = experiment(3)
    return settings, *make_report(tmp_path_factory.mktemp("results"), settings)


@pytest.fixture(scope="module")
def text(made) -> str:
    return (made[2] / "index.html").read_text(encoding="utf-8")


def test_every_score_is_in_the_table(made, text):
    scores = json.loads((made[1]["evaluation"] / "scores.json").read_text())
    table = re.search(r'<table id="scores">(.*?)</table>', text, re.S)[1]
    found = {re.search(r"<th>(.*?)<", row)[1]: row for row in table.split("<tr")[2:]}
    assert list(found) == list(scores["rows"])
    for name, metrics in scores["rows"].items():
        cells = [unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", found[name], re.S)]
        for metric, value in metrics.items():
            if metric.startswith("latency"):
                form = f"{value['mean']:.2f} s" if value["mean"] >= 1 else f"{1000 * value['mean']:.3g}"
            else:
                form = f"{value['mean']:.3f}<small>{value['low']:.3f}–{value['high']:.3f}"
            assert any(cell.startswith(form) for cell in cells), (name, metric, form, cells)
        assert cells[0] == str(scores["nfe"].get(name, ""))
    assert "100×" in found["vpae-1nfe"]


def test_times_that_other_work_disturbed_are_said_to_be():
    idle, busy = ({"latency_diffusion_s": {"mean": mean, "low": 0.02, "high": 0.7}} for mean in (0.021, 0.128))
    assert page.disturbed({"real": {}, "teacher-1nfe": idle, "vpae-1nfe": busy}) == ["vpae-1nfe"]


def test_prompts_and_first_clips(made, text):
    lines = (made[1]["samples"] / "suite.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    shown = [unescape(prompt) for prompt in re.findall(r'<div class="prompt">(.*?)</div>', text)]
    assert shown == prompts[:3] and len(prompts) > 3


def test_provenance_of_every_stage(made, text):
    for stage, folder in made[1].items():
        section = re.search(rf'id="provenance-{stage}">(.*?)</details>', text, re.S)[1]
        provenance = json.loads((folder / "provenance.json").read_text())
        stated = [identity(folder), *provenance["inputs"].values(), provenance["host"]["device"], f"a test of {stage}"]
        stated += [f"{name} {version}" for name, version in provenance["packages"].items()]
        assert all(str(value) in unescape(section) for value in stated), stage
        assert "seed: 0" in section


def test_nothing_is_requested_from_elsewhere(text):
    reader = Reader(text)
    # A link to the paper is all: the rest is in the page.
    assert {(tag, key) for tag, key, value in reader.links if not value.startswith("data:")} == {("a", "href")}
    assert not {"script", "iframe", "object", "embed"} & reader.tags
    assert "@import" not in text and "url(" not in text
    assert len(text) < 10e6


def test_images_load_and_move(made, text):
    contents = [re.fullmatch(r"data:(image/[a-z+]+);base64,(.*)", v) for t, k, v in Reader(text).links if t == "img"]
    sheets = 0
    for match in contents:
        content = base64.b64decode(match[2])
        if match[1] == "image/svg+xml":
            assert ElementTree.fromstring(content).tag.endswith("svg")
            continue
        with Image.open(io.BytesIO(content)) as sheet:
            frames = np.asarray(sheet.convert("RGB")).reshape(T, SIZE, SIZE, 3).astype(int)
        assert np.abs(frames[-1] - frames[0]).max() > 50
        sheets += 1
    assert sheets == 3 * len(["real", *made[0].samples.rows]) and len(contents) == sheets + 2


def test_the_speed_of_training_is_shown_where_it_was_measured(made, text):
    assert "Median: 0.25 s a step, 1,200 tokens a second." in text and text.count("Median:") == 1


@pytest.mark.slow
def test_a_method_whose_monitor_kept_videos_has_a_picture_with_a_row_for_each_look(made, tmp_path, monkeypatch):
    settings, stages, _ = made
    shutil.copytree(stages["priming"], tmp_path / "micro/priming")
    (tmp_path / "micro/priming/looks").mkdir()
    vae, loads = build_vae(), []
    x0 = torch.randn(3, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for step in (0, 20, 40):  # the first look was drawn again with another of them
        kept = torch.cat([x0, x0[:1]]) if step == 0 else x0
        save_file({"x0": kept + step / 40}, tmp_path / f"micro/priming/looks/{step:08d}.safetensors")
    monkeypatch.setattr(looks, "load_vae", lambda folder, config: loads.append(folder) or vae)
    (out := tmp_path / "micro/report").mkdir()
    page.run(settings, {**stages, "priming": tmp_path / "micro/priming"}, out, tmp_path / "state")
    text = (out / "index.html").read_text(encoding="utf-8")
    found = re.findall(r'<img src="(data:image/png;base64,[^"]+)" alt="([^"]+)">', text)
    with torch.no_grad():
        videos = {s: [decode_latents(vae, x[None] + s / 40)[0].numpy() for x in x0] for s in (0, 20, 40)}
    captions = [json.loads(line)["prompt"] for line in (stages["samples"] / "suite.jsonl").read_text().splitlines()]
    rows = {f"step {step}": (clips, "") for step, clips in videos.items()}
    expected = plots.picture(plots.strip(rows, captions[:3]))
    assert found == [(expected, "priming at steps 0, 20, 40")] and loads == [stages["teacher"]]


@pytest.mark.parametrize("caption", ["two\nlines", "line\r\nbreaks\n", "a " * 2000, ""])
def test_a_strip_takes_captions_of_any_shape(caption):
    clip = np.zeros((5, 32, 32, 3), np.uint8)
    assert plots.strip({"real": ([clip], "")}, [caption]).width > 100


def test_few_clips_are_held_at_a_time():
    alive = []

    def make(seed: int) -> np.ndarray:
        clip = np.random.default_rng(seed).integers(0, 255, (81, 60, 104, 3), dtype=np.uint8)
        assert sum(one() is not None for one in alive) <= 1
        alive.append(weakref.ref(clip))
        return clip

    videos = {row: plots.Clips(make, range(2)) for row in "abcdefg"}
    assert plots.reel(videos, 16.0)["frames"] == 41
    shown = plots.strip({row: (clips, "") for row, clips in videos.items()}, ["a caption"] * 2)
    assert shown.width > 100 and len(alive) >= 2 * 7 * 2


def test_without_kept_videos_no_network_is_loaded(made, text):
    assert "image/png" not in text


def test_strip_shows_the_four_rows(made):
    with Image.open(made[2] / "strip.png") as strip:
        pixels = np.asarray(strip.convert("RGB"))
    assert 1000 < pixels.shape[1] < 2000 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_rows_and_metrics_may_be_missing(tmp_path):
    settings = experiment(1)
    samples = settings.samples.model_copy(update={"rows": {"own": settings.samples.rows["vpae-2nfe"]}})
    settings = settings.model_copy(update={"samples": samples})
    folders = make_stages(tmp_path, settings)
    scores = folders["evaluation"] / "scores.json"
    write_json(scores, json.loads(scores.read_text()) | {"rows": {"real": {}, "own": {"my_metric": interval(0.5)}}})
    for phase in settings.methods:
        (folders[phase] / "metrics.jsonl").write_text('{"step": 1, "other": 0.5}\n')
    page.run(settings, folders, tmp_path, tmp_path / "state")
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "my_metric" in text and "Phase I:" not in text and "Speed-up" not in text


@pytest.mark.parametrize("panel", METHODS["equilibrium"].panels, ids=lambda panel: panel.title)
def test_every_curve_that_was_logged_is_drawn_and_a_term_that_is_off_has_none(panel):
    everything = svg([panel], panel.curves)
    for left_out in panel.curves if len(panel.curves) > 1 else ():
        some = svg([panel], panel.curves.keys() - {left_out})
        assert some.count("<path") < everything.count("<path")
    for key in panel.curves:
        assert svg([panel], [key])


def svg(panels, keys) -> str:
    lines = [{"step": step, **dict.fromkeys(keys, float(step))} for step in range(1, 4)]
    return base64.b64decode(plots.curves(panels, lines).split(",")[1]).decode()


@pytest.mark.parametrize(("height", "width", "rows"), [(832, 480, 1), (640, 640, 2)])
def test_tall_videos_fit_the_format_of_their_sheets(height, width, rows):
    reel = plots.reel({name: [np.zeros((81, height, width, 3), np.uint8)] for name in "ab"[:rows]}, 16.0)
    with Image.open(io.BytesIO(base64.b64decode(reel["sheets"]["a"][0].split(",")[1]))) as sheet:
        assert sheet.size[1] % reel["frames"] == 0 and reel["frames"] > 10


def test_smooth_keeps_a_constant_and_its_length():
    assert np.allclose(plots.smooth(np.full(101, 3.0)), 3.0)
    assert len(plots.smooth(np.zeros(1))) == 1
    noise = np.random.default_rng(0).normal(size=1000)
    assert plots.smooth(noise).std() < 0.25


def test_long_and_wide_videos_are_thinned_out(tmp_path):
    video = np.random.default_rng(0).integers(0, 255, (81, 120, 208, 3), dtype=np.uint8)
    reel = plots.reel({name: [video] for name in "abcdefg"}, 16.0)
    assert (reel["frames"], reel["seconds"]) == (41, 81 / 16)
    with Image.open(io.BytesIO(base64.b64decode(reel["sheets"]["a"][0].split(",")[1]))) as sheet:
        assert sheet.size == (reel["width"], reel["height"] * reel["frames"])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
def test_a_browser_shows_the_page(made, tmp_path):
    size = (1200, 3000)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size[0]},{size[1]}"]
    command += [f"--screenshot={tmp_path / 'page.png'}", (made[2] / "index.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.size == size
        pixels = np.asarray(shot.convert("RGB"))
    ink = np.abs(pixels.astype(int) - pixels[0, 0]).max(-1) > 40
    assert 0.02 < ink.mean() < 0.6
    assert plays(pixels, (made[2] / "index.html").read_text(encoding="utf-8")), "no frame of the first video is visible"


def plays(pixels: np.ndarray, text: str) -> bool:
    """Whether some frame of the first video stands in a screenshot, pixel by pixel, enlarged by a whole factor."""
    source = re.search(r'<img src="data:image/webp;base64,([^"]+)" width="(\d+)"', text)
    with Image.open(io.BytesIO(base64.b64decode(source[1]))) as sheet:
        frames = np.asarray(sheet.convert("RGB")).reshape(T, SIZE, SIZE, 3)
    factor = int(source[2]) // SIZE
    inner = slice(8, -8)  # corners are rounded
    for frame in frames.repeat(factor, 1).repeat(factor, 2)[:, inner, inner]:
        last = len(frame) - 1
        corners = [(y, x) for y in (0, last) for x in (0, last)]
        height, width = (n - last for n in pixels.shape[:2])
        hits = [(pixels[y : y + height, x : x + width] == frame[y, x]).all(-1) for y, x in corners]
        for y, x in np.argwhere(np.logical_and.reduce(hits))[:100]:
            if np.array_equal(pixels[y : y + last + 1, x : x + last + 1], frame):
                return True
    return False
