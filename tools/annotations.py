"""A plain data set of the outlines that labelling tools export: `python data.py from-coco`, `from-labelme`.

Reading order: from_coco -> read_coco -> coco_outline; from_labelme -> read_labelme -> labelme_outline; Library; then
convert -> make_classes, add_picture -> draw_labels -> polygon_pixels, run_pixels, bitmap_pixels.

Shapes: H, W height and width; N points of a polygon; K classes. An outline is a function of the size (H, W) that gives
the pixels of an object, as indices into the flattened image.

The pixel in row i and column j covers x from j to j + 1 and y from i to i + 1. It belongs to a polygon if its centre
does. Where objects overlap, the smaller lies over the larger, whatever their order in the file: the order is mostly
that of drawing, and a small object must not vanish under a large one that was drawn later.
"""

import base64
import os
import re
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

import data
import pictures
from common import IGNORE, UserError, printable, reading
from tools import from_folders
from tools.class_list import NO_CLASS, read_classes
from tools.context import decode_runs, fill_runs

Outline = Callable[[tuple[int, int]], np.ndarray]
BACKGROUND_NAMES = ("background", "bg")
COCO, LABELME = "not what COCO writes", "not what labelme writes"
REMEDY = "export it again, or take it out of the folder"
FARTHEST = 1e7  # pixels: a point farther from the picture is a mistake


class Annotated(NamedTuple):
    """A picture and its objects, each a class name and an outline."""
    path: Path
    name: str  # in the data set: the path below the folder of the pictures, without the extension
    split: str  # "train", "val" or "test"; "" if the tool made no splits
    size: tuple[int | None, int | None]  # (H, W) of the picture that was labelled, if the tool tells
    source: str  # the JSON file
    objects: list[tuple[str, Outline]]

    def __str__(self) -> str:
        return f"{self.path} and {self.source}"


class Library:
    """The picture files below a folder; it also counts what is left out."""

    def __init__(self, root: Path) -> None:
        self.root, self.left_out = Path(os.path.normpath(root)), Counter()
        self.files = pictures.files_below(self.root)
        self.by_name = defaultdict(list)  # a file's name -> its paths, each with the parts below the root
        for file in self.files:
            parts = unicodedata.normalize("NFC", file.relative_to(self.root).as_posix()).split("/")
            self.by_name[parts[-1]].append((file, parts))

    def find(self, name: str, near: Path, split: str) -> Path | None:
        """The picture that a JSON file in the folder `near` calls `name`: a path of any system, or an address.

        None that leads out of the root is read: the file may come from a stranger, and pictures are copied.
        The longer path must end with the shorter: `cam1/7.jpg` is not `cam2/7.jpg`. Raises UserError if several do.
        """
        name = unquote(urlsplit(name).path) if "://" in name else name.replace("\\", "/")
        inside = Path(os.path.relpath(near / name, self.root))
        if ".." not in inside.parts and os.path.isfile(self.root / inside):  # else the name may be of another machine
            return self.root / inside
        parts = [part for part in unicodedata.normalize("NFC", name).split("/") if part not in ("", ".", "..")]
        found = [file for file, own in self.by_name[parts[-1]]
                 if all(a == b for a, b in zip(own[::-1], parts[::-1], strict=False))]
        if len(found) > 1 and split:
            found = [file for file in found if find_split(file.relative_to(self.root)) == split]
        if len(found) > 1:
            raise UserError(f"{name} can be {found[0]} or {found[1]}: keep one of them, or the folders in the name")
        self.left_out[f"images absent from {self.root}"] += not found
        return found[0] if found else None


def check_name(name: object, where: Path) -> None:
    """Raises UserError unless this can be the name of a class: a text without control characters."""
    if not isinstance(name, str) or not name.strip() or data.ODD_CHARACTERS.search(name):
        raise UserError(f"{where}: a class has the name {name!r}: give it one of letters")


def picture_name(path: Path, root: Path) -> str:
    """The path below the root, without its extension."""
    return unicodedata.normalize("NFC", path.relative_to(root).with_suffix("").as_posix())


