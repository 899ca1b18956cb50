"""data.py: the official numbers of every operation, data sets and their faults, the stream and the loader."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NO_FAKE_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import data
from common import UserError
from data import Distortion

GOLDEN = Path(__file__).parent / "golden"
OPS = np.load(GOLDEN / "data_ops.npz")
CAMVID = Path(os.environ.get("VITSEG_CAMVID", Path(__file__).parents[2] / "shared" / "camvid"))


def grey_levels(actual: np.ndarray, expected: np.ndarray) -> int:
    """The largest difference of two uint8 images."""
    assert actual.shape == expected.shape
    return int(np.abs(actual.astype(int) - expected).max())


RESIZES = {  # how each golden picture is made
    "train_resize_317": lambda image: data.resize(image, data.scaled_size(image.shape[:2], 317 / 500)),
    "train_resize_700": lambda image: data.resize(image, data.scaled_size(image.shape[:2], 700 / 500)),
    "test_resize": lambda image: data.resize(image, tuple(OPS["test_resize_shape"])),
    "test_resize_multiple": lambda image: data.single_scale_image(image, 480),
}


@pytest.mark.parametrize("name", RESIZES)
def test_resize_is_the_official_one(name: str) -> None:
    result = RESIZES[name](OPS["image"])
    assert result.shape[:2] == tuple(OPS[f"{name}_shape"])
    assert grey_levels(result[::4, ::4], OPS[f"{name}_every4"]) <= 1 + name.endswith("multiple")  # resized twice
    if name.startswith("train"):
        labels = data.resize_labels(OPS["label"], result.shape[:2])[::4, ::4]
        np.testing.assert_array_equal(labels, OPS[name.replace("resize", "resize_label") + "_every4"])


def test_nearest_labels_are_floor_of_x_times_scale() -> None:
    labels = np.arange(251, dtype=np.uint8)[None]
    for width in (1, 50, 137, 250, 251, 252, 777):
        expected = [min(int(x * (1 / (width / 251))), 250) for x in range(width)]
        assert data.resize_labels(labels, (1, width))[0].tolist() == expected


@pytest.mark.parametrize(("shape", "window", "expected"), [
    ((375, 500), 480, (544, 704)),  # 520 x 693
    ((500, 375), 480, (704, 544)),
    ((300, 2400), 480, (512, 4096)),  # the long side stops at 4096
    ((100, 2000), 480, (480, 9600)),  # but never is the short side below the window
    ((192, 256), 128, (160, 192)),  # 139 x 185
])
def test_single_scale_sizes(shape: tuple[int, int], window: int, expected: tuple[int, int]) -> None:
    assert data.single_scale_image(np.zeros((*shape, 3), np.uint8), window).shape[:2] == expected


def test_multi_scale_is_the_official_one() -> None:
    images = data.multi_scale_images(OPS["image"], 480)
    assert [image.shape[:2] for image in images] == [tuple(OPS[f"ms_shape_{ratio}"]) for ratio in data.TEST_RATIOS]
    assert images[0] is images[1]
    assert grey_levels(images[0][::4, ::4], OPS["ms_resize_0.5_every4"]) <= 1
    assert grey_levels(images[3][::4, ::4], OPS["ms_resize_1.25_every4"]) <= 1


@pytest.mark.parametrize("case", range(6))
def test_photometric_distortion_is_the_official_one_to_the_bit(case: int) -> None:
    parameters = json.loads((GOLDEN / "photometric.json").read_text())[case]
    np.testing.assert_array_equal(data.distort(OPS["photo_input"], Distortion(**parameters)), OPS[f"photo_{case}"])


def test_hsv_of_known_colours() -> None:
    rgb = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 128], [90, 90, 90], [0, 0, 0], [200, 50, 50]]
    hsv = [[0, 255, 255], [60, 255, 255], [120, 255, 255], [30, 255, 255], [165, 255, 255],
           [0, 0, 90], [0, 0, 0], [0, 191, 200]]
    image = np.array([rgb], np.uint8)
    assert data.rgb_to_hsv(image)[0].tolist() == hsv
    assert grey_levels(data.hsv_to_rgb(data.rgb_to_hsv(image)), image) <= 1


def test_every_step_is_drawn_half_of_the_time_within_its_range() -> None:
    rng = np.random.default_rng(0)
    drawn = [Distortion.draw(rng) for _ in range(4000)]
    ranges = {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-18, 17)}
    for name, (low, high) in ranges.items():
        values = [v for v in (getattr(d, name) for d in drawn) if v is not None]
        assert 1850 < len(values) < 2150
        assert low <= min(values) < low + 0.02 * (high - low) and high - 0.02 * (high - low) < max(values) <= high
    assert 1850 < sum(d.contrast_first for d in drawn) < 2150


def test_normalisation_is_the_official_one_and_padding_is_zero_after_it() -> None:
    image = torch.from_numpy(OPS["image"]).permute(2, 0, 1)[None]
    result = data.normalize(image)
    np.testing.assert_allclose(result[0].permute(1, 2, 0)[::7, ::5], OPS["normalized"], rtol=0, atol=1e-6)
    images = torch.cat([image, image])
    inside = torch.zeros(2, 1, *image.shape[2:], dtype=torch.bool)
    inside[0], inside[1, :, :4, :5] = True, True
    assert torch.equal(data.normalize(images, torch.tensor([[*image.shape[2:]], [4, 5]])), result * inside)
    assert torch.equal(images[0], image[0])  # the input is left alone


@NO_FAKE_GPU
def test_normalisation_never_waits_for_the_device() -> None:
    with FakeTensorMode():  # a copy to the host raises here
        images = torch.empty(2, 3, 8, 8, dtype=torch.uint8, device="cuda")
        result = data.normalize(images, torch.empty(2, 2, dtype=torch.long, device="cuda"))
    assert result.device.type == "cuda" and result.dtype == torch.float32


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([32, 64]), st.integers(0, 10**6))
def test_training_crop_has_its_shape_and_its_padding(height, width, window, seed) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, (height, width), dtype=np.uint8)
    labels = np.kron(labels, np.ones((8, 8), np.uint8))
    image = np.repeat((labels * 80)[..., None], 3, axis=-1)
    crop, crop_labels, (h, w) = data.train_transform(image, labels, window, rng)
    assert crop.shape == (window, window, 3) and crop.dtype == np.uint8
    assert crop_labels.shape == (window, window) and crop_labels.dtype == np.uint8
    assert (crop_labels[h:] == 255).all() and (crop_labels[:, w:] == 255).all() and (crop_labels[:h, :w] < 4).all()
    assert not crop[h:].any() and not crop[:, w:].any()


def test_image_and_labels_move_together() -> None:
    rng = np.random.default_rng(3)
    labels = np.zeros((200, 260), np.uint8)
    labels[60:150, 40:110] = 1
    image = np.where(labels[..., None] == 1, np.uint8(230), np.uint8(20)).repeat(3, axis=-1)
    for _ in range(40):
        crop, crop_labels, (h, w) = data.train_transform(image, labels, 128, rng)
        bright = crop[:h, :w].max(axis=-1) > (int(crop[:h, :w].min()) + int(crop[:h, :w].max())) / 2
        if 0 < bright.mean() < 1 and (crop_labels[:h, :w] == 1).any():
            assert (bright == (crop_labels[:h, :w] == 1)).mean() > 0.97  # but for the rim, which bilinear blends


def test_long_side_is_between_half_and_twice_the_base_and_half_are_mirrored() -> None:
    rng, widths, mirrored = np.random.default_rng(0), [], []
    image, labels = np.zeros((10, 1000, 3), np.uint8), np.zeros((10, 1000), np.uint8)
    labels[:, 500:] = 1
    for _ in range(400):
        _, crop, (_, width) = data.train_transform(image, labels, 1040, rng)
        widths.append(width)
        if width < 1040:  # nothing was cropped: class 1 is on the right, or on the left after mirroring
            mirrored.append(crop[0, 0])
    assert data.base_size(480) == 520 and data.base_size(1040) == 1127
    assert 563 <= min(widths) < 600 and max(widths) == 1040
    assert 0.22 < len(mirrored) / 400 < 0.35  # of r in 0.5..2, those below 1040 / 1127: 0.28
    assert 0.35 < np.mean(mirrored) < 0.65


def test_crop_avoids_windows_of_one_class() -> None:
    labels = np.zeros((100, 400), np.uint8)
    labels[:, 340:] = 1
    labels[:50, :] = data.IGNORE
    rng = np.random.default_rng(0)
    crops = [labels[data.choose_crop(labels, 100, rng)] for _ in range(300)]
    share = np.array([(crop == 0).sum() / (crop != data.IGNORE).sum() for crop in crops])
    # 35 of the 301 places have 25 to 75 % of class 1. Ten tries miss them with probability 0.29, the last one adds a
    # chance: 0.26. A single draw would miss them with 0.88.
    assert 0.16 < np.mean(share >= 0.75) < 0.40


def write_plain(root: Path, names=("a", "b", "ü c")) -> Path:
    """A plain folder of 3 classes with noise as images."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(root / "images" / f"{name}.png")
        labels = rng.integers(0, 3, (40, 60), dtype=np.uint8)
        labels[0, 0] = 255
        Image.fromarray(labels).save(root / "labels" / f"{name}.png")
    (root / "dataset.json").write_text('{"classes": ["c0", "c1", "c2"]}')
    (root / "train.txt").write_text("\n".join(names) + "\n\n", encoding="utf-8")
    (root / "val.txt").write_text(f"{names[0]}.png\r\n", encoding="utf-8")
    return root


