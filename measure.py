"""What a model costs, counted and timed.

Counted, at any size for the tensors have no data: without_data -> forward_flops, training_flops -> kept_for_backward,
model_kept -> Dispatches -> Waits, model_waits.
Timed: seconds, matmul_rate -> places, module_times (where a step's time goes) -> peak_memory, peak_of.
"""
import ctypes
import functools
import gc
import math
import statistics
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import heads
import model as models
from model import ModelConfig, Segmenter
from msda_cuda import ops
from run import peak_memory

aten = torch.ops.aten

# ------------------------------------------------------------------------------------------------------------ counted


# PyTorch's counter knows the fused attentions of GPUs only: without these two a CPU's would count as nothing.
@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
def cpu_attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
    """Of the two products of a forward pass, from shapes (B, M, N, D)."""
    return sdpa_flop_count(query, key, value)


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def cpu_attention_backward_flops(grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size,
                                 *_, **__) -> int:
    """Of the backward pass's products, with the scores that it computes again."""
    return sdpa_backward_flop_count(grad, query, key, value)


def twin(config: ModelConfig, device: str, training: bool = False) -> Segmenter:
    """A model without data, to be made and used in FakeTensorMode: any size takes next to no time and memory."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = Segmenter(config).train(training).requires_grad_(training)
    return model.to_empty(device=device)


def first_queries(costs: Tensor, present: Tensor, classes: int = 8) -> heads.Matches:
    """Instead of the Hungarian matching, which needs data: the first queries of every image win the first classes."""
    outputs, images, classes = *costs.shape[:2], min(classes, *costs.shape[2:])
    index = torch.cartesian_prod(*(torch.arange(n, device=costs.device) for n in (images, outputs, classes)))
    image, output, query = index.unbind(1)
    return heads.Matches(output, image, query, query, [outputs * classes] * images)


@contextmanager
def without_data(config: ModelConfig, images: int, training: bool) -> Iterator[tuple[Segmenter, tuple[Tensor, ...]]]:
    """A twin on the CPU and what to call it with; inside, tensors have no data."""
    matching = patch.object(heads, "match", first_queries)
    with FakeTensorMode(allow_non_fake_inputs=True), matching, torch.set_grad_enabled(training):
        pixels = torch.empty(images, 3, config.window, config.window)
        labels = torch.empty(images, config.window, config.window, dtype=torch.long)
        yield twin(config, "cpu", training), (pixels, labels)[:1 + training]


def forward_flops(config: ModelConfig) -> int:
    """Floating-point operations of a forward pass of one window: matrix products, convolutions and attention, as this
    code does them. What sampling, norms and the like add is not counted, nor is it in published counts."""
    with without_data(config, 1, training=False) as (model, inputs), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def training_flops(config: ModelConfig) -> int:
    """The same of forward pass, losses and backward pass; a batch of two, halved: batch norm refuses one."""
    with without_data(config, 2, training=True) as (model, inputs), FlopCounterMode(display=False) as counter:
        model(*inputs)["loss"].backward()
    return counter.get_total_flops() // 2


def kept_for_backward(function: Callable[[], object], module: nn.Module | None = None) -> int:
    """Bytes of all storages that autograd keeps between `function()` and its backward pass, each counted once.

    The module's parameters and buffers are left out: they lie in memory anyway. The casts of weights that autocast
    makes do count. Works on tensors with and without data.
    """
    storages = {}

    def note(x: Tensor) -> Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage()  # held, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = function()
    fixed = [*module.parameters(), *module.buffers()] if module else []
    others = storages.keys() - {x.untyped_storage()._cdata for x in fixed}
    del result
    return sum(storages[key].nbytes() for key in others)


def model_kept(config: ModelConfig, images: int, amp: torch.dtype | None = None) -> int:
    """Bytes that a training step of so many images keeps with a CPU's kernels, counted without data."""
    casts = torch.autocast("cpu", amp, enabled=amp is not None)
    with without_data(config, images, training=True) as (model, inputs), casts:
        return kept_for_backward(lambda: model(*inputs), model)


