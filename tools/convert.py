"""The command line of weights.py: tell what a weights file is, convert it, export its model as a program.

Reading order: describe -> export -> write_safetensors -> convert -> main.
"""

import argparse
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

import torch
from torch import Tensor

import common
import data
import msda_cuda
from common import UserError
from model import Segmenter
from renaming import KINDS
from weights import FORMAT, Weights, empty_model, facts, listing, make_model, names_and_colors, read_weights, size_of

PROGRAM = "vit-adapter-seg/program/1"
DTYPES = {torch.float32: "F32", torch.int64: "I64"}  # of our tensors, as safetensors calls them


def describe(weights: Weights, checksum: str) -> str:
    """What a file with that SHA-256 is, in a few lines; raises UserError."""
    tensors = weights.state.values()
    rows = {"file": weights.path, "sha256": checksum, "format": ", ".join([KINDS[weights.kind], *weights.notes]),
            "numbers": f"{sum(tensor.numel() for tensor in tensors):,} in {len(tensors)} tensors"}
    if weights.kind == "beit":
        qkv = [tensor for name, tensor in weights.state.items() if name.endswith(".qkv.weight")]
        rows["fits"] = qkv and f"a backbone of width {math.isqrt(qkv[0].numel() // 3)} and depth {len(qkv)}"
    else:
        config = empty_model(weights).config
        known = facts(weights.info, config.num_classes)
        rows["fits"] = f"{config.head}, {size_of(config)} size, window {config.window}"
        rows["classes"] = f"{config.num_classes} {listing(known.get('classes', []), 8)}"
        rows["iteration"] = known.get("iteration")
        rows["made from"] = listing([str(weights.info.get("source", ""))])
    rows["not needed"] = listing(weights.dropped)
    return "\n".join(f"{title:12}{value}" for title, value in rows.items() if value)


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


def write_safetensors(file: BinaryIO, state: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write a state dict as safetensors; its header has `about` in JSON.

    Not by the library's save_file: that takes a file's place with one for this user alone, and refuses tensors that
    share memory. 8 bytes of the header's length, the header in JSON, the tensors one after another.
    """
    header, end = {"__metadata__": {"format": FORMAT, "about": json.dumps(about)}}, 0
    state = dict(sorted(state.items(), key=lambda item: -item[1].element_size()))  # so that all of them are aligned
    for name, tensor in state.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in state.values():
        file.write(tensor.contiguous().numpy())


def convert(options: argparse.Namespace) -> None:
    """Describe the file, then write it in the formats that the command line asks for."""
    if options.to and options.to.suffix not in (".pt", ".safetensors"):
        raise UserError(f"--to {options.to}: it writes PyTorch's format or safetensors; name it *.pt or *.safetensors")
    if options.export and options.export.suffix != ".pt2":
        raise UserError(f"--export {options.export}: it writes a program of torch.export; name it *.pt2")
    weights = read_weights(options.file)
    checksum = common.sha256(options.file)
    print(describe(weights, checksum))
    if not (options.to or options.export):
        return
    model, known = make_model(weights)
    about = {"config": asdict(model.config), **known, "source": f"sha256:{checksum} {options.file.name}"}
    if options.to:
        common.check_file(options.to, "--to")
        state, content = model.state_dict(), {"format": FORMAT, **about}
        as_safetensors = options.to.suffix == ".safetensors"
        common.write_whole(options.to, lambda file: write_safetensors(file, state, about) if as_safetensors
                           else torch.save({**content, "model": state}, file))
        print(f"{'written':12}{options.to}")
    if options.export:
        common.check_file(options.export, "--export")
        export(model, options.export, about)
        print(f"{'exported':12}{options.export}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = common.Parser(prog="weights.py",
                           description="Tell what a weights file is; convert it to this project's format; export it.")
    parser.add_argument("file", type=Path, help="released, BEiT's or our own; .pth, .pt, .bin, .zip, .safetensors")
    parser.add_argument("--to", type=Path, metavar="OUT", help="write it as OUT.pt or OUT.safetensors, with its "
                        "configuration and classes; all that takes a checkpoint takes both")
    parser.add_argument("--export", type=Path, metavar="OUT.pt2", help="write a program that needs PyTorch alone")
    options = parser.parse_args(arguments)
    return common.run(lambda: convert(options))

