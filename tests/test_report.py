"""report.py: the page's parts with known numbers, and a whole page made from a run."""

import base64
import csv
import html
import io
import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import write_data
from test_predict import save_checkpoint, status_of

import data
import evaluate
import weights
from tools import draw, report, tables

INFO = data.DatasetInfo("three", ("sky", "road & <kerb>", "unicorn"), np.uint8([[1, 2, 3], [255, 0, 0], [0, 255, 0]]))
CONFUSION = np.array([[30, 10, 0], [0, 40, 0], [0, 0, 0]])


RESULT = evaluate.metrics(torch.from_numpy(CONFUSION))


def notes(text):
    """The notes that a chart shows when a strip of it is pointed at."""
    return [html.unescape(note) for note in re.findall(r'<g class="strip".*?<text x="0" y="212">(.*?)</text>', text)]


def polylines(text):
    """The points (N, 2) of each line of a chart: x to the right, y downwards. The chart must be well-formed."""
    lines = ElementTree.fromstring(text).findall("g/polyline")
    return [np.array([point.split(",") for point in line.get("points").split()], float) for line in lines]


def test_a_curve_shows_its_points_the_larger_the_higher_from_iteration_0_on():
    text = report.curve(["a"], [[(25, 4.0), (50, 1.0), (100, 2.0)]], 100, "loss")
    assert notes(text) == ["iteration 25: 4", "iteration 50: 1", "iteration 100: 2"]
    (x, y), = (line.T for line in polylines(text))
    np.testing.assert_allclose((x - report.LEFT) / report.WIDTH, [0.25, 0.5, 1])
    assert y[1] - y[2] == pytest.approx((y[1] - y[0]) / 3)
    averages = notes(report.curve(["a"], [[(i, i % 2) for i in range(4000)]], 4000, "loss"))
    assert len(averages) == 400 and {note.split(": ")[1] for note in averages} == {"0.5"}


def test_a_single_point_is_a_dot_and_its_note_stands_below_the_labels():
    chart = ElementTree.fromstring(report.curve(["a"], [[(1, 0.5)]], 4, "loss"))
    (dot,), labels = chart.findall(".//circle"), chart.findall("text")
    assert float(dot.get("cx")) == report.LEFT + report.WIDTH / 4
    assert float(chart.find("g[@class='strip']/text").get("y")) > 10 + max(float(label.get("y")) for label in labels)


def test_two_runs_share_a_chart_and_its_notes():
    text = report.curve(["a", "<b>"], [[(10, 0.5), (20, 40)], [(20, 30.04)]], 20, "mIoU", " %")
    assert [len(line) for line in polylines(text)] == [2, 1]
    assert notes(text) == ["iteration 10: a 0.5 %", "iteration 20: a 40.0 %, <b> 30.0 %"]


def test_curves_take_their_values_from_the_log():
    log = [{"iteration": i, "kind": "train", "loss": 9.0 - i, "lr": 1e-3} for i in (1, 5)]
    log += [{"iteration": i, "kind": "validation", "mIoU": i / 10, "aAcc": 0.5} for i in (5, 9)]
    page = report.curves(["a"], [log])
    assert page.count("<svg") == 4 and {"iteration 1: 8", "iteration 5: 4", "iteration 9: 90.0 %"} <= set(notes(page))
    assert page.count(">9 iterations<") == 4  # one axis for all
    assert report.curves(["a"], [log[:1]]).count("<svg") == 2
    assert report.curves(["a"], [[]]) == "<p>The log has no curve yet.</p>"


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 53.7, [0, 20, 40, 60]), (0, 32.8, [0, 10, 20, 30, 40]), (0, 100, [0, 20, 40, 60, 80, 100]), (0, 0, [0, 1]),
    (-0.3, 1.1, [-0.5, 0, 0.5, 1, 1.5]), (0, 9.4e-4, [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]),
])
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    np.testing.assert_allclose(report.ticks(low, high), expected, rtol=1e-12)


