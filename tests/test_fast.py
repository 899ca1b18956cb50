"""fast/ against the plain text: `training`, `inference`, and what they are made of.

Reading order: training -> recompute -> attention and other operators -> inference -> swap -> allocator. Losses and
convolutions have files of their own; golden values are compared in test_model.py.
"""

import sys
import warnings
from collections import Counter
from functools import partial

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
from fast import allocator, operators
from fast.attention import FusedAttention, gather_columns
from fast.operators import FastOperators
from fast.recompute import recompute_cheap
from heads import UperNet
from model import Attention, Segmenter, build_model, relative_position_index

pytestmark = pytest.mark.usefixtures("seed")
HEADS = list(OFFICIAL)
both_heads = pytest.mark.parametrize("head", HEADS)


def a_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two golden images, and labels of seven classes, some ignored."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 8, (2, 12, 12), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return noise("image", 2, 3, 96, 96), labels.masked_fill(labels == 7, 255)


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
            {name: p.grad.clone() for name, p in model.named_parameters()},
            {name: buffer.clone() for name, buffer in model.named_buffers()})


def everything(model: nn.Module) -> dict:
    """The dictionaries of all modules, as they are now, and dictionaries in them."""
    return {name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
            for name, module in model.named_modules()}


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("checkpointed", [False, True])
@both_heads
def test_training_step_is_the_plain_one(golden_model, halton_points, head, checkpointed):
    """Losses, gradients and running statistics, with stochastic depth and dropout."""
    models = [golden_model(head, drop_path=0.5, dropout=0.3).train() for _ in range(2)]
    if checkpointed:
        from train import checkpoint_activations

        checkpoint_activations(models[1])
    results = [step(model, enabled) for model, enabled in zip(models, (False, True), strict=True)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@both_heads
def test_training_leaves_the_model_as_it_was(golden_model, head):
    """Also after an error; and inside, state dicts have the same names."""
    model = golden_model(head).train()
    before, names = everything(model), list(model.state_dict())
    with pytest.raises(KeyError), fast.training(model):
        assert list(model.state_dict()) == names and everything(model) != before
        raise KeyError
    assert everything(model) == before


@both_heads
def test_training_under_autocast(golden_model, halton_points, head):
    """Losses in float32 near the plain ones, finite gradients in the direction of the plain ones."""
    plain, quick = (step(golden_model(head).float().train(), enabled, amp=True)[:2] for enabled in (False, True))
    assert {loss.dtype for losses, _ in (plain, quick) for loss in losses.values()} == {torch.float32}
    assert quick[0]["loss"].item() == pytest.approx(plain[0]["loss"].item(), rel=0.02)
    gradients = [torch.cat([g.flatten() for g in grads.values()]) for _, grads in (plain, quick)]
    assert torch.isfinite(torch.stack(gradients)).all()
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


def test_a_compiled_model_keeps_its_own_way(golden_model, monkeypatch):
    """The compiler decides what is recomputed: here it would raise."""
    model = golden_model("upernet")
    model.compile(backend="eager")
    monkeypatch.setattr(sys.modules["fast.training"], "recompute_cheap", None)
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
    """Measured as the storages alive after the forward pass, other than parameters, buffers, images and labels."""
    model = build_model(head, "tiny", 7, window=128, depth=12).train()
    images, labels, kept = torch.randn(2, 3, 128, 128), torch.randint(0, 7, (2, 128, 128)), {}
    for enabled in (False, True):
        with fast.training(model, enabled), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            with Living(images, labels, *model.parameters(), *model.buffers()) as forward:
                loss = model(images, labels)["loss"]  # noqa: F841: it holds what is kept
            kept[enabled] = forward.nbytes()
    assert kept[True] < share * kept[False]


def test_norm_and_gelu_are_computed_again_and_products_are_not():
    linear, x = nn.Linear(64, 64), torch.randn(512, 64, requires_grad=True)
    wanted = [x, *linear.parameters()]
    with recompute_cheap(), Living(*wanted) as forward:
        y = linear(F.gelu(linear(F.layer_norm(x, (64,)))))
    assert forward.nbytes() < 2.1 * x.nbytes  # the first product and the result
    with Living() as backward:
        gradients = torch.autograd.grad(y.sum(), wanted)
    assert [backward.calls[name] for name in ("native_layer_norm", "gelu", "addmm", "mm")] == [1, 1, 0, 4]
    expected = torch.autograd.grad(linear(F.gelu(linear(F.layer_norm(x, (64,))))).sum(), wanted)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)


