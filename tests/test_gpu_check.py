"""tools/gpu_check.py: the checks themselves, on a GPU (pytest -m gpu) and as far as a CPU can; what they say of faults.

`pretended_cuda` lets the lines for a GPU run on a CPU: tensors that are sent to CUDA stay, and torch.cuda is a fake.
"""

import math
import re
import subprocess
import sys
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from small import small_model
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.overrides import TorchFunctionMode

from tools import bench, gpu_check, gpu_numbers
from tools.gpu_check import CHECKS, CPU, FAILED, LEFT_OUT, PASSED, UNUSED, LeftOut, Result, results_of

CUDA = torch.device("cuda")
LONG = {"layouts": pytest.mark.slow, "runs": pytest.mark.slow}


class Pretended(TorchFunctionMode):
    """What is made on CUDA or sent there stays on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def here(x):
            return "cpu" if isinstance(x, (str, torch.device)) and str(x).startswith("cuda") else x

        return function(*map(here, args), **{name: here(x) for name, x in (kwargs or {}).items()})


@pytest.fixture
def pretended_cuda(monkeypatch):
    def sync_debug_mode(mode):
        if mode == "warn":
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)

    of_gpu = SimpleNamespace(major=9, minor=0, total_memory=8e10)
    for name, result in {"synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None, "device_count": 2,
                         "max_memory_allocated": 2e9, "get_device_properties": of_gpu, "get_device_name": "H0"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, result=result: result)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", sync_debug_mode)
    monkeypatch.setattr(gpu_numbers, "active_path", lambda device: "native")

    def device_work(work):
        work()
        return [(f"void msda::(anonymous namespace)::{way}_kernel<float, 4>", seconds)
                for way, seconds in (("forward", 0.5e-3), ("backward", 1.5e-3))]

    monkeypatch.setattr(bench, "device_work", device_work)
    with Pretended(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CUDA is not available")  # autocast switches itself off
        yield


def results(name: str, device: torch.device) -> list[Result]:
    return [each for each in results_of(name, device) if isinstance(each, Result)]


def outcomes(check, device: torch.device = CPU) -> dict[str, str]:
    return {each.name: each.outcome for each in check(device) if isinstance(each, Result)}


@pytest.mark.parametrize("name", [
    *(pytest.param(name, marks=LONG.get(name, [])) for name in ("operator", "attention", "models", *LONG))])
def test_on_a_cpu(name):
    found = results(name, CPU)
    assert [each for each in found if each.outcome == FAILED] == []
    if found[0].outcome == LEFT_OUT:
        pytest.skip(found[0].found)  # no compiler


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name):
    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible")
    found = results(name, torch.device("cuda", 0))
    assert [each for each in found if each.outcome == FAILED] == []
    if all(each.outcome == LEFT_OUT for each in found):
        pytest.skip(found[0].found)


@pytest.mark.parametrize("name", ["operator", "models"])
def test_lines_for_a_gpu_run(name, pretended_cuda, monkeypatch):
    monkeypatch.setattr(bench, "OP_CALLS", {"small": (((4, 6), (2, 3)), 30, 2)})
    monkeypatch.setattr(gpu_numbers, "HEADS", ["mask2former"])
    found = results(name, CUDA)
    assert found and {each.outcome for each in found} == {PASSED}, found


def test_steps_are_measured_with_waits_and_memory(pretended_cuda, monkeypatch):
    monkeypatch.setattr(bench, "OFFICIAL", ["upernet-tiny", "mask2former-tiny"])
    monkeypatch.setattr(gpu_numbers, "build_model", lambda head, size: small_model(head, size, 9, window=32))
    monkeypatch.setattr(bench, "matmul_rate", lambda device, dtype: 2000.0)
    monkeypatch.setattr(gpu_numbers, "budget", lambda system, images: {"computed GB": 1.5})
    found = list(gpu_numbers.steps(CUDA))
    rows = [each for each in found if isinstance(each, dict)]
    assert [(row["type"], row["TFLOP/s"]) for row in rows[:2]] == [("TF32", 2.0), ("bfloat16", 2.0)]
    assert [(row["system"], row["images"]) for row in rows[2:]] == [
        ("upernet-tiny", 2), ("upernet-tiny", 16), ("mask2former-tiny", 2), ("mask2former-tiny", 16)]
    assert all(row["GPU ms"] == pytest.approx(2.0) and row["kernels"] == 2 and row["waits"] == 1 for row in rows[2:])
    assert all(0 < row["host ms"] <= row["step ms"] for row in rows[2:])
    said = {each.name: (each.outcome, each.found) for each in found if isinstance(each, Result)}
    assert said["upernet-tiny, 2 images, waits for the GPU"] == (FAILED, "waits 1, limit 0")
    assert said["mask2former-tiny, 2 images, waits for the GPU"] == (PASSED, "1, limit 1")
    assert said["mask2former-tiny, 16 images, peak GB"] == (PASSED, "2, limit 2.2")


def test_the_table_of_the_operator_has_the_time_of_the_gpu_and_of_the_kernels(pretended_cuda, monkeypatch):
    monkeypatch.setattr(bench, "OP_CALLS", {"small": (((4, 6), (2, 3)), 30, 2)})
    monkeypatch.setattr(bench.ops, "active_path", lambda device: "native")
    _, rows = bench.operator("", bench.parse(["op", "--device", "cuda", "--rounds", "1"]))
    assert [(row["batch"], row["type"]) for row in rows] == [(1, "float32"), (16, "float32"), (16, "bfloat16")]
    for row in rows:
        times = [row[name] for name in ("training: native ms", "training: torch ms", "forward kernel ms",
                                        "backward kernel ms", "training: ratio")]
        assert times == pytest.approx([2.0, 2.0, 0.5, 1.5, 1.0])


def test_work_of_the_gpu_is_its_kernels_and_copies(monkeypatch):
    """Not operators on the host, nor what the program calls a part of itself."""
    def event(name, kind, end, annotation=False):
        return FunctionEvent(0, name, 1, 10.0, end, device_type=kind, is_user_annotation=annotation, use_device="cuda")

    events = [event("aten::mm", DeviceType.CPU, 90.0), event("gemm", DeviceType.CUDA, 30.0),
              event("step", DeviceType.CUDA, 90.0, True), event("Memcpy HtoD", DeviceType.CUDA, 15.0)]
    profile = nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(bench, "profile", lambda activities: profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    called = []
    assert bench.device_work(lambda: called.append(1)) == [("gemm", 20e-6), ("Memcpy HtoD", 5e-6)] and called == [1]
    assert bench.device_seconds(lambda: None) == pytest.approx(25e-6)


def test_the_largest_batch_is_the_first_that_fits(pretended_cuda, monkeypatch):
    def measured_step(model, images):
        if images > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"waits": 0, "peak GB": 2.0}

    monkeypatch.setattr(bench, "OFFICIAL", ["upernet-tiny"])
    monkeypatch.setattr(bench, "matmul_rate", lambda device, dtype: 2000.0)
    monkeypatch.setattr(gpu_numbers, "measured_step", measured_step)
    monkeypatch.setattr(gpu_numbers, "budget", lambda system, images: {"computed GB": 1.5})
    found = list(gpu_numbers.steps(CUDA))
    assert [row["images"] for row in found if isinstance(row, dict) and "images" in row] == [2, 4]
    assert [each.name for each in found if LEFT_OUT in each] == ["upernet-tiny, 16 images", "upernet-tiny, 8 images"]


@pytest.mark.parametrize("system", ["mask2former base", "mask2former large", "upernet large"])
def test_the_budget_is_that_of_the_page(system):
    two, four, sixteen = (gpu_numbers.budget(system, images) for images in (2, 4, 16))
    assert 0 < two["computed GB"] < four["computed GB"] < sixteen["computed GB"] < 80
    assert 0 < float(two["computed GPU ms"]) < float(sixteen["computed GPU ms"]) and float(two["computed host ms"]) > 0
    assert four["computed GPU ms"] == four["computed host ms"] == ""


def test_an_error_is_relative_and_nan_is_above_every_limit():
    x, nan = torch.tensor([2.0, -4.0]), torch.tensor([2.0, float("nan")])
    assert gpu_numbers.error_of(x + 1, x) == 0.25 and gpu_numbers.error_of([x, x + 2], [x, x]) == 0.5
    assert math.isnan(gpu_numbers.error_of(x[:1], x))
    error = gpu_numbers.error_of([x, nan, x], [x, x, x])
    assert gpu_numbers.verdict("n", {"a": 0.1, "b": error}, 0.2) == ("n", FAILED, "b nan, limit 0.2")
    assert gpu_numbers.verdict("n", {"a": 0.1, "b": 0.2}, 0.2, "!") == ("n", PASSED, "0.2, limit 0.2!")


def test_a_wrong_operator_is_found_where_it_is_wrong(monkeypatch):
    if gpu_numbers.active_path("cpu") != "native":
        pytest.skip("no native operator")
    right = gpu_numbers.ms_deform_attn
    monkeypatch.setattr(bench, "OP_CALLS", {"small": (((4, 6), (2, 3)), 80, 16)})
    monkeypatch.setattr(gpu_numbers, "ms_deform_attn", lambda value, *rest: right(value, *rest) * (
        1.1 if value.storage_offset() and value.dtype == torch.float16 else 1))
    found = {each.name: each for each in gpu_numbers.operator(CPU)}
    assert [name for name, each in found.items() if each.outcome == FAILED] == [
        "operator, small, torch.float16", "operator, 24 channels, torch.float16"]
    assert found["operator, small, torch.float16"].found.startswith("misaligned 0.1")


def test_a_missing_operator_fails_on_a_gpu_and_is_left_out_on_a_cpu(monkeypatch):
    monkeypatch.setattr(gpu_numbers, "active_path", lambda device: "torch")
    monkeypatch.setattr(gpu_numbers.ops, "native", lambda: SimpleNamespace(reason="compiling failed: x"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    (on_gpu,), (on_cpu,) = results("operator", CUDA), results("operator", CPU)
    assert on_gpu == ("operator", FAILED, "RuntimeError: there is no native operator: compiling failed: x")
    assert on_cpu == ("operator", LEFT_OUT, "there is no native operator: compiling failed: x")


def test_back_ends_of_attention(monkeypatch):
    """One that is wrong is told and not counted, unless the model calls it; so is one that raises."""
    names = {back_end: name for name, back_end in gpu_numbers.BACK_ENDS.items()}

    def attend(device, keys, row, trained, rounded, dtype, back_end):
        name = names.get(back_end)  # None: float64 by definition
        if name == "memory-efficient" or name == "flash" and trained:
            raise RuntimeError("No available kernel. Aborting execution.")
        if name == "flash" and row == 904:
            raise RuntimeError("no execution plan\nmore")
        wrong = {"cuDNN": keys == 64, "as the model calls it": rounded == torch.float16 and keys == 900}.get(name)
        return [torch.ones(3), torch.full((3,), float("nan") if wrong else 1.0)]

    monkeypatch.setattr(gpu_numbers, "attend", attend)
    found = {each.name.removeprefix("attention, "): each[1:] for each in gpu_numbers.attention(CPU)}
    assert len(found) == 12
    assert found["as the model calls it, torch.bfloat16"] == (PASSED, "0, limit 0.05")
    assert found["as the model calls it, torch.float16"] == (FAILED, "mask of 900 keys nan, limit 0.01")
    assert found["memory-efficient, torch.float32"] == (LEFT_OUT, "not taken")
    assert found["cuDNN, torch.bfloat16"] == (UNUSED, "mask of 64 keys nan, limit 0.05")
    assert found["flash, torch.float32"] == (
        UNUSED, "bias in rows of 904: no execution plan nan, limit 0.001; not taken: trained bias in rows of 901, "
        "trained bias in rows of 904")


def test_the_inputs_of_attention_meet_the_fault_of_cudnn(monkeypatch):
    """pytorch#196678: NaN in the gradient of the query, with a mask, 64 mod 128 keys, low scores in a whole row."""
    def faulty(query, key, value, attn_mask):
        scores = (query @ key.mT / query.shape[-1]**0.5).float()
        scores = scores + (torch.where(attn_mask, 0.0, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask)
        if key.shape[2] % 128 == 64:
            padded = torch.exp(-scores.detach().logsumexp(-1, keepdim=True)) * 0  # infinite times 0
            query.register_hook(lambda gradient: gradient + padded.to(gradient.dtype))
        return scores.softmax(-1).to(value.dtype) @ value

    monkeypatch.setattr(gpu_numbers, "KEYS", (64, 128))
    monkeypatch.setattr(gpu_numbers, "BACK_ENDS", {"as the model calls it": None})
    monkeypatch.setattr(gpu_numbers.operators, "attention", faulty)
    assert {each.found.partition(",")[0] for each in gpu_numbers.attention(CPU)} == {"mask of 64 keys nan"}


def test_a_gpu_that_no_longer_works_does_not_end_the_command(monkeypatch):
    def empty_cache():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def check(device):
        yield empty_cache()

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(gpu_check, "CHECKS", {"check": check})
    reason = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert results("check", CUDA) == [("check", FAILED, reason)]


def test_a_command_that_fails_tells_its_complaint_and_one_that_hangs_is_ended(tmp_path, monkeypatch):
    def run(code: str) -> None:
        gpu_check.command(tmp_path, sys.executable, "-c", code)

    run("print('error: nothing')")
    with pytest.raises(RuntimeError, match="ended with 2: error: no data$"):
        run("import sys; print('a\\nerror: no data\\nthe end', file=sys.stderr); sys.exit(2)")
    with pytest.raises(RuntimeError, match="ended with 1: ZeroDivisionError: division by zero$"):
        run("1 / 0")
    with pytest.raises(RuntimeError, match="ended with 3: $"):
        run("raise SystemExit(3)")
    monkeypatch.setattr(gpu_check, "SECONDS", 1)
    with pytest.raises(subprocess.TimeoutExpired):
        run("import time; time.sleep(60)")


@pytest.mark.parametrize(("status", "outcome", "found"), [
    (0, PASSED, "0 errors"), (9, FAILED, "ended with 9: ========= ERROR SUMMARY: 3 errors")])
def test_the_sanitizer_is_found_and_heard(pretended_cuda, tmp_path, monkeypatch, status, outcome, found):
    monkeypatch.setattr(gpu_check.build, "find_cuda_home", lambda: tmp_path)
    (missing,) = results("sanitizer", CUDA)
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '========= ERROR SUMMARY: 3 errors'\nexit {status}\n")
    tool.chmod(0o755)
    (there,) = results("sanitizer", CUDA)
    assert missing.outcome == LEFT_OUT and (there.outcome, there.found[-len(found):]) == (outcome, found)


def test_compiled_steps_are_told_without_the_wait_for_data(pretended_cuda, monkeypatch):
    def train_toy(folder, name, processes, options, **environment):
        compiles = "--compile" in options
        (folder / "runs").mkdir()
        return [{"iteration": i, "seconds": 30.0 if compiles and i == 1 else 1.5, "seconds/data": 0.5,
                 "loss": 7.0 + compiles} for i in range(1, 13)]

    monkeypatch.setattr(gpu_check, "train_toy", train_toy)
    *rows, result = gpu_check.compiled(CUDA)
    assert [(row[""], row["first step s"], row["later step s"]) for row in rows] == [
        ("eager", 1.0, 1.0), ("compiled", 29.5, 1.0), ("compiled again", 29.5, 1.0)]
    assert result.outcome == FAILED and result.found.startswith("compiled 0.14, compiled again 0.14, limit 0.1")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_commands_of_a_gpu_run(pretended_cuda, monkeypatch, devices):
    """With the CPU in the GPU's place in every command."""
    command = gpu_check.command
    monkeypatch.setattr(gpu_check, "command", lambda folder, *words, **rest: command(
        folder, *(re.sub("^cuda$", "cpu", word) for word in words), **rest))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    found = {each.outcome for name in ("layouts", "runs") for each in results(name, CUDA)}
    assert found == ({PASSED, LEFT_OUT} if devices == 1 else {PASSED})


def test_the_page_and_the_exit_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # put back at the end
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)

    def good(device):
        yield Result("sum | product", PASSED, "0, limit 1")
        yield {"table": "Times", "": "eager", "s": 0.1234}

    def bad(device):
        yield Result("first", PASSED, "0, limit 1")
        raise ValueError("one\ntwo")

    def absent(device):
        raise LeftOut("needs a GPU")
        yield

    monkeypatch.setattr(gpu_check, "CHECKS", {check.__name__: check for check in (good, bad, absent)})
    out = tmp_path / "new" / "page.md"
    assert gpu_check.main(["--device", "cpu", "--out", str(out)]) == 1
    text, said = out.read_text(), capsys.readouterr().out
    assert text.startswith("# GPU check: 2 passed, 1 FAILED, 1 left out\n\n* commit: ") and "* torch: " in text
    assert ("| check | outcome | found |\n|---|---|---|\n| sum / product | passed | 0, limit 1 |\n"
            "| first | passed | 0, limit 1 |\n| bad | FAILED | ValueError: one |\n"
            "| absent | left out | needs a GPU |\n\n"
            "## Times\n\n|       |     s |\n|   --: |   --: |\n| eager | 0.123 |\n") in text
    assert re.search(r"bad: 1 passed, 1 FAILED, \d+ s\n  bad: ValueError: one\n", said) and str(out) in said
    assert gpu_check.main(["good", "absent", "--device", "cpu", "--out", str(out)]) == 0
    assert "FAILED" not in out.read_text()


def test_the_page_names_the_gpu_and_its_driver(pretended_cuda, monkeypatch):
    monkeypatch.setattr(subprocess, "getoutput", lambda command: "580.1\n580.1" if "driver" in command else "")
    monkeypatch.setattr(gpu_check.run, "active_path", lambda device: "native")
    facts = gpu_check.machine(CUDA)
    assert (facts["device"], facts["driver"], facts["capability"], facts["memory"], facts["devices"]) == (
        "H0", "580.1", "9.0", "80.0 GB", 2)


@pytest.mark.parametrize(("arguments", "message"), [
    ("nothing", "there is no check nothing; choose from operator"), ("--device cuda", "cuda")])
def test_faults_are_one_line(arguments, message, capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    try:
        status = gpu_check.main([*arguments.split(), "--out", str(tmp_path / "page.md")])
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1
