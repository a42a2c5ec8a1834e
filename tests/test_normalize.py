"""Applying statistics: dtypes, scale and bias of every shape, activation, and what is kept for the
backward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import data

from jaxnorm import (
    EACH,
    Groups,
    Moments,
    init_running,
    methods,
    moments,
    norm,
    normalize,
    running_moments,
)

SHAPE = (4, 3, 5, 6)
SETS = oracle.set_numbers(SHAPE, lambda n, p, c, N, P, C: (n, c * 3 // C))


def normal(shape=SHAPE, seed=0, dtype="f8"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("x_dtype", ("bfloat16", "float16", "float32"))
@pytest.mark.parametrize("dtype", (None, "bfloat16", "float32"))
def test_dtype_of_y(x_dtype, dtype):
    """x's, or the one that is asked for, with no detour through a narrower one."""
    x = jnp.asarray(normal()).astype(x_dtype)
    f = jax.jit(lambda x: norm(x, methods.group_norm(3), dtype=dtype)[0])
    y = f(x)
    assert y.dtype == (dtype or x_dtype)
    o = oracle.normalized(np.asarray(x, "f8"), SETS)
    half = float(jnp.finfo(y.dtype).eps) / 2 * np.abs(o.y).max()
    np.testing.assert_allclose(np.asarray(y, "f8"), o.y, rtol=0, atol=half + 1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("x_dtype, other", [("f4", "f8"), ("f8", "f4")])
def test_scale_bias_and_moments_of_another_precision(x_dtype, other):
    """y keeps x's dtype, and every derivative that of its argument."""
    x, scale = normal(dtype=x_dtype), normal((6,), 1, other)
    m = moments(normal(dtype=other), methods.batch_norm())
    y, pull = jax.vjp(
        jax.jit(lambda *args: normalize(args[0], args[1], scale=args[2], bias=args[3])),
        x,
        m,
        scale,
        scale,
    )
    assert y.dtype == x_dtype
    assert [t.dtype for t in jax.tree.leaves(pull(y))] == [
        x_dtype,
        other,
        other,
        other,
        other,
        other,
    ]


# which axes of x the scale has, channel_axis, and its shape
SCALES = [
    ((3,), -1, (6,)),
    ((0, 3), -1, (4, 6)),
    ((1,), 1, (3,)),
    ((0, 1), 1, (4, 3)),
    ((2, 3), (2, 3), (5, 6)),
    ((2, 3), (-1, 2), (5, 6)),
    ((1, 3), (1, -1), (3, 6)),
    ((0, 1, 3), (1, 3), (4, 3, 6)),
    ((1, 2, 3), (1, 2, 3), (3, 5, 6)),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("axes, channel_axis, shape", SCALES, ids=str)
def test_scale_and_bias_of_every_shape(axes, channel_axis, shape):
    """One per feature, one per example and feature, and several feature axes."""
    x, gy, scale, bias = normal(), normal(seed=1), normal(shape, 2), normal(shape, 3)
    f = jax.jit(
        lambda x, s, b: norm(x, (4, 1, 1, 3), scale=s, bias=b, channel_axis=channel_axis)[0]
    )
    y, pull = jax.vjp(f, x, scale, bias)
    index = np.indices(SHAPE)
    at = tuple(index[i] for i in axes)
    o = oracle.normalized(x, SETS, scale=scale[at], bias=bias[at], gy=gy)
    np.testing.assert_allclose(y, o.y, atol=1e-12)
    for got, want in zip(
        pull(gy), (o.dx, oracle.summed(o.dscale, *axes), oracle.summed(o.dbias, *axes)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-11)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "batch_axis, channel_axis, order",
    [(1, -1, (1, 0, 2, 3)), (3, 0, (3, 1, 2, 0)), (2, 1, (1, 3, 0, 2))],
)
def test_batch_axis_anywhere(batch_axis, channel_axis, order):
    """Transposing x and naming its axes is transposing y."""
    x, scale = normal(), normal((4, 6), 2)
    y, m = norm(x, methods.group_norm(3), scale=scale)
    z, n = norm(
        x.transpose(order),
        methods.group_norm(3),
        scale=scale,
        batch_axis=batch_axis,
        channel_axis=channel_axis,
    )
    np.testing.assert_allclose(z, y.transpose(order), atol=1e-12)
    np.testing.assert_allclose(n.var, m.var.transpose(order), atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_moments_may_be_anything_that_divides_x():
    """Values and gradients with given moments: dmean = -sum g / s, dvar = -sum g d / 2 s^3 over the
    block."""
    for stat in ((1, 1, 1, 6), (4, 3, 1, 2), (2, 1, 5, 3), (1, 1, 1, 1)):
        x, gy, scale = normal(), normal(seed=1), normal((6,), 2)
        m = Moments(None, normal(stat, 3), normal(stat, 4) ** 2)
        y, pull = jax.vjp(
            jax.jit(lambda x, m, s: normalize(x, m, scale=s, epsilon=1e-3)), x, m, scale
        )
        dx, dm, dscale = pull(gy)
        mean, var = (oracle.at_elements(t, SHAPE) for t in (m.mean, m.var))
        s, d = np.sqrt(var + 1e-3), x - mean
        np.testing.assert_allclose(y, d / s * scale, atol=1e-11)
        np.testing.assert_allclose(dx, gy * scale / s, atol=1e-11)
        np.testing.assert_allclose(dscale, (gy * d / s).sum((0, 1, 2)), atol=1e-9)
        wanted = [np.zeros(stat), np.zeros(stat)]
        index = tuple(i * g // n for i, g, n in zip(np.indices(SHAPE), stat, SHAPE, strict=True))
        for total, term in zip(wanted, (-gy * scale / s, -gy * scale * d / s**3 / 2), strict=True):
            np.add.at(total, index, term)
        np.testing.assert_allclose(dm.mean, wanted[0], atol=1e-9)
        np.testing.assert_allclose(dm.var, wanted[1], rtol=1e-9, atol=1e-9)


def test_running_moments_serve_any_batch():
    state = init_running((6,))
    for n in (1, 4, 7):
        x = jnp.ones((n, 3, 5, 6))
        y = normalize(x, running_moments(state, methods.ghost_batch_norm(4), x.shape), epsilon=0.0)
        assert (y == 1).all()


@pytest.mark.usefixtures("x64")
def test_activation_is_that_of_y():
    x, gy, scale, bias = normal(), normal(seed=1), normal((6,), 2), normal((6,), 3)

    @partial(jax.jit, static_argnums=0)
    def f(inside, x, scale, bias):
        def g(x, scale, bias):
            y = norm(
                x, (4, 1, 1, 3), scale=scale, bias=bias, activation=jax.nn.silu if inside else None
            )[0]
            return y if inside else jax.nn.silu(y)

        y, pull = jax.vjp(g, x, scale, bias)
        return y, pull(gy)

    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-12),
        f(True, x, scale, bias),
        f(False, x, scale, bias),
    )


@pytest.mark.usefixtures("x64")
def test_second_derivatives_through_the_activation():
    x, v = normal(), normal(seed=1)

    @partial(jax.jit, static_argnums=0)
    def hvp(inside, x):
        def f(x):
            y = norm(x, (4, 1, 1, 3), activation=jnp.tanh if inside else None)[0]
            return (v * (y if inside else jnp.tanh(y))).sum()

        return jax.jvp(jax.grad(f), (x,), (v,))[1]

    np.testing.assert_allclose(hvp(True, x), hvp(False, x), atol=1e-11)


BIG = (16, 8, 8, 32)


@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
@pytest.mark.parametrize("extra", ("plain", "activation", "weights", "adaptive", "center"))
@pytest.mark.parametrize(
    "method",
    (
        methods.batch_norm(),
        methods.group_norm(4),
        methods.rms_norm(),
        methods.batch_and_group_norm(4, 8),
    ),
    ids=str,
)
def test_backward_keeps_x_and_small_arrays(method, extra, dtype):
    """The residuals of the VJP are x once, in its dtype, and vectors; also with an activation."""
    x = jax.ShapeDtypeStruct(BIG, dtype)
    options = {
        "plain": {},
        "activation": {"activation": jax.nn.silu},
        "weights": {"weights": jnp.ones((16, 1, 1, 1))},
        "adaptive": {"scale": jnp.ones((16, 32)), "bias": jnp.ones((16, 32))},
        "center": {"center": jnp.zeros(method.groups.shape(BIG))},
    }[extra]
    options = {"scale": jnp.ones(32), "bias": jnp.ones(32)} | options

    def residuals(x):
        small = {k: options.pop(k) for k in ("scale", "bias")}
        return jax.vjp(
            lambda x, scale, bias: norm(x, method, scale=scale, bias=bias, **options)[0],
            x,
            *small.values(),
        )[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, x))
    full = [t for t in kept if t.size >= np.prod(BIG) // 2]
    assert [t.dtype for t in full] == [dtype]
    small = sum(t.size * t.dtype.itemsize for t in kept) - full[0].size * full[0].dtype.itemsize
    # token statistics are a 32nd of x; a few vectors of them, and of the channels of each example,
    # are no second x
    statistic = np.prod(method.groups.shape(BIG))
    assert small <= 4 * (8 * statistic + 16 * 32 * 4)


def test_backward_keeps_no_half_size_arrays_either():
    """As above in total bytes, for a network of five layers compiled as one."""

    def net(x):
        for _ in range(5):
            x = norm(x, methods.group_norm(4), activation=jnp.tanh)[0]
        return x

    kept = jax.tree.leaves(
        jax.eval_shape(lambda x: jax.vjp(net, x)[1], jax.ShapeDtypeStruct(BIG, "bfloat16"))
    )
    assert sum(t.size * t.dtype.itemsize for t in kept) <= 5.5 * np.prod(BIG) * 2


@pytest.mark.usefixtures("x64")
def test_given_moments_and_weights():
    """Under a zero weight NaN gives the bias; where it counts NaN shows."""
    x, w = normal(), np.ones(SHAPE)
    x[0, 0, 0, 0], x[1, 0, 0, 0], w[0, 0, 0, 0] = np.nan, np.nan, 0
    m = Moments(jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1)))
    y, pull = jax.vjp(lambda x, m: normalize(x, m, weights=w, bias=jnp.full(6, 3.0)), x, m)
    assert y[0, 0, 0, 0] == 3 and np.isnan(y[1, 0, 0, 0]) and np.isfinite(y).sum() == y.size - 1
    assert pull(jnp.ones_like(y))[0][0, 0, 0, 0] == 0


