"""Heads and losses against code written elsewhere (transformers, SciPy) and against formulas written out plainly.

Reading order: UperNet -> Mask2Former -> points and targets -> matching -> losses -> normalizers -> starting values.

What `heads` and `fast.losses` both compute is tested for both, by the fixture `losses`.
"""
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import mask_logits, randomized
from scipy.optimize import linear_sum_assignment
from torch import nn

import heads
from common import IGNORE
from heads import (
    FCN,
    Mask2Former,
    Normalizers,
    PixelDecoder,
    Prediction,
    UperNet,
    class_loss,
    classes_present,
    loss_normalizers,
    match,
    pixel_cross_entropy,
    point_sample,
    semantic_scores,
    sine_positions,
    targets_of,
    uncertain_points,
    upernet_losses,
    where_to_look,
)
from model import build_model

EXACT = {"rtol": 1e-12, "atol": 1e-12}
DIM, CHANNELS, CLASSES, QUERIES, POINTS = 16, 64, 5, 9, 64


pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture(params=["heads", "fast.losses"])
def losses(request):
    """losses(prediction, labels, normalizers=None), plain and fast."""
    return partial(pytest.importorskip(request.param).mask2former_losses, num_points=POINTS)


def renamed(state: dict, patterns: list[tuple[str, str]]) -> dict:
    for pattern, replacement in patterns:
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    return state


