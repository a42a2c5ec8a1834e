"""Time and memory of a normalization layer in training, beside other libraries and beside the
floor.

    python -m benchmarks.speed             # everything: about 12 minutes on 2 cores
    python -m benchmarks.speed --quick     # some shapes: under 2 minutes

Prints a table for each method and a summary; writes speed.json (every round), speed.csv, speed.md
(the tables as Markdown) and speed.png. What is measured and how is in benchmarks/README.md.
"""

import argparse
import csv
import importlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib import style
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.files import replacing
from benchmarks.files import write as write_text
from benchmarks.libraries import LIBRARIES, METHODS, Layer, installed
from benchmarks.options import folder, number, positive
from benchmarks.shapes import NUM_GROUPS, QUICK, SHAPES
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

DTYPES = ("float32", "bfloat16", "float16")
"""The last is measured on request: few libraries are made for it on a CPU."""

KINDS = ("forward", "step")
"""Of the layer alone, in training; a step is forward and backward."""

PACKAGES = ("jaxnorm", "jax", "jaxlib", "flax", "dm-haiku", "equinox", "torch", "numpy")

OURS = "jaxnorm"

FLAX = "flax.linen"

TORCH = ("torch_last", "torch_first")
"""Torch on a tensor with channels last in memory, and first."""


Calls = dict[tuple[str, str], Call]
Arrays = list[jax.Array]


class Case(NamedTuple):
    """What was measured at one method, shape and dtype.

    `seconds[name][kind]` has a time for each round; the others have a number for each JAX library:
    bytes of temporaries and of what is kept for the backward pass, both over the bytes of x, and
    seconds to compile the step.
    """

    method: str
    shape: str
    dims: tuple[int, ...]
    dtype: str
    seconds: dict[str, dict[str, list[float]]]
    temporary: dict[str, float]
    kept: dict[str, float]
    compile_seconds: dict[str, float]

    @property
    def rivals(self) -> list[str]:
        """The JAX libraries that have this layer, besides ours."""
        return [name for name in LIBRARIES if name in self.seconds and name != OURS]

    @property
    def torches(self) -> list[str]:
        return [name for name in TORCH if name in self.seconds]

    def time(self, name: str, kind: str) -> float:
        """25th percentile over the rounds."""
        return float(np.percentile(self.seconds[name][kind], 25))

    def fastest(self, names: Sequence[str], kind: str) -> str | None:
        """The one of `names` with the least time."""
        return min(names, key=lambda name: self.time(name, kind), default=None)

    def ratio(self, name: str | None, kind: str) -> float | None:
        """Median over the rounds of our time over that of `name`."""
        if name not in self.seconds:
            return None
        return float(np.median(np.divide(self.seconds[OURS][kind], self.seconds[name][kind])))

    def compared(self, kind: str) -> dict[str, float | None]:
        """Our time over that of the best JAX library, Flax, torch and the floor."""
        best, torch = self.fastest(self.rivals, kind), self.fastest(self.torches, kind)
        return {"best": self.ratio(best, kind)} | {
            name: self.ratio(name, kind) for name in (FLAX, torch, "floor") if name
        }


def measure(
    method: str,
    shape: str,
    dtype: str,
    libraries: Sequence[str],
    torch: Any = None,
    *,
    rounds: int,
    seconds: float,
) -> Case:
    """Compiles and times one method at one shape in all libraries; `torch` is its module."""
    dims = SHAPES[shape].on(jax.default_backend())
    x, ct = normal(dims, dtype, 0), normal(dims, dtype, 1)
    last = copies(x), copies(ct)
    first = None
    case = Case(method, shape, dims, dtype, {}, {}, {}, {})
    calls: Calls = {}
    for name in libraries:
        layer = LIBRARIES[name].layer(method, jax.ShapeDtypeStruct(dims, dtype))
        if layer is None:
            continue
        if not layer.channels_last and first is None:
            first = copies(jnp.moveaxis(x, -1, 1)), copies(jnp.moveaxis(ct, -1, 1))
        calls |= _layer_calls(
            case, name, layer, *(last if layer.channels_last or first is None else first)
        )
    calls |= _floor_calls(*last)
    if torch is not None:
        calls |= _torch_calls(torch, method, *last)
    times = interleaved(calls, rounds=rounds, seconds=seconds)
    for name, kind in calls:
        if kind in KINDS:
            case.seconds.setdefault(name, {})[kind] = times[name, kind]
    # A floor is made of passes over memory, each as fast as the faster library does it in that
    # round.
    best = {part: np.min([times[key] for key in times if key[1] == part], 0) for part in FLOOR}
    forward = best["copy"] + best["sum"]
    case.seconds["floor"] = {
        "forward": forward.tolist(),
        "step": (forward + best["dot"] + best["ternary"]).tolist(),
    }
    return case


