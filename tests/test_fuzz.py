"""Files of strangers: whatever a damaged or hostile file holds, its reader succeeds or raises one line, soon and small.

Reading order: Reader, READERS -> build (damage_bytes, damage_text, damage_json) -> verdict -> attack -> the tests.

A case is a reader's name and a number: a valid file, changed by a generator that both seed. One case again, with what
it raises: `python tests/test_fuzz.py image 17`. A new reader is one entry of READERS: valid contents, and a call.
"""

import base64
import contextlib
import io
import json
import mmap
import multiprocessing
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, features
from scipy.io import savemat

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import data  # noqa: E402
import pictures  # noqa: E402
from common import UserError  # noqa: E402
from tools import annotations, class_list, context, from_folders  # noqa: E402

SECONDS, MEMORY, LONGEST = 5, 1 << 30, 500  # of a case: CPU time, bytes, characters of its message
FORK = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)
Damage = Callable[[bytes, np.random.Generator], bytes]


# ------------------------------------------------------------------------------------------------------- valid contents
def saved(picture: Image.Image, kind: str, **options) -> bytes:
    """The bytes of a file of that kind."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def image_files() -> list[bytes]:
    """Pictures of the formats that are read, in several modes."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8))
    gray, exif = rgb.convert("L"), Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(rng.integers(0, 1 << 16, (16, 24), np.uint16))
    files = [saved(rgb, "PNG", exif=exif), saved(rgb.convert("P"), "PNG"), saved(deep, "PNG"), saved(rgb, "JPEG"),
             saved(rgb, "JPEG", progressive=True, exif=exif), saved(rgb.convert("CMYK"), "JPEG"), saved(rgb, "BMP"),
             saved(rgb, "TIFF"), saved(rgb, "TIFF", compression="tiff_lzw"), saved(rgb, "TIFF", compression="jpeg"),
             saved(deep, "TIFF"), saved(gray.convert("F"), "TIFF", exif=exif), saved(rgb, "GIF"), saved(rgb, "MPO"),
             saved(rgb, "GIF", save_all=True, append_images=[gray]), saved(rgb.convert("RGBA"), "PNG"),
             saved(rgb, "MPO", save_all=True, append_images=[rgb])]
    if features.check("webp"):
        files += [saved(rgb, "WEBP"), saved(rgb, "WEBP", lossless=True, exif=exif)]
    return files


