"""Everything that the published numbers need and this repository does not hold: where it is, and how it gets here.

Reading order: Source -> sources.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("sources.json")


class Source(NamedTuple):
    """A line of sources.json."""
    name: str
    what: str  # for people
    addresses: tuple[str, ...]  # the same file at each; tried in this order
    path: Path  # where the file goes
    size: int | None = None  # bytes; None: unknown
    checksum: str | None = None  # "sha256:...", "md5:..." or "sha1:..."; None: unknown
    unpack: Path | None = None  # what is there once the archive is unpacked in its folder; None: no archive
    published: tuple[float, float] | None = None  # mIoU of a released model in percent, single-scale and multi-scale

    @property
    def command(self) -> str:
        """What the user types to get it."""
        return f"python data.py fetch {self.name}"

    @property
    def here(self) -> bool:
        """Whether it is in its place, whole: files get their names when they are complete."""
        return (self.unpack or self.path).exists()


def sources() -> dict[str, Source]:
    """The table by name: that of sources.json, or of the file that the environment variable FETCH_SOURCES names."""
    table = json.loads(Path(os.environ.get("FETCH_SOURCES", TABLE)).read_text())
    return {name: Source(name, **{
        **entry, "addresses": tuple(entry["addresses"]), "path": Path(entry["path"]),
        "unpack": Path(entry["unpack"]) if "unpack" in entry else None,
        "published": tuple(entry["published"]) if "published" in entry else None}) for name, entry in table.items()}
