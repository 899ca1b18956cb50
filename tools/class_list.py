"""Lists of classes, as labelling tools write them.

Reading order: ClassList -> read_classes.

Shapes: K classes.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
import pictures
from common import IGNORE, UserError


class ClassList(NamedTuple):
    """The classes of the user's list, and the colours of a colour-coded label image, as 24-bit numbers -> label."""
    names: list[str]
    palette: np.ndarray  # uint8 (K, 3)
    colours: dict[int, int]
    ids: dict[int, int] = {}


def read_classes(classes: str) -> ClassList:
    """Read a list of classes, one a line: `name` or `name R G B`; the name `ignore` is for colours of no class.

    A number instead of a file stands for that many classes without names. Raises UserError.
    """
    if classes.isdigit():
        lines = [f"class {k}" for k in range(int(classes))]
    else:
        lines = data.read_lines(Path(classes), "give --classes a file with one class name a line, or a number")
    names, colours = [], {}
    for number, line in enumerate(lines, 1):
        # name, perhaps red, green, blue, between spaces, commas or a colon
        name, *rgb = re.fullmatch(r"(.+?)(?:[\s,:]+(\d+)[\s,]+(\d+)[\s,]+(\d+))?", line).groups()
        if rgb[0]:
            if max(map(int, rgb)) > 255 or (colour := int.from_bytes(map(int, rgb))) in colours:
                raise UserError(f"{classes}, line {number}: {' '.join(rgb)} is no colour of 0..255 or used before")
            colours[colour] = IGNORE if name == "ignore" else len(names)
        if not rgb[0] or name != "ignore":
            names.append(name)
    data.check_names(names, f"--classes {classes}")
    palette = pictures.default_palette(len(names))
    for colour, k in colours.items():
        if k != IGNORE:
            palette[k] = tuple(colour.to_bytes(3))
    return ClassList(names, palette, colours)