def foreign_files() -> list[bytes]:
    """Pictures of formats that nobody asked for."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
    kinds = ["DDS", "ICNS", "ICO", "IM", "PCX", "PPM", "SGI", "TGA", "EPS"]
    kinds += [kind for kind, feature in {"AVIF": "avif", "JPEG2000": "jpg_2000"}.items() if features.check(feature)]
    return [saved(rgb, kind) for kind in kinds] + [saved(rgb.convert("P"), "BLP"), saved(rgb.convert("1"), "XBM")]


def label_files() -> list[bytes]:
    """Label images of every lossless kind."""
    values = np.random.default_rng(0).integers(0, 3, (16, 24)).astype(np.uint8)
    gray, palette, deep = Image.fromarray(values), Image.fromarray(values), Image.fromarray(values.astype(np.uint16))
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    modes = gray, palette, gray.convert("RGB")
    files = [saved(picture, kind) for picture in modes for kind in ("PNG", "BMP", "TIFF")]
    files += [saved(gray, "GIF"), saved(gray.convert("1"), "PNG"), saved(deep, "PNG"), saved(gray.convert("F"), "TIFF"),
              saved(gray.convert("I"), "TIFF", compression="tiff_deflate")]
    return files + [saved(gray.convert("RGB"), "WEBP", lossless=True)] * features.check("webp")


def as_json(*contents: object) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(content, ensure_ascii=False).encode() for content in contents]


SQUARE = [2, 3, 7, 3, 7, 9, 2, 9]
COCO = {
    "images": [{"id": 10 + i, "file_name": f"{name}.png", "height": 10, "width": 12} for i, name in enumerate("ab")],
    "categories": [{"id": 3, "name": "car"}, {"id": 7, "name": "dög"}],
    "annotations": [{"id": i, "image_id": 10 + i % 2, "category_id": category, "segmentation": code, "iscrowd": 0}
                    for i, (category, code) in enumerate([
                        (3, [SQUARE]), (7, {"size": [10, 12], "counts": [23, 6, 4, 6, 4, 6, 4, 6, 4, 6, 51]}),
                        (3, {"size": [10, 12], "counts": "g0640000000_1"}), (7, SQUARE)])]}
PIXELS = base64.b64encode(saved(Image.new("L", (4, 3), 1), "PNG")).decode()
INSIDE = base64.b64encode(saved(Image.new("RGB", (12, 10)), "PNG")).decode()
LABELME = {
    "version": "5.4.1", "flags": {}, "imagePath": "a.png", "imageData": None, "imageHeight": 10, "imageWidth": 12,
    "shapes": [{"label": label, "points": points, "shape_type": kind, "mask": mask} for label, kind, points, mask in [
        ("car", "polygon", [[2, 3], [7, 3], [7, 9]], None), ("dog", "rectangle", [[1, 1], [4, 4]], None),
        ("car", "circle", [[6, 5], [6, 2]], None), ("dog", "mask", [[4, 2], [8, 5]], PIXELS)]]}
INFO = {"classes": ["c0", "c1", "ü"], "palette": [[0, 0, 0], [128, 0, 0], [0, 128, 0]], "ignore_index": 255,
        "name": "x"}
CLASS_LISTS = [
    b"sky\nroad\ncar\n", b"sky 70 130 180\nroad 128 64 128\nignore 0 0 0\n", b"0: sky\n1: road\n2: car\n",
    b"id,name,color\n0,sky,#4682b4\n1,road,#804080\n",
    b"# label:color_rgb:parts:actions\nsky:70,130,180::\nroad:1,2,3::\n",
    b"name,r,g,b\nsky,70,130,180\nroad,128,64,128\n", "straße #ff0000\nhimmel #00f\n".encode("utf-16"),
    *as_json(["sky", "road"], {"0": "sky", "1": "road"}, {"sky": [70, 130, 180], "road": "#804080"},
             {"classes": ["sky", "road"], "palette": [[1, 2, 3], [4, 5, 6]]},
             [{"name": "sky", "id": 0, "color": "#4682b4"}, {"name": "road", "id": 7, "color": [1, 2, 3]}])()]
SPLITS = [b"a\nb\n", b"a.png\r\nb.png\r\n", "a\nsub/c\n".encode("utf-16")]


def mat_files() -> list[bytes]:
    """LabelMap files, packed or not, of the formats 5 and 4."""
    labels, files = np.random.default_rng(0).integers(0, 460, (10, 12), np.uint16), []
    others = {"names": np.array(["a", "bc"], object), "more": {"deep": {"er": [1, "x"]}}}
    for content, options in (({"LabelMap": labels}, {"do_compression": True}), ({"LabelMap": labels}, {"format": "4"}),
                             (others | {"LabelMap": labels}, {}), ({"LabelMap": labels.astype(float)}, {})):
        file = io.BytesIO()
        savemat(file, content, **options)
        files.append(file.getvalue())
    return files


# -------------------------------------------------------------------------------------------------------------- damages
ODD_BYTES = [b"\0", b"\xff", b"\0" * 8, b"\xff" * 4, b"\x80\0\0\0", b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\r\n",
             b"\xef\xbb\xbf", b"\xff\xfe", b"[" * 300]
ODD_TEXTS = ["", " ", "\0", "a\nb", "\x1b[31mred", "..", "../../etc/passwd", "/etc/passwd", "C:\\x", "\ud800", "\u202e",
             "ı", "x" * 300, "x" * 5000, "a/" * 3000, " " * 2000 + "1" + " " * 2000 + "b", "-1", "1e999", "9" * 5000,
             "'\"<b>&amp;", "https://x/[", "#12345", "٣"]
ODD_VALUES = [None, True, False, 0, -1, 1, 2.5, 255, 256, 1 << 31, 1 << 63, 10 ** 12, 10 ** 400, float("nan"),
              float("inf"), 1e308, [], {}, [[]], [None], {"a": 1}, [1] * 1000, "0", *ODD_TEXTS]


def pick(rng: np.random.Generator, choices: Sequence) -> object:
    return deepcopy(choices[int(rng.integers(len(choices)))])  # a case must not change those after it


def damage_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped, cut, repeated, moved, replaced; numbers of 2 and 4 bytes that claim other sizes."""
    result = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        at, other = (int(rng.integers(len(result) + 1)) for _ in "ab")
        # A half of all changes fall into the first 64 bytes, where most formats have their header.
        at = at % 64 if rng.random() < 0.5 else at
        length = int(rng.integers(1, 64))
        kind = int(rng.integers(7))
        if kind == 0:
            result[at:at + 1] = bytes([int(rng.integers(256))])
        elif kind == 1 and rng.random() < 0.5:
            del result[other:]
        elif kind == 2:
            result[at:at] = result[other:other + length]
        elif kind == 3:
            result[at:at + length] = result[other:other + length]
        elif kind == 4:
            odd = pick(rng, ODD_BYTES)
            result[at:at + len(odd) * int(rng.integers(2))] = odd
        elif kind == 5:
            number = int(pick(rng, [0, 1, 2, 255, 4096, 65535, 65536, 10 ** 6, (1 << 31) - 1, (1 << 32) - 1]))
            form = pick(rng, ["<I", ">I", "<H", ">H"])
            result[at:at + struct.calcsize(form)] = struct.pack(form, number % (1 << 8 * struct.calcsize(form)))
        else:
            del result[at:at + length]
    return bytes(result)


