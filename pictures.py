"""Pictures of any kind to RGB, label images in and out, the colours of classes.

Reading order: as_rgb -> image_as_rgb -> open_picture, upright, picture_size -> array_as_rgb, eight_bits ->
read_label_image, read_labels -> check_size -> save_labels -> default_palette.

Shapes: H, W height and width of a picture; K classes.
"""

import contextlib
import io
import os
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

import common
from common import UserError, reason

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
Picture = str | Path | bytes | Image.Image | np.ndarray | torch.Tensor
EXPECTED = ("a picture is a file name, the bytes of a file, a Pillow image, or an array or tensor (H, W), (H, W, 3) or "
            "(3, H, W), with alpha or not, of whole numbers of 8 or 16 bits or of floats in 0..1 or 0..255")
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # by EXIF orientation: what makes a picture upright
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")  # in Pillow's words; its readers of others are less tried
LARGE, PIXELS_A_BYTE = 1 << 26, 1100  # more pixels than LARGE take a byte for so many; a blank 8-bit PNG has 1030
DAMAGE = (ArithmeticError, EOFError, LookupError, MemoryError, OSError, SyntaxError, TypeError, ValueError,
          struct.error, Image.DecompressionBombError)  # which Pillow raises for damaged files
PLAIN_ALPHA = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}  # modes that Pillow converts to RGB by way of another
LOSSY = {"JPEG", "MPO"}  # formats that change values, and lossy WebP beside them


# ------------------------------------------------------------------------------------------------------------- pictures
def as_rgb(picture: Picture) -> np.ndarray:
    """RGB uint8 (H, W, 3) of a picture in any form; one picture in different forms gives one result.

    Files and Pillow images are turned upright by their EXIF tag. Alpha is dropped. More than 8 bits are scaled to 8.
    Raises UserError for a file or values that cannot be a picture, TypeError for what is none of the known forms.
    """
    if isinstance(picture, str | Path | bytes):
        with open_picture(picture) as file:
            return as_rgb(file)
    if isinstance(picture, Image.Image):
        return image_as_rgb(picture)
    if isinstance(picture, torch.Tensor):
        picture = picture.detach().cpu()
        picture = (picture.float() if picture.is_floating_point() else picture).numpy()
    if not isinstance(picture, np.ndarray):
        raise TypeError(f"{EXPECTED}; this is a {type(picture).__name__}")
    return array_as_rgb(picture)


