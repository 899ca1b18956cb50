"""Does this code do on this GPU what it promises? `make gpu-check`, or python -m tools.gpu_check [CHECK ...].

Each check compares numbers of the device with numbers that are known: float64, PyTorch's own text, another layout of
the same run. The command makes all of them and writes a Markdown page to paste into an issue. Without a GPU it makes
those that need none, on the CPU, and says what it left out.

Reading order: gpu_numbers.py (checks in this process) -> command, layouts, runs, compiled, sanitizer (checks by
commands in processes of their own) -> results_of -> page, main.
"""

import argparse
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

import common
import run
from msda_cuda import build
from tools import toy
from tools.bench import ROOT, Row, markdown
from tools.gpu_numbers import (
    CPU,
    FAILED,
    HEADS,
    LEFT_OUT,
    PASSED,
    SWAPPED_POINT,
    UNUSED,
    WINDOW,
    Found,
    LeftOut,
    Result,
    Step,
    attention,
    error_of,
    models,
    need,
    one_step,
    operator,
    steps,
    verdict,
)

SECONDS = 600  # that a command may take


def torchrun(processes: int) -> list[str]:
    """The words that start a command in so many processes of this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def command(folder: str | Path, *words: str, **environment: str) -> None:
    """Run a command in a folder. Raises RuntimeError with its complaint, TimeoutExpired after SECONDS."""
    with subprocess.Popen(words, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            output, _ = process.communicate(timeout=SECONDS)
        finally:
            process.terminate()  # if it has not ended; torchrun then ends its processes
    if process.returncode:
        complaints = re.findall(r"(?m)^(?:\[rank\d\]: )?(?:error|[\w.]*Error): .*", output) or output.splitlines()[-1:]
        raise RuntimeError(f"{' '.join(words[1:])} ended with {process.returncode}: {''.join(complaints[:1])}")


def train_toy(folder: Path, name: str, processes: int, options: str, **environment: str) -> list[dict]:
    """The log of train.py on the toy data of the folder."""
    command(folder, *torchrun(processes), str(ROOT / "train.py"), "--data", "toy8", *f"--name {name} --pretrained none "
            f"--workers 1 --no-tf32 {options}".split(), **environment)
    return run.read_log(folder / "runs" / name / "log.jsonl")


def logged(lines: Sequence[dict], key: str, after: int = 0) -> Tensor:
    """The numbers of that name in a log, of the iterations after one."""
    return torch.tensor([line[key] for line in lines if key in line and line["iteration"] > after])


def layouts(device: torch.device) -> Found:
    """Two processes with averaged gradients and batch norm over both, against one process with all images."""
    need(device == CPU or torch.cuda.device_count() > 1, "2 GPUs")
    with TemporaryDirectory() as folder:
        command(folder, *torchrun(2), "-m", "tools.gpu_check", device.type)
        for head in HEADS:
            first, second = (Step(*torch.load(f"{folder}/{head}{rank}.pt", weights_only=True)) for rank in range(2))
            step = first._replace(losses=(first.losses + second.losses) / 2)
            yield verdict(f"{head}, 2 processes", step.errors(one_step(head, device, fast_text=True)), SWAPPED_POINT)


def share(name: str) -> None:
    """What each of the two processes does."""
    common.allow_tf32(False)
    process = run.join_processes(name)
    for head in HEADS:
        torch.save(tuple(one_step(head, process.device, fast_text=True, process=process)), f"{head}{process.rank}.pt")
    run.leave_processes()


def runs(device: torch.device) -> Found:
    """train.py, --resume and evaluate.py by torchrun on one device and on two."""
    worlds, norms, scores = [1, 2] if device == CPU or torch.cuda.device_count() > 1 else [1], {}, {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        toy.make_toy(folder / "toy8", train=8, val=4)
        for world in worlds:
            options = (f"--device {device.type} --size tiny --window {WINDOW} --iterations 4 --save-every 2 "
                       f"--validate-every 4 --global-batch 4 --batch {4 // world} --head")
            norms[world] = logged(train_toy(folder, f"upernet{world}", world, f"{options} upernet"), "gradient_norm")
            if device != CPU or world == 2:  # on a CPU a command takes ten seconds
                log = train_toy(folder, f"mask2former{world}", world, f"{options} mask2former")
                yield resumed(folder, f"mask2former{world}", world, log, 0.0 if device == CPU else 1e-2)
        for each, world in [(device, world) for world in worlds] + [(CPU, 1)] * (device != CPU):
            scores[f"{world} of {each.type}"] = evaluated(folder, f"mask2former{worlds[-1]}", world, each)
        first, *others = scores
        errors = {name: error_of(scores[name], scores[first]) for name in others}
        yield verdict(f"evaluate.py on {', '.join(others)} against {first}", errors, 1e-3)
        need(len(worlds) > 1, "2 GPUs for runs on two")
        # UperNet alone: it draws no random points. Rounding grows from step to step.
        yield verdict("train.py on 2 against 1, first gradient norm", {"": error_of(norms[2][:1], norms[1][:1])}, 1e-4)
        yield verdict("train.py on 2 against 1, gradient norms", {"": error_of(norms[2], norms[1])}, 1e-2)


def resumed(folder: Path, name: str, world: int, log: list[dict], limit: float) -> Result:
    """A copy of a run goes on from its iteration 2, and must end as the run does: the random numbers bit for bit, the
    losses within the limit, for CUDA adds up gradients in any order."""
    whole, copy = folder / "runs" / name, folder / "runs" / "copy"
    shutil.copytree(whole, copy)
    (copy / "previous.pt").replace(copy / "last.pt")
    command(folder, *torchrun(world), str(ROOT / "train.py"), "--resume", "copy")
    states = [torch.load(path / "last.pt", weights_only=True, map_location=CPU)["rng"] for path in (whole, copy)]
    pairs = [(x[key], y[key]) for x, y in zip(*states, strict=True) for key in x]
    again = run.read_log(copy / "log.jsonl")
    shutil.rmtree(copy)
    errors = {key: error_of(logged(again, key, 2), logged(log, key, 2)) for key in ("loss", "gradient_norm")}
    errors["random state"] = float(not all(torch.equal(*pair) for pair in pairs))
    return verdict(f"train.py --resume on {world}", errors, limit, ", random states equal")


def evaluated(folder: Path, name: str, world: int, device: torch.device) -> Tensor:
    """Pixel accuracy, mean IoU and mean accuracy of a run."""
    command(folder, *torchrun(world), str(ROOT / "evaluate.py"), *f"--checkpoint runs/{name}/best.pt --no-tf32 "
            f"--json scores.json --device {device.type}".split())
    scores = json.loads((folder / "scores.json").read_text())
    return torch.tensor([scores[key] for key in ("all_accuracy", "mean_iou", "mean_accuracy")])


def compiled(device: torch.device) -> Found:
    """train.py --compile: what the first step takes, without and with PyTorch's cache on disk, and a later one."""
    need(device != CPU, "a GPU: a CPU takes many minutes")
    with TemporaryDirectory() as name:
        folder, losses = Path(name), {}
        toy.make_toy(folder / "toy8", train=8, val=4)
        for way in ("eager", "compiled", "compiled again"):
            log = train_toy(folder, "run", 1, "--size base --amp bf16 --iterations 12 --validate-every 12 "
                            f"--global-batch 2 --batch 2 {'--compile' * (way != 'eager')}",
                            TORCHINDUCTOR_CACHE_DIR=f"{folder}/cache")
            shutil.rmtree(folder / "runs")  # gigabytes
            seconds, losses[way] = logged(log, "seconds") - logged(log, "seconds/data"), logged(log, "loss")[:1]
            yield {"table": "train.py --amp bf16, Mask2Former base, 2 images", "": way,
                   "first step s": seconds[0].item(), "later step s": seconds[6:].median().item()}
    errors = {way: error_of(loss, losses["eager"]) for way, loss in losses.items()}
    yield verdict("train.py --compile, first loss against eager", errors, 0.1, " (its random points are others)")


