"""A dress rehearsal of Wan2.1-I2V-14B on CPUs: its own configuration, from `snakemake` through every stage to scores.

The overlay only shrinks: two of 40 blocks, one of umT5's 24 layers and two of CLIP's 32, few clips of 32 x 32 pixels,
few steps, and two processes (gloo, shards, shared clips) on one node. Widths, vocabulary, VAE and number formats are
those of the released model (`products.py` multiplies where a CPU knows no bfloat16), stored in bfloat16 in several
files a network as it is distributed, weights are random. Two blocks are still a network that counts as large. The
configuration is that of LoRA students: whole weights of two blocks with EMA and optimiser would take some 25 GB. `make
rehearsal` runs it; by itself, since it wants 12 GB and both cores.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    UMT5Config,
    UMT5EncoderModel,
)

from test_workflow import Clone
from vpae.data.video import write_video
from vpae.data.world import draw_truth, render
from vpae.models.formats import LARGE, stored_weights
from vpae.planning.network import CLIP_VIT_H, UMT5_XXL, Network
from vpae.teacher.encoders import build_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(
        "VPAE_REHEARSAL" not in os.environ, reason="wants 12 GB and minutes of both cores: `make rehearsal`"
    ),
]
NAME, TEACHER = "rehearsal", "data/teachers/two-blocks"
NETWORK = Network(layers=2)
STAGES = ("clips", "teacher", "latents", "priming", "equilibrium", "samples", "evaluation", "report")
CLIPS = 6
# Stands in for the command, and writes down every network it loads and what memory it took.
RECORDER = """#!PYTHON
import json, os, resource, sys
from pathlib import Path
from vpae.cli import VARIABLES, main
os.environ.update(VARIABLES)  # as the command does, before torch is imported: idle threads must not spin
stage, rank = sys.argv[1], os.environ.get("RANK", "0")
def note(**found):
    with (Path("loads") / f"{stage}.jsonl").open("a") as file:
        file.write(json.dumps({"rank": rank, **found}) + "\\n")
if "--config" in sys.argv:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel
    for owner in (ModelMixin, PreTrainedModel):
        def load(cls, *arguments, original=owner.from_pretrained.__func__, **options):
            network, formats = original(cls, *arguments, **options), {}
            for p in network.parameters():
                kind = str(p.dtype).removeprefix("torch.")
                formats[kind] = formats.get(kind, 0) + p.numel() * p.element_size()
            note(network=type(network).__name__, bytes=formats)
            return network
        owner.from_pretrained = classmethod(load)
if stage == "evaluation":  # three passes give a median, here of nothing that counts
    import vpae.evaluation.latency
    vpae.evaluation.latency.PASSES = 1
if "--config" in sys.argv:
    sys.path.append("TESTS")
    from products import quick_bfloat16
    with quick_bfloat16():
        code = main()
else:
    code = main()
