"""Your own pictures and videos in; label images and overlays with a legend out.

    python predict.py photo.jpg                        the newest run's best checkpoint; results in predictions/
    python predict.py holiday/ --checkpoint best.pt --out coloured --ms
    python predict.py photo.jpg --explain              the queries behind the answer, and where one attention looks
    python predict.py frames/ --video 25               the overlays of frames as one video too

Reading order: Predictor -> cut -> write_results, write_video -> predict_pictures -> main.

Shapes: K classes; H, W size of the picture; labels are uint8 (H, W), class indices.
A picture of any size is seen at the scale of the test, its own size only in strips, a very long one in pieces. With 59
classes 8000 x 6000 pixels take 2.0 GB above the model, 14000 x 13000 2.6 GB, 66000 x 600 3.1 GB (single-scale, measured
on a CPU, with an overlay); --probabilities takes 4 K H W bytes more.
"""

import argparse
import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import common
import evaluate
import weights
from common import UserError
from fast import inference
from pictures import Picture, as_rgb, picture_size, save_labels
from tools import draw, video
from tools.checkpoints import add_checkpoint_options, find_checkpoint
from tools.explain import explain
from tools.inputs import MARK, NOTE, find_pictures, is_result, place_results, save_picture
from weights import names_and_colors

JPEG_SIDE = 65_500  # pixels at most
BYTES_A_PIXEL = 24  # of a picture, its labels, overlay and sheet, at most


