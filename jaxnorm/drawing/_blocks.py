"""Blocks of numbers, coloured by which of them share a statistic."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from jaxnorm.drawing._style import HUES, inks

# where N, C and H x W point
_RIGHT, _LEFT, _UP = np.array([0.87, 0.40]), np.array([-0.87, 0.40]), np.array([0.0, 1.0])
_GAP = 0.55


class _HasShape(Protocol):
    """A row of the table of methods, or `Groups`."""

    def shape(self, x_shape: Sequence[int], /) -> tuple[int, ...]: ...


def draw_row(
    ax: Any,
    row: _HasShape,
    sizes: Sequence[int],
    *,
    title: str = "",
    caption: str = "",
    names: Sequence[str] = "NHWC",
) -> None:
    """Draw a row of the table: its name, the call, the block, and one number per axis.

    A row whose mean is fixed at 0, as that of RMS norm, has a 0 for its mean beside them.

    Args:
        ax: axes of matplotlib.
        row: a row of the table, such as `methods.group_norm(3)`, or `Groups`.
        sizes: of the block: examples, height, width and channels. The row must split it.
        title: above the block.
        caption: under the title, such as the call that makes the row.
        names: of the four axes. Those of a kernel are height, width, inputs and outputs; its inputs
            are drawn where the examples are elsewhere.
    """
    counts = row.shape(tuple(sizes))
    if tuple(names) == tuple("NHWC"):
        draw_block(ax, sizes, counts)
    else:
        drawn = ([t[i] for i in (2, 0, 1, 3)] for t in (sizes, counts))
        draw_block(ax, *drawn, names=("in", "h, w", "out"))
    middle = {"transform": ax.transAxes, "ha": "center"}
    for i, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        place = 0.26 + 0.16 * i
        _draw_number(ax, place, -0.04, str(count), count > 1, count == size)
        ax.text(place, -0.145, names[i], va="center", fontsize=8.5, **middle)
    if getattr(row, "mean", None) == 0:
        _draw_number(ax, 0.93, -0.04, "0", True, False)
        ax.text(0.93, -0.145, "mean", va="center", fontsize=8.5, **middle)
    ax.text(0.5, 1.12, title, fontsize=11, fontweight="bold", **middle)
    ax.text(0.5, 1.02, caption, fontsize=8.5, family="monospace", **middle)


def draw_block(
    ax: Any,
    sizes: Sequence[int],
    counts: Sequence[int],
    *,
    names: tuple[str, str, str] = ("N", "H, W", "C"),
) -> None:
    """Draw a block of numbers: what shares a statistic touches and has one colour.

    Between sets there is a gap.

    Args:
        ax: axes of matplotlib.
        sizes: of the block: examples, height, width and channels.
        counts: into how many groups each axis is split.
        names: of the three directions of the picture.
    """
    from matplotlib.collections import PolyCollection

    each = np.ones([n // k for n, k in zip(sizes, counts, strict=True)], int)
    sets = np.kron(np.arange(np.prod(counts)).reshape(counts), each)
    sets = sets.reshape(sizes[0], -1, sizes[3])
    colours = _colours(counts)
    lines = [np.moveaxis(sets, axis, 0)[:, 0, 0] for axis in range(3)]
    place = [
        np.arange(len(line)) + _GAP * np.cumsum(np.diff(line, prepend=0) != 0) for line in lines
    ]
    extent = [along[-1] + 1 for along in place]

    def at(corner: Any) -> np.ndarray:
        n, p, c = corner
        return n * _RIGHT + c * _LEFT + (extent[1] - p) * _UP

    faces, fill = [], []
    n, p, c = np.eye(3)
    # From the back to the front, so that nearer elements cover farther ones.
    for index in sorted(np.ndindex(sets.shape), key=lambda e: (-e[0] - e[2], -e[1])):
        corner = np.array([along[i] for along, i in zip(place, index, strict=True)])
        base = colours[sets[index]]
        for a, b in ((c, p), (n, p), (n, c)):
            faces.append([at(corner + edge) for edge in (0 * a, a, a + b, b)])
        fill += [base, 0.82 * base, 1 - 0.78 * (1 - base)]
    ink, _, paper = inks()
    ax.add_collection(PolyCollection(faces, facecolors=fill, edgecolors=paper, linewidths=0.5))

    below = extent[1] + 0.55
    arrows = [
        ((0.2, below, -0.45), (extent[0] * 0.75, below, -0.45), (0.45, -0.55)),
        ((-0.4, 0.1, extent[2] + 0.5), (-0.4, extent[1] * 0.85, extent[2] + 0.5), (-0.3, 0.0)),
        ((-0.45, below, 0.2), (-0.45, below, extent[2] * 0.75), (-0.45, -0.55)),
    ]
    for name, (start, end, away) in zip(names, arrows, strict=True):
        ax.annotate(
            "", at(end), at(start), arrowprops={"arrowstyle": "-|>", "color": ink, "lw": 0.9}
        )
        x, y = (at(start) + at(end)) / 2 + away
        ax.text(x, y, name, ha="right" if name == names[1] else "center", va="center", fontsize=9)
    middle = (extent[0] * _RIGHT + extent[2] * _LEFT)[0] / 2
    ax.set(xlim=(middle - 7.7, middle + 7.7), ylim=(-1.6, 11.4), aspect="equal")
    ax.axis("off")


def draw_key(ax: Any) -> None:
    """Draw what the looks of a number mean.

    Args:
        ax: axes of matplotlib.
    """
    ax.axis("off")
    for y, (number, split, apart), text in (
        (0.76, ("1", False, False), "pooled: all indices share"),
        (0.58, ("2", True, False), "cut into groups"),
        (0.40, ("4", True, True), "every index alone"),
        (0.22, ("0", True, False), "mean: fixed at 0, not measured"),
    ):
        _draw_number(ax, 0.10, y, number, split, apart)
        ax.text(0.21, y, text, transform=ax.transAxes, va="center")


def _draw_number(ax: Any, x: float, y: float, number: str, split: bool, apart: bool) -> None:
    """One axis: quiet where it is pooled, framed where split, filled where all stand apart."""
    ink, pale, paper = inks()
    box = {
        "boxstyle": "round,pad=0.28",
        "facecolor": ink if apart else paper,
        "edgecolor": ink if split else pale,
    }
    colour = paper if apart else ink if split else pale
    middle = {"transform": ax.transAxes, "ha": "center", "va": "center"}
    ax.text(x, y, number, fontweight="bold", color=colour, bbox=box, **middle)


def _colours(counts: Sequence[int]) -> np.ndarray:
    """One colour a set.

    The hue changes along the first axis that is split, the lightness along the others.
    """
    from matplotlib.colors import to_rgb

    first = next((i for i in (0, 3, 1, 2) if counts[i] > 1), 0)
    sets = np.moveaxis(np.arange(np.prod(counts)).reshape(counts), first, 0)
    colours = np.empty((sets.size, 3))
    for i, of_hue in enumerate(sets.reshape(counts[first], -1)):
        lightness = 1 - 0.6 * np.arange(of_hue.size) / max(of_hue.size - 1, 1)
        colours[of_hue] = 1 - np.outer(lightness, 1 - np.array(to_rgb(HUES[i])))
    return colours
