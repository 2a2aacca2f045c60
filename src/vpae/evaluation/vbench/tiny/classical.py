"""Motion without a trained network: whole pixels by matching blocks, fractions after Lucas and Kanade (1981).

Meant for frames of about 64 x 64 pixels, whose motion may be some eight pixels.
Axes: N pairs of frames, K displacements, H height, W width, 3 colours; flow (N, 2, H, W) in pixels (x, y).
"""

import itertools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vbench_i2v import camera
from vbench_i2v.video import Video

LARGEST = 128  # pixels of the shorter side, below which blocks are matched; larger frames are halved
REACH = 6  # whole pixels that a block is looked for in each direction
BLOCK = 7  # pixels a side
EFFORT = 1e-3  # brightness (0 to 1) by which a match must be better for each pixel that it is farther away
STEPS = 2  # refinements to fractions of a pixel
WINDOW = 1.5  # standard deviation, in pixels, of the window that is refined as one
FLAT = 2e-4  # mean squared gradient below which a window says little


def flow(first_N3HW: Tensor, second_N3HW: Tensor, at: float = 0.0) -> Tensor:
    """Motion from the first frames to the second, both in [0, 1].

    Args:
        first_N3HW, second_N3HW: the frames.
        at: when the pixels are meant: 0 in the first frame, 0.5 halfway.
    """
    pyramid = [(first_N3HW, second_N3HW)]
    while min(pyramid[-1][0].shape[-2:]) >= LARGEST:
        pyramid.append(tuple(F.avg_pool2d(frame, 2, ceil_mode=True) for frame in pyramid[-1]))
    motion = _match(*pyramid[-1], halfway=at == 0.5)
    for first, second in reversed(pyramid):
        if motion.shape[-2:] != first.shape[-2:]:
            motion = 2 * F.interpolate(motion, first.shape[-2:], mode="bilinear", align_corners=False)
        for _ in range(STEPS):
            motion = _median(motion + _step(warp(first, -at * motion), warp(second, (1 - at) * motion)))
    return motion


def _match(first_N3HW: Tensor, second_N3HW: Tensor, halfway: bool) -> Tensor:
    """The displacement of the block around each pixel that fits best, nearer ones first.

    Halfway, both frames are displaced, so that the motion is an even number of pixels.
    """
    height, width = first_N3HW.shape[-2:]
    # Colours first: their sum then runs along memory.
    first_3NHW, second_3NHW = (
        F.pad(frames, (REACH,) * 4, mode="replicate").transpose(0, 1).contiguous()
        for frames in (first_N3HW, second_N3HW)
    )
    counted_HW = _block_sums(first_N3HW.new_ones(height, width))
    best_NHW = first_N3HW.new_full((len(first_N3HW), height, width), torch.inf)
    motion_N2HW = torch.zeros_like(first_N3HW[:, :2])
    for dy, dx in itertools.product(range(-REACH, REACH + 1), repeat=2):
        still_3NHW = first_3NHW[:, :, REACH - halfway * dy :, REACH - halfway * dx :][..., :height, :width]
        moved_3NHW = second_3NHW[:, :, REACH + dy :, REACH + dx :][..., :height, :width]
        cost_NHW = _block_sums((still_3NHW - moved_3NHW).abs_().mean(0)) / counted_HW
        cost_NHW += EFFORT * (1 + halfway) * math.hypot(dx, dy)
        better_NHW = cost_NHW < best_NHW
        best_NHW = torch.minimum(best_NHW, cost_NHW)
        motion_N2HW[:, 0].masked_fill_(better_NHW, (1 + halfway) * dx)
        motion_N2HW[:, 1].masked_fill_(better_NHW, (1 + halfway) * dy)
    return motion_N2HW


