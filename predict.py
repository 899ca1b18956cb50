"""Your own pictures in; overlays with a legend and label images out.

    python predict.py photo.jpg                        the newest run's best checkpoint; results in predictions/
    python predict.py holiday/ --checkpoint best.pt --out coloured --ms
    python predict.py photo.jpg --explain              the queries behind the answer, and where one attention looks

As a library: `labels = Predictor("best.pt")("photo.jpg")`.

Read: Predictor -> write_results -> find_pictures -> main; explain (query_sheet, sampling_picture) last.

Shapes: K classes, Q queries, w side of the window, H, W size of the picture; labels are uint8 (H, W), class indices.
A picture of any size is seen at the scale of the test: memory holds its views' scores at that scale, and probabilities
at its own size in strips of at most 512 MiB. 8000 x 6000 pixels with 59 classes, single-scale, take 1.8 GB above the
model (measured on a CPU); --probabilities takes 4 K H W bytes more, and a picture far longer than wide takes scores
in proportion to its aspect.
"""

import argparse
import glob
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import common
import data
import evaluate
import msda_cuda
import weights
from common import UserError
from heads import resize
from model import PATCH
from tools import draw

CELL, CAPTION = 320, 24  # side of a picture in an explanation and height of its text, in pixels
LEVEL_COLORS = np.uint8([[255, 196, 0], [0, 190, 255], [255, 70, 150]])  # strides 8, 16, 32


class Predictor:
    """A trained model that takes pictures: `Predictor("best.pt")(picture) -> labels`.

    Args:
        checkpoint: our own or a released checkpoint.
        device: "cpu", "cuda", "mps"; None takes CUDA if there is one.
        multi_scale: average over six scales and their mirror images: slower, a little better.
        amp: run the model in this type (torch.bfloat16) where that is safe.
    Attributes:
        classes: the K class names; palette: uint8 (K, 3), their colours.
    Raises:
        UserError: the file is no checkpoint of a segmenter. UserError: there is no such device.
    """

    def __init__(self, checkpoint: str | Path, device: str | None = None, multi_scale: bool = False,
                 window_batch: int | None = None, amp: torch.dtype | None = None):
        self.device = common.choose_device(device)
        model, facts = weights.load_model(checkpoint)
        self.model = model.to(self.device).eval()
        self.classes, self.palette = names_and_colors(facts, model.config.num_classes)
        self.multi_scale, self.amp = multi_scale, amp
        self.window_batch = window_batch or evaluate.automatic_window_batch(self.model, self.device)

    def __call__(self, picture: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        """Class index of every pixel, uint8 (H, W), of a file, a Pillow image or a uint8 (H, W, 3) array."""
        with self.autocast():
            results = evaluate.predictions(self.model, [as_array(picture)], multi_scale=self.multi_scale,
                                           device=self.device, window_batch=self.window_batch)
            return next(results).cpu().numpy()

    def probabilities(self, picture: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        """float32 (K, H, W), the probability of each class at each pixel; they sum to 1 over the classes."""
        image = as_array(picture)
        with self.autocast():
            views = evaluate.make_views(image, self.model.config.window, self.multi_scale, self.device)
            return evaluate.predict(self.model, views, image.shape[:2], self.window_batch).cpu().numpy()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)


def names_and_colors(facts: dict, num_classes: int) -> tuple[list[str], np.ndarray]:
    """Class names and palette of a checkpoint; a released one tells neither and is for Pascal Context's 59 classes."""
    if facts.get("classes"):
        return list(facts["classes"]), np.uint8(facts["palette"])
    info = data.context_info()
    if len(info.classes) == num_classes:
        return list(info.classes), info.palette
    return [f"class {k}" for k in range(num_classes)], data.default_palette(num_classes)


def as_array(picture: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """RGB uint8 (H, W, 3). Files are turned upright by their EXIF tag; gray, alpha, CMYK and 16 bits are converted."""
    if isinstance(picture, str | Path):
        return data.read_image(Path(picture))
    return np.array(picture.convert("RGB")) if isinstance(picture, Image.Image) else picture


def write_results(predictor: Predictor, picture: Path, stem: Path, opacity: float, probabilities: bool) -> None:
    """Write `stem`_overlay.jpg and `stem`_labels.png, on request `stem`_probabilities.npz (float16)."""
    image = data.read_image(picture)
    if probabilities:
        volume = predictor.probabilities(image)
        labels = volume.argmax(0).astype(np.uint8)
        arrays = {"probabilities": np.float16(volume), "classes": predictor.classes}
        common.write_whole(Path(f"{stem}_probabilities.npz"), lambda file: np.savez_compressed(file, **arrays))
    else:
        labels = predictor(image)
    overlay = draw.overlay(image, labels, predictor.palette, opacity, ignore_index=-1)  # a prediction ignores nothing
    picture = draw.with_legend(overlay, labels, predictor.classes, predictor.palette, -1)
    common.write_whole(Path(f"{stem}_overlay.jpg"), lambda file: picture.save(file, "JPEG", quality=92))
    data.save_labels(labels, Path(f"{stem}_labels.png"), predictor.palette)


def find_pictures(arguments: Sequence[str]) -> list[Path]:
    """The picture files that are meant by files, folders (all pictures in them, by name) and quoted globs."""
    pictures: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = [file for file in sorted(path.iterdir()) if file.suffix.lower() in data.EXTENSIONS]
        else:
            found = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(argument, recursive=True))]
        if not found:
            raise UserError(f"no picture at {argument}: name a file, a folder of pictures or a glob in quotes")
        pictures += found
    return list(dict.fromkeys(pictures))


