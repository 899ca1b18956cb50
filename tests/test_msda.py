"""Deformable attention: values -> as PyTorch's operator -> the layer -> build and fallback.

The reference is compared with golden numbers and with transformers, the native CPU operator with the reference.
"""

import functools
import itertools
import os
import re
import runpy
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import cpp_extension

import msda_cuda
from common import UserError
from msda_cuda import MSDeformAttn, active_path, build, ms_deform_attn, ms_deform_attn_torch, ops

MAPS = [(6, 4), (3, 2)]


@pytest.fixture(scope="session")
def native():
    """The native operator, or a skip that says why there is none."""
    with warnings.catch_warnings(action="ignore"):
        if active_path("cpu") != "native":
            pytest.skip(f"no native operator here: {ops.native().reason}")
    return ms_deform_attn


def golden(name):
    """Shapes, (value, locations, weights, cotangent) and the four results."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(array) for key, array in file.items()}
    inputs = [arrays[key] for key in ("value", "locations", "weights", "cotangent")]
    results = [arrays[key] for key in ("out", "grad_value", "grad_locations", "grad_weights")]
    return [tuple(shape) for shape in arrays["shapes"].tolist()], inputs, results


def random_case(shapes, B=2, Q=5, M=2, D=32, P=3, seed=0, dtype=torch.float64):
    """Values of that type, locations and weights of that of the sums; a quarter of the points lie off the map."""
    g, precise = torch.Generator().manual_seed(seed), torch.promote_types(dtype, torch.float32)
    S, L = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(B, S, M, D, generator=g, dtype=precise).to(dtype)
    locations = torch.rand(B, Q, M, L, P, 2, generator=g, dtype=precise) * 1.3 - 0.15
    return value, locations, torch.rand(B, Q, M, L, P, generator=g, dtype=precise)


def run(function, shapes, value, locations, weights, cotangent=None):
    """Output and the three gradients."""
    inputs = [x.detach().clone().requires_grad_() for x in (value, locations, weights)]
    output = function(inputs[0], shapes, inputs[1], inputs[2])
    cotangent = torch.cos(torch.arange(output.numel())).view(output.shape) if cotangent is None else cotangent
    return output, *torch.autograd.grad(output, inputs, cotangent.to(output.dtype))


def reference(shapes, *inputs):
    """Output and gradients in float64."""
    return run(ms_deform_attn_torch, shapes, *(x.double() for x in inputs))


def assert_same(got, want, tolerance, gradients=None):
    """Differences within a tolerance of 1 or of the largest entry; that of the gradients may differ."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        limit = gradients if i and gradients is not None else tolerance
        assert g.shape == w.shape
        if g.numel():
            assert (g.double() - w.double()).abs().max() <= limit * max(w.abs().max().item(), 1.0), f"result {i}"


@pytest.mark.parametrize("name", ["msda_a", "msda_b"])
@pytest.mark.parametrize("path", ["torch", "native"])
def test_golden(name, path, request):
    function = ms_deform_attn_torch if path == "torch" else request.getfixturevalue("native")
    shapes, inputs, results = golden(name)
    assert_same(run(function, shapes, *inputs), results, 1e-12)


def test_agrees_with_transformers():
    module = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    value, *others = random_case(MAPS)
    theirs = module.MultiScaleDeformableAttention()(value, torch.tensor(MAPS), MAPS, None, *others, 64)
    torch.testing.assert_close(ms_deform_attn_torch(value, MAPS, *others), theirs, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4),
    B=st.integers(1, 3), Q=st.integers(0, 9), M=st.integers(1, 3), P=st.integers(1, 4), seed=st.integers(0, 99),
    D=st.sampled_from([1, 3, 8, 32, 33]),
)
def test_native_agrees_on_random_shapes(native, shapes, B, Q, M, D, P, seed):
    case = random_case(shapes, B, Q, M, D, P, seed)
    assert_same(run(native, shapes, *case), reference(shapes, *case), 1e-12)


