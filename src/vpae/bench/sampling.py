"""How long a video takes: the network steps, each part of the way from image and prompt to an mp4, and the VAE both
ways."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from vpae.bench.measure import first_line, if_it_fits, matmul_peak, seconds_of, timed
from vpae.bench.networks import Components, random_condition
from vpae.config import Experiment
from vpae.data.video import write_video
from vpae.models.small_decoder import SmallDecoder
from vpae.models.wan import TEXT_TOKENS, decode_latents, encode_condition, encode_video, predict_x0, take_any_inputs
from vpae.planning.inference import network_use
from vpae.planning.network import Network, Sequence
from vpae.sampling import euler

EAGER, COMPILED = "eager", "compiled"
NO_KERNEL = "No available kernel"  # what torch says of a native backend that is not for this device or these sizes
LONG_SECONDS = 60.0  # a row that takes longer is timed once: a hundred evaluations are their own average


@dataclass
class Bench:
    """Times the networks of a pipeline on a device at an experiment's geometry; the median of the repeats counts."""

    settings: Experiment
    parts: Components
    network: Network
    tokens: Sequence
    device: torch.device
    repeats: int

    def __post_init__(self) -> None:
        self.flops = network_use(self.settings, self.network, self.tokens, 1).operations
        self.peak = matmul_peak(self.device, self.parts.transformer.dtype)
        take_any_inputs(self.parts.transformer)

    @torch.no_grad()
    def evaluations(self, batch_sizes: tuple[int, ...], attention: tuple[str, ...], compiled: bool) -> Iterator[dict]:
        """One network evaluation for each attention backend and batch size, eager and, if wanted, compiled."""
        modes = (EAGER, COMPILED) if compiled else (EAGER,)
        for mode, backend, batch in product(modes, attention, batch_sizes):
            yield {"attention": backend, "mode": mode, "batch": batch} | self._evaluation(mode, backend, batch)

    def _evaluation(self, mode: str, backend: str, batch: int) -> dict:
        """The time of a row, or why there is none: what this machine lacks ends no measurement, other errors do."""
        try:
            self._prepare(mode, backend)
        except (ImportError, OSError, RuntimeError, ValueError) as error:  # diffusers' ways to refuse a backend
            return {"skipped": f"the backend is not to be had: {first_line(error)}"}
        try:
            prediction = self._prediction(batch)
            found = if_it_fits(partial(timed, prediction, self.device, self.repeats, warmup=2), self.device)
        except TorchDynamoException as error:
            if mode == EAGER:
                raise
            return {"skipped": f"cannot be compiled: {first_line(getattr(error, 'inner_exception', error))}"}
        except RuntimeError as error:
            if NO_KERNEL not in str(error):
                raise
            return {"skipped": f"the backend cannot do this here: {first_line(error)}"}
        if "skipped" in found:
            return found
        rate = batch * self.flops / found["seconds"]
        return {**found, "seconds_per_nfe_and_video": found["seconds"] / batch, "share_of_peak": rate / self.peak}

    def _prepare(self, mode: str, backend: str) -> None:
        """Have the transformer run in a mode with a backend.

        Raises:
            ImportError, OSError, RuntimeError, ValueError: there is no such backend here.
        """
        model = self.parts.transformer
        model.set_attention_backend(backend)
        for module in model.modules():
            module._compiled_call_impl = None
        # Else torch counts what each row compiles anew, and soon runs the rows after it uncompiled without a word.
        torch._dynamo.reset()
        if mode == COMPILED:
            model.compile_repeated_blocks()

    def _prediction(self, batch: int) -> Callable[[], Tensor]:
        shape = (batch, 16, *self.settings.geometry.latent_shape)
        condition = random_condition(self.settings, self.network, self.tokens, batch, self.device)
        noise, one = torch.randn(shape, device=self.device), torch.ones(batch, device=self.device)
        return lambda: predict_x0(self.parts.transformer, noise, one, condition)

    @torch.no_grad()
    def videos(self, steps: tuple[int, ...], guidance: float, mode: str, backend: str) -> Iterator[dict]:
        """One video end to end for each number of steps; those of several steps are guided, as teachers sample."""
        self._prepare(mode, backend)
        for number in steps:
            w = 1.0 if number == 1 else guidance
            row = {"attention": backend, "mode": mode, "steps": number, "guidance": w}
            row["nfe"] = number * (1 if w == 1.0 else 2)
            yield row | if_it_fits(partial(self._videos, number, w, row["nfe"]), self.device)

    def _videos(self, steps: int, guidance: float, nfe: int) -> dict:
        self._video(1, 1.0)  # nothing is timed cold
        runs = [self._video(steps, guidance)]
        while len(runs) < self.repeats and sum(runs[0].values()) < LONG_SECONDS:
            runs.append(self._video(steps, guidance))
        found = {part: median(run[part] for run in runs) for part in runs[0]}
        return {
            "runs": len(runs),
            "seconds": found,
            "total_seconds": sum(found.values()),
            "diffusion_seconds_per_nfe": found["diffusion"] / nfe,
            "diffusion_share_of_peak": nfe * self.flops / found["diffusion"] / self.peak,
        }

    def _video(self, steps: int, guidance: float) -> dict[str, float]:
        """Seconds of each part of one video."""
        geometry, parts, device = self.settings.geometry, self.parts, self.device
        first_B3HW = torch.rand(1, 3, geometry.height, geometry.width, device=device) * 2 - 1
        # Prompt and negative prompt, padded as a pipeline pads them, whether there is guidance or not.
        ids = torch.ones(2, TEXT_TOKENS, dtype=torch.long, device=device)
        side = parts.image_encoder.config.image_size
        pixels = torch.rand(1, 3, side, side, device=device)
        tokens = replace(self.tokens, text=TEXT_TOKENS)
        condition = random_condition(self.settings, self.network, tokens, 1, device)
        noise = torch.randn(1, 16, *geometry.latent_shape, device=device)
        result: dict[str, Tensor] = {}

        def encode_text() -> None:
            parts.text_encoder(input_ids=ids, attention_mask=ids)

        def diffuse() -> None:
            result["latents"] = euler(parts.transformer, noise, condition, steps, self.settings.teacher.shift, guidance)

        def decode() -> None:
            result["frames"] = decode_latents(parts.vae, result["latents"])[0].cpu()

        def write() -> None:
            with tempfile.TemporaryDirectory() as folder:
                frames: np.ndarray = result["frames"].numpy()
                write_video(Path(folder) / "clip.mp4", frames, geometry.fps, self.settings.samples.crf, False)

        work = {
            "text": encode_text,
            "image": lambda: parts.image_encoder(pixel_values=pixels, output_hidden_states=True),
            "condition": lambda: encode_condition(parts.vae, first_B3HW, geometry.frames),
            "diffusion": diffuse,
            "decode": decode,
            "mp4": write,
        }
        return {name: seconds_of(run, device) for name, run in work.items()}


