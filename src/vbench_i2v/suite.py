"""Which videos there should be: VBench-I2V's prompt suite, or anyone's folder of videos and images.

The suite is VBench's `vbench2_i2v_full_info.json`: records {"prompt_en", "dimension", "image_type", "image_name"}. A
prompt's videos are `{prompt_en}-{0..4}.mp4`, its image is `{ratio}/{image_name}` of the folder that VBench calls
`data/crop`. Without a suite, a video `X-3.mp4` belongs to the image `X-3.png` or `X.png` (also .jpg, .jpeg, .webp).

Names are compared composed (NFC), with their suffix in lower case; hidden files count for nothing.
"""

import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vbench_i2v import camera
from vbench_i2v.base import Item
from vbench_i2v.errors import VBenchError
from vbench_i2v.files import read_json
from vbench_i2v.images import read_image
from vbench_i2v.scores import COLUMNS
from vbench_i2v.video import shape

SAMPLES = 5  # videos per prompt
RATIOS = {"1-1": 1.0, "3-2": 3 / 2, "8-5": 8 / 5, "7-4": 7 / 4, "16-9": 16 / 9}  # width / height of VBench's crops
IMAGE_DIMENSIONS = frozenset({"i2v_subject", "i2v_background"})
VIDEO = ".mp4"
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
OTHER_VIDEOS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".webm")  # which are not scored, but mentioned
SEED_RULE = "100000 * i + j: i the prompt's place in the suite, j the video's among those of its prompt, both from 0"
_OTHER_SHAPE = 1.1  # by this factor an image's width / height may differ from its video's
_NAMED = 5  # files that a message names
_LONGEST = 255  # bytes that file systems allow a name


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
        extra: names of videos in the folder that are not scored: misnamed, or nobody asks for them.
        ratio: of the crops used as images: a key of `RATIOS`, or "none" where there are no crops.
    """

    clips: tuple[Clip, ...]
    expected: dict[str, int]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    ratio: str = "none"

    def notes(self) -> list[str]:
        """What is missing and what is left over, for people."""
        named = {"missing": self.missing, "not scored, since nothing asks for them": self.extra}
        return [f"videos {what}: {some(names)}" for what, names in named.items() if names]


def read_suite(path: Path) -> list[Prompt]:
    """Read and check a prompt suite of VBench's schema.

    Raises:
        FileNotFoundError: no such file.
        VBenchError: not of that schema; the message names the record.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such suite; it is vbench2_i2v_full_info.json of a VBench checkout, and "
            "`vbench-i2v weights --fetch` brings it"
        )
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise VBenchError(f"{path}: must be a list of prompts, as in VBench's vbench2_i2v_full_info.json")
    prompts = [_prompt(f"{path}: record {number}", record) for number, record in enumerate(records)]
    twice = [text for text, count in Counter(_key(p.text) for p in prompts).items() if count > 1]
    if twice:
        raise VBenchError(f"{path}: {len(twice)} prompts appear twice, e.g. {twice[0]!r}; they name one file")
    return prompts


def _prompt(where: str, record: object) -> Prompt:
    keys = ("prompt_en", "dimension", "image_type", "image_name")
    if not isinstance(record, dict) or not all(key in record for key in keys):
        raise VBenchError(f"{where}: needs the keys {', '.join(keys)}")
    text, dimensions = record["prompt_en"], record["dimension"]
    texts = [text, record["image_type"], record["image_name"]]
    if not isinstance(dimensions, list) or not all(isinstance(value, str) for value in [*texts, *dimensions]):
        raise VBenchError(f"{where}: dimension is a list of names, and the other three are text")
    if not all(_names_a_file(name) for name in (text, record["image_name"])):
        raise VBenchError(f"{where}: prompt_en and image_name name files: not empty, no slash, no dot at the beginning")
    if len(video_name(text, 99999).encode()) > _LONGEST:
        raise VBenchError(f"{where}: prompt_en names files, and has more bytes than the {_LONGEST} of a file's name")
    if "camera_motion" in dimensions and camera.asked(text) is None:
        raise VBenchError(
            f"{where}: camera_motion needs one of {', '.join(camera.SUFFIXES)} in the prompt, not {text!r}"
        )
    return Prompt(text, tuple(dimensions), record["image_type"], record["image_name"])


