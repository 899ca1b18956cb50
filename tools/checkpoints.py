"""Checkpoints by name and by run: where they are, and what was published of them.

Reading order: add_checkpoint_options, find_checkpoint, find_pretrained -> released_source, fetch_checkpoint;
published_score -> comparison; run_config.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

import run
from common import UserError
from data import PASCAL_CONTEXT, SegmentationDataset, open_dataset
from model import ModelConfig
from tools import fetch
from tools.context import EXPECTED_COUNTS
from tools.tables import in_percent
from weights import size_of

PREFIX = "checkpoint:"  # of the released models' names in the table of sources
POLL = 0.5  # seconds


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Which model: the options that evaluate.py and predict.py share."""
    parser.add_argument("--checkpoint", metavar="FILE", help="a file, or a released model: mask2former-base, "
                        "upernet-large, mask2former-large; default: the newest runs/*/best.pt")
    parser.add_argument("--yes", action="store_true", help="fetch a released model without asking")


def find_checkpoint(name: str | Path | None, yes: bool = False, root: str | Path | None = None,
                    split: str = "val") -> Path:
    """The file `name`, or that of the released model `name`; None is the best.pt that was written last under runs/.

    A released model that is not here is fetched if `yes`, else once the user on the terminal agrees. Raises UserError:
    no such file or model, no run, no consent. Data that is absent at `root` is told before gigabytes are fetched.
    """
    if name is None:
        newest = max(run.RUNS.glob("*/best.pt"), key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            raise UserError(f"no {run.RUNS}/*/best.pt: train first (python train.py --data toy) or name a --checkpoint")
        return newest
    if Path(name).is_file():
        return Path(name)
    source = released_source(str(name))
    if not source.here:
        try:
            if root:
                open_dataset(root, split)
        except UserError as error:
            raise UserError(f"{error}; the checkpoint is absent too: `{source.command}`") from None
        fetch_checkpoint(source, yes)
    return source.path


def released_source(name: str) -> fetch.Source:
    """Where the released model of that name is. Raises UserError if there is none."""
    models = {key.removeprefix(PREFIX): source for key, source in fetch.sources().items() if key.startswith(PREFIX)}
    if name.removeprefix(PREFIX) not in models:
        raise UserError(f"{name}: no such file, and no released model: those are {', '.join(models)}")
    return models[name.removeprefix(PREFIX)]


def fetch_checkpoint(source: fetch.Source, yes: bool) -> None:
    """Fetch a released model; on a terminal ask first, unless `yes`. Raises UserError.

    Under torchrun one process of each node does so. The others wait for the file; if it fails torchrun ends them.
    """
    if int(os.environ.get("LOCAL_RANK", 0)):
        while not source.here:
            time.sleep(POLL)
        return
    absent = f"no checkpoint at {source.path}: `{source.command}` fetches it, and so does --yes"
    if not yes:
        if not all(stream and stream.isatty() for stream in (sys.stdin, sys.stderr)):
            raise UserError(absent)
        print(f"fetch {source.what}, from {source.addresses[0]}? [y/N]", end=" ", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UserError(absent)
    fetch.fetch([source.name])


def find_pretrained(name: str | None, size: str) -> Path | None:
    """The file that a training starts from: `name`, a released model's, or by default BEiT's; None: random weights.

    Raises UserError if the file is absent.
    """
    if name == "none" or name is None and size == "tiny":
        return None
    if name is None:
        original, timm = fetch.choose([f"beit-original:{size}", f"beit:{size}"])
        usual, command = [original.path, timm.path], timm.command
        fault = f"no pre-trained BEiT weights at {original.path} or {timm.path}"
    elif Path(name).is_file():
        return Path(name)
    else:
        released = released_source(name)
        usual, command, fault = [released.path], released.command, f"--pretrained {name}: {released.path} is absent"
    for path in usual:
        if path.is_file():
            return path
    other = "--pretrained none" if name else "--pretrained FILE|none or --size tiny"
    raise UserError(f"{fault}: `{command}` gets it; {other} does without")


def published_score(config: ModelConfig, dataset: SegmentationDataset, multi_scale: bool) -> float | None:
    """The mIoU, as a fraction, that was published of the model of this head and size on Pascal Context's validation.

    None where there is none, and where these are other images.
    """
    source = fetch.sources().get(f"{PREFIX}{config.head}-{size_of(config)}")
    if source and source.published and dataset.layout is PASCAL_CONTEXT and dataset.split == "val":
        return round(source.published[multi_scale] / 100, 6)
    return None


def comparison(about: dict, mean_iou: float) -> str:
    """Published and own mIoU side by side; a line that says how many images there are if they are not all.

    `about` is what evaluation.json tells: its "published_mean_iou", "kind", "scales" and "images".
    """
    images, whole = about["images"], [count["val"] for count in EXPECTED_COUNTS.values()]  # of both sources of labels
    theirs, ours = "published", "here"
    if about["kind"] != "released":
        theirs, ours = "published, trained by the authors,", "this run"
    part = "" if images in whole else f" (on {images:,} images, not {max(whole):,})"
    numbers = f"{theirs} {in_percent(about['published_mean_iou'])}   {ours} {in_percent(mean_iou)}"
    return f"mIoU {about['scales']}   {numbers}{part}"


def run_config(checkpoint: Path) -> dict:
    """The config.json of the run in whose folder a checkpoint lies; {} where there is none, or none to be read."""
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((checkpoint.parent / "config.json").read_text())
        return config if isinstance(config, dict) else {}
    return {}
