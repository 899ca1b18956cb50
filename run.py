"""Around the training loop: processes, the run's folder, checkpoints, stopping, the log.

A run is a folder: config.json, log.jsonl, TensorBoard events, last.pt, previous.pt, best.pt. Process 0 writes it.

Reading order: join_processes, leave_processes -> open_run -> save, load_last, restore -> StopSignal, check_finite ->
Stopwatch, Log.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
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
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow", "safetensors")  # on whose versions numbers may depend
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
    dist.init_process_group(backend, store=fresh_store(store, rank, world), rank=rank, world_size=world,
                            timeout=timedelta(minutes=30))  # for both: one may validate or save for long
    return Process(rank, world, device)


def fresh_store(store: dist.Store, rank: int, world: int) -> dist.Store:
    """A part of torchrun's store that only the processes of this start know.

    The store outlives a restart, and a process that finds a dead neighbour's address there waits for ever. Therefore
    process 0 chooses a new prefix for all keys, and gives it to each process that asks under a name of its own.
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


def leave_processes() -> None:
    """The end of `join_processes`, after the last exchange. Without other processes it does nothing."""
    if dist.is_initialized():
        # In PyTorch 2.6 and 2.7 (no more in 2.10) a group that ends waits for its threads with Python's lock held, and
        # they may need the lock to free a last tensor. Its gloo part, let go last, ends without the lock.
        gloo = dist.group.WORLD._get_backend(torch.device("cpu"))
        dist.destroy_process_group()
        del gloo


def gather(process: Process, value: T) -> list[T]:
    """The values of all processes, in the order of their ranks. Every process must call it."""
    values = [value] * process.world
    if process.world > 1:
        dist.all_gather_object(values, value)
    return values


def on_first(process: Process, call: Callable[[], T]) -> T:
    """What `call()` returns on process 0, on all processes. If it raises UserError there, all processes raise it."""
    try:
        result = call() if process.rank == 0 else None
    except UserError as error:
        result = error
    result = gather(process, result)[0]
    if isinstance(result, UserError):
        raise result
    return result


def restarted(process: Process) -> bool:
    """Whether torchrun has started processes again after a failure. It counts by node, and only where one failed."""
    return any(gather(process, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0))


# --------------------------------------------------------------------------------- the run's folder and its checkpoints
@dataclass
class Progress:
    """How far a run has come; `iteration` counts the finished ones."""
    iteration: int = 0
    validated: int = 0  # the iteration of the last validation
    best: float = -1.0  # mIoU
    best_iteration: int = 0


def open_run(options: argparse.Namespace, process: Process) -> tuple[Path, dict, Progress]:
    """The folder of the run `options.resume` or of a new one; its last checkpoint, or {}; how far it has come.

    Raises UserError, also for damaged checkpoints, too few iterations, and processes that see different files.
    """
    folder = on_first(process, lambda: find_run(options.resume) if options.resume else new_run(options))
    state = load_last(folder, process) if options.resume else {}
    progress = Progress(**state.get("progress", {}))
    done = gather(process, progress.iteration)
    if len(set(done)) > 1:
        raise UserError(f"{folder}: the processes find iterations {done} there: put runs/ where all nodes share it")
    if progress.iteration > options.iterations:
        raise UserError(f"{folder} has done {progress.iteration} iterations: go on to more than {options.iterations}")
    return folder, state, progress


def new_run(options: argparse.Namespace) -> Path:
    """A free folder, not yet made: NAME, else HEAD-SIZE-DATA, HEAD-SIZE-DATA-2 ... UserError if NAME is taken."""
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
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("it holds no options of a run")
        return config
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}): restore it or start a new run") from None


def environment(device: torch.device, world: int) -> dict:
    """Everything else on which a result may depend, beside the options: code, versions, hardware."""
    return {
        "command": sys.argv, "commit": git("rev-parse HEAD"), "uncommitted": bool(git("status --porcelain")),
        "python": platform.python_version(), **{name: version(name) for name in PACKAGES},
        "torch": torch.__version__, "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "deformable_attention": active_path(device.type),
        "devices": world, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
    }


