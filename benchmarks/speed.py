"""Time and memory of a normalization layer in training, beside other libraries and beside the
floor.

    python -m benchmarks.speed             # everything
    python -m benchmarks.speed --quick     # some shapes: about 4 minutes on 2 cores
    python -m benchmarks.speed --edges     # shapes where Flax may be faster

Prints a table for each method and a summary; writes speed.json (every round), speed.csv, speed.md
(the tables as Markdown) and speed.png, which are called edges with --edges. What is measured and
how is in benchmarks/README.md.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cases import FLAX, INTERVAL_COUNT, OURS, Case
from benchmarks.dots import draw
from benchmarks.files import write as write_text
from benchmarks.libraries import COLORS, LIBRARIES, METHODS, installed
from benchmarks.measure import measure
from benchmarks.options import count, folder, number, positive
from benchmarks.shapes import EDGES, QUICK, SHAPES
from benchmarks.tables import CAPTION, as_csv, markdown, print_tables, tables
from benchmarks.timing import about, heading, progress_bar, restart_with_environment

DTYPES = ("float32", "bfloat16", "float16")
"""The last is measured on request: few libraries are made for it on a CPU."""

PACKAGES = ("jaxnorm", "jax", "jaxlib", "flax", "dm-haiku", "equinox", "torch", "numpy")

PEERS = (*(name for name in LIBRARIES if name != OURS), "torch")


def write(output: Path, facts: Mapping[str, Any], cases: Sequence[Case], *, edges: bool) -> None:
    """Writes the rounds, the tables and the figure."""
    name = "edges" if edges else "speed"
    saved = {"about": facts, "cases": [case._asdict() for case in cases]}
    write_text(output / f"{name}.json", json.dumps(saved, indent=1))
    write_text(output / f"{name}.csv", as_csv(cases))
    text = f"{heading(facts)}\n\n    {facts['command']}\n\n{markdown(tables(cases))}"
    write_text(output / f"{name}.md", text)
    how: dict[str, Any] = {
        "libraries": list(COLORS),
        "row": lambda case: case.method,
        "over": "bytes floor",
    }
    if edges:
        how = {
            "libraries": [OURS],
            "row": lambda case: f"{case.method} {case.shape}",
            "over": "Flax" if cases[0].over("Flax", "step") else "bytes floor",
        }
    draw(cases, heading(facts), output / f"{name}.png", **how)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    peers = args.peers if args.peers is not None else FLAX if args.edges else PEERS
    missing = [name for name in peers if name not in _installed()]
    if missing:
        console.print(f"Left out, not installed: {', '.join(missing)}", highlight=False)
    found = [name for name in (OURS, *peers) if name not in missing]
    libraries = [name for name in LIBRARIES if name in found]
    torch = importlib.import_module("torch") if "torch" in found else None
    facts = about(PACKAGES)
    shapes = args.shapes or (EDGES if args.edges else QUICK if args.quick else SHAPES)
    plans = [
        (method, (SHAPES | EDGES)[shape], dtype)
        for method in args.methods
        for shape in shapes
        if method in (SHAPES | EDGES)[shape].methods
        for dtype in args.dtypes
    ]
    if not plans:
        parser.error("none of these shapes is measured with any of these methods")
    brief = args.quick or args.edges
    options = {
        "rounds": args.rounds,
        "seconds": (2 if brief else 6) if args.seconds is None else args.seconds,
        "compiles": (0 if brief else INTERVAL_COUNT) if args.compiles is None else args.compiles,
    }
    cases: list[Case] = []
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(plans))
            for method, shape, dtype in plans:
                progress.update(task, description=f"{method} {shape.name} {dtype}")
                cases.append(measure(method, shape, dtype, libraries, torch, **options))
                progress.advance(task)
    except KeyboardInterrupt:
        console.print(f"Interrupted after {len(cases)} of {len(plans)}.")
    finally:
        if cases:
            write(args.output, facts, cases, edges=args.edges)
    console.print(heading(facts), highlight=False)
    if args.markdown:
        print(markdown(tables(cases)))
    else:
        print_tables(console, tables(cases))
        console.print(CAPTION, highlight=False, markup=False)
    name = "edges" if args.edges else "speed"
    files = ", ".join(f"{name}.{suffix}" for suffix in ("json", "csv", "md", "png"))
    console.print(f"In {args.output}: {files}", highlight=False)
    return 0 if len(cases) == len(plans) else 130


def _installed() -> list[str]:
    return installed() + (["torch"] if util.find_spec("torch") else [])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description="Time and memory of a normalization layer in training.",
    )
    choices = {
        "methods": ("METHOD", METHODS, list(METHODS), "+"),
        "shapes": ("SHAPE", SHAPES | EDGES, None, "+"),
        "dtypes": ("DTYPE", DTYPES, list(DTYPES[:2]), "+"),
        "peers": ("LIBRARY", PEERS, None, "*"),
    }
    add = parser.add_argument
    for name, (metavar, known, default, several) in choices.items():
        add(
            f"--{name}",
            nargs=several,
            choices=known,
            default=default,
            metavar=metavar,
            help=f"some of {', '.join(known)}",
        )
    add("--rounds", type=positive, default=25, metavar="N", help="at most; default: %(default)s")
    add(
        "--seconds",
        type=number(at_least=0),
        metavar="S",
        help=f"per case, after which, and {INTERVAL_COUNT} rounds, no other round starts "
        "(default: 6; with --quick or --edges 2)",
    )
    add(
        "--compiles",
        type=count,
        metavar="N",
        help=f"samples of the compile time of ours and flax.linen (default: {INTERVAL_COUNT}, the "
        "fewest with an interval; with --quick or --edges none)",
    )
    add(
        "--output",
        type=folder,
        default="results/speed",
        metavar="FOLDER",
        help="default: %(default)s",
    )
    add("--quick", action="store_true", help=f"the shapes {', '.join(QUICK)}, for a shorter time")
    add(
        "--edges",
        action="store_true",
        help="the shapes where Flax may be faster, beside Flax alone",
    )
    add("--markdown", action="store_true", help="print the tables as Markdown")
    return parser


if __name__ == "__main__":
    restart_with_environment()
    raise SystemExit(main())
