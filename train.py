"""Train a ViT-Adapter segmenter on one device or many.

    python train.py --data toy                                            a first try on a CPU: makes its own data
    python train.py --data DIR --size tiny --window 192 --iterations 800  your own 60 photographs on a CPU
    torchrun train.py --head mask2former --size large                     Pascal Context on one GPU
    torchrun --nproc_per_node=8 train.py --head upernet --size large      on eight: the same run, sooner
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...   on two nodes
    torchrun --max-restarts=3 train.py --resume                           go on with the newest run after a stop
    python train.py --doctor --size large                                 tell what a run needs and what is absent

Reading order: Recipe -> parameter_groups, lr_factor -> train, which ends in the loop -> what the loop calls -> what
the preparation calls -> the command line. Processes, folders, checkpoint files and logs are in run.py.

The global batch is 16 images = devices x images at once x accumulation (layout.py), and every layout makes the same
step. Only batch norm differs with accumulation: it sees the images that are on the devices at once. Data parallelism is
DDP; weights, gradients and optimizer state of the largest model are 9 GB and fit one device, so nothing is sharded.

Shapes: B images in a micro-batch, N in the global batch, w the window's side in pixels, K classes.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

import common
import data
import fast
import run
from common import UserError
from data import Batch, SegmentationDataset, count_labels, normalize, open_dataset, positions, spread, training_loader
from evaluate import evaluate, metrics, predictions
from heads import Normalizers, classes_present, loss_normalizers
from layout import AMP, choose_layout
from model import ModelConfig, Segmenter, build_model
from msda_cuda.cache import cache
from run import Process
from sync_batchnorm import convert_sync_batchnorm
from tools import doctor, draw
from tools.checkpoints import find_pretrained
from tools.tables import in_percent, table
from weights import LoadReport, load_weights

LOG_EVERY = 50  # iterations; more often where a run would give fewer than 20 reports
PICTURES = 4  # validation images that TensorBoard shows

# ------------------------------------------------------------------------------------------------------------ recipes
@dataclass(frozen=True)
class Recipe:
    """How one model is trained. The command that uses a recipe is above it."""
    iterations: int
    lr: float
    layer_decay: float
    validate_every: int  # iterations; in proportion when fewer iterations are asked for
    save_every: int = 1000
    batch: int = 2  # images on a device at once; on a GPU layout.py takes as many as fit
    checkpoint_activations: bool = False  # computed twice instead of kept; on a GPU only where memory asks for it
    warmup: int = 1500  # iterations; in proportion when another number of iterations is asked for
    weight_decay: float = 0.05


# torchrun --nproc_per_node=8 train.py --head HEAD --size SIZE        cost: not measured
BASE = Recipe(iterations=40_000, lr=3e-5, layer_decay=0.95, validate_every=4000)
LARGE = replace(BASE, lr=2e-5, layer_decay=0.90, checkpoint_activations=True)
UPERNET = {"iterations": 80_000, "validate_every": 8000}
# python train.py --data toy --head HEAD
# From random weights on a CPU: no pre-training to preserve, hence a high rate and no layer decay.
# Cost: 300 iterations of 0.65 s (UperNet: 0.80 s) as 2 processes on 2 CPU cores.
TINY = Recipe(iterations=300, lr=1e-3, layer_decay=1.0, validate_every=150, save_every=100, batch=8, warmup=15)
RECIPES = {
    ("mask2former", "tiny"): TINY,
    ("upernet", "tiny"): TINY,
    ("mask2former", "base"): BASE,
    ("upernet", "base"): replace(BASE, **UPERNET),  # not among the released models
    ("mask2former", "large"): LARGE,
    ("upernet", "large"): replace(LARGE, **UPERNET),
}

# The released code names these five in its list for layer 0, beside the patch embedding: 0.9^25 = 0.072 of the rate at
# size large. Surely meant for a ViT's position embedding, but the published scores were made with it.
FIRST_LAYER = ("backbone.patch_embed.", "backbone.cls_token", "head.query_embed", "head.query_feat", "head.level_embed",
               "head.class_embed.", "head.mask_embed.")


def layer_of(name: str, depth: int) -> int:
    """The depth a parameter counts as: 0 for patch embedding, i + 1 for block i, depth + 1 for adapter and heads."""
    if name.startswith(FIRST_LAYER):
        return 0
    if name.startswith("backbone.blocks."):
        return int(name.split(".")[2]) + 1
    return depth + 1


def parameter_groups(model: Segmenter, lr: float, weight_decay: float, layer_decay: float) -> list[dict]:
    """AdamW groups with layer-wise rates (BEiT, appendix), lr * scale with scale = layer_decay^(depth + 1 - layer).

    No weight decay on one-dimensional parameters: biases, norms, layer scales. Frozen parameters are left out.
    """
    depth, groups = len(model.backbone.blocks), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, decay = layer_of(name, depth), weight_decay if parameter.dim() > 1 else 0.0
            scale = layer_decay ** (depth + 1 - layer)
            new = {"params": [], "lr": lr * scale, "scale": scale, "weight_decay": decay}
            groups.setdefault((layer, decay), new)["params"].append(parameter)
    return list(groups.values())


def lr_factor(iteration: int, iterations: int, warmup: int = 1500) -> float:
    """What every learning rate is multiplied by: linear from 1 to 0, times a linear rise from 1e-6 in the warm-up."""
    decay = 1 - iteration / iterations
    return decay * (1 - (1 - iteration / warmup) * (1 - 1e-6)) if iteration < warmup else decay


# ----------------------------------------------------------------------------------------------------------- training
def train(options: argparse.Namespace, process: Process) -> None:
    """One run, from its options to its last checkpoint: the preparation, then the loop."""
    device, recipe = process.device, RECIPES[options.head, options.size]
    run.on_first(process, lambda: doctor.check(options, recipe, process.world))
    training, validation = (open_dataset(options.data, split) for split in ("train", "val"))
    folder, state, progress = run.open_run(options, process)
    model, weights = make_model(options, state, training.info.classes, process)
    accumulation = choose_layout(options, recipe.batch, recipe.checkpoint_activations, model, process)
    optimizer = AdamW(parameter_groups(model, options.lr, options.weight_decay, options.layer_decay), fused=True)
    amp, scaler = AMP[options.amp], torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
    stream = start_stream(options, training, model.config.window, progress.iteration, process)
    log = start_log(options, process, folder, model, weights, training, validation, progress.iteration)
    parallel = data_parallel(model, process, options.compile)
    run.restore(state, optimizer, scaler, options.seed, process)
    del state  # gigabytes of host memory
    save = partial(run.save, process=process, model=model, info=training.info, progress=progress)
    stop, watch = run.StopSignal(), run.Stopwatch(device, running=log is not None)
    while True:
        if validation_due(progress, options) and validate(model, validation, progress, options, device, log):
            save(folder / "best.pt")
        if progress.iteration == options.iterations:
            break
        watch.lap("pause")
        batches = [next(stream) for _ in range(accumulation)]
        num_masks, stopping = exchange(batches, len(training.info.classes), stop.wanted, process)
        if stopping:
            break
        watch.lap("data")
        lr = set_rates(optimizer, options, progress.iteration)
        rng, sums = run.rng_state(device), Counter()  # whose update() adds
        for i, batch in enumerate(batches):
            first = (process.rank * accumulation + i) * options.batch  # this micro-batch's place in the global batch
            divisors = loss_normalizers(num_masks, slice(first, first + options.batch), model.config.num_queries)
            with averaging(parallel, i == accumulation - 1), fast.training(model, enabled=options.fast):
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    terms = parallel(*to_device(batch, divisors, device))
                watch.lap("forward")
                scaler.scale(terms["loss"] / accumulation).backward()
                watch.lap("backward")
            sums.update({name: value.detach() / accumulation for name, value in terms.items()})
        scaler.unscale_(optimizer)  # for the norm; gradients are not clipped
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        *values, norm = torch.stack([*sums.values(), norm]).tolist()  # waits for the device
        losses = dict(zip(sums, values, strict=True))
        run.check_finite(losses | {"gradient_norm": norm}, scaler, folder, process, model, progress, batches, rng)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        progress.iteration += 1
        watch.lap("optimizer")
        if log and log.count(progress.iteration, losses):
            log.report(progress.iteration, watch.seconds(), lr, norm, scaler.get_scale())
        if progress.iteration % options.save_every == 0 and progress.iteration < options.iterations:
            save(folder / "last.pt", optimizer=optimizer, scaler=scaler)
    save(folder / "last.pt", optimizer=optimizer, scaler=scaler)
    stop.release()
    if log:
        log.end(progress.iteration == options.iterations, in_percent(progress.best))


# ------------------------------------------------------------------------------------------------- what the loop calls
def validation_due(progress: run.Progress, options: argparse.Namespace) -> bool:
    """Whether the model must be validated before it learns on; also in a resumed run that was cut in a validation."""
    due = progress.iteration == options.iterations or progress.iteration % options.validate_every == 0
    return due and progress.validated < progress.iteration


def exchange(batches: Sequence[Batch], num_classes: int, stop: bool, process: Process) -> tuple[Tensor, bool]:
    """The numbers of target masks (N,) of the global batch's images, in the order of the stream, and whether a process
    wants to stop. Both travel between hosts: nobody waits for a device."""
    present = [classes_present(batch.labels, num_classes).sum(dim=1) for batch in batches]
    mine = torch.cat([*present, torch.tensor([int(stop)])])
    everyone = mine.repeat(process.world, 1)  # (processes, N / processes + 1)
    if process.world > 1:
        dist.all_gather(list(everyone), mine)  # into the rows
    return everyone[:, :-1].flatten(), bool(everyone[:, -1].any())


def set_rates(optimizer: torch.optim.Optimizer, options: argparse.Namespace, iteration: int) -> float:
    """Set the learning rate of each parameter group for this iteration; returns the highest, of adapter and head."""
    factor = lr_factor(iteration, options.iterations, options.warmup)
    for group in optimizer.param_groups:
        group["lr"] = options.lr * group["scale"] * factor
    return options.lr * factor


def data_parallel(model: Segmenter, process: Process, compiled: bool = False) -> nn.Module:
    """The module that the loop calls: the model; with several processes it averages gradients and batch statistics."""
    if compiled:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache() / "inductor"))  # else in /tmp, gone with the job
        model.compile()  # at its first call, as it is then: with batch norm over all processes
    if process.world == 1:
        return model
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of depth-wise convolutions, which are small
    parallel = DistributedDataParallel(convert_sync_batchnorm(model), gradient_as_bucket_view=True)
    # Batch norm that sees all images keeps its buffers equal everywhere: they need not be sent. (The argument of this
    # name is deprecated from PyTorch 2.13 on, and the one that follows it is absent before.)
    parallel.broadcast_buffers = False
    return parallel


def averaging(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
    """Inside, a backward pass averages gradients over the devices only if `enabled`; else it adds to this device's."""
    return contextlib.nullcontext() if enabled or not isinstance(model, DistributedDataParallel) else model.no_sync()


