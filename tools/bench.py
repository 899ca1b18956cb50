"""Speed and memory, side by side on this machine: `python -m tools.bench WHAT [HEAD-SIZE ...]`.

    systems    training step and forward pass: seconds, share of the matrix-product rate, memory
    op         deformable attention: the native operator against the PyTorch reference
    loader     images a second of each stage of the training pipeline, and of a training step
    evaluate   multi-scale + flip: windows in batches against one window of one view at a time

Reading order: Table -> interleaved -> kept_for_backward -> Subject (a model in a process of its own) -> Process (its
other end) -> systems_tables -> op_tables -> loader_tables -> evaluate_tables -> main.

The candidates take turns and the median of each is printed, so that a busy machine slows all of them alike. Ratios of
one run may be compared; seconds of two runs only on a quiet machine, and the first line says whether it was one.

Shapes: B batch, w window, K classes, Q queries, M heads, L levels; picture (H, W, 3), view (1, 3, h, w).
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

# This file also runs in other checkouts (`--old DIR`), whose modules may differ: functions import what they use.
ROOT = Path(__file__).parents[1]
TINY = ("mask2former-tiny", "upernet-tiny")
# GFLOP of a forward pass and of a training step for one image of 480 x 480, as the official code computes them. They
# stay the denominators where our code saves arithmetic, so a share can pass 100 %.
OFFICIAL = {"mask2former-base": (356, 1084), "mask2former-large": (1905, 5746), "upernet-large": (2284, 6884)}
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9  # GB of this machine
PRESENT = 8  # classes in a training crop
TRAINING, FORWARD = "training step", "forward pass"
Row = dict[str, str | int | float]

# --- tables and timing

class Table(NamedTuple):
    """Rows with the same keys, which name the columns; an empty text stands for no value. Notes follow below."""

    title: str
    rows: list[Row]
    notes: list[str]


def cell(value: str | int | float) -> str:
    """Texts and whole numbers as they are; others with three digits, or all before the point: 12.3, 0.0123, 1,234."""
    if not isinstance(value, float) or not math.isfinite(value) or value == 0:
        return value if isinstance(value, str) else f"{value:,}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def markdown(table: Table) -> str:
    """The table in Markdown, padded so that it also reads well in a terminal; numbers end at the right."""
    rows = [{name: name for name in table.rows[0]}, *table.rows]
    widths = {name: max(2, *(len(cell(row[name])) for row in rows)) for name in rows[0]}
    lines = [" | ".join(f"{cell(value):{'<' if isinstance(value, str) else '>'}{widths[name]}}"
                        for name, value in row.items()) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths.values()))
    return "\n".join([f"### {table.title}", "", *(f"| {line} |" for line in lines), "",
                      *(f"* {note}" for note in table.notes)])


def machine(device: str) -> str:
    """Processor, cores, load and PyTorch. Ask before the work begins, for the work is load too."""
    name = platform.processor() or platform.machine()
    with suppress(OSError, TypeError):  # Linux tells more
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    name = torch.cuda.get_device_name() if device == "cuda" else name
    load = os.getloadavg()[0]
    state = "quiet" if load <= 0.3 else "under load from other programs: measure again on a quiet machine"
    return (f"{name}, {torch.get_num_threads()} of {os.cpu_count()} CPU cores, load average {load:.1f} at the start "
            f"({state}), PyTorch {torch.__version__}")


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call, until the device has finished."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def interleaved(turns: dict[str, Callable[[], float]], rounds: int, title: str, warm: int = 1) -> dict[str, float]:
    """Median of the seconds that each candidate returns; they take turns. The first `warm` rounds do not count."""
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for _ in tqdm(range(warm + rounds), desc=title, unit="round", disable=None, leave=False):
        for name, turn in turns.items():
            taken[name].append(turn())
    return {name: statistics.median(each[warm:]) for name, each in taken.items()}


def matmul_rate(device: str) -> float:
    """GFLOP/s of float32 products of the size of large models' feed-forward layers, for all tokens of the pyramid."""
    a, b = torch.randn(4725, 1024, device=device), torch.randn(1024, 4096, device=device)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * 4725 * 1024 * 4096 / timer.blocked_autorange(min_run_time=1.0).median / 1e9


# --- counting

# PyTorch's counter knows the fused attention kernels of GPUs only. Both formulas take shapes (B, M, N, D).
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}


