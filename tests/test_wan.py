"""Our view of Wan against diffusers' own pipeline, the features of inner blocks, and the semantic head."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanImageToVideoPipeline
from PIL import Image
from torch import Tensor, nn

from conftest import (
    CAPTIONS,
    FRAMES,
    HEIGHT,
    LATENTS,
    SHIFT,
    WIDTH,
    build_batch,
    build_head,
    build_transformer,
    one_step_by_diffusers,
)
from vpae import flow, sampling
from vpae.config import Sampler
from vpae.data.encoding import Encoders, pad_text
from vpae.data.index import Entry
from vpae.distill.student import save_student, student_scheduler
from vpae.models.wan import (
    Condition,
    default_taps,
    encode_condition,
    features,
    first_frame_mask,
    load_pipeline,
    text_tokens_for,
    velocity,
)
from vpae.sampling import single
from vpae.sampling.stage import make_suite

SEED = 11
CLOSE = {"atol": 1e-5, "rtol": 0}


def picture(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's folder, with other weights than the teacher's."""
    folder = tmp_path_factory.mktemp("student") / "student"
    save_student(teacher, build_transformer(5), SHIFT, folder)
    return folder


def select(c: Condition, rows: list[int]) -> Condition:
    return replace(c, frame_BCFHW=c.frame_BCFHW[rows], image_BND=c.image_BND[rows], text_BLD=c.text_BLD[rows])


# Conditioning.


@pytest.mark.parametrize(("height", "width", "frames"), [(32, 32, 5), (32, 48, 9), (48, 32, 1)])
def test_the_condition_s_channels_are_diffusers_own(pipeline, height, width, frames):
    pixels = pipeline.video_processor.preprocess(Image.fromarray(picture(height, width)), height=height, width=width)
    with torch.no_grad():
        _, theirs = pipeline.prepare_latents(
            pixels, 1, height=height, width=width, num_frames=frames, dtype=torch.float32, device="cpu"
        )
        ours = encode_condition(pipeline.vae, pixels, frames)
    ours = torch.cat([first_frame_mask(1, *ours.shape[2:]), ours], dim=1)
    assert ours.shape[1] == 20 and ours.equal(theirs)


def test_uint8_frames_become_the_condition_that_diffusers_makes_of_an_image(pipeline):
    frame = picture()
    pixels = pipeline.video_processor.preprocess(Image.fromarray(frame), height=HEIGHT, width=WIDTH)
    with torch.no_grad():
        theirs = encode_condition(pipeline.vae, pixels, FRAMES)
    assert Encoders(pipeline).conditions([frame], FRAMES).equal(theirs)


@pytest.mark.parametrize("caption", [*CAPTIONS, "", "  Zwölf  &amp; <b>größer</b>\n", "word " * 600])
def test_text_embeddings_are_diffusers_own(pipeline, caption):
    [ours] = Encoders(pipeline).texts([caption])
    with torch.no_grad():
        theirs, negative = pipeline.encode_prompt(caption, negative_prompt=caption, max_sequence_length=512)
    assert pad_text(ours)[None].equal(theirs) and theirs.equal(negative)


def test_no_text_embedding_is_lost_when_diffusers_cleans_a_prompt_into_more_tokens(teacher):
    pipeline = load_pipeline(teacher, transformer=None, vae=None, image_encoder=None)
    pipeline.tokenizer.add_tokens(["&hearts;"])  # one token as written, three once it is the heart it stands for
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    [ours] = Encoders(pipeline).texts(["&hearts;"])
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt("&hearts;", do_classifier_free_guidance=False, max_sequence_length=512)
    assert pad_text(ours)[None].equal(theirs)


def test_a_caption_s_embedding_does_not_depend_on_the_captions_beside_it(pipeline):
    together = Encoders(pipeline).texts(CAPTIONS)
    for caption, text in zip(CAPTIONS, together, strict=True):
        torch.testing.assert_close(Encoders(pipeline).texts([caption])[0], text, **CLOSE)


def test_thousands_of_captions_are_not_encoded_at_once(pipeline, monkeypatch):
    """Attention among 512 tokens, times 8,000 captions, took more memory than the machine has."""
    batches = []

    def encode_prompt(captions, **options):
        batches.append(len(captions))
        return type(pipeline).encode_prompt(pipeline, captions, **options)

    monkeypatch.setattr(pipeline, "encode_prompt", encode_prompt, raising=False)
    monkeypatch.setattr("vpae.data.encoding.TEXTS_AT_ONCE", 2)
    captions = [*CAPTIONS, *CAPTIONS, "one more"]
    found = Encoders(pipeline).texts(captions)
    assert max(batches) == 2 and sum(batches) == len(captions)
    monkeypatch.undo()
    for caption, text in zip(captions, found, strict=True):
        torch.testing.assert_close(text, Encoders(pipeline).texts([caption])[0], **CLOSE)
        assert text.untyped_storage().nbytes() == text.nbytes, "a view keeps 512 tokens of padding alive"


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 48)])
def test_image_embeddings_are_diffusers_own(pipeline, height, width):
    frames = [picture(height, width, seed) for seed in range(2)]
    ours = Encoders(pipeline).images(frames)
    with torch.no_grad():
        theirs = torch.cat([pipeline.encode_image(Image.fromarray(f), "cpu") for f in frames])
    torch.testing.assert_close(ours, theirs, **CLOSE)


