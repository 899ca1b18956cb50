"""Speed and memory, measured side by side: `python benchmark.py [TABLE] [--systems NAME,...] [--json FILE]`.

    systems    forward, training step, pictures: time, share of the matmul rate, memory, waits, and where the time goes
    losses     matching and losses of Mask2Former: time and dispatches, by number of images
    growth     how time grows with the batch, the window and the classes, against the arithmetic
    compile    torch.compile: graph breaks, the time to compile, and with and without it
    op         deformable attention: the native operator against the grid_sample reference
    loader     images per second of each stage of the training pipeline, and what the model asks for
    evaluate   multi-scale + flip: windows in full batches against one window of one view at a time
    all        what is quick: every table but compile, of tiny models

Read: Table -> markdown, interleaved -> Subject, systems_tables -> losses_table -> growth_table -> compile_table ->
op_table, loader_table, plain_predictions -> evaluate_table -> main.

The candidates take turns and the median of each is printed, so that a busy machine slows all of them alike. Ratios of
one run may be compared; times of two runs only on a quiet machine, and the first line says whether it was one.

Shapes: B batch, Q queries, M heads, D channels of a head, L levels, P points; image (H, W, 3), views (1, 3, h, w).
"""

import argparse
import gc
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from fast.memory import keep_freed_memory
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

import common
import data
import evaluate
import heads
from measure import (
    Dispatches,
    forward_flops,
    kept_for_backward,
    matmul_rate,
    model_kept,
    model_waits,
    module_times,
    peak_of,
    places,
    seconds,
    training_flops,
)
from model import SIZES, ModelConfig, Segmenter, build_model
from msda_cuda import ms_deform_attn, ms_deform_attn_torch
from msda_cuda.build import BuildError
from msda_cuda.ops import active_path, native
from peers import build_peer

GLOBAL_BATCH = 16  # images of an iteration in the published recipes
Number = int | float
Row = dict[str, str | Number]

# ---------------------------------------------------------------------------------------------- tables and timing


class Table(NamedTuple):
    """What a benchmark found: rows with the same keys, which name the columns, and sentences below them.

    A column is one of numbers if any cell is; "" stands for none.
    """

    title: str
    rows: list[Row]
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
    numeric = [any(not isinstance(row[name], str) for row in table.rows) for name in names]
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


def interleaved(candidates: dict[str, Callable[[], float]], rounds: int, title: str,
                warm: int = 1) -> dict[str, float]:
    """Median of what each candidate returns, its seconds; they take turns. The first `warm` rounds do not count."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in tqdm(range(warm + rounds), desc=title, unit="round", disable=None, leave=False):
        for name, candidate in candidates.items():
            taken[name].append(candidate())
    return {name: statistics.median(each[warm:]) for name, each in taken.items()}


# --------------------------------------------------------------------------------------------------- whole models

# GFLOP of a forward pass and of a training step, for one image of 480 x 480, as the official code does them: they stay
# the denominators where algebra saves some of it, so that 100 % can be passed. For tiny models: what ours does.
OFFICIAL = {"mask2former-base": (356, 1084), "mask2former-large": (1905, 5746), "upernet-large": (2284, 6884)}
TINY = ("mask2former-tiny", "upernet-tiny")
PRESENT = 8  # classes in a crop
PICTURE = (375, 500)  # (H, W) of a typical picture for a window of 480, in proportion for others
Turn = Callable[[], object]


def chosen(options: argparse.Namespace, default: Sequence[str] = TINY) -> Sequence[str]:
    """The systems that the command line names, or the table's own; the tiny ones where all tables are asked for."""
    return options.systems or (TINY if options.table == "all" else default)


def config_of(system: str, **changes) -> ModelConfig:
    """The configuration of HEAD-SIZE, for 59 classes. Raises ValueError for a name that does not exist."""
    head, _, size = system.partition("-")
    if size not in SIZES or head not in ("mask2former", "upernet"):
        raise ValueError(f"--systems: {system!r} does not exist; join mask2former or upernet and one of "
                         f"{', '.join(SIZES)} with a dash, as in {TINY[0]}")
    return replace(SIZES[size], head=head, **changes)


