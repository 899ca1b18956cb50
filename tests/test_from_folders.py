"""from_folders.py and class_list.py: a plain folder from users' files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from common import UserError
from tools import class_list, from_folders

COLOURS = np.array([[255, 0, 0], [0, 0, 255], [9, 9, 9]], np.uint8)


def test_a_number_of_classes_is_enough(make_own: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = make_own()
    assert f"train with `python train.py --data {own}`" in capsys.readouterr().out
    train, val = data.open_dataset(own, "train"), data.open_dataset(own, "val")
    assert sorted(train.names + val.names) == [f"p{i}" for i in range(10)] and len(val) >= 1
    assert train.info.classes == ("class 0", "class 1")
    np.testing.assert_array_equal(val.labels(0), np.asarray(Image.open(tmp_path / "masks" / f"{val.names[0]}.png")))
    assert val.image_paths[0].read_bytes() == (tmp_path / "photos" / f"{val.names[0]}.jpg").read_bytes()


def test_colours_are_converted_and_images_linked(make_own: Callable, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("red car 255 0 0\nwater, 0, 0, 255\n\nignore 9 9 9\n")
    train = data.open_dataset(make_own(f"{tmp_path}/classes.txt", "--link", table=COLOURS), "train")
    assert train.info.classes == ("red car", "water") and train.info.palette.tolist() == COLOURS[:2].tolist()
    red = np.asarray(Image.open(tmp_path / "masks" / f"{train.names[0]}.png"))[..., 0]
    np.testing.assert_array_equal(train.labels(0), np.select([red == 255, red == 0, red == 9], [0, 1, 255]))
    assert train.image_paths[0].is_symlink()


def test_split_is_one_in_five_and_keeps_its_choice() -> None:
    names = [f"image_{i}" for i in range(2000)]
    large, small = from_folders.split_by_hash(names), from_folders.split_by_hash(names[:500])
    assert 340 < len(large["val"]) < 460
    assert set(small["val"]) == set(large["val"]) & set(names[:500])
    split = from_folders.split_by_hash(["a", "b"])
    assert (len(split["train"]), len(split["val"])) == (1, 1)


@pytest.mark.parametrize(("file", "content", "message"), [
    ("masks/p3.png", np.full((20, 30), 9, np.uint8),
     "masks/p3.png: label value 9 is none of the 2 classes: no class is 255"),
    ("masks/p3.png", np.zeros((19, 30), np.uint8), "photos/p3.jpg is 30x20 pixels but .*masks/p3.png is 30x19"),
    ("masks/p3.png", np.zeros((20, 30, 3), np.uint8), "masks/p3.png is colour-coded: give each class its colour"),
    ("masks/p3.png", "no image", "masks/p3.png: not a readable image"),
    ("masks/p3.png", None, "1 files .* have no partner .*photos/p3.jpg"),
    ("photos/p3.png", np.zeros((20, 30), np.uint8), r"photos holds several files named p3.\*: keep one"),
    ("classes.txt", None, r"classes.txt: cannot be read \(No such file or directory\): give --classes a file"),
    ("classes.txt", "\n", "classes.txt is empty: give"),
    ("classes.txt", "ignore 1 2 3", "classes.txt: 0 names"),
    ("classes.txt", "a\nb\na", "classes.txt: 3 names, 1 repeated: give 1 to 255 different ones"),
    ("classes.txt", "a 1 2 3\nb 1 2 300", "classes.txt, line 2: 1 2 300 is no colour of 0..255 or used before"),
    ("classes.txt", "a 1 2 3\nb 1 2 3", "classes.txt, line 2: 1 2 3 is no colour of 0..255 or used before"),
])
def test_faults_leave_nothing_behind(make_own: Callable, tmp_path: Path, file: str, content: np.ndarray | str | None,
                                     message: str) -> None:
    def spoil() -> None:
        (tmp_path / "classes.txt").write_text("a\nb\n")
        (tmp_path / file).unlink(missing_ok=True)
        if isinstance(content, str):
            (tmp_path / file).write_text(content)
        elif content is not None:
            Image.fromarray(content).save(tmp_path / file)

    with pytest.raises(UserError, match=message):
        make_own(f"{tmp_path}/classes.txt", spoil=spoil)
    assert {path.name for path in tmp_path.iterdir()} - {"classes.txt"} == {"masks", "photos"}


def test_an_unknown_colour_is_named(tmp_path: Path) -> None:
    Image.fromarray(COLOURS[[[0, 1, 2]]]).save(tmp_path / "x.png")
    classes = class_list.ClassList(["a", "b"], COLOURS[:2], {0xFF0000: 0, 0x0000FF: 1})
    with pytest.raises(UserError, match="x.png: label colour 9 9 9 is none of the 2 classes: add it to the list"):
        from_folders.convert_labels(tmp_path / "x.png", classes)


