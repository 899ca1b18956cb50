"""Picture files: any photograph to RGB, label images in and out, the colours of classes.

Reading order: open_picture -> read_image, check_size -> read_labels, save_labels -> default_palette.

Shapes: H, W height and width of a picture; K classes.
"""

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


# Seven colours that colour-blind readers tell apart (Okabe and Ito, "Color Universal Design", 2008), and what pictures
# hold beside class colours: white borders and paper, black ink, the two grays of hatches.
FIRST_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
                 (204, 121, 167))
NO_CLASS_COLOURS = ((255, 255, 255), (0, 0, 0), (205, 205, 208), (138, 138, 142))


def default_palette(num_classes: int) -> np.ndarray:
    """Colours that a reader can tell apart, uint8 (K, 3); the colour of a class does not depend on K.

    The first seven are FIRST_COLOURS. Each next one is the colour of a 16 x 16 x 16 grid, neither very dark nor very
    light, that is farthest from all before and from NO_CLASS_COLOURS. The smallest distance between two colours:

        classes            2    8   20   59  150  255
        CIEDE2000         53   21   18   12  5.5  5.5   (1 is just visible side by side)
        CIE76, in CIELAB 113   26   26   16   12    9

    and between a colour and NO_CLASS_COLOURS, in CIEDE2000: 13 for 59 classes, 9 for 255.
    """
    levels = np.arange(0, 256, 17)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    places, taken = perceived(grid), perceived(np.array(NO_CLASS_COLOURS + FIRST_COLOURS))
    grid, places = (rows[(places[:, 0] >= 20) & (places[:, 0] <= 92)] for rows in (grid, places))  # by lightness
    distances = np.linalg.norm(places[:, None] - taken, axis=-1).min(1)  # of each grid colour to the nearest taken one
    palette = list(FIRST_COLOURS)
    while len(palette) < num_classes:
        farthest = distances.argmax()
        palette.append(tuple(grid[farthest]))
        distances = np.minimum(distances, np.linalg.norm(places - places[farthest], axis=-1))
    return np.uint8(palette[:num_classes])


def perceived(rgb: np.ndarray) -> np.ndarray:
    """sRGB 0 ... 255 (N, 3) to CIELAB (D65) whose large a and b are shrunk: plain CIELAB overstates strong colours."""
    linear = np.where(rgb <= 10, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    xyz = linear @ [[0.4339, 0.2126, 0.0177], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8728]]  # white is 1, 1, 1
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    a, b = 500 * (x - y), 200 * (y - z)
    strength = 0.03 * np.hypot(a, b) + 1e-9
    shrink = np.log1p(strength) / strength
    return np.stack([116 * y - 16, a * shrink, b * shrink], -1).round(2)  # rounded: the same choice on every machine
