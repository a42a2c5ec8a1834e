"""The look of all figures: paper and ink, one colour a normalization, names beside lines."""

from collections.abc import Sequence
from typing import Any

import numpy as np

BLUE, ORANGE, GREEN, PINK, SKY, RED = HUES = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
)
"""Okabe and Ito's palette, told apart with every kind of colour vision."""
COLOURS = {
    "batch": RED,
    "batch group": BLUE,
    "group": GREEN,
    "layer": PINK,
    "instance": ORANGE,
    "positional": SKY,
    "ghost batch": "#8C564B",
    "batch renorm": "#7F3C8D",
    "RMS": "#7F7F7F",
}
"""The colour of a normalization in every figure."""
INK, PALE, PAPER = "#333333", "#B8B8B8", "white"
_DARK_INK, _DARK_PALE, _DARK_PAPER = "#E6E6E6", "#6E7681", "#0D1117"


def style(*, dark: bool = False) -> None:
    """Set matplotlib to quiet axes, and to dark ink on white paper or light ink on dark paper.

    Text in SVG files stays text, and the same figure gives the same file.

    Args:
        dark: for pages with a dark background.
    """
    import matplotlib.pyplot as plt

    ink, pale, paper = (_DARK_INK, _DARK_PALE, _DARK_PAPER) if dark else (INK, PALE, PAPER)
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "figure.facecolor": paper,
            "savefig.facecolor": paper,
            "axes.facecolor": paper,
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": pale,
            "grid.color": pale,
            "grid.alpha": 0.35,
            "grid.linewidth": 0.7,
            "text.color": ink,
            "axes.labelcolor": ink,
            "xtick.color": ink,
            "ytick.color": ink,
            "lines.linewidth": 1.8,
            "lines.solid_capstyle": "round",
            "svg.fonttype": "none",
            "svg.hashsalt": "jaxnorm",
        }
    )


def colour_of(name: str) -> str:
    """The colour of a normalization, lighter on dark paper.

    Args:
        name: a key of `COLOURS`, such as "batch group".

    Returns:
        The colour as matplotlib takes it.

    Raises:
        ValueError: another name.

    Example:
        >>> colour_of("group")
        '#009E73'
    """
    from matplotlib.colors import to_hex, to_rgb

    if name not in COLOURS:
        raise ValueError(f"no colour for {name!r}. Expected one of {', '.join(COLOURS)}.")
    if not is_dark():
        return COLOURS[name]
    red, green, blue = (0.72 * part + 0.28 for part in to_rgb(COLOURS[name]))
    return to_hex((red, green, blue))


def label_lines(ax: Any, *, gap: float = 11.5) -> None:
    """Write the label of each line at the height of its last point, instead of a legend.

    It has the colour of the line. All are one below the other, to the right of the line that ends
    last. Call it at the end: where labels would overlap, they are moved apart on the present axes.

    Args:
        ax: axes of matplotlib whose lines have labels.
        gap: smallest distance of two labels, in points.
    """
    ends = []
    for line in ax.get_lines():
        points = np.asarray(line.get_xydata(), float)
        points = points[np.isfinite(points).all(1)]
        if not line.get_label().startswith("_") and len(points):
            ends.append((ax.transData.transform(points[-1]) * 72 / ax.figure.dpi, points[-1], line))
    right = max((place[0] for place, _, _ in ends), default=0)
    heights = apart([place[1] for place, _, _ in ends], gap)
    for (place, end, line), height in zip(ends, heights, strict=True):
        ax.annotate(
            line.get_label(),
            end,
            xytext=(right - place[0] + 8, height - place[1]),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
            fontsize=9,
            annotation_clip=False,
        )


def plain_log(axis: Any, ticks: Sequence[float], *, unit: str = "") -> None:
    """Make an axis logarithmic, with plain numbers at their true places.

    Args:
        axis: `ax.xaxis` or `ax.yaxis` of matplotlib.
        ticks: the numbers.
        unit: behind each of them, such as " %".
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value) + unit))


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Places that are at least `gap` apart, in the same order, moved as little as may be.

    >>> [round(place, 2) for place in apart([0.0, 0.52, 0.5], 0.1)]
    [0.0, 0.56, 0.46]
    """
    order = np.argsort(places, kind="stable")
    steps = gap * np.arange(len(order))
    wanted = np.asarray(places, float)[order] - steps
    # Monotone regression: neighbours in the wrong order share their mean.
    blocks: list[list[float]] = []
    for place in wanted:
        blocks.append([place])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    moved = np.empty(len(order))
    moved[order] = np.repeat([np.mean(b) for b in blocks], [len(b) for b in blocks]) + steps
    return moved.tolist()


def _plain(value: float) -> str:
    """A number as it is read, thousands and millions with a letter.

    >>> [_plain(value) for value in (0.5, 20, 1e4, 1e8)]
    ['0.5', '20', '10k', '100M']
    """
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= max(size, 1e4):
            return f"{value / size:g}{letter}"
    return np.format_float_positional(value, trim="-")


def is_dark() -> bool:
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb

    return sum(to_rgb(plt.rcParams["figure.facecolor"])) < 1.5


def inks() -> tuple[str, str, str]:
    """Those of text, of what is quiet, and of the paper."""
    return (_DARK_INK, _DARK_PALE, _DARK_PAPER) if is_dark() else (INK, PALE, PAPER)
