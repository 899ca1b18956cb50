"""Whole models against the official code (golden values), BEiT against timm, and what build_model refuses."""
import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, OFFICIAL, golden_config, load_golden, mask_logits, noise

import fast
from model import SIZES, ModelConfig, Segmenter, build_model, relative_position_index
from renaming import rename_official

pytestmark = pytest.mark.usefixtures("modes_for_narrow_models")
HEADS = ["mask2former", "upernet"]
LOSS_NAMES = {"decode.loss_ce": "pixel", "aux.loss_ce": "auxiliary"}


def renamed(names, values) -> dict:
    return rename_official(dict(zip(map(str, names), values, strict=True)))


def our_loss_name(official: str, last: int) -> str | None:
    """"decode.d2.loss_cls" -> "class/2", "decode.loss_mask" -> the last output's "mask"; accuracies have none."""
    if "acc" in official or official in LOSS_NAMES:
        return LOSS_NAMES.get(official)
    *_, layer, term = official.split(".")
    term = {"loss_cls": "class", "loss_mask": "mask", "loss_dice": "dice"}[term]
    return f"{term}/{last if layer == 'decode' else layer.removeprefix('d')}"


def assert_gradients(model: Segmenter, golden: dict, rtol: float) -> None:
    norms = renamed(golden["grad_names"], golden["grad_norms"])
    parameters = dict(model.named_parameters())
    scale = max(norms.values())
    for name, norm in norms.items():
        # Absolute part: the transposed convolution's bias stands before a batch norm, its gradient is rounding error.
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=rtol, abs=1e-13 * scale), name


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    expected = torch.from_numpy(expected).double()
    return ((actual.detach() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("head", HEADS)
def test_golden_evaluation(golden_model, head):
    """Features, every head output, scores of both texts, and the gradient of each parameter, as officially computed."""
    golden, model = load_golden(f"tiny_{OFFICIAL[head]}_eval.npz"), golden_model(head)
    images = noise("image", 2, 3, 96, 96)
    features = model.features(images)
    for i, feature in enumerate(features):
        assert relative_error(feature, golden[f"f{i + 1}"]) < 1e-6
    if head == "mask2former":
        mask_features, memory = model.head.pixel_decoder(features)
        assert relative_error(mask_features, golden["mask_features"]) < 1e-6
        for i in range(3):
            assert relative_error(memory[i], golden[f"memory{i}"]) < 1e-6
        prediction = model.head(features)
        classes, masks = prediction.class_logits, mask_logits(prediction)
        assert len(classes) == len(masks) == 5
        for i in range(5):
            assert relative_error(classes[i], golden[f"cls{i}"]) < 1e-6
            assert relative_error(masks[i], golden[f"mask{i}"]) < 1e-6
    else:
        assert relative_error(model.head(features), golden["logits"]) < 1e-6
        assert relative_error(model.auxiliary_head(features.f16), golden["aux_logits"]) < 1e-6
    with fast.inference(model):
        assert relative_error(model(images), golden["seg"]) < 1e-6
    scores = model(images)
    assert relative_error(scores, golden["seg"]) < 1e-6
    (scores * noise("cotangent", *scores.shape)).mean().backward()
    assert_gradients(model, golden, rtol=1e-6)


@pytest.mark.parametrize("enabled", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("head", HEADS)
def test_golden_training_step(golden_model, halton_points, head, enabled):
    """Every loss term, gradient norm and batch-norm statistic of one official training step."""
    golden, model = load_golden(f"tiny_{OFFICIAL[head]}_train.npz"), golden_model(head).train()
    with fast.training(model, enabled):
        losses = model(noise("image", 2, 3, 96, 96), torch.from_numpy(golden["labels"]).long())
        losses["loss"].backward()
    named = {our_loss_name(str(n), last=4): v for n, v in zip(golden["loss_names"], golden["loss_values"], strict=True)}
    named.pop(None, None)
    assert set(losses) == {"loss", *named}
    for name, value in named.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-7), name
    assert losses["loss"].item() == pytest.approx(golden["total"].item(), rel=1e-7)
    assert_gradients(model, golden, rtol=1e-6)
    state = model.state_dict()
    sums = renamed(golden["bn_names"], golden["bn_sums"])
    assert len(sums) == {"mask2former": 20, "upernet": 46}[head]
    for name, value in sums.items():
        assert state[name].sum().item() == pytest.approx(value, rel=1e-7), name


@pytest.mark.parametrize(("head", "size", "parameters"), [
    ("mask2former", "base", 120_150_684), ("upernet", "large", 450_743_350), ("mask2former", "large", 567_051_772)])
def test_released_models_have_the_official_tensors(head, size, parameters):
    with torch.device("meta"):
        model = build_model(head, size)
    assert sum(p.numel() for p in model.parameters()) == parameters
    shapes = json.loads((GOLDEN / "official_state_dicts.json").read_text())[f"{head}_{size}"]
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == rename_official(shapes)


def test_blocks_agree_with_timm():
    """The same random weights in four blocks of timm's BEiT-B, at its own window of 224, give the same tokens."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("beit_base_patch16_224", pretrained=False, depth=4).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ours = build_model("upernet", "base", window=224, depth=4, head_channels=32).backbone.eval()
    names = {name.replace("patch_embed.proj", "patch_embed"): value for name, value in theirs.state_dict().items()}
    ours.load_state_dict({name: names[name] for name in ours.state_dict()})
    images = torch.randn(1, 3, 224, 224)
    captured = []
    for block in theirs.blocks:
        block.register_forward_hook(lambda module, inputs, output: captured.append(output))
    with torch.no_grad():
        theirs.forward_features(images)
        x = torch.cat(ours.embed(images), dim=1)
        for block, expected in zip(ours.blocks, captured, strict=True):
            x = block(x, ours.position_index)
            torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_relative_position_index():
    """One row for each displacement of two patches, three for the class token."""
    index = relative_position_index(2, 3)
    assert index.shape == (7, 7)
    assert index[0, 0] == 17 and (index[0, 1:] == 15).all() and (index[1:, 0] == 16).all()  # 3 * 5 = 15 displacements
    patches = index[1:, 1:].reshape(2, 3, 2, 3)
    for query in np.ndindex(2, 3):
        for key in np.ndindex(2, 3):
            assert patches[*query, *key] == (query[0] - key[0] + 1) * 5 + (query[1] - key[1] + 2)


def test_drop_path_rises_linearly_and_is_full_in_the_extractors():
    model = build_model("upernet", "tiny", 3, drop_path=0.3)
    assert [block.drop_path.p for block in model.backbone.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    extractors = [e for interaction in model.adapter.interactions for e in interaction.extractors]
    assert [e.drop_path.p for e in extractors] == [0.3] * 6  # one each, and two more in the last


def test_starting_values():
    """As released: truncated normal 0.02 in the ViT, layer scale 1e-6, zero position tables, class token 0.02."""
    torch.manual_seed(0)
    model = build_model("mask2former", "tiny", 5)
    block = model.backbone.blocks[0]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (block.gamma_1 == 1e-6).all() and (block.gamma_2 == 1e-6).all()
    assert (block.attn.relative_position_bias_table == 0).all()
    assert model.backbone.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert all((module.bias == 0).all() for module in (block.attn.proj, block.mlp.fc1, block.mlp.fc2))
    assert model.adapter.level_embed.std().item() == pytest.approx(1, rel=0.2)
    assert (model.adapter.interactions[0].injector.gamma == 1e-6).all()


def test_other_image_sizes_are_refused():
    model = build_model("upernet", "tiny", 3, window=64)
    with pytest.raises(ValueError, match="window is 64 x 64: use evaluate.slide"):
        model(torch.zeros(1, 3, 64, 96))


@pytest.mark.parametrize(("arguments", "changes", "message"), [
    (("mask2former", "huge"), {}, "size 'huge' does not exist; choose one of tiny, base, large"),
    (("fcn", "tiny"), {}, "head 'fcn' does not exist; choose mask2former or upernet"),
    (("upernet", "tiny", 0), {}, "num_classes is 0; at least 1 is needed"),
    (("upernet", "tiny"), {"window": 100}, "window 100 is not a multiple of 32"),
    (("upernet", "tiny"), {"window": 0}, "window 0 is not a multiple of 32"),
    (("upernet", "tiny"), {"depth": 6}, "depth 6 is not a multiple of 4"),
    (("upernet", "tiny"), {"num_heads": 3}, "embed_dim 128 is not a multiple of num_heads 3"),
    (("upernet", "tiny"), {"depth": 6, "window": 33}, "window 33 .*; depth 6"),
    (("upernet", "tiny"), {"queries": 3}, "unknown field among queries; ModelConfig has head, num_classes"),
])
def test_values_that_do_not_fit_are_refused(arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(*arguments, **changes)


def test_config_round_trips():
    config = golden_config("mask2former")
    assert ModelConfig(**dataclasses.asdict(config)) == config
    assert all(ModelConfig(**dataclasses.asdict(c)) == c for c in SIZES.values())
