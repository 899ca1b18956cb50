"""layout.py: batches that divide and fit, in computed numbers; a measuring pass that leaves everything as it was."""

import argparse
import gc
import math
from copy import deepcopy

import pytest
import small
import torch

import layout
from common import UserError
from model import Block, build_model
from run import Process

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_share_batch():
    assert [layout.share_batch(16, *case) for case in ((8, 2), (1, 2), (4, 1))] == [1, 8, 4]
    for case, remedy in {
        (1, 3): "16 is no multiple of 1 devices x 3 images: use --batch 2 or --global-batch 18",
        (3, 1): "use --global-batch 18", (8, 4): "use --batch 2 or --global-batch 32",
    }.items():
        with pytest.raises(UserError, match=remedy):
            layout.share_batch(16, *case)


# GB, docs/gpu-budget.md and docs/speed.md: Mask2Former large in bf16, with activations kept and computed twice.
STATES, KEPT, TWICE = 9.07, (1.78, 2.97), (0.49, 1.74)  # states; always, an image


def gigabytes(images: int, activations: tuple[float, float] = KEPT) -> float:
    """What PyTorch has in use at most in a training pass: weights, gradients and activations; not yet the moments."""
    return STATES / 2 + activations[0] + activations[1] * images


def room(card: float) -> float:
    return (1 - layout.HEADROOM) * card - STATES / 2


@pytest.mark.parametrize(("card", "share", "images", "passes"), [
    (80, 16, 16, [2, 3, 16]), (80, 2, 2, [2]), (80, 1, 1, [1]), (80, 48, 16, [2, 3, 16]),  # 24 images: 82.1 GB
    (24, 16, 2, [2, 3, 2]), (24, 9, 3, [2, 3, 3]), (16, 16, 1, [2, 3, 2, 1]), (12, 16, 0, [2, 3, 2, 1]),
])
def test_the_most_images_that_divide_the_share_and_fit(card, share, images, passes):
    """No pass is made with more images than fit, but for the first two."""
    made, candidates = [], [n for n in range(share, 0, -1) if share % n == 0]

    def measure(images: int) -> float:
        made.append(images)
        return gigabytes(images) if gigabytes(images) <= room(card) else math.inf  # memory has run out

    assert layout.most_that_fit(measure, candidates, room(card)) == images and made == passes


def test_the_pass_itself_decides_where_memory_grows_faster_than_the_line():
    assert layout.most_that_fit(lambda images: images**1.1, [16, 8, 4, 2, 1], 20.0) == 8  # 16 images: 21.1


def open_options(**given) -> argparse.Namespace:
    return argparse.Namespace(**{"head": "mask2former", "global_batch": 16, "batch": None, "amp": "off", "fast": True,
                                 "checkpoint_activations": None, **given})


def checkpointed(model: torch.nn.Module) -> bool:
    return any("forward" in vars(module) for module in model.modules() if isinstance(module, Block))


@pytest.mark.parametrize(("card", "devices", "given", "batch", "twice"), [
    (80, 1, {}, 16, False), (80, 8, {}, 2, False), (80, 16, {}, 1, False), (24, 1, {}, 2, False),
    (16, 1, {}, 2, True), (16, 16, {}, 1, False), (14, 16, {}, 1, True),  # 1 image is a share of 16 devices
    (16, 1, {"global_batch": 15}, 1, False),  # 3 images do not fit twice: nothing gained
    (16, 1, {"checkpoint_activations": False}, 1, False), (80, 1, {"checkpoint_activations": True}, 16, True),
    (80, 1, {"batch": 8}, 8, False), (16, 1, {"batch": 2}, 2, True),
    (16, 1, {"batch": 8}, 8, True), (16, 1, {"batch": 8, "checkpoint_activations": False}, 8, False),  # obeyed
    (80, 1, {"head": "upernet"}, 16, False), (80, 1, {"global_batch": 6, "earlier_batch": 4}, 6, False),
    (80, 1, {"earlier_batch": 4, "checkpoint_activations": True}, 4, True),
])
def test_on_gpus_memory_decides(monkeypatch, card, devices, given, batch, twice):
    options, model = open_options(**given), small.small_model("mask2former", "tiny", 3)
    monkeypatch.setattr(layout, "gather", lambda process, value: [value] * process.world)
    monkeypatch.setattr(layout, "free_memory", lambda model: room(card))
    monkeypatch.setattr(layout, "pass_memory", lambda model, options, images: gigabytes(
        images, TWICE if checkpointed(model) else KEPT))
    accumulation = layout.choose_layout(options, 2, True, model, Process(0, devices, GPU))
    assert (options.batch, options.checkpoint_activations, checkpointed(model)) == (batch, twice, twice)
    assert accumulation * batch * devices == options.global_batch and "earlier_batch" not in options


def test_all_processes_take_what_fits_the_smallest(monkeypatch):
    options, model = open_options(), small.small_model("mask2former", "tiny", 3)
    monkeypatch.setattr(layout, "gather", lambda process, value: [value, 4])
    monkeypatch.setattr(layout, "free_memory", lambda model: room(80))
    monkeypatch.setattr(layout, "pass_memory", lambda model, options, images: gigabytes(images))
    assert layout.choose_layout(options, 2, True, model, Process(0, 2, GPU)) == 2 and options.batch == 4