def to_device(batch: Batch, divisors: Normalizers, device: torch.device) -> tuple[Tensor, Tensor, Normalizers]:
    """What the model is called with: normalised images float32 (B, 3, w, w), labels int64 (B, w, w), normalizers."""
    images = normalize(batch.images.to(device, non_blocking=True), batch.extents)
    divisors = Normalizers(*(x.float().to(device, non_blocking=True) for x in divisors))
    return images, batch.labels.to(device, non_blocking=True).long(), divisors


def validate(model: Segmenter, dataset: SegmentationDataset, progress: run.Progress, options: argparse.Namespace,
             device: torch.device, log: run.Log | None) -> bool:
    """Log single-scale scores on the validation set and a few pictures; note the scores in `progress`.

    The processes share the images. Returns whether the scores are the best so far.
    """
    amp, bar = AMP[options.amp], log is not None and sys.stderr.isatty()
    result = metrics(evaluate(model, dataset, device=device, amp=amp, progress=bar, fast=options.fast))
    progress.validated = progress.iteration
    if result.mean_iou > progress.best:
        progress.best, progress.best_iteration = float(result.mean_iou), progress.iteration
    if log:
        classes = dataset.info.classes
        scores = {"mIoU": result.mean_iou, "mAcc": result.mean_accuracy, "aAcc": result.all_accuracy}
        scores |= {f"IoU/{name}": iou for name, iou in zip(classes, result.iou, strict=True)}
        with torch.autocast(device.type, amp, enabled=amp is not None):
            picture = draw_predictions(model, dataset, device)
        log.validation(progress.iteration, scores, table(result, classes), picture)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # validation fills the device on purpose: log what training needs
    return progress.best_iteration == progress.iteration


