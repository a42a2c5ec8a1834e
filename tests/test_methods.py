"""Every row of the table, at every rank and in both layouts, against sums over its index sets."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from rows import CASES, LAYOUTS, PLACES, ROWS, SOME, C, N, shape_of

from jaxnorm import methods, norm

EPSILON = 1e-3


def draw(shape, channel_axis, statistic, seed=0, offset=0.0):
    """x, scale, bias, and cotangents of y, mean and var."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * rng.uniform(0.5, 2, size=shape[:1] + (1,) * (len(shape) - 1)) + offset
    c = shape[channel_axis]
    return x, rng.normal(size=c), rng.normal(size=c), *(rng.normal(size=s) for s in (shape, statistic, statistic))


@cache
def differentiated(method, channel_axis, epsilon=EPSILON):
    """Output, moments and all derivatives of `norm` as one compiled function."""

    def call(x, scale, bias, gy, gm, gv):
        def f(x, scale, bias):
            y, m = norm(x, method, scale=scale, bias=bias, epsilon=epsilon, channel_axis=channel_axis)
            return (y, m.mean, m.var), m.count

        (y, mean, var), pull, count = jax.vjp(f, x, scale, bias, has_aux=True)
        return {"y": y, "mean": mean, "var": var, "count": count}, pull((gy, gm, gv))

    return jax.jit(call)


def expected(row, x, scale, bias, gy, gm, gv, channel_axis):
    sets = oracle.set_numbers(x.shape, row.label, channel_axis)
    c = np.indices(x.shape)[channel_axis]
    gm, gv = (oracle.at_elements(t, x.shape) for t in (gm, gv))
    return oracle.normalized(x, sets, scale=scale[c], bias=bias[c], epsilon=EPSILON, mean=row.mean, gy=gy, gm=gm, gv=gv)


