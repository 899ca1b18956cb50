"""Formats -> what fits and what does not -> position tables -> hostile files -> the released models."""

import argparse
import io
import json
import math
import os
import pickle
import random
import re
import resource
import struct
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import small
import timm
import torch
from conftest import GOLDEN, fill, golden_config, load_golden, noise, official_state
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
import train
import weights
from adapter import resize
from common import UserError
from heads import semantic_scores
from model import SIZES, TINY, ModelConfig, Segmenter, build_model
from pictures import default_palette
from renaming import rename_official
from tools import convert
from weights import FORMAT, infer_config, load_model, load_weights, resize_position_table

HEADS = ["mask2former", "upernet"]
TABLE = "backbone.blocks.0.attn.relative_position_bias_table"
# What mmcv and the runner of the released models write beside the weights.
META = {
    "env_info": "sys.platform: linux\nPython: 3.8", "mmcv_version": "1.4.2", "seed": None, "epoch": 8, "iter": 40000,
    "CLASSES": ("a", "b", "c", "d", "e", "f", "g"), "PALETTE": [[i, 2 * i, 255] for i in range(7)], "lr": (2e-5, 1e-6),
    "hook_msgs": {"best_score": np.float64(0.68), "count": np.int64(3), "done": np.bool_(True), "small": np.float32(1)},
}


SMALL = ModelConfig(  # its file is under 1 MB, so that it can be damaged at many places in little time
    num_classes=3, window=64, embed_dim=32, depth=4, num_heads=2, drop_path=0.0, deform_heads=2, spm_channels=8,
    head_channels=32, aux_channels=8, dropout=0.0, num_queries=4, mask_heads=2, encoder_layers=1, encoder_ffn=32,
    decoder_layers=1, decoder_ffn=32, num_points=16,
)


def own_checkpoint(config: ModelConfig) -> dict:
    torch.manual_seed(0)
    classes = range(config.num_classes)
    return {"format": FORMAT, "model": Segmenter(config).state_dict(), "config": asdict(config), "iteration": 12,
            "classes": [f"class {i}" for i in classes], "palette": [[i, 0, 9] for i in classes],
            "optimizer": {"state": {}, "param_groups": [{"lr": 1.0}]}}


def released(head: str) -> dict:
    return {"meta": META, "state_dict": OrderedDict(official_state(head))}


def own_safetensors(content: dict) -> bytes:
    """The bytes that `python weights.py FILE --to OUT.safetensors` writes."""
    buffer, about = io.BytesIO(), {name: content[name] for name in ("config", "classes", "palette", "iteration")}
    convert.write_safetensors(buffer, content["model"], about)
    return buffer.getvalue()


