"""renaming.py: BEiT of transformers and timm -> prefixes and containers -> what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import official_state, randomized
from test_weights import SMALL, assert_same, beit, own_checkpoint, released, write

from common import UserError
from model import BEiT, Segmenter
from renaming import our_names, rename_official
from weights import load_model, load_weights, read_weights


def layer_outputs(theirs: torch.nn.Module, layers: torch.nn.ModuleList, images: torch.Tensor) -> list[torch.Tensor]:
    """The tokens (B, N, D) behind each layer of another library's BEiT."""
    captured = []
    for layer in layers:
        layer.register_forward_hook(
            lambda module, inputs, output: captured.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        theirs(images)
    return captured


def assert_same_tokens(ours: BEiT, images: torch.Tensor, expected: list[torch.Tensor]) -> None:
    """Float64 and another order of operations: equal to rounding behind every block."""
    with torch.no_grad():
        x = torch.cat(ours.embed(images), dim=1)
        for block, tokens in zip(ours.blocks, expected, strict=True):
            x = block(x, ours.position_index)
            torch.testing.assert_close(x, tokens, rtol=1e-9, atol=1e-9)


def save_state(model: torch.nn.Module, folder: Path) -> Path:
    """As PyTorch saves the model: the names are those of its modules."""
    return write(folder / "pytorch_model.bin", model.state_dict())


def save_pretrained(model: torch.nn.Module, folder: Path) -> Path:
    """As the library saves it: the names are those of all its versions."""
    model.save_pretrained(folder)
    return folder / "model.safetensors"


@pytest.mark.parametrize("save", [save_state, save_pretrained])
@pytest.mark.parametrize(("task", "changes", "dropped"), [
    ("Model", {}, {"pooler.layernorm.weight", "pooler.layernorm.bias"}),
    ("Model", {"use_mean_pooling": False}, {"layernorm.weight", "layernorm.bias"}),
    ("Model", {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
     {"pooler.layernorm.weight", "pooler.layernorm.bias"}),
    ("ForImageClassification", {}, {"beit.pooler.layernorm.weight", "beit.pooler.layernorm.bias",
                                    "classifier.weight", "classifier.bias"}),
    ("ForMaskedImageModeling", {"use_mask_token": True, "vocab_size": 9}, {
        "beit.embeddings.mask_token", "layernorm.weight", "layernorm.bias", "lm_head.weight", "lm_head.bias"}),
    ("ForSemanticSegmentation", {"out_indices": [1, 2, 3, 4]}, None),
])
def test_beit_of_transformers(tmp_path, capsys, save, task, changes, dropped):
    """Its own code makes the file; ours computes from it the same tokens behind every block."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(**{
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 64,
        "patch_size": 16, "layer_norm_eps": 1e-6, "use_relative_position_bias": True, **changes})
    torch.manual_seed(0)
    theirs = randomized(getattr(transformers, f"Beit{task}")(config))
    images = torch.randn(2, 3, 64, 64, dtype=torch.double)
    body = getattr(theirs, "beit", theirs)
    expected = layer_outputs(body, body.layers if hasattr(body, "layers") else body.encoder.layer, images)
    path = save(theirs, tmp_path)
    ours = Segmenter(SMALL).double()
    report = load_weights(ours, path)
    assert_same_tokens(ours.backbone, images, expected)
    assert report.kind == "beit" and report.missing == report.unexpected == report.resized == []
    prefix = ", prefix beit. removed" if task.startswith("For") else ""
    assert capsys.readouterr().out.startswith(f"{path}: BEiT pre-training{prefix}\n")
    if dropped is None:  # the head of a segmenter
        assert report.dropped and all(name.startswith(("decode_head.", "auxiliary_head.", "fpn"))
                                      for name in report.dropped)
    else:
        assert {name for name in report.dropped if not name.endswith("relative_position_index")} == dropped


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beitv2_base_patch16_224"])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_beit_of_timm(tmp_path, name, suffix):
    """BEiTv2's blocks are BEiT's."""
    torch.manual_seed(0)
    theirs = randomized(timm.create_model(name, pretrained=False, depth=4, embed_dim=32, num_heads=2, num_classes=5))
    images = torch.randn(1, 3, 224, 224, dtype=torch.double)
    expected = layer_outputs(theirs, theirs.blocks, images)
    state = theirs.state_dict()
    path = write(tmp_path / f"x.{suffix}", safetensors.torch.save(state) if suffix == "safetensors" else state)
    ours = Segmenter(replace(SMALL, window=224)).double()
    report = load_weights(ours, path)
    assert_same_tokens(ours.backbone, images, expected)
    assert set(report.dropped) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert report.missing == report.unexpected == report.notes == []


def test_pre_training_files_of_beit_v2(tmp_path):
    """They have one table of positions for all blocks, and blocks of a decoder that no segmenter needs."""
    state = beit(shared=True)
    decoder = {f"cls_pt_layers.0{name.removeprefix('blocks.0')}": tensor for name, tensor in state.items()
               if name.startswith("blocks.0")}
    report = load_weights(Segmenter(SMALL), write(tmp_path / "x.pth", {"model": {**decoder, **state}}))
    assert report.kind == "beit" and report.missing == report.unexpected == [] and len(report.resized) == 4
    assert decoder.keys() < set(report.dropped) and "lm_head.bias" in report.dropped


def wrap(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


KINDS = {
    "ours": lambda: own_checkpoint(SMALL)["model"],
    "released": lambda: official_state("mask2former"),
    "beit": beit,
    "beit in mmseg": lambda: {**wrap(beit(), "backbone."), "backbone.fpn1.0.weight": torch.zeros(3),
                              "decode_head.conv_seg.weight": torch.zeros(5, 3)},
}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.",
                                    "module.model.", "model.module.", "segmenter.net._orig_mod.", "a b.'c'."])
@pytest.mark.parametrize("kind", KINDS)
def test_prefixes(tmp_path, kind, prefix):
    """In any nesting and order; the report names what was removed, and what lies outside of the prefix is dropped."""
    state = KINDS[kind]()
    plain = read_weights(write(tmp_path / "plain.pt", state))
    content = {**wrap(state, prefix), "metric.total": torch.zeros(2), "n_averaged": torch.tensor(3)}
    found = read_weights(write(tmp_path / "x.pt", content))
    assert found.kind == plain.kind == kind.split()[0]
    assert_same(found.state, plain.state)
    assert set(found.dropped) == {prefix + name for name in plain.dropped} | {"metric.total", "n_averaged"}
    if kind == "beit in mmseg":
        assert {"backbone.fpn1.0.weight", "decode_head.conv_seg.weight"} < set(plain.dropped)
    inner = "backbone." if kind == "beit in mmseg" else ""
    assert plain.notes == [f"prefix {inner} removed"] * bool(inner)
    assert found.notes == [f"prefix {prefix}{inner} removed"]


def test_wrappers_inside_of_a_model(tmp_path):
    """torch.compile of a part renames that part alone."""
    model = Segmenter(SMALL)
    model.backbone = torch.compile(model.backbone)
    model.head = torch.nn.DataParallel(model.head)
    model.adapter.interactions[0] = torch.compile(model.adapter.interactions[0])
    model.adapter.interactions = torch.nn.DataParallel(model.adapter.interactions)
    found = read_weights(write(tmp_path / "x.pt", model.state_dict()))
    assert_same(found.state, Segmenter(SMALL).state_dict() | {
        name.replace("_orig_mod.", "").replace("module.", ""): tensor for name, tensor in model.state_dict().items()})
    assert found.notes == ["prefix _orig_mod., module. removed"] and found.dropped == []


def test_averages_that_pytorch_makes(tmp_path):
    """swa_utils' AveragedModel of a compiled model: names and a counter of its own."""
    model = Segmenter(SMALL)
    averaged = torch.optim.swa_utils.AveragedModel(torch.compile(model))
    loaded, _ = load_model(write(tmp_path / "x.pt", averaged.state_dict()))
    assert_same(loaded.state_dict(), model.state_dict())


RAW, AVERAGE = own_checkpoint(SMALL)["model"], {n: t + 1 for n, t in own_checkpoint(SMALL)["model"].items()}


@pytest.mark.parametrize(("content", "expected", "notes"), [
    ({"model": RAW, "model_ema": AVERAGE}, RAW, ['"model" taken, not "model_ema"']),
    ({"state_dict_ema": AVERAGE, "state_dict": RAW, "arch": "x"}, RAW, ['"state_dict" taken, not "state_dict_ema"']),
    ({"model_ema": AVERAGE, "epoch": 3}, AVERAGE, ['"model_ema" taken']),
    ({"ema": {"module": AVERAGE}}, AVERAGE, ['"ema" taken']),
    ({"model_ema": {"state_dict": wrap(AVERAGE, "module.")}}, AVERAGE, ['"model_ema" taken', "prefix module. removed"]),
    ({"state_dict": wrap(RAW, "model."), "hyper_parameters": {"lr": 1}}, RAW, ["prefix model. removed"]),
    ({"state_dict": {**wrap(AVERAGE, "ema."), **wrap(RAW, "network.")}}, RAW, ["prefix network. removed"]),
    ({"module": {"module": wrap(RAW, "module.")}}, RAW, ["prefix module. removed"]),
])
def test_averaged_weights_and_containers(tmp_path, content, expected, notes):
    """The model is taken where a file has it and its average, and the report says so; an average where there is no
    other."""
    found = read_weights(write(tmp_path / "x.pt", content))
    assert found.kind == "ours" and found.notes == notes
    assert_same(found.state, expected)


def test_the_released_models_keep_their_two_prefixes():
    """`backbone.` and `decode_head.` are no prefixes of one model."""
    state = released("upernet")["state_dict"]
    kind, names, prefixes = our_names(state)
    assert (kind, prefixes) == ("released", []) and names.keys() == rename_official(state).keys()


def with_position_embedding(state: dict) -> dict:
    return {**state, "pos_embed": torch.zeros(1, 197, 32)}


def of_vit(state: dict) -> dict:
    return {f"vit.embeddings.{name}": torch.zeros(1, 5, 32) for name in ("cls_token", "position_embeddings")} | {
        "vit.encoder.layer.0.attention.attention.query.weight": torch.zeros(32, 32)}


def with_other_queries(state: dict) -> dict:
    del state["blocks.1.attn.qkv.weight"]
    shapes = {"query": (2, 3), "key": (4,), "value": ()}
    return state | {f"blocks.1.attention.{part}.weight": torch.zeros(shape) for part, shape in shapes.items()}


@pytest.mark.parametrize(("change", "message"), [
    (with_position_embedding, "x.pth: a BEiT with position embeddings, and the backbone has relative positions alone"),
    (of_vit, "position embeddings"),
    (with_other_queries, "1 missing: backbone.blocks.1.attn.qkv.weight; 3 unexpected: backbone.blocks.1.attn.q.weight"),
    (lambda state: {n: t for n, t in state.items() if "bias_table" not in n}, "4 missing: .*bias_table"),
    (lambda state: {**state, "rope.freqs": torch.zeros(3)}, "1 unexpected: backbone.rope.freqs"),
])
def test_other_architectures(tmp_path, change: Callable, message):
    with pytest.raises(UserError, match=message):
        load_weights(Segmenter(replace(SMALL, window=224)), write(tmp_path / "x.pth", change(beit())))
