"""Every method's step of training beside that of Flax's batch norm, on one tensor.

    python -m benchmarks.methods           # about 6 minutes on 2 cores

Prints a table for each dtype and writes methods.json (every round), methods.md and methods.png.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as fnn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.figures import MARKERS, save
from benchmarks.files import write
from benchmarks.libraries import COLORS
from benchmarks.options import folder, number, positive
from benchmarks.passes import passes
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
from jaxnorm import Method, methods

SHAPE = (32, 28, 28, 128)
DTYPES = ("float32", "bfloat16", "float16")
KINDS = ("forward", "step")
PACKAGES = ("jaxnorm", "jax", "jaxlib", "flax", "numpy")

FLAX = "Flax's BatchNorm"
KERNEL = (3, 3, SHAPE[-1], SHAPE[-1])

Apply = Callable[[Any, jax.Array], tuple[jax.Array, Any]]
"""(parameters, x) -> y and the new state."""


class Row(NamedTuple):
    """A method, and what its `apply` gets beside x."""

    method: Method
    options: Mapping[str, Any] = {}
    in_front: bool = False
    """Whether x goes through a 3 x 3 convolution first, whose kernel is learned as well."""


def _rows() -> dict[str, Row]:
    mask = np.random.default_rng(0).random(SHAPE) < 0.8
    group = methods.group_norm(32)
    return {
        "batch": Row(methods.batch_norm()),
        "batch, relu": Row(methods.batch_norm(), {"activation": jax.nn.relu}),
        "batch, a mask": Row(methods.batch_norm(), {"weights": mask}),
        "batch, real weights": Row(methods.batch_norm(), {"weights": mask.astype(np.float32)}),
        "ghost batch, 4": Row(methods.ghost_batch_norm(4)),
        "instance": Row(methods.instance_norm()),
        "group, 32": Row(group),
        "group, 2": Row(methods.group_norm(2)),
        "group, silu": Row(group, {"activation": jax.nn.silu}),
        "group, gelu": Row(group, {"activation": jax.nn.gelu}),
        "layer": Row(methods.layer_norm()),
        "layer, tokens": Row(methods.token_layer_norm()),
        "RMS, tokens": Row(methods.rms_norm()),
        "positional": Row(methods.positional_norm()),
        "batch group, 32": Row(methods.batch_group_norm(32)),
        "batch group, 512": Row(methods.batch_group_norm(512)),
        "batch group, 49": Row(methods.batch_group_norm(49)),
        "batch and group": Row(methods.batch_and_group_norm(4, 32)),
        "renorm": Row(methods.batch_renorm()),
        "momentum": Row(methods.momentum_batch_norm(), {"train_momentum": 0.9}),
        "memorized, 4": Row(methods.memorized_batch_norm((1, 1, 1, 1))),
        "switchable": Row(methods.switchable_norm()),
        "GN+": Row(methods.group_norm_plus(32)),
        "GN+, pooled": Row(methods.group_norm_plus(32, per_position=False)),
        "FRN and TLU": Row(methods.filter_response_norm()),
        "EvoNorm B0": Row(methods.evonorm_b0()),
        "EvoNorm S0": Row(methods.evonorm_s0(32)),
        "convolution, batch": Row(methods.batch_norm(), in_front=True),
        "convolution, cross-iteration": Row(methods.cross_iteration_norm(), in_front=True),
        "proxy, relu": Row(methods.proxy_norm(group), {"activation": jax.nn.relu}),
    }


ROWS = _rows()


class Result(NamedTuple):
    """What was measured of a row in one dtype.

    `seconds` has the time of each round; `ratio` are medians over the rounds of it over Flax's;
    `passes` count what the programs read and write of x's size, `temporary` and `kept` are bytes
    over those of x.
    """

    name: str
    dtype: str
    seconds: dict[str, list[float]]
    ratio: dict[str, float]
    passes: dict[str, float]
    temporary: float
    kept: float


def _convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    axes = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)


def _ours(row: Row, dtype: str) -> tuple[Apply, Any]:
    method, channels = row.method, SHAPE[-1]
    state = method.init(SHAPE, kernel_shape=KERNEL) if row.in_front else method.init(SHAPE)
    learned = {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}
    learned |= {name: jnp.asarray(t) for name, t in method.parameters(channels).items()}
    if row.in_front:
        learned["kernel"] = 0.03 * normal(KERNEL, dtype, 2)

    def apply(parameters: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        front = {}
        if row.in_front:
            kernel, parameters = parameters["kernel"], {**parameters}
            del parameters["kernel"]
            if method.in_front is None:
                x = _convolution(x, kernel)
            else:
                x, front = method.in_front(x, kernel, _convolution)
        return method.apply(x, state, train=True, **parameters, **row.options, **front)

    return apply, learned


def _flax(dtype: str) -> tuple[Apply, Any]:
    layer = fnn.BatchNorm(use_running_average=False, dtype=jnp.dtype(dtype))
    variables = layer.init(jax.random.key(0), jnp.ones(SHAPE, dtype))

    def apply(parameters: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        variables_now = {**variables, "params": parameters}
        return layer.apply(variables_now, x, mutable=["batch_stats"])  # type: ignore[return-value]

    return apply, variables["params"]


def measure(dtype: str, names: Sequence[str], *, rounds: int, seconds: float) -> list[Result]:
    """Compiles and times the rows of these names in one dtype."""
    x, ct = normal(SHAPE, dtype, 0), normal(SHAPE, dtype, 1)
    xs, cts = copies(x), copies(ct)
    calls, facts = {}, {}
    for name in (FLAX, *names):
        apply, parameters = _flax(dtype) if name == FLAX else _ours(ROWS[name], dtype)

        def step(parameters: Any, x: jax.Array, ct: jax.Array, apply: Apply = apply) -> Any:
            y, vjp, state = jax.vjp(apply, parameters, x, has_aux=True)
            # A cotangent comes after y: passes of forward and backward cannot be one.
            _, ct = lax.optimization_barrier((y, ct))
            return y, state, vjp(ct)

        def kept(parameters: Any, x: jax.Array, apply: Apply = apply) -> list[jax.Array]:
            vjp = jax.vjp(apply, parameters, x, has_aux=True)[1]
            return list({id(t): t for t in jax.tree.leaves(vjp)}.values())

        forward, _ = compiled(apply, parameters, x)
        whole, _ = compiled(step, parameters, x, ct)
        calls[name, "forward"] = Call(
            lambda i, f=forward, p=parameters: f(p, xs[i % len(xs)]),
        )
        calls[name, "step"] = Call(
            lambda i, f=whole, p=parameters: f(p, xs[i % len(xs)], cts[i % len(xs)]),
        )
        residuals = jax.eval_shape(kept, parameters, x)
        facts[name] = {
            "passes": {
                kind: passes(program.as_text(), x.size, x.dtype.itemsize)
                for kind, program in zip(KINDS, (forward, whole), strict=True)
            },
            "temporary": whole.memory_analysis().temp_size_in_bytes / x.nbytes,
            "kept": sum(t.size * t.dtype.itemsize for t in residuals) / x.nbytes,
        }
    times = interleaved(calls, rounds=rounds, seconds=seconds)
    return [
        Result(
            name,
            dtype,
            {kind: times[name, kind] for kind in KINDS},
            {
                kind: float(np.median(np.divide(times[name, kind], times[FLAX, kind])))
                for kind in KINDS
            },
            **facts[name],
        )
        for name in (FLAX, *names)
    ]


HEADS = ("method", "ms", "/ Flax's batch norm", "passes", "temporaries", "kept")


def cells(result: Result) -> list[str]:
    """A line of the table: forward / step."""

    def both(values: Mapping[str, float], digits: int) -> str:
        return " / ".join(f"{values[kind]:.{digits}f}" for kind in KINDS)

    milliseconds = {kind: 1e3 * float(np.median(result.seconds[kind])) for kind in KINDS}
    return [
        result.name,
        both(milliseconds, 2),
        both(result.ratio, 2),
        both(result.passes, 1),
        f"{result.temporary:.2f}",
        f"{result.kept:.2f}",
    ]


def markdown(results: Sequence[Result]) -> str:
    """The tables, one for each dtype."""
    parts = []
    for dtype in dict.fromkeys(result.dtype for result in results):
        lines = [cells(result) for result in results if result.dtype == dtype]
        parts.append(f"#### {dtype}\n")
        parts += [f"| {' | '.join(line)} |" for line in (HEADS, ["---"] * len(HEADS), *lines)]
        parts.append("")
    return "\n".join(parts)


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """A row for each method, a point for each dtype, below each other: a step over one of Flax's
    batch norm.

    Those behind a convolution, which costs more than any of them, are left out.
    """
    alone = (r.name for r in results if r.name != FLAX and not ROWS[r.name].in_front)
    names = list(dict.fromkeys(alone))
    dtypes = list(dict.fromkeys(result.dtype for result in results))
    figure = Figure(figsize=(7, 0.27 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    for lane, dtype in enumerate(dtypes):
        ratios = {r.name: r.ratio["step"] for r in results if r.dtype == dtype and r.name in names}
        places = [names.index(name) + 0.26 * (lane - (len(dtypes) - 1) / 2) for name in ratios]
        axes.plot(
            list(ratios.values()), places, MARKERS[lane], color=COLORS["jaxnorm"], markersize=4
        )
        first = next(iter(ratios.values()), 0.0)
        axes.annotate(
            dtype,
            (first, -0.5 * (len(dtypes) - lane) - 0.3),
            ha="center",
            fontsize=7,
            color=COLORS["jaxnorm"],
        )
    for place in range(1, len(names), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="0.96", zorder=0)
    axes.axvline(1, color="0.5", linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5 * len(dtypes) - 0.8)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("time of a training step over that of Flax's batch norm, in the same dtype")
    axes.set_title(title, fontsize=8, loc="left")
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description="Times every method's layer beside Flax's batch norm.",
    )
    add = parser.add_argument
    add("--methods", nargs="+", choices=ROWS, default=list(ROWS), metavar="METHOD")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE")
    add("--rounds", type=positive, default=9, help="at most; default: %(default)s")
    add(
        "--seconds",
        type=number(at_least=0),
        default=60.0,
        help="after which a dtype starts no other round; default: %(default)s",
    )
    add("--output", type=folder, default="results/methods", metavar="FOLDER")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    facts, results = about(PACKAGES), []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(args.dtypes))
        for dtype in args.dtypes:
            progress.update(task, description=dtype)
            results += measure(dtype, args.methods, rounds=args.rounds, seconds=args.seconds)
            progress.advance(task)
    for dtype in args.dtypes:
        table = Table(*HEADS, title=f"{dtype}, {SHAPE}")
        for result in results:
            if result.dtype == dtype:
                table.add_row(*cells(result))
        console.print(table, highlight=False)
    saved = {"about": facts, "shape": SHAPE, "results": [r._asdict() for r in results]}
    write(args.output / "methods.json", json.dumps(saved, indent=1) + "\n")
    write(args.output / "methods.md", f"{heading(facts)}\n\n{markdown(results)}")
    draw(results, f"{SHAPE}, {facts['device']}", args.output / "methods.png")
    console.print(f"In {args.output}: methods.json, methods.md, methods.png", highlight=False)
    return 0


if __name__ == "__main__":
    restart_with_environment()
    sys.exit(main())
