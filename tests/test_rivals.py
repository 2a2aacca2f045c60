"""The rivals on tiny models: what each network is shown, who learns, and what a setting turns one method into."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from conftest import build_batch, build_transformer, seeded
from vpae.config import Experiment, Optimizer
from vpae.distill import METHODS
from vpae.distill.budget import network_evaluations
from vpae.distill.dmd2 import Settings as Dmd2Settings
from vpae.distill.losses.consistency import consistency_loss
from vpae.distill.losses.probes import perturbation
from vpae.distill.losses.vsd import flow_matching_loss
from vpae.experiment import load
from vpae.flow import add_noise, schedule, x0_from_velocity
from vpae.graph import stages_of
from vpae.models.adapters import STUDENT, lora_names
from vpae.models.wan import predict_x0, velocity
from vpae.stages import run_stage
from vpae.training.loop import train

CONFIGS = Path(__file__).parents[1] / "configs"
RIVALS = ("consistency", "dmd2", "dfd", "apt", "magic")
rivals = pytest.mark.parametrize("name", RIVALS)


class Tiny:
    """Networks of tiny size: the teacher, and one other network in place of every student."""

    device = torch.device("cpu")

    def transformer(self, model: str, trained: bool) -> nn.Module:
        return build_transformer(0 if model == "teacher" else 1)


@cache
def settings_of(name: str) -> Experiment:
    return load(CONFIGS / "micro-rivals.yaml", [f"methods.{name}=teacher"]).settings


def build(name: str, **changed: object):
    """A method that starts from the teacher, with the settings of `micro-rivals` but for what is changed."""
    settings = settings_of(name)
    section = type(getattr(settings, name)).model_validate({**dict(getattr(settings, name)), **changed})
    return METHODS[name].build(settings.model_copy(update={name: section}), Tiny())


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(module: nn.Module) -> float:
    return sum(p.grad.abs().sum().item() for p in module.parameters() if p.grad is not None)


@contextmanager
def calls_of(*modules: nn.Module) -> Iterator[list[dict]]:
    """What transformers are called with, in order, whether gradients were on, and what they answered."""
    calls: list[dict] = []

    def note(module, _inputs, arguments: dict, output: tuple[Tensor]) -> None:
        x, t = arguments["hidden_states"][:, :16].detach(), arguments["timestep"] / 1000
        calls.append({"by": module, "x": x, "t": t, "grad": torch.is_grad_enabled(), "v": output[0].detach()})

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    yield calls
    for handle in handles:
        handle.remove()


@contextmanager
def logits_of(phase) -> Iterator[list[tuple]]:
    """What APT's discriminator is asked: (x, times, logits)."""
    asked, logits = [], phase.logits

    def note(x, times, c):
        asked.append((x, times, logits(x, times, c)))
        return asked[-1][-1]

    phase.logits = note
    yield asked
    phase.logits = logits


# All of them.


@rivals
def test_training_moves_every_role_and_not_the_teacher(name, tmp_path, accelerator):
    phase = build(name)
    before = {
        role: {n: p.detach().clone() for n, p in owner.module.named_parameters() if p.requires_grad}
        for role, owner in phase.roles.items()
    }
    for role in phase.roles:
        phase.loss(role, build_batch(2), rng(), 0)[0].backward()
        assert gradients(phase.roles[role].module) > 0 and gradients(phase.ema) == 0
        for owner in phase.roles.values():
            owner.optimizer.zero_grad()
    training = phase.config.training.model_copy(update={"checkpoint_every": 100})
    train(phase, lambda drawn: build_batch(2, seed=drawn), training, 0, tmp_path, accelerator)
    for role, weights in before.items():
        moved = dict(phase.roles[role].module.named_parameters())
        assert any(not moved[n].equal(value) for n, value in weights.items()), role
    frozen = [network for held, network in phase.networks.items() if held in ("base", "teacher")]
    for network in frozen:
        found = {n.replace(".base_layer", ""): p for n, p in network.named_parameters()}
        assert all(found[n].equal(p) for n, p in build_transformer(0).named_parameters())
    assert bool(frozen) == (name != "apt")  # whose teacher is where the discriminator begins, and no more


