"""What users really bring: names, tags, damage, kinds of images and arguments that public bug reports are full of."""

import json
import os
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vbench_i2v.images import ImageError, read_image
from vpae.artifacts import ArtifactError, sha256, written
from vpae.bench import decoders
from vpae.cli import main
from vpae.config.experiment import LEAST_VIDEOS
from vpae.data import catalog
from vpae.data.manifest import read_manifest
from vpae.data.names import NAME_BYTES, STEM_BYTES, check_names, file_names
from vpae.data.video import (
    VideoError,
    probe,
    read_clip,
    read_frames,
    read_image_at,
    resize_and_crop,
    write_video,
)
from vpae.evaluation.frechet import frechet
from vpae.evaluation.statistics import jackknife
from vpae.experiment import ConfigError, Source, load
from vpae.stages import run_stage

FRAMES = 12


def moving(height: int = 32, width: int = 32, count: int = FRAMES) -> np.ndarray:
    """Frames (T, H, W, 3) of coloured blocks that move, with grain: enough data in which to find damage."""
    rng = np.random.default_rng(1)
    blocks = np.kron(rng.integers(20, 236, (height // 8, width // 8, 3)), np.ones((8, 8, 1)))
    grain = rng.integers(0, 12, (count, height, width, 3))
    return (np.stack([np.roll(blocks, 2 * i, 1) for i in range(count)]) + grain).astype(np.uint8)


def write_clip(
    path: Path, frames: np.ndarray | None = None, title: str = "", codec: str = "libx264", **container: str
) -> Path:
    """A small H.264 file at 8 frames per second."""
    frames = moving() if frames is None else frames
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(f"file:{path}", "w", options=container) as file:
        if title:
            file.metadata["title"] = title
        stream = file.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = {"crf": "18", "threads": "1"}
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


# D: a path is a path, whatever its characters.

NAMES = [
    "style0: cat.mp4",
    "http:x.mp4",
    "100%d.mp4",
    "a?b#c&d.mp4",
    "-y.mp4",
    "Z\udcfcrich.mp4",
    "日本 'x' \"y\".mp4",
    "%03d.mp4",
]


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_path_is_a_path_whatever_its_characters(
    name: str, relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name) if relative else tmp_path / name
    write_video(path, moving(), 8, crf=18)
    assert os.listdir(tmp_path) == [name]
    assert probe(path).fps == 8
    assert len(read_frames(path)[0]) == FRAMES
    assert read_clip(path, 5, 32, 32, 8).shape == (5, 32, 32, 3)


# B: one file's fault is that file's reason; a bad tag is no fault.


def test_a_clip_with_a_title_that_is_not_utf8_is_usable(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "tagged.mp4", title="Zurich")
    plain = read_frames(path)[0]
    path.write_bytes(path.read_bytes().replace(b"Zurich", b"Z\xfcrich"))
    assert np.array_equal(read_frames(path)[0], plain)
    assert read_clip(path, 5, 32, 32, 8).shape == (5, 32, 32, 3)


@pytest.mark.parametrize("error", [UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad"), OverflowError("x")])
def test_whatever_is_raised_while_a_file_is_read_is_its_reason(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_clip(tmp_path / "clip.mp4")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(av, "open", fail)
    for read in (probe, read_frames, lambda path: read_clip(path, 5, 32, 32, 8)):
        with pytest.raises(VideoError, match=type(error).__name__):
            read(path)


# C: damage is found, and what is whole is not taken for damaged.


def zeros(data: bytes, place: int) -> bytes:
    return data[:place] + bytes(333) + data[place + 333 :]


def cut_out(data: bytes, place: int) -> bytes:
    return data[:place] + data[place + 333 :]


def six_bytes(data: bytes, place: int) -> bytes:
    return (
        data[:place]
        + bytes(byte ^ (place + i) % 255 + 1 for i, byte in enumerate(data[place : place + 6]))
        + data[place + 6 :]
    )


def outcomes(path: Path, spoil: Callable[[bytes, int], bytes], places: int) -> list[str]:
    """What reading says of a clip spoilt at so many places of its pictures: "found", "harmless" or "missed"."""
    whole, frames = path.read_bytes(), read_frames(path)[0].astype(int)
    first = whole.find(b"mdat") + 4 if path.suffix == ".mp4" else 1000
    found = []
    for place in np.linspace(first, len(whole) - 700, places).astype(int):
        path.write_bytes(spoil(whole, int(place)))
        try:
            read = read_frames(path)[0]
        except VideoError:
            found.append("found")
            continue
        same = read.shape == frames.shape and np.abs(read - frames).mean((1, 2, 3)).max() < 1
        found.append("harmless" if same else "missed")
    return found


@pytest.mark.parametrize("spoil", [zeros, cut_out])
@pytest.mark.parametrize(("name", "options"), [("fast.mp4", {"movflags": "faststart"}), ("hole.mkv", {})])
def test_a_hole_in_a_file_is_found_wherever_it_is(name: str, options: dict, spoil: Callable, tmp_path: Path) -> None:
    found = outcomes(write_clip(tmp_path / name, moving(64, 96, 17), **options), spoil, 25)
    assert "missed" not in found and found.count("found") >= 20


@pytest.mark.parametrize(("name", "options"), [("fast.mp4", {"movflags": "faststart"}), ("bytes.mkv", {})])
def test_most_changes_of_six_bytes_are_found(name: str, options: dict, tmp_path: Path) -> None:
    """Not all: a changed arithmetic code can decode to another legal picture. Measured: about 87% at this size."""
    found = outcomes(write_clip(tmp_path / name, moving(240, 320, 9), **options), six_bytes, 40)
    assert found.count("found") >= 0.7 * (40 - found.count("harmless"))


def test_a_file_cut_off_anywhere_is_found(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "fast.mp4", moving(64, 96, 17), movflags="faststart")
    whole, start = path.read_bytes(), path.read_bytes().find(b"mdat")
    for size in np.linspace(start + 8, len(whole) - 1, 20).astype(int):
        path.write_bytes(whole[:size])
        with pytest.raises(VideoError):
            read_clip(path, 17, 64, 96, 8)


CODECS = [
    ("libx264", ".mp4"),
    ("libx264", ".mkv"),
    ("libx264", ".avi"),
    ("libx265", ".mp4"),
    ("libx265", ".mkv"),
    ("mpeg4", ".avi"),
]


@pytest.mark.parametrize(
    ("codec", "suffix"), [*CODECS, ("libvpx-vp9", ".webm"), ("mpeg4", ".mp4"), ("libx264", ".mov")]
)
def test_whole_files_of_every_kind_are_not_taken_for_damaged(codec: str, suffix: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / f"clip{suffix}", moving(64, 96, 17), codec=codec)
    frames, fps = read_frames(path)
    assert len(frames) == 17 and fps == 8
    assert np.abs(frames.astype(int) - moving(64, 96, 17)).mean() < 30


def test_errors_about_one_file_are_heard_about_the_next_one_too(tmp_path: Path) -> None:
    """FFmpeg leaves out what it has just said."""
    path = write_clip(tmp_path / "first.mp4", moving(64, 96, 17), movflags="faststart")
    whole, said = path.read_bytes(), ""
    for place in range(len(whole) // 2, len(whole), 50):
        path.write_bytes(six_bytes(whole, place))
        try:
            read_frames(path)
        except VideoError as error:
            said = str(error)
        if "h264: " in said:
            break
    (tmp_path / "second.mp4").write_bytes(path.read_bytes())
    with pytest.raises(VideoError) as caught:
        read_frames(tmp_path / "second.mp4")
    assert str(caught.value) == said and "h264: " in said


# E: one reader of images, and one rule of cropping.


def quarters(height: int = 32, width: int = 32) -> np.ndarray:
    """Red and green above, blue and white below."""
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    return np.kron(colours, np.ones((height // 2, width // 2, 1), np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_upright_whatever_its_exif_orientation(orientation: int, tmp_path: Path) -> None:
    stored = {  # how a camera that was held so stores what it saw
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x),
        7: lambda x: np.rot90(x[:, ::-1], -1)[::-1, ::-1][::-1, ::-1],
        8: lambda x: np.rot90(x, -1),
    }[orientation](quarters(32, 48))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "photo.png")), quarters(32, 48))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled_not_clipped(suffix: str, tmp_path: Path) -> None:
    levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / f"deep{suffix}")
    found = np.asarray(read_image(tmp_path / f"deep{suffix}"))
    assert np.array_equal(found, np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2))


def test_values_of_unknown_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match=r"float\.tif: F values from 0\.0 to 1\.0; save it with 8 or 16 bits"):
        read_image(tmp_path / "float.tif")


def palette_with_transparency() -> Image.Image:
    image = Image.fromarray(np.full((8, 8), 3, np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 9, 9, 9, 1, 1, 1, 255, 0, 0])
    return image


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: Image.new("RGBA", (8, 8), (255, 0, 0, 0)), {}),
        (lambda: Image.new("LA", (8, 8), (0, 0)), {}),
        (palette_with_transparency, {"transparency": 3}),
        (lambda: Image.new("RGB", (8, 8), (255, 0, 0)), {"transparency": (255, 0, 0)}),
    ],
    ids=["RGBA", "LA", "P", "RGB"],
)
def test_colours_that_are_hidden_stay_hidden(make: Callable, options: dict, tmp_path: Path) -> None:
    make().save(tmp_path / "sticker.png", **options)
    assert (np.asarray(read_image(tmp_path / "sticker.png")) == 255).all()


