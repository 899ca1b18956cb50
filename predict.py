"""Your own pictures and videos in; label images and overlays with a legend out.

    python predict.py photo.jpg                        the newest run's best checkpoint; results in predictions/
    python predict.py holiday/ --checkpoint best.pt --out coloured --ms
    python predict.py photo.jpg --explain              the queries behind the answer, and where one attention looks
    python predict.py frames/ --video 25               the overlays of frames as one video too

Reading order: Predictor -> write_results, write_video -> find_pictures, keep_apart -> predict_pictures -> main.

Shapes: K classes; H, W size of the picture; labels are uint8 (H, W), class indices.
A picture of any size is seen at the scale of the test, its own size only in strips: 8000 x 6000 pixels with 59 classes
take 1.8 GB above the model, 66000 x 600 or 14000 x 13000 with 12 classes 2.2 and 2.9 GB (single-scale, measured on a
CPU); --probabilities takes 4 K H W bytes more.
"""

import argparse
import contextlib
import glob
import os
import re
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import common
import evaluate
import weights
from common import UserError
from fast import inference
from pictures import EXTENSIONS, Picture, as_rgb, save_labels
from tools import draw, video
from tools.explain import explain
from weights import names_and_colors

RESULT = re.compile(r"(.+)_(labels|overlay|confidence|explain)$")  # the names of our own results
JPEG_SIDE = 65_500  # pixels at most
BYTES_A_PIXEL = 24  # of a picture, its labels, overlay and sheet, at most