def draw_predictions(model: Segmenter, dataset: SegmentationDataset, device: torch.device) -> Image.Image:
    """Some images of the data set, always the same, each beside its labels and its prediction."""
    chosen, palette, rows = spread(dataset, PICTURES), dataset.info.palette, []
    with common.eval_mode(model):
        guesses = list(predictions(model, [dataset.image(i) for i in chosen], device=device))
    for i, guess in zip(chosen, guesses, strict=True):
        colours = [draw.colorize(labels, palette) for labels in (dataset.labels(i), guess.cpu().numpy())]
        rows.append([dataset.image(i), *colours])
    return draw.contact_sheet(rows)


# ------------------------------------------------------------------------------------------ what the preparation calls
def make_model(options: argparse.Namespace, state: dict, classes: Sequence[str],
               process: Process) -> tuple[Segmenter, LoadReport | None]:
    """The model on its device, from a checkpoint or new, and the report of loaded weights. Raises UserError."""
    common.allow_tf32(options.tf32)
    torch.manual_seed(options.seed)  # the same starting values on all devices
    report = None
    if state:
        if state["classes"] != list(classes):
            raise UserError(f"--data {options.data} has other classes than the run: go on with the data of its start")
        model = Segmenter(ModelConfig(**state["config"]))
        model.load_state_dict(state["model"])
    else:
        changes = {} if options.window is None else {"window": options.window}
        model = build_model(options.head, options.size, len(classes), **changes)
        if pretrained := find_pretrained(options.pretrained, options.size):
            with contextlib.redirect_stdout(None) if process.rank else contextlib.nullcontext():
                report = load_weights(model, pretrained)
    model.backbone.requires_grad_(not options.freeze_backbone)
    return model.to(process.device).train(), report


