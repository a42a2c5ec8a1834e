"""Sums in one read, against sums in float64, and the spread that they are the transpose of."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm._core import platforms
from jaxnorm._core.blocks import spread
from jaxnorm._core.together import FAR_APART, WIDEST, cuts_of, spread_together, sums_together
from jaxnorm._core.xla import broadcast_axis, sum_axis

CASES = [
    ((32, 28, 28, 8), (1, 1, 1, 8)),
    ((8, 56, 14, 4), (8, 1, 1, 4)),
    ((6, 5, 7, 3), (1, 1, 1, 3)),
    ((48, 16), (1, 16)),
    ((16, 13, 8), (1, 1, 8)),
    ((30, 64, 256), (1, 64, 256)),  # positions, far apart
    ((2, 128, 128), (1, 128, 128)),
    ((37, 128, 128), (1, 128, 128)),  # a prime number of them
    ((128, 64, 256), (1, 64, 256)),
    ((8, 4, 6, 2), (1, 4, 1, 2)),
    ((4, 12, 9), (4, 1, 1)),
    *(((3, 5, n), (3, 5, 1)) for n in (2, 3, 7, 8, 15, 16, 48, 96, 768)),  # rows
    ((3, 26), (3, 1)),
]


@pytest.mark.parametrize("shape, sums", CASES)
def test_sums_and_their_transpose(shape, sums):
    rng = np.random.default_rng(0)
    a, b, *spreads = (rng.normal(size=s).astype("f4") for s in (shape, shape, sums, sums))
    cuts = cuts_of(shape, sums, rows=True)
    assert cuts
    axes = tuple(i for i, g in enumerate(sums) if g == 1)
    got = jax.jit(lambda *ts: sums_together(ts, sums, cuts))(a, b)
    for t, total in zip((a, b), got, strict=True):
        wanted = t.astype("f8").sum(axes, keepdims=True)
        np.testing.assert_allclose(total, wanted, rtol=1e-5, atol=1e-4)

    y, back = jax.vjp(lambda *ts: spread_together(ts, shape, cuts), *map(jnp.asarray, spreads))
    for t, full in zip(spreads, y, strict=True):
        np.testing.assert_array_equal(full, np.broadcast_to(spread(jnp.asarray(t), shape), shape))
    for ct, of_spread in zip((a, b), back([jnp.asarray(a), jnp.asarray(b)]), strict=True):
        wanted = ct.astype("f8").sum(axes, keepdims=True)
        np.testing.assert_allclose(of_spread, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("far", [False, True])
def test_a_lone_sum_is_cut_where_neighbours_are_far_apart(far):
    x = jnp.ones((32, 64, 256))
    sums = (1, 64, 256) if far else (32, 64, 1)
    f = jax.jit(lambda x: platforms.total(x, sums, x.dtype))
    with_two_results = re.findall(r"= \(f32\S+, f32\S+\) (?:fusion|reduce)\(", hlo(f, x))
    assert bool(with_two_results) == far
    np.testing.assert_array_equal(f(x), np.full(sums, x.size // np.prod(sums)))


def hlo(f, x):
    return f.lower(x).compile().as_text()


@pytest.mark.parametrize("shape, sums", CASES)
def test_groups_are_narrow_and_leave_what_is_not_summed(shape, sums):
    sizes = list(shape)
    for cut, added in cuts_of(shape, sums, rows=True):
        width = cut[added]
        assert 2 <= width <= WIDEST or width in shape
        assert np.prod(cut) == np.prod(sizes)
        sizes = [*cut[:added], *cut[added + 1 :]]
    assert all(n == g or g == 1 for n, g in zip(sizes, sums, strict=True))
    rest = [i for i, (n, g) in enumerate(zip(sizes, sums, strict=True)) if n != g]
    # An ordinary sum of what is left is one of elements near each other.
    assert not rest or np.prod(sizes[rest[-1] + 1 :]) < FAR_APART


@pytest.mark.parametrize(
    "shape, sums",
    [
        ((8, 512, 768), (8, 512, 1)),  # rows, which are cut on request
        ((32, 1, 1, 64), (32, 1, 1, 64)),
        ((3, 3, 3, 8), (1, 1, 1, 8)),
        ((37, 8), (1, 8)),
    ],
)
def test_no_cuts(shape, sums):
    assert cuts_of(shape, sums) == []


@pytest.mark.parametrize("n", [17, 37, 2 * 97])
def test_no_cuts_of_rows_that_leave_a_long_sum(n):
    assert cuts_of((8, n), (8, 1), rows=True) == []


def test_what_is_added_on_one_device_stays_there():
    """Groups of neighbours are whole groups of each of eight devices, where the size allows."""
    for n, shards in ((48, 8), (56, 8), (28, 4), (112, 8), (24, 4)):
        ((cut, added), *_) = cuts_of((2, n, 3, 4), (1, 1, 1, 4))
        assert added == 2 and (n // shards) % cut[added] == 0


def test_one_sum_alone():
    """A loop of two results, where XLA makes an ordinary sum of a single operand."""
    t = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 5)), jnp.float32)
    program = jax.jit(lambda t: sum_axis([t], 1)[0]).lower(t).compile()
    np.testing.assert_allclose(program(t), np.asarray(t).sum(1, keepdims=True), rtol=1e-5)
    assert re.search(r"= \(f32\[8,5\]\S*, f32\[8,5\]\S*\) (fusion|reduce)\(", program.as_text())


@pytest.mark.parametrize("which", [0, 1])
def test_what_has_no_cotangent_has_no_gradient(which):
    a, b = jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4))
    gradients = jax.grad(lambda *ts: sum_axis(ts, 1)[which].sum(), (0, 1))(a, b)
    assert [float(t.sum()) for t in gradients] == [24 * (which == 0), 24 * (which == 1)]
    gradients = jax.grad(lambda *ts: broadcast_axis(ts, 1, 3)[which].sum(), (0, 1))(
        a[:, :1], b[:, :1]
    )
    assert [float(t.sum()) for t in gradients] == [24 * (which == 0), 24 * (which == 1)]


@pytest.mark.parametrize("mapped", [(0, None), (1, 0), (None, 2)])
def test_primitives_are_linear_and_map(mapped):
    """Forward and reverse mode of both, twice, and vmap with some arrays mapped."""
    rng = np.random.default_rng(0)
    sizes = [(3, 4, 6, 5) if d is not None else (4, 6, 5) for d in mapped]
    a, b = (
        jnp.moveaxis(jnp.asarray(rng.normal(size=s), jnp.float32), 0, d or 0)
        for s, d in zip(sizes, mapped, strict=True)
    )

    def f(a, b):
        a, b = sum_axis([a, b], 1)
        return broadcast_axis([a * b, b], 1, 6)

    def plain(a, b):
        a, b = a.sum(1, keepdims=True), b.sum(1, keepdims=True)
        return [jnp.broadcast_to(t, (4, 6, 5)) for t in (a * b, b)]

    def derivatives(f):
        f = jax.vmap(f, mapped)

        def total(a, b):
            return sum((t**2).sum() for t in f(a, b))

        def pushed(a, b):
            return jax.jvp(jax.grad(total, (0, 1)), (a, b), (b * jnp.ones_like(a), 0 * b))

        gradient = jax.grad(total)(a, b)
        return f(a, b), gradient, pushed(a, b) if a.shape == b.shape else None

    for got, wanted in zip(
        jax.tree.leaves(derivatives(f)), jax.tree.leaves(derivatives(plain)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
