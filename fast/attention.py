"""Attention with a learned bias for each relative position, trained on a CPU without keeping it.

Read: gather_bias -> plain_attention (the definition) -> biased_attention (chooses) -> FusedBiasedAttention.

PyTorch's fused CPU kernel refuses a bias that wants a gradient; without it every block of a ViT keeps the bias and the
probabilities, two arrays (B, M, N, N), for the backward pass. On a GPU the memory-efficient kernel has that gradient.

Shapes: B images, M heads, N tokens, D channels of a head, R rows of a table: one for each relative position.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_bias(table: Tensor, index: Tensor) -> Tensor:
    """Each pair of tokens gets its row of the table: (R, M) and index (N, N) -> (1, M, N, N)."""
    columns = table.t().contiguous()  # a gather along rows: 2-5x faster than table[index]
    index = F.pad(index, (0, -len(index) % 8))  # a GPU kernel copies a bias whose rows are not aligned to 8 numbers
    bias = columns.gather(1, index.flatten().expand(len(columns), -1)).view(1, -1, *index.shape)
    return bias[..., :len(index)]


def plain_attention(query: Tensor, key: Tensor, value: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(D) + bias) value: (B, M, N, D), table (R, M), index (N, N) -> (B, M, N, D)."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=gather_bias(table, index).to(query.dtype))


def biased_attention(query: Tensor, key: Tensor, value: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """`plain_attention`, or on a CPU, with gradient, what keeps less and is faster; GPUs and compilers do as well."""
    if query.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return FusedBiasedAttention.apply(query, key, value, table, index)
    return plain_attention(query, key, value, table, index)


class FusedBiasedAttention(torch.autograd.Function):
    """Forward is PyTorch's fused kernel. Backward gathers the bias and computes the probabilities again, a head at a
    time so that both stay in the cache, from the logarithms of the softmax's sums (FlashAttention, Dao et al. 2022)."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, table: Tensor, index: Tensor) -> Tensor:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, log_sums = fused(query, key, value, attn_mask=gather_bias(table, index).to(query.dtype))
        ctx.save_for_backward(query, key, value, table, index, output, log_sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, table, index, output, log_sums = ctx.saved_tensors
        scale, bias, index = query.shape[-1] ** -0.5, gather_bias(table, index), index.flatten()
        to_query, to_key, to_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        to_bias = bias.new_empty(bias.shape[1:])  # (M, N, N), without the padding of `bias`
        along = (grad * output).sum(-1, keepdim=True)  # (B, M, N, 1): what the softmax's sum to 1 takes off
        for m in range(query.shape[1]):
            q, k, v, g = (x[:, m].to(bias.dtype) for x in (query, key, value, grad))  # (B, N, D)
            p = torch.baddbmm(bias[:, m], q, k.mT, alpha=scale).sub_(log_sums[:, m, :, None]).exp_()  # (B, N, N)
            to_scores = torch.bmm(g, v.mT).sub_(along[:, m]).mul_(p)
            to_value[:, m] = p.mT @ g
            to_query[:, m] = (to_scores @ k).mul_(scale)
            to_key[:, m] = (to_scores.mT @ q).mul_(scale)
            to_bias[m] = sum(to_scores[1:], start=to_scores[0])  # few images: faster than a reduction
        to_columns = table.new_zeros(table.shape[::-1])  # (M, R)
        to_columns.scatter_add_(1, index.expand(len(to_columns), -1), to_bias.flatten(1))
        return to_query, to_key, to_value, to_columns.t(), None
