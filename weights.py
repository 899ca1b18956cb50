"""Weights from files: released ViT-Adapter checkpoints, BEiT pre-training, our own; read safely, renamed, resized.

Reading order: read_file (bytes to values, no code is run) -> read_weights (which of the three is it?) -> RENAMES
(official names to ours) -> infer_config -> resize_position_table -> load_weights (into a model) -> load_model (a model
from a file) -> export (a program that runs without this code). `python weights.py --help` lists what the command does.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from unittest.mock import patch

import numpy as np
import safetensors.torch
import torch
from scipy.interpolate import RectBivariateSpline
from torch import Tensor

import common
import data
import msda_cuda
from common import UserError
from model import PATCH, SIZES, ModelConfig, Segmenter, relative_position_index
from pictures import default_palette

FORMAT, PROGRAM = "vit-adapter-seg/1", "vit-adapter-seg/program/1"
POSITION_TABLE = "relative_position_bias_table"

# mmcv's metadata may hold NumPy scalars and arrays: allowed by the names under which NumPy 1 and 2 pickle them.
NUMPY = [(np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
NUMPY += [(np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
NUMPY += [np.ndarray, np.dtype, *(type(np.dtype(code)) for code in ("f8", "f4", "i8", "i4", "u1", "?"))]


def read_file(path: str | Path, mapped: bool = False, checksums: bool = True) -> Any:
    """The values in a weights file; its first bytes tell its format. No code in the file is ever run.

    `mapped` leaves the tensors of PyTorch's own format in the file until they are used: the file must not be changed in
    place meanwhile. `checksums` are compared over the whole of it. Both are for checkpoints that many processes read.
    Raises UserError: absent, truncated, damaged, or a pickle that needs more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            if start[8:] == b"{":  # safetensors: 8 bytes of length, then a JSON header
                return safetensors.torch.load(start + file.read())
            return read_zip(file, mapped, checksums) if start.startswith(b"PK") else read_pickle(file)
    except Exception as error:  # damage shows itself as BadZipFile, EOFError, KeyError, MemoryError, UnicodeError ...
        reason = f"cannot be read ({type(error).__name__}): truncated, damaged, or no checkpoint? Download it again"
        if isinstance(error, UserError):
            reason = str(error)
        elif code := re.search(r"GLOBAL (\S{1,80})", str(error)):
            reason = f"refused: it would run {code[1]} while loading, and weights need no code; get it as .safetensors"
        raise UserError(f"{path}: {reason}") from None


def read_zip(file: BinaryIO, mapped: bool, checksums: bool) -> Any:
    """PyTorch's own format is a zip archive; so is a checkpoint that someone zipped."""
    with zipfile.ZipFile(file) as archive:
        members = [member for member in archive.namelist() if not member.startswith("__MACOSX/")]
        if any(member.endswith("/data.pkl") for member in members):
            if checksums and archive.testzip():  # PyTorch itself does not compare them
                raise zipfile.BadZipFile
            return read_pickle(file, mapped)
        inner = [member for member in members if member.endswith((".pth", ".pt", ".tar", ".bin"))]
        if len(inner) != 1:
            raise UserError(f"a zip archive with {len(inner)} checkpoints in it; unpack it and name one")
        return read_pickle(io.BytesIO(archive.read(inner[0])))


def read_pickle(file: BinaryIO, mapped: bool = False) -> Any:
    """PyTorch's formats, zip and older, with `weights_only`: an unpickler that knows tensors and plain values only."""
    file.seek(0)
    with torch.serialization.safe_globals(NUMPY), warnings.catch_warnings(action="ignore"):
        return torch.load(file.name if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)


KINDS = {"released": "released ViT-Adapter checkpoint", "beit": "BEiT pre-training", "ours": "own checkpoint"}
SIGNS = {"released": "decode_head.", "beit": "blocks.0.attn.qkv.", "ours": "adapter."}  # the start of a name in each
NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)


class Weights(NamedTuple):
    """The content of a file, in our names."""

    path: str
    kind: str  # a key of KINDS
    state: dict[str, Tensor]
    dropped: list[str]  # official names that no model needs
    info: dict[Any, Any]  # our or mmcv's metadata, unchecked