def test_class_bars_are_sorted_with_absent_classes_last():
    columns = report.class_table(["a"], [RESULT], INFO)
    assert columns == {"class": ["road & <kerb>", "sky", "unicorn"], "IoU %": ["80.0", "75.0", "-"],
                       "accuracy %": ["100.0", "75.0", "-"], "pixels %": ["50.0", "50.0", "0.0"]}
    assert tables.csv_text(columns).splitlines()[1:] == ["road & <kerb>,80.0,100.0,50.0", "sky,75.0,75.0,50.0",
                                                         "unicorn,,,0.0"]
    assert tables.markdown(columns).splitlines() == [
        "| class | IoU % | accuracy % | pixels % |", "| --- | ---: | ---: | ---: |",
        "| road &amp; &lt;kerb&gt; | 80.0 | 100.0 | 50.0 |", "| sky | 75.0 | 75.0 | 50.0 |",
        "| unicorn | - | - | 0.0 |"]
    table = ElementTree.fromstring(report.class_bars(columns, INFO))
    assert [row[0][0].get("style") for row in table[1:]] == ["background: #ff0000", "background: #010203",
                                                              "background: #00ff00"]
    assert [row[1].get("style") for row in table[1:]] == ["--share: 80.0%", "--share: 75.0%", "--share: 0%"]


def test_of_two_runs_the_class_that_gains_most_comes_first():
    other = evaluate.metrics(torch.tensor([[40, 0, 0], [10, 30, 0], [0, 0, 0]]))
    assert report.class_table(["a", "b"], [RESULT, other], INFO) == {
        "class": ["sky", "road & <kerb>", "unicorn"],
        "IoU % a": ["75.0", "80.0", "-"], "IoU % b": ["80.0", "75.0", "-"],
        "IoU % difference": ["+5.0", "-5.0", "-"], "pixels %": ["50.0", "50.0", "0.0"]}
    assert report.side_by_side("x", ["a", "b"], [[0.5001], [0.5]])["x difference"] == ["+0.0"]


def test_a_markdown_table_keeps_its_columns_whatever_the_names():
    assert tables.markdown({"class": ["a|b", "道路"]}) == "| class |\n| --- |\n| a&#124;b |\n| 道路 |\n"


def test_the_confusion_table_has_a_cell_for_each_pair_that_occurs():
    cells = ElementTree.fromstring(report.confusion_table(CONFUSION, INFO.classes)).findall(".//td[@data-note]")
    assert {cell.get("data-note"): cell.get("style") for cell in cells} == {
        "road & <kerb> seen as road & <kerb>: 100.0 % of its pixels": "--share: 100%",
        "sky seen as road & <kerb>: 25.0 % of its pixels": "--share: 44%",
        "sky seen as sky: 75.0 % of its pixels": "--share: 84%",
    }


def test_an_images_score_is_the_mean_iou_of_the_classes_in_its_labels():
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 4]])
    assert report.image_scores(confusion) == pytest.approx(((0.75 + 1) / 2, 7 / 8))  # class 1 is predicted only
    assert all(map(math.isnan, report.image_scores(torch.zeros(3, 3, dtype=torch.int64))))


@pytest.mark.parametrize(("number", "worst", "typical"), [
    (5, [0], [2]), (13, range(4), range(4, 8)), (24, range(8), range(8, 16)), (100, range(12), range(44, 56)),
])
def test_worst_are_the_lowest_third_and_typical_those_around_the_median(number, worst, typical):
    order = np.random.default_rng(0).permutation(number)  # order[r] is the image of rank r
    scores = np.empty(number)
    scores[order] = np.arange(number) / number
    assert report.choose_examples(scores[None]) == {
        f"Worst images ({len(worst)} of {number})": order[worst].tolist(),
        f"Typical images ({len(worst)} of {number}, around the median)": order[typical].tolist()}