def changes(before: dict, now: dict) -> list[str]:
    """What now is not as it was when a run began, by its config.json; that of an old run tells less."""
    old, new = identity(before), identity(now)
    return [f"{name}: {new[name]}, but {old[name]} when the run began"
            for name in old if name in new and new[name] != old[name]]


def identity(config: dict) -> dict[str, str]:
    """Data, weights and versions of a run, as texts, from its config.json."""
    environment, weights = config.get("environment") or {}, config.get("weights")
    found = {f"{split} split": "{images} images, {classes} classes, list {sha256:.8}".format(**fingerprint)
             for split, fingerprint in (config.get("data_fingerprint") or {}).items()}
    found |= {"pre-trained weights": f"sha256 {weights['sha256'][:8]}"} if weights else {}
    return found | {name: environment[name] for name in ("commit", "python", *PACKAGES, "cuda") if name in environment}


def git(command: str) -> str | None:
    """What git answers in the folder of this file; None where there is no git or no repository."""
    status, answer = subprocess.getstatusoutput(f"git -C {shlex.quote(str(Path(__file__).parent))} {command}")
    return None if status else answer


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Torch's random state, from which drop path, dropout and the losses' sampling points come."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def save(path: Path, process: Process, model: Segmenter, info: DatasetInfo, progress: Progress,
         optimizer: torch.optim.Optimizer | None = None, scaler: torch.amp.GradScaler | None = None) -> None:
    """Write a checkpoint: the model for use, or with `optimizer` and `scaler` all that a run needs to go on.

    Process 0 writes; every process must call it, for its random numbers.
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
    """Write a checkpoint; a crash, a kill, a full disk (UserError) leave a whole one. last.pt becomes previous.pt."""
    def write(file: BinaryIO) -> None:
        torch.save(state, file)
        if path.name == "last.pt" and path.exists():
            path.replace(path.with_name("previous.pt"))  # a crash right here leaves this one

    common.write_whole(path, write)


def load_last(folder: Path, process: Process) -> dict:
    """The run's last whole checkpoint, the same one on all processes; {} if there is none yet.

    Process 0 alone reads it to its end. All map it: a tensor is read when it is used, and held once on a node. Raises
    UserError if there are checkpoints and none is whole.
    """
    path = on_first(process, lambda: find_whole(folder))
    return read_file(path, mapped=True, checksums=False) if path and path.exists() else {}  # {}: not on this node


def find_whole(folder: Path) -> Path | None:
    """last.pt, or previous.pt where that is torn or missing; None if there is neither, UserError if none is whole."""
    paths = [path for path in (folder / "last.pt", folder / "previous.pt") if path.exists()]
    for path in paths:
        try:
            read_file(path, mapped=True)
            return path
        except UserError as error:
            print(f"{error}: falling back to the checkpoint before", file=sys.stderr)
    if paths:
        raise UserError(f"{folder}: no checkpoint is whole: start a new run")
    return None


def restore(state: dict, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, seed: int,
            process: Process) -> None:
    """Put optimizer, scaler and random numbers where a checkpoint left them; without one, start new random numbers."""
    torch.manual_seed(seed + process.rank)
    if not state:
        return
    optimizer.load_state_dict(state["optimizer"])
    if process.device.type == "cpu":  # the moments are still the mapped file's, and would keep it
        for moments in optimizer.state.values():
            moments.update({name: value.clone() for name, value in moments.items()})
    if state["scaler"]:  # empty unless the run was in fp16
        scaler.load_state_dict(state["scaler"])
    if len(state["rng"]) == process.world:
        rng = state["rng"][process.rank]
        torch.set_rng_state(rng["cpu"])
        if process.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], process.device)
    elif process.rank == 0:
        print(f"the checkpoint is from {len(state['rng'])} processes, not {process.world}: new random numbers begin")


# ------------------------------------------------------------------------------------------------- stopping and the log
class StopSignal:
    """SIGTERM and Ctrl-C set `wanted` and nothing else, so that the loop can finish its iteration; a second one kills.

    Both mostly go to a whole process group, which the data loader's workers have left by now (data.start_worker).
    """

    def __init__(self) -> None:
        self.wanted = False
        self.before = {n: signal.signal(n, self.want) or signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGINT)}

    def want(self, number: int, _) -> None:
        self.wanted = True
        signal.signal(number, self.before[number])

    def release(self) -> None:
        """Put the signals back as they were."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def check_finite(losses: dict[str, float], scaler: torch.amp.GradScaler, folder: Path, process: Process,
                 model: Segmenter, progress: Progress, batches: Sequence[Batch], rng: dict[str, Tensor]) -> None:
    """End this process with status 1 before a step that would spoil the weights: loss or gradient norm is not finite.

    A file then holds what led there: weights before the step, crops, the random state `rng` before the forward pass.
    """
    # Where fp16 overflows, the scaler skips the step and halves its scale. At 1, as without it, all would be lost.
    if math.isfinite(losses["loss"]) and (math.isfinite(losses["gradient_norm"]) or scaler.get_scale() > 1):
        return
    path = folder / f"nonfinite-{progress.iteration}-process{process.rank}.pt"
    names = [name for batch in batches for name in batch.names]
    write_checkpoint(path, {
        "format": FORMAT, "model": model.state_dict(), "config": asdict(model.config), "iteration": progress.iteration,
        "losses": losses, "names": names, "rng": rng,
        **{field: [getattr(batch, field) for batch in batches] for field in ("images", "labels", "extents")},
    })
    bad = ", ".join(f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value))
    sys.exit(f"error: iteration {progress.iteration}: {bad}; images {', '.join(names)}; {path} has weights, crops and "
             "random state to replay it; a lower --lr, or --amp bf16 instead of fp16, may help")