def start_stream(options: argparse.Namespace, dataset: SegmentationDataset, window: int, iteration: int,
                 process: Process) -> Iterator[Batch]:
    """This process's micro-batches from an iteration on, without end."""
    accumulation = options.global_batch // (process.world * options.batch)
    mine = positions(iteration, process.rank, process.world, options.batch, accumulation)
    stream = training_loader(dataset, window, seed=options.seed, positions=mine, workers=options.workers)
    # Every worker has started by its first batch. As the stream starts it draws from torch's RNG: restored later.
    return itertools.chain([next(stream) for _ in range(max(1, options.workers))], stream)


def start_log(options: argparse.Namespace, process: Process, folder: Path, model: Segmenter, weights: LoadReport | None,
              training: SegmentationDataset, validation: SegmentationDataset, iteration: int) -> run.Log | None:
    """On process 0: make the folder, write config.json, say what is about to run. The other processes have no log."""
    if process.rank:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    info, images = training.info, options.global_batch // process.world
    facts = {"environment": run.environment(process.device, process.world),
             "data_fingerprint": {"train": training.fingerprint(), "val": validation.fingerprint()},
             "weights": weights and {"path": weights.path, "sha256": common.sha256(Path(weights.path)),
                                     "kind": weights.kind}}
    old = run.read_config(folder) if (folder / "config.json").exists() else {}
    new = old or vars(options) | {"name": folder.name, "model": asdict(model.config), "classes": info.classes, **facts}
    new = new | {"batch": options.batch, "checkpoint_activations": options.checkpoint_activations}  # of this start
    if new != old:
        common.write_whole(folder / "config.json", lambda file: file.write(json.dumps(new, indent=1).encode()))
    epochs = options.iterations * options.global_batch / len(training)
    log = run.Log(folder, iteration, options.iterations, LOG_EVERY, epochs, process.device, images)
    log.say(f"{folder}: {options.head} {options.size}, {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"window {model.config.window}, {len(training):,} images of {len(info.classes)} classes")
    log.say(f"global batch {options.global_batch} = {process.world} device(s) x {options.batch} images x "
            f"{images // options.batch} accumulated{', activations computed twice' * options.checkpoint_activations}; "
            f"iterations {iteration} to {options.iterations}")
    for change in run.changes(new, facts):
        log.say(f"note: {change}")
    log.write(iteration, "start", facts["environment"])
    show_data(log, training, iteration)
    return log


def show_data(log: run.Log, dataset: SegmentationDataset, iteration: int) -> None:
    """Log each class's share of the labels, and the first image with its labels."""
    info, pixels = dataset.info, count_labels(dataset)
    shares = (pixels / pixels.sum()).tolist()
    shares = dict(zip(info.classes, shares, strict=False)) | {"ignored": shares[255]}
    log.write(iteration, "labels", shares)
    text = "\n".join(f"{in_percent(share):>6} %  {name}" for name, share in shares.items())
    log.tensorboard.add_text("7 data/share of the labels", f"<pre>{text}</pre>", iteration)
    picture, labels = dataset.image(0), dataset.labels(0)
    picture = draw.with_legend(draw.overlay(picture, labels, info.palette), labels, info.classes, info.palette)
    log.picture(iteration, "7 data/the first image and its labels", picture)


# --------------------------------------------------------------------------------------------------------- command line
def parser() -> common.Parser:
    """The options. None stands for the recipe's value."""
    p = common.Parser(prog="train.py", description="\n\n".join(__doc__.split("\n\n")[:2]),
                      formatter_class=argparse.RawDescriptionHelpFormatter)
    number, switch = {"type": common.positive, "metavar": "N"}, {"action": argparse.BooleanOptionalAction}
    add = p.add_argument_group("what to train").add_argument
    add("--head", choices=["mask2former", "upernet"], default="mask2former", help="default: mask2former")
    add("--size", choices=["tiny", "base", "large"], help="default: tiny for toy data, else large")
    add("--data", default=str(data.CONTEXT), metavar="DIR",
        help="plain folder, VOC2010 tree or 'toy'; default: %(default)s")
    add("--pretrained", metavar="FILE",
        help="BEiT or ViT-Adapter weights, a released model's name, or 'none'; default: BEiT's in pretrained/")
    add("--window", **number, help="side of crops and sliding window in pixels; default: the size's")
    add("--freeze-backbone", action="store_true", help="train adapter and head only")
    add = p.add_argument_group("how (other defaults: the recipe's, which head and size choose)").add_argument
    add("--global-batch", **number, default=16, help="images in a step, over all devices; default: 16")
    add("--seed", type=common.natural, default=0, metavar="N", help="default: 0")
    add("--iterations", **number, help="steps of the optimizer")
    add("--lr", type=common.rate, metavar="RATE", help="highest learning rate, of adapter and head")
    add("--validate-every", **number, help="iterations between validations")
    add("--save-every", **number, help="iterations between checkpoints")
    add("--batch", **number, help="images on a device at once; default: as many as fit its memory and its share")
    add("--checkpoint-activations", **switch,
        help="compute activations twice: less memory, a third more work; default: where memory asks for it")
    add = p.add_argument_group("on what").add_argument
    add("--device", metavar="NAME", help="cpu, cuda or mps; default: cuda if there is one")
    add("--workers", type=common.natural, default=2, metavar="N", help="data loading processes a device; default: 2")
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision; default: off")
    add("--tf32", **switch, default=True, help="TF32 matrix products on a GPU; on by default, as in the official runs")
    add("--fast", **switch, default=True, help="the fast text beside the plain one: the same numbers to rounding")
    add("--compile", action="store_true", help="torch.compile the model: minutes at the first start, then faster")
    add = p.add_argument_group("the run").add_argument
    add("--name", help="of the folder in runs/; default: HEAD-SIZE-DATA")
    add("--doctor", action="store_true", default=argparse.SUPPRESS,
        help="tell what this run needs, what of it is absent and how to get it; start nothing")
    add("--resume", nargs="?", const="", metavar="RUN", help="go on with this run and its options; no RUN: the newest")
    return p


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options from the command line, else from the resumed run, else from the recipe. Raises UserError.

    The layout (`batch`, `checkpoint_activations`) may stay None: it is chosen when the model is on its device.
    """
    p = parser()
    options = p.parse_args(arguments)
    if options.resume is not None:
        folder = run.find_run(options.resume)
        earlier = run.read_config(folder)
        p.set_defaults(**earlier | {"batch": None, "earlier_batch": earlier.get("batch")})
        options = p.parse_args([*arguments, "--resume", str(folder)])
        for name in ("head", "size", "window", "freeze_backbone"):
            if getattr(options, name) != earlier.get(name):
                raise UserError(f"{folder} was begun with another --{name.replace('_', '-')}: leave the option out, "
                                "or start a new run")
    options.size = options.size or ("tiny" if options.data == "toy" else "large")
    recipe = RECIPES[options.head, options.size]
    length = (options.iterations or recipe.iterations) / recipe.iterations
    scaled = {"warmup": round(recipe.warmup * length),
              "validate_every": max(1, round(recipe.validate_every * min(1, length)))}
    for name, value in (asdict(recipe) | scaled).items():
        if name not in ("batch", "checkpoint_activations") and getattr(options, name, None) is None:
            setattr(options, name, value)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Exit status 2 for a user's fault or too small a GPU, 1 for a loss that is not finite, 130 for an
    early Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = parse(arguments)
        recipe = RECIPES[options.head, options.size]
        if "doctor" in options:
            sys.exit(doctor.show(options, recipe, int(os.environ.get("WORLD_SIZE", 1))))
        try:
            process = run.join_processes(options.device)
        except UserError:  # the device's: told with all else that is absent, unless there are other processes
            if "RANK" not in os.environ:
                doctor.check(options, recipe, world=1)
            raise
        if options.resume is None and run.restarted(process) and (folder := run.newest_run_of(sys.argv)):
            options = parse([*arguments, "--resume", str(folder)])
        train(options, process)
    except (UserError, OSError) as error:
        sys.exit(common.complain(str(error)))
    except torch.OutOfMemoryError:
        sys.exit(common.complain("the GPU's memory ran out: go on with --resume and a smaller --batch (or "
                                 "--checkpoint-activations), or start anew with --amp bf16"))
    except KeyboardInterrupt:
        sys.exit(common.complain("interrupted; what was saved is whole, and --resume goes on from there", 130))
    run.leave_processes()


if __name__ == "__main__":
    main()
