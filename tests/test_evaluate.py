"""evaluate.py against arithmetic on small stand-in models, the golden numbers, and other numbers of processes."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NO_FAKE_GPU, OFFICIAL, ROOT, load_golden, noise, official_state
from PIL import Image
from test_checkpoints import context_tree
from test_predict import PALETTE, SMALL, photograph, save_checkpoint, status_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import evaluate
from common import UserError
from evaluate import View, confusion_matrix, metrics, predict, slide, vote
from model import build_model
from tools import tables

assert_exactly = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)


class SmallModel(nn.Module):
    """Scores that depend on the place in the window and on the neighbours, as a segmenter's do."""

    def __init__(self, window=32):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(window=window, num_classes=5, head="upernet", embed_dim=8, depth=1, num_heads=1)
        self.layer = nn.Conv2d(3, 5, 5, padding=2)
        self.place = nn.Parameter(torch.randn(5, window, window))
        self.calls = []

    def forward(self, images):
        assert images.shape[2:] == (self.config.window, self.config.window)
        self.calls.append(len(images))
        return self.layer(images.to(self.place.dtype)) + self.place


def random_image(*size):
    return torch.randn(1, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize(("length", "window", "stride", "starts"), [
    (480, 480, 320, [0]), (481, 480, 320, [0, 1]), (544, 480, 320, [0, 64]), (800, 480, 320, [0, 320]),
    (801, 480, 320, [0, 320, 321]), (131, 96, 64, [0, 35]), (170, 96, 64, [0, 64, 74]),
])
def test_windows_cover_the_image_and_the_last_one_ends_at_the_border(length, window, stride, starts):
    places = evaluate.window_places((window, length), window, stride)
    assert [(rows.start, columns.start, columns.stop) for _, rows, columns in places] == [
        (0, start, start + window) for start in starts]


@pytest.mark.parametrize(("size", "tops", "lefts"), [
    ((32, 32), [0], [0]), ((33, 97), [0, 1], [0, 21, 42, 63, 65]), ((75, 64), [0, 21, 42, 43], [0, 21, 32])])
def test_scores_are_the_mean_over_the_windows_of_each_pixel(size, tops, lefts):
    model, images = SmallModel().double().eval(), torch.randn(2, 3, *size, dtype=torch.float64)
    total, count = torch.zeros(2, 5, *size, dtype=torch.float64), torch.zeros(size)
    for top, left in itertools.product(tops, lefts):
        here = np.s_[..., top : top + 32, left : left + 32]
        total[here] += model(images[here]).detach()
        count[here] += 1
    assert_exactly(slide(model, images, 32, 21), total / count)


def test_batched_windows_of_many_views_give_the_same_as_one_by_one():
    model = SmallModel().double().eval()
    views = [View(random_image(32, 40)), View(random_image(61, 55), True), View(random_image(47, 90))]
    one_by_one = predict(model, views, (37, 53), window_batch=1)
    for window_batch in (2, 5, 64):
        model.calls = []
        assert_exactly(predict(model, views, (37, 53), window_batch), one_by_one)
        assert all(size == window_batch for size in model.calls[:-1])  # only the last batch may be smaller


def test_batches_are_filled_across_images():
    model = SmallModel().eval()
    list(evaluate.predictions(model, [photograph(30, 36, i) for i in range(3)], window_batch=4))
    assert len(model.calls) > 3 and set(model.calls[:-1]) == {4}


def test_sums_are_never_in_half_precision():
    assert slide(SmallModel().half(), random_image(32, 32).half(), 32, 21).dtype == torch.float32


@pytest.mark.parametrize(("size", "window", "message"), [
    ((31, 40), 32, "31x40 image is smaller than the 32x32 window"), ((64, 64), 64, "windows of 32 pixels, not of 64"),
])
def test_an_image_that_the_model_cannot_take_is_refused(size, window, message):
    with pytest.raises(UserError, match=message):
        slide(SmallModel(), torch.zeros(1, 3, *size), window, 21)


@pytest.mark.parametrize(("window", "number"), [(480, 4), (240, 16), (32, 32)])
def test_the_automatic_batch_holds_as_many_pixels_as_four_windows_of_480(window, number):
    assert evaluate.automatic_window_batch(SmallModel(window), "cpu") == number


@pytest.mark.parametrize(("free", "used", "number"), [
    (100, lambda windows: 2 + windows, 48),  # 60 / (10 / 8): what a batch costs once is not counted for every window
    (100, lambda windows: 7 + windows, 7),  # eight would not fit
    (100, lambda windows: 90 * windows, 1),
    (1000, lambda windows: windows, 64),
])
def test_on_cuda_the_batch_takes_60_percent_of_the_free_memory(monkeypatch, free, used, number):
    """A device that is a dictionary: 5 are allocated, 3 more are cached; the first call leaves 1 behind."""
    memory, sizes = {"allocated": 5, "peak": 0}, []

    def model(images):
        sizes.append(len(images))
        memory["peak"] = memory["allocated"] + used(len(images))
        memory["allocated"] = 6

    model.config = SimpleNamespace(window=8)
    monkeypatch.setattr(evaluate.torch, "zeros", lambda *size, device: np.zeros(size))
    for name, answer in [("memory_allocated", lambda _: memory["allocated"]), ("reset_peak_memory_stats", lambda _: 0),
                         ("max_memory_allocated", lambda _: memory["peak"]), ("memory_reserved", lambda _: 9),
                         ("mem_get_info", lambda _: (free - 3, 1000))]:
        monkeypatch.setattr(evaluate.torch.cuda, name, answer)
    assert evaluate.automatic_window_batch(model, "cuda") == number
    assert used(number) <= 0.6 * free or number == 1
    assert sizes[:2] == [1, 1] and max(sizes) <= max(1, number)  # no more than has been found to fit


def test_prefetch_takes_as_many_items_ahead_as_it_is_told_and_stops_when_closed():
    taken, gates = [], [threading.Event() for _ in range(100)]

    def source():
        for i in range(100):
            taken.append(i)
            yield i
            gates[i].set()  # the thread has come back for the next one

    items = evaluate.prefetch(source(), ahead=5)
    assert next(items) == 0
    assert gates[4].wait(10) and not gates[5].wait(0.1) and taken == [0, 1, 2, 3, 4, 5]
    assert [next(items) for _ in range(90)] == list(range(1, 91))
    items.close()
    assert taken[-1] <= 96
    assert list(evaluate.prefetch(iter("abc"), ahead=7)) == list("abc")


@pytest.mark.parametrize("window", [32, 64, 90, 480])
@pytest.mark.parametrize(("multi_scale", "least"), [(False, 4), (True, 44)])
def test_no_image_has_fewer_windows_than_prefetching_counts_on(window, multi_scale, least):
    def windows(size):
        return sum(len(evaluate.window_places(view.image.shape[2:], window, window * 2 // 3))
                   for view in evaluate.make_views(np.zeros((*size, 3), np.uint8), window, multi_scale))

    assert min(map(windows, [(10, 10), (window, window), (100, 100), (50, 60), (40, 700)])) >= least


def test_views_are_one_or_ten_with_the_double_one_counted_twice():
    (view,) = evaluate.make_views(photograph(375, 500), 480, multi_scale=False)
    assert view.image.shape == (1, 3, 544, 704) and not view.flipped and view.weight == 1  # multiples of 32
    views = evaluate.make_views(photograph(375, 500), 480, multi_scale=True)
    sizes = [(480, 640), (520, 693), (650, 867), (780, 1040), (910, 1213)]
    assert [tuple(v.image.shape[2:]) for v in views[::2]] == sizes
    assert [v.weight for v in views] == [2, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert [v.flipped for v in views] == [False, True] * 5
    assert views[3].image.equal(views[2].image.flip(-1))


def test_views_are_resized_soft_maxed_un_mirrored_and_then_averaged_by_weight():
    model, image = SmallModel().double().eval(), random_image(40, 47)
    views = [View(image, False, 2), View(image.flip(-1), True), View(random_image(32, 41))]
    expected = 0
    for view in views:
        scores = slide(model, view.image, 32, 21)
        probabilities = F.interpolate(scores, (55, 61), mode="bilinear", align_corners=False).softmax(1)[0]
        expected = expected + (probabilities.flip(-1) if view.flipped else probabilities) * view.weight / 4
    result = predict(model, views, (55, 61))
    assert_exactly(result, expected)
    assert_exactly(result.sum(0), torch.ones(55, 61, dtype=torch.float64))


@pytest.mark.parametrize("size", [(101, 64), (23, 64), (40, 47)])
def test_strips_of_a_large_picture_are_those_of_the_whole(size, monkeypatch):
    views = [View(torch.empty(1, 3, 40, 47), flipped, weight) for flipped, weight in [(False, 2), (True, 1)]]
    results = [(view, torch.randn(6, 40, 47, dtype=torch.float64)) for view in views]
    (whole,) = vote(iter(results), size, 6)
    monkeypatch.setattr(evaluate, "STRIP", 6 * size[1] * 7)  # seven rows
    strips = list(vote(iter(results), size, 6))
    assert [len(strip[0]) for strip in strips[:-1]] == [7] * (size[0] // 7)
    assert_exactly(torch.cat(strips, 1), whole)


@pytest.mark.parametrize("head", ["mask2former", "upernet"])
def test_golden_sliding_window_single_and_multi_scale(head, golden_model):
    golden = load_golden(f"tiny_{OFFICIAL[head]}_infer.npz")
    model, image = golden_model(head), noise("slide", 1, 3, 131, 170)
    larger = F.interpolate(image, scale_factor=1.25, mode="bilinear", align_corners=False)
    views = [View(image), View(image.flip(-1), True), View(larger), View(larger.flip(-1), True)]
    for actual, name in [
        (slide(model, image, 96, 64), "slide"),
        (predict(model, views[:1], (124, 175))[None], "ss"),
        (predict(model, views, (124, 175))[None], "ms"),
    ]:
        np.testing.assert_allclose(actual.numpy(), golden[name], rtol=0, atol=1e-6 * np.abs(golden[name]).max())


@pytest.mark.parametrize("suffix", ["", "_absent"])
def test_golden_metrics(suffix):
    golden = load_golden("metrics.npz")
    labels, prediction = (torch.from_numpy(golden[name]) for name in ("labels", f"preds{suffix}"))
    if suffix:  # the class that the prediction lacks was taken out of the labels too
        labels[np.isin(labels, np.flatnonzero(np.isnan(golden["iou_absent"])))] = 255
    result = metrics(sum(confusion_matrix(p, t, 9) for p, t in zip(prediction, labels, strict=True)))
    names = {"iou": result.iou, "acc": result.accuracy, "aacc": result.all_accuracy, "miou": result.mean_iou}
    for name, value in (names if suffix else {**names, "macc": result.mean_accuracy}).items():
        np.testing.assert_allclose(value, golden[f"{name}{suffix}"], rtol=0, atol=1e-12)


def test_confusion_counts_rows_of_labels_and_columns_of_predictions_without_the_ignored():
    labels = torch.tensor([[0, 0, 1], [2, 255, 255]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1], [0, 0, 2]])
    assert confusion_matrix(prediction, labels, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert confusion_matrix(prediction, torch.full_like(labels, 255), 3).sum() == 0


@pytest.mark.parametrize(("without", "means"), [
    ([], (14 / 20, (5 / 10 + 6 / 9 + 3 / 7) / 3, (5 / 8 + 6 / 6 + 3 / 6) / 3)),
    ([0], (9 / 12, (6 / 9 + 3 / 7) / 2, (6 / 6 + 3 / 6) / 2)),  # the pixels of class 0 seen as 1 and 2 still count
    ([0, 2], (6 / 6, 6 / 9, 6 / 6)),
    ([0, 1, 2], (np.nan, np.nan, np.nan)),
])
def test_means_without_classes_are_those_of_the_others(without, means):
    confusion = torch.tensor([[5, 2, 1, 0], [0, 6, 0, 0], [2, 1, 3, 0], [0, 0, 0, 0]])  # the last is nowhere
    result = metrics(confusion, without)
    np.testing.assert_allclose(result[3:], means, rtol=1e-12)
    for ours, whole in zip(result[:3], metrics(confusion), strict=False):
        np.testing.assert_array_equal(ours, whole)


ABC = ["sky", "Road", "car"]


@pytest.mark.parametrize(("ours", "theirs", "order"), [
    (ABC, ABC, [0, 1, 2]), (ABC, ["car", "sky", "Road"], [2, 0, 1]), (ABC, ["SKY ", "road", " Car"], [0, 1, 2]),
    (["Car", "car", "sky"], ["sky", "car", "Car"], [2, 1, 0]),  # two classes that only their case tells apart
    (["Car", "car", "sky"], ["sky", "car", "CAR"], None), (ABC, ["sky", "road", "bus"], None), (ABC, ABC[:2], None),
    (ABC, ["sky", "sky", "road"], None), (["Straße", "été"], ["ÉTÉ", "STRASSE"], [1, 0]),
])
def test_classes_are_matched_by_name(ours, theirs, order):
    assert evaluate.class_order(ours, theirs) == order


@pytest.fixture
def folder(tmp_path):
    """A plain folder of seven images of three sizes and five classes, with ignored pixels."""
    rng = np.random.default_rng(3)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for i, (h, w) in enumerate([(40, 52), (52, 40), (33, 64), (40, 52), (40, 52), (52, 40), (45, 45)]):
        Image.fromarray(photograph(h, w, i)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(rng.choice(np.uint8([0, 1, 2, 3, 4, 255]), (h, w))).save(tmp_path / "labels" / f"{i}.png")
    (tmp_path / "val.txt").write_text("\n".join("0123456"))
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": list("abcde"), "palette": PALETTE}))
    return tmp_path


@pytest.fixture
def dataset(folder):
    return data.open_dataset(folder, "val")


def test_evaluate_counts_every_labelled_pixel_once_and_keeps_the_training_mode(dataset):
    model = SmallModel().train()
    for limit, number in [(None, 7), (2, 2)]:
        confusion = evaluate.evaluate(model, dataset, limit=limit)
        labels = np.concatenate([dataset.labels(i).ravel() for i in range(number)])
        assert confusion.sum(1).tolist() == [(labels == k).sum() for k in range(5)]
    assert model.training


def test_evaluate_agrees_with_predicting_each_picture_by_itself(dataset):
    model, saved = SmallModel().double().eval(), {}
    confusion = evaluate.evaluate(model, dataset, multi_scale=True, save=saved.__setitem__)
    total = torch.zeros(5, 5, dtype=torch.int64)
    for i in range(7):
        image = dataset.image(i)
        views = evaluate.make_views(image, 32, multi_scale=True)
        prediction = predict(model, views, image.shape[:2], window_batch=1).argmax(0)
        assert (prediction.numpy() == saved[i]).all()
        total += confusion_matrix(prediction, torch.from_numpy(dataset.labels(i)), 5)
    assert confusion.equal(total)


class Copies(TorchDispatchMode):
    """Copies from one device to another, as (from, to, whether the host goes on at once)."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = [x.device.type for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor) and x.dim()]
        if len(set(devices)) > 1:  # an operator of tensors on two devices copies one of them unseen
            self.made.append((devices[0], devices[-1], (kwargs or {}).get("non_blocking", False)))
        return result


@NO_FAKE_GPU
@pytest.mark.parametrize("strip", [evaluate.STRIP, 5 * 52 * 7])
@pytest.mark.parametrize("multi_scale", [False, True])
def test_on_a_gpu_the_host_waits_for_the_counts_at_the_end_alone(dataset, monkeypatch, multi_scale, strip):
    """On fake CUDA tensors: code that reads one of their values raises. Images and labels come from pinned memory."""
    pinned, reduced = [], []
    monkeypatch.setattr(evaluate, "STRIP", strip)
    monkeypatch.setattr(evaluate, "prefetch", lambda items, ahead: items)  # a thread would have no fake tensors
    monkeypatch.setattr(data, "resize", unset_fake_temporarily()(data.resize))  # on the host, with values
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)
    for name, answer in [("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)]:
        monkeypatch.setattr(evaluate.dist, name, lambda answer=answer: answer)
    monkeypatch.setattr(evaluate.dist, "all_reduce", reduced.append)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), Copies() as copies:
        model = SmallModel()
        evaluate.match_classes(model, dataset.info, list("edcba"))  # scores change their order
        copies.made.clear()
        evaluate.evaluate(model, dataset, multi_scale=multi_scale, device="cuda", window_batch=4)
    views = 5 if multi_scale else 1
    assert len(pinned) == 4 * (views + 1)  # process 0 has four of the seven images
    assert copies.made == [("cpu", "cuda", True)] * len(pinned) + [("cuda", "cpu", False)]
    assert [counts.device.type for counts in reduced] == ["cpu"]  # for gloo


@NO_FAKE_GPU
@pytest.mark.filterwarnings("ignore")  # of CUDA and its operator, which need not be here
@pytest.mark.parametrize("head", ["mask2former", "upernet"])
def test_scores_of_a_segmenter_wait_for_nothing(head, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # it reads values
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), Copies() as copies:
        scores = build_model(head, "tiny", 5, **SMALL).eval()(torch.zeros(2, 3, 64, 64))
    assert scores.device.type == "cuda" and scores.shape == (2, 5, 64, 64) and not copies.made


def test_images_and_labels_are_read_in_one_thread_beside_the_model(dataset, monkeypatch):
    readers = []
    for name in ("image", "labels"):
        read = getattr(dataset, name)
        monkeypatch.setattr(dataset, name, lambda i, read=read: readers.append(threading.get_ident()) or read(i))
    evaluate.evaluate(SmallModel(), dataset)
    assert len(readers) == 14 and len(set(readers)) == 1 and threading.get_ident() not in readers


def test_progress_shows_the_time_left_and_the_running_miou_on_a_terminal_only(dataset, monkeypatch, capsys):
    evaluate.evaluate(SmallModel(), dataset)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(evaluate, "tqdm", functools.partial(evaluate.tqdm, mininterval=0))
    reads = []
    monkeypatch.setattr(evaluate, "metrics", lambda counts: reads.append(counts) or metrics(counts))
    confusion = evaluate.evaluate(SmallModel(), dataset)
    assert len(reads) == 2  # the first and the last image, and each five seconds: the host waits for the device there
    lines = capsys.readouterr().err.split("\r")
    assert "7/7" in lines[-1] and f"mIoU={100 * metrics(confusion).mean_iou:.1f}" in lines[-1]
    assert any(re.search(r"1/7 \[00:0\d<00:0\d", line) for line in lines)  # time gone < time left


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_any_number_of_processes_gives_the_same_confusion_matrix(dataset, monkeypatch, processes):
    """One after the other, each process does its share of the seven images; all_reduce would add them up."""
    alone, shares = evaluate.evaluate(SmallModel(), dataset, multi_scale=True), []
    monkeypatch.setattr(evaluate.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluate.dist, "get_world_size", lambda: processes)
    monkeypatch.setattr(evaluate.dist, "all_reduce", shares.append)
    for rank in range(processes):
        monkeypatch.setattr(evaluate.dist, "get_rank", lambda rank=rank: rank)
        evaluate.evaluate(SmallModel(), dataset, multi_scale=True)
    assert len(shares) == processes and sum(shares).equal(alone)


def test_the_command_under_torchrun_writes_what_it_writes_alone(folder):
    """Multi-scale, two processes, seven images: one table, one JSON file, label images from both processes."""
    save_checkpoint(folder / "best.pt", "upernet", list("abcde"), window=32)
    options = ["--ms", "--checkpoint", f"{folder}/best.pt", "--data", f"{folder}", "--device", "cpu"]
    assert evaluate.main([*options, "--json", f"{folder}/alone.json"]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", ROOT / "evaluate.py",
         *options, "--json", folder / "both.json", "--save-labels", folder / "out"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    alone, both = (json.loads((folder / f"{name}.json").read_text()) for name in ("alone", "both"))
    assert (alone["environment"].pop("devices"), both["environment"].pop("devices")) == (1, 2)
    for name in alone.keys() - {"environment", "date", "seconds", "images_per_second"}:
        assert alone[name] == both[name], name
    assert done.stdout.count("mIoU") == 1 and len(list((folder / "out").iterdir())) == 7


@pytest.fixture
def command(folder, tmp_path_factory, monkeypatch):
    """command(options) -> exit status, in a folder with runs/old and runs/new, whose checkpoints hold a SmallModel."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    for time, name in [(10, "old"), (20, "new")]:
        run = Path("runs", name)
        run.mkdir(parents=True)
        (run / "best.pt").touch()
        os.utime(run / "best.pt", (time, time))
        (run / "config.json").write_text(json.dumps({"data": str(folder)}))
    monkeypatch.setattr(evaluate.weights, "read_weights", lambda _: SimpleNamespace(kind="ours"))
    monkeypatch.setattr(evaluate.weights, "make_model", lambda _: (SmallModel(), {"classes": list("abcde")}))
    return lambda options: status_of(evaluate.main, "--device", "cpu", *options.split())


def test_command_takes_the_newest_run_and_writes_table_json_and_labels(command, dataset, capsys):
    assert command("--json out/result.json --save-labels labels --limit 3") == 0
    output = capsys.readouterr().out
    confusion = evaluate.evaluate(SmallModel(), dataset, limit=3)
    assert output.startswith("runs/new/best.pt on ") and tables.table(metrics(confusion), "abcde") in output
    result = json.loads(Path("out/result.json").read_text())
    assert result["mean_iou"] == pytest.approx(metrics(confusion).mean_iou)
    assert [c["class"] for c in result["classes"]] == list("abcde")
    assert sorted(os.listdir("labels")) == ["0.png", "1.png", "2.png"]
    total = torch.zeros(5, 5, dtype=torch.int64)
    for i in range(3):
        with Image.open(f"labels/{i}.png") as picture:
            assert picture.mode == "P" and picture.getpalette()[:3] == PALETTE[0]
            total += confusion_matrix(torch.from_numpy(np.array(picture)), torch.from_numpy(dataset.labels(i)), 5)
    assert total.equal(confusion)


def test_a_table_to_be_pasted_is_alone_on_stdout_and_the_rest_on_stderr(command, dataset, capsys):
    Path("runs/new/config.json").write_text(json.dumps({"data": str(dataset.root), "environment": {"torch": "0.1"}}))
    result = metrics(evaluate.evaluate(SmallModel(), dataset))
    for form in ("markdown", "csv", "latex"):
        assert command(f"--table {form} --without b") == 0
        output = capsys.readouterr()
        assert output.out == tables.class_table(result, "abcde", form)
        note, title, means, without = output.err.splitlines()
        assert note == f"note: torch: {torch.__version__}, but 0.1 when the run began"
        assert title == "runs/new/best.pt on " + dataset.info.name + " val, single-scale"
        assert means == tables.summary(result) and without.endswith("without b")
    assert command("--table html") == 2
    assert "invalid choice: 'html'" in capsys.readouterr().err


WINDOWS = {"window": 32, "stride": 21, "short_side": 35}  # of a SmallModel


def test_evaluation_json_holds_what_a_paper_needs(command, dataset, capsys):
    Path("runs/new/best.pt").write_bytes(b"weights")
    start = datetime.now(UTC).replace(microsecond=0)
    assert command("--ms --amp --no-fast") == 0
    found = json.loads(Path("runs/new/evaluation-ms.json").read_text())
    confusion = evaluate.evaluate(SmallModel(), dataset, multi_scale=True, amp=torch.bfloat16)
    assert found["mean_iou"] == pytest.approx(metrics(confusion).mean_iou, abs=0.01)
    assert found["environment"] == evaluate.run.environment(torch.device("cpu"), 1)
    assert start <= datetime.fromisoformat(found["date"]) <= datetime.now(UTC)
    assert found["images_per_second"] == pytest.approx(7 / found["seconds"])
    expected = {
        "checkpoint": "runs/new/best.pt", "sha256": hashlib.sha256(b"weights").hexdigest(), "kind": "ours",
        "iteration": None, "head": "upernet", "size": "custom", "data": str(dataset.root), "split": "val", "images": 7,
        "data_fingerprint": dataset.fingerprint(), "scales": "multi-scale + flip", "precision": "bfloat16",
        "fast": False, "published_mean_iou": None,
        "views": {"ratios": [0.5, 0.75, 1, 1.25, 1.5, 1.75], "flip": True, **WINDOWS},
    }
    assert {name: found[name] for name in expected} == expected
    assert command("") == 0 and command("--limit 2") == 0 and command("--limit 3 --json part.json") == 0
    whole, part = (json.loads(Path(name).read_text()) for name in ("runs/new/evaluation.json", "part.json"))
    assert (whole["images"], part["images"]) == (7, 3)  # two images replace nothing
    assert whole["views"] == {"ratios": [1], "flip": False, **WINDOWS}
    assert (whole["precision"], whole["fast"], whole["scales"]) == ("float32", True, "single-scale")
    assert set(os.listdir("runs/new")) == {"best.pt", "config.json", "evaluation.json", "evaluation-ms.json"}


def test_numbers_that_cannot_stand_beside_the_checkpoint_are_a_warning(command, capsys):
    Path("runs/new/evaluation.json").mkdir()
    assert command("") == 0
    warning, *rest = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: the numbers are not written: runs/new/evaluation.json is a folder")
    assert rest[-1].startswith("aAcc ")


def write_released(path: Path) -> None:
    """A UperNet of 59 classes in the official names."""
    state = official_state("upernet")
    for name in state:
        if "conv_seg" in name:
            state[name] = torch.zeros(59, *state[name].shape[1:])
    path.parent.mkdir(parents=True)
    torch.save({"meta": {"iter": 7}, "state_dict": state}, path)


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A folder with Pascal Context's two images at the usual place, and a table with the model upernet-custom."""
    monkeypatch.chdir(tmp_path)
    context_tree(data.CONTEXT, "val", 2)
    table = {"addresses": ["http://127.0.0.1:9/x"], "path": "checkpoints/x/x.pth", "what": "x", "published": [60, 61.5]}
    photographs, labels = ({**table, "path": f"{data.CONTEXT}/{name}"} for name in ("x.tar", "x.json"))
    Path("table.json").write_text(json.dumps(
        {"checkpoint:upernet-custom": table, "voc2010": photographs, "context": labels}))
    monkeypatch.setenv("FETCH_SOURCES", "table.json")
    monkeypatch.setattr(evaluate.checkpoints.fetch, "fetch",
                        lambda names: write_released(Path("checkpoints/x/x.pth")), raising=False)
    return lambda options: status_of(evaluate.main, "--device", "cpu", *options.split())


def test_a_released_model_is_fetched_and_compared_on_pascal_context(released, capsys):
    assert released("--checkpoint upernet-custom --yes") == 0
    output = capsys.readouterr().out.splitlines()
    assert output[-1].startswith("mIoU single-scale   published 60.0   here ")
    assert output[-1].endswith(" (on 2 images, not 5,105)")
    found = json.loads(Path("checkpoints/x/evaluation.json").read_text())
    assert (found["kind"], found["iteration"], found["published_mean_iou"]) == ("released", 7, 0.6)
    for options, score in [("--ms", 61.5), ("", 60.0)]:  # by path it is known by its content, and needs no --data
        shutil.copy("checkpoints/x/x.pth", "renamed file")
        assert evaluate.main(["--checkpoint", "renamed file", "--device", "cpu", *options.split()]) == 0
        assert f"published {score}   here " in capsys.readouterr().out


def test_other_images_are_not_compared(released, capsys):
    write_released(Path("checkpoints/x/x.pth"))
    (data.CONTEXT / "ImageSets/SegmentationContext/test.txt").write_text("2008_0")
    shutil.copytree(data.CONTEXT, "plain")
    for old, new in [("JPEGImages", "images"), ("SegmentationClassContext", "labels")]:
        Path("plain", old).rename(f"plain/{new}")
    for image in Path("plain/labels").iterdir():
        Image.fromarray(np.array(Image.open(image)) - np.uint8(1)).save(image)  # 0 is no class there, 255 here
    Path("plain/val.txt").write_text("2008_0")
    Path("plain/dataset.json").write_text(json.dumps({"classes": data.context_info().classes}))
    for options in ("--limit 2", "--split test", "--data plain"):
        assert released(f"--checkpoint upernet-custom {options}") == 0
        assert "published" not in capsys.readouterr().out


def test_a_file_without_a_head_is_told_before_its_data_is_asked_for(released, capsys):
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(3, 1)}, "beit.pth")
    assert released("--checkpoint beit.pth") == 2
    assert "beit.pth: BEiT pre-training has no segmentation head" in capsys.readouterr().err


def test_absent_checkpoint_and_data_are_told_at_once_before_anything_is_fetched(released, capsys):
    shutil.rmtree("data")
    assert released("--checkpoint upernet-custom --yes") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"no data at {data.CONTEXT}" in error and not Path("checkpoints").exists()
    assert error.endswith("the checkpoint is absent too: `python data.py fetch checkpoint:upernet-custom`\n")


FETCHING = """
import sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from test_evaluate import Path, UserError, write_released
from tools import fetch
def fake(names):
    print("fetching", *names, file=sys.stderr)
    time.sleep(1)
    {act}
fetch.fetch = fake
import evaluate
sys.exit(evaluate.main())
"""


@pytest.mark.parametrize(("act", "status"), [
    ("write_released(Path('draft/x')); Path('draft').rename('checkpoints')", 0),
    pytest.param("raise UserError('the network is gone')", 1, marks=pytest.mark.slow)])
def test_under_torchrun_one_process_fetches_and_if_it_fails_all_end(released, act, status):
    table = json.loads(Path("table.json").read_text())
    table["checkpoint:upernet-custom"]["path"] = "checkpoints/x"
    Path("table.json").write_text(json.dumps(table))
    Path("go.py").write_text(FETCHING.format(root=str(ROOT), act=act))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "go.py",
         "--device", "cpu", "--checkpoint", "upernet-custom", "--yes"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("fetching checkpoint:upernet-custom") == 1
    assert done.stdout.count("mIoU single-scale") == (status == 0)
    assert done.stderr.count("error: the network is gone") == status


ORDER = [3, 0, 4, 1, 2]  # the data set's index of each of the checkpoint's classes a, b, c, d, e
SHUFFLED = ["B", "D ", "E", "A", "C"]


def copy_with_classes(root: Path, name: str, classes: list[str], order: list[int]) -> None:
    """A copy of the data set whose class k has the index order[k] in the labels."""
    shutil.copytree(root, name, ignore=shutil.ignore_patterns("runs"))
    for path in Path(name, "labels").iterdir():
        values = np.uint8([*order, *range(5, 256)])[np.array(Image.open(path))]
        Image.fromarray(values).save(path)
    palette = [PALETTE[order.index(k)] for k in range(5)]
    Path(name, "dataset.json").write_text(json.dumps({"classes": classes, "palette": palette}))


def test_a_data_set_in_another_order_gives_the_same_table_and_labels_in_its_own_order(command, dataset, capsys):
    copy_with_classes(dataset.root, "other", SHUFFLED, ORDER)
    (Path("other") / "val.txt").rename("other/held out.txt")
    assert command("--save-labels own --json own.json --without b") == 0
    plain = capsys.readouterr().out.splitlines()
    options = ["--data", "other", "--split", "held out", "--save-labels", "shuffled", "--json", "shuffled.json"]
    assert evaluate.main([*options, "--device", "cpu", "--without", "b"]) == 0
    note, title, *rest = capsys.readouterr().out.splitlines()
    assert note == "other has the checkpoint's classes in another order or case: they are matched by name"
    assert title == "runs/new/best.pt on other held out, single-scale" and rest == plain[1:]
    assert re.fullmatch(r"aAcc [\d.]+   mIoU [\d.]+   mAcc [\d.]+   without b", rest[-1])
    own, shuffled = (json.loads(Path(name).read_text()) for name in ("own.json", "shuffled.json"))
    assert own["classes"] == shuffled["classes"] and own["mean_iou"] == shuffled["mean_iou"]
    ious = {one["class"]: one["iou"] for one in own["classes"]}
    assert own["without"]["classes"] == ["b"]
    assert own["without"]["mean_iou"] == pytest.approx(np.mean([ious[name] for name in "acde"]))
    for path in Path("own").iterdir():  # the data set's own indices and colours: they compare with its label files
        with Image.open(path) as ours, Image.open(Path("shuffled", path.name)) as theirs:
            np.testing.assert_array_equal(np.array(theirs), np.uint8(ORDER)[np.array(ours)])
            np.testing.assert_array_equal(theirs.convert("RGB"), ours.convert("RGB"))


@pytest.mark.parametrize(("classes", "order", "note"), [
    (data.context_info().classes, list(range(59)), ""),
    (data.context_info().classes[::-1], list(range(59))[::-1], "matched by name"),
    ([f"class {k}" for k in range(59)], list(range(59)), "the checkpoint names no classes: mine's are taken"),
])
def test_a_checkpoint_that_names_no_classes_is_for_pascal_context(capsys, classes, order, note):
    model = SmallModel()
    model.config.num_classes = 59
    info = data.context_info()._replace(name="mine", classes=tuple(classes))
    assert evaluate.match_classes(model, info, None)["order"] == order
    assert note in capsys.readouterr().out.strip() if note else capsys.readouterr().out == ""


@pytest.mark.parametrize(("options", "message"), [
    ("--data nowhere", "no data at nowhere"),
    ("--data seven", "has 7 classes, the checkpoint 5"),
    ("--data renamed", "renamed has ['X'] where the checkpoint has ['c']: evaluate it on data of its classes"),
    ("--split nowhere", "nowhere.txt"),
    ("--without a X", "--without X: no class has this name; the classes are a, b, c, d, e"),
    ("--checkpoint runs/alone.pt", "runs/config.json does not tell the data of alone.pt"),
    ("--device abacus", "device 'abacus' cannot be used here"),
    ("--original-ids --save-labels x", "has no original ids"),
    ("--save-labels file", "--save-labels file cannot be used as a folder (File exists)"),
    ("--save-labels file/x", "--save-labels file/x cannot be used as a folder (Not a directory)"),
    ("--json runs", "--json runs is a folder"),
    ("--json file/x", "--json file cannot be used as a folder (File exists)"),
    ("--limit none", "none is not a positive whole number"),
    ("--bogus", "unrecognized arguments: --bogus"),
])
def test_user_errors_are_one_line_and_status_2(command, dataset, capsys, monkeypatch, options, message):
    Path("file").touch()
    Path("runs/alone.pt").touch()
    for name, classes in [("seven", "abcdefg"), ("renamed", "abXde")]:
        shutil.copytree(dataset.root, name)
        Path(name, "dataset.json").write_text(json.dumps({"classes": list(classes)}))
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: pytest.fail("the work began"))
    assert command(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert sorted(os.listdir()) == ["file", "renamed", "runs", "seven"]


def test_without_a_run_the_error_tells_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([]) == 2
    assert "train first (python train.py --data toy) or name a --checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "expected"), [
    ("", [True, True]), ("--no-tf32", [False, True]), ("--no-fast", [True, False])])
def test_tf32_and_the_fast_text_are_on_unless_refused(command, monkeypatch, option, expected):
    used = []
    monkeypatch.setattr(evaluate.common, "allow_tf32", used.append)
    monkeypatch.setattr(evaluate, "inference", lambda _, fast: contextlib.nullcontext(used.append(fast)))
    assert command(f"--limit 1 {option}") == 0 and used == expected