def damage_image(content: bytes, rng: np.random.Generator) -> bytes:
    """As `damage_bytes`; half of the PNG files get right check sums again, so that more than these are tried."""
    result = damage_bytes(content, rng)
    if result[:8] != b"\x89PNG\r\n\x1a\n" or rng.random() < 0.5:
        return result
    parts, at = [result[:8]], 8
    while at + 12 <= len(result):
        size = int.from_bytes(result[at:at + 4], "big")
        body = result[at + 4:at + 8 + size]
        parts += [result[at:at + 4], body, zlib.crc32(body).to_bytes(4, "big")]
        at += 12 + size
    return b"".join(parts)


def damage_mat(content: bytes, rng: np.random.Generator) -> bytes:
    """As `damage_bytes`; half of the packed ones are changed inside."""
    if content[128:129] != b"\x0f" or rng.random() < 0.5:
        return damage_bytes(content, rng)
    body = zlib.compress(damage_bytes(zlib.decompress(content[136:]), rng))
    return content[:132] + struct.pack("<I", len(body)) + body


def damage_encoding(text: str, rng: np.random.Generator) -> bytes:
    """The text in UTF-8, now and then in another encoding or with bytes changed."""
    encoding = pick(rng, ["utf-8"] * 12 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
    content = text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    return damage_bytes(content, rng) if rng.random() < 0.15 else content


def damage_text(content: bytes, rng: np.random.Generator) -> bytes:
    """Lines and words replaced by odd ones, repeated, joined, taken out."""
    if content[:1] in b"[{":
        return damage_json(content, rng)
    text = content.decode("utf-16" if content[:2] == b"\xff\xfe" else "utf-8")
    for _ in range(int(rng.integers(1, 4))):
        cuts = [i for i, c in enumerate(text) if c in "\n ,:.;\t"] + [0, len(text)]
        first, last = sorted([int(pick(rng, cuts)), int(pick(rng, cuts))])
        middle = [*map(str, ODD_VALUES), text[first:last] * 2, "", "\n", ",", " 300 2 3", " 1 2", "\t", ":", "\r"]
        text = text[:first] + pick(rng, middle) + text[last:]
    return damage_encoding(text * (1000 if rng.random() < 0.02 else 1), rng)


def places(tree: object) -> list[tuple]:
    """Each value inside JSON, as its container and key."""
    found = []
    for key in range(len(tree)) if isinstance(tree, list) else tree if isinstance(tree, dict) else ():
        found += [(tree, key), *places(tree[key])]
    return found


def damage_json(content: bytes, rng: np.random.Generator) -> bytes:
    """Values replaced by odd ones or by each other, taken out, repeated, renamed; keys twice; deep nesting."""
    root = [json.loads(content)]
    for _ in range(int(rng.integers(1, 4))):
        container, key = places(root)[int(rng.integers(len(places(root))))]
        kind = int(rng.integers(7))
        if kind < 3:
            container[key] = pick(rng, ODD_VALUES)
        elif kind == 3 and container is not root:
            del container[key]
        elif kind == 4:
            other, there = pick(rng, places(root))
            container[key] = json.loads(json.dumps(other[there]))
        elif kind == 5 and isinstance(container, dict):
            container[str(pick(rng, ODD_TEXTS))] = container.pop(key)
        else:
            container[key] = [container[key]] * int(rng.integers(0, 3))
        if not root:
            break
    text = json.dumps(root[0], ensure_ascii=bool(rng.integers(2)))
    if rng.random() < 0.06:
        text = text.replace("{", '{"name": 1, "id": {}, ', 1)
    if rng.random() < 0.06:
        depth = int(pick(rng, [50, 900, 100_000]))
        text = text.replace(pick(rng, ["null", "0", '"a"']), "[" * depth + "]" * depth, 1)
    return damage_encoding(text, rng)


# -------------------------------------------------------------------------------------------------------------- readers
def read_labels(path: Path) -> None:
    """Labels as from-folders and a training read them."""
    from_folders.survey(from_folders.Pair(picture(path.parent, (16, 24)), path, "x"))
    with contextlib.suppress(UserError):
        pictures.read_labels(path)


@cache
def picture(folder: Path, size: tuple[int, int] = (10, 12), names: str = "a") -> Path:
    """A folder with pictures; the first of them."""
    (folder / "sub").mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", size[::-1]).save(folder / f"{name}.png")
    return folder / f"{names[0]}.png"


def read_split(path: Path) -> None:
    """A split list as a plain data set has it."""
    picture(path.parent, names="ab")
    for folder in ("images", "labels"):
        (path.parent / folder / "sub").mkdir(parents=True, exist_ok=True)
        for name in ("a", "b", "sub/c"):
            (path.parent / folder / f"{name}.png").touch()
    data.SegmentationDataset(path.parent, path.stem, data.context_info(), data.PLAIN_FOLDER)


def convert(command: Callable, path: Path, *arguments: object) -> None:
    """A data set of annotations, made in this process."""
    picture(path.parent, names="abc")
    (path.parent / "b.json").write_text(json.dumps(LABELME | {"imagePath": "b.png"}))
    with tempfile.TemporaryDirectory(dir=path.parent.parent) as out:
        command(path.parent, *arguments, False, Path(out) / "out", 1)


def read_context(path: Path) -> None:
    """The labels of trainval_merged.json."""
    for images in context.read_annotations(path).values():
        for image in images:
            context.labels_from_json(path, image)


def read_mat(path: Path) -> None:
    """A LabelMap, in a worker process as prepare-context has it."""
    list(IN_PARALLEL(partial(context.labels_from_mat, path.parent), [context.Annotated(path.stem)], 1, ""))


def in_this_process(function: Callable, jobs: Sequence, workers: int, title: str) -> list:
    """In the place of common.in_parallel, whose processes are slow to start."""
    return [function(job) for job in jobs]


IN_PARALLEL = common.in_parallel
SAMPLE = Path(__file__).parent / "golden" / "context_sample.json"


class Reader(NamedTuple):
    """What reads a file of others."""
    file: str
    samples: Callable[[], list[bytes]]  # valid contents
    damage: Damage
    read: Callable[[Path], object]
    fast: int = 200  # cases in the ordinary suite
    foreign: Callable[[], list[bytes]] = list  # valid contents of kinds that are refused


READERS = {
    "image": Reader("x.png", image_files, damage_image, pictures.read_image, foreign=foreign_files),
    "size": Reader("x.png", image_files, damage_image, pictures.picture_size, foreign=foreign_files),
    "labels": Reader("x.png", label_files, damage_image, read_labels),
    "dataset.json": Reader("dataset.json", as_json(INFO, {"classes": ["a", "b"]}), damage_json, data.read_info),
    "classes": Reader("list.txt", lambda: CLASS_LISTS, damage_text, lambda path: class_list.read_classes(str(path))),
    "split": Reader("train.txt", lambda: SPLITS, damage_text, read_split),
    "coco": Reader("x.json", as_json(COCO), damage_json, lambda path: convert(annotations.from_coco, path, path), 60),
    "labelme": Reader("a.json", as_json(LABELME, LABELME | {"imagePath": "z.png", "imageData": INSIDE}), damage_json,
                      lambda path: convert(annotations.from_labelme, path, None), 60),
    "context": Reader("merged.json", lambda: [SAMPLE.read_bytes()], damage_json, read_context),
    "mat": Reader("x.mat", mat_files, damage_mat, read_mat, 20),
}


# ----------------------------------------------------------------------------------------------------------- the attack
@cache
def samples_of(name: str) -> list[bytes]:
    return READERS[name].samples() + READERS[name].foreign()


def build(name: str, number: int, folder: Path) -> Path:
    """Write the case of that number."""
    reader, rng = READERS[name], np.random.default_rng([zlib.crc32(name.encode()), number])
    content = samples_of(name)[number % len(samples_of(name))]
    path = folder / "in" / reader.file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(reader.damage(content, rng))
    return path


def verdict(name: str, number: int, folder: Path) -> str:
    """"" if the reader reads the case, or refuses it as it should; else what escapes."""
    path, start, before = build(name, number, folder), time.process_time(), peak_memory()
    try:
        READERS[name].read(path)
    except UserError as error:
        text = str(error)
        named = any(name in text for name in (path.name, str(path.parent), f"{path.stem},", "one image, or one group"))
        if len(text) > LONGEST or not text.isprintable() or not named:
            return f"a message of {len(text)} characters: {text[:200]}"
    except Exception as error:
        own = [frame.name for frame in traceback.extract_tb(error.__traceback__)
               if Path(frame.filename).is_relative_to(ROOT) and ".venv" not in frame.filename]
        return f"{type(error).__name__} in {own[-1]}: {str(error)[:80]}"
    seconds, memory = time.process_time() - start, peak_memory() - before
    return f"{seconds:.1f} s" * (seconds > SECONDS) or f"{memory >> 20} MB" * (memory > MEMORY)


def peak_memory() -> int:
    """Bytes, of this process and of its children so far."""
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(peaks) * (1 if sys.platform == "darwin" else 1024)


def work(name: str, numbers: Sequence[int], folder: Path, answers) -> None:
    """A child process: sends the verdict of each case."""
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))  # for the sake of the machine
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
    sys.stdout, sys.stderr = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    from_folders.in_parallel = in_this_process
    for number in numbers:
        answers.send(verdict(name, number, folder))