def test_points_on_borders_pixels_and_far_outside(native):
    shapes = [(4, 6), (1, 1)]
    places = [-1e30, -50.0, -0.5 / 6, -1e-9, 0.0, 0.5 / 6, 0.5, 1 - 0.5 / 6, 1.0, 1 + 0.5 / 6, 50.0, 1e30]
    points = torch.tensor(list(itertools.product(places, repeat=2)), dtype=torch.float64)  # (144, 2)
    value, _, weights = random_case(shapes, B=1, Q=144, M=1, P=1)
    locations = points.view(1, 144, 1, 1, 1, 2).expand(1, 144, 1, 2, 1, 2)
    near = (points.abs() < 10).all(-1)
    got, want = run(native, shapes, value, locations, weights), reference(shapes, value, locations, weights)
    assert (got[0][:, ~near] == 0).all() and all(torch.isfinite(x).all() for x in got)
    torch.testing.assert_close(got[0][:, near], want[0][:, near], rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_lost_points_read_zeros_and_harm_nobody(native, bad):
    shapes, (value, locations, weights) = [(3, 5)], random_case([(3, 5)], dtype=torch.float32)
    clean = run(native, shapes, value, locations, weights * (torch.arange(3) != 1))
    locations[..., 1, :] = bad
    got = run(native, shapes, value, locations, weights)
    assert all(torch.isfinite(x).all() for x in got)
    assert torch.equal(got[0], clean[0]) and torch.equal(got[1], clean[1])
    assert (got[2][..., 1, :] == 0).all() and (got[3][..., 1] == 0).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_types(native, dtype, tolerance):
    case = random_case(MAPS, dtype=dtype)
    got = run(native, MAPS, *case)
    assert got[0].dtype == got[1].dtype == dtype and got[2].dtype == got[3].dtype == torch.float32
    assert_same(got, reference(MAPS, *case), tolerance)


def test_non_contiguous_input(native):
    value, *others = case = random_case(MAPS)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case]
    assert not any(x.is_contiguous() for x in strided)
    cotangent = torch.randn(64, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    got = run(native, MAPS, *strided, cotangent)
    assert torch.equal(got[0], native(value, MAPS, *others))
    assert_same(got, reference(MAPS, *case, cotangent), 1e-12)


def test_one_result_for_any_number_of_threads(native):
    case, threads, results = random_case([(9, 7), (5, 3)], Q=41, dtype=torch.float32), torch.get_num_threads(), []
    for count in (1, 3, threads):
        torch.set_num_threads(count)
        results.append(run(native, [(9, 7), (5, 3)], *case))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


LEVELS, FLAT = [(3, 4), (2, 1)], [3, 4, 2, 1]


def operator_inputs(requires_grad=True, dtype=torch.float64):
    value, *others = (x.requires_grad_(requires_grad) for x in random_case(LEVELS, Q=3, M=2, D=4, P=2, dtype=dtype))
    return value, FLAT, *others


def test_opcheck_and_meta_tensors(native):
    for dtype in (torch.float64, torch.float32):
        torch.library.opcheck(torch.ops.msda.forward, operator_inputs(dtype=dtype))
    inputs = operator_inputs(requires_grad=False)
    torch.library.opcheck(torch.ops.msda.backward, (torch.ones(2, 3, 8, dtype=torch.float64), *inputs))
    value, _, *others = (x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs)
    output = native(value, LEVELS, *others)
    assert output.shape == (2, 3, 8) and output.is_meta


def test_gradcheck_and_no_second_derivative(native):
    value, flat, *others = operator_inputs()
    assert torch.autograd.gradcheck(lambda v, loc, w: torch.ops.msda.forward(v, flat, loc, w), (value, *others),
                                    atol=1e-6)
    (first,) = torch.autograd.grad(native(value, LEVELS, *others).square().sum(), value, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        first.sum().backward()


def test_compile_in_one_graph(native):
    layer, shapes = MSDeformAttn(32, 4, 2, 3, 0.5), [(4, 3), (2, 2)]
    inputs = torch.randn(2, 7, 32), torch.rand(7, 2), torch.randn(2, 16, 32), shapes
    expected = layer(*inputs)
    output = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), layer.value_proj.weight),
                               torch.autograd.grad(expected.sum(), layer.value_proj.weight))


