"""Lists of classes, as labelling tools write them.

Reading order: ClassList -> read_classes -> entries_of_text (read_table, read_line) or entries_of_json -> collect.

Shapes: K classes.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
import pictures
from common import IGNORE, UserError, reading

REMEDY = "give --classes a file with one class name a line, or a number"
LONGEST_LINE = 1000  # characters
KNOWN = "known are `name`, `name R G B`, `R G B name`, `name #hex`, `id,name`, tables with a header, labelmap.txt, JSON"
NO_CLASS = {"ignore", "ignored", "void", "unlabelled", "unlabeled", "dont care", "don't care"}  # names of no class
COLUMNS = {  # the words of a header, by what they stand for
    "name": {"name", "names", "class", "classes", "class_name", "classname", "label", "labels", "label_name",
             "category", "categories", "class_names", "label_names", "object", "objects"},
    "id": {"id", "idx", "index", "value", "pixel_value", "pixelvalue", "class_id", "label_id", "gray", "grey"},
    "r": {"r", "red"}, "g": {"g", "green"}, "b": {"b", "blue"},
    "colour": {"color", "colour", "rgb", "color_rgb", "hex", "color_hex", "hexcolor"},
}
HEX, NUMBER = r"#(?:[0-9a-fA-F]{8}|[0-9a-fA-F]{6}|[0-9a-fA-F]{3})\b", r"\d+"
TRIPLE = rf"{NUMBER}(?:(?>\s*[,;]\s*|\s+){NUMBER}){{2}}"
COLOUR = rf"(?P<colour>{HEX}|(?:[rR][gG][bB]\s*)?[(\[]\s*{TRIPLE}(?:\s*,\s*{NUMBER})?\s*[)\]]|{TRIPLE})"
GAP = r"(?>\s*[,;:=]\s*|\s+)"  # (?>...) and *+ never match a second time in another way: no line takes minutes
FORMS = [re.compile(form) for form in (  # of a line; a name holds what is no number or separator
    r"(?P<name>[^:]+):(?P<colour>\d+,\d+,\d+)?:[^:]*:[^:]*",  # labelmap.txt
    rf"(?:(?P<id>{NUMBER}){GAP})?(?P<name>[\s\d,;:=(\[]*+[^\s\d,;:=(\[].*?){GAP}{COLOUR}(?:[,;\s]+(?P<alpha>{NUMBER}))?",
    rf"{COLOUR}{GAP}(?P<name>[^\s\d,;:=].*)",
    rf"(?P<id>{NUMBER})[.)]?{GAP}(?P<name>[^\s\d,;:=].*)",
    rf"(?P<name>[\s\d,;:=]*+[^\s\d,;:=].*?)(?>\s*[,;:=]\s*|[^\S\t]*\t\s*)(?P<id>{NUMBER})",
    r"(?P<name>.*[^\s\d,;:=.].*)",
)]
OTHER_SYNTAX = re.compile(  # YAML, XML, Markdown, other comments and separators, colours without their #
    r'["\[\]{}|<>@，；：]|^[-;%=*/\\]|[:,]$|:\s|\d[^\w\s]+\d+[^\w\s]+\d|(^|\s)#|'
    r"\s0x[0-9a-fA-F]+$|\s(?=[a-fA-F]*\d)[0-9a-fA-F]{6}$|\s[fF]{6}$")
NUMBERS_LEFT = re.compile(r"[,;:=\t]\s*-?[\d.]+\s*([,;:=\t]|$)|(^|\s)-?[\d.]+[\s,;]+-?[\d.]+(\s|$)")


class Entry(NamedTuple):
    """What a line says."""
    where: str  # for messages
    name: str
    colour: int | None = None  # 0xRRGGBB
    id: int | None = None  # the value in label files
    alpha: str | None = None


class ClassList(NamedTuple):
    """The classes of a list, and what stands for them in label files. A label is a class index, or 255 for no class."""
    names: list[str]
    palette: np.ndarray  # uint8 (K, 3)
    colours: dict[int, int]  # colour 0xRRGGBB -> label; empty if the list has none
    ids: dict[int, int]  # value -> label; empty if the place in the list is the value


def read_classes(classes: str) -> ClassList:
    """Read a list of classes in any of the forms that labelling tools write; a number stands for classes without names.

    Names such as `ignore` and `void` are no class. A name on several lines is one class of several colours or values.
    Raises UserError, with the line, for what cannot be understood.
    """
    if classes.isdecimal():
        number = int(classes[:4])  # more digits are too many classes in any case
        return collect([Entry(classes, f"class {k}") for k in range(number)], classes)
    text = data.read_text(Path(classes), REMEDY)
    if re.match(r'\s*(\{|\[\s*[{"])', text) or classes.lower().endswith(".json"):
        with reading(f"{classes}: not a list of classes in JSON", REMEDY):
            entries = list(entries_of_json(data.read_json(Path(classes)), classes))
    else:
        entries = list(entries_of_text(text, classes))
    return collect(entries, classes)


def entries_of_text(text: str, source: str) -> Iterator[Entry]:
    """The entries of a text, one a line; blank lines and comments (# and //) are skipped."""
    lines = [(f"{source}, line {number}", re.sub(rf"\s((?!{HEX})#|//).*", "", line).strip())
             for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1)]
    lines = [(where, line) for where, line in lines
             if line and not line.startswith("//") and (not line.startswith("#") or re.match(HEX + r"\s*\S", line))]
    if not lines:
        raise UserError(f"{source} has comments only: {REMEDY}")
    separator, columns = header_of(lines[0][1])
    if len(columns) == 1:
        print(f"{lines[0][0]}: '{lines[0][1]}' is taken for a header, not for a class")
    if "id" in columns and re.search(r"train[\s_]*id", lines[0][1], re.I):
        raise UserError(f"{lines[0][0]}: an id and a train id: keep the column whose values the label files hold")
    if separator in (",", ";", "\t"):
        yield from read_table(lines, separator, columns)
        return
    if columns.keys() >= {*"rgb"} and not columns["r"] < columns["g"] < columns["b"]:
        raise UserError(f"{lines[0][0]}: the order of colours is red, green, blue: {KNOWN}")
    names = lines[0][1].split(",")
    if len(lines) == 1 and len(names) > 1 and all(re.search(r"[^\W\d_]", name) for name in names):
        lines = [(lines[0][0], name.strip()) for name in names]  # `sky, road, car`
    read = [read_line(*line) for line in lines[separator is not None:]]
    four = [entry for entry in read if entry.alpha is not None]  # R G B and opacity, or a name with a number and R G B
    if four and (len(four) < sum(entry.colour is not None for entry in read) or len({e.name for e in four}) < len(four)
                 or any(e.alpha != "255" and e.colour != 0 for e in four)):
        raise UserError(f"{four[0].where}: four numbers for '{four[0].name}', which may be R G B or not: write three")
    stems = {re.sub(r"\s+\d+$", "", entry.name) for entry in read if entry.colour is entry.id is None}
    if len(stems) == len(read) and not stems & {entry.name for entry in read} or (
            "id" in columns and any(entry.id is None for entry in read)):
        raise UserError(f"{read[0].where}: is the number of '{read[0].name}' a label value, or a part of the name? "
                        "Write `value: name` on each line, or a list of names in JSON")
    yield from read


