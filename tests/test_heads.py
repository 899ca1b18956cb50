"""Heads and losses against code written elsewhere (transformers, SciPy) and against formulas written out plainly.

Read: UperNet -> Mask2Former -> points and targets -> matching -> losses -> units -> starting values.
"""
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fill
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import heads
from heads import (
    FCN,
    IGNORE,
    Mask2Former,
    PixelDecoder,
    Prediction,
    UperNet,
    bordered,
    class_losses,
    classes_present,
    corners,
    loss_units,
    mask2former_losses,
    mask_counts,
    match,
    matching_costs,
    pixel_cross_entropy,
    sample,
    sample_class_targets,
    sample_pixels,
    sample_targets,
    semantic_scores,
    sine_positions,
    uncertain_points,
    where_to_look,
)
from model import build_model

EXACT = {"rtol": 1e-12, "atol": 1e-12}
DIM, CHANNELS, CLASSES, QUERIES, POINTS = 16, 64, 5, 9, 64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def halton_points(monkeypatch):
    """Every draw of random points gives the Halton sequence; transformers, which names no precision, gets float64."""
    def rand(*shape, device=None, dtype=torch.double):
        return torch.from_numpy(fill.halton(shape[-2])).to(dtype).expand(shape).clone()

    monkeypatch.setattr(torch, "rand", rand)


