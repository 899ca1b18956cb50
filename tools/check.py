"""The faults of a data set, before a GPU finds them: `python data.py check`.

Reading order: check -> inspect_pair -> collect, value_faults, class_faults, palette_faults -> frequency_table,
draw_sheet.

Shapes: H, W height and width, K classes.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import common
import data
import pictures
from common import IGNORE, UserError, in_parallel
from data import DatasetInfo, SegmentationDataset
from tools import draw

MOST_FAULTS = 20  # printed by `check`
MOST_UNLABELLED = 0.5  # published data sets leave 0 to 30 % unlabelled; beyond a half, a class was mostly taken for 255
FEW_IMAGES = 10  # with fewer, the crops of a run repeat the same few scenes
SMALL_SIDE, LONG_SHAPE = 32, 8  # pixels, and long side / short side: of such images a crop shows next to nothing
BACKGROUND_NAMES = ("background", "bg", "other", "others", "unlabelled", "unlabeled", "void", "none", "ignore")


class Item(NamedTuple):
    """A pair of a data set."""
    dataset: SegmentationDataset
    i: int

    def __str__(self) -> str:
        return f"{self.dataset.image_paths[self.i]} and {self.dataset.label_paths[self.i]}"


class Finding(NamedTuple):
    """The result of reading one pair of a data set."""
    split: str
    name: str  # SPLIT/NAME
    label_path: Path
    fault: str = ""  # would stop training
    foreign: Sequence[int] = ()  # values of the label file that are no class
    remarks: Sequence[str] = ()
    pixels: np.ndarray = np.zeros(256, np.int64)  # by label
    colours: dict[int, tuple[int, ...]] = {}  # of the used classes, by the palette of the label file
    digest: str = ""  # of the image file; only a sound pair has one


def check(root: Path, sheet: Path | None, workers: int) -> int:
    """Read every pair of all splits; print faults, remarks and class frequencies; draw a contact sheet.

    Returns the exit status: 1 if there are faults. Raises UserError if the data set cannot be opened.
    """
    sheet = sheet or Path(f"check_{root.resolve().name}.png")
    common.check_file(sheet, "--sheet")
    datasets = [data.open_dataset(root, split) for split in ("train", "val")]
    if (root / datasets[0].layout.splits / "test.txt").is_file():
        datasets.append(data.open_dataset(root, "test"))
    pairs = [Item(dataset, i) for dataset in datasets for i in range(len(dataset))]
    findings = list(in_parallel(inspect_pair, pairs, workers, f"reading {root}"))
    info = datasets[0].info
    print(f"{info.name} at {root}: {len(info.classes)} classes, "
          + ", ".join(f"{len(dataset)} {dataset.split} images" for dataset in datasets))
    named_faults, remarks = collect(info, findings)
    faults = [f"{text}: {some(names)}" for text, names in named_faults.items()] + value_faults(datasets[0], findings)
    sound = [finding for finding in findings if finding.digest]
    if 2 * len(sound) > len(findings):  # otherwise classes are absent for a reason told already
        faults += [*class_faults(info, sound), *palette_faults(info, sound)]
    for fault in faults[:MOST_FAULTS]:
        print(f"fault: {fault}")
    if len(faults) > MOST_FAULTS:
        print(f"... and {len(faults) - MOST_FAULTS} more faults")
    for text, names in remarks.items():
        print(f"remark: {text}: {some(names)}")
    print(frequency_table(info, findings))
    draw_sheet([pair for pair, finding in zip(pairs, findings, strict=True) if finding.digest], info, sheet)
    print(f"faults in {root}: {len(faults)}, named above; mend them before training" if faults else "no faults")
    return 1 if faults else 0


def some(names: Sequence, most: int = 3) -> str:
    """The number of names and the first of them, for one line."""
    return f"{len(names)} ({', '.join(map(str, names[:most]))}{', ...' if len(names) > most else ''})"


def inspect_pair(pair: Item) -> Finding:
    """Read item i of a data set in full."""
    dataset, i = pair
    path, label_path, first = dataset.image_paths[i], dataset.label_paths[i], dataset.layout.first_class
    start = Finding(dataset.split, f"{dataset.split}/{dataset.names[i]}", label_path)
    try:
        values, palette = pictures.read_labels(label_path)
        values = np.unique(values)
        foreign = values[(values >= first + len(dataset.info.classes)) & (values != dataset.info.ignore_index)]
        if foreign.size:
            return start._replace(foreign=foreign.tolist())
        pixels = np.bincount(dataset.labels(i).ravel(), minlength=256)
        height, width = dataset.image(i).shape[:2]
        with pictures.open_picture(path) as picture:
            mode, orientation = picture.mode, pictures.orientation(picture)
    except UserError as error:
        return start._replace(fault=str(error))
    inside = all(p.resolve().is_relative_to(dataset.root.resolve()) for p in (path, label_path))
    remarks = {f"mode {mode}, converted to RGB": mode != "RGB",
               "turned upright by its EXIF tag": orientation in range(2, 9),
               "no labelled pixel": not pixels[:IGNORE].any(),
               f"a side below {SMALL_SIDE} pixels": min(height, width) < SMALL_SIDE,
               f"over {LONG_SHAPE} times as long as wide": max(height, width) > LONG_SHAPE * min(height, width),
               "a link that leads out of the folder": not inside}
    colours = [] if palette is None else palette[dataset.layout.first_class:].tolist()
    return start._replace(remarks=[remark for remark, applies in remarks.items() if applies], pixels=pixels,
                          colours={k: tuple(colour) for k, colour in enumerate(colours[:IGNORE]) if pixels[k]},
                          digest=hashlib.sha256(path.read_bytes()).hexdigest())


def collect(info: DatasetInfo, findings: list[Finding]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The names of the images by fault and by remark. Faults that differ in the name of the file only are one."""
    faults, remarks, first_text, first_of = defaultdict(list), defaultdict(list), {}, {}
    for finding in findings:
        if finding.fault:
            kind = finding.fault.replace(finding.name.removeprefix(finding.split) + ".", "")
            faults[first_text.setdefault(kind, finding.fault)].append(finding.name)
        for remark in finding.remarks:
            remarks[remark].append(finding.name)
        twin = first_of.setdefault(finding.digest or finding.name, finding)
        if twin.split != finding.split:
            faults["an image in two splits, so that its score says nothing"].append(f"{finding.name} = {twin.name}")
        elif twin.name != finding.name:
            remarks["the same image twice in a split"].append(f"{finding.name} = {twin.name}")
    training = [finding for finding in findings if finding.split == "train"]
    if len(training) < FEW_IMAGES:
        remarks[f"fewer than {FEW_IMAGES} training images"] = [finding.name for finding in training]
    validated = sum(finding.pixels for finding in findings if finding.split == "val")
    if absent := [name for name, count in zip(info.classes, validated, strict=False) if not count]:
        remarks["a class never in validation, which gets no IoU"] = absent
    total = sum(finding.pixels for finding in findings)[:IGNORE]
    if 2 * total[0] > total.sum() and (hint := zero_hint(info)):
        remarks[f"'{info.classes[0]}', value 0, fills over half of what is labelled{hint}"] = [
            finding.name for finding in findings if finding.pixels[0]]
    return faults, remarks


