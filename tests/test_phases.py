"""Both phases on tiny models: who learns from whom, what each network is shown, and what stays as it was."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import build_batch, build_equilibrium, build_priming, build_transformer
from vpae.config import Experiment, Optimizer, Times, TinyTransformer, Training
from vpae.distill import equilibrium
from vpae.distill.budget import network_evaluations
from vpae.distill.losses.adversarial import generator_adversarial
from vpae.distill.losses.vsd import csds_loss
from vpae.distill.method import motion_monitors
from vpae.experiment import load
from vpae.flow import expand, schedule, x0_from_velocity
from vpae.models.wan import predict_x0, velocity
from vpae.randomness import generator_for
from vpae.teacher.flow_matching import FlowMatchingPhase
from vpae.training.loop import train

CONFIGS = Path(__file__).parent.parent / "configs"
BUILD = {"priming": build_priming, "equilibrium": build_equilibrium}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(value.equal(second[name]) for name, value in first.items())


def gradients(module: nn.Module) -> float:
    """Sum of the absolute gradients; 0 where there are none."""
    return sum(p.grad.abs().sum().item() for p in module.parameters() if p.grad is not None)


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[dict]]:
    """What a transformer is called with, whether gradients were on, and what it answered."""
    calls: list[dict] = []

    def note(_module, _inputs, arguments: dict, output: tuple[Tensor]) -> None:
        calls.append({**arguments, "grad": torch.is_grad_enabled(), "output": output[0].detach()})

    handle = module.register_forward_hook(note, with_kwargs=True)
    yield calls
    handle.remove()


@contextmanager
def logits_of(phase) -> Iterator[list[tuple]]:
    """What the discriminator is asked: (x_t, t, condition, logits)."""
    asked, logits = [], phase.logits

    def note(x_t, t, c):
        asked.append((x_t, t, c, logits(x_t, t, c)))
        return asked[-1][-1]

    phase.logits = note
    yield asked
    phase.logits = logits


def fit(phase, folder: Path, accelerator, steps: int | None = None, turns: list[str] | None = None):
    """Train on random batches; `turns` replaces the phase's own turns."""
    if turns is not None:
        phase.turns = lambda step: turns
    training = phase.config.training if steps is None else phase.config.training.model_copy(update={"steps": steps})
    train(phase, lambda drawn: build_batch(2, seed=drawn), training, 0, folder, accelerator)
    return phase


# The teacher.


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 16), (1.0, 64)])
def test_the_teacher_learns_the_velocity_and_for_a_share_of_the_clips_without_their_text(share, expected):
    times = {"low": 0.1, "high": 0.2, "last_low": 0.8, "last_high": 0.9}
    config = TinyTransformer(drop_text=share, times=times, training=Training(steps=5))
    phase, (x, c) = FlowMatchingPhase(config, 1.0, build_transformer()), build_batch(64)
    with torch.no_grad(), calls_of(phase.roles["transformer"].module) as calls:
        loss, _ = phase.loss("transformer", (x, c), rng(), 4)
    [call] = calls
    t = call["timestep"] / 1000
    assert t.min() >= 0.8 and t.max() <= 0.9  # in the last step
    noise = (call["hidden_states"][:, :16] - (1 - expand(t, x)) * x) / expand(t, x)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(loss, (call["output"] - (noise - x)).square().mean(), rtol=1e-4, atol=0)
    text = call["encoder_hidden_states"]
    dropped = (text == c.empty_text_LD).flatten(1).all(dim=1)
    assert text[~dropped].equal(c.text_BLD[~dropped])
    assert abs(int(dropped.sum()) - expected) <= (10 if 0 < share < 1 else 0)


# Phase I: the shared base.


def test_a_copy_of_an_adapted_network_which_would_have_nothing_to_train_is_refused():
    with pytest.raises(TypeError, match="copy its base"):
        copy.deepcopy(build_priming().fake)


