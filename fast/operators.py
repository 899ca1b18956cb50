"""PyTorch's functions by quicker ways with the same result, on a CPU: `with FastOperators(): model(images)`.

Reading order: FastOperators -> the replacements, each of which says where it pays.

The model's text does not know of it: PyTorch hands every function that the model calls to the mode on top, by its name.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fast.attention import FusedAttention
from fast.convolutions import Winograd, enlarge, winograd_pays

# A mode costs the host 2 us for each function that the model calls: more than a ViT narrower than this can gain.
NARROW = 256


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile sees to the model: what it does not trace would break its graph."""
    return model._compiled_call_impl is not None


def pays(model: nn.Module) -> bool:
    """Whether a mode is worth its while: on a CPU, for a wide model that is not compiled. The quicker ways are a CPU's,
    and beside a GPU the host's time is short: the recipes of recompute.py add two fifths to it."""
    on_cpu = model.backbone.cls_token.device.type == "cpu"
    return on_cpu and model.config.embed_dim >= NARROW and not is_compiled(model)


def on_gpu(model: nn.Module) -> bool:
    """Whether each kernel's launch counts: on a GPU, without torch.compile."""
    return model.backbone.cls_token.device.type == "cuda" and not is_compiled(model)


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
    F.scaled_dot_product_attention: attention, F.conv2d: convolution, F.conv_transpose2d: transposed_convolution,
    torch.Tensor.softmax: softmax,
}
