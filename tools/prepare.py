"""Data sets made ready and looked over, the work behind `python data.py COMMAND`.

Read: prepare_context (the labels of Pascal Context, from JSON or .mat files), then from_folders (a plain folder from
your own files), then check (what is wrong with a data set, before a GPU finds out), then main, the command line.

Shapes: H, W height and width, K classes, R runs of a run-length code.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import common
import data
from common import UserError
from data import CONTEXT_CLASSES, IGNORE, PASCAL_CONTEXT, SegmentationDataset
from tools import draw

MOST_FAULTS = 20  # that `check` prints
EXPECTED_COUNTS = {"json": {"train": 4996, "val": 5104}, "mat": {"train": 4998, "val": 5105}}


def in_parallel(function: Callable, jobs: Sequence, workers: int, title: str) -> Iterator:
    """The function's results in the order of the jobs, from worker processes, under a progress bar."""
    with ProcessPoolExecutor(workers, initializer=data.leave_interrupt_to_parent) as pool:
        results = pool.map(function, jobs, chunksize=max(1, min(32, len(jobs) // (4 * workers))))
        yield from tqdm(results, desc=title, total=len(jobs), unit="image", disable=None)


# ------------------------------------------------------------------------------------------------ Pascal Context


class Annotated(NamedTuple):
    """An image; in the JSON file also its size (H, W), and where in the file its annotations are (offset, length)."""

    name: str
    size: tuple[int, int] = (0, 0)
    places: Sequence[tuple[int, int]] = ()


def prepare_context(voc: Path, source: Path, kind: str, workers: int) -> dict[str, int]:
    """Write SegmentationClassContext/*.png (0 = none, 1..59) and ImageSets/SegmentationContext/{train,val}.txt.

    Args:
        voc: the VOC2010 folder, with JPEGImages.
        source: trainval_merged.json (kind "json") or the folder of 459-class LabelMap files (kind "mat").

    Files that are there are kept, so that a run cut short goes on; the split files come last. Returns the number of
    images by split. Raises UserError for sources that are absent or not what they should be.
    """
    if not (voc / PASCAL_CONTEXT.images).is_dir():
        raise UserError(f"{voc} has no {PASCAL_CONTEXT.images}/: unpack VOC2010 and give its folder, VOCdevkit/VOC2010")
    if kind == "json":
        splits, make_labels = index_json(source), partial(labels_from_json, source)
    else:
        lists = voc / "ImageSets" / "Main"
        splits = {split: [*map(Annotated, data.read_split(lists / f"{split}.txt"))] for split in ("train", "val")}
        make_labels = partial(labels_from_mat, source)
    _claim(voc / PASCAL_CONTEXT.labels, kind)
    jobs = [job for split in splits.values() for job in split]
    kept = sum(in_parallel(partial(_write_context_labels, voc, make_labels), jobs, workers, "label images"))
    if kept:
        print(f"{kept} label images were there already and were kept")
    (voc / PASCAL_CONTEXT.splits).mkdir(parents=True, exist_ok=True)
    for split, members in splits.items():
        text = "".join(f"{image.name}\n" for image in members).encode()
        common.write_whole(voc / PASCAL_CONTEXT.splits / f"{split}.txt", lambda file, text=text: file.write(text))
    return {split: len(members) for split, members in splits.items()}


def _claim(folder: Path, kind: str) -> None:
    """Make the label folder and note in it which source it is from: the two differ, and must not be mixed."""
    note = folder / ".source"
    if note.is_file() and note.read_text() != kind:
        raise UserError(f"{folder} holds labels from the {note.read_text()} source, not from {kind}: remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(kind)


def _write_context_labels(voc: Path, make_labels: Callable[[Annotated], np.ndarray], image: Annotated) -> bool:
    """Write one label image, unless it is there; returns whether it was."""
    path, picture = (voc / folder / f"{image.name}{suffix}"
                     for folder, suffix in ((PASCAL_CONTEXT.labels, ".png"), (PASCAL_CONTEXT.images, ".jpg")))
    if path.is_file():
        return True
    if not picture.is_file():
        raise UserError(f"{picture} is no file, but there are labels for it: unpack all of VOC2010")
    labels = make_labels(image)
    if data.image_size(picture) != labels.shape:
        raise UserError(f"{picture} is {data.image_size(picture)} (height, width) but its labels are {labels.shape}: "
                        "images and labels are not of one release")
    draw.save_labels(labels, path, np.vstack([[[0, 0, 0]], data.context_info().palette]))
    return False


def context_table() -> np.ndarray:
    """uint8 (460,): from an id of the 459 classes to 1..59, or to 0 for the other 400."""
    table = np.zeros(460, np.uint8)
    for entry in json.loads(CONTEXT_CLASSES.read_text())["classes"]:
        table[entry["original_id"]] = entry["index"]
    return table


def labels_from_json(path: Path, image: Annotated) -> np.ndarray:
    """Labels 0..59, uint8 (H, W): the image's annotations written one over the other in the order of the file."""
    table, labels = context_table(), np.zeros(image.size, np.uint8)
    with path.open("rb") as file:
        for offset, length in image.places:
            file.seek(offset)
            annotation = json.loads(file.read(length))
            category, code = annotation["category_id"], annotation["segmentation"]
            if not 0 < category < len(table) or not table[category]:
                raise UserError(f"{path}, byte {offset}: category_id {category} is none of the 59 classes")
            if tuple(code["size"]) != image.size:
                raise UserError(f"{path}, byte {offset}: a mask of size {code['size']} for an image of {image.size}")
            labels[decode_runs(code["counts"], image.size)] = table[category]
    return labels


def decode_runs(code: str, size: tuple[int, int]) -> np.ndarray:
    """COCO's compressed run-length code -> bool (H, W).

    A run is written in groups of 5 bits, low ones first, one to a character (from '0'); a sixth bit says that more
    follow, the fifth of the last is the sign. From the fourth on, a run is the difference to the run before last. Runs
    go down the columns and begin with one outside the mask. Raises UserError if they do not fill the mask.
    """
    groups = np.frombuffer(code.encode(), np.uint8).astype(np.int64) - 48
    last = (groups & 32) == 0
    first = np.flatnonzero(np.concatenate([[True], last[:-1]]))  # (R,)
    if not len(groups) or not last[-1] or groups.min() < 0 or groups.max() > 63:
        raise UserError(f"{code[:20]!r}... is no compressed run-length code")
    lengths = np.diff(np.append(first, len(groups)))
    place = np.arange(len(groups)) - np.repeat(first, lengths)  # of a group in its run
    runs = np.add.reduceat((groups & 31) << (5 * place), first)
    runs -= np.where(groups[first + lengths - 1] & 16, 1 << (5 * lengths), 0)
    for parity in (1, 2):  # runs 1, 3, 5, ... and 2, 4, 6, ...; run 0 stands alone
        runs[parity::2] = runs[parity::2].cumsum()
    height, width = size
    if runs.min() < 0 or runs.sum() != height * width:
        raise UserError(f"run-length code of {runs.sum()} pixels for a mask of {height} x {width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


class JsonStream:
    """A JSON file value by value, in little memory. Decoded as Latin-1: a place in the text is a place in the file."""

    CHUNK, LARGEST_VALUE = 1 << 20, 1 << 26

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.text, self.at, self.offset = file, "", 0, 0  # the text begins at `offset` in the file
        self.decoder = json.JSONDecoder()

    def _read_on(self) -> bool:
        chunk = self.file.read(max(self.CHUNK, len(self.text) - self.at))
        self.text, self.offset, self.at = self.text[self.at:] + chunk.decode("latin-1"), self.offset + self.at, 0
        return bool(chunk)

    def fail(self) -> None:
        """Raise UserError at the present place."""
        raise UserError(f"{self.file.name}, byte {self.offset + self.at}: broken or cut off JSON: get the file again")

    def next_mark(self, allowed: str = "") -> str:
        """The next character that is no space; passed over if `allowed` ones are given, of which it must be one."""
        while not (found := re.compile(r"\S").search(self.text, self.at)):
            self.at = len(self.text)
            if not self._read_on():
                self.fail()
        self.at = found.start()
        if allowed:
            if found.group() not in allowed:
                self.fail()
            self.at += 1
        return found.group()

    def value(self) -> tuple[object, int, int]:
        """The next value, and its offset and length in the file."""
        self.next_mark()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                end = len(self.text)
            if end < len(self.text):  # else it may go on in the next chunk
                break
            if end - self.at > self.LARGEST_VALUE or not self._read_on():
                self.fail()
        start, self.at = self.at, end
        return value, self.offset + start, end - start

    def items(self) -> Iterator[tuple[str, object, int, int]]:
        """(key, item, offset, length) for each item of the arrays at the top, in the order of the file."""
        self.next_mark("{")
        mark = ","
        while mark == ",":
            key, *_ = self.value()
            self.next_mark(":")
            if self.next_mark() != "[":
                self.value()
            else:
                yield from ((key, *item) for item in self._array())
            mark = self.next_mark(",}")

    def _array(self) -> Iterator[tuple[object, int, int]]:
        self.next_mark("[")
        mark = "," if self.next_mark() != "]" else self.next_mark("]")
        while mark == ",":
            yield self.value()
            mark = self.next_mark(",]")


def index_json(path: Path) -> dict[str, list[Annotated]]:
    """The images of each split of trainval_merged.json, with the places of their annotations in the order of the file.

    One pass over the file; the masks stay on disk. Peak memory, measured on a made-up file of 515 MB with 202,060
    annotations: 35 MiB over that of the interpreter and its packages; 3.3 s.
    """
    images: dict[int, Annotated] = {}
    splits: dict[str, list[Annotated]] = {"train": [], "val": []}
    places: dict[int, list[tuple[int, int]]] = defaultdict(list)  # annotations may come before their image
    try:
        bar = tqdm(total=path.stat().st_size, desc="index", unit="B", unit_scale=True, disable=None)
        with path.open("rb") as file, bar:
            for key, item, offset, length in JsonStream(file).items():
                if key == "images":
                    name, image_id = Path(item["file_name"]).stem, item["image_id"]
                    images[image_id] = Annotated(name, (item["height"], item["width"]), places[image_id])
                    splits.get(item["phase"], []).append(images[image_id])
                elif key == "annos_segmentation":
                    places[item["image_id"]].append((offset, length))
                bar.update(offset + length - bar.n)
    except (OSError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no trainval_merged.json ({data.one_line(error)}): get it from the Pascal Context "
                        "(detail) download") from None
    if not splits["train"] or not splits["val"]:
        raise UserError(f"{path} names {len(splits['train'])} training and {len(splits['val'])} validation images: "
                        "get the file again")
    return splits


def labels_from_mat(folder: Path, image: Annotated) -> np.ndarray:
    """Labels 0..59, uint8 (H, W), from the LabelMap of 459 classes in NAME.mat."""
    from scipy.io import loadmat

    path = folder / f"{image.name}.mat"
    try:
        label_map = np.asarray(loadmat(path)["LabelMap"]).astype(np.int64)
        return context_table()[label_map]
    except Exception as error:  # SciPy raises many kinds for a broken file
        raise UserError(f"{path} holds no LabelMap of 459 classes ({data.one_line(error)}): "
                        "unpack trainval.tar.gz again") from None


# ---------------------------------------------------------------------------------------- your own images and labels


class ClassList(NamedTuple):
    """The classes of the user's list, and the colours of a colour-coded label image, as 24-bit numbers -> label."""

    names: list[str]
    palette: np.ndarray  # uint8 (K, 3)
    colours: dict[int, int]


CLASS_LINE = re.compile(r"(.+?)(?:[\s,:]+(\d+)[\s,]+(\d+)[\s,]+(\d+))?")  # name, perhaps red, green, blue


def read_classes(classes: str) -> ClassList:
    """Read a list of classes, one a line: `name` or `name R G B`; the name `ignore` is for colours of no class.

    A number instead of a file stands for that many classes without names. Raises UserError for a list that is no list.
    """
    lines = [f"class {k}" for k in range(int(classes))] if classes.isdigit() else _read_lines(Path(classes))
    names, colours = [], {}
    for number, line in enumerate(lines, 1):
        name, *rgb = CLASS_LINE.fullmatch(line).groups()
        if rgb[0]:
            if max(map(int, rgb)) > 255 or (colour := int.from_bytes(map(int, rgb))) in colours:
                raise UserError(f"{classes}, line {number}: {' '.join(rgb)} is no colour of 0..255 or used before")
            colours[colour] = IGNORE if name == "ignore" else len(names)
        if not rgb[0] or name != "ignore":
            names.append(name)
    if len(set(names)) < len(names) or not 1 <= len(names) <= IGNORE:
        raise UserError(f"--classes {classes}: 1 to {IGNORE} different names are needed, not {len(names)} "
                        f"with {len(names) - len(set(names))} repeated")
    palette = data.default_palette(len(names))
    for colour, k in colours.items():
        if k != IGNORE:
            palette[k] = tuple(colour.to_bytes(3))
    return ClassList(names, palette, colours)


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path}: cannot be read ({data.one_line(error)}): "
                        "give a file with one class name a line, or a number") from None


def from_folders(images: Path, labels: Path, classes: str, out: Path, link: bool, workers: int) -> dict[str, int]:
    """Make a plain data set of two folders of files with the same names; returns the number of images by split.

    One in five goes to validation, chosen by a hash of its name: a larger data set later keeps the choice. Images are
    copied or linked; labels are checked, and converted where they are colour-coded. Nothing is left at `out` if a file
    is wrong.
    """
    if out.exists():
        raise UserError(f"{out} exists: remove it or choose another folder with --out")
    class_list = read_classes(classes)
    pairs = pair_files(images, labels)
    draft = out.with_name(f"{out.name}.draft{os.getpid()}")
    try:
        for folder in ("images", "labels"):
            (draft / folder).mkdir(parents=True)
        list(in_parallel(partial(_adopt, draft, class_list, link), pairs, workers, f"making {out}"))
        splits = split_by_hash([image.stem for image, _ in pairs])
        for split, names in splits.items():
            (draft / f"{split}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        info = {"name": out.name, "classes": class_list.names, "palette": class_list.palette.tolist(),
                "ignore_index": IGNORE}
        (draft / "dataset.json").write_text(json.dumps(info, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return {split: len(names) for split, names in splits.items()}


def pair_files(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """The (image, label) files of equal names. Raises UserError if a folder is absent or an image has no partner."""
    stems: list[dict[str, Path]] = []
    for folder in (images, labels):
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give the folders of the images and of the label images")
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in data.EXTENSIONS and f.is_file())
        twice = [stem for stem, count in Counter(f.stem for f in files).items() if count > 1]
        if twice or not files:
            what = f"several files named {twice[0]}.*: keep one of them" if twice else "no images: is it right?"
            raise UserError(f"{folder} holds {what}")
        stems.append({f.stem: f for f in files})
    alone = sorted(stems[0].keys() ^ stems[1].keys())
    if alone:
        raise UserError(f"{len(alone)} files have no partner of the same name in {images} and {labels}, first of all "
                        f"{(stems[0] | stems[1])[alone[0]]}: add the others or remove these")
    return [(image, stems[1][stem]) for stem, image in stems[0].items()]


def split_by_hash(names: Iterable[str]) -> dict[str, list[str]]:
    """About 80 % "train" and 20 % "val" by a hash of the name; neither is empty if there are two names."""
    ranks = {name: int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 for name in names}
    ordered = sorted(ranks, key=lambda name: (ranks[name], name))
    cut = min(max(sum(rank < 200 for rank in ranks.values()), 1), len(ordered) - 1)
    if cut < 1:
        raise UserError("one image cannot be split into training and validation: give at least two")
    return {"train": sorted(ordered[cut:]), "val": sorted(ordered[:cut])}


def _adopt(draft: Path, classes: ClassList, link: bool, pair: tuple[Path, Path]) -> None:
    """Bring one pair into the data set under construction."""
    image, label = pair
    values = convert_labels(label, classes)
    if values.shape != data.image_size(image):
        raise UserError(f"{image} is {data.image_size(image)} (height, width) but {label} is {values.shape}: "
                        "an image and its labels must be of one size")
    draw.save_labels(values, draft / "labels" / f"{label.stem}.png", classes.palette)
    target = draft / "images" / image.name
    if link:
        target.symlink_to(image.resolve())
    else:
        shutil.copyfile(image, target)


def convert_labels(path: Path, classes: ClassList) -> np.ndarray:
    """Labels, uint8 (H, W), of a file of class indices or of the list's colours. Raises UserError for other values."""
    coloured = has_colours(path)
    if coloured and not classes.colours:
        raise UserError(f"{path} is colour-coded: give each class its colour in the list, `name R G B` on a line")
    if coloured:
        values = data.read_image(path).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
        known = classes.colours
    else:
        values = data.read_labels(path)
        known = {k: k for k in (*range(len(classes.names)), IGNORE)}
    found, where = np.unique(values, return_inverse=True)
    for value in found.tolist():
        if value not in known:
            what = "colour " + " ".join(map(str, value.to_bytes(3))) if coloured else f"value {value}"
            how = "add it to the list, `ignore R G B` for no class" if coloured else f"no class is {IGNORE}"
            raise UserError(f"{path}: label {what} is none of the {len(classes.names)} classes: {how}")
    return np.array([known[value] for value in found.tolist()], np.uint8)[where].reshape(values.shape)


def has_colours(path: Path) -> bool:
    """Whether a label image is colour-coded. Raises UserError for a file that cannot be read."""
    try:
        with Image.open(path) as picture:
            return picture.mode in ("RGB", "RGBA")
    except data.UNREADABLE as error:
        raise data.unreadable(path, error) from None


# --------------------------------------------------------------------------------------------------------- check


class Finding(NamedTuple):
    """What was seen of a pair: a fault that would stop training, remarks, pixels by label (256,), the file's digest."""

    fault: str
    remarks: list[str]
    pixels: np.ndarray
    digest: str


def inspect_pair(dataset: SegmentationDataset, i: int) -> Finding:
    """Read one pair in full."""
    path, pixels = dataset.image_paths[i], np.zeros(256, np.int64)
    try:
        dataset.image(i)
        pixels += np.bincount(dataset.labels(i).ravel(), minlength=256)
        with Image.open(path) as picture:
            mode, rotated = picture.mode, picture.getexif().get(0x0112, 1) in range(2, 9)
    except UserError as error:
        return Finding(str(error), [], pixels, "")
    remarks = []
    if mode != "RGB":
        remarks.append(f"mode {mode}, converted to RGB")
    if rotated:
        remarks.append("turned upright by its EXIF tag")
    if not pixels[:IGNORE].any():
        remarks.append("no labelled pixel")
    if not all(p.resolve().is_relative_to(dataset.root.resolve()) for p in (path, dataset.label_path(i))):
        remarks.append("a link that leads out of the folder")
    return Finding("", remarks, pixels, hashlib.sha256(path.read_bytes()).hexdigest())


def check(root: Path, sheet: Path, workers: int) -> int:
    """Read every pair of both splits; print faults, remarks and class frequencies; draw a contact sheet.

    Returns the number of faults. Raises UserError for a data set that cannot be opened.
    """
    datasets = {split: data.open_dataset(root, split) for split in ("train", "val")}
    findings = {}
    for split, dataset in datasets.items():
        inspect = partial(inspect_pair, dataset)
        findings[split] = list(in_parallel(inspect, range(len(dataset)), workers, f"reading {split}"))
    info = datasets["train"].info
    print(f"{info.name} at {root}: {len(info.classes)} classes, "
          + ", ".join(f"{len(dataset)} {split} images" for split, dataset in datasets.items()))
    faults = [finding.fault for finding in itertools.chain(*findings.values()) if finding.fault]
    for fault in faults[:MOST_FAULTS]:
        print(f"fault: {fault}")
    if len(faults) > MOST_FAULTS:
        print(f"... and {len(faults) - MOST_FAULTS} more")
    remarks = defaultdict(list)
    for split, dataset in datasets.items():
        for name, finding in zip(dataset.names, findings[split], strict=True):
            for remark in finding.remarks:
                remarks[remark].append(f"{split}/{name}")
    for text, names in (remarks | duplicates(datasets, findings)).items():
        print(f"remark: {text}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    print(frequency_table(info, findings))
    draw_sheet(datasets, findings, sheet)
    return len(faults)


def duplicates(datasets: dict[str, SegmentationDataset], findings: dict[str, list[Finding]]) -> dict[str, list[str]]:
    """Images whose files are equal byte for byte, by what that means."""
    seen: dict[str, str] = {}
    result = defaultdict(list)
    for split, dataset in datasets.items():
        for name, finding in zip(dataset.names, findings[split], strict=True):
            twin = seen.setdefault(finding.digest, f"{split}/{name}") if finding.digest else f"{split}/{name}"
            if twin != f"{split}/{name}":
                same_split = twin.startswith(f"{split}/")
                kind = "the same image twice in a split" if same_split else "a validation image that is in training too"
                result[kind].append(f"{split}/{name} = {twin}")
    return result


def frequency_table(info: data.DatasetInfo, findings: dict[str, list[Finding]]) -> str:
    """For each class its share of the labelled pixels and the number of images that show it, by split."""
    width = max(len(name) for name in (*info.classes, "unlabelled"))
    lines = [f"{'class':{width}}" + "".join(f" {split + ' %':>9} {'images':>7}" for split in findings)]
    for k, name in [*enumerate(info.classes), (IGNORE, "unlabelled")]:
        line = f"{name:{width}}"
        for found in findings.values():
            pixels = np.sum([finding.pixels for finding in found], axis=0)
            total = pixels.sum() if k == IGNORE else pixels[:IGNORE].sum()
            line += f" {100 * pixels[k] / max(total, 1):9.3f} {sum(finding.pixels[k] > 0 for finding in found):7}"
        absent = k != IGNORE and not any(finding.pixels[k] for finding in findings["train"])
        lines.append(line + ("  never in training" if absent else ""))
    return "\n".join(lines)


def draw_sheet(datasets: dict[str, SegmentationDataset], findings: dict[str, list[Finding]], path: Path) -> None:
    """A contact sheet: six sound pairs of each split, the image and its labels over it; then the legend."""
    rows, info = [], datasets["train"].info
    for split, dataset in datasets.items():
        sound = [i for i, finding in enumerate(findings[split]) if not finding.fault]
        for i in sorted({sound[k] for k in np.linspace(0, len(sound) - 1, 6).astype(int)} if sound else ()):
            image, labels = dataset.image(i), dataset.labels(i)
            size = data.scaled_size(labels.shape, min(1, 360 / max(labels.shape)))
            image, labels = data.resize(image, size), data.resize_labels(labels, size)
            rows.append([image, draw.overlay(image, labels, info.palette)])
    if not rows:
        return
    rows = [[*left, *right] for left, right in itertools.zip_longest(rows[::2], rows[1::2], fillvalue=[])]
    pictures = draw.contact_sheet(rows, ("image", "labels") * 2)
    sheet = draw.stack([pictures, draw.legend(info.classes, info.palette, pictures.width)])
    common.write_whole(path, partial(sheet.save, format="PNG"))
    print(f"contact sheet: {path}")


# -------------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """The commands of `python data.py`."""
    parser = common.Parser(prog="data.py", description="Make data sets ready for training, and check them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    workers = argparse.ArgumentParser(add_help=False)
    workers.add_argument("--workers", type=common.positive, default=os.cpu_count() or 1, metavar="N",
                         help="processes (default: %(default)s)")

    context = commands.add_parser("prepare-context", parents=[workers],
                                  help="Pascal Context: label images and splits for VOC2010")
    context.add_argument("--voc", type=Path, default=Path("data/VOCdevkit/VOC2010"), metavar="DIR",
                         help="VOC2010 folder (default: %(default)s)")
    source = context.add_mutually_exclusive_group(required=True)
    source.add_argument("--json", type=Path, metavar="FILE",
                        help="trainval_merged.json: 4996 + 5104 images, as mmsegmentation has them")
    source.add_argument("--mat", type=Path, metavar="DIR",
                        help="folder of LabelMap files: 4998 + 5105 images, as papers have them")

    check_parser = commands.add_parser("check", parents=[workers],
                                       help="read every pair of a data set and report what is wrong")
    check_parser.add_argument("root", type=Path, metavar="DIR", help="plain folder or VOC2010 tree")
    check_parser.add_argument("--sheet", type=Path, metavar="PNG", help="contact sheet (default: check_NAME.png)")

    folders = commands.add_parser("from-folders", parents=[workers],
                                  help="a data set of your own images and label images")
    folders.add_argument("--images", type=Path, required=True, metavar="DIR", help="images")
    folders.add_argument("--labels", type=Path, required=True, metavar="DIR",
                         help="label images of the same names: class indices with 255 for none, or colours of the list")
    folders.add_argument("--classes", required=True, metavar="LIST",
                         help="text file with `name` or `name R G B` on a line, `ignore R G B` for no class; "
                              "or the number of classes")
    folders.add_argument("--out", type=Path, default=Path("data/own"), metavar="DIR",
                         help="new data set (default: %(default)s)")
    folders.add_argument("--link", action="store_true", help="link the images instead of copying them")

    toy = commands.add_parser("toy", help="draw the built-in toy data")
    toy.add_argument("--out", type=Path, default=Path("data/toy"), metavar="DIR", help="(default: %(default)s)")
    toy.add_argument("--train", type=int, default=400, metavar="N", help="training images (default: %(default)s)")
    toy.add_argument("--val", type=int, default=60, metavar="N", help="validation images (default: %(default)s)")
    toy.add_argument("--size", type=int, nargs=2, default=(192, 256), metavar=("H", "W"), help="(default: 192 256)")
    toy.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Carry out one command. Raises UserError."""
    if options.command in ("toy", "from-folders"):
        common.make_folder(options.out.parent, "--out")
    if options.command == "toy":
        from tools.toy import make_toy

        print(f"toy data at {make_toy(options.out, options.train, options.val, tuple(options.size), options.seed)}")
    elif options.command == "from-folders":
        counts = from_folders(options.images, options.labels, options.classes, options.out, options.link,
                              options.workers)
        print(f"{options.out}: {counts['train']} training and {counts['val']} validation images; "
              f"train with `python train.py --data {options.out}`")
    elif options.command == "check":
        sheet = options.sheet or Path(f"check_{options.root.resolve().name}.png")
        common.check_file(sheet, "--sheet")
        if faults := check(options.root, sheet, options.workers):
            raise UserError(f"{faults} fault{'s' if faults > 1 else ''} in {options.root}, named above: "
                            "mend them before training")
        print("no faults")
    else:
        kind = "json" if options.json else "mat"
        counts = prepare_context(options.voc, options.json or options.mat, kind, options.workers)
        for split, count in counts.items():
            expected = EXPECTED_COUNTS[kind][split]
            note = "" if count == expected else f", DIFFERENT from the {expected} of the full data set"
            print(f"{split}: {count} images{note}")


def main(arguments: Sequence[str] | None = None) -> None:
    """`python data.py ...`; exits with status 2 and one line on a fault of the data."""
    options = build_parser().parse_args(arguments)
    if status := common.run(lambda: run(options)):
        sys.exit(status)
