"""What Mask2Former's queries and their sum answer, and where one attention looks: `predict.py --explain`.

Reading order: explain -> query_sheet -> sampling_picture -> central_window.

Shapes: K classes, Q queries, w side of the window; of an attention M heads, L levels, P points of a level. Pictures and
images are uint8 (H, W, 3) RGB.
"""

from collections.abc import Sequence
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import data
from adapter import resize
from heads import semantic_scores
from model import PATCH, Segmenter
from msda_cuda import MSDeformAttn, ms_deform_attn
from tools import draw

CELL, ANSWER, CAPTION = 320, 640, 24  # sides of a query's picture and of the others; height of text, in pixels
LEVEL_COLORS = np.uint8([[255, 196, 0], [0, 190, 255], [255, 70, 150]])  # strides 8, 16, 32


@torch.no_grad()
def explain(model: Segmenter, image: np.ndarray, classes: Sequence[str], palette: np.ndarray,
            number: int = 12) -> Image.Image:
    """A sheet for the central window of a picture: queries, and beside them their sum and the samples.

    The `number` queries have the highest score: the probability of their class times the mean probability inside their
    mask. The dots are the places that four patches sample from the convolutional pyramid in the last injector, larger
    the more weight they have; the patches are those where the first four queries are surest, and carry their numbers.
    """
    window, device = model.config.window, next(model.parameters()).device
    pixels = torch.from_numpy(central_window(image, window)).permute(2, 0, 1)[None]  # (w, w, 3) -> (1, 3, w, w)
    calls = []

    def record(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
        calls.append((locations[0].cpu().numpy(), weights[0].cpu().numpy()))
        return ms_deform_attn(value, shapes, locations, weights)

    with patch(f"{MSDeformAttn.__module__}.ms_deform_attn", record):
        prediction = model.head(model.features(data.normalize(pixels.to(device))))
    class_logits, mask_embeds, mask_features = prediction
    patches = (window // PATCH) ** 2  # only injectors ask for patches
    points, weights = next(call for call in reversed(calls) if len(call[0]) == patches)
    mask_logits = torch.einsum("bqc,bchw->bqhw", mask_embeds[-1], mask_features)  # of the last decoder layer
    masks = resize(mask_logits, (CELL, CELL))[0].sigmoid()  # (Q, CELL, CELL)
    chance, category = class_logits[-1, 0].softmax(-1)[:, :-1].max(-1)  # the last class is "no object"
    inside = masks > 0.5
    score = chance * (masks * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    best = score.argsort(descending=True)[:number].tolist()
    captions = [f"{classes[category[q]]} {score[q]:.2f} (query {q})" for q in best]
    queries = query_sheet(central_window(image, CELL), masks[best].cpu().numpy(), captions)
    view = central_window(image, ANSWER)
    labels = resize(semantic_scores(prediction), view.shape[:2])[0].argmax(0).to(torch.uint8).cpu().numpy()
    answer = draw.with_legend(draw.overlay(view, labels, palette, ignore_index=-1), labels, classes, palette, -1)
    surest = masks[best[:4]].flatten(1).argmax(1).cpu().numpy()  # a pixel's number: row * CELL + column
    places = np.stack([surest % CELL, surest // CELL], 1) / CELL
    samples = sampling_picture(view, places, best[:4], points, weights)
    queries = draw.with_caption(queries, f"The {len(best)} best of {len(chance)} queries: class, score, mask", CAPTION)
    others = draw.stack([
        draw.with_caption(answer, "The answer of all queries together", CAPTION),
        draw.with_caption(samples, "Where the patches of four queries (+) sample; larger: more", CAPTION)])
    sheet = Image.new("RGB", (queries.width + others.width, max(queries.height, others.height)), draw.PAPER)
    sheet.paste(queries)
    sheet.paste(others, (queries.width, 0))
    return sheet


def query_sheet(picture: np.ndarray, masks: np.ndarray, captions: Sequence[str]) -> Image.Image:
    """The picture once for each query, dim and gray where its mask (of the same size) says no, with a caption."""
    dim = 0.35 * picture.mean(-1, keepdims=True)
    cells = []
    for mask, caption in zip(masks, captions, strict=True):
        lit = (dim + (picture - dim) * mask[..., None]).astype(np.uint8)
        lit[draw.boundaries(mask > 0.5)] = 255
        cells.append(draw.with_caption(lit, caption, CAPTION))
    return draw.contact_sheet([cells[i : i + 3] for i in range(0, len(cells), 3)])


def sampling_picture(image: np.ndarray, places: np.ndarray, numbers: Sequence[int], points: np.ndarray,
                     weights: np.ndarray) -> Image.Image:
    """The square picture with a numbered cross for the patch at each place, and the points that the patch samples.

    The points (Q, M, L, P, 2) and their weights (Q, M, L, P) are those of a square grid of Q patches; places and points
    are (x, y) in 0 ... 1.
    """
    side, grid = len(image), round(len(points) ** 0.5)
    picture = draw.to_image((image * 0.6).astype(np.uint8))
    pen = ImageDraw.Draw(picture, "RGBA")
    patches: dict[tuple[int, int], list[str]] = {}  # several queries may be surest in one patch
    for (column, row), number in zip((places * grid).astype(int).tolist(), numbers, strict=True):
        patches.setdefault((column, row), []).append(str(number))
    for column, row in patches:
        x, y = (column + 0.5) / grid * side, (row + 0.5) / grid * side
        for (head, level, point), share in np.ndenumerate(weights[row * grid + column]):
            a, b = points[row * grid + column, head, level, point] * side
            radius = 1.5 + 14 * share**0.5  # an area in proportion to the weight, and never invisible
            pen.line((x, y, a, b), (255, 255, 255, 90), 1)
            pen.ellipse((a - radius, b - radius, a + radius, b + radius), tuple(LEVEL_COLORS[level]), (20, 20, 20))
    for (column, row), names in patches.items():  # above all dots
        x, y = (column + 0.5) / grid * side, (row + 0.5) / grid * side
        font, anchor = ImageFont.load_default(CAPTION), "lm" if x < 0.8 * side else "rm"
        pen.text((x, y), "+", "white", ImageFont.load_default(2 * CAPTION), "mm", stroke_width=2, stroke_fill="black")
        pen.text((x + (18 if anchor == "lm" else -18), y), ", ".join(names), "white", font, anchor, stroke_width=3,
                 stroke_fill="black")
    key = draw.legend(["samples at stride 8", "at stride 16", "at stride 32"], LEVEL_COLORS, side)
    return draw.stack([picture, key])


def central_window(image: np.ndarray, window: int) -> np.ndarray:
    """The middle of the picture, (w, w, 3), when its short side is scaled to the window."""
    scale = window / min(image.shape[:2])
    height, width = (max(window, round(side * scale)) for side in image.shape[:2])
    top, left = (height - window) // 2, (width - window) // 2
    return data.resize(image, (height, width))[top : top + window, left : left + window]
