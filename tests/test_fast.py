"""fast/ against the plain text: `training`, `inference`, and what they are made of.

Reading order: training -> recompute -> attention and softmax -> inference -> swap -> allocator. Losses and convolutions
have files of their own; golden values are compared in test_model.py.
"""

import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import OFFICIAL, noise, randomized
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fast
import heads
from adapter import ViTAdapter
from fast import allocator
from fast.attention import FusedAttention, gather_columns
from fast.operators import FastOperators
from fast.recompute import recompute_cheap
from heads import UperNet
from model import Segmenter, build_model, relative_position_index

pytestmark = pytest.mark.usefixtures("seed", "modes_for_narrow_models")
both_heads = pytest.mark.parametrize("head", OFFICIAL)


def a_batch(window: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images, and labels of seven classes, some ignored: the same at every call."""
    labels = torch.randint(0, 8, (2, 12, 12), generator=torch.Generator().manual_seed(0))
    labels = labels.masked_fill(labels == 7, 255).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return noise("image", 2, 3, window, window), labels


def step(model: Segmenter, enabled: bool, amp: bool = False) -> tuple[dict, dict, dict]:
    """Losses, gradients and buffers of one training step, with the same random numbers at every call."""
    images, labels = a_batch()
    model.zero_grad()
    torch.manual_seed(1)
    with fast.training(model, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            losses = model(images.to(model.backbone.cls_token.dtype), labels)
        losses["loss"].backward()
    return ({name: loss.detach() for name, loss in losses.items()},
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
            {name: buffer.clone() for name, buffer in model.named_buffers()})


def everything(model: nn.Module) -> dict:
    """The dictionaries of all modules, as they are now, and the dictionaries in them."""
    return {name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
            for name, module in model.named_modules()}


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("checkpointed", [False, True])
@both_heads
def test_a_training_step_is_the_plain_one(golden_model, halton_points, head, checkpointed):
    """Losses, gradients and running statistics, with stochastic depth and dropout."""
    plain, quick = (golden_model(head, drop_path=0.5, dropout=0.3).train() for _ in range(2))
    if checkpointed:
        from layout import checkpoint_activations

        checkpoint_activations(quick)
    torch.testing.assert_close(step(quick, True), step(plain, False), rtol=1e-9, atol=1e-9)


@both_heads
def test_the_model_is_as_it_was_afterwards(golden_model, head):
    """Also after an error, and by the first use's comparison of both texts: functions, statistics, each module's mode,
    random numbers. Inside, state dicts have the same names."""
    model, random = golden_model(head).train(), torch.get_rng_state()
    model.adapter.spatial_prior.eval()
    before, state = everything(model), {name: x.clone() for name, x in model.state_dict().items()}
    for context in (fast.training, fast.inference, fast.training):
        with pytest.raises(KeyError), context(model):
            assert list(model.state_dict()) == list(state)
            assert [m.training for m in model.modules()] == [x["training"] for x in before.values()]
            raise KeyError
        assert everything(model) == before
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert torch.get_rng_state().equal(random)


@both_heads
def test_training_under_autocast(golden_model, halton_points, head):
    """Losses in float32 near the plain ones, finite gradients in the direction of the plain ones.

    Batch norm has its kept statistics here. Those of such a small batch make much of a little rounding: then gradients
    of 16 bits, plain and fast alike, are at 0.8 to 0.98 of the exact direction, from version to version of PyTorch.
    """
    model = golden_model(head).float().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    plain, quick = (step(model, enabled, amp=True)[:2] for enabled in (False, True))
    assert {loss.dtype for losses, _ in (plain, quick) for loss in losses.values()} == {torch.float32}
    assert quick[0]["loss"].item() == pytest.approx(plain[0]["loss"].item(), rel=0.02)
    gradients = [torch.cat([g.flatten() for g in grads.values()]) for _, grads in (plain, quick)]
    assert torch.isfinite(torch.stack(gradients)).all()
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_a_compiled_model_is_left_to_the_compiler(golden_model, monkeypatch):
    model = golden_model("upernet")
    model.compile(backend="eager")
    monkeypatch.setattr(sys.modules["fast.training"], "recompute_cheap", None)  # to use it would raise
    with fast.training(model):
        assert "fuse_levels" in vars(model.head)


# ---------------------------------------------------------------------------------------------------------- recompute


class Living(TorchDispatchMode):
    """The storages that operations make, without keeping them alive, and how often each operation runs."""

    def __init__(self, *not_counted: torch.Tensor):
        super().__init__()
        self.storages, self.calls = {}, Counter()
        self.not_counted = {x.untyped_storage()._cdata for x in not_counted}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls[function.__name__.split(".")[0]] += 1
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                reference = StorageWeakRef(x.untyped_storage())
                self.storages[reference.cdata] = reference, x.untyped_storage().nbytes()
        return result

    def nbytes(self) -> int:
        return sum(size for address, (reference, size) in self.storages.items()
                   if address not in self.not_counted and not reference.expired())


@pytest.mark.parametrize(("amp", "share"), [(False, 0.8), (True, 0.65)])
@both_heads
def test_less_is_kept_for_the_backward_pass(head, amp, share):
    """What is alive after the forward pass, other than parameters, buffers, images and labels."""
    model = build_model(head, "tiny", 7, depth=12).train()
    images, labels, kept = torch.randn(2, 3, 128, 128), torch.randint(0, 7, (2, 128, 128)), {}
    for enabled in (False, True):
        with fast.training(model, enabled), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            with Living(images, labels, *model.parameters(), *model.buffers()) as forward:
                losses = model(images, labels)
            kept[enabled] = forward.nbytes()
            del losses
    assert kept[True] < share * kept[False]


def test_norm_and_gelu_are_computed_again_and_products_are_not():
    linear, x = nn.Linear(64, 64), torch.randn(512, 64, requires_grad=True)
    wanted = [x, *linear.parameters()]
    with recompute_cheap(), Living(*wanted) as forward:
        y = linear(F.gelu(linear(F.layer_norm(x, (64,)))))
    assert forward.nbytes() < 2.1 * x.nbytes  # the first product, and the second, which is the result
    with Living() as backward:
        gradients = torch.autograd.grad(y.sum(), wanted)
    assert [backward.calls[name] for name in ("native_layer_norm", "gelu", "addmm")] == [1, 1, 0]
    expected = torch.autograd.grad(linear(F.gelu(linear(F.layer_norm(x, (64,))))).sum(), wanted)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)


SIDE = 128  # a matrix of as many numbers as are worth a recipe
FORKS = {  # what a fork may write: of x, y (SIDE, SIDE), which both want gradients
    "in place after a norm": lambda x, y: F.relu(F.layer_norm(x, (SIDE,)), inplace=True) * y,
    "in place after a sum": lambda x, y: F.relu(x + F.gelu(y), inplace=True) * y,
    "in place after a product": lambda x, y: (x * y).sigmoid_() * y,
    "arguments by name": lambda x, y: F.gelu(input=F.linear(input=x, weight=F.gelu(input=y))),
    "two uses of a norm": lambda x, y: (F.layer_norm(x, (SIDE,)) @ y) * F.gelu(F.layer_norm(x, (SIDE,))),
    "a sum of sums": lambda x, y: F.layer_norm(x + y + F.gelu(x + F.gelu(y)), (SIDE,)) * y,
}


@pytest.mark.parametrize("fork", FORKS)
def test_gradients_are_autograds_whatever_a_fork_writes(fork):
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        x, y = (torch.randn(SIDE, SIDE, dtype=torch.double, requires_grad=True) for _ in range(2))
        with recompute_cheap() if enabled else torch.enable_grad():
            result = FORKS[fork](1.0 * x, y)
            results.append(torch.autograd.grad(result.square().sum(), [x, y]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_changes_in_place_that_autograd_refuses_are_refused():
    x = torch.randn(SIDE, SIDE, requires_grad=True)
    with recompute_cheap():
        y = x.exp()
        total = (y * 2).sum()
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


def test_a_forward_pass_without_a_backward_pass_leaves_nothing():
    x = torch.randn(SIDE, SIDE, requires_grad=True)
    with recompute_cheap():
        result = F.layer_norm(x.exp(), (SIDE,)).sigmoid()
    reference = StorageWeakRef(result.untyped_storage())
    del result
    assert reference.expired()


# ---------------------------------------------------------------------------------------------- attention and softmax

B, M, D, N, ROWS = 2, 3, 4, 7, 3 * 5 + 3
INDEX = relative_position_index(2, 3)


def attention(query, key, value, table):
    """By the definition."""
    return (query @ key.mT / D**0.5 + table[INDEX].permute(2, 0, 1)).softmax(-1) @ value


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-12), (torch.bfloat16, 0.02)])
def test_fused_attention_is_attention(dtype, tolerance):
    """Values and every gradient; the table's stays in its own precision. The probabilities are not kept."""
    inputs = [torch.randn(B, M, N, D).to(dtype).requires_grad_() for _ in range(3)]
    inputs.append(torch.randn(ROWS, M, dtype=max(dtype, torch.float32, key=lambda d: d.itemsize), requires_grad=True))
    exact, kept = [x.detach().double().requires_grad_() for x in inputs], []
    bias = gather_columns(inputs[3].t(), INDEX, dtype)
    assert bias.equal(inputs[3][INDEX].permute(2, 0, 1).to(dtype)) and bias.stride(1) % 8 == 0
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        fused = FusedAttention.apply(*inputs[:3], bias[None])
    assert (B, M, N, N) not in kept
    cotangent = torch.randn(B, M, N, D).to(dtype)
    ours = fused, *torch.autograd.grad(fused, inputs, cotangent)
    theirs = attention(*exact), *torch.autograd.grad(attention(*exact), exact, cotangent.double())
    assert [x.dtype for x in ours[1:]] == [x.dtype for x in inputs]
    for x, expected in zip(ours, theirs, strict=True):
        assert (x - expected).abs().max() < tolerance * expected.abs().max()


def test_attention_with_a_learned_bias_is_fused():
    inputs, bias = [torch.randn(B, M, N, D) for _ in range(3)], torch.randn(1, M, N, N, requires_grad=True)
    with FastOperators(), Living() as calls:
        x = F.scaled_dot_product_attention(*inputs, attn_mask=bias)
    torch.testing.assert_close(x, F.scaled_dot_product_attention(*inputs, attn_mask=bias))
    assert type(x.grad_fn).__name__ == "FusedAttentionBackward"
    assert calls.calls["_scaled_dot_product_flash_attention_for_cpu"] == 1


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (1, 1, 5, 5), (2, 1, 5, 5), (5, 5)])
def test_masks_of_other_shapes_are_left_to_pytorch(shape):
    shapes, results = [(2, 3, 5, 4)] * 3 + [shape], []
    query, key, value, mask = (torch.randn(each, dtype=torch.double, requires_grad=True) for each in shapes)
    for mode in (torch.enable_grad(), FastOperators()):
        with mode:
            output = F.scaled_dot_product_attention(query, key, value, mask)
        results.append(torch.autograd.grad(output.square().sum(), [query, key, value, mask]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_softmax_over_a_short_axis():
    scores = torch.randn(5, 3, 12, dtype=torch.double) * 100
    with FastOperators(), torch.no_grad():
        torch.testing.assert_close(scores.softmax(-1), F.softmax(scores, -1), rtol=1e-14, atol=0)
        assert scores.softmax(0).equal(torch.softmax(scores, 0))
        assert scores.float().softmax(-1, torch.double).dtype == torch.double


# ---------------------------------------------------------------------------------------------------------- inference


def wide_model(head: str) -> Segmenter:
    """So wide that PyTorch's functions go quicker ways too."""
    return randomized(build_model(head, "tiny", 7, window=64, embed_dim=256))


@pytest.mark.parametrize("kind", ["narrow", "wide", "in training mode"])
@both_heads
def test_scores_are_the_plain_ones(golden_model, head, kind):
    """In training mode by the batch's statistics, which are noted."""
    plain, quick = (wide_model(head) if kind == "wide" else golden_model(head) for _ in range(2))
    quick.load_state_dict(plain.state_dict())
    images, _ = a_batch(plain.config.window)
    for enabled in (True, False, True):
        with fast.inference(quick.train(kind == "in training mode"), enabled):
            scores = quick(images)
        expected = plain.train(kind == "in training mode")(images)
        torch.testing.assert_close(scores.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dict(quick.named_buffers()), dict(plain.named_buffers()), rtol=1e-12, atol=1e-12)


def test_gradients_are_off_inside(golden_model):
    model = golden_model("upernet")
    with fast.inference(model):
        assert not model(a_batch()[0]).requires_grad


def test_the_bias_is_gathered_once_a_block_and_entering_twice_is_free(monkeypatch):
    model, images, calls = wide_model("upernet"), a_batch(64)[0], []
    with fast.inference(model):  # its first use compares both texts
        pass
    monkeypatch.setattr("fast.attention.gather_columns", lambda *args: calls.append(1) or gather_columns(*args))
    with fast.inference(model):
        model(images)
        inside = everything(model)
        with fast.inference(model):
            assert everything(model) == inside
            model(images)
        assert everything(model) == inside
        model(images)
    assert len(calls) == len(model.backbone.blocks)


def test_threads_share_a_model(golden_model):
    """What one has swapped in stays until the last has left."""
    model, images = golden_model("mask2former"), a_batch()[0]
    before, expected = everything(model), model(images).detach()

    def predict() -> torch.Tensor:
        with fast.inference(model):
            return model(images)

    with fast.inference(model), ThreadPoolExecutor() as threads:
        inside = everything(model)
        for scores in threads.map(lambda _: predict(), range(3)):
            torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
        assert everything(model) == inside != before
    assert everything(model) == before


def test_a_prediction_in_inference_mode_spoils_no_training(golden_model):
    model, (images, labels) = golden_model("upernet"), a_batch()
    with torch.inference_mode(), fast.inference(model.eval()):
        model(images)
    with fast.training(model.train()):
        model(images, labels)["loss"].backward()
    assert model.backbone.blocks[0].attn.relative_position_bias_table.grad.abs().sum() > 0


@pytest.mark.parametrize("change", ["data", "assign", "optimizer"])
def test_changed_weights_are_noticed(change):
    """Also past autograd's counters."""
    model, images = wide_model("upernet"), a_batch(64)[0]
    with fast.inference(model):
        before = model(images)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        if change == "data":
            p.data.copy_(0.9 * p)
    if change == "assign":
        model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()}, assign=True)
    elif change == "optimizer":
        torch.optim.AdamW(model.parameters(), lr=0.05, fused=True).step()
    with fast.inference(model):
        after = model(images)
    torch.testing.assert_close(after, model(images).detach(), rtol=1e-12, atol=1e-12)
    assert (after - before).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------------- swap


