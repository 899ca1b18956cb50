"""class_list.py: what labelling tools write is read; what cannot be understood is refused with its line."""

import contextlib
import time
from pathlib import Path

import numpy as np
import pytest

from common import UserError
from tools import class_list

SKY, ROAD, CAR = 0x4682B4, 0x804080, 0x00008E
THREE = (["sky", "road", "car"], {SKY: 0, ROAD: 1, CAR: 2}, {})


def read(tmp_path: Path, text: str | bytes) -> class_list.ClassList:
    path = tmp_path / "list.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return class_list.read_classes(str(path))


@pytest.mark.parametrize("text", [
    "sky 70 130 180\nroad 128 64 128\ncar 0 0 142\n",
    "sky, 70, 130, 180\nroad,128,64,128\n\ncar ,0 , 0,142",
    "sky;70;130;180\r\nroad;128;64;128\r\ncar;0;0;142\r\n",
    "sky\t70\t130\t180\nroad\t128\t64\t128\ncar\t0\t0\t142\n",
    "70 130 180\tsky\n128 64 128\t\troad\n0 0 142\tcar\n",
    "70 130 180 sky\n128 64 128 road\n0 0 142 car\n",
    "70,130,180,sky\n128,64,128,road\n0,0,142,car\n",
    "sky 70 130 180 255\nroad 128 64 128 255\ncar 0 0 142 255\n",
    "sky (70, 130, 180)\nroad (128, 64, 128)\ncar (0,0,142)\n",
    "[70, 130, 180] sky\n[128,64,128] road\n[0,0,142] car\n",
    "sky (70, 130, 180, 255)\nroad (128, 64, 128, 255)\ncar (0,0,142, 255)\n",
    "sky #4682b4\nroad #804080\ncar #00008E\n",
    "sky #4682b4ff\nroad #804080ff\ncar #00008eff\n",
    "name color\nsky #4682b4\nroad #804080\ncar #00008e\n",
    "#4682b4 sky\n#804080 road\n#00008e car\n",
    "sky: 70 130 180\nroad: 128 64 128\ncar: 0 0 142\n",
    "# label:color_rgb:parts:actions\nsky:70,130,180::\nroad:128,64,128::\ncar:0,0,142:wheel,door:open\n",
    "label:color_rgb:parts:actions\nsky:70,130,180::\nroad:128,64,128::\ncar:0,0,142::\n",
    "name,r,g,b\nsky,70,130,180\nroad,128,64,128\ncar,0,0,142\n",
    "name,r,g,b,class_11\nsky,70,130,180,1\nroad,128,64,128,1\ncar,0,0,142,0\n",
    "r,g,b,name\n70,130,180,sky\n128,64,128,road\n0,0,142,car\n",
    "Stuff;Name;Red;Green;Blue\n1;sky;70;130;180\n1;road;128;64;128\n0;car;0;0;142\n",
    "name r g b\nsky 70 130 180\nroad 128 64 128\ncar 0 0 142\n",
    "name\tcolor\nsky\t#4682b4\nroad\t#804080\ncar\t#00008e\n",
    'name,rgb\nsky,"70, 130, 180"\nroad,"(128, 64, 128)"\ncar,"0 0 142"\n',
    '"sky","70","130","180"\n"road","128","64","128"\n"car","0","0","142"\n',
    "r g b name\n70 130 180 sky\n128 64 128 road\n0 0 142 car\n",
    '{"tools": [{"tool": "superpixel", "name": "sky", "color": "#4682b4"}, {"name": "road", "color": "#804080"},'
    ' {"name": "car", "color": "#00008e"}]}',
    "// of our camera\n# three\nsky 70 130 180  # above\nroad 128 64 128 // below\ncar 0 0 142\n",
    b"\xef\xbb\xbf" + b"sky 70 130 180\nroad 128 64 128\ncar 0 0 142\n",
    "sky 70 130 180\nroad 128 64 128\ncar 0 0 142\n".encode("utf-16"),
    '[{"name": "sky", "color": "#4682b4"}, {"name": "road", "color": "#804080"},'
    ' {"title": "car", "color": [0, 0, 142]}]',
    '{"classes": ["sky", "road", "car"], "palette": [[70, 130, 180], [128, 64, 128], [0, 0, 142]]}',
    '{"sky": [70, 130, 180], "road": [128, 64, 128], "car": "#00008e"}',
])
def test_colours_in_every_form(tmp_path: Path, text: str | bytes) -> None:
    names, palette, colours, ids = read(tmp_path, text)
    assert (names, colours, ids) == THREE
    assert palette.tolist() == [[70, 130, 180], [128, 64, 128], [0, 0, 142]]


