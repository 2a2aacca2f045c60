"""Which videos there should be: VBench-I2V's prompt suite, or anyone's folder of videos and images.

The suite is VBench's `vbench2_i2v_full_info.json`: records {"prompt_en", "dimension", "image_type", "image_name"}. A
prompt's videos are `{prompt_en}-{0..4}.mp4`, its image is `{ratio}/{image_name}` of the folder that VBench calls
`data/crop`. Without a suite, a video `X-3.mp4` belongs to the image `X-3.png` or `X.png` (also .jpg, .jpeg).
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from vpae.artifacts import ArtifactError
from vpae.data.video import VideoError, VideoInfo, probe
from vpae.evaluation.vbench import camera
from vpae.evaluation.vbench.base import Item
from vpae.evaluation.vbench.scores import COLUMNS

SAMPLES = 5  # videos per prompt
RATIOS = {"1-1": 1.0, "3-2": 3 / 2, "8-5": 8 / 5, "7-4": 7 / 4, "16-9": 16 / 9}  # width / height of VBench's crops
IMAGE_DIMENSIONS = frozenset({"i2v_subject", "i2v_background"})
SUFFIXES = (".jpg", ".jpeg", ".png")
SEED_RULE = "100000 * i + j: i the prompt's place in the suite, j the video's among those of its prompt, both from 0"
_OTHER_SHAPE = 1.1  # by this factor an image's width / height may differ from its video's
_NAMED = 5  # missing files that a message names


def seed_of(prompt: int, sample: int) -> int:
    """The seed of a prompt's video: 100000 i + j."""
    return 100_000 * prompt + sample


@dataclass(frozen=True)
class Prompt:
    """One record of the suite."""

    text: str
    dimensions: tuple[str, ...]
    image_type: str
    image_name: str

    def record(self) -> dict:
        """As VBench writes it."""
        return {
            "prompt_en": self.text,
            "dimension": list(self.dimensions),
            "image_type": self.image_type,
            "image_name": self.image_name,
        }


@dataclass(frozen=True)
class Clip:
    """A video that is to be scored, and on which dimensions."""

    item: Item
    dimensions: tuple[str, ...]
    prompt: Prompt


@dataclass(frozen=True)
class Plan:
    """What a score is made of.

    Attributes:
        clips: the videos that are there.
        expected: dimension -> how many videos there should be.
        missing: names of videos that are not there.
        ratio: of the crops used as images: a key of `RATIOS`, or "none" where there are no crops.
    """

    clips: tuple[Clip, ...]
    expected: dict[str, int]
    missing: tuple[str, ...] = field(default=())
    ratio: str = "none"


