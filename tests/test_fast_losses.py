"""fast/losses.py: sampling, matching and losses all at once against the plain text and SciPy.

What it shares with `heads` is compared with transformers in test_heads.py, for both.
"""

import math

import numpy as np
import pytest
import torch
from conftest import NO_FAKE_GPU, mask_logits
from scipy.optimize import linear_sum_assignment
from test_heads import CLASSES, EXACT, POINTS, QUERIES, plain_cost, random_labels, random_prediction, sampled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import heads
from common import IGNORE
from fast import losses
from fast.losses import (
    Matches,
    bordered,
    corners,
    mask2former_losses,
    match,
    matching_costs,
    sample_class_targets,
    sample_pixels,
    sample_targets,
)
from heads import Prediction, loss_normalizers

pytestmark = pytest.mark.usefixtures("seed")
LINE = torch.tensor([0, 1e-9, 1e-3, 1 / 16, 0.25, 0.49, 0.5, 0.77, 15 / 16, 0.999, 1]).double()
GRID = torch.cartesian_prod(LINE, LINE)  # (P, 2): inside, on pixel centres, nearer to the border than these, on it


@pytest.mark.parametrize(("images", "queries", "normalized"), [
    (2, 9, False), (3, 1, True), (1, 3, False), (5, 4, True)])
def test_all_at_once_is_one_by_one(halton_points, images, queries, normalized):
    """Odd numbers of images, one query, more classes than queries, an image without labels: values and gradients."""
    prediction, labels = random_prediction(images, queries=queries), random_labels(images)
    labels[images // 2 + 1:] = IGNORE
    inputs = [t.requires_grad_() for t in prediction]
    normalizers = loss_normalizers(torch.full((images + 2,), 5), slice(images), queries) if normalized else None
    terms = [text.mask2former_losses(prediction, labels, normalizers, num_points=POINTS) for text in (losses, heads)]
    assert list(terms[0]) == list(terms[1])
    torch.testing.assert_close(*terms, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(sum(t.values()), inputs) for t in terms), **EXACT)


@pytest.mark.parametrize("queries", [8, 9])
def test_costs_of_16_bit_masks(halton_points, queries):
    """Of as many queries as there are, however many are multiplied."""
    classes, *masks = (t.detach().float() for t in random_prediction(2, queries=queries))
    low, labels = [t.bfloat16() for t in masks], random_labels(2)
    costs = matching_costs(Prediction(classes, *low), labels, POINTS)
    exact = matching_costs(Prediction(classes, *(t.float() for t in low)), labels, POINTS)
    assert costs.shape == exact.shape and (costs - exact).abs().max() < 0.02 * exact.abs().max()


# ----------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("size", [(8, 8), (5, 11), (1, 3)])
def test_pixels_are_sampled_as_by_grid_sample(size):
    """Also at the border, where what is outside counts as 0."""
    maps, points = torch.randn(2, 3, *size, dtype=torch.double), torch.stack([GRID, GRID.flip(0)])
    values = sample_pixels(bordered(maps, 0).flatten(2).mT, *corners(points, *size))
    torch.testing.assert_close(values.mT, sampled(maps, points), **EXACT)


def test_targets_are_the_binary_masks_sampled():
    """An ignored pixel is a negative of every mask."""
    labels = random_labels(3)
    points = GRID.expand(3, -1, 2) * (1 - torch.rand(3, 1, 2) / 10)  # other points for each image
    classes = bordered(labels.clamp(max=CLASSES), CLASSES)
    targets = sample_targets(classes, *corners(points, *labels.shape[1:]), CLASSES)
    masks = torch.stack([labels == k for k in range(CLASSES)], dim=1).double()
    torch.testing.assert_close(targets.mT, sampled(masks, points), **EXACT)
    image, category = torch.tensor([2, 0, 0, 1]), torch.tensor([4, 0, 3, 1])
    points = points[[0, 1, 2, 0]]
    expected = sampled(masks[image, category][:, None], points)[:, 0]
    torch.testing.assert_close(sample_class_targets(labels, image, category, points), expected, **EXACT)


# ----------------------------------------------------------------------------------------------------------- matching


