"""Makes data sets ready and checks them: the code behind `python data.py COMMAND`.

Reading order: prepare_context (Pascal Context, from JSON or .mat files) -> from_folders (a plain folder of your own
files) -> check (the faults of a data set, before a GPU finds them) -> build_parser.

Shapes: H, W height and width, K classes.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import common
import data
from common import UserError, in_parallel, reason
from data import CONTEXT_CLASSES, IGNORE, PASCAL_CONTEXT, SegmentationDataset
from tools import draw
from tools.toy import make_toy

MOST_FAULTS = 20  # printed by `check`
EXPECTED_COUNTS = {"json": {"train": 4996, "val": 5104}, "mat": {"train": 4998, "val": 5105}}


# ------------------------------------------------------------------------------------------------------- Pascal Context
class Annotated(NamedTuple):
    """An image; from the JSON file also its size (H, W) and its annotations in the order of the file."""
    name: str
    size: tuple[int, int] = (0, 0)
    annotations: Sequence[dict] = ()


def prepare_context(voc: Path, json_file: Path | None, mat_folder: Path | None, workers: int) -> None:
    """Write SegmentationClassContext/*.png (0 = none, 1..59) and ImageSets/SegmentationContext/{train,val}.txt.

    The source is trainval_merged.json or a folder of 459-class LabelMap files. Files that are there are kept, so that
    a run cut short goes on; the split files come last. Raises UserError for a source that is absent or broken.
    """
    if not (voc / PASCAL_CONTEXT.images).is_dir():
        raise UserError(f"{voc} has no {PASCAL_CONTEXT.images}/: unpack VOC2010 and give its folder, VOCdevkit/VOC2010")
    kind = "json" if json_file else "mat"
    if json_file:
        splits, make_labels = read_annotations(json_file), partial(labels_from_json, json_file)
    else:
        splits = {split: [Annotated(name) for name in data.read_split(voc / "ImageSets" / "Main" / f"{split}.txt")]
                  for split in ("train", "val")}
        make_labels = partial(labels_from_mat, mat_folder)
    folder = voc / PASCAL_CONTEXT.labels
    note = folder / ".source"  # the labels of the two sources differ, and must not be mixed
    if note.is_file() and note.read_text() != kind:
        raise UserError(f"{folder} holds labels from the {note.read_text()} source, not from {kind}: remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(kind)
    write = partial(_write_context_labels, voc, make_labels)
    kept = sum(in_parallel(write, splits["train"] + splits["val"], workers, "label images"))
    if kept:
        print(f"{kept} label images were there already and were kept")
    (voc / PASCAL_CONTEXT.splits).mkdir(parents=True, exist_ok=True)
    for split, images in splits.items():
        data.write_split(voc / PASCAL_CONTEXT.splits / f"{split}.txt", [image.name for image in images])
        expected = EXPECTED_COUNTS[kind][split]
        warning = "" if len(images) == expected else f", DIFFERENT from the {expected} of the full data set"
        print(f"{split}: {len(images)} images{warning}")


def _write_context_labels(voc: Path, make_labels: Callable[[Annotated], np.ndarray], image: Annotated) -> bool:
    """Write one label image, unless it is there; returns whether it was."""
    path = voc / PASCAL_CONTEXT.labels / f"{image.name}.png"
    if path.is_file():
        return True
    labels = make_labels(image)
    data.check_size(voc / PASCAL_CONTEXT.images / f"{image.name}.jpg", "its label map", labels.shape)
    data.save_labels(labels, path, np.vstack([[[0, 0, 0]], data.context_info().palette]))
    return False


def context_ids() -> dict[int, int]:
    """From an id of the 459 classes to 1..59, the values of the label images. The other 400 become 0."""
    return {entry["original_id"]: entry["index"] for entry in json.loads(CONTEXT_CLASSES.read_text())["classes"]}


def read_annotations(path: Path) -> dict[str, list[Annotated]]:
    """The images of each split of trainval_merged.json, with their annotations. Raises UserError for a broken file.

    The file is read whole: about 1.1 GiB of memory and 11 s, measured on a made-up file of 523 MB.
    """
    annotations: dict[int, list[dict]] = defaultdict(list)
    splits: dict[str, list[Annotated]] = {"train": [], "val": []}
    try:
        content = json.loads(path.read_bytes())
        for annotation in content["annos_segmentation"]:
            used = {key: annotation.get(key) for key in ("id", "category_id", "segmentation")}
            annotations[annotation["image_id"]].append(used)
        for image in content["images"]:
            size = (int(image["height"]), int(image["width"]))
            entry = Annotated(Path(image["file_name"]).stem, size, annotations[image["image_id"]])
            splits.get(image["phase"], []).append(entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no trainval_merged.json, or broken or cut off ({reason(error)}): "
                        "get it from the Pascal Context (detail) download") from None
    if not splits["train"] or not splits["val"]:
        raise UserError(f"{path} names no images for training or for validation: get the file again")
    return splits


def labels_from_json(path: Path, image: Annotated) -> np.ndarray:
    """Labels 0..59, uint8 (H, W): the image's annotations written one over the other in the order of the file."""
    ids, labels = context_ids(), np.zeros(image.size, np.uint8)
    for annotation in image.annotations:
        try:
            category, code = annotation["category_id"], annotation["segmentation"]
            if category not in ids:
                raise UserError(f"category_id {category} is none of the 59 classes")
            if tuple(code["size"]) != image.size:
                raise UserError(f"a mask of size {code['size']} for an image of {image.size}")
            labels[decode_runs(code["counts"], image.size)] = ids[category]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            where = f"{path}, annotation {annotation['id']} of {image.name}"
            raise UserError(f"{where}: {reason(error)}: get the file again") from None
    return labels


def decode_runs(code: str, size: tuple[int, int]) -> np.ndarray:
    """COCO's compressed run-length code -> bool (H, W).

    A run is written in groups of 5 bits, low ones first, one to a character (from '0'); a sixth bit says that more
    follow, the fifth of the last is the sign. From the fourth on, a run is the difference to the run before last. Runs
    go down the columns and begin with one outside the mask. Raises UserError if they do not fill the mask.
    """
    groups = [character - ord("0") for character in code.encode()]
    runs, run, shift = [], 0, 0
    for group in groups:
        run |= (group & 31) << shift
        shift += 5
        if not group & 32:  # the last group of the run
            if group & 16:
                run -= 1 << shift
            runs.append(run + runs[-2] if len(runs) > 2 else run)
            run, shift = 0, 0
    height, width = size
    if shift or min(groups + runs, default=-1) < 0 or max(groups) > 63 or sum(runs) != height * width:
        raise UserError(f"{code[:20]!r}... is no compressed run-length code of {height} x {width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def labels_from_mat(folder: Path, image: Annotated) -> np.ndarray:
    """Labels 0..59, uint8 (H, W), from the LabelMap of 459 classes in NAME.mat."""
    from scipy.io import loadmat

    path, ids, table = folder / f"{image.name}.mat", context_ids(), np.zeros(460, np.uint8)
    table[list(ids)] = list(ids.values())
    try:
        return table[np.asarray(loadmat(path)["LabelMap"]).astype(np.int64)]
    except Exception as error:  # SciPy raises many kinds for a broken file
        raise UserError(f"{path} holds no LabelMap ({reason(error)}): unpack trainval.tar.gz again") from None


# ------------------------------------------------------------------------------------------- your own images and labels
class ClassList(NamedTuple):
    """The classes of the user's list, and the colours of a colour-coded label image, as 24-bit numbers -> label."""
    names: list[str]
    palette: np.ndarray  # uint8 (K, 3)
    colours: dict[int, int]


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
    palette = data.default_palette(len(names))
    for colour, k in colours.items():
        if k != IGNORE:
            palette[k] = tuple(colour.to_bytes(3))
    return ClassList(names, palette, colours)


def from_folders(images: Path, labels: Path, classes: str, out: Path, link: bool, workers: int) -> None:
    """Make a plain data set of two folders of files with the same names; nothing is left at `out` if a file is wrong.

    One in five goes to validation, chosen by a hash of its name: a larger data set later keeps the choice. Images are
    copied or linked; labels are checked, and converted where they are colour-coded.
    """
    common.make_folder(out.parent, "--out")
    if out.exists():
        raise UserError(f"{out} exists: remove it or choose another folder with --out")
    class_list = read_classes(classes)
    pairs = pair_files(images, labels)
    splits = split_by_hash([image.stem for image, _ in pairs])
    info = {"name": out.name, "classes": class_list.names, "palette": class_list.palette.tolist(),
            "ignore_index": IGNORE}
    with common.new_folder(out) as draft:
        (draft / "images").mkdir()
        list(in_parallel(partial(_add_pair, draft, class_list, link), pairs, workers, f"making {out}"))
        for split, names in splits.items():
            data.write_split(draft / f"{split}.txt", names)
        (draft / "dataset.json").write_text(json.dumps(info, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: {len(splits['train'])} training and {len(splits['val'])} validation images; "
          f"train with `python train.py --data {out}`")


def pair_files(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """The (image, label) files of equal names. Raises UserError if a folder is empty or a file has not one partner."""
    by_stem = []
    for folder in (images, labels):
        files = sorted(file for file in folder.glob("*") if file.suffix.lower() in data.EXTENSIONS and file.is_file())
        if not files:
            raise UserError(f"{folder} is no folder with images: give the folders of the images and the label images")
        stem, count = Counter(file.stem for file in files).most_common(1)[0]
        if count > 1:
            raise UserError(f"{folder} holds several files named {stem}.*: keep one of them")
        by_stem.append({file.stem: file for file in files})
    alone = sorted(by_stem[0].keys() ^ by_stem[1].keys())
    if alone:
        raise UserError(f"{len(alone)} files of {images} and {labels} have no partner of the same name, first of all "
                        f"{(by_stem[0] | by_stem[1])[alone[0]]}: add the others or remove these")
    return [(image, by_stem[1][stem]) for stem, image in by_stem[0].items()]


def split_by_hash(names: Iterable[str]) -> dict[str, list[str]]:
    """About 80 % "train" and 20 % "val" by a hash of the name; neither is empty if there are two names."""
    ranks = {name: int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 for name in names}
    ordered = sorted(ranks, key=lambda name: (ranks[name], name))
    cut = min(max(sum(rank < 200 for rank in ranks.values()), 1), len(ordered) - 1)
    if cut < 1:
        raise UserError("one image cannot be split into training and validation: give at least two")
    return {"train": sorted(ordered[cut:]), "val": sorted(ordered[:cut])}


def _add_pair(draft: Path, classes: ClassList, link: bool, pair: tuple[Path, Path]) -> None:
    """Bring one pair into the data set under construction."""
    image, label = pair
    values = convert_labels(label, classes)
    data.check_size(image, label, values.shape)
    data.save_labels(values, draft / "labels" / f"{label.stem}.png", classes.palette)
    bring = os.symlink if link else shutil.copyfile
    bring(image.resolve(), draft / "images" / image.name)


def convert_labels(path: Path, classes: ClassList) -> np.ndarray:
    """Labels, uint8 (H, W), of a file of class indices or of the list's colours. Raises UserError for other values."""
    with data.open_picture(path) as picture:
        coloured = picture.mode in ("RGB", "RGBA")
    if coloured and not classes.colours:
        raise UserError(f"{path} is colour-coded: give each class its colour in the list, `name R G B` on a line")
    if coloured:
        values, known = data.read_image(path).astype(np.int32) @ (1 << 16, 1 << 8, 1), classes.colours
    else:
        values, known = data.read_labels(path), {k: k for k in (*range(len(classes.names)), IGNORE)}
    present, places = np.unique(values, return_inverse=True)
    for value in present.tolist():
        if value not in known:
            what = f"colour {' '.join(map(str, value.to_bytes(3)))}" if coloured else f"value {value}"
            how = "add it to the list, `ignore R G B` for no class" if coloured else f"no class is {IGNORE}"
            raise UserError(f"{path}: label {what} is none of the {len(classes.names)} classes: {how}")
    return np.array([known[value] for value in present.tolist()], np.uint8)[places].reshape(values.shape)


# ---------------------------------------------------------------------------------------------------------------- check
class Finding(NamedTuple):
    """The result of reading one pair of a data set."""
    name: str  # SPLIT/NAME
    fault: str = ""  # would stop training
    remarks: Sequence[str] = ()
    pixels: np.ndarray = np.zeros(256, np.int64)  # by label
    digest: str = ""  # of the image file


def inspect_pair(pair: tuple[SegmentationDataset, int]) -> Finding:
    """Read item i of a data set in full."""
    dataset, i = pair
    name, path = f"{dataset.split}/{dataset.names[i]}", dataset.image_paths[i]
    try:
        dataset.image(i)
        pixels = np.bincount(dataset.labels(i).ravel(), minlength=256)
        with data.open_picture(path) as picture:
            mode, orientation = picture.mode, picture.getexif().get(0x0112, 1)
    except UserError as error:
        return Finding(name, str(error))
    inside = all(p.resolve().is_relative_to(dataset.root.resolve()) for p in (path, dataset.label_paths[i]))
    remarks = {f"mode {mode}, converted to RGB": mode != "RGB",
               "turned upright by its EXIF tag": orientation in range(2, 9),
               "no labelled pixel": not pixels[:IGNORE].any(),
               "a link that leads out of the folder": not inside}
    remarks = [remark for remark, applies in remarks.items() if applies]
    return Finding(name, "", remarks, pixels, hashlib.sha256(path.read_bytes()).hexdigest())


def check(root: Path, sheet: Path | None, workers: int) -> None:
    """Read every pair of both splits; print faults, remarks and class frequencies; draw a contact sheet.

    Raises UserError if the data set cannot be opened, and at the end if there are faults.
    """
    sheet = sheet or Path(f"check_{root.resolve().name}.png")
    common.check_file(sheet, "--sheet")
    datasets = [data.open_dataset(root, split) for split in ("train", "val")]
    pairs = [(dataset, i) for dataset in datasets for i in range(len(dataset))]
    findings = list(in_parallel(inspect_pair, pairs, workers, f"reading {root}"))
    info = datasets[0].info
    print(f"{info.name} at {root}: {len(info.classes)} classes, "
          + ", ".join(f"{len(dataset)} {dataset.split} images" for dataset in datasets))
    faults = [finding.fault for finding in findings if finding.fault]
    for fault in faults[:MOST_FAULTS]:
        print(f"fault: {fault}")
    if len(faults) > MOST_FAULTS:
        print(f"... and {len(faults) - MOST_FAULTS} more")
    for text, names in collect_remarks(findings).items():
        print(f"remark: {text}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    print(frequency_table(info, findings))
    draw_sheet([pair for pair, finding in zip(pairs, findings, strict=True) if not finding.fault], info, sheet)
    if faults:
        raise UserError(f"faults in {root}: {len(faults)}, named above; mend them before training")
    print("no faults")


def collect_remarks(findings: list[Finding]) -> dict[str, list[str]]:
    """The names of the images by remark, images whose files are equal byte for byte included."""
    result, first_of = defaultdict(list), {}
    for finding in findings:
        for remark in finding.remarks:
            result[remark].append(finding.name)
        twin = first_of.setdefault(finding.digest, finding.name)
        if finding.digest and twin != finding.name:
            same_split = twin.split("/")[0] == finding.name.split("/")[0]
            kind = "the same image twice in a split" if same_split else "a validation image that is in training too"
            result[kind].append(f"{finding.name} = {twin}")
    return result


def frequency_table(info: data.DatasetInfo, findings: list[Finding]) -> str:
    """For each class its share of the labelled pixels and the number of images that show it, by split."""
    splits = {split: np.array([f.pixels for f in findings if f.name.startswith(split)]) for split in ("train", "val")}
    width = max(len(name) for name in (*info.classes, "unlabelled"))
    lines = [f"{'class':{width}}" + "".join(f" {split + ' %':>9} {'images':>7}" for split in splits)]
    for k, name in [*enumerate(info.classes), (IGNORE, "unlabelled")]:
        line = f"{name:{width}}"
        for pixels in splits.values():  # (images, 256)
            total = pixels.sum() if k == IGNORE else pixels[:, :IGNORE].sum()
            line += f" {100 * pixels[:, k].sum() / max(total, 1):9.3f} {np.count_nonzero(pixels[:, k]):7}"
        absent = k != IGNORE and not splits["train"][:, k].any()
        lines.append(line + ("  never in training" if absent else ""))
    return "\n".join(lines)


def draw_sheet(pairs: list[tuple[SegmentationDataset, int]], info: data.DatasetInfo, path: Path) -> None:
    """A contact sheet: six of the sound pairs of each split, the image and its labels over it; then the legend."""
    cells = []
    for split in ("train", "val"):
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


# --------------------------------------------------------------------------------------------------------- command line
def build_parser() -> argparse.ArgumentParser:
    """The commands of `python data.py`. An option has the name of its function's argument."""
    parser = common.Parser(prog="data.py", description="Make data sets ready for training, and check them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    workers = argparse.ArgumentParser(add_help=False)
    workers.add_argument("--workers", type=common.positive, default=os.cpu_count() or 1, metavar="N",
                         help="processes (default: %(default)s)")

    p = commands.add_parser("prepare-context", parents=[workers], help="Pascal Context: labels and splits for VOC2010")
    p.set_defaults(command=prepare_context)
    p.add_argument("--voc", type=Path, default="data/VOCdevkit/VOC2010", metavar="DIR",
                   help="VOC2010 folder (default: %(default)s)")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--json", type=Path, metavar="FILE", dest="json_file",
                        help="trainval_merged.json: 4996 + 5104 images, as mmsegmentation has them")
    source.add_argument("--mat", type=Path, metavar="DIR", dest="mat_folder",
                        help="folder of LabelMap files: 4998 + 5105 images, as papers have them")

    p = commands.add_parser("check", parents=[workers], help="read every pair of a data set, report what is wrong")
    p.set_defaults(command=check)
    p.add_argument("root", type=Path, metavar="DIR", help="plain folder or VOC2010 tree")
    p.add_argument("--sheet", type=Path, metavar="PNG", help="contact sheet (default: check_NAME.png)")

    p = commands.add_parser("from-folders", parents=[workers], help="a data set of your own images and label images")
    p.set_defaults(command=from_folders)
    p.add_argument("--images", type=Path, required=True, metavar="DIR", help="images")
    p.add_argument("--labels", type=Path, required=True, metavar="DIR",
                   help="label images of the same names: class indices with 255 for none, or colours of the list")
    p.add_argument("--classes", required=True, metavar="LIST", help="text file with `name` or `name R G B` on a line, "
                   "`ignore R G B` for no class; or the number of classes")
    p.add_argument("--out", type=Path, default="data/own", metavar="DIR", help="new data set (default: %(default)s)")
    p.add_argument("--link", action="store_true", help="link the images instead of copying them")

    p = commands.add_parser("toy", help="draw the built-in toy data")
    p.set_defaults(command=lambda out, **options: print(f"toy data at {make_toy(out, **options)}"))
    p.add_argument("--out", type=Path, default="data/toy", metavar="DIR", help="(default: %(default)s)")
    p.add_argument("--train", type=int, default=400, metavar="N", help="training images (default: %(default)s)")
    p.add_argument("--val", type=int, default=60, metavar="N", help="validation images (default: %(default)s)")
    p.add_argument("--size", type=int, nargs=2, default=(192, 256), metavar=("H", "W"), help="(default: 192 256)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """`python data.py ...`; exits with status 2 and one line on a fault of the data."""
    options = vars(build_parser().parse_args(arguments))
    if status := common.run(partial(options.pop("command"), **options)):
        sys.exit(status)
