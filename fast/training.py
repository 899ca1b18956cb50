"""`with fast.training(model):` around forward and backward pass: the same losses and gradients, sooner, in less memory.

Reading order: training -> losses_at_once, levels_at_their_resolution, masks_by_queries (the parts that have another
text); operators.py and recompute.py (what PyTorch's functions do inside).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import heads
from fast import losses
from fast.allocator import keep_freed_memory
from fast.convolutions import conv3x3_of_enlarged
from fast.recompute import recompute_cheap
from fast.swap import Part, agreeing, example_of, swapped
from heads import Mask2Former, Prediction, UperNet


@contextmanager
def training(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Around forward **and** backward pass of a training step.

    The losses of Mask2Former come all at once, UperNet's fusion at each level's resolution, PyTorch's functions by
    quicker ways, and cheap results are computed again instead of kept. Under `torch.compile` the last two are the
    compiler's work. At the end the model is as it was; but the C library goes on keeping freed memory.
    """
    if not enabled:
        yield
        return
    keep_freed_memory()
    compiled = model._compiled_call_impl is not None
    with swapped(agreeing(model, training_parts(model))), nullcontext() if compiled else recompute_cheap():
        yield


def training_parts(model: nn.Module) -> list[Part]:
    """The parts of this model that have another text in training."""
    return [part for make in (losses_at_once, levels_at_their_resolution, masks_by_queries) if (part := make(model))]


def losses_at_once(model: nn.Module) -> Part | None:
    """Mask2Former's matching and losses for all images and decoder outputs together (fast/losses.py)."""
    plain = model.criterion
    if not (isinstance(plain, partial) and plain.func is heads.mask2former_losses):  # a fork's own
        return None

    def example() -> dict[str, Tensor]:
        prediction = Prediction(example_of(model, 2, 2, 12, 6), example_of(model, 2, 2, 12, 8),
                                example_of(model, 2, 8, 6, 6))
        labels = torch.arange(2 * 24 * 24, device=prediction.class_logits.device).view(2, 24, 24) // 41 % 6
        return model.criterion(prediction, labels.masked_fill(labels == 5, heads.IGNORE), num_points=128)

    return Part("Mask2Former's losses", [(model, "criterion", partial(losses.mask2former_losses, **plain.keywords))],
                example)


def levels_at_their_resolution(model: nn.Module) -> Part | None:
    """UperNet's fusion, each level convolved at its own resolution and enlarged: a third of the arithmetic."""
    head = model.head
    if not isinstance(head, UperNet):
        return None

    def fuse_levels(levels: Sequence[Tensor]) -> Tensor:
        conv, norm, relu = head.fuse
        finest, *coarser = levels
        kernel, *kernels = conv.weight.split(finest.shape[1], dim=1)
        x = F.conv2d(finest, kernel, padding=1)
        for level, kernel in zip(coarser, kernels, strict=True):
            x = x + conv3x3_of_enlarged(level, kernel, finest.shape[2:])
        return relu(norm(x))

    channels = head.classifier.in_channels
    levels = [example_of(model, 1, channels, side, side) for side in (8, 4, 2, 1)]
    return Part("UperNet.fuse_levels", [(head, "fuse_levels", fuse_levels)], lambda: head.fuse_levels(levels))


def masks_by_queries(model: nn.Module) -> Part | None:
    """Mask2Former's last convolution joins the queries instead of the pixels.

    A mask's logit at a pixel f is e (W f + b) = (e W, e b) (f, 1): multiply Q embeddings by W, not all pixels.
    """
    head = model.head
    if not isinstance(head, Mask2Former):
        return None
    last, mask_embed = head.pixel_decoder.mask_features, head.mask_embed

    def with_ones(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0)  # a channel of ones, for the bias

    def times_weight(x: Tensor) -> Tensor:
        to_pixels = torch.cat([last.weight.flatten(1), last.bias[:, None]], dim=1)  # (C, C + 1)
        return type(mask_embed).forward(mask_embed, x) @ to_pixels

    def example() -> Tensor:
        channels = last.in_channels
        return torch.einsum("bqc,bchw->bqhw", mask_embed(example_of(model, 1, 4, channels)),
                            last(example_of(model, 1, channels, 2, 2)))

    swaps = [(last, "forward", with_ones), (mask_embed, "forward", times_weight)]
    return Part("Mask2Former.mask_embed", swaps, example)
