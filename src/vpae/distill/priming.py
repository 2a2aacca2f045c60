"""Stage `priming`: Phase I, stability priming by variational score distillation.

Brings the distribution of one-step videos to that of real ones before any adversary sees them. Writes `student/` (a
pipeline folder with the EMA weights), `generator.safetensors`, `fake_lora.safetensors` (`fake.safetensors` of a full
copy) and `metrics.jsonl`; of a student trained as an adapter also `student_lora.safetensors`, its EMA.
"""

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from vpae.config import Experiment, Priming
from vpae.distill.common import (
    finish,
    load_network,
    networks_of,
    noise_like,
    save_weights,
    train_phase,
)
from vpae.distill.vsd import flow_matching_loss, vsd_direction, vsd_loss
from vpae.flow import add_noise, sample_times
from vpae.models.adapters import STUDENT, Adapted, SharedBase
from vpae.models.wan import Condition, guided_velocity, predict_x0, velocity
from vpae.training.ema import make_ema
from vpae.training.loop import Role, progress_at
from vpae.training.randomness import derived_seed


class PrimingPhase:
    """Roles: generator (starts as the teacher; trained; has the EMA), and teacher + fake on one base (fake trained).

    Args:
        config, shift: settings.
        generator: a whole network, or an adapter on the shared base.
        shared: teacher and fake model.
    """

    name = "priming"
    main = "generator"

    def __init__(
        self,
        config: Priming,
        shift: float,
        generator: WanTransformer3DModel | Adapted,
        shared: SharedBase,
    ):
        self.config, self.shift, self.generator, self.shared = config, shift, generator, shared
        self.ema = make_ema(generator)
        self.networks = networks_of(generator=generator, ema=self.ema, **shared.networks)
        self.roles = {"generator": Role(generator, config.generator), "fake": Role(shared.fake, config.fake)}

    def turns(self, step: int) -> list[str]:
        """Two time scales: the fake model first follows the generator, then the generator moves once."""
        return ["fake"] * self.config.fake_steps_per_generator_step + ["generator"]

    def loss(
        self, turn: str, batch: tuple[Tensor, Condition], rng: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one turn on latents x (B, 16, F, H, W) and their condition."""
        x, c = batch
        progress = progress_at(step, self.config.training)
        t = sample_times(self.config.generator_times, self.shift, progress, len(x), rng)
        with torch.set_grad_enabled(turn == "generator"):
            xh = predict_x0(self.generator, add_noise(x, noise_like(x, rng), t), t, c)
        t_ = sample_times(self.config.score_times, self.shift, progress, len(x), rng)
        noise = noise_like(x, rng)
        xh_t = add_noise(xh.detach(), noise, t_)
        if turn == "fake":
            with self.shared.as_fake() as fake:
                return flow_matching_loss(velocity(fake, xh_t, t_, c), xh, noise), {}
        with self.shared.as_teacher() as teacher:
            v_real = guided_velocity(teacher, xh_t, t_, c, self.config.guidance_scale)
        with torch.no_grad(), self.shared.as_fake() as fake:
            v_fake = velocity(fake, xh_t, t_, c)
        t5 = t_.reshape(-1, 1, 1, 1, 1)
        g = vsd_direction(xh, xh_t - t5 * v_real, xh_t - t5 * v_fake)
        return vsd_loss(xh, g), {"vsd_direction": g.abs().mean(), **motion_monitors(xh, x)}


def motion_monitors(xh_BCFHW: Tensor, x_BCFHW: Tensor) -> dict[str, Tensor]:
    """Early signs of collapse: movement and mean of generated latents relative to real ones (1 and 0 are healthy)."""
    with torch.no_grad():
        moves, real_moves = (v.diff(dim=2).abs().mean() for v in (xh_BCFHW, x_BCFHW))
        drift = (xh_BCFHW.mean(dim=(0, 2, 3, 4)) - x_BCFHW.mean(dim=(0, 2, 3, 4))).abs().mean()
        return {"motion_ratio": moves / real_moves.clamp_min(1e-8), "colour_drift": drift}


def build(settings: Experiment, inputs: dict[str, Path], device: torch.device) -> PrimingPhase:
    """The phase at its start: generator and shared base from the teacher's weights."""
    config = settings.priming
    teacher = load_network(inputs["teacher"], config.training, device, trained=False)
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(settings.seed, "priming", "fake"))
        shared = SharedBase(teacher, config.fake_lora if config.fake_form == "lora" else "copy")
        if config.student_lora is None:
            generator = load_network(inputs["teacher"], config.training, device, trained=True)
        else:
            generator = shared.add(STUDENT, config.student_lora)
    return PrimingPhase(config, settings.teacher.shift, generator, shared)


def run(settings: Experiment, inputs: dict[str, Path], out: Path, state: Path) -> dict:
    """Train phase I; returns counts."""
    phase, metrics = train_phase(settings, "priming", inputs, state, build)
    save_weights(phase.generator, out / "generator.safetensors")
    save_weights(
        phase.shared.fake,
        out / ("fake_lora.safetensors" if settings.priming.fake_form == "lora" else "fake.safetensors"),
    )
    return finish(out, inputs["teacher"], phase.ema, settings.teacher.shift, metrics, settings.priming.training)
