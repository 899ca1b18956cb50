"""fast/launches.py on a CPU in a GPU's place: the numbers of the plain text from fewer operators."""

import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import OFFICIAL
from test_fast import a_batch, step
from torch.utils._python_dispatch import TorchDispatchMode

import adapter
import fast
import heads
from fast import launches
from fast.launches import CONSTANTS, CastTogether, weights_cast_together
from layout import checkpoint_activations

pytestmark = pytest.mark.usefixtures("seed")
both_heads = pytest.mark.parametrize("head", OFFICIAL)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for name in ("fast.training", "fast.inference"):
        monkeypatch.setattr(sys.modules[name], "on_gpu", lambda _: True)
        monkeypatch.setattr(sys.modules[name], "pays", lambda _: False)


class Launches(TorchDispatchMode):
    """How often each operator runs that is no view and no allocation: on a GPU a launch at least."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not (function.is_view or "empty" in function.__name__):
            self.calls[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


@both_heads
def test_a_training_step_is_the_plain_one(golden_model, halton_points, as_on_a_gpu, recwarn, head):
    plain, quick = (golden_model(head, drop_path=0.5, dropout=0.3).train() for _ in range(2))
    torch.testing.assert_close(step(quick, True), step(plain, False), rtol=1e-9, atol=1e-9)
    assert not recwarn  # every part agrees with the plain text


@both_heads
def test_scores_are_the_plain_ones(golden_model, as_on_a_gpu, recwarn, head):
    model, images = golden_model(head), a_batch()[0]
    with fast.inference(model):
        torch.testing.assert_close(model(images), model(images), rtol=0, atol=0)
        scores = model(images)
    torch.testing.assert_close(scores, model(images).detach(), rtol=1e-12, atol=1e-12)
    assert not recwarn


@both_heads
def test_mixed_precision_stays_near_the_plain_text_with_fewer_launches(golden_model, halton_points, as_on_a_gpu, head):
    results, launched, scores = [], [], []
    for enabled in (False, True):
        model = golden_model(head).float().train()
        step(model, enabled, amp=True)  # what is computed once
        with Launches() as counted:
            results.append(step(model, enabled, amp=True)[:2])
        launched.append(counted.calls.total())
        with fast.inference(model.eval(), enabled), torch.autocast("cpu", torch.bfloat16):
            scores.append(model(a_batch()[0].float()).detach())
    (plain, plain_gradients), (quick, gradients) = results
    assert quick["loss"].item() == pytest.approx(plain["loss"].item(), rel=0.02)
    both = [torch.cat([g.flatten() for g in each.values()]) for each in (plain_gradients, gradients)]
    assert plain_gradients.keys() == gradients.keys() and torch.cosine_similarity(*both, dim=0) > 0.95
    assert launched[1] < {"mask2former": 0.8, "upernet": 0.95}[head] * launched[0]
    assert scores[1].dtype == scores[0].dtype and (scores[1] - scores[0]).abs().max() < 0.05 * scores[0].abs().max()


# ---------------------------------------------------------------------------------------------------------- constants


def test_constants_are_computed_once_and_the_plain_functions_come_back(golden_model):
    model, images = golden_model("mask2former").train(), a_batch()[0]
    before = [vars(owner)[name] for owner, name, _ in CONSTANTS]
    with fast.training(model):
        with torch.inference_mode():
            model(images)
        with Launches() as counted:
            model(images)
        assert [vars(owner)[name] for owner, name, _ in CONSTANTS] != before
        model(images).sum().backward()  # what was computed in inference mode serves a backward pass too
    assert not {"arange", "sin", "cos", "fill_"} & counted.calls.keys()
    assert [vars(owner)[name] for owner, name, _ in CONSTANTS] == before


def test_constants_differ_by_size_type_and_device():
    positions = launches.once(heads.sine_positions)
    like = torch.empty(0)
    for h, w, x in ((2, 3, like), (3, 2, like), (2, 3, like.double()), (2, 3, like.to("meta"))):
        for _ in range(2):
            found, plain = positions(h, w, 8, like=x), heads.sine_positions(h, w, 8, like=x)
            assert (found.dtype, found.device, found.shape) == (plain.dtype, plain.device, plain.shape)
            assert x.device.type == "meta" or found.equal(plain)
    assert positions(2, 3, 8, like=like) is positions(2, 3, 8, like=like)
    assert positions(2, 3, 8, like=torch.nn.Parameter(like)) is not positions(2, 3, 8, like=like)


# ------------------------------------------------------------------------------------------------------------ weights


@both_heads
def test_weights_cast_together_are_autocasts_bit_for_bit(golden_model, halton_points, monkeypatch, head):
    """Losses and every gradient; a frozen weight gets none."""
    results = []
    for together in (False, True):
        model, (images, labels) = golden_model(head).float().train(), a_batch()
        model.backbone.blocks[0].requires_grad_(False)
        torch.manual_seed(1)
        with weights_cast_together(model) if together else torch.enable_grad():
            with torch.autocast("cpu", torch.bfloat16), Launches() as counted:
                losses = model(images.float(), labels)
            losses["loss"].backward()
        results.append((losses, {name: p.grad for name, p in model.named_parameters()}, counted.calls["_to_copy"]))
    (plain, plain_gradients, casts), (quick, gradients, fewer) = results
    torch.testing.assert_close((quick, gradients), (plain, plain_gradients), rtol=0, atol=0)
    assert gradients["backbone.blocks.0.mlp.fc1.weight"] is None and fewer < 0.75 * casts


def test_weights_are_cast_while_a_forward_pass_runs_and_autocast_and_gradients_are_on(golden_model):
    model, images, types = golden_model("upernet").float(), a_batch()[0].float(), []
    layer, weight = model.head.classifier, dict(model.named_parameters())["head.classifier.weight"]
    layer.register_forward_hook(lambda layer, *_: types.append(layer.weight.dtype))
    with weights_cast_together(model):
        for gradients, low in ((True, False), (False, True), (True, True), (True, False)):
            with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, enabled=low):
                model(images)
            assert layer.weight is weight
    assert types == [torch.float32, torch.float32, torch.bfloat16, torch.float32] and "forward" not in vars(model)


def test_several_steps_in_one_context_learn(golden_model, halton_points):
    """A fork may put the context around its loop."""
    results = []
    for together in (False, True):
        model, (images, labels) = golden_model("upernet").float().train(), a_batch()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        with weights_cast_together(model) if together else torch.enable_grad():
            for _ in range(3):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(images.float(), labels)["loss"]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append(loss.detach())
    assert results[0].equal(results[1])


@both_heads
def test_activations_computed_twice_give_the_same_gradients(golden_model, halton_points, as_on_a_gpu, head):
    results = []
    for twice in (False, True):
        model = golden_model(head).float().train()
        if twice:
            checkpoint_activations(model)
        results.append(step(model, True, amp=True)[:2])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_cast_weight_that_is_not_used_has_no_gradient():
    weights = [torch.randn(3, requires_grad=True) for _ in range(3)]
    low = CastTogether.apply(torch.bfloat16, *weights)
    (low[0].sum() + 2 * low[2].sum()).backward()
    assert [None if w.grad is None else w.grad.tolist() for w in weights] == [[1.0] * 3, None, [2.0] * 3]


# --------------------------------------------------------------------------------------------------------------- maps


def test_maps_keep_their_type_when_resized(golden_model, as_on_a_gpu):
    model, x = golden_model("upernet").train(), torch.randn(1, 2, 3, 3).bfloat16()
    with fast.training(model), torch.autocast("cpu", torch.bfloat16):
        small = adapter.resize(x, (6, 6))
    assert small.dtype == torch.bfloat16
    assert small.equal(F.interpolate(x.float(), (6, 6), mode="bilinear").bfloat16())


def test_group_norms_between_convolutions_are_channels_last(golden_model, as_on_a_gpu):
    model = golden_model("mask2former").train()
    norm = model.head.pixel_decoder.lateral[1]
    with fast.training(model):
        assert norm(torch.randn(2, norm.num_channels, 4, 4).double()).is_contiguous(memory_format=torch.channels_last)
