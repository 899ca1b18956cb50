"""The built-in toy data: little landscapes, drawn by a program, with a label for each pixel.

Reading order: make_toy -> draw_scene -> draw_sky to draw_road (the stuff) -> draw_house to draw_sign (the things).

Every shape is a signed distance in pixels (negative inside): it gives the soft edge of the picture, the label and the
unlabelled seam between the two. Colours vary so much that a model needs shape, place and texture too: trees and grass
are green, water and sky blue, crates and houses brown.

Shapes: H, W height and width. Pictures are float32 (H, W, 3), 0..255, until they are written as JPEG. A thing stands at
x on the ground at y, and is about `size` pixels high.
"""

import colorsys
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from common import UserError, in_parallel, new_folder
from data import IGNORE, write_split
from pictures import save_labels

CLASSES = ("sky", "grass", "road", "water", "house", "tree", "crate", "ball", "pole", "sign")
SKY, GRASS, ROAD, WATER, HOUSE, TREE, CRATE, BALL, POLE, SIGN = range(len(CLASSES))
PALETTE = ((120, 190, 235), (126, 200, 80), (110, 110, 122), (40, 95, 190), (196, 92, 70),
           (24, 110, 52), (205, 150, 70), (225, 60, 160), (245, 240, 235), (250, 215, 40))
VERSION = 1  # of the drawings: raise it when a scene changes
Range = tuple[float, float]


def make_toy(root: str | Path = "data/toy", train: int = 400, val: int = 60, size: Sequence[int] = (192, 256),
             seed: int = 0) -> Path:
    """Draw the data set as a plain folder, or keep the one that is there; returns its root.

    The pictures depend on seed and size alone: image i of a split is the same however many are asked for. A run cut
    short leaves nothing at `root`. Raises UserError where `root` holds something else.
    """
    root = Path(root)
    made_by = {"version": VERSION, "train": train, "val": val, "size": list(size), "seed": seed}
    if min(train, val) < 1 or min(size) < 64 or seed < 0:
        raise UserError(f"toy data need a picture a split, 64 pixels a side and a seed of 0 or more, not {made_by}")
    if not root.exists():
        jobs = [(seed, number, i, size) for number, count in enumerate((train, val)) for i in range(count)]
        info = {"name": "toy", "classes": CLASSES, "palette": PALETTE, "ignore_index": IGNORE, "made_by": made_by}
        try:
            with new_folder(root) as draft:
                (draft / "images").mkdir()
                names = list(in_parallel(partial(_draw_pair, draft), jobs, os.cpu_count() or 1, f"drawing {root}"))
                write_split(draft / "train.txt", names[:train])
                write_split(draft / "val.txt", names[train:])
                (draft / "dataset.json").write_text(json.dumps(info) + "\n")
        except OSError:
            if not root.exists():  # else another process was quicker (torchrun starts several)
                raise
    try:
        found = json.loads((root / "dataset.json").read_text())["made_by"]
    except (OSError, ValueError, KeyError, TypeError):
        found = "other files"
    if found != made_by:
        raise UserError(f"{root} holds {found}, not toy data of {made_by}: choose another folder or remove it")
    return root


def _draw_pair(root: Path, job: tuple[int, int, int, tuple[int, int]]) -> str:
    """Draw and write images/NAME.jpg and labels/NAME.png, the latter with a palette for viewers."""
    seed, split, i, size = job
    name = f"{('train', 'val')[split]}_{i:04}"
    image, labels = draw_scene(np.random.default_rng((seed, split, i)), size)
    Image.fromarray(image).save(root / "images" / f"{name}.jpg", quality=92)
    save_labels(labels, root / "labels" / f"{name}.png", PALETTE)
    return name