class Dispatches(TorchDispatchMode):
    """Counts the ATen operators that run while it is on: `work` and `views`, the latter with all that moves nothing."""

    IDLE = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "lift_fresh", "promote_types")

    def __init__(self) -> None:
        super().__init__()
        self.work: Counter[str] = Counter()
        self.views: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func._schema.name.split("::")
        idle = func.is_view or space == "prim" or name in self.IDLE
        (self.views if idle else self.work)[name] += 1
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts, by operator, what makes the host wait for a GPU (`waits`), and what it copies there without (`uploads`).

    It lies above a FakeTensorMode, where tensors pose as a GPU's and have no data. What the host asks for is answered
    with ones, so that the code goes on; what it does with an answer runs on real tensors. Copies to the host count even
    if `non_blocking`, for whoever reads one has to wait. Copies to the GPU wait for all that is queued there, unless
    they are `non_blocking`; a few kB of ordinary memory are then taken along with the command.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = torch.device(kwargs.get("device") or (inputs[0].device if inputs else "cpu")).type
        sources = inputs[1:] if name == "copy_" else inputs  # what is overwritten is not read
        if any(x.device.type == "cuda" for x in sources):
            if (answer := self.answer(name, target, args, kwargs)) is not None:
                self.waits[name] += 1
                return answer
        elif target == "cuda" and name in ("_to_copy", "copy_"):
            (self.uploads if kwargs.get("non_blocking") or args[2:] == (True,) else self.waits)[f"{name} to GPU"] += 1
        elif target == "cpu" and not any(isinstance(x, FakeTensor) for x in inputs):
            with unset_fake_temporarily():  # the host's own
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def answer(name: str, target: str, args: tuple, kwargs: dict) -> Any:
        """What the host gets after it has waited; None if it need not. Every entry of a mask is taken to be true."""
        x = args[0]
        if name == "nonzero":
            return x.new_zeros(x.numel(), x.dim(), dtype=torch.long)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if not masks or name != "index":
                return x if masks else None
            return x.new_zeros(sum(m.numel() for m in masks), *x.shape[sum(m.dim() for m in masks):])
        with unset_fake_temporarily():
            if name == "_local_scalar_dense":
                return torch.ones((), dtype=x.dtype).item()
            return torch.ones(x.shape, dtype=kwargs.get("dtype") or x.dtype) if target == "cpu" else None


@contextmanager
def waits() -> Iterator[Waits]:
    """Inside, tensors made on "cuda" have no data and need no GPU; gives what their code would have to wait for."""
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as found:
        yield found


def model_waits(config: ModelConfig, images: int, training: bool) -> Waits:
    """What the host waits for in a forward pass, or in training in forward pass, matching and losses."""
    operator = "native" if ops.native().library else "torch"  # a GPU has what this machine could build
    with waits() as found, patch.object(ops, "choose_path", lambda _: operator), torch.set_grad_enabled(training):
        pixels = torch.empty(images, 3, config.window, config.window, device="cuda")
        labels = torch.empty(images, config.window, config.window, device="cuda", dtype=torch.long)
        twin(config, "cuda", training)(pixels, labels if training else None)
    return found


# -------------------------------------------------------------------------------------------------------------- timed


def wait(device: torch.device | str) -> None:
    """Let the device finish what it was given, so that the clock sees all of it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """How long one call takes, until the device has finished."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


@torch.no_grad()
def matmul_rate(device: torch.device | str, dtype: torch.dtype, repetitions: int = 3) -> float:
    """FLOP/s of what a large model mostly does, here and now: the median of (4725, 1024) @ (1024, 4096) products.

    These are all pyramid tokens of a window of 480 pixels, and a feed-forward layer.
    """
    rows, inner, columns = 4725, 1024, 4096
    a, b = (torch.ones(*shape, device=device, dtype=dtype) for shape in ((rows, inner), (inner, columns)))
    number = 50 if torch.device(device).type == "cuda" else 1  # a GPU takes microseconds for one

    def products() -> None:
        for _ in range(number):
            a @ b

    products()
    taken = statistics.median(seconds(products, device) for _ in range(repetitions))
    return 2 * rows * inner * columns * number / taken


