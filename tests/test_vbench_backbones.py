"""Each network equals a naive reading of its architecture under the original file's names, and says what it lacks."""

import importlib.util
import itertools
import math
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import seeded
from synthetic import video_of
from vbench_i2v import backbones, camera, weights
from vbench_i2v.backbones import clip, plugins
from vbench_i2v.backbones.checkpoints import read_state
from vbench_i2v.backbones.dino import DinoViT
from vbench_i2v.backbones.raft import RAFT, renamed
from vbench_i2v.base import OFFICIAL
from vbench_i2v.errors import NotComputed, VBenchError
from vpae.data.world import draw_truth, render, sprite_alpha
from vpae.evaluation.vbench.tiny import classical, quality

EXACT = 1e-5


def randomised(model: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    """Random values everywhere, so that no zero or one hides a mistake; norms' variances stay positive."""

    def fill() -> None:
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                value.data.normal_(0, std)
                if name.endswith("running_var") or (".norm" in name and name.endswith("weight")):
                    value.data.abs_().add_(0.5)

    seeded(seed, fill)
    return model.eval().requires_grad_(False)


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


def normed(x: np.ndarray, w: dict, name: str, eps: float) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attended(x: np.ndarray, qkv: np.ndarray, heads: int) -> np.ndarray:
    """One head after the other, one query after the other."""
    width = x.shape[1]
    head, out = width // heads, np.zeros_like(x)
    for h in range(heads):
        q, k, v = (qkv[:, part * width + h * head : part * width + (h + 1) * head] for part in range(3))
        for i in range(len(x)):
            logits = k @ q[i] / math.sqrt(head)
            weights = np.exp(logits - logits.max())
            out[i, h * head : (h + 1) * head] = weights @ v / weights.sum()
    return out


def patches(image: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(L, D): the kernel at each patch, row by row; what fills no patch is left out."""
    size = weight.shape[-1]
    rows, columns = image.shape[1] // size, image.shape[2] // size
    tiles = [
        image[:, r * size : (r + 1) * size, c * size : (c + 1) * size] for r in range(rows) for c in range(columns)
    ]
    return np.stack([np.tensordot(weight, tile, 3) for tile in tiles])


def cubic(distance: float) -> float:
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def stretched(grid: np.ndarray, count: int) -> np.ndarray:
    """The first axis to `count` positions, by DINO's factor (count + 0.1) / 14."""
    old, factor = len(grid), (count + 0.1) / len(grid)
    out = np.zeros((count, *grid.shape[1:]))
    for i in range(count):
        at = (i + 0.5) / factor - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            out[i] += cubic(at - tap) * grid[min(max(tap, 0), old - 1)]
    return out


def naive_dino(model: DinoViT, image: np.ndarray, heads: int) -> np.ndarray:
    w = arrays(model)
    positions = w["pos_embed"][0]
    rows, columns = image.shape[1] // 16, image.shape[2] // 16
    if (rows, columns) != (14, 14):
        grid = positions[1:].reshape(14, 14, -1)
        grid = stretched(stretched(grid, rows).transpose(1, 0, 2), columns).transpose(1, 0, 2)
        positions = np.concatenate([positions[:1], grid.reshape(rows * columns, -1)])
    seen = patches(image, w["patch_embed.proj.weight"]) + w["patch_embed.proj.bias"]
    x = np.concatenate([w["cls_token"][0], seen]) + positions
    gelu = np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))))
    for n in range(len(model.blocks)):
        b = f"blocks.{n}"
        mixed = attended(x, linear(normed(x, w, f"{b}.norm1", 1e-6), w, f"{b}.attn.qkv"), heads)
        x = x + linear(mixed, w, f"{b}.attn.proj")
        inner = gelu(linear(normed(x, w, f"{b}.norm2", 1e-6), w, f"{b}.mlp.fc1"))
        x = x + linear(inner, w, f"{b}.mlp.fc2")
    return normed(x, w, "norm", 1e-6)[0]


@pytest.mark.parametrize("size", [(224, 224), (224, 388), (298, 224)], ids=str)
def test_dino_is_its_naive_recomputation(size):
    model = randomised(DinoViT(width=24, depth=2, heads=3))
    images = seeded(1, lambda: torch.randn(2, 3, *size))
    expected = np.stack([naive_dino(model, image, heads=3) for image in images.double().numpy()])
    assert np.allclose(model(images).numpy(), expected, atol=EXACT, rtol=EXACT)


def test_dino_has_the_names_and_the_size_of_the_original_file():
    with torch.device("meta"):
        model = DinoViT()
    assert sum(p.numel() for p in model.parameters()) == 85_798_656
    block = [f"{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2") for kind in ("weight", "bias")]
    block += [f"mlp.{part}.{kind}" for part in ("fc1", "fc2") for kind in ("weight", "bias")]
    outer = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"]
    assert set(model.state_dict()) == {*outer, *(f"blocks.{n}.{name}" for n in range(12) for name in block)}
    assert model.pos_embed.shape == (1, 197, 768)


