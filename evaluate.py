"""Sliding-window evaluation, single-scale or multi-scale with flips, on any number of processes.

    python evaluate.py                                 the newest run's best checkpoint on its own validation split
    python evaluate.py --ms --checkpoint FILE --data DIR
    torchrun --nproc_per_node=8 evaluate.py --ms       the same numbers, shared out over 8 devices

Read: window_starts -> Canvas -> sliding_scores (windows of all views in full batches) -> vote (views into one
prediction) -> predictions -> evaluate -> metrics. The short forms `slide` and `predict` do one image at a time.

A *view* is one resized, perhaps mirrored copy of a picture. Every view is cut into windows; a window's scores are
added to its view's canvas; a finished canvas is resized to the picture, soft-maxed, and votes with the other views.

Shapes: B images, K classes, (h, w) size of a view, (H, W) size of the original picture. Images are normalised float
(3, h, w), scores float (K, h, w), labels and predictions integer (H, W) with 255 for ignored pixels.
"""

import argparse
import contextlib
import json
import math
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fast.memory import keep_freed_memory
from torch import Tensor, nn
from tqdm import tqdm

import common
import data
import run
import weights
from common import UserError
from tools import draw

Save = Callable[[int, np.ndarray], None]  # takes an image's index and its prediction, uint8 (H, W)
REMEDY = "evaluate it on the data that it was trained on (--data DIR)"
STRIP = 2**27  # numbers in a slab of probabilities (512 MiB of float32): larger pictures are voted on in strips


# ------------------------------------------------------------------------------------------- sliding windows


class View(NamedTuple):
    """A normalised image (1, 3, h, w), whether it was mirrored, and how many views it stands for."""

    image: Tensor
    flipped: bool = False
    weight: float = 1.0


class Job(NamedTuple):
    """A view and the picture that it belongs to: its index and its (H, W)."""

    picture: int
    size: tuple[int, int]
    view: View


class Result(NamedTuple):
    """A job and its scores (K, h, w)."""

    job: Job
    scores: Tensor


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows that cover `length` pixels; the last window is moved back to end at the border."""
    steps = math.ceil((length - window) / stride) + 1
    return [min(i * stride, length - window) for i in range(steps)]


class Canvas:
    """A view on its way through the model: the sum of its windows' scores, and how many windows are still out."""

    def __init__(self, job: Job, window: int, stride: int):
        self.job, self.window = job, window
        self.image = job.view.image[0]
        height, width = self.image.shape[1:]
        if min(height, width) < window:
            raise UserError(f"a {height}x{width} image is smaller than the {window}x{window} window: enlarge it")
        self.tops, self.lefts = window_starts(height, window, stride), window_starts(width, window, stride)
        self.corners = [(top, left) for top in self.tops for left in self.lefts]
        self.missing = len(self.corners)
        self.total: Tensor | None = None

    def crop(self, top: int, left: int) -> Tensor:
        """The window (3, window, window) at this corner."""
        return self.image[:, top : top + self.window, left : left + self.window]

    def add(self, top: int, left: int, scores: Tensor) -> None:
        """Add a window's scores (K, window, window) where the window was cut."""
        if self.total is None:
            self.total = scores.new_zeros(scores.shape[0], *self.image.shape[1:])
        self.total[:, top : top + self.window, left : left + self.window] += scores
        self.missing -= 1

    def mean(self) -> Tensor:
        """Scores (K, h, w): at every pixel the mean over the windows that cover it."""
        # The number of windows over a pixel is a product of a count along each axis.
        counts = [
            sum((torch.arange(n) >= s) & (torch.arange(n) < s + self.window) for s in starts)
            for n, starts in zip(self.image.shape[1:], (self.tops, self.lefts), strict=True)
        ]
        return self.total.div_(torch.outer(*counts).to(self.total.device, non_blocking=True))


