"""RAFT (Teed and Deng 2020), the large model, with the names of `raft-things.pth`.

Equals torchvision's `raft_large` with the same weights; written here so that the evaluation needs no torchvision.
Axes: B pairs of frames, C channels, H/W height and width of the frames, h/w an eighth of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbench_i2v.errors import VBenchError

LEVELS = 4  # of the correlation pyramid
RADIUS = 4  # of the window looked up at each level, in pixels of that level
UPDATES = 20  # what VBench runs
SMALLEST = 128  # pixels a side, so that the coarsest correlations still have two


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut: the identity, or a strided 1 x 1 convolution."""

    def __init__(self, inputs: int, outputs: int, norm: type[nn.Module], stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norm1, self.norm2 = norm(outputs), norm(outputs)
        self.downsample = None
        if stride != 1:
            # The original file names this norm twice; `renamed` drops the other name.
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu((x if self.downsample is None else self.downsample(x)) + y)


class Encoder(nn.Module):
    """Frames (B, 3, H, W) -> features (B, C, h, w)."""

    def __init__(self, widths: tuple[int, int, int], outputs: int, norm: type[nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3)
        self.norm1 = norm(widths[0])
        self.layer1 = nn.Sequential(Residual(widths[0], widths[0], norm, 1), Residual(widths[0], widths[0], norm, 1))
        self.layer2 = nn.Sequential(Residual(widths[0], widths[1], norm, 2), Residual(widths[1], widths[1], norm, 1))
        self.layer3 = nn.Sequential(Residual(widths[1], widths[2], norm, 2), Residual(widths[2], widths[2], norm, 1))
        self.conv2 = nn.Conv2d(widths[2], outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class MotionEncoder(nn.Module):
    """Correlations and present flow -> what the recurrent unit sees of motion, (B, `hidden`, h, w)."""

    def __init__(self, hidden: int):
        super().__init__()
        self.convc1 = nn.Conv2d(LEVELS * (2 * RADIUS + 1) ** 2, 2 * hidden, 1)
        self.convc2 = nn.Conv2d(2 * hidden, 3 * hidden // 2, 3, padding=1)
        self.convf1 = nn.Conv2d(2, hidden, 7, padding=3)
        self.convf2 = nn.Conv2d(hidden, hidden // 2, 3, padding=1)
        self.conv = nn.Conv2d(2 * hidden, hidden - 2, 3, padding=1)

    def forward(self, flow: Tensor, correlation: Tensor) -> Tensor:
        seen = F.relu(self.convc2(F.relu(self.convc1(correlation))))
        moved = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([seen, moved], 1))), flow], 1)


class RecurrentUnit(nn.Module):
    """A convolutional GRU, first along rows, then along columns."""

    def __init__(self, hidden: int, inputs: int):
        super().__init__()
        for number, kernel in ((1, (1, 5)), (2, (5, 1))):
            for gate in "zrq":
                padding = (kernel[0] // 2, kernel[1] // 2)
                self.add_module(f"conv{gate}{number}", nn.Conv2d(hidden + inputs, hidden, kernel, padding=padding))

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        for number in (1, 2):
            convz, convr, convq = (getattr(self, f"conv{gate}{number}") for gate in "zrq")
            both = torch.cat([hidden, x], 1)
            update, reset = torch.sigmoid(convz(both)), torch.sigmoid(convr(both))
            hidden = (1 - update) * hidden + update * torch.tanh(convq(torch.cat([reset * hidden, x], 1)))
        return hidden


class FlowHead(nn.Module):
    """Hidden state -> change of the flow."""

    def __init__(self, hidden: int):
        super().__init__()
        self.conv1 = nn.Conv2d(hidden, 2 * hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(2 * hidden, 2, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(hidden)))


class UpdateBlock(nn.Module):
    """One refinement: new hidden state, change of the flow, and the weights that bring it to full size."""

    def __init__(self, hidden: int, context: int):
        super().__init__()
        self.encoder = MotionEncoder(hidden)
        self.gru = RecurrentUnit(hidden, hidden + context)
        self.flow_head = FlowHead(hidden)
        self.mask = nn.Sequential(
            nn.Conv2d(hidden, 2 * hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(2 * hidden, 64 * 9, 1)
        )

    def forward(self, hidden: Tensor, context: Tensor, correlation: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.gru(hidden, torch.cat([context, self.encoder(flow, correlation)], 1))
        return hidden, self.flow_head(hidden)


class RAFT(nn.Module):
    """Optical flow in pixels (x, y) from `first` to `second`: twice (B, 3, H, W) in [0, 255] -> (B, 2, H, W).

    H and W must be multiples of 8; below 128 pixels it raises `VBenchError`, where the original returns NaN.

    Args:
        widths: channels of the encoders' three stages.
        features: channels of the features that are correlated.
        hidden: channels of the hidden state, and of the context beside it.
    """

    def __init__(self, widths: tuple[int, int, int] = (64, 96, 128), features: int = 256, hidden: int = 128):
        super().__init__()
        self.hidden = hidden
        self.fnet = Encoder(widths, features, nn.InstanceNorm2d)
        self.cnet = Encoder(widths, 2 * hidden, nn.BatchNorm2d)
        self.update_block = UpdateBlock(hidden, hidden)

    def forward(self, first: Tensor, second: Tensor, updates: int = UPDATES) -> Tensor:
        if min(first.shape[-2:]) < SMALLEST:
            raise VBenchError(f"RAFT needs frames of {SMALLEST} x {SMALLEST} pixels or more; these have fewer")
        first, second = (2 * (frame / 255) - 1 for frame in (first, second))
        features = self.fnet(torch.cat([first, second]))
        pyramid = correlation_pyramid(*features.chunk(2))
        hidden, context = self.cnet(first).split(self.hidden, 1)
        hidden, context = torch.tanh(hidden), torch.relu(context)
        start = pixel_grid(hidden)
        flow = torch.zeros_like(start)
        for _ in range(updates):
            hidden, change = self.update_block(hidden, context, look_up(pyramid, start + flow), flow)
            flow = flow + change
        return enlarge(flow, 0.25 * self.update_block.mask(hidden))


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `raft-things.pth`, which were saved from a parallel wrapper, with one norm named twice."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items() if ".norm3." not in name}


def pixel_grid(like: Tensor) -> Tensor:
    """The pixels' own coordinates (x, y), (B, 2, h, w)."""
    batch, _, height, width = like.shape
    y, x = torch.meshgrid(
        torch.arange(height, device=like.device), torch.arange(width, device=like.device), indexing="ij"
    )
    return torch.stack([x, y]).to(like.dtype).expand(batch, -1, -1, -1)


def correlation_pyramid(first: Tensor, second: Tensor) -> list[Tensor]:
    """Dot products of all pixels of `first` (B, C, h, w) with all of `second` / sqrt(C): (B h w, 1, h, w), then halved
    three times."""
    batch, channels, height, width = first.shape
    products = torch.einsum("bci,bcj->bij", first.flatten(2), second.flatten(2)) / channels**0.5
    levels = [products.reshape(batch * height * width, 1, height, width)]
    for _ in range(LEVELS - 1):
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


def look_up(pyramid: list[Tensor], centres: Tensor) -> Tensor:
    """Correlations in a 9 x 9 window around where each pixel went, at each level: (B, 4 x 81, h, w).

    The original adds row offsets to x and column offsets to y, so that the window is transposed.
    """
    batch, _, height, width = centres.shape
    offsets = torch.arange(-RADIUS, RADIUS + 1, dtype=centres.dtype, device=centres.device)
    window = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), dim=-1)
    points = centres.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
    found = []
    for level, products in enumerate(pyramid):
        size = torch.tensor([products.shape[3] - 1, products.shape[2] - 1], device=centres.device)
        at = 2 * (points / 2**level + window) / size - 1
        found.append(F.grid_sample(products, at, align_corners=True).reshape(batch, height, width, -1))
    return torch.cat(found, dim=-1).permute(0, 3, 1, 2)


def enlarge(flow: Tensor, weights: Tensor) -> Tensor:
    """Eight times larger: each pixel is a weighted mean of the 3 x 3 coarse ones around it."""
    batch, _, height, width = flow.shape
    weights = weights.reshape(batch, 1, 9, 8, 8, height, width).softmax(dim=2)
    around = F.unfold(8 * flow, 3, padding=1).reshape(batch, 2, 9, 1, 1, height, width)
    return (weights * around).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, 8 * height, 8 * width)