def read_suite(path: Path) -> list[Prompt]:
    """Read and check a prompt suite of VBench's schema.

    Raises:
        FileNotFoundError: no such file.
        ArtifactError: not of that schema; the message names the record.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such suite; it is vbench2_i2v_full_info.json of a VBench checkout, and "
            "`vpae evaluation weights --fetch` brings it"
        )
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: not JSON ({error})") from error
    if not isinstance(records, list) or not records:
        raise ArtifactError(f"{path}: must be a list of prompts, as in VBench's vbench2_i2v_full_info.json")
    prompts = [_prompt(f"{path}: record {number}", record) for number, record in enumerate(records)]
    twice = [text for text, count in Counter(p.text for p in prompts).items() if count > 1]
    if twice:
        raise ArtifactError(f"{path}: {len(twice)} prompts stand there twice, e.g. {twice[0]!r}; they name one file")
    return prompts


def _prompt(where: str, record: object) -> Prompt:
    keys = ("prompt_en", "dimension", "image_type", "image_name")
    if not isinstance(record, dict) or not all(key in record for key in keys):
        raise ArtifactError(f"{where}: needs the keys {', '.join(keys)}")
    text, dimensions = record["prompt_en"], tuple(record["dimension"])
    if not text or "/" in text or "/" in record["image_name"]:
        raise ArtifactError(f"{where}: prompt_en and image_name name files: neither empty nor with a slash")
    if "camera_motion" in dimensions and camera.asked(text) is None:
        raise ArtifactError(
            f"{where}: camera_motion needs one of {', '.join(camera.SUFFIXES)} in the prompt, not {text!r}"
        )
    return Prompt(text, dimensions, record["image_type"], record["image_name"])


def counts(prompts: Sequence[Prompt], samples: int = SAMPLES) -> dict[str, int]:
    """Dimension -> how many videos a suite has for it."""
    found = Counter(name for prompt in prompts for name in prompt.dimensions)
    return {name: samples * found[name] for name in COLUMNS}


def plan_suite(
    prompts: Sequence[Prompt],
    videos: Path,
    images: Path | None,
    dimensions: Collection[str],
    ratio: str = "auto",
    samples: int = SAMPLES,
    allow_incomplete: bool = False,
) -> Plan:
    """Match a suite with a folder of videos and the images they start from.

    Args:
        prompts: the suite.
        videos: folder of `{prompt_en}-{0..samples-1}.mp4`.
        images: VBench's `data/crop`, with a folder per ratio, or the images themselves; None: not needed.
        dimensions: which are wanted.
        ratio: a key of `RATIOS`; "auto": the nearest to the videos' size; "none": `images` holds the images themselves.
        samples: videos per prompt.
        allow_incomplete: leave out videos that are missing instead of refusing.

    Raises:
        FileNotFoundError: a folder, videos or images are missing.
        ArtifactError: images of another shape than the videos.
    """
    present = _names(videos)
    wanted = [(p, tuple(d for d in COLUMNS if d in p.dimensions and d in dimensions)) for p in prompts]
    wanted = [(prompt, names) for prompt, names in wanted if names]
    files = [(prompt, names, f"{prompt.text}-{j}.mp4") for prompt, names in wanted for j in range(samples)]
    missing = tuple(name for *_, name in files if name not in present)
    if len(missing) == len(files):
        raise FileNotFoundError(
            f"{videos}: none of the suite's {len(files)} videos is there, e.g. {files[0][2]!r}; "
            "videos are named by their prompts and 0 to 4. For other names leave the suite out"
            if files
            else f"the suite has no prompt for {', '.join(sorted(dimensions))}"
        )
    if missing and not allow_incomplete:
        raise FileNotFoundError(f"{videos}: {_some(missing)} of {len(files)} videos missing; {_REMEDY}")
    with_image = [p for p, names in wanted if IMAGE_DIMENSIONS & set(names)]
    folder = None
    if with_image:
        first = next(videos / name for *_, name in files if name in present)
        size = _info(first)
        folder, ratio = image_folder(images, ratio, size, videos)
        pictures = _names(folder)
        lacking = [name for name in dict.fromkeys(p.image_name for p in with_image) if name not in pictures]
        if lacking:
            raise FileNotFoundError(
                f"{folder}: {_some(lacking)} of the suite's images missing; VBench publishes them per ratio, see "
                "docs/vbench.md"
            )
        check_shapes(folder / with_image[0].image_name, first, size)
    clips = []
    for prompt, names, name in files:
        if name not in present:
            continue
        image = folder / prompt.image_name if folder and IMAGE_DIMENSIONS & set(names) else None
        clips.append(Clip(Item(videos / name, image, prompt.text, camera.asked(prompt.text)), names, prompt))
    expected = {name: sum(samples for _, names in wanted if name in names) for name in COLUMNS if name in dimensions}
    return Plan(tuple(clips), expected, missing, ratio if folder else "none")


def plan_folder(videos: Path, images: Path | None, dimensions: Collection[str]) -> Plan:
    """Every mp4 of a folder with its image: no suite. Camera motion is for videos whose name asks for one.

    Raises:
        FileNotFoundError: no videos, or images missing.
        ArtifactError: images of another shape than the videos.
    """
    names = sorted(name for name in _names(videos) if name.endswith(".mp4"))
    if not names:
        raise FileNotFoundError(f"{videos}: no .mp4 files there")
    paths = [videos / name for name in names]
    found: dict[Path, Path | None] = {}
    if IMAGE_DIMENSIONS & set(dimensions):
        pictures = _names(images) if images else ()
        found = {path: find_image(images, pictures, path.stem) for path in paths}
    lacking = [path.name for path, image in found.items() if image is None]
    if lacking:
        raise FileNotFoundError(
            f"{images or 'no folder of images given'}: {_some(lacking)} of {len(paths)} videos without an image; the "
            "image of X-0.mp4 is X-0.png or X.png (or .jpg, .jpeg). Or leave out i2v_subject and i2v_background"
        )
    for path, image in found.items():
        try:
            size = probe(path)
        except VideoError:
            continue  # measuring it says so, unless it may be left out
        check_shapes(image, path, size)
    clips = []
    for path in paths:
        text, movement, image = _prompt_of(path.stem), camera.asked(path.stem), found.get(path)
        own = tuple(d for d in COLUMNS if d in dimensions and (d != "camera_motion" or movement))
        prompt = Prompt(text, own, "custom", image.name if image else "")
        clips.append(Clip(Item(path, image, text, movement), own, prompt))
    expected = {name: sum(name in clip.dimensions for clip in clips) for name in COLUMNS if name in dimensions}
    return Plan(tuple(clips), expected)


def find_image(folder: Path, names: Collection[str], stem: str) -> Path | None:
    """The image of a video `X-3` among the names of a folder: `X-3` itself, else `X`."""
    for candidate in (stem, _prompt_of(stem)):
        for suffix in SUFFIXES:
            if candidate + suffix in names:
                return folder / (candidate + suffix)
    return None


def _prompt_of(stem: str) -> str:
    return re.sub(r"-\d+$", "", stem)


def nearest_ratio(width: int, height: int) -> str:
    """The crop whose shape is nearest to a video's, by the ratio of the ratios."""
    return min(RATIOS, key=lambda name: abs(math.log(width / height / RATIOS[name])))


