"""What the training loop, sharding, checkpoints and benchmarks ask of a phase of training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vpae.config.training import Optimizer
from vpae.lazy import lazy

if TYPE_CHECKING:
    import torch
    from diffusers import WanTransformer3DModel
    from torch import Tensor, nn
else:
    torch = lazy("torch")

tensors = lazy("torch.distributed.tensor")

Batch = Any


class Collapse(Exception):
    """A run that was stopped because its videos collapse; the last healthy state is kept."""


@dataclass
class Role:
    """A module some of whose parameters are trained (those that require gradients), with its own optimiser."""

    module: nn.Module
    settings: Optimizer
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """A fresh optimiser of the module's parameters as they are now, which sharding replaces."""
        s, trained = self.settings, [p for p in self.module.parameters() if p.requires_grad]
        # Whole and sharded parameters do not mix in a group.
        kinds = [[p for p in trained if isinstance(p, tensors.DTensor) == kind] for kind in (False, True)]
        groups = [{"params": kind} for kind in kinds if kind]
        if s.algorithm == "rmsprop":
            self.optimizer = torch.optim.RMSprop(groups, lr=s.learning_rate, alpha=s.alpha)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=s.learning_rate, betas=s.betas, weight_decay=s.weight_decay)

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def require_gradients(self, wanted: bool) -> None:
        """Switch the gradients of what is trained on or off."""
        for parameter in self.parameters():
            parameter.requires_grad_(wanted)


class Phase(ABC):
    """Networks, which of them are trained, and what each update of one costs.

    Attributes:
        name: in logs and in the key of every random number.
        main: the role whose updates are the steps.
        roles: name -> what is trained.
        ema: follows the main role.
        networks: name -> every Wan transformer, each once, for sharding.
    """

    name: str
    main: str
    roles: dict[str, Role]
    ema: nn.Module
    networks: dict[str, WanTransformer3DModel] = {}  # noqa: RUF012 - never changed in place

    def turns(self, step: int) -> Iterable[str]:
        """Which roles are updated in this step, in order, with repetitions."""
        return [self.main]

    @abstractmethod
    def loss(self, turn: str, batch: Batch, rng: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch for one role, and named values to log."""
