"""tools/checkpoints.py: released models by name, asked for and fetched once; published scores; runs of other times."""

import io
import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from common import UserError
from model import SIZES, ModelConfig
from predict import Predictor
from tools import checkpoints, fetch

COMMAND = "`python data.py fetch checkpoint:mine`"


def context_tree(root, split="val", images=1):
    """A VOC2010 tree with Pascal Context labels of 59 classes and of none."""
    rng = np.random.default_rng(0)
    for folder in data.PASCAL_CONTEXT[:3]:
        (root / folder).mkdir(parents=True)
    for i in range(images):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(root / f"JPEGImages/2008_{i}.jpg")
        Image.fromarray(rng.integers(0, 60, (40, 50), np.uint8)).save(root / f"SegmentationClassContext/2008_{i}.png")
    (root / f"ImageSets/SegmentationContext/{split}.txt").write_text("".join(f"2008_{i}\n" for i in range(images)))
    return data.open_dataset(root, split)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder and a table with one released model, checkpoint:mine, whose place is x/mine.pth."""
    monkeypatch.chdir(tmp_path)
    write_table()
    monkeypatch.setenv("FETCH_SOURCES", "table.json")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return tmp_path


def write_table(**more):
    entry = {"what": "x", "addresses": ["http://here/mine.pth", "http://there"], "path": "x/mine.pth", **more}
    Path("table.json").write_text(json.dumps({"checkpoint:mine": entry, "voc2010": entry, "context": entry}))


@pytest.fixture
def fetched(monkeypatch):
    """The calls of fetch(), which makes the file instead of fetching it."""
    calls = []

    def fake(names):
        calls.append(names)
        Path("x").mkdir()
        Path("x/mine.pth").touch()

    monkeypatch.setattr(fetch, "fetch", fake, raising=False)
    return calls


def test_a_file_of_a_released_models_name_wins(place, fetched):
    Path("mine").touch()
    assert checkpoints.find_checkpoint("mine") == Path("mine") and not fetched
    os.remove("mine")
    Path("mine").mkdir()  # a folder is no file
    assert checkpoints.find_checkpoint("mine", yes=True) == Path("x/mine.pth")


def test_a_released_model_that_is_here_is_neither_asked_for_nor_fetched(place, fetched):
    fetch.fetch([])
    for name in ("mine", Path("mine"), "checkpoint:mine"):
        assert checkpoints.find_checkpoint(name) == Path("x/mine.pth")
    assert fetched == [[]]


@pytest.mark.parametrize("name", ["mein", "voc2010", "no/mine", "", "a b'c"])
def test_what_is_no_file_and_no_model_is_told_with_the_models(place, fetched, name):
    with pytest.raises(UserError, match="no such file, and no released model: those are mine$"):
        checkpoints.find_checkpoint(name, yes=True)
    assert not fetched


@pytest.mark.parametrize(("answer", "agreed"), [("y\n", True), (" YES \n", True), ("n\n", False), ("\n", False),
                                                ("", False)])  # the last is Ctrl-D
def test_on_a_terminal_it_asks(place, fetched, monkeypatch, answer, agreed):
    write_table(what="mine, about 1.4 GB")
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys, "stderr", Terminal())
    if agreed:
        assert checkpoints.find_checkpoint("mine") == Path("x/mine.pth") and fetched == [["checkpoint:mine"]]
    else:
        with pytest.raises(UserError, match=f"{COMMAND} fetches it, and so does --yes"):
            checkpoints.find_checkpoint("mine")
        assert not fetched
    assert sys.stderr.getvalue() == "fetch mine, about 1.4 GB, from http://here/mine.pth? [y/N] "


@pytest.mark.parametrize("stdin", [None, io.StringIO("y\n")])
def test_without_a_terminal_it_fetches_only_with_yes(place, fetched, monkeypatch, stdin):
    monkeypatch.setattr(sys, "stdin", stdin)
    for find in (checkpoints.find_checkpoint, Predictor):
        with pytest.raises(UserError, match=f"no checkpoint at x/mine.pth: {COMMAND} fetches it, and so does --yes"):
            find("mine")
    assert not fetched
    assert checkpoints.find_checkpoint("mine", yes=True) == Path("x/mine.pth") and fetched == [["checkpoint:mine"]]


def test_a_question_that_nobody_would_see_is_not_asked(place, fetched, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))  # and stderr goes to a file
    with pytest.raises(UserError, match="so does --yes"):
        checkpoints.find_checkpoint("mine")


def test_of_a_node_the_first_process_alone_fetches_and_the_others_wait(place, fetched, monkeypatch):
    monkeypatch.setattr(checkpoints, "POLL", 0.01)
    monkeypatch.setenv("LOCAL_RANK", "1")
    found = []
    waiting = threading.Thread(target=lambda: found.append(checkpoints.find_checkpoint("mine", yes=True)))
    waiting.start()
    time.sleep(0.1)
    assert not found and not fetched
    monkeypatch.setenv("LOCAL_RANK", "0")
    checkpoints.find_checkpoint("mine", yes=True)
    waiting.join(5)
    assert found == [Path("x/mine.pth")] and fetched == [["checkpoint:mine"]]


def test_absent_data_is_told_with_the_absent_checkpoint_and_nothing_is_fetched(place, fetched):
    with pytest.raises(UserError, match=f"no data at nowhere.*; the checkpoint is absent too: {COMMAND}$"):
        checkpoints.find_checkpoint("mine", True, "nowhere")
    assert not fetched


@pytest.mark.parametrize(("head", "size", "split", "multi_scale", "expected"), [
    ("mask2former", "base", "val", False, 0.64), ("mask2former", "base", "val", True, 0.644),
    ("upernet", "large", "val", False, 0.67), ("mask2former", "large", "val", True, 0.682),
    ("upernet", "base", "val", False, None), ("mask2former", "tiny", "val", False, None),
    ("mask2former", "base", "train", False, None),
])
def test_published_scores_are_for_the_released_models_on_the_validation_of_pascal_context(
        tmp_path, head, size, split, multi_scale, expected):
    dataset, config = context_tree(tmp_path, split), ModelConfig(**{**vars(SIZES[size]), "head": head})
    assert checkpoints.published_score(config, dataset, multi_scale) == expected
    dataset.layout = data.PLAIN_FOLDER
    assert checkpoints.published_score(config, dataset, multi_scale) is None


@pytest.mark.parametrize(("kind", "images", "line"), [
    ("released", 5105, "mIoU single-scale   published 64.0   here 63.9"),
    ("released", 5104, "mIoU single-scale   published 64.0   here 63.9"),
    ("ours", 5104, "mIoU single-scale   published, trained by the authors, 64.0   this run 63.9"),
    ("released", 4, "mIoU single-scale   published 64.0   here 63.9 (on 4 images, not 5,105)"),
])
def test_published_and_own_scores_stand_side_by_side(kind, images, line):
    about = {"published_mean_iou": 0.64, "kind": kind, "scales": "single-scale", "images": images}
    assert checkpoints.comparison(about, 0.6391) == line


@pytest.mark.parametrize("text", [None, "", "[]", "{", "null", "\xff"])
def test_a_config_that_cannot_be_read_tells_nothing(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert checkpoints.run_config(tmp_path / "best.pt") == {}


@pytest.mark.parametrize(("name", "size", "file", "found"), [
    ("none", "large", None, None), (None, "tiny", None, None),
    (None, "base", "pretrained/beit_base_patch16_224_pt22k_ft22k.pth", ""),
    (None, "large", "pretrained/beit_large_patch16_224.in22k_ft_in22k.safetensors", ""),
    ("my file.pth", "large", "my file.pth", ""), ("my file.pth", "tiny", "my file.pth", ""),
    (None, "large", None, "`python data.py fetch beit:large`"),
    ("mask2former-base", "base", None, "`python data.py fetch checkpoint:mask2former-base`"),
    ("mask2former-bse", "base", None, "no such file, and no released model: those are mask2former-base, upernet-large"),
    ("pretrained", "base", "pretrained/x", "no such file"),  # a folder
])
def test_pre_trained_weights_are_found(tmp_path, monkeypatch, name, size, file, found):
    monkeypatch.chdir(tmp_path)
    if file:
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).touch()
    if found:
        with pytest.raises(UserError, match=found):
            checkpoints.find_pretrained(name, size)
    else:
        assert checkpoints.find_pretrained(name, size) == (None if found is None else Path(file))


def test_a_released_model_is_found_by_its_name_where_it_is_fetched_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = fetch.sources()["checkpoint:mask2former-base"].path
    path.parent.mkdir(parents=True)
    path.touch()
    assert checkpoints.find_pretrained("mask2former-base", "base") == path
