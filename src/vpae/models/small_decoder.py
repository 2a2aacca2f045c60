"""A small decoder in the VAE's place: taew2.1 (github.com/madebyollin/taehv), which takes normalised latents.

9.8M weights instead of the VAE decoder's 73M, of two-dimensional convolutions that remember one frame. They come from a
local file, `taew2_1.safetensors` or `taew2_1.pth` as published; its encoder's, if they are there, are left out.
Axes: B batch, C channels, t frames of one latent frame, F latent frames, T frames, H, W.
"""

from pathlib import Path
from textwrap import shorten

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from vpae.artifacts import ArtifactError
from vpae.config import VAE_STRIDE

MOST_SAID = 600  # characters of torch's list of weights that are missing, too many, or of another shape
SUFFIXES = (".safetensors", ".pth")
WIDTHS = (256, 128, 64)
REPEATS = (1, 2, 2)  # frames that each level makes of one


def _convolution(width: int, out: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(width, out, 3, padding=1, bias=bias)


class _Bounded(nn.Module):
    """Keeps latents within what the network was trained on, smoothly: |x| < 3."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class _Remembering(nn.Module):
    """A residual block that sees each frame beside the one before it."""

    def __init__(self, width: int):
        super().__init__()
        layers = [_convolution(2 * width, width), nn.ReLU(), _convolution(width, width), nn.ReLU()]
        self.conv = nn.Sequential(*layers, _convolution(width, width))

    def forward(self, x_BtCHW: Tensor, before_B1CHW: Tensor) -> Tensor:
        """Frames in their order, and the one before the first of them."""
        shifted = torch.cat([before_B1CHW, x_BtCHW[:, :-1]], dim=1)
        both = torch.cat([x_BtCHW, shifted], dim=2).flatten(0, 1)
        return torch.relu(x_BtCHW + self.conv(both).unflatten(0, x_BtCHW.shape[:2]))


class _Repeating(nn.Module):
    """Makes several frames of each one."""

    def __init__(self, width: int, times: int):
        super().__init__()
        self.times, self.conv = times, nn.Conv2d(width, width * times, 1, bias=False)


class SmallDecoder(nn.Module):
    """The published network, with its names of weights: `decoder.N...`."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_Bounded(), _convolution(16, WIDTHS[0]), nn.ReLU()]
        for width, after, times in zip(WIDTHS, (*WIDTHS[1:], WIDTHS[-1]), REPEATS, strict=True):
            layers += [_Remembering(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), _Repeating(width, times), _convolution(width, after, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _convolution(WIDTHS[-1], 3))

    @torch.no_grad()
    def decode(self, x_BCFHW: Tensor) -> Tensor:
        """Normalised latents (B, 16, F, H, W) -> pixels (B, 3, T, 8 H, 8 W) in [0, 1], T = 4 F - 3.

        One latent frame after the other, so that memory does not grow with the length. The first three of the 4 F
        frames are before the video: the VAE's first latent frame is a single one.
        """
        remembered: dict[int, Tensor] = {}
        weight = self.decoder[1].weight
        frames = [self._next(x.to(weight)[:, None], remembered) for x in x_BCFHW.unbind(2)]
        return rearrange(torch.cat(frames, dim=1)[:, VAE_STRIDE[0] - 1 :].clamp(0, 1), "b t c h w -> b c t h w")

    def _next(self, x_BtCHW: Tensor, remembered: dict[int, Tensor]) -> Tensor:
        """The four frames (B, 4, 3, 8 H, 8 W) of a latent frame (B, 1, 16, H, W), given what was remembered."""
        for index, layer in enumerate(self.decoder):
            if isinstance(layer, _Remembering):
                before, remembered[index] = remembered.get(index, torch.zeros_like(x_BtCHW[:, :1])), x_BtCHW[:, -1:]
                x_BtCHW = layer(x_BtCHW, before)
                continue
            run = layer.conv if isinstance(layer, _Repeating) else layer
            x = run(x_BtCHW.flatten(0, 1)).unflatten(0, x_BtCHW.shape[:2])
            x_BtCHW = rearrange(x, "b t (n c) h w -> b (t n) c h w", n=getattr(layer, "times", 1))
        return x_BtCHW


def load_small_decoder(file: Path | str, dtype: torch.dtype = torch.float32) -> SmallDecoder:
    """The decoder in a file.

    Raises:
        ArtifactError: there is no such file, or it is not of this network; torch's own message names the weights.
    """
    file = Path(file)
    with torch.device("meta"):
        decoder = SmallDecoder()
    wanted = decoder.state_dict()
    found = {name: value for name, value in _tensors(file).items() if not name.startswith("encoder.")}
    for name, value in found.items():
        if name in wanted and name.endswith(".conv.weight") and value.ndim == 4 and len(value) > len(wanted[name]):
            found[name] = value[-len(wanted[name]) :]  # of several frames that it could make, the last ones
    try:
        decoder.load_state_dict(found, assign=True)
    except RuntimeError as error:
        strange = sorted(found.keys() - wanted)[:3]
        holds = f"It holds {', '.join(strange)}, which are none of its weights. " if strange else ""
        raise ArtifactError(
            f"{file}: these are not the weights of taew2.1; take taew2_1.safetensors or taew2_1.pth of "
            "github.com/madebyollin/taehv (those of other models have other names). "
            f"{holds}{shorten(str(error), MOST_SAID)}"
        ) from error
    return decoder.to(dtype).eval().requires_grad_(False)


def _tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ArtifactError(f"{file}: there is no such file; download taew2_1.safetensors, or correct the path")
    if file.suffix not in SUFFIXES:
        raise ArtifactError(f"{file}: a decoder is read from {' or '.join(SUFFIXES)} alone; name such a file")
    try:
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    except Exception as error:  # torch.load names no error of its own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"{file}: damaged, or no file of weights ({first[:120]}); download it again") from error
