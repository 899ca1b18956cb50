"""The common parts of the command lines: one line for a user's fault, whole files, worker processes, devices.

Reading order: UserError, reading -> run -> complain -> Parser; make_folder, check_file -> write_whole, new_folder;
in_parallel; choose_device.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  at once: an older one trains to the end, then cannot read a checkpoint
    print("error: Python {}.{} is too old for this code: make an environment of Python 3.11 or newer"
          .format(*sys.version_info), file=sys.stderr)
    sys.exit(2)

import argparse
import contextlib
import hashlib
import math
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import BinaryIO, NoReturn

import torch
from tqdm import tqdm

IGNORE = 255  # the label of a pixel without a class


# cuDNN's attention has given NaN gradients where all scores of a masked row are low and the keys are 64 more than a
# multiple of 128 (pytorch#196678). `make gpu-check` tells whether yours is right: then this line may go.
torch.backends.cuda.enable_cudnn_sdp(False)


class UserError(ValueError):
    """A fault that the user can mend. The message is one line: what is wrong, where, and how to mend it.

    What a damaged file holds may be quoted in it: of more than 500 characters the middle is left out.
    """

    def __init__(self, message: str):
        text = printable(message)
        super().__init__(text if len(text) <= 500 else f"{text[:350]} ... {text[-145:]}")


def printable(text: str) -> str:
    """One line: names in a damaged file may hold line breaks, escape sequences and half characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def reason(error: BaseException) -> str:
    """The first line of an exception's message, without the system's "[Errno 17]"."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


@contextlib.contextmanager
def reading(fault: str, remedy: str) -> Iterator[None]:
    """Inside, what a file with unexpected content raises becomes a UserError: the fault, the reason, the remedy."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RecursionError, TypeError,
            ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"{fault} ({why}): {remedy}") from None


def run(work: Callable[[], int | None]) -> int:
    """The exit status of a command: what `work` returns (None: 0), 2 for a user's fault, 130 for Ctrl-C."""
    try:
        return work() or 0
    except (OSError, ValueError) as error:
        file = getattr(error, "filename", None)
        return complain(f"{file}: {reason(error)}" if file else str(error))
    except KeyboardInterrupt as error:
        return complain(str(error) or "interrupted", 130)


def complain(message: str, status: int = 2) -> int:
    """Print the fault in one line on stderr; returns the exit status."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(3)  # process 0 has mostly met the same fault, and when it ends torchrun ends the others
    print("error:", *message.split(), file=sys.stderr, flush=True)
    return status


class Parser(argparse.ArgumentParser):
    """Faults of the command line are one line on stderr, like all others."""

    def error(self, message: str) -> NoReturn:
        sys.exit(complain(f"{message} (python {self.prog} --help lists the options)"))


def number_type(convert: type[int] | type[float], accepts: Callable[[float], bool], meaning: str) -> Callable:
    """A `type=` for argparse: text -> int or float; other text is refused with "... is not {meaning}"."""
    def parse(text: str) -> int | float:
        with contextlib.suppress(ValueError):
            if accepts(number := convert(text)):
                return number
        raise argparse.ArgumentTypeError(f"{text} is not {meaning}")

    return parse


natural = number_type(int, lambda n: n >= 0, "a whole number from 0 up")
positive = number_type(int, lambda n: n >= 1, "a positive whole number")
fraction = number_type(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
rate = number_type(float, lambda x: 0 < x < math.inf, "a positive number")


def make_folder(path: Path, option: str) -> None:
    """Make the folder that an option names, unless it is there; raises UserError if no file can be put there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        why = f"cannot be used as a folder ({reason(error)})"
        raise UserError(f"{option} {path} {why}: mend it or name another") from None