@pytest.mark.parametrize(("scores", "sections"), [
    ([[]], {"All images (0)": []}), ([[0.5]], {"All images (1)": [0]}), ([[0.5, 0.2]], {"All images (2)": [1, 0]}),
    ([[0.5, math.nan, 0.2, 0.9]], {"All images (3)": [2, 0, 3]}),
    ([[0.5, 0.2], [0.5, 0.4]], {"All images (2)": [1, 0]}),
    ([[0.5, 0.2, 0.1, 0.9, 0.1], [0.4, 0.9, 0.1, math.nan, 0.4]], {"Images that differ most (4 of 4)": [1, 4, 0, 2]}),
    ([[0.0] * 20, np.arange(20) / 20], {"Images that differ most (12 of 20)": [*range(19, 7, -1)]}),
])
def test_few_images_and_two_runs_have_one_section(scores, sections):
    assert report.choose_examples(np.array(scores)) == sections


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A run on a small data set of five images, with a model of starting values."""
    monkeypatch.chdir(tmp_path)
    write_data(Path("set"), images=0, validation=5)
    classes = ["sky", "<b>road</b>", "c"]
    Path("set/dataset.json").write_text(json.dumps({"classes": classes}))
    run = Path("runs/first try")
    run.mkdir(parents=True)
    save_checkpoint(run / "best.pt", "upernet", classes, window=32)
    config = {"data": "set", "lr": 0.001, "environment": {"command": ["train.py", "--name", "<x>"], "torch": "2"}}
    (run / "config.json").write_text(json.dumps(config))
    lines = [{"iteration": i, "kind": "train", "loss": 5 - i / 10, "lr": 1e-3} for i in range(0, 40, 10)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 40, "ki')
    return run


def pictures(text):
    """The text beside, the address and the caption of each picture of a page."""
    return re.findall('<img alt="(.+?)" src="(.+?)"><figcaption>(.+?)</figcaption>', text)


def metrics_of(run, split="val"):
    """The metrics of the run's checkpoint, over all images and of each image."""
    dataset, model = data.open_dataset("set", split), weights.load_model(run / "best.pt")[0]
    predictions = {}
    total = evaluate.evaluate(model, dataset, progress=False, save=predictions.__setitem__)
    each = [evaluate.confusion_matrix(torch.from_numpy(predictions[i]), torch.from_numpy(dataset.labels(i)), 3)
            for i in range(len(dataset))]
    return evaluate.metrics(total), list(map(evaluate.metrics, each))


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_is_complete_self_contained_and_escaped(run_folder, capsys):
    assert report.main(["--device", "cpu"]) == 0
    path = run_folder / "report" / "index.html"
    assert capsys.readouterr().out.strip().endswith(str(path))
    assert {p.name for p in path.parent.iterdir()} == {"index.html", "classes.csv", "classes.md", "per_image.csv"}
    text = path.read_text()
    assert text.count("<img") == len(pictures(text)) == 4 * 2  # one worst and one typical image of 5
    assert all(source.startswith("data:image/jpeg;base64,") for _, source, _ in pictures(text))
    assert "color-scheme: light dark" in text and not re.search("<script|<link rel=.stylesheet|http|<b>road|[$]", text)
    assert {href for href in re.findall('href="(.*?)"', text) if href != "data:,"} == {
        "classes.csv", "classes.md", "per_image.csv"}
    assert "train.py \\\n    --name '<x>'" in html.unescape(text)
    expected, each = metrics_of(run_folder)
    assert f"<b>{100 * expected.mean_iou:.1f}</b>mIoU, %" in text
    assert f"<b>{100 * expected.all_accuracy:.1f}</b>pixel accuracy, %" in text
    iou = {row["class"]: row["IoU %"] for row in rows_of(path.with_name("classes.csv"))}
    assert iou == {name: tables.in_percent(value).replace("-", "")
                   for name, value in zip(["sky", "<b>road</b>", "c"], expected.iou, strict=True)}
    assert rows_of(path.with_name("per_image.csv")) == [
        {"image": f"{i:02}", "IoU %": tables.in_percent(one.iou[one.pixels > 0].mean()),
         "accuracy %": tables.in_percent(one.all_accuracy)} for i, one in enumerate(each)]


def test_another_split_and_fewer_images(run_folder):
    Path("set/holiday.txt").write_text("04\n01\n")
    assert report.main(["first try", "--device", "cpu", "--split", "holiday"]) == 0
    assert [row["image"] for row in rows_of(run_folder / "report/per_image.csv")] == ["04", "01"]
    text = (run_folder / "report/index.html").read_text()
    assert "2 images of holiday" in text and f"<b>{100 * metrics_of(run_folder, 'holiday')[0].mean_iou:.1f}</b>" in text
    assert report.main(["first try", "--device", "cpu", "--limit", "1"]) == 0
    text = (run_folder / "report/index.html").read_text()
    assert text.count("<h3>00 ") == 1 and len(pictures(text)) == 4 and "1 images of val" in text


@pytest.fixture
def second(run_folder):
    """A run on the same data set with other weights."""
    other = shutil.copytree(run_folder, run_folder.with_name("b"))
    save_checkpoint(other / "best.pt", "upernet", ["sky", "<b>road</b>", "c"], window=64)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"lr": 0.5}))
    return other


