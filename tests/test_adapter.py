"""The adapter against loops and formulas written out plainly, part by part, and a whole model under autocast.

Reading order: token_layout -> SpatialPrior -> Injector -> ConvFFN -> Extractor -> Interaction -> ViTAdapter -> starts.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import noise, randomized
from torch import Tensor, nn

from adapter import ConvFFN, Extractor, Injector, Interaction, SpatialPrior, ViTAdapter, to_map, token_layout

EXACT = {"rtol": 1e-12, "atol": 1e-12}
DIM, HEADS = 16, 4
GRID = (4, 6)  # of the ViT: an image of 64 x 96
LEVELS = [(8, 12), (4, 6), (2, 3)]
TOKENS, PYRAMID = 24, 96 + 24 + 6


pytestmark = pytest.mark.usefixtures("seed")


def tokens(count: int) -> Tensor:
    return torch.randn(2, count, DIM, dtype=torch.double)


def layout():
    return token_layout(*GRID, like=torch.zeros(1).double())


# ------------------------------------------------------------------------------------------------------------ layout


def test_points_are_pixel_centres_as_x_and_y():
    place = token_layout(2, 4, like=torch.zeros(1))
    assert place.vit_grid == (2, 4)
    assert place.pyramid_grids == ((4, 8), (2, 4), (1, 2))
    expected = [(x, y) for y in (0.25, 0.75) for x in (0.125, 0.375, 0.625, 0.875)]  # row by row
    assert place.vit_points.tolist() == [list(point) for point in expected]
    assert to_map(place.vit_points[None], (2, 4))[0, 0].tolist() == [[0.125, 0.375, 0.625, 0.875]] * 2
    assert place.pyramid_points.shape == (32 + 8 + 2, 2)
    assert place.pyramid_points[[0, 1, 8]].tolist() == [[1 / 16, 1 / 8], [3 / 16, 1 / 8], [1 / 16, 3 / 8]]
    assert place.pyramid_points[32:40].equal(place.vit_points)
    assert place.pyramid_points[40:].tolist() == [[0.25, 0.5], [0.75, 0.5]]


def test_points_keep_float32_in_any_model():
    """As in the released code; in bfloat16 two neighbours of a wide grid would be one point."""
    for dtype in (torch.float64, torch.bfloat16):
        assert token_layout(2, 4, like=torch.zeros(1, dtype=dtype)).vit_points.dtype == torch.float32


# -------------------------------------------------------------------------------------------------------- SpatialPrior


def test_spatial_prior_is_a_stem_and_three_convolutions():
    prior = randomized(SpatialPrior(channels=3, dim=DIM)).train()
    images = torch.randn(2, 3, 32, 64, dtype=torch.double)
    c4, levels = prior(images)

    modules = [m for m in prior.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    x, maps = images, []
    for i, stride in enumerate([2, 1, 1, 2, 2, 2]):
        conv, norm = modules[2 * i:2 * i + 2]
        x = F.conv2d(x, conv.weight, stride=stride, padding=1)
        x = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True).relu()
        if i == 2:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        if i >= 2:
            maps.append(x)
    assert [m.shape[1:] for m in maps] == [(3, 8, 16), (6, 4, 8), (12, 2, 4), (12, 1, 2)]
    expected_c4, *expected = [
        torch.einsum("bchw,oc->bohw", m, fc.weight[:, :, 0, 0]) + fc.bias[:, None, None]
        for m, fc in zip(maps, (prior.fc1, prior.fc2, prior.fc3, prior.fc4), strict=True)]
    torch.testing.assert_close(c4, expected_c4, **EXACT)
    for level, m in zip(levels, expected, strict=True):
        torch.testing.assert_close(level, m.flatten(2).transpose(1, 2), **EXACT)


# -------------------------------------------------------------------------------------------- Injector, Extractor, FFN


def test_injector_is_scaled_attention_of_normed_tokens():
    injector = randomized(Injector(DIM, HEADS))
    x, pyramid, place = tokens(TOKENS), tokens(PYRAMID), layout()
    query = F.layer_norm(x, (DIM,), injector.query_norm.weight, injector.query_norm.bias, 1e-6)
    value = F.layer_norm(pyramid, (DIM,), injector.feat_norm.weight, injector.feat_norm.bias, 1e-6)
    attention = injector.attn(query, place.vit_points, value, LEVELS)
    torch.testing.assert_close(injector(x, pyramid, place), x + injector.gamma * attention, **EXACT)


def test_conv_ffn_convolves_each_level_by_itself():
    """Depth-wise: a channel meets no other between the linear layers, a level no other at all."""
    ffn = randomized(ConvFFN(DIM, 8))
    pyramid, expected, start = tokens(PYRAMID), [], 0
    hidden = pyramid @ ffn.fc1.weight.T + ffn.fc1.bias
    for h, w in LEVELS:
        level = hidden[:, start:start + h * w].transpose(1, 2).reshape(2, 8, h, w)
        start += h * w
        convolved = F.conv2d(level, ffn.dwconv.weight, ffn.dwconv.bias, padding=1, groups=8)
        expected.append(convolved.flatten(2).transpose(1, 2))
    x = torch.cat(expected, dim=1)
    x = x * (1 + torch.erf(x / math.sqrt(2))) / 2  # GELU, not its approximation
    torch.testing.assert_close(ffn(pyramid, LEVELS), x @ ffn.fc2.weight.T + ffn.fc2.bias, **EXACT)


def make_extractor(drop_path: float) -> Extractor:
    torch.manual_seed(0)
    return randomized(Extractor(DIM, HEADS, drop_path)).train()


def test_extractor_is_attention_then_feed_forward():
    extractor, x, pyramid, place = make_extractor(0.0), tokens(TOKENS), tokens(PYRAMID), layout()
    query = F.layer_norm(pyramid, (DIM,), extractor.query_norm.weight, extractor.query_norm.bias, 1e-6)
    value = F.layer_norm(x, (DIM,), extractor.feat_norm.weight, extractor.feat_norm.bias, 1e-6)
    attended = pyramid + extractor.attn(query, place.pyramid_points, value, [GRID])
    normed = F.layer_norm(attended, (DIM,), extractor.ffn_norm.weight, extractor.ffn_norm.bias, 1e-6)
    expected = attended + extractor.ffn(normed, LEVELS)
    torch.testing.assert_close(extractor(pyramid, x, place), expected, **EXACT)
    # Stochastic depth drops the feed-forward path only. At rate 1/2 it counts double or not at all, image by image.
    torch.testing.assert_close(make_extractor(1.0)(pyramid, x, place), attended, **EXACT)
    halved, factors = make_extractor(0.5), set()
    for _ in range(8):
        factor = (halved(pyramid, x, place) - attended) / (expected - attended)
        assert ((factor - factor[:, :1, :1]).abs() < 1e-6).all()
        factors |= {tuple(factor[:, 0, 0].round(decimals=6).abs().tolist())}
    assert {n for pair in factors for n in pair} == {0.0, 2.0} and factors & {(0.0, 2.0), (2.0, 0.0)}


# --------------------------------------------------------------------------------------------- Interaction, ViTAdapter


def test_the_class_token_takes_part_in_the_vit_only():
    """The blocks get it in front of the injected tokens; injector and extractor never see it."""
    interaction = randomized(Interaction(DIM, HEADS, 0.0, num_extractors=1))
    x, pyramid, cls_token, place = tokens(TOKENS), tokens(PYRAMID), tokens(1), layout()
    seen = []

    def run_blocks(sequence: Tensor) -> Tensor:
        seen.append(sequence)
        return sequence + torch.arange(1, TOKENS + 2)[:, None]  # tells which token is which

    new_cls, new_x, new_pyramid = interaction(cls_token, x, pyramid, run_blocks, place)
    injected = interaction.injector(x, pyramid, place)
    assert seen[0].equal(torch.cat([cls_token, injected], dim=1))
    assert new_cls.equal(cls_token + 1)
    assert new_x.equal(injected + torch.arange(2, TOKENS + 2)[:, None])
    assert new_pyramid.equal(interaction.extractors[0](pyramid, new_x, place))


def make_adapter() -> ViTAdapter:
    return randomized(ViTAdapter(DIM, spm_channels=4, num_heads=HEADS))


def test_the_last_interaction_has_three_extractors_one_after_another():
    interactions = make_adapter().interactions
    assert [len(interaction.extractors) for interaction in interactions] == [1, 1, 1, 3]
    x, pyramid, place = tokens(TOKENS), tokens(PYRAMID), layout()
    _, x, actual = interactions[-1](tokens(1), x, pyramid, lambda sequence: sequence, place)
    for extractor in interactions[-1].extractors:
        pyramid = extractor(pyramid, x, place)
    assert actual.equal(pyramid)


def test_merge_adds_the_vits_maps_level_by_level():
    """The first interaction's tokens, four times as large, join f4; the last's, half as large, f32."""
    adapter, place = make_adapter(), layout()
    c4 = torch.randn(2, DIM, 16, 24, dtype=torch.double)
    pyramid, vit_maps = tokens(PYRAMID), [torch.randn(2, DIM, *GRID, dtype=torch.double) for _ in range(4)]
    outputs = adapter.merge(c4, pyramid, vit_maps, place)
    assert [f.shape[2:] for f in outputs] == [(16, 24), (8, 12), (4, 6), (2, 3)]

    c8, c16, c32 = (pyramid[:, s].transpose(1, 2) for s in (slice(0, 96), slice(96, 120), slice(120, None)))
    c8, c16, c32 = c8.reshape(2, DIM, 8, 12), c16.reshape(2, DIM, 4, 6), c32.reshape(2, DIM, 2, 3)
    up = torch.einsum("bchw,coij->bohiwj", c8, adapter.up.weight).reshape(2, DIM, 16, 24)  # 2x2 blocks side by side
    c4 = c4 + up + adapter.up.bias[:, None, None]
    x4, x8 = (F.interpolate(x, scale_factor=s, mode="bilinear") for x, s in ((vit_maps[0], 4), (vit_maps[1], 2)))
    x32 = F.avg_pool2d(vit_maps[3], 2)  # bilinear at one half: the mean of 2 x 2
    sums = (c4 + x4, c8 + x8, c16 + vit_maps[2], c32 + x32)
    for f, total, norm in zip(outputs, sums, adapter.norms, strict=True):
        mean, variance, scale, shift = (x[:, None, None] for x in (
            norm.running_mean, norm.running_var, norm.weight, norm.bias))
        expected = (total - mean) / (variance + 1e-5).sqrt() * scale + shift
        torch.testing.assert_close(f, expected, **EXACT)


def test_forward_joins_the_parts_in_order():
    """Level embeddings on the three levels, four stages in turn, each stage's tokens merged into its own map."""
    adapter, place = make_adapter(), layout()
    images, cls_token, x = torch.randn(2, 3, 64, 96, dtype=torch.double), tokens(1), tokens(TOKENS)
    stages = [lambda sequence, i=i: sequence * (i + 1) for i in range(4)]
    outputs = adapter(images, cls_token, x, stages)
    assert outputs._fields == ("f4", "f8", "f16", "f32")

    c4, levels = adapter.spatial_prior(images)
    pyramid = torch.cat([levels[i] + adapter.level_embed[i] for i in range(3)], dim=1)
    vit_maps = []
    for i, interaction in enumerate(adapter.interactions):
        cls_token, x, pyramid = interaction(cls_token, x, pyramid, stages[i], place)
        vit_maps.append(x.transpose(1, 2).reshape(2, DIM, *GRID))
    for actual, expected in zip(outputs, adapter.merge(c4, pyramid, vit_maps, place), strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)


