"""How accuracy depends on the batch size: the same small network with different normalizations on
real images.

    python -m benchmarks.batch_size          # BN and BGN at 2, 4 and 32 images per device, and GN
    python -m benchmarks.batch_size --full   # seven methods, all batch sizes, 8 seeds
    python -m benchmarks.batch_size --methods evonorm_s0 cross_iteration   # other methods by name

The first takes a minute on 2 cores and the second three.

Prints test accuracies and their paired differences; writes results.json, results.csv and
batch_size.png. Each cell (a method at a batch size) is written as soon as all its seeds are
trained, so an interrupted run resumes with --resume.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import report, training
from benchmarks.datasets import load
from benchmarks.files import locked, make_folder
from benchmarks.interrupt import deferred_interrupt
from benchmarks.norms import METHODS, TABLE, Layer, named
from benchmarks.options import method_among, positive
from benchmarks.residual import STRIDES, WIDTHS, ResidualNet
from benchmarks.results import Cell, Result, Settings, interval, machine, versions
from benchmarks.training import IMAGES_PER_STEP

COMPILE_EPOCHS = 60
"""Compiling a cell takes about as long as so many epochs; the progress bar counts it so."""


class Preset(NamedTuple):
    """Values of the options that are not given."""

    methods: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    seeds: int


QUICK = Preset(methods=("batch", "batch_group", "group"), batch_sizes=(2, 4, 32), seeds=4)
FULL = Preset(methods=TABLE, batch_sizes=(2, 4, 8, 16, 32), seeds=8)


class Plan(NamedTuple):
    """A cell to train. `batch_size` is None where it cannot matter."""

    method: str
    batch_size: int | None
    layers: tuple[Layer, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    parser = _parser()
    args = _parse(parser, argv)
    try:
        plans = _plans(args)
    except ValueError as error:  # a method does not split the channels or the batch
        parser.error(str(error))
    console = Console()
    started = time.perf_counter()
    with ExitStack() as held:
        result = _start(parser, args, held)
        try:
            _train(result, plans, args.output, console)
        except KeyboardInterrupt:
            console.print(
                f"Interrupted. Finished cells, kept in {args.output}: {len(result.cells)}. Go on "
                "with --resume."
            )
            return 130
        _write(result, args.output)
    report.print_all(console, result)
    seconds = time.perf_counter() - started
    console.print(
        f"\n{seconds:.0f} s. In {args.output}: batch_size.png, results.json, results.csv",
        highlight=False,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.batch_size",
        description=(
            "Trains the same small network with different normalizations at different batch sizes."
        ),
    )
    add = parser.add_argument
    add(
        "--full",
        action="store_true",
        help="seven methods, all batch sizes, 8 seeds; about three minutes on 2 cores",
    )
    add(
        "--methods",
        nargs="+",
        type=method_among(METHODS),
        metavar="METHOD",
        help=f"some of {', '.join(METHODS)}, or others as evonorm_s0:8",
    )
    add("--batch-sizes", nargs="+", type=positive, metavar="B", help="images normalized together")
    add(
        "--seeds",
        type=positive,
        metavar="N",
        help="train with seeds 0 to N - 1 (default: 4; with --full: 8)",
    )
    add(
        "--epochs",
        type=positive,
        default=20,
        metavar="N",
        help="at least 2 (default: %(default)s)",
    )
    add(
        "--train-images",
        type=positive,
        default=1024,
        metavar="N",
        help="the rest tests (default: %(default)s)",
    )
    add(
        "--network",
        choices=STRIDES[8],
        default="1x1",
        help="size of the last feature map (default: %(default)s)",
    )
    add(
        "--protocol",
        choices=("devices", "batch"),
        default="devices",
        help=(
            f"devices: {IMAGES_PER_STEP} images per step on {IMAGES_PER_STEP}/B simulated devices; "
            "batch: B images per step on one device (default: %(default)s)"
        ),
    )
    add(
        "--output",
        type=Path,
        default=Path("results/batch_size"),
        metavar="FOLDER",
        help="default: %(default)s",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="keep the cells that the output folder holds"
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="replace the result that the output folder holds"
    )
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with those not given taken from the preset and those that do not fit together
    refused."""
    args = parser.parse_args(argv)
    for name, value in (FULL if args.full else QUICK)._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.methods = list(dict.fromkeys(args.methods))
    args.batch_sizes = sorted(set(args.batch_sizes))
    if args.epochs < 2:
        parser.error(
            "argument --epochs: expected at least 2, because the first epoch only warms the "
            "learning rate up"
        )
    num_images = len(load("digits").train.labels)
    if args.train_images > num_images - 2:
        parser.error(
            f"argument --train-images: there are {num_images} images, and 2 or more are needed for "
            "evaluation"
        )
    for size in args.batch_sizes:
        if args.protocol == "devices" and IMAGES_PER_STEP % size:
            parser.error(
                f"argument --batch-sizes: {size} does not divide the {IMAGES_PER_STEP} images of a "
                "step"
            )
    for step in {IMAGES_PER_STEP} if args.protocol == "devices" else args.batch_sizes:
        if args.train_images % step:
            parser.error(
                f"argument --train-images: {args.train_images} is not a multiple of {step} images "
                "per step"
            )
    return args


