"""Speed and memory, measured side by side: `python benchmark.py [op|loader|evaluate|all] [--json FILE]`.

    op         deformable attention: the native operator against the grid_sample reference
    loader     images per second of each stage of the training pipeline, and what the model asks for
    evaluate   multi-scale + flip: windows in full batches against one window of one view at a time

Read: Table -> markdown, interleaved -> op_table, loader_table, plain_predictions -> evaluate_table -> main.

The candidates take turns and the median of each is printed, so that a busy machine slows all of them alike. Ratios of
one run may be compared; times of two runs only on a quiet machine, and the first line says whether it was one.

Shapes: B batch, Q queries, M heads, D channels of a head, L levels, P points; image (H, W, 3), views (1, 3, h, w).
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import evaluate
from model import SIZES, Segmenter, build_model
from msda_cuda import ms_deform_attn, ms_deform_attn_torch
from msda_cuda.build import BuildError
from msda_cuda.ops import active_path, native

GLOBAL_BATCH = 16  # images of an iteration in the published recipes
Number = int | float

# ---------------------------------------------------------------------------------------------- tables and timing


class Table(NamedTuple):
    """What a benchmark found: rows with the same keys, which name the columns, and sentences below them.

    A column is one of numbers if its first cell is.
    """

    title: str
    rows: list[dict[str, str | Number]]
    notes: list[str]


def figure(value: str | Number) -> str:
    """A cell: texts and whole numbers as they are, other numbers with three significant digits or all before the point.

    12.345 -> 12.3, 0.012345 -> 0.0123, 1234.5 -> 1,234.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int) or not math.isfinite(value) or value == 0:
        return f"{value:,}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def markdown(table: Table) -> str:
    """The table in Markdown, padded so that it also reads well in a terminal; numbers stand to the right."""
    names = list(table.rows[0])
    numeric = [not isinstance(value, str) for value in table.rows[0].values()]
    grid = [names, *([figure(value) for value in row.values()] for row in table.rows)]
    widths = [max(2, *map(len, column)) for column in zip(*grid, strict=True)]
    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)]
    sides = [f"{'>' if right else '<'}{width}" for width, right in zip(widths, numeric, strict=True)]
    lines = [" | ".join(map(format, row, sides)) for row in [names, rule, *grid[1:]]]
    return "\n".join([f"### {table.title}", "", *(f"| {line} |" for line in lines), "", *table.notes])


def machine(device: str) -> str:
    """What the numbers were taken on, and whether it had other work (to be asked before one's own begins)."""
    load, cores = os.getloadavg()[0], os.cpu_count()
    where = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    busy = "under load from other programs: measure again on a quiet machine" if load > 0.3 else "quiet"
    return (f"PyTorch {torch.__version__} on {where}{torch.get_num_threads()} of {cores} CPU cores; "
            f"load average {load:.1f} at the start ({busy})")


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """How long one call takes, until the device has finished."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    """Let the device finish what it was given, so that the clock sees all of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(candidates: dict[str, Callable[[], float]], rounds: int, title: str,
                warm: int = 1) -> dict[str, float]:
    """Median of what each candidate returns, its seconds; they take turns. The first `warm` rounds do not count."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in tqdm(range(warm + rounds), desc=title, unit="round", disable=None, leave=False):
        for name, candidate in candidates.items():
            taken[name].append(candidate())
    return {name: statistics.median(each[warm:]) for name, each in taken.items()}


# ------------------------------------------------------------------------------------------- deformable attention


class OpShape(NamedTuple):
    """A deformable-attention call of the large models at 480 x 480: M heads of D channels, Q queries, P points."""

    name: str
    levels: tuple[tuple[int, int], ...]
    Q: int
    M: int
    D: int = 32
    P: int = 4


PYRAMID = ((60, 60), (30, 30), (15, 15))
OP_SHAPES = (
    OpShape("pixel decoder (Mask2Former large)", PYRAMID[::-1], 4725, 32),
    OpShape("injector (large)", PYRAMID, 900, 16),
    OpShape("extractor (large)", ((30, 30),), 4725, 16),
)


def op_case(shape: OpShape, device: str) -> list[Tensor]:
    """Value, locations and weights, batch 1; as in a trained model, points lie a few pixels from their query."""
    generator = torch.Generator().manual_seed(0)
    S, L = sum(h * w for h, w in shape.levels), len(shape.levels)
    value = torch.randn(1, S, shape.M, shape.D, generator=generator)
    side = shape.Q**0.5
    i = torch.arange(shape.Q)
    centres = torch.stack(((i % side) / side, (i / side).floor() / side), dim=-1)[:, None, None, None]
    offsets = torch.randn(1, shape.Q, shape.M, L, shape.P, 2, generator=generator) * 3
    sizes = torch.tensor([(w, h) for h, w in shape.levels])[:, None]
    weights = torch.rand(1, shape.Q, shape.M, L, shape.P, generator=generator)
    return [x.to(device) for x in (value, centres + offsets / sizes, weights)]


def kept_bytes(function: Callable, shape: OpShape, inputs: list[Tensor]) -> int:
    """Bytes of all storages that autograd keeps between forward and backward."""
    storages = {}

    def note(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        function(inputs[0], shape.levels, *inputs[1:])
    return sum(storage.nbytes() for storage in storages.values())


def op_row(shape: OpShape, device: str, rounds: int) -> dict[str, str | Number]:
    """One line of the table: forward, forward + backward, and what is kept between them."""
    inputs = op_case(shape, device)
    leaves = [x.clone().requires_grad_() for x in inputs]
    cotangent = torch.ones(1, shape.Q, shape.M * shape.D, device=device)
    functions = {"torch": ms_deform_attn_torch, "native": ms_deform_attn}

    def training(function: Callable) -> None:
        torch.autograd.grad(function(leaves[0], shape.levels, *leaves[1:]), leaves, cotangent)

    @torch.no_grad()
    def inference(function: Callable) -> None:
        function(inputs[0], shape.levels, *inputs[1:])

    row: dict[str, str | Number] = {"call": shape.name}
    for title, step in (("forward", inference), ("training", training)):
        turns = {name: lambda f=f, step=step: seconds(lambda: step(f), device) for name, f in functions.items()}
        taken = interleaved(turns, rounds, f"{shape.name}, {title}")
        row |= {f"{title}: {name} ms": 1e3 * each for name, each in taken.items()}
        row[f"{title}: ratio"] = taken["torch"] / taken["native"]
    row |= {f"kept: {name} MB": kept_bytes(f, shape, leaves) / 1e6 for name, f in functions.items()}
    least = 4 * (sum(x.numel() for x in inputs) + cotangent.numel()) / 1e6  # each array once: no kernel can move less
    return row | {"moved at least, MB": least, "GB/s": least / row["forward: native ms"]}


def op_table(options: argparse.Namespace) -> Table:
    """Native operator against the grid_sample reference. Raises BuildError without the operator."""
    if active_path(options.device) != "native":
        raise BuildError(f"there is no native operator for {options.device} to compare: {native().reason}")
    rounds = options.rounds or 7
    rows = [op_row(shape, options.device, rounds) for shape in OP_SHAPES]
    return Table(f"Deformable attention, float32, batch 1, {options.device}, medians of {rounds}", rows, [
        "`training` is forward + backward; `kept` is what autograd holds between them; GB/s is of the native forward.",
    ])


# ------------------------------------------------------------------------------------------------ training loader


STAGES = ("read image", "read labels", "transform")
WHOLE = "loader, in this process"


def loader_table(options: argparse.Namespace) -> Table:
    """Images a second of each stage on one core, of the loader with and without workers, and of a training step.

    In a round every candidate works on the same number of training images; a step counts as often as it would run.
    """
    dataset, batch, workers = data.open_dataset(options.data, "train"), options.batch, options.workers
    window, rounds = options.window or SIZES[options.size].window, options.rounds or 5
    number = max(1, (options.limit or 64) // batch) * batch
    many, step = f"loader, {workers} workers", f"training step on {options.device}"
    work = training_step(options, dataset, window)
    candidates = stages(dataset, window, number) | {
        WHOLE: lambda: loader_seconds(dataset, window, number, batch, 0),
        many: lambda: loader_seconds(dataset, window, number, batch, workers),
        step: lambda: seconds(work, options.device) * number / batch,
    }
    rate = {name: number / each for name, each in interleaved(candidates, rounds, "loader").items()}
    cores = {many: min(workers, os.cpu_count() or 1)}
    rows: list[dict[str, str | Number]] = [
        {"stage": name, "images/s": each, "images/s per core": "" if name == step else each / cores.get(name, 1),
         "ms/image": 1e3 / each} for name, each in rate.items()
    ]
    what = f"{options.head} {options.size}, window {window}, batch {batch}"
    title = f"Training pipeline, {dataset.info.name}, {what}, {number} images a round, medians of {rounds}"
    notes = loader_notes({name: rate[name] for name in STAGES}, rate[WHOLE], max(rate[WHOLE], rate[many]), rate[step])
    return Table(title, rows, notes)


def stages(dataset: data.SegmentationDataset, window: int, number: int) -> dict[str, Callable[[], float]]:
    """Reading and transforming `number` images, one after the other, each timed as `interleaved` asks."""
    indices = [i % len(dataset) for i in range(number)]
    pairs = [(dataset.image(i), dataset.labels(i)) for i in indices]

    def transform() -> None:
        for position, (image, labels) in enumerate(pairs):
            data.train_transform(image, labels, window, np.random.default_rng((0, position)))

    works = (lambda: [dataset.image(i) for i in indices], lambda: [dataset.labels(i) for i in indices], transform)
    return {stage: lambda work=work: on_one_core(work) for stage, work in zip(STAGES, works, strict=True)}


def on_one_core(work: Callable[[], object]) -> float:
    """Seconds for the work with one thread, as in a worker of the loader."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return seconds(work)
    finally:
        torch.set_num_threads(threads)


def loader_seconds(dataset: data.SegmentationDataset, window: int, number: int, batch: int, workers: int) -> float:
    """Seconds for `number` images once the workers have started and their first batches are used up.

    The stream has no end, so the workers are as busy at the last batch as at the first: the steady rate.
    """
    positions = data.positions(0, 0, 1, batch, 1)
    with closing(data.training_loader(dataset, window, seed=0, positions=positions, workers=workers)) as stream:
        for _ in range(1 + 2 * workers):  # a worker prepares two batches ahead
            next(stream)
        return on_one_core(lambda: [next(stream) for _ in range(number // batch)])


def training_step(options: argparse.Namespace, dataset: data.SegmentationDataset, window: int) -> Callable[[], None]:
    """One iteration of a fresh model on a batch that is at hand: normalise, forward, backward, optimiser."""
    if options.head == "upernet" and options.batch == 1:
        raise ValueError("a training step of UperNet needs 2 images for its batch norm: use --batch 2")
    torch.manual_seed(0)
    model = build_model(options.head, options.size, len(dataset.info.classes), window=window).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    positions = data.positions(0, 0, 1, options.batch, 1)
    with closing(data.training_loader(dataset, window, seed=0, positions=positions, workers=0)) as stream:
        batch = next(stream)

    def step() -> None:
        optimizer.zero_grad()
        images = data.normalize(batch.images.to(options.device), batch.extents)
        model(images, batch.labels.to(options.device).long())["loss"].backward()
        optimizer.step()

    return step


def loader_notes(stage_rates: dict[str, float], whole: float, best: float, need: float) -> list[str]:
    """The slowest stage, who waits for whom, and the cores that another device would need.

    All are images/s: `stage_rates` and `whole` on one core, `best` of the loader with workers, `need` of the model.
    """
    slowest = min(stage_rates, key=stage_rates.__getitem__)
    waits = "the model waits for the loader" if best < need else "the loader is ahead of the model"
    return [
        f"Bottleneck of the pipeline: **{slowest}**, {whole / stage_rates[slowest]:.0%} of an image's time on a core.",
        f"The loader gives {figure(best)} images/s, the training step takes {figure(need)}: {waits}.",
        f"A device that needs X s for an iteration of {GLOBAL_BATCH} takes {GLOBAL_BATCH}/X images/s, which are "
        f"{GLOBAL_BATCH}/(X * {figure(whole)}) = {figure(cores_needed(1, whole))}/X cores of this kind.",
    ]


def cores_needed(iteration: float, per_core: float, images: int = GLOBAL_BATCH) -> float:
    """Cores that keep up with iterations of so many seconds, at `per_core` images/s each; a fraction, not rounded."""
    return images / iteration / per_core


# ---------------------------------------------------------------------------------- multi-scale + flip evaluation


@torch.no_grad()
def plain_predictions(model: Segmenter, images: Iterable[np.ndarray], device: str = "cpu") -> list[Tensor]:
    """Class indices (H, W) of each image (H, W, 3), by the definition: all 12 views, one window at a time."""
    return [sum(plain_views(model, image, device)).argmax(dim=0) for image in images]


def plain_views(model: Segmenter, image: np.ndarray, device: str) -> Iterator[Tensor]:
    """The probabilities (K, H, W) that each of the 12 views gives the picture."""
    for picture in data.multi_scale_images(image, model.config.window):
        view = data.normalize(torch.from_numpy(picture).to(device).permute(2, 0, 1)[None])  # (1, 3, h, w)
        for flip in (False, True):
            scores = plain_slide(model, view.flip(-1) if flip else view)
            probabilities = F.interpolate(scores, image.shape[:2], mode="bilinear", align_corners=False).softmax(1)[0]
            yield probabilities.flip(-1) if flip else probabilities


def plain_slide(model: Segmenter, view: Tensor) -> Tensor:
    """Scores (1, K, h, w): the mean over the windows, which step by 2/3 of their side and end at the border."""
    window, (height, width) = model.config.window, view.shape[2:]
    stride = window * 2 // 3
    total = view.new_zeros(1, model.config.num_classes, height, width)
    count = view.new_zeros(height, width)
    for bottom in (min(y, height) for y in range(window, height + stride, stride)):
        for right in (min(x, width) for x in range(window, width + stride, stride)):
            here = (..., slice(bottom - window, bottom), slice(right - window, right))
            total[here] += model(view[here])
            count[here] += 1
    return total / count


def evaluate_table(options: argparse.Namespace) -> Table:
    """evaluate.predictions against the plain loop, on the same images and a model with starting weights."""
    dataset, device, rounds = data.open_dataset(options.data, "val"), options.device, options.rounds or 3
    images = [dataset.image(i) for i in range(min(len(dataset), options.limit or 8))]
    changes = {"window": options.window} if options.window else {}
    torch.manual_seed(0)
    model = build_model(options.head, options.size, len(dataset.info.classes), **changes).to(device).eval()
    window_batch = evaluate.automatic_window_batch(model, device)
    warm_up(model, {1, window_batch}, device)
    ways: dict[str, Callable[[], Iterable[Tensor]]] = {
        "one window at a time": lambda: plain_predictions(model, images, device),
        f"evaluate.py, {window_batch} at a time": lambda: evaluate.predictions(
            model, images, multi_scale=True, device=device, window_batch=window_batch
        ),
    }
    found: dict[str, list[Tensor]] = {}
    windows: dict[str, int] = {}
    batches: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))

    def turn(name: str) -> float:
        batches.clear()
        taken = seconds(lambda: found.update({name: list(ways[name]())}), device)
        windows[name] = sum(batches)
        return taken

    taken = interleaved({name: lambda name=name: turn(name) for name in ways}, rounds, "evaluate", warm=0)
    rows: list[dict[str, str | Number]] = [
        {"way": name, "windows": windows[name], "s/image": each / len(images), "images/s": len(images) / each,
         "ms/window": 1e3 * each / windows[name]} for name, each in taken.items()
    ]
    what = f"{options.head} {options.size}, window {model.config.window}"
    title = f"Multi-scale + flip, {what}, {len(images)} images of {dataset.info.name}, {device}, medians of {rounds}"
    return Table(title, rows, evaluate_notes(rows, *found.values()))


def warm_up(model: Segmenter, batches: Iterable[int], device: str) -> None:
    """One call for each number of windows: what a first call prepares is no candidate's cost."""
    side = model.config.window
    with torch.no_grad():
        for number in batches:
            model(torch.zeros(number, 3, side, side, device=device))


def evaluate_notes(rows: Sequence[dict], plain: Sequence[Tensor], batched: Sequence[Tensor]) -> list[str]:
    """How many times faster, how much of that is fewer windows, and how many pixels the two predict differently."""
    ratio = {key: rows[0][key] / rows[1][key] for key in ("s/image", "windows", "ms/window")}
    differing = sum(int((a != b).sum()) for a, b in zip(plain, batched, strict=True))
    pixels = sum(a.numel() for a in plain)
    classes = len(torch.cat([a.flatten() for a in plain]).unique())  # of one class alone, equality would mean nothing
    return [
        f"evaluate.py is **{ratio['s/image']:.2f} times** as fast: {ratio['windows']:.2f} by computing equal views "
        f"once, {ratio['ms/window']:.2f} by the time of a window.",
        f"The predictions differ in {differing:,} of {pixels:,} pixels; {classes} classes occur in them.",
    ]


# ------------------------------------------------------------------------------------------------ the command line

TABLES: dict[str, Callable[[argparse.Namespace], Table]] = {
    "op": op_table, "loader": loader_table, "evaluate": evaluate_table,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("Read:")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", default="all", choices=[*TABLES, "all"], help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda if there is one")
    parser.add_argument("--rounds", type=evaluate.positive, metavar="N",
                        help="timed rounds; default: 7 of op, 5 of loader, 3 of evaluate")
    model = parser.add_argument_group("loader and evaluate")
    model.add_argument("--data", default="toy", metavar="DIR", help="data set folder; default: the toy data")
    model.add_argument("--limit", type=evaluate.positive, metavar="N",
                       help="images a round; default: 64 of loader, 8 of evaluate")
    model.add_argument("--head", default="mask2former", choices=("mask2former", "upernet"), help="default: mask2former")
    model.add_argument("--size", default="tiny", choices=SIZES, help="of the untrained model; default: tiny")
    model.add_argument("--window", type=evaluate.positive, metavar="PIXELS", help="default: that of the size")
    loader = parser.add_argument_group("loader")
    loader.add_argument("--batch", type=evaluate.positive, default=2, metavar="N", help="images at once; default: 2")
    loader.add_argument("--workers", type=evaluate.positive, default=os.cpu_count() or 1, metavar="N",
                        help="default: one for each core")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """What the command line asks for: tables on stdout as they are done, then the JSON file."""
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    where, found = machine(options.device), {}
    print(where)
    for name in TABLES if options.table == "all" else [options.table]:
        try:
            found[name] = TABLES[name](options)
        except BuildError as error:
            if options.table != "all":
                raise
            print(f"left out {name}: {error}", file=sys.stderr)
            continue
        print(f"\n{markdown(found[name])}", flush=True)
    if options.json:
        tables = {name: table._asdict() for name, table in found.items()}
        options.json.write_text(json.dumps({"machine": where, **tables}, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parse(arguments)
    try:
        run(options)
    except (BuildError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
