"""The command line of weights.py: tell what a weights file is, convert it, export its model as a program.

Reading order: describe -> export -> convert -> main.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import common
import data
import msda_cuda
from common import UserError
from model import Segmenter
from weights import FORMAT, KINDS, empty_model, facts, listing, load_model, names_and_colors, read_weights, size_of

PROGRAM = "vit-adapter-seg/program/1"


class Normalize(torch.nn.Module):
    """`data.normalize` as a layer."""

    def forward(self, images: Tensor) -> Tensor:
        return data.normalize(images)


def export(model: Segmenter, path: Path, about: dict[str, Any]) -> None:
    """Write a model in eval mode, on the CPU, as a program that PyTorch of about this version runs without this code.

    uint8 RGB (B, 3, window, window), any B -> scores (B, K, window, window). README.md has the lines that run it on a
    photograph; what they need is added to `about`, which the checkpoint says of itself, as about.json. The path ends in
    .pt2; the model is not for training any more. Raises UserError if the file cannot be written.
    """
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


def convert(options: argparse.Namespace) -> None:
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
    parser = common.Parser(prog="weights.py",
                           description="Tell what a weights file is; convert it to this project's format; export it.")
    parser.add_argument("file", type=Path, help="released (.pth, .zip), BEiT (.pth, .safetensors) or our own (.pt)")
    parser.add_argument("--to", type=Path, metavar="OUT.pt", help="write it in our format, with its configuration")
    parser.add_argument("--export", type=Path, metavar="OUT.pt2", help="write a program that needs PyTorch alone")
    options = parser.parse_args(arguments)
    return common.run(lambda: convert(options))

