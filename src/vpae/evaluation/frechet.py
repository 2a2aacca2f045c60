"""Frechet distance between sets of latents, in the features of a fixed random network.

Random convolution features need no decoding and no download, and they rank the methods of one experiment. They cannot
be compared between experiments with different VAEs, nor with FVD.
Axes: N videos, C channels, F latent frames, H, W, D features.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 48  # far fewer than the videos, so that the covariance is well estimated
AT_ONCE = 16
_SEED = 20250828  # fixed: the metric must be the same network everywhere


class RandomFeatures(nn.Module):
    """Two layers of random 3-D convolutions, pooled to means and deviations over space and time."""

    def __init__(self, channels: int = 16):
        super().__init__()
        rng = torch.Generator().manual_seed(_SEED)
        width = FEATURES // 2

        def weights(out: int, into: int) -> Tensor:
            return torch.randn(out, into, 3, 3, 3, generator=rng) * (2 / (27 * into)) ** 0.5

        self.register_buffer("first", weights(2 * width, channels))
        self.register_buffer("second", weights(width, 2 * width))

    @torch.no_grad()
    def forward(self, x_NCFHW: Tensor) -> Tensor:
        """Features (N, D) of normalised latents; a few videos at a time, since each takes fifty times its latents."""
        return torch.cat([self._of(x) for x in x_NCFHW.split(AT_ONCE)])

    def _of(self, x_NCFHW: Tensor) -> Tensor:
        h = F.leaky_relu(F.conv3d(x_NCFHW.float(), self.first, padding=1), 0.2)
        h = F.leaky_relu(F.conv3d(h, self.second, padding=1, stride=(1, 2, 2)), 0.2)
        h = h.flatten(2)
        return torch.cat([h.mean(-1), h.std(-1)], dim=1)


def frechet(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians fitted to feature sets.

    Raises:
        ValueError: fewer than two rows.
    """
    if min(len(a_ND), len(b_ND)) < 2:
        raise ValueError("a Frechet distance needs at least two videos on each side")
    mean = float(np.square(a_ND.mean(0) - b_ND.mean(0)).sum())
    cov_a, cov_b = np.cov(a_ND, rowvar=False), np.cov(b_ND, rowvar=False)
    # tr (A B)^(1/2) by eigenvalues of the symmetric A^(1/2) B A^(1/2): exact, and never complex.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return max(0.0, mean + float(np.trace(cov_a) + np.trace(cov_b) - 2 * cross))
