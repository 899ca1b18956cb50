"""Fewer kernels, for each is a launch: with two images on it, a GPU runs most of them sooner than its host starts them.

Reading order: constants_once -> on a GPU: offsets_with_scores, resize_in_own_type, narrow_f4, channels_last_norms ->
weights_cast_together.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import adapter
import heads
import msda_cuda.module as deformable
from adapter import FeatureMaps, TokenLayout, resize
from fast.swap import Part, example_of, swapped
from heads import Mask2Former
from msda_cuda import MSDeformAttn

CASTED = {nn.Linear, nn.Conv2d, nn.ConvTranspose2d}  # whose weights autocast casts
TOGETHER = 32  # weights in one cast: few launches, and gradients that DDP may send before the last are there


def once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of some sizes and `like`, each result computed once for the device and type of `like`."""
    kept = {}

    def constant(*sizes: int | Sequence[tuple[int, int]], like: Tensor) -> Tensor:
        if type(like) is not Tensor:  # a parameter, or what only pretends to be a tensor
            return function(*sizes, like=like)
        key = repr(sizes), like.device, like.dtype
        if key not in kept:
            with torch.inference_mode(False), torch.no_grad():  # so that a training step may use it too
                kept[key] = function(*sizes, like=like)
        return kept[key]

    return constant


CONSTANTS = [(owner, name, once(vars(owner)[name])) for owner, name in (
    (adapter, "token_layout"), (heads, "sine_positions"), (heads, "reference_points"), (deformable, "level_sizes"))]


def constants_once(model: nn.Module) -> Part:
    """Positions, reference points and sizes of levels are computed once for each grid: 250 kernels of a step."""
    def example() -> tuple:
        like = example_of(model, 1)
        return (*adapter.token_layout(2, 4, like=like)[2:], heads.sine_positions(2, 3, 8, like=like),
                heads.reference_points([(2, 3)], like=like), deformable.level_sizes([(2, 3), (4, 5)], 2, like=like))

    return Part(CONSTANTS, example)


def offsets_with_scores(model: nn.Module) -> Part | None:
    """Deformable attention's offsets and scores, two products of the same queries, as one product and one cast."""
    layers = [module for module in model.modules() if type(module) is MSDeformAttn]

    def together(layer: MSDeformAttn) -> Callable[[Tensor], Sequence[Tensor]]:
        both = layer.sampling_offsets, layer.attention_weights

        def offsets_and_scores(query: Tensor) -> Sequence[Tensor]:
            weight, bias = torch.cat([x.weight for x in both]), torch.cat([x.bias for x in both])
            return heads.full_precision(F.linear(query, weight, bias)).split([len(x.bias) for x in both], dim=-1)

        return offsets_and_scores

    def example() -> list[Sequence[Tensor]]:
        return [x.offsets_and_scores(example_of(model, 1, 3, x.output_proj.out_features)) for x in layers]

    return Part([(layer, "offsets_and_scores", together(layer)) for layer in layers], example) if layers else None


def resize_in_own_type(model: nn.Module) -> Part:
    """Maps of 16 bits stay so when they are resized; autocast would give float32, of twice the bytes."""
    def keep_type(x: Tensor, size: Sequence[int]) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return resize(x, size)

    swaps = [(module, "resize", keep_type) for module in (adapter, heads)]  # not the scores', in model.py
    return Part(swaps, lambda: [module.resize(example_of(model, 1, 2, 3, 3), (6, 5)) for module in (adapter, heads)])


def narrow_f4(model: nn.Module) -> Part:
    """Under autocast the largest map, f4, is of the stem's type: the ViT's part, float32, is cast before it is
    16 times as large."""
    plain = model.adapter.merge

    def merge(c4: Tensor, pyramid: Tensor, vit_maps: Sequence[Tensor], layout: TokenLayout) -> FeatureMaps:
        return plain(c4, pyramid, [vit_maps[0].to(c4.dtype), *vit_maps[1:]], layout)

    def example() -> FeatureMaps:
        D = model.config.embed_dim
        maps = [example_of(model, 2, D, 2, 2)] * 4
        layout = adapter.token_layout(2, 2, like=example_of(model, 1))
        return model.adapter.merge(example_of(model, 2, D, 8, 8), example_of(model, 2, 21, D), maps, layout)

    return Part([(model.adapter, "merge", merge)], example)


def channels_last_norms(model: nn.Module) -> Part | None:
    """A GPU's group norm gives channels first; between two convolutions that costs each of them a copy."""
    if not isinstance(model.head, Mask2Former):
        return None
    decoder = model.head.pixel_decoder
    norms = [module for module in (*decoder.lateral, *decoder.output) if isinstance(module, nn.GroupNorm)]

    def channels_last(plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: plain(x).contiguous(memory_format=torch.channels_last)

    swaps = [(norm, "forward", channels_last(norm.forward)) for norm in norms]
    return Part(swaps, lambda: [norm(example_of(model, 1, norm.num_channels, 2, 2)) for norm in norms])


class CastTogether(torch.autograd.Function):
    """Weights to a type, and their gradients back, each in one operator for all of them."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.precise = weights[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(copies(weights, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        precise = iter(copies([grad for grad in grads if grad is not None], ctx.precise))
        return None, *(None if grad is None else next(precise) for grad in grads)


def copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in another type."""
    results = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(results, list(tensors))
    return results


@contextmanager
def weights_cast_together(model: nn.Module) -> Iterator[None]:
    """Inside, the weights of linear layers and convolutions, which autocast would cast one by one, are cast together as
    a forward pass begins, and stay so until it ends: the same numbers."""
    weights = [(module, name, weight) for module in model.modules() if type(module) in CASTED
               for name, weight in module.named_parameters(recurse=False)
               if weight.requires_grad and weight.dtype == torch.float32]
    plain, device = model.forward, model.backbone.cls_token.device.type

    def forward(*args, **kwargs):
        swaps = []
        if torch.is_autocast_enabled(device) and torch.is_grad_enabled():
            for group in (weights[i:i + TOGETHER] for i in range(0, len(weights), TOGETHER)):
                cast = CastTogether.apply(torch.get_autocast_dtype(device), *(weight for _, _, weight in group))
                swaps += [(module, name, low) for (module, name, _), low in zip(group, cast, strict=True)]
        with swapped([Part(swaps, tuple)]):
            return plain(*args, **kwargs)

    with swapped([Part([(model, "forward", forward)], tuple)]):
        yield