def find_split(path: Path) -> str:
    """The last of train, val and test in a path such as `valid/x.json` or `instances_train2017.json`; "" if none."""
    words = re.findall(r"(?<![a-z])(train|val|test)(?:ing|id|idation)?(?![a-z])", path.as_posix().lower())
    return words[-1] if words else ""


def from_coco(images: Path, json_path: Path | None, no_background: bool, out: Path, workers: int) -> None:
    """Make a plain data set of a COCO file, or of a folder with one file for each split. Raises UserError."""
    json_path = json_path or images
    if not json_path.exists():
        raise UserError(f"{json_path} does not exist: name the COCO file with --json")
    files = pictures.files_below(json_path, (".json",)) if json_path.is_dir() else [json_path]
    splits = [find_split(file.relative_to(json_path)) if len(files) > 1 else "" for file in files]
    if not files or len(files) > 1 and not all(splits):
        raise UserError(f"{json_path} holds {len(files)} .json files, not one for each of train, val and test: "
                        "name the file with --json")
    library, annotated, categories = Library(images), [], {}
    for file, split in zip(files, splits, strict=True):
        with reading(f"{file}: {COCO}", REMEDY):
            annotated += read_coco(file, split, library, categories)
    used = {label for picture in annotated for label, _ in picture.objects}
    if not no_background:  # drawn or not, it is the class of the pixels outside of all objects
        used |= {name for name in categories if bare(name) in BACKGROUND_NAMES}
    if unused := [name for name in categories if name not in used]:
        print(f"categories without an outline, left out: {', '.join(unused)}")
    found = {name: str(json_path) for name in categories if name in used}
    convert(annotated, found, None, library, no_background, out, workers)


def read_coco(path: Path, split: str, library: Library, categories: dict[str, None]) -> list[Annotated]:
    """The pictures of a COCO file; adds its category names, in the order of their ids, to `categories`."""
    content, objects, numbers, result = data.read_json(path), defaultdict(list), set(), []
    names = {str(entry["id"]): entry["name"] for entry in sorted(content["categories"], key=lambda e: e["id"])}
    if len(names) < len(content["categories"]):
        raise UserError(f"{path}: two categories have one id: export the file again")
    for name in names.values():
        check_name(name, path)
    categories.update(dict.fromkeys(names.values()))
    for annotation in content["annotations"]:
        where, category = f"{path}, annotation {annotation.get('id')}", str(annotation["category_id"])
        if category not in names:
            raise UserError(f"{where}: category_id {category} is none of the categories: export the file again")
        with reading(f"{where}: {COCO}", REMEDY):
            if outline := coco_outline(annotation.get("segmentation"), where, library.left_out):
                objects[str(annotation["image_id"])].append((names[category], outline))
    for entry in content["images"]:
        number, size = str(entry["id"]), tuple(entry.get(side) and int(entry[side]) for side in ("height", "width"))
        if number in numbers:
            raise UserError(f"{path}: two images have the id {number}, so that an annotation may be of either: "
                            "export the file again")
        numbers.add(number)
        own = objects.pop(number, [])
        if found := library.find(entry["file_name"], path.parent, split):
            result.append(Annotated(found, picture_name(found, library.root), split, size, str(path), own))
    library.left_out["annotations of images that the file does not list"] += sum(map(len, objects.values()))
    return result


def coco_outline(code: dict | list | None, where: str, left_out: Counter) -> Outline | None:
    """The outline of a "segmentation", run lengths or polygons; None, and counted, if there is a box only."""
    if isinstance(code, dict):
        return partial(run_pixels, code["counts"], tuple(code["size"]), where)
    if not code:
        left_out["annotations with a box only"] += 1
        return None
    polygons = [code] if np.isscalar(code[0]) else code  # some tools leave the outer list out
    return polygon_outline([as_points(polygon) for polygon in polygons], left_out)