@pytest.mark.parametrize(
    ("codec", "form", "suffix"),
    [
        ("prores_ks", "yuva444p10le", ".mov"),
        ("png", "rgba", ".mov"),
        ("qtrle", "argb", ".mov"),
        ("ffv1", "bgra", ".mkv"),
    ],
)
def test_colours_that_a_video_hides_stay_hidden(codec: str, form: str, suffix: str, tmp_path: Path) -> None:
    pixels = np.full((64, 64, 4), (255, 0, 0, 255), np.uint8)
    pixels[:, :32, 3], pixels[:32, :32, 3] = 51, 0
    with av.open(str(tmp_path / f"sticker{suffix}"), "w") as file:
        stream = file.add_stream(codec, rate=8, width=64, height=64, pix_fmt=form)
        for _ in range(5):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        file.mux(stream.encode())
    found = read_clip(tmp_path / f"sticker{suffix}", 5, 64, 64, 8)[0].astype(int)
    for place, colour in {(8, 8): (255, 255, 255), (56, 8): (255, 204, 204), (8, 56): (255, 0, 0)}.items():
        assert np.abs(found[place] - colour).max() <= 3


def test_half_transparent_colours_are_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 100, 200, 51)).save(tmp_path / "glass.png")  # 51 of 255: a fifth
    assert np.asarray(read_image(tmp_path / "glass.png"))[0, 0].tolist() == [204, 224, 244]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_opaque_images_of_every_mode_keep_their_colours(mode: str, tmp_path: Path) -> None:
    suffix = {"CMYK": ".tif", "YCbCr": ".tif"}.get(mode, ".png")
    Image.fromarray(np.kron(np.array([[0, 255], [255, 0]], np.uint8), np.ones((8, 8), np.uint8))).convert(
        "RGB"
    ).convert(mode).save(tmp_path / f"image{suffix}")
    found = np.asarray(read_image(tmp_path / f"image{suffix}")).astype(int)
    assert found.shape == (16, 16, 3)
    assert np.abs(found[4, [4, 12]] - [[0] * 3, [255] * 3]).max() <= 2


