"""draw.py: the colour of every pixel where it can be said in advance, sizes and layout elsewhere."""

import numpy as np
import pytest
from PIL import ImageFont

from tools import draw

PALETTE = np.uint8([[200, 0, 0], [0, 200, 0], [0, 0, 200]])
CLASSES = ["sky", "road", "a class with a very long name"]


@pytest.fixture
def labels():
    """Three upright bands: class 0, class 2, ignored."""
    labels = np.zeros((30, 60), np.uint8)
    labels[:, 20:40], labels[:, 40:] = 2, 255
    return labels


def test_colorize_gives_each_class_its_colour_and_hatches_the_ignored(labels):
    picture = draw.colorize(labels, PALETTE)
    assert picture.dtype == np.uint8 and picture.shape == (30, 60, 3)
    assert (picture[:, :20] == PALETTE[0]).all() and (picture[:, 20:40] == PALETTE[2]).all()
    assert {tuple(p) for p in picture[:, 40:].reshape(-1, 3)} == {draw.HATCH_LIGHT, draw.HATCH_DARK}


def test_colorize_refuses_a_label_without_a_colour():
    with pytest.raises(IndexError):
        draw.colorize(np.uint8([[0, 3]]), PALETTE)


def test_any_value_can_be_the_ignored_one():
    picture = draw.colorize(np.uint8([[0, 1]]), PALETTE, ignore_index=0)
    assert tuple(picture[0, 0]) in (draw.HATCH_LIGHT, draw.HATCH_DARK) and tuple(picture[0, 1]) == (0, 200, 0)


def test_overlay_blends_the_image_with_the_colours_and_draws_borders(labels):
    image = np.full((30, 60, 3), 100, np.uint8)
    picture = draw.overlay(image, labels, PALETTE, opacity=0.6)
    np.testing.assert_allclose(picture[:, :19], np.broadcast_to([160, 40, 40], (30, 19, 3)), atol=1)
    np.testing.assert_allclose(picture[:, 20:39], np.broadcast_to([40, 40, 160], (30, 19, 3)), atol=1)
    assert (picture[:, [19, 39]] == 255).all()  # a border lies on the last pixel before the change
    assert (image == 100).all()


@pytest.mark.parametrize("opacity", [0, 1])
def test_overlay_of_opacity_0_and_1(labels, opacity):
    image = np.random.default_rng(0).integers(0, 255, (30, 60, 3), dtype=np.uint8)
    inside = ~draw.boundaries(labels)
    expected = draw.colorize(labels, PALETTE) if opacity else image
    assert (draw.overlay(image, labels, PALETTE, opacity)[inside] == expected[inside]).all()


def test_boundaries_mark_changes_to_the_right_and_below_and_widen():
    labels = np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    assert draw.boundaries(labels).astype(int).tolist() == [[0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert draw.boundaries(labels, thickness=2).astype(int).tolist() == [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert not draw.boundaries(np.zeros((3, 3))).any()


def test_error_map_shows_right_wrong_and_not_judged(labels):
    prediction = np.zeros_like(labels)
    picture = draw.error_map(labels, prediction)
    assert (picture[:, :19] == draw.RIGHT).all() and (picture[:, 20:39] == draw.WRONG).all()
    assert {tuple(p) for p in picture[:, 40:].reshape(-1, 3)} == {draw.HATCH_LIGHT, draw.HATCH_DARK}


def colors_in(picture):
    return {color for _, color in picture.getcolors(1 << 20)}


def test_legend_shows_the_present_classes_at_the_asked_width():
    whole, part = draw.legend(CLASSES, PALETTE, 400), draw.legend(CLASSES, PALETTE, 400, present=[1])
    assert whole.width == part.width == 400
    assert {tuple(map(int, c)) for c in PALETTE} <= colors_in(whole)
    assert (0, 200, 0) in colors_in(part) and not {(200, 0, 0), (0, 0, 200)} & colors_in(part)


def test_a_narrow_legend_has_one_column_and_cuts_long_names():
    narrow, wide = (np.asarray(draw.legend(CLASSES, PALETTE, width)) for width in (120, 800))
    lefts = [[np.nonzero((picture == c).all(-1))[1].min() for c in PALETTE] for picture in (narrow, wide)]
    assert narrow.shape[1] == 120 and len(set(lefts[0])) == 1 and len(set(lefts[1])) == 2
    font = ImageFont.load_default(12)
    short = draw.shorten(CLASSES[2], font, 60)
    assert short.endswith("...") and font.getlength(short) <= 60 and draw.shorten("sky", font, 60) == "sky"


def test_with_legend_lists_what_is_in_the_labels_below_the_picture(labels):
    image = np.full((30, 260, 3), 7, np.uint8)
    wide = np.repeat(labels, 5, axis=1)[:, :260]
    result = draw.with_legend(image, wide, CLASSES, PALETTE)
    assert result.width == 260 and result.height > 30
    assert (np.asarray(result)[:30] == 7).all()
    below = colors_in(result.crop((0, 30, 260, result.height)))
    assert {(200, 0, 0), (0, 0, 200), draw.HATCH_LIGHT} <= below and (0, 200, 0) not in below


@pytest.mark.parametrize(("share", "text"), [(0.345, "34 %"), (1, "100 %"), (0.0042, "0.4 %"), (1e-5, "< 0.1 %")])
def test_shares_are_short(share, text):
    assert draw.percent(share) == text


def test_contact_sheet_scales_pictures_into_cells_of_one_height():
    red, blue = np.full((40, 60, 3), (255, 0, 0), np.uint8), np.full((20, 30, 3), (0, 0, 255), np.uint8)
    sheet = draw.contact_sheet([[red, blue], [blue, red]], gap=6)
    assert sheet.size == (60 + 60 + 3 * 6, 2 * 46 + 6)
    pixels = np.asarray(sheet)
    assert (pixels[6:46, 6:66] == (255, 0, 0)).all() and (pixels[6:46, 72:132] == (0, 0, 255)).all()
    assert (pixels[52:92, 6:66] == (0, 0, 255)).all() and (pixels[:6] == 255).all()


def test_captions_stand_above_their_pictures():
    black = np.zeros((40, 60, 3), np.uint8)
    sheet, plain = (draw.contact_sheet([[black, black]], captions) for captions in (["image", "label"], ()))
    head = sheet.height - plain.height
    below = np.asarray(sheet)[head + 6 :]
    assert head > 12 and (np.asarray(sheet)[: head + 6] < 128).any() and (below == np.asarray(plain)[6:]).all()
    one = draw.with_caption(black, "road 0.93")
    assert one.width == 60 and (np.asarray(one)[-40:] == 0).all() and one.height > 52