def as_points(values: list) -> np.ndarray:
    """Points (N, 2) of x and y, from lists of numbers. Raises ValueError, or what NumPy raises, for others."""
    points = np.array(values, float).reshape(-1, 2)
    if not (abs(points) < FARTHEST).all():  # also where there is a NaN
        raise ValueError(f"a coordinate is no number below {FARTHEST:g}")
    return points


def polygon_outline(polygons: list[np.ndarray], left_out: Counter) -> Outline | None:
    """The outline of the polygons, (N, 2) of x and y, with 3 points or more; the others are counted."""
    whole = [polygon for polygon in polygons if len(polygon) >= 3]
    left_out["polygons of fewer than 3 points"] += len(polygons) - len(whole)
    return partial(polygon_pixels, whole) if whole else None


def from_labelme(images: Path, classes: str | None, no_background: bool, out: Path, workers: int) -> None:
    """Make a plain data set of a folder with labelme's .json files, beside or among the pictures. Raises UserError."""
    library, annotated = Library(images), []
    files = pictures.files_below(library.root, (".json",))
    if not files:
        raise UserError(f"{images} holds no .json files: give the folder that labelme saved to")
    splits = [find_split(file.relative_to(library.root).parent) for file in files]
    splits = splits if all(splits) else [""] * len(files)
    with tempfile.TemporaryDirectory() as embedded:
        for file, split in zip(files, splits, strict=True):
            with reading(f"{file}: {LABELME}", REMEDY):
                annotated += read_labelme(file, split, library, Path(embedded))
        found = {label: picture.source for picture in annotated for label, _ in picture.objects}
        order = sorted(found, key=lambda name: (bare(name) not in BACKGROUND_NAMES, bare(name), name))
        convert(annotated, {name: found[name] for name in order}, classes, library, no_background, out, workers)


def read_labelme(path: Path, split: str, library: Library, embedded: Path) -> list[Annotated]:
    """The picture of one of labelme's files, or none; a picture that is only inside the file goes to `embedded`."""
    content, root = data.read_json(path), library.root
    size, objects = (content.get("imageHeight"), content.get("imageWidth")), []
    for shape in content["shapes"]:
        check_name(shape["label"], path)
        if outline := labelme_outline(shape, str(path), library.left_out):
            objects.append((shape["label"], outline))
    found = library.find(content["imagePath"], path.parent, split)
    if not found and content.get("imageData"):
        library.left_out[f"images absent from {root}"] -= 1
        root, found = embedded, embedded / path.relative_to(root).with_suffix(".png")
        found.parent.mkdir(parents=True, exist_ok=True)
        with pictures.open_picture(base64.b64decode(content["imageData"]), f"{path}, imageData") as picture:
            Image.fromarray(pictures.image_as_rgb(picture)).save(found)
    return [Annotated(found, picture_name(found, root), split, size, str(path), objects)] if found else []


def labelme_outline(shape: dict, where: str, left_out: Counter) -> Outline | None:
    """The outline of a polygon, rectangle, circle or mask; None, and counted, for lines and points."""
    kind, points = shape.get("shape_type") or "polygon", as_points(shape["points"])
    if kind == "mask":
        return partial(bitmap_pixels, shape["mask"], tuple(np.rint(points[0]).astype(int).tolist()), where)
    if kind not in ("polygon", "rectangle", "circle", "rotation"):
        left_out[printable(f"shapes of the kind {kind}")] += 1
        return None
    if kind == "rectangle" and len(points) == 2:  # two opposite corners
        (x0, y0), (x1, y1) = points
        points = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    elif kind == "circle" and len(points) == 2:  # the centre, and a point of the circle
        angles = np.linspace(0, 2 * np.pi, 360, endpoint=False)
        points = points[0] + np.hypot(*(points[1] - points[0])) * np.stack([np.cos(angles), np.sin(angles)], 1)
    return polygon_outline([points], left_out)


# ------------------------------------------------------------------------------------------ from outlines to a data set
def bare(name: str) -> str:
    """A class name without what people write in many ways: case, and blanks and underscores at the ends."""
    return name.strip("_ \t\n").casefold()


