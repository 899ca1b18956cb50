"""attention.py: the fused way against the definition, values and every gradient."""

import pytest
import torch

from fast import attention
from fast.attention import biased_attention, gather_bias
from model import Attention, relative_position_index

B, M, D = 2, 3, 4
GRID = (2, 3)
N, ROWS = 7, 3 * 5 + 3


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    """Query, key, value (B, M, N, D), table (ROWS, M)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, M, N, D)] * 3 + [(ROWS, M)]
    return [torch.randn(shape, dtype=torch.double, generator=generator).requires_grad_() for shape in shapes]


def plain(query, key, value, table, index):
    """By the definition, written out."""
    scores = query @ key.mT / D**0.5 + table[index].permute(2, 0, 1)
    return scores.softmax(-1) @ value


def test_gathered_bias_is_the_tables_and_aligned():
    table, index = torch.randn(ROWS, M), relative_position_index(*GRID)
    bias = gather_bias(table, index)
    assert bias.equal(table[index].permute(2, 0, 1)[None])
    assert bias.stride(2) % 8 == 0


def test_fused_attention_is_attention(inputs):
    index = relative_position_index(*GRID)
    fused, expected = biased_attention(*inputs, index), plain(*inputs, index)
    assert type(fused.grad_fn).__name__ == "FusedBiasedAttentionBackward"
    torch.testing.assert_close(fused, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad(x, inputs, cotangent) for x in (fused, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_fused_attention_keeps_neither_bias_nor_probabilities(inputs):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        biased_attention(*inputs, relative_position_index(*GRID))
    assert max(kept) == B * M * N * D


def test_without_gradient_it_is_pytorchs(inputs, monkeypatch):
    monkeypatch.setattr(attention, "FusedBiasedAttention", None)  # to use it would raise
    index = relative_position_index(*GRID)
    with torch.no_grad():
        torch.testing.assert_close(biased_attention(*inputs, index), plain(*inputs, index))


def test_half_precision_keeps_the_bias_gradient_in_full(inputs):
    """As under autocast: queries, keys and values are bfloat16, the table is not."""
    index, (*qkv, table) = relative_position_index(*GRID), [x.detach().float() for x in inputs]
    low = [x.bfloat16().requires_grad_() for x in qkv] + [table.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in low]
    cotangent = torch.randn(B, M, N, D).bfloat16()
    gradients = torch.autograd.grad(biased_attention(*low, index), low, cotangent)
    expected = torch.autograd.grad(plain(*exact, index), exact, cotangent.double())
    assert [x.dtype for x in gradients] == [torch.bfloat16] * 3 + [torch.float32]
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


def test_the_bias_is_gathered_once_for_an_evaluation_and_again_when_the_table_changes(monkeypatch):
    calls = []
    monkeypatch.setattr("model.gather_bias", lambda *args: calls.append(1) or gather_bias(*args))
    layer, index = Attention(8, 2, GRID).eval(), relative_position_index(*GRID)
    x, norm = torch.randn(1, N, 8), torch.nn.Identity()

    @torch.no_grad()
    def run() -> torch.Tensor:
        return layer(x, index, norm)

    assert run().equal(run()) and len(calls) == 1
    before = run()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5, fused=True)
    layer(x, index, norm).square().sum().backward()
    optimizer.step()
    expected = layer(x, index, norm)  # with gradient: nothing reused
    torch.testing.assert_close(run(), expected)
    assert not run().allclose(before) and len(calls) == 2
    state = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
    for assign in (False, True):
        layer.load_state_dict(state, assign=assign)
        torch.testing.assert_close(run(), layer(x, index, norm))
    with torch.no_grad():
        layer.relative_position_bias_table += 1.5 * torch.randn(ROWS, 2)
    torch.testing.assert_close(run(), layer(x, index, norm))
    layer.train()  # while the weights change, nothing is reused
    gathered = len(calls)
    run()
    assert layer.kept_bias is None and len(calls) == gathered
    layer.eval().double()
    x = x.double()
    torch.testing.assert_close(run(), layer(x, index, norm))
