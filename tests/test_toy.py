"""toy.py: deterministic, complete, drawn whole or not at all, and worth learning."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import data
from common import UserError
from tools import toy

SMALL = {"train": 5, "val": 3, "size": (96, 128)}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_toy(tmp_path_factory.mktemp("toy") / "data", **SMALL)


def test_it_is_a_plain_folder_drawn_on_demand(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "make_toy", lambda: small)
    train, val = data.open_dataset("toy", "train"), data.open_dataset("toy", "val")
    assert (len(train), len(val)) == (5, 3) and train.info.classes == toy.CLASSES
    assert len(set(map(tuple, train.info.palette.tolist()))) == len(toy.CLASSES) == 10
    assert all(path.suffix == ".jpg" for path in train.image_paths)
    for i in range(5):
        assert train.image(i).shape == (96, 128, 3) and train.labels(i).shape == (96, 128)
    assert 255 in train.labels(0)
    assert not {train.image(i).tobytes() for i in range(5)} & {val.image(i).tobytes() for i in range(3)}


def test_it_depends_on_the_seed_alone(small: Path, tmp_path: Path) -> None:
    more = toy.make_toy(tmp_path / "more", **{**SMALL, "train": 7})
    drawn = {name: content for name, content in contents(small).items() if "/" in name}
    assert drawn.items() <= contents(more).items()
    other = toy.make_toy(tmp_path / "other", train=1, val=1, size=SMALL["size"], seed=1)
    assert (other / "images/train_0000.jpg").read_bytes() != (small / "images/train_0000.jpg").read_bytes()


def test_data_that_are_there_are_kept_and_never_overwritten(small: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    assert toy.make_toy(small, **SMALL) == small
    with pytest.raises(UserError, match="holds .*'train': 5.* not toy data of .*: choose another folder or remove it"):
        toy.make_toy(small, **{**SMALL, "train": 6})
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="holds other files"):
        toy.make_toy(tmp_path, **SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize("wrong", [{"train": 0}, {"size": (63, 80)}, {"seed": -1}])
def test_impossible_data_are_refused(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(UserError, match="need a picture a split, 64 pixels a side and a seed of 0 or more"):
        toy.make_toy(tmp_path / "none", **wrong)


def test_a_cut_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", Mock(side_effect=KeyboardInterrupt))  # while it writes the very last file
    with pytest.raises(KeyboardInterrupt):
        toy.make_toy(tmp_path / "data", train=1, val=1, size=(64, 64))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_comes_too_late_keeps_the_data_of_the_other(
        small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(self: Path, target: Path) -> None:
        shutil.copytree(small, target)  # the other process was here just before
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(Path, "rename", too_late)
    root = toy.make_toy(tmp_path / "data", **SMALL)
    assert contents(root) == contents(small) and [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    return [toy.draw_scene(np.random.default_rng((0, 1, i)), (96, 128)) for i in range(60)]


def test_every_class_is_frequent_enough_to_be_learned_and_measured(scenes: list) -> None:
    pixels = sum(np.bincount(labels.ravel(), minlength=256) for _, labels in scenes)
    assert pixels[len(toy.CLASSES):255].sum() == 0
    share = pixels[:10] / pixels[:10].sum()
    assert share.min() > 0.008 and share.max() < 0.5
    assert min(sum((labels == k).any() for _, labels in scenes) for k in range(10)) >= 25
    assert 0.02 < pixels[255] / pixels.sum() < 0.2


def test_colour_alone_does_not_tell_the_classes(scenes: list) -> None:
    """A table of the most frequent class of each of 4096 colours, made on one half, is well short on the other."""
    def flat(half: list) -> tuple[np.ndarray, np.ndarray]:
        images, labels = (np.stack(part) for part in zip(*half, strict=True))
        colours = (images // 16).astype(int) @ [256, 16, 1]
        return colours[labels != 255], labels[labels != 255]

    (colours, labels), (test_colours, test_labels) = flat(scenes[::2]), flat(scenes[1::2])
    table = np.zeros((4096, 10))
    np.add.at(table, (colours, labels), 1)
    prediction = table.argmax(axis=1)[test_colours]
    both = [((prediction == k) & (test_labels == k)).sum() for k in range(10)]
    either = [((prediction == k) | (test_labels == k)).sum() for k in range(10)]
    assert 0.3 < np.mean(np.divide(both, either)) < 0.5  # of which sky, grass and road have 0.7 and more


def test_labels_follow_the_picture() -> None:
    scene = toy.Scene(np.random.default_rng(0), (40, 50))
    scene.paint(scene.y - 100, np.float32([0, 0, 200]), toy.SKY)
    scene.paint(scene.disc(25, 20, 10), np.float32([200, 0, 0]), toy.BALL)
    red = scene.image[..., 0] > 100
    assert abs((scene.labels == toy.BALL).sum() - np.pi * 9**2) < 12  # a seam of 1 pixel on each side of the rim
    assert abs(red.sum() - np.pi * 10**2) < 6
    assert red[scene.labels == toy.BALL].all() and not red[scene.labels == toy.SKY].any()
    assert abs((scene.labels == 255).sum() - np.pi * (11**2 - 9**2)) < 12