def test_plain_folder(tmp_path: Path) -> None:
    dataset = data.open_dataset(write_plain(tmp_path / "d"), "train")
    assert dataset.names == ["a", "b", "ü c"] and len(dataset) == 3 and dataset.split == "train"
    assert dataset.info.classes == ("c0", "c1", "c2") and dataset.info.palette.shape == (3, 3)
    np.testing.assert_array_equal(dataset.image(2), np.asarray(Image.open(tmp_path / "d/images/ü c.png")))
    np.testing.assert_array_equal(dataset.labels(2), np.asarray(Image.open(tmp_path / "d/labels/ü c.png")))
    assert data.open_dataset(tmp_path / "d", "val").names == ["a"]  # extension and Windows line end are cut off
    (tmp_path / "d/dataset.json").write_text('{"classes": ["x", "y", "z"], "ignore_index": 7, "name": "Mine"}')
    Image.fromarray(np.resize(np.uint8([0, 1, 2, 7]), (40, 60))).save(tmp_path / "d/labels/a.png")
    dataset = data.open_dataset(tmp_path / "d", "val")
    assert np.unique(dataset.labels(0)).tolist() == [0, 1, 2, 255] and dataset.info.name == "Mine"


def test_pascal_context_tree(tmp_path: Path) -> None:
    for folder in data.PASCAL_CONTEXT[:3]:
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "JPEGImages" / "2008_1.jpg")
    Image.fromarray(OPS["reduce_zero_in"] % 60).save(tmp_path / "SegmentationClassContext" / "2008_1.png")
    (tmp_path / "ImageSets/SegmentationContext/val.txt").write_text("2008_1\n")
    dataset = data.open_dataset(tmp_path, "val")
    classes = dataset.info.classes
    assert len(classes) == 59 and classes[0] == "aeroplane" and classes[58] == "wood"
    assert dataset.info.palette[0].tolist() == [180, 120, 120]
    np.testing.assert_array_equal(dataset.labels(0), (OPS["reduce_zero_in"] % 60 - 1).astype(np.uint8))
    Image.new("L", (16, 16), 60).save(dataset.label_paths[0])
    with pytest.raises(UserError, match="label value 60 is no class: use 1..59, or 255"):
        dataset.labels(0)
    dataset.info = dataset.info._replace(classes=("x",) * 254)
    Image.fromarray(OPS["reduce_zero_in"]).save(dataset.label_paths[0])
    np.testing.assert_array_equal(dataset.labels(0), OPS["reduce_zero_out"])


