"""Every method in every context: values and gradients are those of one device, whichever axis is
cut between devices."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from contexts import CONTEXTS, MESHES, fitting, parts, spec, whole
from rows import ROWS

from jaxnorm import norm
from jaxnorm._core.blocks import spread

SHAPE = (16, 8, 3, 6)


def normal(seed, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape)


def uneven():
    """Weights that differ between devices; devices 1 and 7 of those that cut the batch count
    nothing, nor do two rows."""
    w = np.random.default_rng(2).uniform(0, 1, (16, 8, 3, 1)) * (np.arange(16) % 5 > 0).reshape(
        16, 1, 1, 1
    )
    w[2:4], w[14:], w[:, 3], w[:8, 5] = 0, 0, 0, 0
    return w


def at_elements(t, x):
    return jnp.broadcast_to(spread(t, x.shape), x.shape)


def of_parts(method, weighted, names):
    """For parts: y, its cotangent pulled back, and the statistics of each element."""

    def f(x, w, gy):
        def g(x, w):
            return norm(x, method, weights=w if weighted else None, axis_name=names)

        y, pull, m = jax.vjp(g, x, w, has_aux=True)
        return y, *pull(gy), *(at_elements(t, x) for t in (m.count, m.mean, m.var))

    return f


def of_whole(method, weighted):
    """For whole arrays: cotangents of mean and variance as well."""

    def f(x, w, gy, gm, gv):
        def g(x, w):
            y, m = norm(x, method, weights=w if weighted else None)
            return (y, m.mean, m.var), m.count

        (y, mean, var), pull, count = jax.vjp(g, x, w, has_aux=True)
        return y, *pull((gy, gm, gv)), count, mean, var

    return f


def sets_of_parts(row, cut, synced):
    """The sets of each device's part, shared between devices or not."""
    shape = parts(np.zeros(SHAPE), cut).shape[len(cut) :]
    numbers = oracle.set_numbers(shape, row.label)
    devices = np.arange(8).reshape(MESHES[cut])
    offsets = devices * (0 if synced else numbers.size)
    return whole(offsets.reshape(*MESHES[cut], 1, 1, 1, 1) + numbers, cut)


def check(row, context, cut, weighted, synced=True, reverse=False):
    w = uneven() if weighted else np.ones((16, 8, 3, 1))
    x, gy = normal(0), normal(1)
    if context.named:
        method = row.call(parts(x, cut).shape[len(cut) :], -1)
        names = ("i", "j")[: len(cut)][:: -1 if reverse else 1] if synced else None
        got = context.run(of_parts(method, weighted, names), cut)(x, w, gy)
        sets, gm, gv = sets_of_parts(row, cut, synced), 0.0, 0.0
        wanted = oracle.normalized(x, sets, weights=w, gy=gy, mean=row.mean)
    else:
        method = row.call(SHAPE, -1)
        shape = method.shape(SHAPE)
        gm, gv = normal(3, shape), normal(4, shape)
        got = context.run(of_whole(method, weighted), cut)(x, w, gy, gm, gv)
        full_gm, full_gv = (oracle.at_elements(t, SHAPE) for t in (gm, gv))
        sets = oracle.set_numbers(SHAPE, row.label)
        wanted = oracle.normalized(x, sets, weights=w, gy=gy, gm=full_gm, gv=full_gv, mean=row.mean)
        if context.name != "jit":
            assert got[0].sharding.spec == got[1].sharding.spec == spec(cut)
            assert all(t.sharding.spec == fitting(t, cut) for t in got[2:])
    y, dx, dw, count, mean, var = map(np.asarray, got)
    np.testing.assert_allclose(y, wanted.y, atol=1e-11)
    np.testing.assert_allclose(dx, wanted.dx, atol=1e-10)
    np.testing.assert_allclose(
        dw, oracle.summed(wanted.dw, 0, 1, 2).reshape(dw.shape) if weighted else 0, atol=1e-10
    )
    for t, want in ((count, wanted.count), (mean, wanted.mean), (var, wanted.var)):
        np.testing.assert_allclose(oracle.at_elements(t, SHAPE), want, atol=1e-11)


def splits(row, cut):
    """Whether the method divides a part: parts of 3 or 6 positions do not hold every number of
    groups of positions."""
    return "H" not in cut or not row.name.startswith("parts_of_channels_")


CASES: list = []
for number, row in enumerate(ROWS):
    for place, context in enumerate(CONTEXTS):
        for cut in ("N", "H", "NH") if context.named else MESHES:
            if context.named and not splits(row, cut):
                continue
            for weighted in (True, False):
                turn = number + place + list(MESHES).index(cut) + weighted
                if turn % 4:  # every row meets every context; cuts and weights take turns
                    continue
                often = (number + place + list(MESHES).index(cut)) % 11 == 0 and weighted == (
                    number % 3 > 0
                )
                marks = () if often and (number + place) % 2 else pytest.mark.slow
                name = f"{row}-{context}-{cut}-{'weights' if weighted else 'plain'}"
                CASES.append(pytest.param(row, context, cut, weighted, marks=marks, id=name))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row, context, cut, weighted", CASES)
def test_values_and_gradients_are_those_of_one_device(row, context, cut, weighted):
    check(row, context, cut, weighted, reverse=weighted)
