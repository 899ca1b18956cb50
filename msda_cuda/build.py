"""Build the C++/CUDA operator: at first use, or ahead of time with `python msda_cuda/build.py`.

Reading order: plan -> library -> compile_library -> complaint -> toolchain -> lock -> main.

The library lies in PyTorch's extension cache (`TORCH_EXTENSIONS_DIR`, else ~/.cache/torch_extensions). Its name is made
from the sources and PyTorch's version, so that every later process finds it there. A failed compilation leaves a note
beside it: other processes read the reason and do not try again until a compiler changes. Environment:
  FORCE_CUDA=1            build the CUDA part though no GPU is visible
  TORCH_CUDA_ARCH_LIST    its architectures (default: those of the GPUs here; without one, 7.5 to 12.0+PTX)
  CUDA_HOME, CXX          the CUDA toolkit and the host compiler
"""

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import torch

SOURCES = Path(__file__).parent / "csrc"
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
LOCK_SECONDS = 600.0
# Sums of 32 products become a tree instead of a chain; NaN and infinity keep their meaning (no -ffast-math).
COMPILE_FLAGS = ["-O3", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none: one thread there


class BuildError(RuntimeError):
    """There is no native operator. The message names the cause and the remedy in one line."""


class Plan(NamedTuple):
    """What to build here: the library's name, the toolkit (None: CPU only), and why there is no CUDA part."""

    name: str
    cuda_home: Path | None
    no_cuda: str


def find_cuda_home() -> Path | None:
    """The first toolkit of PyTorch's CUDA with both compiler and headers (an `nvcc` on the path may be a wrapper).

    pip puts one, from CUDA 13 on, into site-packages/nvidia.
    """
    major = torch.version.cuda.split(".")[0] if torch.version.cuda else r"\d+"
    nvcc = shutil.which("nvcc")
    places = (os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda",
              *(os.path.join(folder, "nvidia", f"cu{major}") for folder in sys.path))
    for home in (Path(place) for place in places if place):
        header = home / "include" / "cuda.h"  # #define CUDA_VERSION 13000
        if (home / "bin" / "nvcc").exists() and header.exists() and re.search(
                rf"#define CUDA_VERSION {major}\d{{3}}\b", header.read_text(errors="replace")):
            return home
    return None


def plan() -> Plan:
    """Look at PyTorch, the GPUs and the toolkit."""
    key = hashlib.sha256("".join((torch.__version__, *COMPILE_FLAGS)).encode())
    for path in sorted(SOURCES.iterdir()):
        key.update(path.read_bytes())
    home, no_cuda = None, ""
    if torch.version.cuda is None:
        no_cuda = "this PyTorch is built without CUDA; install a CUDA build of it"
    elif os.environ.get("FORCE_CUDA") != "1" and not torch.cuda.is_available():
        no_cuda = "no GPU is visible; FORCE_CUDA=1 builds the CUDA part all the same"
    elif (home := find_cuda_home()) is None:
        wheels = f'pip install "cuda-toolkit[nvcc,cccl]=={torch.version.cuda}.*"'
        remedy = "install one" if torch.version.cuda.startswith("12.") else wheels  # those of 12 hold no nvcc
        no_cuda = f"no toolkit (nvcc) of PyTorch's CUDA {torch.version.cuda} was found; {remedy} or set CUDA_HOME"
    name = f"msda_{'cpu' if no_cuda else 'cuda'}_{key.hexdigest()[:12]}"
    return Plan(name, None if no_cuda else home, no_cuda)


def architectures(ahead: bool) -> str:
    """TORCH_CUDA_ARCH_LIST; without it, those of the GPUs here (a build at first use) or all supported ones."""
    default = ARCHITECTURES
    if torch.cuda.is_available() and not ahead:
        devices = range(torch.cuda.device_count())
        default = ";".join(sorted({"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in devices}))
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or default


def cache() -> Path:
    """Where compiled code lies for later processes: PyTorch's extension cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or home / "torch_extensions")


def library(ahead: bool = False) -> Path:
    """The compiled library; if there is none yet, one process compiles it while others wait. Raises BuildError.

    With `ahead` it is compiled in any case, for all architectures, even if that failed before.
    """
    if sys.platform == "win32":
        raise BuildError("the native operator is not supported on Windows; MSDA=torch silences this")
    folders = cache() / "msda", Path(tempfile.gettempdir()) / f"msda-{os.getuid()}"  # where the first is read-only
    here, archs = plan(), architectures(ahead)
    name = here.name
    if here.cuda_home and not ahead:  # compiled for the GPUs here: a machine with others must not find this library
        name += "_" + re.sub(r"\W", "_", archs.replace(".", ""))

    def is_usable(path: Path) -> bool:
        return not ahead and path.exists() and path.stat().st_uid in (0, os.getuid())  # others are not trusted

    for path in (folder / f"{stem}.so" for folder in folders for stem in (here.name, name)):
        if is_usable(path):  # one compiled ahead of time comes first: it serves all GPUs
            return path
    for path in (folder / f"{name}.so" for folder in folders):
        with contextlib.suppress(OSError):  # a folder that takes no file
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.parent.stat().st_uid == os.getuid():
                with lock(path.with_suffix(".lock"), LOCK_SECONDS):
                    if not is_usable(path):  # else another process compiled it meanwhile
                        compile_library(here, path, archs, ahead)
                    return path
    raise BuildError(f"no writable cache in {' or '.join(map(str, folders))}; set TORCH_EXTENSIONS_DIR")


def compile_library(here: Plan, path: Path, archs: str, ahead: bool) -> None:
    """Compile in a new folder, then rename the library to `path`: a killed build leaves no broken one.

    Raises BuildError: compiling failed, now or (but for `ahead`) before with the same compilers.
    """
    # pip puts ninja beside this Python, which is on PATH only where its environment is activated.
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    with patch.dict(os.environ, PATH=search, TORCH_CUDA_ARCH_LIST=archs, LC_ALL="C"):  # complaints in English
        tools, note = toolchain(here.cuda_home), path.with_suffix(".failed")
        if not ahead and note.exists():
            reason, _, failed_with = note.read_text(errors="replace").partition("\n")
            if failed_with == tools:
                raise BuildError(reason)
        cpp_extension = find_tools()
        parts = f"CPU and CUDA ({archs})" if here.cuda_home else f"CPU ({here.no_cuda})"
        print(f"Building deformable attention, once: {parts}", file=sys.stderr, flush=True)
        sources, flags, start = ["msda.cpp"], [*COMPILE_FLAGS, *OPENMP], time.monotonic()
        try:
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                if here.cuda_home:
                    cpp_extension.CUDA_HOME = str(here.cuda_home)
                    sources, flags = [*sources, "kernels.cu"], [*flags, "-DMSDA_WITH_CUDA"]
                    for runtime in sorted(here.cuda_home.glob("lib*/libcudart.so.*"))[:1]:
                        (Path(folder) / "libcudart.so").symlink_to(runtime)  # pip's toolkit lacks the linker's name
                cpp_extension.load(
                    path.stem, [str(SOURCES / name) for name in sources], extra_cflags=flags,
                    extra_ldflags=[*OPENMP, f"-L{folder}"], extra_cuda_cflags=["-O3", "--threads=2"],
                    build_directory=folder, is_python_module=False,
                )
                os.replace(Path(folder) / path.name, path)
        except Exception as error:
            reason = (f"compiling failed: {complaint(str(error) or repr(error))}; "
                      "`python msda_cuda/build.py` tries again and shows all of it")
            # Not the compilers' fault: a wrong architecture, a refusal of the system (memory, disk, files), a stop.
            passing = "(?i)interrupted by user|no space left|killed|cannot allocate|out of memory"
            if not (isinstance(error, ValueError) or getattr(error, "errno", None) or re.search(passing, str(error))):
                with contextlib.suppress(OSError):
                    note.write_text(f"{reason}\n{tools}")
            raise BuildError(reason) from error
    for note in path.parent.glob(f"{path.stem}*.failed"):
        note.unlink(missing_ok=True)
    print(f"Built {path} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def complaint(output: str) -> str:
    """The first complaint of compiler or linker; without one, what the failed command wrote first; never a command."""
    complains = r"(?i).*(?:(?:error|fatal)[ #\w-]*:|undefined reference|cannot find -l|no space left).*"
    first_of_command = r"FAILED: .*\n.*\n(.*)"  # ninja writes the target, the command, then what the command wrote
    lines = [*re.findall(complains, output), *re.findall(first_of_command, output), output.splitlines()[-1]]
    return lines[0].strip()


def toolchain(cuda_home: Path | None) -> str:
    """What a failed build may be mended by, with the time of its last change: compilers and the toolkit's headers."""
    tools = [shutil.which(os.environ.get("CXX", "c++")), shutil.which(os.environ.get("CC", "gcc"))]
    tools += [cuda_home / "bin" / "nvcc", cuda_home / "include"] if cuda_home else []
    return " ".join(f"{os.path.realpath(tool)}:{os.stat(tool).st_mtime_ns}" for tool in tools if tool)


def find_tools() -> ModuleType:
    """PyTorch's module that compiles extensions. Raises BuildError if it, a C++ compiler or ninja is absent."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:  # it needs setuptools, which a bare environment may lack
        raise BuildError(f"{error}; pip install setuptools") from error
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise BuildError(f"no C++ compiler ({compiler}) was found; install g++ or set CXX")
    if not cpp_extension.is_ninja_available():
        raise BuildError("ninja was not found; pip install ninja")
    return cpp_extension


@contextlib.contextmanager
def lock(path: Path, seconds: float) -> Iterator[None]:
    """Hold an exclusive lock on a file: under torchrun the first rank compiles, the others wait.

    The system drops the lock when its process ends. Raises BuildError if another process holds it for `seconds`.
    """
    import fcntl  # absent on Windows

    deadline = time.monotonic() + seconds
    with path.open("w") as file:
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.2)
        else:
            raise BuildError(f"another process has held {path} for {seconds:.0f} s; end it or delete the file")
        yield


def main() -> None:
    """Build ahead of time, for every machine that shares the cache; exit status 2 if that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    try:
        library(ahead=True)
    except BuildError as error:
        output = f"{error.__cause__}\n" if error.__cause__ else ""
        parser.exit(2, f"{output}error: {error}\n")


if __name__ == "__main__":
    main()
