"""convolutions.py against the definition, F.conv2d of a padded (and enlarged) map."""

import pytest
import torch
import torch.nn.functional as F

from fast import convolutions
from fast.convolutions import Conv3x3, Winograd, conv3x3_of_enlarged, winograd


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 5, 6, 4), (3, 16, 10, 12)])
def test_winograd_is_the_convolution(shape):
    x, weight = random(*shape), random(7, shape[1], 3, 3)
    torch.testing.assert_close(winograd(x, weight), F.conv2d(x, weight, padding=1), rtol=0, atol=1e-12)


def test_winograd_in_float32_is_as_exact_as_the_convolution():
    x, weight = random(1, 512, 60, 60), random(64, 512, 3, 3)
    exact = F.conv2d(x, weight, padding=1)
    error = (winograd(x.float(), weight.float()) - exact).abs().max() / exact.abs().max()
    assert error < 2e-6


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 5, 6, 4), (3, 16, 10, 12)])
def test_winograd_has_the_gradients_of_the_convolution(shape):
    x, weight = random(*shape).requires_grad_(), random(7, shape[1], 3, 3).requires_grad_()
    plain, fast = F.conv2d(x, weight, padding=1), Winograd.apply(x, weight)
    cotangent = random(*plain.shape)
    expected = torch.autograd.grad(plain, (x, weight), cotangent)
    torch.testing.assert_close(torch.autograd.grad(fast, (x, weight), cotangent), expected, rtol=0, atol=1e-11)


def test_winograds_gradients_in_float32_are_as_exact_as_the_convolutions():
    inputs, cotangent = (random(1, 512, 60, 60), random(64, 512, 3, 3)), random(1, 64, 60, 60)
    for x in inputs:
        x.requires_grad_()
    exact = torch.autograd.grad(F.conv2d(*inputs, padding=1), inputs, cotangent)
    low = [x.detach().float().requires_grad_() for x in inputs]
    fast = torch.autograd.grad(Winograd.apply(*low), low, cotangent.float())
    for gradient, expected in zip(fast, exact, strict=True):
        assert (gradient - expected).abs().max() / expected.abs().max() < 2e-6


def test_conv3x3_takes_the_fast_way_for_wide_maps_only(monkeypatch):
    calls = []
    monkeypatch.setattr(convolutions, "winograd", lambda x, weight: calls.append(x.shape) or winograd(x, weight))
    wide, narrow = Conv3x3(512, 8), Conv3x3(8, 8)
    x = random(1, 512, 60, 60, dtype=torch.float32)
    expected = F.conv2d(x, wide.weight, padding=1)
    torch.testing.assert_close(wide(x), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(wide(x), expected, rtol=0, atol=1e-5)
        assert calls == [x.shape] * 2
        narrow(x[:, :8])
        wide(x[:, :, :59])
        with torch.autocast("cpu", torch.bfloat16):
            wide(x)
    assert len(calls) == 2


@pytest.mark.parametrize("small, large", [((2, 3), (8, 12)), ((4, 4), (4, 8)), ((1, 1), (8, 8)), ((5, 3), (7, 11))])
def test_convolving_before_enlarging_changes_nothing(small, large):
    x, weight = random(2, 6, *small).requires_grad_(), random(5, 6, 3, 3).requires_grad_()
    plain = F.conv2d(F.interpolate(x, large, mode="bilinear", align_corners=False), weight, padding=1)
    fast = conv3x3_of_enlarged(x, weight, large)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)
    cotangent = random(*plain.shape)
    expected = torch.autograd.grad(plain, (x, weight), cotangent)
    for gradient, other in zip(torch.autograd.grad(fast, (x, weight), cotangent), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-11)