@torch.no_grad()
def test_the_fake_model_starts_as_the_teacher_bit_for_bit():
    phase, (x, c), t = build_priming(), build_batch(2), torch.tensor([0.3, 0.9])
    original = velocity(build_transformer(), x, t, c)
    for network in (phase.fake, phase.teacher, phase.generator):
        assert velocity(network, x, t, c).equal(original)


def test_the_fake_model_moves_and_the_teacher_beneath_it_does_not(tmp_path, accelerator):
    phase, (x, c), t = build_priming(), build_batch(2), torch.tensor([0.3, 0.9])
    fit(phase, tmp_path, accelerator)
    with torch.no_grad():
        original = velocity(build_transformer(), x, t, c)
        assert velocity(phase.teacher, x, t, c).equal(original)
        assert (velocity(phase.fake, x, t, c) - original).abs().mean() > 1e-4
    names = {name.replace(".base_layer", ""): value for name, value in phase.networks["base"].state_dict().items()}
    assert same(build_transformer().state_dict(), {n: v for n, v in names.items() if ".fake." not in n})
    adapter = phase.fake.state_dict()
    assert all(value.abs().sum() > 0 for value in adapter.values())
    assert len(adapter) == 2 * (4 + 6 + 2) * 4  # both factors of every linear layer of attention and feed-forward


def test_only_the_adapter_is_trained_and_asking_the_teacher_does_not_freeze_it():
    phase, (x, c) = build_priming(), build_batch(1)
    before = [name for name, p in phase.networks["base"].named_parameters() if p.requires_grad]
    velocity(phase.teacher, x, torch.tensor([0.5]), c)
    assert before and all(".fake." in name for name in before)
    assert [name for name, p in phase.networks["base"].named_parameters() if p.requires_grad] == before


def test_the_networks_on_a_base_do_not_nest_and_end_even_with_an_error():
    phase, (x, c), t = build_priming(), build_batch(1), torch.tensor([0.5])
    block, fail = phase.networks["base"].blocks[1], [lambda: velocity(phase.fake, x, t, c), lambda: 1 / 0]
    for wrong, error in zip(fail, (RuntimeError, ZeroDivisionError), strict=True):
        handle = block.register_forward_pre_hook(lambda _module, _inputs, wrong=wrong: wrong())
        with pytest.raises(error):
            velocity(phase.teacher, x, t, c)
        handle.remove()
    nn.init.normal_(next(p for n, p in phase.fake.named_parameters() if n.endswith("B.weight")))
    with torch.no_grad():
        assert not velocity(phase.teacher, x, t, c).equal(velocity(phase.fake, x, t, c))


# Phase I: the turns.


def test_the_fake_model_learns_several_times_before_the_generator_moves_once():
    assert build_priming(fake_steps_per_generator_step=5).turns(0) == ["fake"] * 5 + ["generator"]


def test_in_the_fake_s_turn_only_the_adapter_gets_gradient():
    phase = build_priming()
    phase.loss("fake", build_batch(2), rng(), 0)[0].backward()
    base = phase.networks["base"]
    assert gradients(base) > 0 and gradients(phase.generator) == 0
    assert all(p.grad is None for n, p in base.named_parameters() if ".fake." not in n)


def test_in_the_generator_s_turn_of_priming_only_the_generator_gets_gradient():
    phase = build_priming()
    phase.loss("generator", build_batch(2), rng(), 0)[0].backward()
    assert all(p.grad is not None for p in phase.generator.parameters())
    assert gradients(phase.generator) > 0 and gradients(phase.networks["base"]) == gradients(phase.ema) == 0


def test_the_fake_model_s_loss_is_flow_matching_on_the_generator_s_video():
    phase, (x, c) = build_priming(), build_batch(2)
    with calls_of(phase.generator) as generated, calls_of(phase.networks["base"]) as scored:
        loss, _ = phase.loss("fake", (x, c), rng(), 0)
    [made], [judged] = generated, scored
    xh = x0_from_velocity(made["hidden_states"][:, :16], made["output"], made["timestep"] / 1000)
    t = (judged["timestep"] / 1000).reshape(-1, 1, 1, 1, 1)
    noise = (judged["hidden_states"][:, :16] - (1 - t) * xh) / t
    torch.testing.assert_close(loss, (judged["output"] - (noise - xh)).square().mean(), rtol=1e-3, atol=0)
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    assert t.min() >= 0.02 and t.max() <= 0.98


