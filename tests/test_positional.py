"""Positional Normalization with the moment shortcut, against NumPy, and the dynamic shortcut in
both frameworks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, data

from jaxnorm import Moments, linen, methods, moments, norm, normalize, positional
from jaxnorm import nnx as nnx_layers

SHAPE = (3, 4, 5, 6)


def taken_out(x, epsilon=1e-5, correction=0, channel_axis=-1):
    """Standardized positions, and the moments that were taken out of them."""
    row, axes = methods.positional_norm(epsilon=epsilon), {"channel_axis": channel_axis}
    if correction == 0:
        return norm(x, row, **axes)
    m, n = moments(x, row, **axes), x.shape[channel_axis]
    m = dataclasses.replace(m, var=m.var * n / (n - correction))
    return normalize(x, m, epsilon=epsilon, **axes), m


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ddof", (0, 1))
def test_values_moments_and_gradients(ddof):
    """ddof 1 is the authors' torch code."""

    def definition(xp, x):
        mean = x.mean(-1, keepdims=True)
        std = xp.sqrt(x.var(-1, keepdims=True, ddof=ddof) + 1e-5)
        return (x - mean) / std, mean, std

    def run(f):
        def g(x, gy):
            out, pull = jax.vjp(f, x)
            return out, pull(gy)

        return jax.jit(g)

    x = data(*SHAPE)
    gy = (data(*SHAPE, seed=1), data(*SHAPE[:3], 1, seed=2), data(*SHAPE[:3], 1, seed=3))

    def ours(x):
        y, m = taken_out(x, correction=ddof)
        return y, m.mean, jnp.sqrt(m.var + 1e-5)

    out, dx = run(ours)(x, gy)
    close(out, definition(np, np.asarray(x)))
    close(dx, run(lambda x: definition(jnp, x))(x, gy)[1])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("epsilon, correction", ((1e-5, 0), (0.0, 0), (1e-5, 1)))
def test_the_shortcut_undoes_the_normalization(epsilon, correction):
    """In value, and its derivative is the identity."""

    def there_and_back(x):
        return positional.moment_shortcut(*taken_out(x, epsilon, correction), epsilon=epsilon)

    x, gy = data(*SHAPE), data(*SHAPE, seed=1)
    y, pull = jax.vjp(jax.jit(there_and_back), x)
    close((y, *pull(gy)), (x, gy))


@pytest.mark.usefixtures("x64")
def test_the_layer_and_the_value_take_out_the_same():
    x = data(*SHAPE)
    y, _ = norm(x, methods.positional_norm())
    close(methods.positional_norm().apply(x, {}, train=True)[0], y)
    layer = linen.Norm(methods.positional_norm(), use_scale=False, use_bias=False)
    close(layer.apply({}, x), y)


@pytest.mark.usefixtures("x64")
def test_one_channel_and_another_layout():
    y, m = taken_out(data(2, 3, 1))
    assert (y == 0).all() and (m.mean == data(2, 3, 1)).all() and (m.var == 0).all()
    dx = jax.jit(jax.grad(summed))(jnp.ones((2, 3, 4)))
    np.testing.assert_allclose(dx, 0.25)  # that of the mean: constant positions give no NaN
    x, other = data(*SHAPE), data(3, 4, 5, 8, seed=1)
    y_first, first = taken_out(jnp.moveaxis(x, -1, 1), channel_axis=1)
    y_last, last = taken_out(x)
    close(jnp.moveaxis(y_first, 1, -1), y_last)
    close(*(t.mean for t in (jax.tree.map(lambda t: jnp.moveaxis(t, 1, -1), first), last)))
    back = positional.moment_shortcut(jnp.moveaxis(other, -1, 1), first, channel_axis=1)
    close(jnp.moveaxis(back, 1, -1), positional.moment_shortcut(other, last))
    close(positional.moment_shortcut(other, last), other * jnp.sqrt(last.var + 1e-5) + last.mean)


def summed(x):
    """Of y, of the mean and of the standard deviation that the shortcut gives back."""
    y, m = taken_out(x)
    return y.sum() + m.mean.sum() + jnp.sqrt(m.var + 1e-5).sum()


