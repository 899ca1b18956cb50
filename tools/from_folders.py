"""A plain data set of your own images and label images: `python data.py from-folders`.

Reading order: from_folders -> pair_files (match, safe_names) -> choose_splits -> survey -> choose_rule (colour_rule,
index_rule) -> convert_labels -> write_dataset.

Nothing is guessed file by file: all label files are read first, one rule is chosen for all of them, and every guess is
printed in a line.

Shapes: H, W height and width, K classes.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
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
KINDS = re.compile(r"(?i)mask|label|gt|seg|annot|im(g|age)|photo|rgb|^_L$")  # words that tell a kind of file
SEPARATOR = r"[_.\- ]"  # of the words of a name
DEVICE = r"(?i)(con|prn|aux|nul|com\d|lpt\d)(?=$|\.)"  # no name of a file on Windows
PICTURE_EXTENSION = rf"(?i)\.({'|'.join(extension[1:] for extension in pictures.EXTENSIONS)})$"  # a.jpg of a.jpg.png
GRAY = 0x010101  # a gray level times this is its colour
Job, Result = TypeVar("Job"), TypeVar("Result")


def from_folders(images: Path, labels: Path, classes: str, out: Path, image_suffix: str, mask_suffix: str,
                 splits: Path | None, val_fraction: float, group_by: str | None, zero_is_unlabelled: bool, link: bool,
                 workers: int) -> None:
    """Make a plain data set of images and label images; nothing is left at `out` if a file is wrong.

    Images are copied or linked; labels are checked, and converted to class indices. Raises UserError.
    """
    check_out(out)  # before all files are read
    class_list = read_classes(classes)
    pairs = {pair.name: pair for pair in pair_files(images, labels, image_suffix, mask_suffix)}
    parts = choose_splits([*pairs], splits, val_fraction, group_by)
    jobs = [pairs[name] for names in parts.values() for name in names]
    surveys = list(in_parallel(survey, jobs, workers, "reading labels"))
    rule = choose_rule(class_list, surveys, zero_is_unlabelled)
    write_dataset(out, class_list.names, rule.palette, jobs, partial(add_pair, rule=rule, link=link), parts, workers)


# ------------------------------------------------------------------------------------------------------------ the files
class Pair(NamedTuple):
    """An image, its label file, and their name in the data set: a path without extension."""
    image: Path
    label: Path
    name: str

    def __str__(self) -> str:
        return f"{self.image} and {self.label}"


Stems = dict[Path, str]  # files and their names: the path below a folder, without the extension


def pair_files(images: Path, labels: Path, image_suffix: str = "", mask_suffix: str = "") -> list[Pair]:
    """The images below one folder and the label files below another, or the same, that belong together.

    Names, with the folders above them, are equal but for the suffixes; without given suffixes those that make them
    equal are found. Images without labels are left out and counted. Raises UserError for the reverse.
    """
    stems, masks = stems_below(images), stems_below(labels)
    if images.resolve() == labels.resolve():
        masks = pick_masks(stems, mask_suffix)
    elif images.resolve().is_relative_to(labels.resolve()):  # the inner one of two folders holds one kind of files
        masks = {path: stem for path, stem in masks.items() if not path.is_relative_to(images)}
    stems = {path: stem for path, stem in stems.items() if path not in masks}
    if not stems or not masks:
        raise UserError(f"{images} and {labels} hold nothing but {'images' if stems else 'label files'}: give the "
                        "folder of the others too")
    stems, masks = end_with(image_suffix, stems, "--image-suffix"), end_with(mask_suffix, masks, "--mask-suffix")
    image_of, label_of = match(stems, masks)
    if alone := sorted(label_of.keys() - image_of.keys()):
        raise UserError(f"{len(alone)} label files have no image of their name, first of all {label_of[alone[0]]}: add "
                        "the images, or name what the files of each kind end with by --image-suffix and --mask-suffix")
    if unlabelled := sorted(image_of.keys() - label_of.keys()):
        print(f"left out: {len(unlabelled)} images without labels ({image_of[unlabelled[0]]} ...)")
    return [Pair(image_of[key], label_of[key], name) for key, name in safe_names(sorted(label_of)).items()]


def stems_below(folder: Path) -> Stems:
    """All picture files below a folder and their names."""
    files = pictures.files_below(folder)
    if not files:
        raise UserError(f"{folder} is no folder with images: give the folders of the images and the label images")
    for file in files:
        if re.search("[\ud800-\udfff]", str(file)):
            raise UserError(f"{file}: its name is not in UTF-8: rename it")
    return {file: unicodedata.normalize("NFC", file.relative_to(folder).with_suffix("").as_posix()) for file in files}


def pick_masks(stems: Stems, suffix: str) -> Stems:
    """The label files among `stems`: those in a folder for masks, else those with a suffix, the most frequent one."""
    masks = {path: stem for path, stem in stems.items()
             if any(part.lower() in MASK_FOLDERS for part in stem.split("/")[:-1])}
    suffix = suffix or max(MASK_SUFFIXES, key=lambda end: sum(stem.endswith(end) for stem in stems.values()))
    masks = masks or {path: stem for path, stem in stems.items() if stem.endswith(suffix)}
    if not masks:
        raise UserError("images and labels are in one folder, and no label file is told by its name: say what the "
                        "names of label files end with by --mask-suffix, or move them to a folder of their own")
    return masks


def end_with(suffix: str, stems: Stems, option: str) -> Stems:
    """The files whose names end with the suffix of an option, named without it; the others are counted."""
    result = cut(stems, suffix)
    if not result:
        raise UserError(f"{option} {suffix}: no name ends so before its extension; one is {next(iter(stems.values()))}")
    if len(result) < len(stems):
        print(f"left out: {len(stems) - len(result)} files that do not end with {suffix}")
    return result


def cut(stems: Stems, suffix: str, prefix: str = "") -> Stems:
    """The files whose names end with the suffix and begin with the prefix, named without both."""
    result = {}
    for path, stem in stems.items():
        folder, slash, name = stem.rpartition("/")
        if name.endswith(suffix) and name.startswith(prefix) and len(name) > len(suffix + prefix):
            result[path] = folder + slash + name[len(prefix):len(name) - len(suffix)]
    return result


def match(stems: Stems, masks: Stems) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and label files by name: read in the first of the ways that finds one image for each label file.

    A label file may be left over only beside another one of its image, as a picture of its colours is.
    """
    for sides in ways_to_read(stems, masks):
        images, labels = ({*side.values()} for side in sides)
        others = [stem for path, stem in masks.items() if path not in sides[1]]
        if labels and labels <= images and all(any(stem[:i] in labels for i in range(len(stem))) for stem in others):
            break
    else:
        sides, others = (stems, masks), []
    result = []
    for what, side, plain in zip(("images", "labels"), sides, (stems, masks), strict=True):
        files: dict[str, Path] = {}
        for path, stem in side.items():
            other = files.setdefault(stem, path)
            if other != path:
                raise UserError(f"{other} and {path.name} have one name: keep one of them, or tell label files apart "
                                "by --mask-suffix")
        result.append(files)
        path, stem = next(iter(side.items()), (None, ""))
        if path and stem.rpartition("/")[2] != plain[path].rpartition("/")[2]:
            print(f"{what}: {path.name} is taken for '{stem}', and so on")
    if others:
        print(f"left out: {len(others)} other label files of the same images ({others[0]} ...)")
    return result[0], result[1]


