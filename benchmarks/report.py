"""What a comparison of normalizations prints and draws."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.files import replacing
from benchmarks.norms import METHODS, MOMENTUM, named
from benchmarks.residual import WIDTHS
from benchmarks.results import Cell, Interval, Result, Settings, interval
from benchmarks.training import IMAGES_PER_STEP, WEIGHT_DECAY
from jaxnorm.methods import batch_group_count
from jaxnorm.methods._batch_group import BATCH_ENOUGH

COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart, in the order of `METHODS`;
then again, other markers."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")

DODGE = 0.1
"""Distance at one batch size between the points of two methods, which would hide each other."""


def title(method: str, batch_size: int | None) -> str:
    """What readers call a cell."""
    label = named(method).label
    return label if batch_size is None else f"{label} at {batch_size}"


def print_all(console: Console, result: Result) -> None:
    """Prints how the cells were trained, their accuracies, the paired differences, and what they do
    not show."""
    _print_protocol(console, result)
    _print_accuracies(console, result)
    _print_differences(console, result)
    _print_cautions(console, result)


def _size_name(settings: Settings) -> str:
    return "images per device" if settings.protocol == "devices" else "images per step"


def _print_protocol(console: Console, result: Result) -> None:
    settings = result.settings
    lines = {
        "data": (
            f"scikit-learn digits, 8x8, shifted by up to one pixel; {settings.train_images} to "
            "train, the rest halved into validation and test"
        ),
        "network": (
            f"residual, widths {'/'.join(map(str, WIDTHS))}, last feature map {settings.network}"
        ),
        "training": (
            f"{settings.epochs} epochs of SGD, momentum 0.9, weight decay {WEIGHT_DECAY:g} on "
            "kernels; learning rate 0.1 per 32 images, one warm-up epoch, then cosine"
        ),
        "protocol": _protocol(settings),
        "seeds": (
            f"{settings.seeds}; each draws split, initial parameters, order and shifts, the same "
            "for all methods"
        ),
    }
    if "batch_group" in result.methods:
        counts = ", ".join(f"b = {size}: {_group_counts(size)}" for size in result.batch_sizes)
        lines["BGN groups"] = (
            f"largest divisor of C up to C b / {BATCH_ENOUGH}, so C, which is BN, from b = "
            f"{BATCH_ENOUGH} on ({counts}); our rule, as the paper's could not be read"
        )
    _print_lines(console, "How it was measured", lines)


def _protocol(settings: Settings) -> str:
    if settings.protocol == "devices":
        return (
            f"{IMAGES_PER_STEP} images per step over {IMAGES_PER_STEP}/b devices, simulated by "
            "jax.vmap: statistics and running averages per device, gradients averaged over "
            f"devices; evaluation uses the running averages (weight of the old value {MOMENTUM}), "
            "averaged over devices"
        )
    return (
        "b images per step on one device, so small b means more and smaller steps; evaluation uses "
        f"the running averages (weight of the old value {MOMENTUM} per step)"
    )


def _group_counts(batch_size: int) -> str:
    return "/".join(str(batch_group_count(batch_size, width)) for width in WIDTHS)


def _print_accuracies(console: Console, result: Result) -> None:
    table = Table(
        title=f"Test accuracy in % by {_size_name(result.settings)}",
        caption="mean over seeds ± 95 % t-interval; dim: not a training of its own",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    sizes = result.batch_sizes or [None]
    for size in sizes:
        table.add_column("any" if size is None else str(size), justify="right", no_wrap=True)
    for method in result.methods:
        found = [result.find(method, size) for size in sizes]
        first = next(index for index, cell in enumerate(found) if cell)
        texts = [_accuracy(cell, repeated=index > first) for index, cell in enumerate(found)]
        table.add_row(named(method).label, *texts)
    console.print(table, highlight=False)


def _accuracy(cell: Cell | None, *, repeated: bool) -> str:
    if cell is None:
        return "–"
    shared = cell.same_run_as is not None or (cell.batch_size is None and repeated)
    text = str(interval(cell.test))
    return f"[dim]{text}[/dim]" if shared else text


def _print_differences(console: Console, result: Result) -> None:
    table = Table(
        title="Paired differences in points of test accuracy",
        caption="mean over seeds ± 95 % t-interval; bold: without 0",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("", no_wrap=True)
    table.add_column("minus", no_wrap=True)
    table.add_column("difference", justify="right", no_wrap=True)
    for cell, baseline, points in result.differences():
        names = (title(each.method, each.batch_size) for each in (cell, baseline))
        table.add_row(*names, _points(points))
    if table.row_count:
        console.print(table, highlight=False)


def _points(points: Interval) -> str:
    text = f"+{points}" if points.mean >= 0 else str(points)
    excludes_zero = points.half_width is not None and abs(points.mean) > points.half_width
    return f"[bold]{text}[/bold]" if excludes_zero else text


def _print_cautions(console: Console, result: Result) -> None:
    lines = {
        "collapse": (
            "BatchNorm's collapse at 2 was seen in networks whose last map is 1x1, where its sets "
            "hold two values, and in no other: compare --network 2x2. It is a harsher regime than "
            "ImageNet's."
        ),
        "failed cells": (
            "That a cell fails is reproducible, its accuracy is not, to better than tens of "
            "points: it moves with versions and compiler flags."
        ),
        "seeds": "Four settle batch size 2; batch size 4 needs about eight.",
        "tuning": (
            "None: learning rate and schedule are the same for all methods, and validation "
            "accuracy chose nothing."
        ),
        "intervals": (
            "They cover what a seed draws, not other data or networks; each stands alone, whatever "
            "their number."
        ),
    }
    if "instance" in result.methods:
        lines["InstanceNorm"] = (
            "It fails trivially on 1x1 maps, where its sets hold one value and its output is its "
            "bias."
        )
    _print_lines(console, "Read with care", lines)


def _print_lines(console: Console, heading: str, lines: dict[str, str]) -> None:
    table = Table(
        title=heading, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0)
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in lines.items():
        table.add_row(name, text)
    console.print(table, highlight=False)


def draw(result: Result, path: Path) -> None:
    """Draws the test error over the batch size: curves for methods that pool the batch, flat lines
    for the others."""
    settings, sizes = result.settings, result.batch_sizes
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.subplots()
    known = [*METHODS, *(method for method in result.methods if method not in METHODS)]
    methods = [method for method in known if method in result.methods]
    flat = [method for method in methods if result.get(method, None)]
    curves = [method for method in methods if method not in flat]
    for method in methods:
        family = flat if method in flat else curves
        cells = [
            (index, cell)
            for index, size in enumerate([*sizes, None])
            if (cell := result.get(method, size))
        ]
        offset = DODGE * (family.index(method) - (len(family) - 1) / 2)
        _draw_method(axes, cells, offset, known.index(method))
    _draw_scales(axes, [*map(str, sizes), *(["any"] if flat else [])])
    axes.set_xlabel(_size_name(settings))
    axes.set_title(
        f"Handwritten digits, residual network ending in {settings.network} maps, "
        f"{settings.epochs} epochs.\n"
        f"Mean of {settings.seeds} seeds (dots) with its 95 % t-interval."
        + (" Dashed: methods that the batch size does not touch." if flat else ""),
        loc="left",
        fontsize=9,
        color="0.35",
    )
    figure.suptitle(
        "Test error when batches get small", x=0.01, ha="left", fontsize=15, fontweight="bold"
    )
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    with replacing(path) as new:
        figure.savefig(new, dpi=150, format="png")


def _draw_method(axes: Axes, cells: list[tuple[int, Cell]], offset: float, look: int) -> None:
    """Draws a method's cells, each at its index on the batch-size axis."""
    color = COLORS[look % len(COLORS)]
    positions = [index + offset for index, _ in cells]
    means, half_widths = zip(*(_error(cell) for _, cell in cells), strict=True)
    for position, (_, cell) in zip(positions, cells, strict=True):
        errors = 100 - np.asarray(cell.test)
        beside = np.full(len(errors), position + DODGE / 3)
        axes.plot(beside, errors, "o", color=color, alpha=0.35, markersize=4, markeredgewidth=0)
        if cell.batch_size is None:
            # Dashes of neighbouring methods start at different points, so that equal errors do not
            # hide one another.
            axes.axhline(
                _error(cell)[0],
                color=color,
                linewidth=1.8,
                linestyle=(4 * (look % 3), (4, 8)),
                zorder=1,
            )
    axes.errorbar(
        positions,
        means,
        half_widths,
        color=color,
        marker=MARKERS[(look + look // len(COLORS)) % len(MARKERS)],
        markersize=7,
        linestyle="--" if cells[0][1].batch_size is None else "-",
        linewidth=2,
        elinewidth=1.5,
        capsize=4,
        label=named(cells[0][1].method).label,
    )


def _error(cell: Cell) -> tuple[float, float]:
    """Mean error in % and half the width of its interval."""
    mean, half_width = interval([100 - accuracy for accuracy in cell.test])
    return mean, half_width or 0.0


def _draw_scales(axes: Axes, sizes: list[str]) -> None:
    axes.axhline(90, color="0.6", linewidth=1, linestyle=":", zorder=0)
    axes.annotate(
        "guessing",
        (0.5, 88),
        xycoords=("axes fraction", "data"),
        ha="center",
        va="top",
        color="0.45",
        fontsize=9,
    )
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_xlim(-0.4, len(sizes) - 0.6)
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(0.5, 110)
    axes.set_yticks(
        [0.5, 1, 2, 5, 10, 20, 50, 100],
        ["0.5 %", "1 %", "2 %", "5 %", "10 %", "20 %", "50 %", "100 %"],
    )
    axes.set_yticks([], minor=True)
    axes.set_ylabel("test error, log scale")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
