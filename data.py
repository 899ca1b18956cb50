"""From files on disk to batches of crops: data sets, paired transforms, the training stream, test-time images.

Reading order: open_dataset -> SegmentationDataset -> train_transform -> positions -> training_loader -> normalize for
training; single_scale_image and multi_scale_images for the test; preflight before a run. `python data.py --help` makes
and checks data sets; its code is in tools/prepare.py and tools/toy.py.

Shapes: H, W height and width of an image, w side of the training window, B batch, K classes.
Images are RGB uint8 (H, W, 3); labels are uint8 (H, W) with the class index 0..K-1, or 255 where there is none.
"""

import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import unicodedata
from collections import Counter, defaultdict, namedtuple
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import common
from common import IGNORE, UserError, reason
from pictures import EXTENSIONS, check_size, default_palette, read_image, read_labels

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, in grey levels, RGB
TEST_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
CONTEXT = Path("data/VOCdevkit/VOC2010")  # where Pascal Context is expected
CONTEXT_CLASSES = Path(__file__).with_name("pascal_context.json")


class DatasetInfo(NamedTuple):
    """Names and colours of the classes. `ignore_index` is the value of "no class" in the files."""
    name: str
    classes: tuple[str, ...]
    palette: np.ndarray  # uint8 (K, 3)
    ignore_index: int = IGNORE


# The folders of a data set, below its root, and the value of class 0 in its label files; smaller values are no class.
Layout = namedtuple("Layout", "images labels splits first_class")
PLAIN_FOLDER = Layout("images", "labels", ".", first_class=0)
PASCAL_CONTEXT = Layout("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext", first_class=1)


class SegmentationDataset:
    """Pairs of an image and its labels. Raises UserError for a split that is absent, empty, or names absent files."""

    def __init__(self, root: Path, split: str, info: DatasetInfo, layout: Layout) -> None:
        self.root, self.split, self.info, self.layout = root, split, info, layout
        split_file = root / layout.splits / f"{split}.txt"
        images, labels = root / layout.images, root / layout.labels
        lines, files = read_split(split_file), list_files(images, EXTENSIONS)
        image_files = [only(find_line(files, line), line, images, split_file) for line in lines]
        self.names = [os.path.splitext(file)[0] for file in image_files]
        if repeated := [name for name, number in Counter(self.names).items() if number > 1]:
            raise UserError(f"{split_file} names '{repeated[0]}' more than once: leave one of its lines")
        files = list_files(labels, (".png",))
        label_files = [only(files[composed(name)], f"{name}.png", labels, split_file) for name in self.names]
        self.image_paths, self.label_paths = ([images / file for file in image_files],
                                              [labels / file for file in label_files])

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self) -> dict:
        """What two runs must share to have learned from, or to be compared on, the same images and classes."""
        lists = json.dumps([self.names, self.info.classes]).encode()
        return {"images": len(self), "classes": len(self.info.classes), "sha256": hashlib.sha256(lists).hexdigest()}

    def image(self, i: int) -> np.ndarray:
        """RGB uint8 (H, W, 3), upright (EXIF rotation applied). Raises UserError for a file that cannot be read."""
        return read_image(self.image_paths[i])

    def labels(self, i: int) -> np.ndarray:
        """Class index or 255, uint8 (H, W).

        Raises UserError for an unreadable file, a foreign value, a wrong size, a palette with the classes in another
        order.
        """
        path, first, ignore = self.label_paths[i], self.layout.first_class, self.info.ignore_index
        last = first + len(self.info.classes) - 1
        values, palette = read_labels(path)
        check_size(self.image_paths[i], path, values.shape)
        if palette is not None:
            self.check_palette(path, values, palette)
        ignored = (values < first) | (values == ignore)
        foreign = values[~ignored & (values > last)]
        if foreign.size:
            raise UserError(f"{path}: label value {foreign[0]} is no class: use {first}..{last}, or {ignore} for none")
        return np.where(ignored, IGNORE, values - first).astype(np.uint8)

    def check_palette(self, path: Path, values: np.ndarray, palette: np.ndarray) -> None:
        """Raises UserError if the file draws a value that occurs in the colour that the data set gives another class.

        Editors reorder palettes: the picture looks right, and every value means another class. Colours that no class
        has are those of a tool, and tell nothing.
        """
        classes, first = self.info.classes, self.layout.first_class
        class_of = {colour.tobytes(): k for k, colour in enumerate(self.info.palette)}
        for own, colour in enumerate(palette[first:first + len(classes)]):
            value, drawn = own + first, class_of.get(colour.tobytes())
            # The pixels come last: this is done for every sample of a training, and palettes mostly agree.
            if drawn is not None and (colour != self.info.palette[own]).any() and (values == value).any():
                raise UserError(f"{path} draws value {value}, '{classes[own]}', in the colour of '{classes[drawn]}': "
                                "its palette has another order; make the data set with "
                                "`python data.py from-folders`, which goes by the colours")


