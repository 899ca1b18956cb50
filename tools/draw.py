"""Labels as pictures: colours, overlays, legends, error maps and sheets; for training, prediction and the report alike.

Reading order: colorize -> overlay -> error_map -> hatch -> legend -> with_legend -> contact_sheet -> font_with.

Shapes: H, W height and width in pixels; K classes. Images and pictures are uint8 (H, W, 3) RGB, a palette is uint8
(K, 3), labels are integers (H, W) with a class index 0 ... K - 1 or `ignore_index` in every pixel.
Large pictures are drawn row by row and by copyto: at most 8 bytes a pixel beside the arguments and the result.
"""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageDraw, ImageFont, ImageOps

Picture = np.ndarray | Image.Image

PAPER, INK, FAINT_INK = (255, 255, 255), (28, 28, 30), (140, 140, 145)
HATCH_LIGHT, HATCH_DARK = (205, 205, 208), (138, 138, 142)
RIGHT, WRONG = (225, 228, 232), (214, 40, 57)
boxes: set[str] = set()  # letters that no font has, as a warning has said


def colorize(labels: np.ndarray, palette: np.ndarray, ignore_index: int = 255) -> np.ndarray:
    """The labels in their classes' colours, ignored pixels hatched. Raises IndexError for a label without a colour."""
    picture = np.empty((*labels.shape, 3), np.uint8)
    for row, line in zip(labels, picture, strict=True):  # indexing takes 8 bytes for each label
        line[:] = palette[np.where(row == ignore_index, 0, row)]
    np.copyto(picture, hatch(labels.shape), where=(labels == ignore_index)[..., None])
    return picture


def overlay(image: np.ndarray, labels: np.ndarray, palette: np.ndarray, opacity: float = 0.6,
            ignore_index: int = 255) -> np.ndarray:
    """The photograph under its labels: colours at `opacity` in 0 ... 1, white class borders, ignored pixels hatched."""
    picture = colorize(labels, palette, ignore_index)
    for line, photograph in zip(picture, image, strict=True):
        line[:] = opacity * line + (1 - opacity) * photograph + 0.5
    np.copyto(picture, 255, where=boundaries(labels, line_width(labels.shape))[..., None])
    return picture


def error_map(labels: np.ndarray, prediction: np.ndarray, ignore_index: int = 255) -> np.ndarray:
    """Where the prediction fails: light gray right, red wrong, hatched not judged; the labels' borders in dark gray."""
    picture = np.where((labels == prediction)[..., None], np.uint8(RIGHT), np.uint8(WRONG))
    for line, edge in zip(picture, boundaries(labels, line_width(labels.shape)), strict=True):
        line[edge] = line[edge] * 0.55
    np.copyto(picture, hatch(labels.shape), where=(labels == ignore_index)[..., None])
    return picture


