"""`python -m msda_cuda`: which path deformable attention takes here, why, and a self-test of it."""

import argparse
import os
import sys

import torch
from torch import Tensor

import common

from . import active_path, build, ms_deform_attn, ms_deform_attn_torch, ops

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of self_test


def self_test(device: str, dtype: torch.dtype) -> float:
    """Largest error of output and gradients against the float64 reference, relative to the largest entry."""
    torch.manual_seed(0)
    value, gradient = torch.randn(2, 139, 4, 32).to(device, dtype), torch.randn(2, 37, 128).to(device, dtype)
    locations = (torch.rand(2, 37, 4, 3, 4, 2) * 1.4 - 0.2).to(device)  # some lie off the map
    weights = torch.rand(2, 37, 4, 3, 4).to(device)

    def results(function, *inputs: Tensor) -> list[Tensor]:
        value, *others = inputs = [x.detach().requires_grad_() for x in inputs]
        output = function(value, [(12, 9), (6, 5), (1, 1)], *others)
        return [output, *torch.autograd.grad(output, inputs, gradient.to(output.dtype))]

    found = results(ms_deform_attn, value, locations, weights)
    expected = results(ms_deform_attn_torch, value.double(), locations.double(), weights.double())
    return max(((x.double() - y).abs().max() / y.abs().max()).item() for x, y in zip(found, expected, strict=True))


def run() -> int:
    """Print what is active, and compare it with the reference; returns the exit status."""
    operator = ops.native()
    print(f"MSDA={os.environ.get('MSDA', 'auto')}, PyTorch {torch.__version__}")
    print(f"CUDA toolkit: {build.find_cuda_home() or 'none'}")
    print(f"library: {operator.library or 'none'}" + (f" ({operator.reason})" if operator.reason else ""))
    failed = False
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for dtype, limit in LIMITS.items():
            error = self_test(device, dtype)
            failed |= not error < limit  # NaN fails too
            print(f"{device}: {active_path(device)}, {str(dtype)[6:]}: {'passed' if error < limit else 'FAILED'}, "
                  f"error {error:.1e} (limit {limit:.0e})")
    return int(failed)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m msda_cuda", description=__doc__).parse_args()
    sys.exit(common.run(run))
