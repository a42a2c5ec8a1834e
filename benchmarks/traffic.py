"""How many bytes normalization moves through the memory of an H200, by library, counted without
one.

    python -m benchmarks.traffic --quick  # five shapes in bfloat16: three minutes on 2 cores
    python -m benchmarks.traffic          # all shapes, bfloat16 and float32
    python -m benchmarks.traffic --shapes diffusion_32 --methods group --libraries jaxnorm

Prints, and writes as JSON and CSV, for the forward pass, for a training step and for inference: the
bytes that the kernels read and write, in multiples of the normalized tensor; how many kernels there
are; and the smallest grid, in thread blocks, of those that read a whole tensor. `benchmarks.h200`
says how they are counted and what they leave out.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from benchmarks.files import replacing, write
from benchmarks.h200 import MULTIPROCESSORS, Traffic, count, unavailable
from benchmarks.interrupt import deferred_interrupt
from benchmarks.libraries import LIBRARIES, METHODS, Train, installed
from benchmarks.options import folder
from benchmarks.shapes import QUICK, SHAPES

PASSES = {
    "forward": "Forward, statistics of the batch",
    "step": "Forward and backward",
    "inference": "Forward, running statistics",
}

DTYPES = ("bfloat16", "float32")


class Cell(NamedTuple):
    """One program of one library: keys of `SHAPES`, `METHODS`, `PASSES` and `LIBRARIES`, and the
    dtype of x."""

    shape: str
    method: str
    dtype: str
    what: str
    library: str


@dataclass(frozen=True)
class Result:
    """What is written of a cell.

    Attributes:
        moved: tensors read and written by kernels that always run.
        moved_by_branches: by those that run or do not by the data, if all do.
        launches: kernels that always run.
        smallest_grid: fewest thread blocks of a kernel that reads a whole tensor.
    """

    shape: str
    method: str
    dtype: str
    what: str
    library: str
    moved: float
    moved_by_branches: float
    launches: int
    smallest_grid: int | None


def traffic(cell: Cell) -> Traffic | None:
    """Compiles the program of a cell; None where the library has no such layer or no such pass."""
    shape = SHAPES[cell.shape].on("gpu")
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(cell.dtype))
    # other libraries promote silently
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        layer = LIBRARIES[cell.library].layer(cell.method, x)
        if layer is None or (cell.what == "inference" and layer.infer is None):
            return None
        if not layer.channels_last:
            x = jax.ShapeDtypeStruct((shape[0], shape[-1], *shape[1:-1]), x.dtype)
        if cell.what == "step":
            return count(partial(_step, layer.train), layer.parameters, layer.state, x, x, tensor=x)
        run = layer.infer if cell.what == "inference" else layer.train
        assert run is not None
        return count(run, layer.parameters, layer.state, x, tensor=x)


def _step(train: Train, parameters: Any, state: Any, x: jax.Array, dy: jax.Array) -> Any:
    """A layer's part of a training step: what follows the layer needs all of y before it returns
    any of dy."""
    y, back, state = jax.vjp(
        lambda parameters, x: train(parameters, state, x), parameters, x, has_aux=True
    )
    y, dy = jax.lax.optimization_barrier((y, dy))
    return y, state, back(dy)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    # nothing runs on a GPU: none is looked for, none is occupied
    jax.config.update("jax_platforms", "cpu")
    parser = _parser()
    args = parser.parse_args(argv)
    reason = unavailable()
    if reason:
        parser.error(reason)
    console = Console(width=None if sys.stdout.isatty() else 140)
    results: list[Result] = []
    interrupted = False
    try:
        _count(_cells(args), results, console)
    except KeyboardInterrupt:
        interrupted = True
    if not results:
        console.print("Interrupted." if interrupted else "Nothing to count.")
        return 130 if interrupted else 0
    _write(results, args.output)
    for dtype in args.dtypes:
        for what in args.passes:
            _print(
                [r for r in results if (r.dtype, r.what) == (dtype, what)], args.libraries, console
            )
    console.print(
        f"{'Interrupted. ' if interrupted else ''}In {args.output}: traffic.json, traffic.csv",
        highlight=False,
    )
    return 130 if interrupted else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.traffic",
        description=(
            "Counts the bytes that normalization moves on an H200, which need not be there."
        ),
    )
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help=f"{', '.join(QUICK)} in bfloat16, where nothing else is asked for",
    )
    add("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=f"some of {', '.join(SHAPES)}")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=f"some of {', '.join(METHODS)}",
    )
    add("--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help=f"some of {', '.join(DTYPES)}")
    add(
        "--passes",
        nargs="+",
        choices=PASSES,
        default=list(PASSES),
        metavar="PASS",
        help=f"some of {', '.join(PASSES)}",
    )
    names = installed()
    add(
        "--libraries",
        nargs="+",
        choices=names,
        default=names,
        metavar="LIBRARY",
        help=f"some of {', '.join(names)}",
    )
    add(
        "--output",
        type=folder,
        default="results/traffic",
        metavar="FOLDER",
        help="default: %(default)s",
    )
    return parser


def _cells(args: argparse.Namespace) -> list[Cell]:
    args.shapes = args.shapes or list(QUICK if args.quick else SHAPES)
    args.dtypes = args.dtypes or list(DTYPES[:1] if args.quick else DTYPES)
    return [
        Cell(shape, method, dtype, what, library)
        for shape in args.shapes
        for method in args.methods
        if method in SHAPES[shape].methods
        for dtype in args.dtypes
        for what in args.passes
        for library in args.libraries
    ]


def _count(cells: Sequence[Cell], results: list[Result], console: Console) -> None:
    """Adds the result of each cell that there is. A library that cannot compile one is named, and
    left out there."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )

    def on_interrupt() -> None:
        console.print("Stopping as soon as this compilation is done.")

    with (
        Progress(*columns, console=console) as progress,
        deferred_interrupt(on_interrupt) as check_interrupt,
    ):
        task = progress.add_task("", total=len(cells))
        for cell in cells:
            progress.update(task, description=f"{cell.library} {cell.method} {cell.shape}")
            try:
                found = traffic(cell)
            except Exception as error:
                if cell.library == "jaxnorm":
                    raise
                console.print(
                    f"{' '.join(cell)}: {type(error).__name__}: {str(error).splitlines()[0]}",
                    highlight=False,
                )
                found = None
            if found:
                figures = (
                    round(found.moved, 3),
                    round(found.moved_by_branches, 3),
                    found.launches,
                    found.smallest_grid,
                )
                results.append(Result(*cell, *figures))
            progress.advance(task)
            check_interrupt()