def _layer_calls(case: Case, name: str, layer: Layer, xs: Arrays, cts: Arrays) -> Calls:
    """Compiles a layer; its calls, with memory and compile time written into `case`."""

    def apply(params, state, x):
        y, state = layer.train(params, state, x)
        return y.astype(x.dtype), state

    def step(params, state, x, ct):
        y, vjp, state = jax.vjp(
            lambda *args: apply(args[0], state, args[1]), params, x, has_aux=True
        )
        # A cotangent comes after y: passes of forward and backward cannot be one.
        _, ct = lax.optimization_barrier((y, ct))
        return y, state, vjp(ct)

    def backward(params, state, x, ct):
        return jax.vjp(lambda *args: jax.nn.relu(apply(args[0], state, args[1])[0]), params, x)[1](
            ct
        )

    def kept(params, state, x):
        vjp = jax.vjp(lambda *args: apply(args[0], state, args[1])[0], params, x)[1]
        return list({id(t): t for t in jax.tree.leaves(vjp)}.values())

    args, x = (
        jax.tree.map(lambda t: jnp.ones(t.shape, t.dtype), (layer.parameters, layer.state)),
        xs[0],
    )
    run_forward, _ = compiled(apply, *args, x)
    run_step, case.compile_seconds[name] = compiled(step, *args, x, cts[0])
    case.temporary[name] = (
        compiled(backward, *args, x, cts[0])[0].memory_analysis().temp_size_in_bytes / x.nbytes
    )
    case.kept[name] = (
        sum(t.size * t.dtype.itemsize for t in jax.eval_shape(kept, *args, x)) / x.nbytes
    )
    return {
        (name, "forward"): Call(lambda i: run_forward(*args, xs[i % len(xs)])),
        (name, "step"): Call(lambda i: run_step(*args, xs[i % len(xs)], cts[i % len(xs)])),
    }


FLOOR = ("copy", "sum", "dot", "ternary")
"""Passes over the tensor. No forward pass can do without a sum and a copy, no backward pass without
a sum over two arrays and a pass that reads two and writes one."""


def _floor_calls(xs: Arrays, cts: Arrays) -> Calls:
    def on_inputs(f: Callable[[jax.Array, jax.Array], jax.Array]) -> Call:
        f, _ = compiled(f, xs[0], cts[0])
        return Call(lambda i: f(xs[i % len(xs)], cts[i % len(xs)]))

    return {
        ("jax", "copy"): on_inputs(lambda x, ct: -x),
        ("jax", "sum"): on_inputs(lambda x, ct: jnp.sum(x, dtype=jnp.float32)),
        ("jax", "dot"): on_inputs(
            lambda x, ct: jnp.sum(x.astype(jnp.float32) * ct.astype(jnp.float32))
        ),
        ("jax", "ternary"): on_inputs(lambda x, ct: 2 * x + ct),
    }


