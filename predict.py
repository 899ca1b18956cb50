"""Your own pictures in; overlays with a legend and label images out.

    python predict.py photo.jpg                        the newest run's best checkpoint; results in predictions/
    python predict.py holiday/ --checkpoint best.pt --out coloured --ms
    python predict.py photo.jpg --explain              the queries behind the answer, and where one attention looks

Reading order: Predictor -> write_results -> find_pictures -> predict_pictures -> main.

Shapes: K classes; H, W size of the picture; labels are uint8 (H, W), class indices.
A picture of any size is seen at the scale of the test, its own size only in strips: 8000 x 6000 pixels with 59 classes
take 1.8 GB above the model (single-scale, measured on a CPU); --probabilities takes 4 K H W bytes more.
"""

import argparse
import glob
import sys
from collections import Counter
from collections.abc import Sequence
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
from pictures import EXTENSIONS, read_image, save_labels
from tools import draw
from tools.explain import explain
from weights import names_and_colors

Picture = str | Path | Image.Image | np.ndarray  # a file, a Pillow image, or RGB uint8 (H, W, 3)


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

    def __call__(self, picture: Picture) -> np.ndarray:
        """Class index of every pixel, uint8 (H, W)."""
        with inference(self.model, self.fast), self.autocast:
            (labels,) = evaluate.predictions(self.model, [as_array(picture)], multi_scale=self.multi_scale,
                                             device=self.device, window_batch=self.window_batch)
        return labels.cpu().numpy()

    def probabilities(self, picture: Picture) -> np.ndarray:
        """float32 (K, H, W), the probability of each class at each pixel; they sum to 1 over the classes."""
        image = as_array(picture)
        views = evaluate.make_views(image, self.model.config.window, self.multi_scale, self.device)
        with inference(self.model, self.fast), self.autocast:
            return evaluate.predict(self.model, views, image.shape[:2], self.window_batch).cpu().numpy()


def as_array(picture: Picture) -> np.ndarray:
    """RGB uint8 (H, W, 3). Files are turned upright by their EXIF tag; gray, alpha, CMYK and 16 bits are converted."""
    if isinstance(picture, str | Path):
        return read_image(Path(picture))
    return np.array(picture.convert("RGB")) if isinstance(picture, Image.Image) else picture


def write_results(predictor: Predictor, picture: Path, stem: Path, options: argparse.Namespace) -> None:
    """Write `stem`_overlay.jpg and _labels.png, on request also _probabilities.npz (float16) and _explain.png."""
    image = read_image(picture)
    if options.probabilities:
        volume = predictor.probabilities(image)
        labels = volume.argmax(0).astype(np.uint8)
        arrays = {"probabilities": np.float16(volume), "classes": predictor.classes}
        common.write_whole(Path(f"{stem}_probabilities.npz"), lambda file: np.savez_compressed(file, **arrays))
    else:
        labels = predictor(image)
    # A prediction ignores no pixel: -1 is no label.
    overlay = draw.overlay(image, labels, predictor.palette, options.opacity, ignore_index=-1)
    sheet = draw.with_legend(overlay, labels, predictor.classes, predictor.palette, ignore_index=-1)
    common.write_whole(Path(f"{stem}_overlay.jpg"), lambda file: sheet.save(file, "JPEG", quality=92))
    save_labels(labels, Path(f"{stem}_labels.png"), predictor.palette)
    if options.explain:
        explanation = explain(predictor.model, image, predictor.classes, predictor.palette)
        common.write_whole(Path(f"{stem}_explain.png"), lambda file: explanation.save(file, "PNG"))


def find_pictures(arguments: Sequence[str]) -> list[Path]:
    """The pictures that files, folders (all pictures in them, by name) and quoted globs stand for, each once."""
    pictures: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = [file for file in sorted(path.iterdir()) if file.suffix.lower() in EXTENSIONS]
        else:
            found = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(argument, recursive=True))]
        if not found:
            raise UserError(f"no picture at {argument}: name a file, a folder of pictures or a glob in quotes")
        pictures += found
    return list(dict.fromkeys(pictures))


def stems(pictures: Sequence[Path], out: Path) -> list[Path]:
    """Where each picture's results go: out/NAME, or its whole path spelled out if another has this name."""
    number = Counter(picture.stem for picture in pictures)
    longer = ("_".join(part for part in path.parts if part not in ("/", "..")) for path in pictures)
    return [out / (path.stem if number[path.stem] == 1 else name) for path, name in zip(pictures, longer, strict=True)]


def predict_pictures(options: argparse.Namespace) -> int:
    """Predict all pictures and name those that could not be read; returns 1 if there are such, 2 if no other."""
    pictures = find_pictures(options.pictures)
    checkpoint = options.checkpoint or evaluate.newest_checkpoint()
    common.allow_tf32(options.tf32)
    predictor = Predictor(checkpoint, options.device, options.ms, options.window_batch, options.amp, options.fast)
    if options.explain and predictor.model.config.head != "mask2former":
        raise UserError("--explain shows the queries of Mask2Former, and this checkpoint has a UperNet head")
    common.make_folder(options.out, "--out")
    failures = []  # why some pictures could not be read
    bar = tqdm(pictures, unit="picture", disable=None if len(pictures) > 1 else True)
    with inference(predictor.model, options.fast):  # once for all pictures
        for picture, stem in zip(bar, stems(pictures, options.out), strict=True):
            try:
                write_results(predictor, picture, stem, options)
            except (ValueError, OSError) as error:
                failures.append(str(error))
    done = len(pictures) - len(failures)
    if done:
        print(f"{done} of {len(pictures)} pictures: overlays and labels in {options.out}/")
    for failure in failures:
        common.complain(failure)
    return 0 if not failures else 1 if done else 2


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all well; 1: some pictures could not be read, named at the end; 2: nothing could be done."""
    parser = common.Parser(description="Segment pictures: an overlay with a legend and a label PNG for each.")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="a file, a folder or a quoted glob")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: the newest runs/*/best.pt")
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help="default: predictions/")
    parser.add_argument("--ms", action="store_true", help="multi-scale and flip: slower, a little better")
    parser.add_argument("--opacity", type=common.fraction, default=0.6, metavar="X", help="of colours; default: 0.6")
    parser.add_argument("--probabilities", action="store_true", help="write NAME_probabilities.npz too: (K, H, W)")
    parser.add_argument("--explain", action="store_true", help="write NAME_explain.png too: queries and attention")
    evaluate.add_device_options(parser)
    options = parser.parse_args(arguments)
    return common.run(lambda: predict_pictures(options))


if __name__ == "__main__":
    sys.exit(main())