def open_dataset(root: str | Path, split: str) -> SegmentationDataset:
    """Open a split of any name of a plain folder (dataset.json) or of a VOC2010 tree with Pascal Context labels.

    The root "toy" is the toy data set, drawn on first use into data/toy. Raises UserError with the remedy.
    """
    if str(root) == "toy":
        from tools.toy import make_toy

        root = make_toy()
    root = Path(root)
    if (root / "dataset.json").is_file():
        return SegmentationDataset(root, split, read_info(root / "dataset.json"), PLAIN_FOLDER)
    splits = (root / PASCAL_CONTEXT.splits).glob("*.txt")
    if (root / PASCAL_CONTEXT.labels).is_dir() and any(splits):  # prepare-context writes the splits last
        return SegmentationDataset(root, split, context_info(), PASCAL_CONTEXT)
    from tools.context import why_no_data

    raise UserError(why_no_data(root))


def context_info() -> DatasetInfo:
    """The 59 classes of Pascal Context (Mottaghi et al., 2014) in the order of their original ids."""
    classes = json.loads(CONTEXT_CLASSES.read_text())["classes"]
    palette = np.array([c["color"] for c in classes], np.uint8)
    return DatasetInfo("Pascal Context 59", tuple(c["name"] for c in classes), palette)


ODD_CHARACTERS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # controls, line ends, half characters
KEYS = {"classes": ("class_names", "names", "labels", "categories"), "palette": ("colors", "colours", "color_map"),
        "ignore_index": ("ignore_label", "ignore_value", "ignore", "void"),
        "name": (), "note": (), "made_by": (), "source": ()}


def read_info(path: Path) -> DatasetInfo:
    """Read dataset.json: {"classes": [...], "palette": [[r, g, b], ...], "ignore_index": 255, "name": ...}.

    Only the classes must be there. Raises UserError with the line or the field that is wrong.
    """
    with common.reading(f"{path} is no readable JSON", "mend it"):
        fields = read_json(path)
    for key in fields if isinstance(fields, dict) else ():
        if key == "reduce_zero_label":
            raise UserError(f'{path}: "{key}" is not known here: 0 stands for no class in such labels; make the data '
                            "set with `python data.py from-folders --zero-is-unlabelled`")
        if key not in KEYS:
            meant = next((right for right, others in KEYS.items() if key.lower() in (right, *others)), None)
            raise UserError(f'{path}: "{key}" is not known: ' + (f'write "{meant}"' if meant else
                            f"keys are {', '.join(KEYS)}; put remarks into note"))
    classes = fields.get("classes") if isinstance(fields, dict) else None
    if not isinstance(classes, list) or not all(isinstance(name, str) and name for name in classes):
        raise UserError(f'{path}: "classes" must be a list of class names')
    check_names(classes, f'{path}: "classes"')
    ignore_index = fields.get("ignore_index", IGNORE)
    if type(ignore_index) is not int or not len(classes) <= ignore_index <= 255:
        raise UserError(f'{path}: "ignore_index" is {ignore_index!r} but must be one of {len(classes)}..255, no class')
    try:
        palette = np.array(fields.get("palette", default_palette(len(classes))))
    except ValueError:  # rows of different lengths
        palette = np.empty(0)
    if palette.shape != (len(classes), 3) or palette.dtype.kind not in "iu" or ((palette < 0) | (palette > 255)).any():
        raise UserError(f'{path}: "palette" must hold {len(classes)} colours [red, green, blue], whole numbers 0..255')
    name = common.printable(str(fields.get("name", path.parent.name)))
    return DatasetInfo(name, tuple(classes), palette.astype(np.uint8), ignore_index)


