"""Around the training loop: processes, the run's folder, checkpoints, stopping, the log.

A run is a folder: config.json, log.jsonl, TensorBoard events, last.pt, previous.pt, best.pt. All processes of a run use
the same folder, and process 0 writes it.

Reading order: join_processes -> open_run -> save, load_last, restore (checkpoints that survive a crash) -> StopSignal,
check_finite -> Stopwatch, Log.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import common
from common import UserError
from data import Batch, DatasetInfo
from model import Segmenter
from msda_cuda import active_path
from weights import FORMAT, read_file

RUNS = Path("runs")
T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------- processes


class Process(NamedTuple):
    """This process among those that train one model together."""

    rank: int  # its number, from 0
    world: int  # how many there are
    device: torch.device


def join_processes(name: str | None) -> Process:
    """This process's device and, under torchrun, its place among the others. Raises UserError for the device."""
    if "RANK" in os.environ and (name or "cuda") == "cuda" and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = common.choose_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Process(0, 1, device)
    store, rank, world = next(rendezvous("env://"))
    # Both at once: tensors on the host travel by gloo and need no device to be waited for.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=fresh_store(store, rank, world), rank=rank, world_size=world)
    return Process(rank, world, device)


def fresh_store(store: dist.Store, rank: int, world: int) -> dist.Store:
    """A part of the launcher's store that only the processes of this start know.

    torchrun keeps one store over its restarts, and the addresses of dead processes stay in it. A restarted process
    could take such an address for its neighbour's and wait for ever. Therefore process 0 chooses a new prefix for all
    keys, and gives it to each process that asks under a name of its own.
    """
    if rank:
        name = uuid.uuid4().hex
        store.set(f"hello/{rank}", name)
        prefix = store.get(f"welcome/{name}").decode()  # waits for process 0 to answer to this very name
        store.add(f"met/{prefix}", 1)
    else:
        prefix = uuid.uuid4().hex
        while store.add(f"met/{prefix}", 0) < world - 1:
            for other in range(1, world):
                name = store.get(f"hello/{other}").decode()  # perhaps that of a dead process: hence again and again
                store.set(f"welcome/{name}", prefix)
            time.sleep(0.05)
    return dist.PrefixStore(prefix, store)


def gather(process: Process, value: T) -> list[T]:
    """The values of all processes, in the order of their ranks. Every process must call it."""
    values = [value] * process.world
    if process.world > 1:
        dist.all_gather_object(values, value)
    return values


def on_first(process: Process, call: Callable[[], T]) -> T:
    """What `call()` returns on process 0, on all processes. If it raises UserError there, all processes raise it."""
    result = None
    if process.rank == 0:
        try:
            result = call()
        except UserError as error:
            result = error
    result = gather(process, result)[0]
    if isinstance(result, UserError):
        raise result
    return result


def restarted(process: Process) -> bool:
    """Whether torchrun has started processes again after a failure. It counts by node, and only where one failed."""
    return any(gather(process, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0))


# ------------------------------------------------------------------------------------------------------------ folders


def open_run(options: argparse.Namespace, process: Process) -> tuple[Path, dict, "Progress"]:
    """The run's folder, what its last checkpoint holds ({} for a run that has none), and how far it has come.

    Args:
        options: of train.py. `resume` names a run; without it there is a new one. Its `name` must be free; without one
            it is HEAD-SIZE-DATA, or HEAD-SIZE-DATA-2, -3 ...

    Raises:
        UserError: also for damaged checkpoints, for fewer iterations than are done, and if the processes do not see the
            same files.
    """
    folder = on_first(process, lambda: find_run(options.resume) if options.resume else new_run(options))
    state = load_last(folder) if options.resume else {}
    progress = Progress(**state.get("progress", {}))
    done = gather(process, progress.iteration)
    if len(set(done)) > 1:
        raise UserError(f"{folder}: process 0 finds iteration {done[0]} there, process {process.rank} finds "
                        f"{progress.iteration}: runs/ must lie on a file system that all nodes share")
    if progress.iteration > options.iterations:
        raise UserError(f"{folder} has done {progress.iteration} iterations, more than the {options.iterations} asked "
                        "for: name a larger number with --iterations")
    return folder, state, progress


