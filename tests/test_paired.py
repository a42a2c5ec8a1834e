"""Two sums in one read, against sums in float64, and the spread that they are the transpose of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm._core.blocks import spread
from jaxnorm._core.paired import FAR_APART, complex_steps, paired_spread, paired_sums

CASES = [
    ((32, 28, 28, 8), (1, 1, 1, 8)),
    ((8, 56, 14, 4), (8, 1, 1, 4)),
    ((6, 5, 7, 3), (1, 1, 1, 3)),
    ((48, 16), (1, 16)),
    ((16, 13, 8), (1, 1, 8)),
    ((30, 64, 256), (1, 64, 256)),  # positions, far apart
    ((2, 128, 128), (1, 128, 128)),
    ((8, 4, 6, 2), (1, 4, 1, 2)),
    ((4, 12, 9), (4, 1, 1)),
]


@pytest.mark.parametrize("shape, sums", CASES)
def test_sums_and_their_transpose(shape, sums):
    rng = np.random.default_rng(0)
    a, b, *spreads = (rng.normal(size=s).astype("f4") for s in (shape, shape, sums, sums))
    steps = complex_steps(shape, sums)
    assert steps
    axes = tuple(i for i, g in enumerate(sums) if g == 1)
    got = jax.jit(lambda a, b: paired_sums(a, b, sums, steps))(a, b)
    for t, total in zip((a, b), got, strict=True):
        wanted = t.astype("f8").sum(axes, keepdims=True)
        np.testing.assert_allclose(total, wanted, rtol=1e-5, atol=1e-4)

    y, back = jax.vjp(lambda *ts: paired_spread(*ts, shape, steps), *map(jnp.asarray, spreads))
    for t, full in zip(spreads, y, strict=True):
        np.testing.assert_array_equal(full, np.broadcast_to(spread(jnp.asarray(t), shape), shape))
    for ct, of_spread in zip((a, b), back([jnp.asarray(a), jnp.asarray(b)]), strict=True):
        wanted = ct.astype("f8").sum(axes, keepdims=True)
        np.testing.assert_allclose(of_spread, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape, sums", CASES)
def test_steps_are_short_and_leave_what_is_not_summed(shape, sums):
    sizes = list(shape)
    for axis, width in complex_steps(shape, sums):
        assert sums[axis] == 1 and sizes[axis] % width == 0 and 2 <= width <= 8
        sizes[axis] //= width
    rest = [i for i, (n, g) in enumerate(zip(sizes, sums, strict=True)) if n != g]
    # An ordinary sum of what is left is one of elements near each other.
    assert not rest or np.prod(sizes[rest[-1] + 1 :]) < FAR_APART


@pytest.mark.parametrize(
    "shape, sums",
    [
        ((8, 512, 768), (8, 512, 1)),  # rows
        ((32, 1, 1, 64), (32, 1, 1, 64)),
        ((3, 3, 3, 8), (1, 1, 1, 8)),
        ((11, 8), (1, 8)),
    ],
)
def test_no_steps(shape, sums):
    assert complex_steps(shape, sums) == []


def test_what_is_added_on_one_device_stays_there():
    """Groups of neighbours are whole groups of each of eight devices, where the size allows."""
    for n, shards in ((48, 8), (56, 8), (28, 4), (112, 8), (24, 4)):
        ((axis, width), *_) = complex_steps((2, n, 3, 4), (1, 1, 1, 4))
        assert axis == 1 and (n // shards) % width == 0
