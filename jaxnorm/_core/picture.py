"""A picture of the sets that share statistics, as HTML that a notebook draws by itself."""

import html
import itertools
from typing import Any

SIZES = (4, 4, 6)
"""Examples, positions and channels of the block that is drawn."""
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
CELL, GAP = 12, 5


def picture(batch: Any, spatial: Any, channel: Any, caption: str) -> str:
    """A block of 4 examples, 4 positions and 6 channels, coloured by set.

    Examples are side by side, positions go down and channels across; elements of one colour that
    touch share a statistic.

    It is a sketch: any number of groups above 1 that does not divide the block is drawn as 2, and
    several spatial axes as one.
    """
    splits = zip((batch, spatial, channel), SIZES, strict=True)
    parts = [_drawn(split, size) for split, size in splits]
    sets = list(itertools.product(*map(range, parts)))
    across = (SIZES[2] + 2) * CELL  # an example, and space so that the eye finds the next
    rectangles = []
    for n, p, c in itertools.product(*map(range, SIZES)):
        group = tuple(i * k // size for i, k, size in zip((n, p, c), parts, SIZES, strict=True))
        x, y = n * across + c * CELL + (group[0] + group[2]) * GAP, p * CELL + group[1] * GAP
        rectangles.append(
            f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
            f'fill="{COLOURS[sets.index(group) % len(COLOURS)]}"/>'
        )
    width, height = SIZES[0] * across + 12 * GAP, SIZES[1] * CELL + 4 * GAP
    caption = html.escape(caption)
    return (
        f"<code>{caption}</code><br>"
        f'<svg width="{width}" height="{height}" role="img" aria-label="{caption}">'
        f"{''.join(rectangles)}</svg><br>"
        "<small>4 examples side by side, 4 positions down, 6 channels across; "
        f"{len(sets)} sets here</small>"
    )


def _drawn(split: Any, size: int) -> int:
    """How many groups of an axis are drawn."""
    if isinstance(split, tuple):
        return max((_drawn(part, size) for part in split), default=1)
    if split == -1:
        return size
    return split if isinstance(split, int) and size % split == 0 else 2
