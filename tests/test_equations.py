"""The tuned forms equal the page of the paper, in values and derivatives, in double precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from rows import ROWS, shape_of

from jaxnorm import moments, norm
from jaxnorm._core import equations

pytestmark = pytest.mark.usefixtures("x64")

CHOSEN = [row for row in ROWS if 3 in row.ranks]


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(1, 2, shape))


def weights_of(kind, shape):
    rng = np.random.default_rng(1)
    return {
        "none": None,
        "mask": jnp.asarray(rng.random(shape) < 0.7),
        "real": jnp.asarray(rng.uniform(0, 1, shape)),
        "real examples": jnp.asarray(rng.uniform(0, 1, (shape[0],) + (1,) * (len(shape) - 1))),
    }[kind]


def tuned(row, channel_axis, axis_name, x, w, scale, bias):
    y, m = norm(
        x,
        row,
        weights=w,
        scale=scale,
        bias=bias,
        epsilon=1e-3,
        axis_name=axis_name,
        channel_axis=channel_axis,
    )
    return m.count, m.mean, m.var, y


def written(row, channel_axis, axis_name, x, w, scale, bias):
    shape = row.shape(x.shape, channel_axis=channel_axis)
    one, fixed = jnp.ones((), x.dtype), row.row(x.shape, channel_axis=channel_axis).mean
    count, mean, var = equations.mean_and_variance(
        x, one if w is None else w, shape, mean=fixed, axis_name=axis_name
    )
    along = [-1 if i == channel_axis % x.ndim else 1 for i in range(x.ndim)]
    affine = (scale.reshape(along), bias.reshape(along))
    return count, mean, var, equations.standardized(x, mean, var, *affine, 1e-3)


def agree(f, g, *args):
    """Values, the derivative along a tangent, and the pullback of a cotangent."""
    f, g = jax.jit(f), jax.jit(g)
    tangents = tuple(normal(t.shape, 10 + i) for i, t in enumerate(args))
    (ours, along), (theirs, along_theirs) = (jax.jvp(h, args, tangents) for h in (f, g))
    cotangents = jax.tree.map(lambda t: normal(t.shape, 20), theirs)
    back, back_theirs = (jax.vjp(h, *args)[1](cotangents) for h in (f, g))
    for a, b in ((ours, theirs), (along, along_theirs), (back, back_theirs)):
        for s, t in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(s, t, rtol=1e-9, atol=1e-9)


KINDS = ["none", "mask", "real", "real examples"]
# Each row with one kind of weights, by turns, and with the others among the slow tests.
CASES = [
    pytest.param(
        row, kind, marks=() if i % len(KINDS) == k else pytest.mark.slow, id=f"{row}-{kind}"
    )
    for i, row in enumerate(CHOSEN)
    for k, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("row", "kind"), CASES)
def test_tuned_forms_are_the_equations(row, kind):
    channel_axis = -1 if CHOSEN.index(row) % 2 else 1
    shape = shape_of(3, channel_axis)
    method, w = row.call(shape, channel_axis), weights_of(kind, shape)
    x, scale, bias = normal(shape), normal((6,), 2), normal((6,), 3)
    both = [partial(f, method, channel_axis, None) for f in (tuned, written)]
    if w is not None and w.dtype != bool:
        agree(*both, x, w, scale, bias)
    else:
        agree(*(lambda x, g, b, f=f: f(x, w, g, b) for f in both), x, scale, bias)


@pytest.mark.parametrize("kind", ["none", "mask", "real"])
@pytest.mark.parametrize("mapped", ["vmap", "shard_map"])
@pytest.mark.parametrize("row", [row for row in CHOSEN if row.name in ("batch_norm", "rms_norm")])
def test_tuned_forms_are_the_equations_over_devices(row, mapped, kind):
    """Statistics of four devices, each of which holds two examples."""
    x, scale, bias = normal((4, 2, 4, 6)), normal((6,), 2), normal((6,), 3)
    w, method = weights_of(kind, x.shape), row.call(x.shape[1:], -1)

    def over_devices(f):
        if mapped == "vmap":
            return jax.vmap(
                partial(f, method, -1, "i"),
                (0, None if w is None else 0, None, None),
                axis_name="i",
            )
        mesh = Mesh(np.array(jax.devices()[:4]), ("i",))

        def one(x, w, scale, bias):
            out = f(method, -1, "i", x[0], None if w is None else w[0], scale, bias)
            return jax.tree.map(lambda t: t[None], out)

        specs = (P("i"), None if w is None else P("i"), P(), P())
        return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=P("i"), check_vma=False)

    agree(
        *(lambda x, g, b, f=f: over_devices(f)(x, w, g, b) for f in (tuned, written)),
        x,
        scale,
        bias,
    )


def test_large_means():
    """The tuned variance takes sums about another value than the mean first."""
    x = 1e6 + normal((8, 4, 6))
    method = ROWS[0].call(x.shape, -1)
    _, mean, var = equations.mean_and_variance(x, jnp.ones(()), (1, 1, 6))
    m = jax.jit(partial(moments, groups=method))(x)
    np.testing.assert_allclose(m.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(m.var, var, rtol=1e-9)
