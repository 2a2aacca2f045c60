"""Stage `teacher`: writes a complete diffusers `WanImageToVideoPipeline` folder.

A tiny teacher is trained in three runs of the one training loop: VAE, encoders, transformer. A folder or hub id is
checked and linked, never trained; LoRAs may be merged into its transformer.
"""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from vpae.artifacts import ArtifactError, is_kept, kept, link_tree, write_json
from vpae.config import Experiment, Teacher, Training
from vpae.data.encoding import Encoders, pad_text, to_signed
from vpae.data.manifest import Clip, read_manifest
from vpae.experiment import ConfigError
from vpae.models.formats import stored_dtype, stored_weights
from vpae.models.loras import merge_loras, read_loras
from vpae.models.wan import (
    GEOMETRY,
    TEXT_TOKENS,
    Condition,
    first_frame_mask,
    forget_origin,
    load_pipeline,
    load_transformer,
    text_tokens_for,
)
from vpae.preemption import Interruption
from vpae.progress import track
from vpae.randomness import Shuffled, derived_seed
from vpae.teacher import encoders, flow_matching, vae
from vpae.teacher.folder import (  # noqa: F401, the stage's external inputs
    NETWORKS,
    checked,
    external_inputs,
    shift_of,
    variant_of,
)
from vpae.training.loop import train


def run(settings: Experiment, inputs: dict[str, Path], out: Path, state: Path) -> dict:
    """Make the pipeline folder; returns parameter counts."""
    teacher = settings.teacher
    write_json(out / GEOMETRY, settings.geometry.model_dump())
    if teacher.source == "train":
        return _train(settings, inputs["clips"], out, state)
    if teacher.source == "hub":
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(teacher.path, revision=teacher.revision))
        except Exception as error:  # of the hub, of the network, of the cache: each library has its own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ArtifactError(
                f"teacher.path = {teacher.path}, revision {teacher.revision}: {reason}; correct the two keys, run "
                "`hf auth login` if it is not open to all, or bring the folder and name it"
            ) from error
    else:
        folder = Path(teacher.path)
    # Nobody edits the hub's cache, whose files are named by their content.
    changed = ("transformer",) if teacher.loras else ()
    link_tree(checked(folder), out, skip=(GEOMETRY, *changed), foreign=teacher.source == "folder")
    if (has := shift_of(folder)) not in (None, teacher.shift):
        print(
            f"vpae: teacher.shift = {teacher.shift:g}, and the scheduler of {folder} has {has:g}: the former shifts "
            "all times. Wan2.1 has 3 at 480p and 5 at 720p",
            file=sys.stderr,
        )
    if teacher.loras:
        loras = read_loras(teacher.loras, folder)
        transformer = load_transformer(folder, stored_dtype(stored_weights(folder / "transformer")))
        merge_loras(transformer, loras)
        transformer.save_pretrained(out / "transformer", variant=variant_of(folder))
        forget_origin(out / "transformer")
    return {"bytes": sum(f.stat().st_size for f in out.rglob("*") if f.is_file())}


def _check_built_as_set(pipeline: WanImageToVideoPipeline, config: Teacher) -> None:
    """Refuse settings of the network or its shift that training further cannot change."""
    found = pipeline.transformer.config
    with torch.device("meta"):
        wanted = flow_matching.build(config.transformer, found.text_dim, found.image_dim).config
    names = {"heads": "num_attention_heads", "head_dim": "attention_head_dim", "layers": "num_layers"}
    names |= {"ffn_multiple": "ffn_dim", "freq_dim": "freq_dim"}
    pairs = {"teacher.shift": (config.shift, pipeline.scheduler.config.shift)}
    pairs |= {f"teacher.transformer.{key}": (wanted[name], found[name]) for key, name in names.items()}
    other = [f"{key} makes {ours}, it has {theirs}" for key, (ours, theirs) in pairs.items() if ours != theirs]
    if other:
        raise ConfigError(
            f"teacher.start = {config.start} was built with other settings, which training further cannot change: "
            f"{'; '.join(other)}. Set them as they were, or train anew without teacher.start"
        )


