"""The command line that makes data sets ready and checks them: `python data.py COMMAND`.

Each command is in a file of its own: fetch.py, context.py, from_folders.py, annotations.py, check.py, toy.py.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import common
from data import CONTEXT
from tools import fetch
from tools.annotations import from_coco, from_labelme
from tools.check import check
from tools.context import prepare_context
from tools.from_folders import from_folders
from tools.toy import make_toy


def build_parser() -> argparse.ArgumentParser:
    """The commands of `python data.py`. An option has the name of its function's argument."""
    parser = common.Parser(prog="data.py", description="Make data sets ready for training, and check them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    workers = argparse.ArgumentParser(add_help=False)
    workers.add_argument("--workers", type=common.positive, default=os.cpu_count() or 1, metavar="N",
                         help="processes (default: %(default)s)")
    add_context(commands, workers)
    add_folders(commands, workers)
    add_annotations(commands, workers)

    p = commands.add_parser("check", parents=[workers], help="read every pair of a data set, report what is wrong")
    p.set_defaults(command=check)
    p.add_argument("root", type=Path, metavar="DIR", help="plain folder or VOC2010 tree")
    p.add_argument("--sheet", type=Path, metavar="PNG", help="contact sheet (default: check_NAME.png)")

    p = commands.add_parser("toy", help="draw the built-in toy data")
    p.set_defaults(command=lambda out, **options: print(f"toy data at {make_toy(out, **options)}"))
    p.add_argument("--out", type=Path, default="data/toy", metavar="DIR", help="(default: %(default)s)")
    p.add_argument("--train", type=int, default=400, metavar="N", help="training images (default: %(default)s)")
    p.add_argument("--val", type=int, default=60, metavar="N", help="validation images (default: %(default)s)")
    p.add_argument("--size", type=int, nargs=2, default=(192, 256), metavar=("H", "W"), help="(default: 192 256)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    return parser


def add_context(commands: argparse._SubParsersAction, workers: argparse.ArgumentParser) -> None:
    """What the published numbers need: `fetch` and `prepare-context`."""
    p = commands.add_parser("fetch", help="get released models, BEiT weights, VOC2010, Pascal Context")
    p.set_defaults(command=lambda names, listed: fetch.show(names) if listed else fetch.fetch(names))
    p.add_argument("names", nargs="*", metavar="WHAT", help="names of the list; what is here is skipped, what was cut "
                   "goes on, archives are unpacked")
    p.add_argument("--list", action="store_true", dest="listed", help="what there is, and where it goes")

    p = commands.add_parser("prepare-context", parents=[workers], help="Pascal Context: labels and splits for VOC2010")
    p.set_defaults(command=prepare_context)
    p.add_argument("--voc", type=Path, default=CONTEXT, metavar="DIR",
                   help="VOC2010 folder (default: %(default)s)")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--json", type=Path, metavar="FILE", dest="json_file", help="trainval_merged.json: 4996 + 5104 "
                        "images, as mmsegmentation has them (default: the one in the VOC2010 folder)")
    source.add_argument("--mat", type=Path, metavar="DIR", dest="mat_folder", help="folder of LabelMap files: 4998 + "
                        "5105 images, as papers have them (default: trainval/ there, without trainval_merged.json)")


def add_folders(commands: argparse._SubParsersAction, workers: argparse.ArgumentParser) -> None:
    """A data set of images and label images: `from-folders`."""
    p = commands.add_parser("from-folders", parents=[workers], help="a data set of your own images and label images")
    p.set_defaults(command=from_folders)
    p.add_argument("--images", type=Path, required=True, metavar="DIR", help="images; sub-folders are searched too")
    p.add_argument("--labels", type=Path, required=True, metavar="DIR",
                   help="label images of the same names: class indices with 255 for none, or colours of the list")
    p.add_argument("--classes", required=True, metavar="LIST", help="the labelling tool's list of classes, or a text "
                   "file with `name` or `name R G B` on a line, `ignore R G B` for no class; or their number")
    p.add_argument("--out", type=Path, default="data/own", metavar="DIR", help="new data set (default: %(default)s)")
    p.add_argument("--image-suffix", default="", metavar="TEXT",
                   help="what the images' names end with, as _leftImg8bit")
    p.add_argument("--mask-suffix", default="", metavar="TEXT", help="what the label images' names end with, as _mask; "
                   "usual ones are found")
    p.add_argument("--splits", type=Path, metavar="DIR", help="folder of your own train.txt and val.txt; default: "
                   "sub-folders train and val if there are such, else chosen by a hash of the name")
    p.add_argument("--val-fraction", type=common.fraction, default=0.2, metavar="X",
                   help="share of the images for validation (default: %(default)s)")
    p.add_argument("--group-by", metavar="REGEX", help="keep images whose names agree in this in one split, as "
                   "'^[^_]+' for all before the first _; default: frames of a video are found")
    p.add_argument("--zero-is-unlabelled", action="store_true", help="0 is no class and 1 the first one")
    p.add_argument("--link", action="store_true", help="link the images instead of copying them")


def add_annotations(commands: argparse._SubParsersAction, workers: argparse.ArgumentParser) -> None:
    """A data set of outlines: `from-coco` and `from-labelme`."""
    outlines = argparse.ArgumentParser(add_help=False, parents=[workers])
    outlines.add_argument("--images", type=Path, required=True, metavar="DIR", help="images, in sub-folders or not")
    outlines.add_argument("--no-background", action="store_true",
                          help="pixels outside of all objects are unlabelled, not the class `background`")
    outlines.add_argument("--out", type=Path, default="data/own", metavar="DIR",
                          help="new data set (default: %(default)s)")

    p = commands.add_parser("from-coco", parents=[outlines], help="a data set of a COCO export: polygons, run lengths")
    p.set_defaults(command=from_coco)
    p.add_argument("--json", type=Path, metavar="PATH", dest="json_path",
                   help="COCO file, or a folder with one for each of train, val and test (default: the images' folder)")

    p = commands.add_parser("from-labelme", parents=[outlines],
                            help="a data set of labelme's .json files, which lie beside or among the images")
    p.set_defaults(command=from_labelme)
    p.add_argument("--classes", metavar="LIST", help="as for from-folders (default: the labels in use, by name)")


def main(arguments: Sequence[str] | None = None) -> None:
    """`python data.py ...`; exits with status 2 and one line on a fault of the data."""
    options = vars(build_parser().parse_args(arguments))
    if status := common.run(partial(options.pop("command"), **options)):
        sys.exit(status)
