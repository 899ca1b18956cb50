"""Deformable attention: values -> as PyTorch's operator -> the layer -> build and fallback.

The reference is compared with golden numbers and with transformers, the native CPU operator with the reference.
"""

import functools
import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 6e4, -1e-7])
@pytest.mark.parametrize("argument", [0, 2])
def test_bad_values_and_weights_spread_as_in_the_reference(native, argument, bad, dtype):
    case = random_case(MAPS, dtype=dtype)
    case[argument][0, 1] = bad
    for got, want in zip(run(native, MAPS, *case), run(ms_deform_attn_torch, MAPS, *case), strict=True):
        finite = want.isfinite()
        assert got.isfinite().equal(finite) and got.dtype == want.dtype
        torch.testing.assert_close(got[finite], want[finite], rtol=2e-2, atol=6 if bad == 6e4 else 1e-4)


@pytest.mark.parametrize("empty", ["B", "Q", "M", "D", "P"])
def test_nothing_to_read_or_to_ask(native, empty):
    case = random_case([(1, 1)], **{empty: 0})
    assert_same(run(native, [(1, 1)], *case), reference([(1, 1)], *case), 0)


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


def jvp(case, i):
    return torch.func.jvp(lambda x: ms_deform_attn(*case[:i], x, *case[i + 1:]), (case[i],), (case[i],))


def forward_ad(case, i):
    with torch.autograd.forward_ad.dual_level():
        return ms_deform_attn(*case[:i], torch.autograd.forward_ad.make_dual(case[i], case[i]), *case[i + 1:])


@pytest.mark.parametrize("argument", [0, 2, 3])
@pytest.mark.parametrize("differentiate", [jvp, forward_ad])
@pytest.mark.parametrize("gradient", [True, False])
def test_no_forward_mode_derivative(native, differentiate, argument, gradient):
    """PyTorch's default for an operator would be a silent zero."""
    value, _, *others = operator_inputs(requires_grad=gradient)
    with pytest.raises(NotImplementedError, match="forward-mode derivatives are not implemented"):
        differentiate((value, LEVELS, *others), argument)


@pytest.mark.parametrize("transform", [torch.func.hessian, lambda f: torch.func.grad(torch.func.grad(f))])
def test_functional_derivatives_are_refused_where_they_would_be_wrong(native, transform):
    value, _, *others = operator_inputs(requires_grad=False)
    with pytest.raises(RuntimeError, match="setup_context|not implemented"):
        transform(lambda x: native(x, LEVELS, *others).square().sum())(value)


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
    first_use.setattr(sys, "argv", ["msda_cuda/build.py"])
    first_use.setenv("CXX", "gone")
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "msda_cuda" / "build.py"), run_name="__main__")
    assert capsys.readouterr().err == "error: no C++ compiler (gone) was found; install g++ or set CXX\n"
    for choice, fault in {"native": "MSDA=native, but there is no operator for cpu: no C++ compiler (gone)",
                          "fast": "MSDA=fast is unknown; choose auto, native or torch"}.items():
        first_use.setenv("MSDA", choice)
        ops.native.cache_clear()
        with pytest.raises(SystemExit, match="2"):
            first_use.setattr(sys, "argv", ["msda_cuda"])
            runpy.run_module("msda_cuda", run_name="__main__")
        output = capsys.readouterr().err
        assert output.startswith(f"error: {fault}") and output.count("\n") == 1
    first_use.undo()  # the operator that is built already
    first_use.setattr(sys, "argv", ["msda_cuda"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("msda_cuda", run_name="__main__")
    output = capsys.readouterr().out
    assert output.count("cpu: native") == 3 and output.count("passed") == 3
    assert f"CUDA toolkit: {build.find_cuda_home() or 'none'}\n" in output


def test_interrupting_a_build_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["msda_cuda/build.py"])
    monkeypatch.setattr(msda_cuda.cache, "private_folder", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match="130"):
        runpy.run_path(str(ROOT / "msda_cuda" / "build.py"), run_name="__main__")
    assert capsys.readouterr().err == "error: interrupted\n"


FAILURES = {  # what a compiler writes -> the line that is shown
    "In file included from a.h:1,\na.cpp:3:10: fatal error: nv/target: No such file\ncompilation terminated.": 1,
    "a.cu(1): warning #177-D: unused\na.cu(2): error: identifier is undefined\n1 error detected in a.cu.": 1,
    "nvcc fatal   : Unsupported gpu architecture 'compute_30'": 0,
    "ld: a.o: in function f:\na.cpp:7: undefined reference to `g'\ncollect2: error: ld returned 1 exit status": 1,
    "ld: cannot find -lcudart: No such file\ncollect2: error: ld returned 1 exit status": 0,
    "as: final close failed: No space left on device": 0,
    "/bin/sh: 1: cc1plus: Permission denied": 0,
}


@pytest.fixture
def write_compiler(first_use, tmp_path):
    """write_compiler(output, name) -> a program that logs each compilation, writes the output and fails."""
    def write(output="a.cpp:1: error: it failed", name="c++"):
        script, log = tmp_path / name, tmp_path / "log"
        log.touch()
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\necho \"$*\" | grep -e '-c ' >> {log} || exit 0\n"
                          f"cat <<'END'\n{output}\nEND\nsleep 0.2; exit 1\n")
        script.chmod(0o755)
        first_use.setenv("CXX", str(script))
        return log

    first_use.delenv("FORCE_CUDA", raising=False)
    first_use.setattr(torch.cuda, "is_available", lambda: False)
    first_use.setenv("MSDA", "auto")
    return write


