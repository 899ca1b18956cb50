"""A plain data set of your own images and label images: `python data.py from-folders`.

Reading order: from_folders -> pair_files -> choose_splits -> survey -> choose_rule -> convert_labels -> write_dataset.

Nothing is guessed file by file: all label files are read first, one rule is chosen for all of them, and every guess is
printed in a line.

Shapes: H, W height and width, K classes.
"""

import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

import common
import data
import pictures
from common import IGNORE, UserError, in_parallel
from tools.class_list import ClassList, read_classes

MASK_SUFFIXES = ("_gtFine_labelIds", "_labelIds", "_labelTrainIds", "_mask", "-mask", "_masks", "_label", "_labels",
                 "_seg", "-seg", "_gt", "_L")  # of masks that lie beside their images
MASK_FOLDERS = ("mask", "masks", "label", "labels", "annotation", "annotations", "segmentationclass", "gt")
IMAGE_FOLDERS = ("image", "images", "img", "imgs", "jpegimages", "photos")
SPLIT_NAME = re.compile(r"(train|val|test)(?:ing|id|idation)?(?![a-z])", re.I)  # of a folder
BOTH_WAYS = re.compile(r"(?i)mask|label|gt|seg|annot|im(g|age)|photo|rgb")  # in what is cut off names on both sides
PICTURE_EXTENSION = rf"(?i)\.({'|'.join(extension[1:] for extension in pictures.EXTENSIONS)})$"  # a.jpg of a.jpg.png
GRAY = 0x010101  # a gray level times this is its colour
Job, Result = TypeVar("Job"), TypeVar("Result")


def from_folders(images: Path, labels: Path, classes: str, out: Path, image_suffix: str, mask_suffix: str,
                 splits: Path | None, val_fraction: float, group_by: str | None, zero_is_unlabelled: bool, link: bool,
                 workers: int) -> None:
    """Make a plain data set of images and label images; nothing is left at `out` if a file is wrong.

    Images are copied or linked; labels are checked, and converted to class indices. Raises UserError.
    """
    class_list = read_classes(classes)
    pairs = pair_files(images, labels, image_suffix, mask_suffix)
    parts = choose_splits([pair.name for pair in pairs], splits, val_fraction, group_by)
    surveys = list(in_parallel(survey, pairs, workers, "reading labels"))
    rule = choose_rule(class_list, surveys, zero_is_unlabelled)
    write_dataset(out, class_list.names, rule.palette, pairs, partial(add_pair, rule=rule, link=link), parts, workers)


# ------------------------------------------------------------------------------------------------------------ the files
class Pair(NamedTuple):
    """An image, its label file, and their name in the data set: a path without extension."""
    image: Path
    label: Path
    name: str


def pair_files(images: Path, labels: Path, image_suffix: str = "", mask_suffix: str = "") -> list[Pair]:
    """The images below one folder and the label files below another, or the same, that belong together.

    Names, with the folders above them, are equal but for the suffixes; without given suffixes those that make them
    equal are found. Images without labels are left out and counted. Raises UserError for the reverse.
    """
    stems = {path: path.relative_to(images).with_suffix("").as_posix() for path in files_below(images)}
    if images.resolve() == labels.resolve():
        masks = pick_masks(stems, mask_suffix)
    else:
        masks = {path: path.relative_to(labels).with_suffix("").as_posix() for path in files_below(labels)}
        stems = {path: stem for path, stem in stems.items() if path not in masks}  # masks/ may lie below the images
    if image_suffix or mask_suffix:
        stems, masks = cut(stems, suffix=image_suffix), cut(masks, suffix=mask_suffix)
    by_name, masks_by_name = match(stems, masks)
    if alone := sorted(masks_by_name.keys() - by_name.keys()):
        raise UserError(f"{len(alone)} label files have no image of their name, first of all "
                        f"{masks_by_name[alone[0]]}: add the images, or name what the files of each kind end with by "
                        "--image-suffix and --mask-suffix")
    unlabelled = sorted(by_name.keys() - masks_by_name.keys())
    if unlabelled:
        print(f"left out: {len(unlabelled)} images without labels ({by_name[unlabelled[0]]} ...)")
    names = safe_names(sorted(masks_by_name))
    return [Pair(by_name[key], masks_by_name[key], name) for key, name in names.items()]


