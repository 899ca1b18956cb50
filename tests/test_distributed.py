"""Two processes over gloo are one run: the same step as one process; stopped, resumed and restarted together."""

import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import small
import torch
from test_sync_batchnorm import two_processes
from torch.nn.parallel import DistributedDataParallel

import fast
import run
import train
from data import Batch
from heads import loss_normalizers

CPU = torch.device("cpu")
RUN = (*small.OPTIONS, "--iterations", "4", "--validate-every", "2", "--save-every", "1")
HEADS = ("mask2former", "upernet")
LAYOUTS = {  # processes, images in each at once, accumulation
    "one process": (1, 4, 1), "one process, accumulated": (1, 2, 2),
    "two processes": (2, 2, 1), "two, one image each, accumulated": (2, 1, 2),
}


def fixed_points(*size, **options) -> torch.Tensor:
    """In place of torch.rand: the same points for every mask, image and layer, so that the layout does not matter."""
    steps = torch.arange(1, size[-2] + 1, dtype=torch.float64)
    points = torch.stack([steps * 0.7548776662466927 % 1, steps * 0.5698402909980532 % 1], dim=1)
    return points.to(options.get("dtype")).expand(size)


def batch_of_four(ignored: bool) -> Batch:
    """Four crops with different numbers of classes; with `ignored` the last two have no label at all."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (4, 3, 64, 64), generator=generator, dtype=torch.uint8)
    labels = torch.zeros(4, 64, 64, dtype=torch.uint8)
    labels[1, 20:] = 1
    labels[2, :, 30:] = 2
    labels[3, 40:, :50] = 1
    labels[:, :5] = 255
    if ignored:
        labels[2:] = 255
    return Batch(images, labels, torch.full((4, 2), 64), list("abcd"))


def one_step(head: str, layout: str, ignored: bool, frozen: str, rank: int = 0, compiled: bool = False) -> dict:
    """What the loop does in an iteration, in float64: loss, gradients and buffers after it.

    `frozen`: "norms" use their running statistics and leave them alone; the "backbone" learns nothing.
    """
    world, share, accumulation = LAYOUTS[layout]
    torch.rand, rand = fixed_points, torch.rand
    torch.manual_seed(0)
    model = small.model.build_model(head, "tiny", 3, **small.CHANGES).double().train()
    model.backbone.requires_grad_(frozen != "backbone")
    for module in model.modules():
        if frozen == "norms" and isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    if compiled:
        model.compile(backend="aot_eager")  # traces as --compile does, and leaves out generating code
    process = train.Process(rank, world, CPU)
    parallel = train.data_parallel(model, process)
    mine = slice(rank * share * accumulation, (rank + 1) * share * accumulation)
    parts = [part[mine].split(share) for part in batch_of_four(ignored)[:2]]
    batches = [Batch(images, labels, None, []) for images, labels in zip(*parts, strict=True)]
    counts, _ = train.exchange(batches, 3, False, process)
    losses = torch.zeros((), dtype=torch.float64)
    for i, batch in enumerate(batches):
        first = mine.start + i * share
        normalizers = loss_normalizers(counts, slice(first, first + share), model.config.num_queries)
        with train.averaging(parallel, i == accumulation - 1), fast.training(model):
            loss = parallel(batch.images.double() / 128 - 1, batch.labels.long(), normalizers)["loss"]
            (loss / accumulation).backward()
        losses += loss.detach() / accumulation
    torch.rand = rand
    result = {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in result.values())  # with find_unused_parameters=False
    result |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    return result | {"loss": losses, "counts": counts}


def assert_close(ours: dict, expected: dict) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


# Accumulation is compared with batch norm's statistics fixed: it alone sees only what is on the devices at once.
CASES = [(head, "two processes", ignored, "nothing") for head in HEADS for ignored in (False, True)]
CASES += [("mask2former", "two, one image each, accumulated", ignored, "norms") for ignored in (False, True)]
CASES += [("mask2former", "two processes", False, "backbone")]


def pair_worker(rank: int, folder: Path) -> dict:
    """One of two processes: a step for each case; averages, restarts, a damaged run. Trains the run "uncut"."""
    result = {case: one_step(*case, rank=rank) for case in CASES}
    result["averages"] = count_averages()
    result["restarted"] = []
    for count in (0, rank):  # in the second place, process 0 is on a node that did not fail
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(count)
        result["restarted"].append(run.restarted(train.Process(rank, 2, CPU)))
    with patch.object(zipfile.ZipFile, "testzip", autospec=True, side_effect=zipfile.ZipFile.testzip) as compare:
        result["last"] = run.load_last(folder / "damaged", train.Process(rank, 2, CPU))["iteration"]
    result["compared"] = compare.call_count
    train_here(rank, folder, *RUN, "--name", "uncut")
    return result


def train_here(rank: int, folder: Path, *options: str) -> None:
    """In one of two processes that are joined already: train in that folder."""
    os.chdir(folder)
    for name, value in small.REPLACED.items():
        setattr(train, name, value)
    train.train(train.parse(options), train.Process(rank, 2, CPU))


def count_averages() -> list[int]:
    """How often gradients have been averaged after each of three micro-batches."""
    parallel, averaged, counts = DistributedDataParallel(torch.nn.Linear(2, 1)), [], []

    def hook(_, bucket):
        averaged.append(bucket.index())
        return torch.futures.collect_all([]).then(lambda _: bucket.buffer())

    parallel.register_comm_hook(None, hook)
    for i in range(3):
        with train.averaging(parallel, i == 2):
            parallel(torch.ones(1, 2)).sum().backward()
        counts.append(len(averaged))
    return counts


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda:0", "cpu:gloo,cuda:nccl")])
def test_processes_wait_for_each_other_for_half_an_hour(monkeypatch, device, backend):
    asked = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(run.common, "choose_device", lambda _: torch.device(device))
    monkeypatch.setattr(run.torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(run, "rendezvous", lambda _: iter([(torch.distributed.HashStore(), 0, 1)]))
    monkeypatch.setattr(run.dist, "init_process_group", lambda name, **options: asked.update(options, name=name))
    assert run.join_processes(device) == (0, 1, torch.device(device))
    assert asked["name"] == backend and asked["timeout"] == timedelta(minutes=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small data set to train on; a run whose last checkpoint is damaged; the run "uncut", once `pair` is done."""
    folder = tmp_path_factory.mktemp("pair")
    small.write_data(folder / "data")
    (folder / "damaged").mkdir()
    for iteration in (1, 2):
        run.write_checkpoint(last := folder / "damaged" / "last.pt", {"iteration": iteration, "x": torch.zeros(1000)})
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    """What two processes found out together."""
    return two_processes(folder, pair_worker, folder)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_makes_the_same_step(pair, case):
    """Loss, gradients and running statistics to 1e-9, also where one process has no label at all."""
    (head, _, ignored, frozen), (first, second) = case, (dict(result[case]) for result in pair)
    assert first["counts"].tolist() == ([1, 2, 0, 0] if ignored else [1, 2, 2, 2])
    loss = (first.pop("loss") + second.pop("loss")) / 2
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_close(first | {"loss": loss}, one_step(head, "one process", ignored, frozen))


