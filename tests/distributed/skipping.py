"""A process of two, of which one meets clips that are no numbers: `python skipping.py FOLDER` under torchrun."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_training import Line, numbered
from vpae.config import Optimizer, Training
from vpae.training.loop import train

SPOILT = (3, 8)

if __name__ == "__main__":
    accelerator, folder = Accelerator(cpu=True), Path(sys.argv[1])
    rank, phase = accelerator.process_index, Line(Optimizer())
    clip = lambda drawn: 2 * drawn + rank  # noqa: E731
    batches = lambda drawn: numbered(clip(drawn)) * (float("nan") if clip(drawn) in SPOILT else 1)  # noqa: E731
    keys = lambda drawn: [f"clip-{clip(drawn)}"]  # noqa: E731
    train(phase, batches, Training(steps=6), 0, folder / "state", accelerator, None, keys)
    torch.save(dict(phase.module.state_dict()), folder / f"{rank}.pt")