def check_file(path: Path, option: str) -> None:
    """Make the folder of the file that an option names; raises UserError if the file cannot be put there."""
    if path.exists() and not path.is_file():  # root would put a file in the place of /dev/null
        raise UserError(f"{option} {path} is a folder or a device: name a file, in it or elsewhere")
    make_folder(path.parent, option)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside its place and rename it: a kill or a full disk leaves the old or the new one. UserError."""
    draft = path.with_name(f".{path.name}.partial")  # one name: what a kill leaves is written over, not added to
    try:
        with draft.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # the bytes must be on the disk before the name points to them
        draft.replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as the latter
        raise UserError(f"{path} cannot be written ({reason(error)}): make room or name another place") from None
    finally:
        with contextlib.suppress(OSError):  # gone if all went well; where its folder is absent it never was
            draft.unlink()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A draft to fill beside `path`, which becomes `path` at the end. OSError if another process made it first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.draft", dir=path.parent) as private:
        draft = Path(private) / path.name  # a folder of the usual permissions in one for this user alone
        draft.mkdir()
        yield draft
        draft.rename(path)


def in_parallel(function: Callable, jobs: Sequence, workers: int, title: str) -> Iterator:
    """The function's results in the order of the jobs, from worker processes, under a progress bar.

    If a worker dies, all jobs without a result are done once more, one by one: the library that reads a damaged file
    may crash, or memory be short for several. Raises UserError with str(job) for the job that kills its process alone.
    """
    processes, done = partial(ProcessPoolExecutor, initializer=leave_interrupt_to_parent), 0
    with tqdm(desc=title, total=len(jobs), unit="image", disable=None) as bar:  # None: on a terminal only
        with contextlib.suppress(BrokenProcessPool), processes(workers) as pool:
            chunk = max(1, min(32, len(jobs) // (4 * workers)))
            for result in pool.map(function, jobs, chunksize=chunk):
                done += 1
                yield result
                bar.update()
        with processes(1) as alone:  # whose processes start with its first job
            for job in jobs[done:]:
                try:
                    result = alone.submit(function, job).result()
                except BrokenProcessPool:
                    raise UserError(f"{job}: the process that reads it dies, of a damaged file or for want of memory: "
                                    "replace the file or take it out") from None
                yield result
                bar.update()


def leave_interrupt_to_parent() -> None:
    """Start of a worker process: Ctrl-C is for the main process, which ends its workers without their tracebacks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


# The oldest driver for all versions of a major release (NVIDIA, "CUDA Compatibility", minor version compatibility).
DRIVER_FLOORS = {"12": 525, "13": 580}
OLDER_CUDA = ("`pip install --force-reinstall torch==2.14.1 torchvision==0.29.1 --index-url "
              "https://download.pytorch.org/whl/cu126` (CUDA 12.6, driver 525 or newer)")
NVIDIA_DRIVER, NVIDIA_DEVICE = Path("/proc/driver/nvidia/version"), Path("/dev/nvidia0")


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None takes CUDA if there is one. Raises UserError if it cannot be used.

    None is not the CPU of a machine with an NVIDIA GPU: where PyTorch was built for CUDA and finds none, that is told.
    """
    works, hidden = torch.cuda.is_available(), os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    fails = torch.version.cuda and not works and not hidden and (NVIDIA_DRIVER.exists() or NVIDIA_DEVICE.exists())
    name = name or ("cuda" if works or fails else "cpu")
    try:
        return torch.zeros(1, device=name).device  # by a kernel: a GPU that is too old for this PyTorch has none
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what PyTorch raises differs by device
        fault = f"device '{name}' cannot be used here: choose cpu, cuda or mps with --device"
        if "no kernel image" in str(error):
            fault = f"PyTorch {torch.__version__} has no kernels for this GPU: {OLDER_CUDA}; --device cpu takes the CPU"
        raise UserError(why_no_cuda(error) if fails and name.startswith("cuda") else fault) from None


def why_no_cuda(error: BaseException) -> str:
    """What keeps PyTorch from the NVIDIA GPU, mostly a driver older than the CUDA of its wheel, and the remedies."""
    cuda = torch.version.cuda
    floor = DRIVER_FLOORS.get(cuda.split(".")[0], max(DRIVER_FLOORS.values()))  # a newer CUDA needs no older driver
    driver = re.search(r"\b(\d{3,})\.\d+[.\d]*", NVIDIA_DRIVER.read_text() if NVIDIA_DRIVER.exists() else "")
    if driver and int(driver[1]) < floor:
        return (f"NVIDIA driver {driver[0]} is too old for CUDA {cuda} of PyTorch {torch.__version__}: update it to "
                f"{floor} or newer, or {OLDER_CUDA}; --device cpu takes the CPU")
    return (f"CUDA {cuda} of PyTorch {torch.__version__} cannot be used with the NVIDIA driver "
            f"({driver[0] if driver else 'of unknown version'}; {floor} or newer is needed): {reason(error)}; "
            "`nvidia-smi` tells more, --device cpu takes the CPU")


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; then every module is in its own mode again, also one that was frozen."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def allow_tf32(allowed: bool) -> None:
    """Switch TF32 matrix products and convolutions, for this process; PyTorch's defaults are off and on."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
