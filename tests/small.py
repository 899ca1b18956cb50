"""For the tests of training: a data set and a model that are small enough.

As a script it is train.py with that model: `torchrun tests/small.py OPTIONS`. SMALL_CUT="3:SIGKILL:1 2:SIGTERM:0" cuts
such a run: at its first start process 1 sends itself SIGKILL before step 3, at its second start (torchrun's restart)
process 0 sends itself SIGTERM before step 2, counted from that start. SMALL_START is how its workers start.
"""

import json
import multiprocessing
import os
import signal
import sys
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import run  # noqa: E402
import train  # noqa: E402

CLASSES = ["ground", "disk", "bar"]
COLOURS = np.array([[90, 80, 60], [200, 40, 40], [40, 80, 200]])
CHANGES = {
    "window": 64, "embed_dim": 32, "num_heads": 2, "deform_heads": 2, "spm_channels": 8, "head_channels": 32,
    "aux_channels": 16, "num_queries": 8, "mask_heads": 2, "encoder_layers": 1, "encoder_ffn": 32, "decoder_layers": 3,
    "decoder_ffn": 32, "num_points": 64,
}
NOISE = {"drop_path": 0.3, "dropout": 0.1}  # so that a run depends on every random number
OPTIONS = [
    "--data", "data", "--size", "tiny", "--global-batch", "4", "--batch", "2", "--workers", "0", "--device", "cpu",
]


def small_model(head: str, size: str, num_classes: int, **changes) -> model.Segmenter:
    """`build_model` for a model of under 200,000 parameters, whatever the size."""
    return model.build_model(head, "tiny", num_classes, **{**CHANGES, **NOISE, **changes})


def write_data(root: Path, images: int = 8, validation: int = 3) -> Path:
    """A plain folder of pictures with a disk and a bar on the ground, deterministic."""
    rng = np.random.default_rng(0)
    names = [f"{i:02d}" for i in range(images + validation)]
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    y, x = np.mgrid[:48, :64]
    for name in names:
        labels = np.zeros((48, 64), np.uint8)
        labels[(y - rng.integers(10, 38)) ** 2 + (x - rng.integers(10, 54)) ** 2 < 64] = 1
        labels[:, rng.integers(0, 50) :][:, :6] = 2
        labels[:4] = 255
        image = COLOURS[labels % 253] + rng.integers(-20, 20, (48, 64, 3))  # 255 is drawn as class 2
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(labels).save(root / "labels" / f"{name}.png")
    (root / "dataset.json").write_text(json.dumps({"classes": CLASSES}))
    (root / "train.txt").write_text("\n".join(names[:images]))
    (root / "val.txt").write_text("\n".join(names[images:]))
    return root


def log(name: str, kind: str) -> list[dict]:
    """The lines of that kind in the log of a run."""
    return [line for line in run.read_log(run.RUNS / name / "log.jsonl") if line["kind"] == kind]


def cut_before(step: int, number: int, process: int = 0) -> None:
    """Have `process` send itself the signal before that step, counted from now."""
    exchange, steps = train.exchange, count()

    def cutting(batches, num_classes, stop, where):
        if next(steps) == step and where.rank == process:
            os.kill(os.getpid(), number)
            stop = True  # Python runs a signal handler a little later; the promise is about the iteration after it
        return exchange(batches, num_classes, stop, where)

    train.exchange = cutting


REPLACED = {"build_model": small_model, "LOG_EVERY": 1}

if __name__ == "__main__":
    multiprocessing.set_start_method(os.environ.get("SMALL_START"))  # None: Python's own choice
    for attribute, value in REPLACED.items():
        setattr(train, attribute, value)
    cuts, start = os.environ.get("SMALL_CUT", "").split(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if start < len(cuts):
        step, name, process = cuts[start].split(":")
        cut_before(int(step), signal.Signals[name], int(process))
    train.main()
