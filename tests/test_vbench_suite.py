"""Which videos and images a suite asks for; ratios and seeds; weights; and what is said when something is missing."""

import http.server
import importlib.util
import io
import json
import re
import threading
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import synthetic
from vbench_i2v import weights
from vbench_i2v.errors import VBenchError
from vbench_i2v.files import folder_digest, sha256
from vbench_i2v.scores import COLUMNS, OFFICIAL_COUNTS
from vbench_i2v.suite import (
    RATIOS,
    SEED_RULE,
    counts,
    nearest_ratio,
    plan_folder,
    plan_suite,
    read_suite,
    seed_of,
)
from vpae.cli import main
from vpae.config import VBenchFolder, VBenchRows
from vpae.data.video import write_video
from vpae.evaluation.vbench import rows
from vpae.evaluation.vbench.rows import external_inputs

OFFICIAL = Path(__file__).parents[2] / "shared" / "vbench2_i2v_full_info.json"
official = pytest.mark.skipif(not OFFICIAL.is_file(), reason="VBench's own suite is not on this machine")
SUBJECTS, BACKGROUNDS = 2, 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of 2 subjects and 1 background with its seven movements, at the ratio 3-2: 10 prompts, 2 videos each."""
    folder = tmp_path_factory.mktemp("suite")
    synthetic.write(folder, SUBJECTS, BACKGROUNDS, samples=2, frames=3, height=32, width=48)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same suite in a folder from which a test may take things away."""
    for path in made.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(path)
    return tmp_path


def plan(folder: Path, dimensions=COLUMNS, **options):
    prompts = read_suite(folder / synthetic.SUITE)
    return plan_suite(prompts, folder / "videos", folder / "crop", dimensions, samples=2, **options)


@official
def test_the_official_suite_is_read_as_it_is() -> None:
    prompts = read_suite(OFFICIAL)
    assert len(prompts) == 1118
    assert counts(prompts) == OFFICIAL_COUNTS
    assert Counter("camera_motion" in p.dimensions for p in prompts)[True] == 763
    assert {p.image_name.removesuffix(".jpg") for p in prompts} == {p.text.split(", camera ")[0] for p in prompts}


@official
def test_the_synthetic_suite_has_the_official_ones_schema() -> None:
    theirs, ours = json.loads(OFFICIAL.read_text()), synthetic.records(3, 2)
    assert {tuple(record) for record in ours} == {tuple(record) for record in theirs}
    assert {frozenset(r["dimension"]) for r in ours} == {frozenset(r["dimension"]) for r in theirs}


def test_a_plan_has_every_video_of_every_dimension(made: Path) -> None:
    found = plan(made)
    prompts = read_suite(made / synthetic.SUITE)
    assert len(prompts) == SUBJECTS + 8 * BACKGROUNDS
    assert found.expected == counts(prompts, 2) == Counter(name for c in found.clips for name in c.dimensions)
    assert len(found.clips) == 20 and found.missing == () and found.ratio == "3-2"
    for clip in found.clips:
        assert clip.item.video.is_file()
        assert (clip.item.image is None) == (clip.dimensions == ("camera_motion",))
        assert (clip.item.camera is not None) == ("camera_motion" in clip.dimensions)
    assert {c.item.camera for c in found.clips} - {None} == {
        "pan_left", "pan_right", "tilt_up", "tilt_down", "zoom_in", "zoom_out", "static"
    }  # fmt: skip


def test_only_what_is_asked_for_is_needed(copy: Path) -> None:
    """Without camera_motion two thirds of the videos are not needed; without the i2v dimensions no images are."""
    for path in (copy / "videos").glob("*camera*"):
        path.unlink()
    assert len(plan(copy, ["i2v_subject", "imaging_quality"]).clips) == 6
    found = plan_suite(read_suite(copy / synthetic.SUITE), copy / "videos", None, ["imaging_quality"], samples=2)
    assert found.expected == {"imaging_quality": 6}


def test_a_missing_video_is_an_error_with_its_name_and_the_remedy(copy: Path) -> None:
    gone = sorted((copy / "videos").glob("*pans left*"))
    for path in gone:
        path.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        plan(copy)
    message = str(caught.value)
    assert f"2 ({gone[0].name!r}, {gone[1].name!r}) of 20 videos missing" in message and "--allow-incomplete" in message
    found = plan(copy, allow_incomplete=True)
    assert set(found.missing) == {path.name for path in gone}
    assert found.expected["camera_motion"] == 14 and sum("camera_motion" in c.dimensions for c in found.clips) == 12


