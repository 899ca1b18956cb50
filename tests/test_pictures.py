"""pictures.py: any picture file, label images, colours."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pictures
from common import UserError


def test_modes_and_rotation_are_read_as_opencv_does(tmp_path: Path) -> None:
    grey = np.arange(200, dtype=np.uint8).reshape(10, 20)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([grey] * 3 + [grey * 0])).save(tmp_path / "rgba.png")
    Image.fromarray(grey.astype(np.uint16) * 256 + 7).save(tmp_path / "deep.png")
    for name in ("grey", "rgba", "deep"):
        np.testing.assert_array_equal(pictures.read_image(tmp_path / f"{name}.png"), np.dstack([grey] * 3))
    Image.new("CMYK", (4, 4), (255, 0, 0, 0)).save(tmp_path / "cmyk.jpg")
    assert pictures.read_image(tmp_path / "cmyk.jpg")[0, 0].tolist() == [0, 255, 255]
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    Image.fromarray(np.dstack([grey] * 3)).save(tmp_path / "turned.png", exif=exif)
    turned = pictures.read_image(tmp_path / "turned.png")
    np.testing.assert_array_equal(turned, np.rot90(np.dstack([grey] * 3), -1))
    pictures.check_size(tmp_path / "turned.png", "labels", turned.shape[:2])
    with pytest.raises(UserError, match="turned.png is 10x20 pixels but labels is 20x10"):
        pictures.check_size(tmp_path / "turned.png", "labels", (10, 20))


def test_saved_labels_keep_values_and_palette(tmp_path: Path) -> None:
    labels, palette = np.uint8([[0, 1, 2], [255, 1, 0]]), np.uint8([[200, 0, 0], [0, 200, 0], [0, 0, 200]])
    pictures.save_labels(labels, tmp_path / "sub" / "x.png", palette)
    np.testing.assert_array_equal(pictures.read_labels(tmp_path / "sub" / "x.png"), labels)
    with Image.open(tmp_path / "sub" / "x.png") as picture:
        assert picture.mode == "P" and picture.getpalette()[:9] == palette.flatten().tolist()
    pictures.save_labels(np.uint16([[459, 1]]), tmp_path / "ids.png")
    assert pictures.read_labels(tmp_path / "ids.png").tolist() == [[459, 1]]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["ids.png", "sub", "x.png"]
