"""The fake model as a low-rank adapter on the frozen teacher's own weights (Phase I).

One network plays two roles, so the choice of role must hold until a differentiated pass has gone backward: each role
is a context manager, only the fake one allows gradients, and they do not nest.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import nn

from vpae.config import Lora

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "ffn.net.0.proj", "ffn.net.2"]
NAME = "fake"


class SharedBase(nn.Module):
    """A frozen teacher and a trainable fake model on the same base weights.

    The adapter's second factor starts at zero, so that the fake model starts as the teacher, bit for bit.
    """

    def __init__(self, transformer: WanTransformer3DModel, lora: Lora):
        super().__init__()
        transformer.requires_grad_(False)
        transformer.add_adapter(
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=TARGETS), adapter_name=NAME
        )
        self.transformer = transformer
        self._role: str | None = None

    @contextmanager
    def as_teacher(self) -> Iterator[WanTransformer3DModel]:
        """The frozen teacher; no gradients."""
        with self._as("teacher"), torch.no_grad():
            self.transformer.disable_adapters()
            try:
                yield self.transformer
            finally:
                self.transformer.enable_adapters()

    @contextmanager
    def as_fake(self) -> Iterator[WanTransformer3DModel]:
        """The fake model; its backward pass must end before the teacher is asked again."""
        with self._as("fake"):
            yield self.transformer

    @contextmanager
    def _as(self, role: str) -> Iterator[None]:
        if self._role is not None:
            raise RuntimeError(f"the shared base acts as {self._role} already; end that role before {role} begins")
        self._role = role
        try:
            yield
        finally:
            self._role = None


def adapter_state(transformer: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights alone, by name."""
    return {k: v.detach().contiguous() for k, v in transformer.state_dict().items() if f".{NAME}." in k}
