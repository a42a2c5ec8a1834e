"""How often devices wait for each other in normalization: collectives of a layer and of a step of
ResNet-50, by library.

    python -m benchmarks.collectives --quick  # layers of all libraries on 8 simulated devices
    python -m benchmarks.collectives          # ResNet-50 too, and slices of TPUs by compilation

The first takes two minutes on 2 cores and the second twenty.

Nothing is run: programs are compiled, and what XLA made of them is read. Prints, and writes as JSON
and CSV, how many collectives there are, their bytes, and the longest chain in which they depend on
each other. What that costs on a pod of TPUs is a model, printed and drawn. Compiling for TPUs needs
libtpu, which `pip install 'jaxnorm[tpu]'` installs.
"""

import argparse
import csv
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
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

from benchmarks import pods, tpu
from benchmarks.files import replacing, write
from benchmarks.hlo import Collective, Total, total
from benchmarks.interrupt import deferred_interrupt
from benchmarks.libraries import installed
from benchmarks.options import folder
from benchmarks.sharded import CONTEXTS, METHODS, NORMS, PASSES, Case, of_layer, of_network
from benchmarks.timing import about, heading

DEVICES = 8
"""Simulated on the CPU."""

COMPARED = ("jaxnorm", "flax.linen", "haiku", "equinox")

ON_TPU = ("jaxnorm", "flax.linen")

TPU_METHODS = ("batch", "batch_groups", "ghost", "group", "group_channels")

PLATFORMS = ("cpu", "v5e:2x4", "v5e:16x16", "v5p:4x4x4", "v5p:16x16x16")
"""Simulated devices, and slices of TPUs."""

NETWORK_PLATFORMS = ("cpu", "v5e:8x16")
"""For ResNet-50: 8 groups of 16 chips, so that what is within groups can be told from what is
across them."""

GROUP = 16
"""Devices that share statistics where not all do; half of them where there are fewer."""

IMAGE = 32
"""Height and width of ResNet-50's images, of which the collectives do not depend."""


class Result(NamedTuple):
    """The collectives of one program.

    Attributes:
        platform: `cpu` or a topology.
        devices: how many it is compiled for.
        program: a key of `METHODS`, or `resnet50`.
        context: of `CONTEXTS`.
        what: of `PASSES`.
        library: of `COMPARED`; a key of `NORMS` for ResNet-50.
        found: the totals; None where it cannot be compiled.
        note: why not.
    """

    platform: str
    devices: int
    program: str
    context: str
    what: str
    library: str
    found: Total | None
    note: str = ""

    def row(self) -> dict[str, Any]:
        """As it is written."""
        found = self.found._asdict() if self.found else dict.fromkeys(Total._fields)
        return (
            {name: value for name, value in self._asdict().items() if name not in ("found", "note")}
            | found
            | {"note": self.note}
        )


class Job(NamedTuple):
    """A program to be compiled: all but `found` of its result, and what makes it."""

    result: Result
    compile: Callable[[], list[Collective] | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # nothing runs: no accelerator is looked for
    with suppress(RuntimeError):  # the number of devices may be settled already
        jax.config.update("jax_num_cpu_devices", DEVICES)
    if jax.device_count() < DEVICES:
        parser.error(f"needs {DEVICES} simulated devices, and JAX runs with {jax.device_count()}")
    console = Console(width=None if sys.stdout.isatty() else 180)
    for name in sorted(set(COMPARED) - set(installed())):
        console.print(f"{name} is not installed, and left out.", highlight=False)
    if reason := tpu.unavailable():
        console.print(f"No TPUs: {reason}", highlight=False)
        args.platforms = [platform for platform in args.platforms if platform == "cpu"]
        args.network_platforms = [
            platform for platform in args.network_platforms if platform == "cpu"
        ]
    results: list[Result] = []
    steps: dict[tuple[str, str], list[Collective]] = {}
    interrupted = False
    try:
        _compile(_jobs(args), results, steps, console)
    except KeyboardInterrupt:
        interrupted = True
    if not results:
        console.print("Interrupted." if interrupted else "Nothing to compile.")
        return 130 if interrupted else 0
    facts = about(("jaxnorm", "jax", "jaxlib", "libtpu", "flax", "dm-haiku", "equinox"))
    try:
        modelled = _modelled(steps)
    except ValueError as error:
        console.print(f"No model: {error}", highlight=False)
        modelled = {}
    _write(results, modelled, facts, args.output)
    console.print(heading(facts), highlight=False)
    for platform in dict.fromkeys(result.platform for result in results):
        _print_layers(
            [r for r in results if r.platform == platform and r.program != "resnet50"], console
        )
    _print_networks([r for r in results if r.program == "resnet50"], console)
    files = "collectives.json, collectives.csv"
    if modelled:
        _print_model(modelled, console)
        pods.draw(modelled, args.output / "collectives.png")
        files += ", collectives.png"
    console.print(
        f"{'Interrupted. ' if interrupted else ''}In {args.output}: {files}", highlight=False
    )
    return 130 if interrupted else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.collectives",
        description=(
            "Counts the collectives of normalization layers and of ResNet-50, on a CPU and "
            "compiled for TPUs."
        ),
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="layers on 8 simulated devices only")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=f"some of {', '.join(METHODS)}",
    )
    add(
        "--contexts",
        nargs="+",
        choices=CONTEXTS,
        default=list(CONTEXTS),
        metavar="CONTEXT",
        help=f"of {', '.join(CONTEXTS)}",
    )
    add(
        "--passes",
        nargs="+",
        choices=PASSES,
        default=["forward", "step"],
        metavar="PASS",
        help=f"some of {', '.join(PASSES)}",
    )
    names = [name for name in COMPARED if name in installed()]
    add(
        "--libraries",
        nargs="+",
        choices=names,
        default=names,
        metavar="LIBRARY",
        help=f"some of {', '.join(names)}",
    )
    for option, default, of in (
        ("--platforms", PLATFORMS, "layers"),
        ("--network-platforms", NETWORK_PLATFORMS, "ResNet-50"),
    ):
        shown = f"cpu and slices of TPUs for {of}; default: {' '.join(default)}"
        add(option, nargs="*", default=list(default), metavar="PLATFORM", help=shown)
    add(
        "--norms",
        nargs="*",
        choices=NORMS,
        default=list(NORMS),
        metavar="NORM",
        help=f"of ResNet-50: {', '.join(NORMS)}",
    )
    add(
        "--output",
        type=folder,
        default="results/collectives",
        metavar="FOLDER",
        help="default: %(default)s",
    )
    return parser