def _torch_calls(torch: Any, method: str, xs: Arrays, cts: Arrays) -> Calls:
    """Calls of torch's functions and of its passes over memory."""
    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    dtype = getattr(torch, xs[0].dtype.name)
    images = method != "token_layer"
    torch.backends.cudnn.benchmark = True

    def to_torch(ts: Arrays) -> list[Any]:
        t = torch.from_numpy(np.array(ts[0], np.float32)).to(
            device="cuda" if gpu else "cpu", dtype=dtype
        )
        return [t.clone() for _ in ts]

    def on_inputs(f: Callable[[Any, Any], Any], xs: list[Any], cts: list[Any]) -> Call:
        return Call(
            lambda i: f(xs[i % len(xs)], cts[i % len(xs)]),
            lambda _: torch.cuda.synchronize() if gpu else None,
        )

    last = to_torch(xs), to_torch(cts)
    flat = [x.flatten() for x in last[0]], [ct.flatten() for ct in last[1]]
    calls = {
        ("torch", "copy"): on_inputs(lambda x, ct: torch.neg(x), *flat),
        ("torch", "sum"): on_inputs(lambda x, ct: torch.sum(x, dtype=torch.float32), *flat),
        ("torch", "dot"): on_inputs(torch.dot, *flat),
        ("torch", "ternary"): on_inputs(lambda x, ct: torch.add(ct, x, alpha=2), *flat),
    }
    layouts = {"torch_last": last}
    if images:  # torch counts channels second, wherever they are in memory
        layouts["torch_last"] = (
            [x.movedim(-1, 1) for x in last[0]],
            [ct.movedim(-1, 1) for ct in last[1]],
        )
        second = layouts["torch_last"]
        layouts["torch_first"] = (
            [x.contiguous() for x in second[0]],
            [ct.contiguous() for ct in second[1]],
        )
    for name, (tensors, cotangents) in layouts.items():
        layer = _torch_layer(torch, method, tensors[0])
        if layer is None:
            break
        # Group norm may hand channels first to a network that has them last, which then needs a
        # copy.
        memory_format = (
            torch.channels_last if images and name == "torch_last" else torch.contiguous_format
        )
        forward = partial(_torch_forward, layer[0], memory_format)
        tensors = [x.requires_grad_() for x in tensors]
        calls[name, "forward"] = on_inputs(
            lambda x, ct, forward=forward: forward(x), tensors, cotangents
        )
        calls[name, "step"] = on_inputs(
            partial(_torch_step, torch, forward, layer[1]), tensors, cotangents
        )
    return calls


def _torch_forward(f: Callable[[Any], Any], memory_format: Any, x: Any) -> Any:
    return f(x).contiguous(memory_format=memory_format)


def _torch_step(
    torch: Any, forward: Callable[[Any], Any], params: tuple[Any, ...], x: Any, ct: Any
) -> Any:
    y = forward(x)
    return y, torch.autograd.grad(y, (x, *params), ct)


def _torch_layer(
    torch: Any, method: str, x: Any
) -> tuple[Callable[[Any], Any], tuple[Any, Any]] | None:
    """Torch's function of x, with running statistics in batch norm, and its parameters."""
    functional, channels = torch.nn.functional, x.shape[-1 if method == "token_layer" else 1]
    # Where x is narrower, batch norm takes float32 parameters, the others those of x's dtype.
    dtype = torch.float32 if method == "batch" else x.dtype
    options = {"device": x.device, "dtype": dtype}
    weight, bias = (
        torch.ones(channels, **options).requires_grad_(),
        torch.zeros(channels, **options).requires_grad_(),
    )
    mean, var = torch.zeros(channels, **options), torch.ones(channels, **options)
    f = {
        "batch": lambda x: functional.batch_norm(x, mean, var, weight, bias, training=True),
        "group": lambda x: functional.group_norm(x, NUM_GROUPS, weight, bias),
        "instance": lambda x: functional.instance_norm(x, weight=weight, bias=bias),
        "token_layer": lambda x: functional.layer_norm(x, (channels,), weight, bias),
    }.get(method)
    return None if f is None else (f, (weight, bias))


Rows = list[list[str]]
"""A table: the column heads, then a row of texts each. Printed by rich and written as Markdown."""

HEADS = {"best": "/ best JAX", FLAX: "/ Flax", "torch": "/ torch", "floor": "/ floor"}


def tables(cases: Sequence[Case]) -> dict[str, Rows]:
    """Titles and tables: one for each method and dtype, and the summary."""
    found = {}
    for (method, dtype), group in _grouped(cases):
        heads = ["shape", "ms", *HEADS.values(), "temporaries", "kept", "compile s"]
        found[f"{METHODS[method]}, {dtype}"] = [heads, *map(_row, group)]
    return found | {"Summary": _summary(cases)}


def _row(case: Case) -> list[str]:
    compared = [case.compared(kind) for kind in KINDS]
    cells = [case.shape, _pair(case.time(OURS, kind) * 1e3 for kind in KINDS)]
    cells += [_pair(_find(ratios, head) for ratios in compared) for head in HEADS]
    for numbers in (case.temporary, case.kept):
        cells.append(
            _pair([numbers[OURS], min((numbers[name] for name in case.rivals), default=None)])
        )
    return [*cells, _pair([case.compile_seconds[OURS], case.compile_seconds.get(FLAX)])]


def _find(ratios: Mapping[str, float | None], head: str) -> float | None:
    """A ratio by its column; both layouts of torch are in one."""
    return next((ratio for name, ratio in ratios.items() if name.startswith(head)), None)