def pyramid(images: int = 2, side: int = 16) -> list[torch.Tensor]:
    """Random maps f4, f8, f16, f32, twice as wide as high so that a swap of axes shows."""
    return [torch.randn(images, DIM, side // s, 2 * side // s, dtype=torch.double) for s in (1, 2, 4, 8)]


def random_labels(images: int, side: int = 24, ignored: float = 0.2) -> torch.Tensor:
    labels = torch.randint(0, CLASSES, (images, side, side + 8))
    return labels.masked_fill(torch.full(labels.shape, ignored).bernoulli().bool(), IGNORE)


def random_prediction(images: int, outputs: int = 3, queries: int = QUERIES) -> Prediction:
    return Prediction(torch.randn(outputs, images, queries, CLASSES + 1, dtype=torch.double),
                      torch.randn(outputs, images, queries, 10, dtype=torch.double),
                      torch.randn(images, 10, 6, 8, dtype=torch.double))


def sampled(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w), (N, P, 2) -> (N, C, P), by grid_sample alone."""
    return F.grid_sample(maps, points[:, None] * 2 - 1, padding_mode="zeros", align_corners=False)[:, :, 0]


# ------------------------------------------------------------------------------------------------------------ UperNet

UPERNET_NAMES = [
    (r"^psp_modules\.(\d)\.1", r"pools.\1"), ("^lateral_convs", "laterals"), ("^fpn_convs", "outputs"),
    ("^fpn_bottleneck", "fuse"), (r"^convs\.0", "conv"), (r"\.conv\.(?=weight)", ".0."), (r"\.batch_norm\.", ".1."),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["UperNetHead", "UperNetFCNHead"])
def test_upernet_agrees_with_transformers(name, training):
    """Logits, gradients of the maps, and batch-norm statistics after a training step."""
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    config = transformers.UperNetConfig(
        hidden_size=24, num_labels=CLASSES, auxiliary_channels=24, auxiliary_in_channels=DIM, auxiliary_num_convs=1,
        auxiliary_concat_input=False, pool_scales=[1, 2, 3, 6])
    theirs = randomized(getattr(library, name)(config, [DIM] * 4)).train(training)
    ours = (UperNet if name == "UperNetHead" else FCN)(DIM, 24, CLASSES, dropout=0.0).double().train(training)
    ours.load_state_dict(renamed(theirs.state_dict(), UPERNET_NAMES))
    features = [f.requires_grad_() for f in pyramid(side=32)]
    expected = theirs(features)
    actual = ours(features) if name == "UperNetHead" else ours(features[2])
    torch.testing.assert_close(actual, expected, **EXACT)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, features, weights, allow_unused=True, materialize_grads=True)
                 for y in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dict(ours.state_dict()), renamed(theirs.state_dict(), UPERNET_NAMES), **EXACT)


def test_ignored_pixels_count_in_the_denominator_of_upernets_loss():
    logits, labels = torch.randn(2, CLASSES, 6, 8, dtype=torch.double), random_labels(2, ignored=0.5)
    upsampled = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    usual = F.cross_entropy(upsampled, labels, ignore_index=IGNORE)
    expected = usual * (labels != IGNORE).double().mean()
    torch.testing.assert_close(pixel_cross_entropy(logits, labels), expected, **EXACT)
    terms = upernet_losses((logits, -logits), labels)
    assert terms["pixel"] == pixel_cross_entropy(logits, labels)
    assert terms["auxiliary"] == 0.4 * pixel_cross_entropy(-logits, labels)


# -------------------------------------------------------------------------------------------------------- Mask2Former

PIXEL_DECODER_NAMES = [
    (r"^encoder\.", ""), ("^input_projections", "inputs"), (r"\.self_attn\.", ".attention."),
    (r"\.self_attn_layer_norm\.", ".norm1."), (r"\.final_layer_norm\.", ".norm2."), (r"\.fc1\.", ".ffn.0."),
    (r"\.fc2\.", ".ffn.2."), ("^adapter_1", "lateral"), ("^layer_1", "output"), ("^mask_projection", "mask_features"),
]
DECODER_NAMES = [
    ("^queries_embedder.weight", "query_embed"), ("^queries_features.weight", "query_feat"),
    ("^level_embed.weight", "level_embed"), (r"^decoder\.layernorm", "norm"),
    (r"^decoder\.mask_predictor\.mask_embedder\.(\d)\.0", lambda m: f"mask_embed.{2 * int(m[1])}"),
    (r"^decoder\.", ""),
    (r"\.cross_attn\.in_proj_", ".cross_attention.in_proj."), (r"\.cross_attn\.", ".cross_attention."),
    (r"\.self_attn\.", ".self_attention."), (r"\.cross_attn_layer_norm\.", ".norm1."),
    (r"\.self_attn_layer_norm\.", ".norm2."), (r"\.final_layer_norm\.", ".norm3."), (r"\.fc1\.", ".ffn.0."),
    (r"\.fc2\.", ".ffn.2."),
]


def stacked_projections(state: dict) -> dict:
    """Separate query, key and value projections become one `in_proj`."""
    state = dict(state)
    for name in [n for n in state if ".q_proj." in n]:
        parts = [state.pop(name.replace("q_proj", p)) for p in ("q_proj", "k_proj", "v_proj")]
        state[name.replace("q_proj", "in_proj")] = torch.cat(parts)
    return state


@pytest.fixture
def library(monkeypatch):
    """transformers' Mask2Former, with the one thing in which it differs put right: it computes sine positions in the
    model's precision, the released code in float32. The norm order, temperature, scale and mask threshold coincide."""
    module = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    forward = module.Mask2FormerSinePositionEmbedding.forward

    def in_float32(self, shape, device, dtype, mask=None):
        return forward(self, shape, device, torch.float32, mask).to(dtype)

    monkeypatch.setattr(module.Mask2FormerSinePositionEmbedding, "forward", in_float32)
    return module


def library_config():
    from transformers import Mask2FormerConfig

    return Mask2FormerConfig(
        num_labels=CLASSES, num_queries=QUERIES, num_attention_heads=4, train_num_points=POINTS,
        feature_size=CHANNELS, mask_feature_size=CHANNELS, encoder_layers=2, encoder_feedforward_dim=96,
        hidden_dim=CHANNELS, decoder_layers=5, dim_feedforward=80)  # they count the first prediction: 4 layers


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (30, 30)])
def test_sine_positions_agree_with_transformers(library, grid):
    theirs = library.Mask2FormerSinePositionEmbedding(CHANNELS // 2, normalize=True)
    like = torch.zeros(1, CHANNELS, *grid)
    expected = theirs(like.shape, like.device, like.dtype)[0].flatten(1).T
    torch.testing.assert_close(sine_positions(*grid, CHANNELS, like), expected, rtol=0, atol=1e-6)


def test_pixel_decoder_agrees_with_transformers(library):
    """Mask features, the memory of three levels, and the gradients of all four maps."""
    theirs = randomized(library.Mask2FormerPixelDecoder(library_config(), [DIM] * 4))
    ours = PixelDecoder(DIM, CHANNELS, hidden=96, num_layers=2, num_heads=4).double()
    ours.load_state_dict(renamed(theirs.state_dict(), PIXEL_DECODER_NAMES))
    features = [f.requires_grad_() for f in pyramid()]
    mask_features, memory = ours(features)
    expected = theirs(features)
    torch.testing.assert_close(mask_features, expected.mask_features, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(memory, list(expected.multi_scale_features), rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(mask_features)
    gradients = [torch.autograd.grad(y, features, weights) for y in (mask_features, expected.mask_features)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


def decoders(library) -> tuple[Mask2Former, nn.Module]:
    theirs = randomized(library.Mask2FormerTransformerModule(CHANNELS, library_config()))
    ours = Mask2Former(DIM, CHANNELS, CLASSES, QUERIES, num_heads=4, decoder_layers=4, decoder_ffn=80, encoder_layers=1,
                       encoder_ffn=32)
    own = {n: t for n, t in ours.state_dict().items() if n.startswith(("pixel_decoder.", "class_embed."))}
    ours.load_state_dict(own | stacked_projections(renamed(theirs.state_dict(), DECODER_NAMES)))
    return ours.double(), theirs


def test_masked_attention_decoder_agrees_with_transformers(library):
    """Classes and masks before the first layer and after each of four (so that level 0 comes round again)."""
    ours, theirs = decoders(library)
    features = [f.requires_grad_() for f in pyramid()]
    prediction = ours(features)
    mask_features, memory = ours.pixel_decoder(features)
    expected = theirs(memory, mask_features)
    assert len(mask_logits(prediction)) == len(expected.masks_queries_logits) == 5
    for i, masks in enumerate(expected.masks_queries_logits):
        classes = ours.class_embed(expected.intermediate_hidden_states[i].transpose(0, 1))
        torch.testing.assert_close(mask_logits(prediction)[i], masks, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(prediction.class_logits[i], classes, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(masks)
    gradients = [torch.autograd.grad(y, features, weights, retain_graph=True)
                 for y in (mask_logits(prediction)[-1], expected.masks_queries_logits[-1])]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-7)


def test_a_query_attends_to_its_mask_or_everywhere_if_that_is_empty():
    """A logit of 0 (sigmoid 0.5) is inside."""
    features = torch.tensor([[[1.0, -1.0, 2.0], [0.0, 0.0, -1.0], [1.0, 1.0, 1.0]]])  # three channels at three pixels
    attend = where_to_look(torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0]]]), features)
    assert attend.tolist() == [[[True, False, True], [True, True, False], [True, True, True]]]


def test_semantic_scores_by_hand():
    """Two queries, two classes: class probabilities (1/2, 1/4 | 1/4) and (0, 0 | 1), mask probabilities 0.8 and 0.5.
    The scores are those of the last output."""
    classes = torch.tensor([[[0.5, 0.25, 0.25], [1e-30, 1e-30, 1.0]]]).log()
    masks = torch.tensor([math.log(4), 0.0]).view(1, 2, 1, 1)
    embeds = torch.stack([-torch.eye(2), torch.eye(2)])[:, None]
    prediction = Prediction(torch.stack([-classes, classes]), embeds, masks)
    torch.testing.assert_close(semantic_scores(prediction).flatten(), torch.tensor([0.4, 0.2]))


def test_semantic_scores_stay_in_float32_under_autocast():
    """The matrix product too: in bfloat16 near ties between classes would fall either way."""
    masks = torch.randn(1, QUERIES, 6, 8).bfloat16().float()
    prediction = Prediction(torch.randn(1, 1, QUERIES, CLASSES + 1), torch.eye(QUERIES)[None, None], masks)
    with torch.autocast("cpu", torch.bfloat16):
        scores = semantic_scores(prediction)
    torch.testing.assert_close(scores, semantic_scores(prediction))


# -------------------------------------------------------------------------------------------------- points and targets


def test_points_are_x_and_y_from_the_corner_and_outside_is_0():
    maps = torch.arange(1.0, 9).view(1, 1, 2, 4)  # pixel centres at x = 1/8, 3/8 ... and y = 1/4, 3/4
    points = torch.tensor([[[1 / 8, 1 / 4], [7 / 8, 3 / 4], [1 / 4, 1 / 4], [3 / 8, 1 / 2], [1, 1], [0, 1 / 4]]])
    assert point_sample(maps, points).tolist() == [[[1.0, 8.0, 1.5, 4.0, 2.0, 0.5]]]


def test_targets_are_the_classes_of_each_image():
    labels = torch.tensor([[[0, 3, 3, IGNORE]], [[IGNORE, CLASSES, IGNORE, IGNORE]], [[1, 2, 4, 0]]])
    present = classes_present(labels, CLASSES)
    assert present.int().tolist() == [[1, 0, 0, 1, 0], [0] * 5, [1, 1, 1, 0, 1]]
    assert classes_present(labels.to(torch.uint8), CLASSES).equal(present)
    first, second, third = targets_of(labels, CLASSES)
    assert (first.classes.tolist(), third.classes.tolist()) == ([0, 3], [0, 1, 2, 4])
    assert first.masks.tolist() == [[[1, 0, 0, 0]], [[0, 1, 1, 0]]]
    assert second.classes.shape == (0,) and second.masks.shape == (0, 1, 4)


# ----------------------------------------------------------------------------------------------------------- matching


def plain_cost(classes: torch.Tensor, logit: torch.Tensor, target: torch.Tensor, k: int) -> torch.Tensor:
    """The cost of one query (K + 1,), whose mask has these logits (P,), for class k with this target (P,)."""
    probability = logit.sigmoid()
    mask_cost = F.binary_cross_entropy_with_logits(logit, target)
    dice_cost = 1 - (2 * (probability * target).sum() + 1) / (probability.sum() + target.sum() + 1)
    return 2 * -classes.softmax(0)[k] + 5 * mask_cost + 5 * dice_cost


@pytest.mark.parametrize("queries", [QUERIES, 3])
def test_match_minimises_the_papers_cost(monkeypatch, queries):
    """Each cost is written out; with three queries there are more classes than queries."""
    prediction, labels, costs = random_prediction(1, 1, queries), random_labels(1), []
    points = torch.rand(1, POINTS, 2, dtype=torch.double)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: points)
    monkeypatch.setattr(heads, "linear_sum_assignment", lambda c: costs.append(c) or linear_sum_assignment(c))
    classes, masks = prediction.class_logits[0, 0], mask_logits(prediction)[0, 0]
    (target,) = targets_of(labels.masked_fill(labels == 1, IGNORE), CLASSES)
    assert target.classes.tolist() == [0, 2, 3, 4]
    chosen_queries, chosen = match(classes, masks, target, POINTS)
    logits, targets = (sampled(x[None].double(), points)[0] for x in (masks, target.masks))
    expected = [[plain_cost(*query, targets[t], k) for t, k in enumerate(target.classes)]
                for query in zip(classes, logits, strict=True)]
    torch.testing.assert_close(torch.from_numpy(costs[0]), torch.tensor(expected, dtype=torch.double), **EXACT)
    assert (chosen_queries.tolist(), chosen.tolist()) == tuple(x.tolist() for x in linear_sum_assignment(expected))
    assert len(chosen) == min(queries, 4)


