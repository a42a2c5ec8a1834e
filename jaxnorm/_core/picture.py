"""A picture of the sets that share statistics, as HTML that a notebook draws by itself."""

import html
import itertools
from typing import Any

SIZES = {"batch": 4, "spatial": 4, "channel": 6}
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
    splits = {"batch": batch, "spatial": spatial, "channel": channel}
    parts = {kind: _drawn(split, SIZES[kind]) for kind, split in splits.items()}
    sets = list(itertools.product(*(range(parts[kind]) for kind in SIZES)))
    rectangles = []
    for n, p, c in itertools.product(*(range(size) for size in SIZES.values())):
        group = tuple(
            i * parts[kind] // SIZES[kind] for i, kind in zip((n, p, c), SIZES, strict=True)
        )
        colour = COLOURS[sets.index(group) % len(COLOURS)]
        # A gap after every group, and one between examples so that the eye finds them.
        x = n * (SIZES["channel"] + 2) * CELL + c * CELL + group[2] * GAP + group[0] * GAP
        y = p * CELL + group[1] * GAP
        rectangles.append(
            f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{colour}"/>'
        )
    width = SIZES["batch"] * (SIZES["channel"] + 2) * CELL + 12 * GAP
    height = SIZES["spatial"] * CELL + 4 * GAP
    return (
        f"<code>{html.escape(caption)}</code><br>"
        f'<svg width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(caption, quote=True)}">{"".join(rectangles)}</svg><br>'
        "<small>4 examples side by side, 4 positions down, 6 channels across; "
        f"{len(sets)} sets here</small>"
    )


def _drawn(split: Any, size: int) -> int:
    """How many groups of an axis are drawn."""
    if isinstance(split, tuple):
        return max(_drawn(part, size) for part in split)
    if isinstance(split, int) and split in (1, -1):
        return size if split == -1 else 1
    return split if isinstance(split, int) and size % split == 0 else 2