class Classes(NamedTuple):
    """The classes of the new data set, and where the names in the annotations go."""
    names: list[str]
    palette: np.ndarray  # uint8 (K, 3)
    labels: dict[str, int]  # each name in the annotations -> class index or 255
    outside: int  # the label of the pixels outside of all objects


def make_classes(found: dict[str, str], classes: str | None, no_background: bool) -> Classes:
    """The classes of the list, or the names in the annotations in their order; before them `background`, if absent.

    `found` has for each name in the annotations a file with it. Raises UserError for a name that is not in the list.
    """
    if classes:
        names, palette = read_classes(classes)[:2]
    else:  # of several spellings the first
        spellings = {bare(name): name.strip() for name in reversed(found) if bare(name) not in NO_CLASS}
        names, palette = list(spellings.values())[::-1], None
    background = next((k for k, name in enumerate(names) if bare(name) in BACKGROUND_NAMES), None)
    if background is None and not no_background:
        names, background = ["background", *names], 0
        palette = palette if palette is None else np.vstack([np.zeros((1, 3), np.uint8), palette])
    data.check_names(names, f"--classes {classes}" if classes else next(iter(found.values()), ""))
    background = IGNORE if background is None else background
    # From the weakest rule to the strongest: a list may hold `void`, and may hold `A` and `a`.
    table = {**dict.fromkeys(NO_CLASS, IGNORE), **dict.fromkeys(BACKGROUND_NAMES, background),
             **{bare(name): k for k, name in enumerate(names)}, **{name: k for k, name in enumerate(names)}}
    labels = {name: table.get(name, table.get(bare(name))) for name in found}
    if unknown := [name for name, label in labels.items() if label is None]:
        raise UserError(f"{found[unknown[0]]}: label '{unknown[0]}' is none of the classes of {classes}: add it there, "
                        "or correct the file")
    for text, chosen in (("no class", [name for name in found if labels[name] == IGNORE]),
                         ("taken for the class of another spelling",
                          [name for name in found if labels[name] != IGNORE and name != names[labels[name]]])):
        if chosen:
            print(f"{text}: {', '.join(map(repr, chosen))}")
    return Classes(names, pictures.default_palette(len(names)) if palette is None else palette, labels,
                   IGNORE if no_background else background)


def convert(annotated: list[Annotated], found: dict[str, str], class_list: str | None, library: Library,
            no_background: bool, out: Path, workers: int) -> None:
    """Draw the labels and write the data set; `found` are the class names, each with its file. Raises UserError."""
    if not annotated:
        raise UserError(f"none of the pictures in the annotations is below {library.root}: give their folder")
    if not any(picture.objects for picture in annotated):
        raise UserError(f"the annotations of {library.root} hold no polygon, rectangle, circle or mask: export these")
    name, count = Counter(picture.name for picture in annotated).most_common(1)[0]
    if count > 1:
        raise UserError(f"{count} pictures have the name {name}, or one is listed twice: keep one, or rename them")
    classes = make_classes(found, class_list, no_background)
    outside = "unlabelled" if no_background else f"of the class '{classes.names[classes.outside]}'"
    print(f"pixels outside of all objects are {outside}")
    if number := sum(not picture.objects for picture in annotated):
        print(f"{number} pictures have no object: all their pixels are {outside}; take out what is not labelled yet")
    safe, splits = from_folders.safe_names([picture.name for picture in annotated]), defaultdict(list)
    jobs = [picture._replace(name=safe[picture.name]) for picture in annotated]
    for picture in jobs:
        splits[picture.split or "train"].append(picture.name)
    if "val" not in splits:
        splits |= from_folders.split_names(splits["train"])
    if "train" not in splits:
        raise UserError(f"{library.root} has no pictures for training: give a file or a folder with train in its path")
    empty = from_folders.write_dataset(out, classes.names, classes.palette, jobs, partial(add_picture, classes), splits,
                                       workers)
    library.left_out["pictures without annotations"] = len({*library.files} - {picture.path for picture in annotated})
    library.left_out["objects that cover no pixel's centre"] = sum(empty)
    if left_out := [f"{number} {what}" for what, number in library.left_out.items() if number]:
        print(f"left out: {', '.join(left_out)}")


