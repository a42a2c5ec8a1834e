"""Trains a ResNet with any row of the table of methods on ImageNet, or images stored like it, on
one host or many.

    python -m benchmarks.train_imagenet --data /data/imagenet --norm group
    python -m benchmarks.train_imagenet --data /data/imagenet --norm batch --schedule steps \\
        --label-smoothing 0

Writes metrics.jsonl, with a line for each step and each evaluation, and checkpoints, from which
--resume continues as if the run had not been interrupted. The second command is the recipe of Wu &
He 2018 (arXiv:1803.08494) on 8 devices. With several processes each runs the same command, and all
write to the same folder.

Each checkpoint has checksums of its files. If the last one is damaged, --resume moves it into the
folder damaged/, says so, and resumes from the last intact one; if none is intact it stops. When one
process cannot continue, because an image cannot be read or a loss is not finite, all of them end,
without a checkpoint.
"""

import argparse
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.files import check_writable, locked, make_folder, read_json, write
from benchmarks.imagenet import data
from benchmarks.imagenet.checkpoints import Checkpoints, newest
from benchmarks.imagenet.placement import Jit, Placement, Pmap, replicated
from benchmarks.imagenet.processes import Stop, gather, stop_together
from benchmarks.imagenet.steps import (
    METHODS,
    State,
    Trainer,
    all_finite,
    learning_rate,
    network,
    row_named,
    sgd,
)
from benchmarks.interrupt import deferred_interrupt
from benchmarks.options import count, method_among, number, positive
from jaxnorm import Row, Size

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

SAME = ("output", "resume", "save_every", "keep")
"""Those among them that are the same in all processes."""

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    _connect(parser, args)
    console = Console(
        quiet=jax.process_index() > 0, width=None if sys.stdout.isatty() else 120, highlight=False
    )
    status = 1
    try:
        return _run(parser, args, console)
    except Stop as stop:
        print(f"{parser.prog}: error: {stop}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        console.print(f"Interrupted. --resume continues from the last checkpoint in {args.output}.")
        status = 130
    except OSError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    if jax.process_count() > 1:
        # The others have not stopped: an ordinary exit would wait for them, and they for this one.
        # Where the connection to this one ends, they do, too.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _connect(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Finds the other processes, where there are any."""
    several = (args.num_processes, args.process_id)
    if args.coordinator and None in several:
        parser.error("--coordinator needs --num-processes and --process-id, too")
    if args.coordinator and not re.fullmatch(r".+:\d+", args.coordinator):
        parser.error(f"argument --coordinator: expected HOST:PORT, got {args.coordinator!r}")
    if args.coordinator and args.process_id >= args.num_processes:
        parser.error(
            f"argument --process-id: expected 0 to {args.num_processes - 1}, got {args.process_id}"
        )
    if not (args.distributed or args.coordinator) and several != (None, None):
        parser.error(
            "--num-processes and --process-id belong to --coordinator; on a pod --distributed "
            "finds them"
        )
    if args.distributed or args.coordinator:
        try:
            jax.distributed.initialize(args.coordinator, *several)
        except (ValueError, RuntimeError) as error:
            parser.error(
                f"the processes did not find each other: {error} --distributed is for clusters "
                "that JAX knows, such as TPU pods and Slurm; elsewhere give --coordinator, "
                "--num-processes and --process-id."
            )


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace, console: Console) -> int:
    with ExitStack() as held:
        try:
            images, method = _together(lambda: _find(args))
            settings = _settings(args, images)
            _compare(args, settings)
            step = _together(lambda: _start(args, settings, held, console))
            step = int(gather(str(step))[0])
            _together(lambda: check_writable(args.output))
        except Stop as stop:
            parser.error(str(stop))
        _train(args, images, method, console, step)
    console.print(f"In {args.output}: metrics.jsonl, settings.json, checkpoints")
    return 0


def _together(f: Callable[[], T]) -> T:
    """f() in each process; Stop in all of them where one's options, data or files do not do."""
    try:
        result, problem = f(), None
    except (ValueError, OSError) as error:
        result, problem = None, str(error)
    stop_together(problem)
    return cast(T, result)


def _find(args: argparse.Namespace) -> tuple[data.Images, Row]:
    images = data.find(args.data, args.num_classes)
    return images, _method(args, images)


