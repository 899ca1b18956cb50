"""convert.py, the command line of weights.py: what a file is -> conversion -> refusals -> the exported program."""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import small
import torch
from conftest import ROOT, needs_torch, noise, official_state
from PIL import Image
from test_weights import HEADS, OWN, SMALL, Bomb, assert_same, beit, own_checkpoint, released, write
from torch.export.passes import move_to_device_pass

import data
import evaluate
import msda_cuda
from adapter import resize
from common import UserError
from model import ModelConfig, Segmenter
from pictures import default_palette, read_image
from predict import Predictor
from renaming import rename_official
from tools import convert
from weights import FORMAT, load_model, load_weights


def command(*arguments) -> int:
    """`python weights.py ARGUMENTS` in this process; its exit status."""
    return convert.main([*map(str, arguments)])


def test_command_tells_what_a_file_is(tmp_path, capsys):
    own = write(tmp_path / "own.pt", OWN)
    assert command(own) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["sha256"] == hashlib.sha256(own.read_bytes()).hexdigest()
    assert lines["format"] == "own checkpoint" and lines["fits"] == "mask2former, custom size, window 64"
    assert lines["classes"] == "3 class 0, class 1, class 2" and lines["iteration"] == "12"
    assert command(write(tmp_path / "beit.pth", {"model": beit()})) == 0
    printed = capsys.readouterr().out
    assert "BEiT pre-training" in printed and "a backbone of width 32 and depth 4" in printed


def test_command_converts(tmp_path, capsys):
    """The released format to ours: the same tensors, configuration and classes; nothing else is left in the folder."""
    source = write(tmp_path / "x.pth", released("mask2former"))
    out = write(tmp_path / "out.pt", b"an older file")
    assert command(source, "--to", out) == 0
    printed = capsys.readouterr().out
    assert "released ViT-Adapter checkpoint" in printed and f"written     {out}" in printed
    model, info = load_model(out)
    assert_same(model.state_dict(), rename_official(official_state("mask2former")))
    assert info["classes"] == list("abcdefg") and info["iteration"] == 40000
    content = torch.load(out, weights_only=True)
    assert content["format"] == FORMAT and ModelConfig(**content["config"]) == model.config
    assert sorted(os.listdir(tmp_path)) == ["out.pt", "x.pth"]


@pytest.mark.parametrize("head", HEADS)
def test_safetensors_are_the_same_model(tmp_path, capsys, head):
    """There and back: the same bytes of every tensor, the same configuration, classes, palette and scores."""
    content = own_checkpoint(replace(SMALL, head=head, drop_path=0.25))
    content |= {"classes": ["ä\n", '"quoted"', "  "], "iteration": 2**53 + 1}
    source = write(tmp_path / "best of 3.pt", content)
    middle, back = tmp_path / "new folder" / "model.safetensors", tmp_path / "back.pt"
    assert command(source, "--to", middle) == 0 and command(middle, "--to", back) == 0
    printed = capsys.readouterr().out
    assert f"written     {middle}\n" in printed
    assert f"\nmade from   sha256:{hashlib.sha256(source.read_bytes()).hexdigest()} best of 3.pt\n" in printed
    models, infos = zip(*(load_model(path) for path in (source, middle, back)), strict=True)
    assert infos[0] == infos[1] == infos[2] and infos[0]["palette"] == content["palette"]
    assert models[0].config == models[1].config == models[2].config == ModelConfig(**content["config"])
    images = noise("image", 1, 3, 64, 64).float()
    with torch.no_grad():
        scores = [model(images) for model in models]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])
    theirs, again = safetensors.torch.load_file(middle), torch.load(back, weights_only=True)["model"]
    assert theirs.keys() == again.keys() == content["model"].keys()
    for name, tensor in content["model"].items():
        assert tensor.dtype == theirs[name].dtype == again[name].dtype and tensor.shape == theirs[name].shape
        assert tensor.numpy().tobytes() == theirs[name].numpy().tobytes() == again[name].numpy().tobytes()
    assert middle.stat().st_mode == back.stat().st_mode  # not for this user alone
    assert command(middle, "--to", middle) == 0  # in its own place
    assert_same(load_model(middle)[0].state_dict(), content["model"])
    assert os.listdir(middle.parent) == [middle.name]


