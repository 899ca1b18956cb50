"""Sliding-window evaluation, single-scale or multi-scale with flips, on any number of processes.

    python evaluate.py                                 the newest run's best checkpoint on its own validation split
    python evaluate.py --ms --checkpoint FILE --data DIR
    python evaluate.py --checkpoint mask2former-base   a released model on Pascal Context, beside its published score
    torchrun --nproc_per_node=8 evaluate.py --ms       the same numbers, shared out over 8 devices

Reading order: window_places -> sliding_scores -> make_views -> vote -> predictions -> metrics -> evaluate
-> match_classes -> evaluate_checkpoint. How numbers look is in tools/tables.py.

A *view* is one resized, perhaps mirrored copy of a picture. The scores of its windows are averaged where they overlap,
resized to the picture, soft-maxed, and vote with those of the other views.

Shapes: B images, K classes, (h, w) size of a view, (H, W) size of the original picture. Images are normalised float
(3, h, w), scores float (K, h, w), labels and predictions integer (H, W) with 255 for ignored pixels.
"""

import argparse
import contextlib
import math
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, tee
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import common
import data
import run
import weights
from common import UserError
from fast import inference, keep_freed_memory
from tools import checkpoints, record, tables

Save = Callable[[int, np.ndarray], None]  # takes the index of an image and its prediction, uint8 (H, W)
REMEDY = "evaluate it on data of its classes (--data DIR)"
STRIP = 2**27  # numbers in a slab of probabilities (512 MiB of float32): larger pictures are voted on in strips


class View(NamedTuple):
    """A normalised image (1, 3, h, w), whether it was mirrored, and how many equal views it stands for."""
    image: Tensor
    flipped: bool = False
    weight: float = 1.0


def window_places(size: Sequence[int], window: int, stride: int) -> list[tuple[slice, ...]]:
    """Slices of a view (3, h, w) of that size (h, w), one for each window. Raises UserError for a smaller view."""
    if min(size) < window:
        raise UserError(f"a {size[0]}x{size[1]} image is smaller than the {window}x{window} window: enlarge it")
    # The last window is moved back to end at the border.
    tops, lefts = ([min(start, side - window) for start in range(0, side - window + stride, stride)] for side in size)
    return [np.s_[:, top : top + window, left : left + window] for top in tops for left in lefts]


@torch.no_grad()
def sliding_scores(model: nn.Module, views: Iterable[View], window_batch: int | None = None,
                   stride: int | None = None) -> Iterator[tuple[View, Tensor]]:
    """Each view and its scores (K, h, w), in order: at every pixel the mean over the windows that cover it.

    A batch may hold windows of several views and pictures, for all have one size; only the very last is smaller. The
    mean is taken before any softmax, as in the official inference code. The default stride is two thirds of the window:
    the official 320 of 480 pixels.
    """
    window = model.config.window
    stride = stride or window * 2 // 3
    window_batch = window_batch or automatic_window_batch(model, next(model.parameters()).device)
    cut = ((view, window_places(view.image.shape[2:], window, stride)) for view in views)
    ahead, current = tee(cut)  # the model is ahead of the sums: its batch may hold windows of the next views
    windows = (view.image[0][place] for view, places in ahead for place in places)
    batches = iter(lambda: list(islice(windows, window_batch)), [])
    scores = (of_one for batch in batches for of_one in model(torch.stack(batch)))
    for view, places in current:
        dtype = torch.promote_types(view.image.dtype, torch.float32)  # sums and softmax never in half precision
        count = torch.zeros(view.image.shape[2:], dtype=dtype, device=view.image.device)
        total = count.new_zeros(model.config.num_classes, *count.shape)
        for place, window_scores in zip(places, scores, strict=False):  # the scores go on with the next view
            total[place] += window_scores
            count[place[1:]] += 1
        yield view, total.div_(count)


def slide(model: nn.Module, image: Tensor, window: int, stride: int, window_batch: int | None = None) -> Tensor:
    """Scores (B, K, H, W) of images (B, 3, H, W): the mean of the scores of overlapping windows, before softmax."""
    if window != model.config.window:
        raise UserError(f"the model sees windows of {model.config.window} pixels, not of {window}")
    views = [View(one[None]) for one in image]
    return torch.stack([scores for _, scores in sliding_scores(model, views, window_batch, stride)])


