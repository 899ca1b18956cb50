"""Mask2Former's matching and losses, all images and decoder outputs at once: the numbers of heads.mask2former_losses.

Reading order: mask2former_losses -> matching_costs -> match -> mask_losses -> how points are sampled.

The plain text goes image by image and output by output: three times the operators, and a copy to the host for each
matching. Here there is one copy of all costs, and no mask is built that nobody samples.

Shapes: as in heads.py; Y decoder outputs, M matched pairs of query and class over all outputs and images.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from heads import (
    CLASS_WEIGHT,
    DICE_WEIGHT,
    IGNORE,
    MASK_WEIGHT,
    Normalizers,
    Prediction,
    class_loss,
    classes_present,
    full_precision,
    mask_costs,
    point_losses,
    point_sample,
    uncertain_points,
)


def mask2former_losses(prediction: Prediction, labels: Tensor, normalizers: Normalizers | None = None, *,
                       num_points: int) -> dict[str, Tensor]:
    """Arguments and result as of `heads.mask2former_losses`."""
    with torch.autocast(labels.device.type, enabled=False):  # matching and losses stay in float32
        prediction = prediction._replace(class_logits=full_precision(prediction.class_logits))
        class_logits = prediction.class_logits
        num_queries, no_object = class_logits.shape[2], class_logits.shape[3] - 1
        present = classes_present(labels, no_object)
        divisor, num_masks = normalizers or (None, present.sum(dim=1).clamp(max=num_queries).sum().clamp(min=1))
        matches = match(matching_costs(prediction, labels, num_points), present)
        target_classes = torch.full(class_logits.shape[:3], no_object, device=class_logits.device)
        target_classes[matches.output, matches.image, matches.query] = matches.category
        mask, dice = mask_losses(prediction, labels, matches, num_points)
        terms = {"class": CLASS_WEIGHT * class_loss(class_logits, target_classes, divisor),
                 "mask": MASK_WEIGHT * mask / num_masks, "dice": DICE_WEIGHT * dice / num_masks}
    return {f"{name}/{i}": value[i] for i in range(len(class_logits)) for name, value in terms.items()}


@torch.no_grad()
def matching_costs(prediction: Prediction, labels: Tensor, num_points: int) -> Tensor:
    """Cost of each query for each class's mask, (Y, B, Q, K), at fresh random points of every output and image.

    *All* K binary masks are compared, absent classes included: cheaper than going image by image. As in the released
    code ignored pixels are negatives of every mask.
    """
    class_logits, mask_embeds, mask_features = prediction
    num_classes = class_logits.shape[3] - 1
    points = torch.rand(*class_logits.shape[:2], num_points, 2, device=class_logits.device, dtype=class_logits.dtype)
    in_maps, in_labels = corners(points, *mask_features.shape[2:]), corners(points, *labels.shape[1:])
    pixels = bordered(mask_features, 0).flatten(2).mT  # (B, C, h, w) -> (B, (h + 2)(w + 2), C)
    classes = bordered(labels.clamp(max=num_classes), num_classes)  # 255 -> K
    num_queries, costs = mask_embeds.shape[2], []
    if mask_embeds.dtype.itemsize == 2:  # a GPU's 16-bit products need rows that start at multiples of 16 bytes
        mask_embeds = F.pad(mask_embeds, (0, 0, 0, -num_queries % 8))
    for embeds, *corners_of in zip(mask_embeds, *in_maps, *in_labels, strict=True):  # little memory at a time
        masks = full_precision(pixels @ embeds.mT.contiguous())  # (B, (h + 2)(w + 2), Q or a little more)
        logits, targets = sample_pixels(masks, *corners_of[:2]), sample_targets(classes, *corners_of[2:], num_classes)
        costs.append(mask_costs(logits[..., :num_queries].mT, targets.mT))
    return CLASS_WEIGHT * -class_logits.softmax(dim=3)[..., :-1] + torch.stack(costs)


class Matches(NamedTuple):
    """Matched pairs of query and class over all outputs and images, image by image: four fields (M,) and a count."""

    output: Tensor
    image: Tensor
    query: Tensor
    category: Tensor
    of_image: list[int]  # B numbers, which add up to M: known on the host, where the matching was done


def match(costs: Tensor, present: Tensor) -> Matches:
    """Hungarian matching of queries to the classes present: costs (Y, B, Q, K), present bool (B, K).

    One copy to the host for all outputs and images, one copy back.
    """
    flags = present.to(costs.dtype)[None, :, None].expand(len(costs), -1, 1, -1)
    host = torch.cat([costs, flags], dim=2).cpu()
    costs_host = host[:, :, :-1].nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).numpy()  # SciPy refuses non-finite costs
    rows, of_image = [], []
    for image in range(costs.shape[1]):
        categories, before = host[0, image, -1].nonzero()[:, 0].numpy(), len(rows)
        for output in range(costs.shape[0]):
            queries, columns = linear_sum_assignment(costs_host[output, image][:, categories])
            rows += [(output, image, q, categories[c]) for q, c in zip(queries, columns, strict=True)]
        of_image.append(len(rows) - before)
    pairs = torch.tensor(rows, dtype=torch.long).view(-1, 4).t().contiguous()
    return Matches(*pairs.to(costs.device, non_blocking=True), of_image)  # a few kB go along with the command


def matched_masks(prediction: Prediction, matches: Matches) -> Tensor:
    """The mask logits of matched queries, (M, h, w)."""
    embeds = prediction.mask_embeds[matches.output, matches.image, matches.query]  # (M, C)
    images = zip(embeds.split(matches.of_image), prediction.mask_features.flatten(2).unbind(), strict=True)
    masks = torch.cat([embeds @ features for embeds, features in images])  # (M, h * w)
    return full_precision(masks).unflatten(1, prediction.mask_features.shape[2:])


def mask_losses(prediction: Prediction, labels: Tensor, matches: Matches, num_points: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice losses of the matched masks at sampled points, summed over the masks of each output: (Y,).

    Without a single match both are 0, and still reach every parameter with a gradient of 0, as DDP demands.
    """
    masks = matched_masks(prediction, matches)
    points = uncertain_points(masks, num_points)
    targets = sample_class_targets(labels, matches.image, matches.category, points)
    each = point_losses(point_sample(masks[:, None], points)[:, 0], targets)
    zeros = masks.new_zeros(len(prediction.mask_embeds))
    cross_entropy, dice = (zeros.index_add(0, matches.output, losses) for losses in each)
    return cross_entropy, dice


