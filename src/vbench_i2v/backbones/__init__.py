"""The networks behind the dimensions: the official ones here, the tiny stand-ins in `tiny`."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vbench_i2v.base import OFFICIAL, Backbones
from vbench_i2v.errors import NotComputed

DINO = "dino_vitbase16_pretrain.pth"
CLIP_B32 = "ViT-B-32.pt"
CLIP_L14 = "ViT-L-14.pt"
AESTHETIC = "sa_0_4_vit_l_14_linear.pth"
RAFT_THINGS = "raft-things.pth"
AMT_S = "amt-s.pth"
MUSIQ_SPAQ = "musiq_spaq_ckpt-358bb6af.pth"
COTRACKER2 = "cotracker2.pth"
DREAMSIM = "dreamsim"  # a folder that the package of that name fills


def official(
    weights: Path,
    device: str | torch.device = "cpu",
    clip_dtype: Literal["float32", "float16"] = "float32",
) -> Backbones:
    """The networks that the published scores were made with.

    Args:
        weights: the folder of all weight files, under the names above.
        device: where the networks run.
        clip_dtype: of both CLIP towers; the published scores had float16, and float32 is more exact.
    """
    return Official(weights, torch.device(device), getattr(torch, clip_dtype))


class Official:
    """Loads each network from its original file when it is first asked for."""

    name = OFFICIAL

    def __init__(self, weights: Path, device: torch.device, clip_dtype: torch.dtype):
        self.weights, self.device, self.clip_dtype = weights, device, clip_dtype
        self._loaded: dict[str, Callable] = {}

    def dino(self) -> Callable[[Tensor], Tensor]:
        """DINO ViT-B/16."""
        return self._once(DINO, _dino)

    def clip_b32(self) -> Callable[[Tensor], Tensor]:
        """OpenAI's CLIP ViT-B/32."""
        return self._once(CLIP_B32, self._clip)

    def clip_l14(self) -> Callable[[Tensor], Tensor]:
        """OpenAI's CLIP ViT-L/14."""
        return self._once(CLIP_L14, self._clip)

    def aesthetic_head(self) -> Callable[[Tensor], Tensor]:
        """LAION's linear head."""
        return self._once(AESTHETIC, _aesthetic)

    def raft(self) -> Callable[[Tensor, Tensor], Tensor]:
        """RAFT trained on FlyingChairs and FlyingThings3D."""
        return self._once(RAFT_THINGS, _raft)

    def dreamsim(self) -> Callable[[Tensor], Tensor]:
        """DreamSim's ensemble, from the package of that name."""
        from vbench_i2v.backbones import plugins

        return self._plugin(DREAMSIM, plugins.dreamsim)

    def interpolate(self) -> Callable[[Tensor, Tensor], Tensor]:
        """AMT-S, from VBench's package."""
        from vbench_i2v.backbones import plugins

        return self._plugin(AMT_S, plugins.amt_s)

    def musiq(self) -> Callable[[Tensor], Tensor]:
        """MUSIQ-SPAQ, from pyiqa."""
        from vbench_i2v.backbones import plugins

        return self._plugin(MUSIQ_SPAQ, plugins.musiq)

    def tracks(self) -> Callable:
        """CoTracker2, from its package."""
        from vbench_i2v.backbones import plugins

        return self._plugin(COTRACKER2, plugins.cotracker2)

    def _clip(self, path: Path) -> Callable[[Tensor], Tensor]:
        from vbench_i2v.backbones import clip

        model = clip.load(path, self.clip_dtype).to(self.device)
        return lambda frames: model(frames.to(self.clip_dtype)).image_embeds

    def _once(self, file: str, build: Callable[[Path], Callable]) -> Callable:
        """The network in a file of the weights folder, which has to be there."""
        if file not in self._loaded:
            path = require(self.weights / file)
            network = build(path)
            self._loaded[file] = network.to(self.device) if isinstance(network, nn.Module) else network
        return self._loaded[file]

    def _plugin(self, file: str, build: Callable[[Path, torch.device], Callable]) -> Callable:
        """The same for a network whose code the user installs."""
        if file not in self._loaded:
            self._loaded[file] = build(self.weights / file, self.device)
        return self._loaded[file]


def require(path: Path) -> Path:
    """The path of a weight file.

    Raises:
        NotComputed: there is no such file.
    """
    if not path.exists():
        raise NotComputed(f"{path} is missing; `vbench-i2v weights --check` tells where it comes from, --fetch gets it")
    return path


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, without running what else may be pickled in it.

    Raises:
        NotComputed: the file is damaged, or holds something else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load names no error of its own
        first = str(error).strip().splitlines()[0]
        raise NotComputed(f"{path} cannot be read ({first}); fetch it again") from error


def fill(path: Path, load: Callable[[dict[str, Tensor]], object], state: dict[str, Tensor]) -> None:
    """Put a file's tensors into a network.

    Raises:
        NotComputed: names or shapes are not this network's.
    """
    try:
        load(state)
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise NotComputed(f"{path} holds other weights than this network's ({first}); fetch it again") from error


def _dino(path: Path) -> nn.Module:
    from vbench_i2v.backbones.dino import DinoViT

    model = DinoViT()
    fill(path, model.load_state_dict, read_state(path))
    return model.eval().requires_grad_(False)


def _aesthetic(path: Path) -> nn.Module:
    head = nn.Linear(768, 1)
    fill(path, head.load_state_dict, read_state(path))
    return head.eval().requires_grad_(False)


def _raft(path: Path) -> nn.Module:
    from vbench_i2v.backbones.raft import RAFT

    model = RAFT()
    fill(path, model.load_original, read_state(path))
    return model.eval().requires_grad_(False)