@pytest.mark.parametrize("output", FAILURES)
def test_a_failed_build_shows_the_compilers_first_complaint(write_compiler, output):
    write_compiler(output)
    line = output.splitlines()[FAILURES[output]]
    with pytest.raises(build.BuildError, match=f"^compiling failed: {re.escape(line)}; `python msda_cuda/build.py`"):
        build.library()


def test_a_complaint_of_nvcc(write_compiler, first_use, tmp_path):
    write_compiler("nvcc fatal   : Unsupported gpu architecture", "bin/nvcc")
    (tmp_path / "include").mkdir()
    (tmp_path / "include/cuda.h").write_text("#define CUDA_VERSION 13000\n")
    for name, value in {"CXX": "true", "CUDA_HOME": str(tmp_path), "FORCE_CUDA": "1"}.items():
        first_use.setenv(name, value)
    first_use.setattr(torch.version, "cuda", "13.0")
    for name, reason in {"9.0": "nvcc fatal   : Unsupported gpu", "Future": r"Unknown CUDA arch \(Future\)"}.items():
        first_use.setenv("TORCH_CUDA_ARCH_LIST", name)
        with pytest.raises(build.BuildError, match=f"^compiling failed: {reason}"):
            build.library()
    assert [path.name[-7:] for path in tmp_path.rglob("*.failed")] == [".failed"]  # the wrong name costs nothing


def test_a_failed_build_is_remembered_until_a_compiler_changes(write_compiler, first_use, tmp_path, capsys):
    log, reasons = write_compiler(), []
    for _ in range(3):
        with pytest.raises(build.BuildError) as caught:
            build.library()
        reasons.append(str(caught.value))
    assert len(log.read_text().splitlines()) == 1 and len(set(reasons)) == 1
    assert capsys.readouterr().err.count("Building") == 1
    for _ in range(2):  # ahead of time, as `python msda_cuda/build.py` does: always
        with pytest.raises(build.BuildError):
            build.library(ahead=True)
    assert len(log.read_text().splitlines()) == 3
    write_compiler("a.cpp:1: error: another reason")
    with pytest.raises(build.BuildError, match="another reason"):
        build.library()
    assert len(log.read_text().splitlines()) == 4

    first_use.setattr(cpp_extension, "load", lambda name, *_, build_directory, **__:
                      (Path(build_directory) / f"{name}.so").touch())
    with pytest.raises(build.BuildError, match="another reason"):
        build.library()
    path = build.library(ahead=True)
    assert not list(tmp_path.rglob("*.failed")) and build.library() == path


@pytest.mark.parametrize("error", [ValueError("wrong name"), OSError(28, "No space left on device"),
                                   RuntimeError("Error building\nninja: build stopped: interrupted by user."),
                                   RuntimeError("Error building\ng++: fatal error: Killed signal terminated cc1plus")])
def test_what_passes_is_not_remembered(write_compiler, first_use, tmp_path, error):
    def load(*_, **__):
        raise error

    write_compiler()
    first_use.setattr(cpp_extension, "load", load)
    with pytest.raises(build.BuildError, match=f"compiling failed: .*{str(error).splitlines()[-1][-20:-1]}"):
        build.library()
    assert not list(tmp_path.rglob("*.failed"))