def test_all_that_takes_a_checkpoint_takes_safetensors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = write(Path("x.pt"), own_checkpoint(SMALL) | {"classes": small.CLASSES})
    out = Path("x.safetensors")
    assert command(source, "--to", out) == 0
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    predictors = [Predictor(path, "cpu") for path in (source, out)]
    assert predictors[1].classes == small.CLASSES
    np.testing.assert_array_equal(*(predictor.probabilities(picture) for predictor in predictors))
    small.write_data(Path("data"), 4, 2)
    tables = []
    for path in (source, out):
        assert evaluate.main(["--checkpoint", str(path), "--data", "data", "--device", "cpu"]) == 0
        lines = capsys.readouterr().out.splitlines()
        tables.append([line for line in lines if line.split()[:1] in [[name] for name in small.CLASSES]])
    assert len(tables[0]) == 3 and tables[0] == tables[1]
    report = load_weights(Segmenter(replace(SMALL, num_classes=5, window=96)), out)
    assert report.kind == "ours" and len(report.resized) == 4 and len(report.reinitialised) == 2


def test_tensors_that_share_memory_or_lie_otherwise(tmp_path):
    """Safetensors have neither views nor strides: each tensor is written for itself."""
    content = own_checkpoint(SMALL)
    state = content["model"]
    state["head.query_embed"] = state["head.query_feat"]
    state["head.class_embed.weight"] = state["head.class_embed.weight"].t().contiguous().t()
    out = tmp_path / "x.safetensors"
    assert command(write(tmp_path / "x.pt", content), "--to", out) == 0
    assert_same(load_model(out)[0].state_dict(), state)


@pytest.mark.parametrize(("source", "option", "out", "message"), [
    ("absent.pth", "--to", "out.pt", "no such file"),
    ("folder.pt2", "--to", "out.pt", "no such file"),
    ("damaged.pth", "--to", "out.pt", "truncated, damaged, or no checkpoint"),
    ("two.zip", "--to", "out.pt", "a zip archive with 2 checkpoints in it; unpack it and name one"),
    ("beit.pth", "--to", "out.pt", "no segmentation head; give it to train.py --pretrained"),
    ("x.pth", "--to", "out.pt/out.pt", "cannot be used as a folder"),
    ("x.pth", "--to", "folder.pt", "is a folder"),
    *(("x.pth", "--to", out, "name it *.pt or *.safetensors") for out in ("out", "out.pth", "x.PT", "folder.pt2")),
    ("x.pth", "--export", "model.onnx", "name it *.pt2"),
    ("x.pth", "--export", "out.pt/a.pt2", "cannot be used as a folder"),
    ("x.pth", "--export", "folder.pt2", "is a folder"),
])
def test_command_refuses_in_one_line(tmp_path, capsys, monkeypatch, source, option, out, message):
    """Status 2 and one line, before the work begins; an older file at the destination is untouched."""
    whole = write(tmp_path / "x.pth", released("upernet")).read_bytes()
    write(tmp_path / "damaged.pth", whole[:-9])
    write(tmp_path / "beit.pth", {"model": beit()})
    write(tmp_path / "out.pt", b"an older file")
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "folder.pt").mkdir()
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.pth", b"1")
        archive.writestr("b.pth", b"2")
    before = sorted(os.listdir(tmp_path))
    for work in ("export", "write_safetensors"):
        monkeypatch.setattr(convert, work, lambda *_: pytest.fail("the work began"))
    assert command(tmp_path / source, option, tmp_path / out) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert (tmp_path / "out.pt").read_bytes() == b"an older file" and sorted(os.listdir(tmp_path)) == before


# Another program, README.md's: it finds PyTorch, Pillow and NumPy, and nothing of ours.
(README,) = re.findall(r"```python\n(import json.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
READER = README + """
import sys
assert not {"model", "msda_cuda", "weights"} & sys.modules.keys() and not hasattr(torch.ops.msda, "forward")
np.save("labels.npy", labels)
images = torch.load("images.pt")
scores = [score(images[:number]) for number in (1, 2, 3)]
assert not scores[0].requires_grad
torch.save(scores, "scores.pt")
for wrong in images.float() / 255, images[..., :32], images[0]:  # a size or a type that it would misunderstand
    try:
        score(wrong)
    except (RuntimeError, AssertionError):
        continue
    raise SystemExit("it took a wrong input")
print(json.dumps(about))
"""


class OneLayer(torch.nn.Module):
    """The least that `export` can write: a configuration, and a layer with the operator."""

    def __init__(self):
        super().__init__()
        self.config = SMALL
        self.embed, self.layer = torch.nn.Conv2d(3, 16, 16, stride=16), msda_cuda.MSDeformAttn(16, 2, 1, 4)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).mT  # (B, 16, 4, 4) -> (B, 4 * 4, 16)
        tokens = self.layer(tokens, msda_cuda.reference_points([(4, 4)], tokens), tokens, [(4, 4)])
        return resize(tokens.mT[:, :3].unflatten(2, (4, 4)), (64, 64))  # (B, 3, 64, 64): three classes


