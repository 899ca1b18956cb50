"""from_folders.py: exports of labelling tools become a plain folder with the right labels, or are refused."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from common import UserError
from tools import from_folders, prepare

NAMES, COLOURS = "sky\nroad\ncar\n", np.uint8([[70, 130, 180], [128, 64, 128], [0, 0, 142]])
LIST = "".join(f"{name} {r} {g} {b}\n" for name, (r, g, b) in zip(NAMES.split(), COLOURS.tolist(), strict=True))


def scene(seed: int, values: int = 3) -> np.ndarray:
    """Labels uint8 (12, 16) in which every value occurs."""
    labels = np.random.default_rng(seed).integers(0, values, (12, 16)).astype(np.uint8)
    labels[0, :values] = np.arange(values)
    return labels


def write(root: Path, save: Callable[[Path, np.ndarray, int], object], names=tuple("abcdef"), image="{}.jpg",
          values: int = 3) -> dict[str, np.ndarray]:
    """Write images and label files below `root`; returns the true labels by name."""
    truth = {name: scene(i, values) for i, name in enumerate(names)}
    for i, (name, labels) in enumerate(truth.items()):
        for path in (root / "images" / image.format(name), root / "masks" / name):
            path.parent.mkdir(parents=True, exist_ok=True)
        gray = np.repeat(labels[..., None] * np.uint8(60), 3, -1)
        Image.fromarray(gray).save(root / "images" / image.format(name), "PNG")
        save(root / "masks" / f"{name}.png", labels, i)
    return truth


def run(root: Path, classes: str, *options: str) -> None:
    if not classes.isdigit():
        (root / "classes.txt").write_text(classes)
        classes = f"{root}/classes.txt"
    words = f"from-folders --images {root}/images --labels {root}/masks --out {root}/own --workers 1".split()
    chosen = vars(prepare.build_parser().parse_args([*words, "--classes", classes, *options]))
    chosen.pop("command")(**chosen)


def made(root: Path) -> dict[str, np.ndarray]:
    """The labels of the data set that was made, by name."""
    splits = [data.open_dataset(root / "own", split.stem) for split in (root / "own").glob("*.txt")]
    return {name: split.labels(i) for split in splits for i, name in enumerate(split.names)}


def assert_made(root: Path, truth: dict[str, np.ndarray]) -> None:
    found = made(root)
    assert sorted(found) == sorted(truth)
    for name, labels in truth.items():
        np.testing.assert_array_equal(found[name], labels)


def palette_png(path: Path, indices: np.ndarray, palette: np.ndarray) -> None:
    picture = Image.fromarray(indices)
    picture.putpalette(np.ravel(palette).tolist())
    picture.save(path)


def short_palette(path: Path, labels: np.ndarray, i: int) -> None:
    """The values 0, 1 and 255, and a palette of 20 colours: with 16 or fewer Pillow does not write 255."""
    palette_png(path, np.uint8([0, 1, 255])[labels], np.resize(COLOURS, (20, 3)))


def shuffled(path: Path, labels: np.ndarray, i: int) -> None:
    """A palette image with the colours in another order in every file, as editors and quantisers write them."""
    order = np.array([*itertools.permutations(range(3))][1 + i % 5])
    palette_png(path, np.argsort(order).astype(np.uint8)[labels], COLOURS[order])


def gray(values: list[int]) -> Callable:
    return lambda path, labels, i: Image.fromarray(np.uint8(values)[labels]).save(path)


def mixed(one: Callable, other: Callable) -> Callable:
    return lambda path, labels, i: (one if i % 2 else other)(path, labels, i)


def gray_rgb(path: Path, labels: np.ndarray, i: int = 0) -> None:
    Image.fromarray(np.dstack([labels] * 3)).save(path)


def coloured(path: Path, labels: np.ndarray, i: int = 0) -> None:
    Image.fromarray(COLOURS[labels]).save(path)


def same(labels: np.ndarray) -> np.ndarray:
    return labels


def from_zero(labels: np.ndarray) -> np.ndarray:
    return np.where(labels == 0, 255, labels - 1).astype(np.uint8)


@pytest.mark.parametrize(("save", "classes", "options", "right", "said"), [
    (coloured, LIST, (), same, ""),
    (shuffled, LIST, (), same, "labels: by the colours of their palettes\n"),
    (lambda path, labels, i: Image.fromarray(COLOURS[labels]).quantize(3 + i).save(path), LIST, (), same, "palettes"),
    (lambda path, labels, i: Image.fromarray(np.dstack([COLOURS[labels], labels * 0])).save(path), LIST, (), same, ""),
    (lambda path, labels, i: palette_png(path, labels, COLOURS), NAMES, (), same,
     "labels: 0 is sky (70 130 180), 1 is road (128 64 128), 2 is car (0 0 142)\n"),
    (gray([0, 1, 2]), NAMES, (), same, "labels: 0 is sky, 1 is road, 2 is car\n"),
    (gray([0, 1, 2]), LIST, (), same, "labels: the colours of the list are for drawing only\n"),
    (gray([0, 1, 255]), "2", (), lambda labels: np.where(labels == 2, 255, labels),
     "labels: 0 is class 0, 1 is class 1, 255 is unlabelled\n"),
    (gray([0, 127, 255]), "a 0 0 0\nb 127 127 127\nc 255 255 255\n", (), same, "by the gray levels of the list"),
    (lambda path, labels, i: Image.fromarray(labels == 0).save(path), "road 255 255 255\nbg 0 0 0\n", (),
     lambda labels: (labels > 0).astype(np.uint8), "labels: by the colours of their palettes\n"),  # one bit a pixel
    (gray([0, 1, 2]), "road\ncar\n", ("--zero-is-unlabelled",), from_zero, "0 is unlabelled, 1 is road, 2 is car\n"),
    (gray([0, 1, 2]), LIST.replace("sky 70 130 180\n", ""), ("--zero-is-unlabelled",), from_zero, "for drawing only\n"),
    (gray([0, 7, 9]), "id,name\n7,road\n9,car\n", ("--zero-is-unlabelled",), from_zero, "0 is unlabelled, 7 is road"),
    (gray([0, 1, 2]), "0 void\n1 road\n2 car\n", ("--zero-is-unlabelled",), from_zero, "0 is unlabelled, 1 is road"),
    (gray([0, 1, 2]), "void\nroad\ncar\n", (), from_zero, "0 is unlabelled, 1 is road, 2 is car\n"),
    (gray([0, 1, 255]), "__ignore__\n_background_\nscratch\n", (),
     lambda labels: np.where(labels == 2, 255, labels), "labels: 0 is _background_, 1 is scratch, 255 is unlabelled\n"),
    (gray_rgb, NAMES, (), same, "labels: the gray levels of three equal channels\nlabels: 0 is sky, 1 is road"),
    (gray_rgb, LIST, (), same, "labels: the colours of the list are for drawing only\n"),
    (mixed(gray_rgb, gray([0, 1, 2])), NAMES, (), same, "labels: 0 is sky, 1 is road, 2 is car\n"),
    (lambda path, labels, i: Image.fromarray(labels.astype(np.uint16)).save(path), NAMES, (), same, "0 is sky"),
    (lambda path, labels, i: Image.merge("LA", [Image.fromarray(labels)] * 2).save(path), NAMES, (), same, "0 is sky"),
    (coloured, LIST.replace("car", "ignore"), (), lambda labels: np.where(labels == 2, 255, labels), ""),
    (coloured, LIST.replace("car", "road"), (), lambda labels: labels.clip(0, 1), ""),  # two colours of one class
], ids=itertools.count())
def test_labels_are_the_true_ones(tmp_path: Path, capsys, save: Callable, classes: str, options: tuple,
                                  right: Callable, said: str) -> None:
    truth = {name: right(labels) for name, labels in write(tmp_path, save).items()}
    run(tmp_path, classes, *options)
    assert_made(tmp_path, truth)
    printed = capsys.readouterr().out
    assert said in printed and ("labels: " in printed) == bool(said)
    assert printed.endswith(f"train with `python train.py --data {tmp_path}/own --size tiny`\n")


@pytest.mark.parametrize(("save", "classes", "message"), [
    (gray([0, 1, 2]), "0 sky\n1 road\n2 car\n", "contradicts the list, which says what 0 is: leave one of them out"),
    (coloured, LIST, "but the label files have the colours of the list: write `ignore R G B` there"),
])
def test_zero_is_unlabelled_contradicts(tmp_path: Path, save: Callable, classes: str, message: str) -> None:
    write(tmp_path, save)
    with pytest.raises(UserError, match=message):
        run(tmp_path, classes, "--zero-is-unlabelled")


@pytest.mark.parametrize("classes", ["2", "Pixel Value, Class\n0, class 0\n1, class 1\n"])
@pytest.mark.parametrize("first_file", [[0, 255], [0, 0], [255, 255]])
def test_two_classes_as_0_and_255_are_mapped(tmp_path: Path, capsys, first_file: list[int], classes: str) -> None:
    truth = write(tmp_path, gray([0, 255]), values=2)
    Image.fromarray(np.uint8(first_file)[truth["a"]]).save(tmp_path / "masks" / "a.png")
    run(tmp_path, classes)
    assert_made(tmp_path, truth | {"a": np.uint8(first_file)[truth["a"]] // 255})
    assert "labels: 0 is class 0, 255 is class 1\n" in capsys.readouterr().out


@pytest.mark.parametrize(("classes", "options", "values", "right"), [
    (NAMES, (), [0, 1, 2], COLOURS),
    ("road\ncar\n", ("--zero-is-unlabelled",), [0, 1, 2], COLOURS[1:]),
    ("void\nroad\ncar\n", (), [0, 1, 2], COLOURS[1:]),
    ("2 sky\n0 road\n1 car\n", (), [0, 1, 2], COLOURS[[2, 0, 1]]),
    ("2", (), [0, 255, 255], COLOURS[[0, 2]]),
])
def test_the_colours_of_palettes_are_kept(tmp_path: Path, classes: str, options: tuple, values: list[int],
                                          right: np.ndarray) -> None:
    palette = np.zeros((256, 3), np.uint8)
    palette[values] = COLOURS
    write(tmp_path, lambda path, labels, i: palette_png(path, np.uint8(values)[labels], palette))
    run(tmp_path, classes, *options)
    np.testing.assert_array_equal(data.open_dataset(tmp_path / "own", "train").info.palette, right)


def luma(path: Path, labels: np.ndarray, i: int) -> None:
    """Colours as their brightness, as a conversion to gray makes them."""
    Image.fromarray(COLOURS[labels]).convert("L").save(path)


@pytest.mark.parametrize(("save", "classes", "message"), [
    (luma, LIST, r"label value \d+ \(and 2 others: value \d+; value \d+\) is none of the classes"),
    (short_palette, NAMES, "a.png holds value 255, and its palette has 20 colours: save it again"),
    (gray([0, 1, 1]), "crack\n", "label value 1 is none of the classes"),
    (gray([0, 255, 255]), "crack\n", "nothing but 'crack': .*; put `background` before it in the list"),
    (coloured, "car 0 0 142\nvoid 70 130 180\nvoid 128 64 128\n", "nothing but 'car': .*; put `background` before it"),
    (shuffled, NAMES, "value 0 is drawn in .* the palettes differ, so the values say nothing; give each class its col"),
    (shuffled, LIST.replace("128 64 128", "1 2 3"), "label colour 128 64 128 is none .* in 6 of 6 files, .*indices"),
    (coloured, NAMES, "holds colours: give each class its colour .* the files have 3: "),
    (coloured, LIST.replace("142", "143"), "label colour 0 0 142 is none of the classes: in 6 of 6 files"),
    (gray([0, 1, 3]), NAMES, "label value 3 is none of the classes: .*: if 0 is unlabelled, use --zero-is-unlabelled"),
    (gray([1, 2, 3]), NAMES, "use --zero-is-unlabelled"),
    (gray([0, 1, 17]), NAMES, r"label value 17 is none .* in 6 of 6 files, \d+ pixels, first .*a.png: no class"),
    (gray([0, 127, 255]), NAMES, "label value 127 is none .*its gray level in the list, `name 127 127 127`"),
    (gray([0, 0, 128]), "2", "label value 128 is none of the classes"),
    (mixed(gray([0, 1, 1]), gray([0, 255, 255])), "2", "some label files hold 0 and 1, others 0 and 255"),
    (mixed(coloured, gray([0, 1, 2])), LIST, "some label files hold colours, others values"),
    (gray([0, 0, 0]), NAMES, "nothing but 'sky': there must be pixels of two classes"),
    (gray([255, 255, 255]), NAMES, "no class at all"),
    (lambda path, labels, i: Image.fromarray(labels).save(path, "JPEG"), NAMES, "is a lossy JPEG: .*export .* as PNG"),
    (lambda path, labels, i: Image.fromarray(labels.T).save(path), NAMES, "is 16x12 pixels but .*a.png is 12x16; EXIF"),
], ids=itertools.count())
def test_what_may_mean_something_else_is_refused(tmp_path: Path, save: Callable, classes: str, message: str) -> None:
    write(tmp_path, save)
    with pytest.raises(UserError, match=message) as raised:
        run(tmp_path, classes)
    assert "\n" not in str(raised.value) and not (tmp_path / "own").exists()


def move(root: Path, *moves: tuple[str, str]) -> None:
    for old, new in moves:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)


@pytest.mark.parametrize(("image", "mask", "options", "name"), [
    ("images/{}.jpg", "masks/{}_mask.png", (), "{}"),
    ("images/{}_leftImg8bit.png", "masks/{}_gtFine_labelIds.png", (), "{}"),
    ("images/{}.jpg", "masks/{}.jpg.png", (), "{}"),
    ("images/{}.Jpg", "masks/{}.PNG", (), "{}"),
    ("images/img_{}.png", "masks/gt_{}.png", (), "{}"),
    ("images/img_{}.png", "masks/img_{}_mask.png", (), "img_{}"),
    ("images/Image1{}.png", "masks/Label1{}.png", (), "1{}"),
    ("images/aux/{}.png", "masks/aux/{}.png", (), "aux_/{}"),
    ("masks/raw/{}.jpg", "masks/{}_mask.png", ("--images", "ROOT/masks/raw"), "{}"),
    ("images/{}.png.jpg", "masks/{}.png.png", (), "{}_png"),
    ("images/{} .jpg", "masks/{} .png", (), "{}"),
    ("images/x\x0c{}.jpg", "masks/x\x0c{}.png", (), "x_{}"),
    ("images/e\u0301{}.jpg", "masks/\u00e9{}.png", (), "\u00e9{}"),
    ("images/city/{}.jpg", "masks/city/{}_mask.png", (), "city/{}"),
    ("images/{}-A.jpg", "masks/{}-B.png", ("--image-suffix=-A", "--mask-suffix=-B"), "{}"),
])
def test_names_of_labelling_tools(tmp_path: Path, image: str, mask: str, options: tuple, name: str) -> None:
    truth = write(tmp_path, gray([0, 1, 2]))
    for old in truth:
        move(tmp_path, (f"images/{old}.jpg", image.format(old)), (f"masks/{old}.png", mask.format(old)))
    run(tmp_path, NAMES, *(option.replace("ROOT", str(tmp_path)) for option in options))
    assert_made(tmp_path, {name.format(old): labels for old, labels in truth.items()})


@pytest.mark.parametrize("image", ["{}", "{}_image", "img/{}"])
def test_masks_beside_their_images(tmp_path: Path, image: str) -> None:
    truth = write(tmp_path, gray([0, 1, 2]))
    for old in truth:
        move(tmp_path, (f"images/{old}.jpg", f"images/{image.format(old)}.jpg"),
             (f"masks/{old}.png", f"images/{'masks/' if '/' in image else ''}{old}_mask.png"))
    run(tmp_path, NAMES, "--labels", f"{tmp_path}/images")
    assert_made(tmp_path, truth)


def test_other_pictures_of_the_labels_are_left_out(tmp_path: Path, capsys) -> None:
    truth = write(tmp_path, gray([0, 1, 2]))
    for old in truth:
        Image.fromarray(COLOURS[truth[old]]).save(tmp_path / f"masks/{old}_gtFine_color.png")
        move(tmp_path, (f"masks/{old}.png", f"masks/{old}_gtFine_labelIds.png"))
    run(tmp_path, NAMES)
    assert_made(tmp_path, truth)
    assert "left out: 6 other label files of the same images (a_gtFine_color ...)" in capsys.readouterr().out


@pytest.mark.parametrize(("images", "masks"), [
    (["a", "b", "c"], ["a_mask", "b_mask", "c"]),
    (["x1", "x2", "p"], ["y1", "y2", "p_L"]),
    (["cam1_7", "cam1_8"], ["cam2_7", "cam2_8"]),
    (["a_1", "b_1"], ["a_2", "b_2"]),
    (["left_a", "left_b"], ["right_a", "right_b"]),
    (["rome/a", "oslo/a"], ["a", "b"]),
])
def test_files_are_not_paired_by_half_of_their_names(tmp_path: Path, images: list[str], masks: list[str]) -> None:
    for folder, names in (("images", images), ("masks", masks)):
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene(0)).save(tmp_path / folder / f"{name}.png")
    with pytest.raises(UserError, match=r"\d label files have no image of their name"):
        run(tmp_path, NAMES)


def test_files_of_one_kind_are_not_enough(tmp_path: Path) -> None:
    write(tmp_path, gray([0, 1, 2]))
    with pytest.raises(UserError, match="in one folder, and no label file is told by its name: .* --mask-suffix"):
        run(tmp_path, NAMES, "--images", f"{tmp_path}/masks")
    move(tmp_path, ("masks", "all/masks"))
    with pytest.raises(UserError, match="hold nothing but label files: give the folder of the others too"):
        run(tmp_path, NAMES, "--images", f"{tmp_path}/all", "--labels", f"{tmp_path}/all")


@pytest.mark.parametrize(("image", "mask", "name"), [
    ("images/{split}/{}.jpg", "masks/{split}/{}.png", "{split}/{}"),
    ("images/{split}/images/{}.jpg", "images/{split}/masks/{}.png", "{split}/{}"),
])
def test_folders_named_train_and_val_are_the_splits(tmp_path: Path, capsys, image: str, mask: str, name: str) -> None:
    truth, splits = write(tmp_path, gray([0, 1, 2])), ["train", "train", "train", "valid", "valid", "test"]
    for old, split in zip(truth, splits, strict=True):
        move(tmp_path, (f"images/{old}.jpg", image.format(old, split=split)),
             (f"masks/{old}.png", mask.format(old, split=split)))
    run(tmp_path, NAMES, *(("--labels", f"{tmp_path}/images") if mask.startswith("images") else ()))
    assert_made(tmp_path, {name.format(old, split=split): truth[old] for old, split in zip(truth, splits, strict=True)})
    assert data.open_dataset(tmp_path / "own", "val").names == ["valid/d", "valid/e"]
    assert "splits: those of the folders, 1 test, 3 train, 2 val" in capsys.readouterr().out


@pytest.mark.parametrize(("folders", "splits"), [
    (["train2017/"] * 4 + ["val2017/"] * 2, {"train": 4, "val": 2}),
    (["train/"] * 4 + ["test/"] * 2, {"test": 2, "train": 3, "val": 1}),  # a test set is no training set
    (["val/"] + [""] * 5, r"or lack train \(5 elsewhere, 1 val\): .*--splits"),
    (["train/"] * 3 + ["val/"] * 2 + [""], r"hold not all images, .* \(1 elsewhere, 3 train, 2 val\): move the files"),
    (["val/"] * 4 + ["test/"] * 2, r"or lack train \(2 test, 4 val\)"),
])
def test_folders_of_some_splits(folders: list[str], splits: dict[str, int] | str) -> None:
    names = [folder + name for folder, name in zip(folders, "abcdef", strict=True)]
    if isinstance(splits, str):
        with pytest.raises(UserError, match=splits):
            from_folders.choose_splits(names, None, 0.2, None)
        return
    made = from_folders.choose_splits(names, None, 0.2, None)
    assert {split: len(part) for split, part in made.items()} == splits
    assert all(name.startswith("test/") for name in made.get("test", []))


def test_lists_of_the_user_are_the_splits(tmp_path: Path, capsys) -> None:
    truth = write(tmp_path, gray([0, 1, 2]))
    (tmp_path / "lists").mkdir()
    for split, names in (("train", "a\nb.jpg\nc\n"), ("val", "e\n")):
        (tmp_path / "lists" / f"{split}.txt").write_text(names)
    run(tmp_path, NAMES, "--splits", f"{tmp_path}/lists")
    assert data.open_dataset(tmp_path / "own", "train").names == ["a", "b", "c"]
    assert_made(tmp_path, {name: truth[name] for name in "abce"})
    assert len([*(tmp_path / "own" / "images").iterdir()]) == 4
    assert "left out: 2 images that are in no list (d ...)" in capsys.readouterr().out
    for line, message in (("zzz", "'zzz', which is 0 of the labelled images"), ("c", None)):
        (tmp_path / "lists" / "val.txt").write_text(f"{line}\n")
        with pytest.raises(UserError, match=f"val.txt names {message}" if message else "'c' is named twice in the"):
            run(tmp_path, NAMES, "--splits", f"{tmp_path}/lists", "--out", f"{tmp_path}/other")


def test_pictures_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    truth = write(tmp_path, gray([0, 1, 2]))
    for old, new in (("a", "b.png"), ("c", "B")):  # beside b
        move(tmp_path, (f"images/{old}.jpg", f"images/{new}.jpg"), (f"masks/{old}.png", f"masks/{new}.png"))
    run(tmp_path, NAMES)
    assert_made(tmp_path, {"b_png": truth["a"], "B": truth["c"], "b-2": truth["b"], **{k: truth[k] for k in "def"}})


@pytest.mark.parametrize(("change", "message"), [
    (lambda root: (root / "masks/z.png").write_bytes((root / "masks/a.png").read_bytes()),
     "1 label files have no image of their name, first of all .*z.png: .*--mask-suffix"),
    (lambda root: Image.new("RGB", (16, 12)).save(root / "images/a.png"), "a.jpg and a.png have one name: keep one"),
    (lambda root: [file.unlink() for file in (root / "images").iterdir()], "images is no folder with images"),
    (lambda root: [move(root, (f"masks/{name}.png", f"masks/{name}_foo.png")) for name in "abcdef"],
     "--mask-suffix _bar: no name ends so before its extension; one is a_foo"),
    (lambda root: move(root, ("images/a.jpg", "images/\udce9.jpg")), r"\?.jpg: its name is not in UTF-8: rename it"),
    (lambda root: (root / "masks/a.png").write_bytes(b"no image"), "masks/a.png: not a readable image"),
])
def test_files_that_do_not_fit_are_named(tmp_path: Path, change: Callable, message: str) -> None:
    write(tmp_path, gray([0, 1, 2]))
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        run(tmp_path, NAMES, *["--mask-suffix=_bar"] * ("_bar" in message))
    assert not (tmp_path / "own").exists()


def test_images_without_labels_and_hidden_files_are_left_out(tmp_path: Path, capsys) -> None:
    truth = write(tmp_path, gray([0, 1, 2]))
    (tmp_path / "masks" / "a.png").unlink()
    (tmp_path / "masks" / "._b.png").write_bytes(b"\0")
    (tmp_path / "images" / "__MACOSX").mkdir()
    (tmp_path / "images" / "__MACOSX" / "b.jpg").write_bytes(b"\0")
    run(tmp_path, NAMES)
    assert_made(tmp_path, {name: truth[name] for name in "bcdef"})
    assert f"left out: 1 images without labels ({tmp_path}/images/a.jpg ...)" in capsys.readouterr().out


def test_split_is_one_in_five_and_keeps_its_choice() -> None:
    names = [f"image_{i}" for i in range(2000)]
    large, small = from_folders.split_names(names), from_folders.split_names(names[:500])
    assert 340 < len(large["val"]) < 460
    assert set(small["val"]) == set(large["val"]) & set(names[:500])
    assert 140 < len(from_folders.split_names(names, 0.1)["val"]) < 260
    split = from_folders.split_names(["a", "b"])
    assert (len(split["train"]), len(split["val"])) == (1, 1)


def test_frames_of_one_video_stay_together(capsys) -> None:
    frames = [f"v{video}/frame_{30 * i:06}" for video in range(5) for i in range(12)]
    split = from_folders.split_names(frames)
    assert {name[:2] for name in split["train"]}.isdisjoint(name[:2] for name in split["val"])
    assert len(split["val"]) == 12 and len(split["train"]) == 48
    assert "frames of 5 videos ('v0/frame_', 'v1/frame_', 'v2/frame_' ...)" in capsys.readouterr().out
    alone = from_folders.split_names(frames, group_by=".*")
    assert len({name[:2] for name in alone["val"]}) > 1
    by_hand = from_folders.split_names(["a-1", "a-2", "b-1", "b-2", "b-3"], group_by="^(.)-")
    assert by_hand == {"train": ["b-1", "b-2", "b-3"], "val": ["a-1", "a-2"]}
    photographs = [f"{camera}{number}" for camera in ("IMG_", "DSC0") for number in (1003, 1004, 1017, 2208, 2310)]
    assert not from_folders.find_videos(sorted(photographs))  # irregular steps
    some = from_folders.split_names(["a-1", "a-2", "b", "c"], group_by="^(?:(a)|b)")  # b has no bracket
    assert {"a-1", "a-2"} <= {*some["train"]} or {"a-1", "a-2"} <= {*some["val"]}
    for group_by, message in (("frame", "one group of images, cannot be split"), ("[", r"--group-by \[ is no regular"),
                              ("clip", "--group-by clip finds nothing in the names, of which one is v0/frame_000000")):
        with pytest.raises(UserError, match=message):
            from_folders.split_names(frames, group_by=group_by)


def test_a_number_of_classes_is_enough_and_images_are_copied_or_linked(tmp_path: Path) -> None:
    write(tmp_path, gray([0, 1, 2]))
    for options in ((), ("--link", "--out", f"{tmp_path}/linked")):
        run(tmp_path, "3", *options)
    copied, linked = (data.open_dataset(tmp_path / out, "train") for out in ("own", "linked"))
    assert copied.info.classes == ("class 0", "class 1", "class 2")
    assert copied.image_paths[0].read_bytes() == linked.image_paths[0].read_bytes()
    assert linked.image_paths[0].is_symlink() and not copied.image_paths[0].is_symlink()


def test_a_huge_value_in_the_list_takes_no_memory(make_own: Callable, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([{"name": "a", "id": 0}, {"name": "b", "id": 1},
                                                    {"name": "c", "id": 10 ** 15}]))
    train = data.open_dataset(make_own(str(tmp_path / "list.json")), "train")
    assert {*np.unique([train.labels(i) for i in range(len(train))]).tolist()} == {0, 1, 255}


def test_an_image_may_be_brought_in_again(tmp_path: Path) -> None:
    """As after the death of the worker that did it."""
    (tmp_path / "a.png").write_bytes(b"content")
    for link in (True, True, False):
        from_folders.add_image(tmp_path, tmp_path / "a.png", "x", link)
        assert (tmp_path / "images" / "x.png").is_symlink() == link
    assert (tmp_path / "images" / "x.png").read_bytes() == (tmp_path / "a.png").read_bytes() == b"content"
