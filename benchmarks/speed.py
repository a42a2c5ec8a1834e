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

Calls = dict[tuple[str, str], Call]
Arrays = list[jax.Array]


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
