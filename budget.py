"""The least time of a training iteration on H100 GPUs, computed without one: `python budget.py` prints the tables of
docs/gpu-budget.md.

Read: Tally (what every operator multiplies and moves) -> on_cuda -> run_without_data -> rows of four tables -> main.

The full-size models run on tensors without data. Nothing is measured here: a time is a lower bound of the work that its
column names.

Shapes: B batch, N tokens, Q queries, M heads, D channels of a head, L levels, P points.
"""
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import common
import evaluate
import heads
from benchmark import GLOBAL_BATCH, OFFICIAL, PICTURE, PYRAMID, OpShape, Table, markdown
from fast.attention import plain_attention
from measure import first_queries, kept_for_backward, model_waits, twin
from model import SIZES
from msda_cuda.build import BuildError
from msda_cuda.ops import active_path, native

MATMUL, BANDWIDTH = 800e12, 3.0e12  # one H100: bfloat16 FLOP/s and bytes/s, measured elsewhere
FLOAT32, LINK = 67e12, 450e9  # its data sheet: FLOP/s outside the tensor cores, bytes/s to other GPUs
LAUNCH = 5e-6  # assumed: seconds of the host for a kernel
DEVICES, PICTURES = 8, 5105  # of a full run; of the validation set
KINDS = {"msda": "deformable", "copy": "casts", "clone": "casts", "norm": "norms"}  # part of an operator's name -> kind
IDLE = ("empty", "detach", "_unsafe_view", "prim.")  # parts of names of operators that move nothing, besides views
OP_CALLS = {  # -> calls in a forward pass of one window of 480 x 480
    OpShape("injector, base", PYRAMID, 900, 12): 4, OpShape("injector, large", PYRAMID, 900, 16): 4,
    OpShape("extractor, base", PYRAMID[1:2], 4725, 12): 6, OpShape("extractor, large", PYRAMID[1:2], 4725, 16): 6,
    OpShape("pixel decoder, base", PYRAMID, 4725, 8): 6, OpShape("pixel decoder, large", PYRAMID, 4725, 32): 6,
}
Row = dict[str, str | int | float]


class Tally(TorchDispatchMode):
    """Counts kernels, FLOP, bytes and, by kind, the least seconds of the operators that run while it is on.

    An operator moves its arguments and results once each, a view nothing. It takes as long as its FLOP or its bytes
    do, whichever is more: at best that is what a GPU achieves which runs one operator after the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.flop, self.bytes = 0, 0, 0
        self.seconds = dict.fromkeys(("products", "casts", "norms", "deformable", "the rest"), 0.0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, name = function(*args, **kwargs), str(function)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if function.is_view or not tensors or any(word in name for word in IDLE):
            return result
        formula = flop_registry.get(function._overloadpacket)
        flop = formula(*args, **kwargs, out_val=result) if formula else 0
        size = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)  # expanded: once
        kind = "products" if flop else next((kind for part, kind in KINDS.items() if part in name), "the rest")
        self.kernels, self.flop, self.bytes = self.kernels + 1, self.flop + flop, self.bytes + size
        self.seconds[kind] += max(flop / MATMUL, size / BANDWIDTH)
        return result


# CUDA's autocast does in float32, more than a CPU's: (where, name). The second: only if an argument is float32 already.
FLOAT32_THERE = (F, "layer_norm"), (F, "group_norm"), (F, "interpolate"), (F, "softmax"), (Tensor, "softmax")
WIDEST_THERE = (torch, "addcmul"), (torch, "addcdiv")


@contextmanager
def on_cuda(autocast: bool = True) -> Iterator[None]:
    """What a GPU does otherwise, for a CPU's tensors: CUDA's autocast, and attention that keeps no (N, N) matrix.

    Tensors without data have to pose as a CPU's, for autograd asks a GPU's driver even where there is nothing to do.
    """
    def cast(function: Callable, always: bool) -> Callable:
        def call(*args, **kwargs):
            if torch.is_autocast_enabled("cpu") and (always or any(x.dtype == torch.float32 for x in args)):
                args = [heads.full_precision(x) if isinstance(x, Tensor) else x for x in args]
            return function(*args, **kwargs)

        return call

    with ExitStack() as changes:
        changes.enter_context(patch.object(F, "scaled_dot_product_attention", memory_efficient_attention))
        changes.enter_context(patch("model.biased_attention", plain_attention))
        for where, name in (*FLOAT32_THERE, *WIDEST_THERE) if autocast else ():
            new = cast(getattr(where, name), (where, name) in FLOAT32_THERE)
            changes.enter_context(patch.object(where, name, new))
        yield


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """The kernel that CUDA takes where there is a mask or a bias: q, k, v (B, M, N, D) -> (B, M, N, D)."""
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True)[0]


class Counts(NamedTuple):
    """What some images cost: the tally, bytes kept for the backward pass, the host's waits for the GPU in forward and
    losses, and the number of parameters."""

    tally: Tally
    kept: int
    waits: int
    parameters: int


def run_without_data(head: str, size: str, images: int, training: bool = True) -> Counts:
    """Forward and, in training, losses and backward of so many images, with bfloat16 autocast.

    Raises BuildError without the native operator: plain PyTorch in its place moves many times as much.
    """
    if active_path("cpu") != "native":
        raise BuildError(f"there is no native operator to count: {native().reason}")
    config, results = replace(SIZES[size], head=head), []
    with FakeTensorMode(allow_non_fake_inputs=True), patch.object(heads, "match", first_queries):
        model = twin(config, "cpu", training).requires_grad_()  # in evaluation too: autocast keeps such weights' casts
        pixels = torch.empty(images, 3, config.window, config.window)
        labels = torch.empty_like(pixels[:, 0], dtype=torch.long) if training else None
        with torch.set_grad_enabled(training), on_cuda(), torch.autocast("cpu", torch.bfloat16):
            if not training:
                model(pixels)  # once for what an evaluation does once: weights cast, position biases gathered
            with Tally() as tally:
                kept = kept_for_backward(lambda: results.append(model(pixels, labels)), model)
        if training:
            with on_cuda(), tally:  # the former for what the backward pass computes again
                results[0]["loss"].backward()
    waits = model_waits(config, images, training).waits.total()
    return Counts(tally, kept, waits, sum(p.numel() for p in model.parameters()))


def step_row(system: str, official: int, images: int, counts: Counts) -> Row:
    """A training step on one GPU; `official` is the released model's arithmetic, GFLOP an image."""
    tally = counts.tally
    parts = {**tally.seconds, "AdamW": 28 * counts.parameters / BANDWIDTH}  # reads 4 numbers, writes 3
    return {
        "system": system, "images": images, "arithmetic ms": 1e12 * official * images / MATMUL,
        **{f"{name} ms": 1e3 * value for name, value in parts.items()}, "sum ms": 1e3 * sum(parts.values()),
        "GFLOP an image": tally.flop / images / 1e9, "GB moved": tally.bytes / 1e9,
        "waits": counts.waits, "kernels": tally.kernels, "host ms": 1e3 * tally.kernels * LAUNCH,
    }