def _names_a_file(name: str) -> bool:
    """Whether it can be a file's name; a lone surrogate, which JSON can hold, cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return bool(name) and not any(sign in name for sign in "/\0") and not name.startswith(".")


def video_name(prompt: str, sample: int) -> str:
    """The file of a prompt's video."""
    return f"{prompt}-{sample}{VIDEO}"


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
        videos, dimensions, ratio, samples: see `settings.Folder`.
        images: VBench's `data/crop`, with a folder per ratio, or the images themselves; None: not needed.
        allow_incomplete: leave out videos that are missing, and leave missing images to the measuring, instead of
            refusing.

    Raises:
        FileNotFoundError: a folder, videos or images are missing.
        VBenchError: an image of another shape than its video.
    """
    present = names_in(videos)
    wanted = [(p, tuple(d for d in COLUMNS if d in p.dimensions and d in dimensions)) for p in prompts]
    wanted = [(prompt, names) for prompt, names in wanted if names]
    files = [(prompt, names, _key(video_name(prompt.text, j))) for prompt, names in wanted for j in range(samples)]
    missing = tuple(name for *_, name in files if name not in present)
    if len(missing) == len(files):
        raise FileNotFoundError(
            f"{videos}: none of the suite's {len(files)} videos is there, e.g. {files[0][2]!r}; "
            "videos are named by their prompts and 0 to 4. For other names leave the suite out"
            if files
            else f"the suite has no prompt for {', '.join(sorted(dimensions))}"
        )
    if missing and not allow_incomplete:
        raise FileNotFoundError(
            f"{videos}: {some(missing)} of {len(files)} videos missing; make them, or score what is there with "
            "--allow-incomplete"
        )
    paths = [(prompt, names, videos / present[name]) for prompt, names, name in files if name in present]
    with_image = [(prompt, path) for prompt, names, path in paths if IMAGE_DIMENSIONS & set(names)]
    folder, pictures = None, {}  # image name -> path
    if with_image:
        size = _first_size([path for *_, path in paths], allow_incomplete)
        folder, ratio = image_folder(images, ratio, size, videos)
        pictures = find_images(folder, [prompt for prompt, _ in with_image], allow_incomplete)
        _refuse_other_shapes([(pictures[prompt.image_name], path) for prompt, path in with_image], allow_incomplete)
    clips = []
    for prompt, names, path in paths:
        image = pictures[prompt.image_name] if IMAGE_DIMENSIONS & set(names) else None
        clips.append(Clip(Item(path, image, camera.asked(prompt.text)), names, prompt))
    expected = {name: sum(samples for _, names in wanted if name in names) for name in COLUMNS if name in dimensions}
    extra = _extra(present, {name for *_, name in files})
    return Plan(tuple(clips), expected, missing, extra, ratio if folder else "none")


def _first_size(videos: Sequence[Path], allow_incomplete: bool) -> tuple[int, int]:
    """Width and height of the first video that can be read; one that cannot is left to the measuring, which leaves it
    out where that is allowed."""
    for path in videos:
        try:
            info = shape(path)
            return info.width, info.height
        except (VBenchError, FileNotFoundError):
            if not allow_incomplete:
                raise
    raise VBenchError(f"{videos[0].parent}: none of its {len(videos)} videos can be read; make them again")


def _extra(present: Mapping[str, str], scored: Collection[str]) -> tuple[str, ...]:
    """The videos of a folder that are not scored, by their names in the folder."""
    videos = [name for name in present if name.endswith((VIDEO, *OTHER_VIDEOS))]
    return tuple(sorted(present[name] for name in videos if name not in scored))


def plan_folder(videos: Path, images: Path | None, dimensions: Collection[str], allow_incomplete: bool = False) -> Plan:
    """Every mp4 of a folder with its image: no suite. Camera motion is for videos whose name asks for one.

    Raises:
        FileNotFoundError: no videos, or images missing.
        VBenchError: an image of another shape than its video; unless `allow_incomplete`, videos that cannot be read.
    """
    present = names_in(videos)
    paths = {key: videos / present[key] for key in sorted(present) if key.endswith(VIDEO)}
    if not paths:
        raise FileNotFoundError(f"{videos}: no {VIDEO} files there")
    found: dict[str, Path | None] = {}
    if IMAGE_DIMENSIONS & set(dimensions):
        pictures = names_in(images) if images else {}
        found = {key: find_image(images, pictures, Path(key).stem) for key in paths}
    lacking = [paths[key].name for key, image in found.items() if image is None]
    if lacking and not (allow_incomplete and images):
        raise FileNotFoundError(
            f"{images or 'no folder of images given'}: {some(lacking)} of {len(paths)} videos without an image; "
            f"that of X-0.mp4 is X-0.png or X.png (or {', '.join(IMAGES)}). Or leave out i2v_subject and i2v_background"
        )
    found |= {key: images / f"{Path(key).stem}.png" for key, image in found.items() if image is None}
    _refuse_other_shapes([(image, paths[key]) for key, image in found.items()], allow_incomplete)
    clips = []
    for key, path in paths.items():
        image, movement = found.get(key), camera.asked(Path(key).stem)
        own = tuple(d for d in COLUMNS if d in dimensions and (d != "camera_motion" or movement))
        prompt = Prompt(_prompt_of(Path(key).stem), own, "custom", image.name if image else "")
        clips.append(Clip(Item(path, image, movement), own, prompt))
    expected = {name: sum(name in clip.dimensions for clip in clips) for name in COLUMNS if name in dimensions}
    return Plan(tuple(clips), expected, extra=_extra(present, paths))


def find_images(folder: Path, prompts: Sequence[Prompt], allow_incomplete: bool = False) -> dict[str, Path]:
    """Image name -> its path in a folder.

    Raises:
        FileNotFoundError: some are not there; unless `allow_incomplete`.
    """
    there = names_in(folder)
    wanted = dict.fromkeys(prompt.image_name for prompt in prompts)
    lacking = [name for name in wanted if _key(name) not in there]
    if lacking and not allow_incomplete:
        raise FileNotFoundError(
            f"{folder}: {some(lacking)} of the suite's images missing; VBench publishes them per ratio, "
            "see docs/vbench.md"
        )
    return {name: folder / there.get(_key(name), name) for name in wanted}


def find_image(folder: Path, names: Mapping[str, str], stem: str) -> Path | None:
    """The image of a video `X-3` among the names of a folder: `X-3` itself, else `X`.

    Raises:
        VBenchError: there are several of one name.
    """
    for candidate in (stem, _prompt_of(stem)):
        found = [names[candidate + suffix] for suffix in IMAGES if candidate + suffix in names]
        if len(found) > 1:
            raise VBenchError(f"{folder}: {some(found)} could all be the image of {stem}; keep one of them")
        if found:
            return folder / found[0]
    return None


def _prompt_of(stem: str) -> str:
    return re.sub(r"-\d+$", "", stem)


def nearest_ratio(width: int, height: int) -> str:
    """The crop whose shape is nearest to a video's, by the ratio of the ratios."""
    return min(RATIOS, key=lambda name: abs(math.log(width / height / RATIOS[name])))


