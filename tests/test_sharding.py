"""What sharding needs of a single process: activation checkpointing, adapters, precision, and the sizes at 14B."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor, nn

from conftest import build_batch, build_equilibrium, build_head, build_transformer, seeded
from distributed.cases import CONFIGS, accelerator_for
from planned import SMALL, TOKENS, variant
from vpae.config import R1, Lora, Sharding, Training
from vpae.distill import METHODS, run
from vpae.distill import equilibrium as phase_two
from vpae.distill import priming as phase_one
from vpae.distill.equilibrium import Equilibrium
from vpae.distill.networks import Stored
from vpae.distill.priming import Priming
from vpae.distill.student import save_weights
from vpae.experiment import ConfigError, load
from vpae.models.adapters import FAKE, STUDENT, SharedBase, lora_names, merge
from vpae.models.wan import default_taps, features, predict_x0, velocity
from vpae.planning.meter import Meter
from vpae.planning.phase import execute
from vpae.stages import _Task
from vpae.training.ema import update_ema
from vpae.training.loop import train
from vpae.training.precision import INPUTS, take_exact_inputs
from vpae.training.sharding import empty_transformer, run_again, run_again_but_for_attention, spread, unsharded

LORA = Lora(rank=4, alpha=8)
WAN_14B = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}


def gradients_of(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [g.clone() for g in torch.autograd.grad(loss, inputs)]


def with_adapters(*names: str) -> tuple[SharedBase, list]:
    """A base with adapters that do something."""
    shared = SharedBase(build_transformer())
    networks = [shared.add(name, LORA) for name in names]
    for seed, network in enumerate(networks):
        generator = torch.Generator().manual_seed(seed)
        for p in network.parameters():
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return shared, networks


# Activation checkpointing.


@pytest.mark.parametrize("way", [run_again, run_again_but_for_attention])
@pytest.mark.parametrize("backbone", ["ema", "teacher", "copy"])
def test_recomputed_activations_change_no_gradient(backbone, way):
    losses, grads = [], []
    for again in (False, True):
        phase = build_equilibrium(backbone=backbone)
        if again:
            for network in phase.networks.values():
                network.enable_gradient_checkpointing(way)
        loss, _ = phase.loss("generator", build_batch(2), torch.Generator().manual_seed(0), 0)
        loss.backward()
        losses.append(loss), grads.append([p.grad for p in phase.generator.parameters()])
    assert losses[0].equal(losses[1])
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


def test_a_frozen_backbone_passes_the_gradient_to_its_input_from_features_that_are_recomputed():
    (x, c), t = build_batch(1), torch.tensor([0.4])
    found = []
    for again in (False, True):
        model = build_transformer().requires_grad_(False)
        if again:
            model.enable_gradient_checkpointing(run_again)
        latents = x.clone().requires_grad_(True)
        layers = features(model, latents, t, c, (0, 2))
        found.append(gradients_of(sum(layer.square().sum() for layer in layers), [latents])[0])
        assert all(p.grad is None for p in model.parameters())
    assert found[0].equal(found[1]) and found[0].abs().sum() > 0


def test_a_kept_attention_is_not_computed_again():
    """By hand: of what is recomputed, two products of N x N x D for each block go, and their outputs stay."""
    (x, c), t = build_batch(1), torch.tensor([0.4])
    tokens, width = 2 * 2 * 2, 24
    recomputed, alive, gradients = {}, {}, {}
    for way in (run_again, run_again_but_for_attention):
        model = build_transformer()
        model.enable_gradient_checkpointing(way)
        with Meter() as forward:
            loss = velocity(model, x, t, c).square().mean()
        alive[way] = forward.now
        with Meter() as backward:
            gradients[way] = gradients_of(loss, list(model.parameters()))
        recomputed[way] = backward.counts["recomputed"]
    assert recomputed[run_again] - recomputed[run_again_but_for_attention] == 4 * 2 * 2 * tokens * tokens * width
    kept = 4 * tokens * (width + 2) * 4  # outputs and the two heads' logarithms of sums, in float32
    assert alive[run_again_but_for_attention] - alive[run_again] >= kept
    assert all(a.equal(b) for a, b in zip(*gradients.values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("apt", []),
        ("dmd2", []),
        ("equilibrium", ["equilibrium.backbone=copy"]),
        ("equilibrium", ["equilibrium.few_step={own: true}"]),
    ],
)
def test_a_kept_attention_under_bf16_is_found_by_every_pass_of_a_network_that_runs_twice(name, changes):
    """Autocast would cast a weight in the first pass alone, and selective checkpointing wants the same in each."""
    training = ["mixed_precision=bf16", "sharding.activation_checkpointing=attention"]
    keys = [f"methods.{name}=teacher", *changes, *(f"{name}.training.{key}" for key in training)]
    settings = load(CONFIGS / "micro-rivals.yaml", keys, environment=False).settings
    AcceleratorState._reset_state()
    accelerator = run.accelerator_for(getattr(settings, name).training)
    networks = SimpleNamespace(device=accelerator.device, transformer=lambda model, trained: build_transformer(0))
    phase = METHODS[name].build(settings, networks)
    spread(phase, getattr(settings, name).training, accelerator)
    for turn in phase.roles:
        with accelerator.autocast():
            loss, _ = phase.loss(turn, build_batch(1), torch.Generator().manual_seed(0), 0)
        loss.backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in phase.roles[turn].parameters())
    AcceleratorState._reset_state()


@pytest.mark.slow
def test_a_frozen_network_that_passes_no_gradient_on_runs_once_and_keeps_nothing():
    plain, again, attention = (
        execute(variant("micro", "equilibrium", activation_checkpointing=a), "equilibrium", SMALL, TOKENS, 1).turns
        for a in (False, True, "attention")
    )
    assert plain["head"] == again["head"] == attention["head"] and plain["head"].recomputed == 0
    assert again["generator"].recomputed > attention["generator"].recomputed > 0
    assert again["generator"].peak <= attention["generator"].peak < plain["generator"].peak


def test_compiled_blocks_hide_their_attention():
    sharding = {"activation_checkpointing": "attention"}
    with pytest.raises(ValidationError, match="compile = true hides a block's attention"):
        Training(compile=True, sharding=sharding)
    assert (
        Training(compile=True, sharding={"activation_checkpointing": "true"}).sharding.activation_checkpointing is True
    )


def test_the_recomputation_has_the_adapter_of_its_forward_pass_whatever_ran_in_between():
    (x, c), t = build_batch(1), torch.tensor([0.4])
    found = []
    for again in (False, True):
        shared, (student, other) = with_adapters(STUDENT, "other")
        if again:
            shared.transformer.enable_gradient_checkpointing(run_again)
        loss = velocity(student, x, t, c).square().mean()
        velocity(shared.network(None), x, t, c)
        loss = loss + velocity(other, x, t, c).square().mean()
        velocity(shared.network(None), x, t, c)
        found.append(gradients_of(loss, [*student.parameters(), *other.parameters()]))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
    assert all(a.abs().sum() > 0 for a in found[0])


@pytest.mark.parametrize("swap", ["weights", "adapter", "ema"])
def test_weights_may_not_change_between_a_differentiated_pass_and_its_backward_pass(swap):
    (x, c), t = build_batch(1), torch.tensor([0.4])
    shared, (student, other) = with_adapters(STUDENT, "other")
    shared.transformer.enable_gradient_checkpointing(run_again)
    loss = velocity(student, x, t, c).square().mean()
    with torch.no_grad():
        if swap == "weights":
            shared.transformer.blocks[1].ffn.net[2].weight.mul_(1.5)
        elif swap == "adapter":
            student.load_state_dict(other.state_dict())
        else:
            update_ema(student, other, 0.5)
    with pytest.raises(RuntimeError, match="weights were changed between"):
        loss.backward()


# Networks on one base.


def test_networks_on_one_base_have_their_own_adapters_and_leave_the_teacher_alone():
    (x, c), t = build_batch(1), torch.tensor([0.4])
    shared, (student, other) = with_adapters(STUDENT, "other")
    with torch.no_grad():
        original = velocity(build_transformer(), x, t, c)
        first, second = velocity(student, x, t, c), velocity(other, x, t, c)
        assert velocity(shared.network(None), x, t, c).equal(original)
        assert velocity(student, x, t, c).equal(first)
    assert not first.equal(original) and not first.equal(second)
    trained = {name for name, p in shared.transformer.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in trained} == {STUDENT, "other"}


def test_a_share_of_an_adapter_leads_from_the_teacher_to_its_network():
    (x, c), t = build_batch(1), torch.tensor([0.4])
    shared, (student,) = with_adapters(STUDENT)
    names = lora_names(student.state_dict())
    weak = merge(build_transformer(), names, 0.25 * student.alpha)
    with torch.no_grad():
        before = velocity(student, x, t, c)
        teacher = velocity(build_transformer(), x, t, c)
        assert velocity(shared.network(STUDENT, 0.0), x, t, c).equal(teacher)
        assert velocity(shared.network(STUDENT, 1.0), x, t, c).equal(before)
        quarter = velocity(shared.network(STUDENT, 0.25), x, t, c)
        torch.testing.assert_close(quarter, velocity(weak, x, t, c), atol=1e-5, rtol=1e-4)
        assert velocity(student, x, t, c).equal(before)  # a share lasts for one pass
        student.factors["blocks-0-attn1-to_q"]["B"].weight.add_(0.1)  # what the adapter learns, its share has at once
        assert not velocity(shared.network(STUDENT, 0.25), x, t, c).equal(quarter)
    assert (quarter - teacher).abs().max() > 1e-4 and (quarter - before).abs().max() > 1e-4


def test_the_recomputation_has_the_share_of_its_forward_pass():
    (x, c), t = build_batch(1), torch.tensor([0.4])
    found = []
    for again in (False, True):
        shared, (student,) = with_adapters(STUDENT)
        if again:
            shared.transformer.enable_gradient_checkpointing(run_again)
        loss = velocity(shared.network(STUDENT, 0.25), x, t, c).square().mean()
        velocity(student, x, t, c)
        found.append(gradients_of(loss, list(student.parameters())))
    assert all(a.equal(b) for a, b in zip(*found, strict=True)) and found[0][0].abs().sum() > 0


def test_an_adapted_network_is_the_whole_one_that_it_is_merged_into():
    (x, c), t = build_batch(1), torch.tensor([0.4])
    _, (student,) = with_adapters(STUDENT)
    names = lora_names(student.state_dict())
    assert names["blocks.0.attn1.to_out.0.lora_A.weight"].shape == (4, 24)
    whole = merge(build_transformer(), names, student.alpha)
    again = SharedBase(build_transformer()).add(STUDENT, LORA)
    again.start_from(names)
    with torch.no_grad():
        expected = velocity(student, x, t, c)
        torch.testing.assert_close(velocity(whole, x, t, c), expected, atol=1e-5, rtol=1e-4)
        assert velocity(again, x, t, c).equal(expected)
    assert (expected - velocity(build_transformer(), x, t, c)).abs().max() > 1e-3


def test_an_adapter_s_follower_and_its_file_are_scaled_as_it_is_where_alpha_is_not_the_rank(tmp_path):
    (x, c), t = build_batch(1), torch.tensor([0.4])
    student = SharedBase(build_transformer()).add(STUDENT, Lora(rank=4, alpha=12))
    seeded(0, lambda: [nn.init.normal_(p, std=0.1) for p in student.parameters()])
    follower = student.follower()
    assert follower.alpha == 12
    save_weights(follower, tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert float(file.metadata()["lora_alpha"]) == 12  # what others scale it by
    with torch.no_grad():
        assert velocity(follower, x, t, c).equal(velocity(student, x, t, c))


def lora_phase(name: str):
    """A phase whose generator is an adapter."""
    if name == "priming":
        training = Training(steps=2, ema_decay=0.75)
        config = phase_one.Settings(student_lora=LORA, fake_lora=Lora(rank=2, alpha=2), training=training)
        shared = SharedBase(build_transformer())
        fake = seeded(0, lambda: shared.add(FAKE, config.fake_lora))
        return Priming(config, 3.0, shared.add(STUDENT, LORA), shared.network(None), fake), shared
    config = phase_two.Settings(student_lora=LORA, training=Training(steps=2, ema_decay=0.75))
    shared = SharedBase(build_transformer())
    student = shared.add(STUDENT, LORA)
    return Equilibrium(config, 3.0, student, shared.network(None), build_head(), default_taps(4)), shared


@pytest.mark.parametrize("name", ["priming", "equilibrium"])
def test_a_student_trained_as_an_adapter_needs_one_network_and_an_ema_of_adapters(name, tmp_path):
    phase, shared = lora_phase(name)
    assert list(phase.networks.values()) == [shared.transformer]
    before = {n: p.clone() for n, p in shared.transformer.named_parameters()}
    history, turns = [], phase.turns
    phase.turns = lambda step: history.append(copy.deepcopy(phase.generator.state_dict())) or turns(step)
    train(phase, lambda drawn: build_batch(1, seed=drawn), phase.config.training, 0, tmp_path, accelerator_for("no"))
    history.append(phase.generator.state_dict())
    changed = {n.split(".")[-2] for n, p in shared.transformer.named_parameters() if not p.equal(before[n])}
    assert changed == {STUDENT, "ema"} | ({"fake"} if name == "priming" else set())
    for key, found in phase.ema.state_dict().items():
        expected = history[0][key]
        for after in history[1:]:
            expected = 0.75 * expected + 0.25 * after[key]
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-5)


def test_a_fake_model_and_a_discriminator_may_be_whole_copies_that_learn(tmp_path):
    accelerator = accelerator_for("no")
    config = phase_one.Settings(fake_form="copy", training=Training(steps=1))
    experiment = SimpleNamespace(priming=config, seed=0, methods={}, teacher=SimpleNamespace(shift=3.0))
    priming = Priming.build(experiment, SimpleNamespace(transformer=lambda model, trained: build_transformer()))
    equilibrium = build_equilibrium(backbone="copy")
    for phase, copied, role in ((priming, priming.fake, "fake"), (equilibrium, equilibrium.backbone, "head")):
        start, seen = build_transformer().state_dict(), []
        assert all(value.equal(start[name]) for name, value in copied.state_dict().items())
        loss = phase.loss
        phase.loss = lambda turn, *rest, loss=loss, seen=seen, copied=copied: (
            seen.append((turn, next(copied.parameters()).requires_grad)) or loss(turn, *rest)
        )
        train(phase, lambda drawn: build_batch(1, seed=drawn), config.training, 0, tmp_path / role, accelerator)
        assert {turn: grad for turn, grad in seen} == {role: True, "generator": False}
        assert not all(value.equal(start[name]) for name, value in copied.state_dict().items())
        teacher = priming.networks["base"] if role == "fake" else equilibrium.teacher
        assert all(value.equal(start[name]) for name, value in teacher.state_dict().items())


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValidationError, match="student_lora avoids"):
        phase_two.Settings(backbone="copy", student_lora=LORA)


# Processes.


def test_processes_that_do_not_see_each_other_do_not_each_train_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # by torchrun, of whose processes accelerate takes no notice without a GPU
    with pytest.raises(ConfigError, match=r"WORLD_SIZE = 2 .* sees 1: .*ACCELERATE_USE_CPU=true"):
        run.accelerator_for(Training())
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run.accelerator_for(Training()).num_processes == 1


def test_a_state_is_found_by_processes_that_share_the_work_otherwise_and_by_no_others(tmp_path):
    def state(**training):
        settings = {"seed": 0, "priming": phase_one.Settings(training=Training(**training)).model_dump(mode="json")}
        return _Task(run, run.run, tmp_path / "priming", settings, {}, {"teacher": "0"}).state

    assert state() == state(accumulate=8) == state(sharding=Sharding(strategy="full", context_parallel=2))
    assert len({state(), state(batch_size=2), state(steps=7), state(mixed_precision="bf16")}) == 4


def test_a_state_is_not_taken_up_with_other_inputs(tmp_path):
    settings = {"seed": 0, "priming": phase_one.Settings().model_dump(mode="json")}
    states = {_Task(run, run.run, tmp_path / "priming", settings, {}, {"teacher": d}).state for d in ("0", "1")}
    assert len(states) == 2


def test_a_state_is_taken_up_only_for_updates_of_as_many_micro_batches(tmp_path):
    def go_on(steps: int, accumulate: int) -> None:
        phase, _ = lora_phase("equilibrium")
        training = Training(steps=steps, accumulate=accumulate)
        train(phase, lambda drawn: build_batch(1, seed=drawn), training, 0, tmp_path, accelerator_for("no"))

    go_on(1, 2)
    with pytest.raises(ConfigError, match=r"updates of 2 micro-batches.*make 3: set equilibrium.training.accumulate=2"):
        go_on(2, 3)
    go_on(2, 2)


# Precision.


def test_what_is_made_exact_is_so_in_copies_too_each_with_its_own_weights():
    model = build_transformer()
    take_exact_inputs(model)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.patch_embedding.weight)
    x = torch.randn(1, 36, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found, zero = model.patch_embedding(x), twin.patch_embedding(x)
    assert found.dtype == torch.float32 and found.equal(build_transformer().patch_embedding(x))
    assert zero.equal(twin.patch_embedding.bias.view(1, -1, 1, 1, 1).expand(zero.shape))


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["ema", "teacher"])
def test_bf16_measures_the_perturbation_and_not_its_own_rounding(backbone):
    def penalty(sigma: float) -> float:
        phase = build_equilibrium(backbone=backbone, r1=R1(sigma_spatial=sigma, sigma_temporal=sigma))
        _, logs = phase.loss("head", build_batch(8), torch.Generator().manual_seed(0), 0)
        return logs["str1"].item()

    sigma = 0.01
    exact = penalty(sigma)
    with torch.autocast("cpu", torch.bfloat16):
        assert penalty(sigma) == pytest.approx(exact, rel=0.1)
        assert penalty(sigma) == pytest.approx(penalty(4 * sigma) / 16, rel=0.2)


def test_frozen_weights_are_held_as_bf16_where_that_is_the_precision_but_trained_ones_are_not(teacher):
    half = Training(mixed_precision="bf16")
    stored = Stored({"teacher": teacher}, half, torch.device("cpu"))
    frozen, trained = (stored.transformer("teacher", trained) for trained in (False, True))
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert frozen.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert frozen.blocks[0].norm2.weight.dtype == frozen.scale_shift_table.dtype == torch.float32
    take_exact_inputs(frozen)
    for name in INPUTS:
        assert {p.dtype for p in frozen.get_submodule(name).parameters()} == {torch.float32}
    (x, c), t = build_batch(1), torch.ones(1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert predict_x0(frozen, x, t, c).dtype == torch.float32
    adapter = SharedBase(frozen).add(STUDENT, LORA)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


# Sizes.


def test_the_14b_transformer_and_its_adapters_have_the_published_sizes():
    model = empty_transformer(WAN_14B)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == 16_394_878_784
    assert round(sum(p.numel() for p in model.blocks[0].parameters()) / 1e6, 1) == 403.8
    with torch.device("meta"):
        adapter = SharedBase(model).add(STUDENT, Lora(rank=64, alpha=64))
    sizes = {name: p.numel() for name, p in adapter.named_parameters()}
    assert round(sum(sizes.values()) / 1e6, 1) == 359.1
    video = {name: n for name, n in sizes.items() if "add_" not in name}
    assert round(sum(video.values()) / 1e6, 1) == 306.7
    assert round(sum(n for name, n in video.items() if "ffn" not in name) / 1e6, 1) == 209.7
    with torch.device("meta"):
        wider = SharedBase(empty_transformer(WAN_14B | {"num_layers": 4})).add(STUDENT, Lora(rank=128, alpha=128))
    assert round(10 * sum(p.numel() for name, p in wider.named_parameters() if "add_" not in name) / 1e6) == 613
    text_only = WAN_14B | {"in_channels": 16, "image_dim": None, "added_kv_proj_dim": None}
    assert round(sum(p.numel() for p in empty_transformer(text_only).parameters()) / 1e9, 3) == 14.288


def test_an_empty_transformer_has_the_tables_of_a_real_one_and_a_whole_network_is_saved_as_it_is():
    real = build_transformer()
    empty = empty_transformer(dict(real.config))
    assert all(value.equal(real.get_buffer(name)) for name, value in empty.named_buffers())
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert unsharded(real) is real