def new_run(options: argparse.Namespace) -> Path:
    """A free folder for a new run, not yet made. Raises UserError if the name that was asked for is taken."""
    name = options.name or f"{options.head}-{options.size}-{Path(options.data).name}"
    folder, number = RUNS / name, 1
    while (folder / "config.json").exists():
        if options.name:
            raise UserError(f"{folder} exists: continue it with --resume {shlex.quote(name)}, or choose another --name")
        number += 1
        folder = RUNS / f"{name}-{number}"
    return folder


def find_run(name: str) -> Path:
    """The run of that name or path; "" is the newest one. Raises UserError if there is none."""
    runs = runs_like()
    found = [folder for folder in (Path(name), RUNS / name) if (folder / "config.json").is_file()] if name else runs
    if not found:
        raise UserError(f"no run to resume at {RUNS / name}: a run is a folder with a config.json; "
                        f"{', '.join(folder.name for folder in runs) or 'none'} in {RUNS}/")
    return found[0]


def runs_like(pattern: str = "*") -> list[Path]:
    """The runs whose name matches the pattern, newest first."""
    configs = sorted(RUNS.glob(f"{pattern}/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent for path in configs]


def newest_run_of(command: Sequence[str]) -> Path | None:
    """The newest run that this command line has started; None if it has not come that far."""
    return next((run for run in runs_like() if read_config(run).get("environment", {}).get("command") == command), None)


def read_config(folder: Path) -> dict:
    """config.json: the options that start the same run, and what it ran on. Raises UserError if it is damaged."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}): restore it or start a new run") from None


def environment(device: torch.device, world: int) -> dict:
    """Everything else on which a result may depend, beside the options: code, versions, hardware."""
    return {
        "command": sys.argv, "commit": git("rev-parse", "HEAD"), "uncommitted": bool(git("status", "--porcelain")),
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "deformable_attention": active_path(device.type),
        "devices": world, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
    }


def git(*arguments: str) -> str | None:
    """What git says about the folder of this file; None where there is no git or no repository."""
    try:
        folder = Path(__file__).parent
        return subprocess.check_output(["git", *arguments], cwd=folder, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# -------------------------------------------------------------------------------------------------------- checkpoints


@dataclass
class Progress:
    """How far a run has come; `iteration` counts the finished ones."""

    iteration: int = 0
    validated: int = 0  # the iteration of the last validation
    best: float = -1.0  # mIoU
    best_iteration: int = 0


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Torch's random state, from which drop path, dropout and the losses' sampling points come."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def save(path: Path, process: Process, model: Segmenter, info: DatasetInfo, progress: Progress,
         optimizer: torch.optim.Optimizer | None = None, scaler: torch.amp.GradScaler | None = None) -> None:
    """Write a checkpoint: the model for use, or with `optimizer` and `scaler` all that a run needs to go on.

    Every process must call it, because each has random numbers of its own; process 0 writes.
    """
    state = {
        "format": FORMAT, "model": model.state_dict(), "config": asdict(model.config), "classes": list(info.classes),
        "palette": info.palette.tolist(), "iteration": progress.iteration, "progress": asdict(progress),
    }
    if optimizer:
        state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                  "rng": gather(process, rng_state(process.device))}
    if process.rank == 0:
        write_checkpoint(path, state)


def write_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint so that a crash, a kill or a full disk leaves a whole one; last.pt becomes previous.pt.

    Raises UserError if the disk is full.
    """
    def write(file: BinaryIO) -> None:
        torch.save(state, file)
        if path.name == "last.pt" and path.exists():
            path.replace(path.with_name("previous.pt"))  # a crash right here leaves this one

    common.write_whole(path, write)


def load_last(folder: Path) -> dict:
    """The newest whole checkpoint: last.pt, or previous.pt where that is torn or missing. {} if there is neither.

    Raises UserError if all that exist are damaged.
    """
    paths = [path for path in (folder / "last.pt", folder / "previous.pt") if path.exists()]
    for path in paths:
        try:
            return read_file(path)
        except UserError as error:
            print(f"{error}: falling back to the checkpoint before", file=sys.stderr)
    if paths:
        raise UserError(f"{folder}: no checkpoint is whole: start a new run")
    return {}


def restore(state: dict, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, seed: int,
            process: Process) -> None:
    """Put optimizer, scaler and random numbers where a checkpoint left them; without one, start new random numbers."""
    torch.manual_seed(seed + process.rank)
    if not state:
        return
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty unless the run was in fp16
        scaler.load_state_dict(state["scaler"])
    if len(state["rng"]) == process.world:
        rng = state["rng"][process.rank]
        torch.set_rng_state(rng["cpu"])
        if process.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], process.device)
    elif process.rank == 0:
        print(f"the checkpoint is from {len(state['rng'])} processes, not {process.world}: new random numbers begin")


