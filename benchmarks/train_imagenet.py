"""Trains a ResNet with any row of the table of methods on ImageNet, or images stored like it, on
one host or many.

    python -m benchmarks.train_imagenet --data /data/imagenet --norm group
    python -m benchmarks.train_imagenet --data /data/imagenet --norm batch --schedule steps
    --label-smoothing 0

Writes metrics.jsonl, a line per step and per evaluation, and checkpoints, from which --resume goes
on as if nothing had happened. The second command is the recipe of Wu & He 2018 (arXiv:1803.08494)
on 8 devices. With several processes each runs the same command, and all write to the same folder.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import grain
import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.imagenet import data
from benchmarks.imagenet.placement import Jit, Placement, Pmap, replicated
from benchmarks.imagenet.steps import METHODS, State, Trainer, learning_rate, network, sgd
from benchmarks.interrupt import deferred_interrupt
from benchmarks.timing import positive
from jaxnorm import Method

IMAGES_PER_RATE = 256
"""The batch to which --learning-rate belongs; with others the rate is scaled in proportion."""

MAY_CHANGE = {
    "data",
    "output",
    "resume",
    "save_every",
    "keep",
    "distributed",
    "coordinator",
    "process_id",
}
"""Options that a resumed run may have otherwise: no number depends on them, nor what a checkpoint
looks like."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not (args.distributed or args.coordinator) and (args.num_processes, args.process_id) != (
        None,
        None,
    ):
        parser.error(
            "--num-processes and --process-id belong to --coordinator; on a pod --distributed finds"
            " them"
        )
    if args.distributed or args.coordinator:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    try:
        images = data.find(args.data, args.num_classes)
        method = _method(args, images)
        _start(args, images)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    console = Console(
        quiet=jax.process_index() > 0, width=None if sys.stdout.isatty() else 120, highlight=False
    )
    try:
        _train(args, images, method, console)
    except KeyboardInterrupt:
        console.print(f"Interrupted. --resume goes on from the last checkpoint in {args.output}.")
        return 130
    console.print(f"In {args.output}: metrics.jsonl, settings.json, checkpoints")
    return 0


def _method(args: argparse.Namespace, images: data.Images) -> Method:
    """The normalization asked for, once all options are known to fit together; ValueError
    otherwise."""
    devices = jax.device_count()
    if args.batch % devices:
        raise ValueError(
            f"--batch {args.batch} is not a multiple of the {devices} devices that share it."
        )
    if args.batch > len(images.train):
        raise ValueError(
            f"--batch {args.batch} is more than the {len(images.train)} training images."
        )
    if not 0 <= args.warmup_epochs < args.epochs:
        raise ValueError(
            f"--warmup-epochs {args.warmup_epochs:g} is not from 0 to less than --epochs"
            f" {args.epochs}."
        )
    if devices % args.devices_per_norm:
        raise ValueError(
            f"--devices-per-norm {args.devices_per_norm} does not divide the {devices} devices."
        )
    if args.norm in ("ghost_batch", "batch_and_group") and args.batch // devices % args.ghost_size:
        raise ValueError(
            f"--ghost-size {args.ghost_size} does not divide the {args.batch // devices} images of"
            " a device."
        )
    method = METHODS[args.norm](args.num_groups, args.ghost_size)
    if args.devices_per_norm > 1 and method.groups.batch != 1:
        raise ValueError(
            "--devices-per-norm is for methods that pool the whole batch, not for --norm"
            f" {args.norm}."
        )
    for stage in range(len(args.stages)):
        for channels in (args.width * 2**stage, args.width * 2 ** (stage + 2)):
            method.shape((args.batch, 1, 1, channels))
    return method


def _start(args: argparse.Namespace, images: data.Images) -> None:
    """Makes the output folder; ValueError where it belongs to another run."""
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    settings |= {
        "num_classes": images.num_classes,
        "train_images": len(images.train),
        "val_images": len(images.val),
    }
    settings |= {"devices": jax.device_count(), "num_processes": jax.process_count()}
    file = args.output / "settings.json"
    if file.exists():
        if not args.resume:
            raise ValueError(
                f"{args.output} already holds a run: continue it with --resume or choose another"
                " --output."
            )
        old = json.loads(file.read_text())
        changed = [
            f"{name} {old.get(name)}, not {value}"
            for name, value in settings.items()
            if old.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{args.output} cannot be resumed, because it was made with {'; '.join(changed)}."
            )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all have seen which run the output folder holds")
    if jax.process_index() == 0:
        args.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=1))