@pytest.mark.parametrize(("text", "names", "colours", "ids"), [
    ("sky\nroad\ncar\n", ["sky", "road", "car"], {}, {}),
    ("name\nsky\nroad\n", ["sky", "road"], {}, {}),
    ("Class Names\nsky\ngreen label\n", ["sky", "green label"], {}, {}),
    ("id name\n1 sky\n4 road\n", ["sky", "road"], {}, {1: 0, 4: 1}),
    ("sky,road,car\n", ["sky", "road", "car"], {}, {}),
    ("red car\nlane 1\nlane 2\nbuilding;edifice\nwall, inner\n", ["red car", "lane 1", "lane 2", "building;edifice",
                                                                "wall, inner"], {}, {}),
    ("Pixel Value, Class\n0, background\n1, tumour\n", ["background", "tumour"], {}, {0: 0, 1: 1}),
    ("Idx,Ratio,Train,Val,Stuff,Name\n1,0.15,11664,1172,1,wall\n2,0.1,6046,612,1,building;edifice\n",
     ["wall", "building;edifice"], {}, {1: 0, 2: 1}),
    ("sky, road, lane 1\n", ["sky", "road", "lane 1"], {}, {}),
    ("void 0 0 0 0\nsky 70 130 180 255\n", ["sky"], {0: 255, SKY: 0}, {0: 255, 1: 0}),
    ('"lane 1" 70 130 180\nlevel 2 road 128 64 128\n', ["lane 1", "level 2 road"], {SKY: 0, ROAD: 1}, {}),
    ("name,r,g,b\nvoid,,,\nsky,70,130,180\n", ["sky"], {SKY: 0}, {0: 255, 1: 0}),
    ('{"0": {"name": "sky", "color": [70, 130, 180]}}', ["sky"], {SKY: 0}, {0: 0}),
    ('{"id2label": {"0": "sky", "1": "road"}}', ["sky", "road"], {}, {0: 0, 1: 1}),
    ("0 sky\n1 road\n", ["sky", "road"], {}, {0: 0, 1: 1}),
    ("7: sky\n9: road\n", ["sky", "road"], {}, {7: 0, 9: 1}),
    ("1. sky\n2. road\n", ["sky", "road"], {}, {1: 0, 2: 1}),
    ("sky RGB (70, 130, 180)\nroad\trgb(128,64,128)\n", ["sky", "road"], {SKY: 0, ROAD: 1}, {}),
    ("sky,0\nroad,5\n", ["sky", "road"], {}, {0: 0, 5: 1}),
    ("0,sky,70,130,180\n4,road,128,64,128\n", ["sky", "road"], {SKY: 0, ROAD: 1}, {0: 0, 4: 1}),
    ('{"0": "sky", "3": "road"}', ["sky", "road"], {}, {0: 0, 3: 1}),
    ('{"sky": 0, "road": 3}', ["sky", "road"], {}, {0: 0, 3: 1}),
    ('{"categories": [{"id": 1, "name": "sky"}, {"id": 5, "name": "road"}]}', ["sky", "road"], {}, {1: 0, 5: 1}),
    ('["sky", "road"]', ["sky", "road"], {}, {}),
    ("__ignore__\n_background_\ncar\n", ["_background_", "car"], {}, {}),
    ("void\nsky\nroad\n", ["sky", "road"], {}, {0: 255, 1: 0, 2: 1}),  # by its place, value 0 is no class
    ("sky\nVoid\nroad\n", ["sky", "road"], {}, {0: 0, 1: 255, 2: 1}),
    ("sky 70 130 180\nroad 128 64 128\nignore\n", ["sky", "road"], {SKY: 0, ROAD: 1}, {0: 0, 1: 1, 2: 255}),
    ("name,r,g,b\nsky,70,130,180\nVoid,0,0,0\n", ["sky"], {SKY: 0, 0: 255}, {0: 0, 1: 255}),
    ("ignore 1 2 3\nignore 4 5 6\nsky 70 130 180\n", ["sky"], {0x010203: 255, 0x040506: 255, SKY: 0}, {}),
    ("sky 70 130 180\nroad 128 64 128\nroad 0 0 142\n", ["sky", "road"], {SKY: 0, ROAD: 1, CAR: 1}, {}),
    ("3 sky\n4 sky\n7 road\n", ["sky", "road"], {}, {3: 0, 4: 0, 7: 1}),
    ("\u0434\u043e\u0440\u043e\u0433\u0430 128 64 128\n\u9053\u8def 0 0 142\n",
     ["\u0434\u043e\u0440\u043e\u0433\u0430", "\u9053\u8def"], {ROAD: 0, CAR: 1}, {}),
])
def test_names_and_values(tmp_path: Path, text: str, names: list[str], colours: dict, ids: dict) -> None:
    result = read(tmp_path, text)
    assert (result.names, result.colours, result.ids) == (names, colours, ids)