def test_non_finite_costs_lose_against_finite_ones():
    """SciPy would raise on nan, and find inf infeasible."""
    (target,), masks = targets_of(random_labels(1), CLASSES), torch.randn(7, 6, 8)
    masks[0], masks[1] = math.nan, math.inf
    queries, targets = match(torch.zeros(7, CLASSES + 1), masks, target, POINTS)
    assert queries.tolist() == [2, 3, 4, 5, 6] and sorted(targets.tolist()) == list(range(CLASSES))


# ------------------------------------------------------------------------------------------------- Mask2Former's losses


def library_targets(labels: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Binary masks and classes of each image, by numpy; ignored pixels are zeros."""
    classes = [np.setdiff1d(image, [IGNORE]) for image in labels.numpy()]
    masks = [torch.from_numpy(image == c[:, None, None]).double()
             for image, c in zip(labels.numpy(), classes, strict=True)]
    return masks, [torch.from_numpy(c) for c in classes]


def library_losses(library, prediction: Prediction, labels: torch.Tensor, masks: float | None = None) -> dict:
    """Mask2FormerLoss under our names; the denominator of the mask losses may be given."""
    criterion = library.Mask2FormerLoss(library_config(), {}).double()
    criterion.empty_weight[-1] = 0.1  # not float32's 0.1
    if masks is not None:
        criterion.get_num_masks = lambda *_, **__: masks
    outputs = [{"masks_queries_logits": masks, "class_queries_logits": classes}
               for classes, masks in zip(prediction.class_logits, mask_logits(prediction), strict=True)]
    *earlier, last = outputs
    theirs = criterion(*last.values(), *library_targets(labels), auxiliary_predictions=earlier)
    terms = {"class": ("loss_cross_entropy", 2.0), "mask": ("loss_mask", 5.0), "dice": ("loss_dice", 5.0)}
    suffixes = [*(f"_{i}" for i in range(len(earlier))), ""]
    return {f"{ours}/{i}": weight * theirs[name + suffix]
            for ours, (name, weight) in terms.items() for i, suffix in enumerate(suffixes)}


def test_matching_agrees_with_transformers(library, halton_points):
    """The same pairs for every output and image (finite costs: theirs takes -inf for the largest, we the smallest)."""
    prediction, labels = random_prediction(4), random_labels(4)
    labels[2] = IGNORE
    matcher = library.Mask2FormerHungarianMatcher(2.0, 5.0, 5.0, POINTS)
    for classes, masks in zip(prediction.class_logits, mask_logits(prediction), strict=True):
        expected = matcher(masks, classes, *library_targets(labels))
        for image, target in enumerate(targets_of(labels, CLASSES)):
            torch.testing.assert_close(match(classes[image], masks[image], target, POINTS), expected[image])


def test_uncertain_points_agree_with_transformers(library):
    masks = torch.randn(7, 1, 6, 8)
    criterion = library.Mask2FormerLoss(library_config(), {})
    torch.manual_seed(1)
    expected = criterion.sample_points_using_uncertainty(masks, criterion.calculate_uncertainty, POINTS, 3, 0.75)
    torch.manual_seed(1)
    points = uncertain_points(masks[:, 0], POINTS)
    assert points.shape == (7, POINTS, 2)
    for ours, theirs in zip(points.tolist(), expected.tolist(), strict=True):
        assert sorted(ours) == sorted(theirs)  # theirs, sorted by uncertainty, take longer and serve as well


@pytest.mark.parametrize("no_target", [False, True])
def test_losses_agree_with_transformers(library, halton_points, losses, no_target):
    """Every term of every output, and the gradients, for one pair of images; in one case the second has no target."""
    prediction, labels = random_prediction(2), random_labels(2)
    if no_target:
        labels[1] = IGNORE
    inputs = [t.requires_grad_() for t in prediction]
    ours, theirs = losses(prediction, labels), library_losses(library, prediction, labels)
    torch.testing.assert_close(dict(sorted(ours.items())), dict(sorted(theirs.items())), **EXACT)
    gradients = [torch.autograd.grad(sum(terms.values()), inputs) for terms in (ours, theirs)]
    torch.testing.assert_close(*gradients, **EXACT)


def test_no_object_weighs_a_tenth():
    """One query matched, one not: (loss of class 2 + 0.1 loss of "no object") / 1.1, or over a given weight."""
    logits, wanted = torch.randn(1, 2, CLASSES + 1, dtype=torch.double), torch.tensor([[CLASSES, 2]])
    surprise = -logits.log_softmax(-1)[0]
    expected = surprise[1, 2] + 0.1 * surprise[0, CLASSES]
    torch.testing.assert_close(class_loss(logits, wanted), expected / 1.1, **EXACT)
    torch.testing.assert_close(class_loss(logits, wanted, torch.tensor([4.0])), expected / 4, **EXACT)


# -------------------------------------------------------------------------------------------------------- normalizers


def part(prediction: Prediction, mine: slice) -> Prediction:
    classes, embeds, features = prediction
    return Prediction(classes[:, mine], embeds[:, mine], features[mine])


def official_losses(library, prediction: Prediction, labels: torch.Tensor) -> dict:
    """Pairs of images, each on its device: class losses over the pair's own weights, masks over their mean per pair."""
    pairs = [slice(i, i + 2) for i in range(0, len(labels), 2)]
    masks = max(sum(min(len(c), QUERIES) for c in library_targets(labels)[1]) / len(pairs), 1)
    terms = [library_losses(library, part(prediction, pair), labels[pair], masks) for pair in pairs]
    return {name: sum(term[name] for term in terms) / len(pairs) for name in sorted(terms[0])}


def mean_over_calls(losses, prediction: Prediction, labels: torch.Tensor, size: int) -> dict:
    """The mean over calls of `size` images."""
    counts = classes_present(labels, CLASSES).sum(1)
    calls = [slice(i, i + size) for i in range(0, len(labels), size)]
    terms = [losses(part(prediction, mine), labels[mine], loss_normalizers(counts, mine, QUERIES)) for mine in calls]
    return {name: sum(term[name] for term in terms) / len(calls) for name in sorted(terms[0])}


@pytest.mark.parametrize(("images", "size"), [(16, 16), (16, 8), (16, 4), (16, 2), (16, 1), (3, 1), (3, 3), (1, 1)])
def test_any_layout_gives_the_official_losses(library, halton_points, losses, images, size):
    """Eight devices with a pair each, or the same images in calls of any size: the same totals. An odd image is a pair
    of its own."""
    prediction, labels = random_prediction(images, outputs=2), random_labels(images)
    if images == 16:
        labels[3] = labels[8] = labels[9] = IGNORE
        labels[5] = labels[5].clamp(max=1)
        assert classes_present(labels, CLASSES).sum(1).unique().tolist() == [0, 2, 5]
    torch.testing.assert_close(mean_over_calls(losses, prediction, labels, size),
                               official_losses(library, prediction, labels), **EXACT)


def test_normalizers_by_hand():
    """Images with 3, 1, 0, 12 masks and 9 queries: the last can match 9. Pairs weigh 4 + 1.4 and 9 + 0.9; there are 13
    matches in two pairs. Three of the four images are one and a half pairs."""
    normalizers = loss_normalizers(torch.tensor([3, 1, 0, 12]), slice(1, 4), num_queries=9)
    assert normalizers.class_divisor.tolist() == pytest.approx([1.5 * 5.4, 1.5 * 9.9, 1.5 * 9.9])
    assert normalizers.num_masks.item() == 1.5 * 13 / 2
    assert loss_normalizers(torch.tensor([1, 0, 0, 0]), slice(2), 9).num_masks == 1  # at least 1 a pair


def test_without_normalizers_a_call_is_its_own_batch(halton_points, losses):
    """The class loss over the class weights of all images, the mask losses over the number of masks, at least 1."""
    prediction, labels = random_prediction(4, outputs=1), random_labels(4)
    labels[0] = IGNORE
    weight = torch.full((4,), 3 * 5.4 + 0.9, dtype=torch.double)  # of 9 queries five match in three of the images
    torch.testing.assert_close(losses(prediction, labels),
                               losses(prediction, labels, Normalizers(weight, torch.tensor(15))), **EXACT)


def test_an_all_ignored_batch_reaches_every_parameter(losses):
    """Its mask losses are 0 and its class losses are not; no gradient is None, as DistributedDataParallel demands."""
    model = build_model("mask2former", "tiny", CLASSES, window=64).train()
    model.criterion = losses
    terms = model(torch.randn(2, 3, 64, 64), torch.full((2, 64, 64), IGNORE))
    assert all(value == 0 for name, value in terms.items() if name.startswith(("mask", "dice")))
    assert all(value > 0 for name, value in terms.items() if name.startswith("class"))
    terms["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_predictions_are_float32(halton_points, losses, dtype):
    """Only the products that make the masks are in half precision; here these are exact, being with 0 and 1."""
    classes, labels = torch.randn(3, 2, QUERIES, CLASSES + 1), random_labels(2)
    embeds, features = torch.eye(QUERIES).expand(3, 2, -1, -1), torch.randn(2, QUERIES, 6, 8)
    low = Prediction(*(t.to(dtype) for t in (classes, embeds, features)))
    with torch.autocast("cpu", torch.bfloat16):
        terms = losses(low, labels)
    assert {value.dtype for value in terms.values()} == {torch.float32}
    exact = losses(Prediction(*(t.double() for t in low)), labels)
    torch.testing.assert_close(terms, exact, rtol=1e-4, atol=1e-5, check_dtype=False)


# ---------------------------------------------------------------------------------------------------- starting values


def assert_normal(weight: torch.Tensor, std: float) -> None:
    assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(weight.numel()))  # 7 standard errors
    assert weight.abs().max() > 2.5 * std  # a uniform of this deviation ends at 1.73


def assert_uniform(weight: torch.Tensor, bound: float) -> None:
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(weight.numel()))


