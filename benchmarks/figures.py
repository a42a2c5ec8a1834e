"""How all figures look: colours, scales, names at the ends of lines, a light and a dark file."""

import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure

from benchmarks.files import replacing
from benchmarks.norms import METHODS
from jaxnorm.drawing import COLOURS, plain_log
from jaxnorm.drawing._style import apart

MARKERS = ("o", "s", "^", "D", "v", "P", "X")

PAGE = "#0d1117"
"""Background of a dark figure, that of the pages it is shown on."""


def look(method: str) -> dict[str, Any]:
    """Colour and marker of a method in all figures. Those without a colour of their own have one of
    another method, with another marker."""
    names = [name.replace(" ", "_").lower() for name in COLOURS]
    places = [*names, *(name for name in METHODS if name not in names)]
    # one that is given by its configuration has no place, and always the same look
    place = places.index(method) if method in places else zlib.crc32(method.encode())
    return {
        "color": list(COLOURS.values())[place % len(names)],
        "marker": MARKERS[(place + place // len(names)) % len(MARKERS)],
    }


def quiet(axes: Axes) -> None:
    """Pale lines at the ticks of y alone, behind all else."""
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def percent_scale(axes: Axes, low: float, high: float) -> None:
    """A logarithmic y from `low` to `high` %, with plain numbers at their places."""
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(low, high)
    plain_log(axes.yaxis, (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100), unit=" %")


def name_ends(axes: Axes, ends: Iterable[tuple[str, float, str]], size: float = 9) -> None:
    """Writes names right of the axes, each at the height of its line's end, and moved as little as
    keeps all of them readable.

    Args:
        axes: whose limits and scales are final.
        ends: name, y and colour of each line.
        size: of the font, in points.
    """
    found = sorted(ends, key=lambda end: end[1])
    if not found:
        return
    points = axes.transData.transform([(1, y) for _, y, _ in found])
    heights = axes.transAxes.inverted().transform(points)[:, 1].tolist()
    gap = 1.3 * size / 72 * axes.figure.dpi / axes.bbox.height
    places = apart(heights, gap)
    for (name, _, color), place in zip(found, places, strict=True):
        axes.annotate(
            name,
            (1.0, place),
            (4, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=color,
            fontweight="bold",
            fontsize=size,
            annotation_clip=False,
        )


def dark(path: Path) -> Path:
    """The file of the dark variant of a figure."""
    return path.with_stem(f"{path.stem}_dark")


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Writes a figure as a PNG, and its variant for dark pages beside it, see `dark`."""
    with replacing(path) as new:
        figure.savefig(new, dpi=dpi, format="png")
    _darken(figure)
    with replacing(dark(path)) as new:
        figure.savefig(new, dpi=dpi, format="png", facecolor=PAGE)


def _darken(figure: Figure) -> None:
    """Turns greys around, so that black ink is white, and lightens all other colours."""
    changes = []  # read before any is made: a marker takes its colour from its line
    for artist in figure.findobj():
        artist.set_path_effects([])  # white, to keep a text apart from what is under it
        for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            with suppress(AttributeError, ValueError, TypeError):
                colors = to_rgba_array(getattr(artist, f"get_{name}")())
                new = [_on_dark(color) for color in colors]
                if new:
                    change = getattr(artist, f"set_{name}")
                    changes.append((change, new[0] if len(new) == 1 else new))
    for change, color in changes:
        change(color)


def _on_dark(color: np.ndarray) -> tuple[float, ...]:
    rgb, alpha = color[:3], float(color[3])
    page = to_rgba_array(PAGE)[0, :3]
    if np.ptp(rgb) < 0.02:  # a grey: from white, which is the page, to black, which is white
        return (*(page + (1 - rgb) * (0.93 - page)), alpha)
    return (*(rgb + 0.25 * (1 - rgb)), alpha)
