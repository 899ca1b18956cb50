"""Pascal Context: the label images and split lists of VOC2010, from trainval_merged.json or from LabelMap files.

Reading order: prepare_context, source_in, why_no_data -> read_annotations, labels_from_json -> decode_runs ->
fill_runs; labels_from_mat.

Shapes: H, W height and width.
"""

import json
import math
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
import pictures
from common import UserError, in_parallel, reading, reason
from data import CONTEXT_CLASSES, PASCAL_CONTEXT
from tools.fetch import choose

LARGEST = 1 << 24  # pixels of an image: more are not read; VOC2010 has 500 x 500 at most
EXPECTED_COUNTS = {"json": {"train": 4996, "val": 5104}, "mat": {"train": 4998, "val": 5105}}


class Annotated(NamedTuple):
    """An image; from the JSON file also its size (H, W) and its annotations in the order of the file."""
    name: str
    size: tuple[int, int] = (0, 0)
    annotations: Sequence[dict] = ()

    def __str__(self) -> str:
        return f"{self.name}, its picture or its labels"


def prepare_context(voc: Path, json_file: Path | None, mat_folder: Path | None, workers: int) -> None:
    """Write SegmentationClassContext/*.png (0 = none, 1..59) and ImageSets/SegmentationContext/{train,val}.txt.

    The source is trainval_merged.json or a folder of 459-class LabelMap files; None and None: what `voc` holds of them,
    in this order. Files that are there are kept, so that a run cut short goes on; the split files come last. Raises
    UserError for a source that is absent or broken.
    """
    if not (voc / PASCAL_CONTEXT.images).is_dir():
        raise UserError(f"{voc} has no {PASCAL_CONTEXT.images}/: run `python data.py fetch voc2010`, or name your "
                        "folder VOCdevkit/VOC2010 with --voc")
    if not json_file and not mat_folder:
        json_file, mat_folder = source_in(voc)
    if not json_file and not mat_folder:
        raise UserError(f"{voc} has no trainval_merged.json and no LabelMap files in trainval/: run "
                        "`python data.py fetch context`, or name your own with --json or --mat")
    if mat_folder and not mat_folder.is_dir():
        raise UserError(f"--mat {mat_folder}: no such folder; `python data.py fetch context-mat` gets the LabelMaps")
    kind = "json" if json_file else "mat"
    if json_file:
        splits, make_labels = read_annotations(json_file), partial(labels_from_json, json_file)
    else:
        splits = {split: [Annotated(name) for name in data.read_split(voc / "ImageSets" / "Main" / f"{split}.txt")]
                  for split in ("train", "val")}
        make_labels = partial(labels_from_mat, mat_folder)
    folder = voc / PASCAL_CONTEXT.labels
    note = folder / ".source"  # the labels of the two sources differ, and must not be mixed
    if note.is_file() and note.read_text() != kind and any(folder.glob("*.png")):
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
    if os.path.isfile(path):
        return True
    labels = make_labels(image)
    pictures.check_size(voc / PASCAL_CONTEXT.images / f"{image.name}.jpg", "its label map", labels.shape)
    pictures.save_labels(labels, path, np.vstack([[[0, 0, 0]], data.context_info().palette]))
    return False


def source_in(voc: Path) -> tuple[Path | None, Path | None]:
    """The trainval_merged.json of a VOC2010 folder, else its folder of LabelMap files; None for what is not there."""
    if (voc / "trainval_merged.json").is_file():
        return voc / "trainval_merged.json", None
    return None, voc / "trainval" if any((voc / "trainval").glob("*.mat")) else None


def why_no_data(root: Path) -> str:
    """Why there is no data set at `root`, and how to get one: for Pascal Context the commands, in their order."""
    archive, merged = choose(["voc2010", "context"])
    usual, has_images, has_source = merged.path.parent, (root / PASCAL_CONTEXT.images).is_dir(), any(source_in(root))
    if not has_images and root != usual:
        fault = "which has no dataset.json and no JPEGImages/" if root.is_dir() else "which is no folder"
        return (f"no data at {root}, {fault}: mend the name, or make a data set of your images and labels "
                f"(`python data.py from-folders --help`), or draw one (`--data toy`); Pascal Context goes to {usual}")
    wanted = [archive.name] * (not has_images) + [merged.name] * (not has_source and not merged.path.is_file())
    fetch = [["fetch", *wanted]] if wanted else []
    prepare = ["prepare-context", *(["--voc", str(root)] if root != usual else []),
               *(["--json", str(merged.path)] if root != usual and not has_source else [])]
    fault = f"{root} has VOC images but no Pascal Context labels" if has_images else f"no data at {root}"
    steps = ", then ".join(f"`{shlex.join(['python', 'data.py', *command])}`" for command in [*fetch, prepare])
    return f"{fault}: {steps}; for a first try `--data toy`"


