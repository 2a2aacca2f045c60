"""Each ablation of `tiny` changes what a training step computes: a setting that does nothing would be a dead line."""

from pathlib import Path

import pytest
import torch

from planned import SMALL
from vpae.bench.networks import build_phase, random_condition, random_latents
from vpae.experiment import load, shipped
from vpae.planning.network import Sequence

CONFIGS = Path(__file__).parents[1] / "configs"
ABLATIONS = [path for path in shipped(CONFIGS) if path.stem.startswith(("tiny-no-", "tiny-with-"))]
COPIED = CONFIGS / "tiny-with-copied-backbone.yaml"
CLIP = ["geometry={frames: 5, height: 32, width: 32, fps: 8}"]
CPU = torch.device("cpu")


def last_step(path: Path) -> dict[str, tuple]:
    """Of each turn of each method: the loss, how many weights get a gradient, and the pace of the EMA."""
    settings, found = load(path, CLIP, environment=False).settings, {}
    batch = random_latents(settings, 2, CPU), random_condition(settings, SMALL, Sequence(8, 32, 5), 2, CPU)
    for method in settings.methods:
        torch.manual_seed(0)
        phase, training = build_phase(settings, method, SMALL, CPU), getattr(settings, method).training
        for turn in set(phase.turns(1)):
            loss, _ = phase.loss(turn, batch, torch.Generator().manual_seed(1), training.steps - 1)
            loss.backward()
            moved = sum(p.numel() for p in phase.roles[turn].parameters() if p.grad is not None and p.grad.any())
            found[f"{method} {turn}"] = loss.item(), moved, training.ema_decay
            for role in phase.roles.values():
                role.optimizer.zero_grad(set_to_none=True)
    return found


@pytest.fixture(scope="module")
def tiny() -> dict[str, tuple]:
    return last_step(CONFIGS / "tiny.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_changes_what_a_step_computes(path: Path, tiny: dict[str, tuple]) -> None:
    found = last_step(path)
    assert found != tiny
    assert all(moved > 0 for _, moved, _ in found.values())


def test_the_copied_backbone_is_a_whole_network_more_to_train(tiny: dict[str, tuple]) -> None:
    (_, alone, _), (_, both, _) = (last["equilibrium head"] for last in (tiny, last_step(COPIED)))
    assert both - alone > 0.9 * sum(p.numel() for p in SMALL.build().blocks[:6].parameters())