def test_the_shortcut_keeps_x_and_the_moments():
    x = jnp.ones((16, 8, 8, 64), jnp.bfloat16)
    mean = jnp.ones((16, 8, 8, 1), jnp.float32)
    y, pull = jax.eval_shape(
        lambda x, *args: jax.vjp(positional.moment_shortcut, x, Moments(*args)), x, mean, mean, mean
    )
    kept = [t for t in jax.tree.leaves(pull) if t.size >= x.size]
    assert y.dtype == jnp.bfloat16 and [(t.shape, t.dtype) for t in kept] == [(x.shape, x.dtype)]


def test_moments_of_another_resolution_are_refused():
    x, one = jnp.ones(SHAPE), jnp.ones((3, 2, 5, 1))
    with pytest.raises(
        ValueError, match=r"do not fit x of shape \(3, 4, 5, 6\). Expected \(3, 4, 5, 1\) for both"
    ):
        positional.moment_shortcut(x, Moments(one, one, one))
    with pytest.raises(
        ValueError, match=r"\(3, 4, 5, 1\) and shift of shape \(3, 4, 5, 6\) do not"
    ):
        positional.scale_and_shift(x, jnp.ones((3, 4, 5, 1)), x)
    with pytest.raises(TypeError, match="m must be Moments.*Got"):
        positional.moment_shortcut(x, one)


@pytest.mark.parametrize("channel_axis", (1, pytest.param(-1, marks=pytest.mark.slow)))
def test_dynamic_shortcut(channel_axis):
    """It starts as the plain one; both frameworks agree with two convolutions written out."""
    x = jnp.asarray(data(*SHAPE), jnp.float32)
    _, m = taken_out(jnp.asarray(data(*SHAPE, seed=1), jnp.float32))
    mean, std = m.mean, jnp.sqrt(m.var + 1e-5)
    args = jax.tree.map(lambda t: jnp.moveaxis(t, -1, channel_axis), (x, m))
    layer = linen.DynamicMomentShortcut(hidden_features=4, channel_axis=channel_axis)
    y, variables = jax.jit(layer.init_with_output)(jax.random.key(0), *args)
    plain = positional.moment_shortcut(x, m)
    close(jnp.moveaxis(y, channel_axis, -1), plain, atol=1e-5)

    rng = np.random.default_rng(2)
    variables = jax.tree.map(
        lambda t: jnp.asarray(rng.normal(size=t.shape), jnp.float32), variables
    )
    y = jax.jit(layer.apply)(variables, *args)
    twin = nnx_layers.DynamicMomentShortcut(
        6, hidden_features=4, channel_axis=channel_axis, rngs=nnx.Rngs(0)
    )
    for conv, name in ((twin.first, "Conv_0"), (twin.second, "Conv_1")):
        conv.kernel[...], conv.bias[...] = (
            variables["params"][name][key] for key in ("kernel", "bias")
        )
    close(nnx.jit(lambda layer, *args: layer(*args))(twin, *args), y, atol=1e-4)

    def conv(t, p):
        padded = np.pad(t, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        return np.einsum("nhwcij,ijco->nhwo", windows, np.asarray(p["kernel"], "f8")) + np.asarray(
            p["bias"], "f8"
        )

    t = np.concatenate([mean, std], axis=-1).astype("f8")
    f, g = np.split(
        conv(np.maximum(conv(t, variables["params"]["Conv_0"]), 0), variables["params"]["Conv_1"]),
        2,
        axis=-1,
    )
    expected = np.asarray(x, "f8") * (std + f) + mean + g
    np.testing.assert_allclose(jnp.moveaxis(y, channel_axis, -1), expected, rtol=1e-4, atol=1e-3)

    alone = {"hidden_features": 4, "channel_axis": channel_axis, "residual": False}
    y = jax.jit(linen.DynamicMomentShortcut(**alone).apply)(variables, *args)
    expected = np.asarray(x, "f8") * f + g
    np.testing.assert_allclose(jnp.moveaxis(y, channel_axis, -1), expected, rtol=1e-4, atol=1e-3)
    twin.residual = False
    close(nnx.jit(lambda layer, *args: layer(*args))(twin, *args), y, atol=1e-4)
    first = nnx_layers.DynamicMomentShortcut(6, **alone, rngs=nnx.Rngs(0))
    start = jax.jit(linen.DynamicMomentShortcut(**alone).init)(jax.random.key(0), *args)
    for kernel in (first.second.kernel[...], start["params"]["Conv_1"]["kernel"]):
        assert np.abs(kernel).max() > 0.1  # else y would be 0