def test_a_number_and_the_palette_of_several_colours(tmp_path: Path) -> None:
    assert class_list.read_classes("2")[::3] == (["class 0", "class 1"], {})
    palette = read(tmp_path, "road 128 64 128\nroad 0 0 142\ncar 1 2 3\n").palette
    np.testing.assert_array_equal(palette, [[128, 64, 128], [1, 2, 3]])  # the first colour of a class draws it


@pytest.mark.parametrize(("text", "message"), [
    ("", "list.txt is empty: give --classes a file"),
    ("# nothing\n// at all\n", "has comments only"),
    ("sky\n0 0 0\n128 0 0\n", "line 2: '0 0 0' cannot be understood: known are `name`"),
    ("sky 1 2\n", "line 1: 'sky 1 2' cannot be understood"),
    ("sky 0.1 0.5 0.9\n", "line 1: .* cannot be understood"),
    ("name,id,trainId\nsky,7,0\n", "line 1: an id and a train id"),
    ("lane 1 255 0 0\nlane 2 0 255 0\n", "line 1: four numbers"),
    ("sky ff0000\n", "line 1: .* cannot be understood"),
    ("sky\n|---|---|\n", "line 2: .* cannot be understood"),
    ("sky,0.5\n", "line 1: .* cannot be understood"),
    ("\nsky 1 2 300\n", "line 2: 1 2 300 is no colour: give red, green and blue"),
    ("sky 1 2 3\nroad 1 2 3\n", "line 2: the colour of 'road' is that of another class"),
    ("sky 1 2 3\nroad\n", "line 2: 'road' has no colour, and other classes have one"),
    ("0 sky\nroad\n", "line 2: 'road' has no value, and other classes have one"),
    ("0 sky\n0 road\n", "line 2: the value of 'road' is that of another class"),
    ("lane 1 0 0 255\nlane 2 0 0 254\n", "line 1: four numbers for 'lane', which may be R G B or not"),
    ("sky 0 70 130 180\nroad 1 128 64 128\n", "line 1: four numbers for 'sky'"),
    ("lane 1 0 0 255\nlane 2 0 255 255\n", "line 1: four numbers for 'lane'"),
    ("sky 1 2 3 255\nroad 4 5 6\n", "line 1: four numbers for 'sky'"),
    ("lane 1,0,0,255\n", "line 1: .* cannot be understood"),
    ("sky 1 2 3\nlane 1\t5\t6\n", "line 2: .* cannot be understood"),
    ("sky 1, 2 3\n", "line 1: .* cannot be understood"),
    ("road 0\ncar 1\n", "line 1: is the number of 'road 0' a label value, or a part of the name"),
    ("name id\nlane 1\nlane 2\n", "line 2: is the number of 'lane 1' a label value"),
    ("name b g r\nsky 1 2 3\n", "line 1: the order of colours is red, green, blue"),
    ("id,name\n0,a, b\n", "line 2: '0,a, b' has not the columns of the header"),
    ("label,name,r,g,b\n0,sky,1,2,3\n", "line 2: '0' is no name of a class"),
    ("sky\na\0b\n", "line 2: .* is no name of a class"),
    ('{"sky": [1, 2, 3], "sky": [4, 5, 6]}', "JSON .ValueError: a key is there twice in sky, sky.: give --classes"),
    *((f"sky\n{line}\n", "line 2: .* cannot be understood") for line in (
        "road-128-64-128", "road @ 1 2 3", "\u8def\uff0c128\uff0c64", "; road", "% road", "--", "label: road")),
    ("0 70 130 180 sky\n", "line 1: .* cannot be understood"),
    ("names: [sky, road]\n", "line 1: .* cannot be understood"),
    ("sky:\n  - 1\n", "line 1: .* cannot be understood"),
    ("name,r,g\nsky,1,2\n", "line 1: a header with 'name,r,g' needs all of r, g, b"),
    ("name,r,g,b\nsky,1,2\n", "line 2: 'sky,1,2' has not the columns of the header"),
    ("name,r,g,b\nsky,1,2,x\n", "line 2: 1 2 x is no colour"),
    ("id,name\n-1,sky\n", "line 2: -1 is no value of a label file"),
    ("a\nb\na\n", "3 names, 1 repeated: give 1 to 255 different ones"),
    ("ignore 1 2 3\n", "0 names"),
    ('[{"color": "#fff"}]', "class 1: no name"),
    ('{"classes": ["a"], "palette": [[0.5, 0, 0]]}', "class 1: .* is no colour"),
    ('{"classes": [', "not a list of classes in JSON"),
    ("sky\xe9".encode("latin-1"), "cannot be read .*utf-8"),
    ("sky 1 2 " + "3" * 5000, "line 1: 'sky 1 2 3.* cannot be understood"),
    ("sky\n" + "x" * 1001, "line 2: 'x.* cannot be understood"),
    ("name,id\nsky," + "9" * 5000, "line 2: 9.* is no value of a label file"),
    ("\n".join(map("n{}".format, range(30_000))), "30000 names, 0 repeated"),
    ('{"classes": ' * 5000 + "0" + "}" * 5000, "not a list of classes in JSON .RecursionError"),
    ('[{"name": "a", "id": "' + "9" * 5000 + '"}]', "not a list of classes in JSON .ValueError"),
])
def test_what_cannot_be_understood_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path, text)
    assert "list.txt" in str(raised.value) and "\n" not in str(raised.value)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.txt: cannot be read \(No such file or directory\): give --classes a"):
        class_list.read_classes(f"{tmp_path}/none.txt")


def test_a_header_of_one_word_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert read(tmp_path, "label\nsky\nroad\n").names == ["sky", "road"]
    assert "line 1: 'label' is taken for a header, not for a class\n" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["a{0}1{0}b", "a{0}b", "1 2 3 a{0}b", "a{0}1,1", "{0}a{0}1{0}2{0}x"])
@pytest.mark.parametrize("gap", [" ", "\t", " \t", " ,"])
def test_no_line_takes_long(tmp_path: Path, line: str, gap: str) -> None:
    """Patterns that match blanks in many ways took minutes for such a line."""
    (tmp_path / "list.txt").write_text("sky\n" + line.format(gap * 100) + "\n")
    start = time.process_time()
    with contextlib.suppress(UserError):
        class_list.read_classes(str(tmp_path / "list.txt"))
    assert time.process_time() - start < 1


def test_a_number_of_classes_with_many_digits(tmp_path: Path) -> None:
    for number in ("256", "9999", "9" * 12, "9" * 5000):
        with pytest.raises(UserError, match="names, 0 repeated: give 1 to 255 different ones"):
            class_list.read_classes(number)
