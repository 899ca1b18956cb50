"""Video files in and out, with PyAV: `pip install av`.

Reading order: open_video -> VideoWriter.

Shapes: a frame is RGB uint8 (H, W, 3).
"""

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from common import UserError, reason

try:
    import av
except ImportError:
    av = None

EXTENSIONS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


class Video(NamedTuple):
    """A video that is being read."""
    frames: Iterator[np.ndarray]
    rate: Fraction  # frames a second
    length: int | None  # frames, if the file tells


def need_av(path: Path) -> None:
    """Raises UserError if PyAV is not installed."""
    if av is None:
        raise UserError(f"{path}: reading and writing videos needs PyAV: pip install av")


@contextlib.contextmanager
def open_video(path: Path) -> Iterator[Video]:
    """The first video stream of a file, frame by frame. Raises UserError if it cannot be read."""
    need_av(path)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            frames = (frame.to_ndarray(format="rgb24") for frame in container.decode(stream))
            yield Video(frames, stream.average_rate or Fraction(25), stream.frames or None)
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{path}: not a readable video ({reason(error)}): replace it or take it out") from None


class VideoWriter:
    """Writes frames of one size to an MP4 file (H.264); used in a `with`. An interrupted one ends with its last frame.

    The sides of H.264 are even: an odd last row or column is left out.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        need_av(path)
        self.path, self.draft, self.stream = path, path.with_name(f".{path.name}.partial"), None
        path.parent.mkdir(parents=True, exist_ok=True)
        self.container, self.rate = av.open(str(self.draft), "w", format="mp4"), rate

    def write(self, frame: np.ndarray) -> None:
        """Add a frame. Raises UserError if it has another size than the first."""
        height, width = (side // 2 * 2 for side in frame.shape[:2])
        if not self.stream:
            self.stream = self.container.add_stream("libx264", rate=self.rate)
            self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        if (self.stream.height, self.stream.width) != (height, width):
            raise UserError(f"{self.path}: a frame of {width}x{height} pixels after some of {self.stream.width}x"
                            f"{self.stream.height}: give frames of one size")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
        self.container.mux(self.stream.encode(picture))

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.stream:
            self.container.mux(self.stream.encode())
        self.container.close()
        if self.stream:
            self.draft.replace(self.path)
        else:
            self.draft.unlink(missing_ok=True)
