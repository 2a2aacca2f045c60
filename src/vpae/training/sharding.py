"""How the networks of a phase are spread over processes: one plan for every role.

In this order, for each Wan transformer of a phase (generator, EMA, teacher or shared base, full copies):
1. activation checkpointing of each block;
2. context parallelism by diffusers' own plan (Ulysses): the processes of a group share each clip's tokens;
3. FSDP2 shards (`fully_shard`), a group for each block and one for the rest. Under bf16 autocast a group's weights
   travel as bf16 while the shards, which the optimiser moves, stay float32. A group has one dtype, so what has to
   compute in float32 stands outside: `INPUTS` in groups of their own; norms and modulation tables, all of them small
   (2.7M weights of 16.4B), whole in every process.

Whatever else is trained (the discriminator's head) is whole in every process. The gradients of whole weights are
averaged once per update.
"""

import warnings
from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers import ContextParallelConfig, ParallelConfig, WanTransformer3DModel
from diffusers.hooks.context_parallel import EquipartitionSharder, apply_context_parallel
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vpae.config import Sharding, Training
from vpae.models.adapters import Adapted, adapted_layers, selected, selection_of
from vpae.training.phase import Phase
from vpae.training.precision import INPUTS

WHOLE = ("norm", "scale_shift_table")
WAYS = 64  # torch runs a block uncompiled, and says nothing, after so many


def is_sharded(sharding: Sharding) -> bool:
    """Whether networks are spread, which one process alone never does."""
    return sharding.strategy == "full" and dist.is_initialized() and dist.get_world_size() > 1


def data_rank(sharding: Sharding, accelerator: Accelerator) -> tuple[int, int]:
    """Whose clips and noise this process works on, and how many different ones there are."""
    sharing = sharding.context_parallel if accelerator.num_processes > 1 else 1
    return accelerator.process_index // sharing, accelerator.num_processes // sharing


def empty_transformer(config: dict) -> WanTransformer3DModel:
    """A transformer without memory: weights on the meta device, but real rotary tables, which no state dict holds."""
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(config)
    rope = model.rope
    with torch.device("cpu"):
        model.rope = WanRotaryPosEmbed(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    return model


def spread(phase: Phase, training: Training, accelerator: Accelerator, empty: bool = False) -> None:
    """Apply the plan to all networks of a phase; call it once, before training.

    Args:
        phase: `phase.networks` names its transformers, `phase.roles` has what is trained. To be sharded, the first
            process has the weights on the CPU, the others have `empty_transformer`s.
        training: has the plan's settings and the precision.
        accelerator: device and processes.
        empty: leave shards without memory, on the meta device.

    Raises:
        ValueError: processes, heads or strategy do not allow this much context parallelism.
    """
    sharding, networks = training.sharding, phase.networks
    if sharding.activation_checkpointing:
        again = run_again if sharding.activation_checkpointing is True else run_again_but_for_attention
        for network in networks.values():
            network.enable_gradient_checkpointing(again)
    if training.compile:
        for network in networks.values():
            compile_blocks(network)
    if accelerator.num_processes == 1:
        return
    if sharding.context_parallel > 1:
        config = _context_config(sharding.context_parallel, accelerator)
        for network in networks.values():
            _parallelise_context(network, config)
    if is_sharded(sharding):
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,), mesh_dim_names=("shard",))
        dtype = torch.bfloat16 if training.mixed_precision == "bf16" else None
        for network in networks.values():
            if empty:
                shard(network, mesh, dtype)
            else:
                _distribute(network, mesh, dtype, accelerator.device)
        for role in phase.roles.values():
            role.reset_optimizer()


# Compiled blocks.


def compile_blocks(network: WanTransformer3DModel, backend: str = "inductor") -> None:
    """Compile a network's blocks at their first call; before the network is sharded.

    A block's code is compiled once for all blocks, and again for each way in which it is called: with each adapter,
    with and without gradients, in each number format.
    """
    torch._dynamo.config.recompile_limit = max(WAYS, torch._dynamo.config.recompile_limit)
    network.compile_repeated_blocks(backend=backend)


def run_eagerly(network: WanTransformer3DModel) -> None:
    """Undo `compile_blocks`."""
    for block in network.blocks:
        block._compiled_call_impl = None


