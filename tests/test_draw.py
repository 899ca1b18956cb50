"""draw.py: the colour of every pixel where it can be said in advance, sizes and layout elsewhere; default colours."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFont

from pictures import default_palette
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
    font = draw.font_with(CLASSES[2], 12)
    short = draw.shorten(CLASSES[2], font, 60)
    assert short.endswith("...") and font.getlength(short) <= 60 and draw.shorten("sky", font, 60) == "sky"


def test_with_legend_lists_what_is_in_the_labels_below_the_picture(labels):
    image = np.full((30, 260, 3), 7, np.uint8)
    wide = np.repeat(labels, 5, axis=1)[:, :260]
    result = np.asarray(draw.with_legend(image, wide, CLASSES, PALETTE))
    assert result.shape[1] == 260 and (result[:30] == 7).all()
    assert colors_in(result[30:]) & (colors_in([PALETTE]) | HATCHED) == {(200, 0, 0), (0, 0, 200), *HATCHED}


def test_long_pictures_take_little_memory_and_have_thin_lines():
    """Few bytes a pixel, of which 3 are the result, though most of these pixels are ignored."""
    labels, image = np.full((100, 20_000), 255, np.uint8), np.full((100, 20_000, 3), 90, np.uint8)
    labels[:, ::1000] = 0
    for work, limit in [(lambda: draw.colorize(labels, PALETTE), 5), (lambda: draw.overlay(image, labels, PALETTE), 7),
                        (lambda: draw.error_map(labels, labels), 7)]:
        tracemalloc.start()
        picture = work()
        assert tracemalloc.get_traced_memory()[1] < limit * labels.size
        tracemalloc.stop()
    assert colors_in(picture[:, 1:990]) == HATCHED and draw.legend(CLASSES, PALETTE, 20_000).height < 400
    assert draw.line_width((100, 100_000)) == 1 and draw.line_width((6000, 8000)) == 11
    assert draw.text_size(640) == 17 and draw.text_size(8000) == 89 and draw.text_size(66_000) == 96


@pytest.fixture
def fonts(monkeypatch):
    """fonts(file) -> the machine has that font and Pillow's own only, as fontconfig says; None: no fontconfig."""
    original = ImageFont.truetype

    def install(file):
        def truetype(name, *arguments, **options):
            if not isinstance(name, str) or name == file:  # Pillow opens its own by this function too
                return original(name, *arguments, **options)
            raise OSError
        monkeypatch.setattr(ImageFont, "truetype", truetype)
        monkeypatch.setattr(draw.shutil, "which", lambda _: file)
        monkeypatch.setattr(draw.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=file))
        draw.font_with.cache_clear()
        draw.boxes.clear()

    yield install
    draw.font_with.cache_clear()


def test_the_font_has_the_letters_of_the_names(fonts, capsys):
    """Pillow's own for ASCII; else the machine's, for names and widths alike; one warning names what none has."""
    try:
        file = ImageFont.truetype("DejaVuSans.ttf").path
    except OSError:
        pytest.skip("no DejaVu font here")
    fonts(file)
    assert draw.font_with("road", 20).getname()[0] != "DejaVu Sans"
    assert draw.font_with("Straße дорога", 20).getname()[0] == "DejaVu Sans" and not capsys.readouterr().err
    pictures = [np.asarray(draw.legend([name], PALETTE, 300)) for name in ("дорога", "дерево")]
    assert (pictures[0] != pictures[1]).any()  # letters, not six boxes each
    for name in ("дорога 道", "道"):
        draw.legend([name], PALETTE, 300)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no font here has 道, drawn as boxes" in error and "fonts-noto-cjk" in error


def test_without_any_font_the_letters_are_boxes_and_a_warning_says_so(fonts, capsys):
    fonts(None)
    draw.with_caption(np.zeros((9, 90, 3), np.uint8), "道路")
    assert capsys.readouterr().err.startswith("warning: no font here has 路道, drawn as boxes; install one")


@pytest.mark.parametrize(("share", "text"), [(0.345, "34.5 %"), (1, "100.0 %"), (0.0042, "0.4 %"), (1e-5, "< 0.1 %")])
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


def ciede2000(lab: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The colour difference of ISO/CIE 11664-6 between CIELAB colours (..., 3)."""
    (l1, a1, b1), (l2, a2, b2) = np.moveaxis(np.float64(lab), -1, 0), np.moveaxis(np.float64(other), -1, 0)
    chroma = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7))
    c1, c2 = np.hypot(a1 * stretch, b1), np.hypot(a2 * stretch, b2)
    h1, h2 = np.arctan2(b1, a1 * stretch), np.arctan2(b2, a2 * stretch)
    turn = (h2 - h1 + np.pi) % (2 * np.pi) - np.pi
    light, chroma, hue = (l1 + l2) / 2, (c1 + c2) / 2, h1 + turn / 2
    t = (1 - 0.17 * np.cos(hue - np.pi / 6) + 0.24 * np.cos(2 * hue) + 0.32 * np.cos(3 * hue + np.radians(6))
         - 0.2 * np.cos(4 * hue - np.radians(63)))
    dl = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2))
    dc = (c2 - c1) / (1 + 0.045 * chroma)
    dh = 2 * np.sqrt(c1 * c2) * np.sin(turn / 2) / (1 + 0.015 * chroma * t)
    blue = np.exp(-(((np.degrees(hue) % 360 - 275) / 25) ** 2))
    rotation = -2 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7)) * np.sin(np.radians(60) * blue)
    return np.sqrt(dl**2 + dc**2 + dh**2 + rotation * dc * dh)


def to_lab(colours: np.ndarray) -> np.ndarray:
    """CIELAB of sRGB colours, float (K, 3), by LittleCMS: independent of ours, and rounded to whole steps."""
    convert = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = np.asarray(ImageCms.applyTransform(Image.fromarray(np.uint8(colours)[None]), convert))[0]
    return np.stack([lab[:, 0] / 2.55, *lab[:, 1:].view(np.int8).T], -1)


def test_ciede2000_is_that_of_the_published_pairs() -> None:
    for first, second, expected in [((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
                                    ((50, 2.5, 0), (73, 25, -18), 27.1492),
                                    ((22.7233, 20.0904, -46.694), (23.0331, 14.973, -42.5619), 2.0373)]:
        assert ciede2000(np.array(first), np.array(second)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("classes", "apart", "apart_76"), [
    (2, 53, 113), (8, 21, 26), (20, 18, 26), (59, 12, 16), (150, 5.5, 12), (255, 5.5, 9),
])
def test_default_colours_can_be_told_apart(classes: int, apart: float, apart_76: float) -> None:
    """The docstring's distances, to the rounding of `to_lab`; also from white, black and the hatches' grays."""
    palette = default_palette(classes)
    assert palette.dtype == np.uint8 and palette.shape == (classes, 3) and len(np.unique(palette, axis=0)) == classes
    np.testing.assert_array_equal(palette, default_palette(300)[:classes])  # whatever the number of classes
    lab, taken = to_lab(palette), to_lab(np.array([(255, 255, 255), (0, 0, 0), draw.HATCH_LIGHT, draw.HATCH_DARK]))
    first, second = (lab[index] for index in np.triu_indices(classes, 1))
    assert ciede2000(first, second).min() > apart - 0.6
    assert np.linalg.norm(first - second, axis=-1).min() > apart_76 - 1.5
    assert ciede2000(lab[:, None], taken).min() > (13 if classes < 60 else 9) - 0.6