@torch.no_grad()
def measure_vae(settings: Experiment, parts: Components, device: torch.device, batch: int, repeats: int) -> dict:
    """Encoding of videos and of their conditions, and decoding, in frames per second.

    Conditions also as diffusers encodes them; `condition_error` is the largest difference between the two.
    """
    g = settings.geometry
    video_B3THW = torch.rand(batch, 3, g.frames, g.height, g.width, device=device) * 2 - 1
    first_then_grey = torch.cat([video_B3THW[:, :, :1], torch.zeros_like(video_B3THW[:, :, 1:])], dim=2)
    latents = encode_video(parts.vae, video_B3THW)
    small = SmallDecoder().to(device, parts.vae.dtype)  # of any weights: they change no time
    work = {
        "encode": lambda: encode_video(parts.vae, video_B3THW),
        "condition": lambda: encode_condition(parts.vae, video_B3THW[:, :, 0], g.frames),
        "condition, frame by frame": lambda: encode_video(parts.vae, first_then_grey),
        "decode": lambda: decode_latents(parts.vae, latents),
        "decode, small decoder": lambda: decode_latents(small, latents),
    }
    found = {name: timed(run, device, repeats) for name, run in work.items()}
    for row in found.values():
        row["frames_per_second"] = batch * g.frames / row["seconds"]
    ours, theirs = work["condition"](), work["condition, frame by frame"]()
    return {"batch": batch, "condition_error": (ours - theirs).abs().max().item(), **found}


def fastest(evaluations: list[dict]) -> tuple[str, str]:
    """Mode and attention backend of the fastest row that was measured; of single videos, if there are such rows."""
    measured = [row for row in evaluations if "skipped" not in row]
    rows = [row for row in measured if row["batch"] == 1] or measured
    if not rows:
        return EAGER, "native"
    best = min(rows, key=lambda row: row["seconds_per_nfe_and_video"])
    return best["mode"], best["attention"]


def ratios(videos: list[dict]) -> dict[str, float]:
    """Diffusion time of the most network evaluations over that of the fewest, and of the whole; empty for one row."""
    measured = [row for row in videos if "skipped" not in row]
    if len(measured) < 2:
        return {}
    few, many = (choose(measured, key=lambda row: row["nfe"]) for choose in (min, max))
    return {
        "nfe": many["nfe"] / few["nfe"],
        "diffusion": many["seconds"]["diffusion"] / few["seconds"]["diffusion"],
        "end_to_end": many["total_seconds"] / few["total_seconds"],
    }