def randomized(module: nn.Module) -> nn.Module:
    """The module in float64; every weight and batch-norm statistic differs from its start."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if tensor.dim() < 2 else nn.init.normal_(tensor, std=0.2)
    return module.double().eval()


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


def binary_masks(labels: torch.Tensor) -> torch.Tensor:
    """(B, H, W) -> float64 (B, K, H, W), the masks that the code under test never builds; ignored pixels are 0."""
    return torch.stack([labels == k for k in range(CLASSES)], dim=1).double()


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
    log_probabilities = upsampled.log_softmax(1).movedim(1, -1)
    valid = labels != IGNORE
    expected = -log_probabilities[valid].gather(1, labels[valid][:, None]).sum() / (2 * 24 * 32)
    torch.testing.assert_close(pixel_cross_entropy(logits, labels), expected, **EXACT)
    usual = F.cross_entropy(upsampled, labels, ignore_index=IGNORE)
    assert (expected / usual).item() == pytest.approx(valid.double().mean().item())


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
    finest, memory = ours(features)
    mask_features = ours.mask_features(finest)  # which the decoder multiplies with its queries instead
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
    prediction = ours(features, every_layer=True)
    finest, memory = ours.pixel_decoder(features)
    expected = theirs(memory, ours.pixel_decoder.mask_features(finest))
    assert len(prediction.mask_logits) == len(expected.masks_queries_logits) == 5
    for i, masks in enumerate(expected.masks_queries_logits):
        classes = ours.class_embed(expected.intermediate_hidden_states[i].transpose(0, 1))
        torch.testing.assert_close(prediction.mask_logits[i], masks, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(prediction.class_logits[i], classes, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(masks)
    gradients = [torch.autograd.grad(y, features, weights, retain_graph=True)
                 for y in (prediction.mask_logits[-1], expected.masks_queries_logits[-1])]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-7)


def test_last_prediction_alone_is_the_last_of_all(library):
    ours, _ = decoders(library)
    features = pyramid()
    alone, all_of_them = (ours(features, every_layer=every) for every in (False, True))
    for name in ("class_logits", "mask_logits"):  # other sizes of matrix products may round otherwise
        torch.testing.assert_close(getattr(alone, name), getattr(all_of_them, name)[-1:], **EXACT)


def test_an_empty_mask_attends_everywhere():
    features = torch.tensor([[[1.0, -1.0, 2.0], [0.0, 0.0, -1.0]]])  # two channels at three pixels
    queries = torch.tensor([[[1.0, 0.0], [0.0, 0.5], [-1.0, -3.0], [0.0, 1.0]]])
    features[0, 1] -= 0.1  # channel 1: -0.1, -0.1, -1.1
    attend = where_to_look(queries, features)
    assert attend.tolist() == [[[True, False, True], [True] * 3, [False, True, True], [True] * 3]]
    assert where_to_look(torch.zeros(1, 1, 2), features).all()  # logit 0, sigmoid 0.5, is inside


def test_empty_masks_make_no_nan(library):
    ours, _ = decoders(library)
    nn.init.zeros_(ours.mask_embed[-1].weight)
    nn.init.zeros_(ours.mask_embed[-1].bias)
    nn.init.zeros_(ours.pixel_decoder.mask_features.weight)
    ours.pixel_decoder.mask_features.bias.data.fill_(1.0)
    ours.mask_embed[-1].bias.data.fill_(-1.0)  # every logit is -CHANNELS: all masks are empty
    features = [f.requires_grad_() for f in pyramid()]
    prediction = ours(features, every_layer=True)
    assert (prediction.mask_logits[-1] == -CHANNELS).all()
    prediction.class_logits.sum().backward()
    assert torch.isfinite(prediction.class_logits).all()
    assert all(torch.isfinite(f.grad).all() for f in features if f.grad is not None)
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)


def test_semantic_scores_by_hand():
    """Two queries, two classes: class probabilities (1/2, 1/4 | 1/4) and (0, 0 | 1), mask probabilities 0.8 and 0.5."""
    classes = torch.tensor([[[0.5, 0.25, 0.25], [1e-30, 1e-30, 1.0]]]).log()
    masks = torch.tensor([math.log(4), 0.0]).view(1, 2, 1, 1)
    scores = semantic_scores(Prediction(classes[None], torch.eye(2)[None, None], masks))
    torch.testing.assert_close(scores.flatten(), torch.tensor([0.4, 0.2]))


def test_semantic_scores_stay_in_float32_under_autocast():
    """The matrix product too: in bfloat16 near ties between classes would fall either way."""
    masks = torch.randn(1, QUERIES, 6, 8).bfloat16().float()
    prediction = Prediction(torch.randn(1, 1, QUERIES, CLASSES + 1), torch.eye(QUERIES)[None, None], masks)
    exact = semantic_scores(prediction)
    with torch.autocast("cpu", torch.bfloat16):
        scores = semantic_scores(prediction)
    torch.testing.assert_close(scores, exact)


# -------------------------------------------------------------------------------------------------- points and targets

LINE = torch.tensor([0, 1e-9, 1e-3, 1 / 16, 0.25, 0.49, 0.5, 0.77, 15 / 16, 0.999, 1]).double()
GRID = torch.cartesian_prod(LINE, LINE)  # (P, 2): inside, on pixel centres, nearer to the border than these, on it


def sampled(masks: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w), (N, P, 2) -> (N, C, P), by grid_sample alone."""
    return F.grid_sample(masks, points[:, None] * 2 - 1, padding_mode="zeros", align_corners=False)[:, :, 0]


@pytest.mark.parametrize("size", [(8, 8), (5, 11), (1, 3)])
def test_corners_interpolate_as_grid_sample(size):
    """Two images, whose border holds what grid_sample takes for what is outside: 0."""
    images, points = torch.randn(2, *size, dtype=torch.double), torch.stack([GRID, GRID.flip(0)])
    index, weight = corners(points, *size)
    assert index.shape == weight.shape == (*points.shape[:2], 4)
    values = bordered(images, 0).flatten()[index]
    torch.testing.assert_close((values * weight).sum(2), sampled(images[:, None], points)[:, 0], **EXACT)


def test_pixels_are_sampled_as_maps_are():
    maps, points = torch.randn(2, 3, 5, 7, dtype=torch.double), torch.rand(2, 11, 2, dtype=torch.double)
    values = sample_pixels(bordered(maps, 0).flatten(2).mT, *corners(points, 5, 7))
    torch.testing.assert_close(values.mT, sample(maps, points), **EXACT)
    torch.testing.assert_close(values.mT, sampled(maps, points), **EXACT)