# ----------------------------------------------------------------------------------------------------------- stopping


class StopSignal:
    """SIGTERM and Ctrl-C set `wanted` and nothing else, so that the loop can finish its iteration; a second one kills.

    Both mostly go to a whole process group, but no iteration can be finished without the data loader's workers: these
    must run by now, and are taken out of the group.
    """

    def __init__(self) -> None:
        for worker in multiprocessing.active_children():
            os.setpgid(worker.pid, 0)
        self.wanted = False
        self.before = {number: signal.signal(number, self.want) for number in (signal.SIGTERM, signal.SIGINT)}

    def want(self, number: int, _) -> None:
        self.wanted = True
        signal.signal(number, self.before[number] or signal.SIG_DFL)

    def release(self) -> None:
        """Put the signals back as they were."""
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)


class NonFiniteLoss(RuntimeError):
    """Training has gone wrong; the message says where, and which file replays it."""


def check_finite(losses: dict[str, float], scaler: torch.amp.GradScaler, folder: Path, process: Process,
                 model: Segmenter, progress: Progress, batches: Sequence[Batch], rng: dict[str, Tensor]) -> None:
    """Raises NonFiniteLoss before a step that would spoil the weights, if "loss" or "gradient_norm" is not finite.

    A file then holds what led there: weights before the step, crops, the random state `rng` before the forward pass.
    """
    # Where fp16 overflows, the scaler skips the step and halves its scale. At 1, as without it, all would be lost.
    if math.isfinite(losses["loss"]) and (math.isfinite(losses["gradient_norm"]) or scaler.get_scale() > 1):
        return
    path = folder / f"nonfinite-{progress.iteration}-process{process.rank}.pt"
    names = [name for batch in batches for name in batch.names]
    crops = {field: [getattr(batch, field) for batch in batches] for field in ("images", "labels", "extents")}
    write_checkpoint(path, {
        "format": FORMAT, "model": model.state_dict(), "config": asdict(model.config), "iteration": progress.iteration,
        "losses": losses, "names": names, "rng": rng, **crops,
    })
    bad = ", ".join(f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value))
    raise NonFiniteLoss(f"iteration {progress.iteration}: {bad}; images {', '.join(names)}; {path} has weights, crops "
                        "and random state to replay it; a lower --lr, or --amp bf16 instead of fp16, may help")


# ---------------------------------------------------------------------------------------------------------------- log


class Stopwatch:
    """Measures the parts of an iteration. On a GPU it puts events into the stream, so that measuring never waits."""

    def __init__(self, device: torch.device, running: bool = True) -> None:
        self.cuda, self.running = device.type == "cuda", running
        self.marks = [("", self._now())]

    def _now(self) -> "float | torch.cuda.Event":
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        """Give the time since the last lap to `name`."""
        if self.running:
            self.marks.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds by name since the last call; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        total = Counter()
        for (_, start), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            total[name] += start.elapsed_time(end) / 1000 if self.cuda else end - start
        self.marks = self.marks[-1:]
        return dict(total)


