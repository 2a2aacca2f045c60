"""The one reader of still images: what comes from here is upright, opaque and RGB with 8 bits a colour."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vbench_i2v.errors import VBenchError, first_line

BACKGROUND = (255, 255, 255)  # what shows through where an image is transparent, as on a page [choice]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class ImageError(VBenchError):
    """An image that cannot be used; the message names the file and says why."""


def read_image(path: Path) -> Image.Image:
    """An image as a viewer shows it: turned by its EXIF orientation, over white, RGB with 8 bits.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: no image, truncated, or of a kind whose range of values is not known.
    """
    if path.is_dir():
        raise FileNotFoundError(f"{path}: is a folder; name an image in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from half of its limit on
            with Image.open(path) as opened:
                opened.load()  # all of it: a truncated file opens without a word
                return opaque(_eight_bits(ImageOps.exif_transpose(opened)))
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise ImageError(f"{path}: has more than {most} pixels, the most that is read; scale it down") from error
    except Exception as error:  # Pillow's plug-ins raise what they like on damaged files
        raise ImageError(f"{path}: cannot be read as an image ({first_line(error)}); copy or save it again") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey levels scaled to 8 bits; Pillow's own conversion clips them, so that nearly all becomes white."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ImageError(f"{image.mode} values from {values.min()} to {values.max()}; save it with 8 or 16 bits")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def opaque(image: Image.Image) -> Image.Image:
    """RGB, over the background where it is transparent: what lies under full transparency is not meant to be seen."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*BACKGROUND, 255)), layer).convert("RGB")
