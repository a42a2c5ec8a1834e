"""Sums of several tensors in one read.

XLA:CPU gives every sum over a tensor a loop of its own, because what it fuses has one result; only
a reduction of several operands at once has several. It makes good code of one that is short: of up
to 16 elements that are not neighbours in memory. So a few are added first, in one loop that takes
in whatever they are computed from, masks and conversions included. What is left, a seventh or so,
is summed as usual.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxnorm._core.axes import Shape
from jaxnorm._core.blocks import block_sum, spread
from jaxnorm._core.xla import broadcast_axis, sum_axis

WIDEST = 16
"""How many elements are added in a step, at most. XLA unrolls a sum of up to 32, and a longer one
takes 3 to 8 times as long; with much arithmetic in it the limit is between 8 and 32 (jaxlib
0.10.2)."""

FAR_APART = 2**14
"""Elements between two of a sum from which on an ordinary one takes 20 to 50 times as long as a
copy, as in the statistics of each position over a batch."""

SHARDS = 8
"""Parts of a long row that are kept apart until the last sum."""

Cuts = list[tuple[Shape, int]]
"""One cut after the other: a shape with an axis cut in two, and which of the two is summed."""


def cuts_of(shape: Shape, sums: Shape, rows: bool = False) -> Cuts:
    """The cuts of which each is summed first, so that one usual sum of each tensor gives `sums`.

    There are none where no axis but the last is summed whole, or none is divisible. With `rows`,
    sums over the last axis alone are cut as well, until `sums` is left.
    """
    symbolic = not all(isinstance(n, int) for n in shape)  # jax.export
    if symbolic or 0 in shape:
        return []
    if rows and sums == (*shape[:-1], 1):
        return _cut_rows(shape)
    cuts: Cuts = []
    sizes = list(shape)
    while True:
        far = far_apart(sizes, sums)
        widths = {i: _width(n, far) for i, n in enumerate(sizes[:-1]) if sums[i] == 1}
        # Batches are sharded over devices more often than images.
        axis = max(widths, key=lambda i: (widths[i] > 1, i > 0, min(widths[i], 7), -i), default=0)
        width = widths.get(axis, 1)
        if width == 1 or (cuts and not far):
            return cuts
        # Neighbours are added, which are more often on one device.
        cuts.append(((*sizes[:axis], sizes[axis] // width, width, *sizes[axis + 1 :]), axis + 1))
        sizes[axis] //= width


def far_apart(shape: Sequence[int], sums: Shape) -> bool:
    """Whether all neighbours in a sum are far apart in memory."""
    summed = [i for i, (n, g) in enumerate(zip(shape, sums, strict=True)) if n != g]
    return bool(summed) and math.prod(shape[summed[-1] + 1 :]) >= FAR_APART


def _cut_rows(shape: Shape) -> Cuts:
    """Cuts of rows into parts that are added element by element, so that an add is a vector's.

    Cuts follow until one element is left: a usual sum would become one loop with all that uses it.
    There is none for a length with a prime factor above `WIDEST`. Long rows are added within
    `SHARDS` parts first, because devices gather the first sums of a sharded row. Of shorter rows
    they gather up to half of x; parts would be too short there.
    """
    cuts: Cuts = []
    *rest, n = shape
    if n % SHARDS == 0 and n >= 64 * SHARDS:
        rest, n = [*rest, SHARDS], n // SHARDS
    while n > 1:
        widths = [w for w in range(2, WIDEST + 1) if n % w == 0 and (cuts or n >= 4 * w)]
        widths = widths or [w for w in (n,) if w <= WIDEST]
        if not widths:
            return []
        # A power of two leaves the fewest cuts.
        width = max(widths, key=lambda w: (w & -w, w))
        cuts.append(((*rest, width, n // width), len(rest)))
        n //= width
    if len(rest) == len(shape):
        cuts.append(((*rest, 1), len(rest) - 1))
    return cuts


def _width(n: int, far: bool) -> int:
    """How many of n elements to add in a step: a divisor, or 1."""
    divisors = [w for w in range(2 if far else 4, WIDEST + 1) if n % w == 0]
    if far:
        # No usual sum may follow, so that a prime number of elements is summed as it is.
        return max(divisors, key=lambda w: (min(w, 8), -w), default=n)
    # Shards of an axis are mostly a power of two: the more twos are left, the more often those that
    # are added lie on one device.
    return max(divisors, key=lambda w: (min(w, 6), (n // w) & -(n // w), w), default=1)


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])


def sums_together(ts: Sequence[jax.Array], sums: Shape, cuts: Cuts) -> list[jax.Array]:
    """`block_sum` of each."""
    for cut, axis in cuts:
        ts = [jnp.squeeze(t, axis) for t in sum_axis([t.reshape(cut) for t in ts], axis)]
    return [block_sum(t, sums) for t in ts]


def spread_together(ts: Sequence[jax.Array], shape: Shape, cuts: Cuts) -> list[jax.Array]:
    """Each spread to `shape`, so that in reverse mode their cotangents are `sums_together`."""
    sizes = [shape, *(_without(*cut) for cut in cuts)]
    ts = [jnp.broadcast_to(spread(t, sizes[-1]), sizes[-1]) for t in ts]
    for (cut, axis), shape in zip(reversed(cuts), reversed(sizes[:-1]), strict=True):
        ts = broadcast_axis([jnp.expand_dims(t, axis) for t in ts], axis, cut[axis])
        ts = [t.reshape(shape) for t in ts]
    return list(ts)
