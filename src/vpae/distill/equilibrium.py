"""Stage `equilibrium`: Phase II, unified adversarial equilibrium.

The one-step generator, primed, against a discriminator whose backbone is the generator's own EMA. Writes `student/`
(the pipeline folder of the result, with EMA weights), `head.safetensors` and `metrics.jsonl`.
"""

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from vpae.config import Equilibrium, Experiment
from vpae.distill.adversarial import discriminator_hinge, generator_adversarial
from vpae.distill.common import accelerator_for, batches_of, finish, noise_like
from vpae.distill.csds import csds_loss
from vpae.distill.priming import motion_monitors
from vpae.distill.str1 import spatial_perturbation, str1_penalty, temporal_perturbation
from vpae.flow import add_noise, sample_times
from vpae.models.heads import SemanticHead
from vpae.models.wan import Condition, default_taps, features, load_transformer, predict_x0
from vpae.training.ema import make_ema
from vpae.training.loop import Role, progress_at, train
from vpae.training.randomness import derived_seed


class EquilibriumPhase:
    """Roles: generator (trained; has the EMA), head (trained), EMA = discriminator's backbone, teacher (frozen)."""

    name = "equilibrium"
    main = "generator"

    def __init__(
        self,
        config: Equilibrium,
        shift: float,
        generator: WanTransformer3DModel,
        teacher: WanTransformer3DModel,
        head: SemanticHead,
        taps: tuple[int, ...],
    ):
        self.config, self.shift, self.taps = config, shift, taps
        self.generator, self.teacher, self.head = generator, teacher.requires_grad_(False), head
        self.roles = {"generator": Role(generator, config.generator), "head": Role(head, config.discriminator)}
        self.ema = make_ema(generator)
        self.backbone = self.ema if config.backbone == "ema" else self.teacher

    def turns(self, step: int) -> list[str]:
        """The head learns first; then the generator moves once."""
        warmup = self.config.discriminator_warmup_steps if step == 0 else 0
        return ["head"] * (warmup + self.config.discriminator_steps_per_generator_step) + ["generator"]

    def loss(
        self, turn: str, batch: tuple[Tensor, Condition], rng: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one turn on latents x (B, 16, F, H, W) and their condition."""
        x, c = batch
        progress = progress_at(step, self.config.training)
        one = torch.ones(len(x), device=x.device)
        with torch.set_grad_enabled(turn == "generator"):
            xh = predict_x0(self.generator, noise_like(x, rng), one, c)  # one step from pure noise
        t = sample_times(self.config.discriminator_times, self.shift, progress, len(x), rng)
        xh_t = add_noise(xh, noise_like(x, rng), t)
        if turn == "head":
            return self._head_loss(add_noise(x, noise_like(x, rng), t), xh_t, t, c, rng)
        return self._generator_loss(x, xh, xh_t, t, c, progress, rng)

    def logits(self, xt_BCFHW: Tensor, t_B: Tensor, c: Condition) -> Tensor:
        """D(x_t): (B,). The backbone's weights get no gradient, its input may."""
        return self.head(features(self.backbone, xt_BCFHW, t_B, c, self.taps), c)

    def _head_loss(
        self, x_t: Tensor, xh_t: Tensor, t: Tensor, c: Condition, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r1 = self.config.r1
        real, fake = self.logits(x_t, t, c), self.logits(xh_t, t, c)
        spatial = self.logits(x_t + spatial_perturbation(x_t, r1.sigma_spatial, rng), t, c)
        temporal = self.logits(x_t + temporal_perturbation(x_t, r1.sigma_temporal, rng), t, c)
        hinge, penalty = discriminator_hinge(real, fake), str1_penalty(real, spatial, temporal)
        logs = {
            "hinge": hinge,
            "str1": penalty,
            "logit_real": real.mean(),
            "logit_fake": fake.mean(),
            "logit_gap": real.mean() - fake.mean(),
            "accuracy": 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean()),
        }
        return hinge + r1.weight * penalty, logs

    def _generator_loss(
        self, x: Tensor, xh: Tensor, xh_t: Tensor, t: Tensor, c: Condition, progress: float, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        t_ = sample_times(config.csds_times, self.shift, progress, len(x), rng)
        with torch.no_grad():
            teacher_x0 = predict_x0(
                self.teacher, add_noise(xh.detach(), noise_like(x, rng), t_), t_, c, config.csds_guidance_scale
            )
        csds = csds_loss(xh, teacher_x0)
        loss, logs = config.csds_weight * csds, {"csds": csds, **motion_monitors(xh, x)}
        if config.adversarial_weight > 0:
            adversarial = generator_adversarial(self.logits(xh_t, t, c), config.g_loss)
            loss = loss + config.adversarial_weight * adversarial
            logs["adversarial"] = adversarial
        return loss, logs


def build(settings: Experiment, inputs: dict[str, Path], device: torch.device) -> EquilibriumPhase:
    """The phase at its start: the primed generator (its EMA weights), the teacher, and an untrained head."""
    config = settings.equilibrium
    generator = load_transformer(inputs["priming"] / "student").to(device)
    teacher = load_transformer(inputs["teacher"]).to(device)
    wan = generator.config
    taps = config.head.taps or default_taps(wan.num_layers)
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(settings.seed, "equilibrium", "head"))
        width = wan.num_attention_heads * wan.attention_head_dim
        head = SemanticHead(config.head, width, len(taps), wan.text_dim, wan.image_dim).to(device)
    return EquilibriumPhase(config, settings.teacher.shift, generator, teacher, head, taps)


def run(settings: Experiment, inputs: dict[str, Path], out: Path, state: Path) -> dict:
    """Train phase II; returns counts."""
    training = settings.equilibrium.training
    accelerator = accelerator_for(training)
    phase = build(settings, inputs, accelerator.device)
    batches = batches_of(inputs["latents"], training, settings.seed, "equilibrium", accelerator)
    metrics = train(phase, batches, training, settings.seed, state, accelerator)
    save_file({k: v.contiguous() for k, v in phase.head.state_dict().items()}, out / "head.safetensors")
    return finish(out, inputs["teacher"], phase.ema, settings.teacher.shift, metrics, training)
