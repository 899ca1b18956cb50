"""tools/bench.py on known numbers and small models. No test depends on how long anything takes."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from small import CHANGES, write_data
from torch import nn
from torch.utils.checkpoint import checkpoint

from model import build_model
from msda_cuda import ops
from tools import bench
from tools.bench import ROOT, TRAINING, Subject, cell, kept_for_backward, markdown
from tools.peer import Peer, binary_masks

HEADS = ("upernet", "mask2former")
SMALL = {**CHANGES, "head_channels": 64}  # the peer's group norms need 32 channels or more


def test_cells_have_three_digits():
    values = ("a", 7, 1234567, 12.345, 1234.5, 999.7, 0.012345, -3.14159, 0.0, math.inf)
    assert [cell(x) for x in values] == ["a", "7", "1,234,567", "12.3", "1,234", "1,000", "0.0123", "-3.14", "0", "inf"]


def test_candidates_take_turns_and_the_median_of_the_rounds_after_the_warm_up_counts():
    clock = iter([99.0, 0.0, 3.0, 10.0, 1.0, 30.0, 2.0, 80.0])  # of a, b, a, b ...
    assert bench.interleaved(dict.fromkeys("ab", lambda: next(clock)), 3, "test") == {"a": 2.0, "b": 30.0}


def test_kept_is_what_is_made_and_still_alive():
    """Hooks inside a function, as those of checkpointing, are what saved tensors, seen from outside, do not show."""
    layers, x = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2)), torch.randn(3, 4)
    assert kept_for_backward(lambda: layers(x)) == 4 * 3 * 8  # the sigmoid's result; the input was there before
    assert kept_for_backward(lambda: checkpoint(layers, x * 1, use_reentrant=False)) == 4 * 3 * 4
    y = torch.ones(7, requires_grad=True)
    assert kept_for_backward(lambda: (y * 2)[:5].square().sum()) == 4 * 7  # of a part, the whole storage
    halves = torch.autocast("cpu", torch.bfloat16)(lambda: layers(x))  # and the second layer's weights
    assert kept_for_backward(halves) == 2 * (3 * 4 + 3 * 8 + 8 * 2)


def test_peak_memory_of_a_call_includes_what_is_freed_within_it():
    less, more, again = (bench.peak_of(lambda n=n: torch.ones(n, dtype=torch.uint8).max()) for n in (1, 10**8, 1))
    if math.isnan(less):
        pytest.skip("this system does not tell")
    assert more - less == pytest.approx(0.1, rel=0.3) and again < less + 0.03


@pytest.mark.parametrize("head", HEADS)
def test_the_fast_text_has_the_loss_of_the_plain_text_and_keeps_no_more(head, monkeypatch, modes_for_narrow_models):
    subject, rand = Subject(False, f"{head}-tiny", 2, "cpu", {"window": 64}), torch.rand
    assert subject.labels.unique().tolist() == list(range(bench.PRESENT))
    # Both texts compare masks at the same points, in whatever order they draw them.
    monkeypatch.setattr(torch, "rand", lambda *shape, **kind: rand(
        *shape[-2:], generator=torch.Generator().manual_seed(0), **kind).expand(shape).contiguous())
    plain, fast = (subject.memory(TRAINING, name) for name in ("plain", "fast"))
    assert float(fast["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-4)
    assert 0 < fast["kept MB"] <= plain["kept MB"] and fast["bf16 MB"] < fast["kept MB"]


def test_one_image_trains_upernet_and_only_the_norm_of_one_value_is_spared():
    subject = Subject(False, "upernet-tiny", 1, "cpu", SMALL)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    subject.seconds(TRAINING, "plain")
    same = {name for name, value in subject.model.state_dict().items() if torch.equal(before[name], value)}
    assert {name for name in same if ".running_" in name} == {f"head.pools.0.1.running_{x}" for x in ("mean", "var")}
    assert {name for name, _ in subject.model.named_parameters()} <= same  # so that every round does the same


@pytest.mark.parametrize(("system", "memory", "names", "gflop"), [
    ("upernet-large", 21, ["plain", "fast", "old"], 2 * 6884), ("upernet-tiny", 19, ["plain", "fast"], None)])
def test_rows_are_ratios_and_shares_of_the_rate(system, memory, names, gflop, monkeypatch, capsys):
    ours, old = (SimpleNamespace(ask=lambda method, work, name: {
        "memory": {"peak GB": 10.0}, "seconds": {"plain": 4.0, "fast": 2.0, "old": 3.0}[name]}[method]) for _ in "ab")
    rates = iter([90.0, 110.0])
    monkeypatch.setattr(bench, "matmul_rate", lambda device: next(rates))
    monkeypatch.setattr(bench, "MEMORY", memory)
    options = bench.parse(["systems", "--device", "cpu", "--rounds", "1"])
    rows = bench.measure(system, TRAINING, 2, {"plain": ours, "fast": ours, "old": old}, options)
    assert [row["candidate"] for row in rows] == names and rows[1]["x plain"] == 2.0
    assert (rows[1]["GFLOP"], rows[1]["% of rate"]) == ((gflop, gflop / 2.0) if gflop else ("", ""))
    assert ("old is left out" in capsys.readouterr().out) == (memory < 20)


def test_another_checkout_computes_the_same_from_the_same_weights(tmp_path, capsys, monkeypatch):
    """With this one in place of the other, through processes of their own; what is printed is also in the file."""
    monkeypatch.setattr(bench, "matmul_rate", lambda device: 100.0)
    path = tmp_path / "new" / "numbers.json"
    options = f"--window 64 --rounds 1 --device cpu --profile --old {ROOT} --json {path}"
    assert bench.main(["systems", "upernet-tiny", *options.split()]) == 0
    found, printed = json.loads(path.read_text()), capsys.readouterr().out
    title, rows = found["rows"][0].pop("table"), found["rows"]
    assert all(row.pop("table", title) == title for row in rows) and "load average" in found["machine"]
    assert printed.startswith(found["machine"]) and printed.endswith(f"\n### {title}\n\n{markdown(rows)}\n")
    assert printed.count("aten::convolution_backward") == 3  # in the profiles of training
    assert [row["candidate"] for row in rows] == ["plain", "fast", "old"] * 2
    _, fast, old = ({key: row[key] for key in ("loss", "kept MB", "bf16 MB")} for row in rows[3:])
    assert fast == old and float(fast["loss"]) > 0


@pytest.mark.parametrize("size", ["tiny", "base", "large"])
@pytest.mark.parametrize("head", HEADS)
def test_backbone_and_head_of_the_peer_have_our_number_of_parameters(head, size):
    pytest.importorskip("transformers")
    with torch.device("meta"):
        ours = build_model(head, size)
        theirs = Peer(ours.config).model
    count = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())  # noqa: E731
    backbone = theirs.backbone if head == "upernet" else theirs.model.pixel_level_module.encoder
    assert backbone.beit.layers[0].attention.config._attn_implementation == "sdpa"
    assert count(backbone.beit) == count(ours.backbone) and count(backbone.fpn) < count(ours.adapter)
    assert count(theirs) - count(backbone) == count(ours) - count(ours.backbone, ours.adapter)


@pytest.mark.parametrize("head", HEADS)
def test_the_peer_trains_every_parameter_with_the_image_processors_masks(head):
    library = pytest.importorskip("transformers.models.mask2former.image_processing_mask2former")
    peer, images = Peer(bench.config_of(f"{head}-tiny", {**SMALL, "num_classes": 7})), torch.randn(2, 3, 64, 64)
    labels = torch.randint(7, (2, 64, 64))
    labels[1].clamp_(max=2)[:10] = 255
    peer.train()(images, labels)["loss"].backward()
    assert [name for name, p in peer.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    with torch.no_grad():
        assert peer.eval()(images).shape == (2, 7, 64, 64)
    for image, mask, present in zip(labels, *binary_masks(labels), strict=True):
        expected, categories = library.convert_segmentation_map_to_binary_masks_fast(image, ignore_index=255)
        assert torch.equal(mask, expected) and present.tolist() == categories.tolist()


def test_the_operator_is_compared_with_the_reference(monkeypatch):
    if ops.active_path("cpu") != "native":
        pytest.skip("no native operator")
    monkeypatch.setattr(bench, "OP_CALLS", {"small": (((4, 6), (2, 3)), 30, 2)})
    _, (row,) = bench.operator("", bench.parse(["op", "--device", "cpu", "--rounds", "1"]))
    assert row["training: ratio"] == pytest.approx(row["training: torch ms"] / row["training: native ms"])
    assert row["kept: native MB"] == 4 * (30 * 64 + 3 * 30 * 2 * 2 * 4) / 1e6 < row["kept: torch MB"]  # the inputs


def test_loader_and_evaluate_tables(tmp_path):
    folder = write_data(tmp_path / "data", images=4, validation=2)
    options = f"upernet-tiny --device cpu --data {folder} --window 64 --limit 1 --rounds 1 --batch 2 --workers 1"
    title, (row,) = bench.loader("upernet-tiny", bench.parse(f"loader {options}".split()))
    assert "window 64, batch 2, 1 batches" in title
    assert len(row) == 3 and all(0 < each < math.inf for each in row.values())
    _, (row,) = bench.evaluation("upernet-tiny", bench.parse(f"evaluate {options}".split()))
    assert len(row) == 3 and row["differing pixels"] <= 30  # 1 %: a tie may fall otherwise in float32


@pytest.mark.parametrize(("arguments", "message"), [
    ("loader --data nowhere", "no data at nowhere"), ("evaluate --window 100", "not a multiple of 32"),
    ("systems upernet-tiny upernet-huge", "upernet-huge: size 'huge'"), ("systems tiny", "HEAD-SIZE"),
    ("systems --old nowhere", "nowhere has no model.py"), ("systems --against transformers", "pip install"),
    ("op", "no native operator for cpu"),
])
def test_faults_are_one_line_and_leave_no_file(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ops, "active_path", lambda device: "torch")
    path = tmp_path / "numbers.json"
    assert bench.main([*arguments.split(), "--device", "cpu", "--json", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1 and not path.exists()