def add_picture(classes: Classes, draft: Path, picture: Annotated) -> int:
    """Bring a picture and its labels into the data set; returns the number of objects without a pixel."""
    size = pictures.picture_size(picture.path)
    if all(picture.size):
        pictures.check_size(picture.path, f"the one in {picture.source}", picture.size)
    with reading(f"{picture.source}: {LABELME}", REMEDY):  # its masks are decoded here
        labels, empty = draw_labels(picture.objects, classes, size)
    pictures.save_labels(labels, draft / "labels" / f"{picture.name}.png", classes.palette)
    from_folders.add_image(draft, picture.path, picture.name)
    return empty


def draw_labels(objects: list[tuple[str, Outline]], classes: Classes, size: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Class index or 255, uint8 (H, W), the smaller objects over the larger; the number of objects without a pixel."""
    labels = np.full(size, classes.outside, np.uint8)
    areas = [(outline(size), classes.labels[name]) for name, outline in objects]
    for pixels, label in sorted(areas, key=lambda area: -len(area[0])):  # stable: of equal ones the later lies above
        labels.flat[pixels] = label
    return labels, sum(not len(pixels) for pixels, _ in areas)


def polygon_pixels(polygons: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie in one of the polygons, (N, 2) of x and y; of each by the even-odd rule.

    A centre on a left or upper edge is inside, on a right or lower one outside. (Pillow's polygon takes whole numbers
    only, and adds the pixels of the border: an object grows by a pixel.)
    """
    result = []
    for points in polygons:
        # The pixels of the bounding box, clipped to the image: rows top .. bottom - 1, columns left .. right - 1.
        limits = np.stack([points.min(0), points.max(0)])
        (left, top), (right, bottom) = np.ceil(limits - 0.5).clip(0, size[::-1]).astype(int).tolist()
        (x0, y0), (x1, y1) = points.T, np.roll(points, -1, 0).T
        y = np.arange(top, bottom)[:, None] + 0.5  # (rows, 1), beside (N,)
        row, edge = np.nonzero((y0 <= y) != (y1 <= y))
        x = x0[edge] + (x1 - x0)[edge] * (y[row, 0] - y0[edge]) / (y1 - y0)[edge]
        column = np.ceil(x - 0.5).clip(left, right).astype(int) - left  # the first centre at or right of the edge
        crossings = np.zeros((bottom - top, right - left + 1), np.uint8)
        np.add.at(crossings, (row, column), 1)
        rows, columns = np.nonzero(np.cumsum(crossings, 1, np.uint8)[:, :-1] % 2)  # a wrap at 256 keeps it odd or even
        result.append((rows + top) * size[1] + columns + left)
    return np.unique(np.concatenate(result))


def run_pixels(counts: str | list[int], coded_size: tuple[int, int], where: str, size: tuple[int, int]) -> np.ndarray:
    """The pixels of COCO's run lengths: a list down the columns, the first outside the object; or their short code."""
    if coded_size != size:
        raise UserError(f"{where}: a mask of size {coded_size} for an image of {size}: export the file again")
    with reading(f"{where}: its runs do not fill {size[0]} x {size[1]} pixels", "export the file again"):
        if isinstance(counts, str):
            return np.flatnonzero(decode_runs(counts, size))
        return np.flatnonzero(fill_runs(counts, size))


def bitmap_pixels(code: str, corner: tuple[int, int], where: str, size: tuple[int, int]) -> np.ndarray:
    """The pixels of a PNG in base64 with its left upper corner at (x, y)."""
    canvas = Image.new("1", size[::-1])
    with pictures.open_picture(base64.b64decode(code), f"{where}, a mask") as picture:
        mask = np.asarray(picture) != 0  # labelme writes 0 and 1
    canvas.paste(Image.fromarray(mask if mask.ndim == 2 else mask[..., 0]), corner)
    return np.flatnonzero(canvas)
