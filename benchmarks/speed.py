"""Time and memory of a normalization layer in training, beside other libraries and beside the floor.

    python -m benchmarks.speed             # everything: about 12 minutes on 2 cores
    python -m benchmarks.speed --quick     # some shapes: under 2 minutes

Prints a table for each method and a summary; writes speed.json (every round), speed.csv, speed.md (the tables as Markdown)
and speed.png. What is measured and how is in benchmarks/README.md.
"""

import argparse
import csv
import importlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
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

from benchmarks.shapes import NUM_GHOSTS, NUM_GROUPS, QUICK, SHAPES
from benchmarks.timing import (
    Call,
    about,
    compiled,
    heading,
    inputs,
    interleaved,
    progress_bar,
    restart_with_environment,
)

METHODS = {
    "batch": ("BatchNorm", {"use_running_average": False}),
    "group": ("GroupNorm", {"num_groups": NUM_GROUPS}),
    "instance": ("InstanceNorm", {}),
    "token_layer": ("LayerNorm", {}),
    "batch_group": ("BatchGroupNorm", {"use_running_average": False, "num_groups": NUM_GROUPS}),
    "ghost_batch": ("GhostBatchNorm", {"use_running_average": False, "num_ghosts": NUM_GHOSTS}),
}
"""Layer and arguments of each method, in Flax and in ours; the last two Flax does not have."""

DTYPES = ("float32", "bfloat16")

KINDS = ("forward", "step")
"""Of the layer alone, in training; a step is forward and backward."""

PACKAGES = ("jaxnorm", "jax", "jaxlib", "flax", "dm-haiku", "equinox", "torch", "numpy")

Apply = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]


class Layer(NamedTuple):
    """A layer in training: `apply(params, state, x)` returns y and the new running statistics."""

    apply: Apply
    params: Any
    state: Any


def _linen(library: ModuleType, method: str, x: jax.Array) -> Layer | None:
    name, options = METHODS[method]
    if not hasattr(library, name):
        return None
    layer = getattr(library, name)(dtype=x.dtype, **options)
    state = dict(layer.init(jax.random.key(0), x))
    params = state.pop("params")
    return Layer(lambda params, state, x: layer.apply({"params": params, **state}, x, mutable=list(state)), params, state)


def _nnx(nnx: ModuleType, method: str, x: jax.Array) -> Layer | None:
    name, options = METHODS[method]
    if not hasattr(nnx, name):
        return None
    layer = getattr(nnx, name)(x.shape[-1], dtype=x.dtype, rngs=nnx.Rngs(0), **options)
    definition, params, state = nnx.split(layer, nnx.Param, ...)

    def apply(params, state, x):
        merged = nnx.merge(definition, params, state)
        y = merged(x)
        return y, nnx.split(merged, nnx.Param, ...)[2]

    return Layer(apply, params, state)


def _haiku(haiku: ModuleType, method: str, x: jax.Array) -> Layer | None:
    forward = {
        "batch": lambda x: haiku.BatchNorm(True, True, 0.99)(x, is_training=True),
        "group": lambda x: haiku.GroupNorm(NUM_GROUPS)(x),
        "instance": lambda x: haiku.InstanceNorm(True, True)(x),
        "token_layer": lambda x: haiku.LayerNorm(-1, True, True, param_axis=-1)(x),
    }.get(method)
    if forward is None:
        return None
    transformed = haiku.transform_with_state(forward)
    params, state = transformed.init(jax.random.key(0), x)
    return Layer(lambda params, state, x: transformed.apply(params, state, None, x), params, state)


