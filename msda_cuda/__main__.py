"""`python -m msda_cuda`: which path deformable attention takes here, why, and a self-test of it."""

import argparse
import os
import sys

import torch

from . import build, ops
from .reference import ms_deform_attn_torch

SHAPES = [(12, 9), (6, 5), (1, 1)]


def self_test(device: str, dtype: torch.dtype) -> float:
    """Largest error of output and gradients against the float64 reference, relative to the largest entry."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 139, 4, 32, generator=generator).to(device, dtype)
    locations = (torch.rand(2, 37, 4, 3, 4, 2, generator=generator) * 1.4 - 0.2).to(device)  # some off the map
    weights = torch.rand(2, 37, 4, 3, 4, generator=generator).to(device)
    cotangent = torch.randn(2, 37, 128, generator=generator).to(device, dtype)

    def run(function, *inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        output = function(inputs[0], SHAPES, *inputs[1:])
        return [output, *torch.autograd.grad(output, inputs, cotangent.to(output.dtype))]

    got = run(ops.ms_deform_attn, value, locations, weights)
    want = run(ms_deform_attn_torch, value.double(), locations.double(), weights.double())
    return max(((g.double() - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True))


def main() -> int:
    """Say what is active, and compare it with the reference; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m msda_cuda", description=__doc__)
    parser.parse_args()
    try:
        operator = ops.native()
        paths = {device: ops.active_path(device) for device in ["cpu"] + ["cuda"] * torch.cuda.is_available()}
    except (build.BuildError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"MSDA={os.environ.get('MSDA', 'auto')}, PyTorch {torch.__version__}")
    print(f"library: {operator.library or 'none'}" + (f" ({operator.reason})" if operator.reason else ""))
    passed = True
    for device, path in paths.items():
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
            error = self_test(device, dtype)
            passed &= error < limit
            verdict = "passed" if error < limit else "FAILED"
            print(f"{device}: {path}, {str(dtype)[6:]}: {verdict}, error {error:.1e} (limit {limit:.0e})")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
