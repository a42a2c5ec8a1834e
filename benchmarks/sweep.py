"""Measures the cells that a program plans, one by one, and keeps each as soon as it is there."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import training
from benchmarks.cells import Cell, Key, Map
from benchmarks.datasets import SOURCES, Data, load
from benchmarks.files import locked, make_folder, write
from benchmarks.interrupt import deferred_interrupt
from benchmarks.measures import MEASURES, Values
from benchmarks.options import number
from benchmarks.plan import Plan
from benchmarks.residual import STRIDES, ResidualNet
from benchmarks.results import interval, machine, versions
from benchmarks.serving import Serving, running, serve
from benchmarks.shifts import ORDERS
from benchmarks.training import Trained

Measure = Callable[[Plan, Data, Callable[[int], None]], Cell]


class Report(NamedTuple):
    """What is said of the cells.

    Attributes:
        name: of the file of its text.
        text: in Markdown.
        shown: what is printed in its place; None prints the text.
        pictures: names of the files that were drawn beside it.
    """

    name: str
    text: str
    shown: str | None = None
    pictures: Sequence[str] = ()


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Adds what all such programs ask for: data, budget, output, resume and overwrite."""
    add = parser.add_argument
    add(
        "--data",
        nargs="+",
        default=["digits"],
        metavar="NAME[=FOLDER]",
        help=f"some of {', '.join(SOURCES)}; all but digits and mnist_5000 with the folder of "
        "their published files (default: digits)",
    )
    add(
        "--budget",
        type=number(above=0),
        metavar="MINUTES",
        help="start no cell that would end after so many minutes, by the estimate",
    )
    add("--output", type=Path, default=Path(output), metavar="FOLDER", help="default: %(default)s")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="keep the cells that the output folder holds"
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="replace the cells that the output folder holds"
    )
    add("--plan", action="store_true", help="print what would run and how long, and end")


def loaded(parser: argparse.ArgumentParser, names: Sequence[str]) -> dict[str, Data]:
    """The data sets of --data, by name."""
    try:
        data = {
            name: load(name, path or None) for name, _, path in (n.partition("=") for n in names)
        }
    except ValueError as error:
        parser.error(f"argument --data: {error}")
    for name, images in data.items():
        if images.shape[0] not in STRIDES:
            parser.error(f"argument --data: no network for images of {images.shape} in {name}")
    return data


def run(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    console: Console,
    data: Mapping[str, Data],
    planned: Sequence[Plan],
    measure: Measure | None,
    report: Callable[[Map], Report],
) -> int:
    """Measures the cells that are missing, and reports all that are there.

    Args:
        parser: reports what is wrong with the output folder.
        args: what the options of `add_options` were.
        console: is printed to.
        data: the data sets by name.
        planned: the cells, in the order in which they are measured.
        measure: makes a cell; None measures nothing.
        report: draws what it likes into the output folder.

    Returns:
        The exit status: 130 after an interrupt, or where there is nothing to report.
    """
    with ExitStack() as held:
        result = Map(versions(), machine()) if args.plan else start(parser, args, planned, held)
        missing = [plan for plan in planned if not plan.is_done(result.cells.get(plan.key))]
        print_plan(console, missing, len(planned), args.plan)
        if args.plan:
            return 0
        interrupted = measure is not None and measure_missing(
            result, missing, data, args, console, measure
        )
        if not result.cells:
            return 130
        found = report(result)
        write(args.output / found.name, found.text)
    shown = Markdown(found.text) if found.shown is None else found.shown
    console.print(shown, markup=False, soft_wrap=found.shown is not None)
    files = ["cells.json", "cells.csv", found.name, *found.pictures]
    console.print(f"In {args.output}: {', '.join(files)}")
    return 130 if interrupted else 0


