"""Filter Response Normalization and the thresholded linear unit against a definition in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, differentiated

from jaxnorm import methods, norm

SHAPE = (3, 2, 4, 5)
pytestmark = pytest.mark.usefixtures("x64")
differentiated = partial(differentiated, has_aux=False)


def response(x, method=None, **options):
    """y of a method that remembers nothing."""
    return (method or methods.filter_response_norm()).apply(x, {}, train=True, **options)[0]


def definition(xp, x, scale, bias, threshold, slope, learned, epsilon=1e-6):
    normal = x / xp.sqrt((x**2).mean((1, 2), keepdims=True) + epsilon + abs(learned)) * scale + bias
    return xp.maximum(normal, slope * normal + threshold)


def draw():
    rng = np.random.default_rng(0)
    return rng.normal(1, 2, SHAPE), *rng.normal(size=(4, SHAPE[-1])), np.float64(-0.3)


def test_values_and_gradients():
    method = methods.filter_response_norm(use_slope=True, use_learned_epsilon=True)

    def ours(x, scale, bias, threshold, slope, learned):
        options = {"scale": scale, "bias": bias, "threshold": threshold, "slope": slope}
        return response(x, method, learned_epsilon=learned, **options)

    args = draw()
    y, gradients = differentiated(ours)(*args)
    close(y, definition(np, *args))
    close(
        gradients,
        differentiated(
            lambda *args: definition(
                jnp, *(t[None, None, None] if t.ndim == 1 else t for t in args)
            )
        )(*args)[1],
    )


def test_limits_of_the_threshold():
    x, scale, bias, *_ = draw()
    plain = differentiated(
        lambda x: norm(x, methods.instance_rms_norm(epsilon=1e-6), scale=scale, bias=bias)[0]
    )(x)
    without = methods.filter_response_norm(use_threshold=False)
    run = differentiated(lambda x: response(x, without, scale=scale, bias=bias))
    close(run(x), plain)
    for threshold, expected in ((-np.inf, lambda t: t), (0.0, jax.nn.relu)):
        tau = jnp.full(5, threshold)
        ours = differentiated(lambda x, tau=tau: response(x, scale=scale, bias=bias, threshold=tau))
        theirs = differentiated(
            lambda x, f=expected: f(
                norm(x, methods.instance_rms_norm(epsilon=1e-6), scale=scale, bias=bias)[0]
            )
        )
        close(ours(x), theirs(x))


def test_mean_square_is_one_and_positive_factors_cancel():
    x = jnp.asarray(draw()[0])
    method = methods.filter_response_norm(use_threshold=False, epsilon=0.0)
    run = jax.jit(lambda x: response(x, method))
    close((run(x) ** 2).mean((1, 2)), np.ones((3, 5)))
    close(run(7 * x), run(x))
    close(run(x[:, :1, :1]), jnp.sign(x[:, :1, :1]))  # one position: nothing but the sign is left


def test_learned_epsilon_keeps_one_position_apart():
    x = jnp.asarray(draw()[0])[:, :1, :1]
    method = methods.filter_response_norm(
        use_threshold=False, use_learned_epsilon=True, epsilon=0.0
    )
    y, (dx, de) = differentiated(lambda x, e: response(x, method, learned_epsilon=e))(
        x, jnp.asarray(-4.0)
    )
    close(y, x / jnp.sqrt(x**2 + 4))
    assert (jnp.abs(dx) > 0).all() and de != 0


def test_threshold_of_each_example():
    x = jnp.asarray(draw()[0])
    tau = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5)))
    close(methods.thresholded_linear_unit(x, tau), jnp.maximum(x, tau[:, None, None]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_threshold_in_half_precision(dtype):
    x = jnp.asarray(draw()[0], dtype)
    tau = jnp.full(SHAPE[-1], 0.5, jnp.float32)
    f = jax.jit(lambda x: methods.thresholded_linear_unit(x, tau))
    y, pull = jax.vjp(f, x)
    close(*(t.astype(jnp.float32) for t in (y, jnp.maximum(x, 0.5))))
    np.testing.assert_array_equal(pull(jnp.ones_like(y))[0], x > 0.5)


def test_normalization_and_threshold_keep_x_alone():
    x = jnp.ones((16, 8, 8, 64), jnp.bfloat16)
    tau = jnp.zeros(64, jnp.float32)
    method = methods.filter_response_norm(use_slope=True)
    f = lambda x, t: response(x, method, threshold=t, slope=t)  # noqa: E731
    pull = jax.eval_shape(lambda x, t: jax.vjp(f, x, t)[1], x, tau)
    kept = [t for t in jax.tree.leaves(pull) if t.size >= x.size]
    assert {(t.shape, t.dtype) for t in kept} == {(x.shape, x.dtype)}


def test_errors():
    x = jnp.ones(SHAPE)
    with pytest.raises(
        ValueError,
        match="threshold has shape \\(4,\\).*Expected \\(5,\\), \\(3, 5\\) per example",
    ):
        response(x, threshold=jnp.zeros(4))
    for name, without in (
        ("slope", {}),
        ("learned_epsilon", {}),
        ("threshold", {"use_threshold": False}),
    ):
        value = jnp.zeros(() if name == "learned_epsilon" else 5)
        with pytest.raises(
            ValueError, match=rf"{name} was given to filter_response_norm\(.*has none"
        ):
            response(x, methods.filter_response_norm(**without), **{name: value})
    with pytest.raises(ValueError, match="Got use_threshold=False and use_slope=True"):
        methods.filter_response_norm(use_threshold=False, use_slope=True)
