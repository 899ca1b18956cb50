"""sync_batchnorm.py: two gloo processes against plain batch norm of all images at once."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from run import leave_processes
from sync_batchnorm import convert_sync_batchnorm, global_moments

CHANNELS = 5
SHARES = ([2, 2], [1, 3], [0, 2])  # images of each process


def two_processes(folder: Path, work: Callable, *arguments) -> list:
    """What work(rank, *arguments) returns in each of two processes that gloo joins; the folder is for exchange."""
    (folder / "store").unlink(missing_ok=True)  # of another call
    mp.spawn(joined, (folder, work, arguments), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def joined(rank: int, folder: Path, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(work(rank, *arguments), folder / f"{rank}.pt")
    leave_processes()


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, CHANNELS, 4, 6, generator=generator, dtype=torch.float64) * 3 + 2


def step(layer: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """One training pass; `weights` make the gradient differ from pixel to pixel."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (weights * y.sin()).sum().backward()
    state = layer.state_dict()
    grads = {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    return {"y": y.detach(), **grads, **{f"state.{name}": value for name, value in state.items()}}


def started(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        layer.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    return layer


class MapTypes(TorchDispatchMode):
    """The types of all maps (B, C, h, w) that PyTorch's operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.types |= {x.dtype for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.dim() == 4}
        return result


def far() -> torch.Tensor:
    """Images in float32 whose mean is 10,000 times their spread: E[x^2] - E[x]^2 would be 0 or worse."""
    return (1e4 + torch.linspace(-1, 1, 2 * CHANNELS * 100).view(2, CHANNELS, 10, 10)).float()


def worker(rank: int) -> list[dict]:
    """A training pass over this process's share of the images, for each of SHARES."""
    results = []
    for shares in SHARES:
        everything = images(sum(shares))
        mine = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
        layer = convert_sync_batchnorm(started(nn.BatchNorm2d(CHANNELS, dtype=torch.float64)))
        half = convert_sync_batchnorm(started(nn.BatchNorm2d(CHANNELS)))  # maps in half precision, weights in float32
        results.append(step(layer, everything[mine], everything.cos()[mine]))
        x, weights = everything[mine].bfloat16(), everything.cos()[mine].bfloat16()
        with MapTypes() as made:
            results[-1]["half"] = step(half, x, weights)
        results[-1]["types of maps"] = made.types
    results[0]["far"] = global_moments(far()[rank : rank + 1])[1]
    return results


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return two_processes(tmp_path_factory.mktemp("pair"), worker)


@pytest.mark.parametrize("case", range(len(SHARES)), ids=str)
def test_two_processes_are_one_batch(pair, case):
    shares, (first, second) = SHARES[case], (results[case] for results in pair)
    everything = images(sum(shares))
    expected = step(started(nn.BatchNorm2d(CHANNELS, dtype=torch.float64)), everything, everything.cos())
    same_to_rounding = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    for name in ("y", "x"):
        same_to_rounding(torch.cat([first[name], second[name]]), expected[name])
    for name in ("weight", "bias"):  # each process keeps its share; DDP averages them
        same_to_rounding(first[name] + second[name], expected[name])
    for name in [name for name in expected if name.startswith("state.")]:
        same_to_rounding(first[name], expected[name])
        assert torch.equal(first[name], second[name])  # bit for bit: DDP need not broadcast the buffers
    assert expected["state.num_batches_tracked"] == 1


@pytest.mark.parametrize("case", range(len(SHARES)), ids=str)
def test_maps_in_half_precision_stay_so_and_sums_are_in_float32(pair, case):
    """The same step as in float32, forward and backward, to the rounding of maps; moments and sums have none."""
    everything = images(sum(SHARES[case])).bfloat16()
    weights = images(sum(SHARES[case])).cos().bfloat16()
    plain, x = started(nn.BatchNorm2d(CHANNELS)), everything.float().requires_grad_()
    y = plain(x)
    y.backward((weights * y.bfloat16().cos()).float())  # the gradient that reaches the layer in half precision
    first, second = (results[case]["half"] for results in pair)
    for name, expected in (("y", y.detach()), ("x", x.grad)):
        found = torch.cat([first[name], second[name]])
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(first[f"state.{name}"], plain.state_dict()[name], rtol=1e-5, atol=1e-5)
    for name in ("weight", "bias"):
        expected = getattr(plain, name).grad
        torch.testing.assert_close(first[name] + second[name], expected, rtol=1e-2, atol=2e-2)
    for results in pair:
        assert results[case]["types of maps"] == {torch.bfloat16}


def test_variance_of_a_channel_with_a_large_mean(pair):
    expected = far().double().var((0, 2, 3), correction=0).float()
    torch.testing.assert_close(pair[0][0]["far"], expected, rtol=1e-3, atol=0)


def test_without_other_processes_it_is_plain_batch_norm():
    x = images(3)
    plain, ours = (started(nn.BatchNorm2d(CHANNELS, dtype=torch.float64)) for _ in range(2))
    torch.testing.assert_close(step(convert_sync_batchnorm(ours), x, x), step(plain, x, x), rtol=0, atol=0)
    assert torch.equal(plain.eval()(x), ours.eval()(x))