@both_heads
def test_a_step_recomputes_norms_and_gelus_alone(golden_model, head):
    """A linear layer is `addmm` forward and two `mm` backward, a convolution `convolution_backward`."""
    model, (images, labels) = golden_model(head).train(), a_batch()
    with fast.training(model):
        loss = model(images, labels)["loss"]
        with Living() as backward:
            loss.backward()
    assert backward.calls["gelu"] >= 8 and backward.calls["native_layer_norm"] >= 16
    assert not backward.calls.keys() & {"addmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu"}


# ------------------------------------------------------------------------------------------ attention, other operators

B, M, D, N, ROWS = 2, 3, 4, 7, 3 * 5 + 3
INDEX = relative_position_index(2, 3)


def attention_inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key, value (B, M, N, D), table (ROWS, M)."""
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in [(B, M, N, D)] * 3 + [(ROWS, M)]]


def fused_attention(query, key, value, table):
    return FusedAttention.apply(query, key, value, gather_columns(table.t(), INDEX).to(query.dtype)[None])


def attention_by_definition(query, key, value, table):
    scores = query @ key.mT / D**0.5 + table[INDEX].permute(2, 0, 1)
    return scores.softmax(-1) @ value


def test_gathered_bias_is_the_tables_and_aligned():
    table = torch.randn(ROWS, M)
    bias = gather_columns(table.t(), INDEX)
    assert bias.equal(table[INDEX].permute(2, 0, 1))
    assert bias.stride(1) % 8 == 0


def test_fused_attention_is_attention():
    """Values and every gradient; of arrays (N, N) only the bias is kept."""
    inputs, kept = attention_inputs(torch.double), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fused = fused_attention(*inputs)
    assert not [x for x in kept if x.shape == (B, M, N, N)]
    expected = attention_by_definition(*inputs)
    torch.testing.assert_close(fused, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad(x, inputs, cotangent) for x in (fused, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_fused_attention_in_half_precision():
    """As under autocast: queries, keys and values are bfloat16, the table is not."""
    *qkv, table = attention_inputs(torch.float32)
    low = [x.detach().bfloat16().requires_grad_() for x in qkv] + [table]
    exact = [x.detach().double().requires_grad_() for x in low]
    cotangent = torch.randn(B, M, N, D).bfloat16()
    gradients = torch.autograd.grad(fused_attention(*low), low, cotangent)
    expected = torch.autograd.grad(attention_by_definition(*exact), exact, cotangent.double())
    assert [x.dtype for x in gradients] == [torch.bfloat16] * 3 + [torch.float32]
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


def test_beits_attention_goes_the_fused_way():
    layer, x = Attention(12, M, (2, 3)), torch.randn(B, N, 12)
    nn.init.normal_(layer.relative_position_bias_table)
    expected = layer(x, INDEX)
    with FastOperators(), Living() as calls:
        torch.testing.assert_close(layer(x, INDEX), expected)
    assert calls.calls["_scaled_dot_product_flash_attention_for_cpu"] == 1


def test_softmax_over_a_short_axis(monkeypatch):
    scores = torch.randn(5, 3, 12, dtype=torch.double) * 100
    with FastOperators():
        with torch.no_grad():
            torch.testing.assert_close(scores.softmax(-1), F.softmax(scores, -1), rtol=1e-14, atol=0)
            assert scores.softmax(0).equal(torch.softmax(scores, 0))
            assert scores.float().softmax(-1, torch.double).dtype == torch.double
        assert scores.requires_grad_().softmax(-1).grad_fn is not None


# ---------------------------------------------------------------------------------------------------------- inference


def wide_model(head: str) -> Segmenter:
    """So wide that PyTorch's functions go quicker ways too."""
    return randomized(build_model(head, "tiny", 7, window=64, embed_dim=256))


