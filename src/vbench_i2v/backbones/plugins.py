"""The networks whose code is not free for every use, or drags much along: the user installs them, this connects them.

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

from vbench_i2v.backbones import fill, read_state, require
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
    fill(require(path), lambda state: model.load_state_dict(state["state_dict"]), read_tensors(path))
    model = model.eval().requires_grad_(False).to(device)

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
    fill(require(path), predictor.model.load_state_dict, read_state(path))
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
    model = module.MUSIQ(pretrained=False)
    state = {name.removeprefix("module."): value for name, value in read_state(require(path)).items()}
    fill(path, model.load_state_dict, state)
    model = model.eval().requires_grad_(False).to(device)
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


class _Inert(dict):
    """Stands for every object in a checkpoint that is no tensor; nothing of it is kept."""

    def __init__(self, *_args: object, **_named: object):
        super().__init__()

    def __setstate__(self, _state: object) -> None:
        pass


def read_tensors(path: Path) -> dict:
    """A checkpoint that also holds other objects, which PyTorch's reader of weights alone would refuse: AMT's trainer
    keeps the state of its optimiser, with NumPy's numbers. They become inert, and no code of theirs runs.

    Raises:
        NotComputed: the file is damaged, of PyTorch's format before 1.6, or names modules that PyTorch never reads.
    """
    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in others]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load names no error of its own
        raise NotComputed(f"{path} cannot be read ({str(error).strip().splitlines()[0]}); fetch it again") from error
