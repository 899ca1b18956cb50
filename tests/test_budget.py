"""What budget.py counts, against numbers worked out by hand and against CUDA's own autocast."""
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import budget
import heads
from benchmark import markdown
from measure import forward_flops, kept_for_backward, twin
from model import SIZES, build_model
from msda_cuda import ops
from msda_cuda.build import BuildError

HEADS = ("upernet", "mask2former")


@pytest.fixture
def needs_operator():
    if ops.active_path("cpu") != "native":
        pytest.skip("no native operator")


def test_tally_counts_arguments_and_results_once():
    a, b = torch.ones(10, 20), torch.ones(20, 30)
    with budget.Tally() as tally:
        c = a @ b  # 4 * (200 + 600 + 300) bytes, 2 * 10 * 20 * 30 FLOP
        c.t().unsqueeze(0).expand(5, -1, -1)  # views
        a.bfloat16()  # (4 + 2) * 200 bytes
        torch.empty(1000)
        b.add(1)  # 4 * (600 + 600) bytes
    assert (tally.kernels, tally.flop, tally.bytes) == (3, 12_000, 4400 + 1200 + 4800)
    expected = {"products": 4400, "casts": 1200, "norms": 0, "deformable": 0, "the rest": 4800}
    assert tally.seconds == pytest.approx({name: size / 3.0e12 for name, size in expected.items()})


def test_an_expanded_tensor_is_read_once():
    with budget.Tally() as tally:
        torch.ones(1, 8).expand(100, 8).add(torch.ones(100, 8))  # 32 bytes, 3200, and 3200 of the sum; ones written
    assert tally.bytes == 2 * 3200 + 32 + 32 + 3200


def test_arithmetic_outlasts_bytes_in_a_large_product():
    a = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    with budget.Tally() as tally:
        a @ a
    assert tally.seconds["products"] == pytest.approx(2 * 4096**3 / 800e12)  # 172 us; the bytes alone: 34 us


def forward_tally(head: str, device: str) -> budget.Tally:
    """What forward and losses of the tiny model cost with the bfloat16 autocast of `device`."""
    with (FakeTensorMode(allow_non_fake_inputs=True), patch.object(heads, "match", budget.first_queries),
          patch.object(ops, "active_path", lambda device: "native"), budget.Tally() as tally):
        model = twin(replace(SIZES["tiny"], head=head), device, training=True)
        images = torch.empty(2, 3, 128, 128, device=device)
        previous = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        torch.set_autocast_enabled(device, True)  # torch.autocast would refuse where there is no GPU
        torch.set_autocast_dtype(device, torch.bfloat16)
        try:
            with budget.on_cuda(autocast=device == "cpu"):  # otherwise it is CUDA's own
                model(images, torch.empty_like(images[:, 0], dtype=torch.long))
        finally:
            torch.clear_autocast_cache()
            torch.set_autocast_enabled(device, previous[0])
            torch.set_autocast_dtype(device, previous[1])
    return tally


@pytest.mark.parametrize("head", HEADS)
def test_posing_as_a_cpu_moves_what_cuda_autocast_moves(needs_operator, head):
    """The same kernels, but for cuDNN's batch norm: it notes a few bytes and, without data, loses the channels-last
    layout, which some copies then mend; and `embedding_bag`, which on CUDA notes the bag of each of its four indices,
    on a CPU only each bag's size: 3 numbers of 8 bytes a point more, in 4 outputs."""
    posed, real = forward_tally(head, "cpu"), forward_tally(head, "cuda")
    assert posed.flop == real.flop
    assert posed.seconds.pop("casts") == pytest.approx(real.seconds.pop("casts"), rel=0.05)
    if head == "mask2former":
        real.seconds["the rest"] -= 4 * 2 * SIZES["tiny"].num_points * 3 * 8 / budget.BANDWIDTH
    assert posed.seconds == pytest.approx(real.seconds, rel=1e-3)