NOISE = np.random.default_rng(0).integers(0, 3, (40, 60), dtype=np.uint8)
FOREIGN = np.where(NOISE == 2, np.uint8(17), NOISE)


def spoil(path: Path, content: np.ndarray | str | int | None) -> None:
    """Give a file other content: labels, a text, its own first bytes, or none, not even a file."""
    before = path.read_bytes()
    path.unlink()
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else before[:content])


@pytest.mark.parametrize(("file", "content", "message"), [
    ("labels/a.png", FOREIGN, "labels/a.png: label value 17 is no class: use 0..2, or 255"),
    ("labels/a.png", NOISE[:-1], "images/a.png is 60x40 pixels but .*labels/a.png is 60x39"),
    ("labels/a.png", np.dstack([NOISE] * 3), "labels/a.png holds colours.*from-folders"),
    ("labels/a.png", None, "labels has no 'a.png', which .*train.txt names: add"),
    ("images/a.png", 0, "images/a.png: not a readable image .*cannot identify"),
    ("images/a.png", 3000, "images/a.png: not a readable image .*truncated"),
    ("images/a.png", "not an image", "images/a.png: not a readable image"),
    ("images/a.png", None, "images has no 'a', which .*train.txt names as .*.png.*: add"),
    ("train.txt", None, r"train.txt: cannot be read \(No such file or directory\): .* \(splits here: val\)"),
    ("train.txt", "a\nb\na.png\n", "train.txt names 'a' more than once: leave one"),
    ("train.txt", "a\x0cb\n", r"images has no 'a\?b', which"),  # a form feed ends no line
    ("train.txt", "\n \n", "train.txt is empty"),
    ("train.txt", "../../secret\n", "train.txt names '../../secret', which leads out"),
    ("train.txt", "/etc/passwd\n", "train.txt names '/etc/passwd', which leads out"),
    ("train.txt", "a\n" + "x" * 5000, "^.{500}$"),
    ("dataset.json", '{"classes": [\n"a",\n"b"\n"c"]}', "dataset.json .*Expecting ',' delimiter: line 4 column 1"),
    ("dataset.json", '{"name": "x"}', '"classes" must be a list'),
    ("dataset.json", '{"classes": ["a", "a", "b"]}', 'dataset.json: "classes": 3 names, 1 repeated'),
    ("dataset.json", '{"classes": []}', '"classes": 0 names'),
    ("dataset.json", '{"classes": ["a", "\\u001b[31m"]}', '"classes": .* is no name of a class'),
    ("dataset.json", '{"classes": ["a", "b\\nc"]}', '"classes": .* is no name of a class'),
    ("dataset.json", '{"classes": ["a", "\\ud800"]}', '"classes": .* is no name of a class'),
    ("dataset.json", '{"classes": ["a"], "classes": ["b"]}', "a key is there twice in classes, classes"),
    ("dataset.json", '{"note": ' + "[" * 100_000, "dataset.json is no readable JSON .RecursionError"),
    ("dataset.json", '{"classes": ["a"], "ignore_index": 1' + "0" * 5000 + "}", "dataset.json is no readable JSON"),
    ("dataset.json", '{"classes": ["a"], "palette": [[1e999, 0, 0]]}', '"palette" must hold 1 colours'),
    ("dataset.json", '{"classes": ["a", "b"], "palette": [[0, 0, 256], [1, 1, 1]]}', '"palette" must hold 2 colours'),
    ("dataset.json", '{"classes": ["a", "b"], "palette": [[0, 0, 25]]}', '"palette" must hold 2 colours'),
    ("dataset.json", '{"classes": ["a", "b"], "palette": "red"}', '"palette" must hold 2 colours'),
    ("dataset.json", '{"classes": ["a"], "palette": [[0.9, 0.1, 0.1]]}', "1 colours .*, whole numbers 0..255"),
    ("dataset.json", '{"classes": ["a"], "ignore_label": 0}', '"ignore_label" is not known: write "ignore_index"'),
    ("dataset.json", '{"CLASSES": ["a"]}', '"CLASSES" is not known: write "classes"'),
    ("dataset.json", '{"classes": ["a"], "colors": []}', '"colors" is not known: write "palette"'),
    ("dataset.json", '{"classes": ["a"], "reduce_zero_label": true}', "from-folders --zero-is-unlabelled"),
    ("dataset.json", '{"classes": ["a"], "licence": "x"}', '"licence" is not known: keys are classes, palette, .*note'),
    ("dataset.json", '{"classes": ["a", "b", "c"], "ignore_index": 2}', '"ignore_index" is 2 but must be .*3..255'),
])
def test_a_fault_is_one_line_that_names_the_file(tmp_path: Path, file: str, content: object, message: str) -> None:
    root = write_plain(tmp_path / "d")
    spoil(root / file, content)
    with pytest.raises(UserError, match=message) as raised:
        dataset = data.open_dataset(root, "train")
        dataset.image(0), dataset.labels(0)
    assert "\n" not in str(raised.value)