def _jobs(args: argparse.Namespace) -> list[Job]:
    jobs: list[Job] = []
    on_tpu = [context for context in ("jit", "shard_map") if context in args.contexts]
    for platform in ("cpu",) if args.quick else args.platforms:
        if platform == "cpu":
            jobs += _layers("cpu", args.methods, args.contexts, args.passes, args.libraries)
        else:
            methods = [method for method in TPU_METHODS if method in args.methods]
            jobs += _layers(
                platform,
                methods,
                on_tpu,
                args.passes,
                [name for name in ON_TPU if name in args.libraries],
            )
    for platform in () if args.quick else args.network_platforms:
        jobs += _networks(platform, args.norms, args.contexts if platform == "cpu" else on_tpu)
    return jobs


def _devices(platform: str) -> Sequence[Any]:
    return jax.devices()[:DEVICES] if platform == "cpu" else tpu.chips(platform)


def _group(devices: int) -> int:
    return min(GROUP, devices // 2)


def _dtype(platform: str) -> str:
    return "float32" if platform == "cpu" else "bfloat16"


def _layers(platform: str, methods: Any, contexts: Any, passes: Any, libraries: Any) -> list[Job]:
    devices = _devices(platform)
    options = {"group": _group(len(devices)), "dtype": _dtype(platform)}
    return [
        Job(
            Result(platform, len(devices), *case, None), partial(of_layer, case, devices, **options)
        )
        for method in methods
        for context in contexts
        for what in passes
        for case in (Case(method, context, what, library) for library in libraries)
    ]


def _networks(platform: str, norms: Any, contexts: Any) -> list[Job]:
    devices = _devices(platform)
    options = {"group": _group(len(devices)), "dtype": _dtype(platform), "image": IMAGE}
    return [
        Job(
            Result(platform, len(devices), "resnet50", context, "step", name, None),
            partial(of_network, name, context, devices, **options),
        )
        for name in norms
        # two of Flax's are enough for the model; in maps on TPUs only what differs from jit
        for context in (
            contexts if platform == "cpu" else ("shard_map",) if name == "local" else ("jit",)
        )
        if context in NORMS[name].contexts and context in contexts
    ]


def _compile(
    jobs: Sequence[Job], results: list[Result], steps: dict[Any, list[Collective]], console: Console
) -> None:
    """Adds the result of each program, and notes what another library cannot compile."""
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
        task = progress.add_task("", total=len(jobs))
        for result, compile in jobs:
            progress.update(
                task,
                description=f"{result.platform} {result.library} {result.program} {result.context}",
            )
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of other libraries
                    found = compile()
                if found is not None:
                    results.append(result._replace(found=total(found)))
                    if result.program == "resnet50":
                        steps[result.platform, result.context, result.library] = found
            except Exception as error:
                if result.library not in COMPARED[1:]:
                    raise
                results.append(
                    result._replace(
                        note=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".strip(
                            ": "
                        )
                    )
                )
            progress.advance(task)
            check_interrupt()


Modelled = dict[str, dict[str, dict[int, pods.Cost]]]
"""The cost for each pod, program and number of chips."""