def _pair(numbers: Any) -> str:
    texts = ["–" if number is None else f"{number:.2f}" for number in numbers]
    return " / ".join(texts) if set(texts) != {"–"} else "–"


def _summary(cases: Sequence[Case]) -> Rows:
    rows = [
        [
            "method",
            "dtype",
            "shapes",
            *HEADS.values(),
            "worst forward",
            "worst step",
            "temporaries",
            "kept",
        ]
    ]
    for (method, dtype), group in _grouped(cases):
        ratios = {kind: [case.compared(kind) for case in group] for kind in KINDS}
        cells = [method, dtype, str(len(group))]
        cells += [
            _pair(_mean(_find(one, head) for one in ratios[kind]) for kind in KINDS)
            for head in HEADS
        ]
        for kind in KINDS:
            worst = max(
                zip(
                    (one["best"] or 0 for one in ratios[kind]),
                    (case.shape for case in group),
                    strict=True,
                )
            )
            cells.append("{:.2f} {}".format(*worst) if worst[0] else "–")
        cells += [
            f"{max(getattr(case, field)[OURS] for case in group):.2f}"
            for field in ("temporary", "kept")
        ]
        rows.append(cells)
    return rows


def _grouped(cases: Sequence[Case]) -> Iterator[tuple[tuple[str, str], list[Case]]]:
    for key in dict.fromkeys((case.method, case.dtype) for case in cases):
        yield key, [case for case in cases if (case.method, case.dtype) == key]


def _mean(ratios: Any) -> float | None:
    """Geometric mean of the ratios that there are."""
    logs = [math.log(ratio) for ratio in ratios if ratio is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def print_tables(console: Console, all_rows: Mapping[str, Rows]) -> None:
    """Prints the tables."""
    for title, (heads, *rows) in all_rows.items():
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for head in heads:
            table.add_column(head, no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table, highlight=False)


def markdown(all_rows: Mapping[str, Rows]) -> str:
    """The tables in Markdown."""
    parts = []
    for title, (heads, *rows) in all_rows.items():
        lines = [heads, ["---"] * len(heads), *rows]
        parts.append(f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def draw(cases: Sequence[Case], title: str, path: Path) -> None:
    """Draws each library's time over the floor, the geometric mean over the shapes."""
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    names = [name for name in (*LIBRARIES, *TORCH) if any(name in case.seconds for case in cases)]
    with style.context("tableau-colorblind10"):
        figure = Figure(figsize=(13, 4 * len(dtypes) + 1), layout="constrained")
        panels = figure.subplots(len(dtypes), len(KINDS), squeeze=False)
    for axes, (dtype, kind) in zip(
        panels.flat, ((dtype, kind) for dtype in dtypes for kind in KINDS), strict=True
    ):
        methods = list(dict.fromkeys(case.method for case in cases if case.dtype == dtype))
        for index, name in enumerate(names):
            heights = [
                _mean(_over_floor(cases, name, method, dtype, kind)) or np.nan for method in methods
            ]
            places = np.arange(len(methods)) + (index - (len(names) - 1) / 2) * 0.8 / len(names)
            bars = axes.bar(places, heights, 0.8 / len(names), label=name)
            axes.bar_label(
                bars,
                ["" if np.isnan(height) else f"{height:.1f}" for height in heights],
                fontsize=6,
            )
        axes.axhline(1, color="black", linewidth=1, label="floor")
        axes.set_yscale("log")
        axes.set_xticks(range(len(methods)), methods)
        axes.set_title(f"{kind}, {dtype}")
        axes.set_ylabel("time / floor, less is better")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"Time of a normalization layer in training over the floor, mean over shapes\n{title}",
        fontsize=10,
    )
    with replacing(path) as new:
        figure.savefig(new, dpi=150, format="png")


def _over_floor(
    cases: Sequence[Case], name: str, method: str, dtype: str, kind: str
) -> Iterator[float]:
    for case in cases:
        if (case.method, case.dtype) == (method, dtype) and name in case.seconds:
            yield float(np.median(np.divide(case.seconds[name][kind], case.seconds["floor"][kind])))


def write(output: Path, facts: Mapping[str, Any], cases: Sequence[Case]) -> None:
    """Writes speed.json, speed.csv, speed.md and speed.png."""
    write_text(
        output / "speed.json",
        json.dumps({"about": facts, "cases": [case._asdict() for case in cases]}, indent=1),
    )
    write_text(output / "speed.csv", _csv(cases))
    write_text(
        output / "speed.md",
        f"{heading(facts)}\n\n    {facts['command']}\n\n{markdown(tables(cases))}",
    )
    draw(cases, heading(facts), output / "speed.png")


def _csv(cases: Sequence[Case]) -> str:
    """A line for each library at each case."""
    text = io.StringIO()
    heads = [
        "method",
        "shape",
        "dims",
        "dtype",
        "library",
        "forward_ms",
        "step_ms",
        "forward_ratio",
        "step_ratio",
    ]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*heads, "temporary", "kept", "compile_s"])
    for case in cases:
        for name in case.seconds:
            line = [case.method, case.shape, "x".join(map(str, case.dims)), case.dtype, name]
            line += [f"{case.time(name, kind) * 1e3:.5g}" for kind in KINDS]
            numbers = [*(case.ratio(name, kind) for kind in KINDS)]
            numbers += [of.get(name) for of in (case.temporary, case.kept, case.compile_seconds)]
            writer.writerow(
                line + ["" if number is None else f"{number:.4g}" for number in numbers]
            )
    return text.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    missing = [name for name in args.peers if name not in _installed()]
    if missing:
        console.print(f"Left out, not installed: {', '.join(missing)}", highlight=False)
    libraries = [
        name for name in LIBRARIES if name == OURS or name in args.peers and name not in missing
    ]
    torch = (
        importlib.import_module("torch")
        if "torch" in args.peers and "torch" not in missing
        else None
    )
    facts = about(PACKAGES)
    shapes = args.shapes or (QUICK if args.quick else SHAPES)
    plans = [
        (m, s, d)
        for m in args.methods
        for s in shapes
        if m in SHAPES[s].methods
        for d in args.dtypes
    ]
    if not plans:
        parser.error("none of these shapes is measured with any of these methods")
    cases: list[Case] = []
    options = {
        "rounds": args.rounds or (5 if args.quick else 9),
        "seconds": args.seconds or (2 if args.quick else 6),
    }
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(plans))
            for plan in plans:
                progress.update(task, description=" ".join(plan))
                cases.append(measure(*plan, libraries, torch, **options))
                progress.advance(task)
    except KeyboardInterrupt:
        console.print(f"Interrupted after {len(cases)} of {len(plans)}.")
    finally:
        if cases:
            write(args.output, facts, cases)
    console.print(heading(facts), highlight=False)
    if args.markdown:
        print(markdown(tables(cases)))
    else:
        print_tables(console, tables(cases))
        console.print(CAPTION, highlight=False)
    console.print(f"In {args.output}: speed.json, speed.csv, speed.md, speed.png", highlight=False)
    return 0 if len(cases) == len(plans) else 130


