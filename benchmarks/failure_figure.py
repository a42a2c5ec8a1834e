"""The map of failure as a picture: test error over n, one panel for each data set."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.cells import Cell, Map
from benchmarks.datasets import SOURCES
from benchmarks.failure_plan import CURVES, ROWS
from benchmarks.failure_report import batch_norm_threshold
from benchmarks.files import replacing
from benchmarks.report import COLORS
from benchmarks.results import interval

MARKERS = {"1x1": "o", "2x2": "s", "4x4": "D", "7x7": "^", "8x8": "^"}
"""By the size of the last map."""

COLOR = dict(zip(CURVES, (COLORS[0], COLORS[2], COLORS[1], COLORS[3]), strict=True))


def draw(result: Map, points: float, path: Path) -> None:
    """Draws the cells of the methods in `CURVES` that are there.

    Args:
        result: the cells.
        points: loss of batch norm to group norm whose n is marked.
        path: of the PNG.
    """
    names = result.data
    figure = Figure(figsize=(1.0 + 6.2 * len(names), 5.4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, data in zip(panels, names, strict=True):
        _panel(axes, result, data, points)
    figure.suptitle(
        "Where batch normalization fails", x=0.01, ha="left", fontsize=15, fontweight="bold"
    )
    with replacing(path) as new:
        figure.savefig(new, dpi=150, format="png")


def _panel(axes: Axes, result: Map, data: str, points: float) -> None:
    found = {method: cells for method in CURVES if (cells := result.of(data, method))}
    for method, cells in found.items():
        _curve(axes, result.maps(data), method, cells)
    _scales(axes)
    _names(axes, found)
    limit = batch_norm_threshold(result, data, points)
    if limit and 0 < limit.low and np.isfinite(limit.high):
        axes.axvspan(limit.low, limit.high, color="0.9", zorder=0, linewidth=0)
        axes.annotate(
            f"batch norm {points:g} point{'s' * (points != 1)}\nabove group norm",
            (limit.size, 0.99),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="top",
            fontsize=8,
            color="0.35",
        )
    seeds = len(next(iter(found.values()))[0].errors) if found else 0
    axes.set_title(
        f"{SOURCES[data].title}: mean of {seeds} seeds, 95 % t-interval", loc="left", fontsize=10
    )
    axes.set_xlabel("elements that share a statistic in the last stage")


def _curve(axes: Axes, maps: list[str], method: str, cells: list[Cell]) -> None:
    """Lines join the batch sizes of a map; those of a method that has one cell a map join these."""
    groups = [[cell for cell in cells if cell.key.last == last] for last in maps]
    lines = groups if any(cell.key.batch_size for cell in cells) else [cells]
    for line in filter(None, lines):
        axes.plot(
            [cell.elements for cell in line],
            [interval(cell.errors).mean for cell in line],
            color=COLOR[method],
            linewidth=1.6,
            alpha=0.8,
        )
    for cell in cells:
        mean, half_width = interval(cell.errors)
        axes.errorbar(
            cell.elements,
            mean,
            half_width,
            color=COLOR[method],
            marker=MARKERS[cell.key.last],
            markersize=7,
            markeredgecolor="white",
            elinewidth=1.2,
            capsize=2,
            zorder=3,
        )


def _scales(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", nonpositive="clip")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(plain)
    low, high = axes.get_ylim()
    ticks = [t for t in (1, 2, 3, 5, 10, 15, 20, 30, 50, 100) if low <= t <= high]
    axes.set_yticks(ticks, [f"{tick} %" for tick in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.minorticks_off()
    axes.set_ylabel("test error")
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _names(axes: Axes, found: dict[str, list[Cell]]) -> None:
    """Names methods at the right of their last cell, and maps at batch norm's first ones."""
    ends = {}
    for method, cells in found.items():
        last = max(cells, key=lambda cell: cell.elements)
        ends[method] = last.elements, interval(last.errors).mean
    for method, (x, y) in ends.items():
        axes.annotate(
            ROWS[method].label,
            (x, y),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=COLOR[method],
            fontweight="bold",
            fontsize=9,
        )
