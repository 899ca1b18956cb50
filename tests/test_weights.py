"""Formats -> what fits and what does not -> position tables -> hostile files -> the command -> the released models."""

import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import struct
import subprocess
import sys
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
import timm
import torch
from conftest import GOLDEN, ROOT, fill, golden_config, load_golden, needs_torch, noise, official_state
from PIL import Image
from torch.export.passes import move_to_device_pass

import data
import evaluate
import fast
import msda_cuda
import weights
from adapter import resize
from common import UserError
from heads import semantic_scores
from model import ModelConfig, Segmenter, build_model
from pictures import default_palette, read_image
from weights import FORMAT, infer_config, load_model, load_weights, rename_official, resize_position_table

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
    ("the other head", None, r"this mask2former of custom size.* missing: head.query_feat, .* unexpected: "),
])
def test_tensors_that_do_not_fit(tmp_path, name, value, message):
    """Each misfit is an error of one line that names it and leaves the model alone."""
    state = own_checkpoint(replace(SMALL, head="upernet") if name == "the other head" else SMALL)["model"]
    state.pop(name, None)
    if value is not None:
        state[name] = value
    torch.manual_seed(1)
    model = Segmenter(SMALL)
    before = deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):  # "." matches no line break
        load_weights(model, write(tmp_path / "x.pt", state))
    assert_same(model.state_dict(), before)


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
}
SILENT = ("legacy", "safetensors")  # they hold no checksums: a flipped bit of a weight is another weight


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
    assert command(path) in (0, 2)  # any exception would get through


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


def command(*arguments) -> int:
    """`python weights.py ARGUMENTS` in this process; its exit status."""
    return weights.main([*map(str, arguments)])


def test_command_tells_what_a_file_is(tmp_path, capsys):
    own = write(tmp_path / "own.pt", OWN)
    assert command(own) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["sha256"] == hashlib.sha256(own.read_bytes()).hexdigest()
    assert lines["format"] == "own checkpoint" and lines["fits"] == "mask2former, custom size, window 64"
    assert lines["classes"] == "3 class 0, class 1, class 2" and lines["iteration"] == "12"
    assert command(write(tmp_path / "beit.pth", {"model": beit()})) == 0
    printed = capsys.readouterr().out
    assert "BEiT pre-training" in printed and "a backbone of width 32 and depth 4" in printed


def test_command_converts(tmp_path, capsys):
    """The released format to ours: the same tensors, configuration and classes; nothing else is left in the folder."""
    source = write(tmp_path / "x.pth", released("mask2former"))
    out = write(tmp_path / "out.pt", b"an older file")
    assert command(source, "--to", out) == 0
    printed = capsys.readouterr().out
    assert "released ViT-Adapter checkpoint" in printed and f"written     {out}" in printed
    model, info = load_model(out)
    assert_same(model.state_dict(), rename_official(official_state("mask2former")))
    assert info["classes"] == list("abcdefg") and info["iteration"] == 40000
    content = torch.load(out, weights_only=True)
    assert content["format"] == FORMAT and ModelConfig(**content["config"]) == model.config
    assert sorted(os.listdir(tmp_path)) == ["out.pt", "x.pth"]


@pytest.mark.parametrize(("source", "option", "out", "message"), [
    ("absent.pth", "--to", "out.pt", "no such file"),
    ("folder.pt2", "--to", "out.pt", "no such file"),
    ("damaged.pth", "--to", "out.pt", "truncated, damaged, or no checkpoint"),
    ("two.zip", "--to", "out.pt", "a zip archive with 2 checkpoints in it; unpack it and name one"),
    ("beit.pth", "--to", "out.pt", "no segmentation head; give it to train.py --pretrained"),
    ("x.pth", "--to", "out.pt/out.pt", "cannot be used as a folder"),
    ("x.pth", "--to", "folder.pt2", "is a folder"),
    ("x.pth", "--export", "model.onnx", "name it *.pt2"),
    ("x.pth", "--export", "out.pt/a.pt2", "cannot be used as a folder"),
    ("x.pth", "--export", "folder.pt2", "is a folder"),
])
def test_command_refuses_in_one_line(tmp_path, capsys, monkeypatch, source, option, out, message):
    """Status 2 and one line, before the work begins; an older file at the destination is untouched."""
    whole = write(tmp_path / "x.pth", released("upernet")).read_bytes()
    write(tmp_path / "damaged.pth", whole[:-9])
    write(tmp_path / "beit.pth", {"model": beit()})
    write(tmp_path / "out.pt", b"an older file")
    (tmp_path / "folder.pt2").mkdir()
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.pth", b"1")
        archive.writestr("b.pth", b"2")
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(weights, "export", lambda *_: pytest.fail("the work began"))
    assert command(tmp_path / source, option, tmp_path / out) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert (tmp_path / "out.pt").read_bytes() == b"an older file" and sorted(os.listdir(tmp_path)) == before