note(peak=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""
RECORDER = RECORDER.replace("PYTHON", sys.executable).replace("TESTS", str(Path(__file__).parent))


def overlay() -> dict:
    """What shrinks the 14B configuration to what two cores do in minutes."""
    phase = {
        "training": {"steps": 1, "accumulate": 1, "checkpoint_every": 1},
        "student_lora": {"rank": 8, "alpha": 8},
    }
    one = {"gpus": 0, "cpus": 2, "memory_gb": 8}
    two = {"nodes": 1, "gpus": 2, "cpus": 2, "memory_gb": 16}
    return {
        "extends": "wan2.1-i2v-14b-480p-lora",
        "geometry": {"frames": 5, "height": 32, "width": 32},
        "clips": {"train": CLIPS - 3, "held_out": 3, "workers": 1},
        "teacher": {"source": "folder", "path": TEACHER, "revision": ""},
        "latents": {"shard_size": 2, "negative_prompt": "blurred"},  # short as the captions: 32 tokens instead of 512
        "priming": {**phase, "fake_lora": {"rank": 8, "alpha": 8}, "fake_steps_per_generator_step": 1},
        "equilibrium": {**phase, "head": {"taps": [0, 1]}},
        "samples": {
            "rows": {
                **dict.fromkeys(["teacher-100nfe", "teacher-1nfe", "vpae-2nfe", "vpae-4nfe"]),
                "teacher-4nfe": {"model": "teacher", "steps": 2, "guidance_scale": 5.0},
            },
            "count": 3,
            "decode": 1,
        },
        "evaluation": {
            "bootstrap": 20,
            "latency_repeats": 1,
            "latency_warmup": 0,
            "vbench": {"backbones": "tiny", "videos_per_row": 1},
        },
        "report": {"clips": 1},
        "jobs": {"clips": 1, "latents": 1, "samples": 1},
        "cluster": {
            "latents": one,
            "samples": one,
            "evaluation": {**one, "memory_gb": 12},
            "priming": two,
            "equilibrium": two,
        },
    }


@torch.no_grad()
def _filled(network: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A network without memory, given small random weights; normalisation starts as the identity."""
    network = network.to(dtype).to_empty(device="cpu").eval()
    if isinstance(network, PreTrainedModel):
        network.tie_weights()
    random = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "norm" in name:
            parameter.fill_(0 if name.endswith("bias") else 1)
        else:
            some = 0.02 * torch.randn(min(parameter.numel(), 2**20), generator=random)
            parameter.copy_(some.repeat(-(-parameter.numel() // len(some)))[: parameter.numel()].view_as(parameter))
    return network


def write_teacher(folder: Path, captions: list[str]) -> None:
    """The pipeline folder, in files of at most a gigabyte."""
    with torch.device("meta"):
        text = UMT5EncoderModel(UMT5Config(**{**UMT5_XXL, "num_layers": 1}))
    tokenizer = build_tokenizer(captions, 300)
    # Small networks whose buffers a start without memory would leave empty.
    image = CLIPVisionModel(CLIPVisionConfig(**{**CLIP_VIT_H, "num_hidden_layers": 2, "image_size": 56}))
    parts = {
        "transformer": _filled(NETWORK.build()),
        "text_encoder": _filled(text),
        "image_encoder": image.to(torch.bfloat16),
        "vae": AutoencoderKLWan().to(torch.bfloat16),
    }
    for name, network in parts.items():
        network.save_pretrained(folder / name, max_shard_size="1GB")
    tokenizer.save_pretrained(folder / "tokenizer")
    CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=56).save_pretrained(folder / "image_processor")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": WanImageToVideoPipeline.__name__,
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "image_encoder": ["transformers", "CLIPVisionModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "image_processor": ["transformers", "CLIPImageProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def write_clips(folder: Path) -> list[str]:
    """A table of videos larger and longer than the clips; returns the captions."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(CLIPS):
        truth = draw_truth((5, number), 9, 1.0, 0.0, 0.0)
        write_video(folder / f"{number}.mp4", render(truth, 48, 64), 16.0, crf=12, reproducible=False)
        rows.append((f"{number}.mp4", f"{truth.caption}, number {number}"))
    (folder / "train.csv").write_text("path,caption\n" + "".join(f'{path},"{caption}"\n' for path, caption in rows))
    return [caption for _, caption in rows]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a clone in which the experiment was run."""
    folder = tmp_path_factory.mktemp("full-width")
    (folder / "loads").mkdir()
    clone = Clone(folder, RECORDER)
    clone.environment |= {"ACCELERATE_USE_CPU": "true"}
    write_teacher(folder / TEACHER, write_clips(folder / "data" / "clips"))
    (folder / "configs" / f"{NAME}.yaml").write_text(yaml.safe_dump(overlay()))
    code, printed = clone.snakemake("--config", f"experiment={NAME}")
    assert code == 0, printed[-5000:]
    yield folder
    shutil.rmtree(folder)  # gigabytes, which pytest would keep for three runs


def notes(rehearsed: Path, stage: str) -> list[dict]:
    """What a stage's processes wrote down."""
    return [json.loads(line) for line in (rehearsed / "loads" / f"{stage}.jsonl").read_text().splitlines()]


def loaded(rehearsed: Path, stage: str) -> list[tuple[str, dict]]:
    """The networks that a stage loaded, as class and bytes of weights by number format."""
    return [(note["network"], note["bytes"]) for note in notes(rehearsed, stage) if "network" in note]


def weights_of(rehearsed: Path, network: str, dtype: str) -> dict[str, int]:
    """Bytes of a stored network's weights by number format, once it is loaded in one of them."""
    exact = WanTransformer3DModel._keep_in_fp32_modules if network == "transformer" else []
    found: dict[str, int] = {}
    for name, weight in stored_weights(rehearsed / TEACHER / network).items():
        kind = "float32" if any(part in name.split(".") for part in exact) else dtype
        found[kind] = found.get(kind, 0) + weight.values * getattr(torch, kind).itemsize
    return found


def test_the_folder_is_one_of_large_networks_stored_in_bfloat16_in_several_files(rehearsed):
    for network in ("transformer", "text_encoder"):
        stored = stored_weights(rehearsed / TEACHER / network)
        assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
        assert sum(weight.values for weight in stored.values()) >= LARGE
        assert len(list((rehearsed / TEACHER / network).glob("*.safetensors"))) > 1


def test_every_stage_loads_each_network_once_in_its_number_format(rehearsed):
    """Large networks in bfloat16, the others in float32; of two processes that train, the first one alone loads.

    VBench's small stand-ins have an image encoder of their own.
    """
    transformer = ("WanTransformer3DModel", weights_of(rehearsed, "transformer", "bfloat16"))
    whole = ("WanTransformer3DModel", weights_of(rehearsed, "transformer", "float32"))  # an adapter is merged into it
    vae = ("AutoencoderKLWan", weights_of(rehearsed, "vae", "float32"))
    image = ("CLIPVisionModel", weights_of(rehearsed, "image_encoder", "float32"))
    text = ("UMT5EncoderModel", weights_of(rehearsed, "text_encoder", "bfloat16"))
    expected = {
        "clips": [],
        "teacher": [],
        "latents": [vae, image, text],
        "priming": [transformer, whole],
        "equilibrium": [transformer, whole],
        "samples": [vae, transformer, transformer, transformer],
        "evaluation": [vae, image, image, text, transformer, transformer, transformer],
        "report": [],
    }
    for stage, networks in expected.items():
        key = lambda one: (one[0], sorted(one[1].items()))  # noqa: E731
        assert sorted(loaded(rehearsed, stage), key=key) == sorted(networks, key=key), stage
    for stage in ("priming", "equilibrium"):
        assert {note["rank"] for note in notes(rehearsed, stage)} == {"0", "1"}
        assert {note["rank"] for note in notes(rehearsed, stage) if "network" in note} == {"0"}


def test_no_stage_takes_more_memory_than_it_asks_for(rehearsed):
    asked = overlay()["cluster"]
    for stage in STAGES:
        peaks = {note["rank"]: note["peak"] for note in notes(rehearsed, stage) if "peak" in note}
        assert sum(peaks.values()) < 1e9 * asked.get(stage, {"memory_gb": 4})["memory_gb"], (stage, peaks)


def test_every_row_has_its_videos_and_finite_scores(rehearsed):
    results = rehearsed / "results" / NAME
    scores = json.loads((results / "evaluation" / "scores.json").read_text())
    assert set(scores["rows"]) == {"real", "teacher-4nfe", "priming-1nfe", "vpae-1nfe"}
    for row, found in scores["rows"].items():
        assert len(list((results / "samples" / row).glob("*.mp4"))) == 1
        assert {"frechet", "motion"} <= found.keys()
        assert all(math.isfinite(value) for metric in found.values() for value in metric.values())
    for phase in ("priming", "equilibrium"):
        lines = [json.loads(line) for line in (results / phase / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 1 and all(math.isfinite(value) for value in lines[0].values())
        assert lines[0]["generator_grad_norm"] > 0
    assert (results / "report" / "index.html").is_file()
