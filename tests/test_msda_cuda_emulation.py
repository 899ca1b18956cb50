"""The CUDA kernels without a GPU: run on the host by an emulation of warps, compiled by nvcc, linked and loaded.

`emulation/cuda_runtime_api.h` stands in for CUDA's header, so kernels.cu is compiled unchanged by the host compiler.
"""

import ctypes
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_msda import assert_same, golden, random_case, reference

from msda_cuda import build

EMULATION = ROOT / "tests" / "emulation"
TORCH_HEADERS = Path(torch.__file__).parent / "include"
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
COMPILER = shlex.split(os.environ.get("CXX", "g++"))  # perhaps `ccache g++`
PIP_HOME = next((home for folder in sys.path for home in Path(folder, "nvidia").glob("cu*")
                 if (home / "bin" / "nvcc").exists()), None)
needs_nvcc = pytest.mark.skipif(build.find_cuda_home() is None, reason="no CUDA toolkit (nvcc)")


def compile_host(output, architecture, *flags):
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no C++ compiler ({COMPILER[0]})")
    command = [*COMPILER, "-std=c++17", "-Wall", "-Wno-unknown-pragmas", f"-I{EMULATION}", f"-I{TORCH_HEADERS}",
               f"-DEMULATED_ARCH={architecture}", str(EMULATION / "host.cpp"), "-o", str(output), *flags]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return output


@pytest.fixture(scope="module", params=[800, 900])
def library(request, tmp_path_factory):
    """The emulated launchers: atomics of one float, and from 9.0 on of four."""
    output = tmp_path_factory.mktemp("host") / "host.so"
    return ctypes.CDLL(str(compile_host(output, request.param, "-O2", "-shared", "-fPIC")))


@pytest.fixture(scope="module")
def emulate(library):
    """Output and gradients of the emulated launchers; value and cotangent of one type, the rest float32."""

    def pointers(*tensors):
        return [ctypes.c_void_p(x.data_ptr()) for x in tensors]

    def emulate(shapes, value, locations, weights, cotangent):
        (B, _, M, D), (_, Q, _, L, P, _) = value.shape, locations.shape
        flat = itertools.chain.from_iterable(shapes)
        sizes = TYPES[value.dtype], (ctypes.c_int64 * 6)(B, M, D, Q, L, P), (ctypes.c_int64 * (2 * L))(*flat)
        inputs = value, locations, weights
        output = torch.full((B, Q, M * D), float("nan"), dtype=value.dtype)  # NaN: what is not written shows
        grads = [torch.zeros(value.shape), *(torch.full(x.shape, float("nan")) for x in (locations, weights))]
        assert library.emulated_forward(*sizes, *pointers(*inputs, output)) == 0
        assert library.emulated_backward(*sizes, *pointers(cotangent, *inputs, *grads)) == 0
        return output, *grads

    return emulate


