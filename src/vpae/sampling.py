"""Sampling, and the stage `samples`.

Teachers integrate the flow by Euler steps with guidance; students jump to x0 and, with more steps, add noise again at
the next smaller time. With one step and no guidance the two are the same.
"""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vpae.config import Experiment, Sampler
from vpae.data.encoding import Encoders, pad_text
from vpae.data.latents import LatentDataset
from vpae.data.video import write_video
from vpae.flow import add_noise, schedule, x0_from_velocity
from vpae.models.wan import (
    GEOMETRY,
    Condition,
    decode_latents,
    first_frame_mask,
    guided_velocity,
    load_pipeline,
    load_transformer,
)
from vpae.progress import Progress
from vpae.training.randomness import derived_seed


def euler(
    model: nn.Module, noise_BCFHW: Tensor, condition: Condition, steps: int, shift: float, guidance_scale: float = 1.0
) -> Tensor:
    """Integrate dx/dt = v from t = 1 to 0 over the shifted schedule; returns x0 like `noise_BCFHW`."""
    x, times = noise_BCFHW, schedule(steps, shift).tolist()
    for t, t_next in pairwise(times):
        v = guided_velocity(model, x, x.new_full((len(x),), t), condition, guidance_scale)
        x = x + (t_next - t) * v
    return x


def few_step(
    model: nn.Module,
    noise_BCFHW: Tensor,
    condition: Condition,
    steps: int,
    shift: float,
    rngs: list[torch.Generator],
    guidance_scale: float = 1.0,
) -> Tensor:
    """Predict x0, add fresh noise at the next smaller time, predict again.

    Args:
        model: a one-step student.
        noise_BCFHW: noise at t = 1.
        condition: of each video.
        steps: network steps.
        shift: timestep shift of the times in between.
        rngs: one generator per video, so that a video does not depend on its batch.
        guidance_scale: w in u + w (c - u).

    Returns:
        x0 like `noise_BCFHW`.
    """
    times = schedule(steps, shift).tolist()
    x = noise_BCFHW
    for t, t_next in pairwise(times):
        t_B = x.new_full((len(x),), t)
        x0 = x0_from_velocity(x, guided_velocity(model, x, t_B, condition, guidance_scale), t_B)
        if t_next == 0:
            return x0
        x = add_noise(x0, noise_of(rngs, x.shape[1:], x.device), x.new_full((len(x),), t_next))
    raise ValueError(f"steps = {steps}: at least one step is needed")