@pytest.mark.parametrize("wide", [False, True])
@both_heads
def test_scores_are_the_plain_ones(golden_model, head, wide):
    """The model is as it was at the end."""
    model = wide_model(head) if wide else golden_model(head)
    images = a_batch()[0][:, :, :model.config.window, :model.config.window]
    before, expected = everything(model), model(images).detach()
    for enabled in (True, False, True):
        with fast.inference(model, enabled):
            scores = model(images).detach()
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
        assert everything(model) == before


def test_gradients_are_off_inside(golden_model):
    model = golden_model("upernet")
    with fast.inference(model):
        assert not model(a_batch()[0]).requires_grad


@both_heads
def test_scores_in_training_mode_use_the_batchs_statistics(golden_model, head):
    plain, quick = (golden_model(head).train() for _ in range(2))
    with fast.inference(quick):
        scores = quick(a_batch()[0])
    torch.testing.assert_close(scores, plain(a_batch()[0]).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(quick.named_buffers()), dict(plain.named_buffers()))


def test_the_bias_is_gathered_once_a_block_and_entering_twice_is_free(monkeypatch):
    model, images, calls = wide_model("upernet"), a_batch()[0][:, :, :64, :64], []
    monkeypatch.setattr(operators, "gather_columns", lambda *args: calls.append(1) or gather_columns(*args))
    with fast.inference(model):
        model(images)
        inside = everything(model)
        with fast.inference(model):
            assert everything(model) == inside
            model(images)
        assert everything(model) == inside
        model(images)
    assert len(calls) == len(model.backbone.blocks)


@pytest.mark.parametrize("change", ["add", "copy", "load", "assign", "step"])
def test_changed_weights_are_noticed(change):
    """In place, past autograd (`.data`), by a state dict and by an optimizer."""
    model, images = wide_model("upernet"), a_batch()[0][:, :, :64, :64]
    with fast.inference(model):
        before = model(images)
    state = {name: 0.9 * value for name, value in model.state_dict().items()}
    for name, p in model.named_parameters():
        p.grad = torch.ones_like(p)
        if change == "add":
            with torch.no_grad():
                p -= 0.1 * p
        elif change == "copy":
            p.data.copy_(state[name])
    if change in ("load", "assign"):
        model.load_state_dict(state, assign=change == "assign")
    elif change == "step":
        torch.optim.AdamW(model.parameters(), lr=0.05, fused=True).step()
    with fast.inference(model):
        after = model(images)
    torch.testing.assert_close(after, model(images).detach(), rtol=1e-12, atol=1e-12)
    assert (after - before).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------------- swap


def doubled(plain):
    """The function with its first result doubled: what a fork may have changed."""
    def function(*args, **kwargs):
        result = plain(*args, **kwargs)
        return 2 * result if isinstance(result, torch.Tensor) else type(result)((2 * result[0], *result[1:]))

    return function


class OwnFusion(UperNet):
    def fuse_levels(self, levels):
        return super().fuse_levels(levels[::-1][::-1]) + 1


def merge_doubled(self, *args, plain=ViTAdapter.merge):
    maps = plain(self, *args)
    return maps._replace(f8=2 * maps.f8)