# CLIP: OpenAI's names, with queries, keys and values in one matrix, and projections to be multiplied from the right

WIDTH, HEAD, LAYERS, PATCH, OUT = 32, 8, 2, 16, 12


def openai_state(d: int = WIDTH) -> dict[str, Tensor]:
    shapes = {"class_embedding": (d,), "positional_embedding": (5, d), "proj": (d, OUT)}
    shapes |= {"conv1.weight": (d, 3, PATCH, PATCH)}
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    for n in range(LAYERS):
        b = f"transformer.resblocks.{n}"
        shapes |= {f"{b}.attn.in_proj_weight": (3 * d, d), f"{b}.attn.in_proj_bias": (3 * d,)}
        shapes |= {f"{b}.attn.out_proj.weight": (d, d), f"{b}.attn.out_proj.bias": (d,)}
        shapes |= {f"{b}.mlp.c_fc.weight": (4 * d, d), f"{b}.mlp.c_fc.bias": (4 * d,)}
        shapes |= {f"{b}.mlp.c_proj.weight": (d, 4 * d), f"{b}.mlp.c_proj.bias": (d,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{b}.{name}.weight": (d,), f"{b}.{name}.bias": (d,)}
    state = seeded(0, lambda: {f"visual.{name}": 0.3 * torch.randn(shape) for name, shape in shapes.items()})
    text = {"positional_embedding": torch.zeros(77, 8), "logit_scale": torch.zeros(())}  # the other tower stays out
    return state | text


def naive_clip(state: dict[str, Tensor], image: np.ndarray) -> np.ndarray:
    w = {name.removeprefix("visual."): t.double().numpy() for name, t in state.items() if name.startswith("visual.")}
    x = np.concatenate([w["class_embedding"][None], patches(image, w["conv1.weight"])]) + w["positional_embedding"]
    x = normed(x, w, "ln_pre", 1e-5)
    for n in range(LAYERS):
        b = f"transformer.resblocks.{n}"
        qkv = normed(x, w, f"{b}.ln_1", 1e-5) @ w[f"{b}.attn.in_proj_weight"].T + w[f"{b}.attn.in_proj_bias"]
        x = x + linear(attended(x, qkv, WIDTH // HEAD), w, f"{b}.attn.out_proj")
        inner = linear(normed(x, w, f"{b}.ln_2", 1e-5), w, f"{b}.mlp.c_fc")
        x = x + linear(inner / (1 + np.exp(-1.702 * inner)), w, f"{b}.mlp.c_proj")
    return normed(x[0], w, "ln_post", 1e-5) @ w["proj"]


WIDE = {name: value.half() for name, value in openai_state(128).items()}  # two heads of the original width


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """A TorchScript archive with OpenAI's names and widths that are multiples of 64."""
    root = nn.Module()
    for name, value in WIDE.items():
        *places, last = name.split(".")
        module = root
        for place in places:
            if not hasattr(module, place):
                module.add_module(place, nn.Module())
            module = getattr(module, place)
        module.register_parameter(last, nn.Parameter(value, requires_grad=False))
    path = tmp_path_factory.mktemp("clip") / backbones.CLIP_B32
    torch.jit.save(torch.jit.script(root), str(path))
    return path


def test_clip_is_its_naive_recomputation_from_openais_names():
    state = openai_state()
    model = clip.from_openai(state, head=HEAD)
    images = seeded(1, lambda: torch.randn(2, 3, 2 * PATCH, 2 * PATCH))
    expected = np.stack([naive_clip(state, image) for image in images.double().numpy()])
    with torch.no_grad():
        assert np.allclose(model(images).image_embeds.numpy(), expected, atol=EXACT, rtol=EXACT)


def test_clip_reads_a_torchscript_archive(archive):
    official = backbones.Official(archive.parent)
    images = seeded(2, lambda: torch.randn(1, 3, 2 * PATCH, 2 * PATCH))
    expected = clip.from_openai(WIDE)(images).image_embeds
    assert torch.equal(official.clip_b32()(images), expected) and expected.shape == (1, OUT)
    half = backbones.Official(archive.parent, clip_dtype="float16").clip_b32()(images)
    assert half.dtype == torch.float16 and torch.allclose(half.float(), expected, atol=0.1, rtol=0.05)


def test_a_folder_in_the_place_of_clip_s_archive_is_named(tmp_path):
    (tmp_path / "ViT-B-32.pt").mkdir()
    with pytest.raises(NotComputed, match=r"ViT-B-32\.pt is no CLIP archive"):
        clip.load(tmp_path / "ViT-B-32.pt")


def test_layer_norms_of_clip_stay_in_float32():
    model = clip.in_dtype(clip.from_openai(openai_state(128)), torch.float16)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    inside = {id(weight) for norm in norms for weight in norm.parameters()}
    assert len(norms) >= 4 and {weight.dtype for norm in norms for weight in norm.parameters()} == {torch.float32}
    assert {weight.dtype for weight in model.parameters() if id(weight) not in inside} == {torch.float16}
    norm = norms[0]
    nn.init.normal_(norm.weight)
    hidden = seeded(3, lambda: torch.randn(4, 7, 128)).half()
    exact = F.layer_norm(hidden.float(), (128,), norm.weight, norm.bias, 1e-5).half()
    rounded = F.layer_norm(hidden, (128,), norm.weight.half(), norm.bias.half(), 1e-5)
    assert torch.equal(norm(hidden), exact) and not torch.equal(rounded, exact)


# RAFT

SMALL = {"widths": (8, 12, 16), "features": 16, "hidden": 16}


def original_names(model: RAFT) -> dict[str, Tensor]:
    """As `raft-things.pth` names them: from a parallel wrapper, the norm of a strided block twice."""
    state = {}
    for name, value in model.state_dict().items():
        state[f"module.{name}"] = value
        if ".downsample.1." in name:
            state[f"module.{name.replace('downsample.1', 'norm3')}"] = value
    return state


def test_raft_has_the_size_of_the_original_file():
    with torch.device("meta"):
        model = RAFT()
    assert sum(p.numel() for p in model.parameters()) == 5_257_536
    state = original_names(model)
    assert (len(state), len(model.state_dict())) == (179, 169)
    for name in (
        "fnet.layer2.0.downsample.0.weight",
        "cnet.layer3.0.norm3.running_var",
        "update_block.gru.convq2.bias",
    ):
        assert f"module.{name}" in state


def naive_raft(model: RAFT, first: Tensor, second: Tensor, updates: int) -> Tensor:
    """Each correlation is looked up by hand, pixel by pixel."""
    w = model.state_dict()

    def conv(x, name, stride=1):
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, w[f"{name}.bias"], stride, [k // 2 for k in weight.shape[-2:]])

    def norm(x, name):
        if f"{name}.weight" not in w:
            return (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        scale = w[f"{name}.weight"] / (w[f"{name}.running_var"] + 1e-5).sqrt()
        return (x - w[f"{name}.running_mean"][:, None, None]) * scale[:, None, None] + w[f"{name}.bias"][:, None, None]

    def encode(x, net):
        x = norm(conv(x, f"{net}.conv1", 2), f"{net}.norm1").relu()
        for layer, stride in ((1, 1), (2, 2), (3, 2)):
            for block in (0, 1):
                b, s = f"{net}.layer{layer}.{block}", stride if block == 0 else 1
                y = norm(conv(x, f"{b}.conv1", s), f"{b}.norm1").relu()
                y = norm(conv(y, f"{b}.conv2"), f"{b}.norm2").relu()
                if s == 2:
                    x = norm(conv(x, f"{b}.downsample.0", 2), f"{b}.downsample.1")
                x = (x + y).relu()
        return conv(x, f"{net}.conv2")

    first, second = 2 * first / 255 - 1, 2 * second / 255 - 1
    a, b = encode(first, "fnet")[0], encode(second, "fnet")[0]
    channels, height, width = a.shape
    volume = torch.tensordot(a, b, ([0], [0])).numpy() / math.sqrt(channels)  # (h, w, h, w)
    levels = [volume]
    for _ in range(3):
        v = levels[-1]
        v = v[:, :, : v.shape[2] // 2 * 2, : v.shape[3] // 2 * 2]
        levels.append((v[..., ::2, ::2] + v[..., 1::2, ::2] + v[..., ::2, 1::2] + v[..., 1::2, 1::2]) / 4)

    def bilinear(plane, x, y):
        total, x0, y0 = 0.0, math.floor(x), math.floor(y)
        for i, j in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
            if 0 <= i < plane.shape[0] and 0 <= j < plane.shape[1]:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * plane[i, j]
        return total

    context = encode(first, "cnet")
    hidden, inputs = context[:, : model.hidden].tanh(), context[:, model.hidden :].relu()
    flow = torch.zeros(1, 2, height, width)
    for _ in range(updates):
        found = torch.zeros(1, 4 * 81, height, width)
        for r in range(height):
            for c in range(width):
                x, y = c + flow[0, 0, r, c].item(), r + flow[0, 1, r, c].item()
                k = 0
                for level, v in enumerate(levels):
                    for dx in range(-4, 5):  # the first offset, the slow one, goes to x
                        for dy in range(-4, 5):
                            found[0, k, r, c] = float(bilinear(v[r, c], x / 2**level + dx, y / 2**level + dy))
                            k += 1
        e = "update_block.encoder"
        seen = conv(conv(found, f"{e}.convc1").relu(), f"{e}.convc2").relu()
        moved = conv(conv(flow, f"{e}.convf1").relu(), f"{e}.convf2").relu()
        motion = torch.cat([conv(torch.cat([seen, moved], 1), f"{e}.conv").relu(), flow], 1)
        x = torch.cat([inputs, motion], 1)
        for n in (1, 2):
            g = "update_block.gru"
            z = conv(torch.cat([hidden, x], 1), f"{g}.convz{n}").sigmoid()
            q = conv(torch.cat([hidden, x], 1), f"{g}.convr{n}").sigmoid() * hidden
            hidden = (1 - z) * hidden + z * conv(torch.cat([q, x], 1), f"{g}.convq{n}").tanh()
        h = "update_block.flow_head"
        flow = flow + conv(conv(hidden, f"{h}.conv1").relu(), f"{h}.conv2")
    mask = 0.25 * conv(conv(hidden, "update_block.mask.0").relu(), "update_block.mask.2")[0]
    mask = mask.reshape(9, 8, 8, height, width).softmax(0)
    around, out = F.pad(8 * flow[0], (1, 1, 1, 1)), torch.zeros(1, 2, 8 * height, 8 * width)
    for k in range(9):
        shifted = around[:, k // 3 : k // 3 + height, k % 3 : k % 3 + width]
        for i in range(8):
            for j in range(8):
                out[0, :, i::8, j::8] += mask[k, i, j] * shifted
    return out


def test_raft_is_its_naive_recomputation_from_the_original_names():
    source, model = randomised(RAFT(**SMALL)), RAFT(**SMALL)
    model.load_state_dict(renamed(original_names(source)))
    model.eval().requires_grad_(False)
    first, second = seeded(1, lambda: 255 * torch.rand(2, 1, 3, 128, 136))
    expected = naive_raft(model, first, second, updates=2)
    assert expected.std() > 0.01
    assert torch.allclose(model(first, second, updates=2), expected, atol=1e-4, rtol=1e-4)


def torchvision_raft():
    """torchvision's raft_large. A build for another torch cannot register its operators, which RAFT does not use."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        from torchvision.models.optical_flow import raft_large
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision.models.optical_flow import raft_large
    return raft_large


VISION = {  # the original's names -> torchvision's
    "fnet.conv1.": "feature_encoder.convnormrelu.0.",
    "fnet.conv2.": "feature_encoder.conv.",
    "fnet.": "feature_encoder.",
    "cnet.conv1.": "context_encoder.convnormrelu.0.",
    "cnet.norm1.": "context_encoder.convnormrelu.1.",
    "cnet.conv2.": "context_encoder.conv.",
    "cnet.": "context_encoder.",
    "update_block.encoder.convc1.": "update_block.motion_encoder.convcorr1.0.",
    "update_block.encoder.convc2.": "update_block.motion_encoder.convcorr2.0.",
    "update_block.encoder.convf1.": "update_block.motion_encoder.convflow1.0.",
    "update_block.encoder.convf2.": "update_block.motion_encoder.convflow2.0.",
    "update_block.encoder.conv.": "update_block.motion_encoder.conv.0.",
    "update_block.gru.convz": "update_block.recurrent_block.convgru.convz",
    "update_block.gru.convr": "update_block.recurrent_block.convgru.convr",
    "update_block.gru.convq": "update_block.recurrent_block.convgru.convq",
    "update_block.mask.0.": "mask_predictor.convrelu.0.",
    "update_block.mask.2.": "mask_predictor.conv.",
}


def vision_name(name: str) -> str:
    for old, new in VISION.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    if "convgru." in name:  # the number moves from the gate to the unit
        unit, gate = name.split("convgru.")
        name = f"{unit}convgru{gate[5]}.{gate[:5]}{gate[6:]}"
    if ".layer" in name:
        for number in (1, 2):
            name = name.replace(f".conv{number}.", f".convnormrelu{number}.0.")
            name = name.replace(f".norm{number}.", f".convnormrelu{number}.1.")
    return name


@pytest.mark.slow
def test_raft_is_torchvisions():
    build = torchvision_raft()
    ours = randomised(RAFT(), std=0.03)
    theirs = build(weights=None).eval()
    theirs.load_state_dict({vision_name(name): value for name, value in ours.state_dict().items()})
    first, second = seeded(1, lambda: 255 * torch.rand(2, 1, 3, 128, 160))
    with torch.no_grad():
        expected = theirs(first / 127.5 - 1, second / 127.5 - 1, num_flow_updates=20)[-1]
    difference = (ours(first, second) - expected).abs().max().item()
    assert expected.std() > 0.01
    assert difference <= 1e-4 * expected.abs().max().item(), difference


def test_raft_refuses_frames_that_would_give_nan():
    with pytest.raises(VBenchError, match="128 x 128"):
        RAFT(**SMALL)(torch.zeros(1, 3, 64, 128), torch.zeros(1, 3, 64, 128))


# What is absent or damaged

FILES = {
    "dino": backbones.DINO,
    "clip_b32": backbones.CLIP_B32,
    "clip_l14": backbones.CLIP_L14,
    "aesthetic_head": backbones.AESTHETIC,
    "raft": backbones.RAFT_THINGS,
}
PLUGINS = {
    "interpolate": "vbench",
    "tracks": "cotracker",
    "musiq": "pyiqa",
    "dreamsim": "dreamsim",
}


@pytest.mark.parametrize(("method", "file"), FILES.items(), ids=FILES)
def test_weights_that_are_missing_are_named(method, file, tmp_path):
    official = backbones.Official(tmp_path)
    assert official.name == OFFICIAL
    with pytest.raises(NotComputed, match=f"{file} is missing.*vbench-i2v weights"):
        getattr(official, method)()


@pytest.mark.parametrize(("method", "file"), FILES.items(), ids=FILES)
def test_damaged_weights_are_named(method, file, tmp_path):
    (tmp_path / file).write_bytes(b"not weights")
    with pytest.raises(NotComputed, match=file):
        getattr(backbones.Official(tmp_path), method)()


def test_weights_of_another_network_are_named(tmp_path):
    torch.save({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, tmp_path / backbones.AESTHETIC)
    with pytest.raises(NotComputed, match=rf"{backbones.AESTHETIC} holds other weights"):
        backbones.Official(tmp_path).aesthetic_head()


def test_the_aesthetic_head_is_loaded_once(tmp_path):
    state = {"weight": torch.arange(768.0)[None], "bias": torch.ones(1)}
    torch.save(state, tmp_path / backbones.AESTHETIC)
    official = backbones.Official(tmp_path)
    assert official.aesthetic_head()(torch.eye(768)[5:6]).item() == 6.0
    assert official.aesthetic_head() is official.aesthetic_head()


@pytest.mark.parametrize(("method", "package"), PLUGINS.items(), ids=PLUGINS)
def test_packages_that_are_missing_are_named(method, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    with pytest.raises(NotComputed, match=rf"{package} is not installed; .*pip install .*\[vbench\].*envs/vbench\.txt"):
        getattr(backbones.Official(tmp_path), method)()


def installed(folder: Path, monkeypatch, name: str, version: str, code: str, requires: str = "") -> None:
    """A package as pip would install it, with this code."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
    (information / "top_level.txt").write_text(name)
    (information / "RECORD").write_text(f"{name}/__init__.py,,\n")
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(folder))


def test_any_exception_of_an_import_names_package_version_and_remedy(tmp_path, monkeypatch):
    installed(tmp_path, monkeypatch, "torchvision", "0.28.0", "")
    installed(tmp_path, monkeypatch, "pyiqa", "0.1.10", "import numpy; numpy.sctypes")
    with pytest.raises(NotComputed, match=r"pyiqa 0\.1\.10 cannot be imported \(AttributeError.*sctypes.*pip install"):
        backbones.Official(tmp_path).musiq()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "nms does not exist"),
        ("import torchvision_of_another_world", "No module named"),
        ("raise AttributeError('module torch has no attribute x')", "no attribute"),
    ],
    ids=["operator", "module", "attribute"],
)
def test_a_torchvision_of_another_torch_is_named(code, words, tmp_path, monkeypatch):
    installed(tmp_path, monkeypatch, "torchvision", "0.21.0", code, "torch (==2.6.0)")
    installed(tmp_path, monkeypatch, "dreamsim", "0.2.1", "import torchvision")
    with pytest.raises(NotComputed, match=words) as caught:
        backbones.Official(tmp_path).dreamsim()
    if "another_world" not in code:
        said = f"torchvision 0.21.0 does not match torch {torch.__version__}: it needs torch==2.6.0"
        assert said in str(caught.value)
    assert "dreamsim 0.2.1 cannot be imported" in str(caught.value)


def test_dreamsim_never_downloads(tmp_path, monkeypatch):
    package = types.ModuleType("dreamsim")
    package.dreamsim = lambda **_: pytest.fail("it was started without its files")
    monkeypatch.setitem(sys.modules, "dreamsim", package)
    with pytest.raises(NotComputed, match=r"ensemble_lora.*cache_dir"):
        backbones.Official(tmp_path).dreamsim()


def test_dreamsim_leaves_the_hubs_cache_alone(tmp_path, monkeypatch):
    for name in next(weight.contains for weight in weights.manifest() if weight.contains):
        (tmp_path / backbones.DREAMSIM / name).mkdir(parents=True)
    package = types.ModuleType("dreamsim")

    def load(pretrained: bool, device: str, cache_dir: str):
        torch.hub.set_dir(cache_dir)
        return types.SimpleNamespace(embed=lambda frames: frames.flatten(1)), None

    package.dreamsim = load
    monkeypatch.setitem(sys.modules, "dreamsim", package)
    before = torch.hub.get_dir()
    assert backbones.Official(tmp_path).dreamsim()(torch.ones(2, 3, 4, 4)).shape == (2, 48)
    assert torch.hub.get_dir() == before

    def damaged(**_) -> None:
        raise EOFError("Ran out of input")

    package.dreamsim = damaged
    with pytest.raises(NotComputed, match=r"dreamsim cannot be read \(EOFError: Ran out of input\); delete it"):
        backbones.Official(tmp_path).dreamsim()


def test_amt_is_asked_for_the_frame_halfway(tmp_path, monkeypatch):
    class Model(nn.Module):
        def __init__(self, corr_radius: int, corr_lvls: int, num_flows: int):
            super().__init__()
            assert (corr_radius, corr_lvls, num_flows) == (3, 4, 3)
            self.gain = nn.Parameter(torch.zeros(1))

        def forward(self, first, second, embt, scale_factor, eval):
            assert scale_factor == 1.0 and eval
            maps = torch.cat([first, second, embt.repeat(1, 1, *first.shape[2:])], 1)  # as its decoder has it
            assert len(maps) == len(first)
            return {"imgt_pred": self.gain * (first + embt * (second - first))}

    stand_in(monkeypatch, "vbench.third_party.amt.networks.AMT-S").Model = Model
    torch.save({"state_dict": {"gain": torch.full((1,), 2.0)}, "psnr": np.float64(36.0)}, tmp_path / backbones.AMT_S)
    interpolate = backbones.Official(tmp_path).interpolate()
    frames = torch.ones(2, 3, 128, 128)
    assert torch.equal(interpolate(torch.zeros_like(frames), frames), frames)
    with pytest.raises(VBenchError, match="128 x 128"):  # the real one returns NaN, which as bytes would be a score
        interpolate(frames[..., :112], frames[..., :112])


def stand_in(monkeypatch, path: str) -> types.ModuleType:
    """A module of this name, with the packages around it."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    return sys.modules[path]


def test_musiq_is_the_one_of_spaq_on_frames_in_0_1(tmp_path, monkeypatch):
    class MUSIQ(nn.Module):
        """Of pyiqa's: `pretrained` is downloaded unless False; in training mode frames are not normalised."""

        def __init__(self, num_class: int = 1, pretrained=True, pretrained_model_path=None):
            super().__init__()
            assert pretrained is False and pretrained_model_path is None and num_class == 1
            self.head = nn.Linear(3, 1)

        def forward(self, x, return_mos=True, return_dist=False):
            assert not self.training
            return self.head(2 * (x - 0.5).mean((2, 3)))

    stand_in(monkeypatch, "pyiqa.archs.musiq_arch").MUSIQ = MUSIQ
    state = {"module.head.weight": torch.full((1, 3), 5.0), "module.head.bias": torch.tensor([50.0])}
    torch.save(state, tmp_path / backbones.MUSIQ_SPAQ)
    frames = torch.stack([torch.zeros(3, 9, 7), torch.ones(3, 9, 7)])
    assert backbones.Official(tmp_path).musiq()(frames).tolist() == [35.0, 65.0]


class Predictor(nn.Module):
    """Of CoTracker's interface: points of its own grid, answered in the pixels of what it was given."""

    def __init__(self, checkpoint="./checkpoints/scaled_offline.pth", offline=True, v2=False, window_len=60):
        super().__init__()
        assert checkpoint is None and v2 and window_len == 8  # what its hub entry gives for version 2
        self.model = nn.ParameterDict({"way": nn.Parameter(torch.zeros(2))})

    @torch.no_grad()
    def forward(self, video, queries=None, segm_mask=None, grid_size=0, grid_query_frame=0, backward_tracking=False):
        batch, count, colours, height, width = video.shape
        assert (batch, colours, grid_size, queries) == (1, 3, 10, None) and video.max() > 1
        moved = torch.arange(count).reshape(1, count, 1, 1) * self.model["way"]
        tracks = camera.grid(384, 512).reshape(1, 1, 100, 2) + moved
        tracks = tracks * tracks.new_tensor([(width - 1) / 511, (height - 1) / 383])
        return tracks, torch.ones(1, count, 100, dtype=torch.bool)


def test_cotracker_is_version_2_with_its_own_weights(tmp_path, monkeypatch):
    module = stand_in(monkeypatch, "cotracker.predictor")
    module.CoTrackerPredictor = Predictor
    torch.save({"way": torch.tensor([-6.0, 3.0])}, tmp_path / backbones.COTRACKER2)
    frames = np.random.default_rng(0).integers(0, 256, (11, 40, 60, 3)).astype(np.uint8)
    tracks = backbones.Official(tmp_path).tracks()(video_of(frames, 8))
    moved = torch.tensor([-60 * 59 / 511, 30 * 39 / 383])
    assert torch.allclose(tracks[0], camera.grid(40, 60), atol=1e-4)
    assert torch.allclose(tracks[1] - tracks[0], moved.expand(10, 10, 2), atol=1e-4)
    module.CoTrackerPredictor = lambda checkpoint=None, window_len=8: None  # before version 3 had to be told apart
    with pytest.raises(NotComputed, match=r"another CoTracker.*pip install"):
        backbones.Official(tmp_path).tracks()


class Trap:
    """Would make a file when it is unpickled."""

    def __init__(self, function, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Setting:
    """Some object of a training run, which is not at hand where its checkpoint is read."""

    def __init__(self):
        self.rate = 1e-4


def test_other_objects_of_a_checkpoint_stay_inert(tmp_path):
    state = {
        "state_dict": {"weight": torch.arange(6.0).reshape(2, 3)},
        "optim": {"lr": np.float64(1.5)},
        "more": Setting(),
    }
    made = tmp_path / "made by a checkpoint"
    torch.save(state | {"trap": Trap(exec, f"open({str(made)!r}, 'w')")}, tmp_path / "zip.pth")
    read = read_state(tmp_path / "zip.pth", with_others=True)
    assert torch.equal(read["state_dict"]["weight"], state["state_dict"]["weight"])
    assert not made.exists() and not isinstance(read["more"], Setting)


def test_malicious_checkpoints_are_refused(tmp_path):
    made = tmp_path / "made by a checkpoint"
    trap, path = Trap(os.mkdir, str(made)), tmp_path / backbones.AMT_S
    for save in (
        lambda: torch.save({"state_dict": {}, "trap": trap}, path),
        lambda: torch.save({"state_dict": {}, "trap": trap}, path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps(trap)),
    ):
        save()
        for with_others in (True, False):
            with pytest.raises(NotComputed, match=r"amt-s\.pth cannot be read"):
                read_state(path, with_others)
        assert not made.exists()
    pickle.loads(pickle.dumps(trap))
    assert made.exists()  # so the trap works


def test_tracks_are_those_of_the_whole_video_at_the_trackers_size():
    frames = np.random.default_rng(0).integers(0, 256, (11, 40, 60, 3)).astype(np.uint8)
    seen = {}

    def predictor(video: Tensor, grid_size: int):
        seen["video"] = video
        start = camera.grid(384, 512).reshape(1, 1, 100, 2)
        return start + torch.arange(11.0).reshape(1, 11, 1, 1) * torch.tensor([5.0, -3.0]), None

    tracks = plugins.follow(predictor, torch.device("cpu"))(video_of(frames, 8))
    whole = F.interpolate(
        torch.from_numpy(frames).permute(0, 3, 1, 2).float(), (384, 512), mode="bilinear", align_corners=True
    )
    assert torch.allclose(seen["video"], whole[None], atol=1e-3)
    assert torch.allclose(tracks[0], camera.grid(40, 60), atol=1e-4)
    moved = torch.tensor([50 * 59 / 511, -30 * 39 / 383])
    assert torch.allclose(tracks[1] - tracks[0], moved.expand(10, 10, 2), atol=1e-4)


# The tiny ones


def scene(height: int = 64, width: int = 64) -> Tensor:
    """A smooth texture, (1, 3, H, W)."""
    coarse = seeded(0, lambda: torch.rand(1, 3, height // 6, width // 6))
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("way", [(0, 0), (3, 0), (0, -4), (-2, 5), (1.5, -0.5)], ids=str)
def test_flow_of_a_moving_scene(way):
    frame = scene()
    motion = torch.tensor(way, dtype=torch.float32).reshape(1, 2, 1, 1).expand(1, 2, 64, 64)
    moved = classical.warp(frame, -motion)
    found = classical.flow(frame, moved)
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    assert (found - motion)[inner].abs().mean() < 0.15
    half = classical.middle(frame, moved)
    assert (half - classical.warp(frame, -motion / 2))[inner].abs().mean() < 0.02
    if way == (0, 0):
        assert not classical.flow(frame, frame).any() and torch.allclose(half, frame, atol=1e-5)


def test_flow_of_a_sprite_and_of_what_stands_still():
    """Across an edge the motion is right; along it, where the window sees no more than the edge, nothing tells it.

    So the whole error, whose mean is 0.55 pixels a frame, is mostly that along edges; the mean across them is 0.15.
    """
    truths = [truth for truth in (draw_truth((5, i), 17, 1.0, 0.4, 0.0) for i in range(120)) if truth.motion == "moves"]
    whole, across, still, steps = [], [], [], []
    for truth in truths[:15]:
        frames = torch.from_numpy(render(truth, 64, 64)[:4]).permute(0, 3, 1, 2) / 255
        motion = classical.flow(frames[:3], frames[1:]).numpy()
        for t in range(3):
            covered = [sprite_alpha(truth.sprite, t + i, 64, 64) for i in (0, 1)]
            step = 64 * np.diff(truth.sprite.centres_T2, axis=0)[t]
            rim = (covered[0] > 0.99) & (np.abs(frames[t].numpy() - frames[t + 1].numpy()).max(0) > 0.1)
            error = motion[t][:, rim] - step[:, None]
            whole.append(np.linalg.norm(error, axis=0).mean())
            slope = np.stack(np.gradient(covered[0])[::-1])[:, rim]
            edge = np.linalg.norm(slope, axis=0) > 0.05
            normal = slope[:, edge] / np.linalg.norm(slope[:, edge], axis=0)
            across.append(np.abs((error[:, edge] * normal).sum(0)).mean())
            steps.append(np.abs((step[:, None] * normal).sum(0)).mean())
            far = np.ones((64, 64), bool)
            for y, x in np.argwhere(covered[0] + covered[1] > 0):
                far[max(0, y - 8) : y + 9, max(0, x - 8) : x + 9] = False
            still.append(np.abs(motion[t][:, far]).max() if far.any() else 0.0)
    assert max(still) < 0.05
    assert np.mean(across) < 0.2 < np.mean(steps) / 5
    assert np.mean(whole) < 0.65


@pytest.mark.parametrize("at", [0.0, 0.5])
def test_flow_of_many_pairs_is_that_of_each(at):
    worlds = [render(draw_truth((7, i), 4, 1.0, 0.4, 0.0), 64, 48) for i in range(2)]
    frames = torch.from_numpy(np.concatenate(worlds)).permute(0, 3, 1, 2) / 255
    alone = torch.cat([classical.flow(frames[i : i + 1], frames[i + 1 : i + 2], at) for i in range(7)])
    assert alone.abs().max() > 1
    assert torch.allclose(classical.flow(frames[:-1], frames[1:], at), alone, atol=1e-5)


@pytest.mark.parametrize("halfway", [False, True])
def test_blocks_are_matched_as_one_by_one(halfway):
    """Each pixel's displacement is the cheapest of all 169, by loops over those and double precision."""
    first, second = seeded(3, lambda: torch.rand(2, 1, 3, 12, 17))
    found = classical._match(first, second, halfway)[0].numpy().astype(int)
    reach, block = classical.REACH, classical.BLOCK // 2
    a, b = (np.pad(x[0].double().numpy(), ((0, 0), (reach, reach), (reach, reach)), "edge") for x in (first, second))
    for y, x in ((0, 0), (5, 8), (11, 16), (3, 1)):
        costs = {}
        for dy, dx in itertools.product(range(-reach, reach + 1), repeat=2):
            total = []
            for j in range(max(0, y - block), min(12, y + block + 1)):
                for i in range(max(0, x - block), min(17, x + block + 1)):
                    back = (dy, dx) if halfway else (0, 0)
                    p = a[:, reach + j - back[0], reach + i - back[1]]
                    total.append(np.abs(p - b[:, reach + j + dy, reach + i + dx]).mean())
            scale = 2 if halfway else 1
            costs[dx * scale, dy * scale] = np.mean(total) + classical.EFFORT * scale * math.hypot(dx, dy)
        assert tuple(found[:, y, x]) == min(costs, key=costs.get)


def test_larger_frames_are_halved_first():
    frame = scene(160, 192)
    moved = classical.warp(frame, torch.tensor([-9.0, 4.0]).reshape(1, 2, 1, 1).expand(1, 2, 160, 192))
    found = classical.flow(frame, moved)[..., 20:-20, 20:-20]
    assert torch.allclose(found.mean((0, 2, 3)), torch.tensor([9.0, -4.0]), atol=0.3)


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> tuple[quality.QualityNet, Path]:
    state = tmp_path_factory.mktemp("state")
    return quality.quality(state), state


@pytest.mark.slow
def test_quality_falls_with_each_distortion(judge):
    model, _ = judge
    rng = np.random.default_rng(99)
    worlds = [draw_truth((99, i), 1, 1.0, 0.0, 0.25) for i in range(20)]
    clean = [torch.from_numpy(render(world, 64, 64)[0]).permute(2, 0, 1) / 255 for world in worlds]
    best = model(torch.stack(clean)).mean()
    assert best > 85
    for distort in (quality.blur, quality.noise, quality.blocks, quality.ringing):
        scores = [best]
        for strength in (0.25, 0.5, 0.75, 1.0):
            ruined = torch.stack([quality.as_bytes(distort(frame, strength, rng)) for frame in clean])
            scores.append(model(ruined).mean())
        assert scores == sorted(scores, reverse=True), distort.__name__
        assert scores[-1] < 30, distort.__name__


def test_quality_ranks_frames_it_has_not_seen(judge):
    from scipy.stats import spearmanr

    frames, strengths = quality.examples(np.random.default_rng(98), 40, 4)
    assert spearmanr(judge[0](frames), -strengths).statistic > 0.85


def test_quality_is_trained_once_and_again_for_another_recipe(judge, monkeypatch):
    model, state = judge
    frames = scene()
    monkeypatch.setattr(quality, "train", lambda: pytest.fail("it was trained again"))
    assert torch.equal(quality.quality(state)(frames), model(frames))
    monkeypatch.setitem(quality.RECIPE, "seed", 1)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        quality.quality(state)