@torch.no_grad()
def sliding_scores(model: nn.Module, jobs: Iterable[Job], stride: int, window_batch: int) -> Iterator[Result]:
    """Send the windows of all views through the model in batches of `window_batch`; yield the results.

    All windows have one size, so a batch may hold windows of several views and pictures; only the very last batch is
    smaller. Scores come in the order of the jobs, and a view's memory is freed as soon as it is handed on. The model
    averages **scores**, before any softmax (as in the official inference code).
    """
    views: deque[Canvas] = deque()
    windows: deque[tuple[Canvas, int, int]] = deque()

    def run_batch(number: int) -> Iterator[Result]:
        batch = [windows.popleft() for _ in range(number)]
        scores = model(torch.stack([canvas.crop(top, left) for canvas, top, left in batch]))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # sums and softmax never in half precision
        for (canvas, top, left), window_scores in zip(batch, scores, strict=True):
            canvas.add(top, left, window_scores)
        while views and views[0].missing == 0:
            done = views.popleft()
            yield Result(done.job, done.mean())

    for job in jobs:
        canvas = Canvas(job, model.config.window, stride)
        views.append(canvas)
        windows.extend((canvas, *corner) for corner in canvas.corners)
        while len(windows) >= window_batch:
            yield from run_batch(window_batch)
    if windows:
        yield from run_batch(len(windows))


def slide(model: nn.Module, image: Tensor, window: int, stride: int, window_batch: int | None = None) -> Tensor:
    """Scores (B, K, H, W) of images (B, 3, H, W): the mean of the scores of overlapping windows, before softmax."""
    if window != model.config.window:
        raise UserError(f"the model sees windows of {model.config.window} pixels, not of {window}")
    jobs = [Job(i, tuple(image.shape[2:]), View(image[i : i + 1])) for i in range(len(image))]
    window_batch = window_batch or automatic_window_batch(model, image.device)
    return torch.stack([scores for _, scores in sliding_scores(model, jobs, stride, window_batch)])