def test_attention_keeps_no_scores():
    """Kept are q, k, v, the output, a float32 number a row and the bias once for all images."""
    with FakeTensorMode():
        q, k, v = (torch.empty(3, 4, 96, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        bias, results = torch.empty(4, 96, 96, dtype=torch.bfloat16, requires_grad=True), []
        with budget.on_cuda():
            kept = kept_for_backward(lambda: results.append(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))
        rows = 3 * 4 * 96
        least = 2 * 4 * rows * 32 + 2 * 4 * 96 * 96 + 4 * rows
        assert least <= kept <= least + 64  # and the random seed of its dropout
        results[0].sum().backward()
        assert bias.grad.shape == bias.shape


@pytest.mark.parametrize("head", HEADS)
def test_counts_grow_with_images_and_kernels_hardly(needs_operator, head):
    """Mask2Former multiplies matched queries with pixels image by image: forward and for two gradients."""
    two, four = (budget.run_without_data(head, "tiny", images) for images in (2, 4))
    assert four.tally.flop == 2 * two.tally.flop
    assert four.tally.kernels - two.tally.kernels == {"mask2former": 2 * 3, "upernet": 0}[head]
    assert two.kept < four.kept < 2 * two.kept  # the bfloat16 copies of the weights are there once
    with torch.device("meta"):
        assert two.parameters == sum(p.numel() for p in build_model(head, "tiny").parameters())


@pytest.mark.parametrize("head", HEADS)
def test_inference_counts_the_flop_of_the_forward_pass(needs_operator, head):
    """Those that `measure` counts without autocast, on a CPU's attention."""
    counts = budget.run_without_data(head, "tiny", 1, training=False)
    assert counts.kept == 0
    assert counts.tally.flop == forward_flops(replace(SIZES["tiny"], head=head))


def test_deformable_row_by_hand():
    """Pixel decoder of Mask2Former large: 4725 queries, 32 heads, 3 levels, 4 points: 1,814,400 points."""
    shape = next(shape for shape in budget.OP_CALLS if shape.name == "pixel decoder, large")
    row = budget.deformable_row(shape, 6)
    points, value = 1_814_400, 4725 * 1024
    assert row["forward MFLOP"] == pytest.approx(points * 4 * 32 * 2 / 1e6)  # four pixels, 32 channels
    assert row["gathered MB"] == pytest.approx(points * 4 * 64 / 1e6)
    assert row["forward MB"] == pytest.approx((2 * value + 2 * value + 12 * points) / 1e6)
    assert row["forward us"] == pytest.approx(row["forward MB"] / 3.0)  # memory-bound: 11 FLOP a byte of 22
    assert row["16-byte atomics"] == points * 4 * 8
    assert row["backward MB"] == pytest.approx((4 * value + 24 * points + 18 * value) / 1e6)


@pytest.mark.parametrize("size", ["base", "large"])
def test_deformable_shapes_are_those_of_the_models(size):
    """Every call of a forward pass, found by running one."""
    found = {}

    def note(value, shapes, locations, weights):
        key = tuple(map(tuple, shapes)), locations.shape[1], value.shape[2], value.shape[3], locations.shape[4]
        found[key] = found.get(key, 0) + 1
        return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])

    with FakeTensorMode(allow_non_fake_inputs=True), patch("msda_cuda.module.ms_deform_attn", note), torch.no_grad():
        twin(replace(SIZES[size], head="mask2former"), "cpu")(torch.empty(1, 3, 480, 480))
    expected = {(tuple(sorted(shape.levels)), *shape[2:]): calls for shape, calls in budget.OP_CALLS.items()
                if shape.name.endswith(size)}
    assert {(tuple(sorted(levels)), *rest): calls for (levels, *rest), calls in found.items()} == expected


def some_counts(parameters: int, kept: int) -> budget.Counts:
    tally = budget.Tally()
    tally.seconds["products"], tally.kernels, tally.flop, tally.bytes = 0.5, 1000, 8 * 10**12, 10**9
    return budget.Counts(tally, kept, 1, parameters)


def test_step_row_by_hand():
    row = budget.step_row("x", 800, 8, some_counts(3_000_000_000, 0))
    assert row["arithmetic ms"] == pytest.approx(8)  # 8 x 800 GFLOP at 800 TFLOP/s
    assert row["AdamW ms"] == pytest.approx(28)  # 28 bytes x 3e9 at 3 TB/s
    assert row["sum ms"] == pytest.approx(500 + 28)
    assert (row["GFLOP an image"], row["GB moved"]) == (1000, 1)
    assert row["host ms"] == pytest.approx(5)
    assert row["waits"] == 1


def test_memory_row_by_hand():
    counts = {2: some_counts(10**9, 7 * 10**9), 16: some_counts(10**9, 35 * 10**9)}  # 3 GB, and 2 GB an image
    row = budget.memory_row("x", 2, 16, counts)
    assert [row[name] for name in ("states GB", "kept an image GB", "kept in any case GB", "sum, 16 images GB",
                                   "gradients GB")] == pytest.approx([16, 2, 3, 51, 4])
    assert row["all-reduce ms"] == pytest.approx(1e3 * 7 / 450)  # 2 x 7/8 x 4 GB at 450 GB/s


def test_evaluation_row_by_hand():
    rows = [budget.evaluation_row("x", 16, some_counts(1, 0), multi_scale) for multi_scale in (False, True)]
    assert [row["windows a picture"] for row in rows] == [4, 60]  # 64 with the two equal views counted twice
    assert rows[0]["PFLOP"] == pytest.approx(5105 * 4 * 0.5e12 / 1e15)
    assert rows[0]["operator by operator s"] == pytest.approx(5105 * 4 * 0.5 / 16)


def test_without_operator_one_line_says_why(monkeypatch, capsys):
    monkeypatch.setattr(budget, "active_path", lambda device: "torch")
    assert budget.main() == 2
    assert capsys.readouterr().err.startswith("error: there is no native operator to count")
    with pytest.raises(BuildError):
        budget.run_without_data("upernet", "tiny", 1)


def test_page_shows_the_tables_that_need_no_model():
    page = (Path(budget.__file__).parent / "docs" / "gpu-budget.md").read_text()
    rows = [budget.deformable_row(*item) for item in budget.OP_CALLS.items()]
    assert markdown(budget.Table("Deformable attention, computed", rows, [])) in page


@pytest.mark.slow
def test_page_shows_what_the_command_prints(needs_operator, capsys):
    page = (Path(budget.__file__).parent / "docs" / "gpu-budget.md").read_text()
    assert budget.main() == 0
    for table in capsys.readouterr().out.split("\n### "):
        assert table.strip().removeprefix("### ") in page
