"""Batch norm over the images of all processes, on any backend.

Reading order: global_moments -> SyncBatchNorm2d -> convert_sync_batchnorm.

`torch.nn.SyncBatchNorm` is for GPUs only, and its search for empty inputs makes the host wait three times a layer. Here
a forward pass is one exchange of 2C + 1 numbers and a backward pass one of 2C: the host never waits, on any backend.

Shapes: B images of this process, C channels, h x w pixels, P processes.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_OVER = (0, 2, 3)  # the axes that are averaged: images, rows, columns


def global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and number of values () a channel over the images (B, C, h, w) of all processes.

    The processes may hold different numbers of images, none included. What travels is each one's mean and variance: a
    sum of squares would lose the variance of a channel whose mean is large (Chan, Golub and LeVeque, 1983).
    """
    count, dtype = x.numel() // x.shape[1], torch.promote_types(x.dtype, torch.float32)
    mean, variance = x.new_zeros(2, x.shape[1], dtype=dtype)
    if x.dtype != dtype and count > 1:
        # No float32 copy of a 16-bit map: it is twice its size. With momentum 1 PyTorch's kernel, which computes in
        # float32, puts the moments of these images in place of running ones. Its variance is the unbiased one.
        F.batch_norm(x, mean, variance, training=True, momentum=1.0)
        variance *= (count - 1) / count
    elif count:
        variance, mean = torch.var_mean(x.to(dtype), _OVER, correction=0)
    rows = mean.new_zeros(dist.get_world_size(), 2 * len(mean) + 1)
    rows[dist.get_rank()] = torch.cat([mean, variance, mean.new_full((1,), count)])
    dist.all_reduce(rows)  # plus zeros: everybody's row. Gathering into one tensor has another name from 2.13 on
    means, variances, counts = rows.split([len(mean), len(mean), 1], 1)  # (P, C), (P, C), (P, 1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return mean, (counts * (variances + (means - mean) ** 2)).sum(0) / total, total


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, where mean and variance depend on every process's x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        mean, variance, count = global_moments(x)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        if x.numel():  # for fixed mean and variance; PyTorch's kernels compute in float32 and leave 16-bit maps so
            grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True])
        else:
            grad_x, grad_weight, grad_bias = map(torch.zeros_like, (x, weight, weight))
        sums = torch.stack([grad_weight, grad_bias])  # a copy: DDP averages each process's share like other gradients
        dist.all_reduce(sums)
        # What mean and variance add: -(mean(grad) + x_hat mean(grad x_hat)) weight / std, itself a batch norm of x.
        factors = sums / -count * weight * (variance + ctx.eps).rsqrt()
        grad_x += F.batch_norm(x, mean, variance, *factors, training=False, eps=ctx.eps)
        return grad_x, grad_weight, grad_bias, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, same parameters and buffers, whose training statistics are over the images of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images (B, C, h, w); every process must call it, each with its own B."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        y, mean, variance, count = _Normalize.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)  # unbiased, as in nn.BatchNorm2d
        return y


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Turn every `nn.BatchNorm2d` inside `module` into a `SyncBatchNorm2d`, in place; returns `module`."""
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SyncBatchNorm2d  # same tensors: names, optimizer and state dict notice nothing
    return module
