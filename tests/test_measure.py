"""measure.py against costs that can be worked out by hand. No test depends on how long anything takes."""

import math
from dataclasses import replace

import pytest
import torch
from small import CHANGES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import heads
import measure
from measure import Dispatches, forward_flops, kept_for_backward, model_kept, model_waits, training_flops
from model import TINY, Segmenter

SMALL = {head: replace(TINY, head=head, num_classes=5, **CHANGES) for head in ("mask2former", "upernet")}


def toy():
    """Two layers, batch 3: (3, 4) -> (3, 8) -> (3, 2)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2)), torch.randn(3, 4)


# ------------------------------------------------------------------------------------------------------------- counted


def test_flops_of_a_known_model():
    """Four ViT blocks more are 24 N D^2 + 4 N^2 D operations more, each; a multiplication and its sum are two."""
    deeper = forward_flops(replace(TINY, depth=8)) - forward_flops(TINY)
    n, d = 1 + (TINY.window // 16) ** 2, TINY.embed_dim
    assert deeper == 4 * (24 * n * d**2 + 4 * n**2 * d)


def test_training_takes_three_times_a_forward_pass_and_what_only_losses_need():
    """UperNet's auxiliary head trains only: a 3x3 convolution and a classifier on the map of stride 16."""
    config = SMALL["upernet"]
    pixels, width, hidden = (config.window // 16) ** 2, config.embed_dim, config.aux_channels
    auxiliary = 2 * pixels * hidden * (9 * width + config.num_classes)
    assert 2.9 < (training_flops(config) - 3 * auxiliary) / forward_flops(config) < 3.1


def test_attention_of_a_cpu_is_counted_forward_and_backward():
    q, k, v = (torch.randn(2, 4, n, 16, requires_grad=True) for n in (10, 30, 30))
    product = 2 * 2 * 4 * 10 * 30 * 16  # of queries and keys, as of probabilities and values
    with FlopCounterMode(display=False) as counter:
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 5 * product  # four gradients, and the probabilities once more


@pytest.mark.parametrize("fake", [False, True])
def test_memory_kept_for_backward_counts_each_storage_once_and_no_parameter(fake):
    layers, x = toy()
    if fake:
        with FakeTensorMode(allow_non_fake_inputs=True):
            layers, x = layers.to_empty(device="cpu"), torch.empty(3, 4)
            kept = kept_for_backward(lambda: layers(x), layers)
    else:
        kept = kept_for_backward(lambda: layers(x), layers)
    # the input, and the sigmoid's output: twice, as the sigmoid's result and the second layer's input
    assert kept == 4 * (3 * 4 + 3 * 8)


def test_memory_kept_includes_parameters_where_no_module_is_named_and_parts_as_wholes():
    layers, x = toy()
    assert kept_for_backward(lambda: layers(x)) == 4 * (3 * 4 + 3 * 8 + 8 * 2)  # the first layer's input needs no grad
    y = torch.ones(7, requires_grad=True)
    assert kept_for_backward(lambda: (y[:5] * y[:5]).sum()) == 4 * 7


def test_autocast_halves_what_is_kept_and_keeps_casts_of_weights():
    layers, x = toy()
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_for_backward(lambda: layers(x), layers)
    assert kept == 2 * (3 * 4 + 3 * 8 + 8 * 2)


@pytest.mark.parametrize("head", SMALL)
def test_memory_kept_is_the_same_with_and_without_data(head, monkeypatch):
    config = SMALL[head]
    torch.manual_seed(0)
    model = Segmenter(config).train()
    monkeypatch.setattr(heads, "match", measure.first_queries)
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
    expected = kept_for_backward(lambda: model(images, labels), model)
    assert model_kept(config, 2) == pytest.approx(expected, rel=0.01)
    assert 0.4 * expected < model_kept(config, 2, torch.bfloat16) < 0.95 * expected


def test_dispatches_tell_work_from_views():
    x = torch.ones(2, 3)
    with Dispatches() as found:
        (x.t() @ x).relu().view(-1)[2:].sum()
        torch.empty(5)
    assert found.work == {"mm": 1, "relu": 1, "sum": 1}
    assert found.views == {"t": 1, "view": 1, "slice": 1, "empty": 1}


def test_waits_are_found_and_do_not_stop_the_code():
    with measure.waits() as found:
        x = torch.ones(4, 3, device="cuda")
        assert x.sum().item() == 1.0 and bool((x > 0).all())
        assert x[x > 0].shape == (12,) and x.nonzero().shape == (12, 2)
        assert x.cpu().numpy().sum() == 12
        x[x > 1] = torch.zeros(12, device="cuda")
        assert (x.to("cpu", non_blocking=True) + torch.ones(3)).tolist() == [[2.0] * 3] * 4
    assert found.waits == {"_local_scalar_dense": 2, "index": 1, "nonzero": 1, "_to_copy": 2, "index_put_": 1}
    assert found.uploads == {}


def test_an_upload_waits_unless_it_is_non_blocking():
    with measure.waits() as found:
        x = torch.tensor([1, 2]).to("cuda", non_blocking=True)
        x.copy_(torch.tensor([3, 4]), non_blocking=True)
        assert found.waits == {} and found.uploads.total() == 2
        x[0] = 5  # PyTorch makes a tensor of the number on the host and copies that
        x[1:] = 6  # but fills more than one entry on the device
        torch.tensor([1, 2]).to("cuda")
    assert found.waits.total() == 2 and found.uploads.total() == 2


def test_what_stays_on_the_device_waits_for_nothing():
    with measure.waits() as found:
        x = torch.rand(4, 5, device="cuda")
        x = torch.where(x > 0.5, x, 0).to(torch.float16).topk(2).indices
        torch.rand(4, 5, device="cuda").gather(1, x).argsort()[torch.arange(2, device="cuda")].clone()
    assert (found.waits, found.uploads) == ({}, {})


@pytest.mark.parametrize(("head", "most"), [("mask2former", 1), ("upernet", 0)])
def test_a_training_step_waits_for_the_costs_of_the_matching_only(head, most):
    assert model_waits(replace(TINY, head=head), 2, training=False).waits.total() == 0
    found = model_waits(replace(TINY, head=head), 2, training=True)
    assert found.waits.total() <= most, found.waits
    assert found.waits["_to_copy"] == most  # and there is one, which the counting has answered


# --------------------------------------------------------------------------------------------------------------- timed


def test_the_rate_is_that_of_the_prescribed_product(monkeypatch):
    monkeypatch.setattr(measure, "seconds", lambda work, device: work() or 0.5)
    assert measure.matmul_rate("cpu", torch.float32, 1) == 2 * 4725 * 1024 * 4096 / 0.5


class Clock:
    """Time that passes only when `tick` is called."""

    now = 0.0

    def tick(self, seconds):
        self.now += seconds


class Step(torch.autograd.Function):
    """Doubles; takes 1 s forward and the given seconds backward."""

    @staticmethod
    def forward(ctx, x, clock, backward):
        ctx.clock, ctx.seconds = clock, backward
        clock.tick(1)
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.tick(ctx.seconds)
        return 2 * grad, None, None


class Nested(nn.Module):
    """outer = 1 s, inner 1 s, outer 1 s; then a second by nobody."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def inner(self, x):
        return Step.apply(x, self.clock, 10)

    def outer(self, x):
        return Step.apply(self.inner(Step.apply(x, self.clock, 100)), self.clock, 100)

    def forward(self, x):
        return {"loss": Step.apply(self.outer(x), self.clock, 1000).sum()}


def test_time_is_split_by_part_forward_and_backward_without_what_lies_within(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)
    model, x = Nested(clock), torch.ones(2, requires_grad=True)
    parts = {"outer": [(model, "outer")], "inner": [(model, "inner")]}
    found = measure.module_times(model, lambda: model(x)["loss"].backward(), parts)
    assert found == {"outer": 202.0, "inner": 11.0, "other": 1001.0}
    assert x.grad.tolist() == [16.0, 16.0] and "outer" not in vars(model)  # same result, and nothing stays behind
    assert measure.module_times(model, lambda: model(x), parts) == {"outer": 2.0, "inner": 1.0, "other": 1.0}


@pytest.mark.parametrize("head", SMALL)
def test_every_part_of_a_model_takes_time_and_its_gradients_stay(head, monkeypatch):
    torch.manual_seed(0)
    model = Segmenter(replace(SMALL[head], drop_path=0.0, dropout=0.0)).double()
    monkeypatch.setattr(heads, "match", measure.first_queries)
    monkeypatch.setattr(torch, "rand", lambda *shape, **k: torch.full(shape, 0.3, device=k["device"], dtype=k["dtype"]))
    images, labels = torch.randn(2, 3, 64, 64).double(), torch.randint(5, (2, 64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step():
        model(images, labels)["loss"].backward()
        optimizer.step()

    step()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = measure.places(model, optimizer)
    found = measure.module_times(model, step, parts)
    assert set(found) == {"other", *parts} - {"scores"} and min(found.values()) > 0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected.get(name))


def test_peak_memory_of_a_call_sees_what_is_freed_within_it():
    size = 100_000_000
    less = measure.peak_of(lambda: torch.ones(1))
    if math.isnan(less):
        pytest.skip("this system does not tell")
    more = measure.peak_of(lambda: torch.ones(size, dtype=torch.uint8).max())
    again = measure.peak_of(lambda: torch.ones(1))
    assert more - less == pytest.approx(size / 1e9, rel=0.3) and again < less + 0.3 * size / 1e9
    assert measure.peak_memory(torch.device("cpu")) >= 0.5 * more


def test_faults_of_the_measured_are_not_swallowed():
    def fail():
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="on fire"):
        measure.peak_of(fail)
