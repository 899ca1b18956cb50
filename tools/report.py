"""A run as one HTML page: runs/NAME/report/index.html, self-contained, for a phone as for a desk, light and dark.

    python -m tools.report                    the newest run, its best checkpoint, single-scale
    python -m tools.report camvid --ms        the run runs/camvid, multi-scale with flips

Reading order: main -> write_report -> fill_page, which fills report.html with curves, class_bars, confusion_picture
and examples. Charts are inline SVG that needs no script; a mark shows its numbers when it is pointed at or touched.

Shapes: K classes; labels and predictions are uint8 (H, W), a confusion matrix is int64 (K, K).
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

import numpy as np
import torch
from torch import Tensor

import common
import data
import evaluate
from common import UserError
from run import RUNS, read_config, read_log, runs_like
from tools import draw

SHOWN = 12  # worst images, and as many typical ones
COLUMNS = ("image", "labels", "prediction", "errors")
FEW = 16  # classes whose bars stand beside the confusion matrix on a wide page
CURVES = (("train", "loss", "training loss", ""), ("validation", "mIoU", "validation mIoU, %", " %"),
          ("validation", "aAcc", "validation pixel accuracy, %", " %"), ("train", "lr", "learning rate", ""))


def curves(log: Sequence[dict]) -> str:
    """A chart of each of CURVES, from the lines of log.jsonl."""
    charts = []
    for kind, key, title, unit in CURVES:
        points = [(line["iteration"], line[key] * (100 if unit else 1)) for line in log
                  if line.get("kind") == kind and key in line]
        if len(points) > 1:
            charts.append(curve(points, title, unit))
    return f'<div class="columns">{"".join(charts)}</div>' if charts else "<p>The log has no curve yet.</p>"


def curve(points: Sequence[tuple[int, float]], title: str, unit: str = "") -> str:
    """A line chart of (iteration, value) pairs; of more than 400, the means of 400 stretches."""
    stretches = np.array_split(np.float64(points), min(len(points), 400))
    x, y = np.array([stretch.mean(0) for stretch in stretches]).T
    left, top, width, height = 48, 26, 300, 150
    marks = ticks(min(0.0, y.min()), y.max())
    columns = left + width * (x - x[0]) / max(x[-1] - x[0], 1)
    rows, lines = (top + height * (marks[-1] - values) / (marks[-1] - marks[0]) for values in (y, marks))
    grid = "".join(
        f'<line class="grid" x1="{left}" x2="{left + width}" y1="{row:.1f}" y2="{row:.1f}"/>'
        f'<text class="note" x="{left - 5}" y="{row + 4:.1f}" text-anchor="end">{tick(value)}</text>'
        for row, value in zip(lines, marks, strict=True)
    )
    path = " ".join(f"{column:.1f},{row:.1f}" for column, row in zip(columns, rows, strict=True))
    dots = "".join(
        f'<circle class="mark" cx="{column:.1f}" cy="{row:.1f}" r="{2.5 if len(x) < 60 else 1}">'
        f"<title>iteration {iteration:.0f}: {value:.4g}{unit}</title></circle>"
        for column, row, iteration, value in zip(columns, rows, x, y, strict=True)
    )
    return (f'<svg viewBox="0 0 360 200"><text x="0" y="13">{title}</text>{grid}'
            f'<polyline class="curve" points="{path}"/>{dots}<text class="note" x="{left}" y="192">{x[0]:.0f}</text>'
            f'<text class="note" x="{left + width}" y="192" text-anchor="end">{x[-1]:.0f} iterations</text></svg>')


def ticks(low: float, high: float) -> np.ndarray:
    """Round numbers, three to six of them, whose first and last enclose low ... high."""
    unit = 10 ** math.floor(math.log10((high - low) / 2 or 1))
    step = next(step for step in (unit, 2 * unit, 5 * unit, 10 * unit) if (high - low) / step <= 5)
    return step * np.arange(math.floor(low / step), max(math.ceil(high / step - 1e-9), 1) + 1)


def tick(value: float) -> str:
    """A number short enough for an axis: 0.25, 2e-4."""
    small = 0 < abs(value) < 0.01
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if small else f"{value:.3g}"


def class_bars(result: evaluate.Metrics, info: data.DatasetInfo) -> str:
    """One bar for each class, its IoU, best first; classes that occur nowhere come last, with a dash."""
    rows = []
    for k in np.argsort(-np.nan_to_num(result.iou, nan=-1), kind="stable"):
        name, iou = info.classes[k], evaluate.in_percent(result.iou[k])
        share = draw.percent(result.pixels[k] / max(result.pixels.sum(), 1))
        length = 190 * np.nan_to_num(result.iou[k])
        rows.append(
            f'<svg viewBox="0 0 360 18"><title>{html.escape(name)}: IoU {iou}, accuracy '
            f"{evaluate.in_percent(result.accuracy[k])}, {share} of pixels</title>"
            f'<rect x="0" y="3" width="11" height="11" fill="#{info.palette[k].tobytes().hex()}"/>'
            f'<text x="17" y="13">{html.escape(name[:16])}</text>'
            f'<rect class="mark" x="118" y="3" width="{length:.1f}" height="11"/>'
            f'<text x="{123 + length:.1f}" y="13">{iou}</text></svg>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def confusion_picture(confusion: np.ndarray, classes: Sequence[str]) -> str:
    """One square for each pair of label (row) and prediction (column), the stronger the larger its share of the row."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side, left, top, note = 18, 98, 76, 290  # pixels; the widest number and its words are `note` wide
    extent = side * len(classes)
    width, height = max(left + extent + 50, note + 58), top + extent + 22
    # From the last row up, for what comes later lies above: each note covers squares of the row below its own.
    cells = "".join(
        f'<g class="cell"><rect class="mark" x="{left + side * j}" y="{top + side * i}" width="{side - 1}" '
        f'height="{side - 1}" fill-opacity="{max(0.04, shares[i, j] ** 0.6):.2f}"/>'
        f'<text x="{min(left + side * j, width - note)}" y="{top + side * i + 32}">'
        f"{html.escape(f'{classes[i]} seen as {classes[j]}: {draw.percent(shares[i, j])} of its pixels')}</text></g>"
        for i, j in np.argwhere(shares >= 0.0005)[::-1]
    )
    names = "".join(
        f'<text x="{left - 5}" y="{top + side * k + 13}" text-anchor="end">{html.escape(name[:16])}</text>'
        f'<text transform="translate({left + side * k + 13} {top - 5}) rotate(-60)">{html.escape(name[:13])}</text>'
        for k, name in enumerate(classes)
    )
    return (f'<div class="wide"><svg viewBox="0 0 {width} {height}" style="min-width: {round(0.9 * width)}px; '
            f'max-width: {round(1.5 * width)}px"><rect class="grid" x="{left - 1}" y="{top - 1}" width="{extent + 1}" '
            f'height="{extent + 1}" fill="none"/>{names}{cells}</svg></div>')