CHANGES = {
    "loss": ("mask2former", heads, "mask_losses", doubled(heads.mask_losses), "Mask2Former's losses"),
    "fusion": ("upernet", UperNet, "fuse_levels", doubled(UperNet.fuse_levels), "UperNet.fuse_levels"),
    "merge": ("upernet", ViTAdapter, "merge", merge_doubled, "ViTAdapter.merge"),
    "merge, other head": ("mask2former", ViTAdapter, "merge", merge_doubled, "ViTAdapter.merge"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_text_wins_with_one_warning(golden_model, halton_points, monkeypatch, change):
    head, owner, name, function, part = CHANGES[change]
    (images, _), original = a_batch(), golden_model(head)
    unchanged = original(images).detach(), step(original, False)[0]
    monkeypatch.setattr(owner, name, function)
    model = golden_model(head)
    expected = model(images).detach(), step(model, False)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with fast.inference(model):
                scores = model(images)
            losses = step(model, True)[0]
    torch.testing.assert_close((scores, losses), expected, rtol=1e-9, atol=1e-9)
    assert losses["loss"] != pytest.approx(unchanged[1]["loss"].item(), rel=1e-6)
    assert [str(w.message).split(" gives")[0] for w in caught] == [f"the plain text of {part}"]


def test_a_subclass_wins(golden_model):
    model, images = golden_model("upernet"), a_batch()[0]
    model.head.__class__ = OwnFusion
    expected = model(images).detach()
    with pytest.warns(UserWarning, match="UperNet.fuse_levels gives other numbers"), fast.inference(model):
        torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)


def test_a_shared_text_changes_both(golden_model, halton_points, monkeypatch, recwarn):
    """`fast.losses` imports dice_loss from heads: an edit there is an edit of both."""
    for module in (heads, fast.losses):
        monkeypatch.setattr(module, "dice_loss", lambda overlap, areas: 3 - 5 * (overlap + 1) / (areas + 1))
    model = golden_model("mask2former").train()
    torch.testing.assert_close(step(model, True)[0], step(model, False)[0], rtol=1e-9, atol=1e-9)
    assert not recwarn


def test_a_replaced_criterion_is_used_as_it_is(golden_model, recwarn):
    model = golden_model("mask2former")
    for own in (lambda prediction, labels, normalizers: {"one": prediction.class_logits.sum() * 0 + 1},
                partial(lambda *_, value: {"one": torch.tensor(value, requires_grad=True)}, value=1.0)):
        model.criterion = own
        with fast.training(model):
            assert model.criterion is own
            assert {name: loss.item() for name, loss in model(*a_batch()).items()} == {"loss": 1, "one": 1}
    assert not recwarn


@both_heads
def test_the_comparison_leaves_no_trace(golden_model, head):
    """Statistics, modes (each module's own) and random numbers are as before."""
    model = golden_model(head).train()
    model.adapter.spatial_prior.eval()
    state, modes = {n: t.clone() for n, t in model.state_dict().items()}, [m.training for m in model.modules()]
    random = torch.get_rng_state()
    for context in (fast.training, fast.inference):
        with context(model):
            assert [m.training for m in model.modules()] == modes
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert torch.get_rng_state().equal(random)


class OwnHead(nn.Module):
    """A fork's own head: one linear layer on f4."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.layer = nn.Conv2d(dim, num_classes, 1)

    def forward(self, features):
        return self.layer(features.f4)


def own_criterion(logits, labels, normalizers=None):
    return {"entropy": F.cross_entropy(logits, labels[:, ::4, ::4], ignore_index=255), "one": logits.new_ones(())}


def test_a_forks_own_head_and_criterion(golden_model, recwarn):
    """Plain and in both contexts: scores at the images' size, the named losses and their sum, and every gradient."""
    model, (images, labels), results = golden_model("mask2former"), a_batch(), []
    model.head, model.criterion = OwnHead(64, 7).double(), own_criterion
    for enabled in (False, True):
        model.zero_grad()
        with fast.training(model, enabled):
            losses = model(images, labels)
            losses["loss"].backward()
        assert list(losses) == ["loss", "entropy", "one"] and losses["loss"] == losses["entropy"] + 1
        with fast.inference(model, enabled), torch.no_grad():
            scores = model(images)
        assert scores.shape == (2, 7, 96, 96)
        results.append((losses["loss"].detach(), scores, [p.grad for p in model.parameters() if p.grad is not None]))
    assert len(results[0][2]) > 300
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    assert not recwarn


# ---------------------------------------------------------------------------------------------------------- allocator


def test_keeping_freed_memory_is_asked_for_once_and_harmless_elsewhere(monkeypatch):
    """By `mallopt`, where the C library has it."""
    calls = []

    class Library:
        def __init__(self, _):
            pass

        def mallopt(self, option, value):
            calls.append((option, value))

    monkeypatch.setattr(allocator.ctypes, "CDLL", Library)
    allocator.keep_freed_memory.cache_clear()
    allocator.keep_freed_memory()
    allocator.keep_freed_memory()
    assert calls == [(-4, 0), (-1, -1)]  # nothing is mapped, nothing is given back
    del Library.mallopt
    allocator.keep_freed_memory.cache_clear()
    allocator.keep_freed_memory()