def test_groups_of_the_core_may_be_a_shape_a_groups_or_a_method():
    x = jnp.asarray(normal(dtype="f4"))
    f = jax.jit(norm, static_argnums=1)
    results = [f(x, g)[0] for g in ((4, 1, 1, 3), Groups(EACH, 1, 3), methods.group_norm(3))]
    assert all((y == results[0]).all() for y in results)


SLOPES = np.linspace(0.5, 1, 18, dtype="f4").reshape(1, 1, 3, 6)
KERNEL = np.random.default_rng(3).normal(size=(1, 1, 6, 6)).astype("f4")
WEIGHT = np.linspace(0.5, 2, 6, dtype="f4").reshape(1, 1, 1, 6)


@jax.custom_vjp
def straight_through(y):
    return jnp.sign(y)


straight_through.defvjp(lambda y: (jnp.sign(y), None), lambda _, ct: (ct,))

ACTIVATIONS = {
    "a rule of its own": straight_through,
    "normalized weights": lambda y: y * WEIGHT / np.sqrt((WEIGHT**2).sum()),
    "a convolution": lambda y: jax.lax.conv_general_dilated(
        y.astype(jnp.float32), KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
    "gated": lambda y: jax.nn.glu(y),  # half as many channels
    "of another dtype": lambda y: y.astype(jnp.bfloat16),
    "over channels": lambda y: jax.nn.softmax(y),
    "with an array": lambda y: y * SLOPES,
    "residual": lambda y: jnp.maximum(y + jnp.ones_like(y), 0.1),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("jitted", (False, True))
def test_any_function_follows(name, jitted):
    """It is part of the pass; its result may have another shape."""
    activation = ACTIVATIONS[name]
    x, g = data(4, 4, 3, 6).astype("f4"), jnp.linspace(0.5, 2, 6)

    def f(x, g):
        return norm(x, methods.group_norm(2), scale=g, activation=activation, dtype=jnp.float32)[0]

    def apart(x, g):
        return activation(norm(x, methods.group_norm(2), scale=g)[0]).astype(jnp.float32)

    y, back = jax.vjp(jax.jit(f) if jitted else f, x, g)
    wanted, back_apart = jax.vjp(apart, x, g)
    assert f(x, g).dtype == y.dtype == jnp.float32
    np.testing.assert_allclose(f(x, g), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    atol = 3e-2 if "dtype" in name else 1e-4
    for got, want in zip(back(jnp.cos(y)), back_apart(jnp.cos(y)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("activation", (jax.nn.silu, jax.nn.gelu))
def test_an_activation_is_applied_before_the_result_is_rounded(activation, dtype):
    """Which is closer to float64 than to round first, in values and gradients."""
    x, ct = data(4, 8, 8, 6).astype(dtype), data(4, 8, 8, 6, seed=1).astype(dtype)

    def fused(x):
        return norm(x, methods.group_norm(2), activation=activation)[0]

    def rounded(x):
        return activation(norm(x, methods.group_norm(2))[0])

    with jax.enable_x64(True):
        y, back = jax.vjp(rounded, jnp.asarray(x.astype("f8")))
        exact, dx = np.asarray(y), np.asarray(back(jnp.asarray(ct.astype("f8")))[0])
    errors = []
    for f in (fused, rounded):
        y, back = jax.vjp(f, jnp.asarray(x))
        of_x = back(jnp.asarray(ct))[0]
        errors.append([np.abs(np.asarray(a, "f8") - b).mean() for a, b in ((y, exact), (of_x, dx))])
    assert errors[0][0] < 0.8 * errors[1][0]
    assert errors[0][1] <= errors[1][1]


def test_gradients_of_what_an_activation_uses():
    """Arrays may enter it in any way, not only element by element, and in other dtypes."""
    x, w = data(4, 4, 3, 6).astype("f4"), jnp.asarray(WEIGHT)
    uses = {
        "norm": lambda y, w: y * w / jnp.sqrt((w**2).sum()),
        "softmax": lambda y, w: y * jax.nn.softmax(w, axis=None),
        "half": lambda y, w: y * w.astype(jnp.bfloat16).astype(jnp.float32),
        "repeated": lambda y, w: y * jnp.repeat(w, 4, 0),
    }
    for name, use in uses.items():

        def fused(x, w, use=use):
            return norm(x, methods.group_norm(2), activation=lambda y: use(y, w))[0]

        def apart(x, w, use=use):
            return use(norm(x, methods.group_norm(2))[0], w)

        for wrap in (lambda f: f, jax.jit):
            got, wanted = (jax.vjp(wrap(f), x, w)[1](jnp.cos(x)) for f in (fused, apart))
            for a, b in zip(got, wanted, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)
    second = [
        jax.jvp(jax.grad(lambda x, f=f: (f(x, w) ** 2).sum()), (x,), (x,))[1]
        for f in (fused, apart)
    ]
    np.testing.assert_allclose(*second, rtol=1e-3, atol=1e-3)


def test_no_examples_of_many_channels():
    assert norm(jnp.ones((0, 2**14)), methods.batch_norm())[0].shape == (0, 2**14)
