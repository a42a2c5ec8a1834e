"""Every row of the table, and some of one's own, at every rank and in both layouts, against sums
over their index sets."""

import inspect
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from rows import CASES, LAYOUTS, PLACES, ROWS, SOME, C, N, shape_of

from jaxnorm import kernels, methods, norm

EPSILON = 1e-3


def draw(shape, channel_axis, statistic, seed=0, offset=0.0):
    """x, scale, bias, and cotangents of y, mean and var."""
    rng = np.random.default_rng(seed)
    x = (
        rng.normal(size=shape) * rng.uniform(0.5, 2, size=shape[:1] + (1,) * (len(shape) - 1))
        + offset
    )
    c = shape[channel_axis]
    return (
        x,
        rng.normal(size=c),
        rng.normal(size=c),
        *(rng.normal(size=s) for s in (shape, statistic, statistic)),
    )


@cache
def differentiated(method, channel_axis, epsilon=EPSILON):
    """Output, moments and all derivatives of `norm` as one compiled function."""

    def call(x, scale, bias, gy, gm, gv):
        def f(x, scale, bias):
            y, m = norm(
                x, method, scale=scale, bias=bias, epsilon=epsilon, channel_axis=channel_axis
            )
            return (y, m.mean, m.var), m.count

        (y, mean, var), pull, count = jax.vjp(f, x, scale, bias, has_aux=True)
        return {"y": y, "mean": mean, "var": var, "count": count}, pull((gy, gm, gv))

    return jax.jit(call)


def expected(row, x, scale, bias, gy, gm, gv, channel_axis):
    sets = oracle.set_numbers(x.shape, row.label, channel_axis)
    c = np.indices(x.shape)[channel_axis]
    gm, gv = (oracle.at_elements(t, x.shape) for t in (gm, gv))
    return oracle.normalized(
        x, sets, scale=scale[c], bias=bias[c], epsilon=EPSILON, mean=row.mean, gy=gy, gm=gm, gv=gv
    )


def check(row, rank, channel_axis, dtype, offset=0.0, tolerance=None, shape=None):
    """Values and derivatives of one case; `tolerance(terms)` is the error allowed in a sum of so
    many terms."""
    shape = shape or shape_of(rank, channel_axis)
    method = row.call(shape, channel_axis)
    statistic = oracle.statistic_shape(oracle.set_numbers(shape, row.label, channel_axis))
    arrays = [t.astype(dtype) for t in draw(shape, channel_axis, statistic, offset=offset)]
    values, grads = differentiated(method, channel_axis)(*(jnp.asarray(t) for t in arrays))
    o = expected(row, *(t.astype("f8") for t in arrays), channel_axis)

    def close(got, want, terms, name):
        assert got.dtype == dtype, name
        want = np.asarray(want, "f8")
        size = max(np.abs(want).max(), 1.0)
        np.testing.assert_allclose(
            np.asarray(got, "f8"), want, rtol=0, atol=tolerance(terms) * size, err_msg=name
        )

    n = int(o.count.max())
    close(values["y"], o.y, n, "y")
    for name in ("count", "mean", "var"):
        assert values[name].shape == statistic, name
        close(
            jnp.asarray(oracle.at_elements(np.asarray(values[name]), shape)),
            getattr(o, name),
            n,
            name,
        )
    close(grads[0], o.dx, n, "dx")
    close(grads[1], oracle.summed(o.dscale, channel_axis), o.y.size // C, "dscale")
    close(grads[2], oracle.summed(o.dbias, channel_axis), o.y.size // C, "dbias")


def in_float64(terms):
    return 1e-11


def in_float32(terms):
    """4 eps (sqrt(n) + |mu|/sigma), and what the guard lets pass: sums about 0 cost var 16 eps
    while mean^2 <= 16 var."""
    return float(np.finfo("f4").eps) * (4 * (np.sqrt(terms) + 4) + 16)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row, rank, channel_axis", SOME, ids=str)
def test_values_and_derivatives_in_float64(row, rank, channel_axis):
    check(row, rank, channel_axis, "f8", tolerance=in_float64)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
@pytest.mark.parametrize(
    "row, rank, channel_axis", [case for case in CASES if case not in SOME], ids=str
)
def test_values_and_derivatives_in_float64_elsewhere(row, rank, channel_axis):
    check(row, rank, channel_axis, "f8", tolerance=in_float64)


@pytest.mark.parametrize(
    "row, channel_axis", [(row, LAYOUTS[i % 2]) for i, row in enumerate(ROWS)], ids=str
)
def test_values_and_derivatives_in_float32(row, channel_axis):
    check(row, 4, channel_axis, "f4", tolerance=in_float32)


def other_platform(*args, cpu, default):
    """`lax.platform_dependent` on an accelerator."""
    return default(*args)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "row", [row for row in ROWS if 4 in row.ranks and not row.name.endswith("size")], ids=str
)
def test_the_program_of_accelerators_gives_the_same(row, monkeypatch):
    """What is written for other platforms, on the CPU; large enough, and of a shape of its own, to
    be cut and traced anew."""
    monkeypatch.setattr(jax.lax, "platform_dependent", other_platform)
    check(row, 4, -1, "f8", tolerance=in_float64, shape=(4, 16, 12, 6))


@pytest.mark.slow
@pytest.mark.parametrize("offset", (0.0, 3.0))
@pytest.mark.parametrize("row, rank, channel_axis", CASES, ids=str)
def test_values_and_derivatives_in_float32_everywhere(row, rank, channel_axis, offset):
    check(row, rank, channel_axis, "f4", offset=offset, tolerance=in_float32)


def pair(shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=shape))