class Predictor:
    """A trained model that takes pictures: `Predictor("best.pt")(picture) -> labels`.

    Args:
        checkpoint: our own or a released one. UserError if the file is no checkpoint of a segmenter.
        device: "cpu", "cuda", "mps"; None takes CUDA if there is one.
        multi_scale: average over six scales and their mirror images: slower, a little better.
        window_batch: windows that go through the model at once; None chooses by free memory.
        amp: run the model in this type (torch.bfloat16) where that is safe.
        fast: run the fast text of the model; the numbers are the same to rounding.

    `classes` are the K class names, `palette` uint8 (K, 3) is their colours.
    """

    def __init__(self, checkpoint: str | Path, device: str | None = None, multi_scale: bool = False,
                 window_batch: int | None = None, amp: torch.dtype | None = None, fast: bool = True):
        self.device = common.choose_device(device)
        model, facts = weights.load_model(checkpoint)
        self.model = model.to(self.device).eval()
        self.classes, self.palette = names_and_colors(facts, model.config.num_classes)
        self.multi_scale, self.fast = multi_scale, fast
        self.autocast = torch.autocast(self.device.type, amp, enabled=amp is not None)
        self.window_batch = window_batch or evaluate.automatic_window_batch(self.model, self.device)

    def __call__(self, picture: Picture | list[Picture]) -> np.ndarray | list[np.ndarray]:
        """Class index of every pixel, uint8 (H, W); of a list of pictures the list of theirs.

        A picture is a file, the bytes of one, a Pillow image, an array or a tensor, see `pictures.as_rgb`.
        """
        many = picture if isinstance(picture, list) else [picture]
        with inference(self.model, self.fast):
            results = [labels for labels, _ in self.stream(map(as_rgb, many))]
        return results if isinstance(picture, list) else results[0]

    def stream(self, images: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Labels, and the probability of each pixel's label in 1/255, both uint8 (H, W), of images uint8 (H, W, 3)."""
        strips = evaluate.votes(self.model, images, self.multi_scale, self.device, self.window_batch)
        while True:
            with self.autocast:  # not over a yield: it would hold for what the caller does there
                of_image = next(strips, None)
                if of_image is None:
                    return
                best = [(b.indices.to(torch.uint8), b.values.mul(255).round().to(torch.uint8))
                        for b in (strip.max(0) for strip in of_image)]
            labels, confidence = (torch.cat(parts).cpu().numpy() for parts in zip(*best, strict=True))
            yield labels, confidence

    def probabilities(self, picture: Picture) -> np.ndarray:
        """float32 (K, H, W), the probability of each class at each pixel; they sum to 1 over the classes."""
        image = as_rgb(picture)
        views = evaluate.make_views(image, self.model.config.window, self.multi_scale, self.device)
        with inference(self.model, self.fast), self.autocast:
            return evaluate.predict(self.model, views, image.shape[:2], self.window_batch).cpu().numpy()


def write_results(predictor: Predictor, picture: Path, stem: Path, options: argparse.Namespace) -> np.ndarray:
    """Write `stem`_labels.png and _overlay.jpg, on request also _confidence.png, _probabilities.npz (float16) and
    _explain.png. Returns the overlay without its legend."""
    image = as_rgb(picture)
    ((labels, confidence),) = predictor.stream([image])
    save_labels(labels, Path(f"{stem}_labels.png"), predictor.palette)  # the work first: a PNG has no largest size
    if options.confidence:
        save_labels(confidence, Path(f"{stem}_confidence.png"))
    # A prediction ignores no pixel: -1 is no label.
    overlay = draw.overlay(image, labels, predictor.palette, options.opacity, ignore_index=-1)
    sheet = draw.with_legend(overlay, labels, predictor.classes, predictor.palette, ignore_index=-1)
    kind, suffix = ("JPEG", "jpg") if max(sheet.size) <= JPEG_SIDE else ("PNG", "png")
    common.write_whole(Path(f"{stem}_overlay.{suffix}"), lambda file: sheet.save(file, kind, quality=92))
    if options.probabilities:
        arrays = {"probabilities": np.float16(predictor.probabilities(image)), "classes": predictor.classes}
        common.write_whole(Path(f"{stem}_probabilities.npz"), lambda file: np.savez_compressed(file, **arrays))
    if options.explain:
        explanation = explain(predictor.model, image, predictor.classes, predictor.palette)
        common.write_whole(Path(f"{stem}_explain.png"), lambda file: explanation.save(file, "PNG"))
    return overlay


def write_video(predictor: Predictor, path: Path, stem: Path, options: argparse.Namespace) -> None:
    """Write `stem`_overlay.mp4 and the labels of its frames, `stem`_labels/000001.png ..., in constant memory."""
    waiting: deque[np.ndarray] = deque()  # frames whose labels are not known yet: some that share a batch

    def read(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frame in frames:
            waiting.append(frame)
            yield frame

    with video.open_video(path) as source, video.VideoWriter(Path(f"{stem}_overlay.mp4"), source.rate) as writer:
        results = tqdm(predictor.stream(read(source.frames)), path.name, source.length, unit="frame", disable=None)
        for number, (labels, _) in enumerate(results, 1):
            save_labels(labels, Path(f"{stem}_labels/{number:06}.png"), predictor.palette)
            writer.write(draw.overlay(waiting.popleft(), labels, predictor.palette, options.opacity, ignore_index=-1))


def find_pictures(arguments: Sequence[str], out: Path) -> dict[Path, Path]:
    """The pictures and videos that files, folders (with all below them) and quoted globs stand for, and the place of
    each one's results below `out`: its path below the folder, without extension.

    Results of an earlier run are left out. Where two would have one place, they get their whole paths.
    """
    found: dict[Path, Path] = {}
    for argument in arguments:
        folder = Path(argument)
        if folder.is_dir():
            inside = out.resolve() != folder.resolve() and out.resolve().is_relative_to(folder.resolve())
            files = {file: file.relative_to(folder).with_suffix("") for file in sorted(folder.rglob("*"))
                     if not any(part.startswith((".", "__MACOSX")) for part in file.relative_to(folder).parts)
                     and not (inside and file.resolve().is_relative_to(out.resolve()))}
        else:
            names = [argument] if folder.is_file() else sorted(glob.glob(argument, recursive=True))
            files = {Path(name): Path(Path(name).stem) for name in names}
        files = {file: place for file, place in files.items() if file.suffix.lower() in EXTENSIONS + video.EXTENSIONS
                 or str(file) == argument}
        sources = {file.with_suffix("") for file in files}
        results = [file for file in files if str(file) != argument and (made := RESULT.match(file.stem))
                   and {file.with_name(made[1]), file.parent / Path(made[1]).stem} & sources]
        if results:
            print(f"left out: {len(results)} results of an earlier run ({results[0]} ...)")
        files = {file: place for file, place in files.items() if file not in results}
        if not files:
            raise UserError(f"no picture at {argument}: name a file, a folder of pictures or a glob in quotes")
        found |= {file: place for file, place in files.items() if file not in found}
    return keep_apart(found, out)


def keep_apart(found: dict[Path, Path], out: Path) -> dict[Path, Path]:
    """The same files with places that differ, in lower case too. UserError if a result would replace a picture."""
    def key(place: Path) -> str:
        return place.as_posix().casefold()

    whole = {file: Path(*(part for part in file.parts if part not in ("/", "..", "."))) for file in found}
    bare = {file: path.with_suffix("") for file, path in whole.items()}
    ways = [(names, Counter(map(key, names.values()))) for names in (found, bare, whole)]
    places, taken = {}, set()
    for file in found:  # the shortest of the names that no other picture has
        place = next((names[file] for names, number in ways if number[key(names[file])] == 1), whole[file])
        while key(place) in taken:
            place = place.with_name(f"{place.name}-2")
        taken.add(key(place))
        places[file] = out / place
    inputs = {file.resolve() for file in found}
    for place in places.values():
        for ending in ("labels.png", "overlay.jpg", "overlay.png", "confidence.png", "explain.png", "overlay.mp4"):
            if (target := Path(f"{place}_{ending}").resolve()) in inputs:
                raise UserError(f"{target} would be written over, and is one of the pictures: choose another --out")
    return places


def predict_pictures(options: argparse.Namespace) -> int:
    """Predict all pictures and name those that could not be read; returns 1 if there are such, 2 if no other."""
    found = find_pictures(options.pictures, options.out)
    checkpoint = options.checkpoint or evaluate.newest_checkpoint()
    common.allow_tf32(options.tf32)
    predictor = Predictor(checkpoint, options.device, options.ms, options.window_batch, options.amp, options.fast)
    if options.explain and predictor.model.config.head != "mask2former":
        raise UserError("--explain shows the queries of Mask2Former, and this checkpoint has a UperNet head")
    common.make_folder(options.out, "--out")
    Image.MAX_IMAGE_PIXELS = physical_memory() // (2 * BYTES_A_PIXEL)  # Pillow refuses twice that, and warns above it
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    failures = []  # why some pictures could not be read
    bar = tqdm(found.items(), unit="picture", disable=None if len(found) > 1 else True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(inference(predictor.model, options.fast))  # once for all pictures
        film = options.video and stack.enter_context(video.VideoWriter(options.out / "overlay.mp4", options.video))
        for file, stem in bar:
            try:
                stem.parent.mkdir(parents=True, exist_ok=True)
                if file.suffix.lower() in video.EXTENSIONS:
                    write_video(predictor, file, stem, options)
                    continue
                overlay = write_results(predictor, file, stem, options)
                if film:
                    film.write(overlay)
            except (ValueError, OSError) as error:
                failures.append(str(error))
    done = len(found) - len(failures)
    if done:
        print(f"{done} of {len(found)} pictures: overlays and labels in {options.out}/")
    for failure in failures:
        common.complain(failure)
    return 0 if not failures else 1 if done else 2


def physical_memory() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all well; 1: some pictures could not be read, named at the end; 2: nothing could be done."""
    parser = common.Parser(description="Segment pictures and videos: labels as PNG, and an overlay with a legend.")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="a file, a folder with all below it, or a "
                        "quoted glob; videos too (pip install av)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: the newest runs/*/best.pt")
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help="default: predictions/")
    parser.add_argument("--ms", action="store_true", help="multi-scale and flip: slower, a little better")
    parser.add_argument("--opacity", type=common.fraction, default=0.6, metavar="X", help="of colours; default: 0.6")
    parser.add_argument("--confidence", action="store_true",
                        help="write NAME_confidence.png too: gray, 255 where the model is sure of its label")
    parser.add_argument("--probabilities", action="store_true", help="write NAME_probabilities.npz too: (K, H, W)")
    parser.add_argument("--explain", action="store_true", help="write NAME_explain.png too: queries and attention")
    parser.add_argument("--video", type=common.positive, metavar="FPS",
                        help="write the overlays, in the order of the pictures, as OUT/overlay.mp4 too")
    evaluate.add_device_options(parser)
    options = parser.parse_args(arguments)
    return common.run(lambda: predict_pictures(options))


if __name__ == "__main__":
    sys.exit(main())