def to_bytes(content, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def zipped(name: str, content: bytes, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("model/readme.txt", "a checkpoint")
        archive.writestr(f"__MACOSX/._{name}", "what macOS adds")
        archive.writestr(f"model/{name}", content)
    return buffer.getvalue()


def write(path: Path, content: Any) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else to_bytes(content))
    return path


def assert_same(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name


CONTAINERS = {
    "iter_40000.pth": to_bytes,
    "before-torch-1.6.pth.tar": partial(to_bytes, legacy=True),
    "model.zip": lambda content: zipped("iter_40000.pth", to_bytes(content)),
    "no-extension": lambda content: zipped("model.pth.tar", to_bytes(content, legacy=True), zipfile.ZIP_STORED),
}


@pytest.mark.parametrize(("head", "container"), [
    ("mask2former", "iter_40000.pth"), *(("upernet", container) for container in CONTAINERS)])
def test_released_checkpoints(tmp_path, head, container):
    """mmcv's dictionary in every container gives every tensor; the shapes alone give the configuration."""
    content = {**released(head), "optimizer": {"state": {}, "param_groups": []}}
    state = content["state_dict"]
    state["backbone.blocks.0.attn.relative_position_index"] = torch.zeros(37, 37, dtype=torch.long)
    if head == "mask2former":
        state |= {"decode_head.conv_seg.weight": torch.zeros(7, 64, 1, 1), "decode_head.conv_seg.bias": torch.zeros(7)}
    path = write(tmp_path / container, CONTAINERS[container](content))
    model, info = load_model(path)
    assert_same(model.state_dict(), rename_official(official_state(head)))
    assert info == {"classes": list("abcdefg"), "palette": META["PALETTE"], "iteration": 40000}
    assert not model.training
    expected = golden_config(head)  # shapes tell neither rates nor what the other head would have
    for name in ("head", "num_classes", "window", "embed_dim", "depth", "num_heads", "deform_heads", "head_channels"):
        assert getattr(model.config, name) == getattr(expected, name), name
    report = load_weights(Segmenter(expected), path)
    assert report.kind == "released" and not report.missing and not report.unexpected and not report.resized
    assert len(report.dropped) == {"mask2former": 3, "upernet": 1}[head]


def test_a_loaded_model_computes_what_a_built_one_does(tmp_path, golden_model):
    """Taking the file's tensors without building a model first leaves nothing uninitialised."""
    model, _ = load_model(write(tmp_path / "x.pth", released("mask2former")))
    images = noise("image", 1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(model.double()(images), golden_model("mask2former")(images))
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("core", [b"core", b"_core"])
def test_numpy_scalars_and_arrays_in_metadata(tmp_path, core):
    """NumPy 1 and NumPy 2 pickle them under different names; mmseg draws the colours of unknown classes as an array."""
    content = released("upernet")
    content["meta"] = META | {"PALETTE": np.arange(21).reshape(7, 3)}
    content = re.sub(rb"numpy\._?core\.", b"numpy." + core + b".", to_bytes(content, legacy=True))
    path = write(tmp_path / "x.pth", content)
    model, info = load_model(path)
    assert model.config.head == "upernet" and info["palette"] == np.arange(21).reshape(7, 3).tolist()
    assert weights.read_file(path)["meta"]["hook_msgs"] == {"best_score": 0.68, "count": 3, "done": True, "small": 1}


def beit(shared: bool = False) -> dict:
    """timm's own BEiT of 14 x 14 tokens, under its own names, and what the original code saves beside it."""
    torch.manual_seed(0)
    model = timm.create_model("beit_base_patch16_224", pretrained=False, depth=4, embed_dim=32, num_heads=2)
    state = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    state |= {"mask_token": torch.zeros(1, 1, 32), "norm.weight": torch.zeros(32), "lm_head.bias": torch.zeros(9)}
    if shared:
        state = {name: tensor for name, tensor in state.items() if not name.endswith("bias_table")}
        state["rel_pos_bias.relative_position_bias_table"] = torch.randn(732, 2)
    prefix = "rel_pos_bias" if shared else "blocks.0.attn"
    return {**state, f"{prefix}.relative_position_index": torch.zeros(197, 197, dtype=torch.long)}


@pytest.mark.parametrize("form", ["pth", "safetensors", "shared tables"])
def test_beit_pretraining(tmp_path, form):
    """The tables are resized to the window; everything but the backbone keeps its starting values."""
    is_shared = form == "shared tables"
    state = beit(is_shared)
    # Its content tells the format, not its name.
    path = write(tmp_path / "file", safetensors.torch.save(state) if form == "safetensors" else {"model": state})
    model = Segmenter(replace(SMALL, head="upernet", window=96))
    before = deepcopy(model.state_dict())
    report = load_weights(model, path)
    for name, tensor in model.backbone.state_dict().items():
        if name.endswith("bias_table"):
            theirs = state["rel_pos_bias.relative_position_bias_table" if is_shared else name]
            assert torch.equal(tensor, resize_position_table(theirs, 6))
        else:
            assert torch.equal(tensor, state[name.replace("patch_embed.", "patch_embed.proj.")]), name
    tables = [block.attn.relative_position_bias_table.data_ptr() for block in model.backbone.blocks]
    assert len(set(tables)) == 4  # copies: training must not tie them
    assert report.kind == "beit" and report.missing == report.unexpected == []
    assert report.resized == [f"backbone.blocks.{i}.attn.relative_position_bias_table" for i in range(4)]
    assert report.reinitialised == [name for name in before if not name.startswith("backbone.")]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in report.reinitialised)
    assert set(report.dropped) == {
        "mask_token", "norm.weight", "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias", "lm_head.bias",
        f"{'rel_pos_bias' if is_shared else 'blocks.0.attn'}.relative_position_index",
    }
    assert load_weights(Segmenter(replace(SMALL, window=224)), path).resized == []


@pytest.mark.parametrize("head", HEADS)
def test_own_checkpoints(tmp_path, head):
    """Configuration, class names and palette come back; a plain or DataParallel state dict is known by its names."""
    content = own_checkpoint(replace(SMALL, head=head, drop_path=0.25))
    path = write(tmp_path / "last.pt", content)
    model, info = load_model(path)
    assert model.config == replace(SMALL, head=head, drop_path=0.25)
    assert info == {name: content[name] for name in ("classes", "palette", "iteration")}
    assert_same(model.state_dict(), content["model"])
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in content["model"].items()}
    parallel = {f"module.{name}": tensor for name, tensor in half.items()}
    model, info = load_model(write(tmp_path / "plain.pt", parallel))
    assert (info, model.config.window, model.config.num_classes) == ({}, 64, 3)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert_same(model.state_dict(), half)


@pytest.mark.parametrize("model", ["mask2former_base", "upernet_large", "mask2former_large"])
def test_names_and_shapes_of_the_released_models(model):
    """Of the official names all but the drop-list find a place, and their shapes tell which model they are of."""
    shapes = json.loads((GOLDEN / "official_state_dicts.json").read_text())[model]
    official = {name: torch.empty(()).expand(shape) for name, shape in shapes.items()}
    state = rename_official(official)
    assert len(official) - len(state) == sum(name.endswith("relative_position_index") for name in official)
    config = infer_config(state)
    head, size = model.split("_")
    assert (config.head, weights.size_of(config), config.window, config.num_classes) == (head, size, 480, 59)
    with torch.device("meta"):
        expected = build_model(head, size)
    assert config == expected.config
    assert {n: t.shape for n, t in expected.state_dict().items()} == {n: t.shape for n, t in state.items()}


@pytest.mark.parametrize("head", HEADS)
def test_other_window_and_other_classes(tmp_path, head, capsys):
    """Position tables follow the window, class layers of another number of classes start anew; both are reported."""
    source = own_checkpoint(replace(SMALL, head=head, num_classes=5))
    path = write(tmp_path / "x.pt", source)
    model = Segmenter(replace(SMALL, head=head, num_classes=3, window=96))
    before = deepcopy(model.state_dict())
    report = load_weights(model, path)
    layers = {"mask2former": ["head.class_embed"], "upernet": ["head.classifier", "auxiliary_head.classifier"]}[head]
    assert report.reinitialised == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert len(report.resized) == 4 and report.missing == report.unexpected == []
    for name, tensor in model.state_dict().items():
        if name in report.reinitialised:
            assert torch.equal(tensor, before[name])
        elif name in report.resized:
            assert torch.equal(tensor, resize_position_table(source["model"][name], 6))
        else:
            assert torch.equal(tensor, source["model"][name])
    printed = capsys.readouterr().out
    assert printed == f"{report}\n" and f"{path}: own checkpoint" in printed
    assert [line.split()[:2] for line in printed.splitlines()[1:]] == [
        ["missing", "0"], ["unexpected", "0"], ["resized", "4"], ["reinitialised", str(2 * len(layers))]]


@pytest.mark.parametrize(("name", "value", "message"), [
    ("backbone.patch_embed.bias", None, r"1 missing: backbone\.patch_embed\.bias \("),
    ("backbone.extra", torch.zeros(3), r"1 unexpected: backbone\.extra \("),
    ("head.norm.weight", torch.zeros(3), r"1 of another shape: head\.norm\.weight float32 \(3,\) should be"),
    ("head.norm.weight", torch.zeros(32, dtype=torch.long), r"norm\.weight int64 \(32,\) should be float32 \(32,\)"),
    ("head.class_embed.weight", torch.zeros(6, 31), r"head\.class_embed\.weight float32 \(6, 31\) should be"),
    *((TABLE, torch.zeros(shape), rf"attn\.\w+ float32 {re.escape(str(shape))} should be float32 \(52, 2\)")
      for shape in ((53, 2), (732, 4), ())),
])
def test_tensors_that_do_not_fit(tmp_path, name, value, message):
    """Each misfit is an error of one line that names it and leaves the model alone."""
    state = own_checkpoint(SMALL)["model"]
    state.pop(name, None)
    if value is not None:
        state[name] = value
    torch.manual_seed(1)
    model = Segmenter(SMALL)
    before = deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):  # "." matches no line break
        load_weights(model, write(tmp_path / "x.pt", state))
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize(("source", "head", "size", "message"), [
    (lambda: released("upernet"), "mask2former", "tiny", "mask2former of tiny size; it fits --head upernet$"),
    (lambda: OWN, "upernet", "tiny", "upernet of tiny size; it fits --head mask2former$"),
    (lambda: Segmenter(replace(SIZES["tiny"], head="upernet")).state_dict(), "mask2former", "base",
     "mask2former of base size; it fits --head upernet --size tiny$"),
    (lambda: {f"backbone.{name}": tensor for name, tensor in Segmenter(TINY).backbone.state_dict().items()},
     "upernet", "base", "upernet of base size; it fits --size tiny$"),
])
def test_another_head_or_size_is_named(tmp_path, source, head, size, message):
    """It would leave most of a file unused: what fits is said instead of all the names that differ."""
    with torch.device("meta"):
        model = build_model(head, size)
    with pytest.raises(UserError, match=message):
        load_weights(model, write(tmp_path / "x.pt", source()))


