"""The videos of a prompt suite: five for each prompt, each from its own seed, in any number of jobs."""

import json
import math
import secrets
from collections.abc import Collection
from pathlib import Path

import torch

from vbench_i2v.errors import VBenchError
from vbench_i2v.folder import SAMPLING
from vbench_i2v.images import read_image
from vbench_i2v.scores import COLUMNS
from vbench_i2v.suite import SEED_RULE, find_images, image_folder, read_suite, refuse_other_shape, seed_of, video_name
from vpae.artifacts import ArtifactError, digest, reading, sha256, write_json
from vpae.data.video import read_image_at, write_video
from vpae.models.wan import GEOMETRY
from vpae.parts import Part
from vpae.placement import Placement, load_placed
from vpae.preemption import Interruption
from vpae.progress import Progress
from vpae.sampling.single import animate, geometry_of

CRF = 10  # what VBench-I2V asks for


def sample_suite(
    model: Path,
    suite: Path,
    images: Path,
    out: Path,
    *,
    dimensions: Collection[str] = tuple(COLUMNS),
    steps: int = 1,
    guidance_scale: float = 1.0,
    ratio: str = "auto",
    samples: int = 5,
    part: Part | None = None,
) -> int:
    """Animate a suite's images with a pipeline; videos that are there are kept.

    The arguments are those of `vpae evaluation sample`. `out` gets `{prompt}-{j}.mp4` and a note on how they were made.

    Returns:
        how many videos were made now.

    Raises:
        FileNotFoundError: model, suite or images are missing.
        VBenchError: steps, guidance or number of videos that cannot be, or an image of another shape than the model's
            videos.
        ArtifactError: the folder holds videos made with other settings.
        Interruption: asked to end; finished videos are kept.
    """
    bad = {
        "--steps": steps < 1,
        "--samples-per-prompt": samples < 1,
        "--guidance": not math.isfinite(guidance_scale),
    }
    if wrong := [option for option, is_wrong in bad.items() if is_wrong]:
        raise VBenchError(f"{', '.join(wrong)}: steps and videos are counted from 1, and guidance is a finite number")
    geometry, wrong = geometry_of(model)
    if wrong:
        raise VBenchError("\n".join(wrong))
    if not geometry:
        raise FileNotFoundError(f"{model / GEOMETRY}: missing; give a pipeline folder that vpae has made")
    size = (geometry["width"], geometry["height"])
    prompts = read_suite(suite)
    folder, ratio = image_folder(images, ratio, size, model)
    wanted = [(i, p, j) for i, p in enumerate(prompts) if set(p.dimensions) & set(dimensions) for j in range(samples)]
    pictures = find_images(folder, [p for _, p, _ in wanted])
    for picture in pictures.values():
        refuse_other_shape(picture, read_image(picture).size, str(model), *size)
    note = _note(model, suite, pictures, geometry, steps, guidance_scale, ratio)
    _refuse_others(out, note)
    mine, made, pipeline = (part or Part()).share(wanted), 0, None
    progress = Progress(len(mine), "sample")
    with Interruption.watch() as request:
        for i, prompt, j in mine:
            target = out / video_name(prompt.text, j)
            if not target.is_file():
                pipeline = pipeline or load_placed(model, Placement(), "cuda" if torch.cuda.is_available() else "cpu")
                picture = read_image_at(pictures[prompt.image_name], geometry["height"], geometry["width"])
                seed, length = seed_of(i, j), geometry["frames"]
                frames = animate(pipeline, picture, prompt.text, steps, guidance_scale, seed, length)
                temporary = out / f".{secrets.token_hex(8)}.mp4"  # a prompt's own name may be as long as can be
                try:
                    write_video(temporary, frames, geometry["fps"], CRF, reproducible=False)
                    # A job with other settings may have begun before there was a video.
                    _require_the_same(out / SAMPLING, _noted(out / SAMPLING), note)
                    temporary.replace(target)
                finally:
                    temporary.unlink(missing_ok=True)
                made += 1
            progress.update()
            if request.requested:
                raise Interruption(f"sample: {made} new videos are in {out}")
    progress.close()
    return made


def _note(
    model: Path, suite: Path, pictures: dict[str, Path], geometry: dict, steps: int, guidance: float, ratio: str
) -> dict:
    """How videos are made."""
    weights = sorted((model / "transformer").glob("*.safetensors"))
    others = [model / "scheduler/scheduler_config.json", *sorted(model.glob("*_encoder/*.safetensors"))]
    others += sorted((model / "vae").glob("*.safetensors"))
    return {
        "transformer_sha256": {path.name: sha256(path) for path in weights},
        "others_sha256": {path.relative_to(model).as_posix(): sha256(path) for path in others if path.is_file()},
        "images_sha256": digest({name: sha256(path) for name, path in pictures.items()}),
        "steps": steps,
        "guidance_scale": guidance,
        "geometry": geometry,
        "seed_rule": SEED_RULE,
        "suite_sha256": sha256(suite),
        "ratio": ratio,
        "codec": f"h264, crf {CRF}",
    }


def _refuse_others(out: Path, note: dict) -> None:
    """Refuse a folder of videos that are made otherwise; one without a video becomes this run's."""
    path = out / SAMPLING
    out.mkdir(parents=True, exist_ok=True)
    found = _noted(path) if path.is_file() else None
    if not any(out.glob("[!.]*.mp4")):
        write_json(path, note)
    elif found is None:
        raise ArtifactError(
            f"{out}: holds videos, and no {SAMPLING} that says how they were made; choose another folder"
        )
    else:
        _require_the_same(path, found, note)


def _noted(path: Path) -> dict:
    with reading(path, "correct it, or choose another folder"):
        if not isinstance(found := json.loads(path.read_text()), dict):
            raise ValueError("no JSON object")
    return found


def _require_the_same(path: Path, found: dict, note: dict) -> None:
    if found != note:
        other = ", ".join(key for key in note if found.get(key) != note[key])
        raise ArtifactError(f"{path}: the videos there were made with another {other}; choose another folder")