@rivals
def test_each_role_has_the_optimiser_of_its_own_settings(name):
    settings = settings_of(name)
    own = [role for role in ("generator", "fake", "discriminator") if hasattr(getattr(settings, name), role)]
    rates = {role: 1e-3 * (number + 1) for number, role in enumerate(own)}
    phase = build(name, **{role: Optimizer(learning_rate=rate) for role, rate in rates.items()})
    assert {role: owner.settings.learning_rate for role, owner in phase.roles.items()} == rates
    assert {role: owner.optimizer.param_groups[0]["lr"] for role, owner in phase.roles.items()} == rates


@rivals
def test_no_turn_logs_what_is_not_finite_and_all_curves_of_the_report_are_logged(name):
    phase, logged = build(name), set()
    for role in phase.roles:
        loss, values = phase.loss(role, build_batch(2), rng(), 0)
        assert all(torch.isfinite(value) for value in (loss, *values.values()))
        logged |= {f"{role}_loss", *values}
    assert {key for panel in phase.panels for key in panel.curves} <= logged


# Consistency.


def test_consistency_compares_the_student_with_its_ema_one_guided_step_of_the_teacher_further():
    phase, (x, c) = build("consistency", guidance_scale=3.0, intervals=4), build_batch(2)
    with calls_of(phase.teacher, phase.ema, phase.generator) as calls:
        loss, _ = phase.loss("generator", (x, c), rng(), 0)
    conditional, unconditional, target, student = calls
    assert [call["by"] for call in calls] == [phase.teacher, phase.teacher, phase.ema, phase.generator]
    assert [call["grad"] for call in calls] == [False, False, False, True]
    t, s = student["t"], target["t"]
    times = schedule(4, phase.shift).float()
    for now, after in zip(t, s, strict=True):
        assert times[(times - now).abs().argmin() + 1].item() == pytest.approx(after.item(), abs=1e-6)
    guided = unconditional["v"] + 3.0 * (conditional["v"] - unconditional["v"])
    step = (s - t).reshape(-1, 1, 1, 1, 1) * guided
    torch.testing.assert_close(target["x"], student["x"] + step, atol=1e-5, rtol=0)
    predictions = [x0_from_velocity(call["x"], call["v"], call["t"]) for call in (student, target)]
    torch.testing.assert_close(loss.detach(), (predictions[0] - predictions[1]).square().mean())


def test_consistency_takes_the_distance_that_is_set():
    phase, batch = build("consistency", huber=0.1), build_batch(2)
    with calls_of(phase.ema, phase.generator) as calls:
        loss, _ = phase.loss("generator", batch, rng(), 0)
    target, x0 = (x0_from_velocity(call["x"], call["v"], call["t"]) for call in calls)
    torch.testing.assert_close(loss.detach(), consistency_loss(x0, target, 0.1))
    assert loss != consistency_loss(x0, target)


def test_a_student_that_is_the_exact_solution_of_a_linear_flow_has_nothing_to_learn_from_consistency():
    phase, (x, c) = build("consistency", guidance_scale=1.0), build_batch(2)

    class Exact(nn.Module):
        """v of data that is x alone, whose trajectories are straight lines to x."""

        def forward(self, hidden_states, timestep, **_):
            t = (timestep / 1000).reshape(-1, 1, 1, 1, 1).clamp_min(1e-6)
            return ((hidden_states[:, :16] - x) / t,)

    exact = Exact()
    exact.blocks = ()
    phase.teacher = phase.ema = phase.generator = exact
    loss, _ = phase.loss("generator", (x, c), rng(), 0)
    assert loss < 1e-9


# Score distillation and a GAN.