def header_of(line: str) -> tuple[str | None, dict[str, int]]:
    """The separator and the columns of a header, by what they stand for; None and {} if the line is none."""
    for separator in (",", ";", "\t", ":", " "):
        words = [re.sub(r"[\s_]+", "_", word.strip(" \"'").lower()) for word in line.split(separator)]
        columns = {kind: k for k, word in [*enumerate(words)][::-1] for kind, known in COLUMNS.items() if word in known}
        enough = len(words) == 1 or len(columns) > 1 and (separator != ":" or "colour" in columns)
        if separator == " " and len(words) > 1:  # `green label` is a class
            enough = len(columns) == len(words) and columns.keys() != {"name", "r"} and (
                {"id", "colour"} & columns.keys() or {"r", "g", "b"} <= columns.keys())
        if "name" in columns and enough:
            return separator, columns
    return None, {}


def read_table(lines: Sequence[tuple[str, str]], separator: str, columns: dict[str, int]) -> Iterator[Entry]:
    """The entries of a table with a header; columns that are not known are left out."""
    if "colour" not in columns and 0 < len({"r", "g", "b"} & columns.keys()) < 3:
        raise UserError(f"{lines[0][0]}: a header with {lines[0][1]!r} needs all of r, g, b")
    width = len(lines[0][1].split(separator))
    for where, line in lines[1:]:
        fields = [field.strip() for field in next(csv.reader([line], delimiter=separator, skipinitialspace=True))]
        if len(fields) <= max(columns.values()) or not fields[columns["name"]] or any(fields[width:]):
            raise UserError(f"{where}: {line!r} has not the columns of the header: mend it")
        colour = " ".join(fields[columns[c]] for c in "rgb") if "r" in columns else (
            fields[columns["colour"]] if "colour" in columns else None)
        yield Entry(where, fields[columns["name"]], as_colour(colour, where) if colour and colour.strip() else None,
                    as_id(fields[columns["id"]], where) if "id" in columns else None)


def read_line(where: str, line: str) -> Entry:
    """The entry of a line without a header."""
    line = re.sub(r'"(\d+)"', r"\1", line)
    found = next((match for form in FORMS if len(line) <= LONGEST_LINE and (match := form.fullmatch(line))), None)
    name = found["name"].strip(" \t\"'") if found else ""
    if not found or gaps_differ(found) or NUMBERS_LEFT.search(name) or OTHER_SYNTAX.search(name):
        raise UserError(f"{where}: {line!r} cannot be understood: {KNOWN}")
    parts = {"colour": None, "id": None, "alpha": None, **found.groupdict()}
    return Entry(where, name, parts["colour"] and as_colour(parts["colour"], where),
                 parts["id"] and as_id(parts["id"], where), parts["alpha"])


