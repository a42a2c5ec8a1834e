"""Batch Renormalization: its definition, its special cases, and the schedule of the paper."""

import chex
import jax
import numpy as np
import oracle
import pytest
from compiled import jit
from helpers import close, data

from jaxnorm import methods
from jaxnorm.schedules import batch_renorm_bounds

SHAPE, E = (6, 3, 4), 1e-3
METHOD = methods.batch_renorm(momentum=0.7, epsilon=E)
SETS = oracle.set_numbers(SHAPE, lambda n, p, c, *_: (c,))


def some_state():
    rng = np.random.default_rng(9)
    return {"mean": rng.normal(1, 1, 4), "std": rng.uniform(0.5, 4, 4)}


@jit
def differentiated(x, gy, state, rmax, dmax, scale, bias):
    def f(x, scale, bias):
        bounds = {"rmax": rmax, "dmax": dmax}
        return METHOD.apply(x, state, train=True, **bounds, scale=scale, bias=bias)

    y, pull, new = jax.vjp(f, x, scale, bias, has_aux=True)
    return y, new, pull(gy)


def corrections(x, state, rmax, dmax):
    std = np.sqrt(x.var((0, 1)) + E)
    return np.clip(std / state["std"], 1 / rmax, rmax), np.clip(
        (x.mean((0, 1)) - state["mean"]) / state["std"], -dmax, dmax
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rmax, dmax", [(1.0, 0.0), (1.2, 0.1), (3.0, 5.0), (1e6, 1e6)])
def test_definition(rmax, dmax):
    """y and its derivatives are those of x_hat r + d with constants r and d; the state averages
    standard deviations."""
    x, gy, scale, bias, state = (
        data(*SHAPE),
        data(*SHAPE, seed=1),
        data(*SHAPE, seed=2)[0, 0],
        data(*SHAPE, seed=3)[0, 0],
        some_state(),
    )
    y, new, (dx, dscale, dbias) = differentiated(x, gy, state, rmax, dmax, scale, bias)
    r, d = corrections(x, state, rmax, dmax)
    o = oracle.normalized(x, SETS, epsilon=E, scale=r * scale, gy=gy)
    x_hat = (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + E) * r + d
    close((y, dx), (x_hat * scale + bias, o.dx))
    close((dscale, dbias), ((gy * x_hat).sum((0, 1)), gy.sum((0, 1))))
    close(new["mean"], 0.7 * state["mean"] + 0.3 * x.mean((0, 1)))
    close(new["std"], 0.7 * state["std"] + 0.3 * np.sqrt(x.var((0, 1)) + E))
    if rmax == 1e6:  # inference with the state before this step
        close(
            METHOD.apply(x, state, train=False, scale=scale, bias=bias)[0],
            x_hat * scale + bias,
        )


@pytest.mark.usefixtures("x64")
def test_inference():
    x, state = data(*SHAPE), some_state()
    y, new = METHOD.apply(x, state, train=False)
    close(y, (x - state["mean"]) / state["std"])
    assert new is state


@pytest.mark.usefixtures("x64")
def test_running_deviation_is_never_below_epsilon():
    """A state of constant channels, or of zeros, does not divide by 0."""
    x, state = data(*SHAPE), {"mean": np.zeros(4), "std": np.zeros(4)}
    close(METHOD.apply(x, state, train=False)[0], x / np.sqrt(E))
    method = methods.batch_renorm(dmax=0.0, momentum=0.0, epsilon=E)
    constant, new = method.apply(np.full(SHAPE, 3.0), method.init(SHAPE), train=True)
    close((constant, new["std"]), (np.zeros(SHAPE), np.full(4, np.float32(np.sqrt(E)))))


def test_schedule():
    """Linear between its corners, and data: no second compilation."""

    @jit
    @chex.assert_max_traces(n=1)
    def step(x, state, count):
        rmax, dmax = batch_renorm_bounds(count)
        return METHOD.apply(x, state, train=True, rmax=rmax, dmax=dmax)[0], rmax, dmax

    corners = {
        0: (1, 0),
        5000: (1, 0),
        15000: (1 + 2 * 10 / 35, 2.5),
        25000: (1 + 2 * 20 / 35, 5),
        40000: (3, 5),
        10**6: (3, 5),
    }
    for count, bounds in corners.items():
        y, *got = step(data(*SHAPE).astype("f4"), METHOD.init(SHAPE), count)
        np.testing.assert_allclose(got, bounds, rtol=1e-6)
    np.testing.assert_allclose(y.mean((0, 1)), np.clip(data(*SHAPE).mean((0, 1)), -5, 5), rtol=1e-4)


@pytest.mark.parametrize("name, bound, least", [("rmax", 0.5, 1), ("dmax", -1.0, 0)])
def test_bounds_that_are_none_are_refused(name, bound, least):
    """Where known; traced ones are taken as the least that is a bound."""
    x, state = data(*SHAPE).astype("f4"), METHOD.init(SHAPE)
    for wrong in (bound, np.nan, np.full(4, 2.0)):
        for train in (True, False):
            with pytest.raises(
                (TypeError, ValueError), match=f"{name}.*(at least {least}|is None)"
            ):
                METHOD.apply(x, state, train=train, **{name: wrong})
    for wrong in (bound, None):
        with pytest.raises((TypeError, ValueError), match=f"{name}.*(at least {least}|is None)"):
            methods.batch_renorm(**{name: wrong})
    run = jit(lambda value: METHOD.apply(x, state, train=True, **{name: value})[0])
    np.testing.assert_array_equal(run(bound), run(float(least)))
    given = jit(lambda: methods.batch_renorm(**{name: 1.5}).apply(x, state, train=True)[0])
    default = methods.batch_renorm()
    np.testing.assert_allclose(
        given(), default.apply(x, state, train=True, **{name: 1.5})[0], rtol=1e-5, atol=1e-6
    )
