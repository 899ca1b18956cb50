"""annotations.py: the outlines of labelling tools become label images."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from common import UserError
from tools import annotations

SIZE = HEIGHT, WIDTH = 10, 12
SQUARE = [[2, 3, 7, 3, 7, 9, 2, 9]]  # x from 2 to 7, y from 3 to 9
Box = tuple[int, int, int, int, int]  # label, x0, y0, x1, y1


def painted(*boxes: Box, outside: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Labels with boxes, one over the other."""
    labels = np.full(size, outside, np.uint8)
    for label, x0, y0, x1, y1 in boxes:
        labels[y0:y1, x0:x1] = label
    return labels


def write_pictures(folder: Path, *names: str, size: tuple[int, int] = SIZE, **options) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(folder / name, **options)


def write_coco(path: Path, images: Sequence[str], objects: Sequence[tuple], categories: dict[int, str]) -> None:
    """Images have the ids 10, 11, ...; objects are (index of the image, category_id, segmentation)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({
        "images": [{"id": 10 + i, "file_name": name, "height": HEIGHT, "width": WIDTH}
                   for i, name in enumerate(images)],
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
        "annotations": [{"id": 1, "image_id": 10 + i, "category_id": category, "segmentation": code, "iscrowd": 0}
                        for i, category, code in objects]}))  # one id for all: files are merged by hand


def labels_of(root: Path) -> dict[str, np.ndarray]:
    """The labels of a data set by SPLIT/NAME."""
    splits = [data.open_dataset(root, file.stem) for file in sorted(root.glob("*.txt"))]
    return {f"{split.split}/{name}": split.labels(i) for split in splits for i, name in enumerate(split.names)}


def by_name(root: Path) -> dict[str, np.ndarray]:
    return {title.partition("/")[2]: labels for title, labels in labels_of(root).items()}


def winding_inside(polygon: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Another rule: a pixel's centre is inside if the polygon, seen from there, turns once around."""
    y, x = np.mgrid[:size[0], :size[1]] + 0.5
    seen = polygon[:, 0, None, None] - x + 1j * (polygon[:, 1, None, None] - y)
    return abs(np.angle(np.roll(seen, -1, 0) / seen).sum(0)) > np.pi


@pytest.mark.parametrize("polygon", [
    [(2, 3), (7, 3), (7, 9), (2, 9)],
    [(1.2, 0.7), (10.9, 4.1), (3.3, 9.4)],
    [(0.4, 0.4), (11.3, 1.2), (6.1, 4.7), (11.7, 9.1), (0.9, 8.8), (4.2, 5.3)],  # concave
    [(-7.3, -2.2), (30.1, 4.4), (-3.3, 14.9)],  # beyond the picture
    [(5.1, 2), (5.4, 2), (5.4, 8), (5.1, 8)],  # between two columns of centres
])
def test_a_pixel_belongs_to_a_polygon_if_its_centre_does(polygon: list[tuple[float, float]]) -> None:
    expected = winding_inside(np.array(polygon, float), SIZE)
    for points in (polygon, polygon[::-1], polygon + polygon[:1]):  # the other way round, closed
        pixels = annotations.polygon_pixels([np.array(points, float)], SIZE)
        np.testing.assert_array_equal(pixels, np.flatnonzero(expected))


def test_a_centre_on_an_edge_is_inside_on_the_left_and_above() -> None:
    square = np.array([(2.5, 3.5), (7.5, 3.5), (7.5, 9.5), (2.5, 9.5)])
    np.testing.assert_array_equal(annotations.polygon_pixels([square], SIZE), np.flatnonzero(painted((1, 2, 3, 7, 9))))


FILLED = painted((1, 2, 3, 7, 9))
RUNS = [23, 6, 4, 6, 4, 6, 4, 6, 4, 6, 51]  # of the square, down the columns of 10
SHORT_CODE = "g0640000000_1"  # of 23, 6, 4, and the differences to the run before last: 0 seven times, 47
CATEGORIES = {3: "car", 7: "dog"}


