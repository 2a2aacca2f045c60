"""Stage `samples`: the videos of every row of the tables, drawn in batches that resume by themselves."""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from vpae.artifacts import ArtifactError, is_kept, kept, link
from vpae.config import Experiment, Sampler, Samples
from vpae.data.latents import LatentDataset
from vpae.data.names import file_names
from vpae.data.video import write_video
from vpae.models.formats import channels_last, formats
from vpae.models.small_decoder import SmallDecoder, load_small_decoder
from vpae.models.wan import decode_latents, load_pipeline, load_sampler
from vpae.parts import Part
from vpae.placement import DTYPES, compiling_pays
from vpae.preemption import Interruption
from vpae.progress import Progress
from vpae.randomness import derived_seed
from vpae.sampling import draw, model_folder, row_shift
from vpae.teacher.folder import decoder_inputs as external_inputs  # noqa: F401, the stage's

REAL = "real"  # the row of the clips themselves, which only go through the VAE
SHEET = 16  # videos on a contact sheet
# How many network evaluations a decoding counts for when work is shared out. In a large model it takes about as long as
# one, in a small one as dozens; and there it is more of the work.
DECODING = 10
# Up to this height x width, equal frames give equal files: exact coding takes no time that counts. In larger videos it
# would take longer than drawing them, and their latents are equal all the same.
EXACT_UP_TO = 128 * 128


@dataclass(frozen=True)
class Batch:
    """Videos of one row that are drawn together: the unit of resuming, and of sharing the work.

    `sampler` is None for the clips themselves; the first `decoded` become videos.
    """

    row: str
    sampler: Sampler | None
    start: int
    size: int
    decoded: int

    def file(self, state: Path) -> Path:
        """Where its latents go, last of all: once they are there, so are its videos."""
        return state / self.row / f"{self.start:06d}.safetensors"


def run(settings: Experiment, inputs: dict[str, Path], out: Path, state: Path) -> dict:
    """Animate the held-out first frames by every row's model.

    Writes `ROW/latents.safetensors` (all of them), `ROW/{prompt}-{index}.mp4` (the first `decode`), a contact sheet
    `ROW.png`, the same for the real clips through the VAE (`real/`), and `suite.jsonl` (what was asked for).
    """
    config, batches = settings.samples, _batches(settings)
    suite = _complete(batches, settings, inputs, state, "samples")
    (out / "suite.jsonl").write_text("".join(json.dumps(item) + "\n" for item in suite))
    for row, drawn in groupby(batches, key=lambda batch: batch.row):
        found = [load_file(batch.file(state)) for batch in drawn]
        (out / row).mkdir()
        save_file({"x0": torch.cat([one["x0"] for one in found])}, out / row / "latents.safetensors")
        for item in suite[: config.decode]:
            link(state / row / item["file"], out / row / item["file"])
        strips_NHW3 = torch.cat([one["strips"] for one in found if "strips" in one])[:SHEET]
        Image.fromarray(rearrange(strips_NHW3, "n h w c -> (n h) w c").numpy()).save(out / f"{row}.png")
    return {"rows": len(config.rows) + 1, "videos": config.decode, "latents": config.count}


def part(settings: Experiment, inputs: dict[str, Path], state: Path, part: Part) -> None:
    """Draw and decode one part's share of the videos into the state folder."""
    batches = _batches(settings)
    costs = [batch.size * (batch.sampler.nfe if batch.sampler else 0) + DECODING * batch.decoded for batch in batches]
    # Neighbours are mostly of one row: few models to load.
    _complete(part.stretch(batches, costs), settings, inputs, state, f"samples {part}")


def _batches(settings: Experiment) -> list[Batch]:
    config, found = settings.samples, []
    for row, sampler in {REAL: None, **config.rows}.items():
        for start in range(0, config.count, config.batch_size):
            size = min(config.batch_size, config.count - start)
            found.append(Batch(row, sampler, start, size, min(max(config.decode - start, 0), size)))
    return found


