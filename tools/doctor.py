"""Is everything here that a training needs? `python train.py --doctor [options]` tells, and every start looks first.

What is absent is told at once, each thing with the command that gets it. Nothing is trained, built or written. `recipe`
is a train.Recipe: its layout is taken where the options leave it open.

Reading order: Finding -> check (before a start), show (the page of --doctor) -> needs -> what it looks at.
"""

import argparse
import math
import os
import platform
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

import common
import run
from common import UserError
from data import open_dataset, preflight
from layout import choose_layout, share_batch
from model import ModelConfig, Segmenter, build_model
from msda_cuda import build, cache
from tools.checkpoints import find_pretrained
from tools.toy import make_toy
from weights import KINDS, read_weights

OK, NOTE, ABSENT = "ok", "note", "ABSENT"
COMMAND = r"`(python data\.py (?:fetch|prepare-context)[^`]*)`"  # in the text of a fault: gets what is absent
MEMORY = Path("/proc/meminfo")
# GB on a GPU with 1 and with 16 images of 480 x 480 at once, as docs/speed.md computes them: in float32 and in 16 bits
# with activations kept, then with activations computed twice.
COMPUTED = {
    ("mask2former", "base"): ((4.4, 34.6), (3.6, 22.4), (2.8, 16.5), (2.6, 12.0)),
    ("mask2former", "large"): ((15.1, 86.5), (13.8, 58.4), (11.6, 49.7), (11.3, 37.4)),
    ("upernet", "large"): ((12.0, 63.2), (10.8, 40.8), (8.5, 26.4), (8.3, 19.9)),
}


class Finding(NamedTuple):
    """What was found about one thing that a run needs."""
    state: str  # OK, NOTE, or ABSENT: the run cannot start
    thing: str
    text: str  # one line; where something is to be mended, with the remedy


def look(thing: str, at: Callable[[], str | Finding]) -> Finding:
    """What `at()` found. A text is OK; a fault that it raises is ABSENT."""
    try:
        found = at()
    except UserError as error:
        found = Finding(ABSENT, thing, str(error))
    except OSError as error:
        found = Finding(ABSENT, thing, common.printable(f"{error.filename}: {common.reason(error)}"))
    return found if isinstance(found, Finding) else Finding(OK, thing, found)


def check(options: argparse.Namespace, recipe: Any, world: int) -> None:
    """Before a start in `world` processes: raises UserError for what is absent. Several things are a line each before.

    Draws the toy data if they are asked for and nothing is absent.
    """
    faults = [found.text for found in needs(options, recipe, world, weights) if found.state == ABSENT]
    if len(faults) > 1:
        print(*(f"  - {fault}" for fault in faults), sep="\n", file=sys.stderr, flush=True)
        launcher = f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}" if "RANK" in os.environ else "python"
        command = f"{launcher} train.py --doctor {shlex.join(sys.argv[1:])}".rstrip()
        raise UserError(f"{len(faults)} things keep this run from starting (above); `{command}` shows all it needs")
    if faults:
        raise UserError(faults[0])
    if options.data == "toy":
        make_toy()


def show(options: argparse.Namespace, recipe: Any, world: int) -> int:
    """Print the page of --doctor, process 0 alone; returns the exit status, 2 if the training could not start."""
    if int(os.environ.get("RANK", 0)):
        return 0
    found = [look("machine", machine), look("operator", partial(operator, options.device)),
             *needs(options, recipe, world, weights_in_full)]
    faults = [each.text for each in found if each.state == ABSENT]
    print(f"{options.head} {options.size} on {options.data}, {world} process(es)\n")
    print(*(textwrap.fill(f"{each.state:<8}{each.thing:<10}{each.text}", 116, subsequent_indent=" " * 18,
                          break_long_words=False, break_on_hyphens=False) for each in found), sep="\n")
    commands = dict.fromkeys(command for fault in faults for command in re.findall(COMMAND, fault))
    print(f"\nThe training cannot start: {len(faults)} ABSENT." if faults else "\nThe training can start.")
    if commands:
        print("To be run in this order:\n", *(f"    {command}" for command in commands), sep="\n")
    return 2 if faults else 0