def start(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    planned: Sequence[Plan],
    held: ExitStack,
) -> Map:
    """The cells to add to: the one in the output folder with --resume, else an empty one. No other
    run has the folder until `held` ends."""
    try:
        make_folder(args.output)
        held.enter_context(locked(args.output))
        new = Map(versions(), machine())
        if args.overwrite or not Map.exists(args.output):
            return new
        if not args.resume:
            raise ValueError(
                f"{args.output} already holds cells: add to them with --resume, replace them with "
                "--overwrite, or choose another folder with --output"
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


def print_plan(console: Console, missing: Sequence[Plan], total: int, each: bool) -> None:
    for plan in missing if each else ():
        console.print(
            f"{str(plan.key):42} {plan.seeds} seeds  n = {plan.elements:5}  {plan.seconds:4.0f} s"
        )
    minutes = sum(plan.seconds for plan in missing) / 60
    console.print(f"{len(missing)} of {total} cells to measure, about {minutes:.0f} minutes")


def measure_missing(
    result: Map,
    missing: Sequence[Plan],
    data: Mapping[str, Data],
    args: argparse.Namespace,
    console: Console,
    measure: Measure,
) -> bool:
    """Adds the cells that are missing, and writes all cells after each; whether it was
    interrupted."""
    begin, planned = time.perf_counter(), 0.0

    def on_interrupt() -> None:
        console.print("Stopping as soon as this epoch or compilation is done.")

    try:
        with _progress(console) as progress, deferred_interrupt(on_interrupt) as check_interrupt:
            task = progress.add_task("", total=sum(plan.seconds for plan in missing))
            for index, plan in enumerate(missing):
                spent = time.perf_counter() - begin
                pace = spent / planned if planned else 1.0  # of this machine, to the estimate
                if args.budget and spent + pace * plan.seconds > 60 * args.budget:
                    console.print(f"The budget ends here: {len(missing) - index} cells are left.")
                    return False
                progress.update(task, description=str(plan.key))

                def on_epoch(done: int, plan: Plan = plan, before: float = planned) -> None:
                    """Counts an epoch as its part of the estimate, and the rest at the end."""
                    share = done / (plan.settings.epochs + 1)
                    progress.update(task, completed=before + share * plan.seconds)
                    check_interrupt()

                cell = measure(plan, data[plan.key.data], on_epoch)
                result.add(cell)
                result.save(args.output)
                planned += plan.seconds
                progress.update(task, completed=planned)
                spent = time.perf_counter() - begin
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


def _progress(console: Console) -> Progress:
    """A bar on terminals, with the time left from the pace of the whole run."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    left = (TextColumn("left"), TimeRemainingColumn())
    return Progress(
        *columns,
        *left,
        console=console,
        speed_estimate_period=3600,
        transient=True,
        disable=not console.is_terminal,
    )


def measured(
    plan: Plan,
    data: Data,
    on_epoch: Callable[[int], None],
    measures: Mapping[str, Callable[[Trained, Key], Values]] = MEASURES,
    *,
    curves: bool = False,
) -> Cell:
    """Trains and evaluates what `plan` says, with `measures` by their names; those of the loss and
    gradient norm of each step need `curves`."""
    how = plan.key.how
    images = plan.key.batch_size or how.step
    trained = training.fit(
        ResidualNet(plan.layers, plan.strides, data.num_classes, how.residual, how.noise),
        range(plan.seeds),
        data=data,
        num_train=plan.settings.train_images,
        devices=how.step // images,
        images_per_device=images,
        epochs=plan.settings.epochs,
        on_epoch=on_epoch,
        num_held_out=plan.settings.test_images,
        rate=how.rate,
        norm_decay=how.norm_decay,
        arrange=ORDERS[how.order],
        curves=curves,
    )
    start = time.perf_counter()
    accuracy = serve(trained, images) if plan.others else Serving(running(trained))
    more = {name: measures[name](trained, plan.key) for name in plan.measures}
    return Cell(
        plan.key,
        plan.settings,
        str(plan.layers[-1]),
        plan.elements,
        accuracy,
        trained.compile_seconds,
        trained.train_seconds,
        time.perf_counter() - start,
        more,
    )
