"""Shared by all tests: the golden tiny models, filled by the rule of `golden/fill.py`, and what makes numbers repeat.

Reading order: noise, load_golden -> golden_config -> golden_model -> randomized -> needs_torch -> seed, halton_points.
"""
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(ROOT))

from model import ModelConfig, Segmenter  # noqa: E402
from renaming import rename_official  # noqa: E402
from tools import prepare  # noqa: E402

spec = importlib.util.spec_from_file_location("fill", GOLDEN / "fill.py")
fill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fill)

OFFICIAL = {"mask2former": "m2f", "upernet": "upernet"}  # our name of a head -> that in the golden files


def noise(name: str, *shape: int) -> torch.Tensor:
    """A golden input, float64."""
    return torch.from_numpy(fill.noise(name, shape)).double()


def mask_logits(prediction) -> torch.Tensor:
    """(Y, B, Q, H/4, W/4): every query's embedding times the features of every pixel."""
    return torch.einsum("ybqc,bchw->ybqhw", prediction.mask_embeds, prediction.mask_features)


@pytest.fixture(autouse=True)
def freed_memory_goes_back(monkeypatch):
    """A process that keeps what it frees cannot be forked once a damaged file has claimed gigabytes in it."""
    for module in ("evaluate", "fast.training"):
        if module in sys.modules:
            monkeypatch.setattr(sys.modules[module], "keep_freed_memory", lambda: None)


@pytest.fixture
def modes_for_narrow_models(monkeypatch):
    """fast/ treats the small models of the tests as it treats large ones."""
    monkeypatch.setattr("fast.operators.NARROW", 0)


def load_golden(name: str) -> dict:
    with np.load(GOLDEN / name) as file:
        return dict(file)


def official_state(head: str) -> dict[str, torch.Tensor]:
    """The tiny golden model's weights under their official names."""
    shapes = json.loads((GOLDEN / "tiny_state_dicts.json").read_text())[OFFICIAL[head]]
    return {
        name: torch.from_numpy(np.asarray(fill.fill(name, shape)))
        for name, shape in shapes.items() if not name.endswith("relative_position_index")
    }


def golden_config(head: str) -> ModelConfig:
    tiny = json.loads((GOLDEN / "tiny.json").read_text())
    return ModelConfig(
        head=head, num_classes=tiny["num_classes"], window=tiny["window"], embed_dim=tiny["embed_dim"],
        depth=tiny["depth"], num_heads=tiny["num_heads"], drop_path=0.0, deform_heads=tiny["deform_num_heads"],
        spm_channels=tiny["spm_channels"],
        head_channels=tiny["feat_channels"] if head == "mask2former" else tiny["upernet_channels"],
        aux_channels=tiny["aux_channels"], dropout=0.0, num_queries=tiny["num_queries"], mask_heads=tiny["mask_heads"],
        encoder_layers=tiny["encoder_layers"], encoder_ffn=tiny["encoder_ffn"], decoder_layers=tiny["decoder_layers"],
        decoder_ffn=tiny["decoder_ffn"], num_points=tiny["num_points"],
    )


@pytest.fixture
def golden_model():
    """golden_model(head, **changes) -> the tiny model in float64 and eval mode, with the golden weights."""
    def build(head: str, **changes) -> Segmenter:
        model = Segmenter(replace(golden_config(head), **changes))
        model.load_state_dict(rename_official(official_state(head)))
        return model.double().eval()

    return build


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64 and eval mode; every parameter and batch-norm statistic is away from its start."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            if tensor.dim() < 2:
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            else:
                torch.nn.init.normal_(tensor, std=tensor[0].numel() ** -0.5)
    return module.double().eval()


def needs_torch(version: str, reason: str) -> pytest.MarkDecorator:
    """Skips a test on an older PyTorch, and says why."""
    return pytest.mark.skipif(torch.__version__ < version, reason=f"PyTorch older than {version}: {reason}")


NO_FAKE_GPU = needs_torch("2.10", "a fake CUDA tensor asks for a GPU")


@pytest.fixture
def seed():
    torch.manual_seed(0)


@pytest.fixture
def halton_points(monkeypatch):
    """Every draw of random points gives the Halton sequence, as in the golden training steps.

    Code that names no precision (transformers) gets float64.
    """
    def rand(*shape, device=None, dtype=torch.double):
        return torch.from_numpy(fill.halton(shape[-2])).to(device, dtype).expand(shape).clone()

    monkeypatch.setattr(torch, "rand", rand)


@pytest.fixture
def make_own(tmp_path: Path) -> Callable[..., Path]:
    """Write images and labels with noise of two classes and an ignored value; then from-folders makes tmp_path/own."""
    def make(classes: str = "2", *more: str, table=(0, 1, 255), spoil: Callable = lambda: None) -> Path:
        rng = np.random.default_rng(0)
        for folder in ("photos", "masks"):
            (tmp_path / folder).mkdir()
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "photos" / f"p{i}.jpg")
            Image.fromarray(np.uint8(table)[rng.integers(0, 3, (20, 30))]).save(tmp_path / "masks" / f"p{i}.png")
        spoil()
        options = f"from-folders --images {tmp_path}/photos --labels {tmp_path}/masks --out {tmp_path}/own --workers 1"
        options = vars(prepare.build_parser().parse_args([*options.split(), "--classes", classes, *more]))
        options.pop("command")(**options)
        return tmp_path / "own"

    return make