def test_autocast_narrows_values_only(native):
    value, locations, weights = random_case([(6, 4)], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = native(value, [(6, 4)], locations, weights.bfloat16())
    want = ms_deform_attn_torch(value.bfloat16(), [(6, 4)], locations, weights.bfloat16())
    assert got.dtype == torch.bfloat16 and (got - want).abs().max() <= 2**-7


def test_memory_kept_for_backward(native):
    """The pixel decoder's layer, on smaller maps: the reference keeps the samples, the operator only its inputs."""
    shapes = [(4, 4), (8, 8), (16, 16)]
    case = random_case(shapes, B=1, Q=336, M=8, D=32, P=4, dtype=torch.float32)

    def kept(function):
        tensors, (value, *others) = [], (x.clone().requires_grad_() for x in case)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.append(x) or x, lambda x: x):
            output = function(value, shapes, *others)  # noqa: F841  kept alive
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}  # some are shared
        return sum(storages.values())

    assert kept(native) == 4 * sum(x.numel() for x in case)
    assert kept(native) * 6 <= kept(ms_deform_attn_torch)


@pytest.mark.parametrize("shapes, name, size", [
    ([(3, 4), (2, 2)], "value", (2, 14, 2, 4)), (LEVELS, "weights", (2, 3, 2, 2, 5)),
    (LEVELS, "locations", (2, 4, 2, 2, 2, 2)),
])
def test_sizes_that_do_not_fit(shapes, name, size):
    value, _, locations, weights = operator_inputs()
    inputs = {"value": value, "locations": locations, "weights": weights, name: torch.ones(size)}
    with pytest.raises(ValueError, match="ms_deform_attn: .*value"):
        ms_deform_attn(shapes=shapes, **inputs)


def test_the_operator_itself_trusts_neither_sizes_nor_types(native):
    value, flat, locations, weights = operator_inputs(requires_grad=False)
    for wrong in ([3, 4], [3, 4, 2, 2], [3, 4, 2, -1], [3, 4, 2], [1, 1] * 17):
        with pytest.raises(RuntimeError, match="ms_deform_attn"):
            torch.ops.msda.forward(value, wrong, locations, weights)
    with pytest.raises(RuntimeError, match="must be Double"):
        torch.ops.msda.forward(value, flat, locations.float(), weights)
    with pytest.raises(RuntimeError, match="gradient of shape"):
        torch.ops.msda.backward(torch.ones(2, 3, 7, dtype=torch.float64), value, flat, locations, weights)


def test_layer_starts_as_a_ring_of_equal_weights():
    layer = MSDeformAttn(64, 4, 3, 2, 0.5)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "sampling_offsets.weight": (48, 64), "sampling_offsets.bias": (48,),
        "attention_weights.weight": (24, 64), "attention_weights.bias": (24,),
        "value_proj.weight": (32, 64), "value_proj.bias": (32,),
        "output_proj.weight": (64, 32), "output_proj.bias": (64,),
    }
    ring = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    bias = layer.sampling_offsets.bias.view(4, 3, 2, 2)
    for point in range(2):
        torch.testing.assert_close(bias[:, :, point], ((point + 1) * ring)[:, None].expand(4, 3, 2))
    assert not any(x.any() for x in (layer.sampling_offsets.weight, layer.attention_weights.weight,
                                     layer.value_proj.bias))
    assert layer.value_proj.weight.abs().max() <= (6 / (64 + 32)) ** 0.5
    with pytest.raises(ValueError, match="do not split into 4 heads"):
        MSDeformAttn(60, 4, 1, 4, 0.5)


def test_layer_by_hand():
    """One head, one point, a bias of one pixel to the right: the output is the neighbour, bilinearly none other."""
    layer = MSDeformAttn(2, 1, 1, 1).double()
    for projection in (layer.value_proj, layer.output_proj):
        torch.nn.init.eye_(projection.weight)
    value = torch.arange(12, dtype=torch.float64).view(1, 6, 2)  # a map of 2 x 3
    centres = torch.tensor([[0.5 / 3, 0.25], [1.5 / 3, 0.75], [2.5 / 3, 0.75]], dtype=torch.float64)
    output = layer(torch.zeros(1, 3, 2, dtype=torch.float64), centres, value, [(2, 3)])
    torch.testing.assert_close(output[0], torch.tensor([[2.0, 3], [10, 11], [0, 0]], dtype=torch.float64))