def test_targets_are_the_binary_masks_sampled():
    labels = random_labels(3)
    points = GRID.expand(3, -1, 2) * (1 - torch.rand(3, 1, 2) / 10)  # other points for each image
    masks = binary_masks(labels)
    torch.testing.assert_close(class_targets(labels, points).mT, sampled(masks, points), **EXACT)
    image, category = torch.tensor([2, 0, 0, 1]), torch.tensor([4, 0, 3, 1])
    points = points[[0, 1, 2, 0]]
    expected = sampled(masks[image, category][:, None], points)[:, 0]
    torch.testing.assert_close(sample_class_targets(labels, image, category, points), expected, **EXACT)


def class_targets(labels: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """`sample_targets` of labels, (B, P, K)."""
    classes = bordered(labels.clamp(max=CLASSES), CLASSES)
    return sample_targets(classes, *corners(points, *labels.shape[1:]), CLASSES)


def test_ignored_pixels_are_negatives_of_every_mask():
    """Half of the image is class 1, half ignored: a point amid the ignored half has target 0, on the seam 1/2."""
    labels = torch.full((1, 4, 8), IGNORE)
    labels[:, :, :4] = 1
    points = torch.tensor([[[0.25, 0.5], [0.75, 0.5], [0.5, 0.5]]], dtype=torch.double)
    targets = class_targets(labels, points)[0].T
    assert targets[1].tolist() == [1.0, 0.0, 0.5]
    assert (targets[[0, 2, 3, 4]] == 0).all()
    category = torch.tensor([1])
    assert sample_class_targets(labels, torch.tensor([0]), category, points)[0].tolist() == [1.0, 0.0, 0.5]


def test_the_loss_pushes_masks_away_from_ignored_pixels():
    """From logits of 0, the gradient is negative inside the class and positive in the ignored half."""
    labels = torch.full((1, 4, 8), IGNORE)
    labels[:, :, :4] = 1
    features = torch.zeros(1, 1, 4, 8, requires_grad=True)  # times an embedding of 1: the logits
    prediction = Prediction(torch.zeros(1, 1, 1, CLASSES + 1), torch.ones(1, 1, 1, 1), features)
    matches = heads.Matches(*torch.tensor([[0], [0], [0], [1]]), [1])
    units = loss_units(torch.tensor([1]), slice(None), 1)
    loss, _ = heads.mask_losses(prediction, labels, matches, units, num_points=512)
    (gradient,) = torch.autograd.grad(loss, features)
    assert (gradient[..., :3] < 0).all() and (gradient[..., 5:] > 0).all()


def test_classes_present_and_counted():
    labels = torch.tensor([[[0, 3, 3, IGNORE]], [[IGNORE] * 4], [[1, 2, 4, 0]]])
    present = classes_present(labels, CLASSES)
    assert present.int().tolist() == [[1, 0, 0, 1, 0], [0] * 5, [1, 1, 1, 0, 1]]
    assert mask_counts(labels, CLASSES).tolist() == [2, 0, 4]
    assert classes_present(labels.to(torch.uint8), CLASSES).equal(present)


# ----------------------------------------------------------------------------------------------------------- matching


def test_matching_costs_agree_with_a_plain_loop(monkeypatch):
    """Outputs, images, queries and classes one by one; other points for every output and image."""
    prediction, labels = random_prediction(3, outputs=2, queries=4), random_labels(3)
    points = torch.rand(2, 3, POINTS, 2, dtype=torch.double)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: points.view(shape))
    classes, masks = prediction.class_logits, prediction.mask_logits
    costs = matching_costs(prediction, labels, POINTS)
    assert costs.shape == (2, 3, 4, CLASSES)
    for output, image, query, k in np.ndindex(*costs.shape):
        where = points[output, image][None]
        logit = sampled(masks[output, image, query][None, None], where).flatten()
        target = sampled((labels[image] == k).double()[None, None], where).flatten()
        probability = logit.sigmoid()
        class_cost = -classes[output, image, query].softmax(0)[k]
        mask_cost = F.binary_cross_entropy_with_logits(logit, target)
        dice_cost = 1 - (2 * (probability * target).sum() + 1) / (probability.sum() + target.sum() + 1)
        expected = 2 * class_cost + 5 * mask_cost + 5 * dice_cost
        torch.testing.assert_close(costs[output, image, query, k], expected, **EXACT)


