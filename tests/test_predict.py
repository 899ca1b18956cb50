"""predict.py: any picture file, the files written, bad input."""

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict
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

CLASSES = ["sky", "road", "tree", "car", "sign"]
PALETTE = [[60, 120, 200], [90, 90, 90], [40, 140, 40], [200, 40, 40], [230, 200, 40]]
SMALL = {"window": 64, "embed_dim": 32, "spm_channels": 8, "head_channels": 32, "aux_channels": 8,
         "num_queries": 6, "encoder_layers": 1, "encoder_ffn": 32, "decoder_layers": 2, "decoder_ffn": 32}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint with starting values for each head: what it predicts is arbitrary but fixed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for head in ("mask2former", "upernet"):
        torch.manual_seed(1)
        model = build_model(head, "tiny", len(CLASSES), **SMALL)
        torch.save({"format": "vit-adapter-seg/1", "model": model.state_dict(), "config": asdict(model.config),
                    "classes": CLASSES, "palette": PALETTE, "iteration": 3}, folder / f"{head}.pt")
    return folder


@pytest.fixture(scope="module")
def predictor(checkpoints):
    return Predictor(checkpoints / "mask2former.pt", "cpu")


def photograph(height=50, width=70, seed=0):
    """Smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


# ------------------------------------------------------------------------------------------------- the library


def test_predictor_gives_what_evaluation_gives(predictor):
    image = photograph()
    (expected,) = evaluate.predictions(predictor.model, [image])
    labels = predictor(image)
    assert labels.dtype == np.uint8 and labels.shape == (50, 70) and (labels == expected.numpy()).all()
    assert predictor.classes == CLASSES and predictor.palette.tolist() == PALETTE


def test_predictor_takes_files_pillow_images_and_arrays(predictor, tmp_path):
    image = photograph()
    Image.fromarray(image).save(tmp_path / "a.png")
    expected = predictor(image)
    assert (predictor(tmp_path / "a.png") == expected).all() and (predictor(str(tmp_path / "a.png")) == expected).all()
    assert (predictor(Image.fromarray(image)) == expected).all()


@pytest.mark.parametrize("multi_scale", [False, True])
def test_probabilities_sum_to_one_and_their_largest_is_the_label(checkpoints, multi_scale):
    predictor = Predictor(checkpoints / "upernet.pt", "cpu", multi_scale=multi_scale)
    volume = predictor.probabilities(photograph())
    assert volume.shape == (5, 50, 70) and volume.dtype == np.float32
    np.testing.assert_allclose(volume.sum(0), 1, atol=1e-5)
    assert (volume.argmax(0) == predictor(photograph())).all()


@pytest.mark.parametrize("size", [(16, 16), (3, 40), (200, 33)])
def test_any_size_comes_back_at_its_own_size(predictor, size):
    assert predictor(photograph(*size)).shape == size


def test_a_large_picture_is_put_together_in_strips(predictor, monkeypatch):
    image = photograph(300, 410)
    whole = predictor(image)
    monkeypatch.setattr(evaluate, "STRIP", 5 * 410 * 37)  # 37 rows a strip
    assert (predictor(image) != whole).mean() < 1e-4  # rounding may tip a tie


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
    done = subprocess.run([sys.executable, "-c", MEMORY, checkpoints / "upernet.pt"], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2_000_000  # kB


@pytest.mark.parametrize("fast", [True, False])
def test_the_fast_text_runs_unless_refused(checkpoints, monkeypatch, fast):
    enabled = []
    monkeypatch.setattr(predict, "inference", lambda _, fast: contextlib.nullcontext(enabled.append(fast)))
    predictor = Predictor(checkpoints / "upernet.pt", "cpu", fast=fast)
    predictor(photograph())
    predictor.probabilities(photograph())
    assert enabled == [fast, fast]


def test_released_checkpoints_tell_no_classes_and_get_those_of_pascal_context():
    names, palette = predict.names_and_colors({}, 59)
    assert names == list(data.context_info().classes) and palette.shape == (59, 3)
    names, palette = predict.names_and_colors({}, 4)
    assert names == ["class 0", "class 1", "class 2", "class 3"] and len({tuple(c) for c in palette}) == 4


# -------------------------------------------------------------------------------------------- the command line


def run(checkpoints, *arguments, head="mask2former"):
    return predict.main([*map(str, arguments), "--checkpoint", str(checkpoints / f"{head}.pt"), "--device", "cpu"])


def test_a_folder_gives_an_overlay_and_labels_for_each_picture(checkpoints, predictor, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.fromarray(photograph(seed=i)).save(tmp_path / "in" / f"frame{i}.png")
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    assert run(checkpoints, tmp_path / "in", "--out", tmp_path / "out") == 0
    assert "3 of 3 pictures" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [f"frame{i}_{kind}" for i in range(3) for kind in ("labels.png", "overlay.jpg")]
    with Image.open(tmp_path / "out" / "frame2_labels.png") as labels:
        assert (np.array(labels) == predictor(photograph(seed=2))).all()
        assert labels.getpalette()[:15] == sum(PALETTE, [])
    with Image.open(tmp_path / "out" / "frame2_overlay.jpg") as overlay:
        assert overlay.width >= 70 and overlay.height > 50  # the legend is below


def saved(image, path, mode):
    """The photograph in another file format; returns what reading it should give, and how exactly."""
    if mode == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6  # shown after a quarter turn clockwise
        Image.fromarray(np.ascontiguousarray(np.rot90(image))).save(path, exif=exif, quality=100, subsampling=0)
        return image
    if mode == "16 bit":
        Image.fromarray(image[..., 0].astype(np.uint16) * 257).save(path)
        return np.repeat(image[..., :1], 3, 2)
    picture = Image.fromarray(image).convert(mode)
    picture.save(path)
    return np.array(picture.convert("RGB"))


@pytest.mark.parametrize(("mode", "suffix"), [
    ("L", ".png"), ("RGBA", ".png"), ("P", ".png"), ("CMYK", ".tif"), ("16 bit", ".png"), ("rotated", ".jpg"),
])
def test_every_kind_of_picture_file_is_read_upright_and_in_rgb(predictor, tmp_path, mode, suffix):
    image, path = photograph(), tmp_path / f"x{suffix}"
    expected = saved(image, path, mode)
    np.testing.assert_allclose(predict.as_array(path).astype(int), expected, atol=12 if suffix == ".jpg" else 0)
    assert predictor(path).shape == (50, 70)


def test_a_bad_picture_does_not_stop_the_others_and_is_named_at_the_end(checkpoints, tmp_path, capsys):
    Image.fromarray(photograph()).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    assert run(checkpoints, tmp_path / "bad.png", tmp_path / "good.png", "--out", tmp_path / "out") == 1
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {tmp_path}/bad.png: not a readable image") and output.err.count("\n") == 1
    assert "1 of 2 pictures" in output.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["good_labels.png", "good_overlay.jpg"]
    assert run(checkpoints, tmp_path / "bad.png", "--out", tmp_path / "out") == 2  # nothing could be done


@pytest.mark.parametrize("argument", ["nothing*.png", ".", "x.jpg"])
def test_no_picture_at_all_is_status_2(checkpoints, tmp_path, monkeypatch, capsys, argument):
    monkeypatch.chdir(tmp_path)
    assert run(checkpoints, argument) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: no picture at {argument}") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opacity", ["1.5", "-1", "much"])
def test_an_opacity_outside_0_to_1_is_status_2(opacity):
    with pytest.raises(SystemExit) as stop:
        predict.main(["a.png", f"--opacity={opacity}"])
    assert stop.value.code == 2


@pytest.mark.parametrize(("out", "reason"), [("a.png", "File exists"), ("a.png/x", "Not a directory")])
def test_a_destination_that_is_no_folder_is_status_2(checkpoints, tmp_path, capsys, out, reason):
    Image.fromarray(photograph()).save(tmp_path / "a.png")
    assert run(checkpoints, tmp_path / "a.png", "--out", tmp_path / out) == 2
    message = f"error: --out {tmp_path / out} cannot be used as a folder ({reason}): mend it or name another\n"
    assert capsys.readouterr().err == message and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_missing_checkpoint_is_status_2(tmp_path, capsys):
    Image.fromarray(photograph()).save(tmp_path / "a.png")
    assert predict.main([str(tmp_path / "a.png"), "--checkpoint", str(tmp_path / "no.pt")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/no.pt: no such file\n"


def test_globs_are_expanded_and_pictures_of_one_name_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Image.fromarray(photograph()).save(f"{folder}/1.png")
    pictures = predict.find_pictures(["*/*.png", "a"])
    assert pictures == [Path("a/1.png"), Path("b/1.png")]
    assert predict.stems(pictures, Path("out")) == [Path("out/a_1.png"), Path("out/b_1.png")]
    assert predict.stems(pictures[:1], Path("out")) == [Path("out/1")]


def test_probabilities_are_saved_with_the_class_names(checkpoints, tmp_path):
    Image.fromarray(photograph()).save(tmp_path / "a.png")
    assert run(checkpoints, tmp_path / "a.png", "--out", tmp_path, "--probabilities", head="upernet") == 0
    with np.load(tmp_path / "a_probabilities.npz") as file, Image.open(tmp_path / "a_labels.png") as labels:
        assert file["probabilities"].dtype == np.float16 and file["classes"].tolist() == CLASSES
        np.testing.assert_allclose(file["probabilities"].astype(float).sum(0), 1, atol=4e-3)
        chosen = np.take_along_axis(file["probabilities"], np.array(labels)[None].astype(int), 0)
        assert (chosen >= file["probabilities"].max(0) - 1e-3).all()


def test_explain_writes_a_sheet_of_queries_and_samples(checkpoints, tmp_path):
    Image.fromarray(photograph()).save(tmp_path / "a.png")
    assert run(checkpoints, tmp_path / "a.png", "--out", tmp_path, "--explain") == 0
    with Image.open(tmp_path / "a_explain.png") as sheet:
        assert sheet.width > 4 * 320 and sheet.height > 5 * 320  # cells of 320: 6 queries in 2 rows, 4 cells below


def test_explain_is_refused_without_queries(checkpoints, tmp_path, capsys):
    Image.fromarray(photograph()).save(tmp_path / "a.png")
    assert run(checkpoints, tmp_path / "a.png", "--out", tmp_path / "out", "--explain", head="upernet") == 2
    assert "UperNet head" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_defaults_come_from_the_newest_run(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/best.pt").write_bytes((checkpoints / "upernet.pt").read_bytes())
    Path("runs/a/config.json").write_text(json.dumps({"data": "nowhere"}))
    Image.fromarray(photograph()).save("a.png")
    assert predict.main(["a.png", "--device", "cpu"]) == 0
    assert sorted(p.name for p in Path("predictions").iterdir()) == ["a_labels.png", "a_overlay.jpg"]