def test_matching_costs_agree_with_a_plain_loop(monkeypatch):
    """Outputs, images, queries and classes one by one; other points for every output and image."""
    prediction, labels = random_prediction(3, outputs=2, queries=4), random_labels(3)
    points = torch.rand(2, 3, POINTS, 2, dtype=torch.double)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: points.view(shape))
    costs = matching_costs(prediction, labels, POINTS)
    assert costs.shape == (2, 3, 4, CLASSES)
    for output, image, query, k in np.ndindex(*costs.shape):
        place = points[output, image][None]
        logit = sampled(mask_logits(prediction)[output, image, query][None, None], place).flatten()
        target = sampled((labels[image] == k).double()[None, None], place).flatten()
        expected = plain_cost(prediction.class_logits[output, image, query], logit, target, k)
        torch.testing.assert_close(costs[output, image, query, k], expected, **EXACT)


def as_pairs(matches: Matches, output: int, image: int) -> list[tuple[int, int]]:
    mine = (matches.output == output) & (matches.image == image)
    return list(zip(matches.query[mine].tolist(), matches.category[mine].tolist(), strict=True))


@pytest.mark.parametrize("queries", [12, 3])
def test_match_agrees_with_scipy(queries):
    """Image by image; one has no class at all, and three queries are fewer than the classes of another."""
    costs = torch.randn(4, 3, queries, CLASSES)
    present = torch.tensor([[1, 0, 1, 1, 1], [0] * 5, [0, 0, 0, 1, 0]]).bool()
    matches = match(costs, present)
    for output, image in np.ndindex(4, 3):
        categories = present[image].nonzero().flatten().numpy()
        rows, columns = linear_sum_assignment(costs[output, image].numpy()[:, categories])
        assert as_pairs(matches, output, image) == list(zip(rows, categories[columns], strict=True))
    assert matches.of_image == [4 * min(queries, 4), 0, 4]
    assert matches.image.tolist() == [image for image, n in enumerate(matches.of_image) for _ in range(n)]


def test_non_finite_costs_lose_against_finite_ones():
    costs = torch.tensor([[math.nan, 9.0], [math.inf, 1.0], [3.0, 2.0]])[None, None]
    assert as_pairs(match(costs, torch.ones(1, 2, dtype=torch.bool)), 0, 0) == [(1, 1), (2, 0)]
    assert len(match(torch.full((1, 1, 3, 2), math.nan), torch.ones(1, 2, dtype=torch.bool)).query) == 2


class CallNames(TorchFunctionMode):
    """Names of all torch functions called, in order."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names = [*vars(self).get("names", []), getattr(function, "__name__", "")]
        return function(*args, **(kwargs or {}))


def test_matching_is_one_copy_to_the_host_and_one_back():
    """For ten outputs and four images: `cpu` once, nothing that reads a value before it, `to` once after it."""
    costs, present = torch.randn(10, 4, QUERIES, CLASSES), torch.rand(4, CLASSES) < 0.7
    with CallNames() as calls:
        match(costs, present)
    copy = calls.names.index("cpu")
    waiting = {"cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"}
    assert [name for name in calls.names[:copy + 1] if name in waiting] == ["cpu"]
    assert [name for name in calls.names[copy + 1:] if name in ("cpu", "to", "cuda")] == ["to"]


@NO_FAKE_GPU
def test_nothing_but_matching_waits_for_the_device(monkeypatch):
    """All but `match` on fake CUDA tensors: these have no values, and do not mix with the host's, so that code which
    reads one raises."""
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="cuda")

    with FakeTensorMode(), CallNames() as calls:
        matches = Matches(*empty(4, 7, dtype=torch.long), [3, 4])
        monkeypatch.setattr(losses, "match", lambda costs, present: matches)
        prediction = Prediction(empty(2, 2, QUERIES, CLASSES + 1), empty(2, 2, QUERIES, 10), empty(2, 10, 6, 8))
        terms = mask2former_losses(prediction, empty(2, 24, 32, dtype=torch.long), num_points=POINTS)
    assert [(loss.shape, loss.device.type) for loss in terms.values()] == [(torch.Size(), "cuda")] * 6
    assert not {"cpu", "numpy", "tolist", "item"} & set(calls.names)