def test_a_palette_of_another_order_is_refused_and_a_tools_own_is_not(tmp_path: Path) -> None:
    root = write_plain(tmp_path / "d")
    colours = [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    (root / "dataset.json").write_text(json.dumps({"classes": ["c0", "c1", "c2"], "palette": colours}))
    for order, right in (([0, 1, 2], True), ([0, 2, 1], False), ([0, 1, 0], False), (None, True)):
        picture = Image.fromarray(NOISE)
        picture.putpalette([1, 1, 1, 9, 9, 9, 7, 7, 7] if order is None else sum((colours[k] for k in order), []))
        picture.save(root / "labels" / "a.png")
        dataset = data.open_dataset(root, "val")
        if right:
            np.testing.assert_array_equal(dataset.labels(0), NOISE)
        else:
            fault = f"'c{(value := 1 + (order == [0, 1, 0]))}', in the colour of 'c{order[value]}'"
            with pytest.raises(UserError, match=f"a.png draws value {value}, {fault}: its palette has another order"):
                dataset.labels(0)
    (root / "dataset.json").write_text(json.dumps({"classes": ["c0", "c1", "c2"], "palette": [[1, 1, 1]] * 3}))
    picture.putpalette([1] * 9)  # classes of one colour have no order
    picture.save(root / "labels" / "a.png")
    np.testing.assert_array_equal(data.open_dataset(root, "val").labels(0), NOISE)


@pytest.mark.parametrize(("image", "label", "line", "name"), [
    ("e.Jpg", "e.png", "e", "e"),
    ("e.JPEG", "e.PNG", "e.JPEG", "e"),
    ("e.png.jpg", "e.png.png", "e.png", "e.png"),
    ("e.png.jpg", "e.png.png", "e.png.jpg", "e.png"),
    ("e.v2.jpg", "e.v2.png", "e.v2", "e.v2"),
    ("e\u0301.jpg", "\u00e9.png", "\u00e9", "e\u0301"),  # an accent apart, as some systems write it
    ("sub/e.jpg", "sub/e.png", "sub/e", "sub/e"),
    ("a\u030a/e.jpg", "\u00e5/e.png", "\u00e5/e.jpg", "a\u030a/e"),
    ("e.jpg", "e.PnG", "./e.png", "e"),  # the extension of another copy
    ("e\x0cf.jpg", "e\x0cf.png", "e\x0cf", "e\x0cf"),
])
def test_files_are_found_by_name(tmp_path: Path, image: str, label: str, line: str, name: str) -> None:
    root = write_plain(tmp_path / "d")
    for folder, file in (("images", image), ("labels", label)):
        (root / folder / file).parent.mkdir(exist_ok=True)
        Image.fromarray(NOISE).save(root / folder / file, "PNG")
    (root / "extra.txt").write_text(f"b\n{line}\n", encoding="utf-16")
    dataset = data.open_dataset(root, "extra")
    assert dataset.names == ["b", name] and dataset.image_paths[1] == root / "images" / image
    assert dataset.label_paths[1] == root / "labels" / label
    np.testing.assert_array_equal(dataset.labels(1), NOISE)


def test_two_files_of_a_name_must_be_told_apart(tmp_path: Path) -> None:
    root = write_plain(tmp_path / "d")
    Image.new("RGB", (60, 40)).save(root / "images" / "a.jpg")
    with pytest.raises(UserError, match="train.txt names 'a', and .*images has a.jpg and a.png: keep one of"):
        data.open_dataset(root, "train")
    assert data.open_dataset(root, "val").image_paths == [root / "images" / "a.png"]


def test_an_inner_extension_belongs_to_the_name(tmp_path: Path) -> None:
    root = write_plain(tmp_path / "d")
    for k, name in enumerate(("x", "x.png")):  # x.jpg with x.png, and x.png.jpg with x.png.png
        Image.new("RGB", (60, 40), (k, k, k)).save(root / "images" / f"{name}.jpg", quality=100)
        Image.new("L", (60, 40), k).save(root / "labels" / f"{name}.png")
    (root / "both.txt").write_text("x.png.jpg\nx\n")
    dataset = data.open_dataset(root, "both")
    assert dataset.names == ["x.png", "x"]
    assert [(dataset.image(i).max(), dataset.labels(i).max()) for i in range(2)] == [(1, 1), (0, 0)]
    (root / "both.txt").write_text("x.png\n")
    with pytest.raises(UserError, match="both.txt names 'x.png', and .*images has x.png.jpg and x.jpg: keep one"):
        data.open_dataset(root, "both")
    (root / "labels" / "x.png").unlink()
    with pytest.raises(UserError, match="labels has no 'x.png'"):  # and x.png.png is another image's
        (root / "both.txt").write_text("x.jpg\n")
        data.open_dataset(root, "both")


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 40 x 60 is more than twice that
    with pytest.raises(UserError, match="a.png: not a readable image .*decompression bomb"):
        data.open_dataset(write_plain(tmp_path / "d"), "val").image(0)


VOC, PREPARE = "data/VOCdevkit/VOC2010", "python data.py prepare-context"


@pytest.mark.parametrize(("root", "made", "fault", "commands"), [
    ("nowhere", [], "no data at nowhere, which is no folder: mend the name", ["python data.py from-folders --help"]),
    ("d e", ["d e/"], "no data at d e, which has no dataset.json", ["python data.py from-folders --help"]),
    (VOC, [], f"no data at {VOC}: .*--data toy", ["python data.py fetch voc2010 context", PREPARE]),
    (VOC, [f"{VOC}/trainval_merged.json"], "no data at", ["python data.py fetch voc2010", PREPARE]),
    (VOC, [f"{VOC}/JPEGImages/"], "VOC images but no Pascal Context labels", ["python data.py fetch context", PREPARE]),
    (VOC, [f"{VOC}/JPEGImages/", f"{VOC}/trainval_merged.json", f"{VOC}/SegmentationClassContext/"],  # cut short
     "VOC images but no", [PREPARE]),
    ("my VOC", ["my VOC/JPEGImages/"], "VOC images",
     ["python data.py fetch context", f"{PREPARE} --voc 'my VOC' --json {VOC}/trainval_merged.json"]),
    ("v", ["v/JPEGImages/", "v/trainval_merged.json"], "VOC images", [f"{PREPARE} --voc v"]),
    ("v", ["v/JPEGImages/", "v/trainval/a.mat"], "VOC images", [f"{PREPARE} --voc v"]),
])
def test_a_root_without_data_says_what_is_still_to_be_done(tmp_path, monkeypatch, root, made, fault, commands) -> None:
    monkeypatch.chdir(tmp_path)
    for name in made:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).mkdir() if name.endswith("/") else Path(name).touch()
    with pytest.raises(UserError, match=fault) as raised:
        data.open_dataset(root, "train")
    assert re.findall("`(python [^`]*)`", str(raised.value)) == commands