def automatic_window_batch(model: nn.Module, device: torch.device | str) -> int:
    """How many windows go through the model at once.

    On CUDA one window is run and its peak memory measured; the batch may fill 60 % of what is then free, 64 at most.
    On a CPU a batch saves only the overhead of the calls: 4 windows of 480 pixels, or as many pixels in smaller ones.
    """
    window = model.config.window
    if torch.device(device).type != "cuda":
        return max(1, min(32, 4 * 480**2 // window**2))
    probe = torch.zeros(1, 3, window, window, device=device)
    with torch.no_grad():
        model(probe)  # once for what stays: workspaces, and weights cast by autocast
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        model(probe)
    used = max(1, torch.cuda.max_memory_allocated(device) - before)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's, but free to use
    return max(1, min(64, int(0.6 * (torch.cuda.mem_get_info(device)[0] + idle) / used)))


# ----------------------------------------------------------------------------------------- views and voting


def make_views(image: np.ndarray, window: int, multi_scale: bool, device: torch.device | str = "cpu") -> list[View]:
    """The views of a picture (H, W, 3), uint8, normalised on `device`: one, or six scales and their mirror images.

    Scales that lead to the same size (the ratios .5 and .75 do) are computed once and counted twice.
    """
    pictures = data.multi_scale_images(image, window) if multi_scale else [data.single_scale_image(image, window)]
    counts = Counter(picture.shape for picture in pictures)
    views = []
    for picture in {picture.shape: picture for picture in pictures}.values():
        pixels = torch.from_numpy(picture).to(device).permute(2, 0, 1)[None]  # (h, w, 3) -> (1, 3, h, w)
        view = View(data.normalize(pixels), False, counts[picture.shape])
        views += [view, View(view.image.flip(-1), True, view.weight)] if multi_scale else [view]
    return views


def vote(results: Iterable[Result], size: tuple[int, int], num_classes: int, strip: int = STRIP) -> Iterator[Tensor]:
    """Mean probabilities of a picture's views at its size (H, W), as strips (K, rows, W) from top to bottom.

    Each view's scores are resized, soft-maxed and un-mirrored; then views are averaged by weight. Mask2Former's scores
    are probabilities already and are soft-maxed again: the official code does, and multi-scale results depend on it.

    A picture of up to `strip` numbers (K H W) is one strip, and every view is forgotten once added. A larger one
    keeps its views' scores, which are smaller than the picture then, and is put together strip by strip.
    """
    height, width = size
    rows = max(1, min(height, strip // (num_classes * width)))
    if rows < height:
        results = list(results)
    for top in range(0, height, rows):
        total, weight = None, 0
        for (_, _, view), scores in results:
            probabilities = resize_rows(scores, size, top, min(top + rows, height)).softmax(0)
            probabilities = probabilities.flip(-1) if view.flipped else probabilities
            total = probabilities.mul_(view.weight) if total is None else total.add_(probabilities, alpha=view.weight)
            weight += view.weight
        yield total.div_(weight)


def resize_rows(scores: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Rows top ... bottom - 1 of `scores` (K, h, w) resized bilinearly to `size`, as F.interpolate would give them."""
    height, width = size
    if (top, bottom) != (0, height):
        # Bilinear resizing is separable: blend the two source rows of each wanted row, then resize the width alone.
        rows = torch.arange(top, bottom, device=scores.device, dtype=scores.dtype)
        source = ((rows + 0.5) * (scores.shape[1] / height) - 0.5).clamp(min=0)
        upper = source.long().clamp(max=scores.shape[1] - 1)
        lower = (upper + 1).clamp(max=scores.shape[1] - 1)
        scores = torch.lerp(scores[:, upper], scores[:, lower], (source - upper)[:, None])
    return F.interpolate(scores[None], (bottom - top, width), mode="bilinear", align_corners=False)[0]


def predict(model: nn.Module, views: Sequence[View], size: tuple[int, int], window_batch: int | None = None) -> Tensor:
    """Probabilities (K, H, W) of one picture from its views: (image (1, 3, h, w), flipped, weight) each."""
    jobs = [Job(0, size, View(*view)) for view in views]
    window_batch = window_batch or automatic_window_batch(model, jobs[0].view.image.device)
    results = sliding_scores(model, jobs, stride_of(model), window_batch)
    return torch.cat(list(vote(results, size, model.config.num_classes)), dim=1)


def stride_of(model: nn.Module) -> int:
    """Two thirds of the window: the official 320 of 480 pixels."""
    return model.config.window * 2 // 3


def predictions(model: nn.Module, images: Iterable[np.ndarray], *, multi_scale: bool = False,
                device: torch.device | str = "cpu", window_batch: int | None = None) -> Iterator[Tensor]:
    """Class indices, uint8 (H, W), of each image, uint8 (H, W, 3), in order.

    Images are read and resized in a thread while the model works on those before, and windows of consecutive images
    share batches.
    """
    window = model.config.window
    prepared = prefetch((image.shape[:2], make_views(image, window, multi_scale, device)) for image in images)
    jobs = (Job(index, size, view) for index, (size, views) in enumerate(prepared) for view in views)
    window_batch = window_batch or automatic_window_batch(model, device)
    stream = sliding_scores(model, jobs, stride_of(model), window_batch)
    for (_, size), results in groupby(stream, key=lambda result: (result.job.picture, result.job.size)):
        strips = vote(results, size, model.config.num_classes)
        # max is three times as fast as argmax on a CPU; uint8 holds every class, for there are at most 255
        yield torch.cat([strip.max(0).indices.to(torch.uint8) for strip in strips])


def prefetch(items: Iterable, ahead: int = 2) -> Iterator:
    """The items in order, taken from their source in a thread, `ahead` of their use."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item


# ------------------------------------------------------------------------------------------------ the numbers


def confusion_matrix(prediction: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """int64 (K, K) pixel counts: row = label, column = prediction. Pixels labelled 255 are left out."""
    cells = torch.where(labels == data.IGNORE, num_classes**2, labels.long() * num_classes + prediction)
    return torch.bincount(cells.flatten(), minlength=num_classes**2 + 1)[:-1].view(num_classes, num_classes)


class Metrics(NamedTuple):
    """Per class, float64 (K,): IoU, accuracy and labelled pixels; over all: pixel accuracy and the two class means."""

    iou: np.ndarray
    accuracy: np.ndarray
    pixels: np.ndarray
    all_accuracy: float
    mean_iou: float
    mean_accuracy: float


def metrics(confusion: Tensor) -> Metrics:
    """Metrics of a confusion matrix (K, K) summed over the data set, fractions in 0 ... 1.

    A class in neither labels nor predictions has no IoU (NaN) and is left out of the mean.
    """
    matrix = confusion.cpu().double().numpy()
    hits, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that we want
        iou, accuracy = hits / (labelled + predicted - hits), hits / labelled
        all_accuracy = float(hits.sum() / matrix.sum())
    return Metrics(iou, accuracy, labelled, all_accuracy, nan_mean(iou), nan_mean(accuracy))


def nan_mean(values: np.ndarray) -> float:
    """The mean over the numbers among `values`; NaN if there are none."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else math.nan


def table(result: Metrics, classes: Sequence[str]) -> str:
    """The per-class table and the three summary numbers, in percent."""
    width = max(len("class"), *map(len, classes))
    lines = [f"{'class':<{width}}     IoU     acc        pixels", "-" * (width + 30)]
    for name, iou, accuracy, pixels in zip(classes, result.iou, result.accuracy, result.pixels, strict=True):
        lines.append(f"{name:<{width}}  {cell(iou)}  {cell(accuracy)}  {int(pixels):>12,}")
    means = {"aAcc": result.all_accuracy, "mIoU": result.mean_iou, "mAcc": result.mean_accuracy}
    return "\n".join([*lines, lines[1], "   ".join(f"{name} {cell(mean).strip()}" for name, mean in means.items())])


def cell(fraction: float) -> str:
    """A percentage of six characters; a dash where there is no number."""
    return f"{'-':>6}" if math.isnan(fraction) else f"{100 * fraction:6.2f}"


def evaluate(model: nn.Module, dataset: data.SegmentationDataset, *, multi_scale: bool = False,
             device: torch.device | str = "cpu", limit: int | None = None, progress: bool = True,
             window_batch: int | None = None, amp: torch.dtype | None = None,
             save: Save | None = None) -> Tensor:
    """Confusion matrix int64 (K, K), summed over the first `limit` images of the data set and over all processes.

    Under torch.distributed process r takes the images r, r + world, ...: none is counted twice, none is padded on.
    `save(index, prediction uint8 (H, W))` is called for each image of this process. The model is put back into
    training mode if it was in it.
    """
    distributed = dist.is_available() and dist.is_initialized()
    start, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    mine = range(start, min(len(dataset), limit or len(dataset)), world)
    total = torch.zeros(len(dataset.info.classes), len(dataset.info.classes), dtype=torch.int64, device=device)
    silent = None if progress and start == 0 else True  # None: silent only where stderr is no terminal
    bar = tqdm(mine, desc="evaluating", unit="image", disable=silent, dynamic_ncols=True)
    training = model.training
    model.eval()
    with torch.autocast(torch.device(device).type, amp, enabled=amp is not None):
        images = (dataset.image(i) for i in mine)
        results = predictions(model, images, multi_scale=multi_scale, device=device, window_batch=window_batch)
        for index, prediction in zip(bar, results, strict=True):
            labels = torch.from_numpy(dataset.labels(index)).to(device)
            total += confusion_matrix(prediction, labels, len(total))
            if not bar.disable:
                bar.set_postfix(mIoU=f"{100 * metrics(total).mean_iou:.2f}", refresh=False)
            if save:
                save(index, prediction.cpu().numpy())
    model.train(training)
    if distributed:
        dist.all_reduce(total)
    return total


# ------------------------------------------------------------------------------------------- the command line


def newest_checkpoint(runs: Path = Path("runs")) -> Path:
    """The best.pt that was written last under runs/."""
    found = sorted(runs.glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no {runs}/*/best.pt: train first (python train.py --data toy) or name a --checkpoint")
    return found[-1]


def data_of_run(checkpoint: Path) -> str:
    """The data folder that the checkpoint's run was trained on, from the config.json beside it."""
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint}: no such file; name a checkpoint, or none for the newest run's best")
    config = checkpoint.parent / "config.json"
    with contextlib.suppress(OSError, json.JSONDecodeError, KeyError):
        return json.loads(config.read_text())["data"]
    raise UserError(f"{config} does not tell the data of {checkpoint.name}: name their folder with --data")


def check_classes(info: data.DatasetInfo, classes: Sequence[str], num_classes: int) -> None:
    """Refuse a data set whose classes are not the checkpoint's (`classes`, empty if it does not name them)."""
    if len(info.classes) != num_classes:
        raise UserError(f"{info.name} has {len(info.classes)} classes, the checkpoint {num_classes}: {REMEDY}")
    for ours, theirs in zip(info.classes, classes, strict=False):
        if ours != theirs:
            raise UserError(f"class '{ours}' of {info.name} is '{theirs}' in the checkpoint: {REMEDY}")


def to_json(result: Metrics, classes: Sequence[str], **facts: object) -> str:
    """The metrics as JSON; a class without a number gets null."""

    def number(value: float) -> float | None:
        return None if math.isnan(value) else float(value)

    per_class = [
        {"class": name, "iou": number(iou), "accuracy": number(accuracy), "pixels": int(pixels)}
        for name, iou, accuracy, pixels in zip(classes, result.iou, result.accuracy, result.pixels, strict=True)
    ]
    means = {name: number(getattr(result, name)) for name in ("all_accuracy", "mean_iou", "mean_accuracy")}
    return json.dumps({**facts, **means, "classes": per_class}, indent=1)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = common.Parser(
        description="Evaluate a checkpoint: IoU and accuracy per class, aAcc, mIoU, mAcc.",
        epilog="Share the work out with: torchrun --nproc_per_node=N evaluate.py ...",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: the newest runs/*/best.pt")
    parser.add_argument("--data", metavar="DIR", help="data set folder; default: the one the run was trained on")
    parser.add_argument("--split", default="val", choices=["train", "val"])
    parser.add_argument("--ms", action="store_true", help="multi-scale and flip: six scales, each mirrored")
    parser.add_argument("--limit", type=common.positive, metavar="N", help="only the first N images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--save-labels", type=Path, metavar="DIR", help="write each prediction as a palette PNG")
    parser.add_argument("--original-ids", action="store_true", help="in those, Pascal Context's ids of 459 classes")
    add_device_options(parser)
    return parser.parse_args(arguments)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """How the model is run: the options that evaluate.py, predict.py and report.py share."""
    parser.add_argument("--device", help="cpu, cuda or mps; default: cuda if there is one")
    parser.add_argument("--window-batch", type=common.positive, metavar="N",
                        help="windows at once; default: by free memory")
    parser.add_argument("--amp", action="store_const", const=torch.bfloat16,
                        help="run the model in bfloat16 where that is safe")
    parser.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True,
                        help="TF32 products in float32 on a GPU; on by default, as in training and the official runs")


def evaluate_command(options: argparse.Namespace) -> None:
    """What the command line asks for."""
    checkpoint = options.checkpoint or newest_checkpoint()
    dataset = data.open_dataset(options.data or data_of_run(checkpoint), options.split)
    model, facts = weights.load_model(checkpoint)
    check_classes(dataset.info, facts.get("classes", ()), model.config.num_classes)
    save = label_writer(options.save_labels, dataset, options.original_ids) if options.save_labels else None
    if options.json:
        common.check_file(options.json, "--json")
    device = run.join_processes(options.device).device
    common.allow_tf32(options.tf32)
    confusion = evaluate(model.to(device), dataset, multi_scale=options.ms, device=device, limit=options.limit,
                         save=save, window_batch=options.window_batch, amp=options.amp)
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    result = metrics(confusion)
    scales = "multi-scale + flip" if options.ms else "single-scale"
    print(f"{checkpoint} on {dataset.info.name} {options.split}, {scales}")
    print(table(result, dataset.info.classes))
    if options.json:
        how = {"checkpoint": str(checkpoint), "data": str(dataset.root), "split": options.split, "scales": scales}
        text = to_json(result, dataset.info.classes, **how) + "\n"
        common.write_whole(options.json, lambda file: file.write(text.encode()))


def label_writer(folder: Path, dataset: data.SegmentationDataset, original_ids: bool) -> Save:
    """A function that writes prediction i as folder/NAME.png: class indices with the palette, or original ids."""
    if original_ids:
        ids = {c["name"]: c["original_id"] for c in json.loads(data.CONTEXT_CLASSES.read_text())["classes"]}
        if set(dataset.info.classes) - set(ids):
            raise UserError(f"{dataset.info.name} has no original ids: leave out --original-ids")
        original = np.uint16([ids[name] for name in dataset.info.classes])
    common.make_folder(folder, "--save-labels")

    def save(index: int, prediction: np.ndarray) -> None:
        path = folder / f"{dataset.names[index]}.png"
        if original_ids:
            draw.save_labels(original[prediction], path)
        else:
            draw.save_labels(prediction, path, dataset.info.palette)

    return save


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 2 for a user's fault, 130 for Ctrl-C."""
    options = parse(arguments)
    keep_freed_memory()
    try:
        return common.run(lambda: evaluate_command(options))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
