"""Compiled transformer blocks in training.

A block's code is compiled once for all blocks, and again for each way in which it is called: with each adapter, with
and without gradients, in each number format.
"""

import torch
from diffusers import WanTransformer3DModel

WAYS = 64  # torch runs a block uncompiled, and says nothing, after so many


def compile_blocks(network: WanTransformer3DModel, backend: str = "inductor") -> None:
    """Compile a network's blocks at their first call; before the network is sharded."""
    torch._dynamo.config.recompile_limit = max(WAYS, torch._dynamo.config.recompile_limit)
    network.compile_repeated_blocks(backend=backend)


def run_eagerly(network: WanTransformer3DModel) -> None:
    """Undo `compile_blocks`."""
    for block in network.blocks:
        block._compiled_call_impl = None