def stems(pictures: Sequence[Path], out: Path) -> list[Path]:
    """Where each picture's results go: out/NAME, or its whole path spelled out if another has this name."""
    names = [picture.stem for picture in pictures]
    return [
        out / (name if names.count(name) == 1 else "_".join(part for part in picture.parts if part not in ("/", "..")))
        for name, picture in zip(names, pictures, strict=True)
    ]


# --------------------------------------------------------------------------------- what the model does, in pictures


@torch.no_grad()
def explain(predictor: Predictor, image: np.ndarray, number: int = 12) -> Image.Image:
    """What Mask2Former answers for the central window of a picture, query by query, and where one attention looks.

    Above: the `number` queries with the highest score, which is the probability of their class times the mean
    probability inside their mask. Below: the last injector, seen from the patch where each of the first queries is
    surest: every dot is a place that it samples from the convolutional pyramid, larger the more weight it has.
    """
    model = predictor.model
    window = central_window(image, model.config.window)
    pixels = torch.from_numpy(window).permute(2, 0, 1)[None].to(predictor.device)  # (w, w, 3) -> (1, 3, w, w)
    calls = []

    def record(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, shares: Tensor) -> Tensor:
        calls.append((locations[0].cpu().numpy(), shares[0].cpu().numpy()))
        return msda_cuda.ms_deform_attn(value, shapes, locations, shares)

    with patch.object(msda_cuda.module, "ms_deform_attn", record):
        prediction = model.head(model.features(data.normalize(pixels)), every_layer=False)
    patches = (model.config.window // PATCH) ** 2
    points, weight = next(call for call in reversed(calls) if len(call[0]) == patches)  # only injectors ask for patches
    masks = resize(prediction.mask_logits[-1], (CELL, CELL))[0].sigmoid()  # of the last layer and the one image
    chance, category = prediction.class_logits[-1, 0].softmax(-1)[:, :-1].max(-1)  # the last class is "no object"
    inside = masks > 0.5
    score = chance * (masks * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    best = score.argsort(descending=True)[:number].tolist()
    captions = [f"{predictor.classes[category[q]]} {score[q]:.2f} (query {q})" for q in best]
    surest = torch.stack([masks[best[:4]].flatten(1).argmax(1) % CELL, masks[best[:4]].flatten(1).argmax(1) // CELL], 1)
    queries = query_sheet(central_window(image, CELL), masks[best].cpu().numpy(), captions)
    samples = sampling_picture(central_window(image, queries.width), surest.cpu().numpy() / CELL, points, weight)
    return draw.stack([
        draw.with_caption(queries, f"The {len(best)} best of {len(chance)} queries: class, score, mask"),
        draw.with_caption(samples, "Last injector: where four patches (+) sample; larger dots weigh more"),
    ])


def central_window(image: np.ndarray, window: int) -> np.ndarray:
    """The middle of the picture, (w, w, 3), when its short side is scaled to the window."""
    scale = window / min(image.shape[:2])
    height, width = (max(window, round(side * scale)) for side in image.shape[:2])
    top, left = (height - window) // 2, (width - window) // 2
    return data.resize(image, (height, width))[top : top + window, left : left + window]


def query_sheet(picture: np.ndarray, masks: np.ndarray, captions: Sequence[str], columns: int = 4) -> Image.Image:
    """The picture once for each query, dim and gray where its mask (same height and width) says no, with a caption."""
    dim = 0.35 * picture.mean(-1, keepdims=True)
    cells = []
    for mask, caption in zip(masks, captions, strict=True):
        lit = (dim + (picture - dim) * mask[..., None]).astype(np.uint8)
        lit[draw.boundaries(mask > 0.5)] = 255
        cells.append(draw.with_caption(lit, caption, CAPTION))
    return draw.contact_sheet([cells[i : i + columns] for i in range(0, len(cells), columns)])


def sampling_picture(image: np.ndarray, places: np.ndarray, points: np.ndarray, weight: np.ndarray) -> Image.Image:
    """The square picture with, for the patch at each place, a cross and the points that it samples.

    Args:
        places: (x, y) in 0 ... 1, one a row.
        points (Q, M, L, P, 2), weight (Q, M, L, P): where the M heads of each of a square grid of Q patches look, as
            (x, y) in 0 ... 1, and how much each of P points in L levels counts.
    """
    side, grid = len(image), round(len(points) ** 0.5)
    picture = draw.to_image((image * 0.6).astype(np.uint8))
    pen = ImageDraw.Draw(picture, "RGBA")
    for column, row in (places * grid).astype(int):
        x, y = (column + 0.5) / grid * side, (row + 0.5) / grid * side
        query = row * grid + column
        for (head, level, point), share in np.ndenumerate(weight[query]):
            a, b = points[query, head, level, point] * side
            radius = 1.5 + 14 * share**0.5  # an area in proportion to the weight, and never invisible
            pen.line((x, y, a, b), (255, 255, 255, 90), 1)
            pen.ellipse((a - radius, b - radius, a + radius, b + radius), tuple(LEVEL_COLORS[level]), (20, 20, 20))
        pen.line((x - 10, y, x + 10, y), (255, 255, 255), 4)
        pen.line((x, y - 10, x, y + 10), (255, 255, 255), 4)
    key = draw.legend(["samples at stride 8", "at stride 16", "at stride 32"], LEVEL_COLORS, side)
    return draw.stack([picture, key])


# ------------------------------------------------------------------------------------------------- command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = common.Parser(description="Segment pictures: an overlay with a legend and a label PNG for each.")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="a file, a folder or a quoted glob")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: the newest runs/*/best.pt")
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help="default: predictions/")
    parser.add_argument("--ms", action="store_true", help="multi-scale and flip: slower, a little better")
    parser.add_argument("--opacity", type=common.fraction, default=0.6, metavar="X", help="of colours; default: 0.6")
    parser.add_argument("--probabilities", action="store_true", help="write NAME_probabilities.npz too: (K, H, W)")
    parser.add_argument("--explain", action="store_true", help="write NAME_explain.png too: queries and attention")
    evaluate.add_device_options(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Predict all pictures; returns 1 if some could not be and are listed. Raises UserError where not one could."""
    pictures = find_pictures(options.pictures)
    checkpoint = options.checkpoint or evaluate.newest_checkpoint()
    common.allow_tf32(options.tf32)
    predictor = Predictor(checkpoint, options.device, options.ms, options.window_batch, options.amp)
    if options.explain and predictor.model.config.head != "mask2former":
        raise UserError("--explain shows the queries of Mask2Former, and this checkpoint has a UperNet head")
    common.make_folder(options.out, "--out")
    failures = []
    bar = tqdm(pictures, unit="picture", disable=None if len(pictures) > 1 else True)
    for picture, stem in zip(bar, stems(pictures, options.out), strict=True):
        try:
            write_results(predictor, picture, stem, options.opacity, options.probabilities)
            if options.explain:
                sheet = explain(predictor, data.read_image(picture))
                common.write_whole(Path(f"{stem}_explain.png"), partial(sheet.save, format="PNG"))
        except (ValueError, OSError) as error:
            failures.append(str(error))
    if len(failures) == len(pictures):
        others = f" (nor can {len(failures) - 1} others be read)" if len(failures) > 1 else ""
        raise UserError(failures[0] + others)
    print(f"{len(pictures) - len(failures)} of {len(pictures)} pictures: overlays and labels in {options.out}/")
    for failure in failures:
        common.complain(failure)
    return 1 if failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all well; 1: some pictures could not be read, listed at the end; 2: nothing could be done."""
    options = parse(arguments)
    return common.run(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
