"""benchmark.py on known numbers and a model of under 200,000 parameters. No test depends on how long anything takes."""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from small import CHANGES, small_model, write_data

import benchmark
import evaluate
import model
from benchmark import Subject, Table, cores_needed, evaluate_notes, figure, interleaved, loader_notes, markdown, parse
from measure import forward_flops, training_flops
from msda_cuda.build import BuildError


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small data set, and small models whatever the size asked for."""
    monkeypatch.setattr(benchmark, "build_model", small_model)
    return str(write_data(tmp_path / "data", images=4, validation=2))


def photograph(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ----------------------------------------------------------------------------------------------- tables and timing


@pytest.mark.parametrize(
    ("value", "text"),
    [("torch", "torch"), (0, "0"), (1234567, "1,234,567"), (12.345, "12.3"), (0.012345, "0.0123"), (1234.5, "1,234"),
     (-3.14159, "-3.14"), (0.0, "0.0"), (float("inf"), "inf")],
)
def test_figures_have_three_digits(value, text):
    assert figure(value) == text


def test_a_table_is_aligned_markdown_with_its_notes():
    rows = [{"way": "plain", "ms": 12.345, "n": 7}, {"way": "in batches", "ms": 1234.5, "n": ""}]
    assert markdown(Table("Title", rows, ["One.", "Two."])).splitlines() == [
        "### Title",
        "",
        "| way        |    ms |  n |",
        "| ---------- | ----: | -: |",
        "| plain      |  12.3 |  7 |",
        "| in batches | 1,234 |    |",
        "",
        "One.",
        "Two.",
    ]


def test_a_column_of_numbers_may_begin_with_none():
    rows = [{"work": "a", "kept": ""}, {"work": "b", "kept": 1.5}]
    assert markdown(Table("Title", rows, [])).splitlines()[2:6] == [
        "| work | kept |", "| ---- | ---: |", "| a    |      |", "| b    | 1.50 |",
    ]


def test_candidates_take_turns_and_the_median_of_the_rounds_after_the_warm_up_counts():
    turns, first, second = [], iter([99.0, 3.0, 1.0, 2.0]), iter([0.0, 10.0, 30.0, 80.0])
    candidates = {"a": lambda: turns.append("a") or next(first), "b": lambda: turns.append("b") or next(second)}
    assert interleaved(candidates, 3, "test") == {"a": 2.0, "b": 30.0}
    assert "".join(turns) == "ab" * 4


# ----------------------------------------------------------------------------------------------------- whole models


@pytest.fixture
def tiny(monkeypatch):
    """What is called tiny has under 200,000 parameters; the matmul rate is 100 GFLOP/s."""
    small = {**CHANGES, "head_channels": 64, "mask_heads": 2}  # the peer's group norms want channels of 32 each
    monkeypatch.setitem(model.SIZES, "tiny", replace(model.SIZES["tiny"], **small))
    monkeypatch.setattr(benchmark, "matmul_rate", lambda *_: 1e11)


def test_systems_table_has_a_row_for_each_work_and_the_parts_of_its_time(tiny):
    pytest.importorskip("transformers")
    arguments = "systems --systems mask2former-tiny --against transformers --rounds 1 --device cpu"
    systems, split = benchmark.systems_tables(parse(arguments.split()))
    assert [row["work"] for row in systems.rows] == [
        "training step, batch 2", "forward, batch 1", "picture, single-scale", "picture, multi-scale + flip",
    ]
    config = replace(model.SIZES["tiny"], head="mask2former")
    flop = forward_flops(config) / 1e9
    # 50x66 pixels: 69x91 in windows of 64 that step by 42, and so on for 5 different scales and their mirror images
    gflop = [2 * training_flops(config) / 1e9, flop, 4 * flop, 60 * flop]
    assert [row["GFLOP"] for row in systems.rows] == pytest.approx(gflop)
    for row in systems.rows:
        assert row["ratio"] == pytest.approx(row["transformers s"] / row["s"])
        assert row["% of matmul"] == pytest.approx(row["GFLOP"] / row["s"])  # 100 GFLOP/s, in percent
        assert (row["GFLOP/s before"], row["after"], row["valid"]) == (100, 100, "")
        assert row["peak GB"] > 0.1
    assert [row["waits"] for row in systems.rows[1:]] == [0, "", ""] and systems.rows[0]["waits"] >= 1
    assert 0.3 * systems.rows[0]["kept MB"] < systems.rows[0]["bf16 MB"] < systems.rows[0]["kept MB"]
    assert list(split.rows[0]) == [*benchmark.PARTS]
    for row in split.rows:
        spent = {name for name, value in row.items() if not isinstance(value, str) and value > 0}
        learns = {"matching", "losses", "optimiser"} if "training" in row["work"] else {"scores"}
        assert spent == {"backbone", "adapter", "pixel decoder", "decoder", "other"} | learns


def test_official_counts_are_the_denominators_and_a_rate_that_moves_is_marked(tiny, monkeypatch):
    monkeypatch.setitem(benchmark.OFFICIAL, "upernet-tiny", (10, 30))
    facts = {"kept MB": 1.0, "bf16 MB": 0.5, "peak GB": 1.0, "waits": 0}
    alone = {"training": (facts, {"backbone": 1.0}, 2, 7), "forward,": (facts, {}, 1, 7), "picture,": (facts, {}, 4, 7)}
    monkeypatch.setattr(benchmark, "measured_alone", lambda _, work, __: alone[work.split()[0]])
    rates = iter([1e11, 1.05e11, 1e11, 1.2e11, 1e11, 1e11, 1e11, 1e11])
    monkeypatch.setattr(benchmark, "matmul_rate", lambda *_: next(rates))
    seconds = {"training": 0.5, "forward,": 0.1, "picture,": 1.0}
    monkeypatch.setattr(benchmark, "interleaved", lambda turns, _, title: {"s": seconds[title.split()[1]]})
    (table, split) = benchmark.systems_tables(parse(["systems", "--systems", "upernet-tiny"]))
    assert [row["GFLOP"] for row in table.rows] == [2 * 30, 10, 4 * 10, 4 * 10]
    assert table.rows[0]["% of matmul"] == pytest.approx(100 * 60 / 102.5 / 0.5)
    assert [row["valid"] for row in table.rows] == ["", "rate moved", "", ""]
    assert "ratio" not in table.rows[0] and [row["backbone"] for row in split.rows] == [1.0, "", "", ""]


def test_a_peer_is_left_out_of_a_training_step_that_would_not_fit(tiny, monkeypatch):
    subject = Subject(benchmark.build_model, "upernet-tiny", 2, "cpu")
    numbers = sum(p.numel() for p in subject.model.parameters())
    need = 28 * numbers + 2 * 1000
    monkeypatch.setattr(benchmark.os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": int(need / 0.8) + 5}.get)
    assert subject.fits_beside(1000) and not subject.fits_beside(1100)


def test_one_image_trains_upernet_and_only_the_norm_of_one_value_is_spared(tiny):
    subject = Subject(benchmark.build_model, "upernet-tiny", 1, "cpu")
    before = {name: value.clone() for name, value in subject.model.named_buffers()}
    subject.train()
    same = {name for name, value in subject.model.named_buffers() if torch.equal(value, before[name])}
    assert same == {"backbone.position_index", *(f"head.pools.0.1.{name}" for name in (
        "running_mean", "running_var", "num_batches_tracked"))}
    assert subject.labels.unique().tolist() == list(range(benchmark.PRESENT))


def test_losses_table_counts_dispatches_that_hardly_grow_with_images(tiny):
    (table,) = benchmark.losses_table(parse(["losses", "--rounds", "1", "--device", "cpu"]))
    two, four = table.rows
    assert (two["images"], four["images"]) == (2, 4)
    assert 50 < two["dispatches"] <= 600 and four["dispatches"] < 1.2 * two["dispatches"]
    assert two["views"] > 0 and two["dispatches"] < two["all dispatches"] and two["views"] < two["all views"]


def test_growth_is_time_over_arithmetic(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "GROWTH", {"batch": (1, 2), "window": (64, 128)})
    seconds = {"1": 0.5, "2": 1.5, "64": 1.0, "128": 8.0}
    monkeypatch.setattr(benchmark, "interleaved", lambda turns, *_: {name: seconds[name] for name in turns})
    options = parse(["growth", "--systems", "upernet-tiny", "--device", "cpu", "--plot", str(tmp_path / "growth.svg")])
    (table,) = benchmark.growth_table(options)
    expected = {"batch": {1: 1, 2: 3}, "window": {64: 1, 128: 8}}
    assert [(row["work"], row["quantity"], row["value"], row["times"]) for row in table.rows] == [
        (work, quantity, value, times) for quantity in expected for work in ("forward", "train")
        for value, times in expected[quantity].items()
    ]
    assert [row["growth"] for row in table.rows[:4]] == [1, 1.5, 1, 1.5]
    config = replace(model.SIZES["tiny"], head="upernet")
    ideal = forward_flops(replace(config, window=128)) / forward_flops(config)
    assert table.rows[5]["GFLOP times"] == ideal and table.rows[5]["growth"] == 8 / ideal
    svg = ElementTree.parse(tmp_path / "growth.svg").getroot()
    lines = [line.get("points") for line in svg.iter("{http://www.w3.org/2000/svg}polyline")]
    assert len(lines) == 2 * 2 * 2  # panels, works, measured and arithmetic
    assert lines[0] == "40.0,176.7 340.0,30.0"  # a third of the height, and all of it


@pytest.mark.parametrize(("forward", "breaks"), [(lambda x: 2 * x, False), (lambda x: x * x.sum().item(), True)])
def test_breaks_of_a_graph_are_counted(tiny, monkeypatch, forward, breaks):
    monkeypatch.setattr(benchmark, "BACKEND", "eager")
    subject = Subject(benchmark.build_model, "upernet-tiny", 1, "cpu")
    monkeypatch.setattr(subject.model, "forward", forward)
    row = benchmark.compile_row(subject, "upernet-tiny", parse(["compile", "--rounds", "1"]))
    assert (row["mode"], row["graphs"] > 1, row["graph breaks"] > 0) == ("evaluation", breaks, breaks)
    assert row["ratio"] == row["eager ms"] / row["compiled ms"]


@pytest.mark.slow
@pytest.mark.parametrize("system", benchmark.TINY)
def test_the_models_compile_without_a_break(tiny, monkeypatch, system):
    monkeypatch.setattr(benchmark, "BACKEND", "eager")
    (table,) = benchmark.compile_table(parse(["compile", "--systems", system, "--rounds", "1"]))
    assert [(row["mode"], row["graphs"], row["graph breaks"]) for row in table.rows] == [
        ("evaluation", 1, 0), ("training", 1, 0),
    ]


def test_all_tables_are_of_tiny_models_unless_named():
    assert benchmark.chosen(parse(["all"]), benchmark.OFFICIAL) == benchmark.TINY
    assert list(benchmark.chosen(parse(["systems"]), benchmark.OFFICIAL)) == list(benchmark.OFFICIAL)
    assert benchmark.chosen(parse(["all", "--systems", "a-b,c"])) == ["a-b", "c"]


# -------------------------------------------------------------------------------------------------- training loader


def test_cores_that_a_device_needs():
    assert cores_needed(iteration=0.5, per_core=16.0) == 2.0  # 32 images/s
    assert cores_needed(iteration=0.1, per_core=200.0, images=8) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("need", "outcome"), [(50.0, "the loader is ahead of the model"), (150.0, "the model waits for the loader")]
)
def test_loader_notes_name_the_slowest_stage_and_who_waits(need, outcome):
    rates = {"read image": 400.0, "read labels": 1000.0, "transform": 125.0}  # 2.5, 1 and 8 of 12.5 ms
    bottleneck, verdict, formula = loader_notes(rates, whole=80.0, best=100.0, need=need)
    assert "**transform**, 64% of" in bottleneck
    assert verdict.startswith("The loader gives 100 images/s") and verdict.endswith(f"{outcome}.")
    assert "16/(X * 80.0) = 0.200/X cores" in formula


def test_loader_table_counts_images_per_second_and_core(small, monkeypatch):
    monkeypatch.setattr(benchmark.os, "cpu_count", lambda: 1)  # two workers share it
    arguments = f"loader --device cpu --data {small} --window 64 --limit 5 --batch 2 --workers 2 --rounds 1"
    (table,) = benchmark.loader_table(parse(arguments.split()))
    assert "mask2former tiny, window 64, batch 2, 4 images a round" in table.title
    assert [row["stage"] for row in table.rows] == [
        "read image", "read labels", "transform", "loader, in this process", "loader, 2 workers",
        "training step on cpu",
    ]
    for row in table.rows[:-1]:
        assert row["images/s"] > 0 and row["images/s per core"] == row["images/s"]
        assert row["ms/image"] == pytest.approx(1000 / row["images/s"])
    assert table.rows[-1]["images/s per core"] == ""


def test_stages_read_and_transform_each_image_once(small, monkeypatch):
    dataset, seen = benchmark.data.open_dataset(small, "train"), []
    transform = benchmark.data.train_transform
    monkeypatch.setattr(benchmark.data, "train_transform", lambda *a: seen.append(a[0].shape) or transform(*a))
    stages = benchmark.stages(dataset, 64, 6)  # two more than there are: from the front again
    assert min(measure() for measure in stages.values()) > 0
    assert seen == [(48, 64, 3)] * 6


def test_one_core_means_one_thread_and_is_put_back(monkeypatch):
    before, inside = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        assert benchmark.on_one_core(lambda: inside.append(torch.get_num_threads())) >= 0
        assert inside == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_training_step_moves_the_weights(small, monkeypatch):
    models = []
    build = lambda *a, **k: models.append(small_model(*a, **k)) or models[-1]  # noqa: E731
    monkeypatch.setattr(benchmark, "build_model", build)
    options = parse(["loader", "--device", "cpu"])
    step = benchmark.training_step(options, benchmark.data.open_dataset(small, "train"), 64)
    before = models[0].head.query_feat.detach().clone()
    step()
    assert 0 < (models[0].head.query_feat - before).abs().max() < 2e-4  # Adam's first step is the rate, 1e-4


# ------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture
def double(monkeypatch):
    """Normalised images are float64: no pixel's class hangs on rounding."""
    normalize = benchmark.data.normalize
    monkeypatch.setattr(benchmark.data, "normalize", lambda images: normalize(images).double())