def files_below(folder: Path) -> list[Path]:
    """All picture files below a folder, without hidden ones and what macOS adds to archives."""
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in pictures.EXTENSIONS
             and not any(part.startswith((".", "__MACOSX")) for part in file.relative_to(folder).parts)]
    if not files:
        raise UserError(f"{folder} is no folder with images: give the folders of the images and the label images")
    for file in files:
        if re.search("[\ud800-\udfff]", str(file)):
            raise UserError(f"{file}: its name is not in UTF-8: rename it")
    return files


def pick_masks(stems: dict[Path, str], suffix: str) -> dict[Path, str]:
    """Take the label files out of `stems`: those in a folder for masks, or with a suffix beside a file without it."""
    masks = {path: stem for path, stem in stems.items()
             if any(part.lower() in MASK_FOLDERS for part in stem.split("/")[:-1])}
    if not masks:
        known = {*stems.values()}
        suffix = suffix or next((end for end in MASK_SUFFIXES
                                 if any(stem.endswith(end) and stem[:-len(end)] in known for stem in known)), "")
        masks = {path: stem for path, stem in stems.items() if suffix and stem.endswith(suffix)}
    if not masks:
        raise UserError("images and labels are in one folder, and no label file is told by its name: say what the "
                        "names of label files end with by --mask-suffix")
    for path in masks:
        del stems[path]
    return masks


def cut(stems: dict[Path, str], suffix: str = "", prefix: str = "") -> dict[Path, str]:
    """The stems that end with the suffix and whose file names begin with the prefix, without both."""
    result = {}
    for path, stem in stems.items():
        folder, slash, name = stem.rpartition("/")
        if name.endswith(suffix) and name.startswith(prefix):
            result[path] = folder + slash + name[len(prefix):len(name) - len(suffix)]
    return result