@torch.no_grad()
def _complete(
    batches: list[Batch], settings: Experiment, inputs: dict[str, Path], state: Path, label: str
) -> list[dict]:
    """See that all these videos are in the state folder; returns the whole suite.

    Raises:
        Interruption: asked to end; finished batches are kept.
        ArtifactError: a row's model gave no finite numbers.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = LatentDataset(inputs["latents"], "held_out")
    suite = make_suite(dataset, settings.samples.count, settings.seed)

    def is_there(batch: Batch) -> bool:
        videos = [state / batch.row / item["file"] for item in suite[batch.start :][: batch.decoded]]
        return all(map(is_kept, [batch.file(state), *videos]))

    def model_of(batch: Batch) -> str:
        return batch.sampler.model if batch.sampler else ""

    missing = [batch for batch in batches if not is_there(batch)]
    if not missing:
        return suite
    decoder = small_decoder(settings.samples) or load_vae(inputs["teacher"], settings.samples)
    decoder.to(device)
    progress = Progress(sum(batch.size for batch in missing), label)
    with Interruption.watch() as request:
        for name, group in groupby(sorted(missing, key=model_of), key=model_of):  # each model is loaded once
            drawn = list(group)
            model = load_sampler(model_folder(inputs, name)).to(device) if name else None
            evaluations = sum(batch.sampler.nfe for batch in drawn if batch.sampler)
            if model is not None and settings.samples.compile and compiling_pays(model, device, evaluations):
                model.compile_repeated_blocks()
            for batch in drawn:
                if request.requested:
                    raise Interruption(f"{label}: {progress.done} more videos are in {state}")
                x0, condition = dataset.batch(list(range(batch.start, batch.start + batch.size)), device)
                items, row = suite[batch.start :][: batch.size], batch.sampler
                if row:
                    seeds = [item["seed"] for item in items]
                    x0 = draw(model, row, row_shift(settings, inputs, row), condition, tuple(x0.shape[1:]), seeds)
                    _require_numbers(x0, batch.row, model_folder(inputs, name))
                _keep(batch, x0, items[: batch.decoded], decoder, settings, state)
                progress.update(batch.size, batch.row)
            model = None  # two large models at a time may be too many
    progress.close()
    return suite


def _require_numbers(x0: Tensor, row: str, model: Path) -> None:
    if not x0.isfinite().all():
        raise ArtifactError(
            f"samples.rows.{row}: {model} gave no finite numbers: its training diverged, see its metrics.jsonl, or the "
            "row's guidance_scale is too large; train it at a lower rate, or leave the row out "
            f"(samples.rows.{row}: null)"
        )


def load_vae(folder: Path, config: Samples) -> AutoencoderKLWan:
    """A pipeline's VAE as the settings want it to decode."""
    dtypes = formats(folder, vae=DTYPES[config.vae_dtype])
    vae = load_pipeline(folder, dtypes, transformer=None, text_encoder=None, image_encoder=None).vae
    if config.vae_tiles:
        vae.enable_tiling()
    return channels_last(vae) if config.vae_channels_last else vae


def small_decoder(config: Samples) -> SmallDecoder | None:
    """What decodes in the VAE's place, if the settings name it."""
    return load_small_decoder(config.decoder, DTYPES[config.vae_dtype]) if config.decoder else None


def _keep(batch: Batch, x0: Tensor, decoded: list[dict], decoder, settings: Experiment, state: Path) -> None:
    """Write a batch to the state folder: the videos of its first items, and then its latents."""
    batch.file(state).parent.mkdir(parents=True, exist_ok=True)
    tensors, strips = {"x0": x0.cpu().contiguous()}, []
    for item, latents in zip(decoded, x0, strict=False):
        frames = decode_latents(decoder, latents[None])[0].cpu().numpy()
        with kept(state / batch.row / item["file"]) as temporary:
            exact = frames.shape[1] * frames.shape[2] <= EXACT_UP_TO
            write_video(temporary, frames, settings.geometry.fps, settings.samples.crf, reproducible=exact)
        if batch.start + len(strips) < SHEET:
            strips.append(np.concatenate(frames[:: max(1, (len(frames) - 1) // 4)], axis=1))
    if strips:
        tensors["strips"] = torch.from_numpy(np.ascontiguousarray(np.stack(strips)))
    with kept(batch.file(state)) as temporary:
        save_file(tensors, temporary)


def make_suite(dataset: LatentDataset, count: int, seed: int) -> list[dict]:
    """What to animate: key, prompt, index among equal prompts, file, seed, which depends on prompt and index alone."""
    seen, names = Counter[str](), file_names([entry.caption for entry in dataset.entries])
    suite = []
    for entry, name in zip(islice(dataset.entries, count), names, strict=False):
        index = seen[entry.caption]
        seen[entry.caption] += 1
        noise_seed = derived_seed(seed, "samples", entry.caption, index) % 2**31
        suite.append({"key": entry.key, "prompt": entry.caption, "index": index, "file": name, "seed": noise_seed})
    return suite