def zero_hint(info: DatasetInfo) -> str:
    """The remedy for ids that begin at 1, unless class 0 is the background anyway."""
    if info.classes[0].strip("_ ").lower() in BACKGROUND_NAMES:
        return ""
    return "; if 0 means unlabelled in the files, make the data set again with `from-folders --zero-is-unlabelled`"


def value_faults(dataset: SegmentationDataset, findings: list[Finding]) -> list[str]:
    """One line for all label values that are no class."""
    files = [finding.label_path for finding in findings if finding.foreign]
    values = sorted({value for finding in findings for value in finding.foreign})
    first, number = dataset.layout.first_class, len(dataset.info.classes)
    which = f"label value {values[0]} is" if len(values) == 1 else f"label values {some(values, 8)} are"
    hint = zero_hint(dataset.info) if values == [number] and not first else ""
    return [f"{which} no class: in {len(files)} of {len(findings)} files, first {files[0]}: use {first}.."
            f"{first + number - 1}, or {dataset.info.ignore_index} for none{hint}"] if files else []


def class_faults(info: DatasetInfo, findings: list[Finding]) -> list[str]:
    """What the numbers of pixels say: two classes as 0 and 255, one class only, absent classes, too few labels."""
    kinds = {tuple(np.flatnonzero(finding.pixels).tolist()) for finding in findings}
    if len(info.classes) == 2 and (0, IGNORE) in kinds and not any({1, IGNORE} <= {*kind} for kind in kinds):
        what = "some label files hold 0 and 1, others" if any(1 in kind for kind in kinds) else "the label files hold"
        return [f"{what} 0 and {IGNORE}, which is no class here: if it means '{info.classes[1]}', make the data set "
                "again from files of one kind with `from-folders`, which takes 0 and 255 as two classes"]
    total = sum(finding.pixels for finding in findings)
    training = sum((finding.pixels for finding in findings if finding.split == "train"), 0 * total)
    absent = [name for name, count in zip(info.classes, training, strict=False) if not count]
    faults = []
    if len(info.classes) - len(absent) < 2:
        present = "".join(f"'{name}'" for name in info.classes if name not in absent)
        faults += [f"{present or 'no class'} is all that is labelled in training: nothing to tell apart; label the "
                   "rest of the pictures as a class of its own"]
    elif absent:
        hint = "" if total[len(info.classes) - 1] else zero_hint(info)
        faults += [f"classes never labelled in training: {some(absent, 8)}: label them, or take them away{hint}"]
    if (share := total[IGNORE] / total.sum()) > MOST_UNLABELLED:
        faults += [f"{share:.1%} of all pixels are unlabelled: if they are background, give them a class"]
    return faults