def check_names(names: list[str], source: str) -> None:
    """Raises UserError unless there are 1 to 255 class names, all different, without control characters."""
    if odd := [name for name in names if ODD_CHARACTERS.search(name)]:
        raise UserError(f"{source}: {odd[0]!r} is no name of a class: take out what is no character")
    repeated = len(names) - len(set(names))
    if repeated or not 1 <= len(names) <= IGNORE:
        raise UserError(f"{source}: {len(names)} names, {repeated} repeated: give 1 to {IGNORE} different ones")


def read_json(path: Path) -> object:
    """The content of a JSON file; inside `common.reading`. Raises ValueError, OSError or RecursionError."""
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) < len(pairs):  # a second value would replace the first unseen
            raise ValueError(f"a key is there twice in {', '.join(key for key, _ in pairs)}")
        return fields

    return json.loads(path.read_bytes(), object_pairs_hook=unique)


def read_text(path: Path, remedy: str) -> str:
    """A text file in UTF-8 or, with a byte order mark, UTF-16. Raises UserError if it cannot be read or is empty."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}): {remedy}") from None
    if not text.strip():
        raise UserError(f"{path} is empty: {remedy}")
    return text


def read_split(path: Path) -> list[str]:
    """The names in a split file, one a line, extension or not. UserError if absent, empty, leading outside."""
    others = ", ".join(sorted(file.stem for file in path.parent.glob("*.txt"))) or "none"
    text = read_text(path, f"write the names of the images there, one a line (splits here: {others})")
    names = [name for line in text.split("\n") if (name := line.strip())]  # names may hold other separators of lines
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{path} names '{name}', which leads out of the data folder: use names below images/")
    return names


def write_split(path: Path, names: Iterable[str]) -> None:
    """The counterpart of read_split; the file appears whole or not at all."""
    text = "".join(f"{name}\n" for name in names).encode()
    common.write_whole(path, lambda file: file.write(text))


def list_files(folder: Path, extensions: Sequence[str]) -> dict[str, list[str]]:
    """The files of these extensions, in upper or lower case, by their `composed` name without extension.

    Files are paths below `folder`, also in folders there. One listing is faster than a question for every name.
    """
    files = defaultdict(list)
    for place, _, names in os.walk(folder, followlinks=True):
        inner = os.path.relpath(place, folder)
        for name in sorted(names):
            stem, extension = os.path.splitext(name)
            if extension.lower() in extensions:
                files[composed(os.path.join(inner, stem))].append(os.path.normpath(os.path.join(inner, name)))
    return files


def composed(name: str) -> str:
    """A name in one spelling: some systems write an accent and its letter as two characters."""
    return os.path.normpath(unicodedata.normalize("NFC", name))


def find_line(files: dict[str, list[str]], line: str) -> list[str]:
    """The files that a line of a split can mean: that file itself, or else those of this name but for the extension."""
    stem, extension = os.path.splitext(composed(line))
    others = files[stem] if extension.lower() in EXTENSIONS else []
    return [file for file in others if composed(file) == stem + extension] or files[composed(line)] + others


def only(files: list[str], name: str, folder: Path, split_file: Path) -> str:
    """The one file of a name. Raises UserError if there is none, or several."""
    if len(files) > 1:
        raise UserError(f"{split_file} names '{name}', and {folder} has {' and '.join(files)}: keep one of them, or "
                        "write the image's name with its extension there")
    if not files:
        kinds = "" if name.lower().endswith(EXTENSIONS) else f" as {' or '.join(EXTENSIONS)}"
        raise UserError(f"{folder} has no '{name}', which {split_file} names{kinds}: add the file or remove the name")
    return files[0]


# ---------------------------------------------------------------------------------------------- resizes and test images
def base_size(window: int) -> int:
    """The side that ratio 1 stands for: 520 for the released models' window of 480, in proportion for others."""
    return round(window * 520 / 480)


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) times scale, rounded half up, at least 1."""
    return tuple(max(1, int(side * scale + 0.5)) for side in size)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear without antialias, to one grey level of OpenCV's. Pillow's antialiases: about half a point of mIoU."""
    if image.shape[:2] == size:
        return image
    planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]  # (H, W, 3) -> (1, 3, H, W)
    planes = F.interpolate(planes, size, mode="bilinear", align_corners=False)
    return planes[0].permute(1, 2, 0).contiguous().numpy()


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest as OpenCV's INTER_NEAREST: floor(x * scale) in float64; torch's float32 is a pixel off at times."""
    rows, columns = (np.minimum((np.arange(new) * (1 / (new / old))).astype(np.int64), old - 1)
                     for new, old in zip(size, labels.shape, strict=True))
    return labels.take(columns, axis=1).take(rows, axis=0)


def single_scale_image(image: np.ndarray, window: int) -> np.ndarray:
    """The single-scale test image: short side to 520 (long at most 4096), then both sides up to a multiple of 32.

    The numbers are for a window of 480. Two resizes in a row, as in the official test. No side is below the window.
    """
    short, long = sorted(image.shape[:2])
    scale = max(window / short, min(base_size(window) / short, int(4096 * window / 480) / long))
    height, width = scaled_size(image.shape[:2], scale)
    image = resize(image, (height, width))
    return resize(image, (math.ceil(height / 32) * 32, math.ceil(width / 32) * 32))


def multi_scale_images(image: np.ndarray, window: int) -> list[np.ndarray]:
    """The six multi-scale test images: short side to max(480, 520 r) for a window of 480, in no multiple of 32.

    The first two are one object, for they are of one size: the official average counts that view twice.
    """
    sides = [max(window, int(base_size(window) * ratio)) for ratio in TEST_RATIOS]
    size = image.shape[:2]
    images = {side: resize(image, scaled_size(size, side / min(size))) for side in dict.fromkeys(sides)}
    return [images[side] for side in sides]


# --------------------------------------------------------------------------------------------------- training transform
def train_transform(image: np.ndarray, labels: np.ndarray, window: int,
                    rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Resize, crop, mirror, distort, pad to (w, w) with 0 / 255: image, labels, (height, width) before padding."""
    long_side = int(base_size(window) * rng.uniform(0.5, 2.0))
    size = scaled_size(labels.shape, long_side / max(labels.shape))
    image, labels = resize(image, size), resize_labels(labels, size)
    crop = choose_crop(labels, window, rng)
    image, labels = image[crop], labels[crop]
    if rng.random() < 0.5:
        image, labels = image[:, ::-1], labels[:, ::-1]
    image = distort(image, Distortion.draw(rng))
    height, width = labels.shape
    padding = ((0, window - height), (0, window - width))
    return np.pad(image, (*padding, (0, 0))), np.pad(labels, padding, constant_values=IGNORE), (height, width)


