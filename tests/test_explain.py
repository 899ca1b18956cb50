"""predict.py --explain: the queries with the highest scores, their sum, and where one attention looks."""

import numpy as np
import pytest
import torch
from conftest import mask_logits
from PIL import Image, ImageDraw
from test_predict import CLASSES, PALETTE, SMALL, photograph

import data
from model import build_model
from tools import explain


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return build_model("mask2former", "tiny", len(CLASSES), **SMALL).eval()


def record_outputs(*layers):
    """A dict that the layers fill with their outputs when they run."""
    outputs = {}
    for layer in layers:
        layer.register_forward_hook(lambda layer, _, output: outputs.update({layer: output}))
    return outputs


def test_explain_shows_the_queries_with_the_highest_score(model, monkeypatch):
    """Class, score and mask of each are worked out a second time, pixel by pixel at the masks' own size."""
    monkeypatch.setattr(explain, "CELL", 16)  # that size: a window of 64 at stride 4
    shown = {}
    monkeypatch.setattr(explain, "query_sheet", lambda picture, masks, captions: shown.update(
        masks=masks, captions=captions) or Image.fromarray(picture).resize((64, 64)))
    outputs = record_outputs(model.head)
    explain.explain(model, photograph(64, 64), CLASSES, np.uint8(PALETTE), number=4)
    prediction = outputs[model.head]
    chances, found = prediction.class_logits[-1, 0].double().softmax(1), []
    masks = mask_logits(prediction)[-1, 0].double().sigmoid()
    for q in range(6):
        inside = masks[q][masks[q] > 0.5]
        certainty = inside.mean().item() if len(inside) else 0.0
        best = max(range(5), key=lambda k: chances[q, k])
        found.append((chances[q, best].item() * certainty, f"{CLASSES[best]} {{:.2f}} (query {q})", masks[q].numpy()))
    found.sort(key=lambda entry: -entry[0])
    assert shown["captions"] == [text.format(score) for score, text, _ in found[:4]]
    np.testing.assert_allclose(shown["masks"], [mask for *_, mask in found[:4]], atol=1e-5)


def test_explain_shows_where_the_last_injector_samples(model, monkeypatch):
    """Its patches' centres and the outputs of its two linear layers give the same places and weights."""
    shown = {}
    monkeypatch.setattr(explain, "sampling_picture", lambda image, places, numbers, points, weights: shown.update(
        numbers=numbers, points=points, weights=weights) or Image.fromarray(image))
    query_sheet = explain.query_sheet
    monkeypatch.setattr(explain, "query_sheet", lambda picture, masks, captions: shown.update(
        captions=captions) or query_sheet(picture, masks, captions))
    attention = model.adapter.interactions[-1].injector.attn
    outputs = record_outputs(attention.sampling_offsets, attention.attention_weights)
    explain.explain(model, photograph(), CLASSES, np.uint8(PALETTE))
    offsets = outputs[attention.sampling_offsets].double().view(16, 4, 3, 4, 2)  # patches, heads, levels, points
    centres = torch.tensor([[(x + 0.5) / 4, (y + 0.5) / 4] for y in range(4) for x in range(4)], dtype=torch.float64)
    sides = torch.tensor([8.0, 4, 2]).double()[:, None, None]  # of a window of 64 pixels at strides 8, 16, 32
    np.testing.assert_allclose(shown["points"], centres[:, None, None, None] + offsets / sides, atol=1e-6)
    shares = outputs[attention.attention_weights].double().view(16, 4, 12).softmax(-1)
    np.testing.assert_allclose(shown["weights"], shares.view(16, 4, 3, 4), atol=1e-6)
    for number, caption in zip(shown["numbers"], shown["captions"][:4], strict=True):
        assert caption.endswith(f"(query {number})")


def test_explain_shows_the_answer_of_the_model(model, monkeypatch):
    monkeypatch.setattr(explain, "ANSWER", 64)  # the window: no number is interpolated twice
    shown = {}
    monkeypatch.setattr(explain.draw, "overlay", lambda image, labels, palette, **_: shown.update(
        labels=labels) or palette[labels])
    image = photograph(64, 64)
    sheet = explain.explain(model, image, CLASSES, np.uint8(PALETTE))
    with torch.no_grad():
        scores = model(data.normalize(torch.from_numpy(image).permute(2, 0, 1)[None]))
    np.testing.assert_array_equal(shown["labels"], scores[0].argmax(0))
    colors = {tuple(PALETTE[k]) for k in np.unique(shown["labels"])}
    assert colors <= {color for _, color in sheet.getcolors(sheet.width * sheet.height)}


def test_each_cross_has_the_numbers_of_its_queries(monkeypatch):
    texts = {}
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda _, place, text, *rest, **options:
                        texts.update({text: place}))
    points, weights = np.full((16, 1, 3, 1, 2), 0.5), np.full((16, 1, 3, 1), 1 / 3)
    places = np.array([[0.1, 0.1], [0.9, 0.6], [0.2, 0.2]])  # the first and the last are in one patch of a side of 1/4
    explain.sampling_picture(np.zeros((400, 400, 3), np.uint8), places, [7, 12, 3], points, weights)
    assert texts["7, 3"] == (50 + 18, 50) and texts["12"] == (350 - 18, 250)


def test_the_central_window_is_the_middle_of_the_picture():
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 50:] = 200
    window = explain.central_window(image, 80)
    assert window.shape == (80, 80, 3)
    assert (window[:, :38] == 0).all() and (window[:, 42:] == 200).all()