@pytest.mark.parametrize(("objects", "expected", "said"), [
    ([(3, SQUARE)], FILLED, ""),
    ([(7, SQUARE)], FILLED * 2, ""),
    ([(3, SQUARE[0])], FILLED, ""),  # without the outer list
    ([(3, {"size": [10, 12], "counts": RUNS})], FILLED, ""),
    ([(3, {"size": [10, 12], "counts": SHORT_CODE})], FILLED, ""),
    ([(3, [[0, 0, 2, 0, 2, 2, 0, 2], [4, 4, 6, 4, 6, 6, 4, 6]])], painted((1, 0, 0, 2, 2), (1, 4, 4, 6, 6)), ""),
    ([(3, [[-5, -5, 4, -5, 4, 4, -5, 4]])], painted((1, 0, 0, 4, 4)), ""),  # clipped
    ([(7, [[3, 4, 5, 4, 5, 6, 3, 6]]), (3, SQUARE)], painted((1, 2, 3, 7, 9), (2, 3, 4, 5, 6)), ""),  # small above
    ([(3, SQUARE), (7, SQUARE)], FILLED * 2, ""),  # of one size: the later above
    ([(3, SQUARE), (7, [])], FILLED, "1 annotations with a box only"),
    ([(3, SQUARE), (7, None)], FILLED, "1 annotations with a box only"),
    ([(3, [*SQUARE, [0, 0, 1, 1]])], FILLED, "1 polygons of fewer than 3 points"),
    ([(3, SQUARE), (3, [[20, 20, 30, 20, 30, 30]])], FILLED, "1 objects that cover no pixel's centre"),
])
def test_coco_outlines(tmp_path: Path, capsys: pytest.CaptureFixture, objects: list[tuple], expected: np.ndarray,
                       said: str) -> None:
    write_pictures(tmp_path / "p", "a.png", "b.png")
    write_coco(tmp_path / "c.json", ["a.png", "b.png"], [(0, *entry) for entry in objects] + [(1, 7, SQUARE)],
               CATEGORIES)
    annotations.from_coco(tmp_path / "p", tmp_path / "c.json", False, tmp_path / "out", workers=1)
    labels, printed = by_name(tmp_path / "out"), capsys.readouterr().out
    car_used = any(category == 3 for category, _ in objects)
    np.testing.assert_array_equal(labels["a"], expected if car_used else expected // 2)
    np.testing.assert_array_equal(labels["b"], FILLED * (2 if car_used else 1))
    assert f"left out: {said}\n" in printed if said else "left out: " not in printed.replace(
        "categories without an outline, left out: car\n", "")


@pytest.mark.parametrize(("categories", "no_background", "names", "labels"), [
    ({9: "dog", 4: "car"}, False, ["background", "car", "dog"], [0, 1, 2]),
    ({9: "dog", 4: "car"}, True, ["car", "dog"], [255, 0, 1]),
    ({0: "animals", 4: "car", 9: "dog", 12: "cow"}, False, ["background", "car", "dog"], [0, 1, 2]),  # a placeholder
    ({4: "car", 9: "_Background_"}, False, ["car", "_Background_"], [1, 0, 1]),
    ({4: "car", 9: "bg"}, True, ["car", "bg"], [255, 0, 1]),
    ({2: "BG", 4: "car", 9: "dog"}, False, ["BG", "car", "dog"], [0, 1, 2]),  # without an annotation of its own
    ({4: "car", 9: "__ignore__"}, False, ["background", "car"], [0, 1, 255]),
    ({4: "car", 9: "Car "}, False, ["background", "car"], [0, 1, 1]),
])
def test_coco_categories(tmp_path: Path, capsys: pytest.CaptureFixture, categories: dict[int, str], no_background: bool,
                         names: list[str], labels: list[int]) -> None:
    write_pictures(tmp_path, "a.png", "b.png")
    objects = [(0, 4, [[0, 0, 3, 0, 3, 3, 0, 3]]), (0, 9, SQUARE)]
    write_coco(tmp_path / "c.json", ["a.png", "b.png"], objects, categories)
    annotations.from_coco(tmp_path, None, no_background, tmp_path / "out", workers=1)
    outside, car, other = labels
    assert list(data.open_dataset(tmp_path / "out", "train").info.classes) == names
    found, printed = by_name(tmp_path / "out"), capsys.readouterr().out
    np.testing.assert_array_equal(found["a"], painted((car, 0, 0, 3, 3), (other, 2, 3, 7, 9), outside=outside))
    np.testing.assert_array_equal(found["b"], painted(outside=outside))
    where = "unlabelled" if no_background else f"of the class '{names[outside]}'"
    assert f"outside of all objects are {where}\n1 pictures have no object: all their pixels are {where};" in printed
    assert ("left out: animals, cow\n" in printed) == (0 in categories)
    assert ("no class: '__ignore__'\n" in printed) == ("__ignore__" in categories.values())
    assert ("taken for the class of another spelling: 'Car '\n" in printed) == ("Car " in categories.values())


def test_coco_files_of_one_name_in_folders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_pictures(tmp_path / "p", "cam1/7.Jpg", "cam2/7.Jpg", "deep/er/8.png", "9.png", "Cafe\u0301.png", "unused.png",
                   "__MACOSX/8.png", "._9.png")
    names = ["https://host/cam1/7.Jpg?x=1", "data\\cam2\\7.Jpg", "8.png", "C:\\Users\\me\\9.png", "Caf\u00e9.png",
             "cam3/7.Jpg"]
    write_coco(tmp_path / "c.json", names, [(i, 1, [[i, 0, i + 1, 0, i + 1, 9, i, 9]]) for i in range(6)], {1: "x"})
    annotations.from_coco(tmp_path / "q/../p", tmp_path / "c.json", False, tmp_path / "out", workers=1)
    labels = by_name(tmp_path / "out")
    assert set(labels) == {"cam1/7", "cam2/7", "deep/er/8", "9", "Caf\u00e9"}
    for i, name in enumerate(["cam1/7", "cam2/7", "deep/er/8", "9", "Caf\u00e9"]):
        np.testing.assert_array_equal(labels[name], painted((1, i, 0, i + 1, 9)))
    assert f"left out: 1 images absent from {tmp_path}/p, 1 pictures without annotations\n" in capsys.readouterr().out


@pytest.mark.parametrize("folders", [("train", "valid", "test"), ("train2017", "val2017", "test2017")])
def test_coco_splits_of_the_tool_are_kept(tmp_path: Path, folders: Sequence[str]) -> None:
    for i, folder in enumerate(folders):
        write_pictures(tmp_path / "p", f"{folder}/a.png", f"{folder}/b.png")
        file = tmp_path / ("p" if i else "p") / folder / "_annotations.coco.json"
        if "2017" in folder:
            file = tmp_path / "annotations" / f"instances_{folder}.json"
        write_coco(file, ["a.png", "b.png"], [(0, i + 1, SQUARE)], {1: "x", 2: "y", 3: "z"})
    where = tmp_path / "annotations" if "2017" in folders[0] else None
    annotations.from_coco(tmp_path / "p", where, False, tmp_path / "out", workers=1)
    labels = labels_of(tmp_path / "out")
    assert set(labels) == {f"{split}/{folder}/{name}" for split, folder in zip(("train", "val", "test"), folders,
                                                                               strict=True) for name in "ab"}
    for i, (split, folder) in enumerate(zip(("train", "val", "test"), folders, strict=True)):
        np.testing.assert_array_equal(labels[f"{split}/{folder}/a"], FILLED * (i + 1))


def one(code: object, category: int = 3) -> dict:
    """The change of a COCO file to one annotation."""
    return {"annotations": [{"id": 8, "image_id": 10, "category_id": category, "segmentation": code}]}


def pictures(*entries: tuple[int, str, int, int]) -> dict:
    """The change of a COCO file to other images: id, name, height, width."""
    return {"images": [dict(zip(("id", "file_name", "height", "width"), entry, strict=True)) for entry in entries]}


@pytest.mark.parametrize(("change", "message"), [
    ({"images": None}, "c.json: not what COCO writes"),
    ({"categories": [{"id": 3}]}, "c.json: not what COCO writes .KeyError: 'name'"),
    (one(SQUARE, 4), "c.json, annotation 8: category_id 4 is none of the categories"),
    (one([["a", 1, 2, 3, 4, 5]]), "c.json, annotation 8: not what COCO"),
    (one([[1, 2, 3, 4, 5, 6, 7]]), "c.json, annotation 8: not what COCO"),
    (one([[float("nan"), 2, 3, 4, 5, 6]]), "ValueError: a coordinate is no number"),
    (one({"size": [12, 10], "counts": RUNS}), r"annotation 8: a mask of size \(12, 10\) for an image of \(10"),
    (one({"size": [10, 12], "counts": [4, 9]}), "annotation 8: its runs do not fill 10 x 12 pixels"),
    (one({"size": [10, 12], "counts": "g06"}), "annotation 8: its runs do not fill 10 x 12 pixels"),
    ({"categories": [{"id": 1, "name": "b"}, {"id": 1, "name": "c"}]}, "two categories have one id"),
    ({"annotations": []}, "hold no polygon, rectangle, circle or mask"),
    (pictures((10, "a.png", 10, 12), (10, "b.png", 10, 12)), "two images have the id 10"),
    (pictures((10, "a.png", 10, 12), (11, "a.png", 10, 12)), "2 pictures have the name a, or one is listed twice"),
    (pictures((10, "z.png", 10, 12)), "none of the pictures in the annotations is below"),
    (pictures((10, "a.png", 20, 24), (11, "b.png", 10, 12)), "a.png is 12x10 pixels but the one in .*c.json is 24x20"),
    (pictures((10, "a.png", 12, 10), (11, "b.png", 10, 12)),
     "a.png is 12x10 pixels but the one in .*c.json is 10x12; EXIF turns the image, so label it upright"),
])
def test_coco_refusals_leave_nothing_behind(tmp_path: Path, change: dict, message: str) -> None:
    write_pictures(tmp_path / "p", "a.png", "b.png")
    write_coco(tmp_path / "p/c.json", ["a.png", "b.png"], [(0, 3, SQUARE)], CATEGORIES)
    (tmp_path / "p/c.json").write_text(json.dumps(json.loads((tmp_path / "p/c.json").read_text()) | change))
    with pytest.raises(UserError, match=message):
        annotations.from_coco(tmp_path / "p", None, False, tmp_path / "out", workers=1)
    assert {path.name for path in tmp_path.iterdir()} == {"p"}


def test_coco_files_that_are_no_splits_are_refused(tmp_path: Path) -> None:
    for name in ("instances_train.json", "more.json"):
        write_coco(tmp_path / name, ["a.png"], [(0, 3, SQUARE)], CATEGORIES)
    with pytest.raises(UserError, match="holds 2 .json files, not one for each of train, val and test: name the file"):
        annotations.from_coco(tmp_path, None, False, tmp_path / "out", workers=1)
    with pytest.raises(UserError, match="no.json does not exist: name the COCO file with --json"):
        annotations.from_coco(tmp_path, tmp_path / "no.json", False, tmp_path / "out", workers=1)


def test_a_turned_picture_keeps_its_labels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write_pictures(tmp_path, "a.jpg", "b.jpg", size=(WIDTH, HEIGHT), exif=exif)
    write_coco(tmp_path / "c.json", ["a.jpg", "b.jpg"], [(0, 3, SQUARE)], CATEGORIES)
    annotations.from_coco(tmp_path, None, False, tmp_path / "out", workers=1)
    np.testing.assert_array_equal(by_name(tmp_path / "out")["a"], FILLED)


# ------------------------------------------------------------------------------------------------------------- labelme
def png(values: np.ndarray) -> str:
    """A PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def shape(label: str, kind: str | None, *points: tuple[float, float], **more) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "group_id": 1, **more}


def write_labelme(path: Path, picture: str, *shapes: dict, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "5.4.1", "flags": {}, "imageHeight": HEIGHT, "imageWidth": WIDTH,
                                "imagePath": picture, "imageData": None, "shapes": shapes} | more))


DISC = ((np.mgrid[:10, :12] + 0.5 - np.array([5, 6])[:, None, None]) ** 2).sum(0) < 3.2 ** 2
DOTS = painted((1, 4, 2, 5, 3), (1, 6, 4, 7, 5))


@pytest.mark.parametrize(("shapes", "expected", "said"), [
    ([shape("b", "polygon", (2, 3), (7, 3), (7, 9), (2, 9))], FILLED, ""),
    ([shape("b", None, (2, 3), (7, 3), (7, 9), (2, 9))], FILLED, ""),  # old files
    ([shape("b", "rectangle", (7, 3), (2, 9))], FILLED, ""),
    ([shape("b", "rectangle", (2, 3), (7, 3), (7, 9), (2, 9))], FILLED, ""),
    ([shape("b", "circle", (6, 5), (6 + 3.2 * 0.6, 5 - 3.2 * 0.8))], DISC * np.uint8(1), ""),
    ([shape("b", "mask", (4, 2), (6, 4), mask=png(DOTS[2:5, 4:7] > 0))], DOTS, ""),
    ([shape("b", "mask", (4, 2), (6, 4), mask=png(np.uint8(DOTS[2:5, 4:7] > 0)))], DOTS, ""),  # 0 and 1, as labelme
    ([shape("b", "mask", (-1, -1), (3, 3), mask=png(np.ones((5, 5), bool)))], painted((1, 0, 0, 4, 4)), ""),
    ([shape("b", "rectangle", (2, 3), (7, 9)), shape("c", "line", (0, 0), (9, 9)), shape("c", "point", (1, 1))],
     FILLED, "1 shapes of the kind line, 1 shapes of the kind point"),
    ([shape("b", "rectangle", (2, 3), (7, 9)), shape("b", "polygon", (0, 0), (9, 9))], FILLED,
     "1 polygons of fewer than 3 points"),
    ([shape("__ignore__", "rectangle", (3, 4), (5, 6)), shape("b", "rectangle", (2, 3), (7, 9))],
     painted((1, 2, 3, 7, 9), (255, 3, 4, 5, 6)), ""),
    ([shape("_background_", "rectangle", (3, 4), (5, 6)), shape("b", "rectangle", (2, 3), (7, 9))],
     painted((1, 2, 3, 7, 9), (0, 3, 4, 5, 6)), ""),
])
def test_labelme_shapes(tmp_path: Path, capsys: pytest.CaptureFixture, shapes: list[dict], expected: np.ndarray,
                        said: str) -> None:
    write_pictures(tmp_path, "img/a.png", "img/b.png")
    write_labelme(tmp_path / "json/a.json", "..\\img\\a.png", *shapes)
    write_labelme(tmp_path / "json/b.json", "../img/b.png", shape("b", "rectangle", (2, 3), (7, 9)))
    annotations.from_labelme(tmp_path, None, False, tmp_path / "out", workers=1)
    labels, printed = by_name(tmp_path / "out"), capsys.readouterr().out
    np.testing.assert_array_equal(labels["img/a"], expected)
    np.testing.assert_array_equal(labels["img/b"], FILLED)
    assert f"left out: {said}\n" in printed if said else "left out: " not in printed


def test_labelme_classes_of_a_list(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "list.txt").write_text("tree 1 2 3\nCar 4 5 6\n")
    write_pictures(tmp_path / "p", "a.png", "b.png")
    for name, label in (("a", "car "), ("b", "tree")):
        write_labelme(tmp_path / f"p/{name}.json", f"{name}.png", shape(label, "rectangle", (2, 3), (7, 9)))
    annotations.from_labelme(tmp_path / "p", str(tmp_path / "list.txt"), False, tmp_path / "out", workers=1)
    info, labels = data.open_dataset(tmp_path / "out", "train").info, by_name(tmp_path / "out")
    assert info.classes == ("background", "tree", "Car")
    assert info.palette.tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    np.testing.assert_array_equal(labels["a"], FILLED * 2)
    np.testing.assert_array_equal(labels["b"], FILLED)
    assert "taken for the class of another spelling: 'car '\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="b.json: label 'tree' is none of the classes of .*list.txt: add it there"):
        (tmp_path / "list.txt").write_text("Car\n")
        annotations.from_labelme(tmp_path / "p", str(tmp_path / "list.txt"), False, tmp_path / "out2", workers=1)


def test_labelme_takes_the_picture_inside_the_file_if_there_is_no_other(tmp_path: Path) -> None:
    inside = np.random.default_rng(5).integers(0, 256, (*SIZE, 3), np.uint8)
    write_pictures(tmp_path, "a.png")
    for name in "ab":
        write_labelme(tmp_path / f"{name}.json", f"{name}.png", shape("x", "circle", (6, 5), (6, 1)),
                      imageData=png(inside))
    annotations.from_labelme(tmp_path, None, False, tmp_path / "out", workers=1)
    splits = [data.open_dataset(tmp_path / "out", split) for split in ("train", "val")]
    found = {name: split.image(i) for split in splits for i, name in enumerate(split.names)}
    np.testing.assert_array_equal(found["b"], inside)
    np.testing.assert_array_equal(found["a"], np.array(Image.open(tmp_path / "a.png")))


@pytest.mark.parametrize(("content", "message"), [
    ('{"images": []}', "x.json: not what labelme writes .KeyError: 'shapes'.: export it again, or take it out"),
    ("[1, 2]", "x.json: not what labelme"), ("{", "x.json: not what labelme"),
    (b"\xff\xfe\xfd", "x.json: not what labelme"),
    (json.dumps({"shapes": [shape("b", "mask", (0, 0), (1, 1), mask="no png")], "imagePath": "a.png"}),
     "x.json: not what labelme"),
])
def test_labelme_refuses_files_of_other_tools(tmp_path: Path, content: str | bytes, message: str) -> None:
    write_pictures(tmp_path / "p", "a.png", "b.png")
    write_labelme(tmp_path / "p/b.json", "b.png", shape("b", "rectangle", (2, 3), (7, 9)))
    (tmp_path / "p/x.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        annotations.from_labelme(tmp_path / "p", None, False, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="holds no .json files"):
        annotations.from_labelme(tmp_path / "q", None, False, tmp_path / "out", workers=1)


@pytest.mark.parametrize("name", ["../outside/a.png", "{tmp}/outside/a.png", "file://{tmp}/outside/a.png",
                                  "x/../../outside/a.png"])
def test_no_name_in_a_file_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    write_pictures(tmp_path, "outside/a.png", "p/b.png")
    (tmp_path / "p/x").mkdir()
    name = name.format(tmp=tmp_path)
    write_coco(tmp_path / "p/c.json", [name, "b.png"], [(0, 3, SQUARE), (1, 3, SQUARE)], CATEGORIES)
    library = annotations.Library(tmp_path / "p")
    assert [found.path for found in annotations.read_coco(tmp_path / "p/c.json", "", library, {})] == [
        tmp_path / "p/b.png"]
    write_labelme(tmp_path / "p/a.json", name, shape("b", "rectangle", (2, 3), (7, 9)))
    assert annotations.read_labelme(tmp_path / "p/a.json", "", library, tmp_path) == []
    assert library.left_out[f"images absent from {tmp_path}/p"] == 2


def test_a_file_elsewhere_names_pictures_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, "p/sub/a.png", "p/..b.png")
    monkeypatch.chdir(tmp_path)
    library = annotations.Library(Path("p"))
    for name, found in ((f"{tmp_path}/p/sub/a.png", "p/sub/a.png"), ("../p/sub/a.png", "p/sub/a.png"),
                        ("../p/..b.png", "p/..b.png"), ("C:\\data\\sub\\a.png", "p/sub/a.png")):
        assert library.find(name, tmp_path / "json", "") == Path(found)
    for name in ("x" * 300, "a/" * 3000, "\0", "\ud800"):
        assert library.find(name, Path("p"), "") is None


@pytest.mark.parametrize("label", ["a\nb", "\x1b[31mred", "\ud800", "", 3, ["a"]])
def test_names_that_a_terminal_or_a_file_cannot_hold_are_refused(tmp_path: Path, label: object) -> None:
    write_pictures(tmp_path, "a.png")
    write_labelme(tmp_path / "a.json", "a.png", shape(label, "rectangle", (2, 3), (7, 9)))
    write_coco(tmp_path / "c.json", ["a.png"], [(0, 3, SQUARE)], {3: label})
    library = annotations.Library(tmp_path)
    with pytest.raises(UserError, match="a.json: a class has the name .*: give it one of letters"):
        annotations.read_labelme(tmp_path / "a.json", "", library, tmp_path)
    with pytest.raises(UserError, match="c.json: a class has the name"):
        annotations.read_coco(tmp_path / "c.json", "", library, {})


@pytest.mark.parametrize(("code", "message"), [
    ([[1e300, 2, 3, 4, 5, 6]], "a coordinate is no number below 1e.07"),
    ([[10 ** 400, 2, 3, 4, 5, 6]], "OverflowError"),
    ({"size": [10, 12], "counts": [60, 10 ** 12]}, "its runs do not fill 10 x 12 pixels"),
    ({"size": [10, 12], "counts": [120.5]}, "its runs do not fill"),
    ({"size": [10, 12], "counts": "o" * 9999}, "its runs do not fill"),
    ({"size": [10 ** 6, 10 ** 6], "counts": [10 ** 12]}, "a mask of size .1000000, 1000000. for an image of .10, 12."),
])
def test_claims_are_checked_before_they_take_memory(tmp_path: Path, code: object, message: str) -> None:
    write_pictures(tmp_path, "a.png", "b.png")
    write_coco(tmp_path / "c.json", ["a.png", "b.png"], [(0, 3, code), (1, 3, SQUARE)], CATEGORIES)
    with pytest.raises(UserError, match=f"c.json, annotation 1: .*{message}"):
        annotations.from_coco(tmp_path, None, False, tmp_path / "out", workers=1)
