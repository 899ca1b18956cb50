"""One function, two paths: the native operator where there is one, the PyTorch text of reference.py elsewhere.

Reading order: ms_deform_attn -> active_path -> native -> register.

`MSDA=auto` (default) builds or loads the operator at the first call and falls back with one warning; `MSDA=native`
raises instead; `MSDA=torch` never tries.

Shapes: B batch, Q queries, M heads, D channels of a head, L levels, P points of a level, S = sum of h * w over levels.
"""

import functools
import os
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from common import UserError

from . import build
from .reference import Shapes, ms_deform_attn_torch


class Native(NamedTuple):
    """The loaded operator: for which kinds of device, from which file, and why not for the others."""

    devices: tuple[str, ...]
    library: str
    reason: str


def ms_deform_attn(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, equation 3).

    value (B, S, M, D), shapes [(h, w), ...] with S = sum of h * w, locations (B, Q, M, L, P, 2) as (x, y) with [0, 1]
    spanning each map, weights (B, Q, M, L, P) -> (B, Q, M*D) in value's type. Points off a map read zeros, and
    so do points at NaN or infinity in the operator (the text gives NaN). Sums, locations and weights are float32, or
    float64 where value is. Raises ValueError where sizes do not fit, and NotImplementedError for second derivatives and
    forward-mode derivatives.
    """
    (B, S, M, _), L = value.shape, len(shapes)
    if sum(h * w for h, w in shapes) != S:
        raise ValueError(f"ms_deform_attn: levels {list(shapes)} do not hold the {S} positions of value")
    Q, P = locations.shape[1], locations.shape[4]
    if locations.shape != (B, Q, M, L, P, 2) or weights.shape != (B, Q, M, L, P):
        raise ValueError(f"ms_deform_attn: locations {tuple(locations.shape)} and weights {tuple(weights.shape)} "
                         f"do not fit value {tuple(value.shape)} and {L} levels")
    is_double_on_gpu = value.is_cuda and value.dtype == torch.float64  # for gradcheck alone: no kernel is made for it
    if is_double_on_gpu or active_path(value.device.type) == "torch":
        return ms_deform_attn_torch(value, shapes, locations, weights)
    if any(forward_ad.unpack_dual(x).tangent is not None for x in (value, locations, weights)):
        raise NotImplementedError("ms_deform_attn: forward-mode derivatives are not implemented (nor grid_sample's)")
    precise = torch.promote_types(value.dtype, torch.float32)
    flat = [side for shape in shapes for side in shape]
    return torch.ops.msda.forward(value, flat, locations.to(precise), weights.to(precise))


@torch.compiler.assume_constant_result  # so that torch.compile asks once, and never traces a build
def active_path(device_type: str) -> str:
    """"native" or "torch", for tensors on "cpu", "cuda", ...; the first call may build the operator.

    Raises UserError: MSDA has an unknown value, or is "native" where there is no operator.
    """
    return choose_path(device_type)


@functools.cache
def choose_path(device_type: str) -> str:
    """`active_path`, which chooses, and warns, once for each kind of device."""
    operator, choice = native(), os.environ.get("MSDA", "auto")
    if device_type in operator.devices:
        return "native"
    if choice == "native":
        raise UserError(f"MSDA=native, but there is no operator for {device_type}: {operator.reason}")
    if choice == "auto" and os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun one process warns
        warnings.warn(f"deformable attention on {device_type} runs without its native operator, several times slower: "
                      f"{operator.reason} (MSDA=torch silences this)", stacklevel=4)
    return "torch"


@functools.cache
def native() -> Native:
    """Load the operator, and build it first if need be. Raises UserError for an unknown value of MSDA."""
    choice = os.environ.get("MSDA", "auto")
    if choice not in ("auto", "native", "torch"):
        raise UserError(f"MSDA={choice} is unknown; choose auto, native or torch")
    if choice == "torch":
        return Native((), "", "MSDA=torch")
    try:
        path = build.library()
        torch.ops.load_library(path)
    except (build.BuildError, OSError) as error:
        return Native((), "", str(error))
    register()
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("msda::forward", "CUDA")
    return Native(("cpu", "meta", *["cuda"] * has_cuda), str(path), build.plan().no_cuda)


@functools.cache
def register() -> None:
    """Tell PyTorch what the kernels do not: the shapes of the results, and the derivatives."""
    @torch.library.register_fake("msda::forward")
    def output_shape(value, shapes, locations, weights):
        return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])  # (B, Q, M*D)

    @torch.library.register_fake("msda::backward")
    def gradient_shapes(grad, value, shapes, locations, weights):
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (value, locations, weights))

    def save_inputs(ctx, inputs, output):
        value, ctx.shapes, locations, weights = inputs  # alone: the samples, L * P times larger, are read again
        ctx.save_for_backward(value, locations, weights)

    def gradients(ctx, grad):
        value, locations, weights = ctx.saved_tensors
        to_value, to_locations, to_weights = torch.ops.msda.backward(grad, value, ctx.shapes, locations, weights)
        return to_value, None, to_locations, to_weights

    def no_second_derivative(ctx, *grads):
        raise NotImplementedError("ms_deform_attn: second derivatives are not implemented (nor are grid_sample's)")

    torch.library.register_autograd("msda::forward", gradients, setup_context=save_inputs)
    torch.library.register_autograd("msda::backward", no_second_derivative, setup_context=lambda *_, **__: None)