def as_pairs(matches: heads.Matches, output: int, image: int) -> list[tuple[int, int]]:
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


def test_match_without_any_target():
    matches = match(torch.randn(2, 2, 3, CLASSES), torch.zeros(2, CLASSES, dtype=torch.bool))
    *fields, of_image = matches
    assert all(field.shape == (0,) and field.dtype == torch.long for field in fields)
    assert of_image == [0, 0]


def test_non_finite_costs_never_reach_scipy(monkeypatch):
    """nan and inf lose against every finite cost; SciPy would raise on nan, and find inf infeasible."""
    def strict(costs):
        assert np.isfinite(costs).all()
        return linear_sum_assignment(costs)

    monkeypatch.setattr(heads, "linear_sum_assignment", strict)
    costs = torch.tensor([[math.nan, 9.0], [math.inf, 1.0], [3.0, 2.0]])[None, None]
    assert as_pairs(match(costs, torch.ones(1, 2, dtype=torch.bool)), 0, 0) == [(1, 1), (2, 0)]
    assert len(match(torch.full((1, 1, 3, 2), math.nan), torch.ones(1, 2, dtype=torch.bool)).query) == 2


class CallNames(TorchFunctionMode):
    """Names of all torch functions called, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


def test_one_copy_to_the_host_and_one_back():
    """For ten outputs and four images: `cpu` once, nothing that reads a value before it, `to` once after it."""
    costs, present = torch.randn(10, 4, QUERIES, CLASSES), torch.rand(4, CLASSES) < 0.7
    with CallNames() as calls:
        match(costs, present)
    copy = calls.names.index("cpu")
    waiting = {"cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"}
    assert [name for name in calls.names[:copy + 1] if name in waiting] == ["cpu"]
    assert [name for name in calls.names[copy + 1:] if name in ("cpu", "to", "cuda")] == ["to"]


class Copies(TorchDispatchMode):
    """Operations whose results lie on another device than all of their arguments."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before, after = ({t.device for t in tree_leaves(x) if isinstance(t, torch.Tensor)} for x in (args, result))
        if before and after and not before & after:
            self.names.append(str(function))
        return result


def test_nothing_but_matching_waits_for_the_device(monkeypatch):
    """All but `match` on fake CUDA tensors: these have no values, so that code which reads one raises."""
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="cuda")

    with FakeTensorMode():
        matches = heads.Matches(*empty(4, 7, dtype=torch.long), [3, 4])
        monkeypatch.setattr(heads, "match", lambda costs, present: matches)
        prediction = Prediction(empty(2, 2, QUERIES, CLASSES + 1), empty(2, 2, QUERIES, 10), empty(2, 10, 6, 8))
        labels = empty(2, 24, 32, dtype=torch.long)
        with Copies() as copies:
            losses = mask2former_losses(prediction, labels, POINTS)
        assert copies.names == []
        with Copies() as copies:  # the mode sees what it looks for
            losses["mask/0"].cpu()
        assert copies.names == ["aten._to_copy.default"]
    assert [loss.shape for loss in losses.values()] == [torch.Size()] * 6


# ------------------------------------------------------------------------------------------------- Mask2Former's losses


