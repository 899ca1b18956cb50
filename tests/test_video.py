"""video.py: frames in and out; needs PyAV, but for the line that says so."""

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from common import UserError
from tools import video


def test_without_pyav_one_line_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(video, "av", None)
    message = "x.mp4: reading and writing videos needs PyAV 14.2 or newer: pip install -U av$"
    with pytest.raises(UserError, match=message), video.open_video(tmp_path / "x.mp4"):
        pass
    with pytest.raises(UserError, match=message), video.write_video(tmp_path / "x.mp4", Fraction(25), ""):
        pass
    assert video.comment_of(tmp_path / "x.mp4") is None and not [*tmp_path.iterdir()]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Twelve frames that turn from dark to bright, of 49 x 65 pixels."""
    pytest.importorskip("av")
    with video.write_video(tmp_path / "sub" / "x.mp4", Fraction(10), "by a test") as write:
        for i in range(12):
            write(np.full((49, 65, 3), 20 * i, np.uint8))
    return tmp_path / "sub" / "x.mp4"


def test_what_is_written_is_read_again(written: Path) -> None:
    with video.open_video(written) as source:
        frames = [*source.frames]
        assert source.rate == 10 and source.length == 12
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 12
    np.testing.assert_allclose([frame.mean() for frame in frames], 20 * np.arange(12), atol=4)
    assert [path.name for path in written.parent.iterdir()] == ["x.mp4"]
    assert video.comment_of(written) == "by a test"
    with pytest.raises(UserError, match="x.mp4 is there, and does not say that it was by another"), \
            video.write_video(written, Fraction(10), "by another"):
        pass


@pytest.mark.parametrize(("matrix", "corner"), [
    ((1, 0, 0, 1), (0, 0)), ((0, 1, -1, 0), (0, -1)), ((-1, 0, 0, -1), (-1, -1)), ((0, -1, 1, 0), (-1, 0))])
def test_frames_are_turned_upright(tmp_path: Path, matrix: tuple, corner: tuple) -> None:
    """The upper left corner is bright; by the matrix in the file's track header it belongs elsewhere."""
    pytest.importorskip("av")
    frame = np.zeros((64, 96, 3), np.uint8)
    frame[:16, :16] = 250
    with video.write_video(tmp_path / "x.mp4", Fraction(10), "") as write:
        write(frame)
        write(frame)
    content = (tmp_path / "x.mp4").read_bytes()
    place = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    turned = struct.pack(">6i", a, b, 0, c, d, 0)
    (tmp_path / "x.mp4").write_bytes(content[:place] + turned + content[place + len(turned):])
    with video.open_video(tmp_path / "x.mp4") as source:
        frames = [*source.frames]
    assert [frame.shape for frame in frames] == 2 * [(64, 96, 3) if matrix[0] else (96, 64, 3)]
    for frame in frames:
        bright = {(y, x) for y in (0, -1) for x in (0, -1) if frame[y, x].mean() > 128}
        assert bright == {corner}


def test_an_interrupted_video_ends_with_its_last_frame_and_sizes_must_agree(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(UserError, match="x.mp4: a frame of 32x32 pixels after some of 64x64"), \
            video.write_video(tmp_path / "x.mp4", Fraction(10), "") as write:
        write(np.zeros((64, 64, 3), np.uint8))
        write(np.zeros((32, 32, 3), np.uint8))
    with video.open_video(tmp_path / "x.mp4") as source:
        assert len([*source.frames]) == 1


def test_a_video_that_is_damaged_is_named_and_keeps_the_frames_before(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="bad.mp4: not a readable video"), video.open_video(tmp_path / "bad.mp4"):
        pass
    with av.open(tmp_path / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux([*stream.encode(sound), *stream.encode()])
    with pytest.raises(UserError, match="sound.mp4: it holds no pictures"), video.open_video(tmp_path / "sound.mp4"):
        pass
    noise = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), np.uint8)
    with video.write_video(tmp_path / "x.mp4", Fraction(10), "") as write:
        for frame in noise:
            write(frame)
    content = (tmp_path / "x.mp4").read_bytes()
    half = len(content) // 2
    (tmp_path / "x.mp4").write_bytes(content[:half] + bytes(half // 2) + content[half + half // 2:])
    with pytest.raises(UserError, match="x.mp4: not a readable video"), \
            video.open_video(tmp_path / "x.mp4") as source, \
            video.write_video(tmp_path / "y.mp4", Fraction(10), "") as write:
        for frame in source.frames:
            write(frame)
    with video.open_video(tmp_path / "y.mp4") as source:
        assert 0 < len([*source.frames]) < 30