def test_the_scores_are_compared_at_one_noised_video_and_guidance_drops_only_the_text():
    w = 3.0
    phase, (x, c) = build_priming(guidance_scale=w), build_batch(2)
    nn.init.normal_(next(p for n, p in phase.networks["base"].named_parameters() if "lora_B" in n))
    with calls_of(phase.generator) as generated, calls_of(phase.networks["base"]) as scored:
        loss, logs = phase.loss("generator", (x, c), rng(), 0)
    [made], (conditional, unconditional, fake) = generated, scored
    for call in (unconditional, fake):
        for name in ("hidden_states", "timestep", "encoder_hidden_states_image"):
            assert call[name].equal(conditional[name])
    assert conditional["encoder_hidden_states"].equal(c.text_BLD) and fake["encoder_hidden_states"].equal(c.text_BLD)
    assert unconditional["encoder_hidden_states"].equal(c.empty_text_LD.expand(2, -1, -1))
    assert conditional["hidden_states"][:, 16:].equal(c.frame_BCFHW)
    assert made["grad"] and not any(call["grad"] for call in scored)

    xh = x0_from_velocity(made["hidden_states"][:, :16], made["output"], made["timestep"] / 1000)
    x_t, t = conditional["hidden_states"][:, :16], conditional["timestep"] / 1000
    guided = unconditional["output"] + w * (conditional["output"] - unconditional["output"])
    real, mine = x0_from_velocity(x_t, guided, t), x0_from_velocity(x_t, fake["output"], t)
    g = (mine - real) / (xh - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(loss.detach(), g.square().mean() / 2, rtol=1e-4, atol=0)
    torch.testing.assert_close(logs["vsd_direction"], g.abs().mean())


def test_without_guidance_the_teacher_is_asked_once():
    phase = build_priming(guidance_scale=1.0)
    with calls_of(phase.networks["base"]) as scored:
        phase.loss("generator", build_batch(2), rng(), 0)
    assert len(scored) == 2  # teacher and fake


@pytest.mark.parametrize("turn", ["fake", "generator"])
def test_the_generator_sees_the_noised_real_clip_at_times_of_its_interval(turn):
    phase, (x, c) = build_priming(), build_batch(64)
    with torch.no_grad(), calls_of(phase.generator) as calls:
        for clips in (x, x + 10):
            phase.loss(turn, (clips, c), rng(), 0)
    seen, moved = calls
    t = seen["timestep"] / 1000
    assert 0.9 - 1e-6 <= t.min() < 0.91 and 0.99 < t.max() <= 1
    assert abs(t.mean() - 0.95) < 0.015  # uniform, not shifted
    step = (moved["hidden_states"] - seen["hidden_states"])[:, :16]
    torch.testing.assert_close(step, (10 * (1 - t)).reshape(-1, 1, 1, 1, 1).expand(x.shape), atol=1e-5, rtol=0)


# Both phases.


@pytest.mark.slow
@pytest.mark.parametrize("own", [None, 0.3])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("build", "first"), [(build_priming, 0.9), (build_equilibrium, 1.0)])
def test_a_share_of_the_clips_is_at_the_later_times_of_few_step_sampling(build, first, share, own):
    later = {"few_step_share": share} if build is build_priming else {"few_step": {"share": share} if share else None}
    phase, times = build(**later, few_step_shift=own), []
    turn = "fake" if build is build_priming else "head"
    with calls_of(phase.generator) as calls, torch.no_grad():
        for seed in range(20):
            phase.loss(turn, build_batch(2), rng(seed), 0)
    times = torch.cat([call["timestep"] for call in calls]) / 1000
    later = schedule(4, phase.shift if own is None else own)[1:-1].float()
    found = (times[:, None] - later).abs().min(dim=1).values < 1e-6
    assert abs(found.float().mean().item() - share) <= (0.25 if share == 0.5 else 0)
    assert (times[~found] >= first).all()


