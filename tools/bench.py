"""Speed and memory, side by side on this machine: `python -m tools.bench WHAT [HEAD-SIZE ...]`.

    systems    training step and forward pass: seconds, share of the matrix-product rate, memory
    op         deformable attention: the native operator against the PyTorch reference
    loader     images a second of the training pipeline and of a training step
    evaluate   multi-scale + flip: windows in batches against one at a time

The candidates take turns and the median of each is printed: a busy machine slows all of them alike. Compare ratios of
one run (`x NAME`: times as fast as NAME); compare seconds of two runs only if the first line says "quiet".

Reading order: interleaved -> device_work, kept_for_backward -> Subject (a model in a process of its own) -> Process
(its other end) -> systems -> operator -> loader -> evaluation -> main.

Shapes: B batch, w window, K classes, Q queries, M heads, D channels of a head.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer, timer
from tqdm import tqdm

SERVES = __name__ == "__main__" and sys.argv[1:2] == ["serve"]
if not SERVES:  # a Subject may run in an older checkout, without these
    import common
    import data
    import evaluate
    import fast
    from msda_cuda import ms_deform_attn, ms_deform_attn_torch, ops

ROOT = Path(__file__).parents[1]
# As in a training run, and all candidates alike: an older checkout may not have it.
keep_freed_memory = runpy.run_path(str(ROOT / "fast" / "allocator.py"))["keep_freed_memory"]
TINY = ["mask2former-tiny", "upernet-tiny"]
# GFLOP of a forward pass and of a training step for one image of 480 x 480, as the official code computes them. Where
# our code saves arithmetic, a share of the rate can pass 100 %.
OFFICIAL = {"mask2former-base": (356, 1084), "mask2former-large": (1905, 5746), "upernet-large": (2284, 6884)}
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9  # GB of this machine
PRESENT = 8  # classes in a training crop
TRAINING, FORWARD = "training step", "forward pass"
Row = dict[str, str | int | float]  # the rows of a table have the same keys; an empty text stands for no value


def cell(value: str | int | float) -> str:
    """Texts and whole numbers as they are; others with three digits, or all before the point: 12.3, 0.0123, 1,234."""
    short = ".3g" if isinstance(value, float) and abs(value) < 999.5 else ",.0f"
    return value if isinstance(value, str) else format(value, short)


def markdown(rows: list[Row]) -> str:
    """A table in Markdown, padded to read well in a terminal too."""
    lines = [list(rows[0]), ["--:"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"| {' | '.join(map(str.rjust, line, widths))} |" for line in lines)


def machine(device: str) -> str:
    """Processor, cores, load and PyTorch. Ask before the work begins, for the work is load too."""
    name = torch.cuda.get_device_name() if device == "cuda" else os.uname().machine
    with suppress(OSError, TypeError):  # Linux tells more of the processor
        name += ", " + re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    load = os.getloadavg()[0]
    state = "quiet" if load <= 0.3 else "under load from other programs: measure again on a quiet machine"
    return (f"{name}, {torch.get_num_threads()} of {os.cpu_count()} CPU cores, load average {load:.1f} at the start "
            f"({state}), PyTorch {torch.__version__}")


def seconds(work: Callable[[], object]) -> float:
    """Seconds of one call, until the device has finished."""
    start = timer()
    work()
    return timer() - start


def interleaved(turns: dict[str, Callable[[], float]], rounds: int, title: str) -> dict[str, float]:
    """Median of the seconds that each candidate returns; they take turns. The first round does not count."""
    taken = [{name: turn() for name, turn in turns.items()}
             for _ in tqdm(range(1 + rounds), desc=title, unit="round", disable=None, leave=False)]
    return {name: float(np.median([each[name] for each in taken[1:]])) for name in turns}


def device_work(work: Callable[[], object]) -> list[tuple[str, float]]:
    """The kernels and copies that one call has the GPU do: names and seconds."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    # What the program calls a part of itself lies on the GPU's time line, too.
    return [(each.name, each.time_range.elapsed_us() / 1e6) for each in found.events()
            if each.device_type == DeviceType.CUDA and not each.is_user_annotation]


def device_seconds(work: Callable[[], object]) -> float:
    """Seconds in which the GPU works during one call."""
    return sum(each for _, each in device_work(work))


def matmul_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of matrix products of random numbers, of the size of large models' feed-forward layers."""
    a, b = torch.randn(4725, 1024, device=device).to(dtype), torch.randn(1024, 4096, device=device).to(dtype)
    product = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * 4725 * 1024 * 4096 / product.blocked_autorange(min_run_time=1.0).median / 1e9