def library_targets(labels: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Binary masks and classes of each image. Theirs would leave ignored pixels out by lists; here they are zeros."""
    classes = [torch.tensor([k for k in range(CLASSES) if (image == k).any()], dtype=torch.long) for image in labels]
    return [m[c] for m, c in zip(binary_masks(labels), classes, strict=True)], classes


def library_losses(library, prediction: Prediction, labels: torch.Tensor, masks: float | None = None) -> dict:
    """Mask2FormerLoss under our names; the denominator of the mask losses may be given."""
    criterion = library.Mask2FormerLoss(library_config(), {}).double()
    criterion.empty_weight[-1] = 0.1  # not float32's 0.1
    if masks is not None:
        criterion.get_num_masks = lambda *_, **__: masks
    outputs = [{"masks_queries_logits": masks, "class_queries_logits": classes}
               for classes, masks in zip(prediction.class_logits, prediction.mask_logits, strict=True)]
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
    matches = match(matching_costs(prediction, labels, POINTS), classes_present(labels, CLASSES))
    matcher = library.Mask2FormerHungarianMatcher(2.0, 5.0, 5.0, POINTS)
    targets, target_classes = library_targets(labels)
    for output, (classes, masks) in enumerate(zip(prediction.class_logits, prediction.mask_logits, strict=True)):
        expected = matcher(masks, classes, targets, target_classes)
        for image, (queries, index) in enumerate(expected):
            pairs = list(zip(queries.tolist(), target_classes[image][index].tolist(), strict=True))
            assert as_pairs(matches, output, image) == pairs


def test_uncertain_points_agree_with_transformers(library):
    masks = torch.randn(7, 1, 6, 8)
    criterion = library.Mask2FormerLoss(library_config(), {})
    torch.manual_seed(1)
    expected = criterion.sample_points_using_uncertainty(masks, criterion.calculate_uncertainty, POINTS, 3, 0.75)
    torch.manual_seed(1)
    points = uncertain_points(masks, POINTS)
    assert points.shape == (7, POINTS, 2)
    for ours, theirs in zip(points.tolist(), expected.tolist(), strict=True):
        assert sorted(ours) == sorted(theirs)  # theirs, sorted by uncertainty, take longer and serve as well


@pytest.mark.parametrize("no_target", [False, True])
def test_losses_agree_with_transformers(library, halton_points, no_target):
    """Every term of every output, and the gradients, for one pair of images; in one case the second has no target."""
    prediction, labels = random_prediction(2), random_labels(2)
    if no_target:
        labels[1] = IGNORE
    inputs = [t.requires_grad_() for t in prediction]
    ours = mask2former_losses(prediction, labels, POINTS)
    theirs = library_losses(library, prediction, labels)
    assert list(ours) == list(theirs)
    torch.testing.assert_close(ours, theirs, **EXACT)
    gradients = [torch.autograd.grad(sum(losses.values()), inputs) for losses in (ours, theirs)]
    torch.testing.assert_close(*gradients, **EXACT)


def test_no_object_weighs_a_tenth():
    """One query matched, one not: (loss of class 2 + 0.1 loss of "no object") / 1.1."""
    logits = torch.randn(1, 1, 2, CLASSES + 1, dtype=torch.double)
    matches = heads.Matches(*torch.tensor([[0], [0], [1], [2]]), [1])
    loss = class_losses(logits, matches, loss_units(torch.tensor([1]), slice(None), num_queries=2))
    surprise = -logits.log_softmax(-1)[0, 0]
    torch.testing.assert_close(loss[0], (surprise[1, 2] + 0.1 * surprise[0, CLASSES]) / 1.1, **EXACT)


# -------------------------------------------------------------------------------------------------------------- units


def part(prediction: Prediction, mine: slice) -> Prediction:
    classes, embeds, features = prediction
    return Prediction(classes[:, mine], embeds[:, mine], features[mine])


def official_losses(library, prediction: Prediction, labels: torch.Tensor) -> dict:
    """Pairs of images, each on its device: class losses over the pair's own weights, masks over their mean per pair."""
    pairs = [slice(i, i + 2) for i in range(0, len(labels), 2)]
    masks = max(sum(min(len(c), QUERIES) for c in library_targets(labels)[1]) / len(pairs), 1)
    losses = [library_losses(library, part(prediction, pair), labels[pair], masks) for pair in pairs]
    return {name: sum(loss[name] for loss in losses) / len(pairs) for name in losses[0]}


def our_losses(prediction: Prediction, labels: torch.Tensor, size: int) -> dict:
    """The mean over calls of `size` images."""
    counts = mask_counts(labels, CLASSES)
    calls = [slice(i, i + size) for i in range(0, len(labels), size)]
    losses = [mask2former_losses(part(prediction, mine), labels[mine], POINTS, loss_units(counts, mine, QUERIES))
              for mine in calls]
    return {name: sum(loss[name] for loss in losses) / len(calls) for name in losses[0]}


@pytest.mark.parametrize("size", [16, 8, 4, 2, 1])
def test_any_layout_gives_the_official_losses(library, halton_points, size):
    """Eight devices with a pair each, or 16 images in calls of any size: the same totals."""
    prediction, labels = random_prediction(16, outputs=2), random_labels(16)
    labels[3] = IGNORE
    labels[8:10] = IGNORE
    labels[5] = labels[5].clamp(max=1)
    assert mask_counts(labels, CLASSES).unique().tolist() == [0, 2, 5]
    torch.testing.assert_close(
        our_losses(prediction, labels, size), official_losses(library, prediction, labels), **EXACT)


@pytest.mark.parametrize(("images", "size"), [(3, 1), (3, 3), (1, 1)])
def test_an_odd_image_is_a_pair_of_its_own(library, halton_points, images, size):
    prediction, labels = random_prediction(images, outputs=1), random_labels(images)
    torch.testing.assert_close(
        our_losses(prediction, labels, size), official_losses(library, prediction, labels), **EXACT)


def test_units_by_hand():
    """Images with 3, 1, 0, 12 masks and 9 queries: the last can match 9. Pairs weigh 4 + 1.4 and 9 + 0.9."""
    units = loss_units(torch.tensor([3, 1, 0, 12]), slice(1, 4), num_queries=9)
    assert units.class_weight.tolist() == pytest.approx([5.4, 9.9, 9.9])
    assert units.masks.item() == 13 / 2
    assert units.pairs == 1.5
    assert loss_units(torch.tensor([0, 0]), slice(None), 9).masks == 1


def test_without_units_a_call_is_its_own_batch(halton_points):
    prediction, labels = random_prediction(4, outputs=1), random_labels(4)
    losses = mask2former_losses(prediction, labels, POINTS)
    torch.testing.assert_close(losses, our_losses(prediction, labels, 4), **EXACT)


def test_an_all_ignored_batch_reaches_every_parameter():
    """Its mask losses are 0 and its class losses are not; no gradient is None, as DistributedDataParallel demands."""
    model = build_model("mask2former", "tiny", CLASSES, window=64).train()
    losses = model(torch.randn(2, 3, 64, 64), torch.full((2, 64, 64), IGNORE))
    assert all(value == 0 for name, value in losses.items() if name.startswith(("mask", "dice")))
    assert all(value > 0 for name, value in losses.items() if name.startswith("class"))
    losses["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_predictions_are_float32(halton_points, dtype):
    """Only the products that make the masks are in half precision; here these are exact, being with 0 and 1."""
    classes, labels = torch.randn(3, 2, QUERIES, CLASSES + 1), random_labels(2)
    embeds, features = torch.eye(QUERIES).expand(3, 2, -1, -1), torch.randn(2, QUERIES, 6, 8)
    low = Prediction(*(t.to(dtype) for t in (classes, embeds, features)))
    losses = mask2former_losses(low, labels, POINTS)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    exact = mask2former_losses(Prediction(*(t.double() for t in low)), labels, POINTS)
    torch.testing.assert_close(losses, exact, rtol=1e-4, atol=1e-5, check_dtype=False)


# ---------------------------------------------------------------------------------------------------- starting values


def assert_normal(weight: torch.Tensor, std: float) -> None:
    assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(weight.numel()))  # 7 standard errors
    assert weight.abs().max() > 2.5 * std  # a uniform of this deviation ends at 1.73


def assert_uniform(weight: torch.Tensor, bound: float) -> None:
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(weight.numel()))


