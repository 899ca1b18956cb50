"""What predict.py reads, and where its results go.

Reading order: find_pictures -> below -> is_result, save_picture -> place_results.
"""

import contextlib
import glob
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import common
from common import UserError
from pictures import EXTENSIONS, files_below, open_picture
from tools import video

MARK = "written by predict.py"  # the comment in each result: no result is a picture of a later run
NOTE = PngInfo()
NOTE.add_text("comment", MARK)
ENDINGS = ("labels.png", "overlay.jpg", "overlay.png", "confidence.png", "explain.png", "labels/000001.png")


def find_pictures(arguments: Sequence[str]) -> dict[Path, Path]:
    """The pictures and videos that files, folders and quoted globs stand for, each with the place of its results.

    The place is the path below the folder, without extension. Results of earlier runs are left out.
    """
    found: dict[Path, Path] = {}
    for argument in arguments:
        names = [argument] if os.path.exists(argument) else sorted(glob.glob(argument, recursive=True), key=natural)
        files = {file: place for name in names for file, place in below(Path(name))
                 if name == argument and file == Path(name) or file.suffix.lower() in EXTENSIONS + video.EXTENSIONS}
        if not files:
            raise UserError(f"no picture at {argument}: name a file, a folder of pictures or a glob in quotes")
        found = found | files | found  # the place that the first argument gives
    pictures = {file: place for file, place in found.items() if not is_result(file)}
    if not pictures:
        raise UserError("these are results of predict.py and no pictures: name others")
    if len(pictures) < len(found):
        print(f"left out: {len(found) - len(pictures)} results of earlier runs")
    return pictures


def below(path: Path) -> Iterator[tuple[Path, Path]]:
    """A file, or the pictures and videos below a folder, with their places. Links to folders are not followed."""
    if not path.is_dir():
        yield path, Path(path.stem)
        return
    for file in sorted(files_below(path, EXTENSIONS + video.EXTENSIONS), key=natural):
        yield file, file.relative_to(path).with_suffix("")


def natural(path: str | Path) -> list[str | int]:
    """The key that sorts frame10 behind frame9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def is_result(path: Path) -> bool:
    """Whether predict.py wrote this picture or video, as its comment says."""
    if path.suffix.lower() in video.EXTENSIONS:
        return video.comment_of(path) == MARK
    with contextlib.suppress(UserError), open_picture(path) as picture:
        return picture.info.get("comment") in (MARK, MARK.encode())
    return False


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a result: a JPEG or PNG, by the path's ending."""
    kind = "JPEG" if path.suffix == ".jpg" else "PNG"
    common.write_whole(path, lambda file: picture.save(file, kind, quality=92, comment=MARK, pnginfo=NOTE))


def place_results(pictures: dict[Path, Path], out: Path) -> dict[Path, Path]:
    """Where the results of each picture go: the path that _labels.png and others are added to.

    Where two have one place, also in another case or Unicode form, they get whole paths, or then numbers.
    Raises UserError if a file is there that is no result: it would be written over.
    """
    def key(place: Path) -> str:
        return unicodedata.normalize("NFC", place.as_posix()).casefold()

    whole = {file: Path(*(part for part in file.parts if part not in ("/", "..", "."))) for file in pictures}
    bare = {file: path.with_suffix("") for file, path in whole.items()}
    ways = [(names, Counter(map(key, names.values()))) for names in (pictures, bare, whole)]
    stems, taken = {}, set()
    for file in pictures:  # the shortest of the names that no other picture has
        place = next((names[file] for names, number in ways if number[key(names[file])] == 1), whole[file])
        while key(place) in taken:
            place = place.with_name(f"{place.name}-2")
        taken.add(key(place))
        stems[file] = out / place
        for target in (Path(f"{out / place}_{ending}") for ending in ENDINGS):
            if target.exists() and not is_result(target):
                raise UserError(f"{target} is there, and does not say that it was {MARK}: move it or choose --out")
    return stems
