"""run.py: checkpoint files that survive, the log, the stopwatch."""

import errno
import json
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run
from common import UserError
from run import Log, Process, Stopwatch, load_last, write_checkpoint

CPU = torch.device("cpu")
ALONE = Process(0, 1, CPU)


def checkpoint(number: int) -> dict:
    return {"format": "vit-adapter-seg/1", "iteration": number, "model": {"x": torch.full((1000,), float(number))}}


def numbers(folder: Path) -> dict[str, int]:
    """Which iteration each file of the folder holds."""
    return {path.name: torch.load(path, weights_only=True)["iteration"] for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    """A run that has saved iterations 1, 2 and 3."""
    for number in (1, 2, 3):
        write_checkpoint(tmp_path / "last.pt", checkpoint(number))
    write_checkpoint(tmp_path / "best.pt", checkpoint(2))
    return tmp_path


def test_the_last_two_and_the_best_are_kept(folder):
    assert numbers(folder) == {"last.pt": 3, "previous.pt": 2, "best.pt": 2}
    assert load_last(folder, ALONE)["iteration"] == 3


def damage(path: Path, torn: bool) -> None:
    """Halve the file, or flip a bit in the middle of the tensor's data."""
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half] ^= 1
    path.write_bytes(content[:half] if torn else content)


@pytest.mark.parametrize("torn", [True, False])
def test_a_damaged_or_missing_last_falls_back(folder, capsys, torn):
    damage(folder / "last.pt", torn)
    assert load_last(folder, ALONE)["iteration"] == 2
    assert "last.pt" in capsys.readouterr().err
    (folder / "last.pt").unlink()
    assert load_last(folder, ALONE)["iteration"] == 2
    damage(folder / "previous.pt", torn)
    with pytest.raises(UserError, match="no checkpoint is whole"):
        load_last(folder, ALONE)
    (folder / "previous.pt").unlink()
    assert load_last(folder, ALONE) == {}


def test_a_node_that_does_not_see_the_folder_has_no_checkpoint(tmp_path, monkeypatch):
    """Its iteration is 0 then, and open_run says that the processes see different files."""
    monkeypatch.setattr(run, "on_first", lambda process, call: tmp_path / "last.pt")
    assert load_last(tmp_path, Process(1, 2, CPU)) == {}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells what is mapped")
