"""predict.py: any picture file, the files written, bad input."""

import contextlib
import signal
import subprocess
import sys
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import evaluate
import predict
from model import build_model
from predict import Predictor
from tools import video

CLASSES = ["sky", "road", "tree", "car", "sign"]
PALETTE = [[60, 120, 200], [90, 90, 90], [40, 140, 40], [200, 40, 40], [230, 200, 40]]
SMALL = {"window": 64, "embed_dim": 32, "spm_channels": 8, "head_channels": 32, "aux_channels": 8,
         "num_queries": 6, "encoder_layers": 1, "encoder_ffn": 32, "decoder_layers": 2, "decoder_ffn": 32}


def save_checkpoint(path, head, classes, **changes):
    """A checkpoint with starting values: what it predicts is arbitrary but fixed."""
    torch.manual_seed(1)
    model = build_model(head, "tiny", len(classes), **{**SMALL, **changes})
    torch.save({"format": "vit-adapter-seg/1", "model": model.state_dict(), "config": asdict(model.config),
                "classes": classes, "palette": PALETTE[:len(classes)], "iteration": 3}, path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for head in ("mask2former", "upernet"):
        save_checkpoint(folder / f"{head}.pt", head, CLASSES)
    return folder


@pytest.fixture(scope="module")
def predictor(checkpoints):
    return Predictor(checkpoints / "mask2former.pt", "cpu")


def status_of(main, *arguments):
    """The exit status of a command."""
    try:
        return main(arguments)
    except SystemExit as stop:  # argparse's way out
        return stop.code


def photograph(height=50, width=70, seed=0):
    """Smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def test_predictor_gives_what_evaluation_gives(predictor):
    image = photograph()
    (expected,) = evaluate.predictions(predictor.model, [image])
    labels = predictor(image)
    assert labels.dtype == np.uint8 and labels.shape == (50, 70) and (labels == expected.numpy()).all()
    assert predictor.classes == CLASSES and predictor.palette.tolist() == PALETTE


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA"])
def test_predictor_takes_files_pillow_images_and_arrays(predictor, tmp_path, mode):
    picture, path = Image.fromarray(photograph()).convert(mode), tmp_path / "a.png"
    picture.save(path)
    expected = predictor(np.array(picture.convert("RGB")))
    assert all((predictor(form) == expected).all() for form in (path, str(path), picture))


@pytest.mark.parametrize("multi_scale", [False, True])
def test_probabilities_sum_to_one_and_their_largest_is_the_label(checkpoints, multi_scale):
    predictor = Predictor(checkpoints / "upernet.pt", "cpu", multi_scale=multi_scale)
    volume = predictor.probabilities(photograph())
    assert volume.shape == (5, 50, 70) and volume.dtype == np.float32
    np.testing.assert_allclose(volume.sum(0), 1, atol=1e-5)
    assert (volume.argmax(0) == predictor(photograph())).all()


@pytest.mark.parametrize("size", [(16, 16), (3, 40), (200, 33)])
def test_any_size_comes_back_at_its_own_size_whole_or_in_strips(predictor, monkeypatch, size):
    whole = predictor(photograph(*size))
    monkeypatch.setattr(evaluate, "STRIP", 5 * size[1] * 7)  # 7 rows a strip
    strips = predictor(photograph(*size))
    assert whole.shape == strips.shape == size
    assert (strips != whole).mean() < 1e-4  # rounding may tip a tie


MEMORY = """
import resource, sys
import numpy as np, torch
from predict import Predictor
predictor = Predictor(sys.argv[1], "cpu")
predictor.model.head.register_forward_hook(lambda module, inputs, logits: logits.repeat(1, 12, 1, 1)[:, :59])
predictor.model.config.__dict__["num_classes"] = 59
predictor(np.zeros((64, 64, 3), np.uint8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
picture = np.zeros((6000, 8000, 3), np.uint8)
assert predictor(picture).shape == (6000, 8000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_picture_of_8000_by_6000_pixels_keeps_to_the_stated_memory(checkpoints):
    """59 classes at once would take 11 GB."""
    used = subprocess.check_output([sys.executable, "-c", MEMORY, checkpoints / "upernet.pt"], cwd=ROOT)
    assert int(used) < 2_000_000  # kB


@pytest.mark.parametrize("fast", [True, False])
def test_the_fast_text_runs_unless_refused(checkpoints, monkeypatch, fast):
    enabled = []
    monkeypatch.setattr(predict, "inference", lambda _, fast: contextlib.nullcontext(enabled.append(fast)))
    predictor = Predictor(checkpoints / "upernet.pt", "cpu", fast=fast)
    predictor(photograph())
    predictor.probabilities(photograph())
    assert enabled == [fast] * 3  # first where the batch of windows is chosen


def test_released_checkpoints_tell_no_classes_and_get_those_of_pascal_context():
    for names in (list(data.context_info().classes), ["class 0", "class 1", "class 2", "class 3"]):
        found, palette = predict.names_and_colors({}, len(names))
        assert found == names and palette.shape == (len(names), 3)


@pytest.fixture
def run(checkpoints, tmp_path, monkeypatch):
    """run(*arguments, head=...) -> exit status, in a folder that holds a.png and bad.png."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photograph()).save("a.png")
    Path("bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")

    return lambda *arguments, head="mask2former": status_of(
        predict.main, "--checkpoint", f"{checkpoints}/{head}.pt", "--device", "cpu", *arguments)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_folder_gives_the_files_asked_for_with_each_picture(run, predictor, capsys):
    Path("in").mkdir()
    for i in range(2):
        Image.fromarray(photograph(seed=i)).save(f"in/frame{i}.png")
    Path("in/notes.txt").write_text("no picture")
    assert run("in", "--out", "out", "--probabilities", "--explain") == 0
    assert "2 of 2 pictures" in capsys.readouterr().out
    kinds = ("explain.png", "labels.png", "overlay.jpg", "probabilities.npz")
    assert names("out") == [f"frame{i}_{kind}" for i in range(2) for kind in kinds]
    with Image.open("out/frame1_labels.png") as picture:
        labels = np.array(picture)
        assert (labels == predictor(photograph(seed=1))).all() and picture.getpalette()[:15] == sum(PALETTE, [])
    with Image.open("out/frame1_overlay.jpg") as overlay, Image.open("out/frame1_explain.png") as sheet:
        assert overlay.width >= 70 and overlay.height > 50  # the legend is below
        assert sheet.width > 3 * 320 + 640 and sheet.height > 2 * 640  # 3 queries in a row, 2 larger pictures beside
    with np.load("out/frame1_probabilities.npz") as file:
        assert file["probabilities"].dtype == np.float16 and file["classes"].tolist() == CLASSES
        np.testing.assert_allclose(file["probabilities"].astype(float).sum(0), 1, atol=4e-3)
        chosen = np.take_along_axis(file["probabilities"], labels[None].astype(int), 0)
        assert (chosen >= file["probabilities"].max(0) - 1e-3).all()


def test_bad_pictures_do_not_stop_the_others_and_are_named_at_the_end(run, capsys):
    Path("worse.png").write_text("no picture")
    for good, status, text in [(["a.png"], 1, "1 of 3 pictures"), ([], 2, "")]:
        assert run("bad.png", *good, "worse.png", "--out", "out") == status
        output = capsys.readouterr()
        first, second = output.err.splitlines()
        assert first.startswith("error: bad.png: not a readable image") and second.startswith("error: worse.png: ")
        assert output.out.startswith(text) and bool(output.out) == bool(text)
        assert names("out") == ["a_labels.png", "a_overlay.jpg"]


@pytest.mark.parametrize(("arguments", "message"), [
    ("nothing*.png", "no picture at nothing*.png"), ("empty", "no picture at empty"), ("x.jpg", "no picture at x.jpg"),
    ("a.png --checkpoint no.pt", "no.pt: no such file"),
    ("a.png --checkpoint mask2former-base", "`python data.py fetch checkpoint:mask2former-base` fetches it, and"),
    ("a.png --opacity=1.5", "1.5 is not a number from 0 to 1"),
    ("a.png --opacity=-1", "-1 is not"), ("a.png --opacity=much", "much is not"),
    ("a.png --out a.png", "--out a.png cannot be used as a folder (File exists)"),
    ("a.png --out a.png/x", "--out a.png/x cannot be used as a folder (Not a directory)"),
    ("a.png --explain --out out", "--explain shows the queries of Mask2Former, and this checkpoint has a UperNet head"),
])
def test_user_errors_are_one_line_and_status_2(run, capsys, arguments, message):
    Path("empty").mkdir()
    assert run(*arguments.split(), head="upernet") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert names(".") == ["a.png", "bad.png", "empty"]


def place(folder, *pictures):
    """Write small pictures below the folder."""
    for i, picture in enumerate(pictures):
        path = Path(folder, picture)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(seed=i)).save(path)


def test_results_beside_their_pictures_are_not_predicted_again(run, capsys):
    place("in", "x.png", "sub/y.png")
    for _ in range(2):
        assert run("in", "--out", "in") == 0
        assert {str(path.relative_to("in")) for path in Path("in").rglob("*.*")} == {
            "x.png", "x_labels.png", "x_overlay.jpg", "sub/y.png", "sub/y_labels.png", "sub/y_overlay.jpg"}
    assert "left out: 4 results of earlier runs" in capsys.readouterr().out


def test_confidence_is_255_where_the_model_is_sure(run, checkpoints, predictor):
    upernet = Predictor(checkpoints / "upernet.pt", "cpu")
    scores = torch.tensor([[1, 0, 0, 0, 0], [0.1, 0.6, 0.1, 0, 0.2], [0.2] * 5]).T[:, None]  # (K, 1, 3)
    assert predictor.best_class(scores.softmax(0))[1].tolist() == [[255, 153, 0]]  # Mask2Former's are soft-maxed
    labels, confidence = upernet.best_class(scores)
    assert labels.tolist() == [[0, 1, 0]] and confidence.tolist() == [[255, 153, 51]]
    assert run("a.png", "--confidence", "--out", "out", head="upernet") == 0
    with Image.open("out/a_confidence.png") as picture:
        assert picture.mode == "L"
        np.testing.assert_allclose(np.array(picture) / 255, upernet.probabilities(photograph()).max(0), atol=0.003)


def test_a_video_gives_the_labels_of_its_frames_and_frames_give_a_video(run, predictor):
    pytest.importorskip("av")
    with video.write_video(Path("in/clip.mp4"), Fraction(8), "") as write:
        for i in range(5):
            write(photograph(64, 80, seed=i))
    with video.open_video(Path("in/clip.mp4")) as source:
        frames = [*source.frames]
    place("frames", "1.png", "2.png")
    for _ in range(2):  # what the first run writes is left out
        assert run("in", "frames", "--video", "29.97", "--confidence", "--out", "in") == 0
    for number, frame in enumerate(frames, 1):
        with Image.open(f"in/clip_labels/{number:06}.png") as picture:
            np.testing.assert_array_equal(np.array(picture), predictor(frame))
    with Image.open("in/clip_confidence/000005.png") as picture:
        volume = predictor.probabilities(frames[4])
        np.testing.assert_allclose(np.array(picture) / 255, np.log(volume.max(0) / volume.min(0)), atol=0.003)
    for name, rate, length in (("clip_overlay.mp4", 8, 5), ("overlay.mp4", Fraction("29.97"), 2)):
        with video.open_video(Path("in", name)) as source:
            assert source.rate == rate and len([*source.frames]) == length
    assert len([*Path("in").rglob("*.*")]) == 1 + 2 + 2 * 5 + 2 * 3


def test_a_shorter_video_leaves_no_frames_of_the_longer_one(run):
    pytest.importorskip("av")
    for length in (4, 2):
        Path("clip.mp4").unlink(missing_ok=True)
        with video.write_video(Path("clip.mp4"), Fraction(8), "") as write:
            for _ in range(length):
                write(photograph(64, 80))
        assert run("clip.mp4", "--confidence", "--out", "out") == 0
        Path("out/clip_labels/000009.png").touch()  # no result of ours
    for kind, more in (("labels", ["000009.png"]), ("confidence", [])):
        assert names(f"out/clip_{kind}") == ["000001.png", "000002.png", *more]


def test_a_picture_of_another_size_is_left_out_of_the_video_alone(run, capsys):
    pytest.importorskip("av")
    place("in", "1.png", "2.png")
    Image.fromarray(photograph(64, 80)).save("in/2.png")
    assert run("in", "--video", "4", "--out", "out") == 1
    output = capsys.readouterr()
    assert "2 of 2 pictures" in output.out
    assert output.err == ("error: in/2.png: out/overlay.mp4: a frame of 80x64 pixels after some of 70x50: "
                          "give frames of one size\n")
    assert names("out") == ["1_labels.png", "1_overlay.jpg", "2_labels.png", "2_overlay.jpg", "overlay.mp4"]


def test_a_picture_too_long_for_jpeg_has_a_png_overlay(run, monkeypatch, capsys):
    monkeypatch.setattr(predict, "JPEG_SIDE", 69)  # for the limit of 65,500 pixels
    assert run("a.png", "--out", "out") == 0
    assert names("out") == ["a_labels.png", "a_overlay.png"]
    assert "out/a_overlay.png is no JPEG" in capsys.readouterr().out


@pytest.mark.parametrize("fault", [OSError("no overlay"), RuntimeError("no memory"), MemoryError("none")])
def test_labels_are_written_before_all_else_and_a_fault_stops_no_other_picture(run, monkeypatch, capsys, fault):
    place("in", "1.png", "2.png")
    draw, faults = predict.draw.overlay, [fault]

    def overlay(*arguments, **more):
        if faults:
            raise faults.pop()
        return draw(*arguments, **more)

    monkeypatch.setattr(predict.draw, "overlay", overlay)
    assert run("in", "--out", "out") == 1
    assert names("out") == ["1_labels.png", "2_labels.png", "2_overlay.jpg"]
    output = capsys.readouterr()
    assert "1 of 2 pictures" in output.out and output.err == f"error: in/1.png: {fault}\n"


def test_an_interrupt_keeps_what_is_written_and_tells_where(run, monkeypatch, capsys):
    place("in", "1.png", "2.png")
    read = predict.as_rgb

    def interrupted(path):
        if path.stem == "2":
            signal.raise_signal(2)  # it reaches the main thread a little later
        return read(path)

    monkeypatch.setattr(predict, "as_rgb", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
    assert run("in", "--out", "out") == 130
    signal.signal(signal.SIGINT, before)
    output = capsys.readouterr()
    assert "1 of 2 pictures: overlays and labels in out/" in output.out and output.err == "error: interrupted\n"
    assert names("out") == ["1_labels.png", "1_overlay.jpg"]


def test_a_picture_larger_than_the_memory_is_refused_by_its_size(run, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's limit does not count
    monkeypatch.setattr(predict.os, "sysconf", lambda _: 10_000)
    Image.new("1", (4000, 3000)).save("b.png")
    for more, gigabytes in ([], 0.3), (["--probabilities"], 0.5):
        assert run("a.png", "b.png", "--out", "out", *more) == 1
        assert capsys.readouterr().err == (f"error: b.png: 4000x3000 pixels take {gigabytes} GB of memory, and this "
                                           "machine has 0.1 GB: cut it into smaller pictures\n")


@pytest.mark.parametrize(("length", "kept"), [
    (179, [(0, 179)]), (180, [(0, 80), (80, 180)]), (285, [(0, 80), (80, 180), (180, 285)])])
def test_long_pictures_are_cut_and_pieces_overlap(length, kept):
    pieces = predict.cut(length, 10)
    assert [(piece.start + start, piece.start + start + number) for piece, (start, number) in pieces] == kept
    assert [(piece.start, piece.stop) for piece, _ in pieces] == [(max(0, a - 20), b + 20) for a, b in kept]


@pytest.mark.parametrize("turn", [0, 1])
def test_a_long_picture_has_the_labels_of_the_whole(tmp_path, turn):
    save_checkpoint(tmp_path / "x.pt", "mask2former", CLASSES, window=96)  # three strides are two windows, as with 480
    predictor = Predictor(tmp_path / "x.pt", "cpu")
    long = np.rot90(photograph(32, 32 * 19), turn).copy()
    (whole,) = evaluate.predictions(predictor.model, [long])
    for image, labels in zip((long, photograph(), long), predictor([long, photograph(), long]), strict=True):
        expected = whole.numpy() if image is long else predictor(image)
        assert labels.shape == expected.shape and (labels != expected).mean() < 1e-3
    volume = predictor.probabilities(long)
    assert volume.shape == (5, *long.shape[:2]) and (volume.argmax(0) != whole.numpy()).mean() < 1e-3


def test_a_list_gives_the_labels_of_each_form_of_a_picture(predictor, tmp_path):
    image = photograph()
    Image.fromarray(image).save(tmp_path / "x.png")
    forms = [image, tmp_path / "x.png", str(tmp_path / "x.png"), (tmp_path / "x.png").read_bytes(),
             Image.fromarray(image), torch.from_numpy(image).permute(2, 0, 1), (image / 255).astype(np.float32)]
    results = predictor(forms)
    assert isinstance(results, list) and len(results) == len(forms)
    for labels in results:
        np.testing.assert_array_equal(labels, predictor(image))
    with pytest.raises(TypeError, match="a picture is a file name"):
        predictor(image[None])


def test_defaults_come_from_the_newest_run(run, checkpoints):
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/best.pt").write_bytes((checkpoints / "upernet.pt").read_bytes())
    assert predict.main(["a.png", "--device", "cpu"]) == 0
    assert names("predictions") == ["a_labels.png", "a_overlay.jpg"]