def _block_sums(x_NHW: Tensor) -> Tensor:
    """Over the block around each pixel, as far as it lies in the frame; sums of rows, then of those."""
    for axis in (-2, -1):
        length = x_NHW.shape[axis]
        border = (BLOCK // 2, BLOCK // 2) if axis == -1 else (0, 0, BLOCK // 2, BLOCK // 2)
        padded = F.pad(x_NHW, border)
        x_NHW = padded.narrow(axis, 0, length).clone()
        for start in range(1, BLOCK):
            x_NHW += padded.narrow(axis, start, length)
    return x_NHW


def _step(first: Tensor, second: Tensor) -> Tensor:
    """The small motion that explains what is left, by least squares in a window; one pixel at most."""
    mean = F.pad((first + second) / 2, (1, 1, 1, 1), mode="replicate")
    slope_x = (mean[..., 1:-1, 2:] - mean[..., 1:-1, :-2]) / 2
    slope_y = (mean[..., 2:, 1:-1] - mean[..., :-2, 1:-1]) / 2
    change = second - first
    products = (slope_x**2, slope_x * slope_y, slope_y**2, slope_x * change, slope_y * change)
    xx, xy, yy, xt, yt = gaussian(torch.stack([p.sum(1) for p in products], 1), WINDOW, round(2 * WINDOW)).unbind(1)
    xx, yy = xx + FLAT, yy + FLAT
    solved = torch.stack([xy * yt - yy * xt, xy * xt - xx * yt], 1) / (xx * yy - xy**2)[:, None]
    return solved.clamp(-1, 1)


def gaussian(x: Tensor, sigma: float, reach: int) -> Tensor:
    """Gaussian mean of each channel's surroundings, (N, C, H, W); `sigma` and how far it reaches in pixels."""
    weights = torch.exp(-(torch.arange(-reach, reach + 1, device=x.device) ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, weights, groups=x.shape[1])
    return F.conv2d(rows, weights.transpose(2, 3), groups=x.shape[1])


def _median(motion: Tensor) -> Tensor:
    """Of 3 x 3 pixels, which takes away lone outliers."""
    around = F.unfold(F.pad(motion, (1, 1, 1, 1), mode="replicate"), 3)
    return rearrange(around, "n (c k) (h w) -> n c h w k", k=9, w=motion.shape[-1]).median(-1).values


def warp(frames_N3HW: Tensor, motion: Tensor) -> Tensor:
    """The frames' colours at x + motion(x); beyond the border, the border's."""
    height, width = motion.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=motion.device), torch.arange(width, device=motion.device), indexing="ij"
    )
    return _sample(frames_N3HW, torch.stack([x, y]).to(motion.dtype).expand_as(motion) + motion)


def _sample(images: Tensor, points_N2hw: Tensor) -> Tensor:
    """Bilinear values of images (N, C, H, W) at pixel positions, (N, C, h, w)."""
    height, width = images.shape[-2:]
    size = points_N2hw.new_tensor([width - 1, height - 1])
    grid = 2 * rearrange(points_N2hw, "n xy h w -> n h w xy") / size - 1
    return F.grid_sample(images, grid, padding_mode="border", align_corners=True)


def middle(first_N3HW: Tensor, second_N3HW: Tensor) -> Tensor:
    """The frame halfway between two, in [0, 1]: both brought halfway along the motion, and averaged."""
    motion = flow(first_N3HW, second_N3HW, at=0.5)
    return (warp(first_N3HW, -motion / 2) + warp(second_N3HW, motion / 2)) / 2


def tracks(video: Video) -> Tensor:
    """First and last positions of CoTracker's grid, carried along the flow from frame to frame, (2, 10, 10, 2)."""
    start = camera.grid(video.height, video.width)
    points = rearrange(start, "h w xy -> 1 xy h w")
    for run in video.runs():
        frames = run.float() / 255
        for motion_2HW in flow(frames[:-1], frames[1:]):
            points = points + _sample(motion_2HW[None], points)
    return torch.stack([start, rearrange(points, "1 xy h w -> h w xy")])
