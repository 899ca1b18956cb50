"""Picture files: any photograph to RGB, label images in and out, the colours of classes.

Reading order: open_picture -> read_image, check_size -> read_labels, save_labels -> default_palette.

Shapes: H, W height and width of a picture; K classes.
"""

import colorsys
import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import common
from common import UserError, reason

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@contextlib.contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """The Pillow image of a file. Raises UserError if the file, or later its pixels, cannot be read or are too many."""
    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({reason(error)}): replace it or take its name out") from None


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 (H, W, 3) of any picture, like OpenCV's IMREAD_COLOR: upright, alpha dropped, 16 bits cut to 8."""
    with open_picture(path) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16-bit gray; Pillow would clip it to white
            picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
        return np.array(picture.convert("RGB"))


def check_size(image: Path, labels: Path | str, shape: tuple[int, int]) -> None:
    """Raises UserError unless the labels' shape (H, W) is that of the upright image; reads only the image's header."""
    with open_picture(image) as picture:
        width, height = picture.size
        if picture.getexif().get(0x0112, 1) >= 5:  # the EXIF orientations 5..8 swap the sides
            width, height = height, width
    if shape != (height, width):
        raise UserError(f"{image} is {width}x{height} pixels but {labels} is {shape[1]}x{shape[0]}: make them one size")


def read_labels(path: Path) -> np.ndarray:
    """The values of a label image, int32 (H, W); never rotated. Raises UserError for a picture that holds colours."""
    with open_picture(path) as picture:
        mode = picture.mode
        if mode in ("L", "P", "1") or mode.startswith("I"):
            return np.array(picture).astype(np.int32)
    raise UserError(f"{path} has mode {mode}, not one value a pixel: convert it with `python data.py from-folders`")


def save_labels(labels: np.ndarray, path: Path, palette: np.ndarray | None = None) -> None:
    """Write labels, uint8 or uint16 (H, W), as a PNG of these values; uint8 may have a palette (K, 3) for viewers."""
    picture = Image.fromarray(labels)
    if palette is not None:
        # All 256 colours: with 16 or fewer Pillow writes 4 bits a pixel, and 255 becomes 15.
        picture.putpalette([*np.ravel(palette)] + [205, 205, 208] * (256 - len(palette)))
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_whole(path, lambda file: picture.save(file, "PNG"))


def default_palette(num_classes: int) -> np.ndarray:
    """Distinct colours, uint8 (K, 3): hues near a golden angle apart, with saturation and brightness in turn."""
    hsv = [(k * 113 % 180 / 180, (150 + k % 3 * 50) / 255, (240 - k % 2 * 80 - k // 180 * 30) / 255)
           for k in range(num_classes)]
    return (np.array([colorsys.hsv_to_rgb(*colour) for colour in hsv]) * 255).astype(np.uint8)