@pytest.mark.parametrize("head", HEADS)
def test_fine_tuning_from_a_released_model(tmp_path, monkeypatch, capsys, head):
    """train.py takes one for other classes and another window; the report says what is new and what was fitted."""
    def build(head: str, size: str, num_classes: int, **changes) -> Segmenter:
        return Segmenter(replace(golden_config(head), num_classes=num_classes, **changes))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "build_model", build)
    small.write_data(Path("data"), 4, 1)
    write(Path("it's 40000.pth"), {**released(head), "optimizer": {}})
    options = ["--head", head, "--pretrained", "it's 40000.pth", "--window", "64", "--iterations", "1"]
    train.main([*small.OPTIONS, *options])
    told = capsys.readouterr().out.partition("runs/")[0]
    first = ["it's 40000.pth: released ViT-Adapter checkpoint", "  missing          0", "  unexpected       0"]
    assert told.splitlines()[:3] == first
    layers = {"mask2former": "head.class_embed.weight, head.class_embed.bias\n", "upernet": "head.classifier.weight, "
              "head.classifier.bias, auxiliary_head.classifier.weight, auxiliary_head.classifier.bias\n"}[head]
    assert f"resized          {golden_config(head).depth}  backbone.blocks.0" in told and layers in told
    model, info = load_model(next(Path("runs").glob("*/best.pt")))
    assert model.config == replace(golden_config(head), num_classes=3, window=64) and info["classes"] == small.CLASSES
    for name, theirs in rename_official(official_state(head)).items():
        if name.startswith("backbone.") and not name.endswith("bias_table"):  # after one step of AdamW at 1e-3
            torch.testing.assert_close(model.state_dict()[name], theirs.float(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("window", [6, 30])
def test_position_table_resize(window):
    """As the official code resizes a 14 x 14 window's table, smaller and larger."""
    golden = load_golden(f"relpos_{window}.npz")
    resized = resize_position_table(torch.from_numpy(golden["source"]), window)
    assert resized.dtype == torch.float32
    assert np.abs(resized.numpy() - golden["resized"]).max() < 1e-5
    assert np.array_equal(resized[-3:], golden["source"][-3:])


def test_position_table_corner_cases():
    table = torch.arange(12.0)[:, None].repeat(1, 2)  # a window of 2: 9 displacements and 3 rows
    assert resize_position_table(table, 2) is table
    assert resize_position_table(table, 4).shape == (52, 2)
    centre = resize_position_table(torch.arange(52.0)[:, None], 6)[60]  # the middle of 11 x 11
    assert centre.item() == pytest.approx(24, abs=1e-4)  # no displacement stays no displacement: the middle of 7 x 7
    for rows in (0, 2, 3, 7, 733):
        with pytest.raises(ValueError, match=f"{rows} rows"):
            resize_position_table(torch.zeros(rows, 2), 4)


def outcome(path: Path, model: Segmenter | None = None) -> dict | None:
    """What a model, or one made for it, gets from a file, or None after a UserError of one line.

    Whatever a small file claims, memory is not filled.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        if model is None:
            return load_model(path)[0].state_dict()
        load_weights(model, path)
        return deepcopy(model.state_dict())
    except UserError as error:  # any other exception fails the test
        assert str(error).startswith(str(path)) and str(error).isprintable() and len(str(error)) < 1000
        return None
    finally:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


OWN = own_checkpoint(SMALL)
SAMPLES = {
    "zip": lambda: to_bytes(OWN),
    "legacy": lambda: to_bytes(OWN, legacy=True),
    "zipped legacy": lambda: zipped("x.pth", to_bytes(OWN, legacy=True)),
    "zipped zip": lambda: zipped("x.pth", to_bytes(OWN)),
    "safetensors": lambda: safetensors.torch.save(beit()),
    "own safetensors": lambda: own_safetensors(OWN),
}
SILENT = ("legacy", "safetensors", "own safetensors")  # without checksums: a flipped bit of a weight is another weight


@pytest.mark.parametrize("share", [4, pytest.param(1, marks=pytest.mark.slow)])  # one place of so many
@pytest.mark.parametrize("kind", SAMPLES)
def test_damaged_files(tmp_path, kind, share):
    """A truncated file is an error; so is a flipped bit, or, where nothing depends on it, it gives the same weights."""
    whole, path, model, rng = SAMPLES[kind](), tmp_path / "x.pth", Segmenter(SMALL), random.Random(0)
    expected = outcome(write(path, whole), model)
    lengths = [*range(24), *(len(whole) - n for n in range(1, 24)), *(rng.randrange(len(whole)) for _ in range(60))]
    for length in lengths[::share]:
        assert outcome(write(path, whole[:length]), model) is None, length
    structure = [*range(2048), *range(len(whole) - 4096, len(whole))]  # headers and directories rather than weights
    places = rng.sample(structure, 80 // share) + [rng.randrange(len(whole)) for _ in range(32 // share)]
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        state = outcome(write(path, bytes(damaged)), model)
        refused += state is None
        if state is not None and kind not in SILENT:
            assert_same(state, expected)
    assert refused >= (10 if kind in SILENT else 50) // share


TERA = 10**12
HEADER = json.dumps({"cls_token": {"dtype": "F32", "shape": [TERA], "data_offsets": [0, 4 * TERA]}}).encode()
with warnings.catch_warnings(action="ignore"):
    OUTDATED = [torch.quantize_per_tensor(torch.zeros(32), 0.1, 0, torch.qint8),
                torch.nested.nested_tensor([torch.zeros(16), torch.zeros(16)])]
NO_CHECKPOINTS = [
    *(start + random.Random(length).randbytes(length) for length in (0, 1, 10, 1000)
      for start in (b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"12345678{", to_bytes({})[:200])),
    # claims of terabytes
    struct.pack("<Q", TERA) + b'{"', struct.pack("<Q", len(HEADER)) + HEADER,
    to_bytes({"adapter.x": torch.zeros(70_000)}, legacy=True).replace(
        struct.pack("<i", 70_000), struct.pack("<i", 2**31 - 1)),
    {"adapter.x": torch.zeros(1).expand(TERA)}, OWN["model"] | {TABLE: torch.zeros(1).expand(99_999**2 + 3, 2)},
    # other contents
    None, 3, "text", [], {}, torch.zeros(3), [torch.zeros(3)], {1: torch.zeros(3)}, {"state_dict": {}}, {"model": None},
    {"model": {("a",): torch.zeros(1)}}, {"state_dict": {"decode_head.x": torch.zeros(1)}},
    {"adapter.x": torch.zeros(1)}, {"model": {"adapter.x": torch.zeros(1)}, "format": torch.zeros(2)}, {None: None},
    {"blocks.0.attn.qkv.weight": torch.zeros(1)}, {"blocks.0.attn.qkv.weight": torch.zeros(())}, {"format": FORMAT},
    {"a\nname\x1b[2J\ud800" + 10_000 * "x": torch.zeros(1)},
    {"state_dict": {"decode_head.query_feat.weight": torch.zeros(3, 3)}, "meta": 3},
    {"state_dict": {f"decode_head.{i}\n" + 500 * "x": torch.zeros(1) for i in range(9)}},
    # other values in the place of one tensor of 32 numbers
    *(OWN | {"model": OWN["model"] | {"head.norm.weight": value}} for value in (
        None, 3, "weights", [1.0, 2.0], {}, np.float64(1), torch.zeros(32, dtype=torch.complex64),
        torch.zeros(32, dtype=torch.bool), torch.zeros(32, dtype=torch.uint8), torch.zeros(32, dtype=torch.long),
        torch.zeros(32).to(torch.float8_e4m3fn), torch.zeros(32).to_sparse(), torch.zeros(1).expand(32),
        torch.zeros(()), torch.zeros(0), torch.empty(32, device="meta"), *OUTDATED,
        torch.full((32,), math.nan), torch.full((32,), -math.inf).half(),  # of a training that failed
    )),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("content", NO_CHECKPOINTS, ids=lambda content: type(content).__name__)
def test_files_that_are_no_checkpoints(tmp_path, content, legacy):
    try:
        path = write(tmp_path / "x.pt", to_bytes(content, legacy) if legacy else content)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"PyTorch cannot write that: {error}")
    assert outcome(path) is None
    assert outcome(path, Segmenter(SMALL)) is None
    assert convert.main([str(path)]) in (0, 2)  # any exception would get through


def framed(header: dict | bytes, length: int | None = None) -> bytes:
    """A safetensors file of this header, an untrue length of it, and 64 bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(64)


ENTRY = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}


@pytest.mark.parametrize("content", [
    *(framed({"cls_token": ENTRY}, length) for length in (0, 1, 9, 1000, 2**31, 2**40, 2**63, 2**64 - 1)),
    *(framed({"cls_token": ENTRY | change}) for change in (
        {"data_offsets": [-64, 0]}, {"data_offsets": [64, 0]}, {"data_offsets": [0, 2**70]}, {"data_offsets": [0.5, 1]},
        {"data_offsets": [0, 32]}, {"data_offsets": None}, {"data_offsets": []}, {"dtype": "F33"}, {"dtype": 3},
        {"dtype": "F64"}, {"dtype": "C64"}, {"dtype": "F8_E8M0"}, {"dtype": "F4"}, {"shape": [-16]}, {"shape": [2**63]},
        {"shape": [2**40, 2**40, 2**40]}, {"shape": "16"}, {"shape": [float("nan")]}, {"shape": [float("inf")]})),
    framed({"a": ENTRY, "b": ENTRY}), framed({"a": ENTRY, "b": ENTRY | {"data_offsets": [32, 96]}}),  # they overlap
    framed(b'{"a": %s, "a": %s}' % (2 * (json.dumps(ENTRY).encode(),))), framed(b"{" * 10_000), framed(b'{"a": NaN}'),
    framed(b'{"\xff": 1}'), framed(b'{"a": {"b": ' * 30_000), framed({"__metadata__": {"format": 3}, "a": ENTRY}),
    *(framed({"__metadata__": {"format": FORMAT, **about}, "adapter.interactions.0.x": ENTRY}) for about in (
        {}, *({"about": text} for text in (
            "", "NaN", "3", "null", "[]", '"text"', "{", "[" * 100_000, '{"config": NaN}', '{"config": []}',
            '{"config": {"window": NaN}}', '{"config": {"window": 1e999}}', '{"model": {}, "format": 3}',
            '{"state_dict": {"a": 1}}')))),
])
def test_damaged_headers_of_safetensors(tmp_path, content):
    path = write(tmp_path / "x.safetensors", content)
    assert outcome(path) is None
    assert outcome(path, Segmenter(SMALL)) is None
    assert convert.main([str(path)]) == 2  # any exception would get through


@settings(deadline=None, max_examples=15)
@given(st.text(max_size=20) | st.recursive(st.none() | st.floats() | st.text(max_size=5), lambda inner: st.lists(
    inner, max_size=3) | st.dictionaries(st.sampled_from(["config", "classes", "palette", "iteration", "window", "a"]),
                                         inner, max_size=4), max_leaves=8))
def test_any_metadata_of_safetensors(about):
    """The model with sound facts, or one line."""
    header = {"format": FORMAT, "about": about if isinstance(about, str) else json.dumps(about)}
    state = {name: tensor.clone() for name, tensor in OWN["model"].items()}
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "x.safetensors", safetensors.torch.save(state, header))
        try:
            model, info = load_model(path)
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) < 1000
        else:
            assert_same(model.state_dict(), OWN["model"])
            assert info.keys() <= {"classes", "palette", "iteration"}


