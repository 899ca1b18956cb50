"""Deformable attention: the reference against golden numbers, the native CPU operator against the reference."""

import itertools
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import msda_cuda
from msda_cuda import MSDeformAttn, build, ms_deform_attn, ms_deform_attn_torch, ops
from msda_cuda.module import locate, softmax

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def native():
    """The native operator, or a skip that says why there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = msda_cuda.active_path("cpu")
    if path != "native":
        pytest.skip(f"no native operator here: {ops.native().reason}")
    return ms_deform_attn


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(array) for key, array in file.items()}
    return [tuple(shape) for shape in arrays.pop("shapes").tolist()], arrays


def random_case(shapes, B=2, Q=5, M=2, D=32, P=3, seed=0, dtype=torch.float64):
    """Values, and points of which a quarter lie off the map."""
    g = torch.Generator().manual_seed(seed)
    S, L = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(B, S, M, D, generator=g, dtype=dtype)
    locations = torch.rand(B, Q, M, L, P, 2, generator=g, dtype=dtype) * 1.3 - 0.15
    return value, locations, torch.rand(B, Q, M, L, P, generator=g, dtype=dtype)


def run(function, shapes, value, locations, weights, cotangent=None):
    """Output and the three gradients."""
    inputs = [x.detach().clone().requires_grad_() for x in (value, locations, weights)]
    output = function(inputs[0], shapes, inputs[1], inputs[2])
    cotangent = torch.cos(torch.arange(output.numel())).view(output.shape) if cotangent is None else cotangent
    return output, *torch.autograd.grad(output, inputs, cotangent.to(output.dtype))


def assert_same(got, want, tolerance):
    for g, w, name in zip(got, want, ("output", "grad_value", "grad_locations", "grad_weights"), strict=True):
        assert g.shape == w.shape, name
        if g.numel():
            assert (g.double() - w.double()).abs().max() <= tolerance * max(w.abs().max().item(), 1.0), name


def python(code, *, timeout=120, **environment):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, text=True,
                          capture_output=True, timeout=timeout)


# ---- values

@pytest.mark.parametrize("name", ["msda_a", "msda_b"])
@pytest.mark.parametrize("path", ["torch", "native"])
def test_golden(name, path, request):
    function = ms_deform_attn_torch if path == "torch" else request.getfixturevalue("native")
    shapes, g = golden(name)
    got = run(function, shapes, g["value"], g["locations"], g["weights"], g["cotangent"])
    assert_same(got, (g["out"], g["grad_value"], g["grad_locations"], g["grad_weights"]), 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4),
    B=st.integers(1, 3), Q=st.integers(0, 9), M=st.integers(1, 3), P=st.integers(1, 4), seed=st.integers(0, 99),
    D=st.sampled_from([1, 3, 8, 32, 33]),
)
def test_native_agrees_on_random_shapes(native, shapes, B, Q, M, D, P, seed):
    case = random_case(shapes, B, Q, M, D, P, seed)
    assert_same(run(native, shapes, *case), run(ms_deform_attn_torch, shapes, *case), 1e-12)


def test_points_on_borders_pixels_and_far_outside(native):
    shapes = [(4, 6), (1, 1)]
    places = torch.tensor([-1e30, -50.0, -0.5 / 6, -1e-9, 0.0, 0.5 / 6, 0.5, 1 - 0.5 / 6, 1.0, 1 + 0.5 / 6, 50.0, 1e30])
    points = torch.tensor(list(itertools.product(places.tolist(), repeat=2)), dtype=torch.float64)  # (144, 2)
    value, _, weights = random_case(shapes, B=1, Q=144, M=1, P=1)
    locations = points.view(1, 144, 1, 1, 1, 2).expand(1, 144, 1, 2, 1, 2)
    near = (points.abs() < 10).all(-1)
    got, want = (run(f, shapes, value, locations, weights) for f in (native, ms_deform_attn_torch))
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
    shapes = [(6, 4), (3, 2)]
    value, locations, weights = random_case(shapes, dtype=torch.float32)
    value = value.to(dtype)
    got = run(native, shapes, value, locations, weights)
    assert got[0].dtype == got[1].dtype == dtype and got[2].dtype == got[3].dtype == torch.float32
    assert_same(got, run(ms_deform_attn_torch, shapes, value.double(), locations.double(), weights.double()), tolerance)


def test_non_contiguous_input(native):
    shapes = [(6, 4), (3, 2)]
    value, locations, weights = random_case(shapes)
    strided = (value.transpose(1, 2).contiguous().transpose(1, 2), locations.flip(-1).flip(-1).mT.contiguous().mT,
               weights.mT.contiguous().mT)
    assert not any(x.is_contiguous() for x in (strided[0], strided[1], strided[2]))
    cotangent = torch.randn(64, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    got = native(*(strided[0], shapes, *strided[1:]))
    assert torch.equal(got, native(value, shapes, locations, weights))
    assert_same(run(native, shapes, *strided, cotangent), run(ms_deform_attn_torch, shapes, value, locations, weights,
                                                               cotangent), 1e-12)


def test_one_result_for_any_number_of_threads(native):
    shapes, case = [(9, 7), (5, 3)], random_case([(9, 7), (5, 3)], Q=41, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(native, shapes, *case))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_agrees_with_transformers():
    module = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    shapes = [(6, 4), (3, 2)]
    value, locations, weights = random_case(shapes)
    theirs = module.MultiScaleDeformableAttention()(value, torch.tensor(shapes), shapes, None, locations, weights, 64)
    torch.testing.assert_close(ms_deform_attn_torch(value, shapes, locations, weights), theirs, rtol=0, atol=1e-12)


# ---- as PyTorch's operator

def operator_inputs(requires_grad=True, dtype=torch.float64):
    value, locations, weights = random_case([(3, 4), (2, 1)], Q=3, M=2, D=4, P=2, dtype=dtype)
    value, locations, weights = (x.requires_grad_(requires_grad) for x in (value, locations, weights))
    return value, [3, 4, 2, 1], locations, weights


def test_opcheck(native):
    torch.library.opcheck(torch.ops.msda.forward, operator_inputs())
    torch.library.opcheck(torch.ops.msda.forward, operator_inputs(dtype=torch.float32))
    inputs = operator_inputs(requires_grad=False)
    torch.library.opcheck(torch.ops.msda.backward, (torch.ones(2, 3, 8, dtype=torch.float64), *inputs))


def test_gradcheck_and_no_second_derivative(native):
    value, flat, locations, weights = operator_inputs()
    assert torch.autograd.gradcheck(lambda v, loc, w: torch.ops.msda.forward(v, flat, loc, w),
                                    (value, locations, weights), atol=1e-6)
    output = native(value, [(3, 4), (2, 1)], locations, weights)
    (first,) = torch.autograd.grad(output.square().sum(), value, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        first.sum().backward()


def test_softmax_without_gradient_is_softmax():
    scores = torch.randn(2, 7, 3, 12, dtype=torch.double) * 30
    scores[0, 0, 0] = 1000.0  # its exponential alone would overflow
    with torch.no_grad():
        before = scores.clone()
        torch.testing.assert_close(softmax(scores), scores.softmax(-1), rtol=1e-14, atol=1e-14)
    assert scores.equal(before)


def test_points_are_located_as_the_paper_writes_it():
    """p + offset / (width, height) of the level: bit for bit, broadcast over axes instead of rows."""
    shapes, points = [(4, 3), (2, 5)], torch.rand(7, 2)
    offsets = torch.randn(2, 7, 3, 2, 4, 2)  # (B, Q, M, L, P, 2)
    sizes = torch.tensor([(w, h) for h, w in shapes])
    expected = points[:, None, None, None] + offsets / sizes[:, None]
    assert locate(points, offsets, shapes).equal(expected)


@pytest.mark.parametrize("size", [((4, 3), (2, 2)), ((5, 5), (3, 1))])
def test_compile_in_one_graph(native, size):
    shapes = list(size)
    layer = MSDeformAttn(32, 4, 2, 3, 0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    S = sum(h * w for h, w in shapes)
    query, value = torch.randn(2, 7, 32), torch.randn(2, S, 32)
    reference = torch.rand(7, 2)
    expected = layer(query, reference, value, shapes)
    output = compiled(query, reference, value, shapes)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), layer.value_proj.weight),
                               torch.autograd.grad(expected.sum(), layer.value_proj.weight))


def test_export(native):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = MSDeformAttn(16, 2, 1, 2)

        def forward(self, query, reference, value):
            return self.layer(query, reference, value, [(3, 4)])

    model, inputs = Wrapped(), (torch.randn(2, 5, 16), torch.rand(5, 2), torch.randn(2, 12, 16))
    program = torch.export.export(model, inputs)
    assert any("msda.forward" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), model(*inputs))


def test_autocast_keeps_locations_in_float32(native):
    value, locations, weights = random_case([(6, 4)], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = native(value, [(6, 4)], locations, weights.bfloat16())
    want = ms_deform_attn_torch(value.bfloat16(), [(6, 4)], locations, weights.bfloat16())
    assert got.dtype == torch.bfloat16 and torch.equal(got, want) or (got - want).abs().max() <= 2**-7
    layer = MSDeformAttn(16, 2, 1, 2)
    seen = {}

    def spy(value, shapes, locations, weights):
        seen.update(value=value.dtype, locations=locations.dtype, weights=weights.dtype)
        return ms_deform_attn_torch(value, shapes, locations, weights)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(msda_cuda.module, "ms_deform_attn", spy)
        layer(torch.randn(1, 5, 16), torch.rand(5, 2), torch.randn(1, 12, 16), [(3, 4)])
    assert seen == {"value": torch.bfloat16, "locations": torch.float32, "weights": torch.float32}


def test_fake_tensors_have_the_right_shape(native):
    with torch.device("meta"):
        out = native(torch.empty(2, 12, 3, 32), [(3, 4)], torch.empty(2, 7, 3, 1, 4, 2), torch.empty(2, 7, 3, 1, 4))
    assert out.shape == (2, 7, 96) and out.is_meta


def test_memory_kept_for_backward(native):
    """The pixel decoder's layer, on smaller maps: the reference keeps the samples, the operator only its inputs."""
    shapes = [(4, 4), (8, 8), (16, 16)]
    value, locations, weights = random_case(shapes, B=1, Q=336, M=8, D=32, P=4, dtype=torch.float32)

    def kept(function):
        sizes = {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        inputs = [x.clone().requires_grad_() for x in (value, locations, weights)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = function(inputs[0], shapes, *inputs[1:])  # noqa: F841  kept alive
        return sum(sizes.values())

    assert kept(native) == 4 * (value.numel() + locations.numel() + weights.numel())
    assert kept(native) * 6 <= kept(ms_deform_attn_torch)


@pytest.mark.parametrize("change, message", [
    ({"shapes": [(3, 4), (2, 2)]}, "hold 16 positions, value has 14"),
    ({"weights": torch.ones(2, 3, 2, 2, 5)}, "weights .2, 3, 2, 2, 5. do not fit"),
    ({"locations": torch.ones(2, 4, 2, 2, 2, 2)}, "do not fit value"),
])
def test_sizes_that_do_not_fit(change, message):
    value, _, locations, weights = operator_inputs()
    arguments = {"value": value, "shapes": [(3, 4), (2, 1)], "locations": locations, "weights": weights, **change}
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(**arguments)


@pytest.mark.parametrize("flat", [[3, 4], [3, 4, 2, 2], [3, 4, 2, -1], [3, 4, 2], [1, 1] * 17])
def test_the_operator_itself_trusts_no_sizes(native, flat):
    value, _, locations, weights = operator_inputs(requires_grad=False)
    with pytest.raises(RuntimeError, match="ms_deform_attn"):
        torch.ops.msda.forward(value, flat, locations, weights)


def test_the_operator_itself_trusts_no_types(native):
    value, flat, locations, weights = operator_inputs(requires_grad=False)
    with pytest.raises(RuntimeError, match="locations and weights must be Double"):
        torch.ops.msda.forward(value, flat, locations.float(), weights)
    with pytest.raises(RuntimeError, match="gradient of shape"):
        torch.ops.msda.backward(torch.ones(2, 3, 7, dtype=torch.float64), value, flat, locations, weights)


# ---- the layer

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
    assert layer.sampling_offsets.weight.abs().sum() == layer.attention_weights.weight.abs().sum() == 0
    assert layer.value_proj.bias.abs().sum() == 0
    assert layer.value_proj.weight.abs().max() <= (6 / (64 + 32)) ** 0.5


def test_layer_by_hand():
    """One head, one point, a bias of one pixel to the right: the output is the neighbour, bilinearly none other."""
    layer = MSDeformAttn(2, 1, 1, 1).double()
    for projection in (layer.value_proj, layer.output_proj):
        torch.nn.init.eye_(projection.weight)
    value = torch.arange(12, dtype=torch.float64).view(1, 6, 2)  # a map of 2 x 3
    centres = torch.tensor([[0.5 / 3, 0.25], [1.5 / 3, 0.75], [2.5 / 3, 0.75]], dtype=torch.float64)
    output = layer(torch.zeros(1, 3, 2, dtype=torch.float64), centres, value, [(2, 3)])
    torch.testing.assert_close(output[0], torch.tensor([[2.0, 3], [10, 11], [0, 0]], dtype=torch.float64))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="30 value channels do not split into 4 heads"):
        MSDeformAttn(60, 4, 1, 4, 0.5)


# ---- build and fallback

CALL = """
import torch, warnings
from msda_cuda import active_path, ms_deform_attn
out = ms_deform_attn(torch.ones(1, 4, 1, 32), [(2, 2)], torch.full((1, 3, 1, 1, 1, 2), .5), torch.ones(1, 3, 1, 1, 1))
ms_deform_attn(torch.ones(1, 4, 1, 32), [(2, 2)], torch.full((1, 3, 1, 1, 1, 2), .5), torch.ones(1, 3, 1, 1, 1))
print(active_path("cpu"), out.sum().item())
"""


@pytest.mark.parametrize("environment, cause", [
    ({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler) was found; install g++ or set CXX"),
    ({"CXX": "false"}, "compiling failed"),
])
def test_without_a_compiler_one_warning_and_the_torch_path(tmp_path, environment, cause):
    done = python(CALL, TORCH_EXTENSIONS_DIR=str(tmp_path), MSDA="auto", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch", "96.0"]
    assert done.stderr.count("UserWarning: deformable attention on cpu runs without") == 1 and cause in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_forced_paths(tmp_path):
    done = python(CALL, TORCH_EXTENSIONS_DIR=str(tmp_path), MSDA="torch")
    assert done.stdout.split() == ["torch", "96.0"] and not list(tmp_path.iterdir()) and "Warning" not in done.stderr
    done = python(CALL, TORCH_EXTENSIONS_DIR=str(tmp_path), MSDA="native", CXX="no-such-compiler")
    assert done.returncode == 1 and "BuildError: MSDA=native" in done.stderr
    done = subprocess.run([sys.executable, "-m", "msda_cuda"], cwd=ROOT, env={**os.environ, "MSDA": "fast"}, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.strip() == "error: MSDA=fast is unknown; choose auto, native or torch"


def test_importing_builds_nothing(tmp_path):
    done = python("import msda_cuda", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert done.returncode == 0 and done.stderr == "" and not list(tmp_path.iterdir())


def test_self_test_passes(native):
    done = subprocess.run([sys.executable, "-m", "msda_cuda"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.count("cpu: native") == 3 and "FAILED" not in done.stdout


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """An empty cache, and compile_library replaced by one that takes a moment and counts."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    built = []

    def compile_library(plan, path, archs, verbose):
        threading.Event().wait(0.3)
        built.append(path)
        path.write_bytes(b"")

    monkeypatch.setattr(build, "compile_library", compile_library)
    return built


def test_simultaneous_first_uses_build_once(fake_compiler):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(build.library())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake_compiler) == 1 and paths == fake_compiler * 3


def test_a_lock_that_is_never_freed_is_named(tmp_path):
    lock = tmp_path / "op.lock"
    refused = pytest.raises(build.BuildError, match=f"has held {lock} for 0 s; end that process or delete the file")
    with build.locked(lock, 1), refused, build.locked(lock, 0.3):
        pass
    with build.locked(lock, 0.3):  # freed: taken at once, though the file is still there
        assert lock.exists()


def test_read_only_cache_builds_elsewhere(fake_compiler, tmp_path, monkeypatch):
    (tmp_path / "msda").write_text("a file where the folder should be: nobody can write below it")
    path = build.library()
    assert path.parent.parent == tmp_path / "temporary" and fake_compiler == [path]
    (tmp_path / "temporary").rename(tmp_path / "gone")
    (tmp_path / "temporary").write_text("")
    with pytest.raises(build.BuildError, match="no writable cache in .* set TORCH_EXTENSIONS_DIR"):
        build.library()


def test_what_is_built_follows_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    assert build.plan().name.startswith("msda_cpu_") and "FORCE_CUDA=1" in build.plan().no_cuda
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setattr(build, "find_cuda_home", lambda: None)
    assert "set CUDA_HOME" in build.plan().no_cuda
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda.h").write_text("#define CUDA_VERSION 12040\n")
    monkeypatch.setattr(build, "find_cuda_home", lambda: tmp_path)
    assert "is CUDA 12.4, PyTorch's is 13.0" in build.plan().no_cuda
    (tmp_path / "include" / "cuda.h").write_text("#define CUDA_VERSION 13020\n")
    assert build.plan().no_cuda == "" and build.plan().name.startswith("msda_cuda_")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in build.plan().no_cuda
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build.architectures(ahead=True) == "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert build.architectures(ahead=True) == build.architectures(ahead=False) == "9.0"
