"""common.py: exit statuses, one line for each fault, files that are whole or the old ones."""

import importlib
import os
import time
from pathlib import Path

import pytest

import common
from common import UserError


def fail(error: BaseException):
    """A command that ends in this exception."""
    def work():
        raise error

    return work


@pytest.mark.parametrize(("work", "status", "line"), [
    (lambda: None, 0, ""),
    (lambda: 1, 1, ""),
    (fail(ValueError("a fault\n  of two lines")), 2, "error: a fault of two lines\n"),
    (lambda: Path("/no/such").read_text(), 2, "error: /no/such: No such file or directory\n"),
    (fail(OSError("the device is gone")), 2, "error: the device is gone\n"),
    (fail(KeyboardInterrupt()), 130, "error: interrupted\n"),
])
def test_a_command_ends_in_a_status_and_at_most_one_line(capsys, work, status, line):
    assert common.run(work) == status
    assert capsys.readouterr().err == line


def test_faults_of_the_program_are_no_users_faults():
    with pytest.raises(KeyError):
        common.run(fail(KeyError("x")))


def test_other_processes_complain_after_the_first(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert common.complain("a fault", 1) == 1
    assert waits == [3] and capsys.readouterr().err == "error: a fault\n" * 2


@pytest.mark.parametrize(("arguments", "message"), [
    (["--share", "1.5"], "argument --share: 1.5 is not a number from 0 to 1"),
    (["--share", "much"], "argument --share: much is not a number from 0 to 1"),
    (["--share", "nan"], "argument --share: nan is not a number from 0 to 1"),
    (["--count", "0"], "argument --count: 0 is not a positive whole number"),
    (["--count", "-3"], "argument --count: -3 is not a positive whole number"),
    (["more"], "unrecognized arguments: more"),
])
def test_a_wrong_option_is_one_line_and_status_2(capsys, arguments, message):
    parser = common.Parser(prog="x.py")
    parser.add_argument("--share", type=common.fraction)
    parser.add_argument("--count", type=common.positive)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message} (python x.py --help lists the options)\n"
    found = parser.parse_args(["--share", "0.25", "--count", "3"])
    assert (found.share, found.count) == (0.25, 3)


def test_a_file_is_written_whole_or_the_old_one_stays(tmp_path):
    path = tmp_path / "x"
    common.write_whole(path, lambda file: file.write(b"old"))
    for error in (OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed\nmore")):
        def write(file, error=error):
            file.write(b"new")
            raise error

        with pytest.raises(UserError, match=r"x cannot be written \((No space|Pytorch)[^\n]*: make room"):
            common.write_whole(path, write)
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]
    common.write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["x"]
    with pytest.raises(KeyboardInterrupt):
        common.write_whole(path, fail_with_interrupt)
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["x"]


def fail_with_interrupt(file):
    raise KeyboardInterrupt


def test_destinations_are_looked_at_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    common.make_folder(tmp_path / "a" / "b", "--out")
    common.check_file(tmp_path / "c" / "x.json", "--json")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "a/b", "c", "file"]
    for path, reason in [("file", "File exists"), ("file/x", "Not a directory")]:
        with pytest.raises(UserError, match=f"--out .*{path} cannot be used as a folder .{reason}.: mend it"):
            common.make_folder(tmp_path / path, "--out")
    with pytest.raises(UserError, match="--json .*a is a folder: name a file, in it or elsewhere"):
        common.check_file(tmp_path / "a", "--json")


@pytest.mark.parametrize("script", ["evaluate", "predict", "tools.report", "weights", "tools.prepare"])
def test_every_command_line_complains_in_one_line(capsys, script):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(["--bogus"])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and printed.err.endswith("--help lists the options)\n")
