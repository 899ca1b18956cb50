"""evaluate.py against arithmetic on small stand-in models, the golden numbers, and other numbers of processes."""

import functools
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import noise
from PIL import Image
from torch import nn

import data
import evaluate
from common import UserError
from evaluate import View, confusion_matrix, metrics, predict, slide, vote, window_starts
from model import build_model

GOLDEN = Path(__file__).parent / "golden"
REPOSITORY = Path(__file__).parents[1]


class PixelModel(nn.Module):
    """Scores that depend on a pixel alone: windows, batches and their order cannot matter."""

    def __init__(self, window=32, num_classes=5, seed=0):
        super().__init__()
        self.config = SimpleNamespace(window=window, num_classes=num_classes)
        self.layer = nn.Conv2d(3, num_classes, 1)
        generator = torch.Generator().manual_seed(seed)
        self.layer.weight.data = torch.randn(num_classes, 3, 1, 1, generator=generator)
        self.layer.bias.data.zero_()
        self.calls = []

    def forward(self, images):
        assert images.shape[2:] == (self.config.window, self.config.window)
        self.calls.append(len(images))
        return self.layer(images.to(self.layer.weight.dtype))


class PlaceModel(PixelModel):
    """Scores that also depend on the place in the window and on the neighbours, as a segmenter's do."""

    def __init__(self, window=32, num_classes=5, seed=0):
        super().__init__(window, num_classes, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        self.layer = nn.Conv2d(3, num_classes, 5, padding=2, bias=False)
        self.layer.weight.data = torch.randn(num_classes, 3, 5, 5, generator=generator) / 5
        self.place = nn.Parameter(torch.randn(num_classes, window, window, generator=generator))

    def forward(self, images):
        return super().forward(images) + self.place


def photograph(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------- sliding windows


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [
        (480, 480, 320, [0]),
        (481, 480, 320, [0, 1]),
        (544, 480, 320, [0, 64]),
        (800, 480, 320, [0, 320]),
        (801, 480, 320, [0, 320, 321]),
        (131, 96, 64, [0, 35]),
        (170, 96, 64, [0, 64, 74]),
    ],
)
def test_windows_cover_the_image_and_the_last_one_ends_at_the_border(length, window, stride, starts):
    assert window_starts(length, window, stride) == starts


@pytest.mark.parametrize("size", [(32, 32), (33, 97), (75, 64)])
def test_sliding_a_model_of_single_pixels_equals_running_it_on_the_whole_image(size):
    model = PixelModel().double().eval()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(slide(model, image, 32, 21), model.layer(image), rtol=0, atol=1e-12)


def test_overlapping_windows_are_averaged_pixel_by_pixel():
    model = PlaceModel().double().eval()
    image = torch.randn(1, 3, 50, 71, dtype=torch.float64)
    total, count = torch.zeros(1, 5, 50, 71, dtype=torch.float64), torch.zeros(50, 71)
    for top in (0, 18):
        for left in (0, 21, 39):
            total[..., top : top + 32, left : left + 32] += model(image[..., top : top + 32, left : left + 32])
            count[top : top + 32, left : left + 32] += 1
    torch.testing.assert_close(slide(model, image, 32, 21), (total / count).detach(), rtol=0, atol=1e-12)


def test_batched_windows_of_many_views_give_the_same_as_one_by_one():
    model = PlaceModel().double().eval()
    views = [
        View(torch.randn(1, 3, h, w, dtype=torch.float64), f)
        for h, w, f in [(32, 40, False), (61, 55, True), (47, 90, False)]
    ]
    model.calls = []
    one_by_one = predict(model, views, (37, 53), window_batch=1)
    assert set(model.calls) == {1}
    for window_batch in (2, 5, 64):
        model.calls = []
        torch.testing.assert_close(predict(model, views, (37, 53), window_batch), one_by_one, rtol=0, atol=1e-12)
        assert all(size == window_batch for size in model.calls[:-1])  # only the last batch may be smaller


def test_batches_are_filled_across_images():
    model = PixelModel().eval()
    list(evaluate.predictions(model, [photograph(30, 36, i) for i in range(3)], window_batch=4))
    windows = sum(model.calls)
    assert model.calls == [4] * (windows // 4) + ([windows % 4] if windows % 4 else [])


def test_an_image_smaller_than_the_window_is_refused_in_one_line():
    with pytest.raises(UserError, match="31x40 image is smaller than the 32x32 window"):
        slide(PixelModel(), torch.zeros(1, 3, 31, 40), 32, 21)
    with pytest.raises(UserError, match="windows of 32 pixels, not of 64"):
        slide(PixelModel(), torch.zeros(1, 3, 64, 64), 64, 42)


def test_the_automatic_batch_holds_as_many_pixels_as_four_windows_of_480():
    assert evaluate.automatic_window_batch(PixelModel(480), "cpu") == 4
    assert evaluate.automatic_window_batch(PixelModel(240), "cpu") == 16
    assert evaluate.automatic_window_batch(PixelModel(32), "cpu") == 32


# ----------------------------------------------------------------------------------------- views and voting


def test_multi_scale_views_are_ten_with_the_double_one_counted_twice():
    views = evaluate.make_views(photograph(375, 500), 480, multi_scale=True)
    assert [tuple(v.image.shape[2:]) for v in views[::2]] == [
        (480, 640),
        (520, 693),
        (650, 867),
        (780, 1040),
        (910, 1213),
    ]
    assert [v.weight for v in views] == [2, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert [v.flipped for v in views] == [False, True] * 5
    torch.testing.assert_close(views[3].image, views[2].image.flip(-1), rtol=0, atol=0)


def test_the_single_scale_view_has_sides_in_multiples_of_32():
    (view,) = evaluate.make_views(photograph(375, 500), 480, multi_scale=False)
    assert view.image.shape == (1, 3, 544, 704) and not view.flipped and view.weight == 1


def test_views_counted_twice_weigh_as_two():
    model = PlaceModel().double().eval()
    small, large = (torch.randn(1, 3, n, n + 9, dtype=torch.float64) for n in (32, 44))
    twice = predict(model, [View(small), View(small), View(large)], (30, 40))
    torch.testing.assert_close(
        predict(model, [View(small, False, 2), View(large)], (30, 40)), twice, rtol=0, atol=1e-12
    )


def test_views_are_resized_soft_maxed_un_mirrored_and_then_averaged():
    model = PlaceModel().double().eval()
    image = torch.randn(1, 3, 40, 47, dtype=torch.float64)
    expected = 0
    for flipped in (False, True):
        scores = slide(model, image.flip(-1) if flipped else image, 32, 21)
        probabilities = F.interpolate(scores, (55, 61), mode="bilinear", align_corners=False).softmax(1)
        expected = expected + (probabilities.flip(-1) if flipped else probabilities) / 2
    result = predict(model, [View(image), View(image.flip(-1), True)], (55, 61))
    torch.testing.assert_close(result, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(result.sum(0), torch.ones(55, 61, dtype=torch.float64))


@pytest.mark.parametrize("size", [(101, 64), (23, 64), (40, 47)])
def test_strips_of_a_large_picture_are_those_of_the_whole(size):
    views = [View(torch.empty(1, 3, 40, 47), flipped, weight) for flipped, weight in [(False, 2), (True, 1)]]
    scores = torch.randn(2, 6, 40, 47, dtype=torch.float64)
    results = [evaluate.Result(evaluate.Job(0, size, v), s) for v, s in zip(views, scores, strict=True)]
    (whole,) = vote(iter(results), size, 6)
    strips = list(vote(iter(results), size, 6, strip=6 * 64 * 7))
    assert len(strips) == -(-size[0] // (6 * 64 * 7 // (6 * size[1])))
    torch.testing.assert_close(torch.cat(strips, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", ["mask2former", "upernet"])
def test_golden_sliding_window_single_and_multi_scale(head, golden_model):
    golden = np.load(GOLDEN / f"tiny_{'m2f' if head == 'mask2former' else head}_infer.npz")
    model, image = golden_model(head), noise("slide", 1, 3, 131, 170)
    larger = F.interpolate(image, scale_factor=1.25, mode="bilinear", align_corners=False)
    views = [View(image), View(image.flip(-1), True), View(larger), View(larger.flip(-1), True)]
    for actual, name in [
        (slide(model, image, 96, 64), "slide"),
        (predict(model, views[:1], (124, 175))[None], "ss"),
        (predict(model, views, (124, 175))[None], "ms"),
    ]:
        np.testing.assert_allclose(actual.numpy(), golden[name], rtol=0, atol=1e-6 * np.abs(golden[name]).max())


# ----------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("suffix", ["", "_absent"])
def test_golden_metrics(suffix):
    golden = np.load(GOLDEN / "metrics.npz")
    labels, prediction = (torch.from_numpy(golden[name]) for name in ("labels", f"preds{suffix}"))
    absent = suffix and np.isnan(golden["iou_absent"])
    if suffix:  # the class that the prediction lacks was taken out of the labels too
        labels = labels.clone()
        labels[np.isin(labels, np.flatnonzero(absent))] = 255
    result = metrics(sum(confusion_matrix(p, t, 9) for p, t in zip(prediction, labels, strict=True)))
    np.testing.assert_allclose(result.iou, golden[f"iou{suffix}"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.accuracy, golden[f"acc{suffix}"], rtol=0, atol=1e-12)
    assert result.all_accuracy == pytest.approx(float(golden[f"aacc{suffix}"]), abs=1e-12)
    assert result.mean_iou == pytest.approx(float(golden[f"miou{suffix}"]), abs=1e-12)
    if not suffix:
        assert result.mean_accuracy == pytest.approx(float(golden["macc"]), abs=1e-12)


def test_confusion_counts_rows_of_labels_and_columns_of_predictions_without_the_ignored():
    labels = torch.tensor([[0, 0, 1], [2, 255, 255]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1], [0, 0, 2]])
    assert confusion_matrix(prediction, labels, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert confusion_matrix(prediction, torch.full_like(labels, 255), 3).sum() == 0


def test_table_shows_percent_and_a_dash_for_a_class_that_is_nowhere():
    text = evaluate.table(metrics(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])), ["sky", "road", "unicorn"])
    assert [line.split() for line in text.splitlines()[2:5]] == [
        ["sky", "75.00", "75.00", "4"], ["road", "80.00", "100.00", "4"], ["unicorn", "-", "-", "0"]]
    assert text.splitlines()[-1] == "aAcc 87.50   mIoU 77.50   mAcc 87.50"


# ------------------------------------------------------------------------------------------------- evaluate()


@pytest.fixture
def folder(tmp_path):
    """A plain folder of seven images of three sizes and five classes, with ignored pixels."""
    rng = np.random.default_rng(3)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for i, (h, w) in enumerate([(40, 52), (52, 40), (33, 64), (40, 52), (40, 52), (52, 40), (45, 45)]):
        Image.fromarray(photograph(h, w, i)).save(tmp_path / "images" / f"{i}.png")
        labels = rng.choice([0, 1, 2, 3, 4, 255], (h, w)).astype(np.uint8)
        Image.fromarray(labels).save(tmp_path / "labels" / f"{i}.png")
    (tmp_path / "val.txt").write_text("\n".join("0123456"))
    palette = [[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30], [30, 200, 200]]
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": list("abcde"), "palette": palette}))
    return tmp_path


def test_evaluate_counts_every_labelled_pixel_once_and_keeps_the_training_mode(folder):
    dataset, model = data.open_dataset(folder, "val"), PlaceModel().train()
    confusion = evaluate.evaluate(model, dataset, progress=False)
    labels = np.concatenate([dataset.labels(i).ravel() for i in range(7)])
    assert confusion.sum(1).tolist() == [(labels == k).sum() for k in range(5)]
    assert model.training
    first = evaluate.evaluate(model, dataset, limit=2, progress=False)
    assert first.sum() == sum((dataset.labels(i) != 255).sum() for i in range(2))


def test_evaluate_agrees_with_predicting_each_picture_by_itself(folder):
    dataset, model = data.open_dataset(folder, "val"), PlaceModel().double().eval()
    saved = {}
    confusion = evaluate.evaluate(
        model, dataset, multi_scale=True, progress=False, save=lambda i, p: saved.update({i: p})
    )
    total = torch.zeros(5, 5, dtype=torch.int64)
    for i in range(7):
        image = dataset.image(i)
        views = evaluate.make_views(image, 32, multi_scale=True)
        prediction = predict(model, views, image.shape[:2], window_batch=1).argmax(0)
        assert (prediction.numpy() == saved[i]).all()
        total += confusion_matrix(prediction, torch.from_numpy(dataset.labels(i)), 5)
    assert confusion.equal(total)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_the_time_left_and_the_running_miou_on_a_terminal_only(folder, monkeypatch, capsys):
    dataset = data.open_dataset(folder, "val")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(evaluate, "tqdm", functools.partial(evaluate.tqdm, mininterval=0))
    confusion = evaluate.evaluate(PlaceModel(), dataset)
    last = sys.stderr.getvalue().split("\r")[-1]
    assert "7/7" in last and f"mIoU={100 * metrics(confusion).mean_iou:.2f}" in last
    assert re.search(r"1/7 \[00:0\d<00:0\d", sys.stderr.getvalue())  # time gone < time left
    monkeypatch.undo()
    evaluate.evaluate(PlaceModel(), dataset)
    assert capsys.readouterr().err == ""


WORKER = """
import sys, torch, data, evaluate
import torch.distributed as dist
from test_evaluate import PlaceModel
dist.init_process_group("gloo")
dataset = data.open_dataset(sys.argv[1], "val")
confusion = evaluate.evaluate(PlaceModel().eval(), dataset, multi_scale=True, progress=False)
if dist.get_rank() == 0:
    torch.save(confusion, sys.argv[2])
dist.destroy_process_group()
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_confusion_matrix(folder, processes):
    (folder / "worker.py").write_text(WORKER)
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone",
               str(folder / "worker.py"), str(folder), str(folder / "confusion.pt")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    alone = evaluate.evaluate(PlaceModel().eval(), data.open_dataset(folder, "val"), multi_scale=True, progress=False)
    assert torch.load(folder / "confusion.pt").equal(alone)


def test_the_command_under_torchrun_writes_what_it_writes_alone(folder):
    """Multi-scale, two processes, seven images: one table, one JSON file, label images from both processes."""
    torch.manual_seed(0)
    model = build_model("upernet", "tiny", 5, window=32, embed_dim=32, spm_channels=8, head_channels=32, aux_channels=8)
    checkpoint = {"format": "vit-adapter-seg/1", "model": model.state_dict(), "config": asdict(model.config)}
    torch.save(checkpoint, folder / "best.pt")
    options = ["--ms", "--checkpoint", folder / "best.pt", "--data", folder, "--device", "cpu"]
    assert evaluate.main([*map(str, options), "--json", f"{folder}/alone.json"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               REPOSITORY / "evaluate.py", *options, "--json", folder / "both.json", "--save-labels", folder / "out"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert (folder / "both.json").read_text() == (folder / "alone.json").read_text()
    assert done.stdout.count("mIoU") == 1 and len(list((folder / "out").iterdir())) == 7


# ------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def run_folder(folder, tmp_path_factory, monkeypatch):
    """A working folder with runs/old and runs/new, both trained on the data folder; checkpoints hold a PlaceModel."""
    here = tmp_path_factory.mktemp("work")
    monkeypatch.chdir(here)
    for age, name in [(50, "old"), (0, "new")]:
        run = here / "runs" / name
        run.mkdir(parents=True)
        (run / "best.pt").write_bytes(b"")
        os.utime(run / "best.pt", (10_000 - age, 10_000 - age))
        (run / "config.json").write_text(json.dumps({"data": str(folder)}))
    facts = {"classes": list("abcde"), "palette": [], "iteration": 7}
    monkeypatch.setattr(evaluate.weights, "load_model", lambda path: (PlaceModel().eval(), facts))
    return here


def test_command_takes_the_newest_run_and_writes_table_json_and_labels(run_folder, folder, capsys):
    arguments = ["--json", "out/result.json", "--save-labels", "labels", "--device", "cpu", "--limit", "3"]
    assert evaluate.main(arguments) == 0
    output = capsys.readouterr().out
    dataset = data.open_dataset(folder, "val")
    confusion = evaluate.evaluate(PlaceModel().eval(), dataset, limit=3, progress=False)
    assert output.startswith("runs/new/best.pt on ") and evaluate.table(metrics(confusion), "abcde") in output
    result = json.loads(Path("out/result.json").read_text())
    assert result["mean_iou"] == pytest.approx(metrics(confusion).mean_iou)
    assert [c["class"] for c in result["classes"]] == list("abcde")
    assert sorted(p.name for p in Path("labels").iterdir()) == ["0.png", "1.png", "2.png"]
    total = 0
    for i in range(3):
        with Image.open(f"labels/{i}.png") as picture:
            assert picture.mode == "P" and picture.getpalette()[:3] == [200, 30, 30]
            total = total + confusion_matrix(
                torch.from_numpy(np.array(picture)), torch.from_numpy(dataset.labels(i)), 5
            )
    assert total.equal(confusion)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "no data at nowhere"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--original-ids", "--save-labels", "x"], "has no original ids"),
        (["--save-labels", "file"], "--save-labels file cannot be used as a folder (File exists): mend it"),
        (["--save-labels", "file/x"], "--save-labels file/x cannot be used as a folder (Not a directory): mend it"),
        (["--json", "runs"], "--json runs is a folder: name a file, in it or elsewhere"),
        (["--json", "file/x"], "--json file cannot be used as a folder (File exists): mend it"),
        (["--limit", "none"], "none is not a positive whole number (python evaluate.py --help lists the options)"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_user_errors_are_one_line_and_status_2(run_folder, capsys, monkeypatch, arguments, message):
    Path("file").write_text("")
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: pytest.fail("the work began"))
    try:
        assert evaluate.main(["--device", "cpu", *arguments]) == 2
    except SystemExit as stop:
        assert stop.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert sorted(os.listdir()) == ["file", "runs"]


@pytest.fixture
def precision():
    """Puts the process's TF32 switches back."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn


@pytest.mark.parametrize(("option", "expected"), [([], ("high", True)), (["--no-tf32"], ("highest", False))])
def test_tf32_is_that_of_training_unless_refused(run_folder, precision, option, expected):
    assert evaluate.main(["--limit", "1", "--device", "cpu", *option]) == 0
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == expected


def test_without_a_run_the_error_tells_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([]) == 2
    assert capsys.readouterr().err == (
        "error: no runs/*/best.pt: train first (python train.py --data toy) or name a --checkpoint\n"
    )


@pytest.mark.parametrize(
    ("classes", "number", "message"),
    [
        (list("abcde"), 7, "has 5 classes, the checkpoint 7"),
        (list("abXde"), 5, "class 'c' of .* is 'X' in the checkpoint"),
    ],
)
def test_a_checkpoint_for_other_classes_is_refused(folder, classes, number, message):
    with pytest.raises(UserError, match=message):
        evaluate.check_classes(data.open_dataset(folder, "val").info, classes, number)


def test_original_ids_are_those_of_the_459_classes(tmp_path):
    info = data.context_info()
    dataset = SimpleNamespace(info=info, names=["2008_000002"])
    evaluate.label_writer(tmp_path, dataset, original_ids=True)(0, np.uint8([[0, info.classes.index("sky")]]))
    with Image.open(tmp_path / "2008_000002.png") as picture:
        assert np.array(picture).tolist() == [[2, 360]]


def test_saved_labels_come_back_exactly(tmp_path):
    labels = np.random.default_rng(0).integers(0, 59, (30, 40)).astype(np.uint8)
    data.save_labels(labels, tmp_path / "a" / "b.png", np.zeros((59, 3), np.uint8))
    with Image.open(tmp_path / "a" / "b.png") as picture:
        assert (np.array(picture) == labels).all()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.png"]