class Scene:
    """A picture in the making: image (H, W, 3), labels (H, W), the pixel coordinates x, y, and the random generator."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self.rng, self.size = rng, size
        self.y, self.x = np.mgrid[:size[0], :size[1]].astype(np.float32) + 0.5
        self.image = np.zeros((*size, 3), np.float32)
        self.labels = np.zeros(size, np.uint8)
        self.horizon = size[0] * rng.uniform(0.3, 0.5)

    def paint(self, distance: np.ndarray, texture: np.ndarray, label: int | None) -> None:
        """Lay a texture over the inside of a shape; pixels nearer to its outline than 1 become unlabelled."""
        here = bounding_box(distance < 1)
        opacity = (0.5 - distance[here]).clip(0, 1)[..., None]
        self.image[here] += opacity * (np.broadcast_to(texture, self.image.shape)[here] - self.image[here])
        if label is not None:
            self.labels[here][distance[here] < 0] = label
            self.labels[here][abs(distance[here]) < 1] = IGNORE

    def shade(self, x: float, y: float, radius: float) -> None:
        """A soft shadow on the ground."""
        darkness = 1.2 - np.hypot((self.x - x) / radius, (self.y - y) / (0.3 * radius))
        here = bounding_box(darkness > 0)
        self.image[here] *= 1 - 0.45 * darkness[here].clip(0, 1)[..., None]

    def noise(self, width: float, height: float | None = None) -> np.ndarray:
        """Smooth noise in -1..1 with bumps of that width and height in pixels, (H, W, 1)."""
        cells = [max(2, round(side / bump)) for side, bump in zip(self.size, (height or width, width), strict=True)]
        grid = Image.fromarray(self.rng.uniform(-1, 1, cells).astype(np.float32))
        return np.asarray(grid.resize(self.size[::-1], Image.Resampling.BICUBIC))[..., None]

    def colour(self, hue: Range, saturation: Range, value: Range) -> np.ndarray:
        """A random colour (3,) with hue, saturation and value within the given ranges of 0..1."""
        rgb = colorsys.hsv_to_rgb(*(self.rng.uniform(*between) for between in (hue, saturation, value)))
        return 255 * np.array(rgb, np.float32)

    def disc(self, x: float, y: float, radius: float) -> np.ndarray:
        """Signed distance to a circle."""
        return np.hypot(self.x - x, self.y - y) - radius

    def box(self, x: float, y: float, width: float, height: float) -> np.ndarray:
        """Signed distance to an upright rectangle around (x, y)."""
        return np.maximum(abs(self.x - x) - width / 2, abs(self.y - y) - height / 2)

    def triangle(self, x: float, top: float, width: float, height: float) -> np.ndarray:
        """Signed distance to an isosceles triangle that points upward."""
        slant = (abs(self.x - x) * height - (self.y - top) * width / 2) / np.hypot(height, width / 2)
        return np.maximum(slant, self.y - top - height)


def bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns that hold all of the mask: a small thing is drawn without touching the whole picture."""
    left, top, right, bottom = Image.fromarray(mask.view(np.uint8)).getbbox() or (0, 0, 0, 0)
    return np.s_[top:bottom, left:right]