def _start(parser: argparse.ArgumentParser, args: argparse.Namespace, held: ExitStack) -> Result:
    """The result to add to: the one in the output folder with --resume, else an empty one. No other
    run has the folder until `held` ends."""
    try:
        make_folder(args.output)
        held.enter_context(locked(args.output))
    except OSError as error:
        parser.error(f"argument --output: {error}")
    except ValueError as error:
        parser.error(str(error))
    new = Result(
        Settings(args.network, args.protocol, args.seeds, args.epochs, args.train_images),
        versions(),
        machine(),
    )
    if args.overwrite or not Result.exists(args.output):
        return new
    if not args.resume:
        parser.error(
            f"{args.output} already holds a result: continue it with --resume, replace it with "
            "--overwrite or choose another folder with --output"
        )
    try:
        old = Result.load(args.output)
    except ValueError as error:
        parser.error(str(error))
    changed = [f"{key} {was}, not {now}" for key, was, now in old.conflicts(new)]
    if changed:
        parser.error(f"cannot resume {args.output}, because it was made with {'; '.join(changed)}")
    return old


def _plans(args: argparse.Namespace) -> list[Plan]:
    """The cells asked for: one per batch size, or one alone where the batch size cannot matter."""
    plans = []
    for method in args.methods:
        for size in args.batch_sizes:
            layers = tuple(named(method).at(size, width) for width in WIDTHS)
            matters = args.protocol == "batch" or any(layer.pools_batch for layer in layers)
            plans.append(Plan(method, size if matters else None, layers))
    return list(dict.fromkeys(plans))


def _train(result: Result, plans: Sequence[Plan], output: Path, console: Console) -> None:
    """Adds the cells that `result` lacks, and writes it after each."""
    missing = [plan for plan in plans if result.get(plan.method, plan.batch_size) is None]
    units = COMPILE_EPOCHS + result.settings.epochs

    def on_interrupt() -> None:
        console.print("Stopping as soon as this epoch or compilation is done.")

    with _progress(console) as progress, deferred_interrupt(on_interrupt) as check_interrupt:
        task = progress.add_task("", total=len(missing) * units)
        for index, plan in enumerate(missing):
            progress.update(task, description=report.title(plan.method, plan.batch_size))

            def on_epoch(done: int, before: int = index * units) -> None:
                progress.update(task, completed=before + COMPILE_EPOCHS + done)
                check_interrupt()

            cell = _cell(result, plan, on_epoch)
            result.cells.append(cell)
            _write(result, output)
            progress.update(task, completed=(index + 1) * units)
            console.print(f"{report.title(*plan[:2])}: {interval(cell.test)} %", highlight=False)
        progress.update(task, description="all trained")


def _write(result: Result, output: Path) -> None:
    result.save(output)
    report.draw(result, output / "batch_size.png")


def _progress(console: Console) -> Progress:
    left = TextColumn("left"), TimeRemainingColumn()
    # Compiling and training advance the bar unevenly, so the time left is estimated from the whole
    # run.
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), *left)
    return Progress(*columns, console=console, speed_estimate_period=3600)


def _cell(result: Result, plan: Plan, on_epoch: Callable[[int], None]) -> Cell:
    """Trains what `plan` says, or shares the training of a finished cell whose norms are all the
    same."""
    norms = [str(layer) for layer in plan.layers]
    twin = result.twin(plan.batch_size, norms)
    if twin:
        source = twin.same_run_as or twin.name
        return replace(
            twin, method=plan.method, same_run_as=source, compile_seconds=0.0, train_seconds=0.0
        )
    settings = result.settings
    images = IMAGES_PER_STEP if plan.batch_size is None else plan.batch_size
    outcome = training.train(
        ResidualNet(plan.layers, STRIDES[8][settings.network]),
        range(settings.seeds),
        data=load("digits"),
        num_train=settings.train_images,
        devices=IMAGES_PER_STEP // images if settings.protocol == "devices" else 1,
        images_per_device=images,
        epochs=settings.epochs,
        on_epoch=on_epoch,
    )
    return Cell(plan.method, plan.batch_size, norms, None, **outcome._asdict())


if __name__ == "__main__":
    raise SystemExit(main())
