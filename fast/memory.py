"""Memory on both its sides: less kept for the backward pass, and what is freed kept for the next layer."""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recomputed(function: Callable[..., T], *inputs: Tensor) -> T:
    """function(*inputs), keeping only these for the backward pass, which computes again what it needs, and no more.

    Of linear(gelu(x)) that is the GELU, which costs next to nothing, and not the product. `function` must not draw
    random numbers.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler makes such choices by itself
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def keep_freed_memory() -> None:
    """Have the C library keep what this process frees, where it can: a seventh off a training step on a CPU.

    Large tensors come and go in every layer; by default each is mapped anew, at a page fault for every 4 kB.
    """
    trim_threshold, mmap_max = -1, -4  # mallopt(3)
    with suppress(OSError, AttributeError):  # another system, another C library
        ctypes.CDLL(None).mallopt(mmap_max, 0)
        ctypes.CDLL(None).mallopt(trim_threshold, -1)