def random_inputs(shapes, B, Q, M, D, P, dtype=torch.float32):
    """`random_case` with a gradient of the output, of the values' type."""
    case = random_case(shapes, B, Q, M, D, P, dtype=dtype)
    return *case, torch.randn(B, Q, M * D, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("name", ["msda_a", "msda_b"])
def test_golden(emulate, name):
    shapes, inputs, results = golden(name)
    assert_same(emulate(shapes, *(x.float() for x in inputs)), results, 1e-5, 1e-4)


# 32 channels take the vector kernels; B > 1 with Q * M dividing neither a block nor a warp catches image 1 reading
# image 0, and groups past the end that leave before a shuffle.
@pytest.mark.parametrize("dtype, forward", [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("D", [32, 5, 48])
@pytest.mark.parametrize("B, Q, M", [(3, 7, 3), (2, 1, 1), (1, 37, 2)])
def test_random(emulate, dtype, forward, D, B, Q, M):
    shapes = [(5, 4), (3, 2), (1, 1)]
    case = random_inputs(shapes, B, Q, M, D, P=4 if D == 32 else 2, dtype=dtype)
    assert_same(emulate(shapes, *case), reference(shapes, *case), forward, 1e-4)


def test_a_view_that_starts_off_a_16_byte_boundary(emulate):
    value, *others = random_inputs([(3, 4)], 2, 5, 2, 32, 4)
    shifted = torch.empty(value.numel() + 1)[1:].view_as(value).copy_(value)
    assert shifted.data_ptr() % 16 and shifted.is_contiguous()
    assert_same(emulate([(3, 4)], shifted, *others), reference([(3, 4)], value, *others), 1e-5, 1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -3e38])
def test_lost_points(emulate, bad):
    shapes = [(3, 4)]
    value, locations, weights, cotangent = random_inputs(shapes, 2, 5, 2, 32, 2)
    locations[..., 1, :] = bad
    got = emulate(shapes, value, locations, weights, cotangent)
    want = reference(shapes, value, locations[..., :1, :], weights[..., :1], cotangent)
    assert_same((got[0], got[1], got[2][..., :1, :], got[3][..., :1]), want, 1e-5, 1e-4)
    assert (got[2][..., 1, :] == 0).all() and (got[3][..., 1] == 0).all()


@pytest.mark.parametrize("dtype, touches", [(torch.float32, {800: 4, 900: 4}), (torch.float16, {800: 8, 900: 4})])
def test_atomics_touch_few_sectors(library, emulate, request, dtype, touches):
    """The memory serves atomics by sectors of 32 bytes; the 32 floats of a corner fill 4 of them. If each lane added
    the neighbouring channels that it multiplies, they would be touched 16 times in float32, 32 times in 16 bits (8.0),
    or 4 and 8 times (9.0)."""
    value, locations, weights, cotangent = random_inputs([(6, 5)], 2, 7, 8, 32, 3, dtype)
    library.emulated_sectors()
    emulate([(6, 5)], value, locations.clamp(0.2, 0.8), weights, cotangent)  # all corners lie on the map
    architecture = request.node.callspec.params["library"]
    assert library.emulated_sectors() == touches[architecture] * weights.numel() * 4


def test_empty_queries_launch_nothing(emulate):
    got = emulate([(2, 2)], *random_inputs([(2, 2)], 2, 0, 1, 32, 1))
    assert got[0].shape == (2, 0, 32) and (got[1] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [800, 900])
def test_sanitizers_find_nothing_in_cpu_and_cuda_kernels(tmp_path, architecture):
    """AddressSanitizer and UndefinedBehaviorSanitizer, on cases with NaN, infinite and far-out points."""
    flags = ("-g", "-O1", "-fopenmp-simd", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    done = subprocess.run([compile_host(tmp_path / "host", architecture, *flags)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "same\n", done.stdout + done.stderr


@needs_nvcc
@pytest.mark.slow
def test_nvcc_compiles_every_architecture_without_spills(tmp_path):
    """ptxas' report of all kernels: no spilled register, at most 64 of them, so that four blocks share a processor."""
    numbers = re.sub(r"[.]|\+PTX", "", build.ARCHITECTURES).split(";")
    codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    nvcc, source = build.find_cuda_home() / "bin" / "nvcc", ROOT / "msda_cuda" / "csrc" / "kernels.cu"
    command = [str(nvcc), "-c", "-std=c++17", "-O3", "--threads=2", "-Xptxas=-v", *codes, f"-I{TORCH_HEADERS}",
               str(source), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0 and "warning" not in report, report
    kernels = 2 * 2 * 3 * len(numbers)  # direction, fast and general, three types
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(registers) == kernels and max(registers) <= 64
    assert len(spills) >= kernels and set(spills) == {("0", "0")}


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA")
@pytest.mark.parametrize("home", [
    pytest.param(build.find_cuda_home(), marks=needs_nvcc, id="toolkit"),
    pytest.param(PIP_HOME, id="pip", marks=pytest.mark.skipif(
        PIP_HOME is None, reason='no toolkit of pip: pip install "cuda-toolkit[nvcc,cccl]"')),
])
def test_extension_with_cuda_links_and_loads(tmp_path, home):
    code = """
import torch
from msda_cuda import ms_deform_attn, ops
print("cuda" in ops.native().devices, ms_deform_attn(
    torch.ones(1, 4, 1, 32), [(2, 2)], torch.full((1, 3, 1, 1, 1, 2), .5), torch.ones(1, 3, 1, 1, 1)).sum().item())
"""
    environment = {**os.environ, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "MSDA": "native",
                   "TORCH_EXTENSIONS_DIR": str(tmp_path), "CUDA_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "True 96.0", done.stderr