def test_videos_of_other_names_are_no_suite(copy: Path) -> None:
    for path in (copy / "videos").iterdir():
        path.rename(path.with_stem(path.stem.replace("-", "_")))
    with pytest.raises(FileNotFoundError, match="none of the suite's 20 videos is there"):
        plan(copy, allow_incomplete=True)


def test_missing_images_and_ratios_are_told_apart(copy: Path) -> None:
    image = next((copy / "crop" / "3-2").iterdir())
    image.unlink()
    assert len(plan(copy, allow_incomplete=True).clips) == 20  # measuring leaves out what needs it
    with pytest.raises(FileNotFoundError, match=r"3-2: 1 \('.+'\) of the suite's images missing"):
        plan(copy)
    (copy / "crop" / "3-2").rename(copy / "crop" / "16-9")
    with pytest.raises(FileNotFoundError, match=r"3-2: no images of the ratio 3-2; .* 48 x 32 .*There: 16-9"):
        plan(copy)
    with pytest.raises(FileNotFoundError, match="images missing"):  # as asked for, whatever the videos' size
        plan(copy, ratio="16-9")


def test_images_of_another_shape_are_refused(copy: Path) -> None:
    for path in (copy / "crop" / "3-2").iterdir():
        path.unlink()
        Image.new("RGB", (64, 64)).save(path)
    with pytest.raises(VBenchError, match=r"64 x 64 pixels, .* 48 x 32: another ratio"):
        plan(copy)


def test_one_image_of_another_shape_is_refused_wherever_it_stands(copy: Path) -> None:
    last = sorted((copy / "crop" / "3-2").iterdir())[-1]
    last.unlink()
    Image.new("RGB", (64, 64)).save(last)
    with pytest.raises(VBenchError, match=rf"{re.escape(last.name)} has 64 x 64 pixels"):
        plan(copy)


@pytest.mark.parametrize(
    ("size", "ratio"),
    [((832, 480), "7-4"), ((1280, 720), "16-9"), ((720, 480), "3-2"), ((512, 512), "1-1"), ((768, 480), "8-5")],
)
def test_the_nearest_ratio(size: tuple[int, int], ratio: str) -> None:
    assert nearest_ratio(*size) == ratio
    assert ratio in RATIOS


def test_the_seed_rule() -> None:
    assert (seed_of(0, 0), seed_of(0, 4), seed_of(3, 2)) == (0, 4, 300002)
    assert len({seed_of(i, j) for i in range(1118) for j in range(5)}) == 5590
    assert SEED_RULE.startswith("100000 * i + j")


def test_a_folder_without_a_suite(tmp_path: Path) -> None:
    videos, images = tmp_path / "videos", tmp_path / "images"
    videos.mkdir()
    images.mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    for name in ("a cat-0", "a cat-1", "a house, camera pans left-0"):
        write_video(videos / f"{name}.mp4", frames, 8, 10)
    for name in ("a cat.jpg", "a cat-1.png", "a house, camera pans left.jpeg"):
        Image.fromarray(frames[0]).save(images / name)
    found = plan_folder(videos, images, COLUMNS)
    assert [clip.item.image.name for clip in found.clips] == [
        "a cat.jpg", "a cat-1.png", "a house, camera pans left.jpeg"
    ]  # fmt: skip
    assert found.expected == {name: 1 if name == "camera_motion" else 3 for name in COLUMNS}
    assert found.clips[2].item.camera == "pan_left"
    Image.fromarray(frames[0].repeat(2, axis=1)).save(images / "a cat-1.png")
    with pytest.raises(VBenchError, match=r"a cat-1\.png has 64 x 32 pixels, a cat-1\.mp4 32 x 32: another ratio"):
        plan_folder(videos, images, COLUMNS)
    content = (videos / "a cat-1.mp4").read_bytes()
    (videos / "a cat-1.mp4").write_bytes(content[:99])
    with pytest.raises(VBenchError, match=r"a cat-1\.mp4: unreadable"):
        plan_folder(videos, images, COLUMNS)
    assert len(plan_folder(videos, images, COLUMNS, allow_incomplete=True).clips) == 3  # measuring says so
    (videos / "a cat-1.mp4").write_bytes(content)
    Image.fromarray(frames[0]).save(images / "a cat.png")
    with pytest.raises(VBenchError, match=r"images: .*'a cat\.jpg', 'a cat\.png'.* could all be the image of a cat-0"):
        plan_folder(videos, images, ["i2v_subject"], allow_incomplete=True)
    (images / "a cat.png").unlink()
    (images / "a cat.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"images: 1 \('a cat-0\.mp4'\) of 3 videos without an image"):
        plan_folder(videos, images, COLUMNS)
    assert plan_folder(videos, None, ["dynamic_degree"]).expected == {"dynamic_degree": 3}
    with pytest.raises(FileNotFoundError, match="no folder of images given"):
        plan_folder(videos, None, COLUMNS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r[0].pop("dimension"), "record 0: needs the keys"),
        (lambda r: r[1].update(prompt_en="no camera here"), "record 1: camera_motion needs one of camera pans left"),
        (lambda r: r[2].update(prompt_en="a/b, camera static"), "record 2: .*slash"),
        (lambda r: r[8].update(prompt_en=83 * "\u4e2d"), "record 8: .*more bytes than the 255"),
        (lambda r: r.append(dict(r[0])), "appear twice"),
    ],
    ids=["key", "camera", "slash", "long", "twice"],
)
def test_a_suite_that_is_none_is_refused(change, words: str, tmp_path: Path) -> None:
    records = synthetic.records(1, 1)
    change(records)
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(records))
    with pytest.raises(VBenchError, match=rf"suite\.json: .*{words}|suite\.json: {words}"):
        read_suite(path)


