"""tools/doctor.py: all that is absent at once, the page, and the computed needs of memory and disk."""

import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import small
import torch
from conftest import ROOT

import common
import train
from common import UserError
from msda_cuda import build
from tools import doctor

GB, VOC = 1e9, "data/VOCdevkit/VOC2010"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder on a machine without a GPU, with memory and disk enough."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "MEMORY", tmp_path.parent / f"{tmp_path.name}-meminfo")
    doctor.MEMORY.write_text("MemAvailable: 60000000 kB\n")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e12))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["train.py", "--size", "large", "--name", "my run"])
    for name in ("MSDA", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def page(capsys, *options: str) -> tuple[int, str]:
    """Exit status and text of --doctor, unwrapped."""
    with pytest.raises(SystemExit) as stopped:
        train.main(["--doctor", *options])
    return stopped.value.code, re.sub("\n {18}", " ", capsys.readouterr().out)


def lines(text: str) -> dict[str, list[tuple[str, str]]]:
    """(state, text) of each thing on a page."""
    found = {}
    for state, thing, rest in re.findall(r"(?m)^(ok|note|ABSENT) +(\w+) +(.*)$", text):
        found.setdefault(thing, []).append((state, rest))
    return found


def block(text: str) -> list[str]:
    """The commands to be pasted."""
    return re.findall(r"(?m)^    (.*)$", text)


def start(*options: str, world: int = 1) -> tuple:
    """What doctor.check and doctor.lay_out are called with."""
    options = train.parse(options)
    return options, train.RECIPES[options.head, options.size], world


def fault_of(capsys, *options: str) -> str:
    """All that a start says before it ends with status 2."""
    with pytest.raises(SystemExit) as stopped:
        train.main(options)
    assert stopped.value.code == 2
    return capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the page and the list


def test_an_empty_machine_is_told_all_at_once_with_the_commands_in_their_order(place, capsys):
    status, text = page(capsys)
    found = lines(text)
    assert status == 2 and [thing for thing, each in found.items() if each[0][0] == "ABSENT"] == ["weights", "data"]
    assert block(text) == [
        "python data.py fetch beit:large", "python data.py fetch voc2010 context", "python data.py prepare-context"]
    assert "The training cannot start: 2 ABSENT." in text and torch.__version__.split("+")[0] in found["machine"][0][1]
    assert os.listdir(place) == []  # nothing is written


def test_a_start_lists_several_things_and_ends_with_one_error(place, capsys):
    *listed, error = fault_of(capsys, "--batch", "3").splitlines()
    assert [line[:4] for line in listed] == ["  - "] * 3 and "fetch beit:large" in listed[0]
    assert "fetch voc2010 context`" in listed[1] and "16 is no multiple of 1 devices x 3" in listed[2]
    assert error == ("error: 3 things keep this run from starting (above); `python train.py --doctor --size large "
                     "--name 'my run'` shows all it needs")
    assert os.listdir(place) == []


def test_a_single_thing_is_the_one_line_that_it_is_on_its_own(place, capsys):
    small.write_data(place / "my data")
    error = fault_of(capsys, "--data", "my data", "--size", "base")
    assert error.count("\n") == 1 and error.startswith(
        "error: no pre-trained BEiT weights at pretrained/beit_base_patch16_224_pt22k_ft22k.pth or "
        "pretrained/beit_base_patch16_224.in22k_ft_in22k.safetensors: `python data.py fetch beit:base`")
    status, text = page(capsys, "--data", "my data", "--size", "base")
    assert status == 2 and block(text) == ["python data.py fetch beit:base"]


def test_the_device_is_one_of_the_things_that_are_told_together(place, capsys):
    error = fault_of(capsys, "--device", "cuda", "--data", "nowhere", "--size", "tiny")
    assert error.count("\n") == 3 and "device 'cuda' cannot be used here" in error and "no data at nowhere" in error


def test_a_page_without_faults(place, capsys):
    small.write_data(place / "data")
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    status, text = page(capsys, "--data", "data", "--size", "tiny", "--batch", "2")
    found = lines(text)
    assert status == 0 and "The training can start." in text and block(text) == []
    assert list(found) == ["machine", "operator", "device", "weights", "data", "run", "layout", "disk", "memory"]
    assert [state for state, _ in found["data"]] == ["ok", "ok"]
    assert "train: 8 images, 3 classes, sha256 a4343201ef98" in found["data"][0][1]
    assert found["weights"] == [("ok", "random")] and found["run"] == [("ok", "runs/mask2former-tiny-data, new")]
    assert found["layout"] == [("ok", "global batch 16 = 1 device(s) x 2 images x 8 accumulated")]
    assert before == {path: path.stat().st_mtime_ns for path in place.rglob("*")}


def test_toy_data_are_not_drawn(place, capsys):
    status, text = page(capsys, "--data", "toy")
    (state, note), = lines(text)["data"]
    assert status == 0 and state == "note" and "the start of the training draws it" in note
    assert os.listdir(place) == []


def test_one_process_of_several_prints(place, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank, printed in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        status, text = page(capsys, "--data", "toy")
        assert status == 0 and ("16 = 2 device(s) x 8 images x 1 accumulated" in text) == printed == bool(text)
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(UserError, match="`torchrun --nproc_per_node=2 train.py --doctor` shows"):
        doctor.check(*start("--data", "nowhere", world=2))


def test_a_run_that_goes_on_needs_its_checkpoint_instead_of_weights(place, capsys, monkeypatch):
    small.write_data(place / "data")
    monkeypatch.setattr(train, "build_model", small.small_model)
    train.main([*small.OPTIONS, "--iterations", "1", "--name", "my run"])
    capsys.readouterr()
    status, text = page(capsys, "--resume", "my run")
    found = lines(text)
    assert status == 0 and found["run"] == [("ok", "runs/my run")]
    assert found["layout"] == [("ok", "global batch 4 = 1 device(s) x 2 images x 2 accumulated")]  # as it was
    assert found["weights"][0][1].startswith("runs/my run/last.pt: own checkpoint, 2.")
    assert "sha256 " + common.sha256(Path("runs/my run/last.pt"))[:12] in found["weights"][0][1]
    status, text = page(capsys, "--data", "data", "--size", "tiny", "--name", "my run")
    assert status == 2 and "continue it with --resume 'my run'" in lines(text)["run"][0][1]


# ------------------------------------------------------------------------------------------------------- each by itself


def test_weights_that_are_damaged_are_found_by_the_page_and_by_the_start(place, capsys):
    small.write_data(place / "data")
    Path("cut.pth").write_bytes(b"PK")
    options = ("--data", "data", "--size", "base", "--pretrained", "cut.pth")
    status, text = page(capsys, *options)
    assert status == 2 and lines(text)["weights"][0][0] == "ABSENT" and "truncated" in lines(text)["weights"][0][1]


@pytest.mark.parametrize(("runs", "message"), [("file", "runs is no folder"), ("read-only", "no folder that you may")])
def test_a_runs_folder_that_cannot_be_written(place, monkeypatch, runs, message):
    if runs == "file":
        Path("runs").touch()
    else:  # the superuser may write everywhere
        Path("runs").mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "runs")
    with pytest.raises(UserError, match=message):
        doctor.folder(train.parse(["--data", "toy"]))
    assert doctor.look("run", lambda: doctor.folder(train.parse(["--data", "toy"]))).state == "ABSENT"


@pytest.mark.parametrize(("options", "message"), [
    ("--global-batch 15 --batch 2", "15 is no multiple of 2 devices x 2 images"),
    ("--head upernet --window 50", "--head upernet --size tiny: window 50 is not a multiple of 32"),
])
def test_options_that_contradict_each_other(place, options, message):
    with pytest.raises(UserError, match=message):
        doctor.lay_out(*start("--data", "toy", *options.split(), world=2))


def test_room_for_checkpoints_is_that_of_the_files_that_a_run_writes(place, monkeypatch):
    small.write_data(place / "data")
    monkeypatch.setattr(train, "build_model", small.small_model)
    monkeypatch.setattr(doctor, "build_model", lambda *_, **__: small.small_model("mask2former", "tiny", 3))
    options = (*small.OPTIONS, "--iterations", "3", "--save-every", "1", "--validate-every", "1", "--name", "x")
    train.main(options)
    options, model, _ = doctor.lay_out(*start(*options))
    sizes = {path.name: path.stat().st_size for path in Path("runs/x").glob("*.pt")}
    need = 2 * sizes["last.pt"] + sizes["previous.pt"] + sizes["best.pt"]  # a third one, for a moment
    free = SimpleNamespace(free=need)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: free)
    assert doctor.disk(options, model).state == "ok"
    free.free = 0.8 * need  # names and the like are not counted: a fifth of so small a model
    found = doctor.disk(options, model)
    assert found.state == "ABSENT" and "make room, or make runs a link" in found.text
    options.save_every = 3  # the last checkpoint is the only one
    assert doctor.disk(options, model).state == "ok"
    options.save_every, options.resume = 1, "runs/x"  # what is there already need not be written
    free.free = sizes["last.pt"]
    assert doctor.disk(options, model).state == "ok"