@pytest.mark.parametrize("head", ["mask2former", "upernet"])
def test_the_probabilities_of_the_plain_views_have_the_mean_that_evaluate_gives(head, double):
    torch.manual_seed(0)
    model, image = small_model(head, "tiny", 5).double().eval(), photograph(48, 64)
    views = evaluate.make_views(image, 64, multi_scale=True)
    with torch.no_grad():
        plain = list(benchmark.plain_views(model, image, "cpu"))
        expected = evaluate.predict(model, views, (48, 64), window_batch=7)
    assert (len(plain), len(views)) == (12, 10)
    assert expected.std(dim=(1, 2)).min() > 1e-6
    torch.testing.assert_close(sum(plain) / 12, expected, rtol=0, atol=1e-10)


def test_the_plain_loop_predicts_what_evaluate_predicts(double):
    torch.manual_seed(0)
    model, images = small_model("upernet", "tiny", 5).double().eval(), [photograph(48, 64), photograph(70, 40)]
    plain = benchmark.plain_predictions(model, images)
    batched = list(evaluate.predictions(model, images, multi_scale=True, window_batch=7))
    assert [tuple(p.shape) for p in plain] == [(48, 64), (70, 40)]
    assert len(plain[0].unique()) > 1
    assert all(torch.equal(a, b.long()) for a, b in zip(plain, batched, strict=True))