def needs(options: argparse.Namespace, recipe: Any, world: int,
          weights: Callable[[argparse.Namespace], str]) -> Iterator[Finding]:
    """What a run needs, in the order in which it is mended; `weights(options)` looks at the weights it starts from."""
    device = look("device", partial(devices, options.device))
    yield device
    yield look("weights", partial(weights, options))
    yield from data_sets(options.data)
    yield look("run", partial(folder, options))
    try:
        options, model, text = lay_out(options, recipe, world)
    except UserError as error:
        yield Finding(ABSENT, "layout", str(error))
        return  # the rest is computed from the model
    yield Finding(OK, "layout", text)
    yield look("disk", partial(disk, options, model))
    if device.state == OK:
        yield look("memory", partial(memory, options, model))


# ------------------------------------------------------------------------------------------------------- each by itself
def machine() -> str:
    """Hardware, system and versions."""
    driver = common.NVIDIA_DRIVER.read_text() if common.NVIDIA_DRIVER.exists() else ""
    driver = re.search(r"\b\d{3,}\.\d+[.\d]*", driver)
    versions = {"Python": platform.python_version(), **{name: version(name) for name in run.PACKAGES},
                "CUDA of PyTorch": torch.version.cuda or "none", "NVIDIA driver": driver[0] if driver else "none"}
    return (f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, "
            f"{', '.join(f'{name} {number}' for name, number in versions.items())}")


def on_gpu(name: str | None) -> bool:
    """Whether --device NAME is a GPU that works."""
    return (name or "cuda").startswith("cuda") and torch.cuda.is_available()


def devices(name: str | None) -> str:
    """The devices that the processes of this machine train on."""
    device = common.choose_device(name)
    if device.type != "cuda":
        return f"{device.type}{', for PyTorch sees no GPU' if name is None else ''}"
    here, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > here:
        raise UserError(f"{processes} processes on a machine with {here} GPU(s): use --nproc_per_node={here}")
    gpus = (torch.cuda.get_device_properties(i) for i in range(here))
    return "; ".join(f"cuda:{i} {gpu.name}, {gpu.total_memory / 1e9:.1f} GB" for i, gpu in enumerate(gpus))


def operator(name: str | None) -> str | Finding:
    """How deformable attention will be computed: what msda_cuda.build will do at the first step, without doing it."""
    plan, choice = build.plan(), os.environ.get("MSDA", "auto")
    built, failed = ([file for place in (cache.extensions() / "msda", cache.temporary())
                      for file in place.glob(f"{plan.name}*{suffix}")] for suffix in (".so", ".failed"))
    # As in a build: pip puts ninja beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if choice not in ("auto", "native", "torch"):
        raise UserError(f"MSDA={choice} is unknown: choose auto, native or torch")
    try:
        if choice == "torch":
            raise build.BuildError("MSDA=torch asks for it")
        if on_gpu(name) and plan.no_cuda:
            raise build.BuildError(plan.no_cuda)
        if whole := next(filter(cache.is_whole, built), None):
            return f"native, built: {whole}"
        with patch.dict(os.environ, PATH=path):
            build.find_tools()
            for reason, _, compilers in (note.read_text(errors="replace").partition("\n") for note in failed):
                if compilers == build.toolchain(plan.cuda_home):
                    raise build.BuildError(reason)
    except build.BuildError as error:
        return Finding(ABSENT if choice == "native" else NOTE, "operator",
                       f"PyTorch's text, several times slower than the native operator: {error}")
    return "native, to be built at the first step; `python msda_cuda/build.py` builds it now"


def weights(options: argparse.Namespace) -> str:
    """The weights that a run starts from, unread. Raises UserError if they are absent."""
    if options.resume and any((Path(options.resume) / name).exists() for name in ("last.pt", "previous.pt")):
        return f"the last checkpoint of {options.resume}"
    return str(find_pretrained(options.pretrained, options.size) or "random")


def weights_in_full(options: argparse.Namespace) -> str:
    """The same, read: kind, size and checksum. Raises UserError also for files that are damaged."""
    path = run.find_whole(Path(options.resume)) if options.resume else None
    path = path or find_pretrained(options.pretrained, options.size)
    if path is None:
        return "random"
    kind = KINDS[read_weights(path).kind]
    return f"{path}: {kind}, {path.stat().st_size / 1e6:,.1f} MB, sha256 {common.sha256(path)[:12]}"


def data_sets(root: str) -> list[Finding]:
    """Both splits, or the fault that they share."""
    if root == "toy" and not Path("data/toy").exists():
        return [Finding(NOTE, "data", "toy: not drawn yet; the start of the training draws it into data/toy")]
    return list(dict.fromkeys(look("data", partial(data_set, root, split)) for split in ("train", "val")))