def storages(tree: object) -> dict[StorageWeakRef, int]:
    """The storages of all tensors in nested containers, without keeping them alive, and their bytes."""
    held = (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor))
    return {StorageWeakRef(storage): storage.nbytes() for storage in held}


def kept_for_backward(function: Callable[[], object]) -> int:
    """Bytes that `function()` makes and that are still alive after it, except its result: its backward pass needs them.

    Unlike hooks on saved tensors, this counts what custom functions keep, and leaves out what they compute again.
    """
    made: dict[StorageWeakRef, int] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result, old = operator(*args, **(kwargs or {})), storages((args, kwargs))
            # Views and in-place operators share an argument's storage: they make none.
            made.update((ref, size) for ref, size in storages(result).items() if ref not in old)
            return result

    with Watch():
        result = function()
    gc.collect()
    output = storages(result)
    return sum(size for ref, size in made.items() if not ref.expired() and ref not in output)


def peak_of(work: Callable[[], object], device: str = "cpu") -> float:
    """Most GB during `work()`, with what is there before: of the GPU, on a CPU of the process (NaN outside Linux)."""
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
    return float("nan")


def config_of(system: str, changes: dict):
    """The ModelConfig of HEAD-SIZE. Raises UserError if there is no such system."""
    from model import build_model
    head, _, size = system.partition("-")
    try:
        with torch.device("meta"):  # without values the model takes no memory
            return build_model(head, size, **changes).config
    except ValueError as error:
        raise common.UserError(f"{system}: {error}; name systems as HEAD-SIZE, for example {TINY[0]}") from None


def accept_single_values(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
    """Batch norm cannot train on one value a channel (UperNet's pooling of one image): it uses running statistics."""
    norm.training = norm.training and inputs[0].numel() > norm.num_features


class Subject:
    """A model with noise for images and squares for labels; its methods answer the requests of a `Process`.

    `work` is TRAINING (forward, losses, backward, optimiser) or FORWARD (one window); `name` is the candidate's.
    """

    def __init__(self, peer: bool, system: str, batch: int, device: str, changes: dict):
        from model import build_model
        torch.manual_seed(0)
        if peer:
            from tools.peer import Peer
            model = Peer(config_of(system, changes))
        else:
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

    def context(self, work: str, name: str) -> AbstractContextManager:
        """Where `work` runs: inside the fast text for "fast" and "old", unless an older checkout has none."""
        with suppress(ImportError):
            from fast import inference, training
            if name in ("fast", "old"):
                return (training if work == TRAINING else inference)(self.model)
        return nullcontext()

    def step(self, name: str) -> float:
        """One training step; returns the loss."""
        with self.context(TRAINING, name):
            loss = self.model(self.images, self.labels)["loss"]
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # after the step: hold no gradients while other candidates work
        return loss.item()

    @contextmanager
    def prepared(self, work: str, name: str) -> Iterator[Callable]:
        """Gives the call to measure, with the same random numbers in every round."""
        torch.manual_seed(0)
        self.model.train(work == TRAINING)
        if work == TRAINING:
            yield partial(self.step, name)
            return
        with self.context(work, name), torch.no_grad():
            self.model(self.images[:1])  # an evaluation enters the context once for many windows
            yield lambda: self.model(self.images[:1])

    def seconds(self, work: str, name: str) -> float:
        with self.prepared(work, name) as call:
            return seconds(call)

    def memory(self, work: str, name: str) -> Row:
        """Peak GB of a call; of a training step the loss too, and the MB an image kept for its backward pass."""
        row: Row = {"loss": "", "kept MB": "", "bf16 MB": ""}
        with self.prepared(work, name) as call:
            loss = call()  # this first call makes what stays
            peak = peak_of(call, self.device)
        if work == TRAINING:
            row["loss"] = f"{loss:.5f}"
            for column, enabled in (("kept MB", False), ("bf16 MB", True)):
                autocast = torch.autocast(self.device, torch.bfloat16, enabled=enabled)
                with self.prepared(work, name), self.context(work, name):
                    kept = kept_for_backward(autocast(lambda: self.model(self.images, self.labels)))
                row[column] = kept / 1e6 / len(self.images)
        return row | {"peak GB": peak}

    def profile(self, work: str, name: str) -> str:
        """PyTorch's table of one call by operator."""
        with self.prepared(work, name) as call, profile() as found:
            call()
        return found.key_averages().table(f"self_{self.device}_time_total", row_limit=25, max_name_column_width=50)

    def save(self, path: str) -> None:
        torch.save(self.model.state_dict(), path)

    def load(self, path: str) -> None:
        self.model.load_state_dict(torch.load(path, map_location=self.device))


def serve(folder: str, arguments: str) -> None:
    """Make a Subject of the checkout in `folder`, answer each line of JSON with one, until no more lines come."""
    sys.path.insert(0, folder)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    keep_freed_memory()
    subject = Subject(*json.loads(arguments))
    for line in sys.stdin:
        method, *values = json.loads(line)
        print(json.dumps(getattr(subject, method)(*values)), file=answers, flush=True)


class Process(subprocess.Popen):
    """A Subject in a process of its own, with the modules of the checkout in `folder`."""

    def __init__(self, folder: Path, *arguments):
        self.folder = folder
        command = [sys.executable, "-P", __file__, "serve", str(folder), json.dumps(arguments)]  # -P: without tools/
        super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                         start_new_session=True)  # Ctrl-C is for the parent alone

    def ask(self, method: str, *values):
        """What the Subject's method returns. Raises UserError if the process has ended."""
        with suppress(BrokenPipeError):
            print(json.dumps([method, *values]), file=self.stdin, flush=True)
        if answer := self.stdout.readline():
            return json.loads(answer)
        why = "was killed: is there memory enough?" if self.wait() < 0 else "failed: see its message above"
        raise common.UserError(f"the process of {self.folder} {why}")


