"""Checks of `gpu_check` that compare numbers in this process: functions, small models; and measurements of large ones.

Reading order: Result, verdict -> operator -> attention -> one_step -> models -> steps.

Shapes: B batch, w window, S positions of all levels, Q queries, M heads, D channels of a head, L levels, K classes.
"""

import gc
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import fast
import train
from data import Batch
from fast import operators
from fast.attention import gather_columns
from fast.swap import same_points
from heads import Normalizers, loss_normalizers
from model import Segmenter, build_model, relative_position_index
from msda_cuda import active_path, ms_deform_attn, ms_deform_attn_torch, ops
from run import Process
from tools import bench
from tools.bench import ROOT, Row

PASSED, FAILED, LEFT_OUT, UNUSED = "passed", "FAILED", "left out", "failed, not used"
CPU, HEADS, CLASSES, WINDOW, IMAGES = torch.device("cpu"), ("upernet", "mask2former"), 6, 64, 4  # of small models
BACK_ENDS = {"as the model calls it": None, "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
             "cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
SWAPPED_POINT = 1e-2  # a loss looks at the 768 most uncertain of 3,072 points of a mask, and rounding may swap two
KEYS = (64, 225, 900, 1600, 3600)  # of masks: Mask2Former's maps at several windows; two are 64 mod 128
LOW = -120.0  # a score: cuDNN's backward pass gave NaN where 64 mod 128 keys had scores whose exp() float32 cannot hold


class Result(NamedTuple):
    """One line of the page: what was checked, how it ended, and a number with its limit or the reason."""
    name: str
    outcome: str
    found: str


class LeftOut(Exception):
    """A check needs what is not here; the message says what."""


Found = Iterator[Result | Row]  # a row is a measurement; it has the title of its table under "table"


def need(there: bool, what: str) -> None:
    """Raises LeftOut."""
    if not there:
        raise LeftOut(f"needs {what}")


def verdict(name: str, errors: dict[str, float], limit: float, note: str = "", otherwise: str = FAILED) -> Result:
    """Passed if no number is above the limit; NaN is. Only the numbers that are, or the largest, are shown."""
    bad = [f"{case} {error:.2g}" for case, error in errors.items() if not error <= limit]
    shown = ", ".join(bad) or f"{max(errors.values()):.2g}"
    return Result(name, otherwise if bad else PASSED, f"{shown}, limit {limit:g}{note}")


def error_of(found: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest entry expected; of several pairs the worst. NaN if one is NaN, or
    of another shape."""
    if isinstance(found, Tensor):
        found, expected = [found], [expected]
    pairs = ([x.detach().double().cpu() for x in pair] for pair in zip(found, expected, strict=True))
    return float(np.max([((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item() if x.shape == y.shape else np.nan
                         for x, y in pairs]))


# ------------------------------------------------------------------------------------------------------------ functions
def operator(device: torch.device) -> Found:
    """Deformable attention at the models' shapes, output and gradients, against float64 of the PyTorch text."""
    if active_path(device.type) != "native":
        why = f"there is no native operator: {ops.native().reason}"
        raise LeftOut(why) if device == CPU else RuntimeError(why)
    part = 8 if device == CPU else 1
    calls = {name: (levels, Q // part, M // part, 32) for name, (levels, Q, M) in bench.OP_CALLS.items()}
    calls["24 channels"] = ((15, 15), (30, 30)), 101, 3, 24  # the general kernel, as for a misaligned start
    for (name, (levels, Q, M, D)), (dtype, limit) in product(calls.items(), (
            (torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3))):
        inputs = bench.op_case(levels, Q, M, device, dtype, 2, D)
        gradient = torch.randn(2, Q, M * D).to(device, dtype)
        precise = [x.detach().double().requires_grad_() for x in inputs]
        expected = bench.output_and_gradients(ms_deform_attn_torch, levels, precise, gradient.double())
        shifted = F.pad(inputs[0].detach().flatten(), (1, 0))[1:].view_as(inputs[0]).requires_grad_()
        errors = {}
        for case, value in (("aligned", inputs[0]), ("misaligned", shifted)):
            found = bench.output_and_gradients(ms_deform_attn, levels, [value, *inputs[1:]], gradient)
            errors[case] = error_of(found, expected)
        yield verdict(f"operator, {name}, {dtype}", errors, limit)


def attention(device: torch.device) -> Found:
    """Attention with BEiT's bias and with Mask2Former's masks, output and gradients, against float64.

    Some back end runs what the model calls, and must be right. One that fails when it is asked for by name is told, not
    counted: fast/ may keep it off. It can be switched on where the page says "passed".
    """
    cases = {f"{'trained ' * trained}bias in rows of {row}": (901, row, trained) for row in (901, 904)
             for trained in (False, True)} | {f"mask of {keys} keys": (keys, 0, False) for keys in KEYS}
    for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
        for name, back_end in BACK_ENDS.items():
            errors, refused = {}, []
            for case, about in cases.items():
                try:
                    found = attend(device, *about, dtype, dtype, back_end)
                except RuntimeError as error:
                    if re.search("No (available kernel|viable backend)", str(error)):
                        refused.append(case)
                    else:
                        errors[f"{case}: {common.reason(error)}"] = float("nan")
                    continue
                errors[case] = error_of(found, attend(device, *about, dtype, torch.float64, SDPBackend.MATH))
            title, note = f"attention, {name}, {dtype}", f"not taken: {', '.join(refused)}"
            if errors:
                yield verdict(title, errors, limit, f"; {note}" * bool(refused), UNUSED if back_end else FAILED)
            else:
                yield Result(title, LEFT_OUT, "not taken")


def attend(device: torch.device, keys: int, row: int, trained: bool, rounded: torch.dtype, dtype: torch.dtype,
           back_end: SDPBackend | None) -> list[Tensor]:
    """Output and gradients in `dtype` for numbers `rounded` to another. A bias whose rows of `keys` numbers lie in rows
    of `row`, or if that is 0 a mask."""
    heads, g = 12 if device.type == "cuda" else 1, torch.Generator().manual_seed(0)
    queries, channels = (keys, 64) if row else (100, 32)
    *leaves, gradient = (torch.randn(2, heads, n, channels, generator=g).to(device, rounded).to(dtype)
                         for n in (queries, keys, keys, queries))
    if row:
        table = torch.randn(59 * 59 + 3, heads, generator=g).to(device, rounded)
        table = table.to(torch.promote_types(dtype, torch.float32)).requires_grad_(trained)  # as parameters are
        bias = gather_columns(table.t(), relative_position_index(30, 30).to(device), dtype)  # (M, keys, keys)
        mask, tables = F.pad(bias, (0, row - keys))[None, ..., :keys], [table] * trained
    else:
        mask, tables = (torch.rand(2, 1, queries, keys, generator=g) < 0.3).to(device), []
        mask |= ~mask.any(-1, keepdim=True)
        for x, number in zip(leaves, (1.0, LOW * channels**0.5), strict=False):
            x[:, 0, :, 0] = number  # all scores of the first head are lower by as much (pytorch#196678)
    query, key, value = leaves = [x.requires_grad_() for x in leaves]
    with nullcontext() if back_end is None else sdpa_kernel(back_end), warnings.catch_warnings(action="ignore"):
        function = operators.attention if back_end is None else F.scaled_dot_product_attention
        output = function(query, key, value, attn_mask=mask)
    to_query, *gradients = torch.autograd.grad(output, [*leaves, *tables], gradient)
    return [output, to_query[..., 1:], *gradients]  # where a key is that large, rounding is as large as the gradient


# --------------------------------------------------------------------------------------------------------- small models
class Step(NamedTuple):
    """What a training step of a small model gives, and its scores afterwards."""

    losses: Tensor
    gradients: list[Tensor]
    scores: Tensor

    def errors(self, expected: "Step") -> dict[str, float]:
        """The relative errors; of gradients, which may be all but 0, the lengths of the differences."""
        least = 1e-4 * torch.nn.utils.get_total_norm(expected.gradients).item()
        pairs = zip(self.gradients, expected.gradients, strict=True)
        gradients = [(x - y).norm().item() / max(y.norm().item(), least) for x, y in pairs]
        return {"losses": error_of(self.losses, expected.losses), "gradients": float(np.max(gradients)),
                "scores": error_of(self.scores, expected.scores)}


def one_step(head: str, device: torch.device, dtype: torch.dtype = torch.float32, amp: torch.dtype | None = None,
             fast_text: bool = False, labelled: bool = True, process: Process | None = None) -> Step:
    """A step on this process's share of four images, with the same weights everywhere, and the same points in its
    losses: torch.rand alone makes them. The model is as wide as fast/ asks for; every layer counts."""
    torch.manual_seed(0)
    process = process or Process(0, 1, device)
    model = build_model(head, "tiny", CLASSES, window=WINDOW, embed_dim=operators.NARROW)
    with torch.no_grad():
        for name, x in model.named_parameters():
            scale = x.dim() < 2 and ("gamma" in name or name.endswith("weight"))
            x.uniform_(0.5, 1.5) if scale else x.normal_(std=x[0].numel() ** -0.5 if x.dim() > 1 else 0.2)
    images = torch.randn(IMAGES, 3, WINDOW, WINDOW).to(device, dtype)
    labels = torch.randint(CLASSES, (IMAGES, 4, 4)).repeat_interleave(16, 1).repeat_interleave(16, 2).to(torch.uint8)
    labels[:, :5 if labelled else WINDOW] = common.IGNORE
    parallel = train.data_parallel(model.to(device, dtype).train(), process)
    precision = torch.autocast(device.type, amp, enabled=amp is not None)
    mine = slice(process.rank * IMAGES // process.world, (process.rank + 1) * IMAGES // process.world)
    counts, _ = train.exchange([Batch(images[mine], labels[mine], None, [])], CLASSES, False, process)
    divisors = Normalizers(*(x.to(device, dtype) for x in loss_normalizers(counts, mine, model.config.num_queries)))
    with fast.training(model, fast_text), patch.object(torch, "rand", same_points):
        with precision:
            losses = parallel(images[mine], labels[mine].to(device).long(), divisors)
        losses["loss"].backward()
    with torch.no_grad(), fast.inference(model.eval(), fast_text), precision:
        scores = model(images)
    losses, *gradients, scores = (x.detach().double().cpu() for x in (
        torch.stack(list(losses.values())), *(p.grad for p in model.parameters()), scores))
    return Step(losses, gradients, scores)


def models(device: torch.device) -> Found:
    """Both heads against float64 on the CPU, and the fast text, mixed precision, images without any label."""
    for head in HEADS:
        plain = one_step(head, device)
        yield verdict(f"{head}, float32", plain.errors(one_step(head, CPU, torch.float64)), SWAPPED_POINT)
        yield verdict(f"{head}, fast text", one_step(head, device, fast_text=True).errors(plain), SWAPPED_POINT)
        for amp in (torch.bfloat16,) if device == CPU else (torch.bfloat16, torch.float16):
            step = one_step(head, device, amp=amp, fast_text=True)
            finite = all(x.isfinite().all() for x in step.gradients)
            errors = {"losses": error_of(step.losses, plain.losses), "gradients not finite": 0.0 if finite else np.inf}
            yield verdict(f"{head}, {amp}", errors, 5e-2, ", gradients finite" * finite)
        step = one_step(head, device, amp=torch.bfloat16, fast_text=True, labelled=False)
        finite = all(x.isfinite().all() for x in (step.losses, *step.gradients, step.scores))
        yield Result(f"{head}, no pixel labelled", PASSED if finite else FAILED, f"loss {step.losses[0]:.3g}")


# --------------------------------------------------------------------------------------------------------- measurements
def steps(device: torch.device) -> Found:
    """Training steps of the released models in bfloat16: time, kernels, memory, waits, beside docs/gpu-budget.md."""
    need(device != CPU, "a GPU")
    common.allow_tf32(True)
    for name, dtype in (("TF32", torch.float32), ("bfloat16", torch.bfloat16)):
        rate = bench.matmul_rate(device.type, dtype) / 1e3
        yield {"table": "Products of random matrices", "type": name, "TFLOP/s": rate}
    for system in bench.OFFICIAL:
        head, size = system.split("-")
        with device:
            model = build_model(head, size).train()
        for images in (2, 16, 8, 4):  # 2, and the most that fit
            try:
                row = measured_step(model, images)
            except torch.OutOfMemoryError:
                row = {}
            gc.collect()  # the step's tensors
            torch.cuda.empty_cache()
            if not row:
                yield Result(f"{system}, {images} images", LEFT_OUT, "does not fit")
            else:
                computed = budget(f"{head} {size}", images)
                yield {"table": "Training steps in bfloat16", "system": system, "images": images, **row, **computed}
                title, once = f"{system}, {images} images", head == "mask2former"  # for the matching, on the host
                yield verdict(f"{title}, waits for the GPU", {"waits": row["waits"]}, int(once))
                yield verdict(f"{title}, peak GB", {"GB": row["peak GB"]}, round(1.5 * computed["computed GB"], 1))
            if row and images > 2:
                break
        del model


def measured_step(model: Segmenter, images: int) -> Row:
    """Milliseconds of a step until it is done, until the host has launched it, and those in which the GPU works."""
    device, window, rounds = model.backbone.cls_token.device, model.config.window, 5
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 1e-6, 0.05, 0.9), fused=True)
    pixels = torch.randn(images, 3, window, window).to(device)
    labels = F.interpolate(torch.randint(8, (images, 1, 8, 8)).float(), window)[:, 0].long().to(device)

    def step() -> None:
        with fast.training(model):
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(pixels, labels)["loss"]
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(rounds):
        step()
    launched = (time.perf_counter() - start) / rounds
    torch.cuda.synchronize()
    done, peak = (time.perf_counter() - start) / rounds, torch.cuda.max_memory_allocated() / 1e9
    kernels = bench.device_work(step)
    busy = sum(seconds for _, seconds in kernels)
    return {"step ms": 1e3 * done, "host ms": 1e3 * launched, "GPU ms": 1e3 * busy, "kernels": len(kernels),
            "waits": waits(step), "peak GB": peak}


def waits(work: Callable[[], object]) -> int:
    """How often the host waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def budget(system: str, images: int) -> Row:
    """What docs/gpu-budget.md computes of a system like "mask2former base"; times for some numbers of images only."""
    text, found = (ROOT / "docs" / "gpu-budget.md").read_text(), []
    for title in ("Memory and exchange, computed", "Training step, computed"):
        lines = text.partition(f"### {title}\n\n")[2].partition("\n\n")[0].splitlines()
        names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        rows = [dict(zip(names, row, strict=True)) for row in rows]
        found += [row for row in rows if row["system"] == system and row.get("images", str(images)) == str(images)]
    states, kept, always = (float(found[0][f"{name} GB"]) for name in ("states", "kept an image", "kept in any case"))
    host, gpu = (found[1][column] if found[1:] else "" for column in ("host ms", "sum ms"))
    return {"computed host ms": host, "computed GPU ms": gpu, "computed GB": states + always + images * kept}