def accept_single_values(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
    """Batch norm refuses to train on one value a channel, what UperNet's coarsest pooling makes of one image. It, and
    no other, then takes its running statistics."""
    norm.training = norm.training and inputs[0].numel() > norm.num_features


def updater(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], None]:
    """A training step on images and labels: forward, losses, backward, optimiser."""
    def update(images: Tensor, labels: Tensor) -> None:
        model(images, labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()  # here rather than before: who waits for a turn holds no gradients

    return update


class Subject:
    """A model to be measured, with noise for images and classes in squares; methods are what one does with it."""

    def __init__(self, build: Callable[..., nn.Module], system: str, batch: int, device: str, **changes):
        self.config, self.device = config_of(system, **changes), device
        torch.manual_seed(0)
        self.model = build(*system.split("-"), **{"num_classes": self.config.num_classes, **changes}).to(device)
        self.model.config = self.config  # evaluate.py asks for its window, also a peer
        for norm in self.model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.register_forward_pre_hook(accept_single_values)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.update = updater(self.model, self.optimizer)
        window, classes = self.config.window, min(PRESENT, self.config.num_classes)
        self.images = torch.randn(batch, 3, window, window).to(device)
        self.labels = F.interpolate(torch.randint(classes, (batch, 1, 8, 8)).float(), window)[:, 0].long().to(device)
        size = [side * window // 480 for side in PICTURE]
        self.picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)

    @torch.no_grad()
    def forward(self, number: int | None = None) -> Tensor:
        return self.model.eval()(self.images[:number])

    def train(self) -> None:
        self.model.train()
        self.update(self.images, self.labels)

    def segment(self, multi_scale: bool) -> list[Tensor]:
        return list(evaluate.predictions(self.model.eval(), [self.picture], multi_scale=multi_scale,
                                         device=self.device))

    def works(self, pictures: bool) -> dict[str, Turn]:
        """What is measured, by name; the training step first, for it leaves nothing that others would keep."""
        found = {f"training step, batch {len(self.images)}": self.train, "forward, batch 1": partial(self.forward, 1)}
        if pictures:
            found |= {"picture, single-scale": partial(self.segment, False),
                      "picture, multi-scale + flip": partial(self.segment, True)}
        return found

    def fits_beside(self, kept: float) -> bool:
        """Whether a training step has room with a model of the same size there too; `kept` as ours for backward."""
        if self.device == "cuda":
            return True
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        numbers = sum(p.numel() for p in self.model.parameters())
        least = 4 * numbers * (2 * 3 + 1) + 2 * kept  # both with two moments, one with gradients
        return least < 0.8 * memory  # what lives for a moment comes on top: 21 GB were seen where `least` is 17.8


def systems_tables(options: argparse.Namespace) -> list[Table]:
    """What each model costs, and where its time goes; one after the other, for two large ones fill the memory."""
    rows, split = [], []
    for system in chosen(options, (*OFFICIAL, *TINY)):
        for row, parts in measured(system, options):
            rows.append(row)
            split.append({"system": system, "work": row["work"], **parts})
        gc.collect()
    names = [name for name in PARTS if any(name in parts for parts in split)]
    split = [{name: parts.get(name, "") for name in names} for parts in split]
    where = f"{options.device}, float32"
    return [Table(f"Systems, {where}, medians of {options.rounds or ROUNDS} rounds", rows, SYSTEMS_NOTES),
            Table(f"Milliseconds by part, {where}, one call", split, SPLIT_NOTES)]


ROUNDS = 5
PARTS = ("system", "work", "backbone", "adapter", "pixel decoder", "decoder", "scores", "matching", "losses",
         "optimiser", "other")
SYSTEMS_NOTES = [
    "The matmul rate, of (4725, 1024) @ (1024, 4096), is taken right before and after a row; % is of their mean. GFLOP "
    "of base and large are the official code's, of tiny ours; a picture counts its windows.",
    "`kept`: for the backward pass, without parameters, a crop; in bfloat16 counted on tensors without data, with a "
    "CPU's kernels. `peak`: of the process, weights and optimiser included.",
    "A training step beside which the other model has no room in the memory is not compared.",
    "`waits`: how often the host would have to wait for a GPU, counted on tensors without data.",
    "A batch norm that gets one value a channel (UperNet's coarsest pooling at batch 1) uses its running statistics.",
]
SPLIT_NOTES = ["Forward and backward together. `other`: resizing the scores, summing the losses; of a picture reading, "
               "cutting and voting."]


def measured(system: str, options: argparse.Namespace) -> Iterator[tuple[Row, Row]]:
    """For each work the row of the first table and that of the second."""
    batch, pictures = 1 if system.endswith("large") else 2, options.full or system.endswith("tiny")
    ours = Subject(build_model, system, batch, options.device)
    works = ours.works(pictures)
    alone = {work: measured_alone(ours, work, turn) for work, turn in works.items()}  # while no peer fills the memory
    subjects, other = {"s": ours}, f"{options.against} s"
    for index, work in enumerate(works):
        facts, parts, windows, flop = alone[work]
        fits = index > 0 or ours.fits_beside(1e6 * batch * facts["kept MB"])
        if options.against and fits and other not in subjects:
            subjects[other] = Subject(build_peer, system, batch, options.device)
        turns = {name: each.works(pictures)[work] for name, each in subjects.items()}
        taken, before, after = rated(turns, options, f"{system}, {work}")
        for subject in subjects.values():
            subject.optimizer.zero_grad()
            subject.optimizer.state.clear()  # only training needs it
        row: Row = {"system": system, "work": work, "s": taken["s"]}
        if options.against:
            row |= {other: taken.get(other, ""), "ratio": taken[other] / taken["s"] if fits else ""}
        gflop = windows * OFFICIAL[system][index == 0] if system in OFFICIAL else flop / 1e9
        row |= {"GFLOP": gflop, "% of matmul": 100 * 2 * gflop / taken["s"] / (before + after),
                "GFLOP/s before": before, "after": after,
                "valid": "rate moved" if max(before, after) > 1.1 * min(before, after) else ""}
        yield row | facts, parts


def rated(turns: dict[str, Turn], options: argparse.Namespace, title: str) -> tuple[dict[str, float], float, float]:
    """Median seconds of each candidate, and the matmul rate in GFLOP/s before and after them."""
    before = matmul_rate(options.device, torch.float32, 7) / 1e9
    timed = {name: partial(seconds, turn, options.device) for name, turn in turns.items()}
    taken = interleaved(timed, options.rounds or ROUNDS, title)
    return taken, before, matmul_rate(options.device, torch.float32, 7) / 1e9


def measured_alone(subject: Subject, work: str, turn: Turn) -> tuple[Row, Row, int, int]:
    """One call after a first one: memory and waits; milliseconds by part; windows and FLOP that it takes."""
    model, config, training = subject.model, subject.config, turn == subject.train
    windows: list[int] = []
    counting = model.register_forward_pre_hook(lambda _, inputs: windows.append(len(inputs[0])))
    turn()
    counting.remove()
    parts: dict[str, float] = {}
    peak = peak_of(lambda: parts.update(
        module_times(model, turn, places(model, subject.optimizer), subject.device)), subject.device)
    facts: Row = {"kept MB": "", "bf16 MB": "", "peak GB": peak, "waits": ""}
    if training:
        subject.optimizer.state.clear()  # no part of a forward pass's peak
        facts["kept MB"] = kept_for_backward(lambda: model(subject.images, subject.labels), model) / 1e6 / windows[0]
        facts["bf16 MB"] = model_kept(config, 2, torch.bfloat16) / 1e6 / 2  # two, for batch norm refuses one
    if not work.startswith("picture"):
        facts["waits"] = model_waits(config, 2, training).waits.total()
    flop = training_flops(config) if training else forward_flops(config)
    return facts, {name: 1e3 * each for name, each in parts.items()}, sum(windows), sum(windows) * flop


# ------------------------------------------------------------------------------------------------- losses and growth


def losses_table(options: argparse.Namespace) -> list[Table]:
    """Matching and losses alone, for what an untrained model predicts; their dispatches should not grow with images."""
    rows = [losses_row(system, images, options) for system in chosen(options, TINY[:1])
            if system.startswith("mask2former") for images in (2, 4)]
    if not rows:
        raise ValueError("--systems names no mask2former, whose matching and losses the table is about")
    return [Table(f"Mask2Former's matching and losses, {options.device}, float32", rows, [
        "Dispatches are ATen operators that do work; views and what else moves nothing stand apart."])]


def losses_row(system: str, images: int, options: argparse.Namespace) -> Row:
    """Milliseconds and dispatches, forward and with backward."""
    subject = Subject(build_model, system, images, options.device)
    with torch.no_grad():
        predicted = subject.model.head(subject.model.features(subject.images), every_layer=True)
    predicted = tree_map(lambda x: x.detach().requires_grad_(), predicted)

    def losses() -> Tensor:
        terms = heads.mask2former_losses(predicted, subject.labels, subject.config.num_points)
        return torch.stack(list(terms.values())).sum()

    with Dispatches() as forward:
        losses()
    with Dispatches() as both:
        losses().backward()
    turns = {"forward": losses, "both": lambda: losses().backward()}
    taken = interleaved({name: partial(seconds, turn, options.device) for name, turn in turns.items()},
                        options.rounds or ROUNDS, f"{system}, losses")
    return {"system": system, "images": images,
            "forward ms": 1e3 * taken["forward"], "dispatches": forward.work.total(), "views": forward.views.total(),
            "with backward ms": 1e3 * taken["both"], "all dispatches": both.work.total(),
            "all views": both.views.total()}


GROWTH = {"batch": (1, 2, 4), "window": (320, 480, 640), "num_classes": (59, 100, 150)}


def growth_table(options: argparse.Namespace) -> list[Table]:
    """How time grows with the batch, the window and the classes, against what the arithmetic does."""
    rows = [row for system in chosen(options, (*TINY, "mask2former-base")) for quantity, values in GROWTH.items()
            for row in growth_rows(system, quantity, values, options)]
    if options.plot:
        common.write_whole(options.plot, lambda file: file.write(growth_plot(rows).encode()))
    return [Table(f"Growth, {options.device}, float32, medians of {options.rounds or ROUNDS} rounds", rows, [
        "`times` is over the first value's seconds; `growth` over what the GFLOP of a forward pass grow by. Window and "
        "classes at batch 1."])]


def growth_rows(system: str, quantity: str, values: Sequence[int], options: argparse.Namespace) -> Iterator[Row]:
    """A row for each value, first of the forward pass, then of the training step."""
    changes = [{} if quantity == "batch" else {quantity: value} for value in values]
    batches = values if quantity == "batch" else [1] * len(values)
    subjects = [Subject(build_model, system, batch, options.device, **change)
                for batch, change in zip(batches, changes, strict=True)]
    flop = [forward_flops(subject.config) * len(subject.images) for subject in subjects]
    for work in ("forward", "train"):
        turns = {str(value): partial(seconds, getattr(subject, work), options.device)
                 for value, subject in zip(values, subjects, strict=True)}
        taken = list(interleaved(turns, options.rounds or ROUNDS, f"{system}, {work}, {quantity}").values())
        for value, each, arithmetic in zip(values, taken, flop, strict=True):
            times, ideal = each / taken[0], arithmetic / flop[0]
            yield {"system": system, "work": work, "quantity": quantity, "value": value, "s": each, "times": times,
                   "GFLOP times": ideal, "growth": times / ideal}


def growth_plot(rows: Sequence[Row]) -> str:
    """The table as SVG: a panel for each quantity, a line for each system and work, dashed the arithmetic's."""
    width, height, left, top = 300, 220, 40, 30
    colours = dict(zip(dict.fromkeys((row["system"], row["work"]) for row in rows), COLOURS, strict=False))
    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    parts = []
    for panel, quantity in enumerate(quantities):
        here = [row for row in rows if row["quantity"] == quantity]
        low, high = (pick(row["value"] for row in here) for pick in (min, max))
        most = max(max(row["times"], row["GFLOP times"]) for row in here)

        def at(row: Row, key: str, panel=panel, low=low, high=high, most=most) -> str:
            x = (row["value"] - low) / (high - low)
            return f"{panel * (width + 2 * left) + left + width * x:.1f},{top + height * (1 - row[key] / most):.1f}"

        x0 = panel * (width + 2 * left) + left
        parts.append(f'<path d="M{x0},{top} v{height} h{width}" stroke="#888" fill="none"/>')
        parts += [text(x0, top - 8, f"time by {quantity.replace('num_', '')}, first = 1; up to {most:.1f}")]
        parts += [text(x0 + width * (v - low) / (high - low) - 8, top + height + 16, v)
                  for v in dict.fromkeys(row["value"] for row in here)]
        for (system, work), colour in colours.items():
            line = [row for row in here if (row["system"], row["work"]) == (system, work)]
            for key, dash in (("times", ""), ("GFLOP times", "4")):
                points = " ".join(at(row, key) for row in line)
                parts.append(f'<polyline points="{points}" stroke="{colour}" stroke-dasharray="{dash}" fill="none"/>')
    parts += [text(left + 380 * (i % 3), top + height + 36 + 16 * (i // 3), f"{system}, {work}", colour)
              for i, ((system, work), colour) in enumerate(colours.items())]
    size = f'width="{len(quantities) * (width + 2 * left)}" height="{height + 80}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">' \
           f'<rect {size} fill="white"/>{"".join(parts)}</svg>\n'


COLOURS = ("#1b6ca8", "#7fb3d9", "#b5541c", "#e3a57a", "#2f7d4f", "#93c9a8", "#6b4a9e", "#b9a3d6", "#777777", "#bbbbbb")


def text(x: float, y: float, what: object, colour: str = "#333") -> str:
    """A line of text at (x, y), as SVG."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{what}</text>'


# ------------------------------------------------------------------------------------------------------ torch.compile


BACKEND = "inductor"


def compile_table(options: argparse.Namespace) -> list[Table]:
    """torch.compile of the model, with its losses outside."""
    rows = [compile_row(Subject(build_model, system, batch, options.device), system, options)
            for system in chosen(options) for batch in (1, 2)]
    return [Table(f"torch.compile, {options.device}, float32, medians of {options.rounds or ROUNDS} rounds", rows, [
        "Evaluation is the forward pass, batch 1; training is the network's forward and backward, batch 2, with the "
        "losses outside."])]


def compile_row(subject: Subject, system: str, options: argparse.Namespace) -> Row:
    """Evaluation of a subject of one image, training of one with more."""
    model, training = subject.model, len(subject.images) > 1
    model.train(training)

    def network(images: Tensor) -> object:
        if not training:
            return model(images)
        features = model.features(images)
        if subject.config.head == "upernet":
            return model.head(features), model.auxiliary_head(features.f16)
        return model.head(features, every_layer=True)

    def turn(function: Callable[[Tensor], object]) -> None:
        with torch.set_grad_enabled(training):
            outputs = tree_leaves(function(subject.images))
            if training:
                torch.autograd.backward([x.sum() for x in outputs])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(network, backend=BACKEND)
    first = seconds(lambda: turn(compiled), options.device)
    turns = {name: partial(seconds, partial(turn, f), options.device) for name, f in
             (("eager", network), ("compiled", compiled))}
    taken = interleaved(turns, options.rounds or ROUNDS, f"{system}, compile")
    counters = torch._dynamo.utils.counters
    return {"system": system, "mode": "training" if training else "evaluation", "eager ms": 1e3 * taken["eager"],
            "compiled ms": 1e3 * taken["compiled"], "ratio": taken["eager"] / taken["compiled"],
            "compile s": first - taken["compiled"], "graphs": counters["stats"]["unique_graphs"],
            "graph breaks": counters["graph_break"].total()}




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


def op_row(shape: OpShape, device: str, rounds: int) -> Row:
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

    row: Row = {"call": shape.name}
    for title, step in (("forward", inference), ("training", training)):
        turns = {name: lambda f=f, step=step: seconds(lambda: step(f), device) for name, f in functions.items()}
        taken = interleaved(turns, rounds, f"{shape.name}, {title}")
        row |= {f"{title}: {name} ms": 1e3 * each for name, each in taken.items()}
        row[f"{title}: ratio"] = taken["torch"] / taken["native"]
    for name, function in functions.items():
        kept = kept_for_backward(partial(function, leaves[0], shape.levels, *leaves[1:]))
        row[f"kept: {name} MB"] = kept / 1e6
    least = 4 * (sum(x.numel() for x in inputs) + cotangent.numel()) / 1e6  # each array once: no kernel can move less
    return row | {"moved at least, MB": least, "GB/s": least / row["forward: native ms"]}


def op_table(options: argparse.Namespace) -> list[Table]:
    """Native operator against the grid_sample reference. Raises BuildError without the operator."""
    if active_path(options.device) != "native":
        raise BuildError(f"there is no native operator for {options.device} to compare: {native().reason}")
    rounds = options.rounds or 7
    rows = [op_row(shape, options.device, rounds) for shape in OP_SHAPES]
    return [Table(f"Deformable attention, float32, batch 1, {options.device}, medians of {rounds}", rows, [
        "`training` is forward + backward; `kept` is what autograd holds between them; GB/s is of the native forward.",
    ])]


# ------------------------------------------------------------------------------------------------ training loader


STAGES = ("read image", "read labels", "transform")
WHOLE = "loader, in this process"


def loader_table(options: argparse.Namespace) -> list[Table]:
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
    rows: list[Row] = [
        {"stage": name, "images/s": each, "images/s per core": "" if name == step else each / cores.get(name, 1),
         "ms/image": 1e3 / each} for name, each in rate.items()
    ]
    what = f"{options.head} {options.size}, window {window}, batch {batch}"
    title = f"Training pipeline, {dataset.info.name}, {what}, {number} images a round, medians of {rounds}"
    notes = loader_notes({name: rate[name] for name in STAGES}, rate[WHOLE], max(rate[WHOLE], rate[many]), rate[step])
    return [Table(title, rows, notes)]


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
    update = updater(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
    positions = data.positions(0, 0, 1, options.batch, 1)
    with closing(data.training_loader(dataset, window, seed=0, positions=positions, workers=0)) as stream:
        batch = next(stream)

    def step() -> None:
        images = data.normalize(batch.images.to(options.device), batch.extents)
        update(images, batch.labels.to(options.device).long())

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


def evaluate_table(options: argparse.Namespace) -> list[Table]:
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
    rows: list[Row] = [
        {"way": name, "windows": windows[name], "s/image": each / len(images), "images/s": len(images) / each,
         "ms/window": 1e3 * each / windows[name]} for name, each in taken.items()
    ]
    what = f"{options.head} {options.size}, window {model.config.window}"
    title = f"Multi-scale + flip, {what}, {len(images)} images of {dataset.info.name}, {device}, medians of {rounds}"
    return [Table(title, rows, evaluate_notes(rows, *found.values()))]


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

TABLES: dict[str, Callable[[argparse.Namespace], list[Table]]] = {
    "systems": systems_tables, "losses": losses_table, "growth": growth_table, "compile": compile_table,
    "op": op_table, "loader": loader_table, "evaluate": evaluate_table,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = common.Parser(prog="benchmark.py", description=(__doc__ or "").split("Read:")[0],
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", default="all", choices=[*TABLES, "all"], help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there, after every table")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda if there is one")
    parser.add_argument("--rounds", type=common.positive, metavar="N",
                        help="timed rounds; default: 7 of op, 3 of evaluate, else 5")
    whole = parser.add_argument_group("systems, losses, growth and compile")
    whole.add_argument("--systems", type=lambda names: names.split(","), metavar="NAME,...",
                       help="HEAD-SIZE, as mask2former-base; default: the three released ones and tiny for systems, "
                            "tiny and mask2former-base for growth, else tiny")
    whole.add_argument("--against", choices=["transformers"], help="systems: also its BEiT with the same head")
    whole.add_argument("--full", action="store_true", help="systems: pictures also of base and large models")
    whole.add_argument("--plot", type=Path, metavar="FILE", help="growth: also draw it there, as SVG")
    model = parser.add_argument_group("loader and evaluate")
    model.add_argument("--data", default="toy", metavar="DIR", help="data set folder; default: the toy data")
    model.add_argument("--limit", type=common.positive, metavar="N",
                       help="images a round; default: 64 of loader, 8 of evaluate")
    model.add_argument("--head", default="mask2former", choices=("mask2former", "upernet"), help="default: mask2former")
    model.add_argument("--size", default="tiny", choices=SIZES, help="of the untrained model; default: tiny")
    model.add_argument("--window", type=common.positive, metavar="PIXELS", help="default: that of the size")
    loader = parser.add_argument_group("loader")
    loader.add_argument("--batch", type=common.positive, default=2, metavar="N", help="images at once; default: 2")
    loader.add_argument("--workers", type=common.positive, default=os.cpu_count() or 1, metavar="N",
                        help="default: one for each core")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """What the command line asks for: tables on stdout as they are done, and into the JSON file."""
    for path, option in ((options.json, "--json"), (options.plot, "--plot")):
        if path:
            common.check_file(path, option)
    for system in options.systems or ():
        config_of(system)
    keep_freed_memory()
    where, found = machine(options.device), {}
    print(where)
    for name in [name for name in TABLES if name != "compile"] if options.table == "all" else [options.table]:
        try:
            found[name] = TABLES[name](options)
        except BuildError as error:
            if options.table != "all":
                raise
            print(f"left out {name}: {error}", file=sys.stderr)
            continue
        print(*(f"\n{markdown(table)}" for table in found[name]), sep="\n", flush=True)
        if options.json:
            tables = {name: [table._asdict() for table in each] for name, each in found.items()}
            written = json.dumps({"machine": where, **tables}, indent=1).encode() + b"\n"
            common.write_whole(options.json, lambda file, written=written: file.write(written))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parse(arguments)

    def work() -> int | None:
        try:
            return run(options)
        except BuildError as error:
            return common.complain(str(error))

    return common.run(work)


if __name__ == "__main__":
    sys.exit(main())
