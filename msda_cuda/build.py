"""Build the C++/CUDA operator: at first use, or ahead of time with `python msda_cuda/build.py`.

Reading order: plan -> library -> compile_library -> complaint -> compiler -> toolchain -> main; cache.py.

The library lies in PyTorch's extension cache (`TORCH_EXTENSIONS_DIR`, else ~/.cache/torch_extensions), its SHA-256
beside it: one that was cut or changed is built again. Its name is made from the sources and PyTorch's version, so that
every later process finds it there. A failed compilation leaves a note there: other processes read the reason and do not
try again until a compiler changes. Environment:
  FORCE_CUDA=1            build the CUDA part though no GPU is visible
  TORCH_CUDA_ARCH_LIST    its architectures (default: those of the GPUs here; without one, 7.5 to 12.0+PTX)
  CUDA_HOME, CXX, CC      the CUDA toolkit, the host compiler and nvcc's, perhaps of several words: CXX="ccache g++"
"""

import argparse
import contextlib
import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import torch

if __name__ == "__main__":  # python msda_cuda/build.py: what it imports lies one folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
from msda_cuda.cache import BuildError, extensions, is_whole, lock, private_folder, put, temporary

SOURCES = Path(__file__).parent / "csrc"
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
LOCK_SECONDS = 600.0
# Sums of 32 products become a tree instead of a chain; NaN and infinity keep their meaning (no -ffast-math).
COMPILE_FLAGS = ["-O3", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none: one thread there


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


def library(ahead: bool = False) -> Path:
    """The compiled library; if there is none yet, one process compiles it while others wait. Raises BuildError.

    With `ahead` it is compiled in any case, for all architectures, even if that failed before.
    """
    if sys.platform == "win32":
        raise BuildError("the native operator is not supported on Windows; MSDA=torch silences this")
    here, archs, refused = plan(), architectures(ahead), []
    name = here.name
    if here.cuda_home and not ahead:  # compiled for the GPUs here: a machine with others must not find this library
        name += "_" + re.sub(r"\W", "_", archs.replace(".", ""))
    for folder in (extensions() / "msda", temporary()):
        try:
            folder = private_folder(folder)
            for path in (folder / f"{stem}.so" for stem in dict.fromkeys((here.name, name))):
                if not ahead and is_whole(path):  # one compiled ahead of time comes first: it serves all GPUs
                    return path
            with lock(path.with_suffix(".lock"), LOCK_SECONDS):
                if ahead or not is_whole(path):  # else another process compiled it meanwhile
                    if refused:
                        print(f"{refused[0]}; {folder} is taken instead", file=sys.stderr, flush=True)
                    compile_library(here, path, archs, ahead)
                return path
        except OSError as error:  # a folder that takes no file, or that others may change
            refused.append(f"{error.filename or folder}: {error.strerror or error}")
    raise BuildError(f"no cache can be used ({'; '.join(refused)}); set TORCH_EXTENSIONS_DIR to a folder of your own")


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
        damaged = os.path.lexists(path) and not ahead
        once = f"again, since {path} is damaged or without its SHA-256" if damaged else "once"
        parts = f"CPU and CUDA ({archs})" if here.cuda_home else f"CPU ({here.no_cuda})"
        print(f"Building deformable attention, {once}: {parts}", file=sys.stderr, flush=True)
        sources, flags, start = ["msda.cpp"], [*COMPILE_FLAGS, *OPENMP], time.monotonic()
        try:
            for killed in path.parent.glob(f"{path.stem}.draft*"):
                shutil.rmtree(killed, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f"{path.stem}.draft", dir=path.parent) as folder:
                if here.cuda_home:
                    cpp_extension.CUDA_HOME = str(here.cuda_home)
                    sources, flags = [*sources, "kernels.cu"], [*flags, "-DMSDA_WITH_CUDA"]
                    for runtime in sorted(here.cuda_home.glob("lib*/libcudart.so.*"))[:1]:
                        (Path(folder) / "libcudart.so").symlink_to(runtime)  # pip's toolkit lacks the linker's name
                for variable in ("CXX", "CC"):
                    words, text = compiler(variable), os.environ.get(variable)
                    if text and words != [text]:  # PyTorch takes it all for the name of one program
                        program = Path(folder) / variable
                        program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
                        program.chmod(0o700)
                        os.environ[variable] = str(program)
                cpp_extension.load(
                    path.stem, [str(SOURCES / name) for name in sources], extra_cflags=flags,
                    extra_ldflags=[*OPENMP, f"-L{shlex.quote(folder)}"], extra_cuda_cflags=["-O3", "--threads=2"],
                    build_directory=folder, is_python_module=False,
                )
                put(Path(folder) / path.name, path)
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


def compiler(variable: str) -> list[str]:
    """The words of CXX or CC: `ccache g++` is a program and its argument. Raises BuildError if they cannot be read."""
    text = os.environ.get(variable, {"CXX": "c++", "CC": "gcc"}[variable])
    try:
        return [text] if shutil.which(text) else shlex.split(text)
    except ValueError as error:
        raise BuildError(f"{variable}={text} cannot be read ({error}); mend it or unset it") from error


def toolchain(cuda_home: Path | None) -> str:
    """What a failed build may be mended by, with the time of its last change: compilers and the toolkit's headers."""
    tools = [shutil.which(word) for word in (*compiler("CXX"), *compiler("CC"))]
    tools += [cuda_home / "bin" / "nvcc", cuda_home / "include"] if cuda_home else []
    return " ".join(f"{os.path.realpath(tool)}:{os.stat(tool).st_mtime_ns}" for tool in tools if tool)


def find_tools() -> ModuleType:
    """PyTorch's module that compiles extensions. Raises BuildError if it, a C++ compiler or ninja is absent."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:  # it needs setuptools, which a bare environment may lack
        raise BuildError(f"{error}; pip install setuptools") from error
    program, *_ = compiler("CXX") or [""]
    if shutil.which(program) is None:
        raise BuildError(f"no C++ compiler ({program}) was found; install g++ or set CXX")
    if not cpp_extension.is_ninja_available():
        raise BuildError("ninja was not found; pip install ninja")
    return cpp_extension


def main() -> None:
    """Build ahead of time, for every machine that shares the cache. Raises BuildError, after all of the output."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        library(ahead=True)
    except BuildError as error:
        if error.__cause__:
            print(error.__cause__, file=sys.stderr)
        raise


if __name__ == "__main__":
    sys.exit(common.run(main))