MODELLED = {
    "two_pass": "jit",
    "flax": "jit",
    "jaxnorm": "jit",
    "groups": "jit",
    "ghost": "jit",
    "local": "shard_map",
}
"""Programs in the model, and where they are taken from."""


def _modelled(steps: Mapping[Any, Sequence[Collective]]) -> Modelled:
    """The model for ResNet-50 as it was compiled for the last platform with fewer or more groups
    than devices in one."""
    sizes_of = {platform: len(_devices(platform)) for platform, _, _ in steps}
    platform = next(
        (p for p, devices in reversed(sizes_of.items()) if devices != _group(devices) ** 2), None
    )
    if platform is None:
        return {}
    devices = sizes_of[platform]
    modelled: Modelled = {pod.name: {} for pod in pods.PODS}
    for name, context in MODELLED.items():
        if found := steps.get((platform, context, name)):
            sizes = pods.rounds(found, devices, _group(devices))
            for pod in pods.PODS:
                costs = {chips: pods.cost(pod, chips, GROUP, sizes) for chips in pod.shapes}
                modelled[pod.name][NORMS[name].title] = costs
    return modelled if any(modelled.values()) else {}


def _write(
    results: Sequence[Result], modelled: Modelled, facts: Mapping[str, Any], to: Path
) -> None:
    rows = [result.row() for result in results]
    model = jax.tree.map(
        pods.Cost._asdict, modelled, is_leaf=lambda node: isinstance(node, pods.Cost)
    )
    written = {"about": facts, "results": rows, "model": model}
    write(to / "collectives.json", json.dumps(written, indent=1) + "\n")
    with replacing(to / "collectives.csv") as new, new.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _text(result: Result | None) -> str:
    if result is None:
        return "–"
    found = result.found
    if found is None:
        return "error"
    counts = f"{found.number}" + (f" +{found.predicates} bit" if found.predicates else "")
    branches = f" (+{found.branches})" if found.branches else ""
    return f"{counts} | {found.bytes} | {found.depth}{branches}"


CAPTION = (
    "collectives that always run, +n bit: of one bit | bytes | longest chain of dependent ones; "
    "(+n): more in a branch that rarely runs"
)


def _print_layers(results: Sequence[Result], console: Console) -> None:
    """One table: a row for each method, context and pass, a column for each library."""
    if not results:
        return
    platform, devices = results[0].platform, results[0].devices
    libraries = list(dict.fromkeys(result.library for result in results))
    table = Table(
        title=f"Layers, {platform}, {devices} devices, groups of {_group(devices)}",
        caption=CAPTION,
        box=box.SIMPLE_HEAD,
    )
    for name in ("", "", ""):
        table.add_column(name, no_wrap=True)
    for library in libraries:
        table.add_column(library, justify="right", no_wrap=True)
    by_cell = {(r.program, r.context, r.what, r.library): r for r in results}
    for program, context, what in dict.fromkeys(cell[:3] for cell in by_cell):
        texts = (_text(by_cell.get((program, context, what, library))) for library in libraries)
        table.add_row(METHODS[program].title, context, what, *texts)
    console.print(table, highlight=False)
    for note in dict.fromkeys(
        f"{r.library}, {r.context}, {METHODS[r.program].title}: {r.note}" for r in results if r.note
    ):
        console.print(note[:220], highlight=False)


def _print_networks(results: Sequence[Result], console: Console) -> None:
    if not results:
        return
    table = Table(title="A step of ResNet-50", caption=CAPTION, box=box.SIMPLE_HEAD)
    for name in ("batch norm", "platform", "devices", "context", "collectives | bytes | chain"):
        table.add_column(
            name,
            justify="right" if name in ("devices", "collectives | bytes | chain") else "left",
            no_wrap=True,
        )
    for result in sorted(results, key=lambda result: list(NORMS).index(result.library)):
        table.add_row(
            NORMS[result.library].title,
            result.platform,
            str(result.devices),
            result.context,
            _text(result),
        )
    console.print(table, highlight=False)


def _print_model(modelled: Modelled, console: Console) -> None:
    for pod, lines in modelled.items():
        chips = list(next(iter(lines.values()), {}))
        table = Table(
            title=f"Collectives of a step of ResNet-50 on TPU {pod}: a model, nothing was run",
            caption=(
                f"ms one after the other, {pods.LATENCY * 1e6:g} us a hop | MB that a chip sends; "
                f"groups of {GROUP} chips; gradients included"
            ),
            box=box.SIMPLE_HEAD,
        )
        table.add_column("chips", no_wrap=True)
        for count in chips:
            table.add_column(str(count), justify="right", no_wrap=True)
        for title, costs in lines.items():
            table.add_row(
                title,
                *(
                    f"{1e3 * costs[count].seconds:.2f} | {costs[count].sent / 1e6:.1f}"
                    for count in chips
                ),
            )
        console.print(table, highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())