def sanitizer(device: torch.device) -> Found:
    """compute-sanitizer on the self-test of the operator."""
    need(device != CPU, "a GPU")
    places = f"{build.find_cuda_home()}/bin{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    tool = shutil.which("compute-sanitizer", path=places)
    need(tool is not None, "compute-sanitizer, a part of CUDA's toolkit")
    command(ROOT, tool, "--report-api-errors", "no", "--error-exitcode", "9", sys.executable, "-m", "msda_cuda",
            PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    yield Result("compute-sanitizer, operator", PASSED, "0 errors")


# ----------------------------------------------------------------------------------------------------------------- page
CHECKS = {check.__name__: check for check in (operator, attention, models, layouts, runs, sanitizer, steps, compiled)}


def results_of(name: str, device: torch.device) -> Found:
    """What a check finds. An exception is a result, too."""
    common.allow_tf32(False)
    try:
        yield from CHECKS[name](device)
    except LeftOut as why:
        yield Result(name, LEFT_OUT, str(why))
    except Exception as error:  # of any kind: the other checks go on
        yield Result(name, FAILED, f"{type(error).__name__}: {common.reason(error)}")
    gc.collect()
    with suppress(RuntimeError):  # after some errors nothing on this GPU works in this process
        torch.cuda.empty_cache()  # commands in other processes need room


def machine(device: torch.device) -> dict[str, object]:
    """Hardware, versions, and the commit of this code."""
    facts = run.environment(device, 1 if device == CPU else torch.cuda.device_count())
    del facts["command"]  # it tells paths
    if device != CPU:
        gpu = torch.cuda.get_device_properties(device)
        driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader").partition("\n")[0]
        facts |= {"capability": f"{gpu.major}.{gpu.minor}", "memory": f"{gpu.total_memory / 1e9:.1f} GB",
                  "driver": driver, "cuDNN": torch.backends.cudnn.version()}
    return facts


def page(facts: dict[str, object], found: Sequence[Result | Row]) -> str:
    """The page in Markdown."""
    results, tables = [each for each in found if isinstance(each, Result)], {}
    for row in (each for each in found if isinstance(each, dict)):
        tables.setdefault(row["table"], []).append({key: value for key, value in row.items() if key != "table"})
    return "\n".join([
        f"# GPU check: {count(found)}\n", *(f"* {name}: {value}" for name, value in facts.items()),
        "\nWhat is found are the largest differences, relative to the largest number expected, and their limit.",
        "*Not taken*: PyTorch has no such kernel for these inputs.\n\n| check | outcome | found |\n|---|---|---|",
        *(f"| {' | '.join(field.replace('|', '/') for field in result)} |" for result in results),
        *(f"\n## {title}\n\n{markdown(rows)}" for title, rows in tables.items())]) + "\n"


def count(found: Sequence[Result | Row]) -> str:
    """How many checks ended how."""
    number = Counter(each.outcome for each in found if isinstance(each, Result))
    return ", ".join(f"{number[key]} {key}" for key in (PASSED, FAILED, UNUSED, LEFT_OUT) if number[key])


def check_all(options: argparse.Namespace) -> int:
    """Make the checks and write the page, anew after each of them; returns the exit status."""
    common.check_file(options.out, "--out")
    device, found, start = common.choose_device(options.device), [], time.perf_counter()
    facts = machine(device)
    if device == CPU:  # the work is small: on a busy machine threads would wait for each other
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    for name in options.checks or CHECKS:
        print(f"{name} ...", flush=True)
        before = time.perf_counter()
        found += (new := list(results_of(name, device)))
        facts["minutes"] = f"{(time.perf_counter() - start) / 60:.1f}"
        options.out.write_text(page(facts, found))
        print(f"{name}: {count(new)}, {time.perf_counter() - before:.0f} s")
        print(*(f"  {each.name}: {each.found}\n" for each in new if FAILED in each), sep="", end="", flush=True)
    print(f"{count(found)}: {options.out} is the page to paste into an issue")
    return int(any(FAILED in each for each in found))


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status is 1 if a check failed."""
    p = common.Parser(prog="-m tools.gpu_check", description=__doc__.split("Reading order:")[0],
                      formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checks", nargs="*", metavar="CHECK", help=f"default: all of {', '.join(CHECKS)}")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    p.add_argument("--out", type=Path, default=Path("gpu-check.md"), metavar="FILE", help="default: gpu-check.md")
    options = p.parse_args(arguments)
    for name in set(options.checks).difference(CHECKS):
        p.error(f"there is no check {name}; choose from {', '.join(CHECKS)}")
    return common.run(lambda: check_all(options))


if __name__ == "__main__":
    sys.exit(share(sys.argv[1]) if "TORCHELASTIC_RUN_ID" in os.environ else main(sys.argv[1:]))