def _train(settings: Experiment, clips_folder: Path, out: Path, state: Path) -> dict:
    config, geometry = settings.teacher, settings.geometry
    accelerator = Accelerator(mixed_precision=config.transformer.training.mixed_precision)
    if config.start:
        pipeline = load_pipeline(checked(Path(config.start)), torch.float32).to(accelerator.device)
        _check_built_as_set(pipeline, config)
    clips = read_manifest(clips_folder, "train")
    frames_NTHW3 = np.stack([c.frames(geometry, clips_folder) for c in track(clips, len(clips), "teacher/decode")])
    if not config.start:
        pipeline = _untrained(settings, clips, frames_NTHW3, state, accelerator)
    elif "text_encoder" in config.further:
        reader = _seeded(settings, "reader", lambda: encoders.Reader(pipeline.text_encoder)).to(accelerator.device)
        words = encoders.TextPhase(config.encoders, reader)
        captions = _captions(clips, pipeline.tokenizer, settings)
        _fit(words, captions, config.encoders.training, settings, state, accelerator)
        pipeline.text_encoder = words.ema.text
    phase = flow_matching.FlowMatchingPhase(config.transformer, config.shift, pipeline.transformer)
    pipeline.transformer = phase.ema
    encoded = _encoded(frames_NTHW3, clips, Encoders(pipeline), settings, state)
    _fit(phase, encoded, config.transformer.training, settings, state, accelerator)
    pipeline.to("cpu")
    if config.start:
        link_tree(Path(config.start), out, skip=(GEOMETRY, *config.further), foreign=True)
        for name in config.further:
            getattr(pipeline, name).save_pretrained(out / name)
            forget_origin(out / name)
    else:
        pipeline.save_pretrained(out)
        forget_origin(out)
    return {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in NETWORKS}


def _untrained(
    settings: Experiment, clips: list[Clip], frames_NTHW3: np.ndarray, state: Path, accelerator: Accelerator
) -> WanImageToVideoPipeline:
    """A pipeline whose VAE and encoders are trained on the clips, and whose transformer is not yet."""
    config, geometry = settings.teacher, settings.geometry
    trained_vae = _train_vae(settings, frames_NTHW3, state, accelerator)
    sample = [to_signed(frames_NTHW3[i : i + 8]).to(accelerator.device) for i in range(0, min(len(clips), 256), 8)]
    vae.normalise(trained_vae, sample)

    tokenizer = encoders.build_tokenizer([c.caption for c in clips], config.encoders.vocabulary)
    image_encoder, processor = _seeded(
        settings, "image", lambda: encoders.build_image_encoder(config.encoders, min(geometry.height, geometry.width))
    )
    text_encoder = _seeded(settings, "text", lambda: encoders.build_text_encoder(config.encoders, len(tokenizer)))
    towers = _seeded(settings, "towers", lambda: encoders.Towers(text_encoder, image_encoder)).to(accelerator.device)
    phase = encoders.EncoderPhase(config.encoders, towers)
    pairs = _pairs(frames_NTHW3, clips, tokenizer, processor, settings)
    _fit(phase, pairs, config.encoders.training, settings, state, accelerator)

    build = lambda: flow_matching.build(config.transformer, config.encoders.text_dim, config.encoders.image_dim)  # noqa: E731
    return WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=phase.ema.reader.text,
        vae=trained_vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.shift),
        image_processor=processor,
        image_encoder=phase.ema.image,
        transformer=_seeded(settings, "transformer", build).to(accelerator.device),
    )


def _train_vae(settings: Experiment, frames_NTHW3: np.ndarray, state: Path, accelerator: Accelerator):
    """Single frames, then short crops; crops as long as the clips; at last the decoder alone."""
    config, whole = settings.teacher.vae, settings.geometry.frames
    network = _seeded(settings, "vae", lambda: vae.build(config)).to(accelerator.device)
    short = lambda step: 1 if step < config.image_steps else config.crop_frames  # noqa: E731
    for name, training, optimizer, frames in (
        ("teacher/vae", config.training, config.optimizer, short),
        ("teacher/vae-whole", config.whole_training, config.whole_optimizer, lambda _: whole),
        ("teacher/vae-decoder", config.decoder_training, config.decoder_optimizer, lambda _: whole),
    ):
        phase = vae.VaePhase(config, network, optimizer, frames, name, decoder_only=name.endswith("decoder"))
        _fit(phase, _videos(frames_NTHW3, training, settings), training, settings, state, accelerator)
        network = phase.ema
    return network.requires_grad_(False).eval()