@pytest.fixture(scope="module")
def fresh_head():
    torch.manual_seed(0)
    return Mask2Former(DIM * 4, CHANNELS, CLASSES, QUERIES * 10, num_heads=4, decoder_layers=2, decoder_ffn=80,
                       encoder_layers=2, encoder_ffn=96)


def test_both_transformers_start_xavier_normal(fresh_head):
    decoder = [p for p in fresh_head.layers.parameters() if p.dim() == 2]
    encoder = [p for n, p in fresh_head.pixel_decoder.layers.named_parameters() if ".ffn." in n and p.dim() == 2]
    assert (len(decoder), len(encoder)) == (2 * 6, 2 * 2)
    for weight in decoder + encoder:
        assert_normal(weight, math.sqrt(2 / sum(weight.shape)))


def test_deformable_attention_keeps_its_own_start(fresh_head):
    for layer in fresh_head.pixel_decoder.layers:
        attention = layer.attention
        assert (attention.sampling_offsets.weight == 0).all()
        assert (attention.attention_weights.weight == 0).all() and (attention.attention_weights.bias == 0).all()
        ring = attention.sampling_offsets.bias.view(4, 3, 4, 2)  # heads look right, down, left, up; 1 to 4 pixels far
        for head, direction in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
            for point in range(4):
                expected = torch.tensor(direction).float() * (point + 1)
                torch.testing.assert_close(ring[head, :, point], expected.expand(3, 2), rtol=0, atol=1e-5)
        for linear in (attention.value_proj, attention.output_proj):
            assert_uniform(linear.weight, math.sqrt(6 / (2 * CHANNELS)))
            assert (linear.bias == 0).all()


