"""3x3 convolutions with fewer multiplications than their definition asks for, and the same result up to rounding.

Reading order: winograd (4 multiplications for 9) -> Winograd, winograd_weight_gradient (for training) ->
conv3x3_of_enlarged (convolve first, enlarge later) -> enlarge (a transposed convolution as a matrix product).

The definition is `F.conv2d(x, weight, padding=1)`; the tests compare. Large models spend a seventh (Mask2Former) to two
thirds (UperNet) of their arithmetic in such convolutions.

Shapes: B batch, C channels in, O channels out, (h, w) a map, (H, W) an enlarged map. Maps (B, C, h, w) are
channels-last in memory: (B, h, w, C), on which matrix products work, is the same memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def winograd_pays(x: Tensor) -> bool:
    """Whether `winograd` is the faster way here: wide, large maps on a CPU, in float32."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    h, w = x.shape[2:]
    return x.shape[1] >= 512 and h * w >= 3600 and h % 2 == w % 2 == 0 and not torch.compiler.is_compiling()


class Winograd(torch.autograd.Function):
    """`winograd` for training. Both gradients are convolutions too, with as many products saved, and only x is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return winograd(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        to_x = winograd(grad, weight.flip(2, 3).transpose(0, 1)) if ctx.needs_input_grad[0] else None
        return to_x, winograd_weight_gradient(x, grad)


# How F(2x2, 3x3) makes a line's four factors of its three taps, (w0, w1, w2) -> u.
OF_TAPS = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def winograd(x: Tensor, weight: Tensor) -> Tensor:
    """The 3x3 convolution of x (B, C, h, w), h and w even, with weight (O, C, 3, 3): 2x2 results in 16 products, not 36
    (Lavin and Gray, CVPR 2016, F(2x2, 3x3)).

    In one dimension the results y0 = d0 w0 + d1 w1 + d2 w2 and y1 = d1 w0 + d2 w1 + d3 w2 take four products,
    m = [(d0 - d2) u0, (d1 + d2) u1, (d2 - d1) u2, (d1 - d3) u3], for y0 = m0 + m1 + m2 and y1 = m1 - m2 - m3. Here that
    is done along rows and along columns, and each of the 4x4 products is a matrix product over the channels.
    """
    B, C, h, w = x.shape
    O = len(weight)  # noqa: E741
    u = torch.einsum("pt,oct->poc", of_3x3_taps(weight), weight.flatten(2))  # (16, O, C)
    result = x.new_empty(B, h // 2, 2, w // 2, 2, O)
    factors = x.new_empty(4, 4, h // 2, w // 2, C)
    for image, y in zip(bordered_pixels(x), result, strict=True):  # one at a time: bounded memory
        winograd_factors(image, out=factors)
        m = torch.bmm(factors.view(16, -1, C), u.mT).view(4, 4, h // 2, w // 2, O)
        m[0].add_(m[1]).add_(m[2])
        m[1].sub_(m[2]).sub_(m[3])
        for i, line in enumerate(m[:2]):  # line: (4, h/2, w/2, O)
            torch.add(line[0], line[1], out=y[:, i, :, 0]).add_(line[2])
            torch.sub(line[1], line[2], out=y[:, i, :, 1]).sub_(line[3])
    return result.view(B, h, w, O).permute(0, 3, 1, 2)


def winograd_weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient for weight of `winograd(x, weight)`, given that for its result: (B, C, h, w), (B, O, h, w) ->
    (O, C, 3, 3). In one dimension the gradients of m are [y0, y0 + y1, y0 - y1, -y1] of those of y0 and y1."""
    (C, h, w), O = x.shape[1:], grad.shape[1]  # noqa: E741
    to_u = x.new_zeros(16, O, C)
    factors, to_m = x.new_empty(4, 4, h // 2, w // 2, C), x.new_empty(4, 4, h // 2, w // 2, O)
    for image, y in zip(bordered_pixels(x), grad.permute(0, 2, 3, 1), strict=True):  # y: (h, w, O)
        winograd_factors(image, out=factors)
        for i, line in enumerate(sums_of_two(y[::2], y[1::2])):  # line: (h/2, w, O)
            sums_of_two(line[:, ::2], line[:, 1::2], out=to_m[i])
        to_u.baddbmm_(to_m.view(16, -1, O).mT, factors.view(16, -1, C))
    return torch.einsum("pt,poc->oct", of_3x3_taps(x), to_u).unflatten(2, (3, 3))


def of_3x3_taps(like: Tensor) -> Tensor:
    """OF_TAPS along both axes: (16, 9)."""
    of_taps = like.new_tensor(OF_TAPS)
    return torch.einsum("ik,jl->ijkl", of_taps, of_taps).flatten(0, 1).flatten(1)


def bordered_pixels(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h + 2, w + 2, C), with zeros around."""
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))


def winograd_factors(image: Tensor, out: Tensor) -> None:
    """The 4x4 differences of each 4x4 pixels, two apart: (h + 2, w + 2, C) -> out (4, 4, h/2, w/2, C)."""
    h, w = image.shape[0] - 2, image.shape[1] - 2
    for i, line in enumerate(differences(*(image[k:h + k - 1:2] for k in range(4)))):  # line: (h/2, w + 2, C)
        differences(*(line[:, k:w + k - 1:2] for k in range(4)), out=out[i])


def differences(d0: Tensor, d1: Tensor, d2: Tensor, d3: Tensor, out: Tensor | None = None) -> Tensor:
    """Winograd's four combinations of four neighbours along an axis, each of one shape (...) -> (4, ...)."""
    out = d0.new_empty(4, *d0.shape) if out is None else out
    torch.sub(d0, d2, out=out[0])
    torch.add(d1, d2, out=out[1])
    torch.sub(d2, d1, out=out[2])
    torch.sub(d1, d3, out=out[3])
    return out


def sums_of_two(y0: Tensor, y1: Tensor, out: Tensor | None = None) -> Tensor:
    """The four combinations that lead from two results' gradients to four products', each (...) -> (4, ...)."""
    out = y0.new_empty(4, *y0.shape) if out is None else out
    out[0].copy_(y0)
    torch.add(y0, y1, out=out[1])
    torch.sub(y0, y1, out=out[2])
    torch.neg(y1, out=out[3])
    return out


def conv3x3_of_enlarged(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """`conv2d(resize(x, size), weight, padding=1)` with the channel products at the resolution of x.

    Bilinear enlargement and the channel product of a tap commute: conv(up(x)) = sum over taps of shift(up(W_tap x)).
    Along each axis, "enlarge, shift by the tap, add the three taps" is one matrix, so first the width grows, then the
    height. x (B, C, h, w), weight (O, C, 3, 3), size (H, W) -> (B, O, H, W).
    """
    B, _, h, w = x.shape
    O, (H, W) = len(weight), size  # noqa: E741
    across, down = enlarging_taps(w, W, like=x), enlarging_taps(h, H, like=x)
    x = x.permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)
    lines = []
    for row in weight.permute(2, 3, 0, 1).contiguous():  # the taps of one row, (3, O, C)
        taps = F.linear(x, row.flatten(0, 1)).view(B, h, w * 3, O)
        lines.append(across @ taps)  # (B, h, W, O)
    return (down @ torch.stack(lines, dim=2).view(B, h * 3, W * O)).view(B, H, W, O).permute(0, 3, 1, 2)


def enlarging_taps(n: int, size: int, like: Tensor) -> Tensor:
    """The matrix (size, 3 n) that enlarges an axis from n to `size` and adds its three taps, each moved to its place.

    Column 3 i + t is position i of the axis under tap t. A row of zeros stands for what zero padding adds at each end.
    """
    points = torch.eye(n, device=like.device, dtype=like.dtype)
    enlarge = F.interpolate(points[None], size, mode="linear", align_corners=False)[0].t()  # (size, n)
    padded = F.pad(enlarge, (0, 0, 1, 1))
    return torch.stack([padded[:-2], padded[1:-1], padded[2:]], dim=2).flatten(1)


def enlarge(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The transposed convolution of stride 2 with a 2x2 kernel, (B, C, h, w) and (C, O, 2, 2) -> (B, O, 2h, 2w), as a
    matrix product: every pixel makes 2x2 of its own. The backward pass is twice as fast on a CPU."""
    rows = weight.permute(2, 3, 1, 0).flatten(0, 2)  # (C, O, 2, 2) -> (4 O, C)
    x = F.linear(x.permute(0, 2, 3, 1), rows, None if bias is None else bias.repeat(4))  # (B, h, w, 4 O)
    x = x.unflatten(3, (2, 2, -1)).transpose(2, 3)  # (B, h, 2, w, 2, O)
    return x.flatten(1, 2).flatten(2, 3).permute(0, 3, 1, 2)
