"""The order of clips: which are seen when, whatever the number of processes, and after a stop."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vpae.config import Optimizer, Sharding, Training
from vpae.distill import run
from vpae.training.ema import make_ema
from vpae.training.loop import train
from vpae.training.phase import Phase, Role

CLIPS, GLOBAL_BATCH = 10, 4


class Recorder:
    """Stands for the latents: a batch is the numbers of its clips."""

    def __init__(self, *_: object):
        self.entries = [SimpleNamespace(key=f"clip-{number}") for number in range(CLIPS)]

    def __len__(self) -> int:
        return CLIPS

    def batch(self, numbers: list[int], _device: object) -> torch.Tensor:
        return torch.tensor(numbers)


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LatentDataset", Recorder)


def stream(ranks: int, updates: int, accumulate: int, sharing: int = 1) -> list[int]:
    """The clips of so many updates, in the order in which the processes together draw them."""
    training = Training(
        batch_size=GLOBAL_BATCH // ranks // accumulate,
        sharding=Sharding(context_parallel=sharing),
        accumulate=accumulate,
    )
    accelerators = [
        SimpleNamespace(num_processes=ranks * sharing, process_index=rank * sharing, device="cpu")
        for rank in range(ranks)
    ]
    batches = [run.batches_of(Path(), training, 0, "priming", accelerator) for accelerator in accelerators]
    return [int(clip) for drawn in range(updates * accumulate) for batch in batches for clip in batch(drawn)]


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_each_clip_is_seen_once_an_epoch_and_the_order_does_not_depend_on_the_ranks(
    ranks: int, accumulate: int
) -> None:
    """Epochs need not end with an update: 10 clips, 4 an update."""
    found = stream(ranks, 25, accumulate)
    for epoch in range(10):
        assert sorted(found[epoch * CLIPS : (epoch + 1) * CLIPS]) == list(range(CLIPS))
    assert found == stream(1, 25, 1)
    assert found[:CLIPS] != found[CLIPS : 2 * CLIPS]


def test_a_micro_batch_is_known_by_the_keys_of_its_clips(accelerator) -> None:
    batches = run.batches_of(Path(), Training(batch_size=3), 0, "priming", accelerator)
    for drawn in (0, 3, 7):  # of 10 clips: 3 begins in one pass and ends in the next
        assert batches.keys(drawn) == [f"clip-{clip}" for clip in batches(drawn).tolist()]


def test_processes_that_share_a_clip_count_as_one() -> None:
    assert stream(2, 5, 1, sharing=2) == stream(2, 5, 1)


class Listener(Phase):
    """Trains nothing worth having, and writes down which clips it was given."""

    name, main = "listener", "line"

    def __init__(self, stop_after: int = 10**9):
        self.module = nn.Linear(1, 1)
        self.roles = {"line": Role(self.module, Optimizer())}
        self.ema, self.seen, self.stop_after = make_ema(self.module), [], stop_after

    def turns(self, step: int) -> list[str]:
        return ["line"]

    def loss(self, turn: str, batch: torch.Tensor, rng: torch.Generator, step: int) -> tuple[torch.Tensor, dict]:
        if step == self.stop_after:
            raise KeyboardInterrupt
        self.seen += batch.tolist()
        return self.module(torch.ones(1, 1)).mean(), {}


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_after_a_stop_the_next_clip_is_the_next_one(accumulate: int, tmp_path: Path, accelerator) -> None:
    training = Training(steps=7, batch_size=GLOBAL_BATCH // accumulate, accumulate=accumulate, checkpoint_every=1)
    batches = run.batches_of(Path(), training, 0, "priming", accelerator)
    stopped, resumed = Listener(stop_after=3), Listener()
    with pytest.raises(KeyboardInterrupt):
        train(stopped, batches, training, 0, tmp_path, accelerator)
    train(resumed, batches, training, 0, tmp_path, accelerator)
    assert stopped.seen + resumed.seen == stream(1, 7, 1)
