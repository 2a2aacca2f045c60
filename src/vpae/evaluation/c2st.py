"""Classifier two-sample test (C2ST): can a small network tell generated latents from real ones?

Its accuracy on clips it was not trained on is 0.5 where it cannot, and 1 where it always can. It sees what a Frechet
distance of random features does not: those features were never trained to find a difference. It also sees the first
frame's latents, so that a video that does not belong to its first frame is found too.

The recipe (network, batch, rate) is fixed here, so that methods are compared by the same judge. More clips or steps
make a stronger judge: compare figures of one recipe only.
Axes: N videos, C channels, F latent frames, H, W.
Source: Lopez-Paz and Oquab, Revisiting Classifier Two-Sample Tests, 2017.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

WIDTH = 48
BATCH = 128  # of each kind
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
WARMUP = 20


@dataclass(frozen=True)
class Pairs:
    """Real latents, generated ones, and the condition's latents of the same first frames, each (N, C, F, H, W).

    The three have the same N. Row i of all three is one clip, so that both kinds hold the same first frames.
    """

    real: Tensor
    generated: Tensor
    condition: Tensor

    def __post_init__(self) -> None:
        if self.real.shape != self.generated.shape or len(self.real) != len(self.condition):
            shapes = ", ".join(str(tuple(x.shape)) for x in (self.real, self.generated, self.condition))
            raise ValueError(f"real, generated and condition latents of the same clips are needed, not {shapes}")


class Classifier(nn.Module):
    """Latents and condition -> one logit, positive for real. 2 x 2 patches first, then two 3-D convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        d = WIDTH
        self.patches = nn.Conv3d(4 * channels, d, 1)
        self.near = nn.Sequential(nn.Conv3d(d, d, 3, padding=1), nn.GroupNorm(8, d), nn.SiLU())
        self.far = nn.Sequential(nn.Conv3d(d, 2 * d, 3, padding=1, stride=(1, 2, 2)), nn.GroupNorm(8, 2 * d), nn.SiLU())
        self.to_logit = nn.Linear(4 * d, 1)

    def forward(self, x_NCFHW: Tensor, condition_NCFHW: Tensor) -> Tensor:
        """Logits (N,)."""
        both = torch.cat([x_NCFHW, condition_NCFHW], dim=1)
        patches = rearrange(both, "n c f (h p) (w q) -> n (c p q) f h w", p=2, q=2)
        h = rearrange(self.far(self.near(F.silu(self.patches(patches)))), "n d f h w -> n d (f h w)")
        return self.to_logit(torch.cat([h.mean(-1), h.std(-1)], dim=1)).squeeze(-1)


def accuracy(fit: Pairs, test: Pairs, steps: int, seed: int) -> float:
    """Train a classifier on `fit` and return its accuracy on `test`, in [0, 1]; see `right`."""
    return float(right(fit, test, steps, seed).mean())


def right(fit: Pairs, test: Pairs, steps: int, seed: int) -> Tensor:
    """Train a classifier on `fit`, and say how often it is right about the two videos of each clip of `test`.

    A step sees 128 real and 128 generated videos; `seed` is that of the weights and of the order of the clips.

    Returns:
        0, 1/2 or 1 for each clip of `test`, (N,) on the CPU.
    """
    device = "cuda" if torch.cuda.is_available() else fit.real.device
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Classifier(fit.real.shape[1] + fit.condition.shape[1]).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _schedule(step, steps)
        # Two independent draws: a pair of one clip in every batch would be found by comparing the two.
        i, j = (torch.randint(len(fit.real), (BATCH,), generator=rng).to(fit.real.device) for _ in range(2))
        x, c = torch.cat([fit.real[i], fit.generated[j]]), torch.cat([fit.condition[i], fit.condition[j]])
        real, generated = network(x.to(device), c.to(device)).chunk(2)
        loss = F.softplus(-real).mean() + F.softplus(generated).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        split = (x.split(2 * BATCH) for x in (test.real, test.generated, test.condition))
        batches = ([x.to(device) for x in batch] for batch in zip(*split, strict=True))
        found = [((network(x, c) > 0).float() + (network(y, c) < 0).float()) / 2 for x, y, c in batches]
    return torch.cat(found).cpu()


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to 2%."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))