def match(stems: dict[Path, str], masks: dict[Path, str]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and label files by name, by the first of some ways to read their names that finds all images' names."""
    ways = [(stems, masks)]
    ways += [tuple({path: re.sub(PICTURE_EXTENSION, "", stem) for path, stem in side.items()} for side in ways[0])]
    ends = [common_ends(side) for side in ways[0]]
    ways += [(stems, cut(masks, *ends[1])), (cut(stems, *ends[0]), masks)]
    if all(BOTH_WAYS.search(" ".join(end)) or not any(end) for end in ends):  # left_1 is no image of right_1
        ways += [(cut(stems, *ends[0]), cut(masks, *ends[1]))]
    ways += [(stems, cut(masks, suffix)) for suffix in MASK_SUFFIXES]
    ways += [(cut(stems, ends[0][0]), cut(masks, suffix)) for suffix in MASK_SUFFIXES]
    ways += [tuple({path: "/".join(part for part in stem.split("/")[:-1] if part.lower() not in
                                   IMAGE_FOLDERS + MASK_FOLDERS) + "/" + stem.split("/")[-1]
                    for path, stem in side.items()} for side in way) for way in ways]  # train/images/a, train/masks/a
    for way in ways:
        keys = [[unicodedata.normalize("NFC", stem).strip("/") for stem in side.values()] for side in way]
        if keys[1] and {*keys[1]} <= {*keys[0]}:
            break
    else:
        way = ways[0]
    result = []
    for side, plain in zip(way, ways[0], strict=True):
        files: dict[str, Path] = {}
        for path, stem in side.items():
            other = files.setdefault(unicodedata.normalize("NFC", stem).strip("/"), path)
            if other != path:
                raise UserError(f"{other} and {path.name} have one name: keep one of them, or tell label files apart "
                                "by --mask-suffix")
        result.append(files)
        path, stem = next(iter(side.items()), (None, ""))
        if path and stem.rpartition("/")[2] != plain[path].rpartition("/")[2]:
            what = "labels" if plain is masks else "images"
            print(f"{what}: {path.name} is taken for '{stem.strip('/')}', and so on")
    return result[0], result[1]


def common_ends(stems: dict[Path, str]) -> tuple[str, str]:
    """What all file names end and begin with: a suffix from a separator on, and a prefix without digits at its end."""
    names = [stem.rpartition("/")[2] for stem in stems.values()]
    suffix = commonprefix([name[::-1] for name in names])[::-1] if len(names) > 1 else ""
    suffix = re.sub(r"^[^_.\- ]*", "", suffix)
    prefix = commonprefix([name[:len(name) - len(suffix)] for name in names]) if len(names) > 1 else ""
    return suffix, re.sub(r"\d+$", "", prefix)


def safe_names(keys: Iterable[str]) -> dict[str, str]:
    """For each key a name that any system can hold and that `open_dataset` finds again; changed ones are told."""
    names, taken = {}, set()
    for key in keys:
        parts = [re.sub(r'[\\<>:"|?*]', "_", "".join(c if c.isprintable() else "_" for c in part)).strip(" .") or "_"
                 for part in key.split("/")]
        name = re.sub(PICTURE_EXTENSION, r"_\1", "/".join(parts))
        number = 1
        while f"{name}-{number}".casefold() in taken or number == 1 and name.casefold() in taken:
            number += 1
        names[key] = name if number == 1 else f"{name}-{number}"
        taken.add(names[key].casefold())
    changed = [(key, name) for key, name in names.items() if key != name]
    if changed:
        print(f"{len(changed)} names were changed: {common.printable(changed[0][0])!r} is {changed[0][1]!r} ...")
    return names


# ----------------------------------------------------------------------------------------------------------- the splits
def choose_splits(names: list[str], lists: Path | None, val_fraction: float, group_by: str | None) -> dict[str, list]:
    """The names of each split: from the user's lists, from folders named train and val, or chosen."""
    if lists:
        return read_lists(names, lists)
    folders = defaultdict(list)
    for name in names:
        found = [made[1].lower() for part in name.split("/")[:-1] if (made := SPLIT_NAME.match(part))]
        folders[found[0] if found else ""].append(name)
    if folders.keys() == {"train", "test"}:
        folders |= split_names(folders["train"], val_fraction, group_by)
    elif len(folders) > 1 and not folders.keys() >= {"train", "val"} or len(folders) > 1 and "" in folders:
        where = ", ".join(f"{len(part)} {split or 'elsewhere'}" for split, part in sorted(folders.items()))
        raise UserError(f"folders named like splits hold not all images, or lack train or val ({where}): move the "
                        "files, or give lists with --splits")
    if folders.keys() >= {"train", "val"}:
        print("splits: those of the folders, " + ", ".join(f"{len(part)} {split}" for split, part in folders.items()))
        return dict(folders)
    return split_names(names, val_fraction, group_by)


def read_lists(names: list[str], folder: Path) -> dict[str, list[str]]:
    """Splits by the files train.txt, val.txt and perhaps test.txt in a folder."""
    known = defaultdict(list)
    for name in names:
        for key in {name, name.rpartition("/")[2]}:
            known[key].append(name)
    splits = {}
    for split in ("train", "val", "test"):
        if split == "test" and not (folder / "test.txt").is_file():
            continue
        splits[split] = []
        for line in data.read_split(folder / f"{split}.txt"):
            stem = line[:-len(Path(line).suffix)] if line.lower().endswith(pictures.EXTENSIONS) else line
            found = known.get(unicodedata.normalize("NFC", stem), [])
            if len(found) != 1:
                raise UserError(f"{folder / split}.txt names '{line}', which is {len(found)} of the labelled images: "
                                "give the names of this data set, one a line")
            splits[split] += found
    if twice := [name for name, number in Counter(sum(splits.values(), [])).items() if number > 1]:
        raise UserError(f"{folder}: '{twice[0]}' is named twice in the lists: leave one line")
    return splits


def split_names(names: Iterable[str], val_fraction: float = 0.2, group_by: str | None = None) -> dict[str, list[str]]:
    """About that share of the names to "val", the others to "train"; neither is empty if there are two groups.

    A hash of the name decides, so that a larger data set later keeps the choice. Names that are one group stay
    together: `group_by` is a regular expression, and what it finds in a name (its first bracket, if it has one) is the
    group. Without it, frames of videos are told by a number of four digits or more at the end.
    """
    names = sorted(names)
    groups = defaultdict(list)
    try:
        for name in names:
            found = re.search(group_by, name) if group_by else None
            groups[found and found[found.re.groups and 1] or name].append(name)
    except re.error as error:
        raise UserError(f"--group-by {group_by}: no regular expression ({error})") from None
    if not group_by and (videos := find_videos(names)):
        groups = videos
        print(f"frames of {len(groups)} videos ({', '.join(map(repr, [*groups][:3]))} ...): those of one video are not "
              "both learned from and judged by; --group-by can say otherwise, '.*' splits frame by frame")
    if len(groups) < 2:
        raise UserError("one image, or one group of images, cannot be split into training and validation: give more, "
                        "or other groups with --group-by")
    rank = {group: int(hashlib.sha256(group.encode()).hexdigest(), 16) % 1000 / 1000 for group in groups}
    ordered, wanted, val = sorted(groups, key=lambda group: (rank[group], group)), val_fraction * len(names), []
    for group in ordered if len(groups) < len(names) else ():  # large groups: those that fit
        if len(val) < wanted and len(val) + len(groups[group]) <= 1.5 * wanted:
            val += groups[group]
    if not val:
        few = [group for group in ordered if rank[group] < val_fraction] if len(groups) == len(names) else []
        few = few or [min(ordered, key=lambda group: (len(groups[group]), rank[group]))]
        val = [name for group in few[:len(groups) - 1] for name in groups[group]]
    return {"train": sorted({*names} - {*val}), "val": sorted(val)}


def find_videos(names: Sequence[str]) -> dict[str, list[str]]:
    """Names by what stands before their numbers, if these are numbers of frames; else {}.

    They are if they have four digits or more, mostly follow one another in one step, and there are three in a video.
    """
    videos, steps = defaultdict(list), Counter()
    for name in names:  # sorted
        before, number = re.fullmatch(r"(.*?)(\d{4,}|)", name, re.S).groups()
        if not number:
            return {}
        if videos[before]:
            steps[int(number) - int(videos[before][-1][len(before):])] += 1
        videos[before].append(name)
    regular = steps and max(steps.values()) >= steps.total() / 2
    return dict(videos) if regular and 1 < len(videos) <= len(names) / 3 else {}


# ----------------------------------------------------------------------------------------------------------- the labels
class Survey(NamedTuple):
    """What one label file holds."""
    path: Path
    coloured: bool
    counts: dict[int, int]  # pixels by value, or by colour 0xRRGGBB
    palette: dict[int, int]  # the colours of the values that occur, of a palette image


def survey(pair: Pair) -> Survey:
    """Read a label file. Raises UserError if it is no label file or has another size than its image."""
    image = pictures.read_label_image(pair.label)
    pictures.check_size(pair.image, pair.label, image.values.shape)
    values, counts = np.unique(image.values, return_counts=True)
    colours = {} if image.palette is None else dict(zip(values.tolist(), as_numbers(image.palette)[values].tolist(),
                                                        strict=True))
    return Survey(pair.label, image.coloured, dict(zip(values.tolist(), counts.tolist(), strict=True)), colours)


def as_numbers(colours: np.ndarray) -> np.ndarray:
    """Colours uint8 (..., 3) as numbers 0xRRGGBB."""
    return colours.astype(np.int32) @ (1 << 16, 1 << 8, 1)


class Rule(NamedTuple):
    """How the values of all label files become labels."""
    labels: dict[int, int]  # value, or colour, -> class index or 255
    colours: bool  # whether these are colours
    palette: np.ndarray  # uint8 (K, 3), of the new data set


def choose_rule(classes: ClassList, surveys: Sequence[Survey], zero_is_unlabelled: bool) -> Rule:
    """One rule for all files. A rule that is a guess is printed; what could mean several things is refused."""
    if zero_is_unlabelled and (classes.colours or 0 in classes.ids):
        raise UserError("--zero-is-unlabelled is for class indices, and the list says what 0 is, or has colours: "
                        "write `ignore` there for no class")
    grays = {colour & 255 for colour in classes.colours if colour % GRAY == 0}
    plain = {value for file in surveys if not file.coloured and not file.palette for value in file.counts}
    if classes.colours and (len(plain) == 0 or plain <= grays):
        return colour_rule(classes, surveys)
    if classes.colours and any(file.coloured or file.palette for file in surveys):
        raise UserError("some label files hold colours, others values that are no colour of the list: "
                        "give files of one kind")
    rule = index_rule(classes, surveys, zero_is_unlabelled)
    if classes.colours:
        print("labels: the colours of the list are for drawing only")
    return rule


def colour_rule(classes: ClassList, surveys: Sequence[Survey]) -> Rule:
    """By the colours of the list: of pixels, of a palette, or gray levels."""
    known = classes.colours
    found = [{file.palette.get(value, value if file.coloured else value * GRAY): count
              for value, count in file.counts.items()} for file in surveys]
    remedy = "add it to the list, `ignore R G B` for no class"
    if not all(file.coloured or file.palette for file in surveys):
        print("labels: by the gray levels of the list")
    if any(file.palette for file in surveys):
        print("labels: by the colours of their palettes")
        remedy += "; or take the colours out of the list if the files' indices are the classes"
    check_values(found, surveys, known, lambda value: f"colour {spell(value)}", remedy)
    check_one_class(found, known, classes.names)
    return Rule(known, True, classes.palette)


def index_rule(classes: ClassList, surveys: Sequence[Survey], zero_is_unlabelled: bool) -> Rule:
    """By the values: class indices, the values of the list, 0 and 255, or indices from 1 on."""
    number, palette, found = len(classes.names), classes.palette, [file.counts for file in surveys]
    if any(file.coloured for file in surveys):
        colours = Counter()
        for file in surveys:
            colours.update(file.counts if file.coloured else {})
        if any(colour % GRAY for colour in colours):
            most = "; ".join(spell(colour) for colour, _ in colours.most_common(12))
            first = next(file.path for file in surveys if file.coloured)
            raise UserError(f"{first} holds colours: give each class its colour in the list, `name R G B` on a line; "
                            f"the files have {len(colours)}: {most}")
        found = [{value & 255 if file.coloured else value: count for value, count in file.counts.items()}
                 for file in surveys]
        print("labels: the gray levels of three equal channels")
    known = classes.ids or {k: k for k in range(number)}
    known = {IGNORE: IGNORE, **known}
    values = {value for counts in found for value in counts}
    if zero_is_unlabelled:
        known = {IGNORE: IGNORE, 0: IGNORE, **(classes.ids or {k + 1: k for k in range(number)})}
    elif number == 1 and not classes.ids and IGNORE in values:
        raise UserError(f"one class, '{classes.names[0]}', and files with {IGNORE}, which may be it or no class: put "
                        "`background` before it in the list, then 0 and 255 are the two")
    elif number == 2 and not classes.ids and IGNORE in values:
        kinds = {frozenset(counts) & {1, IGNORE} for counts in found} - {frozenset()}
        if kinds == {frozenset({IGNORE})} and values <= {0, IGNORE}:
            known = {0: 0, IGNORE: 1}
        elif kinds == {frozenset({IGNORE}), frozenset({1})}:
            raise UserError("some label files hold 0 and 1, others 0 and 255, which may be the second class or no "
                            f"class ({next(file.path for file in surveys if IGNORE in file.counts)}): save all of them "
                            "with 0 and 1, or all with 0 and 255")
    remedy = f"no class is {IGNORE}; or give each class its gray level in the list, `name 127 127 127`"
    if 0 in values - known.keys() or number in values and values - {IGNORE} <= {*range(number + 1)}:
        remedy = f"if 0 is unlabelled, use --zero-is-unlabelled; {remedy}"
    check_values(found, surveys, known, lambda value: f"value {value}", remedy)
    names = [*classes.names, *["unlabelled"] * (IGNORE + 1 - number)]  # by label
    meaning = [f"{value} is {names[known[value]]}" for value in sorted(values)]
    print(f"labels: {', '.join(meaning[:12])}{' ...' if len(meaning) > 12 else ''}")
    if any(file.palette for file in surveys):
        palette = common_palette(surveys, known, classes.names, palette)
    check_one_class(found, known, classes.names)
    return Rule(known, False, palette)


def common_palette(surveys: Sequence[Survey], known: dict[int, int], names: Sequence[str],
                   palette: np.ndarray) -> np.ndarray:
    """`palette` (K, 3) with the colours that the label files give their values. UserError if the files differ."""
    seen: dict[int, tuple[int, Path]] = {}
    for file in surveys:
        for value, colour in file.palette.items():
            first, where = seen.setdefault(value, (colour, file.path))
            if first != colour:
                raise UserError(f"value {value} is drawn in {spell(first)} in {where} and in {spell(colour)} in "
                                f"{file.path}: the palettes differ, so the values say nothing; give each class its "
                                "colour in the list, `name R G B`")
    own = {known[value]: colour for value, (colour, _) in sorted(seen.items()) if known[value] != IGNORE}
    drawn = [f"{names[k]} {'' if n else 'is drawn '}in {spell(colour)}" for n, (k, colour) in enumerate(own.items())]
    print(f"labels: by the indices of their palettes: {', '.join(drawn[:12])}")
    if len(own) < len(palette) or len({*own.values()}) < len(own):
        return palette  # colours that are not all told, or alike, are of no use for drawing
    return np.uint8([[*own[k].to_bytes(3)] for k in range(len(palette))])


def check_values(found: Sequence[dict], surveys: Sequence[Survey], known: dict, text: Callable, remedy: str) -> None:
    """Raises UserError for values that the rule does not know: which, in how many files, where first."""
    files = defaultdict(list)
    for counts, file in zip(found, surveys, strict=True):
        for value in counts.keys() - known.keys():
            files[value].append(file.path)
    if files:
        value, where = max(files.items(), key=lambda item: len(item[1]))
        others = f" (and {len(files) - 1} others)" if len(files) > 1 else ""
        raise UserError(f"label {text(value)}{others} is none of the classes: in {len(where)} of {len(surveys)} files, "
                        f"first {where[0]}: {remedy}")


def check_one_class(found: Sequence[dict], known: dict, names: Sequence[str]) -> None:
    """Raises UserError if the files hold one class of several, or none: nothing could be learned."""
    present = {known[value] for counts in found for value in counts} - {IGNORE}
    if len(present) < min(2, len(names)):
        what = f"nothing but '{names[present.pop()]}'" if present else "no class at all"
        raise UserError(f"the label files hold {what}: there must be pixels of two classes; are these the right files?")


def spell(colour: int) -> str:
    """A colour 0xRRGGBB as "R G B"."""
    return " ".join(map(str, colour.to_bytes(3)))


def convert_labels(path: Path, rule: Rule) -> np.ndarray:
    """Labels, uint8 (H, W), of a file."""
    image = pictures.read_label_image(path)
    values = image.values
    if rule.colours and not image.coloured:
        values = values * GRAY if image.palette is None else as_numbers(image.palette)[values]
    elif image.coloured and not rule.colours:
        values = values & 255
    present, places = np.unique(values, return_inverse=True)
    return np.array([rule.labels[value] for value in present.tolist()], np.uint8)[places].reshape(values.shape)


# --------------------------------------------------------------------------------------------------------- the data set
def add_pair(draft: Path, pair: Pair, rule: Rule, link: bool) -> None:
    """Bring one pair into the data set under construction."""
    pictures.save_labels(convert_labels(pair.label, rule), draft / "labels" / f"{pair.name}.png", rule.palette)
    add_image(draft, pair.image, pair.name, link)


def add_image(draft: Path, image: Path, name: str, link: bool = False) -> None:
    """Copy or link an image into the data set under construction."""
    place = draft / "images" / f"{name}{image.suffix.lower()}"
    place.parent.mkdir(parents=True, exist_ok=True)
    (os.symlink if link else shutil.copyfile)(image.resolve(), place)


def write_dataset(out: Path, classes: list[str], palette: np.ndarray, jobs: Sequence[Job],
                  add: Callable[[Path, Job], Result], splits: dict[str, list[str]], workers: int) -> list[Result]:
    """Make a plain data set at `out`: add(draft, job) brings in one pair, in a worker process. Returns its results.

    Raises UserError if `out` exists or the result cannot be opened again; nothing is left then.
    """
    common.make_folder(out.parent, "--out")
    if out.exists():
        raise UserError(f"{out} exists: remove it or choose another folder with --out")
    info = {"name": out.name, "classes": classes, "palette": palette.tolist(), "ignore_index": IGNORE}
    with common.new_folder(out) as draft:
        results = list(in_parallel(partial(add, draft), jobs, workers, f"making {out}"))
        for split, names in splits.items():
            data.write_split(draft / f"{split}.txt", names)
        (draft / "dataset.json").write_text(json.dumps(info, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        for split, names in splits.items():  # what cannot be opened again is not made
            if data.open_dataset(draft, split).names != names:
                raise UserError(f"{out}: names of the split {split} lead to other files: rename the images")
    print(f"{out}: {', '.join(f'{len(names)} {split}' for split, names in splits.items())} images; look at them with "
          f"`python data.py check {out}`, then train with `python train.py --data {out} --size tiny`")
    return results
