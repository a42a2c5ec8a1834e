"""Two sums of a tensor in one read: as the two parts of a complex number.

XLA:CPU gives every sum over a tensor a loop of its own, because what it fuses has one result. A
complex number is one result. So elements are first added a few at a time as complex numbers, in one
loop that takes in whatever they are computed from, masks and conversions included; the sums of
what is left, a seventh or less, are ordinary ones.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm._core.axes import Shape
from jaxnorm._core.blocks import block_sum, spread
from jaxnorm._core.xla import barrier

WIDEST = 8
"""How many are added at a time, at most: XLA unrolls a sum of so many, and a longer one takes up to
30 times as long (jaxlib 0.10.2)."""

FAR_APART = 2**14
"""Elements between two of a sum from which on an ordinary one takes 10 to 30 times as long as a
copy, as in the statistics of each position over a batch."""

Steps = list[tuple[int, int]]


def complex_steps(shape: Shape, sums: Shape) -> Steps:
    """The axes along which elements are added as complex numbers, and how many at a time.

    There are none where no axis but the last is summed whole, or none is divisible.
    """
    symbolic = not all(isinstance(n, int) for n in shape)  # jax.export
    if symbolic or 0 in shape:
        return []
    steps: Steps = []
    sizes = list(shape)
    while True:
        summed = [i for i, (n, g) in enumerate(zip(sizes, sums, strict=True)) if n != g]
        near = bool(summed) and math.prod(sizes[summed[-1] + 1 :]) < FAR_APART
        widths = {i: _width(n, near) for i, n in enumerate(sizes[:-1]) if sums[i] == 1}
        # Batches are sharded over devices more often than images.
        axis = max(widths, key=lambda i: (widths[i] > 1, i > 0, min(widths[i], 7), -i), default=0)
        enough = near and (len(steps) == 2 or (steps and axis == 0))
        if widths.get(axis, 1) == 1 or enough:
            return steps
        steps.append((axis, widths[axis]))
        sizes[axis] //= widths[axis]


def _width(n: int, near: bool) -> int:
    """How many of n elements to add at a time: a divisor, or 1."""
    # Fewer than 4 would leave much to store. Shards of an axis are mostly a power of two: the more
    # twos are left, the more often those that are added lie on one device.
    narrowest = 4 if near else 2
    divisors = [w for w in range(narrowest, WIDEST + 1) if n % w == 0]
    return max(divisors, key=lambda w: (min(w, 6), (n // w) & -(n // w), w), default=1)


def _split(shape: Shape, axis: int, width: int) -> list[int]:
    """The shape with the axis cut in groups of neighbours."""
    return [*shape[:axis], shape[axis] // width, width, *shape[axis + 1 :]]


def paired_sums(a: jax.Array, b: jax.Array, sums: Shape, steps: Steps) -> list[jax.Array]:
    """`block_sum` of a and of b."""
    for axis, width in steps:
        t = lax.complex(a, b).reshape(_split(a.shape, axis, width)).sum(axis + 1)
        a, b = barrier((t.real, t.imag))  # two arrays, or XLA would join this sum to the next
    return [block_sum(t, sums) for t in (a, b)]


def paired_spread(a: jax.Array, b: jax.Array, shape: Shape, steps: Steps) -> list[jax.Array]:
    """Both spread to `shape`, so that in reverse mode their cotangents are `paired_sums`."""
    sizes, cuts = shape, []
    for axis, width in steps:
        cuts.append((sizes, axis, width))
        sizes = (*sizes[:axis], sizes[axis] // width, *sizes[axis + 1 :])
    a, b = (jnp.broadcast_to(spread(t, sizes), sizes) for t in (a, b))
    for sizes, axis, width in reversed(cuts):
        t = jnp.expand_dims(lax.complex(*barrier((a, b))), axis + 1)
        t = jnp.broadcast_to(t, _split(sizes, axis, width)).reshape(sizes)
        a, b = t.real, t.imag
    return [a, b]