def _write(results: Sequence[Result], to: Path) -> None:
    rows = [asdict(result) for result in results]
    write(
        to / "traffic.json",
        json.dumps({"jax": jax.__version__, "results": rows}, indent=1) + "\n",
    )
    with replacing(to / "traffic.csv") as new, new.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Result.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _print(results: Sequence[Result], libraries: Sequence[str], console: Console) -> None:
    """One table: a row for each shape and method, a column for each library."""
    if not results:
        return
    table = Table(
        title=f"{PASSES[results[0].what]}, {results[0].dtype}",
        caption=(
            "tensors moved | kernels | thread blocks of the smallest grid that reads a whole "
            f"tensor, red if fewer than {MULTIPROCESSORS}; +: moved besides where the data ask "
            "for it; bold: fewest bytes"
        ),
        box=box.SIMPLE_HEAD,
    )
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    for library in libraries:
        table.add_column(library, justify="right")
    for shape, method in dict.fromkeys((result.shape, result.method) for result in results):
        row = {
            result.library: result
            for result in results
            if (result.shape, result.method) == (shape, method)
        }
        fewest = min(result.moved for result in row.values())
        table.add_row(
            shape, method, *(_text(row[name], fewest) if name in row else "–" for name in libraries)
        )
    console.print(table, highlight=False)


def _text(result: Result, fewest: float) -> str:
    moved = f"{result.moved:.2f}"
    moved = f"[bold]{moved}[/bold]" if len(moved) and result.moved <= fewest * 1.01 else moved
    branches = f"+{result.moved_by_branches:.1f}" if result.moved_by_branches else ""
    grid = "–" if result.smallest_grid is None else str(result.smallest_grid)
    starved = result.smallest_grid is not None and result.smallest_grid < MULTIPROCESSORS
    return f"{moved}{branches} | {result.launches} | {f'[red]{grid}[/red]' if starved else grid}"


if __name__ == "__main__":
    raise SystemExit(main())