# Sampling.


def test_a_student_s_one_step_video_is_what_plain_diffusers_makes_of_its_folder(student, monkeypatch):
    theirs = WanImageToVideoPipeline.from_pretrained(student)
    image, prompt = Image.fromarray(picture()), CAPTIONS[0]
    decoded, decode = [], single.decode_latents
    monkeypatch.setattr(single, "decode_latents", lambda vae, x: decoded.append(x) or decode(vae, x))
    ours = single.animate(load_pipeline(student), image, prompt, 1, 1.0, SEED, FRAMES)
    torch.testing.assert_close(decoded[0][0], one_step_by_diffusers(theirs, SEED, "latent"), **CLOSE)
    assert ours.shape == (FRAMES, HEIGHT, WIDTH, 3) and ours.dtype == np.uint8
    frames = np.stack([np.asarray(f) for f in one_step_by_diffusers(theirs, SEED, "pil")]).astype(int)
    assert np.abs(ours - frames).max() <= 1 and (ours == frames).mean() > 0.999
    assert len(np.unique(ours)) > 20  # the comparison is not one of blank frames


def test_a_student_s_folder_holds_the_student_and_leaves_the_teacher_s_alone(teacher, student):
    loaded = load_pipeline(student)
    for name, weight in build_transformer(5).state_dict().items():
        assert loaded.transformer.state_dict()[name].equal(weight)
    assert loaded.scheduler.config.stochastic_sampling and loaded.scheduler.config.shift == SHIFT
    untouched = load_pipeline(teacher)
    assert not untouched.scheduler.config.stochastic_sampling
    for name, weight in build_transformer(0).state_dict().items():
        assert untouched.transformer.state_dict()[name].equal(weight)