def systems(system: str, options: argparse.Namespace) -> tuple[str, list[Row]]:
    """Speed and memory of a model's two texts, which share a process, and of what --old and --against name."""
    if options.old and not (options.old / "model.py").is_file():
        raise common.UserError(f"--old {options.old} has no model.py: name another checkout of this project")
    if options.against and not importlib.util.find_spec(options.against):
        raise common.UserError("the package transformers is missing: pip install -r requirements-dev.txt")
    batch = options.batch or (1 if system.endswith("large") else 2)
    with ExitStack() as stack:
        def start(folder: Path, peer: bool = False) -> Process:
            process = stack.enter_context(Process(folder, peer, system, batch, options.device, options.changes))
            stack.callback(process.kill)  # whatever it does
            return process

        candidates = dict.fromkeys(("plain", "fast"), start(ROOT))
        if options.old:
            candidates["old"] = start(options.old.resolve())
            with tempfile.TemporaryDirectory() as folder:
                candidates["plain"].ask("save", f"{folder}/weights.pt")
                candidates["old"].ask("load", f"{folder}/weights.pt")
        if options.against:
            candidates[options.against] = start(ROOT, peer=True)
        rows = [row for work in (FORWARD, TRAINING) for row in measure(system, work, batch, candidates, options)]
    return f"{system}, float32", rows


def measure(system: str, work: str, batch: int, candidates: dict, options: argparse.Namespace) -> list[Row]:
    """A row for each of the candidates {name: Process}. Prints who is left out, and the profiles."""
    memory: dict[str, Row] = {}
    for name, process in candidates.items():
        if (process is not candidates["plain"] and options.device == "cpu"
                and (len(candidates) - 1) * memory["plain"]["peak GB"] > MEMORY):
            print(f"{work}: {name} is left out, for its process has no room in memory beside ours.")
            continue
        memory[name] = process.ask("memory", work, name)
        if options.profile:
            print(f"\n{work}, {name}:\n{process.ask('profile', work, name)}")
    before = matmul_rate(options.device)
    turns = {name: partial(candidates[name].ask, "seconds", work, name) for name in memory}
    taken = interleaved(turns, options.rounds, f"{system}, {work}")
    after = matmul_rate(options.device)
    images, known = batch if work == TRAINING else 1, system in OFFICIAL and not options.changes
    gflop = images * OFFICIAL[system][work == TRAINING] if known else ""
    return [{"work": f"{work}, batch {images}", "candidate": name, "s": taken[name],
             **{f"x {other}": taken[other] / taken[name] if other in taken else ""
                for other in candidates if other != "fast"},
             "GFLOP": gflop, "GFLOP/s before": before, "after": after,
             "% of rate": 200 * gflop / taken[name] / (before + after) if known and name != options.against else "",
             **memory[name]} for name in memory]