def noise_of(rngs: list[torch.Generator], shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """One draw (B, *shape) from each video's own CPU generator: the noise `WanImageToVideoPipeline` would draw."""
    return torch.cat([torch.randn((1, *shape), generator=rng) for rng in rngs]).to(device)


def draw(model: nn.Module, row: Sampler, shift: float, condition: Condition, shape: tuple, seeds: list[int]) -> Tensor:
    """Sample latents (B, *shape) as one row of the tables does, one seed a video."""
    rngs = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = noise_of(rngs, shape, condition.text_BLD.device)
    if row.model == "teacher":
        return euler(model, noise, condition, row.steps, shift, row.guidance_scale)
    return few_step(model, noise, condition, row.steps, shift, rngs, row.guidance_scale)


def model_folder(inputs: dict[str, Path], model: str) -> Path:
    """The pipeline folder of a row's model."""
    return inputs["teacher"] if model == "teacher" else inputs[model] / "student"


def run(settings: Experiment, inputs: dict[str, Path], out: Path, state: Path) -> dict:
    """Animate the held-out first frames by every row's model.

    Writes `ROW/latents.safetensors` (all of them), `ROW/{prompt}-{index}.mp4` (the first `decode`), a contact sheet
    `ROW.png`, the same for the real clips through the VAE (`real/`), and `suite.jsonl` (what was asked for).
    """
    config, geometry = settings.samples, settings.geometry
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = LatentDataset(inputs["latents"], "held_out")
    suite = make_suite(dataset, config.count, settings.seed)
    (out / "suite.jsonl").write_text("".join(json.dumps(item) + "\n" for item in suite))
    shape = (16, *geometry.latent_shape)
    state.mkdir(parents=True, exist_ok=True)
    vae = load_pipeline(inputs["teacher"], transformer=None, text_encoder=None, image_encoder=None).vae.to(device)
    x0_real = torch.cat([dataset.batch([n])[0] for n in range(config.count)])
    _write_row(out, "real", x0_real, suite, vae, settings)
    for name, row in config.rows.items():
        finished = state / f"{name}.safetensors"  # a row is the unit of resuming
        if not finished.is_file():
            model = load_transformer(model_folder(inputs, row.model)).to(device).eval()
            x0 = _sample_row(model, name, row, dataset, suite, shape, settings, device)
            save_file({"x0": x0}, finished.with_suffix(".tmp"))
            finished.with_suffix(".tmp").replace(finished)
        _write_row(out, name, load_file(finished)["x0"], suite, vae, settings)
    return {"rows": len(config.rows) + 1, "videos": config.decode, "latents": config.count}


def make_suite(dataset: LatentDataset, count: int, seed: int) -> list[dict]:
    """What to animate: key, prompt, index among equal prompts, seed. The seed depends on prompt and index alone."""
    seen: Counter = Counter()
    suite = []
    for entry in dataset.entries[:count]:
        index = seen[entry.caption]
        seen[entry.caption] += 1
        name = f"{file_stem(entry.caption)}-{index}"
        noise_seed = derived_seed(seed, "samples", entry.caption, index) % 2**31
        suite.append(
            {"key": entry.key, "prompt": entry.caption, "index": index, "file": f"{name}.mp4", "seed": noise_seed}
        )
    return suite


def file_stem(prompt: str) -> str:
    """A prompt as a file name: VBench's rule, with what file systems refuse replaced."""
    return re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", prompt)[:200]


@torch.no_grad()
def _sample_row(model, name, row, dataset, suite, shape, settings, device) -> Tensor:
    size, shift = settings.samples.batch_size, settings.teacher.shift
    progress, parts = Progress(len(suite), f"samples/{name}"), []
    for start in range(0, len(suite), size):
        batch = suite[start : start + size]
        _, condition = dataset.batch(list(range(start, start + len(batch))), device)
        parts.append(draw(model, row, shift, condition, shape, [item["seed"] for item in batch]).cpu())
        progress.update(len(batch))
    progress.close()
    return torch.cat(parts)


@torch.no_grad()
def _write_row(out: Path, name: str, x0: Tensor, suite: list[dict], vae, settings: Experiment) -> None:
    folder = out / name
    folder.mkdir()
    save_file({"x0": x0.contiguous()}, folder / "latents.safetensors")
    sheet = []
    for item, latents in zip(suite[: settings.samples.decode], x0, strict=False):
        frames = decode_latents(vae, latents[None])[0].cpu().numpy()
        write_video(folder / item["file"], frames, settings.geometry.fps, settings.samples.crf, reproducible=False)
        sheet.append(np.concatenate(frames[:: max(1, (len(frames) - 1) // 4)], axis=1))
    Image.fromarray(np.concatenate(sheet[:16])).save(out / f"{name}.png")


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
) -> None:
    """Animate one image and write the mp4 (and, if wanted, the exact frames as .npy).

    Raises:
        FileNotFoundError: no such model or image.
    """
    if not image.is_file():
        raise FileNotFoundError(f"{image}: no such image")
    pipeline = load_pipeline(model).to("cuda" if torch.cuda.is_available() else "cpu")
    geometry = json.loads((model / GEOMETRY).read_text()) if (model / GEOMETRY).is_file() else {}
    picture = Image.open(image).convert("RGB")
    if geometry:
        picture = picture.resize((geometry["width"], geometry["height"]), Image.Resampling.BICUBIC)
    frames = animate(pipeline, picture, prompt, steps, guidance_scale, seed, num_frames or geometry.get("frames", 81))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_video(out, frames, geometry.get("fps", 16.0), crf=10, reproducible=False)
    if frames_out is not None:
        np.save(frames_out, frames)


@torch.no_grad()
def animate(
    pipeline: WanImageToVideoPipeline,
    picture: Image.Image,
    prompt: str,
    steps: int,
    guidance_scale: float,
    seed: int,
    num_frames: int,
) -> np.ndarray:
    """One video from one image, uint8 (T, H, W, 3); a student's scheduler re-noises, a teacher's does not."""
    encoders, device = Encoders(pipeline), pipeline.vae.device
    first = np.asarray(picture)
    frame = encoders.conditions([first], num_frames)
    texts = encoders.texts([prompt, ""])
    condition = Condition(
        frame_BCFHW=torch.cat([first_frame_mask(1, *frame.shape[2:]), frame], dim=1).to(device),
        image_BND=encoders.images([first]).to(device),
        text_BLD=pad_text(texts[0])[None].to(device),
        empty_text_LD=pad_text(texts[1]).to(device),
    )
    student = bool(pipeline.scheduler.config.get("stochastic_sampling", False))
    row = Sampler(model="equilibrium" if student else "teacher", steps=steps, guidance_scale=guidance_scale)
    scheduler = pipeline.scheduler.config
    shift = scheduler.get("shift", scheduler.get("flow_shift", 1.0))  # the second is UniPC's, of released Wan pipelines
    latents = draw(pipeline.transformer, row, shift, condition, tuple(frame.shape[1:]), [seed])
    return decode_latents(pipeline.vae, latents)[0].cpu().numpy()