def test_mask2former_starts_as_released():
    """Matrices of both transformers Xavier normal, but deformable attention by its own rule; embeddings normal;
    convolutions Xavier uniform by both fans or by the fan-in; biases 0."""
    head = Mask2Former(DIM * 4, CHANNELS, CLASSES, QUERIES * 10, num_heads=4, decoder_layers=2, decoder_ffn=80,
                       encoder_layers=2, encoder_ffn=96)
    decoder = head.pixel_decoder
    matrices = [p for p in head.layers.parameters() if p.dim() == 2]
    matrices += [p for n, p in decoder.layers.named_parameters() if ".ffn." in n and p.dim() == 2]
    assert len(matrices) == 2 * 6 + 2 * 2
    for weight in matrices:
        assert_normal(weight, math.sqrt(2 / sum(weight.shape)))
    for layer in decoder.layers:
        assert not layer.attention.sampling_offsets.weight.any() and not layer.attention.attention_weights.weight.any()
        ring = layer.attention.sampling_offsets.bias.view(4, 3, 4, 2)
        assert ring[1].round(decimals=5).tolist() == [[[0, 1], [0, 2], [0, 3], [0, 4]]] * 3
        assert_uniform(layer.attention.value_proj.weight, math.sqrt(6 / (2 * CHANNELS)))
    for embedding in (head.query_feat, head.query_embed, head.level_embed, decoder.level_embed):
        assert_normal(embedding, 1.0)
    for conv, _ in decoder.inputs:
        assert_uniform(conv.weight, math.sqrt(6 / (4 * DIM + CHANNELS)))
    for conv in (decoder.lateral[0], decoder.output[0], decoder.mask_features):
        assert_uniform(conv.weight, math.sqrt(3 / conv.weight[0].numel()))
    attentions = [a for layer in head.layers for a in (layer.cross_attention, layer.self_attention)]
    layers = [decoder.mask_features, *(conv for conv, _ in decoder.inputs)]
    layers += [linear for a in attentions for linear in (a.in_proj, a.out_proj)]
    assert not any(layer.bias.any() for layer in layers)


@pytest.mark.parametrize("head", [UperNet, FCN])
def test_upernet_starts_kaiming_normal_with_small_classifiers(head):
    module = head(DIM, CHANNELS, 2 * CLASSES, 0.1)
    for name, weight in module.named_parameters():
        if weight.dim() == 4 and not name.startswith("classifier"):
            assert_normal(weight, math.sqrt(2 / weight[:, 0].numel()))  # fan out: output channels times kernel area
    assert_normal(module.classifier.weight, 0.01)
    assert (module.classifier.bias == 0).all()
    assert module.dropout.p == 0.1