def read_weights(path: str | Path) -> Weights:
    """Read a file, find its kind by the names in it, and give its tensors our names; raises UserError."""
    content = state = read_file(path)
    if isinstance(content, dict):  # mmcv's {meta, state_dict}, BEiT's and our {"model": ...} and similar
        keys = ("state_dict", "model", "module")
        state = next((content[key] for key in keys if isinstance(content.get(key), dict)), content)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dictionary of named tensors")
    state = {key.removeprefix("module."): value for key, value in state.items()}  # the prefix of DataParallel
    kind = next((kind for kind, sign in SIGNS.items() if any(key.startswith(sign) for key in state)), None)
    if kind is None:
        raise UserError(f"{path}: no ViT-Adapter, BEiT or own checkpoint: it holds {listing(list(state)) or 'nothing'}")
    dropped = [] if kind == "ours" else not_needed(state)
    if wrong := [key for key, value in state.items() if key not in dropped and not is_plain(value)]:
        raise UserError(f"{path}: {listing(wrong)} should be dense tensors of float or int64 numbers")
    state = {key: value.detach() for key, value in state.items() if key not in dropped}
    if kind == "beit":
        shared = state.pop("rel_pos_bias." + POSITION_TABLE, None)
        if shared is not None:  # one position table for all blocks: each of ours gets it
            blocks = [key.removesuffix("qkv.weight") for key in state if key.endswith("qkv.weight")]
            state |= {block + POSITION_TABLE: shared for block in blocks}
        state = {"backbone." + key: value for key, value in state.items()}
    state = state if kind == "ours" else rename_official(state)
    info = content if content.get("format") == FORMAT else content.get("meta")
    return Weights(str(path), kind, state, dropped, info if isinstance(info, dict) else {})


def is_plain(value: Any) -> bool:
    """A dense tensor of numbers whose storage is as large as its shape claims: a stride of 0 can claim any size."""
    return (isinstance(value, Tensor) and value.dtype in NUMBERS and value.device.type == "cpu"
            and value.layout is torch.strided and not value.is_nested
            and value.untyped_storage().nbytes() >= value.numel() * value.element_size())


def not_needed(state: dict[str, Any]) -> list[str]:
    """Official names that no model has a place for, by design."""
    pattern = r"(.*\.)?relative_position_index|mask_token|(norm|fc_norm|head|lm_head)\..*"  # computed; BEiT's own tasks
    if "decode_head.query_feat.weight" in state:  # Mask2Former inherits, saves and never uses a per-pixel classifier
        pattern += r"|decode_head\.conv_seg\..*"
    return [name for name in state if re.fullmatch(pattern, name)]


# Official name -> ours; every pattern is applied, in this order.
RENAMES: list[tuple[str, str | Callable[[re.Match], str]]] = [
    (r"^backbone\.spm\.", "adapter.spatial_prior."), (r"^backbone\.(level_embed|interactions|up)", r"adapter.\1"),
    (r"^backbone\.norm([1-4])\.", lambda m: f"adapter.norms.{int(m[1]) - 1}."),
    (r"\.extractor\.", ".extractors.0."), (r"\.extra_extractors\.(\d)\.", lambda m: f".extractors.{int(m[1]) + 1}."),
    (r"\.dwconv\.dwconv\.", ".dwconv."), (r"\.patch_embed\.proj\.", ".patch_embed."),
    # mmcv's transformer layers
    (r"\.ffns\.0\.layers\.0\.0\.", ".ffn.0."), (r"\.ffns\.0\.layers\.1\.", ".ffn.2."),
    (r"(layers\.\d+)\.norms\.(\d)\.", lambda m: f"{m[1]}.norm{int(m[2]) + 1}."),
    (r"\.encoder\.layers\.(\d+)\.attentions\.0\.", r".encoder.layers.\1.attention."),
    (r"\.(encoder|transformer_decoder)\.", "."), (r"\.attentions\.0\.attn\.", ".cross_attention."),
    (r"\.attentions\.1\.attn\.", ".self_attention."), (r"\.in_proj_", ".in_proj."), (r"\.post_norm\.", ".norm."),
    # heads
    (r"^decode_head\.", "head."), (r"^auxiliary_head\.convs\.0\.", "auxiliary_head.conv."),
    (r"\.pixel_decoder\.(lateral|output)_convs\.0\.", r".pixel_decoder.\1."),
    (r"\.input_convs\.", ".inputs."), (r"\.lateral_convs\.", ".laterals."), (r"\.fpn_convs\.", ".outputs."),
    (r"\.fpn_bottleneck\.", ".fuse."), (r"\.psp_modules\.(\d)\.1\.", r".pools.\1."), (r"\.conv_seg\.", ".classifier."),
    (r"\.cls_embed\.", ".class_embed."), (r"\.mask_feature\.", ".mask_features."),
    (r"\.level_encoding\.", ".level_embed."), (r"\.(query_feat|query_embed|level_embed)\.weight$", r".\1"),
    (r"(head\..*)\.conv\.(weight|bias)$", r"\1.0.\2"), (r"(head\..*)\.(bn|gn)\.", r"\1.1."),  # mmcv's ConvModule
]