CAPTION = (
    "a / b: forward / step, our time and its ratio to others', below 1 where we are faster; "
    "temporaries and kept, over the bytes of x: ours / least of the other JAX libraries; compile: "
    "ours / Flax. Summary: geometric means over shapes, worst ratio to the best JAX library, most "
    "temporaries and kept of ours."
)


def _installed() -> list[str]:
    return installed() + (["torch"] if util.find_spec("torch") else [])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description="Time and memory of a normalization layer in training.",
    )
    add = parser.add_argument
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=f"some of {', '.join(METHODS)}",
    )
    add("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=f"some of {', '.join(SHAPES)}")
    add(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES[:2]),
        metavar="DTYPE",
        help=f"some of {', '.join(DTYPES)}",
    )
    names = [*(name for name in LIBRARIES if name != OURS), "torch"]
    add(
        "--peers",
        nargs="*",
        choices=names,
        default=names,
        metavar="LIBRARY",
        help=f"some of {', '.join(names)}",
    )
    add("--rounds", type=positive, metavar="N", help="default: 9; with --quick 5")
    add(
        "--seconds",
        type=number(at_least=0),
        metavar="S",
        help="per case, after which no other round starts (default: 6; with --quick 2)",
    )
    add(
        "--output",
        type=folder,
        default="results/speed",
        metavar="FOLDER",
        help="default: %(default)s",
    )
    add(
        "--quick",
        action="store_true",
        help=f"the shapes {', '.join(QUICK)} and fewer rounds; under 2 minutes on 2 cores",
    )
    add("--markdown", action="store_true", help="print the tables as Markdown")
    return parser


if __name__ == "__main__":
    restart_with_environment()
    raise SystemExit(main())