def palette_faults(info: DatasetInfo, findings: list[Finding]) -> list[str]:
    """A class whose colour differs from file to file: an editor gave each file an order of its own."""
    for k, name in enumerate(info.classes):
        files = {f.colours[k]: f.label_path for f in findings if k in f.colours}  # colour -> a file with it
        if len(files) > 1:
            places = [f"{' '.join(map(str, colour))} in {file}" for colour, file in files.items()]
            return [f"by the palettes of the label files, '{name}' is {' and '.join(places[:2])}: if the colours are "
                    "right, make the data set again with `from-folders` and a class list with colours"]
    return []


def frequency_table(info: DatasetInfo, findings: list[Finding]) -> str:
    """For each class its share of the labelled pixels and the number of images that show it, by split."""
    splits = {split: np.array([f.pixels for f in findings if f.split == split])
              for split in dict.fromkeys(f.split for f in findings)}
    width = max(len(name) for name in (*info.classes, "unlabelled"))
    lines = [f"{'class':{width}}" + "".join(f" {split + ' %':>9} {'images':>7}" for split in splits)]
    for k, name in [*enumerate(info.classes), (IGNORE, "unlabelled")]:
        line = f"{name:{width}}"
        for pixels in splits.values():  # (images, 256)
            total = pixels.sum() if k == IGNORE else pixels[:, :IGNORE].sum()
            line += f" {100 * pixels[:, k].sum() / max(total, 1):9.3f} {np.count_nonzero(pixels[:, k]):7}"
        lines.append(line)
    return "\n".join(lines)


def draw_sheet(pairs: list[Item], info: DatasetInfo, path: Path) -> None:
    """A contact sheet: six of the sound pairs of each split, the image and its labels over it; then the legend."""
    cells = []
    for split in dict.fromkeys(dataset.split for dataset, _ in pairs):
        group = [pair for pair in pairs if pair[0].split == split]
        for dataset, i in group[::max(1, len(group) // 6)][:6]:
            image, labels = dataset.image(i), dataset.labels(i)
            size = data.scaled_size(labels.shape, min(1, 360 / max(labels.shape)))
            image, labels = data.resize(image, size), data.resize_labels(labels, size)
            cells += [image, draw.overlay(image, labels, info.palette)]
    if not cells:
        return
    pictures = draw.contact_sheet([cells[i:i + 4] for i in range(0, len(cells), 4)], ("image", "labels") * 2)
    sheet = draw.stack([pictures, draw.legend(info.classes, info.palette, pictures.width)])
    common.write_whole(path, partial(sheet.save, format="PNG"))
    print(f"contact sheet: {path}")