def test_a_dictionary_that_holds_itself(tmp_path):
    content = {}
    content["model"] = content
    assert outcome(write(tmp_path / "x.pt", content)) is None


def test_options_of_argparse_in_a_file_are_plain_values(tmp_path):
    """Training scripts save them beside the weights, timm's too; no class of another kind comes with them."""
    arguments = argparse.Namespace(lr=1e-3, model="beit", betas=[0.9, 0.98])
    path = write(tmp_path / "x.pth", {"model": OWN["model"], "args": arguments})
    assert weights.read_file(path)["args"] == arguments
    assert_same(load_model(path)[0].state_dict(), OWN["model"])
    arguments.out = Path("folder")
    with pytest.raises(UserError, match="it would run pathlib"):
        weights.read_file(write(tmp_path / "y.pth", {"model": OWN["model"], "args": arguments}))


def test_an_archive_that_was_packed_anew(tmp_path):
    """PyTorch's mapping of a file takes compressed bytes for numbers: such an archive is read, not mapped."""
    path = tmp_path / "x.pt"
    whole = zipfile.ZipFile(io.BytesIO(to_bytes(OWN)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in whole.namelist():
            packed.writestr(member, whole.read(member))
    assert_same(weights.read_file(path, mapped=True)["model"], OWN["model"])


@pytest.mark.parametrize("kind", ["zip", "own safetensors"])
def test_a_mapped_file_is_read_when_its_numbers_are_used(tmp_path, kind):
    """Otherwise tensors have memory of their own, as those of a model have: then the file may change."""
    path, name = write(tmp_path / "x", SAMPLES[kind]()), "backbone.cls_token"
    mapped, own = (weights.read_file(path, mapped=mapped)["model"][name] for mapped in (True, False))
    model, copy = load_model(path)[0], Segmenter(SMALL)
    load_weights(copy, path)
    place = path.read_bytes().index(own.numpy().tobytes())
    with path.open("r+b") as file:
        file.seek(place)
        file.write(torch.full_like(own, 3).numpy().tobytes())
    for tensor in (own, model.state_dict()[name], copy.state_dict()[name]):
        assert torch.equal(tensor, OWN["model"][name])
    assert (mapped == 3).all()


@pytest.mark.parametrize("config", [
    3, "mask2former", [1], {"unknown": 1}, {"head": "fcn"}, {"embed_dim": "many"}, {"embed_dim": 10**12},
    {"embed_dim": 10**7}, {"depth": 10**9}, {"decoder_layers": 10**9}, {"num_heads": 0}, {"embed_dim": -32},
    {"window": 32 * 10**6}, {"head_channels": 33}, {"embed_dim": 32.5}, {"head": "upernet"}, {"num_classes": 2**40},
    {"num_classes": 4}, {"window": 96}, {"window": 32000},
])
def test_wrong_configurations(tmp_path, config):
    """Sizes are compared with the tensors before any memory is asked for."""
    config = OWN["config"] | config if isinstance(config, dict) else config
    assert outcome(write(tmp_path / "x.pt", OWN | {"config": config})) is None


@pytest.mark.parametrize("info", [
    {"classes": 3}, {"classes": None, "palette": None}, {"classes": ["a"]}, {"classes": {}}, {"classes": ["a"] * 4},
])
def test_classes_that_make_no_sense_are_left_out(tmp_path, info):
    assert load_model(write(tmp_path / "x.pt", OWN | info | {"iteration": "x"}))[1] == {}


@pytest.mark.parametrize("palette", [
    None, [[1, 2]], "red", [[0, 0, 300]] * 3, [[0, 0, -1]] * 3, [[None] * 3] * 3, [[0.5, 0.1, 1.0]] * 3,
])
def test_classes_without_a_usable_palette_get_the_default_one(tmp_path, palette):
    info = load_model(write(tmp_path / "x.pt", OWN | {"classes": ["sky", "a\nb", "sea"], "palette": palette}))[1]
    assert info["classes"] == ["sky", "a?b", "sea"] and info["palette"] == default_palette(3).tolist()


class Bomb:
    """Unpickled by plain pickle it makes a file, by a shell command or by Python code."""

    def __init__(self, marker: Path, call: str):
        self.reduced = (exec, (f"open({str(marker)!r}, 'w')",)) if call == "exec" else (os.system, (f"touch {marker}",))

    def __reduce__(self):
        return self.reduced


BOMBS = {
    "zip": to_bytes,
    "legacy": partial(to_bytes, legacy=True),
    "a weight": lambda bomb: to_bytes({"state_dict": {"decode_head.x": bomb}}),
    "metadata": lambda bomb: to_bytes({**released("upernet"), "meta": {"hook_msgs": [{"x": bomb}]}}),
    "legacy metadata": lambda bomb: to_bytes({"state_dict": {}, "meta": {"hook_msgs": [{"x": bomb}]}}, legacy=True),
    "a key": lambda bomb: to_bytes({"model": {bomb: 1}}),
    "zipped": lambda bomb: zipped("x.pth", to_bytes({"state_dict": bomb})),
    "zipped legacy": lambda bomb: zipped("x.pth", to_bytes({"state_dict": bomb}, legacy=True)),
    **{f"pickle {n}": partial(pickle.dumps, protocol=n) for n in range(6)},
}


@pytest.mark.parametrize("call", ["posix.system", "exec"])
@pytest.mark.parametrize("place", BOMBS)
def test_pickle_bombs(tmp_path, place, call):
    """Nothing in a file is executed, wherever the code is hidden; the message names the call."""
    marker = tmp_path / "marker"
    bomb = Bomb(marker, call)
    pickle.loads(pickle.dumps(bomb))
    assert marker.exists()  # the bomb is a real one
    marker.unlink()
    path = write(tmp_path / "x.pth", BOMBS[place](bomb))
    assert outcome(path) is None
    with pytest.raises(UserError, match=None if "pickle" in place else rf"refused: it would run (builtins\.)?{call} "):
        load_weights(Segmenter(SMALL), path)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask2former_base", "upernet_large", "mask2former_large"])
def test_released_models_at_full_size(tmp_path, name):
    """A file in the official format gives the official features, scores and labels of a 480 x 480 image, in float32."""
    golden, state = load_golden(f"full_{name}.npz"), OrderedDict()
    for key, shape in json.loads((GOLDEN / "official_state_dicts.json").read_text())[name].items():
        is_index = key.endswith("relative_position_index")
        numbers = np.zeros(shape, np.int64) if is_index else np.asarray(fill.fill(key, shape))
        state[key] = torch.from_numpy(numbers)
    path = write(tmp_path / "iter_40000.pth", {"meta": {"iter": 40000, "mmcv_version": "1.4.2"}, "state_dict": state})
    del state
    model, info = load_model(path)
    path.unlink()
    image = noise("image480", 1, 3, 480, 480).float()
    with torch.no_grad():
        features = model.features(image)
        prediction = model.head(features)
        scores = prediction if isinstance(prediction, torch.Tensor) else semantic_scores(prediction)
        full = resize(scores, (480, 480))
    with fast.inference(model):
        full_fast = model(image)
    assert info == {"iteration": 40000}
    for feature, key, (every, step) in ((features.f4, "f1", (16, 12)), (features.f16, "f3", (16, 3))):
        actual = feature[:, ::every, ::step, ::step].numpy()
        assert np.abs(actual - golden[key]).max() / np.abs(golden[key]).max() < 1e-4, key
    for actual, key in ((scores[:, :, ::8, ::8], "seg_4th"), (full[:, :, ::16, ::16], "scores_every16"),
                        (full_fast[:, :, ::16, ::16], "scores_every16")):
        difference = np.abs(actual.numpy() - golden[key]) / np.ptp(golden[key])
        assert (difference < 1e-3).mean() >= 0.999, key
    clear = ~golden["margin480_small"]
    for each in (full, full_fast):
        assert np.array_equal(each.argmax(dim=1).numpy()[clear], golden["argmax480"][clear])
