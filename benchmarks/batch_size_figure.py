"""Test error over the batch size as a picture, one panel for each data set and last map."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.batch_size_report import Comparison, Point
from benchmarks.cells import Cell
from benchmarks.datasets import SOURCES
from benchmarks.figures import look, name_ends, percent_scale, quiet, save
from benchmarks.norms import named
from benchmarks.results import interval

DODGE = 1.1
"""Ratio of the places of two methods at one batch size, whose points would hide each other."""


def draw(comparison: Comparison, path: Path) -> None:
    """Draws the test error over the batch size, dashed where the batch size cannot matter, and the
    same for dark pages."""
    maps = list(dict.fromkeys((point.data, point.last) for point in comparison.cells))
    if not maps:
        return
    figure = Figure(figsize=(1.2 + 4.4 * len(maps), 4.8), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    cells = comparison.cells
    low = min(float(np.min(_errors(cell))) for cell in cells.values())
    for axes, (data, last) in zip(panels, maps, strict=True):
        percent_scale(axes, max(0.5, min(1.0, low)), 110)
        quiet(axes)
        _scale_of_sizes(axes, comparison.sizes)
        axes.set_xlabel(comparison.size_name)
        axes.set_title(f"{SOURCES[data].title}, last map {last}", loc="left", fontsize=10)
        for place, method in enumerate(comparison.methods):
            points = [Point(data, last, method, size) for size in comparison.sizes]
            known = {point.batch_size: cells[point] for point in points if point in cells}
            dodge = DODGE ** (place - (len(comparison.methods) - 1) / 2)
            if known:
                _line(axes, method, known, dodge)
        axes.axhline(90, color="0.6", linewidth=1, linestyle=":", zorder=0)
        axes.annotate(
            "guessing", (comparison.sizes[-1], 87), ha="right", va="top", color="0.45", fontsize=8
        )
    panels[0].set_ylabel("test error")
    figure.suptitle(
        "Test error when batches get small", x=0.01, ha="left", fontsize=14, fontweight="bold"
    )
    figure.draw_without_rendering()  # names stand where the layout puts the lines
    ends = {}
    for point, cell in cells.items():
        if (point.data, point.last) == maps[-1]:
            ends[point.method] = (
                named(point.method).label,
                interval(cell.errors).mean,
                look(point.method)["color"],
            )
    name_ends(panels[-1], ends.values())
    seeds = max(len(cell.errors) for cell in cells.values())
    figure.supxlabel(
        f"Mean of {seeds} seeds (dots) with its 95 % t-interval. Dashed: the batch size does not "
        "matter. Open: the same training as the method whose points are full.",
        x=0.01,
        ha="left",
        fontsize=8,
        color="0.35",
    )
    save(figure, path)


def _errors(cell: Cell) -> np.ndarray:
    return np.maximum(cell.errors, 0.1)


def _line(axes: Axes, method: str, known: dict[int, Cell], dodge: float) -> None:
    flat = all(cell.key.batch_size is None for cell in known.values())
    style = look(method)
    places = [size * dodge for size in known]
    for place, cell in zip(places, known.values(), strict=True):
        if not flat or place == places[-1]:
            beside = np.full(len(cell.errors), place * DODGE**0.4)
            axes.plot(
                beside, _errors(cell), "o", color=style["color"], alpha=0.35, markersize=3.5, mew=0
            )
    means = [interval(cell.errors) for cell in known.values()]
    half_widths = [one.half_width or 0.0 for one in means]
    for place, cell, one in zip(places, known.values(), means, strict=True):
        if not flat and cell.key.method != method:
            axes.plot(place, one.mean, **style, markersize=5.5, markerfacecolor="white", zorder=4)
    if flat:  # one training: its interval once
        half_widths[:-1] = [np.nan] * (len(half_widths) - 1)
    axes.errorbar(
        places,
        [one.mean for one in means],
        half_widths,
        **{**style, "marker": "" if flat else style["marker"]},
        linestyle="--" if flat else "-",
        linewidth=1.8,
        markersize=5.5,
        elinewidth=1.2,
        capsize=3,
    )


def _scale_of_sizes(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.set_xticks([], minor=True)
    axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)