def doubled(plain):
    """The function with its first result doubled, as a fork may have changed it."""
    def function(*args, **kwargs):
        result = plain(*args, **kwargs)
        return 2 * result if isinstance(result, torch.Tensor) else type(result)((2 * result[0], *result[1:]))

    return function


def merge_with_doubled_f4(self, *args, plain=ViTAdapter.merge):
    maps = plain(self, *args)
    return maps._replace(f4=2 * maps.f4)


CHANGES = {
    "losses": ("mask2former", heads, "mask_losses", doubled(heads.mask_losses), "losses_at_once"),
    "fusion": ("upernet", UperNet, "fuse_levels", doubled(UperNet.fuse_levels), "levels_at_their_resolution"),
    "merge": ("mask2former", ViTAdapter, "merge", merge_with_doubled_f4, "f4_through_lateral"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_text_wins_with_one_warning(golden_model, halton_points, monkeypatch, change):
    head, owner, name, function, part = CHANGES[change]
    monkeypatch.setattr(owner, name, function)
    model, (images, _) = golden_model(head), a_batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fast.inference(model):
            scores = model(images)
        losses = step(model, True)[0]
        with fast.inference(model), fast.training(model):
            pass
    plain = model(images).detach(), step(model, False)[0]
    torch.testing.assert_close((scores, losses), plain, rtol=1e-9, atol=1e-9)
    assert [str(w.message).split(" of fast/")[0] for w in caught] == [part]


def wider(conv: nn.Conv2d) -> nn.Conv2d:
    return nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size[0] + 2, padding=conv.padding[0] + 1,
                     bias=False).double()


OTHER_KINDS = {
    "norm": ("mask2former", lambda m: m.adapter.norms.__setitem__(0, nn.GroupNorm(1, m.config.embed_dim).double())),
    "up": ("upernet", lambda m: setattr(m.adapter, "up", nn.Sequential(m.adapter.up))),
    "lateral": ("upernet", lambda m: m.head.laterals[0].__setitem__(0, wider(m.head.laterals[0][0]))),
    "fuse": ("upernet", lambda m: m.head.fuse.__setitem__(0, wider(m.head.fuse[0]))),
    "batch norm in training": ("mask2former", lambda m: m.adapter.norms[0].train()),
}


@pytest.mark.filterwarnings("ignore:.* of fast/ gives other numbers")
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_layer_of_another_kind_stops_nothing(golden_model, kind):
    head, change = OTHER_KINDS[kind]
    model, (images, _) = golden_model(head), a_batch()
    change(model)
    expected = model(images).detach()
    with fast.inference(model):
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)
    with fast.training(model):
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_a_changed_text_that_both_share_changes_both(golden_model, halton_points, monkeypatch, recwarn):
    monkeypatch.setattr(heads, "dice_loss", lambda overlap, areas: 3 - 5 * (overlap + 1) / (areas + 1))
    model = golden_model("mask2former")
    torch.testing.assert_close(step(model, True)[0], step(model, False)[0], rtol=1e-9, atol=1e-9)
    assert not recwarn