def learnt(fake: nn.Module) -> nn.Module:
    """A fake model after it has learnt something, always the same."""
    with torch.no_grad():
        for p in fake.parameters():
            p.add_(seeded(3, lambda p=p: 0.1 * torch.randn(p.shape)))
    return fake


LORA = {"fake_form": "lora", "head_weight": 0.0, "adversarial_weight": 0.0}


@pytest.mark.parametrize("turn", ["fake", "generator"])
def test_dmd2_without_an_adversary_is_priming_bit_for_bit(turn):
    times, found = settings_of("dmd2").dmd2.generator_times, []
    for name, settings in (("priming", {"generator_times": times}), ("dmd2", LORA)):
        phase = build(name, **settings)
        phase.fake.load_state_dict(learnt(build("priming").fake).state_dict())
        loss, _ = phase.loss(turn, build_batch(2), rng(), 0)
        loss.backward()
        learner = phase.fake if turn == "fake" else phase.generator
        found.append([loss.detach(), *(p.grad for p in learner.parameters() if p.grad is not None)])
    assert len(found[0]) > 10 and all(a.equal(b) for a, b in zip(*found, strict=True))


def test_data_forcing_with_no_share_of_real_data_is_dmd2_bit_for_bit_and_with_half_it_is_not():
    losses = {}
    for name, share in (("dmd2", 0.0), ("dfd", 0.0), ("dfd", 0.5), ("dmd2", 0.5)):
        phase = build(name, real_share=share, **LORA)
        loss, _ = phase.loss("generator", build_batch(8), rng(), 0)
        losses[name, share] = loss.item()
    assert losses["dmd2", 0.0] == losses["dfd", 0.0] != losses["dfd", 0.5] == losses["dmd2", 0.5]


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 64), (0.5, 32)])
def test_the_teacher_looks_at_that_share_of_real_clips_with_the_video_s_own_noise_and_time(share, expected):
    phase, (x, c) = build("dfd", real_share=share, guidance_scale=1.0, fake_form="copy"), build_batch(64)
    with calls_of(phase.generator, phase.fake, phase.teacher.base) as calls, torch.no_grad():
        phase.loss("generator", (x, c), rng(), 0)
    made, fake, teacher = calls
    assert [call["by"] for call in calls] == [phase.generator, phase.fake, phase.teacher.base]
    xh, t = x0_from_velocity(made["x"], made["v"], made["t"]), teacher["t"]
    assert t.equal(fake["t"])
    t5 = t.reshape(-1, 1, 1, 1, 1)
    noise = (fake["x"] - (1 - t5) * xh) / t5
    real = add_noise(x, noise, t)
    at_real = (teacher["x"] - real).abs().amax(dim=(1, 2, 3, 4)) < 1e-3
    at_video = (teacher["x"] - fake["x"]).abs().amax(dim=(1, 2, 3, 4)) < 1e-3
    assert (at_real ^ at_video).all() and abs(at_real.sum().item() - expected) <= (16 if 0 < share < 1 else 0)


