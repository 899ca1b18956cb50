"""A run as one HTML page: runs/NAME/report/index.html, self-contained, for a phone as for a desk, light and dark.

    python report.py                    the newest run, its best checkpoint, single-scale
    python report.py camvid --ms        the run runs/camvid, multi-scale with flips

Read: main -> write_report -> page, which puts together curves, class_bars, confusion_picture and examples.

Charts are inline SVG that take their colours from the page's style sheet; numbers show when a mark is pointed at (SVG
titles), so the page needs no script and no network. Shapes: K classes; labels and predictions are uint8 (H, W).
"""

import argparse
import base64
import html
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import data
import draw
import evaluate
import weights
from run import find_run, read_config, read_log

SHOWN = 12  # worst images, and as many typical ones
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1c1e; --faint: #6a6a70; --line: #d9d9de; --accent: #1f6feb; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #141416; --ink: #ececee; --faint: #a0a0a8; --line: #3a3a40; --accent: #6cb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: .5rem 0 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p { margin: .3rem 0; } .faint { color: var(--faint); }
.numbers { display: flex; flex-wrap: wrap; gap: .4rem 2.2rem; margin: 1rem 0; }
.numbers b { display: block; font-size: 2rem; line-height: 1.1; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem 2rem; }
.wide { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 11px; }
svg .note { fill: var(--faint); } svg .grid { stroke: var(--line); } svg .mark { fill: var(--accent); }
svg .curve { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; }
figure { margin: .8rem 0; } figcaption { font-size: .9rem; }
figure div { display: grid; grid-template-columns: repeat(4, 1fr); gap: 4px; }
@media (max-width: 40rem) { figure div { grid-template-columns: repeat(2, 1fr); } }
img { width: 100%; height: auto; display: block; }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line); border-radius: 6px; font-size: .85rem; }
"""


class Point(NamedTuple):
    """A point of a learning curve."""

    iteration: int
    value: float


# ------------------------------------------------------------------------------------------------------ charts


def curve(points: Sequence[Point], title: str, unit: str = "") -> str:
    """A line chart of at most 400 points; longer curves show the mean of as many stretches."""
    if len(points) < 2:
        return ""
    stretches = np.array_split(np.float64(points), min(len(points), 400))
    x, y = np.array([stretch.mean(0) for stretch in stretches]).T
    left, top, width, height = 48, 26, 300, 150
    low, high = min(0.0, float(y.min())), float(y.max()) or 1.0
    horizontal = left + width * (x - x[0]) / max(x[-1] - x[0], 1)
    vertical = top + height * (high - y) / (high - low)
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(horizontal, vertical, strict=True))
    grid = "".join(
        f'<line class="grid" x1="{left}" x2="{left + width}" y1="{v:.1f}" y2="{v:.1f}"/>'
        f'<text class="note" x="{left - 5}" y="{v + 4:.1f}" text-anchor="end">{tick(value)}</text>'
        for value in np.linspace(low, high, 4) for v in [top + height * (high - value) / (high - low)]
    )
    dots = "".join(
        f'<circle class="mark" cx="{a:.1f}" cy="{b:.1f}" r="{2.5 if len(x) < 60 else 1}">'
        f"<title>iteration {i:.0f}: {v:.4g}{unit}</title></circle>"
        for a, b, i, v in zip(horizontal, vertical, x, y, strict=True)
    )
    ends = f'<text class="note" x="{left}" y="192">{x[0]:.0f}</text>' + (
        f'<text class="note" x="{left + width}" y="192" text-anchor="end">{x[-1]:.0f} iterations</text>'
    )
    heading = f'<text x="0" y="13">{html.escape(title)}</text>'
    return f'<svg viewBox="0 0 360 200">{heading}{grid}<polyline class="curve" points="{path}"/>{dots}{ends}</svg>'


def tick(value: float) -> str:
    """A number short enough for an axis."""
    return f"{value:.3g}" if value == 0 or value >= 0.1 else f"{value:.1e}".replace("e-0", "e-")


def curves(log: Sequence[dict]) -> str:
    """Loss, learning rate, and the validation's mIoU and pixel accuracy, from the lines of log.jsonl."""
    charts = [
        curve(points_of(log, "train", "loss"), "training loss"),
        curve(points_of(log, "validation", "mIoU", 100), "validation mIoU, %", " %"),
        curve(points_of(log, "validation", "aAcc", 100), "validation pixel accuracy, %", " %"),
        curve(points_of(log, "train", "lr"), "learning rate"),
    ]
    return f'<div class="columns">{"".join(charts)}</div>' if any(charts) else "<p>The log has no curve yet.</p>"


def points_of(log: Sequence[dict], kind: str, key: str, scale: float = 1) -> list[Point]:
    """The values of `key` in the log's lines of this kind."""
    return [Point(line["iteration"], scale * line[key]) for line in log if line.get("kind") == kind and key in line]


