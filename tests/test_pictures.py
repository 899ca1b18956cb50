"""pictures.py: any picture in any form gives one RGB; label files give their values or are refused; colours."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pictures
from common import UserError

GRAY = np.linspace(0, 255, 200).astype(np.uint8).reshape(10, 20)
RGB = np.dstack([GRAY, GRAY[::-1], GRAY[:, ::-1]])
LABELS = np.random.default_rng(0).integers(0, 4, (12, 16)).astype(np.uint8)


def png(rows: np.ndarray, shape: tuple[int, int], bits: int, colour_type: int) -> bytes:
    """A PNG file of rows of bytes, uint8 (H, N), for kinds that Pillow reads but does not write."""
    header = struct.pack(">IIBBBBB", shape[1], shape[0], bits, colour_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
                       (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return content


def tiff(samples: np.ndarray, tags: dict[int, int], order: str = "<", deflate: bool = False) -> bytes:
    """A TIFF file of 16-bit samples (H, W, C) with tags of its own, for kinds that Pillow reads but does not write."""
    height, width, channels = samples.shape
    body = samples.astype(f"{order}u2").tobytes()
    body = zlib.compress(body) if deflate else body
    tags = {256: width, 257: height, 258: 16, 259: 8 if deflate else 1, 262: 2 if channels == 3 else 1, 277: channels,
            278: height, 279: len(body)} | tags
    tags[273] = 8 + 2 + 12 * (len(tags) + 1) + 4 + 2 * channels  # where the samples begin
    bits = tags[273] - 2 * channels
    content = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    for tag, value in sorted(tags.items()):
        entry = (tag, 3, channels, bits) if tag == 258 and channels > 1 else (tag, 4, 1, value)
        content += struct.pack(f"{order}HHII", *entry)
    return content + bytes(4) + struct.pack(f"{order}{channels}H", *[16] * channels) + body


def exif(orientation: object) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize(("name", "picture"), [
    ("gray.png", Image.fromarray(GRAY)),
    ("alpha.png", Image.fromarray(np.dstack([GRAY] * 3 + [GRAY * 0]))),
    ("gray_alpha.png", Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(GRAY // 2)])),
    ("palette.png", Image.fromarray(GRAY).convert("P")),
    ("deep.png", Image.fromarray(GRAY.astype(np.uint16) * 257)),
    ("deep.tif", Image.fromarray(GRAY.astype(np.uint16) * 256 + 7)),
    ("twelve_bits.png", Image.fromarray(GRAY.astype(np.uint16) * 16 + 3)),
    ("ten_bits.tif", Image.fromarray(GRAY.astype(np.uint16) * 4)),
    ("eight_of_sixteen.png", Image.fromarray(GRAY.astype(np.uint16))),
    ("int32.tif", Image.fromarray(GRAY.astype(np.int32))),
    ("int32_deep.tif", Image.fromarray(GRAY.astype(np.int32) * 257)),
    ("float_share.tif", Image.fromarray((GRAY / 255).astype(np.float32))),
    ("float_levels.tif", Image.fromarray(GRAY.astype(np.float32))),
    ("float_deep.tif", Image.fromarray(GRAY.astype(np.float32) * 257)),
    ("lzw.tif", Image.fromarray(GRAY)),
])
def test_every_depth_and_mode_of_a_gray_file_gives_the_8_bit_picture(tmp_path: Path, name: str, picture) -> None:
    picture.save(tmp_path / name, **({"compression": "tiff_lzw"} if name == "lzw.tif" else {}))
    np.testing.assert_array_equal(pictures.read_image(tmp_path / name), np.dstack([GRAY] * 3))


def test_a_tiff_that_says_its_bits_is_scaled_by_them(tmp_path: Path) -> None:
    Image.fromarray(GRAY.astype(np.uint16)).save(tmp_path / "dark.tif", tiffinfo={281: 4095})  # MaxSampleValue
    np.testing.assert_array_equal(pictures.read_image(tmp_path / "dark.tif"), np.dstack([GRAY >> 4] * 3))


def test_a_guess_of_the_depth_is_said_once(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_said", set())
    for _ in range(2):
        pictures.as_rgb(GRAY.astype(np.uint16) * 16)
    said = ("the array: the largest sample is 4080: read as 12 bits, and others like it by their own largest sample\n")
    assert capsys.readouterr().err == said
    assert not pictures.as_rgb(np.zeros((4, 4), np.uint16)).any()  # black stays black


@pytest.mark.parametrize("form", [
    RGB, RGB.astype(np.int64), RGB.astype(np.float64), (RGB / 255).astype(np.float32), RGB.astype(np.uint16) * 257,
    np.dstack([RGB, GRAY]), RGB.transpose(2, 0, 1), np.broadcast_to(RGB, RGB.shape), torch.from_numpy(RGB.copy()),
    Image.fromarray(RGB),
    torch.from_numpy(RGB.transpose(2, 0, 1) / 255), torch.from_numpy(RGB.transpose(2, 0, 1).copy()),
    Image.fromarray(np.dstack([RGB, GRAY])),
], ids=lambda form: f"{type(form).__name__} {getattr(form, 'dtype', '')} {getattr(form, 'shape', '')}")
def test_every_form_of_a_picture_gives_one_result(form: pictures.Picture) -> None:
    result = pictures.as_rgb(form)
    np.testing.assert_array_equal(result, RGB)
    assert result.dtype == np.uint8 and result.flags.c_contiguous and result.flags.writeable


def test_gray_arrays_bytes_and_masks() -> None:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "PNG", exif=exif(3))
    np.testing.assert_array_equal(pictures.as_rgb(file.getvalue()), RGB[::-1, ::-1])
    for form in (GRAY, GRAY[..., None], GRAY[None], np.dstack([GRAY, GRAY])):
        np.testing.assert_array_equal(pictures.as_rgb(form), np.dstack([GRAY] * 3))
    np.testing.assert_array_equal(pictures.as_rgb(GRAY > 100)[..., 0], np.where(GRAY > 100, 255, 0))


@pytest.mark.parametrize("form", [
    None, 3, np.zeros((2, 3, 8, 8)), np.zeros((8, 8, 5)), np.zeros(8), np.zeros((0, 8, 3)), np.array([["a"]]),
    torch.zeros(1, 3, 8, 8),
])
def test_what_cannot_be_a_picture_is_a_type_error_of_one_line(form: object) -> None:
    with pytest.raises(TypeError, match=r"^a picture is a file name, .* \(H, W, 3\) .*; this (one )?is [^\n]*$"):
        pictures.as_rgb(form)


@pytest.mark.parametrize("values", [[-2.1, 0.5], [np.nan, 1.0], [np.inf, 1.0], [1.02, 0.5], [0, 70000], [-1, 3]])
def test_values_that_are_no_brightness_are_refused(values: list) -> None:
    with pytest.raises(UserError, match="are no brightness: scale them to 0..255 or 0..1"):
        pictures.as_rgb(np.array([values]))


@pytest.mark.parametrize("factor", [1, 4, 16, 64, 256, 257])  # 8, 10, 12, 14, 16, 16 bits
@pytest.mark.parametrize("kind", ["png", "rgba.png", "tif", "big-endian.tif", "deflate.tif"])
def test_16_bit_colours_of_any_used_depth_give_the_8_bit_picture(tmp_path: Path, kind: str, factor: int) -> None:
    path = tmp_path / kind
    deep = RGB.astype(np.uint16) * np.uint16(factor)
    if kind.endswith("png"):
        deep = np.dstack([deep, deep[..., 0] * 0 + 65535]) if kind == "rgba.png" else deep
        path.write_bytes(png(deep.astype(">u2").reshape(10, -1), (10, 20), 16, 6 if kind == "rgba.png" else 2))
    else:
        path.write_bytes(tiff(deep, {}, ">" if "big" in kind else "<", deflate="deflate" in kind))
    for picture in (path, path.read_bytes(), Image.open(path)):
        np.testing.assert_array_equal(pictures.as_rgb(picture), RGB)


def test_turned_16_bit_colours(tmp_path: Path) -> None:
    content = tiff(np.ascontiguousarray(np.rot90(RGB)).astype(np.uint16) * 16, {274: 6})
    np.testing.assert_array_equal(pictures.as_rgb(content), RGB)


@pytest.mark.parametrize(("tags", "expected"), [
    ({281: 4095}, GRAY),  # MaxSampleValue
    ({281: 255}, GRAY),  # which is wrong
    ({262: 0}, 255 - GRAY),  # PhotometricInterpretation: 0 is white
])
def test_the_tags_of_a_tiff_count(tags: dict, expected: np.ndarray) -> None:
    content = tiff(GRAY.astype(np.uint16)[..., None] * 16, tags)
    np.testing.assert_array_equal(pictures.as_rgb(content), np.dstack([expected] * 3))


@pytest.mark.parametrize("kind", ["PPM", "EPS", "DDS", "ICO", "TGA", "PCX", "JPEG2000"])
def test_formats_that_nobody_asked_for_are_not_opened(tmp_path: Path, kind: str) -> None:
    Image.fromarray(RGB).save(tmp_path / "x.png", kind)
    for source in (tmp_path / "x.png", (tmp_path / "x.png").read_bytes()):
        for read in (pictures.as_rgb, pictures.picture_size, pictures.read_label_image):
            with pytest.raises(UserError, match="not a readable image .cannot identify it as one of JPEG, PNG"):
                read(source)


def test_a_small_file_of_a_huge_picture_is_not_opened(tmp_path: Path) -> None:
    blank = np.zeros((9000, 1125), np.uint8)
    (tmp_path / "one_bit.png").write_bytes(png(blank, (9000, 9000), 1, 0))  # 81 million pixels in 10 kB
    with pytest.raises(UserError, match="one_bit.png: not a readable image .9000x9000 pixels in 9... bytes.: replace"):
        pictures.picture_size(tmp_path / "one_bit.png")
    (tmp_path / "blank.png").write_bytes(png(blank.repeat(8, axis=1), (9000, 9000), 8, 0))
    assert pictures.picture_size(tmp_path / "blank.png") == (9000, 9000)  # the smallest PNG of labels


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's own remarks on the damage
@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG"])
def test_a_file_of_two_pages_cut_anywhere_is_read_or_refused(kind: str) -> None:
    first, second = Image.fromarray(LABELS), Image.fromarray(LABELS + 1)
    file = io.BytesIO()
    first.save(file, kind, save_all=True, append_images=[second])
    for size in range(len(file.getvalue())):
        try:
            assert pictures.as_rgb(file.getvalue()[:size]).shape == (12, 16, 3)
        except UserError as fault:
            assert str(fault).startswith("these bytes: not a readable image")


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a/" * 3000, "a\0b.png", "a\nb.png", "\ud800.png"])
def test_names_that_no_file_can_have_are_one_line(tmp_path: Path, name: str) -> None:
    for read in (pictures.read_image, pictures.picture_size, pictures.read_label_image):
        with pytest.raises(UserError, match="not a readable image"):
            read(tmp_path / name)


def test_16_bit_files_that_pillow_misreads_are_refused(tmp_path: Path) -> None:
    dark = png(np.dstack([GRAY.astype(">u2"), GRAY.astype(">u2")]).astype(">u2").reshape(10, -1), (10, 20), 16, 4)
    planes = tiff(RGB.astype(np.uint16), {284: 2})  # PlanarConfiguration: plane after plane
    for content in (dark, planes):
        with pytest.raises(UserError, match="does not read this kind of 16-bit file right: save it with 8 bits"):
            pictures.as_rgb(content)


def test_pages(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_said", set())
    first, second = Image.fromarray(LABELS), Image.fromarray(LABELS * 0)
    for name in ("x.tif", "x.png", "x.gif"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        np.testing.assert_array_equal(pictures.read_image(tmp_path / name)[..., 0], LABELS)
        with pytest.raises(UserError, match=f"{name} holds 2 pages or frames: save the one that is meant"):
            pictures.read_label_image(tmp_path / name)
    assert capsys.readouterr().err.endswith("x.tif holds 2 pages or frames: the first is read, of all such files\n")


def test_floats_at_the_rim_do_not_wrap() -> None:
    assert pictures.as_rgb(np.array([[255.7, 3]]))[0, :, 0].tolist() == [255, 3]
    assert pictures.as_rgb(np.float32([[1 + 1e-6, 0.2]]))[0, :, 0].tolist() == [255, 51]


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "mpo"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_read_upright_and_its_size_is_known(tmp_path: Path, kind: str, orientation: int) -> None:
    turned = {1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2),
              6: np.rot90(RGB), 7: RGB[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(RGB, -1)}[orientation]
    path = tmp_path / f"x.{kind}"
    Image.fromarray(np.ascontiguousarray(turned)).save(path, exif=exif(orientation),
                                                        **({"lossless": True} if kind == "webp" else {}))
    image = pictures.read_image(path)
    assert pictures.picture_size(path) == image.shape[:2] == (10, 20)
    pictures.check_size(path, "labels", (10, 20))
    with Image.open(path) as picture:
        np.testing.assert_array_equal(pictures.as_rgb(picture), image)
    if kind not in ("jpg", "mpo"):
        np.testing.assert_array_equal(image, RGB)
    if orientation >= 5:
        with pytest.raises(UserError, match="is 20x10 pixels but labels is 10x20; EXIF turns the image, so label it"):
            pictures.check_size(path, "labels", (20, 10))


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_a_damaged_exif_is_none(tmp_path: Path, kind: str) -> None:
    Image.fromarray(RGB).save(tmp_path / f"x.{kind}", exif=b"Exif\0\0no header of a TIFF")
    assert pictures.picture_size(tmp_path / f"x.{kind}") == pictures.read_image(tmp_path / f"x.{kind}").shape[:2]


@pytest.mark.parametrize("value", [0, 9, 6000, b"6", "Rotate 90 CW", (6, 6), 1.5])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_an_orientation_that_makes_no_sense_is_no_orientation(tmp_path: Path, kind: str, value: object,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"x.{kind}"
    Image.fromarray(RGB).save(path)
    monkeypatch.setattr(Image.Image, "getexif", lambda picture: {0x0112: value})
    assert pictures.picture_size(path) == pictures.read_image(path).shape[:2] == (10, 20)


def test_cmyk_is_read_as_opencv_does(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (255, 0, 0, 0)).save(tmp_path / "cmyk.jpg")
    assert pictures.read_image(tmp_path / "cmyk.jpg")[0, 0].tolist() == [0, 255, 255]


def four_grays(path: Path, bits: int) -> None:
    """A gray PNG of 2 or 4 bits, which Pillow reads but does not write."""
    parts = np.unpackbits(LABELS[..., None], axis=-1)[..., -bits:].reshape(len(LABELS), -1)
    path.write_bytes(png(np.packbits(parts, axis=-1), LABELS.shape, bits, 0))


SAVERS = {  # how labels are written, each without loss
    "gray.png": lambda path: Image.fromarray(LABELS).save(path),
    "gray.bmp": lambda path: Image.fromarray(LABELS).save(path),
    "gray.gif": lambda path: Image.fromarray(LABELS).save(path),
    "two_bits.png": lambda path: four_grays(path, 2),
    "four_bits.png": lambda path: four_grays(path, 4),
    "deep.png": lambda path: Image.fromarray(LABELS.astype(np.uint16)).save(path),
    "int32.tif": lambda path: Image.fromarray(LABELS.astype(np.int32)).save(path),
    "lzw.tif": lambda path: Image.fromarray(LABELS).save(path, compression="tiff_lzw"),
    "float.tif": lambda path: Image.fromarray(LABELS.astype(np.float32)).save(path),
    "alpha.png": lambda path: Image.merge("LA", [Image.fromarray(LABELS), Image.new("L", LABELS.shape[::-1], 255)])
    .save(path),
}


@pytest.mark.parametrize("name", SAVERS)
def test_labels_of_every_lossless_format_keep_their_values(tmp_path: Path, name: str) -> None:
    SAVERS[name](tmp_path / name)
    values, coloured, palette = pictures.read_label_image(tmp_path / name)
    assert not coloured and palette is None and values.dtype == np.int32
    np.testing.assert_array_equal(values, LABELS)


@pytest.mark.parametrize("name", ["rgb.png", "alpha.png", "lossless.webp", "rgb.tif"])
def test_colours_are_numbers(tmp_path: Path, name: str) -> None:
    picture = np.uint8([[[255, 0, 2], [0, 128, 0]], [[1, 2, 3], [0, 0, 0]]])
    picture = np.dstack([picture, np.full((2, 2), 255, np.uint8)]) if name == "alpha.png" else picture
    Image.fromarray(picture).save(tmp_path / name, **({"lossless": True} if "webp" in name else {}))
    values, coloured, palette = pictures.read_label_image(tmp_path / name)
    assert coloured and palette is None and values.dtype == np.int32
    assert values.tolist() == [[0xFF0002, 0x008000], [0x010203, 0]]
    with pytest.raises(UserError, match=f"{name} holds colours, not class indices: .*from-folders"):
        pictures.read_labels(tmp_path / name)


def test_a_palette_comes_with_its_indices(tmp_path: Path) -> None:
    picture = Image.fromarray(LABELS)
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 1, 2, 3])
    for name in ("x.png", "x.gif", "x.bmp"):
        picture.save(tmp_path / name, **({"optimize": False} if name == "x.gif" else {}))
        values, coloured, palette = pictures.read_label_image(tmp_path / name)
        np.testing.assert_array_equal(palette[values][..., 0], np.uint8([0, 128, 0, 1])[LABELS])
        assert not coloured


@pytest.mark.parametrize(("name", "options", "message"), [
    ("x.jpg", {}, "x.jpg is a lossy JPEG: .* export the labels as PNG"),
    ("x.png", {"format": "JPEG"}, "x.png is a lossy JPEG"),
    ("x.webp", {"quality": 90}, "x.webp is a lossy WEBP"),
    ("x.webp", {"quality": 90, "exif": exif(1)}, "x.webp is a lossy WEBP"),
    ("x.tif", {"compression": "jpeg"}, "x.tif is a lossy TIFF"),
    ("x.tif", {"exif": exif(6)}, "x.tif has an orientation tag"),
    ("x.png", {"exif": exif(3)}, "x.png has an orientation tag, .*: save it upright, as PNG"),
])
def test_labels_that_are_not_what_was_drawn_are_refused(tmp_path: Path, name: str, options: dict, message: str) -> None:
    Image.fromarray(LABELS).save(tmp_path / name, **options)
    with pytest.raises(UserError, match=message):
        pictures.read_label_image(tmp_path / name)


def test_labels_of_16_bit_colours_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(RGB.astype(">u2").reshape(10, -1), (10, 20), 16, 2))
    with pytest.raises(UserError, match="x.png has 16-bit colours: save it with 8 bits a colour"):
        pictures.read_label_image(tmp_path / "x.png")


def test_labels_of_fractions_are_refused(tmp_path: Path) -> None:
    Image.fromarray(LABELS / np.float32(3)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match="x.tif has mode F, not one whole number or colour a pixel"):
        pictures.read_label_image(tmp_path / "x.tif")


def test_saved_labels_keep_values_and_palette(tmp_path: Path) -> None:
    labels, palette = np.uint8([[0, 1, 2], [255, 1, 0]]), np.uint8([[200, 0, 0], [0, 200, 0], [0, 0, 200]])
    pictures.save_labels(labels, tmp_path / "sub" / "x.png", palette)
    values, colours = pictures.read_labels(tmp_path / "sub" / "x.png")
    np.testing.assert_array_equal(values, labels)
    np.testing.assert_array_equal(colours[:3], palette)
    pictures.save_labels(np.uint16([[459, 1]]), tmp_path / "ids.png")
    assert pictures.read_labels(tmp_path / "ids.png")[0].tolist() == [[459, 1]]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["ids.png", "sub", "x.png"]