def cells(points: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """Between which four pixels each point lies, in an image with a border of one pixel, which stands for all outside.

    points (..., 2) as (x, y) in [0, 1] over h x w -> three of (...): the flat index into (h + 2) x (w + 2) of the pixel
    to the upper left, and how far the point is from there to the right and down, in [0, 1).
    """
    x, y = points[..., 0] * w + 0.5, points[..., 1] * h + 0.5  # pixel centres are at 1, 2, ...
    left, above = x.floor(), y.floor()
    return above.long() * (w + 2) + left.long(), x - left, y - above


def corners(points: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """The four pixels of each point's cell and their bilinear weights: (..., B, P, 2) -> two of (..., B, P, 4), with
    indices that count on from image to image."""
    first, right, down = cells(points, h, w)
    first = first + first_pixels(points.shape[-3], h, w, points.device)[:, None]
    left, up = 1 - right, 1 - down
    index = torch.stack([first, first + 1, first + (w + 2), first + (w + 3)], dim=-1)
    return index, torch.stack([up * left, up * right, down * left, down * right], dim=-1)


def first_pixels(images: int, h: int, w: int, device: torch.device) -> Tensor:
    """The flat index of each image's first pixel, border included: (B,)."""
    return torch.arange(images, device=device) * ((h + 2) * (w + 2))


def bordered(x: Tensor, value: float) -> Tensor:
    """One pixel of `value` around the last two axes."""
    return F.pad(x, (1, 1, 1, 1), value=value)


def sample_pixels(pixels: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """`point_sample` without gradient, of maps that keep what they say of one pixel together, at `corners` of points.

    pixels (B, (h + 2)(w + 2), C), index and weight (B, P, 4) -> (B, P, C). On a CPU ten times as fast.
    """
    rows = F.embedding_bag(
        index.flatten(0, 1), pixels.flatten(0, 1), mode="sum", per_sample_weights=weight.flatten(0, 1))
    return rows.unflatten(0, index.shape[:2])


def sample_targets(classes: Tensor, index: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """Every class's binary mask at `corners` of points, without building masks.

    classes (B, H + 2, W + 2), in which K stands for none and fills the border, index, weight (B, P, 4) -> (B, P, K).
    """
    targets = weight.new_zeros(*weight.shape[:2], num_classes + 1)
    return targets.scatter_add_(2, classes.take(index), weight)[..., :num_classes]


def sample_class_targets(labels: Tensor, image: Tensor, category: Tensor, points: Tensor) -> Tensor:
    """The binary masks of chosen classes of chosen images: image, category (M,), points (M, P, 2) -> (M, P)."""
    h, w = labels.shape[1:]
    first, right, down = cells(points, h, w)
    first += first_pixels(len(labels), h, w, labels.device)[image][:, None]
    flat = bordered(labels.to(torch.uint8), IGNORE).flatten()  # an eighth of the memory to look things up in
    above, above_right, below, below_right = (
        (flat[offset:].take(first) == category[:, None]).to(right.dtype) for offset in (0, 1, w + 2, w + 3))
    return torch.lerp(torch.lerp(above, above_right, right), torch.lerp(below, below_right, right), down)