def image_as_rgb(picture: Image.Image) -> np.ndarray:
    """`as_rgb` of a Pillow image."""
    name, raw, tags = getattr(picture, "filename", "") or "the picture", raw_mode(picture), tiff_tags(picture)
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":  # a telephone's second picture is a by-product
        say_once("pages", f"{name} holds {picture.n_frames} pages or frames: the first is read, of all such files")
    lower = lower_bytes(picture)
    picture = upright(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        rgb = array_as_rgb(np.asarray(picture), bits_used(tags), name)
        return 255 - rgb if tags.get(262) == 0 else rgb  # PhotometricInterpretation: 0 is white
    for mode in (PLAIN_ALPHA.get(picture.mode, picture.mode), "RGB"):
        picture = picture if picture.mode == mode else picture.convert(mode)
    rgb = np.array(picture)
    if lower is not None:
        return array_as_rgb(rgb.astype(np.uint16) << 8 | lower, bits_used(tags), name)
    if raw == "LA;16B" and rgb.max() < 16 or raw == "R" and tags.get(258, (8,))[0] > 8:
        raise UserError(f"{name}: Pillow does not read this kind of 16-bit file right: save it with 8 bits")
    return rgb


def lower_bytes(picture: Image.Image) -> np.ndarray | None:
    """uint8 (H, W, 3), upright: the lower bytes of a file of 16-bit colours that is not loaded yet; None for others.

    Pillow reads such colours as their upper bytes. It is told the other order of bytes here, and reads the lower ones.
    """
    kind = re.fullmatch("(RGBA?;16)([BLN])", raw_mode(picture))
    if kind is None:
        return None
    place = picture.fp.tell()
    picture.fp.seek(0)
    again = Image.open(picture.fp, formats=FORMATS)
    order = kind[1] + {"B": "L", "L": "B", "N": "B"}[kind[2]]  # N is the machine's order, little-endian
    for i, (*place_of_tile, options) in enumerate(tiles := again.tile):
        make = getattr(tiles[i], "_make", tuple)  # a tile is a plain tuple in older versions of Pillow
        tiles[i] = make([*place_of_tile, (order, *options[1:]) if isinstance(options, tuple) else order])
    lower = np.array(upright(again).convert("RGB"))
    picture.fp.seek(place)
    return lower


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 (H, W, 3) of a file, as `as_rgb`; for 8-bit files the result is that of OpenCV's IMREAD_COLOR."""
    return as_rgb(path)


@contextlib.contextmanager
def open_picture(source: str | Path | bytes, name: str = "") -> Iterator[Image.Image]:
    """The Pillow image of a file, or of its bytes and their name, in one of FORMATS.

    Raises UserError if it, or later its pixels, cannot be read, or if so small a file cannot hold so many pixels.
    """
    try:
        size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as picture:
            if picture.width * picture.height > max(LARGE, PIXELS_A_BYTE * size):
                raise Image.DecompressionBombError(f"{picture.width}x{picture.height} pixels in {size} bytes")
            yield picture
    except UserError:
        raise
    except DAMAGE as error:
        unknown = f"cannot identify it as one of {', '.join(FORMATS)}"
        why = unknown if isinstance(error, UnidentifiedImageError) else reason(error)
        name = name or ("these bytes" if isinstance(source, bytes) else source)
        raise UserError(f"{name}: not a readable image ({why}): replace it or take it out") from None


def files_below(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[Path]:
    """The files with one of the extensions below a folder, without hidden ones and what macOS adds to archives."""
    return [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in extensions and not file.is_dir()
            and not any(part.startswith((".", "__MACOSX")) for part in file.relative_to(folder).parts)]


def orientation(picture: Image.Image) -> int:
    """EXIF's orientation 1..8 of a picture that is not loaded yet; 1 where the tag or all of EXIF makes no sense."""
    try:
        value = picture.getexif().get(0x0112, 1)
    except DAMAGE:
        return 1
    return next((number for number in TURNS if value == number), 1)


def upright(picture: Image.Image) -> Image.Image:
    """The picture turned upright by its EXIF tag; the same size as `picture_size` says."""
    picture.load()
    turn = 1 if picture.format == "TIFF" else orientation(picture)  # loading a TIFF turns it
    return picture if turn == 1 else picture.transpose(TURNS[turn])


def picture_size(path: Path) -> tuple[int, int]:
    """(H, W) of the upright picture, from the file's header."""
    with open_picture(path) as picture:
        tags = tiff_tags(picture)  # Pillow's size of a TIFF is the upright one or the stored one, by its version
        width, height = (tags[256], tags[257]) if tags else picture.size
        return (width, height) if orientation(picture) >= 5 else (height, width)


def raw_mode(picture: Image.Image) -> str:
    """How a file that is not loaded yet stores its pixels, in Pillow's words: "RGB;16B", "L;2"; "" if unknown."""
    arguments = picture.tile[0][3] if getattr(picture, "tile", None) else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def tiff_tags(picture: Image.Image) -> Mapping:
    """The tags of a TIFF by their numbers; none for other files."""
    return getattr(picture, "tag_v2", {})


def bits_used(tags: Mapping) -> int | None:
    """The bits of a sample that the tags of a TIFF say are used, where that is fewer than its 16."""
    bits, most = (np.ravel(tags.get(tag, 0))[:1] for tag in (258, 281))  # BitsPerSample, MaxSampleValue
    used = int(most[0]).bit_length() if most.dtype.kind == "i" and most.any() else bits.sum()
    return int(used) if 8 <= used < 16 else None


def array_as_rgb(array: np.ndarray, bits: int | None = None, name: str = "the array") -> np.ndarray:
    """`as_rgb` of an array. Channels are last where both ends could be channels."""
    shape = array.shape
    if array.ndim == 3 and shape[-1] not in (1, 2, 3, 4) and shape[0] in (1, 2, 3, 4):
        array = np.moveaxis(array, 0, -1)
    array = array[..., None] if array.ndim == 2 else array
    if array.dtype.kind not in "buif" or array.ndim != 3 or array.shape[-1] not in (1, 2, 3, 4) or not array.size:
        raise TypeError(f"{EXPECTED}; this one is {array.dtype} of shape {shape}")
    samples = eight_bits(array[..., :1] if array.shape[-1] < 3 else array[..., :3], bits, name)  # without alpha
    samples = samples if samples.shape[-1] == 3 else samples.repeat(3, axis=-1)
    return np.require(samples, requirements=["C", "W"])  # PyTorch warns of an array that cannot be written to


def eight_bits(values: np.ndarray, bits: int | None, name: str) -> np.ndarray:
    """Samples of any type as uint8. `bits`: how many are used, None if nothing tells.

    Then the largest sample tells: floats up to 1 are shares of white; other numbers have the fewest bits of 8, 10, 12,
    14, 16 that hold it. Raises UserError for what is no brightness: negative, not finite, too large.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values * np.uint8(255)
    least, most = float(values.min()), float(values.max())
    real = values.dtype.kind == "f"
    if not (least >= 0 and most < 1 << 16) or real and 1.001 < most < 2:  # the first also where there is a NaN
        raise UserError(f"{name}: values from {least:g} to {most:g} are no brightness: scale them to 0..255 or 0..1")
    if real and most < 2:
        return np.rint(values.clip(0, 1) * 255.0).astype(np.uint8)  # above 1 by rounding only
    if bits is None or most >= 1 << bits:
        bits = next(bits for bits in (8, 10, 12, 14, 16) if most < 1 << bits)
        if most and bits < 16 and (bits > 8 or values.dtype.itemsize == 2):
            say_once("bits", f"{name}: the largest sample is {most:g}: read as {bits} bits, "
                             "and others like it by their own largest sample")
    if real:
        return np.rint(values * (255 / ((1 << bits) - 1))).clip(0, 255).astype(np.uint8)
    return (values >> (bits - 8)).astype(np.uint8)


def say_once(kind: str, text: str) -> None:
    """Print a remark on how a picture was understood, on stderr; one of each kind."""
    if kind not in _said:
        _said.add(kind)
        print(text, file=sys.stderr)


_said: set[str] = set()


# --------------------------------------------------------------------------------------------------------------- labels
class LabelImage(NamedTuple):
    """The content of a label file."""
    values: np.ndarray  # int32 (H, W): indices, or colours as numbers 0xRRGGBB
    coloured: bool
    palette: np.ndarray | None = None  # uint8 (N, 3): a palette image's; its values are indices into it


def read_label_image(path: Path) -> LabelImage:
    """Read a label file of any lossless format; alpha is dropped.

    Raises UserError for a lossy format, for one with an orientation other than upright (viewers turn it, labelling
    tools do not), and for pixels that are neither whole numbers nor RGB.
    """
    with open_picture(path) as picture:
        stored = raw_mode(picture)
        if picture.format in LOSSY or is_lossy(path, picture):
            raise UserError(f"{path} is a lossy {picture.format}: its values are not those that were drawn; "
                            "export the labels as PNG")
        if orientation(picture) > 1:
            raise UserError(f"{path} has an orientation tag, as if it were to be turned: save it upright, as PNG")
        if getattr(picture, "n_frames", 1) > 1:
            raise UserError(f"{path} holds {picture.n_frames} pages or frames: save the one that is meant as PNG")
        values = np.asarray(picture)
        mode, palette = picture.mode, picture.getpalette("RGB") if picture.mode in ("P", "PA") else None
        palette = [0, 0, 0, 255, 255, 255] if mode == "1" else palette  # one bit is black or white
    if mode in ("RGB", "RGBA", "RGBX"):
        if ";16" in stored:  # Pillow would cut them to 8 bits
            raise UserError(f"{path} has 16-bit colours: save it with 8 bits a colour, as PNG")
        colours = values[..., 0].astype(np.int32)
        for channel in (1, 2):  # in place: as one product this takes three times the memory
            colours <<= 8
            colours |= values[..., channel]
        return LabelImage(colours, True)
    values = values[..., 0] if values.ndim == 3 else values
    if mode not in ("1", "L", "LA", "P", "PA", "F") and not mode.startswith("I") or mode == "F" and (values % 1).any():
        raise UserError(f"{path} has mode {mode}, not one whole number or colour a pixel: save it as PNG of indices")
    if few := re.fullmatch(r"L;([24])R?", stored):  # Pillow stretches 2 and 4 bits to 0..255
        values = values // (255 // ((1 << int(few[1])) - 1))
    colours = np.uint8(palette).reshape(-1, 3) if palette else None
    if colours is not None and len(colours) < 256 and values.max() >= len(colours):
        raise UserError(f"{path} holds value {values.max()}, and its palette has {len(colours)} colours: save it again")
    if colours is not None and (colours == np.arange(len(colours))[:, None]).all():
        colours = None  # a ramp of grays is no choice of colours
    return LabelImage(values.astype(np.int32), False, colours)


def is_lossy(path: Path, picture: Image.Image) -> bool:
    """Whether a WebP or a TIFF is compressed with loss: Pillow does not tell of the one."""
    if picture.format == "WEBP":
        content = path.read_bytes()
        at = 12
        while at < len(content) and content[at:at + 4] not in (b"VP8 ", b"VP8L", b"ANMF"):  # from chunk to chunk
            at += 8 + int.from_bytes(content[at + 4:at + 8], "little") + (content[at + 4] & 1)
        return content[at:at + 4] != b"VP8L"
    return any(kind in str(picture.info.get("compression")) for kind in ("jpeg", "webp"))


def read_labels(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The values of a label image, int32 (H, W), and its palette. Raises UserError for one that holds colours."""
    values, coloured, palette = read_label_image(path)
    if coloured:
        raise UserError(f"{path} holds colours, not class indices: convert it with `python data.py from-folders`")
    return values, palette


def check_size(image: Path, labels: Path | str, shape: tuple[int, int]) -> None:
    """Raises UserError unless the labels' shape (H, W) is that of the upright image; reads only the image's header."""
    height, width = picture_size(image)
    if shape != (height, width):
        turned = "; EXIF turns the image, so label it upright" if shape == (width, height) else ""
        raise UserError(f"{image} is {width}x{height} pixels but {labels} is {shape[1]}x{shape[0]}{turned}: "
                        "make them one size")


def save_labels(labels: np.ndarray, path: Path, palette: np.ndarray | None = None, info: PngInfo | None = None) -> None:
    """Write labels, uint8 or uint16 (H, W), as a PNG of these values; uint8 may have a palette (K, 3) for viewers."""
    picture = Image.fromarray(labels)
    if palette is not None:
        # All 256 colours: with 16 or fewer Pillow writes 4 bits a pixel, and 255 becomes 15.
        picture.putpalette([*np.ravel(palette)] + [205, 205, 208] * (256 - len(palette)))
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_whole(path, lambda file: picture.save(file, "PNG", pnginfo=info))


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