def test_processes_of_one_machine_try_once_and_warn_once(write_compiler, first_use, tmp_path):
    """Two processes start together as torchrun starts them: one compilation, one "Building" line, one warning."""
    log, code = write_compiler(), "from msda_cuda import active_path; print(active_path('cpu'))"
    first_use.setenv("TMPDIR", str(tmp_path))  # no library that lies in another
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "LOCAL_RANK": str(rank)},
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    outputs, errors = zip(*(process.communicate() for process in processes), strict=True)
    assert outputs == ("torch\n", "torch\n") and len(log.read_text().splitlines()) == 1
    assert "".join(errors).count("Building deformable attention") == 1
    assert errors[0].count("it failed; `python msda_cuda/build.py` tries again") == 1 and "it failed" not in errors[1]


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


@pytest.mark.parametrize("text, words", [
    ("'{}' c++ '-D X'", ["c++", "-D X"]), ("  '{}'  ", []), ("{}", []),  # a path with a blank may stand unquoted
])
@pytest.mark.parametrize("variable", ["CXX", "CC"])
def test_a_compiler_of_several_words(first_use, tmp_path, variable, text, words):
    """CXX="ccache c++": PyTorch gets one program, which calls the words with what PyTorch adds."""
    wrapper, seen = tmp_path / "my tools" / "ccache", []
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\nprintf '%s|' \"$@\"\n")
    wrapper.chmod(0o755)
    first_use.setenv("CXX", "/bin/sh")
    first_use.setenv(variable, text.format(wrapper))

    def load(name, *_, build_directory, **__):
        seen.append(subprocess.check_output([os.environ[variable], "a b", "$c"], text=True).split("|")[:-1])
        (Path(build_directory) / f"{name}.so").touch()

    first_use.setattr(cpp_extension, "load", load)
    first_use.setattr(cpp_extension, "is_ninja_available", lambda: True)
    assert build.library().exists() and seen == [[*words, "a b", "$c"]]
    assert os.environ[variable] == text.format(wrapper)
    tools = build.toolchain(None)
    assert f"{wrapper}:{wrapper.stat().st_mtime_ns}" in tools
    assert not words or os.path.realpath(shutil.which("c++") or "") in tools


@pytest.mark.parametrize("text, message", [
    ("'c++", r"CXX='c\+\+ cannot be read \(No closing quotation\); mend it or unset it"),
    ("gone c++", r"no C\+\+ compiler \(gone\) was found; install g\+\+ or set CXX"), ("", r"no C\+\+ compiler \(\)"),
])
def test_a_compiler_that_cannot_be(first_use, text, message):
    first_use.setenv("CXX", text)
    with pytest.raises(build.BuildError, match=f"^{message}"):
        build.library()


def test_toolkit_of_pip(monkeypatch, tmp_path):
    """site-packages/nvidia holds compiler, headers and a runtime without the name that the linker looks for."""
    home, seen = tmp_path / "site-packages" / "nvidia" / "cu13", []
    for name in ("bin/nvcc", "include/cuda.h", "lib/libcudart.so.13"):
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text("#define CUDA_VERSION 13000\n")
    before = sorted(home.rglob("*"))
    for name, value in {"PATH": "", "CXX": "/bin/sh", "CUDA_HOME": "", "FORCE_CUDA": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.syspath_prepend(home.parents[1])
    monkeypatch.setattr(build, "Path", lambda path: Path(str(path).replace("/usr/local/cuda", "/absent")))
    here = build.plan()
    assert here.cuda_home == home and not here.no_cuda

    def load(name, sources, build_directory, extra_ldflags, **_):
        seen.append((cpp_extension.CUDA_HOME, (Path(build_directory) / "libcudart.so").resolve()))
        assert f"-L{build_directory}" in extra_ldflags and sources[-1].endswith("kernels.cu")
        (Path(build_directory) / f"{name}.so").touch()

    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    build.compile_library(here, tmp_path / "op.so", "9.0", False)
    assert seen == [(str(home), home / "lib/libcudart.so.13")] and sorted(home.rglob("*")) == before
    monkeypatch.setattr(torch.version, "cuda", "12.8")  # pip's wheels of 12 have no nvcc
    assert "CUDA 12.8 was found; install one or set CUDA_HOME" in build.plan().no_cuda


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
    monkeypatch.setattr(sys, "path", [])
    remedy = 'CUDA 13.0 was found; pip install "cuda-toolkit[nvcc,cccl]==13.0.*" or set CUDA_HOME'
    assert remedy in build.plan().no_cuda  # 12.4 is no 13
    (tmp_path / "include/cuda.h").write_text("#define CUDA_VERSION 13020\n")
    assert build.plan()[1:] == (tmp_path, "") and build.plan().name.startswith("msda_cuda_")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in build.plan().no_cuda
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build.architectures(ahead=True) == "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert build.architectures(ahead=True) == build.architectures(ahead=False) == "9.0"
