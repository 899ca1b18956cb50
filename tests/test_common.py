"""common.py: exit statuses, one line for each fault, files and folders that are whole or the old ones."""

import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import small
import torch
from conftest import ROOT

import common
from common import UserError
from tools.check import check


@pytest.mark.parametrize(("work", "status", "line"), [
    (lambda: None, 0, ""),
    (lambda: 1, 1, ""),
    (Mock(side_effect=ValueError("a fault\n  of two lines")), 2, "error: a fault of two lines\n"),
    (lambda: Path("/no/such").read_text(), 2, "error: /no/such: No such file or directory\n"),
    (Mock(side_effect=OSError("the device is gone")), 2, "error: the device is gone\n"),
    (Mock(side_effect=KeyboardInterrupt), 130, "error: interrupted\n"),
])
def test_a_command_ends_in_a_status_and_at_most_one_line(capsys, work, status, line):
    assert common.run(work) == status
    assert capsys.readouterr().err == line


def test_faults_of_the_program_are_no_users_faults():
    with pytest.raises(KeyError):
        common.run(Mock(side_effect=KeyError("x")))


def test_a_users_fault_is_printable():
    assert str(UserError("two\nlines of \x1b[31mred")) == "two?lines of ?[31mred"
    fault = UserError("x.json: 'a" + 9999 * "b" + "c': mend it")
    assert len(str(fault)) == 500 and str(fault).startswith("x.json: 'ab") and str(fault).endswith("bc': mend it")
    assert str(UserError(str(fault))) == str(fault)  # as one from another process is


@pytest.mark.parametrize(("error", "why"), [
    (KeyError("a"), "KeyError: 'a'"), (OverflowError("too\nlarge"), "OverflowError: too"), (OSError(2, "gone"), "gone"),
    (RecursionError("deep"), "RecursionError: deep"), (UnicodeDecodeError("utf-8", b"a", 0, 1, "odd"), ".*odd"),
])
def test_what_odd_content_raises_is_one_line(error, why):
    with pytest.raises(UserError, match=rf"^no list \({why}\): mend it$"), common.reading("no list", "mend it"):
        raise error


@pytest.mark.parametrize("error", [UserError("mine"), AssertionError("a bug")])
def test_a_known_fault_and_a_bug_are_no_odd_content(error):
    with pytest.raises(type(error), match=f"^{error}$"), common.reading("no list", "mend it"):
        raise error


def test_other_processes_complain_after_the_first(monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", sleep := Mock())
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert common.complain("a fault", 1) == 1 and capsys.readouterr().err == "error: a fault\n"
    sleep.assert_called_once_with(3)


@pytest.mark.parametrize(("name", "good", "wrong", "meaning"), [
    ("fraction", "0.25", ["1.5", "much", "nan"], "a number from 0 to 1"),
    ("positive", "3", ["0", "-3", "1.0"], "a positive whole number"),
    ("natural", "0", ["-1", "1.0"], "a whole number from 0 up"),
    ("rate", "1e-4", ["0", "inf", "nan"], "a positive number"),
])
def test_a_wrong_number_is_one_line_and_status_2(capsys, name, good, wrong, meaning):
    parser = common.Parser(prog="x.py")
    parser.add_argument("--option", type=getattr(common, name))
    assert parser.parse_args(["--option", good]).option == float(good)
    for text in wrong:
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(["--option", text])
        message = f"error: argument --option: {text} is not {meaning} (python x.py --help lists the options)\n"
        assert stop.value.code == 2 and capsys.readouterr().err == message


@pytest.mark.parametrize(("error", "raised"), [
    (OSError(28, "No space left on device"), UserError),
    (RuntimeError("PytorchStreamWriter failed\nmore"), UserError),
    (KeyboardInterrupt(), KeyboardInterrupt),
])
def test_a_file_is_written_whole_or_the_old_one_stays(tmp_path, error, raised):
    path = tmp_path / "x"
    common.write_whole(path, lambda file: file.write(b"old"))
    message = r"x cannot be written \((No space|Pytorch)[^\n]*: make room" if raised is UserError else None
    with pytest.raises(raised, match=message):
        common.write_whole(path, lambda file: (file.write(b"new"), Mock(side_effect=error)()))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]
    common.write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["x"]


def test_a_folder_is_new_and_whole_or_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt), common.new_folder(tmp_path / "a") as draft:
        (draft / "x").write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with common.new_folder(tmp_path / "a") as draft:
        (draft / "x").write_text("whole")
    with pytest.raises(OSError), common.new_folder(tmp_path / "a") as draft:
        (draft / "x").write_text("of a process that comes too late")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a" / "x").read_text() == "whole"


def test_destinations_are_looked_at_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    common.make_folder(tmp_path / "a" / "b", "--out")
    common.check_file(tmp_path / "c" / "x.json", "--json")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "a/b", "c", "file"]
    for path, reason in [("file", "File exists"), ("file/x", "Not a directory")]:
        with pytest.raises(UserError, match=f"--out .*{path} cannot be used as a folder .{reason}.: mend it"):
            common.make_folder(tmp_path / path, "--out")
    for place in (tmp_path / "a", Path("/dev/null")):
        with pytest.raises(UserError, match=f"--json {place} is a folder or a device: name a file, in it or elsewhere"):
            common.check_file(place, "--json")


def test_parallel_results_come_in_order():
    assert list(common.in_parallel(abs, [-3, 2, -1], 2, "title")) == [3, 2, 1]