def rename_official(state: dict[str, Any]) -> dict[str, Any]:
    """Official names to ours, whatever the values; names that no model needs are left out."""
    dropped = not_needed(state)
    return {reduce(lambda text, rename: re.sub(*rename, text), RENAMES, name): value
            for name, value in state.items() if name not in dropped}


def size_of(config: ModelConfig) -> str:
    """The named size whose backbone a configuration has, or "custom"; the head does not matter."""
    sizes = {(size.embed_dim, size.depth, size.num_heads): name for name, size in SIZES.items()}
    return sizes.get((config.embed_dim, config.depth, config.num_heads), "custom")


def infer_config(state: dict[str, Tensor], base: ModelConfig | None = None) -> ModelConfig:
    """The ModelConfig whose model has these shapes (our names).

    Fields that shapes do not tell are those of `base`, else those of the size. Raises KeyError, ValueError and others
    where tensors are missing or make no sense.
    """
    def count(layers: str) -> int:
        return len({m[1] for name in state if (m := re.match(re.escape(layers) + r"\.(\d+)\.", name))})

    points = 3 * 4  # of each head of deformable attention: levels x points of a level
    table = state["backbone.blocks.0.attn." + POSITION_TABLE]
    fields = {"window": window_of(table) * PATCH, "embed_dim": len(state["backbone.patch_embed.weight"]),
              "depth": count("backbone.blocks"), "num_heads": table.shape[1],
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
                   "encoder_layers": count(encoder), "encoder_ffn": len(state[encoder + ".0.ffn.0.weight"]),
                   "decoder_layers": count(decoder), "decoder_ffn": len(state[decoder + ".0.ffn.0.weight"])}
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
    missing: list[str] = field(default_factory=list)  # the model needs them, the file lacks them
    unexpected: list[str] = field(default_factory=list)  # the file holds them, the model has no place
    resized: list[str] = field(default_factory=list)  # position tables fitted to the window
    reinitialised: list[str] = field(default_factory=list)  # new by design, at their starting values
    dropped: list[str] = field(default_factory=list)  # in the file, needed by no model

    def __str__(self) -> str:
        lines = [f"{self.path}: {KINDS[self.kind]}"]
        for title, names in list(vars(self).items())[2:]:
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
    report = load_into(model, read_weights(path))
    print(report)
    return report


def load_into(model: Segmenter, weights: Weights) -> LoadReport:
    """`load_weights` for a file that is read already."""
    target, state, mismatched = model.state_dict(), {}, []
    unexpected = [name for name in weights.state if name not in target]
    report = LoadReport(weights.path, weights.kind, unexpected=unexpected, dropped=weights.dropped)
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
        raise UserError(f"{weights.path} does not fit this {model.config.head} of {size_of(model.config)} size; {text} "
                        f"(`python weights.py {weights.path}` tells what it is)")
    # A model without memory, on the meta device, takes the file's tensors themselves; any other one copies them.
    model.load_state_dict(state, strict=False, assign=model.backbone.cls_token.is_meta)
    return report


def load_model(path: str | Path) -> tuple[Segmenter, dict[str, Any]]:
    """A model in eval mode from our own or a released checkpoint; its configuration is stored or follows from shapes.

    Returns the model and what the checkpoint says of itself, if it does: "classes" (names), "palette" ([red, green,
    blue] for each), "iteration". Raises UserError: an unusable file, or one without a head (BEiT pre-training).
    """
    weights = read_weights(path)
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