def gaps_differ(line: re.Match) -> bool:
    """Whether the gaps say that a number behind the name may belong to it: `lane 1,0,0,255`, `lane 1, 2 3`."""
    if "alpha" not in line.groupdict() or not line["colour"][0].isdecimal():
        return False
    first, *gaps = [gap.replace(" ", "") for gap in re.findall(r"[\s,;:=]+", line.string[line.end("name"):])]
    return len({*gaps}) > 1 or first == "" != gaps[0] and (line["alpha"] is not None or gaps[0] == "\t")


def entries_of_json(content: object, source: str) -> Iterator[Entry]:
    """The entries of JSON: names, objects with a name and a color or id, {"classes": ..}, {id: name}, {name: color}."""
    if isinstance(content, dict):
        inner = next((content[key] for key in ("classes", "labels", "categories", "tools", "names", "id2label")
                      if isinstance(content.get(key), list | dict)), None)
        if inner is not None:
            palette = content.get("palette") or [None] * len(inner)
            for entry, colour in zip(entries_of_json(inner, source), palette, strict=True):
                yield entry if colour is None else entry._replace(colour=as_colour(str(colour), entry.where))
            return
        content = [{"id": key, **(value if isinstance(value, dict) else {"name": value})} if key.isdecimal() else
                   {"name": key, "id" if isinstance(value, int) else "color": value} for key, value in content.items()]
    for number, item in enumerate(content, 1):
        where = f"{source}, class {number}"
        item = {key.lower(): value for key, value in item.items()} if isinstance(item, dict) else {"name": item}
        name = item.get("name", item.get("title", item.get("label")))
        if not isinstance(name, str):
            raise UserError(f"{where}: no name: {REMEDY}")
        colour, value = item.get("color", item.get("colour")), item.get("id", item.get("value"))
        is_id = isinstance(value, int | str) and str(value).isdecimal()
        yield Entry(where, name, None if colour is None else as_colour(str(colour), where),
                    int(value) if is_id else None)


def as_colour(text: str, where: str) -> int:
    """A colour as 0xRRGGBB: `#rrggbb`, `#rgb` or three numbers; an alpha behind is left out. Raises UserError."""
    if text.startswith("#") or re.fullmatch("[0-9a-fA-F]{6}", text):
        digits = text.lstrip("#")
        digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
        if re.fullmatch("[0-9a-fA-F]{6}", digits[:6]) and len(digits) in (6, 8):
            return int(digits[:6], 16)
    numbers = re.findall(r"-?[\d.]+", text)
    if len(numbers) not in (3, 4) or not all(re.fullmatch(r"\d{1,9}", n) and int(n) <= 255 for n in numbers):
        raise UserError(f"{where}: {text} is no colour: give red, green and blue, whole numbers of 0..255")
    return int.from_bytes(map(int, numbers[:3]))


def as_id(text: str, where: str) -> int:
    """A value of label files. Raises UserError."""
    if not re.fullmatch(r"\d{1,9}", text) or int(text) > 65535:
        raise UserError(f"{where}: {text} is no value of a label file: give whole numbers from 0 to 65535")
    return int(text)


def collect(entries: Sequence[Entry], source: str) -> ClassList:
    """The classes of the entries. Raises UserError for entries that contradict one another."""
    if entries and entries[0].name == "__ignore__" and entries[0].colour is entries[0].id is None:
        entries = entries[1:]  # labelme counts it as -1: the next one is 0
    names, colours, ids, different = [], {}, {}, {entry.name for entry in entries}
    if len(different) > 2 * IGNORE:  # with those of no class too many: what follows takes time as their square
        data.check_names([*different], f"--classes {source}")
    several = len(different) < len(entries)  # colours or values of one class
    has_colours, has_ids = (any(getattr(entry, field) is not None for entry in entries) for field in ("colour", "id"))
    for place, (where, name, colour, value, _) in enumerate(entries):
        if not name.isprintable() or not any(map(str.isalpha, name)):
            raise UserError(f"{where}: {name!r} is no name of a class: {KNOWN}")
        no_class = re.sub(r"[\s_-]+", " ", name).strip().casefold() in NO_CLASS
        for has, given, what in ((has_colours, colour, "colour"), (has_ids, value, "value")):
            if has and given is None and not no_class:
                raise UserError(f"{where}: '{name}' has no {what}, and other classes have one: give it one")
        if not no_class and (name not in names or not (has_colours or has_ids)):
            names.append(name)
        label = IGNORE if no_class else names.index(name)
        value = value if has_ids else place
        for table, key, text in ((colours, colour, "colour"), (ids, value, "value")):
            if key is not None and table.setdefault(key, label) != label:
                raise UserError(f"{where}: the {text} of '{name}' is that of another class: one of them is wrong")
    data.check_names(names, f"--classes {source}")
    if not has_ids and (several or ids == {k: k for k in range(len(names))}):
        ids = {}
    palette = pictures.default_palette(len(names))
    for colour, k in reversed(colours.items()):
        if k != IGNORE:
            palette[k] = tuple(colour.to_bytes(3))
    return ClassList(names, palette, colours, ids)
