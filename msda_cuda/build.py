"""Build the C++/CUDA operator: at first use, or ahead of time with `python msda_cuda/build.py`.

Read: plan -> library -> compile_library -> locked -> main.

The library lands in PyTorch's extension cache (`TORCH_EXTENSIONS_DIR`, else ~/.cache/torch_extensions), under a name
made from the sources and PyTorch's version, and is found there by every later process. Environment:
  FORCE_CUDA=1            build the CUDA part though no GPU is visible
  TORCH_CUDA_ARCH_LIST    its architectures (default: those of the GPUs here; without one, 7.5 to 12.0+PTX)
  CUDA_HOME, CXX          the CUDA toolkit and the host compiler
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

SOURCES = Path(__file__).parent / "csrc"
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
LOCK_SECONDS = 600.0
# Sums of 32 products become a tree instead of a chain; NaN and infinity keep their meaning (no -ffast-math).
COMPILE_FLAGS = ["-O3", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none: one thread there


class BuildError(RuntimeError):
    """No native operator; the message names the cause and the remedy in one line."""


class Plan(NamedTuple):
    """What to build here: the library's name, the toolkit (None: CPU only), and why there is no CUDA part."""

    name: str
    cuda_home: Path | None
    no_cuda: str


def find_cuda_home() -> Path | None:
    """The first toolkit with both compiler and headers (an `nvcc` on the path may be a mere wrapper)."""
    nvcc = shutil.which("nvcc")
    places = (os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda")
    for home in (Path(place) for place in places if place):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def plan() -> Plan:
    """Look at PyTorch, the GPUs and the toolkit; raises nothing."""
    key = hashlib.sha256("".join((torch.__version__, *COMPILE_FLAGS)).encode())
    for path in sorted(SOURCES.iterdir()):
        key.update(path.read_bytes())
    home, no_cuda = None, ""
    if torch.version.cuda is None:
        no_cuda = "this PyTorch is built without CUDA; install a CUDA build of it"
    elif os.environ.get("FORCE_CUDA") != "1" and not torch.cuda.is_available():
        no_cuda = "no GPU is visible; FORCE_CUDA=1 builds the CUDA part all the same"
    elif (home := find_cuda_home()) is None:
        no_cuda = "no CUDA toolkit (nvcc) was found; install one or set CUDA_HOME"
    elif (found := toolkit_version(home)) and found.split(".")[0] != torch.version.cuda.split(".")[0]:
        no_cuda = f"the toolkit in {home} is CUDA {found}, PyTorch's is {torch.version.cuda}; set CUDA_HOME to a match"
    name = f"msda_{'cpu' if no_cuda else 'cuda'}_{key.hexdigest()[:12]}"
    return Plan(name, None if no_cuda else home, no_cuda)


def toolkit_version(home: Path) -> str:
    """As in `13.0`, or "" where the toolkit does not say."""
    for line in (home / "include" / "cuda.h").read_text(errors="replace").splitlines():
        if line.startswith("#define CUDA_VERSION"):
            number = int(line.split()[2])
            return f"{number // 1000}.{number % 1000 // 10}"
    return ""


def architectures(ahead: bool) -> str:
    """TORCH_CUDA_ARCH_LIST, else the GPUs at hand for a build at first use, else every supported one."""
    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return chosen
    if ahead or not torch.cuda.is_available():
        return ARCHITECTURES
    devices = range(torch.cuda.device_count())
    return ";".join(sorted({"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in devices}))


def cache_folders() -> list[Path]:
    """Where libraries lie: PyTorch's extension cache, and a private one for when that is read-only."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or home)
    return [root / "msda", Path(tempfile.gettempdir()) / f"msda-{os.getuid()}"]


def writable_folder() -> Path:
    """The first cache folder that takes a file. Others' folders are not trusted: code is loaded from there."""
    for folder in cache_folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                if folder.stat().st_uid == os.getuid():
                    return folder
        except OSError:
            continue
    raise BuildError(f"no writable cache in {' or '.join(map(str, cache_folders()))}; set TORCH_EXTENSIONS_DIR")


def library(ahead: bool = False, verbose: bool = False) -> Path:
    """The built library, built now if need be, by one process while others wait. Raises BuildError."""
    if sys.platform == "win32":
        raise BuildError("the native operator is not supported on Windows; MSDA=torch silences this")
    here = plan()
    name = here.name
    if here.cuda_home and not ahead:  # built for the GPUs at hand: another GPU must not find this library
        name += "_" + architectures(ahead).replace(".", "").replace(";", "_")
    for folder in cache_folders():
        for path in (folder / f"{here.name}.so", folder / f"{name}.so"):  # ahead of time first: it serves all
            if path.exists() and path.stat().st_uid in (0, os.getuid()) and not ahead:
                return path
    folder = writable_folder()
    with locked(folder / f"{name}.lock", LOCK_SECONDS):
        path = folder / f"{name}.so"
        if not path.exists() or ahead:  # else another process has built it meanwhile
            compile_library(here, path, architectures(ahead), verbose)
    return path


def compile_library(here: Plan, path: Path, archs: str, verbose: bool) -> None:
    """Compile in a folder of its own and move the result into place: a killed build leaves nothing that looks done."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:  # it needs setuptools, which a bare environment may lack
        raise BuildError(f"{error}; pip install setuptools") from error
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise BuildError(f"no C++ compiler ({compiler}) was found; install g++ or set CXX")
    if not cpp_extension.is_ninja_available():
        raise BuildError("ninja was not found; pip install ninja")
    what = f"CPU and CUDA ({archs})" if here.cuda_home else f"CPU ({here.no_cuda})"
    print(f"Building deformable attention, once: {what}", file=sys.stderr, flush=True)
    options = {"extra_cflags": [*COMPILE_FLAGS, *OPENMP], "extra_ldflags": OPENMP, "sources": [SOURCES / "msda.cpp"]}
    if here.cuda_home:
        cpp_extension.CUDA_HOME = str(here.cuda_home)
        options["sources"].append(SOURCES / "kernels.cu")
        options["extra_cflags"].append("-DMSDA_WITH_CUDA")
        options["extra_cuda_cflags"] = ["-O3", "--threads=2"]
    options["sources"] = [str(source) for source in options["sources"]]
    start, before = time.monotonic(), os.environ.get("TORCH_CUDA_ARCH_LIST")
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            cpp_extension.load(path.stem, build_directory=folder, is_python_module=False, verbose=verbose, **options)
            os.replace(Path(folder) / f"{path.stem}.so", path)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()] or [repr(error)]
        reason = next((line for line in lines if "error:" in line.lower()), lines[0])
        raise BuildError(f"compiling failed: {reason}; `python msda_cuda/build.py` shows all of it") from error
    finally:
        if before is None:
            del os.environ["TORCH_CUDA_ARCH_LIST"]
        else:
            os.environ["TORCH_CUDA_ARCH_LIST"] = before
    print(f"Built {path} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold an exclusive lock on a file. The system drops it with its process, so no crash leaves a stale one.

    Under torchrun all ranks come here at once: the first builds, the lock is the others' barrier.
    """
    import fcntl

    deadline = time.monotonic() + seconds
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise BuildError(f"another process has held {path} for {seconds:.0f} s; "
                                     f"end that process or delete the file") from error
                time.sleep(0.2)
        yield


def main() -> int:
    """Build ahead of time, for every machine that shares the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiet", action="store_true", help="without the compiler's output")
    arguments = parser.parse_args()
    try:
        library(ahead=True, verbose=not arguments.quiet)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
