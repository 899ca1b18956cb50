"""What Mask2Former answers for a picture, query by query, and where one attention looks: `predict.py --explain`.

Reading order: explain -> query_sheet -> sampling_picture -> central_window.

Shapes: K classes, Q queries, w side of the window; of an attention M heads, L levels, P points of a level. Pictures and
images are uint8 (H, W, 3) RGB.
"""

from collections.abc import Sequence
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import data
from adapter import resize
from model import PATCH, Segmenter
from msda_cuda import MSDeformAttn, ms_deform_attn
from tools import draw

CELL, CAPTION = 320, 24  # side of a picture in an explanation and height of its text, in pixels
LEVEL_COLORS = np.uint8([[255, 196, 0], [0, 190, 255], [255, 70, 150]])  # strides 8, 16, 32


@torch.no_grad()
def explain(model: Segmenter, image: np.ndarray, classes: Sequence[str], number: int = 12) -> Image.Image:
    """A sheet for the central window of a picture: above queries, below samples.

    The `number` queries have the highest score: the probability of their class times the mean probability inside their
    mask. The dots are the places that four patches sample from the convolutional pyramid in the last injector, larger
    the more weight they have; the patches are those where the first four queries are surest.
    """
    window, device = model.config.window, next(model.parameters()).device
    pixels = torch.from_numpy(central_window(image, window)).permute(2, 0, 1)[None]  # (w, w, 3) -> (1, 3, w, w)
    calls = []

    def record(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
        calls.append((locations[0].cpu().numpy(), weights[0].cpu().numpy()))
        return ms_deform_attn(value, shapes, locations, weights)

    with patch(f"{MSDeformAttn.__module__}.ms_deform_attn", record):
        class_logits, mask_embeds, mask_features = model.head(model.features(data.normalize(pixels.to(device))))
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
    surest = masks[best[:4]].flatten(1).argmax(1).cpu().numpy()  # a pixel's number: row * CELL + column
    places = np.stack([surest % CELL, surest // CELL], 1) / CELL
    samples = sampling_picture(central_window(image, queries.width), places, points, weights)
    return draw.stack([
        draw.with_caption(queries, f"The {len(best)} best of {len(chance)} queries: class, score, mask"),
        draw.with_caption(samples, "Last injector: where four patches (+) sample; larger dots weigh more"),
    ])


def query_sheet(picture: np.ndarray, masks: np.ndarray, captions: Sequence[str]) -> Image.Image:
    """The picture once for each query, dim and gray where its mask (of the same size) says no, with a caption."""
    dim = 0.35 * picture.mean(-1, keepdims=True)
    cells = []
    for mask, caption in zip(masks, captions, strict=True):
        lit = (dim + (picture - dim) * mask[..., None]).astype(np.uint8)
        lit[draw.boundaries(mask > 0.5)] = 255
        cells.append(draw.with_caption(lit, caption, CAPTION))
    return draw.contact_sheet([cells[i : i + 4] for i in range(0, len(cells), 4)])


def sampling_picture(image: np.ndarray, places: np.ndarray, points: np.ndarray, weights: np.ndarray) -> Image.Image:
    """The square picture with a cross for the patch at each place (x, y) and the points that the patch samples.

    The points (Q, M, L, P, 2) and their weights (Q, M, L, P) are those of a square grid of Q patches; places and points
    are (x, y) in 0 ... 1.
    """
    side, grid = len(image), round(len(points) ** 0.5)
    picture = draw.to_image((image * 0.6).astype(np.uint8))
    pen = ImageDraw.Draw(picture, "RGBA")
    for column, row in (places * grid).astype(int):
        x, y = (column + 0.5) / grid * side, (row + 0.5) / grid * side
        query = row * grid + column
        for (head, level, point), share in np.ndenumerate(weights[query]):
            a, b = points[query, head, level, point] * side
            radius = 1.5 + 14 * share**0.5  # an area in proportion to the weight, and never invisible
            pen.line((x, y, a, b), (255, 255, 255, 90), 1)
            pen.ellipse((a - radius, b - radius, a + radius, b + radius), tuple(LEVEL_COLORS[level]), (20, 20, 20))
        pen.line((x - 10, y, x + 10, y), (255, 255, 255), 4)
        pen.line((x, y - 10, x, y + 10), (255, 255, 255), 4)
    key = draw.legend(["samples at stride 8", "at stride 16", "at stride 32"], LEVEL_COLORS, side)
    return draw.stack([picture, key])


def central_window(image: np.ndarray, window: int) -> np.ndarray:
    """The middle of the picture, (w, w, 3), when its short side is scaled to the window."""
    scale = window / min(image.shape[:2])
    height, width = (max(window, round(side * scale)) for side in image.shape[:2])
    top, left = (height - window) // 2, (width - window) // 2
    return data.resize(image, (height, width))[top : top + window, left : left + window]