def ways_to_read(stems: Stems, masks: Stems) -> Iterator[tuple[Stems, Stems]]:
    """The files with their names as they are, then without more and more of their ends, without the JPG of a.jpg.png,
    and without the folders of kinds: train/images/a and train/masks/a are a pair.
    """
    for no_kinds, no_extension in itertools.product((False, True), repeat=2):
        both = (stems, masks)
        if no_extension:
            both = [{path: re.sub(PICTURE_EXTENSION, "", stem) for path, stem in side.items()} for side in both]
        if no_kinds:
            both = [{path: "/".join([part for part in Path(stem).parts[:-1] if part.lower() not in
                                     IMAGE_FOLDERS + MASK_FOLDERS] + [Path(stem).name])
                     for path, stem in side.items()} for side in both]
        cuts = [{end: cut(side, *end) for end in common_ends(side) + more}
                for side, more in zip(both, ([], [(suffix, "") for suffix in MASK_SUFFIXES]), strict=True)]
        for ends in sorted(itertools.product(*cuts), key=lambda ends: len("".join(sum(ends, ())))):
            # Nothing is cut off both sides but kinds of files: left_1 is no image of right_1.
            if not all(map(any, ends)) or all(KINDS.search("".join(end)) for end in ends):
                yield cuts[0][ends[0]], cuts[1][ends[1]]


