"""memory.py: what is recomputed changes nothing but the memory; what is freed is used again."""

import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fast.memory import recomputed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fast import memory


class Products(TorchDispatchMode):
    """Counts matrix products and GELUs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", [True, False])
def test_gelu_is_computed_again_and_the_product_is_not(keep):
    torch.manual_seed(0)
    linear, x = nn.Linear(16, 4), torch.randn(8, 16, requires_grad=True)
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        def block(x):
            return linear(F.gelu(x))
        y = block(x) if keep else recomputed(block, x)
    assert x.data_ptr() in kept and len(kept - {x.data_ptr(), linear.weight.data_ptr()}) == (1 if keep else 0)
    with Products() as products:
        gradients = torch.autograd.grad(y.sum(), [x, *linear.parameters()])
    assert (products.names.count("gelu"), products.names.count("addmm")) == ((0, 0) if keep else (1, 0))
    expected = torch.autograd.grad(linear(F.gelu(x)).sum(), [x, *linear.parameters()])
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)


def test_without_gradient_nothing_stands_between():
    with torch.no_grad():
        assert recomputed(lambda x: x + 1, torch.zeros(2)).tolist() == [1, 1]


FAULTS = """
import resource, torch
from fast.memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**20 // 4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
@pytest.mark.parametrize(("keep", "least", "most"), [(True, 0, 500), (False, 10_000, 17_000)])
def test_freed_memory_costs_no_page_faults_when_kept(keep, least, most):
    """After some, a tensor of 64 MiB lies where an earlier one lay; by default always in 16,384 fresh pages of 4 kB."""
    program = FAULTS.format(keep=keep)
    faults = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert least <= faults <= most


def test_keeping_freed_memory_is_harmless_where_the_c_library_cannot(monkeypatch):
    class Bare:
        def __init__(self, _):
            pass

    monkeypatch.setattr(memory.ctypes, "CDLL", Bare)
    assert memory.keep_freed_memory() is None
