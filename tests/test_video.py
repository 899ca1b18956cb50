"""video.py: frames in and out; needs PyAV, but for the line that says so."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from common import UserError
from tools import video


def test_without_pyav_one_line_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(video, "av", None)
    with pytest.raises(UserError, match="^x.mp4: reading and writing videos needs PyAV: pip install av$"), \
            video.open_video(Path("x.mp4")):
        pass


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Twelve frames that turn from dark to bright, of 49 x 65 pixels."""
    pytest.importorskip("av")
    with video.VideoWriter(tmp_path / "sub" / "x.mp4", Fraction(10)) as writer:
        for i in range(12):
            writer.write(np.full((49, 65, 3), 20 * i, np.uint8))
    return tmp_path / "sub" / "x.mp4"


def test_what_is_written_is_read_again(written: Path) -> None:
    with video.open_video(written) as source:
        frames = [*source.frames]
        assert source.rate == 10 and source.length == 12
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 12
    np.testing.assert_allclose([frame.mean() for frame in frames], 20 * np.arange(12), atol=4)
    assert [path.name for path in written.parent.iterdir()] == ["x.mp4"]


def test_an_interrupted_video_ends_with_its_last_frame_and_sizes_must_agree(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(UserError, match="x.mp4: a frame of 32x32 pixels after some of 64x64"), \
            video.VideoWriter(tmp_path / "x.mp4", Fraction(10)) as writer:
        writer.write(np.zeros((64, 64, 3), np.uint8))
        writer.write(np.zeros((32, 32, 3), np.uint8))
    with video.open_video(tmp_path / "x.mp4") as source:
        assert len([*source.frames]) == 1
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="bad.mp4: not a readable video"), video.open_video(tmp_path / "bad.mp4"):
        pass
