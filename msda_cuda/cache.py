"""Where the compiled operator lies, who may change it there, and whether it is whole.

Reading order: cache -> extensions -> temporary -> private_folder -> check_private -> is_whole -> put -> lock.
"""

import contextlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import UserError, sha256

USER = getattr(os, "getuid", lambda: 0)()  # Windows has none


class BuildError(UserError):
    """There is no native operator. The message names the cause and the remedy in one line."""


def cache() -> Path:
    """A folder where compiled code lies for later processes. Raises OSError if this user has none."""
    with contextlib.suppress(OSError):
        tempfile.TemporaryFile(dir=private_folder(extensions() / "msda")).close()  # where the operator lies
        return extensions()
    return private_folder(temporary())


def extensions() -> Path:
    """PyTorch's extension cache."""
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    home = temporary() if home.startswith("~") else Path(home)  # neither HOME nor the system tells this user's home
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or home / "torch_extensions")


def temporary() -> Path:
    """This user's folder where the extension cache cannot be used."""
    return Path(tempfile.gettempdir(), f"msda-{USER}")


def private_folder(folder: Path) -> Path:
    """Make the folder, unless it is there, and resolve its links. Raises OSError if others could put code there."""
    for place in (folder.parent, folder):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()
    check_private(folder)
    return folder


def check_private(path: Path) -> None:
    """Raises PermissionError if another user could change this file or folder, or put one in its place."""
    if sys.platform == "win32":  # it has other rights than these, and each user a temporary folder
        return
    for place in (path, *path.parents):
        status, is_near = place.stat(), place in (path, path.parent)  # farther ones: containers show odd owners
        if is_near and status.st_uid not in (0, USER):
            raise PermissionError(0, "belongs to another user", str(place))
        others = 0o022 if is_near and status.st_gid != status.st_uid else 0o002  # a user's own group has its number
        if status.st_mode & others and not status.st_mode & stat.S_ISVTX:
            raise PermissionError(0, "others may write there (`chmod go-w` forbids it)", str(place))


def is_whole(library: Path) -> bool:
    """Is the library there, changed by nobody else, and as the SHA-256 beside it says?"""
    digest = library.with_suffix(".sha256")
    try:
        for file in (library, digest):
            check_private(file)
        return digest.read_text(errors="replace") == sha256(library)
    except OSError:  # absent, a folder, or not for this user to read
        return False


def put(built: Path, library: Path) -> None:
    """Rename a library that was built on the same disk to its place, its SHA-256 first.

    A kill between the two leaves a pair that does not fit, which is built again.
    """
    digest = built.with_suffix(".sha256")
    digest.write_text(sha256(built))
    for file in (digest, built):
        file.chmod(0o755)  # whatever the umask: a file that others may write is not loaded
        place = library.with_suffix(file.suffix)
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)  # which no file can replace
        os.replace(file, place)


@contextlib.contextmanager
def lock(path: Path, seconds: float) -> Iterator[None]:
    """Hold an exclusive lock on a file: under torchrun the first rank compiles, the others wait.

    The system drops the lock when its process ends. Raises BuildError if another process holds it for `seconds`.
    """
    import fcntl  # absent on Windows

    deadline = time.monotonic() + seconds
    with path.open("w") as file:
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.2)
        else:
            raise BuildError(f"another process has held {path} for {seconds:.0f} s; end it or delete the file")
        yield
