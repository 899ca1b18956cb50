"""check.py: what spoils a training is found before it."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import pictures
from common import UserError
from tools import check, prepare


def write_set(root: Path, labels: dict[str, np.ndarray], classes: list[str],
              palettes: dict[str, list] | None = None) -> Path:
    """A plain folder; the labels are by SPLIT/NAME, and so are the palettes of label files that have one."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for title, values in labels.items():
        split, name = title.split("/")
        Image.fromarray(rng.integers(0, 256, (*values.shape, 3), np.uint8)).save(root / "images" / f"{name}.png")
        picture = Image.fromarray(values)
        if title in (palettes or {}):
            picture.putpalette([*np.ravel(palettes[title])] + [0] * (768 - np.size(palettes[title])))
        picture.save(root / "labels" / f"{name}.png")
        with (root / f"{split}.txt").open("a") as file:
            file.write(f"{name}\n")
    (root / "dataset.json").write_text(json.dumps({"classes": classes, "palette": COLOURS[:len(classes)]}))
    return root


COLOURS = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def half(low: int, high: int, side: int = 40) -> np.ndarray:
    """Labels, left half and right half."""
    return np.repeat(np.uint8([[low, high]]), side // 2, 1).repeat(side, 0)


def checked(root: Path, capsys: pytest.CaptureFixture) -> tuple[int, list[str]]:
    """The exit status and the printed lines with a fault."""
    status = check.check(root, root / "sheet.png", workers=1)
    return status, [line for line in capsys.readouterr().out.splitlines() if line.startswith("fault: ")]


def test_check_of_a_sound_data_set(make_own: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = make_own("2")
    assert check.check(own, tmp_path / "sheet.png", workers=1) == 0
    printed = capsys.readouterr().out
    train = data.open_dataset(own, "train")
    pixels = np.bincount(np.stack([train.labels(i) for i in range(len(train))]).ravel(), minlength=256)
    row = next(line for line in printed.splitlines() if line.startswith("class 0")).split()
    assert float(row[2]) == pytest.approx(100 * pixels[0] / pixels[:2].sum(), abs=6e-4) and int(row[3]) == len(train)
    assert "fault: " not in printed and printed.endswith("no faults\n")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width >= 4 * 30 and sheet.height >= 3 * 20


def test_check_finds_what_is_wrong_in_files(make_own: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = make_own("2")
    train, val = data.open_dataset(own, "train"), data.open_dataset(own, "val")
    Image.new("L", (30, 20), 200).save(train.label_paths[0])
    for i in (1, 7):
        train.image_paths[i].write_bytes(train.image_paths[i].read_bytes()[:300])
    val.image_paths[0].write_bytes(train.image_paths[2].read_bytes())
    Image.new("L", (30, 20), 255).save(train.label_paths[3])
    Image.new("L", (30, 20)).save(train.image_paths[4])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 30)).save(train.image_paths[5], exif=exif)
    train.image_paths[6].rename(tmp_path / "away.jpg")
    train.image_paths[6].symlink_to(tmp_path / "away.jpg")
    with pytest.raises(SystemExit) as leaving:
        prepare.main(["check", str(own), "--sheet", str(tmp_path / "sheet.png"), "--workers", "2"])
    printed = capsys.readouterr().out
    assert leaving.value.code == 1 and printed.endswith(f"faults in {own}: 3, named above; mend them before training\n")
    for line in (f"fault: {train.image_paths[1]}: not a readable image",
                 f": 2 (train/{train.names[1]}, train/{train.names[7]})\n",
                 f"fault: label value 200 is no class: in 1 of 10 files, first {train.label_paths[0]}: use 0..1, or",
                 "fault: an image in two splits, so that its score says nothing: 1 "
                 f"(val/{val.names[0]} = train/{train.names[2]})",
                 f"remark: no labelled pixel: 1 (train/{train.names[3]})",
                 f"remark: mode L, converted to RGB: 1 (train/{train.names[4]})",
                 f"remark: turned upright by its EXIF tag: 1 (train/{train.names[5]})",
                 f"remark: a link that leads out of the folder: 1 (train/{train.names[6]})",
                 f"remark: a side below 32 pixels: 7 (train/{train.names[2]}, ", "remark: fewer than 10 training"):
        assert line in printed


BACKGROUND, LEAVES = ["background", "leaf", "stem"], ["leaf", "stem", "flower"]
ZERO_HINT = ("if 0 means unlabelled in the files, make the data set again with "
             "`from-folders --zero-is-unlabelled`")

ONE_CLASS = ("is all that is labelled in training: nothing to tell apart; label the rest of the pictures as a class of "
             "its own")
BINARY = ("0 and 255, which is no class here: if it means 'obj', make the data set again from files of one kind with "
          "`from-folders`, which takes 0 and 255 as two classes")


@pytest.mark.parametrize(("classes", "train", "val", "faults"), [
    (LEAVES, [half(0, 1), half(1, 2)], [half(0, 2)], []),
    (BACKGROUND, [half(0, 2), half(0, 1)], [half(0, 0)], []),
    (LEAVES, [half(0, 1), half(0, 1)], [half(0, 1)],  # ids from 1 on, and no picture shows the last class
     ["classes never labelled in training: 1 (flower): label them, or take them away; " + ZERO_HINT]),
    (BACKGROUND, [half(0, 1), half(0, 1)], [half(0, 1)],
     ["classes never labelled in training: 1 (stem): label them, or take them away"]),
    (LEAVES, [half(0, 1), half(0, 1)], [half(0, 2)],
     ["classes never labelled in training: 1 (flower): label them, or take them away"]),
    (LEAVES, [half(1, 3), half(0, 1), half(1, 2)], [half(0, 3)],
     [f"label value 3 is no class: in 2 of 4 files, first {{labels}}/t0.png: use 0..2, or 255 for none; {ZERO_HINT}"]),
    (LEAVES, [half(0, 17), half(99, 17), half(1, 2), half(0, 1)], [half(0, 1)],
     ["label values 2 (17, 99) are no class: in 2 of 5 files, first {labels}/t0.png: use 0..2, or 255 for none"]),
    (LEAVES, [half(1, 1), half(1, 1)], [half(1, 0)],
     ["'stem' " + ONE_CLASS]),
    (["thing"], [half(0, 255), half(0, 0)], [half(0, 0)],
     ["'thing' " + ONE_CLASS]),
    (LEAVES, [half(0, 1), half(2, 255)], [half(255, 255), half(255, 255)],
     ["62.5% of all pixels are unlabelled: if they are background, give them a class"]),
    (["bg", "obj"], [half(0, 255), half(0, 0)], [half(0, 255)],
     ["the label files hold " + BINARY]),
    (["bg", "obj"], [half(0, 255), half(0, 1)], [half(0, 255)],
     ["some label files hold 0 and 1, others " + BINARY]),
    (["bg", "obj"], [half(0, 1), half(1, 255)], [half(0, 255)], []),  # 255 beside 1: an ignored border
])
def test_what_the_label_values_say(tmp_path: Path, capsys: pytest.CaptureFixture, classes: list[str],
                                   train: list[np.ndarray], val: list[np.ndarray], faults: list[str]) -> None:
    labels = {f"train/t{i}": values for i, values in enumerate(train)}
    own = write_set(tmp_path / "own", labels | {f"val/v{i}": values for i, values in enumerate(val)}, classes)
    status, printed = checked(own, capsys)
    assert printed == [f"fault: {fault.format(labels=own / 'labels')}" for fault in faults] and status == bool(faults)


def test_a_large_class_0_may_mean_unlabelled(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sets = {"train/a": half(0, 1), "train/b": half(0, 2), "train/c": half(0, 0), "val/d": half(0, 1)}
    for classes, hints in ((LEAVES, 1), (BACKGROUND, 0)):
        own = write_set(tmp_path / classes[0], sets, classes)
        assert check.check(own, own / "sheet.png", workers=1) == 0
        hint = f"remark: '{classes[0]}', value 0, fills over half of what is labelled; {ZERO_HINT}: 4 (train/a, train/b"
        assert capsys.readouterr().out.count(hint) == hints


RED, GREEN, BLUE = COLOURS


@pytest.mark.parametrize(("palettes", "fault"), [
    ({"train/a": COLOURS, "train/b": [RED, GREEN]}, None),
    ({"train/a": [[9, 9, 9], GREEN, BLUE]}, None),  # another red is no permutation
    ({"train/a": [[k, k, k] for k in range(256)], "train/b": COLOURS}, None),  # a gray ramp says nothing
    ({"train/a": [[9, 9, 9], GREEN], "val/c": [[8, 8, 8], GREEN]},
     "by the palettes of the label files, 'leaf' is 9 9 9 in {a} and 8 8 8 in {c}: if the colours are right, make the"),
    ({"train/a": COLOURS, "val/c": [GREEN, RED, BLUE]}, "{c} draws value 0, 'leaf', in the colour of 'stem': its pal"),
])
def test_palettes_that_permute_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture, palettes: dict,
                                           fault: str | None) -> None:
    labels = {"train/a": half(0, 1), "train/b": half(0, 1), "train/d": half(1, 2), "val/c": half(0, 1)}
    own = write_set(tmp_path / "own", labels, LEAVES, palettes)
    status, printed = checked(own, capsys)
    assert status == bool(fault) and len(printed) == status
    if fault:
        assert printed[0].startswith("fault: " + fault.format(a=own / "labels/a.png", c=own / "labels/c.png"))


def test_lossy_label_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = write_set(tmp_path / "own", {f"train/{name}": half(0, 1) for name in "abc"} | {"val/d": half(1, 2)}, LEAVES)
    for name in "ab":
        Image.fromarray(half(0, 1)).save(own / f"labels/{name}.png", "JPEG")
    status, printed = checked(own, capsys)
    assert status == 1 and f"fault: {own}/labels/a.png" in printed[0] and "2 (train/a, train/b)" in printed[0]


def test_names_twice_and_the_test_split(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = write_set(tmp_path / "own", {"train/a": half(0, 1), "train/b": half(1, 2), "val/c": half(0, 1),
                                       "test/d": half(0, 7)}, LEAVES)
    with (own / "val.txt").open("a") as file:
        file.write("a\n")
    status, printed = checked(own, capsys)
    assert status == 1 and printed == [
        "fault: an image in two splits, so that its score says nothing: 1 (val/a = train/a)",
        f"fault: label value 7 is no class: in 1 of 5 files, first {own}/labels/d.png: use 0..2, or 255 for none"]
    with (own / "train.txt").open("a") as file:
        file.write("b\n")
    with pytest.raises(data.UserError, match="train.txt names 'b' more than once"):
        checked(own, capsys)


def test_a_pair_that_crashes_its_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_set(tmp_path / "d", {"train/0": half(0, 1), "val/1": half(0, 1)}, ["a", "b"])
    monkeypatch.setattr(pictures, "read_labels", die)
    with pytest.raises(UserError, match=r"images/0.png and .*labels/0.png: the process that reads it dies"):
        check.check(root, tmp_path / "sheet.png", workers=1)


def die(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
