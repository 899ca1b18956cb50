"""inputs.py: which pictures are read, and where each one's results go."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import UserError
from pictures import save_labels
from tools import inputs


def write(*names: str, result: bool = False) -> None:
    """Small pictures, of our own making or of others."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (4, 3))
        inputs.save_picture(picture, Path(name)) if result else picture.save(name)


@pytest.fixture(autouse=True)
def in_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("pictures", "results", "arguments", "places"), [
    (["in/1.png", "in/sub/2.jpg", "in/sub/deep/3.PNG"], [], "in", ["1", "sub/2", "sub/deep/3"]),
    (["in/f10.png", "in/f9.png", "in/g/f1.png"], [], "in", ["f9", "f10", "g/f1"]),
    (["a/1.png", "b/1.png"], [], "*/*.png", ["a/1", "b/1"]),
    (["a/1.png", "b/2.png"], [], "[ab]", ["1", "2"]),
    (["a/1.png", "b/1.png"], [], "a b ./a/1.png", ["a/1", "b/1"]),
    (["in/1.png", "in/sub/2.png"], [], "in in/sub in/sub/2.png", ["1", "sub/2"]),
    (["in/x.png", "in/x.jpg", "in/s.1.png", "in/s.2.png"], [], "in", ["s.1", "s.2", "in/x.jpg", "in/x.png"]),
    (["in/x.png", "in/X.png"], [], "in", ["in/X.png", "in/x.png-2"]),
    (["in/é.png", f"in/{unicodedata.normalize('NFD', 'é')}.png"], [], "in",
     [f"in/{unicodedata.normalize('NFD', 'é')}.png", "in/é.png-2"]),
    (["in/1.png", "in/.hidden.png", "in/.git/1.png", "in/__MACOSX/1.png"], [], "in", ["1"]),
    (["in/x.png", "in/y_labels.png"], ["in/x_labels.png", "in/x_overlay.jpg"], "in", ["x", "y_labels"]),
    (["in/x.png", "in/out/z.png"], ["in/out/x_explain.png", "in/moved.png"], "in", ["out/z", "x"]),
    (["in/x.png"], ["in/x_labels.png", "in/x_overlay.jpg"], "in/x.png in/x_labels.png in/x_overlay.jpg", ["x"]),
])
def test_each_picture_has_a_place_of_its_own_and_results_are_left_out(capsys, pictures, results, arguments, places):
    write(*pictures)
    write(*results, result=True)
    found = inputs.place_results(inputs.find_pictures(arguments.split()), Path("out"))
    assert [path.relative_to("out").as_posix() for path in found.values()] == places
    assert capsys.readouterr().out == (f"left out: {len(results)} results of earlier runs\n" if results else "")


def test_a_file_that_is_named_is_read_whatever_its_ending_and_links_to_folders_are_not_followed():
    write("in/a.png")
    Path("in/a.png").rename("in/a.picture")
    write("in/1.png", "in/folder.png/2.png")
    os.symlink(".", "in/loop")
    assert inputs.find_pictures(["in/a.picture"]) == {Path("in/a.picture"): Path("a")}
    assert [*inputs.find_pictures(["in"])] == [Path("in/1.png"), Path("in/folder.png/2.png")]


def test_results_alone_are_no_pictures():
    write("in/1.png", result=True)
    with pytest.raises(UserError, match="results of predict.py and no pictures"):
        inputs.find_pictures(["in"])


@pytest.mark.parametrize("name", ["a_labels.png", "a_overlay.jpg", "a_explain.png", "a_labels/000001.png"])
def test_nobodys_file_is_written_over_but_our_own(name):
    write("a.png")
    pictures = inputs.find_pictures(["a.png"])
    write(name, result=True)
    assert inputs.place_results(pictures, Path()) == {Path("a.png"): Path("a")}
    write(name)
    with pytest.raises(UserError, match=f"^{name} is there, and does not say that it was written by predict.py: "):
        inputs.place_results(pictures, Path())


def test_labels_carry_the_mark_and_their_values():
    labels = np.uint8([[0, 1], [2, 255]])
    save_labels(labels, Path("x.png"), np.uint8([[9, 9, 9]]), inputs.NOTE)
    save_labels(labels, Path("y.png"))
    assert (np.array(Image.open("x.png")) == labels).all()
    assert inputs.is_result(Path("x.png")) and not inputs.is_result(Path("y.png"))
