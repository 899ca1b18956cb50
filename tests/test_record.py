"""tools/record.py: where evaluation.json goes; label images with original ids."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
from tools import record


def place(folder: Path, checkpoint: str = "best.pt", **changes) -> Path | None:
    options = Namespace(**{"json": None, "limit": None, "data": None, "split": "val", "ms": False, **changes})
    return record.place(options, folder / checkpoint)


@pytest.mark.parametrize(("changes", "name"), [
    ({}, "evaluation.json"), ({"ms": True}, "evaluation-ms.json"), ({"split": "test"}, "evaluation-test.json"),
    ({"split": "held out/1", "ms": True}, "evaluation-held out-1-ms.json"),
    ({"checkpoint": "last.pt", "ms": True}, "evaluation-last-ms.json"), ({"data": "a/../street/"}, "evaluation.json"),
    ({"data": "winter/street", "split": "test"}, "evaluation-street-test.json"),
])
def test_the_numbers_go_beside_the_checkpoint_under_a_name_of_their_own(tmp_path, changes, name):
    (tmp_path / "config.json").write_text('{"data": "street"}')
    assert place(tmp_path, **changes) == tmp_path / name


def test_a_model_without_a_run_has_no_usual_data(tmp_path):
    assert place(tmp_path, data="street") == tmp_path / "evaluation.json"


def test_numbers_of_some_images_are_written_where_json_says_only(tmp_path):
    assert place(tmp_path, limit=3) is None
    assert place(tmp_path, limit=3, json=Path("x.json")) == place(tmp_path, json=Path("x.json")) == Path("x.json")


def test_a_folder_that_takes_no_file_is_a_warning_that_names_the_option(tmp_path, capsys, monkeypatch):
    (tmp_path / "evaluation.json").mkdir()
    assert place(tmp_path) is None
    first = capsys.readouterr().out

    def read_only(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(record.common.tempfile, "TemporaryFile", read_only)
    assert place(tmp_path, ms=True) is None
    for text in (first, capsys.readouterr().out):
        assert text.startswith("warning: the numbers are not written: ") and str(tmp_path) in text
        assert text.endswith(" with --json\n") and text.count("\n") == 1


def test_original_ids_are_those_of_the_459_classes(tmp_path):
    info = data.context_info()
    dataset = SimpleNamespace(info=info, names=["2008_000002"])
    record.label_writer(tmp_path, dataset, original_ids=True)(0, np.uint8([[0, info.classes.index("sky")]]))
    with Image.open(tmp_path / "2008_000002.png") as picture:
        assert np.array(picture).tolist() == [[2, 360]]