def test_at_a_later_time_the_equilibrium_s_generator_sees_the_clip_through_less_noise():
    phase, (x, c) = build_equilibrium(few_step={"share": 1.0, "steps": 2}), build_batch(2)
    with calls_of(phase.generator) as calls:
        for clips in (x, x + 10):
            phase.loss("head", (clips, c), rng(), 0)
    seen, moved = calls
    t = seen["timestep"] / 1000
    step = (moved["hidden_states"] - seen["hidden_states"])[:, :16]
    torch.testing.assert_close(step, (10 * (1 - t)).reshape(-1, 1, 1, 1, 1).expand(x.shape), atol=1e-5, rtol=0)


def test_at_a_later_time_it_can_see_its_own_one_step_video_as_few_step_sampling_does():
    """Renoised, and without a gradient to the step that made it; the clip plays no part."""
    phase, (x, c) = build_equilibrium(few_step={"share": 1.0, "steps": 2, "own": True}), build_batch(2)
    with calls_of(phase.generator) as calls:
        for clips in (x, x + 10):
            phase.loss("generator", (clips, c), rng(), 0)
    first, second, *others = calls
    assert (first["timestep"] == 1000).all() and not first["grad"] and second["grad"]
    assert second["hidden_states"].equal(others[1]["hidden_states"])
    t = schedule(2, phase.shift)[1].float().expand(2)
    torch.testing.assert_close(second["timestep"] / 1000, t)
    video = x0_from_velocity(first["hidden_states"][:, :16], first["output"], torch.ones(2))
    noise = (second["hidden_states"][:, :16] - (1 - expand(t, video)) * video) / expand(t, video)
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), video.flatten()]))[0, 1]) < 0.1


def test_each_role_has_the_optimiser_of_its_own_settings():
    rates = {"generator": 1e-3, "discriminator": 2e-3, "fake": 3e-3}
    own = {role: Optimizer(learning_rate=rate) for role, rate in rates.items()}
    fake = own.pop("fake")
    phases = (
        build_priming(generator=own["generator"], fake=fake),
        build_equilibrium(**own, score=equilibrium.Score(weight=1.0, fake=fake)),
        build_equilibrium(**own, backbone="copy"),
    )
    for phase in phases:
        for name, role in phase.roles.items():
            wanted = rates["discriminator" if name == "head" else name]
            assert role.settings.learning_rate == role.optimizer.param_groups[0]["lr"] == wanted


# Phase II.


def test_each_term_has_its_own_times_and_guidance():
    times = {name: {"low": low, "high": low + 0.1} for name, low in (("head", 0.1), ("csds", 0.3), ("score", 0.5))}
    phase = build_equilibrium(
        discriminator_times=times["head"],
        csds_times=times["csds"],
        csds_guidance_scale=3.0,
        score=equilibrium.Score(weight=1.0, guidance_scale=1.0, times=times["score"]),
    )
    with logits_of(phase) as asked, calls_of(phase.networks["base"]) as scored:
        for turn in ("head", "generator", "fake"):
            phase.loss(turn, build_batch(2), rng(), 0)

    def name_of(t: Tensor) -> str:
        [name] = (name for name, own in times.items() if own["low"] <= t.min() and t.max() <= own["high"])
        return name

    assert {name_of(t) for _, t, *_ in asked} == {"head"}
    # C-SDS with and without the text, the score of teacher and fake model, and the fake model's own turn.
    assert [name_of(call["timestep"] / 1000) for call in scored] == ["csds", "csds", "score", "score", "score"]


def test_the_head_learns_before_the_generator_moves():
    phase = build_equilibrium(discriminator_steps_per_generator_step=2, discriminator_warmup_steps=3)
    assert phase.turns(0) == ["head"] * 5 + ["generator"] and phase.turns(1) == ["head"] * 2 + ["generator"]