@pytest.mark.parametrize("size", [(64, 64), (64, 106), (107, 150)])
def test_plain_slide_is_the_mean_over_windows(size):
    torch.manual_seed(0)
    model = small_model("mask2former", "tiny", 5).double().eval()
    view = torch.randn(1, 3, *size, dtype=torch.double)
    with torch.no_grad():
        expected = evaluate.slide(model, view, window=64, stride=42, window_batch=3)
        torch.testing.assert_close(benchmark.plain_slide(model, view), expected)


def test_evaluate_table_counts_windows_and_pixels(small):
    arguments = f"evaluate --device cpu --data {small} --head upernet --window 64 --limit 1 --rounds 1"
    (table,) = benchmark.evaluate_table(parse(arguments.split()))
    # 48x64 at short sides 64, 64, 69, 86, 103, 120: 2 + 2 + 4 + 6 + 6 + 12 windows, and as many of the mirror image
    plain, batched = table.rows
    assert (plain["windows"], batched["windows"]) == (64, 60)
    assert plain["s/image"] == pytest.approx(64 * plain["ms/window"] / 1e3)
    differing, pixels, classes = map(int, re.findall(r"\d+", table.notes[1].replace(",", "")))
    assert differing <= 30 and pixels == 48 * 64 and classes > 1  # 1 %: a tie may fall otherwise in float32