def gflop_of(work: Callable[[], object]) -> float:
    """GFLOP of a call: matrix products, convolutions and attention, as in published counts."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        work()
    return counter.get_total_flops() / 1e9


def storages(tree: object) -> dict[StorageWeakRef, int]:
    """The storages of all tensors in nested containers, without keeping them alive, and their bytes."""
    held = [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]
    return {StorageWeakRef(storage): storage.nbytes() for storage in held}


class NewStorages(TorchDispatchMode):
    """Notes the storages that operators make while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, old = function(*args, **(kwargs or {})), storages((args, kwargs))
        # Views and in-place operators share an argument's storage: they make none.
        self.found |= {ref: size for ref, size in storages(result).items() if ref not in old}
        return result


def kept_for_backward(function: Callable[[], object]) -> int:
    """Bytes that `function()` makes and that are still alive after it, except its result.

    These are what its backward pass needs. Looking at what is alive, rather than at what autograd saves, also counts
    what custom functions and hooks keep, and leaves out what they compute again.
    """
    with NewStorages() as new:
        result = function()
    gc.collect()
    output = storages(result)
    return sum(size for ref, size in new.found.items() if not ref.expired() and ref not in output)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, as in a training run, so that all candidates allocate alike."""
    with suppress(OSError, AttributeError):  # another system, another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD


def peak_of(work: Callable[[], object], device: str = "cpu") -> float:
    """Gigabytes at most during `work()`: of the GPU's memory, on a CPU of the whole process (NaN outside Linux).

    The model, and whatever else is in memory before, count too.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 1e9
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # give back what was freed before: it is no part of this peak
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes what is resident now
    work()
    with suppress(OSError):
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    return math.nan


# --- the models

def config_of(system: str, changes: dict):
    """The ModelConfig of HEAD-SIZE. Raises UserError if there is no such system."""
    from common import UserError
    from model import build_model
    head, _, size = system.partition("-")
    try:
        with torch.device("meta"):  # the values do not matter, and without them the model takes no memory
            return build_model(head, size, **changes).config
    except ValueError as error:
        raise UserError(f"{system}: {error}; name systems as HEAD-SIZE, for example {TINY[0]}") from None


class Peer(nn.Module):
    """What a user could take from `transformers` instead: its BEiT with the same head, at our widths, random weights.

    The library has no ViT-Adapter: its pyramid is three transposed convolutions and a pooling. **It computes less than
    ours** and its scores are others: compare seconds and bytes only. The losses' weights are its defaults, and ours.
    """

    def __init__(self, c):
        super().__init__()
        import transformers
        transformers.logging.set_verbosity_error()  # it warns of every backbone that it was not tested with
        beit = transformers.BeitConfig(
            image_size=c.window, patch_size=16, hidden_size=c.embed_dim, num_hidden_layers=c.depth,
            num_attention_heads=c.num_heads, intermediate_size=4 * c.embed_dim, layer_norm_eps=1e-6,
            layer_scale_init_value=1e-6, drop_path_rate=c.drop_path, use_relative_position_bias=True,
            use_mask_token=False, add_fpn=True, out_indices=[quarter * c.depth // 4 for quarter in (1, 2, 3, 4)])
        if c.head == "upernet":
            self.model = transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(
                backbone_config=beit, num_labels=c.num_classes, hidden_size=c.head_channels,
                auxiliary_channels=c.aux_channels, auxiliary_loss_weight=0.4, loss_ignore_index=255))
        else:
            self.model = transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(
                backbone_config=beit, num_labels=c.num_classes, ignore_value=255, feature_size=c.head_channels,
                mask_feature_size=c.head_channels, hidden_dim=c.head_channels, num_attention_heads=c.mask_heads,
                num_queries=c.num_queries, encoder_layers=c.encoder_layers, encoder_feedforward_dim=c.encoder_ffn,
                decoder_layers=c.decoder_layers + 1,  # it counts the prediction before the first layer as one
                dim_feedforward=c.decoder_ffn, dropout=0.0, train_num_points=c.num_points))
        self.config = c

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """(B, 3, w, w) -> scores (B, K, w, w); with labels long (B, w, w), 255 = ignore, the losses' sum as "loss"."""
        if self.config.head == "upernet":
            output = self.model(images, labels=labels)
            return output.logits if labels is None else {"loss": output.loss}
        if labels is not None:
            masks, classes = binary_masks(labels)
            return {"loss": self.model(images, mask_labels=masks, class_labels=classes).loss}
        output = self.model(images)  # its own post-processing would enlarge every query's mask before it makes scores
        classes, masks = output.class_queries_logits.softmax(2)[..., :-1], output.masks_queries_logits.sigmoid()
        scores = torch.einsum("bqk,bqhw->bkhw", classes, masks)
        return F.interpolate(scores, images.shape[2:], mode="bilinear", align_corners=False)