@pytest.fixture(scope="module")
def unipc_teacher(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with the scheduler that the released Wan2.1 pipelines have."""
    pipeline, folder = load_pipeline(teacher), tmp_path_factory.mktemp("unipc") / "teacher"
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )
    pipeline.save_pretrained(folder)
    return folder


def test_a_student_has_the_one_step_scheduler_whatever_the_teacher_has(unipc_teacher, tmp_path):
    save_student(unipc_teacher, build_transformer(5), SHIFT, tmp_path / "student")
    scheduler = WanImageToVideoPipeline.from_pretrained(tmp_path / "student").scheduler
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and scheduler.config.stochastic_sampling
    assert isinstance(load_pipeline(unipc_teacher).scheduler, UniPCMultistepScheduler)


def test_a_teacher_is_sampled_at_its_own_shift_whatever_its_scheduler_calls_it(teacher, unipc_teacher):
    first, second = (
        single.animate(load_pipeline(folder), Image.fromarray(picture()), CAPTIONS[0], 2, 1.0, SEED, FRAMES)
        for folder in (teacher, unipc_teacher)
    )
    assert (first == second).all()


@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (4, 3.0)])
def test_euler_is_diffusers_scheduler_on_the_same_sigmas(steps, guidance):
    model, (noise, c) = build_transformer(), build_batch(2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1].tolist())
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            inputs = torch.cat([x, c.frame_BCFHW], dim=1)
            conditional, unconditional = (
                model(inputs, t.expand(2), text, c.image_BND).sample
                for text in (c.text_BLD, c.empty_text_LD.expand(2, -1, -1))
            )
            v = unconditional + guidance * (conditional - unconditional)
            x = scheduler.step(v, t, x).prev_sample
        torch.testing.assert_close(sampling.euler(model, noise, c, steps, SHIFT, guidance), x, **CLOSE)


@torch.no_grad()
def test_few_step_sampling_is_diffusers_stochastic_scheduler_on_the_same_sigmas():
    model, (_, c) = build_transformer(), build_batch(1)
    scheduler, rng = student_scheduler(SHIFT), torch.Generator().manual_seed(SEED)
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    x = torch.randn((1, *LATENTS), generator=rng)
    for t in scheduler.timesteps:
        v = model(torch.cat([x, c.frame_BCFHW], dim=1), t.expand(1), c.text_BLD, c.image_BND).sample
        x = scheduler.step(v, t, x, generator=rng).prev_sample
    ours = sampling.draw(model, Sampler(model="equilibrium", steps=4), SHIFT, c, LATENTS, [SEED])
    torch.testing.assert_close(ours, x, **CLOSE)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_the_scheduler_set_as_the_model_card_says_has_our_times(steps: int):
    scheduler = student_scheduler(SHIFT)
    scheduler.sigma_min = 1 / steps
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(scheduler.sigmas.double(), flow.schedule(steps, SHIFT), atol=1e-6, rtol=0)


def test_a_student_is_sampled_at_the_times_of_its_own_scheduler_and_the_teacher_at_the_experiment_s(tmp_path, teacher):
    save_student(teacher, build_transformer(5), 0.3, tmp_path / "student")
    settings, inputs = SimpleNamespace(teacher=SimpleNamespace(shift=SHIFT)), {"teacher": teacher, "priming": tmp_path}
    found = {
        model: sampling.row_shift(settings, inputs, Sampler(model=model, steps=2)) for model in ("teacher", "priming")
    }
    assert found == {"teacher": SHIFT, "priming": 0.3}
    own = Sampler(model="priming", steps=2, shift=0.1)  # to be tried without training again
    assert sampling.row_shift(settings, inputs, own) == 0.1


@torch.no_grad()
def test_with_one_step_jumping_and_integrating_are_the_same():
    model, (noise, c) = build_transformer(), build_batch(2)
    rngs = [torch.Generator().manual_seed(i) for i in range(2)]
    assert sampling.few_step(model, noise, c, 1, SHIFT, rngs).equal(sampling.euler(model, noise, c, 1, SHIFT))


@torch.no_grad()
@pytest.mark.parametrize(
    "row", [Sampler(model="teacher", steps=2, guidance_scale=3), Sampler(model="priming", steps=4)]
)
def test_a_video_does_not_depend_on_its_batch(row):
    model, (_, c), seeds = build_transformer(), build_batch(3), [3, 4, 5]
    together = sampling.draw(model, row, SHIFT, c, LATENTS, seeds)
    for rows in ([0], [2, 1]):
        alone = sampling.draw(model, row, SHIFT, select(c, rows), LATENTS, [seeds[i] for i in rows])
        torch.testing.assert_close(alone, together[rows], **CLOSE)
    assert (together[0] - together[1]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("model", ["teacher", "priming"])
def test_the_guidance_of_a_row_is_that_of_its_sampler(model):
    network, (_, c), row = build_transformer(), build_batch(1), Sampler(model=model, steps=2, guidance_scale=3)
    rng = torch.Generator().manual_seed(SEED)
    noise = sampling.noise_of([rng], LATENTS, "cpu")
    if model == "teacher":
        wanted = sampling.euler(network, noise, c, 2, SHIFT, 3)
    else:
        wanted = sampling.few_step(network, noise, c, 2, SHIFT, [rng], 3)
    found = [sampling.draw(network, one, SHIFT, c, LATENTS, [SEED]) for one in (row, Sampler(model=model, steps=2))]
    assert found[0].equal(wanted) and not found[1].equal(wanted)


def test_the_noise_of_a_video_follows_from_seed_prompt_and_place_among_equal_ones():
    def seeds(seed: int, *captions: str) -> dict[tuple[str, int], int]:
        entries = [Entry(f"clip-{i}", "held_out", caption, "", "", 0, 0, "") for i, caption in enumerate(captions)]
        suite = make_suite(SimpleNamespace(entries=entries), len(entries), seed)
        return {(item["prompt"], item["index"]): item["seed"] for item in suite}

    found = seeds(0, "a cat", "a dog", "a cat")
    assert list(found) == [("a cat", 0), ("a dog", 0), ("a cat", 1)] and len(set(found.values())) == 3
    assert seeds(0, "a dog", "a cat", "a cat", "a bird").items() >= found.items()
    assert not set(seeds(1, "a cat", "a dog", "a cat").values()) & set(found.values())


# Features.


@torch.no_grad()
def test_features_are_what_the_named_blocks_put_out():
    model, (x, c), t = build_transformer(), build_batch(2), torch.tensor([0.3, 0.8])
    inputs = torch.cat([x, c.frame_BCFHW], dim=1)
    hidden = model.patch_embedding(inputs).flatten(2).transpose(1, 2)
    _, time, text, image = model.condition_embedder(1000 * t, c.text_BLD, c.image_BND)
    outputs = []
    for block in model.blocks:
        hidden = block(hidden, torch.cat([image, text], dim=1), time.unflatten(1, (6, -1)), model.rope(inputs))
        outputs.append(hidden)
    found = features(model, x, t, c, (3, 1))
    assert [f.shape for f in found] == [(2, 8, 24)] * 2
    assert found[0].equal(outputs[3]) and found[1].equal(outputs[1])
    assert not any(block._forward_hooks for block in model.blocks)


def test_the_default_taps_are_spread_over_the_depth():
    assert default_taps(30) == (15, 22, 29) and default_taps(40) == (13, 26, 39) and default_taps(4) == (2, 3, 3)


def test_the_gradient_flows_through_a_frozen_backbone_to_its_input_alone():
    def gradient(model: nn.Module) -> Tensor:
        x, c = build_batch(2)
        sum(
            f.square().mean() for f in features(model, x.requires_grad_(), torch.tensor([0.3, 0.8]), c, (1, 3))
        ).backward()
        return x.grad

    frozen = build_transformer().requires_grad_(False)
    found = gradient(frozen)
    assert found.abs().min() > 0
    # Not bit for bit: without gradients of weights, backward takes other kernels on some processors.
    torch.testing.assert_close(found, gradient(build_transformer()), atol=1e-7, rtol=1e-4)
    assert all(p.grad is None for p in frozen.parameters())


# The semantic head.


@pytest.mark.parametrize("tokens", [13, 32, 511])
def test_captions_padded_to_fewer_tokens_give_the_same_velocity_and_gradients(tokens):
    model, (x, c) = build_transformer(), build_batch(3)
    shorter = replace(c, text_BLD=c.text_BLD[:, :tokens], empty_text_LD=c.empty_text_LD[:tokens])
    results = []
    for condition in (c, shorter, c):  # and the full length again after the short one
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        v = velocity(model, leaf, torch.tensor([0.2, 0.7, 1.0]), condition)
        (v**2).sum().backward()
        results.append((v.detach(), leaf.grad, {k: p.grad.clone() for k, p in model.named_parameters()}))
    full, short, again = results
    torch.testing.assert_close(short[:2], full[:2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(short[2], full[2], atol=1e-4, rtol=1e-3)
    assert again[0].equal(full[0])
    assert not full[0].equal(velocity(model, x, torch.tensor([0.2, 0.7, 1.0]), c.without_text()))


def test_only_short_captions_are_padded_to_fewer_tokens():
    assert text_tokens_for(31) == 32  # the last must be padding
    assert text_tokens_for(32) == text_tokens_for(512) == 512


@pytest.fixture
def layers() -> list[Tensor]:
    """Three layers' tokens of three videos."""
    return list(torch.randn(3, 3, 8, 24, generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def test_the_head_gives_one_logit_a_video(layers):
    logits = build_head()(layers, build_batch(3)[1])
    assert logits.shape == (3,) and logits.dtype == torch.float32 and len(logits.unique()) == 3


@torch.no_grad()
@pytest.mark.parametrize("length", [12, 13, 100])
def test_the_head_ignores_the_zeros_after_a_caption(layers, length):
    head, (_, c) = build_head(), build_batch(3)
    shorter = replace(c, text_BLD=c.text_BLD[:, :length])
    torch.testing.assert_close(head(layers, shorter), head(layers, c), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("semantics", [True, False])
@pytest.mark.parametrize("field", ["text_BLD", "image_BND"])
def test_the_head_sees_text_and_image_only_with_semantics(layers, semantics, field):
    head, (_, c) = build_head(semantics=semantics), build_batch(3)
    other = replace(c, **{field: getattr(c, field).flip(0)})
    change = (head(layers, other) - head(layers, c)).abs()
    assert change[[0, 2]].min() > 1e-5 if semantics else (change == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("layer", range(3))
def test_the_head_sees_every_tapped_layer(layers, layer):
    head, (_, c) = build_head(), build_batch(3)
    before = head(layers, c)
    layers[layer] = layers[layer].flip(0)
    assert (head(layers, c) - before).abs()[[0, 2]].min() > 1e-5


@torch.no_grad()
def test_what_image_and_text_say_is_added_to_the_head_s_own_queries(layers):
    head, (_, c) = build_head(), build_batch(3)
    for p in head.self_attention.out_proj.parameters():
        p.zero_()  # then nothing is said
    before = head(layers, c)
    head.queries_QD.copy_(head.queries_QD.flip(-1))
    assert (head(layers, c) - before).abs().min() > 1e-5


@torch.no_grad()
def test_the_order_of_the_batch_does_not_matter_to_the_head(layers):
    head, (_, c), order = build_head(), build_batch(3), [2, 0, 1]
    torch.testing.assert_close(
        head([layer[order] for layer in layers], select(c, order)), head(layers, c)[order], **CLOSE
    )