def test_the_shipped_settings_of_a_folder_are_valid() -> None:
    path = Path(__file__).parents[1] / "configs" / "vbench" / "folder.yaml"
    settings = VBenchFolder(**yaml.safe_load(path.read_text()))
    assert settings.backbones == "official" and settings.samples_per_prompt == 5


# Weights


def test_every_dimension_has_its_weights_and_every_file_its_place() -> None:
    assert {name for w in weights.manifest() for name in w.dimensions} == set(COLUMNS)
    assert len({w.file for w in weights.manifest()}) == len(weights.manifest())
    for weight in weights.manifest():
        assert weight.url.startswith("https://") and weight.licence
        assert weight.sha256 is None or set(weight.sha256) <= set("0123456789abcdef")


def test_check_tells_what_is_missing_and_where_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "sa_0_4_vit_l_14_linear.pth").write_bytes(b"x" * 4071)
    (tmp_path / "ViT-B-32.pt").write_bytes(b"too short")
    assert main(["evaluation", "weights", "--check", "--root", str(tmp_path)]) == 2
    printed = capsys.readouterr().out
    for weight in weights.manifest():
        assert weight.file in printed and weight.url in printed and str(tmp_path / weight.file) in printed
    assert "ViT-B-32.pt: 9 bytes instead of 353,976,522" in printed
    assert "sa_0_4_vit_l_14_linear.pth: sha256" in printed
    assert "raft-things.pth: missing" in printed


def test_missing_weights_name_the_dimension_the_file_and_the_remedy(tmp_path: Path) -> None:
    why = weights.absent(tmp_path, ["dynamic_degree", "aesthetic_quality"])
    assert "raft-things.pth (missing)" in why["dynamic_degree"] and "--fetch" in why["dynamic_degree"]
    assert "ViT-L-14.pt" in why["aesthetic_quality"] and "sa_0_4" in why["aesthetic_quality"]


