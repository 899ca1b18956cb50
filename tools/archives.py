"""Archives of others, unpacked without leaving their folder. Reading order: unpack -> extract, merge."""

import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from common import reason


class Refused(Exception):
    """The archive is broken, unsafe or another one; the message says why."""


def unpack(archive: Path, wanted: Path) -> None:
    """Unpack a tar or zip archive into its folder, then remove it. What is there is kept; the path `wanted` comes last.

    Raises Refused; then the folder is as before.
    """
    drafts = [folder / f".{archive.name}.draft" for folder in wanted.parents if folder.is_dir()]
    for draft in drafts:  # what a kill has left
        shutil.rmtree(draft, ignore_errors=True)
    draft = drafts[0]  # on the disk where it will be
    try:
        extract(archive, draft)
        if not (draft / wanted.relative_to(archive.parent)).exists():
            raise Refused(f"{archive} does not hold {wanted}")
        merge(draft, archive.parent, wanted)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the disk
        raise Refused(f"{archive} is a broken archive ({reason(error)})") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    archive.unlink()


def extract(archive: Path, draft: Path) -> None:
    """Unpack a tar archive, plain or compressed, or a zip archive. Raises Refused for a link or a path outside."""
    is_tar = tarfile.is_tarfile(archive)
    options = {"filter": "data"} if is_tar and hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
    with (archive.open("rb") as file,
          tqdm.wrapattr(file, "read", total=archive.stat().st_size, desc="unpacking", disable=None) as read,
          tarfile.open(fileobj=read) if is_tar else zipfile.ZipFile(read) as content):
        for member in content if is_tar else content.infolist():
            name = Path(member.name if is_tar else member.filename)
            link = not member.isreg() and not member.isdir() if is_tar else stat.S_ISLNK(member.external_attr >> 16)
            if link or name.is_absolute() or ".." in name.parts:
                raise Refused(f"{archive} holds '{name}', a link or a path out of its folder")
            content.extract(member, draft, **options)


def merge(draft: Path, folder: Path, last: Path) -> None:
    """Move what the folder lacks from the draft into it. The path `last` is moved when all others are there."""
    for entry in sorted(draft.iterdir(), key=lambda entry: folder / entry.name in (last, *last.parents)):
        target = folder / entry.name
        if target in last.parents:
            target.mkdir(exist_ok=True)
        if target.is_dir() and entry.is_dir() and target != last:
            merge(entry, target, last)
        elif target == last or not target.exists():
            entry.rename(target)  # also over an empty folder
