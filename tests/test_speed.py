"""What makes training faster changes no loss: compiled blocks, fused norms, features without the blocks after them."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import build_batch, build_equilibrium, build_priming, build_transformer, seeded
from vpae.models.wan import features, velocity
from vpae.training.compiled import compile_blocks, run_eagerly
from vpae.training.precision import fuse_norms
from vpae.training.randomness import generator_for

CPU = torch.device("cpu")
BUILD = {"priming": build_priming, "equilibrium": build_equilibrium}


def losses(phase, autocast: bool = False) -> list[float]:
    """Loss of every turn, and the norm of its gradient."""
    found = []
    for turn in phase.roles:
        for name, role in phase.roles.items():
            role.require_gradients(name == turn)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = phase.loss(turn, build_batch(), generator_for(CPU, 0, turn), 0)
        loss.backward()
        gradients = [p.grad for p in phase.roles[turn].parameters() if p.grad is not None]
        found += [loss.item(), nn.utils.get_total_norm(gradients).item()]
        for role in phase.roles.values():
            role.optimizer.zero_grad(set_to_none=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_compiled_blocks_have_the_losses_and_gradients_of_eager_ones(name):
    phase = BUILD[name]()
    expected = losses(phase)
    for network in phase.networks.values():
        compile_blocks(network, "eager")
    assert losses(phase) == pytest.approx(expected, rel=1e-5)
    assert all(block._compiled_call_impl for network in phase.networks.values() for block in network.blocks)
    for network in phase.networks.values():
        run_eagerly(network)
    assert losses(phase) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fused_norm_is_torch_s_own(dtype):
    theirs = nn.RMSNorm(24, eps=1e-6)
    with torch.no_grad():
        theirs.weight.copy_(seeded(0, lambda: torch.rand(24) + 0.5))
    x = seeded(1, lambda: torch.randn(3, 7, 24)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(x)
    holder = nn.ModuleDict({"norm": theirs})
    fuse_norms(holder)
    found = holder["norm"](x)
    assert found.dtype == expected.dtype
    spacing = torch.finfo(dtype).eps * expected.abs().float()
    assert ((found.float() - expected.float()).abs() <= spacing).all()


@pytest.mark.parametrize("name", BUILD)
def test_no_norm_of_a_phase_falls_back_to_the_slow_way(name):
    called = []

    def note(norm: nn.Module, inputs: tuple, _output) -> None:
        called.append(type(norm).__name__)

    phase = BUILD[name]()
    handles = [
        module.register_forward_hook(note)
        for network in phase.networks.values()
        for module in network.modules()
        if isinstance(module, nn.RMSNorm)
    ]
    assert all(torch.isfinite(torch.tensor(losses(phase, autocast=True))))
    assert set(called) == {"FusedRMSNorm"} and handles


@torch.no_grad()
def test_features_run_no_block_after_the_last_tap():
    model, (x, c) = build_transformer(), build_batch()
    t = torch.full((len(x),), 0.4)
    whole = features(model, x, t, c, (0, 1, 3))
    counts, velocities = [], [velocity(model, x, t, c)]
    for taps in ((0, 1, 3), (0, 1)):
        with FlopCounterMode(display=False) as counter:
            found = features(model, x, t, c, taps)
        counts.append(counter.get_total_flops())
        assert all(one.equal(other) for one, other in zip(found, whole, strict=False))
    assert counts[1] < 0.6 * counts[0]  # two of four blocks
    assert len(model.blocks) == 4 and velocity(model, x, t, c).equal(velocities[0])
    with pytest.raises(RuntimeError):
        features(model, x[:, :3], t, c, (0,))
    assert len(model.blocks) == 4, "also after an error"