def equal(ours, theirs, atol=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.usefixtures("x64")
def test_instance_norm_of_one_position_returns_the_bias():
    x, _ = pair((N, 1, 1, C))
    y, _ = norm(x, methods.instance_norm(), scale=jnp.full(C, 7.0), bias=jnp.arange(6.0))
    assert (y == jnp.broadcast_to(jnp.arange(6.0), y.shape)).all()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_methods_know_whether_they_pool_the_batch(row):
    shape = shape_of(max(row.ranks), -1)
    sets = oracle.set_numbers(shape, row.label)
    pools_batch = row.call(shape, -1).row(shape).pools_batch
    assert pools_batch == np.isin(sets[1:], sets[0]).any() or row.name.endswith("size")


def test_every_row_of_the_table_has_a_label():
    """A method without a label of its sets is not tested."""
    returning = {
        name
        for name, f in vars(methods).items()
        if inspect.isfunction(f) and inspect.signature(f).return_annotation is methods.Row
    }
    assert returning | {"batch_group_norm", "Row"} == {row.method_name for row in ROWS}
    for row in ROWS:
        assert f"{row.method_name}(" in inspect.getsource(row.call)


@pytest.mark.usefixtures("x64")
def test_standardized_kernel():
    rng = np.random.default_rng(0)
    kernel, gy = rng.normal(size=(3, 3, 2, 4)), rng.normal(size=(3, 3, 2, 4))
    sets = oracle.set_numbers(kernel.shape, lambda h, p, o, *_: (o,))
    o = oracle.normalized(kernel, sets, epsilon=1e-6, gy=gy)

    @jax.jit
    def run(kernel, gy):
        y, pull = jax.vjp(kernels.standardize_kernel, kernel)
        return y, *pull(gy)

    equal(run(kernel, gy), (o.y, o.dx), atol=1e-11)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (1, 8), (8,), (0, 8), (3, 3, 4, 0)])
def test_kernels_of_one_weight_an_output_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"weights? for each output channel.*two or more weights an output"
    ):
        kernels.standardize_kernel(jnp.ones(shape))


@pytest.mark.usefixtures("x64")
def test_ranks_and_layouts_of_the_table_are_covered():
    """The representative part meets every row, and every rank and layout."""
    assert {case[0] for case in SOME} == set(ROWS)
    assert {(case[1], case[2]) for case in SOME} == {
        (r, a) for r in PLACES for a in LAYOUTS if r > 2 or a == -1
    }