def test_pixels_of_some_label_images_are_counted(tmp_path: Path) -> None:
    dataset = data.open_dataset(write_plain(tmp_path / "d"), "train")
    pixels = np.stack([dataset.labels(i) for i in range(3)])
    assert data.count_labels(dataset).tolist() == np.bincount(pixels.ravel(), minlength=256).tolist()
    assert data.count_labels(dataset, sample=1).tolist() == np.bincount(pixels[0].ravel(), minlength=256).tolist()


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"no CamVid at {CAMVID}; set VITSEG_CAMVID")
def test_camvid() -> None:
    train, val = data.open_dataset(CAMVID, "train"), data.open_dataset(CAMVID, "val")
    assert (len(train), len(val), train.info.name, len(train.info.classes)) == (367, 101, "CamVid-11", 11)
    assert train.image(0).shape == (360, 480, 3) and train.labels(0).shape == (360, 480)
    batch = next(iter(data.training_loader(train, 480, seed=0, positions=[[0, 1]], workers=0)))
    assert batch.images.shape == (2, 3, 480, 480) and set(batch.labels.unique().tolist()) <= {*range(11), 255}


@pytest.mark.parametrize(("world", "batch", "accumulation"), [(8, 2, 1), (4, 4, 1), (2, 4, 2), (1, 1, 16), (1, 16, 1)])
def test_every_layout_sees_the_same_global_batches(world: int, batch: int, accumulation: int) -> None:
    streams = [data.positions(5, rank, world, batch, accumulation) for rank in range(world)]
    lists = [list(itertools.islice(stream, 3 * accumulation)) for stream in streams]
    assert all(len(micro) == batch for rank in lists for micro in rank)
    for i in range(3):
        step = [p for rank in lists for micro in rank[i * accumulation:(i + 1) * accumulation] for p in micro]
        assert step == list(range((5 + i) * 16, (6 + i) * 16))


