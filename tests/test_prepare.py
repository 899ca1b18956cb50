"""prepare.py: Pascal Context from both of its sources, a plain folder from users' files, and the check."""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

import data
from common import UserError
from tools import prepare

GOLDEN = Path(__file__).parent / "golden"
SAMPLE, SAMPLE_LABELS = GOLDEN / "context_sample.json", np.load(GOLDEN / "context_sample_labels.npz")
IDS = {c["original_id"]: c["index"] for c in json.loads(data.CONTEXT_CLASSES.read_text())["classes"]}
NAMES = {split: SAMPLE_LABELS[f"{split}_names"].tolist() for split in ("train", "val")}


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A VOC2010 tree with the images of the sample."""
    (tmp_path / "VOC" / "JPEGImages").mkdir(parents=True)
    for name in sum(NAMES.values(), []):
        Image.new("RGB", SAMPLE_LABELS[name].shape[::-1]).save(tmp_path / "VOC" / "JPEGImages" / f"{name}.jpg")
    return tmp_path / "VOC"


def assert_written(voc: Path, expected: dict[str, np.ndarray]) -> None:
    found = {path.stem: np.asarray(Image.open(path)) for path in (voc / "SegmentationClassContext").glob("*.png")}
    assert sorted(found) == sorted(sum(NAMES.values(), []))
    for name, labels in found.items():
        np.testing.assert_array_equal(labels, expected[name])


@pytest.mark.parametrize("order", [1, -1])  # annotations may stand before or after their images in the file
def test_json_gives_what_the_detail_package_gives(voc: Path, tmp_path: Path, capsys, order: int) -> None:
    source = tmp_path / "merged.json"
    source.write_text(json.dumps(dict([*json.loads(SAMPLE.read_text()).items()][::order])))
    prepare.main(["prepare-context", "--voc", str(voc), "--json", str(source), "--workers", "2"])
    assert capsys.readouterr().out.splitlines() == ["train: 2 images, DIFFERENT from the 4996 of the full data set",
                                                    "val: 2 images, DIFFERENT from the 5104 of the full data set"]
    assert_written(voc, SAMPLE_LABELS)
    for split, names in NAMES.items():
        assert data.open_dataset(voc, split).names == names


def write_mats(voc: Path, folder: Path) -> dict[str, np.ndarray]:
    """LabelMap files with random ids of the 459 classes, and VOC's own lists; returns the labels by a second way."""
    rng, expected = np.random.default_rng(0), {}
    folder.mkdir()
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    for split, names in NAMES.items():
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            label_map = rng.integers(0, 460, SAMPLE_LABELS[name].shape, dtype=np.uint16)
            savemat(folder / f"{name}.mat", {"LabelMap": label_map})
            expected[name] = np.array([[IDS.get(int(value), 0) for value in row] for row in label_map])
    return expected


def test_mat_files_are_mapped_pixel_by_pixel(voc: Path, tmp_path: Path) -> None:
    expected = write_mats(voc, tmp_path / "trainval")
    prepare.prepare_context(voc, None, tmp_path / "trainval", workers=1)
    assert_written(voc, expected)


@pytest.mark.parametrize(("name", "labels"), [("other", 1), ("LabelMap", np.full((60, 81), 460, np.uint16))])
def test_a_file_without_a_label_map_is_named(tmp_path: Path, name: str, labels: np.ndarray | int) -> None:
    savemat(tmp_path / "a.mat", {name: labels})
    with pytest.raises(UserError, match="a.mat holds no LabelMap .*: unpack"):
        prepare.labels_from_mat(tmp_path, prepare.Annotated("a"))


@pytest.mark.parametrize(("damage", "message"), [
    (Path.unlink, "not a readable image .No such file"),
    (lambda path: Image.new("RGB", (80, 60)).save(path), "is 80x60 pixels but its label map is 48x64"),  # other release
])
def test_a_cut_run_goes_on_and_sources_are_not_mixed(voc: Path, tmp_path: Path, capsys, damage: Callable,
                                                     message: str) -> None:
    last, labels = voc / "JPEGImages" / f"{NAMES['val'][1]}.jpg", voc / "SegmentationClassContext"
    content = last.read_bytes()
    damage(last)
    with pytest.raises(UserError, match=f"{last.name}.*{message}"):
        prepare.prepare_context(voc, SAMPLE, None, workers=1)
    assert not (voc / "ImageSets" / "SegmentationContext").exists()  # the data set cannot be opened by mistake
    written = {path: path.stat().st_mtime_ns for path in labels.glob("[!.]*")}
    assert sorted(path.name for path in written) == sorted(f"{name}.png" for name in sum(NAMES.values(), [])[:3])
    last.write_bytes(content)
    prepare.prepare_context(voc, SAMPLE, None, workers=1)
    assert written == {path: path.stat().st_mtime_ns for path in written}
    assert "3 label images were there already" in capsys.readouterr().out
    write_mats(voc, tmp_path / "trainval")
    with pytest.raises(UserError, match="holds labels from the json source, not from mat: remove it first"):
        prepare.prepare_context(voc, None, tmp_path / "trainval", workers=1)


