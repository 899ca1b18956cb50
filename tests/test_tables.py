"""tools/tables.py: percent for people, fractions in JSON, tables that keep their cells whatever the names."""

import csv
import io
import json

import pytest
import torch

from evaluate import metrics
from tools import tables

RESULT = metrics(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
NAMES = ["sky", "road", "unicorn"]


def test_table_shows_percent_and_a_dash_for_a_class_that_is_nowhere():
    text = tables.table(RESULT, NAMES)
    assert [line.split() for line in text.splitlines()[2:5]] == [
        ["sky", "75.0", "75.0", "4"], ["road", "80.0", "100.0", "4"], ["unicorn", "-", "-", "0"]]
    assert text.splitlines()[-1] == "aAcc 87.5   mIoU 77.5   mAcc 87.5"


def test_json_holds_fractions_in_full_precision_and_null_for_no_number():
    confusion = torch.tensor([[2, 1], [0, 0]])
    text = tables.to_json(metrics(confusion), ["a", "b"], metrics(confusion, [0, 1]), ["a", "b"], split="test")
    assert json.loads(text) == {
        "split": "test", "all_accuracy": 2 / 3, "mean_iou": 1 / 3, "mean_accuracy": 2 / 3,
        "without": {"classes": ["a", "b"], "all_accuracy": None, "mean_iou": None, "mean_accuracy": None},
        "classes": [{"class": "a", "iou": 2 / 3, "accuracy": 2 / 3, "pixels": 3},
                    {"class": "b", "iou": 0.0, "accuracy": None, "pixels": 0}]}


def test_markdown_and_latex_have_one_decimal_and_csv_has_all():
    assert tables.class_table(RESULT, NAMES, "markdown").splitlines() == [
        "| class | IoU % | accuracy % | pixels |", "| --- | ---: | ---: | ---: |",
        "| sky | 75.0 | 75.0 | 4 |", "| road | 80.0 | 100.0 | 4 |", "| unicorn | - | - | 0 |"]
    assert tables.class_table(RESULT, NAMES, "latex").splitlines() == [
        r"\begin{tabular}{lrrr}  % \usepackage{booktabs}", r"\toprule", r"class & IoU \% & accuracy \% & pixels \\",
        r"\midrule", r"sky & 75.0 & 75.0 & 4 \\", r"road & 80.0 & 100.0 & 4 \\", r"unicorn & - & - & 0 \\",
        r"\bottomrule", r"\end{tabular}"]
    thirds = metrics(torch.tensor([[10_000, 0, 0], [5000, 0, 0], [0, 0, 0]]))
    assert tables.class_table(thirds, NAMES, "csv").splitlines() == [
        "class,IoU %,accuracy %,pixels", f"sky,{100 * (2 / 3)},100.0,10000", "road,0.0,0.0,5000", "unicorn,,,0"]
    assert "| 10,000 |" in tables.class_table(thirds, NAMES, "markdown")


@pytest.mark.parametrize("name", ["a,b", 'the "sky"', "a|b & c", " blank ", "-", "道路", "a\nb"])
def test_csv_gives_every_name_back(name):
    rows = list(csv.reader(io.StringIO(tables.class_table(RESULT, [name, *NAMES[1:]], "csv"))))
    assert len(rows) == 4 and {len(row) for row in rows} == {4}
    assert rows[1][0] == name.replace("\n", "?") and rows[3] == ["unicorn", "", "", "0"]


@pytest.mark.parametrize(("name", "cell"), [
    ("a|b", "a&#124;b"), ("<b>&", "&lt;b&gt;&amp;"), ("*bold* `code`", "&#42;bold&#42; &#96;code&#96;"),
    ("[x](y)", "&#91;x&#93;(y)"), ("~no~", "&#126;no&#126;"), ("back\\", "back&#92;"), ("a\nb", "a?b"),
    ("__init__", "&#95;&#95;init&#95;&#95;"), ("traffic_sign", "traffic_sign"), ("道路", "道路"),
])
def test_markdown_takes_nothing_in_a_name_for_markup(name, cell):
    lines = tables.class_table(RESULT, [name, *NAMES[1:]], "markdown").splitlines()
    assert len(lines) == 5 and lines[2] == f"| {cell} | 75.0 | 75.0 | 4 |"


@pytest.mark.parametrize(("name", "cell"), [
    (r"a_b & 5% #1 $x", r"a\_b \& 5\% \#1 \$x"), ("{~^\\}", r"\{\textasciitilde{}\textasciicircum{}\textbackslash{}\}"),
    ("[2ex]", "{[}2ex{]}"), ("*", "{*}"), ("a<b>|c", r"a\textless{}b\textgreater{}\textbar{}c"), ("a\nb", "a?b"),
])
def test_latex_takes_nothing_in_a_name_for_a_command(name, cell):
    lines = tables.class_table(RESULT, [name, *NAMES[1:]], "latex").splitlines()
    assert len(lines) == 9 and lines[4] == cell + r" & 75.0 & 75.0 & 4 \\"
