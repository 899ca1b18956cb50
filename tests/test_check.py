"""check.py: what spoils a training is found before it."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from common import UserError
from tools import check


def test_check_of_a_sound_data_set(make_own: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = make_own("3")
    check.check(own, tmp_path / "sheet.png", workers=1)
    printed = capsys.readouterr().out
    train = data.open_dataset(own, "train")
    pixels = np.bincount(np.stack([train.labels(i) for i in range(len(train))]).ravel(), minlength=256)
    row = next(line for line in printed.splitlines() if line.startswith("class 0")).split()
    assert float(row[2]) == pytest.approx(100 * pixels[0] / pixels[:3].sum(), abs=6e-4) and int(row[3]) == len(train)
    assert "class 2" in printed and printed.count("never in training") == 1 and printed.endswith("no faults\n")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width >= 4 * 30 and sheet.height >= 3 * 20


def test_check_finds_what_is_wrong(make_own: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = make_own("3")
    train, val = data.open_dataset(own, "train"), data.open_dataset(own, "val")
    Image.new("L", (30, 20), 200).save(train.label_paths[0])
    train.image_paths[1].write_bytes(train.image_paths[1].read_bytes()[:300])
    val.image_paths[0].write_bytes(train.image_paths[2].read_bytes())
    Image.new("L", (30, 20), 255).save(train.label_paths[3])
    Image.new("L", (30, 20)).save(train.image_paths[4])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 30)).save(train.image_paths[5], exif=exif)
    train.image_paths[6].rename(tmp_path / "away.jpg")
    train.image_paths[6].symlink_to(tmp_path / "away.jpg")
    with pytest.raises(UserError, match=f"^faults in {re.escape(str(own))}: 2, named above; mend them"):
        check.check(own, tmp_path / "sheet.png", workers=2)
    printed = capsys.readouterr().out
    for line in (f"fault: {train.label_paths[0]}: label value 200 is no class",
                 f"fault: {train.image_paths[1]}: not a readable image",
                 f"remark: a validation image that is in training too: 1 (val/{val.names[0]} = train/{train.names[2]})",
                 f"remark: no labelled pixel: 1 (train/{train.names[3]})",
                 f"remark: mode L, converted to RGB: 1 (train/{train.names[4]})",
                 f"remark: turned upright by its EXIF tag: 1 (train/{train.names[5]})",
                 f"remark: a link that leads out of the folder: 1 (train/{train.names[6]})"):
        assert line in printed


