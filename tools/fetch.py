"""Everything that the published numbers need and this repository does not hold: where it is, and how it gets here.

Reading order: Source -> sources -> choose -> show; fetch -> fetch_one -> locked, download -> Draft, receive_all ->
receive -> ask, accept; approve. archives.py unpacks.
"""

import contextlib
import difflib
import hashlib
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple, TextIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

import common
from common import UserError, reason
from tools import archives

TABLE = Path(__file__).with_name("sources.json")
TIMEOUT = 30  # seconds without an answer or a byte, after which a connection counts as cut
PAUSES = (1, 5, 20)  # seconds before the next tries after a cut; from the first again when a try has brought more
CHUNK = 1 << 18  # bytes
DIGITS = {"sha256": 64, "sha1": 40, "md5": 32}  # hexadecimal ones of each checksum
TYPES = {"path": Path, "unpack": Path, "published": tuple}  # of those fields that JSON holds as another type


class Source(NamedTuple):
    """A line of sources.json."""
    name: str
    what: str  # for people
    addresses: Sequence[str]  # the same file at each; tried in this order
    path: Path  # where the file goes
    size: int | None = None  # bytes; None: unknown
    checksum: str | None = None  # "sha256:...", "md5:..." or "sha1:..."; None: unknown
    unpack: Path | None = None  # what is there once the archive is unpacked in its folder; None: no archive
    published: tuple[float, float] | None = None  # mIoU of a released model in percent, single-scale and multi-scale

    @property
    def command(self) -> str:
        """What the user types to get it."""
        return f"python data.py fetch {shlex.quote(self.name)}"

    @property
    def here(self) -> bool:
        """Whether it is in its place, whole: what is fetched gets its name when it is complete. No empty folder is."""
        place = self.unpack or self.path
        return any(place.iterdir()) if place.is_dir() else place.exists()

    def beside(self, suffix: str) -> Path:
        """The file's companions: .partial is its draft, .partial.tag the draft's version, .sha256 its record."""
        return self.path.with_name(self.path.name + suffix)


def sources() -> dict[str, Source]:
    """The table by name: that of sources.json, or of the file that the environment variable FETCH_SOURCES names.

    Raises UserError for a file that cannot be read, or a field that is wrong.
    """
    file, table, name = Path(os.environ.get("FETCH_SOURCES") or TABLE), {}, "file"
    try:
        for name, entry in json.loads(file.read_bytes()).items():
            table[name] = read_entry(name, entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no table of sources ({name}: {reason(error)}): mend it; without "
                        f"FETCH_SOURCES it is {TABLE.name}") from None
    return table


def read_entry(name: str, entry: dict) -> Source:
    """A line of the table. Raises ValueError, KeyError, TypeError or AttributeError for a field that is wrong."""
    typed = {key: kind(entry[key]) for key, kind in TYPES.items() if entry.get(key) is not None}
    source = Source(name, **entry | typed)
    algorithm, _, digits = (source.checksum or f"md5:{'0' * 32}").partition(":")
    sound = {
        "addresses": isinstance(source.addresses, list) and source.addresses
                     and all(re.match("https?://.", address) for address in source.addresses),
        "path": source.path.name,
        "size": source.size is None or type(source.size) is int and source.size > 0,
        "checksum": re.fullmatch(f"[0-9a-f]{{{DIGITS.get(algorithm)}}}", digits),
        "unpack": source.unpack is None or source.path.parent in source.unpack.parents and source.unpack != source.path,
    }
    for field in (field for field in sound if not sound[field]):
        raise ValueError(f"{field} cannot be {entry[field]!r}")
    return source


def choose(names: Sequence[str]) -> list[Source]:
    """The sources of these names. Raises UserError with the names that there are, similar ones first."""
    table = sources()
    for name in (name for name in names if name not in table):
        similar = difflib.get_close_matches(name, table, len(table) or 1, cutoff=0)
        raise UserError(f"there is no '{name}' to fetch: choose of {', '.join(similar)}")
    return [table[name] for name in names]


def show(names: Sequence[str]) -> None:
    """Print these sources, or all: name, whether it is here, what, size; below it the addresses and the place."""
    for source in choose(names or list(sources())):
        draft = source.beside(".partial")
        state = "here" if source.here else f"{megabytes(draft.stat().st_size)} here" if draft.exists() else "absent"
        print(f"{source.name:30}{state:16}{source.what}" + (f", {megabytes(source.size)}" if source.size else ""),
              *(f"    from {address}" for address in source.addresses), f"    to   {source.unpack or source.path}",
              sep="\n")


def megabytes(size: int | None) -> str:
    """A number of bytes as people read it."""
    return "unknown size" if size is None else f"{size / 1e6:,.1f} MB"


# ------------------------------------------------------------------------------------------------------------- fetching
class Failed(Exception):
    """An address does not give the file; the message says why."""


