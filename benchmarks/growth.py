"""How the cost of normalization grows with the size of x: time per element, which should stay flat.

    python -m benchmarks.growth  # 10^4 to 10^8 elements: about 4 minutes on 2 cores, 3 GB
    python -m benchmarks.growth --largest 1e7

Grows the batch, the image and the channels in turn, and the number of groups at one size, and
prints the time per element of forward and of a step, beside that of a copy. Writes growth.json and
growth.png.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.figures import look, name_ends, quiet, save
from benchmarks.files import write
from benchmarks.options import folder, number, positive
from benchmarks.timing import (
    Call,
    about,
    compiled,
    copies,
    heading,
    interleaved,
    normal,
    progress_bar,
    restart_with_environment,
)
from jaxnorm import Row, norm
from jaxnorm.drawing import plain_log
from jaxnorm.methods import batch_group_norm, batch_norm, group_norm, token_layer_norm

KINDS = ("forward", "step")

METHODS: dict[str, Callable[[int], Row | batch_group_norm]] = {
    "batch": lambda groups: batch_norm(),
    "group": group_norm,
    "batch_group": batch_group_norm,
    "token_layer": lambda groups: token_layer_norm(),
}
"""From the number of groups to the method; two have none to choose."""


class Point(NamedTuple):
    """One x of a sweep: `value` is what grows."""

    sweep: str
    value: int
    shape: tuple[int, ...]
    groups: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def methods(self) -> list[str]:
        return ["group", "batch_group"] if self.sweep == "groups" else list(METHODS)


def points(largest: float) -> list[Point]:
    """All sweeps up to `largest` elements, in steps of about 8."""
    batches = [Point("batch", n, (n, 14, 14, 64), 32) for n in (1, 8, 64, 512, 4096, 8192)]
    images = [Point("image", s, (8, s, s, 64), 32) for s in (5, 14, 40, 112, 316, 440)]
    channels = [
        Point("channels", c, (8, 28, 28, c), min(c, 32)) for c in (2, 16, 128, 1024, 8192, 16384)
    ]
    groups = [Point("groups", g, (8, 56, 56, 256), g) for g in (1, 2, 8, 32, 128, 256)]
    return [point for point in batches + images + channels + groups if point.elements <= largest]


class Measured(NamedTuple):
    """Nanoseconds per element at a point."""

    sweep: str
    value: int
    elements: int
    method: str
    forward: float
    step: float


def measure(point: Point, dtype: str, *, rounds: int, seconds: float) -> list[Measured]:
    """Times every method of the point, and a copy of x."""
    xs, cts = copies(normal(point.shape, dtype, 0)), copies(normal(point.shape, dtype, 1))
    scale, bias = jnp.ones(point.shape[-1]), jnp.zeros(point.shape[-1])
    calls = {("copy", "forward"): _call(lambda x: -x, xs)}
    for name in point.methods:
        forward = partial(_forward, METHODS[name](point.groups))
        calls[name, "forward"] = _call(forward, xs, None, scale, bias)
        calls[name, "step"] = _call(partial(_step, forward), xs, cts, scale, bias)
    times = {
        key: min(rounds)
        for key, rounds in interleaved(calls, rounds=rounds, seconds=seconds).items()
    }
    found = []
    for name in ("copy", *point.methods):
        both = (times.get((name, kind), math.nan) * 1e9 / point.elements for kind in KINDS)
        found.append(Measured(point.sweep, point.value, point.elements, name, *both))
    return found


def _forward(
    method: Row | batch_group_norm, x: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    return norm(x, method, scale=scale, bias=bias)[0]


def _step(
    forward: Callable[..., jax.Array],
    x: jax.Array,
    ct: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
) -> Any:
    y, vjp = jax.vjp(forward, x, scale, bias)
    _, ct = lax.optimization_barrier((y, ct))  # a cotangent comes after y
    return y, vjp(ct)


def _call(
    f: Callable[..., Any],
    xs: list[jax.Array],
    cts: list[jax.Array] | None = None,
    *params: jax.Array,
) -> Call:
    arrays = [list(both) for both in zip(xs, cts, strict=True)] if cts else [[x] for x in xs]
    run, _ = compiled(f, *arrays[0], *params)
    return Call(lambda i: run(*arrays[i % len(arrays)], *params))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    facts = about(("jaxnorm", "jax", "jaxlib", "numpy"))
    plan = points(args.largest)
    if not plan:
        parser.error(f"argument --largest: no x has as few as {args.largest:g} elements")
    measured: list[Measured] = []
    interrupted = False
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(plan))
            for point in plan:
                progress.update(
                    task, description=f"{point.sweep} {point.value}: {point.elements:.1e} elements"
                )
                measured += measure(point, args.dtype, rounds=args.rounds, seconds=args.seconds)
                progress.advance(task)
    except KeyboardInterrupt:
        console.print("Interrupted: what was measured follows.")
        interrupted = True
    if not measured:
        return 130
    result = {
        "about": facts,
        "dtype": args.dtype,
        "ns_per_element": [one._asdict() for one in measured],
    }
    write(args.output / "growth.json", json.dumps(result, indent=1))
    draw(measured, f"{args.dtype}; {heading(facts)}", args.output / "growth.png")
    console.print(heading(facts), highlight=False)
    _print(console, measured)
    console.print(f"In {args.output}: growth.json, growth.png", highlight=False)
    return 130 if interrupted else 0


def _print(console: Console, measured: Sequence[Measured]) -> None:
    for sweep in dict.fromkeys(one.sweep for one in measured):
        rows = [one for one in measured if one.sweep == sweep]
        methods = list(dict.fromkeys(one.method for one in rows))
        table = Table(
            title=f"ns per element, forward / step, as {sweep} grow",
            box=box.SIMPLE_HEAD,
            title_justify="left",
        )
        for head in (sweep, "elements", *methods):
            table.add_column(head, no_wrap=True)
        for value, elements in dict.fromkeys((one.value, one.elements) for one in rows):
            here: Mapping[str, Measured] = {one.method: one for one in rows if one.value == value}
            table.add_row(
                str(value), f"{elements:.1e}", *(_cell(here[method]) for method in methods)
            )
        console.print(table, highlight=False)


def _cell(one: Measured) -> str:
    return f"{one.forward:.2f}" if math.isnan(one.step) else f"{one.forward:.2f} / {one.step:.2f}"


def draw(measured: Sequence[Measured], title: str, path: Path) -> None:
    """Draws the time per element over what grows: a row each for forward and step, a column for
    each sweep."""
    sweeps = list(dict.fromkeys(one.sweep for one in measured))
    figure = Figure(figsize=(3.6 * len(sweeps) + 1, 6.4), layout="constrained")
    panels = figure.subplots(len(KINDS), len(sweeps), squeeze=False, sharey="row", sharex="col")
    for row, kind in zip(panels, KINDS, strict=True):
        row[0].set_ylabel(f"{kind}, ns per element")
        for axes, sweep in zip(row, sweeps, strict=True):
            axes.set_xscale("log")
            axes.set_yscale("log")
            for method, color in _COLORS.items():
                line = [one for one in measured if (one.sweep, one.method) == (sweep, method)]
                values = [one.value if sweep == "groups" else one.elements for one in line]
                times = [getattr(one, kind) for one in line]
                form = "--" if method == "copy" else "-o"
                axes.plot(values, times, form, color=color, markersize=3.5, linewidth=1.4)
            quiet(axes)
    figure.suptitle(f"Time per element\n{title}", x=0.01, ha="left", fontsize=9)
    for axes, sweep in zip(panels[-1], sweeps, strict=True):
        axes.set_xlabel("number of groups" if sweep == "groups" else f"elements, by the {sweep}")
        plain_log(axes.xaxis, _TICKS)
    for axes in panels.flat:
        plain_log(axes.yaxis, _TICKS)
    figure.draw_without_rendering()  # names stand where the layout puts the lines
    for row, kind in zip(panels, KINDS, strict=True):
        ends = {one.method: getattr(one, kind) for one in measured}  # of the last sweep that has it
        finite = {method: end for method, end in ends.items() if not math.isnan(end)}
        name_ends(row[-1], ((method, end, _COLORS[method]) for method, end in finite.items()))
    save(figure, path)


_COLORS = {
    "copy": "0.45",
    **{method: look(method.removeprefix("token_"))["color"] for method in METHODS},
}
"""A method's is its colour in all figures; layer norm of tokens has that of layer norm."""

_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description="Time of normalization per element, from 10^4 to 10^8 elements.",
    )
    add = parser.add_argument
    add(
        "--largest",
        type=number(above=0),
        default=1.1e8,
        metavar="N",
        help="elements of the largest x (default: %(default)g)",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    add("--rounds", type=positive, default=5, metavar="N", help="default: %(default)s")
    add(
        "--seconds",
        type=number(at_least=0),
        default=4,
        metavar="S",
        help="per x, after which no other round starts (default: %(default)s)",
    )
    add(
        "--output",
        type=folder,
        default="results/growth",
        metavar="FOLDER",
        help="default: %(default)s",
    )
    return parser


if __name__ == "__main__":
    restart_with_environment()
    raise SystemExit(main())