def test_an_image_is_cropped_as_a_clip_is(tmp_path: Path) -> None:
    """A 64 x 128 image for a model of 64 x 64 loses its sides; it is not squashed."""
    frame = moving(64, 128, 1)
    Image.fromarray(frame[0]).save(tmp_path / "wide.png")
    write_clip(tmp_path / "wide.mp4", np.repeat(frame, 6, 0))
    found = np.asarray(read_image_at(tmp_path / "wide.png", 64, 64))
    assert np.array_equal(found, frame[0, :, 32:96])
    assert np.abs(found.astype(int) - read_clip(tmp_path / "wide.mp4", 5, 64, 64, 8)[0]).mean() < 8
    assert np.array_equal(np.asarray(read_image_at(tmp_path / "wide.png", 32, 48)), resize_and_crop(frame, 32, 48)[0])


@pytest.mark.parametrize("fault", ["text", "truncated", "empty", "folder", "absent"])
def test_what_is_no_image_is_named(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "first.png"
    Image.fromarray(moving(64, 64, 1)[0]).save(path)
    whole = path.read_bytes()
    path.unlink()
    if fault == "folder":
        path.mkdir()
    elif fault != "absent":
        path.write_bytes({"text": b"hello", "truncated": whole[: len(whole) // 2], "empty": b""}[fault])
    with pytest.raises(
        (ImageError, FileNotFoundError), match=r"first\.png: (cannot be read as an image|no such image|is a folder)"
    ):
        read_image(path)


# F: `vpae sample` refuses before it loads a network, and names the nearest possible value.


@pytest.fixture
def asked(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run `vpae sample` with these options in place of good ones; a network that is loaded fails the test."""
    monkeypatch.setattr("vpae.sampling.single.load_placed", lambda *_: pytest.fail("a network is loaded"))
    Image.fromarray(moving(32, 32, 1)[0]).save(tmp_path / "first.png")
    good = {"model": teacher, "image": tmp_path / "first.png", "prompt": "x", "out": tmp_path / "clip.mp4"}

    def ask(**options: object) -> int:
        given = {**good, **options}
        return main(["sample", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())])

    return ask


WRONG = [
    ("num_frames", 16, "the nearest is 13 or 17"),
    ("num_frames", 0, "the nearest is 1"),
    ("num_frames", -3, "the nearest is 1"),
    ("num_frames", 2, "the nearest is 1 or 5"),
    ("steps", 0, "the nearest is 1"),
    ("steps", -5, "the nearest is 1"),
    ("guidance", "nan", "must be a finite number"),
    ("guidance", "1e999", "must be a finite number"),
    ("seed", 2**70, f"the nearest is {2**64 - 1}"),
    ("seed", -1, "the nearest is 0"),
    ("prompt", "\udce9", "is not UTF-8 text"),
    ("out", "x", "name it x.mp4"),
    ("out", "x.gif", "name it x.mp4"),
    ("out", ".", "is a folder; name a file in it"),
    ("out", "/dev/null/x.mp4", "/dev/null is no folder that can be written to"),
    ("out", "x" * 250 + ".mp4", "the name has 254 bytes; the most is 245"),
    ("frames", "x.txt", "name it x.npy"),
    ("model", "nowhere", "there is no such folder"),
    ("image", "nowhere.png", "no such image"),
]


@pytest.mark.parametrize(("option", "value", "words"), WRONG, ids=[f"{o}-{str(v)[:20]!a}" for o, v, _ in WRONG])
def test_sample_refuses_what_cannot_be_done_before_a_network_is_loaded(
    asked: Callable[..., int], option: str, value: object, words: str, capsys: pytest.CaptureFixture
) -> None:
    assert asked(**{option: value}) == 2
    said = capsys.readouterr().err
    assert words in said and f"--{option.replace('_', '-')}" in said


@pytest.mark.parametrize("fault", ["text", "truncated"])
def test_sample_refuses_what_is_no_image(
    fault: str, asked: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = (tmp_path / "first.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(b"hello" if fault == "text" else whole[: len(whole) // 2])
    assert asked(image=tmp_path / "bad.png") == 2
    assert "bad.png: cannot be read as an image" in capsys.readouterr().err


def test_an_image_of_too_many_pixels_is_to_be_scaled_and_of_fewer_there_is_no_warning(
    asked: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 799)
    assert asked(image=tmp_path / "large.png") == 2
    assert "large.png: has more than 1598 pixels, the most that is read; scale it down" in capsys.readouterr().err
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "large.png").size == (40, 40)


def test_sample_names_all_faults_at_once(asked: Callable[..., int], capsys: pytest.CaptureFixture) -> None:
    assert asked(steps=0, num_frames=16, out="x") == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_video_that_is_no_numbers_is_not_written(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Black frames and exit code 0 would say that all is well."""
    Image.fromarray(moving(32, 32, 1)[0]).save(tmp_path / "first.png")
    command = ["sample", "--model", teacher, "--image", tmp_path / "first.png", "--prompt", "x", "--num-frames", 5]
    assert main([str(word) for word in [*command, "--guidance", 1e38, "--steps", 2, "--out", tmp_path / "x.mp4"]]) == 2
    assert "no finite numbers" in capsys.readouterr().err
    assert not (tmp_path / "x.mp4").exists()


def test_a_video_is_written_to_any_path(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(moving(32, 32, 1)[0]).save("a: first.png")
    command = ["sample", "--model", str(teacher), "--image", "a: first.png", "--prompt", "x", "--num-frames", "1"]
    assert main([*command, "--out", "Note: x.mp4", "--frames", "new/x.npy"]) == 0
    assert np.load("new/x.npy").shape == (1, 32, 32, 3)
    assert len(read_frames(Path("Note: x.mp4"))[0]) == 1


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_settings_are_finite_numbers(value: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("clips: {source: world}\nteacher: {source: train}\n")
    with pytest.raises(ConfigError, match="finite"):
        load(tmp_path / "x.yaml", [f"priming.guidance_scale={value}"])


# A: names of the files that are made from prompts.

CHINESE = "一只红色的小鸟在蓝天下飞翔" * 14 + "飞翔飞翔"  # 186 characters, 558 bytes
AWKWARD = [
    CHINESE,
    "a" * 200 + "b",
    "a" * 200 + "c",
    "a/b c",
    "a_b c",
    "A_B C",
    "a_b c",
    "",
    ".hidden",
    "a\nb",
    "é",
    "e\u0301",
    "x-1",
    "x",
    "x",
]


def test_names_are_unique_and_bounded_in_bytes_with_every_prefix_and_suffix(tmp_path: Path) -> None:
    names = file_names(AWKWARD)
    assert len({unicodedata.normalize("NFC", name).casefold() for name in names}) == len(AWKWARD)
    for name in names:
        with written(tmp_path / name) as temporary:
            temporary.touch()
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert not [name for name in names if name.startswith(".")]
    assert max(len(name.encode()) for name in names) <= STEM_BYTES + len("-0.mp4")


def test_ordinary_prompts_are_their_own_names_and_equal_ones_are_counted() -> None:
    assert file_names(["a cat.", "a dog", "a cat."]) == ["a cat.-0.mp4", "a dog-0.mp4", "a cat.-1.mp4"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=300), max_size=6))
def test_any_prompts_have_names_that_a_file_system_takes(prompts: list[str]) -> None:
    names = file_names(prompts)
    assert len(set(names)) == len(prompts)
    for name in names:
        assert len(name.encode()) <= NAME_BYTES and not set(name) & {"/", "\0", "\n"} and name[0] != "."
        name.encode().decode()


def test_a_file_system_with_shorter_names_is_refused_when_clips_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plainly = Path.touch

    def touch(path: Path) -> None:
        if len(path.name.encode()) > 143:  # encrypted home folders
            raise OSError(36, "File name too long")
        plainly(path)

    monkeypatch.setattr(Path, "touch", touch)
    check_names(tmp_path, ["short-0.mp4"])
    with pytest.raises(ArtifactError, match=r"takes no name of 216 bytes.*elsewhere"):
        check_names(tmp_path, ["short-0.mp4", "x" * 200 + "-0.mp4"])


def experiment(folder: Path, **clips: object) -> Source:
    tree = {
        "geometry": {"frames": 5, "height": 32, "width": 32, "fps": 8},
        "clips": {"held_out": 3, "workers": 1, **clips},
        "teacher": {"source": "train"},
        "samples": {"count": 3, "decode": 1},
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(tree))
    return load(folder / "own.yaml")


def rows(folder: Path, table: str) -> list[dict]:
    return [json.loads(line) for line in (folder / table).read_text().splitlines()]


def write_clips(folder: Path, count: int) -> list[Path]:
    return [write_clip(folder / f"clip {i}.mp4", np.roll(moving(), i, 2)) for i in range(count)]


def test_the_clips_stage_maps_names_to_captions_and_quarantines_impossible_paths(tmp_path: Path) -> None:
    paths = [str(path) for path in write_clips(tmp_path, 6)]
    captions = [CHINESE, "a" * 200 + "b", "a" * 200 + "c", "a/b c", "a_b c", "x"]
    impossible = ["x" * 300 + ".mp4", "a\0b.mp4", "x/" * 3000 + "y.mp4", "."]
    lines = [json.dumps({"path": p, "caption": c}) for p, c in zip(paths, captions, strict=True)]
    lines += [json.dumps({"path": p, "caption": "x"}) for p in impossible]
    lines.append(json.dumps({"path": "odd.mp4", "caption": "\ud800"}))
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = experiment(tmp_path, source="table", path=str(tmp_path / "t.jsonl"))
    folder = run_stage(source, "clips", tmp_path / "results")
    held_out = [clip.caption for clip in read_manifest(folder, "held_out")]
    assert json.loads((folder / "names.json").read_text()) == dict(zip(file_names(held_out), held_out, strict=True))
    assert len(rows(folder, "quarantine.jsonl")) == len(impossible) + 1


# B and M: in a folder of clips, too.


def test_one_clips_fault_is_its_reason_and_hidden_files_are_none_of_ours(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    paths = write_clips(videos, 8)
    paths[0].rename(os.fsdecode(bytes(videos) + b"/Z\xfcrich.mp4"))
    paths[1].rename(videos / "LOUD.MP4")
    (videos / "._clip 2.mp4").write_bytes(b"\0\5\x16\7")  # what a Mac leaves beside each file
    (videos / ".cut.mp4").write_bytes(b"")
    paths[2].with_suffix(".txt").write_bytes(b"Z\xfcrich")
    paths[3].with_suffix(".txt").write_bytes("\ufeffa caption".encode())
    paths[4].write_bytes(paths[4].read_bytes()[:400])
    source = experiment(tmp_path, source="folder", path=str(videos))
    folder = run_stage(source, "clips", tmp_path / "results")
    captions = {clip.caption for clip in read_manifest(folder)}
    assert {"Z\ufffdrich", "LOUD", "a caption"} <= captions and len(captions) == 6
    reasons = {Path(row["path"]).name: row["reason"] for row in rows(folder, "quarantine.jsonl")}
    assert set(reasons) == {"clip 2.mp4", "clip 4.mp4"}
    assert reasons["clip 2.mp4"] == "its caption clip 2.txt is not UTF-8 text that can be read"


def test_whatever_checking_a_clip_raises_is_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, *_ = write_clips(tmp_path / "videos", 7)

    def fail(path: Path) -> str:
        if path.name == bad.name:
            raise RuntimeError("odd")
        return sha256(path)

    monkeypatch.setattr(catalog, "content", fail)
    folder = run_stage(experiment(tmp_path, source="folder", path=str(bad.parent)), "clips", tmp_path / "results")
    assert [row["reason"] for row in rows(folder, "quarantine.jsonl")] == ["unusable: RuntimeError: odd"]


# N: too few clips for what comes later are refused at once.


def test_two_clips_to_train_on_are_refused_when_clips_are_checked(tmp_path: Path) -> None:
    write_clips(tmp_path / "videos", 5)
    source = experiment(tmp_path, source="folder", path=str(tmp_path / "videos"))
    with pytest.raises(ArtifactError, match=r"5 usable clips cannot give clips\.held_out = 3 and 3 to train on"):
        run_stage(source, "clips", tmp_path / "results")
    write_clips(tmp_path / "videos", 6)
    run_stage(source, "clips", tmp_path / "results")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["clips.train=2"], r"the 3 that evaluation compares with is more than clips\.train = 2"),
        (["samples.count=2", "samples.decode=1"], r"samples\.count = 2: evaluation needs 3"),
        (["priming.training.batch_size=9", "clips.train=8"], r"batch_size = 9 is more than clips\.train = 8"),
    ],
)
def test_what_later_stages_need_is_asked_when_the_configuration_is_checked(
    settings: list[str], words: str, tmp_path: Path
) -> None:
    path = experiment(tmp_path, source="world", train=8).path
    with pytest.raises(ConfigError, match=words):
        load(path, settings)


def test_three_videos_on_each_side_are_enough_for_the_evaluation() -> None:
    features = np.random.default_rng(0).normal(size=(2, LEAST_VIDEOS, 4))
    found = jackknife(LEAST_VIDEOS, lambda i: frechet(features[0, i], features[1, i]), 20, 0)
    assert np.isfinite(list(found.values())).all()
    with pytest.raises(ValueError, match="at least two"):
        jackknife(LEAST_VIDEOS - 1, lambda i: frechet(features[0, i], features[1, i]), 20, 0)


def test_the_comparison_of_decoders_counts_what_is_refused_and_what_is_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_clip(tmp_path / "clip.mp4", moving(64, 96, 17))
    found = {}
    for name in ("pyav", "decord"):
        assert decoders.main([str(tmp_path), "--decoder", name]) == 0
        found[name] = json.loads(capsys.readouterr().out)
        assert found[name]["difference"] == 0 and found[name]["rate"] > 0
    assert found["pyav"]["silent"] == 0 and found["pyav"]["refused"] == found["pyav"]["damaged"] == decoders.PLACES
    assert found["decord"]["silent"] > 0