@torch.no_grad()
def automatic_window_batch(model: nn.Module, device: torch.device | str) -> int:
    """How many windows go through the model at once: on a CPU 4 of 480 pixels, or as many pixels in smaller ones.

    On CUDA it is measured: a batch may take 60 % of the free memory, for pictures, votes and earlier scores come to it.
    """
    window, batch = model.config.window, 1
    if torch.device(device).type != "cuda":
        return max(1, min(32, 4 * 480**2 // window**2))
    for number in (1, 1, 8):  # the first leaves what stays: workspaces, cast weights; 8 share what a batch costs once
        if number <= batch:
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            model(torch.zeros(number, 3, window, window, device=device))
            used = torch.cuda.max_memory_allocated(device) - before
            free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - before  # with PyTorch's
            batch = max(1, min(64, int(0.6 * free * number / used)))
    return batch


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """The array as a tensor on the device. It goes to a GPU from pinned memory: the host does not wait for the copy."""
    tensor, cuda = torch.from_numpy(array), torch.device(device).type == "cuda"
    return (tensor.pin_memory() if cuda else tensor).to(device, non_blocking=cuda)


def make_views(image: np.ndarray, window: int, multi_scale: bool, device: torch.device | str = "cpu") -> list[View]:
    """The views of a picture (H, W, 3), uint8, normalised on `device`: one, or six scales and their mirror images.

    Scales that lead to the same size (the ratios .5 and .75 do) are computed once and counted twice.
    """
    scaled = data.multi_scale_images(image, window) if multi_scale else [data.single_scale_image(image, window)]
    counts, views = Counter(picture.shape for picture in scaled), []
    for shape, picture in {picture.shape: picture for picture in scaled}.items():
        pixels = to_device(picture, device).permute(2, 0, 1)[None]  # (h, w, 3) -> (1, 3, h, w)
        views.append(View(data.normalize(pixels), False, counts[shape]))
        if multi_scale:
            views.append(View(views[-1].image.flip(-1), True, counts[shape]))
    return views


def vote(results: Iterable[tuple[View, Tensor]], size: tuple[int, int], num_classes: int) -> Iterator[Tensor]:
    """Mean probabilities of a picture's (view, scores) pairs at its size (H, W), as strips (K, rows, W) from the top.

    Each view's scores are resized, soft-maxed and un-mirrored; then views are averaged by weight. Mask2Former's scores
    are probabilities already and are soft-maxed again: the official code does, and multi-scale results depend on it.

    A picture of up to STRIP numbers (K H W) is one strip, and every view is forgotten once added. A larger one keeps
    its views' scores, which are smaller than the picture then.
    """
    height, width = size
    rows = max(1, min(height, STRIP // (num_classes * width)))
    if rows < height:
        results = list(results)
    for top in range(0, height, rows):
        total, weight = None, 0
        for view, scores in results:
            probabilities = resize_rows(scores, size, top, min(top + rows, height)).softmax(0)
            probabilities = probabilities.flip(-1) if view.flipped else probabilities
            total = probabilities.mul_(view.weight) if total is None else total.add_(probabilities, alpha=view.weight)
            weight += view.weight
        yield total.div_(weight)


def resize_rows(scores: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Rows top ... bottom - 1 of `scores` (K, h, w) resized bilinearly to `size`, as F.interpolate would give them."""
    if bottom - top < size[0]:
        # Bilinear resizing is separable: blend the two source rows of each wanted row, then resize the width alone.
        rows = torch.arange(top, bottom, device=scores.device, dtype=scores.dtype)
        source = ((rows + 0.5) * (scores.shape[1] / size[0]) - 0.5).clamp(0, scores.shape[1] - 1)
        upper, lower = source.floor().long(), source.ceil().long()
        scores = torch.lerp(scores[:, upper], scores[:, lower], (source - upper)[:, None])
    return F.interpolate(scores[None], (bottom - top, size[1]), mode="bilinear", align_corners=False)[0]


def predict(model: nn.Module, views: Sequence[View], size: tuple[int, int], window_batch: int | None = None) -> Tensor:
    """Probabilities (K, H, W) of one picture of that size (H, W) from its views."""
    return torch.cat(list(vote(sliding_scores(model, views, window_batch), size, model.config.num_classes)), dim=1)


def predictions(model: nn.Module, images: Iterable[np.ndarray], *, multi_scale: bool = False,
                device: torch.device | str = "cpu", window_batch: int | None = None) -> Iterator[Tensor]:
    """Class indices, uint8 (H, W), of each image, uint8 (H, W, 3), in order."""
    for strips in votes(model, images, multi_scale, device, window_batch):
        # max is three times as fast as argmax on a CPU; uint8 holds every class, for there are at most 255
        yield torch.cat([strip.max(0).indices.to(torch.uint8) for strip in strips])


def votes(model: nn.Module, images: Iterable[np.ndarray], multi_scale: bool, device: torch.device | str,
          window_batch: int | None = None) -> Iterator[Iterator[Tensor]]:
    """The strips of probabilities that `vote` makes of each image, uint8 (H, W, 3), in order; use each before the next.

    A thread reads images, resizes them and copies them to the device while the model works: ahead of it, as many as
    fill a batch of windows, which consecutive images share. The host never waits for the device.
    """
    window_batch = window_batch or automatic_window_batch(model, device)
    least = 44 if multi_scale else 4  # windows of an image
    prepared = prefetch(((image.shape[:2], make_views(image, model.config.window, multi_scale, device))
                         for image in images), 1 + window_batch // least)
    ahead, current = tee(prepared)  # the model is ahead of the votes
    results = sliding_scores(model, (view for _, views in ahead for view in views), window_batch)
    for size, views in current:
        yield vote(islice(results, len(views)), size, model.config.num_classes)


def prefetch(items: Iterable, ahead: int) -> Iterator:
    """The items in order, taken from their source in a thread, `ahead` of their use."""
    items, end, thread = iter(items), object(), ThreadPoolExecutor(1)
    try:
        waiting = deque(thread.submit(next, items, end) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def confusion_matrix(prediction: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """int64 (K, K) pixel counts: row = label, column = prediction. Pixels labelled 255 are left out."""
    cells = torch.where(labels == data.IGNORE, num_classes**2, labels.long() * num_classes + prediction).flatten()
    counts = cells.new_zeros(num_classes**2 + 1)
    counts.scatter_add_(0, cells, torch.ones_like(cells))  # bincount and a mask would wait for the device
    return counts[:-1].view(num_classes, num_classes)


class Metrics(NamedTuple):
    """Per class (K,): IoU, accuracy and labelled pixels; over all: pixel accuracy and the two class means."""
    iou: np.ndarray
    accuracy: np.ndarray
    pixels: np.ndarray
    all_accuracy: float
    mean_iou: float
    mean_accuracy: float


def metrics(confusion: Tensor, without: Sequence[int] = ()) -> Metrics:
    """Metrics of a confusion matrix (K, K) summed over the data set, fractions in 0 ... 1, float64.

    A class in neither labels nor predictions has the IoU NaN and is left out of the mean. So are the classes `without`
    in the last three numbers, but their pixels still lower the IoU of a class that is predicted there.
    """
    hits, labelled, predicted = confusion.diagonal().double(), confusion.sum(1), confusion.sum(0)
    iou, accuracy = hits / (labelled + predicted - hits), hits / labelled  # 0 / 0 is NaN: wanted
    kept = [k not in without for k in range(len(confusion))]
    means = hits[kept].sum() / labelled[kept].sum(), iou[kept].nanmean(), accuracy[kept].nanmean()
    return Metrics(iou.numpy(), accuracy.numpy(), labelled.numpy(), *(mean.item() for mean in means))


def evaluate(model: nn.Module, dataset: data.SegmentationDataset, *, multi_scale: bool = False,
             device: torch.device | str = "cpu", limit: int | None = None, progress: bool = True,
             window_batch: int | None = None, amp: torch.dtype | None = None, save: Save | None = None,
             fast: bool = True) -> Tensor:
    """Confusion matrix int64 (K, K), summed over the first `limit` images of the data set and over all processes.

    Process r takes the images r, r + world, ... and calls `save` for each; none is counted twice. `fast` switches the
    fast text on: the same numbers to rounding. The model goes back into training mode if it was in it. The result is on
    the host; no picture waits for the device but those that `save` gets and, each five seconds, one for the progress.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, labels, shown = range(len(dataset))[:limit][rank::world], deque(), -math.inf

    def images() -> Iterator[np.ndarray]:
        for index in mine:
            labels.append(to_device(dataset.labels(index), device))  # in the thread that reads images
            yield dataset.image(index)

    total = torch.zeros(len(dataset.info.classes), len(dataset.info.classes), dtype=torch.int64, device=device)
    bar = tqdm(mine, desc="evaluating", unit="image", dynamic_ncols=True,
               disable=None if progress and rank == 0 else True)  # None: silent only where stderr is no terminal
    if fast:
        keep_freed_memory()
    precision = torch.autocast(torch.device(device).type, amp, enabled=amp is not None)
    with common.eval_mode(model), inference(model, fast), precision:
        results = predictions(model, images(), multi_scale=multi_scale, device=device, window_batch=window_batch)
        for index, prediction in zip(bar, results, strict=True):
            total += confusion_matrix(prediction, labels.popleft(), len(total))
            if not bar.disable and (index == mine[-1] or time.monotonic() > shown + 5):
                bar.set_postfix(mIoU=tables.in_percent(metrics(total.cpu()).mean_iou), refresh=False)  # waits
                shown = time.monotonic()
            if save:
                save(index, prediction.cpu().numpy())
    total = total.cpu()  # gloo, not NCCL, adds it up
    if world > 1:
        try:
            dist.all_reduce(total)
        except RuntimeError as error:  # of gloo: a neighbour is gone
            raise UserError(f"another process has ended, and has said why ({common.reason(error)})") from None
    return total


def class_order(ours: Sequence[str], theirs: Sequence[str]) -> list[int] | None:
    """The index in `ours` of each of their names, whatever the case and blanks around them; None for other names."""
    for key in (str, lambda name: name.strip().casefold()):
        index = {key(name): k for k, name in enumerate(ours)}
        if len(index) == len(ours) == len(theirs) and index.keys() == set(map(key, theirs)):
            return [index[key(name)] for name in theirs]
    return None


def match_classes(model: nn.Module, info: data.DatasetInfo, theirs: Sequence[str] | None) -> dict:
    """Have the model give its scores in the data set's order of the classes; a line says so if it is another order.

    `theirs` are the checkpoint's names, None if it tells none. Returns them as "classes", and as "order" the data set's
    index of each. Raises UserError for other classes.
    """
    ours, number, note = list(info.classes), model.config.num_classes, ""
    if len(ours) != number:
        raise UserError(f"{info.name} has {len(ours)} classes, the checkpoint {number}: {REMEDY}")
    names = list(theirs or data.context_info().classes)  # the released checkpoints are for these
    order = class_order(ours, names)
    if theirs and order is None:
        only, lacks = (sorted(set(a).difference(b))[:3] for a, b in ((ours, names), (names, ours)))
        raise UserError(f"{info.name} has {only} where the checkpoint has {lacks}: {REMEDY}")
    if order is None:
        names, order, note = ours, list(range(number)), f"the checkpoint names no classes: {info.name}'s are taken"
    elif names != ours:
        places = np.argsort(order)  # an index would be copied to the device, and waited for, with every batch
        model.register_forward_hook(lambda _, images, scores: torch.stack([scores[:, k] for k in places], 1))
        note = f"{info.name} has the checkpoint's classes in another order or case: they are matched by name"
    if note and os.environ.get("RANK", "0") == "0":
        print(note)
    return {"classes": names, "order": order}


def load_with_data(checkpoint: Path, root: str | None, split: str) -> tuple[data.SegmentationDataset, nn.Module, dict]:
    """A data set (None: the run's, a released model's Pascal Context), the model for its classes, facts. UserError."""
    content = weights.read_weights(checkpoint)
    model, facts = weights.make_model(content)
    root = root or checkpoints.run_config(checkpoint).get("data") or (content.kind == "released" and data.CONTEXT)
    if not root:
        config = checkpoint.with_name("config.json")
        raise UserError(f"{config} does not tell the data of {checkpoint.name}: name it with --data")
    dataset = data.open_dataset(root, split)
    return dataset, model, facts | match_classes(model, dataset.info, facts.get("classes")) | {"kind": content.kind}


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """How the model is run: the options that evaluate.py, predict.py and report.py share."""
    switch = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument("--device", help="cpu, cuda or mps; default: cuda if there is one")
    parser.add_argument("--window-batch", type=common.positive, metavar="N", help="windows at once; default: what fits")
    parser.add_argument("--amp", action="store_const", const=torch.bfloat16, help="bfloat16 where that is safe")
    parser.add_argument("--tf32", **switch, help="TF32 products on a GPU, as in training and the official runs")
    parser.add_argument("--fast", **switch, help="the fast text beside the plain one: the same numbers to rounding")


def evaluate_checkpoint(options: argparse.Namespace, stdout: TextIO) -> None:
    """Evaluate the checkpoint that the options name; process 0 prints the table and writes the numbers.

    With --table the table alone goes to `stdout`.
    """
    checkpoint = checkpoints.find_checkpoint(options.checkpoint, options.yes, options.data or data.CONTEXT,
                                             options.split)
    dataset, model, facts = load_with_data(checkpoint, options.data, options.split)
    classes, order = facts["classes"], facts["order"]
    for name in set(options.without).difference(classes):
        raise UserError(f"--without {name}: no class has this name; the classes are {', '.join(classes)}")
    save = record.label_writer(options.save_labels, dataset, options.original_ids) if options.save_labels else None
    if options.json:
        common.check_file(options.json, "--json")
    published = None if options.limit else checkpoints.published_score(model.config, dataset, options.ms)
    process = run.join_processes(options.device)
    common.allow_tf32(options.tf32)
    if process.rank == 0:
        path, about = record.place(options, checkpoint), record.provenance(options, checkpoint, dataset, model, process)
        now = {"data_fingerprint": {dataset.split: about["data_fingerprint"]}, "environment": about["environment"]}
        for change in run.changes(checkpoints.run_config(checkpoint), now):
            print(f"note: {change}")
    model.to(process.device)
    start = time.monotonic()
    confusion = evaluate(model, dataset, multi_scale=options.ms, device=process.device, limit=options.limit, save=save,
                         window_batch=options.window_batch, amp=options.amp, fast=options.fast)
    if process.rank > 0:
        return
    seconds = time.monotonic() - start
    about |= {"kind": facts["kind"], "iteration": facts.get("iteration"), "published_mean_iou": published,
              "seconds": seconds, "images_per_second": about["images"] / seconds}
    confusion = confusion[order][:, order]  # the table is in the checkpoint's order, whatever the data set's
    result, rest = metrics(confusion), metrics(confusion, [classes.index(name) for name in options.without])
    print(f"{checkpoint} on {dataset.info.name} {dataset.split}, {about['scales']}")
    if options.table:
        stdout.write(tables.class_table(result, classes, options.table))
    print(tables.summary(result) if options.table else tables.table(result, classes))
    if options.without:
        print(f"{tables.summary(rest)}   without {', '.join(options.without)}")
    if published:
        print(checkpoints.comparison(about, result.mean_iou))
    if path:
        text = tables.to_json(result, classes, rest, options.without, **about)
        common.write_whole(path, lambda file: file.write(f"{text}\n".encode()))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 2 for a user's fault, 130 for Ctrl-C."""
    parser = common.Parser(description="Evaluate a checkpoint: IoU and accuracy per class, aAcc, mIoU, mAcc.",
                           epilog="Share the work out with: torchrun --nproc_per_node=N evaluate.py ...")
    checkpoints.add_checkpoint_options(parser)
    parser.add_argument("--data", metavar="DIR", help="data set folder; default: the one the run was trained on, "
                        f"for a released model {data.CONTEXT}")
    parser.add_argument("--split", default="val", metavar="NAME", help="of the images: those of NAME.txt; default: val")
    parser.add_argument("--ms", action="store_true", help="multi-scale and flip: six scales, each mirrored")
    parser.add_argument("--without", nargs="+", default=[], metavar="CLASS", help="means without these, too")
    parser.add_argument("--limit", type=common.positive, metavar="N", help="only the first N images")
    parser.add_argument("--table", choices=tables.FORMATS, help="print the per-class table so, alone on stdout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there; default: evaluation.json "
                        "(-last, -DATA, -SPLIT, -ms) beside the checkpoint, unless there is a --limit")
    parser.add_argument("--save-labels", type=Path, metavar="DIR", help="write each prediction as a palette PNG")
    parser.add_argument("--original-ids", action="store_true", help="in those, Pascal Context's ids of 459 classes")
    add_device_options(parser)
    options, stdout = parser.parse_args(arguments), sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr if options.table else stdout):
            return common.run(lambda: evaluate_checkpoint(options, stdout))
    finally:
        run.leave_processes()


if __name__ == "__main__":
    sys.exit(main())
