"""Which captions are followed: the share for each kind of motion of the procedural world.

    python -m vpae.evaluation.motions --config configs/tiny-reference.yaml
    python -m vpae.evaluation.motions MODEL... --config configs/tiny-tuning.yaml --noises 4 --kinds untold spins

The first form reads the rows of a finished evaluation. The second draws single steps of students (pipeline folders) for
the held-out clips of these kinds, each with several noises: a figure over one noise moves by more than settings do.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from vpae.artifacts import ArtifactError, identity
from vpae.config import Sampler
from vpae.data.catalog import read_truth
from vpae.data.latents import LatentDataset
from vpae.data.world import Truth
from vpae.evaluation.latents import drawn_beside
from vpae.evaluation.statistics import markdown
from vpae.evaluation.truth import METRICS, measure
from vpae.experiment import ConfigError, load
from vpae.graph import RESULTS, stage_folder
from vpae.models.wan import decode_latents, load_pipeline, load_sampler

KINDS = ("told", "untold", "grows", "spins")
SEEDS_OF_A_NOISE = 5000  # noise k of clip i has the seed 5000 k + i


def kind_of(truth: Truth) -> str:
    """`told` and `untold` are sprites that move, by whether the caption tells where to."""
    if truth.motion != "moves":
        return truth.motion
    return "told" if truth.direction_told else "untold"


def by_kind(measured: Iterable[tuple[str, dict[str, float]]]) -> dict[str, tuple[float, int]]:
    """Share of captions followed and number of videos of each kind that occurs.

    Args:
        measured: kind and truth metrics of each video.
    """
    followed = defaultdict(list)
    for kind, metrics in measured:
        followed[kind].append(metrics["caption_following"])
    return {kind: (float(np.mean(followed[kind])), len(followed[kind])) for kind in KINDS if kind in followed}


def redraw(
    model: Path, dataset: LatentDataset, truths: dict[str, Truth], kinds: Sequence[str], noises: int, shift: float
) -> list[tuple[Truth, Tensor]]:
    """Truth and latents (16, F, H, W) of a student's single steps for the clips of these kinds, `noises` of each."""
    network, row = load_sampler(model), Sampler(model="student", steps=1)
    numbers = [i for i, entry in enumerate(dataset.entries) if kind_of(truths[entry.key]) in kinds]
    drawn = []
    for noise in range(noises):
        seeds = {i: noise * SEEDS_OF_A_NOISE + i for i in numbers}
        videos = [video for _, made in drawn_beside(dataset, seeds, network, row, shift) for video in made]
        drawn += [(truths[dataset.entries[i].key], video) for i, video in zip(numbers, videos, strict=True)]
    return drawn


def table(rows: dict[str, list[tuple[str, dict[str, float]]]]) -> str:
    """Markdown: a line for each row, captions by kind with the number of videos, and the other truth metrics' means."""
    others = [metric for metric in METRICS if metric != "caption_following"]
    lines = []
    for row, measured in rows.items():
        shares = by_kind(measured)
        cells = [f"{shares[kind][0]:.3f} of {shares[kind][1]}" if kind in shares else "" for kind in KINDS]
        cells += [f"{np.mean([metrics[metric] for _, metrics in measured]):.3f}" for metric in others]
        lines.append([row, *cells])
    return markdown(["row", *KINDS, *others], lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="students to draw anew")
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.yaml"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--noises", type=int, default=4, help="of each clip, for MODEL")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of clips, for MODEL")
    arguments = parser.parse_args(argv)
    try:
        source = load(arguments.config)
        stages = ("clips", "latents", "teacher") if arguments.models else ("clips", "evaluation")
        folders = {name: stage_folder(source, name, arguments.results) for name in stages}
        for folder in folders.values():
            identity(folder)  # complains of what is not finished
    except (ConfigError, ArtifactError) as error:
        print(f"motions: {error}", file=sys.stderr)
        return 2
    truths = read_truth(folders["clips"])
    if not truths:
        print(f"motions: {folders['clips']} holds no truth.jsonl: only the world's clips have kinds", file=sys.stderr)
        return 2
    rows = defaultdict(list)
    if arguments.models:
        dataset = LatentDataset(folders["latents"], "held_out")
        vae = load_pipeline(folders["teacher"], transformer=None, text_encoder=None, image_encoder=None).vae
        shift = source.settings.teacher.shift
        for model in arguments.models:
            rows[str(model)] = [
                (kind_of(truth), measure(decode_latents(vae, latents[None])[0].numpy(), truth))
                for truth, latents in redraw(model, dataset, truths, arguments.kinds, arguments.noises, shift)
            ]
    else:
        for line in (folders["evaluation"] / "records.jsonl").read_text().splitlines():
            record = json.loads(line)
            rows[record["row"]].append((kind_of(truths[record["key"]]), record))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