@pytest.mark.parametrize("head", HEADS)
def test_accumulation_in_one_process_makes_the_same_step(head):
    whole, accumulated = (one_step(head, layout, False, "norms") for layout in list(LAYOUTS)[:2])
    assert_close(accumulated, whole)


def test_gradients_are_averaged_with_the_last_micro_batch_only_and_all_know_of_a_restart_on_one_node(pair):
    for result in pair:
        assert result["averages"] == [0, 0, 1] and result["restarted"] == [False, True]


def test_one_process_compares_checksums_and_all_take_the_same_checkpoint(pair):
    assert [(result["last"], result["compared"]) for result in pair] == [(1, 2), (1, 0)]


def compiled_worker(rank: int, case: tuple) -> tuple[dict, dict, list[str]]:
    from torch._dynamo.utils import counters  # takes seconds

    torch._dynamo.config.error_on_recompile = case[0] == "upernet"  # after the matcher, the number of masks varies
    plain, compiled = (one_step(*case, rank=rank, compiled=compiled) for compiled in (False, True))
    return plain, compiled, [" ".join(reason.split()) for reason in counters["graph_break"]]


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_compiled_model_makes_the_same_step_in_two_processes(tmp_path, head):
    """With batch norm over both, averaged gradients and accumulation: none breaks the graph or has it traced again."""
    case = (head, "two, one image each, accumulated", False, "nothing")
    for plain, compiled, breaks in two_processes(tmp_path, compiled_worker, case):
        assert_close(compiled, plain)
        # the matcher must know on the host which classes there are; nothing else leaves the graph
        assert all("nonzero" in reason for reason in breaks) and len(breaks) == (head == "mask2former")