def test_embeddings_and_convolutions_of_mask2former_start_as_released(fresh_head):
    decoder = fresh_head.pixel_decoder
    for embedding in (fresh_head.query_feat, fresh_head.query_embed, fresh_head.level_embed, decoder.level_embed):
        assert_normal(embedding, 1.0)
    for conv, _ in decoder.inputs:
        assert_uniform(conv.weight, math.sqrt(6 / (4 * DIM + CHANNELS)))
        assert (conv.bias == 0).all()
    for conv in (decoder.lateral[0], decoder.output[0], decoder.mask_features):
        assert_uniform(conv.weight, math.sqrt(3 / conv.weight[0].numel()))
    assert (decoder.mask_features.bias == 0).all()
    for layer in fresh_head.layers:
        for attention in (layer.cross_attention, layer.self_attention):
            assert (attention.in_proj.bias == 0).all() and (attention.out_proj.bias == 0).all()


@pytest.mark.parametrize("head", [UperNet, FCN])
def test_upernet_starts_kaiming_normal_with_small_classifiers(head):
    module = head(DIM, CHANNELS, 2 * CLASSES, 0.1)
    for name, weight in module.named_parameters():
        if weight.dim() == 4 and not name.startswith("classifier"):
            assert_normal(weight, math.sqrt(2 / weight[:, 0].numel()))  # fan out: output channels times kernel area
    assert_normal(module.classifier.weight, 0.01)
    assert (module.classifier.bias == 0).all()
    assert module.dropout.p == 0.1
