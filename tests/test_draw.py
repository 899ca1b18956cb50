"""draw.py: the colour of every pixel where it can be said in advance, sizes and layout elsewhere."""

import numpy as np
import pytest
from PIL import ImageFont

from tools import draw

PALETTE = np.uint8([[200, 0, 0], [0, 200, 0], [0, 0, 200]])
HATCHED = {draw.HATCH_LIGHT, draw.HATCH_DARK}
CLASSES = ["sky", "road", "a class with a very long name"]


@pytest.fixture
def labels():
    """Three upright bands: class 0, class 2, ignored."""
    labels = np.zeros((30, 60), np.uint8)
    labels[:, 20:40], labels[:, 40:] = 2, 255
    return labels


def colors_in(picture):
    """The colours of a picture's pixels."""
    return {tuple(map(int, color)) for color in np.unique(np.asarray(picture).reshape(-1, 3), axis=0)}


def test_colorize_gives_each_class_its_colour_and_hatches_the_ignored(labels):
    picture = draw.colorize(labels, PALETTE)
    assert picture.dtype == np.uint8 and picture.shape == (30, 60, 3)
    assert (picture[:, :20] == PALETTE[0]).all() and (picture[:, 20:40] == PALETTE[2]).all()
    assert colors_in(picture[:, 40:]) == HATCHED
    picture = draw.colorize(np.uint8([[0, 1]]), PALETTE, ignore_index=0)
    assert tuple(picture[0, 0]) in HATCHED and tuple(picture[0, 1]) == (0, 200, 0)
    with pytest.raises(IndexError):
        draw.colorize(np.uint8([[0, 3]]), PALETTE)


@pytest.mark.parametrize(("opacity", "tolerance"), [(0, 0), (0.6, 1), (1, 0)])
def test_overlay_blends_the_image_with_the_colours_and_draws_borders(labels, opacity, tolerance):
    image = np.random.default_rng(0).integers(0, 255, (30, 60, 3), dtype=np.uint8)
    before, inside = image.copy(), ~draw.boundaries(labels)
    picture = draw.overlay(image, labels, PALETTE, opacity)
    expected = (1 - opacity) * image + opacity * draw.colorize(labels, PALETTE)
    np.testing.assert_allclose(picture[inside], expected[inside], atol=tolerance)
    assert (picture[:, [19, 39]] == 255).all()  # a border lies on the last pixel before the change
    assert (image == before).all()


def test_boundaries_mark_changes_to_the_right_and_below_and_widen():
    labels = np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    assert draw.boundaries(labels).astype(int).tolist() == [[0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert draw.boundaries(labels, thickness=2).astype(int).tolist() == [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert not draw.boundaries(np.zeros((3, 3))).any()


def test_error_map_shows_right_wrong_and_not_judged(labels):
    prediction = np.zeros_like(labels)
    picture = draw.error_map(labels, prediction)
    assert (picture[:, :19] == draw.RIGHT).all() and (picture[:, 20:39] == draw.WRONG).all()
    assert colors_in(picture[:, 40:]) == HATCHED


def test_legend_shows_the_present_classes_at_the_asked_width():
    whole, part = draw.legend(CLASSES, PALETTE, 400), draw.legend(CLASSES, PALETTE, 400, present=[1])
    assert whole.width == part.width == 400
    assert colors_in([PALETTE]) <= colors_in(whole)
    assert colors_in([PALETTE]) & colors_in(part) == {(0, 200, 0)}


def test_a_narrow_legend_has_one_column_and_cuts_long_names():
    for width, columns in [(120, 1), (800, 2)]:
        picture = np.asarray(draw.legend(CLASSES, PALETTE, width))
        lefts = [np.nonzero((picture == c).all(-1))[1].min() for c in PALETTE]
        assert picture.shape[1] == width and len(set(lefts)) == columns
    font = ImageFont.load_default(12)
    short = draw.shorten(CLASSES[2], font, 60)
    assert short.endswith("...") and font.getlength(short) <= 60 and draw.shorten("sky", font, 60) == "sky"


def test_with_legend_lists_what_is_in_the_labels_below_the_picture(labels):
    image = np.full((30, 260, 3), 7, np.uint8)
    wide = np.repeat(labels, 5, axis=1)[:, :260]
    result = np.asarray(draw.with_legend(image, wide, CLASSES, PALETTE))
    assert result.shape[1] == 260 and (result[:30] == 7).all()
    assert colors_in(result[30:]) & (colors_in([PALETTE]) | HATCHED) == {(200, 0, 0), (0, 0, 200), *HATCHED}


@pytest.mark.parametrize(("share", "text"), [(0.345, "34 %"), (1, "100 %"), (0.0042, "0.4 %"), (1e-5, "< 0.1 %")])
def test_shares_are_short(share, text):
    assert draw.percent(share) == text


def test_contact_sheet_scales_pictures_into_cells_of_one_height():
    red, blue = np.full((40, 60, 3), (255, 0, 0), np.uint8), np.full((20, 30, 3), (0, 0, 255), np.uint8)
    pixels = np.asarray(draw.contact_sheet([[red, blue], [blue, red]], gap=6))
    assert pixels.shape == (2 * 46 + 6, 60 + 60 + 3 * 6, 3)
    assert (pixels[6:46, 6:66] == (255, 0, 0)).all() and (pixels[6:46, 72:132] == (0, 0, 255)).all()
    assert (pixels[52:92, 6:66] == (0, 0, 255)).all() and (pixels[:6] == 255).all()


def test_captions_stand_above_their_pictures():
    black = np.zeros((40, 60, 3), np.uint8)
    sheet, plain = (np.asarray(draw.contact_sheet([[black, black]], texts)) for texts in (["image", "label"], ()))
    head = len(sheet) - len(plain)
    assert head > 12 and (sheet[: head + 6] < 128).any() and (sheet[head + 6 :] == plain[6:]).all()
    one = np.asarray(draw.with_caption(black, "road 0.93"))
    assert one.shape[1] == 60 and len(one) > 52 and (one[-40:] == 0).all()
