"""A plain data set of your own images and label images: `python data.py from-folders`.

Reading order: from_folders -> pair_files -> split_by_hash -> convert_labels.

Shapes: H, W height and width, K classes.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

import common
import data
import pictures
from common import IGNORE, UserError, in_parallel
from tools.class_list import ClassList, read_classes


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
        files = sorted(file for file in folder.glob("*")
                       if file.suffix.lower() in pictures.EXTENSIONS and file.is_file())
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
    pictures.check_size(image, label, values.shape)
    pictures.save_labels(values, draft / "labels" / f"{label.stem}.png", classes.palette)
    bring = os.symlink if link else shutil.copyfile
    bring(image.resolve(), draft / "images" / image.name)


def convert_labels(path: Path, classes: ClassList) -> np.ndarray:
    """Labels, uint8 (H, W), of a file of class indices or of the list's colours. Raises UserError for other values."""
    with pictures.open_picture(path) as picture:
        coloured = picture.mode in ("RGB", "RGBA")
    if coloured and not classes.colours:
        raise UserError(f"{path} is colour-coded: give each class its colour in the list, `name R G B` on a line")
    if coloured:
        values, known = pictures.read_image(path).astype(np.int32) @ (1 << 16, 1 << 8, 1), classes.colours
    else:
        values, known = pictures.read_labels(path), {k: k for k in (*range(len(classes.names)), IGNORE)}
    present, places = np.unique(values, return_inverse=True)
    for value in present.tolist():
        if value not in known:
            what = f"colour {' '.join(map(str, value.to_bytes(3)))}" if coloured else f"value {value}"
            how = "add it to the list, `ignore R G B` for no class" if coloured else f"no class is {IGNORE}"
            raise UserError(f"{path}: label {what} is none of the {len(classes.names)} classes: {how}")
    return np.array([known[value] for value in present.tolist()], np.uint8)[places].reshape(values.shape)