def _equinox(equinox: ModuleType, method: str, x: jax.Array) -> Layer | None:
    state = None
    if method == "batch":
        layer, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(x.shape[1], axis_name="batch", mode="batch")
    elif method == "token_layer":
        layer = equinox.nn.LayerNorm(x.shape[-1])
    elif method in ("group", "instance"):
        layer = equinox.nn.GroupNorm(NUM_GROUPS if method == "group" else x.shape[1], x.shape[1])
    else:
        return None
    params, static = equinox.partition(layer, equinox.is_inexact_array)

    def apply(params, state, x):
        f = equinox.combine(params, static)
        if method == "batch":
            return jax.vmap(f, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        for _ in range(x.ndim - 1 if method == "token_layer" else 1):
            f = jax.vmap(f)
        return f(x), state

    return Layer(apply, params, state)


class Peer(NamedTuple):
    """A library: its module, and a function that makes the layer, or None where it has no such layer.

    `make(module, method, x)`, with channels first in x of images where the library has them first.
    """

    module: str
    make: Callable[[ModuleType, str, jax.Array], Layer | None]
    channels_first: bool = False


OURS = "jaxnorm"

PEERS = {
    OURS: Peer("jaxnorm.linen", _linen),
    "linen": Peer("flax.linen", _linen),
    "nnx": Peer("flax.nnx", _nnx),
    "haiku": Peer("haiku", _haiku),
    "equinox": Peer("equinox", _equinox, channels_first=True),
}

TORCH = ("torch_last", "torch_first")
"""Torch on a tensor with channels last in memory, and first."""


class Case(NamedTuple):
    """What was measured at one method, shape and dtype.

    `seconds[name][kind]` has a time for each round; the others have a number for each JAX library: bytes of temporaries and
    of what is kept for the backward pass, both over the bytes of x, and seconds to compile the step.
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
        return [name for name in PEERS if name in self.seconds and name != OURS]

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
        return {"best": self.ratio(best, kind)} | {name: self.ratio(name, kind) for name in ("linen", torch, "floor") if name}


class Library(NamedTuple):
    """The peers asked for that can be imported."""

    jax: dict[str, ModuleType]
    torch: ModuleType | None


def load(names: Sequence[str], console: Console) -> Library:
    """Imports the libraries, and says which are left out."""
    modules: dict[str, ModuleType] = {}
    for name in names:
        module = "torch" if name == "torch" else PEERS[name].module
        try:
            modules[name] = importlib.import_module(module)
        except ImportError as error:
            console.print(f"{name} is left out: {error}", highlight=False)
    torch = modules.pop("torch", None)
    return Library(modules, torch)


def measure(method: str, shape: str, dtype: str, libraries: Library, *, rounds: int, seconds: float) -> Case:
    """Compiles and times one method at one shape in all libraries."""
    dims = SHAPES[shape].on(jax.default_backend())
    xs, cts = inputs(dims, dtype, 0), inputs(dims, dtype, 1)
    case = Case(method, shape, dims, dtype, {}, {}, {}, {})
    calls: dict[Any, Call] = {}
    first: tuple[list[jax.Array], ...] = ()
    for name, module in libraries.jax.items():
        of_images = PEERS[name].channels_first and method != "token_layer"
        if of_images and not first:
            first = tuple([jnp.moveaxis(t, -1, 1) for t in ts] for ts in (xs, cts))
        layer = PEERS[name].make(module, method, (first if of_images else (xs, cts))[0][0])
        if layer is not None:
            calls |= _jax_calls(case, name, layer, *(first if of_images else (xs, cts)))
    calls |= {("jax", part): call for part, call in _jax_floor(xs, cts).items()}
    if libraries.torch is not None:
        calls |= _torch_calls(libraries.torch, method, xs, cts)
    times = interleaved(calls, rounds=rounds, seconds=seconds)
    for name, kind in calls:
        if kind in KINDS:
            case.seconds.setdefault(name, {})[kind] = times[name, kind]
    # A floor is made of passes over memory, each as fast as the faster library does it in that round.
    best = {part: np.min([times[key] for key in times if key[1] == part], 0) for part in FLOOR}
    forward = best["copy"] + best["sum"]
    case.seconds["floor"] = {"forward": forward.tolist(), "step": (forward + best["dot"] + best["ternary"]).tolist()}
    return case


def _jax_calls(case: Case, name: str, layer: Layer, xs: list[jax.Array], cts: list[jax.Array]) -> dict[Any, Call]:
    """Compiles a layer; its calls, with memory and compile time written into `case`."""

    def apply(params, state, x):
        y, state = layer.apply(params, state, x)
        return y.astype(x.dtype), state

    def step(params, state, x, ct):
        y, vjp, state = jax.vjp(lambda *args: apply(args[0], state, args[1]), params, x, has_aux=True)
        # A cotangent comes after y: passes of forward and backward cannot be one.
        _, ct = lax.optimization_barrier((y, ct))
        return y, state, vjp(ct)

    def backward(params, state, x, ct):
        return jax.vjp(lambda *args: jax.nn.relu(apply(args[0], state, args[1])[0]), params, x)[1](ct)

    def kept(params, state, x):
        vjp = jax.vjp(lambda *args: apply(args[0], state, args[1])[0], params, x)[1]
        return list({id(t): t for t in jax.tree.leaves(vjp)}.values())

    args, x = (layer.params, layer.state), xs[0]
    run_forward, _ = compiled(apply, *args, x)
    run_step, case.compile_seconds[name] = compiled(step, *args, x, cts[0])
    case.temporary[name] = compiled(backward, *args, x, cts[0])[0].memory_analysis().temp_size_in_bytes / x.nbytes
    case.kept[name] = sum(t.size * t.dtype.itemsize for t in jax.eval_shape(kept, *args, x)) / x.nbytes
    return {
        (name, "forward"): Call(lambda i: run_forward(*args, xs[i % len(xs)])),
        (name, "step"): Call(lambda i: run_step(*args, xs[i % len(xs)], cts[i % len(xs)])),
    }


FLOOR = ("copy", "sum", "dot", "ternary")
"""Passes over the tensor. No forward pass can do without a sum and a copy, no backward pass without a sum over two arrays and
a pass that reads two and writes one."""


def _jax_floor(xs: list[jax.Array], cts: list[jax.Array]) -> dict[str, Call]:
    def on_inputs(f: Callable[..., jax.Array]) -> Call:
        f, _ = compiled(f, xs[0], cts[0])
        return Call(lambda i: f(xs[i % len(xs)], cts[i % len(xs)]))

    return {
        "copy": on_inputs(lambda x, ct: -x),
        "sum": on_inputs(lambda x, ct: jnp.sum(x, dtype=jnp.float32)),
        "dot": on_inputs(lambda x, ct: jnp.sum(x.astype(jnp.float32) * ct.astype(jnp.float32))),
        "ternary": on_inputs(lambda x, ct: 2 * x + ct),
    }


def _torch_calls(torch: Any, method: str, xs: list[jax.Array], cts: list[jax.Array]) -> dict[Any, Call]:
    """Calls of torch's functions and of its passes over memory."""
    gpu = xs[0].devices().pop().platform == "gpu" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = getattr(torch, xs[0].dtype.name)
    torch.backends.cudnn.benchmark = True

    def wait(_: object) -> None:
        if gpu:
            torch.cuda.synchronize()

    def to_torch(t: jax.Array) -> Any:
        # Channels last in memory, as in JAX; torch counts them second.
        t = torch.from_numpy(np.array(t, np.float32)).to(device=device, dtype=dtype)
        return t if method == "token_layer" else t.movedim(-1, 1)

    def on_inputs(f: Callable[..., Any], xs: list[Any], cts: list[Any]) -> Call:
        return Call(lambda i: f(xs[i % len(xs)], cts[i % len(xs)]), wait)

    last = [to_torch(t) for t in xs], [to_torch(t) for t in cts]
    flat = [[t.movedim(1, -1).reshape(-1) if method != "token_layer" else t.reshape(-1) for t in ts] for ts in last]
    calls = {
        ("torch", "copy"): on_inputs(lambda x, ct: torch.neg(x), *flat),
        ("torch", "sum"): on_inputs(lambda x, ct: torch.sum(x, dtype=torch.float32), *flat),
        ("torch", "dot"): on_inputs(lambda x, ct: torch.dot(x, ct), *flat),
        ("torch", "ternary"): on_inputs(lambda x, ct: torch.add(ct, x, alpha=2), *flat),
    }
    layouts = {"torch_last": last}
    if method != "token_layer":
        layouts["torch_first"] = tuple([t.contiguous() for t in ts] for ts in last)
    for name, (tensors, cotangents) in layouts.items():
        layer = _torch_layer(torch, method, tensors[0])
        if layer is None:
            break
        f, params = layer
        keep_layout = name == "torch_last" and method != "token_layer"

        def forward(x, f=f, keep_layout=keep_layout):
            y = f(x)
            return y.contiguous(memory_format=torch.channels_last) if keep_layout else y

        def step(x, ct, forward=forward, params=params):
            y = forward(x)
            return y, torch.autograd.grad(y, (x, *params), ct)

        tensors = [t.requires_grad_() for t in tensors]
        calls[name, "forward"] = on_inputs(lambda x, ct, forward=forward: forward(x), tensors, cotangents)
        calls[name, "step"] = on_inputs(step, tensors, cotangents)
    return calls


def _torch_layer(torch: Any, method: str, x: Any) -> tuple[Callable[[Any], Any], tuple[Any, Any]] | None:
    """Torch's function of x, with running statistics in batch norm, and its parameters."""
    functional, channels = torch.nn.functional, x.shape[-1 if method == "token_layer" else 1]
    # Where x is narrower, batch norm takes float32 parameters, the others those of x's dtype.
    dtype = torch.float32 if method == "batch" else x.dtype
    options = {"device": x.device, "dtype": dtype}
    weight, bias = torch.ones(channels, **options).requires_grad_(), torch.zeros(channels, **options).requires_grad_()
    mean, var = torch.zeros(channels, **options), torch.ones(channels, **options)
    f = {
        "batch": lambda x: functional.batch_norm(x, mean, var, weight, bias, training=True),
        "group": lambda x: functional.group_norm(x, NUM_GROUPS, weight, bias),
        "instance": lambda x: functional.instance_norm(x, weight=weight, bias=bias),
        "token_layer": lambda x: functional.layer_norm(x, (channels,), weight, bias),
    }.get(method)
    return None if f is None else (f, (weight, bias))


# Tables: a title and rows of texts, the first row the column heads; printed by rich and written as Markdown.
Rows = list[list[str]]


def tables(cases: Sequence[Case]) -> dict[str, Rows]:
    """A table for each method, and the summary."""
    by_method: dict[str, Rows] = {}
    for case in cases:
        title = f"{METHODS[case.method][0]} ({case.method})"
        rows = by_method.setdefault(title, [["shape", "x", "dtype", "ms", *HEADS.values(), "temporaries", "kept", "compile s"]])
        rows.append(_row(case))
    return by_method | {"Summary": _summary(cases)}


HEADS = {"best": "/ best JAX", "linen": "/ Flax", "torch": "/ torch", "floor": "/ floor"}


def _row(case: Case) -> list[str]:
    compared = [case.compared(kind) for kind in KINDS]
    cells = [case.shape, "x".join(map(str, case.dims)), case.dtype]
    cells.append(_pair(case.time(OURS, kind) * 1e3 for kind in KINDS))
    cells += [_pair(_find(ratios, head) for ratios in compared) for head in HEADS]
    best = "/".join(name for kind in KINDS if (name := case.fastest(case.rivals, kind)))
    cells[4] += f" ({best})" if best else ""
    for numbers in (case.temporary, case.kept):
        cells.append(_pair([numbers[OURS], min((numbers[name] for name in case.rivals), default=None)]))
    cells.append(_pair([case.compile_seconds[OURS], case.compile_seconds.get("linen")]))
    return cells


def _find(ratios: Mapping[str, float | None], head: str) -> float | None:
    """A ratio by its column; both layouts of torch are in one."""
    return next((ratio for name, ratio in ratios.items() if name.startswith(head)), None)


def _pair(numbers: Any) -> str:
    texts = ["–" if number is None else f"{number:.2f}" for number in numbers]
    return " / ".join(texts) if set(texts) != {"–"} else "–"


def _summary(cases: Sequence[Case]) -> Rows:
    rows = [["method", "dtype", "shapes", *HEADS.values(), "worst / best JAX", "temporaries", "kept"]]
    for (method, dtype), group in _grouped(cases):
        ratios = {kind: [case.compared(kind) for case in group] for kind in KINDS}
        cells = [method, dtype, str(len(group))]
        cells += [_pair(_mean(_find(one, head) for one in ratios[kind]) for kind in KINDS) for head in HEADS]
        worst = []
        for kind in KINDS:
            found = [(ratio, case.shape) for case in group if (ratio := case.compared(kind)["best"]) is not None]
            worst += ["{:.2f} {}".format(*max(found))] if found else []
        cells.append(" / ".join(worst) or "–")
        for field in ("temporary", "kept"):
            cells.append(_pair([max(getattr(case, field)[OURS] for case in group)]))
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
    """Prints the tables, wide enough for the terminal or not."""
    for title, (heads, *rows) in all_rows.items():
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for head in heads:
            table.add_column(head, overflow="fold")
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
    names = [name for name in (*PEERS, *TORCH) if any(name in case.seconds for case in cases)]
    with style.context("tableau-colorblind10"):
        figure = Figure(figsize=(13, 4 * len(dtypes) + 1), layout="constrained")
        panels = figure.subplots(len(dtypes), len(KINDS), squeeze=False)
    for axes, (dtype, kind) in zip(panels.flat, ((dtype, kind) for dtype in dtypes for kind in KINDS), strict=True):
        methods = list(dict.fromkeys(case.method for case in cases if case.dtype == dtype))
        for index, name in enumerate(names):
            heights = [_mean(_over_floor(cases, name, method, dtype, kind)) or np.nan for method in methods]
            places = np.arange(len(methods)) + (index - (len(names) - 1) / 2) * 0.8 / len(names)
            bars = axes.bar(places, heights, 0.8 / len(names), label=name)
            axes.bar_label(bars, ["" if np.isnan(height) else f"{height:.1f}" for height in heights], fontsize=6)
        axes.axhline(1, color="black", linewidth=1, label="floor")
        axes.set_yscale("log")
        axes.set_xticks(range(len(methods)), methods)
        axes.set_title(f"{kind}, {dtype}")
        axes.set_ylabel("time / floor")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"Time of a normalization layer in training over the floor, mean over shapes\n{title}", fontsize=10)
    figure.savefig(path, dpi=150)


