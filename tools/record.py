"""What an evaluation leaves on the disk: evaluation.json beside the checkpoint, label images on request.

Reading order: place -> provenance; label_writer.
"""

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

import common
import data
import pictures
import run
from common import UserError
from data import SegmentationDataset
from model import Segmenter
from tools.checkpoints import run_config
from weights import size_of


def place(options: argparse.Namespace, checkpoint: Path) -> Path | None:
    """The JSON file to write: that of --json, else evaluation.json beside the checkpoint.

    Its name has -last for last.pt, -DATA for other data than the run's, -SPLIT and -ms: numbers replace no others.
    Without --json it is None for a --limit, and where the folder takes no file: a line says so.
    """
    if options.json or options.limit:
        return options.json
    here, trained = (Path(str(root or options.data)).resolve()
                     for root in (options.data, run_config(checkpoint).get("data")))
    parts = ("evaluation", checkpoint.name == "last.pt" and "last", options.data and here != trained and here.name,
             options.split != "val" and options.split.replace("/", "-"), options.ms and "ms")
    try:
        path = checkpoint.with_name("-".join(filter(None, parts)) + ".json")
        common.check_file(path, "the numbers are not written:")
        return path
    except UserError as error:
        print(f"warning: {error} with --json")


def provenance(options: argparse.Namespace, checkpoint: Path, dataset: SegmentationDataset, model: Segmenter,
               process: run.Process) -> dict:
    """What a paper tells beside its numbers, and what makes them again. Reads the whole checkpoint, for its SHA-256."""
    config, tf32 = model.config, options.tf32 and process.device.type == "cuda"
    return {
        "checkpoint": str(checkpoint), "sha256": common.sha256(checkpoint), "head": config.head,
        "size": size_of(config), "data": str(dataset.root), "split": dataset.split,
        "data_fingerprint": dataset.fingerprint(), "images": len(dataset.names[:options.limit]),
        "scales": "multi-scale + flip" if options.ms else "single-scale",
        "views": {"ratios": data.TEST_RATIOS if options.ms else [1.0], "flip": options.ms, "window": config.window,
                  "stride": config.window * 2 // 3, "short_side": data.base_size(config.window)},  # in pixels
        "precision": "bfloat16" if options.amp else "tf32" if tf32 else "float32", "fast": options.fast,
        "environment": run.environment(process.device, process.world),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def label_writer(folder: Path, dataset: SegmentationDataset, original_ids: bool) -> Callable[[int, np.ndarray], None]:
    """A function that writes prediction i as folder/NAME.png: class indices with the palette, or original ids."""
    values, palette = np.arange(256, dtype=np.uint8), dataset.info.palette
    if original_ids:
        ids = {c["name"]: c["original_id"] for c in json.loads(data.CONTEXT_CLASSES.read_text())["classes"]}
        if set(dataset.info.classes) - set(ids):
            raise UserError(f"{dataset.info.name} has no original ids: leave out --original-ids")
        values, palette = np.uint16([ids[name] for name in dataset.info.classes]), None
    common.make_folder(folder, "--save-labels")
    return lambda i, prediction: pictures.save_labels(values[prediction], folder / f"{dataset.names[i]}.png", palette)