def test_the_head_and_the_fake_model_learn_together_from_one_pass_for_video_and_one_for_the_clip():
    phase, (x, c) = build("dmd2", head_weight=0.01), build_batch(2)
    with calls_of(phase.generator, phase.fake) as calls:
        loss, logs = phase.loss("fake", (x, c), rng(), 0)
    made, video, clip = calls
    assert [call["by"] for call in calls] == [phase.generator, phase.fake, phase.fake] and video["t"].equal(clip["t"])
    xh, t5 = x0_from_velocity(made["x"], made["v"], made["t"]), video["t"].reshape(-1, 1, 1, 1, 1)
    noise = (video["x"] - (1 - t5) * xh) / t5
    torch.testing.assert_close(
        logs["flow_matching"].detach(), flow_matching_loss(video["v"], xh, noise), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(loss, logs["flow_matching"] + 0.01 * logs["told_apart"])
    noises = ((clip["x"] - (1 - t5) * x) / t5, noise)
    assert (
        all(n.std().item() == pytest.approx(1, abs=0.1) for n in noises) and abs((noises[0] * noises[1]).mean()) < 0.1
    )
    loss.backward()
    assert gradients(phase.head) > 0 and gradients(phase.fake) > 0 and gradients(phase.generator) == 0


@pytest.mark.parametrize("form", ["copy", "lora"])
def test_the_head_is_moved_with_the_fake_model(form):
    phase = build("dmd2", fake_form=form)
    moved = {id(p) for p in phase.roles["fake"].parameters()}
    assert moved == {id(p) for part in (phase.fake, phase.head) for p in part.parameters()}


def test_the_generator_follows_score_and_head_and_one_pass_of_the_fake_model_gives_both():
    weights = {"adversarial_weight": 0.0}, {"adversarial_weight": 0.5}
    found = []
    for changed in weights:
        phase = build("dmd2", guidance_scale=3.0, **changed)
        with calls_of(phase.generator, phase.fake, phase.teacher.base) as calls:
            loss, logs = phase.loss("generator", build_batch(2), rng(), 0)
        assert [call["by"] for call in calls] == [phase.generator, phase.fake, *[phase.teacher.base] * 2]
        found.append((loss.detach(), logs))
    (alone, _), (both, logs) = found
    torch.testing.assert_close(alone, logs["vsd"].detach())
    torch.testing.assert_close(both, alone + 0.5 * logs["adversarial"].detach())


def test_the_adversarial_term_reaches_the_generator_through_the_video_and_score_distillation_does_not_reach_the_fake():
    phase = build("dmd2", adversarial_weight=0.5)
    phase.loss("generator", build_batch(2), rng(), 0)[0].backward()
    with_head = torch.cat([p.grad.flatten() for p in phase.generator.parameters()])
    assert gradients(phase.teacher) == 0 and with_head.abs().sum() > 0
    phase = build("dmd2", adversarial_weight=0.0)
    phase.loss("generator", build_batch(2), rng(), 0)[0].backward()
    without = torch.cat([p.grad.flatten() for p in phase.generator.parameters()])
    assert gradients(phase.fake) == 0 and not with_head.allclose(without)


def test_a_head_that_does_not_learn_cannot_be_an_adversary():
    with pytest.raises(ValidationError, match="set head_weight too"):
        Dmd2Settings(head_weight=0.0)


def test_data_forcing_goes_on_from_the_fake_model_that_priming_left():
    settings = load(CONFIGS / "micro-rivals.yaml").settings
    left = lora_names(learnt(build("priming").fake).state_dict())

    class Primed(Tiny):
        def adapter(self, model: str, name: str) -> dict[str, Tensor]:
            assert (model, name) == ("priming", "fake")
            return left

    found = METHODS["dfd"].build(settings, Primed())
    assert all(value.equal(left[name]) for name, value in lora_names(found.fake.state_dict()).items())


def test_a_student_that_is_an_adapter_goes_on_from_the_adapter_of_its_start():
    lora = ["priming.student_lora={rank: 4, alpha: 4}", "equilibrium.student_lora={rank: 4, alpha: 4}"]
    settings = load(CONFIGS / "micro.yaml", lora).settings

    class Primed(Tiny):
        left: dict[str, Tensor] | None = None

        def adapter(self, model: str, name: str = STUDENT) -> dict[str, Tensor]:
            assert (model, name) == ("priming", STUDENT)
            return self.left

    networks = Primed()
    networks.left = lora_names(learnt(METHODS["priming"].build(settings, networks).generator).state_dict())
    found = METHODS["equilibrium"].build(settings, networks)
    for network in (found.generator, found.ema):
        assert all(value.equal(networks.left[name]) for name, value in lora_names(network.state_dict()).items())


def test_the_weights_that_a_method_draws_follow_from_the_experiment_s_seed():
    drawn = []
    for seed in (0, 0, 1):
        phase = METHODS["dfd"].build(settings_of("dfd").model_copy(update={"seed": seed}), Tiny())
        drawn.append(next(p for name, p in phase.fake.named_parameters() if ".A." in name))
    first, again, other = drawn
    assert first.equal(again) and not first.equal(other)


# The weak-to-strong teacher.


@torch.no_grad()
def test_the_weak_teacher_is_the_teacher_at_first_and_the_share_says_how_far_it_follows_the_fake_model():
    (x, c), t = build_batch(2), torch.tensor([0.3, 0.9])
    original = velocity(build_transformer(0), x, t, c)
    assert velocity(build("magic").teacher, x, t, c).equal(original)
    found = {share: build("magic", alpha_weak=share) for share in (0.0, 0.25, 1.0)}
    for phase in found.values():
        learnt(phase.fake)
    assert velocity(found[0.0].teacher, x, t, c).equal(original)
    assert velocity(found[1.0].teacher, x, t, c).equal(velocity(found[1.0].fake, x, t, c))
    weak, fake = velocity(found[0.25].teacher, x, t, c), velocity(found[0.25].fake, x, t, c)
    assert 0 < (weak - original).norm() < (fake - original).norm()


@pytest.mark.parametrize("turn", ["fake", "generator"])
def test_magic_with_no_share_of_the_fake_model_is_priming_bit_for_bit(turn):
    found = []
    for phase in (build("priming"), build("magic", alpha_weak=0.0), build("magic", alpha_weak=0.25)):
        phase.fake.load_state_dict(
            seeded(
                5,
                lambda p=phase: {
                    n: v + 0.1 * torch.randn(v.shape) for n, v in build("magic").fake.state_dict().items()
                },
            )
        )
        found.append(phase.loss(turn, build_batch(2), rng(), 0)[0].item())
    assert found[0] == found[1] and (found[0] == found[2]) == (turn == "fake")


def test_the_generator_s_turn_gives_the_weak_teacher_s_adapter_no_gradient():
    phase = build("magic")
    learnt(phase.fake)
    phase.loss("generator", build_batch(2), rng(), 0)[0].backward()
    assert gradients(phase.fake) == 0 and gradients(phase.generator) > 0


# Adversarial post-training.


def test_apt_s_discriminator_sees_clip_and_video_as_they_are_at_the_same_shifted_times():
    phase, (x, c) = build("apt", ensemble=2), build_batch(4)
    with logits_of(phase) as asked, calls_of(phase.generator) as made:
        loss, logs = phase.loss("discriminator", (x, c), rng(), 0)
    (real, times, d_real), (fake, _, d_fake), (perturbed, _, d_perturbed) = asked
    assert real.equal(x) and fake.equal(predict_x0(phase.generator, made[0]["x"], made[0]["t"], c).detach())
    assert len(times) == 2 and all(asked_times is times for _, asked_times, _ in asked)
    assert (perturbed - x).std().item() == pytest.approx(0.1, rel=0.1) and (made[0]["t"] == 1).all()
    expected = -(d_real.sigmoid().log().mean() + (1 - d_fake.sigmoid()).log().mean())
    torch.testing.assert_close(logs["told_apart"], expected)
    torch.testing.assert_close(loss, expected + 100 * (d_real - d_perturbed).square().mean())


def test_apt_s_times_are_shifted_towards_noise():
    phase, clips = build("apt", ensemble=64), build_batch(16)
    with logits_of(phase) as asked:
        phase.logits = lambda x, times, c: asked.append(times) or torch.zeros(len(x), requires_grad=True)
        phase.loss("generator", clips, rng(), 0)
    t = torch.stack(asked[0]).flatten()
    assert t.median().item() == pytest.approx(12 * 0.5 / (1 + 11 * 0.5), abs=0.01)  # of the shifted uniform


@torch.no_grad()
def test_an_ensemble_of_one_time_is_the_plain_logit_and_of_more_their_mean():
    phase, (x, c) = build("apt"), build_batch(2)
    a, b = torch.tensor([0.2, 0.9]), torch.tensor([0.7, 0.4])
    one, other = phase.logits(x, [a], c), phase.logits(x, [b], c)
    assert not one.equal(other)
    torch.testing.assert_close(phase.logits(x, [a, b], c), (one + other) / 2)
    assert phase.logits(x, [a, a], c).equal(one)


def test_apt_s_backbone_starts_as_the_teacher_and_learns_with_its_head():
    phase, (x, c), t = build("apt"), build_batch(2), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        assert velocity(phase.backbone, x, t, c).equal(velocity(build_transformer(0), x, t, c))
    phase.loss("discriminator", (x, c), rng(), 0)[0].backward()
    assert gradients(phase.backbone) > 0 and gradients(phase.head) > 0 and gradients(phase.generator) == 0
    assert isinstance(phase.roles["discriminator"].optimizer, torch.optim.RMSprop)
    assert len(phase.taps) == 3 and phase.head.queries_QD.shape[0] == 1


def test_without_weight_the_regularisation_of_apt_is_not_computed():
    phase = build("apt", r1_weight=0.0)
    with logits_of(phase) as asked:
        _, logs = phase.loss("discriminator", build_batch(2), rng(), 0)
    assert len(asked) == 2 and "r1" not in logs
    assert perturbation("plain", torch.zeros(2, 1, 1, 1, 3), 0.1, rng()).abs().max() > 0


# Where they start.


def test_apt_starts_from_consistency_s_student_and_so_may_the_equilibrium():
    settings = load(CONFIGS / "micro-rivals.yaml", ["methods={equilibrium: consistency}"]).settings
    assert settings.chain("apt") == ["consistency", "apt"] and settings.chain("dfd") == ["priming", "dfd"]
    assert settings.chain("equilibrium") == ["consistency", "equilibrium"]
    asked: list[str] = []

    class Watched(Tiny):
        def transformer(self, model: str, trained: bool) -> nn.Module:
            asked.append(model)
            return super().transformer(model, trained)

    METHODS["equilibrium"].build(settings, Watched())
    assert asked.count("consistency") == 1


@pytest.mark.slow
def test_all_rivals_go_through_every_stage_into_one_report(finished_micro, tmp_path):
    shutil.copytree(finished_micro, tmp_path, dirs_exist_ok=True)  # what they share with it
    source = load(CONFIGS / "micro-rivals.yaml", ["samples.rows.teacher-100nfe=null"])
    for stage in stages_of(source.settings):
        run_stage(source, stage, tmp_path)
    assert {folder.parents[1].name for folder in tmp_path.glob("*/*/student")} == {
        "micro",
        *(f"micro-{name}" for name in RIVALS),
    }
    scores = json.loads((tmp_path / "micro-rivals/evaluation/scores.json").read_text())["rows"]
    rows = {"lcm-1nfe", "dmd2-1nfe", "dfd-1nfe", "apt-1nfe", "magic-1nfe", "priming-1nfe", "vpae-1nfe"}
    assert rows <= scores.keys()
    page = (tmp_path / "micro-rivals/report/index.html").read_text()
    assert all(METHODS[name].title in page for name in RIVALS)


@pytest.mark.slow
def test_the_rivals_of_tiny_have_the_network_evaluations_of_its_two_phases():
    def spent(experiment: str, method: str) -> int:
        settings = load(CONFIGS / f"{experiment}.yaml").settings
        return sum(network_evaluations(settings, name) for name in settings.chain(method))

    budget = spent("tiny", "equilibrium")
    for name in RIVALS:
        assert spent(f"tiny-{name}", name) == pytest.approx(budget, rel=0.01), name
        together = load(CONFIGS / "tiny-rivals.yaml").settings
        alone = load(CONFIGS / f"tiny-{'apt' if name == 'consistency' else name}.yaml").settings
        assert getattr(together, name) == getattr(alone, name) and together.chain(name) == alone.chain(name)
