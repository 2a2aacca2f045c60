"""Number formats follow one rule in every stage, whatever a folder is stored in, and no network is loaded twice."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKLWan, ModelMixin, WanTransformer3DModel
from transformers import CLIPVisionModel, PreTrainedModel, UMT5EncoderModel

from conftest import CAPTIONS, FRAMES, picture
from vpae.data.latents import LatentDataset
from vpae.experiment import Source, load
from vpae.models import formats as formats_module
from vpae.models.formats import formats
from vpae.models.wan import load_pipeline, load_sampler, take_any_inputs
from vpae.sampling.single import animate
from vpae.stages import run_stage

STAGES = ("clips", "teacher", "latents", "priming", "equilibrium", "samples", "evaluation")
NETWORKS = ("transformer", "text_encoder")
LARGE, SMALL = (WanTransformer3DModel, UMT5EncoderModel), (AutoencoderKLWan, CLIPVisionModel)


class Loads:
    """Every network that is loaded, as (class, number format, bytes of weights)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.found: list[tuple[type, torch.dtype, int]] = []
        for owner in (ModelMixin, PreTrainedModel):
            original = owner.from_pretrained.__func__

            def load_it(cls, *arguments, original=original, **options):
                network = original(cls, *arguments, **options)
                held = sum(p.numel() * p.element_size() for p in network.parameters())
                self.found.append((type(network), network.dtype, held))
                return network

            monkeypatch.setattr(owner, "from_pretrained", classmethod(load_it))

    def take(self) -> list[tuple[type, torch.dtype, int]]:
        found, self.found = self.found, []
        return found


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """Accelerators of one process share a state, whose precision is the first one's."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def place(request, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Source, Path]]:
    """An experiment whose teacher is stored in two bytes a weight, and whose networks count as large."""
    stored = load_pipeline(teacher)
    stored.to(request.param).save_pretrained(tmp_path / "stored")
    monkeypatch.setattr(formats_module, "LARGE", 1000)
    training = {"steps": 1, "batch_size": 2, "mixed_precision": "bf16"}
    tree = {
        "geometry": {"frames": 5, "height": 32, "width": 32, "fps": 8},
        "clips": {"source": "world", "train": 8, "held_out": 8, "workers": 1},
        "teacher": {"source": "folder", "path": str(tmp_path / "stored")},
        "priming": {"training": training, "fake_lora": {"rank": 2, "alpha": 2}},
        "equilibrium": {"training": training, "head": {"dim": 16, "heads": 2, "queries": 2}},
        "samples": {
            "rows": {
                "teacher-4nfe": {"model": "teacher", "steps": 2, "guidance_scale": 3.0},
                "vpae-1nfe": {"model": "equilibrium", "steps": 1},
                "teacher-1nfe": {"model": "teacher", "steps": 1},
            },
            "count": 8,
            "decode": 1,
        },
        "evaluation": {"bootstrap": 20, "latency_repeats": 1, "vbench": {"backbones": "off"}},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree))
    yield load(tmp_path / "own.yaml"), tmp_path / "results"


def in_two_bytes(folder: Path, network: str) -> int:
    """Bytes of a network's weights in bfloat16, with what diffusers keeps in float32 of a transformer."""
    loaded = getattr(load_pipeline(folder, torch.float32), network)
    exact = WanTransformer3DModel._keep_in_fp32_modules if network == "transformer" else ()
    return sum(
        p.numel() * (4 if any(part in name.split(".") for part in exact) else 2)
        for name, p in loaded.named_parameters()
    )


@pytest.mark.slow
def test_every_stage_loads_large_networks_in_bfloat16_and_each_once(place, monkeypatch):
    (source, results), found = place, {}
    loads = Loads(monkeypatch)
    for stage in STAGES:
        run_stage(source, stage, results)
        found[stage] = loads.take()
    expected = {
        kind: in_two_bytes(results / "own" / "teacher", name) for kind, name in zip(LARGE, NETWORKS, strict=True)
    }
    loads.take()
    for stage, copies in {"latents": (0, 1, 1, 1), "samples": (2, 0, 1, 0), "evaluation": (2, 1, 1, 1)}.items():
        counted = tuple(sum(kind is other for other, _, _ in found[stage]) for kind in (*LARGE, *SMALL))
        assert counted == copies, stage
        for kind, dtype, held in found[stage]:
            if kind in LARGE:
                assert held == expected[kind], (stage, kind)
            else:
                assert dtype == torch.float32, (stage, kind)
    for tensor in LatentDataset(results / "own" / "latents", "train").tensors(0).values():
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()


def test_a_network_of_any_number_format_is_sampled_from(place):
    source, _ = place
    stored = Path(source.settings.teacher.path)
    pipeline = load_pipeline(stored)
    assert pipeline.text_encoder.dtype == torch.bfloat16 and pipeline.vae.dtype == torch.float32
    assert pipeline.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    frames = animate(pipeline, picture(), CAPTIONS[0], 1, 1.0, 0, FRAMES)
    assert frames.dtype == np.uint8 and len(np.unique(frames)) > 20


@pytest.mark.parametrize("load", [load_sampler, load_pipeline])
def test_a_network_is_out_of_memory_as_soon_as_nobody_has_it(teacher, load):
    """Stages load one large model after the other: one that waits for the garbage collector would stand beside it."""
    gc.collect()
    gc.disable()
    try:
        held = load(teacher)
        network = getattr(held, "transformer", held)
        weight = weakref.ref(network.blocks[0].attn1.to_q.weight)
        del held, network
        assert weight() is None
    finally:
        gc.enable()


def test_each_network_is_large_or_small_by_itself(teacher, monkeypatch):
    assert set(formats(teacher).values()) == {torch.float32}
    sizes = {name: sum(p.numel() for p in getattr(load_pipeline(teacher), name).parameters()) for name in NETWORKS}
    monkeypatch.setattr(formats_module, "LARGE", sorted(sizes.values())[1])
    larger = max(sizes, key=sizes.__getitem__)
    found = formats(teacher)
    assert {name for name, dtype in found.items() if dtype == torch.bfloat16} == {larger}
    assert formats(teacher, torch.float16)["vae"] == torch.float32
    assert formats(teacher, vae=torch.bfloat16)["vae"] == torch.bfloat16


def test_the_time_is_not_rounded_to_the_format_of_the_weights():
    class Network(torch.nn.Linear):
        dtype = torch.bfloat16

        def forward(self, hidden_states, timestep):
            return hidden_states.dtype, timestep

    network = Network(1, 1)
    take_any_inputs(network)
    dtype, timestep = network(hidden_states=torch.zeros(1, 1), timestep=torch.tensor([997.0]))
    assert dtype == torch.bfloat16 and timestep.dtype == torch.float32 and timestep == 997