def class_bars(result: evaluate.Metrics, info: data.DatasetInfo) -> str:
    """One bar for each class, its IoU, best first; classes that occur nowhere come last, with a dash."""
    order = sorted(
        range(len(info.classes)), key=lambda k: -1 if math.isnan(result.iou[k]) else result.iou[k], reverse=True
    )
    rows = []
    for row, k in enumerate(order):
        y, iou = 18 * row, result.iou[k]
        share = result.pixels[k] / max(result.pixels.sum(), 1)
        more = f"accuracy {evaluate.cell(result.accuracy[k]).strip()}, {draw.percent(share)} of pixels"
        length = 0 if math.isnan(iou) else 190 * iou
        rows.append(
            f"<g><title>{html.escape(info.classes[k])}: IoU {evaluate.cell(iou).strip()}, {more}</title>"
            f'<rect x="0" y="{y + 3}" width="11" height="11" fill="{color(info.palette[k])}"/>'
            f'<text x="17" y="{y + 13}">{html.escape(info.classes[k][:16])}</text>'
            f'<rect class="mark" x="118" y="{y + 3}" width="{length:.1f}" height="11"/>'
            f'<text x="{123 + length:.1f}" y="{y + 13}">{evaluate.cell(iou).strip()}</text></g>'
        )
    # Two columns on a wide page, one on a phone, in reading order.
    half = -(-len(rows) // 2) if len(rows) > 16 else len(rows)
    parts = [("".join(rows[:half]), 0, half), ("".join(rows[half:]), half, len(rows) - half)]
    charts = [
        f'<svg viewBox="0 {18 * first} 360 {18 * count}" style="max-width: 36rem">{part}</svg>'
        for part, first, count in parts
        if count
    ]
    return f'<div class="columns">{"".join(charts)}</div>'


def color(rgb: np.ndarray) -> str:
    """A CSS colour."""
    return "#" + "".join(f"{int(v):02x}" for v in rgb)


def confusion_picture(confusion: np.ndarray, classes: Sequence[str]) -> str:
    """The matrix with one square for each pair that occurs, the stronger the larger its share of the row's pixels.

    Rows are labels, columns predictions. Squares tell their numbers when pointed at.
    """
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side, left, top = 18, 110, 84
    cells = "".join(
        f'<rect class="mark" x="{left + side * j}" y="{top + side * i}" width="{side - 1}" height="{side - 1}" '
        f'opacity="{max(0.04, shares[i, j] ** 0.6):.2f}"><title>{html.escape(f"{classes[i]} seen as {classes[j]}")}: '
        f"{draw.percent(shares[i, j])} of its pixels</title></rect>"
        for i, j in zip(*np.nonzero(shares >= 0.0005), strict=True)
    )
    names = "".join(
        f'<text x="{left - 5}" y="{top + side * k + 13}" text-anchor="end">{html.escape(name[:17])}</text>'
        f'<text transform="translate({left + side * k + 13} {top - 5}) rotate(-60)">{html.escape(name[:17])}</text>'
        for k, name in enumerate(classes)
    )
    extent = side * len(classes)
    frame = f'<rect class="grid" x="{left - 1}" y="{top - 1}" width="{extent + 1}" height="{extent + 1}" fill="none"/>'
    width, height = left + extent + 70, top + extent + 2
    return (f'<div class="wide"><svg viewBox="0 0 {width} {height}" style="min-width: {round(0.8 * width)}px; '
            f'max-width: {round(1.5 * width)}px">{frame}{cells}{names}</svg></div>')


# ---------------------------------------------------------------------------------------------------- examples


def image_score(confusion: np.ndarray) -> float:
    """Mean IoU over the classes of one image's labels; NaN for an image without any."""
    result = evaluate.metrics(torch.from_numpy(confusion))
    return evaluate.nan_mean(result.iou[result.pixels > 0])


def choose_examples(scores: Sequence[float], number: int = SHOWN) -> tuple[list[int], list[int]]:
    """The `number` images with the lowest scores, worst first, and as many others around the median."""
    ranked = [int(i) for i in np.argsort(scores, kind="stable") if not math.isnan(scores[i])]
    worst, others = ranked[:number], ranked[number:]
    start = min(max(0, len(ranked) // 2 - number // 2 - len(worst)), max(0, len(others) - number))
    return worst, others[start : start + number]


def examples(model: nn.Module, dataset: data.SegmentationDataset, chosen: Sequence[int], scores: Sequence[float],
             device: torch.device, multi_scale: bool) -> Iterator[str]:
    """A figure for each chosen image: photograph, labels, prediction, error map."""
    images = (dataset.image(i) for i in chosen)
    results = evaluate.predictions(model, images, multi_scale=multi_scale, device=device)
    for index, prediction in zip(chosen, results, strict=True):
        labels, guess = dataset.labels(index), prediction.cpu().numpy()
        pictures = {
            "image": dataset.image(index),
            "labels": draw.colorize(labels, dataset.info.palette),
            "prediction": draw.colorize(guess, dataset.info.palette, ignore_index=-1),
            "errors": draw.error_map(labels, guess),
        }
        name = html.escape(dataset.names[index])
        row = "".join(f'<img alt="{what} of {name}" src="{embedded(picture)}">' for what, picture in pictures.items())
        caption = f'{name} <span class="faint">IoU {100 * scores[index]:.1f}</span>'
        yield f"<figure><div>{row}</div><figcaption>{caption}</figcaption></figure>"


def embedded(picture: draw.Picture, side: int = 420) -> str:
    """The picture, at most `side` pixels wide and high, as a data URI."""
    picture, file = draw.to_image(picture), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------------------------------------------- the page


def write_report(folder: Path, root: str | None, multi_scale: bool, limit: int | None, device: torch.device) -> Path:
    """Evaluate the run's best checkpoint and write folder/report/index.html, whole or not at all. Returns its path."""
    config, log = read_config(folder), read_log(folder / "log.jsonl")
    checkpoint = folder / "best.pt"
    dataset = data.open_dataset(root or evaluate.data_of_run(checkpoint), "val")
    model, facts = weights.load_model(checkpoint)
    evaluate.check_classes(dataset.info, facts.get("classes", ()), model.config.num_classes)
    scores: list[float] = []

    def note_score(index: int, prediction: np.ndarray) -> None:
        labels = torch.from_numpy(dataset.labels(index))
        scores.append(
            image_score(
                evaluate.confusion_matrix(torch.from_numpy(prediction), labels, model.config.num_classes).numpy()
            )
        )

    model.to(device)
    confusion = evaluate.evaluate(model, dataset, multi_scale=multi_scale, device=device, limit=limit, save=note_score)
    worst, typical = (
        "".join(examples(model, dataset, chosen, scores, device, multi_scale)) for chosen in choose_examples(scores)
    )
    facts = {
        "iteration": facts.get("iteration"),
        "images": len(scores),
        "scales": "multi-scale + flip" if multi_scale else "single-scale",
    }
    text = page(folder.name, config, log, dataset.info, confusion.cpu().numpy(), facts, worst, typical)
    path = folder / "report" / "index.html"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def page(name: str, config: dict, log: Sequence[dict], info: data.DatasetInfo, confusion: np.ndarray, facts: dict,
         worst: str, typical: str) -> str:
    """The whole document."""
    result = evaluate.metrics(torch.from_numpy(confusion))
    headline = "".join(
        f"<div><b>{evaluate.cell(value).strip()}</b>{label}</div>"
        for label, value in [
            ("mIoU", result.mean_iou),
            ("pixel accuracy", result.all_accuracy),
            ("mean accuracy", result.mean_accuracy),
        ]
    )
    environment = config.get("environment", {})
    options = {key: value for key, value in config.items() if key not in ("environment", "classes")}
    command = " ".join(str(part) for part in environment.get("command", ())) or "not recorded"
    legend = draw.legend(info.classes, info.palette, 1000)
    about = f"{info.name}, {facts['images']} validation images, {facts['scales']}, iteration {facts['iteration']}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(name)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>
<h1>{html.escape(name)}</h1><p class="faint">{html.escape(about)}</p>
<div class="numbers">{headline}</div>
<h2>Learning curves</h2>{curves(log)}
<h2>IoU per class, %</h2>{class_bars(result, info)}
<h2>Confusion</h2><p class="faint">Rows: labels. Columns: predictions. Stronger: a larger share of the row.</p>
{confusion_picture(confusion, info.classes)}
<h2>Worst images</h2><p class="faint">Image, labels, prediction, errors in red (hatched: not judged). IoU: mean over the
classes in the image's labels.</p>
<img src="{embedded(legend, 1000)}" alt="the classes' colours" style="max-width: 42rem">{worst}
<h2>Typical images</h2><p class="faint">Those around the median.</p>{typical}
<h2>How it was made</h2><pre>{html.escape(command)}</pre>
<pre>{html.escape(json.dumps(options, indent=1))}</pre><pre>{html.escape(json.dumps(environment, indent=1))}</pre>
</body></html>
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Write a run's report: runs/NAME/report/index.html.")
    parser.add_argument("run", nargs="?", default="", help="name or folder of a run; default: the newest")
    parser.add_argument("--data", metavar="DIR", help="data set folder; default: the one the run was trained on")
    parser.add_argument("--ms", action="store_true", help="multi-scale and flip")
    parser.add_argument("--limit", type=evaluate.positive, metavar="N", help="only the first N images")
    parser.add_argument("--device", help="cpu, cuda or mps; default: cuda if there is one")
    options = parser.parse_args(arguments)
    try:
        device = evaluate.choose_device(options.device)
        print(write_report(find_run(options.run), options.data, options.ms, options.limit, device))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