def test_evaluate_notes_split_the_ratio_and_count_differing_pixels():
    rows = [{"s/image": 6.0, "windows": 128, "ms/window": 60.0}, {"s/image": 2.0, "windows": 64, "ms/window": 40.0}]
    plain, batched = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[0, 1, 0], [3, 0, 5]], dtype=torch.uint8)
    ratio, pixels = evaluate_notes(rows, [plain, plain], [batched, plain])
    assert "**3.00 times** as fast: 2.00 by computing equal views once, 1.50 by the time of a window" in ratio
    assert pixels == "The predictions differ in 2 of 12 pixels; 6 classes occur in them."


# ------------------------------------------------------------------------------------------------- the command line


TABLE = Table("Known", [{"a": "x", "b": 2.0}], ["A note."])


def test_json_holds_what_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.TABLES, "loader", lambda options: [TABLE])
    path = tmp_path / "new" / "numbers.json"
    assert benchmark.main(["loader", "--json", str(path)]) == 0
    first, _, *printed = capsys.readouterr().out.splitlines()
    written = json.loads(path.read_text())
    assert written.pop("machine") == first and "load average" in first
    assert written == {"loader": [{"title": "Known", "rows": [{"a": "x", "b": 2.0}], "notes": ["A note."]}]}
    assert printed == markdown(TABLE).splitlines()


def test_without_the_native_operator_only_its_table_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "active_path", lambda device: "torch")
    for name in set(benchmark.TABLES) - {"op"}:
        monkeypatch.setitem(benchmark.TABLES, name, lambda options: [TABLE])
    assert benchmark.main(["all", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.count("### Known") == 5 and err.startswith("left out op: there is no native operator for cpu")
    assert benchmark.main(["op", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no native operator for cpu")
    with pytest.raises(BuildError):
        benchmark.op_table(parse(["op", "--device", "cpu"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("loader --data nowhere", "no data at nowhere"),
        ("evaluate --data {data} --window 100", "window 100 is not a multiple of 32"),
        ("loader --data {data} --head upernet --batch 1", "needs 2 images"),
        ("systems --systems upernet-tiny,upernet-huge", "'upernet-huge' does not exist; join mask2former or upernet"),
        ("growth --systems tiny", "'tiny' does not exist"),
        ("losses --systems upernet-tiny", "names no mask2former"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_no_file(small, tmp_path, capsys, arguments, message):
    path = tmp_path / "numbers.json"
    arguments = arguments.format(data=small).split()
    assert benchmark.main([*arguments, "--device", "cpu", "--json", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not path.exists()