def die_at(number: int, once: Path | None, job: int) -> int:
    """The job's number doubled; at one number the process dies, if `once` is given the first time only."""
    if job == number and not (once and once.exists()):
        if once:
            once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * job


@pytest.mark.parametrize("number", [0, 7, 39])
def test_a_job_that_kills_its_process_is_named(tmp_path, capsys, number):
    done = []
    with pytest.raises(UserError, match=f"^{number}: the process that reads it dies, .*: replace the file or take it"):
        done += common.in_parallel(partial(die_at, number, None), range(40), 2, "title")
    assert list(common.in_parallel(partial(die_at, number, tmp_path / "once"), range(40), 2, "title")) == [
        2 * job for job in range(40)]  # memory was short for two at once, say
    assert capsys.readouterr().err == ""


def test_jobs_reach_workers_that_share_no_memory_with_this_process(monkeypatch, tmp_path, capsys):
    """Data sets, functions and results travel as bytes: by default so on macOS, and on Linux from Python 3.14."""
    monkeypatch.setattr(common, "ProcessPoolExecutor",
                        partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn")))
    assert check(small.write_data(tmp_path / "data"), tmp_path / "sheet.png", workers=1) == 0
    assert "8 train images, 3 val images" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["evaluate", "predict", "tools.report", "tools.convert", "tools.prepare"])
def test_every_command_line_complains_in_one_line(capsys, script):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(["--bogus"])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and printed.err.endswith("--help lists the options)\n")


COMMANDS = [path for folder in (ROOT, ROOT / "tools", ROOT / "msda_cuda") for path in sorted(folder.glob("*.py"))
            if "if __name__ ==" in path.read_text()]


@pytest.mark.parametrize("path", COMMANDS, ids=[str(path.relative_to(ROOT)) for path in COMMANDS])
def test_every_command_refuses_an_older_python_at_its_start(monkeypatch, capsys, path):
    for name in {file.stem for file in ROOT.glob("*.py")} | {"tools", "msda_cuda", "fast"}:
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    monkeypatch.setattr(sys, "argv", [path.name])
    with pytest.raises(SystemExit) as stop:
        if path.parent == ROOT or path.name == "build.py":
            runpy.run_path(str(path), run_name="__main__")
        else:
            runpy.run_module(".".join(path.relative_to(ROOT).with_suffix("").parts), run_name="__main__")
    assert stop.value.code == 2
    # A line before it may be PyTorch's: a CUDA toolkit without a GPU.
    assert capsys.readouterr().err.splitlines()[-1] == ("error: Python 3.10 is too old for this code: "
                                                        "make an environment of Python 3.11 or newer")


DRIVER = "NVRM version: NVIDIA UNIX {}x86_64  {}  Tue Jul 29 17:01:27 UTC 2025\nGCC version:  gcc version 12.2.0\n"
CPU_REMEDY = "--device cpu takes the CPU"


@pytest.mark.parametrize(("driver", "wheel", "told"), [
    (DRIVER.format("Kernel Module  ", "535.104.05"), "13.0", ["driver 535.104.05 is too old", "CUDA 13.0", "to 580 or",
                                                              "https://download.pytorch.org/whl/cu126`"]),
    (DRIVER.format("Open Kernel Module for ", "470.82"), "12.6", ["driver 470.82 is too old", "12.6", "to 525 or"]),
    (DRIVER.format("", "580.65.06"), "13.2", ["CUDA 13.2", "(580.65.06; 580 or newer", "no GPU is visible;"]),
    (None, "13.0", ["CUDA 13.0", "(of unknown version; 580 or newer"]),  # a container shows the device alone
])
def test_a_gpu_that_cannot_be_used_is_told_instead_of_taking_the_cpu(monkeypatch, tmp_path, driver, wheel, told):
    def no_cuda(*_, device):
        if device.startswith("cuda"):
            raise RuntimeError("no GPU is visible\nand more")
        return Mock(device=device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "zeros", no_cuda)
    monkeypatch.setattr(torch.version, "cuda", wheel)
    monkeypatch.setattr(common, "NVIDIA_DEVICE", tmp_path / "nvidia0")
    monkeypatch.setattr(common, "NVIDIA_DRIVER", tmp_path / "version")
    assert common.choose_device(None) == "cpu"  # a machine without such a GPU
    with pytest.raises(UserError, match="device 'cuda' cannot be used here: choose"):
        common.choose_device("cuda")
    (tmp_path / ("version" if driver else "nvidia0")).write_text(driver or "")
    for name in (None, "cuda", "cuda:1"):
        with pytest.raises(UserError) as fault:
            common.choose_device(name)
        assert all(text in str(fault.value) for text in [*told, CPU_REMEDY])
    assert common.choose_device("cpu") == "cpu" and not torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert common.choose_device(None) == "cpu"
    monkeypatch.setattr(torch.version, "cuda", None)  # a build without CUDA
    assert common.choose_device(None) == "cpu"


def test_the_remedy_for_an_older_driver_names_the_versions_that_are_tested():
    pins = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("torch")]
    assert len(pins) == 2 and all(f" {pin} " in common.OLDER_CUDA for pin in pins)
    assert common.OLDER_CUDA.partition("`")[2].partition("`")[0] in " ".join((ROOT / "README.md").read_text().split())


def test_the_commands_start_without_what_windows_lacks():
    code = ("import sys; sys.modules.update(fcntl=None, resource=None); "
            "import evaluate, predict, train, tools.prepare, tools.report")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "MSDA": "torch"})