# Activation checkpointing.


_ATTENTION = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default
    for kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
)


def _self_attention_alone(_context, operation: torch._ops.OpOverload, *args, **_options) -> CheckpointPolicy:
    """Keep what has as many keys as queries; attention to text and image is cheap."""
    kept = operation in _ATTENTION and args[0].shape[-2] == args[1].shape[-2]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def run_again_but_for_attention(block: nn.Module, *inputs: Tensor) -> Tensor:
    """As `run_again`, but the outputs of self-attention are kept: they take most to compute and little to hold."""
    return run_again(block, *inputs, context_fn=partial(create_selective_checkpoint_contexts, _self_attention_alone))


def run_again(block: nn.Module, *inputs: Tensor, **options) -> Tensor:
    """Run a block now and, instead of keeping its activations, once more in the backward pass.

    Args:
        block: of a transformer.
        inputs: its.
        options: of torch's `checkpoint`.

    Raises:
        RuntimeError: in the backward pass, if the weights have changed in between.
    """
    selection, weights = selection_of(adapted_layers(block)), list(block.parameters())
    if not any(isinstance(t, Tensor) and t.requires_grad for t in (*inputs, *weights)):
        return block(*inputs)  # no gradient passes, so that nothing is kept
    versions = _versions(weights)

    def run(*inputs: Tensor) -> Tensor:
        if _versions(weights) != versions:
            raise RuntimeError(
                "weights were changed between a forward pass and its backward pass: the activations that are computed "
                "again would not be those that the loss was computed from"
            )
        with selected(selection):
            return block(*inputs)

    # Wan has no dropout.
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def _versions(weights: Iterable[nn.Parameter]) -> list[int]:
    return [(w._local_tensor if isinstance(w, DTensor) else w)._version for w in weights]


# Context parallelism.


def _context_config(size: int, accelerator: Accelerator) -> ParallelConfig:
    processes = accelerator.num_processes
    if processes % size:
        raise ValueError(f"sharding.context_parallel = {size} does not divide the number of processes, {processes}")
    names = ("data", "ring", "ulysses")
    mesh = init_device_mesh(accelerator.device.type, (processes // size, 1, size), mesh_dim_names=names)
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=size, mesh=mesh))
    config.setup(accelerator.process_index, processes, accelerator.device, mesh=mesh)
    return config


def _parallelise_context(network: WanTransformer3DModel, config: ParallelConfig) -> None:
    """Split the tokens between patch embedding and output projection, as `enable_parallelism` does where it can.

    Each process sees the loss of the whole clip, but only its tokens' part of a weight's gradient. Scaled up at the
    output and down again at the input, the mean over processes is right for weights and video alike.
    """
    size, heads = config.context_parallel_config.ulysses_degree, network.config.num_attention_heads
    if heads % size:
        raise ValueError(f"sharding.context_parallel = {size} does not divide the {heads} attention heads")
    network._parallel_config = config
    for module in network.modules():
        if isinstance(module, AttentionModuleMixin):
            module.processor._parallel_config = config
    plan = {name: part for name, part in network._cp_plan.items() if name}  # "": times per token, which Wan2.2 has
    apply_context_parallel(network, config.context_parallel_config, plan)
    for block in network.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            # Autocast leaves norms in float32 and casts for the attention, but not in Ulysses' own backward pass.
            norm.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))
    network.patch_embedding.register_forward_pre_hook(lambda _, inputs: (_ScaleGradient.apply(inputs[0], 1 / size),))
    network.proj_out.register_forward_hook(lambda _, __, output: _ScaleGradient.apply(output, size))


def whole_sequence(network: nn.Module, layers_BND: list[Tensor]) -> list[Tensor]:
    """The tokens of all processes that share a clip, from each one's own, for features of inner blocks."""
    if (mesh := _sharing(network)) is None:
        return layers_BND
    return [_ScaleGradient.apply(EquipartitionSharder.unshard(layer, 1, mesh), mesh.size()) for layer in layers_BND]


