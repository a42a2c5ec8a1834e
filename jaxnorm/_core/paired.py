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

    None, where no axis but the last is summed whole, or none is divisible.
    """
    if not all(isinstance(n, int) for n in shape):  # jax.export makes them symbolic
        return []
    steps: Steps = []
    sizes = list(shape)
    while True:
        summed = [i for i, (n, g) in enumerate(zip(sizes, sums, strict=True)) if n != g]
        near = bool(summed) and math.prod(sizes[summed[-1] + 1 :]) < FAR_APART
        narrowest = 4 if near else 2  # fewer would leave much to store
        widths = {
            i: max((w for w in range(narrowest, WIDEST + 1) if n % w == 0), default=1)
            for i, n in enumerate(sizes[:-1])
            if sums[i] == 1
        }
        # Batches are sharded over devices more often than images.
        axis = max(widths, key=lambda i: (widths[i] > 1, i > 0, min(widths[i], 7), -i), default=0)
        enough = near and (len(steps) == 2 or (steps and axis == 0))
        if widths.get(axis, 1) == 1 or enough:
            return steps
        steps.append((axis, widths[axis]))
        sizes[axis] //= widths[axis]


def _split(shape: Shape, axis: int, width: int) -> tuple[list[int], int]:
    """The shape with the axis cut in two, and which of them is summed."""
    n = shape[axis] // width
    # Along the batch neighbours are added, so that shards of it stay where they are. Elsewhere it
    # is elements as far apart as can be: every loop then runs over long stretches of memory.
    pair = [n, width] if axis == 0 else [width, n]
    return [*shape[:axis], *pair, *shape[axis + 1 :]], axis + (axis == 0)


def paired_sums(a: jax.Array, b: jax.Array, sums: Shape, steps: Steps) -> list[jax.Array]:
    """`block_sum` of a and of b."""
    for axis, width in steps:
        dims, summed = _split(a.shape, axis, width)
        t = lax.complex(a, b).reshape(dims).sum(summed)
        a, b = barrier((t.real, t.imag))  # two arrays, or XLA would join this sum to the next
    return [block_sum(t, sums) for t in (a, b)]


def paired_spread(a: jax.Array, b: jax.Array, shape: Shape, steps: Steps) -> list[jax.Array]:
    """Both spread to `shape`, so that in reverse mode their cotangents are `paired_sums`."""
    sizes, cuts = list(shape), []
    for axis, width in steps:
        cuts.append((tuple(sizes), *_split(tuple(sizes), axis, width)))
        sizes[axis] //= width
    a, b = (jnp.broadcast_to(spread(t, tuple(sizes)), sizes) for t in (a, b))
    for before, dims, summed in reversed(cuts):
        t = lax.complex(*barrier((a, b)))
        t = jnp.broadcast_to(jnp.expand_dims(t, summed), dims).reshape(before)
        a, b = t.real, t.imag
    return [a, b]