def tell_memory(monkeypatch, path: Path, free: float) -> None:
    path.write_text(f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {free / 1024:.0f} kB\nSwapFree:    0 kB\n")
    monkeypatch.setattr(doctor, "MEMORY", path)


@pytest.mark.parametrize(("free", "options", "state", "needs"), [
    (20, "", "ok", "9.1 GB needed .*about 14.1 GB with the activations of 2 .*computed twice"),
    (13, "", "note", "about 14.1 GB .*if it runs out, use --batch 1"),
    (8, "", "ABSENT", "use a smaller --size"),
    (8, "--freeze-backbone", "ok", "5.4 GB needed .*moments$"),
    (30, "--batch 16 --amp bf16 --no-checkpoint-activations", "note", "about 58.4 GB with the activations of 16"),
    (8, "--window 512", "ABSENT", "moments: use a smaller"), (20, "--window 512", "ok", "moments$"),
])
def test_memory_of_a_cpu_against_what_is_computed(place, monkeypatch, free, options, state, needs):
    tell_memory(monkeypatch, place / "meminfo", free * GB)
    options, model, _ = doctor.lay_out(*start("--size", "large", *options.split()))
    found = doctor.memory(options, model)
    assert found.state == state and found.text.startswith(f"{free}.0 GB free, ") and re.search(needs, found.text)


def test_processes_of_one_machine_share_its_memory_and_where_it_is_unknown_it_is_a_note(place, monkeypatch):
    tell_memory(monkeypatch, place / "meminfo", 8 * GB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert doctor.free_memory(train.parse(["--data", "toy"])) == pytest.approx(4)
    monkeypatch.setattr(doctor, "MEMORY", place / "absent")
    options, model, _ = doctor.lay_out(*start("--data", "toy"))
    assert doctor.memory(options, model)[:1] == ("note",)


def test_computed_memory_is_that_of_the_documentation():
    """docs/speed.md, table of memory: the first and the last column, float32 / bf16."""
    text, names = (ROOT / "docs" / "speed.md").read_text(), {"Mask2Former": "mask2former", "UperNet": "upernet"}
    rows = re.findall(r"(?m)^\| (Mask2Former|UperNet) (base|large)(?:, act.*?)? \| (.*?) \|.*\| (.*?) \|$", text)
    found = {}
    for head, size, one, sixteen in rows:  # kept first, then computed twice
        pairs = zip(*(map(float, cell.split(" / ")) for cell in (one, sixteen)), strict=True)
        found.setdefault((names[head], size), []).extend(pairs)
    assert {key: tuple(pairs) for key, pairs in found.items()} == doctor.COMPUTED


@pytest.fixture
def gpu(place, monkeypatch):
    """Two pretended GPUs of 24 GB, 20 of them free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda i: SimpleNamespace(name="NVIDIA RTX 4090", total_memory=24 * GB, major=8, minor=9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (8, 9))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GB, 24 * GB))
    monkeypatch.setattr(common, "choose_device", lambda name: torch.device(name or "cuda"))
    monkeypatch.setattr(build, "find_cuda_home", lambda: None)


def test_gpus_and_their_memory_are_named(gpu, capsys, monkeypatch):
    status, text = page(capsys, "--size", "large", "--pretrained", "none", "--data", "toy")
    found = lines(text)
    assert status == 0 and found["device"] == [
        ("ok", "cuda:0 NVIDIA RTX 4090, 24.0 GB; cuda:1 NVIDIA RTX 4090, 24.0 GB")]
    assert "1 device(s) x as many images as the start finds to fit" in found["layout"][0][1]
    assert re.match("20.0 GB free, 9.1 GB needed .*, about 11.6 GB with the activations of 1 im", found["memory"][0][1])
    (state, text), = found["operator"]
    assert state == "note" and "several times slower" in text and "toolkit (nvcc)" in text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert doctor.look("device", lambda: doctor.devices(None)).text.endswith("use --nproc_per_node=2")


def test_why_a_gpu_cannot_be_used_is_on_the_page(place, capsys, monkeypatch):
    monkeypatch.setattr(common, "choose_device", Mock(side_effect=UserError("NVIDIA driver 470 is too old")))
    status, text = page(capsys, "--data", "toy")
    assert status == 2 and lines(text)["device"] == [("ABSENT", "NVIDIA driver 470 is too old")]
    assert "memory" not in lines(text)


@pytest.mark.parametrize(("case", "state", "text"), [
    ("built", "ok", "native, built: "), ("possible", "ok", "to be built at the first step"),
    ("no compiler", "note", r"no C\+\+ compiler .absent-compiler. was found; install g\+\+ or set CXX"),
    ("failed", "note", "compiling failed: no space"), ("failed with another compiler", "ok", "to be built"),
    ("MSDA=torch", "note", "MSDA=torch asks"), ("MSDA=native", "ABSENT", "no C"), ("MSDA=x", "ABSENT", "unknown"),
])
def test_the_operators_path_without_building_it(place, monkeypatch, case, state, text):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(place / "extensions"))
    cache, plan = place / "extensions" / "msda", build.plan()
    monkeypatch.setenv("CXX", "absent-compiler")
    if case not in ("no compiler", "MSDA=native"):
        monkeypatch.setattr(build, "find_tools", lambda: None)
    monkeypatch.setattr(build, "toolchain", lambda home: "these compilers")
    if case.startswith("MSDA"):
        monkeypatch.setenv("MSDA", case.partition("=")[2])
    if case == "built" or case.startswith("failed"):
        cache.mkdir(parents=True)
        (cache / f"{plan.name}.{'so' if case == 'built' else 'failed'}").write_text(
            "compiling failed: no space\nthese" + " compilers" * (case != "failed with another compiler"))
    if case == "built":
        (cache / f"{plan.name}.sha256").write_text(common.sha256(cache / f"{plan.name}.so"))
    found = doctor.look("operator", lambda: doctor.operator("cpu"))
    assert found.state == state and re.search(text, found.text)
    assert cache.exists() == (case == "built" or case.startswith("failed"))  # nothing is written


def test_commands_of_odd_names_can_be_pasted(place, capsys):
    tree = place / "VOC's tree of 2010"
    (tree / "JPEGImages").mkdir(parents=True)
    (tree / "trainval_merged.json").touch()
    status, text = page(capsys, "--data", str(tree), "--size", "tiny")
    command, = block(text)
    assert status == 2 and shlex.split(command) == [
        "python", "data.py", "prepare-context", "--voc", str(tree)]


def test_a_fault_of_the_system_names_the_file(place):
    found = doctor.look("data", lambda: Path("absent\nfile").read_text())
    assert found == ("ABSENT", "data", "absent?file: No such file or directory")


def test_a_start_draws_the_toy_data_once_nothing_is_absent(place, monkeypatch):
    monkeypatch.setattr(doctor, "make_toy", draw := Mock())
    with pytest.raises(UserError, match="no multiple"):
        doctor.check(*start("--data", "toy", "--batch", "3"))
    draw.assert_not_called()
    doctor.check(*start("--data", "toy"))
    draw.assert_called_once_with()
    assert os.listdir(place) == []