def _train(args: argparse.Namespace, images: data.Images, method: Method, console: Console) -> None:
    """Trains from the last checkpoint, or else from the start, to the last epoch."""
    placement = Pmap() if args.pmap else Jit()
    epoch = len(images.train) // args.batch
    total = epoch * args.epochs
    trainer = _trainer(args, method, placement, images.num_classes, epoch)
    train = placement.compile(trainer.train, donate=(0,))
    evaluate = placement.compile(trainer.evaluate)
    options = {
        "batch": args.batch,
        "num_classes": images.num_classes,
        "size": args.image_size,
        "workers": args.workers,
    }
    batches = data.training_batches(images.train, seed=args.seed, **options)
    held_out = data.evaluation_batches(images.val, **options)

    with _checkpoints(args) as checkpoints, _progress(console) as progress:
        step, state = _restore(checkpoints, trainer, batches, args)
        bar = progress.add_task("", total=total, completed=step)
        state = placement.load(state)
        with (
            _log(args.output, step) as log,
            deferred_interrupt(lambda: console.print("Stopping after this step.")) as check,
        ):
            ahead = None
            while step < total:
                started = time.perf_counter()
                state, metrics = train(state, ahead or placement.batch(next(batches)))
                step += 1
                ends, saves = step % epoch == 0, step % args.save_every == 0 or step == total
                # The next batch is read while the devices compute, but not before a checkpoint,
                # which would miss it.
                ahead = None if ends or saves else placement.batch(next(batches))
                values = {name: placement.value(x) for name, x in metrics.items()}
                log(
                    {"step": step}
                    | values
                    | {"images_per_second": args.batch / (time.perf_counter() - started)}
                )
                progress.update(bar, completed=step, description=f"loss {values['loss']:.3f}")
                if ends:
                    found = _evaluate(evaluate, state, held_out, placement)
                    log({"step": step, "epoch": step // epoch} | found)
                    summary = ", ".join(
                        f"{name} {value:.2f}"
                        for name, value in found.items()
                        if name != "val_images"
                    )
                    console.print(f"epoch {step // epoch} of {args.epochs}: {summary}")
                if saves:
                    saved = {"state": ocp.args.StandardSave(placement.unload(state))}
                    checkpoints.save(
                        step,
                        args=ocp.args.Composite(
                            **saved, batches=grain.checkpoint.CheckpointSave(batches)
                        ),
                    )
                check()


def _trainer(
    args: argparse.Namespace, method: Method, placement: Placement, num_classes: int, epoch: int
) -> Trainer:
    model = network(
        method,
        devices=jax.device_count(),
        devices_per_norm=args.devices_per_norm,
        mapped=args.pmap,
        stages=tuple(args.stages),
        width=args.width,
        num_classes=num_classes,
        dtype=args.dtype,
    )
    schedule = learning_rate(
        args.schedule,
        peak=args.learning_rate * args.batch / IMAGES_PER_RATE,
        steps=epoch * args.epochs,
        warmup_steps=round(epoch * args.warmup_epochs),
    )
    optimizer = sgd(schedule, weight_decay=args.weight_decay, decay_norm=args.decay_norm)
    return Trainer(model, optimizer, schedule, args.label_smoothing, placement.axis)


def _evaluate(
    evaluate: Callable[..., dict[str, jax.Array]],
    state: Any,
    batches: Iterator[Any] | Any,
    placement: Placement,
) -> dict[str, float]:
    """Mean loss and accuracies in % over all images, with the running statistics."""
    found = [evaluate(state, placement.batch(batch)) for batch in batches]
    sums = {name: sum(placement.value(one[name]) for one in found) for name in found[0]}
    images = sums.pop("images")
    return {
        "val_images": images,
        "val_loss": sums["loss"] / images,
        "val_top1": 100 * sums["top1"] / images,
        "val_top5": 100 * sums["top5"] / images,
    }


def _checkpoints(args: argparse.Namespace) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=args.keep)
    return ocp.CheckpointManager((args.output / "checkpoints").absolute(), options=options)


def _restore(
    checkpoints: ocp.CheckpointManager, trainer: Trainer, batches: Any, args: argparse.Namespace
) -> tuple[int, State]:
    """Step and state of the last checkpoint, with `batches` set to what follows it, or the first
    ones."""
    initialize = jax.jit(
        partial(trainer.initialize, size=args.image_size), out_shardings=replicated()
    )
    key = jax.random.key(args.seed)
    step = checkpoints.latest_step()
    if step is None:
        return 0, initialize(key)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated()),
        jax.eval_shape(initialize, key),
    )
    saved = {"state": ocp.args.StandardRestore(like)}
    restored = checkpoints.restore(
        step, args=ocp.args.Composite(**saved, batches=grain.checkpoint.CheckpointRestore(batches))
    )
    return step, restored["state"]