def memory_row(system: str, few: int, many: int, counts: dict[int, Counts]) -> Row:
    """What lies in a GPU's memory with `many` images, and what all GPUs exchange."""
    image = (counts[many].kept - counts[few].kept) / (many - few)
    states = 16 * counts[many].parameters  # weight, gradient and two moments in float32
    return {
        "system": system, "states GB": states / 1e9, "kept an image GB": image / 1e9,
        "kept in any case GB": (counts[many].kept - many * image) / 1e9,
        f"sum, {many} images GB": (states + counts[many].kept) / 1e9, "gradients GB": states / 4 / 1e9,
        "all-reduce ms": 1e3 * 2 * (DEVICES - 1) / DEVICES * states / 4 / LINK,  # a ring: each sends 7/8 twice
    }


def deformable_row(shape: OpShape, calls: int) -> Row:
    """One image's call of the kernels in msda_cuda/csrc/kernels.cu: values in bfloat16, all else in float32."""
    S, points = sum(h * w for h, w in shape.levels), shape.Q * shape.M * len(shape.levels) * shape.P
    width, gathered = shape.M * shape.D, 4 * points * shape.D  # numbers: the four pixels around each point
    forward = 2 * (S + shape.Q) * width + 12 * points  # values and output; a location and a weight
    backward = forward + 12 * points + 18 * S * width  # and their gradients; that of values is zeroed, added to, cast
    flop = 2 * gathered, 4 * gathered  # multiply and add; in backward for two results
    least = [1e6 * max(size / BANDWIDTH, n / FLOAT32) for size, n in zip((forward, backward), flop, strict=True)]
    return {
        "call": shape.name, "a step": calls, "gathered MB": 2 * gathered / 1e6, "forward MFLOP": flop[0] / 1e6,
        "forward MB": forward / 1e6, "FLOP/byte": flop[0] / forward, "forward us": least[0],
        "16-byte atomics": gathered // 4, "backward MB": backward / 1e6, "backward us": least[1],
    }


def evaluation_row(system: str, images: int, counts: Counts, multi_scale: bool) -> Row:
    """The validation set on one GPU: the model alone, `images` windows at a time."""
    views = evaluate.make_views(np.zeros((*PICTURE, 3), np.uint8), 480, multi_scale)
    windows = sum(evaluate.Canvas(view, 480, 320).missing for view in views)
    tally, batches = counts.tally, PICTURES * windows / images
    return {
        "system": system, "views": "multi-scale + flip" if multi_scale else "single-scale",
        "windows a picture": windows, "PFLOP": batches * tally.flop / 1e15,
        "arithmetic s": batches * tally.flop / MATMUL, "operator by operator s": batches * sum(tally.seconds.values()),
        "host s": batches * tally.kernels * LAUNCH,
    }


def tables() -> list[Table]:
    """All that docs/gpu-budget.md shows. Raises BuildError without the native operator."""
    few, many = GLOBAL_BATCH // DEVICES, GLOBAL_BATCH
    steps, memory, evaluation = [], [], []
    for name, (_, official) in OFFICIAL.items():
        head, size = name.split("-")
        system = f"{head} {size}"
        counts = {images: run_without_data(head, size, images) for images in (many, few)}
        steps += [step_row(system, official, images, each) for images, each in counts.items()]
        memory.append(memory_row(system, few, many, counts))
        windows = run_without_data(head, size, many, training=False)
        evaluation += [evaluation_row(system, many, windows, multi_scale) for multi_scale in (False, True)]
    deformable = [deformable_row(*item) for item in OP_CALLS.items()]
    found = {"Training step": steps, "Memory and exchange": memory, "Deformable attention": deformable,
             "Validation set": evaluation}
    return [Table(f"{title}, computed", rows, []) for title, rows in found.items()]


def main() -> int:
    """Print the tables; returns the exit status."""
    try:
        print("\n".join(markdown(table) for table in tables()))
    except BuildError as error:
        return common.complain(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