class Normalize(torch.nn.Module):
    """`data.normalize` as a layer."""

    def forward(self, images: Tensor) -> Tensor:
        return data.normalize(images)


def export(model: Segmenter, path: Path, about: dict[str, Any]) -> None:
    """Write a model in eval mode, on the CPU, as a program that PyTorch of about this version runs without this code.

    uint8 RGB (B, 3, window, window), any B -> scores (B, K, window, window). README.md has the lines that run it on a
    photograph; what they need is added to `about`, which the checkpoint says of itself, as about.json. The path ends in
    .pt2; the model is not for training any more. Raises UserError if the file cannot be written or PyTorch is too old.
    """
    if torch.__version__ < "2.10":  # 2.7 and older refuse a batch whose size may vary
        raise UserError(f"{path}: a program needs PyTorch 2.10 or newer, and this is {torch.__version__}: update it")
    window = model.config.window
    classes, palette = names_and_colors(about, model.config.num_classes)
    about = {**about, "format": PROGRAM, "torch": torch.__version__, "classes": classes, "palette": palette.tolist(),
             "images": "uint8 RGB: the program subtracts mean and divides by std", "mean": data.MEAN, "std": data.STD,
             "window": window, "stride": window * 2 // 3, "short_side": data.base_size(window)}  # of the test
    images = torch.zeros(2, 3, window, window, dtype=torch.uint8)
    whole = torch.nn.Sequential(Normalize(), model.requires_grad_(False))
    # The compiled operator is no part of PyTorch: the program holds its PyTorch text, whatever MSDA says.
    with patch.object(msda_cuda.module, "ms_deform_attn", msda_cuda.ms_deform_attn_torch), torch.no_grad():
        program = torch.export.export(whole, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    files = {"about.json": json.dumps(about)}
    common.write_whole(path, lambda file: torch.export.save(program, file, extra_files=files))


def describe(path: Path) -> str:
    """What a file is, in a few lines; raises UserError."""
    weights = read_weights(path)
    tensors = weights.state.values()
    rows = {"file": path, "sha256": common.sha256(path), "format": KINDS[weights.kind],
            "numbers": f"{sum(tensor.numel() for tensor in tensors):,} in {len(tensors)} tensors"}
    if weights.kind == "beit":
        qkv = [tensor for name, tensor in weights.state.items() if "qkv." in name]
        rows["fits"] = f"a backbone of width {math.isqrt(qkv[0].numel() // 3)} and depth {len(qkv)}"
    else:
        config = empty_model(weights).config
        known = facts(weights.info, config.num_classes)
        rows["fits"] = f"{config.head}, {size_of(config)} size, window {config.window}"
        rows["classes"] = f"{config.num_classes} {listing(known.get('classes', []), 8)}"
        rows["iteration"] = known.get("iteration")
    rows["not needed"] = listing(weights.dropped)
    return "\n".join(f"{title:12}{value}" for title, value in rows.items() if value)


def run(options: argparse.Namespace) -> None:
    """Describe the file, then write it in the formats that the command line asks for."""
    if options.export and options.export.suffix != ".pt2":
        raise UserError(f"--export {options.export}: it writes a program of torch.export; name it *.pt2")
    print(describe(options.file))
    if not (options.to or options.export):
        return
    model, known = load_model(options.file)
    about = {"config": asdict(model.config), **known}
    if options.to:
        common.check_file(options.to, "--to")
        content = {"format": FORMAT, "model": model.state_dict(), **about}
        common.write_whole(options.to, lambda file: torch.save(content, file))
        print(f"{'written':12}{options.to}")
    if options.export:
        common.check_file(options.export, "--export")
        export(model, options.export, about)
        print(f"{'exported':12}{options.export}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = common.Parser(description="Tell what a weights file is; convert it to this project's format; export it.")
    parser.add_argument("file", type=Path, help="released (.pth, .zip), BEiT (.pth, .safetensors) or our own (.pt)")
    parser.add_argument("--to", type=Path, metavar="OUT.pt", help="write it in our format, with its configuration")
    parser.add_argument("--export", type=Path, metavar="OUT.pt2", help="write a program that needs PyTorch alone")
    options = parser.parse_args(arguments)
    return common.run(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