Places = dict[str, list[tuple[object, str]]]


def places(model: Segmenter, optimizer: torch.optim.Optimizer | None = None) -> Places:
    """The functions of each part of a model and its step, as (owner, attribute), for `module_times`."""
    found: Places = {
        "backbone": [(model.backbone, "embed"), (model.backbone, "run_stage")], "adapter": [(model.adapter, "forward")],
    }
    if model.config.head == "upernet":
        found |= {"decoder": [(model.head, "forward"), (model.auxiliary_head, "forward")],
                  "losses": [(models, "upernet_losses")]}
    else:
        found |= {"pixel decoder": [(model.head.pixel_decoder, "forward")], "decoder": [(model.head, "forward")],
                  "scores": [(models, "semantic_scores")],
                  "losses": [(models, "mask2former_losses")],
                  "matching": [(heads, "matching_costs"), (heads, "match")]}
    return found | ({"optimiser": [(optimizer, "step"), (optimizer, "zero_grad")]} if optimizer else {})


def module_times(model: nn.Module, step: Callable[[], object], parts: Places, device: str = "cpu") -> dict[str, float]:
    """Seconds of `step()` by part, forward and backward together; what a part calls of another is the other's.

    Every operator of the backward pass belongs to the part that ran when its forward twin did. "other" is the rest:
    resizing the scores, summing the losses, and what accumulates gradients before the first part is known.
    """
    total: dict[str, float] = defaultdict(float)
    stack, mark = ["other"], time.perf_counter()
    begun = [(0, "other")]  # which part made autograd's nodes from that number on

    def charge() -> None:
        nonlocal mark
        wait(device)
        total[stack[-1]] += (now := time.perf_counter()) - mark
        mark = now

    def switch(part: str | None) -> None:
        charge()
        stack.append(part) if part else stack.pop()
        begun.append((torch.autograd._get_sequence_nr(), stack[-1]))

    def timed(function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            switch(part)
            try:
                return function(*args, **kwargs)
            finally:
                switch(None)

        return call

    def follow(_: nn.Module, __: tuple, result: Any) -> None:
        """Have autograd say whose node it comes to, now that the graph stands; this itself is nobody's time."""
        nonlocal mark
        charge()
        if isinstance(result, dict):
            for node in graph(result["loss"].grad_fn):
                part = begun[bisect_right(begun, node._sequence_nr(), key=lambda entry: entry[0]) - 1][1]
                node.register_prehook(functools.partial(enter, part))
        mark = time.perf_counter()

    def enter(part: str, _: tuple) -> None:
        if stack[-1] != part:
            charge()
            stack[-1] = part

    with ExitStack() as patches:
        for part, functions in parts.items():
            for owner, name in functions:
                patches.enter_context(patch.object(owner, name, timed(getattr(owner, name), part)))
        hook = model.register_forward_hook(follow)
        mark = time.perf_counter()
        step()
        charge()
    hook.remove()
    return dict(total)


def graph(root: torch.autograd.graph.Node) -> list[torch.autograd.graph.Node]:
    """All nodes that the backward pass from `root` visits, but for those that add gradients up: they have no part."""
    found, waiting = {}, [root]
    while waiting:
        if (node := waiting.pop()) not in found:
            found[node] = None
            waiting += [each for each, _ in node.next_functions if each]
    return [node for node in found if node.next_functions]


def peak_of(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Gigabytes at most during `work()`: of the device's memory, on a CPU of this process; NaN where Linux's
    /proc cannot tell. Models and what else lies there before count too."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return peak_memory(torch.device(device))
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is no part of the peak
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes what is resident now
    work()
    with suppress(OSError):
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024 / 1e9
    return math.nan