def image_folder(images: Path | None, ratio: str, size: VideoInfo, videos: Path) -> tuple[Path, str]:
    """The folder of images of the right ratio, and that ratio ("none": the folder has no ratios).

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if images is None:
        raise FileNotFoundError(
            "no folder of images given; i2v_subject and i2v_background compare with the input image"
        )
    names = _names(images)
    there = [name for name in RATIOS if name in names]
    if ratio == "none" or (ratio == "auto" and not there):
        return images, "none"
    chosen = nearest_ratio(size.width, size.height) if ratio == "auto" else ratio
    if chosen not in there:
        why = f"; {videos} has {size.width} x {size.height} pixels, to which it is nearest" if ratio == "auto" else ""
        raise FileNotFoundError(
            f"{images / chosen}: no images of the ratio {chosen}{why}. There: {', '.join(there) or 'no ratio at all'}"
        )
    return images / chosen, chosen


def check_shapes(image: Path, video: Path, size: VideoInfo) -> None:
    """Refuse an image whose shape is not its video's: the measures resize both, and would compare other contents.

    Raises:
        ArtifactError: naming both.
    """
    try:
        with Image.open(image) as picture:
            width, height = picture.size
    except OSError as error:
        raise ArtifactError(f"{image}: no image that can be read ({error})") from error
    factor = (size.width / size.height) / (width / height)
    if not 1 / _OTHER_SHAPE <= factor <= _OTHER_SHAPE:
        raise ArtifactError(
            f"{image} has {width} x {height} pixels, {video.name} {size.width} x {size.height}: another ratio. Give "
            "the images that the videos were made from, cropped as they were"
        )


_REMEDY = "make them, or score what is there with --allow-incomplete"


def _names(folder: Path) -> frozenset[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    return frozenset(os.listdir(folder))


def _info(video: Path) -> VideoInfo:
    try:
        return probe(video)
    except VideoError as error:
        raise ArtifactError(f"{video}: {error}; make it again") from error


def _some(names: Sequence[str]) -> str:
    """ "3 ('a', 'b', ...)" """
    more = ", ..." if len(names) > _NAMED else ""
    return f"{len(names)} ({', '.join(repr(name) for name in names[:_NAMED])}{more})"
