"""The pictures of the report: training curves (SVG), videos that play without a player, and the strip for the README.

Axes: T frames, H height, W width, C colour.
"""

import base64
import io
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from vpae.distill.method import Panel

PAGE, GAP = 1040, (10, 24)  # pixels: width of the page's column; least and largest space between two videos
LARGEST_FACTOR = 4  # small videos are enlarged by a whole factor, so that pixels stay square
LONGEST = 49  # frames of a video on the page; longer ones are thinned out
COLOURS = ("#2f7fd0", "#d9822b", "#2a9d6a", "#c2528b")  # these and the grey can be read on white and on black
TALLEST = 16383  # pixels of a WebP
GREY = "#808080"


def curves(panels: Sequence[Panel], lines: list[dict]) -> str:
    """Draw what a phase has logged, as a data URI of an SVG; empty if none of the panels has a value."""
    drawn = [panel for panel in panels if any(key in line for key in panel.curves for line in lines)]
    if not drawn:
        return ""
    rows = -(-len(drawn) // 3)
    grey = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)
    with matplotlib.rc_context({"svg.hashsalt": "vpae", "font.size": 8.5, **grey}):
        figure = Figure(figsize=(10.4, 2.4 * rows), layout="constrained")
        figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
        for number, panel in enumerate(drawn):
            _draw(figure.add_subplot(rows, 3, number + 1), panel, lines)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return data_uri(file.getvalue(), "image/svg+xml")


def _draw(axes, panel: Panel, lines: list[dict]) -> None:
    # A term that is off has no curve; the others keep their colours.
    for colour, (key, label) in zip(cycle(COLOURS), panel.curves.items(), strict=False):
        points = np.array([(line["step"], line[key]) for line in lines if key in line])
        if not len(points):
            continue
        axes.plot(*points.T, ".", color=colour, alpha=0.35, markersize=3.5, markeredgewidth=0)
        axes.plot(points[:, 0], smooth(points[:, 1]), color=colour, linewidth=1.5, label=label)
    if panel.reference is not None:
        axes.axhline(panel.reference, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    if any(panel.curves.values()):
        axes.legend(frameon=False, labelcolor="linecolor", handlelength=1)
    axes.set_title(panel.title, loc="left", fontsize=9, fontweight="bold")
    axes.set_title(panel.meaning, loc="right", fontsize=8)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color=GREY, alpha=0.18, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the points; at the ends over as many as there are."""
    kernel = np.ones(len(values) // 20 // 2 * 2 + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


class Clips(Sequence[np.ndarray]):
    """Clips, uint8 (T, H, W, 3), each made when it is looked at: all of a report at once are gigabytes.

    Args:
        make: the clip of one of the things in `what`.
        what: one for each clip.
    """

    def __init__(self, make: Callable[[Any], np.ndarray], what: Sequence[Any]):
        self.make, self.what = make, what

    def __len__(self) -> int:
        return len(self.what)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.make(self.what[number])


def reel(videos: dict[str, Sequence[np.ndarray]], fps: float) -> dict:
    """Videos as sheets, all frames one below the other: the page's style moves them all in step.

    Args:
        videos: row -> clips, uint8 (T, H, W, 3), all of one size.
        fps: frames per second.

    Returns:
        row -> data URIs; width and height of a video on the page and the space between two; frames and seconds of the
        loop.
    """
    length, height, width = next(iter(videos.values()))[0].shape[:3]
    spaces = len(videos) - 1
    room = (PAGE - GAP[0] * spaces) // len(videos)
    shown = width * min(room // width, LARGEST_FACTOR) if room >= width else room
    size = (width, height) if room >= width else (room, round(room * height / width))
    every = -(-length // min(LONGEST, max(1, TALLEST // size[1])))
    return {
        "sheets": {row: [_sheet(clip[::every], size) for clip in clips] for row, clips in videos.items()},
        "width": shown,
        "height": round(shown * height / width),
        "gap": min(GAP[1], (PAGE - shown * len(videos)) // max(1, spaces)),
        "frames": len(range(0, length, every)),
        "seconds": length / fps,
    }


def _sheet(frames: np.ndarray, size: tuple[int, int]) -> str:
    if frames.shape[2] == size[0]:
        return _saved(Image.fromarray(np.concatenate(frames)), "webp", lossless=True)
    small = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in frames]
    return _saved(Image.fromarray(np.concatenate(small)), "webp", quality=80)


def strip(rows: dict[str, tuple[Sequence[np.ndarray], str]], prompts: list[str]) -> Image.Image:
    """Five frames of each clip and row, two clips beside each other.

    Args:
        rows: name -> (clips, a note on how they were made), the clips uint8 (T, H, W, 3).
        prompts: of the clips.
    """
    names, columns = list(rows), min(2, len(prompts))
    length, height, width = rows[names[0]][0][0].shape[:3]
    times = np.rint(np.linspace(0, length - 1, min(5, length))).astype(int)
    factor = max(1, 128 // width)
    tile = (width * factor, height * factor) if width <= 160 else (160, round(160 * height / width))
    border, between, head = 24, 3, 46
    title, text, small = _font(19, bold=True), _font(18), _font(14)
    canvas = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    numbers = "frames " + ", ".join(str(time + 1) for time in times)
    widths = [canvas.textlength(name, title) for name in names]
    widths += [canvas.textlength(note, small) for note in (numbers, *(note for _, note in rows.values()))]
    left = border + 16 + round(max(widths))
    block = (len(times) * (tile[0] + between) + 2 * border, head + len(names) * (tile[1] + between) + border)
    lines = -(-len(prompts) // columns)
    picture = Image.new("RGB", (left + columns * block[0] - border, border // 2 + lines * block[1]), "white")
    canvas = ImageDraw.Draw(picture)
    for number, prompt in enumerate(prompts):
        line, column = divmod(number, columns)
        prompt = " ".join(prompt.split())
        x0, y0 = left + column * block[0], border // 2 + line * block[1]
        while canvas.textlength(prompt, text) > block[0] - 2 * border:
            prompt = prompt.removesuffix("…")[:-1] + "…"
        canvas.text((x0, y0 + head - 10), prompt, "#222222", text, anchor="ls")
        if column == 0:
            canvas.text((left - 16, y0 + head - 10), numbers, "#777777", small, anchor="rs")
        for row, name in enumerate(names):
            y = y0 + head + row * (tile[1] + between)
            if column == 0:
                middle = y + tile[1] // 2
                canvas.text((left - 16, middle - 2), name, "#222222", title, anchor="rs")
                canvas.text((left - 16, middle + 4), rows[name][1], "#777777", small, anchor="rt")
            clip = rows[name][0][number]
            for place, time in enumerate(times):
                frame = Image.fromarray(clip[time])
                how = Image.Resampling.NEAREST if tile[0] >= width else Image.Resampling.LANCZOS
                picture.paste(frame.resize(tile, how), (x0 + place * (tile[0] + between), y))
    return picture


def picture(image: Image.Image) -> str:
    """A picture for the page, of 256 colours."""
    return _saved(image.quantize(256), "png", optimize=True)


def _saved(image: Image.Image, kind: str, **how: object) -> str:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return data_uri(file.getvalue(), f"image/{kind}")


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib brings this font along, so that the picture is the same everywhere.
    return ImageFont.truetype(findfont(f"DejaVu Sans{':bold' if bold else ''}"), size)


def data_uri(content: bytes, kind: str) -> str:
    """Content as an address that needs no file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
