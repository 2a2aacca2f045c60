"""What is measured on latents, without decoding: Frechet distance, motion, and whether a classifier tells them apart.

For the row `real`, which is the reference of all others, training clips stand in the generated ones' place: what two
samples of reality give is the floor.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vpae.config import Experiment, Sampler
from vpae.data.latents import LatentDataset
from vpae.evaluation import c2st
from vpae.evaluation.frechet import RandomFeatures, frechet
from vpae.evaluation.statistics import bootstrap, jackknife, of_mean
from vpae.models.wan import load_sampler
from vpae.progress import track
from vpae.randomness import derived_seed
from vpae.sampling import draw, model_folder, row_shift

REAL = "real"
JACKKNIFE_GROUPS = 20


def measure(settings: Experiment, inputs: dict[str, Path]) -> dict[str, dict[str, dict[str, float]]]:
    """Row -> metric -> mean, low and high."""

    def drawn(row: str) -> Tensor:  # one row is held at a time
        return load_file(inputs["samples"] / row / "latents.safetensors")["x0"].float()

    reference, scores = drawn(REAL), {}
    for row in (REAL, *settings.samples.rows):
        x = drawn(row) if row != REAL else _clips(LatentDataset(inputs["latents"], "train"), len(reference))[0]
        scores[row] = {"frechet": _distance(x, reference, settings), "motion": _motion(x, reference, settings)}
    if settings.evaluation.c2st.clips:
        for row, found in _told_apart(drawn, reference, settings, inputs).items():
            scores[row]["c2st"] = found
    return scores


def _distance(x: Tensor, reference: Tensor, settings: Experiment) -> dict[str, float]:
    """Frechet distance of random features from the held-out clips'."""
    n, (a, b) = min(len(x), len(reference)), (RandomFeatures()(v).numpy() for v in (x, reference))
    return jackknife(n, lambda i: frechet(a[i], b[i]), JACKKNIFE_GROUPS, settings.seed)


def _motion(x: Tensor, reference: Tensor, settings: Experiment) -> dict[str, float]:
    """Mean change between latent frames, in units of the held-out clips'."""
    n = min(len(x), len(reference))
    moves, real = (v[:n].diff(dim=2).abs().mean(dim=(1, 2, 3, 4)).numpy() for v in (x, reference))
    return bootstrap(n, lambda i: moves[i].sum() / real[i].sum(), settings.evaluation.bootstrap, settings.seed)


def _clips(dataset: LatentDataset, count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Latents and the condition's latents of some clips."""
    clips = [dataset.tensors(i) for i in range(start, min(start + count, len(dataset)))]
    return torch.stack([c["x0"].float() for c in clips]), torch.stack([c["condition"].float() for c in clips])


def _redrawn(row: Sampler, dataset: LatentDataset, count: int, settings: Experiment, inputs: dict[str, Path]) -> Tensor:
    """The latents that a row's model makes of training clips' first frames."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, shift = load_sampler(model_folder(inputs, row.model)).to(device).eval(), row_shift(settings, inputs, row)
    seeds = {i: derived_seed(settings.seed, "c2st", i) % 2**31 for i in range(count)}
    pairs = drawn_beside(dataset, seeds, model, row, shift, settings.samples.batch_size)
    return torch.cat([made.float().cpu() for _, made in pairs])


@torch.no_grad()
def drawn_beside(
    dataset: LatentDataset, seeds: Mapping[int, int], model: nn.Module, row: Sampler, shift: float, batch: int = 32
) -> Iterator[tuple[Tensor, Tensor]]:
    """The latents of clips (number -> seed), and those that a model makes of their conditions, `batch` at a time."""
    device = next(model.parameters()).device
    for start in range(0, len(seeds), batch):
        numbers = list(seeds)[start : start + batch]
        x, condition = dataset.batch(numbers, device)
        yield x, draw(model, row, shift, condition, tuple(x.shape[1:]), [seeds[i] for i in numbers])


def _told_apart(
    drawn: Callable[[str], Tensor], reference: Tensor, settings: Experiment, inputs: dict[str, Path]
) -> dict[str, dict[str, float]]:
    """C2ST of each row that is not too dear: 0.5 where a classifier cannot tell it from real clips."""
    config, train = settings.evaluation.c2st, LatentDataset(inputs["latents"], "train")
    count = min(config.clips, len(train))
    real, condition = _clips(train, count)
    _, held_out = _clips(LatentDataset(inputs["latents"], "held_out"), len(reference))
    rows = {name: row for name, row in settings.samples.rows.items() if row.nfe <= config.most_nfe}
    found = {}
    for name in track([REAL, *rows], len(rows) + 1, "c2st"):
        if name == REAL:
            # Reality against reality: halves, of which the classifier is shown no first frames.
            fit, test = (_halves(x) for x in (real, reference))
        else:
            fit = c2st.Pairs(real, _redrawn(rows[name], train, count, settings, inputs), condition)
            test = c2st.Pairs(reference, drawn(name), held_out)
        seeds = [derived_seed(settings.seed, "c2st", "classifier", i) for i in range(config.seeds)]
        right = np.mean([c2st.right(fit, test, config.steps, seed % 2**31).numpy() for seed in seeds], axis=0)
        found[name] = of_mean(right, settings.evaluation.bootstrap, settings.seed)
    return found


def _halves(x: Tensor) -> c2st.Pairs:
    one, other = x[: len(x) // 2], x[len(x) // 2 :][: len(x) // 2]
    return c2st.Pairs(one, other, torch.zeros_like(one))
