"""The faults of a data set, before a GPU finds them: `python data.py check`.

Reading order: check -> inspect_pair -> collect_remarks, frequency_table, draw_sheet.

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
from data import SegmentationDataset
from tools import draw

MOST_FAULTS = 20  # printed by `check`


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
        with pictures.open_picture(path) as picture:
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
