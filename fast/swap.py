"""Parts of a model that run by another text inside a context, if both texts agree.

Reading order: Part -> swapped -> agree -> agreeing.

A fork changes the plain text, and then the text that stands beside it must not win in silence. So before a model's
first use both are run on a small example; where they differ the plain text stays, with one warning.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from common import eval_mode


class Part(NamedTuple):
    """What runs by another text, and a small example, a function of nothing, whose result must stay the same."""

    swaps: Sequence[tuple[Any, str, Callable]]  # owner, name of its function, the other text
    example: Callable[[], Any]


Builder = Callable[[nn.Module], Part | None]  # None: this model has no such part


LOCK = threading.RLock()
OPEN: dict[tuple[int, str], tuple[int, Any]] = {}  # owner, name -> contexts that need the swap, what was there before


@contextmanager
def swapped(parts: Sequence[Part]) -> Iterator[None]:
    """Inside, the parts run by their other text, until the last of several threads has left.

    The text lies in the owner's own dictionary: state dicts never differ.
    """
    swaps = [swap for part in parts for swap in part.swaps]
    with LOCK:
        for owner, name, function in swaps:
            number, before = OPEN.get((id(owner), name), (0, vars(owner).get(name)))
            OPEN[id(owner), name] = number + 1, before
            if number == 0:
                vars(owner)[name] = function
    try:
        yield
    finally:
        with LOCK:
            for owner, name, _ in swaps:
                number, before = OPEN.pop((id(owner), name))
                if number > 1:
                    OPEN[id(owner), name] = number - 1, before
                elif before is None:  # it was the class's
                    del vars(owner)[name]
                else:
                    vars(owner)[name] = before


def same_points(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """In place of `torch.rand`, which makes all random points: the same ones for every mask and image."""
    points = torch.empty(shape[-2:], dtype=torch.float64).uniform_(generator=torch.Generator().manual_seed(0))
    return points.to(device, dtype).expand(shape).clone()


def agree(model: nn.Module, build: Builder) -> bool | None:
    """Whether the example gives the same numbers by both texts, to rounding; None where there is nothing to compare.

    Nothing of the model changes, and no random state.
    """
    results = []
    try:
        with torch.no_grad(), torch.autocast(model.backbone.cls_token.device.type, enabled=False):
            if (part := build(model)) is None:
                return None
            for parts in ([], [part]):
                with eval_mode(model), swapped(parts), patch.object(torch, "rand", same_points):
                    results.append(tree_leaves(part.example()))
        return len(results[0]) == len(results[1]) and all(map(close, *results))
    except Exception:  # of any kind: a fork may have put anything there
        return False


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding, relative to the largest entry."""
    return a.shape == b.shape and bool((a - b).abs().max() <= max(1e-3, 8 * torch.finfo(a.dtype).eps) * a.abs().max())


VERDICTS: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()  # model -> name of a builder -> agrees


def agreeing(model: nn.Module, builders: Sequence[Builder]) -> list[Part]:
    """The parts of this model whose two texts agree, found out at their first use; the others are named once."""
    verdicts, parts = VERDICTS.setdefault(model, {}), []
    with LOCK:  # one thread compares; others wait for what it finds
        for build in builders:
            name = build.__name__
            if name not in verdicts and (verdict := agree(model, build)) is not None:
                verdicts[name] = verdict
                if not verdict:
                    warnings.warn(f"{name} of fast/ gives other numbers than the plain text (was that changed?): the "
                                  "plain text is used", stacklevel=2)
            if verdicts.get(name) and (part := build(model)):
                parts.append(part)
    return parts


def example_of(model: nn.Module, *shape: int) -> Tensor:
    """Normal numbers, the same at every call, of the model's type and on its device; no random state is touched."""
    like = model.backbone.cls_token
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