@contextmanager
def _log(output: Path, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Appends to metrics.jsonl, from which the lines after `step`, which are to come again, are
    taken away first."""
    if jax.process_index() > 0:
        yield lambda line: None
        return
    path = output / "metrics.jsonl"
    old = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in old if line.endswith("\n") and json.loads(line)["step"] <= step]
    with open(path, "w") as file:
        file.writelines(kept)
        yield partial(_write, file)


def _write(file: TextIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


def _progress(console: Console) -> Progress:
    left = TextColumn("left"), TimeRemainingColumn()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *left,
    )
    return Progress(*columns, console=console, disable=console.quiet, speed_estimate_period=600)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_imagenet",
        description=(
            "Trains a ResNet with any row of the table of methods on ImageNet or on images stored"
            " like it."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, metavar="FOLDER", help="with train/ and val/, each with a folder of image files per class, or "
        "with ArrayRecord files as TFDS writes them; or tfds:NAME")  # fmt: skip
    add("--num-classes", type=positive, metavar="N", help="needed for ArrayRecord files")
    add(
        "--image-size",
        type=positive,
        default=224,
        metavar="PIXELS",
        help="side of the squares that are cut out",
    )
    add(
        "--workers",
        type=_count,
        default=0,
        metavar="N",
        help="processes that decode; 0 decodes in threads of this one",
    )
    add = parser.add_argument_group("network").add_argument
    add(
        "--norm",
        choices=METHODS,
        default="batch",
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}",
    )
    add(
        "--num-groups",
        type=positive,
        default=32,
        metavar="G",
        help="channel groups, of methods that have them",
    )
    add(
        "--ghost-size",
        type=positive,
        default=16,
        metavar="B",
        help="images in a ghost batch, of methods that have them",
    )
    add(
        "--devices-per-norm",
        type=positive,
        default=1,
        metavar="K",
        help="devices whose images batch and batch_group pool",
    )
    add(
        "--stages",
        type=positive,
        nargs="+",
        default=[3, 4, 6, 3],
        metavar="N",
        help="blocks in each stage",
    )
    add("--width", type=positive, default=64, metavar="C", help="channels of the stem")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the activations")
    add = parser.add_argument_group("training").add_argument
    add(
        "--batch",
        type=positive,
        default=256,
        metavar="N",
        help="images per step, on all devices together",
    )
    add("--epochs", type=positive, default=100, metavar="N")
    add(
        "--learning-rate",
        type=float,
        default=0.1,
        metavar="RATE",
        help=f"for a batch of {IMAGES_PER_RATE}; scaled for others",
    )
    add(
        "--schedule",
        choices=("cosine", "steps"),
        default="cosine",
        help="steps: a tenth at 30, 60 and 90 %% of the epochs",
    )
    add(
        "--warmup-epochs", type=float, default=5, metavar="N", help="in which the rate rises from 0"
    )
    add("--label-smoothing", type=float, default=0.1, metavar="PART")
    add("--weight-decay", type=float, default=1e-4, metavar="RATE")
    add(
        "--decay-norm",
        choices=("none", "zero"),
        default="zero",
        help="decay scales and biases to zero as well, or not at all",
    )
    add(
        "--seed", type=_count, default=0, metavar="N", help="of initial parameters, order and crops"
    )
    add = parser.add_argument_group("output").add_argument
    add(
        "--output",
        type=Path,
        default=Path("results/imagenet"),
        metavar="FOLDER",
        help="for metrics.jsonl and checkpoints",
    )
    add(
        "--save-every",
        type=positive,
        default=1000,
        metavar="STEPS",
        help="between checkpoints; there is one at the end, too",
    )
    add("--keep", type=positive, default=3, metavar="N", help="checkpoints to keep")
    add(
        "--resume",
        action="store_true",
        help="go on with the run in the output folder, where there is one",
    )
    add = parser.add_argument_group("devices").add_argument
    add(
        "--pmap",
        action="store_true",
        help="a copy of the program per device, instead of one by jit on a mesh of them",
    )
    add(
        "--distributed",
        action="store_true",
        help="several processes that find each other, as on TPU pods and under Slurm",
    )
    add("--coordinator", metavar="HOST:PORT", help="or: where process 0 listens, with the next two")
    add("--num-processes", type=positive, metavar="N")
    add("--process-id", type=_count, metavar="I", help="of this process, from 0")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
