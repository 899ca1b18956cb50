"""context.py: Pascal Context from both of its sources."""

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

import data
from common import UserError
from tools import context, prepare

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
    context.prepare_context(voc, None, tmp_path / "trainval", workers=1)
    assert_written(voc, expected)


def test_without_a_named_source_the_fetched_one_is_taken(voc: Path, tmp_path: Path) -> None:
    command = ["prepare-context", "--voc", str(voc), "--workers", "1"]
    with pytest.raises(UserError, match="no trainval_merged.json and no LabelMap .*`python data.py fetch context`"):
        context.prepare_context(voc, None, None, workers=1)
    expected = write_mats(voc, voc / "trainval")
    prepare.main(command)
    assert_written(voc, expected)
    shutil.rmtree(voc / "SegmentationClassContext")
    shutil.copy(SAMPLE, voc / "trainval_merged.json")
    prepare.main(command)
    assert_written(voc, SAMPLE_LABELS)


def test_a_tree_without_images_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no JPEGImages/: run `python data.py fetch voc2010`, or name your folder"):
        context.prepare_context(tmp_path, None, None, workers=1)


@pytest.mark.parametrize(("name", "labels"), [("other", 1), ("LabelMap", np.full((60, 81), 460, np.uint16))])
def test_a_file_without_a_label_map_is_named(tmp_path: Path, name: str, labels: np.ndarray | int) -> None:
    savemat(tmp_path / "a.mat", {name: labels})
    with pytest.raises(UserError, match="a.mat holds no LabelMap .*: remove .* fetch context-mat"):
        context.labels_from_mat(tmp_path, context.Annotated("a"))


@pytest.mark.parametrize(("labels", "message"), [
    (np.zeros((8, 8, 2), np.uint8), "it is uint8 of shape .8, 8, 2."), (np.array([[-1, 3]]), "it holds -1"),
    (np.array([["a", [1]]], object), "it is cell of shape"), ({"a": 1}, "it is struct of shape"),
])
def test_a_label_map_of_another_kind_is_refused(tmp_path: Path, labels: object, message: str) -> None:
    savemat(tmp_path / "a.mat", {"LabelMap": labels})
    with pytest.raises(UserError, match=f"a.mat holds no LabelMap .*{message}"):
        context.labels_from_mat(tmp_path, context.Annotated("a"))


