"""The networks whose code is not free for every use, or needs many packages: users install them, this connects them.

    AMT-S       vbench 0.1.5       CC BY-NC 4.0
    CoTracker2  cotracker          CC BY-NC 4.0
    MUSIQ       pyiqa 0.1.16       PolyForm Noncommercial 1.0.0
    DreamSim    dreamsim 0.2.1     MIT

None of them has run with its published weights here, since those were not at hand. What was tried: see docs/vbench.md.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vbench_i2v.backbones.checkpoints import fill
from vbench_i2v.backbones.raft import SMALLEST
from vbench_i2v.camera import GRID
from vbench_i2v.errors import NotComputed, VBenchError
from vbench_i2v.packages import ENVIRONMENT, imported
from vbench_i2v.video import Video
from vbench_i2v.weights import filling, manifest

TRACKER_SIZE = (384, 512)  # what CoTracker resizes every video to


def amt_s(path: Path, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """AMT-S at t = 0.5 and scale 1, from the code that VBench's package carries and `amt-s.pth`.

    Below 128 pixels it raises `VBenchError`, where the original returns NaN, as RAFT does.
    """
    module = imported("vbench.third_party.amt.networks.AMT-S")
    model = module.Model(corr_radius=3, corr_lvls=4, num_flows=3)
    model = fill(model, path, device, lambda state: state["state_dict"], with_others=True)

    def middle(first: Tensor, second: Tensor) -> Tensor:
        if min(first.shape[-2:]) < SMALLEST:
            raise VBenchError(f"AMT-S needs frames of {SMALLEST} x {SMALLEST} pixels or more; these have fewer")
        halfway = torch.full((len(first), 1, 1, 1), 0.5, device=device)
        return model(first, second, halfway, scale_factor=1.0, eval=True)["imgt_pred"]

    return middle


def cotracker2(path: Path, device: torch.device) -> Callable[[Video], Tensor]:
    """CoTracker2 over the whole video, points on a 10 x 10 grid of the first frame.

    The video is brought to the tracker's own size chunk by chunk, as the tracker would do with the whole of it, so that
    it never lies in memory at full size. VBench asks the torch hub for `cotracker2` of no certain version; the hub's
    entry of that name has at times built CoTracker3 (commit 0b6edd2), so published values may be of either.
    """
    module = imported("cotracker.predictor")
    try:
        predictor = module.CoTrackerPredictor(checkpoint=None, v2=True, window_len=8)
    except TypeError as error:
        raise NotComputed(f"camera_motion needs another CoTracker ({error}); {ENVIRONMENT}") from error
    fill(predictor.model, path, device)
    return follow(predictor.eval().to(device), device)


def follow(predictor: Callable[..., tuple[Tensor, Tensor]], device: torch.device) -> Callable[[Video], Tensor]:
    """First and last positions by a predictor of CoTracker's kind: video (1, T, 3, H, W) in [0, 255] and `grid_size`
    -> tracks (1, T, P, 2) in that video's pixels, and visibilities."""

    @torch.no_grad()
    def tracks(video: Video) -> Tensor:
        small = [
            F.interpolate(chunk.to(device).float(), TRACKER_SIZE, mode="bilinear", align_corners=True)
            for chunk in video.chunks()
        ]
        found, _ = predictor(torch.cat(small)[None], grid_size=GRID)
        scale = [(video.width - 1) / (TRACKER_SIZE[1] - 1), (video.height - 1) / (TRACKER_SIZE[0] - 1)]
        return (found[0, [0, -1]] * found.new_tensor(scale)).reshape(2, GRID, GRID, 2)

    return tracks


def musiq(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """MUSIQ trained on SPAQ, from pyiqa's code and its checkpoint; pyiqa itself downloads nothing here."""
    module = imported("pyiqa.archs.musiq_arch")

    def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix("module."): value for name, value in state.items()}

    model = fill(module.MUSIQ(pretrained=False), path, device, renamed)
    return lambda frames: model(frames).flatten()


def dreamsim(folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """DreamSim's ensemble from a folder that holds all it would otherwise download."""
    module = imported("dreamsim")
    (weight,) = (weight for weight in manifest() if weight.contains)
    if problem := weight.problem(folder.parent):
        raise NotComputed(f"{folder}: {problem}; where there is internet, run: {filling(folder)}")
    hub = torch.hub.get_dir()
    try:
        model, _ = module.dreamsim(pretrained=True, device=str(device), cache_dir=str(folder))
    except ImportError as error:
        raise NotComputed(f"dreamsim cannot be used ({error}); {ENVIRONMENT}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged checkpoint raises anything
        what = f"{folder} cannot be read ({type(error).__name__}: {error})"
        raise NotComputed(f"{what}; delete it, and where there is internet, run: {filling(folder)}") from error
    finally:
        torch.hub.set_dir(hub)  # it moves the cache of the whole process
    return model.embed
