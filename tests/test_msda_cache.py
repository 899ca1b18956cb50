"""msda_cuda/cache.py and what build.py does with it: one whole library for all processes, from nobody else's hand."""

import multiprocessing
import os
import pwd
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from torch.utils import cpp_extension

import common
from msda_cuda import build, cache, ops

LIBRARY = bytes(range(256)) * 8


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """An empty cache below a private folder, and a compiler that writes LIBRARY and a line into the file returned."""
    log = tmp_path / "log"
    log.touch()

    def load(name, sources, build_directory, **_):
        time.sleep(0.1)
        (Path(build_directory) / f"{name}.so").write_bytes(LIBRARY)
        with log.open("a") as file:
            file.write("built\n")

    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    for name, value in {"CXX": "/bin/sh", "TORCH_EXTENSIONS_DIR": str(tmp_path / "own" / "extensions")}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "temporary").mkdir(mode=0o700)
    return log


def count(log):
    return len(log.read_text().splitlines())


def make_folder(path):
    path.unlink()
    path.mkdir()
    (path / "file").touch()


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES = {
    **{f"cut at {size}": lambda path, size=size: os.truncate(path, size) for size in (0, 1, 1024, len(LIBRARY) - 1)},
    **{f"bit {at}": lambda path, at=at: flip(path, at) for at in (0, 1024, -1)},
    "longer": lambda path: path.write_bytes(LIBRARY + b"\0"),
    "folder": make_folder,
    "dangling link": lambda path: (path.unlink(), path.symlink_to("absent")),
    "no hash": lambda path: path.with_suffix(".sha256").unlink(),  # as an older checkout built it
    "empty hash": lambda path: os.truncate(path.with_suffix(".sha256"), 0),
    "cut hash": lambda path: os.truncate(path.with_suffix(".sha256"), 63),
    "changed hash": lambda path: flip(path.with_suffix(".sha256"), 9),
    "no text": lambda path: path.with_suffix(".sha256").write_bytes(b"\xff\0" * 32),
    "folder for a hash": lambda path: make_folder(path.with_suffix(".sha256")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_library_is_built_again_with_one_line(builds, capsys, damage):
    path = build.library()
    assert path.read_bytes() == LIBRARY and capsys.readouterr().err.startswith("Building deformable attention, once: ")
    damage(path)
    assert [build.library() for _ in range(2)] == [path, path] and path.read_bytes() == LIBRARY
    first, last = capsys.readouterr().err.splitlines()
    again = f"Building deformable attention, again, since {path} is damaged or without its SHA-256: "
    assert count(builds) == 2 and first.startswith(again) and last.startswith(f"Built {path} in ")


def test_a_library_that_this_user_may_not_read_is_built_again(builds, monkeypatch):
    def sha256(file):
        if file == path and count(builds) == 1:
            raise PermissionError(13, "Permission denied", str(file))  # simulated: root may read all
        return common.sha256(file)

    path = build.library()
    monkeypatch.setattr(cache, "sha256", sha256)
    assert build.library() == path and cache.is_whole(path) and count(builds) == 2


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_leaves_a_pair_that_fits_or_is_built_again(builds, renames):
    """A process ends as by kill -9 before the first, the second and after the last rename."""
    path = build.library()
    path.write_bytes(b"damaged")
    if (child := os.fork()) == 0:
        replace, left = os.replace, [None] * renames
        os.replace = lambda *names: replace(*names) if left and left.pop() is None else os._exit(9)
        build.library()
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_bytes() in (b"damaged", LIBRARY) and cache.is_whole(path) == (renames == 2)
    assert build.library() == path and cache.is_whole(path) and count(builds) == (2 if renames == 2 else 3)
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".lock", ".sha256", ".so"]  # no draft is left


def use(barrier):
    barrier.wait()
    return build.library().read_bytes() == LIBRARY


@pytest.mark.parametrize("before", [None, b"damaged"])
def test_eight_processes_at_once_build_once_and_load_only_what_is_whole(builds, before):
    path = build.library()
    path.write_bytes(before) if before else path.unlink()
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(8), context.Queue()
    children = [context.Process(target=lambda: answers.put(use(barrier))) for _ in range(8)]
    for child in children:
        child.start()
    assert [answers.get(timeout=60) for _ in children] == [True] * 8
    for child in children:
        child.join()
    assert count(builds) == 2


def test_a_damaged_library_ends_no_process(tmp_path):
    """A library that was cut is a bus error for the process that loads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        patch.setenv("FORCE_CUDA", "0")
        name = build.plan().name
    if not (good := ops.native().library):
        pytest.skip(f"no native operator here: {ops.native().reason}")
    (tmp_path / "msda").mkdir(mode=0o700)
    for suffix in (".so", ".sha256"):
        shutil.copy(Path(good).with_suffix(suffix), tmp_path / "msda" / f"{name}{suffix}")
    os.truncate(tmp_path / "msda" / f"{name}.so", 20000)
    code = "from msda_cuda import active_path; print(active_path('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "TMPDIR": str(tmp_path),
                               "CXX": "gone", "MSDA": "auto"})
    assert (done.returncode, done.stdout) == (0, "torch\n") and "no C++ compiler (gone)" in done.stderr


@pytest.mark.parametrize("place, mode, taken", [
    ("own/extensions/msda", 0o777, "temporary"), ("own/extensions", 0o777, "temporary"), ("own", 0o777, "temporary"),
    ("own", 0o1777, "own"),  # as /tmp: others may write there, but rename nothing of this user's
    ("own/extensions/msda", 0o755, "own"),
    ("own/extensions/msda", 0o775, "own" if os.getuid() == os.getgid() else "temporary"),
    ("own", 0o775, "own"),  # the folder of a project
])
def test_a_folder_where_others_may_write_is_not_taken(builds, tmp_path, capsys, place, mode, taken):
    assert build.library().is_relative_to(tmp_path / "own")
    (tmp_path / place).chmod(mode)
    capsys.readouterr()
    assert build.library().is_relative_to(tmp_path / taken) and count(builds) == (1 if taken == "own" else 2)
    reason = f"{tmp_path / place}: others may write there (`chmod go-w` forbids it); {tmp_path}/temporary/msda-"
    assert capsys.readouterr().err.startswith(reason if taken == "temporary" else "")
    (tmp_path / "temporary").chmod(0o777)
    if taken == "temporary":
        with pytest.raises(build.BuildError, match=f"{place}: others may .*temporary: others may .*folder of your own"):
            build.library()


@pytest.mark.parametrize("suffix, mode", [(".so", 0o777), (".sha256", 0o646)])
def test_a_file_that_others_may_write_is_built_again(builds, suffix, mode):
    before = os.umask(0)  # under which a new file is for everybody to write
    try:
        path = build.library()
        assert cache.is_whole(path) and cache.is_whole(build.library()) and count(builds) == 1
        path.with_suffix(suffix).chmod(mode)
        assert cache.is_whole(build.library()) and count(builds) == 2
    finally:
        os.umask(before)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_code_of_other_users_is_not_loaded(builds, tmp_path):
    path = build.library()
    for suffix in (".so", ".sha256"):
        os.chown(path.with_suffix(suffix), 12345, -1)
        assert build.library() == path and cache.is_whole(path)  # compiled anew in its place
    assert count(builds) == 3
    os.chown(path.parent, -1, 12345)  # a group with other members
    path.parent.chmod(0o775)
    assert not cache.is_whole(path)
    path.parent.chmod(0o755)
    assert cache.is_whole(path)
    for place in (path.parent, path.parents[1]):
        os.chown(place, 12345, -1)
        assert build.library().is_relative_to(tmp_path / "temporary")
        os.chown(place, 0, -1)
    os.chown(path.parents[2], -1, 12345)
    path.parents[2].chmod(0o775)  # as ~/.cache under the umask 002: compiled graphs stay beside the operator
    assert build.library() == path and cache.cache() == path.parents[1]
    path.parents[2].chmod(0o755)
    os.chown(path.parents[2], 12345, -1)  # as a user's folder in a container where this process is root
    assert build.library() == path


def test_a_cache_that_takes_no_file_is_replaced_by_a_temporary_folder(builds, tmp_path, capsys):
    (tmp_path / "own").write_text("a file where the folder should be: nobody can write below it")
    path = build.library()
    assert path.parent.parent == tmp_path / "temporary" and cache.cache() == path.parent and count(builds) == 1
    assert capsys.readouterr().err.startswith(f"{tmp_path}/own")
    (tmp_path / "temporary").rename(tmp_path / "gone")
    (tmp_path / "temporary").write_text("")
    with pytest.raises(build.BuildError, match="no cache can be used .* set TORCH_EXTENSIONS_DIR to a folder of your"):
        build.library()
    with pytest.raises(OSError, match="temporary"):
        cache.cache()


@pytest.mark.parametrize("home, place", [
    ({"HOME": "a/home"}, "a/home/.cache/torch_extensions"), ({"XDG_CACHE_HOME": "xdg"}, "xdg/torch_extensions"),
    ({}, f"temporary/msda-{os.getuid()}/torch_extensions"),  # no HOME, and a user's number without a name
    ({"HOME": "log/home"}, f"temporary/msda-{os.getuid()}"),  # where nobody can make a folder
])
def test_a_user_without_a_home_has_a_cache(builds, tmp_path, monkeypatch, home, place):
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in home.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    assert cache.cache() == tmp_path / place
    assert build.library().is_relative_to(tmp_path / place) and count(builds) == 1


def test_a_lock_that_is_never_freed_is_named(tmp_path):
    path = tmp_path / "op.lock"
    with cache.lock(path, 1), pytest.raises(build.BuildError, match=f"has held {path} for 0 s"), cache.lock(path, 0.3):
        pass
    with cache.lock(path, 0.3):  # freed: taken at once, though the file is still there
        assert path.exists()


def test_windows_has_no_user_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "getuid")
    for name in ("HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    tmp_path.chmod(0o777)
    assert cache.cache() == tmp_path
    with pytest.raises(build.BuildError, match="not supported on Windows; MSDA=torch silences this"):
        build.library()
