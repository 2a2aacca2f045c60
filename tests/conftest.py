"""Tiny models with random weights, of the real diffusers and transformers classes, built as the stages build them."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from hypothesis import settings
from PIL import Image
from torch import Tensor

from vpae.config import Head, Lora, Optimizer, TinyEncoders, TinyTransformer, TinyVae, Training
from vpae.distill import equilibrium, priming
from vpae.distill.equilibrium import Equilibrium
from vpae.distill.priming import Priming
from vpae.experiment import load
from vpae.models.adapters import FAKE, SharedBase
from vpae.models.heads import SemanticHead
from vpae.models.wan import TEXT_TOKENS, Condition, default_taps, first_frame_mask, load_pipeline
from vpae.stages import run_stage
from vpae.teacher import encoders, flow_matching, vae

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tests")

# Of an experiment with the paper's two methods, in order.
STAGES = ("clips", "teacher", "latents", "priming", "equilibrium", "samples", "evaluation", "report")
MICRO = Path(__file__).parents[1] / "configs" / "micro.yaml"
# Fixtures that run a whole experiment or benchmark: every test that asks for one counts as slow.
SLOW_FIXTURES = {
    "test_bench": "measured",
    "test_dvc": "recorded",
    "test_end_to_end": "results",
    "test_finished": "finished",
    "test_scale": "clone",
    "test_vbench_runner": "scored",
    "test_workflow": "finished",
}
SHIFT = 3.0
FRAMES, HEIGHT, WIDTH = 5, 32, 32
LATENTS = (16, 2, 4, 4)
TEXT_DIM = IMAGE_DIM = 16
CAPTIONS = ["a red disc moves to the left", "a green square stands still", "the camera moves"]


@pytest.fixture(scope="session")
def finished_micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`results/`, in which all stages of the experiment `micro` are finished: for whoever copies it.

    The suite's processes run it once for all of them.
    """
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished-micro"
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)
        for stage in STAGES:  # nothing to do for the next process
            run_stage(load(MICRO, environment=False), stage, place / "results")
    return place / "results"


@pytest.hookimpl(tryfirst=True)  # before those that are not wanted are left out
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    for item in items:
        if SLOW_FIXTURES.get(item.path.stem) in item.fixturenames:
            item.add_marker(pytest.mark.slow)
    dear = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in dear)  # so that no process is left alone with them at the end


def seeded(seed: int, build: Callable):
    """What `build` returns when the global generator starts from `seed`; the generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def build_transformer(seed: int = 0) -> WanTransformer3DModel:
    config = TinyTransformer(heads=2, head_dim=12, layers=4, freq_dim=16)
    return seeded(seed, lambda: flow_matching.build(config, TEXT_DIM, IMAGE_DIM))


def build_vae() -> AutoencoderKLWan:
    """A VAE whose latents' statistics are not the neutral 0 and 1."""
    model = seeded(0, lambda: vae.build(TinyVae(base_dim=4, dim_mult=(1, 1, 2, 2)))).eval()
    mean, std = seeded(1, lambda: (0.5 * torch.randn(16), 0.5 + torch.rand(16)))
    model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return model


def build_batch(size: int = 2, seed: int = 0, words: tuple[int, ...] = (7, 12, 3)) -> tuple[Tensor, Condition]:
    """Random latents and their condition; captions of several lengths, zeros after their ends."""

    def draw() -> tuple[Tensor, Condition]:
        text = torch.randn(size, TEXT_TOKENS, TEXT_DIM)
        for row in range(size):
            text[row, words[row % len(words)] :] = 0
        empty = torch.zeros(TEXT_TOKENS, TEXT_DIM)
        empty[0] = torch.randn(TEXT_DIM)
        frame = torch.cat([first_frame_mask(size, *LATENTS[1:]), torch.randn(size, *LATENTS)], dim=1)
        return torch.randn(size, *LATENTS), Condition(frame, torch.randn(size, 5, IMAGE_DIM), text, empty)

    return seeded(seed, draw)


def build_head(seed: int = 0, taps: int = 3, **config) -> SemanticHead:
    settings = Head(**{"dim": 16, "heads": 2, "queries": 2, **config})
    return seeded(seed, lambda: SemanticHead(settings, 24, taps, TEXT_DIM, IMAGE_DIM))


def build_priming(seed: int = 0, **config) -> Priming:
    """Phase I on the teacher `build_transformer(0)`; `seed` is that of the adapter."""
    settings = priming.Settings(
        **{
            "training": Training(steps=3, batch_size=2, ema_decay=0.5, checkpoint_every=1),
            "generator": Optimizer(learning_rate=1e-3),
            "fake": Optimizer(learning_rate=1e-2),
            "fake_lora": Lora(rank=4, alpha=4),
            "fake_steps_per_generator_step": 2,
            "guidance_scale": 3.0,
            **config,
        }
    )
    shared = SharedBase(build_transformer())
    fake = seeded(seed, lambda: shared.add(FAKE, settings.fake_lora))
    return Priming(settings, SHIFT, build_transformer(), shared.network(None), fake)


def build_equilibrium(seed: int = 0, **config) -> Equilibrium:
    """Phase II with another generator than the teacher, as after priming; `seed` is that of generator and head."""
    settings = equilibrium.Settings(
        **{
            "training": Training(steps=3, batch_size=2, ema_decay=0.5, checkpoint_every=1),
            "generator": Optimizer(learning_rate=1e-3),
            "discriminator": Optimizer(learning_rate=1e-3),
            **config,
        }
    )
    head = build_head(seed, semantics=settings.head.semantics)
    teacher, fake = build_transformer(), None
    if settings.score.weight > 0:
        shared = SharedBase(teacher)
        fake = seeded(seed, lambda: shared.add(FAKE, Lora(rank=4, alpha=4)))
        teacher = shared.network(None)
    backbone = build_transformer() if settings.backbone == "copy" else None
    return Equilibrium(settings, SHIFT, build_transformer(seed + 1), teacher, head, default_taps(4), fake, backbone)


def picture(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """A first frame of noise."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def one_step_by_diffusers(pipeline: WanImageToVideoPipeline, seed: int, output_type: str = "np") -> np.ndarray | Tensor:
    """What the pipeline's own call makes of `picture()` in one step: float frames (T, H, W, 3) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        image=picture(),
        prompt=CAPTIONS[0],
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type=output_type,
    ).frames[0]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny `WanImageToVideoPipeline`: 32 x 32 pixels, 5 frames."""
    folder = tmp_path_factory.mktemp("pipeline") / "teacher"
    config = TinyEncoders(text_dim=TEXT_DIM, text_layers=1, image_dim=IMAGE_DIM, image_layers=2, image_patch=16)
    tokenizer = encoders.build_tokenizer(CAPTIONS, config.vocabulary)
    image_encoder, processor = seeded(2, lambda: encoders.build_image_encoder(config, HEIGHT))
    WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=seeded(3, lambda: encoders.build_text_encoder(config, len(tokenizer))).eval(),
        vae=build_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        image_processor=processor,
        image_encoder=image_encoder.eval(),
        transformer=build_transformer().eval(),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(teacher: Path) -> WanImageToVideoPipeline:
    return load_pipeline(teacher)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)
