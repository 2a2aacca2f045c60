"""A small network that tells how much a frame of the procedural world is distorted.

It is trained here, within seconds and from a fixed seed, on frames that were blurred, made noisy, quantised in 8 x 8
blocks or cut off in frequency (which rings, as a small VAE's frames do), each with a strength drawn between nothing and
what ruins the frame. It judges frames of about 64 x 64 pixels of that world, and no others.
Axes: N frames, D statistics, H height, W width, 3 colours in [0, 1].
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vpae.artifacts import digest, written
from vpae.data.world import draw_truth, render
from vpae.evaluation.vbench.tiny.classical import gaussian

SIZE = 64  # of the training frames, pixels
RECIPE = {"version": 2, "seed": 0, "frames": 256, "variants": 6, "steps": 500, "rate": 1e-2, "decay": 1e-2}


class QualityNet(nn.Module):
    """Frames (N, 3, H, W) -> quality (N,), 0 (ruined) to 100 (as rendered)."""

    def __init__(self, width: int = 32):
        super().__init__()
        count = 2 * 15 * 3 + 4
        self.mean = nn.Buffer(torch.zeros(count))
        self.std = nn.Buffer(torch.ones(count))
        self.layers = nn.Sequential(
            nn.Linear(count, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)
        )

    def forward(self, frames_N3HW: Tensor) -> Tensor:
        return self.judge(statistics(frames_N3HW))

    def judge(self, statistics_ND: Tensor) -> Tensor:
        """Statistics (N, D) -> quality (N,)."""
        return 100 * torch.sigmoid(self.layers((statistics_ND - self.mean) / self.std)).flatten()


def statistics(frames_N3HW: Tensor) -> Tensor:
    """How much there is of each pattern, and how unevenly it is spread, (N, D) on a logarithmic scale.

    The patterns are the 15 that vary of the 4 x 4 cosine transform, at full and at half size; of each the mean absolute
    value and the roots of the mean second and fourth powers. Then the jumps along both axes, at the borders of 8 x 8
    blocks and elsewhere.
    """
    filters = torch.einsum("ui,vj->uvij", _cosines(4), _cosines(4)).reshape(16, 1, 4, 4)[1:].to(frames_N3HW)
    found = []
    for frames in (frames_N3HW, F.avg_pool2d(frames_N3HW, 2)):
        answers = F.conv2d(rearrange(frames, "n c h w -> (n c) 1 h w"), filters).abs()
        answers = rearrange(answers, "(n c) k h w -> n k (c h w)", c=3)
        found += [answers.mean(2), answers.square().mean(2).sqrt(), answers.pow(4).mean(2).pow(0.25)]
    for axis in (2, 3):
        jumps = frames_N3HW.diff(dim=axis).abs().mean([i for i in (1, 2, 3) if i != axis])
        border = torch.arange(1, jumps.shape[1] + 1, device=jumps.device) % 8 == 0
        found += [jumps[:, border].mean(1, keepdim=True), jumps[:, ~border].mean(1, keepdim=True)]
    return torch.log(torch.cat(found, 1) + 1e-4)


def _cosines(size: int) -> Tensor:
    """The orthonormal cosine transform, rows by frequency."""
    k = torch.arange(size, dtype=torch.float32)
    basis = torch.cos(math.pi / size * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def quality(state: Path) -> QualityNet:
    """The trained network, kept in a folder for the next time; equal recipes give one network."""
    path, recipe = state / "quality.safetensors", digest(RECIPE)
    if path.is_file():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("recipe") == recipe:
                model = QualityNet()
                model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                return model.eval().requires_grad_(False)
    print(f"vpae: training the small quality network, kept in {path}", file=sys.stderr)
    threads = torch.get_num_threads()
    # Thousands of products too small to be shared: where cores are busy, threads spend their time on waiting.
    torch.set_num_threads(1)
    try:
        model = train()
    finally:
        torch.set_num_threads(threads)
    state.mkdir(parents=True, exist_ok=True)
    with written(path) as temporary:
        save_file(model.state_dict(), temporary, {"recipe": recipe})
    return model


def train() -> QualityNet:
    """Regress the strength of the distortions; the result is in evaluation mode."""
    rng = np.random.default_rng(RECIPE["seed"])
    frames_N3HW, strengths_N = examples(rng, RECIPE["frames"], RECIPE["variants"])
    seen_ND = torch.cat([statistics(chunk) for chunk in frames_N3HW.split(64)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RECIPE["seed"])
        model = QualityNet()
    model.mean, model.std = seen_ND.mean(0), seen_ND.std(0)
    optimizer = torch.optim.AdamW(model.parameters(), RECIPE["rate"], weight_decay=RECIPE["decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE["rate"], RECIPE["steps"])
    with torch.enable_grad():
        for _ in range(RECIPE["steps"]):
            loss = F.mse_loss(model.judge(seen_ND) / 100, 1 - strengths_N)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def examples(rng: np.random.Generator, count: int, variants: int) -> tuple[Tensor, Tensor]:
    """Distorted frames of `count` worlds, `variants` of each, and the strengths, 0 (untouched) to 1."""
    frames, strengths = [], []
    for _ in range(count):
        truth = draw_truth((int(rng.integers(2**32)),), 1, 1.0, 0.0, 0.25)
        clean = torch.from_numpy(render(truth, SIZE, SIZE)[0]).permute(2, 0, 1).float() / 255
        for _ in range(variants):
            strength = max(0.0, rng.uniform(-0.15, 1.0))  # some frames are left untouched
            distort = (blur, noise, blocks, ringing)[rng.integers(4)]
            frames.append(as_bytes(distort(clean, strength, rng)) if strength else clean)
            strengths.append(strength)
    return torch.stack(frames), torch.tensor(strengths)


def as_bytes(frame_3HW: Tensor) -> Tensor:
    """What is left of a frame in [0, 1] after it was stored in bytes."""
    return (frame_3HW.clamp(0, 1) * 255).round() / 255


def blur(frame_3HW: Tensor, strength: float, _rng: np.random.Generator) -> Tensor:
    """Gaussian, up to 2 pixels wide."""
    return gaussian(frame_3HW[None], 0.3 + 1.7 * strength, 6)[0]


def noise(frame_3HW: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """White, up to a standard deviation of 0.15."""
    return frame_3HW + 0.15 * strength * torch.from_numpy(rng.standard_normal(frame_3HW.shape, np.float32))


def blocks(frame_3HW: Tensor, strength: float, _rng: np.random.Generator) -> Tensor:
    """The cosine transform of 8 x 8 blocks, in steps of up to 0.8 (brightness) that grow with frequency, as in JPEG."""
    basis = _cosines(8)
    k = torch.arange(8, dtype=torch.float32)
    step = 0.8 * strength * (1 + k[:, None] + k[None]) / 8
    tiles = rearrange(frame_3HW, "c (h p) (w q) -> c h w p q", p=8, q=8)
    kept = (basis @ tiles @ basis.T / step).round() * step
    return rearrange(basis.T @ kept @ basis, "c h w p q -> c (h p) (w q)")


def ringing(frame_3HW: Tensor, strength: float, _rng: np.random.Generator) -> Tensor:
    """No frequency above a limit, which falls from 0.5 to 0.1 cycles a pixel."""
    height, width = frame_3HW.shape[-2:]
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    spectrum = torch.fft.rfft2(frame_3HW) * (radius <= 0.5 - 0.4 * strength)
    return torch.fft.irfft2(spectrum, s=(height, width))