# Another program, README.md's: it finds PyTorch, Pillow and NumPy, and nothing of ours.
(README,) = re.findall(r"```python\n(import json.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
READER = README + """
import sys
assert not {"model", "msda_cuda", "weights"} & sys.modules.keys() and not hasattr(torch.ops.msda, "forward")
np.save("labels.npy", labels)
images = torch.load("images.pt")
scores = [score(images[:number]) for number in (1, 2, 3)]
assert not scores[0].requires_grad
torch.save(scores, "scores.pt")
for wrong in images.float() / 255, images[..., :32], images[0]:  # a size or a type that it would misunderstand
    try:
        score(wrong)
    except (RuntimeError, AssertionError):
        continue
    raise SystemExit("it took a wrong input")
print(json.dumps(about))
"""


class OneLayer(torch.nn.Module):
    """The least that `export` can write: a configuration, and a layer with the operator."""

    def __init__(self):
        super().__init__()
        self.config = SMALL
        self.embed, self.layer = torch.nn.Conv2d(3, 16, 16, stride=16), msda_cuda.MSDeformAttn(16, 2, 1, 4)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).mT  # (B, 16, 4, 4) -> (B, 4 * 4, 16)
        tokens = self.layer(tokens, msda_cuda.reference_points([(4, 4)], tokens), tokens, [(4, 4)])
        return resize(tokens.mT[:, :3].unflatten(2, (4, 4)), (64, 64))  # (B, 3, 64, 64): three classes


@needs_torch("2.10", "it exports no program of any number of images")
@pytest.mark.parametrize("name", ["one layer", *(pytest.param(head, marks=pytest.mark.slow) for head in HEADS)])
def test_export(tmp_path, capsys, monkeypatch, name):
    """Without our code README.md's lines give our labels of a photograph; and our scores of any number of crops."""
    out = tmp_path / "folder" / "model.pt2"
    if name == "one layer":
        torch.manual_seed(0)
        out.parent.mkdir()
        model = OneLayer().eval()
        weights.export(model, out, {"iteration": 12})
        palette = default_palette(3).tolist()
    else:
        source = write(tmp_path / "x.pt", own_checkpoint(replace(SMALL, head=name)))
        assert command(source, "--export", out) == 0 and f"exported    {out}" in capsys.readouterr().out
        model, palette = load_model(source)[0], [[i, 0, 9] for i in range(3)]
    assert os.listdir(out.parent) == ["model.pt2"]
    images = (noise("image", 3, 3, 64, 64) * 60 + 128).clamp(0, 255).to(torch.uint8)
    torch.save(images, out.parent / "images.pt")
    with Image.open(ROOT / "docs" / "demo.jpg") as demo:
        demo.crop((30, 40, 230, 190)).save(out.parent / "photo.jpg", quality=95)
    done = subprocess.run([sys.executable, "-I", "-c", READER], cwd=out.parent, capture_output=True,
                          env={**os.environ, "MSDA": "native"}, text=True, check=False)
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)
    assert {key: about[key] for key in ("format", "classes", "palette", "window", "iteration", "mean", "std")} == {
        "format": "vit-adapter-seg/program/1", "classes": ["class 0", "class 1", "class 2"], "palette": palette,
        "window": 64, "iteration": 12, "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
    found = torch.load(out.parent / "scores.pt")
    photo = read_image(out.parent / "photo.jpg")
    with torch.no_grad():
        chosen = model(data.normalize(images))
        (labels,) = evaluate.predictions(model, [photo])
        monkeypatch.setattr(msda_cuda.module, "ms_deform_attn", msda_cuda.ms_deform_attn_torch)
        reference = [model(data.normalize(images[:number])) for number in (1, 2, 3)]
    assert all(map(torch.equal, found, reference))
    torch.testing.assert_close(found[2], chosen, rtol=0, atol=1e-5 * chosen.abs().max().item())
    theirs, coloured = np.load(out.parent / "labels.npy"), read_image(out.parent / "coloured.png")
    assert theirs.shape == (150, 200) and (theirs == labels.numpy()).mean() > 0.9999
    np.testing.assert_array_equal(coloured, np.uint8(palette)[theirs])
    program = move_to_device_pass(torch.export.load(out), "meta")  # stands for a GPU: nothing may stay on the CPU
    assert {str(node.kwargs["device"]) for node in program.graph.nodes if "device" in node.kwargs} == {"meta"}
    assert program.module()(images.to("meta")).device.type == "meta"


def test_an_older_torch_exports_nothing_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cu126"))
    with pytest.raises(UserError, match=r"PyTorch 2\.10 or newer, and this is 2\.9\.1\+cu126: update"):
        weights.export(OneLayer().eval(), tmp_path / "x.pt2", {})
    assert not list(tmp_path.iterdir())


def test_command_line_from_a_shell(tmp_path):
    """No traceback and no warning of PyTorch's, only the line; and no operator is built for it."""
    cache = tmp_path / "cache"
    cache.mkdir()
    bomb = write(tmp_path / "x.pth", pickle.dumps(Bomb(tmp_path / "marker", "exec"), protocol=4))
    done = subprocess.run([sys.executable, ROOT / "weights.py", bomb], capture_output=True, text=True, check=False,
                          env={**os.environ, "TORCH_EXTENSIONS_DIR": str(cache)})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {bomb}: cannot be read (UnpicklingError): truncated")
    assert not (tmp_path / "marker").exists() and not list(cache.iterdir())


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