@pytest.mark.parametrize("turn", ["head", "generator"])
def test_the_video_is_one_step_from_noise_that_knows_nothing_of_the_clip(turn):
    phase, (x, c) = build_equilibrium(), build_batch(2)
    with calls_of(phase.generator) as calls:
        for clips in (x, x + 10):
            phase.loss(turn, (clips, c), rng(), 0)
    seen, moved = calls
    assert (seen["timestep"] == 1000).all() and seen["hidden_states"].equal(moved["hidden_states"])
    assert seen["hidden_states"][:, :16].std().item() == pytest.approx(1, abs=0.1)
    assert seen["hidden_states"][:, 16:].equal(c.frame_BCFHW) and seen["encoder_hidden_states"].equal(c.text_BLD)


@pytest.mark.parametrize("backbone", ["ema", "teacher"])
def test_in_the_head_s_turn_only_the_head_gets_gradient(backbone):
    phase = build_equilibrium(backbone=backbone)
    phase.loss("head", build_batch(2), rng(), 0)[0].backward()
    assert all(p.grad is not None for p in phase.head.parameters()) and gradients(phase.head) > 0
    assert gradients(phase.ema) == gradients(phase.teacher) == gradients(phase.generator) == 0


@pytest.mark.parametrize("backbone", ["ema", "teacher"])
@pytest.mark.parametrize("terms", [{"csds_weight": 0.0}, {"adversarial_weight": 0.0}, {}], ids=str)
def test_in_the_generator_s_turn_each_term_reaches_it_through_the_video(backbone, terms):
    phase = build_equilibrium(backbone=backbone, **terms)
    videos: list[Tensor] = []
    handle = phase.generator.register_forward_hook(lambda _m, _i, output: videos.append(output[0]))
    loss, _ = phase.loss("generator", build_batch(2), rng(), 0)
    handle.remove()
    videos[0].retain_grad()
    loss.backward()
    assert videos[0].grad.abs().sum() > 0 and gradients(phase.generator) > 0
    assert gradients(phase.ema) == gradients(phase.teacher) == 0


def test_without_weight_the_adversarial_term_is_not_even_computed():
    phase = build_equilibrium(adversarial_weight=0.0, csds_weight=7.0)
    with logits_of(phase) as asked:
        loss, logs = phase.loss("generator", build_batch(2), rng(), 0)
    loss.backward()
    assert not asked and "adversarial" not in logs and gradients(phase.head) == 0
    torch.testing.assert_close(loss, 7 * logs["csds"])


def test_without_weight_the_conditional_term_asks_no_teacher():
    phase = build_equilibrium(adversarial_weight=0.5, csds_weight=0.0)
    asked: list[int] = []
    handle = phase.teacher.register_forward_hook(lambda *_: asked.append(1))
    loss, logs = phase.loss("generator", build_batch(2), rng(), 0)
    handle.remove()
    assert not asked and "csds" not in logs
    torch.testing.assert_close(loss, 0.5 * logs["adversarial"])


@pytest.mark.parametrize("form", ["hinge_linear", "hinge_clipped"])
def test_the_generator_s_loss_is_the_weighted_sum_of_the_adversarial_and_the_teacher_s_term(form):
    phase, (x, c) = build_equilibrium(g_loss=form, adversarial_weight=0.5, csds_weight=7.0), build_batch(2)
    with logits_of(phase) as asked, calls_of(phase.generator) as made, calls_of(phase.teacher) as taught:
        loss, _ = phase.loss("generator", (x, c), rng(), 0)
    [(x_t, t, _, logits)], [made], [taught] = asked, made, taught
    xh = made["hidden_states"][:, :16] - made["output"]
    target = x0_from_velocity(taught["hidden_states"][:, :16], taught["output"], taught["timestep"] / 1000)
    expected = 0.5 * generator_adversarial(logits, form) + 7 * csds_loss(xh, target)
    torch.testing.assert_close(loss.detach(), expected.detach())
    assert made["grad"] and not taught["grad"] and taught["encoder_hidden_states"].equal(c.text_BLD)
    for noised, at in ((x_t.detach(), t), (taught["hidden_states"][:, :16], taught["timestep"] / 1000)):
        at = at.reshape(-1, 1, 1, 1, 1)
        assert ((noised - (1 - at) * xh) / at).std().item() == pytest.approx(1, abs=0.1)


