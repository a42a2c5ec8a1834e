"""The way back: the inverse of `normalize`, in values and in all derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compiled import jit
from contexts import CONTEXTS
from helpers import data

from jaxnorm import Moments, denormalize, methods, moments, norm, normalize

SHAPE = (4, 3, 5, 6)
STATISTICS = [(1, 1, 1, 6), (4, 1, 1, 3), (2, 1, 5, 3), (4, 3, 5, 1)]
AFFINES = [(None, None), ((6,), (6,)), ((4, 6), None), (SHAPE, (1, 3, 1, 6)), (None, SHAPE)]


def arguments(statistic, affine, seed=0, dtype="f8"):
    """y, moments, scale and bias."""
    rng = np.random.default_rng(seed)
    m = Moments(None, data(*statistic, seed=seed, dtype=dtype), rng.uniform(0.5, 2, statistic))
    m = jax.tree.map(lambda t: t.astype(dtype), m)
    scale, bias = affine
    scale = None if scale is None else rng.uniform(0.5, 2, scale).astype(dtype)
    return (
        data(*SHAPE, seed=seed + 1, dtype=dtype),
        m,
        scale,
        None if bias is None else data(*bias, seed=seed + 2, dtype=dtype),
    )


def back(y, m, scale, bias, **options):
    return denormalize(y, m, scale=scale, bias=bias, epsilon=1e-3, **options)


def there(x, m, scale, bias, **options):
    return normalize(x, m, scale=scale, bias=bias, epsilon=1e-3, **options)


def at(t, default):
    """A scale or bias for each element."""
    if t is None:
        return np.full(SHAPE, default)
    return np.broadcast_to(t[:, None, None, :] if t.shape == (4, 6) else t, SHAPE)


def summed_like(t, full):
    """The derivative of t, which was repeated for each element."""
    if t is None:
        return None
    if t.shape == (4, 6):
        return full.sum((1, 2))
    full = full.sum(tuple(range(4 - t.ndim)))
    return full.sum(tuple(i for i, n in enumerate(t.shape) if n == 1), keepdims=True)


def in_blocks(statistic, full):
    """The sum over the elements of each set."""
    total = np.zeros(statistic)
    pairs = zip(np.indices(SHAPE), statistic, SHAPE, strict=True)
    np.add.at(total, tuple(i * g // n for i, g, n in pairs), full)
    return total


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("statistic", STATISTICS, ids=str)
def test_values_and_gradients(statistic):
    """With z = (y - bias) / scale and s^2 = var + epsilon: x = z s + mean."""
    gx = data(*SHAPE, seed=7)

    @jit
    def run(given):
        results = []
        for args in given:
            x, pull = jax.vjp(back, *args)
            results.append((x, pull(gx)))
        return results

    given = [arguments(statistic, affine) for affine in AFFINES]
    for args, (x, (dy, dm, dscale, dbias)) in zip(given, run(given), strict=True):
        y, m, scale, bias = args
        mean, var = (oracle.at_elements(t, SHAPE) for t in (m.mean, m.var))
        g, b, s = at(scale, 1.0), at(bias, 0.0), np.sqrt(var + 1e-3)
        z = (y - b) / g
        close = partial(np.testing.assert_allclose, atol=1e-10)
        close(x, z * s + mean)
        close(dy, gx * s / g)
        close(dm.mean, in_blocks(statistic, gx))
        close(dm.var, in_blocks(statistic, gx * z / (2 * s)))
        for got, wanted in (
            (dscale, summed_like(scale, -gx * z * s / g)),
            (dbias, summed_like(bias, -gx * s / g)),
        ):
            assert (got is None) == (wanted is None)
            if wanted is not None:
                close(got, wanted)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("first, second", [(there, back), (back, there)], ids=["x", "y"])
def test_one_undoes_the_other(first, second):
    """The derivative of both is 1 by their argument and 0 by everything else; so is the second."""

    def both(t, *given):
        return second(first(t, *given), *given)

    @jit
    def run(given, gy):
        results = []
        for args in given:
            t, pull = jax.vjp(both, *args)
            one = jax.jvp(lambda t, *rest: jnp.sin(both(t, *rest)).sum(), args, args)
            results.append((t, pull(gy), one))
        return results

    gy = data(*SHAPE, seed=9)
    given = [arguments(s, a) for s, a in zip(STATISTICS, AFFINES[1:], strict=True)]
    for args, (t, grads, (value, along)) in zip(given, run(given, gy), strict=True):
        np.testing.assert_allclose(t, args[0], atol=1e-12)
        np.testing.assert_allclose(grads[0], gy, atol=1e-12)
        for rest in jax.tree.leaves(grads[1:]):
            np.testing.assert_allclose(rest, 0, atol=1e-10)
        np.testing.assert_allclose(value, np.sin(args[0]).sum(), atol=1e-10)
        np.testing.assert_allclose(along, (np.cos(args[0]) * args[0]).sum(), atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_transformations():
    """Second derivatives, vmap and jacobians, against plain autodiff of the formula."""

    def plain(y, m, scale, bias):
        return (y - bias) / scale * jnp.sqrt(m.var + 1e-3) + m.mean

    args = arguments((1, 1, 1, 6), ((1, 1, 1, 6), SHAPE))
    tangents = arguments((1, 1, 1, 6), ((1, 1, 1, 6), SHAPE), seed=5)

    @partial(jit, static_argnums=0)
    def run(f, args, tangents):
        gradient = jax.grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1, 2, 3))
        stacked = jax.tree.map(lambda s, t: jnp.stack([s, t]), args, tangents)
        return (
            jax.jvp(f, args, tangents),
            jax.jvp(gradient, args, tangents),
            jax.vmap(gradient)(*stacked),
            jax.vmap(f, (None, 0, None, None))(args[0], stacked[1], *args[2:]),
            jax.jacfwd(f, 2)(*args),
        )

    for a, b in zip(*(jax.tree.leaves(run(f, args, tangents)) for f in (back, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mean, std", [(0, 1), (1e4, 1), (1, 1e-4), (-1e4, 1e4), (0, 1e-12)])
@pytest.mark.parametrize("affine", [(None, None), ((6,), (6,))], ids=["", "affine"])
def test_round_trip_in_float32(mean, std, affine):
    """To a few units of the last digit of the largest numbers on the way."""
    _, _, scale, bias = arguments((1, 1, 1, 6), affine, dtype="f4")
    x = (mean + std * np.random.default_rng(0).normal(size=SHAPE)).astype("f4")

    @jit
    def run(x):
        y, m = norm(x, methods.batch_norm(), scale=scale, bias=bias, epsilon=0.0)
        return denormalize(y, m, scale=scale, bias=bias, epsilon=0.0), y

    z, y = run(x)
    of_y = 0 if bias is None else np.abs(y).max() * std / scale.min()
    bound = 3 * np.finfo("f4").eps * (np.abs(x).max() + of_y)
    assert np.abs(z - x).max() <= bound


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    """x is rounded once, and y in units of the standard deviation; a wider y is not."""
    x = jnp.asarray(data(*SHAPE)).astype(dtype)
    m = jit(lambda x: moments(x, methods.instance_norm()))(x)
    half = float(jnp.finfo(dtype).eps) / 2

    @partial(jit, static_argnums=1)
    def run(x, wide):
        y = normalize(x, m, dtype=wide)
        z, pull = jax.vjp(partial(denormalize, dtype=x.dtype), y, m)
        return y, z, pull(jnp.ones_like(z))

    for wide in (dtype, "float32"):
        y, z, (dy, dm) = run(x, wide)
        assert y.dtype == dy.dtype == wide and z.dtype == dtype
        assert dm.mean.dtype == dm.var.dtype == jnp.float32
        rounded = half * np.abs(np.asarray(y, "f4")) * np.sqrt(m.var) if wide == dtype else 0
        bound = (half * np.abs(np.asarray(x, "f4")) + rounded) * 1.01 + 1e-5
        assert (np.abs(np.asarray(z, "f4") - np.asarray(x, "f4")) <= bound).all()


@pytest.mark.parametrize("epsilon", [1e-5, 0.0])
def test_sets_without_variance_or_elements(epsilon):
    """They come back, with finite gradients: epsilon stands in for the variance. Without one they
    are their means."""
    x = jnp.asarray([[3.0, 1.0, 5.0], [3.0, 2.0, 7.0]])
    mask = jnp.asarray([[True, True, False]])
    m = moments(x, (1, 3), weights=mask)
    assert m.count.tolist() == [[2, 2, 0]] and m.var.tolist() == [[0, 0.25, 0]]

    def both(x, m):
        return denormalize(normalize(x, m, epsilon=1e-5), m, epsilon=epsilon)

    z, pull = jax.vjp(both, x, m)
    if epsilon:
        np.testing.assert_allclose(z, x, rtol=1e-6)
        np.testing.assert_allclose(pull(jnp.ones_like(z))[0], 1, rtol=1e-6)
        assert all(np.isfinite(t).all() for t in jax.tree.leaves(pull(jnp.ones_like(z))))
    else:
        np.testing.assert_allclose(z[:, [0, 2]], [[3, 0], [3, 0]])


def test_what_does_not_count():
    """Where y is not finite under a zero weight, x is the mean and the gradient 0."""
    y = jnp.asarray([[1.0, jnp.nan], [jnp.inf, 2.0]])
    m = Moments(jnp.ones((1, 1)), jnp.full((1, 1), 3.0), jnp.ones((1, 1)))
    mask = jnp.isfinite(y)
    x, pull = jax.vjp(lambda y, m: denormalize(y, m, weights=mask, epsilon=0.0), y, m)
    np.testing.assert_allclose(x, [[4, 3], [3, 5]])
    dy, dm = pull(jnp.ones_like(x))
    np.testing.assert_allclose(dy, [[1, 0], [0, 1]])
    np.testing.assert_allclose((dm.mean, dm.var), [[[4]], [[1.5]]])


def test_other_numbers():
    """Complex ones, a mean that is fixed at 0, and channels first."""
    x = data(4, 6, 3, dtype="f4") + 1j * data(4, 6, 3, seed=1, dtype="f4")
    for t, row, options in (
        (x, methods.batch_norm(), {}),
        (x.real, methods.instance_rms_norm(), {"centered": False}),
        (x.real, methods.group_norm(3), {"channel_axis": 1}),
    ):
        given = {"scale": np.arange(1, t.shape[options.get("channel_axis", -1)] + 1.0, dtype="f4")}
        axes = {k: v for k, v in options.items() if k == "channel_axis"}
        y, m = norm(t, row, **given, **axes)
        z = denormalize(y, m, epsilon=row.epsilon, **given, **options)
        assert z.dtype == t.dtype
        np.testing.assert_allclose(z, t, rtol=1e-5, atol=1e-5)


def test_a_forecast_of_another_length():
    m = moments(data(4, 10, 6, dtype="f4"), (4, 1, 6))
    assert denormalize(jnp.zeros((4, 25, 6)), m).shape == (4, 25, 6)


CASES = [
    pytest.param(context, cut, id=f"{context}-{cut}")
    for context in CONTEXTS
    for cut in (("NH",) if context.named else ("N", "NC"))
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("context, cut", CASES)
def test_every_context(context, cut):
    """With statistics of all devices, there and back again."""
    shape = (16, 8, 3, 6)
    x, gy, bias = (data(*shape, seed=i) for i in range(3))
    options = {"axis_name": ("i", "j")[: len(cut)]} if context.named else {}

    def run(x, bias, gy):
        m = moments(x, methods.batch_norm(), **options)

        def both(x, bias, m):
            return denormalize(normalize(x, m, bias=bias), m, bias=bias)

        z, pull = jax.vjp(both, x, bias, m)
        return z, *pull(gy)[:2]

    z, dx, dbias = context.run(run, cut)(x, bias, gy)
    np.testing.assert_allclose(z, x, atol=1e-12)
    np.testing.assert_allclose(dx, gy, atol=1e-12)
    np.testing.assert_allclose(dbias, 0, atol=1e-12)