def test_a_resumed_run_maps_its_checkpoint_and_lets_it_go(tmp_path):
    """96 MB: no tensor is copied before it is used, and none keeps the file when all are where they belong."""
    def megabytes_of_its_own() -> float:
        return int(re.search(r"Anonymous: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1]) / 1e3

    weights = torch.nn.Parameter(torch.randn(8_000_000))
    saved, resumed = (torch.optim.AdamW([weights], fused=True) for _ in range(2))
    weights.grad = torch.randn(8_000_000)
    saved.step()
    write_checkpoint(tmp_path / "last.pt", {"model": {"x": weights.detach()}, "optimizer": saved.state_dict(),
                                            "scaler": {}, "rng": [run.rng_state(CPU)]})
    before = megabytes_of_its_own()
    state = load_last(tmp_path, ALONE)
    assert megabytes_of_its_own() - before < 10 and "last.pt" in Path("/proc/self/maps").read_text()
    run.restore(state, resumed, torch.amp.GradScaler("cpu", enabled=False), 0, ALONE)
    del state
    assert "last.pt" not in Path("/proc/self/maps").read_text()
    for name, value in saved.state[weights].items():
        assert torch.equal(resumed.state[weights][name], value)


@pytest.mark.parametrize("stage", range(4))
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(folder, monkeypatch, stage):
    """The process dies before one of: writing, rename of the old checkpoint, fsync of the new one, its rename."""
    calls = iter(range(100))

    def dying(function):
        def wrapped(*arguments):
            if next(calls) == stage:
                raise KeyboardInterrupt
            return function(*arguments)

        return wrapped

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", dying(torch.save))
        patch.setattr(os, "fsync", dying(os.fsync))
        patch.setattr(Path, "replace", dying(Path.replace))
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # nothing tidies up, as after kill -9
        write_checkpoint(folder / "last.pt", checkpoint(4))
    assert len(list(folder.glob(".last.pt.*"))) == 1
    assert load_last(folder, ALONE)["iteration"] == 3
    write_checkpoint(folder / "last.pt", checkpoint(5))
    assert load_last(folder, ALONE)["iteration"] == 5
    assert numbers(folder).keys() == {"last.pt", "previous.pt", "best.pt"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("No space left")])
def test_a_full_disk_leaves_the_old_checkpoints_whole(folder, monkeypatch, error):
    def full(*_):
        raise error

    with monkeypatch.context() as patch, pytest.raises(UserError, match="last.pt .*No space left"):
        patch.setattr(torch, "save", full)
        write_checkpoint(folder / "last.pt", checkpoint(4))
    assert numbers(folder) == {"last.pt": 3, "previous.pt": 2, "best.pt": 2}


def test_processes_of_one_start_share_a_fresh_store():
    """Three starts on one store, in which the earlier ones leave their keys."""
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as threads:
        for start in range(3):
            stores = list(threads.map(lambda rank: run.fresh_store(store, rank, 3), range(3)))
            assert not stores[2].check(["x"])  # no key of an earlier start is in sight
            stores[0].set("x", str(start))
            assert [s.get("x") for s in stores] == [str(start).encode()] * 3


def test_stopwatch_splits_time():
    watch, idle = Stopwatch(CPU), Stopwatch(CPU, running=False)
    watch.lap("pause")
    for _ in range(2):
        time.sleep(0.02)
        watch.lap("data")
        time.sleep(0.01)
        watch.lap("forward")
        idle.lap("data")
    seconds = watch.seconds()
    assert list(seconds) == ["data", "forward"] and seconds["data"] >= 0.04 and seconds["forward"] >= 0.02
    assert watch.seconds() == {} and len(watch.marks) == 1
    assert not idle.marks  # processes that never read it must not gather marks


def new_log(folder: Path, start: int = 0, total: int = 10, every: int = 50, epochs: float = 2.5) -> Log:
    return Log(folder, start, total, every, epochs, CPU, images=4)


def test_log_takes_means_and_drops_what_will_be_done_again(tmp_path, capsys):
    log = new_log(tmp_path)
    for iteration, loss in ((1, 1.0), (2, 3.0)):
        log.count(iteration, {"loss": loss, "mask/0": loss / 2, "mask/1": loss / 2})
    log.report(2, {"data": 1.0, "forward": 3.0, "pause": 100.0}, lr=1e-3, gradient_norm=math.inf, loss_scale=8.0)
    log.end(False, "-")
    output = capsys.readouterr().out
    assert "loss 2.0000 (mask 2.000)" in output and "stopped: go on with --resume" in output
    train, speed = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    means = {"loss": 2.0, "mask/0": 1.0, "mask/1": 1.0}
    # a gradient that has overflowed has no norm, and JSON no word for it
    assert train == {"iteration": 2, "kind": "train", **means, "lr": 1e-3, "loss_scale": 8.0}
    assert (speed["seconds"], speed["images_per_second"], speed["eta_seconds"]) == (2.0, 2.0, 16.0)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"iteration": 3, "kind"')  # a kill in the middle of a line
    new_log(tmp_path, start=1).end(True, "50.0")
    assert f"done: best mIoU 50.0; python evaluate.py --checkpoint {tmp_path}/best.pt" in capsys.readouterr().out
    assert (tmp_path / "log.jsonl").read_text() == ""


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The charts of TensorBoard in the order in which it shows them."""
    events = EventAccumulator(str(folder)).Reload()
    tags = sorted(events.Tags()["scalars"])
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_tensorboard_opens_on_loss_and_miou_in_percent_and_the_log_keeps_fractions(tmp_path, capsys):
    log = new_log(tmp_path)
    log.count(1, {"loss": 3.0, "mask/0": 1.0, "mask/1": 0.5, "dice/0": 1.5})
    log.report(1, {"forward": 2.0}, lr=0.5, gradient_norm=4.0)
    scores = {"mIoU": 0.8916, "mAcc": 0.75, "aAcc": 0.5, "IoU/sky": 0.125, "IoU/a/b": 1.0, "IoU/absent": math.nan}
    log.validation(1, scores, "the table", Image.new("RGB", (9, 6), (200, 0, 0)))
    log.end(True, "89.2")
    charts = points(tmp_path)
    memory = charts.pop("6 speed/memory in GB")
    assert list(charts.items()) == [
        ("1 loss and mIoU/loss", [(1, 3.0)]), ("1 loss and mIoU/mIoU, %", [(1, pytest.approx(89.16))]),
        ("2 validation/aAcc, %", [(1, 50.0)]), ("2 validation/mAcc, %", [(1, 75.0)]),
        ("3 IoU/a/b, %", [(1, 100.0)]), ("3 IoU/sky, %", [(1, 12.5)]),
        ("4 terms of the loss/dice", [(1, 1.5)]), ("4 terms of the loss/mask", [(1, 1.5)]),
        ("5 optimizer/gradient norm", [(1, 4.0)]), ("5 optimizer/learning rate", [(1, 0.5)]),
        ("6 speed/seconds an iteration", [(1, 2.0)])]
    assert len(memory) == 1 and "1/10  validation\nthe table\n" in capsys.readouterr().out
    line = run.read_log(tmp_path / "log.jsonl")[-1]
    del scores["IoU/absent"]
    assert line == {"iteration": 1, "kind": "validation", **scores}


@pytest.mark.parametrize(("start", "total", "every", "expected"), [
    (0, 300, 50, [1, 5, 15, 30, 45]), (0, 2000, 50, [1, 5, 50, 100]), (0, 12, 50, list(range(1, 13))),
    (310, 2000, 50, [311, 315, 350, 400]), (0, 300, 1, list(range(1, 301))), (0, 4000, 200, [1, 5, 200, 400]),
    (0, 45, 50, [1, 2, 4, 5, 6]),
])
def test_a_report_is_due_after_the_first_the_fifth_each_twentieth_of_a_short_run_and_the_last(
        tmp_path, start, total, every, expected):
    log = new_log(tmp_path, start, total, every)
    due = [i for i in range(start + 1, total + 1) if log.count(i, {"loss": 1.0})]
    assert due[:len(expected)] == expected and len(due) >= min(20, total) and due[-1] == total


@pytest.mark.parametrize(("start", "total", "epochs", "seconds", "said"), [
    (0, 300, 16, 2.0, ["2.00 s: at this rate the run ends in 0:09:58; its 300 iterations are 16.0 epochs"]),
    (100, 300, 16, 2.0, ["2.00 s: at this rate the run ends in 0:06:38; its 300 iterations are 16.0 epochs"]),
    (0, 40_000, 10_667, 60.0, ["ends in 27 days, 18:39:00; its 40,000 iterations are 10,667.0 epochs: fewer "
                               "--iterations will do", "28 days: use a GPU, a smaller --size, fewer --iterations"]),
    (0, 40_000, 128, 15.1, ["128.0 epochs"]), (0, 40_000, 128, 15.2, ["128.0 epochs", "warning: this run ends in 7 d"]),
])
def test_the_length_of_a_run_is_said_after_its_first_iteration_and_a_warning_if_it_is_over_a_week(
        tmp_path, capsys, start, total, epochs, seconds, said):
    log = new_log(tmp_path, start, total, epochs=epochs)
    for i in range(start + 1, start + 7):
        if log.count(i, {"loss": 1.0}):
            log.report(i, {"forward": seconds * log.iterations}, 1e-3, 1.0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "this r" in line]
    assert len(lines) == len(said) and all(text in line for line, text in zip(lines, said, strict=True)), lines


def test_runs_are_found_by_name_age_and_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RUNS", tmp_path)
    for age, (name, command) in enumerate({"c": ["a", "--lr", "1"], "b": ["a"], "a": ["a"]}.items()):
        (tmp_path / name).mkdir()
        config = tmp_path / name / "config.json"
        config.write_text(json.dumps({"environment": {"command": command}}))
        os.utime(config, (1000 - age, 1000 - age))
    assert run.newest_run_of(["a"]) == tmp_path / "b" and run.newest_run_of(["b"]) is None
    assert run.find_run("") == tmp_path / "c" and run.find_run("a") == tmp_path / "a"
    (tmp_path / "a/config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        run.read_config(run.find_run("a"))


def test_what_differs_from_a_runs_start_is_said():
    environment = {"commit": "a1", "torch": "2.6.0", "python": "3.11.7", "cuda": None, "device": "cpu"}
    environment |= dict.fromkeys(set(run.PACKAGES) - {"torch"}, "1.0")
    split = {"images": 4998, "classes": 59, "sha256": "0123456789"}
    before = {"environment": environment, "data_fingerprint": {"train": split, "val": split},
              "weights": {"path": "a.pth", "sha256": "1234", "kind": "beit"}}
    assert run.changes(before, before) == [] and run.changes(before, before | {"weights": None}) == []
    assert run.changes({}, before) == [] and run.changes({"environment": {}, "weights": None}, before) == []  # old runs
    now = {"environment": environment | {"commit": "b2", "torch": "2.14.1", "device": "cuda"},
           "data_fingerprint": {"train": split | {"images": 4996}, "val": split | {"sha256": "abcdefghij"}},
           "weights": {"path": "b.pth", "sha256": "5678", "kind": "beit"}}
    assert run.changes(before, now) == [
        "train split: 4996 images, 59 classes, list 01234567, but 4998 images, 59 classes, list 01234567 when the run "
        "began",
        "val split: 4998 images, 59 classes, list abcdefgh, but 4998 images, 59 classes, list 01234567 when the run "
        "began",
        "pre-trained weights: sha256 5678, but sha256 1234 when the run began",
        "commit: b2, but a1 when the run began", "torch: 2.14.1, but 2.6.0 when the run began"]


def test_damaged_lines_of_a_log_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"iteration": 1}\nga\xffrbage\n{"iteration": 2}\n{"itera')
    assert run.read_log(path) == [{"iteration": 1}, {"iteration": 2}]
    assert run.read_log(tmp_path / "absent") == []


@pytest.mark.parametrize("text", ["[]", "null", "{", "3"])
def test_a_config_without_options_is_damaged(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json cannot be read .*: restore it or start a new run"):
        run.read_config(tmp_path)