def batches(root: Path, positions, workers: int, seed: int = 0) -> list[data.Batch]:
    dataset = data.open_dataset(root, "train")
    return list(data.training_loader(dataset, 32, seed=seed, positions=positions, workers=workers))


def test_loader_is_the_same_for_any_number_of_workers_and_after_a_resume(tmp_path: Path) -> None:
    root = write_plain(tmp_path / "d", names=[f"n{i}" for i in range(7)])
    stream = list(itertools.islice(data.positions(0, 0, 1, 3, 1), 6))
    torch.manual_seed(1)
    alone = batches(root, stream, workers=0)
    torch.manual_seed(2)  # no global generator has a say
    np.random.seed(3)
    for other in (batches(root, stream, workers=2), alone[:2] + batches(root, stream[2:], workers=1)):
        for a, b in zip(alone, other, strict=True):
            assert a.names == b.names and all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    assert alone[0].images.dtype == alone[0].labels.dtype == torch.uint8 and alone[0].extents.dtype == torch.int64
    assert alone[0].images.shape == (3, 3, 32, 32) and alone[0].labels.shape == (3, 32, 32)
    different = batches(root, stream, workers=0, seed=1)
    assert not torch.equal(alone[0].images, different[0].images)


def test_each_epoch_is_a_new_permutation_and_distorts_anew(tmp_path: Path) -> None:
    root = write_plain(tmp_path / "d", names=[f"n{i}" for i in range(10)])
    stream = [[position] for position in range(40)]
    loaded = batches(root, stream, workers=0)
    epochs = [[batch.names[0] for batch in loaded[i:i + 10]] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and len(set(map(tuple, epochs))) == 4
    first, second, *_ = (batch.images for batch in loaded if batch.names == ["n0"])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_in_a_worker_is_one_clean_line(tmp_path: Path, workers: int) -> None:
    root = write_plain(tmp_path / "d")
    spoil(root / "labels" / "a.png", FOREIGN)
    with pytest.raises(UserError) as raised:
        batches(root, [[0, 1, 2]], workers)
    assert str(raised.value).startswith(f"{root}/labels/a.png: label value 17") and "\n" not in str(raised.value)


SIGNALLED = """
import itertools, multiprocessing, os, signal, sys, time, data
multiprocessing.set_start_method(sys.argv[1])
dataset = data.open_dataset(sys.argv[2], "train")
stream = data.training_loader(dataset, 32, seed=0, positions=itertools.repeat([0]), workers=2)
print(next(stream).names == next(stream).names, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
signal.signal(signal.SIGTERM, lambda *_: print("signalled"))
os.killpg(0, signal.SIGTERM)
time.sleep(0.5)
print(len(multiprocessing.active_children()))
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_outlive_a_signal_to_the_group_however_they_start(tmp_path: Path, method: str) -> None:
    """SIGTERM reaches the main process; what loads its data, and the server that has forked it, go on."""
    command = [sys.executable, "-c", SIGNALLED, method, write_plain(tmp_path / "d")]
    done = subprocess.run(command, cwd=data.CONTEXT_CLASSES.parent, capture_output=True, text=True,
                          start_new_session=True, check=True)
    assert done.stdout.splitlines() == ["True True", "signalled", "2"]


def test_a_name_from_a_file_does_not_write_on_the_terminal(tmp_path: Path) -> None:
    joined = "\u0645\u06cc\u200c\u062e"  # a Persian word with its joiner, which is no printable character
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["a", joined], "name": "x\x1b[2J\n"}))
    info = data.read_info(tmp_path / "dataset.json")
    assert info.name == "x?[2J?" and info.classes == ("a", joined)
