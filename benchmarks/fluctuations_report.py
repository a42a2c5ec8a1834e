"""What the analysis of fluctuations says, in tables and as a picture of h(q)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import fractals
from benchmarks.cells import Cell, Key, Map
from benchmarks.datasets import SOURCES
from benchmarks.figures import look, name_ends, quiet, save
from benchmarks.fractals import KINDS, Q
from benchmarks.plan import ROWS
from benchmarks.results import interval, markdown_table

CURVES: Mapping[str, str] = MappingProxyType({"loss": "loss", "gradient_norm": "gradient norm"})
"""Fields of `benchmarks.training.Curves` and what tables call them."""

PARTS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = MappingProxyType(
    {
        "whole": lambda series: series,
        "first half": lambda series: series[: len(series) // 2],
        "second half": lambda series: series[len(series) // 2 :],
    }
)
"""What is analysed of a curve after its warm-up."""

NAMES = {(curve, part): f"{title}, {part}" for curve, title in CURVES.items() for part in PARTS}
"""Of the measures of a cell."""

DRAWN = (("batch", 32), ("batch", 2), ("batch_group", 2), ("group", None))
"""Methods and batch sizes in the picture."""


def known(checks: Sequence[fractals.Check], length: int) -> str:
    """How well known exponents are found in series of a length."""
    rows = [
        [
            check.known.label,
            *(
                f"{check.known.h[place]:.2f} / {_number(check.h[:, place])}"
                for place in map(Q.index, (Q[0], 2, Q[-1]))
            ),
            f"{np.abs(check.h.mean(axis=0) - check.known.h).max():.3f} "
            f"(at most {check.known.tolerance:g})",
            *(
                f"{sum(one.wider for one in check.excess[kind])} of {len(check.excess[kind])}"
                for kind in KINDS
            ),
        ]
        for check in checks
    ]
    head = ["series", *(f"h({q}), known / found" for q in (Q[0], 2, Q[-1]))]
    head += ["largest bias", "wider than shuffled", "wider than random phases"]
    sizes = fractals.scales(length)
    return (
        "## Series with known exponents\n\n"
        f"{fractals.DRAWS} series of {length} values each; windows of {sizes[0]} to {sizes[-1]} "
        f"values, polynomials of degree {fractals.ORDER}; mean over the series ± 95 % t-interval. "
        f"Wider: h({Q[0]}) - h({Q[-1]}) is larger than in 95 % of {fractals.SURROGATES} "
        f"surrogates.\n\n{markdown_table(head, rows)}\n\n"
    )


def markdown(result: Map) -> str:
    """All tables of the cells that are there."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    parts = [f"Measured on {', '.join(map(str, result.machine.values()))}; {versions}."]
    for data in result.data:
        parts += _of_data(result, data)
    return "\n\n".join(parts) + "\n"


def _of_data(result: Map, data: str) -> Iterable[str]:
    cells = [cell for key, cell in result.cells.items() if key.data == data]
    yield f"## {SOURCES[data].title}"
    settings = cells[0].settings
    yield (
        f"{settings.train_images} training images, {settings.epochs} epochs, the first of which "
        "warms up and is left out. Logarithms of the curves; mean over seeds ± 95 % t-interval. "
        "Excess: the width less the mean width of the surrogates; behind it the seeds whose width "
        f"is larger than in 95 % of {fractals.SURROGATES} surrogates. Among many tests some find "
        "what is not there: of series without any excess about one in 20 does."
    )
    yield markdown_table(
        ["norm", "test error in %"], ([name(cell.key), interval(cell.errors)] for cell in cells)
    )
    head = ["norm", "part", f"h({Q[0]})", "h(2)", f"h({Q[-1]})", "width"]
    head += ["excess, shuffled", "wider", "excess, random phases", "wider"]
    for curve, title in CURVES.items():
        yield f"### {title.capitalize()}"
        yield markdown_table(
            head,
            ([name(cell.key), part, *_row(cell, curve, part)] for cell in cells for part in PARTS),
        )