PYRAMID = ((60, 60), (30, 30), (15, 15))
OP_CALLS = {  # in the large models at 480 x 480 -> levels, queries Q, heads M
    "pixel decoder": (PYRAMID[::-1], 4725, 32), "injector": (PYRAMID, 900, 16), "extractor": (PYRAMID[1:2], 4725, 16)}


def op_case(levels: Sequence[tuple[int, int]], Q: int, M: int, device: str | torch.device,
            dtype: torch.dtype = torch.float32, batch: int = 1, D: int = 32) -> list[Tensor]:
    """Value, locations and weights, P = 4. As in a trained model points lie near their query, some of them off the map;
    none lies on the middle of a pixel, where its gradient jumps."""
    torch.manual_seed(0)
    side, i, sizes = Q**0.5, torch.arange(Q), torch.tensor([(w, h) for h, w in levels])[:, None]
    value = torch.randn(batch, sum(h * w for h, w in levels), M, D).to(device, dtype)
    centres = torch.stack(((i % side) / side, (i / side).floor() / side), dim=-1)[:, None, None, None]
    pixels = centres * sizes + 3 * torch.randn(batch, Q, M, len(levels), 4, 2)
    locations = (pixels.floor() + (pixels % 1).clamp(0.02, 0.98) + 0.5) / sizes
    return [x.to(device).requires_grad_() for x in (value, locations, torch.rand(pixels.shape[:-1]))]


def output_and_gradients(function: Callable, levels: Sequence[tuple[int, int]], inputs: Sequence[Tensor],
                         gradient: Tensor | None = None) -> list[Tensor]:
    """The output of deformable attention, and the inputs' gradients, by default of its sum."""
    output = function(inputs[0], levels, *inputs[1:])
    return [output, *torch.autograd.grad(output, inputs, torch.ones_like(output) if gradient is None else gradient)]


def operator(_: str, options: argparse.Namespace) -> tuple[str, list[Row]]:
    """The native operator against the grid_sample reference. Raises UserError without the operator."""
    if ops.active_path(options.device) != "native":
        raise common.UserError(f"there is no native operator for {options.device} to compare: {ops.native().reason}")
    on_gpu, rows = options.device == "cuda", []
    kinds = [(1, torch.float32), (16, torch.float32), (16, torch.bfloat16)] if on_gpu else [(1, torch.float32)]
    for (call, (levels, Q, M)), (batch, dtype) in product(OP_CALLS.items(), kinds):
        inputs, turns, kept = op_case(levels, Q, M, options.device, dtype, batch), {}, {}
        for name, function in (("torch", ms_deform_attn_torch), ("native", ms_deform_attn)):
            forward = partial(function, inputs[0], levels, *inputs[1:])
            training = partial(output_and_gradients, function, levels, inputs)
            turns |= {f"forward: {name} ms": partial(device_seconds if on_gpu else seconds, torch.no_grad()(forward)),
                      f"training: {name} ms": partial(device_seconds if on_gpu else seconds, training)}
            kept[f"kept: {name} MB"] = (sum(x.nbytes for x in inputs) + kept_for_backward(forward)) / 1e6
        taken = {column: 1e3 * each for column, each in interleaved(turns, options.rounds, call).items()}
        ratios = {f"{title}: ratio": taken[f"{title}: torch ms"] / taken[f"{title}: native ms"]
                  for title in ("forward", "training")}
        kernels = [(name, each) for name, each in (device_work(training) if on_gpu else ()) if "msda" in name]
        alone = {f"{title} kernel ms": 1e3 * sum(each for name, each in kernels if title in name)
                 for title in ("forward", "backward") if on_gpu}
        rows.append({"call": call, "batch": batch, "type": str(dtype)[6:], **taken, **ratios, **alone, **kept})
    return "Deformable attention of the large models" + ", time of the GPU alone" * on_gpu, rows


