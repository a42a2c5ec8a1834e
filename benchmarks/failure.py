"""The map of failure: where batch normalization fails, by how many elements share a statistic.

    python -m benchmarks.failure                                     # handwritten digits
    python -m benchmarks.failure --data digits fashion_mnist=FOLDER  # and Fashion-MNIST
    python -m benchmarks.failure --quick                             # a first look, in minutes
    python -m benchmarks.failure --plan                              # what would run, and how long

The same small network is trained with statistics of 2, 4, 8 and 32 images, and with strides that
leave from 1 to 64 positions in its last maps. There a statistic of batch normalization has n =
images x positions elements. If n decides, the errors of a method lie on one curve over n, whatever
the images and the positions.

Each cell is written to cells.json as soon as it is measured, the most telling first: a run that
ends early, by --budget or Ctrl-C, has its figure too, and goes on with --resume.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from benchmarks import failure_report, training
from benchmarks.cells import Cell, Map
from benchmarks.datasets import SOURCES, Data, load
from benchmarks.failure_figure import draw
from benchmarks.failure_plan import Plan, plans
from benchmarks.files import locked, make_folder, write
from benchmarks.interrupt import deferred_interrupt
from benchmarks.options import count, number, positive
from benchmarks.residual import STRIDES, ResidualNet
from benchmarks.results import interval, machine, versions
from benchmarks.serving import serve
from benchmarks.training import IMAGES_PER_STEP


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    try:
        data = {name: load(name, path) for name, path in map(_named, args.data)}
    except ValueError as error:
        parser.error(f"argument --data: {error}")
    for name, images in data.items():
        if images.shape[0] not in STRIDES:
            parser.error(f"argument --data: no network for images of {images.shape} in {name}")
    planned = plans(
        {name: images.shape for name, images in data.items()},
        quick=args.quick,
        seeds=args.seeds or (3 if args.quick else 5),
        extra_seeds=0 if args.quick else args.extra_seeds,
    )
    with ExitStack() as held:
        result = Map(versions(), machine()) if args.plan else _start(parser, args, planned, held)
        missing = [plan for plan in planned if plan.key not in result.cells]
        _print_plan(console, missing, len(planned), args.plan)
        if args.plan:
            return 0
        interrupted = _measure(result, missing, data, args, console)
        if not result.cells:
            return 130
        text = failure_report.markdown(result, args.points)
        write(args.output / "failure.md", text)
        draw(result, args.points, args.output / "failure.png")
    console.print(text, markup=False)
    console.print(f"In {args.output}: cells.json, failure.md, failure.png")
    return 130 if interrupted else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.failure",
        description="Test error by how many elements share a statistic in the last stage.",
    )
    add = parser.add_argument
    add(
        "--data",
        nargs="+",
        default=["digits"],
        metavar="NAME[=FOLDER]",
        help=f"some of {', '.join(SOURCES)}; all but digits and mnist_5000 with the folder of "
        "their published files (default: digits)",
    )
    add("--quick", action="store_true", help="the most telling cells alone, trained little")
    add("--plan", action="store_true", help="print what would run and how long, and end")
    add("--seeds", type=positive, metavar="N", help="0 to N - 1 (default: 5; with --quick: 3)")
    add(
        "--extra-seeds",
        type=count,
        default=3,
        metavar="N",
        help="of methods at two images alone; 0 leaves them out (default: %(default)s)",
    )
    add(
        "--budget",
        type=number(above=0),
        metavar="MINUTES",
        help="start no cell that would end after so many minutes, by the estimate",
    )
    add(
        "--points",
        type=number(above=0),
        default=failure_report.POINTS,
        metavar="P",
        help="the threshold is where the error is P points above group norm's (default: "
        "%(default)s)",
    )
    add(
        "--output",
        type=Path,
        default=Path("results/failure"),
        metavar="FOLDER",
        help="default: %(default)s",
    )
    add("--resume", action="store_true", help="keep the cells that the output folder holds")
    return parser


def _named(text: str) -> tuple[str, str | None]:
    name, _, path = text.partition("=")
    return name, path or None


def _start(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    planned: Sequence[Plan],
    held: ExitStack,
) -> Map:
    """The map to add to: the one in the output folder with --resume, else an empty one. No other
    run has the folder until `held` ends."""
    try:
        make_folder(args.output)
        held.enter_context(locked(args.output))
        new = Map(versions(), machine())
        if not Map.exists(args.output):
            return new
        if not args.resume:
            raise ValueError(
                f"{args.output} already holds cells: add to them with --resume, or choose another "
                "folder with --output"
            )
        old = Map.load(args.output)
        changed = [
            f"{name} {version}, not {new.versions.get(name)}"
            for name, version in old.versions.items()
            if version != new.versions.get(name)
        ]
        for plan in planned:
            cell = old.cells.get(plan.key)
            if cell and (cell.settings, len(cell.errors)) != (plan.settings, plan.seeds):
                changed.append(
                    f"{plan.key} with {cell.settings}, {len(cell.errors)} seeds, not "
                    f"{plan.settings}, {plan.seeds} seeds"
                )
        if changed:
            raise ValueError(
                f"cannot resume {args.output}, because it was made with {'; '.join(changed[:3])}"
            )
        return old
    except OSError as error:
        parser.error(f"argument --output: {error}")
    except ValueError as error:
        parser.error(str(error))


def _print_plan(console: Console, missing: Sequence[Plan], total: int, each: bool) -> None:
    for plan in missing if each else ():
        console.print(
            f"{str(plan.key):42} {plan.seeds} seeds  n = {plan.elements:5}  {plan.seconds:4.0f} s"
        )
    minutes = sum(plan.seconds for plan in missing) / 60
    console.print(f"{len(missing)} of {total} cells to measure, about {minutes:.0f} minutes")


def _measure(
    result: Map,
    missing: Sequence[Plan],
    data: Mapping[str, Data],
    args: argparse.Namespace,
    console: Console,
) -> bool:
    """Adds the cells that are missing, and writes the map after each; whether it was
    interrupted."""
    start, planned = time.perf_counter(), 0.0

    def on_interrupt() -> None:
        console.print("Stopping as soon as this epoch or compilation is done.")

    try:
        with deferred_interrupt(on_interrupt) as check_interrupt:
            for index, plan in enumerate(missing):
                spent = time.perf_counter() - start
                pace = spent / planned if planned else 1.0  # of this machine, to the estimate
                if args.budget and spent + pace * plan.seconds > 60 * args.budget:
                    console.print(f"The budget ends here: {len(missing) - index} cells are left.")
                    return False
                cell = measured(plan, data[plan.key.data], lambda _: check_interrupt())
                result.add(cell)
                result.save(args.output)
                planned += plan.seconds
                spent = time.perf_counter() - start
                left = sum(other.seconds for other in missing[index + 1 :]) * spent / planned
                console.print(
                    f"{index + 1}/{len(missing)}  {plan.key}  n = {plan.elements}: error "
                    f"{interval(cell.errors)} %, {cell.seconds:.0f} s; about {left / 60:.0f} "
                    "minutes left"
                )
    except KeyboardInterrupt:
        console.print("Interrupted. Go on with --resume.")
        return True
    return False


def measured(plan: Plan, data: Data, on_epoch: Callable[[int], None]) -> Cell:
    """Trains and evaluates what `plan` says."""
    images = plan.key.batch_size or IMAGES_PER_STEP
    trained = training.fit(
        ResidualNet(plan.layers, plan.strides, data.num_classes),
        range(plan.seeds),
        data=data,
        num_train=plan.settings.train_images,
        devices=IMAGES_PER_STEP // images,
        images_per_device=images,
        epochs=plan.settings.epochs,
        on_epoch=on_epoch,
        num_held_out=plan.settings.test_images,
    )
    start = time.perf_counter()
    accuracy = serve(trained, images)
    return Cell(
        plan.key,
        plan.settings,
        str(plan.layers[-1]),
        plan.elements,
        accuracy,
        trained.compile_seconds,
        trained.train_seconds,
        time.perf_counter() - start,
    )


if __name__ == "__main__":
    raise SystemExit(main())
