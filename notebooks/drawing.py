"""Blocks of numbers, coloured by which of them share a statistic: what the notebooks draw with."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb

from jaxnorm import methods

# Okabe and Ito's palette, told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, PINK, SKY, RED = HUES = [
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
]
INK, PALE = "#333333", "#B8B8B8"
# where N, C and H x W point
RIGHT, LEFT, UP = np.array([0.87, 0.40]), np.array([-0.87, 0.40]), np.array([0.0, 1.0])
GAP = 0.55


def style():
    """Quiet axes, dark grey ink."""
    plt.rcParams.update(
        {"figure.dpi": 110, "figure.facecolor": "white", "font.size": 10, "axes.titlesize": 10}
    )
    plt.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": PALE,
            "text.color": INK,
        }
    )
    plt.rcParams.update({"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK})


def colours(counts):
    """One colour a set: the hue changes along the first axis that is cut, the lightness along the
    others."""
    first = next((i for i in (0, 3, 1, 2) if counts[i] > 1), 0)
    rest = [i for i in range(4) if i != first]
    many = np.prod([counts[i] for i in rest])
    for index in itertools.product(*map(range, counts)):
        step = np.ravel_multi_index([index[i] for i in rest], [counts[i] for i in rest])
        yield 1 - (1 - np.array(to_rgb(HUES[index[first]]))) * (1 - 0.6 * step / max(many - 1, 1))


def draw_block(ax, sizes, counts, names=("N", "H, W", "C")):
    """A block of `sizes` N, H, W, C: what shares a statistic touches and has one colour; between
    sets there is a gap."""
    sets = np.kron(
        np.arange(np.prod(counts)).reshape(counts), np.ones(np.array(sizes) // counts, int)
    )
    sets = sets.reshape(sizes[0], -1, sizes[3])
    colour = list(colours(counts))
    lines = [np.moveaxis(sets, axis, 0)[:, 0, 0] for axis in range(3)]
    place = [
        np.arange(len(line)) + GAP * np.cumsum(np.diff(line, prepend=0) != 0) for line in lines
    ]
    extent = [p[-1] + 1 for p in place]

    def at(n, p, c):
        return n * RIGHT + c * LEFT + (extent[1] - p) * UP

    faces, fill = [], []
    # From the back to the front, so that nearer elements cover farther ones.
    for i, j, k in sorted(np.ndindex(sets.shape), key=lambda e: (-e[0] - e[2], -e[1])):
        n, p, c = place[0][i], place[1][j], place[2][k]
        base = colour[sets[i, j, k]]
        faces += [[at(n, p, c), at(n, p, c + 1), at(n, p + 1, c + 1), at(n, p + 1, c)]]
        faces += [[at(n, p, c), at(n + 1, p, c), at(n + 1, p + 1, c), at(n, p + 1, c)]]
        faces += [[at(n, p, c), at(n + 1, p, c), at(n + 1, p, c + 1), at(n, p, c + 1)]]
        fill += [base, 0.82 * base, 1 - 0.78 * (1 - base)]
    ax.add_collection(PolyCollection(faces, facecolors=fill, edgecolors="white", linewidths=0.5))

    below = extent[1] + 0.55
    arrows = [
        ((0.2, below, -0.45), (extent[0] * 0.75, below, -0.45), (0.45, -0.55)),
        ((-0.4, 0.1, extent[2] + 0.5), (-0.4, extent[1] * 0.85, extent[2] + 0.5), (-0.3, 0.0)),
        ((-0.45, below, 0.2), (-0.45, below, extent[2] * 0.75), (-0.45, -0.55)),
    ]
    for name, (start, end, away) in zip(names, arrows, strict=True):
        ax.annotate(
            "", at(*end), at(*start), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 0.9}
        )
        x, y = (at(*start) + at(*end)) / 2 + away
        ax.text(x, y, name, ha="right" if name == names[1] else "center", va="center", fontsize=9)
    middle = (extent[0] * RIGHT + extent[2] * LEFT)[0] / 2
    ax.set(xlim=(middle - 7.7, middle + 7.7), ylim=(-1.6, 11.4), aspect="equal")
    ax.axis("off")


def draw_number(ax, x, y, count, size):
    """One axis: grey where it is pooled, framed where it is cut into groups, black where every
    index is apart."""
    ink = "white" if count == size else INK if count > 1 else PALE
    box = {
        "boxstyle": "round,pad=0.28",
        "facecolor": INK if count == size else "white",
        "edgecolor": PALE if count == 1 else INK,
    }
    ax.text(
        x,
        y,
        str(count),
        transform=ax.transAxes,
        ha="center",
        va="center",
        fontweight="bold",
        color=ink,
        bbox=box,
    )


def draw_row(ax, name, call, sizes, names="NHWC"):
    """A row of the table: its name, the call, the block, one number per axis."""
    # so that what is printed is what is drawn
    method = eval(f"methods.{call}", {"methods": methods, "sizes": sizes})
    counts = method.groups.shape(sizes)
    if names == "NHWC":
        draw_block(ax, sizes, counts)
    else:  # a kernel is height, width, inputs, outputs: its inputs are drawn where N is elsewhere
        order = [2, 0, 1, 3]
        draw_block(ax, [sizes[i] for i in order], [counts[i] for i in order], ("in", "h, w", "out"))
    for i, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        draw_number(ax, 0.26 + 0.16 * i, -0.04, count, size)
        ax.text(
            0.26 + 0.16 * i,
            -0.145,
            names[i],
            transform=ax.transAxes,
            ha="center",
            va="center",
            fontsize=8.5,
        )
    ax.text(0.5, 1.12, name, transform=ax.transAxes, ha="center", fontsize=11, fontweight="bold")
    ax.text(0.5, 1.02, call, transform=ax.transAxes, ha="center", fontsize=8.5, family="monospace")


def draw_key(ax):
    """What the three looks of a number mean."""
    ax.axis("off")
    for y, count, text in (
        (0.70, 1, "pooled: all indices share"),
        (0.52, 2, "cut into groups"),
        (0.34, 4, "every index alone"),
    ):
        draw_number(ax, 0.14, y, count, 4)
        ax.text(0.25, y, text, transform=ax.transAxes, va="center")
