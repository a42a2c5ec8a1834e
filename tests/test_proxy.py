"""Proxy Normalization against its definition in NumPy and the closed forms that follow from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as fnnx
from helpers import close
from scipy import special

from jaxnorm import Groups, linen, methods, nnx
from jaxnorm.methods import _proxy

SHAPE = (3, 2, 4, 6)
pytestmark = pytest.mark.usefixtures("x64")


def quantiles(n):
    return np.sqrt(2) * special.erfinv(2 * (np.arange(n) + 0.5) / n - 1)


def silu(xp, y):
    return y / (1 + xp.exp(-y))


def definition(xp, x, scale, bias, more_scale, more_bias, n=200):
    mean = x.mean((1, 2, 3), keepdims=True)
    normal = (x - mean) / xp.sqrt(((x - mean) ** 2).mean((1, 2, 3), keepdims=True) + 1e-3)
    q = quantiles(n)[:, None, None, None]
    p = silu(xp, scale * (more_bias + (1 + more_scale) * q) + bias)
    centered = silu(xp, scale * normal + bias) - p.mean(0, keepdims=True)
    return centered / xp.sqrt(p.var(0, keepdims=True) + 0.03)


METHOD = methods.proxy_norm(methods.layer_norm())


def proxied(x, method=METHOD, **options):
    return method.apply(x, {}, train=True, **options)[0]


def ours(x, scale, bias, more_scale, more_bias, activation=jax.nn.silu):
    scale, bias, more_scale, more_bias = (
        t.reshape(-1) for t in (scale, bias, more_scale, more_bias)
    )
    names = {
        "scale": scale,
        "bias": bias,
        "proxy_scale": more_scale,
        "proxy_bias": more_bias,
        "activation": activation,
    }
    return proxied(x, **names)


def draw():
    rng = np.random.default_rng(0)
    return rng.normal(1, 2, SHAPE), *rng.normal(size=(4, 1, 1, 1, 6))


def test_values_and_gradients_of_all_four_parameters():
    args = draw()

    def differentiated(f):
        def run(*args):
            y, pull = jax.vjp(f, *args)
            return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

        return jax.jit(run)

    y, gradients = differentiated(ours)(*args)
    close(y, definition(np, *args))
    close(gradients, differentiated(lambda *args: definition(jnp, *args))(*args)[1])


def test_gradient_by_finite_differences():
    """Through the statistics of the proxy, by the NumPy definition alone."""
    args = draw()
    grads = jax.jit(jax.grad(lambda *args: jnp.sin(ours(*args)).sum(), argnums=(1, 2, 3, 4)))(*args)
    for i, grad in enumerate(grads, start=1):
        for sign in (1,):
            step = np.zeros((1, 1, 1, 6))
            step[..., 2] = 1e-6 * sign
            high, low = (
                np.sin(definition(np, *args[:i], args[i] + s, *args[i + 1 :])).sum()
                for s in (step, -step)
            )
            assert grad[0, 0, 0, 2] == pytest.approx((high - low) / 2e-6, abs=1e-6)


def test_without_an_activation():
    """out = gamma (y - beta') / sqrt(gamma^2 (1 + gamma')^2 v_n + epsilon), v_n the variance of the
    grid."""
    x, scale, bias, more_scale, more_bias = draw()
    normal = (x - x.mean((1, 2, 3), keepdims=True)) / np.sqrt(
        x.var((1, 2, 3), keepdims=True) + 1e-3
    )
    expected = (
        scale
        * (normal - more_bias)
        / np.sqrt(scale**2 * (1 + more_scale) ** 2 * quantiles(200).var() + 0.03)
    )
    close(
        jax.jit(lambda *args: ours(*args, activation=None))(x, scale, bias, more_scale, more_bias),
        expected,
    )


def test_variance_of_the_grid():
    for n, var in ((8, 0.85105), (50, 0.97491), (200, 0.99360), (256, 0.99498)):
        close(_proxy._quantiles(n), quantiles(n), atol=1e-12)
        assert _proxy._quantiles(n).var() == pytest.approx(var, abs=1e-5)


def test_the_grid_itself_comes_out_standardized():
    """Its own quantiles as input: mean 0 and variance V / (V + epsilon), as what they stand for
    would."""
    x = jnp.asarray(quantiles(200)).reshape(1, 200, 1)
    x = x / jnp.sqrt(x.var())
    zero, grid = jnp.zeros(1), np.sqrt(quantiles(200).var())
    y = proxied(
        x,
        methods.proxy_norm(methods.layer_norm(), epsilon=0.0),
        scale=jnp.full(1, 1.0),
        proxy_scale=zero + 1 / grid - 1,
        activation=jax.nn.relu,
    )
    var = np.maximum(quantiles(200) / grid, 0).var()
    assert float(y.mean()) == pytest.approx(0, abs=1e-12)
    assert float(y.var()) == pytest.approx(var / (var + 0.03), abs=1e-12)
    exact = 0.5 - 1 / (2 * np.pi)  # of relu of a normal number
    assert (
        abs(np.maximum(quantiles(10_000), 0).var() - exact)
        < 1e-3
        < abs(np.maximum(quantiles(50), 0).var() - exact)
    )


def test_a_scale_of_zero_gives_zero_and_examples_do_not_meet():
    x, scale, bias, more_scale, more_bias = draw()
    run = jax.jit(ours)
    y = run(x, scale * (np.arange(6) != 2), bias, more_scale, more_bias)
    close(y[..., 2], np.zeros(SHAPE[:3]))
    close(
        run(x * np.array([1, 3, 3])[:, None, None, None], scale, bias, more_scale, more_bias)[:1],
        run(x, *draw()[1:])[:1],
    )


def test_scale_and_bias_of_each_example():
    x, scale, bias, more_scale, more_bias = draw()
    each = np.random.default_rng(1).normal(size=(2, 3, 6))
    more = {
        "proxy_scale": more_scale.ravel(),
        "proxy_bias": more_bias.ravel(),
        "activation": jax.nn.silu,
    }
    y = jax.jit(lambda x, g, b: proxied(x, scale=g, bias=b, **more))(x, *each)
    alone = [
        definition(np, x[i : i + 1], each[0][i], each[1][i], more_scale, more_bias)
        for i in range(3)
    ]
    close(y, np.concatenate(alone))


def test_it_keeps_x_alone():
    x, one = jnp.ones((16, 8, 8, 64), jnp.bfloat16), jnp.ones(64, jnp.float32)

    def f(x, g):
        return proxied(x, scale=g, proxy_scale=g, activation=jax.nn.silu)

    kept = [
        t
        for t in jax.tree.leaves(jax.eval_shape(lambda x, g: jax.vjp(f, x, g)[1], x, one))
        if t.size >= x.size
    ]
    assert {(t.shape, t.dtype) for t in kept} == {(x.shape, x.dtype)}


def test_errors():
    for method in (methods.batch_norm(), Groups(batch=1, spatial=1, channel=1)):
        with pytest.raises(ValueError, match="stands in for statistics of the batch. Got"):
            methods.proxy_norm(method)
    for method in (methods.evonorm_s0(), "layer_norm", (3, 1, 1, 1)):
        with pytest.raises(TypeError, match="takes a row of the table. Got"):
            methods.proxy_norm(method)
    with pytest.raises(ValueError, match="num_quantiles is 0; expected an integer of at least 1"):
        methods.proxy_norm(methods.layer_norm(), num_quantiles=0)
    with pytest.raises(ValueError, match="proxy_bias has shape \\(4,\\)"):
        proxied(jnp.ones(SHAPE), proxy_bias=jnp.zeros(4))


def test_layers_take_the_activation_at_the_call():
    """None is no activation, as one that is left out."""
    x = jnp.asarray(draw()[0])
    one, other = linen.Norm(METHOD), nnx.Norm(6, METHOD, rngs=fnnx.Rngs(0))
    variables = one.init(jax.random.key(0), x)
    for options in ({"activation": jax.nn.silu}, {"activation": None}, {}):
        expected = proxied(x, **options)
        close(one.apply(variables, x, **options), expected, atol=1e-6)
        close(other(x, **options), expected, atol=1e-6)
    with_silu = one.apply(variables, x, activation=jax.nn.silu)
    assert not np.allclose(with_silu, expected, atol=0.1)
