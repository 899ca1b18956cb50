"""Less kept for the backward pass, without a word of it in the model: `with recompute_cheap(): loss = model(...)`.

Reading order: Recipe -> CheapResults (notes how a result can be made again) -> recompute_cheap.

What a norm, a GELU or a sum gives is cheap to compute again, and what it was given is kept anyway, for gradients of its
own. So wherever autograd would keep such a result, it keeps the recipe instead: a function and its arguments.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fast.operators import REPLACEMENTS, FastOperators

SMALLEST = 2**14  # numbers; what is smaller is not worth the host's time
ADDITIONS = {torch.Tensor.add}
CHEAP = {F.layer_norm, F.gelu, F.interpolate, torch.Tensor.mul, torch.Tensor.to, torch.Tensor.__getitem__, *ADDITIONS}
CASTING = {F.linear, F.conv2d, F.conv_transpose2d}  # autocast casts what these are given


class Recipe:
    """How to make a tensor again: a function, and its arguments, which may be recipes themselves."""

    def __init__(self, function: Callable, args: Sequence, kwargs: dict):
        self.function, self.args, self.kwargs = function, args, kwargs
        self.has_sum = function in ADDITIONS or any(isinstance(x, Recipe) and x.has_sum for x in args)
        self.uses, self.result = 0, None  # the result is made once for all who still wait for it

    def make(self) -> Tensor:
        """The tensor; autograd must be off."""
        if self.result is not None:
            return self.result
        args = (x.make() if isinstance(x, Recipe) else x for x in self.args)
        result = REPLACEMENTS.get(self.function, self.function)(*args, **self.kwargs)
        if self.uses > 1:
            self.result = result
        return result

    def use(self) -> Tensor:
        """The tensor, for one of those who wait for it."""
        result = self.make()
        self.uses -= 1
        if self.uses == 0:
            self.result = None
        return result


class CheapResults(FastOperators):
    """Notes of each large cheap result, by the storage that it lies in, how to make it again."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[int, tuple[StorageWeakRef, Recipe]] = {}

    def recipe_of(self, x: Tensor) -> Recipe | None:
        """The recipe of the storage of `x`."""
        note = self.notes.get(x.untyped_storage()._cdata)
        return note[1] if note else None

    def source(self, x: Any) -> Any:
        """An argument for a recipe: a recipe where x is the whole of a noted result, else what it is."""
        if not isinstance(x, Tensor):
            return x
        recipe = self.recipe_of(x)
        return recipe if recipe and x.numel() == recipe.numel and x.stride() == recipe.stride else x.detach()

    def note(self, result: Tensor, function: Callable, args: Sequence, kwargs: dict) -> Tensor:
        """Write down the recipe of a result, if what the recipe holds is less than the result."""
        sources = [self.source(x) for x in args]
        recipe = Recipe(function, sources, kwargs)
        recipe.numel, recipe.stride = result.numel(), result.stride()
        if function in ADDITIONS:
            first, second = sources[:2]
            held = second.nbytes if isinstance(second, Tensor) else 0  # the first is kept anyway: a residual stream
            # A sum of sums would be made again from the beginning of the network.
            if held >= result.nbytes or any(isinstance(x, Recipe) and x.has_sum for x in (first, second)):
                return result
        if len(self.notes) % 64 == 63:  # what nobody kept is forgotten, and with it what the recipe holds
            self.notes = {key: note for key, note in self.notes.items() if not note[0].expired()}
        reference = StorageWeakRef(result.untyped_storage())  # held, so that the address stays this storage's
        self.notes[reference.cdata] = reference, recipe
        return result

    def cast(self, x: Tensor) -> Tensor:
        """What autocast would do with an input or a weight, done here, because it is cheap, too."""
        low = torch.get_autocast_dtype(x.device.type)
        can_be_made_again = x.is_leaf or self.recipe_of(x)
        if x.dtype != torch.float32 or x.numel() < SMALLEST or not (x.requires_grad and can_be_made_again):
            return x
        return self.note(x.to(low), torch.Tensor.to, (x, low), {})

    def __torch_function__(self, function: Callable, types: Any, args: Sequence = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function not in CHEAP and function not in CASTING:
            return super().__torch_function__(function, types, args, kwargs)
        if function in CASTING and torch.is_autocast_enabled(args[0].device.type):
            args = [*map(self.cast, args[:2]), *args[2:]]
        result = super().__torch_function__(function, types, args, kwargs)
        if function in CHEAP and result.numel() >= SMALLEST and result.requires_grad and not is_view(result, args[0]):
            self.note(result, function, args, kwargs)
        return result


def is_view(x: Tensor, of: Any) -> bool:
    """Whether both lie in one storage."""
    return isinstance(of, Tensor) and x.untyped_storage()._cdata == of.untyped_storage()._cdata


@contextmanager
def recompute_cheap() -> Iterator[None]:
    """Inside, autograd keeps recipes for cheap results, and quick functions are used (see FastOperators)."""
    results = CheapResults()

    def pack(x: Tensor) -> Any:
        recipe = results.recipe_of(x)
        if recipe is None:
            return x
        recipe.uses += 1
        return recipe, x.shape, x.stride(), x.storage_offset()

    @torch.no_grad()
    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        recipe, *geometry = kept
        return recipe.use().as_strided(*geometry)

    with results, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