def _method(args: argparse.Namespace, images: data.Images) -> Row:
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
            f"--warmup-epochs {args.warmup_epochs:g} is not from 0 to less than --epochs "
            f"{args.epochs}."
        )
    if devices % args.devices_per_norm:
        raise ValueError(
            f"--devices-per-norm {args.devices_per_norm} does not divide the {devices} devices."
        )
    method = row_named(args.norm, args.num_groups, args.ghost_size)
    groups: Any = method.groups
    if isinstance(groups.batch, Size) and args.batch // devices % groups.batch.n:
        raise ValueError(
            f"--ghost-size {groups.batch.n} does not divide the {args.batch // devices} images of "
            "a device."
        )
    if args.devices_per_norm > 1 and groups.batch != 1:
        raise ValueError(
            "--devices-per-norm is for methods that pool the whole batch, not for --norm "
            f"{args.norm}."
        )
    for stage in range(len(args.stages)):
        for channels in (args.width * 2**stage, args.width * 2 ** (stage + 2)):
            method.shape((args.batch, 1, 1, channels))
    return method


def _settings(args: argparse.Namespace, images: data.Images) -> dict[str, Any]:
    """What the numbers of a run depend on."""
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    settings |= {
        "num_classes": images.num_classes,
        "train_images": len(images.train),
        "val_images": len(images.val),
    }
    return settings | {"devices": jax.device_count(), "num_processes": jax.process_count()}


