"""A run, or two beside each other, as one HTML page: self-contained, for a phone as for a desk, light and dark.

    python -m tools.report                    the newest run, its best checkpoint, single-scale
    python -m tools.report camvid --ms        the run runs/camvid, multi-scale with flips
    python -m tools.report first second       two runs on the same images: runs/first/report-vs-second/index.html

Reading order: main -> write_report -> answer -> fill_page, which fills report.html with curves, class_bars,
confusion_table and examples. No script: a note stands below its chart while its mark is pointed at or touched.

Shapes: K classes, N images; labels and predictions are uint8 (H, W), a confusion matrix is int64 (K, K).
"""

import argparse
import base64
import html
import io
import math
import shlex
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import common
import data
import evaluate
from common import UserError
from run import RUNS, read_config, read_log, runs_like
from tools import draw
from tools.tables import Columns, csv_text, in_percent, markdown

SHOWN = 12  # examples in a section, at most
CURVES = (("train", "loss", "training loss", ""), ("validation", "mIoU", "validation mIoU, %", " %"),
          ("validation", "aAcc", "validation pixel accuracy, %", " %"), ("train", "lr", "learning rate", ""))
LEFT, TOP, WIDTH, HEIGHT = 54, 26, 300, 150  # of a curve's axes, in a picture of 360 x 220


class Run(NamedTuple):
    """A run and the answers of its best checkpoint; `scores` and `predictions` are in the data set's order."""
    name: str
    config: dict
    log: list[dict]
    iteration: int
    confusion: np.ndarray  # int64 (K, K)
    result: evaluate.Metrics  # of that matrix
    scores: np.ndarray  # (2, N): image_scores of each image
    predictions: list[bytes]  # N, uint8 (H, W) packed by zlib


def side_by_side(title: str, names: Sequence[str], values: Sequence[Sequence[float]]) -> Columns:
    """The column of a run's fractions, in percent; of two runs both columns and second - first, in points."""
    if len(names) == 1:
        return {title: list(map(in_percent, values[0]))}
    points = (f"{round(100 * (b - a), 1) + 0:+.1f}" for a, b in zip(*values, strict=True))  # + 0: no -0.0
    return {**{f"{title} {name}": list(map(in_percent, each)) for name, each in zip(names, values, strict=True)},
            f"{title} difference": [number.replace("+nan", "-") for number in points]}


def curves(names: Sequence[str], logs: Sequence[Sequence[dict]]) -> str:
    """A chart of each of CURVES, with a line for each run, from the lines of its log.jsonl."""
    last, charts = max((entry["iteration"] for log in logs for entry in log), default=0), []
    for kind, key, title, unit in CURVES:
        lines = [[(entry["iteration"], entry[key] * (100 if unit else 1)) for entry in log
                  if entry.get("kind") == kind and key in entry] for log in logs]
        if any(lines):
            charts.append(curve(names, lines, last, title, unit))
    return f'<div class="columns">{"".join(charts)}</div>' if charts else "<p>The log has no curve yet.</p>"


def curve(names: Sequence[str], lines: Sequence[Sequence[tuple[int, float]]], last: int, title: str,
          unit: str = "") -> str:
    """A chart of lines of (iteration, value) pairs from iteration 0 to `last`; of more than 400, 400 means.

    A strip around each iteration that has a value, when it is pointed at, shows the values in a line below the chart.
    """
    lines = [[stretch.mean(0) for stretch in np.array_split(np.float64(line), max(1, min(len(line), 400))) if len(line)]
             for line in lines]
    marks = ticks(*(pick(0.0, *(y for line in lines for _, y in line)) for pick in (min, max)))
    right, scale, rise = LEFT + WIDTH, WIDTH / max(last, 1), HEIGHT / (marks[-1] - marks[0])  # pixels of a unit
    parts = [f'<svg viewBox="0 0 360 220"><text y="13">{title}</text><text class="note" x="{LEFT}" y="192">0</text>'
             f'<text class="note" x="{right}" y="192" text-anchor="end">{last} iterations</text>']
    parts += [f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/><text class="note" '
              f'x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{mark:.3g}</text>'
              for y, mark in zip(TOP + rise * (marks[-1] - marks), marks, strict=True)]
    for number, line in enumerate(lines):
        points = [(f"{LEFT + scale * x:.1f}", f"{TOP + rise * (marks[-1] - y):.1f}") for x, y in line]
        dots = "".join(f'<circle cx="{x}" cy="{y}" r="{3 if len(line) < 60 else 1}"/>' for x, y in points)
        parts.append(f'<g class="run{number}"><polyline points="{" ".join(map(",".join, points))}"/>{dots}</g>')
    iterations = sorted({x for line in lines for x, _ in line})
    edges = [LEFT - 6, *(LEFT + scale * np.add(iterations[1:], iterations[:-1]) / 2), right + 6]
    for iteration, start, end in zip(iterations, edges[:-1], edges[1:], strict=True):
        values = ", ".join(f"{f'{name} ' if len(lines) > 1 else ''}{y:{'.1f' if unit else '.4g'}}{unit}"
                           for name, line in zip(names, lines, strict=True) for x, y in line if x == iteration)
        note = html.escape(f"iteration {iteration:.0f}: {values}")
        parts.append(f'<g class="strip" tabindex="-1"><rect x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" '
                     f'height="{HEIGHT}"/><text x="0" y="212">{note}</text></g>')
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float) -> np.ndarray:
    """Round numbers, three to six of them, whose first and last enclose low ... high."""
    unit = 10 ** math.floor(math.log10((high - low) / 2 or 1))
    step = next(step for step in (unit, 2 * unit, 5 * unit, 10 * unit) if (high - low) / step <= 5)
    return step * np.arange(math.floor(low / step), max(math.ceil(high / step - 1e-9), 1) + 1)


