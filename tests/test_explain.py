"""predict.py --explain: the queries with the highest scores, and where one attention looks."""

import numpy as np
import pytest
import torch
from conftest import mask_logits
from PIL import Image
from test_predict import CLASSES, SMALL, photograph

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
    explain.explain(model, photograph(64, 64), CLASSES, number=4)
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
    monkeypatch.setattr(explain, "sampling_picture", lambda image, places, points, weights: shown.update(
        points=points, weights=weights) or Image.fromarray(image))
    attention = model.adapter.interactions[-1].injector.attn
    outputs = record_outputs(attention.sampling_offsets, attention.attention_weights)
    explain.explain(model, photograph(), CLASSES)
    offsets = outputs[attention.sampling_offsets].double().view(16, 4, 3, 4, 2)  # patches, heads, levels, points
    centres = torch.tensor([[(x + 0.5) / 4, (y + 0.5) / 4] for y in range(4) for x in range(4)], dtype=torch.float64)
    sides = torch.tensor([8.0, 4, 2]).double()[:, None, None]  # of a window of 64 pixels at strides 8, 16, 32
    np.testing.assert_allclose(shown["points"], centres[:, None, None, None] + offsets / sides, atol=1e-6)
    shares = outputs[attention.attention_weights].double().view(16, 4, 12).softmax(-1)
    np.testing.assert_allclose(shown["weights"], shares.view(16, 4, 3, 4), atol=1e-6)


def test_the_central_window_is_the_middle_of_the_picture():
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 50:] = 200
    window = explain.central_window(image, 80)
    assert window.shape == (80, 80, 3)
    assert (window[:, :38] == 0).all() and (window[:, 42:] == 200).all()