def _compare(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Stop where the processes were started with different options or see different data."""
    ours = {name: str(vars(args)[name]) for name in SAME} | settings
    first, *others = (json.loads(text) for text in gather(json.dumps(ours)))
    for index, other in enumerate(others, start=1):
        if differing := [name for name in first if first[name] != other[name]]:
            values = (f"{name} {other[name]}, not {first[name]}" for name in differing)
            raise Stop(f"process {index} differs from process 0: it has {'; '.join(values)}.")


def _start(
    args: argparse.Namespace, settings: dict[str, Any], held: ExitStack, console: Console
) -> int:
    """Takes the output folder for this run until `held` ends, and returns the step to go on from;
    ValueError where it belongs to another run."""
    if jax.process_index() > 0:
        return 0
    make_folder(args.output)
    held.enter_context(locked(args.output))
    file, folder = args.output / "settings.json", args.output / "checkpoints"
    if file.exists():
        if not args.resume:
            raise ValueError(
                f"{args.output} already holds a run: continue it with --resume or choose another "
                "--output."
            )
        old = read_json(file)
        changed = [
            f"{name} {old.get(name)}, not {value}"
            for name, value in settings.items()
            if old.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{args.output} cannot be resumed, because it was made with {'; '.join(changed)}."
            )
    elif folder.exists() or (args.output / "metrics.jsonl").exists():
        raise ValueError(
            f"{args.output} holds a run without its settings.json. Put a copy there, or choose "
            "another --output."
        )
    else:
        write(file, json.dumps(settings, indent=1))
    step, told = newest(folder, args.output / "damaged")
    for line in told:
        console.print(f"[bold]{escape(line)}[/bold]")
    return step or 0


def _train(
    args: argparse.Namespace, images: data.Images, method: Row, console: Console, step: int
) -> None:
    """Trains from `step`, where there is a checkpoint unless it is 0, to the last epoch."""
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
    nothing, nothing_held_out = (
        data.unread(args.batch, args.image_size, weighted=weighted) for weighted in (False, True)
    )

    with (
        Checkpoints(args.output / "checkpoints", args.keep) as checkpoints,
        _progress(console) as progress,
    ):
        state = placement.load(_restore(checkpoints, step, trainer, batches, args))
        reader = data.Reader(batches, nothing)
        bar = progress.add_task("", total=total, completed=step)
        saved = step
        with (
            _log(args.output, step) as log,
            deferred_interrupt(lambda: console.print("Stopping after this step.")) as check,
        ):
            ahead = None
            while step < total:
                started = time.perf_counter()
                state, metrics = train(state, ahead or placement.batch(next(reader)))
                step += 1
                ends, saves = step % epoch == 0, step % args.save_every == 0 or step == total
                # The next batch is read while the devices compute, but not before a checkpoint,
                # which would miss it.
                ahead = None if ends or saves else placement.batch(next(reader))
                values = {name: placement.value(x) for name, x in metrics.items()}
                if values.pop("unread"):
                    stop_together(reader.error)
                if not math.isfinite(values["loss"]):
                    raise _diverged(f"The loss is {values['loss']}", step, saved, args)
                log(
                    {"step": step}
                    | values
                    | {"images_per_second": args.batch / (time.perf_counter() - started)}
                )
                progress.update(bar, completed=step, description=f"loss {values['loss']:.3f}")
                if ends:
                    all_held_out = data.Reader(iter(held_out), nothing_held_out)
                    number_of = -(-len(images.val) // args.batch)
                    found = _evaluate(evaluate, state, all_held_out, number_of, placement)
                    log({"step": step, "epoch": step // epoch} | found)
                    summary = ", ".join(
                        f"{name} {value:.2f}"
                        for name, value in found.items()
                        if name != "val_images"
                    )
                    console.print(f"epoch {step // epoch} of {args.epochs}: {summary}")
                if saves:
                    whole = placement.unload(state)
                    if not all_finite(whole):
                        raise _diverged(
                            "Parameters or statistics are not finite", step, saved, args
                        )
                    checkpoints.save(step, whole, batches)
                    saved = step
                check()


def _diverged(what: str, step: int, saved: int, args: argparse.Namespace) -> Stop:
    kept = f"The last checkpoint is that of step {saved}" if saved else "There is no checkpoint yet"
    return Stop(
        f"{what} after step {step}. {kept}, and nothing was saved since. Start again with another "
        f"--output and a --learning-rate below {args.learning_rate:g} or more --warmup-epochs."
    )


def _trainer(
    args: argparse.Namespace, method: Row, placement: Placement, num_classes: int, epoch: int
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
    batches: data.Reader,
    number_of: int,
    placement: Placement,
) -> dict[str, float]:
    """Mean loss and accuracies in % over all images, with the running statistics."""
    found = []
    for batch in islice(batches, number_of):
        found.append(evaluate(state, placement.batch(batch)))
        # The one before, so that the devices have something to do meanwhile.
        if any(placement.value(one["unread"]) for one in found[-2:-1]):
            break
    sums = {name: sum(placement.value(one[name]) for one in found) for name in found[0]}
    if sums.pop("unread"):
        stop_together(batches.error)
    images = sums.pop("images")
    return {
        "val_images": images,
        "val_loss": sums["loss"] / images,
        "val_top1": 100 * sums["top1"] / images,
        "val_top5": 100 * sums["top5"] / images,
    }


def _restore(
    checkpoints: Checkpoints, step: int, trainer: Trainer, batches: Any, args: argparse.Namespace
) -> State:
    """The state after `step`, with `batches` set to what follows it, or the first one."""
    initialize = jax.jit(
        partial(trainer.initialize, size=args.image_size), out_shardings=replicated()
    )
    key = jax.random.key(args.seed)
    if step == 0:
        return initialize(key)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated()),
        jax.eval_shape(initialize, key),
    )
    return checkpoints.restore(step, like, batches)


@contextmanager
def _log(output: Path, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Appends to metrics.jsonl, from which the lines after `step`, which are to come again, are
    taken away first, in one step."""
    if jax.process_index() > 0:
        yield lambda line: None
        return
    path = output / "metrics.jsonl"
    old = path.read_text() if path.exists() else ""
    kept = "".join(line for line in old.splitlines(keepends=True) if _stays(line, step))
    if kept != old:
        write(path, kept)
    with open(path, "a") as file:
        yield partial(_write, file)


def _stays(line: str, step: int) -> bool:
    """Whether a line is whole and of `step` or before. One that was damaged later is left alone."""
    if not line.endswith("\n"):
        return False  # cut off by a kill
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return True


def _write(file: TextIO, line: dict[str, Any]) -> None:
    """Writes a line; what is not finite, which JSON does not have, as null."""
    line = {name: value if math.isfinite(value) else None for name, value in line.items()}
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
            "Trains a ResNet with any row of the table of methods on ImageNet or on images stored "
            "like it."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        required=True,
        metavar="FOLDER",
        help="with train/ and val/, each with a folder of image files per class, or with "
        "ArrayRecord files as TFDS writes them; or tfds:NAME",
    )
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
        type=count,
        default=0,
        metavar="N",
        help="processes that decode; 0 decodes in threads of this one",
    )
    add = parser.add_argument_group("network").add_argument
    add(
        "--norm",
        type=method_among(METHODS),
        default="batch",
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}, or any row of the table such as group_norm:group_size=16",
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
        type=number(above=0),
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
        "--warmup-epochs",
        type=number(at_least=0),
        default=5,
        metavar="N",
        help="in which the rate rises from 0",
    )
    add(
        "--label-smoothing",
        type=number(at_least=0, below=1),
        default=0.1,
        metavar="PART",
        help="of the target that all classes share",
    )
    add(
        "--weight-decay",
        type=number(at_least=0),
        default=1e-4,
        metavar="RATE",
        help="of kernels; times the learning rate, in each step",
    )
    add(
        "--decay-norm",
        choices=("none", "zero"),
        default="zero",
        help="decay scales and biases to zero as well, or not at all",
    )
    add("--seed", type=count, default=0, metavar="N", help="of initial parameters, order and crops")
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
    add("--process-id", type=count, metavar="I", help="of this process, from 0")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
