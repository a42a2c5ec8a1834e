"""The figure of `benchmarks.speed`: a row for each method, a dot for each library."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.cases import GOALS, KINDS, OTHERS, OURS, TORCH, Case, Ratio, mean, ratio
from benchmarks.figures import save
from benchmarks.libraries import COLORS

TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

MORE_TICKS = (0.3, 0.7, 1.5, 3)
"""Between them, where the axis is short."""

LANE_INCHES = 0.13
"""Height of a dot and of the text beside it: the libraries of a row lie below each other."""

LETTER = 0.02
"""Width of a letter over that of a panel."""

Lanes = Mapping[str, Mapping[str, float]]
"""For each row its libraries and where they lie, downwards."""


def draw(
    cases: Sequence[Case],
    title: str,
    path: Path,
    *,
    libraries: Sequence[str],
    row: Callable[[Case], str],
    over: str,
) -> None:
    """Draws the time of `libraries`, keys of `COLORS`, over that of `over`, a key of `OTHERS`.

    A panel with a log axis for each dtype and pass; `row` names the row of a case. A dot is the
    geometric mean over the cases of its row; one case alone has its interval.
    """
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    lanes: dict[str, dict[str, float]] = {}
    height = 0.0
    for name in dict.fromkeys(map(row, cases)):
        group = [case for case in cases if row(case) == name]
        found = [library for library in libraries if any(_dots(group, library, "step", over))]
        lanes[name] = {library: height + lane + 1 for lane, library in enumerate(found)}
        height += len(found) + 1
    figure = Figure(
        figsize=(9, len(dtypes) * (height * LANE_INCHES + 0.6) + 0.8), layout="constrained"
    )
    panels = figure.subplots(len(dtypes), len(KINDS), squeeze=False, sharey=True, sharex="col")
    for dtype, line in zip(dtypes, panels, strict=True):
        groups = {
            name: [case for case in cases if (row(case), case.dtype) == (name, dtype)]
            for name in lanes
        }
        for kind, axes in zip(KINDS, line, strict=True):
            _panel(axes, groups, lanes, kind, over)
            axes.set_title(f"{kind}, {dtype}", fontsize=10, loc="left")
    places = [float(np.mean(list(lane.values()))) for lane in lanes.values()]
    for axes in panels[:, 0]:
        axes.set_yticks(places, list(lanes), fontsize=8)
        axes.set_ylim(height, 0)
    what = "moving the fewest bytes" if over == "bytes floor" else over
    for axes in panels[-1]:
        axes.set_xlabel(f"time over that of {what}: less is better", fontsize=8)
    figure.suptitle(textwrap.fill(title, 140), fontsize=7)
    save(figure, path)


def _panel(
    axes: Axes, groups: Mapping[str, Sequence[Case]], lanes: Lanes, kind: str, over: str
) -> None:
    named: set[str] = set()
    ends, texts = [1.0], []
    for place, (row, group) in enumerate(groups.items()):
        if place % 2:
            heights = lanes[row].values()
            axes.axhspan(min(heights) - 1, max(heights) + 1, color="0.96", zorder=0)
        for library, y in lanes[row].items():
            ratios = list(_dots(group, library, kind, over))
            middle = mean(ratios)
            if middle is None:
                continue
            spread = [middle]
            if len(ratios) == 1:
                spread += [end for end in ratios[0][1:] if not np.isnan(end)]
            axes.plot(middle, y, "o", color=COLORS[library], markersize=4.5)
            axes.plot((min(spread), max(spread)), (y, y), color=COLORS[library], linewidth=1.2)
            # A library is named where it is seen first; ours has its number everywhere.
            text = [library] if library not in named and len(lanes[row]) > 1 else []
            text += [f"{middle:.2f}"] if library == OURS else []
            named.add(library)
            texts.append((max(spread), y, " ".join(text), COLORS[library]))
            ends += spread
    axes.axvline(1, color="0.5", linewidth=0.8, zorder=1)
    if over == "Flax":
        axes.axvline(GOALS[kind], color="0.5", linewidth=0.8, linestyle=":", zorder=1)
    axes.set_xscale("log")
    _ticks(axes, ends, texts)
    for x, y, text, color in texts:
        axes.annotate(
            text,
            (x, y),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=color,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def _ticks(
    axes: Axes, ends: Sequence[float], texts: Sequence[tuple[float, float, str, str]]
) -> None:
    """Plain numbers, and room for all dots and their texts."""
    wide = np.log(max(ends) / min(ends)) + 0.2
    room = [x * np.exp(wide * LETTER * (len(text) + 2)) for x, _, text, _ in texts]
    low, high = (1.0, 1.0) if axes.get_autoscalex_on() else axes.get_xlim()  # of a panel before
    axes.set_xlim(min(low, min(ends) / 1.1), max(high, max(ends) * 1.1, *room))
    short = max(ends) / min(ends) < 12
    axes.xaxis.set_major_locator(FixedLocator(sorted(TICKS + MORE_TICKS if short else TICKS)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _dots(cases: Sequence[Case], library: str, kind: str, over: str) -> Iterator[Ratio]:
    """The ratio of each case that has this library, but for those that it is compared with."""
    for case in cases:
        # Torch is measured in two layouts, of which the faster counts.
        found = case.fastest(TORCH if library == "torch" else (library,), kind)
        other = case.fastest(OTHERS[over], kind)
        if found and other and library not in OTHERS[over]:
            yield ratio(case.seconds[found][kind], case.seconds[other][kind])