def norm_at_video(network: nn.Module, gradient_BCFHW: Tensor) -> Tensor:
    """Norm of a loss's gradient at a network's input, whole also where processes share the clips.

    Each of them then has its own tokens' part of it and zeros elsewhere, or the same as all others: the largest value
    of each element is that of the whole.
    """
    if (mesh := _sharing(network)) is None:
        return gradient_BCFHW.norm()
    largest = gradient_BCFHW.abs()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=mesh.get_group())
    return largest.norm()


def _sharing(network: nn.Module) -> DeviceMesh | None:
    """The processes that share each clip; none where each has its own."""
    network = network.base if isinstance(network, Adapted) else network
    return network._parallel_config and network._parallel_config.context_parallel_config._flattened_mesh


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


# Shards.


def shard(network: WanTransformer3DModel, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
    """Make a network's weights shards: a group per block, one for the rest, and the exceptions named above.

    Args:
        network: on any device, also on meta; its adapters are there already.
        mesh: one dimension, all processes.
        dtype: what weights travel and compute as; none: what they are.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = {p for name, p in network.named_parameters() if any(part in name for part in WHOLE)}
    options = {"mesh": mesh, "ignored_params": whole}
    for name in INPUTS:
        fully_shard(network.get_submodule(name), mp_policy=exact, **options)
    for block in network.blocks:
        fully_shard(block, mp_policy=policy, **options)
    # The root's weights stay gathered until the backward pass, because that of inner blocks' features does not begin at
    # the root's output, which would gather them again.
    fully_shard(network, mp_policy=policy, reshard_after_forward=False, **options)
    # FSDP warns of views because in-place changes would lose its hooks; nothing here changes an output in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")


def _distribute(
    network: WanTransformer3DModel, mesh: DeviceMesh, dtype: torch.dtype | None, device: torch.device
) -> None:
    """Shard a network that only the first process has, without a second copy of it there."""
    weights = network.state_dict()
    tables = {name: buffer for name, buffer in network.named_buffers() if name not in weights}
    dtypes = [{name: p.dtype for name, p in network.named_parameters()}]
    dist.broadcast_object_list(dtypes)
    network.to("meta")
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(dtypes[0][name])
    shard(network, mesh, dtype)
    network.to_empty(device=device)
    if dist.get_rank() > 0:
        weights = {}
    for name, table in tables.items():
        owner, _, leaf = name.rpartition(".")
        network.get_submodule(owner).register_buffer(leaf, table.to(device), persistent=False)
    set_model_state_dict(network, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    # FSDP notes at its first forward pass in which dtype to reduce gradients: some networks are frozen for that turn.
    network._get_fsdp_state()._lazy_init()


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """All weights of a module on the CPU, in the first process; an empty dict in the others. All must call it."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def unsharded(network: WanTransformer3DModel) -> WanTransformer3DModel | None:
    """The network as one that can be saved, in the first process: itself if it is whole, a copy if it is sharded.

    Returns:
        None in the other processes. All must call it.
    """
    if not isinstance(network, FSDPModule):
        return network if not dist.is_initialized() or dist.get_rank() == 0 else None
    state = full_state(network)
    if not state:
        return None
    whole = empty_transformer(dict(network.config))
    whole.load_state_dict(state, assign=True)
    return whole


# Gradients.


def release_gathered(phase: Phase) -> None:
    """Drop the weights that are still gathered at the end of a turn: they know of no update, nor of who learns next."""
    for network in phase.networks.values():
        if isinstance(network, FSDPModule):
            network.reshard()


def reduce_gradients_in_backward(phase: Phase, wanted: bool) -> None:
    """Whether the next backward passes add up the gradients of sharded weights over processes."""
    for network in phase.networks.values():
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(wanted)


def average_whole_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Average what no backward pass has reduced: once per update and by hand, so that roles may share modules."""
    if accelerator.num_processes > 1:
        for parameter in parameters:
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                parameter.grad = accelerator.reduce(parameter.grad, "mean")


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Clip to a total norm over whole and sharded weights; returns the norm before, the same in all processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    shards = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    if not shards:
        return nn.utils.clip_grad_norm_(parameters, limit)
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    square = nn.utils.get_total_norm(shards).square()
    dist.all_reduce(square)
    norm = (square + nn.utils.get_total_norm(whole).square()).sqrt()
    torch._foreach_mul_(shards + whole, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
