"""The packages that read VBench's networks, for real and with random weights, where docs/vbench.md's environment is.

pip install -c constraints.txt -e '.[vbench]' && pip install --no-deps -r workflow/envs/vbench.txt
"""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from synthetic import video_of
from vbench_i2v import backbones, dimensions, weights
from vbench_i2v.backbones import clip
from vbench_i2v.base import Item
from vbench_i2v.packages import imported


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None,
        reason=f"{package} is not installed; docs/vbench.md tells the environment",
    )


@pytest.mark.parametrize("weight", [w for w in weights.manifest() if w.module], ids=lambda w: w.module)
def test_what_reads_the_weights_is_imported(weight: weights.Weight) -> None:
    package = weight.module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; docs/vbench.md tells the environment")
    assert imported(weight.module).__name__ == weight.module


@needs("pyiqa")
def test_musiq_of_pyiqa_scores_a_video(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = imported("pyiqa.archs.musiq_arch").MUSIQ(pretrained=False).eval()
    assert sum(weight.numel() for weight in net.parameters()) == 27_125_825
    torch.save({f"module.{name}": value for name, value in net.state_dict().items()}, tmp_path / backbones.MUSIQ_SPAQ)
    frames_THW3 = np.random.default_rng(0).integers(0, 256, (3, 96, 160, 3), dtype=np.uint8)
    official = backbones.Official(tmp_path)
    record = dimensions.imaging_quality(video_of(frames_THW3, 8), Item(tmp_path / "a.mp4"), official)
    with torch.no_grad():
        alone = [net(torch.from_numpy(frame).permute(2, 0, 1)[None] / 255).item() for frame in frames_THW3]
    assert len(set(alone)) == 3 and record["video_results"] == pytest.approx(math.fsum(alone) / 3, rel=1e-5)


@needs("vbench")
def test_amt_of_vbench_interpolates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = imported("vbench.third_party.amt.networks.AMT-S").Model(corr_radius=3, corr_lvls=4, num_flows=3).eval()
    assert sum(weight.numel() for weight in net.parameters()) == 2_990_543
    torch.save({"state_dict": net.state_dict(), "psnr": np.float64(36.0)}, tmp_path / backbones.AMT_S)
    pair = torch.rand(2, 1, 3, 128, 160)
    with torch.no_grad():
        found = backbones.Official(tmp_path).interpolate()(*pair)
        expected = net(*pair, torch.full((1, 1, 1), 0.5)[None], scale_factor=1.0, eval=True)["imgt_pred"]
    assert found.shape == pair[0].shape and torch.equal(found, expected)


@needs("clip")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_clip_is_openais_bit_for_bit_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = imported("clip.model")
    net = module.CLIP(64, 64, 4, 256, 16, 8, 50, 64, 1, 1).eval()
    for weight in net.visual.parameters():
        weight.data += 0.3 * torch.randn_like(weight) * (weight.ndim == 1)  # of layer norms, above all
    module.convert_weights(net)
    ours = clip.in_dtype(clip.from_openai(net.state_dict()), dtype)
    theirs = net if dtype == torch.float16 else net.float()
    images = torch.randn(6, 3, 64, 64).to(dtype)
    with torch.no_grad():
        difference = (ours(images).image_embeds - theirs.encode_image(images)).abs().max().item()
    assert difference == 0 if dtype == torch.float16 else difference < 1e-5