def choose_crop(labels: np.ndarray, window: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """A random window; drawn anew, up to 10 times, while one class fills 75 % or more of its labelled pixels."""
    limits = [max(side - window, 0) + 1 for side in labels.shape]
    for _ in range(11):
        top, left = (int(rng.integers(limit)) for limit in limits)
        crop = np.s_[top:top + window, left:left + window]
        areas = np.bincount(labels[crop].ravel(), minlength=256)[:IGNORE]
        if 0 < areas.max() < 0.75 * areas.sum() or limits == [1, 1]:
            break
    return crop


class Distortion(NamedTuple):
    """Parameters of the photometric distortion; None leaves a step out."""
    brightness: float | None  # added, in grey levels
    contrast: float | None  # factor
    saturation: float | None  # factor
    hue: int | None  # added, in units of 2 degrees
    contrast_first: bool  # contrast before saturation and hue, or after

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Distortion":
        """Each step with probability 1/2."""
        values = (rng.uniform(-32, 32), *rng.uniform(0.5, 1.5, 2), int(rng.integers(-18, 18)))
        return cls(*(value if rng.random() < 0.5 else None for value in values), contrast_first=rng.random() < 0.5)


def distort(image: np.ndarray, by: Distortion) -> np.ndarray:
    """Photometric distortion (SSD, Liu et al., 2016), clipped and truncated to uint8 after each step."""
    if by.brightness is not None:
        image = _linear(image, 1, by.brightness)
    if by.contrast is not None and by.contrast_first:
        image = _linear(image, by.contrast, 0)
    if by.saturation is not None:
        hsv = rgb_to_hsv(image)
        hsv[..., 1] = _linear(hsv[..., 1], by.saturation, 0)
        image = hsv_to_rgb(hsv)
    if by.hue is not None:  # not merged with the step before: the official code goes through uint8 RGB in between
        hsv = rgb_to_hsv(image)
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + by.hue) % 180
        image = hsv_to_rgb(hsv)
    if by.contrast is not None and not by.contrast_first:
        image = _linear(image, by.contrast, 0)
    return image


