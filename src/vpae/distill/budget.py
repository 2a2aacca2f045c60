"""What training a method costs in network evaluations: its losses are run once on small networks, and calls counted.

An evaluation is one clip through one whole network. A guided step of the teacher is two; a backward pass is none.
"""

from collections import Counter

import torch
from torch import nn

from vpae.artifacts import digest
from vpae.config import Experiment, TinyTransformer
from vpae.distill import METHODS
from vpae.distill.method import TEACHER, MethodSettings
from vpae.models.wan import SHORT_TEXT_TOKENS, Condition
from vpae.teacher import flow_matching

WIDTH, FRAMES, SIDE = 8, 2, 4  # of text and image embeddings; of the latents


class _Small:
    """Networks in which a pass takes milliseconds, whatever an experiment's are."""

    device = torch.device("cpu")

    def __init__(self, layers: int):
        self.layers = layers

    def transformer(self, model: str, trained: bool) -> nn.Module:
        config = TinyTransformer(heads=1, head_dim=6, layers=self.layers, freq_dim=2, ffn_multiple=1)
        return flow_matching.build(config, WIDTH, WIDTH).requires_grad_(trained)


def network_evaluations(settings: Experiment, name: str) -> int:
    """Evaluations in the training of one method, all updates and micro-batches of one process."""
    section: MethodSettings = getattr(settings, name)
    key = digest([name, section.model_dump()])
    if key not in _counted:
        alone = settings.model_copy(update={"methods": {name: TEACHER}})
        _counted[key] = _evaluations(alone, name, section)
    return _counted[key]


_counted: dict[str, int] = {}


def _evaluations(settings: Experiment, name: str, section: MethodSettings) -> int:
    with torch.random.fork_rng():
        phase = METHODS[name].build(settings, _Small(1 + max(_taps(section.model_dump()), default=3)))
    turns = Counter(turn for step in range(section.training.steps) for turn in phase.turns(step))
    clips = section.training.batch_size * section.training.accumulate
    return clips * sum(number * _evaluations_of(phase, turn) for turn, number in turns.items())


def _taps(values: dict) -> list[int]:
    """The blocks that any part of a section names."""
    parts = [_taps(value) for value in values.values() if isinstance(value, dict)]
    return [tap for part in parts for tap in part] + list(values.get("taps", ()))


@torch.no_grad()
def _evaluations_of(phase, turn: str) -> int:
    x = torch.zeros(1, 16, FRAMES, SIDE, SIDE)
    text = torch.zeros(1, SHORT_TEXT_TOKENS, WIDTH)
    condition = Condition(torch.zeros(1, 20, FRAMES, SIDE, SIDE), torch.zeros(1, 2, WIDTH), text, text[0])
    clips: list[int] = []
    note = lambda _network, _inputs, output: clips.append(len(output[0]))  # noqa: E731
    hooks = [network.register_forward_hook(note) for network in phase.networks.values()]
    phase.loss(turn, (x, condition), torch.Generator().manual_seed(0), 0)
    for hook in hooks:
        hook.remove()
    return sum(clips)
