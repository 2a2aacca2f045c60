"""Several networks on one set of frozen base weights: the teacher itself, and one for each low-rank adapter.

The base plays one role at a time. A role ends with its context, but its backward pass may come later: what runs a block
again then (activation checkpointing) has to select the adapter of the first run, see `training.sharding`.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from vpae.config import Lora

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "ffn.net.0.proj", "ffn.net.2"]
FAKE, STUDENT, EMA = "fake", "student", "ema"

Selection = list[tuple[LoraLayer, list[str], bool, dict[str, float]]]


def adapted_layers(module: nn.Module) -> list[LoraLayer]:
    """The layers of a module that have adapters."""
    return [layer for layer in module.modules() if isinstance(layer, LoraLayer)]


def selection_of(layers: Iterable[LoraLayer]) -> Selection:
    """Which adapter each layer uses now, and how strongly."""
    return [(layer, layer._active_adapter, layer._disable_adapters, layer.scaling) for layer in layers]


@contextmanager
def selected(selection: Selection) -> Iterator[None]:
    """Use these adapters inside the block.

    peft's own switches also change `requires_grad`, of all adapters at once; what is trained is not theirs to say here.
    """
    before = selection_of(layer for layer, *_ in selection)
    _select(selection)
    try:
        yield
    finally:
        _select(before)


def _select(selection: Selection) -> None:
    for layer, names, disabled, scaling in selection:
        layer._active_adapter, layer._disable_adapters, layer.scaling = names, disabled, scaling


class SharedBase(nn.Module):
    """A frozen teacher and networks with adapters on the same base weights.

    An adapter's second factor starts at zero, so that its network starts as the teacher, bit for bit.

    Args:
        transformer: the teacher; from now on frozen.
    """

    def __init__(self, transformer: WanTransformer3DModel):
        super().__init__()
        self._role: str | None = None
        self.transformer = transformer.requires_grad_(False)

    def add(self, name: str, lora: Lora) -> "Adapted":
        """A new trained network: the base with an adapter in float32, whatever the base has."""
        trained = [p for p in self.transformer.parameters() if p.requires_grad]
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=TARGETS)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what it is for
            self.transformer.add_adapter(config, adapter_name=name)
        network = self.network(name)
        network.float()
        for parameter in trained:  # peft takes only the newest adapter for trained
            parameter.requires_grad_(True)
        return network

    def network(self, name: str | None, share: float = 1.0) -> "Adapted":
        """The network of one adapter, or a share of it added to the teacher; with no adapter the teacher."""
        return Adapted(self, name, share)

    @contextmanager
    def acting_as(self, adapter: str | None, share: float) -> Iterator[None]:
        """Let the base run with one adapter alone, or a share of its update, or with none.

        Raises:
            RuntimeError: it has another role, or this one, already.
        """
        role = adapter or "teacher"
        if self._role is not None:
            raise RuntimeError(f"the shared base acts as {self._role} already; end that role before {role} begins")
        self._role = role
        selection = [
            (layer, [adapter], adapter is None, {name: share * value for name, value in layer.scaling.items()})
            for layer in adapted_layers(self.transformer)
        ]
        try:
            with selected(selection):
                yield
        finally:
            self._role = None


class Adapted(nn.Module):
    """One network on a shared base: called like a Wan transformer, but its weights are its adapter's alone.

    With a share below 1 it is the teacher moved so far towards the adapter's network; the adapter is not copied.
    """

    def __init__(self, shared: SharedBase, name: str | None, share: float = 1.0):
        super().__init__()
        self.name, self.share = name, share
        self._shared = (shared,)  # in a tuple: the base is not a part of this module
        self.factors = nn.ModuleDict(
            {
                path.replace(".", "-"): nn.ModuleDict({"A": layer.lora_A[name], "B": layer.lora_B[name]})
                for path, layer in shared.transformer.named_modules()
                if isinstance(layer, LoraLayer) and name in layer.lora_A
            }
        )

    @property
    def base(self) -> WanTransformer3DModel:
        """The transformer that runs."""
        return self._shared[0].transformer

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the base."""
        return self.base.blocks

    @property
    def config(self):
        """The configuration of the base."""
        return self.base.config

    def forward(self, *args, **kwargs):
        """As the base's, with this adapter."""
        with self._shared[0].acting_as(self.name, self.share):
            return self.base(*args, **kwargs)

    def follower(self) -> "Adapted":
        """A frozen network with an adapter of its own that starts as a copy of this one, on the same base."""
        config = self.base.peft_config[self.name]
        twin = self._shared[0].add(EMA, Lora(rank=config.r, alpha=config.lora_alpha)).requires_grad_(False)
        if not any(p.is_meta for p in self.parameters()):
            twin.load_state_dict(self.state_dict())
        return twin

    @property
    def alpha(self) -> float:
        """The update is scaled by alpha / rank."""
        return self.base.peft_config[self.name].lora_alpha

    def __deepcopy__(self, _memo: dict) -> "Adapted":
        """Refused: the base is no part of this module, so a copy would have none of its weights to train."""
        raise TypeError("an adapted network cannot be copied: copy its base, or take a `follower`")

    def start_from(self, lora: dict[str, Tensor]) -> None:
        """Take the weights of an adapter's file, if there are any and this network has memory of its own.

        Raises:
            RuntimeError: other layers or another rank.
        """
        if lora and not any(p.is_meta for p in self.parameters()):
            self.load_state_dict({_own_name(name): value for name, value in lora.items()})


def lora_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of an `Adapted` under the names that LoRA files have: `blocks.0.attn1.to_q.lora_A.weight`."""
    parts = {name: name.split(".") for name in state}  # factors, layer, A or B, weight
    return {f"{parts[n][1].replace('-', '.')}.lora_{parts[n][2]}.weight": value for n, value in state.items()}


def _own_name(name: str) -> str:
    layer, _, factor = name.removesuffix(".weight").rpartition(".lora_")
    return f"factors.{layer.replace('.', '-')}.{factor}.weight"


@torch.no_grad()
def merge(base: WanTransformer3DModel, lora: dict[str, Tensor], alpha: float) -> WanTransformer3DModel:
    """One network with whole weights from the base's and an adapter's file; the base given is changed."""
    for layer, up, down in products(lora):
        base.get_parameter(f"{layer}.weight").add_(up @ down, alpha=alpha / len(down))
    return base


def products(lora: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Layer, B (out, rank) and A (rank, in) of each product in an adapter's file."""
    for name, down in lora.items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".lora_")
        if factor == "A":
            yield layer, lora[f"{layer}.lora_B.weight"], down