def test_the_discriminator_compares_clip_and_video_at_one_time_and_probes_the_clip_s_own_noised_latents():
    phase, (x, c) = build_equilibrium(), build_batch(4)
    with logits_of(phase) as asked, calls_of(phase.generator) as made:
        loss, logs = phase.loss("head", (x, c), rng(), 0)
    (real, t, *_), (fake, *_), (spatial, *_), (temporal, *_) = asked
    assert len(asked) == 4 and all(at.equal(t) and condition is c for _, at, condition, _ in asked)
    xh, t5 = made[0]["hidden_states"][:, :16] - made[0]["output"], t.reshape(-1, 1, 1, 1, 1)
    noises = [(noised - (1 - t5) * clean) / t5 for noised, clean in ((real, x), (fake, xh))]
    assert all(noise.std().item() == pytest.approx(1, abs=0.1) for noise in noises)
    assert abs((noises[0] * noises[1]).mean()) < 0.1  # each has its own noise
    for probed, sigma, axes in ((spatial, 0.01, (2,)), (temporal, 0.1, (3, 4))):
        d = probed - real
        assert all(d.diff(dim=axis).abs().max() < 1e-5 for axis in axes)
        assert d.std().item() == pytest.approx(sigma, rel=0.25)
    d_real, d_fake, d_spatial, d_temporal = (logits for *_, logits in asked)
    hinge = (1 - d_real).relu().mean() + (1 + d_fake).relu().mean()
    penalty = (d_real - d_spatial).square().mean() + (d_real - d_temporal).square().mean()
    torch.testing.assert_close(loss, hinge + 100 * penalty)
    torch.testing.assert_close(logs["str1"], penalty)


@pytest.mark.parametrize("r1", [{}, {"generated_weight": 10.0, "probes": ("plain",)}], ids=str)
def test_all_logits_of_the_head_s_turn_may_be_taken_in_one_pass(r1):
    found, grads, batches = [], [], []
    for at_once in (False, True):
        # Wide probes: of what those of 0.01 change, rounding is 2e-4 on some processors.
        phase = build_equilibrium(logits_at_once=at_once, r1={"sigma_spatial": 0.1, **r1})
        with calls_of(phase.backbone) as calls:
            loss, logs = phase.loss("head", build_batch(3), rng(), 0)
        loss.backward()
        found.append({"loss": loss.item(), **{name: value.item() for name, value in logs.items()}})
        grads.append([p.grad for p in phase.head.parameters()])
        batches.append([len(call["timestep"]) for call in calls])
    assert batches == [[3] * 4, [12]]
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6) and found[1]["str1"] > 0
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert phase.loss("head", build_batch(3), rng(), 0)[0].item() == pytest.approx(found[0]["loss"], rel=1e-4)
    evaluations = [network_evaluations(settings_of(at_once, r1), "equilibrium") for at_once in (False, True)]
    assert evaluations[0] == evaluations[1] == 2 * 2 * (5 + 3)


def settings_of(at_once: bool, r1: dict) -> Experiment:
    settings = load(CONFIGS / "micro.yaml", environment=False).settings
    section = {**settings.equilibrium.model_dump(), "logits_at_once": at_once, "r1": r1}
    return settings.model_copy(update={"equilibrium": equilibrium.Settings.model_validate(section)})


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["ema", "teacher"])
def test_the_features_are_those_of_the_named_backbone(backbone):
    phase, (x, c), t = build_equilibrium(backbone=backbone), build_batch(2), torch.tensor([0.3, 0.9])
    before = phase.logits(x, t, c)
    for name, module in {"generator": phase.generator, "ema": phase.ema, "teacher": phase.teacher}.items():
        saved = weights(module)
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng()))
        assert phase.logits(x, t, c).equal(before) == (name != backbone)
        module.load_state_dict(saved)