def binary_masks(labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The library's form of labels (B, w, w): of each image float masks (N, w, w) and the classes (N,) in it."""
    classes = [present[present != 255] for present in map(torch.unique, labels)]
    return [(x == present[:, None, None]).float() for x, present in zip(labels, classes, strict=True)], classes


def accept_single_values(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
    """Batch norm refuses to train on one value a channel: UperNet's coarsest pooling of one image. It uses its running
    statistics then."""
    norm.training = norm.training and inputs[0].numel() > norm.num_features


class Subject:
    """A model with noise for images and squares for labels. Its methods answer the requests of a `Process`.

    `work` is TRAINING (forward pass, losses, backward pass, optimiser) or FORWARD (one window), `text` "plain" or
    "fast": the fast text is switched on as train.py and evaluate.py do it.
    """

    def __init__(self, peer: bool, system: str, batch: int, device: str, changes: dict):
        torch.manual_seed(0)
        if peer:
            model = Peer(config_of(system, changes))
        else:
            from model import build_model
            model = build_model(*system.split("-"), **changes)
        self.model, self.device = model.to(device), device
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.register_forward_pre_hook(accept_single_values)
        # A rate of 0: the weights stay, so that all rounds of all candidates compute the same.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        window, classes = model.config.window, min(PRESENT, model.config.num_classes)
        self.images = torch.randn(batch, 3, window, window).to(device)
        self.labels = F.interpolate(torch.randint(classes, (batch, 1, 8, 8)).float(), window)[:, 0].long().to(device)

    def context(self, work: str, text: str) -> AbstractContextManager:
        """Where `work` runs with the plain or the fast text."""
        if text == "plain":
            return nullcontext()
        import fast
        return (fast.training if work == TRAINING else fast.inference)(self.model)

    def step(self, text: str) -> None:
        """One training step."""
        with self.context(TRAINING, text):
            self.model(self.images, self.labels)["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # after the step: hold no gradients while other candidates work

    @contextmanager
    def prepared(self, work: str, text: str) -> Iterator[Callable[[], object]]:
        """Gives the call to measure, with the same random numbers in every round."""
        torch.manual_seed(0)
        self.model.train(work == TRAINING)
        if work == TRAINING:
            yield partial(self.step, text)
            return
        self.optimizer.state.clear()  # only training needs the moments
        with self.context(work, text), torch.no_grad():
            self.model(self.images[:1])  # an evaluation enters the context once for many windows
            yield lambda: self.model(self.images[:1])

    def seconds(self, work: str, text: str) -> float:
        with self.prepared(work, text) as call:
            return seconds(call, self.device)

    def gflop(self, work: str) -> float:
        self.model.requires_grad_(work == TRAINING)  # the counter follows what has a gradient
        with self.prepared(work, "plain") as call:
            found = gflop_of(call)
        self.model.requires_grad_(True)
        return found

    def memory(self, work: str, text: str) -> Row:
        """Peak GB of a call; of a training step the loss too, and the MB kept for its backward pass."""
        with self.prepared(work, text) as call:
            call()  # once before: a first call makes what stays
            found: Row = {"loss": "", "kept MB": "", "bf16 MB": "", "peak GB": peak_of(call, self.device)}
        if work == TRAINING:
            with self.prepared(work, text), self.context(work, text):
                found["loss"] = f"{self.model(self.images, self.labels)['loss'].item():.5f}"
            found |= {"kept MB": self.kept(text, torch.float32), "bf16 MB": self.kept(text, torch.bfloat16)}
        return found

    def kept(self, text: str, dtype: torch.dtype) -> float:
        """MB an image that a forward pass leaves in memory for its backward pass."""
        def forward() -> object:
            with torch.autocast(self.device, dtype, enabled=dtype != torch.float32):
                return self.model(self.images, self.labels)

        with self.prepared(TRAINING, text), self.context(TRAINING, text):
            return kept_for_backward(forward) / 1e6 / len(self.images)

    def profile(self, work: str, text: str) -> str:
        """PyTorch's table of one call by operator."""
        with self.prepared(work, text) as call, profile() as found:
            call()
        kind = "device" if self.device == "cuda" else "cpu"
        return found.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=25, max_name_column_width=50)

    def save(self, path: str) -> None:
        torch.save(self.model.state_dict(), path)

    def load(self, path: str) -> None:
        self.model.load_state_dict(torch.load(path, map_location=self.device))


def serve(arguments: str) -> None:
    """The life of such a process: make a Subject, answer each line of JSON with one, until no more lines come."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    keep_freed_memory()
    subject = Subject(*json.loads(arguments))
    for line in sys.stdin:
        method, *values = json.loads(line)
        print(json.dumps(getattr(subject, method)(*values)), file=answers, flush=True)


class Process:
    """A Subject in a process of its own, with the modules of the checkout in `folder`."""

    def __init__(self, folder: Path, *arguments):
        self.folder, path = folder, os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, "serve", json.dumps(arguments)],  # -P: not this file's folder
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
            start_new_session=True)  # Ctrl-C is for the parent alone

    def ask(self, method: str, *values):
        """What the Subject's method returns. Raises UserError if the process has ended."""
        from common import UserError
        with suppress(BrokenPipeError):
            print(json.dumps([method, *values]), file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            why = "was killed: is there memory enough?" if self.process.wait() < 0 else "failed: see its message above"
            raise UserError(f"the process of {self.folder} {why}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


# --- systems

NOTES = [
    "`x NAME`: how many times as fast as that candidate. GFLOP of base and large models are the official code's, of "
    "others counted from our plain text; % is of the mean of the float32 matrix-product rates before and after.",
    "`kept`: MB an image that the forward pass makes and leaves in memory for the backward pass, in float32 and with "
    "bfloat16 autocast. `peak`: of the whole process (of the GPU's memory), weights and AdamW's moments included.",
    "`old` is the other checkout's fast text, or the only one it has. All our candidates compute with the same weights "
    "and random numbers, so their losses must be equal.",
    "A batch norm that gets one value a channel (UperNet's coarsest pooling of one image) uses its running statistics.",
]


def systems_tables(options: argparse.Namespace) -> Iterator[Table]:
    """A table for each system."""
    from common import UserError
    if options.old and not (options.old / "model.py").is_file():
        raise UserError(f"--old {options.old} has no model.py: name the folder of another checkout of this project")
    if options.against and not importlib.util.find_spec(options.against):
        raise UserError("the package transformers is missing: pip install -r requirements-dev.txt")
    systems = options.systems or TINY
    for system in systems:  # before the first of them is measured
        config_of(system, options.changes)
    for system in systems:
        batch = options.batch or (1 if system.endswith("large") else 2)
        notes: list[str] = []
        with ExitStack() as stack:
            candidates = start_candidates(system, batch, options, stack)
            rows = [row for work in (FORWARD, TRAINING)
                    for row in measure(system, work, batch, candidates, options, notes)]
        yield Table(f"{system}, float32", rows, NOTES + notes)


Candidates = dict[str, tuple["Process", str]]  # name -> its process, and which text runs there


def start_candidates(system: str, batch: int, options: argparse.Namespace, stack: ExitStack) -> Candidates:
    """Our plain and fast text, which share a process, and those that --old and --against name."""
    def start(folder: Path, peer: bool = False) -> Process:
        arguments = (peer, system, batch, options.device, options.changes)
        return stack.enter_context(closing(Process(folder, *arguments)))

    ours = start(ROOT)
    candidates = {"plain": (ours, "plain"), "fast": (ours, "fast")}
    if options.old:
        old, entrances = start(options.old.resolve()), options.old / "fast" / "__init__.py"
        has_fast = entrances.is_file() and "def training" in entrances.read_text()
        candidates["old"] = (old, "fast" if has_fast else "plain")  # older checkouts have one text
        with tempfile.TemporaryDirectory() as folder:
            ours.ask("save", f"{folder}/weights.pt")
            old.ask("load", f"{folder}/weights.pt")
    if options.against:
        candidates[options.against] = (start(ROOT, peer=True), "plain")
    return candidates


def measure(system: str, work: str, batch: int, candidates: Candidates, options: argparse.Namespace,
            notes: list[str]) -> list[Row]:
    """A row for each candidate; `notes` gets what was left out, a rate that moved, and the profiles."""
    memory: dict[str, Row] = {}
    for name, (process, text) in candidates.items():
        shared = name in ("plain", "fast")
        if not shared and options.device == "cpu" and (len(candidates) - 1) * memory["plain"]["peak GB"] > MEMORY:
            notes.append(f"{work}: {name} is left out, for its process has no room in memory beside ours.")
            continue
        memory[name] = process.ask("memory", work, text)
        if options.profile:
            notes.append(f"{work}, {name}:\n```\n{process.ask('profile', work, text)}\n```")
    images, title = (batch, f"{work}, batch {batch}") if work == TRAINING else (1, work)
    official = None if options.changes else OFFICIAL.get(system)
    gflop = images * official[work == TRAINING] if official else candidates["plain"][0].ask("gflop", work)
    before = matmul_rate(options.device)
    turns = {name: partial(candidates[name][0].ask, "seconds", work, candidates[name][1]) for name in memory}
    taken = interleaved(turns, options.rounds, f"{system}, {work}")
    after = matmul_rate(options.device)
    if max(before, after) > 1.1 * min(before, after):
        notes.append(f"{work}: the rate moved from {before:.0f} to {after:.0f} GFLOP/s: measure again.")
    return [{"work": title, "candidate": name, "s": taken[name],
             **{f"x {other}": taken[other] / taken[name] if other in taken else ""
                for other in candidates if other != "fast"},
             "GFLOP": gflop, "GFLOP/s before": before, "after": after,
             "% of rate": "" if name == options.against else 200 * gflop / taken[name] / (before + after),
             **memory[name]} for name in memory]


# --- deformable attention

PYRAMID = ((60, 60), (30, 30), (15, 15))
OP_CALLS = {  # in the large models at 480 x 480 -> levels, queries Q, heads M
    "pixel decoder": (PYRAMID[::-1], 4725, 32), "injector": (PYRAMID, 900, 16), "extractor": (PYRAMID[1:2], 4725, 16)}


def op_case(levels: Sequence[tuple[int, int]], Q: int, M: int, device: str) -> list[Tensor]:
    """Value, locations and weights, batch 1, D = 32, P = 4. As in a trained model, points lie near their query."""
    torch.manual_seed(0)
    side, i, sizes = Q**0.5, torch.arange(Q), torch.tensor([(w, h) for h, w in levels])
    value = torch.randn(1, sum(h * w for h, w in levels), M, 32)
    centres = torch.stack(((i % side) / side, (i / side).floor() / side), dim=-1)[:, None, None, None]
    locations = centres + 3 * torch.randn(1, Q, M, len(levels), 4, 2) / sizes[:, None]
    return [x.to(device).requires_grad_() for x in (value, locations, torch.rand(locations.shape[:-1]))]


def op_row(call: str, device: str, rounds: int) -> Row:
    """Milliseconds of forward and of forward + backward, and MB kept between them, of both texts."""
    from msda_cuda import ms_deform_attn, ms_deform_attn_torch
    levels, (value, *points) = OP_CALLS[call][0], op_case(*OP_CALLS[call], device)
    functions = {"torch": partial(ms_deform_attn_torch, value, levels, *points),
                 "native": partial(ms_deform_attn, value, levels, *points)}

    def training(function: Callable[[], Tensor]) -> None:
        output = function()
        torch.autograd.grad(output, (value, *points), torch.ones_like(output))

    row: Row = {"call": call}
    for title, work in (("forward", torch.no_grad()(lambda function: function())), ("training", training)):
        turns = {name: partial(seconds, partial(work, function), device) for name, function in functions.items()}
        taken = interleaved(turns, rounds, f"{call}, {title}")
        row |= {f"{title}: {name} ms": 1e3 * each for name, each in taken.items()}
        row[f"{title}: ratio"] = taken["torch"] / taken["native"]
    inputs = value.nbytes + sum(x.nbytes for x in points)
    return row | {f"kept: {name} MB": (inputs + kept_for_backward(function)) / 1e6
                  for name, function in functions.items()}


def op_tables(options: argparse.Namespace) -> Iterator[Table]:
    """The native operator against the grid_sample reference. Raises UserError without the operator."""
    from common import UserError
    from msda_cuda.ops import active_path, native
    if active_path(options.device) != "native":
        raise UserError(f"there is no native operator for {options.device} to compare: {native().reason}")
    yield Table("Deformable attention of the large models, float32, batch 1", [
        op_row(call, options.device, options.rounds) for call in OP_CALLS
    ], ["`training` is forward + backward; `kept` is what lies in memory between them, inputs included."])


# --- training loader

def loader_seconds(dataset, window: int, number: int, batch: int, workers: int) -> float:
    """Seconds for `number` images at the steady rate: once the workers' first batches are used up."""
    import data
    positions = data.positions(0, 0, 1, batch, 1)
    with closing(data.training_loader(dataset, window, seed=0, positions=positions, workers=workers)) as stream:
        for _ in range(1 + 2 * workers):  # a worker prepares two batches ahead
            next(stream)
        return seconds(lambda: [next(stream) for _ in range(number // batch)])


def loader_tables(options: argparse.Namespace) -> Iterator[Table]:
    """Images a second of each stage on one core, of the loader without and with workers, and of a training step."""
    import data
    (system,), batch = options.systems or TINY[:1], options.batch or 2
    window, dataset = config_of(system, options.changes).window, data.open_dataset(options.data, "train")
    number = max(1, (options.limit or 64) // batch) * batch
    chosen = [i % len(dataset) for i in range(number)]
    pairs = [(dataset.image(i), dataset.labels(i)) for i in chosen]
    stages = {"read image": lambda: [dataset.image(i) for i in chosen],
              "read labels": lambda: [dataset.labels(i) for i in chosen],
              "transform": lambda: [data.train_transform(*pair, window, np.random.default_rng(seed))
                                    for seed, pair in enumerate(pairs)]}
    torch.set_num_threads(1)  # as in a worker of the loader; the model has a process of its own
    turns = {name: partial(seconds, stage) for name, stage in stages.items()}
    loaders = {"loader, in this process": 0, f"loader, {options.workers} workers": options.workers}
    turns |= {name: partial(loader_seconds, dataset, window, number, batch, workers)
              for name, workers in loaders.items()}
    step = f"training step of {system}"
    with closing(Process(ROOT, False, system, batch, options.device, options.changes)) as model:
        turns[step] = lambda: model.ask("seconds", TRAINING, "fast") * number / batch
        taken = interleaved(turns, options.rounds, "loader")
    rows: list[Row] = [{"stage": name, "images/s": number / each, "ms/image": 1e3 * each / number}
                       for name, each in taken.items()]
    ahead = min(map(taken.get, loaders)) < taken[step]
    title = f"Training pipeline, {dataset.info.name}, window {window}, batch {batch}, {number} images a round"
    yield Table(title, rows, [
        f"Slowest stage: **{max(stages, key=taken.get)}**. "
        f"The {'loader is ahead of the model' if ahead else 'model waits for the loader'}."])


# --- multi-scale + flip evaluation

def plain_prediction(model: nn.Module, image: np.ndarray, device: str) -> Tensor:
    """Classes (H, W) of a picture (H, W, 3) by the definition: the mean over its 12 views, one window at a time."""
    import data
    total = 0
    for picture in data.multi_scale_images(image, model.config.window):
        view = data.normalize(torch.from_numpy(picture).to(device).permute(2, 0, 1)[None])  # (1, 3, h, w)
        for flip in (False, True):
            scores = plain_slide(model, view.flip(-1) if flip else view)
            probabilities = F.interpolate(scores, image.shape[:2], mode="bilinear", align_corners=False).softmax(1)[0]
            total = total + (probabilities.flip(-1) if flip else probabilities)
    return total.argmax(dim=0)


def plain_slide(model: nn.Module, view: Tensor) -> Tensor:
    """Scores (1, K, h, w): the mean over the windows, which step by 2/3 of their side and end at the border."""
    window, (height, width) = model.config.window, view.shape[2:]
    stride = window * 2 // 3
    total, count = view.new_zeros(1, model.config.num_classes, height, width), view.new_zeros(height, width)
    for bottom in (min(y, height) for y in range(window, height + stride, stride)):
        for right in (min(x, width) for x in range(window, width + stride, stride)):
            here = (..., slice(bottom - window, bottom), slice(right - window, right))
            total[here] += model(view[here])
            count[here] += 1
    return total / count


def evaluate_tables(options: argparse.Namespace) -> Iterator[Table]:
    """evaluate.predictions against the plain loop, on the same pictures and a model with starting weights."""
    import data
    import evaluate
    import fast
    from model import build_model
    (system,), device = options.systems or TINY[:1], options.device
    config_of(system, options.changes)
    dataset = data.open_dataset(options.data, "val")
    images = [dataset.image(i) for i in range(min(len(dataset), options.limit or 8))]
    torch.manual_seed(0)
    changes = {**options.changes, "num_classes": len(dataset.info.classes)}
    model = build_model(*system.split("-"), **changes).to(device).eval()
    batch = evaluate.automatic_window_batch(model, device)
    ways = {"one window at a time": lambda: [plain_prediction(model, image, device) for image in images],
            f"evaluate.py, {batch} at a time": lambda: list(evaluate.predictions(
                model, images, multi_scale=True, device=device, window_batch=batch))}
    with torch.no_grad(), fast.inference(model):
        plain, batched = (torch.cat([x.flatten().long() for x in way()]) for way in ways.values())  # the warm-up too
        turns = {name: partial(seconds, way, device) for name, way in ways.items()}
        slow, quick = interleaved(turns, options.rounds, "evaluate", warm=0).values()
    rows: list[Row] = [{"way": name, "s/image": each / len(images), "images/s": len(images) / each}
                       for name, each in zip(ways, (slow, quick), strict=True)]
    title = f"Multi-scale + flip, {system}, window {model.config.window}, {len(images)} images of {dataset.info.name}"
    yield Table(title, rows,
                [f"evaluate.py is **{slow / quick:.2f} times** as fast. The predictions differ in "
                 f"{int((plain != batched).sum()):,} of {len(plain):,} pixels and name {len(plain.unique())} classes."])


# --- the command line

TABLES = {"systems": systems_tables, "op": op_tables, "loader": loader_tables, "evaluate": evaluate_tables}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    import common
    p = common.Parser(prog="-m tools.bench", description=__doc__.split("Reading order:")[0],
                      formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=TABLES)
    p.add_argument("systems", nargs="*", metavar="HEAD-SIZE",
                   help=f"models, as mask2former-base; default: {' '.join(TINY)}, of loader and evaluate the first")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    p.add_argument("--rounds", type=common.positive, default=5, metavar="N", help="timed rounds; default: 5")
    p.add_argument("--batch", type=common.positive, metavar="N",
                   help="images of a training step; default: 2, of large models in systems 1")
    p.add_argument("--window", type=common.positive, metavar="PIXELS", help="default: that of the size")
    systems = p.add_argument_group("systems")
    systems.add_argument("--against", choices=["transformers"], help="also its BEiT with the same head")
    systems.add_argument("--old", type=Path, metavar="DIR", help="also another checkout of this project, same weights")
    systems.add_argument("--profile", action="store_true", help="also PyTorch's table by operator, of each candidate")
    data = p.add_argument_group("loader and evaluate")
    data.add_argument("--data", default="toy", metavar="DIR", help="data set folder; default: the toy data")
    data.add_argument("--limit", type=common.positive, metavar="N", help="images a round; default: 64 and 8")
    data.add_argument("--workers", type=common.positive, default=os.cpu_count() or 1, metavar="N",
                      help="of the loader; default: one for each core")
    options = p.parse_args(arguments)
    if options.what in ("loader", "evaluate") and len(options.systems) > 1:
        p.error(f"{options.what} takes one HEAD-SIZE, not {len(options.systems)}")
    options.changes = {"window": options.window} if options.window else {}
    return options


def run(options: argparse.Namespace) -> None:
    """Print the tables as they are done, and write them into the JSON file."""
    import common
    options.device = str(common.choose_device(options.device))
    if options.json:
        common.check_file(options.json, "--json")
    keep_freed_memory()
    found = {"machine": machine(options.device), "tables": []}
    print(found["machine"])
    for table in TABLES[options.what](options):
        table = table._replace(title=f"{table.title}, {options.device}, medians of {options.rounds} rounds")
        print(f"\n{markdown(table)}", flush=True)
        found["tables"].append(table._asdict())
        if options.json:
            written = json.dumps(found, indent=1).encode()
            common.write_whole(options.json, lambda file, written=written: file.write(written))


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    import common
    return common.run(partial(run, parse(arguments)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