def check(row, rank, channel_axis, dtype, offset=0.0, tolerance=None, shape=None):
    """Values and derivatives of one case; `tolerance(terms)` is the error allowed in a sum of so many terms."""
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
        np.testing.assert_allclose(np.asarray(got, "f8"), want, rtol=0, atol=tolerance(terms) * size, err_msg=name)

    n = int(o.count.max())
    close(values["y"], o.y, n, "y")
    for name in ("count", "mean", "var"):
        assert values[name].shape == statistic, name
        close(jnp.asarray(oracle.at_elements(np.asarray(values[name]), shape)), getattr(o, name), n, name)
    close(grads[0], o.dx, n, "dx")
    close(grads[1], oracle.summed(o.dscale, channel_axis), o.y.size // C, "dscale")
    close(grads[2], oracle.summed(o.dbias, channel_axis), o.y.size // C, "dbias")


def in_float64(terms):
    return 1e-11


def in_float32(terms):
    """4 eps (sqrt(n) + |mu|/sigma), and what the guard lets pass: sums about 0 cost var 16 eps while mean^2 <= 16 var."""
    return float(np.finfo("f4").eps) * (4 * (np.sqrt(terms) + 4) + 16)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row, rank, channel_axis", SOME, ids=str)
def test_values_and_derivatives_in_float64(row, rank, channel_axis):
    check(row, rank, channel_axis, "f8", tolerance=in_float64)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
@pytest.mark.parametrize("row, rank, channel_axis", [case for case in CASES if case not in SOME], ids=str)
def test_values_and_derivatives_in_float64_elsewhere(row, rank, channel_axis):
    check(row, rank, channel_axis, "f8", tolerance=in_float64)


@pytest.mark.parametrize("row, channel_axis", [(row, LAYOUTS[i % 2]) for i, row in enumerate(ROWS)], ids=str)
def test_values_and_derivatives_in_float32(row, channel_axis):
    check(row, 4, channel_axis, "f4", tolerance=in_float32)


def other_platform(*args, cpu, default):
    """`lax.platform_dependent` on an accelerator."""
    return default(*args)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row", [row for row in ROWS if 4 in row.ranks and not row.name.endswith("size")], ids=str)
def test_the_program_of_accelerators_gives_the_same(row, monkeypatch):
    """What is written for other platforms, on the CPU; large enough, and of a shape of its own, to be cut and traced anew."""
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


@cache
def compiled(method):
    def call(x, gy, epsilon):
        y, pull, moment = jax.vjp(lambda x: norm(x, method, epsilon=epsilon), x, has_aux=True)
        return y, *pull(gy), moment

    return jax.jit(call)


def output_and_gradient(method, x, gy, epsilon=1e-5):
    """y and its VJP."""
    return compiled(method)(x, gy, epsilon)[:2]


def equal(ours, theirs, atol=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


m = methods
BGN = methods.batch_group_norm
BAG = methods.batch_and_group_norm
# (claim, two methods that are one, shape of x); every "equals" in the docstrings of methods.py
CLAIMS = [
    ("batch norm of one example is instance norm", m.batch_norm(), m.instance_norm(), (1, 4, 6, C)),
    ("batch norm is C batch groups", m.batch_norm(), BGN(C), (N, 4, 6, C)),
    ("batch norm is one ghost", m.batch_norm(), m.ghost_batch_norm(1), (N, 4, 6, C)),
    ("batch norm is a ghost of N", m.batch_norm(), m.ghost_batch_norm(ghost_size=N), (N, 4, 6, C)),
    ("N ghosts are instance norm", m.ghost_batch_norm(N), m.instance_norm(), (N, 4, 6, C)),
    ("ghosts of one are instance norm", m.ghost_batch_norm(ghost_size=1), m.instance_norm(), (N, 4, 6, C)),
    ("instance norm is C groups", m.instance_norm(), m.group_norm(C), (N, 4, 6, C)),
    ("one group is layer norm", m.group_norm(1), m.layer_norm(), (N, 4, 6, C)),
    ("group size is C / G", m.group_norm(3), m.group_norm(group_size=2), (N, 4, 6, C)),
    ("layer norm of vectors is that of tokens", m.layer_norm(), m.token_layer_norm(), (N, C)),
    ("positional norm is token layer norm", m.positional_norm(), m.token_layer_norm(), (N, 4, 6, C)),
    ("one batch group of one example is layer norm", BGN(1), m.layer_norm(), (1, 4, 6, C)),
    ("batch groups of one example are group norm", BGN(3), m.group_norm(3), (1, 4, 6, C)),
    ("C batch groups of one example are instance norm", BGN(C), m.instance_norm(), (1, 4, 6, C)),
    ("(B, G) = (N, C) is batch norm", BAG(ghost_size=N, num_groups=C), m.batch_norm(), (N, 4, 6, C)),
    ("(B, C) is ghost batch norm", BAG(2, C), m.ghost_batch_norm(2), (N, 4, 6, C)),
    ("(1, C) is instance norm", BAG(ghost_size=1, num_groups=C), m.instance_norm(), (N, 4, 6, C)),
    ("(1, G) is group norm", BAG(ghost_size=1, num_groups=3), m.group_norm(3), (N, 4, 6, C)),
    ("(1, 1) is layer norm", BAG(ghost_size=1, num_groups=1), m.layer_norm(), (N, 4, 6, C)),
    ("(N, G) is batch group norm", BAG(1, 3), BGN(3), (N, 4, 6, C)),
    ("D batch groups pool the batch alone", BGN(144, (N, 4, 6, C)), (1, 4, 6, C), (N, 4, 6, C)),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ours, theirs, shape", [claim[1:] for claim in CLAIMS], ids=[claim[0] for claim in CLAIMS])
def test_claimed_equivalences(ours, theirs, shape):
    equal(output_and_gradient(ours, *pair(shape)), output_and_gradient(theirs, *pair(shape)))


@pytest.mark.usefixtures("x64")
def test_ghost_batch_norm_is_batch_norm_of_each_part():
    x, gy = pair((N, 4, C))
    parts = [output_and_gradient(methods.batch_norm(), x[i : i + 2], gy[i : i + 2]) for i in (0, 2)]
    together = [jnp.concatenate(t) for t in zip(*parts, strict=True)]
    equal(output_and_gradient(methods.ghost_batch_norm(2), x, gy), together)


@pytest.mark.usefixtures("x64")
def test_token_layer_norm_is_layer_norm_of_all_positions():
    x, gy = pair((N, 4, 6, C))
    flat = output_and_gradient(methods.layer_norm(), x.reshape(-1, C), gy.reshape(-1, C))
    equal(output_and_gradient(methods.token_layer_norm(), x, gy), [t.reshape(x.shape) for t in flat])


@pytest.mark.usefixtures("x64")
def test_rms_norm_of_centered_channels_is_token_layer_norm():
    x, gy = pair((N, 4, C))

    @jax.jit
    def centered(x, gy):
        y, pull = jax.vjp(lambda x: norm(x - x.mean(-1, keepdims=True), methods.rms_norm())[0], x)
        return y, *pull(gy)

    equal(centered(x, gy), output_and_gradient(methods.token_layer_norm(), x, gy))


@pytest.mark.usefixtures("x64")
def test_batch_group_norm_of_any_number_is_the_flat_definition():
    """Channel, row, column flattened and cut into G pieces, by the reshape that the paper's implementations do."""
    shape = (N, 4, 6, C)
    x, gy = pair(shape)
    for parts in (2, 8, 12):

        @jax.jit
        def flat(x, gy, groups=parts * C):
            def f(x):
                t = jnp.moveaxis(x, -1, 1).reshape(N, groups, -1)
                d = t - t.mean((0, 2), keepdims=True)
                y = d / jnp.sqrt((d**2).mean((0, 2), keepdims=True) + 1e-5)
                return jnp.moveaxis(y.reshape(N, C, 4, 6), 1, -1)

            y, pull = jax.vjp(f, x)
            return y, *pull(gy)

        equal(output_and_gradient(methods.batch_group_norm(parts * C, shape), x, gy), flat(x, gy))


@pytest.mark.usefixtures("x64")
def test_instance_norm_of_one_position_returns_the_bias():
    x, _ = pair((N, 1, 1, C))
    y, _ = norm(x, methods.instance_norm(), scale=jnp.full(C, 7.0), bias=jnp.arange(6.0))
    assert (y == jnp.broadcast_to(jnp.arange(6.0), y.shape)).all()


@pytest.mark.usefixtures("x64")
def test_positional_norm_is_undone_by_its_moments():
    """The moment shortcut of the paper: y sigma + mu is x."""
    x, _ = pair((N, 4, 6, C))
    y, moment = norm(x, methods.positional_norm(), epsilon=0.0)
    np.testing.assert_allclose(y * jnp.sqrt(moment.var) + moment.mean, x, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_epsilon_has_the_unit_of_x_squared():
    """f(a x, a^2 epsilon) = f(x, epsilon) for every row: epsilon is inside the root."""
    for row in ROWS:
        x, gy = pair(shape_of(max(row.ranks), -1))  # as below, so that one compilation serves three tests
        method = row.call(x.shape, -1)
        y, dx = output_and_gradient(method, x, gy, 0.1)
        equal(output_and_gradient(method, 3 * x, gy, 0.9), (y, dx / 3))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_output_moments_shift_and_bounds(row):
    """On each set y has mean 0 and variance v / (v + epsilon), ignores a shift of the set, and |y| <= sqrt(n - 1)."""
    shape = shape_of(max(row.ranks), -1)
    method = row.call(shape, -1)
    sets = oracle.set_numbers(shape, row.label)
    shift = np.random.default_rng(1).normal(size=sets.max() + 1)[sets]
    x, gy = pair(shape)
    y, dx, before = compiled(method)(x, gy, 1e-5)
    shifted = compiled(method)(x + shift, gy, 1e-5)[0]
    out = compiled(method)(y, gy, 1e-5)[2]
    np.testing.assert_allclose(out.var, before.var / (before.var + 1e-5), atol=1e-12)
    if row.mean == 0:
        assert np.abs(shifted - y).max() > 0.1
        return
    np.testing.assert_allclose(out.mean, 0, atol=1e-12)
    np.testing.assert_allclose(shifted, y, atol=1e-12)
    assert (np.abs(y) <= np.sqrt(before.count.max() - 1)).all()
    np.testing.assert_allclose(np.bincount(sets.ravel(), np.ravel(dx)), 0, atol=1e-11)  # a shift changes nothing


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_examples_meet_only_in_shared_sets(row):
    """Changing one example changes exactly the sets it is in."""
    shape = shape_of(max(row.ranks), -1)
    method = row.call(shape, -1)
    sets = oracle.set_numbers(shape, row.label)
    x, gy = pair(shape)
    touched = np.isin(sets, sets[0])
    changed = output_and_gradient(method, x.at[0].multiply(3.0), gy)[0] != output_and_gradient(method, x, gy)[0]
    assert not changed[~touched].any()
    assert changed[touched].mean() > 0.9
    assert method.pools_batch == touched[1:].any() or row.name.endswith("size")


@pytest.mark.usefixtures("x64")
def test_standardized_kernel():
    rng = np.random.default_rng(0)
    kernel, gy = rng.normal(size=(3, 3, 2, 4)), rng.normal(size=(3, 3, 2, 4))
    sets = oracle.set_numbers(kernel.shape, lambda h, p, o, *_: (o,))
    o = oracle.normalized(kernel, sets, epsilon=1e-6, gy=gy)

    @jax.jit
    def run(kernel, gy):
        y, pull = jax.vjp(methods.standardize_kernel, kernel)
        return y, *pull(gy)

    equal(run(kernel, gy), (o.y, o.dx), atol=1e-11)
    a, b = rng.uniform(0.5, 2, size=(2, 1, 1, 1, 4))
    exact = jax.jit(lambda w: methods.standardize_kernel(w, epsilon=0.0))
    np.testing.assert_allclose(exact(a * kernel + b), exact(kernel), atol=1e-12)  # invariant to a W + b
    np.testing.assert_allclose(exact(exact(kernel)), exact(kernel), atol=1e-12)  # idempotent


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (1, 8), (8,), (0, 8), (3, 3, 4, 0)])
def test_kernels_of_one_weight_an_output_are_refused(shape):
    with pytest.raises(ValueError, match=r"weights? for each output channel.*two or more weights an output"):
        methods.standardize_kernel(jnp.ones(shape))


@pytest.mark.usefixtures("x64")
def test_ranks_and_layouts_of_the_table_are_covered():
    """The representative part meets every row, and every rank and layout."""
    assert {case[0] for case in SOME} == set(ROWS)
    assert {(case[1], case[2]) for case in SOME} == {(r, a) for r in PLACES for a in LAYOUTS if r > 2 or a == -1}