class Log:
    """The log of a run: console, log.jsonl, TensorBoard. Process 0 alone has it; nothing here waits for the others.

    Args:
        folder: of the run. Its log.jsonl loses what it holds after iteration `start`, which is done again.
        start, total: iterations done and to do.
        images: images in an iteration on this device.
    """

    def __init__(self, folder: Path, start: int, total: int, device: torch.device, images: int) -> None:
        self.path, self.total, self.device, self.images = folder / "log.jsonl", total, device, images
        kept = [line for line in read_log(self.path) if line["iteration"] <= start]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        common.write_whole(self.path, lambda file: file.write(text.encode()))
        self.tensorboard = SummaryWriter(folder, purge_step=start + 1)
        self.bar = tqdm(total=total, initial=start, unit="it", smoothing=0.05, disable=not sys.stderr.isatty())
        self.sums, self.iterations = Counter(), 0

    def count(self, losses: dict[str, float]) -> None:
        """Take note of one iteration."""
        self.sums.update(losses)  # adds them
        self.iterations += 1
        self.bar.update()
        self.bar.set_postfix_str(f"loss {losses['loss']:.3f}", refresh=False)

    def report(self, iteration: int, seconds: dict[str, float], lr: float, gradient_norm: float,
               loss_scale: float = 1.0) -> None:
        """Write the losses' means and the parts of the time since the last report, and the other values as they are."""
        losses = {name: value / self.iterations for name, value in self.sums.items()}
        split = {name: value / self.iterations for name, value in seconds.items()}
        elapsed = sum(split.values()) - split.get("pause", 0)
        speed = {
            "seconds": elapsed, "images_per_second": self.images / elapsed, "memory_gb": peak_memory(self.device),
            "eta_seconds": elapsed * (self.total - iteration),
            **{f"seconds/{name}": value for name, value in split.items()},
        }
        self.write(iteration, "train", {**losses, "lr": lr, "gradient_norm": gradient_norm, "loss_scale": loss_scale})
        self.write(iteration, "speed", speed)
        self.say(f"{iteration}/{self.total}  loss {losses['loss']:.4f} ({grouped(losses)})  lr {lr:.2e}  "
                 f"gradient {gradient_norm:.2f}  {elapsed:.2f} s/it  {speed['memory_gb']:.1f} GB  "
                 f"ETA {tqdm.format_interval(speed['eta_seconds'])}")
        self.sums, self.iterations = Counter(), 0

    def write(self, iteration: int, kind: str, values: dict) -> None:
        """One line of log.jsonl, and one TensorBoard scalar for each number."""
        # No number is JSON for a norm that has overflowed in fp16, or the IoU of an absent class.
        values = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        with open(self.path, "a") as file:
            file.write(json.dumps({"iteration": iteration, "kind": kind, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, float):
                self.tensorboard.add_scalar(f"{kind}/{name}", value, iteration)

    def validation(self, iteration: int, values: dict[str, float], table: str) -> None:
        """Write a validation's scores and its per-class table."""
        self.write(iteration, "validation", values)
        self.tensorboard.add_text("validation/classes", f"<pre>{table}</pre>", iteration)
        means = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if "/" not in name)
        self.say(f"{table}\n{iteration}/{self.total}  {means}")

    def picture(self, iteration: int, name: str, picture: Image.Image) -> None:
        """Show a picture in TensorBoard."""
        self.tensorboard.add_image(name, np.asarray(picture), iteration, dataformats="HWC")

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        tqdm.write(text)
        sys.stdout.flush()

    def end(self, progress: Progress) -> None:
        """Say how the run ended and what comes next; nothing is written after it."""
        folder = self.path.parent
        if progress.iteration == self.total:
            best = shlex.quote(f"{folder}/best.pt")
            self.say(f"done: best mIoU {progress.best:.4f}; python evaluate.py --checkpoint {best}")
        else:
            self.say(f"stopped: go on with --resume {shlex.quote(folder.name)}")
        self.bar.close()
        self.tensorboard.close()


def peak_memory(device: torch.device) -> float:
    """Gigabytes at most: of the device's memory since the last reset, on a CPU of this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def grouped(losses: dict[str, float]) -> str:
    """Loss terms summed over decoder layers ("mask/0", "mask/1" ...), as text."""
    sums = Counter()
    for name, value in losses.items():
        if name != "loss":
            sums[name.split("/")[0]] += value
    return ", ".join(f"{name} {value:.3f}" for name, value in sums.items())


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl; a last line that a kill left unfinished is dropped."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