class Predictor:
    """A trained model that takes pictures: `Predictor("best.pt")(picture) -> labels`.

    Args:
        checkpoint: a file, our own or a released one, or the name of a released one: "mask2former-base", which a
            terminal is asked whether to fetch. UserError if it is not here, or no checkpoint of a segmenter.
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
        model, facts = weights.load_model(find_checkpoint(checkpoint))
        self.model = model.to(self.device).eval()
        self.classes, self.palette = names_and_colors(facts, model.config.num_classes)
        self.multi_scale, self.fast = multi_scale, fast
        self.model.forward = torch.autocast(self.device.type, amp, enabled=amp is not None)(model.forward)
        with inference(self.model, fast):
            self.window_batch = window_batch or evaluate.automatic_window_batch(self.model, self.device)

    def __call__(self, picture: Picture | list[Picture]) -> np.ndarray | list[np.ndarray]:
        """Class index of every pixel, uint8 (H, W); of a list of pictures the list of theirs.

        A picture is a file, the bytes of one, a Pillow image, an array or a tensor, see `pictures.as_rgb`.
        """
        many = picture if isinstance(picture, list) else [picture]
        with inference(self.model, self.fast):
            results = [labels for labels, _ in self.stream(map(as_rgb, many))]
        return results if isinstance(picture, list) else results[0]

    def probabilities(self, picture: Picture) -> np.ndarray:
        """float32 (K, H, W), the probability of each class at each pixel; they sum to 1 over the classes."""
        with inference(self.model, self.fast):
            ((volume,),) = self.stream([as_rgb(picture)], lambda strip: [strip])
        return volume

    def best_class(self, strip: Tensor) -> list[Tensor]:
        """Labels and confidence, both uint8 (rows, W), of probabilities (K, rows, W).

        Confidence is the label's probability in 1/255. With Mask2Former it is the label's score above the least score,
        for its scores, 0 ... 1, are soft-maxed though they are probabilities: the sure one of 59 comes out as 0.045.
        """
        best, labels = strip.max(0)
        if self.model.config.head == "mask2former":
            best = (best / strip.amin(0)).log()  # differences of scores are logarithms of ratios
        return [labels.to(torch.uint8), best.clamp(max=1).mul(255).round().to(torch.uint8)]

    def stream(self, images: Iterable[np.ndarray],
               of_strip: Callable[[Tensor], list[Tensor]] | None = None) -> Iterator[list[np.ndarray]]:
        """For each image (H, W, 3) the arrays (..., H, W) that `of_strip` makes of its probabilities (K, rows, W).

        The default is `best_class`. Consecutive images share batches of windows.
        """
        of_strip = of_strip or self.best_class
        layouts: deque[tuple] = deque()  # of the images that are on their way: axis, and (cut, kept) of each piece

        def pieces() -> Iterator[np.ndarray]:
            for image in images:
                axis = int(image.shape[1] > image.shape[0])
                layouts.append((axis - 2, cut(image.shape[axis], image.shape[1 - axis])))
                yield from (image[:, piece] if axis else image[piece] for piece, _ in layouts[-1][1])

        parts: list[list[Tensor]] = []  # of one image
        for strips in evaluate.votes(self.model, pieces(), self.multi_scale, self.device, self.window_batch):
            axis, spans = layouts[0]
            _, (start, length) = spans[len(parts)]
            arrays = zip(*([array.cpu() for array in of_strip(strip)] for strip in strips), strict=True)
            parts.append([torch.cat(array, -2).narrow(axis, start, length) for array in arrays])
            if len(parts) == len(spans):
                yield [torch.cat(array, axis).numpy() for array in zip(*parts, strict=True)]
                layouts.popleft()
                parts = []


def cut(length: int, width: int) -> list[tuple[slice, tuple[int, int]]]:
    """Pieces of a picture's long side, each with the start and length, in the piece, of what is kept of its result.

    At the scale of the test, the memory that a picture takes is as its length over its width: from 18 on it is cut.
    The unit of two widths is three strides of the window: a piece's windows lie where the whole picture's would.
    """
    count, unit = max(1, length // (9 * width)), 2 * width  # a shorter piece would be seen at another scale
    spans = []
    for start, end in pairwise([*(length * i // count // unit * unit for i in range(count)), length]):
        first = max(0, start - unit)
        spans.append((slice(first, end + unit), (start - first, end - start)))
    return spans


def write_results(predictor: Predictor, picture: Path, stem: Path, options: argparse.Namespace) -> np.ndarray:
    """Write `stem`_labels.png and _overlay.jpg, on request also _confidence.png, _probabilities.npz (float16) and
    _explain.png. Returns the overlay without its legend."""
    check_memory(picture, BYTES_A_PIXEL + 4 * len(predictor.classes) * options.probabilities)
    image = as_rgb(picture)
    more = (lambda strip: [*predictor.best_class(strip), strip.half()]) if options.probabilities else None
    ((labels, confidence, *volume),) = predictor.stream([image], more)
    save_labels(labels, Path(f"{stem}_labels.png"), predictor.palette, NOTE)  # the work first: a PNG may have any size
    if options.confidence:
        save_labels(confidence, Path(f"{stem}_confidence.png"), info=NOTE)
    # A prediction ignores no pixel: -1 is no label.
    overlay = draw.overlay(image, labels, predictor.palette, options.opacity, ignore_index=-1)
    sheet = draw.with_legend(overlay, labels, predictor.classes, predictor.palette, ignore_index=-1)
    suffix = "jpg" if max(sheet.size) <= JPEG_SIDE else "png"
    if suffix == "png":
        tqdm.write(common.printable(f"{stem}_overlay.png is no JPEG: a side of one has at most {JPEG_SIDE} pixels"))
    save_picture(sheet, Path(f"{stem}_overlay.{suffix}"))
    if volume:
        arrays = {"probabilities": volume[0], "classes": predictor.classes}
        common.write_whole(Path(f"{stem}_probabilities.npz"), lambda file: np.savez_compressed(file, **arrays))
    if options.explain:
        save_picture(explain(predictor.model, image, predictor.classes, predictor.palette), Path(f"{stem}_explain.png"))
    return overlay


def check_memory(path: Path, bytes_a_pixel: int) -> None:
    """Raises UserError for a picture that this machine's memory cannot hold with its results."""
    height, width = picture_size(path)
    needed, memory = height * width * bytes_a_pixel, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(f"{path}: {width}x{height} pixels take {needed / 1e9:.1f} GB of memory, and this machine has "
                        f"{memory / 1e9:.1f} GB: cut it into smaller pictures")