def _row(cell: Cell, curve: str, part: str) -> Iterable[str]:
    values = cell.more[NAMES[curve, part]]
    for column in (f"h({Q[0]})", "h(2)", f"h({Q[-1]})", "width"):
        yield _number(values[column])
    for kind in KINDS:
        shares = values[f"share {kind}"]
        yield _number(values[f"excess {kind}"])
        yield f"{sum(share <= fractals.LEVEL for share in shares)} of {len(shares)}"


def _number(values: Sequence[float] | np.ndarray) -> str:
    return interval(list(map(float, values))).text(2)


def name(key: Key) -> str:
    """The method, with its batch size where that matters."""
    label = ROWS[key.method].label
    return label if key.batch_size is None else f"{label} at {key.batch_size}"


def draw(result: Map, folder: Path) -> list[str]:
    """Draws h(q) of the cells in `DRAWN`, a picture for each data set: a row for each curve, a
    column for each part. Returns the names of the files."""
    files = []
    for data in result.data:
        cells = [
            cell
            for key, cell in result.cells.items()
            if key.data == data and (key.method, key.batch_size) in DRAWN
        ]
        if not cells:
            continue
        figure = Figure(figsize=(13, 7.6), layout="constrained")
        panels = figure.subplots(len(CURVES), len(PARTS), sharex=True, sharey=True)
        for row, curve in zip(panels, CURVES, strict=True):
            for axes, part in zip(row, PARTS, strict=True):
                for cell in cells:
                    _line(axes, cell, NAMES[curve, part])
        _frame(panels)
        for row, curve in zip(panels, CURVES, strict=True):
            _labels(row[-1], cells, NAMES[curve, tuple(PARTS)[-1]])
        seeds = max(len(cell.errors) for cell in cells)
        figure.suptitle(
            "How a training fluctuates: generalized Hurst exponents after the warm-up\n"
            f"{SOURCES[data].title}, mean of {seeds} seeds with its 95 % t-interval",
            x=0.01,
            ha="left",
            fontsize=12,
        )
        files.append(f"fluctuations_{data}.png")
        save(figure, folder / files[-1], dpi=130)
    return files


def _frame(panels: np.ndarray) -> None:
    """What is around the lines."""
    for row, title in zip(panels, CURVES.values(), strict=True):
        row[0].set_ylabel(f"h(q) of the {title}")
    for axes, part in zip(panels[0], PARTS, strict=True):
        axes.set_title(part, loc="left", fontsize=10)
    panels[-1, 0].set_xlabel("q < 0: small fluctuations; q > 0: large ones")
    for axes in panels[-1, 1:]:
        axes.set_xlabel("q")
    for axes in panels.flat:
        axes.set_xticks(Q)
        axes.axhline(0.5, color="0.6", linewidth=1, linestyle=":", zorder=0)
        quiet(axes)
    panels[0, 0].annotate(
        "no memory: 0.5",
        (Q[0], 0.5),
        (0, -3),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color="0.4",
    )


def _color(key: Key) -> str:
    return look(key.method)["color"]


def _dashed(key: Key) -> bool:
    """Whether it is the smaller batch of two of a method, which have one color."""
    return (key.method, key.batch_size) == ("batch", 2)


def _means(cell: Cell, measure: str) -> tuple[np.ndarray, np.ndarray]:
    found = [interval(cell.more[measure][f"h({q})"]) for q in Q]
    return np.array([one.mean for one in found]), np.array([one.half_width or 0 for one in found])


def _line(axes: Axes, cell: Cell, measure: str) -> None:
    means, half_widths = _means(cell, measure)
    color = _color(cell.key)
    axes.plot(
        Q, means, "--o" if _dashed(cell.key) else "-o", color=color, linewidth=1.8, markersize=4
    )
    axes.fill_between(
        Q, means - half_widths, means + half_widths, color=color, alpha=0.12, linewidth=0
    )


def _labels(axes: Axes, cells: Sequence[Cell], measure: str) -> None:
    """Each cell's name at the right end of its line."""
    name_ends(
        axes,
        (
            (
                f"{name(cell.key)} (dashed)" if _dashed(cell.key) else name(cell.key),
                float(_means(cell, measure)[0][-1]),
                _color(cell.key),
            )
            for cell in cells
        ),
    )
