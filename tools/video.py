"""Video files in and out, with PyAV: `pip install av`.

Reading order: open_video -> comment_of -> write_video.

Shapes: a frame is RGB uint8 (H, W, 3).
"""

import contextlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
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


@contextlib.contextmanager
def faults(path: Path, what: str) -> Iterator[None]:
    """Raises UserError if PyAV is absent or finds a fault inside."""
    if not hasattr(getattr(av, "VideoFrame", None), "rotation"):
        raise UserError(f"{path}: reading and writing videos needs PyAV 14.2 or newer: pip install -U av")
    try:
        yield
    except av.FFmpegError as error:
        raise UserError(f"{path}: {what} ({reason(error)})") from None


@contextlib.contextmanager
def open_video(path: Path) -> Iterator[Video]:
    """The first video stream of a file, frame by frame, upright. Raises UserError if it cannot be read."""
    def frames() -> Iterator[np.ndarray]:
        with unreadable():  # here too, or a fault would pass for one of the video that is written meanwhile
            for frame in container.decode(stream):
                yield np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)  # telephones turn by a tag

    unreadable = partial(faults, path, "not a readable video: replace it or take it out")
    with unreadable(), av.open(str(path)) as container:
        if not container.streams.video:
            raise UserError(f"{path}: it holds no pictures: take it out")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield Video(frames(), stream.average_rate or Fraction(25), stream.frames or None)


def comment_of(path: Path) -> str | None:
    """The comment in a video file, if there is one that can be read."""
    with contextlib.suppress(UserError, OSError), faults(path, ""), av.open(str(path)) as container:
        return container.metadata.get("comment")


@contextlib.contextmanager
def write_video(path: Path, rate: Fraction, comment: str) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that adds a frame to an MP4 file (H.264). An interrupted file ends with its last frame.

    The sides of H.264 are even: an odd last row or column is left out. Raises UserError for a frame of another size,
    and if a file of this name is there that has not this comment.
    """
    if path.exists() and comment_of(path) != comment:
        raise UserError(f"{path} is there, and does not say that it was {comment}: move it or name another place")
    draft, stream = path.with_name(f".{path.name}.partial"), None

    def write(frame: np.ndarray) -> None:
        nonlocal stream
        height, width = (side // 2 * 2 for side in frame.shape[:2])
        if not stream:
            stream = container.add_stream("libx264", rate=rate)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if (stream.height, stream.width) != (height, width):
            raise UserError(f"{path}: a frame of {width}x{height} pixels after some of {stream.width}x{stream.height}: "
                            "give frames of one size")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
        container.mux(stream.encode(picture))

    with faults(path, "cannot be written: make room or name another place"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with av.open(str(draft), "w", format="mp4") as container:
                container.metadata["comment"] = comment
                try:
                    yield write
                finally:
                    if stream:
                        container.mux(stream.encode())
        finally:
            if stream:
                draft.replace(path)
            draft.unlink(missing_ok=True)