class Stopwatch:
    """Measures the parts of an iteration. On a GPU it puts events into the stream, so that measuring never waits."""

    def __init__(self, device: torch.device, running: bool = True) -> None:
        self.cuda, self.running, self.marks = device.type == "cuda", running, []

    def lap(self, name: str) -> None:
        """Give the time since the last lap to `name`."""
        if self.running:
            self.marks.append((name, torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()))
            if self.cuda:
                self.marks[-1][1].record()

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
    """The log of a run, on process 0: console, log.jsonl, TensorBoard. `images` of an iteration are on this device.

    Lines of log.jsonl after iteration `start` of `total` are dropped: those iterations will be done again. Scores are
    fractions 0 ... 1 of full precision there, percent elsewhere. TensorBoard sorts its groups: hence their numbers.
    """

    def __init__(self, folder: Path, start: int, total: int, every: int, epochs: float, device: torch.device,
                 images: int) -> None:
        self.path, self.device, self.images, self.epochs = folder / "log.jsonl", device, images, epochs
        self.start, self.total, self.every = start, total, max(1, min(every, total // 20))
        kept = [json.dumps(line) + "\n" for line in read_log(self.path) if line["iteration"] <= start]
        common.write_whole(self.path, lambda file: file.write("".join(kept).encode()))
        self.tensorboard = SummaryWriter(folder, purge_step=start + 1)
        self.bar = tqdm(total=total, initial=start, unit="it", smoothing=0.05, disable=not sys.stderr.isatty())
        self.sums, self.iterations = Counter(), 0

    def count(self, iteration: int, losses: dict[str, float]) -> bool:
        """Take note of an iteration. Returns whether to report: the first, the fifth, each `every`th and the last."""
        self.sums.update(losses)  # adds them
        self.iterations += 1
        self.bar.update()
        self.bar.set_postfix_str(f"loss {losses['loss']:.3f}", refresh=False)
        return iteration - self.start in (1, 5) or iteration % self.every == 0 or iteration == self.total

    def report(self, iteration: int, seconds: dict[str, float], lr: float, gradient_norm: float,
               loss_scale: float = 1.0) -> None:
        """Write the losses' means and the parts of the time since the last report, and the other values as they are."""
        losses, terms = {name: value / self.iterations for name, value in self.sums.items()}, Counter()
        for name, value in losses.items():
            terms[name.split("/")[0]] += value  # a sum over the decoder layers: "mask/0", "mask/1" ...
        loss = terms.pop("loss")
        split = {f"seconds/{name}": value / self.iterations for name, value in seconds.items()}
        elapsed = sum(split.values()) - split.get("seconds/pause", 0)
        memory, left = peak_memory(self.device), elapsed * (self.total - iteration)
        charts = {"1 loss and mIoU/loss": loss, **{f"4 terms of the loss/{name}": term for name, term in terms.items()},
                  "5 optimizer/learning rate": lr, "5 optimizer/gradient norm": gradient_norm,
                  "6 speed/seconds an iteration": elapsed, "6 speed/memory in GB": memory}
        steps = {"lr": lr, "gradient_norm": gradient_norm, "loss_scale": loss_scale}
        self.write(iteration, "train", losses | steps, charts)
        self.write(iteration, "speed", {"seconds": elapsed, "images_per_second": self.images / elapsed,
                                        "memory_gb": memory, "eta_seconds": left, **split})
        text = ", ".join(f"{name} {term:.3f}" for name, term in terms.items())
        self.say(f"{iteration}/{self.total}  loss {loss:.4f} ({text})  lr {lr:.2e}  gradient {gradient_norm:.2f}  "
                 f"{elapsed:.2f} s/it  {memory:.1f} GB  ETA {timedelta(seconds=round(left))}")
        self.foresee(iteration - self.start, elapsed, left)
        self.sums, self.iterations = Counter(), 0

    def foresee(self, done: int, elapsed: float, left: float) -> None:
        """Say after the first iteration what the whole run is; warn after the fifth if it is longer than a week."""
        if done == 1:
            much, length = ": fewer --iterations will do" if self.epochs > 1000 else "", timedelta(seconds=round(left))
            self.say(f"the first iteration took {elapsed:.2f} s: at this rate the run ends in {length}; "
                     f"its {self.total:,} iterations are {self.epochs:,.1f} epochs{much}")
        if done == 5 and (days := left / 86_400) > 7:
            self.say(f"warning: this run ends in {days:.0f} days: use a GPU, a smaller --size, fewer --iterations")

    def write(self, iteration: int, kind: str, values: dict, charts: dict[str, float] | None = None) -> None:
        """One line of log.jsonl, and a point in each of TensorBoard's charts, GROUP/NAME."""
        # No number is JSON for a norm that has overflowed in fp16, or the IoU of an absent class.
        values, charts = ({k: v for k, v in each.items() if not isinstance(v, float) or math.isfinite(v)}
                          for each in (values, charts or {}))
        with open(self.path, "a") as file:
            file.write(json.dumps({"iteration": iteration, "kind": kind, **values}) + "\n")
        for name, value in charts.items():
            self.tensorboard.add_scalar(name, value, iteration)

    def validation(self, iteration: int, values: dict[str, float], table: str, picture: Image.Image) -> None:
        """Write a validation's scores, as fractions, its per-class table and a picture of predictions."""
        groups = {"mIoU": "1 loss and mIoU/mIoU", "mAcc": "2 validation/mAcc", "aAcc": "2 validation/aAcc"}
        percent = {f"{groups.get(name, f'3 {name}')}, %": 100 * value for name, value in values.items()}
        self.write(iteration, "validation", values, percent)
        self.tensorboard.add_text("2 validation/classes", f"<pre>{table}</pre>", iteration)
        self.picture(iteration, "2 validation/image, labels, prediction", picture)
        self.say(f"{iteration}/{self.total}  validation\n{table}")

    def picture(self, iteration: int, name: str, picture: Image.Image) -> None:
        """Show a picture in TensorBoard."""
        self.tensorboard.add_image(name, np.asarray(picture), iteration, dataformats="HWC")

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        tqdm.write(text)
        sys.stdout.flush()

    def end(self, finished: bool, best: str) -> None:
        """Say how the run ended, with its best mIoU in percent, and what comes next; nothing is written after it."""
        folder = self.path.parent
        done = f"done: best mIoU {best}; python evaluate.py --checkpoint {shlex.quote(f'{folder}/best.pt')}"
        self.say(done if finished else f"stopped: go on with --resume {shlex.quote(folder.name)}")
        self.bar.close()
        self.tensorboard.close()


def peak_memory(device: torch.device) -> float:
    """Gigabytes at most: of the device's memory since the last reset, on a CPU of this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(ImportError):  # Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    return 0.0


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl; one that is damaged, or that a kill left unfinished, is dropped."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines
