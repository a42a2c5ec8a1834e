"""What a comparison of normalizations prints and draws."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.norms import BATCH_ENOUGH, METHODS, batch_group_count
from benchmarks.residual import MOMENTUM, WIDTHS
from benchmarks.results import Interval, Result, interval
from benchmarks.training import IMAGES_PER_STEP, WEIGHT_DECAY

COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart, in the order of `METHODS`."""

MARKERS = "os^Dv<P"


def _size_name(protocol: str) -> str:
    """What a batch size counts."""
    return "images per device" if protocol == "devices" else "images per step"


def print_all(console: Console, result: Result) -> None:
    """Prints how the cells were trained, their accuracies, the paired differences, and what they do not show."""
    _print_protocol(console, result)
    _print_accuracies(console, result)
    _print_differences(console, result)
    _print_cautions(console, result)


def _print_protocol(console: Console, result: Result) -> None:
    """Prints what was trained, and how, so that the numbers can be read without the source."""
    settings = result.settings
    if settings.protocol == "devices":
        spread = (
            f"{IMAGES_PER_STEP} images per step, spread over {IMAGES_PER_STEP}/b simulated devices (jax.vmap); statistics "
            "and running averages per device, gradient averaged over devices; evaluation uses the running averages "
            "averaged over devices"
        )
    else:
        spread = "b images per step on one device, so more and smaller steps where b is small; evaluation uses its running averages"
    lines = {
        "data": f"scikit-learn digits, 8x8; {settings.train_images} to train, the rest halved into validation and test; "
        "shifts of up to one pixel",
        "network": f"residual, widths {'/'.join(map(str, WIDTHS))}, last feature map {settings.network}",
        "training": f"{settings.epochs} epochs, SGD with momentum 0.9, weight decay {WEIGHT_DECAY:g} on kernels, learning "
        "rate 0.1 per 32 images, one warm-up epoch then cosine",
        "statistics": f"{spread}; decay {MOMENTUM} per step",
        "seeds": f"{settings.seeds}; each draws split, initial parameters, order and shifts, the same for all methods",
    }
    if "batch_group" in result.methods:
        counts = ", ".join(f"{size}: {_group_counts(size)}" for size in result.batch_sizes)
        lines["BGN groups"] = (
            f"largest divisor of C up to C b / {BATCH_ENOUGH}, from b = {BATCH_ENOUGH} on C and so BN ({counts}); "
            "our rule, since the paper's could not be read"
        )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in lines.items():
        table.add_row(name, text)
    console.print(table, highlight=False)


def _group_counts(batch_size: int) -> str:
    return "/".join(str(batch_group_count(batch_size, width)) for width in WIDTHS)


def _print_accuracies(console: Console, result: Result) -> None:
    """Prints methods by batch sizes: mean test accuracy over seeds and its interval."""
    table = Table(
        title=f"Test accuracy in % by {_size_name(result.settings.protocol)}",
        caption="mean over seeds ± 95 % t-interval; dim: same training as the cell it equals",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("method", no_wrap=True)
    sizes = result.batch_sizes or [None]
    for size in sizes:
        table.add_column("any" if size is None else str(size), justify="right", no_wrap=True)
    for method in result.methods:
        table.add_row(METHODS[method].label, *(_accuracy(result, method, size) for size in sizes))
    console.print(table, highlight=False)


def _accuracy(result: Result, method: str, batch_size: int | None) -> str:
    cell = result.find(method, batch_size)
    if cell is None:
        return "–"
    repeated = cell.same_run_as is not None or (cell.batch_size is None and batch_size != result.batch_sizes[0])
    text = str(interval(cell.test))
    return f"[dim]{text}[/dim]" if repeated else text


def _print_differences(console: Console, result: Result) -> None:
    """Prints differences in accuracy, paired by seed."""
    table = Table(
        title="Paired differences in points",
        caption="mean over seeds ± 95 % t-interval; bold: the interval excludes 0",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("cell", no_wrap=True)
    table.add_column("minus", no_wrap=True)
    table.add_column("difference", justify="right", no_wrap=True)
    for cell, baseline, points in result.differences():
        text = f"{points.mean:+.1f}" + ("" if points.half_width is None else f" ± {points.half_width:.1f}")
        table.add_row(cell, baseline, f"[bold]{text}[/bold]" if _excludes_zero(points) else text)
    if table.row_count:
        console.print(table, highlight=False)


def _excludes_zero(points: Interval) -> bool:
    return points.half_width is not None and abs(points.mean) > points.half_width


def _print_cautions(console: Console, result: Result) -> None:
    """Prints what these numbers do not show."""
    cautions = [
        "The collapse of BatchNorm at 2 was seen in networks whose last map is 1x1, where its sets hold two values, and "
        "in no other: with --network 2x2 it loses a few points. This regime is harsher than ImageNet's.",
        "The accuracy of a cell that failed is not reproducible to better than tens of points: it moves with versions "
        "and compiler flags. That the cell fails is reproducible.",
        "Four seeds settle batch size 2. Batch size 4 needs eight seeds (--full).",
        "Learning rate and schedule are the same for all methods; none was tuned.",
        "Intervals cover what a seed draws, not other data or networks, and are not corrected for their number.",
    ]
    if "instance" in result.methods:
        cautions.append("InstanceNorm fails trivially at 1x1: its sets hold one value, so that its output is the bias.")
    console.print("[bold]Read with care[/bold]")
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    for caution in cautions:
        table.add_row("•", caution)
    console.print(table, highlight=False)


def draw(result: Result, path: Path) -> None:
    """Draws the test error over the batch size: curves for methods that pool the batch, flat lines for the others."""
    figure, axes = plt.subplots(figsize=(8, 5.2), layout="constrained")
    sizes = result.batch_sizes or [IMAGES_PER_STEP]
    for index, method in enumerate(METHODS):
        if method in result.methods:
            _draw_method(axes, result, method, sizes, COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)])
    axes.axhline(90, color="0.6", linewidth=1, linestyle=":", zorder=0)
    axes.annotate(
        "guessing", (1, 90), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.45", fontsize=9
    )
    axes.set_xticks(range(len(sizes)), map(str, sizes))
    axes.set_xlim(-0.35, len(sizes) - 0.65)
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(1, 110)
    axes.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1 %", "2 %", "5 %", "10 %", "20 %", "50 %", "100 %"])
    axes.set_yticks([], minor=True)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    settings = result.settings
    axes.set_xlabel(_size_name(settings.protocol))
    axes.set_ylabel("test error (log scale)")
    figure.suptitle("Normalization when batches get small", x=0.02, ha="left", fontsize=15, fontweight="bold")
    axes.set_title(
        f"digits 8x8, residual network ending in {settings.network} maps, {settings.epochs} epochs; "
        f"mean of {settings.seeds} seeds, 95 % t-interval, dots: seeds",
        loc="left",
        fontsize=9,
        color="0.35",
    )
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_method(axes: Axes, result: Result, method: str, sizes: list[int], color: str, marker: str) -> None:
    label = METHODS[method].label
    cells = [(position, result.find(method, size)) for position, size in enumerate(sizes)]
    cells = [(position, cell) for position, cell in cells if cell is not None]
    errors = [interval([100 - accuracy for accuracy in cell.test]) for _, cell in cells]
    means, widths = [error.mean for error in errors], [error.half_width or 0.0 for error in errors]
    if cells[0][1].batch_size is None:
        axes.axhline(means[0], color=color, linewidth=2, label=label)
        axes.axhspan(means[0] - widths[0], means[0] + widths[0], color=color, alpha=0.12, linewidth=0)
        return
    positions = [position for position, _ in cells]
    axes.errorbar(
        positions,
        means,
        widths,
        color=color,
        marker=marker,
        markersize=7,
        linewidth=2,
        capsize=4,
        label=label,
        zorder=3,
    )
    for position, cell in cells:
        axes.scatter(
            [position + 0.06] * len(cell.test), [100 - a for a in cell.test], s=12, color=color, alpha=0.4, linewidth=0
        )