def torchrun(*options: str, launcher: Sequence[str] = ("--nproc_per_node=2",), cut: str = "") -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, small.__file__, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SMALL_CUT": cut}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen) -> str:
    """Wait for exit status 0; what the first printed."""
    outputs = [process.communicate(timeout=240) for process in processes]
    assert not any(process.returncode for process in processes), outputs
    return outputs[0][0]


def weights(name: str) -> dict[str, torch.Tensor]:
    state = torch.load(f"runs/{name}/last.pt", weights_only=True)
    assert state["iteration"] == 4 and len(state["rng"]) == 2
    assert not torch.equal(state["rng"][0]["cpu"], state["rng"][1]["cpu"])  # each process draws its own points
    return state["model"]


def iterations(name: str, kind: str) -> list[int]:
    return [line["iteration"] for line in small.log(name, kind)]


@pytest.fixture
def uncut(pair, folder, monkeypatch):
    """The weights of a run of two processes from beginning to end."""
    monkeypatch.chdir(folder)
    return weights("uncut")


def test_a_run_of_two_processes_restarts_stops_and_goes_on(uncut, folder):
    """kill -9 of one process: torchrun starts both again, and they go on from the last checkpoint. Then a signal to one
    process stops both after the iteration, with exit status 0; --resume goes on."""
    output = finish(torchrun(*RUN, "--name", "cut", launcher=("--nproc_per_node=2", "--max-restarts=1"),
                             cut="1:SIGKILL:1 1:SIGTERM:1"))
    assert output.count("global batch 4 = 2 device(s) x 2 images x 1 accumulated") == 2  # process 0 alone, each start
    assert iterations("cut", "start") == [0, 1] and iterations("cut", "train") == [1, 2]
    two_processes(folder, train_here, folder, "--resume", "cut")
    assert iterations("cut", "start") == [0, 1, 2] and iterations("cut", "train") == [1, 2, 3, 4]
    torch.testing.assert_close(weights("cut"), uncut, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["", "3:SIGKILL:1"])
def test_two_nodes_are_one_run(uncut, cut):
    """Two launchers of one process each that meet on the loopback interface; also if one process is killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ("--nnodes=2", "--nproc_per_node=1", "--max-restarts=1", "--rdzv_backend=c10d",
                f"--rdzv_endpoint=127.0.0.1:{port}")
    name = f"nodes{cut}".replace(":", "-")
    finish(*(torchrun(*RUN, "--name", name, launcher=launcher, cut=cut) for _ in range(2)))
    torch.testing.assert_close(weights(name), uncut, rtol=0, atol=0)
    assert iterations(name, "start") == ([0, 3] if cut else [0])


@pytest.mark.slow
def test_a_fault_is_printed_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = torchrun(*small.OPTIONS, "--data", "nowhere")
    errors = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and errors.count("error: no data at nowhere") == 1
    assert not Path("runs").exists()