def attack(name: str, numbers: Sequence[int], folder: Path) -> dict[int, str]:
    """The cases of these numbers that escape, in a child process that may die or hang, then in another one."""
    escapes, waiting = {}, [*numbers]
    while waiting:
        answers, theirs = FORK.Pipe(duplex=False)
        child = FORK.Process(target=work, args=(name, waiting, folder, theirs))
        child.start()
        theirs.close()
        waiting = [*waiting]
        with contextlib.suppress(EOFError):
            while waiting and answers.poll(10 * SECONDS):
                if escape := answers.recv():
                    escapes[waiting[0]] = escape
                waiting.pop(0)
        if waiting:
            child.kill()
            child.join()
            escapes[waiting.pop(0)] = f"died or hung, exit code {child.exitcode}"
        child.join()
    return escapes


def told(name: str, escapes: dict[int, str]) -> str:
    """What escapes, and the commands that repeat it."""
    return "".join(f"\npython tests/test_fuzz.py {name} {number}: {escape}" for number, escape in escapes.items())


@pytest.mark.parametrize("name", READERS)
def test_valid_files_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that refuses everything would pass the other tests."""
    monkeypatch.setattr(from_folders, "in_parallel", in_this_process)
    for content in READERS[name].samples():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / READERS[name].file).write_bytes(content)
        READERS[name].read(tmp_path / "in" / READERS[name].file)


def test_an_attack_finds_what_escapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(message: str) -> None:
        raise UserError(message)

    acts = [lambda: None, lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: refuse("x.bin is wrong: mend it"),
            lambda: {}["x"], lambda: refuse("something is wrong: mend it"),
            lambda: mmap.mmap(-1, 1 << 28).write(bytes(1 << 28))]  # never from memory that the process has kept
    monkeypatch.setitem(READERS, "bad", Reader(
        "x.bin", lambda: [bytes([number]) for number in range(6)], lambda content, rng: content,
        lambda path: acts[path.read_bytes()[0]]()))
    monkeypatch.setattr(sys.modules[__name__], "MEMORY", 1 << 26)
    escapes = attack("bad", range(6), tmp_path)
    assert escapes.pop(5).endswith(" MB")
    assert escapes == {1: "died or hung, exit code -9", 3: "KeyError in <lambda>: 'x'",
                       4: "a message of 27 characters: something is wrong: mend it"}
    assert "\npython tests/test_fuzz.py bad 3: KeyError" in told("bad", escapes)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    escapes = attack(name, range(READERS[name].fast), tmp_path)
    assert not escapes, told(name, escapes)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_by_the_thousand(name: str, tmp_path: Path) -> None:
    escapes = attack(name, range(2000), tmp_path)
    assert not escapes, told(name, escapes)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        from_folders.in_parallel = in_this_process
        case = build(sys.argv[1], int(sys.argv[2]), Path(place))
        print(case.read_bytes()[:1000])
        print(READERS[sys.argv[1]].read(case))
