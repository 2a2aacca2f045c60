"""Measure one GPU within minutes, most valuable first; every row is written as soon as it is known.

    python -m vpae.bench.device --config CONFIG --part video|sampling|METHOD --out ROWS.jsonl

Networks have the experiment's shapes and random weights, which are made on the device. A part that is killed leaves its
rows; what a device lacks is a row that says so. `workflow/device.sh` runs the parts one after the other.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from vpae.bench import training
from vpae.bench.measure import first_line, free_memory, matmul_peak, seconds_of, synchronise
from vpae.bench.networks import random_condition, random_encoders, random_transformer
from vpae.config import Experiment
from vpae.data.video import write_video
from vpae.data.world import draw_truth, render
from vpae.distill import CHAIN
from vpae.experiment import Source, load
from vpae.models.formats import channels_last
from vpae.models.small_decoder import SmallDecoder
from vpae.models.wan import decode_latents, encode_condition, encode_video, predict_x0, take_any_inputs
from vpae.placement import by_torchao
from vpae.planning.inference import by_size, network_use
from vpae.planning.network import Network, pipeline_of, tokens_of
from vpae.planning.phase import execute

PARTS = ("video", "sampling", *(method.name for method in CHAIN))
GRAIN = 1.3  # of `realistic`: standard deviation, of 255; files are then about as large as of camera clips


class Rows:
    """Measurements of one part, appended to a file of JSON lines."""

    def __init__(self, out: Path, part: str, device: torch.device):
        self.out, self.part, self.device, self.begin = out, part, device, time.perf_counter()

    def add(self, name: str, **values: object) -> None:
        """Write a row; `at` is how many seconds after the part's begin."""
        row = {"part": self.part, "name": name, **values, "at": round(time.perf_counter() - self.begin, 2)}
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def time(self, name: str, work: Callable[[], object], repeats: int = 2, flops: float = 0, **values) -> None:
        """Time some work after a first run, which counts only if it is the only one; an error becomes `skipped`."""
        on_gpu = self.device.type == "cuda"
        try:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(self.device)
            first = seconds_of(work, self.device)
            runs = [seconds_of(work, self.device) for _ in range(repeats)]
        except (AssertionError, ImportError, MemoryError, RuntimeError, ValueError) as error:
            self.skip(name, error, **values)
            free_memory(self.device)
            return
        seconds = min(runs, default=first)
        share = {"share_of_peak": flops / seconds / self.peak} if flops else {}
        memory = {"peak_gb": torch.cuda.max_memory_allocated(self.device) / 1e9} if on_gpu else {}
        self.add(name, seconds=seconds, runs=runs, first=first, **share, **memory, **values)

    def skip(self, name: str, error: Exception, **values: object) -> None:
        """Write why there is no measurement."""
        self.add(name, skipped=f"{type(error).__name__}: {first_line(error)}"[:300], **values)

    @property
    def dtype(self) -> torch.dtype:
        """In which large networks compute here."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @cached_property
    def peak(self) -> float:
        """Operations per second of large matrix products, measured once."""
        return matmul_peak(self.device, self.dtype)


@torch.no_grad()
def video(rows: Rows, source: Source, work: Path) -> None:
    """All that is between an image and an mp4 but the transformer."""
    geometry, device = source.settings.geometry, rows.device
    pipeline = pipeline_of(source)
    encoders = random_encoders(pipeline, device, rows.dtype)
    vae, text_encoder, image_encoder = (encoders[name] for name in ("vae", "text_encoder", "image_encoder"))
    size = (1, 3, geometry.height, geometry.width)
    first = torch.rand(size, device=device) * 2 - 1
    whole = torch.cat([first[:, :, None], torch.zeros(1, 3, geometry.frames - 1, *size[2:], device=device)], dim=2)
    latents = torch.randn(1, 16, *geometry.latent_shape, device=device)
    ids = torch.ones(1, tokens_of(source.settings, pipeline).text, dtype=torch.long, device=device)
    side = image_encoder.config.image_size
    pixels = torch.rand(1, 3, side, side, device=device)
    rows.time("condition", lambda: encode_condition(vae, first, geometry.frames))
    rows.time("decode float32", lambda: decode_latents(vae, latents), 1)
    vae.to(torch.bfloat16)
    rows.time("decode bfloat16", lambda: decode_latents(vae, latents), 1)
    rows.time("condition bfloat16", lambda: encode_condition(vae, first, geometry.frames))
    channels_last(vae)
    rows.time("decode bfloat16 channels-last", lambda: decode_latents(vae, latents), 1)
    for dtype in (torch.float32, torch.bfloat16):
        small = SmallDecoder().to(device, dtype)
        rows.time(f"decode {str(dtype).removeprefix('torch.')} small", partial(decode_latents, small, latents), 1)
    vae.to(torch.float32)
    rows.time("decode float32 channels-last", lambda: decode_latents(vae, latents), 1)
    rows.time("condition channels-last", lambda: encode_condition(vae, first, geometry.frames))
    rows.time("text", lambda: text_encoder(input_ids=ids, attention_mask=ids))
    rows.time("image", lambda: image_encoder(pixel_values=pixels, output_hidden_states=True))
    rows.time("condition, frame by frame", lambda: encode_video(vae, whole), 1)
    ours, theirs = encode_condition(vae, first, geometry.frames), encode_video(vae, whole)
    rows.add("condition error", largest=(ours - theirs).abs().max().item(), of=theirs.abs().max().item())
    frames = realistic(source.settings)
    for name, exact in (("mp4, all threads", False), ("mp4, reproducible", True)):
        rows.time(name, partial(write_video, work / "clip.mp4", frames, geometry.fps, 10, exact), 1 - exact)
    rows.add("mp4 bytes", size=(work / "clip.mp4").stat().st_size)


def realistic(settings: Experiment) -> np.ndarray:
    """uint8 frames (T, H, W, 3) like a camera's: of the procedural world, with a sensor's grain on them."""
    g = settings.geometry
    rng = np.random.default_rng(settings.seed)
    clean = render(draw_truth((settings.seed, 0), g.frames, g.width / g.height, 0.0, 0.0), g.height, g.width)
    grain = rng.normal(0, GRAIN, (4, *clean.shape[1:]))  # four of them in turn: drawing one for each takes longer
    return np.stack([np.clip(frame + grain[i % 4], 0, 255) for i, frame in enumerate(clean)]).astype(np.uint8)


@torch.no_grad()
def sampling(rows: Rows, source: Source, network: Network, backend: str) -> None:
    """One network evaluation: eager, compiled, in fp8."""
    tokens = tokens_of(source.settings, pipeline_of(source))
    flops = network_use(source.settings, network, tokens, 1).operations
    dtype = by_size(network.build()) if rows.device.type == "cuda" else torch.float32
    model = random_transformer(network, rows.device, dtype).requires_grad_(False).eval()
    take_any_inputs(model)
    rows.add("built", dtype=str(dtype))
    condition = random_condition(source.settings, network, tokens, 1, rows.device)
    noise = torch.randn(1, 16, *source.settings.geometry.latent_shape, device=rows.device)
    one = torch.ones(1, device=rows.device)
    results: dict[str, torch.Tensor] = {}

    def evaluate(name: str) -> None:
        results[name] = predict_x0(model, noise, one, condition)

    rows.time("eager", partial(evaluate, "eager"), 1, flops)
    model.compile_repeated_blocks(backend=backend)
    rows.time("compiled", partial(evaluate, "compiled"), 2, flops)
    try:
        by_torchao("fp8-compute")(model.blocks)
    except Exception as error:  # whatever torchao says of this device
        rows.skip("fp8 compiled", error)
        return
    torch._dynamo.reset()
    rows.time("fp8 compiled", partial(evaluate, "fp8"), 2, flops)
    if {"fp8", "compiled"} <= results.keys():
        error = (results["fp8"] - results["compiled"]).norm() / results["compiled"].norm()
        rows.add("fp8 difference", relative=error.item())


def turns(rows: Rows, source: Source, network: Network, backend: str, name: str, compiled: tuple[bool, ...]) -> None:
    """The turns of a phase, compiled or not."""
    tokens = tokens_of(source.settings, pipeline_of(source))
    settings = training.alone(source.settings, name)
    planned = execute(settings, name, network, tokens, 1)
    bench = training.Workbench(settings, name, network, tokens, rows.device)
    synchronise(rows.device)
    rows.add("built")
    for wanted in compiled:
        bench.compile(wanted, backend)
        for turn in sorted(planned.turns, key=lambda turn: turn != bench.phase.main):  # the dearest first
            plan = planned.turns[turn]
            label = f"{turn}, {'compiled' if wanted else 'eager'}"
            per_step = plan.count / bench.training.steps
            rows.time(label, partial(bench.update, turn), 1, plan.model, per_step=per_step, planned_bytes=plan.peak)


def main(argv: list[str] | None = None) -> int:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; rows are appended")
    parser.add_argument("--layers", type=int, default=0, help="fewer than the network has: seconds are in proportion")
    parser.add_argument("--eager", action="store_true", help="a phase's turns without compiled blocks alone")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    source, device = load(arguments.config, arguments.set), torch.device(arguments.device)
    rows = Rows(arguments.out, arguments.part, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    network = pipeline_of(source).transformer
    network = replace(network, layers=arguments.layers or network.layers)
    made = {"experiment": source.name, "layers": network.layers, "set": arguments.set}
    rows.add("begin", device=name, torch=torch.__version__, **made)
    rows.add("matrix products", tflops=rows.peak / 1e12)
    if arguments.part == "video":
        video(rows, source, arguments.out.parent)
    elif arguments.part == "sampling":
        sampling(rows, source, network, arguments.backend)
    else:
        turns(rows, source, network, arguments.backend, arguments.part, (False,) if arguments.eager else (True, False))
    rows.add("end")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