class Cut(Failed):
    """The address may give the file, or the rest of it, in a moment."""


def fetch(names: Sequence[str]) -> None:
    """Get the files of these names into their places, unpacked, one after the other; what is here is skipped.

    A download that was cut goes on. Raises UserError in one line: what failed, and what the user can do.
    """
    if not names:
        raise UserError(f"say what to fetch: {', '.join(sources())} (--list tells more)")
    for source in choose(names):
        try:
            fetch_one(source)
        except (Failed, archives.Refused) as failure:
            raise UserError(f"{failure}: remove it and run `{source.command}`") from None
        except OSError as error:  # of the disk; those of the network are Failed
            raise UserError(f"{error.filename or source.path} cannot be written ({reason(error)}): make room or mend "
                            f"the folder, then `{source.command}` goes on") from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted: `python data.py fetch {shlex.join(names)}` goes on") from None


def fetch_one(source: Source) -> None:
    """What is still to do of: download, check, record, unpack. Raises Failed for a file that is there and wrong."""
    if not source.here:
        common.make_folder(source.path.parent, f"{source.name}:")
        with locked(source) as tag:
            if source.unpack and source.path.exists():  # put there by the user, or a kill left it packed
                approve(source, source.path)
            elif not source.here:  # another process may have been quicker
                download(source, tag)
            if not source.here:
                archives.unpack(source.path, source.unpack)
                print(f"{source.name}: unpacked; {source.path} is removed", flush=True)
    elif not source.unpack and not source.beside(".sha256").exists():  # put there by the user
        approve(source, source.path)
    print(f"{source.name}: {source.unpack or source.path} is here", flush=True)


