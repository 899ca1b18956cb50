"""fast/convolutions.py against the definition, F.conv2d of a padded (and enlarged) map."""

import pytest
import torch
import torch.nn.functional as F

from fast import operators
from fast.convolutions import Winograd, conv3x3_of_enlarged, enlarge, winograd

SHAPES = [(1, 3, 2, 2), (2, 5, 6, 4), (3, 16, 10, 12)]


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def assert_same(fast: torch.Tensor, plain: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    """Values and the gradients of all inputs."""
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)
    cotangent = random(*plain.shape).detach()
    gradients = [torch.autograd.grad(y, inputs, cotangent) for y in (fast, plain)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_winograd_is_the_convolution(shape):
    inputs = random(*shape), random(7, shape[1], 3, 3)
    assert_same(Winograd.apply(*inputs), F.conv2d(*inputs, padding=1), inputs)


def test_winograd_in_float32_is_as_exact_as_the_convolution():
    inputs, cotangent = (random(1, 512, 60, 60), random(64, 512, 3, 3)), random(1, 64, 60, 60)
    exact = F.conv2d(*inputs, padding=1)
    low = [x.detach().float().requires_grad_() for x in inputs]
    fast = Winograd.apply(*low)
    gradients = torch.autograd.grad(fast, low, cotangent.float())
    expected = torch.autograd.grad(exact, inputs, cotangent)
    for ours, theirs in zip((fast, *gradients), (exact, *expected), strict=True):
        assert (ours - theirs).abs().max() / theirs.abs().max() < 2e-6


def test_wide_and_large_maps_alone_go_to_winograd(monkeypatch):
    """Not: narrow maps, odd sizes, a stride, no padding, a bias, float64, autocast."""
    calls = []
    monkeypatch.setattr("fast.convolutions.winograd", lambda x, w: calls.append(x.shape) or winograd(x, w))
    x, weight = torch.randn(1, 512, 60, 60), torch.randn(8, 512, 3, 3) / 64
    for args in ((x[:, :8], weight[:, :8], None, 1, 1), (x[:, :, :59], weight, None, 1, 1), (x, weight, None, 2, 1),
                 (x, weight), (x, weight, torch.ones(8), 1, 1), (x.double(), weight.double(), None, 1, 1)):
        assert operators.convolution(*args).equal(F.conv2d(*args))
    with torch.autocast("cpu", torch.bfloat16):
        operators.convolution(x, weight, padding=1)
    assert calls == []
    expected = F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(operators.convolution(x, weight, None, (1, 1), (1, 1)), expected, rtol=0, atol=1e-5)
    assert calls == [x.shape]


@pytest.mark.parametrize(("small", "large"), [((2, 3), (8, 12)), ((4, 4), (4, 8)), ((1, 1), (8, 8)), ((5, 3), (7, 11))])
def test_convolving_before_enlarging_changes_nothing(small, large):
    inputs = x, weight = random(2, 6, *small), random(5, 6, 3, 3)
    plain = F.conv2d(F.interpolate(x, large, mode="bilinear", align_corners=False), weight, padding=1)
    assert_same(conv3x3_of_enlarged(x, weight, large), plain, inputs)


@pytest.mark.parametrize("biases", [0, 1])
def test_enlarging_is_the_transposed_convolution(biases):
    inputs = random(2, 6, 3, 5), random(6, 4, 2, 2), *[random(4)] * biases
    assert_same(enlarge(*inputs, *[None] * (1 - biases)), F.conv_transpose2d(*inputs, stride=2), inputs)
    overlapping = random(2, 6, 3, 5), random(6, 4, 2, 2), None, 1
    assert operators.transposed_convolution(*overlapping).equal(F.conv_transpose2d(*overlapping))