def common_ends(stems: Stems) -> list[tuple[str, str]]:
    """(suffix, prefix) of all file names, from none to all that they share. They are made of whole words.

    Words with a number at the end are not cut: cam1_7 and cam2_7, a_1 and a_2 are no pairs.
    """
    names = [stem.rpartition("/")[2] for stem in stems.values()]
    prefix, suffix = commonprefix(names), commonprefix([name[::-1] for name in names])[::-1]
    prefixes = [prefix[:found.end()] for found in re.finditer(SEPARATOR, prefix)]
    if letters := re.sub(r"\d+$", "", prefix):  # img of img1, img12
        prefixes += [letters] * all(name[len(letters):len(letters) + 1].isdigit() for name in names)
    suffixes = [suffix[found.start():] for found in re.finditer(SEPARATOR, suffix)]
    prefixes, suffixes = (["", *(end for end in ends if not re.search(rf"\d({SEPARATOR}|$)", end))] if len(names) > 1
                          else [""] for ends in (prefixes, suffixes))
    return [*itertools.product(suffixes, prefixes)]


def safe_names(keys: Iterable[str]) -> dict[str, str]:
    """For each key a name that any system can hold and that `open_dataset` finds again; changed ones are told."""
    names, taken = {}, set()
    for key in keys:
        parts = [re.sub(r'[\\<>:"|?*]', "_", "".join(c if c.isprintable() else "_" for c in part)).strip(" .") or "_"
                 for part in key.split("/")]
        name = re.sub(PICTURE_EXTENSION, r"_\1", "/".join(re.sub(DEVICE, r"\1_", part) for part in parts))
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
    """The names of each split: from the user's lists, from folders named train, val and test, or chosen."""
    if lists:
        return read_lists(names, lists)
    folders = defaultdict(list)
    for name in names:
        found = [made[1].lower() for part in name.split("/")[:-1] if (made := SPLIT_NAME.match(part))]
        folders[found[0] if found else ""].append(name)
    if len(folders) < 2:
        return split_names(names, val_fraction, group_by)
    if "" in folders or "train" not in folders:
        where = ", ".join(f"{len(part)} {split or 'elsewhere'}" for split, part in sorted(folders.items()))
        raise UserError(f"folders named like splits hold not all images, or lack train ({where}): move the files, or "
                        "give lists with --splits")
    print("splits: those of the folders, " + ", ".join(f"{len(folders[split])} {split}" for split in sorted(folders)))
    if "val" not in folders:
        folders |= split_names(folders.pop("train"), val_fraction, group_by)
    return dict(folders)


def read_lists(names: list[str], folder: Path) -> dict[str, list[str]]:
    """Splits by the files train.txt, val.txt and perhaps test.txt in a folder."""
    known, splits = defaultdict(list), {}
    for name in names:
        for key in {name, name.rpartition("/")[2]}:
            known[key].append(name)
    for split in ("train", "val", *["test"] * (folder / "test.txt").is_file()):
        splits[split] = []
        for line in data.read_split(folder / f"{split}.txt"):
            found = known.get(unicodedata.normalize("NFC", re.sub(PICTURE_EXTENSION, "", line)), [])
            if len(found) != 1:
                raise UserError(f"{folder / split}.txt names '{line}', which is {len(found)} of the labelled images: "
                                "give the names of this data set, one a line")
            splits[split] += found
    listed = Counter(sum(splits.values(), []))
    if twice := [name for name, number in listed.items() if number > 1]:
        raise UserError(f"{folder}: '{twice[0]}' is named twice in the lists: leave one line")
    if left := {*names} - {*listed}:
        print(f"left out: {len(left)} images that are in no list ({min(left)} ...)")
    return splits


def split_names(names: Iterable[str], val_fraction: float = 0.2, group_by: str | None = None) -> dict[str, list[str]]:
    """About that share of the names to "val", the others to "train"; neither is empty if there are two groups.

    A hash of the name decides, so that a larger data set later keeps the choice (of groups: nearly). Names that are one
    group stay together: `group_by` is a regular expression, and what it finds in a name (its first bracket, if it has
    one) is the group. Without it, frames of videos are told by a number of four digits or more at the end.
    """
    names = sorted(names)
    groups = group_names(names, group_by) if group_by else find_videos(names) or {name: [name] for name in names}
    if len(groups) < 2:
        raise UserError("one image, or one group of images, cannot be split into training and validation "
                        f"({', '.join(names[:1])} ...): give more, or other groups with --group-by")
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


