"""Less kept for the backward pass, at next to no cost in time."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recomputed(function: Callable[[Tensor], T], x: Tensor) -> T:
    """function(x), keeping only x for the backward pass, which computes again what it needs, and no more than it needs.

    Of linear(gelu(x)) that is the GELU, which costs next to nothing, and not the product. `function` must not draw
    random numbers.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler makes such choices by itself
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