def test_an_older_torch_exports_nothing_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cu126"))
    with pytest.raises(UserError, match=r"PyTorch 2\.10 or newer, and this is 2\.9\.1\+cu126: update"):
        convert.export(OneLayer().eval(), tmp_path / "x.pt2", {})
    assert not list(tmp_path.iterdir())


@needs_torch("2.10", "it exports no program of any number of images")
@pytest.mark.parametrize("name", ["one layer", *(pytest.param(head, marks=pytest.mark.slow) for head in HEADS)])
def test_export(tmp_path, capsys, monkeypatch, name):
    """Without our code README.md's lines give our labels of a photograph; and our scores of any number of crops."""
    out = tmp_path / "folder" / "model.pt2"
    if name == "one layer":
        torch.manual_seed(0)
        out.parent.mkdir()
        model = OneLayer().eval()
        convert.export(model, out, {"iteration": 12})
        palette = default_palette(3).tolist()
    else:
        source = write(tmp_path / "x.pt", own_checkpoint(replace(SMALL, head=name)))
        assert command(source, "--export", out) == 0 and f"exported    {out}" in capsys.readouterr().out
        model, palette = load_model(source)[0], [[i, 0, 9] for i in range(3)]
    assert os.listdir(out.parent) == ["model.pt2"]
    images = (noise("image", 3, 3, 64, 64) * 60 + 128).clamp(0, 255).to(torch.uint8)
    torch.save(images, out.parent / "images.pt")
    with Image.open(ROOT / "docs" / "demo.jpg") as demo:
        demo.crop((30, 40, 230, 190)).save(out.parent / "photo.jpg", quality=95)
    done = subprocess.run([sys.executable, "-I", "-c", READER], cwd=out.parent, capture_output=True,
                          env={**os.environ, "MSDA": "native"}, text=True, check=False)
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)
    assert {key: about[key] for key in ("format", "classes", "palette", "window", "iteration", "mean", "std")} == {
        "format": "vit-adapter-seg/program/1", "classes": ["class 0", "class 1", "class 2"], "palette": palette,
        "window": 64, "iteration": 12, "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
    found = torch.load(out.parent / "scores.pt")
    photo = read_image(out.parent / "photo.jpg")
    with torch.no_grad():
        chosen = model(data.normalize(images))
        (labels,) = evaluate.predictions(model, [photo])
        monkeypatch.setattr(msda_cuda.module, "ms_deform_attn", msda_cuda.ms_deform_attn_torch)
        reference = [model(data.normalize(images[:number])) for number in (1, 2, 3)]
    assert all(map(torch.equal, found, reference))
    torch.testing.assert_close(found[2], chosen, rtol=0, atol=1e-5 * chosen.abs().max().item())
    theirs, coloured = np.load(out.parent / "labels.npy"), read_image(out.parent / "coloured.png")
    assert theirs.shape == (150, 200) and (theirs == labels.numpy()).mean() > 0.9999
    np.testing.assert_array_equal(coloured, np.uint8(palette)[theirs])
    program = move_to_device_pass(torch.export.load(out), "meta")  # stands for a GPU: nothing may stay on the CPU
    assert {str(node.kwargs["device"]) for node in program.graph.nodes if "device" in node.kwargs} == {"meta"}
    assert program.module()(images.to("meta")).device.type == "meta"


def test_command_line_from_a_shell(tmp_path):
    """No traceback and no warning of PyTorch's, only the line; and no operator is built for it."""
    cache = tmp_path / "cache"
    cache.mkdir()
    bomb = write(tmp_path / "x.pth", pickle.dumps(Bomb(tmp_path / "marker", "exec"), protocol=4))
    done = subprocess.run([sys.executable, ROOT / "weights.py", bomb], capture_output=True, text=True, check=False,
                          env={**os.environ, "TORCH_EXTENSIONS_DIR": str(cache)})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {bomb}: cannot be read (UnpicklingError): truncated")
    assert not (tmp_path / "marker").exists() and not list(cache.iterdir())