def _seeded(settings: Experiment, name: str, build):
    """Initialise a network from the experiment's seed, leaving the global generator alone."""
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(settings.seed, "teacher", name))
        return build()


def _fit(phase, batches, training: Training, settings: Experiment, state: Path, accelerator: Accelerator) -> None:
    train(phase, batches, training, settings.seed, state / phase.name.replace("/", "-"), accelerator)


def _numbers(settings: Experiment, clips: int, training: Training, name: str):
    """Number of a batch -> the clips in it."""
    order, size = Shuffled(clips, settings.seed, name), training.batch_size
    return lambda drawn: [order(drawn * size + i) for i in range(size)]


def _videos(frames_NTHW3: np.ndarray, training: Training, settings: Experiment):
    numbers = _numbers(settings, len(frames_NTHW3), training, "vae")
    return lambda drawn: to_signed(frames_NTHW3[numbers(drawn)])


def _pairs(frames_NTHW3: np.ndarray, clips: list[Clip], tokenizer, processor, settings: Experiment):
    numbers = _numbers(settings, len(clips), settings.teacher.encoders.training, "encoders")
    captions = _captions(clips, tokenizer, settings)

    def batch(drawn: int) -> dict[str, Tensor]:
        chosen = numbers(drawn)
        pixels = [processor(images=list(frames_NTHW3[chosen, at]), return_tensors="pt").pixel_values for at in (0, -1)]
        return {**captions(drawn), "first": pixels[0], "last": pixels[1]}

    return batch


def _captions(clips: list[Clip], tokenizer, settings: Experiment):
    numbers = _numbers(settings, len(clips), settings.teacher.encoders.training, "encoders")
    captions = [c.caption for c in clips]
    longest = max(map(len, tokenizer(captions, truncation=True, max_length=TEXT_TOKENS).input_ids))

    def batch(drawn: int) -> dict[str, Tensor]:
        some = [captions[n] for n in numbers(drawn)]
        text = tokenizer(some, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
        return {"ids": text.input_ids, "mask": text.attention_mask}

    return batch


def _encoded(frames_NTHW3: np.ndarray, clips: list[Clip], encode: Encoders, settings: Experiment, state: Path):
    """Batches of latents and conditions, encoded at the first call: not at all when nothing is left to train.

    They are held in memory: a tiny corpus is some hundred megabytes. The state folder keeps them for the next start.
    """
    numbers = _numbers(settings, len(clips), settings.teacher.transformer.training, "transformer")
    device = encode.pipeline.vae.device
    captions = sorted({c.caption for c in clips})
    row = {caption: number for number, caption in enumerate(captions)}

    @cache
    def everything() -> dict[str, Tensor]:
        file = state / "encoded.safetensors"
        if not is_kept(file):
            with kept(file) as temporary:
                save_file(_encode(frames_NTHW3, clips, captions, encode), temporary)
        return load_file(file)

    def batch(drawn: int) -> tuple[Tensor, Condition]:
        corpus, chosen = everything(), numbers(drawn)
        x = corpus["x0"][chosen]
        frame = torch.cat([first_frame_mask(len(x), *x.shape[2:]), corpus["condition"][chosen]], dim=1)
        text_BLD = corpus["text"][[row[clips[n].caption] for n in chosen]]
        parts = (frame, corpus["image"][chosen], text_BLD, corpus["empty"])
        return x.to(device), Condition(*(part.to(device) for part in parts))

    return batch


def _encode(frames_NTHW3: np.ndarray, clips: list[Clip], captions: list[str], encode: Encoders) -> dict[str, Tensor]:
    """Latents, conditions and image embeddings of every clip; text embeddings of every caption, and the empty one."""
    tokens = text_tokens_for(max(encode.lengths(captions)))
    step, chunks = 16, []
    with Interruption.watch() as interruption:  # the loop, whose first batch this is, would heed a signal after it
        for start in track(range(0, len(clips), step), -(-len(clips) // step), "teacher/encode"):
            chunks.append(encode.pictures(frames_NTHW3[start : start + step]))
            if interruption.requested:
                raise Interruption("teacher/encode: stopped by a signal; the clips are encoded anew next time")
    parts = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    texts = [pad_text(text, tokens) for text in encode.texts([*captions, ""])]
    return {**parts, "text": torch.stack(texts[:-1]), "empty": texts[-1]}
