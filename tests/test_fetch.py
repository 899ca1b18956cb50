"""fetch.py: downloads from a server on loopback that cuts, changes, refuses and lies; archives that are and are not."""

import errno
import fcntl
import hashlib
import io
import json
import os
import random
import re
import shutil
import stat
import subprocess
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock
from urllib.error import URLError

import pytest
from PIL import Image

import data
from common import UserError
from tools import fetch, prepare

FILE = random.Random(0).randbytes(300_000)  # the same in every process of the tests
DIGEST = hashlib.sha256(FILE).hexdigest()


@dataclass
class Page:
    """What the server gives for a path."""
    content: bytes = FILE
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"1"'})
    status: int = 200
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)  # in each of the first answers, how many bytes come
    conditional: bool = True  # whether If-Range is honoured
    length: bool = True
    wait: Callable[[], object] = lambda: None  # before the content
    hang_ups: int = 0  # how many requests get no answer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        page, asked = self.server.pages.get(self.path, Page(b"", status=404)), self.headers.get("Range")
        self.server.asked.append((self.path, asked))
        if page.hang_ups:
            page.hang_ups -= 1
            return
        same = not page.conditional or self.headers.get("If-Range") in page.headers.values()
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and page.ranges and same else None
        content, span, status = page.content[start:], f"{start}-{len(page.content) - 1}", page.status
        if start is not None:
            status, span = (206, span) if content else (416, "*")
        self.send_response(status)
        headers = {"Content-Length": str(len(content))} if page.length else {}
        headers |= {"Content-Range": f"bytes {span}/{len(page.content)}"} if start is not None else {}
        headers |= {"Content-Type": "text/html"} if status == 416 else {}  # as nginx does
        for name, value in {**headers, **page.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        page.wait()
        self.wfile.write(content[:page.cuts.pop(0)] if page.cuts else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """Its `pages` by path, the requests that it `asked`; `table(name={...})` writes the table of sources."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.pages, server.asked, server.address = {"/x": Page()}, [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FETCH_SOURCES", str(tmp_path / "table.json"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "PAUSES", (0, 0))
    monkeypatch.setattr(fetch, "TIMEOUT", 5)

    def table(*addresses: str, **fields: object) -> None:
        addresses = [address if ":" in address else server.address + address for address in addresses or ("/x",)]
        entry = {"what": "a file", "addresses": addresses, "path": "in/x.bin", **fields}
        (tmp_path / "table.json").write_text(json.dumps({"x": entry}))

    server.table = table
    table()
    yield server
    server.shutdown()
    server.server_close()


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.name != "table.json" and not path.is_dir())


def assert_fetched(content: bytes = FILE, path: str = "in/x.bin") -> None:
    """The file is in its place, whole, and recorded; nothing else is left."""
    assert Path(path).read_bytes() == content
    assert Path(f"{path}.sha256").read_text() == f"{hashlib.sha256(content).hexdigest()}  {Path(path).name}\n"
    assert files() == [path, f"{path}.sha256"]


def test_a_file_comes_whole_and_is_recorded_once(server, capsys) -> None:
    fetch.fetch(["x"])
    assert_fetched()
    assert f"{DIGEST}  x.bin (no checksum is published)" in capsys.readouterr().out
    fetch.fetch(["x", "x"])
    assert capsys.readouterr().out == "x: in/x.bin is here\n" * 2 and len(server.asked) == 1
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "x.bin.sha256"], cwd="in", check=True)


@pytest.mark.parametrize("checksum", [
    f"sha256:{DIGEST}", f"md5:{hashlib.md5(FILE).hexdigest()}", f"sha1:{hashlib.sha1(FILE).hexdigest()}"])
def test_a_known_checksum_is_compared_also_over_a_cut(server, capsys, checksum: str) -> None:
    server.pages["/x"].cuts = [100_000]
    server.table(checksum=checksum, size=len(FILE), path="in/it's a \"file\".bin")
    fetch.fetch(["x"])
    assert_fetched(path="in/it's a \"file\".bin")
    assert f"({checksum.partition(':')[0]} as published)" in capsys.readouterr().out


def test_a_cut_connection_goes_on_by_itself(server, capsys) -> None:
    server.pages["/x"].cuts = [0, 1000, 5, 0, 99_000]  # more than PAUSES has, but progress gives new tries
    fetch.fetch(["x"])
    assert_fetched()
    assert [asked for _, asked in server.asked] == [
        None, None, "bytes=1000-", "bytes=1005-", "bytes=1005-", "bytes=100005-"]
    assert "cut after 0.1 MB; next try in 0 s" in capsys.readouterr().out


def test_a_network_that_is_gone_in_the_middle_may_come_back(server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.pages["/x"].cuts = [1000]
    gone = URLError(OSError(errno.ENETUNREACH, "Network is unreachable"))
    calls = iter([fetch.urlopen, Mock(side_effect=gone), fetch.urlopen])
    monkeypatch.setattr(fetch, "urlopen", lambda *arguments, **options: next(calls)(*arguments, **options))
    fetch.fetch(["x"])
    assert_fetched()


def test_a_server_that_hangs_up_is_asked_again(server) -> None:
    server.pages["/x"].hang_ups = 2
    fetch.fetch(["x"])
    assert_fetched()
    assert len(server.asked) == 3


def leave_draft(server, size: int = 1000) -> None:
    """A first call that ends with so many bytes."""
    server.pages["/x"].cuts = [size, 0, 0]
    with pytest.raises(UserError, match="x cannot be fetched .*/x: cut after .*open http.* in a browser, put the file "
                                        "at in/x.bin and run `python data.py fetch x`"):
        fetch.fetch(["x"])
    assert files() == ["in/x.bin.partial", "in/x.bin.partial.tag"]
    assert Path("in/x.bin.partial").read_bytes() == server.pages["/x"].content[:size]
    server.asked.clear()


@pytest.mark.parametrize("headers", [{"ETag": '"1"'}, {"Last-Modified": "Sat, 01 May 2010 00:00:00 GMT"},
                                     {"ETag": 'W/"1"', "Last-Modified": "Sat, 01 May 2010 00:00:00 GMT"}])
def test_the_next_call_goes_on(server, capsys, headers: dict) -> None:
    server.pages["/x"].headers = headers
    leave_draft(server)
    fetch.show([])
    assert " 0.0 MB here " in capsys.readouterr().out
    fetch.fetch(["x"])
    assert_fetched()
    assert server.asked == [("/x", "bytes=1000-")] and "from byte 1000" in capsys.readouterr().out


@pytest.mark.parametrize(("changes", "asked"), [
    ({"headers": {"ETag": '"2"'}}, ["bytes=1000-"]),
    ({"headers": {"ETag": '"2"'}, "conditional": False}, ["bytes=1000-", None]),  # a server that knows no If-Range
    ({"ranges": False}, ["bytes=1000-"]),
    ({"content": FILE[1:1000]}, ["bytes=1000-", None]),  # 416: shorter now
    ({"headers": {"ETag": '"1"', "Content-Range": "bytes 0-299999/300000"}}, ["bytes=1000-"] + [None] * 2),
])
def test_two_files_are_never_mixed(server, changes: dict, asked: list) -> None:
    leave_draft(server)
    server.pages["/x"] = Page(**{"content": FILE[::-1], **changes})
    if "Content-Range" in server.pages["/x"].headers:  # another part than was asked for, once
        server.pages["/x"].wait = lambda: server.pages["/x"].headers.pop("Content-Range", None)
        asked.pop()
    fetch.fetch(["x"])
    assert_fetched(server.pages["/x"].content)
    assert [text for _, text in server.asked] == asked


def test_the_next_call_goes_on_with_the_newer_file(server, capsys) -> None:
    leave_draft(server)
    server.pages["/x"].headers = {"ETag": '"2"'}
    leave_draft(server, 500)
    capsys.readouterr()
    fetch.fetch(["x"])
    assert_fetched()
    assert server.asked == [("/x", "bytes=500-")] and "from byte 500" in capsys.readouterr().out


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"1"'}])
def test_without_a_strong_tag_all_is_begun_again(server, headers: dict) -> None:
    server.pages["/x"] = Page(headers=headers, cuts=[1000])
    fetch.fetch(["x"])
    assert_fetched()
    assert server.asked == [("/x", None)] * 2


def test_a_kill_before_the_last_step_costs_nothing(server, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "fsync", Mock(side_effect=[None, SystemExit]))  # of the record, of the file
        fetch.fetch(["x"])
    assert Path("in/x.bin.partial").read_bytes() == FILE and not Path("in/x.bin").exists()
    server.pages["/x"].cuts = [0, 0, 0]
    fetch.fetch(["x"])
    assert_fetched()


def test_mirrors_are_tried_in_order(server, capsys) -> None:
    server.table("/absent", "/html", "/short", "/busy", "/x", "/x", size=len(FILE))
    server.pages |= {"/html": Page(b"<html>", {"Content-Type": "text/html; charset=utf-8"}), "/short": Page(FILE[1:]),
                     "/busy": Page(b"", status=503)}
    fetch.fetch(["x"])
    assert_fetched()
    assert [path for path, _ in server.asked] == ["/absent", "/html", "/short", *["/busy"] * 3, "/x"]
    printed = capsys.readouterr().out
    for reason in ["/absent: 404 Not Found; next", "/html: a web page comes in place of the file; next",
                   "/short: its file has 299999 bytes, not 300000; next", "/busy: 503 Service Unavailable; next"]:
        assert reason in printed


def test_a_wrong_checksum_is_refused(server, capsys) -> None:
    checksum = f"sha256:{DIGEST}"
    server.pages["/wrong"] = Page(FILE[::-1])
    server.table("/wrong", "/x", checksum=checksum)
    fetch.fetch(["x"])
    assert_fetched()
    wrong = hashlib.sha256(FILE[::-1]).hexdigest()
    assert f"/wrong: the file has sha256 {wrong}, but {DIGEST} is published; next" in capsys.readouterr().out
    shutil.rmtree("in")
    server.table("/wrong", checksum=checksum)
    with pytest.raises(UserError, match=f"/wrong: the file has sha256 {wrong}, but {DIGEST} is published"):
        fetch.fetch(["x"])
    assert files() == []


def test_a_file_put_there_by_hand_is_checked(server, capsys) -> None:
    Path("in").mkdir()
    Path("in/x.bin").write_bytes(FILE[1:])
    fetch.fetch(["x"])
    assert_fetched(FILE[1:])
    Path("in/x.bin.sha256").unlink()
    server.table(checksum=f"sha256:{DIGEST}")
    with pytest.raises(UserError, match=f"in/x.bin: .* but {DIGEST} is published: remove it and run `python data.py"):
        fetch.fetch(["x"])
    assert files() == ["in/x.bin"] and not server.asked


def test_a_file_in_a_read_only_folder_is_taken(server, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("in").mkdir()
    Path("in/x.bin").write_bytes(FILE)
    monkeypatch.setattr("common.write_whole", Mock(side_effect=UserError("read-only")))
    fetch.fetch(["x"])
    assert DIGEST in capsys.readouterr().out and files() == ["in/x.bin"]


def test_redirects_are_followed_but_not_to_other_protocols(server, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(FILE)
    server.table("/file", "/loop", "/moved")
    server.pages |= {"/moved": Page(b"", {"Location": "/x"}, 302), "/loop": Page(b"", {"Location": "/loop"}, 301),
                     "/file": Page(b"", {"Location": f"file://{tmp_path}/secret"}, 302)}
    server.pages["/x"].cuts = [1000]
    fetch.fetch(["x"])
    assert [asked for asked in server.asked if asked[0] in ("/x", "/moved")] == [
        ("/moved", None), ("/x", None), ("/moved", "bytes=1000-"), ("/x", "bytes=1000-")]
    assert_fetched_beside = {"secret", "in/x.bin", "in/x.bin.sha256"}
    assert set(files()) == assert_fetched_beside


def test_a_silent_server_counts_as_cut(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT", 0.1)
    silence = threading.Event()
    server.pages["/x"].wait = lambda: silence.wait(10)
    with pytest.raises(UserError, match="/x: .*timed out"):
        fetch.fetch(["x"])
    silence.set()


def test_a_page_of_the_network_does_not_spoil_what_is_here(server) -> None:
    """Hotels and proxies answer every request with a page of their own."""
    leave_draft(server)
    good, server.pages["/x"] = server.pages["/x"], Page(b"<html>", {"Content-Type": "text/html"})
    with pytest.raises(UserError, match="a web page comes in place of the file"):
        fetch.fetch(["x"])
    server.pages["/x"] = good
    fetch.fetch(["x"])
    assert server.asked == [("/x", "bytes=1000-")] * 2
    assert_fetched()


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x", "http://no-such-host.invalid/x", "http://127.0.0.1:p/x",
                                     "http://127.0.0.1:9/a b", "http://[::1/x", "http://a..b/x", "https://127.0.0.1:9/"])
def test_without_network_one_line_says_what_to_do(server, capsys, monkeypatch, address: str) -> None:
    monkeypatch.setattr(time, "sleep", Mock(side_effect=AssertionError))  # no pauses where nothing can be cut
    server.table(address, "http://127.0.0.1:9/second")
    with pytest.raises(SystemExit) as leaving:
        prepare.main(["fetch", "x"])
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and error.count("\n") == 1 and not files()
    assert error.startswith(f"error: x cannot be fetched ({address}: ")
    assert "; http://127.0.0.1:9/second: Connection refused): try again later, or open " in error
    assert f" open {address} in a browser, put the file at in/x.bin and run `python data.py fetch x`" in error


def test_proxies_are_used(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.address)
    monkeypatch.setattr("urllib.request._opener", None)  # it keeps the proxies of its first use
    server.table("http://far.invalid/x")
    server.pages["http://far.invalid/x"] = Page()
    fetch.fetch(["x"])
    assert_fetched()


@pytest.mark.parametrize("ending", [b"0\r\n\r\n", b""])
def test_a_file_without_a_length_is_taken_only_where_its_end_is_known(server, ending: bytes) -> None:
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (FILE[:70_000], FILE[70_000:])) + ending
    server.pages["/x"] = Page(FILE, length=False)
    server.pages["/chunks"] = Page(body, {"Transfer-Encoding": "chunked"}, length=False)
    with pytest.raises(UserError, match="no length comes with the file"):
        fetch.fetch(["x"])
    server.table("/chunks")
    if ending:
        fetch.fetch(["x"])
    else:
        with pytest.raises(UserError, match="/chunks: IncompleteRead"):
            fetch.fetch(["x"])
        server.table(size=len(FILE))
        fetch.fetch(["x"])
    assert_fetched()


def test_a_file_of_another_size_than_is_known_is_refused(server) -> None:
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(FILE), FILE)
    server.pages["/x"] = Page(body, {"Transfer-Encoding": "chunked"}, length=False)  # which tells no size before
    server.table(size=1000)
    with pytest.raises(UserError, match="/x: the file has 300000 bytes, not 1000.: try again"):
        fetch.fetch(["x"])
    assert not files()
    Path("in/x.bin").write_bytes(FILE)
    with pytest.raises(UserError, match="in/x.bin: the file has 300000 bytes, not 1000: remove it"):
        fetch.fetch(["x"])


def test_ctrl_c_leaves_the_draft_and_says_how_to_go_on(server, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as leaving:
        patch.setattr(fetch, "CHUNK", 1000)
        patch.setattr(fetch.tqdm, "update", Mock(side_effect=KeyboardInterrupt))
        prepare.main(["fetch", "x"])
    assert leaving.value.code == 130
    assert capsys.readouterr().err == "error: interrupted: `python data.py fetch x` goes on\n"
    fetch.fetch(["x"])
    assert server.asked == [("/x", None), ("/x", "bytes=1000-")]
    assert_fetched()


def test_of_two_at_once_the_second_waits_and_says_so(server, capsys) -> None:
    begun, go = threading.Event(), threading.Event()
    server.pages["/x"].wait = lambda: (begun.set(), go.wait(10))
    both = [threading.Thread(target=fetch.fetch, args=[["x"]]) for _ in range(2)]
    both[0].start()
    assert begun.wait(10)
    both[1].start()
    printed = ""
    while "x: another process fetches it; waiting\n" not in printed and both[1].is_alive():
        printed += capsys.readouterr().out
        time.sleep(0.01)
    go.set()
    for thread in both:
        thread.join(10)
    assert_fetched()
    assert len(server.asked) == 1 and capsys.readouterr().out.endswith("x: in/x.bin is here\n")


def test_who_waited_does_not_share_its_lock_with_the_next(server) -> None:
    """The first process removes the tag on which the second waits; a third would make and lock a new one."""
    Path("in").mkdir()
    tag, there = Path("in/x.bin.partial.tag"), []
    server.pages["/x"].wait = lambda: there.append(tag.exists())
    with tag.open("a") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = threading.Thread(target=fetch.fetch, args=[["x"]])
        second.start()
        time.sleep(0.1)
        assert not server.asked
        tag.unlink()
    second.join(10)
    assert there == [True]
    assert_fetched()


def test_a_disk_without_locks_is_told(server, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    fetch.fetch(["x"])
    assert_fetched()
    assert "in/x.bin.partial.tag cannot be locked (Function not implemented): let one" in capsys.readouterr().out


def test_room_is_looked_for_before_and_during_the_download(server, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(UserError, match="x needs 0.3 MB, but in has 0.1 MB free: make"):
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        fetch.fetch(["x"])
    assert not files()
    leave_draft(server, 250_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        fetch.fetch(["x"])  # the rest has room
    assert_fetched()
    shutil.rmtree("in")
    server.table(path="in/x.tar", unpack="in/y")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="x needs 0.6 MB"):
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500_000))
        fetch.fetch(["x"])
    server.table()
    message = "x.bin cannot be written .No space left on device.: make room .*`python data.py fetch x` goes on"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
        patch.setattr(fetch.tqdm, "update", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        fetch.fetch(["x"])
    fetch.fetch(["x"])
    assert_fetched()


def test_a_place_that_cannot_be_used_is_one_line(server) -> None:
    Path("in").write_text("a file")
    with pytest.raises(UserError, match="x: in cannot be used as a folder .File exists."):
        fetch.fetch(["x"])


# ------------------------------------------------------------------------------------------------------------- archives
TREE = {"VOC/images/a.jpg": b"a" * 5000, "VOC/images/b.jpg": b"b", "VOC/lists/all.txt": b"a\nb\n", "readme": b"r"}


def tar(members: dict[str, bytes], mode: str = "w", special: Callable = lambda member: None) -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode=mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            special(member)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def zipped(members: dict[str, bytes], attributes: int = 0) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = attributes << 16
            archive.writestr(member, content)
    return file.getvalue()


def serve_archive(server, content: bytes, **fields: object) -> None:
    server.pages["/x"] = Page(content)
    server.table(**{"path": "in/x.archive", "unpack": "in/VOC/images", **fields})


@pytest.mark.parametrize("make", [tar, lambda tree: tar(tree, "w:gz"), zipped])
def test_archives_are_unpacked_into_a_tree_that_is_there(server, capsys, make: Callable) -> None:
    Path("in/VOC/lists").mkdir(parents=True)
    Path("in/VOC/labels.json").write_text("mine")
    Path("in/.x.archive.draft").mkdir()  # a kill has left it
    Path("in/VOC/lists/all.txt").write_text("mine")
    serve_archive(server, make(TREE))
    fetch.fetch(["x"])
    assert {name: Path("in", name).read_bytes() for name in TREE} == {**TREE, "VOC/lists/all.txt": b"mine"}
    assert files() == sorted([*(f"in/{name}" for name in TREE), "in/VOC/labels.json", "in/x.archive.sha256"])
    assert hashlib.sha256(make(TREE)).hexdigest() in Path("in/x.archive.sha256").read_text() or make is not tar
    assert not [*Path().rglob("*.draft")]
    assert "x: unpacked; in/x.archive is removed\nx: in/VOC/images is here\n" in capsys.readouterr().out
    fetch.fetch(["x"])
    assert capsys.readouterr().out == "x: in/VOC/images is here\n"


def test_an_empty_folder_is_not_taken_for_what_is_unpacked(server) -> None:
    Path("in/VOC/images").mkdir(parents=True)
    serve_archive(server, tar(TREE))
    fetch.fetch(["x"])
    assert {name: Path("in", name).read_bytes() for name in TREE} == TREE


def test_a_tar_of_a_point_is_unpacked(server) -> None:
    """As `tar cf x.tar .` makes it."""
    def folder(member: tarfile.TarInfo) -> None:
        member.type = tarfile.DIRTYPE if member.name == "." else tarfile.REGTYPE

    serve_archive(server, tar({".": b"", **{f"./{name}": content for name, content in TREE.items()}}, special=folder))
    fetch.fetch(["x"])
    assert {name: Path("in", name).read_bytes() for name in TREE} == TREE


@pytest.mark.parametrize("unpack", ["in/VOC/images/a.jpg", "in/VOC", "in/readme"])
def test_any_member_may_be_what_is_unpacked(server, unpack: str) -> None:
    serve_archive(server, zipped(TREE), unpack=unpack)
    fetch.fetch(["x"])
    assert {name: Path("in", name).read_bytes() for name in TREE} == TREE


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil-of-test-fetch", "VOC/../../evil", "..", "VOC/../VOC/evil"])
@pytest.mark.parametrize("make", [tar, zipped])
def test_members_that_lead_outside_are_refused(server, make: Callable, name: str) -> None:
    serve_archive(server, make({**TREE, name: b"evil"}))
    with pytest.raises(UserError, match=f"x.archive holds '{name}', a link or a path out of its folder"):
        fetch.fetch(["x"])
    assert files() == ["in/x.archive", "in/x.archive.sha256"] and not Path("/tmp/evil-of-test-fetch").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, "zip"])
def test_links_and_devices_are_refused(server, kind: bytes | str) -> None:
    def link(member: tarfile.TarInfo) -> None:
        if member.name == "VOC/link":
            member.type, member.linkname, member.size = kind, "..", 0

    content = (zipped({"VOC/link": b".."}, stat.S_IFLNK | 0o777) if kind == "zip" else
               tar({"VOC/link": b"", "VOC/link/evil": b"evil"}, special=link))
    serve_archive(server, content)
    with pytest.raises(UserError, match="x.archive holds 'VOC/link', a link or a path out of its folder"):
        fetch.fetch(["x"])
    assert files() == ["in/x.archive", "in/x.archive.sha256"]


@pytest.mark.parametrize(("content", "message"), [
    (tar(TREE)[:4000], "is a broken archive .unexpected end of data"),
    (tar(TREE, "w:gz")[:-20], "is a broken archive .Compressed file ended"),
    (zipped(TREE)[:-30], "is a broken archive .File is not a zip file"),
    (zipped(TREE)[:50] + b"??" + zipped(TREE)[52:], "is a broken archive"),
    (zipped(TREE).replace(b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"), "is a broken archive .*encrypted"),
    (FILE, "is a broken archive"),
    (tar({"other/a.jpg": b"a"}), "does not hold in/VOC/images: remove it and run `python data.py fetch x`"),
])
def test_broken_archives_leave_the_folder_as_it_was(server, content: bytes, message: str) -> None:
    serve_archive(server, content)
    with pytest.raises(UserError, match=f"in/x.archive {message}"):
        fetch.fetch(["x"])
    assert files() == ["in/x.archive", "in/x.archive.sha256"]


@pytest.mark.parametrize("step", ["extract", "rename"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_unpacking_goes_on_without_a_download(server, monkeypatch, step: str, error) -> None:
    target, name = {"extract": (tarfile.TarFile, "extract"), "rename": (Path, "rename")}[step]
    serve_archive(server, tar(TREE))
    real, left = getattr(target, name), [2]

    def some(*arguments: object, **options: object) -> object:
        left[0] -= 1
        return real(*arguments, **options) if left[0] >= 0 else Mock(side_effect=error)()

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, UserError), match="fetch x` goes on"):
        patch.setattr(target, name, some)
        fetch.fetch(["x"])
    assert not Path("in/VOC/images").exists() and not [*Path().rglob("*.draft")]
    fetch.fetch(["x"])
    assert {name: Path("in", name).read_bytes() for name in TREE} == TREE and len(server.asked) == 1


def test_an_archive_put_there_by_hand_is_checked_and_unpacked(server) -> None:
    archive = tar(TREE)
    serve_archive(server, archive, checksum=f"sha256:{DIGEST}")
    Path("in").mkdir()
    Path("in/x.archive").write_bytes(archive)
    with pytest.raises(UserError, match=f"{DIGEST} is published: remove it and run"):
        fetch.fetch(["x"])
    serve_archive(server, archive)
    fetch.fetch(["x"])
    assert Path("in/VOC/images/b.jpg").read_bytes() == b"b" and not server.asked


def test_a_part_of_the_tree_may_lie_on_another_disk(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft is made where the pictures go, as a file cannot be renamed from disk to disk."""
    Path("in").mkdir()
    Path("far").mkdir()
    Path("in/VOC").symlink_to(tmp_path / "far")
    serve_archive(server, tar({name: content for name, content in TREE.items() if name != "readme"}))
    rename = Path.rename

    def on_one_disk(path: Path, target: Path) -> Path:
        assert path.resolve().is_relative_to(tmp_path / "far")
        assert target.parent.resolve().is_relative_to(tmp_path / "far")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", on_one_disk)
    fetch.fetch(["x"])
    assert Path("far/images/b.jpg").read_bytes() == b"b"


# ------------------------------------------------------------------------------------------------------------ the table
def test_unknown_names_list_the_known_ones(server, capsys) -> None:
    fields = {"addresses": ["http://127.0.0.1:9/"], "size": 2_500_000}
    table = {name: {"what": f"about {name}", "path": f"in/{name}", **fields}
             for name in ("voc2010", "beit:large", "a b's")}
    Path("table.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match="no 'beit-large' to fetch: choose of beit:large, .*voc2010"):
        fetch.fetch(["voc2010", "beit-large"])
    with pytest.raises(UserError, match="say what to fetch: voc2010, beit:large, a b's .--list tells more"):
        prepare.build_parser().parse_args(["fetch"]).command([], False)
    assert fetch.sources()["a b's"].command == """python data.py fetch 'a b'"'"'s'"""
    capsys.readouterr()
    Path("in").mkdir()
    Path("in/voc2010").write_text("")
    prepare.main(["fetch", "--list"])
    assert [line.split() for line in capsys.readouterr().out.splitlines()][:6] == [
        ["voc2010", "here", "about", "voc2010,", "2.5", "MB"], ["from", "http://127.0.0.1:9/"], ["to", "in/voc2010"],
        ["beit:large", "absent", "about", "beit:large,", "2.5", "MB"], ["from", "http://127.0.0.1:9/"],
        ["to", "in/beit:large"]]


@pytest.mark.parametrize("change", [
    {"addresses": "http://127.0.0.1/x"}, {"addresses": []}, {"addresses": ["file:///etc/passwd"]}, {"addresses": [1]},
    {"addresses": None}, {"path": 3}, {"path": ""}, {"size": "10 MB"}, {"size": 0}, {"size": True}, {"checksum": "abc"},
    {"checksum": "sha256:abc"}, {"checksum": f"crc:{'0' * 32}"}, {"checksum": 5}, {"unpack": "far/y"}, {"unpack": 1},
    {"adress": "x"}, {"published": 3}, None, [], "text", "\udcff", "{",
])
def test_a_malformed_table_is_one_line(server, change: object) -> None:
    server.table(**change if isinstance(change, dict) else {})
    if not isinstance(change, dict):
        Path("table.json").write_bytes(change.encode(errors="surrogateescape") if isinstance(change, str) else
                                       json.dumps({"x": change}).encode())
    with pytest.raises(UserError, match="table.json is no table of sources .*: mend it"):
        fetch.sources()


def test_an_absent_table_is_one_line(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FETCH_SOURCES", "nowhere.json")
    with pytest.raises(UserError, match="nowhere.json is no table of sources .file: No such file"):
        fetch.fetch(["x"])


def test_two_commands_are_the_whole_preparation_of_pascal_context(server) -> None:
    """Our own table, but for the addresses and the checksum."""
    sample = Path(__file__).parent / "golden" / "context_sample.json"
    images = json.loads(sample.read_text())["images"]
    pictures = {}
    for image in images:
        Image.new("RGB", (image["width"], image["height"])).save(file := io.BytesIO(), "jpeg")
        pictures[f"VOCdevkit/VOC2010/JPEGImages/{image['file_name']}"] = file.getvalue()
    server.pages |= {"/voc2010": Page(tar(pictures)), "/context": Page(sample.read_bytes())}
    table = {name: {**json.loads(fetch.TABLE.read_text())[name], "addresses": [f"{server.address}/{name}"]}
             for name in ("voc2010", "context")}
    for entry in table.values():
        entry.pop("checksum", None), entry.pop("size", None)
    Path("table.json").write_text(json.dumps(table))
    prepare.main(["fetch", "context", "voc2010"])
    prepare.main(["prepare-context", "--workers", "1"])
    names = [data.open_dataset("data/VOCdevkit/VOC2010", split).names for split in ("train", "val")]
    assert sorted(sum(names, [])) == sorted(Path(image["file_name"]).stem for image in images)


def test_our_own_table_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FETCH_SOURCES", raising=False)
    table = fetch.sources()
    assert {"checkpoint:mask2former-base", "beit:large", "voc2010", "context"} <= set(table)
    assert len({source.path for source in table.values()}) == len(table)
