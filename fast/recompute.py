"""Less kept for the backward pass, without a word of it in the model: `with recompute_cheap(): loss = model(...)`.

Reading order: Recomputation -> CheapResults (notes how a result can be made again) -> recompute_cheap.

What a norm, a GELU or a sum gives is cheap to compute again, and what it was given is kept anyway, for gradients of its
own. So wherever autograd would keep such a result, it keeps the recipe instead: a function and its arguments.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fast.operators import REPLACEMENTS, FastOperators

SMALLEST = 2**14  # numbers; what is smaller is not worth the host's time
SUM = torch.Tensor.add
CHEAP = {F.layer_norm, F.gelu, F.interpolate, SUM, torch.Tensor.mul, torch.Tensor.to, torch.Tensor.gather}
CASTING = {F.linear, F.conv2d, F.conv_transpose2d}  # autocast casts what these are given


class Recomputation:
    """How to make a tensor again: a function, and its arguments, which may be recipes themselves."""

    def __init__(self, result: Tensor, function: Callable, args: Sequence, kwargs: dict):
        self.function, self.args, self.kwargs = function, args, kwargs
        self.shape, self.stride = result.shape, result.stride()
        self.versions = [x._version for x in self.args if isinstance(x, Tensor)]
        self.has_sum = function is SUM or any(x.has_sum for x in args if isinstance(x, Recomputation))
        device = result.device.type  # again in the mixed precision of the first time
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.precision = partial(torch.autocast, device, low, enabled=low is not None)
        self.consumers = 0  # so many will take the tensor
        self.tensor: Tensor | None = None  # held from the first who takes it to the last

    def make(self) -> Tensor:
        """The tensor; autograd must be off."""
        if self.tensor is not None:
            return self.tensor
        unchanged(self.versions == [x._version for x in self.args if isinstance(x, Tensor)])
        args = [x.make() if isinstance(x, Recomputation) else x for x in self.args]
        with self.precision():
            return REPLACEMENTS.get(self.function, self.function)(*args, **self.kwargs)

    def take(self) -> Tensor:
        """The tensor, for one of its consumers."""
        tensor = self.make()
        self.consumers -= 1
        self.tensor = tensor if self.consumers else None
        return tensor


class CheapResults(FastOperators):
    """Notes of each large cheap result, by the storage that it lies in, how to make it again."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[int, tuple[StorageWeakRef, int, Recomputation]] = {}

    def recipe_of(self, x: Tensor) -> Recomputation | None:
        """The recipe of what lies in the storage of `x`."""
        note = self.notes.get(x.untyped_storage()._cdata)
        return note[2] if note and note[1] == x._version else None  # a layer like ReLU may have changed it since

    def note(self, result: Tensor, function: Callable, args: Sequence, kwargs: dict) -> Tensor:
        """Write down the recipe of a result, if that holds less than the result; gives the result."""
        recipe = Recomputation(result, function, [self.ingredient(x) for x in args], kwargs)
        if function is SUM:
            first, second = recipe.args[:2]  # the first is a residual stream, kept anyway
            held = second.nbytes if isinstance(second, Tensor) else 0
            # A sum of sums would be made again from the beginning of the network.
            if held >= result.nbytes or any(isinstance(x, Recomputation) and x.has_sum for x in (first, second)):
                return result
        if len(self.notes) % 16 == 15:  # what nobody kept is forgotten, and with it what its recipe holds
            self.notes = {key: note for key, note in self.notes.items() if not note[0].expired()}
        storage = StorageWeakRef(result.untyped_storage())  # held, so that no other storage gets its address
        self.notes[storage.cdata] = storage, result._version, recipe
        return result

    def ingredient(self, x: Any) -> Any:
        """An argument as a recipe holds it: its own recipe where it has one, else what it is."""
        if not isinstance(x, Tensor):
            return x
        recipe = self.recipe_of(x)
        return recipe if recipe and (recipe.shape, recipe.stride) == (x.shape, x.stride()) else x.detach()

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
        if not args:  # all by keyword: nothing here would know them
            return super().__torch_function__(function, types, args, kwargs)
        if function in CASTING and torch.is_autocast_enabled(args[0].device.type):
            args = [*map(self.cast, args[:2]), *args[2:]]
        result = super().__torch_function__(function, types, args, kwargs)
        if function in CHEAP and result.requires_grad and result.numel() >= SMALLEST and not is_view(result, args[0]):
            self.note(result, function, args, kwargs)
        return result


def unchanged(yes: bool) -> None:
    """Autograd does not look after tensors that hooks keep: refuse what it would refuse."""
    if not yes:
        raise RuntimeError("a tensor that the backward pass needs has been modified by an inplace operation")


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
            return x.detach(), x._version  # detached: a result that holds itself would never be freed
        recipe.consumers += 1
        return recipe, x.shape, x.stride(), x.storage_offset()

    @torch.no_grad()
    def unpack(saved: Any) -> Tensor:
        source, *geometry = saved
        if isinstance(source, Tensor):
            unchanged(geometry == [source._version])
            return source
        return source.take().as_strided(*geometry)

    with results, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
