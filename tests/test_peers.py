"""What benchmark.py compares with: the models of transformers, of our sizes and behind our interface."""
import sys

import pytest
import torch
from torch import Tensor, nn

import peers
from heads import IGNORE, resize
from model import SIZES, build_model

HEADS = ("upernet", "mask2former")
CLASSES, WINDOW = 7, 64


@pytest.fixture(scope="module")
def peer():
    """peer(head) -> the peer of size tiny in eval mode, with gradients away."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    built = {head: peers.build_peer(head, "tiny", CLASSES, window=WINDOW, num_points=128) for head in HEADS}

    def get(head: str) -> nn.Module:
        built[head].zero_grad()
        return built[head].eval()

    return get


def batch() -> tuple[Tensor, Tensor]:
    """Two images and their labels; the second shows three classes only, and ignored pixels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, WINDOW, WINDOW, generator=generator)
    labels = torch.randint(CLASSES, (2, WINDOW, WINDOW), generator=generator)
    labels[1].clamp_(max=2)[:10] = IGNORE
    return images, labels


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("head", HEADS)
def test_block_and_head_have_our_number_of_parameters(head, size):
    pytest.importorskip("transformers")

    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    with torch.device("meta"):
        ours, theirs = build_model(head, size), peers.build_peer(head, size).model
    if head == "upernet":
        backbone, heads = theirs.backbone, (theirs.decode_head, theirs.auxiliary_head)
        assert count(*heads) == count(ours.head, ours.auxiliary_head)
    else:
        module = theirs.model
        backbone, heads = module.pixel_level_module.encoder, (module.pixel_level_module.decoder,
                                                              module.transformer_module, theirs.class_predictor)
        assert count(*heads) == count(ours.head)
    assert count(backbone.beit) == count(ours.backbone)
    assert count(theirs) == count(backbone, *heads)  # and nothing but the pyramid in place of the adapter
    assert count(backbone.fpn) < count(ours.adapter)


@pytest.mark.parametrize("head", HEADS)
def test_attention_of_the_backbone_is_fused(peer, head):
    backbone = next(m for m in peer(head).modules() if type(m).__name__ == "BeitBackbone")
    assert {layer.attention.config._attn_implementation for layer in backbone.beit.layers} == {"sdpa"}


@pytest.mark.parametrize("head", HEADS)
def test_pyramid_has_strides_4_to_32(peer, head):
    backbone = next(m for m in peer(head).modules() if type(m).__name__ == "BeitBackbone")
    with torch.no_grad():
        maps = backbone(batch()[0]).feature_maps
    width = SIZES["tiny"].embed_dim
    assert [tuple(m.shape) for m in maps] == [(2, width, WINDOW // s, WINDOW // s) for s in (4, 8, 16, 32)]


@pytest.mark.parametrize("head", HEADS)
def test_loss_reaches_every_parameter(peer, head):
    model = peer(head).train()
    losses = model(*batch())
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    gradients = {name: p.grad.abs().max() for name, p in model.named_parameters()}
    ends = ("patch_embeddings.projection.weight", "decode_head.classifier.weight", "class_predictor.weight")
    assert [gradients[name] > 0 for name in gradients if name.endswith(ends)] == [True, True]


def test_mask2former_scores_are_class_weighted_mask_probabilities(peer):
    model, images = peer("mask2former"), batch()[0]
    with torch.no_grad():
        raw, scores = model.model(images), model(images)
    classes = raw.class_queries_logits.softmax(2)[:, :, :CLASSES]
    masks = raw.masks_queries_logits.sigmoid()
    expected = (classes[:, :, :, None, None] * masks[:, :, None]).sum(dim=1)
    torch.testing.assert_close(scores, resize(expected, (WINDOW, WINDOW)))


def test_upernet_scores_are_logits_at_the_size_of_the_images(peer):
    model, images = peer("upernet"), batch()[0]
    with torch.no_grad():
        torch.testing.assert_close(model(images), model.model(images).logits, rtol=0, atol=0)
        assert model(images).shape == (2, CLASSES, WINDOW, WINDOW)


def test_mask2former_supervises_every_layer(peer):
    """Class, mask and dice losses before the first layer and after each, as many as ours."""
    model = peer("mask2former")
    masks, classes = peers.binary_masks(batch()[1])
    with torch.no_grad():
        raw = model.model(batch()[0], output_auxiliary_logits=True)
        named = model.model.get_loss_dict(raw.masks_queries_logits, raw.class_queries_logits, masks, classes,
                                          raw.auxiliary_logits)
    assert len(named) == 3 * (SIZES["tiny"].decoder_layers + 1)


def test_binary_masks_are_those_of_the_image_processor():
    library = pytest.importorskip("transformers.models.mask2former.image_processing_mask2former")
    labels = batch()[1]
    masks, classes = peers.binary_masks(labels)
    assert [each.tolist() for each in classes] == [list(range(CLASSES)), [0, 1, 2]]
    for image, mask, present in zip(labels, masks, classes, strict=True):
        expected, categories = library.convert_segmentation_map_to_binary_masks_fast(image, ignore_index=IGNORE)
        torch.testing.assert_close(mask, expected, rtol=0, atol=0)
        assert present.tolist() == categories.tolist()


def test_an_image_without_a_single_class_trains(peer):
    images, labels = batch()
    labels[1] = IGNORE
    assert peer("mask2former")(images, labels)["loss"].isfinite()


def test_absent_library_is_named_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="^[^\n]*transformers is missing: pip install -r requirements-dev.txt$"):
        peers.build_peer("upernet", "tiny")