@pytest.fixture
def calls(monkeypatch):
    """The arguments (value, shapes, locations, weights) of each call that a layer makes."""
    calls = []
    monkeypatch.setattr(msda_cuda.module, "ms_deform_attn", lambda *x: calls.append(x) or ms_deform_attn_torch(*x))
    return calls


@pytest.mark.parametrize("gradient", [True, False])
def test_points_and_weights_are_those_of_the_paper(calls, gradient):
    """p + offset / (width, height) of the level, and a softmax over levels and points jointly, even of huge scores."""
    shapes, (M, L, P) = [(4, 3), (2, 5)], (3, 2, 4)
    layer = MSDeformAttn(6, M, L, P).double()
    for projection in (layer.sampling_offsets, layer.attention_weights):
        torch.nn.init.normal_(projection.weight, std=30)
    query, points = torch.randn(2, 7, 6, dtype=torch.double), torch.rand(7, 2, dtype=torch.double)
    query[0, 0] *= 100  # the exponentials of such scores alone would overflow
    with torch.set_grad_enabled(gradient):
        layer(query, points, torch.randn(2, 22, 6, dtype=torch.double), shapes)
        offsets, scores = layer.sampling_offsets(query), layer.attention_weights(query)
    sizes = torch.tensor([(w, h) for h, w in shapes])[:, None]
    (_, _, locations, weights), = calls
    assert locations.equal(points[:, None, None, None] + offsets.view(2, 7, M, L, P, 2) / sizes)
    expected = scores.view(2, 7, M, L * P).softmax(-1).view(2, 7, M, L, P)
    torch.testing.assert_close(weights, expected, rtol=1e-14, atol=1e-14)