def mix(below: np.ndarray, above: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Blend two textures or colours by a share of 0..1, (H, W, 1)."""
    return below + (above - below) * share


def draw_scene(rng: np.random.Generator, size: tuple[int, int] = (192, 256)) -> tuple[np.ndarray, np.ndarray]:
    """A landscape: image uint8 (H, W, 3) and labels uint8 (H, W)."""
    scene = Scene(rng, size)
    draw_sky(scene)
    draw_ground(scene)
    if rng.random() < 0.7:
        draw_water(scene)
    if rng.random() < 0.7:
        draw_road(scene)
    things = (draw_house, draw_sign, *(draw_tree, draw_crate, draw_ball, draw_pole) * 2)
    depths = np.sort(rng.uniform(0.04, 0.85, rng.integers(6, 12))) ** 1.2  # far things first: near ones cover them
    for depth in depths:
        foot = scene.horizon + depth * (size[0] - scene.horizon)
        x = rng.uniform(0.03, 0.97) * size[1]
        things[rng.integers(len(things))](scene, x, foot, size[0] * (0.19 + 0.34 * depth))
    if rng.random() < 0.15:  # a corner that nobody has labelled
        scene.labels[scene.disc(rng.choice([0, size[1]]), rng.choice([0, size[0]]), 0.2 * size[0]) < 0] = IGNORE
    light = rng.uniform(0.8, 1.15) * rng.uniform(0.93, 1.07, 3).astype(np.float32)
    return (scene.image * light + rng.normal(0, 4, (*size, 1))).clip(0, 255).astype(np.uint8), scene.labels


def draw_sky(scene: Scene) -> None:
    """From deep blue to pale, with clouds."""
    zenith = scene.colour((0.52, 0.64), (0.3, 0.75), (0.6, 0.95))
    haze = scene.colour((0.05, 0.6), (0.05, 0.25), (0.85, 1))
    clouds = scene.noise(70, 24) + 0.6 * scene.noise(24, 10) + 0.3 * scene.noise(9, 5) - scene.rng.uniform(-0.1, 0.9)
    texture = mix(zenith, haze, (scene.y / scene.horizon).clip(0, 1)[..., None])
    scene.paint(scene.y - 1e4, mix(texture, np.float32([250, 248, 246]), 0.9 * clouds.clip(0, 1)), SKY)


def draw_ground(scene: Scene) -> None:
    """Grass up to a softly hilly horizon."""
    grass = scene.colour((0.19, 0.34), (0.4, 0.75), (0.4, 0.72))
    dry = scene.colour((0.12, 0.2), (0.35, 0.6), (0.5, 0.75))
    blades = 1 + 0.16 * scene.noise(2, 5) + 0.1 * scene.noise(7)
    texture = mix(grass, dry, (0.5 + 0.7 * scene.noise(50, 20)).clip(0, 1)) * blades
    scene.paint(scene.horizon - scene.y + 5 * scene.noise(90, 1e4)[..., 0], texture, GRASS)


def draw_water(scene: Scene) -> None:
    """A pond with ripples that mirrors the sky."""
    height = scene.size[0]
    x, y = scene.rng.uniform(0, scene.size[1]), scene.horizon + (height - scene.horizon) * scene.rng.uniform(0.15, 0.75)
    width, depth = height * scene.rng.uniform(0.35, 0.75), (y - scene.horizon) * 0.4 + height * 0.06
    ripples = np.sin(120 * np.log(scene.y + 40) + 2.5 * scene.noise(30, 6)[..., 0])[..., None]
    texture = scene.colour((0.48, 0.66), (0.35, 0.8), (0.4, 0.8)) * (1 + 0.17 * ripples + 0.08 * scene.noise(40, 4))
    shore = np.hypot((scene.x - x) / width, (scene.y - y) / depth) - 1 + 0.12 * scene.noise(40)[..., 0]
    scene.paint(np.maximum(shore * depth, scene.horizon + 6 - scene.y), texture, WATER)


def draw_road(scene: Scene) -> None:
    """Asphalt to a vanishing point, with a broken line in the middle."""
    height, width = scene.size
    near = (scene.y - scene.horizon - 2) / (height - scene.horizon)  # 0 at the horizon, 1 at the lower edge
    start, end = scene.rng.uniform(0.2, 0.8, 2) * width
    across = abs(scene.x - start - (end - start) * near) - (0.02 + scene.rng.uniform(0.12, 0.22) * near) * width
    asphalt = scene.colour((0.5, 0.75), (0.02, 0.12), (0.35, 0.62))
    texture = asphalt * (1 + 0.1 * scene.noise(2) + 0.08 * scene.noise(25, 8))
    scene.paint(np.maximum(across, -near * height), texture, ROAD)
    middle = abs(scene.x - start - (end - start) * near) - 0.012 * near * width
    dashes = np.sin(26 * np.log(near.clip(0.01) + 0.1)) * 4
    scene.paint(np.maximum(np.maximum(middle, dashes), 0.03 - near), np.float32([235, 230, 205]), None)


def draw_house(scene: Scene, x: float, y: float, size: float) -> None:
    """Brick or plaster walls, a roof with rows of tiles, windows and a door."""
    width, wall = size * scene.rng.uniform(0.9, 1.4), size * scene.rng.uniform(0.55, 0.75)
    scene.shade(x, y, 0.7 * width)
    joints = (scene.y % 5 < 1) | ((scene.x + 4 * (scene.y // 5 % 2)) % 9 < 1)
    courses = joints[..., None] * scene.rng.choice([0, 0.25])
    plaster = scene.colour((0.01, 0.13), (0.2, 0.65), (0.6, 0.95)) * (1 + 0.06 * scene.noise(3))
    scene.paint(scene.box(x, y - wall / 2, width, wall), plaster * (1 - courses), HOUSE)
    tiles = scene.colour((0.0, 0.06), (0.2, 0.7), (0.3, 0.55)) * (0.85 + 0.2 * (scene.y % 4 / 4))[..., None]
    scene.paint(scene.triangle(x, y - wall - 0.45 * size, 1.2 * width, 0.47 * size), tiles, HOUSE)
    glass = scene.colour((0.12, 0.6), (0.1, 0.4), (0.3, 0.95))
    for side in (-0.28, 0.28):
        place = (x + side * width, y - 0.58 * wall)
        scene.paint(scene.box(*place, 0.2 * width, 0.3 * wall), np.float32([240, 236, 228]), None)
        scene.paint(scene.box(*place, 0.14 * width, 0.22 * wall), glass, None)
    scene.paint(scene.box(x, y - 0.28 * wall, 0.16 * width, 0.56 * wall), tiles * 0.8, None)


def draw_tree(scene: Scene, x: float, y: float, size: float) -> None:
    """A round crown of leaves or the triangles of a fir, on a trunk."""
    size *= scene.rng.uniform(1.0, 1.5)
    scene.shade(x, y, 0.4 * size)
    bark = scene.colour((0.05, 0.1), (0.3, 0.6), (0.25, 0.45)) * (1 + 0.25 * scene.noise(2, 12))
    scene.paint(scene.box(x, y - 0.25 * size, max(5, 0.1 * size), 0.5 * size), bark, TREE)
    leaves = scene.colour((0.2, 0.42), (0.45, 0.8), (0.25, 0.55)) * (1 + 0.35 * scene.noise(4) + 0.2 * scene.noise(9))
    if scene.rng.random() < 0.4:
        crown = [scene.triangle(x, y - (1.1 - 0.24 * k) * size, (0.36 + 0.14 * k) * size, 0.42 * size)
                 for k in range(3)]
    else:
        places = scene.rng.uniform(-0.2, 0.2, (6, 2)) * size + (x, y - 0.68 * size)
        crown = [scene.disc(*place, scene.rng.uniform(0.17, 0.26) * size) for place in places]
    scene.paint(np.minimum.reduce(crown) + 1.5 * scene.noise(5)[..., 0], leaves, TREE)


def draw_crate(scene: Scene, x: float, y: float, size: float) -> None:
    """A wooden box: planks in a frame, with a brace across."""
    side = size * scene.rng.uniform(0.55, 0.85)
    scene.shade(x, y, 0.7 * side)
    wood = scene.colour((0.05, 0.13), (0.4, 0.75), (0.5, 0.85)) * (1 + 0.12 * scene.noise(14, 2))
    body = scene.box(x, y - side / 2, side, side)
    plank = (scene.y - y) % (side / 5) < 1.3
    scene.paint(body, wood * (1 - 0.45 * plank[..., None]), CRATE)
    brace = abs((scene.x - x) + scene.rng.choice([-1, 1]) * (scene.y - y + side / 2)) - 0.1 * side
    frame = np.maximum(np.minimum(brace, -body - 0.13 * side), body)
    scene.paint(abs(frame) - 0.6, wood * 0.45, None)
    scene.paint(frame, wood * 1.18, None)
    scene.paint(abs(body + 0.5) - 0.5, wood * 0.5, None)


def draw_ball(scene: Scene, x: float, y: float, size: float) -> None:
    """A beach ball: slices in two colours, lit from above."""
    radius = size * scene.rng.uniform(0.25, 0.38)
    y -= radius
    scene.shade(x, y + radius, 1.2 * radius)
    turn = np.arctan2(scene.y - y + 0.35 * radius, scene.x - x - 0.25 * radius)
    slices = (0.5 + 4 * np.sin(3 * turn + scene.rng.uniform(0, 6))).clip(0, 1)[..., None]
    paint = mix(scene.colour((0, 1), (0.6, 0.95), (0.6, 1)), scene.colour((0, 1), (0, 0.3), (0.9, 1)), slices)
    from_light = np.hypot(scene.x - x + 0.3 * radius, scene.y - y + 0.4 * radius) / radius
    scene.paint(scene.disc(x, y, radius), paint * (1.1 - 0.22 * from_light[..., None] ** 2), BALL)


def draw_pole(scene: Scene, x: float, y: float, size: float, height: float = 1.3) -> None:
    """A slender mast with coloured bands."""
    width = 5 + 0.07 * size
    scene.shade(x, y, 1.5 * width)
    bands = ((scene.y - y) % (2.4 * width) < 1.2 * width)[..., None]
    paint = mix(scene.colour((0, 1), (0, 0.1), (0.75, 1)), scene.colour((0, 1), (0.3, 0.9), (0.1, 0.55)), bands)
    roundness = 1.1 - 1.5 * ((scene.x - x + 0.12 * width) / width)[..., None] ** 2
    scene.paint(scene.box(x, y - height * size / 2, width, height * size), paint * roundness, POLE)


def draw_sign(scene: Scene, x: float, y: float, size: float) -> None:
    """A road sign on a mast: round, square on its tip or triangular, with a rim and a bar or a dot."""
    draw_pole(scene, x, y, size, height=1.0)
    radius, y = size * scene.rng.uniform(0.2, 0.26) + 3, y - size
    shapes = (scene.disc(x, y, radius), (abs(scene.x - x) + abs(scene.y - y)) / np.sqrt(2) - 0.85 * radius,
              scene.triangle(x, y - 1.1 * radius, 2.3 * radius, 2 * radius))
    outline = shapes[scene.rng.integers(3)]
    face, ink = scene.colour((0.1, 0.17), (0.0, 0.95), (0.9, 1)), scene.colour((0.9, 1.02), (0.8, 1), (0.6, 0.9))
    scene.paint(outline, ink, SIGN)
    scene.paint(outline + 0.24 * radius, face, None)
    symbols = (scene.box(x, y, 0.7 * radius, 0.25 * radius), scene.disc(x, y + 0.1 * radius, 0.22 * radius))
    scene.paint(symbols[scene.rng.integers(2)], np.float32([30, 30, 36]), None)
