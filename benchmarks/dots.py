"""The figure of `benchmarks.speed`: a row for each method, a dot for each library."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.cases import GOALS, KINDS, OTHERS, OURS, TORCH, Case, Ratio, mean, ratio
from benchmarks.files import replacing
from benchmarks.libraries import COLORS

TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

MORE_TICKS = (0.3, 0.7, 1.5, 3)
"""Between them, where the axis is short."""

LANE_INCHES = 0.125
"""Height of a dot and the text beside it: libraries of a row lie below each other."""


def draw(
    cases: Sequence[Case], title: str, path: Path, *, row: Callable[[Case], str], over: str
) -> None:
    """Draws the time of each library over that of `over`, a key of `OTHERS`, on a log axis.

    A panel for each dtype and pass; `row` names the row of a case. A dot is the geometric mean over
    the cases of its row; one case alone has its interval.
    """
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    names = [
        name
        for name in COLORS
        if name not in OTHERS[over] and any(case.fastest(_places(name), KINDS[0]) for case in cases)
    ]
    rows = list(dict.fromkeys(map(row, cases)))
    inches = len(dtypes) * (len(rows) * (len(names) + 1) * LANE_INCHES + 0.8) + 0.6
    figure = Figure(figsize=(9, inches), layout="constrained")
    panels = figure.subplots(len(dtypes), len(KINDS), squeeze=False, sharey=True, sharex="col")
    for (i, dtype), (j, kind) in ((i, j) for i in enumerate(dtypes) for j in enumerate(KINDS)):
        groups = [[c for c in cases if (row(c), c.dtype) == (name, dtype)] for name in rows]
        _panel(panels[i, j], groups, names, kind, over)
        panels[i, j].set_title(f"{kind}, {dtype}", fontsize=10, loc="left")
    for axes in panels[:, 0]:
        axes.set_yticks([(k + 0.5) * (len(names) + 1) for k in range(len(rows))], rows, fontsize=8)
        axes.set_ylim(len(rows) * (len(names) + 1), 0)
    for axes in panels[-1]:
        what = "moving the least bytes" if over == "bytes floor" else over
        axes.set_xlabel(f"time over that of {what}, less is better", fontsize=8)
    figure.suptitle(textwrap.fill(title, 140), fontsize=7)
    with replacing(path) as new:
        figure.savefig(new, dpi=150, format="png")


def _panel(
    axes: Axes, groups: Sequence[Sequence[Case]], names: Sequence[str], kind: str, over: str
) -> None:
    labelled: set[str] = set()
    ends = [1.0]
    for place, group in enumerate(groups):
        top = place * (len(names) + 1)
        if place % 2:
            axes.axhspan(top, top + len(names) + 1, color="0.96", zorder=0)
        for lane, name in enumerate(names):
            ratios = [found for case in group if (found := _over(case, name, kind, over))]
            middle = mean(ratios)
            if middle is None:
                continue
            y = top + lane + 1
            axes.plot(middle, y, "o", color=COLORS[name], markersize=4.5)
            ends.append(middle)
            if len(ratios) == 1:
                axes.plot(ratios[0][1:], (y, y), color=COLORS[name], linewidth=1.2)
                ends += [end for end in ratios[0][1:] if end == end]
            # A library is named where it is seen first; ours has its number everywhere.
            text = [name] if name not in labelled and len(names) > 1 else []
            text += [f"{middle:.2f}"] if name == OURS else []
            labelled.add(name)
            right = ratios[0].high if len(ratios) == 1 and ratios[0].high > middle else middle
            axes.annotate(
                " ".join(text),
                (right, y),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=COLORS[name],
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )
    axes.axvline(1, color="0.5", linewidth=0.8, zorder=1)
    if over == "Flax":
        axes.axvline(GOALS[kind], color="0.5", linewidth=0.8, linestyle=":", zorder=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, min(ends) * 0.85), max(high, max(ends) * 1.2))
    short = max(ends) / min(ends) < 12
    axes.xaxis.set_major_locator(FixedLocator(sorted(TICKS + MORE_TICKS if short else TICKS)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _places(name: str) -> Iterable[str]:
    """Under what a library is measured: torch in two layouts, of which the faster counts."""
    return TORCH if name == "torch" else (name,)


def _over(case: Case, name: str, kind: str, over: str) -> Ratio | None:
    found, other = case.fastest(_places(name), kind), case.fastest(OTHERS[over], kind)
    if found is None or other is None:
        return None
    return ratio(case.seconds[found][kind], case.seconds[other][kind])