class OwnHead(nn.Conv2d):
    """A fork's own head: one linear layer on f4."""

    def forward(self, features):
        return super().forward(features.f4)


def own_criterion(logits, labels, normalizers=None):
    return {"entropy": F.cross_entropy(logits, labels[:, ::4, ::4], ignore_index=255), "one": logits.new_ones(())}


def test_a_forks_own_head_and_criterion(golden_model, recwarn):
    """Plain and in both contexts: scores at the images' size, the named losses and their sum, and every gradient."""
    model, images = golden_model("mask2former"), a_batch()[0]
    model.head, model.criterion = OwnHead(64, 7, 1).double(), own_criterion
    plain, quick = step(model, False), step(model, True)
    assert list(quick[0]) == ["loss", "entropy", "one"] and quick[0]["loss"] == quick[0]["entropy"] + 1
    torch.testing.assert_close(quick, plain, rtol=1e-9, atol=1e-12)
    with fast.training(model):
        assert model.criterion is own_criterion
    with fast.inference(model):
        scores = model(images)
    assert scores.shape == (2, 7, 96, 96)
    torch.testing.assert_close(scores, model(images).detach(), rtol=1e-12, atol=1e-12)
    assert not recwarn


# ---------------------------------------------------------------------------------------------------------- allocator


def test_keeping_freed_memory_is_asked_for_once_and_harmless_elsewhere(monkeypatch):
    """By `mallopt`, where the C library has it."""
    class Library(list):
        def mallopt(self, option, value):
            self.append((option, value))

    for library, asked in ((Library(), [(-4, 0), (-1, -1)]), ([], [])):  # nothing is mapped, nothing is given back
        monkeypatch.setattr("ctypes.CDLL", lambda _, library=library: library)
        allocator.keep_freed_memory.cache_clear()
        allocator.keep_freed_memory()
        allocator.keep_freed_memory()
        assert library == asked
    for fault in (OSError, TypeError):  # Windows raises the latter: its C library has no empty name
        monkeypatch.setattr("ctypes.CDLL", library := Mock(side_effect=fault))
        allocator.keep_freed_memory.__wrapped__()
        assert library.called
    monkeypatch.setitem(sys.modules, "ctypes", None)  # a Python that was built without it
    allocator.keep_freed_memory.__wrapped__()