def group_names(names: Sequence[str], group_by: str) -> dict[str, list[str]]:
    """Names by what the regular expression finds in them; a name in which it finds nothing is alone."""
    try:
        found = {name: re.search(group_by, name) for name in names}
    except re.error as error:
        raise UserError(f"--group-by {group_by} is no regular expression ({error}): mend it") from None
    if not any(found.values()):
        raise UserError(f"--group-by {group_by} finds nothing in the names, of which one is {names[0]}: mend it")
    groups = defaultdict(list)
    for name, place in found.items():
        groups[(place and place[place.re.groups and 1]) or name].append(name)
    print(f"{len(groups)} groups of images, of {min(map(len, groups.values()))} to {max(map(len, groups.values()))}")
    return groups


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
    if not steps or max(steps.values()) < steps.total() / 2 or not 1 < len(videos) <= len(names) / 3:
        return {}
    print(f"frames of {len(videos)} videos ({', '.join(map(repr, [*videos][:3]))} ...): those of one video are not "
          "both learned from and judged by; --group-by can say otherwise, '.*' splits frame by frame")
    return dict(videos)


# ----------------------------------------------------------------------------------------------------------- the labels
class Survey(NamedTuple):
    """What one label file holds."""
    path: Path
    coloured: bool
    counts: dict[int, int]  # pixels by value, or by colour 0xRRGGBB
    palette: dict[int, int] | None  # of a palette image: the colours of the values that occur


def survey(pair: Pair) -> Survey:
    """Read a label file. Raises UserError if it is no label file or has another size than its image."""
    image = pictures.read_label_image(pair.label)
    pictures.check_size(pair.image, pair.label, image.values.shape)
    values, counts = np.unique(image.values, return_counts=True)
    palette = image.palette if image.palette is None else dict(
        zip(values.tolist(), as_numbers(image.palette)[values].tolist(), strict=True))
    return Survey(pair.label, image.coloured, dict(zip(values.tolist(), counts.tolist(), strict=True)), palette)


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
    colours = Counter()
    for file in surveys:
        colours.update(file.counts if file.coloured else {})
    if three_grays := colours and all(colour % GRAY == 0 for colour in colours):
        surveys = [file._replace(coloured=False, counts={colour & 255: n for colour, n in file.counts.items()})
                   if file.coloured else file for file in surveys]
    grays = {colour & 255 for colour in classes.colours if colour % GRAY == 0}
    plain = {value for file in surveys if not file.coloured and file.palette is None for value in file.counts}
    if classes.colours and plain <= grays:
        if zero_is_unlabelled:
            raise UserError("--zero-is-unlabelled is for class indices, but the label files have the colours of the "
                            "list: write `ignore R G B` there for no class")
        return colour_rule(classes, surveys)
    if classes.colours and any(file.coloured or file.palette for file in surveys):
        raise UserError("some label files hold colours, others values that are no colour of the list: "
                        "give files of one kind")
    if colours and not three_grays:
        first = next(file.path for file in surveys if file.coloured)
        most = "; ".join(spell(colour) for colour, _ in colours.most_common(12))
        raise UserError(f"{first} holds colours: give each class its colour in the list, `name R G B` on a line; "
                        f"the files have {len(colours)}: {most}")
    if three_grays:
        print("labels: the gray levels of three equal channels")
    if classes.colours:
        print("labels: the colours of the list are for drawing only")
    return index_rule(classes, surveys, zero_is_unlabelled)


def colour_rule(classes: ClassList, surveys: Sequence[Survey]) -> Rule:
    """By the colours of the list: of pixels, of a palette, or gray levels."""
    found, remedy = [], "add it to the list, `ignore R G B` for no class"
    for file in surveys:
        found.append(Counter())
        for value, count in file.counts.items():
            found[-1][value if file.coloured else file.palette[value] if file.palette else value * GRAY] += count
    if not all(file.coloured or file.palette for file in surveys):
        print("labels: by the gray levels of the list")
    if any(file.palette for file in surveys):
        print("labels: by the colours of their palettes")
        remedy += "; or take the colours out of the list if the files' indices are the classes"
    check_values(found, surveys, classes.colours, lambda value: f"colour {spell(value)}", remedy)
    check_one_class(found, classes.colours, classes.names)
    return Rule(classes.colours, True, classes.palette)


