"""Attention with a learned bias for each relative position, quicker to gather, and trained on a CPU in less memory.

Reading order: gather_columns -> biases_gathered -> FusedAttention.

PyTorch's fused CPU kernel refuses a bias that wants a gradient; without it every block of a ViT keeps the
probabilities, an array (B, M, N, N), for the backward pass. On a GPU the memory-efficient kernel has that gradient.

Shapes: B images, M heads, N tokens, D channels of a head, R rows of a table: one for each relative position.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from fast.swap import Part
from model import Attention

PADDED = WeakTensorKeyDictionary()  # one index serves all blocks


def gather_columns(columns: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """`columns[:, index]` in a type: the biases of all pairs of tokens, (M, R) and index (N, N) -> (M, N, N).

    A gather along rows, 2 to 5 times as fast. The rows of the result start at multiples of 8 numbers, also after the
    cast: a GPU's attention kernel would copy another bias.
    """
    if index not in PADDED:
        with torch.inference_mode(False):  # a training step may use it too
            PADDED[index] = F.pad(index.clone(), (0, -index.shape[1] % 8))
    padded = PADDED[index]
    bias = columns.contiguous().gather(1, padded.flatten().expand(len(columns), -1)).to(dtype)
    return bias.view(-1, *padded.shape)[..., :index.shape[1]]


def biases_gathered(model: nn.Module, keep: bool = False) -> Part | None:
    """BEiT's position biases by `gather_columns`; with `keep`, for weights that do not change, once a block."""
    layers = [block.attn for block in model.backbone.blocks if type(block.attn) is Attention]

    def gathered(layer: Attention) -> Callable[[Tensor], Tensor]:
        kept: dict[tuple[int, torch.dtype], Tensor] = {}

        def position_bias(index: Tensor) -> Tensor:
            table, device = layer.relative_position_bias_table, index.device.type
            low = torch.is_autocast_enabled(device)
            key = id(index), torch.get_autocast_dtype(device) if low else table.dtype
            bias = kept[key] if key in kept else gather_columns(table.t(), index, key[1])
            return kept.setdefault(key, bias) if keep else bias

        return position_bias

    index = model.backbone.position_index
    swaps = [(layer, "position_bias", gathered(layer)) for layer in layers]
    return Part(swaps, lambda: layers[0].position_bias(index)) if layers else None


class FusedAttention(torch.autograd.Function):
    """softmax(query key^T / sqrt(D) + bias) value, (B, M, N, D) and a bias (1, M, N, N) that wants a gradient.

    Forward is PyTorch's fused kernel. Backward computes the probabilities again, a head at a time so that they stay in
    the cache, from the logarithms of the softmax's sums (FlashAttention, Dao et al., 2022).
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, log_sums = fused(query, key, value, attn_mask=bias)
        ctx.save_for_backward(query, key, value, bias, output, log_sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, bias, output, log_sums = ctx.saved_tensors
        scale, precise = query.shape[-1] ** -0.5, torch.promote_types(bias.dtype, torch.float32)
        to_query, to_key, to_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        to_bias = bias.new_empty(bias.shape)  # without the padding of `bias`
        row_sums = (grad.to(precise) * output).sum(-1, keepdim=True)  # (B, M, N, 1): taken off, as a softmax sums to 1
        for m in range(query.shape[1]):
            q, k, v, g = (x[:, m].to(precise) for x in (query, key, value, grad))  # (B, N, D)
            p = torch.baddbmm(bias[:, m].to(precise), q, k.mT, alpha=scale).sub_(log_sums[:, m, :, None]).exp_()
            to_scores = torch.bmm(g, v.mT).sub_(row_sums[:, m]).mul_(p)  # (B, N, N)
            to_value[:, m] = p.mT @ g
            to_query[:, m] = (to_scores @ k).mul_(scale)
            to_key[:, m] = (to_scores.mT @ q).mul_(scale)
            to_bias[0, m] = sum(to_scores[1:], start=to_scores[0])  # few images: faster than a reduction
        return to_query, to_key, to_value, to_bias
