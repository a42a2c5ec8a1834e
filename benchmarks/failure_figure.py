"""The map of failure as a picture: test error over n, one panel for each data set."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from benchmarks.cells import Cell, Map, positions
from benchmarks.datasets import SOURCES
from benchmarks.failure_plan import CURVES
from benchmarks.failure_report import batch_norm_threshold
from benchmarks.figures import look, name_ends, percent_scale, quiet, save
from benchmarks.plan import ROWS
from benchmarks.results import interval

MARKERS = {"1x1": "o", "2x2": "s", "4x4": "D", "7x7": "^", "8x8": "^"}
"""By the size of the last map."""


def draw(result: Map, points: float, path: Path) -> None:
    """Draws the cells of the methods in `CURVES` that are there, and the same for dark pages.

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
    save(figure, path)


def _panel(axes: Axes, result: Map, data: str, points: float) -> None:
    found = {method: cells for method in CURVES if (cells := result.of(data, method))}
    maps = result.maps(data)
    sizes = sorted({key.batch_size for key in result.cells if key.batch_size is not None})
    for method, cells in found.items():
        for last in maps:
            _line(axes, method, [cell for cell in cells if cell.key.last == last], sizes)
    _scales(axes)
    _name_methods(axes, found)
    _name_maps(axes, maps)
    limit = batch_norm_threshold(result, data, points)
    if limit and 0 < limit.low and np.isfinite(limit.high):
        # Where the sizes lie far apart, what is between them is all that is known.
        near = limit.above <= 4 * limit.below
        low, high = (limit.low, limit.high) if near else (limit.below, limit.above)
        axes.axvspan(low, high, color="0.9", zorder=0, linewidth=0)
        places = axes.transData.transform([(low, 1), (high, 1)])
        left = axes.transAxes.inverted().transform(places)[:, 0].mean() < 0.5
        where = f"n = {limit.size:.2g} ({low:.2g} to {high:.2g})" if near else ""
        axes.annotate(
            f"BatchNorm {points:g} point{'s' * (points != 1)}\nabove GroupNorm:\n"
            + (where or f"between n = {low:g} and {high:g}"),
            (high if left else low, 0.02),
            xytext=(5 if left else -5, 0),
            textcoords="offset points",
            xycoords=("data", "axes fraction"),
            ha="left" if left else "right",
            fontsize=8,
            color="0.35",
        )
    seeds = {len(cell.errors) for cells in found.values() for cell in cells}
    axes.set_title(
        f"{SOURCES[data].title}: mean of {'/'.join(map(str, sorted(seeds)))} seeds with its 95 % "
        "t-interval",
        loc="left",
        fontsize=9,
        color="0.35",
    )
    axes.set_xlabel("n = images normalized together x positions of the last map")


def _line(axes: Axes, method: str, cells: list[Cell], sizes: list[int]) -> None:
    """The cells of a method on one map; one whose batch does not matter lies at all of them."""
    if not cells:
        return
    style: Any = look(method) | {"marker": MARKERS[cells[0].key.last]}
    drawn = sorted(
        (size * positions(cell.key.last), interval(cell.errors))
        for cell in cells
        for size in ([cell.key.batch_size] if cell.key.batch_size else (sizes[0], sizes[-1]))
    )
    flat = cells[0].key.batch_size is None
    axes.errorbar(
        [n for n, _ in drawn],
        [mean for _, (mean, _) in drawn],
        [half_width or 0.0 for _, (_, half_width) in drawn],
        **style,
        linestyle="--" if flat else "-",
        linewidth=1.6,
        markersize=6,
        markeredgecolor="white",
        elinewidth=1.0,
        capsize=2,
        alpha=0.9,
    )


def _scales(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    _, high = axes.get_xlim()
    axes.set_xticks([4**power * 2 for power in range(6) if 4**power * 2 <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yscale("log", nonpositive="clip")  # without the limits that a linear scale found
    percent_scale(axes, *axes.get_ylim())
    axes.set_ylabel("test error")
    quiet(axes)


def _name_methods(axes: Axes, found: dict[str, list[Cell]]) -> None:
    """Each method's name at the height of its last point."""
    ends = []
    for method, cells in found.items():
        last = max(cells, key=lambda c: (positions(c.key.last), c.key.batch_size or 0))
        ends.append((ROWS[method].label, interval(last.errors).mean, look(method)["color"]))
    name_ends(axes, ends)


def _name_maps(axes: Axes, maps: list[str]) -> None:
    handles = [
        Line2D([], [], color="0.45", linestyle="", marker=MARKERS[last], label=last)
        for last in maps
    ]
    axes.legend(
        handles=handles, title="last map", frameon=False, loc="upper right", labelcolor="0.35"
    )