def test_training_moves_generator_head_and_backbone_and_leaves_the_teacher(tmp_path, accelerator):
    phase = build_equilibrium()
    before = {
        name: weights(m) for name, m in {"head": phase.head, "generator": phase.generator, "ema": phase.ema}.items()
    }
    fit(phase, tmp_path, accelerator)
    assert phase.backbone is phase.ema
    assert not any(same(weights(getattr(phase, name)), old) for name, old in before.items())
    assert same(weights(phase.teacher), weights(build_transformer()))


def test_the_head_s_gradient_of_the_generator_s_turn_is_thrown_away(tmp_path, accelerator):
    still = Optimizer(learning_rate=1e-30)  # the generator's turn leaves gradients and moves nothing
    phase = fit(build_equilibrium(generator=still), tmp_path / "a", accelerator, 1, ["generator"])
    assert same(weights(phase.head), weights(build_equilibrium().head))
    assert all(p.grad is None for role in phase.roles.values() for p in role.module.parameters())

    phase = fit(build_equilibrium(generator=still), tmp_path / "b", accelerator, 1, ["generator", "head"])
    fresh = build_equilibrium()
    noise = generator_for("cpu", 0, "equilibrium", 0, 1, 0, 0)  # seed, phase, step, turn, micro-batch, rank
    fresh.loss("head", build_batch(2, seed=1), noise, 0)[0].backward()
    norm = nn.utils.clip_grad_norm_(fresh.head.parameters(), 1.0)
    assert norm > 0
    for (name, p), q in zip(fresh.head.named_parameters(), phase.head.parameters(), strict=True):
        average = phase.roles["head"].optimizer.state[q]["exp_avg"]
        torch.testing.assert_close(average, 0.1 * p.grad, rtol=1e-4, atol=1e-8, msg=name)


# Both phases.


@pytest.mark.parametrize("name", BUILD)
def test_the_ema_is_the_recursion_over_the_generator_s_weights_after_each_step(name, tmp_path, accelerator):
    decay = 0.75
    phase = BUILD[name](training=Training(steps=3, ema_decay=decay, checkpoint_every=3))
    history, turns = [], phase.turns
    phase.turns = lambda step: history.append(weights(phase.generator)) or turns(step)
    fit(phase, tmp_path, accelerator)
    history.append(weights(phase.generator))
    assert not any(p.requires_grad for p in phase.ema.parameters())
    for key, found in phase.ema.state_dict().items():
        expected = history[0][key]
        for after in history[1:]:
            expected = decay * expected + (1 - decay) * after[key]
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)
    assert not same(history[0], history[1]) and not same(history[-1], weights(phase.ema))


@pytest.mark.parametrize(("name", "times"), [("priming", "generator_times"), ("equilibrium", "discriminator_times")])
def test_a_scheduled_interval_starts_at_the_first_step_and_ends_at_the_last(name, times):
    steps = 3
    moving = Times(low=0.9, high=0.9, last_low=0.5, last_high=0.5, distribution="uniform")
    phase = BUILD[name](**{times: moving}, training=Training(steps=steps))
    network, turn = (phase.generator, "fake") if name == "priming" else (phase.ema, "generator")
    with calls_of(network) as calls:
        for step in range(steps):
            phase.loss(turn, build_batch(2), rng(), step)
    assert [call["timestep"][0].item() for call in calls] == pytest.approx([900, 700, 500])


def test_the_monitors_are_one_and_zero_for_a_video_like_the_clip_and_tell_a_still_and_a_tinted_one():
    x, _ = build_batch(2)
    assert [v.item() for v in motion_monitors(x, x).values()] == [1, 0]
    assert motion_monitors(x[:, :, :1].expand(x.shape), x)["motion_ratio"] == 0
    assert motion_monitors(x + 0.5, x)["colour_drift"].item() == pytest.approx(0.5)


@torch.no_grad()
def test_the_one_step_prediction_is_the_noised_latents_less_t_times_the_velocity():
    model, (x, c), t = build_transformer(), build_batch(2), torch.tensor([0.25, 0.75])
    expected = torch.stack([x[i] - t[i] * velocity(model, x, t, c)[i] for i in range(2)])
    torch.testing.assert_close(predict_x0(model, x, t, c), expected)