def class_table(names: Sequence[str], results: Sequence[evaluate.Metrics], info: data.DatasetInfo) -> Columns:
    """Name, IoU, accuracy and share of the pixels of each class; the best first, or the one that gains most in IoU."""
    iou = np.stack([each.iou for each in results])
    order = np.argsort(-np.nan_to_num(iou[-1] - (iou[0] if len(iou) > 1 else 0), nan=-2), kind="stable")  # NaN last
    accuracy = side_by_side("accuracy %", names, [results[0].accuracy[order]]) if len(iou) == 1 else {}
    return {"class": [info.classes[k] for k in order], **side_by_side("IoU %", names, iou[:, order]), **accuracy,
            **side_by_side("pixels %", names[:1], [results[0].pixels[order] / max(results[0].pixels.sum(), 1)])}


def class_bars(columns: Columns, info: data.DatasetInfo) -> str:
    """The table of class_table with the class's colour before its name and a bar below each number."""
    colors = dict(zip(info.classes, info.palette, strict=True))
    rows = ["".join(f"<th>{html.escape(title)}</th>" for title in columns)]
    for name, *cells in zip(*columns.values(), strict=True):
        bars = "".join(f'<td style="--share: {cell.strip("+-") or 0}%">{cell}</td>' for cell in cells)
        rows.append(f'<th><i style="background: #{colors[name].tobytes().hex()}"></i>{html.escape(name)}</th>{bars}')
    return f'<table class="classes"><tr>{"</tr><tr>".join(rows)}</tr></table>'


def confusion_table(confusion: np.ndarray, classes: Sequence[str]) -> str:
    """A cell for each pair of label (row) and prediction (column), the stronger the larger its share of the row."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    heads = [f"<th><span>{html.escape(name)}</span></th>" for name in classes]
    rows = ["<th></th>" + "".join(heads)]
    for head, name, row in zip(heads, classes, shares, strict=True):
        rows.append(head + "".join(
            f'<td tabindex="-1" style="--share: {100 * max(0.04, share**0.6):.0f}%" '
            f'data-note="{html.escape(f"{name} seen as {other}: {in_percent(share)} % of its pixels")}"></td>'
            if share >= 0.0005 else "<td></td>" for other, share in zip(classes, row, strict=True)))
    table = "</tr><tr>".join(rows)
    return f'<div class="noted"><div class="wide"><table class="matrix"><tr>{table}</tr></table></div></div>'


def image_scores(confusion: Tensor) -> tuple[float, float]:
    """Mean IoU over the classes of one image's labels and pixel accuracy; NaN for an image without labels."""
    result = evaluate.metrics(confusion)
    return torch.from_numpy(result.iou[result.pixels > 0]).mean().item(), result.all_accuracy