@contextlib.contextmanager
def locked(source: Source) -> Iterator[TextIO]:
    """PLACE.partial.tag, open, for this process alone. Where another process has it, this one says so and waits."""
    path = source.beside(".partial.tag")
    while True:
        with path.open("a+", encoding="latin-1") as tag:  # the encoding of HTTP headers
            try:
                import fcntl

                fcntl.flock(tag, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{source.name}: another process fetches it; waiting", flush=True)
                fcntl.flock(tag, fcntl.LOCK_EX)
            except (ImportError, OSError) as error:  # Windows and some network file systems have no such locks
                print(f"{path} cannot be locked ({reason(error)}): let one process fetch at a time", flush=True)
            if path.exists() and os.path.samefile(path, tag.fileno()):
                try:
                    return (yield tag)
                finally:
                    if not source.beside(".partial").exists():
                        path.unlink(missing_ok=True)
            # The other process is done and has removed the tag: the next one would lock a new file.


def download(source: Source, tag: TextIO) -> None:
    """Put the file in its place, from the first address that gives it. Raises UserError if none does."""
    failures = []
    with contextlib.closing(Draft(source, tag)) as draft:
        for address in source.addresses:
            if failures:
                print(f"{source.name}: {failures[-1]}; next address", flush=True)
            try:
                receive_all(draft, address)
                return draft.finish()
            except Failed as failure:
                failures.append(f"{address}: {failure}")
    raise UserError(f"{source.name} cannot be fetched ({'; '.join(failures)}): try again later, or open "
                    f"{source.addresses[0]} in a browser, put the file at {source.path} and run `{source.command}`")


class Draft:
    """PLACE.partial: what has come so far. It stays when a connection is cut or the process ends.

    Its tag is the ETag or Last-Modified of the file on the server, kept beside it: what is missing comes from the very
    same file, or all is begun again.
    """

    def __init__(self, source: Source, tag_file: TextIO) -> None:
        self.source, self.tag_file, self.path = source, tag_file, source.beside(".partial")
        self.file = self.path.open("ab")
        tag_file.seek(0)
        self.tag = tag_file.read()

    def begin(self, tag: str) -> None:
        """Drop what is there; a file with this tag comes."""
        self.file.seek(self.file.truncate(0))
        self.tag_file.truncate(0)
        self.tag_file.write(tag)
        self.tag_file.flush()
        self.tag = tag

    @property
    def size(self) -> int:
        return self.file.tell()

    def finish(self) -> None:
        """Check and record the file, give it its name. Raises Failed."""
        self.file.flush()
        os.fsync(self.file.fileno())  # the bytes must be on the disk before the name points to them
        try:
            approve(self.source, self.path)
        except Failed:
            self.begin("")
            raise
        self.path.replace(self.source.path)

    def close(self) -> None:
        if not self.size:
            self.path.unlink(missing_ok=True)
        self.file.close()


def receive_all(draft: Draft, address: str) -> None:
    """Fill the draft from an address, again after a pause where the connection is cut. Raises Failed."""
    pauses, most = list(PAUSES), draft.size
    while True:
        try:
            return receive(draft, address)
        except Cut as cut:
            if draft.size > most:
                pauses, most = list(PAUSES), draft.size
            if not pauses:
                raise
            print(f"{draft.source.name}: {cut}; next try in {pauses[0]} s", flush=True)
        time.sleep(pauses.pop(0))


def receive(draft: Draft, address: str) -> None:
    """Fill the draft over one connection. Raises Failed, Cut; UserError if the disk has too little room."""
    source, folder = draft.source, draft.path.parent
    with ask(draft, address) as answer:
        total = accept(draft, answer)
        if draft.size == total:
            return
        print(f"{source.name}: {address}, {megabytes(total)}, from byte {draft.size}", flush=True)
        need, free = (total or 0) * (2 if source.unpack else 1) - draft.size, shutil.disk_usage(folder).free
        if need > free:
            raise UserError(f"{source.name} needs {megabytes(need)}, but {folder} has {megabytes(free)} free: make "
                            f"room, then run `{source.command}`")
        with tqdm(total=total, initial=draft.size, unit="B", unit_scale=True, disable=None) as bar:
            while chunk := next_chunk(answer):
                draft.file.write(chunk)
                bar.update(len(chunk))
    if draft.size < (total or 0):
        raise Cut(f"cut after {megabytes(draft.size)}")


def accept(draft: Draft, answer: HTTPResponse | HTTPError) -> int | None:
    """Make the draft ready for what the answer brings; the size of the whole file, None if unknown. Raises Failed, Cut.

    Status 200 brings the whole file, 206 the rest that was asked for; 416 says that there is no such rest.
    """
    headers, span, known = answer.headers, answer.headers.get("Content-Range", ""), draft.source.size
    length = headers.get("Content-Length", "") if answer.status == 200 else span.rpartition("/")[2]
    total = int(length) if length.isdecimal() else None
    etag = headers.get("ETag", "W/")
    tag = headers.get("Last-Modified", "") if etag.startswith("W/") else etag  # a weak ETag allows other bytes
    if answer.status == 416 and total == draft.size:
        return total
    if answer.status != 200 and not (span.startswith(f"bytes {draft.size}-") and tag in ("", draft.tag)):
        draft.begin("")
        raise Cut(f"status {answer.status}, not the rest of the file")
    if headers.get_content_type() == "text/html":
        raise Failed("a web page comes in place of the file")
    if known and total not in (None, known):
        raise Failed(f"its file has {total} bytes, not {known}")
    if not (total or known or draft.source.checksum or answer.chunked):
        raise Failed("no length comes with the file, so that nobody can tell when it is whole")
    if answer.status == 200:
        draft.begin(tag)
    return total or known


def ask(draft: Draft, address: str) -> HTTPResponse | HTTPError:
    """The server's answer to the request for what the draft lacks. Raises Failed, Cut."""
    headers = {"User-Agent": "vit-adapter-fetch"}
    if draft.size and draft.tag:  # without a tag nobody can tell whether the rest would fit
        headers |= {"Range": f"bytes={draft.size}-", "If-Range": draft.tag}
    try:
        return urlopen(Request(address, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:
            return error
        error.close()
        kind = Cut if error.code >= 500 or error.code in (408, 429) else Failed
        raise kind(f"{error.code} {reason(error.reason)}") from None
    except (OSError, HTTPException, ValueError) as error:
        refused = isinstance(error, URLError) or not isinstance(error, OSError)
        raise (Failed if refused and not draft.size else Cut)(network_reason(error)) from None


def next_chunk(answer: HTTPResponse) -> bytes:
    """What the server sends next; empty at the end. Raises Cut."""
    try:
        return answer.read1(CHUNK)
    except (OSError, HTTPException) as error:
        raise Cut(network_reason(error)) from None


def network_reason(error: BaseException) -> str:
    """Why the network failed: the system's words, which urllib wraps, else the kind of the error."""
    return reason(getattr(error, "reason", error)) or type(error).__name__


def approve(source: Source, path: Path) -> None:
    """Compare the file with what is known of it, and write PLACE.sha256, which `sha256sum -c` reads. Raises Failed."""
    algorithm, _, known = (source.checksum or "sha256:").partition(":")
    found = {name: hashlib.new(name, usedforsecurity=False) for name in (algorithm, "sha256")}
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            for digest in found.values():
                digest.update(chunk)
    found = {name: digest.hexdigest() for name, digest in found.items()}
    size, name = path.stat().st_size, f"{path}: the file" if path == source.path else "the file"
    if source.size not in (None, size):
        raise Failed(f"{name} has {size} bytes, not {source.size}")
    if known not in ("", found[algorithm]):
        raise Failed(f"{name} has {algorithm} {found[algorithm]}, but {known} is published")
    line, note = f"{found['sha256']}  {source.path.name}", f"{algorithm} as" if known else "no checksum is"
    print(f"{source.name}: sha256 {line} ({note} published)", flush=True)
    with contextlib.suppress(UserError):  # a shared folder may be read-only
        common.write_whole(source.beside(".sha256"), lambda file: file.write(f"{line}\n".encode()))