def write_video(predictor: Predictor, path: Path, stem: Path, options: argparse.Namespace) -> None:
    """Write `stem`_overlay.mp4 and the labels of its frames, `stem`_labels/000001.png ..., in constant memory."""
    waiting: deque[np.ndarray] = deque()  # frames whose labels are not known yet: some that share a batch

    def read(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frame in frames:
            waiting.append(frame)
            yield frame

    with video.open_video(path) as source, video.write_video(Path(f"{stem}_overlay.mp4"), source.rate, MARK) as write:
        for kind in ("labels", "confidence"):
            for earlier in filter(is_result, Path(f"{stem}_{kind}").glob("[0-9]" * 6 + ".png")):
                earlier.unlink()  # the last frames of a longer video would pass for some of this one
        results = tqdm(predictor.stream(read(source.frames)), path.name, source.length, unit="frame", disable=None)
        for number, (labels, confidence) in enumerate(results, 1):
            save_labels(labels, Path(f"{stem}_labels/{number:06}.png"), predictor.palette, NOTE)
            if options.confidence:
                save_labels(confidence, Path(f"{stem}_confidence/{number:06}.png"), info=NOTE)
            write(draw.overlay(waiting.popleft(), labels, predictor.palette, options.opacity, ignore_index=-1))


def predict_pictures(options: argparse.Namespace) -> int:
    """Predict all pictures and name those that failed; returns 1 if there are such, 2 if no other."""
    Image.MAX_IMAGE_PIXELS = None  # check_memory refuses what is too large
    stems = place_results(find_pictures(options.pictures), options.out)
    checkpoint = find_checkpoint(options.checkpoint, options.yes)
    common.allow_tf32(options.tf32)
    predictor = Predictor(checkpoint, options.device, options.ms, options.window_batch, options.amp, options.fast)
    if options.explain and predictor.model.config.head != "mask2former":
        raise UserError("--explain shows the queries of Mask2Former, and this checkpoint has a UperNet head")
    common.make_folder(options.out, "--out")
    out, done, failures = options.out, 0, []
    bar = tqdm(stems.items(), unit="picture", disable=None if len(stems) > 1 else True)
    with contextlib.ExitStack() as stack:  # left at Ctrl-C too: what is written is whole, and the summary tells where
        stack.callback(lambda: done and print(f"{done} of {len(stems)} pictures: overlays and labels in {out}/"))
        stack.enter_context(inference(predictor.model, options.fast))  # once for all pictures
        rate = options.video and Fraction(options.video).limit_denominator(1001)  # 29.97 and the like
        film = rate and stack.enter_context(video.write_video(out / "overlay.mp4", rate, MARK))
        for file, stem in bar:
            try:
                stem.parent.mkdir(parents=True, exist_ok=True)
                write = write_video if file.suffix.lower() in video.EXTENSIONS else write_results
                overlay = write(predictor, file, stem, options)
                done += 1
                if film and overlay is not None:
                    film(overlay)
            except (ValueError, OSError, RuntimeError, MemoryError) as error:  # out of memory: one of the last two
                text = str(error) if isinstance(error, UserError) else common.reason(error)
                failures.append(text if common.printable(str(file)) in text else f"{file}: {text}")
    for failure in failures:
        common.complain(failure)
    return 0 if not failures else 1 if done else 2


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all well; 1: some pictures could not be read, named at the end; 2: nothing could be done."""
    parser = common.Parser(description="Segment pictures and videos: labels as PNG, and an overlay with a legend.")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="a file, a folder with all below it, or a "
                        "quoted glob; videos too (pip install av)")
    add_checkpoint_options(parser)
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help="default: predictions/")
    parser.add_argument("--ms", action="store_true", help="multi-scale and flip: slower, a little better")
    parser.add_argument("--opacity", type=common.fraction, default=0.6, metavar="X", help="of colours; default: 0.6")
    parser.add_argument("--confidence", action="store_true",
                        help="write NAME_confidence.png too: gray, 255 where the model is sure of its label")
    parser.add_argument("--probabilities", action="store_true", help="write NAME_probabilities.npz too: (K, H, W)")
    parser.add_argument("--explain", action="store_true", help="write NAME_explain.png too: queries and attention")
    parser.add_argument("--video", type=common.rate, metavar="FPS",
                        help="write the overlays, in the order of the pictures, as OUT/overlay.mp4 too")
    evaluate.add_device_options(parser)
    options = parser.parse_args(arguments)
    return common.run(lambda: predict_pictures(options))


if __name__ == "__main__":
    sys.exit(main())
