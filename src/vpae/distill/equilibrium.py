"""Stage `equilibrium`: Phase II, unified adversarial equilibrium.

The one-step generator, primed, against a discriminator whose backbone is the generator's own EMA. Writes `student/`
(the pipeline folder of the result, with EMA weights and a model card), `head.safetensors`, `metrics.jsonl` and, of a
student trained as an adapter, `student_lora.safetensors`.
"""

import copy
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from vpae.config import Equilibrium, Experiment
from vpae.distill.adversarial import discriminator_hinge, generator_adversarial
from vpae.distill.common import (
    STUDENT_LORA,
    finish,
    load_network,
    networks_of,
    noise_like,
    save_weights,
    train_phase,
)
from vpae.distill.csds import csds_loss
from vpae.distill.priming import motion_monitors
from vpae.distill.str1 import spatial_perturbation, str1_penalty, temporal_perturbation
from vpae.export.card import stage_provenance, write_card
from vpae.flow import add_noise, sample_times
from vpae.models.adapters import STUDENT, Adapted, SharedBase
from vpae.models.heads import SemanticHead
from vpae.models.wan import Condition, default_taps, features, predict_x0
from vpae.training.ema import make_ema
from vpae.training.loop import Role, progress_at
from vpae.training.precision import finer_autocast
from vpae.training.randomness import derived_seed
from vpae.training.sharding import whole_sequence


class EquilibriumPhase:
    """Roles: generator (trained; has the EMA), head (trained), EMA = discriminator's backbone, teacher (frozen).

    Args:
        config, shift: settings.
        generator, teacher: whole networks, or an adapter and the base it is on.
        head: the discriminator's.
        taps: blocks whose outputs it sees.
    """

    name = "equilibrium"
    main = "generator"

    def __init__(
        self,
        config: Equilibrium,
        shift: float,
        generator: WanTransformer3DModel | Adapted,
        teacher: WanTransformer3DModel | Adapted,
        head: SemanticHead,
        taps: tuple[int, ...],
    ):
        self.config, self.shift, self.taps = config, shift, taps
        self.generator, self.teacher, self.head = generator, teacher.requires_grad_(False), head
        self.ema = make_ema(generator)
        self.networks = networks_of(generator=generator, ema=self.ema, teacher=teacher)
        if config.backbone == "copy":
            self.backbone = copy.deepcopy(teacher).float().requires_grad_(True)
            self.networks |= networks_of(backbone=self.backbone)
            discriminator = nn.ModuleDict({"head": head, "backbone": self.backbone})
        else:
            self.backbone = self.ema if config.backbone == "ema" else teacher
            discriminator = head
        self.roles = {"generator": Role(generator, config.generator), "head": Role(discriminator, config.discriminator)}

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
        """D(x_t): (B,). A backbone that is no copy of its own gets no gradient for its weights; its input may."""
        layers = whole_sequence(self.backbone, features(self.backbone, xt_BCFHW, t_B, c, self.taps))
        # Logits that are compared with each other's perturbations must not be rounded to bf16.
        with torch.autocast(xt_BCFHW.device.type, enabled=False):
            return self.head(layers, c)

    def _head_loss(
        self, x_t: Tensor, xh_t: Tensor, t: Tensor, c: Condition, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r1 = self.config.r1
        # The penalty is to measure the probes and not the rounding of the backbone's activations.
        with nullcontext() if self.config.backbone == "copy" else finer_autocast(x_t.device.type):
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
    teacher = load_network(inputs["teacher"], config.training, device, trained=False)
    if config.student_lora is None:
        generator = load_network(inputs["priming"] / "student", config.training, device, trained=True)
    else:
        shared = SharedBase(teacher)
        generator, teacher = shared.add(STUDENT, config.student_lora), shared.network(None)
        generator.start_from(load_file(inputs["priming"] / STUDENT_LORA))
    wan = generator.config
    taps = config.head.taps or default_taps(wan.num_layers)
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(settings.seed, "equilibrium", "head"))
        width = wan.num_attention_heads * wan.attention_head_dim
        head = SemanticHead(config.head, width, len(taps), wan.text_dim, wan.image_dim).to(device)
    return EquilibriumPhase(config, settings.teacher.shift, generator, teacher, head, taps)


def run(settings: Experiment, inputs: dict[str, Path], out: Path, state: Path) -> dict:
    """Train phase II; returns counts."""
    phase, metrics = train_phase(settings, "equilibrium", inputs, state, build)
    save_weights(phase.head, out / "head.safetensors")
    counts = finish(out, inputs["teacher"], phase.ema, settings.teacher.shift, metrics, settings.equilibrium.training)
    if (out / "student").is_dir():  # in the first process
        write_card(out / "student", stage_provenance(inputs), settings.model_dump(mode="json"))
    return counts