def choose_examples(scores: np.ndarray) -> dict[str, list[int]]:
    """Sections of the page: title -> indices of images, from their scores in each run, (1, N) or (2, N).

    One run: the lowest third, at most SHOWN, worst first, and as many around the median. Two runs: those whose scores
    differ most. Fewer than 4 images are one section. Images without labels are in none.
    """
    keys = -np.abs(scores[-1] - scores[0]) if len(scores) > 1 else scores[0]
    ranked = [int(i) for i in np.argsort(keys, kind="stable") if not math.isnan(keys[i])]
    if len(ranked) < 4:
        return {f"All images ({len(ranked)})": ranked}
    if len(scores) > 1:
        return {f"Images that differ most ({min(len(ranked), SHOWN)} of {len(ranked)})": ranked[:SHOWN]}
    number = min(len(ranked) // 3, SHOWN)
    middle = (len(ranked) - number) // 2
    return {f"Worst images ({number} of {len(ranked)})": ranked[:number],
            f"Typical images ({number} of {len(ranked)}, around the median)": ranked[middle : middle + number]}


def examples(dataset: data.SegmentationDataset, chosen: Sequence[int], runs: Sequence[Run]) -> Iterator[str]:
    """Each chosen image: its name and scores, then photograph, labels, and of each run prediction and error map."""
    for index in chosen:
        labels = dataset.labels(index)
        pictures = {"image": dataset.image(index), "labels": draw.colorize(labels, dataset.info.palette)}
        for run in runs:
            prediction = np.frombuffer(zlib.decompress(run.predictions[index]), np.uint8).reshape(labels.shape)
            of = f" of {run.name}" if len(runs) > 1 else ""
            pictures[f"prediction{of}"] = draw.colorize(prediction, dataset.info.palette, ignore_index=-1)
            pictures[f"errors{of}"] = draw.error_map(labels, prediction)
        name = html.escape(dataset.names[index])
        row = "".join(f'<figure><img alt="{html.escape(what)} of {name}" src="{embedded(picture)}">'
                      f"<figcaption>{html.escape(what)}</figcaption></figure>" for what, picture in pictures.items())
        scores = " : ".join(in_percent(run.scores[0, index]) for run in runs)
        yield f'<h3>{name} <span class="faint">IoU {scores} %</span></h3><div class="row of{len(pictures)}">{row}</div>'


def embedded(picture: draw.Picture, side: int = 420) -> str:
    """The picture, at most `side` pixels wide and high, as a data URI."""
    picture, file = draw.to_image(picture), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def find(name: str) -> Path:
    """The folder of the run of that name or path, "" for the newest run. Raises UserError if it has no best.pt."""
    for folder in [Path(name), RUNS / name] if name else runs_like("*"):
        if (folder / "best.pt").is_file():
            return folder
    names = ", ".join(folder.name for folder in runs_like("*")) or "none"
    raise UserError(f"no {RUNS / (name or '*') / 'best.pt'} to report on: name a run that has been validated; "
                    f"in {RUNS}/: {names}")


def answer(folder: Path, dataset: data.SegmentationDataset, model: nn.Module, facts: dict,
           options: argparse.Namespace) -> Run:
    """Predict the images of the data set with the model of the run in this folder."""
    device = common.choose_device(options.device)
    scores, predictions = [], []

    def keep(index: int, prediction: np.ndarray) -> None:
        arrays = torch.from_numpy(prediction), torch.from_numpy(dataset.labels(index))
        scores.append(image_scores(evaluate.confusion_matrix(*arrays, len(dataset.info.classes))))
        predictions.append(zlib.compress(prediction, 1))  # some kilobytes: all of a validation fit in memory

    confusion = evaluate.evaluate(model.to(device), dataset, multi_scale=options.ms, device=device, save=keep,
                                  limit=options.limit, window_batch=options.window_batch, amp=options.amp,
                                  fast=options.fast)
    return Run(folder.name, read_config(folder), read_log(folder / "log.jsonl"), facts.get("iteration"),
               confusion.cpu().numpy(), evaluate.metrics(confusion), np.array(scores).T, predictions)


def write_report(folders: Sequence[Path], options: argparse.Namespace) -> Path:
    """Evaluate each run's best checkpoint; write index.html, and its tables beside it. Returns the page's path."""
    if len(folders) > 2 or len({folder.name for folder in folders}) < len(folders):
        raise UserError(f"{', '.join(map(str, folders))}: name one run, or two that have different names")
    path = folders[0] / "-vs-".join(["report", *(folder.name for folder in folders[1:])]) / "index.html"
    common.allow_tf32(options.tf32)
    loaded = [evaluate.load_with_data(folder / "best.pt", options.data, options.split) for folder in folders]
    dataset, other = loaded[0][0], loaded[-1][0]
    if dataset.root.resolve() != other.root.resolve():
        raise UserError(f"{folders[0]} has the data set {dataset.root}, {folders[1]} has {other.root}: name the one to "
                        "compare them on with --data DIR")
    common.check_file(path, "the report")
    runs = [answer(folder, *each, options) for folder, each in zip(folders, loaded, strict=True)]
    names = [run.name for run in runs]
    classes = class_table(names, [run.result for run in runs], dataset.info)
    images = {"image": dataset.names[: len(runs[0].predictions)],
              **side_by_side("IoU %", names, [run.scores[0] for run in runs]),
              **side_by_side("accuracy %", names, [run.scores[1] for run in runs])}
    page = fill_page(dataset, runs, class_bars(classes, dataset.info), options.ms)
    files = {"per_image.csv": csv_text(images), "classes.csv": csv_text(classes), "classes.md": markdown(classes)}
    for name, text in (files | {path.name: page}).items():
        common.write_whole(path.with_name(name), lambda file, text=text: file.write(text.encode()))
    return path


def fill_page(dataset: data.SegmentationDataset, runs: Sequence[Run], bars: str, multi_scale: bool) -> str:
    """report.html with the table of the classes and all that the runs tell; of two runs, the settings that differ."""
    info, two, here = dataset.info, len(runs) > 1, Path(__file__)
    names, scores = [html.escape(run.name) for run in runs], np.stack([run.scores[0] for run in runs])
    about = (f"{info.name}, {scores.shape[1]} images of {dataset.split}, {'multi' if multi_scale else 'single'}-scale, "
             f"iteration {' and '.join(str(run.iteration) for run in runs)}")
    results = (run.result for run in runs)
    means = [(each.mean_iou, each.all_accuracy, each.mean_accuracy) for each in results]
    means = {"mean": ("mIoU", "pixel accuracy", "mean accuracy"), **side_by_side("%", names, means)}
    all_settings = [run.config | run.config.get("model", {}) | run.config.get("environment", {}) for run in runs]
    commands = (shlex.join(map(str, each.get("command", ()))).replace(" --", " \\\n    --") for each in all_settings)
    settings = {name: [each.get(name) for each in all_settings] for each in all_settings for name in each
                if name not in ("model", "environment", "classes", "command")}
    return Template(here.with_name("report.html").read_text()).substitute(
        title=" and ".join(names), about=html.escape(about), style=here.with_name("report.css").read_text(), bars=bars,
        headline="".join(f"<div><b>{' : '.join(numbers[:2])}</b>{title}, %{f' ({numbers[2]})' if two else ''}</div>"
                         for title, *numbers in zip(*means.values(), strict=True)),
        runs="".join(f'<li><i class="run{number}"></i>{name}</li>' for number, name in enumerate(names) if two),
        curves=curves([run.name for run in runs], [run.log for run in runs]),
        confusion="".join(f"<h3>{name if two else ''}</h3>{confusion_table(run.confusion, info.classes)}"
                          for name, run in zip(names, runs, strict=True)),
        legend="".join(f'<li><i style="background: #{rgb.tobytes().hex()}"></i>{html.escape(name)}</li>'
                       for name, rgb in zip(info.classes, info.palette, strict=True)),
        examples="".join(f"<h2>{title}</h2>{''.join(examples(dataset, chosen, runs))}"
                         for title, chosen in choose_examples(scores).items()),
        commands="".join(f"<pre>{html.escape(command) or 'not recorded'}</pre>" for command in commands),
        settings="".join(f"<li><span>{html.escape(name)}</span> {html.escape(' : '.join(map(str, row)))}</li>"
                         for name, row in settings.items() if row != [None] and row != 2 * row[:1]),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = common.Parser(description="Write a run's report, runs/NAME/report/index.html, or that of two runs.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="name or folder; default: the newest; two: compared")
    parser.add_argument("--data", metavar="DIR", help="data set folder; default: the one the run was trained on")
    parser.add_argument("--split", default="val", metavar="NAME", help="of the images: those of NAME.txt; default: val")
    parser.add_argument("--ms", action="store_true", help="multi-scale and flip")
    parser.add_argument("--limit", type=common.positive, metavar="N", help="only the first N images")
    evaluate.add_device_options(parser)
    options = parser.parse_args(arguments)
    return common.run(lambda: print(write_report([find(name) for name in options.runs or [""]], options)))


if __name__ == "__main__":
    sys.exit(main())