def test_two_runs_stand_side_by_side(run_folder, second, capsys):
    assert report.main(["first try", "b", "--device", "cpu"]) == 0
    path = run_folder / "report-vs-b" / "index.html"
    assert capsys.readouterr().out.strip().endswith(str(path))
    text = path.read_text()
    (one, _), (two, _) = metrics_of(run_folder), metrics_of(second)
    change = 100 * (two.mean_iou - one.mean_iou)
    assert f"<b>{100 * one.mean_iou:.1f} : {100 * two.mean_iou:.1f}</b>mIoU, % ({change:+.1f})" in text
    assert [caption for *_, caption in pictures(text)[:6]] == [
        "image", "labels", "prediction of first try", "errors of first try", "prediction of b", "errors of b"]
    rows = rows_of(path.with_name("per_image.csv"))
    assert list(rows[0]) == ["image", *(f"{what} % {of}" for what in ("IoU", "accuracy")
                                        for of in ("first try", "b", "difference"))]
    differences = {row["image"]: abs(float(row["IoU % difference"])) for row in rows}
    shown = re.findall("<h3>(\\d+) ", text)
    assert "Images that differ most (5 of 5)" in text and set(shown) == set(differences)
    assert [differences[name] for name in shown] == sorted(differences.values(), reverse=True)
    settings = html.unescape("".join(re.findall("<li><span>.*?</li>", text)))
    assert settings == "<li><span>lr</span> 0.001 : 0.5</li>"  # the setting that differs


def test_an_example_shows_image_labels_prediction_and_errors_in_this_order(run_folder):
    y, x = np.mgrid[:48, :64].astype(np.uint8)
    Image.fromarray(np.stack([4 * x, 5 * y, 2 * x + y], -1)).save("set/images/03.png")
    Image.fromarray(np.uint8([0, 1, 255])[x // 22]).save("set/labels/03.png")
    dataset, guess = data.open_dataset("set", "val"), y // 17
    run = report.Run("a", {}, [], 1, CONFUSION, RESULT, np.full((2, 4), 0.25), [b""] * 3 + [zlib.compress(guess)])
    figure, = report.examples(dataset, [3], [run])
    assert figure.startswith('<h3>03 <span class="faint">IoU 25.0 %</span></h3>')
    assert [caption for *_, caption in pictures(figure)] == ["image", "labels", "prediction", "errors"]
    expected = [dataset.image(3), draw.colorize(dataset.labels(3), dataset.info.palette),
                draw.colorize(guess, dataset.info.palette), draw.error_map(dataset.labels(3), guess)]
    for (_, source, _), picture in zip(pictures(figure), expected, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as shown:
            assert abs(np.asarray(shown).astype(int) - picture).mean() < 10  # JPEG blurs edges; others differ by > 50


def test_runs_that_cannot_be_compared_are_one_line(run_folder, second, capsys):
    shutil.copytree("set", "set2")
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(config | {"data": "set2"}))
    for arguments, message in (
            (["b", "first try"], "runs/b has the data set set2, runs/first try has set: name the one"),
            (["b", "runs/b"], "runs/b, runs/b: name one run, or two that have different names"),
            (["b", "b", "b"], "runs/b, runs/b, runs/b: name one run, or two")):
        assert status_of(report.main, *arguments, "--device", "cpu") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not list(Path("runs").glob("*/report*"))


@pytest.mark.parametrize(("damage", "arguments", "message"), [
    (None, ["--data", "no"], "no data at no"),
    (None, ["--limit", "0"], "argument --limit: 0 is not a positive whole number"),
    (None, ["--split", "no"], "set/no.txt"),
    (None, ["nothing"], "no runs/nothing/best.pt to report on"),
    (lambda run: (run / "report").touch(), [], "the report runs/first try/report cannot be used as a folder"),
    (lambda run: (run / "best.pt").unlink(), [],
     "no runs/*/best.pt to report on: name a run that has been validated; in runs/: first try"),
])
def test_a_run_that_cannot_be_reported_on_is_one_line_and_status_2(run_folder, capsys, damage, arguments, message):
    if damage:
        damage(run_folder)
    assert status_of(report.main, *arguments, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (run_folder / "report").is_dir()