def test_autocast_keeps_locations_and_weights_in_float32(calls):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        MSDeformAttn(16, 2, 1, 2)(torch.randn(1, 5, 16), torch.rand(5, 2), torch.randn(1, 12, 16), [(3, 4)])
    (value, _, locations, weights), = calls
    assert (value.dtype, locations.dtype, weights.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.fixture
def first_use(tmp_path, monkeypatch):
    """As in a new process with an empty cache: nothing is chosen, loaded or built."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    for name in ("native", "choose_path"):
        monkeypatch.setattr(ops, name, functools.cache(getattr(ops, name).__wrapped__))
    return monkeypatch


@pytest.mark.parametrize("choice, compiler, message", [
    ("auto", "gone", r"deformable attention on cpu runs without .* no C\+\+ compiler \(gone\)"),
    ("auto", "false", r"deformable attention on cpu runs without .* compiling failed: "),
    ("torch", "gone", None),
])
def test_without_a_compiler_one_warning_and_the_torch_path(first_use, tmp_path, choice, compiler, message):
    first_use.setenv("CXX", compiler)
    first_use.setenv("MSDA", choice)
    value, *others = random_case([(3, 4)])
    with warnings.catch_warnings(record=True, action="always") as caught:
        outputs = [ms_deform_attn(value, [(3, 4)], *others) for _ in range(2)]
    assert len(caught) == bool(message) and all(re.match(message, str(warning.message)) for warning in caught)
    assert active_path("cpu") == "torch" and not list(tmp_path.rglob("*.so"))
    assert all(output.equal(ms_deform_attn_torch(value, [(3, 4)], *others)) for output in outputs)


@pytest.mark.parametrize("choice, message", [("native", "for cpu: no C.. compiler"), ("fast", "choose auto,")])
def test_a_choice_that_cannot_be(first_use, choice, message):
    first_use.setenv("CXX", "gone")
    first_use.setenv("MSDA", choice)
    with pytest.raises(UserError, match=f"MSDA={choice}.* {message}"):
        active_path("cpu")


def test_commands(native, first_use, capsys):
    """`python -m msda_cuda` passes its self-test; `python msda_cuda/build.py` that fails says so in one line."""
    first_use.setattr(sys, "argv", ["msda_cuda/build.py", "--quiet"])
    first_use.setenv("CXX", "gone")
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "msda_cuda" / "build.py"), run_name="__main__")
    assert capsys.readouterr().err == "error: no C++ compiler (gone) was found; install g++ or set CXX\n"
    first_use.undo()  # the operator that is built already
    first_use.setattr(sys, "argv", ["msda_cuda"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("msda_cuda", run_name="__main__")
    output = capsys.readouterr().out
    assert output.count("cpu: native") == 3 and output.count("passed") == 3


@pytest.fixture
def compiled(first_use):
    """The libraries that were compiled, by a compile_library that takes a moment and compiles nothing."""
    compiled = []

    def compile_library(here, path, archs, verbose):
        time.sleep(0.3)
        compiled.append(path)
        path.write_bytes(b"")

    first_use.setattr(build, "compile_library", compile_library)
    return compiled


def test_simultaneous_first_uses_build_once(compiled):
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: build.library(), range(3)))
    assert len(compiled) == 1 and paths == compiled * 3


def test_a_lock_that_is_never_freed_is_named(tmp_path):
    path = tmp_path / "op.lock"
    with build.lock(path, 1), pytest.raises(build.BuildError, match=f"has held {path} for 0 s"), build.lock(path, 0.3):
        pass
    with build.lock(path, 0.3):  # freed: taken at once, though the file is still there
        assert path.exists()


def test_read_only_cache_builds_elsewhere(compiled, tmp_path):
    (tmp_path / "msda").write_text("a file where the folder should be: nobody can write below it")
    path = build.library()
    assert path.parent.parent == tmp_path / "temporary" and compiled == [path]
    (tmp_path / "temporary").rename(tmp_path / "gone")
    (tmp_path / "temporary").write_text("")
    with pytest.raises(build.BuildError, match="no writable cache in .* set TORCH_EXTENSIONS_DIR"):
        build.library()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_code_of_other_users_is_not_loaded(compiled, tmp_path):
    path = build.library()
    os.chown(path, 12345, -1)
    assert build.library() == path and compiled == [path, path]  # compiled anew in its place
    os.chown(path.parent, 12345, -1)
    assert build.library().parent.parent == tmp_path / "temporary"


def test_ninja_of_an_environment_that_is_not_activated(tmp_path, monkeypatch):
    """`.venv/bin/python msda_cuda/build.py`: ninja lies beside python, and PATH does not name that folder."""
    ninja, paths = tmp_path / "bin" / "ninja", []
    ninja.parent.mkdir()
    monkeypatch.setattr(sys, "executable", str(ninja.with_name("python")))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/sh")

    def load(name, sources, build_directory, **_):
        paths.append(os.environ["PATH"])
        (Path(build_directory) / f"{name}.so").touch()

    monkeypatch.setattr(cpp_extension, "load", load)
    arguments = build.Plan("op", None, "no GPU"), tmp_path / "op.so", "8.0", False
    with pytest.raises(build.BuildError, match="pip install ninja"):
        build.compile_library(*arguments)
    ninja.write_text("#!/bin/sh\necho 1.11\n")
    ninja.chmod(0o755)
    build.compile_library(*arguments)
    assert (tmp_path / "op.so").exists() and paths == [f"{ninja.parent}{os.pathsep}{tmp_path}"]
    assert os.environ["PATH"] == str(tmp_path)


COMPLAINTS = {  # the text of PyTorch's error -> what is shown of it
    "Error building extension 'op': [1/2] c++ -o op.o\nFAILED: op.o\nmsda.cpp:3:1: fatal error: a.h: No such file\n":
        "msda.cpp:3:1: fatal error: a.h: No such file",
    "Error building extension 'op': [1/2] nvcc -o k.o\nnvcc fatal   : Unsupported gpu architecture 'compute_99'":
        "nvcc fatal   : Unsupported gpu architecture 'compute_99'",
    "Error building extension 'op': [2/2] c++ -shared\n/usr/bin/ld: cannot find -lcudart: No such file\n":
        "/usr/bin/ld: cannot find -lcudart: No such file",
    "Error building extension 'op': c++\nmsda.o: in function `f':\nmsda.cpp: undefined reference to `g'\nexit 1":
        "msda.cpp: undefined reference to `g'",
    "[Errno 28] No space left on device": "[Errno 28] No space left on device",
    "Unknown CUDA arch (99.9) or GPU not supported\nmore": "Unknown CUDA arch (99.9) or GPU not supported",
}


@pytest.mark.parametrize("text", COMPLAINTS)
def test_a_failed_build_is_remembered_with_its_reason(first_use, tmp_path, text):
    """Later processes do not try again, until compiler or toolkit is another one or a user builds ahead of time."""
    tries = []

    def load(name, sources, build_directory, **_):
        tries.append(name)
        if os.environ["CXX"] == "sh":
            raise ValueError(text)
        (Path(build_directory) / f"{name}.so").touch()

    first_use.setattr(cpp_extension, "load", load)
    first_use.setenv("CXX", "sh")
    for _ in range(3):
        with pytest.raises(build.BuildError, match=f"compiling failed: {re.escape(COMPLAINTS[text])}; `python msda_cu"):
            build.library()
    assert len(tries) == 1
    with pytest.raises(build.BuildError):
        build.library(ahead=True)
    assert len(tries) == 2
    first_use.setenv("CXX", "cat")
    assert build.library().exists() and len(tries) == 3
    assert not list(tmp_path.rglob("*.failed"))


def test_one_process_of_a_machine_warns(first_use, recwarn):
    first_use.setenv("CXX", "gone")
    first_use.setenv("LOCAL_RANK", "1")
    assert active_path("cpu") == "torch" and not recwarn


def test_the_toolkit_that_pip_installs(first_use, tmp_path):
    """It is found in site-packages, and its libcudart.so.13 has the linker's name in the folder of the build."""
    home, linked = tmp_path / "site-packages" / "nvidia" / "cu13", []
    for name in ("bin/nvcc", "include/cuda.h", "lib/libcudart.so.13"):
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text("#define CUDA_VERSION 13000\n")

    def load(name, sources, build_directory, extra_ldflags, **_):
        linked.append((Path(build_directory, "libcudart.so").resolve(), f"-L{build_directory}" in extra_ldflags))
        (Path(build_directory) / f"{name}.so").touch()

    first_use.setattr(torch.version, "cuda", "13.0")
    first_use.setattr(cpp_extension, "load", load)
    exists = Path.exists
    first_use.setattr(Path, "exists", lambda path: "/usr/local" not in str(path) and exists(path))
    for name, value in {"FORCE_CUDA": "1", "PATH": "", "TORCH_CUDA_ARCH_LIST": "9.0", "CXX": "/bin/sh"}.items():
        first_use.setenv(name, value)
    first_use.delenv("CUDA_HOME", raising=False)
    assert '13 on, pip install "cuda-toolkit[nvcc,cccl]==13.0.*"' in build.plan().no_cuda
    first_use.syspath_prepend(str(home.parents[1]))
    assert build.plan()[1:] == (home, "")
    build.library()
    assert linked == [(home / "lib" / "libcudart.so.13", True)]


def test_what_is_built_follows_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    assert build.plan().name.startswith("msda_cpu_") and "FORCE_CUDA=1" in build.plan().no_cuda
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setattr(build, "Path", lambda path: Path(str(path).replace("/usr/local/cuda", "/absent")))
    for name in ("bin/nvcc", "include/cuda.h"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("#define CUDA_VERSION 12040\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert "CUDA 13.0 was found; set CUDA_HOME" in build.plan().no_cuda  # 12.4 is no 13
    (tmp_path / "include/cuda.h").write_text("#define CUDA_VERSION 13020\n")
    assert build.plan()[1:] == (tmp_path, "") and build.plan().name.startswith("msda_cuda_")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in build.plan().no_cuda
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build.architectures(ahead=True) == "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert build.architectures(ahead=True) == build.architectures(ahead=False) == "9.0"