def test_fetch_verifies_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    source.mkdir()
    (source / "plain.pth").write_bytes(b"plain")
    with zipfile.ZipFile(source / "models.zip", "w") as archive:
        archive.writestr("models/inner.pth", b"inner")
    digest = sha256(source / "plain.pth")
    (source / "inner.pth").write_bytes(b"inner")
    plain = weights.Weight("plain.pth", ("dynamic_degree",), (source / "plain.pth").as_uri(), 5, digest, "MIT")
    inner = weights.Weight(
        "inner.pth",
        (),
        (source / "models.zip").as_uri(),
        None,
        sha256(source / "inner.pth")[:8],
        "MIT",
        "models/inner.pth",
    )
    assert weights.fetch(root, [plain, inner]) == (["plain.pth", "inner.pth"], [])
    assert (root / "inner.pth").read_bytes() == b"inner"
    assert weights.fetch(root, [plain, inner]) == ([], [])  # nothing twice

    (root / "plain.pth").write_bytes(b"wrong")
    (source / "plain.pth").write_bytes(b"other")
    fetched, (why,) = weights.fetch(root, [plain])
    assert fetched == [] and re.search(r"plain\.pth: sha256 .* instead of .*nothing was installed", why)
    assert (root / "plain.pth").read_bytes() == b"wrong"
    assert sorted(path.name for path in root.iterdir()) == ["inner.pth", "plain.pth"]

    # A dead address does not keep the rest from coming, and a mirror has the files by their names.
    (source / "plain.pth").unlink()
    (root / "inner.pth").unlink()
    fetched, (why,) = weights.fetch(root, [plain, inner])
    assert fetched == ["inner.pth"] and "plain.pth" in why and "--mirror" in why
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for name, content in (("plain.pth", b"plain"), ("inner.pth", b"inner")):
        (mirror / name).write_bytes(content)
        (root / name).unlink(missing_ok=True)
    assert weights.fetch(root, [plain, inner], f"{mirror.as_uri()}/") == (["plain.pth", "inner.pth"], [])


def test_a_download_that_breaks_off_or_is_a_page_is_not_installed(tmp_path: Path) -> None:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(1000))
    answers = {"/short.pth": (whole.getvalue()[:500], 1000), "/page.pth": (b"<html>gone</html>", 17)}
    answers["/whole.pth"] = (whole.getvalue(), len(whole.getvalue()))

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content, said = answers[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(said))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        files = [weights.Weight(name[1:], (), address + name, None, None, "MIT") for name in answers]
        fetched, failed = weights.fetch(tmp_path, files)
        server.shutdown()
    assert fetched == ["whole.pth"] and sorted(path.name for path in tmp_path.iterdir()) == ["whole.pth"]
    assert "broke off after 500 of 1,000 bytes" in failed[0] and "is no checkpoint of PyTorch's" in failed[1]


def test_what_python_and_the_hub_write_into_a_folder_of_code_is_not_its_content(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text("x = 1\n")
    before = folder_digest(tmp_path)
    (tmp_path / "hub" / "__pycache__").mkdir()
    (tmp_path / "hub" / "__pycache__" / "hubconf.cpython-311.pyc").write_bytes(b"x")
    (tmp_path / "trusted_list").write_text("")
    assert folder_digest(tmp_path) == before
    (tmp_path / "hub" / "hubconf.py").write_text("x = 2\n")
    assert folder_digest(tmp_path) != before


def test_the_stage_runs_again_once_a_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "absent", lambda *_: {})
    there = importlib.util.find_spec
    packages = {"pyiqa": False}

    def find(name: str, *rest: object) -> object:
        return packages[name] or None if name in packages else there(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    config = VBenchRows(backbones="official", dimensions=("imaging_quality", "dynamic_degree"))
    assert external_inputs(config) == {"vbench_weights": "dynamic_degree"}
    packages["pyiqa"] = True
    found = external_inputs(config)
    assert found["vbench_weights"] == "dynamic_degree, imaging_quality"
    monkeypatch.setattr(rows, "version_of", lambda package: f"another {package}")  # torchvision, for one, was repaired
    assert external_inputs(config)["vbench_weights"] == found["vbench_weights"]
    assert external_inputs(config) != found


def test_weights_are_chosen_by_file_and_by_dimension(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = [weight.file for weight in weights.chosen(["raft-things.pth"], ["aesthetic_quality"])]
    assert names == ["ViT-L-14.pt", "sa_0_4_vit_l_14_linear.pth", "raft-things.pth"]
    assert weights.chosen([], []) == list(weights.manifest())
    mirror, root = tmp_path / "mirror", tmp_path / "root"
    mirror.mkdir()
    suite = Path(weights.manifest()[-1].file).name
    command = ["evaluation", "weights", suite, "--root", str(root), "--mirror", mirror.as_uri()]
    assert main([*command, "--fetch"]) == 2
    assert f"not fetched: {mirror.as_uri()}/{suite}" in capsys.readouterr().out
    assert main(["evaluation", "weights", "--check", "--dimensions", "dynamic_degree", "--root", str(root)]) == 2
    printed = capsys.readouterr().out
    assert "raft-things.pth: missing" in printed and "1 of 1 are missing" in printed and "ViT" not in printed
    assert main(["evaluation", "weights", "raft.pth", "--root", str(root)]) == 2
    assert "raft.pth: no such weight file; there are" in capsys.readouterr().err


# Names as people's machines write them


def test_names_are_matched_as_people_write_them(copy: Path) -> None:
    """Hidden files, upper-case suffixes and decomposed letters; what is left over is named."""
    suite = json.loads((copy / synthetic.SUITE).read_text())
    (copy / synthetic.SUITE).unlink()
    old = suite[-1]["prompt_en"]
    new = "\u00e9\u00fc number 9"
    (copy / synthetic.SUITE).write_text(json.dumps(suite).replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1]))
    for path in sorted((copy / "videos").iterdir()):
        if path.name.startswith(old):
            path.rename(path.with_name(unicodedata.normalize("NFD", path.name.replace(old, new)).replace("mp4", "MP4")))
    image = next((copy / "crop" / "3-2").glob(f"{old}.jpg"))
    image.rename(image.with_name(unicodedata.normalize("NFD", new) + ".JPG"))
    for name in ("._a.mp4", ".b.mp4", ".c-0.mp4.tmp"):
        (copy / "videos" / name).write_bytes(b"\0")
    (copy / "crop" / "3-2" / "._x.jpg").write_bytes(b"\0")
    assert plan(copy).extra == ()
    assert plan(copy).missing == () and len(plan(copy).clips) == 20
    some = next((copy / "videos").glob("texture*-0.mp4"))
    for name in (some.stem + ".webm", "texture_0-0.mp4", some.stem[:-1] + "7.mp4"):
        (copy / "videos" / name).write_bytes(b"x")
    found = plan(copy)
    assert set(found.extra) == {some.stem + ".webm", "texture_0-0.mp4", some.stem[:-1] + "7.mp4"}
    (note,) = found.notes()
    assert note.startswith("videos not scored, since nothing asks for them: 3 ('texture")
    (copy / "videos" / some.with_suffix(".MP4").name).write_bytes(b"x")
    with pytest.raises(VBenchError, match="count as one name"):
        plan(copy)