def _linear(values: np.ndarray, factor: float, offset: float) -> np.ndarray:
    """uint8 -> uint8: values * factor + offset, clipped and truncated. A table of the 256 answers is quickest."""
    table = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    return table.clip(0, 255).astype(np.uint8).take(values)


# OpenCV's fixed-point tables (12 bits) for uint8 RGB -> HSV: 255 / value and 30 / chroma. Chroma 0 makes 0 of any.
SATURATION_TABLE, HUE_TABLE = np.rint(np.array([[255 << 12], [30 << 12]]) / np.arange(256).clip(1)).astype(np.int32)

# The share of the value that R, G, B keep at (hue, saturation), float32 (3, 180 * 256): 1 - saturation * weight. The
# weight is 0, 1 or linear in the hue, by sectors of 60 degrees. Rounded to float32 where OpenCV rounds: the result is
# truncated to uint8, so the last bit here may change a grey level.
_sectors = (np.array([[5], [3], [1]]) + np.arange(180, dtype=np.float32) * np.float32(6 / 180)) % 6  # (3, 180) float64
_weights = np.minimum(_sectors, 4 - _sectors).clip(0, 1).astype(np.float32).astype(np.float64)[..., None]
_saturation = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
RGB_SHARE_TABLE = (1 - _weights * _saturation).astype(np.float32).reshape(3, -1)


def rgb_to_hsv(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3): hue 0..179 (2 degrees a step), saturation, value 0..255; bit for bit OpenCV's COLOR_RGB2HSV."""
    red, green, blue = planes = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.int16)  # (3, H, W)
    value = planes.max(0)
    chroma = value - planes.min(0)
    sixth = np.where(green == value, blue - red + 2 * chroma, red - green + 4 * chroma)
    sixth = np.where(red == value, green - blue, sixth)  # the hue in 60 degrees, times chroma
    hue = (sixth * HUE_TABLE.take(chroma) + (1 << 11)) >> 12
    saturation = (chroma * SATURATION_TABLE.take(value) + (1 << 11)) >> 12
    return np.stack([hue + 180 * (hue < 0), saturation, value]).astype(np.uint8).transpose(1, 2, 0)  # (H, W, 3)


def hsv_to_rgb(hsv: np.ndarray) -> np.ndarray:
    """The way back, uint8 (H, W, 3), as OpenCV's COLOR_HSV2RGB."""
    place = hsv[..., 0].astype(np.int64) * 256 + hsv[..., 1]
    value = hsv[..., 2] * np.float32(1 / 255)
    image = value * RGB_SHARE_TABLE.take(place, axis=1) * 255  # (3, H, W)
    rest = hsv.shape[1] // 32 * 32  # OpenCV's vector code truncates 32 pixels at a time; it rounds the rest of a row
    image[..., rest:] = np.rint(image[..., rest:])
    return image.astype(np.uint8).transpose(1, 2, 0)  # (H, W, 3)


# -------------------------------------------------------------------------------------------------- the training stream
class Batch(NamedTuple):
    """What the loader yields; labels become long and images float on the device (`normalize`)."""
    images: Tensor  # uint8 (B, 3, w, w)
    labels: Tensor  # uint8 (B, w, w), 255 = ignore
    extents: Tensor  # int64 (B, 2), (height, width) before padding
    names: list[str]