def _over_floor(cases: Sequence[Case], name: str, method: str, dtype: str, kind: str) -> Iterator[float]:
    for case in cases:
        if (case.method, case.dtype) == (method, dtype) and name in case.seconds:
            yield float(np.median(np.divide(case.seconds[name][kind], case.seconds["floor"][kind])))


def write(folder: Path, facts: Mapping[str, Any], cases: Sequence[Case]) -> None:
    """Writes speed.json, speed.csv, speed.md and speed.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.json").write_text(json.dumps({"about": facts, "cases": [case._asdict() for case in cases]}, indent=1))
    (folder / "speed.csv").write_text(_csv(cases))
    (folder / "speed.md").write_text(f"{heading(facts)}\n\n    {facts['command']}\n\n{markdown(tables(cases))}")
    draw(cases, heading(facts), folder / "speed.png")


def _csv(cases: Sequence[Case]) -> str:
    """A line for each library at each case."""
    text = io.StringIO()
    heads = ["method", "shape", "dims", "dtype", "library", "forward_ms", "step_ms", "forward_ratio", "step_ratio"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*heads, "temporary", "kept", "compile_s"])
    for case in cases:
        for name in case.seconds:
            line = [case.method, case.shape, "x".join(map(str, case.dims)), case.dtype, name]
            line += [f"{case.time(name, kind) * 1e3:.5g}" for kind in KINDS]
            numbers = [*(case.ratio(name, kind) for kind in KINDS)]
            numbers += [of.get(name) for of in (case.temporary, case.kept, case.compile_seconds)]
            writer.writerow(line + ["" if number is None else f"{number:.4g}" for number in numbers])
    return text.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns its exit status."""
    args = _parser().parse_args(argv)
    console = Console()
    libraries = load([OURS, *args.peers], console)
    facts = about(PACKAGES)
    shapes = args.shapes or (QUICK if args.quick else SHAPES)
    plans = [(m, s, d) for m in args.methods for s in shapes if m in SHAPES[s].methods for d in args.dtypes]
    if not plans:
        console.print("None of these shapes is meant for one of these methods.")
        return 2
    cases: list[Case] = []
    options = {"rounds": args.rounds or (5 if args.quick else 9), "seconds": args.seconds or (2 if args.quick else 6)}
    try:
        with progress_bar() as progress:
            task = progress.add_task("", total=len(plans))
            for plan in plans:
                progress.update(task, description=" ".join(plan))
                cases.append(measure(*plan, libraries, **options))
                progress.advance(task)
    except KeyboardInterrupt:
        console.print(f"Interrupted after {len(cases)} of {len(plans)}.")
        if not cases:
            return 130
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
    "a / b: forward / step, our time and its ratio to others', in the summary as geometric mean; below 1 we are faster. "
    "temporaries, kept: ours / least of the other JAX libraries, over the bytes of x. compile: ours / Flax."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description="Time and memory of a normalization layer in training."
    )
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=f"some of {', '.join(METHODS)}")
    add("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=f"some of {', '.join(SHAPES)}")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE", help=f"some of {', '.join(DTYPES)}")
    names = [*(name for name in PEERS if name != OURS), "torch"]
    add("--peers", nargs="*", choices=names, default=names, metavar="LIBRARY", help=f"some of {', '.join(names)}")
    add("--rounds", type=int, metavar="N", help="default: 9; with --quick 5")
    add("--seconds", type=float, metavar="S", help="per case, after which no other round starts (default: 6; with --quick 2)")
    add("--output", type=Path, default=Path("results/speed"), metavar="FOLDER", help="default: %(default)s")
    add("--quick", action="store_true", help=f"the shapes {', '.join(QUICK)} and fewer rounds; under 2 minutes on 2 cores")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    return parser


if __name__ == "__main__":
    restart_with_environment()
    raise SystemExit(main())