def test_a_model_that_does_not_fit_is_told(monkeypatch):
    monkeypatch.setattr(layout, "free_memory", lambda model: 1)
    monkeypatch.setattr(layout, "pass_memory", lambda model, options, images: math.inf)
    with pytest.raises(UserError, match="not even 1 image.* cuda's memory: use --amp bf16"):
        layout.choose_layout(open_options(), 2, True, small.small_model("mask2former", "tiny", 3), Process(0, 1, GPU))


@pytest.mark.parametrize(("global_batch", "devices", "usual", "head", "batch"), [
    (16, 1, 2, "mask2former", 2), (16, 1, 8, "mask2former", 8), (16, 2, 8, "mask2former", 8),
    (16, 16, 2, "mask2former", 1), (16, 16, 2, "upernet", 1), (12, 1, 8, "mask2former", 6),
    (3, 1, 2, "mask2former", 1), (3, 1, 2, "upernet", 3),  # one process's batch norm needs 2 images
])
def test_elsewhere_the_usual_batch_or_what_divides(global_batch, devices, usual, head, batch):
    for recompute in (True, False):
        model, options = small.small_model(head, "tiny", 3), open_options(head=head, global_batch=global_batch)
        accumulation = layout.choose_layout(options, usual, recompute, model, Process(0, devices, CPU))
        assert (options.batch, accumulation) == (batch, global_batch // devices // batch)
        assert options.checkpoint_activations == checkpointed(model) == recompute


@pytest.mark.parametrize(("head", "earlier", "devices", "typed", "batch", "told"), [
    ("mask2former", 4, 2, None, 4, False), ("mask2former", 4, 8, None, 2, True), ("mask2former", 4, 8, 1, 1, False),
    ("upernet", 1, 16, None, 1, False), ("upernet", 1, 1, None, 2, True),  # alone it needs 2
])
def test_a_resumed_run_keeps_its_batch_where_that_can_be(capsys, head, earlier, devices, typed, batch, told):
    for rank in (1, 0):
        options = open_options(head=head, earlier_batch=earlier, batch=typed, checkpoint_activations=False)
        layout.choose_layout(options, 2, True, small.small_model(head, "tiny", 3), Process(rank, devices, CPU))
        line = f"--batch {earlier} of this run does not suit {devices} x {16 // devices} images: it is chosen anew\n"
        assert options.batch == batch and capsys.readouterr().out == line * (told and rank == 0)


@pytest.mark.parametrize("given", [{"batch": 1}, {"global_batch": 1}])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_upernet_is_not_given_a_single_image(given, device):
    options, model = open_options(head="upernet", **given), small.small_model("upernet", "tiny", 3)
    with pytest.raises(UserError, match="batch norm needs 2 images"):
        layout.choose_layout(options, 2, False, model, Process(0, 1, device))


def break_off(model: torch.nn.Module, stage: str) -> None:
    """Memory runs out in that pass, at the third block."""
    class Breaking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: torch.Tensor) -> torch.Tensor:
            if stage == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    block = model.backbone.blocks[2]
    forward = block.forward
    block.forward = lambda *args: Breaking.apply(forward(*args))


def tensors() -> list[torch.Tensor]:
    """All that there are in this process."""
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("head", ["mask2former", "upernet"])
@pytest.mark.parametrize("broken", ["", "forward", "backward"])
def test_a_measuring_pass_leaves_everything_as_it_was(monkeypatch, head, amp, broken):
    """Weights, statistics, gradients, random numbers; and nothing of a pass that was broken off stays in memory."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000)
    model, options = small.small_model(head, "tiny", 3).train(), open_options(head=head, amp=amp)
    layout.pass_memory(model, options, 1)  # makes what is made at the first use
    if broken:
        break_off(model, broken)
    state, random, mode = deepcopy(model.state_dict()), torch.get_rng_state(), model.training
    before = {id(x) for x in tensors()}
    gc.disable()
    try:
        assert layout.pass_memory(model, options, 2) == (math.inf if broken else 1000)
        left = [x.shape for x in tensors() if id(x) not in before]
    finally:
        gc.enable()
    assert not left
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.training == mode
    assert torch.equal(random, torch.get_rng_state())


def test_what_a_pass_may_use_of_the_gpu(monkeypatch):
    model = small.small_model("mask2former", "tiny", 3)
    model.backbone.requires_grad_(False)
    trained = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("backbone."))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70e9, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3e9)
    assert layout.free_memory(model) == pytest.approx(73e9 - 8e9 - 2 * trained)


@pytest.mark.gpu
@pytest.mark.parametrize("head", ["mask2former", "upernet"])
def test_on_a_gpu_more_images_take_more_and_nothing_stays(head):
    model, options = small.small_model(head, "tiny", 3).train().cuda(), open_options(head=head)
    layout.pass_memory(model, options, 2)
    before = torch.cuda.memory_allocated()
    assert before < layout.pass_memory(model, options, 2) < layout.pass_memory(model, options, 8)
    assert torch.cuda.memory_allocated() < before + 2**20


def bytes_kept(model, images, labels) -> int:
    """What one training step keeps for its backward pass, each storage once; runs the backward pass, too."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)  # the same paths are dropped
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images, labels)["loss"]
    loss.backward()
    return sum(kept.values())


def test_checkpointed_activations_give_the_same_gradients_for_less_memory():
    torch.manual_seed(1)
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    model = build_model("upernet", "tiny", 3, window=64, head_channels=16, drop_path=0.3, depth=8).train()
    plain = bytes_kept(model, images, labels)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    layout.checkpoint_activations(model)
    assert bytes_kept(model, images, labels) < 0.65 * plain
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7, msg=name)