def normalize(images: Tensor, extents: Tensor | None = None) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 with ImageNet's mean and std, on the images' device and without waiting for it.

    With extents (B, 2) pixels outside (height, width) become 0: the official order is normalise, *then* pad.
    """
    result = images.float()
    for channel, mean, std in zip(result.unbind(1), MEAN, STD, strict=True):  # Python numbers: no copy to the device
        channel.sub_(mean).div_(std)
    if extents is None:
        return result
    height, width = extents.to(images.device, non_blocking=True)[:, :, None].unbind(1)  # (B, 1) each
    rows = torch.arange(images.shape[2], device=images.device) < height
    columns = torch.arange(images.shape[3], device=images.device) < width
    return result.mul_((rows[:, :, None] & columns[:, None, :])[:, None])


def positions(start_iteration: int, rank: int, world: int, batch: int, accumulation: int) -> Iterator[list[int]]:
    """This rank's micro-batches of global stream positions, without end, from an iteration on.

    Iteration i takes the positions i*G .. (i+1)*G - 1, G = world * batch * accumulation, whatever the layout: each rank
    has a contiguous slice, cut into `accumulation` lists of `batch`.
    """
    share = batch * accumulation
    for iteration in itertools.count(start_iteration):
        first = (iteration * world + rank) * share
        for start in range(first, first + share, batch):
            yield list(range(start, start + batch))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, 1)).permutation(length)  # the 1: samples have (seed, position)


class _Crops(Dataset):
    """Maps a list of stream positions to a Batch. A fault of the data is returned, for the main process to raise."""

    def __init__(self, dataset: SegmentationDataset, window: int, seed: int) -> None:
        self.dataset, self.window, self.seed = dataset, window, seed

    def sample(self, position: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int], str]:
        epoch, place = divmod(position, len(self.dataset))
        i = int(_permutation(self.seed, epoch, len(self.dataset))[place])
        rng = np.random.default_rng((self.seed, position))
        return *train_transform(self.dataset.image(i), self.dataset.labels(i), self.window, rng), self.dataset.names[i]

    def __getitem__(self, batch: list[int]) -> Batch | UserError:
        try:
            images, labels, extents, names = zip(*map(self.sample, batch), strict=True)
        except UserError as error:
            return error
        images = torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image in images]))  # (w, w, 3) -> (3, w, w)
        return Batch(images, torch.from_numpy(np.stack(labels)), torch.tensor(extents), list(names))


def start_worker(_: int) -> None:
    """A worker of the loader leaves the process group: a signal to the group is for the main process, which finishes an
    iteration and cannot do so without its workers."""
    if hasattr(os, "setpgid"):  # Windows has no process groups
        os.setpgid(0, 0)
    common.leave_interrupt_to_parent()


def training_loader(dataset: SegmentationDataset, window: int, *, seed: int, positions: Iterable[list[int]],
                    workers: int) -> Iterator[Batch]:
    """Batches of training crops, one for each list of stream positions. Raises UserError, also for faults in workers.

    The sample at a position depends on (seed, position) alone: the same for any number of workers (0: in this process)
    and ranks, and after a resume. Position p is item p mod N of the permutation of epoch p div N, N = len(dataset).
    """
    loader = DataLoader(_Crops(dataset, window, seed), sampler=positions, batch_size=None, num_workers=workers,
                        worker_init_fn=start_worker, pin_memory=torch.cuda.is_available())
    if workers:  # Python 3.14's fork server inherits this; were it killed with the group, its workers would be, too
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    batches = iter(loader)
    if workers:
        signal.signal(signal.SIGTERM, before)
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def spread(dataset: SegmentationDataset, number: int) -> list[int]:
    """That many indices of the data set, evenly from first to last; all indices if there are fewer images."""
    return torch.linspace(0, len(dataset) - 1, number, dtype=torch.float64).long().unique().tolist()


def count_labels(dataset: SegmentationDataset, sample: int = 32) -> Tensor:
    """How many pixels of some label images, evenly chosen, have each label value, (256,)."""
    return sum(torch.bincount(torch.from_numpy(dataset.labels(i).ravel()).long(), minlength=256)
               for i in spread(dataset, sample))


def preflight(dataset: SegmentationDataset, sample: int = 32) -> None:
    """Look at some images and their labels, evenly chosen.

    Raises UserError for what would train for hours towards an mIoU near 0: a broken file, labels of no or one class.
    """
    for i in spread(dataset, sample):
        dataset.image(i)  # a file cut off in the middle has a sound header: only reading it tells
    classes, pixels = dataset.info.classes, count_labels(dataset, sample).tolist()
    present = [name for name, count in zip(classes, pixels, strict=False) if count]
    if len(present) < min(2, len(classes)):
        fault = f"nothing but '{present[0]}' in them" if present else "every pixel is ignored"
        raise UserError(f"{dataset.root} ({dataset.split}), labels of {min(sample, len(dataset))} images: {fault}; are "
                        f"they class indices from 0 to {len(classes) - 1}? `python data.py check "
                        f"{shlex.quote(str(dataset.root))}` tells more")


if __name__ == "__main__":
    from tools.prepare import main

    main()
