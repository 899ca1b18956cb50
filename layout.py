"""How a step's images lie on the devices: so many at once, so often, with activations kept or computed twice.

    global batch = devices x images at once x accumulation

Reading order: share_batch -> choose_layout -> most_that_fit -> free_memory, pass_memory -> noise_pass;
checkpoint_activations, keep_activations.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

import fast
from adapter import Extractor, Injector
from common import UserError
from model import Block, Segmenter
from run import Process, gather

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADROOM = 0.1  # of a GPU's memory, for what no pass shows: NCCL's buffers, cuDNN's workspaces, gaps between tensors


def share_batch(global_batch: int, world: int, batch: int) -> int:
    """Micro-batches in each device's share of the global batch. If it is no whole number, UserError names remedies."""
    unit = world * batch
    if global_batch % unit == 0:
        return global_batch // unit
    fitting = [f"--batch {b} or " for b in range(batch, 0, -1) if global_batch % (world * b) == 0][:1]
    raise UserError(f"the global batch {global_batch} is no multiple of {world} devices x {batch} images: "
                    f"use {''.join(fitting)}--global-batch {math.ceil(global_batch / unit) * unit}")


def choose_layout(options: argparse.Namespace, usual_batch: int, usual_recompute: bool, model: Segmenter,
                  process: Process) -> int:
    """Fill in `options.batch` and `options.checkpoint_activations` where they are None; returns the accumulation.

    A resumed run keeps its batch if that suits the share of a device. Else a GPU gets the largest divisor of the
    share that fits its memory, and computes activations twice only where fewer than 2 images fit without. Elsewhere
    nothing is measured: the usual batch or the largest divisor below it, and the usual choice about activations.

    The model is on its device, and computes its activations twice afterwards if that was chosen. All processes choose
    alike. Raises UserError if not even one image fits, or UperNet would get a single one.
    """
    share, earlier = options.global_batch // process.world, vars(options).pop("earlier_batch", None)
    least = 2 if options.head == "upernet" and process.world == 1 else 1
    candidates = [n for n in range(share, least - 1, -1) if share % n == 0]
    if options.batch is None and earlier in candidates:
        options.batch = earlier
    elif options.batch is None and earlier and process.rank == 0:
        print(f"--batch {earlier} of this run does not suit {process.world} x {share} images: it is chosen anew")
    asked = [n for n in candidates if n == options.batch] if options.batch else candidates
    if not asked:
        remedy = f"--batch {candidates[-1]}" if candidates else "--global-batch 2"
        raise UserError(f"UperNet's batch norm needs 2 images at once, on all devices together: use {remedy}")
    candidates, found = asked, []
    on_gpu, choices = process.device.type == "cuda", [options.checkpoint_activations]
    measured = on_gpu and None in (options.batch, *choices)
    if choices == [None]:
        choices = [False, True] if on_gpu else [usual_recompute]
    for recompute in choices:
        if recompute:
            checkpoint_activations(model)
        if measured:
            images = most_that_fit(partial(pass_memory, model, options), candidates, free_memory(model))
            images = min(gather(process, images))
        else:
            images = next((n for n in candidates if n <= usual_batch), candidates[-1])
        found.append(images)
        if images >= min(2, candidates[0]):
            break
    if recompute and len(found) == 2 and found[0] >= max(images, 1):  # nothing gained
        recompute, images = False, found[0]
        keep_activations(model)
    options.batch, options.checkpoint_activations = options.batch or images, recompute
    if not options.batch:
        more = "" if recompute or len(found) == 2 else " --checkpoint-activations,"
        raise UserError(f"not even {candidates[-1]} image(s) of this training fit into {process.device}'s memory: use "
                        f"--amp bf16,{more} a smaller --size or --window")
    return share // options.batch


def most_that_fit(measure: Callable[[int], float], candidates: Sequence[int], room: float) -> int:
    """The first of the numbers of images, from many to few, whose training pass fits into `room` bytes; 0 if none does.

    `measure(images)` makes a pass and gives its bytes, infinite where memory ran out. Two small passes tell what an
    image takes, so that none is made that cannot fit; then a pass with the very number decides.
    """
    if candidates[0] > 2:
        two, three = measure(2), measure(3)
        candidates = [n for n in candidates if n <= 2 or two + (n - 2) * (three - two) <= room]
    return next((n for n in candidates if measure(n) <= room), 0)


def free_memory(model: Segmenter) -> float:
    """Bytes of the GPU that a training pass may have in use, the model and its gradients included."""
    device = model.backbone.cls_token.device
    free, total = torch.cuda.mem_get_info(device)
    moments = sum(2 * p.nbytes for p in model.parameters() if p.requires_grad)  # AdamW's, made at the first step
    return free + torch.cuda.memory_reserved(device) - HEADROOM * total - moments


def pass_memory(model: Segmenter, options: argparse.Namespace, images: int) -> float:
    """Bytes of the GPU that PyTorch has in use at most in `noise_pass`; infinite where they do not suffice."""
    device = model.backbone.cls_token.device
    torch.cuda.reset_peak_memory_stats(device)
    try:
        noise_pass(model, options, images)
        most = torch.cuda.max_memory_allocated(device)
    except torch.OutOfMemoryError:
        most = math.inf
        # Autograd's queue keeps the pass that was broken off until another one comes.
        torch.zeros((), device=device, requires_grad=True).clone().backward()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)  # the run's log tells the memory of its training
    return most


def noise_pass(model: Segmenter, options: argparse.Namespace, images: int) -> None:
    """A forward and a backward pass of a micro-batch of noise, as the loop makes them, beside gradients of an earlier.

    Every class is in every image, the most that labels can ask for. Parameters, buffers, gradients and random numbers
    are as before at the end.
    """
    device, amp, side = model.backbone.cls_token.device, AMP[options.amp], model.config.window
    images = max(images, 2) if options.head == "upernet" else images  # for its batch norm, which sees other devices
    buffers = [buffer.clone() for buffer in model.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            pixels = torch.randn(images, 3, side, side, device=device)
            labels = torch.randint(model.config.num_classes, (images, side, side), device=device)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            with fast.training(model, enabled=options.fast):
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    loss = model(pixels, labels)["loss"]
                loss.backward()
    finally:
        model.zero_grad()
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)


def checkpoint_activations(model: Segmenter) -> None:
    """Keep only the inputs of ViT blocks, injectors and extractors, as the official runs do, and compute the rest again
    in the backward pass: less memory, a third more work in the backbone, the same gradients."""
    for module in model.modules():
        if isinstance(module, Block | Injector | Extractor):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def keep_activations(model: Segmenter) -> None:
    """Undo `checkpoint_activations`."""
    for module in model.modules():
        if isinstance(module, Block | Injector | Extractor):
            vars(module).pop("forward", None)