def encode_runs(mask: np.ndarray) -> str:
    """COCO's compressed run-length code, one number and one character at a time."""
    runs = [len(list(group)) for _, group in itertools.groupby(mask.T.ravel().tolist())]
    if mask[0, 0]:
        runs.insert(0, 0)
    code = ""
    for i, run in enumerate(runs):
        number, more = run - (runs[i - 2] if i > 2 else 0), True
        while more:
            group, number = number & 31, number >> 5
            more = number != (-1 if group & 16 else 0)
            code += chr(group + 32 * more + 48)
    return code


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 10**6))
def test_run_lengths_are_the_inverse_of_an_encoder(height: int, width: int, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.kron(rng.random((height, width)) < density, np.ones(rng.integers(1, 9, 2), bool))
    np.testing.assert_array_equal(prepare.decode_runs(encode_runs(mask), mask.shape), mask)


@pytest.mark.parametrize("code", ["", "0", "e0W", "\x10", "zzz"])
def test_broken_run_lengths_are_refused(code: str) -> None:
    with pytest.raises(UserError, match="run-length code"):
        prepare.decode_runs(code, (60, 81))


@pytest.mark.parametrize("cut", [1, 200, 2000, -1, -40])
def test_a_cut_off_download_is_named(cut: int, voc: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_bytes(SAMPLE.read_bytes()[:cut])
    with pytest.raises(UserError, match="cut.json is no trainval_merged.json, or broken or cut off .*: get it from"):
        prepare.prepare_context(voc, tmp_path / "cut.json", None, workers=1)
    assert not (voc / "SegmentationClassContext").exists()


@pytest.mark.parametrize(("change", "message"), [
    (lambda images, mark: images[0].pop("height"), "is no trainval_merged.json, .*'height'"),
    (lambda images, mark: images.clear(), "names no images for training .*: get the file again"),
    (lambda images, mark: mark.update(category_id=3), "category_id 3 is none of the 59 classes: get the file again"),
    (lambda images, mark: mark.pop("category_id"), "category_id None is none"),
    (lambda images, mark: mark.pop("segmentation"), "1001 of 2008_000002: "),
    (lambda images, mark: mark["segmentation"].pop("counts"), "1001 of 2008_000002: 'counts'"),
    (lambda images, mark: mark["segmentation"].update(size=[60, 80]), r"size \[60, 80\] for an image of \(60, 81\)"),
    (lambda images, mark: mark["segmentation"].update(counts="zz0"), "1001 of 2008_000002: .*run-length code"),
])
def test_a_broken_annotation_is_named(voc: Path, tmp_path: Path, change: Callable, message: str) -> None:
    content = json.loads(SAMPLE.read_text())
    change(content["images"], content["annos_segmentation"][0])
    (tmp_path / "changed.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"changed.json.*{message}"):
        prepare.prepare_context(voc, tmp_path / "changed.json", None, workers=1)


COLOURS = np.array([[255, 0, 0], [0, 0, 255], [9, 9, 9]], np.uint8)


@pytest.fixture
def make_own(tmp_path: Path) -> Callable[..., Path]:
    """Write images and labels with noise of two classes and an ignored value; then from-folders makes tmp_path/own."""
    def make(classes: str = "2", *more: str, table=(0, 1, 255), spoil: Callable = lambda: None) -> Path:
        rng = np.random.default_rng(0)
        for folder in ("photos", "masks"):
            (tmp_path / folder).mkdir()
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "photos" / f"p{i}.jpg")
            Image.fromarray(np.uint8(table)[rng.integers(0, 3, (20, 30))]).save(tmp_path / "masks" / f"p{i}.png")
        spoil()
        options = f"from-folders --images {tmp_path}/photos --labels {tmp_path}/masks --out {tmp_path}/own --workers 1"
        options = vars(prepare.build_parser().parse_args([*options.split(), "--classes", classes, *more]))
        options.pop("command")(**options)
        return tmp_path / "own"

    return make


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
    large, small = prepare.split_by_hash(names), prepare.split_by_hash(names[:500])
    assert 340 < len(large["val"]) < 460
    assert set(small["val"]) == set(large["val"]) & set(names[:500])
    assert {split: len(part) for split, part in prepare.split_by_hash(["a", "b"]).items()} == {"train": 1, "val": 1}


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
    classes = prepare.ClassList(["a", "b"], COLOURS[:2], {0xFF0000: 0, 0x0000FF: 1})
    with pytest.raises(UserError, match="x.png: label colour 9 9 9 is none of the 2 classes: add it to the list"):
        prepare.convert_labels(tmp_path / "x.png", classes)


def test_check_of_a_sound_data_set(make_own: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = make_own("3")
    prepare.check(own, tmp_path / "sheet.png", workers=1)
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
        prepare.check(own, tmp_path / "sheet.png", workers=2)
    printed = capsys.readouterr().out
    for line in (f"fault: {train.label_paths[0]}: label value 200 is no class",
                 f"fault: {train.image_paths[1]}: not a readable image",
                 f"remark: a validation image that is in training too: 1 (val/{val.names[0]} = train/{train.names[2]})",
                 f"remark: no labelled pixel: 1 (train/{train.names[3]})",
                 f"remark: mode L, converted to RGB: 1 (train/{train.names[4]})",
                 f"remark: turned upright by its EXIF tag: 1 (train/{train.names[5]})",
                 f"remark: a link that leads out of the folder: 1 (train/{train.names[6]})"):
        assert line in printed


@pytest.mark.parametrize("arguments", [
    "check nowhere", "prepare-context --voc nowhere --json x.json", "toy --train 0", "nonsense",
    "from-folders --images nowhere --labels nowhere --classes 3",
])
def test_a_wrong_command_is_one_line_and_status_2(arguments: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as leaving:
        prepare.main(arguments.split())
    printed = capsys.readouterr()
    assert leaving.value.code == 2 and "error: " in printed.err.splitlines()[-1] and not printed.out


def test_data_py_hands_its_commands_over() -> None:
    done = subprocess.run([sys.executable, data.__file__, "check", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no data at nowhere: ")


def test_toy_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prepare.main(["toy", "--out", f"{tmp_path}/t", "--train", "2", "--val", "1", "--size", "64", "80"])
    assert capsys.readouterr().out == f"toy data at {tmp_path}/t\n"
    assert data.open_dataset(tmp_path / "t", "train").image(1).shape == (64, 80, 3)
