"""Weights from files: released ViT-Adapter checkpoints, BEiT pre-training, our own; read safely, renamed, resized.

Reading order: read_file (bytes to values, no code is run) -> read_weights (which kind is it? names become ours, see
renaming.py) -> infer_config -> resize_position_table -> load_weights (into a model) -> load_model (a model from a
file). The command `python weights.py` is in tools/convert.py.
"""
import argparse
import contextlib
import io
import json
import math
import re
import sys
import warnings
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from scipy.interpolate import RectBivariateSpline
from torch import Tensor

import common
import data
from common import UserError
from model import PATCH, SIZES, ModelConfig, Segmenter, relative_position_index
from pictures import default_palette
from renaming import KINDS, POSITION_TABLE, join_attention, our_names

FORMAT = "vit-adapter-seg/1"

# What a pickle may hold beside tensors and plain values, for it runs no code: the options of training scripts, and
# the NumPy scalars and arrays of mmcv's metadata, by the names under which NumPy 1 and 2 pickle them.
HARMLESS = [argparse.Namespace, np.ndarray, np.dtype]
HARMLESS += [type(np.dtype(code)) for code in ("f8", "f4", "i8", "i4", "u1", "?")]
HARMLESS += [(np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
HARMLESS += [(np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]


def read_file(path: str | Path, mapped: bool = False, checksums: bool = True) -> Any:
    """The values in a weights file; its first bytes tell its format. No code in the file is ever run.

    `mapped` leaves the tensors in the file until they are used: the file must not be changed in place meanwhile.
    `checksums` are compared over the whole of it. Both are for checkpoints that many processes read.
    Raises UserError: absent, truncated, damaged, or a pickle that needs more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            if start[8:] == b"{":  # safetensors: 8 bytes of length, then a JSON header
                return read_safetensors(path, mapped)
            return read_zip(file, mapped, checksums) if start.startswith(b"PK") else read_pickle(file)
    except Exception as error:  # damage shows itself as BadZipFile, EOFError, KeyError, MemoryError, UnicodeError ...
        reason = f"cannot be read ({type(error).__name__}): truncated, damaged, or no checkpoint? Download it again"
        if isinstance(error, UserError):
            reason = str(error)
        elif code := re.search(r"GLOBAL (\S{1,80})", str(error)):
            reason = f"refused: it would run {code[1]} while loading, and weights need no code; get it as .safetensors"
        raise UserError(f"{path}: {reason}") from None


def read_safetensors(path: str | Path, mapped: bool) -> dict[str, Any]:
    """The named tensors; from a file of ours what a .pt holds, for its header says the rest in JSON."""
    with safe_open(path, "pt") as file:  # maps the file
        tensors, header = {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata() or {}
        tensors = tensors if mapped else {name: tensor.clone() for name, tensor in tensors.items()}
    is_ours = header.get("format") == FORMAT
    return {**json.loads(header["about"]), "format": FORMAT, "model": tensors} if is_ours else tensors


def read_zip(file: BinaryIO, mapped: bool, checksums: bool) -> Any:
    """PyTorch's own format is a zip archive; so is a checkpoint that someone zipped."""
    with zipfile.ZipFile(file) as archive:
        members = [member for member in archive.namelist() if not member.startswith("__MACOSX/")]
        if any(member.endswith("/data.pkl") for member in members):
            if checksums and archive.testzip():  # PyTorch itself does not compare them
                raise zipfile.BadZipFile
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
            return read_pickle(file, mapped and stored)  # so PyTorch writes it; somebody may have packed it anew
        inner = [member for member in members if member.endswith((".pth", ".pt", ".tar", ".bin"))]
        if len(inner) != 1:
            raise UserError(f"a zip archive with {len(inner)} checkpoints in it; unpack it and name one")
        return read_pickle(io.BytesIO(archive.read(inner[0])))


def read_pickle(file: BinaryIO, mapped: bool = False) -> Any:
    """PyTorch's formats, zip and older, with `weights_only`: an unpickler that knows tensors and plain values only."""
    file.seek(0)
    with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings(action="ignore"):
        return torch.load(file.name if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)


RAW, AVERAGED = ("state_dict", "model", "module"), ("state_dict_ema", "model_ema", "ema")  # weights under these keys
NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)


class Weights(NamedTuple):
    """The content of a file, in our names."""

    path: str
    kind: str  # a key of KINDS
    notes: list[str]  # how the tensors were found
    state: dict[str, Tensor]
    dropped: list[str]  # the file's names that no model needs
    info: dict[Any, Any]  # our or mmcv's metadata, unchecked


def read_weights(path: str | Path, mapped: bool = False) -> Weights:
    """Read a file, find its kind by the names in it, and give its tensors our names; raises UserError."""
    content = read_file(path, mapped)
    state, notes = unpack(content)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dictionary of named tensors")
    kind, names, prefixes = our_names(state)
    if kind is None:
        raise UserError(f"{path}: no ViT-Adapter, BEiT or own checkpoint: it holds {listing(list(state)) or 'nothing'}")
    if wrong := [name for name in names.values() if not is_plain(state[name])]:
        raise UserError(f"{path}: {listing(wrong)} should be dense tensors of finite float or int64 numbers")
    if "backbone.pos_embed" in names:
        raise UserError(f"{path}: a BEiT with position embeddings, and the backbone has relative positions alone")
    if prefixes:
        notes.append(f"prefix {listing(prefixes)} removed")
    used, info = set(names.values()), content if content.get("format") == FORMAT else content.get("meta")
    dropped = [name for name in state if name not in used]
    state = join_attention({ours: state[name].detach() for ours, name in names.items()})
    return Weights(str(path), kind, notes, state, dropped, info if isinstance(info, dict) else {})


def unpack(content: Any) -> tuple[Any, list[str]]:
    """What {"model": ...} and similar hold, and a note where that is a choice between weights and their average."""
    notes = []
    for _ in range(4):  # levels: a damaged file's dictionary may hold itself
        found = isinstance(content, dict) and [key for key in RAW + AVERAGED if isinstance(content.get(key), dict)]
        if not found:
            break
        if found[-1] in AVERAGED:
            notes.append(f'"{found[0]}" taken' + f', not "{found[-1]}"' * (len(found) > 1))
        content = content[found[0]]
    return content, notes


def is_plain(value: Any) -> bool:
    """A dense tensor of finite numbers whose storage is as large as its shape claims: a stride of 0 can claim any."""
    return (isinstance(value, Tensor) and value.dtype in NUMBERS and value.device.type == "cpu"
            and value.layout is torch.strided and not value.is_nested
            and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
            and bool(value.sum().isfinite() or value.isfinite().all()))  # a sum is sooner, and may overflow


def size_of(config: ModelConfig) -> str:
    """The named size whose backbone a configuration has, or "custom"; the head does not matter."""
    sizes = {(size.embed_dim, size.depth, size.num_heads): name for name, size in SIZES.items()}
    return sizes.get((config.embed_dim, config.depth, config.num_heads), "custom")


def count(state: dict[str, Tensor], layers: str) -> int:
    """How many numbered layers of that name there are."""
    return len({match[1] for name in state if (match := re.match(re.escape(layers) + r"\.(\d+)\.", name))})


def backbone_of(state: dict[str, Tensor]) -> dict[str, int]:
    """The fields of ModelConfig that a backbone's shapes tell (our names); raises KeyError, ValueError and others."""
    table = state["backbone.blocks.0.attn." + POSITION_TABLE]
    return {"window": window_of(table) * PATCH, "embed_dim": len(state["backbone.patch_embed.weight"]),
            "depth": count(state, "backbone.blocks"), "num_heads": table.shape[1]}


def infer_config(state: dict[str, Tensor], base: ModelConfig | None = None) -> ModelConfig:
    """The ModelConfig whose model has these shapes (our names).

    Fields that shapes do not tell are those of `base`, else those of the size. Raises KeyError, ValueError and others
    where tensors are missing or make no sense.
    """
    points = 3 * 4  # of each head of deformable attention: levels x points of a level
    fields = {**backbone_of(state),
              "deform_heads": len(state["adapter.interactions.0.injector.attn.attention_weights.weight"]) // points,
              "spm_channels": len(state["adapter.spatial_prior.stem.0.weight"])}
    if "head.fuse.0.weight" in state:
        fields |= {"head": "upernet", "num_classes": len(state["head.classifier.weight"]),
                   "head_channels": len(state["head.fuse.0.weight"]),
                   "aux_channels": len(state["auxiliary_head.conv.0.weight"])}
    else:
        queries, encoder, decoder = state["head.query_feat"], "head.pixel_decoder.layers", "head.layers"
        fields |= {"head": "mask2former", "num_classes": len(state["head.class_embed.weight"]) - 1,
                   "num_queries": len(queries), "head_channels": queries.shape[1],
                   "mask_heads": len(state[encoder + ".0.attention.attention_weights.weight"]) // points,
                   "encoder_layers": count(state, encoder), "encoder_ffn": len(state[encoder + ".0.ffn.0.weight"]),
                   "decoder_layers": count(state, decoder), "decoder_ffn": len(state[decoder + ".0.ffn.0.weight"])}
    config = replace(base or ModelConfig(), **fields)
    return config if base else replace(SIZES.get(size_of(config), config), **fields)


def window_of(table: Tensor) -> int:
    """Side in tokens of the window that a relative-position table ((2w - 1)^2 + 3, heads) is for; raises ValueError."""
    side = math.isqrt(max(len(table) - 3, 0))
    if side * side != len(table) - 3 or side % 2 == 0:
        raise ValueError(f"a position table of {len(table)} rows fits no square window")
    return (side + 1) // 2


def geometric_coordinates(source: int, target: int) -> np.ndarray:
    """`source` coordinates around 0 whose steps 1, r, r^2, ... grow so that they reach about target / 2.

    Near positions keep their distance, far ones are stretched. As in BEiT the ratio r is bisected in [1.01, 1.5].
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        reach = (1 - ratio ** (source // 2)) / (1 - ratio)
        low, high = (low, ratio) if reach > target // 2 else (ratio, high)
    steps = np.cumsum(ratio ** np.arange(source // 2))
    return np.concatenate([-steps[::-1], [0.0], steps])


def resize_position_table(table: Tensor, window: int) -> Tensor:
    """Fit a relative-position table to a window of `window` x `window` tokens; raises ValueError where none fits.

    A cubic spline over both axes for each head; the three rows of the class token are copied.
    ((2v - 1)^2 + 3, heads) -> ((2w - 1)^2 + 3, heads).
    """
    source, target = 2 * window_of(table) - 1, 2 * window - 1
    if source == target:
        return table
    source_axis, target_axis = geometric_coordinates(source, target), np.arange(target) - target // 2
    degree = min(3, source - 1)  # a window of 2 tokens has 3 positions: too few for a cubic
    heads = table[:-3].t().reshape(-1, source, source).double().numpy()
    splines = [RectBivariateSpline(source_axis, source_axis, head, kx=degree, ky=degree) for head in heads]
    resized = torch.from_numpy(np.stack([spline(target_axis, target_axis) for spline in splines]))
    resized = resized.flatten(1).t().to(table.dtype)  # (heads, 2w - 1, 2w - 1) -> ((2w - 1)^2, heads)
    return torch.cat([resized, table[-3:]])


@dataclass
class LoadReport:
    """What `load_weights` did: lists of names, ours but for `dropped`."""

    path: str
    kind: str  # a key of KINDS
    notes: list[str] = field(default_factory=list)  # how the tensors were found in the file
    missing: list[str] = field(default_factory=list)  # the model needs them, the file lacks them
    unexpected: list[str] = field(default_factory=list)  # the file holds them, the model has no place
    resized: list[str] = field(default_factory=list)  # position tables fitted to the window
    reinitialised: list[str] = field(default_factory=list)  # new by design, at their starting values
    dropped: list[str] = field(default_factory=list)  # in the file, needed by no model

    def __str__(self) -> str:
        lines = [", ".join([f"{self.path}: {KINDS[self.kind]}", *self.notes])]
        for title, names in list(vars(self).items())[3:]:
            if names or title in ("missing", "unexpected"):
                lines.append(f"  {title:14}{len(names):4}  {listing(names)}".rstrip())
        return "\n".join(lines)


def listing(names: list[str], most: int = 4) -> str:
    """The first names, and how many more."""
    text = ", ".join(common.printable(name[:100]) for name in names[:most])
    return text + (f", ... ({len(names) - most} more)" if len(names) > most else "")


def load_weights(model: Segmenter, path: str | Path) -> LoadReport:
    """Load a file of any supported format into `model`, and print what was done.

    Position tables are resized to the model's window. Class layers with another number of classes, and for BEiT files
    everything beside the backbone, keep their starting values. Raises UserError: an unusable file; tensors missing,
    unexpected or of another shape. The model is then unchanged.
    """
    report = load_into(model, read_weights(path, mapped=True))  # it copies them
    print(report)
    return report


def load_into(model: Segmenter, weights: Weights) -> LoadReport:
    """`load_weights` for a file that is read already."""
    target, state, mismatched = model.state_dict(), {}, []
    unexpected = [name for name in weights.state if name not in target]
    report = LoadReport(weights.path, weights.kind, weights.notes, unexpected=unexpected, dropped=weights.dropped)
    for name, like in target.items():
        tensor = weights.state.get(name)
        if tensor is None:
            is_new = weights.kind == "beit" and not name.startswith("backbone.")
            (report.reinitialised if is_new else report.missing).append(name)
            continue
        other_length = tensor.shape != like.shape and tensor.shape[1:] == like.shape[1:]
        if name.endswith(POSITION_TABLE) and other_length:
            with contextlib.suppress(ValueError):  # of no square window: mismatched
                tensor = resize_position_table(tensor, window_of(like))
                report.resized.append(name)
        if tensor.shape == like.shape and tensor.is_floating_point() == like.is_floating_point():
            state[name] = tensor.to(like.dtype)
        elif re.search(r"head\.(classifier|class_embed)\.", name) and other_length:
            report.reinitialised.append(name)  # another number of classes
        else:
            actual, needed = (f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (tensor, like))
            mismatched.append(f"{name} {actual} should be {needed}")
    problems = {"missing": report.missing, "unexpected": report.unexpected, "of another shape": mismatched}
    if any(problems.values()):
        text = "; ".join(f"{len(names)} {problem}: {listing(names)}" for problem, names in problems.items() if names)
        text = other_options(weights, model.config) or f"{text} (`python weights.py {weights.path}` tells what it is)"
        raise UserError(f"{weights.path} does not fit this {model.config.head} of {size_of(model.config)} size; {text}")
    # A model without memory, on the meta device, takes the file's tensors themselves; any other one copies them.
    model.load_state_dict(state, strict=False, assign=model.backbone.cls_token.is_meta)
    return report


def other_options(weights: Weights, config: ModelConfig) -> str:
    """Which head or size of train.py the weights are for, if not those of the configuration; else ""."""
    with contextlib.suppress(Exception):  # the tensors may be of nothing that is known here
        is_beit = weights.kind == "beit"
        theirs = replace(config, **backbone_of(weights.state)) if is_beit else infer_config(weights.state)
        names = {"head": (theirs.head, config.head), "size": (size_of(theirs), size_of(config))}
        options = [f"--{name} {its}" for name, (its, ours) in names.items() if its not in (ours, "custom")]
        return f"it fits {' '.join(options)}" if options else ""
    return ""


def load_model(path: str | Path) -> tuple[Segmenter, dict[str, Any]]:
    """A model in eval mode from our own or a released checkpoint; its configuration is stored or follows from shapes.

    Returns the model and what the checkpoint says of itself, if it does: "classes" (names), "palette" ([red, green,
    blue] for each), "iteration". Raises UserError: an unusable file, or one without a head (BEiT pre-training).
    """
    return make_model(read_weights(path))


def make_model(weights: Weights) -> tuple[Segmenter, dict[str, Any]]:
    """`load_model` for a file that is read already."""
    model = empty_model(weights)
    load_into(model, weights)
    grid = model.config.window // PATCH
    model.backbone.position_index = relative_position_index(grid, grid)  # the one tensor that is computed, not loaded
    return model.eval(), facts(weights.info, model.config.num_classes)


def empty_model(weights: Weights) -> Segmenter:
    """A model for these weights, on the meta device: without memory, whatever sizes a damaged file may claim."""
    if weights.kind == "beit":
        raise UserError(f"{weights.path}: BEiT pre-training has no segmentation head; give it to train.py --pretrained")
    try:
        stored = weights.info.get("config") if weights.kind == "ours" else None
        config = ModelConfig(**stored) if stored else infer_config(weights.state)
        if config != infer_config(weights.state, config):
            raise ValueError("its configuration is not that of its tensors")
        with torch.device("meta"):
            return Segmenter(config)
    except Exception as error:  # of any type: sizes that make no sense break constructors anywhere
        raise UserError(f"{weights.path}: fits no model here ({type(error).__name__}: {error})") from None


def facts(info: dict[Any, Any], num_classes: int) -> dict[str, Any]:
    """Class names, palette (else the default one), iteration, in our or mmcv's spelling; nonsense is left out."""
    result = {}
    with contextlib.suppress(Exception):  # they come from a file: anything may be in their place
        classes = [common.printable(str(name)) for name in info.get("classes", info.get("CLASSES"))]
        if len(classes) == num_classes:
            result = {"classes": classes, "palette": default_palette(num_classes).tolist()}
            palette = bytes(np.ravel(info.get("palette", info.get("PALETTE"))).tolist())  # integers of 0 ... 255 only
            result["palette"] = np.reshape([*palette], (num_classes, 3)).tolist()
    iteration = info.get("iteration", info.get("iter"))
    return {**result, "iteration": iteration} if isinstance(iteration, int) else result


def names_and_colors(known: dict[str, Any], num_classes: int) -> tuple[list[str], np.ndarray]:
    """Class names and palette from `facts`; without them a model of 59 classes is for those of Pascal Context."""
    if "classes" in known:
        return known["classes"], np.uint8(known["palette"])
    info = data.context_info()
    if len(info.classes) == num_classes:
        return list(info.classes), info.palette
    return [f"class {k}" for k in range(num_classes)], default_palette(num_classes)


if __name__ == "__main__":
    from tools.convert import main

    sys.exit(main())
