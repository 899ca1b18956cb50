"""train.py: recipes, optimiser and schedule against golden numbers; the loop from start to stop and on again."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from conftest import GOLDEN
from PIL import Image
from small import log
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_flatten

import common
import data
import layout
import run
import train
from model import BASE, LARGE, Segmenter
from renaming import rename_official
from tools import doctor
from weights import LoadReport, load_model


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, with a small data set; train.py with a small model, for which there is room."""
    monkeypatch.chdir(tmp_path)
    for name in ("disk", "memory"):
        monkeypatch.setattr(doctor, name, lambda *_: "enough")
    for name, value in small.REPLACED.items():
        monkeypatch.setattr(train, name, value)
    small.write_data(tmp_path / "data")
    return tmp_path


def start(*options: str) -> None:
    train.main([*small.OPTIONS, *options])


def fault(capsys, *options: str) -> str:
    """Run with a mistake: exit status 2 and one line, which is returned."""
    with pytest.raises(SystemExit) as stopped:
        start(*options)
    output = capsys.readouterr().err
    assert stopped.value.code == 2
    assert output.startswith("error: ") and output.count("\n") == 1
    return output


def load(path: str) -> dict:
    return torch.load(path, weights_only=True)


def same(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    (a, form), (b, other) = tree_flatten(a), tree_flatten(b)
    return form == other and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
                                 for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------ recipes, optimiser


@pytest.mark.parametrize("length", [40_000, 80_000])
def test_schedule_is_the_official_one(length):
    golden = json.loads((GOLDEN / "lr_schedule.json").read_text())[f"{length // 1000}k"]
    for iteration, factor in golden.items():
        assert train.lr_factor(int(iteration), length) == pytest.approx(factor, abs=1e-12, rel=1e-12)


@pytest.mark.parametrize("name", ["mask2former_base", "upernet_large", "mask2former_large"])
def test_every_parameter_has_its_official_rate_and_decay(name):
    golden = json.loads((GOLDEN / "param_groups.json").read_text())[name]
    official = {}
    for group in golden["groups"]:
        official |= {parameter: (group["lr_scale"], group["weight_decay"]) for parameter in group["params"]}
    head, size = name.split("_")
    with torch.device("meta"):
        model = Segmenter(replace({"base": BASE, "large": LARGE}[size], head=head))
    recipe = train.RECIPES[head, size]
    names = {id(parameter): n for n, parameter in model.named_parameters()}
    groups = train.parameter_groups(model, recipe.lr, recipe.weight_decay, recipe.layer_decay)
    ours = {names[id(p)]: (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert recipe.lr == golden["base_lr"]
    assert ours == rename_official(official)
    assert all(group["lr"] == recipe.lr * group["scale"] for group in groups)


@pytest.mark.parametrize(("head", "size", "iterations", "lr", "layer_decay", "validate", "recompute"), [
    ("mask2former", "base", 40_000, 3e-5, 0.95, 4000, False),
    ("upernet", "large", 80_000, 2e-5, 0.90, 8000, True),
    ("mask2former", "large", 40_000, 2e-5, 0.90, 4000, True),
])
def test_recipes_are_the_published_ones(head, size, iterations, lr, layer_decay, validate, recompute):
    assert train.RECIPES[head, size] == train.Recipe(
        iterations, lr, layer_decay, validate, save_every=1000, batch=2, checkpoint_activations=recompute,
        warmup=1500, weight_decay=0.05)
    options = train.parse(["--head", head, "--size", size])
    assert (options.warmup, options.global_batch, options.data) == (1500, 16, "data/VOCdevkit/VOC2010")


def test_defaults():
    for more, warmup, validate in (((), 1500, 4000), (("--iterations", "4000"), 150, 400),  # in proportion
                                   (("--iterations", "2"), 0, 1), (("--iterations", "80000"), 3000, 4000),
                                   (("--iterations", "4000", "--validate-every", "9"), 150, 9)):
        options = train.parse(["--size", "base", *more])
        assert (options.warmup, options.validate_every) == (warmup, validate)
    assert train.parse(["--data", "toy"]).size == "tiny" and train.parse([]).size == "large" and train.parse([]).fast
    assert train.LOG_EVERY == 50


def test_precision_and_seed(place):
    for name, tf32, options in (("first", True, ()), ("second", False, ("--no-tf32", "--seed", "1"))):
        start("--iterations", "1", "--name", name, *options)
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 == tf32
    first, second = (load(f"runs/{name}/last.pt") for name in ("first", "second"))
    assert not same(first["rng"], second["rng"]) and not same(first["model"], second["model"])


def test_freeze_backbone_trains_adapter_and_head_only(place):
    start("--iterations", "2", "--freeze-backbone", "--name", "frozen")
    torch.manual_seed(0)
    before, after = small.small_model("mask2former", "tiny", 3).state_dict(), load("runs/frozen/last.pt")["model"]
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"adapter", "head"}


# ------------------------------------------------------------------------------------------------------ user's faults


@pytest.mark.parametrize(("options", "message"), [
    ("--batch 3", "4 is no multiple of 1 devices x 3 images"),
    ("--size huge", "choose from"),
    ("--iterations none", "not a positive whole number"),
    ("--seed -1", "not a whole number from 0 up"),
    ("--lr 0", "0 is not a positive number"),
    ("--lr fast", "fast is not a positive number"),
    ("--device nothing", "device 'nothing' cannot be used"),
    ("--data nowhere", "no data at nowhere"),
    ("--resume nothing", "no run to resume"),
    ("--window 50", "multiple of 32"),
    ("--head upernet --batch 1", "--batch 2"),
    ("--size base", "pretrained/beit_base_patch16_224_pt22k_ft22k.pth or"),
    ("--size large --pretrained absent.pth", "absent.pth: no such file"),
    ("--size large --pretrained empty.pth", "empty.pth"),
])
def test_a_fault_is_one_line_and_leaves_no_run(place, capsys, options, message):
    Path("empty.pth").touch()
    assert message in fault(capsys, *options.split())
    assert not Path("runs").exists()


def test_names_and_faults_of_resumption(place, capsys):
    start("--iterations", "2", "--name", "mine")
    for _ in range(2):
        start("--iterations", "1")
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names == ["mask2former-tiny-data", "mask2former-tiny-data-2", "mine"]
    for options, message in (
        ("--name mine", "continue it with --resume mine"),
        ("--resume mine --iterations 1", "has done 2 iterations"),
        ("--resume mine --head upernet", "begun with another --head"),
        ("--resume mine --freeze-backbone", "begun with another --freeze-backbone"),
        ("--resume mine --window 96", "begun with another --window"),
    ):
        assert message in fault(capsys, *options.split())
    assert load("runs/mine/last.pt")["progress"]["iteration"] == 2


def test_a_runs_folder_that_cannot_be_made(place, capsys):
    Path("runs").touch()
    fault(capsys, "--iterations", "1")


@pytest.mark.parametrize(("values", "message"), [
    (None, "00.png"), ([255], "every pixel is ignored"), ([0], "nothing but 'ground'"), ([0, 7], "7 is no class"),
], ids=str)
def test_preflight_reads_pictures_to_their_end_and_stops_on_labels_that_teach_nothing(place, capsys, values, message):
    if values is None:
        path = Path("data/images/00.png")
        path.write_bytes(path.read_bytes()[:-400])
    else:
        for path in sorted(Path("data/labels").glob("*.png"))[:8]:  # of the training split
            Image.fromarray(np.resize(np.array(values, np.uint8), (48, 64))).save(path)
    assert message in fault(capsys)
    assert not Path("runs").exists()


# ----------------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("head", ["mask2former", "upernet"])
def test_a_run_is_a_folder(place, capsys, head):
    start("--head", head, "--iterations", "4", "--validate-every", "2", "--save-every", "3")
    folder = Path(f"runs/{head}-tiny-data")
    names = {"events" if "tfevents" in path.name else path.name for path in folder.iterdir()}
    assert names == {"config.json", "log.jsonl", "events", "last.pt", "previous.pt", "best.pt"}
    assert (load(folder / "last.pt")["iteration"], load(folder / "previous.pt")["iteration"]) == (4, 3)
    steps = log(folder.name, "train")
    assert [line["iteration"] for line in steps] == [1, 2, 3, 4]
    terms = {f"{term}/{i}" for term in ("class", "mask", "dice") for i in range(4)}
    terms = {"pixel", "auxiliary"} if head == "upernet" else terms
    events = EventAccumulator(str(folder), {"images": 0}).Reload()
    for step, event in zip(steps, events.Scalars("1 loss and mIoU/loss"), strict=True):
        assert step["loss"] == pytest.approx(sum(step[name] for name in terms), rel=1e-5)
        assert step["loss"] == pytest.approx(event.value) and step["gradient_norm"] > 0
    assert [line["lr"] for line in steps] == [1e-3 * train.lr_factor(i, 4, 0) for i in range(4)]
    begin, = log(folder.name, "start")
    assert begin["torch"] == torch.__version__ and begin["commit"] == run.git("rev-parse HEAD")
    pixels = np.stack([np.asarray(Image.open(f"data/labels/{i:02d}.png")) for i in range(8)])
    shares, = log(folder.name, "labels")
    assert [shares[name] for name in (*small.CLASSES, "ignored")] == [
        pytest.approx((pixels == k).mean()) for k in (0, 1, 2, 255)]
    speed = log(folder.name, "speed")[0]
    parts = ("data", "forward", "backward", "optimizer")
    assert speed["seconds"] == pytest.approx(sum(speed[f"seconds/{part}"] for part in parts))
    assert speed["images_per_second"] == pytest.approx(4 / speed["seconds"])
    assert speed["eta_seconds"] == pytest.approx(3 * speed["seconds"]) and 0.1 < speed["memory_gb"] < 100
    validations = log(folder.name, "validation")
    assert [line["iteration"] for line in validations] == [2, 4]
    text, = events.Tensors("7 data/share of the labels/text_summary")
    assert f"{100 * (pixels == 1).mean():6.1f} %  disk\n" in text.tensor_proto.string_val[0].decode()
    assert events.Images("7 data/the first image and its labels")[0].step == 0
    scores = [event.value for event in events.Scalars("1 loss and mIoU/mIoU, %")]
    assert scores == pytest.approx([100 * line["mIoU"] for line in validations])
    pictures = events.Images("2 validation/image, labels, prediction")
    assert [picture.step for picture in pictures] == [2, 4] and pictures[0].width == pictures[1].width > 3 * 64
    assert [event.step for event in events.Tensors("2 validation/classes/text_summary")] == [2, 4]
    best = load(folder / "best.pt")
    assert best["progress"]["best"] == max(line["mIoU"] for line in validations)
    assert "optimizer" not in best

    model, facts = load_model(folder / "best.pt")
    assert facts["classes"] == small.CLASSES and len(facts["palette"]) == 3 and facts["iteration"] == best["iteration"]
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    output = capsys.readouterr().out
    assert "global batch 4 = 1 device(s) x 2 images x 2 accumulated" in output
    assert "its 4 iterations are 2.0 epochs\n" in output
    assert f"done: best mIoU {100 * best['progress']['best']:.1f};" in output


def test_config_json_starts_the_same_run(place):
    start("--iterations", "2", "--lr", "0.002", "--seed", "3", "--name", "first")
    Path("runs/copy").mkdir()
    shutil.copy("runs/first/config.json", "runs/copy/config.json")
    train.main(["--resume", "copy"])
    first, copy = load("runs/first/last.pt"), load("runs/copy/last.pt")
    assert first["iteration"] == copy["iteration"] == 2 and same(first, copy)


def test_config_json_tells_the_weights_and_the_data_of_a_run(place, capsys):
    start("--iterations", "1", "--name", "first")
    start("--iterations", "1", "--name", "second", "--pretrained", "runs/first/last.pt")
    first, second = (json.loads(Path(f"runs/{name}/config.json").read_text()) for name in ("first", "second"))
    sha256 = common.sha256(Path("runs/first/last.pt"))
    assert first["weights"] is None and "doctor" not in first
    assert second["weights"] == {"path": "runs/first/last.pt", "sha256": sha256, "kind": "ours"}
    assert first["data_fingerprint"] == {
        split: data.open_dataset("data", split).fingerprint() for split in ("train", "val")}
    capsys.readouterr()
    Path("data/train.txt").write_text("\n".join(f"{i:02d}" for i in range(7)))
    Path("data/val.txt").write_text("08\n09\n07")
    train.main(["--resume", "second", "--iterations", "2"])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [re.sub("list [0-9a-f]{8}", "list X", note) for note in notes] == [
        "note: train split: 7 images, 3 classes, list X, but 8 images, 3 classes, list X when the run began",
        "note: val split: 3 images, 3 classes, list X, but 3 images, 3 classes, list X when the run began"]
    assert json.loads(Path("runs/second/config.json").read_text())["weights"]["sha256"] == sha256  # of its start


def test_one_process_of_several_reads_the_weights_for_their_checksum(monkeypatch):
    monkeypatch.setattr(common, "sha256", None)
    weights, process = LoadReport("gigabytes.pth", "beit"), run.Process(1, 2, torch.device("cpu"))
    assert train.start_log(None, process, None, None, weights, None, None, 0) is None


def test_a_run_from_before_these_facts_were_noted_goes_on_silently(place, capsys):
    start("--iterations", "1", "--name", "old")
    config = json.loads(Path("runs/old/config.json").read_text())
    for key in ("weights", "data_fingerprint", "environment"):
        del config[key]
    Path("runs/old/config.json").write_text(json.dumps(config))
    Path("data/train.txt").write_text("00\n01")
    train.main(["--resume", "old", "--iterations", "2"])
    assert "note: " not in capsys.readouterr().out and load("runs/old/last.pt")["iteration"] == 2


@pytest.mark.parametrize(("amp", "cuts"), [("off", [0, 1, 3]), ("fp16", [2])])
def test_cut_and_resumed_is_uncut_bit_for_bit(place, monkeypatch, amp, cuts):
    """Cut after any number of iterations and resumed: weights, optimizer, random numbers, best score are the same."""
    options = ("--iterations", "4", "--validate-every", "2", "--save-every", "2", "--amp", amp)
    start(*options, "--name", "uncut")
    uncut, best = load("runs/uncut/last.pt"), load("runs/uncut/best.pt")
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for cut in cuts:
        name = f"cut{cut}"
        with monkeypatch.context() as patch:
            patch.setattr(train, "exchange", train.exchange)  # to be put back
            small.cut_before(cut, signal.SIGINT if cut == 1 else signal.SIGTERM)
            start(*options, "--name", name)
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
        state = load(f"runs/{name}/last.pt")
        assert state["iteration"] == cut and state["scaler"].get("scale") != 2**16  # what a new one would begin with
        train.main(["--resume", "--workers", "1" if cut == 3 else "0"])
        assert same(uncut, load(f"runs/{name}/last.pt")) and same(best, load(f"runs/{name}/best.pt"))
        assert [line["iteration"] for line in log(name, "train")] == [1, 2, 3, 4]


def test_a_gpu_whose_memory_runs_out_is_one_line(place, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\n and more")

    monkeypatch.setattr(train, "set_rates", full)
    assert "--resume and a smaller --batch" in fault(capsys, "--iterations", "1")


def test_without_batch_a_number_is_chosen_printed_and_kept(place, capsys):
    """The recipe's 8 images are more than the 4 of the step; a resumed run keeps 4 where they divide the step."""
    more = ("--data", "data", "--size", "tiny", "--workers", "0", "--device", "cpu")
    train.main([*more, "--global-batch", "4", "--iterations", "1", "--name", "mine"])
    for step, options, line, batch in ((1, (), "4 = 1 device(s) x 4 images x 1 accumulated", 4),
                                       (2, ("--global-batch", "8"), "8 = 1 device(s) x 4 images x 2 accumulated", 4),
                                       (3, ("--global-batch", "6"), "6 = 1 device(s) x 6 images x 1 accumulated", 6),
                                       (4, ("--batch", "2"), "4 = 1 device(s) x 2 images x 2 accumulated", 2)):
        if step > 1:
            train.main(["--resume", "mine", "--iterations", str(step), *options])
        printed, config = capsys.readouterr().out, json.loads(Path("runs/mine/config.json").read_text())
        assert f"global batch {line}; iterations {step - 1} to {step}\n" in printed
        assert ("--batch 4 of this run does not suit 1 x 6 images" in printed) == (step == 3)
        assert (config["batch"], config["checkpoint_activations"], config["global_batch"]) == (batch, False, 4)


@pytest.mark.parametrize("head", ["mask2former", "upernet"])
def test_measuring_the_memory_changes_no_number_of_the_run(place, monkeypatch, head):
    """As on a GPU: passes on noise come before a new run's first iteration and before a resumed one's."""
    options = ("--head", head, "--iterations", "2", "--save-every", "1")
    start(*options, "--name", "plain")

    def measured(options, batch, recompute, model, process):
        for images in (2, 3):
            layout.noise_pass(model, options, images)
        return layout.choose_layout(options, batch, recompute, model, process)

    monkeypatch.setattr(train, "choose_layout", measured)
    start(*options, "--name", "measured")
    Path("runs/resumed").mkdir()
    shutil.copy("runs/measured/config.json", "runs/resumed/config.json")
    shutil.copy("runs/measured/previous.pt", "runs/resumed/last.pt")  # after iteration 1
    train.main(["--resume", "resumed"])
    plain = load("runs/plain/last.pt")
    assert same(plain, load("runs/measured/last.pt")) and same(plain, load("runs/resumed/last.pt"))


def test_fast_is_on_unless_it_is_switched_off(place, monkeypatch):
    calls = []

    def training(model, enabled):
        calls.append((type(model), enabled))
        return contextlib.nullcontext()

    monkeypatch.setattr(train.fast, "training", training)
    start("--iterations", "1", "--name", "old", "--no-fast")
    assert calls == [(Segmenter, False)] * 2  # micro-batches
    config = json.loads(Path("runs/old/config.json").read_text())
    assert config.pop("fast") is False
    Path("runs/old/config.json").write_text(json.dumps(config))  # as from before the option existed
    train.main(["--resume", "old", "--iterations", "2"])
    assert calls[2:] == [(Segmenter, True)] * 2 and load("runs/old/last.pt")["iteration"] == 2


def test_fp16_skips_a_step_whose_gradients_overflow(place):
    """The scaler begins with 65,536 times the loss, which is beyond float16."""
    start("--iterations", "1", "--amp", "fp16")
    torch.manual_seed(0)
    before = dict(small.small_model("mask2former", "tiny", 3).named_parameters())
    after = load("runs/mask2former-tiny-data/last.pt")
    assert all(torch.equal(before[name], after["model"][name]) for name in before)
    assert all(moments["step"] == 0 for moments in after["optimizer"]["state"].values())
    assert after["iteration"] == 1 and after["scaler"]["scale"] == 2**15
    step, = log("mask2former-tiny-data", "train")
    assert step["loss_scale"] == 2**15 and "gradient_norm" not in step and math.isfinite(step["loss"])


def test_a_run_cut_in_a_validation_makes_up_for_it(place, monkeypatch):
    options = ("--iterations", "4", "--validate-every", "2", "--save-every", "2")
    start(*options, "--name", "uncut")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        start(*options, "--name", "cut")
    assert stopped.value.code == 130
    assert load("runs/cut/last.pt")["progress"] == {"iteration": 2, "validated": 0, "best": -1.0, "best_iteration": 0}
    train.main(["--resume", "cut"])
    assert all(same(load(f"runs/uncut/{kind}.pt"), load(f"runs/cut/{kind}.pt")) for kind in ("last", "best"))


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_signal_to_all_processes_finishes_the_iteration_saves_and_exits_0(place, method):
    """As torchrun and terminals send it: to the workers of the data loader and what started them, too."""
    options = [*small.OPTIONS, "--workers", "1", "--iterations", "5000", "--name", "cut"]
    with subprocess.Popen([sys.executable, small.__file__, *options], env={**os.environ, "SMALL_START": method},
                          stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        for line in process.stdout:
            if line.startswith("2/5000"):
                break
        os.killpg(process.pid, signal.SIGTERM)
        assert "stopped: go on with --resume cut" in process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert 2 <= load("runs/cut/last.pt")["iteration"] == log("cut", "train")[-1]["iteration"] < 100


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_nothing(place):
    options = ("--iterations", "40", "--validate-every", "10", "--save-every", "1", "--name")
    start(*options, "uncut")
    command, moments = [sys.executable, small.__file__], random.Random(0)
    for _ in range(20):
        begin = [*small.OPTIONS, *options, "killed"]
        more = ["--resume", "killed"] if Path("runs/killed/config.json").exists() else begin
        with contextlib.suppress(subprocess.TimeoutExpired):  # after which the process is killed
            subprocess.run([*command, *more], stderr=subprocess.DEVNULL, timeout=3 + 4 * moments.random())
    subprocess.run([*command, "--resume", "killed"], check=True, stderr=subprocess.DEVNULL)
    assert same(load("runs/uncut/last.pt"), load("runs/killed/last.pt"))


def stopped_by(monkeypatch, spoil, *options: str) -> str:
    """The one line with which a run ends whose new model is spoilt."""
    def spoilt(*args, **changes):
        model = small.small_model(*args, **changes)
        spoil(model)
        return model

    monkeypatch.setattr(train, "build_model", spoilt)
    with pytest.raises(SystemExit) as stopped:
        start("--iterations", "3", "--name", "bad", *options)
    assert stopped.value.code.count("\n") == 0
    return stopped.value.code  # Python prints a text and exits with status 1


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_loss_that_is_not_finite_stops_the_run(place, monkeypatch, amp):
    line = stopped_by(monkeypatch, lambda model: model.head.class_embed.bias.data.fill_(math.inf), "--amp", amp)
    assert "error: iteration 0" in line and "class/0 = nan" in line and "nonfinite-0-process0.pt" in line
    replay = load("runs/bad/nonfinite-0-process0.pt")
    assert len(replay["names"]) == 4 and all(name in line for name in replay["names"])
    assert [images.shape for images in replay["images"]] == [(2, 3, 64, 64)] * 2
    assert not Path("runs/bad/last.pt").exists()  # weights that are still good are not replaced

    # the file alone repeats it: the loss of the first micro-batch
    model = Segmenter(train.ModelConfig(**replay["config"]))
    model.load_state_dict(replay["model"])
    torch.set_rng_state(replay["rng"]["cpu"])
    with torch.autocast("cpu", torch.float16, enabled=amp == "fp16"):
        losses = model(train.normalize(replay["images"][0], replay["extents"][0]), replay["labels"][0].long())
    assert losses["class/0"].isnan() and losses["mask/0"].isfinite()


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(place, monkeypatch, amp):
    calls = iter(range(10))  # two micro-batches an iteration

    def spoil(model):
        model.head.query_feat.register_hook(lambda grad: grad / (next(calls) < 3))

    # at scale 1 it is no overflow of float16
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=1.0))
    line = stopped_by(monkeypatch, spoil, "--save-every", "1", "--amp", amp)
    assert "iteration 1: gradient_norm = " in line and "nonfinite-1-process0.pt" in line
    for name in ("last.pt", "nonfinite-1-process0.pt"):
        assert all(value.isfinite().all() for value in load(f"runs/bad/{name}")["model"].values())


def test_precision_and_memory_options_train_alike(place):
    cases = {"": 0, "--amp bf16": 0.05, "--amp fp16": 0.05, "--checkpoint-activations": 1e-5, "--no-fast": 1e-4}
    for options, tolerance in cases.items():
        start("--iterations", "2", "--head", "upernet", "--name", f"run{options}", *options.split())
        losses, plain = ([line["loss"] for line in log(name, "train")] for name in (f"run{options}", "run"))
        assert losses == pytest.approx(plain, rel=tolerance), options
        weights = load(f"runs/run{options}/last.pt")["model"]
        assert all(t.dtype in (torch.float32, torch.int64) and torch.isfinite(t).all() for t in weights.values())


def test_compiled_code_is_kept_for_later_runs(place, monkeypatch):
    monkeypatch.setattr(train.Segmenter, "compile", lambda _: None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "extensions")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    start("--iterations", "1", "--compile")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "extensions/inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "own")
    start("--iterations", "1", "--compile")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "own"


@pytest.mark.slow
def test_compiled_model_trains_alike(place):
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        start("--iterations", "2", "--head", "upernet", "--name", name, *more)
    plain, compiled = (load(f"runs/{name}/last.pt")["model"] for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-2, atol=5e-3)


@pytest.mark.slow
def test_memory_does_not_grow(place, monkeypatch):
    """Resident memory after 200 and after 1,200 iterations; not the peak, which the allocator reaches early."""
    def memory(_):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9

    monkeypatch.setattr(run, "peak_memory", memory)
    monkeypatch.setattr(train, "LOG_EVERY", 200)
    start("--iterations", "1200", "--validate-every", "10000", "--save-every", "10000", "--global-batch", "2")
    first, *_, last = [line for line in log("mask2former-tiny-data", "speed") if line["iteration"] >= 200]
    assert last["memory_gb"] - first["memory_gb"] < 0.02
