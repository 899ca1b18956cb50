"""How numbers look: in percent for people, as fractions for programs; tables as text, Markdown, LaTeX, CSV, JSON.

Reading order: in_percent -> table, summary -> markdown, latex, csv_text -> class_table; to_json.
"""

import csv
import html
import io
import json
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

import common

if TYPE_CHECKING:
    from evaluate import Metrics

Columns = dict[str, Sequence[str]]  # of a table: heading -> cells; "-" where there is no number


def in_percent(fraction: float) -> str:
    """A fraction as people read it everywhere: percent with one decimal; a dash where there is no number."""
    return "-" if math.isnan(fraction) else f"{100 * fraction:.1f}"


def table(result: "Metrics", classes: Sequence[str]) -> str:
    """The per-class table and the three summary numbers, in percent, for the console."""
    width = max(len("class"), *map(len, classes))
    line = "-" * (width + 30)
    rows = [f"{name:<{width}}  {in_percent(iou):>6}  {in_percent(accuracy):>6}  {pixels:>12,}"
            for name, iou, accuracy, pixels in zip(classes, *result[:3], strict=True)]
    return "\n".join([f"{'class':<{width}}     IoU     acc        pixels", line, *rows, line, summary(result)])


def summary(result: "Metrics") -> str:
    """Pixel accuracy and the two class means, in percent."""
    names = ("aAcc", "mIoU", "mAcc")
    return "   ".join(f"{name} {in_percent(mean)}" for name, mean in zip(names, result[3:], strict=True))


def markdown(columns: Columns) -> str:
    """The columns as a Markdown table. What Markdown would take for markup or a border becomes an HTML entity."""
    rows = [columns, ["---", *["---:"] * (len(columns) - 1)], *zip(*columns.values(), strict=True)]
    special = re.compile(r"[|\\`*~\[\]]|\b_+|_+\b")  # an underscore within a word is none
    cells = [[special.sub(lambda m: "".join(f"&#{ord(c)};" for c in m[0]), html.escape(cell, quote=False))
              for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


# A bracket or a star at the start of a row would be an argument of the \\ before it.
LATEX = {**{c: f"\\{c}" for c in "&%$#_{}"}, **{c: f"{{{c}}}" for c in "[]*"}, "\\": r"\textbackslash{}",
         "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
         "|": r"\textbar{}"}


def latex(columns: Columns) -> str:
    """The columns as a LaTeX tabular with the rules of the package booktabs."""
    head, *rows = (" & ".join(cell.translate(str.maketrans(LATEX)) for cell in row) + r" \\"
                   for row in [columns, *zip(*columns.values(), strict=True)])
    begin = rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}  % \usepackage{{booktabs}}"
    return "\n".join([begin, r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", ""])


def csv_text(columns: Columns) -> str:
    """The columns as CSV; a number that does not exist is an empty cell."""
    rows = zip(*columns.values(), strict=True)
    csv.writer(file := io.StringIO(), lineterminator="\n").writerows(
        [columns, *([name, *("" if cell == "-" else cell for cell in cells)] for name, *cells in rows)])
    return file.getvalue()


FORMATS = {"markdown": markdown, "csv": csv_text, "latex": latex}


def class_table(result: "Metrics", classes: Sequence[str], form: str) -> str:
    """The per-class table in one of FORMATS, to be pasted, in percent: CSV has all decimals, the others have one."""
    percent, count = in_percent, "{:,}".format
    if form == "csv":
        percent, count = (lambda fraction: "-" if math.isnan(fraction) else str(100 * fraction)), str
    names = [common.printable(name) for name in classes]
    return FORMATS[form]({"class": names, "IoU %": [*map(percent, result.iou)],
                          "accuracy %": [*map(percent, result.accuracy)], "pixels": [*map(count, result.pixels)]})


def to_json(result: "Metrics", classes: Sequence[str], rest: "Metrics", without: Sequence[str], **facts: object) -> str:
    """The metrics, and the means of `rest`, as JSON: fractions in full precision, null where there is no number."""
    numbers, rest = ({name: np.where(np.isnan(value), None, value).tolist() for name, value in each._asdict().items()}
                     for each in (result, rest))
    columns = {"class": classes, **{name: numbers.pop(name) for name in ("iou", "accuracy", "pixels")}}
    per_class = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    without = {"classes": without, **{name: rest[name] for name in numbers}}
    return json.dumps({**facts, **numbers, "without": without, "classes": per_class}, indent=1)