def boundaries(labels: np.ndarray, thickness: int = 1) -> np.ndarray:
    """bool (H, W): pixels whose right or lower neighbour carries another label, widened to `thickness` pixels."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    for _ in range(thickness - 1):  # each pass adds the pixels to the right and below
        wider = edge.copy()
        wider[:, 1:] |= edge[:, :-1]
        wider[1:] |= edge[:-1]
        edge = wider
    return edge


def hatch(shape: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3), read-only: diagonal stripes in two grays, which no default colour can be mistaken for."""
    stripes = np.uint8([HATCH_DARK, HATCH_LIGHT])[np.arange(sum(shape) - 1) // (3 * line_width(shape)) % 2]
    # Row i begins i pixels further along the stripes: all rows are views of this one line.
    return sliding_window_view(stripes, shape[1], axis=0).transpose(0, 2, 1)  # (H, 3, W) -> (H, W, 3)


def line_width(shape: tuple[int, int]) -> int:
    """Pixels of a line that stays thin but visible when a picture of this (H, W) is shown at screen size."""
    return max(1, round(min(max(shape) / 700, min(shape) / 100)))


def legend(classes: Sequence[str], palette: np.ndarray, width: int, present: Sequence[int] | None = None,
           shares: Sequence[float] | None = None, ignored: bool = False) -> Image.Image:
    """Swatches and names in as many columns as fit `width` pixels.

    Args:
        present: the class indices to list, in this order; None lists all K.
        shares: the fraction of the picture that each listed class covers, in gray behind its name.
        ignored: add a hatched swatch for the pixels without a class.
    """
    entries = [(classes[k], tuple(map(int, palette[k]))) for k in (range(len(classes)) if present is None else present)]
    notes = [percent(share) for share in shares] if shares else [""] * len(entries)
    if ignored:
        entries, notes = [*entries, ("ignored", None)], [*notes, ""]
    size = text_size(width)
    font = font_with("".join([*classes, "ignored 0123456789.<%"]), size)
    indent, gap, line = round(1.9 * size), round(1.2 * size), round(1.65 * size)
    note_width = max((font.getlength(note) for note in notes), default=0) + (size // 2 if shares else 0)
    longest = max((font.getlength(name) for name, _ in entries), default=0)
    column = min(width - gap, round(indent + longest + note_width + gap))
    rows = -(-len(entries) // max(1, (width - gap) // column))
    picture = Image.new("RGB", (width, rows * line + gap), PAPER)
    pen = ImageDraw.Draw(picture)
    for position, ((name, color), note) in enumerate(zip(entries, notes, strict=True)):
        x = gap + position // rows * column  # read down the columns, as in a book's index
        y = gap // 2 + position % rows * line
        name = shorten(name, font, column - indent - note_width - gap / 2)
        swatch = (x, y + (line - size) // 2)
        if color is None:
            picture.paste(Image.fromarray(hatch((size, size))), swatch)
        pen.rectangle((*swatch, swatch[0] + size - 1, swatch[1] + size - 1), fill=color, outline=FAINT_INK)
        pen.text((x + indent - size * 0.4, y + line / 2), name, INK, font, anchor="lm")
        pen.text((x + indent + font.getlength(name), y + line / 2), note, FAINT_INK, font, anchor="lm")
    return picture


def with_legend(picture: Picture, labels: np.ndarray, classes: Sequence[str], palette: np.ndarray,
                ignore_index: int = 255) -> Image.Image:
    """The picture with a legend below it: the classes found in `labels`, largest area first, and their shares."""
    picture = to_image(picture)
    areas = sum(np.bincount(row[row != ignore_index], minlength=len(classes)) for row in labels)
    present = [int(k) for k in np.argsort(-areas, kind="stable") if areas[k]]
    shares = [areas[k] / labels.size for k in present]
    key = legend(classes, palette, max(picture.width, 240), present, shares, bool(areas.sum() < labels.size))
    return stack([picture, key])


def with_caption(picture: Picture, caption: str, size: int | None = None) -> Image.Image:
    """The picture with a line of text above it, `size` pixels high (default: by the picture's width)."""
    picture = to_image(picture)
    font = font_with(caption, size or text_size(picture.width))
    line = Image.new("RGB", (picture.width, round(1.7 * font.size)), PAPER)
    ImageDraw.Draw(line).text((2, line.height / 2), shorten(caption, font, picture.width - 4), INK, font, anchor="lm")
    return stack([line, picture])


def contact_sheet(rows: Sequence[Sequence[Picture]], captions: Sequence[str] = (), gap: int = 6) -> Image.Image:
    """Rows of pictures, every row at one height and all of them in line with the first; captions head the columns.

    Pictures are scaled, keeping their aspect, into cells of the first row's sizes. Missing ones leave a blank.
    """
    rows = [[to_image(picture) for picture in row] for row in rows]
    height = max(picture.height for picture in rows[0])
    widths = [round(picture.width * height / picture.height) for picture in rows[0]]
    lefts = [gap + sum(widths[:i]) + gap * i for i in range(len(widths))]
    font = font_with("".join(captions), text_size(max(max(widths), sum(widths) // 2)))
    head = round(1.9 * font.size) if captions else 0
    sheet = Image.new("RGB", (lefts[-1] + widths[-1] + gap, head + len(rows) * (height + gap) + gap), PAPER)
    for left, width, text in zip(lefts, widths, captions, strict=False):
        ImageDraw.Draw(sheet).text((left, gap + head / 2), shorten(text, font, width), INK, font, anchor="lm")
    for index, row in enumerate(rows):
        for left, width, picture in zip(lefts, widths, row, strict=False):
            fitted = ImageOps.contain(picture, (width, height), Image.Resampling.LANCZOS)
            sheet.paste(fitted, (left, head + gap + index * (height + gap)))
    return sheet


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below one another, the left edges in line."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), PAPER)
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (0, sum(above.height for above in pictures[:i])))
    return sheet


def to_image(picture: Picture) -> Image.Image:
    """A Pillow RGB image of a uint8 (H, W, 3) array, or of an image."""
    return picture.convert("RGB") if isinstance(picture, Image.Image) else Image.fromarray(picture)


def text_size(width: int) -> int:
    """Font size in pixels that reads well on a picture of this width."""
    return max(12, min(40, round(width / 38)), min(96, round(width / 90)))


@lru_cache
def font_with(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which has ASCII, or the font of this machine with most letters of the text; `size` in pixels.

    Says which letters no font has. Right-to-left scripts may come out mirrored or unjoined.
    """
    letters, fonts = sorted(set(text)), [ImageFont.load_default(size)]
    if absent(fonts[0], letters):
        command = ["fc-match", "-f", "%{file}", f"sans:color=false:charset={' '.join(f'{ord(c):x}' for c in letters)}"]
        files = [subprocess.run(command, capture_output=True, text=True).stdout] if shutil.which(command[0]) else []
        for file in [*files, "DejaVuSans.ttf", "Arial Unicode.ttf", "msyh.ttc", "arial.ttf"]:
            with contextlib.suppress(OSError):  # not on this machine, or a font of coloured bitmaps
                fonts.append(ImageFont.truetype(file, size))
    best = min(fonts, key=lambda font: len(absent(font, letters)))
    if new := set(absent(best, letters)) - boxes:
        boxes.update(new)
        print(f"warning: no font here has {''.join(sorted(new))[:20]}, drawn as boxes; install one, for example the "
              "package fonts-noto-cjk (Chinese, Japanese, Korean) or fonts-noto-core (most others)", file=sys.stderr)
    return best


def absent(font: ImageFont.FreeTypeFont, letters: Sequence[str]) -> list[str]:
    """The letters that the font draws as it draws a character that does not exist."""
    box = bytes(font.getmask("\U0010ffff"))
    return [letter for letter in letters if letter.isprintable() and bytes(font.getmask(letter)) == box]


def percent(share: float) -> str:
    """A fraction in percent with one decimal: '34.2 %', '< 0.1 %'."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut with dots where it is longer than `width` pixels."""
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    return text
