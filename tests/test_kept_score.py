"""Phase II with the score loss kept on, and a discriminator that sees."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import SHIFT, build_batch, build_equilibrium, seeded
from planned import SMALL, TOKENS, variant
from vpae.bench.networks import RandomNetworks
from vpae.bench.training import Workbench
from vpae.config import Training
from vpae.config.discriminator import R1, Head
from vpae.distill import METHODS
from vpae.distill.equilibrium import Equilibrium, Score, Settings
from vpae.distill.losses.vsd import vsd_direction
from vpae.distill.method import Clips
from vpae.experiment import load
from vpae.flow import add_noise
from vpae.models.adapters import FAKE, STUDENT
from vpae.models.heads import ConvolutionHead, head_on
from vpae.models.wan import predict_x0
from vpae.training.ema import make_ema
from vpae.training.loop import train

KEPT = {"score": Score(weight=1.0, guidance_scale=1.0), "adversarial_weight": 0.0, "csds_weight": 0.0}
CONFIGS = Path(__file__).parents[1] / "configs"
SEED = 5  # of all random inputs here


def rng(seed: int = SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_fake_model_takes_its_turns_only_where_the_score_is_kept():
    assert "fake" not in build_equilibrium().turns(1)
    kept = build_equilibrium(score=Score(weight=1.0, fake_steps_per_generator_step=3))
    assert kept.turns(1) == ["head", "fake", "fake", "fake", "generator"]


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_a_copied_backbone_learns_with_the_head_and_the_teacher_does_not(kept: float):
    settings = variant("copies", "equilibrium")
    config = settings.equilibrium.model_copy(update={"score": Score(weight=kept)})
    settings = settings.model_copy(update={"equilibrium": config})
    bench = Workbench(settings, "equilibrium", SMALL, TOKENS, torch.device("cpu"))
    phase = bench.phase
    teacher = phase.teacher.base if kept else phase.teacher

    def blocks(network: torch.nn.Module) -> list[Tensor]:
        return [p.detach().clone() for p in network.blocks.parameters()]

    before = blocks(phase.backbone), blocks(teacher)
    bench.update("head")
    moved = [not torch.equal(*pair) for pair in zip(blocks(phase.backbone), before[0], strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    assert all(torch.equal(*pair) for pair in zip(blocks(teacher), before[1], strict=True))


CHAINS = {
    "priming's": ("equilibrium", {}, True),
    "none, without the score loss": ("dfd", {"equilibrium.score.weight": 0.0}, False),
    "the equilibrium's, which it has from priming": ("dfd", {"equilibrium.score.weight": 1.0}, True),
    "a whole copy": ("equilibrium", {"priming.fake_form": "copy"}, None),
    "one of another rank": ("dfd", {"equilibrium.score.weight": 1.0, "dfd.fake_lora.rank": 8}, None),
}


@pytest.mark.parametrize(("method", "values", "taken"), CHAINS.values(), ids=CHAINS)
def test_a_fake_model_goes_on_from_the_one_that_the_start_leaves_or_says_that_it_does_not(
    method: str, values: dict, taken: bool | None, capsys: pytest.CaptureFixture
):
    before = ["methods={priming: teacher, equilibrium: priming, dfd: equilibrium}", "samples.rows={}"]
    ranks = [f"{name}.fake_lora={{rank: 4, alpha: 4}}" for name in ("priming", "dfd")]
    values = {"equilibrium.score.weight": 1.0, **values}
    overrides = [*before, *ranks, *(f"{key}={value}" for key, value in values.items())]
    settings, asked = load(CONFIGS / "micro.yaml", overrides, environment=False).settings, []

    class Networks(RandomNetworks):
        def adapter(self, model: str, name: str = STUDENT) -> dict[str, Tensor]:
            asked.append((model, name))
            return {}

    METHODS[method].build(settings, Networks(SMALL, torch.device("cpu"), torch.float32))
    start = METHODS[method].start_of(settings)
    assert asked == ([(start, FAKE)] if taken else [])
    assert ("is not taken over" in capsys.readouterr().err) == (taken is None)


def test_the_equilibrium_leaves_its_fake_model(tmp_path):
    build_equilibrium(score=Score(weight=1.0)).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"head.safetensors", "fake_lora.safetensors"}


def test_without_an_adversary_the_head_learns_nothing():
    assert build_equilibrium(adversarial_weight=0.0, discriminator_warmup_steps=4).turns(0) == ["generator"]


def test_a_loss_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"adversarial_weight, csds_weight and score\.weight are all 0"):
        Settings(adversarial_weight=0, csds_weight=0)


def test_a_fake_model_that_is_the_teacher_pulls_nowhere():
    phase = build_equilibrium(**KEPT)
    loss, _ = phase.loss("generator", build_batch(2), rng(), 0)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in phase.generator.parameters())


def test_the_kept_score_pulls_along_the_direction_of_phase_one():
    phase, (x, c) = build_equilibrium(**{**KEPT, "score": Score(weight=0.7, guidance_scale=3.0)}), build_batch(2)
    seeded(SEED, lambda: [torch.nn.init.normal_(p, std=0.1) for p in phase.fake.parameters()])
    xh = torch.randn(x.shape, generator=rng(1), requires_grad=True)
    clips = Clips(x, c, rng(2), SHIFT, SHIFT, 0.0)
    (0.7 * phase.score_loss(xh, clips)).backward()
    again = Clips(x, c, rng(2), SHIFT, SHIFT, 0.0)
    with torch.no_grad():
        t = again.times(phase.config.score.times)
        xh_t = add_noise(xh.detach(), again.noise(), t)
        g = vsd_direction(xh, predict_x0(phase.teacher, xh_t, t, c, 3.0), predict_x0(phase.fake, xh_t, t, c))
    torch.testing.assert_close(xh.grad, 0.7 * g / g.numel())


def test_the_kept_score_counts_with_its_weight():
    terms = {"adversarial_weight": 0.0, "csds_weight": 0.0}
    losses = [
        build_equilibrium(**terms, score=Score(weight=weight)).loss("generator", build_batch(2), rng(), 0)[0]
        for weight in (1.0, 3.0)
    ]
    torch.testing.assert_close(losses[1], 3 * losses[0])
    assert losses[0] > 0


def test_in_the_fake_model_s_turn_only_it_gets_gradient():
    phase = build_equilibrium(score=Score(weight=1.0))
    phase.loss("fake", build_batch(2), rng(), 0)[0].backward()
    assert any(p.grad is not None and p.grad.any() for p in phase.fake.parameters())
    for other in (phase.generator, phase.head, phase.ema, phase.teacher):
        assert all(p.grad is None for p in other.parameters())


def test_each_term_s_pull_is_the_norm_of_its_gradient_at_the_video():
    phase = build_equilibrium(csds_weight=7.0, adversarial_weight=0.5)
    videos: list[Tensor] = []
    phase.generate = lambda clips, make=phase.generate: videos.append(make(clips)) or videos[-1]
    loss, logs = phase.loss("generator", build_batch(2), rng(), 0)
    xh = videos[0]
    (csds,) = torch.autograd.grad(7 * logs["csds"], xh, retain_graph=True)
    (adversarial,) = torch.autograd.grad(0.5 * logs["adversarial"], xh, retain_graph=True)
    loss.backward()
    torch.testing.assert_close(logs["pull_csds"], csds.norm())
    torch.testing.assert_close(logs["pull_adversarial"], adversarial.norm())


def test_a_pull_does_not_depend_on_how_many_micro_batches_are_accumulated():
    pulls = []
    for accumulate in (1, 4):
        phase = build_equilibrium(training=Training(steps=1, accumulate=accumulate))
        loss, logs = phase.loss("generator", build_batch(2), rng(), 0)
        (loss / accumulate).backward()  # as the training loop does
        pulls.append([logs["pull_adversarial"], logs["pull_csds"]])
    torch.testing.assert_close(pulls[0], pulls[1])


def test_the_same_noise_is_on_the_clip_and_on_its_video():
    phase, (x, c) = build_equilibrium(same_noise=True), build_batch(2)
    asked, logits = [], phase.logits
    phase.logits = lambda x_t, t, c: asked.append((x_t, t)) or logits(x_t, t, c)
    phase.generate = lambda clips: clips.x  # a perfect generator: then both are the same, whatever the noise
    phase.loss("head", (x, c), rng(), 0)
    assert asked[0][0].equal(asked[1][0])


def test_a_relativistic_pair_is_a_video_and_the_clip_of_its_first_frame():
    batch = build_batch(4)
    phase = build_equilibrium(relativistic=True, same_noise=True, csds_weight=0.0, r1=R1(weight=0.0, probes=()))
    asked, logits = [], phase.logits
    phase.logits = lambda x_t, t, c: asked.append((x_t, logits(x_t, t, c))) or asked[-1][1]
    loss, logs = phase.loss("head", batch, rng(), 0)
    (_, real), (_, fake) = asked
    torch.testing.assert_close(loss, torch.nn.functional.softplus(fake - real).mean())
    assert logs["accuracy"] == (real > fake).float().mean()
    assert logs["relativistic"] == loss and "hinge" not in logs
    asked.clear()
    loss, logs = phase.loss("generator", batch, rng(), 0)
    (_, fake), (_, real) = asked
    torch.testing.assert_close(loss, torch.nn.functional.softplus(real - fake).mean())
    assert fake.requires_grad and not real.requires_grad
    asked.clear()
    phase.generate = lambda clips: clips.x  # a perfect generator: then both are the same, whatever the noise
    phase.loss("generator", batch, rng(), 0)
    assert asked[0][0].equal(asked[1][0])


@pytest.mark.parametrize("same", [True, False])
def test_a_relativistic_pair_shares_its_noise_only_where_that_is_set(same):
    phase, asked = build_equilibrium(relativistic=True, same_noise=same, csds_weight=0.0), []
    logits = phase.logits
    phase.logits = lambda x_t, t, c: asked.append(x_t) or logits(x_t, t, c)
    phase.generate = lambda clips: clips.x  # a perfect generator
    for turn in ("head", "generator"):
        asked.clear()
        phase.loss(turn, build_batch(2), rng(), 0)
        assert asked[0].equal(asked[1]) == same


@pytest.mark.parametrize(("probe", "sigma"), [("spatial", 0.01), ("temporal", 0.1), ("plain", 0.05)])
def test_the_slope_is_the_discriminator_s_gradient_along_the_probes(probe, sigma):
    phase, (x, c) = build_equilibrium(r1=R1(probes=(probe,), sigma_plain=0.05)), build_batch(256)
    direction = torch.randn(x.shape[1:], generator=rng())
    phase.logits = lambda x_t, t, c: (x_t * direction).sum(dim=(1, 2, 3, 4))  # linear: the first order is exact
    _, logs = phase.loss("head", (x, c), rng(), 0)
    alike = {"spatial": direction.sum(1), "temporal": direction.sum((2, 3)), "plain": direction}[probe]
    assert float(logs[f"slope_{probe}"]) == pytest.approx(float(alike.norm()), rel=0.15)


def test_r2_is_r1_of_the_generated_clips():
    plain = {"r1": R1(weight=0.0, generated_weight=0.0)}
    kept = {"r1": R1(weight=0.0, generated_weight=3.0)}
    batch = build_batch(2)
    (without, _), (with_r2, _) = (build_equilibrium(**r1).loss("head", batch, rng(), 0) for r1 in (plain, kept))
    assert with_r2 > without


def test_r2_probes_the_generated_clips_where_they_were_judged():
    phase = build_equilibrium(r1=R1(weight=0.0, generated_weight=3.0))
    asked, logits = [], phase.logits
    phase.logits = lambda x_t, t, c: asked.append((x_t, logits(x_t, t, c))) or asked[-1][1]
    loss, logs = phase.loss("head", build_batch(2), rng(), 0)
    _, (fake, d_fake), _, _, *probed = asked
    assert len(probed) == 2 and all((x_t - fake).abs().max() < 1 for x_t, _ in probed)
    torch.testing.assert_close(loss, logs["hinge"] + 3 * sum((d_fake - d).square().mean() for _, d in probed))


@pytest.mark.parametrize("sizes", [(2, 4, 4), (2, 4, 8), (3, 8, 4)], ids=str)
def test_convolutions_see_the_tokens_on_their_grid(sizes):
    _, c = build_batch(2)
    c = replace(c, frame_BCFHW=torch.zeros(2, 20, *sizes))
    frames, height, width = sizes[0], sizes[1] // 2, sizes[2] // 2
    head = seeded(SEED, lambda: ConvolutionHead(Head(dim=8, heads=2), 24, 1, (1, 2, 2)))
    seen = []
    head.near.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    layer = torch.randn(2, frames * height * width, 24, generator=rng())
    assert head([layer], c).shape == (2,)
    assert seen[0].shape[2:] == (frames, height, width)
    place = (1 * height + 1) * width + 0  # frame 1, row 1, column 0
    torch.testing.assert_close(seen[0][:, :, 1, 1, 0], head.layer_in[0](layer[:, place]))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["attention", "convolutions"])
def test_a_pattern_on_all_videos_is_found_before_any_generator_is_trained(form, tmp_path, accelerator):
    """The discriminator of the shipped settings: low times, early and late layers, the same noise on both."""
    head_settings = Head(form=form, dim=32, heads=4, queries=8, taps=(0, 1, 3))
    base = build_equilibrium(
        head=head_settings,
        same_noise=True,
        discriminator_times={"low": 0.02, "high": 0.5},
        discriminator={"learning_rate": 3e-3, "betas": (0.0, 0.99)},
        r1=R1(weight=0.0, probes=()),
    )
    head, taps = seeded(SEED, lambda: head_on(base.generator, head_settings))
    phase = Equilibrium(base.config, SHIFT, base.generator, base.teacher, head, taps)

    def still(size: int, seed: int) -> tuple:
        """Clips of a world that hardly moves, as most of a real one does."""
        x, c = build_batch(size, seed=seed)
        return x[:, :, :1] + 0.05 * x, c

    x, _ = build_batch(1)
    pattern = 0.5 * torch.randn(x.shape[1:], generator=rng())
    phase.generate = lambda clips: clips.x + pattern
    phase.turns = lambda step: ["head"] * 250
    phase.main = "head"
    phase.ema = make_ema(phase.roles["head"].module)
    training = base.config.training.model_copy(update={"steps": 1})
    train(phase, lambda drawn: still(8, drawn), training, 0, tmp_path, accelerator)
    _, logs = phase.loss("head", still(64, 10**6), rng(), 0)
    assert logs["accuracy"] > 0.75
