"""PyTorch's functions by quicker ways with the same result, while a model runs: `with FastOperators(): model(images)`.

Reading order: FastOperators -> the replacements, each of which says where it pays.

The model's text does not know of it: PyTorch hands every function that the model calls to the mode on top, by its name.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fast.attention import FusedAttention, gather_columns
from fast.convolutions import Winograd, enlarge, winograd_pays

# A mode costs the host 2 us for each function that the model calls: more than a ViT narrower than this can gain.
NARROW = 256


def pays(model: nn.Module) -> bool:
    """Whether a mode is worth its while: not for a narrow model, nor for a compiled one, whose graph it would break."""
    return model.config.embed_dim >= NARROW and model._compiled_call_impl is None


class FastOperators(TorchFunctionMode):
    """Calls the replacement of a function where it pays, else the function itself."""

    def __torch_function__(self, function: Callable, types: Any, args: Sequence = (),
                           kwargs: dict | None = None) -> Any:
        replacement = REPLACEMENTS.get(function, function)
        return replacement(*args, **(kwargs or {}))


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *others: Any,
              **kwargs: Any) -> Tensor:
    """Scaled dot-product attention; on a CPU one bias for all images that wants a gradient goes to FusedAttention."""
    one_bias = (1, query.shape[1], query.shape[-2], key.shape[-2])
    if query.device.type == "cpu" and attn_mask is not None and attn_mask.requires_grad \
            and attn_mask.shape == one_bias and not (others or kwargs):
        return FusedAttention.apply(query, key, value, attn_mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, *others, **kwargs)


def reads_position_table(x: Tensor, index: Any) -> bool:
    """Whether `x[index]` is `columns[:, numbers]`, a matrix read by a matrix, as BEiT reads its position table."""
    return (x.dim() == 2 and isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None)
            and isinstance(index[1], Tensor) and index[1].dim() == 2 and index[1].dtype == torch.long)


def get_item(x: Tensor, index: Any) -> Tensor:
    """`x[index]`; BEiT's position table is read by a quicker gather."""
    return gather_columns(x, index[1]) if reads_position_table(x, index) else x[index]


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
                dilation: Any = 1, groups: int = 1) -> Tensor:
    """Two-dimensional convolution; a wide 3x3 one on a large map of a CPU goes to Winograd."""
    plain = all(pair in (1, (1, 1)) for pair in (stride, padding, dilation)) and bias is None and groups == 1
    if plain and weight.shape[2:] == (3, 3) and winograd_pays(input):
        return Winograd.apply(input, weight)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def transposed_convolution(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
                           output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Tensor:
    """Transposed convolution; on a CPU one whose 2x2 blocks do not overlap is a matrix product."""
    plain = all(pair in (0, (0, 0)) for pair in (padding, output_padding)) and dilation in (1, (1, 1)) and groups == 1
    if plain and input.device.type == "cpu" and weight.shape[2:] == (2, 2) and stride in (2, (2, 2)):
        return enlarge(input, weight, bias)
    return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)


def softmax(scores: Tensor, dim: int, *others: Any, **kwargs: Any) -> Tensor:
    """Softmax; without gradient, over a last axis shorter than a vector register, by its definition: PyTorch's is five
    times as slow there on a CPU. With gradient PyTorch's keeps less."""
    if scores.device.type == "cpu" and dim in (-1, scores.dim() - 1) and scores.shape[-1] <= 16 \
            and scores.is_floating_point() and not (torch.is_grad_enabled() or others or kwargs):
        exponentials = (scores - scores.amax(-1, keepdim=True)).exp_()
        return exponentials.div_(exponentials.sum(-1, keepdim=True))
    return scores.softmax(dim, *others, **kwargs)


REPLACEMENTS: dict[Callable, Callable] = {
    F.scaled_dot_product_attention: attention, torch.Tensor.__getitem__: get_item, F.conv2d: convolution,
    F.conv_transpose2d: transposed_convolution, torch.Tensor.softmax: softmax,
}