def test_the_folder_takes_what_is_a_video_and_names_the_rest(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    write_video(tmp_path / "a-0.mp4", frames, 8, 10)
    (tmp_path / "a-0.mp4").rename(tmp_path / "A-0.MP4")
    for name in ("._A-0.mp4", ".x.mp4"):
        (tmp_path / name).write_bytes(b"\0")
    (tmp_path / "b-0.mov").write_bytes(b"x")
    Image.fromarray(frames[0]).save(tmp_path / "A.webp")
    found = plan_folder(tmp_path, tmp_path, COLUMNS)
    assert [(c.item.video.name, c.item.image.name) for c in found.clips] == [("A-0.MP4", "A.webp")]
    assert found.extra == ("b-0.mov",)


@pytest.mark.parametrize("which", [0, 1, -1])
@pytest.mark.parametrize("suite", [True, False], ids=["suite", "folder"])
def test_whichever_video_is_damaged_the_rest_can_be_planned(copy: Path, which: int, suite: bool) -> None:
    bad = sorted((copy / "videos").glob("texture number 0-?.mp4"))[which] if suite else None
    images = copy / "crop" / "3-2"
    if not suite:
        bad = sorted((copy / "videos").iterdir())[which]
        for path in (copy / "videos").iterdir():
            Image.new("RGB", (48, 32)).save(images / f"{path.stem}.png")
    content = bad.read_bytes()
    bad.unlink()
    bad.write_bytes(content[: len(content) // 2])

    def planned(tolerant: bool):
        if suite:
            return plan(copy, allow_incomplete=tolerant)
        return plan_folder(copy / "videos", images, ["i2v_subject"], tolerant)

    assert len(planned(True).clips) == 20
    with pytest.raises(VBenchError, match=re.escape(bad.name)):
        planned(False)


def test_a_damaged_image_is_one_videos_reason(copy: Path) -> None:
    for path in (copy / "videos").iterdir():
        Image.new("RGB", (48, 32)).save(copy / f"{path.stem}.png")
    bad = copy / f"{min(p.stem for p in (copy / 'videos').iterdir())}.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(VBenchError, match=re.escape(bad.name)):
        plan_folder(copy / "videos", copy, ["i2v_subject"])
    assert len(plan_folder(copy / "videos", copy, ["i2v_subject"], allow_incomplete=True).clips) == 20
