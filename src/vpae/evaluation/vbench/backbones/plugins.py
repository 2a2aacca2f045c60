"""The networks whose code is not free for every use, or drags much along: the user installs them, this connects them.

    AMT-S       pip install torchvision; pip install --no-deps vbench==0.1.5        CC BY-NC 4.0
    CoTracker2  pip install git+https://github.com/facebookresearch/co-tracker      CC BY-NC 4.0
    MUSIQ       pip install -c constraints.txt -e '.[vbench]'  (pyiqa)              PolyForm Noncommercial
    DreamSim    pip install -c constraints.txt -e '.[vbench]'  (dreamsim)           MIT

None of them has run with its published weights here, since those were not at hand. What was tried:

    AMT-S       the code of vbench 0.1.5 with random weights: size, batches, sizes that give NaN
    MUSIQ       the code of pyiqa 0.1.10, which VBench's pins give, with random weights: size, batches
    CoTracker2  not run; calls compared with its predictor at commit e52c27e
    DreamSim    not run; calls and file names compared with the code of dreamsim 0.2.1
"""

import importlib
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vpae.evaluation.vbench.backbones import fill, read_state, require
from vpae.evaluation.vbench.backbones.raft import SMALLEST
from vpae.evaluation.vbench.base import NotComputed
from vpae.evaluation.vbench.camera import GRID
from vpae.evaluation.vbench.video import Video

DREAMSIM_FILES = (
    "dino_vitb16_pretrain.pth",
    "clip_vitb16_pretrain.pth.tar",
    "open_clip_vitb16_pretrain.pth.tar",
    "ensemble_lora",
    "facebookresearch_dino_main",
    "checkpoints/dino_vitbase16_pretrain.pth",
)
EXTRA = "pip install -c constraints.txt -e '.[vbench]'"
TRACKER_SIZE = (384, 512)  # what CoTracker resizes every video to


def amt_s(path: Path, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """AMT-S at t = 0.5 and scale 1, from the code that VBench's package carries and `amt-s.pth`.

    Below 128 pixels it raises `NotComputed`, where the original returns NaN, as RAFT does.
    """
    module = _installed(
        "vbench.third_party.amt.networks.AMT-S",
        "motion_smoothness needs AMT-S",
        "pip install torchvision && pip install --no-deps vbench==0.1.5",
    )
    model = module.Model(corr_radius=3, corr_lvls=4, num_flows=3)
    fill(require(path), lambda state: model.load_state_dict(state["state_dict"]), read_tensors(path))
    model = model.eval().requires_grad_(False).to(device)

    def middle(first: Tensor, second: Tensor) -> Tensor:
        if min(first.shape[-2:]) < SMALLEST:
            raise NotComputed(f"AMT-S needs frames of {SMALLEST} x {SMALLEST} pixels or more; these have fewer")
        halfway = torch.full((len(first), 1, 1, 1), 0.5, device=device)
        return model(first, second, halfway, scale_factor=1.0, eval=True)["imgt_pred"]

    return middle


def cotracker2(path: Path, device: torch.device) -> Callable[[Video], Tensor]:
    """CoTracker2 over the whole video, points on a 10 x 10 grid of the first frame.

    The video is brought to the tracker's own size chunk by chunk, as the tracker would do with the whole of it, so that
    it never lies in memory at full size. VBench asks the torch hub for `cotracker2` of no certain version; the hub's
    entry of that name has at times built CoTracker3 (commit 0b6edd2), so published values may be of either.
    """
    module = _installed(
        "cotracker.predictor",
        "camera_motion needs CoTracker2",
        "pip install git+https://github.com/facebookresearch/co-tracker",
    )
    try:
        predictor = module.CoTrackerPredictor(checkpoint=None, v2=True, window_len=8)
    except TypeError as error:
        raise NotComputed(f"camera_motion needs a newer CoTracker ({error}); install its main branch again") from error
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
    module = _installed("pyiqa.archs.musiq_arch", "imaging_quality needs MUSIQ", EXTRA)
    model = module.MUSIQ(pretrained=False)
    state = {name.removeprefix("module."): value for name, value in read_state(require(path)).items()}
    fill(path, model.load_state_dict, state)
    model = model.eval().requires_grad_(False).to(device)
    return lambda frames: model(frames).flatten()


def dreamsim(folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """DreamSim's ensemble from a folder that holds all it would otherwise download."""
    module = _installed("dreamsim", "i2v_background needs DreamSim", EXTRA)
    missing = [name for name in DREAMSIM_FILES if not (folder / name).exists()]
    if missing:
        raise NotComputed(
            f'{folder} lacks {", ".join(missing)}; where there is internet, run once: python -c "from dreamsim import '
            f"dreamsim; dreamsim(pretrained=True, device='cpu', cache_dir='{folder}')\""
        )
    hub = torch.hub.get_dir()
    try:
        model, _ = module.dreamsim(pretrained=True, device=str(device), cache_dir=str(folder))
    finally:
        torch.hub.set_dir(hub)  # it moves the cache of the whole process
    return model.embed


def _installed(module: str, need: str, remedy: str) -> types.ModuleType:
    """Import what the user installs.

    Raises:
        NotComputed: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # torchvision beside another torch raises RuntimeError
        raise NotComputed(f"{need}, and {module} cannot be imported ({error}); install it: {remedy}") from error


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
