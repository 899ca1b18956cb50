"""Speed and memory, side by side, in one run: `python benchmark.py op`.

Read: OP_SHAPES -> op_case -> op_table -> main.

The candidates take turns and the median of each is printed, so that a busy machine slows all of them alike.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from msda_cuda import ms_deform_attn, ms_deform_attn_torch
from msda_cuda.build import BuildError
from msda_cuda.ops import active_path, native


class OpShape(NamedTuple):
    """A deformable-attention call of the large models at 480 x 480: M heads of D channels, Q queries, P points."""

    name: str
    levels: tuple[tuple[int, int], ...]
    Q: int
    M: int
    D: int = 32
    P: int = 4


PYRAMID = ((60, 60), (30, 30), (15, 15))
OP_SHAPES = (
    OpShape("pixel decoder (Mask2Former large)", PYRAMID[::-1], 4725, 32),
    OpShape("injector (large)", PYRAMID, 900, 16),
    OpShape("extractor (large)", ((30, 30),), 4725, 16),
)


def op_case(shape: OpShape, device: str) -> list[Tensor]:
    """Value, locations and weights, batch 1; as in a trained model, points lie a few pixels from their query."""
    generator = torch.Generator().manual_seed(0)
    S, L = sum(h * w for h, w in shape.levels), len(shape.levels)
    value = torch.randn(1, S, shape.M, shape.D, generator=generator)
    side = shape.Q**0.5
    i = torch.arange(shape.Q)
    centres = torch.stack(((i % side) / side, (i / side).floor() / side), dim=-1)[:, None, None, None]
    offsets = torch.randn(1, shape.Q, shape.M, L, shape.P, 2, generator=generator) * 3
    sizes = torch.tensor([(w, h) for h, w in shape.levels])[:, None]
    weights = torch.rand(1, shape.Q, shape.M, L, shape.P, generator=generator)
    return [x.to(device) for x in (value, centres + offsets / sizes, weights)]


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int, device: str, bar: tqdm) -> dict[str, float]:
    """Median milliseconds of each candidate; the first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, candidate in candidates.items():
            wait(device)
            start = time.perf_counter()
            candidate()
            wait(device)
            times[name].append((time.perf_counter() - start) * 1e3)
        bar.update()
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def kept_bytes(function: Callable, shape: OpShape, inputs: list[Tensor]) -> int:
    """Bytes of all storages that autograd keeps between forward and backward."""
    storages = {}

    def note(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        function(inputs[0], shape.levels, *inputs[1:])
    return sum(storage.nbytes() for storage in storages.values())


def op_row(shape: OpShape, device: str, rounds: int, bar: tqdm) -> str:
    """One line of the table."""
    inputs = op_case(shape, device)
    leaves = [x.clone().requires_grad_() for x in inputs]
    cotangent = torch.ones(1, shape.Q, shape.M * shape.D, device=device)
    functions = {"torch": ms_deform_attn_torch, "native": ms_deform_attn}

    def training(function: Callable) -> None:
        torch.autograd.grad(function(leaves[0], shape.levels, *leaves[1:]), leaves, cotangent)

    def inference(function: Callable) -> None:
        with torch.no_grad():
            function(inputs[0], shape.levels, *inputs[1:])

    forward = interleaved({name: lambda f=f: inference(f) for name, f in functions.items()}, rounds, device, bar)
    both = interleaved({name: lambda f=f: training(f) for name, f in functions.items()}, rounds, device, bar)
    kept = {name: kept_bytes(f, shape, leaves) / 1e6 for name, f in functions.items()}
    moved = 4 * (sum(x.numel() for x in inputs) + cotangent.numel()) / 1e6  # each array once: the least possible
    columns = [f"{shape.name:34}"]
    for result, digits in ((forward, 1), (both, 1), (kept, 0)):
        ratio = result["torch"] / result["native"]
        columns.append(f"{result['torch']:8.{digits}f} {result['native']:7.{digits}f} {ratio:5.1f}x")
    return " | ".join([*columns, f"{moved:6.0f} {moved / forward['native']:7.1f}"])


def op_table(device: str = "cpu", rounds: int = 7) -> str:
    """Native operator against the grid_sample reference, float32, batch 1. Raises BuildError without the operator."""
    if active_path(device) != "native":
        raise BuildError(f"there is no native operator for {device} to compare: {native().reason}")
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    titles = ("forward, ms", "forward + backward, ms", "kept for backward, MB")
    lines = [
        f"Deformable attention on {where}, float32, batch 1, median of {rounds}, PyTorch {torch.__version__}",
        " | ".join([f"{'':34}", *(f"{title:^23}" for title in titles), "at least moved"]),
        " | ".join([f"{'':34}", *["   torch  native  ratio"] * 3, f"{'MB':>6} {'GB/s':>7}"]),
    ]
    with tqdm(total=len(OP_SHAPES) * 2 * (rounds + 1), desc="op", unit="round", file=sys.stderr) as bar:
        lines += [op_row(shape, device, rounds, bar) for shape in OP_SHAPES]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed and memory, side by side, in one run.")
    tables = parser.add_subparsers(dest="table", required=True)
    op = tables.add_parser("op", help="deformable attention: native operator against the grid_sample reference")
    op.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    op.add_argument("--rounds", type=int, default=7, help="timed rounds; the median is printed (default 7)")
    arguments = parser.parse_args()
    try:
        print(op_table(arguments.device, arguments.rounds))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