def index_rule(classes: ClassList, surveys: Sequence[Survey], zero_is_unlabelled: bool) -> Rule:
    """By the values: class indices, the values of the list, 0 and 255, or indices from 1 on."""
    number, found = len(classes.names), [file.counts for file in surveys]
    values = {value for counts in found for value in counts}
    known = {IGNORE: IGNORE, **(classes.ids or {k: k for k in range(number)})}
    if zero_is_unlabelled and classes.ids.get(0, IGNORE) != IGNORE:
        raise UserError("--zero-is-unlabelled contradicts the list, which says what 0 is: leave one of them out")
    if zero_is_unlabelled:
        known = {IGNORE: IGNORE, 0: IGNORE, **(classes.ids or {k + 1: k for k in range(number)})}
    elif known == {0: 0, 1: 1, IGNORE: IGNORE} and IGNORE in values:
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
    colours, palette = common_colours(surveys), classes.palette.copy()
    names = [*classes.names, *["unlabelled"] * (IGNORE + 1 - number)]  # by label
    meaning = [f"{value} is {names[known[value]]}" + (f" ({spell(colours[value])})" if value in colours else "")
               for value in sorted(values)]
    print(f"labels: {', '.join(meaning[:12])}{' ...' if len(meaning) > 12 else ''}")
    check_one_class(found, known, classes.names)
    own = {known[value]: colour for value, colour in sorted(colours.items(), reverse=True) if known[value] != IGNORE}
    if len({*own.values()}) == len(own) and own.keys() >= {*range(number)}:  # else some would be alike
        palette = np.uint8([[*own[k].to_bytes(3)] for k in range(number)])
    return Rule(known, False, palette)


def common_colours(surveys: Sequence[Survey]) -> dict[int, int]:
    """The colours that palettes give to the values that occur. Raises UserError if the files differ."""
    seen: dict[int, tuple[int, Path]] = {}
    for file in surveys:
        for value, colour in (file.palette or {}).items():
            first, where = seen.setdefault(value, (colour, file.path))
            if first != colour:
                raise UserError(f"value {value} is drawn in {spell(first)} in {where} and in {spell(colour)} in "
                                f"{file.path}: the palettes differ, so the values say nothing; give each class its "
                                "colour in the list, `name R G B`")
    return {value: colour for value, (colour, _) in seen.items()}


def check_values(found: Sequence[dict], surveys: Sequence[Survey], known: dict, text: Callable, remedy: str) -> None:
    """Raises UserError for values that the rule does not know: which, in how many files and pixels, where first."""
    files, pixels = defaultdict(list), Counter()
    for counts, file in zip(found, surveys, strict=True):
        for value in counts.keys() - known.keys():
            files[value].append(file.path)
            pixels[value] += counts[value]
    if files:
        value, *others = sorted(files, key=lambda value: (-len(files[value]), -pixels[value]))
        more = f" (and {len(others)} others: {'; '.join(map(text, others[:11]))})" if others else ""
        raise UserError(f"label {text(value)}{more} is none of the classes: in {len(files[value])} of {len(surveys)} "
                        f"files, {pixels[value]} pixels, first {files[value][0]}: {remedy}")


def check_one_class(found: Sequence[dict], known: dict, names: Sequence[str]) -> None:
    """Raises UserError if the files hold one class, or none: nothing could be learned."""
    present = {known[value] for counts in found for value in counts} - {IGNORE}
    if len(present) < 2:
        what = f"nothing but '{names[present.pop()]}'" if present else "no class at all"
        remedy = "are these the right files?" if len(names) > 1 else "put `background` before it in the list"
        raise UserError(f"the label files hold {what}: there must be pixels of two classes; {remedy}")


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
    table = np.zeros(values.max() + 1, np.uint8)
    labels = {value: label for value, label in rule.labels.items() if value < len(table)}
    table[[*labels]] = [*labels.values()]
    return table[values]


# --------------------------------------------------------------------------------------------------------- the data set
def add_pair(draft: Path, pair: Pair, rule: Rule, link: bool) -> None:
    """Bring one pair into the data set under construction."""
    pictures.save_labels(convert_labels(pair.label, rule), draft / "labels" / f"{pair.name}.png", rule.palette)
    add_image(draft, pair.image, pair.name, link)


def add_image(draft: Path, image: Path, name: str, link: bool = False) -> None:
    """Copy or link an image into the data set under construction."""
    place = draft / "images" / f"{name}{image.suffix.lower()}"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)  # of a worker that died behind this line
    (os.symlink if link else shutil.copyfile)(image.resolve(), place)


def check_out(out: Path) -> None:
    """Raises UserError if a data set cannot be made there."""
    common.make_folder(out.parent, "--out")
    if out.exists():
        raise UserError(f"{out} exists: remove it or choose another folder with --out")


def write_dataset(out: Path, classes: list[str], palette: np.ndarray, jobs: Sequence[Job],
                  add: Callable[[Path, Job], Result], splits: dict[str, list[str]], workers: int) -> list[Result]:
    """Make a plain data set at `out`: add(draft, job) brings in one pair, in a worker process. Returns its results.

    Raises UserError if `out` exists or the result cannot be opened again; nothing is left then.
    """
    check_out(out)
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
