"""`with fast.training(model):` around forward and backward pass: the same losses and gradients, sooner, in less memory.

Reading order: training -> losses_at_once, levels_at_their_resolution, checkpoints_alike (parts of a model that are
replaced); then operators.py and recompute.py (what PyTorch's functions do inside).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import heads
from fast import losses
from fast.allocator import keep_freed_memory
from fast.attention import biases_gathered
from fast.convolutions import conv3x3_of_enlarged
from fast.launches import (
    channels_last_norms,
    constants_once,
    narrow_f4,
    offsets_with_scores,
    resize_in_own_type,
    weights_cast_together,
)
from fast.operators import FastOperators, is_compiled, on_gpu, pays
from fast.recompute import recompute_cheap
from fast.swap import Part, agreeing, example_of, swapped
from heads import Prediction, UperNet
from model import Segmenter


@contextmanager
def training(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Around forward **and** backward pass of a training step.

    The losses of Mask2Former come all at once, UperNet's fusion at each level's resolution, constants once. On a CPU
    PyTorch's functions go quicker ways and cheap results are computed again instead of kept, unless the model is
    narrow; on a GPU fewer kernels are launched. For a compiled model only the first two. At the end the model is as it
    was; but the C library goes on keeping freed memory.

    Give the Segmenter itself, not a wrapper, and do not copy or pickle it inside. Autograd's hooks for saved tensors
    are in use inside.
    """
    if not enabled or not isinstance(model, Segmenter):
        yield
        return
    keep_freed_memory()
    builders, contexts = [losses_at_once, levels_at_their_resolution], []
    if not is_compiled(model):
        builders += [biases_gathered, constants_once]
    if pays(model):
        builders, contexts = [*builders, checkpoints_alike], [recompute_cheap()]
    if on_gpu(model):
        builders += [offsets_with_scores, resize_in_own_type, narrow_f4, channels_last_norms]
        contexts = [weights_cast_together(model)]
    with swapped(agreeing(model, builders)), ExitStack() as inside:
        for context in contexts:
            inside.enter_context(context)
        yield


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

    return Part([(model, "criterion", partial(losses.mask2former_losses, **plain.keywords))], example)


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
    return Part([(head, "fuse_levels", fuse_levels)], lambda: head.fuse_levels(levels))


def checkpoints_alike(model: nn.Module) -> Part:
    """A checkpointed module (layout.checkpoint_activations) runs again in the backward pass, where no mode is on: there
    it enters one itself, or autograd would find other tensors than in the forward pass."""
    forwards = [(module, forward) for module in model.modules()
                if isinstance(forward := vars(module).get("forward"), partial) and forward.func is checkpoint]
    again = {"context_fn": lambda: (nullcontext(), FastOperators())}
    return Part([(module, "forward", partial(forward, **again)) for module, forward in forwards], tuple)