def context_ids() -> dict[int, int]:
    """From an id of the 459 classes to 1..59, the values of the label images. The other 400 become 0."""
    return {entry["original_id"]: entry["index"] for entry in json.loads(CONTEXT_CLASSES.read_text())["classes"]}


def read_annotations(path: Path) -> dict[str, list[Annotated]]:
    """The images of each split of trainval_merged.json, with their annotations. Raises UserError for a broken file.

    The file is read whole: about 1.1 GiB of memory and 11 s, measured on a made-up file of 523 MB.
    """
    annotations: dict[int, list[dict]] = defaultdict(list)
    splits: dict[str, list[Annotated]] = {"train": [], "val": []}
    with reading(f"{path} is no trainval_merged.json, or broken or cut off",
                 "remove it and run `python data.py fetch context`"):
        content = data.read_json(path)
        for annotation in content["annos_segmentation"]:
            used = {key: annotation.get(key) for key in ("id", "category_id", "segmentation")}
            annotations[annotation["image_id"]].append(used)
        for image in content["images"]:
            size = (int(image["height"]), int(image["width"]))
            entry = Annotated(Path(image["file_name"]).stem, size, annotations[image["image_id"]])
            if min(size) < 1 or size[0] * size[1] > LARGEST:
                raise ValueError(f"an image of {size}")
            splits.get(image["phase"], []).append(entry)
    if not splits["train"] or not splits["val"]:
        raise UserError(f"{path} names no images for training or for validation: get the file again")
    return splits


def labels_from_json(path: Path, image: Annotated) -> np.ndarray:
    """Labels 0..59, uint8 (H, W): the image's annotations written one over the other in the order of the file."""
    ids, labels = context_ids(), np.zeros(image.size, np.uint8)
    for annotation in image.annotations:
        with reading(f"{path}, annotation {annotation['id']} of {image.name}", "get the file again"):
            category, code = annotation["category_id"], annotation["segmentation"]
            if category not in ids:
                raise ValueError(f"category_id {category} is none of the 59 classes")
            if tuple(code["size"]) != image.size:
                raise ValueError(f"a mask of size {code['size']} for an image of {image.size}")
            labels[decode_runs(code["counts"], image.size)] = ids[category]
    return labels


def decode_runs(code: str, size: tuple[int, int]) -> np.ndarray:
    """COCO's compressed run-length code -> bool (H, W).

    A run is written in groups of 5 bits, low ones first, one to a character (from '0'); a sixth bit says that more
    follow, the fifth of the last is the sign. From the fourth on, a run is the difference to the run before last.
    Raises ValueError if the runs do not fill the mask.
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
        elif shift > 60:  # no run is so long
            break
    if shift or not 0 <= min(groups, default=-1) <= max(groups) <= 63:
        raise ValueError(f"{code[:20]!r}... is no compressed run-length code")
    return fill_runs(runs, size)


def fill_runs(runs: list[int], size: tuple[int, int]) -> np.ndarray:
    """Runs down the columns, the first one outside the mask -> bool (H, W). ValueError if they do not fill it."""
    height, width = size
    if min(runs, default=-1) < 0 or sum(runs) != height * width:
        raise ValueError(f"the runs do not fill {height} x {width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def labels_from_mat(folder: Path, image: Annotated) -> np.ndarray:
    """Labels 0..59, uint8 (H, W), from the LabelMap of 459 classes in NAME.mat."""
    from scipy.io import loadmat, whosmat

    path, ids, table = folder / f"{image.name}.mat", context_ids(), np.zeros(460, np.uint8)
    table[list(ids)] = list(ids.values())
    try:
        shape, kind = {name: rest for name, *rest in whosmat(path)}["LabelMap"]
        if len(shape) != 2 or not 0 < math.prod(shape) <= LARGEST or not re.fullmatch(r"u?int\d+|single|double", kind):
            raise ValueError(f"it is {kind} of shape {shape}")
        labels = loadmat(path, variable_names="LabelMap")["LabelMap"].astype(np.int64)
        if labels.min() < 0:
            raise ValueError(f"it holds {labels.min()}")
        return table[labels]
    except Exception as error:  # SciPy raises many kinds for a broken file, or crashes: `in_parallel` survives that
        raise UserError(f"{path} holds no LabelMap ({type(error).__name__}: {reason(error)}): remove "
                        f"{folder} and run `python data.py fetch context-mat`") from None
