"""One video from one image, `vpae sample`: everything that was asked for is checked before a network is loaded."""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor

from vbench_i2v.images import ImageError, read_image
from vpae.artifacts import ArtifactError, written
from vpae.config import PATCH, VAE_STRIDE, Sampler
from vpae.config.teacher import file_and_strength
from vpae.data.encoding import Encoders, pad_text
from vpae.data.names import NAME_BYTES
from vpae.data.video import read_image_at, write_video
from vpae.experiment import ConfigError
from vpae.models.loras import require_fit
from vpae.models.small_decoder import SmallDecoder, load_small_decoder
from vpae.models.wan import GEOMETRY, Condition, decode_latents, first_frame_mask
from vpae.out_of_memory import explained, tiled_if_short
from vpae.placement import DTYPES, Placement, load_placed
from vpae.sampling import draw
from vpae.teacher.folder import faults as faults_of_folder
from vpae.teacher.folder import require_whole

FRAMES, FPS = 81, 16.0  # of Wan2.1, where a model's folder says nothing
LARGEST_SEED = 2**64 - 1  # of torch's generators
CRF = 10  # x264's constant rate factor, as VBench-I2V asks for


@torch.no_grad()
def animate(
    pipeline: WanImageToVideoPipeline,
    picture: Image.Image,
    prompt: str,
    steps: int,
    guidance_scale: float,
    seed: int,
    num_frames: int,
    decoder: SmallDecoder | None = None,
    tile: bool | None = False,
    negative_prompt: str = "",
) -> np.ndarray:
    """One video from one image, uint8 (T, H, W, 3); a student's scheduler re-noises, a teacher's does not.

    `decoder` decodes in the VAE's place. `tile` is the placement's: with None the VAE works in tiles where it has to.
    Stages leave it False: their results do not depend on the memory there is.
    """

    def by_vae(work: Callable[[], Tensor]) -> Tensor:
        return tiled_if_short(pipeline.vae, work) if tile is None else work()

    encoders, device = Encoders(pipeline), get_module_execution_device(pipeline.transformer)
    first = np.asarray(picture)
    frame = by_vae(lambda: encoders.conditions([first], num_frames))
    texts = encoders.texts([prompt] if guidance_scale == 1.0 else [prompt, negative_prompt])
    condition = Condition(
        frame_BCFHW=torch.cat([first_frame_mask(1, *frame.shape[2:]), frame], dim=1).to(device),
        image_BND=encoders.images([first]).to(device),
        text_BLD=pad_text(texts[0])[None].to(device),
        empty_text_LD=pad_text(texts[-1]).to(device),  # without guidance nothing asks for it
    )
    student = bool(pipeline.scheduler.config.get("stochastic_sampling", False))
    row = Sampler(model="student" if student else "teacher", steps=steps, guidance_scale=guidance_scale)
    scheduler = pipeline.scheduler.config
    shift = scheduler.get("shift", scheduler.get("flow_shift", 1.0))  # the second is UniPC's, of released Wan pipelines
    latents = draw(pipeline.transformer, row, shift, condition, tuple(frame.shape[1:]), [seed])
    if not latents.isfinite().all():
        raise ArtifactError(f"guidance {guidance_scale} and {steps} steps gave no finite numbers; lower the guidance")
    if decoder is not None:
        return decode_latents(decoder, latents)[0].cpu().numpy()
    return by_vae(lambda: decode_latents(pipeline.vae, latents))[0].cpu().numpy()