def data_set(root: str, split: str) -> str:
    """A split, with a look at some of its images and labels."""
    dataset = open_dataset(root, split)
    preflight(dataset)
    facts = dataset.fingerprint()
    return (f"{dataset.root}, {split}: {facts['images']:,} images, {facts['classes']} classes, "
            f"sha256 {facts['sha256'][:12]}")


def folder(options: argparse.Namespace) -> str:
    """The run's folder. Raises UserError if its name is taken, or if nothing can be written there."""
    path = run.find_run(options.resume) if options.resume else run.new_run(options)
    place = nearest(path)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be made or written: {place} is no folder that you may write in; mend it")
    return f"{path}{'' if options.resume else ', new'}"


def nearest(path: Path) -> Path:
    """The path, or the folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def lay_out(options: argparse.Namespace, recipe: Any, world: int) -> tuple[argparse.Namespace, Segmenter, str]:
    """The options with their layout, the model without values, the layout as text. UserError for contradictions.

    A GPU's layout is measured when the model is there: here it gets the one that needs the least memory.
    """
    measured = options.batch is None and not vars(options).get("earlier_batch") and on_gpu(options.device)
    options = argparse.Namespace(**vars(options))  # a copy, which the layout is written into
    share_batch(options.global_batch, world, options.batch or 1)
    changes = {} if options.window is None else {"window": options.window}
    try:
        with torch.device("meta"):
            model = (Segmenter(ModelConfig(**options.model)) if "model" in options else
                     build_model(options.head, options.size, **changes))
    except ValueError as error:
        raise UserError(f"--head {options.head} --size {options.size}: {error}") from None
    model.backbone.requires_grad_(not options.freeze_backbone)
    often = choose_layout(options, 1 if measured else recipe.batch, recipe.checkpoint_activations, model,
                          run.Process(1, world, torch.device("cpu")))  # process 0 prints
    text = f"global batch {options.global_batch} = {world} device(s) x "
    text += "as many images as the start finds to fit" if measured else f"{options.batch} images x {often} accumulated"
    return options, model, text


def disk(options: argparse.Namespace, model: Segmenter) -> Finding:
    """Room for the run's checkpoints. Most is needed while last.pt is written beside the old one and previous.pt."""
    best = sum(tensor.nbytes for tensor in model.state_dict().values())
    last = best + sum(2 * p.nbytes for p in model.parameters() if p.requires_grad)  # AdamW's moments
    need = min(3, math.ceil(options.iterations / options.save_every)) * last + best
    place = Path(options.resume) if options.resume else run.RUNS
    have = sum(path.stat().st_size for path in place.glob("*.pt")) if options.resume else 0
    free = shutil.disk_usage(nearest(place)).free
    text = f"{free / 1e9:,.1f} GB free at {place}, {max(0, need - have) / 1e9:,.1f} GB needed for checkpoints"
    if need - have > free:
        return Finding(ABSENT, "disk", f"{text}: make room, or make {run.RUNS} a link to a larger disk")
    return Finding(OK, "disk", text)


def memory(options: argparse.Namespace, model: Segmenter) -> Finding:
    """Free memory of the device against what is computed: surely weights, gradients and moments; then activations."""
    free, surely = free_memory(options), sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters()) / 1e9
    need, text = surely, f"{surely:,.1f} GB needed for weights, gradients and AdamW's moments"
    known = COMPUTED.get((options.head, options.size))
    if known and model.config.window == 480 and not options.freeze_backbone:
        one, sixteen = known[2 * bool(options.checkpoint_activations) + (options.amp != "off")]
        need = one + (sixteen - one) * (options.batch - 1) / 15
        text += (f", about {need:,.1f} GB with the activations of {options.batch} image(s)"
                 f"{' computed twice' * options.checkpoint_activations} (computed for a GPU)")
    text = f"{'free memory unknown' if free is None else f'{free:,.1f} GB free'}, {text}"
    if free is not None and free < surely:
        return Finding(ABSENT, "memory", f"{text}: use a smaller --size, or a device with more memory")
    if free is None or free < need:
        return Finding(NOTE, "memory", f"{text}: if it runs out, use --batch 1, --checkpoint-activations, --amp bf16")
    return Finding(OK, "memory", text)


def free_memory(options: argparse.Namespace) -> float | None:
    """GB that a process may take: of its GPU, else its share of what the machine has available; None: unknown."""
    device = common.choose_device(options.device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    found = re.findall(r"(?m)^(?:MemAvailable|SwapFree): +(\d+) kB", MEMORY.read_text() if MEMORY.exists() else "")
    return sum(map(int, found)) * 1024 / 1e9 / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if found else None