# ----------------------------------------------------------------------------------------------------- starting values


def test_starting_values():
    """Linear layers truncated normal 0.02, convolutions by their fan-out, deformable attention by its own rule."""
    adapter = ViTAdapter(128, spm_channels=32, num_heads=4)
    attention = {id(m) for i in adapter.interactions for a in [i.injector.attn, *(e.attn for e in i.extractors)]
                 for m in a.modules()}
    linears = [m for m in adapter.modules() if isinstance(m, nn.Linear) and id(m) not in attention]
    assert len(linears) == 2 * 6  # two in each ConvFFN
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.06)
        assert (linear.bias == 0).all()
    convolutions = [m for m in adapter.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(convolutions) == 10 + 6 + 1
    for conv in convolutions:
        fan_out = conv.kernel_size[0] ** 2 * conv.out_channels / conv.groups
        tolerance = 5 / math.sqrt(conv.weight.numel())  # seven standard errors
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=tolerance)
        assert conv.bias is None or (conv.bias == 0).all()
    assert adapter.level_embed.std().item() == pytest.approx(1, rel=0.2)


def test_deformable_attention_starts_by_its_own_rule():
    """Offset and attention weights 0, biases on a ring; the values of half the width are xavier uniform."""
    for interaction in ViTAdapter(64, spm_channels=4, num_heads=4).interactions:
        for attn in (interaction.injector.attn, *(e.attn for e in interaction.extractors)):
            assert not attn.sampling_offsets.weight.any() and attn.sampling_offsets.bias.abs().max() == 4
            assert attn.value_proj.weight.shape == (32, 64)
            assert attn.value_proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 96), rel=0.02)


# ----------------------------------------------------------------------------------------------- a model under autocast


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected).abs().mean() / expected.abs().mean()).item()


@pytest.mark.parametrize("head", ["mask2former", "upernet"])
def test_bfloat16_autocast_is_near_float32(golden_model, head):
    """Features and scores with the golden weights: 8 bits of mantissa through 8 blocks, a pyramid and a head."""
    model, images = golden_model(head).float(), noise("image", 2, 3, 96, 96).float()
    with torch.no_grad():
        exact, exact_scores = model.features(images), model(images)
        with torch.autocast("cpu", torch.bfloat16):
            features, scores = model.features(images), model(images)
    for feature, expected in zip(features, exact, strict=True):
        assert torch.isfinite(feature).all()
        assert relative_error(feature, expected) < 0.015
    assert relative_error(scores, exact_scores) < 0.06  # a mask that changes side moves more than rounding