def image_score(confusion: Tensor) -> float:
    """Mean IoU over the classes of one image's labels, from its confusion matrix; NaN for an image without any."""
    result = evaluate.metrics(confusion)
    return torch.from_numpy(result.iou[result.pixels > 0]).mean().item()


def choose_examples(scores: Sequence[float], number: int = SHOWN) -> tuple[list[int], list[int]]:
    """The `number` images with the lowest scores, worst first, and as many others around the median."""
    ranked = [int(i) for i in np.argsort(scores, kind="stable") if not math.isnan(scores[i])]
    worst, others = ranked[:number], ranked[number:]
    start = min(max(0, len(ranked) // 2 - number // 2 - len(worst)), max(0, len(others) - number))
    return worst, others[start : start + number]


def examples(dataset: data.SegmentationDataset, chosen: Sequence[int], scores: Sequence[float],
             predictions: Sequence[bytes]) -> Iterator[str]:
    """A heading, and a figure for each chosen image: photograph, labels, prediction (packed by zlib), error map."""
    yield f'<div class="row names small faint">{"".join(f"<span>{what}</span>" for what in COLUMNS)}</div>'
    for index in chosen:
        labels = dataset.labels(index)
        prediction = np.frombuffer(zlib.decompress(predictions[index]), np.uint8).reshape(labels.shape)
        pictures = (dataset.image(index), draw.colorize(labels, dataset.info.palette),
                    draw.colorize(prediction, dataset.info.palette, ignore_index=-1),
                    draw.error_map(labels, prediction))
        name = html.escape(dataset.names[index])
        row = "".join(f'<img alt="{what} of {name}" src="{embedded(picture)}">'
                      for what, picture in zip(COLUMNS, pictures, strict=True))
        caption = f'{name} <span class="faint">IoU {100 * scores[index]:.1f}</span>'
        yield f'<figure><div class="row">{row}</div><figcaption class="small">{caption}</figcaption></figure>'


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


def write_report(folder: Path, options: argparse.Namespace) -> Path:
    """Evaluate the run's best checkpoint and write folder/report/index.html, whole or not at all. Returns its path."""
    device = common.choose_device(options.device)
    common.allow_tf32(options.tf32)
    config, log = read_config(folder), read_log(folder / "log.jsonl")
    dataset, model, facts = evaluate.load_with_data(folder / "best.pt", options.data, "val")
    path = folder / "report" / "index.html"
    common.check_file(path, "the report")
    scores: list[float] = []
    predictions: list[bytes] = []

    def keep(index: int, prediction: np.ndarray) -> None:
        arrays = torch.from_numpy(prediction), torch.from_numpy(dataset.labels(index))
        scores.append(image_score(evaluate.confusion_matrix(*arrays, model.config.num_classes)))
        predictions.append(zlib.compress(prediction, 1))  # some kilobytes: all of a validation fit in memory

    confusion = evaluate.evaluate(model.to(device), dataset, multi_scale=options.ms, device=device, save=keep,
                                  limit=options.limit, window_batch=options.window_batch, amp=options.amp,
                                  fast=options.fast)
    worst, typical = ("".join(examples(dataset, chosen, scores, predictions)) for chosen in choose_examples(scores))
    about = (f"{dataset.info.name}, {len(scores)} validation images, "
             f"{'multi-scale + flip' if options.ms else 'single-scale'}, iteration {facts.get('iteration')}")
    page = fill_page(config, dataset.info, confusion, name=html.escape(folder.name), about=html.escape(about),
                     curves=curves(log), worst=worst, typical=typical)
    common.write_whole(path, lambda file: file.write(page.encode()))
    return path


def fill_page(config: dict, info: data.DatasetInfo, confusion: Tensor, **parts: str) -> str:
    """report.html with `parts` and all that follows from the run's config.json and its confusion matrix."""
    result = evaluate.metrics(confusion)
    means = {"mIoU": result.mean_iou, "pixel accuracy": result.all_accuracy, "mean accuracy": result.mean_accuracy}
    environment = config.get("environment", {})
    command = shlex.join(map(str, environment.pop("command", ()))).replace(" --", " \\\n    --") or "not recorded"
    options = {key: value for key, value in config.items() if key not in ("environment", "classes", "model")}
    here = Path(__file__)
    return Template(here.with_name("report.html").read_text()).substitute(
        parts,
        style=here.with_name("report.css").read_text(),
        headline="".join(f"<div><b>{evaluate.in_percent(mean)}</b>{name}</div>" for name, mean in means.items()),
        layout="columns" if len(info.classes) <= FEW else "",
        bars=class_bars(result, info),
        confusion=confusion_picture(confusion.cpu().numpy(), info.classes),
        legend="".join(f'<li><i style="background: #{rgb.tobytes().hex()}"></i>{html.escape(name)}</li>'
                       for name, rgb in zip(info.classes, info.palette, strict=True)),
        command=html.escape(command),
        options=value_table("Options", options),
        model=value_table("Model", config.get("model", {})),
        environment=value_table("Environment", environment),
    )


def value_table(title: str, values: dict) -> str:
    """A table of names and values."""
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
                   for name, value in values.items() if value is not None)
    return f"<div><table><caption>{title}</caption>{rows}</table></div>"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = common.Parser(description="Write a run's report: runs/NAME/report/index.html.")
    parser.add_argument("run", nargs="?", default="", help="name or folder of a run; default: the newest")
    parser.add_argument("--data", metavar="DIR", help="data set folder; default: the one the run was trained on")
    parser.add_argument("--ms", action="store_true", help="multi-scale and flip")
    parser.add_argument("--limit", type=common.positive, metavar="N", help="only the first N images")
    evaluate.add_device_options(parser)
    options = parser.parse_args(arguments)
    return common.run(lambda: print(write_report(find(options.run), options)))


if __name__ == "__main__":
    sys.exit(main())