def test_the_size_of_a_label_map_is_checked_before_it_is_read(tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", {"LabelMap": np.zeros((3, 5), np.uint8)})
    content, claim = (tmp_path / "a.mat").read_bytes(), np.int32([1 << 20, 1 << 20]).tobytes()
    (tmp_path / "a.mat").write_bytes(content.replace(np.int32([3, 5]).tobytes(), claim))
    with pytest.raises(UserError, match="a.mat holds no LabelMap .*it is uint8 of shape .1048576, 1048576."):
        context.labels_from_mat(tmp_path, context.Annotated("a"))


def crash_at(name: str, voc: Path, folder: Path, image: context.Annotated) -> np.ndarray:
    """labels_from_mat, whose reader crashes with one file."""
    if image.name == name:
        os.kill(os.getpid(), signal.SIGKILL)
    return LABELS_FROM_MAT(folder, image)


LABELS_FROM_MAT = context.labels_from_mat


@pytest.mark.parametrize("place", range(4))
def test_a_file_that_crashes_its_reader_is_named(voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 place: int) -> None:
    write_mats(voc, tmp_path / "trainval")
    name = sum(NAMES.values(), [])[place]
    monkeypatch.setattr(context, "labels_from_mat", partial(crash_at, name, voc))
    with pytest.raises(UserError, match=f"^{name}, its picture or its labels: the process that reads it dies"):
        context.prepare_context(voc, None, tmp_path / "trainval", workers=2)
    assert not (voc / "ImageSets" / "SegmentationContext").exists()


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
        context.prepare_context(voc, SAMPLE, None, workers=1)
    assert not (voc / "ImageSets" / "SegmentationContext").exists()  # the data set cannot be opened by mistake
    written = {path: path.stat().st_mtime_ns for path in labels.glob("[!.]*")}
    assert sorted(path.name for path in written) == sorted(f"{name}.png" for name in sum(NAMES.values(), [])[:3])
    last.write_bytes(content)
    context.prepare_context(voc, SAMPLE, None, workers=1)
    assert written == {path: path.stat().st_mtime_ns for path in written}
    assert "3 label images were there already" in capsys.readouterr().out
    write_mats(voc, tmp_path / "trainval")
    with pytest.raises(UserError, match="holds labels from the json source, not from mat: remove it first"):
        context.prepare_context(voc, None, tmp_path / "trainval", workers=1)


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
    np.testing.assert_array_equal(context.decode_runs(encode_runs(mask), mask.shape), mask)


@pytest.mark.parametrize("code", ["", "0", "e0W", "\x10", "zzz"])
def test_broken_run_lengths_are_refused(code: str) -> None:
    with pytest.raises(ValueError, match="run-length code|do not fill 60 x 81 pixels"):
        context.decode_runs(code, (60, 81))


@pytest.mark.parametrize("cut", [1, 200, 2000, -1, -40])
def test_a_cut_off_download_is_named(cut: int, voc: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_bytes(SAMPLE.read_bytes()[:cut])
    with pytest.raises(UserError, match="cut.json is no trainval_merged.json, or broken or cut off .*: remove it"):
        context.prepare_context(voc, tmp_path / "cut.json", None, workers=1)
    assert not (voc / "SegmentationClassContext").exists()


@pytest.mark.parametrize(("change", "message"), [
    (lambda images, mark: images[0].pop("height"), "is no trainval_merged.json, .*'height'"),
    (lambda images, mark: images[0].update(height=10 ** 6, width=10 ** 6), "an image of .1000000, 1000000."),
    (lambda images, mark: images[0].update(height=float("inf")), "OverflowError"),
    (lambda images, mark: images[0].update(file_name="x" * 300), "File name too long"),
    (lambda images, mark: mark["segmentation"].update(counts="o" * 99_999), "is no compressed run-length code"),
    (lambda images, mark: mark.update(category_id=[3]), "TypeError"),
    (lambda images, mark: images.clear(), "names no images for training .*: get the file again"),
    (lambda images, mark: mark.update(category_id=3), "category_id 3 is none of the 59 classes.: get the file again"),
    (lambda images, mark: mark.pop("category_id"), "category_id None is none"),
    (lambda images, mark: mark.pop("segmentation"), "1001 of 2008_000002 "),
    (lambda images, mark: mark["segmentation"].pop("counts"), "1001 of 2008_000002 .*'counts'"),
    (lambda images, mark: mark["segmentation"].update(size=[60, 80]), r"size \[60, 80\] for an image of \(60, 81\)"),
    (lambda images, mark: mark["segmentation"].update(counts="zz0"), "1001 of 2008_000002 .*run-length code"),
])
def test_a_broken_annotation_is_named(voc: Path, tmp_path: Path, change: Callable, message: str) -> None:
    content = json.loads(SAMPLE.read_text())
    change(content["images"], content["annos_segmentation"][0])
    (tmp_path / "changed.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message if "File" in message else f"changed.json.*{message}"):
        context.prepare_context(voc, tmp_path / "changed.json", None, workers=1)




def test_an_absent_folder_of_label_maps_leaves_no_trace(voc: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        prepare.main(["prepare-context", "--voc", str(voc), "--mat", str(voc / "nowhere")])
    assert capsys.readouterr().err == (f"error: --mat {voc}/nowhere: no such folder; "
                                       "`python data.py fetch context-mat` gets the LabelMaps\n")
    assert not (voc / "SegmentationClassContext").exists()
