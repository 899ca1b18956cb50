"""report.py: the page's parts with known numbers, and a whole page made from a run."""

import base64
import html
import io
import json
import math
import re
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
from tools import draw, report

INFO = data.DatasetInfo("three", ("sky", "road & <kerb>", "unicorn"), np.uint8([[1, 2, 3], [255, 0, 0], [0, 255, 0]]))
CONFUSION = np.array([[30, 10, 0], [0, 40, 0], [0, 0, 0]])


def svg(text):
    """The first SVG of a text, parsed: it must be well-formed."""
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", text, re.DOTALL)[0])


def titles(text):
    return [html.unescape(title) for title in re.findall("<title>(.*?)</title>", text)]


def test_a_curve_shows_its_points_the_larger_the_higher():
    text = report.curve([(0, 4.0), (50, 1.0), (100, 2.0)], "loss")
    assert titles(text) == ["iteration 0: 4", "iteration 50: 1", "iteration 100: 2"]
    points = svg(text).find("polyline").get("points").split()
    x, y = np.array([point.split(",") for point in points], float).T
    assert x[2] - x[1] == x[1] - x[0] > 0 and y[1] - y[2] == pytest.approx((y[1] - y[0]) / 3)  # y grows downwards
    averages = titles(report.curve([(i, i % 2) for i in range(4000)], "loss"))
    assert len(averages) == 400 and {title.split(": ")[1] for title in averages} == {"0.5"}


def test_curves_take_their_values_from_the_log():
    log = [{"iteration": i, "kind": "train", "loss": 9.0 - i, "lr": 1e-3} for i in (0, 5)]
    log += [{"iteration": i, "kind": "validation", "mIoU": i / 10, "aAcc": 0.5} for i in (0, 5)]
    page = report.curves(log)
    assert page.count("<svg") == 4 and {"iteration 5: 4", "iteration 5: 50 %"} <= set(titles(page))
    for no_curve in ([], log[:1]):
        assert report.curves(no_curve) == "<p>The log has no curve yet.</p>"


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 53.7, [0, 20, 40, 60]), (0, 32.8, [0, 10, 20, 30, 40]), (0, 100, [0, 20, 40, 60, 80, 100]), (0, 0, [0, 1]),
    (-0.3, 1.1, [-0.5, 0, 0.5, 1, 1.5]), (0, 9.4e-4, [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]),
])
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    np.testing.assert_allclose(report.ticks(low, high), expected, rtol=1e-12)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (40, "40"), (0.25, "0.25"), (-0.5, "-0.5"),
                                              (2e-4, "2e-4"), (1.5e-4, "1.5e-4"), (3 * 2e-4, "6e-4")])
def test_axis_numbers_are_short(value, text):
    assert report.tick(value) == text


def test_class_bars_are_sorted_with_absent_classes_last():
    page = report.class_bars(evaluate.metrics(torch.from_numpy(CONFUSION)), INFO)
    assert titles(page) == [
        "road & <kerb>: IoU 80.00, accuracy 100.00, 50 % of pixels",
        "sky: IoU 75.00, accuracy 75.00, 50 % of pixels",
        "unicorn: IoU -, accuracy -, 0 % of pixels",
    ]
    charts = [ElementTree.fromstring(chart) for chart in re.findall("<svg.*?</svg>", page)]
    lengths = [float(chart.find("rect[@class='mark']").get("width")) for chart in charts]
    np.testing.assert_allclose(np.divide(lengths, lengths[0]), [1, 0.75 / 0.8, 0])


def test_the_confusion_picture_has_a_square_for_each_pair_that_occurs():
    cells = svg(report.confusion_picture(CONFUSION, INFO.classes)).findall("g[@class='cell']")
    strengths = {cell.find("text").text: float(cell.find("rect").get("fill-opacity")) for cell in cells}
    assert strengths == {
        "road & <kerb> seen as road & <kerb>: 100 % of its pixels": 1,
        "sky seen as road & <kerb>: 25 % of its pixels": 0.44,
        "sky seen as sky: 75 % of its pixels": 0.84,
    }


def test_an_images_score_is_the_mean_iou_of_the_classes_in_its_labels():
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 4]])
    assert report.image_score(confusion) == pytest.approx((0.75 + 1) / 2)  # class 1 is predicted only
    assert math.isnan(report.image_score(torch.zeros(3, 3, dtype=torch.int64)))


def test_examples_are_the_worst_and_those_around_the_median_without_repeats():
    scores = [i / 100 for i in range(100)]
    assert report.choose_examples(scores) == (list(range(12)), list(range(44, 56)))
    assert report.choose_examples([0.5, math.nan, 0.1, 0.9], number=2) == ([2, 0], [3])
    assert report.choose_examples([], 12) == ([], [])
    assert report.choose_examples([0.1] * 15) == (list(range(12)), [12, 13, 14])


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
    """The text beside and the address of each picture of a page."""
    return re.findall('<img alt="(.+?)" src="(.+?)">', text)


def test_the_page_is_complete_self_contained_and_escaped(run_folder, capsys):
    assert report.main(["--device", "cpu"]) == 0
    path = run_folder / "report" / "index.html"
    assert capsys.readouterr().out.strip().endswith(str(path))
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]
    text = path.read_text()
    assert text.count("<img") == len(pictures(text)) == 4 * 5  # the 5 worst
    assert all(source.startswith("data:image/jpeg;base64,") for _, source in pictures(text))
    assert "color-scheme: light dark" in text and not re.search("<script|<link rel=.stylesheet|http|<b>road|[$]", text)
    assert "train.py \\\n    --name '<x>'" in html.unescape(text)
    dataset, model = data.open_dataset("set", "val"), weights.load_model(run_folder / "best.pt")[0]
    expected = evaluate.metrics(evaluate.evaluate(model, dataset, progress=False))
    assert f"<b>{100 * expected.mean_iou:.2f}</b>mIoU" in text
    assert f"<b>{100 * expected.all_accuracy:.2f}</b>pixel accuracy" in text
    assert report.main(["first try", "--device", "cpu", "--limit", "2"]) == 0
    text = path.read_text()
    assert text.count("<figure>") == 2 and "2 validation images" in text


def test_an_example_shows_image_labels_prediction_and_errors_in_this_order(run_folder):
    y, x = np.mgrid[:48, :64].astype(np.uint8)
    Image.fromarray(np.stack([4 * x, 5 * y, 2 * x + y], -1)).save("set/images/03.png")
    Image.fromarray(np.uint8([0, 1, 255])[x // 22]).save("set/labels/03.png")
    dataset, guess = data.open_dataset("set", "val"), y // 17
    heading, figure = report.examples(dataset, [3], [0.0] * 4, [b""] * 3 + [zlib.compress(guess)])
    assert re.findall(r"<span>(\w+)</span>", heading) == ["image", "labels", "prediction", "errors"]
    expected = [dataset.image(3), draw.colorize(dataset.labels(3), dataset.info.palette),
                draw.colorize(guess, dataset.info.palette), draw.error_map(dataset.labels(3), guess)]
    for (_, source), picture in zip(pictures(figure), expected, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as shown:
            assert abs(np.asarray(shown).astype(int) - picture).mean() < 10  # JPEG blurs edges; others differ by > 50


@pytest.mark.parametrize(("damage", "arguments", "message"), [
    (None, ["--data", "no"], "no data at no"),
    (None, ["--limit", "0"], "argument --limit: 0 is not a positive whole number"),
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