def image_folder(images: Path | None, ratio: str, size: tuple[int, int], made: Path) -> tuple[Path, str]:
    """The folder of images of the right ratio, and that ratio ("none": the folder has no ratios).

    Args:
        images: VBench's `data/crop`, or a folder of images.
        ratio: a key of `RATIOS`, "auto" or "none".
        size: width and height of the videos.
        made: what has that size, for the message.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if images is None:
        raise FileNotFoundError(
            "no folder of images given; i2v_subject and i2v_background compare with the input image"
        )
    there = [name for name in RATIOS if name in names_in(images)]
    if ratio == "none" or (ratio == "auto" and not there):
        return images, "none"
    chosen = nearest_ratio(*size) if ratio == "auto" else ratio
    if chosen not in there:
        why = f"; {made} has {size[0]} x {size[1]} pixels, to which it is nearest" if ratio == "auto" else ""
        raise FileNotFoundError(
            f"{images / chosen}: no images of the ratio {chosen}{why}. There: {', '.join(there) or 'no ratio at all'}"
        )
    return images / chosen, chosen


def _refuse_other_shapes(pairs: Iterable[tuple[Path, Path]], allow_incomplete: bool) -> None:
    """Refuse an image whose shape is not its video's: the measures resize both, and would compare other contents.

    A file that is missing or cannot be read is left to the measuring where `allow_incomplete`.

    Raises:
        FileNotFoundError: an image or a video is missing.
        VBenchError: the shapes differ, or one cannot be read.
    """
    sizes: dict[Path, tuple[int, int]] = {}
    for image, video in pairs:
        try:
            sizes[image] = sizes.get(image) or read_image(image).size
            info = shape(video)
        except (VBenchError, FileNotFoundError):
            if not allow_incomplete:
                raise
            continue
        refuse_other_shape(image, sizes[image], video.name, info.width, info.height)


def refuse_other_shape(image: Path, size: tuple[int, int], made: str, width: int, height: int) -> None:
    """Raise `VBenchError` if an image's width / height is not that of what is made of it."""
    if not 1 / _OTHER_SHAPE <= (width / height) / (size[0] / size[1]) <= _OTHER_SHAPE:
        raise VBenchError(
            f"{image} has {size[0]} x {size[1]} pixels, {made} {width} x {height}: another ratio. "
            "Give the images that the videos were made from, cropped as they were"
        )


def names_in(folder: Path) -> dict[str, str]:
    """What a folder holds: a name as it is compared -> as it is in the folder.

    Raises:
        FileNotFoundError: no such folder.
        VBenchError: two names that are compared as one, such as a.mp4 and a.MP4.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found: dict[str, str] = {}
    for name in sorted(os.listdir(folder)):
        if name.startswith("."):
            continue
        if (other := found.setdefault(_key(name), name)) != name:
            raise VBenchError(f"{folder}: {other!r} and {name!r} count as one name; rename or remove one of them")
    return found


def _key(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return unicodedata.normalize("NFC", stem) + suffix.lower()


def some(names: Sequence[str]) -> str:
    """ "3 ('a', 'b', ...)" """
    more = ", ..." if len(names) > _NAMED else ""
    return f"{len(names)} ({', '.join(repr(name) for name in names[:_NAMED])}{more})"
