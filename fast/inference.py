"""`with fast.inference(model):` around prediction: the same scores with less arithmetic, while weights do not change.

Reading order: inference -> f4_through_lateral.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter import FeatureMaps, TokenLayout, resize, to_map, token_layout
from fast.attention import biases_gathered
from fast.launches import channels_last_norms, constants_once, offsets_with_scores, resize_in_own_type
from fast.operators import FastOperators, is_compiled, on_gpu, pays
from fast.swap import Part, agreeing, example_of, swapped
from fast.training import levels_at_their_resolution
from heads import Mask2Former, UperNet
from model import Segmenter

HERE = threading.local()  # its `models` have a context in this thread


@contextmanager
def inference(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Around predictions; gradients are off inside, and the weights must not change.

    Position biases and other constants are computed once, and in eval mode f4 goes through the head's first convolution
    on its way; on a CPU PyTorch's functions go quicker ways. At the end the model is as it was. To enter again inside
    is free; threads may share a model. Give the Segmenter itself, not a wrapper, and do not copy or pickle it inside.
    """
    models = vars(HERE).setdefault("models", set())
    if not enabled or model in models or not isinstance(model, Segmenter):
        yield
        return
    models.add(model)
    try:
        builders = [levels_at_their_resolution, f4_through_lateral]
        if not is_compiled(model):
            builders += [biases_kept, constants_once]
        if on_gpu(model):
            builders += [offsets_with_scores, resize_in_own_type, channels_last_norms]
        with torch.no_grad(), swapped(agreeing(model, builders)), FastOperators() if pays(model) else nullcontext():
            yield
    finally:
        models.remove(model)


def biases_kept(model: nn.Module) -> Part | None:
    """BEiT's position biases, the same for every window, are gathered and cast once a block."""
    return biases_gathered(model, keep=True)


def f4_through_lateral(model: nn.Module) -> Part | None:
    """f4 goes through the head's lateral, a 1x1 convolution, before it is as wide as the ViT.

    In eval mode all between the stem and the lateral is linear: weights are multiplied first, maps once. The lateral's
    C channels are computed at stride 4, never the D of f4: 5 % of the base model's arithmetic.
    """
    adapter, head = model.adapter, model.head
    if adapter.norms[0].training or not isinstance(head, Mask2Former | UperNet):
        return None
    lateral = (head.laterals[0] if isinstance(head, UperNet) else head.pixel_decoder.lateral)[0]
    norm, up, prior = adapter.norms[0], adapter.up, adapter.spatial_prior.fc1
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias + scale * (prior.bias + up.bias - norm.running_mean)
    fused = lateral.weight.flatten(1) * scale  # (C, D): batch norm, then the lateral
    stem_weight, bias = (fused @ prior.weight.flatten(1))[:, :, None, None], lateral.weight.flatten(1) @ shift
    up_weight = torch.einsum("dehw,ce->dchw", up.weight, fused)
    vit_weight = fused[:, :, None, None]

    def merge(stem: Tensor, pyramid: Tensor, vit_maps: Sequence[Tensor], layout: TokenLayout) -> FeatureMaps:
        levels = pyramid.split([h * w for h, w in layout.pyramid_grids], dim=1)
        c8, *coarser = (to_map(level, grid) for level, grid in zip(levels, layout.pyramid_grids, strict=True))
        x4, *vit_maps = vit_maps
        f4 = F.conv2d(stem, stem_weight, bias) + F.conv_transpose2d(c8, up_weight, stride=2)
        f4 = f4 + resize(F.conv2d(x4, vit_weight), f4.shape[2:])
        sums = [c + resize(x, c.shape[2:]) for c, x in zip((c8, *coarser), vit_maps, strict=True)]
        return FeatureMaps(f4, *(norm(m) for norm, m in zip(adapter.norms[1:], sums, strict=True)))

    def example() -> tuple[Tensor, ...]:
        layout, D = token_layout(2, 2, example_of(model, 1)), prior.out_channels
        maps = [example_of(model, 1, D, 2, 2)] * 4
        merged = adapter.merge(prior(example_of(model, 1, prior.in_channels, 8, 8)), example_of(model, 1, 21, D), maps,
                               layout)
        return lateral(merged.f4), *merged[1:]

    def unchanged(x: Tensor) -> Tensor:
        return x

    swaps = [(adapter, "merge", merge), (prior, "forward", unchanged), (lateral, "forward", unchanged)]
    return Part(swaps, example)