@torch.no_grad()
def sample_one(
    model: Path,
    image: Path,
    prompt: str,
    steps: int,
    guidance_scale: float,
    seed: int,
    num_frames: int | None,
    out: Path,
    frames_out: Path | None,
    placement: Placement = Placement(),  # noqa: B008, it is frozen
    loras: Sequence[str] = (),
    decoder: Path | None = None,
    negative_prompt: str = "",
) -> None:
    """Animate one image and write the mp4 (and, if wanted, the exact frames as .npy).

    `loras` are merged into the transformer, each FILE or FILE:STRENGTH. `decoder` is the file of a small decoder that
    takes the VAE's place. `negative_prompt` is what guidance leads away from.

    Raises:
        ConfigError: all that cannot be done as asked for, a line each, or memory does not suffice.
        ArtifactError: the networks gave no numbers.
    """
    geometry, wrong = geometry_of(model)
    faults = [
        *wrong,
        *_option_faults(steps, guidance_scale, negative_prompt, seed, prompt),
        *_output_faults("--out", out, ".mp4"),
        *(_output_faults("--frames", frames_out, ".npy") if frames_out else ()),
    ]
    length = geometry.get("frames", FRAMES) if num_frames is None else num_frames
    if length < 1 or length % VAE_STRIDE[0] != 1:
        below = (length - 1) // VAE_STRIDE[0] * VAE_STRIDE[0] + 1
        nearest = f"{below} or {below + VAE_STRIDE[0]}" if below > 0 else "1"
        faults.append(f"--num-frames {length}: the VAE takes 4k + 1 frames; the nearest is {nearest}")
    elif geometry and length > (most := _longest(model)):
        faults.append(f"--num-frames {length}: this model has positions for {most} frames; take no more")
    for named in () if wrong else loras:
        with _noted(faults, "--lora"):
            require_fit(file_and_strength(named)[0], model)
    with _noted(faults, "--image"):
        picture = read_image_at(image, geometry["height"], geometry["width"]) if geometry else read_image(image)
        faults += [] if wrong or geometry else _size_faults(image, picture)
    with _noted(faults, "--decoder"):
        small = load_small_decoder(decoder, DTYPES[placement.vae_dtype]) if decoder else None
    if faults:
        raise ConfigError("\n".join(faults))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with explained(model, placement, device, length, picture.height, picture.width):
        evaluations = steps * (1 if guidance_scale == 1.0 else 2)
        pipeline = load_placed(model, placement, device, evaluations=evaluations, loras=loras)
        small = small and small.to(device)
        frames = animate(
            pipeline, picture, prompt, steps, guidance_scale, seed, length, small, placement.tile, negative_prompt
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with written(out) as temporary:
        write_video(temporary, frames, geometry.get("fps", FPS), CRF, reproducible=False)
    if frames_out is not None:
        frames_out.parent.mkdir(parents=True, exist_ok=True)
        with written(frames_out) as temporary, temporary.open("wb") as file:  # by a path it would add another suffix
            np.save(file, frames)


@contextmanager
def _noted(faults: list[str], option: str) -> Iterator[None]:
    """Go on where an option's file cannot be used, and note why."""
    try:
        yield
    except (ArtifactError, ImageError, FileNotFoundError, ValueError) as error:
        faults.append(f"{option} {error}")


def _option_faults(steps: int, guidance_scale: float, negative_prompt: str, seed: int, prompt: str) -> list[str]:
    """What is wrong with these options, a line each, of numbers with the nearest possible value."""
    faults = []
    if steps < 1:
        faults.append(f"--steps {steps}: must be at least 1; the nearest is 1")
    if not math.isfinite(guidance_scale):
        faults.append(f"--guidance {guidance_scale}: must be a finite number; 1 is no guidance")
    if negative_prompt and guidance_scale == 1.0:
        faults.append(
            "--negative-prompt: has no effect at guidance 1; set --guidance to another value, or leave it out"
        )
    if (nearest := min(max(seed, 0), LARGEST_SEED)) != seed:
        faults.append(f"--seed {seed}: must be from 0 to {LARGEST_SEED}; the nearest is {nearest}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        faults.append(f"--prompt {prompt!a}: is not UTF-8 text")
    return faults


def _output_faults(option: str, path: Path, suffix: str) -> list[str]:
    """Why a file could not be written, which would only show after drawing."""
    if path.is_dir():
        return [f"{option} {path}: is a folder; name a file in it, for instance {path / f'clip{suffix}'}"]
    if path.suffix.lower() != suffix:
        return [f"{option} {path}: only {suffix} is written; name it {path.with_suffix(suffix)}"]
    if len(os.fsencode(path.name)) > NAME_BYTES:
        return [f"{option} {path}: the name has {len(os.fsencode(path.name))} bytes; the most is {NAME_BYTES}"]
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return [f"{option} {path}: {existing} is no folder that can be written to; name another"]
    return []


def geometry_of(model: Path) -> tuple[dict, list[str]]:
    """What size a model was made for, if its folder says so; and what is wrong with the folder."""
    if not (model / "model_index.json").is_file():
        if not model.is_dir():
            return {}, [f"--model {model}: there is no such folder"]
        inside = model / "student"
        meant = f"; did you mean {inside}?" if (inside / "model_index.json").is_file() else ""
        return {}, [f"--model {model}: holds no model_index.json: it is not a diffusers pipeline folder{meant}"]
    require_whole(model)
    if wrong := faults_of_folder(model):
        return {}, [f"--model {fault}" for fault in wrong]
    if not (model / GEOMETRY).is_file():
        return {}, []
    try:
        geometry = json.loads((model / GEOMETRY).read_text())
        kinds = {"frames": int, "height": int, "width": int, "fps": float}
        return {key: kind(geometry[key]) for key, kind in kinds.items()}, []
    except (ValueError, KeyError, TypeError) as error:
        return {}, [f"--model {model / GEOMETRY}: is damaged ({error!r}); copy the folder again"]


def _longest(model: Path) -> int:
    """The most frames whose places a transformer's rotary tables tell apart."""
    config = json.loads((model / "transformer" / "config.json").read_text())
    return VAE_STRIDE[0] * (config.get("rope_max_seq_len", 1024) - 1) + 1


def _size_faults(image: Path, picture: Image.Image) -> list[str]:
    """A model without a size of its own takes the image's, if it can."""
    wide, high = VAE_STRIDE[2] * PATCH[2], VAE_STRIDE[1] * PATCH[1]
    if picture.width % wide == 0 and picture.height % high == 0:
        return []
    nearest = f"{max(round(picture.width / wide), 1) * wide} x {max(round(picture.height / high), 1) * high}"
    return [
        f"--image {image}: {picture.width} x {picture.height} pixels; this model names no size of its own, and takes "
        f"multiples of {wide} x {high}: scale the image, to {nearest} for instance, or to what the model was made for"
    ]