def loader(system: str, options: argparse.Namespace) -> tuple[str, list[Row]]:
    """Images a second of the training pipeline without and with workers, and of a training step."""
    dataset, batch = data.open_dataset(options.data, "train"), options.batch or 2
    subject = Subject(False, system, batch, options.device, options.changes)
    window, number = subject.model.config.window, max(1, (options.limit or 64) // batch)

    def load(workers: int) -> float:
        """Seconds for `number` batches at the steady rate."""
        positions = data.positions(0, 0, 1, batch, 1)
        with closing(data.training_loader(dataset, window, seed=0, positions=positions, workers=workers)) as stream:
            for _ in range(1 + 2 * workers):  # a worker prepares two batches ahead
                next(stream)
            return seconds(lambda: [next(stream) for _ in range(number)])

    turns = {f"{workers} workers": partial(load, workers) for workers in (0, options.workers)}
    turns["training step"] = lambda: number * subject.seconds(TRAINING, "fast")
    taken = interleaved(turns, options.rounds, "loader")
    return (f"Training pipeline of {options.data} and {system}, window {window}, batch {batch}, {number} batches",
            [{f"{name}, images/s": number * batch / each for name, each in taken.items()}])


def evaluation(system: str, options: argparse.Namespace) -> tuple[str, list[Row]]:
    """Windows in batches against one at a time, on the same pictures and a model with starting weights."""
    dataset, device = data.open_dataset(options.data, "val"), options.device
    images = [dataset.image(i) for i in range(min(len(dataset), options.limit or 8))]
    changes = {**options.changes, "num_classes": len(dataset.info.classes)}
    model = Subject(False, system, 1, device, changes).model.eval()
    batch, found = evaluate.automatic_window_batch(model, device), {}

    def predict(windows: int) -> None:
        found[windows] = list(evaluate.predictions(
            model, images, multi_scale=True, device=device, window_batch=windows))

    turns = {f"{name} at a time": partial(seconds, partial(predict, windows))
             for name, windows in (("one window", 1), (f"{batch}", batch))}
    with torch.no_grad(), fast.inference(model):
        taken = interleaved(turns, options.rounds, "evaluate")
    row: Row = {f"{name}, images/s": len(images) / each for name, each in taken.items()}
    row["differing pixels"] = sum(int((x != y).sum()) for x, y in zip(found[1], found[batch], strict=True))
    return f"Multi-scale + flip, {system}, window {model.config.window}, {len(images)} images of {options.data}", [row]


TABLES = {"systems": systems, "op": operator, "loader": loader, "evaluate": evaluation}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    p = common.Parser(prog="-m tools.bench", description=__doc__.split("Reading order:")[0],
                      formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=TABLES)
    p.add_argument("systems", nargs="*", metavar="HEAD-SIZE", help="models, as mask2former-base; default: tiny")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    p.add_argument("--rounds", type=common.positive, default=5, metavar="N", help="timed rounds; default: 5")
    p.add_argument("--batch", type=common.positive, metavar="N", help="of training; default: 2, in systems 1 of large")
    p.add_argument("--window", type=common.positive, metavar="PIXELS", help="default: that of the size")
    group = p.add_argument_group("systems")
    group.add_argument("--against", choices=["transformers"], help="also its BEiT with the same head")
    group.add_argument("--old", type=Path, metavar="DIR", help="also another checkout of this project, same weights")
    group.add_argument("--profile", action="store_true", help="also PyTorch's table by operator, of each candidate")
    group = p.add_argument_group("loader and evaluate")
    group.add_argument("--data", default="toy", metavar="DIR", help="data set folder; default: the toy data")
    group.add_argument("--limit", type=common.positive, metavar="N", help="images a round; default: 64 and 8")
    group.add_argument("--workers", type=common.positive, default=os.cpu_count() or 1, metavar="N",
                       help="of the loader; default: one for each core")
    options = p.parse_args(arguments)
    if options.what == "op" and options.systems:
        p.error("op takes no HEAD-SIZE")
    options.systems = options.systems or (TINY if options.what == "systems" else TINY[:1])
    options.changes = {"window": options.window} if options.window else {}
    return options


def run(options: argparse.Namespace) -> None:
    """Print the tables as they are done, and write their rows into the JSON file."""
    options.device = common.choose_device(options.device).type
    for system in options.systems:  # before the first of them is measured
        config_of(system, options.changes)
    if options.json:
        common.check_file(options.json, "--json")
    found = {"machine": machine(options.device), "rows": []}
    print(f"{found['machine']}; docs/speed.md explains the columns")
    keep_freed_memory()
    for system in options.systems:
        title, rows = TABLES[options.what](system, options)
        title = f"{title}, {options.device}, medians of {options.rounds} rounds"
        print(f"\n### {title}\n\n{markdown(rows)}", flush=True)
        found["rows"] += [{"table": title, **row} for row in rows]
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    return common.run(partial(run, parse(arguments)))


if __name__ == "__main__":
    sys.exit(serve(*sys.argv[2:]) if SERVES else main(sys.argv[1:]))
